"""Stored tensors that may hold a known pattern: one number, a range, or a triangle (a causal mask)."""

from __future__ import annotations

import ctypes
import functools
import math
from dataclasses import dataclass

import torch

from attnrewrite.ir.bounds import BUFFER_ENTRIES

__all__ = ["StoredPattern", "Triangle", "tensor_bytes"]


@dataclass
class Triangle:
    """A matrix that holds ``inside`` where column <= row + ``diagonal`` and ``outside`` elsewhere."""

    inside: float
    outside: float
    diagonal: int


@dataclass
class StoredPattern:
    """A stored tensor; ``was_read`` if the rewriting relies on its contents, so that a guard must watch it.

    A tensor without dimensions may well change from step to step, such as a temperature or a counter, so that only
    :attr:`number` reads it.
    """

    tensor: torch.Tensor
    was_read: bool = False

    @property
    def pattern(self) -> float | range | Triangle | None:
        """The number, range or triangle that the tensor holds, or None; any other answer than None counts as read."""
        return self._pattern if self.tensor.dim() and BUFFER_ENTRIES.allows(self.tensor.numel()) else None

    @property
    def number(self) -> float | None:
        """The one number that the tensor holds, or None; any other answer than None counts as read."""
        found = self.pattern if self.tensor.dim() else self._pattern
        return found if isinstance(found, float) else None

    @functools.cached_property
    def _pattern(self) -> float | range | Triangle | None:
        found = _pattern_of(self.tensor.detach().cpu())
        self.was_read = self.was_read or found is not None
        return found

    @property
    def was_looked_at(self) -> bool:
        """Whether anything was asked of the contents, whatever the answer."""
        return not {"_pattern", "_largest"}.isdisjoint(self.__dict__)

    def holds_only_up_to(self, size: float) -> bool:
        """Whether no absolute value is above ``size``; True counts as read."""
        if self.tensor.dim() and BUFFER_ENTRIES.allows(self.tensor.numel()) and self._largest <= size:
            self.was_read = True
            return True
        return False

    @functools.cached_property
    def _largest(self) -> float:
        # abs() does not take bool, and of the lowest integer it is negative.
        values = self.tensor.detach()
        values = values if values.is_complex() else values.float()
        return float(values.abs().amax().nan_to_num(math.inf))


def _pattern_of(values: torch.Tensor) -> float | range | Triangle | None:
    """The pattern that a tensor on the CPU holds, a range along its last dimension; None if it holds none of them."""
    first = values.flatten()[0]
    if bool((values == first).all()):
        return float(first)
    counts = not (values.dtype.is_floating_point or values.dtype.is_complex or values.dtype is torch.bool)
    if counts and values.shape[-1] == values.numel():
        stop = int(first) + values.numel()
        # Compared as int64, where nothing wraps.
        counted = torch.equal(values.flatten().long(), torch.arange(int(first), stop))
        return range(int(first), stop) if counted else None
    if values.dim() < 2 or values[(0,) * (values.dim() - 2)].numel() != values.numel():
        return None
    matrix = values[(0,) * (values.dim() - 2)]
    outside, inside = matrix[0, -1], matrix[-1, 0]
    diagonal = int((matrix[0] != outside).sum()) - 1
    triangle = torch.ones(matrix.shape, dtype=torch.bool).tril(diagonal)
    if not torch.equal(torch.where(triangle, inside, outside), matrix):
        return None
    return Triangle(float(inside), float(outside), diagonal)


def tensor_bytes(value: torch.Tensor) -> bytes:
    """The numbers of a tensor with strides, in the order of its positions."""
    plain = value.detach().cpu().resolve_conj().resolve_neg().contiguous()
    return ctypes.string_at(plain.data_ptr(), plain.numel() * plain.element_size()) if plain.numel() else b""
