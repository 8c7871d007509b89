"""Diffusion models in small configurations with random weights, and the denoising loop that one writes around them.

What is compared is the loop of :func:`denoise`: a scheduler of diffusers, 30 steps, classifier-free guidance either in
one call (the two halves concatenated, unconditional first) or in two.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

__all__ = ["MODELS", "AttentionCounter", "Clock", "Model", "Streams", "denoise", "diffusers"]

diffusers: Any = importlib.import_module("diffusers")
"""Without the types of its own, which leave most of it out."""

STEPS = 30
GUIDANCE = 3.0
TEXT_TOKENS, TEXT_WIDTH = 6, 16

Inputs = Callable[[Tensor, Tensor, Tensor], dict[str, Any]]
"""(latents, timestep, text) -> the model's keyword arguments; the first dimension of all three is the batch."""
Streams = Callable[[str], contextlib.AbstractContextManager[object]]


@dataclass
class Clock:
    """The scheduler's current timestep, as a pipeline of diffusers keeps it."""

    timestep: float | None = None

    def __call__(self) -> Any:
        return self.timestep


@dataclass(frozen=True)
class Model:
    """A model, how it is called and what its configurations for the caches must say.

    Attributes:
        latents: shape of one sample's latents without its batch dimension, for each resolution.
        flow: flow matching with Euler steps; otherwise DDIM.
        pab: settings of Pyramid Attention Broadcast that every use of this model needs in diffusers.
        faster: those of FasterCache.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Inputs
    latents: tuple[tuple[int, ...], tuple[int, ...]]
    flow: bool = False
    pab: dict[str, Any] = field(default_factory=dict)
    faster: dict[str, Any] = field(default_factory=dict)

    def scheduler(self) -> Any:
        if self.flow:
            scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
        else:
            scheduler = diffusers.DDIMScheduler(clip_sample=False)
        scheduler.set_timesteps(STEPS)
        return scheduler


def _random(model: nn.Module) -> nn.Module:
    """Weights large enough that attention decides the output: a fresh model's residual branches hardly do."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(2.0)
    return model.eval()


def _cogvideox() -> nn.Module:
    torch.manual_seed(0)
    return _random(
        diffusers.CogVideoXTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=16,
            in_channels=4,
            out_channels=4,
            time_embed_dim=16,
            text_embed_dim=TEXT_WIDTH,
            num_layers=2,
            sample_width=12,
            sample_height=8,
            sample_frames=9,
            max_text_seq_length=TEXT_TOKENS,
        )
    )


def _latte() -> nn.Module:
    torch.manual_seed(0)
    return _random(
        diffusers.LatteTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=8,
            in_channels=4,
            num_layers=2,
            cross_attention_dim=16,
            attention_bias=True,
            sample_size=8,
            patch_size=2,
            activation_fn="gelu-approximate",
            norm_type="ada_norm_single",
            norm_elementwise_affine=False,
            caption_channels=TEXT_WIDTH,
            video_length=3,
        )
    )


def _wan() -> nn.Module:
    torch.manual_seed(0)
    return _random(
        diffusers.WanTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=4,
            out_channels=4,
            text_dim=TEXT_WIDTH,
            freq_dim=16,
            ffn_dim=32,
            num_layers=2,
            rope_max_seq_len=32,
        )
    )


def _flux() -> nn.Module:
    torch.manual_seed(0)
    return _random(
        diffusers.FluxTransformer2DModel(
            in_channels=4,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=TEXT_WIDTH,
            pooled_projection_dim=TEXT_WIDTH,
            axes_dims_rope=(4, 4, 8),
        )
    )


def _unet() -> nn.Module:
    torch.manual_seed(0)
    return _random(
        diffusers.UNet2DConditionModel(
            block_out_channels=(8, 16),
            layers_per_block=1,
            norm_num_groups=4,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=TEXT_WIDTH,
            attention_head_dim=2,
        )
    )


def _video_inputs(latents: Tensor, timestep: Tensor, text: Tensor) -> dict[str, Any]:
    return {"hidden_states": latents, "encoder_hidden_states": text, "timestep": timestep, "return_dict": False}


