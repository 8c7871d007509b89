"""A graph that was stored is the graph that rewriting gives, with the same report; what cannot be stored is not."""

from __future__ import annotations

import dataclasses
import inspect
import math
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint

import attnrewrite
from attnrewrite.ir.builder import Builder
from attnrewrite.ir.finding import Finding
from attnrewrite.ir.graph_view import GraphView
from attnrewrite.ir.site import CanonicalAttention
from attnrewrite.kernels import Availability, Verdict
from attnrewrite.kernels.torch_sdpa import TorchSDPA
from attnrewrite.patterns import Specimen
from attnrewrite.report.rows import GraphReport
from attnrewrite.selection import choose
from tests.coverage.measure import CASES, built
from tests.support.helpers import outputs, specimens_for_kernels
from tests.warm_start.conftest import Store


def heads(length: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value = torch.randn(3, 2, 4, length, 8).unbind()
    return query, key, value


def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return torch.softmax(query @ key.transpose(-2, -1) / math.sqrt(8), -1) @ value


def without_seconds(report: GraphReport) -> dict[str, Any]:
    notes = [note for note in report.notes if "warm_start" not in note]
    return {**dataclasses.asdict(report), "notes": notes, "seconds": {}, "name": ""}


MODELS = ["bert", "gpt2", "llama", "t5", "gpt-neo", "unet", "gemma2", "dat", "convit"]


@pytest.mark.parametrize("trains", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_a_models_graphs_are_found_again(store: Store, name: str, trains: bool) -> None:
    case = CASES[name]
    model, inputs = built(case), case.inputs()
    with torch.no_grad():
        model(**inputs)  # Some keep what their first call has made, and the next is another program.
    with torch.set_grad_enabled(trains):
        first = store.compiled(model, keywords=inputs, dynamic=trains or None)
        again = store.compiled(model, keywords=inputs, dynamic=trains or None)
    assert sum(first.was_stored) == 0 and sum(again.was_stored) == len(store.files) >= 1
    assert again.graphs == first.graphs
    assert list(map(without_seconds, again.reports)) == list(map(without_seconds, first.reports))
    for one, other in zip(outputs(again.result), outputs(first.result), strict=True):
        assert torch.equal(one.nan_to_num(7.0), other.nan_to_num(7.0))


@pytest.mark.parametrize("specimen", specimens_for_kernels(), ids=lambda specimen: specimen.name)
def test_a_specimens_graph_is_found_again(store: Store, specimen: Specimen) -> None:
    inputs = specimen.inputs(0, 12)
    first = store.compiled(specimen.function, *inputs)
    again = store.compiled(specimen.function, *inputs)
    assert again.graphs == first.graphs
    assert again.was_stored == [True] * len(first.reports)
    for one, other in zip(outputs(again.result), outputs(first.result), strict=True):
        assert torch.equal(one.nan_to_num(7.0), other.nan_to_num(7.0))


def test_gradients_of_a_stored_graph(store: Store) -> None:
    inputs = [tensor.requires_grad_() for tensor in heads()]
    found = []
    for _ in range(2):
        compilation = store.compiled(attention, *inputs, inner_backend="aot_eager")
        found.append(torch.autograd.grad(compilation.result.square().sum(), inputs))
    assert compilation.was_stored == [True]
    expected = torch.autograd.grad(attention(*inputs).square().sum(), inputs)
    for first, again, own in zip(*found, expected, strict=True):
        assert torch.equal(first, again)
        torch.testing.assert_close(again, own)


def test_a_graph_with_graphs_in_it_is_found_again(store: Store) -> None:
    """FlexAttention's mask is one."""

    def capped(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        scores = torch.tanh(query @ key.transpose(-2, -1) / 9) * 9
        return torch.softmax(scores, -1) @ value

    query, key, value = torch.randn(3, 2, 4, 32, 16).unbind()
    with torch.no_grad():
        first = store.compiled(capped, query, key, value, kernels="flex")
        again = store.compiled(capped, query, key, value, kernels="flex")
    assert first.kernels == again.kernels == ["flex"]
    assert again.was_stored == [True] and again.graphs == first.graphs
    torch.testing.assert_close(again.result, capped(query, key, value))


def test_a_checkpoint_is_recomputed_from_a_stored_graph(store: Store) -> None:
    inputs = [tensor.requires_grad_() for tensor in heads()]

    def recomputed(*inputs: Tensor) -> Tensor:
        result = checkpoint(attention, *inputs, use_reentrant=False)
        assert isinstance(result, Tensor)
        return result

    first = store.compiled(recomputed, *inputs, inner_backend="aot_eager")
    again = store.compiled(recomputed, *inputs, inner_backend="aot_eager")
    assert again.was_stored == [True] and again.graphs == first.graphs


def test_a_graph_without_attention_and_one_that_is_not_captured_are_found_again(store: Store) -> None:
    def plain(x: Tensor) -> Tensor:
        return x.square()

    assert store.compiled(plain, torch.ones(3)).was_stored == [False]
    again = store.compiled(plain, torch.ones(3))
    assert again.was_stored == [True] and torch.equal(again.result, torch.ones(3))

    def not_captured(x: Tensor) -> Tensor:
        with torch.no_grad():
            x.mul_(2)
        return x * 2

    def run() -> Any:
        return store.compiled(not_captured, torch.ones(3, requires_grad=True) * 1)

    first, again = run(), run()
    assert [report.captured for report in (*first.reports, *again.reports)] == [False, False]
    assert again.was_stored == [True] and first.reports[0].reason == again.reports[0].reason != ""


def test_sizes_stay_symbolic(store: Store) -> None:
    store.compiled(attention, *heads(), dynamic=True)
    again = store.compiled(attention, *heads(), dynamic=True)
    assert again.was_stored == [True]
    compiled = torch.compile(attention, backend="attnrewrite", dynamic=True, options={"inner_backend": "eager"})
    torch.compiler.reset()
    for length in (6, 9, 13):
        inputs = heads(length)
        torch.testing.assert_close(compiled(*inputs), attention(*inputs))
    assert len(store.files) == 1


class Own:
    """A kernel by its parts alone, and not by its base class."""

    name, automatic, needs = "own", True, "nothing"

    def __init__(self) -> None:
        self._kernel = TorchSDPA()

    def availability(self) -> Availability:
        return self._kernel.availability()

    def supports(self, site: CanonicalAttention) -> Verdict:
        return self._kernel.supports(site)

    def emit(self, site: CanonicalAttention, builder: Builder) -> fx.Node:
        return self._kernel.emit(site, builder)


class Looks:
    name, precedence, specimens = "looks", 5, ()

    def find(self, view: GraphView) -> Iterator[Finding]:
        return iter(())


def test_what_depends_on_more_than_the_key_is_not_stored(store: Store) -> None:
    inputs = heads()

    def with_own(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return attention(OwnFunction.apply(query), key, value)  # type: ignore[no-untyped-call]

    store.compiled(with_own, *[tensor.requires_grad_() for tensor in heads()])
    store.compiled(attention, *inputs, verify=True)
    store.compiled(attention, *inputs, tolerance=1e-2)
    store.compiled(attention, *inputs, inner_backend=lambda gm, inputs: gm.forward)
    store.compiled(attention, *inputs, warm_start=False)
    assert store.files == []


@pytest.mark.parametrize("name", ["_flash_3", "_native_flash", "_native_cudnn", "_native_efficient"])
def test_a_warning_is_given_each_time(store: Store, name: str, caplog: pytest.LogCaptureFixture) -> None:
    """Also where the name of the kernel that serves instead, ``native``, is a part of it."""
    for _ in range(2):
        choose._warn_once.cache_clear()
        caplog.clear()
        store.compiled(attention, *heads(), kernels=name)
        assert "cannot serve the attention" in caplog.text
    assert store.files == []


def test_a_kernel_and_a_pattern_of_the_user(store: Store) -> None:
    inputs = heads()
    store.compiled(attention, *inputs)
    (file,) = store.files
    attnrewrite.register_kernel(Own())
    try:
        found = store.compiled(attention, *inputs)
    finally:
        attnrewrite.unregister_kernel("own")
    assert found.kernels == ["own"] and found.was_stored == [False]
    attnrewrite.register_pattern(Looks)
    try:
        assert store.compiled(attention, *inputs).was_stored == [False]
    finally:
        attnrewrite.unregister_pattern("looks")
    assert store.files == [file] and store.compiled(attention, *inputs).was_stored == [True]


def test_nothing_is_stored_unless_it_is_asked_for(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ATTNREWRITE_WARM_START")
    store.compiled(attention, *heads())
    assert store.files == []
    store.compiled(attention, *heads(), warm_start=True)
    assert len(store.files) == 1


class OwnFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * 3


def test_a_request_that_cannot_be_served_is_an_error_each_time(store: Store) -> None:
    for _ in range(2):
        with pytest.raises(Exception, match="cannot serve the attention"):
            store.compiled(attention, *heads(), kernels="_flash_3", strict=True)
    assert store.files == []


def test_guards_of_the_rewriting_are_not_lost(store: Store) -> None:
    """What puts a guard on a size into the user's code is gone through in each process."""
    case = CASES["levit"]
    model, inputs = built(case), case.inputs()
    with torch.no_grad():
        for _ in range(2):
            found = store.compiled(model, keywords=inputs, dynamic=True)
            assert not any(found.was_stored)
    assert store.files == []


def model_with_buffer(held: Tensor) -> nn.Module:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("keep", held)

        def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            assert isinstance(self.keep, Tensor)
            scores = (query @ key.transpose(-2, -1) / math.sqrt(8)).masked_fill(~self.keep, -math.inf)
            return torch.softmax(scores, -1) @ value

    return Masked()


TRIANGLE = torch.ones(6, 6, dtype=torch.bool).tril()


@pytest.mark.parametrize(
    "other", [TRIANGLE.tril(-1) | torch.eye(6, dtype=torch.bool).roll(1, 0), TRIANGLE.T, ~TRIANGLE | True]
)
def test_a_buffer_that_holds_something_else(store: Store, other: Tensor) -> None:
    inputs = heads()
    store.compiled(model_with_buffer(TRIANGLE.clone()), *inputs)
    assert store.compiled(model_with_buffer(TRIANGLE.clone()), *inputs).was_stored == [True]
    model = model_with_buffer(other.clone())
    found = store.compiled(model, *inputs)
    assert found.was_stored == [False]
    torch.testing.assert_close(found.result, model(*inputs))


def test_a_buffer_that_changes_after_a_stored_graph_was_taken(store: Store) -> None:
    inputs = heads()
    store.compiled(model_with_buffer(TRIANGLE.clone()), *inputs)
    model = model_with_buffer(TRIANGLE.clone())
    torch.compiler.reset()
    compiled: Callable[..., Any] = torch.compile(model, backend="attnrewrite", options={"inner_backend": "eager"})
    torch.testing.assert_close(compiled(*inputs), model(*inputs))
    with torch.no_grad():
        model.keep[:] = True  # type: ignore[operator]
    torch.testing.assert_close(compiled(*inputs), model(*inputs))


def test_a_buffer_without_a_pattern_is_compared_as_well(store: Store) -> None:
    """What was looked at and found to be no pattern decides, too: a causal mask gets the graph of a causal mask."""
    inputs = heads()
    fresh = store.compiled(model_with_buffer(TRIANGLE.clone()), *inputs)
    for file in store.files:
        file.unlink()
    store.compiled(model_with_buffer(torch.rand(6, 6) > 0.5), *inputs)
    found = store.compiled(model_with_buffer(TRIANGLE.clone()), *inputs)
    assert found.was_stored == [False] and found.graphs == fresh.graphs


def test_a_failure_of_tracing_is_not_stored(store: Store) -> None:
    """The depth of the stack is this process's alone."""

    def deep(levels: int, function: Callable[[], Any]) -> Any:
        return deep(levels - 1, function) if levels else function()

    limit = sys.getrecursionlimit()
    depth = len(inspect.stack(0))
    failed: list[str] = []
    for levels in range(limit // 3, limit - depth, 8):
        try:
            found = deep(levels, lambda: store.compiled(attention, *heads()))
        except RecursionError:
            continue
        failed += [report.reason for report in found.reports if "Recursion" in report.reason]
        if failed:
            break
        for file in store.files:
            file.unlink()
    assert failed and store.files == []
    assert store.compiled(attention, *heads()).kernels == ["native"]
