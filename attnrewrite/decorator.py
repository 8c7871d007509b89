"""``@accelerate_attention``: the backend for one module or one function."""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, overload

import torch
from torch import nn

from attnrewrite.errors import AttnRewriteError
from attnrewrite.policy import kernel_names, tracing_settings

__all__ = ["accelerate_attention"]

T = TypeVar("T", bound=Callable[..., Any])


@overload
def accelerate_attention(target: T, /) -> T: ...
@overload
def accelerate_attention(
    *,
    kernels: str | Sequence[str] | None = ...,
    fullgraph: bool = ...,
    dynamic: bool | None = ...,
    mode: str | None = ...,
    options: dict[str, Any] | None = ...,
) -> Callable[[T], T]: ...
def accelerate_attention(
    target: Any = None,
    /,
    *,
    kernels: str | Sequence[str] | None = None,
    fullgraph: bool = False,
    dynamic: bool | None = None,
    mode: str | None = None,
    options: dict[str, Any] | None = None,
) -> Any:
    """Compiles a module class, a module or a function with ``backend="attnrewrite"``.

    On a class, every instance is compiled on its first call: subclasses, ``deepcopy``, ``pickle`` and ``state_dict``
    work as before, and copies are compiled anew. On an instance, that instance is compiled in place and returned;
    copies of it are plain modules. On a function, a compiled function is returned.

    Args:
        target: an ``nn.Module`` class, an ``nn.Module`` or a function. Left out, a decorator is returned.
        kernels: the kernels to use here, in order of preference, whatever a context manager, the options or the
            environment ask for. Default None: nothing is asked for here.
        fullgraph, dynamic, mode, options: as for ``torch.compile``.

    Raises:
        TypeError: ``target`` is none of the three.
    """
    if kernels is not None:
        kernels = kernel_names(kernels, "accelerate_attention(kernels=...)")
        options = {**(options or {})}
        options["kernel_rules"] = {**options.get("kernel_rules", {}), "*": kernels}
    arguments = {"fullgraph": fullgraph, "dynamic": dynamic, "mode": mode, "options": options}
    if target is None:
        return lambda target: _accelerate(target, arguments)
    return _accelerate(target, arguments)


def _accelerate(target: Any, arguments: dict[str, Any]) -> Any:
    if isinstance(target, type) and issubclass(target, nn.Module):
        # nn.Module.__call__ looks here first; a descriptor makes the compiled call for each instance when it is needed.
        # Instances keep it under the same name, which nn.Module.__getstate__ leaves out of copies and pickles.
        target._compiled_call_impl = _CompiledCall(arguments)  # type: ignore[assignment]
        return target
    if isinstance(target, nn.Module):
        target._compiled_call_impl = _compiled(target._call_impl, arguments)
        return target
    if inspect.isroutine(target):
        return _compiled(target, arguments)
    raise AcceleratedTypeError(
        f"accelerate_attention takes an nn.Module class, an nn.Module or a function; got {target!r}"
    )


class AcceleratedTypeError(AttnRewriteError, TypeError):
    """The decorator was put on something that cannot be compiled."""


class _CompiledCall:
    def __init__(self, arguments: dict[str, Any]) -> None:
        self._arguments = arguments

    def __get__(self, instance: nn.Module | None, owner: type) -> Callable[..., Any] | None:
        if instance is None:
            return None
        kept = instance.__dict__.get("_compiled_call_impl")
        # A replica of DataParallel takes over the whole __dict__: what is in it must have been made for this instance.
        if kept is None or kept[0]() is not instance:
            kept = (weakref.ref(instance), _compiled(instance._call_impl, self._arguments))
            instance.__dict__["_compiled_call_impl"] = kept
        compiled: Callable[..., Any] | None = kept[1]
        return compiled

    def __set__(self, instance: nn.Module, value: Callable[..., Any] | None) -> None:
        """``module.compile(...)`` puts its own compiled call here, and so does the decorator on an instance."""
        instance.__dict__["_compiled_call_impl"] = (weakref.ref(instance), value)


def _compiled(function: Callable[..., Any], arguments: dict[str, Any]) -> Callable[..., Any]:
    compiled: Callable[..., Any] = torch.compile(function, backend="attnrewrite", **arguments)
    settings = tracing_settings(arguments["options"])
    if not settings:
        return compiled

    @functools.wraps(compiled)
    def traced(*args: Any, **kwargs: Any) -> Any:
        with torch._dynamo.config.patch(settings):
            return compiled(*args, **kwargs)

    return traced
