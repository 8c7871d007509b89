"""Calls that hide attention from the graph: native modules, and in-place updates of a dropout's result."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.support.helpers import gradients, relative_error, rewritten, rows

WIDTH, LENGTH = 32, 6


def _padding(*, everything: bool = False) -> Tensor:
    padding = torch.zeros(2, LENGTH, dtype=torch.bool)
    padding[1, 0 if everything else 4 :] = True
    return padding


@pytest.mark.parametrize("settings", [{}, {"norm_first": True}, {"activation": "gelu"}], ids=["post", "pre", "gelu"])
@pytest.mark.parametrize(
    "masks",
    [
        {},
        {"src_key_padding_mask": _padding()},
        {"src_key_padding_mask": _padding(everything=True)},
        {"src_mask": torch.ones(LENGTH, LENGTH).triu(1).bool()},
        {"src_mask": torch.ones(LENGTH, LENGTH).triu(1).bool(), "src_key_padding_mask": _padding()},
    ],
    ids=["no mask", "padding", "a sequence of padding", "causal", "both"],
)
def test_encoder_layer_in_evaluation(settings: dict[str, Any], masks: dict[str, Tensor]) -> None:
    layer = nn.TransformerEncoderLayer(WIDTH, 4, 64, dropout=0.0, batch_first=True, **settings).eval()
    x = torch.randn(2, LENGTH, WIDTH, generator=torch.Generator().manual_seed(0))

    def run(x: Tensor) -> Tensor:
        output: Tensor = layer(x, **masks)
        return output

    with torch.no_grad():
        (row,) = rows(run, x)
        assert row.status == "rewritten"
        assert relative_error(rewritten(run)(x), run(x)) <= 1e-5


@pytest.mark.parametrize("training", [False, True])
def test_the_result_of_dropout_may_be_updated(training: bool) -> None:
    """wav2vec 2, XLM: a mask is multiplied in place into what dropout returned, in evaluation its argument itself."""

    def block(x: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
        hidden = x * 2
        dropped = F.dropout(hidden, p=0.0 if training else 0.1, training=training)
        dropped *= kept[..., None]
        return (dropped @ dropped.mT * 0.3).softmax(-1) @ dropped, hidden

    inputs = torch.randn(2, LENGTH, 8), (~_padding()).float()
    assert [row.status for row in rows(block, *inputs)] == ["rewritten"]
    assert relative_error(rewritten(block)(*inputs), block(*inputs)) <= 1e-5
    actual = gradients(rewritten(block, "aot_eager"), inputs)
    assert relative_error(actual, gradients(block, inputs)) <= 1e-4
