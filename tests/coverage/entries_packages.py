"""Models of other packages with attention code of their own, told to take it where they have a faster one as well."""

from __future__ import annotations

import importlib
from argparse import Namespace
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from tests.coverage.absent import stand_in_for
from tests.coverage.case import Case, from_zoo
from tests.support.zoo import ids, noise, padded

__all__ = ["CASES"]


def _made(path: str, *, without: tuple[str, ...] = (), **settings: Any) -> Callable[[], nn.Module]:
    """The class ``path`` ("package.module:Class") with these settings."""

    def build() -> nn.Module:
        model: nn.Module = _named(path, *without)(**settings)
        return model

    return build


def _named(path: str, *without: str) -> Any:
    stand_in_for(*without)
    torch.manual_seed(0)
    module, name = path.split(":")
    return getattr(importlib.import_module(module), name)


def _image(name: str, size: int = 32) -> Callable[[], dict[str, Any]]:
    return lambda: {name: noise(2, 3, size, size, seed=0)}


def _tokens(name: str, mask: str = "") -> Callable[[], dict[str, Any]]:
    """``mask`` is True for tokens that are attended to."""
    return lambda: {name: ids(2, 12, 0), **({mask: padded(2, 12).bool()} if mask else {})}


def _naive(model: Any, processor: str) -> nn.Module:
    """A model of diffusers with another processor in every attention."""
    from diffusers.models import attention_processor

    for module in model.modules():
        if isinstance(module, attention_processor.Attention):
            module.set_processor(getattr(attention_processor, processor)())
    result: nn.Module = model
    return result


def _diffusers(name: str, processor: str = "AttnProcessor", **settings: Any) -> Callable[[], nn.Module]:
    return lambda: _naive(_named(f"diffusers:{name}")(**settings), processor)


