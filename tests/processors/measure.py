"""What becomes of one use of a processor, as plain data."""

from __future__ import annotations

import re
import time
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import nn
from torch._dynamo.utils import counters

from attnrewrite.backend import collect_reports
from attnrewrite.report.rows import GraphReport, SiteReport
from tests.coverage.measure import (
    VALUE_LIMIT,
    compare_gradients,
    counts,
    fused_by_inductor,
    parameter_gradients,
    randomize,
    relative_error,
)
from tests.processors.case import Model, Processor, Use
from tests.processors.state import state
from tests.support.helpers import outputs, rewritten

__all__ = ["built", "measure", "measure_model", "measure_use"]

Row = dict[str, Any]


def measure(processor: Processor, *, gradients: bool = True) -> Row:
    return {
        "name": processor.name,
        "structure": processor.structure,
        "state": asdict(state(processor.name, **processor.arguments)),
        "needs": processor.needs,
        "instead": processor.instead,
        "proved": processor.proved,
        "uses": [measure_use(use, gradients=gradients) for use in processor.uses],
        "failures": {},
    }


def measure_use(use: Use, *, gradients: bool = True) -> Row:
    """A step that fails is named under ``failures``; ``cannot_run`` is what the source itself raises."""
    row: Row = {"name": use.name, "sites": use.sites, "failures": {}}
    start = time.perf_counter()
    try:
        model = built(use)
        with torch.no_grad():
            model(**use.inputs(use.seeds[0]))
    except Exception as error:  # noqa: BLE001 - What is missing here raises whatever it likes.
        row["cannot_run"] = _said(error)
        return row
    steps: list[tuple[str, Callable[[Use, nn.Module, Row], None]]] = [("rewrite", _values)]
    if gradients:
        steps.append(("gradients", _gradients))
    for name, step in steps:
        torch._dynamo.reset()
        try:
            with torch._dynamo.config.patch(dict(use.dynamo)):
                step(use, model, row)
        except Exception as error:  # noqa: BLE001 - Any failure is a result.
            row["failures"][name] = _said(error)[:2000]
            row["aot_eager_fails_too"] = _fails_without_rewriting(use, model)
    row["seconds"] = round(time.perf_counter() - start, 1)
    return row


def measure_model(model: Model, *, gradients: bool = True) -> Row:
    """The row of a whole model, and what becomes of it without attnrewrite."""
    row = {**measure_use(model, gradients=gradients), "form": model.form}
    before: list[tuple[str, Callable[[nn.Module, dict[str, Any]], float]]] = [
        ("error_before", _error_of_aot_eager),
        ("inductor", fused_by_inductor),
    ]
    for name, step in before:
        torch._dynamo.reset()
        try:
            with torch._dynamo.config.patch(dict(model.dynamo)):
                row[name] = step(built(model), model.inputs(model.seeds[0]))
        except Exception as error:  # noqa: BLE001 - Any failure is a result.
            row["failures"][name] = _said(error)[:2000]
    return row


def _error_of_aot_eager(model: nn.Module, inputs: dict[str, Any]) -> float:
    with torch.no_grad():
        compiled = torch.compile(model, backend="aot_eager")
        return relative_error(outputs(compiled(**inputs)), outputs(model(**inputs)))


def _fails_without_rewriting(use: Use, model: nn.Module) -> bool:
    torch._dynamo.reset()
    try:
        torch.compile(model, backend="aot_eager")(**use.inputs(use.seeds[0]))
    except Exception:  # noqa: BLE001 - It is asked only whether.
        return True
    return False


def built(use: Use) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = use.build().eval()
    randomize(model)
    return model


def _values(use: Use, model: nn.Module, row: Row) -> None:
    """Every seed through the same compiled code."""
    errors = []
    with torch.no_grad():
        before = Counter(counters["graph_break"])
        compiled = rewritten(model, "aot_eager")
        with collect_reports() as graphs:
            for seed in use.seeds:
                expected = outputs(model(**use.inputs(seed)))
                errors.append(relative_error(outputs(compiled(**use.inputs(seed))), expected))
        row["error"] = max(errors)
        row.update(_found(graphs))
        row["graphs"] = len(graphs)
        row["graph_breaks"] = [" ".join(text.split())[:200] for text in Counter(counters["graph_break"]) - before]
        row["left"] = _left(use.allowed, graphs)
        if row["error"] > VALUE_LIMIT:
            torch._dynamo.reset()
            row["error_of_aot_eager"] = _error_of_aot_eager(model, use.inputs(use.seeds[0]))


def _found(graphs: list[GraphReport]) -> Row:
    sites = [(graph, site) for graph in graphs for site in graph.sites]
    result = counts(graphs)
    kept = [_excerpt(graph, site) for graph, site in sites if site.status == "kept"]
    for site, excerpt in zip(result["kept"], kept, strict=True):
        site["graph"] = excerpt
    kernels = Counter(str(site.kernel) for _, site in sites if site.status == "rewritten")
    recognized = sum(site.status == "recognized" for _, site in sites)
    return {**result, "found": len(sites), "recognized": recognized, "kernels": dict(kernels)}


def _excerpt(graph: GraphReport, site: SiteReport) -> list[str]:
    """The lines of the captured graph that belong to the site."""
    names = set(site.nodes_before)
    lines = (line.strip().partition(";  ")[0] for line in graph.before_code.splitlines())
    return [line for line in lines if line.partition(" = ")[0] in names]


def _operators(graphs: list[GraphReport]) -> Counter[str]:
    """How often each ATen operator is called once all is rewritten."""
    return Counter(name for graph in graphs for name in re.findall(r"torch\.ops\.aten\.(\w+)\.", graph.after_code))


def _left(allowed: Mapping[str, int], graphs: list[GraphReport]) -> dict[str, list[int]]:
    """Of the operators that the best form has fewer of: how many there are, and how many there should be."""
    calls = _operators(graphs)
    return {name: [calls[name], most] for name, most in allowed.items() if calls[name] > most}


def _gradients(use: Use, model: nn.Module, row: Row) -> None:
    inputs = use.inputs(use.seeds[0])
    expected = parameter_gradients(model, model, inputs)
    if not any(bool(gradient.any()) for gradient in expected.values()):
        return
    row["with_gradients"] = _found(compare_gradients(model, inputs, expected, row))


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
