"""Projections of one input, which are one projection whose result is split.

    linear(x, a), linear(x, b)             ->  linear(x, cat([a, b])).split(...)
    x @ a, x @ b                           ->  (x @ cat([a, b], 1)).split(...)

Query, key and value of self attention, key and value of cross attention. The parts are views of the one result: nothing
is copied, and their rows lie further apart in memory than before. What computes with them does not see that; what
returns them or asks for their strides would, so such projections stay.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from attnrewrite.analysis.projections import is_piece, projections_behind
from attnrewrite.ir.bounds import searching
from attnrewrite.ir.builder import Builder, evaluated
from attnrewrite.ir.nodes import Size, checkpoint_of, same, tensor
from attnrewrite.ir.ops import AS_STRIDED_OPS, RESHAPE_OPS, is_cast, is_view, same_argument, writes
from attnrewrite.ir.views import is_layout_op
from attnrewrite.passes.result import ReportedSite
from attnrewrite.passes.splice import latest, remove_unused
from attnrewrite.patterns import GraphView
from attnrewrite.torch_private import is_traceable_wrapper_subclass

__all__ = ["fuse_projections"]

aten = torch.ops.aten

_PRODUCTS = frozenset({aten.linear.default, aten.matmul.default, aten.mm.default, aten.addmm.default})


def fuse_projections(
    gm: fx.GraphModule, served: Sequence[ReportedSite], replaced: dict[fx.Node, fx.Node], constants: bool
) -> bool:
    """Makes one of the projections of one input that an attention's operands are made of.

    It comes after `join_projections`, since parts of one batch are not one input.

    Args:
        served: the attentions that were rewritten or, without a softmax, recognized. Their rows get a note.
        replaced: nodes that are no longer in the graph, each with what took its place; more are added.
        constants: only weights that are constants of the graph are put together, which an inner compiler that freezes
            them does once. The others are put together at each call.

    Returns:
        Whether any projections were fused.
    """
    view: GraphView | None = None
    changed = False
    kernels = {name for _, row in served for name in row.nodes_after}
    for site, row in served:
        parts = {"query": site.query, "key": site.key, "value": site.value}
        operands = {role: latest(part.node, replaced) for role, part in parts.items()}
        view = view or GraphView(gm)
        note, fused = _fuse_behind(view, operands, kernels, constants)
        row.projections = "; ".join(filter(None, (row.projections, note)))
        if fused:
            replaced.update(fused)
            remove_unused(gm.graph, list(fused))
            view, changed = None, True
    return changed


def _fuse_behind(
    view: GraphView, operands: Mapping[str, fx.Node], kernels: Collection[str], constants: bool
) -> tuple[str, dict[fx.Node, fx.Node]]:
    """Fuses the projections behind one attention's operands.

    Args:
        view: of the graph as it is; where nodes were replaced, another one is needed for the next attention.
        operands: query, key and value, each under its name.
        kernels: the names of nodes that kernels wrote: they take operands whatever lies between two positions.

    Returns:
        A note for the report (what was fused, and why what might have been was not), and the nodes that were replaced,
        each with what took its place; they are in the graph still.
    """
    roles: dict[fx.Node, list[str]] = {}
    apart: list[str] = []
    for name, operand in operands.items():
        with searching() as ended:
            found = projections_behind(operand, _PRODUCTS)
        for node in found:
            roles.setdefault(node, []).append(name)
        if ended and not constants:
            apart.append(f"behind {name}: {ended}")
    groups = _grouped(roles, view, kernels, constants, apart)
    notes: list[str] = []
    replaced: dict[fx.Node, fx.Node] = {}
    for group in groups:
        if len(group) > 1:
            replaced |= _fuse(group, view)
            named = {role for each in group for role in roles[each.node]}
            names = [role for role in operands if role in named]
            features = sum(each.features for each in group)
            notes.append(
                f"{_in_words(names)} {'are' if len(names) > 1 else 'is'} one projection to {features} features"
            )
    return "; ".join([*notes, *apart]), replaced


def _grouped(
    roles: Mapping[fx.Node, list[str]],
    view: GraphView,
    kernels: Collection[str],
    constants: bool,
    apart: list[str],
) -> list[list[_Projection]]:
    """The projections that may be one, together; why others stay apart is added to ``apart``."""
    writing = [node for node in view.graph.nodes if writes(node)]
    groups: list[list[_Projection]] = []
    for node in sorted(roles):
        projection = _read(node)
        if projection is None or (constants and not _is_constant(projection, view)):
            continue
        own = _own_reason(projection, kernels)
        if own:
            apart.append(f"{_in_words(roles[node])} by itself: {own}")
            continue
        reasons: list[str] = []
        for group in (group for group in groups if _same_source(group[0].source, projection.source)):
            why = _reason_between(group[0], projection, view, writing)
            if not why:
                group.append(projection)
                break
            reasons.append(f"{_in_words(roles[node])} not with {_in_words(roles[group[0].node])}: {why}")
        else:
            groups.append([projection])
            apart += reasons
    return groups


def _in_words(names: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


@dataclass(frozen=True)
class _Projection:
    """``node`` is ``source`` times ``weight``, whose dimension ``dim`` are the features, plus ``bias``."""

    node: fx.Node
    source: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    dim: int

    @property
    def parts(self) -> tuple[fx.Node, ...]:
        return (self.weight,) if self.bias is None else (self.weight, self.bias)

    @property
    def features(self) -> Size:
        return tensor(self.weight).shape[self.dim]


def _read(node: fx.Node) -> _Projection | None:
    args: Any = node.args
    if node.kwargs:
        return None  # addmm with a factor; the others have none.
    if node.target is aten.linear.default:
        projection = _Projection(node, args[0], args[1], args[2] if len(args) > 2 else None, 0)
    elif node.target is aten.addmm.default:
        projection = _Projection(node, args[1], args[2], args[0], 1)
    else:
        projection = _Projection(node, args[0], args[1], None, 1)
    bias = projection.bias
    if tensor(projection.weight).dim() != 2 or tensor(projection.source).dim() < 2:
        return None
    if bias is not None and not (tensor(bias).dim() == 1 and same(tensor(bias).shape[0], projection.features)):
        return None
    return projection


def _is_constant(projection: _Projection, view: GraphView) -> bool:
    return not view.differentiable(projection.node) and all(part.op == "get_attr" for part in projection.parts)


def _own_reason(projection: _Projection, kernels: Collection[str]) -> str:
    """Why the projection is one with no other; empty where it may be."""
    if not all(_is_plain(part) for part in (projection.source, *projection.parts)):
        return "its weight or input is a tensor subclass, or not strided"
    if not _strides_are_unseen(projection.node, kernels):
        return "the graph returns it, or an operator that may depend on its strides reads it"
    return ""


def _reason_between(first: _Projection, other: _Projection, view: GraphView, writing: list[fx.Node]) -> str:
    """Why two projections of one input are not one; empty where they are."""
    one, two = tensor(first.weight), tensor(other.weight)
    biases = [tensor(each.bias).dtype for each in (first, other) if each.bias is not None]
    if first.node.target is not other.node.target or not same(one.shape[1 - first.dim], two.shape[1 - other.dim]):
        return "it uses another operator"
    if (
        one.dtype is not two.dtype
        or one.device != two.device
        or tensor(first.node).dtype is not tensor(other.node).dtype
        or biases[:1] * len(biases) != biases
    ):
        return "it has another dtype or device"
    if not view.same_region(first.node, other.node) or checkpoint_of(first.node) != checkpoint_of(other.node):
        return "grad mode, autocast or checkpointing changes in between"
    if any(first.node < node < other.node for node in writing):
        return "a tensor is written to in between"
    if not all(_is_ready(part, first.node, view) for part in other.parts):
        return "its weight is computed only after the first projection"
    return ""


def _is_plain(node: fx.Node) -> bool:
    """A tensor of numbers side by side, and no subclass, which may put together in its own way."""
    value = tensor(node)
    return value.layout is torch.strided and not is_traceable_wrapper_subclass(value)


def _strides_are_unseen(node: fx.Node, kernels: Collection[str]) -> bool:
    """Whether what computes with ``node`` gives the same, lying in memory in the same way, if it is a strided view.

    PyTorch's operators lay out a result by the order of their operand's strides, which a part of a row leaves as it is;
    views alone pass on the strides themselves.
    """
    for user in node.users:
        if _may_pass_on_strides(user):
            if not _strides_are_unseen(user, kernels):
                return False
        elif user.name not in kernels and not _computes(user):
            return False
    return True


def _may_pass_on_strides(node: fx.Node) -> bool:
    """Whether the node may lie in memory as its operand does: views, but copies that keep the strides, too."""
    if is_view(node) or is_piece(node) or node.target is aten.dropout.default:
        return True
    return is_layout_op(node) or (is_cast(node) and tensor(node).dtype is tensor(node.args[0]).dtype)


_TELL_STRIDES = frozenset(
    {
        *AS_STRIDED_OPS,
        aten.sym_stride.int,
        aten.sym_stride.default,
        aten.sym_storage_offset.default,
        aten.sym_is_contiguous.default,
    }
)


def _computes(node: fx.Node) -> bool:
    target: Any = node.target
    return getattr(target, "namespace", "") == "aten" and target not in _TELL_STRIDES and not writes(node)


def _same_source(a: fx.Node, b: fx.Node) -> bool:
    """Whether two nodes are one, or the same view of one."""
    if a is b:
        return True
    if not (is_view(a) and a.target is b.target and a.kwargs == b.kwargs and len(a.args) == len(b.args)):
        return False
    first, *rest = zip(a.args, b.args, strict=True)
    pair: Any = first
    return _same_source(*pair) and all(same_argument(x, y) for x, y in rest)


def _is_ready(part: fx.Node, place: fx.Node, view: GraphView) -> bool:
    """Whether a weight is there before ``place``, or is but a view of one, which can be taken before as well."""
    if part < place or part.op == "get_attr":
        return True
    movable = (
        (is_view(part) or is_piece(part))
        and view.same_region(part, place)
        and checkpoint_of(part) == checkpoint_of(place)
    )
    return movable and all(_is_ready(source, place, view) for source in part.all_input_nodes)


def _move_before(part: fx.Node, place: fx.Node) -> None:
    if not part < place:
        for source in part.all_input_nodes:
            _move_before(source, place)
        place.prepend(part)


def _fuse(group: list[_Projection], view: GraphView) -> dict[fx.Node, fx.Node]:
    first = group[0]
    for part in (part for each in group for part in each.parts):
        _move_before(part, first.node)
    builder = Builder(view.gm, before=first.node, like=first.node)
    weight = builder.call(aten.cat.default, [each.weight for each in group], first.dim)
    bias = _bias(group, builder)
    args = {
        aten.linear.default: (first.source, weight) if bias is None else (first.source, weight, bias),
        aten.addmm.default: (bias, first.source, weight),
    }
    target: Any = first.node.target
    given_args = args.get(target, (first.source, weight))
    if view.in_autocast(first.node):
        # Autocast is not in force where values are worked out.
        features = tensor(weight).shape[first.dim]
        value = tensor(first.node).new_empty((*tensor(first.node).shape[:-1], features))
        whole = builder.insert(target, given_args, {}, value)
    else:
        whole = builder.call(target, *given_args)
    replaced: dict[fx.Node, fx.Node] = {}
    start: Size = 0
    for each in group:
        stop = start + each.features
        part = builder.call(aten.slice.Tensor, whole, -1, start, stop)
        each.node.replace_all_uses_with(part)
        _see_strides(part)
        replaced[each.node] = part
        start = stop
    return replaced


def _bias(group: list[_Projection], builder: Builder) -> fx.Node | None:
    """The biases one after another, zero where there is none; None where nothing has one.

    A bias is padded: zeros of their own would be made at each call, even beside weights that are frozen.
    """
    given: list[fx.Node] = []
    zeros: list[Size] = [0]  # In front of the first, and behind each.
    for each in group:
        if each.bias is None:
            zeros[-1] = zeros[-1] + each.features
        else:
            given.append(each.bias)
            zeros.append(0)
    if not given:
        return None
    first, *others = given
    biases = [_padded(first, zeros[0], zeros[1], builder)]
    biases += [_padded(bias, 0, after, builder) for bias, after in zip(others, zeros[2:], strict=True)]
    return builder.call(aten.cat.default, biases, 0) if others else biases[0]


def _padded(bias: fx.Node, before: Size, after: Size, builder: Builder) -> fx.Node:
    if same(before + after, 0):
        return bias
    # Evaluated by hand: the operator's own fake would fix symbolic sizes.
    value = tensor(bias).new_empty((before + tensor(bias).shape[0] + after,))
    return builder.insert(aten.constant_pad_nd.default, (bias, [before, after], 0.0), {}, value)


def _see_strides(node: fx.Node) -> None:
    """Lets views of ``node``, whose strides are others now, have theirs."""
    for user in node.users:
        if _may_pass_on_strides(user):
            if user.target in RESHAPE_OPS:
                # It may have joined dimensions that are no longer side by side.
                user.target = aten.reshape.default
            user.meta["val"] = evaluated(user)
            _see_strides(user)
