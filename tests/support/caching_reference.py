"""A reference model of cross-step caching in plain Python: whole series of calls, worked out with exact fractions.

Written from the papers and from what diffusers' hooks do, module by module. Nothing of :mod:`attnrewrite` is used. What
an attention gives is a sum of *labels*: ``{3: 3/2, 1: -1/2}`` is one and a half times what it computed in the call
number 3, less half of what it computed in the call number 1. A real model is compared by :func:`evaluate`.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

__all__ = ["Call", "Guidance", "Outcome", "Settings", "evaluate", "settings_of", "simulate"]

Value = dict[int, Fraction]
"""By the number of a call among all calls: how much of what was computed in it."""


@dataclass(frozen=True)
class Call:
    """A call of the model.

    Attributes:
        timestep: what the timestep callback gives.
        stream: whose call it is.
        signature: what the shapes, dtypes and devices of the inputs are.
        reset: whether the user resets the cache before it.
        weight: of FasterCache's extrapolation.
        low, high: weights of FasterCache's difference of guidance.
    """

    timestep: float
    stream: str = ""
    signature: Hashable = None
    reset: bool = False
    weight: Fraction = Fraction(1, 2)
    low: Fraction = Fraction(1)
    high: Fraction = Fraction(1)


@dataclass(frozen=True)
class Guidance:
    """A predicted unconditional half: the conditional one plus parts of a difference.

    Attributes:
        learned: the number of the call in which the difference was learned.
        low, high: how much of its low and its high frequencies.
    """

    learned: int
    low: Fraction
    high: Fraction


@dataclass
class Outcome:
    """What a call gives.

    Attributes:
        first: whether it is the first call of a run.
        values: of each attention that is cached; of the conditional half, if the batch has halves.
        reused: the attentions that are not computed.
        guidance: how the unconditional half is predicted; None if it is computed, or there is none.
    """

    first: bool
    values: dict[str, Value] = field(default_factory=dict)
    reused: set[str] = field(default_factory=set)
    guidance: Guidance | None = None


@dataclass(frozen=True)
class Settings:
    """What the methods' papers let one choose.

    Attributes:
        ranges: by kind, in how many calls an attention is computed once, and the timesteps between which it is skipped.
        unconditional: likewise for the unconditional half; None if there is none, or the method does not skip it.
        extrapolates: FasterCache, and not Pyramid Attention Broadcast.
        distilled: the model has no unconditional half.
        separate: conditional and unconditional inputs come in calls of their own.
        keeps_extrapolated: diffusers' reading of FasterCache.
    """

    ranges: Mapping[str, tuple[int, float, float]]
    unconditional: tuple[int, float, float] | None = None
    extrapolates: bool = False
    distilled: bool = False
    separate: bool = False
    keeps_extrapolated: bool = False


def settings_of(config: Any, separate: bool = False) -> Settings:
    """The settings of diffusers' configurations, or of attnrewrite's checked ones."""
    ranges = {}
    for kind in ("spatial", "temporal", "cross"):
        every = getattr(config, f"{kind}_attention_block_skip_range", None)
        if every is not None:
            ranges[kind] = (every, *getattr(config, f"{kind}_attention_timestep_skip_range"))
    if not hasattr(config, "unconditional_batch_skip_range"):
        return Settings(ranges, separate=separate)
    return Settings(
        ranges,
        (config.unconditional_batch_skip_range, *config.unconditional_batch_timestep_skip_range),
        extrapolates=True,
        distilled=config.is_guidance_distilled,
        separate=separate,
        keeps_extrapolated=getattr(config, "follow_diffusers", True),
    )


def simulate(settings: Settings, sites: Mapping[str, str], calls: Sequence[Call]) -> list[Outcome]:
    """What each call gives.

    Args:
        sites: the attentions by name, each with its kind.
        calls: in order, of all streams.
    """
    outcomes = [Outcome(first=False) for _ in calls]
    for numbers in _runs(calls):
        outcomes[numbers[0]].first = True
        halves = _guidance(settings, calls, numbers)
        for number, guidance in zip(numbers, halves, strict=True):
            outcomes[number].guidance = guidance
        free = settings.distilled or settings.separate or not settings.extrapolates
        for site, kind in sites.items():
            if kind not in settings.ranges:
                continue
            stale = [free or guidance is not None for guidance in halves]
            for number, computed, value in _attention(settings, settings.ranges[kind], calls, numbers, stale):
                outcomes[number].values[site] = value
                if not computed:
                    outcomes[number].reused.add(site)
    return outcomes


def _runs(calls: Sequence[Call]) -> list[list[int]]:
    """The numbers of the calls of each run of each stream."""
    runs = []
    for stream in {call.stream for call in calls}:
        rest = [number for number, call in enumerate(calls) if call.stream == stream]
        while rest:
            length = max(size for size in range(1, len(rest) + 1) if _is_one_run(calls, rest[:size]))
            runs.append(rest[:length])
            rest = rest[length:]
    return runs


def _is_one_run(calls: Sequence[Call], numbers: Sequence[int]) -> bool:
    timesteps = [calls[number].timestep for number in numbers]
    monotonic = timesteps in (sorted(timesteps), sorted(timesteps, reverse=True))
    # A reset is meant for all streams: it ends every run that has calls before it and after it.
    untouched = not any(call.reset for call in calls[numbers[0] + 1 : numbers[-1] + 1])
    return monotonic and untouched and len({calls[number].signature for number in numbers}) == 1


def _inside(timestep: float, rule: tuple[int, float, float]) -> bool:
    return rule[1] < timestep and timestep < rule[2]


def _guidance(settings: Settings, calls: Sequence[Call], numbers: Sequence[int]) -> list[Guidance | None]:
    """For each call of a run, how its unconditional half is predicted, or None."""
    if settings.unconditional is None or settings.distilled or settings.separate:
        return [None] * len(numbers)
    result: list[Guidance | None] = []
    latest = Guidance(numbers[0], Fraction(1), Fraction(1))
    for place, number in enumerate(numbers):
        call = calls[number]
        due = place in range(0, len(numbers), settings.unconditional[0])
        if due or not _inside(call.timestep, settings.unconditional):
            latest = Guidance(number, Fraction(1), Fraction(1))
            result.append(None)
        else:
            latest = Guidance(latest.learned, latest.low * call.low, latest.high * call.high)
            result.append(latest)
    return result


def _attention(
    settings: Settings,
    rule: tuple[int, float, float],
    calls: Sequence[Call],
    numbers: Sequence[int],
    may_be_stale: Sequence[bool],
) -> list[tuple[int, bool, Value]]:
    """For each call of a run: its number, whether the attention is computed, and what it gives."""
    due = set(range(0, len(numbers), rule[0]))
    made: list[tuple[int, bool, Value]] = []
    for place, number in enumerate(numbers):
        if place in due or not may_be_stale[place] or not _inside(calls[number].timestep, rule):
            made.append((number, True, {number: Fraction(1)}))
            continue
        stored = [value for _, computed, value in made if computed or settings.keeps_extrapolated]
        last = stored[-1]
        before = stored[-2] if len(stored) > 1 else last
        if not settings.extrapolates:
            made.append((number, False, last))
            continue
        weight = calls[number].weight
        labels = last.keys() | before.keys()
        value = {
            label: (1 + weight) * last.get(label, Fraction(0)) - weight * before.get(label, Fraction(0))
            for label in labels
        }
        made.append((number, False, {label: share for label, share in value.items() if share}))
    return made


def evaluate(value: Value, computed: Sequence[Any]) -> Any:
    """A value of real outputs.

    Args:
        computed: for each call, what the attention computes in it, or would; anything with ``*`` and ``+``.
    """
    return sum(float(share) * computed[label] for label, share in value.items())
