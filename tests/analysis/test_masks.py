"""The structure of a mask is proved from how it is computed, and a causal one is not written to memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint

from tests.support.helpers import compile_count, no_more_graphs, relative_error, rewritten, rows

pytestmark = pytest.mark.drawn

LENGTH, KEYS = 7, 9
_Masked = Callable[[Tensor, Tensor], Tensor]


def _attend(mask: Callable[[int, int], Tensor], keys: int = LENGTH) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    """Attention under ``mask(queries, keys)``, boolean (True is kept) or additive, and inputs for it."""

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.mT * 0.3
        kept = mask(q.shape[-2], k.shape[-2])
        scores = scores.masked_fill(~kept, -math.inf) if kept.dtype is torch.bool else scores + kept
        return scores.softmax(-1) @ v

    generator = torch.Generator().manual_seed(0)
    sizes = (LENGTH, keys, keys)
    return attention, tuple(torch.randn(2, 3, size, 8, generator=generator) for size in sizes)


def _positions(queries: int, keys: int) -> tuple[Tensor, Tensor]:
    return torch.arange(queries)[:, None], torch.arange(keys)[None]


def tril(queries: int, keys: int) -> Tensor:
    return torch.ones(queries, keys, dtype=torch.bool).tril()


def not_triu(queries: int, keys: int) -> Tensor:
    return torch.ones(queries, keys).triu(1) == 0


def triu_of_minus_infinity(queries: int, keys: int) -> Tensor:
    return torch.full((queries, keys), -math.inf).triu(1)


def triu_of_lowest(queries: int, keys: int) -> Tensor:
    return torch.triu(torch.ones(queries, keys), diagonal=1) * torch.finfo(torch.float32).min


def comparison(queries: int, keys: int) -> Tensor:
    i, j = _positions(queries, keys)
    return j <= i


def negated_comparison(queries: int, keys: int) -> Tensor:
    i, j = _positions(queries, keys)
    return ~(i < j)


def float_comparison(queries: int, keys: int) -> Tensor:
    i, j = _positions(queries, keys)
    return (1.0 - (i >= j).float()) * -1e9


def chosen(queries: int, keys: int) -> Tensor:
    i, j = _positions(queries, keys)
    return torch.where(i - j >= 0, 0.0, -math.inf)


def window_that_holds_everything(queries: int, keys: int) -> Tensor:
    i, j = _positions(queries, keys)
    return (j <= i) & (i - j < 1000)


def gathered(queries: int, keys: int) -> Tensor:
    i, j = _positions(queries, keys)
    return torch.arange(100)[j] <= torch.arange(100)[i]


@pytest.mark.parametrize(
    "mask",
    [
        tril,
        not_triu,
        triu_of_minus_infinity,
        triu_of_lowest,
        comparison,
        negated_comparison,
        float_comparison,
        chosen,
        window_that_holds_everything,
        gathered,
    ],
)
def test_causal(mask: Callable[[int, int], Tensor]) -> None:
    function, inputs = _attend(mask)
    (row,) = rows(function, *inputs)
    assert (row.status, row.mask) == ("rewritten", "causal")
    assert "the mask is causal" in row.proof[0]
    assert relative_error(rewritten(function)(*inputs), function(*inputs)) <= 1e-5


def test_causal_is_not_written_to_memory() -> None:
    function, inputs = _attend(comparison)
    calls: list[tuple[Any, ...]] = []

    def inner(gm: torch.fx.GraphModule, example_inputs: Any) -> Any:
        target = torch.ops.aten.scaled_dot_product_attention.default
        calls.extend(node.args for node in gm.graph.find_nodes(op="call_function", target=target))
        assert not gm.graph.find_nodes(op="call_function", target=torch.ops.aten.arange.default)
        return gm.forward

    rewritten(function, inner)(*inputs)
    assert [call[3:] for call in calls] == [(None, 0.0, True)]


def window(queries: int, keys: int) -> Tensor:
    i, j = _positions(queries, keys)
    return (j <= i) & (i - j < 3)


def band(queries: int, keys: int) -> Tensor:
    return torch.ones(queries, keys, dtype=torch.bool).tril(1).triu(-2)


def prefix(queries: int, keys: int) -> Tensor:
    i, j = _positions(queries, keys)
    return (j <= i) | (j < 3)


def blocks(queries: int, keys: int) -> Tensor:
    i, j = torch.arange(queries) // 2, torch.arange(keys) // 2
    return i[:, None] == j[None]


def first_keys(queries: int, keys: int) -> Tensor:
    return (torch.arange(keys) < 4).expand(queries, keys)


def nothing_masked(queries: int, keys: int) -> Tensor:
    return torch.ones(queries, keys, dtype=torch.bool)


def zeros(queries: int, keys: int) -> Tensor:
    return torch.zeros(1, 1, queries, keys)


def counted_from_the_end(queries: int, keys: int) -> Tensor:
    i, j = _positions(queries, keys)
    return j <= i + keys - queries


def a_number_too_many(queries: int, keys: int) -> Tensor:
    i, j = _positions(queries, keys)
    return j <= i + 1


def every_third(queries: int, keys: int) -> Tensor:
    i, j = _positions(queries, keys)
    return (i - j) % 3 == 0


def filled_with_a_number(queries: int, keys: int) -> Tensor:
    i, j = _positions(queries, keys)
    return (j <= i).masked_fill(j < 3, 1)


def of_two_numbers(queries: int, keys: int) -> Tensor:
    i, j = _positions(queries, keys)
    return j >= torch.where(i > 2, 1, 0)


@pytest.mark.parametrize(
    ("mask", "keys", "words"),
    [
        (window, LENGTH, "causal + sliding window of 3"),
        (band, LENGTH, "causal, shifted by 1 + sliding window of 3"),
        (prefix, LENGTH, "prefix"),
        (blocks, LENGTH, "documents"),
        (first_keys, KEYS, "key padding"),
        (nothing_masked, KEYS, "none"),
        (zeros, KEYS, "none"),
        (counted_from_the_end, KEYS, "causal from the last key"),
        (a_number_too_many, KEYS, "causal, shifted by 1"),
        (tril, KEYS, "causal"),
        (every_third, LENGTH, "dense"),
        (filled_with_a_number, LENGTH, "prefix"),
        (of_two_numbers, LENGTH, "dense"),
    ],
)
def test_structure(mask: Callable[[int, int], Tensor], keys: int, words: str) -> None:
    function, inputs = _attend(mask, keys)
    (row,) = rows(function, *inputs)
    assert (row.status, row.mask) == ("rewritten", words)
    assert relative_error(rewritten(function)(*inputs), function(*inputs)) <= 1e-5


def sums_that_are_rounded(queries: int, keys: int) -> Tensor:
    i, j = _positions(queries, keys)
    return i * 0.1 + j * 0.1 - j * 0.1 <= i * 0.1


def a_number_that_is_rounded(queries: int, keys: int) -> Tensor:
    i, j = _positions(queries, keys)
    return torch.where(j <= i, 0.0, 0.1) != 0.1


@pytest.mark.parametrize(("mask", "words"), [(sums_that_are_rounded, "dense"), (a_number_that_is_rounded, "causal")])
def test_fractions_are_rounded(mask: Callable[[int, int], Tensor], words: str) -> None:
    function, inputs = _attend(mask)
    (row,) = rows(function, *inputs)
    assert (row.status, row.mask) == ("rewritten", words)
    assert relative_error(rewritten(function)(*inputs), function(*inputs)) <= 1e-5
    assert not mask(LENGTH, LENGTH).all()  # As they would be if the steps were not rounded.


@pytest.mark.parametrize("mask", [comparison, window, prefix, blocks, counted_from_the_end, tril])
def test_structure_of_symbolic_sizes(mask: Callable[[int, int], Tensor]) -> None:
    function, inputs = _attend(mask)
    static, dynamic = rows(function, *inputs), rows(function, *inputs, dynamic=True)
    # Where the two lengths are one symbol, or known to be equal, the last key is the query's own.
    assert dynamic[0].status == "rewritten"
    assert dynamic[0].mask in (static[0].mask, "causal from the last key")
    calls = [tuple(t[:, :, :size] for t in inputs) for size in (7, 5, 6)]
    options = {"inner_backend": "eager"}
    needed = compile_count(function, calls, "attnrewrite", options=options)
    assert no_more_graphs(needed, function, calls)
    torch._dynamo.reset()
    compiled = rewritten(function, dynamic=True)
    for call in calls:
        assert relative_error(compiled(*call), function(*call)) <= 1e-5


# Buffers.


class Buffered(nn.Module):
    """nanoGPT's attention: the causal mask is a buffer, and longer than the sequence."""

    bias: Tensor

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("bias", mask)

    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[-2]
        scores = (x @ x.mT) * 0.3
        return scores.masked_fill(self.bias[:, :, :length, :length] == 0, -math.inf).softmax(-1) @ x


