"""Real model classes in small configurations with random weights, shared by tests and benchmarks.

Each entry says how many attentions the model has: the number is counted from its configuration, not from what is found.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

__all__ = ["NO_DROPOUT", "TOKENS", "ZOO", "Entry", "hidden", "ids", "noise", "padded", "text", "transformer"]


@dataclass(frozen=True)
class Entry:
    """``build`` makes the model, ``inputs(length, seed)`` its keyword arguments; ``output`` picks a tensor."""

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[int, int], dict[str, Any]]
    sites: int
    output: Callable[[Any], torch.Tensor]
    lengths: tuple[int, ...] = (12, 16, 20)

    def run(self, model: Callable[..., Any], length: int = 0, seed: int = 0) -> torch.Tensor:
        return self.output(model(**self.inputs(length or self.lengths[0], seed)))


def ids(batch: int, length: int, seed: int, vocabulary: int = 64) -> torch.Tensor:
    return torch.randint(3, vocabulary, (batch, length), generator=torch.Generator().manual_seed(seed))


def padded(batch: int, length: int, *, left: bool = False) -> torch.Tensor:
    """An attention mask whose rows are padded by 0, 1, 2, ... tokens."""
    position = torch.arange(length)
    padding = torch.arange(batch)[:, None]
    return ((position >= padding) if left else (position < length - padding)).long()


def noise(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def text(length: int, seed: int) -> dict[str, Any]:
    return {"input_ids": ids(2, length, seed), "attention_mask": padded(2, length)}


def transformer(name: str, config: str, **settings: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import transformers

        torch.manual_seed(0)
        configuration = getattr(transformers, config)(**settings)
        configuration._attn_implementation = "eager"
        model: nn.Module = getattr(transformers, name)._from_config(configuration, attn_implementation="eager")
        return model.eval()

    return build


TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def hidden(output: Any) -> torch.Tensor:
    result: torch.Tensor = output.last_hidden_state
    return result


def _unet() -> nn.Module:
    from diffusers import UNet2DConditionModel
    from diffusers.models.attention_processor import AttnProcessor

    torch.manual_seed(0)
    model: Any = UNet2DConditionModel(  # type: ignore[no-untyped-call]
        sample_size=16,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=24,
        attention_head_dim=8,
        norm_num_groups=8,
    )
    model.set_attn_processor(AttnProcessor())
    unet: nn.Module = model.eval()
    return unet


def _unet_inputs(length: int, seed: int) -> dict[str, Any]:
    return {
        "sample": noise(2, 4, length, length, seed=seed),
        "timestep": torch.tensor(7),
        "encoder_hidden_states": noise(2, 7, 24, seed=seed + 1),
    }


ZOO: tuple[Entry, ...] = (
    Entry(
        "bert",
        transformer(
            "BertModel",
            "BertConfig",
            vocab_size=64,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=48,
            max_position_embeddings=64,
            **NO_DROPOUT,
        ),
        text,
        2,
        hidden,
    ),
    Entry(
        "gpt2",
        transformer(
            "GPT2Model",
            "GPT2Config",
            vocab_size=64,
            n_embd=32,
            n_layer=2,
            n_head=4,
            n_positions=64,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            use_cache=False,
        ),
        text,
        2,
        hidden,
    ),
    Entry(
        "llama",
        transformer(
            "LlamaModel",
            "LlamaConfig",
            vocab_size=64,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=48,
            max_position_embeddings=64,
            use_cache=False,
        ),
        lambda length, seed: {"input_ids": ids(2, length, seed), "attention_mask": padded(2, length, left=True)},
        2,
        hidden,
    ),
    Entry(
        "t5",
        transformer(
            "T5Model",
            "T5Config",
            vocab_size=64,
            d_model=32,
            d_kv=8,
            d_ff=48,
            num_layers=2,
            num_decoder_layers=2,
            num_heads=4,
            dropout_rate=0.0,
            use_cache=False,
        ),
        lambda length, seed: {**text(length, seed), "decoder_input_ids": ids(2, length - 4, seed + 1)},
        6,
        hidden,
    ),
    Entry(
        "vit",
        transformer(
            "ViTModel",
            "ViTConfig",
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=48,
            image_size=32,
            patch_size=8,
            **NO_DROPOUT,
        ),
        lambda length, seed: {"pixel_values": noise(length // 4, 3, 32, 32, seed=seed)},
        2,
        hidden,
    ),
    Entry(
        "clip-text",
        transformer(
            "CLIPTextModel",
            "CLIPTextConfig",
            vocab_size=64,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=48,
            max_position_embeddings=64,
            **TOKENS,
        ),
        text,
        2,
        hidden,
    ),
    Entry(
        "whisper",
        transformer(
            "WhisperModel",
            "WhisperConfig",
            vocab_size=64,
            d_model=32,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=48,
            decoder_ffn_dim=48,
            num_mel_bins=8,
            max_source_positions=20,
            max_target_positions=32,
            decoder_start_token_id=1,
            dropout=0.0,
            use_cache=False,
            **TOKENS,
        ),
        lambda length, seed: {
            "input_features": noise(2, 8, 40, seed=seed),
            "decoder_input_ids": ids(2, length, seed + 1),
        },
        6,
        hidden,
    ),
    # 1 block down, 1 in the middle, 2 up, each with self and cross attention.
    Entry("unet", _unet, _unet_inputs, 8, lambda output: output.sample, lengths=(8, 12, 16)),
)
