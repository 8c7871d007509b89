"""The kernels, one file a family, and the registry that lists them in the order in which they are asked."""

from __future__ import annotations

from attnrewrite.kernels.base import Availability, Kernel, Verdict
from attnrewrite.kernels.flex import Flex
from attnrewrite.kernels.torch_sdpa import TorchMath, TorchSDPA

__all__ = ["Availability", "Kernel", "Verdict", "registered_kernels"]

_KERNELS: list[Kernel] = [TorchSDPA(), TorchMath(), Flex()]


def registered_kernels() -> tuple[Kernel, ...]:
    """Every kernel that attnrewrite knows, in the order of preference."""
    return tuple(_KERNELS)
