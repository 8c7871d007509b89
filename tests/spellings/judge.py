"""Runs a spelling as it is and rewritten, and says what became of it."""

from __future__ import annotations

import contextlib
import linecache
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from attnrewrite.backend import collect_reports
from attnrewrite.numerics.judge import HALF, disagreements
from attnrewrite.report.rows import SiteReport
from tests.spellings.forms import Spelling
from tests.support.helpers import outputs, rewritten
from tests.support.reference import Reference, wide

__all__ = ["NotASpelling", "Outcome", "judge", "prepared"]

Verdict = Literal["found", "kept", "wrong", "crashed", "taken"]

_FILE = "<spelling>"
_Results = dict[str, list[Tensor]]


@dataclass(frozen=True)
class Outcome:
    """``taken``: rewritten although it must stay, with the right result or not. ``reasons`` are those of the report."""

    spelling: Spelling
    verdict: Verdict
    reasons: tuple[str, ...] = ()
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.verdict}: {self.detail or '; '.join(self.reasons)}\n{self.spelling.script()}"


@dataclass(frozen=True)
class _Tolerance:
    """In float32 and float64, relative to the largest number of a tensor.

    Where eager itself is off by more than ``doubtful``, rounding decides its result (a row whose keys are all masked by
    a finite number), and what eager gives is what is asked for.
    """

    value: float
    gradient: float
    doubtful: float
    there: float


def _tolerance(spelling: Spelling) -> _Tolerance:
    if "* -1e4" in spelling.text or "dtype=s.dtype), -1e4)" in spelling.text:
        # Added to a whole row it leaves what rounding leaves of the scores (docs/exactness.md).
        return _Tolerance(2e-3, 1e-2, 1e-4, 1e-2)
    return _Tolerance(1e-5, 1e-4, 1e-4, 1e-2)


class NotASpelling(Exception):
    """Eager itself cannot run it: a defect of the generator."""


def _slices(site: SiteReport) -> int:
    """How many attentions of the source a row stands for."""
    merged = re.fullmatch(r"merged from (\d+) slices", site.slices)
    return int(merged[1]) if merged else 1


def judge(spelling: Spelling, device: str = "cpu") -> Outcome:
    """Values of two draws of inputs, and their gradients, against eager in float64.

    Args:
        spelling: what is judged.
        device: where its tensors lie, those that it makes itself, too.

    Raises:
        NotASpelling: eager cannot run it.
    """
    torch._dynamo.reset()
    with torch.device(device):
        return _judged(spelling, device)


def _judged(spelling: Spelling, device: str) -> Outcome:
    try:
        attend, calls, truths, owns = _eager(spelling, device)
    except Exception as error:
        raise NotASpelling(f"{error}\n{spelling.script()}") from error
    function = rewritten(attend, dynamic=spelling.dynamic or None)
    with collect_reports() as graphs:
        try:
            news = [
                _run(function, prepared(call, spelling.dtype, spelling.gradients, device), spelling.gradients)
                for call in calls
            ]
        except Exception as error:  # noqa: BLE001 - Whatever it is, it is the finding.
            return Outcome(spelling, "crashed", detail=f"{type(error).__name__}: {str(error)[:300]}")
    failures = [graph.reason for graph in graphs if "rewriting failed" in graph.reason]
    if failures:
        return Outcome(spelling, "crashed", detail=failures[0])
    sites = [site for graph in graphs for site in graph.sites]
    reasons = [_general(site.reason) for site in sites if site.status == "kept"]
    reasons += [f"not captured: {graph.reason}" for graph in graphs if not graph.captured]
    for new, own, truth in zip(news, owns, truths, strict=True):
        difference = _wrong(spelling, new, own, truth)
        if difference:
            return Outcome(spelling, "wrong", tuple(reasons), difference)
    named = sum(_slices(site) for site in sites)
    found = not reasons and named >= spelling.sites
    if not found:
        return Outcome(spelling, "kept", tuple(reasons) or (f"{named} of {spelling.sites} attentions are named",))
    return Outcome(spelling, "taken" if spelling.stays else "found")


def _wrong(spelling: Spelling, new: _Results, own: _Results, truth: _Results) -> str:
    """What is wrong with the values or the gradients, in words; empty if nothing is."""
    tolerance = _tolerance(spelling)
    for what, limit in (("value", tolerance.value), ("gradient", tolerance.gradient)):
        if spelling.dtype in HALF:
            difference = disagreements(
                new[what], own[what], truth[what], spelling.dtype, beside=float(what == "gradient")
            )
        else:
            difference = _difference(new[what], own[what], truth[what], limit, tolerance, what)
        if difference:
            return f"{what}: {difference}"
    return ""


def _eager(
    spelling: Spelling, device: str
) -> tuple[Callable[..., Any], list[Sequence[Tensor]], list[_Results], list[_Results]]:
    """(the function, two draws of inputs, the reference of each, what eager gives in the spelling's dtype)"""
    module = _module(spelling.text)
    attend, inputs = module["attend"], module["inputs"]
    with torch.device("cpu"):  # The same numbers for every device.
        calls = [inputs(0, 0), inputs(1, 3 if spelling.lengths else 0)]
    gradients = spelling.gradients
    truths = [_truth(attend, call, spelling, device) for call in calls]
    owns = [_run(attend, prepared(call, spelling.dtype, gradients, device), gradients) for call in calls]
    return attend, calls, truths, owns


