"""The methods of attention reuse: when an attention is computed, when stored outputs replace it, and by what tensor.

These are rules alone; nothing is stored here. Sources:

    Pyramid Attention Broadcast  https://arxiv.org/abs/2408.12588, https://github.com/NUS-HPC-AI-Lab/VideoSys
    FasterCache                  https://arxiv.org/abs/2410.19355, https://github.com/Vchitect/FasterCache
"""

from __future__ import annotations

import itertools
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from attnrewrite.analysis.kinds import KINDS, Kind
from attnrewrite.options.cache_config import FasterCacheConfig, PyramidAttentionBroadcastConfig

__all__ = ["CacheMethod", "method_of"]


@dataclass(frozen=True)
class _SkipSchedule:
    """Computation in one call of ``every``, and reuse in the others, at timesteps strictly between two."""

    every: int
    after: float
    before: float

    def skips(self, iteration: int, timestep: float) -> bool:
        # The first call of a run, whose iteration is 0, has nothing to reuse.
        return self.after < timestep < self.before and iteration % self.every != 0

    def __str__(self) -> str:
        return f"in {self.every - 1} of {self.every} calls between {self.after:g} and {self.before:g}"


class CacheMethod(ABC):
    """A method of attention reuse across steps, with the settings of one config.

    Attributes:
        history_length: how many outputs are stored for each attention.
        extrapolates: whether an output is replaced by a combination of several stored ones.
        keeps_reused: whether an output that was made from stored ones is stored in turn.
    """

    history_length: ClassVar[int]
    extrapolates: ClassVar[bool] = False
    keeps_reused: bool = False

    def __init__(
        self, schedules: Mapping[Kind, _SkipSchedule], identifiers: Mapping[Kind, tuple[re.Pattern[str], ...] | None]
    ) -> None:
        self._schedules = schedules
        self._identifiers = identifiers

    @property
    def kinds(self) -> frozenset[Kind]:
        """The kinds of attention whose outputs are ever reused."""
        return frozenset(self._schedules)

    def kind_of(self, path: str, kind: Kind) -> Kind | None:
        """The kind as which an attention is cached; None if it is not.

        Args:
            path: of the module that computes the attention.
            kind: that the graph shows. Identifiers may make a spatial attention temporal, and the reverse; the spatial
                ones are tried first, as in diffusers. A cross-attention stays one.
        """
        named = self._named(path, kind)
        for each in named:
            if each in self._schedules:
                return each
        # It is named as a kind that is not cached, or its own kind has identifiers that do not match it.
        if named or self._identifiers.get(kind) is not None:
            return None
        return kind if kind in self._schedules else None

    def why_not(self, path: str, kind: Kind) -> str:
        """The reason for which :meth:`kind_of` is None."""
        for each in self._named(path, kind) or ([] if kind in self._schedules else [kind]):
            return f"{each}_attention_block_skip_range is not set"
        return f"none of {kind}_attention_block_identifiers matches"

    def _named(self, path: str, kind: Kind) -> list[Kind]:
        """The kinds whose identifiers match an attention that the graph shows to be of ``kind``."""
        among: tuple[Kind, ...] = ("cross",) if kind == "cross" else ("spatial", "temporal")
        return [each for each in among if any(name.search(path) for name in self._identifiers.get(each) or ())]

    def unmatched(self, paths: Collection[str]) -> list[str]:
        """The identifiers that match none of the paths, of the kinds whose outputs are reused."""
        return [
            name.pattern
            for kind in self._schedules
            for name in self._identifiers.get(kind) or ()
            if not any(name.search(path) for path in paths)
        ]

    @abstractmethod
    def reused(self, iteration: int, timestep: float, halved: bool, separate: bool) -> frozenset[Kind]:
        """The kinds whose stored outputs are reused in a call, where outputs are stored.

        Args:
            iteration: how many calls of the run came before.
            timestep: of the call, in the scheduler's units.
            halved: whether the call computes the conditional half of its batch only (:meth:`skips_unconditional`).
            separate: whether conditional and unconditional inputs come in calls of their own, so that no batch has
                two halves.
        """

    @abstractmethod
    def reachable(self, halved: bool, separate: bool) -> frozenset[frozenset[Kind]]:
        """All sets, except the empty one, that :meth:`reused` may return, for any iteration and timestep."""

    @abstractmethod
    def skips_unconditional(self, iteration: int, timestep: float, separate: bool) -> bool:
        """Whether a call computes the conditional half of its batch only.

        Args:
            iteration, timestep, separate: as in :meth:`reused`. Separate calls have no half to skip.
        """

    def predicts_unconditional(self, separate: bool) -> bool:
        """Whether the unconditional half of the model's output may be a prediction.

        Args:
            separate: as in :meth:`reused`.
        """
        return False

    def describe(self) -> str:
        """What is reused when, in words."""
        return ", ".join(f"{kind} attention {schedule}" for kind, schedule in self._schedules.items())

    @property
    def may_skip_unconditional(self) -> bool:
        """Whether :meth:`skips_unconditional` is ever true."""
        return False

    @abstractmethod
    def next_value(self, history: Sequence[Tensor], weight: float) -> Tensor:
        """The tensor that replaces an attention's output.

        Args:
            history: the stored outputs, one or more, the latest last; the last :attr:`history_length` are read.
            weight: of the extrapolation, where the method has one.
        """

    def _skipped(self, iteration: int, timestep: float) -> frozenset[Kind]:
        return frozenset(kind for kind, schedule in self._schedules.items() if schedule.skips(iteration, timestep))

    def _skippable(self) -> frozenset[frozenset[Kind]]:
        """All sets, except the empty one, that :meth:`_skipped` may return."""
        ends = sorted({end for schedule in self._schedules.values() for end in (schedule.after, schedule.before)})
        # The schedules that are active change at the ends alone: those between two ends, and those at an end.
        active = {
            frozenset(
                kind for kind, schedule in self._schedules.items() if schedule.after <= low and high <= schedule.before
            )
            for low, high in itertools.pairwise(ends)
        } | {
            frozenset(kind for kind, schedule in self._schedules.items() if schedule.after < end < schedule.before)
            for end in ends
        }
        found: set[frozenset[Kind]] = set()
        for kinds in active:
            for count in range(1, len(kinds) + 1):
                for skipped in map(frozenset, itertools.combinations(kinds, count)):
                    # The first call that computes all others. A kind that is computed in it always is with them.
                    call = math.lcm(*(self._schedules[kind].every for kind in kinds - skipped))
                    if all(call % self._schedules[kind].every for kind in skipped):
                        found.add(skipped)
        return frozenset(found)


