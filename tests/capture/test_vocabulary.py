"""The vocabulary of the IR, as a golden file for each torch: a new one shows here what it spells in a new way."""

from __future__ import annotations

import os
import random
from pathlib import Path

import expecttest
import pytest
import torch

from attnrewrite.capture.normalize import ALIASES
from tests.capture.vocabulary import Vocabulary, as_text, part_of_text, read_vocabulary
from tests.support.drawn import seed

VERSION = ".".join(torch.__version__.split(".")[:2])


def _drawn(name: str) -> bool:
    """A run of the whole suite reads the operators of a quarter of all names."""
    return os.environ["TESTS_DRAWN"] == "0" or random.Random(f"{seed()} {name}").random() < 0.25


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    return read_vocabulary(_drawn)


def test_golden(vocabulary: Vocabulary) -> None:
    """``EXPECTTEST_ACCEPT=1`` writes it; beside that of another torch it shows what differs."""
    golden = Path(__file__).with_name(f"vocabulary_{VERSION}.txt")
    text = as_text(vocabulary)
    if expecttest.ACCEPT:
        golden.write_text(text, encoding="utf-8")
    assert golden.exists(), f"no vocabulary of torch {VERSION} yet"
    assert text == part_of_text(golden.read_text(encoding="utf-8"), _drawn)


def test_no_operator_goes_by_another_name(vocabulary: Vocabulary) -> None:
    aliases = {str(alias).removeprefix("aten.") for alias in ALIASES}
    assert {name: targets & aliases for name, targets in vocabulary.targets.items() if targets & aliases} == {}
