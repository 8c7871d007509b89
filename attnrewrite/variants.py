"""One compiled graph for each set of kernels and each plan of attention reuse that it is called under.

Which one is chosen at the call, outside the graph.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from attnrewrite.caching.call import ReusePlan, current_call
from attnrewrite.inner import CompiledFn
from attnrewrite.ir.source import name_source, source_name
from attnrewrite.options.request import Request
from attnrewrite.selection.decorated_parts import parts_in
from attnrewrite.selection.requests import request_in_force
from attnrewrite.torch_private import compile_lock, wrapped_call

__all__ = ["Variants"]

Backend = Callable[[fx.GraphModule, Sequence[Any]], CompiledFn]
_Key = tuple[Request | None, ReusePlan | None]


_ARGUMENT = re.compile(r"L\['(\w+)'\]")


class Variants:
    """A compiled graph that is compiled once more for each :class:`Request` and :class:`ReusePlan` that is in force.

    The first was compiled by Dynamo with the guards of the user's code. Another is Dynamo's own compilation of the
    graph, with guards of its own: sizes that it specializes are checked, and nothing is assumed of inputs that the
    first did not see. Any thread may call it; variants are made one at a time.
    """

    def __init__(self, gm: fx.GraphModule, example_inputs: Sequence[Any], backend: Backend) -> None:
        """Args:
        gm: Dynamo's graph, before anything was done to it.
        backend: what compiles the graph under the request and the plan that are in force.
        """
        self._gm = fx.GraphModule(gm, copy.deepcopy(gm.graph))
        self._parts = [*parts_in(gm)]  # Which are asked about at each compilation.
        self._backend = backend
        self._sources = {node.target: source_name(node) for node in gm.graph.find_nodes(op="placeholder")}
        self._dynamic = any(_is_symbolic(value) for value in example_inputs) or None
        self._compiled: dict[_Key, CompiledFn] = {}

    def add(self, compiled: CompiledFn) -> CompiledFn:
        """The variant for what is in force now; returns what to call."""
        self._compiled[_in_force()] = compiled
        return self

    def __call__(self, *args: Any) -> Any:
        key = _in_force()
        compiled = self._compiled.get(key)
        if compiled is None:
            # While one thread compiles, the code of graph modules that any other makes is never compiled
            # (torch._dynamo.convert_frame.fx_forward_from_src_skip_result).
            with compile_lock:
                compiled = self._compiled.get(key)
                if compiled is None:
                    compiled = self._compiled[key] = self._compile()
        return compiled(*args)

    def _compile(self) -> CompiledFn:
        # Dynamo's cache goes by code object: each variant has one of its own, so none counts as a recompilation.
        module = fx.GraphModule(self._gm, copy.deepcopy(self._gm.graph))

        def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> CompiledFn:
            for node in gm.graph.find_nodes(op="placeholder"):
                # Dynamo finds an input of the graph in the argument of that name.
                argument = _ARGUMENT.fullmatch(source_name(node))
                if argument is not None and argument[1] in self._sources:
                    name_source(node, self._sources[argument[1]])
            return self._backend(gm, example_inputs)

        # The class is this module's own. Where compiled code raises an error, a graph module's ``__call__`` goes
        # through the traceback, which Dynamo would trace, and raise an error of its own.
        # ``Module.__call__`` itself is another function, in all threads, while one of them traces.
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
