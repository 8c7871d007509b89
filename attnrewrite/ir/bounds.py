"""Bounds of the searches through a graph, and how a search that ended at its bound says so.

Recognition searches a graph: for the product before a softmax, for the projection behind a key. Each search has a
bound, so that its time does not grow with the graph and distant nodes are not taken for a part of the attention.
Whatever lies beyond a bound keeps its source form and is never rewritten wrongly. The report says so: the bounds that
were reached are noted while a site is worked on (:func:`searching`), and the reason in the report names the bound if
that is why something was not found.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

__all__ = [
    "AROUND_SOFTMAX",
    "BEHIND_DIVISOR",
    "BEHIND_KEYS",
    "BEHIND_PRODUCT",
    "BESIDE_ATTENTION",
    "BETWEEN_PRODUCTS",
    "BUFFER_ENTRIES",
    "ENTRY_NUMBERS",
    "EQUAL_STEPS",
    "FEATURE_MAP",
    "INDEX_ENTRIES",
    "LONGEST_SEQUENCE",
    "NARROWED_STEPS",
    "SHARED_PROJECTIONS",
    "STEPS_OF_SCORES",
    "TENSOR_VALUES",
    "Bound",
    "Ended",
    "searching",
]


@dataclass(frozen=True)
class Bound:
    """The bound of one search.

    Attributes:
        most: how many steps, nodes or entries are looked at.
        words: what the report says when the bound was reached, with ``{most}`` for the number.
    """

    most: int
    words: str

    def allows(self, count: int) -> bool:
        """Whether a search may look at its ``count``-th node; if not, notes that the bound was reached."""
        if count <= self.most:
            return True
        self.reached()
        return False

    def reached(self) -> None:
        """Notes that a search ended here before it had looked at everything."""
        ended = _ended.get()
        if ended is not None:
            ended.bounds[self] = None

    def __str__(self) -> str:
        return self.words.format(most=f"{self.most:,}")


@dataclass(frozen=True)
class Ended:
    """The bounds that searches reached, in order; true if there are any."""

    bounds: dict[Bound, None] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.bounds)

    def __str__(self) -> str:
        return "; ".join(map(str, self.bounds))

    def added_to(self, reason: str) -> str:
        """``reason``, followed in parentheses by the bounds that were reached, if any."""
        return f"{reason} ({self})" if self else reason


_ended: ContextVar[Ended | None] = ContextVar("attnrewrite_searches_ended", default=None)
"""Collects the bounds that are reached in the innermost :func:`searching` block; None outside of any."""


@contextmanager
def searching() -> Iterator[Ended]:
    """Collects the bounds that searches reach inside the block, for one row of the report.

    Of nested blocks only the innermost collects.
    """
    ended = Ended()
    token = _ended.set(ended)
    try:
        yield ended
    finally:
        _ended.reset(token)


# Softmax attention.

AROUND_SOFTMAX = Bound(24, "the search for a matrix product around softmax ended after {most} nodes")
"""Nodes on either side of a softmax among which a matrix product is looked for.

A softmax without one is not attention and is not reported. With one on either side it is read, and reported as a near
miss if it cannot be. In the spellings that are known, weights go through five nodes at most. Beyond the bound on one
side, the softmax is read all the same, and a near miss says that the search ended; on both sides, it is not reported.
"""

# Slices.

EQUAL_STEPS = Bound(8, "slices were compared only {most} steps back")
"""Steps back over which the computations of two slices are compared; making a mask takes about as many.

Beyond it, a computation that all slices repeat is taken for one that differs between them. The slices are merged all
the same if it is elementwise; if it is not (a cumulative sum, a projection) they stay separate sites.
"""

# Repetitions.

BEHIND_KEYS = Bound(48, "the search for repetitions behind key and value ended after {most} nodes")
"""Nodes behind the key, and as many behind the value, among which ``repeat_kv`` is looked for; a rotation has a dozen.

