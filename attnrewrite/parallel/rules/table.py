"""The rule of each operator.

An operator without a rule is computed of whole operands. So is one along the sharded dimension, such as a ``cumsum``
over positions. That is done for positions and masks; activations are gathered for products alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from attnrewrite.ir.ops import (
    ARANGE_OPS,
    CAST_OPS,
    COPY_OPS,
    FACTORY_OPS,
    LOG_SOFTMAX_OPS,
    RESHAPE_OPS,
    SOFTMAX_OPS,
    TRIANGLE_OPS,
    is_elementwise,
)
from attnrewrite.parallel.ring import RING
from attnrewrite.parallel.rules.creation import Arange, Creation, ShiftedTriangle
from attnrewrite.parallel.rules.indexing import Embedding, Index
from attnrewrite.parallel.rules.moved import (
    Moved,
    along,
    dims_at,
    expanded,
    normalized,
    permuted,
    repeated,
    same,
    squeezed,
    stacked,
    transposed,
    unsqueezed,
    without,
)
from attnrewrite.parallel.rules.pointwise import Pointwise
from attnrewrite.parallel.rules.products import AddedProduct, Attention, Einsum, Linear, OperandProduct, RingStep
from attnrewrite.parallel.rules.reductions import Reduction
from attnrewrite.parallel.rules.rule import Rule, tensor_of
from attnrewrite.parallel.rules.views import Repeat, Slice, View

__all__ = ["rule_of"]

aten = torch.ops.aten


def _always(rule: Rule, *targets: Any) -> dict[Any, Rule]:
    return dict.fromkeys(targets, rule)


# Long: a table of all operators with a rule.
def _table() -> dict[Any, Rule]:
    reductions = (aten.sum, aten.mean, aten.amax, aten.amin, aten.any, aten.all, aten.max, aten.min, aten.prod)
    more = (aten.var, aten.std, aten.norm, aten.linalg_vector_norm, aten.argmax, aten.argmin, aten.logsumexp)
    overloads = [getattr(op, name) for op in (*reductions, *more) for name in op.overloads()]  # type: ignore[no-untyped-call]
    others = ("out", "names", "other")  # ``max.other`` is the maximum of two tensors.
    return {
        **_always(Reduction(), *(op for op in overloads if not any(each in str(op) for each in others))),
        **_always(Pointwise(), aten.max.other, aten.min.other),
        **_always(Pointwise(), *COPY_OPS, *CAST_OPS, aten.dropout.default, aten.alpha_dropout.default),
        **_always(Pointwise(), aten.rand_like.default, aten.randn_like.default, aten.bernoulli.p),
        **_always(Creation(), *FACTORY_OPS),
        **_always(Arange(), *ARANGE_OPS),
        **_always(View(), *RESHAPE_OPS, aten.flatten.using_ints, aten.unflatten.int),
        **_always(Moved(same, along(1, -1), exchanged=True), *SOFTMAX_OPS, *LOG_SOFTMAX_OPS),
        **_always(Moved(same, normalized), aten.layer_norm.default, aten.rms_norm.default),
        **_always(Moved(same, along(1)), aten.cumsum.default, aten.cumprod.default, aten.split.Tensor),
        **_always(Moved(same, along(2)), aten.split_with_sizes.default, aten.chunk.default),
        **_always(Moved(same, along(1)), aten.cat.default, aten.index_select.default),
        **_always(Moved(same, along(1)), aten.cummax.default, aten.cummin.default, aten.logcumsumexp.default),
        **_always(Moved(same, along(1, -1)), aten.sort.default, aten.sort.stable, aten.argsort.default),
        aten.topk.default: Moved(same, along(2, -1)),
        aten.view_as_complex.default: Moved(same, lambda node: [tensor_of(node).dim()]),
        aten.view_as_real.default: Moved(lambda node: [*same(node)[:-1], None]),
        aten.flip.default: Moved(same, dims_at(1)),
        aten.roll.default: Moved(same, dims_at(2)),
        aten.transpose.int: Moved(transposed),
        aten.t.default: Moved(lambda node: list(reversed(same(node)))),
        aten.permute.default: Moved(permuted),
        aten.unsqueeze.default: Moved(unsqueezed),
        **_always(Moved(squeezed), aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims),
        **_always(Moved(without, along(1)), aten.select.int, aten.unbind.int),
        aten.expand.default: Moved(expanded, size_at=1),
        aten.repeat.default: Moved(expanded, repeated),
        aten.repeat_interleave.self_int: Repeat(),
        aten.stack.default: Moved(stacked),
        aten.slice.Tensor: Slice(),
        **_always(ShiftedTriangle(), *TRIANGLE_OPS),
        aten.linear.default: Linear(),
        aten.embedding.default: Embedding(),
        aten.index.Tensor: Index(),
        **_always(OperandProduct(), aten.matmul.default, aten.bmm.default, aten.mm.default),
        **_always(AddedProduct(), aten.addmm.default, aten.baddbmm.default),
        aten.einsum.default: Einsum(),
        aten.scaled_dot_product_attention.default: Attention(),
        RING: RingStep(),
    }


_RULES = _table()
_POINTWISE, _WHOLE = Pointwise(), Rule()


def rule_of(node: fx.Node) -> Rule:
    """The rule of the node's operator."""
    found = _RULES.get(node.target)
    if found is not None:
        return found
    return _POINTWISE if is_elementwise(node) else _WHOLE
