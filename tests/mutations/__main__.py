"""``python -m tests.mutations --cases 2000 --seed 0``: specimens changed by a few steps, and all that is wrong."""

from __future__ import annotations

import argparse
import json
import random
import time
from collections import Counter
from pathlib import Path

import torch

from tests.mutations.judge import Outcome, draw, judge, shrunk

BAD = ("wrong", "crashed")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.mutations", description=__doc__)
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--seed", type=int, help="replays a run (default: a new one, which is printed)")
    parser.add_argument("--device", default="cpu", help="where the tensors lie, such as cuda (default: cpu)")
    parser.add_argument("--json", type=Path, help="writes the figures, and what is wrong, to this file")
    parser.add_argument("--scripts", type=Path, help="writes each case that is wrong to this folder, as a program")
    options = parser.parse_args()
    torch.set_num_threads(1)
    seed = options.seed if options.seed is not None else random.SystemRandom().randrange(10**6)
    print(f"seed: {seed}", flush=True)
    start = time.perf_counter()
    outcomes: list[Outcome] = []
    for number in range(options.cases):
        outcome = judge(draw(seed * 1_000_000 + number), options.device)
        if outcome.verdict in BAD:
            outcome = shrunk(outcome, options.device)
            print(outcome, flush=True)
            if options.scripts:
                _write(outcome, options.scripts, f"{outcome.verdict}_{seed}_{number}", options.device)
        outcomes.append(outcome)
    counts: Counter[str] = Counter(outcome.verdict for outcome in outcomes)
    figures = {
        "seed": seed,
        "cases": len(outcomes),
        **{verdict: counts[verdict] for verdict in ("same", *BAD, "ill-conditioned", "does not run")},
        "with a rewritten site": sum(outcome.sites > 0 for outcome in outcomes),
        "seconds": round(time.perf_counter() - start),
    }
    for name, value in figures.items():
        print(f"{name}: {value}")
    if options.json:
        figures["failures"] = [str(outcome) for outcome in outcomes if outcome.verdict in (*BAD, "ill-conditioned")]
        options.json.write_text(json.dumps(figures, indent=1))


def _write(outcome: Outcome, folder: Path, name: str, device: str) -> None:
    built = outcome.mutant.built()
    assert built is not None
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.py").write_text(outcome.script())
    torch.save(built[1], folder / f"{name}.pt")


if __name__ == "__main__":
    main()
