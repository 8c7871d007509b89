"""Times kernels at a site: the site is cut out of its graph, compiled alone, and called on the current device.

Kernels that are compared are timed in turns, in one process. On CUDA the L2 cache is cleared before each call, as in
``triton.testing.do_bench``, and a call's time includes the host's time to start it if the device waits for that. The
time to enter a compiled graph is excluded: a model enters it once, however many attentions it has. Replays of a CUDA
graph give the device's time alone.
"""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from attnrewrite.inner import InnerCompiler
from attnrewrite.ir.builder import Builder
from attnrewrite.ir.nodes import is_tensor, known_number, tensor
from attnrewrite.ir.ops import is_function
from attnrewrite.ir.site import CanonicalAttention
from attnrewrite.kernels import Kernel
from attnrewrite.options.compile_options import Policy
from attnrewrite.torch_private import FakeTensorMode, TracingContext, backward_compiled_at_once, tracing

__all__ = ["Standalone", "Times", "compiled_alone", "cut_out", "smallest_run", "time_together"]

_CACHE_BYTES = 256 * 2**20
"""More than the L2 cache of any GPU."""
_FEWEST, _MOST = 5, 200
"""The number of calls of each kernel in a spell."""
_SPELLS = 4
"""The number of spells of calls. The quietest spell counts: other load of the host can only add to the times."""


@dataclass(frozen=True)
class Standalone:
    """A site under one kernel, as a graph of its own.

    Attributes:
        module: the graph; it takes the values of ``inputs``, in this order.
        inputs: the nodes of the site's graph that it reads.
        operands: the inputs that are query, key or value, or that these are computed from.
    """

    module: fx.GraphModule
    inputs: tuple[fx.Node, ...]
    operands: frozenset[fx.Node]

    def random_inputs(self, requires_grad: bool) -> list[Tensor]:
        """Normally distributed operands and biases, conditions that are all true, and integers that are all zero.

        Symbolic sizes have the values of the first call.
        """
        values = []
        for node in self.inputs:
            like = tensor(node)
            size, stride = ([known_number(part) for part in parts] for parts in (like.shape, like.stride()))
            length = 1 + sum((count - 1) * step for count, step in zip(size, stride, strict=True))
            kind: Any = {"dtype": like.dtype, "device": like.device}
            if like.dtype.is_floating_point:
                value = torch.randn(length, **kind).as_strided(size, stride)
                value.requires_grad_(requires_grad and node in self.operands)
            else:
                value = torch.full((length,), int(like.dtype is torch.bool), **kind).as_strided(size, stride)
            values.append(value)
        return values


def cut_out(gm: fx.GraphModule, site: CanonicalAttention, kernel: Kernel) -> Standalone:
    """The kernel's calls for the site, as a graph of their own; ``gm`` is unchanged on return.

    Nodes that depend on no input of the graph, such as a mask made of positions, become part of the new graph.
    """
    builder = Builder(gm, before=site.result, like=site.anchor)
    try:
        output = kernel.emit(site, builder)
        return _as_graph(gm, site, output, set(builder.created))
    finally:
        for node in reversed(builder.created):
            gm.graph.erase_node(node)
            if node.op == "get_attr":
                gm.delete_submodule(str(node.target))


def _as_graph(gm: fx.GraphModule, site: CanonicalAttention, output: fx.Node, created: set[fx.Node]) -> Standalone:
    graph = fx.Graph()
    copies: dict[fx.Node, Any] = {}
    inputs: list[fx.Node] = []
    operands = {site.query.node, site.key.node, site.value.node}

    def copy(node: fx.Node) -> Any:
        if node not in copies:
            value = node.meta.get("val")
            if isinstance(value, (torch.SymInt, torch.SymFloat)):
                copies[node] = known_number(value)
            elif node in created or _is_constant(node, constants):
                for read in node.all_input_nodes:
                    copy(read)
                copies[node] = graph.node_copy(node)
                copies[node].args = fx.node.map_arg(node.args, copies.__getitem__)
                copies[node].kwargs = fx.node.map_arg(node.kwargs, copies.__getitem__)
            else:
                copies[node] = graph.placeholder(node.name)
                inputs.append(node)
        return copies[node]

    constants: dict[fx.Node, bool] = {}
    graph.output(copy(output))
    _inputs_first(graph)
    return Standalone(fx.GraphModule(gm, graph), tuple(inputs), frozenset(operands))


