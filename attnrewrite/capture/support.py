"""Helpers that the modules of capture share, and their error."""

from __future__ import annotations

import inspect
from types import FunctionType
from typing import Any

import torch
from torch import fx
from torch.multiprocessing.reductions import StorageWeakRef

from attnrewrite.torch_private import (
    HigherOrderOperator,
    is_functorch_wrapped,
    is_traceable_wrapper_subclass,
    schema_of,
    set_grad_enabled,
    tree_leaves,
)

__all__ = ["CaptureError"]


class CaptureError(Exception):
    """Raised when a graph cannot be turned into the IR; the message says why."""


def first_line(error: BaseException) -> str:
    """The first line of the error's message that is not empty."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")


def attribute_of(root: torch.nn.Module, path: str) -> Any:
    """The attribute of ``root`` at a dotted path."""
    value: Any = root
    for name in path.split("."):
        value = getattr(value, name)
    return value


def storage_of(value: Any) -> Any:
    """A key that is equal for tensors that share memory."""
    return StorageWeakRef(value.untyped_storage())  # type: ignore[no-untyped-call]


def has_storage(value: torch.Tensor) -> bool:
    """Whether the tensor has memory of its own: not so one that is made of others, or that functorch wraps."""
    return not is_traceable_wrapper_subclass(value) and not is_functorch_wrapped(value)


def holds_higher_order(gm: fx.GraphModule) -> bool:
    """Whether the graph calls an operator that has a graph among its arguments, such as a checkpoint."""
    return any(isinstance(node.target, HigherOrderOperator) for node in gm.graph.nodes)


def enables_gradients(gm: fx.GraphModule) -> bool:
    """Whether a part of the graph has gradients, although the graph is called without."""
    nodes = [node for part in gm.modules() if isinstance(part, fx.GraphModule) for node in part.graph.nodes]
    return any(
        node.args[0]
        if node.target in (set_grad_enabled, torch.ops.higher_order.wrap_with_set_grad_enabled)
        else getattr(node.target, "__name__", "") == "_enter_inference_mode" and not node.args[0]
        for node in nodes
    )


def computes_gradients(gm: fx.GraphModule) -> bool:
    """Whether autograd records a call of the graph: a result has a gradient that is no view of an input.

    A view that is taken without gradients says that it has one if its tensor has.
    """
    values = [(node.op, node.meta.get("example_value")) for node in gm.graph.nodes]
    given = {storage_of(value) for op, value in values if op == "placeholder" and _has_gradient(value)}
    return any(op != "placeholder" and _has_gradient(value) and storage_of(value) not in given for op, value in values)


def _has_gradient(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.requires_grad and has_storage(value)


def updated_in_place(node: fx.Node) -> tuple[fx.Node, ...]:
    """The arguments that the node writes to: by its schema, its name, ``inplace=True`` or ``out=``."""
    if node.op not in ("call_function", "call_method"):
        return ()
    found = [node.kwargs.get("out")]
    schema = schema_of(node.target) or schema_of(getattr(node.target, "default", None))
    if schema is not None:
        found += [
            node.args[place] if place < len(node.args) else node.kwargs.get(argument.name)
            for place, argument in enumerate(schema.arguments)
            if argument.alias_info is not None and argument.alias_info.is_write
        ]
    elif _writes_to_first(node):
        found.append(node.args[0] if node.args else node.kwargs.get("input", node.kwargs.get("self")))
    return tuple(leaf for leaf in tree_leaves(found) if isinstance(leaf, fx.Node))


def _writes_to_first(node: fx.Node) -> bool:
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    if (name.endswith("_") and not name.endswith("__")) or name in _IN_PLACE:
        return True
    if node.kwargs.get("inplace") or not isinstance(node.target, FunctionType):
        return bool(node.kwargs.get("inplace"))
    try:
        parameters = list(inspect.signature(node.target).parameters)
    except ValueError:  # It wraps a builtin, which has no signature.
        parameters = list(inspect.signature(node.target, follow_wrapped=False).parameters)
    place = parameters.index("inplace") if "inplace" in parameters else len(node.args)
    return place < len(node.args) and bool(node.args[place])


_IN_PLACE = frozenset(
    {
        *("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor", "imatmul"),
        *("ilshift", "irshift", "setitem"),
    }
)
