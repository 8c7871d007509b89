"""``attnrewrite bench models``: whole models under eager execution, ``torch.compile``, their own path, and attnrewrite.

The model's attention is written out in all of them but its own path, through ``scaled_dot_product_attention``, which
``torch.compile`` compiles. They are timed in turns, in one process, so that a disturbance of the machine meets each.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn

from attnrewrite.backend import collect_reports
from attnrewrite.bench.model_cases import ModelCase, with_own_sdpa
from attnrewrite.bench.pass_times import environment
from attnrewrite.report.rows import GraphReport
from attnrewrite.torch_private import tree_leaves, tree_map_only

__all__ = [
    *("WAYS", "ModelsBenchmark", "plot_models", "print_models_benchmark", "run_models_benchmark"),
    *("placed", "wait_for"),
]

WAYS = ("eager", "torch.compile", "own sdpa", "attnrewrite")
"""How a model is run. Its own sdpa path is compiled by ``torch.compile``."""

_Inputs = tuple[tuple[Any, ...], dict[str, Any]]

_SHORTEST = 0.1
"""Seconds. A time is that of so many calls, one right after the other, that they take as long as this."""


@dataclass(frozen=True)
class ModelsBenchmark:
    """The measurements.

    Attributes:
        models: for each model ``name``, ``sites``, ``rewritten``, ``kernels``, and ``ways``: for each of :data:`WAYS`
            that it has the median ``ms``, all ``times_ms``, ``peak_mib`` above what is allocated before the call (on a
            GPU), ``cold_s`` and ``warm_s`` of the first call, and ``error`` (and ``gradient_error`` in training).
    """

    models: list[dict[str, Any]]
    environment: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return {**self.environment, "models": self.models}

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class Settings:
    """How the models are run.

    Attributes:
        device: where.
        dtype: None for the model's own: half precision on a GPU, float32 on a CPU.
        training: a step is a forward and a backward pass; else a forward pass in inference mode.
        mode: of ``torch.compile``, such as "reduce-overhead".
        warm: measure the first call with filled caches, too.
        repeats: how many times each is measured.
    """

    device: torch.device
    dtype: torch.dtype | None = None
    training: bool = False
    mode: str | None = None
    warm: bool = True
    repeats: int = 10


def run_models_benchmark(
    cases: Sequence[ModelCase], settings: Settings, command: Sequence[str] | None = None
) -> ModelsBenchmark:
    """Measures every model in each way that it has.

    Args:
        cases: such as ``MODELS["base"].values()``.
        settings: how.
        command: the command to record; default ``sys.argv``.

    Raises:
        AttnRewriteError: a model needs a package that is not installed.
    """
    start = time.perf_counter()
    rows = []
    with Progress(console=Console(stderr=True), disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task("attnrewrite bench models", total=len(cases))
        for case in cases:
            rows.append(_measured(case, settings))
            torch.compiler.reset()
            gc.collect()
            progress.advance(task)
    place = settings.device
    about = {
        **environment(command, place),
        "step": "forward and backward" if settings.training else "forward",
        "mode": settings.mode,
        "seconds": round(time.perf_counter() - start, 1),
    }
    return ModelsBenchmark(rows, about)


# One model.


class _Way:
    """One way to run a model: a step, its result, and how long its first call took."""

    def __init__(self, name: str, model: nn.Module, inputs: _Inputs, settings: Settings, caches: Path) -> None:
        self.name, self._model, self._settings = name, model, settings
        self._args, self._kwargs = inputs
        self._caches = caches / name.replace(" ", "_")
        self._call: Callable[..., Any] = model
        self._weights: Tensor | None = None

    def prepare(self) -> float:
        """Compiles the model anew; the seconds that its first call took."""
        backend = "attnrewrite" if self.name == "attnrewrite" else "inductor"
        if self.name != "eager":
            self._call = torch.compile(self._model, backend=backend, mode=self._settings.mode)
        with _caches_in(self._caches):
            start = time.perf_counter()
            self.step()
            wait_for(self._settings.device)
            seconds = time.perf_counter() - start
            self.step()  # With CUDA graphs, which are recorded in the second call.
        wait_for(self._settings.device)
        return seconds

    def step(self) -> Tensor:
        """The model's first output, detached; in CUDA graphs the next step may overwrite it."""
        torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
        if not self._settings.training:
            with torch.inference_mode():
                return _first(self._call(*self._args, **self._kwargs))
        self._model.zero_grad(set_to_none=True)
        output = _first(self._call(*self._args, **self._kwargs))
        self._loss(output).backward()  # type: ignore[no-untyped-call]
        return output.detach()

    def _loss(self, output: Tensor) -> Tensor:
        """The mean of the output, weighted by random numbers: that of its squares is fixed behind a norm."""
        if self._weights is None:
            generator = torch.Generator().manual_seed(1)
            self._weights = torch.randn(output.shape, generator=generator).to(output)
        return (output * self._weights).mean(dtype=torch.promote_types(output.dtype, torch.float32))

    def result(self) -> list[Tensor]:
        """The output, and in training the gradients of the parameters as one vector, on the CPU in float64."""
        output = self.step().double().cpu()
        return [output, _gradients(self._model)] if self._settings.training else [output]

    def milliseconds(self, calls: int) -> float:
        wait_for(self._settings.device)
        start = time.perf_counter()
        for _ in range(calls):
            self.step()
        wait_for(self._settings.device)
        return 1e3 * (time.perf_counter() - start) / calls

    def peak_mib(self) -> float | None:
        """Of a call, above what is allocated before it."""
        if self._settings.device.type != "cuda":
            return None
        self._model.zero_grad(set_to_none=True)
        wait_for(self._settings.device)
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        self.step()
        wait_for(self._settings.device)
        return round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)


