"""Calling convention: gives the traced graph the inputs and outputs of Dynamo's graph again."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import fx

from attnrewrite.capture.opaque import OpaqueCalls
from attnrewrite.capture.prepare import wants_gradients
from attnrewrite.capture.subclasses import HeldCalls
from attnrewrite.capture.support import CaptureError, attribute_of, storage_of
from attnrewrite.ir.nodes import copy_attributes
from attnrewrite.ir.ops import is_view
from attnrewrite.torch_private import FakeTensor


def restore_calling_convention(
    original: fx.GraphModule,
    prepared: fx.GraphModule,
    exported: fx.GraphModule,
    signature: Any,
    opaque: OpaqueCalls,
    held: HeldCalls,
) -> fx.GraphModule:
    """Returns the traced graph with the inputs and outputs of Dynamo's graph.

    Parameters that tracing lifted to inputs become attributes again, inputs that the graph updates in place are written
    back, and opaque calls replace their stand-ins.

    Args:
        original: Dynamo's graph.
        prepared: the graph that was traced.
        exported: the result of tracing.
        signature: torch's ``GraphSignature`` of ``exported``.
        opaque, held: the calls that stand-ins were traced for.

    Raises:
        CaptureError: the calling convention cannot be restored.
    """
    restoration = _Restoration(original, prepared, exported, signature)
    inputs = restoration.copy_inputs(held.inputs)
    restoration.copy_calls()
    updated = restoration.write_back_updates()
    restoration.copy_outputs(updated)
    opaque.restore(restoration.graph, restoration.attributes)
    held.restore(restoration.graph, restoration.attributes, inputs)
    return restoration.module()


class _Restoration:
    """Builds the graph with the calling convention of ``original``, step by step."""

    def __init__(
        self, original: fx.GraphModule, prepared: fx.GraphModule, exported: fx.GraphModule, signature: Any
    ) -> None:
        self.graph = fx.Graph()
        self.attributes: dict[str, Any] = {}
        self._original = original
        self._prepared = prepared
        self._exported = exported
        self._signature = signature
        self._lifted = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        self._inputs = exported.graph.find_nodes(op="placeholder")
        self._copies: dict[fx.Node, fx.Node] = {}
        self._constants: list[str] = []

    def copy_inputs(self, held: Collection[fx.Node]) -> dict[fx.Node, fx.Node]:
        """Adds Dynamo's inputs, in its order, and an attribute for each parameter or buffer that tracing lifted.

        Returns the copies by Dynamo's inputs, of which those that are ``held`` were not traced.
        """
        placeholders = self._original.graph.find_nodes(op="placeholder")
        user_inputs = [node for node in self._inputs if node.name not in self._lifted]
        if len(user_inputs) != len(placeholders) - len(held):
            raise CaptureError(f"the traced graph has {len(user_inputs)} inputs, and Dynamo's {len(placeholders)}")
        traced_inputs = iter(user_inputs)
        copies: dict[fx.Node, fx.Node] = {}
        for source in placeholders:
            node = copies[source] = self.graph.placeholder(str(source.target))
            copy_attributes(source, node)
            node.meta = {**source.meta}
            if source not in held:
                traced = next(traced_inputs)
                node.meta["val"] = traced.meta["val"]
                self._copies[traced] = node
        for traced in self._inputs:
            if traced.name in self._lifted:
                name = self._lifted[traced.name]
                node = self.graph.get_attr(name)
                node.meta = dict(traced.meta)
                self._copies[traced] = node
                self.attributes[name] = attribute_of(self._prepared, name)
        return copies

    def copy_calls(self) -> None:
        """Adds all calls of the traced graph, without the assertions that tracing left."""
        for node in self._exported.graph.nodes:
            if node.op in ("placeholder", "output") or _is_metadata_assertion(node):
                continue
            number = _lifted_number(node, self._exported)
            if number is not None:
                self._copies[node] = self.graph.call_function(*number)
                self._copies[node].meta = dict(node.meta)
                continue
            self._copies[node] = self.graph.node_copy(node, self._copies.__getitem__)
            if node.op == "get_attr":
                self.attributes[node.target] = constant = attribute_of(self._exported, node.target)
                if isinstance(constant, torch.Tensor):
                    self._constants.append(node.target)

    def write_back_updates(self) -> dict[fx.Node, fx.Node]:
        """Writes new values into the inputs that the graph updates in place; returns the ``copy_`` of each."""
        signature = self._signature
        # Names of updated inputs by the names of their new values.
        names = {
            **signature.parameters_to_mutate,
            **signature.buffers_to_mutate,
            **signature.user_inputs_to_mutate,
        }
        new_values, _ = self._results()
        if len(new_values) != len(names):
            raise CaptureError("two inputs are updated in place with the same value")
        by_name = {node.name: self._copies[node] for node in self._inputs}
        by_name.update({self._lifted[name]: by_name[name] for name in self._lifted})
        updated: dict[fx.Node, fx.Node] = {}
        for new_value, name in zip(new_values, names.values(), strict=True):
            target = by_name[name]
            updated[target] = self.graph.call_function(torch.ops.aten.copy_.default, (target, self._copies[new_value]))
            updated[target].meta["val"] = target.meta["val"]
        if wants_gradients(self._original):
            for target in updated:
                _read_from_copy(self.graph, target)
        return updated

    def copy_outputs(self, updated: dict[fx.Node, fx.Node]) -> None:
        """Adds the outputs of the original graph; ``updated`` is the result of :meth:`write_back_updates`."""
        _, results = self._results()
        outputs = [self._copies[result] if isinstance(result, fx.Node) else result for result in results]
        if updated:
            original_outputs = self._original.graph.output_node().args[0]
            outputs = _alias_updated_inputs(self.graph, outputs, original_outputs, updated)
        self.graph.output(tuple(outputs))

    def _results(self) -> tuple[list[Any], list[Any]]:
        """The new values of updated inputs, and the original's outputs, as the exported graph returns them."""
        (results,) = self._exported.graph.output_node().args
        assert isinstance(results, (tuple, list))
        count = len(results) - len(self._signature.user_outputs)
        return list(results[:count]), list(results[count:])

    def module(self) -> fx.GraphModule:
        """The finished graph module, without constants that nothing reads."""
        constants = self._constants_in_use()
        ir = fx.GraphModule(self.attributes, self.graph, self._original.__class__.__name__)
        for name in constants:
            # A constant of the graph (`torch.tensor([1, 2])`) must not be a buffer: the inner compiler would look for
            # its source in the user's module.
            constant = getattr(ir, name)
            delattr(ir, name)
            ir.__dict__[name] = constant
        copy_attributes(self._original, ir)
        ir.meta = self._original.meta
        return ir

    def _constants_in_use(self) -> list[str]:
        """Removes the nodes of constants that nothing reads, and returns the names of the others.

        Raises:
            CaptureError: tracing has lost the numbers of a constant.
        """
        used: list[str] = []
        for name in dict.fromkeys(self._constants):
            nodes = self.graph.find_nodes(op="get_attr", target=name)
            if any(node.users for node in nodes):
                if isinstance(self.attributes[name], FakeTensor):
                    raise CaptureError(
                        "a constant of the graph is traced without its numbers (try torch.tensor or torch.arange)"
                    )
                used.append(name)
                continue
            for node in nodes:
                self.graph.erase_node(node)
        return used


