"""The operators by which ranks exchange parts of a sequence, with gradients; each finds its process group by name.

``balanced`` shards are those of PyTorch's head-tail load balancer
(https://github.com/pytorch/pytorch/blob/v2.13.0/torch/distributed/tensor/experimental/_context_parallel/_load_balancer.py):
of ``2 * ranks`` equal parts, rank r holds part r and part ``2 * ranks - 1 - r``. What is gathered is in the sequence's
own order.

Gradients are those of the sum of all ranks' losses, as autograd's are under ``torch.distributed.nn``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnrewrite.torch_private import collective_operators

__all__ = ["EXCHANGE", "GATHER"]

_collectives = collective_operators


def _order(ranks: int) -> list[int]:
    """The parts that balanced shards hold, one shard after the other."""
    return [part for rank in range(ranks) for part in (rank, 2 * ranks - 1 - rank)]


def _joined(shards: Tensor, balanced: bool, dim: int) -> Tensor:
    """What ``shards`` has the shards of, one after the other, along ``dim`` of each."""
    if not balanced:
        return torch.cat(shards.unbind(0), dim).contiguous()
    order = _order(shards.shape[0])
    parts = [part for shard in shards.unbind(0) for part in shard.chunk(2, dim)]
    return torch.cat([parts[order.index(number)] for number in range(len(parts))], dim).contiguous()


def _apart(whole: Tensor, ranks: int, balanced: bool, dim: int) -> Tensor:
    """The shards along ``dim``, one after the other; the inverse of :func:`_joined`."""
    if not balanced:
        return torch.stack(whole.chunk(ranks, dim)).contiguous()
    parts = whole.chunk(2 * ranks, dim)
    order = _order(ranks)
    pairs = [torch.cat([parts[order[2 * rank]], parts[order[2 * rank + 1]]], dim) for rank in range(ranks)]
    return torch.stack(pairs).contiguous()


@torch.library.custom_op("attnrewrite::gather_sequence", mutates_args=())
def _gather(shard: Tensor, dim: int, balanced: bool, ranks: int, group: str) -> Tensor:
    """The whole sequence, of which every rank has a shard along ``dim``."""
    flat = _collectives.all_gather_into_tensor(shard.contiguous().view(-1), ranks, group)
    shards = _collectives.wait_tensor(flat).view(ranks, *shard.shape)
    return _joined(shards, balanced, dim)


@torch.library.custom_op("attnrewrite::sum_to_shard", mutates_args=())
def _sum_to_shard(whole: Tensor, dim: int, balanced: bool, ranks: int, group: str) -> Tensor:
    """This rank's shard along ``dim`` of the sum of all ranks' tensors."""
    shards = _apart(whole, ranks, balanced, dim)
    flat = _collectives.reduce_scatter_tensor(shards.view(-1), "sum", ranks, group)
    return _collectives.wait_tensor(flat).view(shards.shape[1:])  # type: ignore[no-any-return]


@torch.library.custom_op("attnrewrite::exchange_sequence", mutates_args=())
def _exchange(
    local: Tensor, split: int, joined: int, of_sequence: bool, balanced: bool, ranks: int, group: str
) -> Tensor:
    """Each rank gives the parts along ``split`` away, and joins what it is given along ``joined``.

    With ``of_sequence`` the sequence is what is split; otherwise its shards are what is joined.
    """
    parts = _apart(local, ranks, balanced and of_sequence, split)
    sizes = [parts[0].numel()] * ranks
    given = _collectives.wait_tensor(_collectives.all_to_all_single(parts.view(-1), sizes, sizes, group))
    return _joined(given.view(parts.shape), balanced and not of_sequence, joined)


def _resized(tensor: Tensor, dim: int, size: Any) -> Tensor:
    return tensor.new_empty([size if at == dim else length for at, length in enumerate(tensor.shape)])


@_gather.register_fake
def _(shard: Tensor, dim: int, balanced: bool, ranks: int, group: str) -> Tensor:
    return _resized(shard, dim, shard.shape[dim] * ranks)


@_sum_to_shard.register_fake
def _(whole: Tensor, dim: int, balanced: bool, ranks: int, group: str) -> Tensor:
    return _resized(whole, dim, whole.shape[dim] // ranks)


@_exchange.register_fake
def _(local: Tensor, split: int, joined: int, of_sequence: bool, balanced: bool, ranks: int, group: str) -> Tensor:
    parts = _resized(local, split, local.shape[split] // ranks)
    return _resized(parts, joined, parts.shape[joined] * ranks)


def _keep_numbers(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _, *ctx.numbers = inputs


def _gather_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    return _sum_to_shard(gradient, *ctx.numbers), None, None, None, None


def _sum_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    return _gather(gradient, *ctx.numbers), None, None, None, None


def _exchange_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    split, joined, of_sequence, *others = ctx.numbers
    return _exchange(gradient, joined, split, not of_sequence, *others), None, None, None, None, None, None


_gather.register_autograd(_gather_backward, setup_context=_keep_numbers)
_sum_to_shard.register_autograd(_sum_backward, setup_context=_keep_numbers)
_exchange.register_autograd(_exchange_backward, setup_context=_keep_numbers)

GATHER = torch.ops.attnrewrite.gather_sequence.default
"""``(shard, dim, balanced, ranks, group) -> whole``"""

EXCHANGE = torch.ops.attnrewrite.exchange_sequence.default
"""``(local, split, joined, of_sequence, balanced, ranks, group) -> local``"""
