"""The renderings of a :class:`~attnrewrite.caching.calibration.Calibration`: tables and a plot."""

from __future__ import annotations

import io
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from attnrewrite.analysis.kinds import Kind
from attnrewrite.calibration.proposals import SiteRun, Step, mean_runs
from attnrewrite.errors import CacheError

if TYPE_CHECKING:
    from attnrewrite.calibration.calibration import Calibration

__all__ = ["calibration_to_text", "plot_calibration", "print_calibration"]

_WIDTH = 240
"""Of text that no terminal bounds; a table is as wide as it needs."""


def calibration_to_text(calibration: Calibration, width: int | None = None) -> str:
    """The tables as plain text. ``width`` in columns; default: as wide as they need."""
    out = io.StringIO()
    console = Console(file=out, width=width or _WIDTH, color_system=None, force_terminal=False, legacy_windows=False)
    console.print(_tables(calibration))
    return "\n".join(line.rstrip() for line in out.getvalue().rstrip().split("\n")) + "\n"


def print_calibration(calibration: Calibration, console: Console | None = None) -> None:
    """Prints the tables to a terminal, in colour where the terminal has any."""
    (console or Console()).print(_tables(calibration))


def _tables(calibration: Calibration) -> RenderableType:
    streams = {record.stream for record in calibration.records}
    sites = {record.site for record in calibration.records}
    calls = sum(len(run) for run in _runs_of_all(calibration))
    summary = (
        f"{calibration.model}: {len(sites)} attention{'s' * (len(sites) != 1)} in {calls} calls; "
        f"relative differences from earlier calls, threshold {calibration.threshold:g}"
    )
    lags = range(1, calibration.lags + 1)
    titles = [_calls_before(lag) for lag in lags]
    kinds = _table("kind", *titles, "computed", "timesteps", "reused", "largest")
    for kind, window in calibration.proposals.items():
        means = [_cell(_column(mean_runs(calibration.records, kind), lag)) for lag in lags]
        if window is None:
            kinds.add_row(kind, *means, "always", "", "", "")
            continue
        after, before = window.timestep_skip_range
        kinds.add_row(
            kind,
            *means,
            f"1 of {window.skip_range} calls",
            f"{after:g} to {before:g}",
            f"{window.reused} of {window.calls} calls",
            f"{window.largest_difference:.3f}",
        )
    with_stream = ["stream"] if streams != {""} else []
    rows = _table("attention", "kind", *with_stream, *titles, "largest from the call before")
    for group in _grouped(calibration.records):
        steps = [record.steps for record in group]
        first = group[0]
        rows.add_row(
            Text(first.site),
            first.kind,
            *([Text(first.stream)] if with_stream else []),
            *(_cell(_column(steps, lag)) for lag in lags),
            _peak(steps),
        )
    notes = [Text(note, style="bold") for note in calibration.notes]
    if not any(calibration.proposals.values()):
        notes.append(Text(calibration.refusal, style="bold"))
    return Group(Text(summary), kinds, rows, *notes)


def _table(first: str, *others: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column(first)
    for title in others:
        table.add_column(title, justify="left" if title in ("kind", "stream", "computed", "timesteps") else "right")
    return table


def _calls_before(lag: int) -> str:
    return "1 call before" if lag == 1 else f"{lag} before"


def _runs_of_all(calibration: Calibration) -> list[Sequence[Step]]:
    """The calls of each stream and run, whatever is called in them."""
    longest: dict[tuple[str, int], Sequence[Step]] = {}
    for record in calibration.records:
        place = record.stream, record.run
        longest[place] = max(longest.get(place, ()), record.steps, key=len)
    return list(longest.values())


def _grouped(records: Sequence[SiteRun]) -> list[list[SiteRun]]:
    """The runs of each attention in each stream."""
    groups: dict[tuple[str, str, str], list[SiteRun]] = {}
    for record in records:
        groups.setdefault((record.site, record.kind, record.stream), []).append(record)
    return list(groups.values())


def _column(runs: Sequence[Sequence[Step]], lag: int) -> list[float]:
    differences = [step.differences[lag - 1] for run in runs for step in run]
    return [difference for difference in differences if difference is not None]


def _cell(differences: Sequence[float]) -> str:
    """The mean over calls."""
    return f"{statistics.fmean(differences):.3f}" if differences else ""


def _peak(runs: Sequence[Sequence[Step]]) -> str:
    found = [(step.differences[0], step.timestep) for run in runs for step in run if step.differences[0] is not None]
    known = [(difference, timestep) for difference, timestep in found if not math.isnan(difference)]
    if not known:
        return ""
    difference, timestep = max(known)
    return f"{difference:.3f} at {timestep:g}" if difference >= 5e-4 else f"{difference:.3f}"


# -- the plot ---------------------------------------------------------------------------------------------------------


def plot_calibration(calibration: Calibration, path: Path) -> Path:
    """See :meth:`attnrewrite.caching.calibration.Calibration.save_plot`."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise CacheError("a calibration's plot needs matplotlib: pip install 'attnrewrite[plot]'") from error
    groups = _grouped(calibration.records)
    heights = [3.0] * len(calibration.kinds) + [1.5 + 0.16 * len(groups)]
    figure = Figure(figsize=(10, sum(heights)), layout="constrained")
    panels = figure.subplots(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axes, kind in zip(panels, calibration.kinds, strict=False):
        _draw_kind(axes, calibration, kind)
    _draw_map(figure, panels[-1], groups)
    figure.savefig(path)
    return path


def _draw_kind(axes: Any, calibration: Calibration, kind: Kind) -> None:
    for record in calibration.records:
        if record.kind == kind:
            axes.plot(*_line(record.steps, 1), color="0.75", linewidth=0.7, zorder=1)
    runs = mean_runs(calibration.records, kind)
    for lag in range(1, calibration.lags + 1):
        for number, run in enumerate(runs):
            label = f"mean, {_calls_before(lag)}" if number == 0 else None
            axes.plot(*_line(run, lag), color=f"C{(lag - 1) % 10}", linewidth=1.6, marker=".", label=label, zorder=2)
    axes.axhline(calibration.threshold, color="black", linestyle=":", linewidth=1, label="threshold")
    window = calibration.proposals[kind]
    title = f"{kind}: nothing to reuse"
    if window is not None:
        # Only where there are calls: a window may end far from them.
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


def _line(steps: Sequence[Step], lag: int) -> tuple[list[float], list[float]]:
    points = [(step.timestep, step.differences[lag - 1]) for step in steps]
    known = [(timestep, each) for timestep, each in points if each is not None and math.isfinite(each)]
    return [timestep for timestep, _ in known], [each for _, each in known]


def _draw_map(figure: Any, axes: Any, groups: Sequence[Sequence[SiteRun]]) -> None:
    """Each attention's difference from the call before; several runs one behind the other."""
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
