"""Eliminates repetitions (``repeat_kv``) of keys and values.

    key = f(repeat(x))  ->  f(x), which lacks the axis of the repetition and so shares its entries

A repetition (``expand``, ``repeat``, ``repeat_interleave``, a constant index such as ``[0] * frames``) is an axis that
its source lacks. If the operators between the repetition and the attention do the same to every copy (elementwise
operators, a rotation of the features, a norm or a projection of the last dimension), key and value need no copies: they
lack the axis as well, as in GQA and broadcast attention (:mod:`attnrewrite.ir.views`).
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx

from attnrewrite.analysis.indices import Repetition, repetition_of
from attnrewrite.analysis.projections import treats_rows_alike
from attnrewrite.ir.axes import Axis, Dim, Layout, Operand, axes_of, broadcast, fresh_layout, resolve, shape_of
from attnrewrite.ir.bounds import BEHIND_KEYS, searching
from attnrewrite.ir.builder import Builder, Written
from attnrewrite.ir.nodes import is_tensor, same_shape, tensor
from attnrewrite.ir.ops import CAT_OPS, is_cast, is_pointwise
from attnrewrite.ir.reason import Reason
from attnrewrite.ir.site import AttentionSite
from attnrewrite.ir.spans import Taken, taken_from
from attnrewrite.ir.views import is_layout_op, peel, pull
from attnrewrite.kernels.common.layout import lay_out
from attnrewrite.patterns import Finding, GraphView

__all__ = ["unrepeat_kv"]

aten = torch.ops.aten


def unrepeat_kv(findings: Sequence[Finding], view: GraphView) -> list[Finding]:
    """The findings with unrepeated keys and values in each site whose keys and values are computed from a repetition.

    The site's ``written`` gets the nodes that are added for it.
    """
    return [_unrepeated(finding, view) if isinstance(finding, AttentionSite) else finding for finding in findings]


def _unrepeated(site: AttentionSite, view: GraphView) -> AttentionSite:
    shared = [axis for axis in axes_of((site.query.axes,)) if axis not in axes_of((site.query_axes,))]
    free = [axis for axis in shared if axis not in axes_of((site.feature_axes,))]
    copied: dict[Axis, Axis] = {}
    with searching() as ended:
        dependences = [_Dependence(site, view, copied) for _ in range(2)]
        needed = set().union(*(d.of(part) for d, part in zip(dependences, (site.key, site.value), strict=True)))
        beyond = set().union(*(each.beyond for each in dependences))
        absent: list[Axis] = []
        for axis in free:
            if axis in copied:
                absent += _absent_parts(axis, copied[axis], axes_of((tuple(needed | beyond),)))
        held = {axis for operand in (site.key, site.value) for axis in operand.resolved().axes}
        absent = [axis for axis in absent if axis in held]
        if beyond and not absent:
            seen = axes_of((tuple(needed),))
            if any(part not in seen for axis in free if axis in copied for part in copied[axis].leaves()):
                BEHIND_KEYS.reached()
    if not absent:
        return replace(site, still_repeated=Reason(str(ended)))
    writing = _Writing(site, view, frozenset(absent))
    found = [writing.of(operand) for operand in (site.key, site.value)]
    key, value = found
    if key is None or value is None or not writing.is_sole_reader():
        writing.erase_written()
        return site
    return replace(site, key=key, value=value, written=(*site.written, *writing.created))


def _absent_parts(axis: Axis, model: Axis, needed: Sequence[Axis]) -> list[Axis]:
    """The parts of ``axis`` that are not needed, after dividing it like ``model``."""
    parts = model.leaves()
    if all(part in needed for part in parts):
        return []
    if model.parts is None:
        return [axis]
    divided = axis.divide(model.parts[1].size) if axis.parts is None else (axis.parts[0], axis.parts[1])
    if divided is None:
        return []
    return [part for own, other in zip(divided, model.parts, strict=True) for part in _absent_parts(own, other, needed)]


def _without(layout: Layout, absent: frozenset[Axis]) -> Layout:
    dropped = set(axes_of((tuple(absent),)))
    return tuple(tuple(axis for axis in dim if axis not in dropped) for dim in resolve(layout))


# One step back, from a node to its sources.


@dataclass(frozen=True)
class _StepBack:
    """How a node is computed from its sources.

    Attributes:
        sources: the sources, each with its layout.
        kept: the axes that must not be dropped, since the node moves or mixes entries along them.
        recompute: computes the node from other sources; None if the node only rearranges the entries of its one source.
        projects: whether the node is a projection.
    """

    sources: tuple[Operand, ...]
    kept: Dim = ()
    recompute: Callable[[Builder, list[fx.Node]], fx.Node] | None = None
    projects: bool = False


def _step(node: fx.Node, layout: Layout) -> _StepBack | None:
    """The step back from ``node``; None if the node is not known to do the same along any axis."""
    args: Any = node.args
    if node.op != "call_function" or not is_tensor(node):
        return None
    if is_layout_op(node):
        pulled = pull(node, layout)
        return None if pulled is None else _StepBack((Operand(args[0], pulled),))
    taken = taken_from(node)
    if taken is not None:
        return _step_of_part(node, taken, layout)
    if node.target in CAT_OPS:
        return _step_of_concatenation(node, layout)
    if node.target in (aten.linear.default, aten.layer_norm.default, aten.rms_norm.default):
        return _step_of_rows(node, layout)
    if is_pointwise(node) or is_cast(node):
        return _step_of_entries(node, layout)
    return None


def _step_of_part(node: fx.Node, taken: Taken, layout: Layout) -> _StepBack:
    dim, size = taken.dim, tensor(taken.source).shape[taken.dim]
    (whole,) = fresh_layout([size])
    rest = layout[dim:] if taken.selected else layout[dim + 1 :]
    start, stop = taken.span.start, taken.span.stop

    def recompute(builder: Builder, sources: list[fx.Node]) -> fx.Node:
        if taken.selected:
            return builder.call(aten.select.int, sources[0], dim, start)
        return builder.call(aten.slice.Tensor, sources[0], dim, start, stop)

    return _StepBack(
        (Operand(taken.source, (*layout[:dim], whole, *rest)),), () if taken.selected else layout[dim], recompute
    )


def _step_of_concatenation(node: fx.Node, layout: Layout) -> _StepBack | None:
    args: Any = node.args
    parts = args[0]
    if not all(is_tensor(part) for part in parts):
        return None
    given: Any = args[1] if len(args) > 1 else node.kwargs.get("dim", 0)
    dim = given % tensor(node).dim()
    stacked = node.target is aten.stack.default
    if not stacked and any(tensor(part).dim() != tensor(node).dim() for part in parts):
        return None
    sources = []
    for part in parts:
        own = () if stacked else fresh_layout([tensor(part).shape[dim]])
        sources.append(Operand(part, (*layout[:dim], *own, *layout[dim + 1 :])))

    def recompute(builder: Builder, sources: list[fx.Node]) -> fx.Node:
        return builder.call(node.target, sources, dim)

    return _StepBack(tuple(sources), layout[dim], recompute)


def _step_of_rows(node: fx.Node, layout: Layout) -> _StepBack | None:
    """The step of a projection or norm of the last dimensions: each row separately, with the same weights."""
    args: Any = node.args
    projects = node.target is aten.linear.default
    count = 1 if projects else len(args[1])
    source, weights = args[0], [arg for arg in (*args[1:], *node.kwargs.values()) if isinstance(arg, fx.Node)]
    if not is_tensor(source) or any(not is_tensor(weight) or weight is source for weight in weights):
        return None
    if not treats_rows_alike(node):
        return None
    last = len(layout) - count
    own = (*layout[:last], *fresh_layout(tensor(source).shape[last:]))

    def recompute(builder: Builder, sources: list[fx.Node]) -> fx.Node:
        return builder.call(node.target, sources[0], *args[1:], **node.kwargs)

    return _StepBack((Operand(source, own),), tuple(axis for dim in layout[last:] for axis in dim), recompute, projects)


def _step_of_entries(node: fx.Node, layout: Layout) -> _StepBack | None:
    if any(isinstance(value, fx.Node) for value in node.kwargs.values()):
        return None
    positions = [position for position, arg in enumerate(node.args) if is_tensor(arg)]
    sources = []
    for position in positions:
        source: Any = node.args[position]
        own = broadcast(layout, tensor(node).shape, tensor(source).shape)
        if own is None:
            return None
        sources.append(Operand(source, own))

    def recompute(builder: Builder, sources: list[fx.Node]) -> fx.Node:
        args = list(node.args)
        for position, source in zip(positions, sources, strict=True):
            args[position] = source
        return builder.call(node.target, *args, **node.kwargs)

    return _StepBack(tuple(sources), (), recompute)


_FOLLOWED = frozenset({aten.cat.default, aten.stack.default, aten.layer_norm.default, aten.rms_norm.default})


# Which axes a tensor depends on.


class _Dependence:
    """Follows an operand back to find the axes that it depends on. It works on copies of the axes and writes nothing.

    ``beyond``: the axes of nodes that were not examined, since the search had ended; these may depend on any of them.
    """

    def __init__(self, site: AttentionSite, view: GraphView, copied: dict[Axis, Axis]) -> None:
        self._region = view.grad_region(site.result)
        self._view = view
        self._copied = copied
        self._seen = 0
        self.beyond: set[Axis] = set()

    def of(self, operand: Operand) -> set[Axis]:
        """Copies of the axes that the operand depends on; the copies may be divided."""
        layout = tuple(
            tuple(self._copied.setdefault(axis, Axis(axis.size, axis.name)) for axis in dim)
            for dim in operand.resolved().layout
        )
        return self._needed(operand.node, layout, may_project=True)

    def _may_have_step(self, node: fx.Node, may_project: bool) -> bool:
        """Whether the search would continue from ``node``; cheaper than computing the step."""
        if node.op != "call_function" or not is_tensor(node) or self._view.grad_region(node) != self._region:
            return False
        if node.target is aten.linear.default:
            return may_project
        known = node.target in _FOLLOWED or is_layout_op(node) or is_cast(node) or is_pointwise(node)
        return known or taken_from(node) is not None

    def _needed(self, node: fx.Node, layout: Layout, may_project: bool) -> set[Axis]:
        repeated = repetition_of(node)
        if repeated is not None:
            pulled = repeated.pulled(layout)
            return set(axes_of(layout if pulled is None else pulled))
        if self._seen == BEHIND_KEYS.most and self._may_have_step(node, may_project):
            self.beyond |= set(axes_of(layout))
            return set()
        may_step = self._seen < BEHIND_KEYS.most and self._view.grad_region(node) == self._region
        self._seen += may_step
        step = _step(node, layout) if may_step else None
        if step is None or (step.projects and not may_project):
            return set(axes_of(layout))
        needed = set(axes_of((step.kept,)))
        for source in step.sources:
            needed |= self._needed(source.node, source.layout, may_project and not step.projects)
        return needed


# Computing an operand without the axes that it does not depend on.


def _part(builder: Builder, node: fx.Node, dim: int, taken: Repetition) -> fx.Node:
    stop = taken.start + taken.step * (taken.count - 1) + 1
    return builder.call(aten.slice.Tensor, node, dim, taken.start, stop, taken.step)


@dataclass
class _Writing:
    """Writes operands again without the absent axes."""

    site: AttentionSite
    view: GraphView
    absent: frozenset[Axis]
    created: list[fx.Node] = field(default_factory=list)
    _views: list[fx.Node] = field(default_factory=list)
    _computed: list[fx.Node] = field(default_factory=list)
    _written: Written = field(default_factory=dict)

    def of(self, operand: Operand) -> Operand | None:
        node = self._without_absent(operand.node, operand.layout)
        if node is None:
            return None
        self._views += self._with_views(operand.node)
        region = self.view.grad_region(self.site.result)

        def may_enter(node: fx.Node) -> bool:
            return bool(self.view.grad_region(node) == region)

        return peel(Operand(node, _without(operand.layout, self.absent)), may_enter)[-1].resolved()

    def is_sole_reader(self) -> bool:
        """Whether nothing is computed twice: only the site uses what was computed from the repeated tensor."""
        own = {*self._views, *self._computed, *self.site.interior}
        return all(user in own for node in self._computed for user in node.users)

    def erase_written(self) -> None:
        for node in reversed(self.created):
            self.view.graph.erase_node(node)

    def _with_views(self, node: fx.Node) -> list[fx.Node]:
        """``node`` and the views of it."""
        seen = [node]
        for each in seen:
            seen += [user for user in each.users if is_layout_op(user) and user not in seen]
        return seen

    def _without_absent(self, node: fx.Node, layout: Layout) -> fx.Node | None:
        """``node`` without the absent axes (itself if it has none of them); None if it cannot be computed."""
        if not set(axes_of(layout)) & set(axes_of((tuple(self.absent),))):
            return node
        builder = Builder(self.view.gm, before=node, like=node, written=self._written)
        replacement = self._selected(builder, node, layout) or self._recomputed(builder, node, layout)
        self.created += builder.created
        if replacement is None:
            return None
        self._keep_dtype(replacement, node)
        return replacement if same_shape(tensor(replacement).shape, shape_of(_without(layout, self.absent))) else None

    def _keep_dtype(self, replacement: fx.Node, node: fx.Node) -> None:
        """Gives the fake value of ``replacement`` the dtype of ``node``: fake values are computed without autocast."""
        dtype = tensor(node).dtype
        if tensor(replacement).dtype is not dtype:
            assert self.view.in_autocast(node), f"{replacement} is not what {node} is"
            replacement.meta["val"] = tensor(replacement).to(dtype)

    def _selected(self, builder: Builder, node: fx.Node, layout: Layout) -> fx.Node | None:
        repeated = repetition_of(node)
        pulled = None if repeated is None else repeated.pulled(layout)
        if repeated is None or pulled is None:
            return None
        if set(axes_of(pulled)) & set(axes_of((tuple(self.absent),))):
            return None
        source = self._projected_in_part(builder, node, repeated)
        if source is None:
            source = repeated.source
            if not same_shape((repeated.count,), (tensor(source).shape[repeated.dim],)):
                source = _part(builder, source, repeated.dim, repeated)
        return lay_out(builder, source, pulled, _without(layout, self.absent), expand=True)

    def _projected_in_part(self, builder: Builder, node: fx.Node, repeated: Repetition) -> fx.Node | None:
        """The projection of only those entries that ``node`` repeats; None if the projection of all has other users."""
        layout = fresh_layout(tensor(repeated.source).shape)
        if not layout[repeated.dim] or not same_shape((repeated.count,), (1,)):
            return None
        (taken,) = layout[repeated.dim]
        chain = peel(Operand(repeated.source, layout), lambda node: len(node.users) == 1)
        projection, own = chain[-1].node, chain[-1].resolved().layout
        step = _step(projection, own) if len(projection.users) == 1 else None
        if step is None or not step.projects or not step.recompute or taken.parts or not self._serves_only(node):
            return None
        (source,) = step.sources
        dims = tuple((axis,) for axis in axes_of(source.layout))
        if (taken,) not in dims or not self.view.same_region(projection, node):
            return None
        part = _part(builder, lay_out(builder, source.node, source.layout, dims), dims.index((taken,)), repeated)
        dropped = frozenset({taken})
        part = lay_out(builder, part, _without(dims, dropped), _without(source.layout, dropped))
        part = step.recompute(builder, [part])
        self._keep_dtype(part, projection)
        return lay_out(builder, part, _without(own, dropped), _without(layout, dropped))

    def _serves_only(self, node: fx.Node) -> bool:
        """Whether only the site uses ``node``."""
        own = {*self._computed, *self._views, *self.site.interior}
        return all(user in own or bool(is_layout_op(user) and self._serves_only(user)) for user in node.users)

    def _recomputed(self, builder: Builder, node: fx.Node, layout: Layout) -> fx.Node | None:
        step = _step(node, layout)
        if step is None:
            return None
        (self._views if step.recompute is None else self._computed).append(node)
        if node.target is operator.getitem:
            self._computed.append(node.all_input_nodes[0])
        sources = [self._without_absent(source.node, source.layout) for source in step.sources]
        known = [source for source in sources if source is not None]
        if len(known) < len(sources):
            return None
        if step.recompute is not None:
            return step.recompute(builder, known)
        (source,) = step.sources
        own = _without(source.layout, self.absent)
        return lay_out(builder, known[0], own, _without(layout, self.absent), expand=True)
