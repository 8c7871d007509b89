"""What kernels are known to do wrong, and that it does not happen here: on the GPU, where there is one."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.utils import counters
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention

from attnrewrite.kernels import kernel_named
from attnrewrite.kernels.cudnn_training import laid_out_like, plan_of_our_own, with_masked_keys
from attnrewrite.kernels.known_wrong import KNOWN_WRONG
from tests.support.helpers import gradients, relative_error, rewritten, rows

pytestmark = pytest.mark.drawn

aten = torch.ops.aten

BHSD, BSHD, SBHD = (0, 1, 2, 3), (0, 2, 1, 3), (2, 0, 1, 3)


def laid_out(part: Tensor, order: tuple[int, ...]) -> Tensor:
    return torch.empty_permuted(part.shape, order, dtype=part.dtype, device=part.device).copy_(part)


def test_each_entry_is_of_a_kernel_and_has_a_source() -> None:
    for entry in KNOWN_WRONG:
        assert kernel_named(entry.kernel).name == entry.kernel
        assert entry.source.startswith("https://")
        assert entry.meets is not None or entry.avoided


# The parts of the backward pass, on the CPU.


@pytest.mark.parametrize("order", [BHSD, BSHD, SBHD])
@pytest.mark.parametrize("of_query", [BHSD, BSHD, SBHD])
def test_a_gradient_is_laid_out_like_the_query(order: tuple[int, ...], of_query: tuple[int, ...]) -> None:
    query = laid_out(torch.randn(2, 3, 5, 16), of_query)
    part = laid_out(torch.randn(2, 3, 5, 8), order)
    found = laid_out_like(part, query)
    assert torch.equal(found, part)
    assert found.stride() == torch.empty_permuted(part.shape, of_query).stride()
    assert (found is part) == (order == of_query)


def test_expanded_gradients_and_slices_of_projections_become_dense() -> None:
    query = torch.randn(2, 5, 3, 3, 16)[:, :, 1].transpose(1, 2)
    found = laid_out_like(torch.ones(()).expand(2, 3, 5, 16), query)
    assert found.stride() == torch.empty_permuted((2, 3, 5, 16), BSHD).stride()


@pytest.mark.parametrize("expanded", [0, 1, 2])
def test_the_features_of_an_expanded_query_stay_last(expanded: int) -> None:
    """cuDNN refuses an output whose features do not lie side by side."""
    sizes = [2, 3, 5, 16]
    query = torch.randn([1 if dim == expanded else size for dim, size in enumerate(sizes)]).expand(sizes)
    found = laid_out_like(torch.randn(2, 3, 5, 8), query)
    assert found.stride(-1) == 1 and sorted(found.stride())[1] == 8


def test_a_gradient_that_begins_between_two_alignments_is_copied() -> None:
    part = torch.randn(2 * 3 * 5 * 16 + 1)[1:].view(2, 3, 5, 16)
    found = laid_out_like(part, torch.empty(2, 3, 5, 16))
    assert found.data_ptr() % 16 == 0 and torch.equal(found, part)


@pytest.mark.parametrize("p", [0.1, 0.5, 1e-3, 1.0])
def test_a_plan_of_our_own_has_other_bits_and_the_same_meaning(p: float) -> None:
    ours = plan_of_our_own(p)
    assert ours != p and math.isclose(ours, p, rel_tol=2e-7)
    assert torch.tensor(ours).item() == ours != torch.tensor(p).item()
    nothing = plan_of_our_own(0.0)
    assert nothing == 0.0 and math.copysign(1.0, nothing) == -1.0


@pytest.mark.parametrize("mask", [None, torch.randn(2, 1, 1, 7)])
def test_padded_keys_change_nothing(mask: Tensor | None) -> None:
    query, key, value = torch.randn(2, 3, 5, 8), torch.randn(2, 3, 7, 8), torch.randn(2, 3, 7, 8)
    padded_key, padded_value, padded_mask = with_masked_keys(key, value, mask, 4)
    assert padded_key.shape[2] == padded_value.shape[2] == padded_mask.shape[3] == 11
    expected = F.scaled_dot_product_attention(query, key, value, mask)
    actual = F.scaled_dot_product_attention(query, padded_key, padded_value, padded_mask)
    assert relative_error(actual, expected) <= 1e-6


# FlexAttention on a CPU.


@pytest.mark.parametrize("width", [8, 16])
@pytest.mark.parametrize("keys", [24, 40])
def test_what_lies_behind_the_keys_is_not_read(width: int, keys: int) -> None:
    generator = torch.Generator().manual_seed(0)
    memory = torch.randn(1, 1, 48, width, generator=generator)
    query, value = (torch.randn(1, 1, length, width, generator=generator) for length in (40, keys))
    key = memory[:, :, :keys]
    memory[:, :, keys:] = math.nan
    compiled = torch.compile(flex_attention)
    read = not torch.equal(compiled(query, key, value).isnan(), torch.zeros(1, 1, 40, width, dtype=torch.bool))
    # If this fails with AVX2, PyTorch has mended it, and the entry in KNOWN_WRONG should say since when.
    assert read == (torch.backends.cpu.get_cpu_capability() == "AVX2")

    score_mod = "def forward(self, score, batch, head, query, key): return score * 0.25"
    found = torch.ops.attnrewrite.flex_attention(query, key, value, [], score_mod)
    exact = ((query.double() @ key.double().mT) * 0.25).softmax(-1) @ value.double()
    assert relative_error(found, exact) <= 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=lambda dtype: str(dtype)[6:])
def test_clamped_scores_in_half_precision(dtype: torch.dtype) -> None:
    """Inductor's own FlexAttention is off by several times the result, at least with AVX-512."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 2, 64, 32, generator=generator).to(dtype) for _ in range(3))
    score_mod = "def forward(self, score, batch, head, query, key): return score.clamp(-1, 1)"
    found = torch.ops.attnrewrite.flex_attention(query, key, value, [], score_mod)
    exact = (query.double() @ key.double().mT).clamp(-1, 1).softmax(-1) @ value.double()
    assert found.dtype is dtype
    assert relative_error(found.double(), exact) <= 2 * torch.finfo(dtype).eps


