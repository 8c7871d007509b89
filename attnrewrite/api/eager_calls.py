"""Eager calls of what is plain mathematics within a graph: they run compiled, by one function for each kind of call."""

from __future__ import annotations

import functools
import itertools
import sys
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

from attnrewrite.api.arguments import under_autocast
from attnrewrite.ir.source import SourceLocation, called_from, own_files
from attnrewrite.options.environment import request_of_environment
from attnrewrite.options.request import Request
from attnrewrite.torch_private import forward_mode_level, is_transformed_or_watched

__all__ = ["run_compiled", "within_graph"]

own_files.add(__file__)


def within_graph() -> bool:
    """Whether the call is being traced, transformed or watched: then the mathematics runs as it is, and is seen.

    ``torch.func``, ``torch.jit.trace``, forward-mode differentiation and dispatch modes (``FlopCounterMode``,
    ``FakeTensorMode``) ask for the operations themselves; Dynamo compiles nothing under most of them.
    """
    if torch.compiler.is_dynamo_compiling() or torch.compiler.is_exporting():
        return True
    return forward_mode_level() >= 0 or is_transformed_or_watched()


def run_compiled(function: Callable[..., Any], settings: Hashable, *operands: Any) -> Any:
    """``function(settings, *operands)``, compiled with ``backend="attnrewrite"``.

    To be called from the function that the user calls, whose caller becomes the line of the attention in reports.

    Args:
        function: the mathematics.
        settings: the arguments that are no tensors. For each combination of them one function is compiled.
        operands: tensors, and whatever else Dynamo is to see.

    Raises:
        FailOnRecompileLimitHit: Dynamo compiled it too often.
    """
    compiled = _compiled(function, settings, _kind(*operands), request_of_environment())
    caller = sys._getframe(2)
    token = called_from.set(SourceLocation(caller.f_code.co_filename, caller.f_lineno, caller.f_code.co_name, ""))
    try:
        return compiled(*operands)
    finally:
        called_from.reset(token)


def _kind(*operands: Any) -> tuple[Any, ...]:
    """All that Dynamo guards on, except sizes: each kind has its own function, and so its own recompilation limit."""
    own = [(x.dtype, x.device, x.dim(), x.requires_grad) if isinstance(x, Tensor) else type(x) for x in operands]
    return (*own, torch.is_grad_enabled(), torch.is_inference_mode_enabled(), under_autocast(operands[0]))


_numbers = itertools.count()


@functools.cache
def _compiled(
    function: Callable[..., Any], settings: Hashable, kind: tuple[Any, ...], asked: Request | None
) -> Callable[..., Any]:
    """The function for these settings.

    Args:
        kind: of the operands.
        asked: what the environment asks for, which is read when a graph is compiled.
    """

    def call(*operands: Any) -> Any:
        return function(settings, *operands)

    # Dynamo's cache is keyed by code object, and what it knows of sizes that change by file, line and name.
    call.__code__ = call.__code__.replace(co_name=f"call_{next(_numbers)}")
    compiled: Callable[..., Any] = torch.compile(call, backend="attnrewrite", fullgraph=True)
    return compiled
