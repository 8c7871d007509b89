"""The signatures that vendors publish, as they stand in the files that are named, without what they do.

Only the line of definition is taken over; annotations are left out where they name types of the vendor's.
"""

from __future__ import annotations

# ruff: noqa: N803
from dataclasses import dataclass
from typing import Any

__all__ = ["PUBLISHED", "Published"]


class FlashAttention2:
    """flash-attn 2.8.3.post2, flash_attn/flash_attn_interface.py

    https://github.com/Dao-AILab/flash-attention/blob/v2.8.3/flash_attn/flash_attn_interface.py
    """

    version = "2.8.3.post2"

    @staticmethod
    def _flash_attn_forward(
        q: Any,
        k: Any,
        v: Any,
        dropout_p: float,
        softmax_scale: float,
        causal: bool,
        window_size_left: int,
        window_size_right: int,
        softcap: float,
        alibi_slopes: Any,
        return_softmax: bool,
    ) -> Any: ...

    @staticmethod
    def _flash_attn_varlen_forward(
        q: Any,
        k: Any,
        v: Any,
        cu_seqlens_q: Any,
        cu_seqlens_k: Any,
        max_seqlen_q: int,
        max_seqlen_k: int,
        dropout_p: float,
        softmax_scale: float,
        causal: bool,
        window_size_left: int = -1,
        window_size_right: int = -1,
        softcap: float = 0.0,
        alibi_slopes: Any = None,
        return_softmax: bool = False,
        block_table: Any = None,
        leftpad_k: Any = None,
        seqused_k: Any = None,
        zero_tensors: bool = False,
    ) -> Any: ...

    @staticmethod
    def _flash_attn_backward(
        dout: Any,
        q: Any,
        k: Any,
        v: Any,
        out: Any,
        softmax_lse: Any,
        dq: Any,
        dk: Any,
        dv: Any,
        dropout_p: float,
        softmax_scale: float,
        causal: bool,
        window_size_left: int,
        window_size_right: int,
        softcap: float,
        alibi_slopes: Any,
        deterministic: bool,
        rng_state: Any = None,
    ) -> Any: ...

    @staticmethod
    def _flash_attn_varlen_backward(
        dout: Any,
        q: Any,
        k: Any,
        v: Any,
        out: Any,
        softmax_lse: Any,
        dq: Any,
        dk: Any,
        dv: Any,
        cu_seqlens_q: Any,
        cu_seqlens_k: Any,
        max_seqlen_q: int,
        max_seqlen_k: int,
        dropout_p: float,
        softmax_scale: float,
        causal: bool,
        window_size_left: int,
        window_size_right: int,
        softcap: float,
        alibi_slopes: Any,
        deterministic: bool,
        rng_state: Any = None,
        zero_tensors: bool = False,
    ) -> Any: ...


class FlashAttention3:
    """flash_attn_3 3.0.0, hopper/flash_attn_interface.py

    https://github.com/Dao-AILab/flash-attention/blob/01afd16d248c4c7d0f9aed1914084f16c490eaed/hopper/flash_attn_interface.py
    """

    version = "3.0.0 (01afd16)"

    @staticmethod
    def _flash_attn_forward(
        q: Any,
        k: Any,
        v: Any,
        k_new: Any = None,
        v_new: Any = None,
        qv: Any = None,
        out_: Any = None,
        cu_seqlens_q: Any = None,
        cu_seqlens_k: Any = None,
        cu_seqlens_k_new: Any = None,
        seqused_q: Any = None,
        seqused_k: Any = None,
        max_seqlen_q: int | None = None,
        max_seqlen_k: int | None = None,
        page_table: Any = None,
        kv_batch_idx: Any = None,
        leftpad_k: Any = None,
        rotary_cos: Any = None,
        rotary_sin: Any = None,
        seqlens_rotary: Any = None,
        q_descale: Any = None,
        k_descale: Any = None,
        v_descale: Any = None,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size_left: int = -1,
        window_size_right: int = -1,
        attention_chunk: int = 0,
        softcap: float = 0.0,
        rotary_interleaved: bool = True,
        scheduler_metadata: Any = None,
        num_splits: int = 1,
        pack_gqa: bool | None = None,
        sm_margin: int = 0,
    ) -> Any: ...

    @staticmethod
    def _flash_attn_backward(
        dout: Any,
        q: Any,
        k: Any,
        v: Any,
        out: Any,
        softmax_lse: Any,
        cu_seqlens_q: Any = None,
        cu_seqlens_k: Any = None,
        sequed_q: Any = None,
        sequed_k: Any = None,
        max_seqlen_q: int | None = None,
        max_seqlen_k: int | None = None,
        dq: Any = None,
        dk: Any = None,
        dv: Any = None,
        softmax_scale: float | None = None,
        is_causal: bool = False,
        window_size_left: int = -1,
        window_size_right: int = -1,
        softcap: float = 0.0,
        deterministic: bool = False,
        sm_margin: int = 0,
    ) -> Any: ...


