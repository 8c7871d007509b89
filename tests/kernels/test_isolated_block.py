"""A block of positions isolated from each other: proved from the mask, and served without one."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import attnrewrite
from attnrewrite.backend import collect_reports
from tests.support.helpers import compile_count, gradients, relative_error, rewritten, rows


def with_block(q: Tensor, k: Tensor, v: Tensor, start: int, stop: int, value: float = 0.0) -> Tensor:
    mask = torch.zeros(q.shape[2], k.shape[2], dtype=q.dtype)
    mask[start:stop, start:stop] = -torch.inf
    mask[start:stop, start:stop].fill_diagonal_(value)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def isolated(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return with_block(q, k, v, 3, 9)


def operands(length: int = 14, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 3, length, 8, generator=generator).to(dtype) for _ in range(3)]


@pytest.mark.parametrize("start, stop", [(0, 9), (3, 9), (5, 14)])
def test_served_without_a_mask(start: int, stop: int) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return with_block(q, k, v, start, stop)

    with torch.no_grad(), collect_reports() as graphs:
        assert relative_error(rewritten(attend)(*operands()), attend(*operands())) <= 1e-6
    (row,) = graphs[0].sites
    assert (row.kernel, row.mask) == ("isolated_block", f"isolated from {start} to {stop}")
    assert "zeros" not in graphs[0].after_code


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(dtype: torch.dtype) -> None:
    inputs = operands(dtype=dtype)
    truth = isolated(*(part.double() for part in inputs))
    with torch.no_grad():
        result = rewritten(isolated)(*inputs)
    assert result.dtype is dtype
    assert relative_error(result, truth) <= 2 * relative_error(isolated(*inputs), truth) + torch.finfo(dtype).eps


def test_a_query_that_is_not_finite() -> None:
    """The unmasked call of the rows outside has few keys, where PyTorch's CPU kernel would give 0."""
    with torch.no_grad():
        for row in (1, 4):
            q, k, v = operands()
            q[:, :, row] = float("nan")
            result, expected = rewritten(isolated)(q, k, v), isolated(q, k, v)
            assert expected[:, :, row].isnan().all()
            assert relative_error(result, expected) <= 1e-6


def test_own_scores_far_above_and_below_the_others() -> None:
    q, k, v = operands()
    for factor in (200.0, -200.0):
        with torch.no_grad():
            assert relative_error(rewritten(isolated)(q * factor, k, v), isolated(q * factor, k, v)) <= 1e-6


def test_through_inductor() -> None:
    with torch.no_grad():
        assert relative_error(rewritten(isolated, "inductor")(*operands()), isolated(*operands())) <= 1e-6


def test_with_gradients_the_mask_stays() -> None:
    (row,) = rows(isolated, *(part.requires_grad_() for part in operands()))
    assert (row.kernel, row.mask) == ("native", "isolated from 3 to 9")
    actual, expected = gradients(rewritten(isolated, "aot_eager"), operands()), gradients(isolated, operands())
    assert relative_error(actual, expected) <= 1e-5


@pytest.mark.parametrize("length, start, stop", [(14, 3, 9), (390, 130, 256), (300, 129, 300)])
def test_flex_takes_it_by_position(length: int, start: int, stop: int) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return with_block(q, k, v, start, stop)

    with torch.no_grad(), attnrewrite.attention_backend("flex"), collect_reports() as graphs:
        assert relative_error(rewritten(attend)(*operands(length)), attend(*operands(length))) <= 1e-5
    assert [row.kernel for row in graphs[0].sites] == ["flex"]
    assert "zeros" not in graphs[0].after_code


def not_the_diagonal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The diagonal is shifted by one."""
    mask = torch.zeros(q.shape[2], k.shape[2])
    mask[2:9, 2:9] = -torch.inf
    mask[2:9, 2:9].diagonal(1).fill_(0)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def not_one_block(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Queries and keys of two blocks."""
    mask = torch.zeros(q.shape[2], k.shape[2])
    mask[2:9, 3:10] = -torch.inf
    mask.fill_diagonal_(0)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def no_mask_on_the_diagonal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return with_block(q, k, v, 3, 9, value=-1.0)


