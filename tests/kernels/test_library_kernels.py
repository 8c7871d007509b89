"""Kernels of other packages: what each accepts and refuses, what is put into the graph, and the vendor's call.

No vendor's package is needed. What they compute is tested where they run: tests/kernels/test_every_kernel_gpu.py.
"""

from __future__ import annotations

import dataclasses
import functools
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from attnrewrite.backend import collect_reports
from attnrewrite.ir.site import CanonicalAttention
from attnrewrite.kernels.common.library_kernel import CallParameters, LibraryKernel, Saved
from attnrewrite.kernels.common.packages import HubKernel, Package, VendorCall, is_older
from attnrewrite.kernels.common.packing import Packed
from attnrewrite.kernels.registry import LIBRARY_KERNELS
from attnrewrite.kernels.sage import Sage
from tests.support.helpers import cast, gradients, relative_error, rewritten, rows
from tests.support.library_functions import CASES, Case
from tests.support.library_sites import placed, served_by, site_of
from tests.support.published_signatures import PUBLISHED
from tests.support.vendor_semantics import bound, documented

KERNELS = {kernel.name: kernel for kernel in LIBRARY_KERNELS}
every_kernel = pytest.mark.parametrize("name", KERNELS)

HALF = torch.bfloat16

CAPABILITY = {
    "_sage_qk_int8_pv_fp8_cuda": (8, 9),
    "_sage_qk_int8_pv_fp16_cuda": (8, 0),
    "sage_3": (12, 0),
    "sage_blackwell_hub": (12, 0),
}
"""A GPU that the kernel runs on; where nothing is said, an H100."""


def capability(name: str) -> tuple[int, int] | None:
    return CAPABILITY.get(name, (9, 0)) if KERNELS[name].limits.devices == ("cuda",) else None


def place(name: str) -> str:
    return KERNELS[name].limits.devices[0]


@functools.cache
def recorded(case: str, dtype: torch.dtype = HALF, training: bool = False, dynamic: bool = False) -> CanonicalAttention:
    torch._dynamo.reset()
    inputs = CASES[case].inputs(dtype, training)
    if dynamic:
        for operand in inputs[:3]:
            torch._dynamo.mark_dynamic(operand, [0, 2])
    with torch.set_grad_enabled(training):
        return site_of(CASES[case].function, *inputs)


def refusal(name: str, case: str, **settings: Any) -> str:
    """What the kernel says of the case, on a device that it is for; empty if it takes it."""
    verdict = KERNELS[name].verdict(placed(recorded(case, **settings), place(name)), capability(name))
    assert verdict.willing == (verdict.reason == "")
    return verdict.reason


# What each kernel accepts, case by case, as its vendor states it. What is not named is refused.

_EVERYWHERE = {"plain", "call", "head size 128"}
_SIZES = {"head size 40", "head size 80", "head size 160", "head size 256"}
_LENGTHS = {"cross", "77 keys"}
_PADDING = {
    "padding",
    "padding, lost rows",
    "padding by the lowest number, lost rows",
    "padding by addition, lost rows",
    "padding in a call, lost rows",
}
_WINDOW = {"window", "causal, few more queries"}
_FLASH = (
    _EVERYWHERE | _SIZES | _LENGTHS | {"scale", "negative scale", "causal", "causal from last", "grouped"} | _WINDOW
)
_FIRST = {"causal from first", "causal, fewer keys", "causal, few more queries"}
_CAP = {"softcap", "softcap and causal"}
_SAGE = (
    _EVERYWHERE
    | _LENGTHS
    | {"scale", "negative scale", "causal", "grouped", "head size 36", "head size 40", "head size 80"}
)

