"""Whole models of diffusers, small, with the processors that the table is about.

Sites are counted by hand from the configuration; slices of one attention count as one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from tests.processors.case import DATA_SIZES, Model
from tests.processors.hosts import rotation
from tests.processors.state import made
from tests.support.zoo import noise, padded

__all__ = ["MODELS"]


def _model(name: str, **settings: Any) -> Any:
    import diffusers

    torch.manual_seed(0)
    return getattr(diffusers, name)(**settings)


# Down: a block with attention and one without, one layer each; the middle; up: the same, two layers each.
# 1 + 1 + 2 transformers of a self and a cross attention.
_SD: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 24,
    "attention_head_dim": 8,
    "norm_num_groups": 8,
}


def _unet(change: Callable[[Any], None] = lambda model: None, **more: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        model = _model("UNet2DConditionModel", **{**_SD, **more})
        change(model)
        result: nn.Module = model
        return result

    return build


def _sample(batch: int = 2, **more: Any) -> Callable[[], dict[str, Any]]:
    return lambda: {
        "sample": noise(batch, 4, 8, 8, seed=0),
        "timestep": torch.tensor(7),
        "encoder_hidden_states": noise(batch, 7, 24, seed=1),
        "return_dict": False,
        **more,
    }


def _set(name: str, own: str = "", **settings: Any) -> Callable[[Any], None]:
    """One processor in all attentions, or in the self attentions (``own`` is "attn1") alone."""

    def change(model: Any) -> None:
        processors = dict(model.attn_processors)
        for path in processors:
            if own in path:
                processors[path] = made(name, **settings)
        model.set_attn_processor(processors)

    return change


def _sliced(model: Any) -> None:
    model.set_attention_slice("max")


def _with_ip_adapter(name: str) -> Callable[[Any], None]:
    """As ``load_ip_adapter`` does: the processor in cross attention, and a projection of the image's features."""

    def change(model: Any) -> None:
        from diffusers.models.embeddings import ImageProjection, MultiIPAdapterImageProjection

        processors = {}
        for path, processor in model.attn_processors.items():
            processors[path] = processor
            if "attn2" in path:
                module = model.get_submodule(path.removesuffix(".processor"))
                processors[path] = made(name, hidden_size=module.inner_dim, cross_attention_dim=24, scale=0.6)
        model.set_attn_processor(processors)
        projection = ImageProjection(image_embed_dim=20, cross_attention_dim=24, num_image_text_embeds=4)
        model.encoder_hid_proj = MultiIPAdapterImageProjection([projection])
        model.config.encoder_hid_dim_type = "ip_image_proj"

    return change


def _transformer(
    name: str, change: Callable[[Any], None] = lambda model: None, **settings: Any
) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        model = _model(name, **settings)
        change(model)
        result: nn.Module = model
        return result

    return build


def _sd3() -> dict[str, Any]:
    return {
        "hidden_states": noise(2, 4, 8, 8, seed=0),
        "encoder_hidden_states": noise(2, 7, 24, seed=1),
        "pooled_projections": noise(2, 20, seed=2),
        "timestep": torch.tensor([3, 7]),
        "return_dict": False,
    }


_SD3: dict[str, Any] = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 2,
    "attention_head_dim": 8,
    "num_attention_heads": 4,
    "joint_attention_dim": 24,
    "caption_projection_dim": 32,
    "pooled_projection_dim": 20,
    "pos_embed_max_size": 8,
}


