"""What ``register_kernel`` refuses, and what it takes: a mistake in a user's kernel is an error that names it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from torch import fx

import attnrewrite
from attnrewrite.ir.builder import Builder
from attnrewrite.ir.site import CanonicalAttention
from attnrewrite.kernels import Availability, Kernel, Plan, Verdict, kernel_named, registered_kernels
from attnrewrite.kernels.common.layout import KernelLayout
from attnrewrite.kernels.contract import checked


class Parts:
    """The least that a kernel is made of, without :class:`Kernel`."""

    name = "own"
    automatic = False
    needs = "nothing"

    def availability(self) -> Availability:
        return Availability(True, "always")

    def supports(self, site: CanonicalAttention) -> Verdict:
        return kernel_named("native").supports(site)

    def emit(self, site: CanonicalAttention, builder: Builder) -> fx.Node:
        return kernel_named("native").emit(site, builder)


class Inherits(Parts, Kernel):
    """The same that inherits."""


@pytest.fixture(autouse=True)
def _unregistered() -> Iterator[None]:
    yield
    if any(kernel.name == "own" for kernel in registered_kernels()):
        attnrewrite.unregister_kernel("own")


def refusal(kernel: Any) -> str:
    with pytest.raises(attnrewrite.OptionError) as error:
        attnrewrite.register_kernel(kernel)
    assert all(known.name != "own" for known in registered_kernels())
    return str(error.value)


@pytest.mark.parametrize("base", [Parts, Inherits])
@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("lower_precison", "lower_precision"),
        ("LowerPrecision", "lower_precision"),
        ("keep_scores", "keeps_scores"),
        ("take_unbacked", "takes_unbacked"),
        ("skip_masked", "skips_masked"),
        ("is_automatic", "automatic"),
        ("concern", "concerns"),
        ("limit", "limits"),
    ],
)
def test_a_misspelled_attribute(base: type, name: str, near: str) -> None:
    kernel = type("Mine", (base,), {name: True})()
    assert refusal(kernel) == (
        f"register_kernel: Mine has {name!r}, which no kernel has: did you mean {near!r}? (if not, call it '_{name}')"
    )


def test_a_misspelled_attribute_of_an_instance() -> None:
    kernel = Inherits()
    kernel.keep_scores = True  # type: ignore[attr-defined]
    assert "did you mean 'keeps_scores'?" in refusal(kernel)


def test_a_misspelled_method_is_named_rather_than_the_missing_one() -> None:
    class Misspelled:
        name, automatic, needs = "own", False, "nothing"
        availability, emit = Parts.availability, Parts.emit
        support = Parts.supports

    assert "Misspelled has 'support', which no kernel has: did you mean 'supports'?" in refusal(Misspelled())


@pytest.mark.parametrize("base", [Parts, Inherits])
def test_what_else_a_kernel_has_is_its_own_affair(base: type) -> None:
    kernel = type("Mine", (base,), {"rows": 64, "order": "BHSD", "support_of": None, "_lower_precison": True})()
    attnrewrite.register_kernel(kernel)
    assert kernel_named("own").lower_precision is False


@pytest.mark.parametrize("base", [Parts, Inherits])
@pytest.mark.parametrize(
    ("name", "value", "types"),
    [
        ("automatic", "no", "bool"),
        ("lower_precision", 1, "bool"),
        ("needs", None, "str"),
        ("name", b"own", "str"),
        ("limits", {"devices": ("cuda",)}, "Limits or None"),
        ("vendor", "flash_attn", "Vendor or None"),
    ],
)
def test_a_wrong_type(base: type, name: str, value: Any, types: str) -> None:
    kernel = type("Mine", (base,), {name: value})()
    assert refusal(kernel) == f"register_kernel: {name!r} of Mine must be {types}; got {value!r}"


def no_site(self: Any) -> Verdict:
    return Verdict.yes()


def with_device(self: Any, site: CanonicalAttention, builder: Builder, device: str) -> None: ...


def with_a_default(self: Any, site: CanonicalAttention, strict: bool = False) -> Verdict:
    return Verdict.yes()


@pytest.mark.parametrize("base", [Parts, Inherits])
@pytest.mark.parametrize(
    ("name", "method", "called", "takes"),
    [
        ("supports", no_site, "supports(site)", "takes () -> 'Verdict': too many positional arguments"),
        ("emit", with_device, "emit(site, builder)", "missing a required argument: 'device'"),
        ("skips_masked", no_site, "skips_masked(site)", "too many positional arguments"),
        ("concerns", with_device, "concerns(site)", "missing a required argument: 'builder'"),
        ("availability", Parts.supports, "availability()", "missing a required argument: 'site'"),
    ],
)
def test_a_wrong_signature(base: type, name: str, method: Any, called: str, takes: str) -> None:
    message = refusal(type("Mine", (base,), {name: method})())
    assert message.startswith(f"register_kernel: {name!r} of Mine is called as {called}, and takes (")
    assert message.endswith(takes)


@pytest.mark.parametrize("base", [Parts, Inherits])
def test_more_arguments_that_have_defaults(base: type) -> None:
    attnrewrite.register_kernel(type("Mine", (base,), {"supports": with_a_default})())


@pytest.mark.parametrize("base", [Parts, Inherits])
def test_a_method_that_is_none(base: type) -> None:
    message = refusal(type("Mine", (base,), {"skips_masked": True})())
    assert message == "register_kernel: 'skips_masked' of Mine must be a method skips_masked(site); got True"


def test_a_class_in_place_of_a_kernel() -> None:
    assert refusal(Inherits) == "register_kernel takes a kernel, not a class: register_kernel(Inherits(...))"


def test_a_missing_part() -> None:
    class Nameless(Inherits):
        @property
        def needs(self) -> str:  # type: ignore[override]
            raise AttributeError

    assert "lacks needs" in refusal(Nameless())
    with pytest.raises(TypeError, match="abstract"):
        type("Mine", (Kernel,), {"name": "own", "needs": "nothing"})()


def test_what_does_not_inherit_is_wrapped_with_all_its_parts() -> None:
    class Mine(Parts):
        keeps_scores = True

        def skips_masked(self, site: Any) -> bool:
            return bool(site == "banded")

    attnrewrite.register_kernel(Mine())
    assert isinstance(kernel_named("own"), Kernel)
    kernel: Any = kernel_named("own")
    assert kernel.keeps_scores and not kernel.takes_unbacked and not kernel.is_fetched
    assert kernel.skips_masked("banded") and not kernel.skips_masked("whole") and kernel.concerns("whole")
    assert kernel.prepare() == Availability(True, "always")


def test_what_inherits_is_registered_as_it_is() -> None:
    kernel = Inherits()
    attnrewrite.register_kernel(kernel)
    assert kernel_named("own") is kernel


def test_the_kernels_that_come_along_keep_the_contract() -> None:
    assert all(checked(kernel) is kernel for kernel in registered_kernels())


def test_the_name_by_which_earlier_kernels_know_the_layout() -> None:
    assert Plan is KernelLayout
