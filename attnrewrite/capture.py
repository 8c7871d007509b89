"""Dynamo's graph -> "the IR": functional, pre-dispatch ATen, with the calling convention of the graph it came from.

The IR is the one of ``torch.export``: composite operators (``linear``, ``matmul``, ``einsum``, ``softmax``,
``scaled_dot_product_attention``) are whole, in-place updates have become functional, autograd has not been applied,
sizes stay symbolic. It is made by ``aot_export_module(..., pre_dispatch=True)``, which is private to torch and is
called here and nowhere else.
"""

from __future__ import annotations

import contextlib
import itertools
import operator
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._functorch.aot_autograd import aot_export_module
from torch._guards import TracingContext, detect_fake_mode, tracing
from torch._higher_order_ops.wrap import uid as checkpoint_ids
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import CheckpointPolicy

from attnrewrite.batching import holds_vmap, written_out
from attnrewrite.ir import Builder, copy_attributes, is_view, same_shape
from attnrewrite.legalise import legalised
from attnrewrite.openings import OPENINGS

__all__ = ["CaptureError", "Captured", "capture"]


class CaptureError(Exception):
    """The graph cannot be brought into the IR; the message says why."""


@dataclass
class Captured:
    """``gm`` takes the same inputs and returns the same outputs as the graph that was captured."""

    gm: fx.GraphModule
    seconds: float


