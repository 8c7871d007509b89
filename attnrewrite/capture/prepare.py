"""Preparation for tracing: a copy of Dynamo's graph in a form that functional tracing can take."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx
from torch.utils.checkpoint import CheckpointPolicy

from attnrewrite.capture.autocast import AutocastRegions
from attnrewrite.capture.decompositions import DECOMPOSITIONS
from attnrewrite.capture.opaque import OpaqueCalls, is_opaque
from attnrewrite.capture.subclasses import HeldCalls
from attnrewrite.capture.support import attribute_of, enables_gradients, updated_in_place
from attnrewrite.torch_private import checkpoint_ids, enter_autocast, exit_autocast


def wants_gradients(gm: fx.GraphModule) -> bool:
    """Whether a backward pass through the graph may follow."""
    return (torch.is_grad_enabled() or enables_gradients(gm)) and any(
        getattr(node.meta.get("example_value"), "requires_grad", False)
        for node in gm.graph.find_nodes(op="placeholder")
    )


def prepared_graph(
    gm: fx.GraphModule, autocast: AutocastRegions, opaque: OpaqueCalls, held: HeldCalls
) -> fx.GraphModule:
    """A copy of ``gm`` that functional tracing can take; ``gm`` itself if nothing has to change.

    Autocast regions take effect, checkpointed regions are inlined, opaque calls and those on tensor subclasses have
    stand-ins, and calls of whole modules are decomposed.
    """
    special: tuple[Any, ...] = (
        enter_autocast,
        exit_autocast,
        torch.ops.higher_order.tag_activation_checkpoint,
    )
    special = (*special, *_DROPOUT, *DECOMPOSITIONS)
    if not held.any and not any(node.target in special or is_opaque(node, gm) for node in gm.graph.nodes):
        return gm
    copy = _Preparation(opaque, held)
    results = copy.copy(gm, {}, prefix="", tags={})
    copy.graph.output(tuple(held.as_output(result, copy.graph) for result in results))
    for node in copy.graph.nodes:
        autocast.substitute(node)
        node.target = DECOMPOSITIONS.get(node.target, node.target) if node.op == "call_function" else node.target
    _separate_dropout(copy.graph)
    return fx.GraphModule(copy.attributes, copy.graph)


_DROPOUT = (torch.nn.functional.dropout, torch.dropout)


def _separate_dropout(graph: fx.Graph) -> None:
    """Makes the result of dropout safe to update in place, which tracing for export forbids ("frozen storage").

    A dropout that drops nothing is removed, as its result is the argument itself in eager mode too. Any other is
    followed by a copy, if the graph updates anything in place.
    """
    in_place = any(updated_in_place(node) for node in graph.nodes)
    for target in _DROPOUT:
        for node in graph.find_nodes(op="call_function", target=target):
            given = dict(zip(("input", "p", "training", "inplace"), node.args, strict=False), **node.kwargs)
            given["training"] = given.get("training", given.get("train", True))
            if given.get("inplace") or not isinstance(given["training"], bool):
                continue
            if not given["training"] or given.get("p", 0.5) == 0:
                node.replace_all_uses_with(given["input"])
                graph.erase_node(node)
            elif in_place:
                with graph.inserting_after(node):
                    copied = graph.call_function(torch.clone, (node,))
                copied.meta = {key: value for key, value in node.meta.items() if key in ("stack_trace", "recompute")}
                node.replace_all_uses_with(copied, delete_user_cb=lambda user, copied=copied: user is not copied)


class _Preparation:
    """Copies a graph, inlines its checkpointed regions and replaces opaque calls by their stand-ins."""

    def __init__(self, opaque: OpaqueCalls, held: HeldCalls) -> None:
        self.graph = fx.Graph()
        self.attributes: dict[str, Any] = {}
        self._opaque = opaque
        self._held = held

    def copy(self, gm: fx.GraphModule, env: dict[fx.Node, Any], prefix: str, tags: dict[str, Any]) -> Any:
        """Copies the nodes of ``gm`` and returns its outputs.

        Args:
            gm: the graph, or the body of a checkpointed region.
            env: the copies of its nodes; may hold those of inputs already.
            prefix: what the names of attributes begin with.
            tags: entries to add to the ``meta`` of each copy.
        """
        for node in gm.graph.nodes:
            if node in env:
                continue
            if node.op == "output":
                return fx.node.map_arg(node.args[0], env.__getitem__)
            if node.target is operator.getitem and isinstance(env.get(node.args[0]), (tuple, list)):
                env[node] = env[node.args[0]][node.args[1]]
            elif node.target is torch.ops.higher_order.tag_activation_checkpoint and not is_opaque(node, gm):
                env[node] = self._inlined_checkpoint(node, gm, env, prefix)
            elif self._held.holds(node, env):
                env[node] = self._held.stand_in(node, gm, self.graph, env)
            elif is_opaque(node, gm):
                env[node] = self._opaque.stand_in(node, gm, self.graph, env)
            else:
                env[node] = copied = self.graph.node_copy(node, env.__getitem__)
                copied.meta.update(tags)
                if node.op in ("get_attr", "call_module"):
                    copied.target = f"{prefix}{node.target}".replace(".", "_") if prefix else node.target
                    self.attributes[copied.target] = attribute_of(gm, node.target)
        raise AssertionError("a graph without an output")

    def _inlined_checkpoint(self, node: fx.Node, gm: fx.GraphModule, env: dict[fx.Node, Any], prefix: str) -> Any:
        """Copies the nodes of a region, with tags by which the partitioner recomputes them in the backward pass.

        ``tag_activation_checkpoint`` leaves the same tags when AOTAutograd traces through it
        (https://github.com/pytorch/pytorch/blob/v2.13.0/torch/_higher_order_ops/wrap.py).
        """
        body_node, *inputs = node.args
        assert isinstance(body_node, fx.Node)
        body = attribute_of(gm, str(body_node.target))
        inputs = fx.node.map_arg(inputs, env.__getitem__)
        body_env = dict(zip(body.graph.find_nodes(op="placeholder"), inputs, strict=True))
        # Without a backward pass there is nothing to recompute, and AOTAutograd refuses to.
        tags: dict[str, Any] = {}
        if wants_gradients(gm):
            tags = {"recompute": CheckpointPolicy.PREFER_RECOMPUTE, "ac_graph_id": next(checkpoint_ids)}
        return self.copy(body, body_env, f"{prefix}{body_node.target}_", tags)
