"""Where a stream of calls stands in its denoising run, and what the user's callbacks say.

Published code counts the calls of a model and is told when a run begins. Here a beginning is told from the calls: other
shapes, dtypes or devices, or a timestep that goes back.
"""

from __future__ import annotations

import math
from collections.abc import Hashable

__all__ = ["Run"]


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
