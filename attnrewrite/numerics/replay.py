"""Runs the source graph and the rewritten graph side by side."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from attnrewrite.ir.ops import is_random
from attnrewrite.numerics.formula import formula_between, in_float64
from attnrewrite.numerics.judge import HALF, disagreement, disagreements
from attnrewrite.numerics.outcome import Difference, SiteCheck, Verification, allowed_difference, difference
from attnrewrite.numerics.site_gradients import gradients, gradients_in_float64
from attnrewrite.report.rows import SiteReport
from attnrewrite.torch_private import enter_autocast, exit_autocast, schema_of, set_grad_enabled

aten = torch.ops.aten
log = logging.getLogger("attnrewrite")


# Running the two graphs side by side.


@dataclass
class _ReplacedSite:
    """A rewritten site.

    Attributes:
        result: the source's node that was replaced.
        replacement: the node that replaced it.
        created: all nodes that replaced the site.
        inputs: the nodes outside the site that these read.
        formula: the source's nodes from the inputs to the result, if the site is in half precision or trains.
        steps: the calls of the created nodes.
        asked: the inputs whose gradients are compared.
    """

    row: SiteReport
    result: fx.Node
    replacement: fx.Node
    created: tuple[fx.Node, ...]
    inputs: list[fx.Node] = field(default_factory=list)
    formula: list[fx.Node] = field(default_factory=list)
    steps: list[_ReplayStep] = field(default_factory=list)
    asked: list[fx.Node] = field(default_factory=list)

    @property
    def what(self) -> str:
        where = f" at {self.row.location}" if self.row.location else ""
        return f"{self.row.name} ({self.row.pattern}{where}, {self.row.kernel})"


@dataclass
class _ReplayStep:
    """A call or, with ``site``, the comparison of that site. Nodes among the arguments are keys of the values."""

    node: fx.Node
    args: Any = ()
    kwargs: Any = field(default_factory=dict)
    module: fx.GraphModule | None = None
    site: _ReplacedSite | None = None
    ours: bool = False

    def reads(self) -> list[fx.Node]:
        if self.site is not None:
            ends = [read for node in self.site.formula for read in node.all_input_nodes or (node,)]
            within = {node for node in self.site.formula if node.all_input_nodes}
            others = [node for node in ends if node not in within]
            return [self.site.result, self.site.replacement, *self.site.inputs, *others]
        return _leaves((self.args, self.kwargs))


class ReplayPlan:
    """The calls to run, in their order, and the values to compare.

    A node of the rewritten graph that makes the same call as its twin in the source has the source's value. So does the
    replacement of a site once it is compared. All other nodes have their own values.
    """

    def __init__(
        self,
        source: fx.GraphModule,
        rewritten: fx.GraphModule,
        twins: dict[fx.Node, fx.Node],
        results: dict[str, fx.Node | None],
        rows: Sequence[SiteReport],
        carrying_gradients: Set[fx.Node] = frozenset(),
    ) -> None:
        """Args:
        twins: for nodes of the rewritten graph, the source's node that was made from the same captured node.
        results: by the name of a site, the node of the source that holds its result.
        rows: the rows of the rewritten graph.
        carrying_gradients: the source's nodes that gradients reach.
        """
        self.source = source
        self.skipped: list[SiteCheck] = []
        self.place = {node: place for place, node in enumerate(source.graph.nodes)}
        self._sites = self._matched(rewritten, results, rows)
        self._value_of: dict[fx.Node, fx.Node] = {}
        self._twins = twins
        self._carrying_gradients = carrying_gradients
        ours = self._own_steps(rewritten)
        self.steps: list[_ReplayStep] = []
        for node in source.graph.nodes:
            if node.op != "output":
                self.steps.append(_ReplayStep(node, node.args, node.kwargs, source))
            self.steps.extend(ours.get(node, ()))
        self.outputs = self._own_outputs(rewritten)

    def _matched(
        self, rewritten: fx.GraphModule, results: dict[str, fx.Node | None], rows: Sequence[SiteReport]
    ) -> list[_ReplacedSite]:
        nodes = {node.name: node for node in rewritten.graph.nodes}
        sites = []
        for row in rows:
            if row.status != "rewritten":
                continue
            created = tuple(nodes[name] for name in row.nodes_after if name in nodes)
            output = read_outside(created)
            result = results[row.name]
            if output is None or result is None:
                self.skipped.append(
                    SiteCheck(row, row.name, skipped="not compared: its nodes could not be matched with the source's")
                )
                continue
            sites.append(_ReplacedSite(row, result, output, created))
        return sites

    def _own_steps(self, rewritten: fx.GraphModule) -> dict[fx.Node, list[_ReplayStep]]:
        """The steps that follow each node of the source; also records the node that holds each of our nodes' values."""
        site_of = {node: site for site in self._sites for node in site.created}
        steps: dict[fx.Node, list[_ReplayStep]] = {}
        first = next(iter(self.source.graph.nodes))
        position: dict[fx.Node, fx.Node] = {}
        for node in rewritten.graph.nodes:
            if node.op == "output":
                continue
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), self._value_of.__getitem__)
            twin = self._twins.get(node)
            if twin is not None and (is_random(node) or _same_call(node, args, kwargs, twin)):
                self._value_of[node] = twin
                continue
            step = _ReplayStep(node, args, kwargs, rewritten, ours=True)
            before = [position.get(read, read) for read in step.reads()]
            site = site_of.get(node)
            if site is not None:
                before.append(site.result)
                site.steps.append(step)
                site.inputs += [read for read in step.reads() if read not in (*site.created, *site.inputs)]
            place = max(before, key=self.place.__getitem__, default=first)
            position[node] = place
            steps.setdefault(place, []).append(step)
            self._value_of[node] = node
            if site is not None and node is site.replacement:
                self._value_of[node] = site.result
        for site in self._sites:
            trains = site.result in self._carrying_gradients
            if trains or getattr(torch, site.row.dtype, None) in HALF:
                site.formula = formula_between(site.inputs, site.result)
            if trains:
                read = {node for step in site.formula for node in step.all_input_nodes}
                site.asked = [node for node in site.inputs if node in read & self._carrying_gradients]
            steps[site.result].append(_ReplayStep(site.replacement, site=site))
        return steps

    def _own_outputs(self, rewritten: fx.GraphModule) -> list[tuple[str, fx.Node, fx.Node]]:
        """The outputs of the graph whose value is not the source's: (name in messages, our node, the source's node)."""
        ours: Any = rewritten.graph.output_node().args[0]
        source: Any = self.source.graph.output_node().args[0]
        # Weights that nobody reads are left out of ours.
        pairs = zip(ours, source, strict=True)
        return [
            (f"output {index} of the graph", self._value_of[node], expected)
            for index, (node, expected) in enumerate(pairs)
            if isinstance(node, fx.Node) and self._value_of[node] is not expected
        ]


