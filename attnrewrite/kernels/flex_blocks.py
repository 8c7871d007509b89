"""Which blocks of keys FlexAttention skips, masks, or takes whole, computed in the graph.

FlexAttention goes over the scores in blocks of 128 queries and 128 keys. A block whose keys are all masked is skipped,
and a block that is kept as a whole needs no mask.

Source: ``BlockMask`` in https://github.com/pytorch/pytorch/blob/v2.13.0/torch/nn/attention/flex_attention.py
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from attnrewrite.ir.axes import size_of
from attnrewrite.ir.builder import Builder
from attnrewrite.ir.nodes import Size, same, tensor
from attnrewrite.ir.site import CanonicalAttention
from attnrewrite.kernels.common.layout import padded_to
from attnrewrite.kernels.common.limits import Asked
from attnrewrite.kernels.common.memory import stored

__all__ = [
    "BLOCK",
    "Blocks",
    "blocks_of_band",
    "blocks_of_isolated",
    "blocks_of_mask",
    "entry_at",
    "placeholders_first",
    "whole_block",
]

aten = torch.ops.aten

BLOCK = 128
"""Queries and keys of a block, FlexAttention's own default."""


@dataclass(frozen=True)
class Blocks:
    """The fields of a ``BlockMask`` as nodes.

    Attributes:
        tables: by the names of ``BlockMask``'s attributes.
        lengths: of queries and keys.
        block: (queries, keys) of a block.
        mask_mod: ``mask_mod(batch, head, query, key, *buffers)``, for blocks that are kept in part.
        buffers: what ``mask_mod`` reads.
    """

    tables: dict[str, fx.Node]
    lengths: tuple[Size, Size]
    block: tuple[int, int]
    mask_mod: fx.GraphModule
    buffers: tuple[fx.Node, ...] = ()

    def as_argument(self, builder: Builder) -> tuple[Any, ...]:
        """The block mask as the operator takes it, in the order of the installed version of PyTorch."""
        from torch.nn.attention.flex_attention import BlockMask, noop_mask

        # Stand-ins, which say where PyTorch puts what.
        stand_ins = {name: torch.empty((1,) * (4 if name.endswith("indices") else 3)) for name in _TABLES}
        kept = {name: stand_in for name, stand_in in stand_ins.items() if name in self.tables}
        all_tables: dict[str, Any] = {name: kept.get(name) for name in _TABLES}
        probe = BlockMask(seq_lengths=(1, 1), **all_tables, BLOCK_SIZE=self.block, mask_mod=noop_mask)
        _, _, *fields, _ = probe.as_tuple()
        found = {id(stand_in): self.tables[name] for name, stand_in in kept.items()}
        mask_mod = builder.submodule("mask_mod", self.mask_mod)
        return (*self.lengths, *(found.get(id(field), field) for field in fields), mask_mod)


_TABLES = (
    "kv_num_blocks",
    "kv_indices",
    "full_kv_num_blocks",
    "full_kv_indices",
    "q_num_blocks",
    "q_indices",
    "full_q_num_blocks",
    "full_q_indices",
)


def whole_block(builder: Builder, device: torch.device) -> Blocks:
    """One block that holds everything, which ``flex_attention`` passes on where no block mask is given."""
    kind: Any = {"dtype": torch.int32, "device": device}
    tables = {
        "kv_num_blocks": builder.call(aten.full.default, [1, 1, 1], 1, **kind),
        "kv_indices": builder.call(aten.full.default, [1, 1, 1, 1], 0, **kind),
        "q_num_blocks": builder.call(aten.full.default, [1, 1, 1], 1, **kind),
        "q_indices": builder.call(aten.full.default, [1, 1, 1, 1], 0, **kind),
    }
    graph = _mask_graph()
    always: Any = {"dtype": torch.bool, "device": device}
    graph.output(graph.call_function(aten.full.default, ([], True), always))
    return Blocks(tables, (1, 1), (1 << 30, 1 << 30), fx.GraphModule(torch.nn.Module(), graph))


