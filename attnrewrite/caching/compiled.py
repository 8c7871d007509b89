"""A graph whose attention values are stored: one callable that computes them, and one for each set of reused kinds."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx

from attnrewrite.analysis.kinds import Kind, SiteKind
from attnrewrite.caching.call import ModelCall, current_call
from attnrewrite.caching.graphs import AttentionValue, CachedAttention, find_values, nearest, parameters_of, with_values
from attnrewrite.caching.identity import Identity, is_size
from attnrewrite.caching.streams import CallValue
from attnrewrite.inner import CompiledFn
from attnrewrite.ir.nodes import Size, is_tensor, tensor
from attnrewrite.ir.ops import writes
from attnrewrite.ir.source import parameter_path, source_name
from attnrewrite.passes.result import Rewritten
from attnrewrite.report.rows import SiteReport

__all__ = ["Kept", "kept_attention"]

_Source = Callable[[Sequence[Any]], "int | float"]
"""Reads a number from a call's arguments."""

_NO_NUMBER = (
    "which part of a tensor is read depends on a number that is computed from data (`.item()`), so it cannot be told "
    "whether it is the same at the next step (call the model with the number)"
)


@dataclass(frozen=True)
class Kept:
    """The attention values of a rewritten graph, and a graph for each set of kinds that are reused together.

    Attributes:
        gm: the graph without reuse.
        identity: of the graph as it was captured.
        values: what is stored.
        graphs: by the kinds whose values they take as inputs.
        others: in words, the attentions of which nothing is stored.
        shapes: those of the values, and then the identity's sizes, in a call.
    """

    gm: fx.GraphModule
    identity: Identity
    values: tuple[AttentionValue, ...]
    graphs: Mapping[frozenset[Kind], fx.GraphModule]
    others: tuple[str, ...]
    shapes: _Shapes

    def compiled(
        self, compile_graph: Callable[[fx.GraphModule, Sequence[torch.Tensor]], CompiledFn], *, copies: bool
    ) -> CompiledFn:
        """The callable that replaces the graph, with all of ``graphs`` compiled.

        Args:
            compile_graph: compiles a graph; its second argument are examples of the inputs that were added.
            copies: whether the next call overwrites the outputs of a call (CUDA graphs).
        """
        variants = {}
        for reused, graph in self.graphs.items():
            added = graph.graph.find_nodes(op="placeholder")[len(self.gm.graph.find_nodes(op="placeholder")) :]
            variants[reused] = compile_graph(graph, [tensor(node) for node in added])
        return _CachingGraph(self, variants, copies)


@dataclass(frozen=True)
class _Verdict:
    """Whether the attention of a report row is stored.

    Attributes:
        path: of its module in the model.
        path_in_graph: of its module in the graph.
        kind: as which it is stored; None if it is not.
        why_not: why the config does not have it stored; empty if it does.
    """

    row: SiteReport
    detected: SiteKind
    result: fx.Node
    path: str
    path_in_graph: str
    kind: Kind | None
    why_not: str

    def for_report(self) -> str:
        """What the report row says."""
        detected = self.detected
        if self.kind is None:
            return f"no: {self.why_not}; it is {detected.kind} ({detected.reason})"
        reason = detected.reason if self.kind == detected.kind else "by its block identifiers"
        return f"{self.kind} ({reason})"

    @property
    def is_shared(self) -> bool:
        """Whether modules at other paths, of other kinds by these paths, may share the graph (it is a part's)."""
        return self.path != self.path_in_graph