def _measured(case: ModelCase, settings: Settings) -> dict[str, Any]:
    torch.manual_seed(0)
    dtype = settings.dtype or (torch.float32 if settings.device.type == "cpu" else case.half)
    naive, *arguments = case.build()
    naive = naive.to(settings.device, dtype).train(settings.training)
    inputs = placed(arguments, settings.device, dtype)
    truth = _truth(naive, inputs, settings)
    fused = with_own_sdpa(copy.deepcopy(naive))
    models = dict.fromkeys(WAYS, naive) | {"own sdpa": fused}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as directory:
        ways = {
            name: _Way(name, model, inputs, settings, Path(directory))
            for name, model in models.items()
            if model is not None
        }
        rows, graphs = _prepared(ways, settings)
        for name, way in ways.items():
            errors = [_error(got, expected) for got, expected in zip(way.result(), truth, strict=True)]
            rows[name] |= dict(zip(("error", "gradient_error"), errors, strict=False))
            rows[name]["peak_mib"] = way.peak_mib()
        _time(ways, rows, settings.repeats)
    sites = [site for graph in graphs for site in graph.sites]
    return {
        "name": case.name,
        "dtype": str(dtype).removeprefix("torch."),
        "sites": len(sites),
        "rewritten": sum(site.status == "rewritten" for site in sites),
        "kernels": sorted({str(site.kernel) for site in sites}),
        "kept": sorted({site.reason for site in sites if site.status != "rewritten"}),
        "ways": rows,
    }


def _prepared(ways: dict[str, _Way], settings: Settings) -> tuple[dict[str, dict[str, Any]], list[GraphReport]]:
    """Every way compiled, with the seconds that it took, and the report of attnrewrite."""
    rows: dict[str, dict[str, Any]] = {name: {} for name in ways}
    with collect_reports() as graphs:
        for name, way in ways.items():
            rows[name]["cold_s"] = round(way.prepare(), 3)
    found = list(graphs)
    if settings.warm:
        torch.compiler.reset()
        for name, way in ways.items():
            rows[name]["warm_s"] = round(way.prepare(), 3)
    return rows, found


def _time(ways: dict[str, _Way], rows: dict[str, dict[str, Any]], repeats: int) -> None:
    calls = {}
    for name, way in ways.items():
        once = min(way.milliseconds(1) for _ in range(3))
        calls[name] = max(1, round(1e3 * _SHORTEST / once))
        rows[name]["times_ms"] = []
    for _ in range(repeats):
        for name, way in ways.items():
            rows[name]["times_ms"].append(round(way.milliseconds(calls[name]), 4))
    for row in rows.values():
        row["ms"] = round(statistics.median(row["times_ms"]), 4)


def _truth(model: nn.Module, inputs: _Inputs, settings: Settings) -> list[Tensor]:
    """The results of eager, two precisions up for half and one for float32."""
    wide = torch.float32 if next(model.parameters()).dtype.itemsize < 4 else torch.float64
    exact = _Way(
        "eager",
        copy.deepcopy(model).to(wide),
        placed(inputs, settings.device, wide),
        settings,
        Path(),
    )
    return exact.result()


def placed(inputs: Sequence[Any], device: torch.device, dtype: torch.dtype) -> _Inputs:
    """Arguments and keyword arguments on the device, those of floating point in the dtype."""
    args, kwargs = tree_map_only(
        Tensor, lambda value: value.to(device, dtype if value.is_floating_point() else None), tuple(inputs)
    )
    return args, kwargs


