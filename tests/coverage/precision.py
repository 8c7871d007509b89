"""A model in the dtype that it is measured in, and the reference beside it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_map_only

from attnrewrite.numerics.judge import HALF, disagreements
from tests.support.helpers import cast
from tests.support.reference import Reference, wide

__all__ = ["DTYPES", "DoesNotRun", "Measured", "judged", "measured_in", "nudged"]

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

REDRAWS = 24
"""How often eager is asked again, with other roundings, before a model is called wrong."""

T = TypeVar("T", list[Tensor], dict[str, Tensor])
Run = Callable[[Callable[..., Any], dict[str, Tensor], dict[str, Any]], T]
"""What is run, of (the model's call, its parameters by name, its inputs)."""


class DoesNotRun(Exception):
    """Eager itself cannot run the model in this dtype."""


@dataclass(frozen=True)
class Measured:
    """``model`` and ``inputs`` are in ``dtype``."""

    model: nn.Module
    inputs: dict[str, Any]
    dtype: torch.dtype

    @property
    def parameters(self) -> dict[str, Tensor]:
        return dict(self.model.named_parameters())

    def new(self, call: Callable[..., Any], run: Run[T]) -> T:
        """What the compiled ``call`` of the model gives."""
        self.model.zero_grad()
        return run(call, self.parameters, self.inputs)

    def own(self, run: Run[T]) -> T:
        """What eager gives.

        Raises:
            DoesNotRun: it fails in half precision, for want of a kernel on the CPU or because it mixes dtypes.
        """
        try:
            return self.new(self.model, run)
        except Exception as error:
            if self.dtype not in HALF:
                raise
            raise DoesNotRun(f"eager does not run: {type(error).__name__}: {str(error).strip()[:300]}") from error

    def truth(self, run: Run[T]) -> T:
        """The reference, in float64."""
        # A copy: some models keep tensors of a call, such as those of rotary embeddings.
        model = copy.deepcopy(self.model)
        with Reference():
            parameters = Reference.given(self.parameters)
            state = {**parameters, **Reference.given(dict(self.model.named_buffers()))}

            def call(**inputs: Any) -> Any:
                return functional_call(model, state, args=(), kwargs=inputs)

            results = run(call, parameters, Reference.given(self.inputs))
            widened: T = tree_map_only(Tensor, wide, results)
        return widened


def measured_in(dtype: torch.dtype, model: nn.Module, inputs: dict[str, Any]) -> Measured:
    """``model`` is converted in place, on its device."""
    device = next((str(parameter.device) for parameter in model.parameters()), "cpu")
    return Measured(model.to(dtype), cast(inputs, dtype, device), dtype)


def judged(measured: Measured, run: Run[T], new: T, own: T, truth: T, **how: Any) -> tuple[str, str]:
    """What is wrong with ``new``, in words; empty if nothing is.

    Models decide things by their numbers: a ReLU is open or not, a token goes to this expert or to that. A rounding
    turns some of these, in eager others than here, so that the error of one run of eager says little of how far eager
    may be off. Before ``new`` is called wrong, eager is run with weights that differ by a rounding, each run held to
    its own reference.

    Args:
        how: as for :func:`disagreements`.

    Returns:
        What is wrong; and what seemed to be, and is no further off than other runs of eager.
    """
    news, owns, truths = _listed(new), _listed(own), _listed(truth)
    wrong = disagreements(news, owns, truths, measured.dtype, **how)
    if wrong and measured.dtype in HALF:
        for furthest in _furthest(measured, run, owns, truths):
            if not disagreements(news, furthest, truths, measured.dtype, **how):
                return "", wrong
    return wrong, ""


def _listed(results: list[Tensor] | dict[str, Tensor]) -> list[Tensor]:
    return list(results.values()) if isinstance(results, dict) else results


def _furthest(
    measured: Measured, run: Run[T], owns: Sequence[Tensor], truths: Sequence[Tensor]
) -> Iterator[list[Tensor]]:
    """Eager's results as far off as the furthest of its runs, number by number, after each run."""
    errors = [_error(own, truth) for own, truth in zip(owns, truths, strict=True)]
    for seed in range(REDRAWS):
        other = Measured(nudged(measured.model, seed), measured.inputs, measured.dtype)
        pairs = zip(_listed(other.own(run)), _listed(other.truth(run)), strict=True)
        errors = [_larger(error, _error(own, truth)) for error, (own, truth) in zip(errors, pairs, strict=True)]
        yield [
            torch.where(own.isfinite() & truth.isfinite(), truth + error, own).to(own.dtype) if error.numel() else own
            for own, truth, error in zip(owns, truths, errors, strict=True)
        ]


def _error(own: Tensor, truth: Tensor) -> Tensor:
    """Empty for what is no floating number."""
    return (own - truth).abs().nan_to_num(posinf=0.0) if own.is_floating_point() else torch.empty(0)


def _larger(error: Tensor, other: Tensor) -> Tensor:
    """The number of boxes or tokens may be another one."""
    return torch.maximum(error, other) if error.shape == other.shape else error


def nudged(model: nn.Module, seed: int, dtype: torch.dtype | None = None) -> nn.Module:
    """A copy whose weights differ by a rounding here and there: to ``dtype``, by default their own."""
    generator = torch.Generator("cpu").manual_seed(seed)
    nudged = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in nudged.parameters():
            if parameter.is_floating_point():
                steps = torch.randint(-1, 2, parameter.shape, generator=generator, device="cpu").to(parameter.device)
                parameter.mul_(1 + steps * torch.finfo(dtype or parameter.dtype).eps)
    return nudged
