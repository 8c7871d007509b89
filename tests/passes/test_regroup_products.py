"""Sums of products with parts or sums of attention weights: what becomes attention, and what stays as it is."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch.utils.checkpoint import checkpoint

import attnrewrite
from attnrewrite.backend import collect_reports
from attnrewrite.capture.trace import capture
from attnrewrite.options.compile_options import Policy
from attnrewrite.passes.rewriting import Rewriting, as_requested
from attnrewrite.passes.steps import Steps
from tests.support.helpers import gradients, relative_error, rewritten, rows

Attend = Callable[..., Tensor]


def check(function: Attend, *inputs: Tensor, sites: int = 1, dtype: torch.dtype | None = None) -> None:
    """So many sites, all rewritten; values, strides and gradients are the source's."""
    torch._dynamo.reset()
    assert [(row.status, row.reason) for row in rows(function, *inputs)] == [("rewritten", "")] * sites
    torch._dynamo.reset()
    result, expected = rewritten(function)(*inputs), function(*inputs)
    assert relative_error(result, expected) <= 1e-5
    assert result.stride() == expected.stride()
    torch._dynamo.reset()
    assert relative_error(gradients(rewritten(function, "aot_eager"), inputs), gradients(function, inputs)) <= 1e-4


def check_kept(function: Attend, *inputs: Tensor, reason: str) -> None:
    """No site is rewritten, for the reason, and the result is the source's to the bit."""
    torch._dynamo.reset()
    found = rows(function, *inputs)
    assert [row.status for row in found] == ["kept"] * len(found)
    assert any(reason in row.reason for row in found), [row.reason for row in found]
    torch._dynamo.reset()
    torch.testing.assert_close(rewritten(function)(*inputs), function(*inputs), rtol=0, atol=0, equal_nan=True)


def operands(*lengths: int, batch: tuple[int, ...] = (2, 3), features: int = 8) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(*batch, length, features, generator=generator) for length in lengths]


# Keys in several parts.


def parts(q: Tensor, k: Tensor, v: Tensor, more_k: Tensor, more_v: Tensor) -> Tensor:
    weights = torch.cat([q @ k.mT, q @ more_k.mT], -1).softmax(-1)
    n = k.shape[-2]
    return weights[..., :n] @ v + weights[..., n:] @ more_v


PARTS = (6, 7, 7, 4, 4)


def test_parts() -> None:
    check(parts, *operands(*PARTS))


def test_each_half_alone() -> None:
    """The scores of one tensor of keys, and parts of the weights; and the other way round."""

    def values(q: Tensor, k: Tensor, v: Tensor, more_v: Tensor) -> Tensor:
        first, second = torch.split((q @ k.mT).softmax(-1), [v.shape[-2], more_v.shape[-2]], -1)
        return first @ v + second @ more_v

    def keys(q: Tensor, k: Tensor, more_k: Tensor, v: Tensor) -> Tensor:
        return torch.cat([q @ k.mT, q @ more_k.mT], -1).softmax(-1) @ v

    check(values, *operands(6, 11, 7, 4))
    check(keys, *operands(6, 7, 4, 11))


def test_the_concatenation_that_the_graph_has_is_used() -> None:
    """A cache is concatenated for the next step anyway."""

    def attend(q: Tensor, k: Tensor, v: Tensor, more_k: Tensor, more_v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        key, value = torch.cat([k, more_k], 2), torch.cat([v, more_v], 2)
        return parts(q, k, v, more_k, more_v), key, value

    for queries in (1, 6):
        inputs = operands(queries, *PARTS[1:])
        torch._dynamo.reset()
        (graph,) = attnrewrite.explain(attend, *inputs).graphs
        assert [row.status for row in graph.sites] == ["rewritten"]
        assert graph.after_code.count("aten.cat.") == 2
        torch._dynamo.reset()
        assert relative_error(rewritten(attend)(*inputs), attend(*inputs)) <= 1e-5


def test_values_that_are_slices_of_one() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = (q @ k.mT).softmax(-1)
        return weights[..., 3:] @ v[:, :, 3:] + weights[..., :3] @ v[:, :, :3]

    check(attend, *operands(6, 7, 7))
    check(attend, *operands(1, 7, 7))


def test_dropout_before_the_split() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, more_v: Tensor) -> Tensor:
        weights = F.dropout((q @ k.mT).softmax(-1), 0.5)
        return weights[..., : v.shape[2]] @ v + weights[..., v.shape[2] :] @ more_v

    (row,) = rows(attend, *operands(6, 11, 7, 4))
    assert (row.reason, row.status, row.dropout) == ("", "rewritten", "0.5")


