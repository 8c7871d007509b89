"""What a kernel answers: whether it takes a site, and whether it can run on this machine."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Availability", "Refusal", "Verdict"]

Refusal = str | None
"""Why not, as a sentence that a user can act on; None where nothing is in the way. Never empty."""


@dataclass(frozen=True)
class Verdict:
    """Yes, or no with a sentence that a user can act on."""

    willing: bool
    reason: str = ""

    @staticmethod
    def yes(reason: str = "") -> Verdict:
        return Verdict(True, reason)

    @staticmethod
    def no(reason: str) -> Verdict:
        return Verdict(False, reason)

    @staticmethod
    def of(refusal: Refusal) -> Verdict:
        return Verdict.yes() if refusal is None else Verdict.no(refusal)


@dataclass(frozen=True)
class Availability:
    """Whether a kernel can run on this machine at all; ``detail`` says what was found or what is missing."""

    available: bool
    detail: str
