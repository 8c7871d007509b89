"""``ATTNREWRITE_VERIFY=1``, proved on patterns that read an attention wrongly on purpose."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import attnrewrite
from attnrewrite.backend import collect_reports
from attnrewrite.ir.builder import Builder
from attnrewrite.ir.site import CanonicalAttention
from attnrewrite.kernels.torch_sdpa import TorchSDPA
from attnrewrite.numerics.outcome import TOLERANCES, difference
from attnrewrite.patterns import Finding, GraphView, Specimen, attention_site, register_pattern, unregister_pattern
from attnrewrite.report.rows import GraphReport
from tests.support.helpers import gradients, relative_error, rewritten

pytestmark = pytest.mark.drawn

aten = torch.ops.aten

RIGHT, MISREAD, WRONG_SCALE = 4, 5, 0.3


class WrongScale:
    """Takes scores that are divided by 5 for scores that are multiplied by 0.3."""

    name = "wrong_scale"
    precedence = 1
    specimens: tuple[Specimen, ...] = ()

    def find(self, view: GraphView) -> Iterator[Finding]:
        for softmax in view.graph.find_nodes(op="call_function", target=aten.softmax.int):
            scores: Any = softmax.args[0]
            if scores.target is not aten.div.Tensor or scores.args[1] != MISREAD:
                continue
            product: Any = scores.args[0]
            result = next(iter(softmax.users))
            value: Any = result.args[1]
            yield attention_site(
                view,
                pattern=self.name,
                anchor=softmax,
                query=product.args[0],
                key=product.args[1].args[0],
                value=value,
                scale=WRONG_SCALE,
                result=result,
                interior=(scores, product),
            )


@pytest.fixture
def wrong() -> Iterator[None]:
    register_pattern(WrongScale)
    yield
    unregister_pattern("wrong_scale")


def three(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One after another, of which WrongScale misreads the second."""
    q = (q @ k.mT / RIGHT).softmax(-1) @ v
    q = (q @ k.mT / MISREAD).softmax(-1) @ v
    return (q @ k.mT / RIGHT).softmax(-1) @ v


SECOND_LINE = three.__code__.co_firstlineno + 3


