"""A model in the dtype that it is measured in, and the reference beside it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_map_only

from attnrewrite.numerics.judge import HALF
from tests.support.helpers import cast
from tests.support.reference import Reference, wide

__all__ = ["DTYPES", "DoesNotRun", "Measured", "measured_in"]

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

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
        with Reference():
            parameters = Reference.given(self.parameters)
            state = {**parameters, **Reference.given(dict(self.model.named_buffers()))}

            def call(**inputs: Any) -> Any:
                return functional_call(self.model, state, args=(), kwargs=inputs)

            results = run(call, parameters, Reference.given(self.inputs))
            widened: T = tree_map_only(Tensor, wide, results)
        return widened


def measured_in(dtype: torch.dtype, model: nn.Module, inputs: dict[str, Any]) -> Measured:
    """``model`` is converted in place."""
    return Measured(model.to(dtype), cast(inputs, dtype), dtype)
