"""The captured graph with the inputs and outputs of the graph that it came from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from attnrewrite.capture.normalize import fill_constants, name_metadata_reads
from attnrewrite.capture.opaque import OpaqueCalls
from attnrewrite.capture.prepare import wants_gradients
from attnrewrite.capture.support import CaptureError, attribute_of, storage_of
from attnrewrite.ir.nodes import copy_attributes
from attnrewrite.ir.ops import is_view
from attnrewrite.torch_private import FakeTensor


def restore_calling_convention(
    original: fx.GraphModule,
    prepared: fx.GraphModule,
    placeholders: Sequence[fx.Node],
    exported: fx.GraphModule,
    signature: Any,
    opaque: OpaqueCalls,
) -> fx.GraphModule:
    """Lifted parameters become attributes again, updated inputs are written back, outputs are the original's."""
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    attributes: dict[str, Any] = {}
    constants: list[str] = []
    lifted = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}

    exported_inputs = exported.graph.find_nodes(op="placeholder")
    user_inputs = [node for node in exported_inputs if node.name not in lifted]
    if len(user_inputs) != len(placeholders):
        raise CaptureError(f"tracing returned {len(user_inputs)} inputs for {len(placeholders)}")
    for source, traced in zip(placeholders, user_inputs, strict=True):
        node = graph.placeholder(str(source.target))
        copy_attributes(source, node)
        node.meta = {**source.meta, "val": traced.meta["val"]}
        env[traced] = node
    for traced in exported_inputs:
        if traced.name in lifted:
            node = graph.get_attr(lifted[traced.name])
            node.meta = dict(traced.meta)
            env[traced] = node
            attributes[lifted[traced.name]] = attribute_of(prepared, lifted[traced.name])

    for node in exported.graph.nodes:
        if node.op in ("placeholder", "output") or _is_metadata_assertion(node):
            continue
        number = _lifted_number(node, exported)
        if number is not None:
            env[node] = graph.call_function(*number)
            env[node].meta = dict(node.meta)
            continue
        env[node] = graph.node_copy(node, env.__getitem__)
        if node.op == "get_attr":
            attributes[node.target] = constant = attribute_of(exported, node.target)
            if isinstance(constant, torch.Tensor):
                constants.append(node.target)

    (results,) = exported.graph.output_node().args
    assert isinstance(results, (tuple, list))
    updates = {
        **signature.parameters_to_mutate,
        **signature.buffers_to_mutate,
        **signature.user_inputs_to_mutate,
    }
    count = len(results) - len(signature.user_outputs)
    if count != len(updates):
        raise CaptureError("two inputs are updated with the same value")
    by_name = {node.name: env[node] for node in exported_inputs}
    by_name.update({lifted[name]: by_name[name] for name in lifted})
    written: dict[fx.Node, fx.Node] = {}
    targets: list[fx.Node] = []
    for new_value, target_name in zip(results[:count], updates.values(), strict=True):
        target = by_name[target_name]
        written_back = graph.call_function(torch.ops.aten.copy_.default, (target, env[new_value]))
        written_back.meta["val"] = target.meta["val"]
        written[env[new_value]] = written_back
        targets.append(target)

    if wants_gradients(original):
        for target in targets:
            _read_from_copy(graph, target)
    original_results = original.graph.output_node().args[0]
    outputs = [env[result] if isinstance(result, fx.Node) else result for result in results[count:]]
    if targets:
        outputs = _alias_updated_inputs(graph, outputs, original_results, targets, written)
    graph.output(tuple(outputs))
    opaque.put_back(graph, attributes)
    for name in list(constants):
        readers = [node for node in graph.find_nodes(op="get_attr", target=name) if node.users]
        if not readers:
            constants.remove(name)
            for node in graph.find_nodes(op="get_attr", target=name):
                graph.erase_node(node)
    ir = fx.GraphModule(attributes, graph, original.__class__.__name__)
    for name in constants:
        # A tensor that the graph itself makes (`torch.tensor([1, 2])`) is no buffer: the inner compiler would look for
        # the place in the user's module that it comes from.
        constant = getattr(ir, name)
        delattr(ir, name)
        ir.__dict__[name] = constant
    fill_constants(ir)
    name_metadata_reads(ir)
    ir.recompile()
    copy_attributes(original, ir)
    ir.meta = original.meta
    return ir


def _read_from_copy(graph: fx.Graph, updated: fx.Node) -> None:
    """Readers of an input that is written back at the end read a copy of it.

    Autograd keeps what a functional operator read (``_native_batch_norm_legit_functional`` the running statistics) and
    would find it changed.
    """
    readers = [user for user in updated.users if user.target is not torch.ops.aten.copy_.default]
    if not readers:
        return
    with graph.inserting_before(next(node for node in graph.nodes if node.op != "placeholder")):
        copied = graph.call_function(torch.ops.aten.clone.default, (updated,))
    copied.meta["val"] = updated.meta["val"]
    for reader in readers:
        reader.replace_input_with(updated, copied)


def _lifted_number(node: fx.Node, exported: fx.GraphModule) -> tuple[Any, tuple[Any, ...], dict[str, Any]] | None:
    """``torch.tensor(0.5)`` is traced as a copy of a constant: the call that says its value, for those who read it."""
    if node.target is not torch.ops.aten.lift_fresh_copy.default:
        return None
    (source,) = node.args
    if not isinstance(source, fx.Node) or source.op != "get_attr":
        return None
    constant = attribute_of(exported, str(source.target))
    if not isinstance(constant, torch.Tensor) or isinstance(constant, FakeTensor) or constant.numel() != 1:
        return None
    if constant.dtype.is_complex or constant.layout is not torch.strided:
        return None
    options = {"dtype": constant.dtype, "device": constant.device, "pin_memory": False}
    return torch.ops.aten.full.default, (list(constant.shape), constant.item()), options


def _is_metadata_assertion(node: fx.Node) -> bool:
    # Export's tracing leaves one behind every `.to()`; it only asserts the dtype that the trace has already shown.
    return node.target is torch.ops.aten._assert_tensor_metadata.default


def _alias_updated_inputs(
    graph: fx.Graph,
    outputs: list[Any],
    original_outputs: Any,
    updated: Sequence[fx.Node],
    written: dict[fx.Node, fx.Node],
) -> list[Any]:
    """Outputs that were views of an updated input are views of it again, not of the value written into it."""
    storages = {storage_of(node.meta.get("example_value", node.meta["val"])) for node in updated}

    def rebase(node: fx.Node) -> fx.Node:
        if node in written:
            return written[node]
        if not is_view(node) or not isinstance(node.args[0], fx.Node):
            raise CaptureError(f"an output shares memory with an input that the graph updates, by way of {node.target}")
        source = rebase(node.args[0])
        return graph.node_copy(node, lambda arg: source if arg is node.args[0] else arg)

    result: list[Any] = []
    for output, source in zip(outputs, original_outputs, strict=True):
        value = source.meta.get("example_value") if isinstance(source, fx.Node) else None
        aliases = isinstance(value, torch.Tensor) and storage_of(value) in storages
        result.append(rebase(output) if aliases and isinstance(output, fx.Node) else output)
    return result