def operands(length: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = torch.randn(3, 2, 4, length, 16)
    return q, k, v


def run(function: Any, *inputs: Any, **settings: Any) -> tuple[Any, GraphReport]:
    """The result of the first call, and the report of the only graph."""
    with collect_reports() as graphs:
        result = rewritten(function, verify=True, **settings)(*inputs)
    (graph,) = graphs
    return result, graph


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("inner", ["eager", "aot_eager", "inductor"])
def test_sites_that_agree(inner: str, dynamic: bool | None, caplog: pytest.LogCaptureFixture) -> None:
    inputs = operands()
    with caplog.at_level(logging.INFO, "attnrewrite"):
        result, graph = run(three, *inputs, inner=inner, dynamic=dynamic)
    assert relative_error(result, three(*inputs)) <= 1e-5
    (note,) = [note for note in graph.notes if "verified" in note]
    found = re.fullmatch(r"verified: all 3 sites agree with the source \(largest error (.*)\)", note)
    assert found and float(found[1]) < 1e-5
    assert f"{graph.name}: {note}" in caplog.messages
    assert len(graph.rewritten) == 3


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("inner", ["eager", "aot_eager", "inductor"])
@pytest.mark.usefixtures("wrong")
def test_a_wrong_rewrite_is_named_and_not_used(
    inner: str, dynamic: bool | None, caplog: pytest.LogCaptureFixture
) -> None:
    inputs = operands()
    compiled = rewritten(three, inner=inner, dynamic=dynamic, verify=True)
    with collect_reports() as graphs, caplog.at_level(logging.WARNING, "attnrewrite"):
        result = compiled(*inputs)
    assert relative_error(result, three(*inputs)) <= 1e-6
    assert relative_error(compiled(*inputs), three(*inputs)) <= 1e-6
    (graph,) = graphs

    q, k, v = inputs
    q = (q @ k.mT / RIGHT).softmax(-1) @ v
    expected = (q @ k.mT / MISREAD).softmax(-1) @ v
    distance = ((q @ k.mT * WRONG_SCALE).softmax(-1) @ v - expected).abs().max()
    (warning,) = [message for message in caplog.messages if "differs" in message]
    assert f"site1 (wrong_scale at {__file__}:{SECOND_LINE}, native) differs from the source" in warning
    assert f"by {distance / expected.abs().max():.1e} of its largest number (absolute {distance:.1e}" in warning
    assert warning.count("float32 (2, 4, 8, 16)") == 3
    assert "\n" not in warning

    assert [row.status for row in graph.sites] == ["kept"] * 3
    first, second, third = (row.reason for row in graph.sites)
    assert first == third == "verification failed elsewhere in the graph"
    assert second.startswith("verification: site1")
    assert warning == f"{graph.name}: {second.removeprefix('verification: ')}; the source graph is kept"
    assert any("the source graph is kept" in note and "site1" in note for note in graph.notes)


@pytest.mark.usefixtures("wrong")
def test_without_it_the_wrong_rewrite_is_used() -> None:
    """So that the tests above show what they say."""
    inputs = operands()
    assert relative_error(rewritten(three)(*inputs), three(*inputs)) > 1e-3


@pytest.mark.usefixtures("wrong")
def test_explain_shows_it() -> None:
    report = attnrewrite.explain(three, *operands(), options={"verify": True})
    assert "0 of 3 attention sites rewritten" in str(report)
    assert "verification: site1" in str(report)


@pytest.mark.usefixtures("wrong")
def test_each_variant_is_verified_by_itself_and_only_once(caplog: pytest.LogCaptureFixture) -> None:
    """Two static shapes are two compiled graphs; later calls of each are not verified."""
    compiled = rewritten(three, dynamic=False, verify=True)
    with caplog.at_level(logging.WARNING, "attnrewrite"):
        for length in (8, 12, 8, 12):
            inputs = operands(length)
            assert relative_error(compiled(*inputs), three(*inputs)) <= 1e-6
    found = [message for message in caplog.messages if "differs" in message]
    assert [re.findall(r"float32 \(2, 4, (\d+), 16\)", message) for message in found] == [["8"] * 3, ["12"] * 3]


def test_dynamic_shapes_are_verified_at_the_first_call(caplog: pytest.LogCaptureFixture) -> None:
    compiled = rewritten(three, dynamic=True, verify=True)
    with caplog.at_level(logging.INFO, "attnrewrite"):
        for length in (8, 12, 20):
            inputs = operands(length)
            assert relative_error(compiled(*inputs), three(*inputs)) <= 1e-5
    assert len([message for message in caplog.messages if "verified" in message]) == 1


class Updating(nn.Module):
    """Writes to its input, and to a buffer that counts the calls."""

    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        y = (x @ x.mT / RIGHT).softmax(-1) @ x * self.calls
        x.mul_(2)
        return y + x


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_updated_inputs_are_updated_once(inner: str) -> None:
    (x, _, _), model = operands(), Updating()
    compiled, verified_x = rewritten(model, inner=inner, verify=True), x.clone()
    expected_model, expected_x = Updating(), x.clone()
    with torch.no_grad():
        for calls in (1, 2):
            assert relative_error(compiled(verified_x), expected_model(expected_x)) <= 1e-5
            assert torch.equal(verified_x, expected_x)
            assert model.calls == expected_model.calls == calls


def test_gradients_and_training() -> None:
    inputs = operands()
    for mine, plain in zip(gradients(rewritten(three, verify=True), inputs), gradients(three, inputs), strict=True):
        assert relative_error(mine, plain) <= 1e-4


@pytest.mark.usefixtures("wrong")
def test_gradients_are_the_sources_where_a_rewrite_is_wrong() -> None:
    inputs = operands()
    for mine, plain in zip(gradients(rewritten(three, verify=True), inputs), gradients(three, inputs), strict=True):
        assert relative_error(mine, plain) <= 1e-6


@torch.library.custom_op("attnrewrite_test::with_half_the_gradient", mutates_args=())
def with_half_the_gradient(x: Tensor) -> Tensor:
    return x.clone()


@with_half_the_gradient.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


with_half_the_gradient.register_autograd(lambda ctx, gradient: gradient / 2)


class HalfTheGradient(TorchSDPA):
    """Right values, wrong gradients."""

    name = "half_the_gradient"
    automatic = False

    def emit(self, site: CanonicalAttention, builder: Builder) -> fx.Node:
        operator = torch.ops.attnrewrite_test.with_half_the_gradient.default
        return builder.call(operator, super().emit(site, builder))


@pytest.fixture
def half_the_gradient() -> Iterator[None]:
    attnrewrite.register_kernel(HalfTheGradient())
    yield
    attnrewrite.unregister_kernel("half_the_gradient")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.usefixtures("half_the_gradient")
def test_wrong_gradients_are_found_in_training(dtype: torch.dtype) -> None:
    inputs = [value.to(dtype).requires_grad_() for value in operands()]
    settings: dict[str, Any] = {"kernels": "half_the_gradient", "verify": True}
    compiled = rewritten(three, **settings)
    with collect_reports() as graphs:
        found = gradients(compiled, inputs)
    assert [row.status for row in graphs[0].sites] == ["kept"] * 3
    assert "its gradients differ from the source's: " in (graphs[0].sites[0].reason or "")
    assert all(torch.equal(mine, plain) for mine, plain in zip(found, gradients(three, inputs), strict=True))
    torch._dynamo.reset()
    with torch.no_grad(), collect_reports() as graphs:
        rewritten(three, **settings)(*inputs)
    assert len(graphs[0].rewritten) == 3, "no gradient is wanted"


def learned_bias(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    return (q @ k.mT / 4 + bias).softmax(-1) @ v


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_gradients_that_agree(dtype: torch.dtype) -> None:
    """A row without a key has the gradient NaN in both."""
    bias = torch.randn(4, 8, 8)
    bias[:, 3] = -math.inf
    inputs = [value.to(dtype).requires_grad_() for value in (*operands(), bias)]
    _, graph = run(learned_bias, *inputs)
    (note,) = [note for note in graph.notes if "verified" in note]
    assert "1 site agrees" in note and "gradients of 1 compared" in note


class Dropping(nn.Module):
    """Dropout before and behind an attention, and with ``weights`` in it."""

    def __init__(self, weights: float) -> None:
        super().__init__()
        self.weights = weights

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.dropout(x, 0.5)
        first = nn.functional.dropout((x @ x.mT / RIGHT).softmax(-1), self.weights) @ x
        second = (first @ x.mT / RIGHT).softmax(-1) @ x
        return nn.functional.dropout(second, 0.5)


@pytest.mark.parametrize("weights", [0.0, 0.25])
def test_random_numbers_are_as_without_verification(weights: float) -> None:
    """Random layers before a site do not make it differ; a site that drops weights itself cannot be compared."""
    x, _, _ = operands()
    results = []
    for verify in (False, True):
        torch._dynamo.reset()
        compiled = rewritten(Dropping(weights).train(), verify=verify)
        torch.manual_seed(3)
        with collect_reports() as graphs:
            results.append((compiled(x), compiled(x), torch.rand(1)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    (note,) = [note for note in graphs[0].notes if "verified" in note]
    if weights:
        assert "1 site agrees with the source" in note
        assert "site0" in note and "not compared: its dropout of 0.25 is random" in note
    else:
        assert "all 2 sites agree" in note


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_every_dtype_agrees_within_its_tolerance(dtype: torch.dtype) -> None:
    _, graph = run(three, *(value.to(dtype) for value in operands()))
    assert len(graph.rewritten) == 3 and any("all 3 sites agree" in note for note in graph.notes), graph.notes


def test_autocast() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        _, graph = run(three, *operands())
    assert any("all 3 sites agree" in note for note in graph.notes), graph.notes
    assert not torch.is_autocast_enabled("cpu")


def test_rows_without_a_key_agree_where_they_are_nan() -> None:
    def masked(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return (q @ k.mT / 4).masked_fill(~mask, -math.inf).softmax(-1) @ v

    mask = torch.ones(8, 8, dtype=torch.bool).tril()
    mask[0] = False
    result, graph = run(masked, *operands(), mask)
    assert result.isnan().any()
    assert any("1 site agrees" in note for note in graph.notes), graph.notes


def test_a_graph_without_a_rewrite_is_left_alone() -> None:
    _, graph = run(lambda x: x.sin(), torch.randn(3))
    assert graph.notes == []


def test_a_function_of_the_scores() -> None:
    """A kernel that takes a graph of its own."""

    def capped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (5 * torch.tanh(q @ k.mT / 5)).softmax(-1) @ v

    inputs = operands()
    with torch.no_grad():
        result, graph = run(capped, *inputs)
    assert relative_error(result, capped(*inputs)) <= 1e-5
    assert [row.kernel for row in graph.sites] == ["flex"]
    assert graph.notes == [graph.notes[0]] and "1 site agrees" in graph.notes[0]


FIRST_RUN: list[int] = []


@torch.library.custom_op("attnrewrite_test::runs_from_the_second_time_on", mutates_args=())
def runs_from_the_second_time_on(x: Tensor) -> Tensor:
    FIRST_RUN.append(1)
    if len(FIRST_RUN) == 1:
        raise RuntimeError("not yet")
    return x.clone()


@runs_from_the_second_time_on.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def test_what_cannot_be_run_for_comparison_is_said(caplog: pytest.LogCaptureFixture) -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q = runs_from_the_second_time_on(q)
        return (q @ k.mT / RIGHT).softmax(-1) @ v

    FIRST_RUN.clear()
    inputs = operands()
    with caplog.at_level(logging.WARNING, "attnrewrite"):
        result, graph = run(function, *inputs)
    assert relative_error(result, function(*inputs)) <= 1e-5
    (note,) = graph.notes
    assert note.startswith("not verified") and "RuntimeError: not yet" in note
    assert len(graph.rewritten) == 1 and any(note in message for message in caplog.messages)


@pytest.mark.parametrize(
    ("actual", "expected", "absolute", "relative"),
    [
        ([1.0, 2.0], [1.0, 2.0], 0, 0),
        ([1.0, 2.5], [1.0, 2.0], 0.5, 0.25),
        ([math.nan, 2.0], [math.nan, 2.0], 0, 0),
        ([math.nan, 2.0], [1.0, 2.0], math.inf, math.inf),
        ([1.0, 2.0], [math.nan, 2.0], math.inf, math.inf),
        ([math.inf, 1.0], [math.inf, 2.0], 1, 0.5),
        ([-math.inf, 2.0], [math.inf, 2.0], math.inf, math.inf),
        ([0.0, 0.0], [0.0, 0.0], 0, 0),
        ([0.0, 1.0], [0.0, 0.0], 1, math.inf),
        ([], [], 0, 0),
    ],
)
def test_difference(actual: list[float], expected: list[float], absolute: float, relative: float) -> None:
    for dtype in TOLERANCES:
        found = difference(torch.tensor(actual, dtype=dtype), torch.tensor(expected, dtype=dtype))
        assert (found.absolute, found.relative, found.reason) == (absolute, relative, "")


def test_a_difference_of_kind() -> None:
    x = torch.zeros(2, 3)
    assert "shape (3, 2) where the source gives (2, 3)" in difference(x.mT, x).reason
    assert "dtype torch.float64" in difference(x.double(), x).reason
    assert difference(x.mT, x).relative == math.inf


def test_the_environment_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    def notes(**options: Any) -> list[str]:
        torch._dynamo.reset()
        with collect_reports() as graphs:
            rewritten(three, **options)(*operands())
        return graphs[0].notes

    assert notes() == []
    monkeypatch.setenv("ATTNREWRITE_VERIFY", "1")
    assert "verified" in notes()[0]
    assert notes(verify=False) == []
    monkeypatch.setenv("ATTNREWRITE_VERIFY", "0")
    assert notes() == []


@pytest.mark.parametrize(
    ("value", "options", "message"),
    [
        ("yes", {}, "ATTNREWRITE_VERIFY takes 1 or 0; got 'yes'"),
        ("", {"verify": "first"}, "options['verify'] takes True or False; got 'first'"),
    ],
)
def test_a_wrong_value_is_one_line(
    value: str, options: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ATTNREWRITE_VERIFY", value)
    with pytest.raises(attnrewrite.OptionError) as error:
        rewritten(three, **options)(*operands())
    assert str(error.value) == message


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_held_to_its_formula(dtype: torch.dtype) -> None:
    """Eager rounds the scores of a row without a key away, and the rewritten graph does not."""

    def masked(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
        scores = q @ k.mT * 0.25 + torch.where(keep, 0.0, -1e4).to(dtype)
        return scores.float().softmax(-1).to(dtype) @ v

    q, k, v = (part.to(dtype) for part in operands())
    keep = torch.rand(2, 4, 1, 8) > 0.5
    keep[0] = False
    result, graph = run(masked, q, k, v, keep)
    assert relative_error(result, masked(q, k, v, keep)) > 0.1
    assert [note for note in graph.notes if "verified: 1 site agrees" in note], graph.notes


@pytest.mark.usefixtures("wrong")
def test_half_precision_that_is_further_from_its_formula_than_eager() -> None:
    inputs = [part.bfloat16() for part in operands()]
    result, graph = run(three, *inputs)
    assert relative_error(result, three(*inputs)) <= 1e-2
    assert not [note for note in graph.notes if "verified: all" in note]
