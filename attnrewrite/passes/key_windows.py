"""Slices of queries that each attend a window of the keys: together they are one attention under a band mask.

    result[s] = softmax(mods(query[s] @ key[w(s)])) @ value[w(s)]     for slices s of queries and windows w(s) of keys
    result    = softmax(mods(query @ key)) @ value

The mods mask all keys beyond some distance from the query. If each window contains every key that this leaves to its
queries, the keys outside the window have zero weight in the whole attention, so leaving them out changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch.fx.experimental.symbolic_shapes import statically_known_true

from attnrewrite.analysis.masks import Positions, attended_everywhere, band_of, kept_where
from attnrewrite.ir.axes import Operand
from attnrewrite.ir.nodes import Size, same, tensor
from attnrewrite.ir.site import AttentionSite, Bias, Fill, Narrow, Reach, Shift
from attnrewrite.ir.spans import Span, same_span, taken_from
from attnrewrite.passes.slice_sources import NotSlices

__all__ = ["key_windows", "require_band"]


def key_windows(keys: Sequence[Operand], sites: Sequence[AttentionSite]) -> tuple[list[Span], Size] | None:
    """The span of the keys that each slice attends, and the number of keys; None if all slices attend the same keys.

    Args:
        keys: the key of each site, as far back as views and copies could be followed.
    """
    found: list[Span] = []
    sizes: list[Size] = []
    for operand, site in zip(keys, sites, strict=True):
        if len(site.key_axes) != 1:
            return None
        dims = [dim for dim, axes in enumerate(operand.resolved().layout) if axes == site.key_axes[0].leaves()]
        if len(dims) != 1:
            return None
        node = operand.node
        taken = taken_from(node)
        while taken is not None and not taken.selected and same(taken.span.size, tensor(taken.source).shape[taken.dim]):
            node = taken.source
            taken = taken_from(node)
        if taken is None or taken.selected or taken.dim != dims[0]:
            size = tensor(node).shape[dims[0]]
            found.append(Span(0, size))
        else:
            size = tensor(taken.source).shape[dims[0]]
            found.append(taken.span)
        sizes.append(size)
    if all(same_span(span, found[0]) for span in found) or not all(same(size, sizes[0]) for size in sizes):
        return None
    return found, sizes[0]


def require_band(whole: AttentionSite, queries: Sequence[Span], windows: Sequence[Span], count: Size) -> None:
    """Checks that the mask of the whole attention keeps each query within its slice's window of keys.

    Raises:
        NotSlices: a query might attend a key outside its window, or no key at all.

    Args:
        whole: the site of the whole, with masks over all queries and keys.
        queries, windows: the span of the queries of each slice, and the window of keys that it attends.
        count: the number of keys.
    """
    positions = Positions(whole.query_axes, whole.key_axes)
    masks = [mod for mod in whole.mods if isinstance(mod, (Bias, Fill))]
    bounded = False
    for mod in whole.mods:
        kept = kept_where(mod, positions) if isinstance(mod, (Bias, Fill)) else None
        if bounded and kept is None and not isinstance(mod, (Shift, Narrow)):
            raise NotSlices("each slice has its own window of keys, and its scores are modified after masking")
        band = None if kept is None else band_of(kept, positions)
        reach = None if band is None else band.from_first
        bounded = bounded or (
            reach is not None
            and all(_contains_reach(reach, own, window, count) for own, window in zip(queries, windows, strict=True))
        )
    if not bounded:
        raise NotSlices(
            "each slice has its own window of keys, and no mask is proved to restrict its queries to that window"
        )
    if attended_everywhere(masks, positions) is None:
        raise NotSlices("each slice has its own window of keys, and a query may attend none of them")


def _contains_reach(reach: Reach, queries: Span, window: Span, count: Size) -> bool:
    """Whether the window contains every key within reach of the queries."""
    before, after = reach
    first = _at_most(window.start, 0) or (before is not None and _at_most(window.start, queries.start - before))
    last = _at_most(count, window.stop) or (after is not None and _at_most(queries.stop + after, window.stop))
    return first and last


def _at_most(a: Size, b: Size) -> bool:
    return statically_known_true(a <= b)
