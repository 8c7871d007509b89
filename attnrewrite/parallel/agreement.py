"""Agreement: all ranks give inputs of one shape, without which shards that are put together are no sequence."""

from __future__ import annotations

from typing import Any

import torch

from attnrewrite.errors import ContextParallelError
from attnrewrite.parallel.placement import Shard
from attnrewrite.torch_private import assert_on_device, collective_operators

__all__ = ["Agreement"]


class Agreement:
    """A small all-gather at each call: what shapes the ranks' inputs have.

    It is made at every call, since a rank cannot know whether a shape is new to another. On a GPU nobody waits for it,
    but for the first call of a shape.

    Source: collectives have undefined results where ranks disagree about sizes,
    https://docs.pytorch.org/docs/2.13/distributed.html#collective-functions
    """

    def __init__(self, group: str, ranks: int, shards: dict[int, Shard]) -> None:
        """Args:
        shards: the graph's inputs that are sharded, by their numbers.
        """
        self._group, self._ranks, self._shards = group, ranks, shards
        self._own: dict[tuple[Any, ...], torch.Tensor] = {}

    def check(self, args: tuple[Any, ...]) -> None:
        """Raises:
        ContextParallelError: the ranks' inputs have different shapes.
        """
        sizes = tuple(tuple(arg.shape) for arg in args if isinstance(arg, torch.Tensor))
        is_new = sizes not in self._own
        if is_new:
            at, shard = next(iter(self._shards.items()))
            # Of equal sizes on all ranks whatever the inputs are, or it would be undefined itself. Hashes of integers
            # are the same in all processes.
            numbers = [hash(sizes), args[at].shape[shard.dim]]
            self._own[sizes] = torch.tensor(numbers, dtype=torch.int64, device=args[at].device)
        own = self._own[sizes]
        gathered = collective_operators.all_gather_into_tensor(own, self._ranks, self._group)
        found = collective_operators.wait_tensor(gathered).view(self._ranks, 2)
        if own.is_cuda and not is_new:
            assert_on_device((found == own).all(), "context_parallel: ranks were given shards of different shapes")
        elif not bool((found == own).all()):
            raise ContextParallelError(_in_words(found[:, 1].tolist()))


def _in_words(lengths: list[int]) -> str:
    if len(set(lengths)) > 1:
        return (
            f"context_parallel: ranks were given shards of different lengths, {', '.join(map(str, lengths))}: pad the "
            "sequence to a multiple of the ranks before it is sharded"
        )
    return "context_parallel: the inputs have other shapes on other ranks, and may differ in what they hold alone"
