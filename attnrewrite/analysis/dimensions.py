"""Dimension tracking: where each dimension of each tensor of a graph comes from.

:mod:`attnrewrite.ir.views` follows the axes of one attention through views and products, exactly. This module follows
the :class:`Dimension` s of all tensors forward through a whole graph, and through other operators as well: through a
projection, which changes only the last dimension; through a convolution, after which a smaller height is still a
height; through slices and concatenations. It finds, for example, that the positions of a query are the frames of an
input. Only reports and the grouping of attentions for reuse depend on the result, so it may be unknown. No guard is
added.

It also notes which dimensions two- and three-dimensional operators treat as space, and which as frames.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from attnrewrite.ir.axes import Axis, Dim, Layout, axes_of, regroup, resolve, size_of
from attnrewrite.ir.model_state import is_model_state
from attnrewrite.ir.nodes import Size, is_tensor, product, same, tensor
from attnrewrite.ir.ops import SPLIT_OPS, is_elementwise
from attnrewrite.ir.products import is_product, product_from_operand
from attnrewrite.ir.views import is_layout_op, permutation_of, push
from attnrewrite.torch_private import schema_of, tree_leaves

__all__ = ["Dimension", "Dimensions", "Origin", "Role", "origins_of"]

aten = torch.ops.aten

Role = Literal["frames", "space"]

Origin = tuple[fx.Node, int]
"""The node that a dimension starts at (an input, a parameter, ``arange``), and the number of the dimension there."""


class Dimension(Axis):
    """A dimension of a tensor, or a part of one, and where it comes from.

    Attributes:
        origins: where the dimension starts; contains None if that is partly unknown, as for the features that a
            projection makes.
        sources: the dimensions that it was sliced, resized or concatenated from.
        pieces: the dimensions that were concatenated, in order; empty for any other dimension.
        whole: the dimension that it is a part of; None for a whole one.
        seen: the roles that operators gave the dimension, each with the operator in words.
        contracted: a projection sums over the whole dimension.
    """

    __slots__ = ("contracted", "origins", "pieces", "seen", "sources", "whole")

    def __init__(
        self,
        size: Size,
        origins: frozenset[Origin | None],
        sources: Dim = (),
        pieces: tuple[Dim, ...] = (),
        whole: Dimension | None = None,
    ) -> None:
        super().__init__(size)
        self.origins = origins
        self.sources = sources
        self.pieces = pieces
        self.whole = whole
        self.seen: dict[Role, str] = {}
        self.contracted = False

    def divide(self, minor: Size) -> tuple[Axis, Axis] | None:
        divided = super().divide(minor)
        if divided is None:
            return None
        major, rest = (Dimension(part.size, self.origins, whole=self) for part in divided)
        self.parts = (major, rest)
        return major, rest

    def note(self, role: Role, by: str) -> None:
        """Records a role of the dimension, and of the dimension that it was sliced or resized from."""
        dimension: Axis = self
        while isinstance(dimension, Dimension) and role not in dimension.seen:
            dimension.seen[role] = by
            if len(dimension.sources) != 1:
                return
            (dimension,) = dimension.sources


class Dimensions:
    """The dimensions of all tensors of a graph, computed once by a walk over its nodes."""

    def __init__(self, graph: fx.Graph) -> None:
        self._layouts: dict[fx.Node, Layout] = {}
        self._roles: dict[Axis, dict[Role, str]] = {}
        self._inputs: list[fx.Node] = []
        self._made: list[Dimension] = []
        for node in graph.nodes:
            if not is_tensor(node):
                continue
            self._layouts[node] = self._layout(node)
            if node.op == "placeholder" and not is_model_state(node):
                self._inputs.append(node)
        for node in self._inputs:
            _note_input(node, self._layouts[node])
        # Oldest first, so that the recursion through sources stays shallow.
        for dimension in self._made:
            self.roles(dimension)

    def of(self, node: fx.Node) -> Layout:
        """The node's layout: for each dimension its undivided parts, major to minor; empty for size one."""
        return resolve(self._layouts[node])

    def roles(self, axis: Axis) -> dict[Role, str]:
        """The roles of a dimension, its sources and the dimension it is a part of, each with its operator."""
        if not isinstance(axis, Dimension):
            return {}
        if axis not in self._roles:
            found = dict(axis.seen)
            for source in axes_of((axis.sources,)):
                found |= self.roles(source)
            whole = axis.whole
            while whole is not None:
                found |= whole.seen
                # If frames and space were flattened into one dimension, nothing says which part is which.
                each = [self.roles(source) for source in axes_of((whole.sources,))]
                if each and len(each[0]) == 1 and all(set(roles) == set(each[0]) for roles in each):
                    found |= each[0]
                whole = whole.whole
            self._roles[axis] = found
        return self._roles[axis]

    # Layouts, one node after another.

    def _layout(self, node: fx.Node) -> Layout:
        shape = tensor(node).shape
        is_result = node.target is operator.getitem
        if node.op != "call_function" or not (is_result or any(map(is_tensor, node.all_input_nodes))):
            return self._new_layout(node)
        layout = self._computed(node)
        return layout if layout is not None and len(layout) == len(shape) else _unknown(shape)

    def _new_layout(self, node: fx.Node) -> Layout:
        layout: list[Dim] = []
        for place, size in enumerate(tensor(node).shape):
            layout.append(() if same(size, 1) else (self._new(size, frozenset({(node, place)})),))
        return tuple(layout)

    def _new(self, size: Size, origins: frozenset[Origin | None], sources: Dim = (), **more: Any) -> Dimension:
        self._made.append(Dimension(size, origins, sources, **more))
        return self._made[-1]

    def _derived(self, dim: Dim, size: Size, pieces: tuple[Dim, ...] = ()) -> Dim:
        """``dim`` sliced or resized to ``size``, or the concatenation of ``pieces``; ``dim`` itself if it fits."""
        (dim,) = resolve((dim,))
        if same(size, 1):
            return ()
        if same(size, size_of(dim)) and dim and not pieces:
            return dim
        sources = tuple(dict.fromkeys(dim))
        return (self._new(size, origins_of(sources), sources, pieces=pieces),)

    def _computed(self, node: fx.Node) -> Layout | None:
        target: Any = node.target
        if target is operator.getitem:
            return self._split_result(node)
        if target in _HANDLERS:
            return _HANDLERS[target](self, node)
        if is_layout_op(node):
            return self._viewed(node)
        if is_product(node):
            return self._multiplied(node)
        rank = _spatial_rank(node)
        if rank is not None:
            return self._spatial(node, rank)
        reduced = self._reduced(node)
        if reduced is not None:
            return reduced
        return self._as_arguments(node, is_elementwise(node))

    def _viewed(self, node: fx.Node) -> Layout | None:
        source: Any = node.args[0]
        layout = self.of(source)
        pushed = push(node, layout)
        if pushed is not None:
            return pushed
        if permutation_of(node) is not None:
            return None
        if node.target is aten.repeat_interleave.self_int:
            return self._with_copies(node, layout, before=False)
        if node.target is aten.repeat.default:
            return self._with_copies(node, layout, before=True)
        return self._regrouped(layout, tensor(source).shape, tensor(node).shape)

    def _with_copies(self, node: fx.Node, layout: Layout, before: bool) -> Layout | None:
        """The layout after ``repeat`` (``before``: copy, own) or ``repeat_interleave`` (own, copy)."""
        shape, own = tensor(node).shape, tensor(node.args[0]).shape
        if len(shape) < len(own):
            return None
        offset = len(shape) - len(own)
        result: list[Dim] = list(_unknown(shape[:offset]))
        for dim, size, single in zip(layout, shape[offset:], own, strict=True):
            copies: Dim = () if same(size, single) else (Axis(size if same(single, 1) else size // single),)
            result.append((*copies, *dim) if before else (*dim, *copies))
        return tuple(result)

    def _regrouped(self, layout: Layout, own: Sequence[Size], shape: Sequence[Size]) -> Layout:
        """The layout after a reshape, or after an unknown operator: equal leading and trailing dimensions are kept.

        The dimensions between them become parts of one new dimension, which comes from all that they replace.
        """
        regrouped = regroup(layout, shape) if same(product(own), product(shape)) else None
        if regrouped is not None:
            return regrouped
        shorter = min(len(own), len(shape))
        start = 0
        while start < shorter and same(own[start], shape[start]):
            start += 1
        end = 0
        while end < shorter - start and same(own[-1 - end], shape[-1 - end]):
            end += 1
        mixed = axes_of(layout[start : len(layout) - end])
        whole = self._new(product(own[start : len(own) - end]), origins_of(mixed), mixed)
        between = shape[start : len(shape) - end]
        middle = tuple(() if same(size, 1) else (self._new(size, whole.origins, whole=whole),) for size in between)
        return (*layout[:start], *middle, *layout[len(layout) - end :])

    def _multiplied(self, node: fx.Node) -> Layout | None:
        """The layout of a matrix product: the dimensions of its operands that it does not sum over."""
        result: Layout | None = None
        own: set[Axis] = set()
        for operand in node.all_input_nodes:
            if not is_tensor(operand):
                continue
            layout = self.of(operand)
            read = product_from_operand(node, operand, layout)
            if read is None:
                continue
            others = [each for each in node.all_input_nodes if each is not operand and is_tensor(each)]
            if all(_is_weight(self.of(other)) for other in others):
                _note_contracted(read.contracted)
            found = resolve(read.layout)
            if result is None:
                result, own = found, set(axes_of(layout))
            else:
                result = tuple(
                    old if old and own.issuperset(old) else new for old, new in zip(resolve(result), found, strict=True)
                )
        return result

    def _spatial(self, node: fx.Node, rank: int) -> Layout | None:
        """The layout of a convolution, pooling or resizing of the last ``rank`` dimensions; notes their roles."""
        source: Any = node.args[0]
        layout, shape = self.of(source), tensor(node).shape
        name = f"{rank}-d convolution" if _is_convolution(node) else str(node.target).removeprefix("aten.")
        if rank == 2 and len(layout) == 4:
            _note(layout[0], "frames", f"the batch of a {name}")
        if rank == 3:
            _note(layout[-3], "frames", f"the first dimension of a {name}")
        if rank >= 2:
            _note((*layout[-2], *layout[-1]), "space", f"a {name}")
        result = [self._derived(dim, size) for dim, size in zip(layout, shape, strict=True)]
        if _is_convolution(node):
            result[-rank - 1] = _unknown(shape[-rank - 1 : len(shape) - rank])[0]
        return tuple(result)

    def _reduced(self, node: fx.Node) -> Layout | None:
        """The layout after a sum, mean or maximum; None if the node is not a reduction."""
        schema = schema_of(node.target)
        names = [argument.name for argument in schema.arguments] if schema is not None else []
        if "keepdim" not in names or not is_tensor(node.args[0]):
            return None
        source: Any = node.args[0]
        layout = self.of(source)
        (given,) = (_argument(node, name, None) for name in names if name in ("dim", "dims"))
        dims = range(len(layout)) if given is None or given == [] else given if isinstance(given, list) else [given]
        summed = {int(dim) % max(len(layout), 1) for dim in dims}
        if _argument(node, "keepdim", False):
            return tuple(() if place in summed else dim for place, dim in enumerate(layout))
        return tuple(dim for place, dim in enumerate(layout) if place not in summed)

    def _as_arguments(self, node: fx.Node, broadcasts: bool) -> Layout | None:
        """The layout of an operator whose dimensions are those of its arguments at the same places.

        If several have the full size, data counts before parameters, and these before constants; of equals, the one
        with most dimensions larger than one: position embeddings are added to a sequence.
        """
        shape = tensor(node).shape
        arguments = [each for each in tree_leaves((node.args, node.kwargs)) if is_tensor(each)]
        return self._merged(arguments, shape, broadcasts)

    def _merged(self, arguments: Sequence[fx.Node], shape: Sequence[Size], broadcasts: bool) -> Layout | None:
        """The layout of a result whose dimensions are those of ``arguments``; see :meth:`_as_arguments`."""
        rank = len(shape)
        ranks = range(1, rank + 1) if broadcasts else (rank,)
        fitting = [each for each in arguments if tensor(each).dim() in ranks]
        layouts = [((),) * (rank - tensor(each).dim()) + self.of(each) for each in fitting]
        if not layouts:
            first = next((each for each in arguments if tensor(each).dim()), None)
            return None if first is None else self._regrouped(self.of(first), tensor(first).shape, shape)
        if broadcasts:
            layouts.sort(key=lambda layout: -sum(map(bool, layout)))
        result: list[Dim] = []
        for place, size in enumerate(shape):
            dims = [layout[place] for layout in layouts if layout[place]]
            equal = sorted((dim for dim in dims if same(size_of(dim), size)), key=_origin_rank)
            if same(size, 1):
                result.append(())
            elif equal or dims:
                result.append(equal[0] if equal else self._derived(dims[0], size))
            else:
                result.extend(_unknown((size,)))
        return tuple(result)

    def _split_result(self, node: fx.Node) -> Layout | None:
        """The layout of one result of a split, or of another operator with several results."""
        parent, number = node.args
        if not isinstance(parent, fx.Node) or not isinstance(number, int):
            return None
        source = next((each for each in parent.all_input_nodes if is_tensor(each)), None)
        if source is None:
            return None
        layout, shape = self.of(source), tensor(node).shape
        values: Any = parent.meta.get("val")
        if parent.target is aten.unbind.int:
            return _without(layout, _dim_of(parent, "dim", 0))
        if parent.target in SPLIT_OPS and isinstance(values, (list, tuple)):
            place = _dim_of(parent, "dim", 0)
            start: Size = 0
            for value in values[:number]:
                start = start + value.shape[place]
            return self._between(layout, place, start, start + shape[place], shape[place])
        arguments = [each for each in parent.all_input_nodes if is_tensor(each)]
        return self._merged(arguments, shape, broadcasts=False)

    def _between(self, layout: Layout, place: int, start: Size, end: Size, size: Size) -> Layout:
        """The layout after slicing dimension ``place``; a slice of a concatenation becomes the pieces in it."""
        dim = layout[place]
        taken: Dim | None = None
        if len(dim) == 1 and isinstance(dim[0], Dimension) and dim[0].pieces:
            taken = self._pieces_between(dim[0], start, end)
        sliced = self._derived(dim, size) if taken is None else taken
        return (*layout[:place], sliced, *layout[place + 1 :])

    def _pieces_between(self, dimension: Dimension, start: Size, end: Size) -> Dim | None:
        """The pieces of a concatenation from ``start`` to ``end``; None if one of them is cut."""
        at: Size = 0
        taken: list[Dim] | None = None
        for piece in dimension.pieces:
            if taken is None and same(at, start):
                taken = []
            if taken is not None:
                taken.append(piece)
            at = at + size_of(piece)
            if taken is not None and same(at, end):
                return taken[0] if len(taken) == 1 else self._one_after_another(taken, end - start)
        return None

    def _one_after_another(self, dims: Sequence[Dim], size: Size) -> Dim:
        flat: list[Dim] = []
        for dim in resolve(dims):
            nested = dim[0].pieces if len(dim) == 1 and isinstance(dim[0], Dimension) else ()
            flat.extend(nested or (dim,))
        return self._derived(axes_of(flat), size, tuple(flat))

    # Operators with a rule of their own.

    def _added_product(self, node: fx.Node) -> Layout | None:
        """The layout of ``addmm`` and ``baddbmm``."""
        left, right = node.args[1:3]
        if not (is_tensor(left) and is_tensor(right)):
            return None
        assert isinstance(left, fx.Node) and isinstance(right, fx.Node)
        rows, columns = self.of(left), self.of(right)
        if _is_weight(columns):
            _note_contracted(rows[-1])
        return (*rows[:-1], columns[-1])

    def _projected(self, node: fx.Node) -> Layout | None:
        source, weight = node.args[:2]
        if not (is_tensor(source) and is_tensor(weight)):
            return None
        assert isinstance(source, fx.Node)
        layout = self.of(source)
        _note_contracted(layout[-1])
        return (*layout[:-1], *_unknown(tensor(node).shape[-1:]))

    def _sliced(self, node: fx.Node) -> Layout | None:
        source: Any = node.args[0]
        place = _dim_of(node, "dim", 0)
        own, size = tensor(source).shape[place], tensor(node).shape[place]
        start = _size(_argument(node, "start", None))
        start = 0 if start is None else start
        if statically_known_true(start < 0):
            start = own + start
        step = _argument(node, "step", 1)
        layout = self.of(source)
        if step != 1:
            return (*layout[:place], self._derived(layout[place], size), *layout[place + 1 :])
        return self._between(layout, place, start, start + size, size)

    def _selected(self, node: fx.Node) -> Layout | None:
        source: Any = node.args[0]
        return _without(self.of(source), _dim_of(node, "dim", 0))

    def _concatenated(self, node: fx.Node) -> Layout | None:
        parts: Any = node.args[0]
        rank = tensor(node).dim()
        if any(not is_tensor(part) or tensor(part).dim() != rank for part in parts):
            return None
        place, shape = _dim_of(node, "dim", 0), tensor(node).shape
        joined = self._merged(parts, shape, broadcasts=False)
        if joined is None:
            return None
        along = self._one_after_another([self.of(part)[place] for part in parts], shape[place])
        return (*joined[:place], along, *joined[place + 1 :])

    def _stacked(self, node: fx.Node) -> Layout | None:
        parts = [part for part in node.all_input_nodes if is_tensor(part)]
        place = _dim_of(node, "dim", 0)
        shape = tensor(node).shape
        joined = self._merged(parts, (*shape[:place], *shape[place + 1 :]), broadcasts=False)
        if joined is None:
            return None
        return (*joined[:place], *_unknown(shape[place : place + 1]), *joined[place:])

    def _windows(self, node: fx.Node) -> Layout | None:
        """The layout of ``tensor.unfold``: (..., windows, ..., entries of a window)."""
        source: Any = node.args[0]
        place = _dim_of(node, "dimension", 0)
        layout, shape = self.of(source), tensor(node).shape
        along, within = (self._derived(layout[place], size) for size in (shape[place], shape[-1]))
        return (*layout[:place], along, *layout[place + 1 :], within)

    def _columns(self, node: fx.Node) -> Layout | None:
        """The layout of ``F.unfold``: (batch, channels and window, windows)."""
        source: Any = node.args[0]
        layout, shape = self.of(source), tensor(node).shape
        if len(layout) != 4:
            return None
        _note(layout[0], "frames", "the batch of a 2-d unfold")
        _note((*layout[2], *layout[3]), "space", "a 2-d unfold")
        return layout[0], *_unknown(shape[1:2]), self._derived((*layout[2], *layout[3]), shape[2])

    def _looked_up(self, node: fx.Node) -> Layout | None:
        """The layout of ``embedding``: that of the indices, and features."""
        indices: Any = node.args[1]
        return (*self.of(indices), *_unknown(tensor(node).shape[-1:]))

    def _indexed(self, node: fx.Node) -> Layout | None:
        """The layout of ``x[:, index]`` with a single index, which selects positions."""
        source: Any = node.args[0]
        indices: Any = node.args[1]
        if sum(index is not None for index in indices) != 1:
            return None
        place = next(place for place, index in enumerate(indices) if index is not None)
        layout, shape = self.of(source), tensor(node).shape
        added = len(shape) - len(layout) + 1
        if added < 1:
            return None
        picked = [self._derived(layout[place], size) for size in shape[place : place + added]]
        return (*layout[:place], *picked, *layout[place + 1 :])

    def _attended(self, node: fx.Node) -> Layout | None:
        """The layout of a fused attention call: that of the query, with the features of the value."""
        query, value = node.args[0], node.args[2]
        assert isinstance(query, fx.Node) and isinstance(value, fx.Node)
        layout = self._merged([query], tensor(node).shape, broadcasts=True)
        return None if layout is None else (*layout[:-1], self.of(value)[-1])

    def _as_complex(self, node: fx.Node) -> Layout | None:
        source: Any = node.args[0]
        return self.of(source)[:-1]

    def _as_real(self, node: fx.Node) -> Layout | None:
        source: Any = node.args[0]
        return (*self.of(source), *_unknown((2,)))


_HANDLERS: dict[Any, Callable[[Dimensions, fx.Node], Layout | None]] = {
    aten.linear.default: Dimensions._projected,
    aten.addmm.default: Dimensions._added_product,
    aten.baddbmm.default: Dimensions._added_product,
    aten.slice.Tensor: Dimensions._sliced,
    aten.select.int: Dimensions._selected,
    aten.cat.default: Dimensions._concatenated,
    aten.stack.default: Dimensions._stacked,
    aten.unfold.default: Dimensions._windows,
    aten.im2col.default: Dimensions._columns,
    aten.embedding.default: Dimensions._looked_up,
    aten.index.Tensor: Dimensions._indexed,
    aten.scaled_dot_product_attention.default: Dimensions._attended,
    aten.view_as_complex.default: Dimensions._as_complex,
    aten.view_as_real.default: Dimensions._as_real,
}


def origins_of(dim: Iterable[Axis]) -> frozenset[Origin | None]:
    """The origins of the dimensions; contains None if any is unknown."""
    found: set[Origin | None] = set()
    for axis in dim:
        found |= axis.origins if isinstance(axis, Dimension) else {None}
    return frozenset(found)


def _unknown(shape: Sequence[Size]) -> Layout:
    return tuple(() if same(size, 1) else (Axis(size),) for size in shape)


def _origin_rank(dim: Dim) -> int:
    """The rank of a dimension by what its origin tells: 0 data, 1 unknown, 2 a parameter, 3 a constant."""
    origins = origins_of(dim)
    begins = [origin[0] for origin in origins if origin is not None]
    if any(node.op == "placeholder" and not is_model_state(node) for node in begins):
        return 0
    if None in origins:
        return 1
    return 2 if any(map(is_model_state, begins)) else 3


def _is_weight(layout: Layout) -> bool:
    return {_origin_rank(dim) for dim in layout if dim} == {2}


def _note(dim: Dim, role: Role, by: str) -> None:
    for axis in dim:
        if isinstance(axis, Dimension):
            axis.note(role, by)


def _note_contracted(dim: Dim) -> None:
    for axis in axes_of((dim,)):
        if isinstance(axis, Dimension):
            axis.contracted = True


def _note_input(node: fx.Node, layout: Layout) -> None:
    """Notes frames and space of an input whose channels a projection contracts, as patch embeddings by ``linear`` do.

    An image has four dimensions with the channels second, a video five with the channels second, third or last.
    Nothing is noted if a convolution has given any of the dimensions a role.
    """
    dims = [dim[0] if dim and isinstance(dim[0], Dimension) else None for dim in layout]
    known = [dim for dim in dims if dim is not None]
    if any(dim.seen or any(part.seen for part in _parts(dim)) for dim in known):
        return
    channels = [place for place, dim in enumerate(dims) if dim is not None and dim.contracted]
    if (len(layout), channels) not in ((4, [1]), (5, [1]), (5, [2]), (5, [4])):
        return
    *frames, _, _ = (place for place in range(1, len(layout)) if place not in channels)
    for place in range(1, len(layout)):
        dim = dims[place]
        if dim is not None and place not in channels:
            dim.note("frames" if place in frames else "space", f"an input of {len(layout)} dimensions")


def _parts(dimension: Dimension) -> list[Dimension]:
    return [part for part in dimension.leaves() if isinstance(part, Dimension)]


def _name_of(node: fx.Node) -> str:
    """The operator's name with its namespace, without overload; empty if the target is not an operator."""
    schema = schema_of(node.target)
    return "" if schema is None else str(schema.name)


def _is_convolution(node: fx.Node) -> bool:
    return "conv" in _name_of(node)


def _spatial_rank(node: fx.Node) -> int | None:
    """The number of dimensions that a convolution, pooling or resizing works on; None for other operators."""
    name = _name_of(node)
    if not name or not node.args or not is_tensor(node.args[0]):
        return None
    rank, own = tensor(node).dim(), tensor(node.args[0]).dim()
    if name == "aten::convolution":
        return rank - 2
    # conv2d.padding, upsample_nearest2d.vec, reflection_pad2d; but not atleast_2d.
    found = int(name[-2]) if name[-2:] in ("1d", "2d", "3d") and name[-3] != "_" else None
    return found if found is not None and rank == own and rank in (found + 1, found + 2) else None


def _argument(node: fx.Node, name: str, default: Any) -> Any:
    """An operator's argument by its name in the schema; ``default`` if it is not given."""
    if name in node.kwargs:
        return node.kwargs[name]
    target: Any = node.target
    for place, argument in enumerate(schema_of(target).arguments):
        if argument.name == name:
            return node.args[place] if place < len(node.args) else default
    return default


def _dim_of(node: fx.Node, name: str, default: int) -> int:
    rank = tensor(node.all_input_nodes[0]).dim() if is_tensor(node.all_input_nodes[0]) else 1
    if node.target is aten.stack.default:
        rank += 1
    return int(_argument(node, name, default)) % max(rank, 1)


def _size(value: Any) -> Any:
    return value.meta["val"] if isinstance(value, fx.Node) else value


def _without(layout: Layout, place: int) -> Layout:
    return (*layout[:place], *layout[place + 1 :])
