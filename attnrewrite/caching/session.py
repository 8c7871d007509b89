"""One model's reuse of attention: what stands around its calls, and what is stored between them.

A session asks for the timestep before each call of the model, counts the calls of a stream's run, and says in a context
variable what the compiled graphs within the call may reuse. Streams are kept apart by name and by thread.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from attnrewrite.analysis.kinds import Kind, SiteKind, is_named_temporal
from attnrewrite.caching.config import FasterCacheConfig, PyramidAttentionBroadcastConfig
from attnrewrite.caching.graphs import Value, is_parameter
from attnrewrite.caching.guidance import GuidanceDelta, halved_inputs
from attnrewrite.caching.method import Method, method_of
from attnrewrite.caching.runs import Run, timestep_of, weight_of
from attnrewrite.errors import CacheError, CacheMemoryError

__all__ = ["Key", "ModelCall", "Observation", "Observer", "Plan", "Session", "cache_stream", "current_call"]

log = logging.getLogger("attnrewrite")

Key = Hashable
"""What names a value from call to call, in whichever graph it is computed."""

_call: ContextVar[ModelCall | None] = ContextVar("attnrewrite_model_call", default=None)
_stream: ContextVar[tuple[str, ...]] = ContextVar("attnrewrite_cache_stream", default=())


def current_call() -> ModelCall | None:
    """The call of a model that is being made and keeps attention values; None where none is."""
    return _call.get()


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


def _is_separate(stream: tuple[str, ...]) -> bool:
    """Whether its calls are of one half of guidance alone, by the names that diffusers' pipelines use."""
    return bool(stream) and (stream[-1] == "cond" or stream[-1].startswith("uncond"))


@dataclass(frozen=True)
class Plan:
    """What a graph is compiled for: which attentions are kept, and which kinds are reused together.

    ``halves``: of a batch with both halves of guidance, the second one is kept.
    """

    settings: Hashable
    reused: frozenset[frozenset[Kind]]
    halves: bool
    method: Method = field(compare=False)


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


class _Constants:
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


class _Stream:
    def __init__(self, tensor_format: str | None) -> None:
        self.run = Run()
        self.values: dict[Key, list[Tensor]] = {}
        self.reserved: dict[Key, int] = {}
        self.constants: dict[Key, _Constants] = {}
        self.guidance = None if tensor_format is None else GuidanceDelta(tensor_format)
        self.in_call = False

    def clear(self) -> None:
        self.values.clear()
        self.reserved.clear()
        self.constants.clear()
        if self.guidance is not None:
            self.guidance.reset()


