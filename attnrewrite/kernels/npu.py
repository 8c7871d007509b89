"""Ascend: ``torch_npu.npu_fusion_attention``, which trains, and ``npu_fused_infer_attention_score``, which does not.

Sources, to which the limits refer:
https://www.hiascend.com/document/detail/zh/Pytorch/730/apiref/torchnpuCustomsapi/docs/context/torch_npu-npu_fusion_attention.md
torch-npu 2.13.0, the operators' schemas
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from attnrewrite.kernels.common.library_kernel import CallParameters, LibraryKernel, Saved
from attnrewrite.kernels.common.limits import HALF, HeadSizes, Limits
from attnrewrite.kernels.common.packages import Package, VendorCall

__all__ = ["NPU_KERNELS"]

_FUSION = (
    "https://www.hiascend.com/document/detail/zh/Pytorch/730/apiref/torchnpuCustomsapi/docs/context"
    "/torch_npu-npu_fusion_attention.md"
)
_INFER = "https://hiascend.com/document/detail/zh/Pytorch/60RC3/apiref/apilist/ptaoplist_000768.html"

_FIRST_ALIGNED, _LAST_ALIGNED = 2, 3
"""Values of ``sparse_mode``: a causal mask from the upper left, or from the lower right."""

_TRIANGLE = 2048
"""Causal masks are told by one compressed mask of this size, whatever the lengths."""


def _mask_arguments(query: Tensor, key: Tensor, mask: Tensor | None, parameters: CallParameters) -> dict[str, Any]:
    """``atten_mask``, which is true where a key is masked, and ``sparse_mode``."""
    if parameters.is_causal:
        square = torch.ones((_TRIANGLE, _TRIANGLE), dtype=torch.bool, device=query.device)
        mode = _LAST_ALIGNED if parameters.from_last else _FIRST_ALIGNED
        return {"atten_mask": square.triu(1), "sparse_mode": mode}
    if mask is None:
        return {"atten_mask": None, "sparse_mode": 0}
    batch = query.shape[0] if mask.shape[1] > 1 else mask.shape[0]
    shape = (batch, mask.shape[1], query.shape[1], key.shape[1])
    return {"atten_mask": mask.logical_not().expand(shape).contiguous(), "sparse_mode": 0}


@dataclasses.dataclass(eq=False)
class NpuFusion(LibraryKernel):
    """``npu_fusion_attention`` and ``npu_fusion_attention_grad``."""

    def forward_call(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, parameters: CallParameters
    ) -> VendorCall:
        kwargs = {
            "scale": parameters.scale,
            "keep_prob": 1.0 - parameters.dropout,
            **_mask_arguments(query, key, mask, parameters),
        }

        def read(result: Any) -> tuple[Tensor, ...]:
            output, highest, total, _, seed, offset, numels = result
            return output, torch.stack([highest, total]), torch.tensor([seed, offset, numels])

        args = (query, key, value, query.shape[2], "BSND")
        return VendorCall(self.vendor, "npu_fusion_attention", args, kwargs, read)

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
        highest, total = saved.logsumexp.unbind(0)
        seed, offset, numels = saved.state.tolist()
        kwargs = {
            "softmax_max": highest,
            "softmax_sum": total,
            "attention_in": saved.output,
            "scale_value": parameters.scale,
            "keep_prob": 1.0 - parameters.dropout,
            "seed": seed,
            "offset": offset,
            "numels": numels,
            **_mask_arguments(query, key, mask, parameters),
        }
        args = (query, key, value, gradient, query.shape[2], "BSND")

        def read(result: Any) -> tuple[Tensor, ...]:
            return tuple(result)[:3]

        return VendorCall(self.vendor, "npu_fusion_attention_grad", args, kwargs, read)

    def saved_like(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        batch, length, heads, _ = query.shape
        rows = query.new_empty((2, batch, heads, length, 8), dtype=torch.float32)
        return rows, torch.empty((3,), dtype=torch.int64)


@dataclasses.dataclass(eq=False)
class NpuInference(LibraryKernel):
    """``npu_fused_infer_attention_score``: without a backward pass, and with a path of its own for one query."""

    def forward_call(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, parameters: CallParameters
    ) -> VendorCall:
        kwargs = {
            "num_heads": query.shape[2],
            "num_key_value_heads": key.shape[2],
            "input_layout": "BSND",
            "scale": parameters.scale,
            **_mask_arguments(query, key, mask, parameters),
        }
        # "Tensors that are not contiguous are not supported."
        operands = tuple(part.contiguous() for part in (query, key, value))

        def read(result: Any) -> tuple[Tensor, ...]:
            return (result[0],)

        return VendorCall(self.vendor, "npu_fused_infer_attention_score", operands, kwargs, read)


_LIMITS = Limits(
    devices=("npu",),
    dtypes=HALF,
    heads=HeadSizes(multiple_of=16, largest=512, smallest=16),
    masks="boolean",
    alignments=("first", "last"),
    dropout=True,
    grouped=True,
    backward=True,
    cuda_graphs=False,
    minimum_version="2.11.0",
    sources={
        "devices": _FUSION,
        "dtypes": f"{_FUSION} (float32 is taken on some devices only)",
        "heads": f"{_FUSION}: the constraints of D; the narrowest of the releases",
        "value_heads": f"{_FUSION}: in some releases only",
        "masks": f"{_FUSION}: atten_mask, true where masked; pse is added before or after the scale, by its type",
        "alignments": f"{_FUSION}: sparse_mode 2 (leftUpCausal) and 3 (rightDownCausal)",
        "window": f"{_FUSION}: sparse_mode 4; statements of where it counts from differ for two lengths",
        "softcap": f"{_FUSION}: there is no argument for it",
        "dropout": f"{_FUSION}: keep_prob",
        "grouped": f"{_FUSION}: N of the query a multiple of that of the key",
        "deterministic": "no statement",
        "cuda_graphs": "the seed of the dropout is handed out as a number",
        "minimum_version": "the release for the oldest PyTorch that is accepted",
    },
)
_INFERENCE = dataclasses.replace(
    _LIMITS,
    dropout=False,
    backward=False,
    sources={
        **{name: text.replace(_FUSION, _INFER) for name, text in _LIMITS.sources.items()},
        "dropout": f"{_INFER}: there is no argument for it",
        "backward": f"{_INFER}: for inference",
        "minimum_version": "its argument scale_value has become scale since 6.0.RC3; calls of today's say scale",
    },
)

_PIP = "pip install torch-npu (the version of PyTorch), and CANN"
_PACKAGE = Package("torch_npu", "torch-npu", _PIP, "2.11.0")

NPU_KERNELS: tuple[LibraryKernel, ...] = (
    NpuFusion("_native_npu", _PACKAGE, _LIMITS, _PIP, "https://gitcode.com/ascend/op-plugin", proved="2.13.0"),
    NpuInference(
        "_native_npu_inference",
        _PACKAGE,
        _INFERENCE,
        _PIP,
        "https://gitcode.com/ascend/op-plugin",
        proved="torchair's documentation",
    ),
)
