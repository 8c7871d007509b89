"""What PyTorch's own kernels take, each limit with its source.

What a back end takes is asked of PyTorch's own check as well, which knows the build and the GPU: these limits are never
wider than that check is on a GPU that they name, and a site beyond them is refused before PyTorch is asked.

Sources are functions where they are C++ files of which no header is installed: lines move from one version to the next.
"""

from __future__ import annotations

import dataclasses

import torch

from attnrewrite.ir.axes import Operand, size_of
from attnrewrite.ir.site import CanonicalAttention
from attnrewrite.kernels.common.keep_mask import mask_kind
from attnrewrite.kernels.common.limits import HALF, Asked, Capability, HeadSizes, LimitRule, Limits
from attnrewrite.kernels.common.verdict import Refusal

__all__ = [
    "CUDNN",
    "EFFICIENT",
    "FLASH",
    "FLEX",
    "FLEX_BLOCKS",
    "FLEX_DECODING_BELOW",
    "FLEX_FLASH",
    "FLEX_SMALLEST_HEAD",
    "MATH",
    "NATIVE",
    "PADDED_TO",
]

PADDED_TO = 8
"""Head sizes are padded to a multiple of this, as PyTorch's selector does."""

FLEX_SMALLEST_HEAD = 16
"""Triton multiplies matrices of 16 columns and more."""

FLEX_DECODING_BELOW = 128
"""Inductor takes FlexAttention's kernel for decoding for shorter queries (``_use_flex_decoding``)."""

_TORCH = "https://github.com/pytorch/pytorch/blob/v2.13.0"
_DISPATCH = f"{_TORCH}/aten/src/ATen/native/transformers/attention.cpp"
_CUDA = f"{_TORCH}/aten/src/ATen/native/transformers/cuda/attention.cu"
_CUDA_BACKWARD = f"{_TORCH}/aten/src/ATen/native/transformers/cuda/attention_backward.cu"
_CHECKS = f"{_TORCH}/aten/src/ATen/native/transformers/cuda/sdp_utils.cpp"
_SHARED_CHECKS = f"{_TORCH}/aten/src/ATen/native/transformers/sdp_utils_cpp.h"
_FUNCTIONAL = f"{_TORCH}/torch/nn/functional.py#L6343"
_FLEX = f"{_TORCH}/torch/nn/attention/flex_attention.py"
_FLEX_CPU = f"{_TORCH}/torch/_inductor/kernel/flex/flex_cpu.py"
_FLEX_CUDA = f"{_TORCH}/torch/_inductor/kernel/flex/flex_attention.py"

