"""choose: which kernel takes a site. Each is asked; of those that nobody named, the fastest willing one serves."""

from __future__ import annotations

import functools
import logging
import math

from torch import fx

from attnrewrite.errors import KernelError
from attnrewrite.ir.site import CanonicalAttention
from attnrewrite.kernels import Kernel
from attnrewrite.options.compile_options import Policy
from attnrewrite.options.request import Request
from attnrewrite.report.rows import KernelVerdict, SiteReport
from attnrewrite.selection.ask import ask, refusals
from attnrewrite.selection.autotune import tuned
from attnrewrite.selection.cost_table import CostTable, Workload, cost_table
from attnrewrite.selection.requests import named, standing

__all__ = ["choose", "say_unserved", "willing_kernels"]

log = logging.getLogger("attnrewrite")

_ABOUT_AS_FAST = 1.04
"""Times of a table tell no less than this apart: what comes first in the standing order has less to compile."""


def choose(
    gm: fx.GraphModule, site: CanonicalAttention, request: Request | None, row: SiteReport, policy: Policy
) -> Kernel | None:
    """The kernel for a site, None if none is willing; the row gets every answer, and the reason if there is none.

    Raises:
        KernelError: with ``strict``, none that was asked for is willing.
    """
    verdicts: dict[str, KernelVerdict] = {}
    before, after = named(request)
    kernel = _first_willing(site, before, verdicts, by_name=True)
    if kernel is None and not (request is not None and request.otherwise_kept):
        kernel = _automatic(gm, site, policy, verdicts)
    if kernel is None:
        kernel = _first_willing(site, after, verdicts, by_name=True)
    row.verdicts = tuple(verdicts.values())
    if request is not None:
        row.requested = f"{', '.join(request.names)} by {request.origin}"
        _check_request(request, row, kernel)
    if kernel is None:
        row.reason = refusals(row.verdicts)
    return kernel


def _first_willing(
    site: CanonicalAttention, kernels: list[Kernel], verdicts: dict[str, KernelVerdict], by_name: bool = False
) -> Kernel | None:
    for kernel in kernels:
        if _is_willing(site, kernel, verdicts, by_name):
            return kernel
    return None


def _is_willing(
    site: CanonicalAttention, kernel: Kernel, verdicts: dict[str, KernelVerdict], by_name: bool = False
) -> bool:
    if kernel.name not in verdicts:
        verdicts[kernel.name] = ask(site, kernel, by_name)
    return verdicts[kernel.name].willing


def willing_kernels(
    site: CanonicalAttention, kernels: list[Kernel], verdicts: dict[str, KernelVerdict]
) -> list[Kernel]:
    """Those of ``kernels`` that take the site; every answer goes into ``verdicts``."""
    return [kernel for kernel in kernels if _is_willing(site, kernel, verdicts)]


def _automatic(
    gm: fx.GraphModule, site: CanonicalAttention, policy: Policy, verdicts: dict[str, KernelVerdict]
) -> Kernel | None:
    """The fastest willing kernel, by measurement: here and now, or in the table for devices of this kind."""
    table = cost_table(site.device) if site.for_inductor else None
    asked = [kernel for kernel in standing(table) if kernel.concerns(site)]
    # What computes less needs no measurement.
    kernel = _first_willing(site, [kernel for kernel in asked if kernel.computes_less], verdicts)
    if kernel is not None:
        return kernel
    if not policy.autotune and table is None:
        return _first_willing(site, asked, verdicts)
    willing = willing_kernels(site, asked, verdicts)
    # Time is not bought with memory: what keeps the scores serves where nothing else does.
    willing = [kernel for kernel in willing if not kernel.keeps_scores] or willing
    if len(willing) < 2:
        return willing[0] if willing else None
    workload = Workload.of(site)
    if policy.autotune:
        milliseconds, source = tuned(gm, site, willing, policy), "measured here"
    else:
        assert table is not None
        milliseconds, source = _estimates(table, willing, workload, policy.cuda_graphs), f"measured on {table.device}"
    if policy.autotune:
        failed = [kernel.name for kernel in willing if kernel.name not in milliseconds]
        verdicts.update({name: KernelVerdict(name, False, "failed while it was timed") for name in failed})
        willing = [kernel for kernel in willing if kernel.name in milliseconds] or willing
    # A kernel of the user's own comes first unless it was measured, and so does PyTorch's choice where it was not.
    if willing[0].name not in milliseconds:
        return willing[0]
    for name, time in milliseconds.items():
        verdicts[name] = KernelVerdict(name, True, f"about {time:.3g} ms, {source}")
    fastest = min(milliseconds.values()) * (1.0 if policy.autotune else _ABOUT_AS_FAST)
    return next(kernel for kernel in willing if milliseconds.get(kernel.name, math.inf) <= fastest)


def _estimates(table: CostTable, kernels: list[Kernel], workload: Workload, cuda_graphs: bool) -> dict[str, float]:
    found = {kernel.name: table.milliseconds(kernel.name, workload, cuda_graphs) for kernel in kernels}
    return {name: time for name, time in found.items() if time is not None}


def _check_request(request: Request, row: SiteReport, kernel: Kernel | None) -> None:
    """Says so where no kernel that was asked for serves the site.

    Raises:
        KernelError: with ``strict``.
    """
    asked = [verdict for verdict in row.verdicts if verdict.kernel in request.names]
    if not any(verdict.willing for verdict in asked):
        say_unserved(request, row, refusals(asked), kernel)


def say_unserved(request: Request, row: SiteReport, why: str, kernel: Kernel | None = None) -> None:
    """A warning, once, that what was asked for cannot serve an attention, and what becomes of it instead.

    Raises:
        KernelError: with ``strict``.
    """
    if "auto" in request.names or request.otherwise_kept:
        return
    message = (
        f"{', '.join(request.names)} was requested by {request.origin} and cannot serve the attention at "
        f"{row.location}: {why}"
    )
    if request.strict:
        raise KernelError(message)
    instead = f"{kernel.name} serves it" if kernel else "it is left unchanged"
    _warn_once(f"{message}; {instead}")


@functools.cache
def _warn_once(message: str) -> None:
    log.warning("%s", message)
