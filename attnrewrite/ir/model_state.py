"""Model state: which tensors of a graph come with the model (parameters, buffers), and which are learned."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from attnrewrite.ir.ops import CAST_OPS, CAT_OPS, COPY_OPS, SPLIT_OPS, VIEW_OPS
from attnrewrite.ir.source import parameter_path
from attnrewrite.torch_private import STATIC_INPUT

__all__ = ["is_learned", "is_model_state", "is_module_tensor", "may_have_gradient"]

aten = torch.ops.aten


def is_module_tensor(node: fx.Node) -> bool:
    """Whether an input of the graph is a parameter or buffer of a module with a known path.

    Other inputs at fixed addresses (``mark_static_address``, the keys and values of a KV cache) do not count: they are
    written to from step to step.
    """
    return STATIC_INPUT in node.meta.get("tensor_dict", {}) and bool(parameter_path(node))


def is_model_state(node: fx.Node) -> bool:
    """Whether a tensor belongs to the model and not to the call: a parameter, a buffer or a constant of the graph."""
    return node.op == "get_attr" or (node.op == "placeholder" and (_is_parameter(node) or is_module_tensor(node)))


def is_learned(node: fx.Node) -> bool:
    """Whether a tensor is a parameter or a constant of the graph, or only rearranges such tensors.

    Views, copies, casts, slices and concatenations of parameters count; any other computation does not. Nor do buffers,
    which may hold computed values.
    """
    if node.op == "call_function" and node.target in _REARRANGED:
        sources = node.all_input_nodes if node.target in CAT_OPS else node.all_input_nodes[:1]
        return bool(sources) and all(map(is_learned, sources))
    return node.op == "get_attr" or (node.op == "placeholder" and _is_parameter(node))


def may_have_gradient(node: fx.Node) -> bool:
    """Whether an input that requires a gradient leads to the node."""
    pending = [node]
    seen = set(pending)
    for step in pending:
        known = step.meta.get("example_value", step.meta.get("val"))
        if step.op in ("placeholder", "get_attr") and getattr(known, "requires_grad", False):
            return True
        sources = [each for each in step.all_input_nodes if each not in seen]
        seen.update(sources)
        pending += sources
    return False


def _is_parameter(placeholder: fx.Node) -> bool:
    return isinstance(placeholder.meta.get("example_value"), torch.nn.Parameter)


_REARRANGED: frozenset[Any] = frozenset(
    {
        *(*VIEW_OPS, *CAST_OPS, *SPLIT_OPS, *CAT_OPS, *COPY_OPS),
        *(operator.getitem, aten.repeat.default),
    }
)
