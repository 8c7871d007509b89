"""``attnrewrite bench start``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from attnrewrite.cli import main

pytest.importorskip("transformers")


def test_a_warm_start_rewrites_nothing(tmp_path: Path) -> None:
    file = tmp_path / "times.json"
    arguments = ["bench", "start", "--model", "bert", "--size", "small", "--device", "cpu", "--repeats", "1", "--json"]
    result = CliRunner().invoke(main, [*arguments, str(file)])
    assert result.exit_code == 0, result.output
    (model,) = json.loads(file.read_text())["models"]
    assert set(model["cold"]) == set(model["warm"]) == {"inductor", "attnrewrite"}
    (cold,), (warm,) = model["cold"]["attnrewrite"], model["warm"]["attnrewrite"]
    assert cold["graphs"] == warm["graphs"] == 1 and cold["nodes"] == warm["nodes"] > 10
    assert (cold["stored"], warm["stored"]) == (0, 1)
    assert model["cold"]["inductor"][0]["graphs"] == 0
    assert model["clock"] == "processor"


@pytest.mark.gpu
def test_models_of_a_gpu_in_their_own_dtype(tmp_path: Path) -> None:
    file = tmp_path / "times.json"
    arguments = ["bench", "start", "--model", "gpt2", "--size", "small", "--repeats", "1", "--json", str(file)]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    (model,) = json.loads(file.read_text())["models"]
    assert [start["stored"] for start in (model["cold"]["attnrewrite"][0], model["warm"]["attnrewrite"][0])] == [0, 1]
    assert model["clock"] == "wall"


def test_a_model_that_is_not_measured_here() -> None:
    result = CliRunner().invoke(main, ["bench", "start", "--model", "gpt2", "--device", "cpu"])
    assert result.exit_code == 2 and "choose from bert, llama, unet" in result.output
