"""The masks of transformers' models: what is proved of them, and how much of them reaches a kernel."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import nn

from attnrewrite.backend import collect_reports
from tests.support.helpers import recording, relative_error, rewritten
from tests.support.zoo import NO_DROPOUT, hidden, ids, padded, transformer

pytestmark = pytest.mark.drawn

BATCH, LENGTH, HEADS = 2, 12, 4

_DECODER: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "use_cache": False,
}
_MODELS = {
    "gpt2": transformer(
        "GPT2Model", "GPT2Config", vocab_size=64, n_embd=32, n_layer=2, n_head=HEADS, n_positions=64, use_cache=False,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=1, eos_token_id=2,
    ),
    "llama": transformer("LlamaModel", "LlamaConfig", **_DECODER),
    "qwen2": transformer("Qwen2Model", "Qwen2Config", **_DECODER),
    "qwen3": transformer("Qwen3Model", "Qwen3Config", head_dim=8, **_DECODER),
    "mistral": transformer("MistralModel", "MistralConfig", sliding_window=LENGTH // 2, **_DECODER),
    "mistral-long-window": transformer("MistralModel", "MistralConfig", sliding_window=64, **_DECODER),
    "bert": transformer(
        "BertModel", "BertConfig", vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=HEADS,
        intermediate_size=48, max_position_embeddings=64, **NO_DROPOUT,
    ),
}  # fmt: skip


@cache
def _built(name: str) -> nn.Module:
    return _MODELS[name]()


def _masks(name: str, dynamic: bool, training: bool, **inputs: Any) -> tuple[set[str], set[Any]]:
    """The report's words for the masks, and the shape of each mask that a kernel gets, or "causal" for its flag."""
    model = _built(name)
    inner, given = recording()
    torch._dynamo.reset()
    with torch.set_grad_enabled(training), collect_reports() as graphs:
        compiled = rewritten(model, inner, dynamic=dynamic)
        assert relative_error(hidden(compiled(**inputs)), hidden(model(**inputs))) <= 1e-5
    (graph,) = graphs
    assert [site.status for site in graph.sites] == ["rewritten"] * 2
    taken: set[Any] = set()
    target = torch.ops.aten.scaled_dot_product_attention.default
    for node in given[0].graph.find_nodes(op="call_function", target=target):
        mask, is_causal = node.args[3], node.args[5]
        if isinstance(mask, torch.fx.Node):
            sizes = mask.meta["val"].shape
            taken.add(tuple(size.node.hint if isinstance(size, torch.SymInt) else size for size in sizes))
        else:
            taken.add("causal" if is_causal else None)
    return {site.mask for site in graph.sites}, taken


ways = pytest.mark.parametrize(
    ("dynamic", "training"), [(False, False), (True, False), (False, True)], ids=["static", "dynamic", "training"]
)


@ways
@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen2", "qwen3"])
def test_decoders_without_padding_are_causal(name: str, dynamic: bool, training: bool) -> None:
    words, taken = _masks(name, dynamic, training, input_ids=ids(BATCH, LENGTH, 0))
    assert words == {"causal"}
    assert taken == {"causal"}


def test_a_window_that_is_longer_than_the_sequence() -> None:
    assert _masks("mistral-long-window", False, False, input_ids=ids(BATCH, LENGTH, 0)) == ({"causal"}, {"causal"})


@ways
def test_a_window_is_one_mask_for_all_batches(dynamic: bool, training: bool) -> None:
    words, taken = _masks("mistral", dynamic, training, input_ids=ids(BATCH, LENGTH, 0))
    assert words == {f"causal + sliding window of {LENGTH // 2}"}
    # The kernel of the CPU has no argument for it.
    assert taken == {(1, 1, LENGTH, LENGTH)}


@ways
def test_key_padding_has_one_row(dynamic: bool, training: bool) -> None:
    inputs = {"input_ids": ids(BATCH, LENGTH, 0), "attention_mask": padded(BATCH, LENGTH)}
    assert _masks("bert", dynamic, training, **inputs) == ({"key padding"}, {(BATCH, 1, 1, LENGTH)})


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_decoders_with_padding(name: str, left: bool) -> None:
    inputs = {"input_ids": ids(BATCH, LENGTH, 0), "attention_mask": padded(BATCH, LENGTH, left=left)}
    words, taken = _masks(name, False, False, **inputs)
    assert words == {"causal + key padding"}
    assert taken == {(BATCH, 1, LENGTH, LENGTH)}


def test_packed_sequences_stay_documents() -> None:
    positions = torch.cat([torch.arange(5), torch.arange(LENGTH - 5)])[None].expand(BATCH, -1)
    words, taken = _masks("llama", False, False, input_ids=ids(BATCH, LENGTH, 0), position_ids=positions)
    assert "causal" not in words
    assert taken == {(BATCH, 1, LENGTH, LENGTH)}
