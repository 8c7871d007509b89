"""Every setting and every environment variable, in this one place."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from attnrewrite.errors import OptionError

__all__ = ["OWN_OPTIONS", "Policy", "debug_directory", "debug_tensor_limit"]


@dataclass(frozen=True)
class Policy:
    """What the user asked for, checked.

    Attributes:
        inner_backend: what compiles the rewritten graph: a registered torch.compile backend's name, or a callable
            ``(gm, example_inputs) -> callable``. Default ``"inductor"``.
        assume_attended_rows: the user's word that every query row has at least one key that is not masked. It lifts
            refusals that exist only for the sake of fully masked rows (see docs/exactness.md). Default False.
        verify: whether the first call of each compiled graph compares every rewritten site with the source
            (:mod:`attnrewrite.verify`). Default ``ATTNREWRITE_VERIFY``, which is False where it is unset.
        mode: ``torch.compile``'s mode, for Inductor only.
        inner_options: what is passed on to the inner compiler.
    """

    inner_backend: str | Callable[..., Any] = "inductor"
    assume_attended_rows: bool = False
    verify: bool = False
    mode: str | None = None
    inner_options: Mapping[str, Any] = field(default_factory=dict)

    @staticmethod
    def from_options(options: Mapping[str, Any] | None, mode: str | None) -> Policy:
        """The policy for ``torch.compile(..., backend="attnrewrite", options=options, mode=mode)``.

        Keys that are attnrewrite's own are taken; the rest is kept for the inner compiler, which checks them.

        Raises:
            OptionError: an option of attnrewrite's own, or the environment variable behind it, has a wrong value.
        """
        own: dict[str, Any] = {}
        inner: dict[str, Any] = {}
        for key, value in (options or {}).items():
            (own if key in OWN_OPTIONS else inner)[key] = value
        own.setdefault("verify", _verify_by_default())
        for key in ("assume_attended_rows", "verify"):
            if not isinstance(own.get(key, False), bool):
                raise OptionError(f"options[{key!r}] takes True or False; got {own[key]!r}")
        return Policy(mode=None if mode == "default" else mode, inner_options=inner, **own)


OWN_OPTIONS = tuple(f.name for f in dataclasses.fields(Policy) if f.name not in ("mode", "inner_options"))
"""The keys of ``options`` that attnrewrite reads itself."""


def _verify_by_default() -> bool:
    """``ATTNREWRITE_VERIFY=1``: every graph is verified, unless its options say otherwise. Default 0."""
    value = os.environ.get("ATTNREWRITE_VERIFY", "")
    if value not in ("", "0", "1"):
        raise OptionError(f"ATTNREWRITE_VERIFY takes 1 or 0; got {value!r}")
    return value == "1"


def debug_directory() -> Path | None:
    """``ATTNREWRITE_DEBUG=DIR``: where the dump of each compiled graph goes; None when unset or empty."""
    value = os.environ.get("ATTNREWRITE_DEBUG", "")
    return Path(value) if value else None


def debug_tensor_limit() -> int:
    """``ATTNREWRITE_DEBUG_MB``: up to how many MiB of floating-point inputs a dump stores with the graph.

    Above it the dumped script draws random ones in their place. Default 1024.
    """
    value = os.environ.get("ATTNREWRITE_DEBUG_MB", "1024")
    try:
        return int(float(value) * 2**20)
    except ValueError:
        raise OptionError(f"ATTNREWRITE_DEBUG_MB takes a number of MiB, such as 1024; got {value!r}") from None
