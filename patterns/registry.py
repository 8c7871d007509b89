"""The catalogue of patterns, and users' own: checked when they are registered, and whenever they find something."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pkgutil import iter_modules
from typing import Any, TypeVar

from torch import fx

from attnrewrite.errors import PatternError
from attnrewrite.ir.axes import Layout, axes_of, shape_of
from attnrewrite.ir.finding import Finding, NearMiss
from attnrewrite.ir.graph_view import GraphView
from attnrewrite.ir.nodes import is_tensor, same_shape, tensor
from attnrewrite.ir.site import AttentionSite
from attnrewrite.patterns.base import Pattern, Specimen

__all__ = ["PatternError", "catalogue", "register_pattern", "registered", "specimens", "unregister_pattern"]


def catalogue() -> tuple[Pattern, ...]:
    """Every pattern there is, registered ones included, in the order in which they look at a graph."""
    return tuple(sorted((*built_in(), *registered()), key=lambda pattern: pattern.precedence))


@cache
def built_in() -> tuple[Pattern, ...]:
    """The patterns of this package, in no particular order."""
    package = sys.modules[__package__]
    modules = [import_module(f"{package.__name__}.{module.name}") for module in iter_modules(package.__path__)]
    return tuple(module.PATTERN for module in modules if hasattr(module, "PATTERN"))


def specimens() -> tuple[Specimen, ...]:
    """Every specimen of every pattern: the spellings that must be found."""
    return tuple(specimen for pattern in catalogue() for specimen in pattern.specimens)


T = TypeVar("T")


_registered: dict[str, _Checked] = {}


def register_pattern(pattern: T) -> T:
    """Adds a pattern to every compilation from now on. Also works as a decorator.

    Graphs that are already compiled stay as they are; ``torch.compiler.reset()`` drops them.

    Args:
        pattern: an object with the attributes of :class:`Pattern`, or a class that is made without arguments. ``name``
            belongs to no other pattern. ``precedence`` is a whole number, and lower looks first; the built-in patterns
            have 10, 11, 20 and 40. Of patterns that claim the same nodes, the one whose anchor comes first in the graph
            has them, then the one with the lower precedence. ``specimens`` may be empty. ``find(view)`` finds.

    Returns:
        What was given.

    Raises:
        PatternError: one of these is missing or wrong, or the name is taken.
    """
    checked = _checked(pattern)
    taken = {other.name for other in catalogue()}
    if checked.name in taken:
        advice = f"; attnrewrite.unregister_pattern({checked.name!r}) removes it" if checked.name in _registered else ""
        raise PatternError(f"a pattern named {checked.name!r} exists already{advice}; or choose another name")
    known = {specimen.name for other in catalogue() for specimen in other.specimens}
    for specimen in checked.specimens:
        if specimen.name in known:
            raise PatternError(f"a specimen named {specimen.name!r} exists already; choose another name")
        known.add(specimen.name)
    _registered[checked.name] = checked
    return pattern


def unregister_pattern(name: str) -> None:
    """Removes a registered pattern from the catalogue; graphs that are already compiled stay as they are.

    Raises:
        PatternError: no pattern of this name was registered. Built-in patterns cannot be taken out.
    """
    if name not in _registered:
        names = ", ".join(map(repr, _registered)) or "none"
        raise PatternError(f"no pattern named {name!r} is registered; registered are: {names}")
    del _registered[name]


def registered() -> tuple[Pattern, ...]:
    """The registered patterns, in the order in which they were registered."""
    return tuple(_registered.values())


def _checked(pattern: Any) -> _Checked:
    what = pattern.__qualname__ if isinstance(pattern, type) else type(pattern).__qualname__
    instance = pattern
    if isinstance(pattern, type):
        try:
            instance = pattern()
        except TypeError as error:
            raise PatternError(f"{what} cannot be made without arguments ({error}); register an instance") from None
    missing = [name for name in ("name", "precedence", "specimens", "find") if not hasattr(instance, name)]
    if missing:
        raise PatternError(
            f"{what} has no {' and no '.join(missing)}; a pattern has a name, a precedence, specimens (which may be an "
            "empty tuple) and find(view)"
        )
    name, precedence, specimens, find = instance.name, instance.precedence, instance.specimens, instance.find
    if not isinstance(name, str) or not name.strip() or "\n" in name:
        raise PatternError(f"{what}.name is a word that the report shows, such as 'my_attention'; got {name!r}")
    if not isinstance(precedence, int) or isinstance(precedence, bool):
        raise PatternError(f"{what}.precedence is a whole number, lower looks first; got {precedence!r}")
    if not isinstance(specimens, Sequence) or not all(isinstance(each, Specimen) for each in specimens):
        raise PatternError(
            f"{what}.specimens is a sequence of attnrewrite.patterns.Specimen, or an empty tuple; got {specimens!r}"
        )
    try:
        inspect.signature(find).bind(None)
    except (TypeError, ValueError):
        raise PatternError(
            f"{what}.find takes one argument, the graph as a GraphView, and yields findings; got {find!r}"
        ) from None
    return _Checked(instance, name, precedence, tuple(specimens))


@dataclass
class _Checked:
    """A registered pattern. Its findings are checked, so that an error names the pattern that made the mistake."""

    pattern: Any
    name: str
    precedence: int
    specimens: Sequence[Specimen]

    def find(self, view: GraphView) -> Iterator[Finding]:
        nodes = set(view.graph.nodes)
        try:
            for finding in self.pattern.find(view):
                self._check(finding, view, nodes)
                yield finding
        except PatternError:
            raise
        except Exception as error:
            raise PatternError(f"the pattern {self.name!r} raised {type(error).__name__}: {error}") from error

    def _check(self, finding: Any, view: GraphView, nodes: set[fx.Node]) -> None:
        def require(condition: bool, what: str) -> None:
            if not condition:
                raise PatternError(f"the pattern {self.name!r} found {what}")

        if isinstance(finding, NearMiss):
            require(finding.anchor in nodes and set(finding.nodes) <= nodes, "a near miss with nodes of another graph")
            return
        require(isinstance(finding, AttentionSite), f"{finding!r}, which is neither an AttentionSite nor a NearMiss")
        site: AttentionSite = finding
        require({site.anchor, site.result, *site.interior} <= nodes, "a site with nodes of another graph")
        require(
            view.ordered(site.interior)[-1:] == (site.result,), "a site whose interior does not end with its result"
        )
        operands = {"query": site.query, "key": site.key, "value": site.value}
        for name, operand in operands.items():
            require(operand.node in nodes, f"a site whose {name} is no node of the graph")
            require(_fits(operand.node, operand.layout), f"a site whose {name} has another shape than its layout")
        require(_fits(site.result, site.result_layout), "a site whose result has another shape than its layout")
        known = {axis for operand in operands.values() for axis in operand.axes} | set(axes_of(site.result_layout))
        for name in ("query_axes", "key_axes", "feature_axes"):
            leaves = {leaf for axis in getattr(site, name) for leaf in axis.leaves()}
            require(leaves <= known, f"a site whose {name} are axes of none of its operands")


def _fits(node: fx.Node, layout: Layout) -> bool:
    return is_tensor(node) and same_shape(shape_of(layout), tensor(node).shape)
