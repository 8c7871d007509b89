"""How operands lie in memory that are made to fit a kernel."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx

from attnrewrite.capture.legalize import legalized
from attnrewrite.capture.trace import capture
from attnrewrite.ir.builder import Builder
from attnrewrite.kernels.common.layout import padded_to, with_unit_stride


@pytest.mark.parametrize("features", [1, 3, 8, 11])
@pytest.mark.parametrize("heads", [1, 2, 4])
def test_features_that_are_padded_lie_side_by_side(heads: int, features: int) -> None:
    """A single feature whose stride is that of the positions looks like channels last."""

    def pad_result(gm: fx.GraphModule, inputs: list[Tensor]) -> Any:
        captured = capture(legalized(gm), inputs).gm
        output = captured.graph.output_node()
        (result,) = output.all_input_nodes
        builder = Builder(captured, before=output, like=result)
        output.args = ([padded_to(builder, with_unit_stride(builder, result), -1, 8)],)
        captured.recompile()
        return captured

    own = torch.randn(2, 17, heads * 16)
    strides = (17 * heads * 16, 16, heads * 16, heads * 16 if features == 1 else 1)
    value = own.as_strided((2, heads, 17, features), strides)
    padded = torch.compile(lambda x: x * 1, backend=pad_result)(value)
    kept = torch.compile(lambda x: x[:], backend=pad_result)(value)
    for result in (padded, kept):
        assert result.shape[-1] == -(-features // 8) * 8 and result.stride(-1) == 1
        assert torch.equal(result[..., :features], value) and not result[..., features:].any()