def test_parts_of_a_single_query_are_not_copied() -> None:
    check_kept(parts, *operands(1, *PARTS[1:]), reason="copying them takes longer than the scores of one query")


def gap(q: Tensor, k: Tensor, v: Tensor, more_v: Tensor) -> Tensor:
    weights = (q @ k.mT).softmax(-1)
    return weights[..., :7] @ v + weights[..., 8:] @ more_v[:, :, 1:]


def overlap(q: Tensor, k: Tensor, v: Tensor, more_v: Tensor) -> Tensor:
    weights = (q @ k.mT).softmax(-1)
    return weights[..., :7] @ v + weights[..., 6:10] @ more_v


def the_rest_is_left_out(q: Tensor, k: Tensor, v: Tensor, more_v: Tensor) -> Tensor:
    weights = (q @ k.mT).softmax(-1)
    return weights[..., :7] @ v + weights[..., 7:10] @ more_v[:, :, 1:]


def one_part_twice(q: Tensor, k: Tensor, v: Tensor, more_v: Tensor) -> Tensor:
    weights = (q @ k.mT).softmax(-1)
    return weights[..., :7] @ v + weights[..., :7] @ v + weights[..., 7:] @ more_v


@pytest.mark.parametrize("function", [gap, overlap, the_rest_is_left_out, one_part_twice])
def test_parts_that_do_not_cover_the_keys(function: Attend) -> None:
    check_kept(function, *operands(6, 11, 7, 4), reason="not known to cover all keys exactly once")


def test_values_of_different_batches() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, more_v: Tensor) -> Tensor:
        weights = (q @ k.mT).softmax(-1)
        return weights[..., :7] @ v + weights[..., 7:] @ more_v[:1]

    check_kept(attend, *operands(6, 11, 7, 4), reason="differ in more than their number")


def test_values_of_blocks_of_queries() -> None:
    """CogView: some keys are those of all queries, and others those of a block."""

    def attend(q: Tensor, k: Tensor, v: Tensor, of_blocks: Tensor) -> Tensor:
        weights = (q @ k.mT).softmax(-1)
        blocks = weights[..., 7:].view(2, 3, 2, 3, 4) @ of_blocks.view(2, 3, 2, 4, 8)
        return weights[..., :7] @ v + blocks.view(2, 3, 6, 8)

    check_kept(attend, *operands(6, 11, 7, 8), reason="each block of queries")


def test_parts_of_two_softmaxes() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, more_v: Tensor) -> Tensor:
        first, second = (q @ k.mT).softmax(-1), (q @ k.mT * 2).softmax(-1)
        return first[..., :7] @ v + second[..., 7:] @ more_v

    check_kept(attend, *operands(6, 11, 7, 4), reason="between softmax and the product with the value")


def test_one_part_is_returned() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, more_v: Tensor) -> tuple[Tensor, Tensor]:
        first, second = torch.split((q @ k.mT).softmax(-1), [7, 4], -1)
        return first @ v + second @ more_v, second

    inputs = operands(6, 11, 7, 4)
    (row,) = rows(attend, *inputs)
    assert row.status == "kept"
    assert "read more than once" in row.reason
    torch._dynamo.reset()
    assert relative_error(rewritten(attend)(*inputs), attend(*inputs)) == 0


def test_scores_of_different_queries() -> None:
    def attend(q: Tensor, other: Tensor, k: Tensor, more_k: Tensor, v: Tensor) -> Tensor:
        return torch.cat([q @ k.mT, other @ more_k.mT], -1).softmax(-1) @ v

    check_kept(attend, *operands(6, 6, 7, 4, 11), reason="do not share their query")


