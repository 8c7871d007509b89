"""A graph whose attention values are kept: one callable that computes them, and one for each set of kinds it reuses."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from attnrewrite.analysis.kinds import Kind
from attnrewrite.caching.graphs import Attention, Value, find_values, nearest, parameters_of, with_values
from attnrewrite.caching.session import ModelCall, current_call
from attnrewrite.caching.streams import Key
from attnrewrite.inner import CompiledFn
from attnrewrite.ir import is_tensor, parameter_path, tensor
from attnrewrite.rewrite import Rewritten

__all__ = ["Kept", "kept_attention"]


@dataclass(frozen=True)
class Kept:
    """What is kept of a rewritten graph's attentions, and a graph for each set of kinds that are reused together."""

    gm: fx.GraphModule
    values: tuple[Value, ...]
    graphs: Mapping[frozenset[Kind], fx.GraphModule]
    others: tuple[str, ...]

    def compiled(
        self, compile_graph: Callable[[fx.GraphModule, Sequence[torch.Tensor]], CompiledFn], *, copies: bool
    ) -> CompiledFn:
        """What is called in the graph's place, all its graphs compiled.

        Args:
            compile_graph: compiles a graph; it is given the examples of the inputs that are added, too.
            copies: the outputs of a call are overwritten by the next one (CUDA graphs).
        """
        variants = {}
        for reused, graph in self.graphs.items():
            added = graph.graph.find_nodes(op="placeholder")[len(self.gm.graph.find_nodes(op="placeholder")) :]
            variants[reused] = compile_graph(graph, [tensor(node) for node in added])
        return _KeepingGraph(self, variants, copies)


def kept_attention(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    rewritten: Rewritten,
    call: ModelCall,
) -> Kept:
    """What a call's plan keeps of a rewritten graph; the attentions' rows are told."""
    parameters = parameters_of(gm)
    attentions = []
    others = []
    for row, told, node in rewritten.results:
        assert told is not None
        own = "" if row.location is None else row.location.module
        parameter = nearest(node, parameters)
        path = own
        if parameter is not None:
            path = call.path_of(own, example_inputs[parameters[parameter]], parameter_path(parameter))
        kind = call.plan.method.kind_of(path, told.kind)
        if kind is None:
            row.cached = f"no: {told.kind} ({told.reason})"
            others.append(f"{path or str(row.location)} is {told.kind}, which is not kept")
        else:
            row.cached = f"{kind} ({told.reason})" if kind == told.kind else f"{kind} (by its block identifiers)"
        # A module that is compiled alone may share its graph with others, of other kinds by their paths.
        if kind is not None or path != own:
            attentions.append(Attention(node, kind or told.kind, own, told))
    values = find_values(gm, attentions, rewritten.begins_with_batch if call.plan.halves else None)
    if call.plan.halves and attentions and not values:
        others.append(
            "of no attention is it known that its dimension 0 begins with the batch, of which one half is kept"
        )
    present = {value.kind for value in values}
    together = {frozenset[Kind](), *(kinds & present for kinds in call.plan.reused)}
    halves = call.plan.halves
    graphs = {reused: with_values(gm, values, reused, halves) for reused in sorted(together, key=sorted)}
    return Kept(gm, tuple(values), graphs, tuple(others))


@dataclass(frozen=True)
class _Entry:
    """A value in one call: the kind and the path of the module that the graph is called for, the key, the shape."""

    value: Value
    kind: Kind | None
    path: str
    key: Key
    shape: tuple[int, ...]
    constants: Sequence[torch.Tensor]


