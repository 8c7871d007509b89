"""Call layers: wrappers around the calls of a compiled module, added and removed in any order."""

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
    """The call of a module without layers, and its layers by name, innermost first."""

    def __init__(self, module: nn.Module) -> None:
        # An OptimizedModule calls its forward; a module that is compiled in place has a compiled call. If only parts of
        # a module are compiled, it has none (None).
        self.attribute = call_attribute(module)
        self.before = getattr(module, self.attribute)
        self.layers: dict[str, Layer] = {}

    def apply(self, module: nn.Module) -> None:
        """Sets the module's call to that with all layers around it, or restores it if there are none."""
        if not self.layers:
            object.__setattr__(module, self.attribute, self.before)
            return
        call: Call = self.before if self.before is not None else call_of(module)
        for layer in self.layers.values():
            call = layer(call)

        @functools.wraps(call)
        def layered(*args: Any, **kwargs: Any) -> Any:
            return call(*args, **kwargs)

        # A compiled caller would trace through the layers, and decide once what they decide at each call.
        reason = "wrappers around a compiled module decide at each call, so they are not traced"
        opaque: Call = torch.compiler.disable(layered, reason=reason)  # type: ignore[no-untyped-call]
        setattr(opaque, _LAYERS, self)
        object.__setattr__(module, self.attribute, opaque)


_LAYERS = "_attnrewrite_layers"
"""The attribute of a wrapped call with its :class:`_Wrapped`, so that it is freed together with the module."""


def _wrapped_of(module: nn.Module) -> _Wrapped | None:
    attribute = call_attribute(module)
    return getattr(getattr(module, attribute), _LAYERS, None)


def wrap_calls(module: nn.Module, name: str, layer: Layer) -> None:
    """Replaces the module's call by ``layer(call)``; a layer of the same name that is there already is replaced."""
    wrapped = _wrapped_of(module) or _Wrapped(module)
    wrapped.layers[name] = layer
    wrapped.apply(module)


def unwrap_calls(module: nn.Module, name: str) -> None:
    """Removes the layer that :func:`wrap_calls` added; does nothing if there is none of that name."""
    wrapped = _wrapped_of(module)
    if wrapped is not None and wrapped.layers.pop(name, None) is not None:
        wrapped.apply(module)


def has_layer(module: nn.Module, name: str) -> bool:
    """Whether the module's call has a layer of that name. Compiling a module in place again drops all layers."""
    wrapped = _wrapped_of(module)
    return wrapped is not None and name in wrapped.layers


def compiled_modules(model: nn.Module) -> Iterator[nn.Module]:
    """Yields the outermost compiled modules: the model itself, or parts of it."""
    if is_compiled(model):
        yield model
        return
    for child in model.children():
        yield from compiled_modules(child)
