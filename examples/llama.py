"""Llama from transformers, with its attention written out (``attn_implementation="eager"``).

Four query heads share one key and value head; the mask is causal, and the second sequence is padded on the left.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from compare import Example, main
from torch import nn


def build(size: str) -> tuple[nn.Module, dict[str, Any]]:
    width, layers, length = {"small": (512, 2, 1024), "base": (1024, 8, 2048)}[size]
    config = transformers.LlamaConfig(
        vocab_size=32000,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 256,
        intermediate_size=width * 8 // 3,
        max_position_embeddings=length,
        use_cache=False,
    )
    config._attn_implementation = "eager"
    model = transformers.LlamaModel(config)
    attention_mask = torch.ones(2, length, dtype=torch.long)
    attention_mask[1, : length // 8] = 0
    return model, {"input_ids": torch.randint(1000, (2, length)), "attention_mask": attention_mask}


EXAMPLE = Example("Llama", build)

if __name__ == "__main__":
    main([EXAMPLE])
