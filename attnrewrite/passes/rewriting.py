"""One run of the passes over a graph: its state, and the steps at each site."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import takewhile

from torch import fx

from attnrewrite.analysis.kinds import SiteKind, begins_with_batch, kinds_of
from attnrewrite.analysis.scores import node_in_words
from attnrewrite.analysis.shared_entries import SharedEntries
from attnrewrite.errors import KernelError
from attnrewrite.ir.bounds import searching
from attnrewrite.ir.linear_site import LinearAttention
from attnrewrite.ir.reason import Reason
from attnrewrite.ir.site import AttentionSite, CanonicalAttention, NotAttention
from attnrewrite.ir.source import source_location
from attnrewrite.kernels import Kernel
from attnrewrite.kernels.common.memory import keep_copies
from attnrewrite.options.compile_options import Policy
from attnrewrite.options.request import Request
from attnrewrite.passes.canonicalize import canonicalized
from attnrewrite.passes.describe import describe_canonical, row_of_attention, row_of_linear, row_of_near_miss
from attnrewrite.passes.find import find
from attnrewrite.passes.finite_rows import with_factors_of_finite_rows
from attnrewrite.passes.insert_checks import insert_check
from attnrewrite.passes.narrow_masks import with_narrow_masks
from attnrewrite.passes.reassociate import reassociate
from attnrewrite.passes.regions import Region, named_within
from attnrewrite.passes.regroup_products import Regrouped, regroup_products
from attnrewrite.passes.result import ReportedSite, Rewritten
from attnrewrite.passes.splice import WrittenByRegion, current_operand, latest, redirected, remove_unused, splice
from attnrewrite.passes.steps import Steps
from attnrewrite.passes.zeroed_keys import with_sink_of_zeroed_keys
from attnrewrite.patterns import Finding, GraphView, NearMiss
from attnrewrite.report.rows import SiteReport
from attnrewrite.selection.choose import choose
from attnrewrite.selection.decorated_parts import policy_at
from attnrewrite.selection.requests import request_for
from attnrewrite.torch_private import is_erased

__all__ = ["AdjustRequest", "Rewriting", "as_requested", "current_site", "with_written"]

AdjustRequest = Callable[[str, CanonicalAttention, Request | None], Request | None]
"""From a site's name in the report, the site, and the user's request: the request to use there."""


def as_requested(name: str, site: CanonicalAttention, request: Request | None) -> Request | None:
    """The user's request, unchanged."""
    return request


def adjusted_within(region: str, adjust_request: AdjustRequest) -> AdjustRequest:
    """``adjust_request`` for the sites of a region, which it knows by the names that the report gives them."""

    def adjust(name: str, site: CanonicalAttention, request: Request | None) -> Request | None:
        return adjust_request(f"{region}.{name}", site, request)

    return adjust


def current_site(site: AttentionSite, replaced: dict[fx.Node, fx.Node], policy: Policy) -> AttentionSite:
    """The site with the operands that the graph has now.

    Args:
        replaced: nodes that are no longer in the graph, each with its replacement.
    """
    return replace(redirected(site, replaced), for_inductor=policy.inner_backend == "inductor")


def with_written(site: AttentionSite, gm: fx.GraphModule) -> AttentionSite:
    """The site with nodes that its canonical form has and the graph lacked."""
    return with_sink_of_zeroed_keys(with_factors_of_finite_rows(site, gm), gm)


def _before_attentions(findings: Sequence[Finding], graph: fx.Graph) -> Iterator[fx.Node]:
    """The nodes before the first that may be replaced; a merged site that is kept is replaced slice by slice."""
    sites = [finding for finding in findings if not isinstance(finding, NearMiss)]
    sites += [part for site in sites if isinstance(site, AttentionSite) for part in site.parts]
    results = {site.result for site in sites}
    return takewhile(lambda node: node not in results, graph.nodes)