def _truth(attend: Callable[..., Any], call: Sequence[Tensor], spelling: Spelling, device: str) -> _Results:
    if spelling.dtype not in HALF:
        return _run(attend, prepared(call, torch.float64, spelling.gradients, device), spelling.gradients)
    with Reference():
        inputs = Reference.given(prepared(call, spelling.dtype, spelling.gradients, device))
        results = _run(attend, inputs, spelling.gradients)
    return {what: [wide(value) for value in values] for what, values in results.items()}


def _module(text: str) -> dict[str, Any]:
    # Reports quote the source by way of linecache.
    linecache.cache[_FILE] = (len(text), None, text.splitlines(keepends=True), _FILE)
    names: dict[str, Any] = {}
    exec(compile(text, _FILE, "exec"), names)
    return names


def prepared(call: Sequence[Tensor], dtype: torch.dtype, gradients: bool, device: str = "cpu") -> list[Tensor]:
    """The tensors of a call in ``dtype``, those that no mask is made of with gradients where they are asked for."""
    return [_prepare(value, dtype, gradients, device) for value in call]


def _prepare(value: Tensor, dtype: torch.dtype, gradients: bool, device: str) -> Tensor:
    if not value.is_floating_point():
        return value.to(device)
    own = value.detach().to(device, dtype)
    if isinstance(value, nn.Parameter):
        return nn.Parameter(own)
    masking = bool(own.isinf().any()) or bool(((own == 0) | (own == 1)).all())
    return own.clone().requires_grad_() if gradients and not masking else own


def _run(function: Callable[..., Any], inputs: Sequence[Tensor], gradients: bool) -> _Results:
    with _gradients(gradients):
        results = outputs(function(*inputs))
    wanted = [value for value in inputs if value.requires_grad] if gradients else []
    found: list[Tensor] = []
    if wanted:
        generator = torch.Generator().manual_seed(1)
        weights = [torch.randn(result.shape, generator=generator, device="cpu").to(result) for result in results]
        total = torch.stack([(result * weight).sum() for result, weight in zip(results, weights, strict=True)]).sum()
        given = torch.autograd.grad(total, wanted, allow_unused=True)
        found = [torch.zeros_like(w) if g is None else g for g, w in zip(given, wanted, strict=True)]
    return {"value": [result.detach() for result in results], "gradient": found}


@contextlib.contextmanager
def _gradients(wanted: bool) -> Iterator[None]:
    with torch.set_grad_enabled(wanted):
        yield


def _difference(
    new: Sequence[Tensor],
    own: Sequence[Tensor],
    truth: Sequence[Tensor],
    limit: float,
    tolerance: _Tolerance,
    what: str,
) -> str:
    """What differs, in words; empty if nothing does."""
    # A gradient of nothing but rounding is no gradient: what is small beside the others is measured by them.
    # A row with one key has gradients of zero, which a fused kernel computes as a difference of numbers of that size.
    small = 1e-2 if what == "gradient" else 1e-3
    floor = small * max((t.double().nan_to_num().abs().max().item() for t in truth if t.numel()), default=0.0)
    for n, o, t in zip(new, own, truth, strict=True):
        if n.shape != o.shape or n.dtype != o.dtype:
            return f"{n.dtype} {tuple(n.shape)} in place of {o.dtype} {tuple(o.shape)}"
        n, o, t = n.double(), o.double(), t.double()
        if not torch.equal(n.isnan(), o.isnan()):
            return f"{int(n.isnan().sum())} numbers of {n.numel()} are NaN in place of {int(o.isnan().sum())}"
        # A number that is masking in one dtype and minus infinity in another: only eager can be asked.
        doubtful = t.isnan() & ~o.isnan()
        t = torch.where(doubtful, o, t)
        unknown = o.isnan() | t.isnan()
        scale = t.masked_fill(unknown, 0.0).abs().max().clamp_min(max(floor, 1e-30))
        mistake = ((o - t).abs() / scale).masked_fill(unknown, 0.0)
        doubtful |= mistake > tolerance.doubtful
        # A row whose scores are rounded is so as a whole, whichever of its numbers came out well.
        if doubtful.dim():
            doubtful = doubtful.any(-1, keepdim=True).expand_as(doubtful)
        eager = mistake.masked_fill(doubtful, 0.0).max().item()
        error = ((n - t).abs() / scale).masked_fill(unknown | doubtful, 0.0).max().item()
        if error > max(limit, 4 * eager):
            return f"relative error {error:.2g}, eager's is {eager:.2g}"
        # Where the truth is no measure, what eager gives is: zero, in some rows.
        there = o.masked_fill(o.isnan(), 0.0).abs().max().clamp_min(1e-2)
        apart = ((n - o).abs() / torch.maximum(scale, there)).masked_fill(o.isnan() | ~doubtful, 0.0).max().item()
        if apart > tolerance.there:
            return f"{apart:.2g} from eager where rounding decides"
    return ""


def _general(reason: str) -> str:
    """A reason without what belongs to the one spelling: its source line."""
    return re.sub(r" \('.*?', <spelling>:\d+\)| \(\".*?\", <spelling>:\d+\)| at <spelling>:\d+", "", reason)
