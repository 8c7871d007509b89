"""The kernels, one file a family, and the registry that lists them in the order in which they are asked.

What a kernel of one's own is made with is here, too: docs/own_kernel.md.
"""

from __future__ import annotations

from attnrewrite.kernels.base import Availability, Kernel, Verdict
from attnrewrite.kernels.common.layout import Plan, lay_out, modified
from attnrewrite.kernels.common.mask import Mask
from attnrewrite.kernels.registry import (
    is_fetched,
    kernel_named,
    made_ready,
    register_kernel,
    registered_kernels,
    unregister_kernel,
)

__all__ = [
    "Availability",
    "Kernel",
    "Mask",
    "Plan",
    "Verdict",
    "is_fetched",
    "kernel_named",
    "lay_out",
    "made_ready",
    "modified",
    "register_kernel",
    "registered_kernels",
    "unregister_kernel",
]
