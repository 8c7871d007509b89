"""The command line that fuzzers share: a seed that is printed and replays, and the figures."""

from __future__ import annotations

import argparse
import json
import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

__all__ = ["BAD", "parser", "report", "seed_of", "set_up"]

BAD = ("wrong", "crashed")
"""Verdicts that are findings."""


def parser(prog: str, description: str | None) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog=f"python -m {prog}", description=description)
    made.add_argument("--cases", type=int, default=2000)
    made.add_argument("--seed", type=int, help="replays a run (default: a new one, which is printed)")
    made.add_argument("--device", default="cpu", help="where the tensors lie, such as cuda (default: cpu)")
    made.add_argument("--inner", help="the backend of the rewritten graph, such as inductor (default: none)")
    made.add_argument("--seconds", type=float, default=float("inf"), help="draws no more after so many")
    made.add_argument("--json", type=Path, help="writes the figures, and what is wrong, to this file")
    return made


def set_up() -> None:
    """One thread; and convolutions of float32 are computed in float32, since what is compared is attention."""
    torch.set_num_threads(1)
    torch.backends.cudnn.allow_tf32 = False


def seed_of(options: argparse.Namespace) -> int:
    """The seed of the run, printed."""
    set_up()
    seed = options.seed if options.seed is not None else random.SystemRandom().randrange(10**6)
    print(f"seed: {seed}", flush=True)
    return int(seed)


def report(run: Callable[[], tuple[dict[str, Any], Sequence[Any]]], path: Path | None) -> None:
    """Prints the figures of a run, and writes them to ``path``.

    Args:
        run: gives figures of its own, and outcomes that have a ``verdict`` and a number of rewritten ``sites``.
        path: of a JSON file, or None.
    """
    start = time.perf_counter()
    own, outcomes = run()
    counts: Counter[str] = Counter(outcome.verdict for outcome in outcomes)
    figures: dict[str, Any] = {
        **own,
        "cases": len(outcomes),
        **{verdict: counts[verdict] for verdict in ("same", *BAD, "ill-conditioned", "beyond range", "does not run")},
        "with a rewritten site": sum(outcome.sites > 0 for outcome in outcomes),
        "seconds": round(time.perf_counter() - start),
    }
    for name, value in figures.items():
        print(f"{name}: {value}")
    if path is not None:
        figures["failures"] = [str(outcome) for outcome in outcomes if outcome.verdict in (*BAD, "ill-conditioned")]
        path.write_text(json.dumps(figures, indent=1))
