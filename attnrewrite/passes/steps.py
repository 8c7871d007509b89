"""Runs the steps of a graph's compilation, each with its time, log line, check of the graph, and dump.

with steps.step("merge_slices", gm):
    findings = merge_slices(findings, view)
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator

from torch import fx

from attnrewrite.options.environment import raises_defects
from attnrewrite.report.dump import GraphDump

__all__ = ["Steps"]

log = logging.getLogger("attnrewrite")


class Steps:
    """The steps of one graph's compilation.

    Attributes:
        seconds: the time of each step by name, in the order of their first run; a step that runs once for each site has
            the sum over the sites.
    """

    def __init__(self, graph: str = "a graph", dump: GraphDump | None = None) -> None:
        """
        Args:
            graph: the graph's name in the log.
            dump: the dump that the graph is written to after each step that changed it; None for no dump.
        """
        self.seconds: dict[str, float] = {}
        self._graph = graph
        self._dump = dump
        self._checks_graph = raises_defects()

    def within(self) -> Steps:
        """Steps of a graph within this one: their time is part of the step that runs them."""
        return Steps(self._graph)

    @contextlib.contextmanager
    def step(self, name: str, gm: fx.GraphModule | None = None, site: str = "") -> Iterator[None]:
        """Runs one step.

        Args:
            gm: the graph that the step may change; None if it changes none.
            site: the name of the site, if the step runs once for each site.
        """
        start = time.perf_counter()
        try:
            yield
        finally:
            seconds = time.perf_counter() - start
            self.seconds[name] = self.seconds.get(name, 0.0) + seconds
        label = f"{name} {site}" if site else name
        log.debug("%s: %s took %.1f ms", self._graph, label, 1e3 * seconds)
        if gm is not None:
            self._after(label, gm)

    def _after(self, label: str, gm: fx.GraphModule) -> None:
        if self._checks_graph:
            gm.graph.lint()
        if self._dump is not None:
            self._dump.add(label, gm)
