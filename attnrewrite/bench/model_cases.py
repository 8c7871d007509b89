"""The models of ``attnrewrite bench models``: real classes, random weights, their attention written out."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from attnrewrite.errors import AttnRewriteError

__all__ = ["MODELS", "ModelCase", "bert", "llama", "vit", "with_own_sdpa"]

Made = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]
"""A model, its arguments and its keyword arguments."""


@dataclass(frozen=True)
class ModelCase:
    """A model to measure.

    Attributes:
        name: as the table shows it.
        build: gives the model, with its attention written out and without dropout, and its arguments and keyword
            arguments; those of :data:`MODELS` on the CPU, in float32.
        half: the dtype that the model is measured in on a GPU.
    """

    name: str
    build: Callable[[], Made]
    half: torch.dtype = torch.bfloat16


def with_own_sdpa(model: Any) -> nn.Module | None:
    """The model, on its own path through ``scaled_dot_product_attention``; None if it is known to have none.

    It is changed in place: a model of transformers gets ``attn_implementation="sdpa"``, one of diffusers its default
    attention processors.
    """
    if hasattr(model, "set_attn_implementation"):
        try:
            model.set_attn_implementation("sdpa")
        except ValueError:  # It has none, and says so: Gemma 2 in transformers 5.24.
            return None
    elif hasattr(model, "set_default_attn_processor"):
        model.set_default_attn_processor()
    else:
        return None
    return model  # type: ignore[no-any-return]


def _package(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        words = f"this model is one of {name}, which is not installed: pip install 'attnrewrite[examples]'"
        raise AttnRewriteError(words) from error


def _of_transformers(kind: str, config: str, **settings: Any) -> nn.Module:
    transformers = _package("transformers")
    made = getattr(transformers, config)(**settings)
    made._attn_implementation = "eager"
    model: nn.Module = getattr(transformers, kind)(made)
    return model


def _tokens(batch: int, length: int) -> Tensor:
    return torch.randint(1000, (batch, length), generator=torch.Generator().manual_seed(0))


def _gpt2(width: int, layers: int, batch: int, length: int) -> Made:
    model = _of_transformers(
        "GPT2Model",
        "GPT2Config",
        vocab_size=1000,
        n_embd=width,
        n_layer=layers,
        n_head=width // 64,
        n_positions=length,
        bos_token_id=0,
        eos_token_id=0,
        use_cache=False,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    return model, (), {"input_ids": _tokens(batch, length)}


def bert(width: int, layers: int, batch: int, length: int) -> Made:
    model = _of_transformers(
        "BertModel",
        "BertConfig",
        vocab_size=1000,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        intermediate_size=4 * width,
        max_position_embeddings=length,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    # Padded on the right by 0, 1/8, 2/8, ... of the length.
    kept = length - length // 8 * (torch.arange(batch) % 8)
    mask = (torch.arange(length) < kept[:, None]).long()
    return model, (), {"input_ids": _tokens(batch, length), "attention_mask": mask}


def _t5(width: int, layers: int, batch: int, length: int) -> Made:
    model = _of_transformers(
        "T5EncoderModel",
        "T5Config",
        d_model=width,
        d_kv=64,
        num_heads=width // 64,
        d_ff=4 * width,
        num_layers=layers,
        vocab_size=1000,
        dropout_rate=0.0,
    )
    return model, (), {"input_ids": _tokens(batch, length)}


def _of_images(kind: str, width: int, layers: int, batch: int, side: int, patch: int) -> Made:
    model = _of_transformers(
        f"{kind}Model",
        f"{kind}Config",
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        intermediate_size=4 * width,
        image_size=side,
        patch_size=patch,
    )
    pixels = torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(0))
    return model, (), {"pixel_values": pixels}


def _clip(width: int, layers: int, batch: int, side: int) -> Made:
    return _of_images("CLIPVision", width, layers, batch, side, 14)


def vit(width: int, layers: int, batch: int, side: int) -> Made:
    return _of_images("ViT", width, layers, batch, side, 16)


def llama(width: int, layers: int, batch: int, length: int) -> Made:
    model = _of_transformers(
        "LlamaModel",
        "LlamaConfig",
        vocab_size=1000,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 256,
        intermediate_size=4 * width,
        max_position_embeddings=length,
        use_cache=False,
    )
    return model, (), {"input_ids": _tokens(batch, length)}


def _gemma2(width: int, layers: int, batch: int, length: int) -> Made:
    model = _of_transformers(
        "Gemma2Model",
        "Gemma2Config",
        vocab_size=1000,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=256,
        intermediate_size=4 * width,
        max_position_embeddings=length,
        use_cache=False,
    )
    return model, (), {"input_ids": _tokens(batch, length)}


def _unet(channels: tuple[int, ...], layers: int, batch: int, side: int) -> Made:
    diffusers = _package("diffusers")
    processors = _package("diffusers.models.attention_processor")
    levels = len(channels)
    # As in Stable Diffusion 1.5, the deepest of four levels has no attention.
    plain = levels == 4
    model: Any = diffusers.UNet2DConditionModel(
        sample_size=side,
        block_out_channels=channels,
        layers_per_block=layers,
        down_block_types=("CrossAttnDownBlock2D",) * (levels - plain) + ("DownBlock2D",) * plain,
        up_block_types=("UpBlock2D",) * plain + ("CrossAttnUpBlock2D",) * (levels - plain),
        cross_attention_dim=768,
        attention_head_dim=8,
    )
    model.set_attn_processor(processors.AttnProcessor())
    generator = torch.Generator().manual_seed(0)
    return (
        model,
        (),
        {
            "sample": torch.randn(batch, 4, side, side, generator=generator),
            "timestep": torch.tensor(500),
            "encoder_hidden_states": torch.randn(batch, 77, 768, generator=generator),
        },
    )


MODELS: dict[str, dict[str, ModelCase]] = {
    "base": {
        "gpt2": ModelCase("GPT-2 medium width, 12 layers, 8 x 1024", lambda: _gpt2(1024, 12, 8, 1024)),
        "bert": ModelCase("BERT large width, 12 layers, 4 x 2048, padded", lambda: bert(1024, 12, 4, 2048)),
        "t5": ModelCase("T5 large encoder, 12 layers, 4 x 2048", lambda: _t5(1024, 12, 4, 2048)),
        "clip": ModelCase("CLIP L at 336, 12 layers, 32 images", lambda: _clip(1024, 12, 32, 336)),
        "llama": ModelCase("Llama 1B width, 8 layers, 1 x 4096", lambda: llama(2048, 8, 1, 4096)),
        "gemma2": ModelCase("Gemma 2 2B width, 8 layers, 1 x 4096", lambda: _gemma2(2304, 8, 1, 4096)),
        "unet": ModelCase(
            "UNet of Stable Diffusion 1.5, 2 x 64 x 64", lambda: _unet((320, 640, 1280, 1280), 2, 2, 64), torch.float16
        ),
    },
    "small": {
        "gpt2": ModelCase("GPT-2, 1 layer, 2 x 64", lambda: _gpt2(128, 1, 2, 64)),
        "bert": ModelCase("BERT, 1 layer, 2 x 64, padded", lambda: bert(128, 1, 2, 64)),
        "t5": ModelCase("T5 encoder, 1 layer, 2 x 64", lambda: _t5(128, 1, 2, 64)),
        "clip": ModelCase("CLIP at 56, 1 layer, 2 images", lambda: _clip(128, 1, 2, 56)),
        "llama": ModelCase("Llama, 1 layer, 1 x 64", lambda: llama(256, 1, 1, 64)),
        "gemma2": ModelCase("Gemma 2, 1 layer, 1 x 64", lambda: _gemma2(128, 1, 1, 64)),
        "unet": ModelCase("UNet, 1 level, 1 x 8 x 8", lambda: _unet((32,), 1, 1, 8), torch.float16),
    },
}
"""The models by size and by the name that the command line takes."""
