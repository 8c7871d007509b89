"""A graph whose attention values are kept: one callable that computes them, and one for each set of kinds it reuses."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from attnrewrite.analysis.kinds import Kind
from attnrewrite.caching.graphs import Attention, Value, find_values, with_values
from attnrewrite.caching.session import Key, ModelCall, Plan, current_call
from attnrewrite.inner import CompiledFn
from attnrewrite.ir import is_tensor, tensor
from attnrewrite.report import SiteReport

__all__ = ["Kept", "kept_attention"]


@dataclass(frozen=True)
class Kept:
    """What is kept of a rewritten graph's attentions, and which kinds are reused together."""

    gm: fx.GraphModule
    values: tuple[Value, ...]
    reused: frozenset[frozenset[Kind]]
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
        for reused in sorted({frozenset[Kind](), *self.reused}, key=sorted):
            taken = [tensor(value.node) for value in self.values if value.kind in reused]
            variants[reused] = compile_graph(with_values(self.gm, self.values, reused), taken)
        return _KeepingGraph(self, variants, copies)


def kept_attention(
    gm: fx.GraphModule, results: Sequence[tuple[SiteReport, tuple[Kind, str] | None, fx.Node]], plan: Plan
) -> Kept:
    """What a plan keeps of a rewritten graph; the attentions' rows are told."""
    attentions = []
    others = []
    for row, kind, node in results:
        assert kind is not None
        path = "" if row.location is None else row.location.module
        chosen = plan.method.kind_of(path, kind[0])
        where = path or str(row.location)
        if chosen is None:
            row.cached = f"no: {kind[0]} ({kind[1]})"
            others.append(f"{where} is {kind[0]}, which is not kept")
        else:
            row.cached = f"{chosen} ({kind[1]})" if chosen == kind[0] else f"{chosen} (by its block identifiers)"
            attentions.append(Attention(node, chosen, path))
    values = find_values(gm, attentions)
    present = {value.kind for value in values}
    return Kept(gm, tuple(values), frozenset({kinds & present for kinds in plan.reused} - {frozenset()}), tuple(others))


class _KeepingGraph:
    """Called as the graph is, within a model's call that says what is reused."""

    def __init__(self, kept: Kept, variants: Mapping[frozenset[Kind], CompiledFn], copies: bool) -> None:
        self._values = kept.values
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
        call.found(self._values, self._others)
        keys = self._keys(call, args)
        shapes = self._shapes(args)
        fits = [
            value.kind in call.reused and call.holds(key, shape, value.dtype)
            for value, key, shape in zip(self._values, keys, shapes, strict=True)
        ]
        kinds = {value.kind for value in self._values}
        reused = frozenset(
            kind
            for kind in kinds
            if all(fit for value, fit in zip(self._values, fits, strict=True) if value.kind == kind)
        )
        # Computing is always right: it is what a first call does.
        variant = self._variants.get(reused)
        if variant is None:
            reused, variant = frozenset(), self._variants[frozenset()]
        rows = list(zip(self._values, keys, shapes, strict=True))
        for value, key, shape in rows:
            if value.kind not in reused:
                call.reserve(key, value, shape)
        inputs = [call.reuse(key, value) for value, key, _ in rows if value.kind in reused]
        results = list(variant(*args, *inputs))
        given = results[self._outputs :]
        for (_, key, _), kept in zip((row for row in rows if row[0].kind not in reused), given, strict=True):
            call.keep(key, kept.clone() if self._copies else kept.contiguous())
        return results[: self._outputs]

    def _keys(self, call: ModelCall, args: Sequence[Any]) -> list[Key]:
        """Modules that share the graph have parameters of their own; one that is called again counts its calls."""
        modules = (None if value.parameter is None else id(args[value.parameter]) for value in self._values)
        return [
            call.visit((value.kind, value.path, value.place, module))
            for value, module in zip(self._values, modules, strict=True)
        ]


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
