"""The identity of a graph's computation, by which an attention is known again in other graphs.

A model's graphs may change from one call to the next: a layer is left out, a flag selects another part of a tensor,
Dynamo makes a size dynamic. A stored value belongs to an attention at the same place of the same computation. Sizes are
kept apart, since FasterCache's calls with one half of the batch are the same computation.
"""

from __future__ import annotations

import hashlib
import operator
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from attnrewrite.capture import constants
from attnrewrite.ir.nodes import Size, is_tensor, tensor
from attnrewrite.ir.ops import COPY_OPS, RESHAPE_OPS
from attnrewrite.ir.source import parameter_path, source_name
from attnrewrite.torch_private import OpOverload, schema_of

__all__ = ["Identity", "content_of", "fits", "identity_of", "is_copy", "is_size", "written"]

aten = torch.ops.aten

_SIZES = frozenset({"shape", "size", "sizes", "split_size", "split_sizes", "end", "length", "output_size", "repeats"})
"""Arguments of ATen operators that say how large a result is, and not what it is computed from."""

_POSITIONS = frozenset({"start", "index", "shifts"})
"""Arguments that say which part is read. They count as sizes: Dynamo may make a variable of any of them."""

_INDEXED = (
    aten.index.Tensor,
    aten.index_select.default,
    aten.gather.default,
    aten.take.default,
    aten.take_along_dim.default,
    aten.embedding.default,
)

_FOLLOWING = frozenset({"shape", "size", "sizes"})
"""Arguments that follow the sizes of the tensors that are computed with, and choose no part of any."""

_SYMBOLIC = (torch.SymInt, torch.SymFloat, torch.SymBool)

_LEFT_OUT, _COUNTED = "#", "?"


class Identity(NamedTuple):
    """A graph's computation.

    Attributes:
        fingerprint: of its operators and what each of them reads; without sizes and numbers.
        sizes: those that the fingerprint leaves out, in order.
        data_sizes: the symbols of sizes that are data (how many elements a mask selects), and choose no part of a
            tensor. They need no number.
    """

    fingerprint: str
    sizes: tuple[Size, ...]
    data_sizes: frozenset[Any] = frozenset()


def identity_of(gm: fx.GraphModule) -> Identity:
    """The identity of an IR graph as it was captured, which does not depend on the kernels that are chosen later."""
    names: dict[fx.Node, str] = {}
    sizes: list[Size] = []
    text = hashlib.sha256()
    count = 0
    indices = _index_numbers(gm)
    for node in gm.graph.nodes:
        if node.op == "output" or not _gives_tensors(node):
            continue
        if is_copy(node):
            names[node] = names[node.all_input_nodes[0]]
        elif node.op == "call_function":
            text.update(f"{written(node, names, sizes, numbers=False, chooses=node in indices)}\n".encode())
            count += 1
            names[node] = f"v{count}"
        elif node.op == "get_attr":
            names[node] = content_of(gm, node)
        else:
            # The order of the inputs differs from graph to graph; their names do not.
            names[node] = source_name(node) or str(node.target)
    given = [node for node in gm.graph.nodes if node.op == "placeholder" and is_tensor(node)]
    for node in sorted(given, key=names.__getitem__):
        # Of what the model holds, such as a memory of keys, no argument shows the size.
        sizes += [] if parameter_path(node) else list(tensor(node).shape)
    return Identity(text.hexdigest(), tuple(sizes), _data_sizes(gm))


def written(
    node: fx.Node, names: dict[fx.Node, str], sizes: list[Size], *, numbers: bool, chooses: bool = False
) -> str:
    """A call as text, in which sizes are left out.

    Args:
        names: of the nodes that it reads; others are left out.
        sizes: receives the sizes that are left out, and the numbers that say which part is read.
        numbers: whether scalars are in the text. The value depends on them; which attention it is does not.
        chooses: whether the result is an index into another tensor, so that its whole numbers say which part is read.
    """
    # Whether a reshaped tensor is copied first depends on its sizes.
    text = [str(aten.view.default if node.target in RESHAPE_OPS else node.target)]
    for name, kind, value in _arguments(node):
        scalar = isinstance(_size(value), (int, float, torch.SymInt, torch.SymFloat, torch.SymBool))
        is_number = kind is not None and scalar and any(each in kind for each in ("number", "float", "Tensor"))
        is_part = name in _SIZES or name in _POSITIONS or (chooses and scalar)
        if isinstance(node.target, OpOverload) and is_part and _are_sizes(value):
            sizes += [_size(each) for each in _flat(value) if each is not None]
        elif numbers or chooses or not is_number:
            # A number's text shows its expression; any other symbol is known by what it is in a call alone.
            text.append(f"{name}={str(_size(value)) if is_number and not chooses else _text(value, names, sizes)}")
    return " ".join(text)


