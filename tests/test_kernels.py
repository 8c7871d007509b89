"""Every kernel that is willing to serve a site gives what the source gives."""

from __future__ import annotations

import pytest
import torch
from attnrewrite.patterns import Specimen, specimens

from attnrewrite import kernels
from attnrewrite.kernels import Kernel, registered_kernels
from tests.helpers import gradients, relative_error, rewritten, rows

LENGTH = 12


@pytest.mark.parametrize("kernel", registered_kernels(), ids=lambda kernel: kernel.name)
@pytest.mark.parametrize("specimen", specimens(), ids=lambda specimen: specimen.name)
def test_alone(specimen: Specimen, kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_KERNELS", [kernel])
    inputs = specimen.inputs(0, LENGTH)
    if {row.status for row in rows(specimen.function, *inputs)} != {"rewritten"}:
        pytest.skip("the kernel is not willing")
    cases = [inputs] + ([specimen.masked_rows(inputs)] if specimen.masked_rows else [])
    for case in cases:
        assert relative_error(rewritten(specimen.function)(*case), specimen.function(*case)) <= 1e-5
    torch._dynamo.reset()
    actual = gradients(rewritten(specimen.function, "aot_eager"), inputs)
    assert relative_error(actual, gradients(specimen.function, inputs)) <= 1e-4