def read_outside(created: Sequence[fx.Node]) -> fx.Node | None:
    """The node of a site that holds its result: the last one that nodes outside the site use; None without tensors."""
    tensors = [node for node in created if _is_tensor(node)]
    read = [node for node in tensors if any(user not in created for user in node.users)]
    return next(reversed(read or tensors), None)


class SourceError(Exception):
    """The source graph raised an exception."""


class _Autocast:
    """The autocast regions of a graph; regions that it leaves open are closed at the end."""

    def __init__(self) -> None:
        self._open: list[Any] = []

    def enter(self, *args: Any) -> Any:
        self._open.append(enter_autocast(*args))  # type: ignore[no-untyped-call]
        return self._open[-1]

    def exit(self, region: Any) -> None:
        self._open.remove(region)
        exit_autocast(region)  # type: ignore[no-untyped-call]

    def close(self) -> None:
        while self._open:
            self.exit(self._open[-1])


@contextlib.contextmanager
def without_traces(devices: set[torch.device]) -> Iterator[_Autocast]:
    """No gradients, and afterward the generators and the autocast regions are as they were."""
    autocast = _Autocast()
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.random.fork_rng(devices=[]))
        for kind in {device.type for device in devices} - {"cpu", "meta"}:
            numbers = sorted({device.index or 0 for device in devices if device.type == kind})
            stack.enter_context(torch.random.fork_rng(devices=numbers, device_type=kind))
        stack.callback(autocast.close)
        yield autocast


