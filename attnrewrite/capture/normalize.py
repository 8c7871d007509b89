"""One spelling for what PyTorch spells in several ways."""

from __future__ import annotations

import torch
from torch import fx

from attnrewrite.ir.builder import Builder
from attnrewrite.ir.nodes import same_shape


def fill_constants(ir: fx.GraphModule) -> None:
    """``aten.copy``, which a slice assignment leaves, has no derivative; the conversions that it stands for have."""
    aten = torch.ops.aten
    for node in ir.graph.find_nodes(op="call_function", target=aten.copy.default):
        builder = Builder(ir, before=node, like=node)
        value, source = node.meta["val"], node.args[1]
        if source.meta["val"].device != value.device:
            source = builder.call(aten.to.device, source, value.device, value.dtype)
        elif source.meta["val"].dtype is not value.dtype:
            source = builder.call(aten.to.dtype, source, value.dtype)
        if not same_shape(source.meta["val"].shape, value.shape):
            source = builder.call(aten.expand.default, source, list(value.shape))
        copied = builder.call(aten.clone.default, source, memory_format=torch.contiguous_format)
        node.replace_all_uses_with(copied)
        ir.graph.erase_node(node)


def name_metadata_reads(ir: fx.GraphModule) -> None:
    """Operators that read only the shape or the dtype of a tensor are told it, so that they do not keep it alive."""
    aten = torch.ops.aten
    numbers = {
        aten.zeros_like.default: 0,
        aten.ones_like.default: 1,
        aten.new_zeros.default: 0,
        aten.new_ones.default: 1,
        aten.full_like.default: None,
        aten.new_full.default: None,
    }
    for node in list(ir.graph.nodes):
        if node.op != "call_function" or not node.args:
            continue
        filled = node.target in numbers and isinstance(node.args[0], fx.Node) and node.args[0].op == "call_function"
        if not filled and (len(node.args) < 2 or not isinstance(node.args[1], fx.Node)):
            continue
        builder = Builder(ir, before=node, like=node)
        value = node.meta.get("val")
        if filled:
            number = numbers[node.target]
            number = node.args[-1] if number is None else number
            dense = value.is_contiguous() or all(user.target is aten.where.self for user in node.users)
            if not isinstance(number, (bool, int, float)) or not dense:
                continue
            kind = {"dtype": value.dtype, "layout": value.layout, "device": value.device, "pin_memory": False}
            told = builder.insert(aten.full.default, (list(value.shape), number), kind, value)
        elif node.target is aten.type_as.default and value.device == node.args[0].meta["val"].device:
            told = builder.call(aten.to.dtype, node.args[0], value.dtype)
        elif node.target in (aten.view_as.default, aten.reshape_as.default):
            told = builder.call(aten.reshape.default, node.args[0], list(value.shape))
        elif node.target is aten.expand_as.default:
            told = builder.call(aten.expand.default, node.args[0], list(value.shape))
        else:
            continue
        told.meta = {**node.meta}
        node.replace_all_uses_with(told)
        ir.graph.erase_node(node)
