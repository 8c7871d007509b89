"""More of images: classification, segmentation, restoration, matching, motion, video, reading and generation."""

from __future__ import annotations

import math

import torch
from einops import rearrange, repeat
from torch import Tensor, einsum, nn
from torch.nn import functional as F

from tests.coverage.case import Case
from tests.support.zoo import noise

__all__ = ["CASES"]


def _windows(x: Tensor, size: int) -> Tensor:
    b, h, w, c = x.shape
    x = x.view(b, h // size, size, w // size, size, c)
    return x.permute(0, 1, 3, 2, 4, 5).contiguous().view(-1, size * size, c)


def _unwindowed(windows: Tensor, size: int, h: int, w: int) -> Tensor:
    b = windows.shape[0] // ((h // size) * (w // size))
    x = windows.view(b, h // size, w // size, size, size, -1)
    return x.permute(0, 1, 3, 2, 4, 5).contiguous().view(b, h, w, -1)


def _regions(h: int, w: int, size: int, shift: int) -> Tensor:
    """-100 between the regions that a shift brings together."""
    picture = torch.zeros((1, h, w, 1))
    count = 0
    slices = (slice(0, -size), slice(-size, -shift), slice(-shift, None))
    for rows in slices:
        for columns in slices:
            picture[:, rows, columns, :] = count
            count += 1
    windows = _windows(picture, size).view(-1, size * size)
    mask = windows.unsqueeze(1) - windows.unsqueeze(2)
    return mask.masked_fill(mask != 0, -100.0).masked_fill(mask == 0, 0.0)


def _relative_index(size: int) -> Tensor:
    coords = torch.stack(torch.meshgrid([torch.arange(size), torch.arange(size)], indexing="ij")).flatten(1)
    relative = (coords[:, :, None] - coords[:, None, :]).permute(1, 2, 0).contiguous()
    relative[:, :, 0] += size - 1
    relative[:, :, 1] += size - 1
    relative[:, :, 0] *= 2 * size - 1
    return relative.sum(-1)


class MotionAggregation(nn.Module):
    """Six letters for the scores, positions of rows and of columns, and the map used in another module."""

    rel_ind: Tensor

    def __init__(
        self, dim: int = 8, heads: int = 2, dim_head: int = 8, positions: bool = True, longest: int = 8
    ) -> None:
        super().__init__()
        self.heads, self.scale, self.positions = heads, dim_head**-0.5, positions
        self.to_qk = nn.Conv2d(dim, heads * dim_head * 2, 1, bias=False)
        self.rel_height = nn.Embedding(2 * longest - 1, dim_head)
        self.rel_width = nn.Embedding(2 * longest - 1, dim_head)
        deltas = torch.arange(longest).view(1, -1) - torch.arange(longest).view(-1, 1)
        self.register_buffer("rel_ind", deltas + longest - 1)
        self.to_v = nn.Conv2d(dim, heads * dim_head, 1, bias=False)
        self.gamma = nn.Parameter(torch.zeros(1))
        self.project = nn.Conv2d(heads * dim_head, dim, 1, bias=False)

    def position_scores(self, q: Tensor) -> Tensor:
        _, _, h, w, _ = q.shape
        height_emb = self.rel_height(self.rel_ind[:h, :h].reshape(-1))
        width_emb = self.rel_width(self.rel_ind[:w, :w].reshape(-1))
        height_emb = rearrange(height_emb, "(x u) d -> x u () d", x=h)
        width_emb = rearrange(width_emb, "(y v) d -> y () v d", y=w)
        height_score = einsum("b h x y d, x u v d -> b h x y u v", q, height_emb)
        width_score = einsum("b h x y d, y u v d -> b h x y u v", q, width_emb)
        return height_score + width_score

    def forward(self, context: Tensor, fmap: Tensor) -> Tensor:
        _, _, h, w = context.shape
        q, k = self.to_qk(context).chunk(2, dim=1)
        q, k = (rearrange(t, "b (h d) x y -> b h x y d", h=self.heads) for t in (q, k))
        q = self.scale * q
        sim = einsum("b h x y d, b h u v d -> b h x y u v", q, k)
        if self.positions:
            sim = sim + self.position_scores(q)
        sim = rearrange(sim, "b h x y u v -> b h (x y) (u v)")
        attn = sim.softmax(dim=-1)
        v = self.to_v(fmap)
        v = rearrange(v, "b (h d) x y -> b h (x y) d", h=self.heads)
        out = einsum("b h i j, b h j d -> b h i d", attn, v)
        out = rearrange(out, "b h (x y) d -> b (h d) x y", x=h, y=w)
        result: Tensor = fmap + self.gamma * self.project(out)
        return result


class FlowWindows(nn.Module):
    """One head over windows of a picture that is rolled, a mask repeated for the batch; then matching of all pixels."""

    def __init__(self, width: int = 16, splits: int = 2) -> None:
        super().__init__()
        self.splits = splits
        self.q_proj, self.k_proj, self.v_proj, self.merge = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.norm1 = nn.LayerNorm(width)

    @staticmethod
    def split(x: Tensor, splits: int) -> Tensor:
        b, h, w, c = x.size()
        x = x.view(b, splits, h // splits, splits, w // splits, c)
        return x.permute(0, 1, 3, 2, 4, 5).reshape(b * splits * splits, h // splits, w // splits, c)

    @staticmethod
    def merged(x: Tensor, splits: int) -> Tensor:
        b, h, w, c = x.size()
        x = x.view(b // splits // splits, splits, splits, h, w, c)
        return x.permute(0, 1, 3, 2, 4, 5).contiguous().view(b // splits // splits, splits * h, splits * w, c)

    def forward(self, feature0: Tensor, feature1: Tensor) -> Tensor:
        b, c, h, w = feature0.shape
        source, target = (part.flatten(-2).permute(0, 2, 1) for part in (feature0, feature1))
        q, k, v = self.q_proj(source), self.k_proj(target), self.v_proj(target)
        size_h, size_w = h // self.splits, w // self.splits
        mask = _regions(h, w, size_h, size_h // 2)
        q, k, v = (part.view(b, h, w, c) for part in (q, k, v))
        q, k, v = (torch.roll(part, shifts=(-(size_h // 2), -(size_w // 2)), dims=(1, 2)) for part in (q, k, v))
        q, k, v = (self.split(part, self.splits) for part in (q, k, v))
        count = self.splits**2
        scores = torch.matmul(q.view(b * count, -1, c), k.view(b * count, -1, c).permute(0, 2, 1)) / c**0.5
        scores += mask.repeat(b, 1, 1)
        attn = torch.softmax(scores, dim=-1)
        out = torch.matmul(attn, v.view(b * count, -1, c))
        out = self.merged(out.view(b * count, h // self.splits, w // self.splits, c), self.splits)
        out = torch.roll(out, shifts=(size_h // 2, size_w // 2), dims=(1, 2)).view(b, -1, c)
        source = source + self.norm1(self.merge(out))

        first = source.view(b, -1, c)
        second = feature1.view(b, c, -1)
        correlation = torch.matmul(first, second).view(b, h, w, h, w) / (c**0.5)
        y, x = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
        init_grid = torch.stack([x, y], dim=0).float()[None].repeat(b, 1, 1, 1)
        grid = init_grid.view(b, 2, -1).permute(0, 2, 1)
        correlation = correlation.view(b, h * w, h * w)
        prob = F.softmax(correlation, dim=-1)
        correspondence = torch.matmul(prob, grid).view(b, h, w, 2).permute(0, 3, 1, 2)
        return correspondence - init_grid


class BothWays(nn.Module):
    """One map of scores, a softmax over its rows and one over its columns."""

    def __init__(self, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.heads, self.scale = heads, (width // heads) ** -0.5
        self.to_qk, self.to_v, self.to_out = (nn.Linear(width, width) for _ in range(3))

    def forward(self, x0: Tensor, x1: Tensor) -> tuple[Tensor, Tensor]:
        qk0, qk1, v0, v1 = (
            t.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for t in (self.to_qk(x0), self.to_qk(x1), self.to_v(x0), self.to_v(x1))
        )
        qk0, qk1 = qk0 * self.scale**0.5, qk1 * self.scale**0.5
        sim = torch.einsum("b h i d, b h j d -> b h i j", qk0, qk1)
        attn01 = F.softmax(sim, dim=-1)
        attn10 = F.softmax(sim.transpose(-2, -1).contiguous(), dim=-1)
        m0 = torch.einsum("bhij, bhjd -> bhid", attn01, v1)
        m1 = torch.einsum("bhji, bhjd -> bhid", attn10.transpose(-2, -1), v0)
        m0, m1 = (self.to_out(t.transpose(1, 2).flatten(start_dim=-2)) for t in (m0, m1))
        return x0 + m0, x1 + m1


class ChannelsFirstMatching(nn.Module):
    """Channels before points, heads last of the channels."""

    def __init__(self, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.dim, self.num_heads = width // heads, heads
        self.merge = nn.Conv1d(width, width, kernel_size=1)
        self.proj = nn.ModuleList(nn.Conv1d(width, width, kernel_size=1) for _ in range(3))

    def forward(self, x: Tensor, source: Tensor) -> Tensor:
        batch = x.size(0)
        q, k, v = (
            layer(part).view(batch, self.dim, self.num_heads, -1)
            for layer, part in zip(self.proj, (x, source, source), strict=True)
        )
        scores = torch.einsum("bdhn,bdhm->bhnm", q, k) / self.dim**0.5
        prob = F.softmax(scores, dim=-1)
        out = torch.einsum("bhnm,bdhm->bdhn", prob, v)
        result: Tensor = self.merge(out.contiguous().view(batch, self.dim * self.num_heads, -1))
        return result


class FramesWithPositions(nn.Module):
    """Distances of frames beside keys and beside values, a causal mask filled in place."""

    def __init__(self, width: int = 16, heads: int = 2, frames: int = 4) -> None:
        super().__init__()
        self.heads, self.dim_head, self.frames = heads, width // heads, frames
        self.scale = self.dim_head**-0.5
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.to_out = nn.Linear(width, width)
        self.keys = nn.Parameter(torch.randn(2 * frames + 1, self.dim_head))
        self.values = nn.Parameter(torch.randn(2 * frames + 1, self.dim_head))

    def distances(self, q: int, k: int) -> Tensor:
        distance = torch.arange(k)[None, :] - torch.arange(q)[:, None]
        return (torch.clamp(distance, -self.frames, self.frames) + self.frames).long()

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = self.to_q(x), self.to_k(x), self.to_v(x)
        q, k, v = (rearrange(t, "b n (h d) -> (b h) n d", h=self.heads) for t in (q, k, v))
        sim = torch.einsum("b i d, b j d -> b i j", q, k) * self.scale
        k2 = self.keys[self.distances(q.shape[1], k.shape[1])]
        sim2 = einsum("b t d, t s d -> b t s", q, k2) * self.scale
        sim += sim2
        mask = repeat(mask, "b i j -> (b h) i j", h=self.heads)
        sim.masked_fill_(~(mask > 0.5), -torch.finfo(sim.dtype).max)
        sim = sim.softmax(dim=-1)
        out = torch.einsum("b i j, b j d -> b i d", sim, v)
        v2 = self.values[self.distances(q.shape[1], v.shape[1])]
        out2 = einsum("b t s, t s d -> b t d", sim, v2)
        out += out2
        result: Tensor = self.to_out(rearrange(out, "(b h) n d -> b n (h d)", h=self.heads))
        return result


class TextAndPicture(nn.Module):
    """The same queries to the words and to the tokens of a picture that follow them."""

    def __init__(self, width: int = 16, context: int = 24, heads: int = 2, words: int = 7) -> None:
        super().__init__()
        self.heads, self.words, self.scale = heads, words, (width // heads) ** -0.5
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k, self.to_v, self.to_k_ip, self.to_v_ip = (nn.Linear(context, width, bias=False) for _ in range(4))
        self.to_out = nn.Linear(width, width)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        q = self.to_q(x)
        context, picture = context[:, : self.words, :], context[:, self.words :, :]
        k, v, k_ip, v_ip = self.to_k(context), self.to_v(context), self.to_k_ip(picture), self.to_v_ip(picture)
        q, k, v = (rearrange(t, "b n (h d) -> (b h) n d", h=self.heads) for t in (q, k, v))
        sim = torch.einsum("b i d, b j d -> b i j", q, k) * self.scale
        sim = sim.softmax(dim=-1)
        out = torch.einsum("b i j, b j d -> b i d", sim, v)
        out = rearrange(out, "(b h) n d -> b n (h d)", h=self.heads)
        k_ip, v_ip = (rearrange(t, "b n (h d) -> (b h) n d", h=self.heads) for t in (k_ip, v_ip))
        sim_ip = torch.einsum("b i d, b j d -> b i j", q, k_ip) * self.scale
        sim_ip = sim_ip.softmax(dim=-1)
        out_ip = torch.einsum("b i j, b j d -> b i d", sim_ip, v_ip)
        out = out + 1.0 * rearrange(out_ip, "(b h) n d -> b n (h d)", h=self.heads)
        result: Tensor = self.to_out(out)
        return result


class MotionModule(nn.Module):
    """Frames of one pixel as a sequence; baddbmm into what is empty, a mask repeated for heads."""

    pe: Tensor

    def __init__(self, width: int = 16, heads: int = 2, longest: int = 8) -> None:
        super().__init__()
        self.heads, self.scale = heads, (width // heads) ** -0.5
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.to_out = nn.Linear(width, width)
        position = torch.arange(longest).unsqueeze(1)
        angles = position * torch.exp(torch.arange(0, width, 2) * (-math.log(10000.0) / width))
        self.register_buffer("pe", torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)[None])

    def heads_to_batch(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        x = x.reshape(b, n, self.heads, c // self.heads)
        return x.permute(0, 2, 1, 3).reshape(b * self.heads, n, c // self.heads)

    def batch_to_heads(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        x = x.reshape(b // self.heads, self.heads, n, c)
        return x.permute(0, 2, 1, 3).reshape(b // self.heads, n, c * self.heads)

    def forward(self, x: Tensor, mask: Tensor, video_length: int = 4) -> Tensor:
        d = x.shape[1]
        x = rearrange(x, "(b f) d c -> (b d) f c", f=video_length)
        x = x + self.pe[:, : x.size(1)]
        q, k, v = (self.heads_to_batch(project(x)) for project in (self.to_q, self.to_k, self.to_v))
        mask = mask.repeat_interleave(q.shape[0], dim=0)
        scores = torch.baddbmm(
            torch.empty(q.shape[0], q.shape[1], k.shape[1], dtype=q.dtype, device=q.device),
            q,
            k.transpose(-1, -2),
            beta=0,
            alpha=self.scale,
        )
        scores = scores + mask
        probs = scores.softmax(dim=-1)
        probs = probs.to(v.dtype)
        x = self.batch_to_heads(torch.bmm(probs, v))
        x = self.to_out(x)
        return rearrange(x, "(b d) f c -> (b f) d c", d=d)


class LongSkipAttention(nn.Module):
    """All three by one rearrangement, in float, with autocast switched off."""

    def __init__(self, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.num_heads, self.scale = heads, (width // heads) ** -0.5
        self.qkv = nn.Linear(width, width * 3, bias=False)
        self.attn_drop = nn.Dropout(0.0)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        qkv = self.qkv(x)
        with torch.amp.autocast(device_type="cpu", enabled=False):
            qkv = rearrange(qkv, "B L (K H D) -> K B H L D", K=3, H=self.num_heads).float()
            q, k, v = qkv[0], qkv[1], qkv[2]
            attn = (q @ k.transpose(-2, -1)) * self.scale
            attn = attn.softmax(dim=-1)
            attn = self.attn_drop(attn)
            x = (attn @ v).transpose(1, 2).reshape(b, n, c)
        result: Tensor = self.proj(x)
        return result


class AnchorAttention(nn.Module):
    """Positions beside contents of other widths, padding as infinities, the largest score subtracted by hand."""

    def __init__(self, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.content_q, self.content_k, self.pos_q, self.pos_k, self.v = (nn.Linear(width, width) for _ in range(5))
        self.out_proj = nn.Linear(width, width)

    def forward(self, tgt: Tensor, memory: Tensor, query_pos: Tensor, pos: Tensor, padding: Tensor) -> Tensor:
        nq, bsz, width = tgt.shape
        hw = memory.shape[0]
        q, k, v = self.content_q(tgt), self.content_k(memory), self.v(memory)
        q_pos, k_pos = self.pos_q(query_pos), self.pos_k(pos)
        q = torch.cat([q.view(nq, bsz, self.heads, -1), q_pos.view(nq, bsz, self.heads, -1)], dim=3)
        k = torch.cat([k.view(hw, bsz, self.heads, -1), k_pos.view(hw, bsz, self.heads, -1)], dim=3)
        q, k = q.view(nq, bsz, width * 2), k.view(hw, bsz, width * 2)
        q = q * float(2 * width // self.heads) ** -0.5
        q = q.contiguous().view(nq, bsz * self.heads, -1).transpose(0, 1)
        k = k.contiguous().view(-1, bsz * self.heads, 2 * width // self.heads).transpose(0, 1)
        v = v.contiguous().view(-1, bsz * self.heads, width // self.heads).transpose(0, 1)
        weights = torch.bmm(q, k.transpose(1, 2))
        weights = weights.view(bsz, self.heads, nq, hw)
        weights = weights.masked_fill(padding.unsqueeze(1).unsqueeze(2), float("-inf"))
        weights = weights.view(bsz * self.heads, nq, hw)
        weights = F.softmax(weights - weights.max(dim=-1, keepdim=True)[0], dim=-1)
        weights = F.dropout(weights, p=0.1, training=self.training)
        out = torch.bmm(weights, v)
        result: Tensor = self.out_proj(out.transpose(0, 1).contiguous().view(nq, bsz, width))
        return result


class TransposedAttention(nn.Module):
    """Channels look at channels, normalized, with a temperature for each head."""

    def __init__(self, dim: int = 16, heads: int = 2) -> None:
        super().__init__()
        self.num_heads = heads
        self.temperature = nn.Parameter(torch.ones(heads, 1, 1))
        self.qkv = nn.Conv2d(dim, dim * 3, kernel_size=1, bias=False)
        self.qkv_dwconv = nn.Conv2d(dim * 3, dim * 3, kernel_size=3, padding=1, groups=dim * 3, bias=False)
        self.project_out = nn.Conv2d(dim, dim, kernel_size=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        _, _, h, w = x.shape
        q, k, v = self.qkv_dwconv(self.qkv(x)).chunk(3, dim=1)
        q, k, v = (rearrange(t, "b (head c) h w -> b head c (h w)", head=self.num_heads) for t in (q, k, v))
        q = F.normalize(q, dim=-1)
        k = F.normalize(k, dim=-1)
        attn = (q @ k.transpose(-2, -1)) * self.temperature
        attn = attn.softmax(dim=-1)
        out = attn @ v
        out = rearrange(out, "b head c (h w) -> b (head c) h w", head=self.num_heads, h=h, w=w)
        result: Tensor = self.project_out(out)
        return result


class MutualWindows(nn.Module):
    """Two frames in one window: each looks at the other, and both at both with positions; a mask of windows."""

    index: Tensor
    mask: Tensor

    def __init__(self, dim: int = 16, heads: int = 2, size: int = 2, windows: int = 4) -> None:
        super().__init__()
        self.num_heads, self.scale, self.dim = heads, (dim // heads) ** -0.5, dim
        self.table = nn.Parameter(torch.zeros((2 * size - 1) ** 2 * 3, heads))
        one = _relative_index(size)
        both = torch.cat([torch.cat([one, one + 9], dim=1), torch.cat([one + 18, one], dim=1)], dim=0)
        self.register_buffer("index", both)
        self.register_buffer("mask", _regions(4, 4, size, 1)[:windows].repeat(1, 2, 2))
        self.qkv_self = nn.Linear(dim, dim * 3)
        self.qkv_mut = nn.Linear(dim, dim * 3)
        self.proj = nn.Linear(2 * dim, dim)

    def attention(self, q: Tensor, k: Tensor, v: Tensor, shape: tuple[int, int, int], positions: bool) -> Tensor:
        b, n, c = shape
        attn = (q * self.scale) @ k.transpose(-2, -1)
        if positions:
            bias = self.table[self.index[:n, :n].reshape(-1)].reshape(n, n, -1)
            attn = attn + bias.permute(2, 0, 1).unsqueeze(0)
        count = self.mask.shape[0]
        attn = attn.view(b // count, count, self.num_heads, n, n) + self.mask[:, :n, :n].unsqueeze(1).unsqueeze(0)
        attn = attn.view(-1, self.num_heads, n, n)
        attn = F.softmax(attn, dim=-1)
        return (attn @ v).transpose(1, 2).reshape(b, n, c)

    def forward(self, x: Tensor, position: Tensor) -> Tensor:
        b, n, c = x.shape
        qkv = self.qkv_self(x).reshape(b, n, 3, self.num_heads, c // self.num_heads).permute(2, 0, 3, 1, 4)
        out = self.attention(qkv[0], qkv[1], qkv[2], (b, n, c), True)
        x = x + position.repeat(1, 2, 1)
        qkv = self.qkv_mut(x).reshape(b, n, 3, self.num_heads, c // self.num_heads).permute(2, 0, 3, 1, 4)
        (q1, q2), (k1, k2), (v1, v2) = (torch.chunk(part, 2, dim=2) for part in qkv)
        first = self.attention(q2, k1, v1, (b, n // 2, c), False)
        second = self.attention(q1, k2, v2, (b, n // 2, c), False)
        result: Tensor = self.proj(torch.cat([torch.cat([first, second], 1), out], 2))
        return result


class RatioWindows(nn.Module):
    """Windows with a table of positions that is repeated for keys of several pictures, and a shifted mask."""

    index: Tensor

    def __init__(self, dim: int = 16, heads: int = 2, size: int = 4, shift: int = 2) -> None:
        super().__init__()
        self.size, self.shift, self.heads, self.scale = size, shift, heads, (dim // heads) ** -0.5
        self.table = nn.Parameter(torch.zeros((2 * size - 1) ** 2, heads))
        self.register_buffer("index", _relative_index(size))
        self.to_q, self.to_kv, self.proj = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        _, h, w, c = x.shape
        mask = _regions(h, w, self.size, self.shift)
        x, other = (torch.roll(part, shifts=(-self.shift, -self.shift), dims=(1, 2)) for part in (x, other))
        windows, kept = _windows(x, self.size), _windows(other, self.size)
        kept = torch.cat([windows, kept], dim=1)
        b_, n, _ = windows.shape
        q = self.to_q(windows).reshape(b_, n, 1, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)[0]
        kv = self.to_kv(kept).reshape(b_, kept.shape[1], 2, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        k, v = kv[0], kv[1]
        q = q * self.scale
        attn = q @ k.transpose(-2, -1)
        bias = self.table[self.index.view(-1)].view(n, n, -1).permute(2, 0, 1).contiguous()
        ratio = attn.size(-1) // bias.size(-1)
        bias = repeat(bias, "nH l c -> nH l (c d)", d=ratio)
        attn = attn + bias.unsqueeze(0)
        count = mask.shape[0]
        mask = repeat(mask, "nW m n -> nW m (n d)", d=ratio)
        attn = attn.view(b_ // count, count, self.heads, n, n * ratio) + mask.unsqueeze(1).unsqueeze(0)
        attn = attn.view(-1, self.heads, n, n * ratio)
        attn = attn.softmax(dim=-1)
        out = self.proj((attn @ v).transpose(1, 2).reshape(b_, n, c))
        out = _unwindowed(out, self.size, h, w)
        return torch.roll(out, shifts=(self.shift, self.shift), dims=(1, 2))


class StripesWithLocality(nn.Module):
    """Half of the channels in columns and half in rows; a convolution of the values is added to each result."""

    def __init__(self, dim: int = 16, heads: int = 2, resolution: int = 8, split: int = 2) -> None:
        super().__init__()
        self.resolution, self.split, self.heads = resolution, split, heads // 2
        self.scale = (dim // heads) ** -0.5
        self.qkv, self.proj = nn.Linear(dim, dim * 3), nn.Linear(dim, dim)
        self.get_v = nn.ModuleList(nn.Conv2d(dim // 2, dim // 2, 3, 1, 1, groups=dim // 2) for _ in range(2))

    def stripes(self, x: Tensor, h_sp: int, w_sp: int) -> Tensor:
        b, _, c = x.shape
        x = x.transpose(-2, -1).contiguous().view(b, c, self.resolution, self.resolution)
        x = x.view(b, c, self.resolution // h_sp, h_sp, self.resolution // w_sp, w_sp)
        x = x.permute(0, 2, 4, 3, 5, 1).contiguous().reshape(-1, h_sp * w_sp, c)
        return x.reshape(-1, h_sp * w_sp, self.heads, c // self.heads).permute(0, 2, 1, 3).contiguous()

    def lepe(self, x: Tensor, h_sp: int, w_sp: int, func: nn.Module) -> tuple[Tensor, Tensor]:
        b, _, c = x.shape
        x = x.transpose(-2, -1).contiguous().view(b, c, self.resolution, self.resolution)
        x = x.view(b, c, self.resolution // h_sp, h_sp, self.resolution // w_sp, w_sp)
        x = x.permute(0, 2, 4, 1, 3, 5).contiguous().reshape(-1, c, h_sp, w_sp)
        lepe = func(x)
        lepe = lepe.reshape(-1, self.heads, c // self.heads, h_sp * w_sp).permute(0, 1, 3, 2).contiguous()
        x = x.reshape(-1, self.heads, c // self.heads, h_sp * w_sp).permute(0, 1, 3, 2).contiguous()
        return x, lepe

    def attend(self, qkv: Tensor, branch: int) -> Tensor:
        q, k, v = qkv[0], qkv[1], qkv[2]
        b, n, c = q.shape
        h_sp, w_sp = (self.resolution, self.split) if branch == 0 else (self.split, self.resolution)
        q, k = self.stripes(q, h_sp, w_sp), self.stripes(k, h_sp, w_sp)
        v, lepe = self.lepe(v, h_sp, w_sp, self.get_v[branch])
        q = q * self.scale
        attn = q @ k.transpose(-2, -1)
        attn = F.softmax(attn, dim=-1, dtype=attn.dtype)
        x = (attn @ v) + lepe
        x = x.transpose(1, 2).reshape(-1, h_sp * w_sp, c)
        x = x.view(b, self.resolution // h_sp, self.resolution // w_sp, h_sp, w_sp, c)
        return x.permute(0, 1, 3, 2, 4, 5).contiguous().view(b, n, c)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        qkv = self.qkv(x).reshape(b, n, 3, c).permute(2, 0, 1, 3)
        x1 = self.attend(qkv[:, :, :, : c // 2], 0)
        x2 = self.attend(qkv[:, :, :, c // 2 :], 1)
        result: Tensor = self.proj(torch.cat([x1, x2], dim=2))
        return result


class ConvolvedProjections(nn.Module):
    """Keys and values by strided convolutions with batch norm, the class token beside them, the whole width's scale."""

    def __init__(self, dim: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.num_heads, self.scale = heads, dim**-0.5
        self.conv_q, self.conv_k, self.conv_v = (
            nn.Sequential(
                nn.Conv2d(dim, dim, kernel_size=3, padding=1, stride=stride, bias=False, groups=dim),
                nn.BatchNorm2d(dim),
            )
            for stride in (1, 2, 2)
        )
        self.proj_q, self.proj_k, self.proj_v, self.proj = (nn.Linear(dim, dim) for _ in range(4))

    def forward(self, x: Tensor, h: int = 4, w: int = 4) -> Tensor:
        cls_token, x = torch.split(x, [1, h * w], 1)
        x = rearrange(x, "b (h w) c -> b c h w", h=h, w=w)
        q, k, v = (
            torch.cat((cls_token, rearrange(conv(x), "b c h w -> b (h w) c")), dim=1)
            for conv in (self.conv_q, self.conv_k, self.conv_v)
        )
        q = rearrange(self.proj_q(q), "b t (h d) -> b h t d", h=self.num_heads)
        k = rearrange(self.proj_k(k), "b t (h d) -> b h t d", h=self.num_heads)
        v = rearrange(self.proj_v(v), "b t (h d) -> b h t d", h=self.num_heads)
        scores = torch.einsum("bhlk,bhtk->bhlt", [q, k]) * self.scale
        attn = F.softmax(scores, dim=-1)
        x = torch.einsum("bhlt,bhtv->bhlv", [attn, v])
        result: Tensor = self.proj(rearrange(x, "b h t d -> b t (h d)"))
        return result


class LocalThenGlobal(nn.Module):
    """Padded groups with a mask of -1000, then all pixels to a smaller picture."""

    def __init__(self, dim: int = 16, heads: int = 2, ws: int = 3, sr: int = 2) -> None:
        super().__init__()
        self.heads, self.ws, self.scale = heads, ws, (dim // heads) ** -0.5
        self.qkv, self.proj = nn.Linear(dim, dim * 3), nn.Linear(dim, dim)
        self.q, self.kv, self.out = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)
        self.sr, self.norm = nn.Conv2d(dim, dim, kernel_size=sr, stride=sr), nn.LayerNorm(dim)

    def local(self, x: Tensor, h: int, w: int) -> Tensor:
        b, _, c = x.shape
        x = x.view(b, h, w, c)
        pad_r, pad_b = (self.ws - w % self.ws) % self.ws, (self.ws - h % self.ws) % self.ws
        x = F.pad(x, (0, 0, 0, pad_r, 0, pad_b))
        hp, wp = x.shape[1], x.shape[2]
        _h, _w = hp // self.ws, wp // self.ws
        mask = torch.zeros((1, hp, wp))
        mask[:, -pad_b:, :].fill_(1)
        mask[:, :, -pad_r:].fill_(1)
        x = x.reshape(b, _h, self.ws, _w, self.ws, c).transpose(2, 3)
        mask = mask.reshape(1, _h, self.ws, _w, self.ws).transpose(2, 3).reshape(1, _h * _w, self.ws * self.ws)
        attn_mask = mask.unsqueeze(2) - mask.unsqueeze(3)
        attn_mask = attn_mask.masked_fill(attn_mask != 0, -1000.0).masked_fill(attn_mask == 0, 0.0)
        qkv = self.qkv(x).reshape(b, _h * _w, self.ws * self.ws, 3, self.heads, c // self.heads)
        qkv = qkv.permute(3, 0, 1, 4, 2, 5)
        q, k, v = qkv[0], qkv[1], qkv[2]
        attn = (q @ k.transpose(-2, -1)) * self.scale
        attn = attn + attn_mask.unsqueeze(2)
        attn = attn.softmax(dim=-1)
        attn = (attn @ v).transpose(2, 3).reshape(b, _h, _w, self.ws, self.ws, c)
        x = attn.transpose(2, 3).reshape(b, _h * self.ws, _w * self.ws, c)
        x = x[:, :h, :w, :].contiguous().reshape(b, h * w, c)
        result: Tensor = self.proj(x)
        return result

    def forward(self, x: Tensor, h: int = 4, w: int = 4) -> Tensor:
        x = x + self.local(x, h, w)
        b, n, c = x.shape
        q = self.q(x).reshape(b, n, self.heads, c // self.heads).permute(0, 2, 1, 3)
        x_ = x.permute(0, 2, 1).reshape(b, c, h, w)
        x_ = self.norm(self.sr(x_).reshape(b, c, -1).permute(0, 2, 1))
        kv = self.kv(x_).reshape(b, -1, 2, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        k, v = kv[0], kv[1]
        attn = (q @ k.transpose(-2, -1)) * self.scale
        attn = attn.softmax(dim=-1)
        result: Tensor = x + self.out((attn @ v).transpose(1, 2).reshape(b, n, c))
        return result


class ComplexRotation(nn.Module):
    """Learned frequencies of both axes as complex numbers; all but the class token are turned, in place."""

    def __init__(self, dim: int = 32, heads: int = 4, side: int = 3) -> None:
        super().__init__()
        self.num_heads, self.scale, self.side = heads, (dim // heads) ** -0.5, side
        self.qkv, self.proj = nn.Linear(dim, dim * 3), nn.Linear(dim, dim)
        self.freqs = nn.Parameter(torch.randn(2, heads, dim // heads // 2))

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        qkv = self.qkv(x).reshape(b, n, 3, self.num_heads, c // self.num_heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]
        t = torch.arange(self.side * self.side, dtype=torch.float32)
        t_x, t_y = (t % self.side).float(), torch.div(t, self.side, rounding_mode="floor").float()
        angles = (t_x[None, :, None] * self.freqs[0][:, None]) + (t_y[None, :, None] * self.freqs[1][:, None])
        cis = torch.polar(torch.ones_like(angles), angles)
        q_ = torch.view_as_complex(q[:, :, 1:].float().reshape(*q[:, :, 1:].shape[:-1], -1, 2))
        k_ = torch.view_as_complex(k[:, :, 1:].float().reshape(*k[:, :, 1:].shape[:-1], -1, 2))
        q = torch.cat([q[:, :, :1], torch.view_as_real(q_ * cis[None]).flatten(3).type_as(q)], dim=2)
        k = torch.cat([k[:, :, :1], torch.view_as_real(k_ * cis[None]).flatten(3).type_as(k)], dim=2)
        attn = (q * self.scale) @ k.transpose(-2, -1)
        attn = attn.softmax(dim=-1)
        x = (attn @ v).transpose(1, 2).reshape(b, n, c)
        result: Tensor = self.proj(x)
        return result


class PositionsAndChannels(nn.Module):
    """All pixels with weights transposed after softmax, and channels by what is least alike: a maximum less scores."""

    def __init__(self, dim: int = 16) -> None:
        super().__init__()
        self.query_conv = nn.Conv2d(dim, dim // 4, kernel_size=1)
        self.key_conv = nn.Conv2d(dim, dim // 4, kernel_size=1)
        self.value_conv = nn.Conv2d(dim, dim, kernel_size=1)
        self.gamma, self.beta = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
        self.softmax = nn.Softmax(dim=-1)

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.size()
        proj_query = self.query_conv(x).view(b, -1, w * h).permute(0, 2, 1)
        proj_key = self.key_conv(x).view(b, -1, w * h)
        energy = torch.bmm(proj_query, proj_key)
        attention = self.softmax(energy)
        proj_value = self.value_conv(x).view(b, -1, w * h)
        out = torch.bmm(proj_value, attention.permute(0, 2, 1)).view(b, c, h, w)
        positions = self.gamma * out + x

        proj_query = x.view(b, c, -1)
        proj_key = x.view(b, c, -1).permute(0, 2, 1)
        energy = torch.bmm(proj_query, proj_key) / (h * w)
        energy_new = torch.max(energy, -1, keepdim=True)[0].expand_as(energy) - energy
        attention = self.softmax(energy_new)
        proj_value = x.view(b, c, -1)
        out = torch.bmm(attention, proj_value).view(b, c, h, w)
        return positions + self.beta * out + x


class ObjectContext(nn.Module):
    """Regions gathered by probabilities of pixels, then pixels to regions."""

    def __init__(self, dim: int = 16, classes: int = 5, keys: int = 8) -> None:
        super().__init__()
        self.keys = keys
        self.aux = nn.Conv2d(dim, classes, kernel_size=1)
        self.f_pixel, self.f_object, self.f_down = (
            nn.Sequential(nn.Conv2d(dim, keys, kernel_size=1, bias=False), nn.BatchNorm2d(keys), nn.ReLU())
            for _ in range(3)
        )
        self.f_up = nn.Conv2d(keys, dim, kernel_size=1, bias=False)

    def forward(self, feats: Tensor) -> Tensor:
        b, c, h, w = feats.shape
        probs = self.aux(feats)
        probs = probs.view(b, probs.size(1), -1)
        flat = feats.view(b, c, -1).permute(0, 2, 1)
        probs = F.softmax(1.0 * probs, dim=2)
        proxy = torch.matmul(probs, flat).permute(0, 2, 1).unsqueeze(3)
        query = self.f_pixel(feats).view(b, self.keys, -1).permute(0, 2, 1)
        key = self.f_object(proxy).view(b, self.keys, -1)
        value = self.f_down(proxy).view(b, self.keys, -1).permute(0, 2, 1)
        sim_map = torch.matmul(query, key)
        sim_map = (self.keys**-0.5) * sim_map
        sim_map = F.softmax(sim_map, dim=-1)
        context = torch.matmul(sim_map, value)
        context = context.permute(0, 2, 1).contiguous().view(b, self.keys, h, w)
        result: Tensor = self.f_up(context)
        return result


class PromptContext(nn.Module):
    """Heads between keys and queries in the letters of the scores."""

    def __init__(self, dim: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.num_heads, self.scale = heads, (dim // heads) ** -0.5
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(dim, dim, bias=False) for _ in range(3))
        self.proj = nn.Linear(dim, dim)

    def forward(self, text: Tensor, visual: Tensor) -> Tensor:
        b, n, c = text.shape
        m = visual.shape[1]
        q = self.q_proj(text).reshape(b, n, self.num_heads, c // self.num_heads)
        k = self.k_proj(visual).reshape(b, m, self.num_heads, c // self.num_heads)
        v = self.v_proj(visual).reshape(b, m, self.num_heads, c // self.num_heads)
        attn = torch.einsum("bnkc,bmkc->bknm", q, k) * self.scale
        attn = attn.softmax(dim=-1)
        x = torch.einsum("bknm,bmkc->bnkc", attn, v).reshape(b, n, c)
        result: Tensor = self.proj(x)
        return result


class PooledSelfAttention(nn.Module):
    """Keys and values pooled, values before the transposed weights, a learned share of the result."""

    def __init__(self, ch: int = 16) -> None:
        super().__init__()
        self.ch = ch
        self.theta = nn.utils.parametrizations.spectral_norm(nn.Conv2d(ch, ch // 8, kernel_size=1, bias=False))
        self.phi = nn.Conv2d(ch, ch // 8, kernel_size=1, bias=False)
        self.g = nn.Conv2d(ch, ch // 2, kernel_size=1, bias=False)
        self.o = nn.Conv2d(ch // 2, ch, kernel_size=1, bias=False)
        self.gamma = nn.Parameter(torch.tensor(0.0), requires_grad=True)

    def forward(self, x: Tensor) -> Tensor:
        theta = self.theta(x)
        phi = F.max_pool2d(self.phi(x), [2, 2])
        g = F.max_pool2d(self.g(x), [2, 2])
        theta = theta.view(-1, self.ch // 8, x.shape[2] * x.shape[3])
        phi = phi.view(-1, self.ch // 8, x.shape[2] * x.shape[3] // 4)
        g = g.view(-1, self.ch // 2, x.shape[2] * x.shape[3] // 4)
        beta = F.softmax(torch.bmm(theta.transpose(1, 2), phi), -1)
        o = self.o(torch.bmm(g, beta.transpose(1, 2)).view(-1, self.ch // 2, x.shape[2], x.shape[3]))
        result: Tensor = self.gamma * o + x
        return result


class DividedAttention(nn.Module):
    """Time for each patch, then space for each frame with the class token repeated and averaged."""

    def __init__(self, dim: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.num_heads, self.scale = heads, (dim // heads) ** -0.5
        self.qkv = nn.ModuleList(nn.Linear(dim, dim * 3) for _ in range(2))
        self.proj = nn.ModuleList(nn.Linear(dim, dim) for _ in range(2))
        self.temporal_fc = nn.Linear(dim, dim)

    def attend(self, x: Tensor, which: int) -> Tensor:
        b, n, c = x.shape
        qkv = self.qkv[which](x).reshape(b, n, 3, self.num_heads, c // self.num_heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]
        attn = (q @ k.transpose(-2, -1)) * self.scale
        attn = attn.softmax(dim=-1)
        result: Tensor = self.proj[which]((attn @ v).transpose(1, 2).reshape(b, n, c))
        return result

    def forward(self, x: Tensor, batch: int = 2, frames: int = 3, w: int = 2) -> Tensor:
        h = (x.size(1) - 1) // frames // w
        xt = rearrange(x[:, 1:, :], "b (h w t) m -> (b h w) t m", b=batch, h=h, w=w, t=frames)
        res = rearrange(self.attend(xt, 0), "(b h w) t m -> b (h w t) m", b=batch, h=h, w=w, t=frames)
        xt = x[:, 1:, :] + self.temporal_fc(res)
        init_cls = x[:, 0, :].unsqueeze(1)
        cls_token = init_cls.repeat(1, frames, 1)
        cls_token = rearrange(cls_token, "b t m -> (b t) m", b=batch, t=frames).unsqueeze(1)
        xs = rearrange(xt, "b (h w t) m -> (b t) (h w) m", b=batch, h=h, w=w, t=frames)
        res = self.attend(torch.cat((cls_token, xs), 1), 1)
        cls_token = rearrange(res[:, 0, :], "(b t) m -> b t m", b=batch, t=frames)
        cls_token = torch.mean(cls_token, 1, True)
        res = rearrange(res[:, 1:, :], "(b t) (h w) m -> b (h w t) m", b=batch, h=h, w=w, t=frames)
        return torch.cat((init_cls, xt), 1) + torch.cat((cls_token, res), 1)


class AxialVideo(nn.Module):
    """One axis of a video after the other, each moved to the end and folded into the batch."""

    def __init__(self, dim: int = 16, heads: int = 2, axes: int = 3) -> None:
        super().__init__()
        self.n_head, self.d_k, self.axes = heads, dim // heads, axes
        self.w_qs, self.w_ks, self.w_vs = (
            nn.ModuleList(nn.Linear(dim, dim, bias=False) for _ in range(axes)) for _ in range(3)
        )
        self.fc = nn.ModuleList(nn.Linear(dim, dim, bias=True) for _ in range(axes))

    def product(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        attn = torch.matmul(q, k.transpose(-1, -2))
        attn = attn / math.sqrt(q.shape[-1])
        attn_float = F.softmax(attn, dim=-1)
        attn = attn_float.type_as(attn)
        attn = F.dropout(attn, p=0.1, training=self.training)
        return torch.matmul(attn, v)

    def attend(self, x: Tensor, axis: int) -> Tensor:
        q, k, v = (
            layers[axis](x).view(*x.shape[:-1], self.n_head, self.d_k).movedim(-2, 1)
            for layers in (self.w_qs, self.w_ks, self.w_vs)
        )
        dims = list(range(q.dim()))
        dims[-2], dims[2 + axis] = dims[2 + axis], dims[-2]
        q, k, v = (part.permute(dims) for part in (q, k, v))
        old_shape = list(q.shape[:-1])
        q, k, v = (part.flatten(end_dim=-3) for part in (q, k, v))
        out = self.product(q, k, v)
        out = out.view(*old_shape, -1)
        out = out.permute(dims)
        out = out.movedim(1, -2).flatten(start_dim=-2)
        result: Tensor = self.fc[axis](out)
        return result

    def forward(self, x: Tensor) -> Tensor:
        return self.attend(x, 0) + self.attend(x, 1) + self.attend(x, 2)


class OutlookAttention(nn.Module):
    """Weights of a window by a linear layer, without keys."""

    def __init__(self, dim: int = 16, heads: int = 2, kernel: int = 3) -> None:
        super().__init__()
        self.num_heads, self.kernel, self.scale = heads, kernel, (dim // heads) ** -0.5
        self.v, self.attn, self.proj = nn.Linear(dim, dim), nn.Linear(dim, kernel**4 * heads), nn.Linear(dim, dim)
        self.unfold = nn.Unfold(kernel_size=kernel, padding=kernel // 2, stride=1)

    def forward(self, x: Tensor) -> Tensor:
        b, h, w, c = x.shape
        size = self.kernel * self.kernel
        v = self.v(x).permute(0, 3, 1, 2)
        v = self.unfold(v).reshape(b, self.num_heads, c // self.num_heads, size, h * w).permute(0, 1, 4, 3, 2)
        attn = self.attn(x).reshape(b, h * w, self.num_heads, size, size).permute(0, 2, 1, 3, 4)
        attn = attn * self.scale
        attn = attn.softmax(dim=-1)
        x = (attn @ v).permute(0, 1, 4, 3, 2).reshape(b, c * size, h * w)
        x = F.fold(x, output_size=(h, w), kernel_size=self.kernel, padding=self.kernel // 2, stride=1)
        result: Tensor = self.proj(x.permute(0, 2, 3, 1))
        return result


class TokensToToken(nn.Module):
    """Patches unfolded with overlap, one head of another width, the values added to the result."""

    def __init__(self, dim: int = 27, inner: int = 16) -> None:
        super().__init__()
        self.scale, self.inner = dim**-0.5, inner
        self.soft_split = nn.Unfold(kernel_size=(3, 3), stride=(2, 2), padding=(1, 1))
        self.norm, self.qkv = nn.LayerNorm(dim), nn.Linear(dim, inner * 3, bias=False)
        self.proj = nn.Linear(inner, inner)

    def forward(self, x: Tensor) -> Tensor:
        x = self.soft_split(x).transpose(1, 2)
        x = self.norm(x)
        b, n, _ = x.shape
        qkv = self.qkv(x).reshape(b, n, 3, 1, self.inner).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]
        attn = (q * self.scale) @ k.transpose(-2, -1)
        attn = attn.softmax(dim=-1)
        x = (attn @ v).transpose(1, 2).reshape(b, n, self.inner)
        x = self.proj(x)
        result: Tensor = v.squeeze(1) + x
        return result


class ReadingPositions(nn.Module):
    """Positions of letters as queries to a feature map; its weights are returned as pictures."""

    def __init__(self, width: int = 16, longest: int = 5) -> None:
        super().__init__()
        self.longest = longest
        self.k_encoder = nn.Sequential(nn.Conv2d(width, width, 3, 1, 1), nn.BatchNorm2d(width), nn.ReLU(True))
        self.pos = nn.Parameter(torch.randn(longest, width))
        self.project = nn.Linear(width, width)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        n, e, h, w = x.size()
        k, v = self.k_encoder(x), x
        zeros = x.new_zeros((self.longest, n, e))
        q = (zeros + self.pos[:, None]).permute(1, 0, 2)
        q = self.project(q)
        attn_scores = torch.bmm(q, k.flatten(2, 3))
        attn_scores = attn_scores / (e**0.5)
        attn_scores = torch.softmax(attn_scores, dim=-1)
        v = v.permute(0, 2, 3, 1).view(n, -1, e)
        attn_vecs = torch.bmm(attn_scores, v)
        return attn_vecs, attn_scores.view(n, -1, h, w)


class PermutedReading(nn.Module):
    """The queries of a decoder of one layer through PyTorch's module, whose averaged weights nobody reads."""

    def __init__(self, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.self_attn = nn.MultiheadAttention(width, heads, dropout=0.1, batch_first=True)
        self.cross_attn = nn.MultiheadAttention(width, heads, dropout=0.1, batch_first=True)
        self.norm_q, self.norm_c, self.norm1 = (nn.LayerNorm(width) for _ in range(3))

    def forward(self, query: Tensor, content: Tensor, memory: Tensor, mask: Tensor, padding: Tensor) -> Tensor:
        query_norm, content_norm = self.norm_q(query), self.norm_c(content)
        tgt2, _sa = self.self_attn(query_norm, content_norm, content_norm, attn_mask=mask, key_padding_mask=padding)
        tgt = query + tgt2
        tgt2, _ca = self.cross_attn(self.norm1(tgt), memory, memory)
        result: Tensor = tgt + tgt2
        return result


class ObjectMemory(nn.Module):
    """Pixels first; the largest numbers of a row and their softmax scattered back, or all of them."""

    def __init__(self, width: int = 32, heads: int = 4, top_k: int = -1) -> None:
        super().__init__()
        self.num_head, self.hidden, self.top_k = heads, width // heads, top_k
        self.linear_q, self.linear_k, self.linear_v, self.projection = (nn.Linear(width, width) for _ in range(4))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        bs = q.size(1)
        q, k, v = self.linear_q(q), self.linear_k(k), self.linear_v(v)
        q = q / self.hidden**0.5
        q = q.view(-1, bs, self.num_head, self.hidden).permute(1, 2, 0, 3)
        k = k.view(-1, bs, self.num_head, self.hidden).permute(1, 2, 3, 0)
        v = v.view(-1, bs, self.num_head, self.hidden).permute(1, 2, 0, 3)
        qk = q @ k
        if self.top_k > 0:
            top, indices = torch.topk(qk, k=self.top_k, dim=-1)
            top_attn = torch.softmax(top, dim=-1)
            attn = torch.zeros_like(qk).scatter_(-1, indices, top_attn)
        else:
            attn = torch.softmax(qk, dim=-1)
        out = (attn @ v).permute(2, 0, 1, 3).reshape(-1, bs, self.num_head * self.hidden)
        result: Tensor = self.projection(out)
        return result


def _reading(mask: Tensor) -> dict[str, Tensor]:
    return {
        "query": noise(2, 5, 32, seed=0),
        "content": noise(2, 5, 32, seed=1),
        "memory": noise(2, 9, 32, seed=2),
        "mask": mask,
        "padding": torch.tensor([[False] * 5, [False] * 3 + [True] * 2]),
    }


CASES: tuple[Case, ...] = (
    Case(
        "gma",
        "six letters, positions of rows and columns",
        1,
        MotionAggregation,
        lambda: {"context": noise(2, 8, 3, 4, seed=0), "fmap": noise(2, 8, 3, 4, seed=1)},
        "zacjiang/GMA",
    ),
    Case(
        "gma-content",
        "six letters",
        1,
        lambda: MotionAggregation(positions=False),
        lambda: {"context": noise(2, 8, 3, 4, seed=0), "fmap": noise(2, 8, 3, 4, seed=1)},
        "zacjiang/GMA",
    ),
    Case(
        "gmflow",
        "rolled windows of one head, a softmax of all pairs over a grid",
        2,
        FlowWindows,
        lambda: {"feature0": noise(2, 16, 4, 4, seed=0), "feature1": noise(2, 16, 4, 4, seed=1)},
        "haofeixu/gmflow",
    ),
    Case(
        "lightglue",
        "scores of one product, over rows and over columns",
        2,
        BothWays,
        lambda: {"x0": noise(2, 7, 32, seed=0), "x1": noise(2, 9, 32, seed=1)},
        "cvg/LightGlue",
    ),
    Case(
        "superglue",
        "channels first, heads last of them",
        1,
        ChannelsFirstMatching,
        lambda: {"x": noise(2, 32, 7, seed=0), "source": noise(2, 32, 9, seed=1)},
        "magicleap/SuperGluePretrainedNetwork",
    ),
    Case(
        "videocrafter-temporal",
        "positions beside keys and values, a causal fill in place",
        1,
        FramesWithPositions,
        lambda: {"x": noise(3, 4, 16, seed=0), "mask": torch.tril(torch.ones(1, 4, 4)).repeat(3, 1, 1)},
        "AILab-CVC/VideoCrafter",
    ),
    Case(
        "videocrafter-picture",
        "words and a picture, added",
        2,
        TextAndPicture,
        lambda: {"x": noise(2, 9, 16, seed=0), "context": noise(2, 11, 24, seed=1)},
        "AILab-CVC/VideoCrafter",
    ),
    Case(
        "animatediff",
        "frames of a pixel, baddbmm into what is empty, a repeated mask",
        1,
        MotionModule,
        lambda: {"x": noise(8, 3, 16, seed=0), "mask": torch.triu(torch.ones(1, 4, 4), 1) * -10000.0},
        "guoyww/AnimateDiff",
    ),
    Case(
        "u-vit",
        "float with autocast off",
        1,
        LongSkipAttention,
        lambda: {"x": noise(2, 9, 32, seed=0)},
        "baofff/U-ViT",
    ),
    Case(
        "dab-detr",
        "contents beside positions, infinities, the largest subtracted",
        1,
        AnchorAttention,
        lambda: {
            "tgt": noise(5, 2, 32, seed=0),
            "memory": noise(9, 2, 32, seed=1),
            "query_pos": noise(5, 2, 32, seed=2),
            "pos": noise(9, 2, 32, seed=3),
            "padding": torch.tensor([[False] * 9, [False] * 6 + [True] * 3]),
        },
        "IDEA-Research/DAB-DETR",
    ),
    Case(
        "restormer",
        "channels, normalized, a temperature of each head",
        1,
        TransposedAttention,
        lambda: {"x": noise(2, 16, 4, 4, seed=0)},
        "swz30/Restormer",
    ),
    Case(
        "vrt-mutual",
        "two frames by halves, one mask of windows for all",
        3,
        MutualWindows,
        lambda: {"x": noise(8, 8, 16, seed=0), "position": noise(1, 4, 16, seed=1)},
        "JingyunLiang/VRT",
    ),
    Case(
        "uformer",
        "a table and a mask repeated for keys of two pictures",
        1,
        RatioWindows,
        lambda: {"x": noise(2, 8, 8, 16, seed=0), "other": noise(2, 8, 8, 16, seed=1)},
        "ZhendongWang6/Uformer",
    ),
    Case(
        "cswin",
        "stripes, convolved values added",
        2,
        StripesWithLocality,
        lambda: {"x": noise(2, 64, 16, seed=0)},
        "microsoft/CSWin-Transformer",
    ),
    Case(
        "cvt",
        "convolved projections, a class token, lists in einsum",
        1,
        ConvolvedProjections,
        lambda: {"x": noise(2, 17, 32, seed=0)},
        "microsoft/CvT",
    ),
    Case(
        "twins",
        "padded groups in five dimensions, a mask of -1000, a smaller picture",
        2,
        LocalThenGlobal,
        lambda: {"x": noise(2, 16, 16, seed=0)},
        "Meituan-AutoML/Twins",
    ),
    Case(
        "rope-vit",
        "complex rotation of all but the class token",
        1,
        ComplexRotation,
        lambda: {"x": noise(2, 10, 32, seed=0)},
        "naver-ai/rope-vit",
    ),
    Case(
        "danet",
        "transposed weights; channels by a maximum less the scores",
        2,
        PositionsAndChannels,
        lambda: {"x": noise(2, 16, 3, 4, seed=0)},
        "junfu1115/DANet",
    ),
    Case(
        "ocr",
        "gathered regions, pixels to regions",
        2,
        ObjectContext,
        lambda: {"feats": noise(2, 16, 3, 4, seed=0)},
        "HRNet/HRNet-Semantic-Segmentation",
    ),
    Case(
        "denseclip",
        "heads between in the letters",
        1,
        PromptContext,
        lambda: {"text": noise(2, 5, 32, seed=0), "visual": noise(2, 9, 32, seed=1)},
        "raoyongming/DenseCLIP",
    ),
    Case(
        "biggan",
        "pooled keys, values before transposed weights",
        1,
        PooledSelfAttention,
        lambda: {"x": noise(2, 16, 4, 4, seed=0)},
        "ajbrock/BigGAN-PyTorch",
    ),
    Case(
        "timesformer-divided",
        "time, then space with a repeated class token",
        2,
        DividedAttention,
        lambda: {"x": noise(2, 13, 32, seed=0)},
        "facebookresearch/TimeSformer",
    ),
    Case(
        "videogpt-axial",
        "three axes in seven dimensions, folded into the batch",
        3,
        AxialVideo,
        lambda: {"x": noise(2, 2, 3, 4, 16, seed=0)},
        "wilson1yan/VideoGPT",
    ),
    Case(
        "volo",
        "weights by a linear layer, rightly kept",
        1,
        OutlookAttention,
        lambda: {"x": noise(2, 4, 4, 16, seed=0)},
        "sail-sg/volo",
    ),
    Case(
        "t2t-vit",
        "unfolded patches, one head, values added",
        1,
        TokensToToken,
        lambda: {"x": noise(2, 3, 8, 8, seed=0)},
        "yitu-opensource/T2T-ViT",
    ),
    Case(
        "abinet",
        "positions of letters, weights returned",
        1,
        ReadingPositions,
        lambda: {"x": noise(2, 16, 2, 6, seed=0)},
        "FangShancheng/ABINet",
    ),
    Case(
        "parseq",
        "PyTorch's module, a triangle and padding",
        2,
        PermutedReading,
        lambda: _reading(torch.triu(torch.ones(5, 5, dtype=torch.bool), 1)),
        "baudm/parseq",
    ),
    Case(
        "parseq-infinities",
        "PyTorch's module, infinities and padding of another type",
        2,
        PermutedReading,
        lambda: _reading(torch.triu(torch.full((5, 5), float("-inf")), 1)),
        "baudm/parseq",
    ),
    Case(
        "aot-long-term",
        "pixels first, keys with their width before their number",
        1,
        ObjectMemory,
        lambda: {"q": noise(7, 2, 32, seed=0), "k": noise(9, 2, 32, seed=1), "v": noise(9, 2, 32, seed=2)},
        "yoxu515/aot-benchmark",
    ),
    Case(
        "aot-top-k",
        "the softmax of the largest, scattered into zeros",
        1,
        lambda: ObjectMemory(top_k=4),
        lambda: {"q": noise(7, 2, 32, seed=0), "k": noise(9, 2, 32, seed=1), "v": noise(9, 2, 32, seed=2)},
        "yoxu515/aot-benchmark",
    ),
)