class FlashAttention4:
    """flash-attn-4 4.0.0b36, flash_attn/cute/interface.py

    https://pypi.org/project/flash-attn-4/4.0.0b36/
    """

    version = "4.0.0b36"

    @staticmethod
    def flash_attn_func(
        q: Any,
        k: Any,
        v: Any,
        qv: Any = None,
        gather_kv_indices: Any = None,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size: tuple[int | None, int | None] = (None, None),
        learnable_sink: Any = None,
        softcap: float = 0.0,
        num_splits: int = 1,
        pack_gqa: bool | None = None,
        deterministic: bool = False,
        score_mod: Any = None,
        score_mod_bwd: Any = None,
        mask_mod: Any = None,
        aux_tensors: Any = None,
        aux_scalars: Any = None,
        block_sparse_tensors: Any = None,
        block_sparse_tensors_bwd: Any = None,
        return_lse: bool = False,
        gather_bwd_recompute_p: bool = False,
        gather_bwd_token_chunk: int | None = None,
    ) -> Any: ...

    @staticmethod
    def _flash_attn_bwd(
        q: Any,
        k: Any,
        v: Any,
        out: Any,
        dout: Any,
        lse: Any,
        softmax_scale: float | None = None,
        causal: bool = False,
        softcap: float = 0.0,
        window_size_left: int | None = None,
        window_size_right: int | None = None,
        m_block_size: int = 64,
        n_block_size: int = 128,
        num_threads: int = 256,
        pack_gqa: bool = False,
        num_stages_Q: int = 2,
        num_stages_dO: int = 2,
        SdP_swapAB: bool = False,
        dKV_swapAB: bool = False,
        dQ_swapAB: bool = False,
        AtomLayoutMSdP: int = 2,
        AtomLayoutNdKV: int = 2,
        AtomLayoutMdQ: int = 2,
        V_in_regs: bool = False,
        cu_seqlens_q: Any = None,
        cu_seqlens_k: Any = None,
        seqused_q: Any = None,
        seqused_k: Any = None,
        max_seqlen_q: int | None = None,
        max_seqlen_k: int | None = None,
        deterministic: bool = False,
        dq: Any = None,
        dk: Any = None,
        dv: Any = None,
        score_mod: Any = None,
        score_mod_bwd: Any = None,
        mask_mod: Any = None,
        aux_tensors: Any = None,
        aux_scalars: Any = None,
        block_sparse_tensors: Any = None,
        dlse: Any = None,
        learnable_sink: Any = None,
    ) -> Any: ...


class SageAttention1:
    """sageattention 1.0.6, sageattention/core.py: unknown keywords are swallowed, which binding must not hide.

    https://pypi.org/project/sageattention/1.0.6/
    """

    version = "1.0.6"

    @staticmethod
    def sageattn(
        q: Any,
        k: Any,
        v: Any,
        tensor_layout: str = "HND",
        is_causal: bool = False,
        sm_scale: float | None = None,
        smooth_k: bool = True,
    ) -> Any: ...

    @staticmethod
    def sageattn_varlen(
        q: Any,
        k: Any,
        v: Any,
        cu_seqlens_q: Any,
        cu_seqlens_k: Any,
        max_seqlen_q: int,
        max_seqlen_k: int,
        is_causal: bool = False,
        sm_scale: float | None = None,
        smooth_k: bool = True,
    ) -> Any: ...


