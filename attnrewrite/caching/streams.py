"""A stream of calls that belong together, and the values that are stored between them."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Hashable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from attnrewrite.analysis.kinds import Kind
from attnrewrite.caching.graphs import AttentionValue
from attnrewrite.caching.guidance import GuidanceDelta
from attnrewrite.caching.identity import fits
from attnrewrite.caching.runs import DenoisingRun

__all__ = [
    "CallValue",
    "Key",
    "Observation",
    "Observer",
    "ParameterVersions",
    "Stream",
    "cache_stream",
    "current_stream",
    "is_separate",
]

Key = Hashable
"""The name of a value, which is the same at each call, in whichever graph it is computed."""

_stream: ContextVar[tuple[str, ...]] = ContextVar("attnrewrite_cache_stream", default=())


@contextlib.contextmanager
def cache_stream(name: str) -> Iterator[None]:
    """Calls within belong to the stream of this name; each stream has stored values of its own.

    Use one stream for each sequence of calls that belong together. Conditional and unconditional passes that are calls
    of their own need a stream each: call them ``"cond"`` and ``"uncond"``. diffusers' ``cache_context`` does so, and
    has the same effect on a model with a cache. Streams nest: ``cache_stream("a")`` around ``cache_stream("cond")`` is
    another stream than ``cache_stream("cond")`` alone. A stream is in force in the thread (or asyncio task) that enters
    it.
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
    """Whether a stream's calls compute one half of guidance alone, judged by the names that diffusers uses.

    diffusers' pipelines call these streams "cond" and "uncond", its guiders "pred_cond", "pred_uncond" and the like.
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
        earlier: the stored values of earlier calls, the latest last. While fewer than ``history_length`` values were
            computed, the first one is repeated.
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
    """Sees every value that is computed for reuse.

    Attributes:
        history_length: how many values are stored for each attention.
    """

    history_length: int

    def see(self, observation: Observation) -> None:
        """Called in the thread that calls the model."""


class ParameterVersions:
    """The parameters and buffers that a stored value was computed from, each at its version then."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._seen = [(weakref.ref(tensor), _version(tensor)) for tensor in tensors]

    def match(self, tensors: Sequence[Tensor]) -> bool:
        """Whether these are the same tensors, and nothing was written to them since."""
        return len(tensors) == len(self._seen) and all(
            seen() is tensor and version == _version(tensor)
            for (seen, version), tensor in zip(self._seen, tensors, strict=True)
        )


def _version(tensor: Tensor) -> int:
    """The number of writes to the tensor; 0 for a tensor that was made in inference mode, which does not count them."""
    return 0 if tensor.is_inference() else tensor._version


@dataclass(frozen=True)
class CallValue:
    """An attention value in one call of a graph.

    Attributes:
        spec: what the graph says about it.
        kind: as which it is stored; None if it is not.
        path: of its module.
        key: the same in other calls.
        shape: in this call.
        sizes: of the graph's computation in this call.
        constants: the parameters and buffers that it is computed from.
    """

    spec: AttentionValue
    kind: Kind | None
    path: str
    key: Key
    shape: tuple[int, ...]
    sizes: Sequence[Any]
    constants: Sequence[Tensor]


class _Stored(NamedTuple):
    """The stored values of one attention, the latest last.

    Attributes:
        kind: as which they are stored.
        constants, sizes: that the latest one was computed from.
        halves: whether the latest one is a half of what a call with both halves of guidance computed.
        iteration: of the run's call that computed the latest one.
    """

    values: list[Tensor]
    kind: Kind | None
    constants: ParameterVersions
    sizes: Sequence[Any]
    halves: bool
    iteration: int

    def is_of(self, value: CallValue, halves: bool) -> bool:
        """Whether the latest value comes from the same computation as ``value``.

        Args:
            halves: whether ``value`` is computed by a call with both halves of guidance.
        """
        sizes = self.sizes, value.sizes
        larger, smaller = sizes if self.halves else sizes[::-1]
        return fits(larger, smaller, halved=self.halves != halves) and self.constants.match(value.constants)