def _is_constant(node: fx.Node, known: dict[fx.Node, bool]) -> bool:
    """Whether the node's value depends on sizes alone."""
    if node not in known:
        known[node] = (
            node.op == "call_function"
            and is_function(node.target)
            and all(not is_tensor(read) or _is_constant(read, known) for read in node.all_input_nodes)
        )
    return known[node]


def _inputs_first(graph: fx.Graph) -> None:
    first = next(node for node in graph.nodes if node.op != "placeholder")
    for node in [node for node in graph.nodes if node.op == "placeholder"]:
        first.prepend(node)


def compiled_alone(alone: Standalone, inputs: Sequence[Tensor], policy: Policy) -> Callable[..., Tensor]:
    """The standalone graph compiled by Inductor, or the graph itself if the inner compiler is another."""
    if policy.inner_backend != "inductor":
        return alone.module
    without_graphs = {key: value for key, value in policy.inner_options.items() if key != "triton.cudagraphs"}
    inner = InnerCompiler(replace(policy, mode=None, inner_options=without_graphs))
    mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv())
    fakes = [mode.from_tensor(value, static_shapes=True) for value in inputs]
    # A separate compilation, whatever is being compiled around it. The backward pass is compiled now as well: PyTorch
    # does not expect one to be compiled later, during the compilation of another forward pass.
    whole = backward_compiled_at_once()
    with tracing(TracingContext(mode)), whole:
        compiled = inner.compile(alone.module, fakes, keep_attention=True)

    def call(*values: Tensor) -> Tensor:
        result: Any = compiled(*values)
        output: Tensor = result[0] if isinstance(result, (tuple, list)) else result
        return output

    return call


def smallest_run(device: torch.device, backward: bool, policy: Policy) -> Callable[[], Any]:
    """Runs a minimal compiled graph, with or without a backward pass: its time is that of entering a graph."""
    graph = fx.Graph()
    graph.output((graph.call_function(torch.ops.aten.mul.Tensor, (graph.placeholder("value"), 2.0)),))
    value = torch.ones(1, device=device, requires_grad=backward)
    alone = Standalone(fx.GraphModule(torch.nn.Module(), graph), (), frozenset())
    with torch.set_grad_enabled(backward):
        call = compiled_alone(alone, [value], policy)

    def run() -> Any:
        with torch.set_grad_enabled(backward):
            output = call(value)
            return torch.autograd.grad(output, [value], output.detach()) if backward else output

    return run


@dataclass
class Times:
    """Times of one kernel, in milliseconds.

    Attributes:
        call: times of calls, in the quietest spell.
        graph: times of replays of a CUDA graph; empty without one.
        memory: peak bytes that a call allocates besides its operands; None if the device does not report it.
    """

    call: list[float] = field(default_factory=list)
    graph: list[float] = field(default_factory=list)
    memory: int | None = None

    @property
    def call_ms(self) -> float:
        """The median."""
        return statistics.median(self.call)

    @property
    def graph_ms(self) -> float | None:
        """The median; None without a CUDA graph."""
        return statistics.median(self.graph) if self.graph else None


