"""Large families of tests: a run of the whole suite draws a part of each, another one in each run.

Tests with many parameters cross forms, dtypes and kernels. All of them take the suite over its time; each run takes one
in twenty of each family, by a seed that it prints. ``--every`` asks for all, and so does a path, ``-k`` or ``-m``.
"""

from __future__ import annotations

import math
import os
import random
from collections import defaultdict

import pytest

__all__ = ["draw", "seed"]

_FEWEST = 2
"""A family of no more members is not drawn from, and no fewer are drawn."""

_SHARES = {"parameters": 20, "module": 4}
"""One in so many: of a test with many parameters, and of a module that is marked ``drawn``, whose tests take long."""


def seed() -> str:
    """The seed of the run: that of ``FUZZ_SEED``, or a new one, which processes started from here inherit."""
    return os.environ.setdefault("FUZZ_SEED", str(random.SystemRandom().randrange(10**6)))


def draw(items: list[pytest.Item]) -> tuple[list[pytest.Item], list[pytest.Item]]:
    """The tests to run, in their order, and the others.

    A test or module that is marked ``every`` is run with all of its parameters.
    """
    families: dict[tuple[str, str], list[pytest.Item]] = defaultdict(list)
    for item in items:
        if item.get_closest_marker("every") is None:
            kind = "module" if item.get_closest_marker("drawn") else "parameters"
            families[kind, item.nodeid.split("::" if kind == "module" else "[")[0]].append(item)
    left: set[pytest.Item] = set()
    for (kind, name), members in families.items():
        wanted = max(_FEWEST, math.ceil(len(members) / _SHARES[kind]))
        if wanted < len(members):
            left.update(random.Random(f"{seed()} {name}").sample(members, len(members) - wanted))
    return [item for item in items if item not in left], [item for item in items if item in left]
