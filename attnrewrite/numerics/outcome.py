"""The outcome of a verification: checks of sites, and the differences that they found."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch

from attnrewrite.report.rows import SiteReport

__all__ = ["TOLERANCES", "Difference", "SiteCheck", "Verification", "difference"]

TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 4e-2}
"""The largest difference from the source, relative to the source's largest number, by the compute dtype.

float32 on a GPU counts as float16 if TF32 is allowed, whose products have no more digits.
"""


@dataclass(frozen=True)
class Difference:
    """The difference between the results of a site and of the source.

    Attributes:
        absolute: the largest difference of two numbers; infinite if NaN or infinity meets another number.
        relative: ``absolute`` divided by the source's largest finite magnitude.
        reason: why the two cannot be compared number by number (another shape, an exception), or empty.
    """

    absolute: float
    relative: float
    reason: str = ""


@dataclass(frozen=True)
class SiteCheck:
    """The check of one rewritten site: its difference, or the reason why it was skipped.

    Attributes:
        site: the site's row of the report; None for an output of the graph that no site computes.
        what: the name of the site or the output in messages.
        difference: the difference found; None if the site was skipped.
        allowed: the largest relative difference that passes.
        inputs: the inputs of the site, each as "name dtype (shape)".
        skipped: why the site was not compared; empty if it was.
        gradients: whether it is the site's gradients that were compared, by the rule of the judge.
    """

    site: SiteReport | None
    what: str
    difference: Difference | None = None
    allowed: float = 0.0
    inputs: tuple[str, ...] = ()
    skipped: str = ""
    gradients: bool = False

    @property
    def failed(self) -> bool:
        return self.difference is not None and not self.difference.relative <= self.allowed

    def __str__(self) -> str:
        """One line: what differs, by how much, and on which inputs."""
        if self.difference is None:
            return f"{self.what}: {self.skipped}"
        found = self.difference.reason or (
            f"differs from the source by {self.difference.relative:.1e} of its largest number "
            f"(absolute {self.difference.absolute:.1e}, allowed {self.allowed:.0e})"
        )
        inputs = f"; inputs: {', '.join(self.inputs)}" if self.inputs else ""
        return f"{self.what} {found}{inputs}"


@dataclass
class Verification:
    """All checks of a graph. ``source_error``: why the source graph could not be run; empty if it ran."""

    checks: list[SiteCheck] = field(default_factory=list)
    source_error: str = ""

    @property
    def failed(self) -> list[SiteCheck]:
        return [check for check in self.checks if check.failed]

    def __str__(self) -> str:
        """One line for a verification that found nothing wrong."""
        compared = [check.difference.relative for check in self.checks if check.difference and not check.gradients]
        skipped = [str(check) for check in self.checks if check.skipped]
        count, trained = len(compared), sum(check.gradients for check in self.checks if check.difference)
        text = f"{'all ' * (count > 1 and not skipped)}{count} site{'s' * (count != 1)} agree{'s' * (count == 1)}"
        error = f"largest error {max(compared, default=0.0):.1e}"
        also = f"{error}; gradients of {trained} compared" if trained else error
        text = f"{text} with the source ({also})" if compared else "no site was compared"
        return "; ".join([f"verified: {text}", *skipped])


# Comparing two values.


def difference(actual: Any, expected: torch.Tensor) -> Difference:
    """The difference of ``actual`` from ``expected``; NaN agrees with NaN, and an infinity with the same infinity."""
    if not isinstance(actual, torch.Tensor):
        return Difference(math.inf, math.inf, f"gives {type(actual).__name__} where the source gives a tensor")
    for kind in ("shape", "dtype", "device"):
        ours, source = getattr(actual, kind), getattr(expected, kind)
        if ours != source:
            ours, source = (tuple(value) if kind == "shape" else value for value in (ours, source))
            return Difference(math.inf, math.inf, f"gives the {kind} {ours} where the source gives {source}")
    if expected.numel() == 0:
        return Difference(0.0, 0.0)
    if not expected.dtype.is_floating_point and not expected.dtype.is_complex:
        equal = torch.equal(actual, expected)
        return Difference(0.0, 0.0) if equal else Difference(math.inf, math.inf, "gives other numbers than the source")
    wide = torch.promote_types(expected.dtype, torch.float32)
    actual, expected = actual.to(wide), expected.to(wide)
    agree = (actual == expected) | (actual.isnan() & expected.isnan())
    distance = torch.where(agree, 0.0, (actual - expected).abs())
    absolute = torch.where(distance.isnan(), math.inf, distance).max().item()
    largest = torch.where(expected.isfinite(), expected.abs(), 0.0).max().item()
    if absolute == 0:
        return Difference(0.0, 0.0)
    return Difference(absolute, absolute / largest if largest else math.inf)


def allowed_difference(value: torch.Tensor, dtype_name: str = "") -> float:
    """The tolerance for a result: that of the coarser of its dtype and the site's compute dtype."""
    named = getattr(torch, dtype_name, None)
    dtypes = [value.dtype, *([named] if isinstance(named, torch.dtype) else [])]
    if value.device.type == "cuda" and torch.float32 in dtypes and torch.backends.cuda.matmul.allow_tf32:
        dtypes.append(torch.float16)
    return max(TOLERANCES.get(dtype, max(TOLERANCES.values())) for dtype in dtypes)
