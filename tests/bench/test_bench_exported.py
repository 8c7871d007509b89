"""``attnrewrite bench exported``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from attnrewrite.cli import main

pytest.importorskip("transformers")


def test_packages_are_run_without_attnrewrite_and_held_against_eager(tmp_path: Path) -> None:
    file = tmp_path / "times.json"
    arguments = ["bench", "exported", "--model", "bert", "--size", "small", "--repeats", "2", "--json", str(file)]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    assert "1 of 1" in result.output
    (model,) = json.loads(file.read_text())["models"]
    assert model["sites"] == model["rewritten"] == 1
    assert set(model["errors"]) == {f"{a} {b}" for a in ("package", "program") for b in ("untouched", "rewritten")}
    assert max(model["errors"].values()) <= 1e-5
    assert {kind: len(seconds) for kind, seconds in model["seconds"].items()} == {"untouched": 2, "rewritten": 2}
