"""The spellings that Inductor's own pass knows: each is found here, in every dtype, with and without gradients.

They are taken from the installed torch as its generator gives them, but for the batches of one, which differ in no
operator. In float16 and bfloat16 what is right is said by :mod:`attnrewrite.numerics.judge`.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from types import FunctionType, ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._inductor.fx_passes import fuse_attention

from attnrewrite.numerics.judge import disagreements
from tests.support.helpers import outputs, rewritten_and_rows, rows
from tests.support.reference import Reference, wide

DTYPES = (torch.float32, torch.float16, torch.bfloat16)

THROUGH_FLOAT16 = ("_sfdp_pattern_7", "_sfdp_pattern_8", "_sfdp_pattern_9", "_sfdp_pattern_10")
"""These round the weights to float16, whatever dtype their operands have."""

MASK_OF_THE_DTYPE = "_sfdp_pattern_24"
"""With a float32 mask it mixes dtypes in bfloat16, which eager refuses."""

LARGEST = 16
"""Sizes do not matter to the generator: some of them would take minutes on the CPU."""


@dataclass(frozen=True)
class Given:
    """One entry of the generator.

    Attributes:
        search: the function, which takes ``examples`` and ``numbers``.
        examples: tensors whose shapes, strides, dtypes and gradients count; the value only of those without dimensions.
        dtype: that of the operands.
        training: gradients are taken.
    """

    name: str
    search: Callable[..., Any]
    examples: tuple[Tensor, ...]
    numbers: dict[str, float]
    dtype: torch.dtype
    training: bool

    def __call__(self, *inputs: Tensor) -> Any:
        return self.search(*inputs, **self.numbers)

    def inputs(self) -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)
        return [self._input(example, generator) for example in self.examples]

    def _input(self, example: Tensor, generator: torch.Generator) -> Tensor:
        dtype = example.dtype
        if dtype is torch.float16 or (self.name.startswith(MASK_OF_THE_DTYPE) and dtype is torch.float32):
            dtype = self.dtype
        if not example.dim():
            return torch.tensor(example.item(), dtype=dtype)
        shape = [min(size, LARGEST) for size in example.shape]
        if example.dtype is torch.bool or (example.dim() == 2 and not example.requires_grad):
            return _keep(shape, generator).to(dtype)
        strides = example.stride() if tuple(shape) == example.shape else torch.empty(shape).stride()
        drawn = torch.empty_strided(shape, strides, dtype=dtype)
        drawn.copy_(torch.randn(shape, generator=generator))
        return drawn.requires_grad_(example.requires_grad and self.training)


def _keep(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Keys that are kept; every row keeps its first."""
    keep = torch.rand(*shape, generator=generator) < 0.7
    keep[..., 0] = True
    return keep


def _searches() -> dict[str, Callable[..., Any]]:
    """The search functions as if they were written here, by name: Dynamo runs what is in torch's files as it is."""
    module = ModuleType(f"{__name__}_copied")
    sys.modules[module.__name__] = module  # Where Dynamo looks up what they call.
    names = vars(module)
    names.update({**vars(fuse_attention), "__name__": module.__name__})
    for name, search in vars(fuse_attention).items():
        if name.startswith("_sfdp_pattern_"):
            names[name] = FunctionType(search.__code__.replace(co_filename=__file__), names, name)
    return names


def _given() -> Iterator[Given]:
    searches = _searches()
    for name, entry in fuse_attention._get_sfdp_patterns():
        if "_bs1" in name:
            continue
        training = name.endswith("_training")
        examples = tuple(entry["example_inputs"])
        own = examples[0].dtype
        (search,) = (one for one in searches if re.fullmatch(rf"{one}(_half)?(_mask_fp32)?_(training|inference)", name))
        numbers = dict(entry["scalar_workaround"])
        if not training and "dropout_p" in inspect.signature(searches[search]).parameters:
            numbers["dropout_p"] = 0.0  # The generator binds it.
        for dtype in (torch.float32,) if own is torch.float32 else (torch.float16, torch.bfloat16):
            title = name.replace("_half", "_bfloat16") if dtype is torch.bfloat16 else name
            yield Given(title, searches[search], examples, numbers, dtype, training)


GIVEN = list(_given())


def test_the_generator_gives_what_it_is_read_for() -> None:
    assert {given.dtype for given in GIVEN} == set(DTYPES)
    assert len({given.name for given in GIVEN}) == len(GIVEN)
    assert len({given.name.removesuffix("_training") for given in GIVEN if given.training}) > 50
    assert any(given.numbers.get("dropout_p") for given in GIVEN if given.training)


@pytest.mark.parametrize("given", GIVEN, ids=lambda given: given.name)
def test_found_and_right(given: Given) -> None:
    exact = _without_dropout(given)
    inputs = exact.inputs()
    with torch.set_grad_enabled(given.training):
        function, _, sites = rewritten_and_rows(exact, *inputs)
        assert [site.status for site in sites] == ["rewritten"], [site.reason for site in sites]
        new, own = _results(function, inputs), _results(exact, exact.inputs())
        with Reference():
            truth = _results(exact, Reference.given(exact.inputs()))
            truth = {what: [wide(value) for value in values] for what, values in truth.items()}
    dtype = torch.float16 if given.name.startswith(THROUGH_FLOAT16) and given.dtype is torch.float32 else given.dtype
    for what, beside in (("values", 0.0), ("gradients", 1.0)):
        assert disagreements(new[what], own[what], truth[what], dtype, beside=beside) == "", what


@pytest.mark.parametrize("given", [one for one in GIVEN if one.numbers.get("dropout_p")], ids=lambda given: given.name)
def test_found_with_dropout(given: Given) -> None:
    sites = rows(given, *given.inputs())
    assert [site.status for site in sites] == ["rewritten"], [site.reason for site in sites]


def _without_dropout(given: Given) -> Given:
    """Weights are dropped at random, which no two results agree in."""
    numbers = {name: 0.0 if name == "dropout_p" else value for name, value in given.numbers.items()}
    return replace(given, numbers=numbers)


def _results(function: Callable[..., Any], inputs: Sequence[Tensor]) -> dict[str, list[Tensor]]:
    results = outputs(function(*inputs))
    wanted = [value for value in inputs if value.requires_grad]
    if not wanted:
        return {"values": results, "gradients": []}
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(result.shape, generator=generator) for result in results]
    total = torch.stack([(result * weight).sum() for result, weight in zip(results, weights, strict=True)]).sum()
    return {"values": results, "gradients": list(torch.autograd.grad(total, wanted))}
