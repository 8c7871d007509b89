"""What a canonical attention means is what its source computes, and what each kernel's emission computes.

Values, gradients, rows without a key; the formula that ``verify`` holds kernels to in half precision, too.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from torch import Tensor

from attnrewrite import KernelError
from attnrewrite.kernels import registered_kernels
from attnrewrite.numerics.formula import formula_between, in_float64
from attnrewrite.numerics.interpreter import interpreted
from attnrewrite.patterns import Specimen
from tests.spellings.forms import Spelling
from tests.spellings.strategy import spellings
from tests.support.against_eager import prepared
from tests.support.canonical import Canonical
from tests.support.helpers import cast, gradients, relative_error, specimens_for_kernels

SPECIMENS = specimens_for_kernels()
LENGTH = 12
AVAILABLE = [
    kernel.name for kernel in registered_kernels() if kernel.availability().available and kernel.name != "flex"
]


@pytest.mark.parametrize("specimen", SPECIMENS, ids=lambda specimen: specimen.name)
def test_source_meaning_and_kernels(specimen: Specimen) -> None:
    inputs = specimen.inputs(0, LENGTH)
    calls = [inputs] if specimen.masked_rows is None else [inputs, specimen.masked_rows(inputs)]
    canonical = Canonical(specimen.function)
    with torch.no_grad():
        for call in calls:
            expected = specimen.function(*call)
            assert relative_error(canonical.source(*call), expected) <= 1e-5
            assert relative_error(canonical.meaning(*call), expected) <= 1e-5
        assert canonical.sites
        served = _held_to_meaning(canonical, calls)
    # FlexAttention is held to the same in tests/kernels/test_kernels.py: it takes seconds to compile.
    assert served or any(site.scores.inexpressible for site, _ in canonical.sites)
    if specimen.gradients:
        expected = gradients(specimen.function, inputs)
        assert relative_error(gradients(canonical.meaning, inputs), expected) <= 1e-4
        _gradients_held_to(expected, canonical, inputs)


def _held_to_meaning(canonical: Canonical, calls: Any) -> list[str]:
    """The kernels that serve the function, which give what is meant."""
    served = []
    for kernel in AVAILABLE:
        try:
            for call in calls:
                actual = canonical.served(kernel, *call)
                assert relative_error(actual, canonical.meaning(*call)) <= 1e-5, kernel
        except KernelError:
            continue
        assert set(canonical.kernels) == {kernel}
        served.append(kernel)
    return served


def _gradients_held_to(expected: list[Tensor], canonical: Canonical, inputs: Any) -> None:
    for kernel in AVAILABLE:
        try:
            found = gradients(lambda *each: canonical.served(kernel, *each), inputs)  # noqa: B023 - It is called here.
        except KernelError:
            continue
        assert relative_error(found, expected) <= 1e-4, kernel


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("specimen", SPECIMENS[::4], ids=lambda specimen: specimen.name)
def test_formula_of_verify(specimen: Specimen, dtype: torch.dtype) -> None:
    """What ``verify`` holds a kernel to in half precision is what the site means."""
    inputs = cast(specimen.inputs(0, LENGTH), dtype)
    canonical = Canonical(specimen.function)
    with torch.no_grad():
        try:
            canonical.meaning(*inputs)
        except RuntimeError as error:
            pytest.skip(f"eager does not run in {dtype}: {error}")
        for site, values in canonical.sites:
            ends = [node for node in (site.query.node, site.key.node, site.value.node) if node is not site.result]
            nodes = formula_between(ends, site.result)
            expected = in_float64(nodes, values, lambda node, args, kwargs: node.target(*args, **kwargs))  # type: ignore[operator]
            # Factors in the source's dtype are numbers of that dtype.
            assert relative_error(interpreted(site, values.__getitem__), expected) <= 4 * torch.finfo(dtype).eps


def test_drawn_spellings() -> None:
    """Read in float64 (some cast to float32 themselves), every row included."""
    meant = 0

    @settings(
        max_examples=40,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(spellings(torch.float64))
    def check(spelling: Spelling) -> None:
        nonlocal meant
        names: dict[str, Any] = {}
        exec(compile(spelling.text, "<spelling>", "exec"), names)
        inputs = prepared(names["inputs"](0, 0), torch.float64, False)
        canonical = Canonical(names["attend"])
        with torch.no_grad():
            result = canonical.meaning(*inputs)
            assert relative_error(result, names["attend"](*inputs)) <= 1e-5, str(spelling)
        meant += len(canonical.sites)

    check()
    assert meant >= 20
