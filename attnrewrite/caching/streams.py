"""What is stored between the calls of a model, for each stream of calls that belong together."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Hashable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from attnrewrite.analysis.kinds import Kind
from attnrewrite.caching.graphs import Value
from attnrewrite.caching.guidance import GuidanceDelta
from attnrewrite.caching.identity import fits
from attnrewrite.caching.runs import Run

__all__ = [
    "Constants",
    "Entry",
    "Key",
    "Observation",
    "Observer",
    "Stream",
    "cache_stream",
    "current_stream",
    "is_separate",
]

Key = Hashable
"""What names a value from call to call, in whichever graph it is computed."""

_stream: ContextVar[tuple[str, ...]] = ContextVar("attnrewrite_cache_stream", default=())


@contextlib.contextmanager
def cache_stream(name: str) -> Iterator[None]:
    """Keeps what is stored within apart from other streams: one for each sequence of calls that belong together.

    Conditional and unconditional passes that are calls of their own need a stream each: call them ``"cond"`` and
    ``"uncond"``, as diffusers' ``cache_context`` does, which has the same effect on a model with a cache. Streams nest:
    ``cache_stream("a")`` around ``cache_stream("cond")`` is another one than ``cache_stream("cond")`` alone. It holds
    in the thread (or asyncio task) that enters it.
    """
    token = _stream.set((*_stream.get(), name))
    try:
        yield
    finally:
        _stream.reset(token)


def current_stream() -> tuple[str, ...]:
    """The names of the streams that calls are made in, the outermost first."""
    return _stream.get()


def is_separate(stream: tuple[str, ...]) -> bool:
    """Whether its calls are of one half of guidance alone, by the names that diffusers gives them.

    Its pipelines call them "cond" and "uncond", its guiders "pred_cond", "pred_uncond" and the like.
    """
    return bool(stream) and any(word == "cond" or word.startswith("uncond") for word in stream[-1].split("_"))


class Observation(NamedTuple):
    """A value that was computed, before it is stored.

    Attributes:
        key: the same for the values of one attention at all calls.
        path: of the attention's module.
        stream: the names of the streams that the call is made in, the outermost first.
        iteration: how many calls of the run came before; 0 begins a run.
        timestep: of the call, in the scheduler's units.
        value: the new value; not to be changed.
        earlier: what is stored of the calls before, the latest last. Before ``kept`` values there were, the first one
            is there several times.
    """

    key: Key
    path: str
    kind: Kind
    stream: tuple[str, ...]
    iteration: int
    timestep: float
    value: Tensor
    earlier: Sequence[Tensor]


class Observer(Protocol):
    """Sees every value that a session stores.

    Attributes:
        kept: how many values are stored for a site.
    """

    kept: int

    def see(self, observation: Observation) -> None:
        """Called in the thread that calls the model."""


class Constants:
    """Parameters and buffers that a stored value was computed of, and whether others are the same."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._seen = [(weakref.ref(tensor), _version(tensor)) for tensor in tensors]

    def are(self, tensors: Sequence[Tensor]) -> bool:
        return len(tensors) == len(self._seen) and all(
            seen() is tensor and version == _version(tensor)
            for (seen, version), tensor in zip(self._seen, tensors, strict=True)
        )


def _version(tensor: Tensor) -> int:
    """Counts what is written to the tensor; tensors that were made in inference mode do not count it."""
    return 0 if tensor.is_inference() else tensor._version


@dataclass(frozen=True)
class Entry:
    """A value in one call of a graph.

    Attributes:
        value: of the graph.
        kind: under which it is kept there; None if it is not.
        path: of its module.
        key: the same in other calls.
        shape: that it has.
        sizes: of the graph's computation.
        constants: the parameters and buffers that it is computed of.
    """

    value: Value
    kind: Kind | None
    path: str
    key: Key
    shape: tuple[int, ...]
    sizes: Sequence[Any]
    constants: Sequence[Tensor]


