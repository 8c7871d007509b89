"""``ATTNREWRITE_VERIFY=1``: the first call of a compiled graph compares each rewritten site with the source.

The captured graph as it was runs on the call's own inputs, and wherever it comes to the result of a site, the nodes
that replaced the site run on the same values. What they give is compared, and the run goes on with the source's value:
an error is laid to the site that makes it, not to those behind it. Whatever else differs between the two graphs runs
too and is compared where it leaves the graph; calls that are the same in both run once.

The inputs are not written to, random numbers are drawn from a copy of the generators' state, and nothing is recorded
for a backward pass: gradients are not compared.
"""

from __future__ import annotations

import contextlib
import logging
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor

from attnrewrite.report import GraphReport, SiteReport

__all__ = ["TOLERANCES", "Difference", "Original", "SiteCheck", "Verification", "difference", "verified"]

log = logging.getLogger("attnrewrite")

aten = torch.ops.aten

CompiledFn = Callable[..., Any]

TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 4e-2}
"""How far a site may lie from the source, relative to the source's largest number, by the dtype that it computes in.

float32 on a GPU counts as float16 where TF32 is allowed, whose products have no more digits.
"""


@dataclass(frozen=True)
class Difference:
    """Between what a site gives and what the source gives.

    Attributes:
        absolute: the largest difference of two numbers; infinite where NaN or infinity meets another number.
        relative: ``absolute`` over the source's largest finite magnitude.
        reason: why the two cannot be compared number by number (another shape, an exception), or empty.
    """

    absolute: float
    relative: float
    reason: str = ""


@dataclass(frozen=True)
class SiteCheck:
    """What became of one rewritten site: compared, or skipped for a reason.

    Attributes:
        site: the site's row of the report; None for an output of the graph that differs outside of every site.
        what: the site or the output, in words.
        difference: what was found; None where the site was skipped.
        allowed: the largest relative difference that passes.
        inputs: what the site read, each as "name dtype (shape)".
        skipped: why it was not compared, or empty.
    """

    site: SiteReport | None
    what: str
    difference: Difference | None = None
    allowed: float = 0.0
    inputs: tuple[str, ...] = ()
    skipped: str = ""

    @property
    def failed(self) -> bool:
        return self.difference is not None and not self.difference.relative <= self.allowed

    def __str__(self) -> str:
        """One line: what differs, by how much, and on which inputs."""
        if self.difference is None:
            return f"{self.what}: {self.skipped}"
        found = self.difference.reason or (
            f"differs from the source by {self.difference.relative:.1e} of its largest number "
            f"(absolute {self.difference.absolute:.1e}, allowed {self.allowed:.0e})"
        )
        inputs = f"; inputs: {', '.join(self.inputs)}" if self.inputs else ""
        return f"{self.what} {found}{inputs}"


@dataclass
class Verification:
    """All checks of a graph. ``unable``: why the source's graph could not be run for comparison, or empty."""

    checks: list[SiteCheck] = field(default_factory=list)
    unable: str = ""

    @property
    def failed(self) -> list[SiteCheck]:
        return [check for check in self.checks if check.failed]

    def __str__(self) -> str:
        """One line for a verification that found nothing wrong."""
        compared = [check.difference.relative for check in self.checks if check.difference is not None]
        skipped = [str(check) for check in self.checks if check.skipped]
        count = len(compared)
        text = f"{'all ' * (count > 1 and not skipped)}{count} site{'s' * (count != 1)} agree{'s' * (count == 1)}"
        text = f"{text} with the source (largest error {max(compared):.1e})" if compared else "no site was compared"
        return "; ".join([f"verified: {text}", *skipped])


