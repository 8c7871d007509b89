"""Diffusers' own switches, on a model of diffusers that is compiled."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from diffusers.models.attention_dispatch import attention_backend
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention as sdpa
from torch.utils.checkpoint import checkpoint

import attnrewrite
from attnrewrite.backend import collect_reports
from attnrewrite.errors import AttentionInputError
from attnrewrite.options.compile_options import Policy
from tests.processors.models import MODELS
from tests.support.helpers import relative_error, rewritten, rows
from tests.support.zoo import noise

FLUX = MODELS["flux"]


@pytest.fixture(autouse=True)
def _process_as_before() -> Iterator[None]:
    """``set_attention_backend`` of one model is that of the process as well, and stays."""
    with attention_backend("native"):
        yield


def flux() -> nn.Module:
    model: nn.Module = FLUX.build()
    return model


def inputs() -> dict[str, Any]:
    return dict(FLUX.inputs(0))


def kernels(model: nn.Module, **options: Any) -> list[str | None]:
    torch._dynamo.reset()
    with torch.no_grad(), collect_reports() as reports:
        rewritten(model, **options)(**inputs())
    return [row.kernel for report in reports for row in report.sites]


# FlashAttention on a CPU is what PyTorch's selector takes.
NAMES = [("native", "native"), ("_native_math", "_native_math"), ("_native_flash", "native")]


@pytest.mark.parametrize(("name", "kernel"), NAMES)
def test_the_backend_of_a_model(name: str, kernel: str) -> None:
    model: Any = flux()
    assert kernels(model) == ["native"] * FLUX.sites
    model.set_attention_backend(name)
    assert kernels(model) == [kernel] * FLUX.sites
    with torch.no_grad():
        assert relative_error(rewritten(model)(**inputs())[0], model(**inputs())[0]) <= 1e-5
    model.reset_attention_backend()
    with attention_backend("native"):
        assert kernels(model) == ["native"] * FLUX.sites


@pytest.mark.parametrize(("name", "kernel"), NAMES)
def test_the_backend_of_a_call(name: str, kernel: str) -> None:
    compiled = rewritten(flux())
    with torch.no_grad(), collect_reports() as before:
        compiled(**inputs())
    with torch.no_grad(), attention_backend(name), collect_reports() as within:
        compiled(**inputs())
    assert [row.kernel for report in before for row in report.sites] == ["native"] * FLUX.sites
    assert [row.kernel for report in within for row in report.sites] == [kernel] * FLUX.sites * (name != "native")


def test_what_is_asked_of_attnrewrite_counts_first() -> None:
    model: Any = flux()
    model.set_attention_backend("_native_math")
    assert kernels(model, kernels="native") == ["native"] * FLUX.sites


def one(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    with sdpa_kernel(SDPBackend.MATH):
        first = sdpa(q, k, v)
    return first, sdpa(q, k, v)


def several(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
        return sdpa(q, k, v)


def all_of_them(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel([*SDPBackend.__members__.values()][1:5]):
        return sdpa(q, k, v)


def nested(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    with sdpa_kernel(SDPBackend.MATH):
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            first = sdpa(q, k, v)
        return first, sdpa(q, k, v)


def checkpointed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(SDPBackend.MATH):
        result: Tensor = checkpoint(sdpa, q, k, v, use_reentrant=False)
    return result


def by_hand(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """It is not PyTorch's call that is meant."""
    with sdpa_kernel(SDPBackend.MATH):
        return (q @ k.mT / 3).softmax(-1) @ v


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (one, ["_native_math", "native"]),
        (several, ["_native_math"]),
        (all_of_them, ["native"]),
        (nested, ["native", "_native_math"]),
        (checkpointed, ["_native_math"]),
        (by_hand, ["native"]),
    ],
    ids=lambda given: getattr(given, "__name__", None),
)
def test_regions_of_one_backend(function: Callable[..., Any], expected: list[str]) -> None:
    operands = [each.requires_grad_() for each in noise(3, 2, 3, 12, 8, seed=0).unbind()]
    assert [row.kernel for row in rows(function, *operands)] == expected


@pytest.mark.parametrize(("value", "checks"), [("1", 1), ("true", 1), ("0", 0)])
def test_checks(value: str, checks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are those of ``ATTNREWRITE_CHECKS``, and forbid a mask beside ``is_causal=True``."""
    monkeypatch.setenv("DIFFUSERS_ATTN_CHECKS", value)
    assert Policy.from_options({}, None).checks is bool(checks)
    q, k, v = noise(3, 2, 3, 12, 8, seed=0).unbind()
    mask = torch.ones(12, 12, dtype=torch.bool)
    with pytest.raises(AttentionInputError, match="forbids") if checks else contextlib.nullcontext():
        attnrewrite.attention_forward(q, k, v, attn_mask=mask, is_causal=True)
    monkeypatch.setenv("ATTNREWRITE_CHECKS", "0")
    assert not Policy.from_options({}, None).checks
