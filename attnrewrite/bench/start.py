"""``attnrewrite bench start``: how long the first call of a compiled model takes, cold and warm, beside plain Inductor.

Each start is a process of its own. A cold one finds empty caches, a warm one those of a cold one.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

from attnrewrite.backend import collect_reports
from attnrewrite.bench.model_cases import MODELS, Made, bert, llama
from attnrewrite.bench.models import placed, wait_for
from attnrewrite.bench.pass_times import environment
from attnrewrite.errors import AttnRewriteError

__all__ = ["StartBenchmark", "StartTimes", "print_start_benchmark", "run_start_benchmark", "start_models"]

_ON_CPU: dict[str, dict[str, Callable[[], Made]]] = {
    "base": {
        "bert": lambda: bert(768, 12, 2, 64),
        "llama": lambda: llama(512, 8, 2, 64),
        "unet": lambda: MODELS["small"]["unet"].build(),
    },
    "small": {name: MODELS["small"][name].build for name in ("bert", "llama", "unet")},
}


def start_models(size: str, device: str) -> list[str]:
    """The names of the models whose starts can be measured.

    Args:
        size: "base" or "small".
        device: on a CPU BERT base, a Llama of eight layers, and the UNet, which is small in both sizes; elsewhere all
            models of ``attnrewrite bench models``, each in the dtype that it is measured in there.
    """
    return list(_ON_CPU[size] if torch.device(device).type == "cpu" else MODELS[size])


def _made(size: str, name: str, device: str) -> Made:
    if torch.device(device).type == "cpu":
        return _ON_CPU[size][name]()
    case = MODELS[size][name]
    model, args, kwargs = case.build()
    place = torch.device(device)
    args, kwargs = placed((args, kwargs), place, case.half)
    return model.to(place, case.half), args, kwargs


_BACKENDS = ("inductor", "attnrewrite")


def first_call(size: str, name: str, device: str, backend: str) -> dict[str, Any]:
    """What the first call of a compiled model takes in this process.

    Seconds of "wall" clock and of "processor" time, the latter with that of the C++ compiler; with attnrewrite also
    "own", the seconds of its steps but for the inner compiler, the number of "nodes" of Dynamo's graphs, and how many
    graphs were "stored".
    """
    model, args, kwargs = _made(size, name, device)
    compiled: Any = torch.compile(model.eval(), backend=backend)
    with torch.no_grad(), collect_reports(code=False) as reports:
        started = time.perf_counter(), _processor_seconds()
        compiled(*args, **kwargs)
        wait_for(torch.device(device))
        wall, processor = time.perf_counter() - started[0], _processor_seconds() - started[1]
    own = sum(seconds for report in reports for step, seconds in report.seconds.items() if step != "inner")
    return {
        "wall": wall,
        "processor": processor,
        "own": own,
        "nodes": sum(report.node_count for report in reports),
        "stored": sum("look up" in report.seconds and "capture" not in report.seconds for report in reports),
        "graphs": len(reports),
    }


def _processor_seconds() -> float:
    used = os.times()
    return used.user + used.system + used.children_user + used.children_system


@dataclass(frozen=True)
class StartTimes:
    """A model's starts, by "inductor" and "attnrewrite", each as :func:`first_call` gives it."""

    model: str
    cold: dict[str, list[dict[str, Any]]]
    warm: dict[str, list[dict[str, Any]]]
    clock: Literal["processor", "wall"] = "processor"
    """What starts are compared by: on a CPU their processor time, elsewhere, where workers compile, the wall clock."""

    def median(self, kind: str, backend: str, what: str | None = None) -> float:
        """By default of :attr:`clock`."""
        starts: list[dict[str, Any]] = getattr(self, kind)[backend]
        return float(statistics.median(start[what or self.clock] for start in starts))

    @property
    def share(self) -> float:
        """Capture and rewriting of a cold start, as a share of what plain Inductor takes."""
        return self.median("cold", "attnrewrite", "own") / self.median("cold", "inductor", "wall")

    @property
    def warm_ratio(self) -> float:
        """The time of a warm start, divided by that of plain ``torch.compile``."""
        return self.median("warm", "attnrewrite") / self.median("warm", "inductor")


