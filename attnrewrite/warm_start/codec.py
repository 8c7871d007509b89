"""Graphs and their arguments as data that JSON takes, and back."""

from __future__ import annotations

import base64
import importlib
import keyword
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import BuiltinFunctionType
from typing import Any

import torch
from torch import fx
from torch.utils.checkpoint import CheckpointPolicy

from attnrewrite.ir.nodes import copy_attributes
from attnrewrite.ir.stored import tensor_bytes
from attnrewrite.torch_private import (
    HigherOrderOperator,
    OpOverload,
    OpOverloadPacket,
    custom_op_functions,
    defined_in_python,
    operator_name,
    schema_of,
)
from attnrewrite.warm_start.replaced import OF_TORCH, is_written_in

__all__ = ["NotStorable", "decoded_graph", "encoded", "encoded_graph", "trusted_name"]


class NotStorable(Exception):
    """Why a graph is not stored, or why what is stored is not used, in words."""


# -- arguments ---------------------------------------------------------------------------------------------------------

_OF_TORCH: tuple[tuple[str, type], ...] = (
    ("dtype", torch.dtype),
    ("layout", torch.layout),
    ("memory_format", torch.memory_format),
)


def encoded(value: Any, place_of: Callable[[fx.Node], int]) -> Any:
    """An argument of a node, or another plain value, as data.

    Args:
        place_of: the place in the graph of a node among the arguments.

    Raises:
        NotStorable: the value is of a type that data does not express.
    """
    if value is None or type(value) in (bool, int, str):
        return value
    if type(value) is float:
        return {"float": value.hex()}
    if isinstance(value, fx.Node):
        return {"node": place_of(value)}
    if isinstance(value, (list, tuple)) and type(value).__name__ in _SEQUENCES:
        return {_SEQUENCES[type(value).__name__]: [encoded(part, place_of) for part in value]}
    if isinstance(value, dict) and type(value).__name__ in ("dict", "immutable_dict"):
        return {"dict": [[encoded(key, place_of), encoded(part, place_of)] for key, part in value.items()]}
    if type(value) is slice:
        return {"slice": [encoded(part, place_of) for part in (value.start, value.stop, value.step)]}
    if type(value) is complex:
        return {"complex": [value.real.hex(), value.imag.hex()]}
    if type(value) is torch.device:
        return {"device": str(value)}
    if value is ...:
        return {"ellipsis": True}
    if type(value) is CheckpointPolicy:
        return {"policy": value.name}
    for kind, class_ in _OF_TORCH:
        if isinstance(value, class_):
            return {kind: str(value).removeprefix("torch.")}
    raise NotStorable(f"an argument of type {type(value).__name__}")


_SEQUENCES = {"list": "list", "immutable_list": "list", "tuple": "tuple", "Size": "tuple"}


def _decoded(data: Any, nodes: Sequence[fx.Node]) -> Any:
    if not isinstance(data, dict):
        return data
    ((kind, content),) = data.items()
    if kind == "node":
        if type(content) is not int or content < 0:
            raise NotStorable(f"a node {content!r}")
        return nodes[content]
    if kind in ("list", "tuple"):
        return (list if kind == "list" else tuple)(_decoded(part, nodes) for part in content)
    if kind == "dict":
        return {_decoded(key, nodes): _decoded(part, nodes) for key, part in content}
    if kind == "slice":
        return slice(*(_decoded(part, nodes) for part in content))
    if kind == "ellipsis":
        return ...
    if kind in ("float", "complex"):
        return float.fromhex(content) if kind == "float" else complex(*map(float.fromhex, content))
    if kind == "device":
        return torch.device(content)
    if kind == "policy":
        return CheckpointPolicy[content]
    for known, class_ in _OF_TORCH:
        if kind == known and isinstance(found := getattr(torch, content, None), class_):
            return found
    raise NotStorable(f"an argument of the kind {kind!r}")


# -- targets -----------------------------------------------------------------------------------------------------------


