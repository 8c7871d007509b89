"""accelerate's own Accelerator, and transformers' own Trainer, whose models are compiled with attnrewrite."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from attnrewrite.backend import collect_reports
from attnrewrite.errors import OptionError
from attnrewrite.integrations.accelerate import AttnRewritePlugin
from tests.support.helpers import relative_error
from tests.support.zoo import NO_DROPOUT, ids, transformer


def classifier() -> nn.Module:
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    return transformer("BertForSequenceClassification", "BertConfig", **sizes, **NO_DROPOUT)().train()


def batch(seed: int) -> dict[str, Tensor]:
    return {"input_ids": ids(2, 12, seed), "labels": torch.tensor([0, 1])}


def gradients_of(model: nn.Module) -> list[Tensor]:
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("regional", [False, True], ids=["whole", "block by block"])
def test_a_prepared_model(regional: bool) -> None:
    plugin = AttnRewritePlugin(options={"inner_backend": "aot_eager"}, use_regional_compilation=regional)
    accelerator = Accelerator(cpu=True, dynamo_plugin=plugin)
    model, plain = classifier(), classifier()
    prepared: Any = accelerator.prepare(model)
    with collect_reports() as reports:
        accelerator.backward(prepared(**batch(0)).loss)
    plain(**batch(0)).loss.backward()
    assert reports and all(report.rewritten and not report.kept for report in reports)
    theirs, ours = gradients_of(plain), gradients_of(model)
    assert len(theirs) == len(ours)
    largest = max(float(each.abs().max()) for each in theirs)
    assert all(float((a - b).abs().max()) <= 1e-5 * largest for a, b in zip(ours, theirs, strict=True))


def test_another_backend_is_refused() -> None:
    with pytest.raises(OptionError, match="take accelerate's TorchDynamoPlugin"):
        AttnRewritePlugin(backend="inductor")


def test_a_trainer_of_transformers(tmp_path: Path) -> None:
    """The model is compiled in place before the trainer has it."""
    from transformers import Trainer, TrainingArguments

    losses, found = [], []
    for compiled in (False, True):
        model: Any = classifier()
        if compiled:
            model.compile(backend="attnrewrite", options={"inner_backend": "aot_eager"})
        arguments = TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=3,
            per_device_train_batch_size=1,
            report_to=[],
            use_cpu=True,
            save_strategy="no",
            seed=0,
            disable_tqdm=True,
        )
        examples = [{"input_ids": ids(1, 12, seed)[0], "labels": torch.tensor(seed % 2)} for seed in range(6)]
        with collect_reports() as reports:
            losses.append(Trainer(model=model, args=arguments, train_dataset=examples).train().training_loss)
        found.append([(len(report.rewritten), len(report.kept)) for report in reports])
    assert found[0] == [] and set(found[1]) == {(2, 0)}
    assert relative_error(torch.tensor(losses[1]), torch.tensor(losses[0])) <= 1e-5
