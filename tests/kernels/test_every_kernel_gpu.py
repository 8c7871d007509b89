"""Every kernel on an NVIDIA GPU, PyTorch's own and those of other packages: what they really compute, against float64.

A kernel whose package is not there is skipped, with the reason that ``doctor`` gives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from attnrewrite.kernels import registered_kernels
from attnrewrite.kernels.common.library_kernel import LibraryKernel
from attnrewrite.kernels.torch_sdpa import TorchSDPA
from tests.support.helpers import gradients, relative_error, rewritten, rows
from tests.support.library_functions import CASES
from tests.support.library_sites import only as only_kernel

pytestmark = pytest.mark.gpu

KERNELS: dict[str, Any] = {kernel.name: kernel for kernel in registered_kernels() if kernel.limits is not None}
"""But for those that are no kernels of a vendor's, and are for one structure alone."""
ERROR = {torch.bfloat16: 8e-3, torch.float16: 1e-3}
"""A few roundings of the operands and the result."""
LOW = 6e-2
"""SageAttention's products in eight bits."""

CALLS_WITH_LOST_ROWS = ("boolean", "padding in a call, lost rows")

RUNNABLE = [name for name, kernel in KERNELS.items() if "cuda" in kernel.limits.devices and "hub" not in name]
every_runnable = pytest.mark.parametrize("name", RUNNABLE)


def inner(name: str, otherwise: str) -> str:
    """FlexAttention is a kernel only where Inductor makes one of it."""
    return "inductor" if name.startswith("flex") else otherwise


@contextmanager
def only(name: str) -> Iterator[Any]:
    kernel = KERNELS[name]
    available = kernel.availability()
    if not available.available:
        pytest.skip(f"{name}: {available.detail}")
    with only_kernel(kernel):
        yield kernel


def on_gpu(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(
        torch.nn.Parameter(part.detach().cuda()) if isinstance(part, torch.nn.Parameter) else part.cuda()
        for part in inputs
    )


def in_double(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(part.detach().double() if part.is_floating_point() else part for part in inputs)


def bound(name: str, dtype: torch.dtype) -> float:
    return LOW if KERNELS[name].lower_precision else ERROR[dtype]


def serve(name: str, function: Callable[..., Any], inputs: tuple[Any, ...]) -> None:
    """Skips what the kernel refuses: that refusals are right is tested elsewhere."""
    (row,) = rows(function, *inputs, inner=inner(name, "eager"))
    if row.status != "rewritten":
        pytest.skip(f"{name}: {row.reason}")


@every_runnable
@pytest.mark.parametrize("case", [name for name, case in CASES.items() if case.exact])
@pytest.mark.parametrize("dtype", list(ERROR), ids=lambda dtype: str(dtype)[6:])
def test_cases(name: str, case: str, dtype: torch.dtype) -> None:
    function, inputs = CASES[case].function, on_gpu(CASES[case].inputs(dtype))
    with only(name), torch.no_grad():
        before = [part.clone() for part in inputs]
        serve(name, function, inputs)
        result = rewritten(function, inner(name, "eager"), fullgraph=True)(*inputs)
        assert all(torch.equal(a, b) for a, b in zip(before, inputs, strict=True)), "an operand was changed"
    expected = function(*in_double(inputs))
    if isinstance(KERNELS[name], TorchSDPA) and KERNELS[name].selects and case in CALLS_WITH_LOST_ROWS:
        # What PyTorch's selector gives rows without a key depends on the back end that it picks, as before.
        attended = (expected != 0).any(-1)
        assert not attended.all()
        result, expected = result[attended], expected[attended]
    assert relative_error(result, expected) <= bound(name, dtype)


SHAPES = [
    # batch, heads, key heads, queries, keys, head size, causal
    *((2, 4, 4, 200, 200, size, causal) for size in (4, 12, 40, 64, 80, 128, 160, 256) for causal in (False, True)),
    *((2, 4, 4, 200, keys, 64, False) for keys in (1, 77, 128, 500, 512)),
    *((2, 8, 2, 192, 192, 64, causal) for causal in (False, True)),
    (1, 4, 4, 1, 256, 64, False),
    (1, 8, 2, 1, 256, 64, False),
]


def attend(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)


def shaped(shape: tuple[Any, ...], dtype: torch.dtype) -> tuple[Tensor, ...]:
    batch, heads, key_heads, queries, keys, size, _ = shape
    generator = torch.Generator().manual_seed(0)
    sizes = ((batch, heads, queries, size), (batch, key_heads, keys, size), (batch, key_heads, keys, size))
    return tuple(torch.randn(own, generator=generator).to("cuda", dtype) for own in sizes)


@every_runnable
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", list(ERROR), ids=lambda dtype: str(dtype)[6:])
def test_shapes(name: str, shape: tuple[Any, ...], dtype: torch.dtype) -> None:
    inputs, causal = shaped(shape, dtype), bool(shape[-1])

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, k, v, causal)

    with only(name), torch.no_grad():
        serve(name, function, inputs)
        result = rewritten(function, inner(name, "eager"), fullgraph=True)(*inputs)
    assert relative_error(result, function(*in_double(inputs))) <= bound(name, dtype)


@every_runnable
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients(name: str, shape: tuple[Any, ...]) -> None:
    inputs, causal = shaped(shape, torch.bfloat16), bool(shape[-1])

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, k, v, causal)

    with only(name) as kernel:
        if not kernel.limits.backward:
            pytest.skip(f"{name} has no backward pass")
        serve(name, function, tuple(part.requires_grad_() for part in inputs))
        found = gradients(rewritten(function, inner(name, "aot_eager"), fullgraph=True), inputs)
    # All in one: a single key's weight is 1, and the gradients of query and key are nothing but rounding.
    actual, expected = (
        torch.cat([part.double().flatten() for part in parts])
        for parts in (found, gradients(function, in_double(inputs)))
    )
    assert relative_error(actual, expected) <= 3e-2


