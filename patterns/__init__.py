"""The catalogue of attentions: one file a family, with its mathematics, its rule and its specimens side by side.

Every module of this package that has a ``PATTERN`` takes part, in the order of their ``precedence``. To add a spelling
of an attention that a family already reads, add a specimen to that family's file: tests find it by themselves. A
pattern that lives outside of this package takes part once it is registered (:func:`register_pattern`).
"""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache

from attnrewrite.analysis.views import Axis, Operand
from attnrewrite.site import AttentionSite, Bias, Fill, NotAttention, Scale

from .base import Finding, GraphView, NearMiss, Pattern, Specimen
from .building import attention_site, call_arguments
from .registry import PatternError, register_pattern, registered, unregister_pattern

__all__ = [
    "AttentionSite",
    "Axis",
    "Bias",
    "Fill",
    "Finding",
    "GraphView",
    "NearMiss",
    "NotAttention",
    "Operand",
    "Pattern",
    "PatternError",
    "Scale",
    "Specimen",
    "attention_site",
    "call_arguments",
    "catalogue",
    "must_not_match",
    "register_pattern",
    "specimens",
    "unregister_pattern",
]


def catalogue() -> tuple[Pattern, ...]:
    """Every pattern there is, registered ones included, in the order in which they look at a graph."""
    return tuple(sorted((*built_in(), *registered()), key=lambda pattern: pattern.precedence))


@cache
def built_in() -> tuple[Pattern, ...]:
    """The patterns of this package, in no particular order."""
    modules = [importlib.import_module(f"{__name__}.{module.name}") for module in pkgutil.iter_modules(__path__)]
    return tuple(module.PATTERN for module in modules if hasattr(module, "PATTERN"))


def specimens() -> tuple[Specimen, ...]:
    """Every specimen of every pattern: the spellings that must be found."""
    return tuple(specimen for pattern in catalogue() for specimen in pattern.specimens)


def must_not_match() -> tuple[Specimen, ...]:
    """What must be left alone."""
    from .lookalikes import LOOKALIKES

    return LOOKALIKES
