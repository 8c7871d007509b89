"""Joins projections of parts of a batch into one projection of the whole batch.

    linear(x[:n]), linear(x[n:])             ->  linear(x)[:n], linear(x)[n:]
    cat([linear(a), linear(b)])              ->  linear(cat([a, b]))

Perturbed attention guidance (PAG) attends one part of a batch and passes the value of another part through unchanged.
Each part is projected separately with the same weights. Rows of a projection are independent of each other, as are the
samples of a norm and the entries under views and elementwise operators, so the search for the whole batch goes through
these.

The pass considers only projections before and after an attention that was rewritten or, without a softmax, recognized.
It moves nothing random, and nothing across a change of grad mode, autocast or checkpointing.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from attnrewrite.analysis.projections import ROW_WISE, is_piece, is_row_wise, projections_behind, treats_rows_alike
from attnrewrite.ir.bounds import BESIDE_ATTENTION, SHARED_PROJECTIONS, searching
from attnrewrite.ir.builder import Builder
from attnrewrite.ir.nodes import Size, checkpoint_of, is_tensor, product, same, same_shape, tensor
from attnrewrite.ir.ops import AS_STRIDED_OPS, is_cast, is_pointwise, same_argument, shares_memory
from attnrewrite.ir.spans import taken_from
from attnrewrite.ir.views import is_layout_op, permutation_of
from attnrewrite.kernels.common.layout import in_memory_order_of
from attnrewrite.passes.result import ReportedSite
from attnrewrite.passes.splice import latest, remove_unused
from attnrewrite.patterns import GraphView
from attnrewrite.torch_private import is_erased

__all__ = ["join_projections"]

aten = torch.ops.aten


def join_projections(gm: fx.GraphModule, served: Sequence[ReportedSite], replaced: dict[fx.Node, fx.Node]) -> bool:
    """Joins the projections of attended parts of a batch with those of its other parts.

    Args:
        served: the attentions that were rewritten or, without a softmax, recognized. Their rows get a note.
        replaced: nodes that are no longer in the graph, each with its replacement; the joined ones are added.

    Returns:
        Whether any projections were joined.
    """
    view: GraphView | None = None
    changed = False
    for site, row in served:
        output = latest(site.result, replaced)
        if is_erased(output):
            continue
        view = view or GraphView(gm)
        query, key, value = (latest(part.node, replaced) for part in (site.query, site.key, site.value))
        row.projections, joined = _join_around(view, query, key, value, output)
        if joined:
            replaced.update(joined)
            remove_unused(gm.graph, list(joined))
            present = {node.name for node in gm.graph.nodes}
            row.nodes_after = tuple(name for name in row.nodes_after if name in present)
            view, changed = None, True
    return changed


def _join_around(
    view: GraphView, query: fx.Node, key: fx.Node, value: fx.Node, output: fx.Node
) -> tuple[str, dict[fx.Node, fx.Node]]:
    """Joins the projections around one attention.

    Args:
        view: of the current graph; if nodes are replaced, the next attention needs a new one.
        query, key, value: the attention's operands; an operand that is no longer in the graph has no projections.
        output: the attention's result, or the kernel's.

    Returns:
        A note for the report, which also says where a search ended at its bound, or an empty string; and the replaced
        nodes, each with its replacement; they are still in the graph.
    """
    note = ""
    replaced: dict[fx.Node, fx.Node] = {}
    weights = [node.args[1] for node in projections_behind(value)]
    own = dict.fromkeys(node for part in (query, key, value) for node in projections_behind(part))
    with searching() as apart:
        for projection in own:
            if projection not in replaced:
                replaced |= _project_whole(projection, view)
    before = bool(replaced)
    with searching() as ended:
        joints = _joints_after(output)
    for joint in joints:
        parts = _parts(joint)
        joining = _Joining(view, parts, joint)
        whole = joining.of(parts, _dim(joint))
        if whole is None or not joining.projections:
            joining.erase_unused()
            continue
        if not _same_strides(whole, joint):
            whole = in_memory_order_of(tensor(joint), whole, joining.builder)
        note = note or _note(joining, weights)
        joint.replace_all_uses_with(whole)
        joining.erase_unused()
        replaced[joint] = whole
    if before and not note:
        note = ended.added_to("projections of parts of the batch are joined into one")
    return note or str(apart), replaced


def _note(joining: _Joining, value_weights: Sequence[Any]) -> str:
    """The note: in an identity part the output projection reads the value projection, or a slice of it, directly."""
    for joint, dim in joining.joints:
        total = tensor(joint).shape[dim]
        for part in _parts(joint):
            taken = taken_from(part)
            source = part if taken is None else taken.source
            if source.target is aten.linear.default and source.args[1] in value_weights:
                return f"identity part of {tensor(part).shape[dim]} of {total} batch entries"
    return "the parts of the batch share one projection"


# Projections of parts of the batch before the attention.


def _project_whole(projection: fx.Node, view: GraphView) -> dict[fx.Node, fx.Node]:
    """Replaces the projections of all parts of a tensor with parts of its projection; returns the replacements."""
    weight: Any = projection.args[1]
    peers = [node for node in weight.users if node.target is aten.linear.default and _same_weights(node, projection)]
    if len(peers) < 2:
        return {}
    if len(peers) > SHARED_PROJECTIONS.most:
        if _take_parts_of_one(peers):
            SHARED_PROJECTIONS.reached()
        return {}
    for order in itertools.permutations(sorted(peers)):
        for dim in range(tensor(projection).dim() - 1):
            joining = _Joining(view, order, None)
            whole = joining.of(list(order), dim)
            if whole is not None and (replaced := joining.replace_parts()):
                return replaced
            joining.erase_unused()
    return {}


def _take_parts_of_one(projections: Sequence[fx.Node]) -> bool:
    taken = [taken_from(source) for source in _sources(projections, 0)]
    return len({None if part is None else part.source for part in taken}) == 1 and taken[0] is not None


def _same_weights(a: fx.Node, b: fx.Node) -> bool:
    return _all_same(a.args[1:], b.args[1:]) and a.kwargs == b.kwargs


def _all_same(a: Sequence[Any], b: Sequence[Any]) -> bool:
    return len(a) == len(b) and all(map(same_argument, a, b))


# Concatenations of parts of the batch after the attention.


def _joints_after(output: fx.Node) -> list[fx.Node]:
    """The concatenations that an attention's result reaches through row-wise operators and slices."""
    found: list[fx.Node] = []
    seen = [output]
    for node in seen:
        for user in node.users:
            if user.target is aten.cat.default:
                found.append(user)
            elif user in seen or not (is_row_wise(user) or is_piece(user)):
                continue
            elif BESIDE_ATTENTION.allows(len(seen) + 1):
                seen.append(user)
    return list(dict.fromkeys(found))


