"""Replaces an attention with the call of the kernel that serves it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from attnrewrite.ir.axes import Operand, axes_of
from attnrewrite.ir.builder import Builder, Written
from attnrewrite.ir.nodes import marks_of, regions, same_shape, tensor
from attnrewrite.ir.ops import has_effect, is_cast
from attnrewrite.ir.site import AttentionSite, CanonicalAttention
from attnrewrite.ir.views import is_layout_op
from attnrewrite.kernels import Kernel
from attnrewrite.kernels.common.layout import in_memory_order_of
from attnrewrite.torch_private import enter_autocast, exit_autocast, is_erased

aten = torch.ops.aten


def latest(node: fx.Node, replaced: dict[fx.Node, fx.Node]) -> fx.Node:
    while node in replaced:
        node = replaced[node]
    return node


def redirected(site: AttentionSite, replaced: dict[fx.Node, fx.Node]) -> AttentionSite:
    """The site with replaced operands: an operand may be the result of an earlier site that was rewritten."""
    # Other sites, found later, may have divided the axes.
    query_axes, key_axes, feature_axes = (
        axes_of((axes,)) for axes in (site.query_axes, site.key_axes, site.feature_axes)
    )
    site = replace(site, query_axes=query_axes, key_axes=key_axes, feature_axes=feature_axes)
    return site.with_operands(lambda operand: current_operand(operand, replaced))


def current_operand(operand: Operand, replaced: dict[fx.Node, fx.Node]) -> Operand:
    return Operand(replaced.get(operand.node, operand.node), operand.layout).resolved()


def replace_node(
    graph: fx.Graph, old: fx.Node, new: fx.Node, builder: Builder, replaced: dict[fx.Node, fx.Node]
) -> None:
    if not (_strides_are_free(old) or same_shape(tensor(old).stride(), tensor(new).stride())):
        new = in_memory_order_of(tensor(old), new, builder)
    old.replace_all_uses_with(new)
    replaced[old] = new
    remove_unused(graph, (old,))


class WrittenByRegion:
    """Nodes written for the kernels of earlier sites, such as a mask that all layers share, for reuse by later sites.

    Nodes are reused only within a region: those written where gradients are off have none, and a checkpoint recomputes
    its own.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self._regions = regions(graph)
        self._written: dict[Any, Written] = {}

    def of(self, node: fx.Node) -> Written:
        return self._written.setdefault((self._regions[node], marks_of(node)), {})


def splice(
    gm: fx.GraphModule,
    site: CanonicalAttention,
    kernel: Kernel,
    replaced: dict[fx.Node, fx.Node],
    written: WrittenByRegion,
) -> tuple[fx.Node, ...]:
    """Replaces the site with the kernel's nodes, removes nodes that only the site used, and returns the new ones."""
    builder = Builder(gm, before=site.result, like=site.anchor, written=written.of(site.result))
    autocast = None
    if site.in_autocast and not site.fused:
        # The kernel's operands and mask already have the right dtypes; autocast would round the mask.
        autocast = builder.insert(enter_autocast, (site.device.type, None, False, None), {}, None)
    output = kernel.emit(site, builder)
    if autocast is not None:
        builder.insert(exit_autocast, (autocast,), {}, None)
    if not _strides_are_free(site.result):
        output = in_memory_order_of(tensor(site.result), output, builder)
    site.result.replace_all_uses_with(output)
    replaced[site.result] = output
    remove_unused(gm.graph, site.interior if site.parts else (site.result,))
    return tuple(builder.created)


_STRIDE_BLIND = frozenset(
    {
        aten.linear.default,
        aten.matmul.default,
        aten.bmm.default,
        aten.mm.default,
        aten.addmm.default,
        aten.baddbmm.default,
        aten.einsum.default,
    }
)
"""Operators whose result has the same strides whatever the strides of their operands are."""


def _strides_are_free(node: fx.Node) -> bool:
    """Whether no user depends on the strides of ``node``; views among its users become reshapes, which accept any."""
    free = True
    for user in node.users:
        if user.target in _STRIDE_BLIND:
            continue
        # `_unsafe_view` stands behind contiguous copies alone.
        if user.target is aten.view.default:
            user.target = aten.reshape.default
        free = free and (is_layout_op(user) or is_cast(user)) and _strides_are_free(user)
    return free


def remove_unused(graph: fx.Graph, nodes: Sequence[fx.Node]) -> None:
    """Removes the nodes that have no users, the last one first, and then the sources that only they used."""
    pending = [*nodes]
    while pending:
        node = pending.pop()
        # Not `is_impure`: that counts dropout, which the removed attention took with it.
        if is_erased(node) or node.users or node.op != "call_function" or has_effect(node):
            continue
        pending.extend(node.all_input_nodes)
        graph.erase_node(node)
