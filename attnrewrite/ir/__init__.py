"""The IR: nodes, operators, axes, views, products and attention sites.

The names below are public: custom patterns and kernels are written with them.
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
