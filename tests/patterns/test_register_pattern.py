"""Patterns of users' own: ``examples/own_pattern.py`` at work, and what is said to one who makes a mistake."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx

import attnrewrite
from attnrewrite.backend import collect_reports
from attnrewrite.patterns import (
    Finding,
    GraphView,
    NearMiss,
    NotAttention,
    PatternError,
    Specimen,
    attention_site,
    call_arguments,
    register_pattern,
    unregister_pattern,
)
from attnrewrite.patterns.registry import catalogue, specimens
from tests.support.helpers import compile_count, gradients, relative_error, rewritten, rows

EXAMPLES = Path(__file__).parents[2] / "examples"
if str(EXAMPLES) not in sys.path:
    sys.path.insert(0, str(EXAMPLES))

import own_pattern  # noqa: E402

# Importing the example has registered it, which no other test shall see.
unregister_pattern("acme")


@pytest.fixture
def acme() -> Iterator[type[own_pattern.AcmeAttention]]:
    yield register_pattern(own_pattern.AcmeAttention)
    if "acme" in [pattern.name for pattern in catalogue()]:
        unregister_pattern("acme")


def described(found: list[attnrewrite.SiteReport]) -> list[tuple[str, str]]:
    return [(row.pattern, row.status) for row in found]


# The example.


@pytest.mark.parametrize("specimen", own_pattern.AcmeAttention.specimens, ids=lambda specimen: specimen.name)
@pytest.mark.usefixtures("acme")
def test_the_examples_specimens(specimen: Specimen) -> None:
    inputs = specimen.inputs(0, 12)
    found = rows(specimen.function, *inputs, verify=True)
    assert sum(row.status == "rewritten" for row in found) == specimen.sites
    assert all(specimen.reason in row.reason for row in found if row.status == "kept")
    assert len(found) == 1
    if specimen.sites:
        function = rewritten(specimen.function)
        assert relative_error(function(*inputs), specimen.function(*inputs)) <= 1e-5
        for mine, plain in zip(gradients(function, inputs), gradients(specimen.function, inputs), strict=True):
            assert relative_error(mine, plain) <= 1e-4
        calls = [specimen.inputs(0, length) for length in (12, 20)]
        assert compile_count(specimen.function, calls, "attnrewrite", options={"inner_backend": "eager"}) == 1


def test_the_example_runs(acme: Any, capsys: pytest.CaptureFixture[str]) -> None:
    own_pattern.main()
    printed = capsys.readouterr().out
    assert "1 of 1 attention sites rewritten" in printed and "verified: 1 site agrees" in printed
    assert float(printed.rsplit(maxsplit=1)[-1]) < 1e-5


def test_registered_and_unregistered(acme: Any) -> None:
    """New compilations see what is registered at their time."""
    function, inputs = own_pattern.acme_attention, own_pattern._inputs(0, 12)
    assert [pattern.precedence for pattern in catalogue()] == sorted(pattern.precedence for pattern in catalogue())
    assert "acme" in [pattern.name for pattern in catalogue()]
    assert "acme_causal" in [specimen.name for specimen in specimens()]
    assert described(rows(function, *inputs, 2.0)) == [("acme", "rewritten")]
    unregister_pattern("acme")
    assert "acme" not in [pattern.name for pattern in catalogue()]
    torch._dynamo.reset()
    assert rows(function, *inputs, 2.0) == []


def test_public_names() -> None:
    assert attnrewrite.register_pattern is register_pattern
    assert attnrewrite.unregister_pattern is unregister_pattern
    assert issubclass(attnrewrite.PatternError, attnrewrite.AttnRewriteError)


# Reading a call of one's own: an operator with a mask, several results and any layout.


@torch.library.custom_op("attnrewrite_test::attend", mutates_args=())
def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(batch, length, heads, features); also gives the logarithm of the softmax's sum."""
    scores = q.transpose(1, 2) @ k.transpose(1, 2).mT / q.shape[-1] ** 0.5
    if mask is not None:
        scores = scores.masked_fill(mask, float("-inf")) if mask.dtype is torch.bool else scores + mask
    return (scores.softmax(-1) @ v.transpose(1, 2)).transpose(1, 2).contiguous(), scores.logsumexp(-1)


