"""The mask that kernels take, made of a site's terms; and the source's values for rows without a key."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from attnrewrite.analysis.masks import may_mask
from attnrewrite.analysis.values import ABSORBING, FAR_BELOW, UNDERFLOW, ValueKind, possible_values
from attnrewrite.ir.axes import Dim, Operand, size_of
from attnrewrite.ir.builder import Builder
from attnrewrite.ir.nodes import same, tensor
from attnrewrite.ir.site import Bias, CanonicalAttention, Fill, Floor, MaskedRows, Zero
from attnrewrite.kernels.common.layout import KernelLayout, lay_out, modified, padded

__all__ = ["Mask"]

aten = torch.ops.aten


class Mask:
    """The site's terms as one tensor (batch or 1, heads or 1, query length or 1, key length), boolean or additive."""

    def __init__(self, builder: Builder, site: CanonicalAttention, dims: tuple[Dim, ...]) -> None:
        self._builder = builder
        self._site = site
        self._dims = dims
        self._terms = site.scores.terms
        self.node: fx.Node | None = None
        self.opened_rows: fx.Node | None = None
        self._after_fill: fx.Node | None = None
        if self._terms:
            self._write(site.scores.fills_decide)
        self._without_sink = self.node
        if site.sink is not None:
            self._append_sink(site.sink)

    def _write(self, fills_decide: bool) -> None:
        call = self._builder.call
        (first, *more) = self._terms
        if not more and isinstance(first, Fill) and first.value == -math.inf and self._site.sink is None:
            condition = self._condition(first.condition)
            self.node = condition if first.invert else call(aten.logical_not.default, condition)
        else:
            self.node = self._within_range(self._replayed())
        if fills_decide:
            self._open_filled_rows()
        # The CPU's kernel takes a mask whose keys broadcast, the CUDA kernels do not.
        if not same(tensor(self.node).shape[-1], _key_length(self._site)):
            shape = [*tensor(self.node).shape[:-1], _key_length(self._site)]
            self.node = call(aten.expand.default, self.node, shape)

    def _append_sink(self, sink: Operand | float) -> None:
        call = self._builder.call
        zeros = tensor(self._site.query.node).new_zeros
        if self.node is None:
            kind = {"dtype": self._dtype, "device": self._site.device}
            value = zeros((1, 1, 1, 1), dtype=self._dtype)
            self.node = self._builder.insert(aten.full.default, ([1, 1, 1, 1], 0.0), kind, value)
            self.node = call(aten.expand.default, self.node, [1, 1, 1, _key_length(self._site)])
        if not isinstance(sink, Operand):
            self.node = padded(self._builder, self.node, -1, sink)
            return
        column = self._cast(self._laid_out(sink))
        wide, narrow = tensor(self.node).shape, tensor(column).shape
        rows = [a if not same(a, 1) else b for a, b in zip(wide[:-1], narrow[:-1], strict=True)]
        parts = [call(aten.expand.default, part, [*rows, tensor(part).shape[-1]]) for part in (self.node, column)]
        self.node = call(aten.cat.default, parts, -1)

    def _condition(self, operand: Operand) -> fx.Node:
        """A condition may be written in numbers."""
        node = self._laid_out(operand)
        return node if tensor(node).dtype is torch.bool else self._builder.call(aten.ne.Scalar, node, 0)

    def _laid_out(self, operand: Operand) -> fx.Node:
        return lay_out(self._builder, operand.node, operand.layout, self._dims)

    @property
    def _dtype(self) -> torch.dtype:
        """The CPU's kernel takes float32 masks with half-precision operands; elsewhere the dtypes must agree."""
        compute = self._site.compute_dtype
        if self._site.device.type != "cpu" or compute.itemsize > 4:
            return compute
        only_biases = all(isinstance(term, Bias) for term in self._terms)
        return compute if only_biases and all(_dtype_of(term) is compute for term in self._terms) else torch.float32

    def _replayed(self) -> fx.Node:
        """What the source does to the scores, done to zeros."""
        call = self._builder.call
        total: fx.Node | None = None
        wide = self._dtype
        if self._site.scores.rounded_to is not None:
            # Rounded once, at the end, as the source rounds its masked scores.
            wide = max((wide, *(term.dtype for term in self._terms)), key=lambda dtype: dtype.itemsize)
        for term in self._terms:
            if isinstance(term, Bias):
                bias = self._cast(self._laid_out(term.operand), wide)
                for scale in term.scales:
                    bias = self._cast(modified(self._builder, bias, scale, self._dims), wide)
                if term.factor != 1:
                    bias = call(aten.mul.Scalar, bias, term.factor)
                total = bias if total is None else call(aten.add.Tensor, total, bias)
                self._after_fill = bias if self._after_fill is None else call(aten.add.Tensor, self._after_fill, bias)
                continue
            if isinstance(term, Floor):
                assert total is not None
                total = call(aten.clamp.default, total, term.value if self._counts else max(term.value, ABSORBING))
                continue
            self._after_fill = None
            condition = self._condition(term.condition)
            value = self._fill_value(term)
            if total is None:
                total = self._filled(condition, value, term.invert, wide)
            elif term.invert:
                total = call(aten.where.ScalarOther, condition, total, value)
            else:
                total = call(aten.where.ScalarSelf, condition, value, total)
        assert total is not None
        if self._after_fill is not None:
            self._after_fill = self._cast(self._after_fill)
        if self._site.scores.rounded_to is not None:
            total = self._cast(total, self._site.scores.rounded_to)
        return self._cast(total)

    def _filled(self, condition: fx.Node, value: float, invert: bool, dtype: torch.dtype) -> fx.Node:
        call = self._builder.call
        if dtype is torch.float64:
            # Two numbers make a float32, which may not hold them.
            zero = call(aten.full.default, [], 0.0, dtype=dtype, device=self._site.device)
            where = aten.where.ScalarOther if invert else aten.where.ScalarSelf
            return call(where, condition, *((zero, value) if invert else (value, zero)))
        return self._cast(call(aten.where.Scalar, condition, *((0.0, value) if invert else (value, 0.0))), dtype)

    @property
    def _counts(self) -> bool:
        """Whether numbers count: which of its keys a row attends that all terms together mask depends on them."""
        return sum(isinstance(term, Fill) or may_mask(term) for term in self._terms if not isinstance(term, Floor)) > 1

    def _fill_value(self, term: Fill) -> float:
        """A fill replaces the score, a mask is added to it: the number must swallow any score, and stay finite."""
        if term.value == -math.inf:
            return -math.inf
        if self._dtype is torch.float16:
            return -math.inf
        if self._counts:
            return term.value
        if self._site.sink is not None or self._site.scores.inexpressible:
            # Beside a sink's score, and where the source's steps are repeated, it is the number itself that counts.
            return max(term.value, ABSORBING)
        return ABSORBING

    def _within_range(self, mask: fx.Node) -> fx.Node:
        """CUDA kernels multiply by log2(e): what overflows there would turn a mean of the values into 0."""
        if self._site.device.type == "cpu" or self._site.fused or not self._site.scores.masked_rows.may_occur:
            return mask
        if not any(_may_be_below_absorbing(term) for term in self._terms):
            return mask
        # Drawn together, not cut off: a row attends its highest key.
        call = self._builder.call
        below = call(aten.sub.Scalar, call(aten.mul.Scalar, mask, 0.25), 0.75 * 2.0**100)
        return call(aten.where.self, call(aten.lt.Scalar, mask, -(2.0**100)), below, mask)

    def _cast(self, node: fx.Node, dtype: torch.dtype | None = None) -> fx.Node:
        dtype = dtype or self._dtype
        return node if tensor(node).dtype is dtype else self._builder.call(aten.to.dtype, node, dtype)

    def _open_filled_rows(self) -> None:
        """Rows whose keys are all filled attend every key, with a query of zero: that gives the mean of the values.

        It is what a finite fill gives in the source, and no gradient reaches query and key there, as in the source.
        """
        call = self._builder.call
        filled: fx.Node | None = None
        for term in self._terms:
            if isinstance(term, Fill):
                condition = self._condition(term.condition)
                condition = call(aten.logical_not.default, condition) if term.invert else condition
                filled = condition if filled is None else call(aten.logical_or.default, filled, condition)
        assert filled is not None and self.node is not None
        self.opened_rows = call(aten.all.dim, filled, -1, True)
        if tensor(self.node).dtype is torch.bool:
            self.node = call(aten.logical_or.default, self.node, self.opened_rows)
        else:
            nothing: Any = 0.0
            if self._after_fill is not None and self._site.differentiable:
                # What is added after the fill is lost in it, but not the gradient.
                nothing = call(aten.sub.Tensor, self._after_fill, call(aten.detach.default, self._after_fill))
            where = aten.where.ScalarSelf if nothing == 0.0 else aten.where.self
            self.node = call(where, self.opened_rows, nothing, self.node)

    def with_source_rows(self, output: fx.Node, value: fx.Node, layout: KernelLayout) -> fx.Node:
        """The output with what the source gives rows that have no key, where that is NaN or zero."""
        site, call = self._site, self._builder.call
        rows = site.scores.masked_rows
        if site.rounds_rows and rows.may_occur:
            output = call(aten.mul.Tensor, output, self._keys_where_rounded(site.compute_dtype))
        if rows is MaskedRows.ZERO_WHERE_NAN:
            # Rows that minus infinity masks are zero with every kernel, unless they were opened.
            infinite = any(isinstance(term, Fill) and term.value == -math.inf for term in self._terms)
            if self.opened_rows is None or not infinite:
                return output
            return call(aten.where.ScalarSelf, self.opened_rows, 0.0, output)
        if rows.is_zero_unless_nan:
            lost = self._rows_without_key() if self.opened_rows is None else self.opened_rows
            output = call(aten.where.ScalarSelf, lost, 0.0, output)
        if not rows.may_be_nan:
            return output
        if self.opened_rows is None:
            return call(aten.mul.Tensor, output, self._nan_where_no_key(site.compute_dtype))
        if any(isinstance(term, Bias) for term in self._terms):
            output = call(aten.mul.Tensor, output, self._nan_where_no_key(site.compute_dtype))
        if not any(isinstance(term, Fill) and term.value == -math.inf for term in self._terms):
            return output
        if not site.differentiable:
            return call(aten.where.ScalarSelf, self.opened_rows, math.nan, output)
        # The source's gradient of such a row is NaN for every value and nothing for query and key.
        total = call(aten.sum.dim_IntList, value, [-2], True)
        if layout.grouped:
            groups = size_of(site.group_axes)
            total = call(aten.repeat_interleave.self_int, total, groups, 1)
        poisoned = self.opened_rows
        for mod in site.scores.output_mods:
            if isinstance(mod, Zero) and not mod.multiplied:
                # The output is replaced there, and 0 times NaN would reach the value's gradient.
                zeroed = self._condition(mod.condition)
                keeps = zeroed if mod.invert else call(aten.logical_not.default, zeroed)
                poisoned = call(aten.logical_and.default, poisoned, keeps)
        poison = call(aten.where.Scalar, poisoned, math.nan, 0.0)
        poison = call(aten.to.dtype, poison, site.compute_dtype)
        return call(aten.add.Tensor, output, call(aten.mul.Tensor, total, poison))

    def _nan_where_no_key(self, dtype: torch.dtype) -> fx.Node:
        """A factor for the output: 1, and NaN in rows whose scores are all minus infinity, as softmax gives there."""
        call = self._builder.call
        lost = self._rows_without_key(UNDERFLOW if self._site.underflows else -math.inf)
        factor = call(aten.where.Scalar, lost, math.nan, 1.0)
        return factor if tensor(factor).dtype is dtype else call(aten.to.dtype, factor, dtype)

    def _keys_where_rounded(self, dtype: torch.dtype) -> fx.Node:
        """A factor: the number of keys in rows that finite numbers mask, whose weights are 1 each in the source."""
        call = self._builder.call
        if self.opened_rows is not None:
            finite = any(isinstance(term, Fill) and term.value != -math.inf for term in self._terms)
            rounded = self.opened_rows if finite else call(aten.zeros_like.default, self.opened_rows)
            keys = call(aten.full.default, [], _key_length(self._site), dtype=torch.float32, device=self._site.device)
        else:
            assert self.node is not None
            infinite = self._rows_without_key(-math.inf)
            rounded = call(aten.logical_and.default, self._rows_without_key(), call(aten.logical_not.default, infinite))
            # Those that the row's highest number masks; lower ones have the weight 0.
            highest = call(aten.mul.Scalar, call(aten.amax.default, self.node, [-1], True), 1 + 2.0**-16)
            highest = call(aten.clamp.default, highest, torch.finfo(tensor(self.node).dtype).min)
            keys = call(aten.sum.dim_IntList, call(aten.ge.Tensor, self.node, highest), [-1], True)
            keys = call(aten.to.dtype, keys, torch.float32)
        factor = call(aten.where.ScalarOther, rounded, keys, 1.0)
        return factor if tensor(factor).dtype is dtype else call(aten.to.dtype, factor, dtype)

    def _rows_without_key(self, masked: float = FAR_BELOW) -> fx.Node:
        """Rows whose scores are all lowered to ``masked`` or further."""
        call = self._builder.call
        node = self._without_sink if self._site.sink_is_shifted else self.node
        assert node is not None
        if tensor(node).dtype is torch.bool:
            return call(aten.logical_not.default, call(aten.any.dim, node, -1, True))
        highest = call(aten.amax.default, node, [-1], True)
        return call(aten.le.Scalar, highest, masked)


def _key_length(site: CanonicalAttention) -> int | torch.SymInt:
    return size_of(site.key_axes)


def _dtype_of(term: Bias | Fill | Floor) -> torch.dtype | None:
    return term.operand.dtype if isinstance(term, Bias) else None


def _may_be_below_absorbing(term: Bias | Fill | Floor) -> bool:
    if not isinstance(term, Bias):
        return -math.inf < term.value < ABSORBING
    return any(
        value is ValueKind.ANY or (isinstance(value, float) and -math.inf < (term.of(value) or 0.0) < ABSORBING)
        for value in possible_values(term.operand.node)
    )
