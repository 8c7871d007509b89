"""FlexAttention, where it is willing to serve a site, gives what the source gives, and what the site means.

The other kernels of a CPU are held to that in tests/numerics/test_interpreter.py.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from attnrewrite import KernelError
from attnrewrite.patterns import Specimen
from tests.support.canonical import Canonical
from tests.support.helpers import gradients, relative_error, rewritten, rewritten_and_rows, specimens_for_kernels

LENGTH = 12


@pytest.mark.parametrize("specimen", specimens_for_kernels(), ids=lambda specimen: specimen.name)
def test_alone(specimen: Specimen) -> None:
    inputs = specimen.inputs(0, LENGTH)
    asked: Any = {"kernels": "flex", "strict": True}
    try:
        compiled, actual, found = rewritten_and_rows(specimen.function, *inputs, **asked)
    except KernelError:
        pytest.skip("the kernel is not willing")
    assert {row.kernel for row in found} == {"flex"}
    assert relative_error(actual, specimen.function(*inputs)) <= 1e-5
    if specimen.masked_rows:
        masked = specimen.masked_rows(inputs)
        assert relative_error(compiled(*masked), specimen.function(*masked)) <= 1e-5
    with torch.no_grad():
        meant = Canonical(specimen.function).meaning(*inputs)
    assert relative_error(actual, meant) <= 1e-5
    if not specimen.gradients:
        return
    torch._dynamo.reset()
    # It may be willing without gradients only; the next kernel serves then.
    actual = gradients(rewritten(specimen.function, "aot_eager", kernels="flex"), inputs)
    assert relative_error(actual, gradients(specimen.function, inputs)) <= 1e-4
