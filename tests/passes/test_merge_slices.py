"""Slices of one attention become one call where that is proved, and stay what they are where it is not."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from attnrewrite.backend import collect_reports
from tests.support.helpers import compile_count, gradients, relative_error, rewritten, rows

pytestmark = pytest.mark.drawn

Attend = Callable[..., Tensor]


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float = 0.25, mask: Tensor | None = None) -> Tensor:
    scores = q @ k.transpose(-2, -1) * scale
    if mask is not None:
        scores = scores + mask
    return scores.softmax(-1) @ v


def operands(*batch: int, queries: int = 10, keys: int = 7) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return tuple(torch.randn(*batch, length, 8, generator=generator) for length in (queries, keys, keys))  # type: ignore[return-value]


def check(function: Attend, *inputs: Tensor, slices: int, dynamic: bool | None = None) -> None:
    """One site, merged from so many slices; values, strides and gradients are the source's."""
    check_values(function, *inputs, slices=slices, dynamic=dynamic)
    torch._dynamo.reset()
    compiled = rewritten(function, "aot_eager", dynamic=dynamic)
    assert relative_error(gradients(compiled, inputs), gradients(function, inputs)) <= 1e-4


def check_values(function: Attend, *inputs: Tensor, slices: int, dynamic: bool | None = None) -> None:
    torch._dynamo.reset()
    with collect_reports() as graphs:
        actual = rewritten(function, dynamic=dynamic)(*inputs)
    found = [(row.status, row.reason, row.slices) for graph in graphs for row in graph.sites]
    assert found == [("rewritten", "", f"merged from {slices} slices")]
    expected = function(*inputs)
    assert relative_error(actual, expected) <= 1e-5
    assert actual.stride() == expected.stride()


def check_kept(function: Attend, *inputs: Tensor, slices: int, reason: str) -> None:
    """So many sites, each rewritten by itself, which say why they were not merged."""
    found = rows(function, *inputs)
    assert [(row.status, row.reason) for row in found] == [("rewritten", "")] * slices
    assert [row.slices for row in found if reason not in row.slices] == []
    torch._dynamo.reset()
    assert relative_error(rewritten(function)(*inputs), function(*inputs)) <= 1e-5
    torch._dynamo.reset()
    compiled = rewritten(function, "aot_eager")
    assert relative_error(gradients(compiled, inputs), gradients(function, inputs)) <= 1e-4


