"""Known buffers: reads buffers that hold a known pattern, such as GPT-2's causal mask, and guards their contents.

A registered buffer is an input of the graph, which does not say what it holds. Its contents are read once, at compile
time. Each call then checks that they are unchanged, by the buffer's identity and version; only if these differ is the
data compared. Writes that PyTorch does not count (``buffer.data.fill_(...)``, a NumPy view) go unnoticed.
"""

from __future__ import annotations

import hashlib
import logging
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from attnrewrite.ir.bounds import BUFFER_ENTRIES
from attnrewrite.ir.stored import StoredPattern, tensor_bytes
from attnrewrite.torch_private import STATIC_INPUT

__all__ = ["KnownBuffers"]

log = logging.getLogger("attnrewrite")


class KnownBuffers:
    """The buffers among the inputs of a graph, and the guard on those that the rewriting has read."""

    def __init__(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> None:
        self._buffers: dict[int, StoredPattern] = {}
        placeholders = gm.graph.find_nodes(op="placeholder")
        for position, (node, value) in enumerate(zip(placeholders, example_inputs, strict=True)):
            if STATIC_INPUT in node.meta.get("tensor_dict", {}) and _readable(value):
                # A buffer that is too large to be read is not kept alive.
                read = value.numel() <= BUFFER_ENTRIES.most
                self._buffers[position] = StoredPattern(value if read else torch.empty_like(value, device="meta"))

    def attach(self, captured: fx.GraphModule) -> None:
        """Attaches the buffers to the same inputs of the captured graph, where the rewriting reads them."""
        for position, node in enumerate(captured.graph.find_nodes(op="placeholder")):
            if position in self._buffers:
                node.meta["stored"] = self._buffers[position]

    def seen(self) -> dict[int, tuple[str, bool]]:
        """Of each buffer that was looked at, by the place of the input: a digest of its contents, and whether the
        rewriting relies on them.
        """
        looked_at = {place: stored for place, stored in self._buffers.items() if stored.was_looked_at}
        return {place: (_digest(stored.tensor), stored.was_read) for place, stored in looked_at.items()}

    def hold(self, seen: Mapping[int, tuple[str, bool]]) -> bool:
        """Whether buffers hold what :meth:`seen` said in another process; if so, what was relied on there counts as
        read.
        """
        for place, (digest, _) in seen.items():
            buffer = self._buffers.get(place)
            if buffer is None or buffer.tensor.device.type == "meta" or _digest(buffer.tensor) != digest:
                return False
        for place, (_, was_read) in seen.items():
            self._buffers[place].was_read |= was_read
        return True

    def guarded(
        self, compiled: Callable[..., Any], original: Callable[[], Callable[..., Any]], name: str
    ) -> Callable[..., Any]:
        """A function that calls ``compiled`` while the buffers that were read are unchanged, else the original graph.

        Args:
            compiled: the rewritten graph.
            original: gives the original graph; called now, if any buffer was read.
            name: the graph's name, for the warning.
        """
        watched = [_Watched(position, stored.tensor) for position, stored in self._buffers.items() if stored.was_read]
        self._buffers.clear()
        if not watched:
            return compiled
        untouched = original()
        warned = False

        def call(*args: Any) -> Any:
            nonlocal warned
            if all(buffer.unchanged(args[buffer.position]) for buffer in watched):
                return compiled(*args)
            if not warned:
                warned = True
                log.warning(
                    "%s: a buffer that holds a mask has changed since compilation, so the original graph "
                    "runs; call torch._dynamo.reset() to compile it again",
                    name,
                )
            return untouched(*args)

        return call


def _digest(tensor: torch.Tensor) -> str:
    contents = hashlib.blake2b(tensor_bytes(tensor), digest_size=20).hexdigest()
    return f"{tensor.dtype} {tuple(tensor.shape)} {contents}"


def _readable(value: Any) -> bool:
    """Whether the contents of a tensor can be read and guarded."""
    return (
        type(value) is torch.Tensor
        and not value.requires_grad
        and not value.is_inference()
        and value.device.type != "meta"
        and value.layout is torch.strided
        and value.numel() > 0
    )


class _Watched:
    """A buffer that the rewriting has read, with its contents at compile time."""

    def __init__(self, position: int, tensor: torch.Tensor) -> None:
        self.position = position
        self._contents = tensor.detach().clone()
        self._see(tensor)

    def _see(self, tensor: torch.Tensor) -> None:
        self._seen, self._version, self._address = weakref.ref(tensor), tensor._version, tensor.data_ptr()

    def unchanged(self, tensor: torch.Tensor) -> bool:
        """Whether ``tensor`` is the buffer, not written to since, or has equal contents."""
        if self._seen() is tensor and self._version == tensor._version and self._address == tensor.data_ptr():
            return True
        if tensor.is_inference() or tensor.shape != self._contents.shape or tensor.dtype != self._contents.dtype:
            return False
        if not torch.equal(tensor.to(self._contents.device), self._contents):
            return False
        self._see(tensor)
        return True