class Replay:
    """Values of both graphs, each kept for as long as something reads it."""

    def __init__(self, plan: ReplayPlan, autocast: _Autocast, result: Verification) -> None:
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
                self._result.checks.append(SiteCheck(None, what, found, allowed_difference(expected)))

    def _call(self, step: _ReplayStep) -> None:
        broken = (
            next((self._errors[node] for node in step.reads() if node in self._errors), None) if step.ours else None
        )
        if broken is not None:
            self._errors[step.node] = broken
            return
        try:
            self._values[step.node] = self._evaluate(step)
        except Exception as error:
            message = _one_line(error)
            log.debug("verification: %s", step.node.format_node(), exc_info=True)
            if not step.ours:
                raise SourceError(message) from error
            self._errors[step.node] = message

    def _evaluate(self, step: _ReplayStep) -> Any:
        node = step.node
        if node.op == "get_attr":
            value: Any = step.module
            for name in str(node.target).split("."):
                value = getattr(value, name)
            return value
        if node.target is set_grad_enabled:
            return None
        args, kwargs = fx.node.map_arg((step.args, step.kwargs), self._values.__getitem__)
        if node.op == "call_method":  # Calls on tensor subclasses are those of the source.
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        assert node.op == "call_function" and callable(node.target), f"{node.op} in the IR"
        if node.target is enter_autocast:
            return self._autocast.enter(*args)
        if node.target is exit_autocast:
            return self._autocast.exit(*args)
        return node.target(*_with_copies_of_written(node.target, args), **kwargs)

    def _compare(self, site: _ReplacedSite) -> None:
        if site.row.dropout:
            reason = f"not compared: its dropout of {site.row.dropout} is random"
            self._result.checks.append(SiteCheck(site.row, site.what, skipped=reason))
            return
        expected = self._values[site.result]
        found = self._difference(site.replacement, expected)
        inputs = tuple(_description(node, self._values[node]) for node in site.inputs if _is_tensor(node))
        # A kernel that the user's tolerance admitted passes here.
        allowed = max(allowed_difference(expected, site.row.dtype), site.row.tolerance)
        if not found.relative <= allowed and not found.reason and self._is_as_right_as_source(site):
            allowed = found.relative
        check = SiteCheck(site.row, site.what, found, allowed, inputs)
        self._result.checks.append(check)
        if site.asked and not check.failed:
            self._compare_gradients(site, inputs)

    def _compare_gradients(self, site: _ReplacedSite, inputs: tuple[str, ...]) -> None:
        what = f"{site.what}: its gradients"

        def skip(why: str) -> None:
            self._result.checks.append(SiteCheck(site.row, what, skipped=f"not compared: {why}", gradients=True))

        foreign = [node.name for node in site.inputs if _is_floating(node) and node not in self._plan.place]
        if foreign:
            skip(f"{foreign[0]}, which the rewritten graph computes anew, is computed otherwise in the source")
            return
        if site.row.tolerance:
            skip("a kernel of lower precision was asked for")
            return
        dtype = getattr(torch, site.row.dtype)
        source = [(node, node.args, node.kwargs) for node in site.formula if node.op == "call_function"]
        try:
            own = gradients(source, site.result, site.asked, self._values, _called)
            truth = gradients_in_float64(site.formula, site.asked, self._values, _called)
        except (RuntimeError, TypeError, KeyError) as error:
            skip(f"the source's raise {_one_line(error)}")
            return
        ours = [(step.node, step.args, step.kwargs) for step in site.steps]
        try:
            new = gradients(ours, site.replacement, site.asked, self._values, _called)
        except (RuntimeError, TypeError, KeyError) as error:
            found = Difference(math.inf, math.inf, f"raise {_one_line(error)}")
        else:
            names = [node.name for node in site.asked]
            wrong = disagreements(new, own, truth, _judged(dtype, own), beside=1.0, roundings=_ROUNDINGS, names=names)
            found = (
                Difference(math.inf, math.inf, f"differ from the source's: {wrong}") if wrong else Difference(0.0, 0.0)
            )
        self._result.checks.append(SiteCheck(site.row, what, found, 0.0, inputs, gradients=True))

    def _is_as_right_as_source(self, site: _ReplacedSite) -> bool:
        """Whether the result, which is not the source's, lies no further from the source's formula in float64."""
        if not site.formula:
            return False

        try:
            truth = in_float64(site.formula, self._values, _called)
        except (RuntimeError, TypeError, KeyError) as error:
            # An operator that knows no float64, say: the source's result stays the measure.
            reason = _one_line(error)
            log.warning("verification: %s is held to the source's rounding, not in float64: %s", site.what, reason)
            return False
        own = self._values[site.result]
        return not disagreement(self._values[site.replacement], own, truth, getattr(torch, site.row.dtype))

    def _difference(self, ours: fx.Node, expected: torch.Tensor) -> Difference:
        if ours in self._errors:
            return Difference(math.inf, math.inf, f"raises {self._errors[ours]}")
        return difference(self._values[ours], expected)


_ROUNDINGS = 16.0
"""GPU kernels add up the parts of a gradient in any order."""


def _judged(dtype: torch.dtype, values: Sequence[torch.Tensor]) -> torch.dtype:
    """The dtype whose rule holds: TF32 has the digits of float16."""
    tf32 = torch.backends.cuda.matmul.allow_tf32 and any(value.device.type == "cuda" for value in values)
    return torch.float16 if tf32 and dtype is torch.float32 else dtype


def _called(node: fx.Node, args: Any, kwargs: Any) -> Any:
    target: Any = node.target
    return target(*_with_copies_of_written(target, args), **kwargs)


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), torch.Tensor)


def _is_floating(node: fx.Node) -> bool:
    return _is_tensor(node) and bool(node.meta["val"].is_floating_point())


def _same_call(node: fx.Node, args: Any, kwargs: Any, twin: fx.Node) -> bool:
    """Whether two nodes make the same call; splicing turns views of a result into reshapes, which count as the same."""
    reshaped = twin.target is aten.view.default and node.target is aten.reshape.default
    same_target = node.op == twin.op and (node.target == twin.target or reshaped)
    return same_target and args == twin.args and kwargs == twin.kwargs


def _with_copies_of_written(target: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments, with copies of the tensors that the operator writes to."""
    schema = schema_of(target)
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


def _description(node: fx.Node, value: torch.Tensor) -> str:
    return f"{node.name} {value.dtype} {tuple(value.shape)}".replace("torch.", "")
