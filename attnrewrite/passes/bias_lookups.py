"""Biases that are looked up in a learned table get a gradient that does not wait for the table's few rows.

T5 looks up 32 rows of a table at length x length indices. Inductor adds their gradients up in memory one after another,
where every entry of a row waits for the one before: on an H200, 77 of the 126 ms of a training step of T5's encoder (12
layers, 4 x 2048 tokens). PyTorch's own kernel sorts the indices first.

Source: ``embedding_dense_backward`` of
https://github.com/pytorch/pytorch/blob/v2.13.0/torch/_inductor/decomposition.py and
https://github.com/pytorch/pytorch/blob/v2.13.0/aten/src/ATen/native/cuda/Embedding.cu
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from attnrewrite.ir.builder import Builder
from attnrewrite.ir.nodes import is_tensor, tensor
from attnrewrite.ir.ops import is_cast
from attnrewrite.ir.site import AttentionSite, Bias
from attnrewrite.ir.views import is_layout_op
from attnrewrite.passes.result import ReportedSite
from attnrewrite.torch_private import is_erased

__all__ = ["LOOKUP", "biases_on_gpu", "sort_gradients_of_lookups"]

aten = torch.ops.aten


@torch.library.custom_op("attnrewrite::lookup", mutates_args=())
def _lookup(table: Tensor, indices: Tensor) -> Tensor:
    """``embedding(indices, table)``: (*indices.shape, features) of a table (rows, features)."""
    result: Tensor = aten.embedding.default(table, indices)
    return result


@_lookup.register_fake
def _(table: Tensor, indices: Tensor) -> Tensor:
    return table.new_empty((*indices.shape, table.shape[1]))


@torch.library.custom_op("attnrewrite::lookup_gradient", mutates_args=())
def _lookup_gradient(gradient: Tensor, indices: Tensor, rows: int) -> Tensor:
    """The table's gradient, (rows, features). As an operator of its own, since Inductor takes PyTorch's apart."""
    result: Tensor = aten.embedding_dense_backward.default(gradient, indices, rows, -1, False)
    return result


@_lookup_gradient.register_fake
def _(gradient: Tensor, indices: Tensor, rows: int) -> Tensor:
    return gradient.new_empty((rows, gradient.shape[-1]))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    table, indices = inputs
    ctx.save_for_backward(indices)
    ctx.rows = table.shape[0]


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
    (indices,) = ctx.saved_tensors
    return torch.ops.attnrewrite.lookup_gradient(gradient, indices, ctx.rows), None


_lookup.register_autograd(_backward, setup_context=_save)

LOOKUP = torch.ops.attnrewrite.lookup.default


def biases_on_gpu(served: Sequence[ReportedSite]) -> list[fx.Node]:
    """What is added to the scores of attentions on a GPU that are trained."""
    sites = [site for site, _ in served if isinstance(site, AttentionSite)]
    trained = [site for site in sites if site.differentiable and site.device.type == "cuda"]
    return [mod.operand.node for site in trained for mod in site.mods if isinstance(mod, Bias)]


def sort_gradients_of_lookups(gm: fx.GraphModule, biases: Sequence[fx.Node], replaced: dict[fx.Node, fx.Node]) -> None:
    """Replaces the lookups in tables that biases are views, copies or casts of.

    Args:
        replaced: nodes that are no longer in the graph, each with its replacement; the lookups are added.
    """
    for bias in biases:
        lookup = _lookup_behind(bias)
        if lookup is not None:
            replaced[lookup] = _replaced(gm, lookup)


def _lookup_behind(node: fx.Node) -> fx.Node | None:
    """The lookup in a table that a bias is a view, a copy or a cast of; None if there is none, or it has options."""
    while not is_erased(node) and (is_layout_op(node) or is_cast(node)):
        source = node.args[0]
        assert isinstance(source, fx.Node)
        node = source
    if is_erased(node) or node.op != "call_function" or node.target is not aten.embedding.default:
        return None
    # padding_idx, scale_grad_by_freq, sparse
    return node if len(node.args) == 2 and not node.kwargs and is_tensor(node.args[0]) else None


def _replaced(gm: fx.GraphModule, lookup: fx.Node) -> fx.Node:
    builder = Builder(gm, lookup, lookup)
    new = builder.call(LOOKUP, *lookup.args)
    new.meta["val"] = tensor(lookup)
    lookup.replace_all_uses_with(new)
    gm.graph.erase_node(lookup)
    return new
