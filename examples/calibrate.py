"""Latte of diffusers in a small configuration, with a denoising loop around it, for ``attnrewrite calibrate``.

    cd examples && attnrewrite calibrate calibrate:latte --plot differences.png

The weights are random, so the differences are a demonstration: they say nothing of the published model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click
import diffusers
import torch
from torch import nn

import attnrewrite

STEPS = 30
GUIDANCE = 3.0


def latte() -> tuple[nn.Module, Callable[[], torch.Tensor], Callable[[], float | None]]:
    """The model, a function that makes a video's latents, and one that gives the timestep meanwhile."""
    torch.manual_seed(0)
    model: Any = diffusers.LatteTransformer3DModel(  # type: ignore[no-untyped-call]
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        num_layers=1,
        cross_attention_dim=32,
        attention_bias=True,
        sample_size=8,
        patch_size=2,
        activation_fn="gelu-approximate",
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        caption_channels=16,
        video_length=4,
    )
    scheduler: Any = diffusers.DDIMScheduler(clip_sample=False)  # type: ignore[no-untyped-call]
    current: list[float | None] = [None]

    def run() -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        latents = torch.randn(1, 4, 4, 8, 8, generator=generator)
        text = torch.randn(1, 6, 16, generator=generator)
        prompts = {"cond": text, "uncond": torch.zeros_like(text)}
        scheduler.set_timesteps(STEPS)
        for timestep in scheduler.timesteps:
            current[0] = timestep.item()
            noise = {}
            for name, prompt in prompts.items():
                # The two passes of guidance are compared each with its own earlier calls.
                with model.cache_context(name):
                    output = model(latents, encoder_hidden_states=prompt, timestep=timestep[None], return_dict=False)
                noise[name] = output[0][:, :4]
            guided = noise["uncond"] + GUIDANCE * (noise["cond"] - noise["uncond"])
            latents = scheduler.step(guided, timestep, latents, return_dict=False)[0]
        current[0] = None
        return latents

    return model.eval(), run, lambda: current[0]


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--threshold", type=float, default=0.1, help="The relative difference to tolerate (default 0.1).")
def main(threshold: float) -> None:
    """Calibrate, then run with what was proposed."""
    model, run, timestep = latte()
    model.compile(backend="attnrewrite", options={"inner_backend": "eager"})
    with torch.no_grad():
        calibration = attnrewrite.calibrate(model, run, timestep, threshold=threshold)
        click.echo(calibration.to_text())
        exact = run()
        with attnrewrite.attention_cache(model, calibration.config(timestep)):
            error = (run() - exact).norm() / exact.norm()
    click.echo(f"with attention reused, the result differs by {error:.2e}")


if __name__ == "__main__":
    main()
