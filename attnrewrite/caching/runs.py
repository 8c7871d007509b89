"""The denoising run that a stream of calls is in.

Published code counts the calls of a model and is told when a run begins. Here the calls themselves show it: a run
begins where shapes, dtypes or devices change, or where the timestep goes back.
"""

from __future__ import annotations

import math
import threading
import weakref
from collections.abc import Callable, Hashable

__all__ = ["DenoisingRun", "Step", "step_of"]

_of_thread = threading.local()


class Step:
    """What one thread computed in a stream at the last timestep of a clock.

    Calls are compared through all graphs, since Dynamo may choose another graph for the same function at any call. An
    error does not end a step, which may be begun again behind it.

    Attributes:
        warned: whether it was warned of a repetition.
    """

    def __init__(self, clock: Callable[[], object]) -> None:
        """Args:
        clock: the timestep callback.
        """
        self.warned = False
        self._timestep = math.nan
        self._computations: set[Hashable] = set()
        try:
            self._clock: Callable[[], object] = weakref.ref(clock)
        except TypeError:
            self._clock = lambda: clock

    def is_of(self, clock: Callable[[], object]) -> bool:
        """Whether it is of this clock, and not of one that had the same ``id``."""
        return self._clock() is clock

    def repeats(self, timestep: float, computation: Hashable) -> bool:
        """Whether this computation was there before at this timestep; notes that it is there now."""
        if timestep != self._timestep:
            self._timestep, self._computations = timestep, set()
        repeated = computation in self._computations
        self._computations.add(computation)
        return repeated


def step_of(clock: Callable[[], object], stream: tuple[str, ...]) -> Step:
    """This thread's step of a clock in a stream."""
    steps: dict[Hashable, Step] = _of_thread.__dict__.setdefault("steps", {})
    step = steps.get((id(clock), stream))
    if step is None or not step.is_of(clock):
        step = steps[id(clock), stream] = Step(clock)
    return step


class DenoisingRun:
    """The denoising run of one stream of calls.

    The timesteps of a run rise or fall; equal timesteps in a row belong to one run (second-order solvers call the model
    twice). After a run of one single timestep, the calls do not show where the next one begins: call :meth:`reset`.

    Attributes:
        repeats: whether the last call had the timestep of the call before, in the same run. Two calls at each timestep
            may be conditional and unconditional passes that share a stream by mistake.
        single_calls: how many runs in a row were single calls, each ended by another shape, dtype or device.
    """

    def __init__(self) -> None:
        self.repeats = False
        self.single_calls = 0
        self._calls = 0
        self._timestep = 0.0
        self._direction = 0.0
        self._signature: Hashable = None

    def advance(self, timestep: float, signature: Hashable) -> int:
        """Notes the call that is about to be made.

        Args:
            timestep: of this call, in the scheduler's own units.
            signature: the shapes, dtypes and devices of what the model is called with.

        Returns:
            How many calls of this run came before; 0 at the first one, at which no stored value may be used.
        """
        step = timestep - self._timestep
        if self._calls:
            ended_at_once = self._calls == 1 and signature != self._signature
            self.single_calls = self.single_calls + 1 if ended_at_once else 0
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