def _buffered() -> tuple[Buffered, Tensor]:
    return Buffered(torch.tril(torch.ones(20, 20)).view(1, 1, 20, 20)), torch.randn(2, 3, 9, 8)


def test_a_buffer_counts_as_computation() -> None:
    model, x = _buffered()
    (row,) = rows(model, x)
    assert row.mask == "causal"
    assert relative_error(rewritten(model)(x), model(x)) <= 1e-5


def test_a_buffer_of_truth_values_that_are_used_as_numbers() -> None:
    class Added(Buffered):
        def forward(self, x: Tensor) -> Tensor:
            length = x.shape[-2]
            kept = self.bias[:, :, :length, :length].float()
            return ((x @ x.mT) * 0.3 + (1.0 - kept) * -1e9).softmax(-1) @ x

    model, x = Added(torch.ones(1, 1, 20, 20, dtype=torch.bool).tril()), torch.randn(2, 3, 9, 8)
    (row,) = rows(model, x)
    assert (row.status, row.mask) == ("rewritten", "causal")
    assert relative_error(rewritten(model)(x), model(x)) <= 1e-5


def test_another_buffer_is_a_mask_like_any_other() -> None:
    mask = torch.tril(torch.ones(20, 20)).view(1, 1, 20, 20)
    mask[0, 0, 5, 2] = 0
    model, x = Buffered(mask), torch.randn(2, 3, 9, 8)
    (row,) = rows(model, x)
    assert (row.status, row.mask) == ("rewritten", "dense")
    assert relative_error(rewritten(model)(x), model(x)) <= 1e-5


