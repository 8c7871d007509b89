"""Ranks that share a sequence compute what one process does: values and gradients, on real process groups."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from tests.parallel import every_mask, idioms
from tests.parallel.drawn import differing
from tests.support import sequence_zoo
from tests.support.ranks import Ranks
from tests.support.sequence_models import Case


@dataclass(frozen=True)
class Check:
    """A function that says, in each of the processes, what is wrong with what they compute, and its arguments."""

    ranks: int
    function: Callable[..., str]
    arguments: tuple[Any, ...]

    def __str__(self) -> str:
        names = (each.__name__ if callable(each) else str(each) for each in self.arguments)
        return f"{self.ranks} {' '.join(names)}"


def masks(
    ranks: int,
    kernel: str,
    balanced: bool,
    dtype: torch.dtype = torch.float32,
    inner: str = "eager",
    gradients: bool = True,
) -> Check:
    return Check(ranks, every_mask.difference, (kernel, balanced, dtype, inner, gradients))


def model(case: Case, ranks: int = 2, inner: str = "eager") -> Check:
    return Check(ranks, differing, (case, inner))


def of_transformers(name: str, option: dict[str, Any], padded: bool) -> Check:
    return Check(2, sequence_zoo.difference, (name, option, padded))


CHECKS = [
    *(masks(*each) for each in itertools.product((2, 4), ("gather", "ring", "ulysses"), (False, True))),
    *(masks(2, "gather", balanced, dtype) for balanced, dtype in ((True, torch.bfloat16), (False, torch.float16))),
    masks(2, "ring", True, torch.bfloat16),
    masks(2, "ulysses", True, torch.float64, gradients=False),
    # What torch.compile takes by default, in training and in inference.
    Check(2, idioms.difference, (idioms.normalized_features, False, "inductor")),
    masks(2, "ring", True, inner="inductor", gradients=False),
    model(Case("causal and padding", balanced=True), inner="aot_eager"),
    # Positions and masks of real models, and how they are written.
    model(Case("triangle", kernel="ring", balanced=True, groups=2, lengths=(4, 8))),
    model(Case("none", "table", kernel="ring", groups=1)),
    model(Case("stored", "learned", balanced=True)),
    model(Case("documents", "given", "by hand", balanced=True, groups=2)),
    model(Case("padding", "of padding", "einsum", lengths=(4, 6))),
    model(Case("alibi", "none", "bmm", layers=2, balanced=True)),
    model(Case("distances", "none", batch=3)),
    model(Case("causal", spelling="sdpa", kernel="gather", groups=2, balanced=True)),
    model(Case("additive", spelling="sdpa", groups=4)),
    model(Case("prefix", kernel="ulysses", groups=2, spelling="sdpa")),
    model(Case("chunks", memory="none", balanced=True, lengths=(4,)), ranks=4),
    # Keys of another sequence, which is sharded as well, or whole on all ranks.
    model(Case("none", memory="sharded", lengths=(4, 6))),
    model(Case("padding", memory="whole", spelling="sdpa", balanced=True)),
    # A batch of one: the shard of a rank is a view.
    model(Case("documents", batch=1, lengths=(10, 4), spelling="sdpa")),
    *(Check(2, idioms.difference, (idiom, bool(at % 2))) for at, idiom in enumerate(idioms.IDIOMS)),
    Check(2, idioms.difference, (idioms.sdpa_of_shared_heads, True, "eager", "ulysses")),
    of_transformers("llama", {}, False),
    of_transformers("llama", {"load_balance": True}, True),
    of_transformers("bert", {"kernel": "ulysses"}, True),
    of_transformers("bert", {}, False),
    of_transformers("gpt2", {}, True),
]


@pytest.mark.parametrize("check", CHECKS, ids=str)
def test_ranks_compute_what_one_process_does(check: Check, request: pytest.FixtureRequest) -> None:
    group: Ranks = request.getfixturevalue({2: "two", 4: "four"}[check.ranks])
    assert group.run(check.function, *check.arguments) == [""] * check.ranks
