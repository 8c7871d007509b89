"""Compiles a model once, and runs it with one drawing of weights and masks after another."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from attnrewrite.backend import collect_reports
from attnrewrite.numerics.judge import HALF
from tests.coverage.entries_transformers import CASES
from tests.coverage.measure import outputs_of, parameter_gradients_of
from tests.coverage.precision import Measured, judged, measured_in, nudged
from tests.support.against_eager import Tolerance, wrong
from tests.support.helpers import rewritten
from tests.support.reordered import TF32, Reordered, Rounded
from tests.support.scores import digits_of_scores, largest_score

__all__ = ["DRAWS", "Model", "Outcome", "draw", "judge"]

Verdict = Literal["same", "wrong", "crashed", "ill-conditioned", "does not run", "beyond range"]
"""Beyond range: gradients at scores of more than 1e4, or that differ by the digits that a logsumexp of that size loses,
and gradients of a loss that is NaN, most of which are NaN in both; on a GPU also values that differ by what its kernels
lose of scores of that size (docs/exactness.md)."""

DRAWS = 8
"""Weights and masks for each model that is compiled."""

_NUDGES = 3
"""How often it is asked whether rounding does as much."""

_FACTORS = (0.2, 1.0, 1.0, 1.0, 2.0, 4.0)
_MASKS = ("all", "random", "right", "left", "one token", "none in one", "random", "holes")


@dataclass(frozen=True)
class Model:
    """A model of the coverage table in ``dtype``, in training if ``gradients``; ``seed`` draws the rest."""

    name: str
    seed: int
    dtype: torch.dtype
    gradients: bool

    def __str__(self) -> str:
        return f"{self.name} {str(self.dtype)[6:]}{' gradients' * self.gradients} seed {self.seed}"


@dataclass(frozen=True)
class Outcome:
    """``drawing``: which of a model's, in words."""

    model: Model
    verdict: Verdict
    drawing: str = ""
    detail: str = ""
    sites: int = 0

    def __str__(self) -> str:
        return f"{self.verdict}: {self.detail}\n  {self.model}: {self.drawing}"


def draw(seed: int) -> Model:
    chance = random.Random(seed)
    dtype = chance.choice([torch.float32] * 4 + [torch.float64, torch.bfloat16, torch.float16])
    return Model(chance.choice(CASES).name, seed, dtype, chance.random() < 0.3)


def judge(model: Model, device: str = "cpu", inner: str | None = None) -> Iterator[Outcome]:
    """One outcome for each drawing.

    Args:
        model: what is judged.
        device: where its tensors lie.
        inner: the backend that the rewritten graph is given to (default: none, with gradients ``aot_eager``).
    """
    torch._dynamo.reset()
    (case,) = (case for case in CASES if case.name == model.name)
    measured = measured_in(model.dtype, case.build().eval().to(device), case.inputs())
    plain = inner or "aot_eager"
    inner = inner or ("aot_eager" if model.gradients else "eager")
    chance = random.Random(model.seed)
    with collect_reports() as reports:
        function = rewritten(measured.model, inner)
        for _ in range(DRAWS):
            factor, mask, seed = chance.choice(_FACTORS), chance.choice(_MASKS), chance.randrange(10**9)
            words = f"weights times {factor}, mask {mask}, {seed}"
            _set_weights(measured.model, factor, seed)
            inputs = {name: _redrawn(name, value, mask, seed) for name, value in measured.inputs.items()}
            drawn = Measured(measured.model, inputs, model.dtype)
            verdict, detail = _judged(drawn, function, model.gradients, device, plain)
            failures = [report.reason for report in reports if "rewriting failed" in report.reason]
            if failures:
                verdict, detail = "crashed", failures[0]
            yield Outcome(model, verdict, words, detail, sum(len(report.rewritten) for report in reports))


def _judged(
    measured: Measured, function: Callable[..., Any], gradients: bool, device: str, plain: str
) -> tuple[Verdict, str]:
    """``plain`` is the backend without us that shows whose fault a difference is."""
    run: Any = parameter_gradients_of if gradients else outputs_of
    with torch.set_grad_enabled(gradients):
        try:
            own, truth = measured.own(run), measured.truth(run)
        except Exception as error:  # noqa: BLE001 - For want of a kernel, or because it mixes dtypes.
            return "does not run", f"{type(error).__name__}: {str(error).strip()[:300]}"
        try:
            new = measured.new(function, run)
        except Exception as error:  # noqa: BLE001 - Whatever it is, it is the finding, unless PyTorch has it too.
            return _failure(measured, run, error, plain)
        judged_as = measured, run, new, own, truth
        difference = _difference(*judged_as, gradients, device)
        if difference and (gradients or device != "cpu"):
            largest = largest_score(lambda: measured.own(run))
            digits = digits_of_scores(largest, measured.dtype, device)
            lost = gradients and (_mostly_nan(own, new) or largest > 1e4)
            if lost or not _difference(*judged_as, gradients, device, digits):
                return "beyond range", difference
        if difference and _rounding_does_as_much(measured, run, own, truth, gradients, device):
            return "ill-conditioned", difference
        if difference and device != "cpu" and not _wrong_beside_tf32(measured, run, new, truth, gradients, device):
            return "ill-conditioned", difference
        if difference:
            theirs = measured.new(torch.compile(measured.model, backend=plain), run)
            if _difference(measured, run, theirs, own, truth, gradients, device):
                return "does not run", f"torch.compile: {difference}"
    return ("wrong", difference) if difference else ("same", "")


