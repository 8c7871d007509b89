"""Calls that are given tensors made of others: they stay as they are, and everything between them is read.

    y = F.linear(x, quantized)                  a stand-in: y of x
    z = DTensor.from_local(y, mesh, ...)        nothing, until something plain is made of it
    z = z.redistribute(...).to_local()          a stand-in: z of y

Functional tracing cannot express a subclass such as a DTensor or a quantized weight. While the graph is traced, an
operator with the same plain inputs and outputs stands in for such calls; afterwards they are put back in its place.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from attnrewrite.capture.opaque import STAND_IN, forget_outputs, promise_outputs, refuse_mutation
from attnrewrite.capture.support import CaptureError, attribute_of, has_storage, storage_of, updated_in_place
from attnrewrite.ir.nodes import copy_attributes
from attnrewrite.ir.source import source_name
from attnrewrite.torch_private import (
    enter_autocast,
    exit_autocast,
    is_traceable_wrapper_subclass,
    set_grad_enabled,
    tree_leaves,
)

__all__ = ["HeldCalls", "is_held"]

_PLAIN = (torch.Tensor, torch.SymInt, torch.SymFloat, torch.SymBool, bool, int, float, complex, str, type(None))


def is_held(value: Any) -> bool:
    """Whether a value cannot be traced: it is, or contains, a tensor made of others, or an object (a DeviceMesh)."""
    if isinstance(value, torch.Tensor):
        return bool(is_traceable_wrapper_subclass(value))
    return any(is_traceable_wrapper_subclass(leaf) or not isinstance(leaf, _PLAIN) for leaf in tree_leaves(value))


@dataclass(frozen=True, eq=False)
class Held:
    """A call, or an input of the graph, whose result cannot be traced.

    Attributes:
        node: the node of Dynamo's graph.
        gm: the graph that it is a node of.
        given: what its arguments are in the graph that is traced: a node, a number, or another one that is held.
    """

    node: fx.Node
    gm: fx.GraphModule
    given: dict[fx.Node, Any]

    @property
    def is_input(self) -> bool:
        return self.node.op == "placeholder"

    def plain(self) -> Iterator[fx.Node]:
        """The nodes of the traced graph that it is computed from, some of them more than once."""
        for argument, value in self.given.items():
            if isinstance(value, Held):
                yield from value.plain()
            elif isinstance(value, fx.Node) and argument.op != "get_attr":
                yield value


class HeldCalls:
    """The calls of one graph that are given tensors made of others."""

    def __init__(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> None:
        """Raises:
        CaptureError: such calls and something else in the graph would have to keep their order.
        """
        self._calls: dict[int, tuple[Held, list[fx.Node]]] = {}
        self._results: dict[Held, fx.Node] = {}
        placeholders = gm.graph.find_nodes(op="placeholder")
        values = [
            node.meta.get("example_value", value) for node, value in zip(placeholders, example_inputs, strict=True)
        ]
        self.inputs = frozenset(node for node, value in zip(placeholders, values, strict=True) if is_held(value))
        self.any = bool(self.inputs) or any(is_held(node.meta.get("example_value")) for node in gm.graph.nodes)
        if self.any:
            _require_no_order(gm, self.inputs)

    @property
    def words(self) -> str:
        """What is held, for the report; empty if nothing is."""
        kinds = [
            f"{source_name(node) or node.name} ({type(value).__module__}.{type(value).__name__})"
            for node in self.inputs
            if is_traceable_wrapper_subclass(value := node.meta.get("example_value"))
        ]
        others = f" and {len(kinds) - 3} more" if len(kinds) > 3 else ""
        names = ", ".join(sorted(kinds)[:3]) + others
        return f"what is computed from tensors that are made of others is left as it is: {names}" if kinds else ""

    def holds(self, node: fx.Node, env: dict[fx.Node, Any]) -> bool:
        """Whether the node stays out of the graph that is traced."""
        if not self.any:
            return False
        if node in self.inputs or any(isinstance(env.get(argument), Held) for argument in node.all_input_nodes):
            return True
        return node.op != "get_attr" and is_held(node.meta.get("example_value"))

    def stand_in(self, node: fx.Node, gm: fx.GraphModule, graph: fx.Graph, env: dict[fx.Node, Any]) -> Any:
        """What ``node`` is in ``graph``: a stand-in, several, a number; or itself, to be put back when it is needed.

        Raises:
            CaptureError: its result is a number that is not known, or it is given the whole result of another.
        """
        held = Held(node, gm, {argument: env[argument] for argument in node.all_input_nodes})
        for argument in node.all_input_nodes:
            module = attribute_of(gm, str(argument.target)) if argument.op == "get_attr" else None
            if isinstance(module, torch.nn.Module):
                refuse_mutation(node, module)
        if any(isinstance(value, (tuple, list)) for value in held.given.values()):
            raise CaptureError(f"{node.name} is given several results of a call on a tensor subclass at once")
        if "example_value" not in node.meta or is_held(value := node.meta["example_value"]):
            return held
        if isinstance(value, (bool, int, float)):
            return value
        several = isinstance(value, (tuple, list))
        flat = list(value) if several else [value]
        if not flat or not all(isinstance(each, torch.Tensor) for each in flat):
            raise CaptureError(f"{node.name} is computed from a tensor subclass and is no tensor")
        items = self._stand_in(held, graph, flat)
        return tuple(items) if several else items[0]

    def as_output(self, value: Any, graph: fx.Graph) -> Any:
        """A node that stands for ``value`` among the outputs of ``graph``, if that is held; else ``value``."""
        return self._stand_in(value, graph, [torch.empty(0)])[0] if isinstance(value, Held) else value

    def _stand_in(self, held: Held, graph: fx.Graph, values: Sequence[torch.Tensor]) -> list[fx.Node]:
        leaves = list(dict.fromkeys(held.plain()))
        tensors = [leaf for leaf in leaves if isinstance(leaf.meta.get("example_value"), torch.Tensor)]
        sizes = [leaf for leaf in leaves if leaf not in tensors]
        index = promise_outputs(values)
        self._calls[index] = held, [*tensors, *sizes]
        node = graph.call_function(STAND_IN, (tensors, sizes, index))
        node.meta = dict(held.node.meta)
        items = [graph.call_function(operator.getitem, (node, place)) for place in range(len(values))]
        for item, value in zip(items, values, strict=True):
            item.meta = {**held.node.meta, "example_value": value}
        return items

    def restore(self, graph: fx.Graph, attributes: dict[str, Any], inputs: dict[fx.Node, fx.Node]) -> None:
        """Puts the calls back in place of their stand-ins in ``graph``.

        Args:
            attributes: receives the modules that the calls are given.
            inputs: the inputs of ``graph`` by those of Dynamo's graph.
        """
        plain: dict[fx.Node, fx.Node] = {}
        for node in graph.find_nodes(op="call_function", target=STAND_IN):
            tensors, sizes, index = node.args
            if index not in self._calls:
                continue
            held, leaves = self._calls[index]
            for leaf, current in zip(leaves, [*tensors, *sizes], strict=True):
                plain.setdefault(leaf, current)
            with graph.inserting_before(node):
                result = self._put_back(held, graph, attributes, inputs, plain)
            several = isinstance(held.node.meta.get("example_value"), (tuple, list))
            for item in list(node.users):
                if several:
                    item.args = (result, item.args[1])
                    continue
                if not is_held(held.node.meta.get("example_value")):
                    result.meta["val"] = item.meta["val"]
                item.replace_all_uses_with(result)
                graph.erase_node(item)
            graph.erase_node(node)

    def _put_back(
        self,
        held: Held,
        graph: fx.Graph,
        attributes: dict[str, Any],
        inputs: dict[fx.Node, fx.Node],
        plain: dict[fx.Node, fx.Node],
    ) -> fx.Node:
        if held.is_input:
            return inputs[held.node]
        if held in self._results:
            return self._results[held]
        env: dict[fx.Node, Any] = {}
        for argument, value in held.given.items():
            if isinstance(value, Held):
                env[argument] = self._put_back(value, graph, attributes, inputs, plain)
            elif argument.op == "get_attr":
                name = f"{argument.target}".replace(".", "_") + "_held"
                attributes[name] = attribute_of(held.gm, str(argument.target))
                env[argument] = graph.get_attr(name)
            else:
                env[argument] = plain[value] if isinstance(value, fx.Node) else value
        result = graph.node_copy(held.node, env.__getitem__)
        copy_attributes(held.node, result)
        result.meta = {key: value for key, value in held.node.meta.items() if key != "val"}
        self._results[held] = result
        return result

    def forget(self) -> None:
        """Releases what stand-ins returned; called when tracing is over."""
        forget_outputs(self._calls)


def _require_no_order(gm: fx.GraphModule, inputs: frozenset[fx.Node]) -> None:
    """
    Raises:
        CaptureError: something that is held would move to where it is another: past a switch of a mode, or past an
            update in place of what it reads.
    """
    first = min(inputs, key=lambda node: node.name, default=None)
    name = "" if first is None else source_name(first) or first.name
    subject = f"a tensor subclass ({name})" if name else "a tensor subclass"
    parts = [part for part in gm.modules() if isinstance(part, fx.GraphModule)]
    nodes = [node for part in parts for node in part.graph.nodes]
    shared: set[Any] = set()
    for part in parts:
        modes = _modes(part.graph)
        for node in part.graph.nodes:
            sources = [each for each in node.all_input_nodes if is_held(each.meta.get("example_value"))]
            if not sources and not is_held(node.meta.get("example_value")):
                continue
            if any(modes[each] != modes[node] for each in sources if each.op != "placeholder"):
                raise CaptureError(f"the graph switches autocast or gradients while it computes with {subject}")
            if node.op == "output":
                continue
            if updated_in_place(node):
                raise CaptureError(f"{node.name} updates {subject} in place")
            if not node.users and node.op != "placeholder" and node.is_impure():
                raise CaptureError(f"{node.name} has an effect on {subject}, and no result that is read")
            shared.update(_memory_that_is_read_later(node, sources))
    for node in nodes:
        for updated in updated_in_place(node):
            value = updated.meta.get("example_value")
            if not shared.isdisjoint(_memory(value)) or not isinstance(value, torch.Tensor):
                raise CaptureError(f"{node.name} updates in place what {subject} is made of or gives")


def _memory_that_is_read_later(node: fx.Node, sources: Sequence[fx.Node]) -> set[Any]:
    """The memory of what a held call gives, or is made of where that is not read at once."""
    value = node.meta.get("example_value")
    given = {key for each in node.all_input_nodes for key in _memory(each.meta.get("example_value"))}
    made = _memory(value)
    if is_held(value):
        return given | made
    own = {key for each in sources for key in _memory(each.meta.get("example_value"))}
    return own | (made if isinstance(value, (tuple, list)) else given & made)


def _memory(value: Any) -> set[Any]:
    """The memory of all tensors of a value, and of those that they are made of."""
    found: set[Any] = set()
    for leaf in tree_leaves(value):
        if is_traceable_wrapper_subclass(leaf):
            names, _ = leaf.__tensor_flatten__()
            found |= {key for name in names for key in _memory(getattr(leaf, name))}
        elif isinstance(leaf, torch.Tensor) and has_storage(leaf):
            found.add(storage_of(leaf))
    return found


def _modes(graph: fx.Graph) -> dict[fx.Node, Any]:
    """What tells apart, for each node, the switches of autocast and gradients that it stands behind."""
    gradients = torch.is_grad_enabled()
    autocast: tuple[fx.Node, ...] = ()
    modes = {}
    for node in graph.nodes:
        if node.target is set_grad_enabled:
            gradients = bool(node.args[0])
        elif node.target is enter_autocast:
            autocast = (*autocast, node)
        elif node.target is exit_autocast:
            autocast = tuple(each for each in autocast if each is not node.args[0])
        modes[node] = gradients, autocast
    return modes
