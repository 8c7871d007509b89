"""find, simplify, choose, splice: from the IR to the IR with its attentions replaced."""

from __future__ import annotations

import operator
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import has_free_unbacked_symbols, statically_known_true

from attnrewrite.analysis.kinds import SiteKind, begins_with_batch, kinds_of
from attnrewrite.analysis.views import Axis, Operand, axes_of, is_layout_op, shape_of
from attnrewrite.association import choose_order, emit_result, emit_sum, operations
from attnrewrite.checks import insert_check
from attnrewrite.choose import choose, say_unserved
from attnrewrite.errors import KernelError
from attnrewrite.folding import fold_batches
from attnrewrite.fused_projections import fuse_projections
from attnrewrite.inlined import policy_at
from attnrewrite.ir import Builder, Written, is_cast, is_tensor, regions, same_shape, source_location, tensor
from attnrewrite.kernels import Kernel
from attnrewrite.kernels.layout import in_memory_order_of
from attnrewrite.merge import merge_slices
from attnrewrite.patterns import Finding, GraphView, NearMiss, catalogue
from attnrewrite.policy import Policy, Request
from attnrewrite.projections import join_projections
from attnrewrite.repetitions import undo_repetitions
from attnrewrite.report import SiteReport
from attnrewrite.selection import request_for
from attnrewrite.simplify import canonical_scores
from attnrewrite.site import (
    AttentionSite,
    Bias,
    Fill,
    Floor,
    LinearAttention,
    Narrow,
    NotAttention,
    Order,
    RoundingDecides,
    Scale,
    Shift,
    Zero,
    scale_in_words,
)

__all__ = ["Rewritten", "as_asked", "read_sites", "rewrite"]

aten = torch.ops.aten


@dataclass
class Rewritten:
    """What became of a graph: a row for each site, in graph order, and the seconds that each step took.

    ``results``: of each attention, rewritten or not, its row, its kind with the reason for it where kinds were asked
    for, and the node that holds its result now. ``begins_with_batch``: if asked for, see
    :func:`attnrewrite.analysis.kinds.begins_with_batch`.
    ``round_like_eager``: a site was kept because the rounding of its scores decides its result. ``offered``: kernels
    were asked, so that what comes out depends on the kernels that the user asks for. ``joined``: projections were
    joined or fused.
    """

    sites: list[SiteReport] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    round_like_eager: bool = False
    offered: bool = False
    joined: bool = False
    results: list[tuple[SiteReport, SiteKind | None, fx.Node]] = field(default_factory=list)
    begins_with_batch: frozenset[fx.Node] = frozenset()

    @property
    def changed(self) -> bool:
        return self.joined or any(site.status == "rewritten" for site in self.sites)

    def add_time(self, step: str, start: float) -> None:
        self.seconds[step] = self.seconds.get(step, 0.0) + time.perf_counter() - start


Asking = Callable[[str, AttentionSite, Request | None], Request | None]


def as_asked(name: str, site: AttentionSite, request: Request | None) -> Request | None:
    """Nothing is asked for beyond what the user asked for."""
    return request


