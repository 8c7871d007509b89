"""Another order of summation: what a result may differ by where a large number takes the digits of those beside it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["Reordered"]

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