@attend.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    return q.new_empty((*q.shape[:-1], v.shape[-1])), q.new_empty((q.shape[0], q.shape[2], q.shape[1]))


class Attend:
    """``settings`` are handed to ``attention_site``; ``change`` is done to what it gives."""

    name = "attend"
    precedence = 5
    specimens: tuple[Specimen, ...] = ()

    def __init__(self, **settings: Any) -> None:
        self.settings = settings

    def find(self, view: GraphView) -> Iterator[Finding]:
        for call in view.graph.find_nodes(op="call_function", target=torch.ops.attnrewrite_test.attend.default):
            try:
                yield self.read(call, view)
            except NotAttention as reason:
                yield NearMiss(self.name, call, str(reason), (call,))

    def read(self, call: fx.Node, view: GraphView) -> Finding:
        arguments = call_arguments(call)
        result = next(iter(call.users))
        given: dict[str, Any] = {
            "pattern": self.name,
            "anchor": call,
            "query": arguments["q"],
            "key": arguments["k"],
            "value": arguments["v"],
            "mask": arguments["mask"],
            "mask_drops": True,
            "scale": None,
            "length_dim": -3,
            "result": result,
        }
        return attention_site(view, **{**given, **self.settings})


@pytest.fixture
def registered() -> Iterator[Any]:
    """Registers a pattern for one test."""
    names: list[str] = []

    def register(pattern: Any) -> Any:
        register_pattern(pattern)
        names.append(pattern.name)
        return pattern

    yield register
    for name in names:
        unregister_pattern(name)


def first(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    result: Tensor = attend(q, k, v, mask)[0]
    return result


def operands() -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(2, 6, 4, 16), torch.randn(2, 9, 4, 16), torch.randn(2, 9, 4, 8)


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize(
    "mask",
    [None, torch.randn(4, 6, 9), torch.ones(6, 9, dtype=torch.bool).triu(5), torch.ones(6, 9, dtype=torch.bool)],
    ids=["none", "bias", "boolean", "no key"],
)
def test_masks_results_and_layouts(mask: Tensor | None, dynamic: bool | None, registered: Any) -> None:
    registered(Attend())
    inputs = (*operands(), mask)
    assert described(rows(first, *inputs, dynamic=dynamic)) == [("attend", "rewritten")]
    assert relative_error(rewritten(first, dynamic=dynamic)(*inputs), first(*inputs)) <= 1e-5


def test_what_reads_a_second_result_keeps_the_site(registered: Any) -> None:
    registered(Attend())
    (row,) = rows(lambda q, k, v: attend(q, k, v), *operands())
    assert row.status == "kept" and re.search("attend is read at .*, too, so it must exist in memory", row.reason)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"length_dim": -2}, "the heads of the key do not broadcast"),
        ({"length_dim": -5}, "dimensions"),
        ({"is_causal": True}, "a mask beside causal masking"),
        ({"scale": "big"}, "the scale is not a constant number"),
    ],
)
def test_what_does_not_fit_is_a_near_miss(settings: dict[str, Any], reason: str, registered: Any) -> None:
    registered(Attend(**settings))
    (row,) = rows(first, *operands(), torch.randn(6, 9))
    assert row.status == "kept" and reason in row.reason


def test_lower_precedence_has_the_nodes(registered: Any) -> None:
    """A registered pattern may take what a built-in one would find, too."""

    class Mine(Attend):
        name = "mine"

        def find(self, view: GraphView) -> Iterator[Finding]:
            for call in view.graph.find_nodes(target=aten_sdpa, op="call_function"):
                q, k, v = call.args[:3]
                yield attention_site(view, pattern=self.name, anchor=call, query=q, key=k, value=v, scale=None)

    aten_sdpa = torch.ops.aten.scaled_dot_product_attention.default
    registered(Mine())
    q = torch.randn(2, 4, 8, 16)
    assert described(rows(F.scaled_dot_product_attention, q, q, q)) == [("mine", "rewritten")]


