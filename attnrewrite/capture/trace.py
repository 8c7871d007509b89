"""Dynamo's graph -> "the IR": functional, pre-dispatch ATen, with the calling convention of the graph it came from.

The IR is the one of ``torch.export``: composite operators (``linear``, ``matmul``, ``einsum``, ``softmax``,
``scaled_dot_product_attention``) are whole, in-place updates have become functional, autograd has not been applied,
sizes stay symbolic. It is made by ``aot_export_module(..., pre_dispatch=True)``, which is private to torch and is
called here and nowhere else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from attnrewrite.capture.autocast import AutocastRegions
from attnrewrite.capture.convention import restore_calling_convention
from attnrewrite.capture.normalize import normalize
from attnrewrite.capture.opaque import OpaqueCalls
from attnrewrite.capture.prepare import prepared_graph
from attnrewrite.capture.support import CaptureError, first_line
from attnrewrite.capture.vmap import holds_vmap, written_out
from attnrewrite.torch_private import (
    FORWARD_MODE_CALLS,
    FakeTensor,
    FakeTensorMode,
    TracingContext,
    aot_export_module,
    detect_fake_mode,
    tracing,
)

__all__ = ["Captured", "capture"]


@dataclass(frozen=True)
class Captured:
    """``gm`` takes the same inputs and returns the same outputs as the graph that was captured."""

    gm: fx.GraphModule


def capture(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Captured:
    """The IR of ``gm``.

    Args:
        gm: a graph made by Dynamo, legalized (:mod:`attnrewrite.capture.legalize`). It is not changed.
        example_inputs: what Dynamo hands to a backend with it; used where the graph's placeholders carry no fake value.

    Raises:
        CaptureError: the graph is not one that functional tracing can express. Nothing has been changed then.
    """
    gm = _without_vmap(gm)
    _refuse_function_transforms(gm)
    placeholders = gm.graph.find_nodes(op="placeholder")
    context, inputs = _tracing_inputs(placeholders, example_inputs)
    regions = AutocastRegions()
    opaque = OpaqueCalls()
    prepared = prepared_graph(gm, regions, opaque)
    exported, signature = _traced(prepared, inputs, context, regions, opaque)
    ir = restore_calling_convention(gm, prepared, exported, signature, opaque)
    normalize(ir)
    ir.recompile()
    return Captured(ir)


def _without_vmap(gm: fx.GraphModule) -> fx.GraphModule:
    if not holds_vmap(gm):
        return gm
    try:
        return written_out(gm)
    except Exception as error:
        raise CaptureError(f"torch.vmap could not be inlined: {first_line(error)}") from error


def _traced(
    prepared: fx.GraphModule,
    inputs: Sequence[Any],
    context: TracingContext,
    regions: AutocastRegions,
    opaque: OpaqueCalls,
) -> tuple[fx.GraphModule, Any]:
    """The functional graph, whose parameters and buffers are inputs, and torch's ``GraphSignature`` of it.

    Raises:
        CaptureError: tracing failed.
    """
    try:
        with (
            tracing(context),
            torch.fx.traceback.preserve_node_meta(),
            regions.closed_at_exit(),
        ):
            exported, signature = aot_export_module(prepared, inputs, trace_joint=False, pre_dispatch=True)
    except Exception as error:
        raise CaptureError(f"{type(error).__name__}: {first_line(error)}") from error
    finally:
        opaque.forget()
    assert isinstance(exported, fx.GraphModule)
    return exported, signature


def _refuse_function_transforms(gm: fx.GraphModule) -> None:
    """``torch.func``'s levels are switched by the graph itself: tracing it again would leave them where they are."""
    for node in gm.graph.nodes:
        if node.op == "call_function" and "functorch" in (getattr(node.target, "__module__", None) or ""):
            name = getattr(node.target, "__name__", node.target)
            raise CaptureError(f"the graph uses a torch.func transform ({name}), which cannot be traced functionally")
        if getattr(node.target, "__name__", "") in FORWARD_MODE_CALLS:
            raise CaptureError("the graph uses forward-mode differentiation, which cannot be traced functionally")


def _tracing_inputs(
    placeholders: Sequence[fx.Node], example_inputs: Sequence[Any]
) -> tuple[TracingContext, Sequence[Any]]:
    """A tracing context of capture's own, and the inputs to trace with.

    What capture records in the context (metadata of the traced function) must not reach the inner compiler, which
    records its own. Dynamo's fake mode and its record of how each input is symbolic are shared, so that the IR has
    Dynamo's own symbols, and so are guards on sizes, which live in the shape environment.
    """
    outer = TracingContext.try_get()
    if outer is not None and outer.fake_mode is not None:
        context = TracingContext(outer.fake_mode)
        context.tensor_to_context = outer.tensor_to_context
        foreign = [v for v in example_inputs if isinstance(v, FakeTensor) and v.fake_mode is not outer.fake_mode]
        if not foreign:
            return context, example_inputs
    values = [node.meta.get("example_value", value) for node, value in zip(placeholders, example_inputs, strict=True)]
    fake_mode = detect_fake_mode(values) or FakeTensorMode(shape_env=ShapeEnv())
    fakes = [
        fake_mode.from_tensor(value, static_shapes=True)
        if isinstance(value, torch.Tensor) and not isinstance(value, FakeTensor)
        else value
        for value in values
    ]
    return TracingContext(fake_mode), fakes