def _parts(joint: fx.Node) -> list[fx.Node]:
    args: Any = joint.args
    return list(args[0])


def _dim(joint: fx.Node) -> int:
    dim: Any = joint.args[1] if len(joint.args) > 1 else joint.kwargs.get("dim", 0)
    return int(dim) % tensor(joint).dim()


# The concatenation of nodes, computed from the concatenation of their sources.


@dataclass
class _Level:
    nodes: list[fx.Node]
    dim: int
    whole: fx.Node


@dataclass
class _Joining:
    """Computes the concatenation of nodes by applying their common operator to the concatenation of their sources.

    ``joint``: the concatenation to replace; None if the nodes are parts of a tensor that is in the graph already, so
    that nothing has to be concatenated.
    """

    view: GraphView
    parts: Sequence[fx.Node]
    joint: fx.Node | None
    levels: list[_Level] = field(default_factory=list)
    joints: list[tuple[fx.Node, int]] = field(default_factory=list)
    created: list[fx.Node] = field(default_factory=list)
    projections: int = 0

    def __post_init__(self) -> None:
        if self.joint is not None:
            self.builder = self._builder_at(self.joint, self.parts[0])

    def of(self, nodes: list[fx.Node], dim: int) -> fx.Node | None:
        """``cat(nodes, dim)``, computed of sources that are put together, or are there; None where it cannot be."""
        whole = _tensor_of_parts(nodes, dim)
        if whole is None and self._are_alike(nodes, dim):
            projections, joints = self.projections, len(self.joints)
            whole = self._computed(nodes, dim)
            if whole is not None and self.projections == projections and len(self.joints) > joints + 1:
                # One concatenation here is cheaper than several of the sources.
                whole, self.joints[joints:] = None, []
            if whole is not None:
                self.levels.append(_Level(nodes, dim, whole))
        if (
            whole is None
            and self.joint is not None
            and nodes != _parts(self.joint)
            and _can_be_concatenated(nodes, dim)
        ):
            whole = self._call(nodes, aten.cat.default, nodes, dim)
            self.joints.append((whole, dim))
        return whole

    def erase_unused(self) -> None:
        """Erases written nodes that nothing uses."""
        for node in reversed(self.created):
            if not is_erased(node) and not node.users:
                self.view.graph.erase_node(node)

    def replace_parts(self) -> dict[fx.Node, fx.Node]:
        """Replaces each used part with a slice of its whole; replaces none if a user would see other strides."""
        replacements: dict[fx.Node, fx.Node] = {}
        own = {node for level in self.levels for node in level.nodes}
        for level in self.levels:
            start: Size = 0
            for node in level.nodes:
                stop = start + tensor(node).shape[level.dim]
                if any(user not in own for user in node.users):
                    part = self._call(level.nodes, aten.slice.Tensor, level.whole, level.dim, start, stop)
                    if _is_visible_as_part(node) or not _same_strides(part, node):
                        return {}
                    replacements[node] = part
                start = stop
        for node, part in replacements.items():
            node.replace_all_uses_with(part)
        return replacements

    def _call(self, nodes: list[fx.Node], target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        builder = self._builder_at(self.joint or min(nodes), nodes[0])
        node = builder.call(target, *args, **kwargs)
        self.created += builder.created
        if tensor(node).dtype is not tensor(nodes[0]).dtype:
            # Fake values are computed without autocast.
            assert self.view.in_autocast(nodes[0]), f"{node} is not what {nodes[0]} is"
            node.meta["val"] = tensor(node).to(tensor(nodes[0]).dtype)
        return node

    def _builder_at(self, before: fx.Node, like: fx.Node) -> Builder:
        return Builder(self.view.gm, before=before, like=like)

    def _are_alike(self, nodes: list[fx.Node], dim: int) -> bool:
        """Whether the nodes call the same operator, on tensors that differ only in the size of ``dim``."""
        first = nodes[0]
        shape = _other_sizes(first, dim)
        place = self.joint if self.joint is not None else first
        return all(
            node.op == "call_function"
            and node.target is first.target
            and is_tensor(node)
            and tensor(node).dtype is tensor(first).dtype
            and tensor(node).dim() == tensor(first).dim()
            and same_shape(_other_sizes(node, dim), shape)
            and self.view.same_region(node, place)
            and checkpoint_of(node) == checkpoint_of(place)
            and (self.joint is None or len(node.users) == 1)
            for node in nodes
        )

    def _computed(self, nodes: list[fx.Node], dim: int) -> fx.Node | None:
        first = min(nodes)
        if is_layout_op(first):
            return self._rearranged(nodes, dim)
        if first.target in ROW_WISE:
            kept = {aten.linear.default: 1, aten.group_norm.default: tensor(first).dim() - 1}
            args: Any = first.args
            last = kept[first.target] if first.target in kept else len(args[1])
            if dim >= tensor(first).dim() - last or not all(_same_weights(node, first) for node in nodes):
                return None
            if not treats_rows_alike(first):
                return None
            source = self.of(_sources(nodes, 0), dim)
            if source is None:
                return None
            self.projections += first.target is aten.linear.default
            return self._call(nodes, first.target, source, *first.args[1:], **first.kwargs)
        if is_cast(first) or is_pointwise(first):
            return self._entry_by_entry(nodes, dim)
        return None

    def _rearranged(self, nodes: list[fx.Node], dim: int) -> fx.Node | None:
        """The concatenation of views that neither split nor merge the dimension."""
        orders = [permutation_of(node) for node in nodes]
        sources = _sources(nodes, 0)
        if any(tensor(source).dim() != tensor(sources[0]).dim() for source in sources):
            return None
        if orders[0] is not None:
            if any(order != orders[0] for order in orders):
                return None
            source = self.of(sources, orders[0][dim])
            return None if source is None else self._call(nodes, aten.permute.default, source, orders[0])
        if any(
            not same(product(tensor(n).shape), product(tensor(s).shape)) for n, s in zip(nodes, sources, strict=True)
        ):
            return None
        own = [_source_dim(node, dim) for node in nodes]
        if own[0] is None or any(place != own[0] for place in own):
            return None
        if any(not same_shape(_other_sizes(source, own[0]), _other_sizes(sources[0], own[0])) for source in sources):
            return None
        source = self.of(sources, own[0])
        if source is None:
            return None
        shape = [*tensor(nodes[0]).shape]
        shape[dim] = tensor(source).shape[own[0]]
        return self._call(nodes, aten.reshape.default, source, shape)

    def _entry_by_entry(self, nodes: list[fx.Node], dim: int) -> fx.Node | None:
        first = min(nodes)
        rank = tensor(first).dim()
        if any(node.kwargs != first.kwargs or len(node.args) != len(first.args) for node in nodes):
            return None
        if any(isinstance(value, fx.Node) for value in first.kwargs.values()):
            return None
        # Of parts of size 1 it is not to be seen whether an operand that all of them share broadcasts.
        shared = all(node.args[i] is arg for i, arg in enumerate(first.args) if is_tensor(arg) for node in nodes)
        args: list[Any] = []
        for position, arg in enumerate(first.args):
            given = [node.args[position] for node in nodes]
            if not all(map(is_tensor, given)):
                if not all(same_argument(other, arg) for other in given):
                    return None
                args.append(arg)
                continue
            shapes = [tensor(other).shape for other in given]
            own = dim - (rank - len(shapes[0]))
            if all(other is arg for other in given) and (own < 0 or (same(shapes[0][own], 1) and not shared)):
                args.append(arg)
                continue
            full = all(
                len(shape) == len(shapes[0]) and own >= 0 and same(shape[own], tensor(node).shape[dim])
                for shape, node in zip(shapes, nodes, strict=True)
            )
            source = self.of(_sources(nodes, position), own) if full else None
            if source is None:
                return None
            args.append(source)
        return self._call(nodes, first.target, *args, **first.kwargs)


def _sources(nodes: Sequence[fx.Node], position: int) -> list[fx.Node]:
    args: list[Any] = [node.args[position] for node in nodes]
    return args


def _other_sizes(node: fx.Node, dim: int) -> list[Size]:
    shape = tensor(node).shape
    return [*shape[:dim], *shape[dim + 1 :]]


def _can_be_concatenated(nodes: Sequence[fx.Node], dim: int) -> bool:
    """Whether the nodes can be concatenated without a cast, a copy to another device or broadcasting."""
    first = nodes[0]
    return all(
        tensor(node).dim() == tensor(first).dim()
        and tensor(node).dtype is tensor(first).dtype
        and tensor(node).device == tensor(first).device
        and same_shape(_other_sizes(node, dim), _other_sizes(first, dim))
        for node in nodes
    )


def _is_visible_as_part(node: fx.Node) -> bool:
    """Whether a user of the node can tell that it is a part of a larger tensor.

    A caller would keep the larger tensor alive, and ``as_strided`` counts from the start of the storage.
    """
    return any(
        user.op == "output" or user.target in AS_STRIDED_OPS or (shares_memory(user) and _is_visible_as_part(user))
        for user in node.users
    )


def _source_dim(node: fx.Node, dim: int) -> int | None:
    """The dimension of a reshape's source that its result has as ``dim``, with the same number of entries before it."""
    shape, source = tensor(node).shape, tensor(node.all_input_nodes[0]).shape
    for own in range(len(source)):
        if same(source[own], shape[dim]) and same(product(source[:own]), product(shape[:dim])):
            return own
    return None


def _same_strides(a: fx.Node, b: fx.Node) -> bool:
    own, other = tensor(a), tensor(b)
    return all(same(x, y) or same(size, 1) for x, y, size in zip(own.stride(), other.stride(), own.shape, strict=True))


def _tensor_of_parts(nodes: Sequence[fx.Node], dim: int) -> fx.Node | None:
    """The tensor whose consecutive parts along ``dim`` are the nodes; None if there is none."""
    source: fx.Node | None = None
    start: Size = 0
    for node in _flattened(nodes, dim):
        taken = taken_from(node)
        if taken is None or taken.selected or taken.dim != dim or not same(taken.span.start, start):
            return None
        if source is not None and taken.source is not source:
            return None
        source, start = taken.source, taken.span.stop
    assert source is not None
    return source if same(start, tensor(source).shape[dim]) else None


def _flattened(nodes: Sequence[fx.Node], dim: int) -> list[fx.Node]:
    """The nodes, with each concatenation along ``dim`` replaced by its parts."""
    result: list[fx.Node] = []
    for node in nodes:
        joined = node.target is aten.cat.default and is_tensor(node) and _dim(node) == dim
        result += _flattened(_parts(node), dim) if joined else [node]
    return result
