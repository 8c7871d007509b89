r"""Calls of ``scaled_dot_product_attention`` that are in the graph already.

    result = softmax(scale * query @ key^T + mask) @ value

The call is read so that another kernel can serve it, and so that repeated keys and values, more than two batch
dimensions, and copies that only change the layout can be undone. It keeps its own rules for fully masked rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from attnrewrite.ir.axes import Operand
from attnrewrite.ir.finding import Finding, NearMiss
from attnrewrite.ir.graph_view import GraphView
from attnrewrite.ir.nodes import is_tensor, tensor
from attnrewrite.ir.site import AttentionSite, Fill, NotAttention, ScoreMod
from attnrewrite.patterns.base import Specimen
from attnrewrite.patterns.sample_inputs import Specimens, additive, keep, learned, normal, padding
from attnrewrite.patterns.site_builder import Sizes, added_mask, call_arguments, call_axes, mask_operand, site_of_call

__all__ = ["PATTERN"]

aten = torch.ops.aten


class FusedCall:
    name = "sdpa"
    precedence = 10

    @property
    def specimens(self) -> tuple[Specimen, ...]:
        return tuple(SPECIMENS)

    def find(self, view: GraphView) -> Iterator[Finding]:
        for node in view.graph.find_nodes(op="call_function", target=aten.scaled_dot_product_attention.default):
            try:
                yield self._read(node, view)
            except NotAttention as reason:
                yield NearMiss(self.name, node, str(reason), (node,), reason.node)

    def _read(self, call: fx.Node, view: GraphView) -> AttentionSite:
        arguments = call_arguments(call)
        if not isinstance(arguments["dropout_p"], (int, float)):
            raise NotAttention("dropout_p is not a constant number")
        query, key, value = arguments["query"], arguments["key"], arguments["value"]
        if min(tensor(part).dim() for part in (query, key, value)) < 2:
            raise NotAttention("an operand has fewer than two dimensions")
        heads, grouped = tensor(call).shape[:-2], arguments["enable_gqa"]
        axes = call_axes(Sizes.of(query), Sizes.of(key), Sizes.of(value), heads, grouped)
        dtype, mask = tensor(call).dtype, arguments["attn_mask"]
        return site_of_call(
            view,
            pattern=self.name,
            anchor=call,
            result=call,
            operands=(query, key, value),
            axes=axes,
            layout=lambda dims: dims.with_length_at(-2),
            scale=arguments["scale"],
            masks=[_mask(mask_operand(mask, axes), dtype)] if is_tensor(mask) else [],
            is_causal=arguments["is_causal"],
            dropout=arguments["dropout_p"],
            dtype=dtype,
            interior=(call,),
        )


def _mask(operand: Operand, dtype: torch.dtype) -> ScoreMod:
    """True stays; numbers are added."""
    return Fill(operand, -math.inf, dtype, invert=True) if operand.dtype is torch.bool else added_mask(operand)


PATTERN = FusedCall()


# Specimens. Without a word on the shape, operands are (batch, heads, length, features).

_call = SPECIMENS = Specimens()
_Q = normal(2, 4, "L", 8)
_K = _V = normal(2, 4, "S", 8)


@_call.add(_Q, _K, _V)
def plain_call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)


@_call.add(_Q, _K, _V)
def call_with_scale(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """T5 and Gemma set their own."""
    return F.scaled_dot_product_attention(q, k, v, scale=0.5)


@_call.add(_Q, _Q, _Q)
def causal_call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, dropout_p=0.0, is_causal=True)


@_call.add(_Q, _K, _V)
def causal_call_of_two_lengths(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal masking is aligned at the first query and the first key."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


@_call.add(_Q, _K, _V, keep(2, 1, "L", "S"))
def call_with_boolean_mask(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


@_call.add(_Q, _K, _V, padding(2, "S"))
def call_with_key_padding(q: Tensor, k: Tensor, v: Tensor, ignored: Tensor) -> Tensor:
    mask = ~ignored[:, None, None, :].expand(-1, -1, q.shape[2], -1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


@_call.add(_Q, _K, _V, additive(2, 1, "L", "S"))
def call_with_additive_mask(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, mask)


@_call.add(_Q, _K, _V, learned("L", "S"))
def call_with_bias_of_rank_2(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0)


@_call.add(normal(2, "L", 32), learned(96, 32), learned(96), learned(32, 32))
def call_between_projections(x: Tensor, weight: Tensor, bias: Tensor, out: Tensor) -> Tensor:
    """nanoGPT: views on the way in and on the way out."""
    b, n, c = x.shape
    q, k, v = (t.view(b, n, 4, c // 4).transpose(1, 2) for t in F.linear(x, weight, bias).chunk(3, dim=2))
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return y.transpose(1, 2).contiguous().view(b, n, c) @ out


@_call.add(normal(2, "L", 32), normal(2, "S", 24), learned(32, 32), learned(64, 24))
def key_and_value_of_one_projection(x: Tensor, text: Tensor, wq: Tensor, wkv: Tensor) -> Tensor:
    """diffusers' FusedAttnProcessor2_0 in cross attention: the kernel takes the halves as they lie."""
    halves = F.linear(text, wkv).chunk(2, dim=-1)
    q, k, v = (t.view(t.shape[0], -1, 4, 8).transpose(1, 2) for t in (F.linear(x, wq), *halves))
    return F.scaled_dot_product_attention(q, k, v, dropout_p=0.0).transpose(1, 2).reshape(x.shape)


