"""Checks of the arguments of :func:`attnrewrite.attention_forward`, and query, key and value as (b, n, s, d)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from einops import rearrange
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from attnrewrite.errors import AttentionInputError
from attnrewrite.options.environment import diffusers_checks

__all__ = ["PLAIN", "CallSettings", "ScoreMod", "checked", "under_autocast"]

ScoreMod: TypeAlias = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]

PLAIN = "b n s d"
"""Batch, heads, sequence, head_dim."""


class CallSettings(NamedTuple):
    """The arguments of a call that are no tensors. For each combination of them one function is compiled."""

    q_pattern: str
    k_pattern: str
    v_pattern: str
    out_pattern: str
    dims: tuple[tuple[str, int], ...]
    scale: float | None
    is_causal: bool
    compatibility_mode: bool
    window_size: int | None
    use_flex: bool


def checked(
    settings: CallSettings, q: Tensor, k: Tensor, v: Tensor, mask: Any, score_mod: ScoreMod | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value as (b, n, s, d), checked.

    Raises:
        AttentionInputError: the arguments do not fit together.
    """
    _check_settings(settings, score_mod)
    for name, operand in (("q", q), ("k", k), ("v", v)):
        if not isinstance(operand, Tensor):
            raise AttentionInputError(f"{name} is {type(operand).__name__}; give a tensor")
    dims = dict(settings.dims)
    q = _arranged(q, settings.q_pattern, dims, "q")
    k = _arranged(k, settings.k_pattern, dims, "k")
    v = _arranged(v, settings.v_pattern, dims, "v")
    _check_kinds(q, k, v)
    _check_sizes(settings, q, k, v)
    if mask is not None:
        _check_mask(settings, mask, q, k)
        if settings.is_causal and diffusers_checks():
            raise AttentionInputError(
                "attn_mask and is_causal=True are both given, which DIFFUSERS_ATTN_CHECKS forbids; put the causal mask "
                "into attn_mask, or unset the variable: masks are combined then"
            )
    if settings.use_flex:
        _check_flex(q, k, v)
    return q, k, v


def _check_settings(settings: CallSettings, score_mod: ScoreMod | None) -> None:
    _check_pattern(settings.q_pattern, "q_pattern")
    _check_pattern(settings.k_pattern, "k_pattern")
    _check_pattern(settings.v_pattern, "v_pattern")
    _check_pattern(settings.out_pattern, "out_pattern")
    _check_dims(dict(settings.dims))
    if settings.scale is not None and not isinstance(settings.scale, (int, float)):
        raise AttentionInputError(
            f"scale takes a number or None, not {type(settings.scale).__name__}; multiply a tensor into q"
        )
    if settings.window_size is not None and (
        isinstance(settings.window_size, bool)
        or not isinstance(settings.window_size, (int, torch.SymInt))
        or settings.window_size < 0
    ):
        raise AttentionInputError(
            f"window_size takes how many positions a query sees on either side, 0 or more, or None for all; got "
            f"{settings.window_size!r}"
        )
    if score_mod is not None and settings.compatibility_mode and not settings.use_flex:
        raise AttentionInputError(
            "compatibility_mode asks for scaled_dot_product_attention, which takes no score_mod; leave out one of them"
        )


def _check_kinds(q: Tensor, k: Tensor, v: Tensor) -> None:
    for name, operand in (("k", k), ("v", v)):
        if operand.device != q.device:
            raise AttentionInputError(f"{name} is on {operand.device} and q on {q.device}; move them to one device")
        # Autocast converts both operands to one dtype.
        if operand.dtype != q.dtype and not under_autocast(q):
            raise AttentionInputError(f"{name} is {operand.dtype} and q {q.dtype}; convert them to one dtype")
    if not q.dtype.is_floating_point:
        raise AttentionInputError(f"q, k and v are {q.dtype}; convert them to a floating-point dtype")


def under_autocast(q: Tensor) -> bool:
    """Whether autocast converts the operands of a product to one dtype here."""
    kind = q.device.type
    # The meta device has no autocast. Before torch 2.13 this cannot be asked within a graph.
    return kind != "meta" and torch.is_autocast_enabled(kind)


def _check_sizes(settings: CallSettings, q: Tensor, k: Tensor, v: Tensor) -> None:
    for name, operand in (("k", k), ("v", v)):
        if operand.shape[0] != q.shape[0]:
            raise AttentionInputError(
                f"{name} has batch size {operand.shape[0]} and q {q.shape[0]}; expand the smaller, or correct "
                f"{name}_pattern"
            )
    if k.shape[1] != v.shape[1]:
        raise AttentionInputError(f"k has {k.shape[1]} heads and v {v.shape[1]}; give them the same number")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1] != 0:
        raise AttentionInputError(
            f"q has {q.shape[1]} heads, which is no multiple of the {k.shape[1]} heads of k and v; correct the "
            "patterns or dims (with fewer heads in k and v give dims={'d': ...})"
        )
    if k.shape[2] != v.shape[2]:
        raise AttentionInputError(f"k has {k.shape[2]} positions and v {v.shape[2]}; give them the same number")
    if q.shape[3] != k.shape[3]:
        raise AttentionInputError(f"q has head size {q.shape[3]} and k {k.shape[3]}; give them the same")
    if settings.window_size is not None and q.shape[2] != k.shape[2]:
        raise AttentionInputError(
            f"window_size is for self-attention, and q has {q.shape[2]} positions and k {k.shape[2]}; give the window "
            "as attn_mask"
        )


