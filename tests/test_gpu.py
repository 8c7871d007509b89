"""The same on an NVIDIA GPU, whose fused kernels have masks, dtypes and strides of their own to be wrong about."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attnrewrite.patterns import Specimen, specimens

from tests.helpers import cast, gradients, relative_error, rewritten

pytestmark = pytest.mark.gpu

LENGTH = 12
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
every_specimen = pytest.mark.parametrize("specimen", specimens(), ids=[specimen.name for specimen in specimens()])
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])


def eager(specimen: Specimen, inputs: tuple[Any, ...]) -> Any:
    try:
        return specimen.function(*inputs)
    except RuntimeError as error:
        assert "without overflow" in str(error)
        pytest.skip("float16 cannot hold the fill, and eager says so")


@every_specimen
@every_dtype
def test_as_near_to_the_truth_as_before(specimen: Specimen, dtype: torch.dtype) -> None:
    inputs = cast(specimen.inputs(0, LENGTH), dtype, "cuda")
    truth = specimen.function(*cast(inputs, torch.float64, "cuda"))
    own = relative_error(eager(specimen, inputs), truth)
    # A few roundings of the result are allowed on top: the float32 kernels multiply in three parts of TF32.
    assert relative_error(rewritten(specimen.function)(*inputs), truth) <= 2 * own + 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize(
    "specimen", [pytest.param(specimen, id=specimen.name) for specimen in specimens() if specimen.masked_rows]
)
@every_dtype
def test_rows_without_a_key(specimen: Specimen, dtype: torch.dtype) -> None:
    assert specimen.masked_rows is not None
    inputs = cast(specimen.masked_rows(specimen.inputs(0, LENGTH)), dtype, "cuda")
    tolerance = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    expected = eager(specimen, inputs)
    assert relative_error(rewritten(specimen.function)(*inputs), expected) <= tolerance


@every_specimen
def test_gradients(specimen: Specimen) -> None:
    inputs = cast(specimen.inputs(0, LENGTH), torch.float32, "cuda")
    actual = gradients(rewritten(specimen.function, "aot_eager"), inputs)
    assert relative_error(actual, gradients(specimen.function, inputs)) <= 1e-4


@pytest.mark.parametrize("name", ["packed_projection", "causal_and_padding", "grouped_queries"])
def test_through_inductor_and_cuda_graphs(name: str) -> None:
    (specimen,) = (specimen for specimen in specimens() if specimen.name == name)
    compiled: Any = torch.compile(specimen.function, backend="attnrewrite", mode="reduce-overhead")
    for seed in range(3):
        inputs = cast(specimen.inputs(seed, LENGTH), torch.float32, "cuda")
        assert relative_error(compiled(*inputs).clone(), specimen.function(*inputs)) <= 1e-5
