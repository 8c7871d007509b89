"""NaN, infinities and the largest numbers of a dtype in query, key, value and mask: a diverged model looks diverged.

Values: rows that are not finite in eager are not finite, and NaN is NaN in the same rows but for the exceptions that
docs/exactness.md has, which are here as well. Gradients: where eager's are not finite, some of that tensor are not.
Positions that are not finite are attended to by every row that has a key, since a masked score that is not finite is an
exception of its own.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from attnrewrite.numerics.judge import HALF
from tests.support.against_eager import Results, Tolerance, run, wrong
from tests.support.helpers import rewritten, rows
from tests.support.reference import Reference, wide

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]

Inputs = dict[str, Tensor]


def plain(q: Any, k: Any, v: Any, keep: Any, bias: Any) -> Any:
    return q @ k.mT / q.shape[-1] ** 0.5


def filled(q: Any, k: Any, v: Any, keep: Any, bias: Any) -> Any:
    return (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(~keep, -math.inf)


def lowest(q: Any, k: Any, v: Any, keep: Any, bias: Any) -> Any:
    scores = q @ k.mT / q.shape[-1] ** 0.5
    return scores.masked_fill(~keep, torch.finfo(scores.dtype).min)


def added(q: Any, k: Any, v: Any, keep: Any, bias: Any) -> Any:
    return q @ k.mT / q.shape[-1] ** 0.5 + bias


def causal(q: Any, k: Any, v: Any, keep: Any, bias: Any) -> Any:
    scores = q @ k.mT / q.shape[-1] ** 0.5
    later = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).triu(1)
    return scores.masked_fill(later, -math.inf)


def divided_later(q: Any, k: Any, v: Any, keep: Any, bias: Any) -> Any:
    return (q @ k.mT).masked_fill(~keep, -math.inf) / q.shape[-1] ** 0.5


FORMS = [plain, filled, lowest, added, causal, divided_later]

EXACT = ("query NaN", "query NaN in a whole row", "value NaN", "bias NaN", "bias NaN in a whole row")
"""NaN stands where eager has it; elsewhere it may stand in more places of the same heads."""


def _at(name: str, value: float, *, row: bool = False) -> Callable[[Inputs, random.Random], None]:
    """One number, or the whole row of one position: the first key, which every row attends to, or any query."""

    def change(inputs: Inputs, chance: random.Random) -> None:
        tensor = inputs[name]
        position = chance.randrange(tensor.shape[-2]) if name in ("q", "bias") else 0
        place = slice(None) if row else chance.randrange(tensor.shape[-1])
        tensor[chance.randrange(len(tensor)), ..., position, place] = value

    return change


KINDS: dict[str, Callable[[Inputs, random.Random], None]] = {
    "query NaN": _at("q", math.nan),
    "query NaN in a whole row": _at("q", math.nan, row=True),
    "query infinite": _at("q", math.inf),
    "query minus infinity": _at("q", -math.inf),
    "key NaN": _at("k", math.nan),
    "key infinite": _at("k", math.inf),
    "value NaN": _at("v", math.nan),
    "value infinite": _at("v", math.inf),
    "value minus infinity": _at("v", -math.inf),
    "bias NaN": _at("bias", math.nan),
    "bias NaN in a whole row": _at("bias", math.nan, row=True),
    "bias infinite": _at("bias", math.inf),
    "bias infinite in a whole row": _at("bias", math.inf, row=True),
    "bias minus infinity in a whole row": _at("bias", -math.inf, row=True),
    "bias of 3e38": _at("bias", 3e38),
    "bias of -3e38 in a whole row": _at("bias", -3e38, row=True),
}


def _inputs(chance: random.Random, dtype: torch.dtype, device: str) -> Inputs:
    generator = torch.Generator().manual_seed(chance.randrange(10**9))
    queries, keys = chance.choice([(5, 5), (7, 7), (12, 12), (33, 33), (64, 64), (1, 9), (130, 130)])
    width = chance.choice([8, 16, 64])

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    keep = torch.rand(2, 1, 1, keys, generator=generator) < 0.7
    keep[..., 0] = True
    inputs = {"q": drawn(2, 3, queries, width), "k": drawn(2, 3, keys, width), "v": drawn(2, 3, keys, width)}
    inputs |= {"keep": keep, "bias": drawn(2, 1, queries, keys)}
    return {
        name: (value.to(dtype) if value.is_floating_point() else value).to(device) for name, value in inputs.items()
    }


def mismatch(
    form: Callable[..., Any], kind: str, dtype: torch.dtype, gradients: bool, seed: int, device: str
) -> tuple[str, str]:
    """What is wrong with the values or gradients, empty if nothing is; and what the site became."""
    chance = random.Random(f"{form.__name__} {kind} {dtype} {gradients} {seed}")
    inputs = _inputs(chance, dtype, device)
    KINDS[kind](inputs, chance)
    call = list(inputs.values())

    def attend(q: Tensor, k: Tensor, v: Tensor, keep: Tensor, bias: Tensor) -> Any:
        return form(q, k, v, keep, bias).softmax(-1) @ v

    def given(dtype: torch.dtype = dtype) -> list[Tensor]:
        made = [value.to(dtype, copy=True) if value.is_floating_point() else value for value in call]
        return [value.requires_grad_() for value in made[:3]] + made[3:] if gradients else made

    torch._dynamo.reset()
    own = run(attend, given(), gradients)
    reference = _truth(attend, given(dtype if dtype in HALF else torch.float64), dtype, gradients)
    new = run(rewritten(attend, "aot_eager" if gradients else "eager"), given(), gradients)
    # Rows of minus infinity without a mask are zero in some kernels.
    lost = (form(*call) == -math.inf).all(-1, keepdim=True) if not kind.startswith("bias") else torch.zeros(())
    bleeds = device == "cpu" and dtype is torch.bfloat16
    bled = _finite_by_its_numbers(form(*call), call[2]) if bleeds else torch.zeros((), dtype=torch.bool, device=device)
    difference = _difference(kind, dtype, new, own, reference, lost.to(device).bool(), bled, device)
    became = ""
    if difference:
        torch._dynamo.reset()
        with torch.set_grad_enabled(gradients):
            became = "; ".join(f"{row.status} {row.kernel}" for row in rows(attend, *given()))
    return difference, became


def _finite_by_its_numbers(scores: Tensor, value: Tensor) -> Tensor:
    """Rows whose scores and values say that they are finite.

    In eager they may be NaN all the same: a product in bfloat16 of an odd number of keys takes the first weight of the
    next row along, times zero, on CPUs with AMX.
    """
    attends = scores.isfinite().any(-1, keepdim=True) & ~(scores.isnan() | (scores == math.inf)).any(-1, keepdim=True)
    return attends & value.isfinite().all(-1, keepdim=True).all(-2, keepdim=True)


def _difference(
    kind: str,
    dtype: torch.dtype,
    new: Results,
    own: Results,
    reference: Results,
    lost: Tensor,
    bled: Tensor,
    device: str,
) -> str:
    (n,), (o,) = new["value"], own["value"]
    healthy = n.isfinite() & ~o.isfinite() & ~lost & ~bled
    if bool(healthy.any()):
        return f"{int(healthy.sum())} numbers of {n.numel()} look healthy"
    if kind in EXACT and not torch.equal(n.isfinite() | bled, o.isfinite() | bled):
        return f"{int((~n.isfinite()).sum())} numbers are not finite in place of {int((~o.isfinite()).sum())}"
    unknown = ~(n.isfinite() & o.isfinite()) | lost
    value = [each["value"][0].masked_fill(unknown, 0.0) for each in (new, own, reference)]
    gradients: list[list[Tensor]] = [[], [], []]
    for n, o, t in zip(new["gradient"], own["gradient"], reference["gradient"], strict=True):
        if not bool(o.isfinite().all()) or bool(lost.any()):
            if bool(n.isfinite().all()) and not bool(lost.any()):
                return "gradients look healthy"
        elif kind in EXACT or bool(n.isfinite().all()):
            for listed, each in zip(gradients, (n, o, t), strict=True):
                listed.append(each)
    results = [{"value": [v], "gradient": g} for v, g in zip(value, gradients, strict=True)]
    return wrong(dtype, results[0], results[1], results[2], Tolerance.on(device))


def _truth(form: Callable[..., Any], given: list[Tensor], dtype: torch.dtype, gradients: bool) -> Results:
    if dtype not in HALF:
        return run(form, given, gradients)
    with Reference():
        results = run(form, Reference.given(given), gradients)
    return {what: [wide(value) for value in values] for what, values in results.items()}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
@pytest.mark.parametrize("kind", KINDS)
def test_like_eager(kind: str, form: Callable[..., Any], device: str) -> None:
    """Of each kind sixteen drawn members at least, over forms, dtypes and gradients; eight where half is left out."""
    if kind.startswith("bias") != (form is added):
        pytest.skip("biases are added in one form, which is for them")
    # +inf in a mask gives finite rows on a CPU in half precision (docs/exactness.md).
    lost = device == "cpu" and kind in ("bias infinite", "bias of 3e38")
    for dtype in DTYPES[:2] if lost else DTYPES:
        for gradients in (False, True):
            for seed in range(2 if form is added else 1):
                difference, became = mismatch(form, kind, dtype, gradients, seed, device)
                assert not difference, f"{dtype} {'gradients' * gradients} seed {seed}: {difference} ({became})"
