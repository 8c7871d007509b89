"""A vision transformer written by hand, with its attention as two einsums."""

from __future__ import annotations

from typing import Any

import torch
from compare import Example, main
from torch import nn


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(2)
        scores = torch.einsum("bihd,bjhd->bhij", q, k) * q.shape[-1] ** -0.5
        weights = scores.softmax(dim=-1)
        mixed = torch.einsum("bhij,bjhd->bihd", weights, v).flatten(2)
        result: torch.Tensor = self.project(mixed)
        return result


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.norm1(x))
        result: torch.Tensor = x + self.mlp(self.norm2(x))
        return result


class VisionTransformer(nn.Module):
    def __init__(self, width: int, layers: int, side: int, patch: int = 16) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, width, patch, stride=patch)
        self.position = nn.Parameter(torch.randn(1, (side // patch) ** 2, width) * 0.02)
        self.blocks = nn.Sequential(*(Block(width, width // 64) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = self.embed(image).flatten(2).transpose(1, 2) + self.position
        result: torch.Tensor = self.norm(self.blocks(x))
        return result


def build(size: str) -> tuple[nn.Module, dict[str, Any]]:
    width, layers, side = {"small": (384, 2, 512), "base": (768, 12, 384)}[size]
    return VisionTransformer(width, layers, side), {"image": torch.randn(2, 3, side, side)}


EXAMPLE = Example("ViT (einsum)", build)

if __name__ == "__main__":
    main([EXAMPLE])
