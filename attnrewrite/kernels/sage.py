"""SageAttention 1, 2 and 3: products in eight or four bits. Used by name or within a tolerance.

Sources, to which the limits refer:
https://pypi.org/project/sageattention/1.0.6/ sageattention/core.py (1)
https://github.com/thu-ml/SageAttention/blob/0116592f/sageattention/core.py (2)
https://github.com/thu-ml/SageAttention/blob/27b740fc/sageattention3_blackwell/sageattn3/api.py (3)
"""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import Tensor

from attnrewrite.ir.axes import size_of
from attnrewrite.ir.nodes import same
from attnrewrite.ir.site import CanonicalAttention
from attnrewrite.kernels.common.library_kernel import RUN_ON, CallParameters, LibraryKernel
from attnrewrite.kernels.common.limits import HALF, Asked, Capability, HeadSizes, LimitRule, Limits
from attnrewrite.kernels.common.packages import HubKernel, Package, VendorCall, is_older
from attnrewrite.kernels.common.packing import Packed
from attnrewrite.kernels.common.verdict import Refusal

__all__ = ["SAGE_KERNELS"]

_SAGE1 = "https://pypi.org/project/sageattention/1.0.6/ sageattention/core.py"
_SAGE2 = "https://github.com/thu-ml/SageAttention/blob/0116592f6eace985216ac3e97b40ecc200aaf101/sageattention/core.py"
_SAGE2_TRITON = (
    "https://github.com/thu-ml/SageAttention/blob/303669a28f90d73f0325a5db4dc3c7e3fe310c08"
    "/sageattention/triton/attn_qk_int8_per_block.py"
)
_SAGE3 = (
    "https://github.com/thu-ml/SageAttention/blob/27b740fc52c1a05813786ea44e94ebf27eef73bf"
    "/sageattention3_blackwell/sageattn3/api.py"
)
_SAGE3_SETUP = (
    "https://github.com/thu-ml/SageAttention/blob/117f2f3b0485208ba5403e9f98b0ceadfcd92527"
    "/sageattention3_blackwell/setup.py"
)
_DISPATCH = "https://github.com/huggingface/diffusers/blob/main/src/diffusers/models/attention_dispatch.py"

_SECOND = "2.0.0"
"""The first release of the second generation."""


@dataclasses.dataclass(eq=False)
class Sage(LibraryKernel):
    """``sageattn`` and the functions that it chooses from, which take the same arguments.

    Attributes:
        function: the vendor's.
        older: the limits of version 1, where the function is in it.
    """

    function: str = "sageattn"
    older: Limits | None = None

    def limits_now(self) -> Limits:
        return self.older if self.older is not None and self._is_first() else self.limits

    def _is_first(self) -> bool:
        version = self.vendor.version() if isinstance(self.vendor, Package) else ""
        return bool(version) and is_older(version, _SECOND)

    def forward_call(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, parameters: CallParameters
    ) -> VendorCall:
        if self._is_first():
            # Smoothing subtracts the mean from the key in place: `k -= km` in core.py of 1.0.6.
            key = key.clone()
        kwargs = {"tensor_layout": "NHD", "is_causal": parameters.is_causal, "sm_scale": parameters.scale}
        return VendorCall(self.vendor, self.function, (query, key, value), kwargs)


@dataclasses.dataclass(eq=False)
class SageVarlen(Sage):
    """``sageattn_varlen``, which takes key padding by leaving the keys out."""

    def forward_call(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, parameters: CallParameters
    ) -> VendorCall:
        packed = Packed.of(query, key, value, mask)
        # The packed key is a view of the site's where nothing was left out, and smoothing subtracts in place.
        packed_key = packed.key.clone() if self._is_first() and mask is None else packed.key
        kwargs = {
            "cu_seqlens_q": packed.starts_q,
            "cu_seqlens_k": packed.starts_k,
            "max_seqlen_q": packed.longest_q,
            "max_seqlen_k": packed.longest_k,
            "is_causal": parameters.is_causal,
            "sm_scale": parameters.scale,
        }

        def read(result: Any) -> tuple[Tensor, ...]:
            return (result.reshape(query.shape),)

        return VendorCall(self.vendor, self.function, (packed.query, packed_key, packed.value), kwargs, read)


@dataclasses.dataclass(eq=False)
class Sage3(LibraryKernel):
    """``sageattn3_blackwell``: scores and weights in four bits."""

    def forward_call(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, parameters: CallParameters
    ) -> VendorCall:
        # It subtracts the mean from the key in place: `k -= k.mean(...)` in `preprocess_qkv`. Unknown keywords are
        # swallowed, so that none is passed for what it has not.
        return VendorCall(
            self.vendor, "sageattn3_blackwell", (query, key.clone(), value), {"is_causal": parameters.is_causal}
        )


# Limits.

