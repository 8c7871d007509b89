"""Helpers that the modules of capture share, and their error."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.multiprocessing.reductions import StorageWeakRef

__all__ = ["CaptureError"]


class CaptureError(Exception):
    """Raised when a graph cannot be turned into the IR; the message says why."""


def first_line(error: BaseException) -> str:
    """The first line of the error's message that is not empty."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")


def attribute_of(root: torch.nn.Module, path: str) -> Any:
    """The attribute of ``root`` at a dotted path."""
    value: Any = root
    for name in path.split("."):
        value = getattr(value, name)
    return value


def storage_of(value: Any) -> Any:
    """A key that is equal for tensors that share memory."""
    return StorageWeakRef(value.untyped_storage())  # type: ignore[no-untyped-call]


def is_in_place(node: fx.Node) -> bool:
    """Whether the node updates its argument in place, judged by its name."""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return (name.endswith("_") and not name.endswith("__")) or name in _IN_PLACE


_IN_PLACE = frozenset({"iadd", "isub", "imul", "itruediv", "setitem", "iand", "ior", "ipow"})
