"""Attention weights that are stored or returned, and that the user says nobody reads."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attnrewrite.backend import collect_reports
from attnrewrite.errors import OptionError, UnreadWeightsError
from tests.support.helpers import relative_error, rewritten, rewritten_and_rows


class Attention(nn.Module):
    attn: Tensor

    def forward(self, x: Tensor) -> Tensor:
        weights = (x @ x.mT / 4).softmax(-1)
        self.attn = weights
        return weights @ x


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Attention(), Attention()

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.second(self.first(x))
        return result


X = torch.randn(2, 7, 16)


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_stored_weights(inner: str, dynamic: bool) -> None:
    model, plain = Model(), Model()
    function = rewritten(model, inner, dynamic=dynamic, unread_weights="*")
    with collect_reports() as graphs:
        assert relative_error(function(X), plain(X)) <= 1e-5
    assert [row.status for row in graphs[0].sites] == ["rewritten"] * 2
    assert any("of first" in note and "not computed" in note for note in graphs[0].notes)
    assert relative_error(function(X + 1), plain(X + 1)) <= 1e-5
    for use in (
        lambda weights: weights.mean(),
        lambda weights: torch.mean(weights),
        lambda weights: weights[0],
        lambda weights: weights * 2,
        lambda weights: 2 - weights,
        lambda weights: list(weights),
        lambda weights: weights == 0,
        lambda weights: weights > 0.5,
        lambda weights: -weights,
        bool,
        len,
    ):
        with pytest.raises(UnreadWeightsError, match=r"of second \(.*test_unread_weights.py:\d+\) were not computed"):
            use(model.second.attn)
    assert "not computed" in repr(model.second.attn) and model.second.attn is not None
    assert "not computed" in repr(copy.deepcopy(model).second.attn)


def test_only_modules_that_match() -> None:
    model, plain = Model(), Model()
    _, result, found = rewritten_and_rows(model, X, unread_weights=["other", "first"])
    assert [row.status for row in found] == ["rewritten", "kept"]
    assert "options={'unread_weights': 'second'}" in (found[1].reason or "")
    assert relative_error(result, plain(X)) <= 1e-5
    assert relative_error(model.second.attn, plain.second.attn) <= 1e-5
    with pytest.raises(UnreadWeightsError):
        model.first.attn.mean()


def returned(x: Tensor, keep: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    weights = (x @ x.mT / 4).masked_fill(~keep, -1e9).softmax(-1)
    return weights @ x, weights.mean(1).detach(), x.softmax(-1)


@pytest.mark.parametrize("verify", [False, True])
def test_returned_weights(verify: bool) -> None:
    """A softmax that is no attention stays a result, and gradients are as before."""
    x = torch.randn(2, 4, 7, 16, requires_grad=True)
    keep = torch.ones(7, 7, dtype=torch.bool).tril()
    function = rewritten(returned, "aot_eager", unread_weights="*", verify=verify)
    result, weights, other = function(x, keep)
    expected, _, softmax = returned(x, keep)
    assert relative_error([result, other], [expected, softmax]) <= 1e-5
    with pytest.raises(UnreadWeightsError):
        weights.sum()
    gradients = [torch.autograd.grad(each.square().sum(), x)[0] for each in (result, expected)]
    assert relative_error(*gradients) <= 1e-4


def test_weights_of_what_is_kept_are_there() -> None:
    def attention(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        weights = (x @ x.mT).softmax(-1)
        kept = weights / weights.sum(-2, keepdim=True)
        y = kept @ x
        again = (y @ y.mT).softmax(-1)
        return again @ y, weights.to(torch.float64).mean(0), again

    _, result, found = rewritten_and_rows(attention, X, unread_weights="*")
    assert sorted(row.status for row in found) == ["kept", "rewritten"]
    expected = attention(X)
    assert relative_error(result[:2], expected[:2]) <= 1e-5
    with pytest.raises(UnreadWeightsError):
        result[2].sum()


def test_results_that_share_what_is_put_back() -> None:
    """The mean is a result, what is made of it another; the attention is kept, since its weights are renormalized."""

    def attention(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        weights = (x @ x.mT).softmax(-1)
        y = (weights / weights.sum(-2, keepdim=True)) @ x
        average = weights.mean(0)
        z = (y @ y.mT).softmax(-1) @ y
        return z, average.detach(), average

    _, result, found = rewritten_and_rows(attention, X, unread_weights="*")
    assert "rewritten" in [row.status for row in found]
    assert relative_error(result, attention(X)) <= 1e-5


def test_what_weights_are_multiplied_with_is_a_result() -> None:
    def attention(x: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
        weights = (x @ x.mT).softmax(-1)
        return weights @ x, (weights * gate).sum(-1)

    inputs = X, torch.randn(2, 7, 7)
    _, result, (row,) = rewritten_and_rows(attention, *inputs, unread_weights="*")
    assert row.status == "kept"
    assert relative_error(result, attention(*inputs)) <= 1e-5


def test_graphs_without_attention_are_left_alone() -> None:
    result = rewritten(lambda x: (x.softmax(-1), x + 1), unread_weights="*")(X)
    assert relative_error(result[0], X.softmax(-1)) <= 1e-6


@pytest.mark.parametrize("value", [1, [""], {"a": 1}, [None]])
def test_bad_values(value: Any) -> None:
    with pytest.raises(OptionError, match="unread_weights'] takes a glob"):
        rewritten(Model(), unread_weights=value)(X)


def test_what_is_put_back_is_computed_where_it_was() -> None:
    """Its mask is updated in place behind it, and its region has no gradients."""

    def attention(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        weights = (x @ x.mT).softmax(-1)
        masked = weights.masked_fill(mask, 0.0)
        with torch.no_grad():
            average = weights.mean(0)
        y = (weights / weights.sum(-2, keepdim=True)) @ x
        z = (y @ y.mT).softmax(-1) @ y
        mask.logical_not_()
        return z, masked, average

    torch._dynamo.reset()
    x = X.clone().requires_grad_()
    mask = torch.arange(7) > 3
    expected = attention(x, mask.clone())
    result = rewritten(attention, "eager", unread_weights="*")(x, mask.clone())
    assert relative_error(result, expected) <= 1e-5
    assert [value.requires_grad for value in result] == [value.requires_grad for value in expected]


def test_a_mask_that_an_attention_beside_it_has_no_more_use_for() -> None:
    """It is put back as well: the attention beside it became causal."""

    def attention(x: Tensor) -> tuple[Tensor, Tensor]:
        future = torch.ones(7, 7, dtype=torch.bool).triu(1)
        weights = (x @ x.mT).softmax(-1)
        masked = weights.masked_fill(future, 0.0)
        y = weights.mean(0, keepdim=True) @ x
        scores = (y @ x.mT).masked_fill(future, float("-inf"))
        return scores.softmax(-1) @ x, masked

    _, result, found = rewritten_and_rows(attention, X, unread_weights="*")
    assert sorted(row.status for row in found) == ["kept", "rewritten"]
    assert relative_error(result, attention(X)) <= 1e-5
