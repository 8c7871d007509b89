"""Where a stream of calls stands in its denoising run, and what the user's callbacks say.

Published code counts the calls of a model and is told when a run begins. Here a beginning is told from the calls: other
shapes, dtypes or devices, or a timestep that goes back.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from numbers import Real
from typing import Any

import numpy as np
from torch import Tensor, nn

from attnrewrite.errors import CacheError

__all__ = ["Run", "timestep_of", "weight_of"]


class Run:
    """The denoising run of one stream of calls.

    A run's timesteps rise or fall; equal timesteps in a row belong to one run (solvers of second order call the model
    twice). A run of one single timestep cannot be told from the next one's beginning: there, call :meth:`reset`.

    Attributes:
        repeats: whether the last call had the timestep of the call before, in the same run. Calls of which each
            timestep has two may be conditional and unconditional ones that share a stream by mistake.
        single: how many runs in a row were single calls that another shape, dtype or device ended.
    """

    def __init__(self) -> None:
        self.repeats = False
        self.single = 0
        self._calls = 0
        self._timestep = 0.0
        self._direction = 0.0
        self._signature: Hashable = None

    def advance(self, timestep: float, signature: Hashable) -> int:
        """How many calls of this run came before the one that is about to be made.

        Args:
            timestep: of this call, in the scheduler's own units.
            signature: shapes, dtypes and devices of what the model is called with.

        Returns:
            The iteration; 0 at the first call of a run, when nothing that was stored may be used.
        """
        step = timestep - self._timestep
        if self._calls:
            self.single = self.single + 1 if self._calls == 1 and signature != self._signature else 0
        if self._calls and (signature != self._signature or step * self._direction < 0):
            self.reset()
        elif self._calls and step:
            self._direction = math.copysign(1.0, step)
        self.repeats = self._calls > 0 and step == 0
        self._calls += 1
        self._timestep, self._signature = timestep, signature
        return self._calls - 1

    def reset(self) -> None:
        """The next call is the first of a run."""
        self.repeats, self._calls, self._direction = False, 0, 0.0


def timestep_of(callback: Callable[[], Any]) -> float:
    """The timestep of the call that is about to be made, from ``current_timestep_callback``.

    A tensor on an accelerator is waited for.

    Raises:
        CacheError: the answer is not one number.
    """
    answer = callback()
    if answer is None:
        raise CacheError(
            "current_timestep_callback returned None: it must give the timestep of the model's call while that is "
            "made (a pipeline's current_timestep is None except while the pipeline runs; in a loop of your own, set "
            "a variable before each call and return it)"
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
