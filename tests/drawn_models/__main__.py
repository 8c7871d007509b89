"""``python -m tests.drawn_models --cases 2000 --seed 0``: models, masks and weights drawn, and all that is wrong."""

from __future__ import annotations

import os
import time
from typing import Any

# Before torch is imported: on a GPU the TorchScript functions of DeBERTa's eager code read illegal memory under the
# reference.
os.environ.setdefault("PYTORCH_JIT", "0")

from tests.drawn_models.judge import Outcome, draw, judge
from tests.support.fuzzing import BAD, parser, report, seed_of


def main() -> None:
    options = parser("tests.drawn_models", __doc__).parse_args()
    seed = seed_of(options)

    def run() -> tuple[dict[str, Any], list[Outcome]]:
        outcomes: list[Outcome] = []
        number = 0
        end = time.monotonic() + options.seconds
        while len(outcomes) < options.cases and time.monotonic() < end:
            for outcome in judge(draw(seed * 1_000_000 + number), options.device, options.inner):
                outcomes.append(outcome)
                if outcome.verdict in BAD:
                    print(outcome, flush=True)
            number += 1
        return {"seed": seed, "models compiled": number}, outcomes

    report(run, options.json)


if __name__ == "__main__":
    main()
