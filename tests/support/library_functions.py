"""Attentions that differ in one thing each, and their inputs: what kernels accept or refuse one by one."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["CASES", "Case"]


@dataclass(frozen=True)
class Case:
    """A function with the shapes of query, key and value, and what more it takes.

    Attributes:
        shape: (batch, query heads, key heads, queries, keys, head size, value head size).
        more: makes the other arguments.
        exact: it can be compared with its own result in float64 (no dropout).
    """

    name: str
    function: Callable[..., Tensor]
    shape: tuple[int, int, int, int, int, int, int] = (2, 4, 4, 128, 128, 64, 64)
    more: Callable[[Case], tuple[Any, ...]] = lambda case: ()
    exact: bool = True

    def inputs(self, dtype: torch.dtype, gradients: bool = False) -> tuple[Any, ...]:
        batch, heads, key_heads, queries, keys, size, value_size = self.shape
        generator = torch.Generator().manual_seed(0)
        shapes = (
            (batch, heads, queries, size),
            (batch, key_heads, keys, size),
            (batch, key_heads, keys, value_size),
        )
        operands = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
        more = (_learned(part, dtype) if isinstance(part, torch.nn.Parameter) else part for part in self.more(self))
        return (*(part.requires_grad_(gradients) for part in operands), *more)


def _learned(parameter: torch.nn.Parameter, dtype: torch.dtype) -> torch.nn.Parameter:
    return torch.nn.Parameter(parameter.detach().to(dtype))


def _scores(q: Tensor, k: Tensor) -> Tensor:
    scale: float = q.shape[-1] ** -0.5
    return q @ k.mT * scale


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return _scores(q, k).softmax(-1) @ v


def scaled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT * 0.3).softmax(-1) @ v


def turned(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT * -0.3).softmax(-1) @ v


def unscaled_to_nothing(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT * 0.0).softmax(-1) @ v


def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def causal_written_out(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    later = torch.arange(k.shape[-2], device=q.device) > torch.arange(q.shape[-2], device=q.device)[:, None]
    return _scores(q, k).masked_fill(later, -math.inf).softmax(-1) @ v


def causal_from_last(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    position = torch.arange(q.shape[-2], device=q.device)[:, None] + k.shape[-2] - q.shape[-2]
    later = torch.arange(k.shape[-2], device=q.device) > position
    return _scores(q, k).masked_fill(later, -math.inf).softmax(-1) @ v


def window(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    away = torch.arange(q.shape[-2], device=q.device)[:, None] - torch.arange(k.shape[-2], device=q.device)
    return _scores(q, k).masked_fill((away > 5) | (away < -2), -math.inf).softmax(-1) @ v


def before_itself(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Counted from the last key, what is kept ends before the query's own position, which no vendor's bound can say."""
    away = torch.arange(q.shape[-2], device=q.device)[:, None] + 2 - torch.arange(k.shape[-2], device=q.device)
    return _scores(q, k).masked_fill(away < 1, -math.inf).softmax(-1) @ v


