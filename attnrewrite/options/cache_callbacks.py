"""The values of the user's callbacks for attention reuse: the timestep, and weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Real
from typing import Any

import numpy as np
from torch import Tensor, nn

from attnrewrite.errors import CacheError

__all__ = ["timestep_of", "weight_of"]


def timestep_of(callback: Callable[[], Any]) -> float:
    """The timestep of the next call, from ``current_timestep_callback``.

    Waits for a tensor on an accelerator.

    Raises:
        CacheError: the callback does not return one number.
    """
    value = callback()
    if value is None:
        raise CacheError(
            "current_timestep_callback returned None: it must return the timestep during each call of the model (a "
            "pipeline's current_timestep is None except while the pipeline runs; in a custom loop, set a variable "
            "before each call and return it)"
        )
    number = _number(value)
    if number is None:
        raise CacheError(
            f"current_timestep_callback must return one number, or a tensor of one element; got {_shown(value)}"
        )
    return number


def weight_of(callback: Callable[[nn.Module], Any], module: nn.Module, name: str) -> float:
    """The weight that a callback of FasterCache returns for a module.

    Args:
        name: the callback's setting, for the message.

    Raises:
        CacheError: the callback does not return one number.
    """
    value = callback(module)
    number = _number(value)
    if number is None:
        raise CacheError(f"{name} must return one number, or a tensor of one element; got {_shown(value)}")
    return number


def _number(value: Any) -> float | None:
    if isinstance(value, Tensor):
        if value.numel() != 1 or value.is_complex():
            return None
        value = value.item()
    elif isinstance(value, np.ndarray) and value.size == 1:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
        return None
    return float(value)


def _shown(value: Any) -> str:
    if isinstance(value, Tensor) and value.numel() != 1:
        return f"a tensor of shape {tuple(value.shape)}"
    return repr(value)
