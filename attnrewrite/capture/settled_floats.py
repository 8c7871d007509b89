"""Floats of modules and globals, which are symbols under ``dynamic=True``, as the constants that they mostly are.

A fill, a soft cap or a slope of unknown size proves nothing of a mask, and a ``score_mod`` takes no symbolic number. As
``torch.compile`` does without ``dynamic=True``, a float is a constant until it changes; then it is a symbol again:
https://github.com/pytorch/pytorch/blob/v2.13.0/torch/_dynamo/variables/builder.py#L3278
"""

from __future__ import annotations

import re

import torch
from torch import fx

from attnrewrite.ir.nodes import known_number
from attnrewrite.ir.source import source_name
from attnrewrite.torch_private import CompileContext, trace_again_with_constants

__all__ = ["settle_floats"]

_CONSTANTS: dict[int, dict[str, float]] = {}
"""Of each function that Dynamo compiles, by its number: the floats that are constants, by source."""


def settle_floats(gm: fx.GraphModule) -> None:
    """Has Dynamo trace the function again with such floats as constants, under guards; returns if there are none.

    To be followed by :func:`attnrewrite.torch_private.leave_constants` behind the compilation.

    Arguments of the call are left: they are what changes from one call to the next.

    Args:
        gm: a graph made by Dynamo.
    """
    compile_id = CompileContext.current_compile_id()
    if compile_id is None or compile_id.frame_id is None:
        return
    found = {}
    for node in gm.graph.find_nodes(op="call_method", target="item"):
        source, value = _source(node), node.meta.get("example_value")
        if (
            source
            and isinstance(value, torch.SymFloat)
            and value.node.expr.is_Symbol
            and known_number(value) is not None
        ):
            found[source] = value
    if not found:
        return
    hints = {source: float(known_number(value)) for source, value in found.items()}
    if not compile_id.frame_compile_id:
        _CONSTANTS[compile_id.frame_id] = hints
    known = _CONSTANTS.get(compile_id.frame_id, {})
    for source in [source for source, hint in hints.items() if known.get(source, hint) != hint]:
        del known[source]
    settled = [found[source] for source in hints if source in known]
    if settled:
        trace_again_with_constants(settled)


def _source(item: fx.Node) -> str:
    """Where a float that Dynamo has wrapped into a tensor comes from; empty if it is none, or an argument."""
    (wrapped,) = item.args
    if not isinstance(wrapped, fx.Node) or any(user.target != "item" for user in wrapped.users):
        return ""  # Dynamo leaves it as it is.
    source = source_name(wrapped) if wrapped.op == "placeholder" else ""
    return source if re.search(r"\.\w+$", source) or source.startswith("G[") else ""
