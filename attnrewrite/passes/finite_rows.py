"""Rows that are NaN in the source wherever a score of theirs is not finite.

    softmax(max(scores) - scores)  =  softmax(-scores)    if all scores of a row are finite

Beside an infinite score the left side is NaN, and the right side may give that key a weight of zero. A score is not
finite where an entry of its query or key is not, so the result is multiplied by what is 1 where all entries are finite,
and NaN elsewhere. Kernels do not agree on what a query of NaN gives.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import fx

from attnrewrite.ir.axes import Axis, Operand
from attnrewrite.ir.builder import Builder
from attnrewrite.ir.site import AttentionSite, Scale, Shift
from attnrewrite.kernels.common.layout import lay_out

__all__ = ["with_factors_of_finite_rows"]

aten = torch.ops.aten


def with_factors_of_finite_rows(site: AttentionSite, gm: fx.GraphModule) -> AttentionSite:
    """The site with these factors among its weight mods, if a score mod needs them; their nodes are ``written``."""
    if not any(isinstance(mod, Shift) and mod.needs_finite for mod in site.mods):
        return site
    builder = Builder(gm, before=site.result, like=site.anchor)
    factors = (
        Scale(_one_where_finite(builder, site.query, site.feature_axes)),
        Scale(_one_where_finite(builder, site.key, (*site.key_axes, *site.feature_axes))),
    )
    written = (*site.written, *builder.created)
    return replace(site, weight_mods=(*factors, *site.weight_mods), written=written)


def _one_where_finite(builder: Builder, operand: Operand, over: tuple[Axis, ...]) -> Operand:
    """1 where all entries along the axes ``over`` are finite, and NaN where one is not."""
    operand = operand.resolved()
    reduced = Operand(operand.node, (over,)).resolved().axes
    kept = tuple((axis,) for axis in operand.axes if axis not in reduced)
    node = builder.call(aten.detach.default, operand.node)
    node = lay_out(builder, node, operand.layout, (*kept, reduced))
    zeros = builder.call(aten.mul.Tensor, node, 0.0)
    total = builder.call(aten.sum.dim_IntList, zeros, [-1])
    # Autocast may sum in another dtype than the one that is known here.
    total = builder.call(aten.to.dtype, total, operand.dtype)
    return Operand(builder.call(aten.add.Tensor, total, 1.0), kept)
