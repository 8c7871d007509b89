"""What is stored between the calls of a model, for each stream of calls that belong together."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Hashable, Iterator, Sequence
from contextvars import ContextVar
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from attnrewrite.analysis.kinds import Kind
from attnrewrite.caching.guidance import GuidanceDelta
from attnrewrite.caching.runs import Run

__all__ = ["Constants", "Key", "Observation", "Observer", "Stream", "cache_stream", "current_stream", "is_separate"]

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
    """Whether its calls are of one half of guidance alone, by the names that diffusers' pipelines use."""
    return bool(stream) and (stream[-1] == "cond" or stream[-1].startswith("uncond"))


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


class Stream:
    """What is stored for one sequence of calls, and where its run stands.

    Attributes:
        values: the stored values by their keys, the latest last.
        reserved: the bytes that they take, or will at the end of the call that is being made.
        guidance: the difference of guidance, where it is predicted.
        in_call: whether a call is being made.
        timesteps: of the calls of the run.
        reuses: whether any of them was to reuse something.
    """

    def __init__(self, tensor_format: str | None) -> None:
        """Args:
        tensor_format: of the model's output, where guidance is predicted.
        """
        self.run = Run()
        self.values: dict[Key, list[Tensor]] = {}
        self.reserved: dict[Key, int] = {}
        self.guidance = None if tensor_format is None else GuidanceDelta(tensor_format)
        self.in_call = False
        self.timesteps: list[float] = []
        self.reuses = False
        self._constants: dict[Key, Constants] = {}

    def holds(self, key: Key, shape: Sequence[int], dtype: torch.dtype, constants: Sequence[Tensor]) -> bool:
        """Whether there is a value of this shape and dtype that was computed of these tensors, as they are now."""
        history = self.values.get(key)
        if not history or history[-1].shape != shape or history[-1].dtype != dtype:
            return False
        return self._constants[key].are(constants)

    def put(self, key: Key, value: Tensor, constants: Sequence[Tensor], kept: int) -> None:
        """Stores a value beside those before it, ``kept`` in all; the first one counts as those before, too."""
        if key not in self._constants or not self._constants[key].are(constants):
            self._constants[key] = Constants(constants)
        history = self.values.get(key, [])
        if history and (history[-1].shape != value.shape or history[-1].dtype != value.dtype):
            history = []
        self.values[key] = [*history, value][-kept:] if history else [value] * kept

    def clear(self) -> None:
        """Forgets all values; another run begins."""
        self.timesteps.clear()
        self.reuses = False
        self.values.clear()
        self.reserved.clear()
        self._constants.clear()
        if self.guidance is not None:
            self.guidance.reset()
