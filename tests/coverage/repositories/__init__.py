"""Attention as repositories that are no packages write it: modules written anew, with their operators in their order."""

from __future__ import annotations

import importlib
import pkgutil

from tests.coverage.case import Case

__all__ = ["CASES"]

_ROOMS = sorted(module.name for module in pkgutil.iter_modules(__path__))
CASES: tuple[Case, ...] = tuple(
    case for room in _ROOMS for case in importlib.import_module(f"{__name__}.{room}").CASES
)
