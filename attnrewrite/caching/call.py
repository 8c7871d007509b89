"""One call of a model: what the compiled graphs within it may reuse, and where they put what they compute."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Hashable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field

import torch
from torch import Tensor

from attnrewrite.analysis.kinds import Kind, SiteKind
from attnrewrite.caching.memory import CacheMemory
from attnrewrite.caching.method import CacheMethod
from attnrewrite.caching.model_paths import ModelPaths
from attnrewrite.caching.runs import step_of
from attnrewrite.caching.streams import CallValue, Observation, Observer, Stream, current_stream
from attnrewrite.errors import CacheError

__all__ = ["ModelCall", "ModelReuse", "ReusePlan", "current_call"]

log = logging.getLogger("attnrewrite")

_call: ContextVar[ModelCall | None] = ContextVar("attnrewrite_model_call", default=None)


def current_call() -> ModelCall | None:
    """The call of a model with a cache that is being made; None outside of such calls."""
    return _call.get()


@dataclass(frozen=True)
class ReusePlan:
    """What a graph is compiled for: which attentions are stored, and which kinds are reused together.

    Attributes:
        settings: of the config, what the graphs depend on.
        reused: the sets of kinds that are reused together.
        halves: whether the batch has both halves of guidance, of which the second one is stored.
        method: the config's.
    """

    settings: Hashable
    reused: frozenset[frozenset[Kind]]
    halves: bool
    method: CacheMethod = field(compare=False)


@dataclass(frozen=True)
class ModelReuse:
    """What all calls of one model share.

    Attributes:
        method: the config's.
        settings: of the config, what the graphs depend on.
        offload: whether values are stored in the host's memory.
        paths: where the model's modules are.
        memory: what is stored.
        observer: sees what is computed, and says how much of it is stored; None: as much as the method needs.
    """

    method: CacheMethod
    settings: Hashable
    offload: bool
    paths: ModelPaths
    memory: CacheMemory
    observer: Observer | None

    @property
    def history_length(self) -> int:
        """How many values are stored for each attention."""
        return self.method.history_length if self.observer is None else self.observer.history_length


class ModelCall:
    """One call of the model.

    Attributes:
        reused: the kinds whose values are to be reused.
        plan: what the graphs are compiled for.
        halved: whether the model is called with the conditional half alone.
        predicts_unconditional: whether the unconditional half may be a prediction, in this call or in another one.
        is_of_graph: whether a single graph is called, and not a model.
        stream: that the call belongs to.
        paths: of the modules whose attentions were stored so far.
    """

    def __init__(
        self, model: ModelReuse, stream: Stream, iteration: int, timestep: float, *, halved: bool, separate: bool
    ) -> None:
        """Args:
        iteration: how many calls of the run came before.
        halved: whether the model is called with the conditional half alone.
        separate: whether conditional and unconditional inputs come in calls of their own.
        """
        method = model.method
        self.reused = method.reused(iteration, timestep, halved, separate)
        self.predicts_unconditional = method.predicts_unconditional(separate)
        # Where both halves are computed, the conditional one is stored.
        halves = self.predicts_unconditional and not halved
        self.plan = ReusePlan(model.settings, method.reachable(halved, separate), halves, method)
        self.halved = halved
        self.is_of_graph = model.paths.is_graph
        self.stream = stream
        self.paths: set[str] = set()
        self._model = model
        self._stream_names, self._iteration, self._timestep = current_stream(), iteration, timestep
        self._position = 0
        self._fingerprints: set[str] = set()
        self._not_stored: dict[str, None] = {}

    def path_of(self, path: str, parameter: Tensor | None, parameter_path: str) -> str:
        """See :meth:`ModelPaths.path_of`."""
        return self._model.paths.path_of(path, parameter, parameter_path)

    def kind_at(self, path: str, detected: SiteKind) -> Kind | None:
        """See :meth:`ModelPaths.kind_at`."""
        return self._model.paths.kind_at(path, detected)

    def found(self, stored: Sequence[CallValue], not_stored: Sequence[str]) -> None:
        """Notes the values that a graph of this call stores, and, in words, the attentions that it does not store."""
        self.paths.update(value.path for value in stored)
        self._not_stored.update(dict.fromkeys(not_stored))

    def require_match(self) -> None:
        """Raises:
        CacheError: no graph of the call stores anything.
        """
        if self.paths:
            return
        name = self._model.paths.name
        if not self._not_stored:
            raise CacheError(
                f"no graph of {name} with attention was compiled by attnrewrite: compile the model, or its parts, with "
                "backend='attnrewrite', and enable the cache on what is called"
            )
        raise CacheError(
            f"the cache's config matches no attention of {name}: {'; '.join([*self._not_stored][:6])}. Set the skip "
            "range of a kind that the model has, or block identifiers that match"
        )

    def enter(self, fingerprint: str, parameters: Sequence[Tensor]) -> Hashable:
        """The position of a graph in the model's call: its computation, its parameters, and the graphs called before.

        Args:
            fingerprint: of the graph.
            parameters: all that it is called with.

        Returns:
            The same in other calls; None where it cannot be told which layer calls the graph.
        """
        self._position = hash((self._position, fingerprint, *map(id, parameters)))
        if self.is_of_graph:
            return self._position if self._is_told_apart(fingerprint, parameters) else None
        called_before = fingerprint in self._fingerprints
        if not parameters and self._model.paths.is_ambiguous(fingerprint, called_before):
            self._not_stored["a graph without parameters, of which it cannot be told which layer calls it"] = None
            return None
        self._fingerprints.add(fingerprint)
        return self._position

    def _is_told_apart(self, fingerprint: str, parameters: Sequence[Tensor]) -> bool:
        """Whether a graph that is used alone is called once in each step of the run, as far as the calls show it.

        The order of several calls does not tell them apart: a step may be begun again after any of them.
        """
        paths, names = self._model.paths, self._stream_names
        step = step_of(paths.clock, names)
        repeated = step.repeats(self._timestep, (fingerprint, *map(id, parameters)))
        if repeated and not step.warned:
            step.warned = True
            log.warning(
                "a graph with attention was called more than once at timestep %g within one cache stream. These may be "
                "the calls of several layers or passes, or of a step that was begun again, so their attention is not "
                "reused. Put each of a step's calls in a stream of its own (attnrewrite.cache_stream), or call "
                "attnrewrite.enable_cache on the whole compiled model instead of options={'cache': ...}",
                self._timestep,
            )
        # Without parameters it may be another layer's turn in the next run, too.
        mixed = paths.is_ambiguous(fingerprint, repeated) if not parameters else repeated or self.stream.is_mixed
        if mixed:
            self.stream.mix()
        return not mixed

    def holds(self, value: CallValue) -> bool:
        """Whether the value is to be reused in this call, and a stored one fits."""
        return value.kind in self.reused and self.stream.holds(value, self.halved)

    def reuse(self, value: CallValue) -> Tensor:
        """The tensor that takes the place of a value that is not computed."""
        method = self._model.method
        self.stream.has_reused = True
        history = [stored.to(value.spec.device, non_blocking=True) for stored in self.stream.values(value.key)]
        weight = self._model.paths.attention_weight(value.path) if len(history) > 1 else 0.0
        result = method.next_value(history, weight)
        if method.keeps_reused:
            self._put(value, result)
        return result

    def reserve(self, values: Sequence[CallValue]) -> None:
        """Counts the bytes that will be stored, before the values are computed."""
        copies = self._model.history_length / (2 if self.plan.halves else 1)
        sizes = {value.key: int(math.prod(value.shape) * value.spec.dtype.itemsize * copies) for value in values}
        self._model.memory.reserve(self.stream, sizes)

    def make_room(self, value: CallValue) -> None:
        """Frees what will not be read again, before the value is computed anew."""
        history = self.stream.values(value.key)
        if history and self._model.observer is None:
            del history[: len(history) - self._model.history_length + 1]

    def store(self, value: CallValue, computed: Tensor) -> None:
        """Stores what was computed."""
        observer = self._model.observer
        if observer is not None and value.kind is not None:
            earlier = self.stream.values(value.key)
            names, iteration, timestep = self._stream_names, self._iteration, self._timestep
            observer.see(Observation(value.key, value.path, value.kind, names, iteration, timestep, computed, earlier))
        self._put(value, computed)

    def _put(self, value: CallValue, computed: Tensor) -> None:
        stored = _to_host(computed) if self._model.offload else computed
        self.stream.put(value, stored, self._model.history_length, self.plan.halves)

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