def _read_from_copy(graph: fx.Graph, updated: fx.Node) -> None:
    """Makes the readers of an input that is updated at the end read a copy of it.

    Autograd saves arguments of functional operators for the backward pass (the running statistics of batch norm) and
    raises an error if they were changed since.
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
    """The call of ``full`` for a copy of a one-element constant (``torch.tensor(0.5)``), so that its value can be read.

    None for any other node.
    """
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
    # Tracing adds one after every `.to()`; it asserts a dtype that is known already.
    return node.target is torch.ops.aten._assert_tensor_metadata.default


def _alias_updated_inputs(
    graph: fx.Graph, outputs: list[Any], original_outputs: Any, updated: dict[fx.Node, fx.Node]
) -> list[Any]:
    """Returns the outputs, where views of an updated input are views of it again, not of the value written into it.

    Args:
        graph: the graph, in which the views are added.
        outputs: the outputs of the traced graph.
        original_outputs: the outputs of Dynamo's graph.
        updated: the ``copy_`` of each updated input.
    """
    storages = {storage_of(node.meta.get("example_value", node.meta["val"])) for node in updated}
    written = {copy.args[1]: copy for copy in updated.values()}

    def rebase(node: fx.Node) -> fx.Node:
        if node in written:
            return written[node]
        if not is_view(node) or not isinstance(node.args[0], fx.Node):
            raise CaptureError(
                f"an output shares memory with an input that is updated in place, by way of {node.target}"
            )
        source = rebase(node.args[0])
        return graph.node_copy(node, lambda arg: source if arg is node.args[0] else arg)

    result: list[Any] = []
    for output, source in zip(outputs, original_outputs, strict=True):
        value = source.meta.get("example_value") if isinstance(source, fx.Node) else None
        aliases = isinstance(value, torch.Tensor) and storage_of(value) in storages
        result.append(rebase(output) if aliases and isinstance(output, fx.Node) else output)
    return result
