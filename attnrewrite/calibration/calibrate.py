"""``calibrate``: runs a denoising model without reuse and records how much each attention changes from call to call."""

from __future__ import annotations

import math
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from attnrewrite.analysis.kinds import KINDS, Kind
from attnrewrite.caching.enabling import disable_cache, enable_session
from attnrewrite.caching.session import Session
from attnrewrite.caching.streams import Key, Observation
from attnrewrite.calibration.calibration import DEFAULT_THRESHOLD, Calibration, check_threshold
from attnrewrite.calibration.proposals import CallDifferences, SiteRun
from attnrewrite.errors import CacheError, OptionError
from attnrewrite.options.cache_config import FasterCacheConfig, PyramidAttentionBroadcastConfig, validated

__all__ = ["calibrate"]

_MIXED = (
    "One stream has two calls at one timestep, which are compared with each other. If they are the conditional and the "
    "unconditional pass, the proposals are wrong: call each within attnrewrite.cache_stream, and calibrate again. "
    "(Second-order solvers make such calls for good reason.)"
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

    Nothing is reused meanwhile, so ``run`` gives its usual results. What is measured depends on what ``run`` does: let
    it use typical prompts, and the scheduler, number of steps and resolution that you will use later.

    Args:
        model: compiled, as for :func:`attnrewrite.enable_cache`; without a cache.
        run: makes the calls of one or more denoising runs, such as ``lambda: pipe(prompt)``. It is called once.
        current_timestep_callback: gives the timestep of the call that is being made.
        threshold: the relative difference ``||x_t - x_{t-k}|| / ||x_t||`` that the proposals tolerate. Default 0.1.
        lags: how many earlier calls each call is compared with; as many values are stored for each attention. Skip
            ranges up to ``lags + 1`` are tried. Default 4.
        spatial_attention_block_identifiers, temporal_attention_block_identifiers, cross_attention_block_identifiers:
            as in :class:`attnrewrite.PyramidAttentionBroadcastConfig`.
        memory_limit, offload: as there.

    Raises:
        OptionError: an argument is wrong.
        CacheError: the model has a cache already, or ``run`` did not call it or called it only once. Calls of the model
            raise what they raise under :func:`attnrewrite.enable_cache`.
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
        raise OptionError(f"calibrate's lags must be a whole number of at least 1 (earlier calls); got {lags!r}")
    # A skip range of 1 computes at every call, and stores.
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
    session = _recorded(model, run, config, recorder)
    records = recorder.records()
    _require_differences(records, session.name)
    names = [f"{kind}_attention_block_identifiers" for kind in KINDS]
    identifiers = {name: getattr(config, name) for name in names if getattr(config, name) is not None}
    return Calibration(session.name, records, threshold, identifiers, (_MIXED,) if session.is_mixed else ())


def _recorded(
    model: nn.Module,
    run: Callable[[], Any],
    config: PyramidAttentionBroadcastConfig | FasterCacheConfig,
    recorder: _Recorder,
) -> Session:
    """Runs the model with a recorder and returns the session, which is over."""
    sessions: list[Session] = []

    def make_session(root: nn.Module) -> Session:
        sessions.append(Session(config, root, recorder))
        return sessions[0]

    enable_session(model, make_session, "calibrate")
    try:
        run()
    finally:
        disable_cache(model)
    return sessions[0]


def _require_differences(records: Sequence[SiteRun], name: str) -> None:
    """Raises:
    CacheError: there is nothing to compare. ``name`` is the model's.
    """
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


class _RecordedCall(NamedTuple):
    """One attention in one call.

    Attributes:
        lags: how many calls earlier each value was computed that this one was compared with.
        norms: of the value, then of its difference from each earlier value.
    """

    iteration: int
    timestep: float
    lags: list[int]
    norms: Tensor


@dataclass
class _RecordedRun:
    """One attention in one run."""

    key: Key
    path: str
    kind: Kind
    stream: str
    calls: list[_RecordedCall] = field(default_factory=list)


class _Recorder:
    """Compares each value with earlier ones. The norms stay on the device until the run is over."""

    def __init__(self, lags: int) -> None:
        self.history_length = lags
        self._runs: list[_RecordedRun] = []
        self._current: dict[tuple[int, tuple[str, ...], Key], _RecordedRun] = {}
        self._lock = threading.Lock()

    def see(self, observation: Observation) -> None:
        """See :class:`attnrewrite.caching.streams.Observer`."""
        value, iteration = observation.value, observation.iteration
        place = threading.get_ident(), observation.stream, observation.key
        with self._lock:
            if not observation.earlier:  # A run begins.
                stream = "/".join(observation.stream)
                self._current[place] = _RecordedRun(observation.key, observation.path, observation.kind, stream)
                self._runs.append(self._current[place])
            current = self._current[place]
        before = current.calls[-self.history_length :]
        earlier = observation.earlier[len(observation.earlier) - len(before) :]
        # Lags are not 1, 2, ... where some calls did not compute the attention.
        lags = [iteration - each.iteration for each in before]
        dtype = torch.float64 if value.dtype == torch.float64 else torch.float32
        norms = [torch.linalg.vector_norm(value, dtype=dtype)]
        for each in earlier:
            change = value - each.to(value.device, non_blocking=True)
            norms.append(torch.linalg.vector_norm(change, dtype=dtype))
        current.calls.append(_RecordedCall(iteration, observation.timestep, lags, torch.stack(norms)))

    def records(self) -> tuple[SiteRun, ...]:
        """All that was recorded, in the order of kinds, streams and attentions."""
        names = self._names()
        runs: Counter[tuple[str, Key]] = Counter()
        records = []
        for each in self._runs:
            steps = tuple(
                CallDifferences(call.iteration, call.timestep, self._differences(call.lags, call.norms.tolist()))
                for call in each.calls
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
    """The relative difference; 0 where both values are zero."""
    if norm == 0:
        return 0.0 if change == 0 else math.nan if math.isnan(change) else math.inf
    return change / norm