def test_parts_with_scales_of_their_own() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, more_k: Tensor, more_v: Tensor) -> Tensor:
        weights = torch.cat([q @ k.mT * 0.5, q @ more_k.mT * 0.25], -1).softmax(-1)
        return weights[..., :7] @ v + weights[..., 7:] @ more_v

    check_kept(attend, *operands(*PARTS), reason="computed in different ways")


def test_a_sink_that_is_a_product() -> None:
    """The column of a token without a value is no part of the keys."""

    def attend(q: Tensor, k: Tensor, v: Tensor, token: Tensor) -> Tensor:
        scores = torch.cat([q @ k.mT, q @ token.mT], -1)
        return scores.softmax(-1)[..., :-1] @ v

    check(attend, *operands(6, 7, 7, 1))


# Scores in several parts.


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_scores_in_parts_that_are_no_keys(dim: int) -> None:
    """Batches, heads, or queries: each part has operands and a bias of its own."""

    def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, other: Tensor) -> Tensor:
        queries, keys = q.chunk(2, dim), k.mT.chunk(2, dim) if dim < 2 else (k.mT,) * 2
        parts = [a @ b * 0.3 - c for a, b, c in zip(queries, keys, (bias, other), strict=True)]
        return torch.cat(parts, dim).softmax(-1) @ v

    check(attend, *operands(6, 7, 7, batch=(2, 4)), *(torch.randn(7) for _ in range(2)))


def test_scores_of_one_product_under_two_biases() -> None:
    """What was added to the one product has batches, and counts for both."""

    def attend(q: Tensor, k: Tensor, v: Tensor, shared: Tensor, bias: Tensor, other: Tensor) -> Tensor:
        scores = q @ k.mT * 0.3 + shared
        weights = torch.cat([scores + bias, scores + other]).softmax(-1)
        return weights @ torch.cat([v, v.flip(-1)])

    biases = torch.randn(2, 1, 6, 7), torch.randn(3, 1, 7), torch.randn(3, 1, 7)
    check(attend, *operands(6, 7, 7), *biases)


def test_a_key_that_is_broadcast_along_the_parts() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, other: Tensor) -> Tensor:
        scores = q @ k[:1].mT
        return torch.cat([scores + bias, scores + other]).softmax(-1) @ v[:1]

    check(attend, *operands(6, 7, 7), torch.randn(6, 7), torch.randn(6, 7))


def test_scores_in_parts_of_one_batch() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, other: Tensor) -> Tensor:
        scores = q @ k.mT
        return torch.cat([scores + bias, scores + other]).softmax(-1) @ v

    check(attend, *operands(6, 7, 7, batch=(1, 3)), torch.randn(6, 7), torch.randn(6, 7))


def keys_of_different_batches(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, other: Tensor) -> Tensor:
    return torch.cat([q @ k[:1].mT + bias, q @ k[1:].mT + other]).softmax(-1) @ v[:1]


def biases_of_different_shapes(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, other: Tensor) -> Tensor:
    scores = q @ k.mT
    return torch.cat([scores + bias, scores + other[:1]]).softmax(-1) @ v[:1]


def one_part_is_bounded(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, other: Tensor) -> Tensor:
    scores = q @ k.mT
    return torch.cat([scores + bias, (scores + other).clamp(max=1.0)]).softmax(-1) @ v[:1]


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (keys_of_different_batches, "along a dimension that an operand is broadcast to"),
        (biases_of_different_shapes, "computed in different ways"),
        (one_part_is_bounded, "computed in different ways"),
    ],
)
def test_scores_in_parts_that_stay(function: Attend, reason: str) -> None:
    check_kept(function, *operands(6, 7, 7), torch.randn(6, 7), torch.randn(6, 7), reason=reason)


# Plain steps in another form.


def normalized(affine: bool, training: bool = False, dtype: torch.dtype = torch.float32) -> torch.nn.BatchNorm2d:
    norm = torch.nn.BatchNorm2d(3, affine=affine, dtype=dtype).train(training)
    with torch.no_grad():
        assert norm.running_mean is not None and norm.running_var is not None
        norm.running_mean.copy_(torch.tensor([-3.0, 0.0, 2.0]))
        norm.running_var.copy_(torch.tensor([0.5, 4.0, 9.0]))
        for value in norm.parameters():
            value.copy_(torch.tensor([1.5, -0.5, 2.0]))
    return norm


