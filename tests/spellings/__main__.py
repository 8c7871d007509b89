"""``python -m tests.spellings --cases 2000 --seed 0 [--json FILE]``: how many are found, and all that is wrong."""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings

from tests.spellings.forms import Spelling
from tests.spellings.judge import NotASpelling, Outcome, judge
from tests.spellings.strategy import spellings
from tests.support.fuzzing import set_up

BAD = ("wrong", "crashed", "taken")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.spellings", description=__doc__)
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=("float16", "bfloat16", "float32", "float64"), help="of all cases")
    parser.add_argument("--device", default="cpu", help="where the tensors lie, such as cuda (default: cpu)")
    parser.add_argument("--inner", default="eager", help="the backend of the rewritten graph, such as inductor")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="judges no more after so many")
    parser.add_argument("--json", type=Path, help="writes the figures, and every case that was not found, to this file")
    parser.add_argument("--scripts", type=Path, help="writes each case that is wrong to this folder, as a program")
    options = parser.parse_args()
    set_up()
    start = time.perf_counter()
    dtype = getattr(torch, options.dtype) if options.dtype else None
    outcomes = run(options.cases, options.seed, dtype, options.device, options.seconds, options.inner)
    seconds = time.perf_counter() - start
    figures = summary(outcomes)
    for name, value in figures.items():
        if isinstance(value, dict):
            print(f"{name}:")
            for words, count in value.items():
                print(f"  {count:5}  {words}")
        else:
            print(f"{name}: {value}")
    print(f"seconds: {seconds:.0f}, {seconds / max(len(outcomes), 1):.2f} a case")
    bad = [outcome for outcome in outcomes if outcome.verdict in BAD]
    for number, outcome in enumerate(bad):
        print(f"\n{outcome}")
        if options.scripts:
            options.scripts.mkdir(parents=True, exist_ok=True)
            text = f"# {outcome.verdict}: {' '.join(outcome.detail.split())}\n{outcome.spelling.script()}"
            (options.scripts / f"{outcome.verdict}_{options.seed}_{number}.py").write_text(text)
    if options.json:
        cases = [_case(outcome) for outcome in outcomes if outcome.verdict != "found"]
        options.json.write_text(json.dumps({**figures, "seconds": seconds, "cases_not_found": cases}, indent=1))


def run(
    cases: int,
    number: int,
    dtype: torch.dtype | None = None,
    device: str = "cpu",
    seconds: float = float("inf"),
    inner: str = "eager",
) -> list[Outcome]:
    outcomes: list[Outcome] = []
    end = time.monotonic() + seconds

    @seed(number)
    @settings(
        max_examples=cases,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(spellings(dtype))
    def collect(spelling: Spelling) -> None:
        if time.monotonic() > end:
            return
        try:
            outcomes.append(judge(spelling, device, inner))
        except NotASpelling as error:  # One defect of the generator is no reason to lose a long run.
            print(f"eager cannot run this: {error}")

    collect()
    return outcomes


def summary(outcomes: list[Outcome]) -> dict[str, Any]:
    """The figures: what is rewritable in principle, and what became of it."""
    rewritable = [outcome for outcome in outcomes if outcome.spelling.rewritable]
    found = sum(outcome.verdict == "found" for outcome in rewritable)
    kept = [outcome for outcome in rewritable if outcome.verdict == "kept"]
    reasons = Counter(reason for outcome in kept for reason in dict.fromkeys(outcome.reasons))
    seen = Counter(form for outcome in rewritable for form in dict.fromkeys(outcome.spelling.forms))
    lost = Counter(form for outcome in kept for form in dict.fromkeys(outcome.spelling.forms))
    return {
        "cases": len(outcomes),
        "rewritable": len(rewritable),
        "found": found,
        "found %": round(100 * found / max(len(rewritable), 1), 2),
        "documented refusals": sum(bool(o.spelling.refusal) and not o.spelling.stays for o in outcomes),
        "of those rewritten": sum(bool(o.spelling.refusal) and o.verdict == "found" for o in outcomes),
        "must stay": sum(bool(o.spelling.stays) for o in outcomes),
        **{verdict: sum(outcome.verdict == verdict for outcome in outcomes) for verdict in BAD},
        "kept": len(kept),
        "reasons for the kept": dict(reasons.most_common()),
        "kept by form, of how many": {
            f"{form} (of {seen[form]})": count
            for form, count in sorted(lost.items(), key=lambda item: -item[1] / seen[item[0]])
        },
    }


def _case(outcome: Outcome) -> dict[str, Any]:
    spelling = outcome.spelling
    return {
        "verdict": outcome.verdict,
        "detail": outcome.detail,
        "reasons": outcome.reasons,
        "forms": spelling.forms,
        "refusal": spelling.refusal,
        "stays": spelling.stays,
        "script": spelling.script(),
    }


if __name__ == "__main__":
    main()