def kept_attention(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    rewritten: Rewritten,
    identity: Identity,
    call: ModelCall,
) -> Kept:
    """What a call's plan stores of a rewritten graph; the report rows of the attentions say it.

    Args:
        identity: of the graph as it was captured.
    """
    plan = call.plan
    verdicts = _verdicts(gm, example_inputs, rewritten, call)
    for verdict in verdicts:
        verdict.row.cached = verdict.for_report()
    others = [
        f"{each.path or str(each.row.location)} is {each.detected.kind}, and {each.why_not}"
        for each in verdicts
        if each.kind is None
    ]
    attentions = [
        CachedAttention(each.row.name, each.result, each.kind or each.detected.kind, each.path_in_graph, each.detected)
        for each in verdicts
        if each.kind is not None or each.is_shared
    ]
    allowed = rewritten.begins_with_batch if plan.halves else None
    values = find_values(gm, attentions, allowed, affine=plan.method.extrapolates)
    shapes = _Shapes(gm, [*(tensor(value.node).shape for value in values), identity.sizes], identity.data_sizes)
    is_known = shapes.is_known
    if not is_known:
        values, shapes = [], _Shapes(gm, [()], frozenset())
    stored = {name for value in values for name in value.attentions}
    batch = "its dimension 0 is not known to begin with the batch, of which one half is kept"
    why_no_value = batch if plan.halves else "nothing reads its result, or its size depends on data"
    for verdict in verdicts:
        if verdict.kind is not None and verdict.row.name not in stored:
            verdict.row.cached = f"no: {why_no_value if is_known else _NO_NUMBER}"
    if attentions and not values:
        batch = "of no attention is it known that its dimension 0 begins with the batch, of which one half is kept"
        why_none = batch if plan.halves else "nothing reads an attention's result, or its size depends on data"
        others.append(why_none if is_known else f"in a graph, {_NO_NUMBER}")
    present = {value.kind for value in values}
    reused = set(plan.reused)
    if any(verdict.is_shared for verdict in verdicts):
        reused |= set(map(_exchanged, plan.reused))
    together = {frozenset[Kind](), *(kinds & present for kinds in reused)}
    graphs = {kinds: with_values(gm, values, kinds, plan.halves) for kinds in sorted(together, key=sorted)}
    return Kept(gm, identity, tuple(values), graphs, tuple(others), shapes)


def _verdicts(
    gm: fx.GraphModule, example_inputs: Sequence[Any], rewritten: Rewritten, call: ModelCall
) -> list[_Verdict]:
    """Which of a graph's attentions are stored, as far as kinds and paths decide it."""
    parameters = parameters_of(gm)
    verdicts = []
    for row, detected, node in rewritten.results:
        assert detected is not None
        path_in_graph = path = "" if row.location is None else row.location.module
        parameter = nearest(node, parameters)
        if parameter is not None:
            path = call.path_of(path_in_graph, example_inputs[parameters[parameter]], parameter_path(parameter))
        kind = call.plan.method.kind_of(path, detected.kind)
        why_not = call.plan.method.why_not(path, detected.kind) if kind is None else ""
        verdicts.append(_Verdict(row, detected, node, path, path_in_graph, kind, why_not))
    return verdicts


def _exchanged(kinds: frozenset[Kind]) -> frozenset[Kind]:
    """The kinds in a graph that was compiled for a temporal module and serves spatial ones, or the reverse."""
    exchanged: dict[Kind, Kind] = {"spatial": "temporal", "temporal": "spatial"}
    return frozenset(exchanged.get(kind, kind) for kind in kinds)


