"""``enable_cache`` and its companions: a compiled model whose calls reuse attention."""

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
    """The callable and its session, as an attribute of the model that was compiled.

    Nothing else refers to the session: a config's callback usually refers to the pipeline, and the pipeline to the
    model. Copies of the model have an empty handle.
    """

    def __init__(self, called: nn.Module | None = None, session: Session | None = None) -> None:
        self.called = None if called is None else weakref.ref(called)
        self.session = session

    def __deepcopy__(self, memo: dict[int, Any]) -> _Handle:
        return _Handle()

    def __reduce__(self) -> tuple[type[_Handle], tuple[()]]:
        return _Handle, ()


class _BoundMethod:
    """A function bound to a model, which replaces a method of its class. In copies of the model the method is back."""

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


def session_of(root: nn.Module) -> Session | None:
    """The session of a model (as it was before it was compiled); None without a cache."""
    handle = root.__dict__.get(_HANDLE)
    return None if handle is None else handle.session


def enable_cache(model: nn.Module, config: object) -> None:
    """Lets a compiled model reuse attention from one denoising step to the next.

    The model's next calls compute attention or reuse that of an earlier step, as ``config`` says. Graphs that reuse it
    are compiled together with those that compute it, so nothing is compiled from step to step.

    A denoising run begins at the first call, when shapes, dtypes or devices change, when the timestep goes back, after
    a call of a diffusers pipeline, and after :func:`reset_cache`.

    Args:
        model: a compiled module (``torch.compile(module, backend="attnrewrite")``, ``module.compile(...)`` or a class
            under :func:`accelerate_attention`), or a module of which parts are compiled.
        config: a :class:`PyramidAttentionBroadcastConfig` or :class:`FasterCacheConfig`, attnrewrite's or diffusers'.

    Raises:
        OptionError: a setting of ``config`` is wrong.
        CacheError: the model has a cache already. Calls of the model raise it in training mode, with gradients, without
            a timestep, where ``config`` matches no attention, and (as CacheMemoryError) over its memory limit.
        TypeError: nothing in ``model`` is compiled.

    Example::

        pipe.transformer = torch.compile(pipe.transformer, backend="attnrewrite")
        config = PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2, current_timestep_callback=lambda: pipe.current_timestep
        )
        attnrewrite.enable_cache(pipe.transformer, config)
    """
    enable_session(model, lambda root: Session(validated(config), root), "enable_cache")


def enable_session(model: nn.Module, make_session: Callable[[nn.Module], Session], function: str) -> None:
    """Puts a session around a compiled model's calls; :func:`disable_cache` undoes it.

    Args:
        model: as for :func:`enable_cache`, which lists the errors.
        make_session: makes the session for the model as it was before it was compiled.
        function: the name of the function that the user called, for messages.
    """
    root = _root(model, function)
    if not any(True for _ in compiled_modules(model)):
        raise CacheTypeError(
            f"{function} takes a compiled module, and nothing in {type(model).__name__} is compiled: first call "
            "model.compile(backend='attnrewrite'), or give what torch.compile(model, backend='attnrewrite') returns"
        )
    if _is_enabled(root):
        raise CacheError(f"{type(root).__name__} has a cache already: call disable_cache(model) first")
    if getattr(root, "is_cache_enabled", False):
        raise CacheError(
            f"{type(root).__name__} has diffusers' own cache enabled, whose hooks break graphs: call its "
            "disable_cache() first"
        )
    session = make_session(root)
    wrap_calls(model, _LAYER, session.around)
    root.__dict__[_HANDLE] = _Handle(model, session)
    # diffusers' pipelines name their streams and say when a run is over.
    if hasattr(type(root), "cache_context"):
        root.__dict__["cache_context"] = _BoundMethod(_cache_context, root)
    root.__dict__["_reset_stateful_cache"] = _BoundMethod(_reset_stateful_cache, root)


def disable_cache(model: nn.Module) -> None:
    """Undoes :func:`enable_cache` and frees what was stored. Without a cache it does nothing."""
    root = _root(model, "disable_cache")
    session = session_of(root)
    if session is None:
        return
    session.reset()
    if not session.called and session.observer is None:
        log.warning(
            "the cache of %s is disabled, and was never used: %s was not called, or only within another compiled "
            "function, whose graph its calls became a part of (enable the cache on what is compiled)",
            session.name,
            session.name,
        )
    called = root.__dict__[_HANDLE].called()
    if called is not None:
        unwrap_calls(called, _LAYER)
    for name in (_HANDLE, "cache_context", "_reset_stateful_cache"):
        root.__dict__.pop(name, None)


def reset_cache(model: nn.Module) -> None:
    """Forgets all stored values, in every stream and thread, so that the next call of each stream begins a run.

    Without a cache it does nothing.
    """
    session = session_of(_root(model, "reset_cache"))
    if session is not None:
        session.reset()


@contextlib.contextmanager
def attention_cache(model: nn.Module, config: object) -> Iterator[None]:
    """Enables a cache for the calls within.

    Args:
        model, config: as for :func:`enable_cache`, which lists the errors.
    """
    enable_cache(model, config)
    try:
        yield
    finally:
        disable_cache(model)


def _root(model: nn.Module, function: str) -> nn.Module:
    if not isinstance(model, nn.Module):
        advice = ": give the pipeline's denoiser, such as pipe.transformer" if hasattr(model, "components") else ""
        raise CacheTypeError(f"{function} takes a compiled nn.Module, not an object of {type(model).__name__}{advice}")
    return original_module(model)


@contextlib.contextmanager
def _cache_context(self: Any, name: str, **kwargs: Any) -> Iterator[None]:
    """Replaces ``CacheMixin.cache_context``."""
    with type(self).cache_context(self, name, **kwargs), cache_stream(name):
        yield


def _reset_stateful_cache(self: Any, *args: Any, **kwargs: Any) -> None:
    """Replaces ``CacheMixin._reset_stateful_cache``, which a pipeline calls at its end on models that have it."""
    reset_cache(self)
    _inherited_reset(self, *args, **kwargs)


def _inherited_reset(self: Any, *args: Any, **kwargs: Any) -> None:
    inherited = getattr(type(self), "_reset_stateful_cache", None)
    if inherited is not None:
        inherited(self, *args, **kwargs)


def _inherited_context(self: Any, name: str, **kwargs: Any) -> Any:
    return type(self).cache_context(self, name, **kwargs)
