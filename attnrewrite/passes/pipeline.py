"""The passes in their order: from the captured graph to the graph with its attentions replaced."""

from __future__ import annotations

from torch import fx

from attnrewrite.ir.linear_site import LinearAttention
from attnrewrite.ir.site import AttentionSite, CanonicalAttention
from attnrewrite.options.compile_options import Policy
from attnrewrite.passes.bias_lookups import biases_on_gpu, sort_gradients_of_lookups
from attnrewrite.passes.canonicalize import canonicalized
from attnrewrite.passes.find import find
from attnrewrite.passes.fuse_projections import fuse_projections
from attnrewrite.passes.join_projections import join_projections
from attnrewrite.passes.merge_slices import merge_slices
from attnrewrite.passes.regions import holds_repeated, inline_repeated, regions_of
from attnrewrite.passes.regroup_products import regroup_products
from attnrewrite.passes.result import Rewritten
from attnrewrite.passes.rewriting import (
    AdjustRequest,
    Rewriting,
    adjusted_within,
    as_requested,
    current_site,
    with_written,
)
from attnrewrite.passes.steps import Steps
from attnrewrite.passes.unrepeat_kv import unrepeat_kv
from attnrewrite.patterns import Finding, GraphView, NearMiss

__all__ = ["find_sites", "read_sites", "rewrite"]


def rewrite(
    gm: fx.GraphModule,
    policy: Policy,
    adjust_request: AdjustRequest = as_requested,
    *,
    steps: Steps | None = None,
    with_kinds: bool = False,
    with_batch: bool = False,
    has_gradients: bool = False,
) -> Rewritten:
    """Replaces, in place, each attention of the graph that a kernel serves.

    Args:
        adjust_request: may change the user's request at a site.
        steps: times, logs and dumps the steps; default: no dump.
        with_kinds: whether to classify attentions as spatial, temporal or cross.
        with_batch: whether to find the tensors whose dimension 0 begins with the batch.
        has_gradients: a backward pass may follow although no input of the graph says so.
    """
    steps = Steps() if steps is None else steps
    inlined = False
    if policy.inner_backend == "inductor" and holds_repeated(gm) and GraphView(gm, has_gradients=has_gradients).trains:
        with steps.step("inline", gm):
            inlined = inline_repeated(gm)
    run = Rewriting(gm, policy, adjust_request, steps, has_gradients=has_gradients)
    with run.step("regroup_products"):
        run.regroup_products()
    with run.step("find"):
        findings = run.with_reasons(find(run.view))
    with run.step("merge_slices"):
        findings = merge_slices(findings, run.view)
    with run.step("unrepeat_kv"):
        findings = unrepeat_kv(findings, run.view)
    if with_kinds or with_batch:
        with run.step("kinds"):
            run.read_kinds(findings, with_kinds, with_batch)

    for name, finding in run.each(findings):
        if isinstance(finding, NearMiss):
            run.report_near_miss(name, finding)
        elif isinstance(finding, LinearAttention):
            with run.step("reassociate", name):
                run.reassociate(name, finding)
        else:
            _rewrite_attention(name, finding, run)

    with run.step("restore_products"):
        run.restore_products()
    biases = biases_on_gpu(run.served) if policy.inner_backend == "inductor" else []
    if biases:
        with run.step("bias_lookups"):
            sort_gradients_of_lookups(gm, biases, run.replaced)
    joined = _join_and_fuse(gm, policy, run)
    _rewrite_regions(gm, policy, adjust_request, run, steps)
    return run.finish(projections_changed=joined, regions_inlined=inlined)


def _rewrite_attention(name: str, finding: AttentionSite, run: Rewriting) -> None:
    site, row = run.begin(name, finding)
    with run.step("canonicalize", name):
        site = run.with_written(site)
        attention = run.canonicalized(site, row)
    kernel = None
    if attention is not None and attention.scores.repeated_along:
        with run.step("narrow_masks", name):
            attention = run.with_narrow_masks(attention)
    if attention is not None:
        with run.step("choose", name):
            kernel = run.choose(attention, row)
    if attention is not None and kernel is not None:
        with run.step("splice", name):
            run.splice(attention, row, kernel)
    else:
        # The slices of a merged site come next, each on its own.
        with run.step("keep", name):
            run.keep(site, row, (site if attention is None else attention).written)


def _rewrite_regions(
    gm: fx.GraphModule, policy: Policy, adjust_request: AdjustRequest, run: Rewriting, steps: Steps
) -> None:
    for region in regions_of(gm):
        with run.step("region", region.name):
            kept = region.why_kept(run.view.trains)
            if kept:
                run.keep_region(region, kept)
            else:
                adjust = adjusted_within(region.name, adjust_request)
                found = rewrite(region.gm, policy, adjust, steps=steps.within(), has_gradients=run.view.has_gradients)
                run.add_region(region, found)


def _join_and_fuse(gm: fx.GraphModule, policy: Policy, run: Rewriting) -> bool:
    """Joins and fuses projections around the attentions; returns whether the graph changed."""
    with run.step("join_projections"):
        changed = join_projections(gm, run.served, run.replaced)
    if policy.fuse_projections or (policy.fuse_projections is None and policy.freezes):
        with run.step("fuse_projections"):
            changed |= fuse_projections(gm, run.served, run.replaced, constants=policy.fuse_projections is None)
    return changed


def find_sites(view: GraphView) -> list[Finding]:
    """Every attention and near miss of a graph; products are regrouped, slices merged, keys and values unrepeated."""
    regroup_products(view, {})
    return unrepeat_kv(merge_slices(find(view), view), view)


def read_sites(gm: fx.GraphModule, policy: Policy) -> list[CanonicalAttention]:
    """The attentions of the IR graph in canonical form, without replacing them.

    Raises:
        NotAttention: a site has no canonical form.
    """
    sites = [finding for finding in find_sites(GraphView(gm)) if isinstance(finding, AttentionSite)]
    current = [with_written(current_site(site, {}, policy), gm) for site in sites]
    return [canonicalized(site, policy) for site in current]