class Original:
    """A copy of a graph, which others that were made of the same captured graph are compared with."""

    def __init__(self, gm: fx.GraphModule, rows: Sequence[SiteReport] = ()) -> None:
        """Args:
        gm: the captured graph before it is rewritten in place, or one that was rewritten already.
        rows: the sites of the latter.
        """
        copies: dict[fx.Node, fx.Node] = {}
        graph = fx.Graph()
        graph.output(graph.graph_copy(gm.graph, copies))
        self.gm = fx.GraphModule(gm, graph)
        self._by_name = {node.name: copy for node, copy in copies.items()}
        self._place = {node: place for place, node in enumerate(graph.nodes)}
        self._came = {name for row in rows for name in row.nodes_after}
        # Found now: the nodes of the graph itself may change.
        self._replacements = {row.name: self._replacement(row) for row in rows if row.status == "rewritten"}

    def compare(self, other: fx.GraphModule, sites: Sequence[SiteReport], inputs: Sequence[Any]) -> Verification:
        """Compares a graph whose sites were rewritten with this one.

        Args:
            other: made of the captured graph that this one was made of.
            sites: its rows, of which those that were rewritten are compared.
            inputs: what the compiled graph is called with.
        """
        came = {name for row in sites for name in row.nodes_after} | self._came
        common = {name: node for name, node in self._by_name.items() if name not in came}
        twins = {node: common[node.name] for node in other.graph.nodes if node.name in common}
        results = {row.name: self._result(row) for row in sites}
        verification = Verification()
        plan = _Plan(self.gm, other, twins, results, sites)
        with _without_traces(_devices(self.gm, other)) as autocast:
            run = _Run(plan, autocast, verification)
            try:
                run(inputs)
            except _SourceError as error:
                verification.unable = str(error)
        return verification

    def _result(self, row: SiteReport) -> fx.Node | None:
        """The node of this graph that holds the result of the site."""
        if row.name in self._replacements:
            return self._replacements[row.name]
        nodes = [self._by_name[name] for name in row.nodes_before if name in self._by_name]
        return max(nodes, key=self._place.__getitem__, default=None)

    def _replacement(self, row: SiteReport) -> fx.Node | None:
        return _read_outside([self._by_name[name] for name in row.nodes_after if name in self._by_name])


def _devices(*gms: fx.GraphModule) -> set[torch.device]:
    values = [node.meta.get("val") for gm in gms for node in gm.graph.nodes]
    return {value.device for value in values if isinstance(value, torch.Tensor)}


def verified(
    original: Original, gm: fx.GraphModule, report: GraphReport, unchanged: CompiledFn, rewritten: CompiledFn
) -> CompiledFn:
    """A callable whose first call compares the two graphs and decides which of the compiled ones serves all calls.

    Args:
        original: the captured graph, copied before rewriting.
        gm: the graph that was rewritten.
        report: its rows are compared; what is found is written into it.
        unchanged, rewritten: the graph as Dynamo gave it, and the rewritten one, compiled.
    """
    lock = threading.Lock()
    pending: Original | None = original
    chosen = rewritten

    def call(*inputs: Any) -> Any:
        nonlocal pending, chosen
        if pending is not None and not any(isinstance(value, FakeTensor) for value in inputs):
            with lock:
                if pending is not None:
                    result = pending.compare(gm, report.sites, inputs)
                    _tell(result, report)
                    chosen = unchanged if result.failed else rewritten
                    pending = None
        return chosen(*inputs)

    return call


def _tell(result: Verification, report: GraphReport) -> None:
    """The outcome for the log and the report."""
    if result.unable:
        note = f"not verified, and compiled as rewritten: the graph as it was did not run: {result.unable}"
        log.warning("%s: %s", report.name, note)
        report.notes.append(note)
        return
    if not result.failed:
        log.info("%s: %s", report.name, result)
        report.notes.append(str(result))
        return
    for check in result.failed:
        log.warning("%s: %s; the graph is kept as it was", report.name, check)
        report.notes.append(f"verification failed, so the graph is kept as it was: {check}")
    failed = {id(check.site): check for check in result.failed}
    for row in report.rewritten:
        row.status = "kept"
        row.reason = "verification failed elsewhere in the graph"
        if id(row) in failed:
            row.reason = f"verification: {failed[id(row)]}"


# Comparing two values.