def trusted_name(target: Any) -> str:
    """The name of what a node calls, if its behavior follows from PyTorch's version and that of this package.

    Raises:
        NotStorable: it is the user's, or another package's, or reads what is not in the graph.
    """
    if isinstance(target, (OpOverload, OpOverloadPacket)):
        name = str(target)
        namespace, _, rest = name.partition(".")
        operator = f"{namespace}::{rest.partition('.')[0]}"
        if namespace == "attnrewrite":
            # By its Python function, where there is one: the namespace is open to all.
            function = custom_op_functions().get(operator)
            is_known = function is not None and is_written_in(function, _OWN)
        else:
            is_known = namespace == "aten" and not defined_in_python(operator)
        if not is_known:
            raise NotStorable(f"the operator {name}, which is not PyTorch's")
        return f"operator:{name}"
    if isinstance(target, HigherOrderOperator):
        if operator_name(target) not in _HIGHER_ORDER:
            raise NotStorable(f"the operator {operator_name(target)}")
        return f"higher_order:{operator_name(target)}"
    module, name = getattr(target, "__module__", None) or "", _name_in_module(target)
    is_known = isinstance(target, BuiltinFunctionType) or target is torch.Size
    is_known = is_known or is_written_in(target, OF_TORCH) or is_written_in(target, _OWN)
    if module.partition(".")[0] not in ("torch", "builtins", "_operator", "math", "attnrewrite") or not name:
        is_known = False
    if not is_known:
        what = getattr(target, "__qualname__", type(target).__name__)
        raise NotStorable(f"a call of {what}, which is not PyTorch's")
    return f"function:{module}:{name}"


_OWN = str(Path(__file__).parents[1]) + os.sep


def _name_in_module(target: Any) -> str:
    """The name under which its module has the target; empty if it has another object there, or none."""
    module = sys.modules.get(getattr(target, "__module__", None) or "")
    for name in (getattr(target, "__qualname__", ""), getattr(target, "__name__", "")):
        found: Any = module
        for part in name.split("."):
            found = getattr(found, part, None)
        if found is target:
            return str(name)
    return ""


_HIGHER_ORDER = ("tag_activation_checkpoint", "flex_attention", "cond", "while_loop", "invoke_subgraph")
"""Those that say all in the graph: ``triton_kernel_wrapper_mutation``, for one, names a kernel by a number that only
its process knows.
"""