def _flux() -> dict[str, Any]:
    positions = torch.stack([torch.zeros(12), torch.arange(12) // 4, torch.arange(12) % 4], dim=1)
    return {
        "hidden_states": noise(2, 12, 16, seed=0),
        "encoder_hidden_states": noise(2, 7, 24, seed=1),
        "pooled_projections": noise(2, 20, seed=2),
        "timestep": torch.tensor([0.3, 0.7]),
        "img_ids": positions,
        "txt_ids": torch.zeros(7, 3),
        "return_dict": False,
    }


def _video(channels: int, frames: int = 2, size: int = 4) -> torch.Tensor:
    return noise(2, channels, frames, size, size, seed=0)


def _cogvideox() -> dict[str, Any]:
    return {
        "hidden_states": _video(4).transpose(1, 2),
        "encoder_hidden_states": noise(2, 7, 24, seed=1),
        "timestep": torch.tensor([3, 7]),
        "image_rotary_emb": rotation(8, 8),
        "return_dict": False,
    }


def _hunyuan(batch: int = 2) -> dict[str, Any]:
    return {
        "hidden_states": noise(batch, 4, 8, 8, seed=0),
        "timestep": torch.arange(batch).float(),
        "encoder_hidden_states": noise(batch, 7, 24, seed=1),
        "text_embedding_mask": padded(batch, 7),
        "encoder_hidden_states_t5": noise(batch, 5, 32, seed=2),
        "text_embedding_mask_t5": padded(batch, 5),
        "image_meta_size": torch.arange(6.0).repeat(batch, 1),
        "style": torch.zeros(batch, dtype=torch.long),
        "image_rotary_emb": rotation(16, 8),
        "return_dict": False,
    }


_HUNYUAN: dict[str, Any] = {
    "num_attention_heads": 4,
    "attention_head_dim": 8,
    "in_channels": 4,
    "patch_size": 2,
    "sample_size": 8,
    "hidden_size": 32,
    "num_layers": 2,
    "cross_attention_dim": 24,
    "cross_attention_dim_t5": 32,
    "pooled_projection_dim": 16,
    "text_len": 7,
    "text_len_t5": 5,
}


def _lumina() -> dict[str, Any]:
    from diffusers.models import embeddings

    rotated: Callable[..., Any] = embeddings.get_2d_rotary_pos_embed_lumina

    return {
        "hidden_states": noise(2, 4, 8, 8, seed=0),
        "timestep": torch.tensor([0.3, 0.7]),
        "encoder_hidden_states": noise(2, 7, 24, seed=1),
        "encoder_mask": padded(2, 7),
        "image_rotary_emb": rotated(8, 8, 8),
        "cross_attention_kwargs": {},
        "return_dict": False,
    }


def _mochi() -> dict[str, Any]:
    return {
        "hidden_states": _video(4),
        "encoder_hidden_states": noise(2, 7, 24, seed=1),
        "timestep": torch.tensor([3, 7]),
        "encoder_attention_mask": padded(2, 7).bool(),
        "return_dict": False,
    }


def _allegro() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    positions = [torch.randint(4, (2, 8), generator=generator) for _ in range(3)]
    return {
        "hidden_states": _video(4),
        "encoder_hidden_states": noise(2, 1, 7, 24, seed=1),
        "timestep": torch.tensor([3, 7]),
        "attention_mask": torch.ones(2, 2, 4, 4),
        "encoder_attention_mask": padded(2, 7),
        "image_rotary_emb": ([rotation(4, 4, interleaved=False) for _ in range(3)], positions),
        "return_dict": False,
    }


def _stable_audio() -> dict[str, Any]:
    return {
        "hidden_states": noise(2, 4, 12, seed=0),
        "timestep": torch.tensor([3, 7]),
        "encoder_hidden_states": noise(2, 7, 20, seed=1),
        "global_hidden_states": noise(2, 1, 16, seed=2),
        "rotary_embedding": rotation(13, 4, interleaved=False),
        "return_dict": False,
    }


def _captioned(batch: int = 2, channels: int = 4, **more: Any) -> Callable[[], dict[str, Any]]:
    return lambda: {
        "hidden_states": noise(batch, channels, 8, 8, seed=0),
        "encoder_hidden_states": noise(batch, 7, 24, seed=1),
        "timestep": torch.arange(batch),
        "encoder_attention_mask": padded(batch, 7),
        "return_dict": False,
        **more,
    }


_SANA: dict[str, Any] = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 4,
    "attention_head_dim": 8,
    "num_layers": 2,
    "num_cross_attention_heads": 2,
    "cross_attention_head_dim": 16,
    "cross_attention_dim": 32,
    "caption_channels": 24,
    "sample_size": 8,
}


def _wan() -> dict[str, Any]:
    return {
        "hidden_states": _video(4),
        "timestep": torch.tensor([3, 7]),
        "encoder_hidden_states": noise(2, 7, 24, seed=1),
        "return_dict": False,
    }


def _wan_image() -> dict[str, Any]:
    # The image's tokens before the text's: the model takes all but the last 512 for them.
    return {
        **_wan(),
        "encoder_hidden_states": noise(2, 512, 24, seed=1),
        "encoder_hidden_states_image": noise(2, 5, 20, seed=2),
    }


_WAN: dict[str, Any] = {
    "num_attention_heads": 4,
    "attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 24,
    "freq_dim": 16,
    "ffn_dim": 48,
    "num_layers": 2,
    "rope_max_seq_len": 16,
}


def _qwen() -> dict[str, Any]:
    return {
        "hidden_states": noise(2, 12, 16, seed=0),
        "encoder_hidden_states": noise(2, 7, 24, seed=1),
        "encoder_hidden_states_mask": padded(2, 7).bool(),
        "timestep": torch.tensor([0.3, 0.7]),
        "img_shapes": [[(1, 3, 4)]] * 2,
        "return_dict": False,
    }


def _models() -> tuple[Model, ...]:
    def case(
        name: str,
        form: str,
        sites: int,
        build: Callable[[], nn.Module],
        inputs: Callable[[], dict[str, Any]],
        **allowed: int,
    ) -> Model:
        return Model(name, sites, build, lambda seed: inputs(), allowed, (0,), form=form)

    xl: dict[str, Any] = {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 68,
        "transformer_layers_per_block": (2, 1),
        "use_linear_projection": True,
    }
    xl_inputs = _sample(
        added_cond_kwargs={"text_embeds": noise(2, 20, seed=2), "time_ids": torch.arange(6.0).repeat(2, 1)}
    )
    image_embeds = {"image_embeds": [noise(2, 1, 20, seed=2)]}
    sana = _captioned()
    pixart: dict[str, Any] = {
        "num_attention_heads": 4,
        "attention_head_dim": 8,
        "num_layers": 2,
        "cross_attention_dim": 32,
        "sample_size": 8,
        "caption_channels": 24,
        "norm_num_groups": 8,
    }
    mochi: dict[str, Any] = {
        "num_attention_heads": 4,
        "attention_head_dim": 8,
        "num_layers": 2,
        "pooled_projection_dim": 16,
        "in_channels": 4,
        "text_embed_dim": 24,
        "time_embed_dim": 16,
        "max_sequence_length": 7,
    }
    return (
        case("sd-unet", "AttnProcessor", 8, _unet(_set("AttnProcessor")), _sample()),
        case("sd-unet-2_0", "AttnProcessor2_0", 8, _unet(), _sample()),
        case(
            "sd-unet-sliced",
            'set_attention_slice("max")',
            8,
            _unet(_sliced),
            _sample(),
            slice_scatter=0,
            scaled_dot_product_attention=8,
        ),
        # The first transformer of each of down and up has two blocks; the middle has one.
        case("sdxl-unet", "AttnProcessor2_0", 14, _unet(**xl), xl_inputs),
        # As many products with weights as without the perturbation.
        case(
            "sd-unet-pag",
            "PAGIdentitySelfAttnProcessor2_0 in self attention",
            8,
            _unet(_set("PAGIdentitySelfAttnProcessor2_0", "attn1")),
            _sample(2),
            linear=50,
        ),
        case(
            "sd-unet-pag-cfg",
            "PAGCFGIdentitySelfAttnProcessor2_0 in self attention",
            8,
            _unet(_set("PAGCFGIdentitySelfAttnProcessor2_0", "attn1")),
            _sample(3),
            linear=50,
        ),
        case(
            "text-to-video-zero",
            "CrossFrameAttnProcessor, 4 frames",
            8,
            _unet(_set("CrossFrameAttnProcessor", batch_size=2)),
            _sample(8),
            index=0,
        ),
        case(
            "text-to-video-zero-2_0",
            "CrossFrameAttnProcessor2_0, 4 frames",
            8,
            _unet(_set("CrossFrameAttnProcessor2_0", batch_size=2)),
            _sample(8),
            index=0,
        ),
        # The 4 cross attentions are two each.
        case(
            "ip-adapter-unet",
            "IPAdapterAttnProcessor",
            12,
            _unet(_with_ip_adapter("IPAdapterAttnProcessor")),
            _sample(added_cond_kwargs=image_embeds),
        ),
        case(
            "ip-adapter-unet-2_0",
            "IPAdapterAttnProcessor2_0",
            12,
            _unet(_with_ip_adapter("IPAdapterAttnProcessor2_0")),
            _sample(added_cond_kwargs=image_embeds),
        ),
        case("sd3", "JointAttnProcessor2_0", 2, _transformer("SD3Transformer2DModel", **_SD3), _sd3),
        # The first block has an attention of the image alone besides.
        case(
            "sd3-dual",
            "JointAttnProcessor2_0 with rms norm, dual attention",
            3,
            _transformer("SD3Transformer2DModel", **_SD3, qk_norm="rms_norm", dual_attention_layers=(0,)),
            _sd3,
        ),
        # The second of the batch is perturbed: two attentions in each block.
        case(
            "sd3-pag",
            "PAGJointAttnProcessor2_0",
            4,
            _transformer("SD3Transformer2DModel", _set("PAGJointAttnProcessor2_0"), **_SD3),
            _sd3,
            zeros=0,
        ),
        case(
            "flux",
            "FluxAttnProcessor",
            3,
            _transformer(
                "FluxTransformer2DModel",
                in_channels=16,
                num_layers=1,
                num_single_layers=2,
                attention_head_dim=8,
                num_attention_heads=4,
                joint_attention_dim=24,
                pooled_projection_dim=20,
                axes_dims_rope=(2, 2, 4),
            ),
            _flux,
        ),
        case(
            "auraflow",
            "AuraFlowAttnProcessor2_0",
            3,
            _transformer(
                "AuraFlowTransformer2DModel",
                sample_size=8,
                num_mmdit_layers=1,
                num_single_dit_layers=2,
                attention_head_dim=8,
                num_attention_heads=4,
                joint_attention_dim=24,
                caption_projection_dim=32,
                pos_embed_max_size=16,
            ),
            lambda: {
                "hidden_states": noise(2, 4, 8, 8, seed=0),
                "encoder_hidden_states": noise(2, 7, 24, seed=1),
                "timestep": torch.tensor([0.3, 0.7]),
                "return_dict": False,
            },
        ),
        case(
            "cogvideox",
            "CogVideoXAttnProcessor2_0",
            2,
            _transformer(
                "CogVideoXTransformer3DModel",
                num_attention_heads=4,
                attention_head_dim=8,
                in_channels=4,
                out_channels=4,
                time_embed_dim=16,
                text_embed_dim=24,
                num_layers=2,
                sample_width=4,
                sample_height=4,
                sample_frames=5,
                max_text_seq_length=7,
                use_rotary_positional_embeddings=True,
            ),
            _cogvideox,
        ),
        # Self and cross attention in each block; the text is pooled by an attention with one query.
        case("hunyuan-dit", "HunyuanAttnProcessor2_0", 5, _transformer("HunyuanDiT2DModel", **_HUNYUAN), _hunyuan),
        case(
            "hunyuan-dit-pag",
            "PAGHunyuanAttnProcessor2_0 in self attention",
            5,
            _transformer("HunyuanDiT2DModel", _set("PAGHunyuanAttnProcessor2_0", "attn1"), **_HUNYUAN),
            _hunyuan,
            linear=34,
        ),
        case(
            "lumina",
            "LuminaAttnProcessor2_0",
            4,
            _transformer(
                "LuminaNextDiT2DModel",
                sample_size=8,
                hidden_size=32,
                num_layers=2,
                num_attention_heads=4,
                num_kv_heads=2,
                multiple_of=8,
                cross_attention_dim=24,
            ),
            _lumina,
        ),
        # Two prompts in each of two blocks, and the pooling of the text.
        replace(
            case("mochi", "MochiAttnProcessor2_0", 5, _transformer("MochiTransformer3DModel", **mochi), _mochi),
            dynamo=DATA_SIZES,
        ),
        case(
            "allegro",
            "AllegroAttnProcessor2_0",
            4,
            _transformer(
                "AllegroTransformer3DModel",
                num_attention_heads=4,
                attention_head_dim=12,
                num_layers=2,
                cross_attention_dim=48,
                sample_height=4,
                sample_width=4,
                sample_frames=2,
                caption_channels=24,
            ),
            _allegro,
        ),
        case(
            "stable-audio-dit",
            "StableAudioAttnProcessor2_0",
            4,
            _transformer(
                "StableAudioDiTModel",
                sample_size=16,
                in_channels=4,
                num_layers=2,
                attention_head_dim=8,
                num_attention_heads=4,
                num_key_value_attention_heads=2,
                out_channels=4,
                cross_attention_dim=16,
                time_proj_dim=8,
                global_states_input_dim=16,
                cross_attention_input_dim=20,
            ),
            _stable_audio,
        ),
        # Linear self attention and cross attention in each of two blocks.
        case("sana", "SanaLinearAttnProcessor2_0", 4, _transformer("SanaTransformer2DModel", **_SANA), sana),
        case(
            "sana-pag",
            "PAGIdentitySanaLinearAttnProcessor2_0 in self attention",
            4,
            _transformer("SanaTransformer2DModel", _set("PAGIdentitySanaLinearAttnProcessor2_0", "attn1"), **_SANA),
            sana,
            linear=22,
        ),
        case(
            "pixart",
            "AttnProcessor2_0",
            4,
            _transformer("PixArtTransformer2DModel", **pixart),
            _captioned(added_cond_kwargs={"resolution": None, "aspect_ratio": None}),
        ),
        case("wan", "WanAttnProcessor", 4, _transformer("WanTransformer3DModel", **_WAN), _wan),
        # Cross attention to the text and to the image.
        case(
            "wan-image",
            "WanAttnProcessor with an image",
            6,
            _transformer("WanTransformer3DModel", **_WAN, image_dim=20, added_kv_proj_dim=48),
            _wan_image,
        ),
        case(
            "qwen-image",
            "QwenDoubleStreamAttnProcessor2_0",
            2,
            _transformer(
                "QwenImageTransformer2DModel",
                in_channels=16,
                out_channels=4,
                num_layers=2,
                attention_head_dim=8,
                num_attention_heads=4,
                joint_attention_dim=24,
                axes_dims_rope=(2, 2, 4),
            ),
            _qwen,
        ),
    )


MODELS: Mapping[str, Model] = {model.name: model for model in _models()}
