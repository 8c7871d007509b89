"""What a kernel reads is computed into memory by Inductor, with the same numbers, whatever it is a part of."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from attnrewrite.kernels.common.memory import _lower_realized

realized = torch.ops.attnrewrite.realized

PARTS: dict[str, Callable[[Tensor], Tensor]] = {
    "batch": lambda x: x[1:3],
    "features": lambda x: x.chunk(2, -1)[1],
    "permuted": lambda x: x.permute(1, 0, 2),
    "expanded": lambda x: x[:, :1].expand(-1, 3, -1),
    "one number": lambda x: x[2:3, 3:4, 5:6],
    "copied": lambda x: x[1:3].clone(),
}

COMPUTED: dict[str, Callable[[Tensor], Tensor]] = {
    "given": lambda x: x,
    "pointwise": lambda x: x * 1.5 - 0.25,
    "product": lambda x: x @ x.mT @ x,
    "reduction": lambda x: x.log_softmax(-1),
}


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("computed", COMPUTED)
def test_numbers_stay(computed: str, own: bool, dynamic: bool) -> None:
    _lower_realized()

    def all_parts(x: Tensor) -> list[Tensor]:
        tensor = COMPUTED[computed](x)
        return [realized(take(tensor), own) + 1 for take in PARTS.values()]

    x = torch.randn(4, 5, 8)
    torch._dynamo.reset()
    with torch.no_grad():
        found = torch.compile(all_parts, dynamic=dynamic)(x)
    for take, part in zip(PARTS.values(), found, strict=True):
        torch.testing.assert_close(part, take(COMPUTED[computed](x)) + 1)


def test_gradients_pass() -> None:
    x = torch.randn(4, 5, 8, requires_grad=True)

    def used(x: Tensor) -> Tensor:
        part: Tensor = realized(x.softmax(-1)[1:3], True)
        return (part**2).sum()

    (expected,) = torch.autograd.grad((x.softmax(-1)[1:3] ** 2).sum(), x)
    (found,) = torch.autograd.grad(torch.compile(used, backend="aot_eager")(x), x)
    torch.testing.assert_close(found, expected)
