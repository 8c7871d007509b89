"""BERT from transformers, with its attention written out (``attn_implementation="eager"``) and a padding mask."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from compare import Example, main
from torch import nn


def build(size: str) -> tuple[nn.Module, dict[str, Any]]:
    width, layers, length = {"small": (384, 2, 1024), "base": (768, 12, 512)}[size]
    config = transformers.BertConfig(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        intermediate_size=4 * width,
        max_position_embeddings=length,
    )
    config._attn_implementation = "eager"
    model = transformers.BertModel(config)
    attention_mask = torch.ones(2, length, dtype=torch.long)
    attention_mask[1, -length // 8 :] = 0
    return model, {"input_ids": torch.randint(1000, (2, length)), "attention_mask": attention_mask}


EXAMPLE = Example("BERT", build)

if __name__ == "__main__":
    main([EXAMPLE])
