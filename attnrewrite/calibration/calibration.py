"""The result of a calibration: what was measured, and the config that is proposed."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from attnrewrite.analysis.kinds import KINDS, Kind
from attnrewrite.calibration.proposals import SiteRun, Window, lag_count, least_threshold, mean_runs, proposed
from attnrewrite.calibration.render import Measured, plot, print_tables, tables_to_text
from attnrewrite.errors import CacheError, OptionError
from attnrewrite.options.cache_config import PyramidAttentionBroadcastConfig, validated

__all__ = ["DEFAULT_THRESHOLD", "Calibration", "check_threshold", "print_calibration"]

DEFAULT_THRESHOLD = 0.1
"""About as much as two of 30 steps change the noisy sample itself; see docs/calibrate.md."""


@dataclass(frozen=True)
class Calibration:
    """How much the attentions of a model change over a denoising run, and what Pyramid Attention Broadcast may reuse.

    Attributes:
        model: the name of its class.
        records: each attention in each run of each stream.
        threshold: the relative difference that is tolerated. For another one,
            ``dataclasses.replace(calibration, threshold=0.05)``.
        identifiers: the block identifiers that :func:`calibrate` was given, by the names of their settings.
        notes: cautions about the numbers.
    """

    model: str
    records: tuple[SiteRun, ...]
    threshold: float = DEFAULT_THRESHOLD
    identifiers: dict[str, tuple[str, ...]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Raises:
        OptionError: the threshold is not a number above 0.
        """
        check_threshold(self.threshold)

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """The kinds of attention that the model has."""
        return tuple(kind for kind in KINDS if any(record.kind == kind for record in self.records))

    @property
    def lags(self) -> int:
        """How many earlier calls each call was compared with."""
        return lag_count(self.records)

    @functools.cached_property
    def proposals(self) -> dict[Kind, Window | None]:
        """What to reuse, for each kind of :attr:`kinds`; None where all differences are above the threshold."""
        return {kind: proposed(mean_runs(self.records, kind), self.threshold) for kind in self.kinds}

    def config(self, current_timestep_callback: Callable[[], Any]) -> PyramidAttentionBroadcastConfig:
        """The proposals as a config for :func:`attnrewrite.enable_cache`.

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
        """The config as Python code.

        Args:
            callback: the source of its ``current_timestep_callback``.

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
        """Records and proposals as JSON-ready data. Differences that are not finite (of zeros, of NaN) are None."""
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
        return tables_to_text(self._measured, width)

    def save_plot(self, path: str | Path) -> Path:
        """Draws the differences with matplotlib into a file (.png, .svg, .pdf) and returns its path.

        A panel for each kind shows the differences of each attention over the timesteps, their means, the threshold and
        the proposed timesteps. The last panel shows each attention at each call.

        Raises:
            CacheError: matplotlib is not installed.
        """
        return plot(self._measured, Path(path))

    @property
    def _measured(self) -> Measured:
        """What tables and plot show."""
        refusal = [] if any(self.proposals.values()) else [self.refusal]
        return Measured(self.model, self.records, self.proposals, self.threshold, [*self.notes, *refusal])

    def __str__(self) -> str:
        return self.to_text()


def print_calibration(calibration: Calibration, console: Console | None = None) -> None:
    """Prints the tables of :meth:`Calibration.to_text` to a terminal, in color where the terminal has any."""
    print_tables(calibration._measured, console)


def _finite(difference: float | None) -> float | None:
    return difference if difference is not None and math.isfinite(difference) else None


def check_threshold(threshold: object) -> None:
    if isinstance(threshold, bool) or not isinstance(threshold, (int, float)) or not 0 < threshold < math.inf:
        raise OptionError(
            f"a calibration's threshold must be a number above 0, a relative difference such as 0.1; got {threshold!r}"
        )
