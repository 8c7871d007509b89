"""The builder: inserts new nodes, with their fake values, at one place of a graph."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import fx

from attnrewrite.ir.nodes import tensor
from attnrewrite.ir.ops import is_function
from attnrewrite.torch_private import (
    FakeTensorMode,
    PythonReferenceAnalysis,
    is_erased,
    python_dispatcher,
    schema_of,
    sympy_interp,
)

__all__ = ["Builder", "Written", "evaluated"]

aten = torch.ops.aten


Written = dict[Any, fx.Node]
"""Calls that were inserted, by target and arguments."""


_SHARED_CUSTOM_OPS = ("attnrewrite::stored",)


def _key_of(target: Any, args: Any, kwargs: Any) -> Any:
    """The key under which equal calls are shared; None for calls that must not be.

    Those are calls that are random or mutate, and operators of kernels: each attention keeps a call of its own, by
    which the report and the verification find it.
    """
    if not is_function(target):
        return None
    if (
        target is not operator.getitem
        and target.namespace != "aten"
        and schema_of(target).name not in _SHARED_CUSTOM_OPS
    ):
        return None
    return target, _frozen(args), _frozen(kwargs)


def _frozen(value: Any) -> Any:
    """An argument in a hashable form."""
    if isinstance(value, fx.Node):
        return value
    if isinstance(value, (list, tuple)):
        return tuple(map(_frozen, value))
    if isinstance(value, dict):
        return tuple((key, _frozen(value[key])) for key in sorted(value))
    # A number's type is part of what it says (1, 1.0 and True are equal), and so is the sign of a zero.
    return type(value), repr(value)


class Builder:
    """Inserts nodes at one place of a graph, evaluated under the graph's fake mode.

    Symbolic sizes among the arguments never become constants: each is written as arithmetic on the nodes that carry its
    symbols.
    """

    def __init__(self, gm: fx.GraphModule, before: fx.Node, like: fx.Node, written: Written | None = None) -> None:
        """
        Args:
            before: the node in front of which new nodes are inserted.
            like: the node whose source location and tags they inherit.
            written: calls that other builders inserted before ``before``; an equal call is reused, not repeated.
        """
        self.graph = gm.graph
        self._gm = gm
        self.created: list[fx.Node] = []
        self.before = before
        self._meta = {
            key: value
            for key, value in like.meta.items()
            if key in ("stack_trace", "nn_module_stack", "recompute", "ac_graph_id", "custom", "seq_nr")
        }
        self._fake_mode = _fake_mode_of(gm.graph)
        self._written: Written = {} if written is None else written

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """Inserts a call of an operator, or returns an equal one; sizes among the arguments may be SymInts."""
        args, kwargs = fx.node.map_aggregate((args, kwargs), self._as_argument)
        found = self._found(_key_of(target, args, kwargs))
        if found is not None:
            return found
        fakes = fx.node.map_arg((args, kwargs), lambda node: node.meta["val"])
        with _evaluating(self._fake_mode):
            value = target(*fakes[0], **fakes[1])
        return self.insert(target, args, kwargs, value)

    def copied(self, node: fx.Node, **kwargs: Any) -> fx.Node:
        """Inserts a ``clone`` that nothing else is given, as what a graph returns has to be."""
        with _evaluating(self._fake_mode):
            value = node.meta["val"].clone(**kwargs)
        return self.insert(torch.ops.aten.clone.default, (node,), kwargs, value, shared=False)

    def insert(
        self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], value: Any, *, shared: bool = True
    ) -> fx.Node:
        """Inserts a call whose fake value, ``value``, the caller knows; with ``shared``, or returns an equal one."""
        args, kwargs = fx.node.map_aggregate((args, kwargs), self._as_argument)
        key = _key_of(target, args, kwargs) if shared else None
        found = self._found(key)
        if found is not None:
            return found
        with self.graph.inserting_before(self.before):
            node = self.graph.call_function(target, args, kwargs)
        node.meta = {**self._meta, "val": value}
        self.created.append(node)
        if key is not None:
            self._written[key] = node
        return node

    def _found(self, key: Any) -> fx.Node | None:
        """An equal call that was inserted before; None if there is none, or it is no longer in the graph."""
        node = None if key is None else self._written.get(key)
        return node if node is not None and not is_erased(node) and node < self.before else None

    def submodule(self, name: str, module: fx.GraphModule) -> fx.Node:
        """Inserts a ``get_attr`` node for a subgraph, to be an argument of a higher-order operator."""
        number = sum(key.startswith(name) for key, _ in self._gm.named_children())
        self._gm.add_submodule(f"{name}_{number}", module)
        with self.graph.inserting_before(self.before):
            node = self.graph.get_attr(f"{name}_{number}")
        node.meta = {**self._meta, "val": module}
        self.created.append(node)
        return node

    def _as_argument(self, value: Any) -> Any:
        if isinstance(value, torch.SymInt):
            return self._size(value)
        return value

    def _size(self, size: torch.SymInt) -> Any:
        """A symbolic size as a number, or as the node that computes it."""
        expression = size.node.expr
        if expression.is_number:
            return int(expression)
        values = {}
        tracer = _Tracer(self)  # The minimum of two proxies asks for one tracer.
        for symbol in expression.free_symbols:
            source = _source_of(symbol, self.graph)
            if isinstance(source, tuple):
                node, dim = source
                source = self.insert(aten.sym_size.int, (node, dim), {}, tensor(node).shape[dim])
            values[symbol] = fx.Proxy(source, tracer)
        result = sympy_interp(PythonReferenceAnalysis, values, expression)
        if not isinstance(result, fx.Proxy):
            return result
        result.node.meta.setdefault("val", size)
        return result.node


class _Tracer(fx.proxy.GraphAppendingTracer):
    """Turns arithmetic on proxies into nodes that the builder inserts, with their fake values."""

    def __init__(self, builder: Builder) -> None:
        super().__init__(builder.graph)
        self._builder = builder

    def create_node(self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **more: Any) -> fx.Node:
        fakes = fx.node.map_arg((args, kwargs), lambda node: node.meta["val"])
        return self._builder.insert(target, args, kwargs, target(*fakes[0], **fakes[1]))


def _source_of(symbol: Any, graph: fx.Graph) -> fx.Node | tuple[fx.Node, int]:
    """The first node that carries the symbol: a node that is that size, or a tensor and its dimension of that size.

    Symbols enter with the graph's inputs, or where an operator makes a size out of data, so the first node that carries
    a symbol comes before all uses of it.
    """
    nodes: Iterable[fx.Node] = graph.nodes
    for node in nodes:
        value = node.meta.get("val")
        if isinstance(value, torch.SymInt) and value.node.expr == symbol:
            return node
        if isinstance(value, torch.Tensor):
            for dim, size in enumerate(value.shape):
                if isinstance(size, torch.SymInt) and size.node.expr == symbol:
                    return node, dim
    raise AssertionError(f"no node carries {symbol}")


def _fake_mode_of(graph: fx.Graph) -> FakeTensorMode | None:
    for node in graph.nodes:
        mode = getattr(node.meta.get("val"), "fake_mode", None)
        if mode is not None:
            return mode  # type: ignore[no-any-return]
    return None


@contextlib.contextmanager
def _evaluating(fake_mode: FakeTensorMode | None) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        if fake_mode is not None:
            stack.enter_context(fake_mode)
        # Composite operators ask for numbers in C++ where sizes are symbolic: linear does in torch 2.11.
        stack.enter_context(python_dispatcher())
        stack.enter_context(torch.no_grad())
        yield


def evaluated(node: fx.Node) -> Any:
    """The fake value of a call, computed again from those of its arguments."""
    target: Any = node.target
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda argument: argument.meta["val"])
    with _evaluating(_fake_mode_of(node.graph)):
        return target(*args, **kwargs)
