"""What a pattern finds: a site, a linear attention, or a near miss."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from attnrewrite.ir.linear_site import LinearAttention
from attnrewrite.ir.site import AttentionSite

__all__ = ["Finding", "NearMiss"]


@dataclass(frozen=True)
class NearMiss:
    """A computation that looks like attention but is kept, for ``reason``; ``nodes`` are those that it consists of."""

    pattern: str
    anchor: fx.Node
    reason: str
    nodes: tuple[fx.Node, ...] = ()


Finding = AttentionSite | LinearAttention | NearMiss