def capture(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Captured:
    """The IR of ``gm``.

    Args:
        gm: a graph made by Dynamo. It is not changed.
        example_inputs: what Dynamo hands to a backend with it; used where the graph's placeholders carry no fake value.

    Raises:
        CaptureError: the graph is not one that functional tracing can express. Nothing has been changed then.
    """
    start = time.perf_counter()
    gm = legalised(gm)
    if holds_vmap(gm):
        try:
            gm = written_out(gm)
        except Exception as error:
            raise CaptureError(f"vmap could not be written out: {_first_line(error)}") from error
    _refuse_function_transforms(gm)
    placeholders = gm.graph.find_nodes(op="placeholder")
    context, inputs = _tracing_inputs(placeholders, example_inputs)
    regions = _AutocastRegions()
    opaque = _OpaqueCalls()
    prepared = _prepared(gm, regions, opaque)
    try:
        with (
            tracing(context),
            torch.fx.traceback.preserve_node_meta(),
            regions.closed_at_exit(),
        ):
            exported, signature = aot_export_module(prepared, inputs, trace_joint=False, pre_dispatch=True)
    except Exception as error:
        raise CaptureError(f"{type(error).__name__}: {_first_line(error)}") from error
    finally:
        opaque.forget()
    assert isinstance(exported, fx.GraphModule)
    ir = _restore_calling_convention(gm, prepared, placeholders, exported, signature, opaque)
    return Captured(ir, time.perf_counter() - start)


def _refuse_function_transforms(gm: fx.GraphModule) -> None:
    """``torch.func``'s levels are switched by the graph itself: tracing it again would leave them where they are."""
    for node in gm.graph.nodes:
        if node.op == "call_function" and "functorch" in (getattr(node.target, "__module__", None) or ""):
            name = getattr(node.target, "__name__", node.target)
            raise CaptureError(f"the graph uses a torch.func transform ({name}), which cannot be traced functionally")
        if getattr(node.target, "__name__", "") in ("_enter_dual_level", "_exit_dual_level", "_make_dual"):
            raise CaptureError("the graph uses forward-mode differentiation")


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")


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


class _AutocastRegions:
    """Makes a graph's autocast regions take effect while it is traced, and not only be recorded.

    Without it the operators of a region are traced in their uncast dtypes, and a ``.float()`` on a half-precision
    result is taken for a no-op and lost. ``autocast.__enter__`` both switches and records, the function that Dynamo
    puts into the graph records only (https://github.com/pytorch/pytorch/blob/v2.13.0/torch/amp/autocast_mode.py).
    """

    def __init__(self) -> None:
        self._open: list[Any] = []

    def enter(self, *args: Any) -> Any:
        context = torch.amp.autocast_mode.autocast(*args)
        context.__enter__()  # type: ignore[no-untyped-call]
        self._open.append(context)
        return context

    def exit(self, context: Any) -> None:
        self._open.remove(context)
        context.__exit__(None, None, None)

    @contextlib.contextmanager
    def closed_at_exit(self) -> Iterator[None]:
        """Tracing that fails midway leaves no region open and the grad mode as it was."""
        grad = torch.is_grad_enabled()
        try:
            yield
        finally:
            torch.set_grad_enabled(grad)
            while self._open:
                self._open.pop().__exit__(None, None, None)

    def substitute(self, node: fx.Node) -> None:
        if node.target is torch.amp.autocast_mode._enter_autocast:
            node.target = self.enter
        elif node.target is torch.amp.autocast_mode._exit_autocast:
            node.target = self.exit


class _OpaqueCalls:
    """Passes calls of higher-order operators over as a whole.

    Functional tracing would inline some of them and lose what they are for (the backward of a custom
    ``autograd.Function``), and knows no rule for others. While the graph is traced an operator with the same outputs
    stands in for the call; afterwards the call is put back, word for word.
    """

    def __init__(self) -> None:
        self._calls: dict[int, tuple[fx.Node, dict[fx.Node, torch.nn.Module]]] = {}

    def stand_in(
        self, node: fx.Node, gm: fx.GraphModule, graph: fx.Graph, env: dict[fx.Node, Any]
    ) -> fx.Node | tuple[Any, ...]:
        modules = {
            arg: _attribute(gm, str(arg.target))
            for arg in node.all_input_nodes
            if arg.op == "get_attr" and isinstance(_attribute(gm, str(arg.target)), torch.nn.Module)
        }
        for module in modules.values():
            _refuse_mutation(node, module)
        inputs = [arg for arg in node.all_input_nodes if arg not in modules]
        values = [arg.meta["example_value"] for arg in inputs if "example_value" in arg.meta]
        outputs = node.meta["example_value"]
        flat = outputs if isinstance(outputs, (tuple, list)) else (outputs,)
        if len(values) != len(inputs) or not all(isinstance(value, torch.Tensor) for value in flat):
            raise CaptureError(f"a call of the higher-order operator {node.target} whose values are not all tensors")
        if not all(isinstance(value, (torch.Tensor, torch.SymInt, int)) for value in values):
            raise CaptureError(
                f"a call of the higher-order operator {node.target} with a number that is computed of symbolic sizes "
                "(flex_attention's default scale where the head size is symbolic: give the scale, or mark the "
                "head size static)"
            )
        storages = {_storage(value) for value in values if isinstance(value, torch.Tensor)}
        if any(_storage(value) in storages for value in flat):
            raise CaptureError(
                f"a call of the higher-order operator {node.target} whose output shares memory with its input"
            )
        tensors = [env[arg] for arg, value in zip(inputs, values, strict=True) if isinstance(value, torch.Tensor)]
        sizes = [env[arg] for arg, value in zip(inputs, values, strict=True) if not isinstance(value, torch.Tensor)]
        index = next(_opaque_ids)
        self._calls[index] = (node, modules)
        _opaque_outputs[index] = flat
        stand_in = graph.call_function(torch.ops.attnrewrite.opaque.default, (tensors, sizes, index))
        stand_in.meta = dict(node.meta)
        if isinstance(outputs, (tuple, list)):
            return tuple(graph.call_function(operator.getitem, (stand_in, i)) for i in range(len(flat)))
        return graph.call_function(operator.getitem, (stand_in, 0))

    def put_back(self, graph: fx.Graph, attributes: dict[str, Any]) -> None:
        for node in graph.find_nodes(op="call_function", target=torch.ops.attnrewrite.opaque.default):
            tensors, sizes, index = node.args
            call, modules = self._calls[index]
            tensors, sizes = iter(tensors), iter(sizes)
            env: dict[fx.Node, fx.Node] = {}
            with graph.inserting_before(node):
                for arg in call.all_input_nodes:
                    if arg in modules:
                        name = f"{arg.target}".replace(".", "_") + f"_{index}"
                        attributes[name] = modules[arg]
                        env[arg] = graph.get_attr(name)
                    else:
                        env[arg] = next(tensors if isinstance(arg.meta["example_value"], torch.Tensor) else sizes)
                restored = graph.node_copy(call, env.__getitem__)
            restored.meta = {**call.meta, **node.meta}
            outputs = call.meta["example_value"]
            if isinstance(outputs, (tuple, list)):
                node.replace_all_uses_with(restored)
            else:
                restored.meta["val"] = node.meta["val"][0]
                for item in list(node.users):
                    item.replace_all_uses_with(restored)
                    graph.erase_node(item)
            graph.erase_node(node)

    def forget(self) -> None:
        for index in self._calls:
            _opaque_outputs.pop(index, None)


_opaque_ids = itertools.count()
_opaque_outputs: dict[int, Sequence[torch.Tensor]] = {}
torch.library.define("attnrewrite::opaque", "(Tensor[] tensors, SymInt[] sizes, int index) -> Tensor[]")


def _opaque_fake(tensors: Sequence[torch.Tensor], sizes: Sequence[int], index: int) -> list[torch.Tensor]:
    return [
        torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)
        for value in _opaque_outputs[index]
    ]


