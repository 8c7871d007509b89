"""Regions of ``torch.nn.attention.sdpa_kernel(...)`` within a graph.

Dynamo writes their begin and their end as calls that switch back ends off, which functional tracing carries out and
does not record. So the calls of ``scaled_dot_product_attention`` within are annotated with the back ends that are left.
diffusers' ``set_attention_backend("_native_cudnn")`` and its like make such regions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.nn.attention import SDPBackend

from attnrewrite.torch_private import switch_sdpa_backends

__all__ = ["SDPA_BACKENDS", "annotate_sdpa_regions"]

SDPA_BACKENDS = "attnrewrite_sdpa_backends"
"""The annotation of a call: the names of ``SDPBackend`` that are left to it, with commas between them."""

_ALL = {
    SDPBackend.FLASH_ATTENTION.name,
    SDPBackend.EFFICIENT_ATTENTION.name,
    SDPBackend.CUDNN_ATTENTION.name,
    SDPBackend.MATH.name,
}


def annotate_sdpa_regions(gm: fx.GraphModule, names: tuple[str, ...] = ()) -> None:
    """Annotates the calls in ``gm``, a graph made by Dynamo, and in the graphs of its higher-order operators.

    Args:
        gm: of which nothing but these annotations is changed.
        names: the back ends that are left where it begins; none of them if there is no such region.
    """
    for node in gm.graph.nodes:
        if node.target is switch_sdpa_backends:
            names = _left(*node.args)
        elif names and node.target is torch.nn.functional.scaled_dot_product_attention:
            node.meta["custom"] = {**node.meta.get("custom", {}), SDPA_BACKENDS: ",".join(names)}
        elif node.op == "call_function":
            for child in _graphs(gm, node):
                annotate_sdpa_regions(child, names)


def _left(backends: Any, in_order: Any = False) -> tuple[str, ...]:
    """The names of the back ends that a switch leaves; none if it leaves all, in no order of its own."""
    names = [str(each.args[0]) if isinstance(each, fx.Node) else each.name for each in backends]
    return () if not in_order and set(names) >= _ALL else tuple(names)


def _graphs(gm: fx.GraphModule, node: fx.Node) -> list[fx.GraphModule]:
    read = [getattr(gm, str(arg.target), None) for arg in node.all_input_nodes if arg.op == "get_attr"]
    return [child for child in read if isinstance(child, fx.GraphModule)]
