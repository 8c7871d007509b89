"""PyTorch's own kernels: each constraint with a site that meets it and one that is refused, and the sentence.

Sites are asked as if they were on a GPU; none is needed for that. PyTorch's own checks, which are asked behind these
constraints, need one, and so do the tests that are marked ``gpu``.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode

from attnrewrite.ir.site import CanonicalAttention
from attnrewrite.kernels import Verdict, kernel_named, registered_kernels
from attnrewrite.kernels.common.layout import KernelLayout
from attnrewrite.kernels.common.limits import Asked, Limits, capability_of
from attnrewrite.kernels.torch_backends import CudnnAttention, EfficientAttention, FlashAttention
from tests.support.helpers import gradients, relative_error, rewritten, rows
from tests.support.library_sites import served_by, site_of, site_where_it_is

NATIVE = ("native", "_native_flash", "_native_efficient", "_native_cudnn", "_native_math", "flex")
BACKENDS = (FlashAttention(), EfficientAttention(), CudnnAttention())

AMPERE, HOPPER, TURING, LATER = (8, 0), (9, 0), (7, 5), (13, 0)


# Attentions, and what they are called with.


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT * 0.3).softmax(-1) @ v


def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def masked_call(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def call_of_three(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q[:, 0], k[:, 0], v[:, 0], attn_mask=mask)


def grouped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k[:, :2], v[:, :2], enable_gqa=True)


def capped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (torch.tanh(q @ k.mT * 0.3) * 5).softmax(-1) @ v


def filled(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    return (q @ k.mT * 0.3).masked_fill(~keep, -math.inf).softmax(-1) @ v


def filled_beside_a_sink(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    scores = (q @ k.mT * 0.3).masked_fill(~keep, torch.finfo(q.dtype).min)
    sink = v[:, :, :1, :1].expand(-1, -1, q.shape[-2], -1)
    return torch.cat([scores, sink], dim=-1).softmax(-1)[..., :-1] @ v


def biased(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    return (q @ k.mT * 0.3 + bias).softmax(-1).to(v.dtype) @ v


def sunk(q: Tensor, k: Tensor, v: Tensor, sink: Tensor) -> Tensor:
    column = sink[None, :, None, None].expand(q.shape[0], -1, q.shape[-2], 1)
    return torch.cat([q @ k.mT * 0.3, column], dim=-1).softmax(-1)[..., :-1].to(v.dtype) @ v


def dropped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.dropout((q @ k.mT * 0.3).softmax(-1), 0.1) @ v


def scaled_by_length(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ((q @ k.mT) * k.shape[-2]).clamp(-1, 1).softmax(-1) @ v


class Sizes(NamedTuple):
    queries: int = 12
    keys: int = 12
    width: int = 16
    value_width: int = 16


class Case(NamedTuple):
    """A site: a function, and what differs from a plain attention of float16 on a GPU of Ampere's, in inference."""

    function: Callable[..., Tensor] = plain
    sizes: Sizes = Sizes()
    dtype: torch.dtype = torch.float16
    more: str = ""
    place: str = "cuda"
    capability: tuple[int, int] | None = AMPERE
    training: bool = False
    dynamic: tuple[int, ...] = ()
    attended: bool = False

    def inputs(self, device: str = "cpu") -> list[Any]:
        queries, keys, width, value_width = self.sizes
        shapes = [(2, 4, queries, width), (2, 4, keys, width), (2, 4, keys, value_width)]
        generator = torch.Generator().manual_seed(0)
        operands = [torch.randn(shape, generator=generator) for shape in shapes]
        inputs: list[Any] = [part.to(device, self.dtype).requires_grad_(self.training) for part in operands]
        for part, dim in itertools.product(inputs, self.dynamic):
            torch._dynamo.mark_dynamic(part, dim)
        numbers = torch.randn(queries, keys, generator=generator)
        if not self.more:
            return inputs
        what, _, wide = self.more.partition(" in ")
        dtype = torch.float32 if wide else self.dtype
        extra: dict[str, Callable[[], Tensor]] = {
            "keep": lambda: (numbers > -1).to(device),
            "given": lambda: numbers.to(device, dtype),
            "learned": lambda: torch.nn.Parameter(numbers.to(device, dtype)),
            "sink": lambda: torch.nn.Parameter(numbers[0, :4].to(device, dtype)),
        }
        return [*inputs, extra[what]()]

    def site(self) -> CanonicalAttention:
        return recorded(self)


