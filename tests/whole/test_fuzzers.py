"""The three fuzzers, a few programs of each, at a new seed in each run: none is wrong, and none crashes.

A failure names the seed, which replays it; ``FUZZ_SEED`` sets one for all. Long runs are made by ``python -m
tests.spellings``, ``python -m tests.mutations`` and ``python -m tests.drawn_models``.
"""

from __future__ import annotations

import os
import random
from itertools import islice

import torch

from tests.drawn_models.judge import draw as draw_model
from tests.drawn_models.judge import judge as judge_model
from tests.mutations.judge import draw as draw_mutant
from tests.mutations.judge import judge as judge_mutant
from tests.mutations.judge import shrunk
from tests.spellings.__main__ import run

BAD = ("wrong", "crashed", "taken")


def _seed() -> int:
    seed = int(os.environ.get("FUZZ_SEED") or random.SystemRandom().randrange(10**6))
    print(f"FUZZ_SEED={seed}")
    return seed


def test_spellings() -> None:
    seed = _seed()
    bad = [str(outcome) for outcome in run(20, seed) if outcome.verdict in BAD]
    assert not bad, f"FUZZ_SEED={seed}\n" + "\n".join(bad)


def test_mutations() -> None:
    seed = _seed()
    outcomes = [judge_mutant(draw_mutant(seed * 1_000_000 + number)) for number in range(24)]
    bad = [str(shrunk(outcome)) for outcome in outcomes if outcome.verdict in BAD]
    assert not bad, f"FUZZ_SEED={seed}\n" + "\n".join(bad)
    assert any(outcome.sites for outcome in outcomes)


def test_models() -> None:
    seed = _seed()
    state = torch.get_rng_state()
    outcomes = list(islice((each for n in range(3) for each in judge_model(draw_model(seed * 1_000_000 + n))), 24))
    torch.set_rng_state(state)
    bad = [str(outcome) for outcome in outcomes if outcome.verdict in BAD]
    assert not bad, f"FUZZ_SEED={seed}\n" + "\n".join(bad)
