"""What a kernel is: a name, an answer for a site, and the calls that it puts in the site's place."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

from attnrewrite.kernels.common.limits import Limits
from attnrewrite.kernels.common.packages import HubKernel, Vendor
from attnrewrite.kernels.common.verdict import Availability, Verdict

if TYPE_CHECKING:
    from torch import fx

    from attnrewrite.ir.builder import Builder
    from attnrewrite.ir.site import CanonicalAttention

__all__ = ["Kernel"]


class Kernel(ABC):
    """A fused attention kernel. A subclass sets ``name`` and ``needs``, and writes the three abstract methods.

    The attributes below, and the public methods, are all that attnrewrite reads of a kernel. ``register_kernel`` checks
    them (:mod:`attnrewrite.kernels.contract`).
    """

    name: str
    """What users ask for and reports show."""

    needs: str
    """What must be there for it to run, in a few words."""

    automatic: bool = False
    """It is asked at every site for which the user named no kernel; otherwise it serves by name only."""

    lower_precision: bool = False
    """It computes in fewer bits than its operands have. It cannot be ``automatic``, and serves by name or within
    ``options["tolerance"]``."""

    keeps_scores: bool = False
    """It writes the scores to memory. Unless it is named, it serves only where no other kernel is willing."""

    takes_unbacked: bool = False
    """It may be asked where a number of queries or keys depends on the data (``nonzero``)."""

    computes_less: bool = False
    """It serves special cases, in which it computes less than any other kernel: there it comes first, untimed."""

    emits_aten: bool = False
    """Its calls are operators of PyTorch's own, so that an exported program with them can be loaded without
    attnrewrite. What surrounds them, such as gradients of rows without a key, may not be."""

    source: str = ""
    """Where its code is."""

    proved: str = ""
    """The version of the vendor's published signature that its call was held against."""

    run_on: str = ""
    """The hardware that it was run on."""

    limits: Limits | None = None
    """What it cannot do, as data, for ``docs/kernels.md``."""

    older: Limits | None = None
    """The limits of an older version, if it may be installed."""

    vendor: Vendor | None = None
    """The package that its functions come from; None for PyTorch, and for one's own."""

    @property
    def is_fetched(self) -> bool:
        """Whether it comes over a network, for which it must be asked for by name."""
        return isinstance(self.vendor, HubKernel)

    @abstractmethod
    def availability(self) -> Availability:
        """Whether it can run on this machine at all."""

    def prepare(self) -> Availability:
        """:meth:`availability` for a kernel that was asked for by name; fetches one that ``is_fetched``."""
        return self.vendor.fetch() if isinstance(self.vendor, HubKernel) else self.availability()

    def concerns(self, site: CanonicalAttention) -> bool:
        """Whether it is asked without being named. If false, the report does not mention it unless it is named."""
        return True

    @abstractmethod
    def supports(self, site: CanonicalAttention) -> Verdict:
        """Whether it takes the site. Decides from the site alone and touches no data."""

    def skips_masked(self, site: CanonicalAttention) -> bool:
        """Whether it skips blocks of scores that are masked as a whole.

        Only such a kernel is offered, as one attention, what the source computes within windows of keys.
        """
        return False

    @abstractmethod
    def emit(self, site: CanonicalAttention, builder: Builder) -> fx.Node:
        """Writes the call at the builder's insertion point.

        Called only after :meth:`supports` has said yes.

        Returns:
            The output, with the shape and dtype of the source's result.
        """
