"""Every kernel of another package, in the order of preference, and its operators.

Importing this imports none of the packages.
"""

from __future__ import annotations

from attnrewrite.kernels.aiter import AITER_KERNELS
from attnrewrite.kernels.common.custom_ops import define_operators
from attnrewrite.kernels.common.library_kernel import LibraryKernel
from attnrewrite.kernels.flash import FLASH_KERNELS
from attnrewrite.kernels.npu import NPU_KERNELS
from attnrewrite.kernels.sage import SAGE_KERNELS
from attnrewrite.kernels.torch_varlen import VARLEN_KERNELS
from attnrewrite.kernels.xformers import XFORMERS_KERNELS
from attnrewrite.kernels.xla import XLA_KERNELS

__all__ = ["LIBRARY_KERNELS"]

LIBRARY_KERNELS: tuple[LibraryKernel, ...] = (
    *FLASH_KERNELS,
    *VARLEN_KERNELS,
    *XFORMERS_KERNELS,
    *AITER_KERNELS,
    *NPU_KERNELS,
    *XLA_KERNELS,
    *SAGE_KERNELS,
)

# At import, so that a compiled graph that was stored can be loaded without this process having compiled one.
for _kernel in LIBRARY_KERNELS:
    define_operators(_kernel)
