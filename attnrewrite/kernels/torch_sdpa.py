"""``native``: ``torch.nn.functional.scaled_dot_product_attention``, whose selector picks the kernel for the hardware.

Source: https://github.com/pytorch/pytorch/blob/v2.13.0/aten/src/ATen/native/transformers/attention.cpp
"""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from attnrewrite.analysis.values import FAR_BELOW, ORDINARY, Range, ValueKind, possible_values
from attnrewrite.ir.axes import Operand, size_of
from attnrewrite.ir.builder import Builder
from attnrewrite.ir.nodes import same, tensor
from attnrewrite.ir.rounding import as_stored
from attnrewrite.ir.site import Bias, CanonicalAttention, Fill, Lift, Raise
from attnrewrite.kernels.common.any_length import ATTENTION_OF_ANY_LENGTH
from attnrewrite.kernels.common.base import Kernel
from attnrewrite.kernels.common.layout import KernelLayout, padded, with_unit_stride
from attnrewrite.kernels.common.limits import Capability, Limits, capability_of
from attnrewrite.kernels.common.mask import Mask
from attnrewrite.kernels.common.verdict import Availability, Verdict
from attnrewrite.kernels.known_wrong import known_to_be_wrong
from attnrewrite.kernels.torch_limits import MATH, NATIVE

__all__ = ["TESTED_ON", "TorchMath", "TorchSDPA", "with_what_is_not_finite"]

aten = torch.ops.aten

TESTED_ON = "NVIDIA H100, torch 2.11; x86 CPU, torch 2.13"