class _CachingGraph:
    """Replaces a graph within a model's call, which says what is reused."""

    def __init__(self, kept: Kept, variants: Mapping[frozenset[Kind], CompiledFn], copies: bool) -> None:
        self._values = kept.values
        self._kinds = {value.kind for value in kept.values}
        self._variants = variants
        self._others = kept.others
        self._copies = copies
        (results,) = kept.gm.graph.output_node().args
        assert isinstance(results, (tuple, list))
        self._result_count = len(results)
        self._fingerprint = kept.identity.fingerprint
        parameters = parameters_of(kept.gm)
        self._parameters = [parameters[node] for node in sorted(parameters, key=source_name)]
        self._shapes = kept.shapes

    def __call__(self, *args: Any) -> Any:
        call = current_call()
        assert call is not None, "Variants choose this graph within such calls alone"
        values = self._call_values(call, args)
        call.found([value for value in values if value.kind is not None], self._others)
        reused = self._reused_kinds(call, values)
        computed = [value for value in values if value.spec.kind not in reused]
        call.reserve([value for value in computed if value.kind is not None])
        inputs = [call.reuse(value) for value in values if value.spec.kind in reused]
        for value in computed:
            call.make_room(value)
        outputs = list(self._variants[reused](*args, *inputs))
        del inputs
        tensors = list(reversed(outputs[self._result_count :]))
        del outputs[self._result_count :]
        for value in computed:
            # Each output is freed at once, unless it is stored itself. Of a batch with both halves, the half is copied
            # here: a slice within the graph would keep the other half until the graph's end, where Inductor puts all
            # copies.
            output = tensors.pop()
            if call.plan.halves:
                output = output[output.shape[0] // 2 :].clone(memory_format=torch.contiguous_format)
            elif self._copies:
                output = output.clone()
            if value.kind is not None:
                call.store(value, output.contiguous())
        return outputs

    def _reused_kinds(self, call: ModelCall, values: Sequence[CallValue]) -> frozenset[Kind]:
        """The kinds whose values the graph takes as inputs in this call."""
        lacking = {value.spec.kind for value in values if not call.holds(value)}
        reused = frozenset(self._kinds - lacking)
        # Where no graph was compiled for just these kinds, everything is computed, as in a first call.
        return reused if reused in self._variants else frozenset()

    def _call_values(self, call: ModelCall, args: Sequence[Any]) -> list[CallValue]:
        *shapes, sizes = self._shapes(args)
        position = call.enter(self._fingerprint, [args[number] for number in self._parameters])
        values = []
        for spec, shape in zip(self._values, shapes, strict=True):
            # Modules that share the graph have parameters of their own.
            parameter = None if spec.parameter is None else args[spec.parameter]
            path = call.path_of(spec.path, parameter, spec.parameter_path)
            kind = spec.kind if path == spec.path else call.kind_at(path, spec.detected)
            kind = None if position is None or any(map(math.isnan, shape)) else kind
            key = position, spec.attentions, spec.number, spec.formula
            constants = [args[number] for number in spec.constants]
            values.append(CallValue(spec, kind, path, key, shape, sizes, constants))
        return values


class _Shapes:
    """The shapes of a graph's tensors in a call, computed from the call's arguments.

    Attributes:
        is_known: whether all of them can be, those aside that are data.
    """

    def __init__(self, gm: fx.GraphModule, shapes: Sequence[Sequence[Size]], data_sizes: frozenset[Any]) -> None:
        """Args:
        data_sizes: the symbols that need no number, see :class:`Identity`.
        """
        self._sources: dict[Any, _Source] = {}
        self._data_sizes = data_sizes
        placeholders = gm.graph.find_nodes(op="placeholder")
        for position, node in enumerate(placeholders):
            if is_size(node):
                self._note(node.meta["val"], _argument(position))
            elif is_tensor(node):
                for dim, size in enumerate(tensor(node).shape):
                    self._note(size, _dimension(position, dim))
        for node in gm.graph.nodes:
            # A float comes as a tensor of one number. Reading one on an accelerator would wait for it.
            if _reads_number(node) and node.args[0] in placeholders:
                given = node.args[0]
                if tensor(given).device.type == "cpu" and not any(writes(user) for user in given.users):
                    self._note(node.meta["val"], _item(placeholders.index(given)))
        self._shapes = [tuple(size if isinstance(size, int) else size.node.expr for size in shape) for shape in shapes]
        symbolic = [size for shape in self._shapes for size in shape if not isinstance(size, int)]
        self._fixed = not symbolic
        self.is_known = all(size.free_symbols <= self._sources.keys() | data_sizes for size in symbolic)

    def _note(self, size: Any, source: _Source) -> None:
        if isinstance(size, (torch.SymInt, torch.SymFloat)) and size.node.expr.is_Symbol:
            self._sources.setdefault(size.node.expr, source)

    def __call__(self, args: Sequence[Any]) -> list[tuple[int, ...]]:
        if self._fixed:
            return self._shapes
        sizes = {symbol: source(args) for symbol, source in self._sources.items()}
        return [
            tuple(size if isinstance(size, int) else self._number(size.xreplace(sizes)) for size in shape)
            for shape in self._shapes
        ]

    def _number(self, size: Any) -> Any:
        """The value of an expression without symbols; an expression of sizes that are data itself."""
        if isinstance(size, (int, float)):
            return size
        if size.free_symbols:
            return size if size.free_symbols <= self._data_sizes else float("nan")
        if isinstance(size, sympy.logic.boolalg.Boolean):
            return bool(size)
        try:
            return int(size) if size.is_integer else float(size)
        except (TypeError, ValueError):
            return float("nan")  # One that is not worked out equals nothing, not even that of another call.


def _reads_number(node: fx.Node) -> bool:
    return node.target is torch.ops.aten._local_scalar_dense.default or node.target is torch.ops.aten.item.default


def _argument(position: int) -> _Source:
    return lambda args: args[position] if isinstance(args[position], float) else int(args[position])


def _dimension(position: int, dim: int) -> _Source:
    return lambda args: int(args[position].shape[dim])


def _item(position: int) -> _Source:
    def read(args: Sequence[Any]) -> int | float:
        number = args[position].item()
        return number if isinstance(number, float) else int(number)

    return read
