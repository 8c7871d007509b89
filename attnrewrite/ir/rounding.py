"""Numbers as dtypes hold them."""

from __future__ import annotations

import functools
import math

import torch

__all__ = ["as_stored"]


def as_stored(value: float, dtype: torch.dtype) -> float:
    """The number after a cast to ``dtype``: float32's lowest is minus infinity in bfloat16, 0.5 is 0 in int64."""
    # The sign tells zeros apart, which are equal.
    return _as_stored(float(value), math.copysign(1.0, value), dtype)


@functools.lru_cache(maxsize=4096)
def _as_stored(value: float, sign: float, dtype: torch.dtype) -> float:
    return float(torch.tensor(value, dtype=torch.float64).to(dtype))
