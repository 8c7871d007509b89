"""Gradients of rows without a key that no fused backward pass gives: operators that change nothing but gradients.

Each takes the kernel's output and gives a copy of it. Operands are laid out as the kernel's: query (batch, query heads,
query length, head_dim), key and value (batch, key heads, key length, features); ``rows`` is boolean, (batch or 1, heads
or 1, query length or 1, 1).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["ABSORBED_ROWS", "NAN_ROWS"]


class _FirstDerivative(torch.autograd.Function):
    """A tensor as it is, which cannot be differentiated by the others, of which it was computed."""

    @staticmethod
    def forward(ctx: Any, derivative: Tensor, *others: Tensor) -> Tensor:
        return derivative.view_as(derivative)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise RuntimeError(
            "an attention that attnrewrite rewrote is differentiated twice, and its rows without a key have no second "
            "derivative (run the model without attnrewrite for it)"
        )


_Backward = Callable[[Any, Tensor], tuple[Tensor | None, ...]]


def _without_second_derivative(backward: _Backward) -> _Backward:
    """``once_differentiable`` lets gradients pass that are asked for by ``torch.autograd.grad``."""

    @functools.wraps(backward)
    def once(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        with torch.no_grad():
            derivatives = backward(ctx, gradient)
        if not torch.is_grad_enabled():
            return derivatives
        others = (gradient, *ctx.saved_tensors)
        return tuple(None if each is None else _FirstDerivative.apply(each, *others) for each in derivatives)  # type: ignore[no-untyped-call]

    return once


@torch.library.custom_op("attnrewrite::absorbed_rows", mutates_args=())
def _absorbed_rows(output: Tensor, query: Tensor, key: Tensor, value: Tensor, rows: Tensor, scale: float) -> Tensor:
    """The output, where the scores of ``rows`` were absorbed by one number and the kernel got a query of zero for them.

    The weights of such a row are 1 / keys, and the gradient of its scores passes the addition that absorbed them. The
    kernel's backward pass gives the query's gradient (which does not depend on the query) and the value's; the key's
    has the query as a factor, which was zero. It is added here, in O(length): with uniform weights it is a product of
    the value with a head_dim x head_dim matrix.
    """
    return output.clone()


@_absorbed_rows.register_fake
def _(output: Tensor, query: Tensor, key: Tensor, value: Tensor, rows: Tensor, scale: float) -> Tensor:
    return torch.empty_like(output)


def _save_absorbed(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, query, key, value, rows, scale = inputs
    ctx.save_for_backward(query, value, rows)
    ctx.scale, ctx.key_heads = scale, key.shape[1]


@_without_second_derivative
def _absorbed_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    query, value, rows = ctx.saved_tensors
    # Half of the factor on either side: the sum over rows and its product with the value stay in float16's range.
    factor = (ctx.scale / value.shape[-2]) ** 0.5
    lost = torch.where(rows, query, 0.0) * factor
    # The sum over rows of query and gradient: (batch, key heads, head_dim of the value, head_dim).
    products = gradient.mT.to(lost.dtype) @ lost
    if products.shape[1] != ctx.key_heads:
        products = _summed_groups(products, ctx.key_heads)
    centered = value - value.mean(-2, keepdim=True)
    return gradient, None, centered @ products * factor, None, None, None


def _summed_groups(by_query_head: Tensor, key_heads: int) -> Tensor:
    """(batch, query heads, ...) summed to (batch, key heads, ...); query heads that share a key stand side by side."""
    batch, _, *rest = by_query_head.shape
    return by_query_head.reshape(batch, key_heads, -1, *rest).sum(2)


_absorbed_rows.register_autograd(_absorbed_backward, setup_context=_save_absorbed)


@torch.library.custom_op("attnrewrite::nan_rows", mutates_args=())
def _nan_rows(output: Tensor, query: Tensor, key: Tensor, mask: Tensor, rows: Tensor) -> Tensor:
    """The output, with the gradient of a softmax that is NaN in ``rows`` and whose weights were set to zero there.

    The value's gradient is that of the zeros. Those of the scores are NaN, and with them the mask's and the query's in
    those rows, and the key's wherever such a row might have attended. The mask, (batch or 1, heads or 1, query length
    or 1, key length), has ``rows``'s dimensions but for the last.
    """
    return output.clone()


@_nan_rows.register_fake
def _(output: Tensor, query: Tensor, key: Tensor, mask: Tensor, rows: Tensor) -> Tensor:
    return torch.empty_like(output)


def _save_nan(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, query, key, mask, rows = inputs
    ctx.save_for_backward(query, key, mask, rows)


@_without_second_derivative
def _nan_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    query, key, mask, rows = ctx.saved_tensors
    lost = rows.expand(*query.shape[:-1], 1)
    by_head = lost.any(-2, keepdim=True)
    if by_head.shape[1] != key.shape[1]:
        by_head = _summed_groups(by_head.to(torch.int32), key.shape[1]) > 0
    of_query = torch.where(lost, torch.nan, torch.zeros_like(query))
    of_key = torch.where(by_head, torch.nan, torch.zeros_like(key))
    return gradient, of_query, of_key, torch.where(rows, torch.nan, torch.zeros_like(mask)), None


_nan_rows.register_autograd(_nan_backward, setup_context=_save_nan)

ABSORBED_ROWS = torch.ops.attnrewrite.absorbed_rows.default
NAN_ROWS = torch.ops.attnrewrite.nan_rows.default
