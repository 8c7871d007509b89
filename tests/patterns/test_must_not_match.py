"""What only looks like attention is left alone, and the report says why."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import fx

from attnrewrite.patterns import Specimen, must_not_match
from tests.support.helpers import compile_count, no_more_graphs, relative_error, rewritten, rows

LENGTH = 12
every_lookalike = pytest.mark.parametrize("lookalike", must_not_match(), ids=[item.name for item in must_not_match()])


@every_lookalike
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_left_alone_with_a_reason(lookalike: Specimen, dynamic: bool) -> None:
    dynamic = dynamic and lookalike.dynamic
    found = rows(lookalike.function, *lookalike.inputs(0, LENGTH), dynamic=dynamic)
    assert [row.name for row in found if row.status != "kept"] == []
    assert bool(found) == bool(lookalike.reason), [row.reason for row in found]
    assert [row.reason for row in found if lookalike.reason not in row.reason] == []


@every_lookalike
def test_inner_compiler_gets_the_graph_itself(lookalike: Specimen) -> None:
    """What it gets holds the user's own calls, not operators of the IR, and gives the same numbers to the last bit."""
    targets: set[Any] = set()

    def inner(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        targets.update(node.target for node in gm.graph.nodes)
        return gm.forward

    inputs = lookalike.inputs(0, LENGTH)
    result = rewritten(lookalike.function, inner)(*inputs)
    assert targets and not any(isinstance(target, torch._ops.OpOverload) for target in targets)
    assert relative_error(result, lookalike.function(*inputs)) == 0


@every_lookalike
def test_no_more_compilations(lookalike: Specimen) -> None:
    if not lookalike.dynamic:
        pytest.skip("its length is part of what it means")
    calls = [lookalike.inputs(0, length) for length in (LENGTH, 19, 9)]
    needed = compile_count(lookalike.function, calls, "attnrewrite", options={"inner_backend": "eager"})
    assert no_more_graphs(needed, lookalike.function, calls)
