"""The kernels, one file a family, and the registry that lists them in the order in which they are asked."""

from __future__ import annotations

from attnrewrite.kernels.base import Availability, Kernel, Verdict
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
    "Verdict",
    "is_fetched",
    "kernel_named",
    "made_ready",
    "register_kernel",
    "registered_kernels",
    "unregister_kernel",
]
