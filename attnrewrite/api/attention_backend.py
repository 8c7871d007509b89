"""``set_attention_backend`` and ``reset_attention_backend``: the kernels of one model, compiled or not."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from attnrewrite.call_layers import compiled_modules, unwrap_calls, wrap_calls
from attnrewrite.errors import BackendTypeError
from attnrewrite.options.request import kernel_names
from attnrewrite.selection.requests import attention_backend

__all__ = ["reset_attention_backend", "set_attention_backend"]

_LAYER = "kernels"


def set_attention_backend(model: nn.Module, *names: str | Sequence[str], strict: bool = False) -> None:
    """Runs every call of ``model`` under :func:`attention_backend` with these kernels, until it is reset.

    Args:
        model: a compiled module (``torch.compile(module)``, ``module.compile()`` or a class under
            :func:`accelerate_attention`), or a module that contains compiled ones.
        names, strict: as for :func:`attention_backend`.

    Raises:
        OptionError: a name is unknown.
        TypeError: nothing in ``model`` is compiled.
    """
    kernel_names(names, "set_attention_backend")
    if not isinstance(model, nn.Module):
        raise BackendTypeError(
            f"set_attention_backend takes a compiled nn.Module, not {model!r}; for a compiled function, use "
            "attention_backend(...) around its calls"
        )
    reset_attention_backend(model)
    modules = list(compiled_modules(model))
    if not modules:
        raise BackendTypeError(
            f"set_attention_backend takes a compiled module, and nothing in {type(model).__name__} is compiled: call "
            "torch.compile(model, backend='attnrewrite') or model.compile(backend='attnrewrite') first"
        )
    for module in modules:
        wrap_calls(module, _LAYER, lambda call: _under(call, names, strict))


def reset_attention_backend(model: nn.Module) -> None:
    """Undoes :func:`set_attention_backend`. On other models it does nothing."""
    for module in model.modules():
        unwrap_calls(module, _LAYER)


def _under(call: Callable[..., Any], names: Sequence[str | Sequence[str]], strict: bool) -> Callable[..., Any]:
    @functools.wraps(call)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        with attention_backend(*names, strict=strict):
            return call(*args, **kwargs)

    return wrapper