@functools.cache
def recorded(case: Case) -> CanonicalAttention:
    torch._dynamo.reset()
    settings: Any = {"assume_attended_rows": case.attended}
    with torch.set_grad_enabled(case.training):
        return site_of(case.function, *case.inputs(), place=case.place, **settings)


def asked(name: str, site: CanonicalAttention, capability: tuple[int, int] | None) -> Verdict:
    kernel: Any = kernel_named(name)
    verdict: Verdict = kernel.verdict(site, capability) if hasattr(kernel, "verdict") else kernel.supports(site)
    assert verdict.willing == (verdict.reason == "")
    return verdict


class Constraint(NamedTuple):
    """``met`` is taken by the kernels, ``broken`` is refused by them with the sentence."""

    kernels: str
    met: Case
    broken: Case
    sentence: str


TRAIN = Case(training=True)
ALL = " ".join(NATIVE)
FUSED = "native _native_flash _native_efficient _native_cudnn _native_math"
SELECTED = "_native_flash _native_efficient _native_cudnn"
LOST = Case(filled, more="keep")
WIDE = Case(sizes=Sizes(width=64, value_width=64), capability=HOPPER)

CONSTRAINTS = {
    "keys": Constraint(ALL, Case(), Case(sizes=Sizes(keys=0)), "there is no key to attend to"),
    "any function of the scores": Constraint(FUSED, Case(), Case(capped), "tanh"),
    # Native.
    "cuDNN's gradients": Constraint(
        "native",
        TRAIN._replace(capability=AMPERE),
        TRAIN._replace(capability=HOPPER),
        "PyTorch may select cuDNN",
    ),
    "cuDNN's gradients in float32": Constraint(
        "native",
        TRAIN._replace(capability=HOPPER, dtype=torch.float32),
        TRAIN._replace(capability=HOPPER, dtype=torch.bfloat16),
        "whose backward pass gives wrong gradients",
    ),
    "cuDNN in inference": Constraint(
        "native", Case(capability=HOPPER), TRAIN._replace(capability=None), "PyTorch may select cuDNN"
    ),
    "cuDNN in the source": Constraint(
        "native",
        TRAIN._replace(function=masked_call, more="keep", capability=HOPPER),
        TRAIN._replace(function=call, capability=HOPPER),
        "PyTorch may select cuDNN",
    ),
    "a bias that moves rows": Constraint(
        "native _native_efficient",
        Case(biased, more="given", dtype=torch.float32),
        TRAIN._replace(function=biased, more="given", dtype=torch.float32),
        "lose such a row to rounding",
    ),
    "a bias that moves rows, by the caller's word": Constraint(
        "native _native_efficient",
        TRAIN._replace(function=biased, more="learned", dtype=torch.float32, attended=True),
        TRAIN._replace(function=biased, more="given", dtype=torch.float32),
        "lose such a row to rounding",
    ),
    "rows without a key in a call of three dimensions": Constraint(
        "native",
        Case(call_of_three, more="keep", place="cpu", capability=None),
        Case(call_of_three, more="keep"),
        "the call does not have four dimensions",
    ),
    "rows without a key on an unknown device": Constraint(
        "native _native_math",
        Case(biased, more="given", dtype=torch.float32, place="xpu", capability=None, attended=True),
        Case(biased, more="given", dtype=torch.float32, place="xpu", capability=None),
        "what xpu gives rows whose keys are all masked is not known",
    ),
    "a number that masks in float16": Constraint(
        "native _native_math _native_efficient _native_cudnn",
        Case(filled_beside_a_sink, more="keep", dtype=torch.bfloat16),
        Case(filled_beside_a_sink, more="keep"),
        "float16 holds no number that masks a score and keeps the mean",
    ),
    # A wider mask is cast on the CPU only, where the kernel takes it.
    "the bias in float32": Constraint(
        "native _native_math _native_efficient _native_cudnn",
        Case(biased, more="learned"),
        Case(biased, more="learned in float32"),
        "the bias is added in torch.float32, and the kernels on this device round it to torch.float16",
    ),
    "the bias in float32, on the CPU": Constraint(
        "native _native_math",
        Case(biased, more="learned in float32", place="cpu", capability=None),
        Case(biased, more="learned in float32", dtype=torch.bfloat16),
        "the kernels on this device round it to torch.bfloat16",
    ),
    "the sink in float32": Constraint(
        "native _native_math _native_efficient _native_cudnn",
        Case(sunk, more="sink"),
        Case(sunk, more="sink in float32"),
        "the sink is in torch.float32, and the kernels on this device round it to torch.float16",
    ),
    # Single back ends.
    "device": Constraint(SELECTED, Case(), Case(place="cpu", capability=None), "runs on cuda, rocm, not on cpu"),
    "oldest GPU": Constraint(
        "_native_flash _native_cudnn",
        Case(),
        Case(capability=TURING),
        "needs a GPU of compute capability 8.0 to 12.1, not 7.5",
    ),
    "newest GPU": Constraint(SELECTED, Case(capability=(12, 1)), Case(capability=LATER), "to 12.1, not 13.0"),
    "GPU unknown": Constraint(SELECTED, Case(), Case(capability=None), "that of this device is unknown"),
    "half precision": Constraint(
        "_native_flash _native_cudnn",
        Case(dtype=torch.bfloat16),
        Case(dtype=torch.float32),
        "takes bfloat16, float16, not float32",
    ),
    "float64": Constraint(
        "_native_efficient",
        Case(dtype=torch.float32),
        Case(dtype=torch.float64),
        "takes bfloat16, float16, float32, not float64",
    ),
    "bfloat16 before Ampere": Constraint(
        "_native_efficient",
        Case(capability=TURING),
        Case(capability=TURING, dtype=torch.bfloat16),
        "takes no bfloat16 before compute capability 8.0, and this GPU has 7.5",
    ),
    "head size": Constraint(
        "_native_flash _native_cudnn",
        Case(sizes=Sizes(width=250, value_width=250)),
        Case(sizes=Sizes(width=264, value_width=264)),
        "takes a head size of up to 256, not 264",
    ),
    "value head size": Constraint(
        "_native_flash",
        Case(sizes=Sizes(width=36, value_width=40)),
        Case(sizes=Sizes(width=36, value_width=48)),
        "takes values of the query's head size, 36, not 48",
    ),
    "largest value head size": Constraint(
        "_native_cudnn",
        Case(sizes=Sizes(value_width=40)),
        Case(sizes=Sizes(value_width=264)),
        "takes a value head size of up to 256, not 264",
    ),
    "a symbolic head size": Constraint(
        SELECTED, Case(dynamic=(2,)), Case(dynamic=(3,)), "the head size is symbolic, and must be a number"
    ),
    "a causal mask of two lengths": Constraint(
        "_native_flash",
        Case(causal),
        Case(causal, Sizes(keys=20)),
        "takes a causal mask only where there are known to be as many keys as queries",
    ),
    "masks": Constraint("_native_flash", Case(), LOST, "takes no mask but a causal one"),
    "a sink without masks": Constraint(
        "_native_flash", Case(), Case(sunk, more="sink"), "takes no mask, and a sink needs one"
    ),
    "grouped heads": Constraint(
        "_native_efficient", Case(), Case(grouped), "needs as many key heads as query heads, and keys are not repeated"
    ),
    "rows without a key in a call": Constraint(
        "_native_efficient _native_cudnn",
        Case(masked_call, more="keep", attended=True),
        Case(masked_call, more="keep"),
        "depends on the back end that PyTorch's selector picks",
    ),
    "cuDNN's own gradients": Constraint(
        "_native_cudnn",
        TRAIN._replace(capability=HOPPER),
        TRAIN,
        "its backward pass was not run before compute capability 9.0",
    ),
    "gradients of a mask": Constraint(
        "_native_cudnn",
        TRAIN._replace(function=filled, more="keep", capability=HOPPER, attended=True),
        TRAIN._replace(function=biased, more="learned", capability=HOPPER, attended=True),
        "gives no gradient for an additive mask",
    ),
    "gradients of a sink": Constraint(
        "_native_cudnn",
        Case(sunk, more="sink", capability=HOPPER),
        TRAIN._replace(function=sunk, more="sink", capability=HOPPER),
        "gives no gradient for a sink",
    ),
    "half a tile of keys and dropout": Constraint(
        "_native_cudnn",
        TRAIN._replace(function=dropped, capability=HOPPER),
        TRAIN._replace(function=dropped, capability=HOPPER, sizes=Sizes(keys=192)),
        "with dropout they cannot be padded",
    ),
    "any number of keys and dropout": Constraint(
        "_native_cudnn",
        TRAIN._replace(capability=HOPPER, dynamic=(2,)),
        TRAIN._replace(function=dropped, capability=HOPPER, dynamic=(2,)),
        "with dropout they cannot be padded",
    ),
    "one query and cuDNN 9.26": Constraint(
        "_native_cudnn",
        TRAIN._replace(capability=HOPPER, dynamic=(2,)),
        TRAIN._replace(capability=HOPPER, sizes=Sizes(queries=1)),
        "NaN where there is one query",
    ),
    # FlexAttention.
    "flex: dtype": Constraint(
        "flex", Case(), Case(dtype=torch.float64), "takes float32, bfloat16 and float16, not float64"
    ),
    "flex: device": Constraint("flex", Case(), Case(place="xpu"), "was never tested on xpu"),
    "flex: training": Constraint(
        "flex", TRAIN, TRAIN._replace(place="cpu"), "no backward pass on the CPU (run it under torch.no_grad())"
    ),
    "flex: a symbolic head size": Constraint(
        "flex", Case(sizes=Sizes(width=8, value_width=8)), Case(dynamic=(3,)), "takes head sizes that are numbers"
    ),
    "flex: a call": Constraint(
        "flex",
        Case(masked_call, more="keep"),
        Case(masked_call, more="given"),
        "a scaled_dot_product_attention call with a mask",
    ),
    "flex: dropout": Constraint("flex", Case(), Case(dropped), "FlexAttention has no dropout"),
    "flex: a symbolic factor": Constraint(
        "flex",
        Case(scaled_by_length),
        Case(scaled_by_length, dynamic=(2,)),
        "a factor of the scores is a symbolic number",
    ),
    "flex: rows without a key": Constraint(
        "flex",
        LOST._replace(training=True),
        Case(biased, more="given", training=True, dtype=torch.float32),
        "the gradient of such a row is not known here",
    ),
    # FlexAttention with FlashAttention 4 as its back end.
    "flex_flash: device": Constraint("flex_flash", WIDE, WIDE._replace(place="cpu"), "runs on cuda, not on cpu"),
    "flex_flash: dtype": Constraint(
        "flex_flash", WIDE, WIDE._replace(dtype=torch.float32), "takes bfloat16, float16, not float32"
    ),
    "flex_flash: GPU": Constraint(
        "flex_flash", WIDE, WIDE._replace(capability=AMPERE), "compute capability 9.0 or later, not 8.0"
    ),
    "flex_flash: head size": Constraint(
        "flex_flash", WIDE, WIDE._replace(sizes=Sizes(width=80, value_width=80)), "takes a head size of 64, 128, not 80"
    ),
    "flex_flash: training": Constraint("flex_flash", WIDE, WIDE._replace(training=True), "has no backward pass"),
    "flex_flash: a mask": Constraint(
        "flex_flash", WIDE._replace(function=causal), WIDE._replace(function=filled, more="keep"), "takes no mask"
    ),
    "flex_flash: a function": Constraint(
        "flex_flash", WIDE._replace(function=capped), WIDE._replace(function=scaled_by_length), "clamp"
    ),
    "flex_flash: a symbolic length": Constraint(
        "flex_flash", WIDE, WIDE._replace(dynamic=(2,)), "takes no symbolic sizes"
    ),
    "flex_flash: dropout": Constraint("flex_flash", WIDE, WIDE._replace(function=dropped), "has no dropout"),
}


