"""What is proved about masks holds for every size: z3 finds no counterexample, and computing them none either."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import z3
from torch import Tensor

from attnrewrite.analysis.formulas import AtLeast, conjunction
from attnrewrite.analysis.masks import Positions, kept_where
from attnrewrite.ir.site import Bias, Fill
from tests.analysis.oracle import judged
from tests.support.captured import Reading
from tests.support.formulas import Computed
from tests.support.z3_oracle import counterexample


def test_drawn_masks() -> None:
    findings = judged(cases=150, seed=20)
    assert not findings.false, findings.false[0]
    # The cases are such that something is proved.
    for what in ("kept_where", "attended_everywhere", "band_of, from the first", "band_of, from the last"):
        assert findings.proved[what] >= 5, what


def test_the_oracle_finds_a_counterexample() -> None:
    query, key = z3.Ints("query key")
    assert counterexample(key <= query, [query >= 0, key >= 0]) is not None
    assert counterexample(key <= query + key, [query >= 0, key >= 0]) is None


# Through attnrewrite's own capture.

_NUMBERS = (
    "i",
    "j",
    "i - j",
    "j - i",
    "(i - j).abs()",
    "i + j",
    "2 * j - i",
    "i // 2 - j // 2",
    "document_i - document_j",
)
_Mask = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def _drawn(pick: random.Random, depth: int = 0) -> str:
    """A mask's source, of positions ``i`` and ``j``, and what the caller hands over for each."""
    way = pick.choice(("compare",) * 4 + ("&", "|", "~", "where", "^")) if depth < 3 else "compare"
    if way == "compare":
        relation = pick.choice(("<=", "<", ">=", ">", "==", "!="))
        return f"({pick.choice(_NUMBERS)} {relation} {pick.choice((0, 0, 1, 3, -2))})"
    parts = [_drawn(pick, depth + 1) for _ in range(3)]
    if way == "where":
        return f"torch.where({', '.join(parts)})"
    return f"(~{parts[0]})" if way == "~" else f"({parts[0]} {way} {parts[1]})"


def _mask(source: str) -> _Mask:
    return eval(f"lambda i, j, document_i, document_j: {source}", {"torch": torch})  # type: ignore[no-any-return]


@pytest.mark.parametrize(("dynamic", "seed"), [(False, 0), (False, 1), (True, 2)])
def test_captured_masks(dynamic: bool, seed: int) -> None:
    pick = random.Random(seed)
    sources = [_drawn(pick) for _ in range(10)]
    masks = [_mask(source) for source in sources]

    def attentions(q: Tensor, k: Tensor, v: Tensor, of_queries: Tensor, of_keys: Tensor) -> tuple[Tensor, ...]:
        i, j = torch.arange(q.shape[-2])[:, None], torch.arange(k.shape[-2])[None]
        results = []
        for mask in masks:
            kept = mask(i, j, of_queries[:, None], of_keys[None])
            results.append((q @ k.mT).masked_fill(~kept, -math.inf).softmax(-1) @ v)
        return tuple(results)

    reading = Reading(attentions, dynamic)
    for queries, keys in [(7, 9), (5, 6), (6, 5)] if dynamic else [(7, 9)]:
        generator = torch.Generator().manual_seed(queries)
        inputs = [torch.randn(2, size, 8, generator=generator) for size in (queries, keys, keys)]
        documents = [torch.randint(0, 3, (size,), generator=generator) for size in (queries, keys)]
        reading(*inputs, *documents)
        i, j = torch.arange(queries)[:, None], torch.arange(keys)[None]
        assert len(reading.sites) == len(masks)
        for site, mask, source in zip(reading.sites, masks, sources, strict=True):
            kept = mask(i, j, documents[0][:, None], documents[1][None]).expand(queries, keys)
            positions = Positions(site.query_axes, site.key_axes)
            formulas = [kept_where(mod, positions) for mod in site.mods if isinstance(mod, (Bias, Fill))]
            known = [formula for formula in formulas if formula is not None]
            assert len(known) == len(formulas)
            ((query,), (key,)) = site.query_axes, site.key_axes
            at: dict[Any, int] = {}
            if dynamic:
                at = {query.size.node.expr: queries, key.size.node.expr: keys}  # type: ignore[union-attr]
            for row in range(queries):
                for column in range(keys):
                    at |= {positions.symbol(query): row, positions.symbol(key): column}
                    said = Computed(reading.values, at).holds(conjunction(known))
                    assert said == bool(kept[row, column]), f"{source} at {row, column} of {queries} x {keys}"
            if site.scores.attended is not None:
                assert bool(kept.any(-1).all()), source


def test_a_literal_is_read_as_what_it_says() -> None:
    """``query - key + 2 >= 0`` lets a query see two keys ahead."""

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        i, j = torch.arange(q.shape[-2])[:, None], torch.arange(k.shape[-2])[None]
        return (q @ k.mT).masked_fill(j > i + 2, -math.inf).softmax(-1) @ v

    reading = Reading(attention)
    reading(*(torch.randn(1, 6, 8) for _ in range(3)))
    (site,) = reading.sites
    positions = Positions(site.query_axes, site.key_axes)
    (mod,) = (mod for mod in site.mods if isinstance(mod, Fill))
    query, key = (positions.symbol(axes[0]) for axes in (site.query_axes, site.key_axes))
    assert kept_where(mod, positions) == AtLeast(query - key + 2)
    assert site.scores.band is not None
    assert site.scores.band.from_first == (None, 2)
