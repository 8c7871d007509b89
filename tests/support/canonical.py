"""A function read by attnrewrite's own capture, and run as its source says, as its sites mean, or by a kernel.

The graph is captured once; each way of running it takes milliseconds.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from attnrewrite.capture.known_buffers import KnownBuffers
from attnrewrite.capture.legalize import legalized
from attnrewrite.capture.trace import capture
from attnrewrite.errors import KernelError
from attnrewrite.ir.graph_view import GraphView
from attnrewrite.ir.site import AttentionSite, CanonicalAttention, NotAttention
from attnrewrite.numerics.interpreter import interpreted
from attnrewrite.options.compile_options import Policy
from attnrewrite.passes.canonicalize import canonicalized
from attnrewrite.passes.find import find
from attnrewrite.passes.finite_rows import with_factors_of_finite_rows
from attnrewrite.passes.merge_slices import merge_slices
from attnrewrite.passes.pipeline import rewrite
from attnrewrite.passes.regroup_products import regroup_products
from attnrewrite.passes.unrepeat_kv import unrepeat_kv

__all__ = ["Canonical"]

Values = Mapping[fx.Node, Any]


class Canonical:
    """``function``, captured when it is called first (and again where its guards fail).

    Attributes:
        sites: of the last call by :meth:`meaning`: each site that was interpreted, and what the nodes computed.
        kernels: of the last call by :meth:`served`: the kernels that served, in order.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        torch._dynamo.reset()
        self.sites: list[tuple[CanonicalAttention, Values]] = []
        self.kernels: list[str] = []
        self._how: Callable[[_Graph, Sequence[Any]], Any] = _Graph.source
        self._compiled = torch.compile(function, backend=self._backend)

    def source(self, *inputs: Any) -> Any:
        """What the captured graph gives."""
        return self._run(_Graph.source, inputs)

    def meaning(self, *inputs: Any) -> Any:
        """What it gives with the interpreter's result in the place of each attention's."""
        self.sites.clear()
        return self._run(lambda graph, args: graph.meaning(args, self.sites), inputs)

    def served(self, kernel: str, *inputs: Any) -> Any:
        """What it gives with the attentions that the kernel is willing to serve rewritten.

        Raises:
            KernelError: there is an attention that the kernel does not serve.
        """
        self.kernels.clear()
        return self._run(lambda graph, args: graph.served(kernel, args, self.kernels), inputs)

    def _run(self, how: Callable[[_Graph, Sequence[Any]], Any], inputs: Sequence[Any]) -> Any:
        self._how = how
        return self._compiled(*inputs)

    def _backend(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        graph = _Graph(gm, example_inputs)
        return lambda *args: self._how(graph, args)


class _Graph:
    def __init__(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> None:
        self._buffers = KnownBuffers(gm, example_inputs)
        self._ir = capture(legalized(gm), example_inputs).gm
        self._served: dict[str, tuple[fx.GraphModule, list[str]] | KernelError] = {}
        self._read: tuple[fx.GraphModule, list[AttentionSite]] | None = None

    def _copy(self) -> fx.GraphModule:
        gm = fx.GraphModule(self._ir, copy.deepcopy(self._ir.graph))
        self._buffers.attach(gm)
        return gm

    def source(self, args: Sequence[Any]) -> Any:
        return fx.Interpreter(self._ir).run(*args)

    def meaning(self, args: Sequence[Any], found: list[tuple[CanonicalAttention, Values]]) -> Any:
        if self._read is None:
            gm = self._copy()
            trains = torch.is_grad_enabled()
            regroup_products(GraphView(gm, has_gradients=trains), {})
            view = GraphView(gm, has_gradients=trains)
            findings = unrepeat_kv(merge_slices(find(view), view), view)
            sites = [finding for finding in findings if isinstance(finding, AttentionSite)]
            self._read = gm, [with_factors_of_finite_rows(site, gm) for site in sites]
        gm, sites = self._read
        run = _Meant(gm, sites)
        result = run.run(*args)
        found += [(site, run.env) for site in run.meant]
        return result

    def served(self, kernel: str, args: Sequence[Any], kernels: list[str]) -> Any:
        if kernel not in self._served:
            gm = self._copy()
            policy = Policy(kernels=(kernel,), strict=True)
            try:
                rows = rewrite(gm, policy, has_gradients=torch.is_grad_enabled()).sites
                self._served[kernel] = gm, [str(row.kernel) for row in rows if row.status == "rewritten"]
            except KernelError as error:
                self._served[kernel] = error
        served = self._served[kernel]
        if isinstance(served, KernelError):
            raise served
        gm, names = served
        kernels += names
        return fx.Interpreter(gm).run(*args)


class _Meant(fx.Interpreter):
    """Runs the graph with what its attentions mean in the place of their results; ``meant`` are those."""

    def __init__(self, gm: fx.GraphModule, sites: Sequence[AttentionSite]) -> None:
        super().__init__(gm, garbage_collect_values=False)
        self._of_result = {site.result: site for site in sites}
        self.meant: list[CanonicalAttention] = []

    def run_node(self, n: fx.Node) -> Any:
        own = super().run_node(n)
        site = self._of_result.get(n)
        if site is None or site.dropout:
            return own
        try:
            canonical = canonicalized(site, Policy())
            meant = interpreted(canonical, self.env.__getitem__)
        except NotAttention:
            return own
        self.meant.append(canonical)
        return meant.to(own.dtype)
