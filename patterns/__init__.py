"""The catalogue of attentions: one file a family, with its mathematics, its rule and its specimens side by side.

Every module of this package that has a ``PATTERN`` takes part, in the order of their ``precedence``. To add a spelling
of an attention that a family already reads, add a specimen to that family's file: tests find it by themselves.
"""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache

from .base import Finding, GraphView, NearMiss, Pattern, Specimen

__all__ = ["Finding", "GraphView", "NearMiss", "Pattern", "Specimen", "catalogue", "must_not_match", "specimens"]


@cache
def catalogue() -> tuple[Pattern, ...]:
    """Every pattern there is, in the order in which they look at a graph."""
    modules = [importlib.import_module(f"{__name__}.{module.name}") for module in pkgutil.iter_modules(__path__)]
    patterns = [module.PATTERN for module in modules if hasattr(module, "PATTERN")]
    return tuple(sorted(patterns, key=lambda pattern: pattern.precedence))


@cache
def specimens() -> tuple[Specimen, ...]:
    """Every specimen of every pattern: the spellings that must be found."""
    return tuple(specimen for pattern in catalogue() for specimen in pattern.specimens)


def must_not_match() -> tuple[Specimen, ...]:
    """What must be left alone."""
    from .lookalikes import LOOKALIKES

    return LOOKALIKES
