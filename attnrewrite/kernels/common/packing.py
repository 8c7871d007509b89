"""Batches laid end to end, for kernels that take sequences of different lengths."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Packed"]


@dataclass(frozen=True)
class Packed:
    """Query, key and value, (batch * length, heads, features), and where each sequence begins.

    With a mask the kept keys stand first, those of one sequence side by side; the others are at the end, where no
    sequence reaches. Softmax does not depend on the order of the keys. Every size is that of the operands, so that
    nothing waits for the device and a CUDA graph can hold it.

    Attributes:
        starts_q, starts_k: (batch + 1) int32, cumulative lengths.
        longest_q, longest_k: upper bounds of the lengths.
        order: (batch * keys) which key stands where; None if they were not moved.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    starts_q: Tensor
    starts_k: Tensor
    longest_q: int
    longest_k: int
    order: Tensor | None

    @staticmethod
    def of(query: Tensor, key: Tensor, value: Tensor, keep: Tensor | None) -> Packed:
        """
        Args:
            query, key, value: (batch, length, heads, features).
            keep: (batch, keys) bool, or None to keep every key.
        """
        batch, queries, keys = query.shape[0], query.shape[1], key.shape[1]
        offsets = torch.arange(batch + 1, dtype=torch.int32, device=query.device)
        flat_key, flat_value = key.flatten(0, 1), value.flatten(0, 1)
        starts_k, order = offsets * keys, None
        if keep is not None:
            lengths = keep.sum(dim=1, dtype=torch.int32)
            starts_k = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
            order = torch.argsort(keep.flatten().logical_not(), stable=True)
            flat_key, flat_value = flat_key[order], flat_value[order]
        return Packed(query.flatten(0, 1), flat_key, flat_value, offsets * queries, starts_k, queries, keys, order)

    def unpacked_gradients(self, gradients: Sequence[Tensor], like: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Gradients of the packed query, key and value as gradients of those, which ``like`` are."""
        query, key, value = gradients
        if self.order is not None:
            # Kernels leave what no sequence reaches as it was: memory that nothing was written to.
            reached = torch.arange(len(self.order), device=key.device) < self.starts_k[-1]
            key, value = (part.where(reached[:, None, None], 0) for part in (key, value))
            key, value = (torch.empty_like(part).index_copy_(0, self.order, part) for part in (key, value))
        return tuple(part.reshape(own.shape) for part, own in zip((query, key, value), like, strict=True))
