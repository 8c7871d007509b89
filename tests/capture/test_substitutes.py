"""Models whose own questions about the numbers of a mask would break the graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attnrewrite.backend import collect_reports
from attnrewrite.capture.substitutes import substitute_questions_about_masks
from tests.support.zoo import noise

LENGTH, WIDTH = 5, 16
CAUSAL = nn.Transformer.generate_square_subsequent_mask(LENGTH)
WINDOW = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1) | torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril(-3)
OPTIONS: dict[str, Any] = {"dropout": 0.0, "batch_first": True}


def encoder(mask: Tensor) -> tuple[nn.Module, Callable[[nn.Module, Tensor], Tensor], int]:
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(WIDTH, 2, 32, **OPTIONS), 2)
    return model, lambda model, x: model(x, mask=mask), 2


def decoder(mask: Tensor) -> tuple[nn.Module, Callable[[nn.Module, Tensor], Tensor], int]:
    model = nn.TransformerDecoder(nn.TransformerDecoderLayer(WIDTH, 2, 32, **OPTIONS), 2)
    return model, lambda model, x: model(x, x.flip(1), tgt_mask=mask), 4


def both(mask: Tensor) -> tuple[nn.Module, Callable[[nn.Module, Tensor], Tensor], int]:
    model = nn.Transformer(WIDTH, 2, 1, 1, 32, **OPTIONS)
    return model, lambda model, x: model(x, x, src_mask=mask, tgt_mask=mask), 3


@pytest.mark.parametrize("mask", [CAUSAL, WINDOW], ids=["causal", "window"])
@pytest.mark.parametrize("made", [encoder, decoder, both])
@pytest.mark.parametrize("training", [False, True])
def test_transformers_of_pytorch_are_captured_with_their_masks(
    made: Callable[[Tensor], tuple[nn.Module, Callable[[nn.Module, Tensor], Tensor], int]], mask: Tensor, training: bool
) -> None:
    torch.manual_seed(0)
    model, run, sites = made(mask)
    model.train(training)
    x = noise(2, LENGTH, WIDTH, seed=1).requires_grad_(training)
    compiled: Any = torch.compile(model, backend="attnrewrite", options={"inner_backend": "eager"})
    with torch.set_grad_enabled(training), collect_reports() as reports:
        result, expected = run(compiled, x), run(model, x)
    torch.testing.assert_close(result, expected)
    assert [row.status for report in reports for row in report.sites] == ["rewritten"] * sites
    if training:
        own, reference = (
            torch.autograd.grad(each.square().sum(), (x, *model.parameters())) for each in (result, expected)
        )
        for a, b in zip(own, reference, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_substitute_that_stands_is_kept() -> None:
    substitute_questions_about_masks()
    assert torch.nn.modules.transformer._detect_is_causal_mask(CAUSAL) is True
