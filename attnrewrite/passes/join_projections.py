"""Projections of parts of a batch, which are projections of the whole batch.

    linear(x[:n]), linear(x[n:])             ->  linear(x)[:n], linear(x)[n:]
    cat([linear(a), linear(b)])              ->  linear(cat([a, b]))

Guidance by perturbed attention (PAG) attends one part of a batch and lets the value of another pass straight through.
Each part is projected by itself, with the same weights; rows of a projection are independent of each other. So are the
samples of a norm, and entries under views and arithmetic, through which the whole is looked for.

Only what feeds an attention that was rewritten or, without a softmax, recognized, or follows it, is looked at. Nothing
random is moved, and nothing across a switch of grad mode, autocast or checkpointing.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from attnrewrite.analysis.projections import ROW_WISE, is_piece, is_row_wise, projections_behind
from attnrewrite.analysis.slices import taken_from
from attnrewrite.ir.bounds import BESIDE_ATTENTION, SHARED_PROJECTIONS, searching
from attnrewrite.ir.builder import Builder
from attnrewrite.ir.nodes import Size, checkpoint_of, is_tensor, product, same, same_shape, tensor
from attnrewrite.ir.ops import AS_STRIDED_OPS, is_cast, is_pointwise, same_argument, shares_memory
from attnrewrite.ir.views import is_layout_op, permutation_of
from attnrewrite.kernels.common.layout import in_memory_order_of
from attnrewrite.passes.result import ReportedSite
from attnrewrite.passes.splice import latest, remove_unused
from attnrewrite.patterns import GraphView
from attnrewrite.torch_private import is_erased

__all__ = ["join_projections"]

aten = torch.ops.aten


def join_projections(gm: fx.GraphModule, served: Sequence[ReportedSite], replaced: dict[fx.Node, fx.Node]) -> bool:
    """Makes one of the projections that attentions share with parts of the batch that they do not attend.

    Args:
        served: the attentions that were rewritten or, without a softmax, recognized. Their rows get a note.
        replaced: nodes that are no longer in the graph, each with what took its place; more are added.

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
        view: of the graph as it is; where nodes were replaced, another one is needed for the next attention.
        query, key, value: its operands; one that is in the graph no longer has no projections.
        output: its result, or what a kernel put in its place.

    Returns:
        A note for the report, also where a search ended at its bound, empty if there is nothing to say; and the nodes
        that were replaced, each with what took its place; they are in the graph still.
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
            joining.take_back()
            continue
        if not _same_strides(whole, joint):
            whole = in_memory_order_of(tensor(joint), whole, joining.builder)
        joint.replace_all_uses_with(whole)
        joining.take_back()
        replaced[joint] = whole
        note = note or _in_words(joining, weights)
    if before and not note:
        note = ended.added_to("projections of parts of the batch are joined into one")
    return note or str(apart), replaced


def _in_words(joining: _Joining, value_weights: Sequence[Any]) -> str:
    """An identity part takes the value as it is: what is projected last is its value projection, or a slice of it."""
    for joint, dim in joining.joints:
        total = tensor(joint).shape[dim]
        for part in _parts(joint):
            taken = taken_from(part)
            source = part if taken is None else taken.source
            if source.target is aten.linear.default and source.args[1] in value_weights:
                return f"identity part of {tensor(part).shape[dim]} of {total} batch entries"
    return "the parts of the batch share one projection"


# Parts of a batch, projected before the attention.


def _project_whole(projection: fx.Node, view: GraphView) -> dict[fx.Node, fx.Node]:
    """Replaces projections of all parts of a tensor by parts of its projection; returns which by which."""
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
            joining.take_back()
    return {}


def _take_parts_of_one(projections: Sequence[fx.Node]) -> bool:
    taken = [taken_from(source) for source in _sources(projections, 0)]
    return len({None if part is None else part.source for part in taken}) == 1 and taken[0] is not None


def _same_weights(a: fx.Node, b: fx.Node) -> bool:
    return _all_same(a.args[1:], b.args[1:]) and a.kwargs == b.kwargs


def _all_same(a: Sequence[Any], b: Sequence[Any]) -> bool:
    return len(a) == len(b) and all(map(same_argument, a, b))


# Parts of a batch, put together after it.


def _joints_after(output: fx.Node) -> list[fx.Node]:
    """The concatenations that the result of an attention goes into, as far as rows stay by themselves."""
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


# The whole of which nodes are the parts.


@dataclass
class _Level:
    nodes: list[fx.Node]
    dim: int
    whole: fx.Node


