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
    arguments = ["bench", "start", "--model", "bert", "--size", "small", "--repeats", "1", "--json", str(file)]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    (model,) = json.loads(file.read_text())["models"]
    assert set(model["cold"]) == set(model["warm"]) == {"inductor", "attnrewrite"}
    (cold,), (warm,) = model["cold"]["attnrewrite"], model["warm"]["attnrewrite"]
    assert cold["graphs"] == warm["graphs"] == 1 and cold["nodes"] == warm["nodes"] > 10
    assert (cold["stored"], warm["stored"]) == (0, 1)
    assert model["cold"]["inductor"][0]["graphs"] == 0
