"""GPT-2 from transformers, with its attention written out (``attn_implementation="eager"``); causal."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from compare import Example, main
from torch import nn


def build(size: str) -> tuple[nn.Module, dict[str, Any]]:
    width, layers, length = {"small": (384, 2, 1024), "base": (768, 12, 1024)}[size]
    config = transformers.GPT2Config(
        n_embd=width, n_layer=layers, n_head=width // 64, n_positions=length, use_cache=False
    )
    config._attn_implementation = "eager"
    model = transformers.GPT2Model(config)
    return model, {"input_ids": torch.randint(1000, (2, length))}


EXAMPLE = Example("GPT-2", build)

if __name__ == "__main__":
    main([EXAMPLE])
