"""What is just within a search's bound is recognized, and where a search ended at it the report says so."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnrewrite.ir import bounds
from attnrewrite.ir.bounds import Bound, searching
from attnrewrite.report.rows import SiteReport
from tests.support.helpers import relative_error, rewritten_and_rows

_generator = torch.Generator().manual_seed(0)


def draw(*shape: int) -> Tensor:
    return 0.3 * torch.randn(*shape, generator=_generator)


Q, K, V = draw(3, 2, 4, 24, 8)
X = draw(5, 6, 16)
WEIGHTS = tuple(draw(16, 16) for _ in range(4))


def times(count: int, step: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    for _ in range(count):
        x = step(x)
    return x


def scaled(x: Tensor) -> Tensor:
    return x * 1.0625


def heads(x: Tensor) -> Tensor:
    return x.view(*x.shape[:2], 2, 8).transpose(1, 2)


def attended(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out = F.scaled_dot_product_attention(heads(q), heads(k), heads(v))
    return out.transpose(1, 2).flatten(2)


def written_out(scores: Tensor, v: Tensor) -> Tensor:
    return scores.softmax(dim=-1) @ v


# A program for each bound, which takes as many steps, nodes or entries as it is told to.


def around_softmax(count: int) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    """Nothing that the rule reads, so that it is a near miss that the report names."""
    return lambda q, k, v: times(count, torch.sin, (q @ k.mT).softmax(dim=-1)) @ v, (Q, K, V)


def slices_of_one_key(count: int) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    """The features of the key are moved about anew for each slice of the queries."""

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        def part(q: Tensor) -> Tensor:
            return written_out(q @ times(count, lambda x: x.roll(1, -1), k).mT, v)

        return torch.cat([part(q[:, :, :12]), part(q[:, :, 12:])], dim=2)

    return function, (Q, K, V)


def repeated_key(count: int) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    """Frames of a video that attend to the first."""

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (x.view(2, 4, 24, 8)[:, [0] * 4] for x in (k, v))
        return F.scaled_dot_product_attention(q, times(count, torch.sin, k), v)

    return function, (Q, K, V)


def behind_query(count: int) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    """The projection is one of the nodes."""

    def function(x: Tensor, wq: Tensor, wk: Tensor, wv: Tensor) -> Tensor:
        return attended(times(count - 1, torch.sin, F.linear(x, wq)), F.linear(x, wk), F.linear(x, wv))

    return function, (X, *WEIGHTS[:3])


def behind_result(count: int) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    """Two views, and the projection of the result, are among the nodes, and so is the result."""

    def function(x: Tensor, wq: Tensor, wk: Tensor, wv: Tensor, wo: Tensor) -> Tensor:
        a, b = x[:3], x[3:]
        whole = attended(F.linear(a, wq), F.linear(a, wk), F.linear(a, wv))
        return torch.cat([F.linear(times(count - 4, torch.sin, part), wo) for part in (whole, F.linear(b, wv))])

    return function, (X, *WEIGHTS)


def parts_of_a_batch(count: int) -> tuple[Callable[..., Any], tuple[Tensor, ...]]:
    """Nothing puts the parts together again, by which more of them would be joined."""

    def function(x: Tensor, wq: Tensor, wk: Tensor, wv: Tensor, wo: Tensor) -> list[Tensor]:
        first, *others = x[:count].chunk(count)
        whole = attended(F.linear(first, wq), F.linear(first, wk), F.linear(first, wv))
        return [F.linear(part, wo) for part in (whole, *(F.linear(other, wv) for other in others))]

    return function, (X, *WEIGHTS)


def between_products(count: int) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    return lambda q, k, v: F.relu(q) @ times(count, scaled, F.relu(k).mT @ v), (Q, K, V)


def behind_divisor(count: int) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    """The sum of the keys alone says that this is attention: no feature map does."""

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ (k.mT @ v)) / times(count, lambda x: x + 1.0, q @ k.sum(dim=-2)[..., None])

    return function, (Q, K, V)


def feature_map(count: int) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    return lambda q, k, v: F.relu(q) @ (times(count, scaled, F.relu(k)).mT @ v), (Q, K, V)


def values_of_a_mask(count: int) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    def function(q: Tensor, k: Tensor, v: Tensor, chosen: Tensor) -> Tensor:
        mask = q.new_zeros(24, 24)
        for number in range(1, count):
            mask = torch.where(chosen[number], float(number), mask)
        return written_out(q @ k.mT + mask, v)

    return function, (Q, K, V, draw(count, 24, 24) > 0)


def numbers_by_position(count: int) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    """A causal mask that is lower the further ahead: minus infinity is one of the numbers, and zero another."""

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        position = torch.arange(24)
        distance = position[:, None] - position[None]
        mask = torch.where(distance < 0, float("-inf"), q.new_zeros(24, 24))
        for number in range(1, count - 1):
            mask = torch.where(distance < -number, -1e9 * number, mask)
        return written_out(q @ k.mT + mask, v)

    return function, (Q, K, V)


def index_of_zeros(count: int) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        index = torch.arange(count) // count
        return F.scaled_dot_product_attention(q, k[index], v[index])

    return function, (draw(count, 1, 2, 2), draw(2, 1, 2, 2), draw(2, 1, 2, 2))


class Stored(nn.Module):
    mask: Tensor

    def __init__(self, length: int) -> None:
        super().__init__()
        self.register_buffer("mask", torch.ones(length, length, dtype=torch.bool).tril())

    def forward(self, x: Tensor) -> Tensor:
        return written_out((x @ x.mT).masked_fill(~self.mask, float("-inf")), x)


def stored_mask(count: int) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    """A square has its entries by its side, so what is just beyond has one more row and column."""
    length = next(side for side in range(4000, 5000) if side**2 >= count)
    return Stored(length), (draw(1, length, 2),)


@dataclass(frozen=True)
class Case:
    """``seen``: by what a row shows that the search has found what it looks for."""

    bound: Bound
    program: Callable[[int], tuple[Callable[..., Tensor], tuple[Tensor, ...]]]
    seen: Callable[[SiteReport], bool]
    settings: dict[str, Any] = field(default_factory=dict)

    def rows(self, count: int) -> list[SiteReport]:
        function, inputs = self.program(count)
        _, result, rows = rewritten_and_rows(function, *inputs, dynamic=False, **self.settings)
        assert relative_error(result, function(*inputs)) <= 1e-4
        return rows


def says_nothing_else(row: SiteReport) -> bool:
    return row.status == "kept" and "sin" in row.reason and "(the search" not in row.reason


CASES = [
    Case(bounds.AROUND_SOFTMAX, around_softmax, says_nothing_else),
    Case(bounds.EQUAL_STEPS, slices_of_one_key, lambda row: row.slices == "merged from 2 slices"),
    Case(bounds.BEHIND_KEYS, repeated_key, lambda row: "4 query heads share a key" in row.grouping),
    Case(
        bounds.BESIDE_ATTENTION,
        behind_query,
        lambda row: "query, key and value are one projection" in row.projections,
        {"fuse_projections": True},
    ),
    Case(bounds.BESIDE_ATTENTION, behind_result, lambda row: "identity part" in row.projections),
    Case(
        bounds.SHARED_PROJECTIONS, parts_of_a_batch, lambda row: "of the batch are joined into one" in row.projections
    ),
    Case(bounds.BETWEEN_PRODUCTS, between_products, lambda row: row.order.startswith("linear")),
    Case(bounds.BEHIND_DIVISOR, behind_divisor, lambda row: "divided by a sum of the keys" in row.score_mods),
    Case(bounds.FEATURE_MAP, feature_map, lambda row: "relu of key" in row.score_mods),
    Case(bounds.TENSOR_VALUES, values_of_a_mask, lambda row: row.proof[0].startswith("every row keeps a key")),
    Case(bounds.ENTRY_NUMBERS, numbers_by_position, lambda row: row.mask == "causal"),
    Case(bounds.INDEX_ENTRIES, index_of_zeros, lambda row: "share a key" in row.grouping),
    Case(bounds.BUFFER_ENTRIES, stored_mask, lambda row: row.mask == "causal"),
]


def said(row: SiteReport) -> str:
    return "; ".join((row.reason, row.slices, row.grouping, row.projections, *row.proof))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.program.__name__)
def test_within_and_beyond(case: Case) -> None:
    within = case.rows(case.bound.most)
    assert within and all(map(case.seen, within))
    assert not any(str(case.bound) in said(row) for row in within)
    beyond = case.rows(case.bound.most + 1)
    assert beyond and not any(map(case.seen, beyond))
    assert all(str(case.bound) in said(row) for row in beyond)


NOTHING_IS_MISSED = {bounds.NARROWED_STEPS, bounds.BEHIND_PRODUCT}
"""Beyond them a mask is computed at its full size and sliced (tests/passes/test_narrow_masks.py), or rows without a key
are not ruled out (tests/analysis/test_values.py)."""


def test_every_bound_is_tested() -> None:
    named = {value for value in vars(bounds).values() if isinstance(value, Bound)}
    assert {case.bound for case in CASES} == named - NOTHING_IS_MISSED


def test_the_page_of_limits_has_every_bound() -> None:
    page = (_ROOT.parent / "docs" / "limits.md").read_text()
    table = {(name, int(most.replace(",", ""))) for name, most in re.findall(r"^\| `(\w+)` \| ([\d,]+) ", page, re.M)}
    assert table == {(name, value.most) for name, value in vars(bounds).items() if isinstance(value, Bound)}


def test_weights_are_read_at_any_distance() -> None:
    """The bound around softmax decides what is a near miss, and not what is read."""

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return times(2 * bounds.AROUND_SOFTMAX.most, scaled, (q @ k.mT).softmax(dim=-1)) @ v

    _, result, (row,) = rewritten_and_rows(function, Q, K, V)
    assert row.status == "rewritten"
    assert relative_error(result, function(Q, K, V)) <= 1e-5


def test_a_softmax_between_no_products_is_not_mentioned() -> None:
    def function(x: Tensor) -> Tensor:
        return times(30, torch.sin, times(30, torch.sin, x).softmax(dim=-1))

    _, _, rows = rewritten_and_rows(function, X)
    assert rows == []


def test_an_index_that_is_given_is_no_matter_of_its_length() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor, index: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k[index], v[index])

    _, inputs = index_of_zeros(bounds.INDEX_ENTRIES.most + 1)
    _, _, (row,) = rewritten_and_rows(function, *inputs, torch.zeros(len(inputs[0]), dtype=torch.int64))
    assert row.status == "rewritten" and row.grouping == ""


def test_searches_are_noted_where_they_belong() -> None:
    one, other = Bound(2, "one ended after {most}"), Bound(3000, "other ended after {most}")
    assert not one.allows(3)
    with searching() as outer:
        assert one.allows(2) and not outer
        with searching() as inner:
            assert not other.allows(3001)
        assert not one.allows(3) and not one.allows(4)
    assert outer.added_to("why") == "why (one ended after 2)"
    assert inner.added_to("why") == "why (other ended after 3,000)"
    with searching() as none:
        pass
    assert none.added_to("why") == "why"


_CAPS = re.compile(r"_?(FAR|FARTHEST|MOST|DEEPEST|LARGEST|LONGEST|MANY|DEPTH|RADIUS)|_?(MAX|LIMIT)_\w+|\w+_(LIMIT|MAX)")
_ROOT = Path(bounds.__file__).parents[1]
_ELSEWHERE = {("selection/timing.py", "_MOST"), ("selection/cost_table.py", "_FARTHEST")}
"""How often is measured, and how far a table of times is read: neither is a search in a graph."""


def _numbers_named(tree: ast.Module) -> set[str]:
    """The names that a module gives to numbers, and to tuples of them."""
    found: set[str] = set()
    for statement in tree.body:
        if isinstance(statement, ast.Assign):
            targets, value = statement.targets, statement.value
        elif isinstance(statement, ast.AnnAssign) and statement.value is not None:
            targets, value = [statement.target], statement.value
        else:
            continue
        parts = (ast.Constant, ast.BinOp, ast.UnaryOp, ast.Tuple, ast.operator, ast.unaryop, ast.expr_context)
        if all(isinstance(node, parts) for node in ast.walk(value)):
            found |= {node.id for target in targets for node in ast.walk(target) if isinstance(node, ast.Name)}
    return found


def test_no_bound_has_a_place_of_its_own() -> None:
    files = [path for root in (_ROOT, _ROOT / "patterns") for path in root.rglob("*.py")]
    found = {
        (str(path.relative_to(_ROOT)), name)
        for path in files
        if path.resolve() != Path(bounds.__file__).resolve()
        for name in _numbers_named(ast.parse(path.read_text()))
        if _CAPS.fullmatch(name)
    }
    assert any(path.parent.name == "softmax" for path in files), "patterns are searched, too"
    assert found == _ELSEWHERE
