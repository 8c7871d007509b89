"""``attnrewrite bench exported``: exported programs, rewritten and not, as ahead-of-time compiled packages.

Each model is exported with a dynamic batch, and a dynamic length where it has one. The program and its rewritten copy
are saved and compiled by AOTInductor. A process that does not import attnrewrite loads all four files and runs the
packages in turns.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, export

from attnrewrite.api.exported import rewritten_and_report
from attnrewrite.bench.model_cases import bert, llama, vit
from attnrewrite.bench.pass_times import environment
from attnrewrite.torch_private import aoti_compile_and_package

__all__ = ["ExportedBenchmark", "ExportedTimes", "print_exported_benchmark", "run_exported_benchmark"]

_MODELS: dict[str, dict[str, Callable[[], Any]]] = {
    "base": {
        "bert": lambda: bert(512, 4, 2, 512),
        "llama": lambda: llama(512, 4, 2, 512),
        "vit": lambda: vit(384, 4, 2, 224),
    },
    "small": {
        "bert": lambda: bert(128, 1, 2, 64),
        "llama": lambda: llama(256, 1, 2, 64),
        "vit": lambda: vit(128, 1, 2, 32),
    },
}

_RUN = """
import json, sys, time, torch
folder, repeats = sys.argv[1], int(sys.argv[2])
torch.set_num_threads(int(sys.argv[3]))
inputs = torch.load(f"{folder}/inputs.pt")
names = ("untouched", "rewritten")
packages = {name: torch._inductor.aoti_load_package(f"{folder}/{name}.package.pt2") for name in names}
programs = {name: torch.export.load(f"{folder}/{name}.pt2").module() for name in names}
times = {name: [] for name in names}
with torch.no_grad():
    results = [each[name](*call) for call in inputs for each in (packages, programs) for name in names]
    for turn in range(repeats):
        for name in names if turn % 2 else reversed(names):
            start = time.perf_counter()
            packages[name](*inputs[0])
            times[name].append(time.perf_counter() - start)
assert "attnrewrite" not in sys.modules
torch.save(results, f"{folder}/results.pt")
print(json.dumps(times))
"""


class _Hidden(nn.Module):
    """A model's hidden states alone: a process without the model's library cannot load its class of results."""

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.model, self.names = model, tuple(names)

    def forward(self, *inputs: Tensor) -> Tensor:
        hidden: Tensor = self.model(**dict(zip(self.names, inputs, strict=True)))[0]
        return hidden


@dataclass(frozen=True)
class ExportedTimes:
    """A model's figures.

    Attributes:
        sites, rewritten: the number of attentions found, and rewritten.
        errors: the largest difference from eager of any result, relative to eager's largest number: of the package and
            the program, untouched and rewritten, for the sizes that were exported and for smaller ones.
        seconds: of each call of the packages "untouched" and "rewritten".
    """

    model: str
    sites: int
    rewritten: int
    errors: dict[str, float]
    seconds: dict[str, list[float]]

    @property
    def ratio(self) -> float:
        """The median time of the rewritten package, divided by that of the untouched one."""
        return statistics.median(self.seconds["rewritten"]) / statistics.median(self.seconds["untouched"])


@dataclass(frozen=True)
class ExportedBenchmark:
    times: list[ExportedTimes]
    environment: dict[str, Any] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        """Writes the environment and every figure as JSON."""
        models = [{**asdict(times), "ratio": times.ratio} for times in self.times]
        path.write_text(json.dumps({**self.environment, "models": models}, indent=2) + "\n", encoding="utf-8")


def run_exported_benchmark(
    models: Sequence[str] = (), repeats: int = 10, size: str = "base", command: Sequence[str] | None = None
) -> ExportedBenchmark:
    """Exports, rewrites, saves, compiles, loads and times models of transformers on the CPU.

    Args:
        models: of ``bert``, ``llama`` and ``vit``; default all.
        repeats: the number of timed calls of each package; default 10.
        size: "base" (four layers, about 30 M parameters; default) or "small" (one layer).
        command: the command to record; default ``sys.argv``.

    Raises:
        AttnRewriteError: transformers is not installed.
        RuntimeError: the process that runs the packages failed.
    """
    times = [_measured(name, size, repeats) for name in models or _MODELS[size]]
    return ExportedBenchmark(times, environment(command))


def _measured(name: str, size: str, repeats: int) -> ExportedTimes:
    torch.manual_seed(0)
    model, _, kwargs = _MODELS[size][name]()
    module, inputs = _Hidden(model, tuple(kwargs)).eval(), tuple(kwargs.values())
    dims = {0: Dim("batch", max=16)} | ({} if name == "vit" else {1: Dim("length", min=2, max=inputs[0].shape[1])})
    smaller = tuple(
        value[:1] if name == "vit" else value[:1, : value.shape[1] * 3 // 5].contiguous() for value in inputs
    )
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        place = Path(folder)
        program = export(module, inputs, dynamic_shapes={"inputs": tuple(dims for _ in inputs)}, strict=False)
        new, report = rewritten_and_report(program)
        for kind, each in (("untouched", program), ("rewritten", new)):
            _save(each, place, kind)
        torch.save([inputs, smaller], place / "inputs.pt")
        arguments = [folder, str(repeats), str(torch.get_num_threads())]
        done = subprocess.run([sys.executable, "-c", _RUN, *arguments], capture_output=True, text=True, cwd=folder)
        if done.returncode:
            raise RuntimeError(f"running the packages of {name} failed:\n{done.stderr}")
        results: list[Tensor] = torch.load(place / "results.pt")
        expected = [module(*call) for call in (inputs, smaller)]
    errors: dict[str, float] = {}
    kinds = [f"{what} {kind}" for what in ("package", "program") for kind in ("untouched", "rewritten")]
    for place_of, result in enumerate(results):
        own, kind = expected[place_of // len(kinds)], kinds[place_of % len(kinds)]
        errors[kind] = max(errors.get(kind, 0.0), float((result - own).abs().max() / own.abs().max()))
    seconds = json.loads(done.stdout.splitlines()[-1])
    return ExportedTimes(name, len(report.sites), len(report.rewritten), errors, seconds)


def _save(program: ExportedProgram, folder: Path, kind: str) -> None:
    torch.export.save(program, folder / f"{kind}.pt2")
    aoti_compile_and_package(program, str(folder / f"{kind}.package.pt2"))


def print_exported_benchmark(result: ExportedBenchmark, console: Console | None = None) -> None:
    """Prints a table with a row for each model."""
    table = Table(box=box.SIMPLE)
    for title in ("model", "rewritten", "untouched ms", "rewritten ms", "ratio", "error"):
        table.add_column(title, justify="left" if title == "model" else "right")
    for times in result.times:
        median = {kind: 1e3 * statistics.median(seconds) for kind, seconds in times.seconds.items()}
        table.add_row(
            times.model,
            f"{times.rewritten} of {times.sites}",
            f"{median['untouched']:.1f}",
            f"{median['rewritten']:.1f}",
            f"{times.ratio:.3f}",
            f"{max(times.errors.values()):.1e}",
        )
    (console or Console()).print(table)
