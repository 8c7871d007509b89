"""A store of its own for each test, and compilations in it that say what they were given."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx

from attnrewrite.backend import collect_reports
from attnrewrite.inner import CompiledFn, InnerCompiler
from attnrewrite.report.rows import GraphReport


@dataclass
class Compilation:
    """What became of one compilation: the result, the reports, and the graphs that the inner compiler got."""

    result: Any = None
    reports: list[GraphReport] = field(default_factory=list)
    graphs: list[list[str]] = field(default_factory=list)

    @property
    def was_stored(self) -> list[bool]:
        """Of each graph, whether an earlier compilation had stored it."""
        return [any("warm_start" in note for note in report.notes) for report in self.reports]

    @property
    def kernels(self) -> list[str | None]:
        return [site.kernel for report in self.reports for site in report.sites]


class Store:
    """The store in ``directory``, and compilations as another process makes them: nothing is left of those before."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory / "graphs"
        self._current = Compilation()

    @property
    def files(self) -> list[Path]:
        return sorted(self.directory.glob("*.json"))

    def compiled(
        self,
        function: Callable[..., Any],
        *inputs: Any,
        keywords: Mapping[str, Any] | None = None,
        dynamic: bool | None = None,
        **options: Any,
    ) -> Compilation:
        torch.compiler.reset()
        self._current = found = Compilation()
        compiled: Any = torch.compile(
            function, backend="attnrewrite", dynamic=dynamic, options={"inner_backend": "eager", **options}
        )
        with collect_reports(code=False) as found.reports:
            found.result = compiled(*inputs, **(keywords or {}))
        return found

    def watch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        compile_graph = InnerCompiler.compile

        def compiled(
            inner: InnerCompiler, gm: fx.GraphModule, inputs: Sequence[Any], *, keep_attention: bool
        ) -> CompiledFn:
            parts = [part for part in gm.modules() if isinstance(part, fx.GraphModule)]
            notes = [[(node.stack_trace, node.meta.get("recompute")) for node in part.graph.nodes] for part in parts]
            self._current.graphs.append([*(str(part.graph) for part in parts), str(notes), str(keep_attention)])
            return compile_graph(inner, gm, inputs, keep_attention=keep_attention)

        monkeypatch.setattr(InnerCompiler, "compile", compiled)


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setenv("ATTNREWRITE_WARM_START", "1")
    monkeypatch.setenv("ATTNREWRITE_CACHE_DIR", str(tmp_path))
    found = Store(tmp_path)
    found.watch(monkeypatch)
    return found
