"""What the user's callbacks for attention reuse answer: the timestep, and weights."""

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
    """The timestep of the call that is about to be made, from ``current_timestep_callback``.

    A tensor on an accelerator is waited for.

    Raises:
        CacheError: the answer is not one number.
    """
    answer = callback()
    if answer is None:
        raise CacheError(
            "current_timestep_callback returned None: it must return the timestep during each call of the model (a "
            "pipeline's current_timestep is None except while the pipeline runs; in a custom loop, set a variable "
            "before each call and return it)"
        )
    number = _number(answer)
    if number is None:
        raise CacheError(
            f"current_timestep_callback must return one number, or a tensor of one element; got {_shown(answer)}"
        )
    return number


def weight_of(callback: Callable[[nn.Module], Any], module: nn.Module, name: str) -> float:
    """The weight that a callback of FasterCache gives for a module.

    Args:
        name: the setting that the callback is, for the message.

    Raises:
        CacheError: the answer is not one number.
    """
    answer = callback(module)
    number = _number(answer)
    if number is None:
        raise CacheError(f"{name} must return one number, or a tensor of one element; got {_shown(answer)}")
    return number


def _number(answer: Any) -> float | None:
    if isinstance(answer, Tensor):
        if answer.numel() != 1 or answer.is_complex():
            return None
        answer = answer.item()
    elif isinstance(answer, np.ndarray) and answer.size == 1:
        answer = answer.item()
    if isinstance(answer, bool) or not isinstance(answer, Real) or not math.isfinite(answer):
        return None
    return float(answer)


def _shown(answer: Any) -> str:
    if isinstance(answer, Tensor) and answer.numel() != 1:
        return f"a tensor of shape {tuple(answer.shape)}"
    return repr(answer)
