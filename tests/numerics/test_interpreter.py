"""What a canonical attention means is what its source computes: values, gradients, and rows without a key."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from torch import Tensor, fx

from attnrewrite.capture.known_buffers import KnownBuffers
from attnrewrite.capture.legalize import legalized
from attnrewrite.capture.trace import capture
from attnrewrite.ir.graph_view import GraphView
from attnrewrite.ir.site import AttentionSite, CanonicalAttention, NotAttention
from attnrewrite.numerics.interpreter import interpreted
from attnrewrite.options.compile_options import Policy
from attnrewrite.passes.canonicalize import canonicalized
from attnrewrite.passes.find import find
from attnrewrite.passes.merge_slices import merge_slices
from attnrewrite.passes.unrepeat_kv import unrepeat_kv
from attnrewrite.patterns import Specimen
from tests.spellings.forms import Spelling
from tests.spellings.strategy import spellings
from tests.support.against_eager import prepared
from tests.support.helpers import relative_error, specimens_for_kernels

SPECIMENS = specimens_for_kernels()
LENGTH = 12


def _sites(function: Callable[..., Any], inputs: Sequence[Any]) -> list[tuple[CanonicalAttention, dict[fx.Node, Any]]]:
    """The sites of a function in canonical form, each with what the nodes of its graph compute."""
    found: list[tuple[CanonicalAttention, dict[fx.Node, Any]]] = []

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        captured = capture(legalized(gm), example_inputs).gm
        KnownBuffers(gm, example_inputs).attach(captured)
        view = GraphView(captured, has_gradients=torch.is_grad_enabled())
        findings = unrepeat_kv(merge_slices(find(view), view), view)
        sites = [finding for finding in findings if isinstance(finding, AttentionSite)]

        def call(*args: Any) -> Any:
            run = fx.Interpreter(captured, garbage_collect_values=False)
            result = run.run(*args)
            for site in sites:
                try:
                    found.append((canonicalized(site, Policy()), run.env))
                except NotAttention:
                    continue
            return result

        return call

    torch._dynamo.reset()
    torch.compile(function, backend=backend)(*inputs)
    return found


def _interpretable(site: CanonicalAttention) -> bool:
    """Calls have rules of their own, and functions of the scores no canonical form."""
    return not site.fused and not site.dropout and (not site.scores.inexpressible or site.scores.softcap is not None)


@pytest.mark.parametrize("specimen", SPECIMENS, ids=[specimen.name for specimen in SPECIMENS])
def test_values_and_gradients(specimen: Specimen) -> None:
    inputs = specimen.inputs(0, LENGTH)
    leaves = [
        value.clone().requires_grad_(value.is_floating_point() and specimen.gradients)
        if isinstance(value, Tensor)
        else value
        for value in inputs
    ]
    sites = [(site, values) for site, values in _sites(specimen.function, leaves) if _interpretable(site)]
    if not sites:
        pytest.skip("no site in canonical form, or a call")
    for site, values in sites:
        expected = values[site.result]
        result = interpreted(site, values.__getitem__)
        assert relative_error(result, expected) <= 1e-5
        asked = [value for value in leaves if isinstance(value, Tensor) and value.requires_grad]
        if not expected.requires_grad:
            continue
        signs = torch.randn(expected.shape, generator=torch.Generator().manual_seed(0))
        own, new = (
            torch.autograd.grad((each * signs).sum(), asked, retain_graph=True, allow_unused=True)
            for each in (expected, result)
        )
        for a, b, leaf in zip(own, new, asked, strict=True):
            a, b = (torch.zeros_like(leaf) if each is None else each for each in (a, b))
            largest = max(float(each.nan_to_num().abs().max()) for each in own if each is not None)
            assert torch.equal(a.isnan(), b.isnan())
            assert (a - b).nan_to_num().abs().max() <= 1e-4 * largest


@pytest.mark.parametrize(
    "specimen", [pytest.param(specimen, id=specimen.name) for specimen in SPECIMENS if specimen.masked_rows]
)
def test_rows_without_a_key(specimen: Specimen) -> None:
    assert specimen.masked_rows is not None
    with torch.no_grad():
        sites = _sites(specimen.function, specimen.masked_rows(specimen.inputs(0, LENGTH)))
    sites = [(site, values) for site, values in sites if _interpretable(site)]
    if not sites:
        pytest.skip("no site in canonical form, or a call")
    for site, values in sites:
        assert relative_error(interpreted(site, values.__getitem__), values[site.result]) <= 1e-5


def test_drawn_spellings() -> None:
    """Read in float64 (some cast to float32 themselves), every row included."""
    interpreted_sites = 0

    @settings(
        max_examples=40,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(spellings(torch.float64))
    def check(spelling: Spelling) -> None:
        nonlocal interpreted_sites
        names: dict[str, Any] = {}
        exec(compile(spelling.text, "<spelling>", "exec"), names)
        with torch.no_grad():
            for site, values in _sites(names["attend"], prepared(names["inputs"](0, 0), torch.float64, False)):
                if not _interpretable(site):
                    continue
                interpreted_sites += 1
                assert relative_error(interpreted(site, values.__getitem__), values[site.result]) <= 1e-5, str(spelling)

    check()
    assert interpreted_sites >= 20
