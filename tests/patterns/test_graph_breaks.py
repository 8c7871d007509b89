"""An attention that a graph break cuts in two is named, with the break."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import attnrewrite


def break_before_softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT
    if (scores > 1e6).any().item():
        scores = scores.clamp(max=1e6)
    return (scores * 0.5).softmax(-1) @ v


def break_behind_softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = (q @ k.mT).softmax(-1).clone()
    torch._dynamo.graph_break()
    return weights @ v


def break_between_attentions(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    first = (q @ k.mT).softmax(-1) @ v
    torch._dynamo.graph_break()
    return (first @ k.mT).softmax(-1) @ v


@pytest.mark.parametrize(
    ("function", "reasons"),
    [
        (break_before_softmax, ["before the graph break at line "]),
        (break_behind_softmax, ["leave the graph at a graph break ("]),
        (break_between_attentions, ["", ""]),
    ],
)
def test_the_report_names_the_break(function: Callable[..., Any], reasons: list[str]) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 9, 9, generator=generator) for _ in range(3))
    torch._dynamo.reset()
    with torch.no_grad():
        report = attnrewrite.explain(function, q, k, v)
    assert len(report.graph_breaks) == 1
    sites = [site for graph in report.graphs for site in graph.sites]
    assert [site.status for site in sites] == ["kept" if reason else "rewritten" for reason in reasons]
    for site, reason in zip(sites, reasons, strict=True):
        assert reason in site.reason
        assert bool(reason) == ("another graph" in site.reason)