def _x_transformer(layers: str, **settings: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        attention = _named(f"x_transformers:{layers}")(dim=32, depth=2, heads=4, attn_dim_head=8, **settings)
        return _made("x_transformers:TransformerWrapper", num_tokens=64, max_seq_len=32, attn_layers=attention)()

    return build


def _timm(path: str, **settings: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        _named("timm.layers:set_fused_attn", "torchvision")(False)
        return _made(path, **settings)()

    return build


def _mvit() -> nn.Module:
    config = _named("timm.models.mvitv2:MultiScaleVitCfg", "torchvision")
    cfg = config(depths=(1, 1), embed_dim=16, num_heads=2)
    return _made("timm.models.mvitv2:MultiScaleVit", cfg=cfg, img_size=32, num_classes=5)()


def _whisper() -> nn.Module:
    module = importlib.import_module(_named("whisper.model:MultiHeadAttention", "numba", "tiktoken").__module__)
    module.MultiHeadAttention.use_sdpa = False
    return _made("whisper.model:Whisper", dims=module.ModelDimensions(8, 20, 32, 4, 2, 64, 32, 32, 4, 2))()


def _msa() -> nn.Module:
    alphabet = _named("esm.data:Alphabet").from_architecture("msa_transformer")
    arguments = Namespace(
        layers=2,
        embed_dim=32,
        ffn_embed_dim=48,
        attention_heads=4,
        dropout=0.0,
        attention_dropout=0.0,
        activation_dropout=0.0,
        max_tokens=2**14,
        max_positions=64,
        embed_positions_msa=True,
    )
    return _made("esm.model.msa_transformer:MSATransformer", args=arguments, alphabet=alphabet)()


def _labml(attention: str) -> nn.Module:
    parts = importlib.import_module(_named("labml_nn.transformers.models:Encoder", "labml").__module__)
    layer = parts.TransformerLayer(
        d_model=32,
        self_attn=_named(attention)(4, 32, 0.0),
        feed_forward=_named("labml_nn.transformers.feed_forward:FeedForward")(32, 48, 0.0),
        dropout_prob=0.0,
    )
    encoder: nn.Module = parts.Encoder(layer, 2)
    return encoder


def _labml_xl() -> nn.Module:
    layer = _named("labml_nn.transformers.xl:TransformerXLLayer", "labml")(
        d_model=32,
        self_attn=_named("labml_nn.transformers.xl.relative_mha:RelativeMultiHeadAttention")(4, 32, 0.0),
        feed_forward=_named("labml_nn.transformers.feed_forward:FeedForward")(32, 48, 0.0),
        dropout_prob=0.0,
    )
    return _made("labml_nn.transformers.xl:TransformerXL", layer=layer, n_layers=2)()


def _causal(length: int) -> torch.Tensor:
    return torch.ones(length, length, dtype=torch.bool).tril()[:, :, None]


def _enformer() -> nn.Module:
    model: nn.Module = _named("enformer_pytorch:Enformer", "polars", "pyfaidx").from_hparams(
        dim=48,
        depth=2,
        heads=4,
        output_heads={"human": 5},
        target_length=-1,
        attn_dim_key=8,
        num_downsamples=3,
        dim_divisible_by=4,
        use_tf_gamma=False,
    )
    return model


def _litgpt(**settings: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        config = _named("litgpt.config:Config", "lightning", "lightning_utilities", "jsonargparse")(
            block_size=32,
            n_layer=2,
            n_embd=32,
            n_head=4,
            n_query_groups=2,
            vocab_size=64,
            padded_vocab_size=64,
            intermediate_size=48,
            **settings,
        )
        return _made("litgpt.model:GPT", config=config)()

    return build


CASES: tuple[Case, ...] = (
    from_zoo("unet", "3-D baddbmm, self and cross", "diffusers"),
    # 1 in the block down, 1 in the middle, 2 in the block up: text and image in one softmax.
    Case(
        "unet-added-keys",
        "keys of text before those of the image",
        4,
        _diffusers(
            "UNet2DConditionModel",
            "AttnAddedKVProcessor",
            sample_size=8,
            block_out_channels=(16,),
            layers_per_block=1,
            down_block_types=("SimpleCrossAttnDownBlock2D",),
            mid_block_type="UNetMidBlock2DSimpleCrossAttn",
            up_block_types=("SimpleCrossAttnUpBlock2D",),
            cross_attention_dim=24,
            attention_head_dim=8,
            norm_num_groups=8,
        ),
        lambda: {
            "sample": noise(2, 4, 8, 8, seed=0),
            "timestep": torch.tensor(7),
            "encoder_hidden_states": noise(2, 7, 24, seed=1),
        },
        "diffusers",
    ),
    Case(
        "dit",
        "3-D baddbmm",
        2,
        _diffusers(
            "DiTTransformer2DModel",
            num_attention_heads=4,
            attention_head_dim=8,
            in_channels=4,
            num_layers=2,
            sample_size=8,
            patch_size=2,
            num_embeds_ada_norm=10,
        ),
        lambda: {
            "hidden_states": noise(2, 4, 8, 8, seed=0),
            "timestep": torch.tensor([3, 7]),
            "class_labels": torch.tensor([1, 2]),
        },
        "diffusers",
    ),
    Case(
        "autoencoder-kl",
        "single head over an image",
        2,
        _diffusers(
            "AutoencoderKL",
            block_out_channels=(16,),
            down_block_types=("DownEncoderBlock2D",),
            up_block_types=("UpDecoderBlock2D",),
            norm_num_groups=8,
        ),
        lambda: {"sample": noise(2, 3, 8, 8, seed=0)},
        "diffusers",
    ),
    Case(
        "x-transformers-relative",
        "T5's relative bias, padding mask",
        2,
        _x_transformer("Encoder", rel_pos_bias=True),
        _tokens("x", "mask"),
        "x-transformers",
    ),
    Case(
        "x-transformers-alibi",
        "ALiBi, GQA, causal",
        2,
        _x_transformer("Decoder", alibi_pos_bias=True, attn_kv_heads=2),
        _tokens("x", "mask"),
        "x-transformers",
    ),
    Case(
        "x-transformers-memory",
        "rotary, normalized query and key, learned keys",
        2,
        _x_transformer("Decoder", rotary_pos_emb=True, attn_qk_norm=True, attn_num_mem_kv=2),
        _tokens("x", "mask"),
        "x-transformers",
    ),
    Case(
        "x-transformers-talking-heads",
        "heads mixed before and after softmax",
        2,
        _x_transformer("Encoder", attn_pre_talking_heads=True, attn_post_talking_heads=True),
        _tokens("x", "mask"),
        "x-transformers",
    ),
    Case(
        "vit-pytorch",
        "plain",
        2,
        _made(
            "vit_pytorch.vit:ViT",
            without=("torchvision",),
            image_size=32,
            patch_size=8,
            num_classes=5,
            dim=32,
            depth=2,
            heads=4,
            mlp_dim=48,
            dim_head=8,
        ),
        _image("img"),
        "vit-pytorch",
    ),
    # 2 layers of patches and 1 of the class token.
    Case(
        "vit-pytorch-cait",
        "heads mixed before and after softmax",
        3,
        _made(
            "vit_pytorch.cait:CaiT",
            without=("torchvision",),
            image_size=32,
            patch_size=8,
            num_classes=5,
            dim=32,
            depth=2,
            cls_depth=1,
            heads=4,
            mlp_dim=48,
            dim_head=8,
        ),
        _image("img"),
        "vit-pytorch",
    ),
    Case(
        "vit-pytorch-maxvit",
        "relative bias of blocks and grids",
        2,
        _made(
            "vit_pytorch.max_vit:MaxViT",
            without=("torchvision",),
            num_classes=5,
            dim=16,
            depth=(1,),
            dim_head=8,
            dim_conv_stem=8,
            window_size=4,
        ),
        _image("x"),
        "vit-pytorch",
    ),
    # 1 of small patches, 1 of large ones, 2 across.
    Case(
        "vit-pytorch-cross-vit",
        "cross attention of one token",
        4,
        _made(
            "vit_pytorch.cross_vit:CrossViT",
            without=("torchvision",),
            image_size=32,
            num_classes=5,
            sm_dim=32,
            lg_dim=48,
            sm_patch_size=8,
            sm_enc_depth=1,
            sm_enc_heads=4,
            sm_enc_mlp_dim=48,
            sm_enc_dim_head=8,
            lg_patch_size=16,
            lg_enc_depth=1,
            lg_enc_heads=4,
            lg_enc_mlp_dim=48,
            lg_enc_dim_head=8,
            cross_attn_depth=1,
            cross_attn_heads=4,
            cross_attn_dim_head=8,
            depth=1,
        ),
        _image("img"),
        "vit-pytorch",
    ),
    Case(
        "timm-vit",
        "scaled query",
        2,
        _timm(
            "timm.models.vision_transformer:VisionTransformer",
            img_size=32,
            patch_size=8,
            embed_dim=32,
            depth=2,
            num_heads=4,
            num_classes=5,
        ),
        _image("x"),
        "timm",
    ),
    Case(
        "timm-beit",
        "relative bias",
        2,
        _timm(
            "timm.models.beit:Beit",
            img_size=32,
            patch_size=8,
            embed_dim=32,
            depth=2,
            num_heads=4,
            num_classes=5,
            use_rel_pos_bias=True,
        ),
        _image("x"),
        "timm",
    ),
    Case(
        "timm-swinv2",
        "cosine, shifted windows",
        4,
        _timm(
            "timm.models.swin_transformer_v2:SwinTransformerV2",
            img_size=32,
            patch_size=2,
            window_size=4,
            embed_dim=16,
            depths=(2, 2),
            num_heads=(2, 4),
            num_classes=5,
        ),
        _image("x"),
        "timm",
    ),
    # 2 layers of patches and 2 of the class token.
    Case(
        "timm-cait",
        "heads mixed, then attention of the class token",
        4,
        _timm(
            "timm.models.cait:Cait",
            img_size=32,
            patch_size=8,
            embed_dim=32,
            depth=2,
            num_heads=4,
            num_classes=5,
        ),
        _image("x"),
        "timm",
    ),
    Case("timm-mvitv2", "pooled query and key, decomposed relative bias", 2, _mvit, _image("x"), "timm"),
    # Cross attention and self attention, twice.
    Case(
        "perceiver-pytorch",
        "3-D einsum, masked inputs",
        4,
        _made(
            "perceiver_pytorch:Perceiver",
            num_freq_bands=2,
            depth=2,
            max_freq=4.0,
            input_channels=3,
            input_axis=1,
            num_latents=6,
            latent_dim=32,
            latent_heads=4,
            cross_dim_head=8,
            latent_dim_head=8,
            num_classes=5,
        ),
        lambda: {"data": noise(2, 10, 3, seed=0), "mask": padded(2, 10).bool()},
        "perceiver-pytorch",
    ),
    Case(
        "fair-esm2",
        "sequence first, 3-D bmm, rotary",
        2,
        _made("esm.model.esm2:ESM2", num_layers=2, embed_dim=32, attention_heads=4, alphabet="ESM-1b"),
        lambda: {"tokens": ids(2, 12, 0, 24) * padded(2, 12) + (1 - padded(2, 12))},
        "fair-esm",
    ),
    # Of rows and of columns.
    Case(
        "fair-esm-msa",
        "one softmax for all rows, columns",
        4,
        _msa,
        lambda: {"tokens": ids(6, 10, 0, 24).view(2, 3, 10)},
        "fair-esm",
    ),
    Case(
        "openai-whisper",
        "both operands scaled by a root, cross",
        6,
        _whisper,
        lambda: {"mel": noise(2, 8, 40, seed=0), "tokens": ids(2, 8, 1)},
        "openai-whisper",
    ),
    Case(
        "segment-anything-image",
        "decomposed relative bias, windows",
        2,
        _made(
            "segment_anything.modeling.image_encoder:ImageEncoderViT",
            without=("torchvision",),
            img_size=64,
            patch_size=8,
            embed_dim=32,
            depth=2,
            num_heads=4,
            out_chans=16,
            use_rel_pos=True,
            window_size=3,
            global_attn_indexes=(1,),
        ),
        _image("x", 64),
        "segment-anything",
    ),
    # Self, to the image and from the image in each of 2 layers, and a last one.
    Case(
        "segment-anything-decoder",
        "divided scores, cross both ways",
        7,
        _made(
            "segment_anything.modeling.transformer:TwoWayTransformer",
            without=("torchvision",),
            depth=2,
            embedding_dim=32,
            num_heads=4,
            mlp_dim=48,
        ),
        lambda: {
            "image_embedding": noise(2, 32, 4, 4, seed=0),
            "image_pe": noise(2, 32, 4, 4, seed=1),
            "point_embedding": noise(2, 5, 32, seed=2),
        },
        "segment-anything",
    ),
    Case(
        "enformer",
        "relative shift, value wider than key",
        2,
        _enformer,
        # One-hot: the model takes indices of a plain tensor's type alone, which the reference's are not.
        lambda: {"x": torch.nn.functional.one_hot(ids(2, 64, 0, 7) - 3, 4).float()},
        "enformer-pytorch",
    ),
    Case(
        "local-attention",
        "windows that look back, causal",
        2,
        _made(
            "local_attention:LocalTransformer",
            num_tokens=64,
            max_seq_len=32,
            dim=32,
            depth=2,
            heads=4,
            dim_head=8,
            local_attn_window_size=4,
        ),
        _tokens("x", "mask"),
        "local-attention",
    ),
    # Down, in the middle and up; the linear attention beside them has no scores.
    Case(
        "denoising-diffusion-unet",
        "learned keys over an image",
        3,
        _made(
            "denoising_diffusion_pytorch:Unet",
            without=("torchvision", "accelerate"),
            dim=16,
            dim_mults=(1, 2),
            attn_dim_head=8,
        ),
        lambda: {"x": noise(2, 3, 8, 8, seed=0), "time": torch.tensor([3, 7])},
        "denoising-diffusion-pytorch",
    ),
    # 1 at the start; 1 over time in each of 2 stages down and up; 2 in the middle.
    Case(
        "video-diffusion-unet",
        "over time with relative bias, over space",
        7,
        _made(
            "video_diffusion_pytorch:Unet3D",
            without=("torchvision",),
            dim=16,
            dim_mults=(1, 2),
            attn_heads=4,
            attn_dim_head=8,
        ),
        lambda: {"x": noise(2, 3, 4, 8, 8, seed=0), "time": torch.tensor([3, 7])},
        "video-diffusion-pytorch",
    ),
    Case(
        "conformer",
        "relative positions by einsum",
        2,
        _made("conformer:Conformer", dim=32, depth=2, dim_head=8, heads=4, conv_kernel_size=5),
        lambda: {"x": noise(2, 12, 32, seed=0)},
        "conformer",
    ),
    Case(
        "tab-transformer",
        "columns of a table, einsum",
        2,
        _made(
            "tab_transformer_pytorch:TabTransformer",
            categories=(4, 5, 6),
            num_continuous=3,
            dim=32,
            depth=2,
            heads=4,
            dim_head=8,
            num_residual_streams=1,
            mlp_act=nn.ReLU(),
        ),
        lambda: {"x_categ": ids(2, 3, 0, 7) - 3, "x_cont": noise(2, 3, seed=1)},
        "tab-transformer-pytorch",
    ),
    # Over time and over space in each of 2 layers, each once for the class token and once for the patches.
    Case(
        "timesformer-pytorch",
        "class token apart, 3-D einsum",
        8,
        _made(
            "timesformer_pytorch:TimeSformer",
            dim=32,
            num_frames=2,
            num_classes=5,
            image_size=32,
            patch_size=8,
            depth=2,
            heads=4,
            dim_head=8,
        ),
        lambda: {"video": noise(2, 2, 3, 32, 32, seed=0)},
        "timesformer-pytorch",
    ),
    Case(
        "labml-mha",
        "softmax over the second of four dimensions",
        2,
        lambda: _labml("labml_nn.transformers.mha:MultiHeadAttention"),
        lambda: {"x": noise(10, 2, 32, seed=0), "mask": _causal(10)},
        "labml-nn",
    ),
    Case(
        "labml-alibi",
        "ALiBi, heads last",
        2,
        lambda: _labml("labml_nn.transformers.alibi:AlibiMultiHeadAttention"),
        lambda: {"x": noise(10, 2, 32, seed=0), "mask": _causal(10)},
        "labml-nn",
    ),
    Case(
        "labml-transformer-xl",
        "relative shift, heads last",
        2,
        _labml_xl,
        lambda: {
            "x": noise(6, 2, 32, seed=0),
            "mem": [noise(4, 2, 32, seed=1), noise(4, 2, 32, seed=2)],
            "mask": torch.cat([torch.ones(6, 4, 1, dtype=torch.bool), _causal(6)], dim=1),
        },
        "labml-nn",
    ),
    Case(
        "litgpt-softcap",
        "soft-capping, GQA",
        2,
        _litgpt(attention_logit_softcapping=2.0),
        _tokens("idx"),
        "litgpt",
    ),
    Case(
        "rtdl-ft-transformer",
        "last layer with one query",
        2,
        _made(
            "rtdl_revisiting_models:FTTransformer",
            n_cont_features=4,
            cat_cardinalities=[3, 4],
            d_out=1,
            n_blocks=2,
            d_block=32,
            attention_n_heads=4,
            attention_dropout=0.0,
            ffn_d_hidden=48,
            ffn_d_hidden_multiplier=None,
            ffn_dropout=0.0,
            residual_dropout=0.0,
        ),
        lambda: {"x_cont": noise(2, 4, seed=0), "x_cat": torch.tensor([[0, 1], [2, 3]])},
        "rtdl-revisiting-models",
    ),
    Case(
        "bert-pytorch",
        "mask filled with -1e9",
        2,
        _made("bert_pytorch.model.bert:BERT", vocab_size=64, hidden=32, n_layers=2, attn_heads=4, dropout=0.0),
        lambda: {"x": ids(2, 12, 0) * padded(2, 12), "segment_info": torch.ones(2, 12, dtype=torch.long)},
        "bert-pytorch",
    ),
    Case(
        "monai-vit",
        "einsum, 5-D projection",
        2,
        _made(
            "monai.networks.nets.vit:ViT",
            in_channels=3,
            img_size=(32, 32),
            patch_size=(8, 8),
            hidden_size=32,
            mlp_dim=48,
            num_layers=2,
            num_heads=4,
            spatial_dims=2,
        ),
        _image("x"),
        "monai",
    ),
    # Four stages of 2 blocks.
    Case(
        "monai-swin-unetr",
        "3-D shifted windows, relative bias",
        8,
        _made(
            "monai.networks.nets.swin_unetr:SwinUNETR",
            in_channels=1,
            out_channels=2,
            feature_size=12,
            num_heads=(1, 2, 2, 4),
            window_size=(4, 4),
            spatial_dims=2,
        ),
        lambda: {"x_in": noise(1, 1, 64, 64, seed=0)},
        "monai",
    ),
)
