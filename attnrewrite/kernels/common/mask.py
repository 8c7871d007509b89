"""The mask that kernels take, made of a site's terms; and the source's values for rows without a key."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from attnrewrite.analysis.masks import may_mask
from attnrewrite.analysis.values import ABSORBED, ABSORBING, FAR_BELOW, UNDERFLOW, ValueKind, possible_values
from attnrewrite.ir.axes import Dim, Operand, size_of
from attnrewrite.ir.builder import Builder
from attnrewrite.ir.nodes import same, tensor
from attnrewrite.ir.site import Bias, CanonicalAttention, Fill, Floor, Lift, MaskedRows, Raise, Zero
from attnrewrite.kernels.common.layout import KernelLayout, lay_out, modified, padded
from attnrewrite.kernels.common.row_gradients import ABSORBED_ROWS, NAN_ROWS

__all__ = ["Mask"]

aten = torch.ops.aten


class Mask:
    """The site's terms as one tensor (batch or 1, heads or 1, query length or 1, key length), boolean or additive."""

    def __init__(
        self, builder: Builder, site: CanonicalAttention, dims: tuple[Dim, ...], *, in_float32: bool = False
    ) -> None:
        self._builder = builder
        self._site = site
        self._dims = dims
        self._terms = site.scores.terms
        self._in_float32 = in_float32
        self._lift = self._lift_of(site)
        self.node: fx.Node | None = None
        self.opened_rows: fx.Node | None = None
        self.absorbed_rows: fx.Node | None = None
        self._after_fill: fx.Node | None = None
        self._written: fx.Node | None = None
        if self._terms:
            self._write(site.scores.fills_decide)
        if self._written is None:
            self._written = self.node
        if site.sink is not None:
            self._append_sink(site.sink)

    def _lift_of(self, site: CanonicalAttention) -> Lift:
        return site.scores.lift

    def _write(self, fills_decide: bool) -> None:
        call = self._builder.call
        (first, *more) = self._terms
        if not more and isinstance(first, Fill) and first.value == -math.inf and self._site.sink is None:
            condition = self._condition(first.condition)
            self.node = condition if first.invert else call(aten.logical_not.default, condition)
        else:
            self.node = self._replayed(self._replay_dtype)
            if self._lift is not Lift.NONE:
                self._written = self.node
                several = bool(more) and self._lift > Lift.OPENED and self._site.in_half
                self.node = self._lifted(self._replayed(torch.float64) if several else self.node)
            self.node = self._cast(self._within_range(self.node))
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
            # As low as the dtype can hold it: it was written for scores that are wider.
            self.node = padded(self._builder, self.node, -1, max(sink, torch.finfo(tensor(self.node).dtype).min))
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
        if self._in_float32:
            return torch.float32
        if self._site.device.type != "cpu" or compute.itemsize > 4:
            return compute
        # Half precision would round a sum, a fill, and a sink that is wider or a number.
        sink = self._site.sink
        if sink is not None and not (isinstance(sink, Operand) and sink.dtype is compute):
            return torch.float32
        return compute if not self._terms or self._is_added_as_it_is(compute) else torch.float32

    def _is_added_as_it_is(self, dtype: torch.dtype) -> bool:
        (term, *more) = self._terms
        if more or not isinstance(term, Bias) or term.operand.dtype is not dtype:
            return False
        return term.factor == 1 and not term.scales and not term.rescaled

    def _replayed(self, wide: torch.dtype) -> fx.Node:
        """What the source does to the scores, done to zeros in the dtype ``wide``."""
        call = self._builder.call
        total: fx.Node | None = None
        self._after_fill = None
        rescaled: tuple[float, ...] = ()
        for place, term in enumerate(self._terms):
            own = term.rescaled if isinstance(term, (Bias, Fill)) else ()
            total, rescaled = self._rescaled(total, rescaled, own)
            if isinstance(term, Bias):
                bias = self._added(term, wide)
                total = bias if total is None else call(aten.add.Tensor, total, bias)
                if self._site.differentiable and any(isinstance(each, Fill) for each in self._terms[:place]):
                    self._after_fill = (
                        bias if self._after_fill is None else call(aten.add.Tensor, self._after_fill, bias)
                    )
                continue
            if isinstance(term, Floor):
                assert total is not None
                total = call(aten.clamp.default, total, term.value if self._counts else max(term.value, ABSORBING))
                continue
            if isinstance(term, Raise):
                assert total is not None
                total = self._raised(total, term, self._terms[:place])
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
        total, _ = self._rescaled(total, rescaled, ())
        assert total is not None
        if self._after_fill is not None:
            self._after_fill = self._cast(self._after_fill)
        if self._site.scores.rounded_to is not None:
            total = self._cast(total, self._site.scores.rounded_to)
        if self._is_raised and not self._site.differentiable:
            # Where a maximum of minus infinity was subtracted from itself, and no fill took the place of that.
            lost = call(aten.any.dim, call(aten.isnan.default, total), -1, True)
            total = call(aten.where.ScalarSelf, lost, -math.inf, total)
        return total

    def _added(self, term: Bias, wide: torch.dtype) -> fx.Node:
        """What a bias adds, in the dtype ``wide``, before it is rescaled."""
        bias = self._laid_out(term.operand)
        if tensor(bias).dtype.itemsize > term.dtype.itemsize:
            # The sum is rounded, and a mask to minus infinity with it.
            bias = self._cast(bias, term.dtype)
        bias = self._cast(bias, wide)
        for scale in term.scales:
            bias = self._cast(modified(self._builder, bias, scale, self._dims), wide)
        return bias if term.factor == 1 else self._builder.call(aten.mul.Scalar, bias, term.factor)

    @property
    def _is_raised(self) -> bool:
        return any(isinstance(term, Raise) for term in self._terms)

    def _raised(self, total: fx.Node, raised: Raise, before: Sequence[Bias | Fill | Floor | Raise]) -> fx.Node:
        """What a row has been lowered by as a whole is taken back, and its scores are taken away where they were lost.

        Rows of minus infinity become NaN, which a fill may take the place of; in training they stay as they are.
        """
        call = self._builder.call
        total = self._cast(total, raised.rounded_to) if raised.rounded_to else total
        highest = call(aten.clamp.default, call(aten.amax.default, total, [-1], True), None, 0.0)
        absorbed = call(aten.le.Scalar, highest, raised.absorbed)
        filled = self._filled_rows(before)
        for rows in (filled, self.absorbed_rows):
            absorbed = absorbed if rows is None else call(aten.logical_or.default, absorbed, rows)
        self.absorbed_rows = absorbed
        if self._site.differentiable:
            # No fill follows, and the gradient of such a row is NaN, as it is in the source.
            highest = call(aten.detach.default, highest)
            infinite = call(aten.eq.Scalar, highest, -math.inf)
            highest = call(aten.where.ScalarSelf, infinite, 0.0, highest)
        total = call(aten.sub.Tensor, total, highest)
        return total if raised.factor == 1 else call(aten.mul.Scalar, total, raised.factor)

    def _filled_rows(self, terms: Sequence[Bias | Fill | Floor | Raise]) -> fx.Node | None:
        """Rows in which a fill took the place of every score; None if there is no fill."""
        call = self._builder.call
        filled: fx.Node | None = None
        for term in terms:
            if isinstance(term, Fill):
                condition = self._condition(term.condition)
                condition = call(aten.logical_not.default, condition) if term.invert else condition
                filled = condition if filled is None else call(aten.logical_or.default, filled, condition)
        return None if filled is None else call(aten.all.dim, filled, -1, True)

    @property
    def _replay_dtype(self) -> torch.dtype:
        wide = self._dtype
        raises = [term for term in self._terms if isinstance(term, Raise)]
        if self._site.scores.rounded_to is not None or any(term.rounded_to for term in raises):
            # Rounded once, as the source rounds its masked scores.
            dtypes = [term.dtype for term in self._terms if not isinstance(term, Raise)]
            return max((wide, *dtypes), key=lambda dtype: dtype.itemsize)
        # Sums of masks leave the range of float16 before they are lifted.
        lifted = self._lift is not Lift.NONE or raises
        return torch.float32 if lifted and wide.itemsize < 4 else wide

    def _rescaled(
        self, total: fx.Node | None, before: tuple[float, ...], after: tuple[float, ...]
    ) -> tuple[fx.Node | None, tuple[float, ...]]:
        """The sum so far, multiplied by those of its numbers that are not the next term's as well; and the others."""
        call = self._builder.call
        done = before[: len(before) - len(after)]
        for number in done:
            total = call(aten.mul.Scalar, total, number)
            if self._after_fill is not None:
                self._after_fill = call(aten.mul.Scalar, self._after_fill, number)
        return total, after

    def _filled(self, condition: fx.Node, value: float, invert: bool, dtype: torch.dtype) -> fx.Node:
        call = self._builder.call
        if dtype is torch.float64 or torch.get_default_dtype() is not torch.float32:
            # Two numbers make a tensor of the default dtype, which may not hold them.
            zero = call(aten.full.default, [], 0.0, dtype=dtype, device=self._site.device)
            where = aten.where.ScalarOther if invert else aten.where.ScalarSelf
            return call(where, condition, *((zero, value) if invert else (value, zero)))
        return self._cast(call(aten.where.Scalar, condition, *((0.0, value) if invert else (value, 0.0))), dtype)

    @property
    def _counts(self) -> bool:
        """Whether numbers count: which of its keys a row attends that all terms together mask depends on them."""
        masks = [term for term in self._terms if isinstance(term, (Bias, Fill))]
        return sum(isinstance(term, Fill) or may_mask(term) for term in masks) > 1

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

    def _lifted(self, mask: fx.Node) -> fx.Node:
        """What :class:`Lift` says."""
        call = self._builder.call
        lift = self._lift
        assert self._written is not None
        written = call(aten.detach.default, call(aten.amax.default, self._written, [-1], True))
        infinite = call(aten.eq.Scalar, written, -math.inf)
        lifted = mask if lift is Lift.OPENED else call(aten.sub.Tensor, self._written, written)
        if lift is Lift.ABSORBED:
            self.absorbed_rows = call(aten.le.Scalar, written, ABSORBED)
        elif lift is Lift.SUBSET:
            # By a large positive number, too.
            self.absorbed_rows = call(aten.ge.Scalar, call(aten.abs.default, written), -ABSORBED)
        if mask is not self._written:
            # In float64 masks leave each other their digits, as in the formula; not where the formula absorbs them.
            own = call(aten.sub.Tensor, mask, call(aten.detach.default, call(aten.amax.default, mask, [-1], True)))
            own = self._cast(own, tensor(lifted).dtype)
            lifted = own if self.absorbed_rows is None else call(aten.where.self, self.absorbed_rows, lifted, own)
        lifted = call(aten.where.ScalarSelf, infinite, 0.0, lifted)
        if self._dtype is torch.float16:
            lifted = call(aten.clamp.default, lifted, torch.finfo(torch.float16).min)
        return lifted

    def operands_of_kernel(self, query: fx.Node, key: fx.Node) -> tuple[fx.Node, fx.Node]:
        """Query and key, (batch, heads, length, head_dim), so that no score counts that the source absorbed.

        Where the gradients need it the features are doubled: behind the query stands what was taken from it, behind the
        key its own difference from itself. That adds nothing to a score, and gives the key the gradient of the query.
        """
        own = self.query_of_kernel(query)
        if self.absorbed_rows is None or not self._site.doubles_features:
            return own, key
        call = self._builder.call
        taken = call(aten.where.ScalarOther, self.absorbed_rows, call(aten.detach.default, query), 0.0)
        nothing = call(aten.sub.Tensor, key, call(aten.detach.default, key))
        return call(aten.cat.default, [own, taken], -1), call(aten.cat.default, [key, nothing], -1)

    def query_of_kernel(self, query: fx.Node) -> fx.Node:
        """The query, (batch, heads, length, head_dim), zero in rows whose scores are not to count."""
        call = self._builder.call
        if self.opened_rows is not None:
            return call(aten.where.ScalarSelf, self.opened_rows, 0.0, query)
        if self.absorbed_rows is None:
            return query
        # Zero, but with the gradient of the query: the number that absorbed the scores was added to them.
        own = call(aten.where.ScalarOther, self.absorbed_rows, call(aten.detach.default, query), 0.0)
        return call(aten.sub.Tensor, query, own)

    def with_gradients(self, output: fx.Node, query: fx.Node, key: fx.Node, value: fx.Node) -> fx.Node:
        """The output, with the gradients that the kernel's backward pass does not give in rows without a key.

        Args:
            output: the kernel's, (batch, heads, length, features).
            query, key, value: the operands; the query before :meth:`query_of_kernel`.
        """
        scores, call = self._site.scores, self._builder.call
        absorbed = self.absorbed_rows is not None and self._lift is Lift.ABSORBED
        if absorbed and not scores.masked_rows.is_zero_unless_nan:
            assert scores.scale is not None
            output = call(ABSORBED_ROWS, output, query, key, value, self.absorbed_rows, scores.scale)
        return self.with_nan_gradients(output, query, key)

    def with_nan_gradients(self, output: fx.Node, query: fx.Node, key: fx.Node) -> fx.Node:
        """The output, with the gradients of rows that the source makes NaN before it sets their weights to zero."""
        if not self._site.scores.nan_gradients:
            return output
        assert self._written is not None
        lost = self._rows_without_key(self._infinite)
        return self._builder.call(NAN_ROWS, output, query, key, self._written, lost)

    @property
    def _infinite(self) -> float:
        """Rows whose scores are all lowered to this or further are NaN."""
        return UNDERFLOW if self._site.underflows else -math.inf

    def _within_range(self, mask: fx.Node) -> fx.Node:
        """CUDA kernels multiply by log2(e): what overflows there would turn a mean of the values into 0."""
        if self._lift > Lift.OPENED:
            return mask
        if self._site.device.type == "cpu" or self._site.fused or not self._site.scores.masked_rows.may_occur:
            return mask
        if not any(_may_be_below_absorbing(term) for term in self._terms):
            return mask
        # Drawn together, not cut off: a row attends its highest key.
        call = self._builder.call
        below = call(aten.sub.Scalar, call(aten.mul.Scalar, mask, 0.25), 0.75 * 2.0**100)
        if self._site.differentiable:
            # With the gradient of the number itself, NaN included; infinity's difference from itself is set to zero.
            nothing = call(aten.sub.Tensor, mask, call(aten.detach.default, mask))
            nothing = call(aten.nan_to_num.default, nothing)
            below = call(aten.add.Tensor, call(aten.detach.default, below), nothing)
        return call(aten.where.self, call(aten.lt.Scalar, mask, -(2.0**100)), below, mask)

    def _cast(self, node: fx.Node, dtype: torch.dtype | None = None) -> fx.Node:
        dtype = dtype or self._dtype
        return node if tensor(node).dtype is dtype else self._builder.call(aten.to.dtype, node, dtype)

    def _open_filled_rows(self) -> None:
        """Rows whose keys are all filled attend every key, with a query of zero: that gives the mean of the values.

        It is what a finite fill gives in the source, and no gradient reaches query and key there, as in the source.
        """
        call = self._builder.call
        self.opened_rows = self._filled_rows(self._terms)
        assert self.opened_rows is not None and self.node is not None
        if tensor(self.node).dtype is torch.bool:
            self.node = call(aten.logical_or.default, self.node, self.opened_rows)
        else:
            nothing: Any = 0.0
            if self._after_fill is not None:
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
            # Rows that minus infinity masks are zero with every kernel, unless they were opened; those in which finite
            # numbers make all exponentials zero are not.
            if self._lift is not Lift.NONE or (site.underflows and self.opened_rows is None):
                return call(aten.where.ScalarSelf, self._rows_without_key(self._infinite), 0.0, output)
            infinite = any(isinstance(term, Fill) and term.value == -math.inf for term in self._terms)
            if self.opened_rows is None or not infinite:
                return output
            return call(aten.where.ScalarSelf, self.opened_rows, 0.0, output)
        if rows.is_zero_unless_nan:
            lost = self._rows_zeroed() if self.opened_rows is None else self.opened_rows
            if rows.may_be_nan and self._lift is not Lift.NONE:
                # Those of minus infinity become NaN below, and that has to reach the kernel's gradients.
                becomes_nan = self._rows_without_key(self._infinite)
                lost = call(aten.logical_and.default, lost, call(aten.logical_not.default, becomes_nan))
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
        poison = call(aten.where.Scalar, self._but_zeroed(self.opened_rows), math.nan, 0.0)
        poison = call(aten.to.dtype, poison, site.compute_dtype)
        # What comes back to such a row may be NaN, and must not reach the kernel: NaN times a query of zero is NaN.
        output = call(aten.where.ScalarSelf, self.opened_rows, 0.0, output)
        return call(aten.add.Tensor, output, call(aten.mul.Tensor, total, poison))

    def _but_zeroed(self, rows: fx.Node) -> fx.Node:
        """The rows but for those that the output is replaced in: 0 times NaN would reach the value's gradient."""
        call = self._builder.call
        for mod in self._site.scores.output_mods:
            if isinstance(mod, Zero) and not mod.multiplied:
                zeroed = self._condition(mod.condition)
                keeps = zeroed if mod.invert else call(aten.logical_not.default, zeroed)
                rows = call(aten.logical_and.default, rows, keeps)
        return rows

    def _nan_where_no_key(self, dtype: torch.dtype) -> fx.Node:
        """A factor for the output: 1, and NaN in rows whose scores are all minus infinity, as softmax gives there."""
        call = self._builder.call
        lost = self._rows_without_key(self._infinite)
        if self._site.scores.nan_gradients:
            lost = self._but_zeroed(lost)
        factor = call(aten.where.Scalar, lost, math.nan, 1.0)
        return factor if tensor(factor).dtype is dtype else call(aten.to.dtype, factor, dtype)

    def _keys_where_rounded(self, dtype: torch.dtype) -> fx.Node:
        """A factor: what the weights add up to in rows that finite numbers mask.

        The source's logsumexp of n scores m is m + log(n), rounded, and each weight exp(m - logsumexp): 1 / n, or 1
        where m has swallowed the logarithm.
        """
        call, wide = self._builder.call, self._site.softmax_dtype
        kind = {"dtype": wide, "device": self._site.device}
        if self.opened_rows is not None:
            numbers = [term.value for term in self._terms if isinstance(term, Fill) and term.value != -math.inf]
            rounded = self.opened_rows if numbers else call(aten.zeros_like.default, self.opened_rows)
            keys = call(aten.full.default, [], _key_length(self._site), **kind)
            highest = call(aten.full.default, [], max(numbers, default=0.0), **kind)
        else:
            node = self._written
            assert node is not None
            infinite = self._rows_without_key(-math.inf)
            rounded = call(aten.logical_and.default, self._rows_without_key(), call(aten.logical_not.default, infinite))
            # Those that the row's highest number masks; lower ones have the weight 0. In other rows this overflows,
            # which must not reach the gradient.
            node = call(aten.detach.default, node)
            highest = call(aten.amax.default, node, [-1], True)
            least = call(aten.mul.Scalar, highest, 1 + 2.0**-16)
            least = call(aten.clamp.default, least, torch.finfo(tensor(node).dtype).min)
            keys = call(aten.sum.dim_IntList, call(aten.ge.Tensor, node, least), [-1], True)
            keys, highest = self._cast(keys, wide), self._cast(highest, wide)
        logsumexp = call(aten.add.Tensor, highest, call(aten.log.default, keys))
        weight = call(aten.exp.default, call(aten.sub.Tensor, highest, logsumexp))
        factor = call(aten.where.ScalarOther, rounded, call(aten.mul.Tensor, keys, weight), 1.0)
        return self._cast(factor, dtype)

    def _rows_zeroed(self) -> fx.Node:
        """Rows without a key, whose weights the source sets to zero."""
        if all(isinstance(term, Raise) or term.dtype.itemsize >= 4 for term in self._terms):
            return self._rows_without_key()
        # Float16 masks with numbers that other scores may add up to.
        call = self._builder.call
        lost: fx.Node | None = None
        placed = (*self._site.scores.value_mods, *self._site.scores.output_mods)
        for mod in self._site.weight_mods:
            if isinstance(mod, Zero) and mod not in placed:
                zeroed = self._condition(mod.condition)
                zeroed = call(aten.logical_not.default, zeroed) if mod.invert else zeroed
                lost = zeroed if lost is None else call(aten.logical_or.default, lost, zeroed)
        return self._rows_without_key() if lost is None else call(aten.all.dim, lost, -1, True)

    def _rows_without_key(self, masked: float = FAR_BELOW) -> fx.Node:
        """Rows whose scores are all lowered to ``masked`` or further."""
        call = self._builder.call
        with_sink = self._site.sink is not None and not self._site.sink_is_shifted
        node = self.node if with_sink else self._written
        assert node is not None
        if tensor(node).dtype is torch.bool:
            return call(aten.logical_not.default, call(aten.any.dim, node, -1, True))
        highest = call(aten.amax.default, node, [-1], True)
        return call(aten.le.Scalar, highest, masked)


def _key_length(site: CanonicalAttention) -> int | torch.SymInt:
    return size_of(site.key_axes)


def _may_be_below_absorbing(term: Bias | Fill | Floor | Raise) -> bool:
    if isinstance(term, Raise):
        return False
    if not isinstance(term, Bias):
        return -math.inf < term.value < ABSORBING
    return any(
        value is ValueKind.ANY or (isinstance(value, float) and -math.inf < (term.of(value) or 0.0) < ABSORBING)
        for value in possible_values(term.operand.node)
    )
