"""The kernels of other packages: what they share.

A kernel lays its operands out in the vendor's order of dimensions and inserts one call of an operator of its own,
``torch.ops.attnrewrite.<name>``. The operator's body makes the vendor's call out of :meth:`LibraryKernel.forward_call`,
a pure function of the operands, so that the call can be held against the vendor's signature without the package.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor, fx

from attnrewrite.ir.axes import size_of
from attnrewrite.ir.builder import Builder
from attnrewrite.ir.nodes import tensor
from attnrewrite.ir.site import CanonicalAttention
from attnrewrite.kernels.common.base import Kernel
from attnrewrite.kernels.common.keep_mask import KeepMask
from attnrewrite.kernels.common.layout import KernelLayout, with_unit_stride
from attnrewrite.kernels.common.limits import Asked, Capability, Limits, capability_of
from attnrewrite.kernels.common.mask import Mask
from attnrewrite.kernels.common.packages import Vendor, VendorCall
from attnrewrite.kernels.common.verdict import Availability, Verdict

__all__ = ["RUN_ON", "CallParameters", "LibraryKernel", "Saved", "no_state"]

aten = torch.ops.aten

RUN_ON = "NVIDIA H100, torch 2.11"

_SAME = (0, 1, 2, 3)
_EXCHANGED = (0, 2, 1, 3)
"""Heads and length exchanged: (batch, heads, length, features) as (batch, length, heads, features), and back."""


class CallParameters(NamedTuple):
    """The numbers of a call.

    Attributes:
        scale: of the products of query and key.
        dropout: the probability of dropping a weight.
        left, right: how many positions before and after its own a query attends, both included; -1 for no bound.
        from_last: the last query stands beside the last key; else the first beside the first.
        softcap: ``softcap * tanh(scores / softcap)``; 0 for none.
    """

    scale: float
    dropout: float = 0.0
    left: int = -1
    right: int = -1
    from_last: bool = False
    softcap: float = 0.0

    @property
    def is_causal(self) -> bool:
        return (self.left, self.right) == (-1, 0)


class Saved(NamedTuple):
    """What the forward pass leaves for the backward pass: the output, logarithms of sums, and the dropout's state."""

    output: Tensor
    logsumexp: Tensor
    state: Tensor


def no_state(like: Tensor) -> Tensor:
    """The state of a dropout that there is none of."""
    return like.new_empty((0,), dtype=torch.int64)


