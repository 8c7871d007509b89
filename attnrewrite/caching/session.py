"""One model's reuse of attention: what stands around its calls.

A session asks for the timestep before each call of the model, counts the calls of a stream's run, and says in a context
variable what the compiled graphs within the call may reuse. Streams (:mod:`attnrewrite.caching.streams`) are kept apart
by name and by thread.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import math
import threading
import weakref
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from attnrewrite.analysis.kinds import Kind, SiteKind, is_named_temporal
from attnrewrite.caching.call import ModelCall
from attnrewrite.caching.graphs import is_parameter
from attnrewrite.caching.guidance import check_halved, copied, first_output, halved_inputs
from attnrewrite.caching.method import method_of
from attnrewrite.caching.streams import Key, Observer, Stream, current_stream, is_separate
from attnrewrite.errors import CacheError, CacheMemoryError
from attnrewrite.options.cache_callbacks import timestep_of, weight_of
from attnrewrite.options.cache_config import FasterCacheConfig, PyramidAttentionBroadcastConfig
from attnrewrite.torch_private import mark_static, tree_leaves, tree_map_only

__all__ = ["Session"]

log = logging.getLogger("attnrewrite")


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
        self._paths: dict[tuple[str, str, int], str] = {}
        self._kinds: dict[tuple[str, Kind], Kind | None] = {}
        self._here = threading.local()
        self._streams: weakref.WeakSet[Stream] = weakref.WeakSet()
        self._lock = threading.Lock()
        self._generation = 0
        self.called = False
        self._warned = False
        self._told_unused = False
        self._matched = False
        self._prepared: set[Hashable] = set()
        self._ambiguous: set[str] = set()

    @property
    def is_of_graph(self) -> bool:
        """Whether the calls are those of a single graph, and not of a model."""
        return self._model is None

    @property
    def nbytes(self) -> int:
        """The bytes that are stored, or will be at the end of the calls that are being made."""
        with self._lock:
            return sum(sum(stream.reserved.values()) for stream in self._streams)

    @property
    def is_mixed(self) -> bool:
        """Whether calls of one stream were made at one timestep."""
        return self._warned

    @contextlib.contextmanager
    def planned(self) -> Iterator[None]:
        """Graphs that are compiled within are compiled for the first call of a run."""
        with ModelCall(self, Stream(None), 0, math.nan, halved=False, separate=False).in_force():
            yield

    def reset(self) -> None:
        """Forgets all that is stored, in every stream and thread: the next call of each is the first of a run."""
        with self._lock:
            self._generation += 1
            for stream in self._streams:
                # One that is in a call, of another thread, is replaced, and not emptied under it.
                if not stream.in_call:
                    self._tell_unused(stream)
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
        sessions: dict[tuple[int, ...], tuple[list[weakref.ref[Tensor]], Session]] = {}

        def session_of(own: Sequence[Tensor]) -> Session:
            ids = tuple(map(id, own))
            known = sessions.get(ids)
            if known is not None and all(seen() is each for seen, each in zip(known[0], own, strict=True)):
                return known[1]
            session = Session(self.config)

            def forget(_: object) -> None:
                if ids in sessions and sessions[ids][1] is session:
                    del sessions[ids]

            sessions[ids] = [weakref.ref(each, forget) for each in own], session
            return session

        def wrapper(*args: Any) -> Any:
            session = session_of([args[number] for number in parameters]) if parameters else self
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
        self.called = True
        self._require_inference(args, kwargs)
        assert self.config.current_timestep_callback is not None
        timestep = timestep_of(self.config.current_timestep_callback)
        name = current_stream()
        separate = is_separate(name)
        stream = self._stream(name if self._model is not None else (*name, *self._visit(name, timestep)))
        shapes = _signature((args, kwargs) if signature is None else signature)
        iteration = stream.run.advance(timestep, shapes)
        if iteration == 0:
            self._tell_unused(stream)
            stream.clear()
        if stream.run.repeats and not self._warned:
            self._warned = True
            log.warning(
                "%s was called twice at timestep %g within one cache stream. If these are the conditional and the "
                "unconditional pass, or two generations, they now %s: call each within a stream of its own, such as "
                "attnrewrite.cache_stream('cond') and cache_stream('uncond')",
                self.name,
                timestep,
                "share attention" if self.observer is None else "are compared with each other",
            )
        if stream.run.single > 3 and not self._told_unused:
            self._told_unused = True
            log.warning(
                "%s: nothing is reused, as shapes, dtypes or devices of its arguments change at each call, which "
                "begins a run. If these are several passes of a step, call each within a cache_stream of its own",
                self.name,
            )
        skips = self.method.skips_unconditional(iteration, timestep, separate)
        current = ModelCall(self, stream, iteration, timestep, halved=skips, separate=separate)
        stream.begin(timestep, current.reused, self.method.kinds, frees=self.observer is None)
        stream.reuses = stream.reuses or skips
        stream.in_call = True
        try:
            if skips:
                args, kwargs = halved_inputs(tuple(args), kwargs, self._split_names)
            half: tuple[tuple[Any, ...], dict[str, Any]] | None = None
            to_prepare = iteration == 0 and current.plan.halves and self.method.may_skip_unconditional
            if to_prepare and shapes not in self._prepared:
                # What the model writes to its inputs is to happen once.
                half = tree_map_only(Tensor, _twin, halved_inputs(tuple(args), kwargs, self._split_names))
                if not self._prepared:
                    # The half of one batch does not make the batch's size dynamic, which would take a graph more.
                    tree_map_only(Tensor, _mark_batch_static, half)
            with current.in_force():
                result = function(*args, **kwargs)
            if self.predicts(separate):
                result = self._with_guidance(stream, result, skips)
            if half is not None:
                # The next replay of a CUDA graph would overwrite the result.
                result = copied(result)
                self._prepare(function, *half, result)
                self._prepared.add(shapes)
            if not self._matched and self._model is not None:
                current.require_match()
                self._matched = True
                self._tell_unmatched(current.paths)
        except BaseException:
            # Some values are of this call and some of the one before.
            stream.run.reset()
            stream.clear()
            raise
        finally:
            stream.in_call = False
        return result

    def _prepare(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], whole: Any) -> None:
        """Has the graphs for the conditional half compiled at once, by a call of which nothing is kept.

        It comes after the call for both halves, so that a batch of two and then one makes no size of them dynamic.

        Args:
            args, kwargs: of the conditional half.
            whole: the result for both.
        """
        devices = {leaf.device for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and leaf.is_cuda}
        current = ModelCall(self, Stream(None), 0, math.nan, halved=True, separate=False)
        try:
            # What the model draws at random is to be drawn once.
            with torch.random.fork_rng(devices=list(devices)), current.in_force():
                result = function(*args, **kwargs)
        except (CacheError, torch.OutOfMemoryError):
            raise
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            whole = [name for name in kwargs if name not in self._split_names]
            raise CacheError(
                f"{self.name} cannot be called with the conditional half alone, as FasterCache does "
                f"({type(error).__name__}: {' '.join(str(error).split())[:200]}). Halved were positional arguments of "
                f"the batch's size and {', '.join(self._split_names)}; not halved: {', '.join(whole) or 'none'}. Name "
                "all that hold both halves in unconditional_conditional_input_kwargs_identifiers"
            ) from error
        check_halved(whole, result, self.name)

    def _with_guidance(self, stream: Stream, result: Any, halved: bool) -> Any:
        """The model's result with both halves, of which the unconditional one may be a prediction."""
        assert stream.guidance is not None
        output, put_back = first_output(result)
        if not halved:
            stream.guidance.learn(output)
            return result
        return put_back(stream.guidance.complete(output, *self.guidance_weights()))

    def _tell_unmatched(self, paths: Collection[str]) -> None:
        unmatched = self.method.unmatched(paths)
        if unmatched:
            log.warning(
                "%s: block identifiers that match no attention: %s; attentions that are kept: %s",
                self.name,
                ", ".join(map(repr, unmatched)),
                ", ".join(sorted(paths)[:6]),
            )

    def _tell_unused(self, stream: Stream) -> None:
        """Warns, once, of a run that is over and in which nothing was to be reused."""
        if len(stream.timesteps) < 3 or stream.reuses or self._told_unused or self.observer is not None:
            return
        self._told_unused = True
        log.warning(
            "%s: nothing was reused in a run of %d calls, at timesteps from %g to %g; the config reuses %s. %s",
            self.name,
            len(stream.timesteps),
            stream.timesteps[0],
            stream.timesteps[-1],
            self.method.describe(),
            "At each of them the model computed something else than before: other graphs, sizes or parameters"
            if stream.asked
            else "Set a skip range of 2 or more, and the timestep ranges to the scheduler's units",
        )

    def _require_inference(self, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        model = self._module("")
        if getattr(model, "is_cache_enabled", False):
            raise CacheError(
                f"{self.name} has diffusers' own cache enabled beside this one: call {self.name}.disable_cache(), or "
                "attnrewrite.disable_cache(model)"
            )
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

    def predicts(self, separate: bool) -> bool:
        """Whether the unconditional half may be a prediction; ``separate`` as :func:`is_separate` has it."""
        config = self.config
        return isinstance(config, FasterCacheConfig) and not config.is_guidance_distilled and not separate

    def _stream(self, name: tuple[str, ...]) -> Stream:
        here = self._here
        if getattr(here, "generation", None) != self._generation:
            here.generation, here.streams = self._generation, {}
        streams: dict[tuple[str, ...], Stream] = here.streams
        if name not in streams:
            predicts = self.predicts(is_separate(name))
            streams[name] = Stream(self.config.tensor_format if predicts else None)  # type: ignore[union-attr]
            with self._lock:
                self._streams.add(streams[name])
        return streams[name]

    def is_ambiguous(self, fingerprint: str, again: bool) -> bool:
        """Whether it cannot be told which layer calls a graph without parameters.

        It can where there are no parameters in the whole model, and the graph is called once in its call.

        Args:
            again: whether it was called in this call before.
        """
        if fingerprint not in self._ambiguous and (again or any(True for _ in self._module("").parameters())):
            self._ambiguous.add(fingerprint)
            log.warning(
                "%s: a graph with attention and without parameters is called, so which attention is which cannot be "
                "told, and none of these is reused. A graph break between the projections and the attention does that",
                self.name,
            )
        return fingerprint in self._ambiguous

    def _visit(self, name: tuple[str, ...], timestep: float) -> tuple[str, ...]:
        """Tells apart calls of one graph at one timestep, which modules without parameters may share."""
        here = self._here
        visits: dict[tuple[str, ...], tuple[float, int]] = here.__dict__.setdefault("visits", {})
        before, count = visits.get(name, (math.nan, 0))
        visits[name] = timestep, count + 1 if before == timestep else 0
        return (f"#{visits[name][1]}",)

    def reserve(self, stream: Stream, sizes: Mapping[Key, int]) -> None:
        """Counts values, in bytes, before they are stored.

        Raises:
            CacheMemoryError: it would be more than ``memory_limit``.
        """
        new = {key: nbytes for key, nbytes in sizes.items() if stream.reserved.get(key) != nbytes}
        if not new:
            return
        limit, needed = self.config.memory_limit, sum(new.values())
        taken = self.nbytes - sum(stream.reserved.get(key, 0) for key in new)
        where = "the host" if self.config.offload else "the device"
        what = "1 attention value" if len(new) == 1 else f"{len(new)} attention values"
        log.info("%s: %s, %s of %s's memory", self.name, what, _in_words(needed), where)
        if limit is not None and taken + needed > limit:
            others = f", beside {_in_words(taken)} that are stored already" if taken else ""
            raise CacheMemoryError(
                f"{what} of {self.name} would take {_in_words(needed)} of {where}'s memory{others}, and "
                f"memory_limit is {_in_words(limit)}: raise it (None is no limit), keep fewer attentions (a skip range "
                "of None, or block identifiers), or call disable_cache(model)"
            )
        stream.reserved.update(new)

    def path_of(self, path: str, parameter: Tensor | None, known_as: str) -> str:
        """Where in the model a module is that its own graph knows as ``path``.

        Args:
            parameter: one that the graph is called with, and knows as ``known_as``.
        """
        if parameter is None or self._model is None:
            return path
        key = path, known_as, id(parameter)
        if key not in self._paths:
            model = self._module("")
            named = itertools.chain(
                model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)
            )
            names = [name for name, each in named if each is parameter]
            # The graph of the whole model knows it by one of its names; that of a part, by the end of one.
            parents = [name.removesuffix(known_as) for name in names if f".{name}".endswith(f".{known_as}")]
            self._paths[key] = f"{min(parents, key=len, default='')}{path}".strip(".")
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


def _signature(arguments: Any) -> Hashable:
    """The shapes, dtypes and devices of all tensors."""
    return tuple(
        (tuple(leaf.shape), leaf.dtype, leaf.device) for leaf in tree_leaves(arguments) if isinstance(leaf, Tensor)
    )


def _twin(tensor: Tensor) -> Tensor:
    """A copy for which no graph is compiled anew that was compiled for the tensor."""
    if any(not stride and size > 1 for size, stride in zip(tensor.shape, tensor.stride(), strict=True)):
        return tensor.view_as(tensor)  # Cannot be written to.
    with torch.inference_mode(tensor.is_inference()), torch.no_grad():
        twin = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)
        twin.copy_(tensor).requires_grad_(tensor.requires_grad)
    return twin


def _mark_batch_static(tensor: Tensor) -> None:
    if tensor.dim():
        mark_static(tensor, 0)


def _in_words(nbytes: int) -> str:
    if nbytes < 2**10:
        return f"{nbytes} bytes"
    return f"{nbytes / 2**20:,.1f} MiB" if nbytes >= 2**20 else f"{nbytes / 2**10:,.1f} KiB"