class SageAttention2:
    """SageAttention 2.2.0, sageattention/core.py, less the ``**kwargs`` that swallow unknown keywords.

    https://github.com/thu-ml/SageAttention/blob/0116592f6eace985216ac3e97b40ecc200aaf101/sageattention/core.py
    """

    version = "2.2.0 (0116592)"

    @staticmethod
    def sageattn(
        q: Any,
        k: Any,
        v: Any,
        tensor_layout: str = "HND",
        is_causal: bool = False,
        sm_scale: float | None = None,
        return_lse: bool = False,
    ) -> Any: ...

    @staticmethod
    def sageattn_varlen(
        q: Any,
        k: Any,
        v: Any,
        cu_seqlens_q: Any,
        cu_seqlens_k: Any,
        max_seqlen_q: int,
        max_seqlen_k: int,
        is_causal: bool = False,
        sm_scale: float | None = None,
        smooth_k: bool = True,
    ) -> Any: ...

    @staticmethod
    def sageattn_qk_int8_pv_fp16_triton(
        q: Any,
        k: Any,
        v: Any,
        tensor_layout: str = "HND",
        quantization_backend: str = "triton",
        is_causal: bool = False,
        sm_scale: float | None = None,
        smooth_k: bool = True,
        return_lse: bool = False,
    ) -> Any: ...

    @staticmethod
    def sageattn_qk_int8_pv_fp16_cuda(
        q: Any,
        k: Any,
        v: Any,
        tensor_layout: str = "HND",
        is_causal: bool = False,
        qk_quant_gran: str = "per_thread",
        sm_scale: float | None = None,
        pv_accum_dtype: str = "fp32",
        smooth_k: bool = True,
        smooth_v: bool = False,
        return_lse: bool = False,
    ) -> Any: ...

    @staticmethod
    def sageattn_qk_int8_pv_fp8_cuda(
        q: Any,
        k: Any,
        v: Any,
        tensor_layout: str = "HND",
        is_causal: bool = False,
        qk_quant_gran: str = "per_thread",
        sm_scale: float | None = None,
        pv_accum_dtype: str = "fp32+fp16",
        smooth_k: bool = True,
        smooth_v: bool = False,
        return_lse: bool = False,
    ) -> Any: ...

    @staticmethod
    def sageattn_qk_int8_pv_fp8_cuda_sm90(
        q: Any,
        k: Any,
        v: Any,
        tensor_layout: str = "HND",
        is_causal: bool = False,
        qk_quant_gran: str = "per_thread",
        sm_scale: float | None = None,
        pv_accum_dtype: str = "fp32+fp32",
        smooth_k: bool = True,
        return_lse: bool = False,
    ) -> Any: ...


class SageAttention3:
    """sageattn3, sageattention3_blackwell/sageattn3/api.py, less the ``**kwargs`` that swallow unknown keywords.

    https://github.com/thu-ml/SageAttention/blob/27b740fc52c1a05813786ea44e94ebf27eef73bf/sageattention3_blackwell/sageattn3/api.py
    """

    version = "27b740f"

    @staticmethod
    def sageattn3_blackwell(
        q: Any, k: Any, v: Any, attn_mask: Any = None, is_causal: bool = False, per_block_mean: bool = True
    ) -> Any: ...


class XFormers:
    """xformers 0.0.35, xformers/ops/fmha/__init__.py

    https://github.com/facebookresearch/xformers/blob/v0.0.35/xformers/ops/fmha/__init__.py
    """

    version = "0.0.35"

    @staticmethod
    def memory_efficient_attention_forward_requires_grad(
        query: Any,
        key: Any,
        value: Any,
        attn_bias: Any = None,
        p: float = 0.0,
        scale: float | None = None,
        *,
        op: Any = None,
        output_dtype: Any = None,
    ) -> Any: ...

    @staticmethod
    def memory_efficient_attention_backward(
        grad: Any,
        output: Any,
        lse: Any,
        query: Any,
        key: Any,
        value: Any,
        attn_bias: Any = None,
        p: float = 0.0,
        scale: float | None = None,
        *,
        op: Any = None,
    ) -> Any: ...


