"""Models on several processes, by tensor parallelism, FSDP2, DDP, and the first two together."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.parallel_models import MODELS, WAYS

pytestmark = pytest.mark.drawn

ROOT = Path(__file__).parents[2]
LONGEST = 300
"""Seconds after which processes that wait for each other are ended."""


def started(folder: Path, world: int, device: str, cases: Sequence[str]) -> list[dict[str, Any]]:
    """What each process found."""
    outputs = [folder / f"{rank}.txt" for rank in range(world)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])}
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for rank, output in enumerate(outputs):
            command = [sys.executable, "-m", "tests.support.parallel_models"]
            command += [str(folder), str(rank), str(world), device, *cases]
            with output.open("wb") as file:
                processes.append(subprocess.Popen(command, stdout=file, stderr=file, env=environment))
        for process in processes:
            process.wait(timeout=LONGEST)
    finally:
        for process in processes:
            process.kill()
    said = "\n".join(output.read_text()[-3000:] for output in outputs)
    assert [process.wait() for process in processes] == [0] * world, said
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(world)]


def require_equal_to_one_process(folder: Path, model: str, way: str, world: int, device: str) -> None:
    found = started(folder, world, device, [f"{model}-{way}-inference", f"{model}-{way}-training"])
    for case, result in (item for each in found for item in each.items()):
        assert result["left"] == [], case
        # One graph serves all layers where a hook of FSDP stands between them.
        assert len(result["sites"]) in (1, 2), case
        assert result["sites"] == [["rewritten", ""]] * len(result["sites"]), case
        assert result["graphs"] <= result["plain_graphs"], case
        assert result["error"] <= 1e-5, case
        assert result["gradients"] <= 1e-4, case


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("model", MODELS)
def test_on_cpus(model: str, way: str, tmp_path: Path) -> None:
    # Four processes of BERT were seen to end in torch 2.13 and gloo (a damaged heap); the cause is not known.
    world = 4 if (model, way) == ("llama", "tensor_fsdp") else 2
    require_equal_to_one_process(tmp_path, model, way, world, "cpu")


@pytest.mark.gpu
@pytest.mark.every
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("model", MODELS)
def test_on_gpus(model: str, way: str, tmp_path: Path) -> None:
    require_equal_to_one_process(tmp_path, model, way, min(torch.cuda.device_count(), 8), "cuda")
