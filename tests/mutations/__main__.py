"""``python -m tests.mutations --cases 2000 --seed 0``: specimens changed by a few steps, and all that is wrong."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

from tests.mutations.judge import Outcome, draw, judge, shrunk
from tests.support.fuzzing import BAD, parser, report, seed_of


def main() -> None:
    arguments = parser("tests.mutations", __doc__)
    arguments.add_argument("--scripts", type=Path, help="writes each case that is wrong to this folder, as a program")
    options = arguments.parse_args()
    seed = seed_of(options)

    def run() -> tuple[dict[str, Any], list[Outcome]]:
        outcomes: list[Outcome] = []
        end = time.monotonic() + options.seconds
        for number in range(options.cases):
            if time.monotonic() > end:
                break
            outcome = judge(draw(seed * 1_000_000 + number), options.device, options.inner)
            if outcome.verdict in BAD:
                outcome = shrunk(outcome, options.device, options.inner)
                print(outcome, flush=True)
                if options.scripts:
                    _write(outcome, options.scripts, f"{outcome.verdict}_{seed}_{number}")
            outcomes.append(outcome)
        return {"seed": seed}, outcomes

    report(run, options.json)


def _write(outcome: Outcome, folder: Path, name: str) -> None:
    built = outcome.mutant.built()
    assert built is not None
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.py").write_text(outcome.script())
    torch.save(built[1], folder / f"{name}.pt")


if __name__ == "__main__":
    main()
