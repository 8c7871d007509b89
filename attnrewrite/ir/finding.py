"""What a pattern finds: a site, a linear attention, or a near miss."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from attnrewrite.ir.linear_site import LinearAttention
from attnrewrite.ir.site import AttentionSite

__all__ = ["Finding", "NearMiss"]


@dataclass(frozen=True)
class NearMiss:
    """A computation that looks like attention but is kept, for ``reason``.

    ``nodes`` are those that it consists of; ``blamed`` is the operation that is in the way, None if no single one is.
    """

    pattern: str
    anchor: fx.Node
    reason: str
    nodes: tuple[fx.Node, ...] = ()
    blamed: fx.Node | None = None


Finding = AttentionSite | LinearAttention | NearMiss