@pytest.mark.parametrize("affine", [True, False])
def test_batch_norm_of_the_scores(affine: bool) -> None:
    """The factor of a head may be negative."""
    norm = normalized(affine)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        result: Tensor = (norm(q @ k.mT) * 0.5).softmax(-1) @ v
        return result

    check(attend, *operands(6, 7, 7))


def test_a_mask_behind_a_batch_norm_of_the_scores() -> None:
    norm = normalized(affine=True)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        future = torch.ones(6, 7, dtype=torch.bool).triu(2)
        result: Tensor = norm(q @ k.mT).masked_fill(future, -math.inf).softmax(-1) @ v
        return result

    inputs = operands(6, 7, 7)
    with torch.no_grad():
        assert [row.status for row in rows(attend, *inputs)] == ["rewritten"]
        torch._dynamo.reset()
        assert relative_error(rewritten(attend)(*inputs), attend(*inputs)) <= 1e-5


def test_gradients_of_a_batch_norm_of_the_scores() -> None:
    """The weight has its gradient, and the bias one of zeros but for rounding; the statistics have none."""

    def trained(compiled: bool) -> tuple[Tensor | None, ...]:
        norm = normalized(affine=True)
        q, k, v = operands(6, 7, 7)

        def attend(q: Tensor) -> Tensor:
            result: Tensor = norm(q @ k.mT).softmax(-1) @ v
            return result

        function = rewritten(attend, "aot_eager") if compiled else attend
        torch._dynamo.reset()
        function(q.requires_grad_()).square().sum().backward()
        return q.grad, norm.weight.grad, norm.bias.grad

    (*own, bias), (*expected, other) = trained(True), trained(False)
    assert relative_error(own, expected) <= 1e-4
    assert bias is not None and other is not None
    assert bias.abs().max() <= 1e-4 and other.abs().max() <= 1e-4


def test_a_sum_over_a_dimension_of_one() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = (q @ k.mT).unsqueeze(1)
        return (scores.sum(1, keepdim=True) * 0.5).sum((1,)).softmax(-1) @ v

    check(attend, *operands(6, 7, 7))


def test_steps_that_stay() -> None:
    """Statistics of the batch, half precision, and scores that something else reads."""

    def attend(q: Tensor, k: Tensor, v: Tensor, norm: torch.nn.BatchNorm2d) -> Tensor:
        result: Tensor = norm(q @ k.mT).softmax(-1) @ v
        return result

    def in_training(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, k, v, normalized(affine=False, training=True))

    half = normalized(affine=True, dtype=torch.bfloat16)
    check_kept(in_training, *operands(6, 7, 7), reason="between softmax and")
    inputs = [value.bfloat16() for value in operands(6, 7, 7)]
    check_kept(lambda q, k, v: attend(q, k, v, half), *inputs, reason="batch norm in half precision")

    def returned(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = normalized(affine=False)(q @ k.mT).unsqueeze(0).sum(0)
        result: Tensor = scores.softmax(-1) @ v + scores.mean()
        return result

    check_kept(returned, *operands(6, 7, 7), reason="read more than once")


# Sums of weights.


def difference(q: Tensor, k: Tensor, v: Tensor, factor: Tensor) -> Tensor:
    first, second = (q @ k.mT).softmax(-1).unbind(1)
    return (first - factor * second) @ v


def halves(batch: tuple[int, ...] = (2, 2, 3)) -> list[Tensor]:
    q, k = operands(6, 7, batch=batch)
    (v,) = operands(7, batch=(batch[0], *batch[2:]))
    return [q, k, v]


@pytest.mark.parametrize("shape", [(), (1,), (3, 1, 1), (6, 1), (2, 1, 6, 1)])
def test_factors(shape: tuple[int, ...]) -> None:
    """A number, or one for each head or query."""
    check(difference, *halves(), torch.randn(shape))


def test_a_number_that_is_a_symbol() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, factor: float) -> Tensor:
        first, second = (q @ k.mT).softmax(-1).unbind(1)
        return (first - second * factor) @ v

    compiled, (q, k, v) = rewritten(attend, dynamic=True), halves()
    for factor in (0.25, 0.5, -2.0):
        assert relative_error(compiled(q, k, v, factor), attend(q, k, v, factor)) <= 1e-5


