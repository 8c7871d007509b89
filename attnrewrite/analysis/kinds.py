"""Kinds of attention: whether the graph shows spatial, temporal or cross attention.

    cross       the positions of the key are other data than those of the query
    temporal    the positions of the query are the frames of a video, and nothing else
    spatial     all others: height and width, space and time at once, a plain sequence

Pyramid Attention Broadcast (https://arxiv.org/abs/2408.12588) distinguishes these kinds. An attention whose keys
contain the query's own sequence and more (an appended text) is self-attention.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import fx

from attnrewrite.analysis.dimensions import Dimension, Dimensions, Origin, origins_of
from attnrewrite.ir.axes import Axis, Operand, axes_of, resolve, size_of, take_minor
from attnrewrite.ir.linear_site import LinearAttention
from attnrewrite.ir.model_state import is_model_state
from attnrewrite.ir.nodes import is_tensor, same, tensor
from attnrewrite.ir.ops import INDICES, REORDERING_OPS, REPEATS
from attnrewrite.ir.site import AttentionSite
from attnrewrite.ir.source import source_location

aten = torch.ops.aten

__all__ = ["KINDS", "Kind", "SiteKind", "begins_with_batch", "is_named_temporal", "kinds_of"]

_SIZES = (bool, int, float, torch.SymInt, torch.SymFloat, torch.SymBool)

Kind = Literal["spatial", "temporal", "cross"]
KINDS: tuple[Kind, ...] = ("spatial", "temporal", "cross")


class SiteKind(NamedTuple):
    """The kind of one attention and its reason in words; not proved if that is only a name, or a default."""

    kind: Kind
    reason: str
    is_proved: bool = True


def kinds_of(gm: fx.GraphModule, sites: Sequence[AttentionSite | LinearAttention]) -> list[SiteKind]:
    """The kind of each attention of a captured graph, before it is rewritten.

    Args:
        gm: the graph; it is not changed, and no guard is added.
        sites: its attentions, as they were found. Their operands may be nodes that were inserted for a merged site.

    Returns:
        A kind for each site, in order. If convolutions and projections do not tell whether a self-attention is spatial
        or temporal, the names in the module's path decide, then its relation to the other sites; the default is
        spatial. The reason says what decided.
    """
    if not sites:
        return []
    dimensions = Dimensions(gm.graph)
    read = [_SiteDims(site, dimensions) for site in sites]
    for each in read:
        each.resolve()
    kinds = [_cross(each) or _kind_by_roles(each, dimensions) for each in read]
    kinds = [kind or _kind_by_name(each) for kind, each in zip(kinds, read, strict=True)]
    return [kind or _kind_by_relation(each, read, kinds, dimensions) for kind, each in zip(kinds, read, strict=True)]


def begins_with_batch(gm: fx.GraphModule) -> frozenset[fx.Node]:
    """The tensors whose first dimension is, or starts with, the first dimension of inputs that are data.

    Not so where its entries may stand in another order than in the inputs, or beside others.
    """
    dimensions = Dimensions(gm.graph)
    found: set[fx.Node] = set()
    reordered: set[fx.Node] = set()
    for node in gm.graph.nodes:
        inputs = node.all_input_nodes
        if any(each in reordered for each in inputs) or (
            any(each in found for each in inputs) and _reorders_first(node)
        ):
            reordered.add(node)
            continue
        if not is_tensor(node) or not tensor(node).dim():
            continue
        dim = dimensions.of(node)[0]
        origins = origins_of(dim[:1])
        from_data = origins and all(origin is not None and _is_data(origin[0]) and origin[1] == 0 for origin in origins)
        if from_data and all(map(_begins, dim[:1])):
            found.add(node)
    return frozenset(found)


def _begins(axis: Axis) -> bool:
    """Whether the dimension is no later part of one that was divided: not ``v`` of ``(b v)``."""
    if not isinstance(axis, Dimension):
        return True
    inner = axis
    while inner.whole is not None:
        if inner.whole.parts is None or inner.whole.parts[0] is not inner:
            return False
        inner = inner.whole
    return all(map(_begins, axis.sources[:1]))


def _reorders_first(node: fx.Node) -> bool:
    """Whether the operator may change which entries there are along the first dimension, or their order."""
    place = REORDERING_OPS.get(getattr(node.target, "overloadpacket", None))  # type: ignore[arg-type]
    if place is None:
        return False
    args: Any = node.args
    dims: Any = args[place] if 0 <= place < len(args) else node.kwargs.get("dim", node.kwargs.get("dims", 0))
    first = node.all_input_nodes[0]
    rank = tensor(first).dim() if is_tensor(first) else tensor(node).dim()
    if place == INDICES:
        return any(index is not None for index in args[1][:1])
    if place == REPEATS:
        return len(args[1]) > rank or not same(args[1][0], 1)
    if dims is None or dims == []:
        return True
    if node.target is aten.slice.Tensor and is_tensor(node) and same(tensor(node).shape[0], tensor(first).shape[0]):
        return False
    return any(dim % max(rank, 1) == 0 for dim in (dims if isinstance(dims, (list, tuple)) else [dims]))


class _SiteDims:
    """A site in terms of the graph's dimensions.

    Attributes:
        query, key: the dimensions that are positions; empty for a single position.
        query_features, key_features: the dimensions that the scores are summed over.
        batch: all other dimensions of the query.
    """

    def __init__(self, site: AttentionSite | LinearAttention, dimensions: Dimensions) -> None:
        self.site = site
        folded = site.folded if isinstance(site, AttentionSite) else ()
        positions = set(axes_of((site.query_axes,))) - set(axes_of((folded,)))
        features = set(axes_of((site.feature_axes,)))
        self.query = _of_axes(site.query, positions, dimensions)
        self.key = _of_axes(site.key, set(axes_of((site.key_axes,))), dimensions)
        self.query_features = _of_axes(site.query, features, dimensions)
        self.key_features = _of_axes(site.key, features, dimensions)
        own = {*self.query, *self.query_features}
        self.batch = tuple(axis for axis in axes_of(dimensions.of(site.query.node)) if axis not in own)

    def resolve(self) -> None:
        """Replaces dimensions that were divided since by their parts, in place."""
        self.query, self.key, self.batch = resolve((self.query, self.key, self.batch))


def _of_axes(operand: Operand, axes: set[Axis], dimensions: Dimensions) -> tuple[Axis, ...]:
    """The graph's dimensions of ``operand`` that are among ``axes`` of the site."""
    found: list[Axis] = []
    operand = operand.resolved()
    for dim, own in zip(operand.layout, dimensions.of(operand.node), strict=True):
        if axes.issuperset(dim):
            found.extend(own if dim else ())
            continue
        rest = list(own)
        for axis in reversed(dim):
            taken = take_minor(rest, axis.size)
            if taken is None:
                # The site divides the dimension in another way than the graph: all of it is taken for the part.
                found.extend(rest if axes.intersection(dim) else ())
                break
            found.extend(taken if axis in axes else ())
    return axes_of((tuple(found),))


