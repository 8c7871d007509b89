"""Every specimen of the catalogue is found, rewritten, and computes what it computed before.

To update the goldens: ``EXPECTTEST_ACCEPT=1 pytest tests/whole/test_specimens.py -k golden``, and read the difference.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import expecttest
import pytest
import torch
from torch import fx

from attnrewrite.backend import collect_reports
from attnrewrite.capture.known_buffers import KnownBuffers
from attnrewrite.capture.legalize import legalized
from attnrewrite.capture.trace import capture
from attnrewrite.ir.nodes import is_tensor, tensor
from attnrewrite.options.compile_options import Policy
from attnrewrite.passes.pipeline import rewrite
from attnrewrite.patterns import Specimen
from attnrewrite.patterns.registry import catalogue, specimens
from tests.support.helpers import (
    cast,
    gradients,
    no_more_graphs,
    outputs,
    relative_error,
    rewritten,
    rewritten_and_rows,
)
from tests.support.judged import disagreement_with_formula

LENGTH = 12
GOLDEN = Path(__file__).parent / "golden"
NAMES = [specimen.name for specimen in specimens()]

every_specimen = pytest.mark.parametrize("specimen", specimens(), ids=NAMES)


def test_names_are_unique_and_every_pattern_has_specimens() -> None:
    assert [name for name, count in Counter(NAMES).items() if count > 1] == []
    assert [pattern.name for pattern in catalogue() if not pattern.specimens] == []


@pytest.mark.every
@every_specimen
def test_found_and_equal(specimen: Specimen) -> None:
    function, first, found = rewritten_and_rows(specimen.function, *specimen.inputs(0, LENGTH))
    assert [row.status for row in found] == [specimen.status] * specimen.sites
    assert [row.reason for row in found if row.status == "rewritten" and row.reason] == []
    for seed in range(3):
        inputs = specimen.inputs(seed, LENGTH)
        result, expected = function(*inputs) if seed else first, specimen.function(*inputs)
        assert [described(t) for t in outputs(result)] == [described(t) for t in outputs(expected)]
        assert relative_error(result, expected) <= 1e-5
        assert relative_error(result, specimen.function(*cast(inputs, torch.float64))) <= 1e-5


def described(t: torch.Tensor) -> tuple[torch.dtype, torch.Size, tuple[int, ...]]:
    return t.dtype, t.shape, t.stride()


@every_specimen
def test_gradients(specimen: Specimen) -> None:
    if not specimen.gradients:
        pytest.skip("not differentiable")
    inputs = specimen.inputs(0, LENGTH)
    actual = gradients(rewritten(specimen.function, "aot_eager"), inputs)
    assert relative_error(actual, gradients(specimen.function, inputs)) <= 1e-4


@pytest.mark.parametrize(
    "specimen", [pytest.param(specimen, id=specimen.name) for specimen in specimens() if specimen.masked_rows]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda dtype: str(dtype)[6:])
def test_rows_without_a_key(specimen: Specimen, dtype: torch.dtype) -> None:
    """They keep what the source's formula gives them: NaN, the mean of the values, or what a fused call gives."""
    assert specimen.masked_rows is not None
    inputs = cast(specimen.masked_rows(specimen.inputs(0, LENGTH)), dtype)
    try:
        expected = specimen.function(*inputs)
    except RuntimeError as error:
        assert "without overflow" in str(error)
        pytest.skip("float16 cannot hold the fill, and eager says so")
    usual = specimen.function(*cast(specimen.inputs(0, LENGTH), dtype))
    assert relative_error(expected, usual) > 1e-2, "no row has lost its keys"
    result = rewritten(specimen.function)(*inputs)
    assert disagreement_with_formula(specimen.function, result, expected, inputs, dtype) == ""


@every_specimen
def test_dynamic_shapes(specimen: Specimen) -> None:
    if not specimen.dynamic:
        pytest.skip("its length is part of what it means")
    calls = [specimen.inputs(0, length) for length in (LENGTH, 19, 9)]
    # AOTAutograd takes most of the time there is under symbolic sizes: every third goes through it.
    inner = "eager" if NAMES.index(specimen.name) % 3 else "aot_eager"
    function = rewritten(specimen.function, inner, dynamic=True)
    with collect_reports() as graphs:
        for inputs in calls:
            assert relative_error(function(*inputs), specimen.function(*inputs)) <= 1e-5
    found = [row for graph in graphs for row in graph.sites]
    assert found
    # Of linear attention it may be left open by symbolic sizes which order is cheaper.
    assert [row for row in found if row.status not in (specimen.status, "recognized" if row.order else "")] == []
    assert no_more_graphs(len(graphs), specimen.function, calls, inner)


