"""Chooses the kernel of a site: the first willing one of those requested by name, or else the fastest willing one."""

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

__all__ = ["choose", "warn_unserved", "willing_kernels"]

log = logging.getLogger("attnrewrite")

_ABOUT_AS_FAST = 1.04
"""Times of a table within this factor count as equal; the kernel that comes first in the standing order serves."""


def choose(
    gm: fx.GraphModule, site: CanonicalAttention, request: Request | None, row: SiteReport, policy: Policy
) -> Kernel | None:
    """The kernel for a site; None if no kernel is willing. The row gets every verdict, and the reason if there is none.

    Raises:
        KernelError: with ``strict``, no requested kernel is willing.
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
    """The kernels that take the site; every verdict is added to ``verdicts``."""
    return [kernel for kernel in kernels if _is_willing(site, kernel, verdicts)]


def _automatic(
    gm: fx.GraphModule, site: CanonicalAttention, policy: Policy, verdicts: dict[str, KernelVerdict]
) -> Kernel | None:
    """The fastest willing kernel, by autotuning or by the cost table of the device; None if no kernel is willing."""
    table = cost_table(site.device) if site.for_inductor else None
    asked = [kernel for kernel in standing(table) if kernel.concerns(site)]
    # A kernel that computes less is not measured.
    kernel = _first_willing(site, [kernel for kernel in asked if kernel.computes_less], verdicts)
    if kernel is not None:
        return kernel
    if not policy.autotune and table is None:
        return _first_willing(site, asked, verdicts)
    willing = willing_kernels(site, asked, verdicts)
    # A kernel that stores the scores serves only if no other kernel does.
    willing = [kernel for kernel in willing if not kernel.keeps_scores] or willing
    if len(willing) < 2:
        return willing[0] if willing else None
    workload = Workload.of(site)
    if policy.autotune:
        milliseconds, source = tuned(gm, site, willing, policy), "measured here"
    else:
        assert table is not None
        # Within a training step the host is ahead of the device, whose time alone counts.
        on_device = policy.cuda_graphs or site.differentiable
        milliseconds, source = _estimates(table, willing, workload, on_device), f"measured on {table.device}"
    if policy.autotune:
        failed = [kernel.name for kernel in willing if kernel.name not in milliseconds]
        verdicts.update({name: KernelVerdict(name, False, "failed while it was timed") for name in failed})
        willing = [kernel for kernel in willing if kernel.name in milliseconds] or willing
    # The first kernel serves if it was not measured: a user's kernel, or PyTorch's choice.
    if willing[0].name not in milliseconds:
        return willing[0]
    for name, time in milliseconds.items():
        verdicts[name] = KernelVerdict(name, True, f"about {time:.3g} ms, {source}")
    fastest = min(milliseconds.values()) * (1.0 if policy.autotune else _ABOUT_AS_FAST)
    return next(kernel for kernel in willing if milliseconds.get(kernel.name, math.inf) <= fastest)


def _estimates(table: CostTable, kernels: list[Kernel], workload: Workload, on_device: bool) -> dict[str, float]:
    found = {kernel.name: table.milliseconds(kernel.name, workload, on_device) for kernel in kernels}
    return {name: time for name, time in found.items() if time is not None}


def _check_request(request: Request, row: SiteReport, kernel: Kernel | None) -> None:
    """Warns if no requested kernel can serve the site.

    Raises:
        KernelError: with ``strict``.
    """
    asked = [verdict for verdict in row.verdicts if verdict.kernel in request.names]
    if not any(verdict.willing for verdict in asked):
        warn_unserved(request, row, refusals(asked), kernel)


def warn_unserved(request: Request, row: SiteReport, why: str, kernel: Kernel | None = None) -> None:
    """Warns once that the requested kernels cannot serve an attention, and says what serves it instead.

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
