"""Every kernel that is willing to serve a site gives what the source gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from attnrewrite import KernelError
from attnrewrite.kernels import Kernel, registered_kernels
from attnrewrite.patterns import Specimen
from tests.support.helpers import gradients, relative_error, rewritten, rewritten_and_rows, specimens_for_kernels

LENGTH = 12
AVAILABLE = [kernel for kernel in registered_kernels() if kernel.availability().available]


@pytest.mark.parametrize("kernel", AVAILABLE, ids=lambda kernel: kernel.name)
@pytest.mark.parametrize("specimen", specimens_for_kernels(), ids=lambda specimen: specimen.name)
def test_alone(specimen: Specimen, kernel: Kernel) -> None:
    inputs = specimen.inputs(0, LENGTH)
    asked: Any = {"kernels": kernel.name, "strict": True}
    try:
        compiled, actual, found = rewritten_and_rows(specimen.function, *inputs, **asked)
    except KernelError:
        pytest.skip("the kernel is not willing")
    assert {row.kernel for row in found} == {kernel.name}
    assert relative_error(actual, specimen.function(*inputs)) <= 1e-5
    if specimen.masked_rows:
        masked = specimen.masked_rows(inputs)
        assert relative_error(compiled(*masked), specimen.function(*masked)) <= 1e-5
    if not specimen.gradients:
        return
    torch._dynamo.reset()
    # A kernel may be willing without gradients only; the next one serves then.
    actual = gradients(rewritten(specimen.function, "aot_eager", kernels=kernel.name), inputs)
    assert relative_error(actual, gradients(specimen.function, inputs)) <= 1e-4
