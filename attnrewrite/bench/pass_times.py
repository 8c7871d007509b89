"""``attnrewrite bench pass``: times attnrewrite's own steps on graphs of about 1,000 and about 10,000 nodes.

The model is a transformer with naive attention; each block is 100 nodes of the IR with one attention. Each repeat
rewrites a copy of the captured graph, inside the compilation, as in real use. Nothing is compiled and no kernel runs.
Times are wall-clock times and include Python's garbage collection.
"""

from __future__ import annotations

import copy
import dataclasses
import gc
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, fx, nn

from attnrewrite.capture.trace import capture
from attnrewrite.options.compile_options import Policy
from attnrewrite.passes.pipeline import rewrite
from attnrewrite.passes.steps import Steps

__all__ = ["PassBenchmark", "PassTimes", "environment", "measure_pass", "print_pass_benchmark", "run_pass_benchmark"]

STEPS = (
    *("regroup_products", "find", "merge_slices", "unrepeat_kv", "canonicalize", "narrow_masks"),
    *("choose", "splice", "restore_products", "join_projections"),
)
"""The steps whose sum is the time of the pass, as ``GraphReport.seconds`` names them.

Files of older measurements have four: "find" included the next two, "simplify" is now "canonicalize", and "splice"
included "join_projections". Those before "regroup_products" lack it and "restore_products".
"""

_WIDTH, _HEADS, _LENGTH, _BATCH = 32, 4, 16, 2
_FILLERS = 56
_CAPTURES = 2
"""The largest number of captures of a graph: a capture takes much longer than the pass."""


class _Block(nn.Module):
    """One naive attention and one feed-forward network, and elementwise operators that make it up to 100 nodes."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(_WIDTH), nn.LayerNorm(_WIDTH)
        self.query, self.key, self.value, self.out = (nn.Linear(_WIDTH, _WIDTH) for _ in range(4))
        self.wide, self.narrow = nn.Linear(_WIDTH, 4 * _WIDTH), nn.Linear(4 * _WIDTH, _WIDTH)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        y = self.norm1(x)
        q, k, v = (
            layer(y).view(*y.shape[:2], _HEADS, -1).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        scores = q @ k.transpose(-1, -2) / (_WIDTH // _HEADS) ** 0.5 + mask
        weights = nn.functional.dropout(scores.softmax(-1), 0.1, self.training)
        x = x + self.out((weights @ v).transpose(1, 2).reshape(x.shape))
        x = x + self.narrow(nn.functional.gelu(self.wide(self.norm2(x))))
        for step in range(_FILLERS):
            x = torch.tanh(x) if step % 3 == 0 else x * 0.5 if step % 3 == 1 else x + 1.0
        return x


class _Model(nn.Module):
    """Blocks under one mask: causal, and open only for keys that ``attention_mask`` (batch, length) has a 1 for."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(_Block() for _ in range(blocks))

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        positions = torch.arange(x.shape[1], device=x.device)
        allowed = (positions[:, None] >= positions)[None, None] & attention_mask[:, None, None, :].bool()
        mask = torch.where(allowed, 0.0, torch.finfo(x.dtype).min)
        for block in self.blocks:
            x = block(x, mask)
        return x


@dataclass(frozen=True)
class PassTimes:
    """All times of one graph, in seconds.

    Attributes:
        blocks: the number of blocks of the model.
        nodes: the number of nodes of the captured graph, including inputs and output.
        sites, rewritten: the number of attentions found, and rewritten.
        capture: times from Dynamo's graph to the IR, which are not part of the pass.
        steps: times of each of :data:`STEPS`.
        whole: times of the whole call of ``rewrite``: the steps, and checking and printing the new graph.
        cpu: ``whole`` in CPU time, which other processes disturb less.
    """

    blocks: int
    nodes: int
    sites: int
    rewritten: int
    capture: list[float] = field(default_factory=list)
    steps: dict[str, list[float]] = field(default_factory=dict)
    whole: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    def median(self, step: str) -> float:
        """The median of a step in seconds; 0 if the step did not run."""
        return statistics.median(self.steps.get(step) or [0.0])

    @property
    def pass_seconds(self) -> float:
        """The median over the repeats of the sum of the steps."""
        return statistics.median(map(sum, zip(*self.steps.values(), strict=True)))

    @property
    def ms_per_node(self) -> float:
        return 1e3 * self.pass_seconds / self.nodes