def rewrite(
    gm: fx.GraphModule, policy: Policy, asking: Asking = as_asked, with_kinds: bool = False, with_batch: bool = False
) -> Rewritten:
    """Replaces, in place, each attention of the IR graph that a kernel is willing to take.

    Args:
        asking: may change what the user asked for at a site; it is given the site's name in the report.
        with_kinds: whether attentions are told apart as spatial, temporal and cross.
        with_batch: whether tensors are told whose dimension 0 begins with the batch.
    """
    result = Rewritten()
    start = time.perf_counter()
    # A site has the same name whatever becomes of others: what it is asked for goes by names.
    findings = deque((f"site{index}", finding) for index, finding in enumerate(_find(gm)))
    result.add_time("find", start)
    kinds = _kinds(gm, [finding for _, finding in findings]) if with_kinds else {}
    batched = begins_with_batch(gm) if with_batch else frozenset()
    replaced: dict[fx.Node, fx.Node] = {}
    served: list[tuple[AttentionSite | LinearAttention, SiteReport]] = []
    attentions: list[tuple[AttentionSite | LinearAttention, SiteReport]] = []
    written = _WrittenByRegion(gm.graph)
    while findings:
        name, finding = findings.popleft()
        if isinstance(finding, NearMiss):
            result.sites.append(_row_of_near_miss(name, finding))
            continue
        if isinstance(finding, LinearAttention):
            result.sites.append(_order_products(gm, name, finding, replaced, result))
            served.append((finding, result.sites[-1]))
            attentions.append(served[-1])
            continue
        start = time.perf_counter()
        _redirect(finding, replaced)
        finding.for_inductor = policy.inner_backend == "inductor"
        row = _row(name, finding)
        kernel = _simplify_and_choose(gm, finding, row, policy, asking, result)
        if kernel is None and finding.parts:
            parts = enumerate(_unmerged(finding, row.reason))
            findings.extendleft(reversed([(f"{name}_{number}", part) for number, part in parts]))
            _remove(gm.graph, finding.written)
            continue
        result.sites.append(row)
        attentions.append((finding, row))
        if kernel is None:
            # Operands that were written for a kernel that did not come.
            _remove(gm.graph, finding.written)
            continue
        start = time.perf_counter()
        row.status, row.kernel = "rewritten", kernel.name
        created = _splice(gm, finding, kernel, replaced, written)
        if policy_at(policy, finding.anchor).checks:
            check = insert_check(gm, finding, created, row.location)
            created = created if check is None else (check, *created)
        # A mask that was proved is not read.
        _remove(gm.graph, finding.written)
        row.nodes_after = tuple(node.name for node in (*finding.written, *created) if not node._erased)
        served.append((finding, row))
        result.add_time("splice", start)
    start = time.perf_counter()
    result.joined = _join_projections(gm, served, replaced)
    if policy.fuse_projections or (policy.fuse_projections is None and policy.freezes):
        result.joined |= _fuse_projections(gm, served, replaced, constants=policy.fuse_projections is None)
    result.add_time("splice", start)
    for site, row in attentions:
        node = _latest(site.result, replaced)
        if not node._erased:
            result.results.append((row, kinds.get(site.result), node))
            batched |= {node} if site.result in batched else set()
    result.begins_with_batch = batched
    if result.changed:
        gm.graph.lint()
        gm.recompile()
    return result


def _kinds(gm: fx.GraphModule, findings: Sequence[Finding]) -> dict[fx.Node, SiteKind]:
    """By the node that holds the result in the source: of wholes, and of the slices that may stand for them."""
    sites = [finding for finding in findings if not isinstance(finding, NearMiss)]
    sites += [part for site in sites if isinstance(site, AttentionSite) for part in site.parts]
    return {site.result: kind for site, kind in zip(sites, kinds_of(gm, sites), strict=True)}


def _join_projections(
    gm: fx.GraphModule,
    served: list[tuple[AttentionSite | LinearAttention, SiteReport]],
    replaced: dict[fx.Node, fx.Node],
) -> bool:
    """Once all sites are replaced: projections around them that are those of a whole batch become one.

    Returns whether any did.
    """
    view: GraphView | None = None
    joined = False
    for site, row in served:
        output = _latest(site.result, replaced)
        if output._erased:
            continue
        view = view or GraphView(gm)
        query, key, value = (_latest(part.node, replaced) for part in (site.query, site.key, site.value))
        said, gone = join_projections(view, query, key, value, output)
        replaced.update(gone)
        _remove(gm.graph, list(gone))
        if gone:
            view, joined = None, True
            left = {node.name for node in gm.graph.nodes}
            row.projections = said or "projections of parts of the batch are one"
            row.nodes_after = tuple(name for name in row.nodes_after if name in left)
    return joined


