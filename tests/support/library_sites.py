"""Sites of small functions, as if their tensors were on another device, and graphs that a kernel was put into."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import fx

from attnrewrite import attention_backend
from attnrewrite.ir.builder import Builder
from attnrewrite.ir.site import CanonicalAttention
from attnrewrite.kernels import Availability, Kernel, Verdict, registry
from tests.support.helpers import rows

__all__ = ["Placed", "only", "placed", "served_by", "site_of", "site_where_it_is"]


@dataclasses.dataclass(frozen=True, eq=False)
class Placed(CanonicalAttention):
    """A site whose tensors claim to be on ``place``. Nothing else of them is changed."""

    place: str = "cuda"

    @property
    def device(self) -> torch.device:
        # The types that another package names cannot be said here; kernels read no more than the type's name.
        return cast(torch.device, SimpleNamespace(type=self.place))


def placed(site: CanonicalAttention, place: str) -> Placed:
    own = {field.name: getattr(site, field.name) for field in dataclasses.fields(CanonicalAttention)}
    return Placed(**own, place=place)


class _Recorder(Kernel):
    """Takes no site and keeps them all."""

    name = "recorder"
    automatic = True
    needs = "nothing"

    def __init__(self) -> None:
        self.sites: list[CanonicalAttention] = []

    def availability(self) -> Availability:
        return Availability(True, "")

    def supports(self, site: CanonicalAttention) -> Verdict:
        self.sites.append(site)
        return Verdict.no("recorded")

    def emit(self, site: CanonicalAttention, builder: Builder) -> fx.Node:
        raise NotImplementedError


@contextmanager
def only(kernel: Kernel) -> Iterator[None]:
    """In it, ``kernel`` is the only one, and nothing is compiled yet."""
    before = dict(registry._KERNELS)
    registry._KERNELS.clear()
    registry._KERNELS[kernel.name] = kernel
    torch._dynamo.reset()
    try:
        with attention_backend(kernel.name):
            yield
    finally:
        registry._KERNELS.clear()
        registry._KERNELS.update(before)


def site_where_it_is(function: Callable[..., Any], *inputs: Any, **settings: Any) -> CanonicalAttention:
    """The one site of ``function``."""
    recorder = _Recorder()
    with only(recorder):
        rows(function, *inputs, **settings)
    (site,) = recorder.sites
    return site


def site_of(function: Callable[..., Any], *inputs: Any, place: str = "cuda", **settings: Any) -> CanonicalAttention:
    """The one site of ``function``, on ``place``."""
    return placed(site_where_it_is(function, *inputs, **settings), place)


class _Forced(Kernel):
    """A kernel that is asked what it would say on a device that is not here, and emits if it is willing."""

    automatic = True
    needs = "nothing"

    def __init__(self, kernel: Any, place: str, capability: tuple[int, int] | None) -> None:
        self.name = kernel.name
        self._kernel, self._place, self._capability = kernel, place, capability

    def availability(self) -> Availability:
        return Availability(True, "")

    def supports(self, site: CanonicalAttention) -> Verdict:
        verdict: Verdict = self._kernel.verdict(placed(site, self._place), self._capability)
        return verdict

    def emit(self, site: CanonicalAttention, builder: Builder) -> fx.Node:
        node: fx.Node = self._kernel.emit(placed(site, self._place), builder)
        return node


@contextmanager
def served_by(kernel: Any, place: str, capability: tuple[int, int] | None) -> Iterator[None]:
    """In it, ``kernel`` is the only one, and is told that sites are on ``place``."""
    with only(_Forced(kernel, place, capability)):
        yield
