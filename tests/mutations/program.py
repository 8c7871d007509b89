"""A specimen as a graph that can be changed, and the arguments of its calls."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, fx

from attnrewrite.patterns import Specimen
from attnrewrite.patterns.lookalikes import LOOKALIKES
from attnrewrite.patterns.registry import specimens
from tests.support.helpers import cast

__all__ = ["Program", "copied", "names", "program"]


@dataclass(frozen=True)
class Program:
    """``graph`` computes on each of ``calls`` what the specimen computes; sizes are among the arguments if dynamic."""

    name: str
    graph: fx.GraphModule
    calls: tuple[tuple[Any, ...], ...]


@cache
def _specimens() -> dict[str, Specimen]:
    return {specimen.name: specimen for specimen in (*specimens(), *LOOKALIKES)}


def names() -> tuple[str, ...]:
    return tuple(_specimens())


def copied(graph: fx.GraphModule) -> fx.GraphModule:
    """A copy whose nodes have the same names."""
    copy = fx.Graph()
    copy.output(copy.graph_copy(graph.graph, {}))
    return fx.GraphModule(graph, copy)


@cache
def program(name: str, lengths: tuple[int, ...], dynamic: bool, dtype: torch.dtype) -> Program | None:
    """The specimen ``name`` as a graph; None if it does not run so, or is not one graph of functions."""
    specimen = _specimens()[name]
    if not specimen.dynamic:
        lengths = (12,) * len(lengths)
    try:
        inputs = [cast(specimen.inputs(seed, length), dtype) for seed, length in enumerate(lengths)]
        for each in inputs:
            specimen.function(*each)
    except (RuntimeError, ValueError, IndexError, ZeroDivisionError):
        return None
    graphs = _captured(specimen, inputs, dynamic)
    if len(graphs) != 1:
        return None
    ((graph, calls),) = graphs
    if any(node.op in ("get_attr", "call_module") for node in graph.graph.nodes):
        return None
    # Of PyTorch's own operators some results hold whatever was in memory.
    if any("_scaled_dot_product" in str(node.target) for node in graph.graph.nodes):
        return None
    return Program(name, graph, tuple(calls))


def _captured(
    specimen: Specimen, inputs: Sequence[tuple[Any, ...]], dynamic: bool
) -> list[tuple[fx.GraphModule, list[tuple[Any, ...]]]]:
    """Each graph that Dynamo makes of the calls, with its arguments at each of them."""
    found: list[tuple[fx.GraphModule, list[tuple[Any, ...]]]] = []

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        calls: list[tuple[Any, ...]] = []
        found.append((gm, calls))

        def call(*args: Any) -> Any:
            calls.append(tuple(arg.detach().clone() if isinstance(arg, Tensor) else arg for arg in args))
            return gm(*args)

        return call

    torch._dynamo.reset()
    compiled = torch.compile(specimen.function, backend=backend, dynamic=dynamic)
    with torch.no_grad():
        for each in inputs:
            compiled(*each)
    return found
