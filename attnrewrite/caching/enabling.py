"""``enable_cache`` and what belongs to it: a compiled model whose calls reuse attention."""

from __future__ import annotations

import contextlib
import logging
import weakref
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from attnrewrite.caching.session import Session
from attnrewrite.caching.streams import cache_stream
from attnrewrite.call_layers import compiled_modules, has_layer, unwrap_calls, wrap_calls
from attnrewrite.errors import CacheError, CacheTypeError
from attnrewrite.options.cache_config import validated
from attnrewrite.torch_private import original_module

__all__ = ["attention_cache", "disable_cache", "enable_cache", "enable_session", "reset_cache"]

log = logging.getLogger("attnrewrite")

_LAYER = "cache"

_HANDLE = "_attnrewrite_cache"


class _Handle:
    """What is called, and its session; an attribute of the model as it was before it was compiled.

    Held by nothing else: a config's callback mostly holds the pipeline, and that the model. Copies of the model have an
    empty one.
    """

    def __init__(self, called: nn.Module | None = None, session: Session | None = None) -> None:
        self.called = None if called is None else weakref.ref(called)
        self.session = session

    def __deepcopy__(self, memo: dict[int, Any]) -> _Handle:
        return _Handle()

    def __reduce__(self) -> tuple[type[_Handle], tuple[()]]:
        return _Handle, ()


class _BoundMethod:
    """A function bound to a model, in the place of its class's method of that name; copies do what that does."""

    def __init__(self, function: Callable[..., Any], model: nn.Module) -> None:
        self._function, self._model = function, model

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._function(self._model, *args, **kwargs)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        function = _inherited_context if self._function is _cache_context else _inherited_reset
        return _BoundMethod, (function, self._model)


def _is_enabled(root: nn.Module) -> bool:
    handle = root.__dict__.get(_HANDLE)
    called = None if handle is None or handle.called is None else handle.called()
    return called is not None and has_layer(called, _LAYER)


def _session_of(root: nn.Module) -> Session | None:
    handle = root.__dict__.get(_HANDLE)
    return None if handle is None else handle.session


def enable_cache(model: nn.Module, config: object) -> None:
    """Lets a compiled model reuse attention from one denoising step to the next.

    The next calls of the model compute attention or take it from an earlier step, as ``config`` says; graphs that take
    it are compiled beside those that compute it, and nothing is compiled from step to step. A run begins at the first
    call, where shapes, dtypes or devices change, where timesteps turn back, at the end of a call of a diffusers
    pipeline, and at :func:`reset_cache`.

    Args:
        model: a compiled module (``torch.compile(module, backend="attnrewrite")``, ``module.compile(...)`` or a class
            under :func:`accelerate_attention`), or a module of which parts are compiled.
        config: a :class:`PyramidAttentionBroadcastConfig` or :class:`FasterCacheConfig`, attnrewrite's or diffusers'.

    Raises:
        OptionError: a setting of ``config`` is wrong.
        CacheError: the model has a cache already. From calls of the model: in training mode, where the timestep is not
            known, where ``config`` matches no attention, and (as CacheMemoryError) over its memory limit.
        TypeError: nothing in ``model`` is compiled.

    Example::

        pipe.transformer = torch.compile(pipe.transformer, backend="attnrewrite")
        config = PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2, current_timestep_callback=lambda: pipe.current_timestep
        )
        attnrewrite.enable_cache(pipe.transformer, config)
    """
    enable_session(model, lambda root: Session(validated(config), root), "enable_cache")


def enable_session(model: nn.Module, session_of: Callable[[nn.Module], Session], function: str) -> None:
    """Puts a session around a compiled model's calls; :func:`disable_cache` undoes it.

    Args:
        model: as for :func:`enable_cache`, which names the errors.
        session_of: makes the session for the model as it was before it was compiled.
        function: what the caller called, for the messages.
    """
    root = _root(model, function)
    if not any(True for _ in compiled_modules(model)):
        raise CacheTypeError(
            f"{function} takes a compiled module, and nothing in {type(model).__name__} is compiled: call "
            "torch.compile(model, backend='attnrewrite') or model.compile(backend='attnrewrite') first, and give what "
            "that returns"
        )
    if _is_enabled(root):
        raise CacheError(f"{type(root).__name__} has a cache already: call disable_cache(model) first")
    if getattr(root, "is_cache_enabled", False):
        raise CacheError(
            f"{type(root).__name__} has diffusers' own cache enabled, whose hooks break graphs: call its "
            "disable_cache() first"
        )
    session = session_of(root)
    wrap_calls(model, _LAYER, session.around)
    root.__dict__[_HANDLE] = _Handle(model, session)
    # diffusers' pipelines name their streams and say when a run is over. Methods are bound anew in copies of the model.
    if hasattr(type(root), "cache_context"):
        root.__dict__["cache_context"] = _BoundMethod(_cache_context, root)
    root.__dict__["_reset_stateful_cache"] = _BoundMethod(_reset_stateful_cache, root)


def disable_cache(model: nn.Module) -> None:
    """Undoes :func:`enable_cache` and frees what was stored; nothing happens where it was not called."""
    root = _root(model, "disable_cache")
    session = _session_of(root)
    if session is None:
        return
    session.reset()
    if not session.called and session.observer is None:
        log.warning(
            "the cache of %s is disabled, and was never used: no call of %s was made, or only calls within another "
            "compiled function, of whose graph they became a part (enable the cache on what is compiled)",
            session.name,
            session.name,
        )
    called = root.__dict__[_HANDLE].called()
    if called is not None:
        unwrap_calls(called, _LAYER)
    for name in (_HANDLE, "cache_context", "_reset_stateful_cache"):
        root.__dict__.pop(name, None)


def reset_cache(model: nn.Module) -> None:
    """Forgets what was stored, in every stream and thread: the next call of each is the first of a run.

    Nothing happens where the model has no cache.
    """
    session = _session_of(_root(model, "reset_cache"))
    if session is not None:
        session.reset()


@contextlib.contextmanager
def attention_cache(model: nn.Module, config: object) -> Iterator[None]:
    """:func:`enable_cache` for the calls inside.

    Args:
        model, config: as for :func:`enable_cache`, which names the errors.
    """
    enable_cache(model, config)
    try:
        yield
    finally:
        disable_cache(model)


def _root(model: nn.Module, function: str) -> nn.Module:
    if not isinstance(model, nn.Module):
        advice = ": of a pipeline, give its denoiser, such as pipe.transformer" if hasattr(model, "components") else ""
        raise CacheTypeError(f"{function} takes a compiled nn.Module, not an object of {type(model).__name__}{advice}")
    return original_module(model)


@contextlib.contextmanager
def _cache_context(self: Any, name: str, **kwargs: Any) -> Iterator[None]:
    """In the place of ``CacheMixin.cache_context``."""
    with type(self).cache_context(self, name, **kwargs), cache_stream(name):
        yield


def _reset_stateful_cache(self: Any, *args: Any, **kwargs: Any) -> None:
    """In the place of ``CacheMixin._reset_stateful_cache``, which pipelines call at their end on what has it."""
    reset_cache(self)
    _inherited_reset(self, *args, **kwargs)


def _inherited_reset(self: Any, *args: Any, **kwargs: Any) -> None:
    inherited = getattr(type(self), "_reset_stateful_cache", None)
    if inherited is not None:
        inherited(self, *args, **kwargs)


def _inherited_context(self: Any, name: str, **kwargs: Any) -> Any:
    return type(self).cache_context(self, name, **kwargs)
