"""One model's reuse of attention: what happens around its calls.

Before each call of the model a session asks for the timestep and counts the call in its stream's run. During the call a
context variable (:mod:`attnrewrite.caching.call`) tells the compiled graphs what they may reuse. Streams
(:mod:`attnrewrite.caching.streams`) are kept apart by name and by thread.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import weakref
from collections.abc import Callable, Collection, Hashable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from attnrewrite.analysis.kinds import KINDS
from attnrewrite.caching.call import ModelCall, ModelReuse
from attnrewrite.caching.guidance import check_halved, copied, first_output, halved_inputs
from attnrewrite.caching.memory import CacheMemory
from attnrewrite.caching.method import method_of
from attnrewrite.caching.model_paths import ModelPaths
from attnrewrite.caching.streams import Observer, Stream, current_stream, is_separate
from attnrewrite.errors import CacheError
from attnrewrite.ir.model_state import is_module_tensor
from attnrewrite.options.cache_callbacks import timestep_of
from attnrewrite.options.cache_config import FasterCacheConfig, PyramidAttentionBroadcastConfig
from attnrewrite.torch_private import mark_static, tree_leaves, tree_map_only

__all__ = ["Session"]

log = logging.getLogger("attnrewrite")

_Inputs = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword arguments of a call."""