# Cross attention.


def _cross(site: _SiteDims) -> SiteKind | None:
    """Cross attention if the positions of the key are other data than those of the query; else None."""
    query, key = origins_of(site.query), origins_of(site.key)
    from_query, from_key = _nodes(query), _nodes(key)
    if from_query & from_key:
        return None
    if not query or not key or None in query | key:
        return _cross_by_data(site, from_query)
    if _is_input(site.query_features) and _is_input(site.key_features):
        # The projections lie before the graph, so their inputs are unknown.
        if same(size_of(site.query), size_of(site.key)):
            return None
        return SiteKind("cross", "query and key are inputs of the graph with different lengths")
    return SiteKind("cross", f"the key comes from {_in_words(from_key)}, the query from {_in_words(from_query)}")


def _cross_by_data(site: _SiteDims, from_query: set[fx.Node]) -> SiteKind | None:
    """Fallback for :func:`_cross` if positions have no known origin: compares the inputs that query and key depend on.

    Inputs of one dimension (a timestep, a scale) do not count: positions do not come from them.
    """
    reach_key = _ancestors(site.site.key.node)
    if from_query:
        missing = set() if from_query & reach_key else from_query
    else:
        inputs = [node for node in _ancestors(site.site.query.node) if _is_data(node) and tensor(node).dim() > 1]
        missing = set(inputs) - reach_key
    if not missing:
        return None
    from_key = {node for node in reach_key if _is_data(node)}
    others = f"comes from {_in_words(from_key)}" if from_key else "depends on no input"
    return SiteKind("cross", f"the key {others}, while the query comes from {_in_words(missing)}")


def _ancestors(node: fx.Node) -> set[fx.Node]:
    """The node and all nodes that its data depend on; nodes that are sizes are left out."""
    found: set[fx.Node] = set()
    ahead = [node]
    while ahead:
        node = ahead.pop()
        if node not in found and (is_tensor(node) or not isinstance(node.meta.get("val"), _SIZES)):
            found.add(node)
            ahead.extend(node.all_input_nodes)
    return found


def _is_data(node: fx.Node) -> bool:
    return node.op == "placeholder" and is_tensor(node) and not is_model_state(node)


def _is_input(dim: Iterable[Axis]) -> bool:
    """Whether the dimension comes only from inputs of the graph that are data, not from a projection."""
    origins = origins_of(dim)
    return bool(origins) and all(origin is not None and _is_data(origin[0]) for origin in origins)