def _fuse_projections(
    gm: fx.GraphModule,
    served: list[tuple[AttentionSite | LinearAttention, SiteReport]],
    replaced: dict[fx.Node, fx.Node],
    constants: bool,
) -> bool:
    """Behind that, since parts of one batch are not one input: projections of one input become one.

    Returns whether any did.
    """
    view: GraphView | None = None
    fused = False
    kernels = {name for _, row in served for name in row.nodes_after}
    for site, row in served:
        parts = {"query": site.query, "key": site.key, "value": site.value}
        operands = {role: _latest(part.node, replaced) for role, part in parts.items()}
        view = view or GraphView(gm)
        said, gone = fuse_projections(view, operands, kernels, constants)
        replaced.update(gone)
        _remove(gm.graph, list(gone))
        row.projections = "; ".join(filter(None, (row.projections, said)))
        if gone:
            view, fused = None, True
    return fused


def _latest(node: fx.Node, replaced: dict[fx.Node, fx.Node]) -> fx.Node:
    while node in replaced:
        node = replaced[node]
    return node


def _simplify_and_choose(
    gm: fx.GraphModule, site: AttentionSite, row: SiteReport, graph_policy: Policy, asking: Asking, result: Rewritten
) -> Kernel | None:
    """The kernel that takes the site; None if none does, and the row says why."""
    start = time.perf_counter()
    policy = policy_at(graph_policy, site.anchor)
    try:
        _simplify(site, policy)
    except NotAttention as reason:
        row.reason = str(reason)
        # The slices of a whole speak for themselves.
        if isinstance(reason, RoundingDecides) and not site.parts:
            result.round_like_eager = result.offered = True
            request = request_for(policy, row.location, site.anchor)
            if request is not None:
                say_unserved(request, row, row.reason)
        result.add_time("simplify", start)
        return None
    row.proof = _proof(site)
    row.grouping = _grouping_in_words(site)
    assert site.scores is not None
    row.mask = " + ".join(site.scores.structure) or "none"
    result.add_time("simplify", start)
    start = time.perf_counter()
    result.offered = True
    if not _asked_alike(site, graph_policy):
        row.reason = "its slices are not asked for alike (kernels, or other options of single sites)"
        result.add_time("choose", start)
        return None
    request = asking(row.name, site, request_for(policy, row.location, site.anchor))
    try:
        return choose(gm, site, request, row, policy)
    except KernelError as refusal:
        if not site.parts:
            raise
        row.reason = str(refusal)
        return None
    finally:
        result.add_time("choose", start)


def _asked_alike(site: AttentionSite, policy: Policy) -> bool:
    """Whether the same is asked for at all slices of a whole."""
    asked = []
    for part in site.parts:
        here = policy_at(policy, part.anchor)
        asked.append((here, request_for(here, source_location(part.anchor), part.anchor)))
    return all(each == asked[0] for each in asked)


def _simplify(site: AttentionSite, policy: Policy) -> None:
    _require_sizes(site)
    site.scores = canonical_scores(site, policy)
    fold_batches(site)


def _unmerged(site: AttentionSite, reason: str) -> list[AttentionSite]:
    for part in site.parts:
        part.unmerged = f"the whole is not taken: {reason}"
    return list(site.parts)


def read_sites(gm: fx.GraphModule, policy: Policy) -> list[AttentionSite]:
    """The attentions of the IR graph, simplified, without rewriting them.

    Raises:
        NotAttention: one is not what it looked like.
    """
    sites = [finding for finding in _find(gm) if isinstance(finding, AttentionSite)]
    for site in sites:
        _redirect(site, {})
        site.for_inductor = policy.inner_backend == "inductor"
        _simplify(site, policy)
    return sites


def _find(gm: fx.GraphModule) -> list[Finding]:
    view = GraphView(gm)
    findings = [finding for pattern in catalogue() for finding in pattern.find(view)]
    order = {node: position for position, node in enumerate(gm.graph.nodes)}
    claimed: dict[fx.Node, str] = {}
    found: list[Finding] = []
    # Scores, or weights and values, may be a product of three as well: what has a softmax is read first.
    for finding in sorted(findings, key=lambda each: (isinstance(each, LinearAttention), order[each.anchor])):
        nodes = set(_nodes_of(finding))
        # Sites of one pattern may share their scores; what another pattern has read is taken.
        if all(claimed.get(node, finding.pattern) == finding.pattern for node in nodes):
            claimed.update(dict.fromkeys(nodes, finding.pattern))
            found.append(finding)
    found.sort(key=lambda each: order[each.anchor])
    found = merge_slices(found, view)
    undo_repetitions(found, view)
    return found


