"""What the examples share: a model is compared under eager execution, ``torch.compile`` and attnrewrite.

Each example file holds one model. Its table says how many attentions were found and rewritten, how far the results lie
from eager's, and the time of a forward pass under each of the three.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import click
import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import nn

import attnrewrite

__all__ = ["Example", "Row", "circumstances", "compare", "main", "milliseconds", "show"]


@dataclass(frozen=True)
class Example:
    """A model with random weights; ``build(size)`` gives it with its keyword arguments."""

    name: str
    build: Callable[[str], tuple[nn.Module, dict[str, Any]]]


@dataclass(frozen=True)
class Row:
    """One model's result.

    ``error`` is the largest difference from eager's output, over eager's largest magnitude; times are medians, in
    milliseconds, with every single one in ``times_ms``; ``scores_mib`` is the largest score matrix of the attentions
    that were rewritten: batch x heads x query length x key length.
    """

    model: str
    description: str
    sites: int
    rewritten: int
    error: float
    error_of_torch_compile: float
    eager_ms: float
    torch_compile_ms: float
    attnrewrite_ms: float
    scores_mib: float
    times_ms: dict[str, list[float]]
    first_call_s: dict[str, float]


def compare(example: Example, size: str, device: str, repeats: int) -> Row:
    """Runs the model under all three, in turns, so that a disturbance of the machine meets all of them."""
    torch.manual_seed(0)
    model, inputs = example.build(size)
    model = model.to(device).eval()
    inputs = {name: value.to(device) for name, value in inputs.items()}
    forward: dict[str, Callable[..., Any]] = {
        "eager": model,
        "torch.compile": torch.compile(model),
        "attnrewrite": torch.compile(model, backend="attnrewrite"),
    }
    with torch.inference_mode():
        report = attnrewrite.explain(model, **inputs)
        first_call_s: dict[str, float] = {}
        outputs: dict[str, torch.Tensor] = {}
        for name, function in forward.items():
            start = time.perf_counter()
            outputs[name] = _tensor(function(**inputs)).double()
            first_call_s[name] = round(time.perf_counter() - start, 2)
        times_ms: dict[str, list[float]] = {name: [] for name in forward}
        for _ in range(repeats):
            for name, function in forward.items():
                times_ms[name].append(round(milliseconds(function, inputs, device), 2))
    medians = {name: statistics.median(times) for name, times in times_ms.items()}
    expected = outputs["eager"]
    errors = {name: ((got - expected).abs().max() / expected.abs().max()).item() for name, got in outputs.items()}
    return Row(
        model=example.name,
        description=_describe(model, inputs),
        sites=len(report.sites),
        rewritten=len(report.rewritten),
        error=errors["attnrewrite"],
        error_of_torch_compile=errors["torch.compile"],
        eager_ms=medians["eager"],
        torch_compile_ms=medians["torch.compile"],
        attnrewrite_ms=medians["attnrewrite"],
        scores_mib=max((_scores_mib(site) for site in report.rewritten), default=0.0),
        times_ms=times_ms,
        first_call_s=first_call_s,
    )


def milliseconds(function: Callable[..., Any], inputs: dict[str, Any], device: str) -> float:
    _wait_for(device)
    start = time.perf_counter()
    function(**inputs)
    _wait_for(device)
    return 1e3 * (time.perf_counter() - start)


def _wait_for(device: str) -> None:
    if torch.device(device).type != "cpu":
        torch.accelerator.synchronize()


def _tensor(output: Any) -> torch.Tensor:
    """The first tensor of what a model of transformers or diffusers returns."""
    result: torch.Tensor = output if isinstance(output, torch.Tensor) else output[0]
    return result


def _describe(model: nn.Module, inputs: dict[str, Any]) -> str:
    parameters = sum(parameter.numel() for parameter in model.parameters())
    shapes = ", ".join(f"{name} {'x'.join(map(str, value.shape)) or 'scalar'}" for name, value in inputs.items())
    return f"{parameters / 1e6:.1f} M parameters; {shapes}"


def _scores_mib(site: attnrewrite.SiteReport) -> float:
    *rows, _ = map(int, site.query_shape)
    keys = int(site.key_shape[-2])
    itemsize: int = getattr(torch, site.dtype).itemsize
    return round(torch.Size(rows).numel() * keys * itemsize / 2**20, 1)


def show(rows: Sequence[Row]) -> None:
    """Prints the table. The fastest of the three is in bold."""
    # What is no terminal has no width of its own; rich would take 80 columns.
    console = Console() if sys.stdout.isatty() else Console(width=100)
    table = Table(title="One forward pass, median time in ms", title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("model", overflow="fold")
    for title in ("sites", "rewritten", "error", "eager", "torch.compile", "attnrewrite", "scores"):
        table.add_column(title, justify="right")
    for row in rows:
        times = (row.eager_ms, row.torch_compile_ms, row.attnrewrite_ms)
        table.add_row(
            row.model,
            str(row.sites),
            str(row.rewritten),
            f"{row.error:.1e}",
            *(f"[bold]{ms:.0f}[/]" if ms == min(times) else f"{ms:.0f}" for ms in times),
            f"{row.scores_mib:.0f} MiB",
        )
    console.print(table)
    console.print("error   attnrewrite's largest difference from eager, relative to eager's largest value")
    console.print("scores  the largest matrix of attention scores, which eager writes to memory")


def main(examples: Sequence[Example]) -> None:
    """The command line of an example: compares its models and prints the table."""

    @click.command(context_settings={"help_option_names": ["-h", "--help"]})
    @click.option("--size", type=click.Choice(["small", "base"]), default="small", help="The model's size.")
    @click.option("--repeats", type=click.IntRange(min=1), default=5, help="Timed calls of each (default 5).")
    @click.option("--device", default="cpu", help="Such as cuda (default cpu).")
    @click.option("--json", "path", type=click.Path(dir_okay=False, path_type=Path), help="Write the raw data here.")
    def command(size: str, repeats: int, device: str, path: Path | None) -> None:
        start = time.perf_counter()
        rows = []
        for example in examples:
            click.echo(f"{example.name}: compiling and measuring ...", err=True)
            rows.append(compare(example, size, device, repeats))
            torch.compiler.reset()
        show(rows)
        seconds = time.perf_counter() - start
        if path is not None:
            record = {**circumstances(device), "seconds": round(seconds, 1), "rows": [asdict(row) for row in rows]}
            path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")

    command()


def circumstances(device: str) -> dict[str, Any]:
    """What a reader needs to repeat the run."""
    installed = {distribution.name for distribution in metadata.distributions()}
    packages = ("attnrewrite", "torch", "transformers", "diffusers")
    here = Path(__file__).resolve()
    script = Path(sys.argv[0]).resolve()
    command = ["python", script.relative_to(here.parents[1]).as_posix(), *sys.argv[1:]]
    return {
        "command": shlex.join(command),
        "commit": _git(here.parent, "rev-parse", "HEAD"),
        "uncommitted_changes": bool(_git(here.parent, "status", "--porcelain")),
        "device": _device_name(device),
        "threads": torch.get_num_threads(),
        "load_average_at_end": [round(load, 2) for load in os.getloadavg()],
        "python": platform.python_version(),
        **{package: metadata.version(package) for package in packages if package in installed},
    }


def _device_name(device: str) -> str:
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text().splitlines() if cpu.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} logical cores, {torch.backends.cpu.get_cpu_capability()}"


def _git(directory: Path, *arguments: str) -> str:
    try:
        done = subprocess.run(["git", *arguments], cwd=directory, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip()