class _Stored(NamedTuple):
    """The values of one attention, the latest last, and what the latest was computed with, in which call of the run."""

    values: list[Tensor]
    kind: Kind | None
    constants: Constants
    sizes: Sequence[Any]
    halves: bool
    iteration: int

    def is_of(self, entry: Entry, halves: bool) -> bool:
        """Whether what is stored was computed as the entry is.

        Args:
            halves: whether the entry is computed by a call with both halves of guidance.
        """
        sizes = self.sizes, entry.sizes
        larger, smaller = sizes if self.halves else sizes[::-1]
        return fits(larger, smaller, halved=self.halves != halves) and self.constants.are(entry.constants)


class Stream:
    """What is stored for one sequence of calls, and where its run stands.

    Attributes:
        reserved: the bytes that values take, or will at the end of the call that is being made, by their keys.
        guidance: the difference of guidance, where it is predicted.
        in_call: whether a call is being made.
        timesteps: of the calls of the run.
        asked: whether any of them was to reuse something.
        reuses: whether any of them did.
    """

    def __init__(self, tensor_format: str | None) -> None:
        """Args:
        tensor_format: of the model's output, where guidance is predicted.
        """
        self.run = Run()
        self.reserved: dict[Key, int] = {}
        self.guidance = None if tensor_format is None else GuidanceDelta(tensor_format)
        self.in_call = False
        self.timesteps: list[float] = []
        self.asked = self.reuses = False
        self._stored: dict[Key, _Stored] = {}
        self._due: dict[Kind, int] = {}

    def begin(self, timestep: float, reused: frozenset[Kind], kinds: frozenset[Kind], frees: bool) -> None:
        """Notes that a call of the run begins, which reuses attentions of some kinds, and computes the others.

        Args:
            frees: whether values go that were not computed anew when that was due before: their graphs are not called
                any more.
        """
        for kind in kinds - reused:
            before, self._due[kind] = self._due.get(kind, 0), len(self.timesteps)
            gone = [key for key, stored in self._stored.items() if stored.kind == kind and stored.iteration < before]
            for key in gone if frees else ():
                del self._stored[key]
                self.reserved.pop(key, None)
        self.timesteps.append(timestep)
        self.asked = self.asked or bool(reused)

    def values(self, key: Key) -> list[Tensor]:
        """What is stored, the latest last."""
        return self._stored[key].values if key in self._stored else []

    def holds(self, entry: Entry, halved: bool) -> bool:
        """Whether there is a value of the same computation, from when attentions of its kind were last to be computed.

        Args:
            halved: whether the call is one of the conditional half, of which a call with both halves stored it, too.
        """
        stored = self._stored.get(entry.key)
        if stored is None or not stored.values or entry.kind is None:
            return False
        if stored.iteration < self._due.get(entry.kind, 0):
            return False
        last = stored.values[-1]
        if last.shape != entry.shape or last.dtype != entry.value.dtype:
            return False
        return stored.is_of(entry, stored.halves and not halved)

    def put(self, entry: Entry, value: Tensor, kept: int, halves: bool) -> None:
        """Stores a value beside those before it, ``kept`` in all; the first one counts as those before, too.

        So does one that was computed otherwise than those before.

        Args:
            halves: whether it is one half of what a call with both computed.
        """
        stored = self._stored.get(entry.key)
        values: list[Tensor] = []
        if stored is not None and stored.values:
            last = stored.values[-1]
            if last.shape == value.shape and last.dtype == value.dtype and stored.is_of(entry, halves):
                values = stored.values
        values = [*values, value][-kept:] if values else [value] * kept
        latest = Constants(entry.constants), entry.sizes, halves, len(self.timesteps) - 1
        self._stored[entry.key] = _Stored(values, entry.kind, *latest)

    def clear(self) -> None:
        """Forgets all values; another run begins."""
        self.timesteps.clear()
        self.asked = self.reuses = False
        self.reserved.clear()
        self._stored.clear()
        self._due.clear()
        if self.guidance is not None:
            self.guidance.reset()
