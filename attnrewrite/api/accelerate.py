"""``@accelerate_attention``: compiles one module or one function with attnrewrite."""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, overload

import torch
from torch import nn
from torch.fx.traceback import annotate

from attnrewrite.errors import AcceleratedTypeError, OptionError
from attnrewrite.options.compile_options import tracing_settings
from attnrewrite.options.request import kernel_names
from attnrewrite.selection.decorated_parts import DecoratedPart
from attnrewrite.torch_private import (
    COMPILED_CALL,
    TORCHDYNAMO_PREFIX,
    TracingContext,
    call_of,
    dynamo_config,
    skip_code,
)

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

    A class is returned itself, and each instance is compiled on its first call. Subclasses, ``deepcopy``, ``pickle``
    and ``state_dict`` work as before, and copies are compiled anew. An instance is compiled in place and returned;
    copies of it are plain modules. Of a function, a compiled function is returned.

    Within a model that is itself compiled with ``backend="attnrewrite"`` the decorated part belongs to the model's
    graph. Arguments that concern single attentions hold there as well: ``kernels``, and the options ``kernels``,
    ``kernel_rules``, ``strict``, ``assume_attended_rows``, ``checks`` and ``autotune``. The innermost decorator wins.
    Where other arguments differ from the model's own options, a warning names them. A part that breaks the graph is
    compiled by itself, with all its arguments.

    Args:
        target: an ``nn.Module`` class, an ``nn.Module`` or a function. Without it, a decorator is returned.
        kernels: the kernels to use here, in order of preference. They win over context managers, options and the
            environment. Default None: no wish.
        fullgraph, dynamic, mode, options: as for ``torch.compile``.

    Raises:
        TypeError: ``target`` is none of the three.
        OptionError: both ``kernels`` and ``mode`` are given; ``torch.compile`` takes options or a mode, not both.
    """
    if kernels is not None:
        if mode is not None:
            raise OptionError(
                "accelerate_attention takes kernels=... or mode=..., not both, as torch.compile takes options or mode: "
                "give what the mode stands for in options, such as {'triton.cudagraphs': True} for 'reduce-overhead'"
            )
        kernels = kernel_names(kernels, "accelerate_attention(kernels=...)")
        options = {**(options or {})}
        options["kernel_rules"] = {**options.get("kernel_rules", {}), "*": kernels}
    arguments = {"fullgraph": fullgraph, "dynamic": dynamic, "mode": mode, "options": options}
    if target is None:
        return lambda target: _accelerate(target, arguments)
    return _accelerate(target, arguments)


def _accelerate(target: Any, arguments: dict[str, Any]) -> Any:
    if isinstance(target, type) and issubclass(target, nn.Module):
        # nn.Module.__call__ looks here first. The descriptor makes the compiled call of an instance when it is needed.
        # Instances keep it under the same name, which nn.Module.__getstate__ leaves out of copies and pickles.
        setattr(target, COMPILED_CALL, _CompiledCall(arguments))
        _let_dynamo_look(target, DecoratedPart(target.__qualname__, arguments))
        return target
    if isinstance(target, nn.Module):
        setattr(target, COMPILED_CALL, _compiled(call_of(target), arguments, type(target).__qualname__))
        _let_dynamo_look(type(target), None)
        return target
    if inspect.isroutine(target):
        return _compiled(target, arguments, getattr(target, "__qualname__", repr(target)))
    raise AcceleratedTypeError(
        f"accelerate_attention takes an nn.Module class, an nn.Module or a function; got {target!r}"
    )


def _let_dynamo_look(cls: type[nn.Module], part: DecoratedPart | None) -> None:
    """Gives the class a ``__call__`` of its own: with ``nn.Module``'s, Dynamo would go straight to ``forward``.

    Args:
        part: what the class's instances are; None leaves it to the ``_compiled_call_impl`` of each.
    """
    before = cls.__call__
    annotation = None if part is None else part.annotation
    if annotation is None and before is not nn.Module.__call__:
        return
    before = getattr(before, "_undecorated", before)
    plain = before is nn.Module.__call__

    @functools.wraps(before)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if annotation is None or not (torch.compiler.is_dynamo_compiling() or torch.compiler.is_exporting()):
            # ``nn.Module.__call__`` is looked up again, since tracers replace it.
            return nn.Module.__call__(self, *args, **kwargs) if plain else before(self, *args, **kwargs)
        with annotate(annotation):
            return call_of(self)(*args, **kwargs) if plain else before(self, *args, **kwargs)

    call._undecorated = before  # type: ignore[attr-defined]
    call._decorated_part = part  # type: ignore[attr-defined]  # Which lives as long as the class.
    cls.__call__ = _with_code_of_its_own(call)  # type: ignore[method-assign]


def _with_code_of_its_own(function: Any) -> Any:
    """The function with a new code object, by which Dynamo knows what it compiled and what it skips."""
    function.__code__ = function.__code__.replace()
    return function


class _CompiledCall:
    def __init__(self, arguments: dict[str, Any]) -> None:
        self._arguments = arguments

    def __get__(self, instance: nn.Module | None, owner: type) -> Callable[..., Any] | None:
        if instance is None or torch.compiler.is_dynamo_compiling() or torch.compiler.is_exporting():
            return None
        # Dynamo has annotated what it inlines (_let_dynamo_look), and continues with forward. It calls this by itself,
        # too; a context for tracing is of one thread.
        if torch.compiler.is_compiling() and TracingContext.try_get() is not None:
            return None
        kept = instance.__dict__.get(COMPILED_CALL)
        if callable(kept):
            # The instance was compiled before its class was decorated.
            own: Callable[..., Any] = kept
            return own
        # A DataParallel replica copies the whole __dict__: its compiled call must have been made for this instance.
        if kept is None or kept[0]() is not instance:
            kept = (weakref.ref(instance), _compiled_for_instance(call_of(instance), self._arguments))
            instance.__dict__[COMPILED_CALL] = kept
        compiled: Callable[..., Any] | None = kept[1]
        return compiled

    def __set__(self, instance: nn.Module, value: Callable[..., Any] | None) -> None:
        """Stores the compiled call of ``module.compile(...)``, or of the decorator on an instance."""
        instance.__dict__[COMPILED_CALL] = (weakref.ref(instance), value)


# Dynamo is not to compile this frame.
skip_code(_CompiledCall.__get__.__code__)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _compiled_for_instance(call: Callable[..., Any], arguments: dict[str, Any]) -> Callable[..., Any]:
    """:func:`_compiled_alone`, which Dynamo is not to trace: it would take ``torch.compile(f)`` for ``f``."""
    return _compiled_alone(call, arguments)


def _compiled(function: Callable[..., Any], arguments: dict[str, Any], name: str) -> Callable[..., Any]:
    """The function, compiled. Where Dynamo meets it in a larger graph, it becomes a part of that graph."""
    compiled = _compiled_alone(function, arguments)
    part = DecoratedPart(name, arguments)
    annotation = part.annotation

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        # Not is_compiling(), which is true while any other thread compiles.
        if not (torch.compiler.is_dynamo_compiling() or torch.compiler.is_exporting()):
            return compiled(*args, **kwargs)
        # Dynamo breaks no graph within an annotation: a function that it cannot trace is called, and compiled alone.
        with annotate(annotation):
            return function(*args, **kwargs)

    for attribute in [key for key in vars(call) if key.startswith(TORCHDYNAMO_PREFIX)]:
        delattr(call, attribute)  # A function that was compiled before has these: Dynamo would pass over this one.
    call._decorated_part = part  # type: ignore[attr-defined]  # Which lives as long as the function.
    result: Callable[..., Any] = _with_code_of_its_own(call)
    return result


def _compiled_alone(function: Callable[..., Any], arguments: dict[str, Any]) -> Callable[..., Any]:
    compiled: Callable[..., Any] = torch.compile(function, backend="attnrewrite", **arguments)
    settings = tracing_settings(arguments["options"])
    if not settings:
        return compiled

    @functools.wraps(compiled)
    def traced(*args: Any, **kwargs: Any) -> Any:
        with dynamo_config.patch(settings):
            return compiled(*args, **kwargs)

    return traced
