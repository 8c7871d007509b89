"""Runs a spelling as it is and rewritten, and says what became of it."""

from __future__ import annotations

import linecache
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from attnrewrite.backend import collect_reports
from attnrewrite.report.rows import SiteReport
from tests.spellings.forms import Spelling
from tests.support.against_eager import Results, Tolerance, moved, prepared, run, truth, wrong
from tests.support.helpers import rewritten

__all__ = ["NotASpelling", "Outcome", "judge"]

Verdict = Literal["found", "kept", "wrong", "crashed", "taken"]

_FILE = "<spelling>"


@dataclass(frozen=True)
class Outcome:
    """What became of a spelling.

    ``taken``: rewritten although it must stay, with the right result or not. ``reasons`` are those of the report, and
    ``unblamed`` those of them that name no operation.
    """

    spelling: Spelling
    verdict: Verdict
    reasons: tuple[str, ...] = ()
    detail: str = ""
    unblamed: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.verdict}: {self.detail or '; '.join(self.reasons)}\n{self.spelling.script()}"


def _tolerance(spelling: Spelling, device: str) -> Tolerance:
    if "* -1e4" in spelling.text or "dtype=s.dtype), -1e4)" in spelling.text:
        # Added to a whole row it leaves what rounding leaves of the scores (docs/exactness.md).
        return Tolerance(2e-3, 1e-2)
    return Tolerance.on(device)


class NotASpelling(Exception):
    """Eager itself cannot run it: a defect of the generator."""


def _slices(site: SiteReport) -> int:
    """How many attentions of the source a row stands for."""
    merged = re.fullmatch(r"merged from (\d+) slices", site.slices)
    return int(merged[1]) if merged else 1


def judge(spelling: Spelling, device: str = "cpu", inner: str = "eager") -> Outcome:
    """Values of two draws of inputs, and their gradients, against eager in float64.

    Args:
        spelling: what is judged.
        device: where its tensors lie, those that it makes itself, too.
        inner: the backend that the rewritten graph is given to.

    Raises:
        NotASpelling: eager cannot run it.
    """
    torch._dynamo.reset()
    try:
        attend, calls, truths, owns = _eager(spelling, device)
    except Exception as error:
        raise NotASpelling(f"{error}\n{spelling.script()}") from error
    function = rewritten(attend, inner, dynamic=spelling.dynamic or None)
    with collect_reports() as graphs:
        try:
            news = [
                run(function, prepared(call, spelling.dtype, spelling.gradients, device), spelling.gradients)
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
    for new, own, exact, call in zip(news, owns, truths, calls, strict=True):
        rounded = partial(moved, attend, call, spelling.dtype, spelling.gradients, device)
        difference = wrong(spelling.dtype, new, own, exact, _tolerance(spelling, device), rounded)
        if difference:
            return Outcome(spelling, "wrong", tuple(reasons), difference)
    named = sum(_slices(site) for site in sites)
    found = not reasons and named >= spelling.sites
    if not found:
        unblamed = tuple(site.reason for site in sites if site.status == "kept" and not site.blamed)
        reasons = reasons or [f"{named} of {spelling.sites} attentions are named"]
        return Outcome(spelling, "kept", tuple(reasons), unblamed=unblamed)
    return Outcome(spelling, "taken" if spelling.stays else "found")


def _eager(
    spelling: Spelling, device: str
) -> tuple[Callable[..., Any], list[Sequence[Tensor]], list[Results], list[Results]]:
    """(the function, two draws of inputs, the reference of each, what eager gives in the spelling's dtype)"""
    module = _module(spelling.text, device)
    attend, inputs = module["attend"], module["inputs"]
    calls = [inputs(0, 0), inputs(1, 3 if spelling.lengths else 0)]
    gradients = spelling.gradients
    truths = [truth(attend, call, spelling.dtype, gradients, device) for call in calls]
    owns = [run(attend, prepared(call, spelling.dtype, gradients, device), gradients) for call in calls]
    return attend, calls, truths, owns


def _module(text: str, device: str) -> dict[str, Any]:
    if device != "cpu":
        attend, separator, inputs = text.partition("\n\n\ndef inputs(")
        text = f"{_made_on(device, attend)}{separator}{inputs}"
    # Reports quote the source by way of linecache.
    linecache.cache[_FILE] = (len(text), None, text.splitlines(keepends=True), _FILE)
    names: dict[str, Any] = {}
    exec(compile(text, _FILE, "exec"), names)
    return names


def _made_on(device: str, text: str) -> str:
    """The text with the device named wherever it makes a tensor."""
    parts = re.split(r"(torch\.(?:arange|empty|full|ones|tensor|zeros)\()", text)
    for index in range(2, len(parts), 2):
        depth = 1
        for end, character in enumerate(parts[index]):
            depth += {"(": 1, ")": -1}.get(character, 0)
            if depth == 0:
                parts[index] = f"{parts[index][:end]}, device={device!r}{parts[index][end:]}"
                break
        else:  # A call among its arguments makes a tensor itself.
            raise NotASpelling(f"the end of {parts[index - 1]} is not found in\n{text}")
    return "".join(parts)


def _general(reason: str) -> str:
    """A reason without what belongs to the one spelling: its source line."""
    return re.sub(r" \('.*?', <spelling>:\d+\)| \(\".*?\", <spelling>:\d+\)| at <spelling>:\d+", "", reason)
