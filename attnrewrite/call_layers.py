"""What stands around the calls of a compiled module: layers that come and go in any order."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from attnrewrite.torch_private import call_attribute, call_of, is_compiled

__all__ = ["compiled_modules", "has_layer", "unwrap_calls", "wrap_calls"]

Call = Callable[..., Any]
Layer = Callable[[Call], Call]


class _Wrapped:
    """One module's call without layers, and the layers by their names, the innermost first."""

    def __init__(self, module: nn.Module) -> None:
        # An OptimizedModule calls its forward; a module that is compiled in place has its call here. One of which only
        # parts are compiled has none.
        self.attribute = call_attribute(module)
        self.before = getattr(module, self.attribute)
        self.layers: dict[str, Layer] = {}

    def apply(self, module: nn.Module) -> None:
        if not self.layers:
            object.__setattr__(module, self.attribute, self.before)
            return
        call: Call = self.before if self.before is not None else call_of(module)
        for layer in self.layers.values():
            call = layer(call)

        @functools.wraps(call)
        def layered(*args: Any, **kwargs: Any) -> Any:
            return call(*args, **kwargs)

        # A compiled caller would trace through it, and what is decided anew at each call would be decided once.
        reason = "wrappers around a compiled module decide at each call, so they are not traced"
        opaque: Call = torch.compiler.disable(layered, reason=reason)  # type: ignore[no-untyped-call]
        setattr(opaque, _LAYERS, self)
        object.__setattr__(module, self.attribute, opaque)


_LAYERS = "_attnrewrite_layers"
"""Where a wrapped call holds its :class:`_Wrapped`: with the module alone, so that both are freed together."""


def _wrapped_of(module: nn.Module) -> _Wrapped | None:
    attribute = call_attribute(module)
    return getattr(getattr(module, attribute), _LAYERS, None)


def wrap_calls(module: nn.Module, name: str, layer: Layer) -> None:
    """Puts ``layer(call)`` in the place of the module's call, instead of the layer of that name that may be there."""
    wrapped = _wrapped_of(module) or _Wrapped(module)
    wrapped.layers[name] = layer
    wrapped.apply(module)


def unwrap_calls(module: nn.Module, name: str) -> None:
    """Undoes :func:`wrap_calls`; nothing happens where it was not called."""
    wrapped = _wrapped_of(module)
    if wrapped is not None and wrapped.layers.pop(name, None) is not None:
        wrapped.apply(module)


def has_layer(module: nn.Module, name: str) -> bool:
    """Whether the module's call has that layer still: compiling a module in place once more drops all."""
    wrapped = _wrapped_of(module)
    return wrapped is not None and name in wrapped.layers


def compiled_modules(model: nn.Module) -> Iterator[nn.Module]:
    """The outermost modules that are compiled: the model itself, or parts of it."""
    if is_compiled(model):
        yield model
        return
    for child in model.children():
        yield from compiled_modules(child)
