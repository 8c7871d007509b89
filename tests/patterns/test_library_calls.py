"""Calls of libraries' own operators are read by their published schemas. No library's code is here.

An operator of the schema is defined with the shapes that it returns and nothing else: it cannot run, and once rewritten
need not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from attnrewrite.backend import collect_reports
from tests.support.helpers import relative_error, rewritten

ops = torch.ops

# Each schema is that of the file that is named, as torch.library reads it off the annotations there.
SCHEMAS = {
    # https://github.com/Dao-AILab/flash-attention/blob/v2.8.3/flash_attn/flash_attn_interface.py
    "flash_attn::_flash_attn_forward": "(Tensor q, Tensor k, Tensor v, float dropout_p, float softmax_scale, "
    "bool causal, SymInt window_size_left, SymInt window_size_right, float softcap, "
    "Tensor? alibi_slopes, bool return_softmax) -> (Tensor, Tensor, Tensor, Tensor)",
    # https://github.com/facebookresearch/xformers/blob/v0.0.35/xformers/ops/fmha/flash.py
    "xformers_flash::flash_fwd": "(Tensor query, Tensor key, Tensor value, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, "
    "Tensor? seqused_k, SymInt max_seqlen_q, SymInt max_seqlen_k, float p, float softmax_scale, bool is_causal, "
    "SymInt window_left, SymInt window_right, bool return_softmax, Tensor? block_tables) -> (Tensor, Tensor, Tensor)",
    # https://github.com/facebookresearch/xformers/blob/v0.0.35/xformers/ops/fmha/__init__.py
    "xformer::memory_efficient_attention_forward": "(Tensor q, Tensor k, Tensor v, Tensor? b = None, float? p = 0.0, "
    "float? scale = None) -> Tensor",
    # torch-npu 2.13.0: tests/support/published_signatures.py
    "npu::npu_fusion_attention": "(Tensor query, Tensor key, Tensor value, int head_num, str input_layout, "
    "Tensor? pse=None, Tensor? padding_mask=None, Tensor? atten_mask=None, float scale=1., float keep_prob=1., "
    "int pre_tockens=2147483647, int next_tockens=2147483647, int inner_precise=0, int[]? prefix=None, "
    "int[]? actual_seq_qlen=None, int[]? actual_seq_kvlen=None, int sparse_mode=0, bool gen_mask_parallel=True, "
    'bool sync=False, str softmax_layout="", Tensor? sink=None, Tensor? dropout_mask=None, int seed=0, int offset=0)'
    " -> (Tensor, Tensor, Tensor, Tensor, int, int, int)",
    # torch-xla 2.9.0, torch_xla/experimental/custom_kernel.py
    "xla::fa_custom_forward": "(Tensor q, Tensor k, Tensor v, bool causal, Tensor? q_segment_ids, Tensor? "
    "kv_segment_ids, float sm_scale, Tensor? ab, str partition_spec, str mesh, bool[] ctx_grad) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
}


@pytest.fixture(scope="module", autouse=True)
def operators() -> Any:
    """Only the shapes: no implementation for any device."""
    libraries = []
    for name, schema in SCHEMAS.items():
        namespace, operator = name.split("::")
        library: Any = torch.library.Library(namespace, "FRAGMENT")  # type: ignore[no-untyped-call]
        library.define(operator + schema)
        library._register_fake(operator, _returning(schema.rpartition("->")[2]))
        libraries.append(library)
    yield
    for library in libraries:
        library._destroy()


def _returning(returns: str) -> Callable[..., Any]:
    kinds = returns.strip(" ()").split(", ")

    def fake(query: Tensor, *_: Any, **__: Any) -> Any:
        made = [torch.empty_like(query) if kind == "Tensor" else 0 for kind in kinds]
        return made[0] if len(made) == 1 else tuple(made)

    return fake


def attend(parts: list[Tensor], scale: float, mask: Tensor | None = None) -> Tensor:
    """(batch, heads, length, features); a mask is added."""
    q, k, v = parts
    scores = q @ k.mT * scale
    return (scores if mask is None else scores + mask).softmax(-1) @ v


def operands(order: str = "BSHD", queries: int = 6, keys: int = 9, heads: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    made = [
        torch.randn(2, count, length, 8, generator=generator)
        for count, length in ((4, queries), (heads, keys), (heads, keys))
    ]
    return [part.transpose(1, 2).contiguous() if order == "BSHD" else part for part in made]


def bhsd(parts: list[Tensor]) -> list[Tensor]:
    return [part.transpose(1, 2) for part in parts]


def check(function: Callable[..., Tensor], inputs: list[Tensor], expected: Tensor) -> None:
    torch._dynamo.reset()
    with torch.no_grad(), collect_reports() as graphs:
        result = rewritten(function)(*inputs)
    assert [(row.status, row.kernel, row.reason) for row in graphs[0].sites] == [("rewritten", "native", "")]
    assert relative_error(result, expected) <= 1e-6


def reason(function: Callable[..., Any], *inputs: Tensor, gradients: bool = False) -> str:
    """Why the call stays; it cannot be run."""
    torch._dynamo.reset()
    failure = pytest.raises((NotImplementedError, RuntimeError))
    with torch.set_grad_enabled(gradients), collect_reports() as graphs, failure:
        rewritten(function)(*inputs)
    (row,) = graphs[0].sites
    assert row.status == "kept"
    return row.reason


def flash(q: Tensor, k: Tensor, v: Tensor, causal: bool = False, window: int = -1, softcap: float = 0.0) -> Any:
    return ops.flash_attn._flash_attn_forward(q, k, v, 0.0, 0.3, causal, window, -1, softcap, None, False)


def test_flash_attention() -> None:
    inputs = operands()
    check(lambda q, k, v: flash(q, k, v)[0], inputs, attend(bhsd(inputs), 0.3).transpose(1, 2))


def test_flash_attention_of_fewer_key_heads() -> None:
    inputs = operands(heads=2)
    q, k, v = bhsd(inputs)
    expected = attend([q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)], 0.3).transpose(1, 2)
    check(lambda q, k, v: flash(q, k, v)[0], inputs, expected)


def test_causal_flash_attention() -> None:
    inputs = operands(keys=6)
    mask = torch.zeros(6, 6).masked_fill(torch.ones(6, 6).triu(1).bool(), -torch.inf)
    check(lambda q, k, v: flash(q, k, v, True)[0], inputs, attend(bhsd(inputs), 0.3, mask).transpose(1, 2))
    assert "needs as many queries as keys" in reason(lambda q, k, v: flash(q, k, v, True)[0], *operands())


@pytest.mark.parametrize("order", [["BSND"], ["BNSD"], ["BSH"], ["SBH"]], ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_npu(order: list[str], masked: bool) -> None:
    (layout,) = order
    q, k, v = operands("BHSD")
    keep = torch.rand(2, 1, 6, 9) < 0.5
    keep[..., 0] = True

    def laid_out(part: Tensor) -> Tensor:
        if layout == "BNSD":
            return part
        part = part.transpose(1, 2)
        if layout != "BSND":
            part = part.flatten(2)
        return part.transpose(0, 1) if layout == "SBH" else part

    def call(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor) -> Any:
        first = torch.arange(9) > 0
        return ops.npu.npu_fusion_attention(
            q, k, v, 4, layout, atten_mask=hidden & first if masked else None, scale=0.3, pre_tockens=65536,
            next_tockens=65536, keep_prob=1.0, sync=False, inner_precise=0,
        )[0]  # fmt: skip

    mask = torch.zeros(keep.shape).masked_fill(~keep, -torch.inf) if masked else None
    check(call, [*map(laid_out, (q, k, v)), ~keep], laid_out(attend([q, k, v], 0.3, mask)))


def test_xformers() -> None:
    inputs = operands()

    def four(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return ops.xformer.memory_efficient_attention_forward(q, k, v)

    check(four, inputs, attend(bhsd(inputs), 8**-0.5).transpose(1, 2))
    three = [part.flatten(0, 1) for part in operands("BHSD")]
    bias = torch.randn(8, 6, 9)

    def with_bias(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Any:
        return ops.xformer.memory_efficient_attention_forward(q, k, v, bias.tanh(), 0.0, 0.3)

    check(with_bias, [*three, bias], attend(three, 0.3, bias.tanh()))


def test_xformers_flash() -> None:
    inputs = operands(keys=6)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Any:
        nothing = None
        return ops.xformers_flash.flash_fwd(
            q, k, v, nothing, nothing, nothing, 6, 6, 0.0, 0.3, False, -1, -1, False, nothing
        )[0]

    check(call, inputs, attend(bhsd(inputs), 0.3).transpose(1, 2))


def test_xla() -> None:
    inputs = operands("BHSD", keys=6)
    mask = torch.zeros(6, 6).masked_fill(torch.ones(6, 6).triu(1).bool(), -torch.inf)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return ops.xla.fa_custom_forward(q, k, v, True, None, None, 0.3, None, "None", "", [False] * 6)[0]

    check(call, inputs, attend(inputs, 0.3, mask))


# Of PyTorch.


@pytest.mark.parametrize(
    "name",
    [
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
        "_scaled_dot_product_fused_attention_overrideable",
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_attention_math",
    ],
)
def test_back_ends_of_pytorch_by_name(name: str) -> None:
    inputs = operands("BHSD", keys=6)
    more = (None, True) if "efficient" in name or "cudnn" in name else ()

    def call(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return getattr(ops.aten, name)(q, k, v, *more, scale=0.3)[0]

    check(call, inputs, attend(inputs, 0.3))


# What stays.


def test_what_is_not_read_stays() -> None:
    inputs = operands()
    assert "window_size_left" in reason(lambda q, k, v: flash(q, k, v, window=4)[0], *inputs)
    assert "softcap" in reason(lambda q, k, v: flash(q, k, v, softcap=30.0)[0], *inputs)


def test_logarithms_that_are_read() -> None:
    assert "such as logsumexp, is used" in reason(lambda q, k, v: flash(q, k, v)[:2], *operands())


def test_gradients_are_the_librarys_own() -> None:
    inputs = [part.requires_grad_() for part in operands()]
    assert "backward pass of the library is not known" in reason(
        lambda q, k, v: flash(q, k, v)[0], *inputs, gradients=True
    )


def test_rows_that_may_have_no_key() -> None:
    def call(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor) -> Any:
        return ops.npu.npu_fusion_attention(q, k, v, 4, "BSND", atten_mask=hidden, scale=0.3)[0]

    hidden = torch.zeros(6, 9, dtype=torch.bool)
    assert "all masked is not known" in reason(call, *operands(), hidden)


def test_a_band_of_the_npu() -> None:
    def call(q: Tensor, k: Tensor, v: Tensor) -> Any:
        hidden = torch.zeros(6, 9, dtype=torch.bool)
        return ops.npu.npu_fusion_attention(q, k, v, 4, "BSND", atten_mask=hidden, scale=0.3, next_tockens=0)[0]

    assert "next_tockens" in reason(call, *operands())