def test_value_with_fewer_dimensions() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        first, second = (q @ k.mT).softmax(-1).unbind(1)
        return (first / 2 + second / 2) @ v[0, 0]

    check(attend, *halves())


def test_value_with_more_dimensions() -> None:
    """Those of the factor, so that the slices are counted from the last dimension."""

    def attend(q: Tensor, k: Tensor, v: Tensor, factor: Tensor) -> Tensor:
        first, second = (q @ k.mT).softmax(-1).unbind(0)
        return (first - factor * second) @ v

    q, k = operands(6, 7, batch=(2, 3))
    (v,) = operands(7, batch=(2, 3))
    check(attend, q, k, v, torch.randn(2, 1, 1, 1))


def test_three_slices_with_heads_behind_them() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = (q @ k.mT).softmax(-1)
        return (weights[:, 3:6] + 2 * weights[:, :3] - weights[:, 6:]) @ v

    q, k = operands(6, 7, batch=(2, 9))
    check(attend, q, k, *operands(7))


def test_nan_of_one_of_them() -> None:
    """A row without a key in one softmax is NaN in the sum, and where its weights are set to zero it is not."""

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        first, second = (q @ k.mT).softmax(-1), (q @ k.mT * 2).masked_fill(mask, -math.inf).softmax(-1)
        return (first - second) @ v

    def replaced(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        first, second = (q @ k.mT).softmax(-1), (q @ k.mT * 2).masked_fill(mask, -math.inf).softmax(-1)
        return (first - second.nan_to_num()) @ v

    q, k, v = operands(6, 7, 7)
    mask = torch.zeros(6, 7, dtype=torch.bool)
    mask[2], mask[3, 4:] = True, True
    for function in (attend, replaced):
        torch._dynamo.reset()
        with torch.no_grad():
            assert [row.status for row in rows(function, q, k, v, mask)] == ["rewritten"] * 2
            assert relative_error(rewritten(function)(q, k, v, mask), function(q, k, v, mask)) <= 1e-5


def test_one_attention_among_the_terms() -> None:
    """The other weights are no attention, and are multiplied by themselves."""

    def attend(q: Tensor, k: Tensor, v: Tensor, position: Tensor) -> Tensor:
        return ((q @ k.mT).softmax(-1) * 0.25 + 0.75 * position.softmax(-1)) @ v

    inputs = [*operands(6, 7, 7), torch.randn(3, 6, 7)]
    assert [(row.status, row.reason) for row in rows(attend, *inputs)] == [("rewritten", "")]
    torch._dynamo.reset()
    assert relative_error(rewritten(attend)(*inputs), attend(*inputs)) <= 1e-5


@pytest.mark.parametrize("shape", [(2, 3, 6, 7), (3, 1, 7), (6, 7), (1, 7)])
def test_a_given_matrix_among_the_terms(shape: tuple[int, ...]) -> None:
    """It is multiplied with the value as it is, and its gradient comes from there."""

    def attend(q: Tensor, k: Tensor, v: Tensor, given: Tensor) -> Tensor:
        return (0.5 * given - (q @ k.mT).softmax(-1)) @ v

    check(attend, *operands(6, 7, 7), torch.randn(shape, generator=torch.Generator().manual_seed(1)))


def test_a_given_matrix_beside_slices_of_one_softmax() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, given: Tensor) -> Tensor:
        first, second = (q @ k.mT).softmax(-1).unbind(1)
        return (first - 0.5 * second + given[:, :7]) @ v

    check(attend, *halves(), torch.randn(6, 9))


def test_a_given_matrix_beside_weights_with_a_sink() -> None:
    """The column of the sink is cut off, and then the weights have the shape of the matrix."""

    def attend(q: Tensor, k: Tensor, v: Tensor, sink: Tensor, given: Tensor) -> Tensor:
        scores = torch.cat([q @ k.mT, sink.expand(2, 3, 6, 1)], -1)
        return (scores.softmax(-1)[..., :-1] + given) @ v

    check(attend, *operands(6, 7, 7), torch.randn(3, 1, 1), torch.randn(6, 7))


