"""``_native_flash``, ``_native_efficient``, ``_native_cudnn``: single back ends of PyTorch's own fused attention.

Each is called by the operator that the selector would call, and not by ``sdpa_kernel(...)``, which AOTAutograd's cache
does not see. PyTorch's own check says what a back end takes.

Source: https://github.com/pytorch/pytorch/blob/v2.13.0/aten/src/ATen/native/transformers/cuda/sdp_utils.cpp
"""

from __future__ import annotations

import math
import operator
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from attnrewrite.ir.axes import size_of
from attnrewrite.ir.builder import Builder
from attnrewrite.ir.nodes import hint, same, tensor
from attnrewrite.ir.site import CanonicalAttention
from attnrewrite.kernels.common.layout import KernelLayout, padded_to
from attnrewrite.kernels.common.library_kernel import RUN_ON
from attnrewrite.kernels.common.limits import Asked, Capability
from attnrewrite.kernels.common.memory import realized
from attnrewrite.kernels.common.verdict import Availability, Refusal, Verdict
from attnrewrite.kernels.cudnn_training import CUDNN_ATTENTION
from attnrewrite.kernels.torch_limits import CUDNN, EFFICIENT, FLASH, PADDED_TO
from attnrewrite.kernels.torch_sdpa import TorchSDPA
from attnrewrite.torch_private import FakeTensorMode, TorchDispatchMode

__all__ = ["CudnnAttention", "EfficientAttention", "FlashAttention"]

aten = torch.ops.aten


@dataclass(frozen=True)
class _FusedCall:
    """What an operator is called with: the operands and the mask as the kernel takes them, and numbers."""

    operands: tuple[fx.Node, fx.Node, fx.Node]
    mask: fx.Node | None
    dropout: float
    is_causal: bool
    scale: float | None


class _Backend(TorchSDPA):
    """One back end on CUDA. It is asked where PyTorch's selector cannot be left to choose, or by name."""

    automatic = True
    emits_aten = True
    takes_unbacked = False
    selects = False
    needs = "PyTorch and an NVIDIA GPU"
    run_on = RUN_ON

    def availability(self) -> Availability:
        if not torch.cuda.is_available():
            return Availability(False, "PyTorch sees no NVIDIA GPU")
        return Availability(True, f"part of torch {torch.__version__}")

    def supports(self, site: CanonicalAttention) -> Verdict:
        verdict = super().supports(site)
        if not verdict.willing:
            return verdict
        return Verdict.of(self._torch_refuses(site, KernelLayout.of(site)))

    def verdict(self, site: CanonicalAttention, capability: Capability | None) -> Verdict:
        """All but PyTorch's own check, which asks the GPU that is here."""
        verdict = super().verdict(site, capability)
        if not verdict.willing:
            return verdict
        # These rules ask nothing of the mask.
        refusal = self.limits.machine_refusal(site, capability) or self.limits.rule_refusal(site, Asked(), capability)
        if refusal:
            return Verdict.no(refusal)
        if site.scores.scale is None:
            return Verdict.no("the scale is symbolic, and must be a number")
        if site.scores.terms and self.limits.masks == "none":
            return Verdict.no("takes no mask but a causal one")
        if site.group_axes and not self.limits.grouped:
            return Verdict.no("needs as many key heads as query heads, and keys are not repeated here")
        if site.sink is not None and self.limits.masks == "none":
            return Verdict.no("takes no mask, and a sink needs one")
        if site.fused and site.scores.masked_rows.may_occur:
            return Verdict.no(
                "what the call gives rows whose keys are all masked depends on the back end that PyTorch's selector "
                "picks (if none occurs, say so: options={'assume_attended_rows': True})"
            )
        return Verdict.yes()

    def check(self, parameters: Any, debug: bool) -> bool:
        raise NotImplementedError

    def _torch_refuses(self, site: CanonicalAttention, layout: KernelLayout) -> Refusal:
        """What PyTorch's own check says of tensors of these sizes; a symbol stands for a size that it was seen with."""
        with FakeTensorMode():
            query, key, value = (
                torch.empty(
                    [hint(size_of(dim)) for dim in dims[:-1]]
                    + [_rounded_up(times * hint(size_of(dims[-1])), PADDED_TO)],
                    dtype=site.compute_dtype,
                    device=site.device,
                    requires_grad=site.differentiable,
                )
                for dims, times in (
                    (layout.query_dims, 1 + site.doubles_features),
                    (layout.key_dims, 1 + site.doubles_features),
                    (layout.value_dims, 1),
                )
            )
            mask = None
            if site.scores.terms or site.sink is not None:
                mask = query.new_empty([*query.shape[:3], key.shape[2]])
        parameters = torch.backends.cuda.SDPAParams(
            query, key, value, mask, site.dropout, site.scores.is_causal, layout.grouped
        )
        if self.check(parameters, False):
            return None
        reasons = _warnings_of(lambda: self.check(parameters, True))
        return f"PyTorch's check says: {reasons[-1] if reasons else 'no'}"

    def _call(
        self,
        builder: Builder,
        site: CanonicalAttention,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        fake: torch.Tensor,
    ) -> fx.Node:
        query, key, value, mask, dropout, causal = args
        width = tensor(value).shape[-1]
        query, key, value = (padded_to(builder, node, -1, PADDED_TO) for node in (query, key, value))
        if mask is not None:
            mask = self._bias(builder, mask, query, key, saved=site.for_inductor and site.differentiable)
        output = self._output(builder, _FusedCall((query, key, value), mask, dropout, causal, kwargs["scale"]))
        if same(tensor(output).shape[-1], width):
            return output
        return builder.call(aten.slice.Tensor, output, -1, 0, width)

    def _output(self, builder: Builder, asked: _FusedCall) -> fx.Node:
        query, key, _ = asked.operands
        mask = asked.mask
        if mask is not None:
            mask = builder.call(aten.expand.default, mask, [*tensor(query).shape[:3], tensor(key).shape[-2]])
        target, arguments = self.operator(mask, asked.dropout, asked.is_causal)
        result = builder.call(target, *asked.operands, *arguments, scale=asked.scale)
        return builder.insert(operator.getitem, (result, 0), {}, result.meta["val"][0])

    def operator(self, mask: fx.Node | None, dropout: float, causal: bool) -> tuple[Callable[..., Any], list[Any]]:
        """The operator, and its arguments behind query, key and value."""
        raise NotImplementedError

    def _bias(self, builder: Builder, mask: fx.Node, query: fx.Node, key: fx.Node, *, saved: bool) -> fx.Node:
        """The mask as numbers, its rows of full length, and aligned as PyTorch's selector aligns them.

        Args:
            saved: Inductor saves it for the backward pass; it would compute the aligned rows once more there, without
                the alignment (``sdpa_constraint`` in
                https://github.com/pytorch/pytorch/blob/v2.13.0/torch/_inductor/lowering.py).
        """
        if tensor(mask).dtype is torch.bool:
            mask = builder.call(aten.where.Scalar, mask, 0.0, -math.inf)
            mask = builder.call(aten.to.dtype, mask, tensor(query).dtype)
        keys = tensor(key).shape[-2]
        aligned = padded_to(builder, mask, -1, 16)
        if aligned is not mask:
            aligned = realized(builder, aligned, own=False) if saved else aligned
            mask = builder.call(aten.slice.Tensor, aligned, -1, 0, keys)
        elif not same(tensor(mask).stride()[-1], 1):
            mask = builder.call(aten.clone.default, mask, memory_format=torch.contiguous_format)
        return builder.call(aten.expand.default, mask, [*tensor(mask).shape[:-1], keys])