ACCEPTED: dict[str, set[str]] = {
    "flash": _FLASH | _CAP | {"dropout"},
    "flash_varlen": _FLASH | _CAP | _PADDING | {"dropout"},
    "flash_hub": _FLASH | _CAP | {"dropout"},
    "flash_varlen_hub": _FLASH | _CAP | _PADDING | {"dropout"},
    "_flash_3": _FLASH | _CAP,
    "_flash_varlen_3": _FLASH | _CAP | _PADDING,
    "_flash_3_hub": _FLASH | _CAP,
    "_flash_3_varlen_hub": _FLASH | _CAP | _PADDING,
    "flash_4": _FLASH | _CAP,
    "flash_4_hub": _FLASH - _WINDOW,
    "varlen": _FLASH | _PADDING,
    "xformers": (_FLASH - {"window", "grouped"})
    | _PADDING
    | _FIRST
    | {"negative reach", "window", "padding and causal", "boolean", "bias"},
    "aiter": _FLASH,
    "aiter_fa2_hub": (_FLASH - _SIZES - _WINDOW),
    "_native_npu": (_FLASH - {"head size 40", "window"})
    | _PADDING
    | _FIRST
    | {"window", "negative reach", "padding and causal", "boolean", "dropout"},
    "_native_npu_inference": (_FLASH - {"head size 40", "window"})
    | _PADDING
    | _FIRST
    | {"window", "negative reach", "padding and causal", "boolean"},
    "_native_xla": _EVERYWHERE
    | _FIRST
    | {"scale", "negative scale", "cross", "causal", "head size 40", "head size 80", "head size 256"},
    "sage": _SAGE,
    "sage_varlen": _SAGE | _PADDING,
    "sage_hub": _SAGE,
    "_sage_qk_int8_pv_fp8_cuda": _SAGE,
    "_sage_qk_int8_pv_fp8_cuda_sm90": _SAGE,
    "_sage_qk_int8_pv_fp16_cuda": _SAGE,
    "_sage_qk_int8_pv_fp16_triton": _SAGE - {"77 keys"},
    "sage_3": _EVERYWHERE | _LENGTHS | {"causal"},
    "sage_blackwell_hub": _EVERYWHERE | _LENGTHS | {"causal"},
}

REASONS = {
    "scale": "scales by one over the root",
    "negative scale": "scales by one over the root",
    "scale of zero": "takes a positive scale",
    "causal from first": "counts causal masks and windows from|only where there are as many keys",
    **dict.fromkeys(
        ("causal, fewer keys", "causal, few more queries"),
        "counts causal masks and windows from|only where there are as many keys|no window",
    ),
    "causal from last": "counts causal masks and windows from|only where there are as many keys",
    "window": "no window",
    "negative reach": "counts causal masks|only where there are as many keys|no window",
    "77 keys": "multiple of",
    "cross": "multiple of",
    "padding": "a key padding mask",
    "padding, lost rows": "a key padding mask",
    "padding by the lowest number, lost rows": "a key padding mask",
    "padding by addition, lost rows": "a key padding mask",
    "padding in a call, lost rows": "a key padding mask",
    "padding and causal": "one over query and key positions",
    "boolean": "one over query and key positions",
    "bias": "numbers that are added to the scores",
    "softcap": "has no soft cap: tanh",
    "softcap and causal": "has no soft cap: tanh",
    "softcap and bias": "has no soft cap: tanh|numbers that are added to the scores",
    "clamp": "clamp of the scores",
    "dropout": "has no dropout",
    "softcap and dropout": "has no dropout|has no soft cap",
    "grouped": "as many key heads",
    "sink": "takes no sink",
    "value head size": "values of the query's head size, 64, not 128",
    **{case: "head size" for case in CASES if case.startswith("head size")},
}


# One test for all kernels: a verdict takes less time than what pytest does around a test.
@pytest.mark.parametrize("case", CASES)
def test_each_accepts_what_its_vendor_states(case: str) -> None:
    reasons = {name: refusal(name, case) for name in KERNELS}
    assert {name for name, reason in reasons.items() if reason == ""} == {
        name for name in KERNELS if case in ACCEPTED[name]
    }
    for name, reason in reasons.items():
        assert reason == "" or any(words in reason for words in REASONS[case].split("|")), f"{name}: {reason}"


