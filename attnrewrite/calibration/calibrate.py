"""``calibrate``: a denoising run in which every attention is computed, and how much each changes from call to call."""

from __future__ import annotations

import math
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from attnrewrite.analysis.kinds import Kind
from attnrewrite.caching.enabling import disable_cache, enable_session
from attnrewrite.caching.session import Session
from attnrewrite.caching.streams import Key, Observation
from attnrewrite.calibration.calibration import DEFAULT_THRESHOLD, KINDS, Calibration, check_threshold
from attnrewrite.calibration.proposals import SiteRun, Step
from attnrewrite.errors import CacheError, OptionError
from attnrewrite.options.cache_config import PyramidAttentionBroadcastConfig, validated

__all__ = ["calibrate"]

_MIXED = (
    "Calls of one stream were made at one timestep, and are compared with each other. If they are the conditional and "
    "the unconditional pass, the proposals are wrong: call each within attnrewrite.cache_stream, and calibrate again. "
    "(Solvers of second order make such calls rightly.)"
)


def calibrate(
    model: nn.Module,
    run: Callable[[], Any],
    current_timestep_callback: Callable[[], Any],
    *,
    threshold: float = DEFAULT_THRESHOLD,
    lags: int = 4,
    spatial_attention_block_identifiers: Sequence[str] | None = None,
    temporal_attention_block_identifiers: Sequence[str] | None = None,
    cross_attention_block_identifiers: Sequence[str] | None = None,
    memory_limit: int | None = None,
    offload: bool = False,
) -> Calibration:
    """Runs a model for real and records how much each attention changes from one call to the next.

    Nothing is reused meanwhile, so ``run`` gives what it always gives. Its own inputs decide what is measured: take
    the scheduler, the number of steps and the resolution of later use, and typical prompts.

    Args:
        model: compiled, as for :func:`attnrewrite.enable_cache`; without a cache.
        run: makes the calls of one or more denoising runs, such as ``lambda: pipe(prompt)``. Called once.
        current_timestep_callback: gives the timestep of the call that is being made.
        threshold: the relative difference ``||x_t - x_{t-k}|| / ||x_t||`` that the proposals tolerate. Default 0.1.
        lags: to how many calls before each call is compared; skip ranges up to one more are tried. As many values are
            kept for each attention. Default 4.
        spatial_attention_block_identifiers, temporal_attention_block_identifiers, cross_attention_block_identifiers,
            memory_limit, offload: as in :class:`attnrewrite.PyramidAttentionBroadcastConfig`.

    Raises:
        OptionError: an argument is wrong.
        CacheError: the model has a cache already, ``run`` did not call it or called it only once, and whatever calls
            raise under :func:`attnrewrite.enable_cache`.
        TypeError: nothing in ``model`` is compiled.

    Example::

        calibration = attnrewrite.calibrate(pipe.transformer, lambda: pipe(prompt), lambda: pipe.current_timestep)
        print(calibration)
        attnrewrite.enable_cache(pipe.transformer, calibration.config(lambda: pipe.current_timestep))
    """
    check_threshold(threshold)
    if not callable(run):
        raise OptionError(f"calibrate's run must be a function without arguments that calls the model; got {run!r}")
    if isinstance(lags, bool) or not isinstance(lags, int) or lags < 1:
        raise OptionError(f"calibrate's lags must be a whole number of at least 1 (calls before); got {lags!r}")
    # A skip range of 1 computes at every call, and keeps.
    config = validated(
        PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=1,
            temporal_attention_block_skip_range=1,
            cross_attention_block_skip_range=1,
            spatial_attention_block_identifiers=spatial_attention_block_identifiers,
            temporal_attention_block_identifiers=temporal_attention_block_identifiers,
            cross_attention_block_identifiers=cross_attention_block_identifiers,
            current_timestep_callback=current_timestep_callback,
            memory_limit=memory_limit,
            offload=offload,
        )
    )
    recorder = _Recorder(lags)
    sessions: list[Session] = []

    def session_of(root: nn.Module) -> Session:
        sessions.append(Session(config, root, recorder))
        return sessions[0]

    enable_session(model, session_of, "calibrate")
    try:
        run()
    finally:
        disable_cache(model)
    name = sessions[0].name
    records = recorder.records()
    if not records:
        raise CacheError(
            f"run() did not call {name}, or not as it was given: it must call what calibrate was given (compile "
            "pipe.transformer in place with .compile(), or assign what torch.compile returns before)"
        )
    if not any(difference is not None for each in records for step in each.steps for difference in step.differences):
        raise CacheError(
            f"run() made no two calls of {name} that belong to one denoising run, so nothing can be compared: it must "
            "make all calls of a run, with timesteps that rise or fall"
        )
    names = [f"{kind}_attention_block_identifiers" for kind in KINDS]
    identifiers = {name: getattr(config, name) for name in names if getattr(config, name) is not None}
    return Calibration(name, records, threshold, identifiers, (_MIXED,) if sessions[0].is_mixed else ())