class Aiter:
    """aiter, aiter/ops/mha.py

    https://github.com/ROCm/aiter/blob/e11da613978cb73c8acf5c08ce722275a275a040/aiter/ops/mha.py
    """

    version = "e11da61"

    @staticmethod
    def flash_attn_func(
        q: Any,
        k: Any,
        v: Any,
        dropout_p: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
        bias: Any = None,
        alibi_slopes: Any = None,
        deterministic: bool = True,
        return_lse: bool = False,
        return_attn_probs: bool = False,
    ) -> Any: ...


class TorchNpu:
    """torch-npu 2.13.0, the operators' schemas, as torch.ops.npu.npu_fusion_attention.default._schema gives them.

    https://pypi.org/project/torch-npu/2.13.0/
    """

    version = "2.13.0"

    @staticmethod
    def npu_fusion_attention(
        query: Any,
        key: Any,
        value: Any,
        head_num: int,
        input_layout: str,
        pse: Any = None,
        padding_mask: Any = None,
        atten_mask: Any = None,
        scale: float = 1.0,
        keep_prob: float = 1.0,
        pre_tockens: int = 2147483647,
        next_tockens: int = 2147483647,
        inner_precise: int = 0,
        prefix: Any = None,
        actual_seq_qlen: Any = None,
        actual_seq_kvlen: Any = None,
        sparse_mode: int = 0,
        gen_mask_parallel: bool = True,
        sync: bool = False,
        softmax_layout: str = "",
        sink: Any = None,
        dropout_mask: Any = None,
        seed: int = 0,
        offset: int = 0,
    ) -> Any: ...

    @staticmethod
    def npu_fusion_attention_grad(
        query: Any,
        key: Any,
        value: Any,
        dy: Any,
        head_num: int,
        input_layout: str,
        *,
        pse: Any = None,
        padding_mask: Any = None,
        atten_mask: Any = None,
        softmax_max: Any = None,
        softmax_sum: Any = None,
        softmax_in: Any = None,
        attention_in: Any = None,
        scale_value: float = 1.0,
        keep_prob: float = 1.0,
        pre_tockens: int = 2147483647,
        next_tockens: int = 2147483647,
        inner_precise: int = 0,
        seed: int = 0,
        offset: int = 0,
        numels: int = 0,
        prefix: Any = None,
        actual_seq_qlen: Any = None,
        actual_seq_kvlen: Any = None,
        sparse_mode: int = 0,
        gen_mask_parallel: bool = True,
        sync: bool = False,
        softmax_layout: str = "",
        sink: Any = None,
    ) -> Any: ...


class TorchNpuInference:
    """The schema in the documentation of torchair, up to block_size; version 6.0.RC3 has scale_value for scale.

    https://hiascend.com/document/detail/zh/Pytorch/60RC3/apiref/apilist/ptaoplist_000768.html
    """

    version = "torchair's documentation"

    @staticmethod
    def npu_fused_infer_attention_score(
        query: Any,
        key: Any,
        value: Any,
        *,
        pse_shift: Any = None,
        atten_mask: Any = None,
        actual_seq_lengths: Any = None,
        actual_seq_lengths_kv: Any = None,
        dequant_scale1: Any = None,
        quant_scale1: Any = None,
        dequant_scale2: Any = None,
        quant_scale2: Any = None,
        quant_offset2: Any = None,
        antiquant_scale: Any = None,
        antiquant_offset: Any = None,
        key_antiquant_scale: Any = None,
        key_antiquant_offset: Any = None,
        value_antiquant_scale: Any = None,
        value_antiquant_offset: Any = None,
        block_table: Any = None,
        query_padding_size: Any = None,
        kv_padding_size: Any = None,
        key_shared_prefix: Any = None,
        value_shared_prefix: Any = None,
        actual_shared_prefix_len: Any = None,
        query_rope: Any = None,
        key_rope: Any = None,
        key_rope_antiquant_scale: Any = None,
        num_heads: int = 1,
        scale: float = 1.0,
        pre_tokens: int = 2147483647,
        next_tokens: int = 2147483647,
        input_layout: str = "BSH",
        num_key_value_heads: int = 0,
        sparse_mode: int = 0,
        inner_precise: int = 0,
        block_size: int = 0,
    ) -> Any: ...