# FlexAttention on a GPU; what is called in its place: tests/whole/test_gpu.py, a query of any memory order.


@pytest.mark.gpu
def test_short_queries_that_the_graph_computes_are_read_wrongly() -> None:
    generator = torch.Generator().manual_seed(0)
    operands = (torch.randn(2, length, 4, 32, generator=generator) for length in (12, 140, 140))
    query, key, value = (each.to("cuda", torch.bfloat16).transpose(1, 2) for each in operands)

    def attend(query: Tensor) -> Tensor:
        result: Tensor = flex_attention(query * 1.5, key, value)
        return result

    # If this fails, PyTorch has mended it, and the entry in KNOWN_WRONG should say since when.
    assert relative_error(torch.compile(attend)(query), attend(query)) > 0.1


# The graphs, without a GPU.


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_autograd_leaves_pytorchs_forward_pass_and_a_backward_pass_of_our_own(dropout: float) -> None:
    def both(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        output = torch.ops.attnrewrite.cudnn_attention(query, key, value, mask, dropout, False, None)
        return (output, *torch.autograd.grad(output.sum(), [query, key, value]))

    options: dict[str, Any] = {"device": "meta", "dtype": torch.float16}
    query = torch.empty(2, 100, 4, 64, **options).transpose(1, 2).requires_grad_()
    key, value = (torch.empty(2, 4, 77, 64, **options).requires_grad_() for _ in range(2))
    graph = make_fx(both, tracing_mode="fake")(query, key, value, torch.empty(2, 1, 1, 77, **options)).graph
    forward, backward = (
        graph.find_nodes(op="call_function", target=target)
        for target in (
            aten._scaled_dot_product_cudnn_attention.default,
            torch.ops.attnrewrite.cudnn_attention_backward.default,
        )
    )
    assert len(forward) == len(backward) == 1
    values = both(query, key, value, torch.empty(2, 1, 1, 77, **options))
    assert [value.stride() for value in values] == [part.stride() for part in (query, query, key, value)]


# On the GPU.


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ((q @ k.mT) * 0.125).softmax(-1) @ v


def heads_last(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attend(q, k, v).transpose(1, 2).reshape(q.shape[0], q.shape[2], -1)


def summed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attend(q, k, v).sum((0, 1, 3))


def operands(*shape: int, keys: int = 0, low: float = 0.0) -> list[Tensor]:
    """Random ones; with ``low``, each score is about that number."""
    generator = torch.Generator().manual_seed(0)
    shapes = [shape, *([(*shape[:2], keys or shape[2], shape[3])] * 2)]
    query, key, value = (torch.randn(one, generator=generator) for one in shapes)
    if low:
        query, key = query * 0.1, key * 0.1
        query[..., 0], key[..., 0] = 1.0, low * 8
    return [part.cuda().bfloat16().requires_grad_() for part in (query, key, value)]


def errors(function: Callable[..., Any], inputs: list[Tensor], truth: Callable[..., Any]) -> float:
    exact = gradients(truth, [part.detach().double().requires_grad_() for part in inputs])
    return relative_error(gradients(function, inputs), exact)


def confuse(inputs: list[Tensor], order: tuple[int, ...]) -> tuple[Tensor, ...]:
    """PyTorch's cuDNN, called with a gradient of this layout."""
    output, *_ = aten._scaled_dot_product_cudnn_attention(*inputs, None, True, 0.0, False, scale=0.125)
    given = laid_out(torch.randn_like(output), order)
    # Through autograd: a thread has its own plans.
    found = torch.autograd.grad(output, inputs, given)
    exact = [part.detach().double().requires_grad_() for part in inputs]
    wanted = torch.autograd.grad(attend(*exact), exact, given.double())
    return tuple((a - b).norm() / b.norm() for a, b in zip(found, wanted, strict=True))


def trains_with_cudnn() -> bool:
    return torch.cuda.get_device_capability() >= (9, 0)


@pytest.mark.gpu
@pytest.mark.parametrize(("first", "second", "length"), [(BHSD, BSHD, 136), (BSHD, BHSD, 144)])
def test_pytorch_confuses_gradients_of_two_layouts(
    first: tuple[int, ...], second: tuple[int, ...], length: int
) -> None:
    """If this fails, the entry of ``known_wrong`` has an end."""
    if not trains_with_cudnn():
        pytest.skip("PyTorch does not prefer cuDNN here")
    inputs = operands(2, 3, length, 64)
    assert max(float(error) for error in confuse(inputs, first)) <= 1e-2
    assert max(float(error) for error in confuse(inputs, second)) >= 0.5


@pytest.mark.gpu
@pytest.mark.parametrize("inner", ["eager", "aot_eager", "inductor", "CUDA graphs"])
@pytest.mark.parametrize("keys", [0, 192])
def test_gradients_are_right_in_every_layout(inner: str, keys: int) -> None:
    if not trains_with_cudnn():
        pytest.skip("it is not trained with here")
    counters["inductor"].clear()
    for number, (confused, function) in enumerate([(BHSD, heads_last), (BSHD, attend), (BSHD, summed)]):
        inputs = operands(2, 3, 152 + 8 * number, 64, keys=keys)
        confuse(inputs, confused)
        (row,) = rows(function, *inputs, kernels="_native_cudnn", strict=True)
        assert row.kernel == "_native_cudnn"
        torch._dynamo.reset()
        if inner == "CUDA graphs":
            compiled = rewritten(function, "inductor", kernels="_native_cudnn", **{"triton.cudagraphs": True})
        else:
            compiled = rewritten(function, inner, kernels="_native_cudnn")
        for _ in range(3):
            assert errors(compiled, inputs, function) <= 1e-2
    assert counters["inductor"]["cudagraph_skips"] == 0


@pytest.mark.gpu
@pytest.mark.parametrize("causal", [False, True])
def test_a_call_in_the_source_is_kept_right_as_well(causal: bool) -> None:
    if not trains_with_cudnn():
        pytest.skip("it is not trained with here")

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2).reshape(q.shape[0], -1)

    inputs = operands(2, 3, 184, 64)
    output = F.scaled_dot_product_attention(inputs[0], inputs[1], inputs[2], is_causal=causal)
    torch.autograd.grad(output, inputs, laid_out(torch.randn_like(output), BHSD))
    (row,) = rows(call, *inputs)
    assert row.kernel == "_native_cudnn"
    torch._dynamo.reset()
    assert errors(rewritten(call, "inductor"), inputs, call) <= 1e-2


@pytest.mark.gpu
@pytest.mark.parametrize("masked", [False, True])
def test_pytorchs_cudnn_gives_nan_where_half_a_tile_of_keys_is_left(masked: bool) -> None:
    """If this fails, the entry of ``known_wrong`` has an end."""
    if not trains_with_cudnn():
        pytest.skip("PyTorch does not prefer cuDNN here")
    inputs = operands(1, 2, 192, 64, low=-120.0)
    query, key, value = inputs
    mask = torch.ones(192, 192, dtype=torch.bool, device="cuda") if masked else None
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        found = torch.autograd.grad(
            F.scaled_dot_product_attention(query, key, value, attn_mask=mask).square().sum(), inputs
        )
    assert [bool(part.isfinite().all()) for part in found] == [False, True, True]


@pytest.mark.gpu
@pytest.mark.parametrize(("queries", "keys"), [(192, 192), (1, 192), (100, 64), (128, 320), (192, 128)])
@pytest.mark.parametrize("masked", [False, True])
def test_ours_gives_none(queries: int, keys: int, masked: bool) -> None:
    if not trains_with_cudnn():
        pytest.skip("it is not trained with here")
    if queries == 1 and any(entry.cudnn[0] and entry.is_here() for entry in KNOWN_WRONG):
        pytest.skip("refused")

    def function(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
        scores = (q @ k.mT) * 0.125
        return (scores.masked_fill(~keep, -math.inf) if masked else scores).softmax(-1) @ v

    inputs = operands(1, 2, queries, 64, keys=keys, low=-120.0)
    keep = (torch.arange(keys, device="cuda") % 7 != 3)[None, None, None]
    own = rewritten(function, "aot_eager", kernels="_native_cudnn", strict=True, assume_attended_rows=True)
    actual = torch.autograd.grad(own(*inputs, keep).square().sum(), inputs)
    exact = [part.detach().double().requires_grad_() for part in inputs]
    expected = torch.autograd.grad(function(exact[0], exact[1], exact[2], keep).square().sum(), exact)
    query, key, value = inputs
    given = keep.expand(1, 2, queries, keys) if masked else None
    with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
        efficient = F.scaled_dot_product_attention(query, key, value, attn_mask=given)
    theirs = torch.autograd.grad(efficient.square().sum(), inputs)
    for ours, other, truth in zip(actual, theirs, expected, strict=True):
        assert float((ours - truth).norm()) <= 1.5 * float((other - truth).norm()) + 1e-2 * float(truth.norm())


@pytest.mark.gpu
@pytest.mark.parametrize("inner", ["aot_eager", "inductor", "CUDA graphs"])
def test_both_directions_drop_the_same_weights(inner: str) -> None:
    """The output is linear in the value: its product with its gradient is the value's with the value's gradient."""
    if not trains_with_cudnn():
        pytest.skip("it is not trained with here")

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.dropout(((q @ k.mT) * 0.125).softmax(-1), 0.5) @ v

    inputs = operands(2, 3, 160, 64)
    (row,) = rows(function, *inputs, kernels="_native_cudnn", strict=True)
    assert row.kernel == "_native_cudnn"
    torch._dynamo.reset()
    graphs = {"triton.cudagraphs": True} if inner == "CUDA graphs" else {}
    compiled = rewritten(function, "inductor" if graphs else inner, kernels="_native_cudnn", **graphs)
    products: list[float] = []
    for _ in range(4):
        output = compiled(*inputs)
        expected = float(output.detach().double().square().sum())
        gradient = torch.autograd.grad(output, inputs, output.detach().clone())[2]
        assert float((gradient.double() * inputs[2].detach().double()).sum()) == pytest.approx(expected, rel=1e-2)
        products.append(expected)
    assert len(set(products)) == 4


# The CPU's kernel.


def unmasked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT / 4).softmax(-1) @ v


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_query_that_is_not_finite_gives_nan_with_few_keys(dtype: torch.dtype, dynamic: bool, bad: float) -> None:
    """A model that has diverged must look as if it had."""
    compiled = rewritten(unmasked, "aot_eager", dynamic=dynamic)
    for keys in (7, 16):
        torch._dynamo.reset()
        q, k, v = torch.randn(1, 4, 5, 8), torch.randn(1, 4, keys, 8), torch.randn(1, 4, keys, 8)
        q[:, 1, 2] = bad
        inputs = [part.to(dtype) for part in (q, k, v)]
        found, expected = compiled(*inputs), unmasked(*inputs)
        assert expected[:, 1, 2].isnan().all() and int(expected.isnan().sum()) == 8
        assert torch.equal(found.isnan(), expected.isnan()), keys
        of_found, of_expected = gradients(compiled, inputs), gradients(unmasked, inputs)
        assert torch.equal(of_found[2].isnan(), of_expected[2].isnan()), keys


def test_a_masked_call_that_becomes_causal_gives_nan_with_few_keys() -> None:
    """The source's call has a mask, and so is right; the call in its place has none."""

    def masked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).tril()
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    q, k, v = torch.randn(3, 1, 2, 7, 8)
    q[:, 1, 2] = math.nan
    assert [row.mask for row in rows(masked, q, k, v)] == ["causal"]
    found, expected = rewritten(masked)(q, k, v), masked(q, k, v)
    assert expected[:, 1, 2].isnan().all()
    assert relative_error(found, expected) <= 1e-6
