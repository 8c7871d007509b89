"""Models of transformers with eager attention, chosen for the variety of its spelling."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from tests.coverage.case import Case, from_zoo
from tests.support.zoo import NO_DROPOUT, TOKENS, ids, noise, padded, transformer

__all__ = ["CASES"]

_LENGTH = 12


def _text() -> dict[str, Any]:
    return {"input_ids": ids(2, _LENGTH, 0), "attention_mask": padded(2, _LENGTH)}


def _left() -> dict[str, Any]:
    return {"input_ids": ids(2, _LENGTH, 0), "attention_mask": padded(2, _LENGTH, left=True)}


def _text_to_text() -> dict[str, Any]:
    return {**_text(), "decoder_input_ids": ids(2, 8, 1)}


def _image(size: int) -> Callable[[], dict[str, Any]]:
    return lambda: {"pixel_values": noise(2, 3, size, size, seed=0)}


def _speech() -> dict[str, Any]:
    """Two waveforms, the second shorter."""
    return {
        "input_values": noise(2, 400, seed=0),
        "attention_mask": (torch.arange(400) < torch.tensor([[400], [300]])).long(),
    }


def _boxes() -> torch.Tensor:
    corners = ids(2, _LENGTH * 4, 3, 30).view(2, _LENGTH, 4)
    return torch.cat([corners[..., :2], corners[..., :2] + corners[..., 2:]], dim=-1)


_WIDTHS: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}
_TEXT: dict[str, Any] = {"vocab_size": 64, "max_position_embeddings": 64, **_WIDTHS, **NO_DROPOUT}
_DECODER: dict[str, Any] = {
    "vocab_size": 64,
    "max_position_embeddings": 64,
    "use_cache": False,
    "attention_dropout": 0.0,
    **_WIDTHS,
    **TOKENS,
}
_GROUPED: dict[str, Any] = {**_DECODER, "num_key_value_heads": 2}
_GPT: dict[str, Any] = {
    "vocab_size": 64,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
    "use_cache": False,
}
_IMAGE: dict[str, Any] = {**_WIDTHS, **NO_DROPOUT, "image_size": 32, "patch_size": 8}
_CLIP_IMAGE: dict[str, Any] = {**_WIDTHS, "image_size": 32, "patch_size": 8, "projection_dim": 16}
_CLIP_TEXT: dict[str, Any] = {
    **_WIDTHS,
    **TOKENS,
    "vocab_size": 64,
    "max_position_embeddings": 64,
    "projection_dim": 16,
}
_SPEECH: dict[str, Any] = {
    **_WIDTHS,
    "vocab_size": 32,
    "conv_dim": (16, 16),
    "conv_kernel": (10, 3),
    "conv_stride": (5, 2),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 4,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
    "feat_proj_dropout": 0.0,
    "layerdrop": 0.0,
    "apply_spec_augment": False,
}
_SEQ2SEQ: dict[str, Any] = {
    "vocab_size": 64,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
    "use_cache": False,
    "decoder_start_token_id": 2,
    **TOKENS,
}
_PYRAMID: dict[str, Any] = {
    "num_encoder_blocks": 2,
    "depths": [1, 1],
    "hidden_sizes": [16, 32],
    "strides": [4, 2],
    "num_attention_heads": [2, 4],
    "mlp_ratios": [2, 2],
    "image_size": 32,
    "drop_path_rate": 0.0,
    **NO_DROPOUT,
}
_WINDOWS: dict[str, Any] = {
    "image_size": 32,
    "patch_size": 2,
    "embed_dim": 16,
    "depths": [2, 2],
    "num_heads": [2, 4],
    "window_size": 4,
    "drop_path_rate": 0.0,
    **NO_DROPOUT,
}


def _backbone() -> dict[str, Any]:
    return {
        "use_timm_backbone": False,
        "backbone": None,
        "use_pretrained_backbone": False,
        "backbone_config": _config(
            "ResNetConfig",
            embedding_size=8,
            hidden_sizes=[8, 16],
            depths=[1, 1],
            layer_type="basic",
            out_features=["stage2"],
        ),
    }


def _with(build: Callable[[], Callable[[], nn.Module]]) -> Callable[[], nn.Module]:
    """A model whose configuration needs other classes of transformers, imported when it is built."""
    return lambda: build()()


def _config(name: str, **settings: Any) -> Any:
    import transformers

    return getattr(transformers, name)(**settings)


CASES: tuple[Case, ...] = (
    from_zoo("bert", "additive padding mask"),
    from_zoo("gpt2", "causal and padding mask added"),
    from_zoo("llama", "GQA by repeat, rotary"),
    from_zoo("t5", "relative bias, unscaled, cross"),
    from_zoo("vit", "plain"),
    from_zoo("whisper", "scaled query, cross"),
    Case(
        "albert",
        "shared layers, padding mask",
        2,
        transformer("AlbertModel", "AlbertConfig", **_TEXT, embedding_size=16),
        _text,
    ),
    Case("electra", "padding mask", 2, transformer("ElectraModel", "ElectraConfig", **_TEXT, embedding_size=16), _text),
    Case("mpnet", "relative bias shared by layers", 2, transformer("MPNetModel", "MPNetConfig", **_TEXT), _text),
    Case(
        "deberta-v2",
        "disentangled: content to position and back",
        2,
        transformer(
            "DebertaV2Model",
            "DebertaV2Config",
            **_TEXT,
            relative_attention=True,
            pos_att_type=["c2p", "p2c"],
            position_buckets=8,
            norm_rel_ebd="layer_norm",
            share_att_key=True,
        ),
        _text,
    ),
    Case(
        "xlnet",
        "relative position, einsum",
        2,
        transformer(
            "XLNetModel", "XLNetConfig", vocab_size=64, d_model=32, n_layer=2, n_head=4, d_inner=48, dropout=0.0
        ),
        _text,
    ),
    Case(
        "convbert",
        "beside a convolution of half the heads",
        2,
        transformer("ConvBertModel", "ConvBertConfig", **_TEXT, embedding_size=32, head_ratio=2, conv_kernel_size=3),
        _text,
    ),
    Case(
        "funnel",
        "relative shift, pooled query",
        3,
        transformer(
            "FunnelModel",
            "FunnelConfig",
            vocab_size=64,
            block_sizes=[1, 1],
            num_decoder_layers=1,
            d_model=32,
            n_head=4,
            d_head=8,
            d_inner=48,
            hidden_dropout=0.0,
            attention_dropout=0.0,
        ),
        _text,
    ),
    Case(
        "esm",
        "rotary, scaled query",
        2,
        transformer(
            "EsmModel", "EsmConfig", **_TEXT, pad_token_id=1, mask_token_id=4, position_embedding_type="rotary"
        ),
        _text,
    ),
    Case(
        "roformer",
        "rotary before the heads are split off",
        2,
        transformer("RoFormerModel", "RoFormerConfig", **_TEXT, embedding_size=32),
        _text,
    ),
    Case(
        "modernbert",
        "local and global layers, rotary",
        2,
        transformer(
            "ModernBertModel",
            "ModernBertConfig",
            **_WIDTHS,
            vocab_size=64,
            max_position_embeddings=64,
            pad_token_id=0,
            global_attn_every_n_layers=2,
            local_attention=4,
        ),
        _text,
    ),
    Case(
        "xlm",
        "scaled query, mask filled with finfo.min",
        2,
        transformer(
            "XLMModel",
            "XLMConfig",
            vocab_size=64,
            emb_dim=32,
            n_layers=2,
            n_heads=4,
            max_position_embeddings=64,
            dropout=0.0,
            attention_dropout=0.0,
            use_cache=False,
        ),
        _text,
    ),
    Case(
        "gpt-neo",
        "unscaled, global and local causal mask",
        2,
        transformer(
            "GPTNeoModel",
            "GPTNeoConfig",
            vocab_size=64,
            hidden_size=32,
            num_layers=2,
            num_heads=4,
            attention_types=[[["global", "local"], 1]],
            window_size=4,
            intermediate_size=48,
            max_position_embeddings=64,
            use_cache=False,
        ),
        _text,
    ),
    Case(
        "gpt-j",
        "float32 scores, rotary part of the head",
        2,
        transformer("GPTJModel", "GPTJConfig", **_GPT, rotary_dim=4),
        _left,
    ),
    Case("gpt-neox", "rotary part of the head", 2, transformer("GPTNeoXModel", "GPTNeoXConfig", **_DECODER), _left),
    Case(
        "codegen",
        "query, key and value of four shards",
        2,
        transformer("CodeGenModel", "CodeGenConfig", **{**_GPT, "n_head": 4}, rotary_dim=4),
        _left,
    ),
    Case(
        "ctrl",
        "mask times -1e4",
        2,
        transformer(
            "CTRLModel",
            "CTRLConfig",
            vocab_size=64,
            n_embd=32,
            n_layer=2,
            n_head=4,
            dff=48,
            n_positions=64,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            use_cache=False,
        ),
        _text,
    ),
    Case(
        "gpt-bigcode",
        "multi-query",
        2,
        transformer("GPTBigCodeModel", "GPTBigCodeConfig", **_GPT, multi_query=True),
        _left,
    ),
    Case(
        "bloom",
        "ALiBi by baddbmm",
        2,
        transformer(
            "BloomModel",
            "BloomConfig",
            vocab_size=64,
            hidden_size=32,
            n_layer=2,
            n_head=4,
            hidden_dropout=0.0,
            attention_dropout=0.0,
            use_cache=False,
        ),
        _left,
    ),
    Case(
        "mpt",
        "ALiBi, mask filled",
        2,
        transformer(
            "MptModel", "MptConfig", vocab_size=64, d_model=32, n_layers=2, n_heads=4, max_seq_len=64, expansion_ratio=2
        ),
        _left,
    ),
    Case(
        "falcon",
        "multi-query, rotary",
        2,
        transformer(
            "FalconModel",
            "FalconConfig",
            vocab_size=64,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            hidden_dropout=0.0,
            attention_dropout=0.0,
            use_cache=False,
        ),
        _left,
    ),
    Case(
        "falcon-alibi",
        "ALiBi added after scaling",
        2,
        transformer(
            "FalconModel",
            "FalconConfig",
            vocab_size=64,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            alibi=True,
            multi_query=False,
            hidden_dropout=0.0,
            attention_dropout=0.0,
            use_cache=False,
        ),
        _left,
    ),
    Case(
        "opt",
        "scaled query",
        2,
        transformer(
            "OPTModel",
            "OPTConfig",
            vocab_size=64,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            ffn_dim=48,
            max_position_embeddings=64,
            word_embed_proj_dim=32,
            dropout=0.0,
            use_cache=False,
            **TOKENS,
        ),
        _left,
    ),
    Case(
        "xglm",
        "3-D, maximum with finfo.min",
        2,
        transformer(
            "XGLMModel",
            "XGLMConfig",
            vocab_size=64,
            d_model=32,
            num_layers=2,
            attention_heads=4,
            ffn_dim=48,
            max_position_embeddings=64,
            dropout=0.0,
            attention_dropout=0.0,
            use_cache=False,
            **TOKENS,
        ),
        _left,
    ),
    Case(
        "mistral",
        "GQA, sliding window",
        2,
        transformer("MistralModel", "MistralConfig", **_GROUPED, sliding_window=4),
        _left,
    ),
    Case(
        "gemma2",
        "soft-capping, GQA, sliding window",
        2,
        transformer(
            "Gemma2Model",
            "Gemma2Config",
            **_GROUPED,
            head_dim=8,
            sliding_window=4,
            query_pre_attn_scalar=8,
            attn_logit_softcapping=2.0,
        ),
        _left,
    ),
    Case(
        "gemma3",
        "normalized query and key, sliding window",
        2,
        transformer(
            "Gemma3TextModel",
            "Gemma3TextConfig",
            **_GROUPED,
            head_dim=8,
            sliding_window=4,
            query_pre_attn_scalar=8,
            layer_types=["sliding_attention", "full_attention"],
        ),
        _left,
    ),
    Case(
        "gpt-oss",
        "sinks, GQA, sliding window",
        2,
        transformer(
            "GptOssModel",
            "GptOssConfig",
            **_GROUPED,
            head_dim=8,
            sliding_window=4,
            num_local_experts=2,
            num_experts_per_tok=1,
            layer_types=["sliding_attention", "full_attention"],
        ),
        _left,
    ),
    Case("qwen2", "GQA, biased projections", 2, transformer("Qwen2Model", "Qwen2Config", **_GROUPED), _left),
    Case(
        "qwen3",
        "GQA, normalized query and key",
        2,
        transformer("Qwen3Model", "Qwen3Config", **_GROUPED, head_dim=8),
        _left,
    ),
    Case("phi", "rotary part of the head", 2, transformer("PhiModel", "PhiConfig", **_GROUPED), _left),
    Case(
        "phi3", "query, key and value in one projection", 2, transformer("Phi3Model", "Phi3Config", **_GROUPED), _left
    ),
    Case("cohere", "interleaved rotary, GQA", 2, transformer("CohereModel", "CohereConfig", **_GROUPED), _left),
    Case(
        "starcoder2",
        "GQA, sliding window",
        2,
        transformer("Starcoder2Model", "Starcoder2Config", **_GROUPED, sliding_window=4),
        _left,
    ),
    Case(
        "mixtral",
        "GQA, mixture of experts",
        2,
        transformer("MixtralModel", "MixtralConfig", **_GROUPED, num_local_experts=2, num_experts_per_tok=1),
        _left,
    ),
    Case(
        "deepseek-v2",
        "MLA, complex rotary",
        2,
        transformer(
            "DeepseekV2Model",
            "DeepseekV2Config",
            **_DECODER,
            num_key_value_heads=4,
            kv_lora_rank=16,
            q_lora_rank=16,
            qk_rope_head_dim=4,
            qk_nope_head_dim=8,
            v_head_dim=8,
            first_k_dense_replace=2,
        ),
        _left,
    ),
    Case(
        "deepseek-v3",
        "MLA, value narrower than key",
        2,
        transformer(
            "DeepseekV3Model",
            "DeepseekV3Config",
            **_DECODER,
            num_key_value_heads=4,
            kv_lora_rank=16,
            q_lora_rank=16,
            qk_rope_head_dim=4,
            qk_nope_head_dim=8,
            v_head_dim=8,
            first_k_dense_replace=2,
        ),
        _left,
    ),
    Case(
        "diffllama",
        "difference of two attentions",
        4,
        transformer("DiffLlamaModel", "DiffLlamaConfig", **_GROUPED),
        _left,
    ),
    Case(
        "bart",
        "scaled query, cross",
        6,
        transformer("BartModel", "BartConfig", **_SEQ2SEQ, max_position_embeddings=64),
        _text_to_text,
    ),
    Case(
        "pegasus",
        "sinusoidal positions, cross",
        6,
        transformer("PegasusModel", "PegasusConfig", **_SEQ2SEQ, max_position_embeddings=64),
        _text_to_text,
    ),
    Case(
        "fsmt",
        "sequence first, mask filled",
        6,
        transformer(
            "FSMTModel",
            "FSMTConfig",
            langs=["a", "b"],
            src_vocab_size=64,
            tgt_vocab_size=64,
            **{k: v for k, v in _SEQ2SEQ.items() if k != "vocab_size"},
        ),
        _text_to_text,
    ),
    Case(
        "prophetnet",
        "n-gram streams",
        8,
        transformer(
            "ProphetNetModel",
            "ProphetNetConfig",
            vocab_size=64,
            hidden_size=32,
            encoder_ffn_dim=48,
            num_encoder_layers=2,
            num_encoder_attention_heads=4,
            decoder_ffn_dim=48,
            num_decoder_layers=2,
            num_decoder_attention_heads=4,
            attention_dropout=0.0,
            dropout=0.0,
            max_position_embeddings=64,
            ngram=2,
            use_cache=False,
            **TOKENS,
        ),
        _text_to_text,
    ),
    Case(
        "switch-transformers",
        "relative bias, mixture of experts",
        6,
        transformer(
            "SwitchTransformersModel",
            "SwitchTransformersConfig",
            vocab_size=64,
            d_model=32,
            d_kv=8,
            d_ff=48,
            num_layers=2,
            num_decoder_layers=2,
            num_heads=4,
            num_experts=2,
            expert_capacity=64,
            dropout_rate=0.0,
            router_jitter_noise=0.0,
            use_cache=False,
        ),
        _text_to_text,
    ),
    Case(
        "decision-transformer",
        "states, actions and returns interleaved",
        2,
        transformer(
            "DecisionTransformerModel",
            "DecisionTransformerConfig",
            state_dim=5,
            act_dim=3,
            hidden_size=32,
            max_ep_len=16,
            n_layer=2,
            n_head=4,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        ),
        lambda: {
            "states": noise(2, 4, 5, seed=0),
            "actions": noise(2, 4, 3, seed=1),
            "rewards": noise(2, 4, 1, seed=2),
            "returns_to_go": noise(2, 4, 1, seed=3),
            "timesteps": torch.arange(4).expand(2, 4),
            "attention_mask": padded(2, 4, left=True),
        },
    ),
    Case(
        "lxmert",
        "text, image and cross both ways",
        6,
        transformer(
            "LxmertModel",
            "LxmertConfig",
            vocab_size=64,
            hidden_size=32,
            num_attention_heads=4,
            intermediate_size=48,
            max_position_embeddings=64,
            l_layers=1,
            r_layers=1,
            x_layers=1,
            visual_feat_dim=16,
            **NO_DROPOUT,
        ),
        lambda: {
            **_text(),
            "visual_feats": noise(2, 5, 16, seed=1),
            "visual_pos": noise(2, 5, 4, seed=2),
            "visual_attention_mask": padded(2, 5),
        },
    ),
    Case(
        "perceiver",
        "query and key of other widths, cross",
        3,
        transformer(
            "PerceiverModel",
            "PerceiverConfig",
            num_latents=6,
            d_latents=32,
            d_model=24,
            num_self_attends_per_block=2,
            num_self_attention_heads=4,
            num_cross_attention_heads=4,
            attention_probs_dropout_prob=0.0,
        ),
        lambda: {"inputs": noise(2, 10, 24, seed=0), "attention_mask": padded(2, 10)},
    ),
    Case(
        "beit",
        "relative bias",
        2,
        transformer(
            "BeitModel",
            "BeitConfig",
            **_IMAGE,
            use_relative_position_bias=True,
            use_mask_token=False,
            drop_path_rate=0.0,
        ),
        _image(32),
    ),
    Case("swin", "shifted windows, relative bias", 4, transformer("SwinModel", "SwinConfig", **_WINDOWS), _image(32)),
    Case(
        "swinv2",
        "cosine, relative bias by a network",
        4,
        transformer("Swinv2Model", "Swinv2Config", **_WINDOWS),
        _image(32),
    ),
    Case(
        "dinov2",
        "layer scale",
        2,
        transformer("Dinov2Model", "Dinov2Config", **{k: v for k, v in _IMAGE.items() if k != "intermediate_size"}),
        _image(32),
    ),
    Case(
        "sam-vision",
        "decomposed relative bias, windows",
        2,
        transformer(
            "SamVisionModel",
            "SamVisionConfig",
            hidden_size=32,
            output_channels=16,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=64,
            patch_size=8,
            window_size=3,
            global_attn_indexes=[1],
            mlp_dim=48,
        ),
        _image(64),
    ),
    Case(
        "segformer",
        "reduced keys",
        2,
        transformer("SegformerModel", "SegformerConfig", **_PYRAMID, sr_ratios=[2, 1], patch_sizes=[7, 3]),
        _image(32),
    ),
    Case(
        "pvt",
        "reduced keys",
        2,
        transformer("PvtModel", "PvtConfig", **_PYRAMID, sequence_reduction_ratios=[2, 1], patch_sizes=[4, 2]),
        _image(32),
    ),
    # Its three stages have 2, 4 and 3 layers, whatever the configuration.
    Case(
        "mobilevit",
        "unfolded patches",
        9,
        transformer(
            "MobileViTModel",
            "MobileViTConfig",
            hidden_sizes=[16, 24, 32],
            neck_hidden_sizes=[8, 8, 16, 16, 16, 16, 32],
            num_attention_heads=4,
            image_size=128,
            **NO_DROPOUT,
        ),
        _image(128),
    ),
    Case(
        "levit",
        "learned bias, value wider than key",
        4,
        transformer(
            "LevitModel",
            "LevitConfig",
            image_size=64,
            hidden_sizes=[16, 32],
            num_attention_heads=[2, 4],
            depths=[1, 2],
            key_dim=[8, 8],
            drop_path_rate=0,
            mlp_ratio=[2, 2],
            attention_ratio=[2, 2],
            down_ops=[["Subsample", 8, 2, 4, 2, 2], [""]],
        ),
        _image(64),
    ),
    Case(
        "timesformer",
        "divided in space and time",
        4,
        transformer("TimesformerModel", "TimesformerConfig", **_IMAGE, num_frames=2),
        lambda: {"pixel_values": noise(2, 2, 3, 32, 32, seed=0)},
    ),
    Case(
        "clip",
        "two towers",
        4,
        transformer("CLIPModel", "CLIPConfig", text_config=_CLIP_TEXT, vision_config=_CLIP_IMAGE, projection_dim=16),
        lambda: {**_text(), **_image(32)()},
    ),
    Case(
        "owlvit",
        "two towers",
        4,
        transformer(
            "OwlViTModel", "OwlViTConfig", text_config=_CLIP_TEXT, vision_config=_CLIP_IMAGE, projection_dim=16
        ),
        lambda: {**_text(), **_image(32)()},
    ),
    Case(
        "blip",
        "query, key and value stacked",
        4,
        transformer(
            "BlipModel",
            "BlipConfig",
            text_config={**_TEXT, **TOKENS, "encoder_hidden_size": 32, "projection_dim": 16},
            vision_config=_CLIP_IMAGE,
            projection_dim=16,
        ),
        lambda: {**_text(), **_image(32)()},
    ),
    Case(
        "siglip",
        "two towers, pooled by attention",
        5,
        transformer(
            "SiglipModel", "SiglipConfig", text_config={**_CLIP_TEXT, "projection_size": 32}, vision_config=_CLIP_IMAGE
        ),
        lambda: {**_text(), **_image(32)()},
    ),
    Case(
        "llava",
        "image tokens in GQA",
        4,
        transformer(
            "LlavaModel",
            "LlavaConfig",
            text_config={**_GROUPED, "model_type": "llama"},
            vision_config={**_CLIP_IMAGE, "model_type": "clip_vision_model"},
            image_token_id=63,
            image_seq_length=16,
        ),
        lambda: {
            "input_ids": torch.cat([torch.full((2, 16), 63), ids(2, 6, 0, 60)], dim=1),
            "attention_mask": padded(2, 22),
            **_image(32)(),
        },
    ),
    Case(
        "layoutlmv3",
        "scaled twice, 2-D relative bias",
        2,
        transformer(
            "LayoutLMv3Model",
            "LayoutLMv3Config",
            **_TEXT,
            pad_token_id=1,
            max_2d_position_embeddings=64,
            coordinate_size=4,
            shape_size=8,
            input_size=32,
            patch_size=8,
            visual_embed=True,
        ),
        lambda: {**_text(), "bbox": _boxes(), **_image(32)()},
    ),
    Case(
        "udop",
        "text and layout bias, cross",
        6,
        transformer(
            "UdopModel",
            "UdopConfig",
            vocab_size=64,
            d_model=32,
            d_kv=8,
            d_ff=48,
            num_layers=2,
            num_decoder_layers=2,
            num_heads=4,
            dropout_rate=0.0,
            use_cache=False,
            max_2d_position_embeddings=64,
            image_size=32,
            patch_size=8,
        ),
        # With an image, the tokens are merged in a loop over data that Dynamo cannot trace.
        lambda: {**_text_to_text(), "bbox": _boxes() / 64},
    ),
    Case(
        "detr",
        "queries that are learned, cross",
        6,
        _with(
            lambda: transformer(
                "DetrModel",
                "DetrConfig",
                **{k: v for k, v in _SEQ2SEQ.items() if k not in ("vocab_size", "use_cache")},
                num_queries=5,
                **_backbone(),
            )
        ),
        lambda: {
            **_image(64)(),
            "pixel_mask": (torch.arange(64) < torch.tensor([[64], [40]])).long()[:, None].expand(2, 64, 64),
        },
    ),
    # Swin has 4; 2 layers of the decoder have masked cross attention and self attention. Deformable attention is none.
    Case(
        "mask2former",
        "masked cross attention",
        8,
        _with(
            lambda: transformer(
                "Mask2FormerModel",
                "Mask2FormerConfig",
                backbone_config=_config(
                    "SwinConfig",
                    **{**_WINDOWS, "depths": [1, 1, 1, 1], "num_heads": [2, 2, 2, 2]},
                    out_features=["stage1", "stage2", "stage3", "stage4"],
                ),
                feature_size=32,
                mask_feature_size=32,
                hidden_dim=32,
                encoder_feedforward_dim=32,
                encoder_layers=1,
                decoder_layers=3,
                num_attention_heads=4,
                dim_feedforward=32,
                num_queries=5,
            )
        ),
        _image(64),
    ),
    Case(
        "wav2vec2", "padding mask from lengths", 2, transformer("Wav2Vec2Model", "Wav2Vec2Config", **_SPEECH), _speech
    ),
    Case(
        "sew-d",
        "disentangled",
        2,
        transformer(
            "SEWDModel",
            "SEWDConfig",
            **_SPEECH,
            squeeze_factor=2,
            position_buckets=8,
            max_position_embeddings=64,
            pad_token_id=0,
        ),
        _speech,
    ),
    Case(
        "wav2vec2-conformer-relative",
        "relative shift, two biases of the query",
        2,
        transformer(
            "Wav2Vec2ConformerModel",
            "Wav2Vec2ConformerConfig",
            **_SPEECH,
            position_embeddings_type="relative",
            conformer_conv_dropout=0.0,
        ),
        _speech,
    ),
    Case(
        "wav2vec2-conformer-rotary",
        "rotary",
        2,
        transformer(
            "Wav2Vec2ConformerModel",
            "Wav2Vec2ConformerConfig",
            **_SPEECH,
            position_embeddings_type="rotary",
            conformer_conv_dropout=0.0,
        ),
        _speech,
    ),
    Case(
        "wavlm",
        "gated relative bias",
        2,
        transformer("WavLMModel", "WavLMConfig", **_SPEECH, num_buckets=8, max_bucket_distance=16),
        _speech,
    ),
    Case(
        "speecht5",
        "relative position by product, cross",
        6,
        transformer(
            "SpeechT5ForSpeechToText",
            "SpeechT5Config",
            **{**_SPEECH, **_SEQ2SEQ},
            positional_dropout=0.0,
            encoder_layerdrop=0.0,
            decoder_layerdrop=0.0,
            max_text_positions=64,
            encoder_max_relative_position=8,
        ),
        lambda: {**_speech(), "decoder_input_ids": ids(2, 8, 1)},
    ),
    Case(
        "musicgen-decoder",
        "codebooks, cross",
        4,
        transformer(
            "MusicgenModel",
            "MusicgenDecoderConfig",
            vocab_size=64,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            ffn_dim=48,
            num_codebooks=2,
            max_position_embeddings=64,
            dropout=0.0,
            attention_dropout=0.0,
            activation_dropout=0.0,
            use_cache=False,
        ),
        lambda: {
            "input_ids": ids(4, 8, 0),
            "attention_mask": padded(2, 8, left=True),
            "encoder_hidden_states": noise(2, 5, 32, seed=1),
            "encoder_attention_mask": padded(2, 5),
        },
    ),
    Case(
        "pix2struct",
        "maximum with finfo.min, relative bias, cross",
        6,
        transformer(
            "Pix2StructForConditionalGeneration",
            "Pix2StructConfig",
            text_config={
                "vocab_size": 64,
                "hidden_size": 32,
                "d_kv": 8,
                "d_ff": 48,
                "num_layers": 2,
                "num_heads": 4,
                "dropout_rate": 0.0,
                "use_cache": False,
                "encoder_hidden_size": 32,
            },
            vision_config={
                "hidden_size": 32,
                "patch_embed_hidden_size": 12,
                "d_ff": 48,
                "d_kv": 8,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "dropout_rate": 0.0,
                "attention_dropout": 0.0,
            },
        ),
        lambda: {
            "flattened_patches": torch.cat(
                [torch.arange(1, 11).expand(2, 10)[..., None].expand(2, 10, 2).float(), noise(2, 10, 12, seed=0)],
                dim=-1,
            ),
            "attention_mask": padded(2, 10),
            "decoder_input_ids": ids(2, 8, 1),
        },
    ),
)