def given_besides(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Something of the data is added."""
    mask = torch.zeros(q.shape[2], k.shape[2])
    mask[2:9, 2:9] = -torch.inf
    mask[2:9, 2:9].fill_diagonal_(0)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask + q[0, 0, :, :1])


@pytest.mark.parametrize(
    "function", [not_the_diagonal, not_one_block, no_mask_on_the_diagonal, given_besides], ids=lambda f: f.__name__
)
def test_what_is_no_isolated_block(function: object) -> None:
    with torch.no_grad(), collect_reports() as graphs:
        result = rewritten(function)(*operands())  # type: ignore[arg-type]
    assert relative_error(result, function(*operands())) <= 1e-6  # type: ignore[operator]
    (row,) = graphs[0].sites
    assert row.kernel == "native" and not row.mask.startswith("isolated")


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_a_block_of_its_own_for_each_batch(dynamic: bool) -> None:
    """Texts of other lengths: the mask is one, and no block of positions."""

    def ragged(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        place = torch.arange(q.shape[2])
        patch = place >= torch.arange(q.shape[0])[:, None] + 2
        hidden = patch[:, :, None] & patch[:, None] & (place[:, None] != place)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=~hidden[:, None])

    with torch.no_grad(), collect_reports() as graphs:
        result = rewritten(ragged, dynamic=dynamic)(*operands())
    assert relative_error(result, ragged(*operands())) <= 1e-6
    (row,) = graphs[0].sites
    assert (row.kernel, row.mask) == ("native", "dense")


@pytest.mark.parametrize("kernel", ["auto", "flex"])
def test_frames_that_share_their_keys_are_not_folded(kernel: str) -> None:
    """The mask is written for each frame; positions within the block are those of one frame."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (t.view(2, 3, *t.shape[1:])[:, [0] * 3].flatten(0, 1) for t in (k, v))
        q, k, v = (t.view(*t.shape[:2], 2, 8).transpose(1, 2) for t in (q, k, v))
        mask = torch.zeros(6, 1, 14, 14)
        mask[..., :4, :4] = -torch.inf
        place = torch.arange(14)
        mask = mask.masked_fill(place[:, None] == place, 0.0)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(6, 14, 16, generator=generator) for _ in range(3)]
    with torch.no_grad(), collect_reports() as graphs:
        result = rewritten(attend, kernels=kernel)(*inputs)
    assert relative_error(result, attend(*inputs)) <= 1e-6
    (row,) = graphs[0].sites
    assert (row.status, row.mask, row.grouping) == ("rewritten", "isolated from 0 to 4", "3 query heads share a key")


# fill_diagonal_.


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
@pytest.mark.parametrize("shape", [(4, 7), (7, 4), (5, 5, 5), (5, 5)])
def test_a_filled_diagonal_is_captured_and_differentiated(inner: str, shape: tuple[int, ...]) -> None:
    """Without attention, too: plain AOTAutograd refuses the update of a view."""

    def filled(x: Tensor) -> tuple[Tensor, Tensor]:
        y = torch.zeros((8,) * len(shape)) + 1
        part = y[tuple(slice(size) for size in shape)]
        part += x
        result = part.fill_diagonal_(0.5)
        return y * 2, result + 1

    x = torch.randn(shape)
    assert relative_error(rewritten(filled, inner)(x), filled(x)) == 0
    assert relative_error(gradients(rewritten(filled, inner), [x]), gradients(filled, [x])) == 0


def test_no_compilation_more_with_dynamic_shapes() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = torch.zeros(q.shape[2], k.shape[2])
        mask[:-5, :-5] = -torch.inf
        mask[:-5, :-5].diagonal().fill_(0)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.5)

    calls = [operands(length) for length in (14, 19, 11)]
    allowed = compile_count(attend, calls, "aot_eager")
    torch._dynamo.reset()
    function = rewritten(attend, "aot_eager", dynamic=True)
    with torch.no_grad(), collect_reports() as graphs:
        for inputs in calls:
            assert relative_error(function(*inputs), attend(*inputs)) <= 1e-6
    assert len(graphs) <= allowed
    assert {row.kernel for graph in graphs for row in graph.sites} == {"isolated_block"}


def test_a_diagonal_that_wraps_is_left_as_it_is() -> None:
    def filled(x: Tensor) -> Tensor:
        return x.clone().fill_diagonal_(0.0, wrap=True)

    for shape in ((9, 3), (4, 3), (3, 9)):
        torch._dynamo.reset()
        x = torch.randn(shape)
        assert torch.equal(rewritten(filled)(x), filled(x))
