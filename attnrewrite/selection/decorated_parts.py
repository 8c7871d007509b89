"""Options of parts decorated with :func:`accelerate_attention` within a model that is compiled as a whole.

Dynamo inlines a decorated part into the model's graph and does not read the part's own compile options. So the
decorator annotates the part's nodes, and the options that apply to single sites override the graph's options at these
nodes.
"""

from __future__ import annotations

import dataclasses
import logging
import uuid
import weakref
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from typing import Any

from torch import fx

from attnrewrite.options.compile_options import DATA_DEPENDENT_SIZES, OWN_OPTIONS, Policy
from attnrewrite.torch_private import dynamo_config

__all__ = ["DecoratedPart", "inner_backend_is_given", "options_without_effect", "parts_in", "policy_at"]

log = logging.getLogger("attnrewrite")

_INNERMOST = "attnrewrite_part"
_SITE_OPTIONS = ("kernels", "kernel_rules", "strict", "assume_attended_rows", "checks", "autotune")
"""The options that may differ from site to site of one graph."""


inner_backend_is_given: ContextVar[bool] = ContextVar("attnrewrite_inner_backend_is_given", default=True)
"""False under ``explain`` without the user's inner backend: a part's own inner backend is then not reported."""


class DecoratedPart:
    """A part of a model under :func:`accelerate_attention`.

    The decorated class or function holds a reference to it, and so does each graph that contains the part and may be
    compiled again (``variants.py``). It is freed with the last of them.

    Attributes:
        arguments: ``options``, ``mode`` and ``dynamic``, as for ``torch.compile``.
        annotation: the annotation of the part's nodes (``torch.fx.traceback.annotate``).
        warned: the arguments without effect that a warning has named.
    """

    def __init__(self, name: str, arguments: Mapping[str, Any]) -> None:
        """Args:
        name: for messages.
        arguments: as the attribute.
        """
        self.name = name
        self.arguments = arguments
        self.warned: set[str] = set()
        # An exported program keeps the annotation, and may be loaded in another process.
        number = uuid.uuid4().hex
        _parts[number] = self
        # The shared key names the innermost part. The part's own key keeps it known within inner parts.
        self.annotation = {f"{_INNERMOST}_{number}": number, _INNERMOST: number}

    @property
    def _options(self) -> Mapping[str, Any]:
        return self.arguments["options"] or {}

    def override(self, policy: Policy) -> Policy:
        """The policy within this part of a graph that is compiled under ``policy``."""
        policy_of_part = self._policy()
        given = {key: getattr(policy_of_part, key) for key in _SITE_OPTIONS if key in self._options}
        if "kernel_rules" in given:
            given["kernel_rules"] = (*policy_of_part.kernel_rules, *policy.kernel_rules)
        return dataclasses.replace(policy, **given)

    def without_effect(self, policy: Policy) -> list[str]:
        """The part's arguments that have no effect, since the graph as a whole is compiled with others."""
        policy_of_part = self._policy()
        names = [] if policy_of_part.mode in (None, policy.mode) else ["mode"]
        names += [] if self.arguments["dynamic"] is None else ["dynamic"]
        for key in self._options:
            if key == DATA_DEPENDENT_SIZES:
                has_effect = (
                    policy_of_part.capture_dynamic_output_shape_ops == dynamo_config.capture_dynamic_output_shape_ops
                )
            elif key == "inner_backend" and not inner_backend_is_given.get():
                has_effect = True
            elif key in OWN_OPTIONS:
                has_effect = key in _SITE_OPTIONS or getattr(policy_of_part, key) == getattr(policy, key)
            else:
                has_effect = (
                    key in policy.inner_options and policy.inner_options[key] == policy_of_part.inner_options[key]
                )
            names += [] if has_effect else [f"options[{key!r}]"]
        return names

    def _policy(self) -> Policy:
        return Policy.from_options(self._options, self.arguments["mode"])


_parts: weakref.WeakValueDictionary[str, DecoratedPart] = weakref.WeakValueDictionary()
"""The parts by their numbers: an annotation is made of strings, which Dynamo takes as constants."""


def _parts_at(node: fx.Node) -> list[DecoratedPart]:
    """The decorated parts that contain the node, the innermost last."""
    custom = node.meta.get("custom") or {}
    if _INNERMOST not in custom:
        return []
    around = [number for key, number in custom.items() if key.startswith(f"{_INNERMOST}_")]
    around.sort(key=lambda number: number == custom[_INNERMOST])
    unknown = [number for number in around if number not in _parts]
    if unknown and not _warned.issuperset(unknown):
        _warned.update(unknown)
        log.warning(
            "accelerate_attention was on a part of this program when it was exported, in another process or on what is "
            "gone: its options are not known here (give them to attnrewrite.rewrite or torch.compile)"
        )
    return [_parts[number] for number in around if number in _parts]


_warned: set[str] = set()


def policy_at(policy: Policy, node: fx.Node) -> Policy:
    """The policy at a site: the graph's policy, overridden by the decorated parts that contain the node.

    Raises:
        OptionError: an option of a part has a wrong value.
    """
    for part in _parts_at(node):
        policy = part.override(policy)
    return policy


def options_without_effect(gm: fx.GraphModule, policy: Policy) -> list[str]:
    """A sentence for each part of the graph with options that have no effect; each is logged once as a warning.

    Raises:
        OptionError: an option of a part has a wrong value.
    """
    notes = []
    for part in parts_in(gm):
        names = part.without_effect(policy)
        if not names:
            continue
        notes.append(
            f"accelerate_attention on {part.name} is part of a model that is compiled as a whole: {', '.join(names)} "
            f"{'has' if len(names) == 1 else 'have'} no effect here; set {'it' if len(names) == 1 else 'them'} where "
            "the whole model is compiled"
        )
        if not part.warned.issuperset(names):
            log.warning("%s", notes[-1])
            part.warned.update(names)
    return notes


def parts_in(gm: fx.GraphModule) -> Iterator[DecoratedPart]:
    """The decorated parts that contain nodes of a graph."""
    found: dict[int, DecoratedPart] = {}
    for module in gm.modules():
        if isinstance(module, fx.GraphModule):
            found.update((id(part), part) for node in module.graph.nodes for part in _parts_at(node))
    yield from found.values()