class TorchXla:
    """torch-xla, torch_xla/experimental/custom_kernel.py

    https://github.com/pytorch/xla/blob/00a784387b723b32f2a1c646eef6d772c84603ae/torch_xla/experimental/custom_kernel.py
    """

    version = "00a7843"

    @staticmethod
    def flash_attention(
        q: Any,
        k: Any,
        v: Any,
        causal: bool = False,
        q_segment_ids: Any = None,
        kv_segment_ids: Any = None,
        sm_scale: float = 1.0,
        *,
        ab: Any = None,
        partition_spec: Any = None,
        mesh: Any = None,
    ) -> Any: ...


class TorchVarlen:
    """PyTorch, aten/src/ATen/native/native_functions.yaml: the arguments that 2.7 to 2.13 have in common.

    https://github.com/pytorch/pytorch/blob/v2.13.0/aten/src/ATen/native/native_functions.yaml
    """

    version = "2.13.0"

    @staticmethod
    def _flash_attention_forward(
        query: Any,
        key: Any,
        value: Any,
        cum_seq_q: Any,
        cum_seq_k: Any,
        max_q: int,
        max_k: int,
        dropout_p: float,
        is_causal: bool,
        return_debug_mask: bool,
        *,
        scale: float | None = None,
        window_size_left: int | None = None,
        window_size_right: int | None = None,
        seqused_k: Any = None,
        alibi_slopes: Any = None,
    ) -> Any: ...

    @staticmethod
    def _flash_attention_backward(
        grad_out: Any,
        query: Any,
        key: Any,
        value: Any,
        out: Any,
        logsumexp: Any,
        cum_seq_q: Any,
        cum_seq_k: Any,
        max_q: int,
        max_k: int,
        dropout_p: float,
        is_causal: bool,
        rng_state: Any,
        unused: Any,
        *,
        scale: float | None = None,
        window_size_left: int | None = None,
        window_size_right: int | None = None,
    ) -> Any: ...


@dataclass(frozen=True)
class Published:
    """The signatures of a kernel's vendor, and how the backward pass is called, if it has one."""

    signatures: tuple[Any, ...]


_FLASH_2, _FLASH_3, _FLASH_4 = (Published((one,)) for one in (FlashAttention2, FlashAttention3, FlashAttention4))
_SAGE, _SAGE_2, _SAGE_3 = (
    Published(some) for some in ((SageAttention1, SageAttention2), (SageAttention2,), (SageAttention3,))
)

PUBLISHED: dict[str, Published] = {
    "flash": _FLASH_2,
    "flash_varlen": _FLASH_2,
    "flash_hub": _FLASH_2,
    "flash_varlen_hub": _FLASH_2,
    "_flash_3": _FLASH_3,
    "_flash_varlen_3": _FLASH_3,
    "_flash_3_hub": _FLASH_3,
    "_flash_3_varlen_hub": _FLASH_3,
    "flash_4": _FLASH_4,
    "flash_4_hub": _FLASH_4,
    "varlen": Published((TorchVarlen,)),
    "xformers": Published((XFormers,)),
    "aiter": Published((Aiter,)),
    "aiter_fa2_hub": Published((Aiter,)),
    "_native_npu": Published((TorchNpu,)),
    "_native_npu_inference": Published((TorchNpuInference,)),
    "_native_xla": Published((TorchXla,)),
    "sage": _SAGE,
    "sage_varlen": _SAGE,
    "_sage_qk_int8_pv_fp8_cuda": _SAGE_2,
    "_sage_qk_int8_pv_fp8_cuda_sm90": _SAGE_2,
    "_sage_qk_int8_pv_fp16_cuda": _SAGE_2,
    "_sage_qk_int8_pv_fp16_triton": _SAGE_2,
    "sage_hub": _SAGE_2,
    "sage_3": _SAGE_3,
    "sage_blackwell_hub": _SAGE_3,
}
