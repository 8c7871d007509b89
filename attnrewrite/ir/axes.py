"""Axes, layouts and operands: which axes of an attention each dimension of a tensor holds."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from attnrewrite.ir.nodes import Size, product, same, same_shape, tensor

__all__ = ["Axis", "Layout", "Operand", "axes_of", "broadcast", "fresh_layout", "size_of", "take_minor"]


class Axis:
    """An index range of an attention, compared by identity; ``parts`` is (major, minor) once it was divided."""

    __slots__ = ("name", "parts", "size")

    def __init__(self, size: Size, name: str = "") -> None:
        self.size = size
        self.name = name
        self.parts: tuple[Axis, ...] | None = None

    def leaves(self) -> tuple[Axis, ...]:
        """The undivided axes that the axis consists of, major to minor: the axis itself if it was not divided."""
        if self.parts is None:
            return (self,)
        return tuple(leaf for part in self.parts for leaf in part.leaves())

    def divide(self, minor: Size) -> tuple[Axis, Axis] | None:
        """Divides the axis in place into (major, minor); None if its size may not be a multiple of ``minor``."""
        assert self.parts is None
        if isinstance(minor, int) and minor == 0:
            return None
        major = self.size // minor
        if not same(major * minor, self.size):
            return None
        self.parts = (Axis(major, self.name), Axis(minor, self.name))
        return self.parts[0], self.parts[1]

    def __repr__(self) -> str:
        return f"{self.name or 'axis'}:{self.size}" if self.parts is None else repr(self.parts)


Dim = tuple[Axis, ...]

Layout = tuple[Dim, ...]


def resolve(layout: Iterable[Dim]) -> Layout:
    """The layout with each divided axis replaced by its parts."""
    return tuple(dim if _is_undivided(dim) else _leaves(dim) for dim in layout)


def _is_undivided(dim: Dim) -> bool:
    return all(axis.parts is None for axis in dim)


def _leaves(dim: Dim) -> Dim:
    return tuple(leaf for axis in dim for leaf in axis.leaves())


def axes_of(layout: Iterable[Dim]) -> tuple[Axis, ...]:
    """The undivided axes of a layout, major to minor: the memory order of a contiguous tensor."""
    return tuple(axis for dim in resolve(layout) for axis in dim)


def size_of(dim: Dim) -> Size:
    return product([axis.size for axis in dim])


def fresh_layout(shape: Sequence[Size], name: str = "") -> Layout:
    """A layout with a new axis for each dimension; dimensions of size one hold no axis."""
    return tuple(fresh_dim(size, name) for size in shape)


def fresh_dim(size: Size, name: str = "") -> Dim:
    return () if same(size, 1) else (Axis(size, name),)


@dataclass(frozen=True)
class Operand:
    """A tensor of an attention: a node, and the axes that each of its dimensions holds."""

    node: fx.Node
    layout: Layout

    def resolved(self) -> Operand:
        """The operand with each divided axis of its layout replaced by its parts."""
        return Operand(self.node, resolve(self.layout))

    @property
    def axes(self) -> tuple[Axis, ...]:
        return axes_of(self.layout)

    @property
    def dtype(self) -> torch.dtype:
        return tensor(self.node).dtype


# Regrouping: the same elements in the same order, in other dimensions.


def regroup(layout: Layout, shape: Sequence[Size]) -> Layout | None:
    """The layout after a reshape to ``shape``; None if an axis would have to be divided that cannot be."""
    axes = list(axes_of(layout))
    result: list[Dim] = []
    for size in reversed(shape):
        dim = take_minor(axes, size)
        if dim is None:
            return None
        result.append(dim)
    return None if axes else tuple(reversed(result))


def take_minor(axes: list[Axis], size: Size) -> Dim | None:
    """Removes from the end of ``axes`` those whose sizes multiply to ``size``, and returns them, major to minor.

    Divides the last one if it is too large. None if that is not possible for every size.
    """
    taken: list[Axis] = []
    rest = size
    while not same(rest, 1):
        if not axes:
            return None
        axis = axes[-1]
        if same(axis.size, rest):
            taken.append(axes.pop())
            rest = 1
        elif _is_multiple(rest, axis.size):
            taken.append(axes.pop())
            rest = rest // axis.size
        else:
            divided = axis.divide(rest)
            if divided is None:
                return None
            axes[-1] = divided[0]
            taken.append(divided[1])
            rest = 1
    return tuple(reversed(taken))


def _is_multiple(size: Size, of: Size) -> bool:
    return not (isinstance(of, int) and of == 0) and same(size // of * of, size)


def broadcast(layout: Layout, shape: Sequence[Size], operand_shape: Sequence[Size]) -> Layout | None:
    """The layout of an operand that broadcasts to a result of ``layout`` and ``shape``; None if it may not."""
    if len(operand_shape) > len(shape):
        return None
    offset = len(shape) - len(operand_shape)
    result: list[Dim] = []
    for dim, size, own in zip(layout[offset:], shape[offset:], operand_shape, strict=True):
        if same(own, size):
            result.append(dim)
        elif same(own, 1):
            result.append(())
        else:
            return None
    return tuple(result)


def same_layout(a: Layout, b: Layout) -> bool:
    return resolve(a) == resolve(b)


def shape_of(layout: Layout) -> tuple[Size, ...]:
    return tuple(size_of(dim) for dim in resolve(layout))


def fits(operand: Operand) -> bool:
    """Whether the layout agrees with the shape of its node: a check for tests and assertions."""
    return same_shape(shape_of(operand.layout), tensor(operand.node).shape)
