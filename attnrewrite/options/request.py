"""The kernels that are requested for a site."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from attnrewrite.errors import OptionError
from attnrewrite.kernels import kernel_named

__all__ = ["Request", "kernel_names"]


@dataclass(frozen=True)
class Request:
    """Requested kernels, in order of preference.

    Attributes:
        origin: where they were requested: ``options['kernels']``, an environment variable, ...
        strict: whether a site that none of them can serve is an error.
        otherwise_kept: whether a site that none of them can serve is kept unchanged.
    """

    names: tuple[str, ...]
    origin: str
    strict: bool = False
    otherwise_kept: bool = False


def kernel_names(value: Any, where: str) -> tuple[str, ...]:
    """The names of kernels in ``value``: one name, several separated by commas, or a sequence.

    Raises:
        OptionError: ``value`` is something else, or names a kernel that does not exist.
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