def _nodes_of(finding: Finding) -> Sequence[fx.Node]:
    nodes: Sequence[fx.Node] = finding.nodes if isinstance(finding, NearMiss) else finding.interior
    return nodes


def _redirect(site: AttentionSite, replaced: dict[fx.Node, fx.Node]) -> None:
    """An operand that was the result of an earlier site is now that site's replacement."""
    # Other sites, found later, may have divided the axes.
    site.query_axes, site.key_axes, site.feature_axes = (
        axes_of((axes,)) for axes in (site.query_axes, site.key_axes, site.feature_axes)
    )
    site.change_operands(lambda operand: _current(operand, replaced))


def _current(operand: Operand, replaced: dict[fx.Node, fx.Node]) -> Operand:
    return Operand(replaced.get(operand.node, operand.node), operand.layout).resolved()


def _require_sizes(site: AttentionSite) -> None:
    """Raises:
    NotAttention: a size is known only once the data is there, and kernels decide by sizes.
    """
    positions = {*site.query_axes, *site.key_axes}
    others = [axis.size for axis in (*site.query.axes, *site.key.axes, *site.value.axes) if axis not in positions]
    if has_free_unbacked_symbols(others):
        raise NotAttention("a size depends on the data (a selection by a mask, say), and kernels decide by sizes")
    counted = [axis.size for axis in positions if has_free_unbacked_symbols(axis.size)]
    if not site.fused and not all(statically_known_true(size > 0) for size in counted):
        raise NotAttention("a number of positions depends on the data, and may be zero")


# Splicing.


def _order_products(
    gm: fx.GraphModule, name: str, site: LinearAttention, replaced: dict[fx.Node, fx.Node], result: Rewritten
) -> SiteReport:
    """Multiplies linear attention in the cheaper order; gives its row."""
    start = time.perf_counter()
    site.resolve()
    site.change_operands(lambda operand: _current(operand, replaced))
    row = _row_of_linear(name, site)
    choice = choose_order(site)
    result.add_time("choose", start)
    if choice.order == site.order:
        row.status, row.reason = "kept" if choice.refused else "recognised", choice.reason
        return row
    start = time.perf_counter()
    row.status, row.kernel = "rewritten", f"{choice.order} order"
    row.order = f"{choice.order}, was {site.order}"
    created: list[fx.Node] = []
    for total, applied in site.sums:
        builder = Builder(gm, before=total.node, like=total.node)
        _replace(gm.graph, total.node, emit_sum(site, total, applied, builder), builder, replaced)
        created += builder.created
    site.change_operands(lambda operand: _current(operand, replaced))
    builder = Builder(gm, before=site.result, like=site.anchor)
    _replace(gm.graph, site.result, emit_result(site, builder), builder, replaced)
    row.nodes_after = tuple(node.name for node in (*created, *builder.created) if not node._erased)
    result.add_time("splice", start)
    return row


def _replace(graph: fx.Graph, old: fx.Node, new: fx.Node, builder: Builder, replaced: dict[fx.Node, fx.Node]) -> None:
    if not (_strides_are_free(old) or same_shape(tensor(old).stride(), tensor(new).stride())):
        new = in_memory_order_of(tensor(old), new, builder)
    old.replace_all_uses_with(new)
    replaced[old] = new
    _remove(graph, (old,))


