"""Tables and a plot of what was measured in a calibration."""

from __future__ import annotations

import io
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from attnrewrite.analysis.kinds import Kind
from attnrewrite.calibration.proposals import CallDifferences, SiteRun, Window, lag_count, mean_runs
from attnrewrite.errors import CacheError

__all__ = ["Measured", "plot", "print_tables", "tables_to_text"]

_WIDTH = 240
"""Columns of text outside of a terminal. A table is as wide as it needs, up to these."""


@dataclass(frozen=True)
class Measured:
    """What the renderings show.

    Attributes:
        model: the name of its class.
        records: each attention in each run of each stream.
        proposals: for each kind of attention that the model has; None where nothing is proposed.
        threshold: the relative difference that is tolerated.
        notes: sentences to stand below the tables.
    """

    model: str
    records: Sequence[SiteRun]
    proposals: Mapping[Kind, Window | None]
    threshold: float
    notes: Sequence[str]


def tables_to_text(measured: Measured, width: int | None = None) -> str:
    """The tables as plain text. ``width`` in columns; default: as wide as they need."""
    out = io.StringIO()
    console = Console(file=out, width=width or _WIDTH, color_system=None, force_terminal=False, legacy_windows=False)
    console.print(_tables(measured))
    return "\n".join(line.rstrip() for line in out.getvalue().rstrip().split("\n")) + "\n"


def print_tables(measured: Measured, console: Console | None = None) -> None:
    """Prints the tables to a terminal, in color where the terminal has any."""
    (console or Console()).print(_tables(measured))


def _tables(measured: Measured) -> RenderableType:
    sites = {record.site for record in measured.records}
    calls = sum(len(run) for run in _runs_of_all(measured.records))
    summary = (
        f"{measured.model}: {len(sites)} attention{'s' * (len(sites) != 1)} in {calls} calls; "
        f"relative differences from earlier calls, threshold {measured.threshold:g}"
    )
    notes = [Text(note, style="bold") for note in measured.notes]
    return Group(Text(summary), _kind_table(measured), _site_table(measured), *notes)


def _kind_table(measured: Measured) -> Table:
    """A row for each kind: the mean differences, and the proposal."""
    lags = _lags(measured)
    table = _table("kind", *map(_calls_before, lags), "computed", "timesteps", "reused", "largest")
    for kind, window in measured.proposals.items():
        means = [_cell(_column(mean_runs(measured.records, kind), lag)) for lag in lags]
        if window is None:
            table.add_row(kind, *means, "always", "", "", "")
            continue
        after, before = window.timestep_skip_range
        table.add_row(
            kind,
            *means,
            f"1 of {window.skip_range} calls",
            f"{after:g} to {before:g}",
            f"{window.reused} of {window.calls} calls",
            f"{window.largest_difference:.3f}",
        )
    return table


def _site_table(measured: Measured) -> Table:
    """A row for each attention in each stream: its mean differences, and the largest one."""
    lags = _lags(measured)
    with_stream = {record.stream for record in measured.records} != {""}
    stream_title = ["stream"] if with_stream else []
    table = _table("attention", "kind", *stream_title, *map(_calls_before, lags), "largest from the call before")
    for group in _grouped(measured.records):
        steps = [record.steps for record in group]
        first = group[0]
        table.add_row(
            Text(first.site),
            first.kind,
            *([Text(first.stream)] if with_stream else []),
            *(_cell(_column(steps, lag)) for lag in lags),
            _peak(steps),
        )
    return table


def _lags(measured: Measured) -> range:
    return range(1, lag_count(measured.records) + 1)


