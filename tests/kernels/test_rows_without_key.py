"""Rows whose keys are all masked: what kernels give them, and their gradients, by the formula in float64.

Each form is one way to write a mask, with numbers that the scores are lost in or not, in rows of each kind: with keys,
without, and without any but for one of two masks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from attnrewrite.numerics.judge import disagreements
from attnrewrite.report.rows import SiteReport
from tests.support.helpers import relative_error, rewritten, rows
from tests.support.reference import Reference, wide

Attend = Callable[..., Tensor]

NAMES = ("output", "query", "key", "value", "bias")


@dataclass(frozen=True)
class Masks:
    """``by_key`` and ``by_pair`` are boolean, true to keep; ``queries`` are those that count; ``number`` masks.

    Each of the first two is false in whole rows, and in some rows both together.
    """

    by_key: Tensor
    by_pair: Tensor
    queries: Tensor
    number: float

    def added(self, keep: Tensor, dtype: torch.dtype) -> Tensor:
        return torch.where(keep, 0.0, self.number).to(dtype)


def added(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, m: Masks) -> Tensor:
    return (q @ k.mT * 0.35 + m.added(m.by_key, q.dtype)).softmax(-1) @ v


def added_beside_bias(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, m: Masks) -> Tensor:
    return (q @ k.mT * 0.35 + bias + m.added(m.by_key, q.dtype)).softmax(-1) @ v


def added_twice(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, m: Masks) -> Tensor:
    return (q @ k.mT * 0.35 + m.added(m.by_key, q.dtype) + m.added(m.by_pair, q.dtype)).softmax(-1) @ v


def added_twice_then_scaled(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, m: Masks) -> Tensor:
    return ((q @ k.mT + m.added(m.by_key, q.dtype) + m.added(m.by_pair, q.dtype)) * 0.35).softmax(-1) @ v


def upcast(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, m: Masks) -> Tensor:
    dtype = torch.promote_types(q.dtype, torch.float32)
    return ((q @ k.mT * 0.35).to(dtype) + m.added(m.by_pair, dtype)).softmax(-1).to(q.dtype) @ v


def rounded_after(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, m: Masks) -> Tensor:
    dtype = torch.promote_types(q.dtype, torch.float32)
    return ((q @ k.mT * 0.35).to(dtype) + m.added(m.by_key, q.dtype)).to(q.dtype).softmax(-1) @ v


def filled(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, m: Masks) -> Tensor:
    return (q @ k.mT * 0.35).masked_fill(~m.by_pair, m.number).softmax(-1) @ v


def filled_in_float32(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, m: Masks) -> Tensor:
    """As GPT-Neo does it: two lowest numbers, of two dtypes, are told apart."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    scores = (q.to(dtype) * 0.35 @ k.to(dtype).mT).masked_fill(~m.by_pair, torch.finfo(torch.float32).min)
    return (scores + m.added(m.by_key, q.dtype)).softmax(-1).to(q.dtype) @ v


def zeroed_by_the_mask(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, m: Masks) -> Tensor:
    return (q @ k.mT * 0.35 + m.added(m.by_key, q.dtype)).softmax(-1).masked_fill(~m.by_key, 0.0) @ v


def multiplied_by_the_mask(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, m: Masks) -> Tensor:
    return (q @ k.mT * 0.35 + m.added(m.by_key, q.dtype)).softmax(-1) * m.by_key.to(q.dtype) @ v


def zeroed_rows(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, m: Masks) -> Tensor:
    weights = (q @ k.mT * 0.35 + bias + m.added(m.by_pair, q.dtype)).softmax(-1)
    return weights.masked_fill(~m.by_pair.any(-1, keepdim=True), 0.0) @ v


def zeroed_queries(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, m: Masks) -> Tensor:
    return (q @ k.mT * 0.35 + m.added(m.by_key, q.dtype)).softmax(-1).masked_fill(~m.queries, 0.0) @ v


def nan_replaced(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, m: Masks) -> Tensor:
    return (q @ k.mT * 0.35 + m.added(m.by_key, q.dtype)).softmax(-1).nan_to_num() @ v


def empty_rows_zeroed(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, m: Masks) -> Tensor:
    scores = q @ k.mT * 0.35 + bias + m.added(m.by_pair, q.dtype)
    return torch.where((scores == -math.inf).all(-1, keepdim=True), 0.0, scores.softmax(-1)) @ v


def less_its_maximum(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, m: Masks) -> Tensor:
    scores = q @ k.mT * 0.35 + m.added(m.by_pair, q.dtype)
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    return weights / weights.sum(-1, keepdim=True) @ v


