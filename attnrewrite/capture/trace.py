"""Tracing: turns Dynamo's graph into the IR, functional pre-dispatch ATen with the same calling convention.

The IR is that of ``torch.export``: composite operators (``linear``, ``matmul``, ``einsum``, ``softmax``,
``scaled_dot_product_attention``) are whole, in-place updates are functional, autograd has not been applied, and sizes
stay symbolic. It is made by ``aot_export_module(..., pre_dispatch=True)``, which is private to torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from attnrewrite.capture.autocast import AutocastRegions
from attnrewrite.capture.constants import name_by_content
from attnrewrite.capture.convention import restore_calling_convention
from attnrewrite.capture.legalize import with_data_detached
from attnrewrite.capture.mode_regions import cast_addends, detach_in_regions
from attnrewrite.capture.normalize import normalize
from attnrewrite.capture.opaque import OpaqueCalls
from attnrewrite.capture.prepare import prepared_graph
from attnrewrite.capture.sdpa_regions import annotate_sdpa_regions
from attnrewrite.capture.subclasses import HeldCalls
from attnrewrite.capture.support import (
    CaptureError,
    attribute_of,
    enables_gradients,
    first_line,
    has_storage,
    storage_of,
    updated_in_place,
)
from attnrewrite.capture.vmap import holds_vmap, vmap_lowered
from attnrewrite.ir.source import ENDS_AT
from attnrewrite.torch_private import (
    FORWARD_MODE_CALLS,
    FakeTensor,
    FakeTensorMode,
    TracingContext,
    aot_export_module,
    break_after,
    detect_fake_mode,
    forward_mode_level,
    set_grad_enabled,
    tracing,
)

__all__ = ["Captured", "capture"]


@dataclass(frozen=True)
class Captured:
    """A captured graph.

    Attributes:
        gm: the graph; it has the inputs and outputs of the original.
        note: what was not read, in words; empty if everything was.
    """

    gm: fx.GraphModule
    note: str = ""


def capture(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Captured:
    """Returns the IR of ``gm``.

    Args:
        gm: a graph made by Dynamo, legalized (:mod:`attnrewrite.capture.legalize`). It is changed in annotations alone.
        example_inputs: the inputs that Dynamo passes to the backend; used for placeholders without a fake value.

    Raises:
        CaptureError: functional tracing cannot express the graph. Nothing was changed.
    """
    gm = with_data_detached(_without_vmap(gm))
    annotate_sdpa_regions(gm)
    _refuse_function_transforms(gm)
    gradients = torch.is_grad_enabled() or enables_gradients(gm)
    if gradients:
        _refuse_what_autograd_does_not_see(gm, torch.is_grad_enabled())
    placeholders = gm.graph.find_nodes(op="placeholder")
    held = HeldCalls(gm, example_inputs)
    given = [pair for pair in zip(placeholders, example_inputs, strict=True) if pair[0] not in held.inputs]
    context, inputs = _tracing_inputs([node for node, _ in given], [value for _, value in given])
    regions = AutocastRegions()
    opaque = OpaqueCalls()
    prepared = prepared_graph(gm, regions, opaque, held)
    try:
        exported, signature = _traced(prepared, inputs, context, regions)
    finally:
        opaque.forget()
        held.forget()
    ir = restore_calling_convention(gm, prepared, exported, signature, opaque, held)
    broken = break_after(gm)
    if broken is not None:
        place = "".join(f", {frame.filename}:{frame.lineno}" for frame in broken.user_stack[-1:])
        ir.meta[ENDS_AT] = f"{first_line(broken.reason)}{place}"
    parts = [part for part in ir.modules() if isinstance(part, fx.GraphModule)]
    for part in parts:
        if gradients:
            _differentiate_noise(part)
            detach_in_regions(part)
        cast_addends(part)
        normalize(part, gradients=gradients)
        name_by_content(part)
        part.recompile()
    return Captured(ir, held.words)


def _differentiate_noise(part: fx.GraphModule) -> None:
    """Gives operators that only functional graphs have the derivative of the update in place that they stand for.

    Raises:
        CaptureError: the operator computes its gradient from other numbers than the update in place.
    """
    for node in list(part.graph.nodes):
        if node.target is torch.ops.aten.rrelu_with_noise_functional.default and True in node.args[4:5]:
            raise CaptureError("rrelu_ in training has no gradient once it is functional (call F.rrelu)")
        if node.target in _OVERWRITTEN_BY_NOISE:
            # They have no derivative: none of the numbers that were there are left.
            with part.graph.inserting_before(node):
                before = part.graph.call_function(torch.ops.aten.detach.default, (node.args[0],))
            before.meta = dict(node.args[0].meta)
            node.replace_input_with(node.args[0], before)


_OVERWRITTEN_BY_NOISE = frozenset(
    {
        torch.ops.aten.bernoulli.p,
        torch.ops.aten.bernoulli.Tensor,
        torch.ops.aten.normal_functional.default,
    }
)
"""What ``bernoulli_`` and ``normal_`` become."""


def _without_vmap(gm: fx.GraphModule) -> fx.GraphModule:
    parts = {name: part for name, part in gm.named_children() if isinstance(part, fx.GraphModule)}
    lowered = {name: _without_vmap(part) for name, part in parts.items()}
    changed = {name: part for name, part in lowered.items() if part is not parts[name]}
    if not changed and not holds_vmap(gm):
        return gm
    try:
        result = vmap_lowered(gm)
    except Exception as error:
        raise CaptureError(f"torch.vmap could not be lowered to operators: {first_line(error)}") from error
    for name, part in changed.items():
        setattr(result, name, part)
    return result


def _traced(
    prepared: fx.GraphModule,
    inputs: Sequence[Any],
    context: TracingContext,
    regions: AutocastRegions,
) -> tuple[fx.GraphModule, Any]:
    """The traced graph, in which parameters and buffers are inputs, and its ``GraphSignature``.

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
    assert isinstance(exported, fx.GraphModule)
    return exported, signature