EACH = [(words, name) for words, constraint in CONSTRAINTS.items() for name in constraint.kernels.split()]


@pytest.mark.parametrize(("words", "name"), EACH)
def test_each_constraint(words: str, name: str) -> None:
    _, met, broken, sentence = CONSTRAINTS[words]
    assert asked(name, met.site(), met.capability).reason == ""
    verdict = asked(name, broken.site(), broken.capability)
    assert not verdict.willing and sentence in verdict.reason, verdict.reason


def test_every_kernel_takes_a_plain_attention_and_refuses_something() -> None:
    site = Case().site()
    assert all(asked(name, site, AMPERE).willing for name in NATIVE)
    assert {name for _, name in EACH} == {*NATIVE, "flex_flash"}


def test_operands_are_numbers() -> None:
    """No pattern reads an attention of integers; the kernel does not rely on it."""
    integers = dataclasses.replace(Case().site(), compute_dtype=torch.int64)
    for name in ("native", *(kernel.name for kernel in BACKENDS)):
        assert asked(name, integers, AMPERE).reason == "takes floating-point operands, not torch.int64"


def test_native_trains_in_half_precision_where_cudnn_is_switched_off(request: pytest.FixtureRequest) -> None:
    request.addfinalizer(lambda: torch.backends.cuda.enable_cudnn_sdp(True))
    site = TRAIN.site()
    assert not asked("native", site, HOPPER).willing
    torch.backends.cuda.enable_cudnn_sdp(False)
    assert asked("native", site, HOPPER).willing


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("function", [plain, call])
def test_training_in_half_precision_on_hopper_goes_to_cudnn_of_our_own(
    dtype: torch.dtype, function: Callable[..., Tensor]
) -> None:
    """The automatic choice asks in this order; the first that is willing has a right backward pass."""
    site = TRAIN._replace(function=function, dtype=dtype).site()
    asked_in_order = [kernel.name for kernel in registered_kernels() if kernel.name in NATIVE]
    willing = [name for name in asked_in_order if asked(name, site, HOPPER).willing]
    assert willing == ["_native_cudnn", "_native_flash", "_native_efficient", "_native_math", "flex"]


