"""Merges the sites that compute slices of one attention into one site of the whole attention.

    result[s] = softmax(mods(query[s] @ key[s])) @ value[s]        for slices s that cover a range once
    result    = softmax(mods(query @ key)) @ value

A row of softmax attention depends only on its own query, and batches and heads are independent of each other. So slices
may be merged if each operand is either sliced like the result, along the same axis, or lacks that axis and is shared by
all slices, and if everything else agrees. Each slice may also attend its own window of the keys: see
``key_windows.py``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from attnrewrite.analysis.slices import Assembly, Piece, assemblies, grid
from attnrewrite.ir.axes import Axis, Dim, Layout, Operand, axes_of, resolve, size_of
from attnrewrite.ir.bounds import searching
from attnrewrite.ir.builder import Builder
from attnrewrite.ir.graph_view import reader_in_words
from attnrewrite.ir.nodes import checkpoint_of, same, tensor
from attnrewrite.ir.ops import FACTORY_OPS, same_argument
from attnrewrite.ir.reason import FINE, Reason
from attnrewrite.ir.site import AttentionSite, Bias, Elementwise, Fill, Scale, Zero
from attnrewrite.ir.spans import Span, taken_from
from attnrewrite.ir.views import is_layout_op, peel, push
from attnrewrite.passes.key_windows import key_windows, require_band
from attnrewrite.passes.slice_sources import NotSlices, Wholes
from attnrewrite.patterns import Finding, GraphView

__all__ = ["merge_slices"]

aten = torch.ops.aten

_KEYS = -1
"""The range of the keys, if each slice attends a window of them; other ranges are dimensions of the result."""


def merge_slices(findings: Sequence[Finding], view: GraphView) -> list[Finding]:
    """The findings with merged sites in place of the sites of their slices, which become their ``parts``.

    If the results of several sites are put together but the sites cannot be merged, their ``unmerged`` says why.
    """
    sites = {finding.result: finding for finding in findings if isinstance(finding, AttentionSite)}
    merged: dict[fx.Node, AttentionSite] = {}
    unmerged: dict[fx.Node, Reason] = {}
    # The largest result first: it may consist of others.
    for node, assembly in reversed(assemblies(view.graph).items() if sites else ()):
        parts = _sites_of(assembly, sites)
        # A single slice may fill a buffer, which is then unnecessary.
        if len(parts) < (2 if assembly.buffer is None else 1) or any(part.result in merged for part in parts):
            continue
        with searching() as ended:
            try:
                whole = _merged(node, assembly, sites, view)
            except NotSlices as reason:
                is_sliced_query = len(parts) > 1 and _same_origin([part.query.node for part in parts])
                for part in parts if is_sliced_query else ():
                    unmerged.setdefault(part.result, Reason(ended.added_to(str(reason))))
            else:
                merged.update(dict.fromkeys((part.result for part in parts), whole))
    result: list[Finding] = []
    for finding in findings:
        if not isinstance(finding, AttentionSite):
            result.append(finding)
            continue
        whole_site = merged.get(finding.result)
        if whole_site is None:
            result.append(dataclasses.replace(finding, unmerged=unmerged.get(finding.result, FINE)))
        elif finding is whole_site.parts[0]:
            result.append(whole_site)
    return result


def _sites_of(assembly: Assembly, sites: dict[fx.Node, AttentionSite]) -> list[AttentionSite]:
    behind = (_behind_views(piece.node, sites)[-1] for piece in assembly.pieces)
    return [sites[node] for node in dict.fromkeys(behind) if node in sites]


def _behind_views(node: fx.Node, sites: dict[fx.Node, AttentionSite]) -> list[fx.Node]:
    """``node`` and the nodes that it is a chain of views and copies of, back to the result of a site."""
    chain = [node]
    while chain[-1] not in sites and is_layout_op(chain[-1]):
        chain.append(chain[-1].all_input_nodes[0])
    return chain


def _same_origin(nodes: Sequence[fx.Node]) -> bool:
    """Whether all nodes are slices of one tensor."""
    return len({_origin(node) for node in nodes}) == 1


def _origin(node: fx.Node) -> fx.Node:
    taken = taken_from(node)
    while taken is not None:
        node = taken.source
        taken = taken_from(node)
    return node


@dataclass
class _Slice:
    """One slice of the whole result.

    Attributes:
        layout: the dimensions of the whole result, in the axes of the slice's site.
        spans: for each sliced dimension, the part of it that the slice covers.
        axes: for each sliced dimension, the site's axis for it; None if the slice has size one.
        views: the views between the site's result and its place in the whole result.
    """

    site: AttentionSite
    layout: Layout
    spans: dict[int, Span]
    axes: dict[int, Axis | None]
    views: list[fx.Node]

    @property
    def sliced(self) -> set[Axis]:
        return {leaf for axis in self.axes.values() if axis is not None for leaf in axis.leaves()}


def _merged(whole: fx.Node, assembly: Assembly, sites: dict[fx.Node, AttentionSite], view: GraphView) -> AttentionSite:
    """The merged site, whose result is ``whole``.

    Raises:
        NotSlices: ``whole`` does not consist of slices of one attention.
    """
    if assembly.problem:
        raise NotSlices(assembly.problem)
    shape = tensor(whole).shape
    pieces = assembly.pieces
    divided = grid(pieces, shape)
    if divided is None:
        raise NotSlices("the slices are not proved to cover the whole result exactly once")
    along = [
        dim
        for dim, spans in enumerate(divided)
        if len(spans) > 1 or (any(piece.dims[dim] is None for piece in pieces) and not same(shape[dim], 1))
    ]
    slices = [_slice(piece, along, sites) for piece in pieces]
    if len({id(part.site) for part in slices}) < len(slices):
        raise NotSlices("the result of one attention is used for several slices")
    deleted = _nodes_to_delete(whole, assembly, slices)
    _require_one_region(whole, assembly, slices, view)
    merge = _Merge(whole, slices, {dim: Axis(shape[dim], "slice") for dim in along}, view)
    try:
        return merge.site(deleted)
    except NotSlices:
        for node in reversed(merge.builder.created):
            view.graph.erase_node(node)
        raise


def _slice(piece: Piece, along: list[int], sites: dict[fx.Node, AttentionSite]) -> _Slice:
    *views, result = _behind_views(piece.node, sites)
    if result not in sites:
        raise NotSlices("something other than attention is concatenated with a slice, or a slice is modified first")
    site = sites[result]
    layout: Layout | None = site.result_layout
    for node in reversed(views):
        layout = None if layout is None else push(node, layout)
    if layout is None or set(axes_of(layout)) != set(axes_of(site.result_layout)):
        raise NotSlices(
            "the slices are rearranged before they are put together, in a way that is not known to be a view"
        )
    own = resolve(layout)
    layout = tuple(() if dim is None else own[dim] for dim in piece.dims)
    if any(len(layout[dim]) > 1 for dim in along):
        raise NotSlices("the slices are put together along a dimension that combines several axes")
    axes = {dim: layout[dim][0] if layout[dim] else None for dim in along}
    return _Slice(site, layout, {dim: piece.box[dim] for dim in along}, axes, views)


def _nodes_to_delete(whole: fx.Node, assembly: Assembly, slices: list[_Slice]) -> list[fx.Node]:
    """Nodes to delete with the site: the concatenation or scatters, and views of them that nothing uses."""
    own = {*assembly.nodes, *(node for part in slices for node in (*part.views, part.site.result))} | {whole}
    buffer = assembly.buffer
    pending = [node for node in own if node is not whole]
    pending += [] if buffer is None else [buffer]
    for node in pending:
        for user in node.users:
            if user in own:
                continue
            if not _is_unused(user):
                if node is buffer:
                    continue
                raise NotSlices(f"a slice is also used on its own ({reader_in_words(user)})")
            own.add(user)
            pending.append(user)
    return [node for node in own if not whole < node]


def _is_unused(node: fx.Node) -> bool:
    """Whether nothing uses a view: a slice assignment takes a view of the place that it writes to."""
    return taken_from(node) is not None and all(map(_is_unused, node.users))


def _require_one_region(whole: fx.Node, assembly: Assembly, slices: list[_Slice], view: GraphView) -> None:
    buffer = assembly.buffer
    if buffer is not None and buffer.target not in FACTORY_OPS:
        if buffer.op == "call_function":
            raise NotSlices("the slices are written into a computed tensor, which must be kept")
        if slices[0].site.differentiable:
            raise NotSlices("the slices are written into a tensor that may need a gradient, even if only of zeros")
    if any(tensor(part.site.result).dtype is not tensor(whole).dtype for part in slices):
        raise NotSlices("the slices and the whole result differ in dtype")
    if len({checkpoint_of(part.site.result) for part in slices}) > 1:
        raise NotSlices("the slices are checkpointed separately")
    if not all(view.same_region(part.site.result, whole) for part in slices):
        raise NotSlices("grad mode or autocast differs between the slices and the whole result")


_EQUAL_FIELDS = (
    "pattern",
    "softmax_dtype",
    "compute_dtype",
    "dropout",
    "is_causal",
    "default_scale",
    "differentiable",
    "fused",
    "in_autocast",
    "sink_is_shifted",
    "nan_to_zero",
    "never_nan",
    "underflows",
    "rounds_rows",
)
"""Fields in which the slices of one attention agree, besides their operands."""


class _Merge:
    """Compares each slice with a model slice and builds the merged site."""

    def __init__(self, whole: fx.Node, slices: list[_Slice], axes: dict[int, Axis], view: GraphView) -> None:
        self._whole = whole
        self._slices = slices
        self._axes = axes
        self._view = view
        # A slice of size one does not show which axis was sliced.
        self._place = max(range(len(slices)), key=lambda place: len(slices[place].sliced))
        self._model = slices[self._place]
        self.builder = Builder(view.gm, before=whole, like=self._model.site.anchor)
        self._windows = self._key_windows()
        self._wholes = Wholes(
            {dim: [part.spans[dim] for part in slices] for dim in self._axes},
            {dim: axis.size for dim, axis in self._axes.items()},
            self.builder,
            may_move=lambda node: view.same_region(node, whole),
        )
        self._names: list[dict[Axis, Axis]] = [{} for _ in slices]
        """For each slice, its axis for each axis of the model slice."""
        self._compared: list[tuple[Sequence[Layout], str]] = []
        """Layouts that must agree between slices; compared at the end, when no more axes are divided."""

    def site(self, deleted: list[fx.Node]) -> AttentionSite:
        model = self._model.site
        for name in _EQUAL_FIELDS:
            if any(getattr(part.site, name) != getattr(model, name) for part in self._slices):
                raise NotSlices(f"the slices differ: {name}")
        sites = [part.site for part in self._slices]
        query, key, value = (
            self._operand([getattr(site, name) for site in sites], name) for name in ("query", "key", "value")
        )
        mods = self._mods([site.mods for site in sites], "scores")
        weight_mods = self._mods([site.weight_mods for site in sites], "weights")
        sink = self._factor([site.sink for site in sites], "sink")
        for axis in self._axes.values():
            if not any(axis in operand.axes for operand in (query, key, value)):
                raise NotSlices("the slices have the same query, key and value")
        # Only under a causal mask does it matter which of the axes are query positions.
        for axes in ("key_axes", "feature_axes", *["query_axes"] * model.is_causal):
            self._compared.append(([(getattr(site, axes),) for site in sites], axes))
        self._compared.append(([(axes_of(site.weight_layout),) for site in sites], "scores"))
        self._compared.append(([part.layout for part in self._slices], "results"))
        for layouts, what in self._compared:
            self._require_alike(layouts, what)
        key_axes = self._renamed((model.key_axes,))[0]
        # Slices of size one lack the axis, and so do their scores.
        of_size_one = {self._axes[dim] for dim, axis in self._model.axes.items() if axis is None}
        query_of_size_one = tuple(axis for axis in query.axes if axis in of_size_one - {*key.axes, *value.axes})
        query_axes = self._renamed((model.query_axes,))[0] or query_of_size_one
        if model.is_causal and set(query_axes) & set(self._axes.values()):
            raise NotSlices("the causal mask of each slice starts at the slice's own first query")
        site = dataclasses.replace(
            model,
            anchor=min(site.anchor for site in sites),
            result=self._whole,
            result_layout=tuple(
                (self._axes[dim],) if dim in self._axes else own for dim, own in enumerate(self._model.layout)
            ),
            query=query,
            key=key,
            value=value,
            query_axes=query_axes,
            key_axes=key_axes,
            mods=mods,
            weight_mods=weight_mods,
            sink=sink,
            interior=self._view.ordered([*deleted, *(node for site in sites for node in site.interior)]),
            parts=tuple(sorted(sites, key=lambda site: site.anchor)),
            written=tuple(self.builder.created),
            windowed=self._windows,
        )
        if self._windows:
            self._require_band(site)
        score_axes = {axis for operand in (query, key, *site.modifiers) for axis in operand.axes}
        if model.dropout and not set(self._axes.values()) <= score_axes:
            raise NotSlices("each slice of the value has its own dropout of the weights")
        added = tuple((axis,) for axis in self._axes.values() if axis in of_size_one & score_axes)
        site = dataclasses.replace(site, weight_layout=(*added, *self._renamed(model.weight_layout)))
        # The comparison is complete, so axes may be divided now: the whole operand may be a view itself.
        return site.with_operands(self._behind_views)

    # Keys.

    def _key_windows(self) -> bool:
        """Whether each slice attends its own window of the keys; if so, the keys become a further range."""
        sites = [part.site for part in self._slices]
        found = key_windows([self._behind_views(site.key) for site in sites], sites)
        if found is None:
            return False
        windows, count = found
        self._axes = {**self._axes, _KEYS: Axis(count, "key")}
        for part, window in zip(self._slices, windows, strict=True):
            part.spans[_KEYS], part.axes[_KEYS] = window, part.site.key_axes[0]
        return True

    def _require_band(self, site: AttentionSite) -> None:
        along = [dim for dim, axis in self._axes.items() if (axis,) == site.query_axes]
        if site.is_causal or len(along) != 1:
            raise NotSlices("the key and the result are not sliced alike")
        queries, windows = ([part.spans[dim] for part in self._slices] for dim in (along[0], _KEYS))
        require_band(site, queries, windows, self._axes[_KEYS].size)

    # Axes.

    def _require_alike(self, layouts: Sequence[Layout], what: str) -> None:
        """Requires the same axes in the same dimensions of all slices, apart from the sliced axes.

        Raises:
            NotSlices: they differ.
        """
        model = [self._unsliced(dim, self._model) for dim in layouts[self._place]]
        for part, names, layout in zip(self._slices, self._names, layouts, strict=True):
            own = [self._unsliced(dim, part) for dim in resolve(layout)]
            if [len(dim) for dim in own] != [len(dim) for dim in model]:
                raise NotSlices(f"the slices differ in the dimensions of their {what}")
            for axis, other in zip(axes_of(model), axes_of(own), strict=True):
                known = names.setdefault(axis, other)
                if known is not other or not same(axis.size, other.size):
                    raise NotSlices(f"the slices differ in the dimensions of their {what}")
            if len(set(names.values())) < len(names):
                raise NotSlices(f"the slices differ in the dimensions of their {what}")

    def _unsliced(self, dim: Dim, part: _Slice) -> Dim:
        return tuple(axis for axis in axes_of((dim,)) if axis not in part.sliced)

    def _renamed(self, layout: Layout) -> Layout:
        """The layout of the whole operand, from the model slice's layout."""
        new: dict[Axis, Axis] = {}
        for dim, axis in self._model.axes.items():
            if axis is not None and axis.parts is not None:
                raise NotSlices("the slices are put together along a dimension that combines several axes")
            if axis is not None:
                new[axis] = self._axes[dim]
        return tuple(tuple(new.get(axis, axis) for axis in dim) for dim in resolve(layout))

    # Operands.

    def _operand(self, operands: Sequence[Operand], what: str) -> Operand:
        """The operand that the slices' operands are slices of, or that they share.

        Raises:
            NotSlices: there is no such operand.
        """
        operands = [self._behind_views(operand) for operand in operands]
        whole = self._wholes.of([operand.node for operand in operands], what)
        layouts: list[Layout] = []
        for part, operand in zip(self._slices, operands, strict=True):
            layout = [() if dim is None else resolve(operand.layout)[dim] for dim in whole.dims]
            for dim, along in whole.sliced.items():
                expected = part.axes[along]
                if layout[dim] != (() if expected is None else expected.leaves()):
                    raise NotSlices(f"the {what} is sliced along another axis than the result")
                layout[dim] = ()
            if any(axis in part.sliced for axis in axes_of(layout)):
                raise NotSlices(f"the slices share the {what}, which has the axis that the result is sliced along")
            layouts.append(tuple(layout))
        self._compared.append((layouts, what))
        merged = list(layouts[self._place])
        for dim, along in whole.sliced.items():
            merged[dim] = (self._axes[along],)
        if not all(same(size_of(axes), size) for axes, size in zip(merged, tensor(whole.node).shape, strict=True)):
            raise NotSlices(f"the {what} is broadcast in the whole result and not in the slices")
        return Operand(whole.node, tuple(merged))

    def _behind_views(self, operand: Operand) -> Operand:
        return peel(operand, lambda node: self._view.same_region(node, self._whole))[-1].resolved()

    def _factor(self, factors: Sequence[Any], what: str) -> Any:
        """The number that the slices share, or the operand that theirs are slices of."""
        first = factors[0]
        if all(isinstance(factor, Operand) for factor in factors):
            return self._operand(factors, what)
        if all(same_argument(factor, first) for factor in factors):
            return first
        raise NotSlices(f"the slices differ in their {what}")

    # Modifications of the scores and the weights.

    def _mods(self, mods: Sequence[tuple[Any, ...]], what: str) -> tuple[Any, ...]:
        if len({len(steps) for steps in mods}) > 1:
            raise NotSlices(f"the operations on the {what} differ between slices")
        return tuple(self._mod(steps, what) for steps in zip(*mods, strict=True))

    def _mod(self, steps: Sequence[Any], what: str) -> Any:
        first = steps[0]
        if any(type(step) is not type(first) for step in steps):
            raise NotSlices(f"the operations on the {what} differ between slices")
        if isinstance(first, Elementwise):
            if any(_function(step.node) != _function(first.node) for step in steps):
                raise NotSlices(f"the operations on the {what} differ between slices")
            return first
        if isinstance(first, Scale):
            self._require_equal(steps, ("divide",), what)
            return dataclasses.replace(first, factor=self._factor([step.factor for step in steps], "scale"))
        if isinstance(first, Bias):
            self._require_equal(steps, ("dtype", "factor"), "mask")
            scales = self._mods([step.scales for step in steps], "mask")
            return dataclasses.replace(
                first, operand=self._operand([step.operand for step in steps], "mask"), scales=scales
            )
        if isinstance(first, (Fill, Zero)):
            rest = [field.name for field in dataclasses.fields(first) if field.compare and field.name != "condition"]
            self._require_equal(steps, rest, "mask")
            return dataclasses.replace(first, condition=self._operand([step.condition for step in steps], "mask"))
        if any(step != first for step in steps):
            raise NotSlices(f"the operations on the {what} differ between slices")
        return first

    def _require_equal(self, steps: Sequence[Any], names: Sequence[str], what: str) -> None:
        if any(getattr(step, name) != getattr(steps[0], name) for step in steps for name in names):
            raise NotSlices(f"the slices differ in their {what}")


def _function(node: fx.Node) -> tuple[Any, ...]:
    return node.target, node.args[1:], node.kwargs
