"""``attnrewrite bench sites``: times every willing kernel on a grid of attentions, and checks the automatic choice.

Each attention is written naively, captured like any model, rewritten with each kernel, and compiled by Inductor. The
kernels of one attention are timed in turns, in one process. With workers, several processes compile in parallel and
then measure one after another.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import multiprocessing
import statistics
import sys
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
from torch import Tensor, fx

from attnrewrite.bench.cases import Case, reference
from attnrewrite.bench.pass_times import environment
from attnrewrite.capture.trace import capture
from attnrewrite.ir.site import CanonicalAttention
from attnrewrite.kernels import Kernel, kernel_named, registered_kernels
from attnrewrite.options.compile_options import Policy
from attnrewrite.passes.pipeline import read_sites
from attnrewrite.report.rows import KernelVerdict, SiteReport
from attnrewrite.selection.choose import choose, willing_kernels
from attnrewrite.selection.cost_table import Workload, device_family
from attnrewrite.selection.timing import Standalone, compiled_alone, cut_out, smallest_run, time_together

__all__ = ["SitesBenchmark", "plot_sites", "print_sites_benchmark", "run_sites_benchmark"]

_MATH_BYTES = 2**33
"""Above this, attention that keeps its scores is not measured."""


@dataclass(frozen=True)
class SitesBenchmark:
    """The measurements.

    Attributes:
        sites: for each case, ``name``, ``workload``, ``kernels`` (each kernel's times in milliseconds, or why it has
            none), and ``auto`` (the automatic choice).
    """

    sites: list[dict[str, Any]]
    environment: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return {**self.environment, "sites": self.sites}

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8")

    def save_table(self, path: Path) -> None:
        """Writes the part that :class:`attnrewrite.selection.cost_table.CostTable` reads."""
        kept = ("device", "torch", "command", "commit")
        times = ("call_ms", "graph_ms")
        sites = [
            {
                "workload": site["workload"],
                "kernels": {
                    kernel: {name: found[name] for name in times if found.get(name) is not None}
                    for kernel, found in site["kernels"].items()
                    if "call_ms" in found
                },
            }
            for site in self.sites
        ]
        lines = ",\n".join(json.dumps(site) for site in sites)
        head = json.dumps({name: self.environment[name] for name in kept if name in self.environment}, indent=1)
        path.write_text(f'{head[:-2]},\n "sites": [\n{lines}\n]}}\n', encoding="utf-8")


def run_sites_benchmark(
    cases: Sequence[Case],
    kernels: Sequence[str] = (),
    device: str = "",
    seconds: float = 0.5,
    workers: int = 1,
    command: Sequence[str] | None = None,
) -> SitesBenchmark:
    """Measures every willing kernel on every case.

    Args:
        cases: such as ``GRIDS["main"]``.
        kernels: the kernels to measure; default: every exact kernel that is available. Kernels of lower precision, or
            that are fetched over the network, are measured only if they are named.
        device: default: the accelerator if there is one, else "cpu".
        seconds: about how long to time the calls of one case; default 0.5.
        workers: the number of processes that compile in parallel; default 1: this one.
        command: the command to record; default ``sys.argv``.
    """
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    start = time.perf_counter()
    with Progress(console=Console(stderr=True), disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task("attnrewrite bench sites", total=2 * len(cases))

        def step() -> None:
            progress.advance(task)

        if workers == 1:
            rows = _measure_all(cases, kernels, place, seconds, step)
        else:
            rows = _measure_in_processes(cases, kernels, place, seconds, workers, step)
    name = torch.cuda.get_device_name(place) if place.type == "cuda" else None
    about = {
        **environment(command),
        **({"device": name} if name else {}),
        "family": device_family(place),
        "seconds": round(time.perf_counter() - start, 1),
        "packages": {kernel.name: kernel.availability().detail for kernel in registered_kernels()},
    }
    about |= {"asked": list(kernels)} if kernels else {}
    failed = {row["name"]: row["failed"] for row in rows if "failed" in row}
    return SitesBenchmark([row for row in rows if "failed" not in row], {**about, "failed": failed})


# One process.


def _measure_all(
    cases: Sequence[Case], kernels: Sequence[str], device: torch.device, seconds: float, step: Callable[[], None]
) -> list[dict[str, Any]]:
    prepared = []
    for case in cases:
        prepared.append(_prepare(case, kernels, device))
        step()
    measured = []
    for one in prepared:
        measured.append(one.measure(seconds))
        step()
    return measured


@dataclass
class _Prepared:
    """A case with its kernels compiled.

    Attributes:
        calls: for each kernel, the standalone graph and its compiled call.
        kernels: for each kernel without times, why it refuses or how it failed.
        smallest: a minimal compiled graph.
        auto: the automatic choice, for calls and within CUDA graphs.
    """

    case: Case
    device: torch.device
    workload: Workload
    gm: fx.GraphModule
    calls: dict[str, tuple[Standalone, Callable[..., Tensor]]]
    kernels: dict[str, dict[str, Any]]
    smallest: Callable[[], Any]
    auto: dict[str, str]

    def measure(self, seconds: float) -> dict[str, Any]:
        inputs = self.case.inputs(self.device)
        exact = reference(self.case, inputs)
        runs: dict[str, Callable[[], Any]] = {}
        for name, (alone, call) in self.calls.items():
            run = _run_of(self.case, call, _values(self.gm, alone, inputs), inputs)
            try:
                self.kernels[name] = {"error": _errors(run(), exact)}
            except torch.OutOfMemoryError as error:
                self.kernels[name] = {"failed": _in_words(error)}
            else:
                runs[name] = run
            _free(self.device)
        del exact
        for name, times in time_together(runs, self.device, self.smallest, seconds).items():
            self.kernels[name] |= {
                "call_ms": times.call_ms,
                "call_spread_ms": _spread(times.call),
                "graph_ms": times.graph_ms,
                "graph_spread_ms": _spread(times.graph),
                "memory_bytes": times.memory,
                "calls": len(times.call),
            }
        runs.clear()
        gc.collect()
        _free(self.device)
        workload = dataclasses.asdict(self.workload)
        return {"name": str(self.case), "workload": workload, "kernels": self.kernels, "auto": self._auto()}

    def _auto(self) -> dict[str, Any]:
        """The automatic choice, and the ratio of its time to that of the fastest exact kernel."""
        found: dict[str, Any] = {}
        for what, name in self.auto.items():
            times = {
                kernel: row[f"{what}_ms"]
                for kernel, row in self.kernels.items()
                if row.get(f"{what}_ms") is not None and not kernel_named(kernel).lower_precision
            }
            best = min(times, key=times.__getitem__, default=None)
            found[what] = {"kernel": name, "best": best}
            if best is not None and name in times:
                found[what]["over_best"] = times[name] / times[best]
        return found


def _prepare(case: Case, names: Sequence[str], device: torch.device) -> _Prepared:
    # Every row of the grid attends a key, but this is not known of a bias.
    policy = Policy(assume_attended_rows=True)
    inputs = case.inputs(device)
    gm, site = _captured(case, inputs, policy)
    verdicts: dict[str, KernelVerdict] = {}
    willing = willing_kernels(site, _candidates(names), verdicts)
    kernels: dict[str, dict[str, Any]] = {
        name: {"refused": verdict.reason} for name, verdict in verdicts.items() if not verdict.willing
    }
    calls: dict[str, tuple[Standalone, Callable[..., Tensor]]] = {}
    for kernel in willing:
        if kernel.name == "_native_math" and case.score_bytes > _MATH_BYTES:
            kernels[kernel.name] = {
                "failed": f"left out: its scores alone would take {case.score_bytes / 2**30:.0f} GiB"
            }
            continue
        try:
            alone = cut_out(gm, site, kernel)
            values = _values(gm, alone, inputs)
            with torch.set_grad_enabled(case.backward):
                call = compiled_alone(alone, values, policy)
            _run_of(case, call, values, inputs)()
            calls[kernel.name] = alone, call
        except Exception as error:  # noqa: BLE001 - The row says so; the others are measured.
            kernels[kernel.name] = {"failed": _in_words(error)}
        _free(device)
    gc.collect()
    auto = {}
    for what, mode in (("call", None), ("graph", "reduce-overhead")):
        row = SiteReport(str(case), "", "kept", None)
        chosen = choose(gm, site, None, row, dataclasses.replace(policy, mode=mode))
        auto[what] = chosen.name if chosen else ""
    smallest = smallest_run(device, case.backward, policy)
    smallest()
    return _Prepared(case, device, Workload.of(site), gm, calls, kernels, smallest, auto)


def _in_words(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"


def _candidates(names: Sequence[str]) -> list[Kernel]:
    if names:
        return [kernel_named(name, "bench sites") for name in names]
    return [kernel for kernel in registered_kernels() if not kernel.lower_precision and "hub" not in kernel.name]


def _captured(case: Case, inputs: Sequence[Tensor], policy: Policy) -> tuple[fx.GraphModule, CanonicalAttention]:
    found: list[fx.GraphModule] = []

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        found.append(capture(gm, example_inputs).gm)
        # Nothing is computed: the naive scores may not fit into memory.
        return lambda *values: (values[0].new_empty(()),)

    torch.compiler.reset()
    with torch.set_grad_enabled(case.backward):
        torch.compile(case.attention, backend=backend, fullgraph=True, dynamic=False)(*inputs)
    torch.compiler.reset()
    (site,) = read_sites(found[0], policy)
    return found[0], site


def _values(gm: fx.GraphModule, alone: Standalone, inputs: Sequence[Tensor]) -> list[Tensor]:
    """The values of the standalone graph's inputs, computed from the case's own."""
    names = ("query", "key", "value", "mask")
    given = dict(zip(names, inputs, strict=False))
    # Dynamo orders a graph's inputs by their first use, and names them after the function's parameters.
    known: dict[fx.Node, Any] = {
        node: next(given[name] for name in names if node.name.lower().startswith(f"l_{name}_"))
        for node in gm.graph.find_nodes(op="placeholder")
    }

    def value(node: fx.Node) -> Any:
        if node not in known:
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), value)
            assert callable(node.target)
            known[node] = node.target(*args, **kwargs)
        return known[node]

    return [value(node) for node in alone.inputs]


def _run_of(
    case: Case, call: Callable[..., Tensor], values: Sequence[Tensor], inputs: Sequence[Tensor]
) -> Callable[[], tuple[Tensor, ...]]:
    """Runs a call; returns the output and, with a backward pass, the gradients of its sum of squares."""

    def run() -> tuple[Tensor, ...]:
        with torch.set_grad_enabled(case.backward):
            output = call(*values)
            if not case.backward:
                return (output,)
            return (output, *torch.autograd.grad(output, list(inputs[:3]), output.detach()))

    return run


def _errors(found: Sequence[Tensor], reference: Sequence[Tensor]) -> list[float]:
    """The largest difference from float64, relative to its largest number: of the output, then of the gradients."""
    return [
        ((ours.double() - exact).abs().max() / exact.abs().max()).item()
        for ours, exact in zip(found, reference, strict=True)
    ]


def _spread(times: Sequence[float]) -> tuple[float, float] | None:
    """The first and the third quartile."""
    if len(times) < 4:
        return None
    first, _, third = statistics.quantiles(times, n=4)
    return first, third


def _free(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()


# Several processes.


def _measure_in_processes(
    cases: Sequence[Case],
    kernels: Sequence[str],
    device: torch.device,
    seconds: float,
    workers: int,
    step: Callable[[], None],
) -> list[dict[str, Any]]:
    context = multiprocessing.get_context("spawn")
    compiled: Any = context.Barrier(workers)
    alone, answers = context.Lock(), context.Queue()
    shares = [list(range(first, len(cases), workers)) for first in range(workers)]
    processes = [
        context.Process(
            target=_work,
            args=([(place, cases[place]) for place in share], kernels, str(device), seconds, compiled, alone, answers),
        )
        for share in shares
    ]
    for process in processes:
        process.start()
    found: dict[int, dict[str, Any]] = {}
    for place, answer in _answers(answers, processes, 2 * len(cases)):
        step()
        if answer is not None:
            found[place] = answer
    for process in processes:
        process.join()
    return [found[place] for place in range(len(cases)) if place in found]


def _answers(answers: Any, processes: Sequence[Any], count: int) -> Iterator[tuple[int, dict[str, Any] | None]]:
    """Raises:
    RuntimeError: a worker ended before its time.
    """
    import queue

    for _ in range(count):
        while True:
            try:
                yield answers.get(timeout=5)
                break
            except queue.Empty:
                if any(process.exitcode for process in processes):
                    raise RuntimeError("a worker process failed with the error above; try fewer --workers") from None


def _work(
    cases: Sequence[tuple[int, Case]],
    kernels: Sequence[str],
    device: str,
    seconds: float,
    compiled: Any,
    alone: Any,
    answers: Any,
) -> None:
    place = torch.device(device)
    prepared: list[tuple[int, _Prepared]] = []
    failed: list[tuple[int, dict[str, Any]]] = []
    for number, case in cases:
        try:
            prepared.append((number, _prepare(case, kernels, place)))
        except Exception as error:  # noqa: BLE001 - A kernel may take the device along; the other processes go on.
            failed.append((number, {"name": str(case), "failed": _in_words(error)}))
        answers.put((number, None))
    compiled.wait()
    for number, row in failed:
        answers.put((number, row))
    with alone:
        for number, one in prepared:
            try:
                row = one.measure(seconds)
            except Exception as error:  # noqa: BLE001 - As above.
                row = {"name": str(one.case), "failed": _in_words(error)}
            answers.put((number, row))


# What is shown.


def print_sites_benchmark(result: SitesBenchmark, console: Console | None = None) -> None:
    """Prints a table of each kernel's median milliseconds, the fastest in bold, the automatic choice starred."""
    names = _measured_names(result.sites)
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("batch,heads,length,head_dim")
    for name in (*names, "auto / best"):
        table.add_column(name, justify="right")
    for site in result.sites:
        auto = site["auto"].get("call", {})
        cells = []
        for name in names:
            time_ = site["kernels"].get(name, {}).get("call_ms")
            text = "" if time_ is None else f"{time_:.3f}" + "*" * (name == auto.get("kernel"))
            cells.append(f"[bold]{text}[/bold]" if name == auto.get("best") else text)
        over = auto.get("over_best")
        table.add_row(site["name"], *cells, "" if over is None else f"{over:.2f}")
    console = console or (Console() if sys.stdout.isatty() else Console(width=40 + 20 * len(names)))
    console.print(table)
    for name, words in result.environment.get("failed", {}).items():
        console.print(f"{name} failed: {words}", markup=False)
    for line in _why_untimed(result):
        console.print(line, markup=False)
    for what, words in (("call", "calls"), ("graph", "replays of CUDA graphs")):
        ratios = [site["auto"][what]["over_best"] for site in result.sites if "over_best" in site["auto"].get(what, {})]
        if ratios:
            within = sum(ratio <= 1.05 for ratio in ratios)
            console.print(
                f"{words}: the automatic choice is within 5% of the fastest exact kernel at {within} of {len(ratios)} "
                f"sites; at most {max(ratios):.2f} times its time."
            )


