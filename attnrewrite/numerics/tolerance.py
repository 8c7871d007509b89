"""``options["tolerance"]``: admits kernels of lower precision whose error on real inputs is small enough.

Dynamo passes a backend the inputs of the call that it compiles for. Before the graph is rewritten, each kernel of lower
precision is spliced into a copy of it wherever the kernel is willing, and the copy is compared with the source site by
site (:mod:`attnrewrite.numerics.verify`). The first kernel within the tolerance serves the site, as if it had been
requested there; a request by name takes precedence.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from attnrewrite.ir.nodes import known_number
from attnrewrite.ir.site import CanonicalAttention
from attnrewrite.kernels import Kernel, registered_kernels
from attnrewrite.numerics.outcome import SiteCheck, Verification
from attnrewrite.numerics.verify import Original
from attnrewrite.options.compile_options import Policy
from attnrewrite.options.request import Request
from attnrewrite.passes.pipeline import rewrite
from attnrewrite.passes.result import Rewritten
from attnrewrite.passes.rewriting import as_requested
from attnrewrite.report.rows import KernelVerdict, SiteReport
from attnrewrite.selection.ask import ask, refusals
from attnrewrite.torch_private import FakeTensor, tracing

__all__ = ["Admission", "admitted"]

_ORIGIN = "options['tolerance']"


@dataclass
class Admission:
    """The kernels that the tolerance admits.

    Attributes:
        tolerance: the largest error, relative to the largest number of the site's result.
        verdicts: by the name of a site, the verdict on each kernel of lower precision that was tried there.
        notes: notes for the report of the graph.
    """

    tolerance: float
    verdicts: dict[str, list[KernelVerdict]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def kernel_at(self, name: str) -> str | None:
        return next((verdict.kernel for verdict in self.verdicts.get(name, ()) if verdict.willing), None)

    def adjust_request(self, name: str, site: CanonicalAttention, request: Request | None) -> Request | None:
        """The user's request at a site with the admitted kernel added, or the request unchanged."""
        kernel = self.kernel_at(name)
        return request if kernel is None else _with(request, kernel)

    def add_verdicts(self, sites: Iterable[SiteReport]) -> None:
        """Adds the verdicts to the rows of the rewritten graph."""
        for row in sites:
            tried = self.verdicts.get(row.name, [])
            names = {verdict.kernel for verdict in tried}
            row.verdicts = (*tried, *(verdict for verdict in row.verdicts if verdict.kernel not in names))
            if row.kernel is not None and row.kernel == self.kernel_at(row.name):
                row.tolerance = self.tolerance


def admitted(gm: fx.GraphModule, policy: Policy, inputs: Sequence[Any], tolerance: float) -> Admission:
    """The kernels of lower precision that the tolerance admits at each site.

    Args:
        gm: the captured graph, which is not changed.
        inputs: the inputs of the call that the graph is compiled for.

    Raises:
        KernelError: with ``strict``, as :func:`rewrite` does.
    """
    admission = Admission(tolerance)
    prefix = f"tolerance {_in_words(tolerance)}"
    values = _real_inputs(inputs)
    if values is None:
        admission.notes.append(
            f"{prefix}: not applied, since the inputs of the call are not available while it is compiled"
        )
        return admission
    survey = _Survey()
    exact = _copied(gm)
    exact_result = rewrite(exact, policy, survey.adjust_request)
    for reason, names in survey.excluded.items():
        admission.notes.append(f"{prefix}: not applied at {', '.join(names)}: {reason}")
    if not survey.answers:
        return admission
    willing = survey.willing()
    if not willing:
        refused = itertools.chain.from_iterable(at.values() for at in survey.answers.values())
        admission.notes.append(f"{prefix}: no kernel of lower precision takes any attention site: {refusals(refused)}")
        return admission
    trials = _Trials(gm, policy, values, exact, exact_result)
    # In the order of registration.
    for kernel in willing:
        for name, answers in survey.answers.items():
            if kernel in answers and not answers[kernel].willing:
                admission.verdicts.setdefault(name, []).append(answers[kernel])
        for name, check in trials.run(kernel, survey.sites_for(kernel, admission)).items():
            admission.verdicts.setdefault(name, []).append(_judged(kernel, check, tolerance))
    served = sum(admission.kernel_at(name) is not None for name in survey.answers)
    admission.notes += [f"{prefix}: {note}" for note in trials.notes]
    admission.notes.append(f"{prefix}: {served} of {len(survey.answers)} attention sites served in lower precision")
    return admission


def _candidates() -> list[Kernel]:
    """The registered kernels of lower precision, except those that are fetched over the network."""
    return [kernel for kernel in registered_kernels() if kernel.lower_precision and not kernel.is_fetched]


def _with(request: Request | None, kernel: str) -> Request:
    """The request with ``kernel`` added before the automatic choice, after kernels requested by name."""
    if request is None:
        return Request((kernel,), _ORIGIN)
    place = request.names.index("auto")
    names = (*request.names[:place], kernel, *request.names[place:])
    return dataclasses.replace(request, names=names, origin=f"{request.origin} and {_ORIGIN}")


