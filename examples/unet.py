"""A UNet in the style of Stable Diffusion from diffusers, with its ``AttnProcessor``: self and cross attention."""

from __future__ import annotations

from typing import Any

import torch
from compare import Example, main
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import nn


def build(size: str) -> tuple[nn.Module, dict[str, Any]]:
    channels, layers, side = {"small": ((64,), 1, 48), "base": ((320, 640, 1280, 1280), 2, 64)}[size]
    levels = len(channels)
    # As in Stable Diffusion 1.5, the deepest of four levels has no attention.
    plain = levels == 4
    model: Any = UNet2DConditionModel(  # type: ignore[no-untyped-call]
        sample_size=side,
        block_out_channels=channels,
        layers_per_block=layers,
        down_block_types=("CrossAttnDownBlock2D",) * (levels - plain) + ("DownBlock2D",) * plain,
        # Inductor takes a while for a UNet: the small one is a level down and up without a middle.
        mid_block_type="UNetMidBlock2DCrossAttn" if levels > 1 else None,
        up_block_types=("UpBlock2D",) * plain + ("CrossAttnUpBlock2D",) * (levels - plain),
        cross_attention_dim=768,
        attention_head_dim=8,
    )
    model.set_attn_processor(AttnProcessor())
    inputs = {
        "sample": torch.randn(1, 4, side, side),
        "timestep": torch.tensor(500),
        "encoder_hidden_states": torch.randn(1, 77, 768),
    }
    return model, inputs


EXAMPLE = Example("UNet", build)

if __name__ == "__main__":
    main([EXAMPLE])
