"""Entries of the masks that attentions of one graph share: read once, not again for each layer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import sympy
from torch import fx

from attnrewrite.analysis.entries import Entries, Entry, symbols_of
from attnrewrite.ir.bounds import Bound, searching

__all__ = ["SharedEntries"]


class SharedEntries:
    """Remembers the entries of nodes that passes leave as they are, while they replace the attentions of a graph."""

    def __init__(self, unchanging: Iterable[fx.Node] = ()) -> None:
        """Args:
        unchanging: nodes that keep their arguments, and whose sources do; default: none, and nothing is remembered.
        """
        self._unchanging = frozenset(unchanging)
        self._entries: dict[tuple[Any, ...], tuple[Entry, dict[Bound, None]]] = {}

    def at(self, node: fx.Node, index: Sequence[Any], entries: Entries, highest: Mapping[Any, Any]) -> Entry:
        """What ``entries`` reads of ``node`` at ``index``.

        Args:
            highest: the largest value of each position. Sites number their axes alike, whatever their sizes.
        """
        if node not in self._unchanging:
            return entries.at(node, index)
        used = frozenset().union(*(position.free_symbols for position in index))
        key = (node, tuple(index), frozenset((symbol, highest[symbol]) for symbol in used if symbol in highest))
        if key in self._entries:
            entry, bounds = self._entries[key]
        else:
            with searching() as ended:
                entry, bounds = entries.at(node, index), ended.bounds
            # The largest value of a search's own symbol is known to that search alone.
            if not any(isinstance(symbol, sympy.Dummy) for symbol in symbols_of(entry)):
                self._entries[key] = entry, bounds
        for bound in bounds:
            bound.reached()
        return entry
