"""What a kernel is: a name, an answer for a site, and the calls that it puts in the site's place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import fx

    from attnrewrite.ir.builder import Builder
    from attnrewrite.ir.site import AttentionSite

__all__ = ["Availability", "Kernel", "Verdict"]


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


@dataclass(frozen=True)
class Availability:
    """Whether a kernel can run on this machine at all; ``detail`` says what was found or what is missing."""

    available: bool
    detail: str


class Kernel(Protocol):
    """A fused attention kernel.

    ``automatic``: it is asked for sites that nobody asked for another kernel at; otherwise it serves by name only.
    It may have an attribute ``lower_precision``, true of a kernel that computes in fewer bits than its operands have:
    such a one is not ``automatic``, and serves by name or within ``options["tolerance"]``.
    Another is ``keeps_scores``, true of one that writes the scores to memory: it is chosen unasked only where no other
    kernel is willing. A third is a method ``concerns(site)``: where it gives False the kernel is asked only by name.
    ``takes_unbacked``, if true, lets it be asked where a number of queries or keys depends on the data (``nonzero``).
    A method ``skips_masked(site)`` says whether it leaves out the blocks of scores that the mask takes away altogether;
    one without it is not asked to compute whole what the source computes in windows.
    ``needs`` says in a few words what must be there for it to run.
    ``supports`` decides from the site alone and touches no data. ``emit`` writes the call at the builder's insertion
    point and returns the output with the shape and dtype of the source's result.
    """

    name: str
    automatic: bool
    needs: str

    def availability(self) -> Availability: ...

    def supports(self, site: AttentionSite) -> Verdict: ...

    def emit(self, site: AttentionSite, builder: Builder) -> fx.Node: ...
