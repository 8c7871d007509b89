"""What a calibration measured, and what follows from it."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from attnrewrite.analysis.kinds import Kind
from attnrewrite.calibration.proposals import SiteRun, Window, least_threshold, mean_runs, proposed
from attnrewrite.errors import CacheError, OptionError
from attnrewrite.options.cache_config import PyramidAttentionBroadcastConfig, validated

__all__ = ["DEFAULT_THRESHOLD", "Calibration"]

DEFAULT_THRESHOLD = 0.1
"""About what two of 30 steps change the noisy sample itself; see docs/calibrate.md."""

KINDS: tuple[Kind, ...] = ("spatial", "temporal", "cross")


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
        check_threshold(self.threshold)

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """The kinds of attention that the model has."""
        return tuple(kind for kind in KINDS if any(record.kind == kind for record in self.records))

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
        from attnrewrite.calibration.render import calibration_to_text

        return calibration_to_text(self, width)

    def save_plot(self, path: str | Path) -> Path:
        """Draws the differences into a file of matplotlib's (.png, .svg, .pdf) and returns its path.

        For each kind: the differences of each attention over the timesteps, their means, the threshold and the
        proposed timesteps; below, each attention at each call.

        Raises:
            CacheError: matplotlib is not installed.
        """
        from attnrewrite.calibration.render import plot_calibration

        return plot_calibration(self, Path(path))

    def __str__(self) -> str:
        return self.to_text()


def _finite(difference: float | None) -> float | None:
    return difference if difference is not None and math.isfinite(difference) else None


def check_threshold(threshold: object) -> None:
    if isinstance(threshold, bool) or not isinstance(threshold, (int, float)) or not 0 < threshold < math.inf:
        raise OptionError(
            f"a calibration's threshold must be a number above 0, a relative difference such as 0.1; got {threshold!r}"
        )
