"""What the parts of capture share."""

from __future__ import annotations

from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef

__all__ = ["CaptureError"]


class CaptureError(Exception):
    """The graph cannot be brought into the IR; the message says why."""


def first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")


def attribute_of(root: torch.nn.Module, path: str) -> Any:
    value: Any = root
    for name in path.split("."):
        value = getattr(value, name)
    return value


def storage_of(value: Any) -> Any:
    return StorageWeakRef(value.untyped_storage())  # type: ignore[no-untyped-call]