class TorchSDPA(Kernel):
    """PyTorch's own fused attention.

    Rows whose keys are all masked (measured, torch 2.13 on CPU, 2.11 on an H200): with minus infinity every back end
    gives 0; with a finite mask the CPU's kernel and MATH give the mean of the values, while the CUDA kernels do so only
    if the mask survives a multiplication by log2(e). What the source gives such rows is restored in :meth:`emit`.
    """

    name = "native"
    selects = True
    """PyTorch's selector picks the back end."""
    automatic = True
    emits_aten = True
    takes_unbacked = True
    needs = "PyTorch"
    limits: Limits = NATIVE
    run_on = TESTED_ON

    def availability(self) -> Availability:
        return Availability(True, f"part of torch {torch.__version__}")

    def supports(self, site: CanonicalAttention) -> Verdict:
        return self.verdict(site, capability_of(site.device))

    def verdict(self, site: CanonicalAttention, capability: Capability | None) -> Verdict:
        """What the kernel would say of the site on a GPU of this compute capability; None if it is none, or unknown."""
        scores = site.scores
        if scores.inexpressible:
            return Verdict.no(scores.inexpressible)
        if not site.compute_dtype.is_floating_point:
            return Verdict.no(f"takes floating-point operands, not {site.compute_dtype}")
        if any(same(axis.size, 0) for axis in site.key_axes):
            return Verdict.no("there is no key to attend to")
        if site.fused and tensor(site.result).dim() != 4 and site.device.type != "cpu" and scores.masked_rows.may_occur:
            return Verdict.no(
                "the call does not have four dimensions, so PyTorch serves it with its MATH back end, which gives rows "
                "whose keys are all masked something else than the fused kernels do"
            )
        wrong = known_to_be_wrong(self.name, site, capability)
        if wrong:
            return Verdict.no(wrong)
        if _backward_loses_rows(site):
            return Verdict.no(
                "a bias may lower or raise a whole row of scores by a large amount, and the backward passes of fused "
                "kernels lose such a row to rounding (if every row has a key with an ordinary score, say so: "
                "options={'assume_attended_rows': True})"
            )
        return self._supports_device(site)

    def _supports_device(self, site: CanonicalAttention) -> Verdict:
        scores = site.scores
        if (
            site.device.type not in NATIVE.devices
            and scores.masked_rows.may_occur
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

    def _supports_half(self, site: CanonicalAttention) -> Verdict:
        """Off the CPU the mask must have the query's dtype; a wider one would be rounded, or give NaN in cuDNN."""
        if isinstance(site.sink, Operand) and site.sink.dtype.itemsize > site.compute_dtype.itemsize:
            return Verdict.no(
                f"the sink is in {site.sink.dtype}, and the kernels on this device round it to {site.compute_dtype}"
            )
        if isinstance(site.sink, float) and 1 < site.sink < math.inf and not _keeps(site.compute_dtype, site.sink):
            return Verdict.no(
                f"the sink is {site.sink:g}, and the kernels on this device round it to {site.compute_dtype}"
            )
        for term in site.scores.terms:
            if isinstance(term, Raise) and site.compute_dtype is torch.float16:
                return Verdict.no(
                    "the maximum of the row is subtracted between masks, and what is left of them leaves the range of "
                    "float16"
                )
            if isinstance(term, Bias) and _is_rounded(term, site):
                return Verdict.no(
                    f"the bias is added in {term.dtype}, and the kernels on this device round it to "
                    f"{site.compute_dtype}"
                )
            if (
                isinstance(term, Fill)
                and term.value != -math.inf
                and site.compute_dtype is torch.float16
                and site.scores.masked_rows.may_occur
                and not site.scores.fills_decide
            ):
                return Verdict.no(
                    "float16 holds no number that masks a score and keeps the mean of the values in a row whose keys "
                    "are all masked, and no such row could be ruled out (if none occurs, say so: "
                    "options={'assume_attended_rows': True})"
                )
        return Verdict.yes()

    def emit(self, site: CanonicalAttention, builder: Builder) -> fx.Node:
        scores = site.scores
        layout = KernelLayout.of(site)
        query, key, value = layout.operands(builder, site, finish=with_unit_stride)
        mask = Mask(builder, site, layout.score_dims)
        if site.sink is not None:
            # One more key of zeros, whose score is the sink's and whose value adds nothing.
            key, value = (padded(builder, part, -2, 0.0) for part in (key, value))
        batch, heads, length, _ = tensor(query).shape
        own = query, key
        query, key = mask.operands_of_kernel(query, key)
        if mask.node is not None and not same(tensor(mask.node).stride()[-1], 0):
            # A permuted bias (T5's) is read slowly, or sends the call to PyTorch's MATH; layers share the copy. Not so
            # one that is expanded over the keys.
            mask.node = with_unit_stride(builder, mask.node)
        fake = tensor(query).new_empty((batch, heads, length, tensor(value).shape[-1]))
        output = self._call(
            builder,
            site,
            (query, key, value, mask.node, site.dropout, scores.is_causal),
            {"scale": scores.scale, "enable_gqa": layout.grouped},
            fake,
        )
        if not self.keeps_scores:
            output = with_what_is_not_finite(builder, site, output, own, mask.node is not None)
        if not site.fused and mask.node is not None:
            output = mask.with_gradients(output, *own, value)
            output = mask.with_source_rows(output, value, layout)
        return layout.as_result(builder, site, output)

    def _call(
        self,
        builder: Builder,
        site: CanonicalAttention,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        fake: torch.Tensor,
    ) -> fx.Node:
        if site.lengths_that_may_be_zero:
            *operands, _, is_causal = args
            numbers = (is_causal, kwargs["scale"], kwargs["enable_gqa"])
            return builder.insert(ATTENTION_OF_ANY_LENGTH, (*operands, *numbers), {}, fake)
        return builder.insert(aten.scaled_dot_product_attention.default, args, kwargs, fake)


_VECTOR = 16
"""The most float32 numbers that the CPU's kernel takes at once."""


def with_what_is_not_finite(
    builder: Builder, site: CanonicalAttention, output: fx.Node, operands: tuple[fx.Node, fx.Node], masked: bool
) -> fx.Node:
    """The output, NaN in rows where query or key is not finite and PyTorch's CPU kernel may give finite numbers.

    See ``known_wrong``. A call in the source gives what it gave; one whose mask was proved to be a causal one, say,
    does not. Where the query is not finite, neither are its scores. A key that is not finite counts for all rows.

    Args:
        operands: query and key, as the kernel takes them.
        masked: the kernel gets a mask.
    """
    query, key = operands
    unmasked_call = site.fused and not any(isinstance(mod, (Bias, Fill)) for mod in site.mods)
    if site.device.type != "cpu" or unmasked_call or (site.fused and masked):
        return output
    few = not masked and not statically_known_true(size_of(site.key_axes) >= _VECTOR)
    if few or site.in_half:
        output = builder.call(aten.add.Tensor, output, _zeros_or_nan(builder, query, [-1]))
    if site.in_half:
        nothing = _zeros_or_nan(builder, key, [-2, -1])
        groups = tensor(query).shape[1] // tensor(key).shape[1] if not same(tensor(key).shape[1], 0) else 1
        if not same(groups, 1):
            nothing = builder.call(aten.repeat_interleave.self_int, nothing, groups, 1)
        output = builder.call(aten.add.Tensor, output, nothing)
    return output


def _zeros_or_nan(builder: Builder, operand: fx.Node, dims: list[int]) -> fx.Node:
    """Zero where all entries along ``dims`` are finite, and NaN elsewhere."""
    zeros = builder.call(aten.mul.Scalar, builder.call(aten.detach.default, operand), 0.0)
    return builder.call(aten.sum.dim_IntList, zeros, dims, True)


def _keeps(dtype: torch.dtype, number: float) -> bool:
    """Whether the dtype holds the number as exactly as it does numbers near one."""
    return abs(torch.tensor(number, dtype=dtype).item() - number) <= torch.finfo(dtype).eps


def _is_rounded(term: Bias, site: CanonicalAttention) -> bool:
    """Whether the dtype of the query holds less of what is added than softmax sees of it."""
    if term.dtype.itemsize <= site.compute_dtype.itemsize:
        return False
    values = [term.of(value) if isinstance(value, float) else None for value in possible_values(term.operand.node)]
    if site.scores.attended is None and site.scores.lift < Lift.ROWS:
        return True
    return not all(
        value is not None and (value <= FAR_BELOW or as_stored(value, site.compute_dtype) == value) for value in values
    )


class TorchMath(TorchSDPA):
    """``_native_math``: the same function out of matrix products and softmax, with their exact backward.

    It keeps the scores in memory, as the source did; repeated keys and values are not.
    """

    name = "_native_math"
    keeps_scores = True
    takes_unbacked = False
    limits = MATH

    def verdict(self, site: CanonicalAttention, capability: Capability | None) -> Verdict:
        if site.scores.inexpressible:
            return Verdict.no(site.scores.inexpressible)
        if any(same(axis.size, 0) for axis in site.key_axes):
            return Verdict.no("there is no key to attend to")
        return self._supports_device(site)

    def _call(
        self,
        builder: Builder,
        site: CanonicalAttention,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        fake: torch.Tensor,
    ) -> fx.Node:
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


def _backward_loses_rows(site: CanonicalAttention) -> bool:
    """Fused backward passes restore softmax as exp(score - logsumexp), and logsumexp = max + log(sum) in float32.

    Where the largest score of a row is far from zero the logarithm is rounded away, and the row's weights no longer
    add up to one. Scores get there by a bias that moves whole rows. A fused call of four dimensions that is in the
    source has this already.
    """
    scores = site.scores
    if scores.lift > Lift.OPENED:
        return False
    if not site.differentiable or (site.fused and tensor(site.result).dim() == 4):
        return False
    for term in scores.terms:
        if not isinstance(term, Bias):
            continue
        for value in possible_values(term.operand.node):
            # Of numbers that are computed from positions the highest: below it lies a mask that was added to them.
            number = value.high if isinstance(value, Range) and value.high < -ORDINARY else value
            added = term.of(number) if isinstance(number, float) else None
            if (value is ValueKind.ANY or (isinstance(value, float) and added is None)) and scores.attended is None:
                return True
            if added is not None and (added > ORDINARY or (added < -ORDINARY and scores.attended is None)):
                return True
    return False
