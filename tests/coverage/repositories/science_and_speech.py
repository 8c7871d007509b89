"""Speech, audio, music, proteins, molecules, graphs, time series, reinforcement learning and recommendation."""

from __future__ import annotations

import math
import sys
from typing import Any

import numpy as np
import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from tests.coverage.case import Case
from tests.support.zoo import ids, noise

__all__ = ["CASES"]


def first(length: int, *counts: int) -> Tensor:
    """True for the first places of each row, as a mask of padded sequences."""
    return torch.arange(length) < torch.tensor(counts)[:, None]


def positive(*shape: int, seed: int) -> Tensor:
    return noise(*shape, seed=seed).abs()


def integers(*shape: int, below: int, seed: int) -> Tensor:
    return torch.randint(below, shape, generator=torch.Generator().manual_seed(seed))


class Projections(nn.Module):
    """The four linear layers that most of these have."""

    def __init__(self, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.heads, self.size = heads, width // heads
        self.linear_q = nn.Linear(width, width)
        self.linear_k = nn.Linear(width, width)
        self.linear_v = nn.Linear(width, width)
        self.linear_out = nn.Linear(width, width)


class EspnetAttention(Projections):
    """The mask is inverted in place, filled with numpy's smallest number, zeroed again, and the weights are kept."""

    attn: Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "attn": None}

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        mask = mask.clone()
        batch = x.size(0)
        q = self.linear_q(x).view(batch, -1, self.heads, self.size).transpose(1, 2)
        k = self.linear_k(x).view(batch, -1, self.heads, self.size).transpose(1, 2)
        v = self.linear_v(x).view(batch, -1, self.heads, self.size).transpose(1, 2)
        scores = torch.matmul(q, k.transpose(-2, -1)) / math.sqrt(self.size)
        mask.unsqueeze_(1).eq_(0)
        scores = scores.masked_fill(mask, float(np.finfo(np.float32).min))
        self.attn = torch.softmax(scores, dim=-1).masked_fill(mask, 0.0)
        mixed = torch.matmul(self.attn, v).transpose(1, 2).contiguous().view(batch, -1, self.heads * self.size)
        result: Tensor = self.linear_out(mixed)
        return result


class WenetRelativeAttention(Projections):
    """Positions shifted by a column of zeros and a view; weights are zeroed after a softmax over infinities."""

    def __init__(self, width: int = 32, heads: int = 4) -> None:
        super().__init__(width, heads)
        self.linear_pos = nn.Linear(width, width, bias=False)
        self.pos_bias_u = nn.Parameter(torch.zeros(heads, self.size))
        self.pos_bias_v = nn.Parameter(torch.zeros(heads, self.size))
        self.dropout = nn.Dropout(0.1)

    def shifted(self, x: Tensor) -> Tensor:
        column = torch.zeros((x.size()[0], x.size()[1], x.size()[2], 1), device=x.device, dtype=x.dtype)
        padded = torch.cat([column, x], dim=-1)
        padded = padded.view(x.size()[0], x.size()[1], x.size(3) + 1, x.size(2))
        return padded[:, :, 1:].view_as(x)

    def forward(self, x: Tensor, pos_emb: Tensor, mask: Tensor) -> Tensor:
        batch = x.size(0)
        q = self.linear_q(x).view(batch, -1, self.heads, self.size).transpose(1, 2)
        k = self.linear_k(x).view(batch, -1, self.heads, self.size).transpose(1, 2)
        v = self.linear_v(x).view(batch, -1, self.heads, self.size).transpose(1, 2)
        q = q.transpose(1, 2)
        p = self.linear_pos(pos_emb).view(-1, self.heads, self.size).transpose(0, 1)
        with_u = (q + self.pos_bias_u).transpose(1, 2)
        with_v = (q + self.pos_bias_v).transpose(1, 2)
        content = torch.matmul(with_u, k.transpose(-2, -1))
        position = self.shifted(torch.matmul(with_v, p.transpose(-2, -1)))
        position = position[:, :, :, : content.size(3)]
        scores = (content + position) / math.sqrt(self.size)
        hidden = mask.unsqueeze(1).eq(0)
        scores = scores.masked_fill(hidden, -float("inf"))
        weights = self.dropout(torch.softmax(scores, dim=-1).masked_fill(hidden, 0.0))
        mixed = torch.matmul(weights, v).transpose(1, 2).contiguous().view(batch, -1, self.heads * self.size)
        result: Tensor = self.linear_out(mixed)
        return result


class ConformerAttention(Projections):
    """Positions for each batch element, a scale of the whole width, and a fill in place."""

    def __init__(self, width: int = 32, heads: int = 4) -> None:
        super().__init__(width, heads)
        self.width = width
        self.root = math.sqrt(width)
        self.pos_proj = nn.Linear(width, width, bias=False)
        self.u_bias = nn.Parameter(torch.zeros(heads, self.size))
        self.v_bias = nn.Parameter(torch.zeros(heads, self.size))

    def shifted(self, x: Tensor) -> Tensor:
        batch, heads, queries, positions = x.size()
        padded = torch.cat([x.new_zeros(batch, heads, queries, 1), x], dim=-1)
        padded = padded.view(batch, heads, positions + 1, queries)
        return padded[:, :, 1:].view_as(x)

    def forward(self, x: Tensor, position: Tensor, mask: Tensor) -> Tensor:
        batch = x.size(0)
        position = position.repeat(batch, 1, 1)
        query = self.linear_q(x).view(batch, -1, self.heads, self.size)
        key = self.linear_k(x).view(batch, -1, self.heads, self.size).permute(0, 2, 1, 3)
        value = self.linear_v(x).view(batch, -1, self.heads, self.size).permute(0, 2, 1, 3)
        position = self.pos_proj(position).view(batch, -1, self.heads, self.size)
        content = torch.matmul((query + self.u_bias).transpose(1, 2), key.transpose(2, 3))
        place = torch.matmul((query + self.v_bias).transpose(1, 2), position.permute(0, 2, 3, 1))
        score = (content + self.shifted(place)) / self.root
        score.masked_fill_(mask.unsqueeze(1), -1e9)
        weights = F.softmax(score, -1)
        context = torch.matmul(weights, value).transpose(1, 2)
        result: Tensor = self.linear_out(context.contiguous().view(batch, -1, self.width))
        return result


