"""Steps that are applied to a part of the scores: the same steps, applied to all of them.

    x[:, 1:] += bias       =  x + pad(bias)         padded with -0.0, which changes no number
    x[:, 1:] *= factor     =  x * pad(factor)       padded with 1
    x[:, mask_of_a_part]   =  x.masked_fill(pad(mask), value)
    x.diagonal().fill_(value)  =  x.masked_fill(row == column, value)
    x[:, 1:] = (x[:, 1:].view(shape) + bias).view(...)   =  x + pad(bias.expand(shape).view(...))

Functional tracing writes them as ``slice_scatter(x, step(slice(x)))``. A result keeps its bits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from attnrewrite.ir.bounds import STEPS_OF_SCORES
from attnrewrite.ir.builder import Builder
from attnrewrite.ir.nodes import Size, is_tensor, same, same_shape, tensor
from attnrewrite.ir.ops import ADD_OPS, COPY_OPS, DIV_OPS, MASKED_FILL_OPS, MUL_OPS, SUB_OPS
from attnrewrite.ir.rounding import as_stored
from attnrewrite.ir.spans import Span, dim_of, same_span, span_of, taken_from

__all__ = ["applied_to_all"]

aten = torch.ops.aten

_SCATTERS = (aten.slice_scatter.default, aten.select_scatter.default)
_SHAPES = (aten.view.default, aten.reshape.default)


def applied_to_all(ir: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    """What ``node``, an assignment to a part of a tensor, is as steps on the whole; None if it is anything else.

    The steps are new nodes in front of ``node``.
    """
    args: Any = node.args
    whole, written = args[:2]
    if node.target is aten.diagonal_scatter.default:
        return _filled_diagonal(ir, node)
    if node.target not in _SCATTERS or not is_tensor(whole) or not is_tensor(written):
        return None
    span = span_of(node, tensor(written), 2)
    if span is None or tensor(written).dtype is not tensor(whole).dtype:
        return None
    part = _Part(
        Builder(ir, before=node, like=node),
        whole,
        dim_of(node, tensor(whole).dim(), 2),
        span,
        node.target is aten.select_scatter.default,
    )
    steps = _steps_from(written, part)
    if steps is None:
        return None
    result: fx.Node = whole
    for step in steps:
        result = step(result)
    return result


def _filled_diagonal(ir: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    """What ``node``, ``diagonal_scatter``, is as a fill by a mask; None if it does not write one number."""
    args: list[Any] = [*node.args, *(0, 0, 1)[len(node.args) - 2 :]]
    whole, written, offset, first, second = args
    if node.kwargs or not is_tensor(whole) or not is_tensor(written):
        return None
    fill = _fill(written)
    if fill is None or tensor(written).dtype is not tensor(whole).dtype:
        return None
    rank = tensor(whole).dim()
    builder = Builder(ir, before=node, like=node)

    def positions(dim: int) -> fx.Node:
        size = tensor(whole).shape[dim]
        numbers = builder.call(aten.arange.default, size, dtype=torch.int64, device=tensor(whole).device)
        behind = rank - 1 - dim % rank
        return builder.call(aten.reshape.default, numbers, [size, *[1] * behind]) if behind else numbers

    rows = builder.call(aten.add.Tensor, positions(first), offset) if offset else positions(first)
    mask = builder.call(aten.eq.Tensor, rows, positions(second))
    return fill(builder, whole, mask)


def _fill(node: fx.Node) -> Callable[[Builder, fx.Node, fx.Node], fx.Node] | None:
    """How the one number that ``node`` writes everywhere is written where a mask is true; None if it does not."""
    args: Any = node.args
    if node.target is aten.zero.default:
        return lambda builder, whole, mask: builder.call(aten.masked_fill.Scalar, whole, mask, 0)
    by_mask: Any = {aten.fill.Scalar: aten.masked_fill.Scalar, aten.fill.Tensor: aten.masked_fill.Tensor}.get(
        node.target
    )  # type: ignore[call-overload]
    return by_mask and (lambda builder, whole, mask: builder.call(by_mask, whole, mask, args[1]))


_Step = Callable[[fx.Node], fx.Node]


class _Part:
    """A part of ``whole`` along one dimension, and how to write what is combined with it as one of the whole.

    Steps may be done on the part in another shape, ``viewed``, of the same entries in the same order.
    """

    def __init__(
        self,
        builder: Builder,
        whole: fx.Node,
        dim: int,
        span: Span,
        selected: bool,
        viewed: Sequence[Size] | None = None,
    ) -> None:
        self.builder = builder
        self.whole = whole
        self.dim = dim
        self.span = span
        self.selected = selected
        self.viewed = viewed

    def shape(self) -> list[Size]:
        own: list[Size] = [*tensor(self.whole).shape]
        own[self.dim : self.dim + 1] = [] if self.selected else [self.span.size]
        return own

    def in_shape(self, viewed: Sequence[Size] | None) -> _Part:
        return _Part(self.builder, self.whole, self.dim, self.span, self.selected, viewed)

    def is_taken_by(self, node: fx.Node) -> bool:
        taken = taken_from(node)
        return (
            taken is not None
            and taken.selected is self.selected
            and taken.dim == self.dim
            and same_span(taken.span, self.span)
            and _equal(taken.source, self.whole)
        )

    def padded(self, operand: fx.Node, value: float | bool) -> fx.Node:
        """``operand``, which broadcasts to the part, as one that broadcasts to the whole; ``value`` is outside."""
        behind = tensor(self.whole).dim() - 1 - self.dim
        if self.viewed is not None:
            operand = self.builder.call(aten.expand.default, operand, list(self.viewed))
            operand = self.builder.call(aten.reshape.default, operand, self.shape())
        shape: list[Size] = [*tensor(operand).shape]
        shape[:0] = [1] * (behind - len(shape))
        if self.selected or len(shape) == behind:
            shape.insert(len(shape) - behind, 1)
        if len(shape) != tensor(operand).dim():
            operand = self.builder.call(aten.reshape.default, operand, shape)
        place = -1 - behind
        if not same(shape[place], self.span.size):
            shape[place] = self.span.size
            operand = self.builder.call(aten.expand.default, operand, shape)
        total = tensor(self.whole).shape[self.dim]
        around: list[Size] = [self.span.start, total - self.span.stop]
        shape[place] = total
        # Evaluated by hand: the operator's own fake would fix the symbolic size.
        padded = tensor(operand).new_empty(shape)
        pads = [*[0, 0] * behind, *around]
        return self.builder.insert(aten.constant_pad_nd.default, (operand, pads, value), {}, padded)

    def number(self, value: float | bool, outside: float | bool, dtype: torch.dtype) -> fx.Node:
        """A tensor that broadcasts to the whole and holds ``value`` in the part, and ``outside`` elsewhere."""
        filled = self.builder.call(aten.full.default, [], value, dtype=dtype, device=tensor(self.whole).device)
        return self.in_shape(None).padded(filled, outside)


def _steps_from(node: fx.Node, part: _Part) -> list[_Step] | None:
    """The steps on the whole that make of a part of it what ``node`` is; None if one cannot be written so."""
    if part.viewed is None and part.is_taken_by(node):
        return []
    source: Any = node.args[0] if node.args else None
    if node.target in _SHAPES and is_tensor(source):
        # Behind the view the steps are done in the shape that it has before, or in the part's own again.
        shape = tensor(source).shape
        return _steps_from(source, part.in_shape(None if same_shape(shape, part.shape()) else shape))
    found = _step(node, part)
    if found is None or found[0] is None:
        return None if found is None else [found[1]]
    before = _steps_from(found[0], part)
    return None if before is None else [*before, found[1]]


def _step(node: fx.Node, part: _Part) -> tuple[fx.Node | None, _Step] | None:
    """The node before ``node``, None if it does not count, and the last step; None if that cannot be written so."""
    args: Any = node.args
    target: Any = node.target
    call = part.builder.call
    if node.op != "call_function" or not args or not is_tensor(args[0]):
        return None
    if target in COPY_OPS and target is not aten.detach.default:
        return args[0], lambda whole: whole
    fill = _fill(node)
    if fill is not None:
        return None, lambda whole: fill(part.builder, whole, part.number(True, False, torch.bool))
    if target in MASKED_FILL_OPS:
        return args[0], lambda whole: call(target, whole, part.padded(args[1], False), args[2])
    return _arithmetic_step(node, part)


def _arithmetic_step(node: fx.Node, part: _Part) -> tuple[fx.Node, _Step] | None:
    """The step by a sum, a product or a quotient; a number in half precision would be rounded in a tensor."""
    args: Any = node.args
    found = next(((operator, value) for ops, operator, value in _NEUTRAL if node.target in ops), None)
    if found is None or node.kwargs or len(args) != 2:
        return None
    operator, outside = found
    first, second = args
    if not _depends_on(first, part) and operator in (aten.add.Tensor, aten.mul.Tensor):
        first, second = second, first
    dtype = tensor(part.whole).dtype
    if not is_tensor(first) or tensor(first).dtype is not dtype:
        return None
    if is_tensor(second):
        if tensor(second).dtype is not dtype:
            return None
        return first, lambda whole: part.builder.call(operator, whole, part.padded(second, outside))
    if isinstance(second, (int, float)) and dtype in (torch.float32, torch.float64):
        number = as_stored(second, dtype)
        return first, lambda whole: part.builder.call(operator, whole, part.number(number, outside, dtype))
    return None


def _depends_on(node: Any, part: _Part) -> bool:
    pending, seen = [node], {node}
    while pending and len(seen) < STEPS_OF_SCORES:
        step = pending.pop()
        if not is_tensor(step):
            continue
        if part.is_taken_by(step):
            return True
        pending += [source for source in step.all_input_nodes if source not in seen]
        seen.update(step.all_input_nodes)
    return False


_NEUTRAL: Sequence[tuple[frozenset[Any], Any, float]] = (
    (ADD_OPS, aten.add.Tensor, -0.0),
    (SUB_OPS, aten.sub.Tensor, 0.0),
    (MUL_OPS, aten.mul.Tensor, 1.0),
    (DIV_OPS, aten.div.Tensor, 1.0),
)
"""Steps, each with its operator on tensors and the operand that changes no bit."""


def _equal(a: fx.Node, b: fx.Node) -> bool:
    """Whether two nodes are the same, or take the same part of the same, which functional tracing writes twice."""
    if a is b:
        return True
    one, other = taken_from(a), taken_from(b)
    if a.target in _SHAPES and a.target is b.target and same_shape(tensor(a).shape, tensor(b).shape):
        return _equal(a.args[0], b.args[0])  # type: ignore[arg-type]
    return (
        one is not None
        and other is not None
        and one.selected is other.selected
        and one.dim == other.dim
        and same_span(one.span, other.span)
        and _equal(one.source, other.source)
    )
