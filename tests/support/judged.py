"""What a rewritten function gives, held against the formula of its source."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from attnrewrite.numerics.judge import disagreements
from tests.support.helpers import outputs
from tests.support.reference import Reference, wide

__all__ = ["disagreement_with_formula"]


def disagreement_with_formula(
    source: Callable[..., Any], new: Any, own: Any, inputs: Sequence[Any], dtype: torch.dtype, roundings: float = 4.0
) -> str:
    """What is wrong with the results ``new``, in words; empty if nothing is.

    Args:
        source: the function as it is written.
        new, own: what its rewritten form gives for the inputs, and what itself does.
        inputs: the inputs of the call; in half precision their formula is evaluated in float64.
        dtype: the dtype that the source computes in.
        roundings: as for :func:`attnrewrite.numerics.judge.disagreement`.
    """
    with Reference():
        truth = [wide(value) for value in outputs(source(*Reference.given(tuple(inputs))))]
    return disagreements(outputs(new), outputs(own), truth, dtype, roundings=roundings)
