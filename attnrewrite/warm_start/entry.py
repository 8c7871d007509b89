"""What is stored of one rewritten graph: the graph for the inner compiler, the report, and what buffers held."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from torch import fx

from attnrewrite.ir.source import SourceLocation
from attnrewrite.kernels import registered_kernels
from attnrewrite.options.compile_options import Policy
from attnrewrite.report.rows import GraphReport, KernelVerdict, SiteReport
from attnrewrite.warm_start import directory
from attnrewrite.warm_start.codec import NotStorable, decoded_graph, encoded_graph
from attnrewrite.warm_start.key import key_of, known_of_sizes

__all__ = ["Entry", "Place"]

log = logging.getLogger("attnrewrite")


@dataclass(frozen=True)
class Entry:
    """One rewritten graph.

    Attributes:
        gm: the graph for the inner compiler; None if that is Dynamo's, since nothing was rewritten.
        keep_attention: whether the graph has attention that was kept on purpose.
        varies: whether the result depends on the request.
        projections_changed, regions_changed: as in ``passes.result.Rewritten``.
        report: what the report says of the graph.
        buffers: what buffers held, as ``KnownBuffers.seen`` gives it.
    """

    gm: fx.GraphModule | None
    keep_attention: bool
    varies: bool
    projections_changed: bool
    regions_changed: bool
    report: GraphReport
    buffers: Mapping[int, tuple[str, bool]] = field(default_factory=dict)


class Place:
    """The place of one graph among those that are stored; where it has none, nothing is found and nothing stored.

    Attributes:
        why_none: why the graph has no place, or what is stored there is not used, in words; empty otherwise.
    """

    def __init__(self, gm: fx.GraphModule, example_inputs: Sequence[Any], policy: Policy) -> None:
        """Args:
        gm: Dynamo's graph, legalized and not captured yet.
        """
        self._gm, self._inputs = gm, example_inputs
        self._key = self.why_none = ""
        try:
            self._key = key_of(gm, example_inputs, policy)
            self._sizes = known_of_sizes(example_inputs)
        except NotStorable as reason:
            self.why_none = str(reason)
        except RecursionError:
            self.why_none = "the graph is too deep for what is left of the stack"

    def entry(self) -> Entry | None:
        """What an earlier compilation of the same graph stored; None if there is nothing."""
        data = directory.load(self._key) if self._key else None
        if data is None:
            return None
        try:
            entry = _entry(data, self._gm)
            _require_kernels(entry.report)
        except NotStorable as reason:
            self.why_none = str(reason)
        except Exception as error:  # noqa: BLE001 - The file may hold anything; the graph is rewritten anew.
            self.why_none = f"what is stored has another form: {type(error).__name__}: {error}"
        else:
            return entry
        log.warning("a stored graph is not used, and written anew: %s", self.why_none)
        return None

    def store(self, entry: Entry) -> None:
        """Stores a rewritten graph, unless it depends on more than the key says."""
        if not self._key:
            return
        try:
            if known_of_sizes(self._inputs) != self._sizes:
                raise NotStorable("the rewriting has added guards on sizes")
            if any(_warned(site) for site in entry.report.sites):
                raise NotStorable("a warning that each process has to give")
            data = {
                "graph": None if entry.gm is None else encoded_graph(entry.gm),
                "report": _report_data(entry.report),
                "buffers": {str(place): held for place, held in entry.buffers.items()},
                **{name: getattr(entry, name) for name in _PLAIN},
            }
        except NotStorable as reason:
            self.why_none = str(reason)
        else:
            self.why_none = ""
            directory.store(self._key, data)


_PLAIN = ("keep_attention", "varies", "projections_changed", "regions_changed")


def _entry(data: Mapping[str, Any], original: fx.GraphModule) -> Entry:
    """
    Raises:
        NotStorable: the data is not what :meth:`Place.store` writes; other errors, by which part of it is missing.
    """
    entry = Entry(
        gm=None if data["graph"] is None else decoded_graph(data["graph"], original),
        report=_report(data["report"]),
        buffers={int(place): (digest, was_read) for place, (digest, was_read) in data["buffers"].items()},
        **{name: data[name] for name in _PLAIN},
    )
    _require_types(entry)
    return entry


def _require_types(record: Any) -> None:
    """
    Raises:
        NotStorable: a field of a dataclass is of another type than it says.
    """
    hints = get_type_hints(type(record))
    for part in dataclasses.fields(record):
        if not _fits(getattr(record, part.name), hints[part.name]):
            raise NotStorable(f"what is stored has another form: {part.name} of {type(record).__name__}")


def _fits(value: Any, hint: Any) -> bool:
    kind, parts = get_origin(hint), get_args(hint)
    if kind is UnionType:
        return any(_fits(value, part) for part in parts)
    if kind is Literal:
        return value in parts
    if kind in (list, tuple):
        if parts[-1] is ... or kind is list:
            return type(value) is kind and all(_fits(each, parts[0]) for each in value)
        return type(value) is tuple and len(value) == len(parts) and all(map(_fits, value, parts))
    if kind in (dict, Mapping):
        return type(value) is dict and all(_fits(key, parts[0]) and _fits(value[key], parts[1]) for key in value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        return False
    if dataclasses.is_dataclass(hint):
        _require_types(value)
    return True


def _require_kernels(report: GraphReport) -> None:
    """
    Raises:
        NotStorable: a kernel that the graph calls cannot run in this process.
    """
    called = {site.kernel for site in report.sites}
    for kernel in registered_kernels():
        if kernel.name in called and not kernel.availability().available:
            raise NotStorable(f"{kernel.name} cannot run: {kernel.availability().detail}")


def _warned(site: SiteReport) -> bool:
    """Whether a kernel was asked for that does not serve the site (``selection.choose``), so that a warning was given.

    ``requested`` reads "NAME, NAME by ORIGIN".
    """
    names = site.requested.partition(" by ")[0].split(", ")
    return bool(site.requested) and site.kernel not in names


# -- the report --------------------------------------------------------------------------------------------------------

_OF_REPORT = ("captured", "reason", "notes", "unmatched_rules")


def _report_data(report: GraphReport) -> dict[str, Any]:
    return {
        **{name: getattr(report, name) for name in _OF_REPORT},
        "sites": [dataclasses.asdict(site) for site in report.sites],
    }


def _report(data: dict[str, Any]) -> GraphReport:
    given = {name: data[name] for name in _OF_REPORT}
    given["unmatched_rules"] = tuple(given["unmatched_rules"])
    return GraphReport("", sites=[_site(site) for site in data["sites"]], **given)


def _site(data: dict[str, Any]) -> SiteReport:
    # JSON has one kind of sequence.
    data = {name: tuple(value) if isinstance(value, list) else value for name, value in data.items()}
    location = data.pop("location")
    verdicts = tuple(KernelVerdict(**verdict) for verdict in data.pop("verdicts"))
    return SiteReport(location=None if location is None else SourceLocation(**location), verdicts=verdicts, **data)
