"""``attnrewrite bench``: what it measures is what it says that it measures."""

from __future__ import annotations

import json
from pathlib import Path

from click.testing import CliRunner

from attnrewrite.bench import STEPS, measure_pass
from attnrewrite.cli import main


def test_ten_blocks_are_a_thousand_nodes_and_ten_sites() -> None:
    times = measure_pass(10, 1)
    assert 950 <= times.nodes <= 1050
    assert times.sites == times.rewritten == 10
    assert set(times.steps) == set(STEPS) and all(len(measured) == 1 for measured in times.steps.values())
    assert all(seconds > 0 for measured in times.steps.values() for seconds in measured)
    assert 0 < times.pass_seconds <= times.whole[0]


def test_symbolic_shapes() -> None:
    times = measure_pass(2, 1, dynamic=True)
    assert times.sites == times.rewritten == 2


def test_the_command_prints_a_table_and_writes_the_data(tmp_path: Path) -> None:
    path = tmp_path / "pass.json"
    result = CliRunner().invoke(
        main, ["bench", "pass", "--blocks", "2", "--blocks", "1", "--repeats", "2", "--json", str(path)]
    )
    assert result.exit_code == 0, result.output
    for title in (
        "nodes",
        "sites",
        "capture s",
        "find s",
        "simplify s",
        "choose s",
        "splice s",
        "pass s",
        "ms per node",
    ):
        assert title in result.stdout
    assert "times the nodes take" in result.stdout and f"Wrote {path}" in result.stderr
    data = json.loads(path.read_text())
    small, big = data["graphs"]
    assert (small["blocks"], big["blocks"]) == (1, 2) and small["nodes"] < big["nodes"]
    assert data["ratio"] == big["pass_seconds"] / small["pass_seconds"]
    assert [len(graph["capture"]) for graph in data["graphs"]] == [2, 2]
    for key in ("command", "commit", "device", "threads", "python", "torch", "attnrewrite", "dynamic"):
        assert key in data


def test_a_file_that_cannot_be_written_is_said_at_once(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["bench", "pass", "--json", str(tmp_path / "missing" / "pass.json")])
    assert result.exit_code == 2
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("Error: the data could not be written to") and "is no directory" in line
