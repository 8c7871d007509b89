"""Llama and BERT of transformers with two layers of 64 features and random weights."""

from __future__ import annotations

from typing import Any

from torch import nn

__all__ = ["bert", "llama"]

_SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "intermediate_size": 96,
    "max_position_embeddings": 64,
}


def llama(implementation: str = "eager", heads: int = 8, **settings: Any) -> nn.Module:
    """With half as many heads of keys and values; in inference mode, as all of these."""
    from transformers import LlamaConfig, LlamaModel

    config = LlamaConfig(
        **_SIZES, num_attention_heads=heads, num_key_value_heads=heads // 2, use_cache=False, **settings
    )
    config._attn_implementation = implementation
    model: nn.Module = LlamaModel(config)
    return model.train(False)


def bert(implementation: str = "eager", heads: int = 8, **settings: Any) -> nn.Module:
    from transformers import BertConfig, BertModel

    config = BertConfig(
        **_SIZES,
        num_attention_heads=heads,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        **settings,
    )
    config._attn_implementation = implementation
    model: nn.Module = BertModel(config, add_pooling_layer=False)
    return model.train(False)