def _why_untimed(result: SitesBenchmark) -> Iterator[str]:
    """A line for each reason why a requested kernel has no times, or any kernel failed."""
    asked = result.environment.get("asked", [])
    reasons: dict[tuple[str, str], int] = {}
    for site in result.sites:
        for name, row in site["kernels"].items():
            reason = row.get("failed") or (row.get("refused") if name in asked else None)
            if reason:
                reasons[name, reason] = reasons.get((name, reason), 0) + 1
    for (name, reason), count in reasons.items():
        yield f"{name} has no times at {count} of {len(result.sites)} sites: {reason}"


def _measured_names(sites: Sequence[dict[str, Any]]) -> list[str]:
    measured = {name for site in sites for name, row in site["kernels"].items() if "call_ms" in row}
    return [kernel.name for kernel in registered_kernels() if kernel.name in measured]


def plot_sites(result: SitesBenchmark, path: Path) -> None:
    """Plots each kernel's time relative to the fastest, site by site, into a file (.png, .svg, .pdf) with matplotlib.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    from matplotlib import pyplot

    names = _measured_names(result.sites)
    figure, axes = pyplot.subplots(figsize=(10, 1.5 + 0.28 * len(result.sites)), layout="constrained")
    rows = range(len(result.sites))
    for place, name in enumerate(names):
        points = []
        for row, site in zip(rows, result.sites, strict=True):
            times = {other: found["call_ms"] for other, found in site["kernels"].items() if "call_ms" in found}
            if name in times:
                points.append((times[name] / min(times.values()), row))
        ratios, places = zip(*points, strict=True)
        axes.scatter(ratios, places, label=name, s=28, color=f"C{place}", marker="osD^vP*X"[place % 8])
    axes.set_yticks(list(rows), [site["name"] for site in result.sites], fontsize=7)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlabel(f"time over that of the fastest kernel, {result.environment.get('device', '')}")
    axes.grid(axis="x", which="both", alpha=0.3)
    axes.legend(fontsize=7)
    figure.savefig(path)
    pyplot.close(figure)
