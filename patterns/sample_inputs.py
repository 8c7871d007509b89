"""Random inputs for specimens, and the decorator that collects specimens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from attnrewrite.patterns.base import Specimen

__all__ = ["SampleInput", "Specimens", "additive", "keep", "learned", "normal", "padding"]

F = TypeVar("F", bound=Callable[..., Any])
Size = int | str


@dataclass(frozen=True)
class SampleInput:
    """One input of a specimen.

    Attributes:
        draw: makes it from a generator and a sequence length.
        empty: for a mask: the value that masks a key, by which tests make rows that have no key.
    """

    draw: Callable[[torch.Generator, int], torch.Tensor]
    empty: float | None = None


def normal(*shape: Size, std: float = 1.0) -> SampleInput:
    """Standard normal numbers. A size of "L" is the sequence length, "S" another, that of the keys."""
    return SampleInput(lambda generator, length: std * torch.randn(_sizes(shape, length), generator=generator))


def learned(*shape: Size) -> SampleInput:
    """Weights, small enough that what they project keeps its size."""
    return normal(*shape, std=0.2)


def keep(*shape: Size, dtype: torch.dtype = torch.bool) -> SampleInput:
    """A mask that is true (or 1) for keys that count, among them the first of every row."""

    def draw(generator: torch.Generator, length: int) -> torch.Tensor:
        mask = torch.rand(_sizes(shape, length), generator=generator) < 0.7
        mask[..., 0] = True
        return mask.to(dtype)

    return SampleInput(draw, 0.0)


def padding(*shape: Size) -> SampleInput:
    """A mask that is true for keys that do not count, never the first of a row."""
    return SampleInput(lambda generator, length: ~keep(*shape).draw(generator, length), 1.0)


def additive(*shape: Size) -> SampleInput:
    """A mask that is minus infinity for keys that do not count, never the first of a row, and 0 elsewhere."""

    def draw(generator: torch.Generator, length: int) -> torch.Tensor:
        mask = keep(*shape).draw(generator, length)
        return torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)

    return SampleInput(draw, -torch.inf)


class Specimens(list[Specimen]):
    """Specimens in the order in which they stand in a file."""

    def add(self, *parts: SampleInput, **fields: Any) -> Callable[[F], F]:
        """Makes a specimen of the decorated function, which takes one tensor for each part."""
        if any(part.empty is not None for part in parts):
            fields["masked_rows"] = lambda inputs: tuple(
                value if part.empty is None else _with_empty_row(value, part.empty)
                for part, value in zip(parts, inputs, strict=True)
            )

        def collect(function: F) -> F:
            notes = " ".join((function.__doc__ or "").split())
            self.append(Specimen(function.__name__, function, lambda *at: _draw(parts, *at), notes=notes, **fields))
            return function

        return collect


def _draw(parts: tuple[SampleInput, ...], seed: int, length: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(part.draw(generator, length) for part in parts)


def _sizes(shape: tuple[Size, ...], length: int) -> list[int]:
    named = {"L": length, "S": length + 5}
    return [named[size] if isinstance(size, str) else size for size in shape]


def _with_empty_row(mask: torch.Tensor, value: float) -> torch.Tensor:
    mask = mask.clone()
    mask.view(-1, mask.shape[-1])[-1] = value
    return mask
