"""What models do with positions, masks, lengths and features beside attention, each as a small function.

Computed in float64, so that what differs is not rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from tests.support.helpers import rewritten
from tests.support.sequence_models import shard

__all__ = ["IDIOMS", "difference"]

WIDTH = 8

Idiom = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def _attention(x: Tensor, mask: Tensor | None = None) -> Tensor:
    scores = x @ x.mT
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return scores.softmax(-1) @ x


def _causal(x: Tensor) -> Tensor:
    places = torch.arange(x.shape[1])
    return places <= places[:, None]


def positions_of_a_mask(x: Tensor, padding: Tensor, labels: Tensor, table: Tensor) -> Tensor:
    return _attention(x + table[(padding.cumsum(-1) - 1).clamp(min=0)], _causal(x))


def positions_that_are_counted(x: Tensor, padding: Tensor, labels: Tensor, table: Tensor) -> Tensor:
    counted = torch.ones(x.shape[0], x.shape[1]).cumsum(1)
    return _attention(x, counted[:, None] <= counted[:, :, None])


def documents_between_separators(x: Tensor, padding: Tensor, labels: Tensor, table: Tensor) -> Tensor:
    documents = (labels == 0).cumsum(-1)
    return _attention(x, (documents[:, None] == documents[:, :, None]) & _causal(x))


def last_rows_of_a_table(x: Tensor, padding: Tensor, labels: Tensor, table: Tensor) -> Tensor:
    return _attention(x + table[-x.shape[1] :].flip(0), torch.ones(x.shape[1], x.shape[1]).tril().bool())


def resized_table(x: Tensor, padding: Tensor, labels: Tensor, table: Tensor) -> Tensor:
    return _attention(x + F.interpolate(table[None].mT, size=x.shape[1], mode="linear").mT)


def rotation_by_complex_numbers(x: Tensor, padding: Tensor, labels: Tensor, table: Tensor) -> Tensor:
    angles = torch.outer(torch.arange(x.shape[1]).double(), 0.1 ** torch.arange(WIDTH // 2))
    pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
    turned = torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(-2)
    return _attention(turned, _causal(x))


def shifted_mask(x: Tensor, padding: Tensor, labels: Tensor, table: Tensor) -> Tensor:
    before = F.pad(padding[:, :-1], (1, 0)) + padding.roll(1, 1)
    return _attention(x, before[:, None].bool() | torch.eye(x.shape[1]).bool())


def sorted_mask(x: Tensor, padding: Tensor, labels: Tensor, table: Tensor) -> Tensor:
    values, order = labels.sort(dim=-1, stable=True)
    return _attention(x + values[..., None] + 0.1 * order[..., None])


def global_tokens(x: Tensor, padding: Tensor, labels: Tensor, table: Tensor) -> Tensor:
    places = torch.arange(x.shape[1])
    chosen = labels == 1
    return _attention(x, chosen[:, None] | chosen[:, :, None] | ((places - places[:, None]).abs() < 3))


def lengths_of_the_padding(x: Tensor, padding: Tensor, labels: Tensor, table: Tensor) -> Tensor:
    lengths = padding.sum(-1)
    mask = (torch.arange(x.shape[1]) < lengths[:, None])[:, None]
    return _attention(x, mask) / lengths[:, None, None] + labels.argmax(1)[:, None, None]


def bias_of_distances(x: Tensor, padding: Tensor, labels: Tensor, table: Tensor) -> Tensor:
    places = torch.arange(x.shape[1])
    biases = 0.01 * torch.arange(2 * x.shape[1] - 1)
    return (x @ x.mT + biases[places - places[:, None] + x.shape[1] - 1]).softmax(-1) @ x


def numbers_of_the_length(x: Tensor, padding: Tensor, labels: Tensor, table: Tensor) -> Tensor:
    return _attention(x * x.shape[1] ** -0.5) / x.numel() + torch.arange(0, 2 * x.shape[1], 2)[:, None] / x.shape[1]


def shared_by_all_positions(x: Tensor, padding: Tensor, labels: Tensor, table: Tensor) -> Tensor:
    return _attention(x) + F.one_hot(labels, WIDTH).sum(1, keepdim=True) + torch.full((1,), x.shape[1])


def normalized_features(x: Tensor, padding: Tensor, labels: Tensor, table: Tensor) -> Tensor:
    unit = F.normalize(x, dim=-1)
    return torch.max(_attention(unit), x.topk(2, -1).values.sum(-1, keepdim=True))


def largest_scores(x: Tensor, padding: Tensor, labels: Tensor, table: Tensor) -> Tensor:
    scores = x @ x.mT
    return scores.masked_fill(scores < scores.topk(3, -1).values[..., -1:], float("-inf")).softmax(-1) @ x


def added_products(x: Tensor, padding: Tensor, labels: Tensor, table: Tensor) -> Tensor:
    y = torch.addmm(table[0], x.flatten(0, 1), table[:WIDTH], beta=2.0).view(x.shape)
    return torch.baddbmm(_causal(x).to(x)[None], y, x.mT).softmax(-1) @ x


def einsum_of_any_dimensions(x: Tensor, padding: Tensor, labels: Tensor, table: Tensor) -> Tensor:
    y = torch.einsum("bld,de", x, table[:WIDTH]).mT
    diagonal = torch.einsum("bii->bi", x @ y.mT)[..., None]
    weights = torch.einsum("...qd,...kd->...qk", x, y).softmax(-1)
    return torch.einsum("...qk,...kd->...qd", weights, x) + diagonal


def linear_attention(x: Tensor, padding: Tensor, labels: Tensor, table: Tensor) -> Tensor:
    return F.elu(x) @ (F.elu(x).mT @ (x * padding[..., None]))


def pooled_by_attention(x: Tensor, padding: Tensor, labels: Tensor, table: Tensor) -> Tensor:
    """The same on all ranks."""
    return _attention(table[:4], None)[None] + (table[:4] @ x.mT).softmax(-1) @ x


def sdpa_of_shared_heads(x: Tensor, padding: Tensor, labels: Tensor, table: Tensor) -> Tensor:
    projected = (x, x @ table[:WIDTH, :4], x @ table[:WIDTH, 4:])
    heads, keys, values = (each.view(*x.shape[:2], -1, 2).transpose(1, 2) for each in projected)
    y = F.scaled_dot_product_attention(heads, keys, values, is_causal=True, enable_gqa=True, scale=0.3)
    return y.transpose(1, 2).flatten(2)


IDIOMS: tuple[Idiom, ...] = (
    positions_of_a_mask,
    positions_that_are_counted,
    documents_between_separators,
    last_rows_of_a_table,
    resized_table,
    rotation_by_complex_numbers,
    shifted_mask,
    sorted_mask,
    global_tokens,
    lengths_of_the_padding,
    bias_of_distances,
    numbers_of_the_length,
    shared_by_all_positions,
    normalized_features,
    largest_scores,
    added_products,
    einsum_of_any_dimensions,
    linear_attention,
    pooled_by_attention,
    sdpa_of_shared_heads,
)


def difference(function: Idiom, balanced: bool, inner: str = "eager", kernel: str = "auto") -> str:
    """In one of the processes: what is wrong with its values and its gradients of x, in words."""
    ranks, rank = dist.get_world_size(), dist.get_rank()
    torch.manual_seed(0)
    length = 8 * ranks
    x, table = torch.randn(3, length, WIDTH).double(), torch.randn(64, WIDTH).double()
    padding = (torch.arange(length) < torch.tensor([[length], [length - 5], [3]])).long()
    labels = torch.randint(0, 8, (3, length))
    whole = [x.requires_grad_(), padding, labels]
    own = [shard(each.detach(), ranks, rank, balanced) for each in whole]
    own[0].requires_grad_()
    for each in own:
        torch._dynamo.mark_dynamic(each, 1)
    option: dict[str, Any] = {"mesh": init_device_mesh("cpu", (ranks,)), "load_balance": balanced, "kernel": kernel}
    option |= {"buffers": ["x", "padding", "labels", "table"], "buffer_seq_dims": [1, 1, 1, None]}
    expected = function(x, padding, labels, table)
    result = rewritten(function, inner, fullgraph=True, context_parallel=option)(*own, table)
    upstream = torch.randn(expected.shape).double()
    (gradient,) = torch.autograd.grad(expected, whole[0], upstream)
    if expected.shape[1] == length:
        expected, upstream = (shard(each, ranks, rank, balanced) for each in (expected, upstream))
    else:
        gradient = gradient * ranks  # Each rank has it, and their losses are added up.
    (found,) = torch.autograd.grad(result, own[0], upstream)
    pairs = {"values": (result, expected), "gradients": (found, shard(gradient, ranks, rank, balanced))}
    wrong = [
        f"{what} differ" for what, (new, right) in pairs.items() if not torch.allclose(new, right, rtol=1e-6, atol=1e-8)
    ]
    return ", ".join(wrong)
