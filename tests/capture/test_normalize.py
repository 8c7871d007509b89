"""Operators that go by several names arrive as one, with the same bits."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from attnrewrite.capture.normalize import ALIASES
from attnrewrite.capture.trace import capture

aten = torch.ops.aten
_DTYPES = (torch.float32, torch.bfloat16, torch.int64, torch.bool)


def targets(function: Callable[..., Any], *inputs: Tensor) -> list[Any]:
    """The operators that capture leaves of a function."""
    captured: list[fx.GraphModule] = []

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        captured.append(capture(gm, example_inputs).gm)
        return captured[-1].forward

    torch.testing.assert_close(torch.compile(function, backend=backend)(*inputs), function(*inputs), rtol=0, atol=0)
    return [node.target for gm in captured for node in gm.graph.nodes if node.op == "call_function"]


def _drawn(kind: str, dtype: torch.dtype, seed: int, shape: Sequence[int]) -> Any:
    generator = torch.Generator().manual_seed(seed)
    if kind in ("Tensor", "Optional[Tensor]"):
        drawn = 3 * torch.rand(shape, generator=generator) + 1
        return drawn > 2 if dtype is torch.bool else drawn.to(dtype)
    if kind == "List[Tensor]":
        return [_drawn("Tensor", dtype, seed + place, shape) for place in range(2)]
    numbers = {"number": 2, "Optional[number]": 2, "int": 1, "bool": False, "Optional[float]": 0.25, "List[int]": [0]}
    return numbers.get(kind)


@pytest.mark.parametrize("alias", ALIASES, ids=str)
def test_an_alias_takes_the_arguments_of_what_it_becomes(alias: Any) -> None:
    """Of the same types and with the same defaults, and by the same names where they are given by name."""
    own, other = (target._schema.arguments for target in (alias, ALIASES[alias]))
    assert [(str(a.type), a.default_value) for a in own] == [(str(a.type), a.default_value) for a in other]
    assert all(
        a.kwarg_only and a.name == b.name for a, b in zip(own, other, strict=True) if a.kwarg_only or b.kwarg_only
    )


@pytest.mark.parametrize("alias", ALIASES, ids=str)
def test_an_alias_has_the_bits_of_what_it_becomes(alias: Any) -> None:
    """In each dtype that it takes at all, and it takes the same ones."""
    arguments = alias._schema.arguments
    shape = (4,) if alias is aten.ger.default else (4, 4)
    taken = 0
    for dtypes in itertools.product(_DTYPES, _DTYPES):
        args, kwargs = [], {}
        for place, argument in enumerate(arguments):
            drawn = _drawn(str(argument.type), dtypes[place % 2], place, shape)
            if argument.name == "rounding_mode":
                drawn = "floor"
            if argument.kwarg_only:
                kwargs[argument.name] = drawn
            else:
                args.append(drawn)
        results = []
        for operator in (alias, ALIASES[alias]):
            try:
                results.append(operator(*args, **kwargs))
            except (RuntimeError, NotImplementedError) as error:
                results.append(type(error))
        if isinstance(results[0], Tensor):
            taken += 1
            assert results[0].dtype is results[1].dtype
            torch.testing.assert_close(*results, rtol=0, atol=0, equal_nan=True)
        else:
            assert results[0] is results[1]
    assert taken


_X, _Y = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
_VECTOR = torch.randn(4)
_TRUE = _X > 0


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda x, y: torch.hstack([x, y]), [aten.cat.default]),
        (lambda x, y: torch.hstack([x[0, 0], y[0, 0]]), [*[aten.select.int] * 4, aten.cat.default]),
        (lambda x, y: torch.vstack([x, y]), [aten.cat.default]),
        (lambda x, y: torch.dstack([x, y]), [aten.cat.default]),
        (lambda x, y: torch.column_stack([x, y]), [aten.cat.default]),
        (lambda x, y: x.tile(2), [aten.repeat.default]),
        (lambda x, y: torch.rsub(x, y, alpha=2), [aten.sub.Tensor]),
        (lambda x, y: torch.linalg.vecdot(x, y, dim=1), [aten.mul.Tensor, aten.sum.dim_IntList]),
        (lambda x, y: torch.max(x, y), [aten.maximum.default]),
        (lambda x, y: x.clone().copy_(0.5) + y, [aten.clone.default, aten.full.default, aten.add.Tensor]),
    ],
)
def test_written_out(function: Callable[..., Any], expected: list[Any]) -> None:
    assert targets(function, _X, _Y) == expected


@pytest.mark.parametrize(
    ("function", "inputs", "kept"),
    [
        pytest.param(
            lambda x, y: torch.vstack([x, y]), (_VECTOR, _VECTOR), aten.vstack.default, id="too few dimensions"
        ),
        pytest.param(lambda x, y: torch.dstack([x, y]), (_X[0], _Y[0]), aten.dstack.default, id="a dimension is added"),
        pytest.param(torch.linalg.vecdot, (_VECTOR, _VECTOR), aten.linalg_vecdot.default, id="a kernel of its own"),
        pytest.param(torch.linalg.vecdot, (_X + 1j, _Y + 1j), aten.linalg_vecdot.default, id="conjugated"),
        pytest.param(torch.logical_and, (_X, _Y), aten.logical_and.default, id="numbers"),
        pytest.param(torch.logical_or, (_TRUE, _Y), aten.logical_or.default, id="a truth value and a number"),
    ],
)
def test_what_is_another_computation_stays(function: Callable[..., Any], inputs: tuple[Tensor, ...], kept: Any) -> None:
    assert kept in targets(function, *inputs)


def test_logic_of_truth_values_is_that_of_bits() -> None:
    def function(a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        return a.logical_not(), a.logical_and(b), a.logical_or(b), a.logical_xor(b), ~a, a & b, a | b, a ^ b

    bits = [aten.bitwise_not.default, aten.bitwise_and.Tensor, aten.bitwise_or.Tensor, aten.bitwise_xor.Tensor]
    assert targets(function, _TRUE, _Y > 0) == bits * 2


def _with_step(step: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda q, k, v: step(v[..., 0, 0, None, None].expand(2, 3, 3), q @ k.mT, k[..., :1, :3]).softmax(-1) @ v


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (torch.addcmul, [aten.mul.Tensor, aten.add.Tensor]),
        (lambda a, b, c: torch.addcmul(a, b, c, value=2), [aten.mul.Tensor, aten.mul.Tensor, aten.add.Tensor]),
        (torch.addcdiv, [aten.div.Tensor, aten.add.Tensor]),
    ],
)
def test_a_product_that_is_added_to_scores(step: Callable[..., Tensor], expected: list[Any]) -> None:
    """In three nodes or two, of which each is rounded."""
    graph: list[Any] = []

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        graph.extend(capture(gm, example_inputs).gm.graph.nodes)
        return gm.forward

    torch.compile(_with_step(step), backend=backend)(_X, _Y, _Y)
    places = [node.target for node in graph if node.target in (*expected, aten.addcmul.default, aten.addcdiv.default)]
    assert places == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_product_that_is_added_elsewhere_keeps_its_rounding(dtype: torch.dtype) -> None:
    def modulated(x: Tensor, weight: Tensor) -> Tensor:
        """Of a diffusion transformer: before a projection, and after one with no softmax behind it."""
        x = torch.addcmul(x, x, x) @ weight
        return torch.addcmul(x, x, x, value=math.pi)

    found = targets(modulated, _X.to(dtype), torch.randn(4, 4, dtype=dtype))
    assert found == [aten.addcmul.default, aten.matmul.default, aten.addcmul.default]