WITH_MASKS = {
    "filled": Case(filled, more="keep"),
    "filled beside a sink": Case(filled_beside_a_sink, more="keep", dtype=torch.bfloat16),
    "biased": Case(biased, more="learned"),
    "a call": Case(masked_call, more="keep", attended=True),
}


@pytest.mark.parametrize("name", ["native", "_native_efficient", "_native_cudnn", "_native_math"])
@pytest.mark.parametrize("case", WITH_MASKS)
def test_masks_have_the_dtype_of_the_query_on_a_gpu(name: str, case: str) -> None:
    """cuDNN gives NaN for a float32 mask beside half-precision operands, and others round it."""
    graphs: list[fx.GraphModule] = []

    def keep(gm: fx.GraphModule, inputs: Any) -> Any:
        graphs.append(gm)
        return gm

    given = WITH_MASKS[case]
    with (
        served_by(kernel_named(name), "cuda", AMPERE),
        FakeTensorMode(allow_non_fake_inputs=True) as mode,
        torch.no_grad(),
    ):
        inputs = [mode.from_tensor(part.detach()) for part in given.inputs()]
        rewritten(given.function, keep, assume_attended_rows=given.attended or given.more == "learned")(*inputs)
    calls = [node for node in graphs[0].graph.nodes if "scaled_dot_product" in str(node.target)]
    (node,) = calls
    mask = node.args[3].meta["val"]
    assert mask.dtype is given.dtype or mask.dtype is torch.bool
    assert node.args[0].meta["val"].dtype is given.dtype


