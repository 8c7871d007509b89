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


@pytest.mark.parametrize("heads", [2, 3])
def test_a_mask_of_permuted_heads_is_given_a_sink_side_by_side(heads: int) -> None:
    """Relative biases, whose heads lie innermost, look like channels last; GPU kernels refuse what is padded so."""
    seen = []

    class Reading(fx.Interpreter):
        def run_node(self, node: fx.Node) -> Any:
            result = super().run_node(node)
            if node.target is torch.ops.aten.scaled_dot_product_attention.default:
                seen.append([self.env[arg] for arg in node.args[:4]])  # type: ignore[index]
            return result

    def attention(q: Tensor, k: Tensor, v: Tensor, table: Tensor, mask: Tensor) -> Tensor:
        places = torch.arange(6)
        bias = torch.nn.functional.embedding(places[None] - places[:, None] + 6, table).permute(2, 0, 1)
        scores = torch.nn.functional.pad(q @ k.mT + bias + mask, (1, 0))
        return scores.softmax(-1)[..., 1:] @ v

    call = [torch.randn(4, heads, 6, 8) for _ in range(3)]
    call += [torch.randn(13, heads), torch.randn(4, heads, 1, 6)]
    options: dict[str, Any] = {"inner_backend": lambda gm, inputs: Reading(gm).run}
    compiled = torch.compile(attention, backend="attnrewrite", options=options)
    torch.testing.assert_close(compiled(*call), attention(*call))
    ((*_, mask),) = seen
    assert mask.shape[-1] == 7 and all(operand.stride(-1) == 1 for operand in seen[0])
