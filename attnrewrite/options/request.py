"""The kernels that are asked for at a site."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from attnrewrite.errors import OptionError
from attnrewrite.kernels import kernel_named

__all__ = ["Request", "kernel_names"]


@dataclass(frozen=True)
class Request:
    """Kernels that were asked for, in order.

    Attributes:
        origin: where, in the user's words: ``options['kernels']``, an environment variable, ...
        strict: a site that none of them can serve is an error.
        otherwise_kept: a site that none of them can serve stays the call that it is.
    """

    names: tuple[str, ...]
    origin: str
    strict: bool = False
    otherwise_kept: bool = False


def kernel_names(value: Any, where: str) -> tuple[str, ...]:
    """``value`` as names of kernels: one, several with commas between them, or a sequence.

    Raises:
        OptionError: it is something else, or a kernel of that name does not exist.
    """
    if isinstance(value, tuple) and len(value) == 1:
        (value,) = value
    if isinstance(value, str):
        value = [name.strip() for name in value.split(",") if name.strip()]
    if not isinstance(value, (list, tuple)) or not value or not all(isinstance(name, str) for name in value):
        raise OptionError(f"{where} takes the name of a kernel, or several in order of preference; got {value!r}")
    for name in value:
        if name != "auto":
            kernel_named(name, where)
    return tuple(value)
