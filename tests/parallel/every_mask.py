"""One function with an attention for each kind of mask, computed by ranks and by one process."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from tests.support.against_eager import Results, moved, prepared, run, truth, wrong
from tests.support.helpers import rewritten
from tests.support.sequence_models import shard

__all__ = ["difference"]

HEAD_SIZE, GROUPS = 8, 4
"""Key and value have as many groups of heads as can be traded among four ranks."""

ROWS = 2
"""The dimension of the sequence in what :func:`every_mask` gives."""


def every_mask(x: Tensor, padding: Tensor, documents: Tensor, weights: Tensor) -> Tensor:
    """Attention without a mask, causal, of heads that share keys, windowed, padded, and of documents."""
    q, k, v = _heads(x, weights)
    places = torch.arange(x.shape[1])
    causal = places <= places[:, None]
    near = causal & (places > places[:, None] - 5)
    same = documents[:, None, :, None] == documents[:, None, None]
    others = [_attention(q, k, v, mask) for mask in (near, padding[:, None, None].bool(), same)]
    return torch.cat([_without_data(q, k, v, causal), *others], 1)


def without_data(x: Tensor, padding: Tensor, documents: Tensor, weights: Tensor) -> Tensor:
    """Those that a ring can serve: attention without a mask, causal, and of heads that share keys."""
    places = torch.arange(x.shape[1])
    q, k, v = _heads(x, weights)
    return _without_data(q, k, v, places <= places[:, None])


def _without_data(q: Tensor, k: Tensor, v: Tensor, causal: Tensor) -> Tensor:
    twice = torch.cat([q, q + 1], 1)
    shared = _attention(twice, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1), None)
    return torch.cat([_attention(q, k, v, None), _attention(q, k, v, causal), shared], 1)


def _heads(x: Tensor, weights: Tensor) -> list[Tensor]:
    """Query, key and value."""
    projected = (x @ weights).view(*x.shape[:2], 3, GROUPS, HEAD_SIZE)
    return list(projected.permute(2, 0, 3, 1, 4).unbind(0))


def _attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    scores = q @ k.mT * HEAD_SIZE**-0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    out: Tensor = scores.softmax(-1) @ v
    return out


def difference(kernel: str, balanced: bool, dtype: torch.dtype, inner: str, gradients: bool) -> str:
    """In one of the processes: what is wrong with its values and gradients, in words."""
    ranks = dist.get_world_size()
    torch.manual_seed(0)
    function = without_data if kernel == "ring" else every_mask
    buffers = ["x", "padding", "documents", "weights"]
    option = {"mesh": init_device_mesh("cpu", (ranks,)), "buffers": buffers, "buffer_seq_dims": [1, 1, 1, None]}
    compiled = rewritten(
        function, inner, fullgraph=True, context_parallel={**option, "kernel": kernel, "load_balance": balanced}
    )
    found = []
    for length in (4 * ranks, 6 * ranks):
        call = _call(length)
        own = run(function, prepared(call, dtype, gradients), gradients)
        new = _of_rank(compiled, prepared(call, dtype, gradients), own["value"][0].shape, balanced)

        reference = _part(truth(function, call, dtype, gradients, "cpu"), balanced)
        rounded = functools.partial(moved, function, call, dtype, gradients, "cpu")
        parts = functools.partial(_parts, rounded, balanced)
        found.append(wrong(dtype, new, _part(own, balanced), reference, moved=parts))
    return "; ".join(filter(None, found))


def _part(results: Results, balanced: bool) -> Results:
    """The rank's values, and its gradient of x; that of the weights is whole."""
    ranks, rank = dist.get_world_size(), dist.get_rank()
    gradients = list(results["gradient"])
    gradients[:1] = [shard(gradient, ranks, rank, balanced) for gradient in gradients[:1]]
    return {
        "value": [shard(value, ranks, rank, balanced, ROWS) for value in results["value"]],
        "gradient": gradients,
    }


def _parts(draw: Callable[[], list[Results]], balanced: bool) -> list[Results]:
    return [_part(results, balanced) for results in draw()]


def _call(length: int) -> list[Tensor]:
    padding = (torch.arange(length) < torch.tensor([[length], [length - 3]])).long()
    documents = torch.randint(0, 3, (2, length)).sort(1).values
    width = GROUPS * HEAD_SIZE
    return [torch.randn(2, length, width), padding, documents, torch.randn(width, 3 * width) / width**0.5]


def _of_rank(compiled: Any, inputs: list[Any], shape: torch.Size, balanced: bool) -> Results:
    """Its values, its gradient of x, and the sum of all ranks' gradients of the weights."""
    ranks, rank = dist.get_world_size(), dist.get_rank()
    x, padding, documents, weights = inputs
    asked = x.requires_grad
    sharded = [shard(each.detach(), ranks, rank, balanced) for each in (x, padding, documents)]
    sharded[0].requires_grad_(asked)
    for each in sharded:
        torch._dynamo.mark_dynamic(each, 1)
    with torch.set_grad_enabled(asked):
        result = compiled(*sharded, weights)
    if not asked:
        return {"value": [result.detach()], "gradient": []}
    upstream = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(result)
    of_x, of_weights = torch.autograd.grad(result, [sharded[0], weights], shard(upstream, ranks, rank, balanced, ROWS))
    total = of_weights.double().contiguous()
    dist.all_reduce(total)
    return {"value": [result.detach()], "gradient": [of_x, total.to(of_weights)]}