@every_kernel
def test_refuses_other_devices_before_it_looks_for_its_package(name: str) -> None:
    site = placed(recorded("plain"), "cpu")
    assert KERNELS[name].supports(site).reason == f"runs on {place(name)}, not on cpu"


@every_kernel
def test_says_that_it_is_not_available(name: str) -> None:
    if KERNELS[name].availability().available:
        pytest.skip("it is available here")
    reason = KERNELS[name].supports(placed(recorded("plain"), place(name))).reason
    assert reason.startswith("not available: ") and "\n" not in reason


OTHER_GPUS = [
    ("flash", (7, 5), "8.0 or later, not 7.5"),
    ("flash_varlen", (7, 5), "8.0 or later"),
    ("_flash_3", (8, 0), "9.0, not 8.0"),
    ("_flash_3", (10, 0), "9.0, not 10.0"),
    ("flash_4", (8, 0), "9.0 to 11.9"),
    ("flash_4", (12, 0), "9.0 to 11.9"),
    ("varlen", (7, 5), "8.0 or later"),
    ("xformers", (7, 5), "8.0 or later"),
    ("sage", (7, 5), "8.0, 8.6, 8.9, 9.0, 12.0, not 7.5"),
    ("sage", (10, 0), "8.0, 8.6, 8.9, 9.0, 12.0, not 10.0"),
    ("sage_varlen", (7, 5), "8.0 or later"),
    ("_sage_qk_int8_pv_fp8_cuda", (9, 0), "8.9, 12.0"),
    ("_sage_qk_int8_pv_fp8_cuda_sm90", (8, 9), "9.0, not 8.9"),
    ("_sage_qk_int8_pv_fp16_cuda", (7, 5), "8.0 to 8.9"),
    ("_sage_qk_int8_pv_fp16_triton", (12, 0), "8.0 to 9.0"),
    ("sage_3", (9, 0), "12.0, not 9.0"),
    ("flash", None, "that of this device is unknown"),
]


@pytest.mark.parametrize(("name", "own", "words"), OTHER_GPUS)
def test_refuses_other_gpus(name: str, own: tuple[int, int] | None, words: str) -> None:
    reason = KERNELS[name].verdict(recorded("plain"), own).reason
    assert "compute capability" in reason and words in reason


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_none_computes_in_a_lower_dtype(dtype: torch.dtype) -> None:
    for name in KERNELS:
        accepted = {
            "xformers": (torch.float16, torch.bfloat16, torch.float32),
            "_native_xla": (torch.bfloat16, torch.float32),
            "aiter_fa2_hub": (torch.bfloat16,),
        }.get(name, (torch.float16, torch.bfloat16))
        reason = refusal(name, "plain", dtype=dtype)
        assert (reason == "") == (dtype in accepted), f"{name}: {reason}"
        assert reason == "" or reason.endswith(f"not {str(dtype)[6:]}")


BACKWARD = {
    *("flash", "flash_varlen", "flash_hub", "flash_varlen_hub"),
    *("_flash_3", "_flash_varlen_3", "_flash_3_hub", "_flash_3_varlen_hub"),
    *("flash_4", "varlen", "xformers", "_native_npu"),
}


@every_kernel
def test_trains_only_where_the_package_has_a_backward_pass(name: str) -> None:
    reason = refusal(name, "plain", training=True)
    assert reason == ("" if name in BACKWARD else "has no backward pass (run it under torch.no_grad())")


@pytest.mark.parametrize("name", sorted(BACKWARD))
def test_trains_deterministically_where_it_can(name: str, request: pytest.FixtureRequest) -> None:
    request.addfinalizer(lambda: torch.use_deterministic_algorithms(False))
    recorded("plain", training=True)
    torch.use_deterministic_algorithms(True)
    reason = refusal(name, "plain", training=True)
    assert ("deterministic" in reason) == (name in ("xformers", "_native_npu"))


@pytest.mark.parametrize("name", sorted(BACKWARD))
def test_gives_a_bias_its_gradient_or_refuses(name: str) -> None:
    assert refusal(name, "bias", training=True) != ""


