"""Opaque calls: higher-order operators that tracing must not enter have stand-ins while a graph is traced."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import fx

from attnrewrite.capture.support import CaptureError, attribute_of, enables_gradients, storage_of
from attnrewrite.torch_private import CHECKPOINT_CONTEXT


class OpaqueCalls:
    """Takes calls of higher-order operators through tracing unchanged.

    Functional tracing would inline some of them and lose their purpose (the backward of a custom
    ``autograd.Function``), and has no rule for others. While the graph is traced, an operator with the same outputs
    stands in for each call; afterwards the original call is restored.
    """

    def __init__(self) -> None:
        self._calls: dict[int, tuple[fx.Node, dict[fx.Node, torch.nn.Module]]] = {}

    def stand_in(
        self, node: fx.Node, gm: fx.GraphModule, graph: fx.Graph, env: dict[fx.Node, Any]
    ) -> fx.Node | tuple[Any, ...]:
        """Adds a stand-in for the call ``node`` of ``gm`` to ``graph`` and returns its outputs.

        ``env`` maps nodes of ``gm`` to those of ``graph``.

        Raises:
            CaptureError: the call cannot be represented by a stand-in, or updates a tensor in place.
        """
        modules = {
            arg: attribute_of(gm, str(arg.target))
            for arg in node.all_input_nodes
            if arg.op == "get_attr" and isinstance(attribute_of(gm, str(arg.target)), torch.nn.Module)
        }
        for module in modules.values():
            refuse_mutation(node, module)
        inputs = [arg for arg in node.all_input_nodes if arg not in modules]
        values = [arg.meta["example_value"] for arg in inputs if "example_value" in arg.meta]
        outputs = node.meta["example_value"]
        flat = outputs if isinstance(outputs, (tuple, list)) else (outputs,)
        if len(values) != len(inputs) or not all(isinstance(value, torch.Tensor) for value in flat):
            raise CaptureError(
                f"a call of the higher-order operator {node.target} with an output that is not a tensor, or an input "
                "of unknown value"
            )
        if not all(isinstance(value, (torch.Tensor, torch.SymInt, int)) for value in values):
            raise CaptureError(
                f"a call of the higher-order operator {node.target} with a number that is computed from symbolic sizes "
                "(the default scale of flex_attention where head_dim is symbolic: pass scale, or mark head_dim static)"
            )
        storages = {storage_of(value) for value in values if isinstance(value, torch.Tensor)}
        if any(storage_of(value) in storages for value in flat):
            raise CaptureError(
                f"a call of the higher-order operator {node.target} whose output shares memory with its input"
            )
        tensors = [env[arg] for arg, value in zip(inputs, values, strict=True) if isinstance(value, torch.Tensor)]
        sizes = [env[arg] for arg, value in zip(inputs, values, strict=True) if not isinstance(value, torch.Tensor)]
        index = promise_outputs(flat)
        self._calls[index] = (node, modules)
        stand_in = graph.call_function(STAND_IN, (tensors, sizes, index))
        stand_in.meta = dict(node.meta)
        if isinstance(outputs, (tuple, list)):
            return tuple(graph.call_function(operator.getitem, (stand_in, i)) for i in range(len(flat)))
        return graph.call_function(operator.getitem, (stand_in, 0))

    def restore(self, graph: fx.Graph, attributes: dict[str, Any]) -> None:
        """Replaces the stand-ins in ``graph`` by the original calls, whose modules are added to ``attributes``."""
        for node in graph.find_nodes(op="call_function", target=STAND_IN):
            tensors, sizes, index = node.args
            if index not in self._calls:
                continue
            call, modules = self._calls[index]
            tensors, sizes = iter(tensors), iter(sizes)
            env: dict[fx.Node, fx.Node] = {}
            with graph.inserting_before(node):
                for arg in call.all_input_nodes:
                    if arg in modules:
                        name = f"{arg.target}".replace(".", "_") + f"_{index}"
                        attributes[name] = modules[arg]
                        env[arg] = graph.get_attr(name)
                    else:
                        env[arg] = next(tensors if isinstance(arg.meta["example_value"], torch.Tensor) else sizes)
                restored = graph.node_copy(call, env.__getitem__)
            restored.meta = {**call.meta, **node.meta}
            outputs = call.meta["example_value"]
            if isinstance(outputs, (tuple, list)):
                node.replace_all_uses_with(restored)
            else:
                restored.meta["val"] = node.meta["val"][0]
                for item in list(node.users):
                    item.replace_all_uses_with(restored)
                    graph.erase_node(item)
            graph.erase_node(node)

    def forget(self) -> None:
        """Releases the outputs that stand-ins returned; called when tracing is over."""
        forget_outputs(self._calls)


def promise_outputs(values: Sequence[torch.Tensor]) -> int:
    """The number of a stand-in whose results are like ``values``."""
    index = next(_opaque_ids)
    _opaque_outputs[index] = values
    return index


def forget_outputs(indices: Iterable[int]) -> None:
    for index in indices:
        _opaque_outputs.pop(index, None)


_opaque_ids = itertools.count()

_opaque_outputs: dict[int, Sequence[torch.Tensor]] = {}


torch.library.define("attnrewrite::opaque", "(Tensor[] tensors, SymInt[] sizes, int index) -> Tensor[]")


def _opaque_fake(tensors: Sequence[torch.Tensor], sizes: Sequence[int], index: int) -> list[torch.Tensor]:
    return [
        torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)
        for value in _opaque_outputs[index]
    ]


torch.library.register_fake("attnrewrite::opaque", _opaque_fake)

STAND_IN = torch.ops.attnrewrite.opaque.default
"""``(tensors, sizes, index)``: the results that were promised under the index."""


def refuse_mutation(call: fx.Node, module: torch.nn.Module) -> None:
    """Raises CaptureError if the body of an opaque call updates a tensor in place."""
    for submodule in module.modules():
        if not isinstance(submodule, fx.GraphModule):
            raise CaptureError(f"a call of the higher-order operator {call.target} on {type(submodule).__name__}")
        for node in submodule.graph.nodes:
            name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
            in_place = name.endswith("_") and not name.endswith("__") and name not in _NAMED_LIKE_KEYWORDS
            if node.op in ("call_function", "call_method") and (
                in_place or "out" in node.kwargs or name in _IN_PLACE_OPERATORS
            ):
                raise CaptureError(f"a call of the higher-order operator {call.target} that updates a tensor ({name})")


_NAMED_LIKE_KEYWORDS = frozenset({"and_", "or_", "not_", "is_"})
"""Functions of ``operator`` whose underscore only avoids a keyword."""

_IN_PLACE_OPERATORS = frozenset(
    {"setitem", *(name for name in dir(operator) if name.startswith("i") and hasattr(operator, f"__{name}__"))}
) - {"index", "inv", "invert", "is_", "is_not"}


def is_opaque(node: fx.Node, gm: fx.GraphModule) -> bool:
    """Whether the node of ``gm`` is a call that tracing must not enter."""
    if node.target is torch.ops.higher_order.autograd_function_apply:
        # Without gradients its forward may be traced like any other code.
        return (torch.is_grad_enabled() or enables_gradients(gm)) and any(
            getattr(arg.meta.get("example_value"), "requires_grad", False) for arg in node.all_input_nodes
        )
    if node.target is torch.ops.higher_order.tag_activation_checkpoint:
        return _is_selective_checkpoint(node, gm)
    return node.target in (torch.ops.higher_order.flex_attention,)


def _is_selective_checkpoint(node: fx.Node, gm: fx.GraphModule) -> bool:
    (body, *_) = node.args
    assert isinstance(body, fx.Node)
    return CHECKPOINT_CONTEXT in attribute_of(gm, str(body.target)).meta
