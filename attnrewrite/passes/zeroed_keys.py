"""Keys that a number masks, and whose weights are zeroed behind softmax.

    where(m, 0, softmax(where(m, c, s)))  =  softmax([where(m, -inf, s), c + log(count of m)])[..., :-1]

All that such keys do is to add ``exp(c)`` each to the sum of their row, as one sink does for all of them. So the scores
may be of any size beside ``c``, and a row of such keys alone is zero, as in the source.

NeMo's attention is of this kind:
https://github.com/NVIDIA/NeMo/blob/main/nemo/collections/asr/parts/submodules/multi_head_attention.py
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import fx

from attnrewrite.analysis.formulas import Formula, negation
from attnrewrite.analysis.masks import Positions, truth
from attnrewrite.analysis.values import is_far_below, number_of
from attnrewrite.ir.axes import Operand
from attnrewrite.ir.builder import Builder
from attnrewrite.ir.nodes import tensor
from attnrewrite.ir.ops import WHERE_OPS
from attnrewrite.ir.rounding import as_stored
from attnrewrite.ir.site import AttentionSite, Fill, Zero
from attnrewrite.kernels.common.layout import lay_out

__all__ = ["with_sink_of_zeroed_keys"]

aten = torch.ops.aten


def with_sink_of_zeroed_keys(site: AttentionSite, gm: fx.GraphModule) -> AttentionSite:
    """The site with a sink in place of such keys, if it has some; the nodes of the sink are ``written``.

    A number that masks whatever the scores are needs none.
    """
    if not site.mods or not site.weight_mods or site.sink is not None or site.fused or site.never_nan:
        return site
    if site.underflows or site.rounds_rows or site.nan_to_zero:
        return site
    fill, (zero, *others) = site.mods[-1], site.weight_mods
    if not isinstance(fill, Fill) or not isinstance(zero, Zero) or fill.multiplied or fill.rescaled or fill.loosened:
        return site
    if not math.isfinite(fill.value) or is_far_below(fill.value, fill.dtype):
        return site
    positions = Positions(site.query_axes, site.key_axes)
    masked, zeroed = (_chosen(each, positions) for each in (fill, zero))
    condition = fill.condition.resolved()
    number = _number_of_source(fill)
    if masked is None or masked != zeroed or number is None or not set(site.key_axes) <= set(condition.axes):
        return site
    builder = Builder(gm, before=site.result, like=site.anchor)
    return replace(
        site,
        mods=(*site.mods[:-1], replace(fill, value=-math.inf)),
        weight_mods=tuple(others),
        sink=_sink(builder, fill, number, condition, site),
        sink_of_masked=True,
        written=(*site.written, *builder.created),
    )


def _chosen(mod: Fill | Zero, positions: Positions) -> Formula | None:
    """Where a score is filled, or a weight zeroed; None if that is not known."""
    holds = truth(positions.of(mod.condition))
    return None if holds is None else negation(holds) if mod.invert else holds


def _number_of_source(fill: Fill) -> float | None:
    """The number that is filled in, before the dtype of the scores rounds it; None if it is not seen."""
    node = fill.written_at
    if node is None:
        return None
    place = 2 if fill.invert or node.target not in WHERE_OPS else 1
    number = number_of(node.args[place])
    return number if number is not None and as_stored(number, fill.dtype) == fill.value else None


def _sink(builder: Builder, fill: Fill, number: float, condition: Operand, site: AttentionSite) -> Operand:
    """The logarithm of what the masked keys of a row add to its sum; minus infinity where there is none."""
    kept = tuple((axis,) for axis in condition.axes if axis not in site.key_axes)
    node = lay_out(builder, condition.node, condition.layout, (*kept, site.key_axes))
    if tensor(node).dtype is not torch.bool:
        node = builder.call(aten.ne.Scalar, node, 0)
    if fill.invert:
        node = builder.call(aten.logical_not.default, node)
    count = builder.call(aten.sum.dim_IntList, node, [-1])
    # Half precision holds neither the number of many keys nor, beside a large number, its logarithm.
    count = builder.call(aten.to.dtype, count, torch.promote_types(site.softmax_dtype, torch.float32))
    return Operand(builder.call(aten.add.Tensor, builder.call(aten.log.default, count), number), kept)