class LeanSoftmax(torch.autograd.Function):
    """A softmax that keeps its result only for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int) -> Tensor:
        result = x.softmax(dim=dim)
        if torch.is_autocast_enabled():
            result = result.to(torch.float16)
        ctx.save_for_backward(result)
        ctx.dim = dim
        return result

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (result,) = ctx.saved_tensors
        with torch.amp.autocast("cuda", enabled=False):
            gradient, result = gradient.to(torch.float32), result.to(torch.float32)
            product = gradient * result
            return product - result * product.sum(dim=ctx.dim, keepdim=True), None


def lean_softmax(x: Tensor, dim: int) -> Tensor:
    if not x.requires_grad:
        return x.softmax(dim=dim)
    result: Tensor = LeanSoftmax.apply(x, dim)  # type: ignore[no-untyped-call]
    return result


class ZipformerAttention(nn.Module):
    """Heads before the batch, no scale, a shift by ``as_strided``, and weights that several modules may share."""

    def __init__(self, width: int = 32, heads: int = 4, size: int = 8, pos_size: int = 4, shared: bool = False) -> None:
        super().__init__()
        self.heads, self.size, self.pos_size, self.shared = heads, size, pos_size, shared
        self.in_proj = nn.Linear(width, heads * (2 * size + pos_size))
        self.linear_pos = nn.Linear(width, heads * pos_size, bias=False)
        self.value_1 = nn.Linear(width, heads * 12)
        self.out_1 = nn.Linear(heads * 12, width)
        if shared:
            self.value_2 = nn.Linear(width, heads * 12)
            self.out_2 = nn.Linear(heads * 12, width)
            self.nonlinear = nn.Linear(width, 3 * 24)
            self.out_3 = nn.Linear(24, width)

    def weights(self, x: Tensor, pos_emb: Tensor, padding: Tensor) -> Tensor:
        x = self.in_proj(x)
        length, batch, _ = x.shape
        query_dim = self.size * self.heads
        q = x[..., 0:query_dim]
        k = x[..., query_dim : 2 * query_dim]
        p = x[..., 2 * query_dim :]
        q = q.reshape(length, batch, self.heads, self.size).permute(2, 1, 0, 3)
        p = p.reshape(length, batch, self.heads, self.pos_size).permute(2, 1, 0, 3)
        k = k.reshape(length, batch, self.heads, self.size).permute(2, 1, 3, 0)
        scores = torch.matmul(q, k)
        pos_emb = self.linear_pos(pos_emb)
        span = 2 * length - 1
        pos_emb = pos_emb.reshape(-1, span, self.heads, self.pos_size).permute(2, 0, 3, 1)
        places = torch.matmul(p, pos_emb)
        places = places.as_strided(
            (self.heads, batch, length, length),
            (places.stride(0), places.stride(1), places.stride(2) - places.stride(3), places.stride(3)),
            storage_offset=places.stride(3) * (length - 1),
        )
        scores = scores + places
        scores = scores.masked_fill(padding.unsqueeze(1), -1000)
        return lean_softmax(scores, dim=-1)

    def mixed(self, weights: Tensor, x: Tensor, value: nn.Linear, out: nn.Linear) -> Tensor:
        length, batch, _ = x.shape
        v = value(x).reshape(length, batch, self.heads, -1).permute(2, 1, 0, 3)
        v = torch.matmul(weights, v)
        result: Tensor = out(v.permute(2, 1, 0, 3).contiguous().view(length, batch, -1))
        return result

    def forward(self, x: Tensor, pos_emb: Tensor, padding: Tensor) -> Tensor:
        weights = self.weights(x, pos_emb, padding)
        if not self.shared:
            return x + self.mixed(weights, x, self.value_1, self.out_1)
        length, batch, _ = x.shape
        selected = weights[0:1]
        s, y, g = self.nonlinear(x).chunk(3, dim=2)
        y = y * s.tanh()
        y = y.reshape(length, batch, 1, -1).permute(2, 1, 0, 3)
        y = torch.matmul(selected, y)
        y = y.permute(2, 1, 0, 3).reshape(length, batch, -1)
        x = x + self.out_3(y * g)
        x = x + self.mixed(weights, x, self.value_1, self.out_1)
        return x + self.mixed(weights, x, self.value_2, self.out_2)


class VitsAttention(nn.Module):
    """Convolutions for projections; windowed positions in the scores and in the values, or a bias of distances."""

    def __init__(
        self,
        width: int = 32,
        heads: int = 4,
        window: int | None = None,
        proximal: bool = False,
        block: int | None = None,
    ) -> None:
        super().__init__()
        self.heads, self.window, self.proximal, self.block = heads, window, proximal, block
        self.size = width // heads
        self.conv_q = nn.Conv1d(width, width, 1)
        self.conv_k = nn.Conv1d(width, width, 1)
        self.conv_v = nn.Conv1d(width, width, 1)
        self.conv_o = nn.Conv1d(width, width, 1)
        if window is not None:
            self.emb_rel_k = nn.Parameter(torch.randn(1, window * 2 + 1, self.size) * self.size**-0.5)
            self.emb_rel_v = nn.Parameter(torch.randn(1, window * 2 + 1, self.size) * self.size**-0.5)

    def relative(self, table: Tensor, length: int) -> Tensor:
        assert self.window is not None
        pad = max(length - (self.window + 1), 0)
        start = max((self.window + 1) - length, 0)
        if pad > 0:
            table = F.pad(table, [0, 0, pad, pad, 0, 0])
        return table[:, start : start + 2 * length - 1]

    def to_absolute(self, x: Tensor) -> Tensor:
        batch, heads, length, _ = x.size()
        x = F.pad(x, [0, 1, 0, 0, 0, 0, 0, 0])
        flat = x.view([batch, heads, length * 2 * length])
        flat = F.pad(flat, [0, length - 1, 0, 0, 0, 0])
        return flat.view([batch, heads, length + 1, 2 * length - 1])[:, :, :length, length - 1 :]

    def to_relative(self, x: Tensor) -> Tensor:
        batch, heads, length, _ = x.size()
        x = F.pad(x, [0, length - 1, 0, 0, 0, 0, 0, 0])
        flat = x.view([batch, heads, length**2 + length * (length - 1)])
        flat = F.pad(flat, [length, 0, 0, 0, 0, 0])
        return flat.view([batch, heads, length, 2 * length])[:, :, :, 1:]

    def distances(self, length: int) -> Tensor:
        r = torch.arange(length, dtype=torch.float32)
        diff = torch.unsqueeze(r, 0) - torch.unsqueeze(r, 1)
        return torch.unsqueeze(torch.unsqueeze(-torch.log1p(torch.abs(diff)), 0), 0)

    def forward(self, x: Tensor, x_mask: Tensor) -> Tensor:
        mask = x_mask.unsqueeze(2) * x_mask.unsqueeze(-1)
        x = x * x_mask
        query, key, value = self.conv_q(x), self.conv_k(x), self.conv_v(x)
        b, d, t = key.size()
        query = query.view(b, self.heads, self.size, t).transpose(2, 3)
        key = key.view(b, self.heads, self.size, t).transpose(2, 3)
        value = value.view(b, self.heads, self.size, t).transpose(2, 3)
        scores = torch.matmul(query / math.sqrt(self.size), key.transpose(-2, -1))
        if self.window is not None:
            used = self.relative(self.emb_rel_k, t)
            logits = torch.matmul(query / math.sqrt(self.size), used.unsqueeze(0).transpose(-2, -1))
            scores = scores + self.to_absolute(logits)
        if self.proximal:
            scores = scores + self.distances(t).to(device=scores.device, dtype=scores.dtype)
        scores = scores.masked_fill(mask == 0, -1e4)
        if self.block is not None:
            near = torch.ones_like(scores).triu(-self.block).tril(self.block)
            scores = scores.masked_fill(near == 0, -1e4)
        weights = F.softmax(scores, dim=-1)
        output = torch.matmul(weights, value)
        if self.window is not None:
            relative = self.to_relative(weights)
            output = output + torch.matmul(relative, self.relative(self.emb_rel_v, t).unsqueeze(0))
        result: Tensor = self.conv_o(output.transpose(2, 3).contiguous().view(b, d, t))
        return result


class DeepVoiceAttention(nn.Module):
    """Keys come transposed; a fill of ``.data``, a window by assignments of slices, a softmax of a flat view."""

    def __init__(self, width: int = 32, embed: int = 24) -> None:
        super().__init__()
        self.in_projection = nn.Linear(width, embed)
        self.out_projection = nn.Linear(embed, width)

    def forward(
        self, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None = None, last_attended: int | None = None
    ) -> Tensor:
        residual = query
        x = torch.bmm(self.in_projection(query), keys)
        lowest = -float("inf")
        if mask is not None:
            x.data.masked_fill_(mask.view(query.size(0), 1, -1), lowest)
        if last_attended is not None:
            backward = last_attended - 1
            if backward > 0:
                x[:, :, :backward] = lowest
            ahead = last_attended + 3
            if ahead < x.size(-1):
                x[:, :, ahead:] = lowest
        size = x.size()
        x = F.softmax(x.view(size[0] * size[1], size[2]), dim=1)
        x = F.dropout(x.view(size), p=0.1, training=self.training)
        x = torch.bmm(x, values)
        s = values.size(1)
        x = x * (s * math.sqrt(1.0 / s))
        result: Tensor = (self.out_projection(x) + residual) * math.sqrt(0.5)
        return result


class TransformerTtsAttention(nn.Module):
    """Heads before the batch, a fill of an odd power, and the weights of padded queries times zero."""

    def __init__(self, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.heads, self.size = heads, width // heads
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        self.query = nn.Linear(width, width, bias=False)
        self.final_linear = nn.Linear(2 * width, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor, pos: Tensor) -> Tensor:
        batch, length, _ = x.shape
        query_mask = pos.ne(0).type(torch.float)
        mask = query_mask.eq(0).unsqueeze(1).repeat(1, length, 1)
        mask = mask + torch.triu(torch.ones(length, length), diagonal=1).repeat(batch, 1, 1).byte()
        mask = mask.gt(0)
        query_mask = query_mask.unsqueeze(-1).repeat(1, 1, length).repeat(self.heads, 1, 1)
        mask = mask.repeat(self.heads, 1, 1)
        k = self.key(x).view(batch, length, self.heads, self.size)
        v = self.value(x).view(batch, length, self.heads, self.size)
        q = self.query(x).view(batch, length, self.heads, self.size)
        k = k.permute(2, 0, 1, 3).contiguous().view(-1, length, self.size)
        v = v.permute(2, 0, 1, 3).contiguous().view(-1, length, self.size)
        q = q.permute(2, 0, 1, 3).contiguous().view(-1, length, self.size)
        attn = torch.bmm(q, k.transpose(1, 2))
        attn = attn / math.sqrt(self.size)
        attn = attn.masked_fill(mask, -(2**32) + 1)
        attn = torch.softmax(attn, dim=-1)
        attn = attn * query_mask
        mixed = torch.bmm(attn, v).view(self.heads, batch, length, self.size)
        mixed = mixed.permute(1, 2, 0, 3).contiguous().view(batch, length, -1)
        result: Tensor = self.norm(self.final_linear(torch.cat([x, mixed], dim=-1)) + x)
        return result


class Tacotron2Attention(nn.Module):
    """Additive scores with the weights of earlier steps; nothing is a product of queries and keys."""

    def __init__(self, width: int = 32, memory: int = 24, attention: int = 16, filters: int = 4) -> None:
        super().__init__()
        self.query_layer = nn.Linear(width, attention, bias=False)
        self.memory_layer = nn.Linear(memory, attention, bias=False)
        self.v = nn.Linear(attention, 1, bias=False)
        self.location_conv = nn.Conv1d(2, filters, 5, padding=2, bias=False)
        self.location_dense = nn.Linear(filters, attention, bias=False)

    def forward(self, state: Tensor, memory: Tensor, earlier: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        query = self.query_layer(state.unsqueeze(1))
        location = self.location_dense(self.location_conv(earlier).transpose(1, 2))
        energies = self.v(torch.tanh(query + location + self.memory_layer(memory))).squeeze(-1)
        energies.data.masked_fill_(mask, -float("inf"))
        weights = F.softmax(energies, dim=1)
        context = torch.bmm(weights.unsqueeze(1), memory).squeeze(1)
        return context, weights


class RadttsAligner(nn.Module):
    """Scores are distances, with the logarithm of a prior; text is mixed by transposed weights."""

    def __init__(self, mel: int = 12, text: int = 24, width: int = 12) -> None:
        super().__init__()
        self.query_proj = nn.Conv1d(mel, width, 1)
        self.key_proj = nn.Conv1d(text, width, 1)

    def forward(self, mel: Tensor, text: Tensor, mask: Tensor, prior: Tensor) -> tuple[Tensor, Tensor]:
        keys, queries = self.key_proj(text), self.query_proj(mel)
        attn = (queries[:, :, :, None] - keys[:, :, None]) ** 2
        attn = -0.0005 * attn.sum(1, keepdim=True)
        attn = F.log_softmax(attn, dim=3) + torch.log(prior[:, None] + 1e-8)
        log_weights = attn.clone()
        attn.data.masked_fill_(mask.permute(0, 2, 1).unsqueeze(2), -float("inf"))
        attn = F.softmax(attn, dim=3)
        context = torch.bmm(text, attn.squeeze(1).transpose(1, 2))
        return context, log_weights


class DemucsLocalState(nn.Module):
    """Keys in rows and queries in columns, a softmax over rows, penalties by einsum, and nothing for oneself."""

    def __init__(self, width: int = 32, heads: int = 4, freqs: int = 0, decays: int = 4) -> None:
        super().__init__()
        self.heads, self.freqs, self.decays = heads, freqs, decays
        self.content = nn.Conv1d(width, width, 1)
        self.query = nn.Conv1d(width, width, 1)
        self.key = nn.Conv1d(width, width, 1)
        if freqs:
            self.query_freqs = nn.Conv1d(width, heads * freqs, 1)
        self.query_decay = nn.Conv1d(width, heads * decays, 1)
        self.proj = nn.Conv1d(width + heads * freqs, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        batch, _, length = x.shape
        heads = self.heads
        places = torch.arange(length, device=x.device, dtype=x.dtype)
        delta = places[:, None] - places[None, :]
        queries = self.query(x).view(batch, heads, -1, length)
        keys = self.key(x).view(batch, heads, -1, length)
        dots = torch.einsum("bhct,bhcs->bhts", keys, queries)
        dots /= keys.shape[2] ** 0.5
        if self.freqs:
            periods = torch.arange(1, self.freqs + 1, device=x.device, dtype=x.dtype)
            waves = torch.cos(2 * math.pi * delta / periods.view(-1, 1, 1))
            freq_q = self.query_freqs(x).view(batch, heads, -1, length) / self.freqs**0.5
            dots += torch.einsum("fts,bhfs->bhts", waves, freq_q)
        decays = torch.arange(1, self.decays + 1, device=x.device, dtype=x.dtype)
        decay_q = self.query_decay(x).view(batch, heads, -1, length)
        decay_q = torch.sigmoid(decay_q) / 2
        decay = -decays.view(-1, 1, 1) * delta.abs() / self.decays**0.5
        dots += torch.einsum("fts,bhfs->bhts", decay, decay_q)
        dots.masked_fill_(torch.eye(length, device=dots.device, dtype=torch.bool), -100)
        weights = torch.softmax(dots, dim=2)
        content = self.content(x).view(batch, heads, -1, length)
        result = torch.einsum("bhts,bhct->bhcs", weights, content)
        if self.freqs:
            signal = torch.einsum("bhts,fts->bhfs", weights, waves)
            result = torch.cat([result, signal], 2)
        result = result.reshape(batch, -1, length)
        mixed: Tensor = x + self.proj(result)
        return mixed


class JukeboxConv1d(nn.Module):
    """A linear layer as ``addmm``."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__()
        self.n_out = n_out
        self.w = nn.Parameter(torch.randn(n_in, n_out) * 0.02)
        self.b = nn.Parameter(torch.zeros(n_out))

    def forward(self, x: Tensor) -> Tensor:
        size = (*x.size()[:-1], self.n_out)
        return torch.addmm(self.b.type_as(x), x.view(-1, x.size(-1)), self.w.type_as(x)).view(*size)


