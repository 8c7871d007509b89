"""What :func:`accelerate_attention` asks for in a part of a model that is compiled as a whole.

Dynamo inlines the decorated part into the model's graph, and the options of the part's own compilation are not read.
So the decorator annotates the part's nodes, and here what it asks for at single sites is put over the graph's options.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import weakref
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from typing import Any

from torch import fx

from attnrewrite.options.compile_options import DATA_DEPENDENT_SIZES, OWN_OPTIONS, Policy
from attnrewrite.torch_private import dynamo_config

__all__ = ["DecoratedPart", "inner_backend_is_given", "parts_in", "policy_at", "say_what_is_lost"]

log = logging.getLogger("attnrewrite")

_INNERMOST = "attnrewrite_part"
_OF_SITES = ("kernels", "kernel_rules", "strict", "assume_attended_rows", "checks", "autotune")
"""The options that may differ from site to site of one graph."""


inner_backend_is_given: ContextVar[bool] = ContextVar("attnrewrite_inner_backend_is_given", default=True)
"""False where nothing is lost with a part's own inner backend, since ``explain`` takes none of the user's."""


class DecoratedPart:
    """A part of a model under :func:`accelerate_attention`.

    The decorated class or function holds it, and so does each graph that it is a part of and that may be compiled again
    (``variants.py``). It is forgotten with the last of them.

    Attributes:
        arguments: ``options``, ``mode`` and ``dynamic``, as for ``torch.compile``.
        annotation: of the part's nodes (``torch.fx.traceback.annotate``).
        said: the arguments that a warning said are not heard.
    """

    def __init__(self, name: str, arguments: Mapping[str, Any]) -> None:
        """Args:
        name: for messages.
        arguments: as the attribute.
        """
        self.name = name
        self.arguments = arguments
        self.said: set[str] = set()
        number = str(next(_numbers))
        _parts[number] = self
        # The key that all parts share names the innermost one. A key of its own keeps it known within inner parts.
        self.annotation = {f"{_INNERMOST}_{number}": number, _INNERMOST: number}

    @property
    def _options(self) -> Mapping[str, Any]:
        return self.arguments["options"] or {}

    def over(self, policy: Policy) -> Policy:
        """What holds within this part of a graph that is compiled under ``policy``."""
        own = self._own()
        given = {key: getattr(own, key) for key in _OF_SITES if key in self._options}
        if "kernel_rules" in given:
            given["kernel_rules"] = (*own.kernel_rules, *policy.kernel_rules)
        return dataclasses.replace(policy, **given)

    def lost(self, policy: Policy) -> list[str]:
        """What was asked for here and differs in the graph as a whole."""
        own = self._own()
        names = [] if own.mode in (None, policy.mode) else ["mode"]
        names += [] if self.arguments["dynamic"] is None else ["dynamic"]
        for key in self._options:
            if key == DATA_DEPENDENT_SIZES:
                holds = own.capture_dynamic_output_shape_ops == dynamo_config.capture_dynamic_output_shape_ops
            elif key == "inner_backend" and not inner_backend_is_given.get():
                holds = True
            elif key in OWN_OPTIONS:
                holds = key in _OF_SITES or getattr(own, key) == getattr(policy, key)
            else:
                holds = key in policy.inner_options and policy.inner_options[key] == own.inner_options[key]
            names += [] if holds else [f"options[{key!r}]"]
        return names

    def _own(self) -> Policy:
        return Policy.from_options(self._options, self.arguments["mode"])


_numbers = itertools.count()
_parts: weakref.WeakValueDictionary[str, DecoratedPart] = weakref.WeakValueDictionary()
"""The parts by their numbers: an annotation is made of strings, which Dynamo takes as constants."""


def _parts_at(node: fx.Node) -> list[DecoratedPart]:
    """The decorated parts that the node is in, the innermost last."""
    custom = node.meta.get("custom") or {}
    if _INNERMOST not in custom:
        return []
    around = [number for key, number in custom.items() if key.startswith(f"{_INNERMOST}_")]
    around.sort(key=lambda number: number == custom[_INNERMOST])
    return [_parts[number] for number in around]


def policy_at(policy: Policy, node: fx.Node) -> Policy:
    """What holds at a site: the graph's policy, and over it what the parts ask for that its node is in.

    Raises:
        OptionError: an option of a part has a wrong value.
    """
    for part in _parts_at(node):
        policy = part.over(policy)
    return policy


def say_what_is_lost(gm: fx.GraphModule, policy: Policy) -> list[str]:
    """A sentence for each part of the graph some of whose options cannot hold; each is logged once as a warning.

    Raises:
        OptionError: an option of a part has a wrong value.
    """
    notes = []
    for part in parts_in(gm):
        names = part.lost(policy)
        if not names:
            continue
        notes.append(
            f"accelerate_attention on {part.name} is part of a model that is compiled as a whole: {', '.join(names)} "
            f"{'has' if len(names) == 1 else 'have'} no effect here; set {'it' if len(names) == 1 else 'them'} where "
            "the whole model is compiled"
        )
        if not part.said.issuperset(names):
            log.warning("%s", notes[-1])
            part.said.update(names)
    return notes


def parts_in(gm: fx.GraphModule) -> Iterator[DecoratedPart]:
    """The decorated parts that nodes of a graph are in."""
    found: dict[int, DecoratedPart] = {}
    for module in gm.modules():
        if isinstance(module, fx.GraphModule):
            found.update((id(part), part) for node in module.graph.nodes for part in _parts_at(node))
    yield from found.values()
