"""``native``: ``torch.nn.functional.scaled_dot_product_attention``, whose selector picks the kernel for the hardware.

Source: https://github.com/pytorch/pytorch/blob/v2.13.0/aten/src/ATen/native/transformers/attention.cpp
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from attnrewrite.analysis.masks import ABSORBING, ORDINARY, Kind, possible_values
from attnrewrite.analysis.views import Axis, Dim, Operand, size_of
from attnrewrite.ir import Builder, same, tensor
from attnrewrite.kernels.base import Availability, Verdict
from attnrewrite.kernels.layout import lay_out, with_unit_stride
from attnrewrite.site import AttentionSite, Bias, Fill, Scale

__all__ = ["TorchMath", "TorchSDPA"]

aten = torch.ops.aten

_TESTED_DEVICES = ("cpu", "cuda")


class TorchSDPA:
    """PyTorch's own fused attention.

    Rows whose keys are all masked (measured, torch 2.13 on CPU, 2.11 on an H200): with minus infinity every back end
    gives 0; with a finite mask the CPU's kernel and MATH give the mean of the values, while the CUDA kernels do so only
    if the mask survives a multiplication by log2(e). What the source gives such rows is restored in :meth:`emit`.
    """

    name = "native"

    def availability(self) -> Availability:
        return Availability(True, f"part of torch {torch.__version__}")

    def supports(self, site: AttentionSite) -> Verdict:
        scores = site.scores
        assert scores is not None
        if not site.compute_dtype.is_floating_point:
            return Verdict.no(f"takes floating-point operands, not {site.compute_dtype}")
        if any(same(axis.size, 0) for axis in site.key_axes):
            return Verdict.no("there is no key to attend to")
        if site.fused and tensor(site.result).dim() != 4 and site.device.type != "cpu" and scores.masked_rows != "none":
            return Verdict.no(
                "the call has not four dimensions, so PyTorch's MATH serves it, and what the fused kernels give rows "
                "whose keys are all masked is something else"
            )
        if _backward_loses_rows(site):
            return Verdict.no(
                "a bias may lower or raise a whole row of scores by a large amount, whose softmax the fused backward "
                "passes cannot restore from its logarithm (if every row has a key at ordinary scores, say so: "
                "options={'assume_attended_rows': True})"
            )
        return self._supports_device(site)

    def _supports_device(self, site: AttentionSite) -> Verdict:
        scores = site.scores
        assert scores is not None
        if (
            site.device.type not in _TESTED_DEVICES
            and scores.masked_rows != "none"
            and not site.fused
            and not scores.fills_decide
        ):
            return Verdict.no(
                f"what {site.device.type} gives rows whose keys are all masked is not known, and no such row could be "
                "ruled out (if none occurs, say so: options={'assume_attended_rows': True})"
            )
        if site.device.type != "cpu" and site.compute_dtype.itemsize < 4 and not site.fused:
            return self._supports_half(site)
        return Verdict.yes()

    def _supports_half(self, site: AttentionSite) -> Verdict:
        """Off the CPU the mask must have the query's dtype; a wider one would be rounded, or give NaN in cuDNN."""
        assert site.scores is not None
        for term in site.scores.terms:
            if isinstance(term, Bias) and term.dtype.itemsize > site.compute_dtype.itemsize:
                return Verdict.no(
                    f"the bias is added in {term.dtype}, and the kernels here round it to {site.compute_dtype}"
                )
            if (
                isinstance(term, Fill)
                and term.value != -math.inf
                and site.compute_dtype is torch.float16
                and site.scores.masked_rows != "none"
                and not site.scores.fills_decide
            ):
                return Verdict.no(
                    "float16 holds no number that masks a score and keeps the mean of the values in a row whose keys "
                    "are all masked, and no such row could be ruled out (if none occurs, say so: "
                    "options={'assume_attended_rows': True})"
                )
        return Verdict.yes()

    def emit(self, site: AttentionSite, builder: Builder) -> fx.Node:
        scores = site.scores
        assert scores is not None
        plan = _Plan.of(site)
        query = self._operand(builder, site, site.query, plan.query_dims, scores.query_factors)
        key = self._operand(builder, site, site.key, plan.key_dims, scores.key_factors)
        value = self._operand(builder, site, site.value, plan.value_dims, ())
        mask = _Mask(builder, site, plan.score_dims)
        batch, heads, length, _ = tensor(query).shape
        if mask.opened_rows is not None:
            query = builder.call(aten.where.ScalarSelf, mask.opened_rows, 0.0, query)
        fake = tensor(query).new_empty((batch, heads, length, tensor(value).shape[-1]))
        output = self._call(
            builder,
            (query, key, value, mask.node, site.dropout, site.is_causal),
            {"scale": scores.scale, "enable_gqa": plan.grouped},
            fake,
        )
        if not site.fused and mask.node is not None:
            output = mask.with_source_rows(output, value, plan)
        dtype = tensor(site.result).dtype
        if tensor(output).dtype is not dtype:
            output = builder.call(aten.to.dtype, output, dtype)
        return lay_out(builder, output, plan.output_dims, site.result_layout)

    def _call(self, builder: Builder, args: tuple[Any, ...], kwargs: dict[str, Any], fake: torch.Tensor) -> fx.Node:
        return builder.insert(aten.scaled_dot_product_attention.default, args, kwargs, fake)

    def _operand(
        self, builder: Builder, site: AttentionSite, operand: Operand, dims: tuple[Dim, ...], factors: tuple[Scale, ...]
    ) -> fx.Node:
        node = lay_out(builder, operand.node, operand.layout, dims, expand=True)
        for factor in factors:
            amount = factor.factor
            if isinstance(amount, Operand):
                amount = lay_out(builder, amount.node, amount.layout, dims)
            node = builder.call(aten.div.Tensor if factor.divide else aten.mul.Tensor, node, amount)
        if tensor(node).dtype is not site.compute_dtype:
            node = builder.call(aten.to.dtype, node, site.compute_dtype)
        return with_unit_stride(builder, node)


