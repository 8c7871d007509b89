"""A graph whose attention values are kept: one callable that computes them, and one for each set of kinds it reuses."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from attnrewrite.analysis.kinds import Kind
from attnrewrite.caching.call import ModelCall, current_call
from attnrewrite.caching.graphs import Attention, Value, find_values, nearest, parameters_of, with_values
from attnrewrite.caching.identity import Identity
from attnrewrite.caching.streams import Entry
from attnrewrite.inner import CompiledFn
from attnrewrite.ir.nodes import Size, is_tensor, tensor
from attnrewrite.ir.source import parameter_path, source_name
from attnrewrite.passes.result import Rewritten

__all__ = ["Kept", "kept_attention"]


@dataclass(frozen=True)
class Kept:
    """What is kept of a rewritten graph's attentions, and a graph for each set of kinds that are reused together.

    ``identity`` is that of the graph as it was captured; ``others`` says which attentions are not kept.
    """

    gm: fx.GraphModule
    identity: Identity
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
    identity: Identity,
    call: ModelCall,
) -> Kept:
    """What a call's plan keeps of a rewritten graph; the attentions' rows are told.

    Args:
        identity: of the graph as it was captured.
    """
    parameters = parameters_of(gm)
    attentions = []
    others = []
    is_part = False
    for row, told, node in rewritten.results:
        assert told is not None
        own = "" if row.location is None else row.location.module
        parameter = nearest(node, parameters)
        path = own
        if parameter is not None:
            path = call.path_of(own, example_inputs[parameters[parameter]], parameter_path(parameter))
        kind = call.plan.method.kind_of(path, told.kind)
        if kind is None:
            why = call.plan.method.why_not(path, told.kind)
            row.cached = f"no: {why}; it is {told.kind} ({told.reason})"
            others.append(f"{path or str(row.location)} is {told.kind}, and {why}")
        else:
            row.cached = f"{kind} ({told.reason})" if kind == told.kind else f"{kind} (by its block identifiers)"
        # A module that is compiled alone may share its graph with others, of other kinds by their paths.
        is_part = is_part or path != own
        if kind is not None or path != own:
            attentions.append(Attention(row.name, node, kind or told.kind, own, told))
    allowed = rewritten.begins_with_batch if call.plan.halves else None
    values = find_values(gm, attentions, allowed, affine=call.plan.method.extrapolates)
    kept = {name for value in values for name in value.attentions}
    for row, _, _ in rewritten.results:
        if row.name not in kept and row.cached and not row.cached.startswith("no"):
            batch = "its dimension 0 is not known to begin with the batch, of which one half is kept"
            row.cached = f"no: {batch if call.plan.halves else 'nothing reads its result, or its size depends on data'}"
    if attentions and not values:
        batch = "of no attention is it known that its dimension 0 begins with the batch, of which one half is kept"
        others.append(batch if call.plan.halves else "nothing reads an attention's result, or its size depends on data")
    present = {value.kind for value in values}
    reused = [*call.plan.reused, *(map(_others_names, call.plan.reused) if is_part else ())]
    together = {frozenset[Kind](), *(kinds & present for kinds in reused)}
    halves = call.plan.halves
    graphs = {reused: with_values(gm, values, reused, halves) for reused in sorted(together, key=sorted)}
    return Kept(gm, identity, tuple(values), graphs, tuple(others))


def _others_names(kinds: frozenset[Kind]) -> frozenset[Kind]:
    """As what these kinds are known in a graph whose first module was temporal where others are spatial."""
    exchanged: dict[Kind, Kind] = {"spatial": "temporal", "temporal": "spatial"}
    return frozenset(exchanged.get(kind, kind) for kind in kinds)


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
        self._fingerprint = kept.identity.fingerprint
        parameters = parameters_of(kept.gm)
        self._parameters = [parameters[node] for node in sorted(parameters, key=source_name)]
        self._shapes = _Shapes(kept.gm, [*(tensor(value.node).shape for value in kept.values), kept.identity.sizes])

    def __call__(self, *args: Any) -> Any:
        call = current_call()
        assert call is not None, "chosen for a call that keeps attention values"
        entries = self._entries(call, args)
        kept = [entry for entry in entries if entry.kind is not None]
        call.found(kept, self._others)
        lacking = {entry.value.kind for entry in entries if not call.holds(entry)}
        reused = frozenset(self._kinds - lacking)
        if reused not in self._variants:
            # Some of what is there is not used. Computing is always right: it is what a first call does.
            reused = frozenset()
        computed = [entry for entry in entries if entry.value.kind not in reused]
        call.reserve([entry for entry in computed if entry.kind is not None])
        inputs = [call.reuse(entry) for entry in entries if entry.value.kind in reused]
        for entry in computed:
            call.make_room(entry)
        results = list(self._variants[reused](*args, *inputs))
        given = list(reversed(results[self._outputs :]))
        del results[self._outputs :], inputs
        for entry in computed:
            # What is not stored as it is goes at once: the other half, too, which a slice within the graph would keep
            # until its end, where Inductor puts all copies.
            value = given.pop()
            if call.plan.halves:
                value = value[value.shape[0] // 2 :].clone(memory_format=torch.contiguous_format)
            elif self._copies:
                value = value.clone()
            if entry.kind is not None:
                call.keep(entry, value.contiguous())
        return results

    def _entries(self, call: ModelCall, args: Sequence[Any]) -> list[Entry]:
        *shapes, sizes = self._shapes(args)
        graph = call.enter(self._fingerprint, [args[position] for position in self._parameters])
        entries = []
        for value, shape in zip(self._values, shapes, strict=True):
            # Modules that share the graph have parameters of their own.
            parameter = None if value.parameter is None else args[value.parameter]
            path = call.path_of(value.path, parameter, value.parameter_path)
            kind = value.kind if path == value.path else call.kind_at(path, value.told)
            kind = None if graph is None else kind
            key = graph, value.attentions, value.place, value.formula
            constants = [args[position] for position in value.constants]
            entries.append(Entry(value, kind, path, key, shape, sizes, constants))
        return entries


class _Shapes:
    """Shapes of a graph for the sizes of a call."""

    def __init__(self, gm: fx.GraphModule, shapes: Sequence[Sequence[Size]]) -> None:
        self._sources: dict[Any, Callable[[Sequence[Any]], int]] = {}
        for position, node in enumerate(gm.graph.find_nodes(op="placeholder")):
            if isinstance(node.meta.get("val"), torch.SymInt):
                self._note(node.meta["val"], _argument(position))
            elif is_tensor(node):
                for dim, size in enumerate(tensor(node).shape):
                    self._note(size, _dimension(position, dim))
        self._shapes = [tuple(size if isinstance(size, int) else size.node.expr for size in shape) for shape in shapes]
        self._fixed = all(isinstance(size, int) for shape in self._shapes for size in shape)

    def _note(self, size: Any, source: Callable[[Sequence[Any]], int]) -> None:
        if isinstance(size, torch.SymInt) and size.node.expr.is_Symbol:
            self._sources.setdefault(size.node.expr, source)

    def __call__(self, args: Sequence[Any]) -> list[tuple[int, ...]]:
        if self._fixed:
            return self._shapes
        sizes = {symbol: source(args) for symbol, source in self._sources.items()}
        return [
            tuple(size if isinstance(size, int) else _number(size.xreplace(sizes)) for size in shape)
            for shape in self._shapes
        ]


def _number(size: Any) -> Any:
    """The number that an expression is; of one that depends on data (``u0``) the expression itself."""
    if isinstance(size, int) or not size.is_number:
        return size
    return int(size) if size.is_integer else float(size)


def _argument(position: int) -> Callable[[Sequence[Any]], int]:
    return lambda args: int(args[position])


def _dimension(position: int, dim: int) -> Callable[[Sequence[Any]], int]:
    return lambda args: int(args[position].shape[dim])