@every_runnable
@pytest.mark.parametrize(
    "case",
    [
        "causal from last",
        "window",
        "softcap",
        "padding",
        "padding, lost rows",
        "grouped",
        "bias",
        "softcap and bias",
        "sink",
    ],
)
def test_gradients_of_cases(name: str, case: str) -> None:
    function = CASES[case].function
    inputs = on_gpu(CASES[case].inputs(torch.bfloat16))
    with only(name) as kernel:
        if not kernel.limits.backward:
            pytest.skip(f"{name} has no backward pass")
        trained = tuple(part.clone().requires_grad_(part.is_floating_point()) for part in inputs)
        serve(name, function, trained)
        actual = gradients(rewritten(function, inner(name, "aot_eager"), fullgraph=True), inputs)
    assert relative_error(actual, gradients(function, in_double(inputs))) <= 3e-2


@every_runnable
@pytest.mark.parametrize("case", ["plain", "causal", "padding"])
def test_in_cuda_graphs(name: str, case: str) -> None:
    function = CASES[case].function
    with only(name), torch.no_grad():
        serve(name, function, on_gpu(CASES[case].inputs(torch.bfloat16)))
        torch._dynamo.reset()
        compiled: Any = torch.compile(function, backend="attnrewrite", mode="reduce-overhead", fullgraph=True)
        for factor in (1.0, 0.5, 2.0, 1.5):
            inputs = on_gpu(CASES[case].inputs(torch.bfloat16))
            inputs = (inputs[0] * factor, *inputs[1:])
            result = compiled(*inputs).clone()
            assert relative_error(result, function(*in_double(inputs))) <= bound(name, torch.bfloat16)


@every_runnable
def test_symbolic_lengths(name: str) -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, k, v, False)

    with only(name), torch.no_grad():
        compiled: Any = torch.compile(function, backend="attnrewrite", fullgraph=True)
        served = None
        for length in (128, 192, 320, 77):
            inputs = shaped((2, 4, 4, length, length, 64, False), torch.bfloat16)
            for part in inputs:
                torch._dynamo.mark_dynamic(part, 2)
            if served is None:
                served = [row.status for row in rows(function, *inputs, inner=inner(name, "eager"))]
                if served != ["rewritten"]:
                    pytest.skip(f"{name} takes no symbolic number of keys")
                torch._dynamo.reset()
            assert relative_error(compiled(*inputs), function(*in_double(inputs))) <= bound(name, torch.bfloat16)


@every_runnable
def test_the_operators_checks(name: str) -> None:
    """Schema, fake and autograd registration of the operator, by PyTorch's own checks."""
    from attnrewrite.kernels.common.library_kernel import CallParameters

    if not isinstance(KERNELS[name], LibraryKernel):
        pytest.skip(f"{name} has no operator of its own")
    with only(name) as kernel:
        capability = torch.cuda.get_device_capability()
        heads = kernel.limits_now().heads_by_major.get(capability[0], kernel.limits_now().heads)
        size = 64 if heads.refusal(64) is None else heads.only[0]
        shape = (2, 128, 4, size) if kernel.order == "BSHD" else (2, 4, 128, size)
        operands = [torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
        operands = [part.requires_grad_(kernel.limits.backward) for part in operands]
        if kernel.limits_now().min_capability and capability < (kernel.limits_now().min_capability or (0, 0)):
            pytest.skip(f"{name} is not for this GPU")
        operator = getattr(torch.ops.attnrewrite, name).default
        utilities = ("test_schema", "test_faketensor", "test_autograd_registration")
        torch.library.opcheck(operator, (*operands, None, *CallParameters(0.125)), test_utils=utilities)