def test_a_given_matrix_beside_a_row_without_a_key() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, given: Tensor) -> Tensor:
        return ((q @ k.mT).masked_fill(mask, -math.inf).softmax(-1) + given) @ v

    mask = torch.zeros(6, 7, dtype=torch.bool)
    mask[2], mask[3, 4:] = True, True
    inputs = [*operands(6, 7, 7), mask, torch.randn(6, 7)]
    assert [row.status for row in rows(attend, *inputs)] == ["rewritten"]
    torch._dynamo.reset()
    assert relative_error(rewritten(attend)(*inputs), attend(*inputs)) <= 1e-5


def given_per_query(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    first, second = (q @ k.mT).softmax(-1).unbind(1)
    return (first - second + q[:, 0, :, :, :1]) @ v


def given_before_an_einsum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = (q[:, 0] @ k[:, 0].mT).softmax(-1) + k[:, 0, :, :6, :7].mean((0, 1))
    return torch.einsum("bhls,bhsd->bhld", weights, v)


def given_by_the_weights(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """What is added is computed from the weights, which must exist for it."""
    weights = (q[:, 0] @ k[:, 0].mT).softmax(-1)
    return (weights + weights.square()) @ v


def factor_per_key(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    first, second = (q @ k.mT).softmax(-1).unbind(1)
    return (first - k[:, 0, :, :, 0].unsqueeze(-2) * second) @ v


def slices_of_the_keys(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = (q @ k.mT).softmax(-1)[:, 0]
    return (weights[..., :3] - weights[..., 3:6]) @ v[:, :, :3]


def unequal_slices(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = (q @ k.mT).softmax(-1)[:, 0]
    return (weights[:, :1] - weights[:, 1:]) @ v[:, :2]


def some_of_the_slices(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = (q @ k.mT).softmax(-1).transpose(1, 2)
    return (weights[:, 0] - weights[:, 1]) @ v[:, :1]


def dropped_as_one(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    first, second = (q @ k.mT).softmax(-1).unbind(1)
    return F.dropout(first - second, 1.0) @ v


def something_added(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    first, second = (q @ k.mT).softmax(-1).unbind(1)
    return (first - second + 0.5) @ v


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (slices_of_the_keys, "not known to be all equal slices"),
        (unequal_slices, "not known to be all equal slices"),
        (some_of_the_slices, "not known to be all equal slices"),
        (factor_per_key, "not known to be all equal slices"),
        (dropped_as_one, "between softmax and"),
        (something_added, "between softmax and"),
        (given_per_query, "between softmax and"),
        (given_before_an_einsum, "added up before an einsum"),
        (given_by_the_weights, "read more than once"),
    ],
)
def test_sums_that_stay(function: Attend, reason: str) -> None:
    check_kept(function, *halves(), reason=reason)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sums_in_half_precision_stay(dtype: torch.dtype) -> None:
    inputs = [value.to(dtype) for value in (*halves(), torch.tensor(0.5))]
    check_kept(difference, *inputs, reason="added up in half precision")


def test_parts_in_half_precision() -> None:
    inputs = [value.to(torch.bfloat16) for value in operands(*PARTS)]
    assert [row.status for row in rows(parts, *inputs)] == ["rewritten"]
    torch._dynamo.reset()
    truth = parts(*(value.double() for value in inputs))
    own, new = (relative_error(each(*inputs), truth) for each in (parts, rewritten(parts)))
    assert new <= 2 * own + 2**-8


# What the changes leave behind.


def test_checkpoints_are_not_mixed() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, more_v: Tensor) -> Tensor:
        weights = (q @ k.mT).softmax(-1)
        first = checkpoint(lambda w, v: w[..., :7] @ v, weights, v, use_reentrant=False)
        result: Tensor = first + weights[..., 7:] @ more_v
        return result

    inputs = [value.requires_grad_() for value in operands(6, 11, 7, 4)]
    (row,) = rows(attend, *inputs)
    assert row.status == "kept"
    assert "a checkpoint changes between them" in row.reason


def test_grad_mode_is_not_mixed() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, more_v: Tensor) -> Tensor:
        weights = (q @ k.mT).softmax(-1)
        with torch.no_grad():
            first = weights[..., :7] @ v
        return first + weights[..., 7:] @ more_v

    (row,) = rows(attend, *operands(6, 11, 7, 4))
    assert row.status == "kept"
    assert "grad mode" in row.reason


def test_what_lies_between_may_have_no_gradient() -> None:
    """A part of the weights, of the value, or a concatenation that the graph has."""

    def weights(q: Tensor, k: Tensor, v: Tensor, more_v: Tensor) -> Tensor:
        weights = (q @ k.mT).softmax(-1)
        with torch.no_grad():
            first = weights[..., :7]
        return first @ v + weights[..., 7:] @ more_v

    def value(q: Tensor, k: Tensor, v: Tensor, more_v: Tensor) -> Tensor:
        weights = (q @ k.mT).softmax(-1)
        whole = torch.cat([v, more_v], 2)
        with torch.no_grad():
            first = whole[:, :, :7]
        return weights[..., :7] @ first + weights[..., 7:] @ whole[:, :, 7:]

    def concatenation(q: Tensor, k: Tensor, v: Tensor, more_v: Tensor) -> tuple[Tensor, Tensor]:
        weights = (q @ k.mT).softmax(-1)
        with torch.no_grad():
            cache = torch.cat([v, more_v], 2)
        return weights[..., :7] @ v + weights[..., 7:] @ more_v, cache * 1

    for function in (weights, value, concatenation):
        inputs = operands(6, 11, 7, 4)

        def first_result(*inputs: Tensor, function: Callable[..., object] = function) -> Tensor:
            result = function(*inputs)
            first: Tensor = result[0] if isinstance(result, tuple) else result  # type: ignore[assignment]
            return first

        torch._dynamo.reset()
        assert relative_error(gradients(rewritten(first_result), inputs), gradients(first_result, inputs)) <= 1e-4


def test_a_sum_within_the_sum_that_scales() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, more_v: Tensor) -> Tensor:
        weights = (q @ k.mT).softmax(-1)
        whole = weights[..., :7] @ v + weights[..., 7:] @ more_v
        other = torch.add(weights[..., :7] @ v, weights[..., 7:] @ more_v, alpha=0.5)
        return whole + other

    inputs = operands(6, 11, 7, 4)
    assert relative_error(rewritten(attend)(*inputs), attend(*inputs)) <= 1e-5


def test_the_form_of_the_source_is_put_back() -> None:
    """Where no kernel takes the attention, while it takes another one of the graph."""

    def attend(
        q: Tensor, k: Tensor, v: Tensor, more_k: Tensor, more_v: Tensor, half: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        scores = torch.cat([q @ k.mT, q @ more_k.mT], -1)
        weights = (scores + half @ scores).softmax(-1)
        first = weights[..., :7] @ v + weights[..., 7:] @ more_v
        second = ((q @ k.mT).sin().softmax(-1) - (q @ k.mT).cos().softmax(-1)) @ v
        return first, second, (q @ k.mT).softmax(-1) @ v

    inputs = [*operands(*PARTS), torch.randn(6, 6)]
    with collect_reports() as graphs:
        results = rewritten(attend)(*inputs)
    assert sorted(row.status for graph in graphs for row in graph.sites) == ["kept", "kept", "kept", "rewritten"]
    first, second, third = attend(*inputs)
    assert torch.equal(results[0], first)
    assert torch.equal(results[1], second)
    assert relative_error(results[2], third) <= 1e-5


@pytest.mark.parametrize("function", [parts, difference])
def test_verification(function: Attend) -> None:
    """A sum of parts is compared with the source's, a sum of attentions at the outputs of the graph."""
    inputs = operands(*PARTS) if function is parts else [*halves(), torch.tensor(0.5)]
    with collect_reports() as graphs:
        rewritten(function, verify=True)(*inputs)
    (graph,) = graphs
    assert [row.status for row in graph.sites] == ["rewritten"]
    assert any("verif" in note for note in graph.notes)
    assert not any("failed" in note for note in graph.notes), graph.notes


def test_the_view_of_the_changed_graph_knows_that_gradients_follow() -> None:
    """In a region no input says so."""
    captured: list[fx.GraphModule] = []

    def backend(gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        captured.append(capture(gm, example_inputs).gm)
        return gm.forward

    with torch.no_grad():
        torch.compile(parts, backend=backend)(*operands(*PARTS))
    (gm,) = captured
    before = str(gm.graph)
    run = Rewriting(gm, Policy(), as_requested, Steps(), has_gradients=True)
    view = run.view
    run.regroup_products()
    assert str(gm.graph) != before and run.view is not view
    assert run.view.has_gradients


@pytest.mark.parametrize("combined", [lambda w: w * w, lambda w: w / w])
def test_a_product_of_weights_is_no_sum_of_them(combined: Callable[[Tensor], Tensor]) -> None:
    """Of a single key weights are the same for all keys, as a factor is."""

    def function(q: Tensor, k: Tensor, v: Tensor, given: Tensor) -> Tensor:
        return (combined((q @ k.mT).softmax(-1)) + given) @ v

    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 4, length, 8, generator=generator) for length in (6, 1, 1))
    inputs = (q, k, v, torch.randn(2, 4, 6, 1, generator=generator))
    assert relative_error(rewritten(function)(*inputs), function(*inputs)) <= 1e-5


def _lowered(scores: Tensor, keep: Tensor) -> Tensor:
    return torch.where(keep, scores, scores - 1e9)


def _raised(scores: Tensor, keep: Tensor) -> Tensor:
    return torch.where(keep, 2.0 + scores, scores)


def _two_sums(scores: Tensor, keep: Tensor) -> Tensor:
    return torch.where(keep, scores + 0.5, scores - torch.linspace(-1.0, 1.0, 7, dtype=scores.dtype))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("step", [_lowered, _raised, _two_sums])
def test_scores_or_a_sum_with_them(step: Callable[..., Tensor], dtype: torch.dtype) -> None:
    """Also in a row that is lowered as a whole: its scores are left in float64, and it is NaN in float16."""
    keep = torch.rand(6, 7, generator=torch.Generator().manual_seed(3)) > 0.4
    keep[2] = False

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return step(q @ k.mT, keep).softmax(-1) @ v

    inputs = [each.to(dtype) for each in operands(6, 7, 7)]
    limit = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}[dtype]
    with torch.no_grad():
        assert [row.status for row in rows(attend, *inputs)] == ["rewritten"]
        torch._dynamo.reset()
        torch.testing.assert_close(rewritten(attend)(*inputs), attend(*inputs), rtol=0, atol=limit, equal_nan=True)


def test_a_number_beyond_the_range_is_filled_in_as_infinity() -> None:
    """``full`` raises for it on a GPU, where the sum is minus infinity."""
    inputs = [each.half() for each in operands(6, 7, 7)]
    with torch.no_grad(), collect_reports() as graphs:
        rewritten(lambda q, k, v, keep: _lowered(q @ k.mT, keep).softmax(-1) @ v)(*inputs, torch.ones(6, 7) > 0)
    assert "aten.full.default([], -inf" in graphs[0].after_code and "1000000000" not in graphs[0].after_code


@pytest.mark.parametrize("step", [_lowered, _raised, _two_sums])
def test_gradients_of_scores_or_a_sum_with_them(step: Callable[..., Tensor]) -> None:
    keep = torch.rand(6, 7, generator=torch.Generator().manual_seed(3)) > 0.4
    keep[:, 0] = True

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return step(q @ k.mT, keep).softmax(-1) @ v

    check(attend, *operands(6, 7, 7))


def test_a_number_that_half_precision_rounds_stays_in_its_sum() -> None:
    """bfloat16 adds 10000 to a score before it rounds; as a mask's entry it would be 9984."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.mT
        return torch.where(torch.ones(6, 7).tril() > 0, scores, scores - 10000.0).softmax(-1) @ v

    inputs = [each.bfloat16() for each in operands(6, 7, 7)]
    with torch.no_grad():
        assert [row.status for row in rows(attend, *inputs)] == ["kept"]


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int64, torch.bool])
def test_sums_that_are_no_scores_stay(dtype: torch.dtype) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
        return (q @ k.mT).softmax(-1) @ v, torch.where(other != 0, other + 1, other)

    q, k, v = operands(6, 7, 7)
    other = torch.arange(4).to(dtype)
    result, chosen = rewritten(attend)(q, k, v, other)
    expected, kept = attend(q, k, v, other)
    assert relative_error(result, expected) <= 1e-5 and torch.equal(chosen, kept)