def _data_sizes(gm: fx.GraphModule) -> frozenset[Any]:
    """See :attr:`Identity.data_sizes`. A number that the graph reads from a tensor (``.item()``) is none."""
    sizes: set[Any] = set()
    others: set[Any] = set()
    for node in gm.graph.nodes:
        if is_tensor(node):
            sizes |= free_unbacked_symbols(tensor(node).shape) - others
        elif is_size(node):
            others |= free_unbacked_symbols(node.meta["val"]) - sizes
        if node.op != "call_function" or not _gives_tensors(node):
            continue
        for name, _, value in _arguments(node):
            if name in _FOLLOWING or (name == "end" and node.target is not aten.slice.Tensor):
                continue
            for each in map(_size, _flat(value)):
                others |= free_unbacked_symbols(each) if isinstance(each, _SYMBOLIC) else set()
    return frozenset(sizes - others)


def _are_sizes(value: Any) -> bool:
    """Whether these are whole numbers, or computed from whole numbers by the graph."""
    return all(each is None or isinstance(_size(each), (int, torch.SymInt, torch.SymFloat)) for each in _flat(value))


def _index_numbers(gm: fx.GraphModule) -> set[fx.Node]:
    """The nodes that compute an index into data from numbers.

    An index into parameters alone does not count, such as a timestep that selects an embedding.
    """
    given: set[fx.Node] = set()
    data: set[fx.Node] = set()
    found: set[fx.Node] = set()
    for node in gm.graph.nodes:
        if node.op == "placeholder":
            if is_tensor(node):
                given.add(node)
                if not parameter_path(node):
                    data.add(node)
            continue
        given.update([node] if any(each in given for each in node.all_input_nodes) else [])
        data.update([node] if any(each in data for each in node.all_input_nodes) else [])
        if node.target not in _INDEXED or node.args[0] not in data:
            continue
        queue = [each for each in node.all_input_nodes if each is not node.args[0]]
        while queue:
            current = queue.pop()
            is_index = is_tensor(current) and not tensor(current).dtype.is_floating_point
            if current not in found and current.op == "call_function" and (is_index or current not in given):
                found.add(current)
                queue.extend(current.all_input_nodes)
    return found


def content_of(gm: fx.GraphModule, node: fx.Node) -> str:
    """A tensor, or the body of an operator, that the graph holds itself, as a hash: its name may be another's."""
    value: Any = operator.attrgetter(str(node.target))(gm)
    if isinstance(value, fx.GraphModule):
        body = identity_of(value)
        return f"{body.fingerprint} {body.sizes}"
    content = constants.content_of(value) if isinstance(value, torch.Tensor) else None
    return content or str(node.target)


def fits(stored: Sequence[Any], wanted: Sequence[Any], *, halved: bool) -> bool:
    """Whether ``wanted`` are the sizes that a value was stored with; with ``halved``, each may be half of that."""
    if not halved:
        return stored == wanted
    return len(stored) == len(wanted) and all(
        one == other or (isinstance(one, int) and one == 2 * other) for one, other in zip(stored, wanted, strict=True)
    )


def is_copy(node: fx.Node) -> bool:
    """Whether the node equals its argument, at most copied. A graph with static sizes has fewer of these."""
    if node.target is aten.slice.Tensor:
        bounds = {name: value for name, _, value in _arguments(node)}
        whole = bounds.get("start") in (0, None) and bounds.get("end") in (sys.maxsize, None)
        return whole and bounds.get("step", 1) == 1
    return node.target in COPY_OPS


def is_size(node: fx.Node) -> bool:
    """Whether the node is a number that the graph computes with."""
    return isinstance(node.meta.get("val"), _SYMBOLIC)


def _arguments(node: fx.Node) -> Iterator[tuple[str, str | None, Any]]:
    """The name, type and value of each argument, in the order of the operator's schema; types are None without one."""
    if not isinstance(node.target, OpOverload):
        yield from ((str(number), None, value) for number, value in enumerate(node.args))
        yield from ((name, None, value) for name, value in node.kwargs.items())
        return
    for number, argument in enumerate(schema_of(node.target).arguments):
        if number < len(node.args):
            yield argument.name, str(argument.type), node.args[number]
        elif argument.name in node.kwargs:
            yield argument.name, str(argument.type), node.kwargs[argument.name]


def _text(value: Any, names: dict[fx.Node, str], sizes: list[Size]) -> str:
    """An argument as text. ``sizes`` receives what is symbolic in it, whichever argument it is."""
    if isinstance(_size(value), _SYMBOLIC):
        sizes.append(_size(value))
        return _COUNTED
    if isinstance(value, fx.Node):
        return names.get(value, _LEFT_OUT)
    if isinstance(value, (list, tuple)):
        return f"[{','.join(_text(each, names, sizes) for each in value)}]"
    if isinstance(value, dict):
        return f"{{{','.join(f'{key!r}:{_text(each, names, sizes)}' for key, each in value.items())}}}"
    if isinstance(value, slice):
        return ":".join(_text(each, names, sizes) for each in (value.start, value.stop, value.step))
    return repr(value)


def _size(value: Any) -> Any:
    return value.meta.get("val") if isinstance(value, fx.Node) else value


def _flat(value: Any) -> Iterator[Any]:
    if isinstance(value, (list, tuple)):
        for each in value:
            yield from _flat(each)
    else:
        yield value


def _gives_tensors(node: fx.Node) -> bool:
    if node.op in ("placeholder", "get_attr") or is_tensor(node):
        return not is_size(node)
    return isinstance(node.meta.get("val"), (tuple, list)) or any(
        user.target is operator.getitem for user in node.users
    )
