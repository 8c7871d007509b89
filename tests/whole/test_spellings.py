"""Random spellings of attention: none becomes wrong, and almost every one is found.

``python -m tests.spellings --cases 2000`` draws more of them and says which were not found, and why.
"""

from __future__ import annotations

from hypothesis import HealthCheck, Phase, given, settings

from tests.spellings.forms import Spelling
from tests.spellings.judge import Outcome, judge
from tests.spellings.strategy import spellings

CASES = 40


def test_random_spellings() -> None:
    outcomes: list[Outcome] = []

    # The same examples each time, and unshrunk: an example is a program that shows by itself what is wrong.
    @settings(
        max_examples=CASES,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(spellings())
    def check(spelling: Spelling) -> None:
        outcome = judge(spelling)
        assert outcome.verdict in ("found", "kept"), str(outcome)
        assert not outcome.unblamed, str(outcome)
        outcomes.append(outcome)

    check()
    rewritable = [outcome for outcome in outcomes if outcome.spelling.rewritable]
    kept = [str(outcome) for outcome in rewritable if outcome.verdict == "kept"]
    assert len(rewritable) > CASES / 2
    assert len(kept) <= 0.02 * len(rewritable), f"{len(kept)} of {len(rewritable)} were kept:\n" + "\n".join(kept[:5])
