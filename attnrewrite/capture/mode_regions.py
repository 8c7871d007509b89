"""Regions that switch a mode: what the mode does to what is read there is written out, so that nobody need ask.

with torch.no_grad():                               key = kv.detach()[:, [0] * frames]
    key = kv[:, [0] * frames]                   =
with torch.autocast("cpu", torch.bfloat16):         scores = torch.baddbmm(mask.bfloat16(), query, key)
    scores = torch.baddbmm(mask, query, key)    =
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from attnrewrite.capture.support import attribute_of
from attnrewrite.ir.builder import Builder
from attnrewrite.ir.model_state import is_model_state
from attnrewrite.ir.nodes import is_tensor, regions, tensor
from attnrewrite.torch_private import set_grad_enabled

__all__ = ["cast_addends", "detach_in_regions"]

aten = torch.ops.aten

_COMPUTES = (
    aten.linear.default,
    aten.layer_norm.default,
    aten.rms_norm.default,
    aten.group_norm.default,
    aten.embedding.default,
)
"""What models do with parameters: nothing looks behind it, and a fused projection reads the parameter itself."""


def detach_in_regions(part: fx.GraphModule) -> None:
    """Detaches, in place, what has a gradient and is read where gradients are off."""
    graph = part.graph
    if not graph.find_nodes(op="call_function", target=set_grad_enabled):
        return
    mode = {node: grad for node, (grad, _) in regions(graph).items()}
    with_gradient: set[fx.Node] = set()
    detached: dict[fx.Node, fx.Node] = {}
    for node in list(graph.nodes):
        if node.target is set_grad_enabled:
            detached.clear()
        elif node.op in ("placeholder", "get_attr"):
            if _requires_gradient(part, node):
                with_gradient.add(node)
        elif node.op != "call_function" or with_gradient.isdisjoint(node.all_input_nodes):
            continue
        elif mode[node] or node.target is operator.getitem:  # An item of a list is no operation of its own.
            if not is_tensor(node) or tensor(node).is_floating_point() or tensor(node).is_complex():
                with_gradient.add(node)
        elif any(user.op != "output" for user in node.users):
            # A view that is returned says that it has a gradient, in eager mode as well.
            _detach_arguments(node, with_gradient, detached)


def cast_addends(part: fx.GraphModule) -> None:
    """Casts, in place, what a product adds up with where autocast does: a mask may be minus infinity then."""
    graph = part.graph
    calls = [node for target in _SUMS for node in graph.find_nodes(op="call_function", target=target)]
    if not calls:
        return
    autocast = {node: dict(kinds) for node, (_, kinds) in regions(graph).items()}
    for node in calls:
        addend: Any = node.args[0]
        if not is_tensor(node) or not is_tensor(addend):
            continue
        dtype = autocast[node].get(tensor(node).device.type)
        own = tensor(addend).dtype
        if dtype is None or own in (dtype, torch.float64) or not own.is_floating_point:
            continue
        node.update_arg(0, Builder(part, before=node, like=node).call(aten.to.dtype, addend, dtype))


_SUMS = (aten.baddbmm.default, aten.addmm.default, aten.addbmm.default)


def _requires_gradient(part: fx.GraphModule, node: fx.Node) -> bool:
    value = attribute_of(part, str(node.target)) if node.op == "get_attr" else node.meta.get("example_value")
    return isinstance(value, torch.Tensor) and value.requires_grad


def _detach_arguments(node: fx.Node, with_gradient: set[fx.Node], detached: dict[fx.Node, fx.Node]) -> None:
    written = node.args[:1] if node.target is aten.copy_.default else ()
    for read in node.all_input_nodes:
        if read not in with_gradient or read in written or not is_tensor(read):
            continue
        if node.target in _COMPUTES and is_model_state(read):
            continue
        if read not in detached:
            with node.graph.inserting_before(node):
                detached[read] = node.graph.call_function(aten.detach.default, (read,))
            detached[read].meta = {**read.meta}
        node.replace_input_with(read, detached[read])
