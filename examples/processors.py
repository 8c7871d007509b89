"""Attention processors of diffusers in Stable Diffusion's UNet: slices, cross-frame attention, perturbed attention.

Each is run in eager execution, under ``torch.compile``, under attnrewrite, and, where diffusers has one, with the
processor that one would set by hand instead (``AttnProcessor2_0``, ``CrossFrameAttnProcessor2_0``) under
``torch.compile``.
"""

from __future__ import annotations

import copy
import dataclasses
import gc
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch
from compare import circumstances, milliseconds
from diffusers.models.attention_processor import Attention, AttnProcessor2_0, PAGIdentitySelfAttnProcessor2_0
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.deprecated.text_to_video_synthesis.pipeline_text_to_video_zero import (
    CrossFrameAttnProcessor,
    CrossFrameAttnProcessor2_0,
)
from torch import nn

import attnrewrite

UNETS: dict[str, dict[str, Any]] = {
    "small": {
        "block_out_channels": (32, 64),
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": 64,
        "attention_head_dim": 4,
    },
    "base": {"cross_attention_dim": 768, "attention_head_dim": 8},
}
"""The second is Stable Diffusion 1.5's; diffusers calls the number of heads ``attention_head_dim`` there."""
LATENTS = {"small": 16, "base": 64}
"""Height and width of the latent image."""


@dataclasses.dataclass
class Row:
    """One way of running the model.

    Attributes:
        error: the largest difference from eager float64, relative to its largest number; None where that was not run.
        memory_mib: allocated at most at one time during a call, parameters and inputs apart; None off CUDA.
    """

    name: str
    error: float | None = None
    ms: float = 0.0
    memory_mib: float | None = None
    times_ms: list[float] = dataclasses.field(default_factory=list)


def made(kind: Any, **settings: Any) -> Any:
    """A processor: diffusers' classes have no type hints."""
    return kind(**settings)


def set_own(model: Any, processor: Any, only: str = "") -> None:
    """``processor`` in all attentions, or in those whose path has ``only`` in it."""
    model.set_attn_processor({path: processor if only in path else own for path, own in model.attn_processors.items()})