def time_together(
    runs: dict[str, Callable[[], Any]],
    device: torch.device,
    smallest: Callable[[], Any],
    seconds: float = 0.5,
    cuda_graphs: bool = True,
) -> dict[str, Times]:
    """Times calls in turns.

    Args:
        runs: the calls by name; each has been called before, so that nothing is left to compile.
        smallest: the result of :func:`smallest_run`.
        seconds: about how long to time the calls, and then the replays.
        cuda_graphs: whether to time replays of CUDA graphs as well, if the calls can be captured.
    """
    times = {name: Times(memory=_memory_of(run, device)) for name, run in runs.items()}
    if not runs:
        return times
    on_cuda = device.type == "cuda"
    clock = _CudaClock(device, smallest) if on_cuda else _Clock()

    def spells(count: int) -> list[dict[str, list[float]]]:
        return [_spell(runs, clock, seconds / _SPELLS) for _ in range(count)]

    calls = spells(1)
    further = (
        _SPELLS - 1 if len(next(iter(calls[0].values()))) > _FEWEST else 0
    )  # Long calls are not disturbed by the host.
    calls += spells(further // 2)
    if on_cuda and cuda_graphs:
        graphs = {name: replay for name, run in runs.items() if (replay := _captured(run, device)) is not None}
        for name, found in _spell(graphs, _CudaClock(device), seconds).items():
            times[name].graph = found
    calls += spells(further - further // 2)
    quietest = min(calls, key=lambda spell: sum(map(statistics.median, spell.values())))
    for name, found in quietest.items():
        times[name].call = found
    return times


class _Clock:
    """Wall-clock times."""

    def new_round(self) -> None:
        """Nothing changes from round to round."""

    def time(self, run: Callable[[], Any]) -> Callable[[], float]:
        start = time.perf_counter()
        run()
        taken = 1e3 * (time.perf_counter() - start)
        return lambda: taken


class _CudaClock:
    """Times between events on the device, with the L2 cache cleared.

    Args:
        smallest: the device is kept busy for as long as the host needs to start this; default: not at all.
    """

    def __init__(self, device: torch.device, smallest: Callable[[], Any] | None = None) -> None:
        self._device = device
        self._smallest = smallest
        self._cache = torch.empty(_CACHE_BYTES, dtype=torch.int8, device=device)
        self._entries: deque[float] = deque(maxlen=25)
        self._bytes_per_ms = _CACHE_BYTES / min(self._between(self._cache.zero_) for _ in range(5))
        for _ in range(5):
            self.new_round()

    def _between(self, run: Callable[[], Any]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        run()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end))

    def new_round(self) -> None:
        """Measures how long the host needs to start a call: its speed varies."""
        if self._smallest is not None:
            torch.cuda.synchronize(self._device)
            start = time.perf_counter()
            self._smallest()
            self._entries.append(1e3 * (time.perf_counter() - start))

    def time(self, run: Callable[[], Any]) -> Callable[[], float]:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        self._cache.zero_()  # For about 0.1 ms the host is ahead of the device, as it is within a model.
        left = int(statistics.median(self._entries) * self._bytes_per_ms) if self._entries else 0
        while left > 0:
            self._cache[:left].zero_()
            left -= _CACHE_BYTES
        start.record()
        run()
        end.record()

        def read() -> float:
            end.synchronize()
            return float(start.elapsed_time(end))

        return read


def _spell(runs: dict[str, Callable[[], Any]], clock: _Clock | _CudaClock, seconds: float) -> dict[str, list[float]]:
    """Times calls in turns, for about ``seconds``."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    first = time.perf_counter()
    for run in runs.values():
        for _ in range(2):
            clock.time(run)()
    a_round = (time.perf_counter() - first) / 2
    for _ in range(min(_MOST, max(_FEWEST, int(seconds / max(a_round, 1e-6))))):
        clock.new_round()
        for name, run in runs.items():
            # One at a time: a call in flight would hide the host's time to start the next.
            times[name].append(clock.time(run)())
    return times


def _memory_of(run: Callable[[], Any], device: torch.device) -> int | None:
    if device.type != "cuda":
        run()
        return None
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _captured(run: Callable[[], Any], device: torch.device) -> Callable[[], Any] | None:
    """A replay of the call from a CUDA graph; None if the call cannot be captured."""
    graph = torch.cuda.CUDAGraph()
    side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for _ in range(2):
            run()
    torch.cuda.current_stream(device).wait_stream(side)
    try:
        with torch.cuda.graph(graph):
            run()
    except RuntimeError:  # Not allowed within a capture: a synchronization, an allocation by the host.
        torch.cuda.synchronize(device)
        return None
    return graph.replay
