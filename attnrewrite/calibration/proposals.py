"""Skip ranges and timesteps for Pyramid Attention Broadcast, from how attention changes from call to call.

Plain numbers go in and out. The differences come from a run without reuse, so they do not show what reuse does to the
calls after it.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from attnrewrite.analysis.kinds import Kind

__all__ = ["CallDifferences", "SiteRun", "Window", "lag_count", "least_threshold", "mean_runs", "proposed"]


@dataclass(frozen=True)
class CallDifferences:
    """How much an attention (or the mean over several) differs in one call of the model from earlier calls.

    Attributes:
        iteration: how many calls of the run came before.
        timestep: in the scheduler's units.
        differences: ``||x_t - x_{t-k}|| / ||x_t||`` for k = 1, 2, ...; None where the run had no such earlier call.
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
    steps: tuple[CallDifferences, ...]


@dataclass(frozen=True)
class Window:
    """The proposal for a kind of attention.

    Attributes:
        skip_range: the attention is computed in one of so many calls.
        timestep_skip_range: the timesteps between which it is reused, both ends excluded.
        reused: in how many of the recorded calls it would be reused.
        calls: how many calls were recorded.
        mean_difference, largest_difference: over the calls that would reuse it, of the mean over the kind's attentions.
    """

    skip_range: int
    timestep_skip_range: tuple[float, float]
    reused: int
    calls: int
    mean_difference: float
    largest_difference: float


def mean_runs(records: Sequence[SiteRun], kind: Kind) -> list[tuple[CallDifferences, ...]]:
    """The mean differences of the kind's attentions, call by call, for each stream and run.

    An attention without a difference at a call is left out of that call's mean.
    """
    runs: dict[tuple[str, int], dict[int, list[CallDifferences]]] = {}
    for record in records:
        if record.kind == kind:
            calls = runs.setdefault((record.stream, record.run), {})
            for step in record.steps:
                calls.setdefault(step.iteration, []).append(step)
    return [tuple(_mean(calls[iteration]) for iteration in sorted(calls)) for calls in runs.values()]


def _mean(steps: Sequence[CallDifferences]) -> CallDifferences:
    first = steps[0]
    by_lag = [[each.differences[lag] for each in steps] for lag in range(len(first.differences))]
    known = [[difference for difference in lag if difference is not None] for lag in by_lag]
    means = tuple(math.fsum(lag) / len(lag) if lag else None for lag in known)
    return CallDifferences(first.iteration, first.timestep, means)


def proposed(runs: Sequence[Sequence[CallDifferences]], threshold: float) -> Window | None:
    """The skip range and the timesteps that reuse attention in the most calls; None if there are none.

    At each call that would reuse attention, the mean over the kind's attentions of the difference from the reused one
    is at most ``threshold``. It is the mean because one setting holds for all attentions of a kind, whose outputs are
    added up in the model. It holds at each call because calls that hardly change cannot make up for one where attention
    jumps. Each stream and run must pass by itself.

    Among settings that reuse equally often, the smallest mean difference wins, then the fewest timesteps, so that a
    window ends at calls for which reuse was measured.

    Args:
        runs: from :func:`mean_runs`. Timesteps of a run rise or fall. The skip ranges that are tried go up to 1 more
            than the largest k.
        threshold: a relative difference.
    """
    calls = [run for run in runs if run]
    lags = max((len(run[0].differences) for run in calls), default=0)
    timesteps = sorted({step.timestep for run in calls for step in run})
    every_call = sorted(step.timestep for run in calls for step in run)
    before = [bisect_left(every_call, timestep) for timestep in timesteps] + [len(every_call)]
    best: tuple[tuple[float, ...], int, int, int, _Total] | None = None
    for every in range(2, lags + 2):
        tried = [_RunWindows(run, every, threshold, timesteps) for run in calls]
        # The widest windows come first, so that those with fewer calls than the best one reuses are passed over.
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


def least_threshold(runs: Sequence[Sequence[CallDifferences]]) -> float | None:
    """The lowest threshold for which something is :func:`proposed`; None if there is none."""
    known = {each for run in runs for step in run for each in step.differences if each is not None}
    candidates = sorted(each for each in known if math.isfinite(each))
    place = bisect_left(candidates, True, key=lambda threshold: proposed(runs, threshold) is not None)
    return candidates[place] if place < len(candidates) else None


def lag_count(records: Sequence[SiteRun]) -> int:
    """How many earlier calls each call was compared with, at most."""
    return max((len(step.differences) for record in records for step in record.steps), default=0)


@dataclass(frozen=True)
class _Total:
    """Of the calls that would reuse attention: how many there are, and the sum and the largest of their differences."""

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


class _RunWindows:
    """The windows of one run at one skip range, and what each reuses."""

    def __init__(
        self, steps: Sequence[CallDifferences], every: int, threshold: float, timesteps: Sequence[float]
    ) -> None:
        self._steps, self._every, self._threshold = steps, every, threshold
        falls = steps[0].timestep > steps[-1].timestep
        self._falls = falls
        order = [-step.timestep if falls else step.timestep for step in steps]
        signed = [-timestep if falls else timestep for timestep in timesteps]
        # For each timestep of all runs: this run's first call that is not before it, and its last one not after it.
        self._first = [bisect_left(order, timestep) for timestep in signed]
        self._last = [bisect_right(order, timestep) - 1 for timestep in signed]
        self._totals: dict[int, list[_Total]] = {}

    def reuse(self, low: int, high: int) -> _Total | None:
        """What the window between two timesteps, both included, reuses; None if a difference is above the threshold."""
        entry, end = (high, low) if self._falls else (low, high)
        first, last = self._first[entry], self._last[end]
        if first > last:
            return _Total()
        if first not in self._totals:
            self._totals[first] = self._from(first)
        totals = self._totals[first]
        return totals[last - first] if last - first < len(totals) else None

    def _from(self, first: int) -> list[_Total]:
        """The totals of the windows that begin at a call, by their last call, as far as the threshold allows."""
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
                # NaN is above any threshold.
                if difference is None or not difference <= self._threshold:
                    break
                total = _Total(total.reused + 1, total.differences + difference, max(total.largest, difference))
            totals.append(total)
        return totals


def _ends(timesteps: Sequence[float], low: int, high: int) -> tuple[float, float]:
    """Timesteps that enclose a window and nothing else; -1 below the lowest timestep, as in diffusers' configs."""
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
