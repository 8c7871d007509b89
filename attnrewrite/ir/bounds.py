"""How far searches go, and how a search that ended at its bound says so.

Recognition looks around in a graph: for the product before a softmax, for the projection behind a key. Each search has
a bound, so that its time does not grow with the graph and what lies far away is not taken for a part of the attention.
What is beyond a bound is left as the source has it, never rewritten wrongly. It is not left in silence either: the
bounds at which searches ended are noted while a site is worked on (:func:`searching`), and where that is why something
was not found the reason in the report says so.
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
    "BESIDE_ATTENTION",
    "BETWEEN_PRODUCTS",
    "BUFFER_ENTRIES",
    "ENTRY_NUMBERS",
    "EQUAL_STEPS",
    "FEATURE_MAP",
    "INDEX_ENTRIES",
    "LONGEST_SEQUENCE",
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
        words: what a search that ended here says, with ``{most}`` in the place of the number.
    """

    most: int
    words: str

    def allows(self, count: int) -> bool:
        """Whether a search may go on to the ``count``-th; a search that may not is noted as ended."""
        if count <= self.most:
            return True
        self.reached()
        return False

    def reached(self) -> None:
        """Notes that a search ended here with something left to look at."""
        ended = _ended.get()
        if ended is not None:
            ended.bounds[self] = None

    def __str__(self) -> str:
        return self.words.format(most=f"{self.most:,}")


@dataclass(frozen=True)
class Ended:
    """The bounds at which searches ended, in the order in which they did; true if there are any."""

    bounds: dict[Bound, None] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.bounds)

    def __str__(self) -> str:
        return "; ".join(map(str, self.bounds))

    def added_to(self, reason: str) -> str:
        """The reason, and behind it where searches ended."""
        return f"{reason} ({self})" if self else reason


_ended: ContextVar[Ended | None] = ContextVar("attnrewrite_searches_ended", default=None)
"""Where the searches of the work at hand are noted; None outside of :func:`searching`, where nobody asks."""


@contextmanager
def searching() -> Iterator[Ended]:
    """While work goes on that belongs to one row of the report: gives the bounds at which its searches end.

    What is done inside another such block is noted in the inner one alone.
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

A softmax without one is no attention and is not mentioned; with one on either side it is read, and named if it cannot
be. Weights go through five nodes at most in the spellings that are known. Beyond it on one side: it is read all the
same, and a near miss says that the search ended. Beyond it on both sides: it is not mentioned.
"""

# Slices.

EQUAL_STEPS = Bound(8, "whether the slices compute the same was compared {most} steps back")
"""Steps back over which what is computed anew for each slice is compared: a mask is made in as many.

Beyond it: what all slices compute alike is taken for something of each slice's own. It is merged all the same where it
is computed entry by entry; where it is not (a cumulative sum, a projection) the slices stay sites of their own.
"""

# Repetitions.

BEHIND_KEYS = Bound(48, "the search for repetitions behind key and value ended after {most} nodes")
"""Nodes behind the key, and as many behind the value, among which a repetition is looked for: a rotation has a dozen.

Beyond it: the keys and values stay repeated in memory.
"""

# Projections.

BESIDE_ATTENTION = Bound(24, "the search for projections around the attention ended after {most} nodes")
"""Nodes behind each operand of an attention among which its projections are looked for, and nodes behind the result
among which a concatenation is: a norm, a rotation and the views around them have fewer.

Beyond it: projections of parts of a batch, or of one input, stay apart.
"""

SHARED_PROJECTIONS = Bound(4, "no more than {most} projections of parts of one tensor with the same weights are joined")
"""Projections with the same weights that are tried in every order as the parts of one batch.

Guidance has two or three parts; five have 120 orders. Beyond it: they stay apart.
"""

# Linear attention.

BETWEEN_PRODUCTS = Bound(24, "the search between the two products ended after {most} steps")
"""Steps between the two products of linear attention: views, casts, scales and masks.

Beyond it: a near miss, and the products stay in the source's order.
"""

BEHIND_DIVISOR = Bound(24, "the search behind the divisor ended after {most} steps")
"""Steps from what the result of linear attention is divided by back to the sum over the keys: views, an epsilon.

Beyond it: the normalizer is not seen. Without a feature map of query and key it is a near miss.
"""

FEATURE_MAP = Bound(24, "the search for a feature map ended after {most} steps")
"""Steps behind an operand of linear attention to its feature map: views, casts, masks, scales.

Beyond it: a near miss; or the source's order, where it is not seen that features are not negative.
"""

# Masks: what is not proved. The attention is found in any case.

TENSOR_VALUES = Bound(16, "no more than {most} values of a tensor are told apart")
"""Constants that the entries of a tensor may be, where each is followed through arithmetic.

A mask has two or three, and sums of masks the sums of theirs. Beyond it: the tensor may hold anything, so that fully
masked rows cannot be ruled out.
"""

ENTRY_NUMBERS = Bound(8, "no more than {most} numbers of one mask are told apart")
"""Numbers that an entry of a mask may be, each with the formula of the positions where it is.

Beyond it: the mask's structure (causal, a band) is not seen, and fully masked rows cannot be ruled out.
"""

INDEX_ENTRIES = Bound(2**16, "an index of more than {most} entries is not worked out")
"""Entries of an index, and of what it is made from, that is worked out from constants of the graph.

An index over frames or heads has dozens; evaluated are as many operators as made it. Beyond it: it may be any index, so
that keys and values that it repeats are indexed in memory.
"""

BUFFER_ENTRIES = Bound(2**24, "a buffer of more than {most} entries is not read")
"""Entries of a buffer that is read for a pattern when a graph is compiled: a causal mask of 4,096 positions.

What is read is copied, to be compared when the buffer was written to. Beyond it: it may hold anything. The mask stays a
tensor, and fully masked rows cannot be ruled out.
"""

STEPS_OF_SCORES = 64
"""Elementwise nodes around an ``addcmul`` among which a matrix product and a softmax are looked for.

It is written out where both are there. Beyond it: the call stays whole, and a site that it belongs to is kept with it
as the reason.
"""

LONGEST_SEQUENCE = 2**20
"""Positions that proofs reckon with: an assumption and no search. A longer sequence has more scores than memory holds.

Up to here a position is an exact number in float32, and so is a sum of a few of them; a product of two is not, so that
a mask that is computed from one in float32 is not proved.
"""
