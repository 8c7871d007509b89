"""The attentions that ``attnrewrite bench sites`` measures, as a model might write them, with a float64 reference."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["GRIDS", "Case", "reference"]

_REFERENCE_BYTES = 2**28
"""The largest size of the reference's float64 scores at one time."""


@dataclass(frozen=True)
class Case:
    """One attention of the grid.

    Attributes:
        mask: "none", "causal", "window" (an eighth of the keys), "key padding" (a quarter of the keys, and one more for
            each entry of the batch), "additive" (a bias of the scores' full size) or "softcap" (with a causal mask).
        backward: whether the backward pass is timed as well.
    """

    batch: int
    heads: int
    queries: int
    head_dim: int
    keys: int = 0
    key_heads: int = 0
    mask: str = "none"
    dtype: str = "bfloat16"
    backward: bool = False

    def __str__(self) -> str:
        heads = f"{self.heads}/{self.key_heads}" if self.key_heads else f"{self.heads}"
        length = f"{self.queries}x{self.keys}" if self.keys else f"{self.queries}"
        passes = " backward" if self.backward else ""
        return f"{self.batch},{heads},{length},{self.head_dim} {self.mask} {self.dtype}{passes}"

    @property
    def score_bytes(self) -> int:
        """The size of the scores in float32."""
        return 4 * self.batch * self.heads * self.queries * (self.keys or self.queries)

    def inputs(self, device: torch.device) -> list[Tensor]:
        """Query, key, value and the inputs of the mask; the same numbers every time."""
        generator = torch.Generator(device).manual_seed(0)
        kind: Any = {"device": device, "generator": generator, "dtype": getattr(torch, self.dtype)}
        keys, key_heads = self.keys or self.queries, self.key_heads or self.heads
        query = torch.randn(self.batch, self.heads, self.queries, self.head_dim, **kind)
        key, value = (torch.randn(self.batch, key_heads, keys, self.head_dim, **kind) for _ in range(2))
        values = [part.requires_grad_(self.backward) for part in (query, key, value)]
        if self.mask == "key padding":
            lengths = torch.tensor([keys - keys // 4 - entry for entry in range(self.batch)], device=device)
            values.append(torch.arange(keys, device=device) < lengths[:, None])
        if self.mask == "additive":
            values.append(torch.randn(self.batch, self.heads, self.queries, keys, **kind))
        return values

    def attention(self, query: Tensor, key: Tensor, value: Tensor, *mask: Tensor) -> Tensor:
        """The attention as a model might write it."""
        if self.key_heads:
            key, value = (part.repeat_interleave(self.heads // self.key_heads, dim=1) for part in (key, value))
        scores = query @ key.transpose(-1, -2) * self.head_dim**-0.5
        rows = torch.arange(query.shape[-2], device=query.device)[:, None]
        columns = torch.arange(key.shape[-2], device=query.device)
        return self.masked(scores, rows, columns, *mask).softmax(-1) @ value

    def masked(self, scores: Tensor, rows: Tensor, columns: Tensor, *mask: Tensor) -> Tensor:
        """``scores`` of these positions under the mask."""
        if self.mask == "softcap":
            scores = 30.0 * torch.tanh(scores / 30.0)
        if self.mask in ("causal", "softcap"):
            scores = scores.masked_fill(columns > rows, -math.inf)
        elif self.mask == "window":
            reach = (self.keys or self.queries) // 8
            scores = scores.masked_fill((columns > rows) | (rows - columns >= reach), -math.inf)
        elif self.mask == "key padding":
            scores = scores.masked_fill(~mask[0][:, None, None, :], -math.inf)
        elif self.mask == "additive":
            scores = scores + mask[0]
        return scores


def _grid(shapes: Iterable[dict[str, Any]], masks: Sequence[str], dtypes: Sequence[str], **more: Any) -> list[Case]:
    return [
        Case(mask=mask, dtype=dtype, **more, **shape) for shape, mask, dtype in itertools.product(shapes, masks, dtypes)
    ]


def _shape(batch: int, heads: int, queries: int, head_dim: int, **more: int) -> dict[str, Any]:
    return {"batch": batch, "heads": heads, "queries": queries, "head_dim": head_dim, **more}


_MASKS = ("none", "causal", "key padding", "additive")
_HALF = ("bfloat16", "float16")
_MAIN = (
    _shape(2, 16, 1024, 64),
    _shape(1, 24, 4096, 128),
    _shape(1, 24, 16384, 128),
    _shape(2, 8, 4096, 40),
    _shape(2, 32, 2048, 128, key_heads=8),
    _shape(2, 10, 4096, 64, keys=77),
)
_OTHER = (
    _shape(8, 12, 512, 64),
    _shape(1, 16, 256, 64),
    _shape(4, 16, 1024, 80),
    _shape(2, 8, 1024, 160),
    _shape(1, 8, 2048, 256),
    _shape(16, 32, 1, 128, keys=2048, key_heads=8),
    _shape(1, 40, 8192, 128),
)
_BANDS = (_shape(1, 24, 4096, 128), _shape(2, 32, 2048, 128, key_heads=8), _shape(2, 16, 1024, 64))
_CPU = (_shape(2, 8, 256, 64), _shape(1, 8, 1024, 64), _shape(1, 8, 512, 128, key_heads=2), _shape(1, 8, 1024, 40))

GRIDS: dict[str, list[Case]] = {
    "small": _grid(_CPU, _MASKS, ("float32",)),
    "main": _grid(_MAIN, _MASKS, _HALF),
    "other": [
        *_grid(_OTHER, _MASKS, ("bfloat16",)),
        *_grid(_BANDS, ("window", "softcap"), ("bfloat16",)),
        *_grid((_MAIN[0], _MAIN[3]), _MASKS, ("float32",)),
    ],
    "training": _grid((*(_MAIN[place] for place in (0, 1, 3, 4, 5)), _OTHER[0]), _MASKS, ("bfloat16",), backward=True),
}
"""By name. "small" suits a CPU; "main", "other" and "training" a GPU."""


def reference(case: Case, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The output in float64, some rows of some heads at a time; with a backward pass the gradients, too."""
    query, key, value, *mask = (part.detach() for part in inputs)
    groups = case.heads // (case.key_heads or case.heads)
    parts = [part.double().requires_grad_(case.backward) for part in (query, key, value)]
    output = torch.empty_like(query, dtype=torch.float64)
    keys = key.shape[-2]
    some = max(1, _REFERENCE_BYTES // (8 * keys))
    columns = torch.arange(keys, device=query.device)
    gradients = [torch.zeros_like(part) for part in parts]
    for batch, head in itertools.product(range(case.batch), range(case.heads)):
        for first in range(0, case.queries, some):
            chosen = slice(first, first + some)
            own = [parts[0][batch, head, chosen], *(part[batch, head // groups] for part in parts[1:])]
            scores = own[0] @ own[1].transpose(-1, -2) * case.head_dim**-0.5
            rows = torch.arange(case.queries, device=query.device)[chosen, None]
            of_batch = [part[batch : batch + 1] for part in mask]
            if case.mask == "additive":
                of_batch = [mask[0][batch, head, chosen].double()]
            result = case.masked(scores, rows, columns, *of_batch).reshape(scores.shape).softmax(-1) @ own[2]
            output[batch, head, chosen] = result.detach()
            if case.backward:
                found = torch.autograd.grad(result, parts, result.detach())
                for total, part in zip(gradients, found, strict=True):
                    total += part
    return (output, *gradients) if case.backward else (output,)
