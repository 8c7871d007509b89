"""What a kernel reads, in memory before it reads it.

Inductor fuses what it can into the function that reads it, and decides late on the layout of what it computes. Its
lowering of FlexAttention asks for strides before they are decided, and fails on a buffer of ``score_mod`` that is
computed from the result of a reduction ("convert FlexibleLayout to FixedLayout first"); a mask that is aligned for a
kernel's forward pass is not so in the backward pass.
"""

from __future__ import annotations

import functools
import operator
from typing import Any

import torch
from torch import fx

from attnrewrite.ir.builder import Builder
from attnrewrite.ir.graph_view import is_copy_of_input
from attnrewrite.torch_private import lower_to_memory

__all__ = ["keep_copies", "realized", "stored"]


@torch.library.custom_op("attnrewrite::stored", mutates_args=())
def _stored(parts: list[torch.Tensor]) -> list[torch.Tensor]:
    """The same tensors, contiguous in memory.

    Inductor chooses the layout of what it computes, with any stride for a dimension of size one, and fuses what it can
    into the function that reads it. FlexAttention's kernel assumes the strides of its tables, with wrong results for
    all but the first entry of a batch, and does not compile if a mask is a function of positions alone (torch 2.11).
    The result of another operator is neither laid out anew nor fused.
    """
    return [part.clone(memory_format=torch.contiguous_format) for part in parts]


@_stored.register_fake
def _(parts: list[torch.Tensor]) -> list[torch.Tensor]:
    return [part.new_empty(part.shape) for part in parts]


def _gradients_of_stored(ctx: Any, gradients: list[torch.Tensor]) -> list[torch.Tensor]:
    return gradients


_stored.register_autograd(_gradients_of_stored)


def stored(builder: Builder, parts: list[fx.Node]) -> list[fx.Node]:
    """Nodes for the same values, as they are in memory and in no other way."""
    result = builder.call(torch.ops.attnrewrite.stored.default, parts)
    fakes = result.meta["val"]
    return [builder.insert(operator.getitem, (result, place), {}, fake) for place, fake in enumerate(fakes)]


@torch.library.custom_op("attnrewrite::realized", mutates_args=())
def _realized(part: torch.Tensor, own: bool) -> torch.Tensor:
    """The same numbers. Inductor computes them into memory, and copies what lies there already only for ``own``.

    Args:
        part: any tensor.
        own: in memory that nothing else is in. FlexAttention's kernel for short queries takes a query by
            ``as_strided``, which forgets where in a tensor a part of it begins (torch 2.11). And what is saved for the
            backward pass must not be written to, as an input is whose update stands behind the attention.
    """
    return part.clone()


@_realized.register_fake
def _(part: torch.Tensor, own: bool) -> torch.Tensor:
    return part.clone()


def _gradient_of_realized(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
    return gradient, None


_realized.register_autograd(_gradient_of_realized)


def keep_copies(gm: fx.GraphModule) -> dict[fx.Node, fx.Node]:
    """Puts copies of inputs, which the source asks for, in memory of their own; for training through Inductor.

    It removes a copy whose original is updated later on, and the backward pass of a fused kernel reads what was written
    (torch 2.13, with ``scaled_dot_product_attention`` in the source as well).

    Returns:
        What stands in the place of each copy.
    """
    kept: dict[fx.Node, fx.Node] = {}
    for node in gm.graph.find_nodes(op="call_function", target=torch.ops.aten.clone.default):
        if is_copy_of_input(node):
            _lower_realized()
            builder = Builder(gm, before=node, like=node)
            kept[node] = builder.call(torch.ops.attnrewrite.realized.default, node.args[0], True)
            node.replace_all_uses_with(kept[node])
            gm.graph.erase_node(node)
    return kept


def realized(builder: Builder, part: fx.Node, *, own: bool) -> fx.Node:
    """A node for the same numbers, which have their place in memory when what reads them is lowered.

    For graphs that go on to Inductor. See ``own`` of the operator ``attnrewrite::realized``.
    """
    if part.op != "call_function" or part.target in _IN_MEMORY:
        return part
    _lower_realized()
    return builder.call(torch.ops.attnrewrite.realized.default, part, own)


_IN_MEMORY = frozenset({torch.ops.attnrewrite.realized.default})


@functools.cache
def _lower_realized() -> None:
    lower_to_memory(torch.ops.attnrewrite.realized.default)