def _nodes(origins: Iterable[Origin | None]) -> set[fx.Node]:
    return {origin[0] for origin in origins if origin is not None}


def _in_words(nodes: Iterable[fx.Node]) -> str:
    inputs = sorted(_input_name(node) for node in nodes if _is_data(node))
    learned = ["a parameter"] if any(map(is_model_state, nodes)) else []
    return " and ".join([*inputs, *learned]) or "a constant"


def _input_name(node: fx.Node) -> str:
    """``encoder_hidden_states``, for Dynamo's ``l_encoder_hidden_states_``."""
    return re.sub(r"^[lL]_(?:kwargs_)?(.+?)_*$", r"\1", node.name)


# Spatial and temporal attention.


def _kind_by_roles(site: _SiteDims, dimensions: Dimensions) -> SiteKind | None:
    """The kind by the roles that convolutions and projections gave the query's positions; None without roles."""
    each = [dimensions.roles(axis) for axis in site.query]
    space = [roles["space"] for roles in each if "space" in roles]
    if space:
        return SiteKind("spatial", f"the query's positions are height and width of {space[0]}")
    frames = [roles["frames"] for roles in each if "frames" in roles]
    unknown = any(not roles and None in origins_of((axis,)) for axis, roles in zip(site.query, each, strict=True))
    if frames and not unknown:
        return SiteKind("temporal", f"the query's positions are frames: {frames[0]}")
    return None


_TEMPORAL = frozenset({"temporal", "time", "motion"})
_NOT_TEMPORAL = frozenset({"spatial", "spatio", "space", "embed", "embedder", "embedding", "emb", "step"})


def _kind_by_name(site: _SiteDims) -> SiteKind | None:
    """Temporal if the path of the attention's module has a name that says so; else None."""
    location = source_location(site.site.anchor)
    name = is_named_temporal(location.module if location is not None else "")
    if not name:
        return None
    return SiteKind("temporal", f"the module is named {name}; the graph does not tell frames from space", False)


def is_named_temporal(path: str) -> str:
    """The innermost name in a module's path that says that its attention is temporal; empty if there is none."""
    for name in reversed(path.split(".")):
        words = set(name.lower().split("_"))
        if words & _TEMPORAL and not words & _NOT_TEMPORAL:
            return name
    return ""


def _kind_by_relation(
    site: _SiteDims, sites: Sequence[_SiteDims], kinds: Sequence[SiteKind | None], dimensions: Dimensions
) -> SiteKind:
    """The kind by another attention that takes turns with this one: the positions of each are the batch of the other.

    One of the two attends over frames, the other over space. If neither kind is known, frames are the dimension that
    comes first in their common input: (batch, frames, height, width, channels), (batch, channels, frames, height,
    width). Without such an attention the kind is spatial, by default.
    """
    undecided = []
    for other, kind in zip(sites, kinds, strict=True):
        if not _take_turns(site, other):
            continue
        if kind is None:
            undecided.append(other)
        elif kind.kind != "cross":
            opposite: Kind = "spatial" if kind.kind == "temporal" else "temporal"
            return SiteKind(opposite, f"its positions are the batch of a {kind.kind} attention")
    for other in undecided:
        first = _is_first(site, other, dimensions)
        if first is not None:
            place = "before" if first else "after"
            reason = f"its positions come {place} those of another attention, whose batch they are"
            return SiteKind("temporal" if first else "spatial", reason)
    return SiteKind("spatial", "self-attention; nothing in the graph tells frames from space", False)


def _take_turns(site: _SiteDims, other: _SiteDims) -> bool:
    """Whether the positions of each site are among the batch of the other."""
    own, others = _sources_of(site.query), _sources_of(other.query)
    return bool(own and others) and own <= _sources_of(other.batch) and others <= _sources_of(site.batch)


def _sources_of(dim: Iterable[Axis]) -> set[Axis]:
    """The dimensions that ``dim`` was sliced and resized from."""
    found = set()
    for axis in dim:
        while isinstance(axis, Dimension) and len(axis.sources) == 1 and len(axis.sources[0].leaves()) == 1:
            (axis,) = axis.sources[0].leaves()
        found.add(axis)
    return found


def _is_first(site: _SiteDims, other: _SiteDims, dimensions: Dimensions) -> bool | None:
    """Whether the positions of the site come before the other's in their common input; None if that is unknown."""
    origins = origins_of((*site.query, *other.query))
    nodes = _nodes(origins)
    if None in origins or len(nodes) != 1:
        return None
    order = axes_of(dimensions.of(*nodes))
    own, others = _sources_of(site.query), _sources_of(other.query)
    if not own | others <= set(order):
        return None
    own_places, other_places = ([order.index(axis) for axis in dims] for dims in (own, others))
    if max(own_places) < min(other_places):
        return True
    return False if max(other_places) < min(own_places) else None
