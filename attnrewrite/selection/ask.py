"""Asks a kernel whether it can serve a site."""

from __future__ import annotations

from collections.abc import Iterable

from torch.fx.experimental.symbolic_shapes import has_free_unbacked_symbols

from attnrewrite.ir.site import CanonicalAttention
from attnrewrite.kernels import Kernel, Verdict
from attnrewrite.report.rows import KernelVerdict

__all__ = ["ask", "refusals"]


def ask(site: CanonicalAttention, kernel: Kernel, by_name: bool = False) -> KernelVerdict:
    """The kernel's verdict: whether it takes the site and can run here.

    Args:
        by_name: whether the kernel was requested by name; if so, a willing kernel is fetched if necessary.
    """
    verdict = _verdict(site, kernel)
    if verdict.willing:
        available = kernel.prepare() if by_name else kernel.availability()
        verdict = verdict if available.available else Verdict.no(f"not available: {available.detail}")
    return KernelVerdict(kernel.name, verdict.willing, verdict.reason)


def _verdict(site: CanonicalAttention, kernel: Kernel) -> Verdict:
    """The kernel's verdict; it is not asked if it needs a number of queries or keys that depends on the data."""
    counts = [axis.size for axis in (*site.query_axes, *site.key_axes)]
    if has_free_unbacked_symbols(counts) and not kernel.takes_unbacked:
        return Verdict.no("does not take a number of queries or keys that depends on the data")
    if site.windowed and not kernel.skips_masked(site):
        return Verdict.no("would compute all scores, while the source computes only those within windows of keys")
    return kernel.supports(site)


def refusals(verdicts: Iterable[KernelVerdict]) -> str:
    """The reasons, each once after the names of the kernels that gave it."""
    kernels: dict[str, dict[str, None]] = {}
    for verdict in verdicts:
        kernels.setdefault(verdict.reason, {})[verdict.kernel] = None
    return "; ".join(f"{', '.join(names)}: {reason}" for reason, names in kernels.items())
