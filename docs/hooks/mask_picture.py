"""A small picture of what a specimen's mask and bias leave of the scores."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from attnrewrite.patterns import Specimen

__all__ = ["picture", "weights_of"]

LENGTH = 12
LEVELS = 4
"""How many shades a field may have."""


class _Weights(TorchFunctionMode):
    """Collects the weights of each softmax over keys, or the exponentials of scores, up to a factor for each row."""

    def __init__(self) -> None:
        super().__init__()
        self.softmax: list[Tensor] = []
        self.exponentials: list[Tensor] = []

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        name = getattr(function, "__name__", "")
        if function is F.scaled_dot_product_attention:
            # The result for values that are the identity matrix is the weights.
            query, key, value, *others = args
            identity = torch.eye(value.shape[-2]).expand(*value.shape[:-1], value.shape[-2])
            self.softmax.append(function(query, key, identity, *others, **kwargs))
        elif name == "softmax":
            dim = kwargs.get("dim", args[1] if len(args) > 1 else -1)
            self.softmax.append(_rows_of_queries(result.movedim(dim, -1)))
        elif name in ("exp", "exp_", "exp2"):
            self.exponentials.append(result.clone())
        return result


def _rows_of_queries(weights: Tensor) -> Tensor:
    """(..., query length, key length) of weights whose last dimension is that of the keys."""
    queries = [dim for dim, size in enumerate(weights.shape[:-1]) if size == LENGTH]
    return weights.movedim(queries[-1], -2) if queries else weights


def weights_of(specimen: Specimen) -> Tensor | None:
    """The weights of the first head, (query length, key length), 1 for the largest of a row; None if there are none.

    The first input, which the query is or is made of, is zero. So the scores are what mask and bias make them.
    """
    inputs = specimen.inputs(0, LENGTH)
    first = next((index for index, value in enumerate(inputs) if is_operand(value)), None)
    if first is None:
        return None
    inputs = (*inputs[:first], torch.zeros_like(inputs[first]), *inputs[first + 1 :])
    collected = _Weights()
    with torch.no_grad(), collected:
        specimen.function(*inputs)
    for weights in (*collected.softmax, *collected.exponentials):
        if weights.dim() >= 2 and min(weights.shape[-2:]) > 1:
            rows = weights.reshape(-1, *weights.shape[-2:])[0]
            return rows / rows.amax(-1, keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny)
    return None


def is_operand(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.dim() >= 2


def picture(weights: Tensor, label: str) -> str:
    """The weights as SVG: a row for each query, a column for each key; the larger the weight, the darker."""
    size = 5 if max(weights.shape) <= 20 else 2
    shades = (weights.nan_to_num() * LEVELS).ceil().long()
    rows, columns = weights.shape
    paths = []
    for shade in range(1, LEVELS + 1):
        steps = [
            f"M{start} {row}h{end - start}v1h{start - end}z"
            for row in range(rows)
            for start, end in _runs([number == shade for number in shades[row].tolist()])
        ]
        if steps:
            paths.append(f'<path opacity="{shade / LEVELS:g}" d="{"".join(steps)}"/>')
    return (
        f'<svg class="mask" role="img" aria-label="{label}" viewBox="0 0 {columns} {rows}" width="{size * columns}" '
        f'height="{size * rows}">{"".join(paths)}</svg>'
    )


def _runs(row: Sequence[bool]) -> list[tuple[int, int]]:
    """The begin and end of each stretch of true."""
    edges = [index for index in range(len(row) + 1) if ([*row, False][index]) != ([False, *row][index])]
    return list(zip(edges[::2], edges[1::2], strict=True))