_ON_SIZES = (
    *("getitem", "add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "neg", "pos", "abs"),
    *("eq", "ne", "lt", "le", "gt", "ge", "and_", "or_", "not_"),
)
_CALLED = frozenset(
    {
        *(f"function:_operator:{name}" for name in _ON_SIZES),
        *(f"function:math:{name}" for name in ("ceil", "floor", "trunc", "sqrt", "pow", "log", "log2", "exp")),
        *(f"function:torch.amp.autocast_mode:{name}" for name in ("_enter_autocast", "_exit_autocast")),
        *(f"function:torch:sym_{name}" for name in ("float", "int", "ite", "max", "min", "not", "sum")),
        *("function:torch:_sym_sqrt", "function:torch._C:_set_grad_enabled"),
    }
)
"""The functions, beside operators, that rewritten graphs call."""


def _named(name: str) -> Any:
    """The target of that name; only what rewritten graphs call, since a name comes from a file.

    Raises:
        NotStorable: there is none.
    """
    kind, _, path = name.partition(":")
    found: Any = None
    if kind == "operator" and path.partition(".")[0] in ("aten", "attnrewrite") and path.count(".") == 2:
        found = torch.ops
        for part in path.split("."):
            found = getattr(found, part, None)
    elif kind == "higher_order" and path in _HIGHER_ORDER:
        found = getattr(torch.ops.higher_order, path)
    elif name in _CALLED:
        module, _, function = path.rpartition(":")
        found = getattr(importlib.import_module(module), function)
    if found is None or trusted_name(found) != name or (isinstance(found, OpOverload) and not _stays_in_graph(found)):
        raise NotStorable(f"{name} is not called by rewritten graphs")
    return found


def _stays_in_graph(operator: Any) -> bool:
    """Whether an operator reads no file, and writes to no tensor, but by ``copy_``, as graphs update their inputs."""
    schema = schema_of(operator)
    return (not schema.is_mutable or schema.name in _UPDATES) and all(
        part.name != "filename" for part in schema.arguments
    )


_UPDATES = ("aten::copy_",)


def _takes(operator: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether an operator has so many arguments, of those names, and no others that it needs."""
    arguments = schema_of(operator).arguments
    positional = [part for part in arguments if not part.kwarg_only]
    left = {part.name: part for part in [*positional[len(args) :], *(part for part in arguments if part.kwarg_only)]}
    needed = {name for name, part in left.items() if not part.has_default_value()}
    return len(args) <= len(positional) and needed <= kwargs.keys() <= left.keys()


def _name_to_find(target: Any) -> str:
    """The name of a target by which :func:`_named` finds it again.

    Raises:
        NotStorable: it does not.
    """
    name = trusted_name(target)
    if _named(name) is not target:
        raise NotStorable(f"{name} is not found by its name")
    return name


# -- graphs ------------------------------------------------------------------------------------------------------------

_KEPT = ("stack_trace", "custom", "recompute", "ac_graph_id")
"""What is kept of what is noted at a node: where it comes from, and what the partitioner reads."""

_LEFT = frozenset(
    {
        *("val", "example_value", "tensor_meta", "stored", "grapharg", "tensor_dict"),  # Read by the rewriting alone.
        *("nn_module_stack", "source_fn_stack", "torch_fn", "original_aten", "from_node", "seq_nr"),  # Provenance.
        "creation_timestamp",
    }
)


_OPS = ("placeholder", "get_attr", "call_function", "output")

_LARGEST_CONSTANT = 2**16
"""In bytes."""


def encoded_graph(gm: fx.GraphModule) -> dict[str, Any]:
    """A rewritten graph as data, with the graphs and the constants in it.

    Raises:
        NotStorable: it has something that data does not express.
    """
    places = {node: place for place, node in enumerate(gm.graph.nodes)}
    texts: dict[str, int] = {}
    attributes = {str(node.target) for node in gm.graph.find_nodes(op="get_attr")}
    return {
        "class": type(gm).__name__,
        "nodes": [_encoded_node(node, places.__getitem__, texts) for node in places],
        "texts": list(texts),
        "attributes": {name: _encoded_attribute(gm, name) for name in sorted(attributes)},
    }


def _encoded_node(node: fx.Node, place_of: Callable[[fx.Node], int], texts: dict[str, int]) -> list[Any]:
    if node.op not in _OPS:
        raise NotStorable(f"a node of the kind {node.op}")
    unknown = node.meta.keys() - _LEFT - set(_KEPT)
    if unknown:
        raise NotStorable(f"a note {sorted(unknown)[0]!r} at a node")
    target = node.target if isinstance(node.target, str) else _name_to_find(node.target)
    notes = {}
    for key in _KEPT if node.op != "placeholder" else ():
        if node.meta.get(key) is not None:
            noted = node.meta[key]
            is_text = isinstance(noted, str)
            notes[key] = {"text": texts.setdefault(noted, len(texts))} if is_text else encoded(noted, place_of)
    return [node.op, node.name, target, encoded(node.args, place_of), encoded(node.kwargs, place_of), notes]


def _encoded_attribute(gm: fx.GraphModule, name: str) -> dict[str, Any]:
    value = getattr(gm, name, None)
    if isinstance(value, fx.GraphModule):
        return {"graph": encoded_graph(value)}
    if type(value) is not torch.Tensor or value.requires_grad or value.device.type != "cpu":
        raise NotStorable(f"a constant of type {type(value).__name__}")
    if value.layout is not torch.strided or value.numel() * value.element_size() > _LARGEST_CONSTANT:
        raise NotStorable("a large constant")
    return {
        "dtype": str(value.dtype).removeprefix("torch."),
        "shape": list(value.shape),
        "bytes": base64.b64encode(tensor_bytes(value)).decode(),
        "is_buffer": name in dict(gm.named_buffers(recurse=False)),
    }


def decoded_graph(data: Mapping[str, Any], original: fx.GraphModule | None = None) -> fx.GraphModule:
    """The graph that :func:`encoded_graph` wrote.

    Args:
        original: Dynamo's graph, whose inputs it has, with what Dynamo noted at them; None for a graph in a graph.

    Raises:
        NotStorable: the data names what this process does not have.
    """
    graph = fx.Graph()
    inputs = iter(original.graph.find_nodes(op="placeholder") if original is not None else ())
    nodes: list[fx.Node] = []
    for op, name, target, args, kwargs, notes in data["nodes"]:
        called = _named(target) if op == "call_function" else _plain_target(op, target, data["attributes"])
        _require_identifiers([name, *(key for key, _ in kwargs["dict"])])
        given, keywords = _decoded(args, nodes), _decoded(kwargs, nodes)
        if not isinstance(given, tuple) or (isinstance(called, OpOverload) and not _takes(called, given, keywords)):
            raise NotStorable(f"{target} does not take the arguments of {name}")
        node = graph.create_node(op, called, given, keywords, name=name)
        if node.name != name:
            raise NotStorable(f"the name {name} is taken")
        node.meta = {key: _noted(noted, data["texts"], nodes) for key, noted in notes.items()}
        if op == "placeholder" and original is not None:
            source = next(inputs)
            if target != source.target:
                raise NotStorable(f"an input {target} in place of {source.target}")
            copy_attributes(source, node)
            node.meta = {**source.meta}
        nodes.append(node)
    _require_ends(nodes, inputs, original)
    graph.lint()
    attributes = {name: _decoded_attribute(value) for name, value in data["attributes"].items()}
    _require_identifiers([data["class"], *attributes])
    gm = fx.GraphModule(attributes, graph, data["class"])
    for name, value in attributes.items():
        if isinstance(value, torch.Tensor) and not data["attributes"][name]["is_buffer"]:
            # As capture leaves constants.
            delattr(gm, name)
            gm.__dict__[name] = value
    if original is not None:
        copy_attributes(original, gm)
        gm.meta = original.meta
    return gm


def _require_ends(nodes: Sequence[fx.Node], left: Iterator[fx.Node], original: fx.GraphModule | None) -> None:
    """
    Raises:
        NotStorable: the graph has other inputs or another number of outputs than Dynamo's; ``left`` gives the inputs of
            that which were not met.
    """
    if not nodes or nodes[-1].op != "output":
        raise NotStorable("a graph without an output")
    if original is not None:
        results: Any = nodes[-1].args[0]
        (end,) = original.graph.find_nodes(op="output")
        expected: Any = end.args[0]
        alike = isinstance(results, (list, tuple)) and isinstance(expected, (list, tuple))
        if not alike or len(results) != len(expected) or next(left, None) is not None:
            raise NotStorable("other inputs or outputs than the source's")


def _plain_target(op: str, target: Any, attributes: Mapping[str, Any]) -> str:
    """
    Raises:
        NotStorable: a node is of a kind that is not stored, or its target is no name: fx writes it into code that runs.
    """
    if op not in _OPS or (op == "get_attr" and target not in attributes):
        raise NotStorable(f"a node of the kind {op}")
    _require_identifiers([target])
    return str(target)


def _require_identifiers(names: Sequence[Any]) -> None:
    for name in names:
        if not isinstance(name, str) or not name.isidentifier() or keyword.iskeyword(name):
            raise NotStorable(f"{name!r} is no name")


def _noted(noted: Any, texts: Sequence[str], nodes: Sequence[fx.Node]) -> Any:
    return texts[noted["text"]] if isinstance(noted, dict) and "text" in noted else _decoded(noted, nodes)


def _decoded_attribute(data: Mapping[str, Any]) -> Any:
    if "graph" in data:
        return decoded_graph(data["graph"])
    dtype = getattr(torch, data["dtype"], None)
    if not isinstance(dtype, torch.dtype):
        raise NotStorable(f"a constant of the dtype {data['dtype']!r}")
    if not math.prod(data["shape"]):
        return torch.empty(data["shape"], dtype=dtype)
    return torch.frombuffer(bytearray(base64.b64decode(data["bytes"])), dtype=dtype).reshape(data["shape"])
