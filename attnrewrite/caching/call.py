"""One call of a model: what the compiled graphs within it may reuse, and where they put what they compute."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Hashable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from attnrewrite.analysis.kinds import Kind, SiteKind
from attnrewrite.caching.method import Method
from attnrewrite.caching.streams import Entry, Observation, Stream, current_stream
from attnrewrite.errors import CacheError

if TYPE_CHECKING:
    from attnrewrite.caching.session import Session

__all__ = ["ModelCall", "Plan", "current_call"]

_call: ContextVar[ModelCall | None] = ContextVar("attnrewrite_model_call", default=None)


def current_call() -> ModelCall | None:
    """The call of a model that is being made and keeps attention values; None where none is."""
    return _call.get()


@dataclass(frozen=True)
class Plan:
    """What a graph is compiled for: which attentions are kept, and which kinds are reused together.

    ``halves``: of a batch with both halves of guidance, the second one is kept.
    """

    settings: Hashable
    reused: frozenset[frozenset[Kind]]
    halves: bool
    method: Method = field(compare=False)


class ModelCall:
    """One call of the model: what its graphs may reuse, and where they put what they compute.

    Attributes:
        reused: the kinds whose values are to be reused.
        plan: what the graphs are compiled for.
        halved: whether it is a call of the conditional half alone.
        is_of_graph: whether it is a call of a single graph, and not of a model.
        paths: of the modules whose attentions were kept so far.
    """

    def __init__(
        self, session: Session, stream: Stream, iteration: int, timestep: float, *, halved: bool, separate: bool
    ) -> None:
        method = session.method
        self.reused = method.reused(iteration, timestep, halved, separate)
        # Where both halves are computed, the conditional one is kept.
        halves = session.predicts(separate) and not halved
        self.plan = Plan(session.settings, method.reachable(halved, separate), halves, method)
        self.halved = halved
        self.is_of_graph = session.is_of_graph
        self._session = session
        self._stream = stream
        self._names, self._iteration, self._timestep = current_stream(), iteration, timestep
        self._place = 0
        self._functions: set[str] = set()
        self._matched = False
        self.paths: set[str] = set()
        self._found: dict[str, None] = {}

    def path_of(self, path: str, parameter: Tensor | None, known_as: str) -> str:
        """See :meth:`Session.path_of`."""
        return self._session.path_of(path, parameter, known_as)

    def kind_at(self, path: str, told: SiteKind) -> Kind | None:
        """See :meth:`Session.kind_at`."""
        return self._session.kind_at(path, told)

    def found(self, kept: Sequence[Entry], others: Sequence[str]) -> None:
        """Notes the attentions that a graph of this call keeps, and, in words, those that it does not."""
        self._matched = self._matched or bool(kept)
        self.paths.update(entry.path for entry in kept)
        self._found.update(dict.fromkeys(others))

    def require_match(self) -> None:
        """Raises:
        CacheError: no graph of the call keeps anything.
        """
        if self._matched:
            return
        if not self._found:
            raise CacheError(
                f"no graph of {self._session.name} with attention was compiled by attnrewrite: compile the model, or "
                "its parts, with backend='attnrewrite', and enable the cache on what is called"
            )
        raise CacheError(
            f"the cache's config matches no attention of {self._session.name}: {'; '.join([*self._found][:6])}. Set "
            "the skip range of a kind that there is, or block identifiers that match"
        )

    def enter(self, fingerprint: str, parameters: Sequence[Tensor]) -> Hashable:
        """The place in the model of a graph that is called: what it computes, of which parameters, behind which graphs.

        Args:
            fingerprint: of the graph.
            parameters: all that it is called with.

        Returns:
            The same in other calls; None where it cannot be told: which layer calls a function without parameters.
        """
        self._place = hash((self._place, fingerprint, *map(id, parameters)))
        if not parameters and self._session.is_ambiguous(fingerprint, again=fingerprint in self._functions):
            self._found["a graph without parameters, of which it cannot be told which layer calls it"] = None
            return None
        self._functions.add(fingerprint)
        return self._place

    def holds(self, entry: Entry) -> bool:
        """Whether it is to be reused in this call, and what is stored fits."""
        return entry.kind in self.reused and self._stream.holds(entry, self.halved)

    def reuse(self, entry: Entry) -> Tensor:
        """The value that takes the place of one that is not computed."""
        session, history = self._session, self._stream.values(entry.key)
        self._stream.reuses = True
        present = [each.to(entry.value.device, non_blocking=True) for each in history]
        result = session.method.next_value(present, session.weight(entry.path) if len(present) > 1 else 0.0)
        if session.method.keeps_reused:
            self._put(entry, result)
        return result

    def reserve(self, entries: Sequence[Entry]) -> None:
        """Counts what will be stored of values, before they are computed."""
        each = self._session.kept / (2 if self.plan.halves else 1)
        sizes = {entry.key: int(math.prod(entry.shape) * entry.value.dtype.itemsize * each) for entry in entries}
        self._session.reserve(self._stream, sizes)

    def make_room(self, entry: Entry) -> None:
        """Frees what will not be read again, before the value is computed anew."""
        history = self._stream.values(entry.key)
        if history and self._session.observer is None:
            del history[: len(history) - self._session.kept + 1]

    def keep(self, entry: Entry, value: Tensor) -> None:
        """Stores what was computed."""
        observer = self._session.observer
        if observer is not None and entry.kind is not None:
            key, path, kind = entry.key, entry.path, entry.kind
            earlier = self._stream.values(key)
            observer.see(Observation(key, path, kind, self._names, self._iteration, self._timestep, value, earlier))
        self._put(entry, value)

    def _put(self, entry: Entry, value: Tensor) -> None:
        value = _to_host(value) if self._session.config.offload else value
        self._stream.put(entry, value, self._session.kept, self.plan.halves)

    @contextlib.contextmanager
    def in_force(self) -> Iterator[None]:
        """Graphs that are called or compiled within belong to this call."""
        token = _call.set(self)
        try:
            yield
        finally:
            _call.reset(token)


def _to_host(value: Tensor) -> Tensor:
    if value.device.type != "cuda":
        return value.cpu()
    return torch.empty_like(value, device="cpu", pin_memory=True).copy_(value, non_blocking=True)