class _WrittenByRegion:
    """What kernels were given for earlier sites, such as a mask that all layers share, and later ones take again.

    Only within a region: what was written where gradients are off has none, and what a checkpoint holds is made anew.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self._regions = regions(graph)
        self._written: dict[Any, Written] = {}

    def of(self, node: fx.Node) -> Written:
        tags = tuple(str(node.meta.get(tag)) for tag in ("recompute", "ac_graph_id", "custom"))
        return self._written.setdefault((self._regions[node], tags), {})


def _splice(
    gm: fx.GraphModule,
    site: AttentionSite,
    kernel: Kernel,
    replaced: dict[fx.Node, fx.Node],
    written: _WrittenByRegion,
) -> tuple[fx.Node, ...]:
    """Puts the kernel's nodes in the site's place and removes what served only the site; returns those nodes."""
    builder = Builder(gm, before=site.result, like=site.anchor, written=written.of(site.result))
    autocast = None
    if site.in_autocast and not site.fused:
        # The kernel's operands and mask have the dtypes that they should have; autocast would round the mask.
        autocast = builder.insert(
            torch.amp.autocast_mode._enter_autocast, (site.device.type, None, False, None), {}, None
        )
    output = kernel.emit(site, builder)
    if autocast is not None:
        builder.insert(torch.amp.autocast_mode._exit_autocast, (autocast,), {}, None)
    if not _strides_are_free(site.result):
        output = in_memory_order_of(tensor(site.result), output, builder)
    site.result.replace_all_uses_with(output)
    replaced[site.result] = output
    _remove(gm.graph, site.interior if site.parts else (site.result,))
    return tuple(builder.created)


_STRIDE_BLIND = frozenset(
    {
        aten.linear.default,
        aten.matmul.default,
        aten.bmm.default,
        aten.mm.default,
        aten.addmm.default,
        aten.baddbmm.default,
        aten.einsum.default,
        aten.contiguous.default,
    }
)
"""Operators whose result is laid out in memory in the same way, however their operands are."""


def _strides_are_free(node: fx.Node) -> bool:
    """Whether nothing can tell how ``node`` lies in memory. Views on the way become reshapes, which always work."""
    free = True
    for user in node.users:
        if user.target in _STRIDE_BLIND:
            continue
        if user.target is aten.view.default:
            user.target = aten.reshape.default
        free = free and (is_layout_op(user) or is_cast(user)) and _strides_are_free(user)
    return free


def _remove(graph: fx.Graph, nodes: Sequence[fx.Node]) -> None:
    """Removes nodes, the last one first, and, one after another, what only they have read."""
    pending = [*nodes]
    while pending:
        node = pending.pop()
        if node._erased or node.users or node.op != "call_function" or _has_effect(node):
            continue
        pending.extend(node.all_input_nodes)
        graph.erase_node(node)


def _has_effect(node: fx.Node) -> bool:
    if node.target is operator.getitem:
        return False
    # Not `is_impure`: that counts dropout, which the removed attention took with it.
    schema = getattr(node.target, "_schema", None)
    return schema is None or schema.is_mutable


# Rows of the report.


def _row_of_near_miss(name: str, miss: NearMiss) -> SiteReport:
    return SiteReport(
        name,
        miss.pattern,
        "kept",
        source_location(miss.anchor),
        reason=miss.reason,
        dtype=_dtype_name(miss.anchor),
        device=tensor(miss.anchor).device.type if is_tensor(miss.anchor) else "",
        nodes_before=tuple(node.name for node in miss.nodes),
    )


def _row(name: str, site: AttentionSite) -> SiteReport:
    heads = (*site.shared_axes, *site.group_axes)

    def shape(*dims: Any) -> tuple[str, ...]:
        return tuple(str(size) for size in shape_of(tuple((axis,) for axis in heads if axis in dims[0]) + dims[1:]))

    return SiteReport(
        name,
        site.pattern,
        "kept",
        source_location(site.anchor),
        query_shape=shape(site.query.axes, site.query_axes, site.feature_axes),
        key_shape=shape(site.key.axes, site.key_axes, site.feature_axes),
        value_shape=shape(site.value.axes, site.key_axes, site.value_axes),
        dtype=str(site.compute_dtype).removeprefix("torch."),
        device=site.device.type,
        scale=site.describe_scale(),
        mask=_mask_in_words(site),
        score_mods=(
            *(_mod_in_words(mod) for mod in site.mods if not isinstance(mod, (Scale, Shift))),
            *([f"sink {getattr(site.sink, 'node', site.sink)}"] if site.sink is not None else []),
            *(_mod_in_words(mod) for mod in site.weight_mods),
            *(["NaN set to zero"] if site.nan_to_zero else []),
        ),
        dropout=f"{site.dropout:g}" if site.dropout else "",
        grouping=_grouping_in_words(site),
        slices=_slices_in_words(site),
        nodes_before=tuple(node.name for node in site.interior),
    )


def _row_of_linear(name: str, site: LinearAttention) -> SiteReport:
    batch = site.batch_axes

    def shape(operand: Operand, *dims: tuple[Axis, ...]) -> tuple[str, ...]:
        own = tuple((axis,) for axis in batch if axis in operand.axes)
        return tuple(str(size) for size in shape_of((*own, *dims)))

    orders: tuple[Order, ...] = ("linear", "quadratic")
    return SiteReport(
        name,
        site.pattern,
        "recognised",
        source_location(site.anchor),
        query_shape=shape(site.query, site.query_axes, site.feature_axes),
        key_shape=shape(site.key, site.key_axes, site.feature_axes),
        value_shape=shape(site.value, site.key_axes, site.value_axes),
        dtype=str(site.dtype).removeprefix("torch."),
        device=tensor(site.result).device.type,
        scale=" * ".join(scale_in_words(scale) for scale in site.scales if isinstance(scale.factor, (int, float))),
        score_mods=(*site.features, *([f"divided by {site.normaliser}"] if site.normaliser else [])),
        order=site.order,
        operations={order: str(operations(site, order)) for order in orders},
        nodes_before=tuple(node.name for node in site.interior),
    )


def _grouping_in_words(site: AttentionSite) -> str:
    grouped, folded = ("x".join(str(axis.size) for axis in axes) for axes in (site.group_axes, site.folded))
    words = [f"{folded} batches share a key and are one with as many more queries"] if folded else []
    return "; ".join([*words, *([f"{grouped} query heads share a key"] if grouped else [])])


def _slices_in_words(site: AttentionSite) -> str:
    if len(site.parts) == 1:
        return "the buffer that it fills is not made"
    if site.parts:
        return f"merged from {len(site.parts)} slices"
    return f"slices are not merged: {site.unmerged}" if site.unmerged else ""


def _dtype_name(node: fx.Node) -> str:
    return str(tensor(node).dtype).removeprefix("torch.") if is_tensor(node) else ""


def _mask_in_words(site: AttentionSite) -> str:
    if site.is_causal:
        return "causal"
    kinds = [
        "bias" if isinstance(mod, Bias) else f"fill {mod.value:g}" for mod in site.mods if isinstance(mod, (Bias, Fill))
    ]
    return " + ".join(kinds) or "none"


def _mod_in_words(mod: Any) -> str:
    if isinstance(mod, Bias):
        return f"add {'x'.join(str(size) for size in tensor(mod.operand.node).shape)} {mod.dtype}".replace("torch.", "")
    if isinstance(mod, Fill):
        return f"fill {mod.value:g} where {'not ' * mod.invert}{mod.condition.node.name}"
    if isinstance(mod, Floor):
        return f"at least {mod.value:g}"
    if isinstance(mod, Narrow):
        return f"rounded to {mod.dtype}".replace("torch.", "")
    if isinstance(mod, Zero):
        return f"weights zero where {'not ' * mod.invert}{mod.condition.node.name}"
    if isinstance(mod, Scale):
        return f"weights {'divided' if mod.divide else 'multiplied'} by {getattr(mod.factor, 'node', mod.factor)}"
    return str(getattr(mod.node.target, "_opname", mod.node.target))


def _proof(site: AttentionSite) -> tuple[str, ...]:
    assert site.scores is not None
    if site.scores.is_causal and not site.is_causal:
        return (f"the mask is causal, and every row keeps a key: {site.scores.attended}",)
    if not site.scores.terms:
        return ()
    if site.scores.attended is not None:
        return (f"every row keeps a key: {site.scores.attended}",)
    if site.fused:
        return ("rows without a key: as in the call that was there",)
    return (f"rows without a key cannot be ruled out and keep the source's value ({site.scores.masked_rows})",)
