"""What is read of a mask for one attention, and used for the next ones of the graph."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from attnrewrite.analysis.entries import Entries
from attnrewrite.ir.bounds import ENTRY_NUMBERS
from attnrewrite.report.rows import SiteReport
from tests.support.helpers import rewritten_and_rows, rows
from tests.support.zoo import noise

HEADS = 2


def attention(query: Tensor, key: Tensor, masked: Tensor) -> Tensor:
    return (query @ key.transpose(-1, -2)).masked_fill(masked, -torch.inf).softmax(-1) @ key


def causal(length: int) -> Tensor:
    """What a causal mask hides."""
    positions = torch.arange(length)
    return positions[:, None] < positions


def layers(x: Tensor) -> Tensor:
    mask = causal(x.shape[-2])
    for _ in range(3):
        x = attention(x, x, mask)
    return x


def transposed(x: Tensor) -> Tensor:
    """The second attention reads the mask with query and key in each other's place."""
    mask = causal(x.shape[-2])
    other = mask.T
    return attention(attention(x, x, mask), x, other)


def cut(x: Tensor) -> Tensor:
    """The second attention reads a corner of the mask, with fewer queries and keys."""
    mask, half = causal(x.shape[-2]), x.shape[-2] // 2
    corner = mask[:half, :half]
    return attention(attention(x, x, mask)[..., :half, :], x[..., :half, :], corner)


def by_result(x: Tensor) -> Tensor:
    """The second mask is computed from the first attention."""
    mask = causal(x.shape[-2])
    x = attention(x, x, mask)
    return attention(x, x, mask & (x[..., :1] < 9))


def many_numbers(x: Tensor) -> Tensor:
    """Both masks hold more numbers than are told apart by position."""
    positions = torch.arange(x.shape[-2])
    distance = positions[:, None] - positions
    mask = torch.where(distance < 0, float("-inf"), x.new_zeros(distance.shape))
    for number in range(1, ENTRY_NUMBERS.most):
        mask = torch.where(distance < -number, -1e9 * number, mask)
    for _ in range(2):
        x = (x @ x.transpose(-1, -2) + mask).softmax(-1) @ x
    return x


def told(row: SiteReport) -> tuple[object, ...]:
    return row.status, row.kernel, row.mask, row.reason, row.proof


@pytest.mark.parametrize("function", [layers, transposed, cut, by_result, many_numbers])
def test_each_row_says_what_it_says_without_the_others(
    function: Callable[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    x = noise(1, HEADS, 70, 4, seed=0)
    _, result, together = rewritten_and_rows(function, x)
    torch.testing.assert_close(result, function(x))
    torch.compiler.reset()
    monkeypatch.setattr(
        "attnrewrite.analysis.shared_entries.SharedEntries.at",
        lambda self, node, index, entries, highest: entries.at(node, index),
    )
    alone = rows(function, x)
    assert list(map(told, together)) == list(map(told, alone)) and len(alone) >= 2


def test_a_mask_is_read_once_for_all_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[object] = []
    at = Entries.at

    def counting(self: Entries, node: object, index: object) -> object:
        read.append(node)
        return at(self, node, index)  # type: ignore[arg-type]

    monkeypatch.setattr(Entries, "at", counting)
    x = noise(1, HEADS, 6, 4, seed=0)
    rows(lambda x: attention(x, x, causal(x.shape[-2])), x)
    of_one = len(read)
    read.clear()
    rows(layers, x)
    assert len(read) == of_one > 0