class FlashAttention(_Backend):
    """FlashAttention-2 as PyTorch has it."""

    name = "_native_flash"
    limits = FLASH

    def verdict(self, site: CanonicalAttention, capability: Capability | None) -> Verdict:
        if site.scores.is_causal and not same(size_of(site.query_axes), size_of(site.key_axes)):
            # PyTorch's check sees one pair of lengths, and this kernel counts from the last key.
            return Verdict.no("takes a causal mask only where there are known to be as many keys as queries")
        return super().verdict(site, capability)

    def check(self, parameters: Any, debug: bool) -> bool:
        return bool(torch.backends.cuda.can_use_flash_attention(parameters, debug))

    def operator(self, mask: fx.Node | None, dropout: float, causal: bool) -> tuple[Callable[..., Any], list[Any]]:
        return aten._scaled_dot_product_flash_attention.default, [dropout, causal]


class EfficientAttention(_Backend):
    """xFormers' memory-efficient attention as PyTorch has it."""

    name = "_native_efficient"
    limits = EFFICIENT

    def check(self, parameters: Any, debug: bool) -> bool:
        return bool(torch.backends.cuda.can_use_efficient_attention(parameters, debug))

    def operator(self, mask: fx.Node | None, dropout: float, causal: bool) -> tuple[Callable[..., Any], list[Any]]:
        return aten._scaled_dot_product_efficient_attention.default, [mask, True, dropout, causal]


class CudnnAttention(_Backend):
    """cuDNN's fused attention. It trains through operators of our own (:mod:`attnrewrite.kernels.cudnn_training`)."""

    name = "_native_cudnn"
    limits = CUDNN

    def check(self, parameters: Any, debug: bool) -> bool:
        return bool(torch.backends.cuda.can_use_cudnn_attention(parameters, debug))

    def emit(self, site: CanonicalAttention, builder: Builder) -> fx.Node:
        return _TrainedCudnn().emit(site, builder) if site.differentiable else super().emit(site, builder)

    def operator(self, mask: fx.Node | None, dropout: float, causal: bool) -> tuple[Callable[..., Any], list[Any]]:
        return aten._scaled_dot_product_cudnn_attention.default, [mask, True, dropout, causal]


class _TrainedCudnn(_Backend):
    """What :class:`CudnnAttention` emits where a backward pass may follow."""

    name = "_native_cudnn"

    def _output(self, builder: Builder, asked: _FusedCall) -> fx.Node:
        numbers = asked.dropout, asked.is_causal, asked.scale
        return builder.call(CUDNN_ATTENTION, *asked.operands, asked.mask, *numbers)


def _warnings_of(check: Callable[[], bool]) -> list[str]:
    """The warnings of PyTorch's check.

    It is called within an operator, since only there do warnings of C++ become Python's; elsewhere they go to stderr
    (``PyWarningHandler`` in https://github.com/pytorch/pytorch/blob/v2.13.0/torch/csrc/Exceptions.h).
    """

    class Within(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            check()
            return func(*args, **(kwargs or {}))

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with Within():  # type: ignore[no-untyped-call]
            torch.empty(0)
    return [str(message.message).split(" (Triggered")[0].strip() for message in caught]


def _rounded_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