@_call.add(normal("L", 2, 32), learned(96, 32), learned(96), learned(32, 32), learned(32), padding(2, "L"))
def multi_head_attention_forward(
    x: Tensor, weight: Tensor, bias: Tensor, out: Tensor, out_bias: Tensor, ignored: Tensor
) -> Tensor:
    """nn.MultiheadAttention where the weights are not asked for."""
    output, _ = F.multi_head_attention_forward(
        x, x, x, 32, 4, weight, bias, None, None, False, 0.0, out, out_bias, True, ignored, need_weights=False
    )
    return output


@_call.add(normal(2, "L", 48), normal(2, "S", 16), normal(2, "S", 16))
def grouped_call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (t.view(2, -1, heads, 8).transpose(1, 2) for t, heads in ((q, 6), (k, 2), (v, 2)))
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)


@_call.add(normal(2, 6, "L", 8), normal(2, 2, "S", 8), normal(2, 2, "S", 8), additive(2, 1, 1, "S"))
def call_with_repeated_keys(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Llama in transformers: repeat_kv, then the fused call."""
    b, heads, length, width = k.shape
    k = k[:, :, None, :, :].expand(b, heads, 3, length, width).reshape(b, heads * 3, length, width)
    v = v[:, :, None, :, :].expand(b, heads, 3, length, width).reshape(b, heads * 3, length, width)
    return F.scaled_dot_product_attention(q.contiguous(), k.contiguous(), v.contiguous(), attn_mask=mask)


@_call.add(normal(2, 6, "L", 8), normal(2, 2, "S", 8), normal(2, 2, "S", 8))
def call_with_interleaved_keys(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = k.repeat_interleave(3, 1), v.repeat_interleave(3, 1)
    return F.scaled_dot_product_attention(q, k, v)


@_call.add(_Q, normal(2, 1, "S", 8), normal(2, 1, "S", 8))
def call_with_one_key_head(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Multi-query attention by broadcasting."""
    return F.scaled_dot_product_attention(q, k, v)


@_call.add(normal(8, "L", 8), normal(8, "S", 8), normal(8, "S", 8))
def call_of_three_dimensions(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)


@_call.add(normal("L", 8), normal("S", 8), normal("S", 8))
def call_of_two_dimensions(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)


@_call.add(normal(2, 3, 4, "L", 8), normal(2, 3, 4, "S", 8), normal(2, 3, 4, "S", 8), keep(3, 1, "L", "S"))
def call_of_five_dimensions(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """SAM 2, video models: (batch, windows, heads, length, features)."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


@_call.add(_Q, _K, normal(2, 4, "S", 24))
def call_with_wider_values(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)