def test_lost_rows_of_an_added_mask_are_not_trained() -> None:
    """In the source gradients pass through the addition, in a row that was opened they do not."""
    reason = refusal("flash_varlen", "padding by addition, lost rows", training=True)
    assert "a row may have no key" in reason and "assume_attended_rows" in reason


@every_kernel
def test_symbolic_sizes(name: str) -> None:
    reason = refusal(name, "plain", dynamic=True)
    words = {
        "_native_xla": "symbolic sizes",
        "_sage_qk_int8_pv_fp16_triton": "is known to be a multiple of 64",
    }
    assert words[name] in reason if name in words else reason == ""


def test_first_sage_is_right_for_multiples_of_64_only() -> None:
    """28% error at 77 keys, measured on an H100."""
    sage = KERNELS["sage"]
    assert isinstance(sage, Sage) and sage.older is not None
    assert "multiple of 64, not 77" in str(sage.older.refusal(recorded("77 keys"), (9, 0)))
    assert sage.older.refusal(recorded("plain"), (9, 0)) is None
    assert "64, 96, 128, not 40" in str(sage.older.refusal(recorded("head size 40"), (9, 0)))


def test_sage_on_the_gpu_that_its_triton_kernel_serves() -> None:
    assert "multiple of 64" in KERNELS["sage"].verdict(recorded("77 keys"), (8, 6)).reason
    assert KERNELS["sage"].verdict(recorded("plain"), (8, 6)).willing


def test_xformers_after_hopper() -> None:
    assert "above 9.0" in KERNELS["xformers"].verdict(recorded("padding"), (10, 0)).reason
    assert KERNELS["xformers"].verdict(recorded("plain"), (10, 0)).willing


def test_flash_4_on_blackwell() -> None:
    kernel = KERNELS["flash_4"]
    assert "head size of 8, 16" in kernel.verdict(recorded("head size 160"), (10, 0)).reason
    assert kernel.verdict(recorded("head size 256"), (10, 0)).willing


def test_xla_does_not_pad_keys() -> None:
    case = Case("640 keys", CASES["plain"].function, (1, 2, 2, 128, 640, 64, 64))
    site = site_of(case.function, *case.inputs(HALF), place="xla")
    assert "pads more than 512 keys" in KERNELS["_native_xla"].verdict(site, None).reason


def test_only_what_was_run_and_is_exact_is_chosen_unasked() -> None:
    assert not any(kernel.automatic and (kernel.lower_precision or not kernel.run_on) for kernel in LIBRARY_KERNELS)
    assert {name for name in KERNELS if KERNELS[name].lower_precision} == {name for name in KERNELS if "sage" in name}


@every_kernel
def test_every_limit_has_its_source(name: str) -> None:
    limits = KERNELS[name].limits
    stated = {"devices", "dtypes", "heads", "masks", "alignments"}
    for field in (
        "min_capability",
        "max_capability",
        "capabilities",
        "window",
        "softcap",
        "grouped",
        "minimum_version",
    ):
        if getattr(limits, field):
            stated.add(field)
    stated |= {"key_multiple"} if limits.key_multiple > 1 else set()
    stated |= {"symbolic"} if not limits.symbolic else set()
    stated |= {"any_scale"} if not limits.any_scale else set()
    stated |= {"backward"} if not limits.backward else set()
    missing = stated - set(limits.sources)
    assert not missing
    assert set(limits.sources) <= {field.name for field in dataclasses.fields(limits)} | {"softcap_with_dropout"}


# The graph that is emitted, with the vendor's documentation in the vendor's place.


def in_float64(name: str) -> LibraryKernel:
    """The kernel, allowed to take float64, in which its part of the graph can be judged without rounding."""
    kernel = KERNELS[name]
    changes: dict[str, Any] = {"limits": dataclasses.replace(kernel.limits, dtypes=(torch.float64,))}
    return dataclasses.replace(kernel, **changes)


