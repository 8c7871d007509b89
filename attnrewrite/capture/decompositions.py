"""Decompositions of calls that functional tracing would keep whole.

In inference ``nn.TransformerEncoderLayer`` is one native call, which writes the scores to memory. Decomposed into
operators, its attention is found like any other.

``F.instance_norm`` in training writes its running statistics, and its schema does not say so: a functional graph
would write to copies of them. Decomposed, the writes are seen.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attnrewrite.torch_private import transformer_encoder_layer

__all__ = ["DECOMPOSITIONS"]


def _encoder_layer(
    src: Tensor,
    embed_dim: int,
    num_heads: int,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    use_gelu: bool,
    norm_first: bool,
    eps: float,
    norm_weight_1: Tensor,
    norm_bias_1: Tensor,
    norm_weight_2: Tensor,
    norm_bias_2: Tensor,
    ffn_weight_1: Tensor,
    ffn_bias_1: Tensor,
    ffn_weight_2: Tensor,
    ffn_bias_2: Tensor,
    mask: Tensor | None = None,
    mask_type: int | None = None,
) -> Tensor:
    """As in https://github.com/pytorch/pytorch/blob/v2.13.0/aten/src/ATen/native/transformers/transformer.cpp"""

    def normalized(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.layer_norm(x, (embed_dim,), weight, bias, eps)

    x = normalized(src, norm_weight_1, norm_bias_1) if norm_first else src
    packed = F.linear(x, qkv_weight, qkv_bias)
    packed = packed.view(*packed.shape[:-1], 3, num_heads, embed_dim // num_heads)
    query, key, value = packed.permute(2, 0, 3, 1, 4).unbind(0)
    scores = (query * (embed_dim // num_heads) ** -0.5) @ key.transpose(-2, -1)
    if mask is not None:
        masked = mask.to(torch.bool)
        if mask_type == 0:  # (query, key)
            masked = masked[None, None]
        elif mask_type == 1:  # (batch, key)
            masked = masked[:, None, None]
        scores = scores.masked_fill(masked, float("-inf"))
    mixed = (scores.softmax(-1) @ value).transpose(1, 2).flatten(2)
    x = F.linear(mixed, proj_weight, proj_bias) + src
    if not norm_first:
        x = normalized(x, norm_weight_1, norm_bias_1)
    inner = normalized(x, norm_weight_2, norm_bias_2) if norm_first else x
    inner = F.linear(inner, ffn_weight_1, ffn_bias_1)
    inner = F.gelu(inner) if use_gelu else F.relu(inner)
    x = F.linear(inner, ffn_weight_2, ffn_bias_2) + x
    return x if norm_first else normalized(x, norm_weight_2, norm_bias_2)


def _instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """As in https://github.com/pytorch/pytorch/blob/v2.13.0/aten/src/ATen/native/Normalization.cpp instance_norm"""
    if not use_input_stats or (running_mean is None and running_var is None):
        return F.instance_norm(input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps)
    batch, channels = input.shape[:2]
    weight, bias, mean, var = (
        None if each is None else each.repeat(batch) for each in (weight, bias, running_mean, running_var)
    )
    folded = input.contiguous().view(1, batch * channels, *input.shape[2:])
    out = F.batch_norm(folded, mean, var, weight, bias, training=True, momentum=momentum, eps=eps)
    for statistic, new in ((running_mean, mean), (running_var, var)):
        if statistic is not None and new is not None:
            statistic.copy_(new.view(batch, channels).mean(0))
    return out.view(input.shape)


DECOMPOSITIONS: dict[Any, Any] = {transformer_encoder_layer: _encoder_layer, F.instance_norm: _instance_norm}
"""For each such call, the function of operators that computes the same."""