class TorchMath(TorchSDPA):
    """``_native_math``: the same function out of matrix products and softmax, with their exact backward.

    It keeps the scores in memory, as the source did; repeated keys and values are not.
    """

    name = "_native_math"

    def supports(self, site: AttentionSite) -> Verdict:
        if any(same(axis.size, 0) for axis in site.key_axes):
            return Verdict.no("there is no key to attend to")
        return self._supports_device(site)

    def _call(self, builder: Builder, args: tuple[Any, ...], kwargs: dict[str, Any], fake: torch.Tensor) -> fx.Node:
        query, key, value, mask, dropout, causal = args
        if mask is not None and tensor(mask).dtype is torch.bool:
            # The public function turns a boolean mask into numbers; this operator adds it as ones and zeros.
            mask = builder.call(aten.where.Scalar, mask, 0.0, -math.inf)
            mask = builder.call(aten.to.dtype, mask, tensor(query).dtype)
        both = (fake, fake.new_empty((*fake.shape[:-1], tensor(key).shape[-2])))
        result = builder.insert(
            aten._scaled_dot_product_attention_math.default, (query, key, value, mask, dropout, causal), kwargs, both
        )
        return builder.insert(operator.getitem, (result, 0), {}, fake)


def _backward_loses_rows(site: AttentionSite) -> bool:
    """Fused backward passes restore softmax as exp(score - logsumexp), and logsumexp = max + log(sum) in float32.

    Where the largest score of a row is far from zero the logarithm is rounded away, and the row's weights no longer
    add up to one. Scores get there by a bias that moves whole rows. A fused call of four dimensions that is in the
    source has this already.
    """
    scores = site.scores
    assert scores is not None
    if not site.differentiable or (site.fused and tensor(site.result).dim() == 4):
        return False
    for term in scores.terms:
        if not isinstance(term, Bias):
            continue
        for value in possible_values(term.operand.node):
            if value is Kind.ANY and scores.attended is None:
                return True
            if isinstance(value, float) and (
                value * term.factor > ORDINARY or (value * term.factor < -ORDINARY and scores.attended is None)
            ):
                return True
    return False