_FLOATING = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def _one_head_size(site: CanonicalAttention, asked: Asked, capability: Capability | None) -> Refusal:
    size, value_size = size_of(site.feature_axes), size_of(site.value_axes)
    up = [-(-one // PADDED_TO) for one in (size, value_size)]
    return None if up[0] == up[1] else f"takes values of the query's head size, {size}, not {value_size}"


def _no_bfloat16_before_ampere(site: CanonicalAttention, asked: Asked, capability: Capability | None) -> Refusal:
    if site.compute_dtype is not torch.bfloat16 or capability is None or capability >= (8, 0):
        return None
    own = ".".join(map(str, capability))
    return f"takes no bfloat16 before compute capability 8.0, and this GPU has {own}"


def _no_cudnn_training_before_hopper(site: CanonicalAttention, asked: Asked, capability: Capability | None) -> Refusal:
    if not site.differentiable or capability is None or capability >= (9, 0):
        return None
    return "its backward pass was not run before compute capability 9.0 (run it under torch.no_grad())"


def _no_gradient_of_a_mask(site: CanonicalAttention, asked: Asked, capability: Capability | None) -> Refusal:
    if not site.differentiable:
        return None
    if isinstance(site.sink, Operand):
        return "gives no gradient for a sink"
    if site.doubles_features:
        return "was not run with the doubled features that gradients of rows without a key ask for here"
    return "gives no gradient for an additive mask" if mask_kind(site) == "additive" else None


NATIVE = Limits(
    devices=("cpu", "cuda"),
    dtypes=_FLOATING,
    heads=HeadSizes(),
    value_heads=HeadSizes(),
    masks="additive",
    mask_gradient=True,
    alignments=("first",),
    dropout=True,
    grouped=True,
    backward=True,
    deterministic=True,
    sources={
        "devices": "those that it was run on; on another a site is refused where a bias may take every key from a row",
        "dtypes": f"{_DISPATCH} scaled_dot_product_attention: what no fused kernel takes goes to MATH",
        "heads": f"{_DISPATCH} pad_last_dim",
        "value_heads": f"{_DISPATCH} scaled_dot_product_attention: what no fused kernel takes goes to MATH",
        "masks": f"{_DISPATCH} validate_sdpa_input: of the query's dtype, or float32 on the CPU",
        "mask_gradient": f"{_DISPATCH} scaled_dot_product_attention: with a gradient of the mask, MATH on the CPU",
        "alignments": f"{_FUNCTIONAL}: tril(diagonal=0)",
        "window": f"{_FUNCTIONAL}: there is no argument for it; it is a mask",
        "dropout": f"{_FUNCTIONAL}: dropout_p",
        "grouped": f"{_FUNCTIONAL}: enable_gqa",
        "deterministic": f"{_CUDA_BACKWARD} deterministicAlgorithms(); then cuDNN is not selected",
    },
)

MATH = Limits(
    devices=NATIVE.devices,
    dtypes=_FLOATING,
    heads=HeadSizes(),
    value_heads=HeadSizes(),
    masks="additive",
    mask_gradient=True,
    alignments=("first",),
    dropout=True,
    grouped=True,
    backward=True,
    deterministic=True,
    sources={
        **dict.fromkeys(
            ("dtypes", "heads", "value_heads", "masks", "mask_gradient", "alignments", "dropout", "grouped"),
            f"{_DISPATCH} _scaled_dot_product_attention_math: matrix products and a softmax",
        ),
        "devices": NATIVE.sources["devices"],
        "deterministic": "as those of matrix products",
    },
)

FLASH = Limits(
    devices=("cuda", "rocm"),
    dtypes=HALF,
    heads=HeadSizes(largest=256),
    value_heads=HeadSizes(largest=256),
    min_capability=(8, 0),
    max_capability=(12, 1),
    alignments=("square",),
    dropout=True,
    grouped=True,
    backward=True,
    deterministic=True,
    rules=(
        LimitRule(
            f"the value head size is the query's, both padded to a multiple of {PADDED_TO}",
            _one_head_size,
            f"{_CHECKS} check_head_dim_size_flash",
        ),
        LimitRule(
            "no training of head sizes over 192 on some GPUs that are not those of data centers",
            None,
            f"{_CHECKS} check_requires_grad_and_head_dim_gt192_constraints_on_sm86_89_or_120",
        ),
    ),
    sources={
        "devices": f"{_CHECKS} check_all_tensors_on_device",
        "dtypes": f"{_CHECKS} check_dtypes_low_precision",
        "heads": f"{_CHECKS} check_head_dim_size_flash",
        "value_heads": f"{_CHECKS} check_head_dim_size_flash",
        "min_capability": f"{_CHECKS} check_flash_attention_hardware_support",
        "max_capability": f"{_CHECKS} check_flash_attention_hardware_support",
        "masks": f"{_SHARED_CHECKS}#L260",
        "alignments": f"{_CHECKS} check_flash_causal_non_square_seqlens",
        "window": f"{_CUDA} _scaled_dot_product_flash_attention_cuda: there is no argument for it",
        "dropout": f"{_CUDA} _scaled_dot_product_flash_attention_cuda: dropout_p",
        "grouped": f"{_CHECKS} can_use_flash_attention: backend_supports_grouped_query_attention",
        "deterministic": f"{_CUDA_BACKWARD} deterministicAlgorithms()",
    },
)

EFFICIENT = Limits(
    devices=("cuda", "rocm"),
    dtypes=(torch.bfloat16, torch.float16, torch.float32),
    heads=HeadSizes(),
    value_heads=HeadSizes(),
    min_capability=(5, 0),
    max_capability=(12, 1),
    masks="additive",
    mask_gradient=True,
    alignments=("first",),
    dropout=True,
    backward=True,
    deterministic=True,
    rules=(
        LimitRule(
            "no bfloat16 before compute capability 8.0",
            _no_bfloat16_before_ampere,
            f"{_CHECKS} can_use_mem_efficient_attention",
        ),
    ),
    sources={
        "devices": f"{_CHECKS} check_all_tensors_on_device",
        "dtypes": f"{_CHECKS} can_use_mem_efficient_attention",
        "heads": f"{_CHECKS} check_head_dim_size_mem_efficient: a multiple of 8 at most, to which they are padded",
        "value_heads": f"{_CHECKS} check_head_dim_size_mem_efficient",
        "min_capability": f"{_CHECKS} check_mem_efficient_hardware_support",
        "max_capability": f"{_CHECKS} check_mem_efficient_hardware_support",
        "masks": f"{_CUDA} _scaled_dot_product_efficient_attention_cuda: attn_bias, of the query's dtype",
        "mask_gradient": f"{_CUDA_BACKWARD} _scaled_dot_product_efficient_attention_backward_cuda: grad_bias",
        "alignments": f"{_CUDA} _scaled_dot_product_efficient_attention_cuda: CausalFromTopLeft",
        "window": f"{_CUDA} _scaled_dot_product_efficient_attention_cuda: there is no argument for it; it is a mask",
        "dropout": f"{_CUDA} _scaled_dot_product_efficient_attention_cuda: dropout_p",
        "grouped": f"{_CHECKS} can_use_mem_efficient_attention: not in every version that is accepted",
        "deterministic": f"{_CUDA_BACKWARD} _efficient_attention_backward: num_splits_key = 1",
    },
)

CUDNN = Limits(
    devices=("cuda", "rocm"),
    dtypes=HALF,
    heads=HeadSizes(largest=256),
    value_heads=HeadSizes(largest=256),
    min_capability=(8, 0),
    max_capability=(12, 1),
    masks="additive",
    alignments=("first",),
    dropout=True,
    grouped=True,
    backward=True,
    rules=(
        LimitRule(
            "training from compute capability 9.0 on",
            _no_cudnn_training_before_hopper,
            "its backward pass was not run on older GPUs, on which PyTorch does not prefer it",
        ),
        LimitRule(
            "no training with an additive mask or a learned sink",
            _no_gradient_of_a_mask,
            f"{_CUDA_BACKWARD} _scaled_dot_product_cudnn_attention_backward_cuda: three gradients",
        ),
        LimitRule(
            "head sizes over 128, one key, and dropout: as far as the version of cuDNN goes",
            None,
            f"{_CHECKS} check_cudnn_tensor_shapes",
        ),
    ),
    sources={
        "devices": f"{_CHECKS} check_all_tensors_on_device",
        "dtypes": f"{_CHECKS} check_dtypes_low_precision",
        "heads": f"{_CHECKS} check_cudnn_tensor_shapes: a multiple of 8, to which they are padded",
        "value_heads": f"{_CHECKS} check_cudnn_tensor_shapes",
        "min_capability": f"{_CHECKS} check_cudnn_hardware_support",
        "max_capability": f"{_CHECKS} check_cudnn_hardware_support",
        "masks": f"{_CUDA} _scaled_dot_product_cudnn_attention_cuda: attn_bias, of the query's dtype",
        "alignments": f"{_TORCH}/aten/src/ATen/native/cudnn/MHA.cpp set_causal_mask: from the first",
        "window": f"{_CUDA} _scaled_dot_product_cudnn_attention_cuda: there is no argument for it; it is a mask",
        "dropout": f"{_CUDA} _scaled_dot_product_cudnn_attention_cuda: dropout_p",
        "grouped": f"{_CHECKS} can_use_cudnn_attention",
        "mask_gradient": f"{_CUDA_BACKWARD} _scaled_dot_product_cudnn_attention_backward_cuda: three gradients",
        "backward": f"{_CUDA_BACKWARD} _scaled_dot_product_cudnn_attention_backward_cuda, called so that it is right: "
        "attnrewrite/kernels/known_wrong.py",
    },
)

FLEX = Limits(
    devices=("cpu", "cuda"),
    dtypes=(torch.bfloat16, torch.float16, torch.float32),
    heads=HeadSizes(),
    value_heads=HeadSizes(),
    masks="additive",
    mask_gradient=True,
    alignments=("first", "last"),
    window=True,
    softcap=True,
    grouped=True,
    backward=True,
    rules=(
        LimitRule(
            "on the CPU: no backward pass, and AVX2",
            None,
            f"{_FLEX_CPU}#L98-L103",
        ),
    ),
    sources={
        "devices": f"{_FLEX_CUDA}#L154-L163, {_FLEX_CPU}",
        "dtypes": f"{_FLEX_CPU}#L265",
        "heads": f"{_FLEX_CUDA}#L155-L162: tl.dot takes 16 and more, up to which they are padded",
        "value_heads": f"{_FLEX_CUDA}#L155-L162: tl.dot takes 16 and more, up to which they are padded",
        **dict.fromkeys(
            ("masks", "alignments", "window", "softcap"),
            f"{_FLEX}#L2168: score_mod, any function of a score and of its place",
        ),
        "mask_gradient": f"{_FLEX_CUDA} flex_attention_backward: gradients of what the score_mod reads",
        "dropout": f"{_FLEX}#L2168: there is no argument for it",
        "grouped": f"{_FLEX}#L2168: enable_gqa",
        "deterministic": "gradients of what the score_mod reads are added up in any order",
    },
)

FLEX_BLOCKS = dataclasses.replace(FLEX, masks="boolean", mask_gradient=False)
"""What a block mask says by itself."""

_FLEX_FLASH = f"{_TORCH}/torch/_inductor/kernel/flex/flex_flash_attention.py"
_RUN = "run on an NVIDIA H100 with torch 2.11 and flash-attn-4 4.0.0b36"

FLEX_FLASH = Limits(
    devices=("cuda",),
    dtypes=HALF,
    heads=HeadSizes(only=(64, 128)),
    value_heads=HeadSizes(only=(64, 128)),
    min_capability=(9, 0),
    masks="none",
    alignments=("first", "last"),
    window=True,
    softcap=True,
    grouped=True,
    symbolic=False,
    minimum_version="4.0.0b36",
    sources={
        "devices": _FLEX_FLASH,
        "dtypes": "https://pypi.org/project/flash-attn-4/4.0.0b36/ flash_attn/cute/interface.py",
        "heads": f"others are not tried; 256 with a causal mask failed when {_RUN}",
        "value_heads": f"others are not tried; 256 with a causal mask failed when {_RUN}",
        "min_capability": "https://pypi.org/project/flash-attn-4/4.0.0b36/ flash_attn/cute/interface.py",
        "masks": f"a mask_mod that reads a tensor does not compile: {_RUN}",
        "dropout": f"{_FLEX}#L2168: there is no argument for it",
        "symbolic": f"{_FLEX_FLASH}: dynamic shapes are to be reconfirmed",
        "minimum_version": _RUN,
    },
)
