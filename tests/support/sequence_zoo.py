"""Models of transformers, small and with random weights, whose sequence is shared by ranks."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from tests.support.helpers import rewritten
from tests.support.sequence_models import shard

__all__ = ["difference"]

VALUES, GRADIENTS = 1e-5, 1e-4
"""Largest errors, relative to the largest number; sums come in another order, in float32."""

SIZES = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "vocab_size": 50, "num_attention_heads": 4}


def _model(kind: str, more: dict[str, Any], **settings: Any) -> nn.Module:
    import transformers

    config = getattr(transformers, f"{kind}Config")(**(SIZES | more), attn_implementation="eager")
    model: nn.Module = getattr(transformers, f"{kind}Model")(config, **settings)
    return model.eval()


def _llama() -> nn.Module:
    return _model("Llama", {"num_key_value_heads": 2, "use_cache": False})


def _bert() -> nn.Module:
    return _model("Bert", {}, add_pooling_layer=False)


def _gpt2() -> nn.Module:
    sizes = {"n_embd": 32, "n_inner": 32, "n_layer": 2, "n_head": 4, "vocab_size": 50, "n_positions": 64}
    dropped = dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0)
    return _model("GPT2", {**sizes, **dropped, "use_cache": False})


MODELS = {"llama": _llama, "bert": _bert, "gpt2": _gpt2}


def difference(name: str, option: dict[str, Any], padded: bool) -> str:
    """What is wrong with the values and gradients in one of the processes, in words; empty if nothing is."""
    ranks, rank = dist.get_world_size(), dist.get_rank()
    torch.manual_seed(0)
    model = MODELS[name]()
    whole = {"input_ids": torch.randint(0, 50, (2, 8 * ranks))}
    if padded:
        whole["attention_mask"] = (torch.arange(8 * ranks) < torch.tensor([[8 * ranks], [6 * ranks]])).long()
    expected = model(**whole).last_hidden_state
    upstream = torch.randn_like(expected)
    parameters = list(model.parameters())
    gradients = torch.autograd.grad(expected, parameters, upstream, allow_unused=True)
    balanced = option.get("load_balance", False)
    own = {key: shard(part, ranks, rank, balanced) for key, part in whole.items()}
    for part in own.values():
        torch._dynamo.mark_dynamic(part, 1)
    listed = {"mesh": init_device_mesh("cpu", (ranks,)), "buffers": list(own), "buffer_seq_dims": [1] * len(own)}

    def forward(**inputs: Tensor) -> Tensor:
        return model(**inputs).last_hidden_state  # type: ignore[no-any-return]

    def of_mask(input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return forward(input_ids=input_ids, attention_mask=attention_mask)

    def of_numbers(input_ids: Tensor) -> Tensor:
        return forward(input_ids=input_ids)

    compiled = rewritten(of_mask if padded else of_numbers, fullgraph=True, context_parallel={**listed, **option})
    result = compiled(**own)
    error = float((result - shard(expected, ranks, rank, balanced)).abs().max() / expected.abs().max())
    found = torch.autograd.grad(result, parameters, shard(upstream, ranks, rank, balanced), allow_unused=True)
    largest = max(float(each.abs().max()) for each in gradients if each is not None)
    worst = 0.0
    for one, other in zip(gradients, found, strict=True):
        if one is not None:
            total = torch.zeros_like(one) if other is None else other.contiguous()
            dist.all_reduce(total)
            worst = max(worst, float((total - one).abs().max()) / largest)
    return "" if error <= VALUES and worst <= GRADIENTS else f"values {error:.1e}, gradients {worst:.1e}"
