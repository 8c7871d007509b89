"""Variants of a compiled graph: one for each request of kernels and each plan of attention reuse.

The variant is chosen at each call, outside the graph.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from attnrewrite.caching.call import ReusePlan, current_call
from attnrewrite.errors import KernelError
from attnrewrite.inner import CompiledFn
from attnrewrite.ir.source import name_source, source_name
from attnrewrite.options.request import Request
from attnrewrite.selection.decorated_parts import parts_in
from attnrewrite.selection.requests import request_in_force
from attnrewrite.torch_private import TRACING_ERRORS, compile_lock, wrapped_call

__all__ = ["Variants"]

Backend = Callable[[fx.GraphModule, Sequence[Any]], CompiledFn]
_Key = tuple[Request | None, ReusePlan | None]


_ARGUMENT = re.compile(r"L\['(\w+)'\]")


class Variants:
    """A compiled graph that is compiled again for each new :class:`Request` and :class:`ReusePlan` in force.

    Dynamo compiled the first variant with the guards of the user's code. Each further variant is a separate compilation
    of the graph by Dynamo, with its own guards, which check the sizes that it specializes on. Any thread may call it;
    variants are compiled one at a time.
    """

    def __init__(self, gm: fx.GraphModule, example_inputs: Sequence[Any], backend: Backend) -> None:
        """Args:
        gm: Dynamo's graph, unchanged.
        backend: compiles the graph under the request and the plan in force.
        """
        self._gm = fx.GraphModule(gm, copy.deepcopy(gm.graph))
        self._parts = [*parts_in(gm)]  # A reference keeps them alive for each compilation.
        self._backend = backend
        self._sources = {node.target: source_name(node) for node in gm.graph.find_nodes(op="placeholder")}
        self._dynamic = any(_is_symbolic(value) for value in example_inputs) or None
        self._compiled: dict[_Key, CompiledFn] = {}

    def add(self, compiled: CompiledFn) -> CompiledFn:
        """Adds the variant for the request and plan in force; returns it."""
        self._compiled[_in_force()] = compiled
        return self

    def __call__(self, *args: Any) -> Any:
        key = _in_force()
        compiled = self._compiled.get(key)
        if compiled is None:
            return self._first_call(key, args)
        return compiled(*args)

    def _first_call(self, key: _Key, args: tuple[Any, ...]) -> Any:
        """The call that compiles a variant.

        Raises:
            KernelError: Dynamo cannot trace the graph again. It has operators of its own making for, among others,
                functions with a backward pass of their own, which it does not trace.
        """
        try:
            return self._variant(key)(*args)
        except TRACING_ERRORS as error:
            self._compiled.pop(key, None)
            what = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise KernelError(
                "this call asks for other kernels, or another reuse of attention, than the graph was compiled for, and "
                f"torch.compile cannot trace the graph again ({what}); ask before the model's first call, or call "
                "torch.compiler.reset() and compile the model anew"
            ) from error

    def _variant(self, key: _Key) -> CompiledFn:
        compiled = self._compiled.get(key)
        if compiled is None:
            # While one thread compiles, Dynamo does not compile graph modules that another thread makes
            # (torch._dynamo.convert_frame.fx_forward_from_src_skip_result).
            with compile_lock:
                compiled = self._compiled.get(key)
                if compiled is None:
                    compiled = self._compiled[key] = self._compile()
        return compiled

    def _compile(self) -> CompiledFn:
        # Dynamo's cache is keyed by code object; each variant has its own, so none counts as a recompilation.
        module = fx.GraphModule(self._gm, copy.deepcopy(self._gm.graph))

        def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> CompiledFn:
            for node in gm.graph.find_nodes(op="placeholder"):
                # Dynamo finds an input of the graph in the argument of that name.
                argument = _ARGUMENT.fullmatch(source_name(node))
                if argument is not None and argument[1] in self._sources:
                    name_source(node, self._sources[argument[1]])
            return self._backend(gm, example_inputs)

        # The class belongs to this module alone. If compiled code raises, a graph module's own ``__call__`` walks the
        # traceback; Dynamo would trace that and raise another error. ``Module.__call__`` cannot be used: while one
        # thread traces, it is another function in all threads.
        type(module).__call__ = wrapped_call  # type: ignore[method-assign]
        compiled: CompiledFn = torch.compile(module, backend=backend, fullgraph=True, dynamic=self._dynamic)
        return compiled


def _in_force() -> _Key:
    call = current_call()
    return request_in_force(), None if call is None else call.plan


def _is_symbolic(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return any(isinstance(size, torch.SymInt) for size in value.shape)
    return isinstance(value, torch.SymInt)
