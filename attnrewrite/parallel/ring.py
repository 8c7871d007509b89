"""Ring attention through PyTorch's own engine, as a kernel for sites whose mask is proved to be none or causal.

Keys and values go round the ranks, and each partial result is merged by its logsumexp, so that no rank holds more than
two shards of them.

Source: https://github.com/pytorch/pytorch/blob/v2.13.0/torch/distributed/tensor/experimental/_context_parallel/_attention.py
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx

from attnrewrite.ir.axes import size_of
from attnrewrite.ir.builder import Builder
from attnrewrite.ir.site import CanonicalAttention
from attnrewrite.kernels.common.base import Kernel
from attnrewrite.kernels.common.layout import KernelLayout, with_unit_stride
from attnrewrite.kernels.common.limits import HALF, Asked, HeadSizes, LimitRule, Limits, capability_of
from attnrewrite.kernels.common.verdict import Availability, Refusal, Verdict
from attnrewrite.options.context_parallel import ContextParallel
from attnrewrite.torch_private import group_by_name, ring_attention, ring_attention_backward

__all__ = ["RING", "Ring"]

aten = torch.ops.aten

_SOURCE = (
    "https://github.com/pytorch/pytorch/blob/v2.13.0/torch/distributed/tensor/experimental/_context_parallel/"
    "_attention.py"
)


def _flash_on_gpu_refusal(site: CanonicalAttention, asked: Asked, capability: Any) -> Refusal:
    if site.device.type == "cpu":
        return None
    size = size_of(site.feature_axes)
    fits = isinstance(size, int) and size % 8 == 0 and size <= 256
    if site.compute_dtype not in HALF or not fits:
        return "takes bfloat16 and float16 with a head size that is a multiple of 8 up to 256, on a GPU"
    return None


_LIMITS = Limits(
    devices=("cpu", "cuda"),
    dtypes=(torch.float64, torch.float32, *HALF),
    heads=HeadSizes(),
    alignments=("square",),
    grouped=True,
    backward=True,
    rules=(LimitRule("FlashAttention's dtypes and head sizes, on a GPU", _flash_on_gpu_refusal, _SOURCE),),
)


class Ring(Kernel):
    """One call of PyTorch's ring attention; its operands are the rank's shards."""

    name = "ring"
    needs = "torch.distributed"
    source = _SOURCE
    limits = _LIMITS

    def __init__(self, option: ContextParallel) -> None:
        self._option = option

    def availability(self) -> Availability:
        return Availability(True, f"part of torch {torch.__version__}")

    def supports(self, site: CanonicalAttention) -> Verdict:
        return Verdict.of(_LIMITS.refusal(site, capability_of(site.device)))

    def emit(self, site: CanonicalAttention, builder: Builder) -> fx.Node:
        asked = _LIMITS.asked(site)
        assert isinstance(asked, Asked)
        layout = KernelLayout.of(site)
        query, key, value = layout.operands(builder, site, finish=with_unit_stride)
        scale = site.scores.scale
        if scale is None:
            scale = float(size_of(layout.query_dims[-1])) ** -0.5
        # Without a mask it is all the same in which order the keys come.
        balanced = self._option.load_balance and asked.is_causal
        both = builder.call(RING, query, key, value, scale, asked.is_causal, balanced, self._option.group)
        output = builder.insert(operator.getitem, (both, 0), {}, both.meta["val"][0])
        return layout.as_result(builder, site, output)


def _copies(query: Tensor, part: Tensor) -> Tensor:
    """Key or value with as many heads as the query has."""
    times = query.shape[1] // part.shape[1]
    return part if times == 1 else part.repeat_interleave(times, 1)


def _sum_of_copies(gradient: Tensor, part: Tensor) -> Tensor:
    if gradient.shape[1] == part.shape[1]:
        return gradient
    batch, heads, *others = gradient.shape
    return gradient.reshape(batch, part.shape[1], heads // part.shape[1], *others).sum(2)


def _step(query: Tensor, key: Tensor, value: Tensor, *, is_causal: bool, scale: float) -> tuple[Tensor, ...]:
    """One attention between shards: output and logsumexp."""
    key, value = _copies(query, key), _copies(query, value)
    if query.is_cuda:
        return aten._scaled_dot_product_flash_attention(query, key, value, 0.0, is_causal, scale=scale)[:2]  # type: ignore[no-any-return]
    return aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, is_causal, scale=scale)  # type: ignore[no-any-return]


def _step_backward(
    *,
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    is_causal: bool,
    scale: float,
) -> tuple[Tensor, ...]:
    keys, values = _copies(query, key), _copies(query, value)
    if query.is_cuda:
        # The state of a dropout that there is none of, and the lengths of sequences that are not packed.
        none, state = query.new_empty((0,)), torch.zeros((2,), dtype=torch.uint64, device=query.device)
        gradients = aten._scaled_dot_product_flash_attention_backward(
            *(grad_out, query, keys, values, out, logsumexp, none, none, query.shape[2], key.shape[2], 0.0),
            *(is_causal, state, none),
            scale=scale,
        )
    else:
        gradients = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad_out, query, keys, values, out, logsumexp, 0.0, is_causal, scale=scale
        )
    return gradients[0], _sum_of_copies(gradients[1], key), _sum_of_copies(gradients[2], value)


@torch.library.custom_op("attnrewrite::ring_attention", mutates_args=())
def _ring(
    query: Tensor, key: Tensor, value: Tensor, scale: float, causal: bool, balanced: bool, group: str
) -> tuple[Tensor, Tensor]:
    """The rank's rows of attention over all ranks' keys, and their logsumexp; operands are (batch, heads, length,
    features)."""
    output, logsumexp = ring_attention(
        group_by_name(group), _step, query, key, value, causal, balanced=balanced, scale=scale
    )[:2]
    return output.to(query.dtype).contiguous(), logsumexp.contiguous()


@_ring.register_fake
def _(
    query: Tensor, key: Tensor, value: Tensor, scale: float, causal: bool, balanced: bool, group: str
) -> tuple[Tensor, Tensor]:
    wide = torch.float64 if query.dtype is torch.float64 else torch.float32
    return (
        query.new_empty((*query.shape[:-1], value.shape[-1])),
        query.new_empty(query.shape[:-1], dtype=wide),
    )


@torch.library.custom_op("attnrewrite::ring_attention_backward", mutates_args=())
def _ring_backward(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    logsumexp: Tensor,
    scale: float,
    causal: bool,
    balanced: bool,
    group: str,
) -> tuple[Tensor, Tensor, Tensor]:
    parts = (query, key, value, output, logsumexp)
    gradients = ring_attention_backward(
        group_by_name(group), _step_backward, gradient.contiguous(), *parts, causal, balanced=balanced, scale=scale
    )
    # Those of key and value arrive in one buffer, and an operator's results share no memory.
    of_query, of_key, of_value = (
        each.to(part.dtype).clone(memory_format=torch.contiguous_format)
        for each, part in zip(gradients, (query, key, value), strict=False)
    )
    return of_query, of_key, of_value


@_ring_backward.register_fake
def _(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    logsumexp: Tensor,
    scale: float,
    causal: bool,
    balanced: bool,
    group: str,
) -> tuple[Tensor, Tensor, Tensor]:
    of_query, of_key, of_value = (part.new_empty(part.shape) for part in (query, key, value))
    return of_query, of_key, of_value


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, *ctx.numbers = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(query, key, value, *output)


def _backward(ctx: Any, gradient: Tensor, of_logsumexp: Tensor | None) -> tuple[Tensor | None, ...]:
    return (*_ring_backward(gradient, *ctx.saved_tensors, *ctx.numbers), None, None, None, None)


_ring.register_autograd(_backward, setup_context=_save)

RING = torch.ops.attnrewrite.ring_attention.default
"""``(query, key, value, scale, causal, balanced, group) -> (output, logsumexp)``"""
