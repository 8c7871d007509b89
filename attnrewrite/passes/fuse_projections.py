"""Fuses projections of one input into one projection whose result is split.

    linear(x, a), linear(x, b)             ->  linear(x, cat([a, b])).split(...)
    x @ a, x @ b                           ->  (x @ cat([a, b], 1)).split(...)

These are query, key and value of self-attention, and key and value of cross-attention. The parts are views of the one
result: nothing is copied, but their row stride grows. Operators that compute with the parts do not see the strides. A
graph that returns a part, or an operator that depends on its strides, would; such projections stay separate.
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
    """Fuses the projections of one input behind an attention's operands.

    It runs after ``join_projections``, since different parts of a batch are different inputs.

    Args:
        served: the attentions that were rewritten or, without a softmax, recognized. Their rows get a note.
        replaced: nodes that are no longer in the graph, each with its replacement; the fused ones are added.
        constants: whether to fuse only weights that are constants of the graph. An inner compiler that freezes them
            concatenates them once; other weights are concatenated in each call.

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
        view: of the current graph; if nodes are replaced, the next attention needs a new one.
        operands: query, key and value, each under its name.
        kernels: the names of nodes that kernels wrote: these accept any strides.

    Returns:
        A note for the report (what was fused, and why other candidates were not), and the replaced nodes, each with its
        replacement; they are still in the graph.
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
    """Groups of projections that can be fused; the reasons why others cannot are added to ``apart``."""
    writing = [node for node in view.graph.nodes if writes(node)]
    groups: list[list[_Projection]] = []
    for node in sorted(roles):
        projection = _read(node)
        if projection is None or (constants and not _is_constant(projection, view)):
            continue
        reason = _reason_alone(projection, kernels)
        if reason:
            apart.append(f"{_in_words(roles[node])} by itself: {reason}")
            continue
        reasons: list[str] = []
        for group in (group for group in groups if _same_source(group[0].source, projection.source)):
            reason_between = _reason_between(group[0], projection, view, writing)
            if not reason_between:
                group.append(projection)
                break
            reasons.append(f"{_in_words(roles[node])} not with {_in_words(roles[group[0].node])}: {reason_between}")
        else:
            groups.append([projection])
            apart += reasons
    return groups


def _in_words(names: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


@dataclass(frozen=True)
class _Projection:
    """``node`` is ``source`` times ``weight``, plus ``bias``; ``dim`` is the weight's dimension of output features."""

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
        return None  # addmm with alpha or beta; the others have no keyword arguments.
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


def _reason_alone(projection: _Projection, kernels: Collection[str]) -> str:
    """Why the projection cannot be fused with any other; empty if it can."""
    if not all(_is_plain(part) for part in (projection.source, *projection.parts)):
        return "its weight or input is a tensor subclass, or not strided"
    if not _strides_are_unseen(projection.node, kernels):
        return "the graph returns it, or an operator that may depend on its strides reads it"
    return ""


def _reason_between(first: _Projection, other: _Projection, view: GraphView, writing: list[fx.Node]) -> str:
    """Why two projections of one input cannot be fused; empty if they can."""
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
    """Whether the tensor is strided and no subclass, which may define its own concatenation."""
    value = tensor(node)
    return value.layout is torch.strided and not is_traceable_wrapper_subclass(value)


def _strides_are_unseen(node: fx.Node, kernels: Collection[str]) -> bool:
    """Whether all users of ``node`` give the same values and strides if it becomes a strided view.

    PyTorch's operators choose the layout of a result by the order of their operand's strides, which stays the same for
    a part of a row. Only views pass on the strides themselves.
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


_READS_STRIDES = frozenset(
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
    return getattr(target, "namespace", "") == "aten" and target not in _READS_STRIDES and not writes(node)


def _same_source(a: fx.Node, b: fx.Node) -> bool:
    """Whether two nodes are the same node, or the same view of one node."""
    if a is b:
        return True
    if not (is_view(a) and a.target is b.target and a.kwargs == b.kwargs and len(a.args) == len(b.args)):
        return False
    first, *rest = zip(a.args, b.args, strict=True)
    pair: Any = first
    return _same_source(*pair) and all(same_argument(x, y) for x, y in rest)


def _is_ready(part: fx.Node, place: fx.Node, view: GraphView) -> bool:
    """Whether a weight exists before ``place``, or is a view that can be moved before it."""
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
        # Fake values are computed without autocast.
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
        _update_strides(part)
        replaced[each.node] = part
        start = stop
    return replaced


def _bias(group: list[_Projection], builder: Builder) -> fx.Node | None:
    """The concatenated biases, with zeros for a projection without a bias; None if no projection has one.

    The zeros are padding of another bias: a separate tensor of zeros would be made in each call, even if the weights
    are frozen.
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


def _update_strides(node: fx.Node) -> None:
    """Updates the fake values of views of ``node`` after its strides changed."""
    for user in node.users:
        if _may_pass_on_strides(user):
            if user.target in RESHAPE_OPS:
                # It may have joined dimensions that are no longer side by side.
                user.target = aten.reshape.default
            user.meta["val"] = evaluated(user)
            _update_strides(user)
