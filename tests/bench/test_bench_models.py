"""``attnrewrite bench models``: real models, each in the ways that it has."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from rich.console import Console
from torch import Tensor, nn

from attnrewrite.bench.model_cases import MODELS, ModelCase, with_own_sdpa
from attnrewrite.bench.models import WAYS, ModelsBenchmark, Settings, plot_models, print_models_benchmark
from attnrewrite.bench.models import run_models_benchmark as run
from attnrewrite.cli import main

pytestmark = pytest.mark.drawn

CPU = torch.device("cpu")


class OwnAttention(nn.Module):
    """A model of no library: it has no sdpa path of its own that is known."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(32, 96)

    def forward(self, hidden: Tensor) -> Tensor:
        query, key, value = self.project(hidden).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4)
        weights = (query @ key.mT * 0.25).softmax(-1)
        result: Tensor = weights @ value
        return result


class WithTwoPaths(OwnAttention):
    """It has an sdpa path, which is asked for as that of a model of transformers."""

    fused = False

    def set_attn_implementation(self, name: str) -> None:
        assert name == "sdpa"
        self.fused = True

    def forward(self, hidden: Tensor) -> Tensor:
        if not self.fused:
            return super().forward(hidden)
        query, key, value = self.project(hidden).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(query, key, value, scale=0.25)

    @classmethod
    def build(cls) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
        return cls(), (torch.randn(2, 8, 32),), {}


def own_attention() -> tuple[nn.Module, tuple[Tensor]]:
    """What the command line is given by name."""
    return OwnAttention(), (torch.randn(2, 8, 32),)


def test_training_holds_all_four_to_eager_in_more_precision() -> None:
    settings = Settings(CPU, training=True, warm=False, repeats=2)
    (row,) = run([ModelCase("own", WithTwoPaths.build)], settings).models
    assert (row["sites"], row["rewritten"], row["kept"], row["dtype"]) == (1, 1, [], "float32")
    assert tuple(row["ways"]) == WAYS
    for way in row["ways"].values():
        assert 0 < way["error"] < 1e-5 and 0 < way["gradient_error"] < 1e-5
        assert len(way["times_ms"]) == 2 and {"ms", "cold_s"} <= set(way) and "warm_s" not in way


@pytest.mark.parametrize("size", ["small", "base"])
def test_the_seven_are_known_by_the_same_names_in_each_size(size: str) -> None:
    assert list(MODELS[size]) == ["gpt2", "bert", "t5", "clip", "llama", "gemma2", "unet"]


@pytest.mark.parametrize("name", ["gpt2", "t5", "clip", "llama", "unet"])
def test_both_paths_of_a_model_give_the_same(name: str) -> None:
    model, args, kwargs = MODELS["small"][name].build()
    model.eval()
    with torch.inference_mode():
        naive = model(*args, **kwargs)[0]
        fused = with_own_sdpa(model)
        assert fused is not None
        error = (fused(*args, **kwargs)[0] - naive).abs().max() / naive.abs().max()
    assert error < 1e-5


def test_a_model_without_a_known_sdpa_path_is_measured_in_three_ways() -> None:
    def build() -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
        return (*own_attention(), {})

    result = run([ModelCase("own", build)], Settings(CPU, repeats=1, warm=False))
    assert tuple(result.models[0]["ways"]) == ("eager", "torch.compile", "attnrewrite")
    shown = io.StringIO()
    print_models_benchmark(result, Console(file=shown, width=180))
    assert "1 of 1" in shown.getvalue()


def test_the_command_takes_a_factory_and_writes_data_and_plot(tmp_path: Path) -> None:
    data, plot = tmp_path / "models.json", tmp_path / "models.svg"
    arguments = ["--model", f"{__name__}:own_attention", "--repeats", "1", "--json", str(data), "--plot", str(plot)]
    result = CliRunner().invoke(main, ["bench", "models", *arguments])
    assert result.exit_code == 0, result.output
    written = json.loads(data.read_text())
    assert written["step"] == "forward" and "warm_s" in written["models"][0]["ways"]["attnrewrite"]
    assert plot.read_text().startswith("<?xml")


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("gpt3", "--model gpt3: write one of gpt2, bert, t5, clip, llama, gemma2, unet, or package.module:factory"),
        ("builtins:dict", "no key 'model'"),
    ],
)
def test_a_name_that_is_none(model: str, words: str) -> None:
    result = CliRunner().invoke(main, ["bench", "models", "--model", model])
    assert result.exit_code == 2 and words in result.output


def test_the_plot_shows_what_there_is(tmp_path: Path) -> None:
    row: dict[str, Any] = {"name": "a model", "ways": {name: {"ms": 1.0} for name in WAYS if name != "own sdpa"}}
    plot_models(ModelsBenchmark([row]), tmp_path / "plot.svg")
    assert (tmp_path / "plot.svg").stat().st_size > 0
