"""vmap lowering: replaces ``torch.vmap`` in Dynamo's graph by the batched operators.

Dynamo records a ``vmap`` as calls that enter and leave a level of functorch, with the mapped function's operators in
between. Pre-dispatch tracing cannot see through these levels, but ordinary tracing can: each stretch from the outermost
entry to its exit is traced by itself and replaced by the result. The masks of transformers are such graphs: a function
of one query and one key is mapped over all of them.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx

from attnrewrite.ir.nodes import copy_attributes
from attnrewrite.torch_private import (
    VMAP_ENTERS,
    VMAP_LEAVES,
    VMAP_LOADS,
    FakeTensor,
    enter_autocast,
    exit_autocast,
    leave_vmap_level,
    set_grad_enabled,
    vmap_depth,
)

__all__ = ["holds_vmap", "vmap_lowered"]


def holds_vmap(gm: fx.GraphModule) -> bool:
    """Whether the graph has a call of ``torch.vmap``."""
    return any(_name(node) == VMAP_ENTERS for node in gm.graph.nodes)


_WHERE = ("stack_trace", "nn_module_stack", "custom")
"""Entries of ``meta`` that say which part of the source a node is, and what was asked for it."""


def _name(node: fx.Node) -> str:
    return getattr(node.target, "__name__", "") if node.op == "call_function" else ""


def vmap_lowered(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy of ``gm`` with batched operators in place of ``vmap``.

    Raises:
        ValueError: an input of ``vmap`` is neither a tensor nor a size, or its function uses a constant tensor, or
            switches grad mode or autocast.
    """
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    stretches = {stretch[0]: stretch for stretch in _stretches(gm.graph)}
    inside = {node for stretch in stretches.values() for node in stretch}
    for node in gm.graph.nodes:
        if node in stretches:
            _inline(gm, stretches[node], graph, copies)
        elif node not in inside and _name(node) != VMAP_LOADS:
            copies[node] = graph.node_copy(node, copies.__getitem__)
            copy_attributes(node, copies[node])
    result = fx.GraphModule(gm, graph)
    result.meta = copy.copy(gm.meta)
    return result


def _stretches(graph: fx.Graph) -> Iterator[list[fx.Node]]:
    """Yields the nodes from each outermost entry of ``vmap`` to its exit, both included."""
    level = 0
    stretch: list[fx.Node] = []
    for node in graph.nodes:
        if _name(node) == VMAP_ENTERS:
            level += 1
        if level:
            stretch.append(node)
        if _name(node) == VMAP_LEAVES:
            level -= 1
            if level == 0:
                yield stretch
                stretch = []


def _inline(gm: fx.GraphModule, stretch: Sequence[fx.Node], graph: fx.Graph, copies: dict[fx.Node, fx.Node]) -> None:
    """Traces a stretch and adds the result to ``graph``; ``copies`` maps nodes of ``gm`` to those of ``graph``."""
    own = set(stretch)
    inputs = list(dict.fromkeys(arg for node in stretch for arg in node.all_input_nodes if arg not in own))
    outputs = [node for node in stretch if any(user not in own for user in node.users)]
    values = [node.meta.get("example_value") for node in inputs]
    if not all(isinstance(value, (torch.Tensor, torch.SymInt, int)) for value in values):
        raise ValueError("an input of vmap is neither a tensor nor a size")
    # Tracing leaves the switches out, and what stands between them would be like what is outside.
    gradients = torch.is_grad_enabled() or any(node.target is set_grad_enabled and node.args[0] for node in stretch)
    switches = {enter_autocast, exit_autocast} | ({set_grad_enabled} if gradients else set())
    if any(node.target in switches for node in stretch):
        raise ValueError("the function that vmap maps switches grad mode or autocast")
    body = fx.Graph()
    env = {node: body.placeholder(f"input{position}") for position, node in enumerate(inputs)}
    for node in stretch:
        env[node] = body.node_copy(node, env.__getitem__)
    body.output(tuple(env[node] for node in outputs))
    with _levels_restored(), _fake_mode(gm):
        traced = make_fx(fx.GraphModule(gm, body), _allow_non_fake_inputs=True)(*values)
    placeholders = iter(inputs)
    inner: dict[fx.Node, Any] = {}
    where = {key: value for key, value in stretch[0].meta.items() if key in _WHERE}
    for node in traced.graph.nodes:
        if node.op == "placeholder":
            inner[node] = copies[next(placeholders)]
        elif node.op == "output":
            results = node.args[0]
        elif node.op == "get_attr":
            raise ValueError("the function that vmap maps uses a constant tensor")
        else:
            inner[node] = graph.node_copy(node, inner.__getitem__)
            inner[node].meta = {**where, "example_value": node.meta.get("val")}
    for node, result in zip(outputs, results, strict=True):
        copies[node] = inner[result]


def _fake_mode(gm: fx.GraphModule) -> Any:
    """The fake mode that Dynamo traced the graph in, which is not the current one in a backend."""
    values = (node.meta.get("example_value") for node in gm.graph.nodes)
    return next((value.fake_mode for value in values if isinstance(value, FakeTensor)), contextlib.nullcontext())


class _levels_restored:  # noqa: N801
    """Restores the levels of functorch at exit, even if tracing fails midway."""

    def __enter__(self) -> None:
        self._depth = vmap_depth()

    def __exit__(self, *exception: object) -> None:
        while vmap_depth() > self._depth:
            leave_vmap_level()
