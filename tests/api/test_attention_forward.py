"""``attention_forward``: against the mathematics in float64, eagerly and inside compiled models."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from einops import rearrange
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention.flex_attention import create_block_mask

import attnrewrite
from attnrewrite import AttentionInputError, attention_backend, attention_forward
from attnrewrite.backend import collect_reports
from tests.support.helpers import gradients, relative_error, rewritten, rows

pytestmark = pytest.mark.drawn


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    scale: float | None = None,
    causal: bool = False,
    window: int | None = None,
    score: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """The sum over all keys, written out in float64; operands are (b, n, s, d)."""
    q, k, v = (part.double() for part in (q, k, v))
    repeats = q.shape[1] // k.shape[1]
    k, v = (torch.stack([part] * repeats, 2).flatten(1, 2) for part in (k, v))
    scores = torch.einsum("bnid,bnjd->bnij", q, k) * (scale if scale is not None else 1 / math.sqrt(q.shape[-1]))
    if score is not None:
        scores = score(scores)
    i, j = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])[None]
    keep = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool)
    if causal:
        keep = keep & (j <= i)
    if window is not None:
        keep = keep & ((i - j).abs() <= window)
    if mask is not None and mask.dtype is torch.bool:
        keep = keep & mask
    elif mask is not None:
        scores = scores + mask.double()
    weights = scores.masked_fill(~keep, -math.inf).exp()
    total = weights.sum(-1, keepdim=True)
    return torch.einsum("bnij,bnjd->bnid", weights / torch.where(total == 0, 1, total), v)


def operands(heads: int = 4, keys: int = 10, batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(batch, 4, 10, 16), torch.randn(batch, heads, keys, 16), torch.randn(batch, heads, keys, 16)


JOINED = ("b s (n d)", "b s (n d)", "b s (n d)", "b s (n d)")

MASKS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "none": ({}, {}),
    "causal": ({"is_causal": True}, {"causal": True}),
    "window": ({"window_size": 3}, {"window": 3}),
    "window of one": ({"window_size": 0}, {"window": 0}),
    "window beyond the length": ({"window_size": 12}, {"window": 12}),
    "causal window": ({"window_size": 3, "is_causal": True}, {"window": 3, "causal": True}),
    "scale": ({"scale": 0.7}, {"scale": 0.7}),
}


def random_masks() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    padding = torch.ones(2, 1, 1, 10, dtype=torch.bool)
    padding[1, ..., 7:] = False
    without_key = torch.rand(10, 10, generator=generator) > 0.4
    without_key[4] = False
    return {
        "padding": padding,
        "boolean": torch.rand(2, 4, 10, 10, generator=generator) > 0.4,
        "row without a key": without_key,
        "additive": torch.randn(1, 4, 10, 10, generator=generator),
        "query padding": padding.mT.clone(),
        "one row": torch.randn(10, generator=generator),
    }


@pytest.mark.parametrize("heads", [4, 2, 1])
@pytest.mark.parametrize("settings", MASKS)
def test_inside_a_graph(settings: str, heads: int) -> None:
    inputs = operands(heads)
    given, expected = MASKS[settings]

    def model(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention_forward(q, k, v, **given)

    (site,) = rows(model, *inputs)
    assert site.status == "rewritten"
    assert relative_error(rewritten(model)(*inputs), reference(*inputs, **expected)) <= 1e-5


@pytest.mark.parametrize("name", random_masks())
@pytest.mark.parametrize("settings", ["none", "causal", "window"])
def test_masks_are_combined(name: str, settings: str) -> None:
    inputs, mask = operands(2), random_masks()[name]
    given, expected = MASKS[settings]

    def model(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return attention_forward(q, k, v, attn_mask=mask, **given)

    (site,) = rows(model, *inputs, mask)
    assert site.status == "rewritten"
    assert relative_error(rewritten(model)(*inputs, mask), reference(*inputs, mask=mask, **expected)) <= 1e-5


PATTERNS = ["b n s d", "b s n d", "b s (n d)", "b (n s) d", "(b s) n d", "(b n) s d", "s b (d n)"]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_patterns(pattern: str) -> None:
    inputs = operands()
    dims = {"b": 2, "n": 4}
    given = [rearrange(part, f"b n s d -> {pattern}") for part in inputs]

    def model(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention_forward(q, k, v, pattern, pattern, pattern, pattern, dims, is_causal=True)

    (site,) = rows(model, *given)
    assert site.status == "rewritten"
    result = rearrange(rewritten(model)(*given), f"{pattern} -> b n s d", **dims)
    assert relative_error(result, reference(*inputs, causal=True)) <= 1e-5


def test_every_operand_has_a_pattern_of_its_own() -> None:
    q, k, v = operands(heads=2, keys=7)
    v = torch.randn(2, 2, 7, 24)
    result = attention_forward(
        rearrange(q, "b n s d -> b s (n d)"),
        rearrange(k, "b n s d -> b s n d"),
        v,
        q_pattern="b s (n d)",
        k_pattern="b s n d",
        out_pattern="s b (n d)",
        dims={"d": 16},
    )
    assert relative_error(rearrange(result, "s b (n d) -> b n s d", n=4), reference(q, k, v)) <= 1e-5


def test_fewer_key_heads_in_one_dimension() -> None:
    q, k, v = operands(heads=2)
    q, k, v = (rearrange(part, "b n s d -> b s (n d)") for part in (q, k, v))
    result = attention_forward(q, k, v, *JOINED, dims={"d": 16})
    q, k, v = (rearrange(part, "b s (n d) -> b n s d", d=16) for part in (q, k, v))
    assert relative_error(rearrange(result, "b s (n d) -> b n s d", d=16), reference(q, k, v)) <= 1e-5


def distance(score: Tensor, b: Tensor, n: Tensor, s: Tensor, t: Tensor) -> Tensor:
    return score - 0.1 * (s - t).abs() * (n + 1)


def distance_of_all(scores: Tensor) -> Tensor:
    i, j = torch.arange(scores.shape[2])[:, None], torch.arange(scores.shape[3])
    return scores - 0.1 * (i - j).abs() * torch.arange(1, scores.shape[1] + 1)[:, None, None]


@pytest.mark.parametrize("settings", ["none", "causal", "window", "scale"])
def test_score_mod_inside_a_graph(settings: str) -> None:
    inputs = operands(2)
    given, expected = MASKS[settings]

    def model(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention_forward(q, k, v, score_mod=distance, **given)

    (site,) = rows(model, *inputs)
    assert site.status == "rewritten", site.reason
    assert relative_error(rewritten(model)(*inputs), reference(*inputs, score=distance_of_all, **expected)) <= 1e-5


def test_score_mod_that_no_bias_says() -> None:
    inputs = operands()

    def cap(score: Tensor, *place: Tensor) -> Tensor:
        return 2 * torch.tanh(score / 2)

    expected = reference(*inputs, score=lambda scores: 2 * torch.tanh(scores / 2))
    assert relative_error(attention_forward(*inputs, score_mod=cap), expected) <= 1e-5
    found = gradients(lambda q, k, v: attention_forward(q, k, v, score_mod=cap), inputs)
    wanted = gradients(lambda q, k, v: reference(q, k, v, score=lambda s: 2 * torch.tanh(s / 2)), inputs)
    assert relative_error(found, wanted) <= 1e-4


# Called eagerly.


@pytest.mark.parametrize("settings", ["none", "causal", "window", "scale"])
def test_called_eagerly(settings: str) -> None:
    given, expected = MASKS[settings]
    inputs = operands(2)
    with collect_reports() as graphs:
        result = attention_forward(*inputs, **given)
    assert [site.status for graph in graphs for site in graph.sites] == ["rewritten"]
    assert relative_error(result, reference(*inputs, **expected)) <= 1e-5
    longer = operands(2, batch=3)
    assert relative_error(attention_forward(*longer, **given), reference(*longer, **expected)) <= 1e-5


def test_gradients() -> None:
    inputs = (*operands(2), random_masks()["additive"])

    def call(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return attention_forward(q, k, v, attn_mask=mask, window_size=3)

    wanted = gradients(lambda q, k, v, mask: reference(q, k, v, mask=mask, window=3), inputs)
    assert relative_error(gradients(call, inputs), wanted) <= 1e-4
    assert relative_error(gradients(rewritten(call), inputs), wanted) <= 1e-4


def test_a_call_is_compiled_once() -> None:
    inputs = operands()
    attention_forward(*inputs)
    with collect_reports() as graphs:
        attention_forward(*inputs)
    assert graphs == []


def test_many_kinds_of_calls_are_no_recompilations_of_one() -> None:
    """Dynamo gives up on a function after eight."""
    for window in range(10):
        inputs = operands()
        expected = reference(*inputs, window=window)
        with torch.no_grad():
            assert relative_error(attention_forward(*inputs, window_size=window), expected) <= 1e-5


def kernels_of(call: Callable[[], Any]) -> list[tuple[str | None, str]]:
    with collect_reports() as graphs:
        call()
    return [(site.kernel, site.requested) for graph in graphs for site in graph.sites]


def test_the_kernel_that_is_asked_for_serves_eager_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = operands()
    assert kernels_of(lambda: attention_forward(*inputs)) == [("native", "")]
    with attention_backend("_native_math"):
        found = kernels_of(lambda: attention_forward(*inputs))
    assert found == [("_native_math", "_native_math by attention_backend")]
    monkeypatch.setenv("ATTNREWRITE_KERNELS", "_native_math")
    assert kernels_of(lambda: attention_forward(*inputs)) == [("_native_math", "_native_math by ATTNREWRITE_KERNELS")]
    monkeypatch.delenv("ATTNREWRITE_KERNELS")
    monkeypatch.setenv("DIFFSYNTH_ATTENTION_IMPLEMENTATION", "torch")
    asked = "native by DIFFSYNTH_ATTENTION_IMPLEMENTATION=torch"
    assert kernels_of(lambda: attention_forward(*inputs)) == [("native", asked)]


def test_compatibility_mode_is_stronger_than_everything_else() -> None:
    inputs = operands()
    asked = ("native", "native by compatibility_mode=True")
    with attention_backend("_native_math", strict=True):
        assert kernels_of(lambda: attention_forward(*inputs, compatibility_mode=True)) == [asked]

    def model(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention_forward(q, k, v, compatibility_mode=True, window_size=2) + attention_forward(q, k, v)

    with attention_backend("_native_math"):
        sites = rows(model, *inputs, kernel_rules={"*": "_native_math"})
        assert [(site.kernel, site.requested) for site in sites] == [
            asked,
            ("_native_math", "_native_math by the rule for '*'"),
        ]
        result = rewritten(model)(*inputs)
    assert relative_error(result, reference(*inputs, window=2) + reference(*inputs)) <= 1e-5


# Inside models.


class Block(nn.Module):
    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.qkv, self.out, self.settings = nn.Linear(32, 96), nn.Linear(32, 32), settings

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        mixed: Tensor = self.out(attention_forward(q, k, v, *JOINED, dims={"n": 4}, **self.settings))
        return mixed


@pytest.mark.parametrize("dynamic", [None, True])
def test_a_window_is_proved(dynamic: bool | None) -> None:
    model, x = nn.Sequential(Block(window_size=3), Block(window_size=3, is_causal=True)), torch.randn(2, 10, 32)
    report = attnrewrite.explain(model, x, dynamic=dynamic)
    assert report.graph_breaks == [] and len(report.graphs) == 1
    first, second = report.graphs[0].sites
    assert first.mask == "causal, shifted by 3 + sliding window of 4"
    assert second.mask == "causal + sliding window of 4"
    for site, path in ((first, "0"), (second, "1")):
        assert site.status == "rewritten" and site.proof == ("every row keeps a key: key position = query position",)
        assert site.location is not None and site.location.module == path
        assert "attention_forward(q, k, v, *" in site.location.code


@pytest.mark.parametrize("inner", ["eager", "inductor"])
def test_a_model_without_graph_breaks(inner: str) -> None:
    model, x = Block(window_size=3), torch.randn(2, 10, 32)
    compiled = torch.compile(model, backend="attnrewrite", fullgraph=True, options={"inner_backend": inner})
    q, k, v = (rearrange(part, "b s (n d) -> b n s d", n=4) for part in model.qkv(x).chunk(3, -1))
    expected = model.out(rearrange(reference(q, k, v, window=3).float(), "b n s d -> b s (n d)"))
    assert relative_error(compiled(x), expected) <= 1e-5
    compiled(x).sum().backward()
    found = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    model.zero_grad()
    q, k, v = (rearrange(part, "b s (n d) -> b n s d", n=4) for part in model.qkv(x).chunk(3, -1))
    model.out(rearrange(reference(q, k, v, window=3).float(), "b n s d -> b s (n d)")).sum().backward()
    wanted = [parameter.grad for parameter in model.parameters()]
    for one, other in zip(found, wanted, strict=True):
        # The key's bias has no gradient but rounding.
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_every_size_may_be_a_symbol() -> None:
    def model(x: Tensor) -> Tensor:
        dims = {"d": 16, "n": x.shape[2] // 16, "s": x.shape[1]}
        return attention_forward(x, x, x, *JOINED, dims=dims, scale=x.shape[2] ** -0.5, window_size=2)

    compiled = torch.compile(
        model, backend="attnrewrite", dynamic=True, fullgraph=True, options={"inner_backend": "eager"}
    )
    for length, heads in ((10, 4), (13, 3)):
        x = torch.randn(2, length, heads * 16)
        q = rearrange(x, "b s (n d) -> b n s d", d=16)
        expected = rearrange(reference(q, q, q, scale=x.shape[2] ** -0.5, window=2), "b n s d -> b s (n d)")
        assert relative_error(compiled(x), expected) <= 1e-5


def test_under_autocast() -> None:
    q, k, v = operands()
    mask = torch.zeros(10, 10, dtype=torch.bfloat16)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        result = attention_forward(q, k.bfloat16(), v.bfloat16(), attn_mask=mask)
        with pytest.raises(AttentionInputError, match="which autocast does not change for FlexAttention"):
            attention_forward(q, k.bfloat16(), v.bfloat16(), use_flex=True)
    assert result.dtype is torch.bfloat16
    assert relative_error(result, reference(q, k, v)) <= 2e-2


def test_without_a_key_and_without_data() -> None:
    q, _, _ = operands()
    nothing = torch.zeros(2, 4, 0, 16)
    found: list[Tensor] = []
    assert kernels_of(lambda: found.append(attention_forward(q, nothing, nothing, compatibility_mode=True))) == [
        (None, "native by compatibility_mode=True")
    ]
    assert torch.equal(found[0], torch.zeros_like(q))
    empty = q.to("meta")
    assert attention_forward(empty, empty, empty, window_size=2).shape == (2, 4, 10, 16)


def test_another_backend_takes_it_as_plain_mathematics() -> None:
    inputs = operands(2)
    compiled = torch.compile(
        lambda q, k, v: attention_forward(q, k, v, window_size=4), backend="aot_eager", fullgraph=True
    )
    assert relative_error(compiled(*inputs), reference(*inputs, window=4)) <= 1e-5


# FlexAttention.


@pytest.mark.parametrize("settings", ["none", "causal", "window", "scale"])
def test_flex_inside_a_graph(settings: str) -> None:
    inputs = operands(2)
    given, expected = MASKS[settings]

    def model(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention_forward(q, k, v, use_flex=True, **given) + attention_forward(q, k, v)

    with torch.no_grad(), collect_reports() as graphs:
        result = rewritten(model)(*inputs)
    (graph,) = graphs
    # The graph is captured with flex_attention in it, and its other attention is found.
    assert graph.captured and [site.status for site in graph.sites] == ["rewritten"]
    assert relative_error(result, reference(*inputs, **expected) + reference(*inputs)) <= 1e-5


@pytest.mark.parametrize("name", random_masks())
def test_flex_with_masks_and_score_mod(name: str) -> None:
    inputs, mask = operands(2), random_masks()[name]
    with torch.no_grad():
        result = rewritten(
            lambda q, k, v, mask: attention_forward(
                q, k, v, attn_mask=mask, use_flex=True, score_mod=distance, is_causal=True
            )
        )(*inputs, mask)
    assert relative_error(result, reference(*inputs, mask=mask, causal=True, score=distance_of_all)) <= 1e-5


def test_flex_with_a_block_mask_inside_a_graph() -> None:
    q, k, v = (torch.randn(1, 2, 256, 16) for _ in range(3))
    blocks = create_block_mask(lambda b, n, s, t: (s >= t) & (s - t < 40), None, None, 256, 256, device="cpu")

    def model(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention_forward(q, k, v, attn_mask=blocks, use_flex=True) + attention_forward(q, k, v)

    with torch.no_grad(), collect_reports() as graphs:
        result = rewritten(model)(q, k, v)
    assert [(graph.captured, graph.reason) for graph in graphs] == [(True, "")]
    i = torch.arange(256)
    kept = (i[:, None] >= i) & (i[:, None] - i < 40)
    assert relative_error(result, reference(q, k, v, mask=kept) + reference(q, k, v)) <= 1e-5


def test_flex_called_eagerly_with_a_block_mask() -> None:
    q, k, v = (torch.randn(1, 2, 256, 16) for _ in range(3))
    blocks = create_block_mask(lambda b, n, s, t: s >= t, None, None, 256, 256, device="cpu")
    with torch.no_grad():
        result = attention_forward(q, k, v, attn_mask=blocks, use_flex=True, compatibility_mode=True)
        both = attention_forward(q, k, v, attn_mask=blocks, use_flex=True, window_size=5, scale=0.3)
    assert relative_error(result, reference(q, k, v, causal=True)) <= 1e-5
    assert relative_error(both, reference(q, k, v, causal=True, window=5, scale=0.3)) <= 1e-5


# DiffSynth-Studio's results.


def windowed_in_chunks(q: Tensor, k: Tensor, v: Tensor, width: int) -> Tensor:
    """Chunks of queries, each with the keys up to a width before and after, masked by the lowest number."""
    chunks = []
    for start in range(0, q.shape[2], width):
        stop = min(start + width, q.shape[2])
        first, last = max(start - width, 0), min(stop + width, q.shape[2])
        apart = (torch.arange(start, stop)[:, None] - torch.arange(first, last)).abs()
        bias = torch.where(apart > width, torch.finfo(q.dtype).min, 0.0).to(q.dtype)
        scores = q[:, :, start:stop] @ k[:, :, first:last].mT / math.sqrt(q.shape[-1]) + bias
        chunks.append(scores.softmax(-1) @ v[:, :, first:last])
    return torch.cat(chunks, 2)


@pytest.mark.parametrize("width", [1, 3, 4, 5, 10, 11, 30])
def test_the_window_is_that_of_diffsynth(width: int) -> None:
    """The length, 10, is not always a multiple of the window."""
    inputs = operands()
    result = rewritten(lambda q, k, v: attention_forward(q, k, v, window_size=width))(*inputs)
    assert relative_error(result, windowed_in_chunks(*inputs, width)) <= 1e-5


@pytest.mark.parametrize("mask", [None, "boolean", "additive"])
def test_without_a_window_it_is_that_of_diffsynth(mask: str | None) -> None:
    q, k, v = operands(heads=2)
    given = random_masks()[mask] if mask else None
    q_in, k_in, v_in = (rearrange(part, "b n s d -> b s (n d)") for part in (q, k, v))
    result = attention_forward(
        q_in, k_in, v_in, *JOINED, dims={"d": 16}, attn_mask=given, scale=0.5, is_causal=mask is None
    )
    # As scaled_dot_product_attention does it, with key heads repeated for their neighbors.
    k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
    expected = nn.functional.scaled_dot_product_attention(q, k, v, given, scale=0.5, is_causal=mask is None)
    assert relative_error(result, rearrange(expected, "b n s d -> b s (n d)")) <= 1e-5


# What does not fit.

_Q = torch.zeros(2, 4, 10, 16)
BAD: list[tuple[dict[str, Any], str]] = [
    (
        {"q_pattern": "b s h d"},
        "q_pattern takes an einops pattern of b, n, s and d, each once, such as 'b n s d' or 'b s (n d)'; got "
        "'b s h d'",
    ),
    ({"out_pattern": "b s (n d"}, "out_pattern takes an einops pattern"),
    ({"v_pattern": "b s n d d"}, "v_pattern takes an einops pattern"),
    ({"k_pattern": 3}, "k_pattern takes an einops pattern"),
    ({"dims": {"h": 8}}, "dims takes sizes of b, n, s and d, such as {'n': 8}; got 'h'"),
    ({"dims": 8}, "dims takes a dictionary such as {'n': 8}, not int"),
    ({"q_pattern": "b s (n d)"}, "q has 4 dimensions and q_pattern='b s (n d)' names 3; correct the pattern"),
    (
        {"q": torch.zeros(2, 10, 64), "q_pattern": "b s (n d)"},
        "q_pattern='b s (n d)' leaves the sizes of n and d open; give one of them in dims, such as dims={'n': 8}",
    ),
    (
        {"q": torch.zeros(2, 10, 64), "q_pattern": "b s (n d)", "dims": {"n": 7}},
        "dimension 2 of q is 64, which is not 'n d' of q_pattern='b s (n d)' with dims={'n': 7}; correct dims or the "
        "pattern",
    ),
    ({"k": "key"}, "k is str; give a tensor"),
    ({"k": _Q.to("meta")}, "k is on meta and q on cpu; move them to one device"),
    ({"v": _Q.double()}, "v is torch.float64 and q torch.float32; convert them to one dtype"),
    (
        dict.fromkeys("qkv", _Q.int()),
        "q, k and v are torch.int32; convert them to a floating-point dtype",
    ),
    ({"k": _Q[:1]}, "k has batch size 1 and q 2; expand the smaller, or correct k_pattern"),
    ({"k": _Q[:, :2]}, "k has 2 heads and v 4; give them the same number"),
    ({"k": _Q[:, :3], "v": _Q[:, :3]}, "q has 4 heads, which is no multiple of the 3 heads of k and v"),
    ({"v": _Q[:, :, :5]}, "k has 10 positions and v 5; give them the same number"),
    ({"k": _Q[..., :8]}, "q has head size 16 and k 8; give them the same"),
    ({"scale": torch.ones(())}, "scale takes a number or None, not Tensor; multiply a tensor into q"),
    ({"window_size": -1}, "window_size takes how many positions a query sees on either side, 0 or more, or None"),
    ({"window_size": 2.5}, "window_size takes how many positions"),
    ({"window_size": (2, 0)}, "window_size takes how many positions"),
    (
        {"window_size": 2, "k": _Q[:, :, :5], "v": _Q[:, :, :5]},
        "window_size is for self-attention, and q has 10 positions and k 5; give the window as attn_mask",
    ),
    (
        {"compatibility_mode": True, "score_mod": distance},
        "compatibility_mode asks for scaled_dot_product_attention, which takes no score_mod; leave out one of them",
    ),
    (
        {"attn_mask": create_block_mask(lambda b, n, s, t: s >= t, None, None, 10, 10, device="cpu")},
        "attn_mask is a BlockMask, which only FlexAttention takes; set use_flex=True",
    ),
    (
        {
            "attn_mask": create_block_mask(lambda b, n, s, t: s >= t, None, None, 256, 256, device="cpu"),
            "use_flex": True,
        },
        "attn_mask is a BlockMask for (1, 1, 256, 256) and the scores are (2, 4, 10, 10); make it with "
        "create_block_mask for these sizes",
    ),
    ({"attn_mask": True}, "attn_mask takes a tensor, a BlockMask or None, not bool"),
    ({"attn_mask": torch.ones(10, 10, device="meta")}, "attn_mask is on meta and q on cpu; move them to one device"),
    ({"attn_mask": torch.ones(10, 10, dtype=torch.int64)}, "attn_mask is torch.int64; give a boolean one"),
    (
        {"attn_mask": torch.ones(2, 10)},
        "attn_mask has the shape (2, 10) and does not broadcast to (batch, heads, queries, keys), (2, 4, 10, 10); "
        "reshape it, for instance mask[:, None, None, :] for key padding",
    ),
    ({"use_flex": True, "q": _Q.double(), "k": _Q.double(), "v": _Q.double()}, "use_flex takes float32, float16 and"),
    (
        {"use_flex": True, "q": _Q.clone().requires_grad_()},
        "FlexAttention has no backward pass on the CPU; call it under torch.no_grad(), or leave out use_flex",
    ),
]


@pytest.mark.parametrize(("wrong", "message"), BAD, ids=lambda value: None)
def test_what_does_not_fit_is_said(wrong: dict[str, Any], message: str) -> None:
    given = {"q": _Q, "k": _Q, "v": _Q, **wrong}
    with pytest.raises(AttentionInputError) as error:
        attention_forward(**given)
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


def test_what_does_not_fit_is_said_in_a_graph() -> None:
    inputs = operands(heads=3)
    with pytest.raises(AttentionInputError, match="no multiple of the 3 heads"):
        rewritten(lambda q, k, v: attention_forward(q, k, v))(*inputs)
    compiled = torch.compile(lambda q, k, v: attention_forward(q, k, v), backend="attnrewrite", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="no multiple of the 3 heads"):
        compiled(*inputs)


def test_a_score_mod_for_each_call_is_refused_after_a_while() -> None:
    inputs = operands()
    with (
        torch.no_grad(),
        torch._dynamo.config.patch(recompile_limit=2),
        pytest.raises(AttentionInputError, match="define score_mod once, outside of the loop"),
    ):
        mods: list[Any] = [
            lambda score, b, n, s, t: score + s,
            lambda score, b, n, s, t: score - s,
            lambda score, b, n, s, t: score + t,
            lambda score, b, n, s, t: score - t,
        ]
        for score_mod in mods:
            attention_forward(*inputs, score_mod=score_mod)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1, 1, 1)], ids=str)
@pytest.mark.parametrize("boolean", [False, True])
def test_flex_takes_a_mask_of_one_entry(shape: tuple[int, ...], boolean: bool) -> None:
    q, k, v = operands()
    mask = torch.ones(shape, dtype=torch.bool) if boolean else torch.full(shape, 0.5)
    with torch.no_grad():
        actual = attention_forward(q, k, v, attn_mask=mask, use_flex=True)
        assert relative_error(actual, attention_forward(q, k, v, attn_mask=mask)) <= 1e-5


def test_an_eager_call_stands_where_the_user_wrote_it(caplog: pytest.LogCaptureFixture) -> None:
    q, k, v = (part.double() for part in operands(2))
    with torch.no_grad(), attention_backend("flex"), collect_reports() as graphs, caplog.at_level("WARNING"):
        attention_forward(q, k, v, scale=0.123)
    (row,) = [site for graph in graphs for site in graph.sites]
    assert row.location is not None and row.location.file == __file__
    assert row.location.code == "attention_forward(q, k, v, scale=0.123)"
    assert row.location.function == "test_an_eager_call_stands_where_the_user_wrote_it"
    (message,) = [record.message for record in caplog.records if "was requested by" in record.message]
    assert f"{__file__}:{row.location.line}" in message and "functional.py:" not in message.replace(__file__, "")


def test_eager_calls_under_transforms_and_modes() -> None:
    """They ask for the operations themselves: nothing is compiled, and Dynamo would find no frame or crash."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention_forward(q, k, v, is_causal=True)

    q, k, v = torch.randn(3, 2, 3, 12, 8, generator=torch.Generator().manual_seed(0)).unbind()
    expected = attend(q, k, v)
    with collect_reports() as reports:
        traced: Any = torch.jit.trace(attend, (q, k, v), check_trace=False)  # type: ignore[no-untyped-call]
        results = [traced(q, k, v), torch.vmap(lambda q, k, v: attend(q[None], k[None], v[None])[0])(q, k, v)]
        with FakeTensorMode() as mode:
            assert attend(mode.from_tensor(q), mode.from_tensor(k), mode.from_tensor(v)).shape == expected.shape
    assert not reports
    for result in results:
        assert relative_error(result, expected) <= 1e-5
