"""A dumped graph is Python that runs by itself and computes what the graph computes."""

from __future__ import annotations

import importlib.util
import logging
import operator
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

from attnrewrite.errors import OptionError
from attnrewrite.report.dump import GraphDump
from attnrewrite.report.graph_code import graph_source
from attnrewrite.report.rows import GraphReport, SiteReport

pytestmark = pytest.mark.drawn


def traced(function: Callable[..., Any], *inputs: Any) -> fx.GraphModule:
    return make_fx(function, pre_dispatch=True, record_stack_traces=True)(*inputs)


def dynamo_graphs(
    function: Callable[..., Any], *inputs: Any, **compile_options: Any
) -> list[tuple[fx.GraphModule, Any]]:
    """The graphs that Dynamo makes of a call, each with the inputs that a backend is given."""
    graphs: list[tuple[fx.GraphModule, Any]] = []

    def backend(gm: fx.GraphModule, example_inputs: Any) -> Callable[..., Any]:
        graphs.append((gm, example_inputs))
        return gm.forward

    torch._dynamo.reset()
    torch.compile(function, backend=backend, **compile_options)(*inputs)
    return graphs


def run_script(path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs a dumped script where neither the working directory nor the path knows of attnrewrite."""
    return subprocess.run(
        [sys.executable, "-I", str(path), *arguments], cwd="/", capture_output=True, text=True, timeout=120
    )


def load(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def runs(path: Path) -> bool:
    """Whether the script runs, here: starting an interpreter for each of them takes its time."""
    return bool(load(path).main([]) == 0)


def dump_report(
    report: GraphReport, before: fx.GraphModule, after: fx.GraphModule, inputs: Any, directory: Path
) -> Path:
    """Dumps a graph; gives its folder."""
    graph_dump = GraphDump.begin(directory, report.name)
    assert graph_dump is not None
    graph_dump.finish(report, before, after, inputs)
    return graph_dump.folder


def dump(
    tmp_path: Path, gm: fx.GraphModule, inputs: Any, after: fx.GraphModule | None = None, name: str = "graph_0"
) -> tuple[Path, Path]:
    """Dumps a graph; gives the scripts before and after."""
    folder = dump_report(GraphReport(name), gm, after if after is not None else gm, inputs, tmp_path)
    return folder / f"{folder.name}_before.py", folder / f"{folder.name}_after.py"


def naive(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return torch.softmax(q @ k.transpose(-2, -1) * 0.25, -1) @ v


def fused(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=0.25)


def test_source_reads_like_the_graph_and_names_the_users_lines() -> None:
    (gm, _), *_ = dynamo_graphs(naive, *(torch.randn(2, 4, 8, 16) for _ in range(3)))
    source = graph_source(gm)
    line = naive.__code__.co_firstlineno + 1
    comment = f"test_dump.py:{line} in naive: return torch.softmax("
    # One comment for all lines that come from one place.
    assert source.count(comment) == 1
    assert source.index(comment) < source.index("    softmax = torch.softmax(")
    assert not re.search(r"def forward\(.*:.*\):", source)  # without annotations
    compile(source, "source", "exec")
    assert " : torch.Tensor" in gm.graph.python_code("self").src  # the graph is left as it was


def test_source_shows_nested_graphs() -> None:
    gm, _ = dynamo_graphs(branches, torch.randn(3))[0]
    source = graph_source(gm)
    assert source.count("def forward(") == 3
    assert "# self.cond_true_0" in source


def test_both_scripts_run_in_another_directory_and_compare(tmp_path: Path) -> None:
    inputs = [torch.randn(2, 4, 8, 16) for _ in range(3)]
    before, after = dump(tmp_path, traced(naive, *inputs), inputs, traced(fused, *inputs))
    assert {path.name for path in before.parent.iterdir()} == {
        "graph_0_before.py",
        "graph_0_after.py",
        "inputs.pt",
        "report.json",
        "report.txt",
        "report.html",
    }
    assert "attnrewrite" not in [line for line in after.read_text().splitlines() if line.startswith(("import", "from"))]
    for path in (before, after):
        done = run_script(path)
        assert done.returncode == 0, done.stderr
        assert "output 0: torch.float32 (2, 4, 8, 16)" in done.stdout
        assert "NaN 0" in done.stdout
    done = run_script(after, "--compare")
    assert done.returncode == 0, done.stderr
    assert "largest difference: absolute" in done.stdout
    torch.testing.assert_close(load(after).run()["output 0"], naive(*inputs))
    assert torch.equal(load(before).run()["output 0"], naive(*inputs))


def test_compare_says_when_results_differ_and_when_before_is_missing(tmp_path: Path) -> None:
    x = torch.ones(3)
    before, after = dump(tmp_path, traced(lambda x: (x, x * 1), x), [x], traced(lambda x: (x + 2, x * float("nan")), x))
    done = run_script(after, "--compare")
    assert "absolute 2, relative 2" in done.stdout
    assert "NaN on one side only: 3" in done.stdout
    before.unlink()
    done = run_script(after, "--compare")
    assert done.returncode == 2 and before.name in done.stderr


def branches(x: torch.Tensor) -> Any:
    return torch.cond(x.sum() > 0, lambda x: x.sin() + 1, lambda x: x.cos(), (x,))


@pytest.mark.parametrize("grad", [False, True])
def test_nested_graphs_of_cond_and_checkpoint(tmp_path: Path, grad: bool) -> None:
    layer = nn.Linear(4, 4)

    def function(x: torch.Tensor) -> Any:
        y = checkpoint(lambda x: torch.relu(layer(x)), x, use_reentrant=False)
        return branches(y)

    x = torch.randn(3, 4)
    with torch.set_grad_enabled(grad):
        (gm, inputs), *others = dynamo_graphs(function, x)
        assert not others
        _, after = dump(tmp_path, gm, inputs)
        expected = function(x)
    done = run_script(after)
    assert done.returncode == 0, done.stderr
    result = load(after).run()["output 0"]
    torch.testing.assert_close(result, expected)
    assert result.requires_grad == grad


def test_nested_graphs_of_an_aten_graph(tmp_path: Path) -> None:
    x = torch.randn(3)
    gm = traced(branches, x)
    _, after = dump(tmp_path, gm, [x])
    assert runs(after)
    torch.testing.assert_close(load(after).run()["output 0"], branches(x))


def test_inputs_that_the_graph_writes_to_are_loaded_afresh(tmp_path: Path) -> None:
    def function(counter: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        counter.add_(1)
        return x * counter

    counter, x = torch.zeros(1), torch.randn(3)
    (gm, _), *_ = dynamo_graphs(function, counter, x)
    fresh = [torch.full((1,), 4.0), x]
    _, after = dump(tmp_path, gm, fresh)
    script = load(after)
    for _ in range(2):
        results = script.run()
        assert torch.equal(results["output 0"], x * 5)
        assert torch.equal(results["input 0, written to"], torch.full((1,), 5.0))
    assert "input 0, written to" in run_script(after, "--compare").stdout


def test_symbolic_sizes_become_their_numbers(tmp_path: Path) -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        return x.reshape(x.shape[0] * 2, -1) + x.shape[0]

    x = torch.randn(5, 6)
    paths = []

    def backend(gm: fx.GraphModule, example_inputs: Any) -> Callable[..., Any]:
        guards = len(example_inputs[0].node.shape_env.guards)
        paths.append(dump(tmp_path, gm, example_inputs)[1])
        assert len(example_inputs[0].node.shape_env.guards) == guards  # looking at the hints specialises nothing
        return gm.forward

    torch._dynamo.reset()
    torch.compile(function, backend=backend, dynamic=True)(x)
    done = run_script(paths[0])
    assert done.returncode == 0, done.stderr
    assert torch.equal(load(paths[0]).run()["output 0"], function(x))
    assert 5 in load(paths[0]).load_inputs()


def test_fake_inputs_are_drawn(tmp_path: Path) -> None:
    x = torch.randn(4, 6).t()
    gm, _ = dynamo_graphs(lambda x, i: x[i].sin(), x, torch.tensor([1, 2]), dynamic=True)[0]
    fakes = [node.meta["example_value"] for node in gm.graph.nodes if node.op == "placeholder"]
    _, after = dump(tmp_path, gm, fakes)
    assert runs(after)
    tensors = [value for value in load(after).load_inputs() if isinstance(value, torch.Tensor)]
    assert (tensors[0].shape, tensors[0].stride(), tensors[0].dtype) == (x.shape, x.stride(), x.dtype)
    assert "fixed seed" in after.read_text()


def test_constants_and_numbers_without_a_literal(tmp_path: Path) -> None:
    def function(x: torch.Tensor) -> Any:
        table = torch.tensor([1.0, float("inf"), 3.0])
        low = torch.full((2,), torch.finfo(x.dtype).min, dtype=torch.float64, device=x.device)
        return x * table, x.masked_fill(x > 0, -float("inf")), x + float("nan"), low, table, 2

    x = torch.randn(3)
    for gm, inputs in (dynamo_graphs(function, x)[0], (traced(function, x), [x])):
        _, after = dump(tmp_path, gm, inputs)
        assert runs(after)
        results = load(after).run()
        for index, expected in enumerate(function(x)[:4]):
            torch.testing.assert_close(results[f"output {index}"], expected, equal_nan=True)


def test_functions_of_other_modules_are_imported(tmp_path: Path) -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    size = graph.call_function(operator.index, (7,))
    added = graph.call_function(torch.nn.functional.relu, (graph.call_function(operator.add, (x, size)),))
    graph.output((added, graph.call_method("sum", (added,)), None))
    value = torch.randn(3)
    _, after = dump(tmp_path, fx.GraphModule(nn.Module(), graph), [value])
    assert runs(after)
    assert torch.equal(load(after).run()["output 0"], torch.relu(value + 7))


def test_autocast_and_no_grad_around_the_call(tmp_path: Path) -> None:
    x = torch.randn(3, 4)
    weight = nn.Parameter(torch.randn(4, 4))
    gm, inputs = dynamo_graphs(lambda x, w: x @ w, x, weight)[0]
    with torch.autocast("cpu", torch.bfloat16):
        _, after = dump(tmp_path, gm, inputs)
    result = load(after).run()["output 0"]
    assert result.dtype == torch.bfloat16 and result.requires_grad
    with torch.no_grad():
        _, after = dump(tmp_path, gm, inputs)
    result = load(after).run()["output 0"]
    assert result.dtype == torch.float32 and not result.requires_grad


def test_inputs_keep_layout_gradients_and_aliases(tmp_path: Path) -> None:
    base = torch.randn(1000, 1000)
    inputs = [
        base[3:5, ::2].t(),
        base[4, 10:20],  # of the same storage as the first
        nn.Parameter(torch.randn(4, 3).t()),
        torch.randn(3, 1).expand(3, 5),
        torch.randn(100000)[:7],
        torch.tensor([True, False]),
        torch.randn(2, dtype=torch.complex64).conj(),
        torch.randn(0, 3),
        3,
        2.5,
        float("-inf"),
        None,
        torch.randn(6).to(torch.float8_e4m3fn),
    ]
    graph = fx.Graph()
    graph.output([graph.placeholder(f"x{index}") for index in range(len(inputs))])
    before, _ = dump(tmp_path, fx.GraphModule(nn.Module(), graph), inputs)
    assert (before.parent / "inputs.pt").stat().st_size < 100_000
    loaded = load(before).load_inputs()
    assert len(loaded) == len(inputs)
    for value, original in zip(loaded, inputs, strict=True):
        if not isinstance(original, torch.Tensor):
            assert value == original
            continue
        assert (value.shape, value.stride(), value.dtype) == (original.shape, original.stride(), original.dtype)
        assert value.requires_grad == original.requires_grad
        assert torch.equal(
            value.double() if value.dtype.itemsize == 1 else value,
            original.double() if value.dtype.itemsize == 1 else original,
        )
    assert loaded[0].untyped_storage().data_ptr() == loaded[1].untyped_storage().data_ptr()
    loaded[1].zero_()
    assert not loaded[0][5:10, 1].any()
    assert runs(before)


def test_large_inputs_are_drawn_with_their_layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTNREWRITE_DEBUG_MB", "0.01")
    base = torch.randn(200, 300)
    inputs = [base.t(), base[5], torch.arange(300), torch.tensor([True])]

    def function(x: torch.Tensor, y: torch.Tensor, i: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (x * y.unsqueeze(1)).sum(1) * i * b

    _, after = dump(tmp_path, traced(function, *inputs), inputs)
    assert (after.parent / "inputs.pt").stat().st_size < 10_000
    text = after.read_text()
    assert "ATTNREWRITE_DEBUG_MB" in text and "fixed seed" in text
    first, second = load(after).load_inputs(), load(after).load_inputs()
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert first[0].stride() == inputs[0].stride() and torch.equal(first[2], inputs[2])
    assert torch.equal(first[0][:, 5], first[1])  # still views of one tensor
    assert first[0].untyped_storage().data_ptr() == first[1].untyped_storage().data_ptr()
    done = run_script(after, "--compare")
    assert done.returncode == 0 and "absolute 0" in done.stdout


def test_a_wrong_limit_is_the_users_mistake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTNREWRITE_DEBUG_MB", "many")
    with pytest.raises(OptionError, match="ATTNREWRITE_DEBUG_MB"):
        dump(tmp_path, traced(torch.sin, torch.randn(2)), [torch.randn(2)])


def test_names_are_made_safe_and_nothing_is_overwritten(tmp_path: Path) -> None:
    x = torch.randn(2)
    gm = traced(torch.sin, x)
    first, _ = dump(tmp_path, gm, [x], name="../torch/graph: 0*")
    second, _ = dump(tmp_path, gm, [x], name="../torch/graph: 0*")
    assert first != second
    assert first.parent.parent == second.parent.parent == tmp_path
    for path in (first, second):
        assert not set(path.name) & set('/\\:*?"<>| ')
        assert runs(path)
    assert dump(tmp_path, gm, [x], name="n" * 500)[0].exists()
    assert dump(tmp_path, gm, [x], name="CON")[0].parent.name != "CON"
    assert dump(tmp_path, gm, [x], name="")[0].exists()


def user_function(x: torch.Tensor) -> torch.Tensor:
    return x + 1


def test_what_cannot_run_is_said_and_does_not_raise(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def local(x: torch.Tensor) -> torch.Tensor:
        return x + 1

    graph = fx.Graph()
    graph.output(graph.call_function(local, (graph.placeholder("x"),)))
    sparse = torch.eye(3).to_sparse()
    with caplog.at_level(logging.WARNING, logger="attnrewrite.dump"):
        before, _ = dump(tmp_path, fx.GraphModule(nn.Module(), graph), [sparse])
    text = before.read_text()
    assert "DOES NOT RUN" in text
    assert "cannot be imported" in text and "torch.sparse_coo" in text
    assert "cannot be imported" in caplog.text and "torch.sparse_coo" in caplog.text
    assert run_script(before).returncode != 0


def test_an_unwritable_directory_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    assert GraphDump.begin(blocked, "graph_0") is None
    assert "no dump of graph graph_0" in caplog.text


def test_hostile_names_stay_in_comments(tmp_path: Path) -> None:
    x = torch.randn(2)
    gm = traced(torch.sin, x)
    for node in gm.graph.nodes:
        node.meta["stack_trace"] = '  File "a\\nb.py", line 3, in f\n    x = """\n'
    site = SiteReport("a\nraise SystemExit(3)", "", "kept", reason='"""\nraise SystemExit(4)')
    folder = dump_report(GraphReport("graph_0", sites=[site]), gm, gm, [x], tmp_path)
    assert run_script(folder / "graph_0_after.py").returncode == 0


def test_a_dump_in_the_middle_of_a_compilation(tmp_path: Path) -> None:
    """Dynamo calls a backend under its own modes; the stored inputs are real all the same."""
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    x = torch.randn(3, 4)
    paths = []

    def backend(gm: fx.GraphModule, example_inputs: Any) -> Callable[..., Any]:
        from torch._guards import detect_fake_mode

        mode = detect_fake_mode(example_inputs) or torch._guards.TracingContext.get().fake_mode
        assert mode is not None
        with mode:
            paths.append(dump(tmp_path, gm, example_inputs)[1])
        return gm.forward

    torch._dynamo.reset()
    expected = torch.compile(model, backend=backend)(x)
    done = run_script(paths[0], "--compare")
    assert done.returncode == 0, done.stderr
    torch.testing.assert_close(load(paths[0]).run()["output 0"], expected)
