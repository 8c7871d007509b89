"""Conditions on lengths: what Dynamo found true of the shard's length while it traced has to be true of the whole's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import sympy
import torch
from torch import fx

from attnrewrite.errors import ContextParallelError
from attnrewrite.options.context_parallel import ContextParallel
from attnrewrite.parallel.agreement import Agreement
from attnrewrite.parallel.lengths import Lengths, expression
from attnrewrite.parallel.placement import Shard

__all__ = ["Conditions"]

_OF_MEMORY = ("STRIDE", "STORAGE_OFFSET")

_UNBOUNDED = 2**62
"""Older bounds of symbols that have none are ``sys.maxsize - 1``."""


class Conditions:
    """What has to hold of the lengths of shards, at each call.

    A model may choose its way by a length, as in ``if length > window``. Its graph then has the way
    of the shard's length, which must be that of the whole's.
    """

    def __init__(
        self, gm: fx.GraphModule, lengths: Lengths, shards: Mapping[fx.Node, Shard], option: ContextParallel
    ) -> None:
        """Args:
        shards: the inputs that are sharded.
        """
        self._lengths = lengths
        self._inputs = {
            at: expression(node.meta["val"])
            for at, node in enumerate(gm.graph.find_nodes(op="placeholder"))
            if isinstance(node.meta["val"], torch.SymInt) and expression(node.meta["val"]).is_Symbol
        }
        self._hold: list[tuple[Any, str]] = []
        for condition, place in _traced_under(gm):
            if not lengths.symbols.isdisjoint(condition.free_symbols):
                self._hold.append((lengths.whole(condition), f"the model goes by a length at {place}"))
        self._hold += _ranges(gm, lengths)
        if option.load_balance:
            for shard in shards.values():
                halves = sympy.Eq(sympy.Mod(shard.length, 2), 0)
                self._hold.append((halves, "shards of a balanced load have two halves"))
        inputs = gm.graph.find_nodes(op="placeholder")
        places = {at: shards[node] for at, node in enumerate(inputs) if node in shards}
        self._agreement = Agreement(option.group, option.ranks, places)
        self._seen: set[tuple[Any, ...]] = set()
        self._check({symbol: value.node.hint for symbol, value in lengths.known.items()})

    def around(self, compiled: Callable[..., Any]) -> Callable[..., Any]:
        """The compiled graph, which checks at each call that ranks agree, and once for each length the conditions."""

        def checked(*args: Any) -> Any:
            self._agreement.check(args)
            lengths = tuple(args[at] for at in self._inputs)
            if lengths not in self._seen:
                self._check(dict(zip(self._inputs.values(), lengths, strict=True)))
                self._seen.add(lengths)
            return compiled(*args)

        return checked

    def _check(self, values: dict[Any, Any]) -> None:
        for condition, place in self._hold:
            if not condition.xreplace({symbol: sympy.sympify(value) for symbol, value in values.items()}) == True:  # noqa: E712
                raise ContextParallelError(
                    f"context_parallel: {place}, and {condition} does not hold of the whole sequence, so that its "
                    "graph is another one than that of a rank's part"
                )


def _traced_under(gm: fx.GraphModule) -> list[tuple[Any, str]]:
    """The conditions of Dynamo's guards, each with the line of the source that asked."""
    environment = _environment(gm)
    return [
        (environment.replace(guard.expr), str(guard.sloc.maybe_user_loc or guard.sloc))
        for guard in environment.guards
        if not any(_is_of_memory(symbol, environment) for symbol in guard.expr.free_symbols)
    ]


def _is_of_memory(symbol: Any, environment: Any) -> bool:
    """Whether a symbol says how an input lies in memory, as a stride of a view does, which is of the shard alone."""
    properties = [getattr(source, "prop", None) for source in environment.var_to_sources.get(symbol, ())]
    return bool(properties) and all(each is not None and each.name in _OF_MEMORY for each in properties)


def _ranges(gm: fx.GraphModule, lengths: Lengths) -> list[tuple[Any, str]]:
    """Upper bounds, within which conditions were decided without a guard."""
    bounds = {symbol: _environment(gm).var_to_range[symbol].upper for symbol in lengths.symbols}
    return [
        (lengths.whole(symbol) <= bound, f"Dynamo was told, or found, that the length is at most {bound}")
        for symbol, bound in bounds.items()
        if bound.is_Integer and bound < _UNBOUNDED
    ]


def _environment(gm: fx.GraphModule) -> Any:
    """Where Dynamo keeps what it knows of symbols; a sharded input is a tensor with one."""
    for node in gm.graph.find_nodes(op="placeholder"):
        environment = getattr(getattr(node.meta["val"], "fake_mode", None), "shape_env", None)
        if environment is not None:
            return environment
    raise ContextParallelError("context_parallel: the graph has no symbolic sizes")