def difference(actual: Any, expected: torch.Tensor) -> Difference:
    """How far ``actual`` lies from ``expected``: NaN must meet NaN, and an infinity the same one."""
    if not isinstance(actual, torch.Tensor):
        return Difference(math.inf, math.inf, f"gives {type(actual).__name__} where the source gives a tensor")
    for kind in ("shape", "dtype", "device"):
        ours, source = getattr(actual, kind), getattr(expected, kind)
        if ours != source:
            ours, source = (tuple(value) if kind == "shape" else value for value in (ours, source))
            return Difference(math.inf, math.inf, f"gives the {kind} {ours} where the source gives {source}")
    if expected.numel() == 0:
        return Difference(0.0, 0.0)
    if not expected.dtype.is_floating_point and not expected.dtype.is_complex:
        equal = torch.equal(actual, expected)
        return Difference(0.0, 0.0) if equal else Difference(math.inf, math.inf, "gives other numbers than the source")
    wide = torch.promote_types(expected.dtype, torch.float32)
    actual, expected = actual.to(wide), expected.to(wide)
    agree = (actual == expected) | (actual.isnan() & expected.isnan())
    distance = torch.where(agree, 0.0, (actual - expected).abs())
    absolute = torch.where(distance.isnan(), math.inf, distance).max().item()
    largest = torch.where(expected.isfinite(), expected.abs(), 0.0).max().item()
    if absolute == 0:
        return Difference(0.0, 0.0)
    return Difference(absolute, absolute / largest if largest else math.inf)


def _allowed(value: torch.Tensor, dtype_name: str = "") -> float:
    """The tolerance for a result: that of the coarser of its own dtype and the one that the site computes in."""
    named = getattr(torch, dtype_name, None)
    dtypes = [value.dtype, *([named] if isinstance(named, torch.dtype) else [])]
    if value.device.type == "cuda" and torch.float32 in dtypes and torch.backends.cuda.matmul.allow_tf32:
        dtypes.append(torch.float16)
    return max(TOLERANCES.get(dtype, max(TOLERANCES.values())) for dtype in dtypes)


# Running the two graphs side by side.


@dataclass
class _Site:
    """A rewritten site.

    Attributes:
        result: the source's node that was replaced.
        replacement: the node that came in its place; ``created`` are all that came.
        inputs: what those nodes read of the rest of the graph.
    """

    row: SiteReport
    result: fx.Node
    replacement: fx.Node
    created: tuple[fx.Node, ...]
    inputs: list[fx.Node] = field(default_factory=list)

    @property
    def what(self) -> str:
        where = f" at {self.row.location}" if self.row.location else ""
        return f"{self.row.name} ({self.row.pattern}{where}, {self.row.kernel})"


@dataclass
class _Step:
    """A call, or with ``site`` the comparison of that site. Nodes among the arguments are keys of the values."""

    node: fx.Node
    args: Any = ()
    kwargs: Any = field(default_factory=dict)
    module: fx.GraphModule | None = None
    site: _Site | None = None
    ours: bool = False

    def reads(self) -> list[fx.Node]:
        if self.site is not None:
            return [self.site.result, self.site.replacement, *self.site.inputs]
        return _leaves((self.args, self.kwargs))


