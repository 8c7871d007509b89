"""Autocast during tracing: makes the autocast regions of a graph take effect while it is traced."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from attnrewrite.torch_private import enter_autocast, exit_autocast


class AutocastRegions:
    """Makes the autocast regions of a graph take effect while it is traced.

    Otherwise they would only be recorded: their operators would be traced without casts, and a ``.float()`` of a
    half-precision result would be dropped as a no-op. ``autocast.__enter__`` switches autocast and records that; the
    function that Dynamo puts into the graph only records
    (https://github.com/pytorch/pytorch/blob/v2.13.0/torch/amp/autocast_mode.py).
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
        """Restores the grad mode and closes all open regions at exit, even if tracing fails midway."""
        grad = torch.is_grad_enabled()
        try:
            yield
        finally:
            torch.set_grad_enabled(grad)
            while self._open:
                self._open.pop().__exit__(None, None, None)

    def substitute(self, node: fx.Node) -> None:
        """Replaces a call that enters or exits autocast, in place, by one that takes effect."""
        if node.target is enter_autocast:
            node.target = self.enter
        elif node.target is exit_autocast:
            node.target = self.exit
