"""cuDNN's attention with a backward pass that is right: the operators that ``_native_cudnn`` trains with.

    attnrewrite::cudnn_attention(query, key, value, mask, dropout, is_causal, scale) -> output
    attnrewrite::cudnn_attention_backward(gradient, query, ..., dropout, is_causal, scale) -> gradients of the operands

The first is PyTorch's own operator in every graph that autograd was applied to. The second calls PyTorch's backward
pass so that what :mod:`attnrewrite.kernels.known_wrong` says of it cannot happen. It is opaque to compilers, which
therefore cannot change what it passes on.
"""

from __future__ import annotations

import math
import struct
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

__all__ = ["CUDNN_ATTENTION", "attention_backward", "laid_out_like", "plan_of_our_own", "with_masked_keys"]

aten = torch.ops.aten

_OPERANDS = "Tensor query, Tensor key, Tensor value, Tensor? mask"
_NUMBERS = "float dropout, bool is_causal, float? scale"
_SAVED = "Tensor output, Tensor logsumexp, Tensor? seed, Tensor? offset"

_TILE = 128
_ALIGNMENT = 16
"""Bytes at whose multiples the kernels read."""


def plan_of_our_own(dropout: float) -> float:
    """The probability to hand over, so that PyTorch does not take a plan that another call has made.

    Its key holds the bits of this number, and not the layout of the gradient. Minus zero is no dropout either; any
    other number becomes the one before it in float32, in which cuDNN is told it.
    https://github.com/pytorch/pytorch/blob/v2.13.0/aten/src/ATen/native/cudnn/MHA.cpp: MHAParams
    """
    if dropout == 0.0:
        return -0.0
    (bits,) = struct.unpack("<I", struct.pack("<f", dropout))
    before: float = struct.unpack("<f", struct.pack("<I", bits - 1))[0]
    return before


def laid_out_like(part: Tensor, query: Tensor) -> Tensor:
    """The tensor with its dimensions in memory in the query's order, without gaps; itself if it is so already.

    That is how cuDNN's forward pass lays out its output, whatever the query is a view of. Features come last, as cuDNN
    asks: the other dimensions of a query that is expanded may have strides below theirs.
    """
    strides = query.stride()
    last = query.dim() - 1
    order = [*sorted(range(last), key=lambda dim: (-strides[dim], dim)), last]
    wanted: dict[int, int] = {}
    stride = 1
    for dim in reversed(order):
        wanted[dim] = stride
        stride *= part.shape[dim]
    fits = all(part.shape[dim] == 1 or part.stride(dim) == wanted[dim] for dim in order)
    if fits and part.data_ptr() % _ALIGNMENT == 0:
        return part
    return torch.empty_permuted(part.shape, order, dtype=part.dtype, device=part.device).copy_(part)


def with_masked_keys(key: Tensor, value: Tensor, mask: Tensor | None, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Key, value and mask with as many keys more, which no query attends; the mask broadcasts."""
    if mask is None:
        mask = key.new_zeros((1, 1, 1, key.shape[2]))
    return pad(key, (0, 0, 0, count)), pad(value, (0, 0, 0, count)), pad(mask, (0, count), value=-math.inf)


def attention_backward(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    output: Tensor,
    logsumexp: Tensor,
    seed: Tensor | None,
    offset: Tensor | None,
    dropout: float,
    is_causal: bool,
    scale: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """PyTorch's backward pass of cuDNN's attention, in one layout, with its own plans, and over whole tiles of keys.

    Args:
        mask: broadcasts to (batch, heads, queries, keys).
        seed, offset: of the dropout; None if there is none.
    """
    gradient, output = (laid_out_like(part, query) for part in (gradient, output))
    queries, keys = query.shape[2], key.shape[2]
    padded = key, value, mask
    if keys % _TILE == _TILE // 2 and not is_causal and not dropout:
        padded = with_masked_keys(key, value, mask, _TILE // 2)
    key_there, value_there, mask_there = padded
    if mask_there is not None:
        mask_there = mask_there.expand(*query.shape[:3], key_there.shape[2])
    if seed is None or offset is None:
        seed = offset = logsumexp.new_empty((), dtype=torch.int64)
    saved = output, logsumexp, seed, offset, mask_there, None, None, queries, key_there.shape[2]
    of_query, of_key, of_value = aten._scaled_dot_product_cudnn_attention_backward(
        gradient, query, key_there, value_there, *saved, plan_of_our_own(dropout), is_causal, scale=scale
    )
    if key_there is key:
        return of_query, of_key, of_value
    return of_query, _first_keys(of_key, key), _first_keys(of_value, value)


def _first_keys(gradient: Tensor, operand: Tensor) -> Tensor:
    return torch.empty_like(operand).copy_(gradient[:, :, : operand.shape[2]])


def _fake_backward(gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, *others: Any) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(part) for part in (query, key, value))


def _attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float, is_causal: bool, scale: float | None
) -> tuple[Any, ...]:
    if mask is not None:
        mask = mask.expand(*query.shape[:3], key.shape[2])
    given = plan_of_our_own(dropout) if dropout else 0.0
    results: tuple[Any, ...] = aten._scaled_dot_product_cudnn_attention(
        query, key, value, mask, True, given, is_causal, scale=scale
    )
    return results


class _Attention(torch.autograd.Function):
    """The forward pass is PyTorch's operator, also for who traces what autograd calls."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        query, key, value, mask, dropout, *numbers = inputs
        output, logsumexp, _, _, _, _, seed, offset, _ = _attend(query, key, value, mask, dropout, *numbers)
        # Without dropout there is no state; what PyTorch returns for it may lie on another device.
        state = (seed, offset) if dropout else (None, None)
        ctx.save_for_backward(query, key, value, mask, output, logsumexp, *state)
        ctx.numbers = (dropout, *numbers)
        assert isinstance(output, Tensor)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        target = torch.ops.attnrewrite.cudnn_attention_backward.default
        return (*target(*gradients, *ctx.saved_tensors, *ctx.numbers), None, None, None, None)


def _define() -> torch.library.Library:
    library = torch.library.Library("attnrewrite", "FRAGMENT")  # type: ignore[no-untyped-call]
    define: Any = library.define
    implement: Any = library.impl
    tags = (torch.Tag.pt2_compliant_tag,)
    drawn = (*tags, torch.Tag.nondeterministic_seeded)
    define(f"cudnn_attention({_OPERANDS}, {_NUMBERS}) -> Tensor", tags=drawn)
    implement("cudnn_attention", lambda *inputs: _attend(*inputs)[0], "CompositeExplicitAutograd")
    implement("cudnn_attention", _Attention.apply, "Autograd")
    # The backward pass draws no random numbers: the dropout's state is among its arguments.
    schema = f"(Tensor gradient, {_OPERANDS}, {_SAVED}, {_NUMBERS}) -> (Tensor, Tensor, Tensor)"
    define(f"cudnn_attention_backward{schema}", tags=tags)
    implement("cudnn_attention_backward", attention_backward, "CUDA")
    torch.library.register_fake("attnrewrite::cudnn_attention_backward", _fake_backward, lib=library)
    return library


# At import, so that a compiled graph that was stored can be loaded; an operator lives for as long as its library.
_library = _define()

CUDNN_ATTENTION = torch.ops.attnrewrite.cudnn_attention.default