FAMILIES = [
    *("flash", "flash_varlen", "_flash_3", "_flash_varlen_3", "flash_4", "flash_4_hub", "varlen", "xformers"),
    *("aiter", "aiter_fa2_hub", "_native_npu", "_native_npu_inference", "_native_xla"),
    *("sage", "sage_varlen", "_sage_qk_int8_pv_fp16_triton", "sage_3"),
]


OF_EVERY_HEAD_SIZE = {"flash_varlen", "_native_xla", *(name for name in FAMILIES if "sage" in name)}
"""Kernels that do something of their own to the last dimension, and one that does not: it stands for the others."""


def emitted(name: str, case: str) -> bool:
    # "padding by addition" adds in float32: see test_opens_rows_of_an_added_mask.
    if case not in ACCEPTED[name] or not CASES[case].exact or "addition" in case:
        return False
    return name in OF_EVERY_HEAD_SIZE or not case.startswith("head size")


@pytest.mark.parametrize(("name", "case"), [(name, case) for name in FAMILIES for case in CASES if emitted(name, case)])
def test_emits_what_the_source_computes(name: str, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(VendorCall, "run", lambda call: call.read(documented(name, call)))
    function, inputs = CASES[case].function, CASES[case].inputs(torch.float64)
    before = [part.clone() for part in inputs]
    with served_by(in_float64(name), place(name), capability(name)), torch.no_grad():
        (row,) = rows(function, *inputs)
        assert (row.status, row.kernel) == ("rewritten", name), row.reason
        result = rewritten(function)(*inputs)
    assert relative_error(result, function(*inputs)) <= 1e-6
    assert result.stride() == function(*inputs).stride()
    assert all(torch.equal(a, b) for a, b in zip(before, inputs, strict=True)), "an operand was changed"


@pytest.mark.parametrize("name", ["flash_varlen", "varlen", "xformers", "_native_npu", "sage_varlen"])
def test_opens_rows_of_an_added_mask(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(VendorCall, "run", lambda call: call.read(documented(name, call)))
    case = CASES["padding by addition, lost rows"]
    inputs = case.inputs(HALF)
    with served_by(KERNELS[name], place(name), capability(name)), torch.no_grad():
        result = rewritten(case.function)(*inputs)
    assert relative_error(result, case.function(*cast(inputs, torch.float32))) <= 1e-2


@pytest.mark.parametrize(
    ("name", "case"),
    [
        (name, case)
        for name in FAMILIES
        if name in BACKWARD
        for case in ("plain", "cross", "causal", "window", "softcap", "grouped", "padding", "padding, lost rows")
        if case in ACCEPTED[name]
    ],
)
def test_gradients_are_the_sources(name: str, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(VendorCall, "run", lambda call: call.read(documented(name, call)))
    function, inputs = CASES[case].function, CASES[case].inputs(torch.float64)
    with served_by(in_float64(name), place(name), capability(name)):
        actual = gradients(rewritten(function, "aot_eager"), inputs)
    assert relative_error(actual, gradients(function, inputs)) <= 1e-6


def between_projections(x: Tensor, weight: Tensor) -> Tensor:
    """Operands that lie in memory as (batch, length, heads, features), and a result that goes on as such."""
    q, k, v = (part.view(*x.shape[:2], 4, 16).transpose(1, 2) for part in x.chunk(3, dim=-1))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2) @ weight


@pytest.mark.parametrize("name", [name for name in FAMILIES if KERNELS[name].order == "BSHD" and "sage" not in name])
def test_nothing_is_copied_that_lies_as_the_vendor_wants_it(name: str) -> None:
    with (
        served_by(KERNELS[name], place(name), capability(name)),
        collect_reports() as reports,
        FakeTensorMode(allow_non_fake_inputs=True) as mode,
        torch.no_grad(),
    ):
        inputs = [mode.from_tensor(torch.randn(shape).to(HALF)) for shape in ((2, 32, 3 * 64), (64, 8))]
        assert rewritten(between_projections)(*inputs).shape == (2, 32, 8)
    (report,) = reports
    assert [site.kernel for site in report.sites] == ([name] if name != "aiter_fa2_hub" else [None])
    assert "clone" not in report.after_code and "copy" not in report.after_code


@every_kernel
def test_the_operators_fakes(name: str) -> None:
    """Shapes, dtypes and strides, forwards and backwards, on fake tensors with symbolic sizes."""
    kernel = KERNELS[name]
    order = (2, 48, 4, 64) if kernel.order == "BSHD" else (2, 4, 48, 64)
    operator = getattr(torch.ops.attnrewrite, name)
    with FakeTensorMode():
        q, k, v = (torch.empty(order, dtype=HALF, requires_grad=kernel.limits.backward) for _ in range(3))
        results = operator(q, k, v, None, *CallParameters(0.1))
        output = results[0] if kernel.limits.backward else results
        assert output.shape == order and output.is_contiguous() and output.dtype is HALF
        if kernel.limits.backward:
            logsumexp, state = results[1:]
            assert logsumexp.dtype is torch.float32 and not state.requires_grad
            output.sum().backward()
            assert all(part.grad is not None and part.grad.shape == order for part in (q, k, v))


@every_kernel
def test_the_operators_schemas(name: str) -> None:
    operator = getattr(torch.ops.attnrewrite, name).default
    assert not operator._schema.is_mutable
    tags = set(operator.tags)
    limits = KERNELS[name].limits
    assert (torch.Tag.nondeterministic_seeded in tags) == limits.dropout
    assert (torch.Tag.cudagraph_unsafe in tags) == (not limits.cuda_graphs)


# The vendor's call.


def operands(kernel: LibraryKernel, keys: int = 48, key_heads: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    shapes = ((2, 48, 4, 64), (2, keys, key_heads, 64), (2, keys, key_heads, 64))
    made = (torch.randn(shape).to(HALF) for shape in shapes)
    q, k, v = (part if kernel.order == "BSHD" else part.transpose(1, 2).contiguous() for part in made)
    return q, k, v


REQUESTS = {
    "plain": CallParameters(0.25),
    "dropout": CallParameters(0.25, dropout=0.1),
    "causal from first": CallParameters(0.25, right=0),
    "causal from last": CallParameters(0.25, right=0, from_last=True),
    "window": CallParameters(0.25, left=7, right=3, from_last=True),
    "softcap": CallParameters(0.25, softcap=30.0),
}


def asked(name: str) -> list[str]:
    """The requests that the kernel may be given."""
    limits = KERNELS[name].limits
    causal = [f"causal from {end}" for end in ("first", "last") if end in limits.alignments]
    causal += ["causal from first"] if "square" in limits.alignments else []
    wanted = [field for field in ("window", "softcap", "dropout") if getattr(limits, field)]
    return ["plain", *causal, *wanted]


EVERY_REQUEST = [(name, request) for name in KERNELS for request in asked(name)]


def first_of(arguments: dict[str, Any], *names: str) -> Any:
    """The argument under whichever of its names the vendor has for it."""
    return next(arguments[name] for name in names if name in arguments)


@pytest.mark.parametrize(("name", "wanted"), EVERY_REQUEST)
def test_the_call_fits_the_published_signature(name: str, wanted: str) -> None:
    kernel, request = KERNELS[name], REQUESTS[wanted]
    q, k, v = operands(kernel)
    call = kernel.forward_call(q, k, v, None, request)
    assert call.target == f"{kernel.vendor.module}:{call.function}"
    for arguments in bound(name, call):
        check(name, arguments, request, (q, k, v))
    if kernel.limits.backward:
        with FakeTensorMode():
            shapes = kernel.saved_like(*(torch.empty(part.shape, dtype=HALF) for part in (q, k, v)))
        saved = Saved(q.clone(), *(torch.zeros(part.shape, dtype=part.dtype) for part in shapes))
        call = kernel.backward_call(q.clone(), q, k, v, None, saved, request)
        for arguments in bound(name, call):
            check(name, arguments, request, (q, k, v))


def check(name: str, arguments: dict[str, Any], request: CallParameters, parts: tuple[Tensor, ...]) -> None:
    """That the vendor is asked for what the request says, and for nothing else."""
    for own, names in zip(parts, (("q", "query"), ("k", "key"), ("v", "value")), strict=True):
        assert torch.equal(first_of(arguments, *names).flatten(), own.flatten())
    if name not in ("sage_3", "sage_blackwell_hub"):
        assert first_of(arguments, "softmax_scale", "sm_scale", "scale", "scale_value") == 0.25
    assert arguments.get("softcap", 0.0) == request.softcap
    if "keep_prob" in arguments:
        assert arguments["keep_prob"] == 1 - request.dropout
    else:
        assert first_of({**arguments, "none": 0.0}, "dropout_p", "p", "none") == request.dropout
    if "tensor_layout" in arguments:
        assert arguments["tensor_layout"] == "NHD"
    if "input_layout" in arguments:
        assert arguments["input_layout"] == "BSND"
        assert arguments["sparse_mode"] == ((3 if request.from_last else 2) if request.is_causal else 0)
        assert (arguments["atten_mask"] is None) == (not request.is_causal)
        return
    if "attn_bias" in arguments:
        bias = arguments["attn_bias"]
        wanted = "LowerTriangularFromBottomRightMask" if request.from_last else "LowerTriangularMask"
        assert bias is None if not request.is_causal else bias.target == f"xformers.ops.fmha:attn_bias.{wanted}"
        return
    assert first_of(arguments, "causal", "is_causal") == request.is_causal
    if request.is_causal:
        return
    pair = arguments.get("window_size")
    left, right = pair or (arguments.get("window_size_left", -1), arguments.get("window_size_right", -1))
    assert [-1 if end is None else end for end in (left, right)] == [request.left, request.right]


@pytest.mark.parametrize("name", sorted(BACKWARD & {"flash", "_flash_3", "flash_4"}))
def test_asks_for_a_deterministic_backward_pass(name: str, request: pytest.FixtureRequest) -> None:
    request.addfinalizer(lambda: torch.use_deterministic_algorithms(False))
    kernel = KERNELS[name]
    q, k, v = operands(kernel)
    saved = Saved(q, torch.zeros(2, 4, 48), torch.zeros(2, dtype=torch.int64))
    for wanted in (False, True):
        torch.use_deterministic_algorithms(wanted)
        call = kernel.backward_call(q, q, k, v, None, saved, CallParameters(0.25))
        assert bound(name, call)[0]["deterministic"] is wanted


def test_the_versions_that_the_table_names_are_those_that_the_calls_were_held_against() -> None:
    for name, kernel in KERNELS.items():
        assert kernel.proved == ", ".join(signature.version for signature in PUBLISHED[name].signatures)


@pytest.mark.parametrize("name", ["sage", "sage_varlen"])
def test_first_sage_gets_a_key_of_its_own(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its smoothing subtracts the mean in place."""
    kernel = KERNELS[name]
    q, k, v = operands(kernel)
    assert bound(name, kernel.forward_call(q, k, v, None, CallParameters(1.0)))[0]["k"].data_ptr() == k.data_ptr()
    monkeypatch.setattr(Package, "version", lambda package: "1.0.6")
    assert bound(name, kernel.forward_call(q, k, v, None, CallParameters(1.0)))[0]["k"].data_ptr() != k.data_ptr()


def test_varlen_binds_to_the_operator_of_this_pytorch() -> None:
    """The real operator on tensors without data."""
    kernel = KERNELS["varlen"]
    q, k, v = (part.to("meta") for part in operands(kernel))
    call = kernel.forward_call(q, k, v, None, REQUESTS["window"])
    output, logsumexp, _ = call.read(torch.ops.aten._flash_attention_forward(*call.args, **call.kwargs))
    assert output.shape == q.shape and logsumexp.shape == kernel.saved_like(q, k, v)[0].shape
    saved = Saved(output, logsumexp, q.new_empty((0,)))
    call = kernel.backward_call(q, q, k, v, None, saved, REQUESTS["window"])
    found = call.read(torch.ops.aten._flash_attention_backward(*call.args, **call.kwargs))
    assert [part.shape for part in found] == [part.shape for part in (q, k, v)]


def test_packing() -> None:
    q, k, v = (torch.randn(2, 3, 1, 4) for _ in range(3))
    keep = torch.tensor([[False, True, True], [True, False, False]])
    packed = Packed.of(q, k, v, keep)
    assert packed.starts_q.tolist() == [0, 3, 6] and packed.starts_k.tolist() == [0, 2, 3]
    assert torch.equal(packed.key[:3], torch.stack([k[0, 1], k[0, 2], k[1, 0]]))
    assert packed.key.shape == (6, 1, 4), "nothing depends on the data but what is in it"
    gradient = packed.key.clone()
    gradient[3:] = torch.nan
    _, dk, _ = packed.unpacked_gradients((packed.query, gradient, packed.value), like=(q, k, v))
    assert torch.equal(dk, k * keep[..., None, None])


# Packages.


LISTED = (
    "import sys; from attnrewrite.kernels.registry import LIBRARY_KERNELS\n"
    "packages = ('flash_attn', 'sageattention', 'xformers', 'kernels', 'torch_xla', 'aiter')\n"
    "print([name for name in packages if name in sys.modules])\n"
    "for kernel in LIBRARY_KERNELS: print(kernel.name, kernel.availability().detail, sep=': ')\n"
)
"""Prints what importing the kernels imported, and what each kernel says of its package."""


def test_a_broken_package_changes_its_own_row_only(tmp_path: Path) -> None:
    package = tmp_path / "flash_attn"
    package.mkdir()
    (package / "__init__.py").write_text("raise OSError('libcudart.so.11.0: cannot open\\nshared object file')\n")
    # The two at once: they share nothing.
    scripts = (LISTED, f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n" + LISTED)
    commands = [[sys.executable, "-c", script] for script in scripts]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for command in commands]
    here, there = (process.communicate()[0].splitlines() for process in running)
    assert here[0] == there[0] == "[]", "importing the kernels imports no package"
    assert len(here) == len(there) == 1 + len(KERNELS)
    changed = [line for line in there if line not in here]
    assert {line.partition(":")[0] for line in changed} == {"flash", "flash_varlen"}
    words = "is installed but cannot be loaded: OSError: libcudart.so.11.0: cannot open shared object file"
    assert all(words in line for line in changed)


def test_hub_kernels_do_not_touch_the_network_to_say_whether_they_are_available(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "kernels"
    package.mkdir()
    (package / "__init__.py").write_text(
        "__version__ = '0.17.2'\ndef get_kernel(*args, **kwargs): raise ConnectionError('no route to host')\n"
    )
    script = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "from attnrewrite.kernels.registry import LIBRARY_KERNELS\n"
        "(kernel,) = (kernel for kernel in LIBRARY_KERNELS if kernel.name == 'flash_hub')\n"
        "print(kernel.availability())\nprint(kernel.prepare())"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    available, prepared = result.splitlines()
    assert "available=True" in available and "is fetched when it is asked for by name" in available
    assert "available=False" in prepared and "ConnectionError: no route to host" in prepared


def test_versions() -> None:
    assert is_older("4.0.0b10", "4.0.0b36") and not is_older("4.0.0", "4.0.0b36")
    assert not is_older("2.8.3.post2", "2.7.0") and is_older("1.0.6", "2.0.0")
    old = Package("torch", "torch", "pip install torch", "999.0")
    assert old.availability().detail.endswith("is too old, 999.0 or later is needed")
    lacking = Package("inspect", "torch", "pip install it", parameters=(("signature", "window_size_left"),))
    assert "inspect.signature has no parameter window_size_left" in lacking.availability().detail
    assert isinstance(KERNELS["flash_hub"].vendor, HubKernel)
