"""What of PyTorch has been replaced in this process, so that its version does not say what it does.

Dynamo's graph names methods and operators, and functions of ``torch.nn.functional`` that call others.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from types import BuiltinFunctionType, FunctionType, MethodDescriptorType, WrapperDescriptorType
from typing import Any

import torch

from attnrewrite.torch_private import OpOverloadPacket, function_spaces, replaced_operators

__all__ = ["OF_TORCH", "is_written_in", "replaced"]

OF_TORCH = f"{Path(torch.__file__).parent}{os.sep}"
"""The folder of PyTorch."""

_ALIASES = {
    "__abs__": "abs",
    "__itruediv__": "__idiv__",
    "__neg__": "neg",
    "__pos__": "positive",
    "__torch_dispatch__": "_disabled_torch_dispatch_impl",
    "logsigmoid": "log_sigmoid",
    "to_dlpack": "_to_dlpack",
    **{f"has_torch_function{end}": f"_has_torch_function{end}" for end in ("", "_unary", "_variadic")},
}
"""Functions that PyTorch has under another name than their own."""


def replaced() -> list[str]:
    """The operators, functions and methods of PyTorch that are something else here, such as "Tensor.softmax"."""
    functions = (
        f"{space}.{name}"
        for space, held in function_spaces().items()
        for name, value in held.items()
        if (space == "Tensor" or not name.startswith("_")) and _is_replaced(name, value)
    )
    return [*replaced_operators(), *sorted(functions)]


def is_written_in(function: Any, folder: str) -> bool:
    """Whether the code of a Python function, and of every function that it wraps, is from a file in the folder.

    Its name may be copied (``functools.wraps``), and a decorator of the folder may be around another function.
    """
    pending, seen = [function], set()
    while pending:
        each = pending.pop()
        if not isinstance(each, FunctionType) or not each.__code__.co_filename.startswith(folder):
            return False
        if id(each) not in seen:
            seen.add(id(each))
            pending += _wrapped(each)
    return True


def _wrapped(function: FunctionType) -> Iterator[FunctionType]:
    """The functions that a function holds: those of a decorator, mostly."""
    held = [getattr(function, "__wrapped__", None)]
    for cell in function.__closure__ or ():
        try:
            held.append(cell.cell_contents)
        except ValueError:  # An empty cell.
            continue
    return (each for each in held if isinstance(each, FunctionType))


def _is_replaced(name: str, value: Any) -> bool:
    if isinstance(value, FunctionType):
        return not is_written_in(value, OF_TORCH)
    if isinstance(value, (BuiltinFunctionType, MethodDescriptorType, WrapperDescriptorType)):
        return value.__name__ not in (name, _ALIASES.get(name))
    if type(value).__module__ in ("typing", "typing_extensions"):
        return False
    wrapped = getattr(value, "__wrapped__", None)
    if isinstance(wrapped, FunctionType):  # functools.cache
        return _is_replaced(name, wrapped)
    return callable(value) and not isinstance(value, (type, staticmethod, classmethod, OpOverloadPacket))
