"""Autocast regions of a graph that take effect while it is traced."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from attnrewrite.torch_private import enter_autocast, exit_autocast


class AutocastRegions:
    """Makes a graph's autocast regions take effect while it is traced, and not only be recorded.

    Without it the operators of a region are traced in their uncast dtypes, and a ``.float()`` on a half-precision
    result is taken for a no-op and lost. ``autocast.__enter__`` both switches and records, the function that Dynamo
    puts into the graph records only (https://github.com/pytorch/pytorch/blob/v2.13.0/torch/amp/autocast_mode.py).
    """

    def __init__(self) -> None:
        self._open: list[Any] = []

    def enter(self, *args: Any) -> Any:
        context = torch.amp.autocast_mode.autocast(*args)
        context.__enter__()  # type: ignore[no-untyped-call]
        self._open.append(context)
        return context

    def exit(self, context: Any) -> None:
        self._open.remove(context)
        context.__exit__(None, None, None)

    @contextlib.contextmanager
    def closed_at_exit(self) -> Iterator[None]:
        """Tracing that fails midway leaves no region open and the grad mode as it was."""
        grad = torch.is_grad_enabled()
        try:
            yield
        finally:
            torch.set_grad_enabled(grad)
            while self._open:
                self._open.pop().__exit__(None, None, None)

    def substitute(self, node: fx.Node) -> None:
        if node.target is enter_autocast:
            node.target = self.enter
        elif node.target is exit_autocast:
            node.target = self.exit
