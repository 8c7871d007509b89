"""The report that users get: data (:mod:`attnrewrite.report.data`) with methods that render it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from attnrewrite.report.data import ReportData
from attnrewrite.report.html import report_to_html
from attnrewrite.report.text import report_to_text

__all__ = ["RewriteReport"]


@dataclass
class RewriteReport(ReportData):
    """All graphs of one model: the attentions found, what they were rewritten into, and why the rest was kept."""

    def to_text(self, width: int | None = None) -> str:
        """The table that a terminal shows, without colors; ``width`` in columns, by default as wide as needed."""
        return report_to_text(self, width=width)

    def to_html(self) -> str:
        """One self-contained HTML page: the table, and the code of each graph before and after, side by side."""
        return report_to_html(self)

    def save_html(self, path: str | Path) -> Path:
        """Writes :meth:`to_html` to ``path`` and returns it."""
        path = Path(path)
        path.write_text(self.to_html(), encoding="utf-8")
        return path

    def __str__(self) -> str:
        return self.to_text()
