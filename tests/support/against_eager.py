"""A function as it is and rewritten, both held against float64: values, and gradients where they are asked for."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from attnrewrite.numerics.judge import HALF, disagreements
from tests.support.helpers import outputs
from tests.support.reference import Reference, wide

__all__ = ["Results", "Tolerance", "moved", "prepared", "run", "truth", "wrong"]

Results = dict[str, list[Tensor]]
"""By "value" and "gradient"."""


@dataclass(frozen=True)
class Tolerance:
    """In float32 and float64, relative to the largest number of a tensor.

    Where eager itself is off by more than ``doubtful``, rounding decides its result (a row whose keys are all masked by
    a finite number), and what eager gives is what is asked for. A gradient is small below ``small`` of the largest, and
    below ``least``, where all of them are nothing but rounding; below ``nothing`` where they are zero in float64, as
    the gradients of rows that attend one key are.
    """

    value: float = 1e-5
    gradient: float = 1e-4
    doubtful: float = 1e-4
    there: float = 1e-2
    small: float = 1e-2
    least: float = 1e-3
    nothing: float = 1e-2

    @staticmethod
    def on(device: str) -> Tolerance:
        """GPU kernels compute products of float32 as sums of products in TF32.

        Where rounding decides, such as beside a mask of -1e6, a score is another multiple of 1/16 then.
        """
        return Tolerance() if device == "cpu" else Tolerance(value=5e-5, gradient=5e-4, there=5e-2)


def wrong(
    dtype: torch.dtype,
    new: Results,
    own: Results,
    truth: Results,
    tolerance: Tolerance | None = None,
    moved: Callable[[], Sequence[Results]] | None = None,
) -> str:
    """What is wrong with the values or the gradients, in words; empty if nothing is.

    Args:
        dtype: the dtype that is computed in; in half precision the judge of ``attnrewrite.numerics`` decides.
        new, own: what the rewritten function gives, and the function itself.
        truth: what the function gives in float64.
        tolerance: in float32 and float64.
        moved: gives the truth for inputs that are rounded once more, several times; asked only where something seems
            wrong. A sum of numbers that cancel (the gradient of a learned scale) moves by more than it is far off.
    """
    tolerance = tolerance or Tolerance()
    for what, limit in (("value", tolerance.value), ("gradient", tolerance.gradient)):
        if dtype in HALF:
            results = new[what], own[what], truth[what]
            beside = float(what == "gradient")
            difference = disagreements(*results, dtype, beside=beside)
            if difference and moved is not None:
                difference = disagreements(*results, dtype, beside=beside, moved=[draw[what] for draw in moved()])
        else:
            results = new[what], own[what], truth[what]
            difference = _difference(*results, limit, tolerance, what)
            if difference and moved is not None:
                difference = _difference(*results, limit, tolerance, what, [draw[what] for draw in moved()])
        if difference:
            return f"{what}: {difference}"
    return ""


def truth(
    function: Callable[..., Any], call: Sequence[Any], dtype: torch.dtype, gradients: bool, device: str
) -> Results:
    """What the function gives in float64; in half precision with the numbers of its dtype."""
    if dtype not in HALF:
        return run(function, prepared(call, torch.float64, gradients, device), gradients)
    return _in_float64(function, prepared(call, dtype, gradients, device), gradients)


def moved(
    function: Callable[..., Any], call: Sequence[Any], dtype: torch.dtype, gradients: bool, device: str, draws: int = 4
) -> list[Results]:
    """The truth for inputs that are rounded once more, ``draws`` times."""
    generator = torch.Generator().manual_seed(11)
    if dtype not in HALF:
        return [run(function, _rounded(call, dtype, gradients, device, generator), gradients) for _ in range(draws)]
    inputs = prepared(call, dtype, gradients, device)
    return [_in_float64(function, inputs, gradients, generator) for _ in range(draws)]


def _rounded(
    call: Sequence[Any], dtype: torch.dtype, gradients: bool, device: str, generator: torch.Generator
) -> list[Any]:
    """The tensors of a call in float64, those that no mask is made of moved as rounding to ``dtype`` may move them."""
    inputs = prepared(call, torch.float64, gradients, device)
    for value, plain in zip(inputs, prepared(call, torch.float64, True, device), strict=True):
        if isinstance(value, Tensor) and plain.requires_grad:
            signs = torch.randint(0, 2, value.shape, generator=generator).to(value) * 2 - 1
            with torch.no_grad():
                value.mul_(1 + signs * torch.finfo(dtype).eps / 2)
    return inputs


def _in_float64(
    function: Callable[..., Any], inputs: list[Any], gradients: bool, rounded: torch.Generator | None = None
) -> Results:
    with Reference():
        results = run(function, Reference.given(inputs, rounded), gradients)
    return {what: [wide(value) for value in values] for what, values in results.items()}


def prepared(call: Sequence[Any], dtype: torch.dtype, gradients: bool, device: str = "cpu") -> list[Any]:
    """The tensors of a call in ``dtype``, those that no mask is made of with gradients where they are asked for."""
    return [_prepare(value, dtype, gradients, device) for value in call]


def _prepare(value: Any, dtype: torch.dtype, gradients: bool, device: str) -> Any:
    if not isinstance(value, Tensor):
        return value
    if not value.is_floating_point():
        return value.to(device)
    own = value.detach().to(device, dtype)
    if isinstance(value, nn.Parameter):
        return nn.Parameter(own)
    masking = bool(own.isinf().any()) or bool(((own == 0) | (own == 1)).all())
    return own.clone().requires_grad_() if gradients and not masking else own


def run(function: Callable[..., Any], inputs: Sequence[Any], gradients: bool) -> Results:
    with _gradients(gradients):
        results = outputs(function(*inputs))
    wanted = [value for value in inputs if isinstance(value, Tensor) and value.requires_grad] if gradients else []
    found: list[Tensor] = []
    if wanted:
        generator = torch.Generator().manual_seed(1)
        weights = [torch.randn(result.shape, generator=generator).to(result) for result in results]
        total = torch.stack([(result * weight).sum() for result, weight in zip(results, weights, strict=True)]).sum()
        given = torch.autograd.grad(total, wanted, allow_unused=True)
        found = [torch.zeros_like(w) if g is None else g for g, w in zip(given, wanted, strict=True)]
    return {"value": [result.detach() for result in results], "gradient": found}


@contextlib.contextmanager
def _gradients(wanted: bool) -> Iterator[None]:
    with torch.set_grad_enabled(wanted):
        yield


def _difference(
    new: Sequence[Tensor],
    own: Sequence[Tensor],
    truth: Sequence[Tensor],
    limit: float,
    tolerance: Tolerance,
    what: str,
    moved: Sequence[Sequence[Tensor]] = (),
) -> str:
    """What differs, in words; empty if nothing does."""
    # A gradient of nothing but rounding is no gradient: what is small beside the others is measured by them.
    # A row with one key has gradients of zero, which a fused kernel computes as a difference of numbers of that size.
    small = tolerance.small if what == "gradient" else 1e-3
    largest = max((t.double().nan_to_num().abs().max().item() for t in truth if t.numel()), default=0.0)
    least = tolerance.nothing if largest < 1e-12 else tolerance.least
    floor = max(small * largest, least if what == "gradient" else 0.0)
    for n, o, t, *others in zip(new, own, truth, *moved, strict=True):
        if n.shape != o.shape or n.dtype != o.dtype:
            return f"{n.dtype} {tuple(n.shape)} in place of {o.dtype} {tuple(o.shape)}"
        if not n.numel():
            continue
        n, o, t = n.double(), o.double(), t.double()
        if not torch.equal(n.isnan(), o.isnan()):
            return f"{int(n.isnan().sum())} numbers of {n.numel()} are NaN in place of {int(o.isnan().sum())}"
        # A number that is masking in one dtype and minus infinity in another: only eager can be asked.
        doubtful = t.isnan() & ~o.isnan()
        t = torch.where(doubtful, o, t)
        unknown = o.isnan() | t.isnan()
        scale = t.masked_fill(unknown, 0.0).abs().max().clamp_min(max(floor, 1e-30))
        mistake = ((o - t).abs() / scale).masked_fill(unknown, 0.0)
        doubtful |= mistake > tolerance.doubtful
        for other in others:
            mistake = torch.maximum(
                mistake, ((other.double() - t).abs() / scale).nan_to_num(0.0, 0.0).masked_fill(unknown, 0.0)
            )
        # A row whose scores are rounded is so as a whole, whichever of its numbers came out well.
        if doubtful.dim():
            doubtful = doubtful.any(-1, keepdim=True).expand_as(doubtful)
        eager = mistake.masked_fill(doubtful, 0.0).max().item()
        error = ((n - t).abs() / scale).masked_fill(unknown | doubtful, 0.0).max().item()
        if error > max(limit, 4 * eager):
            return f"relative error {error:.2g}, eager's is {eager:.2g}"
        # Where the truth is no measure, what eager gives is: zero, in some rows.
        there = o.masked_fill(o.isnan(), 0.0).abs().max().clamp_min(1e-2)
        apart = ((n - o).abs() / torch.maximum(scale, there)).masked_fill(o.isnan() | ~doubtful, 0.0).max().item()
        if apart > tolerance.there:
            return f"{apart:.2g} from eager where rounding decides"
    return ""
