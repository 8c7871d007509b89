"""``single_key``: softmax over one key gives it the weight 1, so that the attention is its value.

    softmax([score]) @ [value] = value        for every finite score

Query and key are not multiplied, and where no gradient is wanted they are not even computed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from attnrewrite.ir.builder import Builder
from attnrewrite.ir.nodes import is_tensor, same_shape, tensor
from attnrewrite.ir.site import CanonicalAttention, Scale
from attnrewrite.kernels.common.base import Kernel
from attnrewrite.kernels.common.layout import lay_out, modified
from attnrewrite.kernels.common.verdict import Availability, Verdict

__all__ = ["SingleKey"]

aten = torch.ops.aten


class SingleKey(Kernel):
    """The value, broadcast over the queries."""

    name = "single_key"
    automatic = True
    emits_aten = True
    computes_less = True
    needs = "PyTorch"
    run_on = "x86 CPU, torch 2.13"

    def availability(self) -> Availability:
        return Availability(True, f"part of torch {torch.__version__}")

    def concerns(self, site: CanonicalAttention) -> bool:
        return not site.key_axes and site.sink is None

    def supports(self, site: CanonicalAttention) -> Verdict:
        scores = site.scores
        if not self.concerns(site):
            return Verdict.no("softmax runs over more than one key")
        if site.dropout:
            return Verdict.no("the one weight of each query is dropped at random")
        # A finite number that masks the only key leaves it the weight 1; a fused call has its own rules.
        if scores.masked_rows.may_occur and (site.fused or not scores.masked_rows.is_mean_of_value):
            return Verdict.no(
                "the only key may be masked, and the value is not what the source gives then (if it never is, say so: "
                "options={'assume_attended_rows': True})"
            )
        return Verdict.yes()

    def emit(self, site: CanonicalAttention, builder: Builder) -> fx.Node:
        scores = site.scores
        dims = site.result_layout
        result = tensor(site.result)
        output = lay_out(builder, site.value.node, site.value.layout, dims)
        for mod in (*scores.value_mods, *scores.output_mods):
            output = modified(builder, output, mod, dims)
        if tensor(output).dtype is not result.dtype:
            output = builder.call(aten.to.dtype, output, result.dtype)
        if site.differentiable:
            for node in _without_influence(site):
                nothing = builder.call(aten.slice.Tensor, _of_one_dimension(builder, node), 0, 0, 0)
                total = builder.call(aten.sum.default, nothing, dtype=result.dtype)
                output = builder.call(aten.add.Tensor, output, total)
        if same_shape(tensor(output).shape, result.shape):
            # A product is a tensor of its own: no view of an input, and none that another site has made as well.
            return builder.copied(output)
        return builder.call(aten.expand.default, output, list(result.shape))


def _without_influence(site: CanonicalAttention) -> list[fx.Node]:
    """The operands that only the score depends on: the source gives them gradients of zeros, and not none at all.

    An optimizer lets a parameter decay whose gradient is zero, and leaves one alone that has none. The sum of no
    elements is a zero with such a gradient.
    """
    operands = [operand.node for operand in (site.query, site.key, *site.modifiers)]
    factors: list[Any] = [mod.factor for mod in site.mods if isinstance(mod, Scale)]
    found = dict.fromkeys([*operands, *(factor for factor in factors if is_tensor(factor))])
    return [node for node in found if node is not site.value.node and tensor(node).dtype.is_floating_point]


def _of_one_dimension(builder: Builder, node: fx.Node) -> fx.Node:
    return node if tensor(node).dim() else builder.call(aten.reshape.default, node, [1])
