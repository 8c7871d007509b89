"""find, simplify, choose, splice: from the IR to the IR with its attentions replaced."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import has_free_unbacked_symbols, statically_known_true

from attnrewrite.analysis.kinds import SiteKind, begins_with_batch, kinds_of
from attnrewrite.errors import KernelError
from attnrewrite.ir.bounds import searching
from attnrewrite.ir.builder import Builder
from attnrewrite.ir.linear_site import LinearAttention
from attnrewrite.ir.reason import Reason
from attnrewrite.ir.site import (
    AttentionSite,
    CanonicalAttention,
    NotAttention,
    RoundingDecides,
)
from attnrewrite.ir.source import source_location
from attnrewrite.kernels import Kernel
from attnrewrite.options.compile_options import Policy
from attnrewrite.options.request import Request
from attnrewrite.passes.canonicalize import canonicalized
from attnrewrite.passes.describe import (
    describe_grouping,
    describe_proof,
    row_of_attention,
    row_of_linear,
    row_of_near_miss,
)
from attnrewrite.passes.find import find
from attnrewrite.passes.fold_batches import with_folded_batches
from attnrewrite.passes.fuse_projections import fuse_projections
from attnrewrite.passes.insert_checks import insert_check
from attnrewrite.passes.join_projections import join_projections
from attnrewrite.passes.reassociate import choose_order, emit_result, emit_sum
from attnrewrite.passes.result import Rewritten
from attnrewrite.passes.splice import (
    WrittenByRegion,
    current_operand,
    latest,
    redirected,
    remove_unused,
    replace_node,
    splice,
)
from attnrewrite.patterns import Finding, GraphView, NearMiss
from attnrewrite.report.rows import SiteReport
from attnrewrite.selection.choose import choose, say_unserved
from attnrewrite.selection.decorated_parts import policy_at
from attnrewrite.selection.requests import request_for
from attnrewrite.torch_private import is_erased

__all__ = ["as_asked", "read_sites", "rewrite"]

aten = torch.ops.aten


Asking = Callable[[str, CanonicalAttention, Request | None], Request | None]


def as_asked(name: str, site: CanonicalAttention, request: Request | None) -> Request | None:
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
    findings = deque((f"site{index}", finding) for index, finding in enumerate(find(gm)))
    result.add_time("find", start)
    kinds = _kinds(gm, [finding for _, finding in findings]) if with_kinds else {}
    batched = begins_with_batch(gm) if with_batch else frozenset()
    replaced: dict[fx.Node, fx.Node] = {}
    served: list[tuple[AttentionSite | LinearAttention, SiteReport]] = []
    attentions: list[tuple[AttentionSite | LinearAttention, SiteReport]] = []
    written = WrittenByRegion(gm.graph)
    while findings:
        name, finding = findings.popleft()
        if isinstance(finding, NearMiss):
            result.sites.append(row_of_near_miss(name, finding))
            continue
        if isinstance(finding, LinearAttention):
            result.sites.append(_order_products(gm, name, finding, replaced, result))
            served.append((finding, result.sites[-1]))
            attentions.append(served[-1])
            continue
        start = time.perf_counter()
        finding = _up_to_date(finding, replaced, policy)
        row = row_of_attention(name, finding)
        served_by = _simplify_and_choose(gm, finding, row, policy, asking, result)
        if served_by is None and finding.parts:
            parts = enumerate(_unmerged(finding, row.reason))
            findings.extendleft(reversed([(f"{name}_{number}", part) for number, part in parts]))
            remove_unused(gm.graph, finding.written)
            continue
        result.sites.append(row)
        attentions.append((finding, row))
        if served_by is None:
            # Operands that were written for a kernel that did not come.
            remove_unused(gm.graph, finding.written)
            continue
        start = time.perf_counter()
        attention, kernel = served_by
        row.status, row.kernel = "rewritten", kernel.name
        created = splice(gm, attention, kernel, replaced, written)
        if policy_at(policy, finding.anchor).checks:
            check = insert_check(gm, attention, created, row.location)
            created = created if check is None else (check, *created)
        # A mask that was proved is not read.
        remove_unused(gm.graph, finding.written)
        row.nodes_after = tuple(node.name for node in (*finding.written, *created) if not is_erased(node))
        served.append((finding, row))
        result.add_time("splice", start)
    start = time.perf_counter()
    result.joined = _join_projections(gm, served, replaced)
    if policy.fuse_projections or (policy.fuse_projections is None and policy.freezes):
        result.joined |= _fuse_projections(gm, served, replaced, constants=policy.fuse_projections is None)
    result.add_time("splice", start)
    for site, row in attentions:
        node = latest(site.result, replaced)
        if not is_erased(node):
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
        output = latest(site.result, replaced)
        if is_erased(output):
            continue
        view = view or GraphView(gm)
        query, key, value = (latest(part.node, replaced) for part in (site.query, site.key, site.value))
        said, gone = join_projections(view, query, key, value, output)
        replaced.update(gone)
        remove_unused(gm.graph, list(gone))
        row.projections = said
        if gone:
            view, joined = None, True
            left = {node.name for node in gm.graph.nodes}
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
        operands = {role: latest(part.node, replaced) for role, part in parts.items()}
        view = view or GraphView(gm)
        said, gone = fuse_projections(view, operands, kernels, constants)
        replaced.update(gone)
        remove_unused(gm.graph, list(gone))
        row.projections = "; ".join(filter(None, (row.projections, said)))
        if gone:
            view, fused = None, True
    return fused


def _simplify_and_choose(
    gm: fx.GraphModule, site: AttentionSite, row: SiteReport, graph_policy: Policy, asking: Asking, result: Rewritten
) -> tuple[CanonicalAttention, Kernel] | None:
    """The site in canonical form and the kernel that takes it; None if none does, and the row says why."""
    start = time.perf_counter()
    policy = policy_at(graph_policy, site.anchor)
    try:
        with searching() as ended:
            attention = _simplified(site, policy)
    except NotAttention as reason:
        row.reason = ended.added_to(str(reason))
        # The slices of a whole speak for themselves.
        if isinstance(reason, RoundingDecides) and not site.parts:
            result.round_like_eager = result.offered = True
            request = request_for(policy, row.location, site.anchor)
            if request is not None:
                say_unserved(request, row, row.reason)
        result.add_time("simplify", start)
        return None
    row.proof = describe_proof(attention, ended)
    row.grouping = describe_grouping(attention)
    row.mask = " + ".join(attention.scores.structure) or "none"
    result.add_time("simplify", start)
    start = time.perf_counter()
    result.offered = True
    if not _asked_alike(site, graph_policy):
        row.reason = "its slices are not asked for alike (kernels, or other options of single sites)"
        result.add_time("choose", start)
        return None
    request = asking(row.name, attention, request_for(policy, row.location, site.anchor))
    try:
        kernel = choose(gm, attention, request, row, policy)
        return None if kernel is None else (attention, kernel)
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


def _up_to_date(site: AttentionSite, replaced: dict[fx.Node, fx.Node], policy: Policy) -> AttentionSite:
    """The site of the graph as it stands now."""
    return replace(redirected(site, replaced), for_inductor=policy.inner_backend == "inductor")


def _simplified(site: AttentionSite, policy: Policy) -> CanonicalAttention:
    _require_sizes(site)
    return with_folded_batches(canonicalized(site, policy))


def _unmerged(site: AttentionSite, reason: str) -> list[AttentionSite]:
    return [replace(part, unmerged=Reason(f"the whole is not taken: {reason}")) for part in site.parts]


def read_sites(gm: fx.GraphModule, policy: Policy) -> list[CanonicalAttention]:
    """The attentions of the IR graph in canonical form, without rewriting them.

    Raises:
        NotAttention: one is not what it looked like.
    """
    sites = [finding for finding in find(gm) if isinstance(finding, AttentionSite)]
    return [_simplified(_up_to_date(site, {}, policy), policy) for site in sites]


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
    site = site.resolved().with_operands(lambda operand: current_operand(operand, replaced))
    row = row_of_linear(name, site)
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
        replace_node(gm.graph, total.node, emit_sum(site, total, applied, builder), builder, replaced)
        created += builder.created
    site = site.with_operands(lambda operand: current_operand(operand, replaced))
    builder = Builder(gm, before=site.result, like=site.anchor)
    replace_node(gm.graph, site.result, emit_result(site, builder), builder, replaced)
    row.nodes_after = tuple(node.name for node in (*created, *builder.created) if not is_erased(node))
    result.add_time("splice", start)
    return row
