"""One processor of the table, and the ways in which it is used there."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

__all__ = ["DATA_SIZES", "STRUCTURES", "Model", "Processor", "Use"]

STRUCTURES: Mapping[str, str] = {
    "plain": "one attention, written out or one call",
    "sliced": "slices of one attention, written into a buffer by a loop",
    "cross-frame": "keys and values of one frame for all frames",
    "perturbed": "part of the batch is attended, part is not or only in part (PAG)",
    "joint": "keys and values of two inputs in one softmax, or one projection for several",
    "ip-adapter": "a sum of attentions of one query",
    "rotated": "normalized, rotated or grouped before one attention",
    "adapted": "projections with adapters (LoRA)",
    "linear": "no softmax: products in either order",
    "device": "the call of a library or device",
}


DATA_SIZES: Mapping[str, Any] = {"capture_dynamic_output_shape_ops": True}
"""Without it ``nonzero`` breaks the graph."""


@dataclass(frozen=True)
class Use:
    """One host of a processor's real class, and calls of it.

    Attributes:
        sites: the attentions that it has by its mathematics, counted by hand: slices of one attention are one.
        build: makes the host, with the processor set.
        inputs: the keyword arguments of a call, for a seed.
        seeds: more than one, so that an error that needs certain numbers has more than one chance.
        dynamo: what is set in ``torch._dynamo.config`` where the source would break the graph otherwise.
        allowed: how many calls of an ATen operator the best form has, where it has fewer of them than the source.
    """

    name: str
    sites: int
    build: Callable[[], nn.Module]
    inputs: Callable[[int], dict[str, Any]]
    allowed: Mapping[str, int] = field(default_factory=dict)
    seeds: tuple[int, ...] = (0, 1, 2)
    dynamo: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Model(Use):
    """A whole model; ``form`` says what its attentions run under."""

    form: str = ""


@dataclass(frozen=True)
class Processor:
    """A row. ``arguments`` make an instance where its state is asked for.

    ``needs``: the library or device without which it does not run as it is meant to, and what calls it.
    ``instead``: what is measured where it cannot run, with a sentence that says why that tells something.
    ``proved``: what is proved of the call that cannot run, with the test that does it.
    """

    name: str
    structure: str
    uses: tuple[Use, ...] = ()
    arguments: Mapping[str, Any] = field(default_factory=dict)
    needs: str = ""
    instead: str = ""
    proved: str = ""