class Stream:
    """The stored values of one sequence of calls, and the state of its run.

    Attributes:
        run: the denoising run that the calls are in.
        reserved: the bytes of each value, by its key; of values that the current call is going to store, too.
        guidance: predicts the unconditional half; None where it is always computed.
        in_call: whether a call is being made.
        timesteps: of the run's calls.
        should_reuse: whether any of these calls was to reuse something.
        has_reused: whether any of them did.
        is_mixed: whether calls of this run may be those of several layers, and cannot be told apart.
    """

    def __init__(self, tensor_format: str | None = None) -> None:
        """Args:
        tensor_format: of the model's output, where its unconditional half may be predicted; None where it may not.
        """
        self.run = DenoisingRun()
        self.reserved: dict[Key, int] = {}
        self.guidance = None if tensor_format is None else GuidanceDelta(tensor_format)
        self.in_call = False
        self.timesteps: list[float] = []
        self.should_reuse = self.has_reused = self.is_mixed = False
        self._stored: dict[Key, _Stored] = {}
        self._due: dict[Kind, int] = {}

    def begin(self, timestep: float, reused: frozenset[Kind], kinds: frozenset[Kind], frees: bool) -> None:
        """Notes that a call of the run begins.

        Args:
            reused: the kinds whose values the call reuses.
            kinds: all kinds; values of the others are computed.
            frees: whether to drop values that were not computed when they were last due. Their graphs are not called
                any more.
        """
        for kind in kinds - reused:
            before, self._due[kind] = self._due.get(kind, 0), len(self.timesteps)
            stale = [key for key, stored in self._stored.items() if stored.kind == kind and stored.iteration < before]
            for key in stale if frees else ():
                del self._stored[key]
                self.reserved.pop(key, None)
        self.timesteps.append(timestep)
        self.should_reuse = self.should_reuse or bool(reused)

    def values(self, key: Key) -> list[Tensor]:
        """The stored values of a key, the latest last."""
        return self._stored[key].values if key in self._stored else []

    def holds(self, value: CallValue, halved: bool) -> bool:
        """Whether a value of the same computation is stored, and no older than from when its kind was last computed.

        Args:
            halved: whether the model is called with the conditional half alone. Calls with both halves store that
                half, too.
        """
        stored = self._stored.get(value.key)
        if stored is None or not stored.values or value.kind is None:
            return False
        if stored.iteration < self._due.get(value.kind, 0):
            return False
        last = stored.values[-1]
        if last.shape != value.shape or last.dtype != value.spec.dtype:
            return False
        return stored.is_of(value, stored.halves and not halved)

    def put(self, value: CallValue, computed: Tensor, history_length: int, halves: bool) -> None:
        """Stores the newest tensor of a value behind the earlier ones, ``history_length`` in all.

        The first tensor fills the whole history. So does one of another computation than those before.

        Args:
            halves: whether it is one half of what a call with both halves of guidance computed.
        """
        stored = self._stored.get(value.key)
        history: list[Tensor] = []
        if stored is not None and stored.values:
            last = stored.values[-1]
            if last.shape == computed.shape and last.dtype == computed.dtype and stored.is_of(value, halves):
                history = stored.values
        history = [*history, computed][-history_length:] if history else [computed] * history_length
        latest = ParameterVersions(value.constants), value.sizes, halves, len(self.timesteps) - 1
        self._stored[value.key] = _Stored(history, value.kind, *latest)

    def mix(self) -> None:
        """Forgets all values, and notes that nothing tells whose they were."""
        self.is_mixed = True
        self.reserved.clear()
        self._stored.clear()

    def clear(self) -> None:
        """Forgets all values; another run begins."""
        self.timesteps.clear()
        self.should_reuse = self.has_reused = self.is_mixed = False
        self.reserved.clear()
        self._stored.clear()
        self._due.clear()
        if self.guidance is not None:
            self.guidance.reset()
