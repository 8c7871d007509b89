"""AITER, AMD's kernels: installed, or the forward pass from the Hugging Face Hub.

Sources, to which the limits refer:
https://github.com/ROCm/aiter/blob/e11da613/aiter/ops/mha.py
https://huggingface.co/kernels-community/aiter-flash-attn-ck
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from attnrewrite.kernels.common.library_kernel import CallParameters, LibraryKernel
from attnrewrite.kernels.common.limits import HALF, HeadSizes, Limits
from attnrewrite.kernels.common.packages import HubKernel, Package, VendorCall

__all__ = ["AITER_KERNELS"]

_MHA = "https://github.com/ROCm/aiter/blob/e11da613978cb73c8acf5c08ce722275a275a040/aiter/ops/mha.py flash_attn_func"
_CARD = "https://huggingface.co/kernels-community/aiter-flash-attn-ck/blob/main/README.md"
_DISPATCH = "https://github.com/huggingface/diffusers/blob/main/src/diffusers/models/attention_dispatch.py"


@dataclasses.dataclass(eq=False)
class Aiter(LibraryKernel):
    """Attributes:
    windows: the build takes a window.
    """

    windows: bool = True

    def forward_call(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, parameters: CallParameters
    ) -> VendorCall:
        kwargs: dict[str, Any] = {"softmax_scale": parameters.scale, "causal": parameters.is_causal}
        if self.windows:
            kwargs["window_size"] = (-1, -1) if parameters.is_causal else (parameters.left, parameters.right)

        def read(result: Any) -> tuple[Tensor, ...]:
            # Builds differ in whether one result comes in a tuple.
            return (result[0] if isinstance(result, (tuple, list)) else result,)

        return VendorCall(self.vendor, "flash_attn_func", (query, key, value), kwargs, read)


_LIMITS = Limits(
    devices=("rocm",),
    dtypes=HALF,
    heads=HeadSizes(multiple_of=8, largest=256, smallest=8),
    alignments=("last",),
    window=True,
    grouped=True,
    sources={
        "devices": "https://github.com/ROCm/aiter#readme",
        "dtypes": f"{_MHA}: one module for fp16, one for bf16",
        "heads": f"{_MHA}: a multiple of 8 without padding",
        "value_heads": "no statement of which pairs are built",
        "masks": "a bias is taken, whose shapes are not stated",
        "alignments": f"{_MHA}: aligned to the bottom right corner",
        "window": f"{_MHA}",
        "softcap": f"{_MHA}: there is no argument for it",
        "dropout": "the state that the backward pass needs is not handed out",
        "grouped": f"{_MHA}",
        "backward": "its function has changed its arguments from release to release",
    },
)
_HUB_LIMITS = dataclasses.replace(
    _LIMITS,
    dtypes=(torch.bfloat16,),
    heads=HeadSizes(only=(64, 128)),
    window=False,
    sources={
        **_LIMITS.sources,
        "devices": f"{_CARD}: gfx942, gfx950",
        "dtypes": f"{_CARD} and {_DISPATCH} _check_qkv_dtype_bf16",
        "heads": _CARD,
        "window": f"{_DISPATCH} _aiter_flash_attention: no more than scale and causal is known of the build",
        "backward": f"{_CARD}: forward only",
    },
)

_PIP = "built from https://github.com/ROCm/aiter"
_PACKAGE = Package("aiter", "amd-aiter", _PIP)
_HUB = HubKernel("kernels-community/aiter-flash-attn-ck", 1)

AITER_KERNELS: tuple[LibraryKernel, ...] = (
    # Not run on such hardware yet: by name only.
    Aiter("aiter", _PACKAGE, _LIMITS, _PIP, "https://github.com/ROCm/aiter", proved="e11da61"),
    Aiter(
        "aiter_fa2_hub",
        _HUB,
        _HUB_LIMITS,
        "pip install 'kernels>=0.12'; fetched from the Hugging Face Hub when asked for by name",
        f"https://huggingface.co/{_HUB.module}",
        proved="e11da61",
        windows=False,
    ),
)
