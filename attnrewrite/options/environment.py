"""The environment variables that attnrewrite reads."""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs

from attnrewrite.errors import OptionError
from attnrewrite.options.request import Request, kernel_names

__all__ = [
    "cache_directory",
    "debug_directory",
    "debug_tensor_limit",
    "diffusers_checks",
    "raises_defects",
    "request_of_environment",
    "switched",
]


_DIFFSYNTH = {
    "flash_attention_3": "_flash_3",
    "flash_attention_2": "flash",
    "sage_attention": "sage",
    "xformers": "xformers",
    "torch": "native",
}
"""https://github.com/modelscope/DiffSynth-Studio/blob/16ab67bf/diffsynth/core/attention/attention.py"""


def request_of_environment() -> Request | None:
    """The request of the environment; None without one.

    ``ATTNREWRITE_KERNELS=NAME[,NAME...]``; without it ``DIFFUSERS_ATTN_BACKEND`` with a name of diffusers' dispatcher,
    then ``DIFFSYNTH_ATTENTION_IMPLEMENTATION`` with a name of DiffSynth-Studio's.

    Raises:
        OptionError: a variable names a kernel that does not exist.
    """
    if os.environ.get("ATTNREWRITE_KERNELS"):
        return Request(kernel_names(os.environ["ATTNREWRITE_KERNELS"], "ATTNREWRITE_KERNELS"), "ATTNREWRITE_KERNELS")
    if os.environ.get("DIFFUSERS_ATTN_BACKEND"):
        name = os.environ["DIFFUSERS_ATTN_BACKEND"]
        if "," in name:
            raise OptionError(
                f"DIFFUSERS_ATTN_BACKEND takes one name, such as native; got {name!r} (several go into "
                "ATTNREWRITE_KERNELS)"
            )
        return Request(kernel_names([name], "DIFFUSERS_ATTN_BACKEND"), "DIFFUSERS_ATTN_BACKEND")
    name = os.environ.get("DIFFSYNTH_ATTENTION_IMPLEMENTATION", "").lower()
    if not name:
        return None
    if name not in _DIFFSYNTH:
        raise OptionError(
            f"DIFFSYNTH_ATTENTION_IMPLEMENTATION takes {', '.join(_DIFFSYNTH)}; got {name!r} (unset it, or name "
            "kernels in ATTNREWRITE_KERNELS)"
        )
    return Request(kernel_names([_DIFFSYNTH[name]], name), f"DIFFSYNTH_ATTENTION_IMPLEMENTATION={name}")


def switched(name: str) -> bool | None:
    """The value of a variable that is 1 or 0, the default of an option; None if it is unset.

    Raises:
        OptionError: it has another value.
    """
    value = os.environ.get(name, "")
    if value not in ("", "0", "1"):
        raise OptionError(f"{name} takes 1 or 0; got {value!r}")
    return value == "1" if value else None


def diffusers_checks() -> bool:
    """``DIFFUSERS_ATTN_CHECKS``: whether diffusers checks operands, and forbids a mask beside ``is_causal``.

    It is true as diffusers reads it: https://github.com/huggingface/diffusers/blob/v0.36.0/src/diffusers/utils/constants.py
    """
    return os.environ.get("DIFFUSERS_ATTN_CHECKS", "0").upper() in ("1", "ON", "YES", "TRUE")


def raises_defects() -> bool:
    """``ATTNREWRITE_RAISE=1``: raises on a defect of the rewriting, and checks the graph after each step.

    By default a defect is a warning, and the graph runs unchanged. For tests of attnrewrite, of patterns and of
    kernels.
    """
    return bool(switched("ATTNREWRITE_RAISE"))


def cache_directory() -> Path:
    """``ATTNREWRITE_CACHE_DIR=DIR``: the directory of stored measurements; default: the user's cache directory."""
    value = os.environ.get("ATTNREWRITE_CACHE_DIR", "")
    return Path(value) if value else platformdirs.user_cache_path("attnrewrite")


def debug_directory() -> Path | None:
    """``ATTNREWRITE_DEBUG=DIR``: the directory for the dump of each compiled graph; None if unset or empty."""
    value = os.environ.get("ATTNREWRITE_DEBUG", "")
    return Path(value) if value else None


def debug_tensor_limit() -> int:
    """``ATTNREWRITE_DEBUG_MB``: the largest size of the floating-point inputs that a dump stores, returned in bytes.

    Above it, the dumped script draws random inputs instead. Default 1024.

    Raises:
        OptionError: it is not a number.
    """
    value = os.environ.get("ATTNREWRITE_DEBUG_MB", "1024")
    try:
        return int(float(value) * 2**20)
    except ValueError:
        raise OptionError(f"ATTNREWRITE_DEBUG_MB takes a number of MiB, such as 1024; got {value!r}") from None