torch.library.register_fake("attnrewrite::opaque", _opaque_fake)


def _refuse_mutation(call: fx.Node, module: torch.nn.Module) -> None:
    for submodule in module.modules():
        if not isinstance(submodule, fx.GraphModule):
            raise CaptureError(f"a call of the higher-order operator {call.target} on {type(submodule).__name__}")
        for node in submodule.graph.nodes:
            name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
            in_place = name.endswith("_") and not name.endswith("__") and name not in _NAMED_LIKE_KEYWORDS
            if node.op in ("call_function", "call_method") and (
                in_place or "out" in node.kwargs or name in _IN_PLACE_OPERATORS
            ):
                raise CaptureError(f"a call of the higher-order operator {call.target} that updates a tensor ({name})")


_NAMED_LIKE_KEYWORDS = frozenset({"and_", "or_", "not_", "is_"})
"""Functions of ``operator`` whose underscore tells them from a keyword."""

_IN_PLACE_OPERATORS = frozenset(
    {"setitem", *(name for name in dir(operator) if name.startswith("i") and hasattr(operator, f"__{name}__"))}
) - {"index", "inv", "invert", "is_", "is_not"}


def _is_opaque(node: fx.Node, gm: fx.GraphModule) -> bool:
    if node.target is torch.ops.higher_order.autograd_function_apply:
        # Without gradients its forward may be traced like any other code.
        return torch.is_grad_enabled() and any(
            getattr(arg.meta.get("example_value"), "requires_grad", False) for arg in node.all_input_nodes
        )
    if node.target is torch.ops.higher_order.tag_activation_checkpoint:
        return _is_selective_checkpoint(node, gm)
    return node.target in (torch.ops.higher_order.flex_attention,)


def _wants_gradients(gm: fx.GraphModule) -> bool:
    return torch.is_grad_enabled() and any(
        getattr(node.meta.get("example_value"), "requires_grad", False)
        for node in gm.graph.find_nodes(op="placeholder")
    )


def _is_selective_checkpoint(node: fx.Node, gm: fx.GraphModule) -> bool:
    (body, *_) = node.args
    assert isinstance(body, fx.Node)
    return "_checkpoint_context_fn" in _attribute(gm, str(body.target)).meta