class Layer(nn.Module):
    """One self attention as it is on the UNet's first level: 8 heads of 40 channels at each latent position."""

    def __init__(self, size: str) -> None:
        super().__init__()
        width = UNETS[size].get("block_out_channels", (320,))[0]
        heads = UNETS[size]["attention_head_dim"]
        self.attention = Attention(width, heads=heads, dim_head=width // heads)

    @property
    def attn_processors(self) -> dict[str, Any]:
        return {"attn1": self.attention.processor}

    def set_attn_processor(self, processors: dict[str, Any]) -> None:
        self.attention.set_processor(processors["attn1"])

    def set_attention_slice(self, size: Any) -> None:
        self.attention.set_attention_slice(max(1, self.attention.heads // 2) if size == "auto" else 1)

    def forward(self, sample: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.attention(sample)
        return result


def ways(structure: str, model: Any) -> tuple[Any, Any | None]:
    """The model under the processor that is to be rewritten, and under the one that one would set by hand."""
    by_hand: Any | None = copy.deepcopy(model)
    if structure == "sliced":
        model.set_attention_slice("auto")
        set_own(by_hand, made(AttnProcessor2_0))
    elif structure == "cross-frame":
        set_own(model, made(CrossFrameAttnProcessor, batch_size=2))
        set_own(by_hand, made(CrossFrameAttnProcessor2_0, batch_size=2))
    else:
        # The one that there is calls scaled_dot_product_attention already.
        set_own(model, made(AttnProcessor2_0))
        set_own(model, made(PAGIdentitySelfAttnProcessor2_0), "attn1")
        by_hand = None
    return model, by_hand


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--structure", type=click.Choice(["sliced", "cross-frame", "pag"]), default="sliced")
@click.option("--scope", type=click.Choice(["unet", "layer"]), default="unet", help="The UNet or one attention of it.")
@click.option("--size", type=click.Choice(list(UNETS)), default="small", help="The UNet's size.")
@click.option("--frames", type=click.IntRange(min=1), default=8, help="Of cross-frame attention (default 8).")
@click.option("--device", default="cpu", help="Such as cuda (default cpu).")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), default="float32")
@click.option("--repeats", type=click.IntRange(min=1), default=10, help="Timed calls of each (default 10).")
@click.option("--json", "path", type=click.Path(dir_okay=False, path_type=Path), help="Write the raw data here.")
def main(
    structure: str, scope: str, size: str, frames: int, device: str, dtype: str, repeats: int, path: Path | None
) -> None:
    """Compare one forward pass under each way of running it."""
    torch.manual_seed(0)
    model: Any = UNet2DConditionModel(**UNETS[size]) if scope == "unet" else Layer(size)
    model, by_hand = ways(structure, model.eval())
    batch = 2 * frames if structure == "cross-frame" else 4 if structure == "pag" else 2
    latents, kind = LATENTS[size], getattr(torch, dtype)
    if scope == "unet":
        inputs: dict[str, Any] = {
            "sample": torch.randn(batch, 4, latents, latents).to(device, kind),
            "timestep": torch.tensor(500, device=device),
            "encoder_hidden_states": torch.randn(batch, 77, UNETS[size]["cross_attention_dim"]).to(device, kind),
        }
    else:
        inputs = {"sample": torch.randn(batch, latents**2, model.attention.to_q.in_features).to(device, kind)}
    model = model.to(device, kind)
    calls: dict[str, Callable[..., Any]] = {"eager": model, "torch.compile": torch.compile(copy.deepcopy(model))}
    if by_hand is not None:
        calls["torch.compile, the processor set by hand"] = torch.compile(by_hand.to(device, kind))
    calls["attnrewrite"] = torch.compile(model, backend="attnrewrite")
    rows = {name: Row(name) for name in calls}
    with torch.inference_mode():
        report = attnrewrite.explain(model, **inputs, options={"inner_backend": "inductor"})
        click.echo(f"{len(report.rewritten)} of {len(report.sites)} attentions rewritten: ", nl=False)
        click.echo(", ".join(sorted({f"{site.kernel}" for site in report.sites})))
        measure(model, inputs, calls, rows, repeats, device)
    for row in rows.values():
        memory = "" if row.memory_mib is None else f"{row.memory_mib:10.0f} MiB"
        error = "" if row.error is None else f"   error {row.error:.1e}"
        click.echo(f"{row.name:42} {row.ms:10.2f} ms{memory}{error}")
    if path is not None:
        settings = {"structure": structure, "scope": scope, "size": size, "frames": frames, "dtype": dtype}
        record = {
            **circumstances(device),
            **settings,
            "batch": batch,
            "kernels": [str(site.kernel) for site in report.sites],
            "rows": [dataclasses.asdict(row) for row in rows.values()],
        }
        path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def measure(
    model: Any,
    inputs: dict[str, Any],
    calls: dict[str, Callable[..., Any]],
    rows: dict[str, Row],
    repeats: int,
    device: str,
) -> None:
    """Errors, memory, and times in turns."""
    on_cuda = torch.device(device).type == "cuda"
    for name, call in calls.items():
        for _ in range(2):
            call(**inputs)
        if on_cuda:
            gc.collect()
            torch.cuda.empty_cache()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            call(**inputs)
            rows[name].memory_mib = (torch.cuda.max_memory_allocated() - before) / 2**20
    for _ in range(repeats):
        for name, call in calls.items():
            rows[name].times_ms.append(milliseconds(call, inputs, device))
    for row in rows.values():
        row.ms = statistics.median(row.times_ms)
    try:
        exact = copy.deepcopy(model).double()
        wide = {name: value.double() if value.is_floating_point() else value for name, value in inputs.items()}
        truth = first(exact(**wide))
    except torch.OutOfMemoryError:
        return
    for name, call in calls.items():
        rows[name].error = ((first(call(**inputs)).double() - truth).abs().max() / truth.abs().max()).item()


def first(output: Any) -> torch.Tensor:
    result: torch.Tensor = output if isinstance(output, torch.Tensor) else output[0]
    return result


if __name__ == "__main__":
    main()
