"""``varlen``: PyTorch's FlashAttention for sequences of many lengths.

It is what ``torch.nn.attention.varlen`` calls. The operators beneath are called here, because the Python function's
arguments differ between PyTorch 2.11 and 2.13 and theirs do not.

Source, to which the limits refer: https://github.com/pytorch/pytorch/blob/v2.13.0/torch/nn/attention/varlen.py
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from attnrewrite.kernels.common.library_kernel import RUN_ON, CallParameters, LibraryKernel, Saved, no_state
from attnrewrite.kernels.common.limits import HALF, HeadSizes, Limits
from attnrewrite.kernels.common.packages import Package, VendorCall
from attnrewrite.kernels.common.packing import Packed
from attnrewrite.kernels.common.verdict import Refusal

__all__ = ["VARLEN_KERNELS"]

_PYTHON = "https://github.com/pytorch/pytorch/blob/v2.13.0/torch/nn/attention/varlen.py"
_NATIVE = (
    "https://github.com/pytorch/pytorch/blob/v2.13.0/aten/src/ATen/native/transformers/cuda/flash_attn/flash_api.cpp"
)


@dataclasses.dataclass(eq=False)
class TorchVarlen(LibraryKernel):
    """``aten._flash_attention_forward`` and its backward pass, with cumulative lengths."""

    def forward_call(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, parameters: CallParameters
    ) -> VendorCall:
        packed = Packed.of(query, key, value, mask)
        kwargs = {"scale": parameters.scale, "window_size_left": parameters.left, "window_size_right": parameters.right}
        args = (
            *(packed.query, packed.key, packed.value, packed.starts_q, packed.starts_k),
            *(packed.longest_q, packed.longest_k, 0.0, parameters.is_causal, False),
        )

        def read(result: Any) -> tuple[Tensor, ...]:
            return result[0].reshape(query.shape), result[1], no_state(query)

        return VendorCall(self.vendor, "aten._flash_attention_forward", args, kwargs, read)

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
        packed = Packed.of(query, key, value, mask)
        kwargs = {"scale": parameters.scale, "window_size_left": parameters.left, "window_size_right": parameters.right}
        # The state of a dropout that there is none of.
        state = torch.zeros((2,), dtype=torch.uint64, device=query.device)
        args = (
            *(gradient.flatten(0, 1), packed.query, packed.key, packed.value),
            *(saved.output.flatten(0, 1), saved.logsumexp, packed.starts_q, packed.starts_k),
            *(packed.longest_q, packed.longest_k, 0.0, parameters.is_causal, state, query.new_empty((0,))),
        )

        def read(result: Any) -> tuple[Tensor, ...]:
            return packed.unpacked_gradients(result, like=(query, key, value))

        return VendorCall(self.vendor, "aten._flash_attention_backward", args, kwargs, read)

    def saved_like(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        batch, length, heads, _ = query.shape
        return query.new_empty((heads, batch * length), dtype=torch.float32), no_state(query)


_LIMITS = Limits(
    devices=("cuda",),
    dtypes=HALF,
    heads=HeadSizes(multiple_of=8, largest=256, smallest=8),
    min_capability=(8, 0),
    masks="key padding",
    alignments=("last",),
    window=True,
    grouped=True,
    backward=True,
    deterministic=True,
    minimum_version="2.11.0",
    sources={
        "devices": f"{_NATIVE} mha_varlen_fwd: CHECK_DEVICE",
        "dtypes": f"{_NATIVE} mha_varlen_fwd: only support fp16 and bf16",
        "heads": f"{_NATIVE} mha_varlen_fwd: at most 256, a multiple of 8",
        "value_heads": f"{_NATIVE} mha_varlen_fwd: CHECK_SHAPE of the value",
        "min_capability": f"{_NATIVE} mha_varlen_fwd: only supports Ampere GPUs or newer",
        "masks": "key padding is taken by leaving keys out",
        "alignments": f"{_NATIVE}: as in FlashAttention 2, aligned to the bottom right corner",
        "window": f"{_PYTHON} varlen_attn: (left, right), (-1, 0) is causal",
        "softcap": f"{_PYTHON} varlen_attn: there is no argument for it",
        "dropout": f"{_PYTHON} _varlen_attn: hardcoded to 0.0",
        "grouped": f"{_PYTHON} varlen_attn: enable_gqa",
        "deterministic": "aten/src/ATen/native/transformers/cuda/attention_backward.cu: deterministicAlgorithms()",
        "minimum_version": "the oldest PyTorch that is accepted",
    },
)


def _why_broken(module: Any) -> Refusal:
    return None if torch.backends.cuda.is_flash_attention_available() else "it was built without FlashAttention"


_PACKAGE = Package("torch.ops", "torch", "part of PyTorch, in its builds for CUDA", "2.11.0", broken=_why_broken)

VARLEN_KERNELS: tuple[LibraryKernel, ...] = (
    TorchVarlen(
        "varlen",
        _PACKAGE,
        _LIMITS,
        "part of PyTorch",
        "https://github.com/pytorch/pytorch/blob/v2.13.0/torch/nn/attention/varlen.py",
        proved="2.13.0",
        run_on=RUN_ON,
    ),
)
