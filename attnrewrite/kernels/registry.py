"""Every kernel by its name, in the order in which the automatic choice asks them.

Importing this imports none of the other packages that kernels are from.
"""

from __future__ import annotations

import difflib

from attnrewrite.errors import OptionError
from attnrewrite.kernels.aiter import AITER_KERNELS
from attnrewrite.kernels.common.base import Kernel
from attnrewrite.kernels.common.custom_ops import define_operators
from attnrewrite.kernels.common.library_kernel import LibraryKernel
from attnrewrite.kernels.contract import KernelLike, checked
from attnrewrite.kernels.flash import FLASH_KERNELS
from attnrewrite.kernels.flex import Flex, FlexFlash
from attnrewrite.kernels.isolated_block import IsolatedBlock
from attnrewrite.kernels.npu import NPU_KERNELS
from attnrewrite.kernels.sage import SAGE_KERNELS
from attnrewrite.kernels.single_key import SingleKey
from attnrewrite.kernels.torch_backends import CudnnAttention, EfficientAttention, FlashAttention
from attnrewrite.kernels.torch_sdpa import TorchMath, TorchSDPA
from attnrewrite.kernels.torch_varlen import VARLEN_KERNELS
from attnrewrite.kernels.xformers import XFORMERS_KERNELS
from attnrewrite.kernels.xla import XLA_KERNELS

__all__ = [
    "LIBRARY_KERNELS",
    "added_kernels",
    "kernel_named",
    "register_kernel",
    "registered_kernels",
    "unregister_kernel",
]

LIBRARY_KERNELS: tuple[LibraryKernel, ...] = (
    *FLASH_KERNELS,
    *VARLEN_KERNELS,
    *XFORMERS_KERNELS,
    *AITER_KERNELS,
    *NPU_KERNELS,
    *XLA_KERNELS,
    *SAGE_KERNELS,
)
"""The kernels of other packages."""

# At import, so that a compiled graph that was stored can be loaded without this process having compiled one.
for _kernel in LIBRARY_KERNELS:
    define_operators(_kernel)

_BUILT_IN: tuple[Kernel, ...] = (
    SingleKey(),
    IsolatedBlock(),
    TorchSDPA(),
    CudnnAttention(),
    FlashAttention(),
    EfficientAttention(),
    TorchMath(),
    Flex(),
    FlexFlash(),
    *LIBRARY_KERNELS,
)
_KERNELS: dict[str, Kernel] = {kernel.name: kernel for kernel in _BUILT_IN}
_OWN = frozenset(_KERNELS)


def registered_kernels() -> tuple[Kernel, ...]:
    """Every kernel that attnrewrite knows, in the order of preference."""
    return tuple(_KERNELS.values())


def added_kernels() -> tuple[Kernel, ...]:
    """The kernels of users."""
    return tuple(kernel for name, kernel in _KERNELS.items() if name not in _OWN)


def kernel_named(name: str, where: str = "") -> Kernel:
    """The kernel of that name.

    Raises:
        OptionError: there is none of that name; the message lists those that exist.
    """
    if name not in _KERNELS:
        prefix = f"{where}: " if where else ""
        raise OptionError(
            f"{prefix}unknown kernel {name!r}{_near(name)}; attnrewrite doctor says which kernels can run here",
            f"There are auto and, by what they need:\n{_by_needs()}",
        )
    return _KERNELS[name]


def _near(name: str) -> str:
    # Case is what people get wrong most; compare without it.
    known = {known.lower(): known for known in _KERNELS}
    near = [repr(known[match]) for match in difflib.get_close_matches(name.lower(), known)]
    return f" (did you mean {' or '.join(near)}?)" if near else ""


def _by_needs() -> str:
    """A line for each need, with the kernels that have it."""
    names: dict[str, list[str]] = {}
    for kernel in _KERNELS.values():
        names.setdefault(kernel.needs, []).append(kernel.name)
    return "\n".join(f"  {', '.join(kernels)}: {needs}" for needs, kernels in names.items())


def register_kernel(kernel: Kernel | KernelLike) -> None:
    """Adds a kernel of your own: a subclass of :class:`attnrewrite.kernels.Kernel`, or an object with the same parts.

    If its ``automatic`` is true it is asked before all others; otherwise it serves only where it is named.

    Raises:
        OptionError: the name is taken, or is "auto"; an attribute is missing, misspelled or of a wrong type; a method
            takes other arguments; or the kernel is both ``automatic`` and of ``lower_precision``.
    """
    kernel = checked(kernel)
    if kernel.name in _KERNELS or kernel.name == "auto":
        raise OptionError(f"the kernel name {kernel.name!r} is taken; choose another, or unregister_kernel it first")
    others = dict(_KERNELS)
    _KERNELS.clear()
    _KERNELS.update({kernel.name: kernel, **others})


def unregister_kernel(name: str) -> None:
    """Removes a kernel of your own.

    Raises:
        OptionError: there is none of that name, or it is one of attnrewrite's.
    """
    kernel_named(name, "unregister_kernel")
    if name in _OWN:
        raise OptionError(f"{name!r} is one of attnrewrite's kernels; ask for others by options['kernels']")
    del _KERNELS[name]
