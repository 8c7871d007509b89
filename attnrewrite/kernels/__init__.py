"""The kernels, one file a family, and the registry that lists them in the order in which they are asked.

What a kernel of one's own is made with is here, too: docs/own_kernel.md.
"""

from __future__ import annotations

from attnrewrite.kernels.common.base import Kernel
from attnrewrite.kernels.common.layout import KernelLayout, lay_out, modified
from attnrewrite.kernels.common.mask import Mask
from attnrewrite.kernels.common.verdict import Availability, Verdict
from attnrewrite.kernels.registry import kernel_named, register_kernel, registered_kernels, unregister_kernel

Plan = KernelLayout
"""Its earlier name, for the kernels of users that were written with it."""

__all__ = [
    "Availability",
    "Kernel",
    "KernelLayout",
    "Mask",
    "Plan",
    "Verdict",
    "kernel_named",
    "lay_out",
    "modified",
    "register_kernel",
    "registered_kernels",
    "unregister_kernel",
]
