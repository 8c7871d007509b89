"""The type of reasons: a string that says why something cannot be done, or is empty if it can."""

from __future__ import annotations

from typing import NewType

__all__ = ["FINE", "Reason"]

Reason = NewType("Reason", str)
"""Why not, as part of a sentence that a user can act on; empty, and so false, if there is no obstacle."""

FINE = Reason("")