def blocks_of_mask(builder: Builder, site: CanonicalAttention, keep: fx.Node) -> Blocks:
    """The blocks of a tensor.

    Args:
        keep: (batch or 1, heads or 1, queries or 1, keys) bool, true to keep.
    """
    queries, keys = size_of(site.query_axes), size_of(site.key_axes)
    padded = padded_to(builder, keep, -1, BLOCK)
    batch, heads, rows, columns = tensor(padded).shape
    every_query = same(rows, 1) and not same(queries, 1)
    if every_query:
        parts = builder.call(aten.reshape.default, padded, [batch, heads, 1, columns // BLOCK, BLOCK])
        counts = builder.call(aten.sum.dim_IntList, parts, [-1], dtype=torch.int32)
    else:
        padded = padded_to(builder, padded, -2, BLOCK)
        rows = tensor(padded).shape[-2]
        shape = [batch, heads, rows // BLOCK, BLOCK, columns // BLOCK, BLOCK]
        parts = builder.call(aten.reshape.default, padded, shape)
        counts = builder.call(aten.sum.dim_IntList, parts, [-3, -1], dtype=torch.int32)
    whole = BLOCK if every_query else BLOCK * BLOCK
    full = builder.call(aten.eq.Scalar, counts, whole)
    some = builder.call(aten.gt.Scalar, counts, 0)
    partial = builder.call(aten.logical_and.default, some, builder.call(aten.logical_not.default, full))
    tables = _tables(builder, site, partial, full, _blocks(queries) if every_query else None)
    own = [place for place, size in enumerate(tensor(keep).shape) if not same(size, 1)]
    (buffer,) = stored(
        builder, [builder.call(aten.reshape.default, keep, [tensor(keep).shape[place] for place in own])]
    )
    return Blocks(tables, (queries, keys), (BLOCK, BLOCK), _reading(own), (buffer,))


def blocks_of_band(builder: Builder, site: CanonicalAttention, asked: Asked) -> Blocks:
    """The blocks around the diagonal, from their positions alone."""
    queries, keys = size_of(site.query_axes), size_of(site.key_axes)
    shift = keys - queries if asked.from_last else 0
    int64: Any = {"dtype": torch.int64, "device": site.device}
    call = builder.call
    rows, columns = _first_positions(builder, site)
    # How far the first key of a block stands behind its first query's own position, and the same of others.
    ahead = call(aten.sub.Tensor, columns, call(aten.add.Scalar, rows, shift))
    inside = [call(aten.le.Scalar, part, size - BLOCK) for part, size in ((rows, queries), (columns, keys))]
    full = call(aten.logical_and.default, *inside)
    some = call(aten.ge.Scalar, columns, 0)
    if asked.right >= 0:
        last_row = call(aten.clamp.default, call(aten.add.Scalar, rows, BLOCK - 1), None, queries - 1)
        least = call(aten.sub.Tensor, columns, call(aten.add.Scalar, last_row, shift))
        some = call(aten.logical_and.default, some, call(aten.le.Scalar, least, asked.right))
        full = call(aten.logical_and.default, full, call(aten.le.Scalar, ahead, asked.right - BLOCK + 1))
    if asked.left >= 0:
        last_column = call(aten.clamp.default, call(aten.add.Scalar, columns, BLOCK - 1), None, keys - 1)
        most = call(aten.sub.Tensor, last_column, call(aten.add.Scalar, rows, shift))
        some = call(aten.logical_and.default, some, call(aten.ge.Scalar, most, -asked.left))
        full = call(aten.logical_and.default, full, call(aten.ge.Scalar, ahead, -asked.left + BLOCK - 1))
    some = call(aten.logical_and.default, some, call(aten.logical_not.default, full))
    tables = _tables(builder, site, some, full, None)

    graph = _mask_graph()
    _, _, query, key = graph.nodes
    buffers: tuple[fx.Node, ...] = ()
    if isinstance(shift, int):
        own: Any = graph.call_function(aten.add.Scalar, (query, shift)) if shift else query
    else:
        # A score's function takes tensors, and no symbolic numbers.
        buffers = (call(aten.full.default, [], shift, **int64),)
        own = graph.call_function(aten.add.Tensor, (query, graph.placeholder("shift")))
    behind = graph.call_function(aten.sub.Tensor, (key, own))
    bounds = []
    if asked.right >= 0:
        bounds.append(graph.call_function(aten.le.Scalar, (behind, asked.right)))
    if asked.left >= 0:
        bounds.append(graph.call_function(aten.ge.Scalar, (behind, -asked.left)))
    kept = bounds[0] if len(bounds) == 1 else graph.call_function(aten.logical_and.default, tuple(bounds))
    graph.output(kept)
    placeholders_first(graph)
    mask_mod = fx.GraphModule(torch.nn.Module(), graph)
    return Blocks(tables, (queries, keys), (BLOCK, BLOCK), mask_mod, buffers)


def blocks_of_isolated(builder: Builder, site: CanonicalAttention, start: int, stop: int) -> Blocks:
    """The blocks of a mask that keeps positions from ``start`` up to and without ``stop`` from each other.

    From their positions alone; within the isolated part the blocks on the diagonal are left.
    """
    queries, keys = size_of(site.query_axes), size_of(site.key_axes)
    call = builder.call
    either, both = aten.logical_or.default, aten.logical_and.default
    rows, columns = _first_positions(builder, site)
    last_row, last_column = (
        call(aten.clamp.default, call(aten.add.Scalar, first, BLOCK - 1), None, length - 1)
        for first, length in ((rows, queries), (columns, keys))
    )
    some = call(both, call(aten.le.Tensor, rows, last_column), call(aten.le.Tensor, columns, last_row))
    full = None
    for first, last in ((rows, last_row), (columns, last_column)):
        some = call(either, some, call(either, call(aten.lt.Scalar, first, start), call(aten.ge.Scalar, last, stop)))
        outside = call(either, call(aten.lt.Scalar, last, start), call(aten.ge.Scalar, first, stop))
        full = outside if full is None else call(either, full, outside)
    for first, length in ((rows, queries), (columns, keys)):
        full = call(both, full, call(aten.le.Scalar, first, length - BLOCK))
    assert full is not None
    partial = call(both, some, call(aten.logical_not.default, full))
    tables = _tables(builder, site, partial, full, None)

    graph = _mask_graph()
    _, _, query, key = graph.nodes
    kept = graph.call_function(aten.eq.Tensor, (query, key))
    for position in (query, key):
        for comparison, bound in ((aten.lt.Scalar, start), (aten.ge.Scalar, stop)):
            kept = graph.call_function(either, (kept, graph.call_function(comparison, (position, bound))))
    graph.output(kept)
    return Blocks(tables, (queries, keys), (BLOCK, BLOCK), fx.GraphModule(torch.nn.Module(), graph))


def _first_positions(builder: Builder, site: CanonicalAttention) -> tuple[fx.Node, fx.Node]:
    """The first query and the first key of each block, as a column and as a row."""

    def starts(length: Size, shape: list[int]) -> fx.Node:
        numbers = builder.call(aten.arange.default, _blocks(length), dtype=torch.int64, device=site.device)
        return builder.call(aten.reshape.default, builder.call(aten.mul.Scalar, numbers, BLOCK), [1, 1, *shape])

    return starts(size_of(site.query_axes), [-1, 1]), starts(size_of(site.key_axes), [1, -1])


def _blocks(length: Size) -> Size:
    return (length + BLOCK - 1) // BLOCK


def _tables(
    builder: Builder, site: CanonicalAttention, partial: fx.Node, full: fx.Node, rows: Size | None
) -> dict[str, fx.Node]:
    """How many blocks there are for each row of blocks, and which; for the backward pass for each column, too.

    ``rows``: the blocks of queries, where ``partial`` and ``full`` have one row that stands for all.
    """
    tables: dict[str, fx.Node] = {}
    for prefix, chosen in (("", partial), ("full_", full)):
        tables[f"{prefix}kv_num_blocks"], tables[f"{prefix}kv_indices"] = _ordered(builder, chosen, rows)
        if site.differentiable:
            if rows is not None:
                batch, heads, _, columns = tensor(chosen).shape
                chosen = builder.call(aten.expand.default, chosen, [batch, heads, rows, columns])
            turned = builder.call(aten.transpose.int, chosen, -1, -2)
            tables[f"{prefix}q_num_blocks"], tables[f"{prefix}q_indices"] = _ordered(builder, turned, None)
    return dict(zip(tables, stored(builder, list(tables.values())), strict=True))


def _ordered(builder: Builder, chosen: fx.Node, rows: Size | None) -> tuple[fx.Node, fx.Node]:
    """The number of chosen blocks of each row, and all blocks, the chosen ones first."""
    call = builder.call
    count = call(aten.sum.dim_IntList, chosen, [-1], dtype=torch.int32)
    numbers = call(aten.to.dtype, chosen, torch.int32)
    order = call(aten.sort.stable, numbers, stable=True, dim=-1, descending=True)
    indices = builder.insert(operator.getitem, (order, 1), {}, order.meta["val"][1])
    indices = call(aten.to.dtype, indices, torch.int32)
    if rows is not None:
        batch, heads, _, columns = tensor(chosen).shape
        count = call(aten.expand.default, count, [batch, heads, rows])
        indices = call(aten.expand.default, indices, [batch, heads, rows, columns])
    return count, indices


def _mask_graph() -> fx.Graph:
    graph = fx.Graph()
    for name in ("batch", "head", "query", "key"):
        graph.placeholder(name)
    return graph


def _reading(own: list[int]) -> fx.GraphModule:
    """``mask_mod`` that reads a mask with these of the four dimensions."""
    graph = _mask_graph()
    positions = list(graph.nodes)
    entry: Any = graph.placeholder("keep")
    graph.output(entry_at(entry, positions, own))
    placeholders_first(graph)
    return fx.GraphModule(torch.nn.Module(), graph)


def entry_at(buffer: fx.Node, positions: Sequence[fx.Node], own: Sequence[int]) -> fx.Node:
    """A buffer's entry at those of the positions that it has dimensions for.

    In subscripts: of these alone FlexAttention makes what its backward pass has a gradient for.
    ``TransformGetItemToIndex`` of
    https://github.com/pytorch/pytorch/blob/v2.13.0/torch/_dynamo/_trace_wrapped_higher_order_op.py
    """
    if not own:
        return buffer
    return buffer.graph.call_function(operator.getitem, (buffer, tuple(positions[place] for place in own)))


def placeholders_first(graph: fx.Graph) -> None:
    """Graphs begin with their inputs, whenever these were added."""
    first = next(node for node in graph.nodes if node.op != "placeholder")
    for node in [node for node in graph.nodes if node.op == "placeholder"]:
        first.prepend(node)
