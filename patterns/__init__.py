"""The catalogue of attentions: one file a family, with its mathematics, its rule and its specimens side by side.

Every module of this package that has a ``PATTERN`` takes part, in the order of their ``precedence``. To add a spelling
of an attention that a family already reads, add a specimen to that family's file: tests find it by themselves. A
pattern that lives outside of this package takes part once it is registered (:func:`register_pattern`).
"""

from __future__ import annotations

from attnrewrite.ir.axes import Axis, Operand
from attnrewrite.ir.finding import Finding, NearMiss
from attnrewrite.ir.graph_view import GraphView
from attnrewrite.ir.site import AttentionSite, Bias, Fill, NotAttention, Scale
from attnrewrite.patterns.base import Pattern, Specimen
from attnrewrite.patterns.registry import PatternError, catalogue, register_pattern, specimens, unregister_pattern
from attnrewrite.patterns.site_builder import attention_site, call_arguments

__all__ = [
    "AttentionSite",
    "Axis",
    "Bias",
    "Fill",
    "Finding",
    "GraphView",
    "NearMiss",
    "NotAttention",
    "Operand",
    "Pattern",
    "PatternError",
    "Scale",
    "Specimen",
    "attention_site",
    "call_arguments",
    "catalogue",
    "must_not_match",
    "register_pattern",
    "specimens",
    "unregister_pattern",
]


def must_not_match() -> tuple[Specimen, ...]:
    """What must be left alone."""
    from attnrewrite.patterns.lookalikes import LOOKALIKES

    return tuple(LOOKALIKES)
