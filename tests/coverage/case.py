"""One model of the coverage table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from tests.support.zoo import ZOO

__all__ = ["Case", "from_zoo"]


@dataclass(frozen=True)
class Case:
    """``build`` makes the model, ``inputs`` its keyword arguments; ``package`` is the name that pip knows.

    ``sites`` says how many attentions the model has, counted from its configuration and not from what is found;
    ``kept`` of them no rewrite can serve, for the reason ``why_kept``. A package with a slash is a repository on
    GitHub, whose idiom is written anew here.
    """

    name: str
    form: str
    sites: int
    build: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, Any]]
    package: str = "transformers"
    kept: int = 0
    why_kept: str = ""

    @property
    def group(self) -> str:
        return "repositories" if "/" in self.package else "packages"


def from_zoo(name: str, form: str, package: str = "transformers") -> Case:
    (entry,) = (entry for entry in ZOO if entry.name == name)
    return Case(name, form, entry.sites, entry.build, lambda: entry.inputs(entry.lengths[0], 0), package)