def _flux_inputs(latents: Tensor, timestep: Tensor, text: Tensor) -> dict[str, Any]:
    # Rows of 4 positions.
    position = torch.arange(latents.shape[1])
    places = torch.stack([torch.zeros_like(position), position // 4, position % 4], dim=1).float()
    return {
        "hidden_states": latents,
        "encoder_hidden_states": text,
        "pooled_projections": text.mean(1),
        "timestep": timestep / 1000,
        "img_ids": places,
        "txt_ids": torch.zeros(text.shape[1], 3),
        "return_dict": False,
    }


def _unet_inputs(latents: Tensor, timestep: Tensor, text: Tensor) -> dict[str, Any]:
    return {"sample": latents, "timestep": timestep[0], "encoder_hidden_states": text, "return_dict": False}


_EVERY_TIMESTEP = (-1, 1000)
"""What FasterCache calls a range: both ends are outside of it."""

MODELS = {
    model.name: model
    for model in (
        Model(
            "cogvideox", _cogvideox, _video_inputs, ((3, 4, 8, 12), (3, 4, 10, 14)), faster={"tensor_format": "BFCHW"}
        ),
        Model(
            "latte",
            _latte,
            _video_inputs,
            ((4, 3, 8, 12), (4, 3, 10, 14)),
            # The default identifiers of diffusers are searched anywhere in a name, and "blocks" is also a part of
            # "temporal_transformer_blocks": every temporal attention would be taken as a spatial one.
            pab={"spatial_attention_block_identifiers": ("^transformer_blocks",)},
            faster={"temporal_attention_timestep_skip_range": _EVERY_TIMESTEP},
        ),
        Model("wan", _wan, _video_inputs, ((4, 3, 8, 12), (4, 3, 10, 14)), flow=True),
        Model(
            "flux",
            _flux,
            _flux_inputs,
            ((20, 4), (28, 4)),
            flow=True,
            # FasterCache predicts images of [B, C, H, W] and videos, no sequences of tokens; the attention is left.
            faster={"is_guidance_distilled": True, "tensor_format": "BCHW"},
        ),
        Model(
            "unet",
            _unet,
            _unet_inputs,
            ((4, 8, 12), (4, 10, 14)),
            faster={
                "tensor_format": "BCHW",
                "spatial_attention_block_identifiers": ("transformer_blocks.*attn1",),
                # The timestep has no batch dimension here.
                "_unconditional_conditional_input_kwargs_identifiers": ("sample", "encoder_hidden_states"),
            },
        ),
    )
}


def _one_stream(name: str) -> contextlib.AbstractContextManager[object]:
    return contextlib.nullcontext()


def denoise(
    model: Model,
    call: Callable[..., Any] | Mapping[str, Callable[..., Any]],
    clock: Clock,
    *,
    resolution: int = 0,
    seed: int = 0,
    separate: bool = False,
    streams: Streams = _one_stream,
    after_step: Callable[[int], None] | None = None,
) -> list[Tensor]:
    """One run of 30 steps.

    Args:
        call: the model, or for ``separate`` also ``{"cond": model, "uncond": model}``.
        resolution: which of the model's two.
        separate: a call for each branch, the conditional first as pipelines of diffusers do it.
        streams: what a separate call is made in, from the name of its branch.
        after_step: called with the number of each step that is done.

    Returns:
        For each step what the model predicted, [2, ...]: the unconditional half first.
    """
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(1, *model.latents[resolution], generator=generator)
    text = torch.randn(2, TEXT_TOKENS, TEXT_WIDTH, generator=generator)
    calls = call if isinstance(call, Mapping) else {"cond": call, "uncond": call}
    scheduler = model.scheduler()
    predictions = []
    with torch.no_grad():
        for step, timestep in enumerate(scheduler.timesteps):
            clock.timestep = timestep
            if separate:
                halves = {}
                for name, part in (("cond", text[1:]), ("uncond", text[:1])):
                    with streams(name):
                        halves[name] = calls[name](**model.inputs(latents, timestep.expand(1), part))[0]
                prediction = torch.cat([halves["uncond"], halves["cond"]])
            else:
                both = torch.cat([latents, latents])
                prediction = calls["cond"](**model.inputs(both, timestep.expand(2), text))[0]
            predictions.append(prediction.clone())
            unconditional, conditional = prediction.chunk(2)
            guided = unconditional + GUIDANCE * (conditional - unconditional)
            latents = scheduler.step(guided, timestep, latents, return_dict=False)[0]
            if after_step is not None:
                after_step(step)
    return predictions


class AttentionCounter(TorchFunctionMode):
    """Counts the calls of ``scaled_dot_product_attention`` that eager execution makes."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += function is torch.nn.functional.scaled_dot_product_attention
        return function(*args, **(kwargs or {}))
