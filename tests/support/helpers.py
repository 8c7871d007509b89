"""Running a function as it is and rewritten, and comparing what comes out."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx
from torch.utils._pytree import tree_leaves, tree_map_only

from attnrewrite.backend import collect_reports
from attnrewrite.patterns import Specimen
from attnrewrite.patterns.registry import catalogue
from attnrewrite.report.rows import SiteReport

__all__ = [
    "cast",
    "compile_count",
    "counted",
    "gradients",
    "outputs",
    "relative_error",
    "rewritten",
    "rewritten_and_rows",
    "rows",
    "specimens_for_kernels",
]


def specimens_for_kernels() -> tuple[Specimen, ...]:
    """Those whose attentions are handed to a kernel."""
    return tuple(specimen for pattern in catalogue() if pattern.name != "linear" for specimen in pattern.specimens)


def rewritten(
    function: Callable[..., Any],
    inner: Any = "eager",
    dynamic: bool | None = None,
    fullgraph: bool = False,
    **options: Any,
) -> Any:
    """``function``, compiled by attnrewrite."""
    settings = {"inner_backend": inner, **options}
    return torch.compile(function, backend="attnrewrite", dynamic=dynamic, fullgraph=fullgraph, options=settings)


def rewritten_and_rows(
    function: Callable[..., Any], *inputs: Any, **settings: Any
) -> tuple[Callable[..., Any], Any, list[SiteReport]]:
    """The compiled function, its first result, and the rows of the report; every graph is captured."""
    compiled = rewritten(function, **settings)
    with collect_reports() as graphs:
        result = compiled(*inputs)
    assert [graph.reason for graph in graphs if not graph.captured] == []
    return compiled, result, [site for graph in graphs for site in graph.sites]


def rows(function: Callable[..., Any], *inputs: Any, **settings: Any) -> list[SiteReport]:
    """The rows of the report, every graph captured."""
    return rewritten_and_rows(function, *inputs, **settings)[2]


def recording() -> tuple[Callable[..., Any], list[fx.GraphModule]]:
    """An inner compiler that runs graphs as they are, and the graphs that it is given."""
    given: list[fx.GraphModule] = []

    def inner(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        given.append(gm)
        return gm.forward

    return inner, given


def cast(inputs: Any, dtype: torch.dtype, device: str = "cpu") -> Any:
    """The inputs with floating tensors in another dtype."""
    return tree_map_only(
        torch.Tensor, lambda value: value.to(device, dtype if value.is_floating_point() else value.dtype), inputs
    )


def outputs(result: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]


def relative_error(actual: Any, expected: Any) -> float:
    """The largest difference, relative to the largest expected number of each tensor; infinite where NaNs differ."""
    worst = 0.0
    for a, e in zip(outputs(actual), outputs(expected), strict=True):
        assert a.shape == e.shape
        a, e = a.detach().cpu().double(), e.detach().cpu().double()
        if not torch.equal(a.isnan(), e.isnan()):
            return math.inf
        a, e = a.nan_to_num(), e.nan_to_num()
        worst = max(worst, ((a - e).abs().max() / e.abs().max().clamp_min(1e-30)).item())
    return worst


def gradients(function: Callable[..., Any], inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The gradient of every floating input, for outputs that are weighted by fixed random numbers."""
    inputs = [value.clone().requires_grad_(value.is_floating_point()) for value in inputs]
    results = outputs(function(*inputs))
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(result.shape, generator=generator).to(result) for result in results]
    total = torch.stack([(result * weight).sum() for result, weight in zip(results, weights, strict=True)]).sum()
    return list(torch.autograd.grad(total, [value for value in inputs if value.requires_grad]))


def no_more_graphs(
    needed: int, function: Callable[..., Any], calls: Sequence[Sequence[Any]], backend: Any = "eager"
) -> bool:
    """Whether ``torch.compile`` alone needs as many graphs for the calls; one is the fewest, and is not counted."""
    return needed == 1 or needed <= compile_count(function, calls, backend)


def counted(run: Callable[[], Any]) -> tuple[int, Any]:
    """How many graphs Dynamo makes, and the result."""
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters["stats"]
    before, result = counters["unique_graphs"], run()
    return counters["unique_graphs"] - before, result


def compile_count(function: Callable[..., Any], calls: Sequence[Sequence[Any]], backend: Any, **options: Any) -> int:
    """How many graphs are compiled for the calls, one after another, under ``dynamic=True``."""
    torch._dynamo.reset()
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    compiled = torch.compile(function, backend=backend, dynamic=True, **options)
    for call in calls:
        compiled(*call)
    count: int = torch._dynamo.utils.counters["stats"]["unique_graphs"] - before
    return count
