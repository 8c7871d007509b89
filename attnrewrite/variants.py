"""One compiled graph for each set of kernels that it is called under, chosen at the call, outside the graph."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from attnrewrite.inner import CompiledFn
from attnrewrite.policy import Request
from attnrewrite.selection import request_in_force

__all__ = ["Variants"]

Backend = Callable[[fx.GraphModule, Sequence[Any]], CompiledFn]


class Variants:
    """A compiled graph that is compiled once more for each :class:`Request` that is in force when it is called.

    The first was compiled by Dynamo with the guards of the user's code. Another is Dynamo's own compilation of the
    graph, with guards of its own: sizes that it specialises are checked, and nothing is assumed of inputs that the
    first did not see. Any thread may call it; variants are made one at a time.
    """

    def __init__(self, gm: fx.GraphModule, example_inputs: Sequence[Any], backend: Backend) -> None:
        """Args:
        gm: Dynamo's graph, before anything was done to it.
        backend: what compiles the graph under the request that is in force.
        """
        self._gm = fx.GraphModule(gm, copy.deepcopy(gm.graph))
        self._backend = backend
        self._dynamic = any(_is_symbolic(value) for value in example_inputs) or None
        self._compiled: dict[Request | None, CompiledFn] = {}
        self._lock = threading.Lock()

    def add(self, compiled: CompiledFn) -> CompiledFn:
        """The variant for the request in force now; returns what to call."""
        self._compiled[request_in_force()] = compiled
        return self

    def __call__(self, *args: Any) -> Any:
        request = request_in_force()
        compiled = self._compiled.get(request)
        if compiled is None:
            with self._lock:
                compiled = self._compiled.get(request) or self._compile()
                self._compiled[request] = compiled
        return compiled(*args)

    def _compile(self) -> CompiledFn:
        # Dynamo's cache goes by code object: each variant has one of its own, so none counts as a recompilation.
        module = fx.GraphModule(self._gm, copy.deepcopy(self._gm.graph))
        compiled: CompiledFn = torch.compile(module, backend=self._backend, fullgraph=True, dynamic=self._dynamic)
        return compiled


def _is_symbolic(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return any(isinstance(size, torch.SymInt) for size in value.shape)
    return isinstance(value, torch.SymInt)