def _prepared(gm: fx.GraphModule, autocast: _AutocastRegions, opaque: _OpaqueCalls) -> fx.GraphModule:
    """``gm`` itself, or a copy in which what functional tracing cannot take has been put in a form that it can."""
    special: tuple[Any, ...] = (
        torch.amp.autocast_mode._enter_autocast,
        torch.amp.autocast_mode._exit_autocast,
        torch.ops.higher_order.tag_activation_checkpoint,
    )
    special = (*special, *_DROPOUT, *OPENINGS)
    if not any(node.target in special or _is_opaque(node, gm) for node in gm.graph.nodes):
        return gm
    copy = _Preparation(opaque)
    copy.graph.output(copy.copy(gm, {}, prefix="", tags={}))
    for node in copy.graph.nodes:
        autocast.substitute(node)
        node.target = OPENINGS.get(node.target, node.target) if node.op == "call_function" else node.target
    _settle_dropout(copy.graph)
    return fx.GraphModule(copy.attributes, copy.graph)


_DROPOUT = (torch.nn.functional.dropout, torch.dropout)


def _settle_dropout(graph: fx.Graph) -> None:
    """Dropout's result may be updated in place, which tracing for export forbids ("frozen storage").

    Where nothing is dropped the result is the argument itself, as in eager; else it is followed by a copy, if the graph
    updates anything in place at all.
    """
    in_place = any(_updates(node) for node in graph.nodes)
    for target in _DROPOUT:
        for node in graph.find_nodes(op="call_function", target=target):
            given = dict(zip(("input", "p", "training", "inplace"), node.args, strict=False), **node.kwargs)
            given["training"] = given.get("training", given.get("train", True))
            if given.get("inplace") or not isinstance(given["training"], bool):
                continue
            if not given["training"] or given.get("p", 0.5) == 0:
                node.replace_all_uses_with(given["input"])
                graph.erase_node(node)
            elif in_place:
                with graph.inserting_after(node):
                    copied = graph.call_function(torch.clone, (node,))
                copied.meta = {key: value for key, value in node.meta.items() if key in ("stack_trace", "recompute")}
                node.replace_all_uses_with(copied, delete_user_cb=lambda user, copied=copied: user is not copied)


def _updates(node: fx.Node) -> bool:
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return (name.endswith("_") and not name.endswith("__")) or name in _IN_PLACE


_IN_PLACE = frozenset({"iadd", "isub", "imul", "itruediv", "setitem", "iand", "ior", "ipow"})


class _Preparation:
    """A copy of a graph: checkpointed regions inlined, opaque calls replaced by their stand-ins."""

    def __init__(self, opaque: _OpaqueCalls) -> None:
        self.graph = fx.Graph()
        self.attributes: dict[str, Any] = {}
        self._opaque = opaque

    def copy(self, gm: fx.GraphModule, env: dict[fx.Node, Any], prefix: str, tags: dict[str, Any]) -> Any:
        """Copies ``gm``'s nodes, ``env`` holding those that exist already, and returns its outputs."""
        for node in gm.graph.nodes:
            if node in env:
                continue
            if node.op == "output":
                return fx.node.map_arg(node.args[0], env.__getitem__)
            if _is_opaque(node, gm):
                env[node] = self._opaque.stand_in(node, gm, self.graph, env)
            elif node.target is torch.ops.higher_order.tag_activation_checkpoint:
                env[node] = self._inlined_checkpoint(node, gm, env, prefix)
            elif node.target is operator.getitem and isinstance(env.get(node.args[0]), (tuple, list)):
                env[node] = env[node.args[0]][node.args[1]]
            else:
                env[node] = copied = self.graph.node_copy(node, env.__getitem__)
                copied.meta.update(tags)
                if node.op in ("get_attr", "call_module"):
                    copied.target = f"{prefix}{node.target}".replace(".", "_") if prefix else node.target
                    self.attributes[copied.target] = _attribute(gm, node.target)
        raise AssertionError("a graph without an output")

    def _inlined_checkpoint(self, node: fx.Node, gm: fx.GraphModule, env: dict[fx.Node, Any], prefix: str) -> Any:
        """The region's nodes, with the tags that make the partitioner recompute them in the backward pass.

        They are the tags that ``tag_activation_checkpoint`` itself leaves when AOTAutograd traces through it
        (https://github.com/pytorch/pytorch/blob/v2.13.0/torch/_higher_order_ops/wrap.py).
        """
        body_node, *inputs = node.args
        assert isinstance(body_node, fx.Node)
        body = _attribute(gm, str(body_node.target))
        inputs = fx.node.map_arg(inputs, env.__getitem__)
        body_env = dict(zip(body.graph.find_nodes(op="placeholder"), inputs, strict=True))
        # Without a backward pass there is nothing to recompute, and AOTAutograd refuses to.
        tags: dict[str, Any] = {}
        if _wants_gradients(gm):
            tags = {"recompute": CheckpointPolicy.PREFER_RECOMPUTE, "ac_graph_id": next(checkpoint_ids)}
        return self.copy(body, body_env, f"{prefix}{body_node.target}_", tags)


