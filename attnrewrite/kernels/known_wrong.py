"""Kernels that are known to be wrong: where, since when, who says so, and how they are kept out.

An entry is of a kernel that its other limits would let serve. Either its call is made so that the defect cannot happen
(``avoided``), or the sites that may meet it are refused (``meets``), or both. ``attnrewrite doctor`` lists the entries.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch.fx.experimental.symbolic_shapes import statically_known_true

from attnrewrite.ir.axes import size_of
from attnrewrite.ir.site import CanonicalAttention
from attnrewrite.kernels.common.limits import HALF, Capability, platform_of
from attnrewrite.kernels.common.verdict import Refusal

__all__ = ["KNOWN_WRONG", "KnownWrong", "known_to_be_wrong"]

_FIRST_CAPABILITY = (9, 0)


@dataclass(frozen=True)
class KnownWrong:
    """A defect of one kernel.

    Attributes:
        kernel: its name.
        what: what is wrong, and where, as the report says it.
        source: the page or the code that states it.
        seen: the hardware and versions on which it was seen here; empty if it was reported only.
        meets: whether a site may meet it, as far as that is refused; the second argument is the GPU's compute
            capability, None if it is unknown. None: no site is refused.
        refusal: the sentence that refuses such a site; default: ``what``.
        avoided: how the call is made so that it cannot happen; empty if it is not.
        cudnn: the versions of cuDNN that have it, as ``torch.backends.cudnn.version()`` counts: from the first, up to
            and without the second; 0 for no bound.
    """

    kernel: str
    what: str
    source: str
    seen: str = ""
    meets: Callable[[CanonicalAttention, Capability | None], bool] | None = None
    refusal: str = ""
    avoided: str = ""
    cudnn: tuple[int, int] = (0, 0)

    def is_here(self) -> bool:
        """Whether the installed versions have it; true if they are not known."""
        version = torch.backends.cudnn.version()  # type: ignore[no-untyped-call]
        first, fixed = self.cudnn
        return version is None or (version >= first and (not fixed or version < fixed))

    @property
    def kept_out(self) -> str:
        """How it is kept out, in words."""
        return self.avoided or "sites that may meet it are refused"


def known_to_be_wrong(kernel: str, site: CanonicalAttention, capability: Capability | None) -> Refusal:
    """Why the kernel would be wrong at the site, or might be; None if nothing of the kind is known."""
    for entry in _entries_of(kernel):
        if entry.meets is not None and entry.is_here() and entry.meets(site, capability):
            return entry.refusal or entry.what
    return None


def _entries_of(kernel: str) -> Iterator[KnownWrong]:
    return (entry for entry in KNOWN_WRONG if entry.kernel == kernel)


def _selects_cudnn(site: CanonicalAttention, capability: Capability | None) -> bool:
    """Training in half precision on GPUs where PyTorch prefers cuDNN.

    A call in the source whose rows may lose all keys stays PyTorch's: what such a row gets depends on its selector.
    """
    if not site.differentiable or platform_of(site.device) != "cuda" or site.compute_dtype not in HALF:
        return False
    if site.fused and site.scores.masked_rows.may_occur:
        return False
    enabled = bool(torch.backends.cuda.cudnn_sdp_enabled())  # type: ignore[no-untyped-call]
    return enabled and (capability is None or capability >= _FIRST_CAPABILITY)


def _half_tile_with_dropout(site: CanonicalAttention, capability: Capability | None) -> bool:
    """Keys cannot be padded where weights are dropped: which ones depends on the number of keys."""
    keys = size_of(site.key_axes)
    if not site.differentiable or not site.dropout or site.scores.is_causal:
        return False
    if isinstance(keys, int):
        return keys % 128 == 64
    return not statically_known_true(keys % 128 != 64)


def _one_query(site: CanonicalAttention, capability: Capability | None) -> bool:
    return site.differentiable and not statically_known_true(size_of(site.query_axes) > 1)


_PLANS = "https://github.com/pytorch/pytorch/blob/v2.13.0/aten/src/ATen/native/cudnn/MHA.cpp MHAParams"
_TWO_LAYOUTS = (
    "gradients in half precision are off by 100% and more where the gradient of the output comes in two layouts in "
    "one process: a plan of cuDNN is kept by the layouts of query, key, value and mask, and not by that of the gradient"
)
_SEEN = "torch 2.11, cuDNN 9.19, H100 and H200"

KNOWN_WRONG: tuple[KnownWrong, ...] = (
    KnownWrong(
        kernel="flex",
        what="on a CPU with vectors of fewer than 16 numbers (AVX2, NEON), with fewer than 24 features and a number of "
        "keys that is not a multiple of 16, whatever lies in memory behind the keys becomes the first rows' maximum, "
        "and may make them NaN: the product of queries and keys takes 16 keys where fewer are left",
        source="https://github.com/pytorch/pytorch/blob/v2.13.0/torch/_inductor/codegen/cpp_micro_gemm.py "
        "CppMicroGemmFP32Vec.TEMPLATE_KERNEL, the first implementation of its kernel for the last columns",
        seen="torch 2.13, x86 CPU with AVX2",
        avoided="query and key get features of zeros, up to 24",
    ),
    KnownWrong(
        kernel="flex",
        what="on a CPU, in half precision, the result is off by several times its size where the function of the "
        "scores is a clamp",
        source="https://github.com/pytorch/pytorch/blob/v2.13.0/torch/_inductor/kernel/flex/flex_cpu.py: compiled by "
        "Inductor it differs from flex_attention itself; tests/kernels/test_known_wrong.py shows it",
        seen="torch 2.13, x86 CPU with AVX-512",
        avoided="the kernel is called in float32, and its result is rounded",
    ),
    KnownWrong(
        kernel="flex",
        what="on a GPU, fewer than 128 queries that are computed in the graph from another memory order than (batch, "
        "heads, length, features) are read at wrong places: their strides are asked for before their layout is decided",
        source="https://github.com/pytorch/pytorch/blob/v2.13.0/torch/_inductor/kernel/flex/flex_decoding.py "
        "create_flex_decoding_kernel, realize_input and as_strided",
        seen="torch 2.11, H200",
        avoided="the query is computed into memory first (attnrewrite::realized); in training, and where the graph "
        "does not go on to Inductor, the kernel for long queries is asked for",
    ),
    KnownWrong(
        kernel="native",
        what="on a CPU, without a mask, rows whose query is NaN or infinite are 0 in place of NaN where there are "
        "fewer keys than the kernel takes at once (16 of float32): the maximum of what is left over skips NaN",
        source="https://github.com/pytorch/pytorch/blob/v2.13.0/aten/src/ATen/native/cpu/FlashAttentionKernel.cpp "
        "_mul_reduce_max_fusion_kernel",
        seen="torch 2.13, x86 CPU",
        avoided="NaN of the query is added to the row, unless there are known to be enough keys",
    ),
    KnownWrong(
        kernel="native",
        what="on a CPU in half precision, rows whose scores are infinite are finite in place of NaN: its fast "
        "exponential makes numbers of NaN",
        source="https://github.com/pytorch/pytorch/blob/v2.13.0/aten/src/ATen/native/cpu/FlashAttentionKernel.cpp "
        "_exp_reduce_sum_fusion_kernel",
        seen="torch 2.13, x86 CPU",
        avoided="NaN is added where the query or a key is not finite",
    ),
    KnownWrong(
        kernel="native",
        what=f"where PyTorch selects cuDNN, {_TWO_LAYOUTS}",
        source=_PLANS,
        seen=_SEEN,
        meets=_selects_cudnn,
        avoided="other kernels serve such sites, except calls in the source whose mask may take every key from a row",
        refusal="PyTorch may select cuDNN, whose backward pass gives wrong gradients where gradients come in two "
        "layouts in one process (torch.backends.cuda.enable_cudnn_sdp(False) rules it out)",
    ),
    KnownWrong(
        kernel="_native_cudnn",
        what=_TWO_LAYOUTS,
        source=_PLANS,
        seen=_SEEN,
        avoided="the gradient is brought to one layout, and no plan is shared with other calls",
    ),
    KnownWrong(
        kernel="_native_cudnn",
        what="the query's gradient is NaN where the number of keys is 64 more than a multiple of 128, the mask is not "
        "causal, and the logarithm of the sum of a row's exponentials is below -88.7",
        source="https://github.com/pytorch/pytorch/issues/196678 (there with masks only)",
        seen="torch 2.11, cuDNN 9.19, H200, with a mask and without",
        meets=_half_tile_with_dropout,
        refusal="its backward pass gives NaN for some numbers of keys, and with dropout they cannot be padded",
        avoided="such keys are padded by 64 more in the backward pass, which nothing attends; with dropout the site is "
        "refused",
    ),
    KnownWrong(
        kernel="_native_cudnn",
        what="the gradients of key and value are NaN where there is one query",
        source="https://github.com/NVIDIA/cudnn-frontend/issues/1072",
        meets=_one_query,
        refusal="the backward pass of this version of cuDNN gives NaN where there is one query",
        cudnn=(92600, 0),
    ),
)
"""Every defect that is known, in no order."""
