"""Graphs within a graph: regions that are compiled once for all their calls, branches, and the bodies of loops.

    y = invoke_subgraph(region, identifier, x, weight)    # torch.compiler.nested_compile_region
    y = cond(predicate, if_true, if_false, (x, weight))   # torch.cond; while_loop, scan and map are alike

Each is a graph of its own, rewritten as one: what it is given counts as known only if every call gives it alike.
"""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from attnrewrite.ir.reason import FINE, Reason
from attnrewrite.report.rows import SiteReport
from attnrewrite.torch_private import HigherOrderOperator

__all__ = ["Region", "holds_repeated", "inline_repeated", "named_within", "regions_of"]

_INVOKE = torch.ops.higher_order.invoke_subgraph
_COND = torch.ops.higher_order.cond
_OF_SCORES = (torch.ops.higher_order.flex_attention, torch.ops.higher_order.flex_attention_backward)
"""What these are given computes on one score."""

_KNOWN = ("stored", "example_value")
"""What is known of an input of the whole graph, and holds in a region that is given it."""


@dataclass(frozen=True)
class Region:
    """One graph within another.

    Attributes:
        name: the attribute of the outer graph that holds it.
        gm: a copy, to be rewritten in place.
        calls: the nodes of the outer graph that call it.
    """

    name: str
    gm: fx.GraphModule
    calls: tuple[fx.Node, ...]

    def why_kept(self, trains: bool) -> Reason:
        """Why the region must stay as it is; empty if it need not."""
        if trains and any(call.target is _COND for call in self.calls):
            # Which layouts these have is the kernels' affair:
            # https://github.com/pytorch/pytorch/blob/v2.13.0/torch/_higher_order_ops/cond.py
            return Reason("the branches of torch.cond must lay out their gradients alike, which kernels do not promise")
        return FINE

    def _digest(self) -> str:
        """Tells the region from what the calls of another level of nesting have made of it."""
        return hashlib.sha256(str(self.gm.graph).encode()).hexdigest()[:12]

    def put_back(self, outer: fx.GraphModule, renamed: bool) -> None:
        """Makes the copy the graph that ``outer`` calls; ``renamed`` if it is another than before.

        The values of its results are forgotten: they would be taken for a record of which of them have gradients, which
        capture does not have. Without one PyTorch runs the region to see:
        https://github.com/pytorch/pytorch/blob/v2.13.0/torch/_higher_order_ops/invoke_subgraph.py get_output_metadata
        """
        for result in self.gm.graph.output_node().all_input_nodes:
            result.meta.pop("val", None)
        setattr(outer, self.name, self.gm)
        for call in self.calls:
            if renamed and call.target is _INVOKE:
                # PyTorch keeps what it traced by this name, and may meet the region as it was, too.
                call.update_arg(1, f"{call.args[1]}_rewritten_{self._digest()}")


def regions_of(gm: fx.GraphModule) -> Iterator[Region]:
    """The regions of a captured graph, each copied, in the order of their first call."""
    calls: dict[str, list[tuple[fx.Node, tuple[Any, ...]]]] = {}
    for node in gm.graph.nodes:
        for part, operands in _parts(node):
            if part.op == "get_attr":
                calls.setdefault(str(part.target), []).append((node, operands))
    for name, found in calls.items():
        source = operator.attrgetter(name)(gm)
        if isinstance(source, fx.GraphModule):
            copied = _copied(source)
            _tell_what_is_known(copied, [operands for _, operands in found])
            yield Region(name, copied, tuple(node for node, _ in found))


def _parts(node: fx.Node) -> list[tuple[fx.Node, tuple[Any, ...]]]:
    """The graphs that a node calls, each with its operands where these are the node's, one for one."""
    args: Any = node.args
    if not isinstance(node.target, HigherOrderOperator) or node.target in _OF_SCORES:
        return []
    graphs = [part for part in node.all_input_nodes if part.op == "get_attr"]
    if node.target is _INVOKE:
        return [(args[0], tuple(args[2:]))]
    operands = tuple(args[3]) if node.target is _COND else ()
    return [(part, operands) for part in graphs]


def holds_repeated(gm: fx.GraphModule) -> bool:
    """Whether a region is called that is compiled once for all its calls."""
    return bool(gm.graph.find_nodes(op="call_function", target=_INVOKE))


def inline_repeated(gm: fx.GraphModule) -> bool:
    """Puts the nodes of regions in the place of their calls; returns whether there were any.

    For training through Inductor, which reads a gradient that reaches a region in another layout than it has: with
    torch 2.13 the gradient of ``region(x).sum(-1, keepdim=True).expand(...)`` for a linear layer's weight is wrong.
    """
    found = False
    while calls := gm.graph.find_nodes(op="call_function", target=_INVOKE):
        for call in calls:
            _inline(gm, call)
        found = True
    return found


def _inline(gm: fx.GraphModule, call: fx.Node) -> None:
    args: Any = call.args
    name = str(args[0].target)
    region = operator.attrgetter(name)(gm)
    copies: dict[fx.Node, Any] = dict(zip(region.graph.find_nodes(op="placeholder"), args[2:], strict=True))
    results: Any = ()
    with gm.graph.inserting_before(call):
        for node in region.graph.nodes:
            if node.op == "output":
                results = fx.node.map_arg(node.args[0], copies.__getitem__)
            elif node.op == "get_attr":
                copies[node] = gm.graph.create_node("get_attr", f"{name}.{node.target}")
                copies[node].meta = dict(node.meta)
            elif node.op != "placeholder":
                copies[node] = gm.graph.node_copy(node, copies.__getitem__)
    for user in list(call.users):
        assert user.target is operator.getitem
        user.replace_all_uses_with(results[user.args[1]])
        gm.graph.erase_node(user)
    gm.graph.erase_node(call)
    if not args[0].users:
        gm.graph.erase_node(args[0])


def _copied(source: fx.GraphModule) -> fx.GraphModule:
    graph = fx.Graph()
    graph.output(graph.graph_copy(source.graph, {}))
    copied = fx.GraphModule(source, graph)
    for old, new in zip(source.graph.nodes, graph.nodes, strict=True):
        new.meta = dict(old.meta)
    copied.meta = dict(source.meta)
    return copied


def _tell_what_is_known(region: fx.GraphModule, calls: list[tuple[Any, ...]]) -> None:
    for index, placeholder in enumerate(region.graph.find_nodes(op="placeholder")):
        given: list[Any] = [operands[index] if operands else None for operands in calls]
        if not all(isinstance(node, fx.Node) and node.op == "placeholder" for node in given):
            continue
        for key in _KNOWN:
            known = [node.meta.get(key) for node in given]
            if known[0] is not None and all(_same_is_known(value, known[0]) for value in known):
                placeholder.meta[key] = known[0]


def _same_is_known(value: Any, other: Any) -> bool:
    """Of example values only what they are counts: parameters of several layers are given in turn."""
    if isinstance(value, torch.Tensor) and isinstance(other, torch.Tensor):
        kinds = [(isinstance(each, torch.nn.Parameter), each.requires_grad) for each in (value, other)]
        return kinds[0] == kinds[1]
    return value is other


def named_within(region: str, row: SiteReport) -> SiteReport:
    """The row of a site of a region; the names of its nodes are those of the region's graph."""
    return replace(
        row,
        name=f"{region}.{row.name}",
        nodes_before=tuple(f"{region}.{name}" for name in row.nodes_before),
        nodes_after=tuple(f"{region}.{name}" for name in row.nodes_after),
    )