def no_maximum(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, m: Masks) -> Tensor:
    weights = (q @ k.mT * 0.35 + m.added(m.by_key, q.dtype)).exp()
    return weights / weights.sum(-1, keepdim=True) @ v


def less_logsumexp(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, m: Masks) -> Tensor:
    scores = q @ k.mT * 0.35 + m.added(m.by_key, q.dtype)
    return (scores - scores.logsumexp(-1, keepdim=True)).exp() @ v


def soft_capped(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, m: Masks) -> Tensor:
    return (4 * torch.tanh(q @ k.mT * 0.35 / 4) + m.added(m.by_pair, q.dtype)).softmax(-1) @ v


FORMS: tuple[Attend, ...] = (
    added,
    added_beside_bias,
    added_twice,
    added_twice_then_scaled,
    upcast,
    rounded_after,
    filled,
    filled_in_float32,
    zeroed_by_the_mask,
    multiplied_by_the_mask,
    zeroed_rows,
    zeroed_queries,
    nan_replaced,
    empty_rows_zeroed,
    less_its_maximum,
    no_maximum,
    less_logsumexp,
    soft_capped,
)

KEPT_IN_TRAINING = (less_logsumexp,)
"""A finite number leaves of the logsumexp, and with it of the gradients, what rounding leaves."""


def numbers(dtype: torch.dtype) -> Iterator[float]:
    """Numbers that mask in a dtype: with and without digits of a score left, and none at all."""
    yield torch.finfo(torch.float32 if dtype is torch.float64 else dtype).min
    yield -math.inf
    yield -1e4
    if dtype is not torch.float16:
        yield -1e9
        yield -1e18


