"""The IR: what nodes, operators, axes and attention sites are.

What a pattern or a kernel of one's own is written with is here, too.
"""

from __future__ import annotations

from attnrewrite.ir.axes import Axis, Layout, Operand
from attnrewrite.ir.builder import Builder
from attnrewrite.ir.nodes import Size, same, same_shape, tensor
from attnrewrite.ir.site import AttentionSite, CanonicalAttention, MaskedRows

__all__ = [
    "AttentionSite",
    "Axis",
    "Builder",
    "CanonicalAttention",
    "Layout",
    "MaskedRows",
    "Operand",
    "Size",
    "same",
    "same_shape",
    "tensor",
]