class _Plan:
    """What is run, in which order, and which values are compared.

    A node of the rewritten graph that calls the same with the same arguments as in the source has the source's value;
    so has, once compared, the replacement of a site. All others have values of their own.
    """

    def __init__(
        self,
        source: fx.GraphModule,
        rewritten: fx.GraphModule,
        twins: dict[fx.Node, fx.Node],
        results: dict[str, fx.Node | None],
        rows: Sequence[SiteReport],
    ) -> None:
        """Args:
        twins: nodes of the rewritten graph that came from the same node as one of the source.
        results: by the name of a site, the node of the source that holds its result.
        rows: the rewritten graph's sites.
        """
        self.source = source
        self.skipped: list[SiteCheck] = []
        self._place = {node: place for place, node in enumerate(source.graph.nodes)}
        self._sites = self._matched(rewritten, results, rows)
        self._value_of: dict[fx.Node, fx.Node] = {}
        self._twins = twins
        ours = self._own_steps(rewritten)
        self.steps: list[_Step] = []
        for node in source.graph.nodes:
            if node.op != "output":
                self.steps.append(_Step(node, node.args, node.kwargs, source))
            self.steps.extend(ours.get(node, ()))
        self.outputs = self._own_outputs(rewritten)

    def _matched(
        self, rewritten: fx.GraphModule, results: dict[str, fx.Node | None], rows: Sequence[SiteReport]
    ) -> list[_Site]:
        nodes = {node.name: node for node in rewritten.graph.nodes}
        sites = []
        for row in rows:
            if row.status != "rewritten":
                continue
            created = tuple(nodes[name] for name in row.nodes_after if name in nodes)
            output = _read_outside(created)
            result = results[row.name]
            if output is None or result is None:
                self.skipped.append(SiteCheck(row, row.name, skipped="its nodes could not be matched, not compared"))
                continue
            sites.append(_Site(row, result, output, created))
        return sites

    def _own_steps(self, rewritten: fx.GraphModule) -> dict[fx.Node, list[_Step]]:
        """For nodes of the source the steps that follow on them, and where the value of each of our nodes is found."""
        site_of = {node: site for site in self._sites for node in site.created}
        steps: dict[fx.Node, list[_Step]] = {}
        first = next(iter(self.source.graph.nodes))
        position: dict[fx.Node, fx.Node] = {}
        for node in rewritten.graph.nodes:
            if node.op == "output":
                continue
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), self._value_of.__getitem__)
            twin = self._twins.get(node)
            if twin is not None and (_is_random(node) or _same_call(node, args, kwargs, twin)):
                self._value_of[node] = twin
                continue
            step = _Step(node, args, kwargs, rewritten, ours=True)
            before = [position.get(read, read) for read in step.reads()]
            site = site_of.get(node)
            if site is not None:
                before.append(site.result)
                site.inputs += [read for read in step.reads() if read not in (*site.created, *site.inputs)]
            place = max(before, key=self._place.__getitem__, default=first)
            position[node] = place
            steps.setdefault(place, []).append(step)
            self._value_of[node] = node
            if site is not None and node is site.replacement:
                self._value_of[node] = site.result
        for site in self._sites:
            steps[site.result].append(_Step(site.replacement, site=site))
        return steps

    def _own_outputs(self, rewritten: fx.GraphModule) -> list[tuple[str, fx.Node, fx.Node]]:
        """Outputs of the graph whose value is not the source's: (in words, ours, the source's)."""
        ours = _leaves(rewritten.graph.output_node().args)
        source = _leaves(self.source.graph.output_node().args)
        pairs = zip(ours, source, strict=True)
        return [
            (f"output {index} of the graph", self._value_of[node], expected)
            for index, (node, expected) in enumerate(pairs)
            if self._value_of[node] is not expected
        ]


def _read_outside(created: Sequence[fx.Node]) -> fx.Node | None:
    """Which of a site's nodes holds its result: the only one that others read; of several the last."""
    tensors = [node for node in created if _is_tensor(node)]
    read = [node for node in tensors if any(user not in created for user in node.users)]
    return next(reversed(read or tensors), None)


class _SourceError(Exception):
    """The source's graph raised."""


class _Autocast:
    """A graph's autocast regions; those that it leaves open are closed at the end."""

    def __init__(self) -> None:
        self._open: list[Any] = []

    def enter(self, *args: Any) -> Any:
        self._open.append(torch.amp.autocast_mode._enter_autocast(*args))  # type: ignore[no-untyped-call]
        return self._open[-1]

    def exit(self, region: Any) -> None:
        self._open.remove(region)
        torch.amp.autocast_mode._exit_autocast(region)  # type: ignore[no-untyped-call]

    def close(self) -> None:
        while self._open:
            self.exit(self._open[-1])


@contextlib.contextmanager
def _without_traces(devices: set[torch.device]) -> Iterator[_Autocast]:
    """No gradients, and afterwards the generators and the autocast regions are as they were."""
    autocast = _Autocast()
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.random.fork_rng(devices=[]))
        for kind in {device.type for device in devices} - {"cpu", "meta"}:
            numbers = sorted({device.index or 0 for device in devices if device.type == kind})
            stack.enter_context(torch.random.fork_rng(devices=numbers, device_type=kind))
        stack.callback(autocast.close)
        yield autocast