class _PyramidAttentionBroadcast(CacheMethod):
    """The last output replaces the next ones, unchanged."""

    history_length = 1

    def reused(self, iteration: int, timestep: float, halved: bool, separate: bool) -> frozenset[Kind]:
        return self._skipped(iteration, timestep)

    def reachable(self, halved: bool, separate: bool) -> frozenset[frozenset[Kind]]:
        return self._skippable()

    def skips_unconditional(self, iteration: int, timestep: float, separate: bool) -> bool:
        return False

    def next_value(self, history: Sequence[Tensor], weight: float) -> Tensor:
        return history[-1]


class _FasterCache(CacheMethod):
    """An extrapolation of the last two outputs replaces the next ones.

    The unconditional half is predicted (:mod:`attnrewrite.caching.guidance`).
    """

    history_length = 2
    extrapolates = True

    def __init__(
        self,
        schedules: Mapping[Kind, _SkipSchedule],
        identifiers: Mapping[Kind, tuple[re.Pattern[str], ...] | None],
        unconditional: _SkipSchedule | None,
        follow_diffusers: bool,
    ) -> None:
        super().__init__(schedules, identifiers)
        self._unconditional = unconditional
        self.keeps_reused = follow_diffusers

    def reused(self, iteration: int, timestep: float, halved: bool, separate: bool) -> frozenset[Kind]:
        return self._skipped(iteration, timestep) if self._may_extrapolate(halved, separate) else frozenset()

    def reachable(self, halved: bool, separate: bool) -> frozenset[frozenset[Kind]]:
        return self._skippable() if self._may_extrapolate(halved, separate) else frozenset()

    def skips_unconditional(self, iteration: int, timestep: float, separate: bool) -> bool:
        return self._unconditional is not None and not separate and self._unconditional.skips(iteration, timestep)

    def predicts_unconditional(self, separate: bool) -> bool:
        return self._unconditional is not None and not separate

    def describe(self) -> str:
        unconditional = [] if self._unconditional is None else [f"the unconditional half {self._unconditional}"]
        return ", ".join([*filter(None, [super().describe()]), *unconditional])

    @property
    def may_skip_unconditional(self) -> bool:
        schedule = self._unconditional
        return schedule is not None and schedule.every > 1 and schedule.after < schedule.before

    def next_value(self, history: Sequence[Tensor], weight: float) -> Tensor:
        # After one computed output, that one counts as both, as published. ``lerp`` is one pass over memory.
        return history[-1] if len(history) == 1 else torch.lerp(history[-2], history[-1], 1 + weight)

    def _may_extrapolate(self, halved: bool, separate: bool) -> bool:
        # The stored outputs are of conditional halves: they cannot replace the unconditional half of the same call.
        return halved or not self.predicts_unconditional(separate)


def method_of(config: PyramidAttentionBroadcastConfig | FasterCacheConfig) -> CacheMethod:
    """The method of a config.

    Args:
        config: validated (:func:`attnrewrite.options.cache_config.validated`).
    """
    schedules: dict[Kind, _SkipSchedule] = {}
    identifiers: dict[Kind, tuple[re.Pattern[str], ...] | None] = {}
    for kind in KINDS:
        every = getattr(config, f"{kind}_attention_block_skip_range", None)
        if every is not None:
            schedules[kind] = _SkipSchedule(every, *getattr(config, f"{kind}_attention_timestep_skip_range"))
        names = getattr(config, f"{kind}_attention_block_identifiers", None)
        identifiers[kind] = None if names is None else tuple(re.compile(name) for name in names)
    if isinstance(config, PyramidAttentionBroadcastConfig):
        return _PyramidAttentionBroadcast(schedules, identifiers)
    unconditional = None
    if not config.is_guidance_distilled:
        timesteps = config.unconditional_batch_timestep_skip_range
        unconditional = _SkipSchedule(config.unconditional_batch_skip_range, *timesteps)
    return _FasterCache(schedules, identifiers, unconditional, config.follow_diffusers)