@dataclass
class _Joining:
    """Computes the concatenation of nodes that are computed alike of what their sources are parts of.

    ``joint``: the concatenation that is computed in another way; None where the nodes are to be parts of what is there
    already, and nothing is concatenated.
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
        whole = _covered(nodes, dim)
        if whole is None and self._are_alike(nodes, dim):
            projections, joints = self.projections, len(self.joints)
            whole = self._computed(nodes, dim)
            if whole is not None and self.projections == projections and len(self.joints) > joints + 1:
                # One concatenation here is less than several behind it.
                whole, self.joints[joints:] = None, []
            if whole is not None:
                self.levels.append(_Level(nodes, dim, whole))
        if whole is None and self.joint is not None and nodes != _parts(self.joint) and _fit(nodes, dim):
            whole = self._call(nodes, aten.cat.default, nodes, dim)
            self.joints.append((whole, dim))
        return whole

    def take_back(self) -> None:
        """Removes what was written and is not read."""
        for node in reversed(self.created):
            if not is_erased(node) and not node.users:
                self.view.graph.erase_node(node)

    def replace_parts(self) -> dict[fx.Node, fx.Node]:
        """Lets each part that is read be a slice of its whole; none if memory would look different to its readers."""
        replacements: dict[fx.Node, fx.Node] = {}
        own = {node for level in self.levels for node in level.nodes}
        for level in self.levels:
            start: Size = 0
            for node in level.nodes:
                stop = start + tensor(node).shape[level.dim]
                if any(user not in own for user in node.users):
                    part = self._call(level.nodes, aten.slice.Tensor, level.whole, level.dim, start, stop)
                    if _shows_its_memory(node) or not _same_strides(part, node):
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
            # Autocast is not in force where values are worked out.
            assert self.view.in_autocast(nodes[0]), f"{node} is not what {nodes[0]} is"
            node.meta["val"] = tensor(node).to(tensor(nodes[0]).dtype)
        return node

    def _builder_at(self, before: fx.Node, like: fx.Node) -> Builder:
        return Builder(self.view.gm, before=before, like=like)

    def _are_alike(self, nodes: list[fx.Node], dim: int) -> bool:
        """Whether the nodes call the same operator, on tensors that differ in the size of ``dim`` alone."""
        first = nodes[0]
        shape = _others(first, dim)
        place = self.joint if self.joint is not None else first
        return all(
            node.op == "call_function"
            and node.target is first.target
            and is_tensor(node)
            and tensor(node).dtype is tensor(first).dtype
            and tensor(node).dim() == tensor(first).dim()
            and same_shape(_others(node, dim), shape)
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
            source = self.of(_sources(nodes, 0), dim)
            if source is None:
                return None
            self.projections += first.target is aten.linear.default
            return self._call(nodes, first.target, source, *first.args[1:], **first.kwargs)
        if is_cast(first) or is_pointwise(first):
            return self._entry_by_entry(nodes, dim)
        return None

    def _rearranged(self, nodes: list[fx.Node], dim: int) -> fx.Node | None:
        """Views that leave the dimension whole."""
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
        own = [_same_dim(node, dim) for node in nodes]
        if own[0] is None or any(place != own[0] for place in own):
            return None
        if any(not same_shape(_others(source, own[0]), _others(sources[0], own[0])) for source in sources):
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
            if all(other is arg for other in given) and (own < 0 or same(shapes[0][own], 1)):
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


def _others(node: fx.Node, dim: int) -> list[Size]:
    shape = tensor(node).shape
    return [*shape[:dim], *shape[dim + 1 :]]


def _fit(nodes: Sequence[fx.Node], dim: int) -> bool:
    """Whether the nodes can be concatenated without becoming anything else."""
    first = nodes[0]
    return all(
        tensor(node).dim() == tensor(first).dim()
        and tensor(node).dtype is tensor(first).dtype
        and tensor(node).device == tensor(first).device
        and same_shape(_others(node, dim), _others(first, dim))
        for node in nodes
    )


def _shows_its_memory(node: fx.Node) -> bool:
    """Whether it matters that a node is a part of other memory.

    A caller would hold the whole, and ``as_strided`` counts from where the memory begins.
    """
    return any(
        user.op == "output" or user.target in AS_STRIDED_OPS or (shares_memory(user) and _shows_its_memory(user))
        for user in node.users
    )


def _same_dim(node: fx.Node, dim: int) -> int | None:
    """The dimension of a reshape's source that its result has as ``dim``, with the same number of entries before it."""
    shape, source = tensor(node).shape, tensor(node.all_input_nodes[0]).shape
    for own in range(len(source)):
        if same(source[own], shape[dim]) and same(product(source[:own]), product(shape[:dim])):
            return own
    return None


def _same_strides(a: fx.Node, b: fx.Node) -> bool:
    own, other = tensor(a), tensor(b)
    return all(same(x, y) or same(size, 1) for x, y, size in zip(own.stride(), other.stride(), own.shape, strict=True))


def _covered(nodes: Sequence[fx.Node], dim: int) -> fx.Node | None:
    """The tensor that the nodes are all the parts of, one after another."""
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
    """The nodes, in which concatenations along ``dim`` are what they are made of."""
    result: list[fx.Node] = []
    for node in nodes:
        joined = node.target is aten.cat.default and is_tensor(node) and _dim(node) == dim
        result += _flattened(_parts(node), dim) if joined else [node]
    return result
