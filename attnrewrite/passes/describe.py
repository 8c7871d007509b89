"""The rows of the report for sites."""

from __future__ import annotations

from typing import Any

from attnrewrite.analysis.scores import node_in_words
from attnrewrite.ir.axes import Axis, Operand, shape_of
from attnrewrite.ir.bounds import Ended
from attnrewrite.ir.linear_site import LinearAttention, Order
from attnrewrite.ir.nodes import dtype_name, is_tensor, tensor
from attnrewrite.ir.site import (
    AttentionSite,
    Bias,
    CanonicalAttention,
    Fill,
    Floor,
    Narrow,
    Scale,
    Shift,
    Zero,
    scale_in_words,
)
from attnrewrite.ir.source import source_location
from attnrewrite.passes.reassociate import operations
from attnrewrite.patterns import NearMiss
from attnrewrite.report.rows import SiteReport
from attnrewrite.torch_private import operator_name

__all__ = ["describe_canonical", "row_of_attention", "row_of_linear", "row_of_near_miss"]


def row_of_near_miss(name: str, miss: NearMiss) -> SiteReport:
    return SiteReport(
        name,
        miss.pattern,
        "kept",
        source_location(miss.anchor),
        reason=miss.reason,
        blamed=node_in_words(miss.blamed or miss.anchor),
        dtype=dtype_name(tensor(miss.anchor).dtype) if is_tensor(miss.anchor) else "",
        device=tensor(miss.anchor).device.type if is_tensor(miss.anchor) else "",
        nodes_before=tuple(node.name for node in miss.nodes),
    )


def row_of_attention(name: str, site: AttentionSite) -> SiteReport:
    heads = (*site.shared_axes, *site.group_axes)

    def shape(*dims: Any) -> tuple[str, ...]:
        return tuple(str(size) for size in shape_of(tuple((axis,) for axis in heads if axis in dims[0]) + dims[1:]))

    return SiteReport(
        name,
        site.pattern,
        "kept",
        source_location(site.anchor),
        query_shape=shape(site.query.axes, site.query_axes, site.feature_axes),
        key_shape=shape(site.key.axes, site.key_axes, site.feature_axes),
        value_shape=shape(site.value.axes, site.key_axes, site.value_axes),
        dtype=dtype_name(site.compute_dtype),
        device=site.device.type,
        scale=site.describe_scale(),
        mask=_mask_in_words(site),
        score_mods=(
            *(_mod_in_words(mod) for mod in site.mods if not isinstance(mod, (Scale, Shift))),
            *([f"sink {getattr(site.sink, 'node', site.sink)}"] if site.sink is not None else []),
            *(_mod_in_words(mod) for mod in site.weight_mods),
            *(["NaN set to zero"] if site.nan_to_zero else []),
        ),
        dropout=f"{site.dropout:g}" if site.dropout else "",
        grouping=_grouping_in_words(site),
        slices=_slices_in_words(site),
        nodes_before=tuple(node.name for node in site.interior),
    )


def row_of_linear(name: str, site: LinearAttention) -> SiteReport:
    batch = site.batch_axes

    def shape(operand: Operand, *dims: tuple[Axis, ...]) -> tuple[str, ...]:
        own = tuple((axis,) for axis in batch if axis in operand.axes)
        return tuple(str(size) for size in shape_of((*own, *dims)))

    orders: tuple[Order, ...] = ("linear", "quadratic")
    return SiteReport(
        name,
        site.pattern,
        "recognized",
        source_location(site.anchor),
        query_shape=shape(site.query, site.query_axes, site.feature_axes),
        key_shape=shape(site.key, site.key_axes, site.feature_axes),
        value_shape=shape(site.value, site.key_axes, site.value_axes),
        dtype=dtype_name(site.dtype),
        device=tensor(site.result).device.type,
        scale=" * ".join(scale_in_words(scale) for scale in site.scales if isinstance(scale.factor, (int, float))),
        score_mods=(*site.features, *([f"divided by {site.normalizer}"] if site.normalizer else [])),
        order=site.order,
        operations={order: str(operations(site, order)) for order in orders},
        nodes_before=tuple(node.name for node in site.interior),
    )


def describe_canonical(site: CanonicalAttention, row: SiteReport, ended: Ended) -> None:
    """Adds the canonical form to the row: what was proved of the mask, and the bounds at which searches ended."""
    row.proof = _proof_in_words(site, ended)
    row.grouping = _grouping_in_words(site)
    row.mask = " + ".join(site.scores.structure) or "none"


def _grouping_in_words(site: AttentionSite) -> str:
    grouped, folded = ("x".join(str(axis.size) for axis in axes) for axes in (site.group_axes, site.folded))
    words = [f"{folded} batches share a key and are folded into the query positions"] if folded else []
    words += [f"{grouped} query heads share a key"] if grouped else []
    return "; ".join(filter(None, [*words, site.still_repeated]))


def _slices_in_words(site: AttentionSite) -> str:
    if len(site.parts) == 1:
        return "the buffer that its result fills is not allocated"
    if site.parts:
        return f"merged from {len(site.parts)} slices"
    return f"slices are not merged: {site.unmerged}" if site.unmerged else ""


def _mask_in_words(site: AttentionSite) -> str:
    if site.is_causal:
        return "causal"
    kinds = [
        "bias" if isinstance(mod, Bias) else f"fill {mod.value:g}" for mod in site.mods if isinstance(mod, (Bias, Fill))
    ]
    return " + ".join(kinds) or "none"


def _mod_in_words(mod: Any) -> str:
    if isinstance(mod, Bias):
        return f"add {'x'.join(str(size) for size in tensor(mod.operand.node).shape)} {mod.dtype}".replace("torch.", "")
    if isinstance(mod, Fill):
        return f"fill {mod.value:g} where {'not ' * mod.invert}{mod.condition.node.name}"
    if isinstance(mod, Floor):
        return f"at least {mod.value:g}"
    if isinstance(mod, Narrow):
        return f"rounded to {mod.dtype}".replace("torch.", "")
    if isinstance(mod, Zero):
        return f"weights zero where {'not ' * mod.invert}{mod.condition.node.name}"
    if isinstance(mod, Scale):
        return f"weights {'divided' if mod.divide else 'multiplied'} by {getattr(mod.factor, 'node', mod.factor)}"
    return operator_name(mod.node.target)


def _proof_in_words(site: CanonicalAttention, ended: Ended) -> tuple[str, ...]:
    """What was proved of the mask; if its structure was not, also the bounds at which searches ended."""
    proof = _proof(site)
    shaped = site.scores.is_causal or site.scores.band is not None or site.scores.isolated is not None
    return proof if shaped else tuple(map(ended.added_to, proof))


def _proof(site: CanonicalAttention) -> tuple[str, ...]:
    scores = site.scores
    if scores.is_causal and not site.is_causal:
        return (f"the mask is causal, and every row keeps a key: {scores.attended}",)
    if not scores.terms:
        return ()
    if scores.attended is not None:
        return (f"every row keeps a key: {scores.attended}",)
    if site.fused:
        return ("rows without a key: as in the source's call",)
    return (f"rows without a key cannot be ruled out, and keep the source's value ({scores.masked_rows.value})",)
