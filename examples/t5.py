"""T5's encoder from transformers, whose learned bias over relative positions every layer adds to its scores.

Beside eager execution and ``torch.compile`` of the written-out attention it is compared with transformers' own path
through ``scaled_dot_product_attention``, which gets the bias as a permuted view.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch
import transformers
from compare import circumstances, milliseconds
from torch import nn

import attnrewrite

SIZES = {"small": (128, 2, 256), "base": (768, 12, 1024), "large": (1024, 24, 1024)}
"""Width, layers, and tokens."""


def build(size: str) -> tuple[nn.Module, dict[str, Any]]:
    width, layers, length = SIZES[size]
    config = transformers.T5Config(
        d_model=width, d_kv=64, num_heads=width // 64, d_ff=4 * width, num_layers=layers, vocab_size=1000
    )
    config._attn_implementation = "eager"
    model = transformers.T5EncoderModel(config)
    return model, {"input_ids": torch.randint(1000, (4, length))}


@dataclasses.dataclass
class Row:
    """``error`` is the largest difference from eager float64, relative to its largest number."""

    name: str
    error: float
    ms: float
    times_ms: list[float]


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--size", type=click.Choice(list(SIZES)), default="small", help="The model's size.")
@click.option("--device", default="cpu", help="Such as cuda (default cpu).")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), default="float32")
@click.option("--repeats", type=click.IntRange(min=1), default=10, help="Timed calls of each (default 10).")
@click.option("--mode", default=None, help="torch.compile's mode, such as reduce-overhead.")
@click.option("--json", "path", type=click.Path(dir_okay=False, path_type=Path), help="Write the raw data here.")
def main(size: str, device: str, dtype: str, repeats: int, mode: str | None, path: Path | None) -> None:
    """Compare one forward pass of T5's encoder under four ways of running it."""
    torch.manual_seed(0)
    naive, inputs = build(size)
    naive = naive.to(device, getattr(torch, dtype)).eval()
    fused = copy.deepcopy(naive)
    fused.set_attn_implementation("sdpa")  # type: ignore[operator]
    inputs = {name: value.to(device) for name, value in inputs.items()}
    ways: dict[str, Callable[..., Any]] = {
        "eager": naive,
        "torch.compile": torch.compile(naive, mode=mode),
        "torch.compile of transformers' sdpa": torch.compile(fused, mode=mode),
        "attnrewrite": torch.compile(naive, backend="attnrewrite", mode=mode),
    }
    with torch.inference_mode():
        report = attnrewrite.explain(naive, **inputs, options={"inner_backend": "inductor"})
        click.echo(f"{len(report.rewritten)} of {len(report.sites)} attentions rewritten: ", nl=False)
        click.echo(", ".join(sorted({f"{site.kernel}" for site in report.sites})))
        truth = copy.deepcopy(naive).double()(**inputs)[0]
        rows = {}
        for name, call in ways.items():
            for _ in range(3):
                result = call(**inputs)[0].double()
            rows[name] = Row(name, ((result - truth).abs().max() / truth.abs().max()).item(), 0.0, [])
        del truth, result
        for _ in range(repeats):
            for name, call in ways.items():
                rows[name].times_ms.append(milliseconds(call, inputs, device))
    for row in rows.values():
        row.ms = statistics.median(row.times_ms)
        click.echo(f"{row.name:36} {row.ms:10.2f} ms   error {row.error:.1e}")
    if path is not None:
        record = {
            **circumstances(device),
            "size": size,
            "dtype": dtype,
            "mode": mode,
            "kernels": [str(site.kernel) for site in report.sites],
            "rows": [dataclasses.asdict(row) for row in rows.values()],
        }
        path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