@pytest.mark.parametrize("inner", ["eager", "inductor"])
def test_a_buffer_that_changes_is_noticed(inner: str) -> None:
    model, x = _buffered()
    compiled = rewritten(model, inner)
    with torch.no_grad():
        assert relative_error(compiled(x), model(x)) <= 1e-5
        model.load_state_dict(model.state_dict())  # Written to, and the same.
        assert relative_error(compiled(x), model(x)) <= 1e-5
        model.bias[..., 3:, :2] = 0
        assert relative_error(compiled(x), model(x)) <= 1e-5
        model.bias = torch.ones(1, 1, 20, 20)
        assert relative_error(compiled(x), model(x)) <= 1e-5


def test_gradients_after_a_buffer_has_changed() -> None:
    model, x = _buffered()
    compiled = rewritten(model, "aot_eager")
    x.requires_grad_()
    compiled(x)
    model.bias[..., 3:, :2] = 0
    (expected,) = torch.autograd.grad(model(x).sin().sum(), x)
    (actual,) = torch.autograd.grad(compiled(x).sin().sum(), x)
    assert relative_error(actual, expected) <= 1e-4


class Checkpointed(nn.Module):
    mask: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)
        self.register_buffer("mask", torch.ones(6, 6).tril().bool())

    def block(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        weights = (q @ k.mT).masked_fill(~self.mask, -math.inf).softmax(-1)
        return nn.functional.dropout(weights @ v, 0.5, self.training)

    def forward(self, x: Tensor) -> Any:
        return checkpoint(self.block, x, use_reentrant=False)


class InRegion(Checkpointed):
    @torch.compiler.nested_compile_region
    def region(self, x: Tensor) -> Tensor:
        return self.block(x)

    def forward(self, x: Tensor) -> Any:
        return self.region(self.region(x).repeat(1, 1, 1))


@pytest.mark.parametrize("model", [Checkpointed, InRegion])
def test_gradients_of_what_aotautograd_computes_after_a_buffer_has_changed(model: type[Checkpointed]) -> None:
    """A checkpoint draws the same random numbers again, and a region has a backward pass, only there."""
    torch.manual_seed(0)
    source = model().train(model is Checkpointed)
    compiled, x = rewritten(source, "aot_eager"), torch.randn(2, 6, 8)
    compiled(x).sum().backward()
    source.mask.copy_(torch.ones(6, 6).tril(2).bool())

    def gradient(run: Callable[[Tensor], Tensor]) -> Tensor:
        torch.manual_seed(1)
        (found,) = torch.autograd.grad(run(x).square().sum(), source.qkv.weight)
        return found

    assert relative_error(gradient(compiled), gradient(source)) <= 1e-4


class Filled(nn.Module):
    """What is filled in is a buffer, too."""

    value: Tensor

    def __init__(self, value: float, change: Callable[[Tensor], Tensor] = lambda value: value) -> None:
        super().__init__()
        self.register_buffer("value", torch.tensor(value))
        self.change = change

    def forward(self, x: Tensor) -> Tensor:
        later = torch.ones(9, 9, dtype=torch.bool).triu(1)
        return (x @ x.mT).masked_fill(later, self.change(self.value)).softmax(-1) @ x


@pytest.mark.parametrize(
    ("value", "change"),
    [
        (-math.inf, lambda value: value),
        (-1e9, lambda value: value.to(torch.float64).to(torch.float32)),
        (-1e9, lambda value: value * 2 + 1),
        (3e38, lambda value: -value),
        (1e9, lambda value: (2.0 - value) / 3),
        (-3e38, lambda value: 2 * value),
    ],
)
def test_a_number_in_a_buffer(value: float, change: Callable[[Tensor], Tensor]) -> None:
    model, x = Filled(value, change), torch.randn(2, 3, 9, 8)
    (row,) = rows(model, x)
    assert (row.status, row.mask) == ("rewritten", "causal")
    assert relative_error(rewritten(model)(x), model(x)) <= 1e-5


def test_a_number_in_a_buffer_that_changes() -> None:
    model, x = Filled(-math.inf), torch.randn(2, 3, 9, 8)
    compiled = rewritten(model)
    with torch.no_grad():
        for value in (-math.inf, 0.5, -math.inf, math.nan):
            model.value.fill_(value)
            assert torch.allclose(compiled(x), model(x), atol=1e-5, equal_nan=True)


@pytest.mark.parametrize(
    "change", [lambda value: value.exp(), lambda value: value / 0 * 0, lambda value: value + value]
)
def test_other_numbers(change: Callable[[Tensor], Tensor]) -> None:
    """What is not known, and a sum of 1e9, are no masks."""
    model, x = Filled(1e9, change), torch.randn(2, 3, 9, 8)
    result = rewritten(model)(x)
    assert torch.allclose(result, model(x), atol=1e-5, equal_nan=True)


def test_a_number_that_changes_from_step_to_step() -> None:
    """A temperature is not read, so that no call finds it changed."""

    class Scaled(Filled):
        def forward(self, x: Tensor) -> Tensor:
            return (x @ x.mT / self.value + self.value).softmax(-1) @ x

    model, x = Scaled(2.0), torch.randn(2, 3, 9, 8)
    (row,) = rows(model, x)
    assert row.status == "rewritten", row.reason
    calls = []

    def inner(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        def call(*inputs: Any) -> Any:
            calls.append(len(inputs))
            return gm.forward(*inputs)

        return call

    compiled = rewritten(model, inner)
    for value in (2.0, 3.0, 4.0):
        model.value.fill_(value)
        assert relative_error(compiled(x), model(x)) <= 1e-5
    assert len(calls) == 3


# vmap.


def _mapped(mask: Callable[..., Tensor], queries: int, keys: int) -> Tensor:
    """As transformers does it: a function of (batch, head, query, key), mapped over each."""
    for axes in ((None, None, None, 0), (None, None, 0, None), (None, 0, None, None), (0, None, None, None)):
        mask = torch.vmap(mask, in_dims=axes, out_dims=0)
    sizes = (2, 1, queries, keys)
    return mask(*(torch.arange(size) for size in sizes))


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_mask_by_vmap(dynamic: bool) -> None:
    def mask(queries: int, keys: int) -> Tensor:
        return _mapped(lambda b, h, i, j: (j <= i) & (i - j < 3), queries, keys)

    function, inputs = _attend(mask)
    (row,) = rows(function, *inputs, dynamic=dynamic)
    assert (row.status, row.mask) == ("rewritten", "causal + sliding window of 3")
    compiled = rewritten(function, "aot_eager", dynamic=dynamic)
    assert relative_error(compiled(*inputs), function(*inputs)) <= 1e-5


def test_a_mask_by_vmap_that_reads_a_tensor() -> None:
    document = torch.tensor([[0, 0, 0, 1, 1, 2, 2], [0, 1, 1, 1, 1, 1, 2]])

    def attention(q: Tensor, k: Tensor, v: Tensor, document: Tensor) -> Tensor:
        kept = _mapped(lambda b, h, i, j: document[b, i] == document[b, j], q.shape[-2], k.shape[-2])
        return (q @ k.mT * 0.3).masked_fill(~kept, -math.inf).softmax(-1) @ v

    _, operands = _attend(tril)
    inputs = (*operands, document)
    (row,) = rows(attention, *inputs)
    assert row.status == "rewritten"
    assert relative_error(rewritten(attention)(*inputs), attention(*inputs)) <= 1e-5


def not_itself(queries: int, keys: int) -> Tensor:
    i, j = _positions(queries, keys)
    return i != j


def not_identity(queries: int, keys: int) -> Tensor:
    return ~torch.eye(queries, keys, dtype=torch.bool)


def identity_lowered(queries: int, keys: int) -> Tensor:
    return torch.eye(queries, keys) * -1e9


def not_two_diagonals(queries: int, keys: int) -> Tensor:
    i, j = _positions(queries, keys)
    return (i != j) & (i + 1 != j)


@pytest.mark.parametrize("mask", [not_itself, not_identity, identity_lowered])
def test_a_row_that_does_not_attend_to_itself_has_the_first_key_or_the_second(mask: Any) -> None:
    attention, inputs = _attend(mask)
    (row,) = rows(attention, *inputs)
    assert row.proof == ("every row keeps a key: the first or the second key",)


@pytest.mark.parametrize(
    ("mask", "keys"), [(not_itself, 1), (not_identity, 1), (not_two_diagonals, 1), (not_two_diagonals, 2)]
)
def test_rows_without_a_key_beside_those_that_do_not_attend_to_themselves(mask: Any, keys: int) -> None:
    """A single key is the first query's own, and with two diagonals the first query has none of two."""
    attention, inputs = _attend(mask, keys)
    with torch.no_grad():
        (row,) = rows(attention, *inputs)
        assert "the first or the second key" not in " ".join(row.proof)
        actual, expected = rewritten(attention)(*inputs), attention(*inputs)
    assert expected.isnan().any() and torch.equal(actual.isnan(), expected.isnan())
    assert relative_error(actual.nan_to_num(), expected.nan_to_num()) <= 1e-5
