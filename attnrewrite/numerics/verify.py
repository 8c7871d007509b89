"""``ATTNREWRITE_VERIFY=1``: the first call of a compiled graph compares each rewritten site with the source.

The source graph, as captured, runs on the call's own inputs. When it has computed the result of a site, the nodes that
replaced the site run on the same values, and the two results are compared. The run continues with the source's value,
so an error is attributed to the site that makes it and not to later ones. Other differences between the two graphs run
as well and are compared at the graph's outputs. Calls that are the same in both graphs run once.

A half-precision result that is not the source's is held to the source's formula in float64, and is right if it lies no
further from that than the source's own does.

Where a backward pass may follow, the gradients of each site's inputs are compared as well, for one random gradient of
its result.

Inputs are not written to, and random numbers come from a copy of the generators' state.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from attnrewrite.numerics.outcome import Verification
from attnrewrite.numerics.replay import Replay, ReplayPlan, SourceError, read_outside, without_traces
from attnrewrite.numerics.site_gradients import carrying_gradients
from attnrewrite.report.rows import GraphReport, SiteReport
from attnrewrite.torch_private import FakeTensor

__all__ = ["Original", "verified"]

log = logging.getLogger("attnrewrite")

aten = torch.ops.aten

CompiledFn = Callable[..., Any]


class Original:
    """A copy of a graph, to compare other graphs with that were made from the same captured graph."""

    def __init__(self, gm: fx.GraphModule, rows: Sequence[SiteReport] = ()) -> None:
        """Args:
        gm: the captured graph before it is rewritten in place, or a rewritten graph.
        rows: the sites of a rewritten graph.
        """
        copies: dict[fx.Node, fx.Node] = {}
        graph = fx.Graph()
        graph.output(graph.graph_copy(gm.graph, copies))
        self.gm = fx.GraphModule(gm, graph)
        self._by_name = {node.name: copy for node, copy in copies.items()}
        self._place = {node: place for place, node in enumerate(graph.nodes)}
        self._created = {name for row in rows for name in row.nodes_after}
        # Looked up now, since the nodes of the original graph may change.
        self._replacements = {row.name: self._replacement(row) for row in rows if row.status == "rewritten"}

    def compare(self, other: fx.GraphModule, sites: Sequence[SiteReport], inputs: Sequence[Any]) -> Verification:
        """Compares a graph whose sites were rewritten with this one.

        Args:
            other: the rewritten graph, made from the same captured graph.
            sites: the rows of ``other``; rewritten ones are compared.
            inputs: the inputs of the compiled graph.
        """
        created = {name for row in sites for name in row.nodes_after} | self._created
        common = {name: node for name, node in self._by_name.items() if name not in created}
        twins = {node: common[node.name] for node in other.graph.nodes if node.name in common}
        results = {row.name: self._result(row) for row in sites}
        verification = Verification()
        plan = ReplayPlan(self.gm, other, twins, results, sites, carrying_gradients(self.gm, inputs))
        with without_traces(_devices(self.gm, other)) as autocast:
            run = Replay(plan, autocast, verification)
            try:
                run(inputs)
            except SourceError as error:
                verification.source_error = str(error)
        return verification

    def _result(self, row: SiteReport) -> fx.Node | None:
        """The node of this graph that holds the result of the site."""
        if row.name in self._replacements:
            return self._replacements[row.name]
        nodes = [self._by_name[name] for name in row.nodes_before if name in self._by_name]
        return max(nodes, key=self._place.__getitem__, default=None)

    def _replacement(self, row: SiteReport) -> fx.Node | None:
        return read_outside([self._by_name[name] for name in row.nodes_after if name in self._by_name])


def _devices(*gms: fx.GraphModule) -> set[torch.device]:
    values = [node.meta.get("val") for gm in gms for node in gm.graph.nodes]
    return {value.device for value in values if isinstance(value, torch.Tensor)}


def verified(
    original: Original, gm: fx.GraphModule, report: GraphReport, unchanged: CompiledFn, rewritten: CompiledFn
) -> CompiledFn:
    """A callable whose first call compares the two graphs and chooses the compiled one for all calls.

    Args:
        original: the captured graph, copied before rewriting.
        gm: the graph that was rewritten.
        report: the report of the graph: its rows are compared, and the outcome is written into it.
        unchanged, rewritten: Dynamo's graph and the rewritten graph, both compiled.
    """
    lock = threading.Lock()
    pending: Original | None = original
    chosen = rewritten

    def call(*inputs: Any) -> Any:
        nonlocal pending, chosen
        if pending is not None and not any(isinstance(value, FakeTensor) for value in inputs):
            with lock:
                if pending is not None:
                    result = pending.compare(gm, report.sites, inputs)
                    _publish(result, report)
                    chosen = unchanged if result.failed else rewritten
                    pending = None
        return chosen(*inputs)

    return call


def _publish(result: Verification, report: GraphReport) -> None:
    """Writes the outcome to the log and the report."""
    if result.source_error:
        note = f"not verified, and compiled as rewritten: the source graph did not run: {result.source_error}"
        log.warning("%s: %s", report.name, note)
        report.notes.append(note)
        return
    if not result.failed:
        log.info("%s: %s", report.name, result)
        report.notes.append(str(result))
        return
    for check in result.failed:
        log.warning("%s: %s; the source graph is kept", report.name, check)
        report.notes.append(f"verification failed, so the source graph is kept: {check}")
    failed = {id(check.site): check for check in result.failed}
    for row in report.rewritten:
        row.status = "kept"
        row.reason = "verification failed elsewhere in the graph"
        if id(row) in failed:
            row.reason = f"verification: {failed[id(row)]}"
