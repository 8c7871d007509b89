"""The hypothesis strategy: forms drawn and composed into one attention."""

from __future__ import annotations

from typing import TypeVar

import torch
from hypothesis import strategies as st

from tests.spellings.forms import Draft, Spelling

__all__ = ["spellings"]

T = TypeVar("T")


_CHOICES = 320


class _Drawn:
    """Choices made by the bytes of one string.

    One draw in place of hundreds: hypothesis would copy parts of an example into the next, which spreads less well, and
    nought still shrinks to the first option.
    """

    def __init__(self, choices: bytes) -> None:
        self._choices = iter(choices)

    def one(self, *options: T) -> T:
        return options[next(self._choices, 0) * len(options) // 256] if len(options) > 1 else options[0]

    def chance(self, percent: int) -> bool:
        return next(self._choices, 0) * 100 // 256 >= 100 - percent


@st.composite
def spellings(draw: st.DrawFn, dtype: torch.dtype | None = None) -> Spelling:
    """Attentions in ``dtype``, by default float32 for the most part."""
    pick = _Drawn(draw(st.binary(min_size=_CHOICES, max_size=_CHOICES)))
    drawn = pick.one(*[torch.float32] * 8, torch.float64, None)
    dtype = dtype or drawn or pick.one(torch.bfloat16, torch.float16)
    gradients = pick.chance(33)
    draft = Draft(pick, dtype, gradients, dynamic=pick.chance(4))
    draft.empty = pick.chance(30)
    _sizes(draft)
    place = pick.one(
        "query", "key", "both", "multiply", "multiply", "divide", "divide", "argument", "0-d tensor",
        "learned", "learned per head", "none",
    )  # fmt: skip
    unscaled = place in ("none", "learned", "learned per head")
    draft.operands(draft.sizes["d"] ** -0.5 if unscaled else 1.0)
    _loop(draft)
    ways_with_alpha = draft.q[:-2] == ["n"] and place == "multiply" and pick.chance(50)
    draft.form(f"scale: {place}")
    draft.products("alpha" if ways_with_alpha else place)
    if not draft.alpha:
        draft.scale_scores(place)
    if pick.chance(10):
        draft.refolded()
    way = _softmax_way(draft)
    _modify(draft, way)
    argument = f"s * {draft.factor()}" if place == "argument" else "s"
    twist = _twist(draft, way)
    if twist == "another axis":
        draft.form("twist: another axis")
        draft.stays = twist
        draft.line(f"w = s.softmax({draft.frame.index('i')})")
    else:
        draft.softmax(way, argument)
        _after(draft, way)
        if twist:
            draft.twist(twist)
    draft.weigh()
    draft.finish()
    return draft.spelling()


def _sizes(draft: Draft) -> None:
    pick = draft.pick
    draft.sizes.update(
        b=pick.one(2, 2, 3, 1),
        h=pick.one(2, 4, 3, 1),
        x=pick.one(2, 3),
        y=2,
        i=pick.one(6, 5, 7, 4, 3, 2, 1, 1),
        j=pick.one(6, 5, 8, 7, 3, 2),
        d=pick.one(8, 4, 16),
        e=pick.one(8, 4, 6),
    )
    if pick.chance(40):
        draft.sizes["j"] = max(2, draft.sizes["i"])
    draft.sizes["n"] = draft.sizes["b"] * draft.sizes["h"]
    if draft.sizes["i"] == 1:
        draft.lengths = False


def _loop(draft: Draft) -> None:
    plain = draft.q[-2:] == ["i", "d"]
    if not plain:
        return
    if "h" in draft.q[:2] and draft.same_batch() and draft.k[-1] == "d" and draft.pick.chance(6):
        draft.loop_over_heads()
    elif draft.sizes["i"] > 1 and draft.pick.chance(5):
        draft.chunks()


def _softmax_way(draft: Draft) -> str:
    ways = ["plain"] * 6 + ["module", "dtype", "dtype", "upcast", "upcast", "log", "exp of max", "exp of max", "exp"]
    ways += ["logsumexp", "exp late", "plus one", "plus one, stable"]
    if draft.frame[-1] == "j":
        ways += ["sink", "sink"]
    way = draft.pick.one(*ways)
    if way == "exp late" and (draft.refold or "i" not in draft.frame or not draft.lines_up()):
        return "plain"
    return way


def _modify(draft: Draft, way: str) -> None:
    """Up to four things done to the scores, in any order."""
    pick = draft.pick
    for _ in range(pick.one(0, 0, 1, 1, 1, 2, 2, 3, 4)):
        steps = [draft.mask] * 8 + [draft.bias] * 3 + [draft.additive_mask] * 2 + [draft.temperature]
        steps += [draft.softcap, draft.clamp, draft.subtract_max]
        if draft.rows_and_columns():
            steps += [draft.alibi, draft.relative_bias]
        step = pick.one(*steps)
        masked = any(kind in ("fill", "bias") and value != "learned" for kind, value in draft.terms)
        # A mask that is capped is no mask: possible, and rare.
        if step in (draft.softcap, draft.clamp) and (masked or ("max", "") in draft.terms) and not pick.chance(20):
            step = draft.temperature
        step()
    if way in ("plus one", "plus one, stable", "sink") and ("max", "") in draft.terms:
        draft.refuse("the maximum is subtracted, which a sink or a one does not cancel")


def _after(draft: Draft, way: str) -> None:
    pick = draft.pick
    if draft.late:
        return
    low = {value for kind, value in draft.terms if kind == "fill"} & {"low"}
    if draft.masks and not low and pick.chance(18):
        draft.zeroed()
    if draft.batch() and pick.chance(5):
        draft.head_mask()
    if "i" in draft.frame and pick.chance(4):
        draft.query_mask()
    if pick.chance(12):
        draft.dropout()
    if pick.chance(8):
        draft.cast()
    if pick.chance(8):
        draft.nan_to_num()


def _twist(draft: Draft, way: str) -> str:
    if not draft.pick.chance(5) or way == "exp late":
        return ""
    ways = ["weights returned", "weights returned", "weights squared", "another softmax"]
    if "i" in draft.frame and draft.frame[-1] == "j":
        ways += ["another axis"] * 2
    if "h" in draft.frame and draft.sizes["h"] > 1:
        ways += ["talking heads"] * 2
    return draft.pick.one(*ways)