def _refuse_function_transforms(gm: fx.GraphModule) -> None:
    """Refuses graphs that switch the levels of ``torch.func`` transforms, which tracing cannot do again.

    Raises:
        CaptureError: the graph has such a call, or is called within forward-mode differentiation.
    """
    if forward_mode_level() >= 0:
        raise CaptureError("the graph is called within forward-mode differentiation, which fused kernels do not have")
    for node in (node for part in gm.modules() if isinstance(part, fx.GraphModule) for node in part.graph.nodes):
        if node.op == "call_function" and "functorch" in (getattr(node.target, "__module__", None) or ""):
            name = getattr(node.target, "__name__", node.target)
            raise CaptureError(f"the graph uses a torch.func transform ({name}), which cannot be traced functionally")
        if getattr(node.target, "__name__", "") in FORWARD_MODE_CALLS:
            raise CaptureError("the graph uses forward-mode differentiation, which cannot be traced functionally")


def _refuse_what_autograd_does_not_see(gm: fx.GraphModule, recorded: bool) -> None:
    """Refuses graphs that change numbers behind autograd's back: functional tracing makes new tensors of the updates,
    through which gradients flow otherwise, and leaves out regions of inference mode.

    Args:
        recorded: whether autograd records the graph's calls.

    Raises:
        CaptureError: a tensor that has a gradient is updated in place under ``torch.no_grad()``, or through a view
            that is detached from it; or a tensor is given numbers that have one through such a view; or the graph has
            such a region.
    """
    with_gradients: set[Any] = set()
    detached = _Detached(gm)
    for node in gm.graph.nodes:
        if node.target is set_grad_enabled:
            recorded = bool(node.args[0])
        if getattr(node.target, "__name__", "") == "_enter_inference_mode":
            raise CaptureError("the graph has a region of torch.inference_mode(), which functional tracing leaves out")
        for updated in map(_example, updated_in_place(node)):
            hidden = updated is not None and not (recorded and updated.requires_grad)
            if hidden and storage_of(updated) in with_gradients:
                raise CaptureError(
                    f"{node.name} updates a tensor that has a gradient in place, under torch.no_grad() or detached "
                    "from it, and functional tracing loses the gradient"
                )
        if recorded and detached.receive_gradients(node):
            raise CaptureError(
                f"{node.name} writes numbers that have a gradient through a view that is detached from what is written "
                "to, and functional tracing gives it the gradient (detach the numbers as well)"
            )
        value = _example(node)
        if value is not None and value.requires_grad:
            with_gradients.add(storage_of(value))
        for part in _graphs_among(gm, node.all_input_nodes):
            _refuse_what_autograd_does_not_see(part, recorded)


class _Detached:
    """The views of a graph that are detached from their tensor."""

    def __init__(self, gm: fx.GraphModule) -> None:
        self._views: set[fx.Node] = set()
        for node in gm.graph.nodes if any(map(_is_detach, gm.graph.nodes)) else ():
            value = _example(node)
            sources = [each for each in node.all_input_nodes if _shares(each, value)]
            if sources and (_is_detach(node) or not self._views.isdisjoint(sources)):
                self._views.add(node)

    def receive_gradients(self, node: fx.Node) -> bool:
        """Whether the node writes what has a gradient to such a view.

        The view has one from then on, and what it is detached from has none.
        """
        written = [each for each in updated_in_place(node) if each in self._views]
        given = [_example(each) for each in node.all_input_nodes if each not in written]
        return bool(written) and any(value is not None and value.requires_grad for value in given)


def _shares(node: fx.Node, value: torch.Tensor | None) -> bool:
    own = _example(node)
    return value is not None and own is not None and storage_of(own) == storage_of(value)


def _is_detach(node: fx.Node) -> bool:
    return (node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")) == "detach"


def _example(node: fx.Node) -> torch.Tensor | None:
    value = node.meta.get("example_value")
    return value if isinstance(value, torch.Tensor) and has_storage(value) else None


def _graphs_among(gm: fx.GraphModule, nodes: Sequence[fx.Node]) -> Iterator[fx.GraphModule]:
    for node in nodes:
        part = attribute_of(gm, str(node.target)) if node.op == "get_attr" else None
        if isinstance(part, fx.GraphModule):
            yield part


def _tracing_inputs(
    placeholders: Sequence[fx.Node], example_inputs: Sequence[Any]
) -> tuple[TracingContext, Sequence[Any]]:
    """A tracing context for capture alone, and the inputs to trace with.

    Capture must not leave records in Dynamo's context (metadata of the traced function), where the inner compiler
    writes its own. Dynamo's fake mode and its record of symbolic inputs are shared, so that the IR has Dynamo's symbols
    and guards on sizes reach its shape environment.
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