# Limits.


def limits_of(name: str) -> Limits:
    limits = kernel_named(name).limits
    assert limits is not None
    return limits


@pytest.mark.parametrize("name", NATIVE)
def test_every_limit_has_its_source(name: str) -> None:
    limits = limits_of(name)
    stated = {"devices", "dtypes", "heads", "value_heads", "masks", "alignments", "dropout", "grouped"}
    for field in ("mask_gradient", "min_capability", "max_capability", "window", "softcap", "deterministic"):
        stated |= {field} if getattr(limits, field) else set()
    stated |= set() if limits.backward else {"backward"}
    assert stated <= set(limits.sources) <= {field.name for field in dataclasses.fields(limits)}


@pytest.mark.parametrize("name", NATIVE)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_dtypes_are_those_of_the_table(name: str, dtype: torch.dtype) -> None:
    limits = limits_of(name)
    assert asked(name, Case(dtype=dtype).site(), AMPERE).willing == (dtype in limits.dtypes)


ASKED_OF_ALL = {
    "dropout": Case(dropped),
    "softcap": Case(capped),
    "grouped": Case(grouped),
    "backward": TRAIN,
    "mask_gradient": TRAIN._replace(function=biased, more="learned", attended=True),
}


@pytest.mark.parametrize("name", NATIVE)
@pytest.mark.parametrize("field", ASKED_OF_ALL)
def test_what_the_table_says_is_what_they_take(name: str, field: str) -> None:
    limits = limits_of(name)
    # cuDNN trains from Hopper on, where PyTorch's choice does not.
    capability = HOPPER if name == "_native_cudnn" else AMPERE
    # FlexAttention's gradients of what its function reads are Inductor's.
    site = dataclasses.replace(ASKED_OF_ALL[field].site(), for_inductor=True)
    assert asked(name, site, capability).willing == getattr(limits, field)