def _table(first: str, *others: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column(first)
    for title in others:
        table.add_column(title, justify="left" if title in ("kind", "stream", "computed", "timesteps") else "right")
    return table


def _calls_before(lag: int) -> str:
    return "1 call before" if lag == 1 else f"{lag} before"


def _runs_of_all(records: Sequence[SiteRun]) -> list[Sequence[CallDifferences]]:
    """The calls of each stream and run: those of its attention with the most calls."""
    longest: dict[tuple[str, int], Sequence[CallDifferences]] = {}
    for record in records:
        place = record.stream, record.run
        longest[place] = max(longest.get(place, ()), record.steps, key=len)
    return list(longest.values())


def _grouped(records: Sequence[SiteRun]) -> list[list[SiteRun]]:
    """The runs of each attention in each stream."""
    groups: dict[tuple[str, str, str], list[SiteRun]] = {}
    for record in records:
        groups.setdefault((record.site, record.kind, record.stream), []).append(record)
    return list(groups.values())


def _column(runs: Sequence[Sequence[CallDifferences]], lag: int) -> list[float]:
    differences = [step.differences[lag - 1] for run in runs for step in run]
    return [difference for difference in differences if difference is not None]


def _cell(differences: Sequence[float]) -> str:
    """The mean over calls."""
    return f"{statistics.fmean(differences):.3f}" if differences else ""


def _peak(runs: Sequence[Sequence[CallDifferences]]) -> str:
    found = [(step.differences[0], step.timestep) for run in runs for step in run if step.differences[0] is not None]
    known = [(difference, timestep) for difference, timestep in found if not math.isnan(difference)]
    if not known:
        return ""
    difference, timestep = max(known)
    return f"{difference:.3f} at {timestep:g}" if difference >= 5e-4 else f"{difference:.3f}"


# -- the plot ---------------------------------------------------------------------------------------------------------


def plot(measured: Measured, path: Path) -> Path:
    """Draws the differences into a file and returns its path.

    Raises:
        CacheError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise CacheError("a calibration's plot needs matplotlib: pip install 'attnrewrite[plot]'") from error
    groups = _grouped(measured.records)
    heights = [3.0] * len(measured.proposals) + [1.5 + 0.16 * len(groups)]
    figure = Figure(figsize=(10, sum(heights)), layout="constrained")
    panels = figure.subplots(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axes, kind in zip(panels, measured.proposals, strict=False):
        _draw_kind(axes, measured, kind)
    _draw_map(figure, panels[-1], groups)
    figure.savefig(path)
    return path


def _draw_kind(axes: Any, measured: Measured, kind: Kind) -> None:
    for record in measured.records:
        if record.kind == kind:
            axes.plot(*_line(record.steps, 1), color="0.75", linewidth=0.7, zorder=1)
    runs = mean_runs(measured.records, kind)
    for lag in _lags(measured):
        for number, run in enumerate(runs):
            label = f"mean, {_calls_before(lag)}" if number == 0 else None
            axes.plot(*_line(run, lag), color=f"C{(lag - 1) % 10}", linewidth=1.6, marker=".", label=label, zorder=2)
    axes.axhline(measured.threshold, color="black", linestyle=":", linewidth=1, label="threshold")
    window = measured.proposals[kind]
    title = f"{kind}: nothing to reuse"
    if window is not None:
        # The span ends at the first and last calls: a window may end far from them.
        timesteps = [step.timestep for run in runs for step in run]
        after, before = window.timestep_skip_range
        axes.axvspan(max(after, min(timesteps)), min(before, max(timesteps)), color="C2", alpha=0.15, zorder=0)
        title = f"{kind}: computed in 1 of {window.skip_range} calls between {after:g} and {before:g}"
    axes.set_title(title, fontsize=10)
    axes.set_ylabel("relative difference")
    axes.set_xlabel("timestep")
    axes.set_ylim(bottom=0)
    if any(run[0].timestep > run[-1].timestep for run in runs):
        axes.invert_xaxis()
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)


def _line(steps: Sequence[CallDifferences], lag: int) -> tuple[list[float], list[float]]:
    points = [(step.timestep, step.differences[lag - 1]) for step in steps]
    known = [(timestep, each) for timestep, each in points if each is not None and math.isfinite(each)]
    return [timestep for timestep, _ in known], [each for _, each in known]


def _draw_map(figure: Any, axes: Any, groups: Sequence[Sequence[SiteRun]]) -> None:
    """Draws each attention's difference from the call before, its runs one after the other."""
    rows = []
    for group in groups:
        cells = [step.differences[0] for record in group for step in record.steps]
        rows.append([math.nan if each is None or not math.isfinite(each) else each for each in cells])
    width = max(map(len, rows))
    image = axes.imshow(
        [row + [math.nan] * (width - len(row)) for row in rows], aspect="auto", interpolation="nearest", vmin=0
    )
    names = [f"{group[0].site}{' in ' * bool(group[0].stream)}{group[0].stream}" for group in groups]
    axes.set_yticks(range(len(names)), names, fontsize=6)
    axes.set_xlabel("call")
    axes.set_title("relative difference from the call before", fontsize=10)
    figure.colorbar(image, ax=axes)