@every_specimen
def test_bfloat16_is_as_near_to_the_truth_as_before(specimen: Specimen) -> None:
    inputs = cast(specimen.inputs(0, LENGTH), torch.bfloat16)
    truth = specimen.function(*cast(inputs, torch.float64))
    own = relative_error(specimen.function(*inputs), truth)
    # One rounding of the result to 8 bits is allowed on top.
    assert relative_error(rewritten(specimen.function)(*inputs), truth) <= 2 * own + 2**-8


@pytest.mark.every
@every_specimen
def test_golden(specimen: Specimen) -> None:
    code = rewritten_code(specimen.function, specimen.inputs(0, LENGTH))
    path = GOLDEN / f"{specimen.name}.txt"
    if expecttest.ACCEPT:
        path.parent.mkdir(exist_ok=True)
        path.write_text(code)
    assert path.exists(), "no golden yet: run with EXPECTTEST_ACCEPT=1 and read what it writes"
    assert code == path.read_text()


def test_every_golden_has_a_specimen() -> None:
    assert sorted(path.stem for path in GOLDEN.glob("*.txt")) == sorted(NAMES)


@pytest.mark.parametrize(
    "name", ["packed_projection", "shifted_windows", "causal_and_padding", "grouped_queries", "call_with_repeated_keys"]
)
def test_through_inductor(name: str) -> None:
    """Values and gradients, by the compiler that is the default."""
    (specimen,) = (specimen for specimen in specimens() if specimen.name == name)
    inputs = specimen.inputs(0, LENGTH)
    function = rewritten(specimen.function, "inductor")
    actual = gradients(function, inputs)
    assert relative_error(actual, gradients(specimen.function, inputs)) <= 1e-4


def rewritten_code(function: Callable[..., Any], inputs: Sequence[Any], policy: Policy | None = None) -> str:
    """The rewritten graph, a line a node, without what Dynamo or torch may name otherwise another day."""
    lines: list[str] = []

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        captured = capture(legalized(gm), example_inputs).gm
        KnownBuffers(gm, example_inputs).attach(captured)
        rewrite(captured, policy or Policy())
        lines.extend(_lines(captured.graph))
        return gm.forward

    torch.compile(function, backend=backend)(*inputs)
    return "\n".join(lines) + "\n"


def _lines(graph: fx.Graph) -> list[str]:
    names: dict[fx.Node, str] = {}
    counts: Counter[str] = Counter()
    lines: list[str] = []
    for node in graph.nodes:
        arguments = [_text(arg, names) for arg in node.args]
        # An einsum of several operands has a path where opt_einsum is installed.
        arguments += [f"{key}={_text(arg, names)}" for key, arg in node.kwargs.items() if key != "path"]
        stem = node.op if node.op in ("placeholder", "get_attr", "output") else _operator(node).split(".")[0]
        names[node] = f"{stem}_{counts[stem]}" if counts[stem] else stem
        counts[stem] += 1
        if node.op == "output":
            lines.append(f"return {_text(node.args[0], names)}")
            continue
        value = f": {_type(node)}" if is_tensor(node) else ""
        call = f" = {_operator(node)}({', '.join(arguments)})" if node.op == "call_function" else ""
        lines.append(f"{names[node]}{value}{call}")
        if isinstance(node.meta.get("val"), fx.GraphModule):
            lines += [f"    {line}" for line in _lines(node.meta["val"].graph)]
    return lines


def _operator(node: fx.Node) -> str:
    name = str(getattr(node.target, "__name__", node.target))
    return re.sub(r"^aten\.", "", name)


def _type(node: fx.Node) -> str:
    value = tensor(node)
    return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"


def _text(value: Any, names: dict[fx.Node, str]) -> str:
    if isinstance(value, fx.Node):
        return names[value]
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_text(item, names) for item in value) + "]"
    return str(value)
