"""``attention_forward``: one attention, with the signature of DiffSynth-Studio's function.

Within a graph that is compiled it is plain mathematics: a call of ``scaled_dot_product_attention`` with a mask computed
from positions, which the backend finds like any other attention. An eager call runs the same function, compiled with
``backend="attnrewrite"``.

Source: https://github.com/modelscope/DiffSynth-Studio/blob/16ab67bf/diffsynth/core/attention/attention.py
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from torch.fx.traceback import annotate
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from attnrewrite.api.arguments import PLAIN, CallSettings, ScoreMod, checked
from attnrewrite.api.eager_calls import run_compiled, within_graph
from attnrewrite.errors import AttentionInputError
from attnrewrite.ir.source import own_files
from attnrewrite.selection.requests import COMPATIBILITY, KERNEL_OF_CALL
from attnrewrite.torch_private import FailOnRecompileLimitHit

__all__ = ["attention_forward"]

own_files.add(__file__)


def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_pattern: str = PLAIN,
    k_pattern: str = PLAIN,
    v_pattern: str = PLAIN,
    out_pattern: str = PLAIN,
    dims: Mapping[str, int] | None = None,
    attn_mask: Tensor | BlockMask | None = None,
    scale: float | None = None,
    is_causal: bool = False,
    compatibility_mode: bool = False,
    window_size: int | None = None,
    use_flex: bool = False,
    score_mod: ScoreMod | None = None,
) -> Tensor:
    """``softmax(scale * q @ k^T, masked) @ v``, by the kernel that attnrewrite chooses.

    Masks are combined: a key counts where ``attn_mask``, ``is_causal`` and ``window_size`` all keep it. A query without
    any key gives zero, as in ``scaled_dot_product_attention``.

    Args:
        q: the query; (b, n, s, d) once it is rearranged.
        k, v: key (b, m, t, d) and value (b, m, t, e), with the query's dtype and device. n is a multiple of m: each
            head of the key serves n / m neighboring heads of the query (GQA).
        q_pattern, k_pattern, v_pattern, out_pattern: einops patterns of b (batch), n (heads), s (sequence) and d
            (head_dim), such as ``"b s (n d)"``. Default ``"b n s d"``.
        dims: sizes of axes, for patterns with brackets, such as ``{"n": 8}``. They hold for all patterns: if the key
            has fewer heads, give ``{"d": 64}``. Default None.
        attn_mask: boolean (true where a key counts) or additive; it is broadcast to (b, n, s, t). With ``use_flex`` it
            may be a ``BlockMask``. Default None.
        scale: of the scores. Default None, which is ``d ** -0.5``.
        is_causal: whether a query sees only the keys up to its own position, counted from the first. Default False.
        compatibility_mode: whether PyTorch's ``scaled_dot_product_attention`` (kernel ``native``) must serve this call,
            whatever else is asked for. It has no effect with ``use_flex``, as in DiffSynth-Studio. Default False.
        window_size: how many positions before and after its own a query sees; needs s = t. Default None: all.
        use_flex: whether ``torch.nn.attention.flex_attention`` must serve this call, whatever else is asked for. It has
            no backward pass on the CPU. Default False.
        score_mod: a ``score_mod`` as for FlexAttention, ``(score, b, n, s, t) -> score``, of one score and its
            position. It is applied after the scale and before the masks. Default None.

    Returns:
        The attention, rearranged from (b, n, s, e) to ``out_pattern``, in the query's dtype.

    Raises:
        AttentionInputError: the arguments do not fit together.
        KernelError: a kernel that was asked for with ``strict`` cannot serve the call.
    """
    if dims is not None and not isinstance(dims, Mapping):
        raise AttentionInputError(f"dims takes a dictionary such as {{'n': 8}}, not {type(dims).__name__}")
    sizes = tuple(dims.items()) if dims else ()
    patterns = (q_pattern, k_pattern, v_pattern, out_pattern)
    settings = CallSettings(*patterns, sizes, scale, is_causal, compatibility_mode, window_size, use_flex)
    if within_graph():
        return _attend(settings, q, k, v, attn_mask, score_mod)
    # Errors are raised here, and not from a half-traced graph.
    checked(settings, q, k, v, attn_mask, score_mod)
    try:
        result: Tensor = run_compiled(_attend, settings, q, k, v, attn_mask, score_mod)
    except FailOnRecompileLimitHit:
        raise AttentionInputError(
            "attention_forward was compiled too often for one kind of call; define score_mod once, outside of the "
            "loop, or raise torch._dynamo.config.recompile_limit"
        ) from None
    return result


# The mathematics.


def _attend(
    settings: CallSettings, q: Tensor, k: Tensor, v: Tensor, attn_mask: Any, score_mod: ScoreMod | None
) -> Tensor:
    q, k, v = checked(settings, q, k, v, attn_mask, score_mod)
    if settings.use_flex:
        out = _by_flex(settings, q, k, v, attn_mask, score_mod)
    elif score_mod is not None:
        out = _written_out(settings, q, k, v, attn_mask, score_mod)
    elif settings.compatibility_mode:
        with annotate({KERNEL_OF_CALL: COMPATIBILITY}):
            out = _by_sdpa(settings, q, k, v, attn_mask)
    else:
        out = _by_sdpa(settings, q, k, v, attn_mask)
    if settings.out_pattern == PLAIN:
        return out
    return rearrange(out, f"{PLAIN} -> {settings.out_pattern}")


def _by_sdpa(settings: CallSettings, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    causal = settings.is_causal and mask is None and settings.window_size is None
    if not causal:
        mask = _masked(mask, _kept(settings, q, k))
    if mask is not None and mask.dim() < 2:
        mask = mask.expand(1, k.shape[2])  # The function needs two dimensions.
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal, scale=settings.scale, enable_gqa=_grouped(q, k)
    )


def _grouped(q: Tensor, k: Tensor) -> bool:
    # A branch: the comparison of two symbolic sizes is a symbol, which the call does not accept.
    if q.shape[1] != k.shape[1]:  # noqa: SIM103
        return True
    return False


def _kept(settings: CallSettings, q: Tensor, k: Tensor) -> Tensor | None:
    """The mask (s, t) of ``is_causal`` and ``window_size``, true where a key counts; None where there is neither."""
    if not settings.is_causal and settings.window_size is None:
        return None
    rows = torch.arange(q.shape[2], device=q.device)[:, None]
    columns = torch.arange(k.shape[2], device=q.device)
    return _in_reach(settings, rows, columns)


def _in_reach(settings: CallSettings, row: Tensor, column: Tensor) -> Tensor:
    width = settings.window_size
    if width is None:
        return column <= row
    # Two inequalities, which is how the backend proves a band.
    return (row - column <= width) & (column <= row if settings.is_causal else column - row <= width)


def _masked(mask: Tensor | None, kept: Tensor | None) -> Tensor | None:
    if mask is None or kept is None:
        return kept if mask is None else mask
    return mask & kept if mask.dtype is torch.bool else mask.masked_fill(~kept, -torch.inf)


def _written_out(
    settings: CallSettings, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, score_mod: ScoreMod
) -> Tensor:
    """Attention written out, with scores in float32 or higher, as in FlexAttention; the backend may rewrite it."""
    groups = q.shape[1] // k.shape[1]
    if groups != 1:
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    precise = torch.promote_types(q.dtype, torch.float32)
    scale = q.shape[-1] ** -0.5 if settings.scale is None else settings.scale
    scores = (q @ k.transpose(-2, -1)).to(precise) * scale
    # One vmap for each dimension, the innermost first, as in FlexAttention.
    modified: Any = score_mod
    for place in (4, 3, 2, 1):
        modified = torch.vmap(modified, in_dims=tuple(0 if at in (0, place) else None for at in range(5)))
    scores = modified(scores, *(torch.arange(size, device=q.device) for size in scores.shape))
    mask = _masked(mask, _kept(settings, q, k))
    if mask is not None and mask.dtype is torch.bool:
        scores = scores.masked_fill(~mask, -torch.inf)
    elif mask is not None:
        scores = scores + mask
    # As in scaled_dot_product_attention, a row of minus infinities gives zeros.
    weights = torch.ops.aten._safe_softmax.default(scores, -1)
    result: Tensor = weights.to(v.dtype) @ v
    return result


def _by_flex(
    settings: CallSettings, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | BlockMask | None, score_mod: ScoreMod | None
) -> Tensor:
    """Attention by ``flex_attention``, which stays in the graph as it is."""
    blocks = mask if isinstance(mask, BlockMask) else None
    entries = None
    if isinstance(mask, Tensor):
        # The CPU code that Inductor generates for flex_attention drops a mask of one element that is read by position.
        one = all(size == 1 for size in mask.shape)
        entries = mask.reshape(()) if one else mask.expand(q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    bounded = settings.is_causal or settings.window_size is not None

    def modified(score: Tensor, batch: Tensor, head: Tensor, row: Tensor, column: Tensor) -> Tensor:
        if score_mod is not None:
            score = score_mod(score, batch, head, row, column)
        if entries is not None:
            entry = entries[batch, head, row, column] if entries.dim() else entries
            score = torch.where(entry, score, -torch.inf) if entries.dtype is torch.bool else score + entry
        if bounded:
            score = torch.where(_in_reach(settings, row, column), score, -torch.inf)
        return score

    plain = score_mod is None and entries is None and not bounded
    if q.device.type == "cpu":
        # Inductor's CPU lowering fails on views of packed heads: "not enough values to unpack (expected 4, got 3)".
        q, k, v = (operand.contiguous() for operand in (q, k, v))
    out: Any = flex_attention(
        q, k, v, None if plain else modified, blocks, scale=settings.scale, enable_gqa=_grouped(q, k)
    )
    result: Tensor = out
    return result
