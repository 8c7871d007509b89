"""A pipeline of diffusers with Pyramid Attention Broadcast: the transformer is compiled, everything else is as it was.

CogVideoX with random weights and text embeddings, small enough for a CPU; the result is latents.
"""

from __future__ import annotations

import importlib
import time
from typing import Any

import click
import torch

import attnrewrite

diffusers: Any = importlib.import_module("diffusers")


def pipeline() -> Any:
    torch.manual_seed(0)
    transformer = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=4,
        attention_head_dim=32,
        in_channels=4,
        out_channels=4,
        time_embed_dim=32,
        text_embed_dim=32,
        num_layers=4,
        sample_width=24,
        sample_height=16,
        sample_frames=17,
        max_text_seq_length=16,
    )
    scheduler = diffusers.CogVideoXDDIMScheduler()
    # Text embeddings are given and latents are asked for, so neither a text encoder nor a VAE is needed.
    pipe = diffusers.CogVideoXPipeline(None, None, None, transformer.eval(), scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def video(pipe: Any, steps: int) -> torch.Tensor:
    """The latents."""
    generator = torch.Generator().manual_seed(0)
    prompt, negative = torch.randn(2, 1, 16, 32, generator=generator)
    latents: torch.Tensor = pipe(
        prompt_embeds=prompt,
        negative_prompt_embeds=negative,
        num_inference_steps=steps,
        height=128,
        width=192,
        num_frames=17,
        generator=generator,
        output_type="latent",
    ).frames
    return latents


def timed(pipe: Any, steps: int) -> tuple[torch.Tensor, float]:
    """The latents, and the seconds of the fastest of three runs, after one that compiles."""
    latents = video(pipe, steps)
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        video(pipe, steps)
        seconds.append(time.perf_counter() - start)
    return latents, min(seconds)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--steps", type=click.IntRange(min=1), default=30, help="Of denoising (default 30).")
def main(steps: int) -> None:
    """Run the pipeline compiled, with and without attention reuse."""
    pipe = pipeline()
    pipe.transformer = torch.compile(pipe.transformer, backend="attnrewrite")
    computed, seconds = timed(pipe, steps)
    click.echo(f"attention computed at every step: {seconds:6.2f} s")
    config = diffusers.PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(100, 850),
        current_timestep_callback=lambda: pipe.current_timestep,
    )
    attnrewrite.enable_cache(pipe.transformer, config)
    reused, seconds = timed(pipe, steps)
    change = ((reused - computed).norm() / computed.norm()).item()
    click.echo(f"at every second one, for most:    {seconds:6.2f} s, latents changed by {change:.1e}")


if __name__ == "__main__":
    main()
