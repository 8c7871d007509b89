"""Every kernel by its name, in the order in which the automatic choice asks them."""

from __future__ import annotations

import difflib

from attnrewrite.errors import OptionError
from attnrewrite.kernels.base import Availability, Kernel
from attnrewrite.kernels.common.library_kernel import LibraryKernel
from attnrewrite.kernels.common.packages import HubKernel
from attnrewrite.kernels.flex import Flex, FlexFlash
from attnrewrite.kernels.isolated_block import IsolatedBlock
from attnrewrite.kernels.library_kernels import LIBRARY_KERNELS
from attnrewrite.kernels.single_key import SingleKey
from attnrewrite.kernels.torch_backends import CudnnAttention, EfficientAttention, FlashAttention
from attnrewrite.kernels.torch_sdpa import TorchMath, TorchSDPA

__all__ = ["is_fetched", "kernel_named", "made_ready", "register_kernel", "registered_kernels", "unregister_kernel"]

_BUILT_IN: tuple[Kernel, ...] = (
    SingleKey(),
    IsolatedBlock(),
    TorchSDPA(),
    FlashAttention(),
    EfficientAttention(),
    TorchMath(),
    Flex(),
    FlexFlash(),
    CudnnAttention(),
    *LIBRARY_KERNELS,
)
_KERNELS: dict[str, Kernel] = {kernel.name: kernel for kernel in _BUILT_IN}
_CONTRACT = ("name", "automatic", "needs", "availability", "supports", "emit")
_OWN = frozenset(_KERNELS)


def registered_kernels() -> tuple[Kernel, ...]:
    """Every kernel that attnrewrite knows, in the order of preference."""
    return tuple(_KERNELS.values())


def kernel_named(name: str, where: str = "") -> Kernel:
    """The kernel of that name.

    Raises:
        OptionError: there is none; the message lists those that exist.
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


def made_ready(kernel: Kernel, asked: bool) -> Availability:
    """Whether the kernel can be called now; one that was ``asked`` for by name is fetched if need be."""
    return kernel.prepare() if asked and isinstance(kernel, LibraryKernel) else kernel.availability()


def is_fetched(kernel: Kernel) -> bool:
    """Whether the kernel comes over a network, for which it must be asked for by name."""
    return isinstance(kernel, LibraryKernel) and isinstance(kernel.vendor, HubKernel)


def register_kernel(kernel: Kernel) -> None:
    """Adds a kernel of your own: an object that keeps the contract :class:`attnrewrite.kernels.Kernel`.

    It is asked before all others if its ``automatic`` is true, and otherwise where it is named.

    Raises:
        OptionError: the name is taken, or is "auto", or the object lacks a part of the contract, or it computes in
            lower precision and would be asked unasked.
    """
    missing = [name for name in _CONTRACT if not hasattr(kernel, name)]
    if missing:
        raise OptionError(f"register_kernel takes an object with {', '.join(_CONTRACT)}; {kernel!r} lacks {missing[0]}")
    if kernel.automatic and getattr(kernel, "lower_precision", False):
        raise OptionError(
            f"the kernel {kernel.name!r} has both automatic and lower_precision; set automatic to False, and let "
            "options['tolerance'] or its name choose it"
        )
    if kernel.name in _KERNELS or kernel.name == "auto":
        raise OptionError(f"the kernel name {kernel.name!r} is taken; choose another, or unregister_kernel it first")
    others = dict(_KERNELS)
    _KERNELS.clear()
    _KERNELS.update({kernel.name: kernel, **others})


def unregister_kernel(name: str) -> None:
    """Takes a kernel of your own away.

    Raises:
        OptionError: there is none of that name, or it is one of attnrewrite's.
    """
    kernel_named(name, "unregister_kernel")
    if name in _OWN:
        raise OptionError(f"{name!r} is one of attnrewrite's kernels; ask for others by options['kernels']")
    del _KERNELS[name]