def _first(output: Any) -> Tensor:
    tensors = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
    return tensors[0]


def _gradients(model: nn.Module) -> Tensor:
    # Eager gives none to a parameter that is not used, a compiled graph may give zeros.
    parts = [torch.zeros_like(each) if each.grad is None else each.grad for each in model.parameters()]
    return torch.cat([part.double().flatten().cpu() for part in parts])


def _error(got: Tensor, expected: Tensor) -> float:
    """Relative, of the whole, in the Euclidean norm."""
    return float((got - expected).norm() / expected.norm())


def wait_for(device: torch.device) -> None:
    """Until all that was started on the device is done."""
    if device.type != "cpu":
        torch.accelerator.synchronize()


@contextlib.contextmanager
def _caches_in(directory: Path) -> Iterator[None]:
    """Inductor's and Triton's caches in a directory, so that no way finds what another has compiled."""
    new = {"TORCHINDUCTOR_CACHE_DIR": str(directory), "TRITON_CACHE_DIR": str(directory / "triton")}
    before = {name: os.environ.get(name) for name in new}
    os.environ.update(new)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


# The report.


def print_models_benchmark(result: ModelsBenchmark, console: Console | None = None) -> None:
    """Prints the median milliseconds of a step, the fastest in bold, with the peak memory behind it."""
    table = Table(title=f"Milliseconds a step ({result.environment.get('step', '')})", box=box.SIMPLE_HEAD)
    table.title_justify = "left"
    table.add_column("model", overflow="fold")
    for name in ("dtype", "rewritten", *WAYS, "cold s", "warm s", "error"):
        table.add_column(name, justify="right")
    for model in result.models:
        ways = model["ways"]
        fastest = min(way["ms"] for way in ways.values())
        cells = []
        for name in WAYS:
            way = ways.get(name)
            text = "" if way is None else f"{way['ms']:.2f}" + (f" ({way['peak_mib']:.0f})" if way["peak_mib"] else "")
            cells.append(f"[bold]{text}[/bold]" if way is not None and way["ms"] == fastest else text)
        own = ways["attnrewrite"]
        cells += [
            _beside(own, ways["torch.compile"], "cold_s", "{:.1f}"),
            _beside(own, ways["torch.compile"], "warm_s", "{:.1f}"),
            _beside(own, ways["eager"], "gradient_error" if "gradient_error" in own else "error", "{:.0e}"),
        ]
        table.add_row(model["name"], model["dtype"], f"{model['rewritten']} of {model['sites']}", *cells)
    console = console or (Console() if sys.stdout.isatty() else Console(width=180))
    console.print(table)
    console.print("behind the times: the peak memory of a step in MiB, above what is allocated before it")
    console.print("cold, warm: the first call without and with filled caches, attnrewrite / torch.compile")
    console.print("error: from eager in more precision, attnrewrite / eager; of the gradients in training")
    for model in result.models:
        for reason in model["kept"]:
            console.print(f"{model['name']}: kept: {reason}", markup=False)


def _beside(own: dict[str, Any], other: dict[str, Any], name: str, form: str) -> str:
    return " / ".join(form.format(row[name]) if name in row else "-" for row in (own, other))


def plot_models(result: ModelsBenchmark, path: Path) -> None:
    """Plots each model's times relative to ``torch.compile``'s into a file (.png, .svg, .pdf) with matplotlib.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    from matplotlib import pyplot

    shown = WAYS[1:]
    height = 0.8 / len(shown)
    figure, axes = pyplot.subplots(figsize=(8, 1.2 + 0.6 * len(result.models)), layout="constrained")
    for place, name in enumerate(shown):
        rows = [(row, model["ways"]) for row, model in enumerate(result.models) if name in model["ways"]]
        bars = axes.barh(
            [row + (place - 1) * height for row, _ in rows],
            [ways[name]["ms"] / ways["torch.compile"]["ms"] for _, ways in rows],
            height=height,
            label=name,
        )
        axes.bar_label(bars, [f"{ways[name]['ms']:.1f} ms" for _, ways in rows], fontsize=6, padding=2)
    axes.set_yticks(range(len(result.models)), [model["name"] for model in result.models], fontsize=7)
    axes.invert_yaxis()
    step = result.environment.get("step", "")
    axes.set_xlabel(f"time of a step ({step}) over that under torch.compile, {result.environment.get('device', '')}")
    axes.grid(axis="x", alpha=0.3)
    axes.margins(x=0.12)
    figure.legend(loc="outside upper right", ncols=len(shown), fontsize=7)
    figure.savefig(path)
    pyplot.close(figure)