def padded(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    return _scores(q, k).masked_fill(~keep[:, None, None], -math.inf).softmax(-1) @ v


def padded_by_lowest(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    return _scores(q, k).masked_fill(~keep[:, None, None], torch.finfo(q.dtype).min).softmax(-1) @ v


def padded_by_addition(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    added = torch.where(keep, 0.0, torch.finfo(torch.float32).min)[:, None, None]
    return (_scores(q.float(), k.float()) + added).softmax(-1).to(q.dtype) @ v


def padded_call(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=keep[:, None, None])


def padded_and_causal(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    later = torch.arange(k.shape[-2], device=q.device) > torch.arange(q.shape[-2], device=q.device)[:, None]
    return _scores(q, k).masked_fill(later | ~keep[:, None, None], -math.inf).softmax(-1) @ v


def boolean(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=keep)


def biased(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    return (_scores(q, k) + bias).softmax(-1) @ v


def capped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ((_scores(q, k) / 5).tanh() * 5).softmax(-1) @ v


def capped_and_causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    later = torch.arange(k.shape[-2], device=q.device) > torch.arange(q.shape[-2], device=q.device)[:, None]
    return ((_scores(q, k) / 5).tanh() * 5).masked_fill(later, -math.inf).softmax(-1) @ v


def capped_and_biased(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    return ((_scores(q, k) / 5).tanh() * 5 + bias).softmax(-1) @ v


def clamped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return _scores(q, k).clamp(-2, 2).softmax(-1) @ v


def dropped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.dropout(_scores(q, k).softmax(-1), 0.1) @ v


def capped_and_dropped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.dropout(((_scores(q, k) / 5).tanh() * 5).softmax(-1), 0.1) @ v


def grouped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)


def sunk(q: Tensor, k: Tensor, v: Tensor, sink: Tensor) -> Tensor:
    scores = torch.cat([_scores(q, k), sink[None, :, None, None].expand(q.shape[0], -1, q.shape[-2], 1)], dim=-1)
    return scores.softmax(-1)[..., :-1] @ v


def _keep(case: Case) -> tuple[Any, ...]:
    batch, keys = case.shape[0], case.shape[4]
    keep = torch.arange(keys) < torch.tensor([[keys], [keys // 2 + 1]][:batch])
    return (keep[:, torch.randperm(keys, generator=torch.Generator().manual_seed(1))],)


def _lost(case: Case) -> tuple[Any, ...]:
    """The second entry of the batch keeps no key."""
    (keep,) = _keep(case)
    keep[1] = False
    return (keep,)


def _keep_each(case: Case) -> tuple[Any, ...]:
    batch, heads, _, queries, keys, *_ = case.shape
    keep = torch.rand(batch, heads, queries, keys, generator=torch.Generator().manual_seed(1)) > 0.3
    keep[0, 0, 3] = False
    return (keep,)


def _bias(case: Case) -> tuple[Any, ...]:
    _, heads, _, queries, keys, *_ = case.shape
    return (torch.nn.Parameter(torch.randn(heads, queries, keys, generator=torch.Generator().manual_seed(1))),)


def _sink(case: Case) -> tuple[Any, ...]:
    return (torch.nn.Parameter(torch.randn(case.shape[1], generator=torch.Generator().manual_seed(1))),)


def _sized(size: int, value_size: int | None = None) -> tuple[int, int, int, int, int, int, int]:
    return (2, 4, 4, 128, 128, size, size if value_size is None else value_size)


CASES: dict[str, Case] = {
    case.name: case
    for case in (
        Case("plain", plain),
        Case("scale", scaled),
        Case("negative scale", turned),
        Case("scale of zero", unscaled_to_nothing),
        Case("call", call),
        Case("cross", plain, (2, 4, 4, 64, 256, 64, 64)),
        Case("77 keys", plain, (2, 4, 4, 128, 77, 64, 64)),
        Case("causal", causal),
        Case("causal from first", causal, (2, 4, 4, 64, 128, 64, 64)),
        Case("causal, fewer keys", causal_written_out, (2, 4, 4, 300, 128, 64, 64)),
        Case("causal, few more queries", causal_written_out, (2, 4, 4, 160, 128, 64, 64)),
        Case("causal from last", causal_from_last, (2, 4, 4, 64, 128, 64, 64)),
        Case("window", window),
        Case("negative reach", before_itself, (2, 4, 4, 64, 128, 64, 64)),
        Case("padding", padded, more=_keep),
        Case("padding, lost rows", padded, more=_lost),
        Case("padding by the lowest number, lost rows", padded_by_lowest, more=_lost),
        Case("padding by addition, lost rows", padded_by_addition, more=_lost),
        Case("padding in a call, lost rows", padded_call, more=_lost),
        Case("padding and causal", padded_and_causal, more=_keep),
        Case("boolean", boolean, more=_keep_each),
        Case("bias", biased, more=_bias),
        Case("softcap", capped),
        Case("softcap and causal", capped_and_causal),
        Case("softcap and bias", capped_and_biased, more=_bias),
        Case("clamp", clamped),
        Case("dropout", dropped, exact=False),
        Case("softcap and dropout", capped_and_dropped, exact=False),
        Case("grouped", grouped, (2, 4, 2, 128, 128, 64, 64)),
        Case("sink", sunk, more=_sink),
        Case("head size 36", plain, _sized(36)),
        Case("head size 40", plain, _sized(40)),
        Case("head size 80", plain, _sized(80)),
        Case("head size 128", plain, _sized(128)),
        Case("head size 160", plain, _sized(160)),
        Case("head size 256", plain, _sized(256)),
        Case("head size 264", plain, _sized(264)),
        Case("value head size", plain, _sized(64, 128)),
    )
}