class Session:
    """What is stored for one model (or for one graph), and the rules for it."""

    def __init__(
        self,
        config: PyramidAttentionBroadcastConfig | FasterCacheConfig,
        model: nn.Module | None = None,
        observer: Observer | None = None,
    ) -> None:
        """Args:
        config: validated.
        model: whose calls are counted; None for those of a single graph.
        observer: sees what is stored, and says how much of it is; default None: as much as the method needs.
        """
        self.config = config
        self.method = method_of(config)
        self.observer = observer
        self.kept = self.method.kept if observer is None else observer.kept
        kinds = ("spatial", "temporal", "cross")
        identifiers = (getattr(config, f"{kind}_attention_block_identifiers", None) for kind in kinds)
        self.settings = (self.method.kinds, *identifiers)
        self.name = "the graph" if model is None else type(model).__qualname__
        self._model = None if model is None else weakref.ref(model)
        self._paths: dict[tuple[str, int], str] = {}
        self._kinds: dict[tuple[str, Kind], Kind | None] = {}
        self._here = threading.local()
        self._streams: weakref.WeakSet[_Stream] = weakref.WeakSet()
        self._lock = threading.Lock()
        self._generation = 0
        self._warned = False
        self._matched = False
        self._prepared: set[Hashable] = set()

    @property
    def nbytes(self) -> int:
        """The bytes that are stored, or will be at the end of the calls that are being made."""
        with self._lock:
            return sum(sum(stream.reserved.values()) for stream in self._streams)

    @contextlib.contextmanager
    def planned(self) -> Iterator[None]:
        """Graphs that are compiled within are compiled for the first call of a run."""
        token = _call.set(ModelCall(self, _Stream(None), 0, math.nan, halved=False, separate=False))
        try:
            yield
        finally:
            _call.reset(token)

    def reset(self) -> None:
        """Forgets all that is stored, in every stream and thread: the next call of each is the first of a run."""
        with self._lock:
            self._generation += 1
            for stream in self._streams:
                # One that is in a call, of another thread, is replaced, and not emptied under it.
                if not stream.in_call:
                    stream.clear()
            self._streams = weakref.WeakSet()

    def around(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """The model's call, with reuse."""

        @functools.wraps(call)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            return self.call(call, args, kwargs)

        return wrapper

    def around_graph(self, compiled: Callable[..., Any], gm: fx.GraphModule) -> Callable[..., Any]:
        """A compiled graph's call, with reuse; runs are told apart by what it is called with beside parameters.

        Modules that share the graph, and have parameters of their own, have a session each.
        """
        placeholders = gm.graph.find_nodes(op="placeholder")
        inputs = [number for number, node in enumerate(placeholders) if not is_parameter(node)]
        parameters = [number for number, node in enumerate(placeholders) if is_parameter(node)]
        sessions: dict[int, tuple[_Constants, Session]] = {}

        def wrapper(*args: Any) -> Any:
            session = self
            if parameters:
                first = args[parameters[0]]
                known = sessions.get(id(first))
                if known is None or not known[0].are([first]):
                    known = sessions[id(first)] = _Constants([first]), Session(self.config)
                session = known[1]
            return session.call(compiled, args, {}, [args[number] for number in inputs])

        return wrapper

    def call(
        self,
        function: Callable[..., Any],
        args: Sequence[Any],
        kwargs: dict[str, Any],
        signature: Sequence[Any] | None = None,
    ) -> Any:
        """One call of the model.

        Args:
            signature: of the arguments, those whose change begins another run; default all.
        """
        self._require_inference(args, kwargs)
        assert self.config.current_timestep_callback is not None
        timestep = timestep_of(self.config.current_timestep_callback)
        name = _stream.get()
        separate = _is_separate(name)
        stream = self._stream(name)
        shapes = _signature((args, kwargs) if signature is None else signature)
        iteration = stream.run.advance(timestep, shapes)
        if iteration == 0:
            stream.clear()
        if stream.run.repeats and not self._warned:
            self._warned = True
            log.warning(
                "%s was called twice at timestep %g within one cache stream. If these are the conditional and the "
                "unconditional pass, they now share attention: call each within attnrewrite.cache_stream('cond') and "
                "cache_stream('uncond')",
                self.name,
                timestep,
            )
        skips = self.method.skips_unconditional(iteration, timestep, separate)
        current = ModelCall(self, stream, iteration, timestep, halved=skips, separate=separate)
        stream.in_call = True
        try:
            if skips:
                args, kwargs = halved_inputs(tuple(args), kwargs, self._split_names)
            elif iteration == 0 and self._predicts(separate):
                self._prepare(function, args, kwargs, shapes)
            result = _within(current, function, args, kwargs)
            if self._predicts(separate):
                result = _with_guidance(self, stream, result, skips)
            if not self._matched and self._model is not None:
                current.require_match()
                self._matched = True
        except BaseException:
            # Some values are of this call and some of the one before.
            stream.run.reset()
            stream.clear()
            raise
        finally:
            stream.in_call = False
        return result

    def _prepare(
        self, function: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any], shapes: Hashable
    ) -> None:
        """Has the graphs for the conditional half compiled at once, by a call of which nothing is kept.

        It comes before the call that is asked for, whose result the next replay of a CUDA graph would overwrite.
        """
        if shapes in self._prepared or not self.method.may_skip_unconditional:
            return
        halved = halved_inputs(tuple(args), kwargs, self._split_names)
        # What the model writes to its inputs, or draws at random, is to happen once.
        halved_args, halved_kwargs = tree_map_only(Tensor, Tensor.clone, halved)
        devices = {leaf.device for leaf in tree_leaves(halved) if isinstance(leaf, Tensor) and leaf.is_cuda}
        current = ModelCall(self, _Stream(None), 0, math.nan, halved=True, separate=False)
        try:
            with torch.random.fork_rng(devices=list(devices)):
                _within(current, function, halved_args, halved_kwargs)
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            whole = [name for name in kwargs if name not in self._split_names]
            raise CacheError(
                f"{self.name} cannot be called with the conditional half alone, as FasterCache does "
                f"({type(error).__name__}: {' '.join(str(error).split())[:200]}). Halved were positional arguments and "
                f"{', '.join(self._split_names)}; not halved: {', '.join(whole) or 'none'}. Name all that hold both "
                "halves in unconditional_conditional_input_kwargs_identifiers"
            ) from error
        self._prepared.add(shapes)

    def _require_inference(self, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        model = self._module("")
        if model.training and self._model is not None:
            raise CacheError(
                f"{self.name} is in training mode, and attention is reused at inference only: call model.eval(), or "
                "disable_cache(model) to train"
            )
        if torch.is_grad_enabled() and any(
            tensor.requires_grad
            for tensor in (*model.parameters(), *tree_leaves((args, kwargs)))
            if isinstance(tensor, Tensor)
        ):
            raise CacheError(
                f"{self.name} is called with gradients, and attention is reused at inference only: call it within "
                "torch.no_grad() or torch.inference_mode(), or disable_cache(model) to train"
            )

    @property
    def _split_names(self) -> Sequence[str]:
        assert isinstance(self.config, FasterCacheConfig)
        return self.config.unconditional_conditional_input_kwargs_identifiers or ()

    def _predicts(self, separate: bool) -> bool:
        config = self.config
        return isinstance(config, FasterCacheConfig) and not config.is_guidance_distilled and not separate

    def _stream(self, name: tuple[str, ...]) -> _Stream:
        here = self._here
        if getattr(here, "generation", None) != self._generation:
            here.generation, here.streams = self._generation, {}
        streams: dict[tuple[str, ...], _Stream] = here.streams
        if name not in streams:
            predicts = self._predicts(_is_separate(name))
            streams[name] = _Stream(self.config.tensor_format if predicts else None)  # type: ignore[union-attr]
            with self._lock:
                self._streams.add(streams[name])
        return streams[name]

    def reserve(self, stream: _Stream, sizes: Mapping[Key, int]) -> None:
        """Counts values, in bytes, before they are stored.

        Raises:
            CacheMemoryError: it would be more than ``memory_limit``.
        """
        new = {key: nbytes for key, nbytes in sizes.items() if key not in stream.reserved}
        if not new:
            return
        limit, taken, needed = self.config.memory_limit, self.nbytes, sum(new.values())
        where = "the host" if self.config.offload else "the device"
        log.info("%s: %d attention values take %s of %s's memory", self.name, len(new), _mib(needed), where)
        if limit is not None and taken + needed > limit:
            others = f", beside {_mib(taken)} that are stored already" if taken else ""
            raise CacheMemoryError(
                f"{len(new)} attention values of {self.name} take {_mib(needed)} of {where}'s memory{others}, and "
                f"memory_limit is {_mib(limit)}: raise it (None is no limit), keep fewer attentions (a skip range of "
                "None, or block identifiers), or call disable_cache(model)"
            )
        stream.reserved.update(new)

    def path_of(self, path: str, parameter: Tensor | None) -> str:
        """Where in the model a module is that its own graph knows as ``path``, by one of its parameters."""
        key = path, id(parameter)
        if parameter is None or self._model is None:
            return path
        if key not in self._paths:
            name = next((name for name, each in self._module("").named_parameters() if each is parameter), "")
            before, found, _ = f".{name}".partition(f".{path}.") if path else (f".{name}".rpartition(".")[0], "", "")
            self._paths[key] = f"{before}{found}".strip(".") or path
        return self._paths[key]

    def kind_at(self, path: str, told: SiteKind) -> Kind | None:
        """The kind under which the attention of a module is kept whose graph serves modules at other paths, too."""
        key = path, told.kind
        if key not in self._kinds:
            kind = told.kind
            if kind == "spatial" and not told.is_proved and is_named_temporal(path):
                kind = "temporal"
            self._kinds[key] = self.method.kind_of(path, kind)
        return self._kinds[key]

    def weight(self, path: str) -> float:
        """FasterCache's weight for the attention at a path; 0 for a method that has none."""
        config = self.config
        if not isinstance(config, FasterCacheConfig):
            return 0.0
        assert config.attention_weight_callback is not None
        return weight_of(config.attention_weight_callback, self._module(path), "attention_weight_callback")

    def guidance_weights(self) -> tuple[float, float]:
        """FasterCache's weights for low and high frequencies at this call."""
        config = self.config
        assert isinstance(config, FasterCacheConfig)
        low, high = config.low_frequency_weight_callback, config.high_frequency_weight_callback
        assert low is not None and high is not None
        model = self._module("")
        return (
            weight_of(low, model, "low_frequency_weight_callback"),
            weight_of(high, model, "high_frequency_weight_callback"),
        )

    def _module(self, path: str) -> nn.Module:
        """The module at a path; the model itself where the path is another one's (of a part that is compiled alone)."""
        model = None if self._model is None else self._model()
        if model is None:
            return nn.Module()
        try:
            return model.get_submodule(path)
        except AttributeError:
            return model


class ModelCall:
    """One call of the model: what its graphs may reuse, and where they put what they compute."""

    def __init__(
        self, session: Session, stream: _Stream, iteration: int, timestep: float, *, halved: bool, separate: bool
    ) -> None:
        method = session.method
        self.reused = method.reused(iteration, timestep, halved, separate)
        # Where both halves are computed, the conditional one is kept.
        halves = session._predicts(separate) and not halved
        self.plan = Plan(session.settings, method.reachable(halved, separate), halves, method)
        self.is_of_graph = session._model is None
        self._session = session
        self._stream = stream
        self._names, self._iteration, self._timestep = _stream.get(), iteration, timestep
        self._visits: Counter[Key] = Counter()
        self._matched = False
        self._found: dict[str, None] = {}

    def visit(self, key: Key) -> Key:
        """The key, and how often it was met in this call before."""
        self._visits[key] += 1
        return key, self._visits[key] - 1

    def path_of(self, path: str, parameter: Tensor | None) -> str:
        """See :meth:`Session.path_of`."""
        return self._session.path_of(path, parameter)

    def kind_at(self, path: str, told: SiteKind) -> Kind | None:
        """See :meth:`Session.kind_at`."""
        return self._session.kind_at(path, told)

    def found(self, kept: int, others: Sequence[str]) -> None:
        """Notes how many attentions a graph of this call keeps, and, in words, which it does not."""
        self._matched = self._matched or bool(kept)
        self._found.update(dict.fromkeys(others))

    def require_match(self) -> None:
        """Raises:
        CacheError: no graph of the call keeps anything.
        """
        if self._matched:
            return
        there = "; ".join([*self._found][:6]) or (
            "no graph with attention was compiled by attnrewrite (compile with backend='attnrewrite')"
        )
        raise CacheError(
            f"the cache's config matches no attention of {self._session.name}: {there}. Set the skip range of a kind "
            "that there is, or block identifiers that match"
        )

    def holds(self, key: Key, shape: tuple[int, ...], path: str, constants: Sequence[Tensor]) -> bool:
        """Whether there is a value to reuse that was computed with these parameters, as they are.

        Raises:
            CacheError: it has another shape. Within a run that comes of halving a dimension that is not the batch.
        """
        history = self._stream.values.get(key, [])
        if history and history[-1].shape != shape:
            raise CacheError(
                f"what is kept of the attention {path or 'of a function'} has the shape {tuple(history[-1].shape)}, "
                f"and {shape} is needed: its batch is not dimension 0. Exclude it by block identifiers"
            )
        return bool(history) and self._stream.constants[key].are(constants)

    def reuse(self, key: Key, value: Value, path: str, constants: Sequence[Tensor]) -> Tensor:
        """The value that takes the place of one that is not computed; ``path`` is its module's."""
        session, history = self._session, self._stream.values[key]
        present = [each.to(value.device, non_blocking=True) for each in history]
        result = session.method.next_value(present, session.weight(path) if len(present) > 1 else 0.0)
        if session.method.keeps_reused:
            self._put(key, result, constants)
        return result

    def reserve(self, values: Sequence[tuple[Key, Value, tuple[int, ...]]]) -> None:
        """Counts what will be stored of values of these shapes, before they are computed."""
        each = self._session.kept / (2 if self.plan.halves else 1)
        sizes = {key: int(math.prod(shape) * value.dtype.itemsize * each) for key, value, shape in values}
        self._session.reserve(self._stream, sizes)

    def make_room(self, key: Key) -> None:
        """Frees what will not be read again, before the value is computed anew."""
        history = self._stream.values.get(key)
        if history and self._session.observer is None:
            del history[: len(history) - self._session.kept + 1]

    def keep(self, key: Key, value: Tensor, path: str, kind: Kind, constants: Sequence[Tensor]) -> None:
        """Stores what was computed of an attention and ``constants``; ``path`` is its module's."""
        observer = self._session.observer
        if observer is not None:
            earlier = self._stream.values.get(key, ())
            observer.see(Observation(key, path, kind, self._names, self._iteration, self._timestep, value, earlier))
        self._put(key, value, constants)

    def _put(self, key: Key, value: Tensor, constants: Sequence[Tensor]) -> None:
        if key not in self._stream.constants or not self._stream.constants[key].are(constants):
            self._stream.constants[key] = _Constants(constants)
        history = self._stream.values.get(key)
        value = _to_host(value) if self._session.config.offload else value
        kept = self._session.kept
        self._stream.values[key] = [*history, value][-kept:] if history else [value] * kept


def _within(current: ModelCall, function: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    token = _call.set(current)
    try:
        return function(*args, **kwargs)
    finally:
        _call.reset(token)


def _to_host(value: Tensor) -> Tensor:
    if value.device.type != "cuda":
        return value.cpu()
    return torch.empty_like(value, device="cpu", pin_memory=True).copy_(value, non_blocking=True)


def _signature(arguments: Any) -> Hashable:
    """The shapes, dtypes and devices of all tensors."""
    return tuple(
        (tuple(leaf.shape), leaf.dtype, leaf.device) for leaf in tree_leaves(arguments) if isinstance(leaf, Tensor)
    )


def _mib(nbytes: int) -> str:
    return f"{nbytes / 2**20:,.1f} MiB"


def _with_guidance(session: Session, stream: _Stream, result: Any, halved: bool) -> Any:
    """The model's result with both halves, of which the unconditional one may be a prediction."""
    assert stream.guidance is not None
    output, put_back = _first_output(result)
    if not halved:
        stream.guidance.learn(output)
        return result
    return put_back(stream.guidance.complete(output, *session.guidance_weights()))


def _first_output(result: Any) -> tuple[Tensor, Callable[[Tensor], Any]]:
    """The tensor that the denoiser gives, and how to put another in its place."""
    if isinstance(result, Tensor):
        return result, lambda output: output
    if type(result) is tuple and result and isinstance(result[0], Tensor):
        return result[0], lambda output: (output, *result[1:])
    sample = getattr(result, "sample", None)
    if isinstance(sample, Tensor):

        def put_back(output: Tensor) -> Any:
            result.sample = output
            return result

        return sample, put_back
    raise CacheError(
        f"FasterCache takes a tensor, a tuple that begins with one, or an output with .sample; the model returned "
        f"{type(result).__name__}. Set is_guidance_distilled=True to keep to attention"
    )
