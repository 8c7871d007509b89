"""Nodes and sizes: reading the values of nodes, comparing symbolic sizes without a guard, numbering regions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from attnrewrite.ir.source import SOURCE_ATTRIBUTE
from attnrewrite.torch_private import PLACEHOLDER_PREFIXES, enter_autocast, exit_autocast, set_grad_enabled

__all__ = [
    "Size",
    "checkpoint_of",
    "copy_attributes",
    "dtype_name",
    "hint",
    "known_number",
    "marks_of",
    "regions",
    "same",
    "same_shape",
    "tensor",
]

aten = torch.ops.aten

Size = int | torch.SymInt
"""A size: a number, or a symbol of the graph's shape environment."""


def copy_attributes(source: Any, target: Any) -> None:
    """Copies to ``target`` the attributes that Dynamo attached to ``source`` for the inner compiler."""
    for name, value in vars(source).items():
        if name.startswith((*PLACEHOLDER_PREFIXES, SOURCE_ATTRIBUTE)) or name == "compile_subgraph_reason":
            setattr(target, name, value)


def tensor(node: Any) -> torch.Tensor:
    """The fake tensor of ``node``: its value's shape, strides, dtype and device."""
    value = node.meta["val"]
    assert isinstance(value, torch.Tensor), f"{node} is {type(value).__name__}, not a tensor"
    return value


def is_tensor(node: Any) -> bool:
    return isinstance(node, fx.Node) and isinstance(node.meta.get("val"), torch.Tensor)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def known_number(value: Any) -> Any:
    """The value of a symbolic number in the call that is being compiled, None if unknown; other values unchanged.

    Adds no guard.
    """
    return value.node.hint if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)) else value


def hint(size: Size) -> int:
    """The value of a size in the call that is being compiled. Adds no guard."""
    return int(known_number(size))


def same(a: Size, b: Size) -> bool:
    """Whether two sizes are known to be equal, whatever the inputs. Adds no guard."""
    return statically_known_true(a == b)


def same_shape(a: Sequence[Size], b: Sequence[Size]) -> bool:
    return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))


def product(sizes: Sequence[Size]) -> Size:
    result: Size = 1
    for size in sizes:
        result = result * size
    return result


def regions(graph: fx.Graph) -> dict[fx.Node, tuple[int, int]]:
    """For each node its grad mode (0: as outside, 1: enabled, 2: disabled) and the number of its autocast region.

    In pre-dispatch graphs nodes switch these modes. A rewrite must not move work from one region into another.
    """
    grad = 0
    autocast = [0]
    opened = 0
    result = {}
    for node in graph.nodes:
        if node.target is set_grad_enabled:
            grad = 1 if node.args[0] else 2
        elif node.target is enter_autocast:
            opened += 1
            autocast.append(opened)
        elif node.target is exit_autocast:
            autocast.pop()
        result[node] = (grad, autocast[-1])
    return result


def checkpoint_of(node: fx.Node) -> tuple[str, ...]:
    """What a checkpoint has marked the node with: what is computed anew may not be one with what is not."""
    return tuple(str(node.meta.get(mark)) for mark in ("recompute", "ac_graph_id"))


def marks_of(node: fx.Node) -> tuple[str, ...]:
    """What a checkpoint, and the user (``torch.fx.traceback.annotate``), have marked the node with."""
    return (*checkpoint_of(node), str(node.meta.get("custom")))


def scalar(value: Any) -> bool:
    """Whether the value is a Python or symbolic number; bool is not."""
    return isinstance(value, (int, float, torch.SymInt, torch.SymFloat)) and not isinstance(value, bool)
