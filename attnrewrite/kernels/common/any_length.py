"""``scaled_dot_product_attention`` as one operator, for numbers of queries or keys that may be zero.

PyTorch's selector of a kernel asks whether they are, and cannot be traced without an answer: see
``check_nonzero_sequence_lengths_dense`` in
https://github.com/pytorch/pytorch/blob/v2.13.0/aten/src/ATen/native/transformers/sdp_utils_cpp.h. Here it is asked when
the operator runs. Without a key the result is zero, as that of a product over nothing. It has no backward pass.

Query (batch, query heads, query length, head_dim), key and value (batch, key heads, key length, features).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

__all__ = ["ATTENTION_OF_ANY_LENGTH"]


@torch.library.custom_op("attnrewrite::attention_of_any_length", mutates_args=())
def _attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool, scale: float | None, gqa: bool
) -> Tensor:
    if not query.shape[-2] or not key.shape[-2]:
        return query.new_zeros((*query.shape[:-1], value.shape[-1]))
    output = scaled_dot_product_attention(query, key, value, mask, is_causal=is_causal, scale=scale, enable_gqa=gqa)
    return output.contiguous()


@_attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *others: Any) -> Tensor:
    return query.new_empty((*query.shape[:-1], value.shape[-1]))


ATTENTION_OF_ANY_LENGTH = torch.ops.attnrewrite.attention_of_any_length.default
