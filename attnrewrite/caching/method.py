"""When an attention is computed, when its stored outputs stand in for it, and what they then give.

Plain rules: nothing is stored here. Sources: Pyramid Attention Broadcast, https://arxiv.org/abs/2408.12588 and
https://github.com/NUS-HPC-AI-Lab/VideoSys; FasterCache, https://arxiv.org/abs/2410.19355 and
https://github.com/Vchitect/FasterCache.
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

from attnrewrite.analysis.kinds import Kind
from attnrewrite.options.cache_config import FasterCacheConfig, PyramidAttentionBroadcastConfig

__all__ = ["Method", "method_of"]

_KINDS: tuple[Kind, ...] = ("spatial", "temporal", "cross")


@dataclass(frozen=True)
class _Rule:
    """Computed in one call of ``every``; stored outputs are used strictly between two timesteps only."""

    every: int
    after: float
    before: float

    def skips(self, iteration: int, timestep: float) -> bool:
        # In the first call of a run, whose iteration is 0, there is nothing to use.
        return self.after < timestep < self.before and iteration % self.every != 0

    def __str__(self) -> str:
        return f"in {self.every - 1} of {self.every} calls between {self.after:g} and {self.before:g}"


class Method(ABC):
    """One method of cross-step caching, as a configuration has it.

    Attributes:
        kept: how many outputs are stored for a site.
        extrapolates: whether what stands in for an output is computed of several.
        keeps_reused: whether an output that was made of stored ones is stored in turn.
    """

    kept: ClassVar[int]
    extrapolates: ClassVar[bool] = False
    keeps_reused: bool = False

    def __init__(
        self, rules: Mapping[Kind, _Rule], identifiers: Mapping[Kind, tuple[re.Pattern[str], ...] | None]
    ) -> None:
        self._rules = rules
        self._identifiers = identifiers

    @property
    def kinds(self) -> frozenset[Kind]:
        """The kinds of attention whose outputs are used again at all."""
        return frozenset(self._rules)

    def kind_of(self, path: str, kind: Kind) -> Kind | None:
        """As which kind a site is cached; None if it is not.

        Args:
            path: of the module that the attention is computed in.
            kind: what the graph says. Identifiers may make a spatial attention temporal, and the reverse, as in
                diffusers the spatial ones first; a cross-attention stays one.
        """
        named = self._named(path, kind)
        for each in named:
            if each in self._rules:
                return each
        # Named as a kind that is not cached, or passed over by the names of its own kind.
        if named or self._identifiers.get(kind) is not None:
            return None
        return kind if kind in self._rules else None

    def why_not(self, path: str, kind: Kind) -> str:
        """Why :meth:`kind_of` is None for a site."""
        for each in self._named(path, kind) or ([] if kind in self._rules else [kind]):
            return f"{each}_attention_block_skip_range is not set"
        return f"none of {kind}_attention_block_identifiers matches"

    def _named(self, path: str, kind: Kind) -> list[Kind]:
        """As which kinds identifiers name a site that the graph says is of ``kind``."""
        among: tuple[Kind, ...] = ("cross",) if kind == "cross" else ("spatial", "temporal")
        return [each for each in among if any(name.search(path) for name in self._identifiers.get(each) or ())]

    def unmatched(self, paths: Collection[str]) -> list[str]:
        """The identifiers of kinds whose outputs are used again that match none of the paths."""
        return [
            name.pattern
            for kind in self._rules
            for name in self._identifiers.get(kind) or ()
            if not any(name.search(path) for path in paths)
        ]

    @abstractmethod
    def reused(self, iteration: int, timestep: float, halved: bool, separate: bool) -> frozenset[Kind]:
        """The kinds whose stored outputs are used in a call, if there are any.

        Args:
            iteration: how many calls of the run came before.
            timestep: of the call, in the scheduler's units.
            halved: whether the call computes the conditional half of its batch only (:meth:`skips_unconditional`).
            separate: whether conditional and unconditional inputs come in calls of their own, so that none has halves.
        """

    @abstractmethod
    def reachable(self, halved: bool, separate: bool) -> frozenset[frozenset[Kind]]:
        """Everything but the empty set that :meth:`reused` may give, for any iteration and timestep."""

    @abstractmethod
    def skips_unconditional(self, iteration: int, timestep: float, separate: bool) -> bool:
        """Whether a call computes the conditional half of its batch only.

        Args:
            iteration, timestep, separate: as in :meth:`reused`. A call of its own has no half to skip.
        """

    def describe(self) -> str:
        """What is reused when, in words."""
        return ", ".join(f"{kind} attention {rule}" for kind, rule in self._rules.items())

    @property
    def may_skip_unconditional(self) -> bool:
        """Whether :meth:`skips_unconditional` may say yes at all."""
        return False

    @abstractmethod
    def next_value(self, history: Sequence[Tensor], weight: float) -> Tensor:
        """What stands in for an attention's output.

        Args:
            history: the stored outputs, the latest last; one at least, of which :attr:`kept` at most are read.
            weight: of the extrapolation, where the method has one.
        """

    def _skipped(self, iteration: int, timestep: float) -> frozenset[Kind]:
        return frozenset(kind for kind, rule in self._rules.items() if rule.skips(iteration, timestep))

    def _skippable(self) -> frozenset[frozenset[Kind]]:
        """What :meth:`_skipped` may give, less the empty set."""
        ends = sorted({end for rule in self._rules.values() for end in (rule.after, rule.before)})
        # Which rules hold changes at the ends only: what holds between two of them, and what holds at one.
        active = {
            frozenset(kind for kind, rule in self._rules.items() if rule.after <= low and high <= rule.before)
            for low, high in itertools.pairwise(ends)
        } | {frozenset(kind for kind, rule in self._rules.items() if rule.after < end < rule.before) for end in ends}
        found: set[frozenset[Kind]] = set()
        for kinds in active:
            for count in range(1, len(kinds) + 1):
                for skipped in map(frozenset, itertools.combinations(kinds, count)):
                    # The first call in which all others are due; if one of these is due then, it always is.
                    call = math.lcm(*(self._rules[kind].every for kind in kinds - skipped))
                    if all(call % self._rules[kind].every for kind in skipped):
                        found.add(skipped)
        return frozenset(found)


class _PyramidAttentionBroadcast(Method):
    """The last output, as it is."""

    kept = 1

    def reused(self, iteration: int, timestep: float, halved: bool, separate: bool) -> frozenset[Kind]:
        return self._skipped(iteration, timestep)

    def reachable(self, halved: bool, separate: bool) -> frozenset[frozenset[Kind]]:
        return self._skippable()

    def skips_unconditional(self, iteration: int, timestep: float, separate: bool) -> bool:
        return False

    def next_value(self, history: Sequence[Tensor], weight: float) -> Tensor:
        return history[-1]


class _FasterCache(Method):
    """The last two outputs, extrapolated; the unconditional half predicted (:mod:`attnrewrite.caching.guidance`)."""

    kept = 2
    extrapolates = True

    def __init__(
        self,
        rules: Mapping[Kind, _Rule],
        identifiers: Mapping[Kind, tuple[re.Pattern[str], ...] | None],
        unconditional: _Rule | None,
        follow_diffusers: bool,
    ) -> None:
        super().__init__(rules, identifiers)
        self._unconditional = unconditional
        self.keeps_reused = follow_diffusers

    def reused(self, iteration: int, timestep: float, halved: bool, separate: bool) -> frozenset[Kind]:
        return self._skipped(iteration, timestep) if self._may_extrapolate(halved, separate) else frozenset()

    def reachable(self, halved: bool, separate: bool) -> frozenset[frozenset[Kind]]:
        return self._skippable() if self._may_extrapolate(halved, separate) else frozenset()

    def skips_unconditional(self, iteration: int, timestep: float, separate: bool) -> bool:
        return self._unconditional is not None and not separate and self._unconditional.skips(iteration, timestep)

    def describe(self) -> str:
        unconditional = [] if self._unconditional is None else [f"the unconditional half {self._unconditional}"]
        return ", ".join([*filter(None, [super().describe()]), *unconditional])

    @property
    def may_skip_unconditional(self) -> bool:
        rule = self._unconditional
        return rule is not None and rule.every > 1 and rule.after < rule.before

    def next_value(self, history: Sequence[Tensor], weight: float) -> Tensor:
        # After one computed output, it counts as the one before it, too, as published. One pass over memory.
        return history[-1] if len(history) == 1 else torch.lerp(history[-2], history[-1], 1 + weight)

    def _may_extrapolate(self, halved: bool, separate: bool) -> bool:
        # Outputs of conditional halves are stored, which say nothing of an unconditional half in the same call.
        return self._unconditional is None or halved or separate


def method_of(config: PyramidAttentionBroadcastConfig | FasterCacheConfig) -> Method:
    """The method that a configuration describes.

    Args:
        config: as :func:`attnrewrite.caching.config.validated` gives it.
    """
    rules: dict[Kind, _Rule] = {}
    identifiers: dict[Kind, tuple[re.Pattern[str], ...] | None] = {}
    for kind in _KINDS:
        every = getattr(config, f"{kind}_attention_block_skip_range", None)
        if every is not None:
            rules[kind] = _Rule(every, *getattr(config, f"{kind}_attention_timestep_skip_range"))
        names = getattr(config, f"{kind}_attention_block_identifiers", None)
        identifiers[kind] = None if names is None else tuple(re.compile(name) for name in names)
    if isinstance(config, PyramidAttentionBroadcastConfig):
        return _PyramidAttentionBroadcast(rules, identifiers)
    unconditional = _Rule(config.unconditional_batch_skip_range, *config.unconditional_batch_timestep_skip_range)
    return _FasterCache(
        rules, identifiers, None if config.is_guidance_distilled else unconditional, config.follow_diffusers
    )