@dataclass(eq=False)
class LibraryKernel(Kernel):
    """A kernel of another package.

    Attributes:
        name: that of diffusers' attention dispatcher, where it has one.
        vendor: what holds its functions.
        limits: those of the newest version; :meth:`limits_now` gives those of the installed one.
        needs: how to get it.
        source: where its code is.
        automatic: may be chosen without having been asked for by name.
        lower_precision: computes in fewer bits than its operands have.
        proved: the version whose published signature the call was held against.
        run_on: the hardware that it was run on, if any.
        order: the vendor's dimensions, "BSHD" (batch, length, heads, features) or "BHSD".
    """

    name: str
    # `field()`: the defaults of `Kernel` would become these fields'.
    vendor: Vendor = field()
    limits: Limits = field()
    needs: str = field()
    source: str = field()
    automatic: bool = False
    lower_precision: bool = False
    proved: str = ""
    run_on: str = ""
    order: Literal["BSHD", "BHSD"] = "BSHD"

    # What a family says.

    def limits_now(self) -> Limits:
        """The limits of the version that is installed."""
        return self.limits

    def forward_call(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, parameters: CallParameters
    ) -> VendorCall:
        """The vendor's call; it reads as (output,), or as the fields of ``Saved`` where there is a backward pass.

        Args:
            query, key, value: in the kernel's ``order``.
            mask: what ``limits.masks`` names: key padding (batch, keys) bool, boolean (batch or 1, heads or 1, queries
                or 1, keys), both true to keep, or additive of the same shape and the query's dtype; None for none.
        """
        raise NotImplementedError

    def backward_call(
        self,
        gradient: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        saved: Saved,
        parameters: CallParameters,
    ) -> VendorCall:
        """The vendor's call, which reads as the gradients of query, key and value."""
        raise NotImplementedError

    def saved_like(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Empty tensors of the shape of ``logsumexp`` and ``state``."""
        batch, length, heads, _ = (query.shape[dim] for dim in self._as_bshd())
        return query.new_empty((batch, heads, length), dtype=torch.float32), no_state(query)

    # What all share.

    def availability(self) -> Availability:
        return self.vendor.availability()

    def supports(self, site: CanonicalAttention) -> Verdict:
        # No package is imported for a device that it has nothing for.
        elsewhere = self.limits.device_refusal(site)
        if elsewhere:
            return Verdict.no(elsewhere)
        available = self.availability()
        if not available.available:
            return Verdict.no(f"not available: {available.detail}")
        return self.verdict(site, capability_of(site.device))

    def skips_masked(self, site: CanonicalAttention) -> bool:
        asked = self.limits.asked(site)
        return isinstance(asked, Asked) and asked.is_bounded

    def verdict(self, site: CanonicalAttention, capability: Capability | None) -> Verdict:
        """What the kernel would say of the site on a GPU of this compute capability, were it available."""
        return Verdict.of(self.limits_now().refusal(site, capability))

    def emit(self, site: CanonicalAttention, builder: Builder) -> fx.Node:
        scores = site.scores
        asked = self.limits_now().asked(site)
        assert isinstance(asked, Asked)
        layout = KernelLayout.of(site)
        order = _EXCHANGED if self.order == "BSHD" else _SAME
        query, key, value = layout.operands(builder, site, order=order, finish=with_unit_stride)
        mask = self._mask(builder, site, asked, layout)
        if mask is not None and mask.opened_rows is not None:
            opened = self._permuted(builder, mask.opened_rows)
            query = builder.call(aten.where.ScalarSelf, opened, 0.0, query)
        parameters = CallParameters(
            scale=float(size_of(layout.query_dims[-1])) ** -0.5 if scores.scale is None else scores.scale,
            dropout=site.dropout,
            left=asked.left,
            right=asked.right,
            from_last=asked.from_last,
            softcap=scores.softcap or 0.0,
        )
        tensor_mask = None if mask is None else self._mask_argument(builder, site, asked, mask, tensor(key))
        target = getattr(torch.ops.attnrewrite, self.name).default
        output = builder.call(target, query, key, value, tensor_mask, *parameters)
        if self.limits.backward:
            output = builder.insert(operator.getitem, (output, 0), {}, output.meta["val"][0])
        output = self._permuted(builder, output)
        if mask is not None and asked.restores_rows:
            output = mask.with_source_rows(output, self._permuted(builder, value), layout)
        return layout.as_result(builder, site, output)

    def _mask(self, builder: Builder, site: CanonicalAttention, asked: Asked, layout: KernelLayout) -> Mask | None:
        if asked.mask == "none":
            return None
        kind = Mask if asked.mask == "additive" else KeepMask
        return kind(builder, site, layout.score_dims)

    def _mask_argument(
        self, builder: Builder, site: CanonicalAttention, asked: Asked, mask: Mask, key: Tensor
    ) -> fx.Node | None:
        assert mask.node is not None
        batch, keys = key.shape[0], size_of(site.key_axes)
        node = mask.node
        if self.limits.masks == "additive" and tensor(node).dtype is torch.bool:
            node = builder.call(aten.where.Scalar, node, 0.0, float("-inf"))
            node = builder.call(aten.to.dtype, node, site.compute_dtype)
        if self.limits.masks != "key padding":
            return builder.call(aten.expand.default, node, [*tensor(node).shape[:-1], keys])
        node = builder.call(aten.reshape.default, node, [tensor(node).shape[0], tensor(node).shape[-1]])
        return builder.call(aten.expand.default, node, [batch, keys])

    def _permuted(self, builder: Builder, node: fx.Node) -> fx.Node:
        """From the vendor's order to (batch, heads, length, features), or back: it is the same exchange."""
        return builder.call(aten.permute.default, node, list(_EXCHANGED)) if self.order == "BSHD" else node

    def _as_bshd(self) -> tuple[int, ...]:
        return _SAME if self.order == "BSHD" else _EXCHANGED