def _failure(measured: Measured, run: Any, error: Exception, plain: str) -> tuple[Verdict, str]:
    words = f"{type(error).__name__}: {str(error).strip()[:300]}"
    try:
        measured.new(torch.compile(measured.model, backend=plain), run)
    except Exception:  # noqa: BLE001 - That it fails is what is asked.
        return "does not run", f"torch.compile: {words}"
    return "crashed", words


def _difference(
    measured: Measured, run: Any, new: Any, own: Any, truth: Any, gradients: bool, device: str, digits: float = 0.0
) -> str:
    """``digits``: the least relative error that is allowed in float32 and float64."""
    if measured.dtype in HALF:
        how: dict[str, Any] = {"beside": 0.25, "whole": True} if gradients else {}
        if not gradients and any(_overflows(o, t) for o, t in zip(own, truth, strict=True)):
            # Eager says nothing of how much the layers behind round, and nothing at all of the numbers that it lost.
            how["roundings"] = 1024.0
            new = [_where_eager_is_finite(n, o, t) for n, o, t in zip(new, own, truth, strict=True)]
        return judged(measured, run, new, own, truth, **how)[0]
    results = [_results(each, gradients) for each in (new, own, truth)]
    # Key biases have gradients of zero, which are sums over all positions.
    tolerance = Tolerance.on(device)
    tolerance = replace(
        tolerance, small=0.1, gradient=max(tolerance.gradient, digits), value=max(tolerance.value, digits)
    )
    return wrong(measured.dtype, results[0], results[1], results[2], tolerance)


def _results(results: Any, gradients: bool) -> dict[str, list[Tensor]]:
    listed = [value for value in (results.values() if gradients else results) if value.is_floating_point()]
    return {"value": [] if gradients else listed, "gradient": listed if gradients else []}


def _where_eager_is_finite(new: Tensor, own: Tensor, truth: Tensor) -> Tensor:
    if not new.is_floating_point() or new.shape != own.shape:
        return new
    return torch.where(own.isfinite() | ~truth.isfinite(), new, truth.to(new.dtype))


def _overflows(own: Tensor, truth: Tensor) -> bool:
    return own.is_floating_point() and bool((truth.isfinite() & ~own.isfinite()).any())


def _mostly_nan(*gradients: Any) -> bool:
    """Whether most of the parameters have NaN in their gradient, in each of the results."""
    lost = [[bool(value.isnan().any()) for value in each.values()] for each in gradients]
    return all(2 * sum(each) > len(each) for each in lost)


def _rounding_does_as_much(measured: Measured, run: Any, own: Any, truth: Any, gradients: bool, device: str) -> bool:
    """Whether weights that differ in their last digit, or another order of summation, give results as far away.

    A model in float64 that computes parts in float32 rounds to that: the reference does not, and shows it.
    """
    results, references = (list(each.values()) if gradients else list(each) for each in (own, truth))
    narrows = measured.dtype is torch.float64 and not all(
        torch.allclose(o, t, rtol=1e-10, atol=1e-12, equal_nan=True)
        for o, t in zip(results, references, strict=True)
        if o.is_floating_point()
    )
    for seed in range(_NUDGES):
        model = nudged(measured.model, seed, torch.float32 if narrows else None)
        other = Measured(model, measured.inputs, measured.dtype)
        if _difference(other, run, other.own(run), own, truth, gradients, device):
            return True
        with Reordered(seed):
            reordered = measured.own(run)
        if _difference(measured, run, reordered, own, truth, gradients, device):
            return True
    return False


def _wrong_beside_tf32(measured: Measured, run: Any, new: Any, truth: Any, gradients: bool, device: str) -> str:
    """What is wrong if the products of the source are computed as a GPU kernel computes them."""
    with Rounded(seed=0, products=TF32):
        own = measured.own(run)
    return _difference(measured, run, new, own, truth, gradients, device)


def _set_weights(model: nn.Module, factor: float, seed: int) -> None:
    """Random weights, with which the scores of an attention are ``factor`` squared as large as usual."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.is_floating_point():
                continue
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() >= 2:
                parameter.copy_(noise * factor * max(1, parameter[0].numel()) ** -0.5)
            else:
                parameter.copy_(0.1 * noise + float(parameter.detach().float().mean().round()))


def _redrawn(name: str, value: Any, how: str, seed: int) -> Any:
    """A mask of zeros and ones with other entries; what is no such mask stays."""
    if not isinstance(value, Tensor) or not name.endswith("attention_mask") or value.dim() != 2:
        return value
    batch, length = value.shape
    generator = torch.Generator().manual_seed(seed)
    place = torch.arange(length)
    ends = torch.randint(1, length + 1, (batch, 1), generator=generator)
    if how == "all":
        keep = torch.ones(batch, length, dtype=torch.bool)
    elif how == "right":
        keep = place < ends
    elif how == "left":
        keep = place >= length - ends
    elif how == "one token":
        keep = place == ends - 1
    elif how == "holes":
        keep = (place < ends) & (place % 3 != 1)
    else:
        keep = torch.rand(batch, length, generator=generator) < 0.6
        if how == "none in one":
            keep[0] = False
    return keep.to(value)