@dataclass(frozen=True)
class StartBenchmark:
    times: list[StartTimes]
    environment: dict[str, Any] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        """Writes the environment and every figure as JSON."""
        models = [{**asdict(times), "share": times.share, "warm_ratio": times.warm_ratio} for times in self.times]
        path.write_text(json.dumps({**self.environment, "models": models}, indent=2) + "\n", encoding="utf-8")


def run_start_benchmark(
    models: Sequence[str] = (),
    repeats: int = 5,
    size: str = "base",
    device: str = "cpu",
    command: Sequence[str] | None = None,
) -> StartBenchmark:
    """Compiles models in processes of their own, cold and warm, with and without attnrewrite, in turns.

    Args:
        models: of :func:`start_models`; default all.
        repeats: the number of starts of each kind; default 5.
        size: "base" (default) or "small".
        device: where the models run; default the CPU.
        command: the command to record; default ``sys.argv``.

    Raises:
        RuntimeError: a process failed; the message has its last words.
        AttnRewriteError: a model is not among those that are measured on this device.
    """
    known = start_models(size, device)
    if unknown := sorted(set(models) - set(known)):
        words = f"the start of {', '.join(unknown)} is not measured on this device (choose from {', '.join(known)})"
        raise AttnRewriteError(words)
    names = list(models or known)
    on_cpu = torch.device(device).type == "cpu"
    found = {
        name: StartTimes(
            name, {key: [] for key in _BACKENDS}, {key: [] for key in _BACKENDS}, "processor" if on_cpu else "wall"
        )
        for name in names
    }
    turns = [(name, turn) for name in names for turn in range(repeats)]
    for name, turn in track(turns, "starting", console=Console(stderr=True), transient=True):
        for backend in _BACKENDS if turn % 2 else reversed(_BACKENDS):
            with tempfile.TemporaryDirectory() as folder:
                for kind in (found[name].cold, found[name].warm):
                    kind[backend].append(_started(folder, size, name, device, backend))
    return StartBenchmark(list(found.values()), environment(command, torch.device(device)))


_RUN = "import json, sys; from attnrewrite.bench.start import first_call; print(json.dumps(first_call(*sys.argv[1:])))"


def _started(caches: str, size: str, name: str, device: str, backend: str) -> dict[str, Any]:
    variables = {
        **os.environ,
        "ATTNREWRITE_WARM_START": "1",
        "ATTNREWRITE_CACHE_DIR": f"{caches}/attnrewrite",
        "TORCHINDUCTOR_CACHE_DIR": f"{caches}/inductor",
    }
    if torch.device(device).type == "cpu":
        # The compiler's time counts where it is a child of this process, and not of a worker.
        variables["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
    command = [sys.executable, "-c", _RUN, size, name, device, backend]
    done = subprocess.run(command, capture_output=True, text=True, env=variables)
    if done.returncode:
        raise RuntimeError(f"starting {name} with {backend} failed:\n{done.stderr[-2000:]}")
    start: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return start


def print_start_benchmark(result: StartBenchmark, console: Console | None = None) -> None:
    """Prints a table with a row for each model."""
    table = Table(box=box.SIMPLE)
    titles = ("model", "cold s", "with attnrewrite", "its own share", "warm s", "with attnrewrite", "ratio")
    for title in titles:
        table.add_column(title, justify="left" if title == "model" else "right")
    for times in result.times:
        seconds = [f"{times.median(kind, backend):.1f}" for kind in ("cold", "warm") for backend in _BACKENDS]
        table.add_row(times.model, *seconds[:2], f"{times.share:.1%}", *seconds[2:], f"{times.warm_ratio:.2f}")
    (console or Console()).print(table)
    clocks = {"processor": "Seconds of processor time", "wall": "Seconds"}
    words = " and ".join(clocks[clock] for clock in sorted({times.clock for times in result.times}))
    (console or Console()).print(f"{words}, medians; the share is of the wall clock.")
