"""A small model with an attention of each kind, and how the tests of attention reuse run it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from attnrewrite import PyramidAttentionBroadcastConfig


class Attention(nn.Module):
    """Projections, attention and an output projection; every row has two heads of four features."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        context = x if context is None else context
        q, k, v = (
            linear(each).unflatten(-1, (2, 4)).transpose(-3, -2)
            for linear, each in ((self.query, x), (self.key, context), (self.value, context))
        )
        weights = (q @ k.transpose(-1, -2) * 0.5).softmax(-1)
        result: Tensor = self.out((weights @ v).transpose(-3, -2).flatten(-2))
        return result


class Video(nn.Module):
    """A spatial, a temporal and a cross-attention of one video, side by side, and an image of its size.

    ``x``: ``[batch, frames, positions, 8]``; ``text``: ``[batch, words, 8]``.
    """

    def __init__(self) -> None:
        super().__init__()
        self.spatial, self.temporal, self.cross = Attention(), Attention(), Attention()

    def forward(self, x: Tensor, text: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        frames = x.transpose(1, 2)
        image = x.mean(-1).unsqueeze(1) * 2
        return image, self.spatial(x), self.temporal(frames), self.cross(x.flatten(1, 2), text)


class Clock:
    """What the timestep callback gives."""

    def __init__(self) -> None:
        self.now: Any = 500

    def __call__(self) -> Any:
        return self.now


def video() -> Video:
    torch.manual_seed(0)
    return Video().eval()


def inputs(seed: int, batch: int = 2, positions: int = 5) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "x": torch.randn(batch, 3, positions, 8, generator=generator),
        "text": torch.randn(batch, 4, 8, generator=generator),
    }


def tokens(seed: int, *shape: int) -> Tensor:
    """Numbers of the shape; default ``[2, 6, 8]``."""
    return torch.randn(shape or (2, 6, 8), generator=torch.Generator().manual_seed(seed))


def compiled(model: nn.Module, inner: Any = "eager", **arguments: Any) -> Any:
    torch._dynamo.reset()
    options = {"inner_backend": inner, **arguments.pop("options", {})}
    return torch.compile(model, backend="attnrewrite", fullgraph=True, options=options, **arguments)


def broadcast(clock: Callable[[], Any], every: int | None = 2, **settings: Any) -> PyramidAttentionBroadcastConfig:
    chosen = {"spatial_attention_block_skip_range": every, **settings}
    return PyramidAttentionBroadcastConfig(**chosen, current_timestep_callback=clock)


ALL: dict[str, Any] = {
    "spatial_attention_block_skip_range": 2,
    "temporal_attention_block_skip_range": 2,
    "cross_attention_block_skip_range": 2,
}


def steps(model: Any, clock: Clock, timesteps: Sequence[float], **sizes: int) -> list[Any]:
    """The outputs of a run; the inputs of call ``n`` are ``inputs(n)``."""
    results = []
    for number, timestep in enumerate(timesteps):
        clock.now = timestep
        results.append(model(**inputs(number, **sizes)))
    return results


def truth(numbers: Sequence[int], **sizes: int) -> list[Any]:
    model = video()
    return [model(**inputs(number, **sizes)) for number in numbers]


def spatial(results: Sequence[Any]) -> list[Tensor]:
    return [result[1] for result in results]