def _check_mask(settings: CallSettings, mask: Any, q: Tensor, k: Tensor) -> None:
    if isinstance(mask, BlockMask):
        if not settings.use_flex:
            raise AttentionInputError("attn_mask is a BlockMask, which only FlexAttention takes; set use_flex=True")
        _check_block_mask(mask, q, k)
        return
    if not isinstance(mask, Tensor):
        raise AttentionInputError(f"attn_mask takes a tensor, a BlockMask or None, not {type(mask).__name__}")
    if mask.device != q.device:
        raise AttentionInputError(f"attn_mask is on {mask.device} and q on {q.device}; move them to one device")
    additive = mask.dtype in (q.dtype, torch.float32) or (mask.dtype.is_floating_point and under_autocast(q))
    if mask.dtype is not torch.bool and not additive:
        raise AttentionInputError(
            f"attn_mask is {mask.dtype}; give a boolean one (true where a key counts), or one of q's dtype, {q.dtype}, "
            "which is added to the scores"
        )
    scores = (q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    own = tuple(mask.shape)
    fits = len(own) <= 4
    for size, full in zip(reversed(own), reversed(scores), strict=False):
        fits = fits and (size == 1 or size == full)
    if not fits:
        raise AttentionInputError(
            f"attn_mask has the shape {_shape_in_words(own)} and does not broadcast to (batch, heads, queries, keys), "
            f"{_shape_in_words(scores)}; reshape it, for instance mask[:, None, None, :] for key padding"
        )


def _check_block_mask(mask: BlockMask, q: Tensor, k: Tensor) -> None:
    batch, heads, queries, keys = mask.shape
    if (
        (batch != 1 and batch != q.shape[0])
        or (heads != 1 and heads != q.shape[1])
        or queries != q.shape[2]
        or keys != k.shape[2]
    ):
        scores = (q.shape[0], q.shape[1], q.shape[2], k.shape[2])
        raise AttentionInputError(
            f"attn_mask is a BlockMask for {_shape_in_words(mask.shape)} and the scores are {_shape_in_words(scores)}; "
            "make it with create_block_mask for these sizes"
        )
    if mask.kv_num_blocks.device != q.device:
        raise AttentionInputError(
            f"attn_mask is on {mask.kv_num_blocks.device} and q on {q.device}; move them to one device"
        )


def _shape_in_words(shape: Sequence[int]) -> str:
    return f"({', '.join([str(int(size)) for size in shape])})"


def _check_flex(q: Tensor, k: Tensor, v: Tensor) -> None:
    if k.dtype != q.dtype or v.dtype != q.dtype:
        raise AttentionInputError(
            f"q, k and v are {q.dtype}, {k.dtype} and {v.dtype}, which autocast does not change for FlexAttention; "
            "convert them to one dtype"
        )
    if q.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise AttentionInputError(f"use_flex takes float32, float16 and bfloat16, not {q.dtype}; leave it out")
    if q.device.type == "cpu" and torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        raise AttentionInputError(
            "FlexAttention has no backward pass on the CPU; call it under torch.no_grad(), or leave out use_flex"
        )


# Patterns.


def _check_pattern(pattern: str, name: str) -> None:
    names = pattern.replace("(", " ").replace(")", " ").split() if isinstance(pattern, str) else []
    if sorted(names) != ["b", "d", "n", "s"] or not _balanced(pattern):
        raise AttentionInputError(
            f"{name} takes an einops pattern of b, n, s and d, each once, such as 'b n s d' or 'b s (n d)'; got "
            f"{pattern!r}"
        )


def _balanced(pattern: str) -> bool:
    brackets = [letter for letter in pattern if letter in "()"]
    return brackets == ["(", ")"] * (len(brackets) // 2)


def _check_dims(dims: Mapping[str, int]) -> None:
    for axis in dims:
        if axis not in ("b", "n", "s", "d"):
            raise AttentionInputError(f"dims takes sizes of b, n, s and d, such as {{'n': 8}}; got {axis!r}")


def _arranged(operand: Tensor, pattern: str, dims: Mapping[str, int], name: str) -> Tensor:
    """The operand as (b, n, s, d).

    Args:
        operand: a tensor in ``pattern``.
        dims: sizes of axes. Each bracket of the pattern needs all but one of its own.
        name: of the operand, for messages.
    """
    groups = _groups(pattern)
    if operand.dim() != len(groups):
        raise AttentionInputError(
            f"{name} has {operand.dim()} dimensions and {name}_pattern={pattern!r} names {len(groups)}; correct the "
            "pattern"
        )
    if pattern == PLAIN:
        return operand
    for place, group in enumerate(groups):
        size = operand.shape[place]
        known = 1
        for axis in group:
            known *= dims.get(axis, 1)
        unknown = [axis for axis in group if axis not in dims]
        if len(unknown) > 1:
            raise AttentionInputError(
                f"{name}_pattern={pattern!r} leaves the sizes of {' and '.join(unknown)} open; give one of them in "
                f"dims, such as dims={{{unknown[0]!r}: 8}}"
            )
        if known == 0 or (unknown and size % known != 0) or (not unknown and size != known):
            raise AttentionInputError(
                f"dimension {place} of {name} is {size}, which is not '{' '.join(group)}' of "
                f"{name}_pattern={pattern!r} with dims={dict(dims)}; correct dims or the pattern"
            )
    return rearrange(operand, f"{pattern} -> {PLAIN}", **dims)


def _groups(pattern: str) -> list[list[str]]:
    groups: list[list[str]] = []
    inside = False
    for part in pattern.replace("(", " ( ").replace(")", " ) ").split():
        if part == "(":
            groups.append([])
            inside = True
        elif part == ")":
            inside = False
        elif inside:
            groups[-1].append(part)
        else:
            groups.append([part])
    return groups
