"""Small models whose sequence is sharded: attention in several spellings, with masks and positions of real models."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["MASKS", "Case", "Model", "drawn_case", "inputs_of", "shard"]

HEAD_SIZE = 8
NUMBERS = 11
"""Input numbers are below it."""

LONGEST = 256

MASKS = (
    *("none", "causal", "triangle", "stored", "window", "chunks", "prefix"),
    *("padding", "additive", "documents", "causal and padding", "alibi", "distances"),
)
POSITIONS = ("none", "rotary", "given", "table", "learned", "of padding")
SPELLINGS = ("matmul", "sdpa", "einsum", "bmm", "by hand")


@dataclass(frozen=True)
class Case:
    """One model, and how it is sharded.

    Attributes:
        memory: keys are those of another sequence: "none", "sharded" or "whole".
        lengths: a shard's, of one call after the other, on one compiled model.
    """

    mask: str = "causal"
    positions: str = "rotary"
    spelling: str = "matmul"
    heads: int = 4
    groups: int = 4
    batch: int = 2
    layers: int = 1
    memory: str = "none"
    lengths: tuple[int, ...] = (8,)
    kernel: str = "auto"
    balanced: bool = False
    gradients: bool = True
    seed: int = 0


def drawn_case(rng: random.Random, ranks: int) -> Case:
    """A case that a rank's sequence of any even length has; some kernels cannot serve it."""
    heads = rng.choice([2, 4, 8])
    memory = rng.choice(["none"] * 4 + ["sharded", "whole"])
    # With keys of another sequence, a mask over both lengths is not any of these.
    mask = rng.choice(MASKS) if memory == "none" else rng.choice(["none", "padding"])
    positions = rng.choice(POSITIONS)
    return Case(
        mask,
        positions,
        rng.choice(SPELLINGS),
        heads,
        rng.choice([size for size in (1, 2, 4, 8) if heads % size == 0]),
        rng.choice([1, 2, 3]),
        rng.choice([1, 1, 2]),
        memory,
        tuple(rng.sample([2, 4, 6, 8, 10, 12], rng.choice([1, 2]))),
        rng.choice(["auto", "auto", "gather", "ulysses"]),
        rng.random() < 0.4,
        rng.random() < 0.7,
        rng.randrange(1000),
    )


def shard(whole: Tensor, ranks: int, rank: int, balanced: bool, dim: int = 1) -> Tensor:
    """The rank's part of the sequence."""
    if not balanced:
        return whole.chunk(ranks, dim)[rank].contiguous()
    parts = whole.chunk(2 * ranks, dim)
    return torch.cat([parts[rank], parts[2 * ranks - 1 - rank]], dim)


def inputs_of(case: Case, length: int) -> dict[str, Tensor]:
    """The whole inputs for a length, by the names of the model's arguments; all have the sequence in dimension 1."""
    x = torch.randint(0, NUMBERS, (case.batch, length))
    padding = (torch.arange(length) < torch.randint(1, length + 1, (case.batch, 1))).long()
    inputs = {"x": x, "padding": padding, "documents": torch.randint(0, 3, (case.batch, length)).sort(1).values}
    inputs["positions"] = torch.randint(0, LONGEST, (case.batch, length))
    if case.memory != "none":
        inputs["memory"] = torch.randn(case.batch, length + length % 3, 8)
    return inputs