class _Run:
    """Values of both graphs, each kept for as long as something reads it."""

    def __init__(self, plan: _Plan, autocast: _Autocast, result: Verification) -> None:
        self._plan = plan
        self._autocast = autocast
        self._result = result
        self._values: dict[fx.Node, Any] = {}
        self._errors: dict[fx.Node, str] = {}
        self._last: dict[fx.Node, int] = {}
        for index, step in enumerate(plan.steps):
            for node in step.reads():
                self._last[node] = index
        for _, ours, source in plan.outputs:
            self._last[ours] = self._last[source] = len(plan.steps)

    def __call__(self, inputs: Sequence[Any]) -> None:
        remaining = iter(inputs)
        self._result.checks += self._plan.skipped
        for index, step in enumerate(self._plan.steps):
            if step.site is not None:
                self._compare(step.site)
            elif step.node.op == "placeholder":
                self._values[step.node] = next(remaining)
            else:
                self._call(step)
            for node in (*step.reads(), step.node):
                if self._last.get(node, -1) <= index:
                    self._values.pop(node, None)
        for what, ours, source in self._plan.outputs:
            expected = self._values[source]
            if isinstance(expected, torch.Tensor):
                found = self._difference(ours, expected)
                self._result.checks.append(SiteCheck(None, what, found, _allowed(expected)))

    def _call(self, step: _Step) -> None:
        broken = (
            next((self._errors[node] for node in step.reads() if node in self._errors), None) if step.ours else None
        )
        if broken is not None:
            self._errors[step.node] = broken
            return
        try:
            self._values[step.node] = self._evaluate(step)
        except Exception as error:
            message = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            log.debug("verification: %s", step.node.format_node(), exc_info=True)
            if not step.ours:
                raise _SourceError(message) from error
            self._errors[step.node] = message

    def _evaluate(self, step: _Step) -> Any:
        node = step.node
        if node.op == "get_attr":
            value: Any = step.module
            for name in str(node.target).split("."):
                value = getattr(value, name)
            return value
        assert node.op == "call_function" and callable(node.target), f"{node.op} in the IR"
        if node.target is torch._C._set_grad_enabled:
            return None
        args, kwargs = fx.node.map_arg((step.args, step.kwargs), self._values.__getitem__)
        if node.target is torch.amp.autocast_mode._enter_autocast:
            return self._autocast.enter(*args)
        if node.target is torch.amp.autocast_mode._exit_autocast:
            return self._autocast.exit(*args)
        return node.target(*_unwritten(node.target, args), **kwargs)

    def _compare(self, site: _Site) -> None:
        if site.row.dropout:
            reason = f"drops weights at random (dropout {site.row.dropout}), not compared"
            self._result.checks.append(SiteCheck(site.row, site.what, skipped=reason))
            return
        expected = self._values[site.result]
        found = self._difference(site.replacement, expected)
        inputs = tuple(_described(node, self._values[node]) for node in site.inputs if _is_tensor(node))
        # What the user's tolerance admitted is not thrown out here.
        allowed = max(_allowed(expected, site.row.dtype), site.row.tolerance)
        self._result.checks.append(SiteCheck(site.row, site.what, found, allowed, inputs))

    def _difference(self, ours: fx.Node, expected: torch.Tensor) -> Difference:
        if ours in self._errors:
            return Difference(math.inf, math.inf, f"raises {self._errors[ours]}")
        return difference(self._values[ours], expected)


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), torch.Tensor)


def _is_random(node: fx.Node) -> bool:
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


def _same_call(node: fx.Node, args: Any, kwargs: Any, twin: fx.Node) -> bool:
    """Splicing turns views of a result into reshapes, whose values are the same."""
    reshaped = twin.target is aten.view.default and node.target is aten.reshape.default
    same_target = node.op == twin.op and (node.target == twin.target or reshaped)
    return same_target and args == twin.args and kwargs == twin.kwargs


def _unwritten(target: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments, with copies of those that the operator writes to."""
    schema = getattr(target, "_schema", None)
    if schema is None or not schema.is_mutable:
        return args
    written = [argument.alias_info is not None and argument.alias_info.is_write for argument in schema.arguments]
    return tuple(
        value.clone() if is_written and isinstance(value, torch.Tensor) else value
        for value, is_written in zip(args, written, strict=False)
    )


def _leaves(arguments: Any) -> list[fx.Node]:
    found: list[fx.Node] = []
    fx.node.map_arg(arguments, found.append)
    return found


def _described(node: fx.Node, value: torch.Tensor) -> str:
    return f"{node.name} {value.dtype} {tuple(value.shape)}".replace("torch.", "")