class Rewriting:
    """One run of the passes over a graph, which changes in place.

    Attributes:
        view: the graph as patterns read it.
        replaced: nodes that are no longer in the graph, each with its replacement.
        served: attentions that were rewritten or, without a softmax, recognized.
    """

    def __init__(
        self,
        gm: fx.GraphModule,
        policy: Policy,
        adjust_request: AdjustRequest,
        steps: Steps,
        *,
        has_gradients: bool = False,
    ) -> None:
        self.view = GraphView(gm, has_gradients=has_gradients)
        self.replaced: dict[fx.Node, fx.Node] = {}
        self.served: list[ReportedSite] = []
        self._gm = gm
        self._policy = policy
        self._adjust_request = adjust_request
        self._steps = steps
        self._result = Rewritten()
        self._attentions: list[ReportedSite] = []
        self._pending: deque[tuple[str, Finding]] = deque()
        self._written = WrittenByRegion(gm.graph)
        self._kinds: dict[fx.Node, SiteKind] = {}
        self._begins_with_batch: frozenset[fx.Node] = frozenset()
        self._regrouped = Regrouped()
        self._entries = SharedEntries()

    def step(self, name: str, site: str = "") -> contextlib.AbstractContextManager[None]:
        """Context manager of one step; ``site`` is the name of the site if the step runs once for each site."""
        return self._steps.step(name, self._gm, site)

    def regroup_products(self) -> None:
        """Brings sums of products with attention weights into the form that patterns read."""
        self._regrouped = regroup_products(self.view, self.replaced)
        if self._regrouped.changes:
            self.view = GraphView(self._gm, has_gradients=self.view.has_gradients)
            self._written = WrittenByRegion(self._gm.graph)

    def with_reasons(self, findings: Sequence[Finding]) -> list[Finding]:
        return self._regrouped.with_reasons(findings)

    def restore_products(self) -> None:
        """Puts back the source's form of such sums where no kernel computes a product."""
        self._regrouped.undo(self._gm.graph, self.replaced)

    def each(self, findings: Sequence[Finding]) -> Iterator[tuple[str, Finding]]:
        """The findings with their names in the report; if a merged site is kept, its slices follow it.

        The name of a site does not depend on the outcome of others, since requests refer to names.
        """
        self._entries = SharedEntries(_before_attentions(findings, self._gm.graph))
        self._pending.extend((f"site{index}", finding) for index, finding in enumerate(findings))
        while self._pending:
            yield self._pending.popleft()

    def read_kinds(self, findings: Sequence[Finding], with_kinds: bool, with_batch: bool) -> None:
        """Reads what attention reuse needs from the graph before it changes."""
        if with_kinds:
            sites = [finding for finding in findings if not isinstance(finding, NearMiss)]
            # Of merged sites, and of the slices that may replace them.
            sites += [part for site in sites if isinstance(site, AttentionSite) for part in site.parts]
            kinds = kinds_of(self._gm, sites)
            self._kinds = {site.result: kind for site, kind in zip(sites, kinds, strict=True)}
        if with_batch:
            self._begins_with_batch = begins_with_batch(self._gm)

    def report_near_miss(self, name: str, miss: NearMiss) -> None:
        self._result.sites.append(row_of_near_miss(name, miss))

    def reassociate(self, name: str, site: LinearAttention) -> None:
        """Multiplies linear attention in the cheaper order."""
        site = site.resolved().with_operands(lambda operand: current_operand(operand, self.replaced))
        row = row_of_linear(name, site)
        reassociate(self._gm, site, row, self.replaced)
        row.blamed = node_in_words(site.result) if row.status == "kept" else ""
        self._result.sites.append(row)
        self._attentions.append(ReportedSite(site, row))
        self.served.append(self._attentions[-1])

    def begin(self, name: str, site: AttentionSite) -> tuple[AttentionSite, SiteReport]:
        """The site with the operands that the graph has now, and its row of the report."""
        site = current_site(site, self.replaced, self._policy)
        row = row_of_attention(name, site)
        self._regrouped.name_source(row, site.result)
        return site, row

    def with_written(self, site: AttentionSite) -> AttentionSite:
        """The site with nodes that its canonical form has and the graph lacked."""
        return with_written(site, self._gm)

    def canonicalized(self, site: AttentionSite, row: SiteReport) -> CanonicalAttention | None:
        """The site in canonical form; None if it has none, and then the row says why."""
        policy = policy_at(self._policy, site.anchor)
        try:
            with searching() as ended:
                attention = canonicalized(site, policy, self._entries)
        except NotAttention as reason:
            row.reason = ended.added_to(str(reason))
            row.blamed = node_in_words(reason.node or site.anchor)
            return None
        describe_canonical(attention, row, ended)
        return attention

    def with_narrow_masks(self, site: CanonicalAttention) -> CanonicalAttention:
        """The site with masks of size one along axes on which no entry depends."""
        return with_narrow_masks(site, self.view, self._written.of(site.result))

    def choose(self, site: CanonicalAttention, row: SiteReport) -> Kernel | None:
        """The kernel that serves the site; None if no kernel does, and then the row says why.

        Raises:
            KernelError: with ``strict``, no requested kernel serves it.
        """
        self._result.offered = True
        if not self._slices_have_same_request(site):
            row.reason = "different kernels or options are requested for its slices (request the same for all of them)"
            return None
        policy = policy_at(self._policy, site.anchor)
        request = self._adjust_request(row.name, site, request_for(policy, row.location, site.anchor))
        try:
            kernel = choose(self._gm, site, request, row, policy)
            if kernel is None:
                row.blamed = node_in_words(site.scores.inexpressible_at or site.anchor)
            return kernel
        except KernelError as refusal:
            if not site.parts:
                raise
            row.reason = str(refusal)
            return None

    def _slices_have_same_request(self, site: AttentionSite) -> bool:
        """Whether the same kernels and options are requested for all slices of a merged site."""
        requests = []
        for part in site.parts:
            policy = policy_at(self._policy, part.anchor)
            requests.append((policy, request_for(policy, source_location(part.anchor), part.anchor)))
        return all(each == requests[0] for each in requests)

    def splice(self, site: CanonicalAttention, row: SiteReport, kernel: Kernel) -> None:
        """Replaces the site with the kernel, preceded by a check if the option ``checks`` is on."""
        row.status, row.kernel = "rewritten", kernel.name
        created = splice(self._gm, site, kernel, self.replaced, self._written)
        if policy_at(self._policy, site.anchor).checks:
            check = insert_check(self._gm, site, created, row.location)
            created = created if check is None else (check, *created)
        # A mask whose structure was proved may be unused now.
        remove_unused(self._gm.graph, site.written)
        row.nodes_after = tuple(node.name for node in (*site.written, *created) if not is_erased(node))
        self._result.sites.append(row)
        self._attentions.append(ReportedSite(site, row))
        self.served.append(self._attentions[-1])

    def keep(self, site: AttentionSite, row: SiteReport, written: Sequence[fx.Node]) -> None:
        """Keeps the site and removes the operands written for a kernel; the slices of a merged site are tried next."""
        remove_unused(self._gm.graph, written)
        if not site.parts:
            self._result.sites.append(row)
            self._attentions.append(ReportedSite(site, row))
            return
        unmerged = Reason(f"no kernel takes the merged attention: {row.reason}")
        slices = [(f"{row.name}_{number}", replace(part, unmerged=unmerged)) for number, part in enumerate(site.parts)]
        self._pending.extendleft(reversed(slices))

    def keep_region(self, region: Region, reason: Reason) -> None:
        """Adds the sites of a region that stays as it is."""
        for index, finding in enumerate(find(GraphView(region.gm))):
            kept = NearMiss(finding.pattern, finding.anchor, str(reason))
            self._result.sites.append(row_of_near_miss(f"{region.name}.site{index}", kept))

    def add_region(self, region: Region, found: Rewritten) -> None:
        """Adds the sites of a region, and puts it into the graph if it was rewritten."""
        self._result.sites += [named_within(region.name, row) for row in found.sites]
        self._result.offered |= found.offered
        self._result.regions_changed |= found.changed
        region.put_back(self._gm, renamed=found.changed)

    def finish(self, projections_changed: bool, regions_inlined: bool) -> Rewritten:
        """The result of the run. A changed graph is checked and recompiled to Python."""
        result = self._result
        result.projections_changed = projections_changed
        result.regions_inlined = regions_inlined
        if result.changed and self.view.trains and self._policy.inner_backend == "inductor":
            self.replaced.update(keep_copies(self._gm))
        for site, row in self._attentions:
            node = latest(site.result, self.replaced)
            if not is_erased(node):
                result.results.append((row, self._kinds.get(site.result), node))
                if site.result in self._begins_with_batch:
                    self._begins_with_batch |= {node}
        result.begins_with_batch = self._begins_with_batch
        if result.changed:
            self._gm.graph.lint()
            self._gm.recompile()
        return result
