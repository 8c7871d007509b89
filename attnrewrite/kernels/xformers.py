"""xFormers' ``memory_efficient_attention``, through the functions that hand out what the backward pass needs.

Source, to which the limits refer: https://github.com/facebookresearch/xformers/blob/v0.0.35/xformers/ops/fmha/
"""

from __future__ import annotations

import dataclasses
import importlib
from typing import Any

import torch
from torch import Tensor

from attnrewrite.ir.site import CanonicalAttention
from attnrewrite.kernels.common.library_kernel import CallParameters, LibraryKernel, Saved, no_state
from attnrewrite.kernels.common.limits import HALF, Asked, Capability, HeadSizes, LimitRule, Limits
from attnrewrite.kernels.common.packages import Package, VendorCall
from attnrewrite.kernels.common.verdict import Refusal

__all__ = ["XFORMERS_KERNELS"]

_FMHA = "https://github.com/facebookresearch/xformers/blob/v0.0.35/xformers/ops/fmha"

_ALIGNED = 8
"""Rows of a bias must begin at multiples of 16 bytes: cutlass.py, ``_check_bias_alignment``."""


@dataclasses.dataclass(eq=False)
class XFormers(LibraryKernel):
    """The package chooses between its own operators by what it is given."""

    def forward_call(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, parameters: CallParameters
    ) -> VendorCall:
        kwargs = {"attn_bias": self._bias(query, key, mask, parameters), "p": 0.0, "scale": parameters.scale}

        def read(result: Any) -> tuple[Tensor, ...]:
            output, logsumexp = result
            # The CUTLASS operator rounds the number of rows up to a multiple of 32.
            return output, logsumexp[..., : query.shape[1]], no_state(query)

        path = "memory_efficient_attention_forward_requires_grad"
        return VendorCall(self.vendor, path, (query, key, value), kwargs, read)

    def backward_call(
        self,
        gradient: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        saved: Saved,
        parameters: CallParameters,
    ) -> VendorCall:
        kwargs = {"attn_bias": self._bias(query, key, mask, parameters), "p": 0.0, "scale": parameters.scale}
        args = (gradient, saved.output, saved.logsumexp, query, key, value)
        return VendorCall(self.vendor, "memory_efficient_attention_backward", args, kwargs, read=tuple)

    def _bias(self, query: Tensor, key: Tensor, mask: Tensor | None, parameters: CallParameters) -> Any:
        if parameters.is_causal:
            name = "LowerTriangularFromBottomRightMask" if parameters.from_last else "LowerTriangularMask"
            return VendorCall(self.vendor, f"attn_bias.{name}")
        if mask is None:
            return None
        batch, queries, heads, _ = query.shape
        keys = key.shape[1]
        width = -(-keys // _ALIGNED) * _ALIGNED
        rows = mask.new_zeros((*mask.shape[:-1], width))
        rows[..., :keys] = mask
        return rows[..., :keys].expand(batch, heads, queries, keys)


def _why_broken(module: Any) -> Refusal:
    """The package imports without its compiled part, and every operator raises then."""
    library: Any = importlib.import_module("xformers._cpp_lib")
    error = getattr(library, "_cpp_library_load_exception", None)
    if error is not None:
        return " ".join(str(error).split())
    return None if library._build_metadata is not None else "its compiled part could not be loaded"


def _only_flash_after_hopper(site: CanonicalAttention, asked: Asked, capability: Capability | None) -> Refusal:
    if capability is None or capability <= (9, 0):
        return None
    if asked.mask != "none" or site.compute_dtype is torch.float32:
        return "takes neither a mask nor float32 on GPUs of a compute capability above 9.0"
    return None


_LIMITS = Limits(
    devices=("cuda",),
    dtypes=(*HALF, torch.float32),
    heads=HeadSizes(multiple_of=8, largest=256, smallest=8),
    min_capability=(8, 0),
    masks="additive",
    alignments=("first", "last"),
    backward=True,
    minimum_version="0.0.35",
    rules=(
        LimitRule(
            "after compute capability 9.0 neither a mask nor float32",
            _only_flash_after_hopper,
            f"{_FMHA}/cutlass.py#L170: CUDA_MAXIMUM_COMPUTE_CAPABILITY",
        ),
    ),
    sources={
        "devices": f"{_FMHA}/cutlass.py: SUPPORTED_DEVICES",
        "dtypes": f"{_FMHA}/cutlass.py: SUPPORTED_DTYPES",
        "heads": f"{_FMHA}/flash.py: SUPPORTED_MAX_K, check_lastdim_alignment_stride1",
        "value_heads": f"{_FMHA}/flash.py: SUPPORTS_DIFFERENT_VALUE_EMBED",
        "min_capability": f"{_FMHA}/flash.py: CUDA_MINIMUM_COMPUTE_CAPABILITY",
        "masks": f"{_FMHA}/__init__.py#L199: attn_bias; {_FMHA}/cutlass.py: its alignment",
        "alignments": f"{_FMHA}/attn_bias.py#L142 (first), #L261 (last)",
        "window": f"{_FMHA}/cutlass.py: infs and NaNs in the backward pass",
        "dropout": f"{_FMHA}/__init__.py#L411: not in the functions that hand out logarithms of sums",
        "grouped": "five dimensions, which are not written here",
        "deterministic": f"{_FMHA}/__init__.py#L199: this operator may be nondeterministic",
        "minimum_version": "the release that was read",
    },
)

_PIP = "pip install 'xformers>=0.0.35', built for this PyTorch and its CUDA"
_PACKAGE = Package("xformers.ops.fmha", "xformers", _PIP, "0.0.35", broken=_why_broken)

XFORMERS_KERNELS: tuple[LibraryKernel, ...] = (
    XFormers("xformers", _PACKAGE, _LIMITS, _PIP, "https://github.com/facebookresearch/xformers", proved="0.0.35"),
)