class _KeepingGraph:
    """Called as the graph is, within a model's call that says what is reused."""

    def __init__(self, kept: Kept, variants: Mapping[frozenset[Kind], CompiledFn], copies: bool) -> None:
        self._values = kept.values
        self._kinds = {value.kind for value in kept.values}
        self._variants = variants
        self._others = kept.others
        self._copies = copies
        (results,) = kept.gm.graph.output_node().args
        assert isinstance(results, (tuple, list))
        self._outputs = len(results)
        self._shapes = _Shapes(kept.gm, [tensor(value.node) for value in kept.values])

    def __call__(self, *args: Any) -> Any:
        call = current_call()
        assert call is not None, "chosen for a call that keeps attention values"
        entries = self._entries(call, args)
        kept = [entry for entry in entries if entry.kind is not None]
        call.found(len(kept), self._others)
        lacking = {entry.value.kind for entry in entries if not self._is_there(call, entry)}
        reused = frozenset(self._kinds - lacking)
        if reused not in self._variants:
            # Some of what is there is not used. Computing is always right: it is what a first call does.
            reused = frozenset()
        computed = [entry for entry in entries if entry.value.kind not in reused]
        call.reserve([(entry.key, entry.value, entry.shape) for entry in computed if entry.kind is not None])
        taken = [entry for entry in entries if entry.value.kind in reused]
        inputs = [call.reuse(entry.key, entry.value, entry.path, entry.constants) for entry in taken]
        for entry in computed:
            call.make_room(entry.key)
        results = list(self._variants[reused](*args, *inputs))
        given = list(reversed(results[self._outputs :]))
        del results[self._outputs :], inputs
        for entry in computed:
            # What is not stored as it is goes at once.
            value = given.pop()
            if entry.kind is not None:
                value = value.clone() if self._copies else value.contiguous()
                call.keep(entry.key, value, entry.path, entry.kind, entry.constants)
        return results

    @staticmethod
    def _is_there(call: ModelCall, entry: _Entry) -> bool:
        return entry.kind in call.reused and call.holds(entry.key, entry.value, entry.shape, entry.constants)

    def _entries(self, call: ModelCall, args: Sequence[Any]) -> list[_Entry]:
        entries = []
        for value, shape in zip(self._values, self._shapes(args), strict=True):
            # Modules that share the graph have parameters of their own; one that is called again counts its calls.
            parameter = None if value.parameter is None else args[value.parameter]
            path = call.path_of(value.path, parameter, value.parameter_path)
            kind = value.kind if path == value.path else call.kind_at(path, value.told)
            own = (value.path, value.place, value.formula, None if parameter is None else id(parameter))
            constants = [args[position] for position in value.constants]
            entries.append(_Entry(value, kind, path, call.visit(own), shape, constants))
        return entries


class _Shapes:
    """The shapes of a graph's values for the sizes of a call."""

    def __init__(self, gm: fx.GraphModule, values: Sequence[torch.Tensor]) -> None:
        self._sources: dict[Any, Callable[[Sequence[Any]], int]] = {}
        for position, node in enumerate(gm.graph.find_nodes(op="placeholder")):
            if isinstance(node.meta.get("val"), torch.SymInt):
                self._note(node.meta["val"], _argument(position))
            elif is_tensor(node):
                for dim, size in enumerate(tensor(node).shape):
                    self._note(size, _dimension(position, dim))
        self._shapes = [
            tuple(size.node.expr if isinstance(size, torch.SymInt) else size for size in value.shape)
            for value in values
        ]
        self._fixed = all(isinstance(size, int) for shape in self._shapes for size in shape)

    def _note(self, size: Any, source: Callable[[Sequence[Any]], int]) -> None:
        if isinstance(size, torch.SymInt) and size.node.expr.is_Symbol:
            self._sources.setdefault(size.node.expr, source)

    def __call__(self, args: Sequence[Any]) -> list[tuple[int, ...]]:
        if self._fixed:
            return self._shapes
        sizes = {symbol: source(args) for symbol, source in self._sources.items()}
        return [
            tuple(size if isinstance(size, int) else int(size.xreplace(sizes)) for size in shape)
            for shape in self._shapes
        ]


def _argument(position: int) -> Callable[[Sequence[Any]], int]:
    return lambda args: int(args[position])


def _dimension(position: int, dim: int) -> Callable[[Sequence[Any]], int]:
    return lambda args: int(args[position].shape[dim])
