"""FlashAttention 2, 3 and 4, installed or from the Hugging Face Hub.

Sources, to which the limits refer:
https://github.com/Dao-AILab/flash-attention/blob/v2.8.3/flash_attn/flash_attn_interface.py (2)
https://github.com/Dao-AILab/flash-attention/blob/v2.8.3/csrc/flash_attn/flash_api.cpp (2)
https://github.com/Dao-AILab/flash-attention/blob/main/hopper/flash_attn_interface.py (3)
https://pypi.org/project/flash-attn-4/4.0.0b36/ flash_attn/cute/interface.py (4)
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from attnrewrite.ir.axes import size_of
from attnrewrite.ir.site import CanonicalAttention
from attnrewrite.kernels.common.library_kernel import RUN_ON, CallParameters, LibraryKernel, Saved, no_state
from attnrewrite.kernels.common.limits import HALF, Asked, Capability, HeadSizes, LimitRule, Limits
from attnrewrite.kernels.common.packages import HubKernel, Package, VendorCall
from attnrewrite.kernels.common.packing import Packed
from attnrewrite.kernels.common.verdict import Refusal

__all__ = ["FLASH_4_PACKAGE", "FLASH_KERNELS"]

_FA2_API = "https://github.com/Dao-AILab/flash-attention/blob/v2.8.3/csrc/flash_attn/flash_api.cpp"
_FA2_PYTHON = "https://github.com/Dao-AILab/flash-attention/blob/v2.8.3/flash_attn/flash_attn_interface.py"
_FA3_PYTHON = (
    "https://github.com/Dao-AILab/flash-attention/blob/01afd16d248c4c7d0f9aed1914084f16c490eaed"
    "/hopper/flash_attn_interface.py"
)
_FA3_README = "https://github.com/Dao-AILab/flash-attention/blob/v2.8.3/README.md#flashattention-3-beta-release"
_FA4_WHEEL = "https://pypi.org/project/flash-attn-4/4.0.0b36/ flash_attn/cute/interface.py"
_DISPATCH = "https://github.com/huggingface/diffusers/blob/main/src/diffusers/models/attention_dispatch.py"


def _flash_window(parameters: CallParameters) -> tuple[bool, int, int]:
    """(causal, left, right): a causal mask is asked for by name, which takes faster paths."""
    return (True, -1, -1) if parameters.is_causal else (False, parameters.left, parameters.right)


def _deterministic() -> bool:
    return torch.are_deterministic_algorithms_enabled()


@dataclasses.dataclass(eq=False)
class _Flash(LibraryKernel):
    """What all of them share.

    Attributes:
        prefix: the path of the module that has the functions, inside the vendor's.
    """

    prefix: str = ""


@dataclasses.dataclass(eq=False)
class Flash2(_Flash):
    """``_flash_attn_forward``, the package's own operator: it takes every argument and returns what backward needs."""

    def forward_call(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, parameters: CallParameters
    ) -> VendorCall:
        causal, left, right = _flash_window(parameters)
        numbers = (parameters.dropout, parameters.scale, causal, left, right, parameters.softcap)
        # No ALiBi slopes, and no weights handed back.
        args = (query, key, value, *numbers, None, False)
        return VendorCall(self.vendor, f"{self.prefix}_flash_attn_forward", args, read=_output_lse_state)

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
        causal, left, right = _flash_window(parameters)
        numbers = (parameters.dropout, parameters.scale, causal, left, right, parameters.softcap)
        gradients = tuple(part.new_empty(part.shape) for part in (query, key, value))
        args = (gradient, query, key, value, saved.output, saved.logsumexp, *gradients, *numbers, None)
        return VendorCall(
            self.vendor,
            f"{self.prefix}_flash_attn_backward",
            (*args, _deterministic(), saved.state),
            read=lambda _: gradients,
        )

    def saved_like(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        batch, length, heads, _ = query.shape
        state = query.new_empty((2,), dtype=torch.int64)
        return query.new_empty((batch, heads, length), dtype=torch.float32), state


def _output_lse_state(result: Any) -> tuple[Tensor, ...]:
    output, logsumexp, _, state = result
    return output, logsumexp, state


@dataclasses.dataclass(eq=False)
class Flash2Varlen(Flash2):
    """The form for sequences of many lengths, which takes key padding by leaving the keys out."""

    def forward_call(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, parameters: CallParameters
    ) -> VendorCall:
        packed = Packed.of(query, key, value, mask)
        causal, left, right = _flash_window(parameters)
        numbers = (parameters.dropout, parameters.scale, causal, left, right, parameters.softcap)
        lengths = (packed.starts_q, packed.starts_k, packed.longest_q, packed.longest_k)
        args = (packed.query, packed.key, packed.value, *lengths, *numbers, None, False)

        def read(result: Any) -> tuple[Tensor, ...]:
            output, logsumexp, state = _output_lse_state(result)
            return output.reshape(query.shape), logsumexp, state

        return VendorCall(self.vendor, f"{self.prefix}_flash_attn_varlen_forward", args, read=read)

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
        packed = Packed.of(query, key, value, mask)
        causal, left, right = _flash_window(parameters)
        numbers = (parameters.dropout, parameters.scale, causal, left, right, parameters.softcap)
        operands = (packed.query, packed.key, packed.value)
        gradients = [part.new_empty(part.shape) for part in operands]
        lengths = (packed.starts_q, packed.starts_k, packed.longest_q, packed.longest_k)
        flat = (gradient.flatten(0, 1), *operands, saved.output.flatten(0, 1), saved.logsumexp, *gradients)
        args = (*flat, *lengths, *numbers, None, _deterministic(), saved.state)
        return VendorCall(
            self.vendor,
            f"{self.prefix}_flash_attn_varlen_backward",
            args,
            read=lambda _: packed.unpacked_gradients(gradients, like=(query, key, value)),
        )

    def saved_like(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        batch, length, heads, _ = query.shape
        state = query.new_empty((2,), dtype=torch.int64)
        return query.new_empty((heads, batch * length), dtype=torch.float32), state


@dataclasses.dataclass(eq=False)
class Flash3(_Flash):
    """``_flash_attn_forward`` of the Hopper build, which serves both forms."""

    def forward_call(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, parameters: CallParameters
    ) -> VendorCall:
        return self._forward(parameters, (query, key, value), (None, None, None, None), query)

    def _forward(
        self, parameters: CallParameters, operands: tuple[Tensor, ...], lengths: tuple[Any, ...], like: Tensor
    ) -> VendorCall:
        causal, left, right = _flash_window(parameters)
        starts_q, starts_k, longest_q, longest_k = lengths
        # By place, as diffusers calls it: the names of these arguments have changed from build to build.
        args = (
            *operands,
            *(None, None, None, None),  # k_new, v_new, qv, out_
            *(starts_q, starts_k, None),  # cu_seqlens_q, cu_seqlens_k, cu_seqlens_k_new
            *(None, None),  # seqused_q, seqused_k
            *(longest_q, longest_k),
            *(None,) * 9,  # page_table, kv_batch_idx, leftpad_k, rotary_cos, rotary_sin, seqlens_rotary, descales
            parameters.scale,
        )
        kwargs = {
            "causal": causal,
            "window_size_left": left,
            "window_size_right": right,
            "softcap": parameters.softcap,
            # One split: the number of them would depend on the device, and with it the result.
            "num_splits": 1,
        }

        def read(result: Any) -> tuple[Tensor, ...]:
            output, logsumexp, *_ = result
            return output.reshape(like.shape), logsumexp, no_state(like)

        return VendorCall(self.vendor, f"{self.prefix}_flash_attn_forward", args, kwargs, read)

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
        gradients = [part.new_empty(part.shape) for part in (query, key, value)]
        flat = (gradient, query, key, value, saved.output, saved.logsumexp)
        args = self._backward_args(parameters, flat, (None, None, None, None), gradients)
        return VendorCall(self.vendor, f"{self.prefix}_flash_attn_backward", args, read=lambda _: tuple(gradients))

    def _backward_args(
        self, parameters: CallParameters, flat: tuple[Tensor, ...], lengths: tuple[Any, ...], gradients: list[Tensor]
    ) -> tuple[Any, ...]:
        causal, left, right = _flash_window(parameters)
        starts_q, starts_k, longest_q, longest_k = lengths
        sequences = (starts_q, starts_k, None, None, longest_q, longest_k)
        return (
            *flat,
            *sequences,
            *gradients,
            parameters.scale,
            causal,
            left,
            right,
            parameters.softcap,
            _deterministic(),
            0,  # sm_margin
        )


@dataclasses.dataclass(eq=False)
class Flash3Varlen(Flash3):
    """The same for sequences of many lengths, which takes key padding by leaving the keys out."""

    def forward_call(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, parameters: CallParameters
    ) -> VendorCall:
        packed = Packed.of(query, key, value, mask)
        lengths = (packed.starts_q, packed.starts_k, packed.longest_q, packed.longest_k)
        return self._forward(parameters, (packed.query, packed.key, packed.value), lengths, query)

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
        packed = Packed.of(query, key, value, mask)
        operands = (packed.query, packed.key, packed.value)
        gradients = [part.new_empty(part.shape) for part in operands]
        lengths = (packed.starts_q, packed.starts_k, packed.longest_q, packed.longest_k)
        flat = (gradient.flatten(0, 1), *operands, saved.output.flatten(0, 1), saved.logsumexp)
        args = self._backward_args(parameters, flat, lengths, gradients)

        def read(_: Any) -> tuple[Tensor, ...]:
            return packed.unpacked_gradients(gradients, like=(query, key, value))

        return VendorCall(self.vendor, f"{self.prefix}_flash_attn_backward", args, read=read)

    def saved_like(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        batch, length, heads, _ = query.shape
        return query.new_empty((heads, batch * length), dtype=torch.float32), no_state(query)


@dataclasses.dataclass(eq=False)
class Flash4(_Flash):
    """FlashAttention 4, written in CuTe. Called bare it breaks graphs three times, hence the operator."""

    def forward_call(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, parameters: CallParameters
    ) -> VendorCall:
        kwargs = {
            "softmax_scale": parameters.scale,
            "causal": parameters.is_causal,
            "window_size": self._window(parameters),
            "softcap": parameters.softcap,
            "return_lse": True,
        }

        def read(result: Any) -> tuple[Tensor, ...]:
            output, logsumexp = result
            return output, logsumexp, no_state(query)

        return VendorCall(self.vendor, f"{self.prefix}flash_attn_func", (query, key, value), kwargs, read)

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
        left, right = self._window(parameters)
        kwargs = {
            "softmax_scale": parameters.scale,
            "causal": parameters.is_causal,
            "softcap": parameters.softcap,
            "window_size_left": left,
            "window_size_right": right,
            "deterministic": _deterministic(),
        }
        args = (query, key, value, saved.output, gradient, saved.logsumexp)

        def read(result: Any) -> tuple[Tensor, ...]:
            return tuple(result)[:3]

        return VendorCall(self.vendor, f"{self.prefix}_flash_attn_bwd", args, kwargs, read)

    def _window(self, parameters: CallParameters) -> tuple[int | None, int | None]:
        """No bound is None, and a causal mask is no window."""
        if parameters.is_causal:
            return None, None
        return (None if parameters.left < 0 else parameters.left), (None if parameters.right < 0 else parameters.right)


@dataclasses.dataclass(eq=False)
class Flash4Hub(_Flash):
    """FlashAttention 4 from the Hub, called with no more than diffusers calls it with."""

    def forward_call(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, parameters: CallParameters
    ) -> VendorCall:
        kwargs = {"softmax_scale": parameters.scale, "causal": parameters.is_causal}

        def read(result: Any) -> tuple[Tensor, ...]:
            # The builds differ in whether they hand out the logarithms of sums.
            return (result[0] if isinstance(result, tuple) else result,)

        return VendorCall(self.vendor, f"{self.prefix}flash_attn_func", (query, key, value), kwargs, read)


# Limits.

_EIGHTHS = HeadSizes(multiple_of=8, largest=256, smallest=8)

_FLASH_2 = Limits(
    devices=("cuda",),
    dtypes=HALF,
    heads=_EIGHTHS,
    min_capability=(8, 0),
    alignments=("last",),
    window=True,
    softcap=True,
    dropout=True,
    grouped=True,
    backward=True,
    deterministic=True,
    minimum_version="2.7.0",
    sources={
        "devices": f"{_FA2_API}#L378 (the CUDA build)",
        "dtypes": f"{_FA2_API}#L373",
        "heads": f"{_FA2_API}#L393-L394",
        "value_heads": f"{_FA2_API}#L418",
        "min_capability": f"{_FA2_API}#L370",
        "masks": f"{_FA2_PYTHON}#L1135-L1147: there is no argument for one",
        "alignments": f"{_FA2_PYTHON}#L1154-L1163: aligned to the bottom right corner",
        "window": f"{_FA2_PYTHON}#L1166-L1168",
        "softcap": f"{_FA2_PYTHON}#L1143",
        "softcap_with_dropout": f"{_FA2_API}#L397",
        "grouped": f"{_FA2_API}#L395",
        "deterministic": f"{_FA2_PYTHON}#L1182: of the backward pass; the forward pass always is",
        "minimum_version": "https://github.com/Dao-AILab/flash-attention/releases/tag/v2.7.0: the arguments",
    },
)
_VARLEN_SOURCES = {
    "masks": "key padding is taken by leaving keys out: https://github.com/Dao-AILab/flash-attention/blob/v2.8.3/"
    "flash_attn/bert_padding.py#L98",
}
_FLASH_2_VARLEN = dataclasses.replace(_FLASH_2, masks="key padding", sources={**_FLASH_2.sources, **_VARLEN_SOURCES})

_FLASH_3 = Limits(
    devices=("cuda",),
    dtypes=HALF,
    heads=_EIGHTHS,
    min_capability=(9, 0),
    max_capability=(9, 0),
    alignments=("last",),
    window=True,
    softcap=True,
    grouped=True,
    backward=True,
    deterministic=True,
    sources={
        "devices": _FA3_README,
        "dtypes": f"{_FA3_README} (float8 is lower precision than any source here)",
        "heads": f"{_FA3_PYTHON}#L44-L64",
        "value_heads": "no statement of which pairs the backward pass takes",
        "min_capability": f"{_FA3_README}: H100 / H800",
        "max_capability": f"{_FA3_README}: H100 / H800",
        "masks": f"{_FA3_PYTHON}: there is no argument for one",
        "alignments": f"{_FA3_PYTHON} flash_attn_func: aligned to the bottom right corner",
        "window": f"{_FA3_PYTHON} flash_attn_func",
        "softcap": f"{_FA3_PYTHON} flash_attn_func",
        "dropout": f"{_FA3_PYTHON}: there is no argument for it",
        "grouped": f"{_FA3_PYTHON} flash_attn_func",
        "deterministic": f"{_FA3_PYTHON} flash_attn_func",
    },
)
_FLASH_3_VARLEN = dataclasses.replace(_FLASH_3, masks="key padding", sources={**_FLASH_3.sources, **_VARLEN_SOURCES})


def _wrong_gradient(site: CanonicalAttention, asked: Asked, capability: Capability | None) -> Refusal:
    width = size_of(site.feature_axes)
    if not site.differentiable or (isinstance(width, int) and width % 32 == 0):
        return None
    return f"its backward pass is wrong for head sizes that are no multiple of 32, such as {width}"


def _no_capped_gradient(site: CanonicalAttention, asked: Asked, capability: Capability | None) -> Refusal:
    wide = size_of(site.feature_axes) == 256 and capability is not None and capability[0] in (10, 11)
    if wide and site.differentiable and site.scores.softcap is not None:
        return "has no backward pass with a soft cap for the head size 256 on this GPU"
    return None


_FLASH_4 = Limits(
    devices=("cuda",),
    dtypes=HALF,
    heads=_EIGHTHS,
    heads_by_major={major: HeadSizes(only=(*range(8, 129, 8), 256)) for major in (10, 11)},
    min_capability=(9, 0),
    max_capability=(11, 9),
    alignments=("last",),
    window=True,
    softcap=True,
    grouped=True,
    backward=True,
    deterministic=True,
    minimum_version="4.0.0b36",
    rules=(
        LimitRule(
            "no backward pass with a soft cap for the head size 256 on compute capability 10 and 11",
            _no_capped_gradient,
            f"{_FA4_WHEEL}:2958",
        ),
        LimitRule(
            "a backward pass only for head sizes that are a multiple of 32",
            _wrong_gradient,
            "measured on an H100: wrong by more than half at 40 and 80, right at 64, 128, 160 and 256",
        ),
    ),
    sources={
        "devices": f"{_FA4_WHEEL}:827",
        "dtypes": f"{_FA4_WHEEL}:801",
        "heads": f"{_FA4_WHEEL}:128-133",
        "heads_by_major": f"{_FA4_WHEEL}:134-138",
        "value_heads": "no statement of which pairs the backward pass takes",
        "min_capability": f"{_FA4_WHEEL}:128 (head sizes are checked from 9.0 on), :2288 (backward)",
        "max_capability": f"{_FA4_WHEEL}:859 (the head sizes of 12.x are not checked)",
        "masks": f"{_FA4_WHEEL}:4145: mask_mod is a CuTe function, a tensor is not taken",
        "alignments": "https://pypi.org/project/flash-attn-4/4.0.0b36/ flash_attn/cute/mask.py:300: from the last",
        "window": f"{_FA4_WHEEL}:438-459",
        "softcap": f"{_FA4_WHEEL}:4155",
        "dropout": f"{_FA4_WHEEL}:4145: there is no argument for it",
        "grouped": f"{_FA4_WHEEL}:846",
        "deterministic": f"{_FA4_WHEEL}:2352: not on 12.x",
        "minimum_version": f"{_FA4_WHEEL}: flash_attn_func returns (output, lse) whatever is asked",
    },
)
_FLASH_4_HUB = dataclasses.replace(
    _FLASH_4,
    window=False,
    softcap=False,
    backward=False,
    deterministic=False,
    minimum_version="",
    rules=(),
    sources={
        **_FLASH_4.sources,
        "window": f"{_DISPATCH} _flash_attention_4_hub: no more than scale and causal is known of the build",
        "softcap": f"{_DISPATCH} _flash_attention_4_hub",
        "backward": f"{_DISPATCH} _flash_attention_4_hub",
    },
)

# Kernels.

_PIP_2 = "pip install 'flash-attn>=2.7' --no-build-isolation"
_PIP_4 = "pip install 'flash-attn-4>=4.0.0b36'"
_BUILD_3 = "built from https://github.com/Dao-AILab/flash-attention/tree/main/hopper"
_PACKAGE_2 = Package("flash_attn.flash_attn_interface", "flash-attn", _PIP_2, "2.7.0")
_PACKAGE_3 = Package(
    "flash_attn_interface",
    "flash_attn_3",
    _BUILD_3,
    parameters=(("_flash_attn_forward", "window_size_left"), ("_flash_attn_backward", "window_size_left")),
)
FLASH_4_PACKAGE = Package("flash_attn.cute.interface", "flash-attn-4", _PIP_4, "4.0.0b36", within="flash-attn")
_REPOSITORY = "https://github.com/Dao-AILab/flash-attention"


def _hub(repository: str) -> dict[str, Any]:
    return {
        "needs": "pip install 'kernels>=0.12'; fetched from the Hugging Face Hub when asked for by name",
        "source": f"https://huggingface.co/{repository}",
        "prefix": "flash_attn_interface.",
    }


_HUB_2 = HubKernel("kernels-community/flash-attn2", 3)
_HUB_3 = HubKernel("kernels-community/flash-attn3", 1)
_HUB_4 = HubKernel("kernels-community/flash-attn4", 0, "0.12.3")

FLASH_KERNELS: tuple[LibraryKernel, ...] = (
    Flash4("flash_4", FLASH_4_PACKAGE, _FLASH_4, _PIP_4, _REPOSITORY, proved="4.0.0b36", run_on=RUN_ON),
    Flash3("_flash_3", _PACKAGE_3, _FLASH_3, _BUILD_3, _REPOSITORY, proved="3.0.0 (01afd16)"),
    Flash3Varlen("_flash_varlen_3", _PACKAGE_3, _FLASH_3_VARLEN, _BUILD_3, _REPOSITORY, proved="3.0.0 (01afd16)"),
    Flash2("flash", _PACKAGE_2, _FLASH_2, _PIP_2, _REPOSITORY, proved="2.8.3.post2"),
    Flash2Varlen("flash_varlen", _PACKAGE_2, _FLASH_2_VARLEN, _PIP_2, _REPOSITORY, proved="2.8.3.post2"),
    Flash3("_flash_3_hub", _HUB_3, _FLASH_3, proved="3.0.0 (01afd16)", **_hub(_HUB_3.module)),
    Flash3Varlen("_flash_3_varlen_hub", _HUB_3, _FLASH_3_VARLEN, proved="3.0.0 (01afd16)", **_hub(_HUB_3.module)),
    Flash2("flash_hub", _HUB_2, _FLASH_2, proved="2.8.3.post2", **_hub(_HUB_2.module)),
    Flash2Varlen("flash_varlen_hub", _HUB_2, _FLASH_2_VARLEN, proved="2.8.3.post2", **_hub(_HUB_2.module)),
    Flash4Hub("flash_4_hub", _HUB_4, _FLASH_4_HUB, proved="4.0.0b36", **{**_hub(_HUB_4.module), "prefix": ""}),
)