class JukeboxFactoredAttention(nn.Module):
    """Scores scaled in place, in float, times the mask, and less a billion times what it leaves out."""

    def __init__(self, kind: str, width: int = 32, heads: int = 2, context: int = 12, blocks: int = 3) -> None:
        super().__init__()
        self.kind, self.width, self.heads, self.blocks = kind, width, heads, blocks
        self.block_ctx = context // blocks
        self.c_attn = JukeboxConv1d(width, 3 * width)
        self.c_proj = JukeboxConv1d(width, width)

    def mask(self, queries: int, keys: int, device: torch.device) -> Tensor | None:
        if self.kind == "previous":
            return None
        if self.kind == "summary":
            seen = torch.ones(queries, queries, device=device).tril()
            seen = seen.view(queries, self.blocks, queries // self.blocks)[:, :-1, -keys // self.blocks :]
            seen = F.pad(seen, (0, 0, 1, 0), value=1).contiguous().view(queries, keys)
        else:
            seen = torch.ones(queries, keys, device=device).tril(max(keys - queries, 0))
        return seen.view(1, 1, queries, keys)

    def heads_of(self, x: Tensor, k: bool = False) -> Tensor:
        x = x.view(*x.size()[:-1], self.heads, x.size(-1) // self.heads)
        return x.permute(0, 2, 3, 1) if k else x.permute(0, 2, 1, 3)

    def dense(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        q, k, v = self.heads_of(query), self.heads_of(key, k=True), self.heads_of(value)
        scale = 1.0 / math.sqrt(math.sqrt(self.width // self.heads))
        if self.training:
            w = torch.matmul(q * scale, k * scale)
        else:
            w = torch.matmul(q, k)
            w.mul_(scale * scale)
        wtype = w.dtype
        w = w.float()
        mask = self.mask(q.size(-2), k.size(-1), w.device)
        if mask is not None:
            w = w * mask + -1e9 * (1 - mask)
        w = F.softmax(w, dim=-1).type(wtype)
        a = torch.matmul(w, v).permute(0, 2, 1, 3).contiguous()
        return a.view(*a.size()[:-2], a.size(-2) * a.size(-1))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.c_attn(x).chunk(3, dim=2)
        bs, length, d = v.shape
        block, blocks = self.block_ctx, self.blocks
        if self.kind == "transposed":
            q, k, v = (
                part.view(bs, length // block, block, d)
                .transpose(1, 2)
                .contiguous()
                .view(bs * block, length // block, d)
                for part in (q, k, v)
            )
            a = self.dense(q, k, v).view(bs, block, length // block, d).transpose(1, 2).contiguous()
        elif self.kind == "previous":
            q = q.reshape(bs * length // block, block, d)
            k, v = (
                F.pad(part.view(bs, length // block, block, d)[:, :-1, :, :], (0, 0, 0, 0, 1, 0)).view(
                    bs * length // block, block, d
                )
                for part in (k, v)
            )
            a = self.dense(q, k, v)
        else:
            k, v = (F.pad(part.view(bs, blocks, length // blocks, d)[:, :-1, -1, :], (0, 0, 1, 0)) for part in (k, v))
            a = self.dense(q, k, v)
        result: Tensor = self.c_proj(a.view(bs, length, d))
        return result


class EsmAxialAttention(nn.Module):
    """Rows that share their weights, tied by a sum over the alignment, and then columns."""

    def __init__(self, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.row = Projections(width, heads)
        self.column = Projections(width, heads)
        self.heads, self.size = heads, width // heads

    def of_rows(self, x: Tensor, padding: Tensor) -> tuple[Tensor, Tensor]:
        rows, cols, batch, width = x.size()
        q = self.row.linear_q(x).view(rows, cols, batch, self.heads, self.size)
        k = self.row.linear_k(x).view(rows, cols, batch, self.heads, self.size)
        q *= self.size**-0.5 / math.sqrt(rows)
        q *= 1 - padding.permute(1, 2, 0).unsqueeze(3).unsqueeze(4).to(q)
        scores = torch.einsum("rinhd,rjnhd->hnij", q, k)
        scores = scores.masked_fill(padding[:, 0].unsqueeze(0).unsqueeze(2), -10000)
        weights = scores.softmax(-1)
        v = self.row.linear_v(x).view(rows, cols, batch, self.heads, self.size)
        context = torch.einsum("hnij,rjnhd->rinhd", weights, v)
        return self.row.linear_out(context.contiguous().view(rows, cols, batch, width)), weights

    def of_columns(self, x: Tensor, padding: Tensor) -> tuple[Tensor, Tensor]:
        rows, cols, batch, width = x.size()
        q = self.column.linear_q(x).view(rows, cols, batch, self.heads, self.size)
        k = self.column.linear_k(x).view(rows, cols, batch, self.heads, self.size)
        v = self.column.linear_v(x).view(rows, cols, batch, self.heads, self.size)
        q *= self.size**-0.5
        scores = torch.einsum("icnhd,jcnhd->hcnij", q, k)
        scores = scores.masked_fill(padding.permute(2, 0, 1).unsqueeze(0).unsqueeze(3), -10000)
        weights = scores.softmax(-1)
        context = torch.einsum("hcnij,jcnhd->icnhd", weights, v)
        return self.column.linear_out(context.contiguous().view(rows, cols, batch, width)), weights

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        x = x + self.of_rows(x, padding)[0]
        return x + self.of_columns(x, padding)[0]


def permuted(x: Tensor, order: tuple[int, ...]) -> Tensor:
    """The last dimensions in this order."""
    leading = list(range(len(x.shape[: -len(order)])))
    return x.permute(leading + [len(leading) + i for i in order])


class OpenfoldAttention(nn.Module):
    """A list of biases, each with its own broadcast, and a gate."""

    def __init__(self, width: int = 16, size: int = 8, heads: int = 4) -> None:
        super().__init__()
        self.heads, self.size = heads, size
        self.linear_q = nn.Linear(width, size * heads, bias=False)
        self.linear_k = nn.Linear(width, size * heads, bias=False)
        self.linear_v = nn.Linear(width, size * heads, bias=False)
        self.linear_o = nn.Linear(size * heads, width)
        self.linear_g = nn.Linear(width, size * heads)

    def forward(self, q_x: Tensor, k_x: Tensor, v_x: Tensor, biases: list[Tensor]) -> Tensor:
        q, k, v = self.linear_q(q_x), self.linear_k(k_x), self.linear_v(v_x)
        q, k, v = (part.view((*part.shape[:-1], self.heads, -1)) for part in (q, k, v))
        a = torch.matmul(permuted(q, (0, 2, 1, 3)), permuted(k, (0, 2, 3, 1)))
        a = a * (1 / math.sqrt(self.size))
        for bias in biases:
            a = a + bias
        a = F.softmax(a, dim=-1)
        o = torch.matmul(a, permuted(v, (0, 2, 1, 3))).transpose(-2, -3)
        g = torch.sigmoid(self.linear_g(q_x))
        o = o * g.view((*g.shape[:-1], self.heads, -1))
        result: Tensor = self.linear_o(o.reshape((*o.shape[:-2], -1)))
        return result


class OpenfoldTriangles(nn.Module):
    """Attention around both nodes of pairs: a bias of the keys' mask and one of the pairs themselves."""

    def __init__(self, width: int = 16, heads: int = 4) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.linears = nn.ModuleList([nn.Linear(width, heads, bias=False), nn.Linear(width, heads, bias=False)])
        self.attentions = nn.ModuleList([OpenfoldAttention(width, heads=heads), OpenfoldAttention(width, heads=heads)])

    def forward(self, z: Tensor, mask: Tensor) -> Tensor:
        z = z + self.around(z, mask, 0)
        return z + self.around(z.transpose(-2, -3), mask.transpose(-1, -2), 1).transpose(-2, -3)

    def around(self, x: Tensor, mask: Tensor, node: int) -> Tensor:
        x = self.norms[node](x)
        mask_bias = (1e9 * (mask - 1))[..., :, None, None, :]
        triangle_bias = permuted(self.linears[node](x), (2, 0, 1)).unsqueeze(-4)
        result: Tensor = self.attentions[node](x, x, x, [mask_bias, triangle_bias])
        return result


class OpenfoldGlobalAttention(nn.Module):
    """One query of each head is the mean of all, keys and values have one head, and the gate brings the length back."""

    def __init__(self, width: int = 16, size: int = 8, heads: int = 4) -> None:
        super().__init__()
        self.heads, self.size = heads, size
        self.linear_q = nn.Linear(width, size * heads, bias=False)
        self.linear_k = nn.Linear(width, size, bias=False)
        self.linear_v = nn.Linear(width, size, bias=False)
        self.linear_g = nn.Linear(width, size * heads)
        self.linear_o = nn.Linear(size * heads, width)

    def forward(self, m: Tensor, mask: Tensor) -> Tensor:
        q = torch.sum(m * mask.unsqueeze(-1), dim=-2) / (torch.sum(mask, dim=-1)[..., None] + 1e-8)
        q = self.linear_q(q)
        q = q * (self.size ** (-0.5))
        q = q.view((*q.shape[:-1], self.heads, -1))
        k, v = self.linear_k(m), self.linear_v(m)
        a = torch.matmul(q, k.transpose(-1, -2))
        a = a + (1e9 * (mask - 1))[..., :, None, :]
        a = F.softmax(a, dim=-1)
        o = torch.matmul(a, v)
        g = torch.sigmoid(self.linear_g(m))
        g = g.view((*g.shape[:-1], self.heads, -1))
        o = o.unsqueeze(-3) * g
        result: Tensor = self.linear_o(o.reshape((*o.shape[:-2], -1)))
        return result


class OpenfoldInvariantPoints(nn.Module):
    """Scores of scalars, pairs and distances of points; the weights mix scalars, points and pairs."""

    def __init__(self, width: int = 32, pair: int = 8, size: int = 8, heads: int = 4, points: int = 4) -> None:
        super().__init__()
        self.size, self.heads, self.points = size, heads, points
        self.linear_q = nn.Linear(width, size * heads)
        self.linear_kv = nn.Linear(width, 2 * size * heads)
        self.linear_q_points = nn.Linear(width, heads * points * 3)
        self.linear_kv_points = nn.Linear(width, heads * 2 * points * 3)
        self.linear_b = nn.Linear(pair, heads)
        self.head_weights = nn.Parameter(torch.zeros(heads))
        self.linear_out = nn.Linear(heads * (pair + size + points * 4), width)

    def placed(self, points: Tensor, rotation: Tensor, shift: Tensor) -> Tensor:
        points = torch.stack(torch.split(points, points.shape[-1] // 3, dim=-1), dim=-1)
        points = (rotation[:, :, None] * points[..., None, :]).sum(-1) + shift[:, :, None]
        return points.view((*points.shape[:-2], self.heads, -1, 3))

    def forward(self, s: Tensor, z: Tensor, rotation: Tensor, shift: Tensor, mask: Tensor) -> Tensor:
        q, kv = self.linear_q(s), self.linear_kv(s)
        q = q.view((*q.shape[:-1], self.heads, -1))
        k, v = torch.split(kv.view((*kv.shape[:-1], self.heads, -1)), self.size, dim=-1)
        q_pts = self.placed(self.linear_q_points(s), rotation, shift)
        kv_pts = self.placed(self.linear_kv_points(s), rotation, shift)
        k_pts, v_pts = torch.split(kv_pts, [self.points, self.points], dim=-2)
        b = self.linear_b(z)
        a = torch.matmul(permuted(q, (1, 0, 2)), permuted(k, (1, 2, 0)))
        a *= math.sqrt(1.0 / (3 * self.size))
        a += math.sqrt(1.0 / 3) * permuted(b, (2, 0, 1))
        pt_att = q_pts.unsqueeze(-4) - k_pts.unsqueeze(-5)
        pt_att = pt_att**2
        pt_att = sum(torch.unbind(pt_att, dim=-1))  # type: ignore[assignment]
        head_weights = F.softplus(self.head_weights).view(*((1,) * len(pt_att.shape[:-2]) + (-1, 1)))
        head_weights = head_weights * math.sqrt(1.0 / (3 * (self.points * 9.0 / 2)))
        pt_att = torch.sum(pt_att * head_weights, dim=-1) * (-0.5)
        square = 1e5 * (mask.unsqueeze(-1) * mask.unsqueeze(-2) - 1)
        a = a + permuted(pt_att, (2, 0, 1))
        a = a + square.unsqueeze(-3)
        a = F.softmax(a, dim=-1)
        o = torch.matmul(a, v.transpose(-2, -3)).transpose(-2, -3)
        o = o.reshape((*o.shape[:-2], -1))
        o_pt = torch.sum(a[..., None, :, :, None] * permuted(v_pts, (1, 3, 0, 2))[..., None, :, :], dim=-2)
        o_pt = permuted(o_pt, (2, 0, 3, 1))
        o_pt = o_pt - shift[:, :, None, None]
        o_pt = (rotation.transpose(-1, -2)[:, :, None, None] * o_pt[..., None, :]).sum(-1)
        norm = torch.sqrt(torch.sum(o_pt**2, dim=-1) + 1e-8).flatten(-2)
        o_pt = o_pt.reshape(*o_pt.shape[:-3], -1, 3)
        o_pair = torch.matmul(a.transpose(-2, -3), z).flatten(-2)
        result: Tensor = self.linear_out(torch.cat((o, *torch.unbind(o_pt, dim=-1), norm, o_pair), dim=-1))
        return result


class NeighborAttention(nn.Module):
    """Each node asks its own neighbors, in six dimensions; what is hidden is filled by a tensor and then times zero."""

    def __init__(self, width: int = 32, edge: int = 24, heads: int = 4) -> None:
        super().__init__()
        self.heads, self.width = heads, width
        self.W_Q = nn.Linear(width, width, bias=False)
        self.W_K = nn.Linear(edge, width, bias=False)
        self.W_V = nn.Linear(edge, width, bias=False)
        self.W_O = nn.Linear(width, width, bias=False)

    def forward(self, nodes: Tensor, edges: Tensor, mask: Tensor) -> Tensor:
        batch, count, near = edges.shape[:3]
        d = int(self.width / self.heads)
        q = self.W_Q(nodes).view([batch, count, 1, self.heads, 1, d])
        k = self.W_K(edges).view([batch, count, near, self.heads, d, 1])
        v = self.W_V(edges).view([batch, count, near, self.heads, d])
        logits = torch.matmul(q, k).view([batch, count, near, self.heads]).transpose(-2, -1)
        logits = logits / np.sqrt(d)
        mask = mask.unsqueeze(2).expand(-1, -1, self.heads, -1)
        logits = torch.where(mask > 0, logits, torch.tensor(np.finfo(np.float32).min))
        attend = F.softmax(logits, -1)
        attend = mask * attend
        update = torch.matmul(attend.unsqueeze(-2), v.transpose(2, 3))
        result: Tensor = self.W_O(update.view([batch, count, self.width]))
        return result


class EquibindCrossAttention(nn.Module):
    """No batch, no heads, no scale: two graphs attend to each other under a block of ones."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.queries = nn.Sequential(nn.Linear(width, width, bias=False), nn.LeakyReLU(0.01))
        self.keys = nn.Sequential(nn.Linear(width, width, bias=False), nn.LeakyReLU(0.01))
        self.values = nn.Linear(width, width, bias=False)

    def cross(self, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
        a = mask * torch.mm(queries, torch.transpose(keys, 1, 0)) - 1000.0 * (1.0 - mask)
        return torch.mm(torch.softmax(a, dim=1), values)

    def forward(self, ligand: Tensor, receptor: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        to_ligand = self.cross(self.queries(ligand), self.keys(receptor), self.values(receptor), mask)
        back = self.cross(self.queries(receptor), self.keys(ligand), self.values(ligand), mask.transpose(0, 1))
        return to_ligand, back


class MoleculeAttention(Projections):
    """The weights are mixed with those of distances and of bonds before they meet the values."""

    def forward(self, x: Tensor, mask: Tensor, adjacency: Tensor, distances: Tensor) -> Tensor:
        mask = mask.unsqueeze(1)
        batch = x.size(0)
        q = self.linear_q(x).view(batch, -1, self.heads, self.size).transpose(1, 2)
        k = self.linear_k(x).view(batch, -1, self.heads, self.size).transpose(1, 2)
        v = self.linear_v(x).view(batch, -1, self.heads, self.size).transpose(1, 2)
        distances = distances.masked_fill(mask.repeat(1, mask.shape[-1], 1) == 0, np.inf)
        distances = F.softmax(-distances, dim=-1)
        p_dist = distances.unsqueeze(1).repeat(1, q.shape[1], 1, 1)
        scores = torch.matmul(q, k.transpose(-2, -1)) / math.sqrt(q.size(-1))
        scores = scores.masked_fill(mask.unsqueeze(1).repeat(1, q.shape[1], q.shape[2], 1) == 0, -1e12)
        p_attn = F.softmax(scores, dim=-1)
        adjacency = adjacency / (adjacency.sum(dim=-1).unsqueeze(2) + 1e-6)
        p_adj = adjacency.unsqueeze(1).repeat(1, q.shape[1], 1, 1)
        weights = 0.3 * p_attn + 0.3 * p_dist + 0.4 * p_adj
        mixed = torch.matmul(weights, v).transpose(1, 2).contiguous().view(batch, -1, self.heads * self.size)
        result: Tensor = self.linear_out(mixed)
        return result


class GraphormerLayers(nn.Module):
    """A bias of paths and edges, built by sums into slices, with infinities of the padding twice, for two layers."""

    def __init__(self, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.rel_pos_encoder = nn.Embedding(10, heads, padding_idx=0)
        self.edge_encoder = nn.Embedding(12, heads, padding_idx=0)
        self.virtual_distance = nn.Embedding(1, heads)
        self.graph_token = nn.Embedding(1, width)
        self.layers = nn.ModuleList([Projections(width, heads), Projections(width, heads)])

    def forward(self, x: Tensor, attn_bias: Tensor, rel_pos: Tensor, edge_type: Tensor) -> Tensor:
        bias = attn_bias.clone()
        bias = bias.unsqueeze(1).repeat(1, self.heads, 1, 1)
        rel_pos_bias = self.rel_pos_encoder(rel_pos).permute(0, 3, 1, 2)
        bias[:, :, 1:, 1:] = bias[:, :, 1:, 1:] + rel_pos_bias
        t = self.virtual_distance.weight.view(1, self.heads, 1)
        bias[:, :, 1:, 0] = bias[:, :, 1:, 0] + t
        bias[:, :, 0, :] = bias[:, :, 0, :] + t
        edge_input = self.edge_encoder(edge_type).mean(-2).permute(0, 3, 1, 2)
        bias[:, :, 1:, 1:] = bias[:, :, 1:, 1:] + edge_input
        bias = bias + attn_bias.unsqueeze(1)
        x = torch.cat([self.graph_token.weight.unsqueeze(0).repeat(x.size(0), 1, 1), x], dim=1)
        for layer in self.layers:
            assert isinstance(layer, Projections)
            x = x + self.attended(layer, x, bias)
        return x

    def attended(self, layer: Projections, x: Tensor, bias: Tensor) -> Tensor:
        batch = x.size(0)
        q = layer.linear_q(x).view(batch, -1, layer.heads, layer.size).transpose(1, 2)
        k = layer.linear_k(x).view(batch, -1, layer.heads, layer.size).transpose(1, 2).transpose(2, 3)
        v = layer.linear_v(x).view(batch, -1, layer.heads, layer.size).transpose(1, 2)
        q = q * layer.size**-0.5
        scores = torch.matmul(q, k)
        scores = scores + bias
        weights = torch.softmax(scores, dim=3)
        mixed = weights.matmul(v).transpose(1, 2).contiguous().view(batch, -1, layer.heads * layer.size)
        result: Tensor = layer.linear_out(mixed)
        return result


class DenseGat(nn.Module):
    """Additive scores of every pair of nodes, a fill by a tensor, and a softmax over the second dimension of two."""

    def __init__(self, width: int = 16, size: int = 8, heads: int = 2) -> None:
        super().__init__()
        self.size = size
        self.W = nn.ParameterList([nn.Parameter(torch.randn(width, size)) for _ in range(heads)])
        self.a = nn.ParameterList([nn.Parameter(torch.randn(2 * size, 1)) for _ in range(heads)])

    def forward(self, x: Tensor, adj: Tensor) -> Tensor:
        return torch.cat([self.head(x, adj, w, a) for w, a in zip(self.W, self.a, strict=True)], dim=1)

    def head(self, x: Tensor, adj: Tensor, w: Tensor, a: Tensor) -> Tensor:
        h = torch.mm(x, w)
        n = h.size()[0]
        pairs = torch.cat([h.repeat(1, n).view(n * n, -1), h.repeat(n, 1)], dim=1).view(n, -1, 2 * self.size)
        e = F.leaky_relu(torch.matmul(pairs, a).squeeze(2), 0.2)
        attention = torch.where(adj > 0, e, -9e15 * torch.ones_like(e))
        attention = F.softmax(attention, dim=1)
        attention = F.dropout(attention, 0.6, training=self.training)
        return F.elu(torch.matmul(attention, h))


class DestationaryAttention(Projections):
    """Scores times a learned factor of each batch element plus a learned bias, filled, and then scaled."""

    def __init__(self, width: int = 32, heads: int = 4, length: int = 12) -> None:
        super().__init__(width, heads)
        self.tau = nn.Linear(length, 1)
        self.delta = nn.Linear(length, length)

    def forward(self, x: Tensor, statistics: Tensor) -> Tensor:
        batch, length, _ = x.shape
        tau = self.tau(statistics).exp()
        delta = self.delta(statistics)
        q = self.linear_q(x).view(batch, length, self.heads, -1)
        k = self.linear_k(x).view(batch, length, self.heads, -1)
        v = self.linear_v(x).view(batch, length, self.heads, -1)
        scale = 1.0 / math.sqrt(q.shape[-1])
        tau = tau.unsqueeze(1).unsqueeze(1)
        delta = delta.unsqueeze(1).unsqueeze(1)
        scores = torch.einsum("blhe,bshe->bhls", q, k) * tau + delta
        with torch.no_grad():
            mask = torch.triu(torch.ones([batch, 1, length, length], dtype=torch.bool), diagonal=1).to(q.device)
        scores.masked_fill_(mask, -np.inf)
        weights = torch.softmax(scale * scores, dim=-1)
        mixed = torch.einsum("bhls,bshd->blhd", weights, v).contiguous()
        result: Tensor = self.linear_out(mixed.view(batch, length, -1))
        return result


class AnomalyAttention(Projections):
    """The weights are a result, beside those of a Gaussian of learned width."""

    distances: Tensor

    def __init__(self, width: int = 32, heads: int = 4, length: int = 12) -> None:
        super().__init__(width, heads)
        self.sigma = nn.Linear(width, heads)
        i = torch.arange(length)
        self.register_buffer("distances", torch.abs(i.view(-1, 1) - i.view(1, -1)))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        batch, length, _ = x.shape
        q = self.linear_q(x).view(batch, length, self.heads, -1)
        k = self.linear_k(x).view(batch, length, self.heads, -1)
        v = self.linear_v(x).view(batch, length, self.heads, -1)
        sigma = self.sigma(x).view(batch, length, self.heads).transpose(1, 2)
        scores = torch.einsum("blhe,bshe->bhls", q, k)
        attn = 1.0 / math.sqrt(q.shape[-1]) * scores
        sigma = torch.sigmoid(sigma * 5) + 1e-5
        sigma = torch.pow(3, sigma) - 1
        sigma = sigma.unsqueeze(-1).repeat(1, 1, 1, length)
        prior = self.distances.unsqueeze(0).unsqueeze(0).repeat(sigma.shape[0], sigma.shape[1], 1, 1)
        prior = 1.0 / (math.sqrt(2 * math.pi) * sigma) * torch.exp(-(prior**2) / 2 / (sigma**2))
        series = torch.softmax(attn, dim=-1)
        mixed = torch.einsum("bhls,bshd->blhd", series, v).contiguous()
        return self.linear_out(mixed.view(batch, length, -1)), series, prior


class ProbSparseAttention(Projections):
    """The most telling queries only, under a gathered causal mask; the others get the sum of the values so far."""

    sample: Tensor

    def __init__(self, width: int = 32, heads: int = 4, length: int = 12, top: int = 6) -> None:
        super().__init__(width, heads)
        self.top = top
        self.register_buffer("sample", integers(length, top, below=length, seed=3))

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q = self.linear_q(x).view(batch, length, self.heads, -1).transpose(2, 1)
        k = self.linear_k(x).view(batch, length, self.heads, -1).transpose(2, 1)
        v = self.linear_v(x).view(batch, length, self.heads, -1).transpose(2, 1)
        expanded = k.unsqueeze(-3).expand(batch, self.heads, length, length, self.size)
        sampled = expanded[:, :, torch.arange(length).unsqueeze(1), self.sample, :]
        sparsity = torch.matmul(q.unsqueeze(-2), sampled.transpose(-2, -1)).squeeze()
        measure = sparsity.max(-1)[0] - torch.div(sparsity.sum(-1), length)
        index = measure.topk(self.top, sorted=False)[1]
        b, h = torch.arange(batch)[:, None, None], torch.arange(self.heads)[None, :, None]
        scores = torch.matmul(q[b, h, index, :], k.transpose(-2, -1))
        scores = scores * (1.0 / math.sqrt(self.size))
        context = v.cumsum(dim=-2)
        mask = torch.ones(length, scores.shape[-1], dtype=torch.bool).triu(1)
        mask = mask[None, None, :].expand(batch, self.heads, length, scores.shape[-1])
        mask = mask[b, h, index, :].view(scores.shape)
        scores.masked_fill_(mask, -np.inf)
        weights = torch.softmax(scores, dim=-1)
        context[b, h, index, :] = torch.matmul(weights, v).type_as(context)
        result: Tensor = self.linear_out(context.transpose(2, 1).contiguous().view(batch, length, -1))
        return result


class PatchTstLayers(nn.Module):
    """A learned scale, and scores that the next layer adds to its own, masked and all."""

    def __init__(self, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Projections(width, heads), Projections(width, heads)])
        self.scales = nn.ParameterList([nn.Parameter(torch.tensor((width // heads) ** -0.5)) for _ in range(2)])

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        scores: Tensor | None = None
        for layer, scale in zip(self.layers, self.scales, strict=True):
            assert isinstance(layer, Projections)
            mixed, scores = self.attended(layer, scale, x, scores, padding)
            x = x + mixed
        return x

    def attended(
        self, layer: Projections, scale: Tensor, x: Tensor, previous: Tensor | None, padding: Tensor
    ) -> tuple[Tensor, Tensor]:
        batch = x.size(0)
        q = layer.linear_q(x).view(batch, -1, layer.heads, layer.size).transpose(1, 2)
        k = layer.linear_k(x).view(batch, -1, layer.heads, layer.size).permute(0, 2, 3, 1)
        v = layer.linear_v(x).view(batch, -1, layer.heads, layer.size).transpose(1, 2)
        scores = torch.matmul(q, k) * scale
        if previous is not None:
            scores = scores + previous
        scores.masked_fill_(padding.unsqueeze(1).unsqueeze(2), -np.inf)
        weights = F.softmax(scores, dim=-1)
        mixed = torch.matmul(weights, v).transpose(1, 2).contiguous().view(batch, -1, layer.heads * layer.size)
        return layer.linear_out(mixed), scores


class RoutingAttention(nn.Module):
    """Weights with a dimension of heads, and infinities and zeros set where a mask indexes; then a glimpse of each."""

    def __init__(self, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        size = width // heads
        self.heads, self.size, self.width = heads, size, width
        self.norm_factor = 1 / math.sqrt(size)
        self.W_query = nn.Parameter(torch.randn(heads, width, size))
        self.W_key = nn.Parameter(torch.randn(heads, width, size))
        self.W_val = nn.Parameter(torch.randn(heads, width, size))
        self.W_out = nn.Parameter(torch.randn(heads, size, width))
        self.project_nodes = nn.Linear(width, 2 * width, bias=False)
        self.project_out = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, mask: Tensor, visited: Tensor) -> Tensor:
        h = self.encoded(x, mask)
        return self.glimpse(h, visited)

    def encoded(self, x: Tensor, mask: Tensor) -> Tensor:
        batch, nodes, width = x.size()
        flat = x.contiguous().view(-1, width)
        shape = (self.heads, batch, nodes, -1)
        q = torch.matmul(flat, self.W_query).view(shape)
        k = torch.matmul(flat, self.W_key).view(shape)
        v = torch.matmul(flat, self.W_val).view(shape)
        compatibility = self.norm_factor * torch.matmul(q, k.transpose(2, 3))
        mask = mask.view(1, batch, nodes, nodes).expand_as(compatibility)
        compatibility[mask] = -np.inf
        attn = torch.softmax(compatibility, dim=-1)
        cleaned = attn.clone()
        cleaned[mask] = 0
        heads = torch.matmul(cleaned, v)
        return torch.mm(
            heads.permute(1, 2, 0, 3).contiguous().view(-1, self.heads * self.size), self.W_out.view(-1, self.width)
        ).view(batch, nodes, self.width)

    def glimpse(self, h: Tensor, visited: Tensor) -> Tensor:
        batch, steps, nodes = visited.shape
        k, v = (
            part.contiguous()
            .view(batch, 1, nodes, self.heads, -1)
            .expand(batch, steps, nodes, self.heads, -1)
            .permute(3, 0, 1, 2, 4)
            for part in self.project_nodes(h).chunk(2, dim=-1)
        )
        query = h[:, :steps]
        q = query.contiguous().view(batch, steps, self.heads, 1, self.size).permute(2, 0, 1, 3, 4)
        compatibility = torch.matmul(q, k.transpose(-2, -1)) / math.sqrt(q.size(-1))
        compatibility[visited[None, :, :, None, :].expand_as(compatibility)] = -math.inf
        heads = torch.matmul(torch.softmax(compatibility, dim=-1), v)
        heads = heads.permute(1, 2, 3, 0, 4).contiguous().view(-1, steps, 1, self.width)
        result: Tensor = self.project_out(heads).squeeze(-2)
        return result


class AttentionCritic(nn.Module):
    """Each agent attends to a list of the others; the values are weighted by a product and a sum."""

    def __init__(self, width: int = 24, agents: int = 3) -> None:
        super().__init__()
        self.agents = agents
        self.key_extractor = nn.Linear(width, 16, bias=False)
        self.selector_extractor = nn.Linear(width, 16, bias=False)
        self.value_extractor = nn.Sequential(nn.Linear(width, 16), nn.LeakyReLU())

    def forward(self, states: list[Tensor]) -> list[Tensor]:
        all_keys = [self.key_extractor(state) for state in states]
        all_values = [self.value_extractor(state) for state in states]
        selectors = [self.selector_extractor(state) for state in states]
        results = []
        for agent, selector in enumerate(selectors):
            keys = [key for other, key in enumerate(all_keys) if other != agent]
            values = [value for other, value in enumerate(all_values) if other != agent]
            logits = torch.matmul(selector.view(selector.shape[0], 1, -1), torch.stack(keys).permute(1, 2, 0))
            scaled = logits / np.sqrt(keys[0].shape[1])
            weights = F.softmax(scaled, dim=2)
            results.append((torch.stack(values).permute(1, 2, 0) * weights).sum(dim=2))
        return results


class DecisionTransformerAttention(nn.Module):
    """A mask of bytes and a fill in buffers, and a mask of steps that is repeated for three tokens of each."""

    bias: Tensor
    masked_bias: Tensor

    def __init__(self, width: int = 32, heads: int = 2, context: int = 24) -> None:
        super().__init__()
        self.heads, self.width = heads, width
        self.c_attn = JukeboxConv1d(width, 3 * width)
        self.c_proj = JukeboxConv1d(width, width)
        tril = torch.tril(torch.ones((context, context), dtype=torch.uint8))
        self.register_buffer("bias", tril.view(1, 1, context, context))
        self.register_buffer("masked_bias", torch.tensor(-1e4))

    def forward(self, returns: Tensor, states: Tensor, actions: Tensor, mask: Tensor) -> Tensor:
        batch, steps = states.shape[:2]
        x = torch.stack((returns, states, actions), dim=1).permute(0, 2, 1, 3).reshape(batch, 3 * steps, self.width)
        stacked = torch.stack((mask, mask, mask), dim=1).permute(0, 2, 1).reshape(batch, 3 * steps)
        stacked = stacked.view(batch, -1)[:, None, None, :].to(dtype=x.dtype)
        stacked = (1.0 - stacked) * -10000.0
        query, key, value = self.c_attn(x).split(self.width, dim=2)
        q = query.view(batch, 3 * steps, self.heads, -1).permute(0, 2, 1, 3)
        k = key.view(batch, 3 * steps, self.heads, -1).permute(0, 2, 3, 1)
        v = value.view(batch, 3 * steps, self.heads, -1).permute(0, 2, 1, 3)
        w = torch.matmul(q, k)
        w = w / (float(v.size(-1)) ** 0.5)
        nd, ns = w.size(-2), w.size(-1)
        causal = self.bias[:, :, ns - nd : ns, :ns]
        w = torch.where(causal.bool(), w, self.masked_bias.to(w.dtype))
        w = w + stacked
        w = nn.Softmax(dim=-1)(w)
        a = torch.matmul(w, v).permute(0, 2, 1, 3).contiguous()
        result: Tensor = self.c_proj(a.view(batch, 3 * steps, self.width))
        return result


class TimeIntervalAttention(Projections):
    """Positions and intervals in scores and in values, under masks of padded queries and of the future."""

    def __init__(self, width: int = 32, heads: int = 4, length: int = 10, span: int = 16) -> None:
        super().__init__(width, heads)
        self.abs_k, self.abs_v = nn.Embedding(length, width), nn.Embedding(length, width)
        self.time_k, self.time_v = nn.Embedding(span + 1, width), nn.Embedding(span + 1, width)

    def forward(self, x: Tensor, items: Tensor, intervals: Tensor) -> Tensor:
        batch, length, _ = x.shape
        places = torch.arange(length).repeat(batch, 1)
        q, k, v = self.linear_q(x), self.linear_k(x), self.linear_v(x)
        q_, k_, v_, abs_k, abs_v = (
            torch.cat(torch.split(part, self.size, dim=2), dim=0)
            for part in (q, k, v, self.abs_k(places), self.abs_v(places))
        )
        time_k, time_v = (
            torch.cat(torch.split(part, self.size, dim=3), dim=0)
            for part in (self.time_k(intervals), self.time_v(intervals))
        )
        weights = q_.matmul(torch.transpose(k_, 1, 2))
        weights += q_.matmul(torch.transpose(abs_k, 1, 2))
        weights += time_k.matmul(q_.unsqueeze(-1)).squeeze(-1)
        weights = weights / (k_.shape[-1] ** 0.5)
        time_mask = (items == 0).repeat(self.heads, 1)
        time_mask = time_mask.unsqueeze(-1).expand(weights.shape[0], -1, weights.shape[-1])
        future = ~torch.tril(torch.ones((length, length), dtype=torch.bool))
        future = future.unsqueeze(0).expand(weights.shape[0], -1, -1)
        paddings = torch.ones(weights.shape) * -sys.float_info.max
        weights = torch.where(time_mask, paddings, weights)
        weights = torch.where(future, paddings, weights)
        weights = F.softmax(weights, dim=-1)
        outputs = weights.matmul(v_)
        outputs += weights.matmul(abs_v)
        outputs += weights.unsqueeze(-2).matmul(time_v).reshape(outputs.shape)
        result: Tensor = self.linear_out(torch.cat(torch.split(outputs, batch, dim=0), dim=2))
        return result


class RechorusAttention(nn.Module):
    """The largest score of all is subtracted from every one, and weights that are no number become zero."""

    def __init__(self, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.heads, self.size = heads, width // heads
        self.q_linear = nn.Linear(width, width)
        self.k_linear = nn.Linear(width, width)
        self.v_linear = nn.Linear(width, width)

    def split(self, x: Tensor) -> Tensor:
        return x.view(*x.size()[:-1], self.heads, self.size).transpose(-2, -3)

    def forward(self, x: Tensor) -> Tensor:
        length = x.size(1)
        mask = torch.from_numpy(np.tril(np.ones((1, 1, length, length), dtype=int))).to(x.device)
        q, k, v = self.split(self.q_linear(x)), self.split(self.k_linear(x)), self.split(self.v_linear(x))
        scores = torch.matmul(q, k.transpose(-2, -1)) / self.size**0.5
        scores = scores.masked_fill(mask == 0, -np.inf)
        scores = (scores - scores.max()).softmax(dim=-1)
        scores = scores.masked_fill(torch.isnan(scores), 0)
        return torch.matmul(scores, v).transpose(-2, -3).reshape(x.size())


class PctOffsetAttention(nn.Module):
    """Queries and keys share their weight; the weights are normalized over queries once more and come second."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.q_conv = nn.Conv1d(width, width // 4, 1, bias=False)
        self.k_conv = nn.Conv1d(width, width // 4, 1, bias=False)
        self.q_conv.weight = self.k_conv.weight
        self.v_conv = nn.Conv1d(width, width, 1)
        self.trans_conv = nn.Conv1d(width, width, 1)
        self.after_norm = nn.BatchNorm1d(width)

    def forward(self, x: Tensor) -> Tensor:
        q = self.q_conv(x).permute(0, 2, 1)
        k = self.k_conv(x)
        v = self.v_conv(x)
        energy = torch.bmm(q, k)
        attention = F.softmax(energy, dim=-1)
        attention = attention / (1e-9 + attention.sum(dim=1, keepdim=True))
        mixed = torch.bmm(v, attention)
        return x + F.relu(self.after_norm(self.trans_conv(x - mixed)))


class PointTransformerBlock(nn.Module):
    """Differences of queries and keys of the nearest points give a weight for each feature."""

    def __init__(self, points: int = 16, width: int = 24, near: int = 5) -> None:
        super().__init__()
        self.near = near
        self.fc1, self.fc2 = nn.Linear(points, width), nn.Linear(width, points)
        self.fc_delta = nn.Sequential(nn.Linear(3, width), nn.ReLU(), nn.Linear(width, width))
        self.fc_gamma = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))
        self.w_qs = nn.Linear(width, width, bias=False)
        self.w_ks = nn.Linear(width, width, bias=False)
        self.w_vs = nn.Linear(width, width, bias=False)

    def forward(self, xyz: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        index = torch.sum((xyz[:, :, None] - xyz[:, None]) ** 2, dim=-1).argsort()[:, :, : self.near]
        x = self.fc1(features)
        q, k, v = self.w_qs(x), self.gathered(self.w_ks(x), index), self.gathered(self.w_vs(x), index)
        position = self.fc_delta(xyz[:, :, None] - self.gathered(xyz, index))
        attn = self.fc_gamma(q[:, :, None] - k + position)
        attn = F.softmax(attn / np.sqrt(k.size(-1)), dim=-2)
        result = torch.einsum("bmnf,bmnf->bmf", attn, v + position)
        return self.fc2(result) + features, attn

    def gathered(self, points: Tensor, index: Tensor) -> Tensor:
        flat = index.reshape(index.size(0), -1)
        result = torch.gather(points, 1, flat[..., None].expand(-1, -1, points.size(-1)))
        return result.reshape(*index.size(), -1)


class GeometricAttention(nn.Module):
    """Embeddings of pairs meet the queries in an einsum; factors and soft masks multiply the scores."""

    def __init__(self, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.heads, self.size = heads, width // heads
        self.proj_q, self.proj_k = nn.Linear(width, width), nn.Linear(width, width)
        self.proj_v, self.proj_p = nn.Linear(width, width), nn.Linear(width, width)

    def forward(
        self, x: Tensor, memory: Tensor, embed_qk: Tensor, factors: Tensor, key_weights: Tensor, key_masks: Tensor
    ) -> Tensor:
        q = rearrange(self.proj_q(x), "b n (h c) -> b h n c", h=self.heads)
        k = rearrange(self.proj_k(memory), "b m (h c) -> b h m c", h=self.heads)
        v = rearrange(self.proj_v(memory), "b m (h c) -> b h m c", h=self.heads)
        p = rearrange(self.proj_p(embed_qk), "b n m (h c) -> b h n m c", h=self.heads)
        of_pairs = torch.einsum("bhnc,bhnmc->bhnm", q, p)
        of_points = torch.einsum("bhnc,bhmc->bhnm", q, k)
        scores = (of_points + of_pairs) / self.size**0.5
        scores = factors.unsqueeze(1) * scores
        scores = scores * key_weights.unsqueeze(1).unsqueeze(1)
        scores = scores.masked_fill(key_masks.unsqueeze(1).unsqueeze(1), float("-inf"))
        scores = F.softmax(scores, dim=-1)
        return rearrange(torch.matmul(scores, v), "b h n c -> b n (h c)")


class InducedSetAttention(nn.Module):
    """Heads are pieces of the width in the batch, the scale is of the whole width, and queries are added."""

    def __init__(self, width: int = 32, heads: int = 4, points: int = 5) -> None:
        super().__init__()
        self.inducing = nn.Parameter(torch.randn(1, points, width))
        self.blocks = nn.ModuleList([Projections(width, heads), Projections(width, heads)])
        self.width, self.size = width, width // heads

    def forward(self, x: Tensor) -> Tensor:
        h = self.attended(0, self.inducing.repeat(x.size(0), 1, 1), x)
        return self.attended(1, x, h)

    def attended(self, block: int, queries: Tensor, x: Tensor) -> Tensor:
        layer = self.blocks[block]
        assert isinstance(layer, Projections)
        q = layer.linear_q(queries)
        k, v = layer.linear_k(x), layer.linear_v(x)
        q_ = torch.cat(q.split(self.size, 2), 0)
        k_ = torch.cat(k.split(self.size, 2), 0)
        v_ = torch.cat(v.split(self.size, 2), 0)
        a = torch.softmax(q_.bmm(k_.transpose(1, 2)) / math.sqrt(self.width), 2)
        o = torch.cat((q_ + a.bmm(v_)).split(q.size(0), 0), 2)  # type: ignore[no-untyped-call]
        return o + F.relu(layer.linear_out(o))


class SlotAttention(nn.Module):
    """A softmax over the slots, which are the queries, and then an average over the inputs."""

    def __init__(self, width: int = 24, iterations: int = 2) -> None:
        super().__init__()
        self.iterations, self.scale = iterations, width**-0.5
        self.slots_mu = nn.Parameter(torch.randn(1, 1, width))
        self.slots_log_sigma = nn.Parameter(torch.rand(1, 1, width))
        self.to_q, self.to_k, self.to_v = nn.Linear(width, width), nn.Linear(width, width), nn.Linear(width, width)
        self.gru = nn.GRUCell(width, width)
        self.norm_input, self.norm_slots = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, inputs: Tensor, epsilon: Tensor) -> Tensor:
        batch, _, width = inputs.shape
        slots = self.slots_mu + torch.exp(self.slots_log_sigma) * epsilon
        inputs = self.norm_input(inputs)
        k, v = self.to_k(inputs), self.to_v(inputs)
        for _ in range(self.iterations):
            previous = slots
            q = self.to_q(self.norm_slots(slots))
            dots = torch.einsum("bid,bjd->bij", q, k) * self.scale
            attn = dots.softmax(dim=1) + 1e-8
            attn = attn / attn.sum(dim=-1, keepdim=True)
            updates = torch.einsum("bjd,bij->bid", v, attn)
            slots = self.gru(updates.reshape(-1, width), previous.reshape(-1, width)).reshape(batch, -1, width)
        return slots


class CrossmodalAttention(nn.Module):
    """Time first; a learned key and one of zeros at the end, a mask of infinities cut for them, a softmax in float."""

    def __init__(self, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.width, self.heads, self.size = width, heads, width // heads
        self.in_proj_weight = nn.Parameter(torch.randn(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.bias_k = nn.Parameter(torch.randn(1, 1, width))
        self.bias_v = nn.Parameter(torch.randn(1, 1, width))
        self.out_proj = nn.Linear(width, width)

    def projected(self, x: Tensor, start: int, end: int) -> Tensor:
        return F.linear(x, self.in_proj_weight[start:end, :], self.in_proj_bias[start:end])

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        queries, keys = x.size(0), other.size(0)
        mask = torch.ones(queries, keys).float().fill_(float("-inf"))
        mask = torch.triu(mask, 1 + abs(keys - queries))
        mixed, _ = self.attended(x, other, mask)
        return x + mixed

    def attended(self, x: Tensor, other: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        length, batch, width = x.size()
        q = self.projected(x, 0, width)
        k, v = self.projected(other, width, 3 * width).chunk(2, dim=-1)
        q *= self.size**-0.5
        k = torch.cat([k, self.bias_k.repeat(1, batch, 1)])
        v = torch.cat([v, self.bias_v.repeat(1, batch, 1)])
        mask = torch.cat([mask, mask.new_zeros(mask.size(0), 1)], dim=1)
        q = q.contiguous().view(length, batch * self.heads, self.size).transpose(0, 1)
        k = k.contiguous().view(-1, batch * self.heads, self.size).transpose(0, 1)
        v = v.contiguous().view(-1, batch * self.heads, self.size).transpose(0, 1)
        k = torch.cat([k, k.new_zeros((k.size(0), 1, *k.size()[2:]))], dim=1)
        v = torch.cat([v, v.new_zeros((v.size(0), 1, *v.size()[2:]))], dim=1)
        mask = torch.cat([mask, mask.new_zeros(mask.size(0), 1)], dim=1)
        weights = torch.bmm(q, k.transpose(1, 2))
        weights += mask.unsqueeze(0)
        weights = F.softmax(weights.float(), dim=-1).type_as(weights)
        mixed = torch.bmm(weights, v).transpose(0, 1).contiguous().view(length, batch, width)
        weights = weights.view(batch, self.heads, length, k.size(1)).sum(dim=1) / self.heads
        return self.out_proj(mixed), weights


class ClipAttentionPool(nn.Module):
    """The mean is put before the pixels and its row alone is used; PyTorch's function with three weights."""

    def __init__(self, side: int = 3, width: int = 32, heads: int = 4, output: int = 16) -> None:
        super().__init__()
        self.positional_embedding = nn.Parameter(torch.randn(side**2 + 1, width) / width**0.5)
        self.k_proj, self.q_proj = nn.Linear(width, width), nn.Linear(width, width)
        self.v_proj, self.c_proj = nn.Linear(width, width), nn.Linear(width, output)
        self.heads = heads

    def forward(self, x: Tensor) -> Tensor:
        x = x.reshape(x.shape[0], x.shape[1], x.shape[2] * x.shape[3]).permute(2, 0, 1)
        x = torch.cat([x.mean(dim=0, keepdim=True), x], dim=0)
        x = x + self.positional_embedding[:, None, :].to(x.dtype)
        x, _ = F.multi_head_attention_forward(
            query=x,
            key=x,
            value=x,
            embed_dim_to_check=x.shape[-1],
            num_heads=self.heads,
            q_proj_weight=self.q_proj.weight,
            k_proj_weight=self.k_proj.weight,
            v_proj_weight=self.v_proj.weight,
            in_proj_weight=None,
            in_proj_bias=torch.cat([self.q_proj.bias, self.k_proj.bias, self.v_proj.bias]),
            bias_k=None,
            bias_v=None,
            add_zero_attn=False,
            dropout_p=0,
            out_proj_weight=self.c_proj.weight,
            out_proj_bias=self.c_proj.bias,
            use_separate_proj_weight=True,
            training=self.training,
            need_weights=False,
        )
        return x[0]


class RelevanceEinsum(nn.Module):
    """An einsum as a module, whose operands a relevance pass may ask for."""

    def __init__(self, equation: str) -> None:
        super().__init__()
        self.equation = equation

    def forward(self, operands: list[Tensor]) -> Tensor:
        return torch.einsum(self.equation, *operands)


class ExplainedVitAttention(nn.Module):
    """Weights and values are saved for the explanation that follows."""

    attn: Tensor | None = None
    v: Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "attn": None, "v": None}

    def __init__(self, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.heads, self.scale = heads, (width // heads) ** -0.5
        self.matmul1 = RelevanceEinsum("bhid,bhjd->bhij")
        self.matmul2 = RelevanceEinsum("bhij,bhjd->bhid")
        self.qkv, self.proj = nn.Linear(width, width * 3), nn.Linear(width, width)
        self.softmax = nn.Softmax(dim=-1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = rearrange(self.qkv(x), "b n (qkv h d) -> qkv b h n d", qkv=3, h=self.heads)
        self.v = v
        dots = self.matmul1([q, k]) * self.scale
        attn = self.softmax(dots)
        self.attn = attn
        out = rearrange(self.matmul2([attn, v]), "b h n d -> b n (h d)")
        result: Tensor = self.proj(out)
        return result


class FormerSelfAttention(nn.Module):
    """Queries and keys each take the fourth root of the whole width; infinities are assigned at listed places."""

    def __init__(self, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.tokeys = nn.Linear(width, width, bias=False)
        self.toqueries = nn.Linear(width, width, bias=False)
        self.tovalues = nn.Linear(width, width, bias=False)
        self.unifyheads = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, t, e = x.size()
        h, s = self.heads, e // self.heads
        keys = self.tokeys(x).view(b, t, h, s).transpose(1, 2).contiguous().view(b * h, t, s)
        queries = self.toqueries(x).view(b, t, h, s).transpose(1, 2).contiguous().view(b * h, t, s)
        values = self.tovalues(x).view(b, t, h, s).transpose(1, 2).contiguous().view(b * h, t, s)
        queries = queries / (e ** (1 / 4))
        keys = keys / (e ** (1 / 4))
        dot = torch.bmm(queries, keys.transpose(1, 2))
        indices = torch.triu_indices(t, t, offset=1)
        dot[..., indices[0], indices[1]] = float("-inf")
        dot = F.softmax(dot, dim=2)
        mixed = torch.bmm(dot, values).view(b, h, t, s).transpose(1, 2).contiguous().view(b, t, s * h)
        result: Tensor = self.unifyheads(mixed)
        return result


class EdgeAugmentedAttention(nn.Module):
    """Heads come last; clamped scores plus edges become new edges, and gates multiply the weights."""

    def __init__(self, width: int = 32, edge: int = 12, heads: int = 4, last: bool = False) -> None:
        super().__init__()
        self.heads, self.size, self.last = heads, width // heads, last
        self.lin_qkv, self.lin_o = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.lin_e, self.lin_g = nn.Linear(edge, heads), nn.Linear(edge, heads)
        if not last:
            self.lin_o_e = nn.Linear(heads, edge)

    def forward(self, x: Tensor, edges: Tensor, mask: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        batch, length, _ = x.shape
        qkv, e, g = self.lin_qkv(x), self.lin_e(edges), self.lin_g(edges)
        q, k, v = qkv.view(batch, length, -1, self.heads).split(self.size, dim=2)
        a_hat = torch.einsum("bldh,bmdh->blmh", q, k) * (self.size**-0.5)
        h_hat = a_hat.clamp(-5, 5) + e
        gates = torch.sigmoid(g + mask)
        weights = F.softmax(h_hat + mask, dim=2) * gates
        mixed = torch.einsum("blmh,bmkh->blkh", weights, v)
        if self.last:
            degrees = torch.sum(gates, dim=2, keepdim=True)
            scalers = torch.log(1 + degrees)
            scalers[:, :1] = 1.0
            mixed = mixed * scalers
        result: Tensor = self.lin_o(mixed.reshape(batch, length, -1))
        return result if self.last else (result, edges + self.lin_o_e(h_hat))


class MusicTransformerAttention(Projections):
    """Places masked by a product and skewed by a view; the mask is whole numbers times a billion, in place."""

    places: Tensor

    def __init__(self, width: int = 32, heads: int = 4, longest: int = 16) -> None:
        super().__init__(width, heads)
        self.longest = longest
        self.register_buffer("places", noise(longest, self.size, seed=3))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        batch, length, width = x.shape
        q = torch.reshape(self.linear_q(x), (batch, length, self.heads, -1)).permute(0, 2, 1, 3)
        k = torch.reshape(self.linear_k(x), (batch, length, self.heads, -1)).permute(0, 2, 1, 3)
        v = torch.reshape(self.linear_v(x), (batch, length, self.heads, -1)).permute(0, 2, 1, 3)
        qe = torch.einsum("bhld,md->bhlm", [q, self.places[max(0, self.longest - length) :, :]])
        counts = torch.arange(qe.size()[-1] - 1, qe.size()[-1] - qe.size()[-2] - 1, -1)
        seen = ~(torch.arange(qe.size()[-1]).unsqueeze(0) < counts.unsqueeze(1))
        qe = seen.to(qe.dtype) * qe
        padded = F.pad(qe, [1, 0, 0, 0, 0, 0, 0, 0])
        skewed = torch.reshape(padded, [padded.size(0), padded.size(1), padded.size(-1), padded.size(-2)])[:, :, 1:, :]
        logits = torch.matmul(q, k.permute(0, 1, 3, 2)) + skewed
        logits = logits / math.sqrt(self.size)
        logits += (mask * -1e9).to(logits.dtype)
        weights = F.softmax(logits, -1)
        mixed = torch.matmul(weights, v).permute(0, 2, 1, 3)
        result: Tensor = self.linear_out(torch.reshape(mixed, (batch, -1, width)))
        return result


class GmanBlock(nn.Module):
    """Heads are pieces in the batch, over places and then over steps, with a repeated mask and a number by where."""

    def __init__(self, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.heads, self.size = heads, width // heads
        self.spatial = nn.ModuleList([nn.Linear(2 * width, width) for _ in range(3)])
        self.temporal = nn.ModuleList([nn.Linear(2 * width, width) for _ in range(3)])
        self.gate = nn.Linear(width, width)

    def pieces(self, layers: nn.ModuleList, x: Tensor) -> list[Tensor]:
        return [torch.cat(torch.split(F.relu(layer(x)), self.size, dim=-1), dim=0) for layer in layers]

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        batch, steps, places, _ = x.shape
        both = torch.cat((x, embedding), dim=-1)
        q, k, v = self.pieces(self.spatial, both)
        attention = torch.matmul(q, k.transpose(2, 3))
        attention /= self.size**0.5
        attention = F.softmax(attention, dim=-1)
        of_places = torch.cat(torch.split(torch.matmul(attention, v), batch, dim=0), dim=-1)
        q, k, v = self.pieces(self.temporal, both)
        q, k, v = q.permute(0, 2, 1, 3), k.permute(0, 2, 3, 1), v.permute(0, 2, 1, 3)
        attention = torch.matmul(q, k)
        attention /= self.size**0.5
        mask = torch.tril(torch.ones(steps, steps))
        mask = torch.unsqueeze(torch.unsqueeze(mask, dim=0), dim=0)
        mask = mask.repeat(self.heads * batch, places, 1, 1).to(torch.bool)
        attention = torch.where(mask, attention, -(2**15) + 1)
        attention = F.softmax(attention, dim=-1)
        of_steps = torch.matmul(attention, v).permute(0, 2, 1, 3)
        of_steps = torch.cat(torch.split(of_steps, batch, dim=0), dim=-1)
        z = torch.sigmoid(self.gate(of_places))
        return torch.add(x, torch.add(torch.mul(z, of_places), torch.mul(1 - z, of_steps)))


class MedicalAxialAttention(nn.Module):
    """The scores go through a batch norm, alone or beside those of positions, before the softmax."""

    flatten_index: Tensor

    def __init__(self, width: int = 32, groups: int = 4, length: int = 8, positions: bool = False) -> None:
        super().__init__()
        self.groups, self.planes, self.length, self.positions = groups, width // groups, length, positions
        self.qkv_transform = nn.Conv1d(width, 2 * width, 1, bias=False)
        self.bn_qkv = nn.BatchNorm1d(2 * width)
        self.bn_similarity = nn.BatchNorm2d(groups * (3 if positions else 1))
        self.bn_output = nn.BatchNorm1d(width * (2 if positions else 1))
        if positions:
            self.relative = nn.Parameter(torch.randn(2 * self.planes, 2 * length - 1))
            index = torch.arange(length).unsqueeze(1) - torch.arange(length).unsqueeze(0) + length - 1
            self.register_buffer("flatten_index", index.view(-1))

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 3, 1, 2)
        n, w, c, h = x.shape
        x = x.contiguous().view(n * w, c, h)
        half = [self.planes // 2, self.planes // 2, self.planes]
        qkv = self.bn_qkv(self.qkv_transform(x))
        q, k, v = torch.split(qkv.reshape(n * w, self.groups, self.planes * 2, h), half, dim=2)
        if self.positions:
            tables = torch.index_select(self.relative, 1, self.flatten_index)
            tables = tables.view(self.planes * 2, self.length, self.length)
            of_q, of_k, of_v = torch.split(tables, half, dim=0)
            qr = torch.einsum("bgci,cij->bgij", q, of_q)
            kr = torch.einsum("bgci,cij->bgij", k, of_k).transpose(2, 3)
            qk = torch.einsum("bgci, bgcj->bgij", q, k)
            scores = torch.cat([qk, qr, kr], dim=1)
            scores = self.bn_similarity(scores).view(n * w, 3, self.groups, h, h).sum(dim=1)
            similarity = F.softmax(scores, dim=3)
            sv = torch.einsum("bgij,bgcj->bgci", similarity, v)
            sve = torch.einsum("bgij,cij->bgci", similarity, of_v)
            stacked = torch.cat([sv, sve], dim=-1).view(n * w, c * 2, h)
            output = self.bn_output(stacked).view(n, w, c, 2, h).sum(dim=-2)
        else:
            qk = torch.einsum("bgci, bgcj->bgij", q, k)
            scores = self.bn_similarity(qk).reshape(n * w, 1, self.groups, h, h).sum(dim=1).contiguous()
            similarity = F.softmax(scores, dim=3)
            sv = torch.einsum("bgij,bgcj->bgci", similarity, v).reshape(n * w, c, h).contiguous()
            output = self.bn_output(sv).reshape(n, w, c, 1, h).sum(dim=-2).contiguous()
        result: Tensor = output.permute(0, 2, 3, 1)
        return result


class DcpPointer(nn.Module):
    """Points of three coordinates are the values, which come before the transposed weights."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.embed = nn.Conv1d(3, width, 1)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        of_source, of_target = self.embed(source), self.embed(target)
        scores = torch.matmul(of_source.transpose(2, 1).contiguous(), of_target) / math.sqrt(of_source.size(1))
        scores = torch.softmax(scores, dim=2)
        found = torch.matmul(target, scores.transpose(2, 1).contiguous())
        centered = source - source.mean(dim=2, keepdim=True)
        return torch.matmul(centered, (found - found.mean(dim=2, keepdim=True)).transpose(2, 1).contiguous())


class GatedTransformerXlAttention(nn.Module):
    """Memory before the keys, heads last, a softmax over the second dimension, and a question to the mask's values."""

    def __init__(self, width: int = 32, size: int = 8, heads: int = 4) -> None:
        super().__init__()
        self.heads, self.size, self.scale = heads, size, 1 / (size**0.5)
        self.linear_kv = nn.Linear(width, size * heads * 2, bias=False)
        self.linear_q = nn.Linear(width, size * heads, bias=False)
        self.linear_p = nn.Linear(width, size * heads, bias=False)
        self.lout = nn.Linear(size * heads, width, bias=False)
        self.u = nn.Parameter(torch.zeros(heads, size))
        self.v = nn.Parameter(torch.zeros(heads, size))

    def shifted(self, x: Tensor) -> Tensor:
        column = torch.zeros((x.size(0), 1, *x.size()[2:]), device=x.device, dtype=x.dtype)
        return torch.cat([column, x], dim=1).view(x.size(1) + 1, x.size(0), *x.size()[2:])[1:].view_as(x)

    def forward(self, x: Tensor, positions: Tensor, memory: Tensor) -> Tensor:
        now, before, batch = x.shape[0], memory.shape[0], x.shape[1]
        mask = torch.triu(torch.ones((now, now + before)), diagonal=1 + before).bool()[..., None].to(x.device)
        k, v = torch.chunk(self.linear_kv(torch.cat([memory, x], dim=0)), 2, dim=-1)
        q = self.linear_q(x).view(now, batch, self.heads, self.size)
        k = k.view(now + before, batch, self.heads, self.size)
        v = v.view(now + before, batch, self.heads, self.size)
        p = self.linear_p(positions).view(now + before, self.heads, self.size)
        content = torch.einsum("ibhd,jbhd->ijbh", (q + self.u, k))
        position = self.shifted(torch.einsum("ibhd,jhd->ijbh", (q + self.v, p)))
        attn = content + position
        if mask is not None and mask.any().item():
            attn = attn.masked_fill(mask[..., None], -float("inf"))
        attn = torch.softmax(attn * self.scale, dim=1)
        mixed = torch.einsum("ijbh,jbhd->ibhd", (attn, v)).contiguous().view(now, batch, -1)
        result: Tensor = self.lout(mixed)
        return result


class StyleTokens(nn.Module):
    """One query, learned keys that are expanded, heads stacked before the batch, a scale of the tokens' width."""

    def __init__(self, width: int = 32, heads: int = 4, tokens: int = 6) -> None:
        super().__init__()
        self.heads, self.width, self.key_dim = heads, width, width // heads
        self.embed = nn.Parameter(torch.randn(tokens, self.key_dim))
        self.W_query = nn.Linear(width // 2, width, bias=False)
        self.W_key = nn.Linear(self.key_dim, width, bias=False)
        self.W_value = nn.Linear(self.key_dim, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        query = x.unsqueeze(1)
        keys = torch.tanh(self.embed).unsqueeze(0).expand(x.size(0), -1, -1)
        q, k, v = self.W_query(query), self.W_key(keys), self.W_value(keys)
        size = self.width // self.heads
        q = torch.stack(torch.split(q, size, dim=2), dim=0)
        k = torch.stack(torch.split(k, size, dim=2), dim=0)
        v = torch.stack(torch.split(v, size, dim=2), dim=0)
        scores = torch.matmul(q, k.transpose(2, 3))
        scores = scores / (self.key_dim**0.5)
        scores = F.softmax(scores, dim=3)
        out = torch.matmul(scores, v)
        return torch.cat(torch.split(out, 1, dim=0), dim=3).squeeze(0)


def padded_square(length: int, *counts: int) -> Tensor:
    """True where both the query and the key are no padding."""
    valid = first(length, *counts)
    return valid[:, :, None] & valid[:, None, :]


def padded_bias(length: int, *counts: int) -> Tensor:
    """Infinities for padded keys."""
    return torch.zeros(len(counts), length, length).masked_fill(~first(length, *counts)[:, None], float("-inf"))


def block_of_ones(rows: tuple[int, int], columns: tuple[int, int]) -> Tensor:
    mask = torch.zeros(sum(rows), sum(columns))
    mask[: rows[0], : columns[0]] = 1
    mask[rows[0] :, columns[0] :] = 1
    return mask


def rotations(batch: int, count: int) -> Tensor:
    result: Tensor = torch.linalg.qr(noise(batch, count, 3, 3, seed=2))[0]
    return result


CASES: tuple[Case, ...] = (
    Case(
        "espnet_attention",
        "mask inverted in place, filled, zeroed; weights kept",
        1,
        EspnetAttention,
        lambda: {"x": noise(2, 12, 32, seed=0), "mask": padded_square(12, 12, 9)},
        "espnet/espnet",
    ),
    Case(
        "wenet_relative",
        "shifted positions, weights zeroed after infinities",
        1,
        WenetRelativeAttention,
        lambda: {
            "x": noise(2, 10, 32, seed=0),
            "pos_emb": noise(1, 19, 32, seed=1),
            "mask": first(10, 10, 7)[:, None],
        },
        "wenet-e2e/wenet",
    ),
    Case(
        "conformer_relative",
        "positions of each element, scale of the whole width, fill in place",
        1,
        ConformerAttention,
        lambda: {
            "x": noise(2, 10, 32, seed=0),
            "position": noise(1, 10, 32, seed=1),
            "mask": ~first(10, 10, 7)[:, None],
        },
        "sooftware/conformer",
    ),
    Case(
        "zipformer_attention",
        "positions by as_strided, softmax of its own backward pass",
        1,
        ZipformerAttention,
        lambda: {"x": noise(10, 2, 32, seed=0), "pos_emb": noise(1, 19, 32, seed=1), "padding": ~first(10, 10, 7)},
        "k2-fsa/icefall",
    ),
    Case(
        "zipformer_shared",
        "weights that three modules share",
        1,
        lambda: ZipformerAttention(shared=True),
        lambda: {"x": noise(10, 2, 32, seed=0), "pos_emb": noise(1, 19, 32, seed=1), "padding": ~first(10, 10, 7)},
        "k2-fsa/icefall",
    ),
    Case(
        "vits_window",
        "windowed positions in scores and values",
        1,
        lambda: VitsAttention(window=4),
        lambda: {"x": noise(2, 32, 12, seed=0), "x_mask": first(12, 12, 9)[:, None].float()},
        "jaywalnut310/vits",
    ),
    Case(
        "vits_proximal",
        "bias of distances, band by triu and tril of the scores' shape",
        1,
        lambda: VitsAttention(proximal=True, block=3),
        lambda: {"x": noise(2, 32, 12, seed=0), "x_mask": first(12, 12, 9)[:, None].float()},
        "jaywalnut310/vits",
    ),
    Case(
        "deepvoice3_masked",
        "fill of .data, softmax of a flat view",
        1,
        DeepVoiceAttention,
        lambda: {
            "query": noise(2, 7, 32, seed=0),
            "keys": noise(2, 24, 12, seed=1),
            "values": noise(2, 12, 24, seed=2),
            "mask": ~first(12, 12, 9),
        },
        "r9y9/deepvoice3_pytorch",
    ),
    Case(
        "deepvoice3_monotonic",
        "window by assignments of slices",
        1,
        DeepVoiceAttention,
        lambda: {
            "query": noise(2, 7, 32, seed=0),
            "keys": noise(2, 24, 12, seed=1),
            "values": noise(2, 12, 24, seed=2),
            "last_attended": 5,
        },
        "r9y9/deepvoice3_pytorch",
    ),
    Case(
        "transformer_tts",
        "sum of masks as bytes, weights of padded queries zeroed",
        1,
        TransformerTtsAttention,
        lambda: {"x": noise(2, 10, 32, seed=0), "pos": torch.arange(1, 11).repeat(2, 1) * first(10, 10, 7)},
        "soobinseo/Transformer-TTS",
    ),
    Case(
        "tacotron2_location",
        "additive, rightly kept",
        1,
        Tacotron2Attention,
        lambda: {
            "state": noise(2, 32, seed=0),
            "memory": noise(2, 12, 24, seed=1),
            "earlier": noise(2, 2, 12, seed=2).softmax(-1),
            "mask": ~first(12, 12, 9),
        },
        "NVIDIA/tacotron2",
    ),
    Case(
        "radtts_aligner",
        "distances, rightly kept",
        1,
        RadttsAligner,
        lambda: {
            "mel": noise(2, 12, 14, seed=0),
            "text": noise(2, 24, 8, seed=1),
            "mask": ~first(8, 8, 6)[..., None],
            "prior": noise(2, 14, 8, seed=2).softmax(-1),
        },
        "NVIDIA/radtts",
    ),
    Case(
        "demucs_local_state",
        "key-major scores, softmax over rows, decays by einsum",
        1,
        DemucsLocalState,
        lambda: {"x": noise(2, 32, 12, seed=0)},
        "facebookresearch/demucs",
    ),
    Case(
        "demucs_frequencies",
        "key-major weights used twice",
        1,
        lambda: DemucsLocalState(freqs=3),
        lambda: {"x": noise(2, 32, 12, seed=0)},
        "facebookresearch/demucs",
    ),
    Case(
        "jukebox_summary",
        "causal mask of blocks by a view, times and plus",
        1,
        lambda: JukeboxFactoredAttention("summary"),
        lambda: {"x": noise(2, 12, 32, seed=0)},
        "openai/jukebox",
    ),
    Case(
        "jukebox_blocks",
        "transposed and previous blocks",
        2,
        lambda: nn.Sequential(JukeboxFactoredAttention("transposed"), JukeboxFactoredAttention("previous")),
        lambda: {"input": noise(2, 12, 32, seed=0)},
        "openai/jukebox",
    ),
    Case(
        "esm_axial",
        "tied rows and columns, einsum with five letters",
        2,
        EsmAxialAttention,
        lambda: {
            "x": noise(5, 7, 2, 32, seed=0),
            "padding": ~(first(7, 7, 5)[:, None, :] & first(5, 5, 4)[:, :, None]),
        },
        "facebookresearch/esm",
    ),
    Case(
        "openfold_triangles",
        "two biases of different broadcasts, gate",
        2,
        OpenfoldTriangles,
        lambda: {"z": noise(2, 6, 6, 16, seed=0), "mask": padded_square(6, 6, 4).float()},
        "aqlaboratory/openfold",
    ),
    Case(
        "openfold_global",
        "one mean query of each head, one head of keys",
        1,
        OpenfoldGlobalAttention,
        lambda: {"m": noise(2, 5, 8, 16, seed=0), "mask": first(8, 8, 6)[:, None].expand(-1, 5, -1).float()},
        "aqlaboratory/openfold",
    ),
    Case(
        "openfold_points",
        "distances of points in the scores, weights used three times",
        1,
        OpenfoldInvariantPoints,
        lambda: {
            "s": noise(2, 8, 32, seed=0),
            "z": noise(2, 8, 8, 8, seed=1),
            "rotation": rotations(2, 8),
            "shift": noise(2, 8, 3, seed=3),
            "mask": first(8, 8, 6).float(),
        },
        "aqlaboratory/openfold",
    ),
    Case(
        "neighbor_attention",
        "neighbors of each node, six dimensions, fill by a tensor and product after",
        1,
        NeighborAttention,
        lambda: {
            "nodes": noise(2, 9, 32, seed=0),
            "edges": noise(2, 9, 5, 24, seed=1),
            "mask": (first(9, 9, 6)[:, :, None] & (noise(2, 9, 5, seed=2) > -1)).float(),
        },
        "jingraham/neurips19-graph-protein-design",
    ),
    Case(
        "equibind_cross",
        "no batch, mask times scores less a thousand",
        2,
        EquibindCrossAttention,
        lambda: {
            "ligand": noise(9, 32, seed=0),
            "receptor": noise(14, 32, seed=1),
            "mask": block_of_ones((5, 4), (8, 6)),
        },
        "HannesStark/EquiBind",
    ),
    Case(
        "molecule_attention",
        "weights mixed with those of distances and bonds",
        1,
        MoleculeAttention,
        lambda: {
            "x": noise(2, 9, 32, seed=0),
            "mask": first(9, 9, 6),
            "adjacency": (noise(2, 9, 9, seed=1) > 0).float(),
            "distances": positive(2, 9, 9, seed=2),
        },
        "ardigen/MAT",
    ),
    Case(
        "graphormer_bias",
        "bias by sums into slices, infinities twice",
        2,
        GraphormerLayers,
        lambda: {
            "x": noise(2, 8, 32, seed=0),
            "attn_bias": padded_bias(9, 9, 7),
            "rel_pos": integers(2, 8, 8, below=10, seed=1),
            "edge_type": integers(2, 8, 8, 3, below=12, seed=2),
        },
        "microsoft/Graphormer",
    ),
    Case(
        "dense_gat",
        "additive, rightly kept",
        2,
        DenseGat,
        lambda: {"x": noise(9, 16, seed=0), "adj": (noise(9, 9, seed=1) > 0).float() + torch.eye(9)},
        "Diego999/pyGAT",
    ),
    Case(
        "destationary_attention",
        "learned factor and bias of each element, scale after the fill",
        1,
        DestationaryAttention,
        lambda: {"x": noise(2, 12, 32, seed=0), "statistics": noise(2, 12, seed=1)},
        "thuml/Nonstationary_Transformers",
    ),
    Case(
        "anomaly_attention",
        "weights returned, rightly kept",
        1,
        AnomalyAttention,
        lambda: {"x": noise(2, 12, 32, seed=0)},
        "thuml/Anomaly-Transformer",
    ),
    Case(
        "prob_sparse_attention",
        "chosen queries, gathered causal mask, result assigned into sums",
        1,
        ProbSparseAttention,
        lambda: {"x": noise(2, 12, 32, seed=0)},
        "zhouhaoyi/Informer2020",
    ),
    Case(
        "patchtst_residual",
        "learned scale, scores passed to the next layer",
        2,
        PatchTstLayers,
        lambda: {"x": noise(2, 12, 32, seed=0), "padding": ~first(12, 12, 9)},
        "yuqinie98/PatchTST",
    ),
    Case(
        "routing_attention",
        "infinities and zeros where a mask indexes; five dimensions",
        2,
        RoutingAttention,
        lambda: {
            "x": noise(2, 9, 32, seed=0),
            "mask": ~padded_square(9, 9, 7),
            "visited": torch.ones(9, 9, dtype=torch.bool).tril(-1)[None].expand(2, -1, -1),
        },
        "wouterkool/attention-learn-to-route",
    ),
    Case(
        "maac_critic",
        "one query, values by a product and a sum",
        3,
        AttentionCritic,
        lambda: {"states": [noise(4, 24, seed=seed) for seed in range(3)]},
        "shariqiqbal2810/MAAC",
    ),
    Case(
        "decision_transformer",
        "bytes and fill in buffers, mask of steps stacked",
        1,
        DecisionTransformerAttention,
        lambda: {
            "returns": noise(2, 6, 32, seed=0),
            "states": noise(2, 6, 32, seed=1),
            "actions": noise(2, 6, 32, seed=2),
            "mask": first(6, 6, 4).flip(1).long(),
        },
        "kzl/decision-transformer",
    ),
    Case(
        "tisasrec_attention",
        "intervals in scores, two masks by where, the weights in three products",
        3,
        TimeIntervalAttention,
        lambda: {
            "x": noise(2, 10, 32, seed=0),
            "items": ids(2, 10, 1),
            "intervals": integers(2, 10, 10, below=17, seed=2),
        },
        "pmixer/TiSASRec.pytorch",
    ),
    Case(
        "rechorus_attention",
        "largest of all subtracted, no numbers zeroed",
        1,
        RechorusAttention,
        lambda: {"x": noise(2, 10, 32, seed=0)},
        "THUwangcy/ReChorus",
    ),
    Case(
        "pct_offset",
        "normalized over queries once more",
        1,
        PctOffsetAttention,
        lambda: {"x": noise(2, 32, 12, seed=0)},
        "Strawberry-Eat-Mango/PCT_Pytorch",
    ),
    Case(
        "point_transformer_vector",
        "a weight for each feature, rightly kept",
        1,
        PointTransformerBlock,
        lambda: {"xyz": noise(2, 10, 3, seed=0), "features": noise(2, 10, 16, seed=1)},
        "qq456cvb/Point-Transformers",
    ),
    Case(
        "geotransformer_rpe",
        "pairs by einsum, factors and soft masks times scores",
        1,
        GeometricAttention,
        lambda: {
            "x": noise(2, 9, 32, seed=0),
            "memory": noise(2, 11, 32, seed=1),
            "embed_qk": noise(2, 9, 11, 32, seed=2),
            "factors": positive(2, 9, 11, seed=3),
            "key_weights": positive(2, 11, seed=4),
            "key_masks": ~first(11, 11, 8),
        },
        "qinzheng93/GeoTransformer",
    ),
    Case(
        "set_transformer_induced",
        "heads by split and cat, queries added",
        2,
        InducedSetAttention,
        lambda: {"x": noise(2, 12, 32, seed=0)},
        "juho-lee/set_transformer",
    ),
    Case(
        "slot_attention",
        "softmax over queries, rightly kept",
        2,
        SlotAttention,
        lambda: {"inputs": noise(2, 12, 24, seed=0), "epsilon": noise(2, 4, 24, seed=1)},
        "evelinehong/slot-attention-pytorch",
    ),
    Case(
        "crossmodal_attention",
        "learned key and key of zeros, infinities by triu",
        1,
        CrossmodalAttention,
        lambda: {"x": noise(9, 2, 32, seed=0), "other": noise(12, 2, 32, seed=1)},
        "yaohungt/Multimodal-Transformer",
    ),
    Case(
        "clip_attention_pool",
        "PyTorch's function with three weights, one row used",
        1,
        ClipAttentionPool,
        lambda: {"x": noise(2, 32, 3, 3, seed=0)},
        "openai/CLIP",
    ),
    Case(
        "explained_vit",
        "weights saved, rightly kept",
        1,
        ExplainedVitAttention,
        lambda: {"x": noise(2, 12, 32, seed=0)},
        "hila-chefer/Transformer-Explainability",
    ),
    Case(
        "former_attention",
        "infinities assigned at triu_indices",
        1,
        FormerSelfAttention,
        lambda: {"x": noise(2, 12, 32, seed=0)},
        "pbloem/former",
    ),
    Case(
        "edge_augmented",
        "clamped scores that are also new edges, gates times weights, heads last",
        1,
        EdgeAugmentedAttention,
        lambda: {
            "x": noise(2, 9, 32, seed=0),
            "edges": noise(2, 9, 9, 12, seed=1),
            "mask": (padded_square(9, 9, 7).float()[..., None] - 1) * 1e9,
        },
        "shamim-hussain/egt_pytorch",
    ),
    Case(
        "edge_augmented_last",
        "clamped scores, gates times weights and their sum times the result",
        1,
        lambda: EdgeAugmentedAttention(last=True),
        lambda: {
            "x": noise(2, 9, 32, seed=0),
            "edges": noise(2, 9, 9, 12, seed=1),
            "mask": (padded_square(9, 9, 7).float()[..., None] - 1) * 1e9,
        },
        "shamim-hussain/egt_pytorch",
    ),
    Case(
        "music_transformer",
        "skewed places, mask of whole numbers times a billion",
        1,
        MusicTransformerAttention,
        lambda: {
            "x": noise(2, 12, 32, seed=0),
            "mask": ((~first(12, 12, 9)[:, None, None]) | torch.ones(12, 12).triu(1).bool()).long(),
        },
        "jason9693/MusicTransformer-pytorch",
    ),
    Case(
        "gman_block",
        "over places and over steps, number chosen by where",
        2,
        GmanBlock,
        lambda: {"x": noise(2, 6, 5, 32, seed=0), "embedding": noise(2, 6, 5, 32, seed=1)},
        "VincLee8188/GMAN-PyTorch",
    ),
    Case(
        "medical_axial",
        "batch norm of the scores",
        1,
        MedicalAxialAttention,
        lambda: {"x": noise(2, 32, 8, 3, seed=0)},
        "jeya-maria-jose/Medical-Transformer",
    ),
    Case(
        "medical_axial_positions",
        "batch norm of stacked scores, weights used twice",
        1,
        lambda: MedicalAxialAttention(positions=True),
        lambda: {"x": noise(2, 32, 8, 3, seed=0)},
        "jeya-maria-jose/Medical-Transformer",
    ),
    Case(
        "dcp_pointer",
        "values before transposed weights",
        1,
        DcpPointer,
        lambda: {"source": noise(2, 3, 10, seed=0), "target": noise(2, 3, 12, seed=1)},
        "WangYueFt/dcp",
    ),
    Case(
        "gtrxl_attention",
        "heads last, softmax over the second dimension, mask asked for its values",
        1,
        GatedTransformerXlAttention,
        lambda: {
            "x": noise(7, 2, 32, seed=0),
            "positions": noise(12, 1, 32, seed=1),
            "memory": noise(5, 2, 32, seed=2),
        },
        "dhruvramani/Transformers-RL",
    ),
    Case(
        "style_tokens",
        "one query, expanded keys, heads stacked",
        1,
        StyleTokens,
        lambda: {"x": noise(2, 16, seed=0)},
        "KinglittleQ/GST-Tacotron",
    ),
)