@dataclass(frozen=True)
class PassBenchmark:
    """The times of two or more graphs, the smallest first."""

    times: list[PassTimes]
    environment: dict[str, Any] = field(default_factory=dict)

    @property
    def ratio(self) -> float:
        """The time of the pass on the largest graph divided by that on the smallest."""
        return self.times[-1].pass_seconds / self.times[0].pass_seconds

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: the environment, the medians and every single time."""
        graphs = [
            {**dataclasses.asdict(times), "pass_seconds": times.pass_seconds, "ms_per_node": times.ms_per_node}
            for times in self.times
        ]
        return {**self.environment, "ratio": self.ratio, "graphs": graphs}

    def save(self, path: Path) -> None:
        """Writes :meth:`to_dict` to ``path``."""
        path.write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")


def run_pass_benchmark(
    blocks: Sequence[int] = (10, 100), repeats: int = 5, dynamic: bool = False, command: Sequence[str] | None = None
) -> PassBenchmark:
    """Measures the pass on a graph for each number of blocks; 10 blocks are about 1,000 nodes.

    Args:
        blocks: the numbers of blocks, each with one attention; default 10 and 100.
        repeats: how often to rewrite each graph; default 5. It is captured once or twice.
        dynamic: whether batch size and length are symbolic; default False.
        command: the command to record; default ``sys.argv``.
    """
    measure_pass(2, 1, dynamic)  # Warm-up: first use loads modules and fills caches.
    start = time.perf_counter()
    times = [measure_pass(count, repeats, dynamic) for count in sorted(blocks)]
    about = {**environment(command), "dynamic": dynamic, "seconds": round(time.perf_counter() - start, 1)}
    return PassBenchmark(times, about)


def measure_pass(blocks: int, repeats: int, dynamic: bool = False) -> PassTimes:
    """Captures the graph of a model of ``blocks`` blocks, and rewrites it ``repeats`` times.

    Args:
        dynamic: whether batch size and length are symbolic.

    Raises:
        RuntimeError: the model was not captured as one graph.
    """
    found: list[PassTimes] = []

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        found.append(_measure_graph(gm, example_inputs, blocks, repeats))
        return gm.forward

    torch.manual_seed(0)
    model = _Model(blocks).eval()
    inputs = torch.randn(_BATCH, _LENGTH, _WIDTH), torch.ones(_BATCH, _LENGTH, dtype=torch.long)
    # Dynamo's cache is keyed by the model's code, which all sizes share.
    torch.compiler.reset()
    with torch.no_grad():
        torch.compile(model, backend=backend, fullgraph=True, dynamic=dynamic)(*inputs)
    torch.compiler.reset()
    if len(found) != 1:
        raise RuntimeError(f"the benchmark's model was captured as {len(found)} graphs instead of one")
    return found[0]


def _measure_graph(gm: fx.GraphModule, example_inputs: Sequence[Any], blocks: int, repeats: int) -> PassTimes:
    policy = Policy()
    captures: list[float] = []
    whole: list[float] = []
    cpu: list[float] = []
    steps: dict[str, list[float]] = {step: [] for step in STEPS}
    nodes = sites = rewritten = 0
    for repeat in range(repeats):
        if repeat < _CAPTURES:
            gc.collect()
            start = time.perf_counter()
            captured = capture(gm, example_inputs)
            captures.append(time.perf_counter() - start)
        ir = fx.GraphModule(captured.gm, copy.deepcopy(captured.gm.graph))
        nodes = len(ir.graph.nodes)
        gc.collect()
        start, cpu_start = time.perf_counter(), time.process_time()
        run = Steps()
        result = rewrite(ir, policy, steps=run)
        whole.append(time.perf_counter() - start)
        cpu.append(time.process_time() - cpu_start)
        for step in STEPS:
            steps[step].append(run.seconds.get(step, 0.0))
        sites, rewritten = len(result.sites), sum(site.status == "rewritten" for site in result.sites)
    return PassTimes(blocks, nodes, sites, rewritten, captures, steps, whole, cpu)


def print_pass_benchmark(result: PassBenchmark, console: Console | None = None) -> None:
    """Prints a table with a column for each graph and median seconds."""
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("nodes")
    for times in result.times:
        table.add_column(f"{times.nodes:,}", justify="right")
    rows: list[tuple[str, Callable[[PassTimes], str]]] = [
        ("sites", lambda times: str(times.sites)),
        ("rewritten", lambda times: str(times.rewritten)),
        ("capture s", lambda times: f"{statistics.median(times.capture):.2f}"),
        *((f"{step} s", lambda times, step=step: f"{times.median(step):.3f}") for step in STEPS),
        ("pass s", lambda times: f"{times.pass_seconds:.3f}"),
        ("ms per node", lambda times: f"{times.ms_per_node:.3f}"),
    ]
    for title, text in rows:
        table.add_row(title, *map(text, result.times))
    # A file or a pipe has no width; rich would use 80 columns.
    console = console or (Console() if sys.stdout.isatty() else Console(width=120))
    console.print(table)
    small, big = result.times[0], result.times[-1]
    rest = statistics.median(big.whole) - big.pass_seconds
    cpu = [statistics.median(times.cpu) for times in (small, big)]
    console.print(f"{big.nodes / small.nodes:.1f} times the nodes take {result.ratio:.1f} times the pass.")
    console.print(f"Checking and printing the new graph of {big.nodes:,} nodes takes {rest:.2f} s more.")
    console.print(f"CPU time of all of it: {cpu[0]:.2f} s and {cpu[1]:.2f} s, {cpu[1] / cpu[0]:.1f} times.")


def environment(command: Sequence[str] | None, place: torch.device | None = None) -> dict[str, Any]:
    """What a measurement was made with.

    Args:
        command: its words; None stands for ``sys.argv``.
        place: where the tensors lay; default the CPU.
    """
    commit = _git("rev-parse", "HEAD")
    processor = f"{_cpu_name()}, {os.cpu_count()} logical cores"
    words = [Path(sys.argv[0]).name, *sys.argv[1:]] if command is None else command
    return {
        "command": shlex.join(words),
        "commit": commit,
        "uncommitted_changes": bool(_git("status", "--porcelain")) if commit else None,
        "device": torch.cuda.get_device_name(place) if place is not None and place.type == "cuda" else processor,
        "threads": torch.get_num_threads(),
        "load_average": [round(load, 2) for load in os.getloadavg()] if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        "attnrewrite": metadata.version("attnrewrite"),
        "torch": torch.__version__,
    }


def _git(*arguments: str) -> str | None:
    """The output of git for the checkout of this package; None without git or a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _cpu_name() -> str:
    return next(_cpu_names(), platform.processor() or platform.machine())


def _cpu_names() -> Iterator[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not on Linux
        return
    for line in lines:
        if line.startswith("model name"):
            yield line.partition(":")[2].strip()
