"""How large the scores of attention are: the gradients of a fused kernel have their rounding (docs/exactness.md)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["digits_of_scores", "largest_score"]


def largest_score(run: Callable[[], object]) -> float:
    """The largest number that softmax is taken of while ``run`` runs; what is masked does not count."""
    scores = _Scores()
    with scores:
        run()
    return scores.largest


def digits_of_scores(largest: float, dtype: torch.dtype, device: str, roundings: int = 2) -> float:
    """The relative error that scores as large as ``largest`` leave to what is computed of them.

    On a CPU it is ``roundings`` of the largest. On a GPU the memory-efficient kernel multiplies float32 in three parts
    of TF32, and is off by 3 to 6 of them where the math kernel is off by less than one
    (docs/benchmarks/large_scores_h200_torch211.json).
    """
    return (roundings if device == "cpu" else 8) * torch.finfo(dtype).eps * largest


class _Scores(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.largest = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten._softmax.default, torch.ops.aten._log_softmax.default):
            self.largest = max(self.largest, float(_finite(args[0]).max()))
        return func(*args, **(kwargs or {}))


def _finite(scores: Tensor) -> Tensor:
    """Their sizes; masked ones are 0."""
    return torch.where(scores.isfinite() & (scores > -1e30), scores, 0.0).abs()
