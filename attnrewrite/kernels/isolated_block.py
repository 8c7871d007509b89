"""``isolated_block``: each position of a block attends to itself and to all positions outside the block.

It is the perturbed half of PAG in joint attention: image patches see themselves and the text. No mask is needed:

    rows outside the block    softmax(scores) @ value                     over all keys
    row i of the block        w * value[i] + (1 - w) * rest               with the weight of one score among all,
                              w = sigmoid(score[i, i] - logsumexp(scores of the keys outside))

where ``rest`` is attention to the keys outside the block. The block is multiplied with the few keys outside it, and not
with itself.
"""

from __future__ import annotations

import operator

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from attnrewrite.ir.axes import size_of
from attnrewrite.ir.builder import Builder
from attnrewrite.ir.nodes import Size, same, tensor
from attnrewrite.ir.site import CanonicalAttention
from attnrewrite.kernels.common.base import Kernel
from attnrewrite.kernels.common.layout import KernelLayout, with_unit_stride
from attnrewrite.kernels.common.verdict import Availability, Verdict
from attnrewrite.kernels.torch_sdpa import with_what_is_not_finite

__all__ = ["IsolatedBlock"]

aten = torch.ops.aten


class IsolatedBlock(Kernel):
    """Two calls without a mask, and one score for each position of the block."""

    name = "isolated_block"
    automatic = True
    computes_less = True
    needs = "PyTorch, a CPU"
    run_on = "x86 CPU, torch 2.13"

    def availability(self) -> Availability:
        return Availability(True, f"part of torch {torch.__version__}")

    def concerns(self, site: CanonicalAttention) -> bool:
        return site.scores.isolated is not None

    def supports(self, site: CanonicalAttention) -> Verdict:
        scores = site.scores
        if scores.isolated is None:
            return Verdict.no("the mask does not isolate a block of positions from each other")
        if site.device.type != "cpu":
            return Verdict.no(f"was never tested on {site.device.type}")
        if site.differentiable:
            return Verdict.no(
                "has no backward pass: PyTorch's logsumexp has no gradient (run it under torch.no_grad())"
            )
        if site.dropout or site.sink is not None or scores.inexpressible:
            return Verdict.no("takes no dropout, no sink and no function of the scores")
        if scores.scale is None:
            return Verdict.no("takes no symbolic scale")
        if site.group_axes:
            return Verdict.no("needs as many key heads as query heads")
        if not same(size_of(site.feature_axes), size_of(site.value_axes)):
            return Verdict.no("takes values of the query's head size")
        if not site.compute_dtype.is_floating_point or site.compute_dtype.itemsize < 2:
            return Verdict.no(f"takes floating-point operands, not {site.compute_dtype}")
        start, stop = scores.isolated
        length = size_of(site.key_axes)
        proper = statically_known_true(start < stop) and statically_known_true(stop - start < length)
        if not (proper and statically_known_true(start >= 0) and statically_known_true(stop <= length)):
            return Verdict.no("the block may be empty, or may hold every key")
        return Verdict.yes()

    def emit(self, site: CanonicalAttention, builder: Builder) -> fx.Node:
        scores = site.scores
        assert scores.isolated is not None and scores.scale is not None
        layout = KernelLayout.of(site)
        query, key, value = layout.operands(builder, site)
        parts = _Parts(builder, *scores.isolated, length=size_of(site.key_axes))
        rows = parts.outside(query)
        attended = self._attended(builder, rows, key, value, scores.scale)
        outside = with_what_is_not_finite(builder, site, attended, (rows, key), masked=False)
        block = parts.block(query), parts.block(key), parts.block(value)
        inside = self._isolated(builder, block, parts.outside(key), parts.outside(value), scores.scale)
        return layout.as_result(builder, site, parts.joined(inside, outside))

    def _attended(self, builder: Builder, query: fx.Node, key: fx.Node, value: fx.Node, scale: float) -> fx.Node:
        operands = [with_unit_stride(builder, node) for node in (query, key, value)]
        return builder.call(aten.scaled_dot_product_attention.default, *operands, scale=scale)

    def _isolated(
        self, builder: Builder, block: tuple[fx.Node, fx.Node, fx.Node], key: fx.Node, value: fx.Node, scale: float
    ) -> fx.Node:
        """The rows of the block, whose own score is one more beside those of the keys outside."""
        call = builder.call
        query, own_key, own_value = block
        dtype = tensor(query).dtype
        wide = torch.promote_types(dtype, torch.float32)
        pair = call(
            torch.ops.attnrewrite.attend_with_logsumexp.default,
            *(with_unit_stride(builder, node) for node in (query, key, value)),
            scale,
        )
        rest, logsumexp = (
            builder.insert(operator.getitem, (pair, place), {}, pair.meta["val"][place]) for place in (0, 1)
        )
        products = call(aten.mul.Tensor, call(aten.to.dtype, query, wide), call(aten.to.dtype, own_key, wide))
        score = call(aten.mul.Tensor, call(aten.sum.dim_IntList, products, [-1]), scale)
        above = call(aten.unsqueeze.default, call(aten.sub.Tensor, score, call(aten.to.dtype, logsumexp, wide)), -1)
        own = call(aten.mul.Tensor, call(aten.sigmoid.default, above), own_value)
        others = call(aten.mul.Tensor, call(aten.sigmoid.default, call(aten.neg.default, above)), rest)
        return call(aten.to.dtype, call(aten.add.Tensor, own, others), dtype)


class _Parts:
    """The positions from ``start`` to ``stop``, and the others, of tensors (batch, heads, length, features)."""

    def __init__(self, builder: Builder, start: Size, stop: Size, length: Size) -> None:
        self._builder = builder
        self._start, self._stop, self._length = start, stop, length

    def _slice(self, node: fx.Node, start: Size, stop: Size) -> fx.Node | None:
        return None if same(start, stop) else self._builder.call(aten.slice.Tensor, node, 2, start, stop)

    def _together(self, parts: list[fx.Node | None]) -> fx.Node:
        present = [part for part in parts if part is not None]
        return present[0] if len(present) == 1 else self._builder.call(aten.cat.default, present, 2)

    def block(self, node: fx.Node) -> fx.Node:
        part = self._slice(node, self._start, self._stop)
        assert part is not None
        return part

    def outside(self, node: fx.Node) -> fx.Node:
        return self._together([self._slice(node, 0, self._start), self._slice(node, self._stop, self._length)])

    def joined(self, inside: fx.Node, outside: fx.Node) -> fx.Node:
        before = self._slice(outside, 0, self._start)
        after = self._slice(outside, self._start, self._length - (self._stop - self._start))
        return self._together([before, inside, after])


@torch.library.custom_op("attnrewrite::attend_with_logsumexp", mutates_args=(), device_types="cpu")
def _attend_with_logsumexp(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention, and the logarithm of the sum of each row's exponentials, (batch, heads, length).

    An operator of its own: the decomposition of PyTorch's gives the weights in the logarithm's place.
    """
    return _flash(query, key, value, scale)


@_attend_with_logsumexp.register_fake
def _(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    return _flash(query, key, value, scale)


def _flash(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    output, logsumexp = aten._scaled_dot_product_flash_attention_for_cpu.default(query, key, value, scale=scale)
    return output, logsumexp
