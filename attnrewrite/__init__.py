"""attnrewrite: finds attention in a model's graph and rewrites it into a fused kernel, by ``torch.compile``.

``torch.compile(model, backend="attnrewrite")`` needs no import of this package. The names here are for the rest:

- :func:`accelerate_attention`: the backend for one module class, module or function.
- :func:`attention_backend`, :func:`set_attention_backend`, :func:`reset_attention_backend`: the kernels to use, also
  for models that are already compiled.
- :func:`attention_forward`: one attention, called from eager or compiled code.
- :func:`register_kernel`, :func:`unregister_kernel`: kernels of your own; see docs/options.md.
- :func:`register_pattern`, :func:`unregister_pattern`: attentions that the catalogue lacks; see docs/patterns.md.
- :func:`enable_cache`, :func:`disable_cache`, :func:`reset_cache`, :func:`attention_cache`, :func:`cache_stream`,
  :class:`PyramidAttentionBroadcastConfig`, :class:`FasterCacheConfig`: attention reused across diffusion steps.
- :func:`calibrate`: a :class:`Calibration` of how much a model's attentions change from step to step.
- :func:`rewrite`, :class:`RewritePass`: attention in programs of ``torch.export``.
- :func:`explain`: a :class:`RewriteReport` of what is rewritten in a model, into what, and why the rest is not.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from attnrewrite.api.accelerate import accelerate_attention
    from attnrewrite.api.attention_backend import reset_attention_backend, set_attention_backend
    from attnrewrite.api.attention_forward import attention_forward
    from attnrewrite.api.explain import explain
    from attnrewrite.api.exported import RewritePass, rewrite
    from attnrewrite.caching.enabling import attention_cache, disable_cache, enable_cache, reset_cache
    from attnrewrite.caching.streams import cache_stream
    from attnrewrite.calibration.calibrate import calibrate
    from attnrewrite.calibration.calibration import Calibration
    from attnrewrite.errors import (
        AttentionCheckError,
        AttentionInputError,
        AttnRewriteError,
        CacheError,
        CacheMemoryError,
        ContextParallelError,
        ExportError,
        IntegrationError,
        KernelError,
        OptionError,
    )
    from attnrewrite.kernels import register_kernel, unregister_kernel
    from attnrewrite.options.cache_config import FasterCacheConfig, PyramidAttentionBroadcastConfig
    from attnrewrite.patterns import PatternError, register_pattern, unregister_pattern
    from attnrewrite.report.report import RewriteReport
    from attnrewrite.report.rows import GraphReport, SiteReport
    from attnrewrite.selection.requests import attention_backend

__all__ = [
    "AttentionCheckError",
    "AttentionInputError",
    "AttnRewriteError",
    "CacheError",
    "CacheMemoryError",
    "Calibration",
    "ContextParallelError",
    "ExportError",
    "FasterCacheConfig",
    "GraphReport",
    "IntegrationError",
    "KernelError",
    "OptionError",
    "PatternError",
    "PyramidAttentionBroadcastConfig",
    "RewritePass",
    "RewriteReport",
    "SiteReport",
    "accelerate_attention",
    "attention_backend",
    "attention_cache",
    "attention_forward",
    "cache_stream",
    "calibrate",
    "disable_cache",
    "enable_cache",
    "explain",
    "register_kernel",
    "register_pattern",
    "reset_attention_backend",
    "reset_cache",
    "rewrite",
    "set_attention_backend",
    "unregister_kernel",
    "unregister_pattern",
]

_NAMES = {
    "api.accelerate": ("accelerate_attention",),
    "api.attention_backend": ("reset_attention_backend", "set_attention_backend"),
    "api.attention_forward": ("attention_forward",),
    "api.explain": ("explain",),
    "api.exported": ("RewritePass", "rewrite"),
    "caching.enabling": ("attention_cache", "disable_cache", "enable_cache", "reset_cache"),
    "caching.streams": ("cache_stream",),
    "calibration.calibrate": ("calibrate",),
    "calibration.calibration": ("Calibration",),
    "errors": (
        "AttentionCheckError",
        "AttentionInputError",
        "AttnRewriteError",
        "CacheError",
        "CacheMemoryError",
        "ContextParallelError",
        "ExportError",
        "IntegrationError",
        "KernelError",
        "OptionError",
    ),
    "kernels": ("register_kernel", "unregister_kernel"),
    "options.cache_config": ("FasterCacheConfig", "PyramidAttentionBroadcastConfig"),
    "patterns": ("PatternError", "register_pattern", "unregister_pattern"),
    "report.report": ("RewriteReport",),
    "report.rows": ("GraphReport", "SiteReport"),
    "selection.requests": ("attention_backend",),
}
"""The public names, by the module that each is in."""

_HOMES = {name: home for home, names in _NAMES.items() for name in names}


def __getattr__(name: str) -> Any:
    """Public names are loaded when they are first used: importing the package imports nothing heavy."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