Beyond it, keys and values stay repeated in memory.
"""

# Projections.

BESIDE_ATTENTION = Bound(24, "the search for projections around the attention ended after {most} nodes")
"""Nodes behind each operand of an attention among which its projections are looked for.

As many nodes after the result are searched for a concatenation. A norm, a rotation and the views around them have
fewer. Beyond it, projections of parts of a batch, or of one input, stay separate.
"""

SHARED_PROJECTIONS = Bound(4, "at most {most} projections of parts of one tensor with the same weights are joined")
"""Projections with the same weights that are tried, in every order, as the parts of one batch.

Guidance has two or three parts; five have 120 orders. Beyond it, the projections stay separate.
"""

# Linear attention.

BETWEEN_PRODUCTS = Bound(24, "the search between the two products ended after {most} steps")
"""Steps between the two products of linear attention: views, casts, scales and masks.

Beyond it, there is a near miss, and the products stay in the source's order.
"""

BEHIND_DIVISOR = Bound(24, "the search behind the divisor ended after {most} steps")
"""Steps from the divisor of linear attention's result back to the sum over the keys: views, an epsilon.

Beyond it, the normalizer is not seen; without a feature map of query and key either, that is a near miss.
"""

FEATURE_MAP = Bound(24, "the search for a feature map ended after {most} steps")
"""Steps behind an operand of linear attention to its feature map: views, casts, masks, scales.

Beyond it, there is a near miss, or the source's order is kept because features may be negative.
"""

# Masks. Beyond these bounds less is proved of a mask; the attention is found in any case.

TENSOR_VALUES = Bound(16, "at most {most} different values of a tensor are followed")
"""Different constants among the entries of a tensor that are followed through arithmetic.

A mask has two or three, and a sum of masks has the sums of theirs. Beyond it, the tensor may hold anything, so that
fully masked rows cannot be ruled out.
"""

ENTRY_NUMBERS = Bound(8, "at most {most} different numbers in one mask are followed")
"""Different numbers in one mask, each with the formula of the positions where it stands.

Beyond it, the mask's structure (causal, a band) is not seen, and fully masked rows cannot be ruled out.
"""

BEHIND_PRODUCT = Bound(256, "what a product beside the scores is made of was followed for {most} nodes")
"""Nodes behind a matrix product, or in an exponent, among which a mask or a large buffer is looked for.

Beyond it, the product may hold anything, so that fully masked rows cannot be ruled out. Behind a norm, a softmax or an
activation that is bounded nothing is looked for: only residual connections without them are a long way.
"""

NARROWED_STEPS = Bound(64, "a mask was carried back through only {most} steps to where it was expanded")
"""Steps of computing a mask that are repeated for the first of several equal rows; transformers takes about a dozen.

Beyond it, the mask is computed as a whole, and sliced.
"""

INDEX_ENTRIES = Bound(2**16, "an index of more than {most} entries is not evaluated")
"""Entries of an index tensor, or of a tensor that it is computed from, that is evaluated from constants of the graph.

An index over frames or heads has dozens of entries. Beyond it, nothing is known of the index, so that keys and values
that it repeats are indexed in memory.
"""

BUFFER_ENTRIES = Bound(2**24, "a buffer of more than {most} entries is not read")
"""Entries of a buffer whose contents are read at compile time: those of a causal mask of 4,096 positions.

A buffer that is read is copied too, for comparison after it was written to. Beyond it, a buffer may hold anything: a
mask in it stays a tensor, and fully masked rows cannot be ruled out.
"""

STEPS_OF_SCORES = 64
"""Elementwise nodes around an ``addcmul`` among which a matrix product and a softmax are looked for.

With both, the ``addcmul`` is decomposed into ``mul`` and ``add``. Beyond it, the call stays whole, and a site that it
belongs to is kept, with the call as the reason.
"""

LONGEST_SEQUENCE = 2**20
"""Longest sequence that proofs allow for: an assumption, not a search. A longer one has more scores than memory holds.

Up to here, positions and sums of a few of them are exact in float32. Products of two positions are not, so nothing is
proved of a mask that is computed from one in float32.
"""
