"""Attentions of a function, read from attnrewrite's own capture of it, and the values of its nodes at each call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from attnrewrite.capture.trace import capture
from attnrewrite.ir.site import CanonicalAttention, NotAttention
from attnrewrite.options.compile_options import Policy
from attnrewrite.passes.pipeline import read_sites

__all__ = ["Reading"]


class Reading:
    """``function``, captured when it is called first.

    Attributes:
        sites: its attentions, simplified.
        refused: why they are not taken, if one is not what it looked like.
        values: what each node of the captured graph was at the last call.
    """

    def __init__(self, function: Callable[..., Any], dynamic: bool = False, **options: Any) -> None:
        """
        Args:
            options: of the policy.
        """
        self.sites: list[CanonicalAttention] = []
        self.refused = ""
        self.values: dict[fx.Node, Any] = {}
        self._policy = Policy(**options)
        self._captures = 0
        torch._dynamo.reset()
        self._compiled = torch.compile(function, backend=self._backend, dynamic=dynamic, fullgraph=True)

    def __call__(self, *inputs: Any) -> Any:
        return self._compiled(*inputs)

    def _backend(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        self._captures += 1
        assert self._captures == 1, "captured once more"
        ir = capture(gm, example_inputs).gm
        try:
            # Simplifying leaves the graph as it is.
            self.sites = read_sites(ir, self._policy)
        except NotAttention as reason:
            self.refused = str(reason)

        def run(*args: Any) -> Any:
            interpreter = fx.Interpreter(ir, garbage_collect_values=False)
            result = interpreter.run(*args)
            self.values = dict(interpreter.env)
            return result

        return run