# What is merged.


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("empty", [torch.zeros, torch.empty], ids=["zeros", "empty"])
def test_written_into_a_buffer(size: int, empty: Callable[..., Tensor], dynamic: bool) -> None:
    def sliced(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        result = empty(q.shape, dtype=q.dtype)
        for start in range(0, q.shape[0], size):
            result[start : start + size] = attend(
                q[start : start + size], k[start : start + size], v[start : start + size]
            )
        return result

    check(sliced, *operands(6), slices=-(-6 // size), dynamic=dynamic)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_memory_order_of_the_buffer(dynamic: bool) -> None:
    def sliced(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        result = torch.zeros_like(q)
        for start in range(0, q.shape[0], 3):
            own = slice(start, start + 3)
            result[own] = attend(q[own], k[own], v[own])
        return result

    q, k, v = operands(6)
    check_values(sliced, q.transpose(0, 1).contiguous().transpose(0, 1), k, v, slices=2, dynamic=dynamic)


def test_in_another_order() -> None:
    """The order of writing does not matter where each part is written once."""

    def sliced(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        result = torch.empty_like(q)
        for start in (4, 0, 2):
            result[start : start + 2] = attend(q[start : start + 2], k[start : start + 2], v[start : start + 2])
        return result

    check(sliced, *operands(6), slices=3)


def test_scaled_and_masked_slice_by_slice() -> None:
    """What is computed entry by entry of each slice is computed of the whole."""

    def sliced(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        parts = []
        for start in range(0, 10, 4):
            own = slice(start, start + 4)
            added = (1.0 - mask[:, None, own].float()) * -1e4
            parts.append(attend(q[:, :, own] * 0.5, k, v, 1.0, added))
        return torch.cat(parts, dim=2)

    mask = (torch.rand(2, 10, 7, generator=torch.Generator().manual_seed(0)) < 0.7).float()
    check(sliced, *operands(2, 3), mask, slices=3)


@pytest.mark.parametrize("grouped", [False, True], ids=["heads", "groups"])
def test_keys_and_values_computed_slice_by_slice(grouped: bool) -> None:
    def sliced(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if grouped:
            k, v = (x.repeat_interleave(2, 1) for x in (k, v))
        heads = (attend(q[:, i] * 0.5, k[:, i].sigmoid() * 0.5, v[:, i] * 2) for i in range(4))
        return torch.stack(list(heads), 1)

    q, k, v = operands(2, 4)
    check(sliced, q, *(x[:, :2] if grouped else x for x in (k, v)), slices=4)


def test_causal_slices_of_queries() -> None:
    """Positions that are counted for each slice are positions of the whole, and the mask is proved of it."""

    def sliced(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        parts = []
        for start in range(0, 10, 5):
            own = torch.arange(start, start + 5)
            future = torch.arange(10) > own[:, None]
            scores = q[:, start : start + 5] @ k.mT * 0.25
            parts.append(scores.masked_fill(future, float("-inf")).softmax(-1) @ v)
        return torch.cat(parts, dim=1)

    inputs = operands(3, keys=10)
    check(sliced, *inputs, slices=2)
    torch._dynamo.reset()
    (row,) = rows(sliced, *inputs)
    assert row.mask == "causal"


def test_batches_heads_and_queries_at_once() -> None:
    def sliced(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        result = q.new_zeros(q.shape)
        for b in range(2):
            for heads in (slice(0, 1), slice(1, 3)):
                for start in (0, 6):
                    own = q[b, heads, start : start + 6]
                    result[b, heads, start : start + 6] = attend(own, k[b, heads], v[b, heads])
        return result

    check(sliced, *operands(2, 3), slices=8)


def test_stacked_within_a_concatenation() -> None:
    def sliced(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        halves = []
        for half in (slice(0, 5), slice(5, 10)):
            halves.append(torch.stack([attend(q[b, :, half], k[b], v[b]) for b in range(2)]))
        return torch.cat(halves, dim=2)

    check(sliced, *operands(2, 3), slices=4)


def test_query_after_query() -> None:
    def sliced(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.cat([attend(q[:, i : i + 1], k, v) for i in range(4)], dim=1)

    check(sliced, *operands(3, queries=4), slices=4)


def test_dropout_keeps_its_probability() -> None:
    def sliced(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.cat([F.dropout((a @ k.mT).softmax(-1), 0.5) @ v for a in q.chunk(2, dim=1)], dim=1)

    q, k, v = operands(3)
    (row,) = rows(sliced, q, k, v)
    assert (row.dropout, row.slices) == ("0.5", "merged from 2 slices")
    generous = [rewritten(sliced)(q, k, v) for _ in range(400)]
    expected = (q @ k.mT).softmax(-1) @ v
    assert relative_error(torch.stack(generous).mean(0), expected) < 0.2


def test_dropout_of_slices_of_the_value_is_their_own() -> None:
    """Each slice of the features has weights of its own; merged they would be the same for all."""

    def sliced(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.cat([F.dropout((q @ k.mT).softmax(-1), 0.5) @ part for part in v.chunk(2, dim=-1)], dim=-1)

    q, k, v = operands(3)
    v[..., 4:] = v[..., :4]
    reason = "slices are not merged: each slice of the value has its own dropout of the weights"
    assert [row.slices for row in rows(sliced, q, k, v)] == [reason] * 2
    first, second = rewritten(sliced)(q, k, v).chunk(2, dim=-1)
    assert not torch.equal(first, second)


def test_calls_with_causal_masks_by_batch() -> None:
    def sliced(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        parts = zip(q.chunk(2), k.chunk(2), v.chunk(2), strict=True)
        return torch.cat([F.scaled_dot_product_attention(*own, is_causal=True) for own in parts])

    check(sliced, *operands(4, 2), slices=2)


def test_symbolic_slice_sizes_need_no_more_compilations() -> None:
    def sliced(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        size = q.shape[1] // 3 + 1
        return torch.cat([attend(part, k, v) for part in torch.split(q, size, dim=1)], dim=1)

    calls = [operands(3, queries=queries) for queries in (10, 13, 19)]
    allowed = compile_count(sliced, calls, "aot_eager")
    torch._dynamo.reset()
    function = rewritten(sliced, "aot_eager", dynamic=True)
    with collect_reports() as graphs:
        for inputs in calls:
            assert relative_error(function(*inputs), sliced(*inputs)) <= 1e-5
    assert {row.slices for graph in graphs for row in graph.sites} == {"merged from 3 slices"}
    assert len(graphs) <= allowed


def test_two_layers_of_slices() -> None:
    def layers(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        for _ in range(2):
            q = torch.cat([attend(part, k, v) for part in q.chunk(2, dim=1)], dim=1)
        return q

    inputs = operands(3)
    assert [row.slices for row in rows(layers, *inputs)] == ["merged from 2 slices"] * 2
    assert relative_error(rewritten(layers)(*inputs), layers(*inputs)) <= 1e-5


@pytest.mark.parametrize("inner", ["inductor"])
def test_through_inductor(inner: str) -> None:
    def sliced(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        result = torch.zeros_like(q)
        for start in range(0, 6, 4):
            result[start : start + 4] = attend(q[start : start + 4], k[start : start + 4], v[start : start + 4])
        return result

    inputs = operands(6)
    actual = gradients(rewritten(sliced, inner), inputs)
    assert relative_error(actual, gradients(sliced, inputs)) <= 1e-4


def axes_and_partitions() -> st.SearchStrategy[dict[int, list[int]]]:
    """For some of batch, heads and queries the sizes of the slices; they add up to 2, 4 and 6."""

    def sizes(total: int) -> st.SearchStrategy[list[int]]:
        cuts = st.sets(st.integers(1, total - 1), min_size=1, max_size=min(2, total - 1)).map(sorted)
        return cuts.map(lambda at: [b - a for a, b in itertools.pairwise([0, *at, total])])

    return st.fixed_dictionaries({}, optional={0: sizes(2), 1: sizes(4), 2: sizes(6)}).filter(bool)


@settings(max_examples=12, deadline=None)
@given(axes_and_partitions(), st.booleans(), st.booleans(), st.randoms(use_true_random=False))
def test_any_partition_of_any_axes(parts: dict[int, list[int]], masked: bool, joined: bool, order: Any) -> None:
    spans = {axis: list(itertools.pairwise([0, *itertools.accumulate(sizes)])) for axis, sizes in parts.items()}
    boxes = [dict(zip(spans, choice, strict=True)) for choice in itertools.product(*spans.values())]
    joined = joined and len(spans) == 1
    if not joined:
        order.shuffle(boxes)

    def part(t: Tensor, box: dict[int, tuple[int, int]], axes: tuple[int, ...]) -> Tensor:
        for axis in axes:
            if axis in box:
                t = t.narrow(axis, box[axis][0], box[axis][1] - box[axis][0])
        return t

    def sliced(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        result = torch.zeros_like(q)
        results = []
        for box in boxes:
            own = part(mask, box, (0, 2)) if masked else None
            one = attend(part(q, box, (0, 1, 2)), part(k, box, (0, 1)), part(v, box, (0, 1)), 0.25, own)
            results.append(one)
            if not joined:
                index = tuple(slice(*box[axis]) if axis in box else slice(None) for axis in range(3))
                result[index] = one
        return torch.cat(results, dim=next(iter(spans))) if joined else result

    mask = torch.randn(2, 1, 6, 5, generator=torch.Generator().manual_seed(0))
    inputs = (*operands(2, 4, queries=6, keys=5), mask)
    check_values(sliced, *inputs, slices=len(boxes))


# The classes that slices are known from.


@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
@pytest.mark.parametrize("upcast", [False, True], ids=["as_is", "upcast"])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_sliced_processor_of_diffusers(size: int, upcast: bool, masked: bool) -> None:
    processors = pytest.importorskip("diffusers.models.attention_processor")
    torch.manual_seed(0)
    attention = processors.Attention(
        32,
        heads=4,
        dim_head=8,
        upcast_attention=upcast,
        upcast_softmax=upcast,
        processor=processors.SlicedAttnProcessor(size),
    )
    mask = torch.zeros(2, 1, 16).masked_fill(torch.rand(2, 1, 16) < 0.4, -10000.0) if masked else None
    # Gradients of the smallest number of slices; those of any number are compared above.
    compare = check if size == 3 else check_values
    compare(lambda x: attention(x, attention_mask=mask), torch.randn(2, 16, 32), slices=-(-8 // size))


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_sliced_processor_with_added_keys_of_diffusers(size: int, dynamic: bool) -> None:
    processors = pytest.importorskip("diffusers.models.attention_processor")
    torch.manual_seed(0)
    attention = processors.Attention(
        32,
        heads=4,
        dim_head=8,
        added_kv_proj_dim=32,
        norm_num_groups=4,
        residual_connection=True,
        bias=True,
        processor=processors.SlicedAttnAddedKVProcessor(size),
    )
    text = torch.randn(2, 7, 32)
    image = torch.randn(2, 32, 4, 4)
    check_values(
        lambda x: attention(x, encoder_hidden_states=text), image, slices=-(-8 // size), dynamic=dynamic or None
    )


def test_unet_of_diffusers_with_sliced_attention() -> None:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=8,
        norm_num_groups=8,
    ).eval()
    unet.set_attention_slice(3)

    def run(x: Tensor, text: Tensor) -> Tensor:
        sample: Tensor = unet(x, 3, encoder_hidden_states=text).sample
        return sample

    inputs = (torch.randn(2, 4, 8, 8), torch.randn(2, 5, 16))
    with torch.no_grad(), collect_reports() as graphs:
        actual = rewritten(run)(*inputs)
        expected = run(*inputs)
    found = [row for graph in graphs for row in graph.sites]
    assert found and all(row.status == "rewritten" and row.slices.startswith("merged from") for row in found)
    assert relative_error(actual, expected) <= 1e-5


# Slices that have a window of the keys each.


def in_windows(
    q: Tensor, k: Tensor, v: Tensor, chunk: int, width: int, within: int, masked: float = float("-inf")
) -> Tensor:
    """Chunks of queries with the keys up to ``width`` before and after, of which those up to ``within`` are kept."""
    parts = []
    length = q.shape[1]
    for start in range(0, length, chunk):
        stop = min(start + chunk, length)
        first, last = max(0, start - width), min(length, stop + width)
        own, near = torch.arange(start, stop), torch.arange(first, last)
        far = (own[:, None] - near[None, :]).abs() > within
        scores = (q[:, start:stop] @ k[:, first:last].mT * 0.25).masked_fill(far, masked)
        parts.append(scores.softmax(-1) @ v[:, first:last])
    return torch.cat(parts, dim=1)


def diffsynth_in_windows(q: Tensor, k: Tensor, v: Tensor, width: int) -> Tensor:
    """DiffSynth-Studio's sliding window: calls with a mask of its own each, written into a buffer."""
    result = torch.empty_like(q)
    length = q.shape[1]
    for start in range(0, length, width):
        stop = min(start + width, length)
        first, last = max(0, start - width), min(length, stop + width)
        far = (torch.arange(start, stop).unsqueeze(1) - torch.arange(first, last).unsqueeze(0)).abs() > width
        mask = torch.zeros(stop - start, last - first, dtype=q.dtype)
        mask.masked_fill_(far, torch.finfo(q.dtype).min)
        own, near, told = (part.unsqueeze(1) for part in (q[:, start:stop], k[:, first:last], v[:, first:last]))
        result[:, start:stop] = F.scaled_dot_product_attention(own, near, told, mask[None, None]).squeeze(1)
    return result


def without_gradients(function: Attend, *inputs: Tensor) -> list[Any]:
    """What became of it, where nothing is differentiated: on the CPU FlexAttention has no backward pass."""
    torch._dynamo.reset()
    with torch.no_grad(), collect_reports() as graphs:
        assert relative_error(rewritten(function)(*inputs), function(*inputs)) <= 1e-5
    return [row for graph in graphs for row in graph.sites]


@pytest.mark.parametrize("width", [3, 4, 5])
def test_windows_of_keys(width: int) -> None:
    inputs = operands(3, queries=12, keys=12)
    (row,) = without_gradients(lambda q, k, v: diffsynth_in_windows(q, k, v, width), *inputs)
    assert (row.kernel, row.slices) == ("flex", f"merged from {-(-12 // width)} slices")
    # As far as the window reaches, or less; -1e9 masks as well.
    (row,) = without_gradients(lambda q, k, v: in_windows(q, k, v, 4, 5, 3, -1e9), *inputs)
    assert (row.kernel, row.slices) == ("flex", "merged from 3 slices")


def test_windows_of_keys_where_no_kernel_leaves_out_what_is_masked() -> None:
    """The slices compute less than the whole would."""

    def windows(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return in_windows(q, k, v, 4, 3, 3)

    inputs = tuple(part.requires_grad_() for part in operands(3, queries=12, keys=12))
    found = rows(windows, *inputs)
    assert [(row.status, row.kernel) for row in found] == [("rewritten", "native")] * 3
    assert all(
        "native, _native_cudnn, _native_flash" in row.slices and "would compute all scores" in row.slices
        for row in found
    )
    torch._dynamo.reset()
    compiled = rewritten(windows, "aot_eager")
    assert relative_error(gradients(compiled, inputs), gradients(windows, inputs)) <= 1e-4


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda q, k, v: in_windows(q, k, v, 4, 2, 3), "no mask is proved to restrict its queries"),
        (lambda q, k, v: in_windows(q, k, v, 4, 3, 99), "no mask is proved to restrict its queries"),
        (lambda q, k, v: in_windows(q, k, v, 4, 3, 3, -1.0), "no mask is proved to restrict its queries"),
        (
            lambda q, k, v: torch.cat(
                [attend(q[:, i : i + 4], k[:, i : i + 4], v[:, i : i + 4]) for i in (0, 4, 8)], 1
            ),
            "",
        ),
        (
            lambda q, k, v: torch.cat([attend(q[:, i : i + 4], k[:, : i + 4], v[:, : i + 4]) for i in (0, 4, 8)], 1),
            "no mask is proved to restrict its queries",
        ),
        (
            lambda q, k, v: torch.cat(
                [attend(q[:, i : i + 4], k[:, i : i + 4], v[:, 8 - i : 12 - i]) for i in (0, 4, 8)], 1
            ),
            "",
        ),
    ],
    ids=["wider_mask", "no_mask", "no_masking_number", "blocks", "prefixes", "other_values"],
)
def test_windows_that_hold_less_than_the_mask_leaves(function: Attend, reason: str) -> None:
    inputs = operands(3, queries=12, keys=12)
    found = without_gradients(function, *inputs)
    assert [row.status for row in found] == ["rewritten"] * 3
    assert all(row.slices.startswith("slices are not merged") and reason in row.slices for row in found)


def test_windows_whose_masked_scores_are_filled_again() -> None:
    """In the whole that would open keys outside the windows."""

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        parts = []
        for start in (0, 4, 8):
            first, last = max(0, start - 3), min(12, start + 7)
            ahead = torch.arange(first, last) - torch.arange(start, start + 4)[:, None]
            scores = (q[:, start : start + 4] @ k[:, first:last].mT).masked_fill(ahead.abs() > 3, float("-inf"))
            parts.append(scores.masked_fill(ahead > 2, 0.0).softmax(-1) @ v[:, first:last])
        return torch.cat(parts, dim=1)

    found = without_gradients(function, *operands(3, queries=12, keys=12))
    assert len(found) == 3 and all("modified after masking" in row.slices for row in found)


def test_windows_whose_mask_is_broadcast_over_the_keys() -> None:
    """What is written for the whole has one column, and the masks of the slices have as many as there are keys."""

    def function(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
        parts = []
        for start, stop in ((0, 4), (4, 8), (8, 10)):
            mask = torch.zeros(stop - start, 7).masked_fill(~keep[start:stop, None], -1.5)
            parts.append(attend(q[:, start:stop], k, v, mask=mask))
        return torch.cat(parts, dim=1)

    keep = torch.arange(10) % 3 > 0
    found = without_gradients(function, *operands(3), keep)
    assert [row.status for row in found] == ["rewritten"] * len(found)


def test_windows_in_which_padding_may_leave_a_row_without_a_key() -> None:
    """Such a row is the mean of its window, not of all keys."""

    def padded(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
        parts = []
        for start in (0, 4, 8):
            first, last = max(0, start - 3), min(12, start + 7)
            far = (torch.arange(start, start + 4)[:, None] - torch.arange(first, last)).abs() > 3
            scores = (q[:, start : start + 4] @ k[:, first:last].mT).masked_fill(far, -1e9)
            scores = scores.masked_fill(~keep[:, None, first:last], -1e9)
            parts.append(scores.softmax(-1) @ v[:, first:last])
        return torch.cat(parts, dim=1)

    keep = torch.ones(3, 12, dtype=torch.bool)
    keep[1, 4:] = False
    found = without_gradients(padded, *operands(3, queries=12, keys=12), keep)
    assert len(found) == 3 and all("a query may attend none of them" in row.slices for row in found)


# What is not merged.


def test_buffer_of_the_caller() -> None:
    """Without gradients what is overwritten does not matter; the caller's tensor holds the result."""

    def sliced(q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> Tensor:
        for start in (0, 5):
            out[:, start : start + 5] = attend(q[:, start : start + 5], k, v)
        return out

    q, k, v = operands(3)
    given, expected = torch.zeros_like(q), torch.zeros_like(q)
    with collect_reports() as graphs:
        rewritten(sliced)(q, k, v, given)
    assert [row.slices for graph in graphs for row in graph.sites] == ["merged from 2 slices"]
    assert relative_error(given, sliced(q, k, v, expected)) <= 1e-5


def test_verified_like_any_other_site() -> None:
    def sliced(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        parts = zip(torch.split(q, 5, dim=1), torch.split(mask, 5, dim=1), strict=True)
        return torch.cat([attend(part * 2, k, v, 0.25, own * 3) for part, own in parts], dim=1)

    inputs = (*operands(3), torch.randn(3, 10, 7))
    with collect_reports() as graphs:
        actual = rewritten(sliced, verify=True, checks=True)(*inputs)
    assert relative_error(actual, sliced(*inputs)) <= 1e-5
    assert [note for graph in graphs for note in graph.notes if "verif" in note] != []


def test_gap_keeps_its_zeros() -> None:
    def sliced(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        result = torch.zeros_like(q)
        for start in (0, 4):
            result[start : start + 2] = attend(q[start : start + 2], k[start : start + 2], v[start : start + 2])
        return result

    check_kept(sliced, *operands(6), slices=2, reason="not proved to cover the whole result exactly once")


def test_overlap() -> None:
    def sliced(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        result = torch.zeros_like(q)
        for start in (0, 2):
            result[start : start + 4] = attend(q[start : start + 4], k[start : start + 4], v[start : start + 4])
        return result

    check_kept(sliced, *operands(6), slices=2, reason="slices overlap")


def test_overlap_in_a_concatenation() -> None:
    def sliced(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.cat([attend(q[:, 0:6], k, v), attend(q[:, 4:10], k, v)], dim=1)

    check_kept(sliced, *operands(3), slices=2, reason="the query and the result are not sliced alike")


def test_put_together_in_another_order() -> None:
    def sliced(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.cat([attend(part, k, v) for part in reversed(torch.split(q, 5, dim=1))], dim=1)

    check_kept(sliced, *operands(3), slices=2, reason="the query and the result are not sliced alike")


def test_another_scale_in_one_slice() -> None:
    def sliced(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.cat([attend(part, k, v, 0.25 + i) for i, part in enumerate(q.chunk(2, dim=1))], dim=1)

    check_kept(sliced, *operands(3), slices=2, reason="the slices differ in their scale")


def test_another_key_in_one_slice() -> None:
    def sliced(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        first, second = q.chunk(2, dim=1)
        return torch.cat([attend(first, k, v), attend(second, v, v)], dim=1)

    check_kept(sliced, *operands(3), slices=2, reason="the key of the slices is not known to be sliced from one tensor")


def test_keys_of_another_slice() -> None:
    def sliced(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        parts = [attend(q[i : i + 2], k[4 - i : 6 - i], v[i : i + 2]) for i in (0, 2, 4)]
        return torch.cat(parts)

    check_kept(sliced, *operands(6), slices=3, reason="the key and the result are not sliced alike")


def test_one_key_for_all_slices() -> None:
    """The first two batches' keys for every two batches: not a broadcast, so no operand lacks the axis."""

    def sliced(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.cat([attend(part, k[:2], v[:2]) for part in torch.split(q, 2)])

    check_kept(sliced, *operands(6), slices=3, reason="")


def test_shared_key_is_not_sliced() -> None:
    def sliced(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = k[:2], v[:2]
        return torch.cat([attend(part, k, v) for part in torch.split(q, 2)])

    check_kept(
        sliced,
        *operands(6),
        slices=3,
        reason="the slices share the key, which has the axis that the result is sliced along",
    )


def test_key_that_is_longer_than_the_whole() -> None:
    def sliced(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.cat([attend(q[i : i + 2], k[i : i + 2], v[i : i + 2]) for i in (0, 2)])

    q, k, v = operands(6)
    check_kept(sliced, q[:4].contiguous(), k, v, slices=2, reason="the slices do not cover all of the key")


def test_mask_of_another_slice() -> None:
    def sliced(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return torch.cat([attend(part, k, v, 0.25, mask[:, :5]) for part in torch.split(q, 5, dim=1)], dim=1)

    mask = torch.randn(3, 10, 7)
    check_kept(sliced, *operands(3), mask, slices=2, reason="mask")


def test_slice_that_is_read_by_itself() -> None:
    def sliced(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        first, second = (attend(part, k, v) for part in q.chunk(2, dim=1))
        return torch.cat([first, second], dim=1) * first.mean()

    check_kept(sliced, *operands(3), slices=2, reason="a slice is also used on its own (mean")


def test_buffer_that_is_read_on_the_way() -> None:
    def sliced(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        result = torch.zeros_like(q)
        result[:, :5] = attend(q[:, :5], k, v)
        half = result.sum()
        result[:, 5:] = attend(q[:, 5:], k, v)
        return result * half

    check_kept(sliced, *operands(3), slices=2, reason="a slice is also used on its own (sum")


def test_causal_calls_of_queries() -> None:
    """Each call counts from its own first query."""

    def sliced(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        parts = [F.scaled_dot_product_attention(part, k, v, is_causal=True) for part in q.chunk(2, dim=-2)]
        return torch.cat(parts, dim=-2)

    check_kept(sliced, *operands(2, 3), slices=2, reason="own first query")


def test_something_else_beside_slices() -> None:
    def sliced(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        first, second, last = torch.split(q, [4, 4, 2], dim=1)
        return torch.cat([attend(first, k, v), attend(second, k, v), last], dim=1)

    check_kept(sliced, *operands(3), slices=2, reason="something other than attention is concatenated with a slice")


def test_half_of_it_without_gradients() -> None:
    def sliced(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        first, second = q.chunk(2, dim=1)
        with torch.no_grad():
            one = attend(first, k, v)
        return torch.cat([one, attend(second, k, v)], dim=1)

    check_kept(sliced, *operands(3), slices=2, reason="slices are not merged")


def test_slices_taken_without_gradients() -> None:
    def sliced(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with torch.no_grad():
            parts = [(k[i : i + 3], v[i : i + 3]) for i in (0, 3)]
        return torch.cat([attend(q[i * 3 : i * 3 + 3], *own) for i, own in enumerate(parts)])

    found = rows(sliced, *operands(6))
    assert [row.slices for row in found] == [
        "slices are not merged: the key of the slices is computed under another grad mode or autocast"
    ] * 2


def test_checkpointed_slices() -> None:
    def sliced(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        parts = [checkpoint(attend, part, k, v, use_reentrant=False) for part in q.chunk(2, dim=1)]
        return torch.cat(parts, dim=1)

    inputs = [t.requires_grad_() for t in operands(3)]
    check_kept(sliced, *inputs, slices=2, reason="checkpointed separately")


def test_a_cache_that_is_empty() -> None:
    """transformers' DynamicCache begins as a tensor of no dimension but one, without entries."""

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (torch.cat([torch.empty(0), part], dim=-2) for part in (k, v))
        return attend(q, k, v)

    assert [(row.status, row.reason) for row in rows(function, *operands(2, 4))] == [("rewritten", "")]


def test_different_attentions_side_by_side_say_nothing() -> None:
    def two(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.cat([attend(q, k, v), attend(q * 2, v, k)], dim=1)

    assert [row.slices for row in rows(two, *operands(3))] == ["", ""]


def test_slices_stay_where_the_whole_is_not_taken() -> None:
    """Exponentials without a maximum, and a fill that underflows or not: the whole is kept, and so is each slice."""

    def exponentials(q: Tensor, k: Tensor, v: Tensor, drop: Tensor) -> Tensor:
        weights = (q @ k.transpose(-2, -1) * 0.25).masked_fill(drop, -90.0).exp()
        return weights / weights.sum(-1, keepdim=True) @ v

    def sliced(q: Tensor, k: Tensor, v: Tensor, drop: Tensor) -> Tensor:
        return torch.cat([exponentials(part, k, v, drop) for part in q.chunk(2, dim=1)], dim=1)

    inputs = [*operands(3), torch.randn(3, 1, 7) > 1]
    found = rows(sliced, *inputs)
    assert [row.status for row in found] == ["kept"] * 2
    assert all("no kernel takes the merged attention" in row.slices and "underflows" in row.reason for row in found)
    assert relative_error(rewritten(sliced)(*inputs), sliced(*inputs)) == 0
