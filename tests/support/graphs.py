"""Graphs that are written by hand, whose nodes carry real tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

__all__ = ["Written"]


class Written:
    """A graph and the value of each of its nodes."""

    def __init__(self) -> None:
        self.graph = fx.Graph()

    def source(self, value: torch.Tensor) -> fx.Node:
        node = self.graph.placeholder(f"source_{len(self.graph.nodes)}")
        node.meta["val"] = value
        return node

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        node = self.graph.call_function(target, args, kwargs)
        real_args, real_kwargs = fx.node.map_arg((args, kwargs), lambda argument: argument.meta["val"])
        node.meta["val"] = target(*real_args, **real_kwargs)
        return node