def _restore_calling_convention(
    original: fx.GraphModule,
    prepared: fx.GraphModule,
    placeholders: Sequence[fx.Node],
    exported: fx.GraphModule,
    signature: Any,
    opaque: _OpaqueCalls,
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
            attributes[lifted[traced.name]] = _attribute(prepared, lifted[traced.name])

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
            attributes[node.target] = constant = _attribute(exported, node.target)
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

    if _wants_gradients(original):
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
        constant = ir._buffers.pop(name)
        ir.__dict__[name] = constant
    _say_what_is_copied(ir)
    _say_what_is_read(ir)
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


def _say_what_is_copied(ir: fx.GraphModule) -> None:
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


def _say_what_is_read(ir: fx.GraphModule) -> None:
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


def _lifted_number(node: fx.Node, exported: fx.GraphModule) -> tuple[Any, tuple[Any, ...], dict[str, Any]] | None:
    """``torch.tensor(0.5)`` is traced as a copy of a constant: the call that says its value, for those who read it."""
    if node.target is not torch.ops.aten.lift_fresh_copy.default:
        return None
    (source,) = node.args
    if not isinstance(source, fx.Node) or source.op != "get_attr":
        return None
    constant = _attribute(exported, str(source.target))
    if not isinstance(constant, torch.Tensor) or isinstance(constant, FakeTensor) or constant.numel() != 1:
        return None
    if constant.dtype.is_complex or constant.layout is not torch.strided:
        return None
    options = {"dtype": constant.dtype, "device": constant.device, "pin_memory": False}
    return torch.ops.aten.full.default, (list(constant.shape), constant.item()), options


def _is_metadata_assertion(node: fx.Node) -> bool:
    # Export's tracing leaves one behind every `.to()`; it only asserts the dtype that the trace has already shown.
    return node.target is torch.ops.aten._assert_tensor_metadata.default


def _attribute(root: torch.nn.Module, path: str) -> Any:
    value: Any = root
    for name in path.split("."):
        value = getattr(value, name)
    return value


def _alias_updated_inputs(
    graph: fx.Graph,
    outputs: list[Any],
    original_outputs: Any,
    updated: Sequence[fx.Node],
    written: dict[fx.Node, fx.Node],
) -> list[Any]:
    """Outputs that were views of an updated input are views of it again, not of the value written into it."""
    storages = {_storage(node.meta.get("example_value", node.meta["val"])) for node in updated}

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
        aliases = isinstance(value, torch.Tensor) and _storage(value) in storages
        result.append(rebase(output) if aliases and isinstance(output, fx.Node) else output)
    return result


def _storage(value: Any) -> Any:
    return StorageWeakRef(value.untyped_storage())  # type: ignore[no-untyped-call]