class Session:
    """The calls of one model (or of one graph) under one config.

    Attributes:
        observer: sees what is computed; None for most sessions.
        memory: what is stored.
        name: of the model's class, for messages.
        called: whether a call was made.
    """

    def __init__(
        self,
        config: PyramidAttentionBroadcastConfig | FasterCacheConfig,
        model: nn.Module | None = None,
        observer: Observer | None = None,
    ) -> None:
        """Args:
        config: validated.
        model: whose calls are counted; None for those of a single graph.
        observer: sees what is computed, and says how many values are stored; default None: as many as the method needs.
        """
        method = method_of(config)
        identifiers = (getattr(config, f"{kind}_attention_block_identifiers", None) for kind in KINDS)
        settings = (type(method), method.kinds, *identifiers)
        paths = ModelPaths(model, config, method)
        self.memory = CacheMemory(paths.name, config.memory_limit, config.offload)
        self.observer = observer
        self.name = paths.name
        self.called = False
        self._config = config
        self._method = method
        self._paths = paths
        self._reuse = ModelReuse(method, settings, config.offload, paths, self.memory, observer)
        self._repeated_timestep = False
        self._warned_of_no_reuse = False
        self._matched = False
        self._prepared: set[Hashable] = set()

    @property
    def is_mixed(self) -> bool:
        """Whether a stream had two calls in a row at one timestep."""
        return self._repeated_timestep

    @contextlib.contextmanager
    def planned(self) -> Iterator[None]:
        """Graphs that are compiled within are compiled for the first call of a run."""
        with ModelCall(self._reuse, Stream(), 0, math.nan, halved=False, separate=False).in_force():
            yield

    def reset(self) -> None:
        """Forgets all stored values, in every stream and thread: the next call of each stream begins a run."""
        self.memory.reset(self._warn_of_run_without_reuse)

    def around(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """The model's call, with reuse."""

        @functools.wraps(call)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            return self.call(call, args, kwargs)

        return wrapper

    def around_graph(self, compiled: Callable[..., Any], gm: fx.GraphModule) -> Callable[..., Any]:
        """The call of a compiled graph, with reuse. A change of its inputs, parameters aside, begins a run.

        Modules that share the graph, and have parameters of their own, have a session each.
        """
        placeholders = gm.graph.find_nodes(op="placeholder")
        inputs = [number for number, node in enumerate(placeholders) if not is_module_tensor(node)]
        parameters = [number for number, node in enumerate(placeholders) if is_module_tensor(node)]
        sessions: dict[tuple[int, ...], tuple[list[weakref.ref[Tensor]], Session]] = {}

        def session_of(own: Sequence[Tensor]) -> Session:
            ids = tuple(map(id, own))
            known = sessions.get(ids)
            if known is not None and all(seen() is each for seen, each in zip(known[0], own, strict=True)):
                return known[1]
            session = Session(self._config)

            def forget(_: object) -> None:
                if ids in sessions and sessions[ids][1] is session:
                    del sessions[ids]

            sessions[ids] = [weakref.ref(each, forget) for each in own], session
            return session

        def wrapper(*args: Any) -> Any:
            session = session_of([args[number] for number in parameters]) if parameters else self
            return session.call(compiled, args, {}, [args[number] for number in inputs])

        return wrapper

    # One call.

    def call(
        self,
        function: Callable[..., Any],
        args: Sequence[Any],
        kwargs: dict[str, Any],
        run_inputs: Sequence[Any] | None = None,
    ) -> Any:
        """One call of the model.

        Args:
            run_inputs: the arguments whose shapes, dtypes and devices are the same throughout a run; default all.
        """
        self.called = True
        with self._ending_run():
            self._require_inference(args, kwargs)
            signature = _signature((args, kwargs) if run_inputs is None else run_inputs)
            current, begins_run = self._begin_call(signature)
        with _storing_in(current.stream):
            inputs: _Inputs = tuple(args), kwargs
            if current.halved:
                inputs = self._conditional_half(inputs)
            prepares = begins_run and self._is_half_to_prepare(current, signature)
            # The model may write to its inputs: the copy is made before the call.
            half = self._inputs_to_prepare(inputs) if prepares else None
            with current.in_force():
                result = function(*inputs[0], **inputs[1])
            if current.predicts_unconditional:
                result = self._with_guidance(current, result)
            if half is not None:
                # The next replay of a CUDA graph would overwrite the result.
                result = copied(result)
                self._prepare(function, half, result)
                self._prepared.add(signature)
            self._require_match(current)
        return result

    @contextlib.contextmanager
    def _ending_run(self) -> Iterator[None]:
        """What comes before a call of the model: if it raises an error, the next call begins a run."""
        try:
            yield
        except BaseException:
            name = current_stream()
            stream = self.memory.stream(name, self._tensor_format(is_separate(name)))
            stream.run.reset()
            stream.clear()
            raise

    def _begin_call(self, signature: Hashable) -> tuple[ModelCall, bool]:
        """Counts a call in its stream's run.

        Args:
            signature: of the arguments that are the same throughout a run.

        Returns:
            The call, and whether it begins a run.
        """
        assert self._config.current_timestep_callback is not None  # The config is validated.
        timestep = timestep_of(self._config.current_timestep_callback)
        name = current_stream()
        separate = is_separate(name)
        stream = self.memory.stream(name, self._tensor_format(separate))
        iteration = stream.run.advance(timestep, signature)
        if iteration == 0:
            self._warn_of_run_without_reuse(stream)
            stream.clear()
        self._warn_of_wrong_streams(stream, timestep)
        halved = self._method.skips_unconditional(iteration, timestep, separate)
        current = ModelCall(self._reuse, stream, iteration, timestep, halved=halved, separate=separate)
        stream.begin(timestep, current.reused, self._method.kinds, frees=self.observer is None)
        stream.has_reused = stream.has_reused or halved
        return current, iteration == 0

    def _tensor_format(self, separate: bool) -> str | None:
        """The tensor format of the model's output, where its unconditional half may be a prediction."""
        if isinstance(self._config, FasterCacheConfig) and self._method.predicts_unconditional(separate):
            return self._config.tensor_format
        return None

    def _require_inference(self, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        model = self._paths.module()
        if getattr(model, "is_cache_enabled", False):
            raise CacheError(
                f"{self.name} has diffusers' own cache enabled beside this one: call {self.name}.disable_cache(), or "
                "attnrewrite.disable_cache(model)"
            )
        if model.training and not self._paths.is_graph:
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

    def _require_match(self, current: ModelCall) -> None:
        """Checks, after the model's first call, that the config matches attentions of it."""
        if self._matched or self._paths.is_graph:
            return
        current.require_match()
        self._matched = True
        self._warn_of_unmatched_identifiers(current.paths)

    # Guidance: FasterCache's unconditional half.

    @property
    def _split_names(self) -> Sequence[str]:
        """The keyword arguments that hold both halves."""
        assert isinstance(self._config, FasterCacheConfig)
        return self._config.unconditional_conditional_input_kwargs_identifiers or ()

    def _conditional_half(self, inputs: _Inputs) -> _Inputs:
        return halved_inputs(*inputs, self._split_names)

    def _with_guidance(self, current: ModelCall, result: Any) -> Any:
        """The model's result with both halves, of which the unconditional one may be a prediction."""
        guidance = current.stream.guidance
        assert guidance is not None
        output, put_back = first_output(result)
        if not current.halved:
            guidance.learn(output)
            return result
        return put_back(guidance.complete(output, *self._paths.guidance_weights()))

    def _is_half_to_prepare(self, current: ModelCall, signature: Hashable) -> bool:
        """Whether later calls of the run may compute the conditional half alone, for which no graphs are compiled."""
        return current.plan.halves and self._method.may_skip_unconditional and signature not in self._prepared

    def _inputs_to_prepare(self, inputs: _Inputs) -> _Inputs:
        """The conditional half of the inputs, copied."""
        half: _Inputs = tree_map_only(Tensor, _twin, self._conditional_half(inputs))
        if not self._prepared:
            # Dynamo is not to make the batch size dynamic for the half of one batch: that takes one more graph.
            tree_map_only(Tensor, _mark_batch_static, half)
        return half

    def _prepare(self, function: Callable[..., Any], half: _Inputs, whole: Any) -> None:
        """Compiles the graphs for the conditional half at once, by a call that stores nothing.

        It comes after the call for both halves, so that batch sizes of two and then one do not become dynamic.

        Args:
            half: the inputs' conditional half.
            whole: the result for both halves.
        """
        args, kwargs = half
        devices = {leaf.device for leaf in tree_leaves(half) if isinstance(leaf, Tensor) and leaf.is_cuda}
        current = ModelCall(self._reuse, Stream(), 0, math.nan, halved=True, separate=False)
        try:
            # The model is to draw its random numbers once.
            with torch.random.fork_rng(devices=list(devices)), current.in_force():
                result = function(*args, **kwargs)
        except (CacheError, torch.OutOfMemoryError):
            raise
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            not_halved = [name for name in kwargs if name not in self._split_names]
            raise CacheError(
                f"{self.name} cannot be called with the conditional half alone, as FasterCache does "
                f"({type(error).__name__}: {' '.join(str(error).split())[:200]}). Halved were positional arguments of "
                f"the batch's size and {', '.join(self._split_names)}; not halved: {', '.join(not_halved) or 'none'}. "
                "Name all that hold both halves in unconditional_conditional_input_kwargs_identifiers"
            ) from error
        check_halved(whole, result, self.name)

    # Warnings, each at most once.

    def _warn_of_wrong_streams(self, stream: Stream, timestep: float) -> None:
        """Warns where several passes seem to share the stream."""
        if stream.run.repeats and not self._repeated_timestep and not self._paths.is_graph:
            self._repeated_timestep = True
            log.warning(
                "%s was called twice at timestep %g within one cache stream. If these are the conditional and the "
                "unconditional pass, or two generations, they now %s: call each within a stream of its own, such as "
                "attnrewrite.cache_stream('cond') and cache_stream('uncond')",
                self.name,
                timestep,
                "share attention" if self.observer is None else "are compared with each other",
            )
        if stream.run.single_calls > 3 and not self._warned_of_no_reuse:
            self._warned_of_no_reuse = True
            log.warning(
                "%s: nothing is reused, as shapes, dtypes or devices of its arguments change at each call, which "
                "begins a run. If these are several passes of a step, call each within a cache_stream of its own",
                self.name,
            )

    def _warn_of_run_without_reuse(self, stream: Stream) -> None:
        """Warns of a run that is over and had nothing to reuse."""
        timesteps = stream.timesteps
        if len(timesteps) < 3 or stream.has_reused or self._warned_of_no_reuse or self.observer is not None:
            return
        self._warned_of_no_reuse = True
        log.warning(
            "%s: nothing was reused in a run of %d calls, at timesteps from %g to %g; the config reuses %s. %s",
            self.name,
            len(timesteps),
            timesteps[0],
            timesteps[-1],
            self._method.describe(),
            "At each of them the model computed something else than before: other graphs, sizes or parameters"
            if stream.should_reuse
            else "Set a skip range of 2 or more, and the timestep ranges to the scheduler's units",
        )

    def _warn_of_unmatched_identifiers(self, paths: Collection[str]) -> None:
        unmatched = self._method.unmatched(paths)
        if unmatched:
            log.warning(
                "%s: block identifiers that match no attention: %s; attentions that are kept: %s",
                self.name,
                ", ".join(map(repr, unmatched)),
                ", ".join(sorted(paths)[:6]),
            )


@contextlib.contextmanager
def _storing_in(stream: Stream) -> Iterator[None]:
    """A call of the model, which stores values in a stream."""
    stream.in_call = True
    try:
        yield
    except BaseException:
        # Some values are of this call and some of the one before.
        stream.run.reset()
        stream.clear()
        raise
    finally:
        stream.in_call = False


def _signature(arguments: Any) -> Hashable:
    """The shapes, dtypes and devices of all tensors."""
    return tuple(
        (tuple(leaf.shape), leaf.dtype, leaf.device) for leaf in tree_leaves(arguments) if isinstance(leaf, Tensor)
    )


def _twin(tensor: Tensor) -> Tensor:
    """A copy for which a graph that was compiled for the tensor is not compiled anew."""
    if any(not stride and size > 1 for size, stride in zip(tensor.shape, tensor.stride(), strict=True)):
        return tensor.view_as(tensor)  # An expanded tensor cannot be written to.
    with torch.inference_mode(tensor.is_inference()), torch.no_grad():
        twin = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)
        twin.copy_(tensor).requires_grad_(tensor.requires_grad)
    return twin


def _mark_batch_static(tensor: Tensor) -> None:
    if tensor.dim():
        mark_static(tensor, 0)
