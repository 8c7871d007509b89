"""``python -m tests.drawn_models --cases 2000 --seed 0``: models, masks and weights drawn, and all that is wrong."""

from __future__ import annotations

import argparse
import json
import random
import time
from collections import Counter
from pathlib import Path

import torch

from tests.drawn_models.judge import Outcome, draw, judge

BAD = ("wrong", "crashed")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.drawn_models", description=__doc__)
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--seed", type=int, help="replays a run (default: a new one, which is printed)")
    parser.add_argument("--device", default="cpu", help="where the models lie, such as cuda (default: cpu)")
    parser.add_argument("--json", type=Path, help="writes the figures, and what is wrong, to this file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    seed = options.seed if options.seed is not None else random.SystemRandom().randrange(10**6)
    print(f"seed: {seed}", flush=True)
    start = time.perf_counter()
    outcomes: list[Outcome] = []
    number = 0
    while len(outcomes) < options.cases:
        for outcome in judge(draw(seed * 1_000_000 + number), options.device):
            outcomes.append(outcome)
            if outcome.verdict in BAD:
                print(outcome, flush=True)
        number += 1
    counts: Counter[str] = Counter(outcome.verdict for outcome in outcomes)
    figures = {
        "seed": seed,
        "cases": len(outcomes),
        "models compiled": number,
        **{verdict: counts[verdict] for verdict in ("same", *BAD, "ill-conditioned", "does not run")},
        "with a rewritten site": sum(outcome.sites > 0 for outcome in outcomes),
        "seconds": round(time.perf_counter() - start),
    }
    for name, value in figures.items():
        print(f"{name}: {value}")
    if options.json:
        figures["failures"] = [str(outcome) for outcome in outcomes if outcome.verdict in (*BAD, "ill-conditioned")]
        options.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