class Model(nn.Module):
    """Layers of attention and a feed-forward part, over embedded numbers."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        width = case.heads * HEAD_SIZE
        self.case = case
        self.embedding = nn.Embedding(NUMBERS, width)
        self.table = nn.Parameter(torch.randn(LONGEST, width))
        self.learned = nn.Embedding(LONGEST, width)
        self.layers = nn.ModuleList(_Layer(case) for _ in range(case.layers))
        self.norm = nn.LayerNorm(width)

    def forward(
        self, x: Tensor, padding: Tensor, documents: Tensor, positions: Tensor, memory: Tensor | None = None
    ) -> Tensor:
        hidden = self.embedding(x)
        places = torch.arange(x.shape[1], device=x.device)[None]
        match self.case.positions:
            case "table":
                hidden = hidden + self.table[: x.shape[1]]
            case "learned":
                hidden = hidden + self.learned(places)
            case "given":
                hidden = hidden + self.learned(positions)
            case "of padding":
                hidden = hidden + self.learned((padding.cumsum(-1) - 1).clamp(min=0))
        for layer in self.layers:
            hidden = layer(hidden, padding, documents, places, memory)
        out: Tensor = self.norm(hidden)
        return out


class _Layer(nn.Module):
    def __init__(self, case: Case) -> None:
        super().__init__()
        width = case.heads * HEAD_SIZE
        self.case = case
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(8 if case.memory != "none" else width, 2 * case.groups * HEAD_SIZE)
        self.o = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 16), nn.GELU(), nn.Linear(16, width))
        self.distances = nn.Embedding(9, case.heads)
        self.register_buffer("stored", torch.ones(LONGEST, LONGEST).tril().bool()[None, None])
        self.register_buffer("slopes", 2.0 ** -torch.arange(1, case.heads + 1))

    def forward(
        self, hidden: Tensor, padding: Tensor, documents: Tensor, places: Tensor, memory: Tensor | None
    ) -> Tensor:
        batch, length, _ = hidden.shape
        source = self.norm(hidden)
        q = self.q(source).view(batch, length, self.case.heads, HEAD_SIZE).transpose(1, 2)
        given = source if memory is None else memory
        kv = self.kv(given).view(batch, given.shape[1], 2, self.case.groups, HEAD_SIZE)
        k, v = kv.permute(2, 0, 3, 1, 4).unbind(0)
        if self.case.positions == "rotary" and memory is None:
            q, k = self.rotated(q, places), self.rotated(k, places)
        times = self.case.heads // self.case.groups
        k, v = k.repeat_interleave(times, 1), v[:, :, None].expand(-1, -1, times, -1, -1).flatten(1, 2)
        y = self.attention(q, k, v, padding, documents, places[0], memory)
        hidden = hidden + self.o(y.transpose(1, 2).reshape(batch, length, -1))
        out: Tensor = hidden + self.mlp(hidden)
        return out

    def rotated(self, x: Tensor, places: Tensor) -> Tensor:
        angles = places[0, :, None] * 0.1 ** (torch.arange(0, HEAD_SIZE, 2) / HEAD_SIZE)
        angles = torch.cat((angles, angles), -1)
        first, second = x.chunk(2, -1)
        return x * angles.cos() + torch.cat((-second, first), -1) * angles.sin()

    def attention(
        self, q: Tensor, k: Tensor, v: Tensor, padding: Tensor, documents: Tensor, places: Tensor, memory: Tensor | None
    ) -> Tensor:
        mask = self.mask(padding, documents, places, memory)
        if self.case.spelling == "sdpa":
            if self.case.mask == "causal":
                return F.scaled_dot_product_attention(q, k, v, is_causal=True)
            return F.scaled_dot_product_attention(q, k, v, mask)
        scale = HEAD_SIZE**-0.5
        match self.case.spelling:
            case "einsum":
                scores = torch.einsum("bhqd,bhkd->bhqk", q, k) * scale
            case "bmm":
                scores = torch.bmm(q.flatten(0, 1), k.flatten(0, 1).mT * scale).view(*q.shape[:3], k.shape[2])
            case _:
                scores = q @ k.mT * scale
        if mask is not None:
            added = not mask.dtype.is_floating_point
            scores = scores.masked_fill(~mask, float("-inf")) if added else scores + mask
        if self.case.spelling == "by hand":
            weights = (scores - scores.amax(-1, keepdim=True)).exp()
            weights = weights / weights.sum(-1, keepdim=True)
        else:
            weights = scores.softmax(-1)
        if self.case.spelling == "einsum":
            return torch.einsum("bhqk,bhkd->bhqd", weights, v)
        if self.case.spelling == "bmm":
            return torch.bmm(weights.flatten(0, 1), v.flatten(0, 1)).view(q.shape)
        out: Tensor = weights @ v
        return out

    # Long: one case for each mask.
    def mask(self, padding: Tensor, documents: Tensor, places: Tensor, memory: Tensor | None) -> Tensor | None:
        """A mask (True is attended) or a bias; rows always have a key."""
        length = places.shape[0]
        rows, columns = places[:, None], places[None]
        causal = columns <= rows
        match self.case.mask:
            case "causal":
                return causal
            case "triangle":
                return torch.full((length, length), float("-inf")).triu(1)
            case "stored":
                return self.stored[:, :, :length, :length]  # type: ignore[index]
            case "window":
                return causal & (rows - columns < 5)
            case "chunks":
                return causal & (rows // 6 == columns // 6)
            case "prefix":
                return causal | (columns < 3)
            case "padding" if memory is not None:
                first = torch.arange(memory.shape[1], device=places.device) < memory.shape[1] // 2 + 1
                return first[None, None, None]
            case "padding":
                return padding[:, None, None].bool()
            case "additive":
                return (1.0 - padding[:, None, None].float()) * torch.finfo(torch.float32).min
            case "documents":
                return (documents[:, None, :, None] == documents[:, None, None]) & causal
            case "causal and padding":
                return torch.where(causal & padding[:, None, None].bool(), 0.0, torch.finfo(torch.float32).min)
            case "alibi":
                return (columns - rows) * self.slopes[:, None, None] + torch.where(causal, 0.0, float("-inf"))  # type: ignore[index]
            case "distances":
                return self.distances((columns - rows).clamp(-4, 4) + 4).permute(2, 0, 1)[None]  # type: ignore[no-any-return]
        return None