_FIRST = Limits(
    devices=("cuda",),
    dtypes=HALF,
    heads=HeadSizes(only=(64, 96, 128)),
    min_capability=(8, 0),
    alignments=("square",),
    grouped=True,
    key_multiple=64,
    minimum_version="1.0.6",
    sources={
        "devices": f"{_SAGE1}:76",
        "dtypes": f"{_SAGE1}:77 (float32 is taken, and its values rounded to float16)",
        "heads": f"{_SAGE1}:82",
        "value_heads": f"{_SAGE1}: one head size",
        "min_capability": "https://github.com/thu-ml/SageAttention#base-environment: Triton, Ampere or later",
        "masks": f"{_SAGE1}:17: there is no argument for one",
        "alignments": f"{_SAGE1}:51: only where qo_len == kv_len",
        "grouped": f"{_SAGE1}:70",
        "key_multiple": "https://pypi.org/project/sageattention/1.0.6/ attn_qk_int8_per_block.py:14-32: scores of keys "
        "beyond the last are not masked; 28% error at 77 keys, measured on an H100",
        "backward": f"{_SAGE1}: none",
    },
)
_FIRST_VARLEN = dataclasses.replace(
    _FIRST,
    heads=HeadSizes(only=(64, 128)),
    cuda_graphs=False,
    sources={
        **_FIRST.sources,
        "heads": f"{_SAGE1}:186",
        "key_multiple": "https://pypi.org/project/sageattention/1.0.6/ attn_qk_int8_block_varlen.py: as there",
        "cuda_graphs": "https://pypi.org/project/sageattention/1.0.6/ quant_per_block_varlen.py:62",
    },
)


def _sm86_is_triton(site: CanonicalAttention, asked: Asked, capability: Capability | None) -> Refusal:
    if capability == (8, 6) and not same(size_of(site.key_axes) % 64, 0):
        return "gives right results on this GPU only if the number of keys is known to be a multiple of 64"
    return None


_SECOND_LIMITS = Limits(
    devices=("cuda",),
    dtypes=HALF,
    heads=HeadSizes(largest=128),
    capabilities=((8, 0), (8, 6), (8, 9), (9, 0), (12, 0)),
    alignments=("square",),
    grouped=True,
    minimum_version="2.1.1",
    rules=(
        LimitRule(
            "on compute capability 8.6, whose kernel is the Triton one: the number of keys must be a multiple of 64",
            _sm86_is_triton,
            f"{_SAGE2} sageattn, {_SAGE2_TRITON}#L24-L35",
        ),
    ),
    sources={
        "devices": f"{_SAGE2} sageattn: all tensors on a cuda device",
        "dtypes": f"{_SAGE2} sageattn: float16 or bfloat16",
        "heads": f"{_SAGE2}: up to 128, padded to 64 or 128",
        "value_heads": f"{_SAGE2}: one head size",
        "capabilities": f"{_SAGE2} sageattn: the architectures that it chooses a kernel for",
        "masks": f"{_SAGE2} sageattn: there is no argument for one, and unknown ones are swallowed",
        "alignments": f"{_SAGE2} sageattn: only where qo_len == kv_len",
        "grouped": f"{_SAGE2} sageattn: num_qo_heads must be divisible by num_kv_heads",
        "backward": f"{_SAGE2}: none",
        "minimum_version": f"{_DISPATCH} _REQUIRED_SAGE_VERSION",
    },
)
_SECOND_VARLEN = dataclasses.replace(
    _SECOND_LIMITS,
    capabilities=(),
    min_capability=(8, 0),
    masks="key padding",
    cuda_graphs=False,
    rules=(),
    sources={
        **_SECOND_LIMITS.sources,
        "masks": "key padding is taken by leaving keys out",
        "min_capability": "triton on Ampere or later: https://github.com/thu-ml/SageAttention#base-environment",
        "cuda_graphs": "sageattention/triton/quant_per_block_varlen.py: sizes are read from the device",
    },
)
_FP16_TRITON = dataclasses.replace(
    _SECOND_LIMITS,
    capabilities=(),
    min_capability=(8, 0),
    max_capability=(9, 0),
    key_multiple=64,
    rules=(),
    sources={
        **_SECOND_LIMITS.sources,
        "min_capability": f"{_DISPATCH} _check_device_cuda_atleast_smXY(8, 0)",
        "max_capability": f"{_SAGE2} sageattn: the Triton kernel is not usable on sm120",
        "key_multiple": f"{_SAGE2_TRITON}#L24-L35: scores of keys beyond the last are not masked",
    },
)
_FP16_CUDA = dataclasses.replace(
    _SECOND_LIMITS,
    capabilities=(),
    min_capability=(8, 0),
    max_capability=(8, 9),
    rules=(),
    sources={
        **_SECOND_LIMITS.sources,
        "min_capability": f"{_SAGE2} sageattn_qk_int8_pv_fp16_cuda: compute capability 8.0 or higher",
        "max_capability": f"{_SAGE2} sageattn: not chosen on later ones",
    },
)
_FP8_CUDA = dataclasses.replace(
    _SECOND_LIMITS,
    capabilities=((8, 9), (12, 0)),
    rules=(),
    sources={**_SECOND_LIMITS.sources, "capabilities": f"{_SAGE2} sageattn: chosen on sm89 and sm120"},
)
_FP8_SM90 = dataclasses.replace(
    _SECOND_LIMITS,
    capabilities=((9, 0),),
    rules=(),
    sources={**_SECOND_LIMITS.sources, "capabilities": f"{_SAGE2} sageattn_qk_int8_pv_fp8_cuda_sm90"},
)
_THIRD = Limits(
    devices=("cuda",),
    dtypes=HALF,
    heads=HeadSizes(only=(64, 128)),
    capabilities=((10, 0), (12, 0)),
    alignments=("square",),
    any_scale=False,
    sources={
        "devices": _SAGE3,
        "dtypes": f"{_SAGE3}#L136 and {_DISPATCH} _check_qkv_dtype_bf16_or_fp16",
        "heads": f"{_DISPATCH} _check_head_dim_64_or_128: others fail, or are computed in full precision unasked",
        "value_heads": f"{_SAGE3}: one head size",
        "capabilities": f"{_SAGE3_SETUP}: Unsupported GPU otherwise",
        "masks": f"{_SAGE3}#L129: the argument attn_mask is not used",
        "alignments": "no statement for lengths that differ",
        "any_scale": f"{_SAGE3}#L125: made from the head size",
        "grouped": "no statement",
        "backward": f"{_SAGE3}: none",
    },
)

