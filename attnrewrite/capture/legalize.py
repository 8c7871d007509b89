"""Legalization: replaces calls that functional tracing refuses by equivalent ones.

``x.fill_diagonal_(value)`` is traced as ``as_strided``, and updates through ``as_strided`` cannot be made functional,
so no backend built on AOTAutograd compiles it. ``x.diagonal().fill_(value)`` writes the same entries.

``torch.einsum`` returns a permuted view of the matrix that it computed. An update in place is replayed on that matrix,
and where the dimensions do not fold back into it ("Cannot view a tensor with shape ..."), no such backend compiles it
either. A copy of the result has no matrix behind it; nobody else can have the result, so nobody sees the copy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from attnrewrite.capture.support import has_storage, storage_of, updated_in_place
from attnrewrite.capture.vmap import holds_vmap
from attnrewrite.ir.nodes import copy_attributes, same

__all__ = ["legalized", "with_data_detached"]


def legalized(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy of ``gm`` with such calls replaced; ``gm`` itself if it has none.

    Args:
        gm: a graph made by Dynamo. It is not changed.
    """
    # Within vmap a node's value has one more dimension than the call sees.
    return gm if holds_vmap(gm) else _replaced(gm) or gm


def with_data_detached(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy of ``gm`` with ``x.detach()`` in place of ``x.data``; ``gm`` itself if it has none.

    ``x.data`` is traced as ``x`` itself, so that gradients would flow through it. It is for tracing alone: an update of
    ``x.data`` is hidden from autograd's version counter, and one of ``x.detach()`` is not.

    Args:
        gm: a graph made by Dynamo. It is not changed.
    """
    return _replaced(gm, data=True) or gm


def _replaced(gm: fx.GraphModule, data: bool = False) -> fx.GraphModule | None:
    """The copy with the calls replaced, or with ``data`` the attribute alone; None if there are none."""
    children = {
        name: copy
        for name, child in gm.named_children()
        if isinstance(child, fx.GraphModule) and (copy := _replaced(child, data)) is not None
    }
    calls = set() if data else {node for node in gm.graph.nodes if _fills_diagonal(node)}
    read = {node for node in gm.graph.nodes if data and getattr(node.target, "__name__", "") == "_get_data_attr"}
    updated = set() if data else _updated_products(gm.graph)
    made = set() if data else {node for node in gm.graph.nodes if _is_made_by_type(node)}
    if not calls and not updated and not children and not read and not made:
        return None
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in gm.graph.nodes:
        if node in calls:
            copies[node] = _with_diagonal(graph, node, copies.__getitem__)
        elif node in read:
            copies[node] = graph.call_method("detach", (copies[node.args[0]],))
            copies[node].meta = {**node.meta}
            copy_attributes(node, copies[node])
        elif node in made:
            copies[node] = _made_by_function(graph, node, copies.__getitem__)
        else:
            copies[node] = graph.node_copy(node, copies.__getitem__)
            copy_attributes(node, copies[node])
        if node in updated:
            copies[node] = _copied(graph, node, copies[node])
    copy = fx.GraphModule(gm, graph, gm.__class__.__name__)
    for name, child in children.items():
        setattr(copy, name, child)
    copy_attributes(gm, copy)
    copy.meta = gm.meta
    return copy


_TYPES = type(torch.FloatTensor)


def _is_made_by_type(node: fx.Node) -> bool:
    """Whether the node calls a type of tensors with numbers, or with the sizes of a tensor without any."""
    if node.op != "call_function" or not (node.target is torch.Tensor or isinstance(node.target, _TYPES)):
        return False
    if node.kwargs or not isinstance(node.meta.get("example_value"), torch.Tensor):
        return False
    if len(node.args) == 1 and isinstance(node.args[0], (list, tuple)):
        # A torch.Size is sizes, and no numbers.
        return not isinstance(node.args[0], torch.Size) and all(map(_is_number, _entries(node.args[0])))
    return all(map(_is_number, node.args))


def _entries(numbers: Any) -> Iterator[Any]:
    for number in numbers:
        yield from _entries(number) if isinstance(number, (list, tuple)) else [number]


def _is_number(value: Any) -> bool:
    if isinstance(value, fx.Node):
        value = value.meta.get("example_value")
    return isinstance(value, (bool, int, float, torch.SymInt, torch.SymFloat))


def _made_by_function(graph: fx.Graph, node: fx.Node, copied: Callable[[fx.Node], fx.Node]) -> fx.Node:
    """Adds the call of ``torch.tensor``, or of ``torch.empty`` where sizes are given."""
    value = node.meta["example_value"]
    given = fx.node.map_arg(node.args, copied)
    numbers = len(given) == 1 and isinstance(given[0], (list, tuple))
    options = {"dtype": value.dtype, "device": value.device}
    # Without any argument there are no entries.
    arguments = given if numbers else (list(given) or [0],)
    call = graph.call_function(torch.tensor if numbers else torch.empty, arguments, options)
    call.meta = {**node.meta}
    copy_attributes(node, call)
    return call


_FILL_DIAGONAL = frozenset(
    {torch.Tensor.fill_diagonal_, torch.ops.aten.fill_diagonal_, torch.ops.aten.fill_diagonal_.default}
)


def _fills_diagonal(node: fx.Node) -> bool:
    """Whether the node calls ``fill_diagonal_`` in a way that can be replaced."""
    is_call = node.op == "call_function" and node.target in _FILL_DIAGONAL
    if not is_call and not (node.op == "call_method" and node.target == "fill_diagonal_"):
        return False
    _, number, wraps = _arguments(node)
    value = node.args[0].meta.get("example_value") if isinstance(node.args[0], fx.Node) else None
    if not isinstance(value, torch.Tensor) or not isinstance(number, (bool, int, float)):
        return False
    if value.dim() < 2:
        return False
    if value.dim() > 2:
        # With unequal sides, eager raises an error.
        return all(same(size, value.shape[0]) for size in value.shape)
    # With wrap=True the diagonal continues below the square, which only a tall matrix has.
    return wraps is False or (wraps is True and statically_known_true(value.shape[0] <= value.shape[1] + 1))


def _updated_products(graph: fx.Graph) -> set[fx.Node]:
    """The calls of ``einsum`` whose result, or a view of it, is updated in place.

    Of a single operand the result may be a view, whose update is meant for the operand.
    """
    calls = [node for node in graph.nodes if node.target in _EINSUM and len(_operands_of_einsum(node)) > 1]
    if not calls:
        return set()
    updated = _storages(argument for node in graph.nodes for argument in updated_in_place(node))
    return {node for node in calls if _storages([node]) & updated}


_WHERE = ("stack_trace", "nn_module_stack", "source_fn_stack")
"""Entries of ``meta`` that say which part of the source a node is."""

_EINSUM = frozenset({torch.einsum, torch.functional.einsum})


def _operands_of_einsum(node: fx.Node) -> Sequence[Any]:
    given: Any = node.args[1:]
    operands: Sequence[Any] = given[0] if len(given) == 1 and isinstance(given[0], (list, tuple)) else given
    return operands


def _storages(nodes: Iterable[Any]) -> set[Any]:
    """What tells apart the memory of the nodes that are tensors."""
    examples = (node.meta.get("example_value") for node in nodes if isinstance(node, fx.Node))
    return {storage_of(example) for example in examples if isinstance(example, torch.Tensor) and has_storage(example)}


def _copied(graph: fx.Graph, node: fx.Node, result: fx.Node) -> fx.Node:
    copied = graph.call_method("clone", (result,))
    copied.meta = {key: value for key, value in node.meta.items() if key in _WHERE}
    return copied


def _arguments(node: fx.Node) -> tuple[Any, Any, Any]:
    given = dict(zip(("self", "fill_value", "wrap"), node.args, strict=False), **node.kwargs)
    return given.get("self"), given.get("fill_value"), given.get("wrap", False)


def _with_diagonal(graph: fx.Graph, node: fx.Node, copied: Callable[[fx.Node], fx.Node]) -> fx.Node:
    """Adds the nodes that fill the main diagonal of a tensor of any rank, and returns the tensor, as the call does."""
    source, number, _ = _arguments(node)
    diagonal = copied(source)
    meta = {key: value for key, value in node.meta.items() if key in _WHERE}
    steps: list[fx.Node] = []
    for _ in range(source.meta["example_value"].dim() - 1):
        # Dimension 0 and the last, which is the diagonal of the step before.
        diagonal = graph.call_method("diagonal", (diagonal, 0, 0, -1))
        steps.append(diagonal)
    steps.append(graph.call_method("fill_", (diagonal, number)))
    for step in steps:
        step.meta.update(meta)
    return copied(source)
