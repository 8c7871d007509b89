"""Why something is not so: one type for what is fine without a word, and otherwise says why it is not."""

from __future__ import annotations

from typing import NewType

__all__ = ["FINE", "Reason"]

Reason = NewType("Reason", str)
"""Why not, as a part of a sentence that a user can act on; empty, and so false, where there is nothing against it."""

FINE = Reason("")
