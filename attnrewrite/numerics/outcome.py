"""What a verification compares, and what it says."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch

from attnrewrite.report.rows import SiteReport

__all__ = ["TOLERANCES", "Difference", "SiteCheck", "Verification", "difference"]

TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 4e-2}
"""How far a site may lie from the source, relative to the source's largest number, by the dtype that it computes in.

float32 on a GPU counts as float16 where TF32 is allowed, whose products have no more digits.
"""


@dataclass(frozen=True)
class Difference:
    """Between what a site gives and what the source gives.

    Attributes:
        absolute: the largest difference of two numbers; infinite where NaN or infinity meets another number.
        relative: ``absolute`` over the source's largest finite magnitude.
        reason: why the two cannot be compared number by number (another shape, an exception), or empty.
    """

    absolute: float
    relative: float
    reason: str = ""


@dataclass(frozen=True)
class SiteCheck:
    """What became of one rewritten site: compared, or skipped for a reason.

    Attributes:
        site: the site's row of the report; None for an output of the graph that differs outside of every site.
        what: the site or the output, in words.
        difference: what was found; None where the site was skipped.
        allowed: the largest relative difference that passes.
        inputs: what the site read, each as "name dtype (shape)".
        skipped: why it was not compared, or empty.
    """

    site: SiteReport | None
    what: str
    difference: Difference | None = None
    allowed: float = 0.0
    inputs: tuple[str, ...] = ()
    skipped: str = ""

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
    """All checks of a graph. ``unable``: why the source's graph could not be run for comparison, or empty."""

    checks: list[SiteCheck] = field(default_factory=list)
    unable: str = ""

    @property
    def failed(self) -> list[SiteCheck]:
        return [check for check in self.checks if check.failed]

    def __str__(self) -> str:
        """One line for a verification that found nothing wrong."""
        compared = [check.difference.relative for check in self.checks if check.difference is not None]
        skipped = [str(check) for check in self.checks if check.skipped]
        count = len(compared)
        text = f"{'all ' * (count > 1 and not skipped)}{count} site{'s' * (count != 1)} agree{'s' * (count == 1)}"
        text = f"{text} with the source (largest error {max(compared):.1e})" if compared else "no site was compared"
        return "; ".join([f"verified: {text}", *skipped])


# Comparing two values.


def difference(actual: Any, expected: torch.Tensor) -> Difference:
    """How far ``actual`` lies from ``expected``: NaN must meet NaN, and an infinity the same one."""
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
    """The tolerance for a result: that of the coarser of its own dtype and the one that the site computes in."""
    named = getattr(torch, dtype_name, None)
    dtypes = [value.dtype, *([named] if isinstance(named, torch.dtype) else [])]
    if value.device.type == "cuda" and torch.float32 in dtypes and torch.backends.cuda.matmul.allow_tf32:
        dtypes.append(torch.float16)
    return max(TOLERANCES.get(dtype, max(TOLERANCES.values())) for dtype in dtypes)
