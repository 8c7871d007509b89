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
    "memory_order",
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
    equal = a == b
    return equal if isinstance(equal, bool) else statically_known_true(equal)


def same_shape(a: Sequence[Size], b: Sequence[Size]) -> bool:
    return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))


def product(sizes: Sequence[Size]) -> Size:
    result: Size = 1
    for size in sizes:
        result = result * size
    return result


AutocastState = tuple[tuple[str, torch.dtype], ...]
"""The types of devices, among those of a graph, for which autocast is on, each with the dtype that it casts to."""


def regions(graph: fx.Graph) -> dict[fx.Node, tuple[bool, AutocastState]]:
    """For each node whether gradients are enabled, and what autocast does there.

    In pre-dispatch graphs nodes switch these modes. A rewrite must not move work to where they are different. A switch
    that changes nothing for the devices of the graph, such as one of CUDA's autocast on the CPU, makes no difference.
    Outside of all switches a graph runs in the grad mode that it is compiled in: Dynamo guards it.
    """
    kinds = sorted({tensor(node).device.type for node in graph.nodes if is_tensor(node)})
    grad = torch.is_grad_enabled()
    autocast = [_autocast_outside(kinds)]
    result = {}
    for node in graph.nodes:
        if node.target is set_grad_enabled:
            grad = bool(node.args[0])
        elif node.target is enter_autocast:
            autocast.append(_switched(autocast[-1], *node.args))
        elif node.target is exit_autocast:
            autocast.pop()
        state = autocast[-1]
        result[node] = (grad, tuple((kind, dtype) for kind, (enabled, dtype) in state.items() if enabled))
    return result


_Switches = dict[str, tuple[bool, torch.dtype]]
"""For each type of device whether autocast is on, and the dtype that it casts to, or would."""


def _autocast_outside(kinds: Sequence[str]) -> _Switches:
    known = [kind for kind in kinds if torch.amp.is_autocast_available(kind)]
    return {kind: (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in known}


def _switched(state: _Switches, kind: Any, dtype: Any = None, enabled: Any = True, *_: Any) -> _Switches:
    """What autocast does behind a switch with these arguments, those of ``torch.autocast``."""
    if kind not in state:
        return state
    return {**state, kind: (enabled is not False, dtype if isinstance(dtype, torch.dtype) else state[kind][1])}


def checkpoint_of(node: fx.Node) -> tuple[str, ...]:
    """What a checkpoint has marked the node with: what is computed anew may not be one with what is not."""
    return tuple(str(node.meta.get(mark)) for mark in ("recompute", "ac_graph_id"))


def marks_of(node: fx.Node) -> tuple[str, ...]:
    """What a checkpoint, and the user (``torch.fx.traceback.annotate``), have marked the node with."""
    return (*checkpoint_of(node), str(node.meta.get("custom")))


def scalar(value: Any) -> bool:
    """Whether the value is a Python or symbolic number; bool is not."""
    return isinstance(value, (int, float, torch.SymInt, torch.SymFloat)) and not isinstance(value, bool)


def memory_order(original: torch.Tensor) -> list[int]:
    """The dimensions, from the one whose entries are farthest apart in memory; as they are where that is not known."""
    strides = original.stride()
    if all(isinstance(stride, int) for stride in strides):
        return sorted(range(original.dim()), key=lambda dim: -strides[dim])
    # Symbolic strides are not compared: each dimension is known to begin where the next inner one ends.
    order: list[int] = []
    left = [dim for dim in range(original.dim()) if not same(original.shape[dim], 1)]
    span: Size = 1
    while left:
        inner = next((dim for dim in reversed(left) if same(strides[dim], span)), None)
        if inner is None:
            return list(range(original.dim()))
        order.append(inner)
        left.remove(inner)
        span = span * original.shape[inner]
    return [*(dim for dim in range(original.dim()) if dim not in order), *reversed(order)]
