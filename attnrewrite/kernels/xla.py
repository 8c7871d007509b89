"""``torch_xla.experimental.custom_kernel.flash_attention``: FlashAttention in Pallas, for TPUs.

Source, to which the limits refer:
https://github.com/pytorch/xla/blob/00a784387b723b32f2a1c646eef6d772c84603ae/torch_xla/experimental/custom_kernel.py
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from attnrewrite.ir.axes import size_of
from attnrewrite.ir.site import CanonicalAttention
from attnrewrite.kernels.common.library_kernel import CallParameters, LibraryKernel
from attnrewrite.kernels.common.limits import Asked, Capability, HeadSizes, LimitRule, Limits
from attnrewrite.kernels.common.packages import Package, VendorCall
from attnrewrite.kernels.common.verdict import Refusal

__all__ = ["XLA_KERNELS"]

_KERNEL = (
    "https://github.com/pytorch/xla/blob/00a784387b723b32f2a1c646eef6d772c84603ae"
    "/torch_xla/experimental/custom_kernel.py"
)
_PALLAS = "https://github.com/jax-ml/jax/blob/main/jax/experimental/pallas/ops/tpu/flash_attention.py"

_BLOCK = 512
"""Keys are taken in blocks of up to this many: ``DEFAULT_BLOCK_SIZES``."""


@dataclasses.dataclass(eq=False)
class XlaFlash(LibraryKernel):
    """The forward pass; its scale is 1 unless it is given one."""

    def forward_call(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, parameters: CallParameters
    ) -> VendorCall:
        kwargs = {"causal": parameters.is_causal, "sm_scale": parameters.scale}
        return VendorCall(self.vendor, "flash_attention", (query, key, value), kwargs)


def _no_ragged_block(site: CanonicalAttention, asked: Asked, capability: Capability | None) -> Refusal:
    keys = size_of(site.key_axes)
    if not isinstance(keys, int) or (keys > _BLOCK and keys % _BLOCK):
        return f"pads more than {_BLOCK} keys to a multiple of that, with a mask of the query's length: {keys} keys"
    return None


_LIMITS = Limits(
    devices=("xla",),
    dtypes=(torch.bfloat16, torch.float32),
    heads=HeadSizes(only=(*range(8, 128, 8), 128, 256)),
    alignments=("first",),
    key_multiple=128,
    symbolic=False,
    cuda_graphs=False,
    minimum_version="2.9.0",
    rules=(
        LimitRule(
            f"more than {_BLOCK} keys: a multiple of {_BLOCK}", _no_ragged_block, f"{_KERNEL} _pad_to_block_size"
        ),
    ),
    sources={
        "devices": _KERNEL,
        "dtypes": f"{_KERNEL} convert_torch_dtype_to_jax; TPUs multiply no float16",
        "heads": f"{_PALLAS}: less than 128, or a multiple of it",
        "value_heads": f"{_KERNEL} fa_custom_forward: the output has the query's shape",
        "masks": f"{_KERNEL} flash_attention: ab takes one, in full size",
        "alignments": f"{_PALLAS}: col_ids <= row_ids, counted from 0",
        "softcap": f"{_KERNEL} flash_attention: there is no argument for it",
        "dropout": f"{_KERNEL} flash_attention: there is no argument for it",
        "grouped": f"{_KERNEL} flash_attention: [batch_size, num_heads, ...] of all three",
        "key_multiple": f"{_PALLAS}: block_k should be a multiple of MIN_BLOCK_SIZE",
        "backward": f"{_KERNEL} FlashAttention: in an autograd.Function only",
        "symbolic": "a payload is compiled for each shape",
        "minimum_version": "the last release",
    },
)

_PIP = "pip install 'torch-xla[tpu,pallas]>=2.9'"
_PACKAGE = Package("torch_xla.experimental.custom_kernel", "torch-xla", _PIP, "2.9.0")

XLA_KERNELS: tuple[LibraryKernel, ...] = (
    XlaFlash(
        "_native_xla",
        _PACKAGE,
        _LIMITS,
        _PIP,
        "https://github.com/pytorch/xla",
        proved="00a7843",
        order="BHSD",
    ),
)