def operands(dtype: torch.dtype, device: str, lengths: tuple[int, int], heads: tuple[int, int]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    (queries, keys), (query_heads, key_heads) = lengths, heads
    shapes = ((3, query_heads, queries, 64), (3, key_heads, keys, 64), (3, key_heads, keys, 64), (query_heads, 1, keys))
    return [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]


def masks(number: float, device: str, lengths: tuple[int, int]) -> Masks:
    generator = torch.Generator().manual_seed(4)
    queries, keys = lengths
    by_key = torch.rand(3, 1, 1, keys, generator=generator) > 0.5
    by_pair = torch.rand(3, 1, queries, keys, generator=generator) > 0.5
    by_key[0] = False
    by_pair[1, :, : queries // 2] = False
    # What the one mask keeps the other does not.
    by_key[2] = torch.arange(keys) >= keys // 2
    by_pair[2] = torch.arange(keys) < keys // 2
    counted = torch.rand(3, 1, queries, 1, generator=generator) > 0.3
    return Masks(by_key.to(device), by_pair.to(device), counted.to(device), number)


def results(attend: Attend, inputs: list[Tensor], m: Masks, training: bool) -> list[Tensor]:
    """The output, and the gradients of query, key, value and bias."""
    with torch.set_grad_enabled(training):
        output = attend(*inputs, m)
    if not training:
        return [output]
    weights = torch.linspace(-1, 1, output.numel(), device=output.device).view(output.shape).to(output.dtype)
    given = torch.autograd.grad((output * weights).sum(), inputs, allow_unused=True)
    found = (torch.zeros_like(x) if g is None else g for x, g in zip(inputs, given, strict=True))
    return [output.detach(), *found]


def truth_of(attend: Attend, inputs: list[Tensor], m: Masks, training: bool) -> list[Tensor]:
    with Reference():
        given = Reference.given(inputs)
        return [wide(value) for value in results(attend, given, m, training)]


def wrong(
    attend: Attend, inputs: list[Tensor], m: Masks, training: bool, roundings: float = 4.0, **options: Any
) -> str:
    """What is wrong with the rewritten function, in words; empty if nothing is."""
    leaves = [value.clone().requires_grad_(training) for value in inputs]
    torch._dynamo.reset()
    new = results(rewritten(attend, **options), leaves, m, training)
    own = results(attend, leaves, m, training)
    truth = truth_of(attend, leaves, m, training)
    names, beside = NAMES[: len(new)], float(training)
    return disagreements(new, own, truth, inputs[0].dtype, beside=beside, roundings=roundings, names=names)


def status(attend: Attend, inputs: list[Tensor], m: Masks, training: bool) -> SiteReport:
    *leaves, bias = (value.clone().requires_grad_(training) for value in inputs)
    leaves.append(torch.nn.Parameter(bias))
    with torch.set_grad_enabled(training):
        (row,) = rows(attend, *leaves, m)
    return row


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("attend", FORMS, ids=lambda form: form.__name__)
def test_on_the_cpu(attend: Attend, dtype: torch.dtype, training: bool) -> None:
    lengths = (6, 9)
    inputs = operands(dtype, "cpu", lengths, (4, 4))
    for number in numbers(dtype):
        if number == -1e4 and dtype is torch.float32 and attend in (added_beside_bias, added_twice_then_scaled):
            continue  # Which digits of a score are left depends on the order in which three numbers are added.
        if number > -math.inf and not training and number > torch.finfo(dtype).min:
            continue  # As in training.
        m = masks(number, "cpu", lengths)
        assert wrong(attend, inputs, m, training) == "", number


@pytest.mark.parametrize(
    ("dtype", "inner"), [(torch.float32, "eager"), (torch.bfloat16, "eager"), (torch.bfloat16, "inductor")], ids=str
)
@pytest.mark.parametrize("attend", [added_twice, filled_in_float32, soft_capped], ids=lambda form: form.__name__)
def test_flex_on_the_cpu(attend: Attend, dtype: torch.dtype, inner: str) -> None:
    lengths = (6, 9)
    inputs = operands(dtype, "cpu", lengths, (4, 4))
    for number in (torch.finfo(dtype).min, -math.inf):
        m = masks(number, "cpu", lengths)
        assert wrong(attend, inputs, m, training=False, kernels="flex", inner=inner) == "", number


@pytest.mark.parametrize("attend", FORMS, ids=lambda form: form.__name__)
def test_they_are_taken_in_inference(attend: Attend) -> None:
    lengths = (6, 9)
    inputs = operands(torch.bfloat16, "cpu", lengths, (4, 4))
    for number in (torch.finfo(torch.bfloat16).min, -math.inf):
        row = status(attend, inputs, masks(number, "cpu", lengths), training=False)
        assert row.status == "rewritten", row.reason


@pytest.mark.parametrize("attend", [form for form in FORMS if form not in KEPT_IN_TRAINING], ids=lambda f: f.__name__)
def test_a_mask_of_one_number_is_taken_in_training(attend: Attend) -> None:
    """But for what only FlexAttention computes, which has no backward pass on the CPU."""
    lengths = (6, 9)
    inputs = operands(torch.bfloat16, "cpu", lengths, (4, 4))
    row = status(attend, inputs, masks(torch.finfo(torch.bfloat16).min, "cpu", lengths), training=True)
    assert row.kernel == (None if attend in (soft_capped, filled_in_float32) else "native"), row.reason


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_mask_that_is_handed_over(dtype: torch.dtype, training: bool) -> None:
    """Nothing is known of its numbers. Compiled block by block, a model gets it so."""

    def given(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, mask: Tensor) -> Tensor:
        return (q @ k.mT * 0.35 + bias + mask).softmax(-1) @ v

    lengths = (6, 9)
    inputs = operands(dtype, "cpu", lengths, (4, 4))
    for number in numbers(dtype):
        m = masks(number, "cpu", lengths)
        for keep in (m.by_key, m.by_pair, m.by_key & m.by_pair):
            mask = m.added(keep, dtype)
            # Some of the keys of a row without any are masked by infinity.
            mask[:, :, ::2, ::3] = mask[:, :, ::2, ::3].masked_fill(mask[:, :, ::2, ::3] < 0, -math.inf)
            assert wrong(given, inputs, mask, training) == "", number  # type: ignore[arg-type]
            assert status(given, inputs, mask, training).kernel == "native"  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", [(3, 1, 1, 1), (3, 1, 6, 1), (1, 1, 1, 1)], ids=str)
def test_weights_zeroed_by_a_mask_without_keys(shape: tuple[int, ...]) -> None:
    def zeroed(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
        scores = q @ k.mT * 0.25 + torch.where(keep, 0.0, torch.finfo(q.dtype).min).to(q.dtype)
        return scores.softmax(-1).masked_fill(~keep, 0.0) @ v

    q, k, v, _ = operands(torch.float16, "cpu", (6, 9), (4, 4))
    keep = torch.zeros(shape, dtype=torch.bool)
    keep[..., : shape[2] // 2, :] = True
    assert relative_error(rewritten(zeroed)(q, k, v, keep), zeroed(q, k, v, keep)) <= 4e-3


def test_the_gradient_of_an_absorbed_row_stays_in_range() -> None:
    """The key's is a sum over all rows; that of the loss may be scaled up."""

    def absorbed(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
        mask = torch.where(keep, 0.0, torch.finfo(torch.float32).min)
        return ((q @ k.mT).float() * 0.125 + mask).softmax(-1).to(v.dtype) @ v

    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, length, 64, generator=generator) for length in (512, 64, 64))
    q, k, v = (part.half().requires_grad_() for part in (q + 1, k, v))
    scaled = (torch.randn(1, 2, 512, 64, generator=generator).half() + 1) * 100
    keep = torch.zeros(1, 1, 1, 64, dtype=torch.bool)
    own = torch.autograd.grad(absorbed(q, k, v, keep), (q, k, v), scaled)
    new = torch.autograd.grad(rewritten(absorbed)(q, k, v, keep), (q, k, v), scaled)
    for one, other in zip(new, own, strict=True):
        assert (one - other).abs().max() <= 4e-3 * other.abs().max()


@pytest.mark.parametrize("attend", [added, added_twice, zeroed_rows, added_twice_then_scaled], ids=lambda f: f.__name__)
def test_symbolic_lengths(attend: Attend) -> None:
    """The same graphs for two lengths, trained through AOTAutograd."""
    for dtype in (torch.float32, torch.bfloat16):
        number = torch.finfo(dtype).min

        def of_tensors(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, by_key: Tensor, by_pair: Tensor) -> Tensor:
            return attend(q, k, v, bias, Masks(by_key, by_pair, by_pair, number))  # noqa: B023

        torch._dynamo.reset()
        graphs = CompileCounterWithBackend("aot_eager")
        compiled = rewritten(of_tensors, graphs, dynamic=True)
        counts = []
        for lengths in ((6, 9), (11, 7)):
            m = masks(number, "cpu", lengths)
            leaves = [value.requires_grad_() for value in operands(dtype, "cpu", lengths, (4, 4))]
            own = results(attend, leaves, m, True)
            new = results(lambda *inputs: compiled(*inputs[:4], m.by_key, m.by_pair), leaves, m, True)  # noqa: B023
            truth = truth_of(attend, leaves, m, True)
            assert disagreements(new, own, truth, dtype, beside=1.0, names=NAMES) == ""
            counts.append(graphs.frame_count)
        assert counts[0] == counts[1] > 0


@pytest.mark.parametrize("scale", [1.0, 0.5, 2.0])
@pytest.mark.parametrize("number", [-65504.0, torch.finfo(torch.float32).min])
def test_scores_of_half_precision_that_are_filled_in_float32(number: float, scale: float) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, m: Masks) -> Tensor:
        scores = (q @ k.mT * 0.35).float().masked_fill(~m.by_pair, m.number) * scale
        return scores.softmax(-1).to(q.dtype) @ v

    lengths = (6, 9)
    inputs = operands(torch.float16, "cpu", lengths, (4, 4))
    for training in (False, True):
        assert wrong(attend, inputs, masks(number, "cpu", lengths), training) == ""


def test_queries_that_share_their_keys() -> None:
    """The key's gradient is a sum over the queries of its group."""

    def grouped(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, m: Masks) -> Tensor:
        k, v = (part.repeat_interleave(2, 1) for part in (k, v))
        return (q @ k.mT * 0.35 + m.added(m.by_key, q.dtype)).softmax(-1).masked_fill(~m.queries, 0.0) @ v

    lengths = (6, 9)
    for dtype in (torch.float32, torch.bfloat16):
        inputs = operands(dtype, "cpu", lengths, (4, 2))
        for number in (torch.finfo(dtype).min, -math.inf):
            assert wrong(grouped, inputs, masks(number, "cpu", lengths), True) == ""


GPU_KERNELS: dict[str, tuple[Attend, ...]] = {
    "auto": FORMS,
    "_native_efficient": FORMS,
    "flex": (added, added_twice, upcast, filled_in_float32, zeroed_rows, soft_capped),
}


@pytest.mark.gpu
@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("kernel", "attend"),
    [
        pytest.param(kernel, form, id=f"{kernel}-{form.__name__}")
        for kernel, forms in GPU_KERNELS.items()
        for form in forms
    ],
)
def test_on_a_gpu(kernel: str, attend: Attend, dtype: torch.dtype, training: bool) -> None:
    """The kernel, or what serves in its place where it says that it does not take the site."""
    lengths = (72, 80)
    inputs = operands(dtype, "cuda", lengths, (4, 4))
    inner = "inductor" if kernel == "flex" else "eager"
    for number in numbers(dtype):
        if dtype is torch.float32 and (number == -1e4 or (number == -1e9 and attend is added_twice_then_scaled)):
            continue  # The order of summation decides which digits of a score are left (beside -1e9, of one above 32).
        m = masks(number, "cuda", lengths)
        assert wrong(attend, inputs, m, training, 16.0, kernels=kernel, inner=inner) == "", number