@dataclass
class _Recorded:
    """One attention in one run."""

    key: Key
    path: str
    kind: Kind
    stream: str
    steps: list[tuple[int, float, list[int], Tensor]] = field(default_factory=list)
    """Iteration, timestep, how many calls before each compared value is, and norms: the value's, then the changes'."""


class _Recorder:
    """Compares each value with those before it; numbers stay on the device until the run is over."""

    def __init__(self, lags: int) -> None:
        self.history_length = lags
        self._runs: list[_Recorded] = []
        self._current: dict[tuple[int, tuple[str, ...], Key], _Recorded] = {}
        self._lock = threading.Lock()

    def see(self, observation: Observation) -> None:
        """See :class:`attnrewrite.caching.streams.Observer`."""
        value, iteration = observation.value, observation.iteration
        place = threading.get_ident(), observation.stream, observation.key
        with self._lock:
            if not observation.earlier:  # A run begins.
                stream = "/".join(observation.stream)
                self._current[place] = _Recorded(observation.key, observation.path, observation.kind, stream)
                self._runs.append(self._current[place])
            current = self._current[place]
        before = [each[0] for each in current.steps[-self.history_length :]]
        earlier = observation.earlier[len(observation.earlier) - len(before) :]
        # More than 1, 2, ... where an attention was left out of some calls.
        lags = [iteration - each for each in before]
        dtype = torch.float64 if value.dtype == torch.float64 else torch.float32
        norms = [torch.linalg.vector_norm(value, dtype=dtype)]
        for each in earlier:
            change = value - each.to(value.device, non_blocking=True)
            norms.append(torch.linalg.vector_norm(change, dtype=dtype))
        current.steps.append((iteration, observation.timestep, lags, torch.stack(norms)))

    def records(self) -> tuple[SiteRun, ...]:
        """Everything that was seen, by kind, stream and the order of the attentions."""
        names = self._names()
        runs: Counter[tuple[str, Key]] = Counter()
        records = []
        for each in self._runs:
            steps = tuple(
                Step(iteration, timestep, self._differences(lags, norms.tolist()))
                for iteration, timestep, lags, norms in each.steps
            )
            number = runs[each.stream, each.key]
            runs[each.stream, each.key] += 1
            records.append(SiteRun(names[each.key], each.kind, each.stream, number, steps))
        order = {name: place for place, name in enumerate(names.values())}
        return tuple(
            sorted(records, key=lambda each: (KINDS.index(each.kind), each.stream, order[each.site], each.run))
        )

    def _names(self) -> dict[Key, str]:
        places: Counter[str] = Counter()
        names: dict[Key, str] = {}
        for each in self._runs:
            if each.key not in names:
                places[each.path] += 1
                number = "" if places[each.path] == 1 else f" #{places[each.path]}"
                names[each.key] = f"{each.path or 'attention'}{number}"
        return names

    def _differences(self, lags: Sequence[int], norms: Sequence[float]) -> tuple[float | None, ...]:
        norm, *changes = norms
        found = {lag: _ratio(change, norm) for lag, change in zip(lags, changes, strict=True)}
        return tuple(found.get(lag) for lag in range(1, self.history_length + 1))


def _ratio(change: float, norm: float) -> float:
    """A change from nothing to nothing is none."""
    if norm == 0:
        return 0.0 if change == 0 else math.nan if math.isnan(change) else math.inf
    return change / norm
