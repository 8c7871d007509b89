"""Each step has its own time, its own log line, a check of the graph, and a numbered file of the dump."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from torch import Tensor, fx

from attnrewrite.backend import collect_reports
from attnrewrite.passes.steps import Steps
from attnrewrite.report.dump import GraphDump
from tests.support.helpers import rewritten


def attend(x: Tensor) -> Tensor:
    return (x @ x.mT).softmax(-1) @ x


def sines() -> fx.GraphModule:
    return fx.symbolic_trace(lambda x: torch.sin(torch.sin(x)))


def test_times_add_up_under_the_name_of_each_step() -> None:
    steps = Steps()
    with steps.step("find"):
        pass
    for site in ("site0", "site1"):
        before = steps.seconds.get("splice", 0.0)
        with steps.step("splice", site=site):
            pass
        assert steps.seconds["splice"] > before
    assert list(steps.seconds) == ["find", "splice"]


def test_a_step_that_fails_is_timed_and_its_error_goes_on() -> None:
    steps = Steps()
    with pytest.raises(ZeroDivisionError), steps.step("find"):
        _ = 1 / 0
    assert list(steps.seconds) == ["find"]


def test_the_log_has_a_line_for_each_step(caplog: pytest.LogCaptureFixture) -> None:
    steps = Steps("graph_7")
    with caplog.at_level(logging.DEBUG, "attnrewrite"), steps.step("splice", site="site1"):
        pass
    (message,) = caplog.messages
    assert message.startswith("graph_7: splice site1 took ")


def broken() -> fx.GraphModule:
    """A graph in which a node is read before it is computed."""
    gm = sines()
    _, first, second, _ = gm.graph.nodes
    first.args = (second,)
    return gm


def test_the_graph_is_checked_after_each_step_if_that_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    gm = broken()
    with pytest.raises(RuntimeError, match="before it has been defined"), Steps().step("splice", gm):
        pass
    monkeypatch.delenv("ATTNREWRITE_RAISE")
    with Steps().step("splice", gm):
        pass


def test_only_steps_that_change_the_graph_are_dumped(tmp_path: Path) -> None:
    dump = GraphDump.begin(tmp_path, "graph_0")
    assert dump is not None
    steps, gm = Steps(dump=dump), sines()
    dump.add("captured", gm)
    with steps.step("find", gm):
        pass
    _, first, second, _ = gm.graph.nodes
    with steps.step("splice", gm, "site0"):
        second.target = torch.cos
    with steps.step("join_projections", gm):
        second.replace_input_with(first, next(iter(gm.graph.nodes)))
    with steps.step("fuse_projections", gm):
        pass
    files = sorted(path.name for path in dump.folder.iterdir())
    assert files == ["00_captured.py", "01_splice_site0.py", "02_join_projections.py"]
    sources = [(dump.folder / name).read_text() for name in files]
    assert [source.count("torch.sin(") for source in sources] == [2, 1, 1]
    assert "torch.cos(sin)" in sources[1] and "torch.cos(x)" in sources[2]
    for source in sources:
        compile(source, "source", "exec")


def test_the_files_of_a_graph_with_two_attentions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTNREWRITE_DEBUG", str(tmp_path))
    with torch.no_grad(), collect_reports() as reports:
        rewritten(lambda x: attend(attend(x)))(torch.randn(2, 3, 8, 4))
    (report,) = reports
    (folder,) = tmp_path.iterdir()
    numbered = sorted(path.name for path in folder.glob("[0-9]*.py"))
    assert numbered == ["00_captured.py", "01_splice_site0.py", "02_splice_site1.py"]
    sources = [(folder / name).read_text() for name in numbered]
    assert [source.count("softmax.int(") for source in sources] == [2, 1, 0]
    assert sources[0].endswith(report.before_code) and sources[-1].endswith(report.after_code)
    assert list(report.seconds) == [
        "capture",
        "regroup_products",
        "find",
        "merge_slices",
        "unrepeat_kv",
        "canonicalize",
        "choose",
        "splice",
        "restore_products",
        "join_projections",
        "inner",
    ]
