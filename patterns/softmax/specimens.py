"""Every specimen of softmax attention."""

from __future__ import annotations

from attnrewrite.patterns import perturbed
from attnrewrite.patterns.softmax import (
    assignments,
    isolated,
    normalizations,
    parts,
    score_functions,
    shared_keys,
    single_key,
    slices,
    spellings,
)

__all__ = ["SPECIMENS"]

SPECIMENS = (
    *spellings.SPECIMENS,
    *normalizations.SPECIMENS,
    *perturbed.SPECIMENS,
    *score_functions.SPECIMENS,
    *slices.SPECIMENS,
    *shared_keys.SPECIMENS,
    *single_key.SPECIMENS,
    *isolated.SPECIMENS,
    *parts.SPECIMENS,
    *assignments.SPECIMENS,
)
