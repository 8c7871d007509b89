"""``attnrewrite bench``: what it measures is what it says that it measures."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from rich.console import Console

from attnrewrite.bench.cases import GRIDS, Case
from attnrewrite.bench.pass_times import STEPS, measure_pass
from attnrewrite.bench.sites import SitesBenchmark, plot_sites, print_sites_benchmark, run_sites_benchmark
from attnrewrite.cli import main
from attnrewrite.selection.cost_table import CostTable, Workload

pytestmark = pytest.mark.drawn


def test_ten_blocks_are_a_thousand_nodes_and_ten_sites() -> None:
    times = measure_pass(10, 1)
    assert 950 <= times.nodes <= 1050
    assert times.sites == times.rewritten == 10
    assert set(times.steps) == set(STEPS) and all(len(measured) == 1 for measured in times.steps.values())
    # Its mask is handed over, and has nothing that could be narrowed.
    assert all(seconds > 0 for step in set(STEPS) - {"narrow_masks"} for seconds in times.steps[step])
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
        "merge_slices s",
        "unrepeat_kv s",
        "canonicalize s",
        "choose s",
        "splice s",
        "join_projections s",
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
    assert line.startswith("Error: the data could not be written to") and "is not a directory" in line


# bench sites


CASES = [
    Case(1, 2, 40, 16, mask="key padding", dtype="float32"),
    Case(2, 4, 24, 32, keys=40, key_heads=2, mask="causal", dtype="float32", backward=True),
]


def test_every_willing_kernel_is_timed_and_held_against_float64(tmp_path: Path) -> None:
    result = run_sites_benchmark(CASES, device="cpu", seconds=0.02, command=["attnrewrite", "bench", "sites"])
    padding, training = result.sites
    assert [site["name"] for site in result.sites] == [
        "1,2,40,16 key padding float32",
        "2,4/2,24x40,32 causal float32 backward",
    ]
    for site, kernels in ((padding, {"native", "_native_math", "flex"}), (training, {"native", "_native_math"})):
        timed = {name for name, row in site["kernels"].items() if "call_ms" in row}
        assert timed == kernels
        assert all(site["kernels"][name]["call_ms"] > 0 and site["kernels"][name]["calls"] >= 5 for name in timed)
        assert all(error <= 1e-5 for name in timed for error in site["kernels"][name]["error"])
    # The output, and the gradients of query, key and value.
    assert len(padding["kernels"]["native"]["error"]) == 1 and len(training["kernels"]["native"]["error"]) == 4
    assert padding["kernels"]["_native_flash"]["refused"].startswith("runs on")
    assert padding["auto"]["call"]["kernel"] == "native" and padding["auto"]["call"]["over_best"] >= 1
    result.save(tmp_path / "sites.json")
    assert json.loads((tmp_path / "sites.json").read_text())["device"]
    result.save_table(tmp_path / "table.json")
    table = CostTable.from_json((tmp_path / "table.json").read_text())
    time = table.milliseconds("native", Workload(**padding["workload"]), cuda_graphs=False)
    assert time == padding["kernels"]["native"]["call_ms"]
    plot_sites(result, tmp_path / "sites.svg")
    assert "key padding" in (tmp_path / "sites.svg").read_text()


def test_several_processes_measure_the_same(tmp_path: Path) -> None:
    result = run_sites_benchmark(CASES, ["native"], device="cpu", seconds=0.02, workers=2)
    assert [site["name"] for site in result.sites] == [str(case) for case in CASES]
    assert all(set(site["kernels"]) == {"native"} for site in result.sites)


def test_the_grids() -> None:
    main_grid = GRIDS["main"]
    assert len(main_grid) == 6 * 4 * 2 and len(set(map(str, main_grid))) == 48
    assert all(case.backward for case in GRIDS["training"]) and {case.dtype for case in GRIDS["small"]} == {"float32"}


def test_bad_input_of_bench_sites(tmp_path: Path) -> None:
    for arguments, words in (
        (["--kernels", "nativ"], "unknown kernel 'nativ' (did you mean 'native'"),
        (["--json", str(tmp_path / "missing" / "x.json")], "is not a directory"),
        (["--device", "cuda:7"], "cuda:7"),
        (["--device", "cud"], "--device cud: PyTorch cannot use it"),
        (["--device", "meta"], "pass cpu, cuda or cuda:N"),
    ):
        result = CliRunner().invoke(main, ["bench", "sites", *arguments])
        assert result.exit_code == 2, result.output
        (line,) = result.stderr.strip().splitlines()
        assert words in line


def test_why_a_kernel_that_was_asked_for_has_no_times() -> None:
    row = {"native": {"call_ms": 1.0}, "flash": {"refused": "not available: no GPU"}, "flex": {"failed": "Error: x"}}
    sites = [{"name": name, "workload": {}, "kernels": row, "auto": {}} for name in ("one", "two")]
    for asked, expected in (
        (["native", "flash"], "flash has no times at 2 of 2 sites: not available: no GPU"),
        ([], "flex has no times at 2 of 2 sites: Error: x"),
    ):
        console = Console(width=200, file=io.StringIO(), record=True)
        print_sites_benchmark(SitesBenchmark(sites, {"asked": asked}), console)
        text = console.export_text()
        assert expected in text and ("flash has" in text) == bool(asked)
