"""Indexing by a constant that repeats a slice: ``key[:, [0] * frames]``, ``index_select``, ``gather``.

Such an index counts ``start, start + step, ...`` over ``count`` entries, repeats each of them ``inner`` times in a row,
and the whole sequence ``outer`` times. The dimension of the result is (outer, own, inner), and the source lacks the
first and the last of these axes. With a ``count`` of one, it is a selection that is broadcast.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from attnrewrite.analysis.values import constant_value
from attnrewrite.ir.axes import Layout, axes_of, take_minor
from attnrewrite.ir.bounds import INDEX_ENTRIES
from attnrewrite.ir.nodes import Size, is_tensor, product, same_shape, tensor
from attnrewrite.ir.ops import CAST_OPS, EMPTY_OPS, is_pure
from attnrewrite.ir.stored import StoredPattern
from attnrewrite.torch_private import schema_of, unset_fake_temporarily

__all__ = ["Repetition", "repetition_of"]

aten = torch.ops.aten

_ROW_BY_ROW = (aten.gather.default, aten.take_along_dim.default)

_INDEXING = frozenset({aten.index.Tensor, aten.index_select.default, *_ROW_BY_ROW})


@dataclass(frozen=True)
class Repetition:
    """A node that repeats ``source[start : start + step * count : step]`` along ``dim``.

    Attributes:
        source: the tensor that is indexed.
        dim: its dimension that is indexed.
        rank: the number of dimensions of the index, which replace ``dim`` in the node.
        start, step, count: the slice.
        inner: how often each entry is repeated in a row.
        outer: how often the whole sequence is repeated.
    """

    source: fx.Node
    dim: int
    rank: int
    start: Size
    step: int
    count: Size
    inner: Size
    outer: Size

    def pulled(self, layout: Layout) -> Layout | None:
        """The layout of the slice, given that of the node; None if no layout expresses it."""
        axes = list(axes_of(layout[self.dim : self.dim + self.rank]))
        if take_minor(axes, self.inner) is None:
            return None
        own = take_minor(axes, self.count)
        return None if own is None else (*layout[: self.dim], own, *layout[self.dim + self.rank :])


def repetition_of(node: fx.Node) -> Repetition | None:
    """The slice that ``node`` repeats by a constant index; None if it is not such a node, or the index repeats nothing.

    Adds no guard: all entries of the index must be known to be in range for every size.
    """
    indexed = _indexed(node)
    if indexed is None:
        return None
    source, dim, index = indexed
    size, shape = tensor(source).shape[dim], tensor(index).shape
    number = constant_value(index)
    if node.target in _ROW_BY_ROW:
        # Each row has its own entries of the index, so only a single number is read.
        (_, *others), (mine, *rest) = _dim_first(dim, tensor(source).shape), _dim_first(dim, tensor(node).shape)
        if number is None:
            number = _only_entry(index)
        if number is None or not same_shape(others, rest):
            return None
        start = _nonnegative(int(number), size)
        return None if start is None else Repetition(source, dim, 1, start, 1, 1, mine, 1)
    if number is not None:
        start = _nonnegative(int(number), size)
        return None if start is None else Repetition(source, dim, len(shape), start, 1, 1, product(shape), 1)
    entries = _entries(index)
    found = None if entries is None else _counted(entries, size)
    if found is None:
        return None
    start, step, count, inner, outer = found
    return Repetition(source, dim, len(shape), start, step, count, inner, outer)


def _dim_first(dim: int, shape: Sequence[Size]) -> list[Size]:
    """The sizes of ``shape``, that of ``dim`` first."""
    return [shape[dim], *shape[:dim], *shape[dim + 1 :]]


def _indexed(node: fx.Node) -> tuple[fx.Node, int, fx.Node] | None:
    """(source, dim, index) of a node that indexes one dimension by a tensor of integers; None for any other node."""
    args: Any = node.args
    if node.target not in _INDEXING or not args or not is_tensor(args[0]) or not is_tensor(node):
        return None
    rank = tensor(args[0]).dim()
    if node.target is aten.index.Tensor:
        given = [(dim, index) for dim, index in enumerate(args[1]) if index is not None]
        if len(given) != 1:
            return None
        dim, index = given[0]
    elif node.target in (aten.index_select.default, aten.gather.default) and rank:
        dim, index = args[1] % rank, args[2]
    elif node.target is aten.take_along_dim.default and rank and len(args) > 2 and args[2] is not None:
        dim, index = args[2] % rank, args[1]
    else:
        return None
    # A boolean or uint8 index is a mask.
    if not is_tensor(index) or tensor(index).dtype not in (torch.int64, torch.int32) or tensor(index).dim() == 0:
        return None
    return args[0], dim, index


def _nonnegative(entry: int, size: Size) -> Size | None:
    """``entry`` as a nonnegative index; None if it may be out of range."""
    if entry >= 0:
        return entry if statically_known_true(size > entry) else None
    return size + entry if statically_known_true(size + entry >= 0) else None


def _counted(entries: Sequence[int], size: Size) -> tuple[Size, int, int, int, int] | None:
    """(start, step, count, inner, outer) of entries that count up and repeat; None for any others."""
    start = _nonnegative(entries[0], size)
    if isinstance(size, int):
        entries = [entry + size if entry < 0 else entry for entry in entries]
    if len(set(entries)) == 1:
        return None if start is None else (start, 1, 1, len(entries), 1)
    first = entries[0]
    inner = next(place for place, entry in enumerate(entries) if entry != first)
    step = entries[inner] - first
    top = max(entries)
    if step < 1 or min(entries) != first or (top - first) % step or first < 0:
        return None
    count = (top - first) // step + 1
    outer = len(entries) // (count * inner)
    own = [first + step * place for place in range(count) for _ in range(inner)]
    if inner * outer == 1 or own * outer != list(entries) or not statically_known_true(size > top):
        return None
    return first, step, count, inner, outer


# The entries of a constant index.


def _only_entry(index: fx.Node) -> int | None:
    entries = _entries(index)
    return entries[0] if entries and len(set(entries)) == 1 else None


def _entries(index: fx.Node) -> list[int] | None:
    value = _evaluated(index, {})
    return None if value is None or not value.numel() else value.flatten().tolist()


def _evaluated(node: fx.Node, memo: dict[fx.Node, torch.Tensor | None]) -> torch.Tensor | None:
    """The value of ``node`` if it is computed from constants of the graph only; else None."""
    if node not in memo:
        memo[node] = None
        if _is_small(node):
            memo[node] = _stored(node) if node.op != "call_function" else _evaluated_call(node, memo)
    return memo[node]


def _is_small(node: fx.Node) -> bool:
    """Whether a tensor has few enough entries, of known number, to be evaluated."""
    if not is_tensor(node):
        return False
    shape = tensor(node).shape
    if tensor(node).dtype.is_complex or not all(isinstance(size, int) for size in shape):
        return False
    entries = product(shape)
    if entries > INDEX_ENTRIES.most and _is_made_of_constants(node):
        INDEX_ENTRIES.reached()
    return bool(entries <= INDEX_ENTRIES.most)


def _is_made_of_constants(node: fx.Node) -> bool:
    pending, seen = [node], {node}
    for each in pending:
        if each.op == "placeholder" and not isinstance(each.meta.get("stored"), StoredPattern):
            return False
        pending += [source for source in each.all_input_nodes if source not in seen]
        seen.update(each.all_input_nodes)
    return True


def _stored(node: fx.Node) -> torch.Tensor | None:
    """The value of a buffer that holds one number or a range, which a guard of the graph checks; else None."""
    stored = node.meta.get("stored")
    if not isinstance(stored, StoredPattern) or stored.tensor.dtype is not tensor(node).dtype:
        return None
    if stored.tensor.dtype not in (torch.int64, torch.int32) or stored.tensor.shape != tensor(node).shape:
        return None
    pattern = stored.pattern
    if isinstance(pattern, range):
        return torch.tensor(list(pattern), dtype=stored.tensor.dtype).view(stored.tensor.shape)
    if isinstance(pattern, float):
        return torch.full(stored.tensor.shape, int(pattern), dtype=stored.tensor.dtype)
    return None


def _evaluated_call(node: fx.Node, memo: dict[fx.Node, torch.Tensor | None]) -> torch.Tensor | None:
    """The value of a call of constants; None if it is random, mutates, or has other arguments."""
    if node.target is aten.lift_fresh_copy.default:
        return _literal(node.all_input_nodes[0])
    if node.target in CAST_OPS:
        # The device does not matter here, only the dtype.
        source = _evaluated(node.all_input_nodes[0], memo)
        return None if source is None else source.to(tensor(node).dtype)
    target: Any = node.target
    if not is_pure(node) or len(schema_of(target).returns) != 1:
        return None
    if node.target in EMPTY_OPS:
        return None
    inputs = {source: _evaluated(source, memo) for source in node.all_input_nodes}
    if any(value is None for value in inputs.values()):
        return None
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), inputs.__getitem__)
    if "device" in kwargs:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    with unset_fake_temporarily(), torch.no_grad():
        value = target(*args, **kwargs)
    return value if isinstance(value, torch.Tensor) and value.device.type == "cpu" else None


def _literal(node: fx.Node) -> torch.Tensor | None:
    """The value of a constant that ``torch.tensor([0, 0])``, or a list as an index, left in the graph; else None."""
    owner = node.graph.owning_module
    value = vars(owner).get(str(node.target)) if node.op == "get_attr" and owner is not None else None
    if type(value) is not torch.Tensor or value.is_floating_point() or value.numel() > INDEX_ENTRIES.most:
        return None
    with unset_fake_temporarily():
        return value.detach().cpu()
