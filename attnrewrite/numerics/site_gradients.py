"""Gradients of one site, by the source's nodes and by those that replaced them, from the same values."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from attnrewrite.numerics.formula import in_float64

__all__ = ["carrying_gradients", "gradients", "gradients_in_float64"]

Call = Callable[[fx.Node, Any, Any], Any]


def carrying_gradients(gm: fx.GraphModule, inputs: Sequence[Any]) -> set[fx.Node]:
    """The nodes that a gradient may reach when the graph is called with these inputs; none if none are recorded."""
    if not torch.is_grad_enabled():
        return set()
    found: set[fx.Node] = set()
    remaining = iter(inputs)
    for node in gm.graph.nodes:
        if node.op == "placeholder":
            value = next(remaining)
            carries = isinstance(value, Tensor) and value.requires_grad
        else:
            carries = any(read in found for read in node.all_input_nodes)
        value = node.meta.get("val", node.meta.get("example_value"))  # A tensor subclass has no value in the IR.
        if carries and isinstance(value, Tensor) and value.is_floating_point():
            found.add(node)
    return found


def gradients(
    nodes: Sequence[tuple[fx.Node, Any, Any]],
    result: fx.Node,
    asked: Sequence[fx.Node],
    values: Mapping[fx.Node, Any],
    call: Call,
) -> list[Tensor]:
    """The gradients of ``result`` with respect to the ``asked`` nodes, for one fixed random gradient of the result.

    Args:
        nodes: the calls from the asked nodes to the result, each a node with its arguments.
        values: those of all other nodes that the calls read.
        call: makes the call of a node.
    """
    own: dict[fx.Node, Any] = {}
    with torch.enable_grad():
        leaves = [values[node].detach().clone().requires_grad_() for node in asked]
        own.update(zip(asked, leaves, strict=True))
        for node, args, kwargs in nodes:
            args, kwargs = fx.node.map_arg((args, kwargs), lambda read: own[read] if read in own else values[read])
            own[node] = call(node, args, kwargs)
        return _backward(own[result], leaves)


def gradients_in_float64(
    formula: Sequence[fx.Node], asked: Sequence[fx.Node], values: Mapping[fx.Node, Any], call: Call
) -> list[Tensor]:
    """The same by the formula in float64, as :func:`attnrewrite.numerics.formula.in_float64` evaluates it."""
    with torch.enable_grad():
        leaves = [values[node].detach().double().clone().requires_grad_() for node in asked]
        return _backward(in_float64(formula, {**values, **dict(zip(asked, leaves, strict=True))}, call), leaves)


def _backward(result: Tensor, leaves: Sequence[Tensor]) -> list[Tensor]:
    if not result.requires_grad:
        return [torch.zeros_like(leaf) for leaf in leaves]
    generator = torch.Generator().manual_seed(0)
    # One bit each: the same numbers in every dtype.
    signs = torch.randint(2, result.shape, generator=generator).mul(2).sub(1).to(result)
    found = torch.autograd.grad(result, leaves, signs, allow_unused=True)
    return [torch.zeros_like(leaf) if grad is None else grad for grad, leaf in zip(found, leaves, strict=True)]