# Mistakes.


def whole(**changes: Any) -> type:
    """A pattern's class with some attributes changed; None takes one away."""
    attributes = {"name": "whole", "precedence": 50, "specimens": (), "find": lambda self, view: iter(()), **changes}
    return type("Whole", (), {key: value for key, value in attributes.items() if value is not None})


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        (whole(name=None), "Whole has no name; a pattern has a name, a precedence"),
        (whole(find=None, specimens=None), "Whole has no specimens and no find"),
        (whole(name=""), "Whole.name is a word that the report shows, such as 'my_attention'; got ''"),
        (whole(name="softmax"), "a pattern named 'softmax' exists already; or choose another name"),
        (whole(precedence="first"), "Whole.precedence is a whole number, lower looks first; got 'first'"),
        (whole(specimens=[1]), "Whole.specimens is a sequence of attnrewrite.patterns.Specimen, or an empty tuple"),
        (whole(specimens=(Specimen("plain_call", len, lambda *_: ()),)), "a specimen named 'plain_call' exists"),
        (whole(find=lambda self: ()), "Whole.find takes one argument, the graph as a GraphView"),
        (whole(__init__=lambda self, size: None), "cannot be made without arguments"),
        (3, "int has no name and no precedence"),
    ],
)
def test_what_is_wrong_is_said(pattern: Any, message: str) -> None:
    before = catalogue()
    with pytest.raises(PatternError) as error:
        register_pattern(pattern)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert catalogue() == before


def test_a_name_can_be_registered_once(acme: Any) -> None:
    with pytest.raises(PatternError, match=r"unregister_pattern\('acme'\) removes it"):
        register_pattern(acme)


@pytest.mark.parametrize("name", ["softmax", "no_such"])
def test_only_what_was_registered_can_be_taken_out(name: str) -> None:
    with pytest.raises(PatternError, match=f"no pattern named '{name}' is registered; registered are: none"):
        unregister_pattern(name)


class Mistaken(Attend):
    """Yields what ``make(call, site)`` gives."""

    name = "mistaken"

    def __init__(self, make: Any) -> None:
        super().__init__()
        self.make = make

    def read(self, call: fx.Node, view: GraphView) -> Finding:
        finding: Finding = self.make(call, super().read(call, view))
        return finding


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda call, site: 1 / 0, "the pattern 'mistaken' raised ZeroDivisionError: division by zero"),
        (lambda call, site: call, "which is neither an AttentionSite nor a NearMiss"),
        (lambda call, site: replace(site, interior=(call,)), "whose interior does not end with its result"),
        (lambda call, site: replace(site, result_layout=site.result_layout[:-1]), "result has another shape"),
        (lambda call, site: replace(site, value=site.query, key=site.value), None),
        (lambda call, site: replace(site, result=fx.Graph().placeholder("x")), "nodes of another graph"),
    ],
)
def test_a_pattern_that_goes_wrong_leaves_the_model_as_it_was(
    make: Any, message: str | None, registered: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ATTNREWRITE_RAISE")
    registered(Mistaken(make))
    inputs = operands()
    with collect_reports() as graphs:
        result = rewritten(first, verify=True)(*inputs)
    assert relative_error(result, first(*inputs)) <= 1e-6
    (graph,) = graphs
    assert graph.rewritten == []
    if message is not None:
        assert graph.reason.startswith("rewriting failed, so the graph is unchanged: PatternError")
        assert message in graph.reason


def test_a_pattern_that_goes_wrong_is_an_error_if_that_is_asked_for(
    registered: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ATTNREWRITE_RAISE", "1")
    registered(Mistaken(lambda call, site: 1 / 0))
    with pytest.raises(Exception, match="the pattern 'mistaken' raised ZeroDivisionError"):
        rewritten(first)(*operands())
