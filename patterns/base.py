"""What a pattern is, and what a specimen is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from attnrewrite.ir.finding import Finding
from attnrewrite.ir.graph_view import GraphView

__all__ = ["Pattern", "Specimen"]


class Pattern(Protocol):
    """A family of attention.

    ``precedence`` orders patterns (lower looks first); ``find`` reads a graph and yields what it recognizes.
    """

    name: str
    precedence: int
    specimens: Sequence[Specimen]

    def find(self, view: GraphView) -> Iterator[Finding]: ...


@dataclass(frozen=True)
class Specimen:
    """A spelling that people really write, runnable.

    Attributes:
        name: unique within the catalogue.
        function: takes the tensors of ``inputs`` and returns tensors.
        inputs: makes fresh random inputs for (seed, length), float32 where they are floating; ``length`` is a sequence
            length, by which the dynamic-shape tests vary the shapes.
        sites: how many attentions must be found and rewritten; 0 for one that must be left alone.
        status: what the report says of them: "rewritten", or "recognized" for what is in its best form already.
        reason: for one that must be left alone: a piece of the reason that the report must give; empty when it must
            not appear in the report at all.
        dynamic: whether ``length`` may vary under ``dynamic=True``.
        gradients: whether its gradients in its floating inputs are numbers to compare with.
        only_cpu: whether its operators exist for the CPU alone.
        masked_rows: for one that takes masks: given its inputs, the same with rows that have no key.
        notes: where it is met.
    """

    name: str
    function: Callable[..., Any]
    inputs: Callable[[int, int], tuple[Any, ...]]
    sites: int = 1
    status: Literal["rewritten", "recognized"] = "rewritten"
    reason: str = ""
    dynamic: bool = True
    gradients: bool = True
    only_cpu: bool = False
    masked_rows: Callable[[tuple[Any, ...]], tuple[Any, ...]] | None = None
    notes: str = field(default="", compare=False)