@dataclass(frozen=True)
class _Plan:
    """The four dimensions of each operand: (batch, heads, length, features)."""

    query_dims: tuple[Dim, ...]
    key_dims: tuple[Dim, ...]
    value_dims: tuple[Dim, ...]
    score_dims: tuple[Dim, ...]
    output_dims: tuple[Dim, ...]
    grouped: bool

    @staticmethod
    def of(site: AttentionSite) -> _Plan:
        """The last shared axis is the head, unless groups of query heads share the only one; the others are batch."""
        shared, group = site.shared_axes, site.group_axes
        split = len(shared) - 1 if len(shared) > 1 else len(shared) if group else min(len(shared), 1)
        batch: tuple[Axis, ...] = shared[:split]
        heads: tuple[Axis, ...] = shared[split:]
        query_heads = (*heads, *group)
        return _Plan(
            query_dims=(batch, query_heads, site.query_axes, site.feature_axes),
            key_dims=(batch, heads, site.key_axes, site.feature_axes),
            value_dims=(batch, heads, site.key_axes, site.value_axes),
            score_dims=(batch, query_heads, site.query_axes, site.key_axes),
            output_dims=(batch, query_heads, site.query_axes, site.value_axes),
            grouped=bool(group),
        )


class _Mask:
    """The site's terms as one tensor (batch or 1, heads or 1, query length or 1, key length), boolean or additive."""

    def __init__(self, builder: Builder, site: AttentionSite, dims: tuple[Dim, ...]) -> None:
        assert site.scores is not None
        self._builder = builder
        self._site = site
        self._dims = dims
        self._terms = site.scores.terms
        self.node: fx.Node | None = None
        self.opened_rows: fx.Node | None = None
        if not self._terms:
            return
        (first, *more) = self._terms
        if not more and isinstance(first, Fill) and first.value == -math.inf:
            condition = self._laid_out(first.condition)
            self.node = condition if first.invert else builder.call(aten.logical_not.default, condition)
        else:
            self.node = self._within_range(self._replayed())
        if site.scores.fills_decide:
            self._open_filled_rows()
        # The CPU's kernel takes a mask whose keys broadcast, the CUDA kernels do not.
        if not same(tensor(self.node).shape[-1], _key_length(site)):
            shape = [*tensor(self.node).shape[:-1], _key_length(site)]
            self.node = builder.call(aten.expand.default, self.node, shape)

    def _laid_out(self, operand: Operand) -> fx.Node:
        return lay_out(self._builder, operand.node, operand.layout, self._dims)

    @property
    def _dtype(self) -> torch.dtype:
        """The CPU's kernel takes float32 masks with half-precision operands; elsewhere the dtypes must agree."""
        compute = self._site.compute_dtype
        if self._site.device.type != "cpu" or compute.itemsize > 4:
            return compute
        assert self._site.scores is not None
        only_biases = all(isinstance(term, Bias) for term in self._terms)
        return compute if only_biases and all(_dtype_of(term) is compute for term in self._terms) else torch.float32

    def _replayed(self) -> fx.Node:
        """What the source does to the scores, done to zeros."""
        call = self._builder.call
        total: fx.Node | None = None
        for term in self._terms:
            if isinstance(term, Bias):
                bias = self._cast(self._laid_out(term.operand))
                if term.factor != 1:
                    bias = call(aten.mul.Scalar, bias, term.factor)
                total = bias if total is None else call(aten.add.Tensor, total, bias)
                continue
            condition = self._laid_out(term.condition)
            value = self._fill_value(term)
            if total is None:
                filled = (0.0, value) if term.invert else (value, 0.0)
                total = self._cast(call(aten.where.Scalar, condition, *filled))
            elif term.invert:
                total = call(aten.where.ScalarOther, condition, total, value)
            else:
                total = call(aten.where.ScalarSelf, condition, value, total)
        assert total is not None
        return total

    def _fill_value(self, term: Fill) -> float:
        """A fill replaces the score, a mask is added to it: the number must swallow any score, and stay finite."""
        if term.value == -math.inf:
            return -math.inf
        return -math.inf if self._dtype is torch.float16 else ABSORBING

    def _within_range(self, mask: fx.Node) -> fx.Node:
        """CUDA kernels multiply by log2(e): what overflows there would turn a mean of the values into 0."""
        assert self._site.scores is not None
        if self._site.device.type == "cpu" or self._site.fused or self._site.scores.masked_rows == "none":
            return mask
        if not any(isinstance(term, Bias) and _may_be_below_absorbing(term) for term in self._terms):
            return mask
        call = self._builder.call
        clamped = call(aten.clamp.default, mask, ABSORBING)
        return call(aten.where.self, call(aten.eq.Scalar, mask, -math.inf), mask, clamped)

    def _cast(self, node: fx.Node) -> fx.Node:
        return node if tensor(node).dtype is self._dtype else self._builder.call(aten.to.dtype, node, self._dtype)

    def _open_filled_rows(self) -> None:
        """Rows whose keys are all filled attend every key, with a query of zero: that gives the mean of the values.

        It is what a finite fill gives in the source, and no gradient reaches query and key there, as in the source.
        """
        call = self._builder.call
        filled: fx.Node | None = None
        for term in self._terms:
            if isinstance(term, Fill):
                condition = self._laid_out(term.condition)
                condition = call(aten.logical_not.default, condition) if term.invert else condition
                filled = condition if filled is None else call(aten.logical_or.default, filled, condition)
        assert filled is not None and self.node is not None
        self.opened_rows = call(aten.all.dim, filled, -1, True)
        if tensor(self.node).dtype is torch.bool:
            self.node = call(aten.logical_or.default, self.node, self.opened_rows)
        else:
            self.node = call(aten.where.ScalarSelf, self.opened_rows, 0.0, self.node)

    def with_source_rows(self, output: fx.Node, value: fx.Node, plan: _Plan) -> fx.Node:
        """The output with what the source gives rows that have no key, where that is NaN."""
        site, call = self._site, self._builder.call
        assert site.scores is not None
        if site.scores.masked_rows != "NaN":
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
        if plan.grouped:
            groups = size_of(site.group_axes)
            total = call(aten.repeat_interleave.self_int, total, groups, 1)
        poison = call(aten.where.Scalar, self.opened_rows, math.nan, 0.0)
        poison = call(aten.to.dtype, poison, site.compute_dtype)
        return call(aten.add.Tensor, output, call(aten.mul.Tensor, total, poison))

    def _nan_where_no_key(self, dtype: torch.dtype) -> fx.Node:
        """A factor for the output: 1, and NaN in rows whose scores are all minus infinity, as softmax gives there."""
        call = self._builder.call
        assert self.node is not None
        if tensor(self.node).dtype is torch.bool:
            empty = call(aten.logical_not.default, call(aten.any.dim, self.node, -1, True))
        else:
            empty = call(aten.eq.Scalar, call(aten.amax.default, self.node, [-1], True), -math.inf)
        factor = call(aten.where.Scalar, empty, math.nan, 1.0)
        return factor if tensor(factor).dtype is dtype else call(aten.to.dtype, factor, dtype)


def _key_length(site: AttentionSite) -> int | torch.SymInt:
    return size_of(site.key_axes)


def _dtype_of(term: Bias | Fill) -> torch.dtype | None:
    return term.operand.dtype if isinstance(term, Bias) else None


def _may_be_below_absorbing(term: Bias) -> bool:
    return any(
        value is Kind.ANY or (isinstance(value, float) and -math.inf < value * term.factor < ABSORBING)
        for value in possible_values(term.operand.node)
    )
