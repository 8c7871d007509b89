"""Other roundings: what a result may differ by for reasons of arithmetic alone.

``Reordered`` is another order of summation, which counts where a large number takes the digits of those beside it.
``Rounded`` rounds each result otherwise, which counts in the difference of two results that are equal by formula.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["TF32", "Reordered", "Rounded"]

TF32 = 2.0**-11
"""What GPU kernels round the operands of a product to that is computed in float32."""

aten = torch.ops.aten

_SUMS = {
    aten.add.Tensor: 1,
    aten.add_.Tensor: 1,
    aten.sub.Tensor: -1,
    aten.sub_.Tensor: -1,
}


class Reordered(TorchDispatchMode):
    """Adds a part of the smaller summand to the larger one first, and the rest to their sum.

    The scores of a row to which -1e6 is added are multiples of 1/16 in float32: which ones is a matter of whether the
    mask or a bias is added first. Beside -1e9 they are zero in any order.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._generator = torch.Generator().manual_seed(seed)

    def __torch_dispatch__(
        self, func: OpOverload, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        sign = _SUMS.get(func)
        if sign is None or kwargs or not all(isinstance(arg, Tensor) and arg.is_floating_point() for arg in args):
            return func(*args, **(kwargs or {}))
        result = self._sum(args[0], sign * args[1])
        return args[0].copy_(result) if func in (aten.add_.Tensor, aten.sub_.Tensor) else result

    def _sum(self, a: Tensor, b: Tensor) -> Tensor:
        smaller = torch.where(a.abs() < b.abs(), a, b)
        larger = torch.where(a.abs() < b.abs(), b, a)
        share = torch.rand(smaller.shape, generator=self._generator).to(smaller)
        first = smaller * share
        return (larger + first) + (smaller - first)


_FACTORS = {aten.mm: (0, 1), aten.bmm: (0, 1), aten.addmm: (1, 2), aten.baddbmm: (1, 2)}
"""Where the operands stand whose product is summed."""
_CALLS = frozenset(getattr(aten, name) for name in dir(aten) if name.startswith("_scaled_dot_product"))
_ROUNDED = frozenset(
    {
        *(*_FACTORS, *_CALLS, aten.add, aten.sub, aten.rsub, aten.mul, aten.div),
        *(aten.exp, aten.sum, aten.mean, aten._softmax, aten._softmax_backward_data),
    }
)


class Rounded(TorchDispatchMode):
    """Multiplies each result of arithmetic by numbers that are as far from one as a rounding is.

    Two results of one formula, such as those of two kernels, differ by as much. Numbers above 64 stay: masks are exact,
    and which key a row without one attends must not depend on this.

    Args:
        seed: of the random numbers.
        products: how far the operands of products in float32 are moved, relative to each (default: not at all).
            Whole numbers stay, since a mask may be a product of them.
    """

    def __init__(self, seed: int, products: float = 0.0) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._generator = torch.Generator().manual_seed(seed)
        self._products = products

    def __torch_dispatch__(
        self, func: OpOverload, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        packet = func.overloadpacket
        if self._products:
            operands = (0, 1, 2) if packet in _CALLS else _FACTORS.get(packet, ())
            args = [self._operand(arg) if place in operands else arg for place, arg in enumerate(args)]
        results = func(*args, **(kwargs or {}))
        if packet not in _ROUNDED:
            return results
        if isinstance(results, Tensor):
            return self._rounded(results)
        # Behind the first stand statistics, which a backward pass takes as they are.
        return (self._rounded(results[0]), *results[1:])

    def _operand(self, value: Tensor) -> Tensor:
        if value.dtype is not torch.float32:
            return value
        noise = torch.randn(value.shape, generator=self._generator).to(value)
        return torch.where(value == value.round(), value, value * (1 + self._products * noise))

    def _rounded(self, result: Tensor) -> Tensor:
        if not result.is_floating_point():
            return result
        noise = torch.randn(result.shape, generator=self._generator).to(result)
        return torch.where(result.abs() <= 64, result * (1 + torch.finfo(result.dtype).eps * noise), result)