_THIRD_HUB = dataclasses.replace(
    _THIRD,
    capabilities=((12, 0),),
    sources={**_THIRD.sources, "capabilities": f"{_DISPATCH} _check_head_dim_64_or_128: the SM120 kernel"},
)

# Kernels.

_PIP = "pip install sageattention==1.0.6, or 2 built from https://github.com/thu-ml/SageAttention"
_BUILD = "built from https://github.com/thu-ml/SageAttention"
_ANY = Package("sageattention", "sageattention", _PIP, "1.0.6")
_TWO = Package("sageattention", "sageattention", _BUILD, "2.1.1")
_THREE = Package("sageattn3", "sageattn3", f"{_BUILD}/tree/main/sageattention3_blackwell")
_HUB = HubKernel("SageAttention/sage-attention", 3)
_HUB_BLACKWELL = HubKernel("SageAttention/sage-blackwell", 1)
_FETCHED = "pip install 'kernels>=0.12'; fetched from the Hugging Face Hub when asked for by name"
_REPOSITORY = "https://github.com/thu-ml/SageAttention"
_RUN_1 = f"{RUN_ON}: version 1.0.6"
_LOW: dict[str, Any] = {"lower_precision": True}


def _second(name: str, limits: Limits) -> Sage:
    return Sage(
        f"_sage_{name}",
        _TWO,
        limits,
        _BUILD,
        _REPOSITORY,
        function=f"sageattn_{name}",
        proved="2.2.0 (0116592)",
        **_LOW,
    )


SAGE_KERNELS: tuple[LibraryKernel, ...] = (
    Sage(
        "sage",
        _ANY,
        _SECOND_LIMITS,
        _PIP,
        _REPOSITORY,
        older=_FIRST,
        proved="1.0.6, 2.2.0 (0116592)",
        run_on=_RUN_1,
        **_LOW,
    ),
    SageVarlen(
        "sage_varlen",
        _ANY,
        _SECOND_VARLEN,
        _PIP,
        _REPOSITORY,
        function="sageattn_varlen",
        older=_FIRST_VARLEN,
        proved="1.0.6, 2.2.0 (0116592)",
        run_on=_RUN_1,
        **_LOW,
    ),
    _second("qk_int8_pv_fp8_cuda", _FP8_CUDA),
    _second("qk_int8_pv_fp8_cuda_sm90", _FP8_SM90),
    _second("qk_int8_pv_fp16_cuda", _FP16_CUDA),
    _second("qk_int8_pv_fp16_triton", _FP16_TRITON),
    Sage(
        "sage_hub",
        _HUB,
        dataclasses.replace(_SECOND_LIMITS, minimum_version=""),
        _FETCHED,
        f"https://huggingface.co/{_HUB.module}",
        proved="2.2.0 (0116592)",
        **_LOW,
    ),
    Sage3("sage_3", _THREE, _THIRD, _THREE.how_to_get, _REPOSITORY, order="BHSD", proved="27b740f", **_LOW),
    Sage3(
        "sage_blackwell_hub",
        _HUB_BLACKWELL,
        _THIRD_HUB,
        _FETCHED,
        f"https://huggingface.co/{_HUB_BLACKWELL.module}",
        order="BHSD",
        proved="27b740f",
        **_LOW,
    ),
)
