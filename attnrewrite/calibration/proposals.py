"""Skip ranges and timesteps for Pyramid Attention Broadcast, from how attention changes from call to call.

Plain numbers in, plain numbers out. What a configuration would reuse is taken from the differences of a run in which
nothing was reused, so what reuse does to the calls behind it is not in them.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from attnrewrite.analysis.kinds import Kind

__all__ = ["SiteRun", "Step", "Window", "least_threshold", "mean_runs", "proposed"]


@dataclass(frozen=True)
class Step:
    """One call of the model.

    Attributes:
        iteration: how many calls of the run came before.
        timestep: in the scheduler's units.
        differences: ``||x_t - x_{t-k}|| / ||x_t||`` for k = 1, 2, ...; None where the run has no call so long before.
    """

    iteration: int
    timestep: float
    differences: tuple[float | None, ...]


@dataclass(frozen=True)
class SiteRun:
    """One attention in one denoising run.

    Attributes:
        site: the path of its module; ``path #2`` for a module's second attention.
        kind: spatial, temporal or cross.
        stream: the name of the stream of calls, nested ones as ``outer/inner``; empty for the default.
        run: 0 for the first run of the stream.
        steps: the run's calls, in order.
    """

    site: str
    kind: Kind
    stream: str
    run: int
    steps: tuple[Step, ...]


@dataclass(frozen=True)
class Window:
    """What is proposed for a kind.

    Attributes:
        skip_range: attention is computed in one call of so many.
        timestep_skip_range: between which timesteps, both ends excluded.
        reused: in how many of the ``calls`` that were recorded attention would be reused.
        mean_difference, largest_difference: of these calls, each the mean over the kind's attentions.
    """

    skip_range: int
    timestep_skip_range: tuple[float, float]
    reused: int
    calls: int
    mean_difference: float
    largest_difference: float


def mean_runs(records: Sequence[SiteRun], kind: Kind) -> list[tuple[Step, ...]]:
    """For each stream and run the mean differences of the kind's attentions, call by call.

    An attention that has no difference at a call is left out of that call's mean.
    """
    runs: dict[tuple[str, int], dict[int, list[Step]]] = {}
    for record in records:
        if record.kind == kind:
            calls = runs.setdefault((record.stream, record.run), {})
            for step in record.steps:
                calls.setdefault(step.iteration, []).append(step)
    return [tuple(_mean(calls[iteration]) for iteration in sorted(calls)) for calls in runs.values()]


def _mean(steps: Sequence[Step]) -> Step:
    first = steps[0]
    by_lag = [[each.differences[lag] for each in steps] for lag in range(len(first.differences))]
    known = [[difference for difference in lag if difference is not None] for lag in by_lag]
    means = tuple(math.fsum(lag) / len(lag) if lag else None for lag in known)
    return Step(first.iteration, first.timestep, means)


def proposed(runs: Sequence[Sequence[Step]], threshold: float) -> Window | None:
    """The skip range and the timesteps that reuse attention in the most calls; None if there are none.

    At each call that would reuse attention, the mean difference over the kind's attentions from what it would reuse
    is at most ``threshold``. The mean, since one setting holds for all attentions of a kind, whose outputs are added
    up in the model; at each call, since calls that hardly change may not make up for one where attention jumps. Each
    stream and run must pass by itself.

    Of settings that reuse as much, it is the one with the smallest mean difference, then with the fewest timesteps: a
    window ends at calls for which reuse was measured.

    Args:
        runs: of :func:`mean_runs`. Timesteps of a run rise or fall. As many skip ranges are tried as there are
            differences: up to 1 more than the largest k.
        threshold: a relative difference.
    """
    calls = [run for run in runs if run]
    lags = max((len(run[0].differences) for run in calls), default=0)
    timesteps = sorted({step.timestep for run in calls for step in run})
    every_call = sorted(step.timestep for run in calls for step in run)
    before = [bisect_left(every_call, timestep) for timestep in timesteps] + [len(every_call)]
    best: tuple[tuple[float, ...], int, int, int, _Total] | None = None
    for every in range(2, lags + 2):
        tried = [_Run(run, every, threshold, timesteps) for run in calls]
        # The widest first, so that what holds fewer calls than are reused already is passed over.
        for low, high in _widest_first(len(timesteps)):
            if best is not None and before[high + 1] - before[low] < best[0][0]:
                continue
            found = _sum(run.reuse(low, high) for run in tried)
            if found is None or not found.reused:
                continue
            rank = (found.reused, -found.differences / found.reused, low - high)
            if best is None or rank > best[0]:
                best = rank, every, low, high, found
    if best is None:
        return None
    _, every, low, high, total = best
    return Window(
        every,
        _ends(timesteps, low, high),
        total.reused,
        sum(map(len, calls)),
        total.differences / total.reused,
        total.largest,
    )


def least_threshold(runs: Sequence[Sequence[Step]]) -> float | None:
    """The lowest threshold for which something is :func:`proposed`; None if there is none."""
    known = {each for run in runs for step in run for each in step.differences if each is not None}
    candidates = sorted(each for each in known if math.isfinite(each))
    place = bisect_left(candidates, True, key=lambda threshold: proposed(runs, threshold) is not None)
    return candidates[place] if place < len(candidates) else None


@dataclass(frozen=True)
class _Total:
    reused: int = 0
    differences: float = 0.0
    largest: float = 0.0


def _widest_first(count: int) -> Iterator[tuple[int, int]]:
    """The first and the last place of each stretch of ``count``."""
    for width in range(count, 0, -1):
        for low in range(count - width + 1):
            yield low, low + width - 1


def _sum(totals: Iterable[_Total | None]) -> _Total | None:
    known = []
    for total in totals:
        if total is None:
            return None
        known.append(total)
    return _Total(
        sum(total.reused for total in known),
        math.fsum(total.differences for total in known),
        max((total.largest for total in known), default=0.0),
    )


class _Run:
    """What windows of one run reuse, at one skip range."""

    def __init__(self, steps: Sequence[Step], every: int, threshold: float, timesteps: Sequence[float]) -> None:
        self._steps, self._every, self._threshold = steps, every, threshold
        falls = steps[0].timestep > steps[-1].timestep
        self._falls = falls
        order = [-step.timestep if falls else step.timestep for step in steps]
        signed = [-timestep if falls else timestep for timestep in timesteps]
        # The run's calls by the place of a timestep among all: the first not before it, and the last not behind it.
        self._first = [bisect_left(order, timestep) for timestep in signed]
        self._last = [bisect_right(order, timestep) - 1 for timestep in signed]
        self._totals: dict[int, list[_Total]] = {}

    def reuse(self, low: int, high: int) -> _Total | None:
        """What a window from one timestep to another reuses, both included; None if it may not be."""
        entry, end = (high, low) if self._falls else (low, high)
        first, last = self._first[entry], self._last[end]
        if first > last:
            return _Total()
        if first not in self._totals:
            self._totals[first] = self._from(first)
        totals = self._totals[first]
        return totals[last - first] if last - first < len(totals) else None

    def _from(self, first: int) -> list[_Total]:
        """For windows that begin at a call and end at that one, the next one, and so on, as long as they may."""
        totals: list[_Total] = []
        total = _Total()
        # The call before the window computed its attention.
        computed = self._steps[first - 1].iteration if first else None
        for step in self._steps[first:]:
            if computed is None or step.iteration % self._every == 0:
                computed = step.iteration
            else:
                lag = step.iteration - computed
                difference = step.differences[lag - 1] if lag <= len(step.differences) else None
                # So that NaN is too much.
                if difference is None or not difference <= self._threshold:
                    break
                total = _Total(total.reused + 1, total.differences + difference, max(total.largest, difference))
            totals.append(total)
        return totals


def _ends(timesteps: Sequence[float], low: int, high: int) -> tuple[float, float]:
    """Timesteps that enclose a window and nothing else; below the lowest one -1, as in diffusers' configurations."""
    first, last = timesteps[low], timesteps[high]
    lowest = -1 if first > -1 else first - 1
    after = _between(timesteps[low - 1], first) if low else lowest
    before = _between(last, timesteps[high + 1]) if high + 1 < len(timesteps) else last + 1
    return after, before


def _between(low: float, high: float) -> float:
    """A short number near the middle of two others."""
    middle = (low + high) / 2
    for digits in range(17):
        number = round(middle, digits)
        if low < number < high:
            return int(number) if number == int(number) else number
    return middle
