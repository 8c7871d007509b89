"""``calibrate``: a denoising run in which every attention is computed, and how much each changes from call to call."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from attnrewrite.analysis.kinds import Kind
from attnrewrite.caching.config import PyramidAttentionBroadcastConfig, validated
from attnrewrite.caching.enabling import disable_cache, enable_session
from attnrewrite.caching.proposals import SiteRun, Step, Window, least_threshold, mean_runs, proposed
from attnrewrite.caching.session import Session
from attnrewrite.caching.streams import Key, Observation
from attnrewrite.errors import CacheError, OptionError

__all__ = ["DEFAULT_THRESHOLD", "Calibration", "calibrate"]

DEFAULT_THRESHOLD = 0.1
"""About what two of 30 steps change the noisy sample itself; see docs/calibrate.md."""

_MIXED = (
    "Calls of one stream were made at one timestep, and are compared with each other. If they are the conditional and "
    "the unconditional pass, the proposals are wrong: call each within attnrewrite.cache_stream, and calibrate again. "
    "(Solvers of second order make such calls rightly.)"
)

_KINDS: tuple[Kind, ...] = ("spatial", "temporal", "cross")


@dataclass(frozen=True)
class Calibration:
    """How much the attentions of a model change over a denoising run, and what Pyramid Attention Broadcast may reuse.

    Attributes:
        model: the name of its class.
        records: each attention in each run of each stream.
        threshold: the relative difference that is tolerated. For another one,
            ``dataclasses.replace(calibration, threshold=0.05)``.
        identifiers: the block identifiers that :func:`calibrate` was given, by the names of their settings.
        notes: what to know before the numbers are believed.
    """

    model: str
    records: tuple[SiteRun, ...]
    threshold: float = DEFAULT_THRESHOLD
    identifiers: dict[str, tuple[str, ...]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Raises:
        OptionError: the threshold is no number above 0.
        """
        _check_threshold(self.threshold)

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """The kinds of attention that the model has."""
        return tuple(kind for kind in _KINDS if any(record.kind == kind for record in self.records))

    @property
    def lags(self) -> int:
        """To how many calls before each call was compared."""
        return max((len(step.differences) for record in self.records for step in record.steps), default=0)

    @functools.cached_property
    def proposals(self) -> dict[Kind, Window | None]:
        """For each kind of :attr:`kinds` what to reuse; None where all differences are above the threshold."""
        return {kind: proposed(mean_runs(self.records, kind), self.threshold) for kind in self.kinds}

    def config(self, current_timestep_callback: Callable[[], Any]) -> PyramidAttentionBroadcastConfig:
        """The proposals as a configuration for :func:`attnrewrite.enable_cache`.

        Args:
            current_timestep_callback: gives the timestep of the call that is being made.

        Raises:
            CacheError: nothing is proposed.
        """
        settings = self._settings()
        if not any(self.proposals.values()):
            raise CacheError(self.refusal)
        config = PyramidAttentionBroadcastConfig(**settings, current_timestep_callback=current_timestep_callback)
        validated(config)
        return config

    @property
    def refusal(self) -> str:
        """Why nothing is proposed."""
        least = {kind: least_threshold(mean_runs(self.records, kind)) for kind in self.kinds}
        needed = ", ".join(f"{kind} {threshold:.3g}" for kind, threshold in least.items() if threshold is not None)
        return (
            f"no attention of {self.model} stays within a relative difference of {self.threshold:g} of what it would "
            f"reuse (thresholds from which something is: {needed or 'none'}): nothing can be reused. Take more steps, "
            "or a higher threshold if the model's results bear it"
        )

    def to_python(self, callback: str = "lambda: pipe.current_timestep") -> str:
        """The configuration as Python code; ``callback`` is the source of its ``current_timestep_callback``.

        Raises:
            CacheError: nothing is proposed.
        """
        if not any(self.proposals.values()):
            raise CacheError(self.refusal)
        lines = [f"    {name}={value!r}," for name, value in self._settings().items()]
        lines.append(f"    current_timestep_callback={callback},")
        notes = [f"# {note}" for note in self.notes]
        return "\n".join([*notes, "attnrewrite.PyramidAttentionBroadcastConfig(", *lines, ")"])

    def _settings(self) -> dict[str, Any]:
        settings: dict[str, Any] = {}
        for kind, window in self.proposals.items():
            if window is not None:
                settings[f"{kind}_attention_block_skip_range"] = window.skip_range
                settings[f"{kind}_attention_timestep_skip_range"] = window.timestep_skip_range
        return {**settings, **self.identifiers}

    def to_dict(self) -> dict[str, Any]:
        """Records and proposals as JSON-ready data; differences that are not finite (of zeros, of NaN) are None."""
        return {
            "model": self.model,
            "threshold": self.threshold,
            "notes": list(self.notes),
            "identifiers": {name: list(names) for name, names in self.identifiers.items()},
            "proposals": {
                kind: None if window is None else dataclasses.asdict(window) for kind, window in self.proposals.items()
            },
            "records": [
                {
                    **{name: getattr(record, name) for name in ("site", "kind", "stream", "run")},
                    "steps": [
                        {
                            "iteration": step.iteration,
                            "timestep": step.timestep,
                            "differences": [_finite(difference) for difference in step.differences],
                        }
                        for step in record.steps
                    ],
                }
                for record in self.records
            ],
        }

    def to_json(self, indent: int | None = 1) -> str:
        return json.dumps(self.to_dict(), indent=indent, allow_nan=False)

    def to_text(self, width: int | None = None) -> str:
        """Tables of the kinds and of the attentions. ``width`` in columns; default: as wide as they need."""
        from attnrewrite.caching.calibration_views import calibration_to_text

        return calibration_to_text(self, width)

    def save_plot(self, path: str | Path) -> Path:
        """Draws the differences into a file of matplotlib's (.png, .svg, .pdf) and returns its path.

        For each kind: the differences of each attention over the timesteps, their means, the threshold and the
        proposed timesteps; below, each attention at each call.

        Raises:
            CacheError: matplotlib is not installed.
        """
        from attnrewrite.caching.calibration_views import plot_calibration

        return plot_calibration(self, Path(path))

    def __str__(self) -> str:
        return self.to_text()


def _finite(difference: float | None) -> float | None:
    return difference if difference is not None and math.isfinite(difference) else None


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
    _check_threshold(threshold)
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
    names = [f"{kind}_attention_block_identifiers" for kind in _KINDS]
    identifiers = {name: getattr(config, name) for name in names if getattr(config, name) is not None}
    return Calibration(name, records, threshold, identifiers, (_MIXED,) if sessions[0].is_mixed else ())


def _check_threshold(threshold: object) -> None:
    if isinstance(threshold, bool) or not isinstance(threshold, (int, float)) or not 0 < threshold < math.inf:
        raise OptionError(
            f"a calibration's threshold must be a number above 0, a relative difference such as 0.1; got {threshold!r}"
        )


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
        self.kept = lags
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
        before = [each[0] for each in current.steps[-self.kept :]]
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
            sorted(records, key=lambda each: (_KINDS.index(each.kind), each.stream, order[each.site], each.run))
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
        return tuple(found.get(lag) for lag in range(1, self.kept + 1))


def _ratio(change: float, norm: float) -> float:
    """A change from nothing to nothing is none."""
    if norm == 0:
        return 0.0 if change == 0 else math.nan if math.isnan(change) else math.inf
    return change / norm