class _Survey:
    """Asks every kernel of lower precision at every site of the automatic choice, without changing the requests.

    Attributes:
        answers: for each such site, the verdicts by the kernel's name.
        excluded: the sites whose results cannot be compared, by reason.
    """

    def __init__(self) -> None:
        self.answers: dict[str, dict[str, KernelVerdict]] = {}
        self.excluded: dict[str, list[str]] = {}
        self._kernels = _candidates()

    def adjust_request(self, name: str, site: CanonicalAttention, request: Request | None) -> Request | None:
        if "." in name:  # A site of a region, which cannot be compared by itself.
            return request
        asked = request.names if request is not None else ("auto",)
        reason = _incomparable(site)
        if "auto" not in asked:
            pass
        elif reason:
            self.excluded.setdefault(reason, []).append(name)
        else:
            kernels = [kernel for kernel in self._kernels if kernel.name not in asked]
            self.answers[name] = {kernel.name: ask(site, kernel) for kernel in kernels}
        return request

    def willing(self) -> list[str]:
        """The kernels that would take at least one site."""
        names = [kernel.name for kernel in self._kernels]
        return [name for name in names if any(name in at and at[name].willing for at in self.answers.values())]

    def sites_for(self, kernel: str, admission: Admission) -> frozenset[str]:
        """The sites where the kernel is willing and no earlier kernel was admitted."""
        return frozenset(
            name
            for name, answers in self.answers.items()
            if kernel in answers and answers[kernel].willing and admission.kernel_at(name) is None
        )


def _incomparable(site: CanonicalAttention) -> str:
    if site.differentiable:
        return (
            "a backward pass may follow, and gradients cannot be compared (if none follows, call the model under "
            "torch.no_grad())"
        )
    if site.dropout:
        return "dropout is random, so results cannot be compared"
    return ""


class _Trials:
    """Compares kernels with the source on the call's inputs, or with the exact kernels if the source does not run."""

    def __init__(
        self, gm: fx.GraphModule, policy: Policy, inputs: Sequence[Any], exact: fx.GraphModule, exact_result: Rewritten
    ) -> None:
        self.notes: list[str] = []
        self._gm, self._policy, self._inputs = gm, policy, inputs
        self._exact, self._exact_result = exact, exact_result
        self._source: Original | None = Original(gm)

    def run(self, kernel: str, sites: frozenset[str]) -> dict[str, SiteCheck]:
        """The check of each site with the kernel in its place; empty if nothing could be run."""
        if not sites:
            return {}

        def adjust_request(name: str, site: CanonicalAttention, request: Request | None) -> Request | None:
            return _with(request, kernel) if name in sites else as_requested(name, site, request)

        trial = _copied(self._gm)
        rows = rewrite(trial, self._policy, adjust_request).sites
        # A kernel requested by name may serve the site instead.
        served = {row.name for row in rows if row.name in sites and row.kernel == kernel}
        checks = self._compared(trial, rows).checks if served else []
        return {check.site.name: check for check in checks if check.site is not None and check.site.name in served}

    def _compared(self, trial: fx.GraphModule, rows: Sequence[SiteReport]) -> Verification:
        # A kernel's own compilations are not part of the current one.
        with tracing(None):
            if self._source is not None:
                found = self._source.compare(trial, rows, self._inputs)
                if not found.source_error:
                    return found
                self._source = None
                self.notes.append(
                    f"the source graph did not run ({found.source_error}), so results are compared with those of "
                    + ", ".join(dict.fromkeys(row.kernel or "the source" for row in self._exact_result.sites))
                )
            found = Original(self._exact, self._exact_result.sites).compare(trial, rows, self._inputs)
        if found.source_error:
            note = f"not applied, since the rewritten graph did not run either: {found.source_error}"
            self.notes += [] if note in self.notes else [note]
            return Verification()
        return found


def _judged(kernel: str, check: SiteCheck, tolerance: float) -> KernelVerdict:
    found = check.difference
    if found is None:
        return KernelVerdict(kernel, False, check.skipped)
    if found.reason:
        return KernelVerdict(kernel, False, found.reason)
    within = found.relative <= tolerance
    relation = "within" if within else "more than"
    return KernelVerdict(kernel, within, f"error {found.relative:.1e}, {relation} the tolerance {_in_words(tolerance)}")


def _in_words(tolerance: float) -> str:
    short = f"{tolerance:.0e}"
    return short if float(short) == tolerance else f"{tolerance:g}"


def _copied(gm: fx.GraphModule) -> fx.GraphModule:
    return fx.GraphModule(gm, copy.deepcopy(gm.graph))


def _real_inputs(inputs: Sequence[Any]) -> list[Any] | None:
    """The real inputs of the call, with symbolic numbers replaced by its numbers; None if they are not available."""
    values = [known_number(value) for value in inputs]
    return None if any(value is None or isinstance(value, FakeTensor) for value in values) else values