# On a GPU, where PyTorch's own checks are asked.


def on_gpu(case: Case) -> CanonicalAttention:
    torch._dynamo.reset()
    settings: Any = {"assume_attended_rows": case.attended}
    with torch.set_grad_enabled(case.training):
        return site_where_it_is(case.function, *case.inputs("cuda"), **settings)


GRID = [
    Case(function, sizes, dtype, training=training)
    for function, sizes, dtype, training in itertools.product(
        (plain, causal, dropped, grouped),
        (
            Sizes(),
            Sizes(keys=20),
            Sizes(width=36, value_width=40),
            Sizes(value_width=40),
            Sizes(width=264, value_width=264),
        ),
        (torch.float16, torch.bfloat16, torch.float32, torch.float64),
        (False, True),
    )
]


@pytest.mark.gpu
@pytest.mark.parametrize("backend", BACKENDS, ids=lambda backend: backend.name)
def test_no_limit_is_narrower_than_pytorchs_check(backend: Any) -> None:
    """What a declared limit refuses, PyTorch refuses."""
    refused = 0
    for case in GRID:
        site = on_gpu(case)
        capability = capability_of(site.device)
        limit = backend.limits.machine_refusal(site, capability) or backend.limits.rule_refusal(
            site, Asked(), capability
        )
        if limit:
            refused += 1
            refusal = backend._torch_refuses(site, KernelLayout.of(site))
            assert refusal is not None and refusal.startswith("PyTorch's check says"), (case, limit)
    assert refused > len(GRID) // 5


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["_native_flash", "_native_efficient", "_native_cudnn"])
def test_pytorchs_own_check_is_heard(name: str, request: pytest.FixtureRequest) -> None:
    switch, key = {
        "_native_flash": (torch.backends.cuda.enable_flash_sdp, "lash"),
        "_native_efficient": (torch.backends.cuda.enable_mem_efficient_sdp, "fficient"),
        "_native_cudnn": (torch.backends.cuda.enable_cudnn_sdp, "cuDNN"),
    }[name]
    site = on_gpu(Case())
    assert kernel_named(name).supports(site).willing
    request.addfinalizer(lambda: switch(True))
    switch(False)
    reason = kernel_named(name).supports(site).reason
    assert reason.startswith("PyTorch's check says: ") and key in reason and "disabled" in reason


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_training_in_half_precision_here(dtype: torch.dtype) -> None:
    case = TRAIN._replace(dtype=dtype)
    inputs = case.inputs("cuda")
    (row,) = rows(plain, *inputs)
    if torch.cuda.get_device_capability()[0] >= 9:
        assert row.kernel == "_native_cudnn"
    truth = gradients(plain, [part.double() for part in inputs])
    own, eager = (gradients(function, inputs) for function in (rewritten(plain, "aot_eager"), plain))
    assert relative_error(own, truth) <= 3 * relative_error(eager, truth) + torch.finfo(dtype).eps


@pytest.mark.gpu
def test_a_wider_bias_here() -> None:
    """It is added in float32, as the source adds it, or the site is kept."""
    inputs = Case(biased, more="learned in float32").inputs("cuda")
    with torch.no_grad():
        (row,) = rows(biased, *inputs)
        assert row.kernel in (None, "flex")
        expected = biased(*inputs)
        assert relative_error(rewritten(biased)(*inputs), expected) <= 4e-3
        for name in ("native", "_native_cudnn", "_native_efficient"):
            assert not kernel_named(name).supports(on_gpu(Case(biased, more="learned in float32"))).willing


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["flex", "_native_math"])
def test_cuda_graphs_hold_it(name: str) -> None:
    function = capped if name == "flex" else plain
    inputs = Case(dtype=torch.float32).inputs("cuda")
    counters["inductor"].clear()
    compiled: Any = torch.compile(
        function, backend="attnrewrite", options={"kernels": name, "strict": True, "triton.cudagraphs": True}
    )
    with torch.no_grad():
        for _ in range(3):
            assert relative_error(compiled(*inputs).clone(), function(*inputs)) <= 5e-3
    assert counters["inductor"]["cudagraph_skips"] == 0
