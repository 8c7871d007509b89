"""Kinds of programs that were rewritten wrongly once: ten members of each, drawn anew in each run.

A kind is a mechanism, not a program: what it was found in stands among its members, beside others that its steps allow.
``FUZZ_SEED`` replays a run; ``python -m pytest tests/whole/test_kinds.py`` draws others.
"""

from __future__ import annotations

import math
import os
import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from attnrewrite import attention_forward
from attnrewrite.backend import collect_reports
from tests.support.against_eager import prepared, run, truth, wrong
from tests.support.drawn import seed
from tests.support.helpers import rewritten

MEMBERS = int(os.environ.get("KIND_MEMBERS", "10"))

Attend = Callable[..., Tensor]
Member = tuple[Attend, Sequence[Sequence[Any]]]
"""A function, and the arguments of its calls."""

_DTYPES = [torch.float32] * 4 + [torch.float64, torch.bfloat16, torch.float16]


class Drawn:
    """What members have in common: sizes, operands, masks with rows that keep no key, the ways to write softmax."""

    def __init__(self, chance: random.Random) -> None:
        self.chance = chance
        self.dtype: torch.dtype = chance.choice(_DTYPES)
        self.gradients = chance.random() < 0.5
        self.dynamic = chance.random() < 0.2
        self.batch, self.heads, self.head_dim = 2, chance.choice([1, 2]), 8
        self.length = chance.choice([5, 6, 9])
        self.scale = chance.choice([1.0, 0.5, 8**-0.5])
        self._generator = torch.Generator().manual_seed(chance.randrange(10**9))

    def tensor(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._generator) / 2

    def operands(self, keys: int | None = None) -> list[Tensor]:
        lengths = (self.length, keys or self.length, keys or self.length)
        return [self.tensor(self.batch, self.heads, each, self.head_dim) for each in lengths]

    def keep(self) -> Tensor:
        """(batch, 1, length, length): true where a key is attended; some rows keep none."""
        length = self.length
        causal = torch.ones(self.batch, 1, length, length, dtype=torch.bool).tril()
        padded = self.chance.randrange(1, length - 1)
        shape = self.chance.choice(["left", "rows", "random", "causal without a row", "none in a sequence"])
        if shape == "left":
            causal[0, :, :, :padded] = False
        elif shape == "rows":
            causal[:] = True
            causal[:, :, padded] = False
        elif shape == "random":
            causal = torch.rand(causal.shape, generator=self._generator) < 0.6
            causal[1, :, 2] = False
        elif shape == "causal without a row":
            causal[:, :, padded] = False
        else:
            causal[:] = True
            causal[1] = False
        return causal

    def low(self) -> float:
        """A number that masks."""
        least = max(torch.finfo(self.dtype).min, torch.finfo(torch.float32).min)
        numbers = [-math.inf, -math.inf, -1e4, -3e4, least]
        return self.chance.choice(numbers if self.dtype == torch.float16 else [*numbers, -1e9, -1e30])

    def masked(self, low: float) -> Callable[[Tensor, Tensor], Tensor]:
        """Scores and a mask to scores that are masked."""
        ways: list[Callable[[Tensor, Tensor], Tensor]] = [
            lambda s, keep: s.masked_fill(~keep, low),
            lambda s, keep: torch.where(keep, s, low),
            lambda s, keep: s + torch.zeros_like(keep, dtype=s.dtype).masked_fill(~keep, low),
            lambda s, keep: s + torch.where(keep, 0.0, low).to(s.dtype),
        ]
        return self.chance.choice(ways)

    def softmax(self) -> Callable[[Tensor], Tensor]:
        ways: list[Callable[[Tensor], Tensor]] = [
            lambda s: s.softmax(-1),
            lambda s: s.exp() / s.exp().sum(-1, keepdim=True),
            lambda s: (s - s.amax(-1, keepdim=True)).softmax(-1),
            lambda s: (s - s.logsumexp(-1, keepdim=True)).exp(),
            lambda s: s.log_softmax(-1).exp(),
            _by_hand,
        ]
        return self.chance.choice(ways)

    def zeroed(self) -> Callable[[Tensor, Tensor], Tensor]:
        """Weights of rows without a key, or of keys that are masked, become zero."""
        ways: list[Callable[[Tensor, Tensor], Tensor]] = [
            lambda w, keep: w.masked_fill(~keep.any(-1, keepdim=True), 0.0),
            lambda w, keep: torch.where(keep.any(-1, keepdim=True), w, 0.0),
            lambda w, keep: w.masked_fill(~keep, 0.0),
            lambda w, keep: torch.where(keep, w, torch.zeros((), dtype=w.dtype)),
            lambda w, keep: torch.nan_to_num(w),
            lambda w, keep: w.masked_fill(w.isnan(), 0.0),
            lambda w, keep: torch.nan_to_num(w, nan=0.0) * keep,
        ]
        return self.chance.choice(ways)


def _by_hand(scores: Tensor) -> Tensor:
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    return weights / weights.sum(-1, keepdim=True)


def bounded(d: Drawn) -> Member:
    """A bound behind the mask makes an ordinary number of what masked, which exp or a factor undo."""
    large = 6e4 if d.dtype == torch.float16 else 1e30
    bounds: list[Callable[[Tensor], Tensor]] = [
        lambda s: s.clamp(min=-1e4),
        lambda s: s.clamp(-30.0, 30.0),
        lambda s: s.clamp(-large, large) * 1e10,
        lambda s: s.clamp(min=torch.finfo(s.dtype).min),
        lambda s: torch.max(s, torch.tensor(torch.finfo(s.dtype).min, dtype=s.dtype)),
        lambda s: 20 * torch.tanh(s / 20),
        lambda s: F.hardtanh(s, -5.0, 5.0),
        lambda s: torch.maximum(s, torch.full((), -1e3, dtype=s.dtype)),
        lambda s: torch.nan_to_num(s, neginf=-100.0),
        lambda s: torch.sigmoid(s) * 4,
    ]
    mask, bound, softmax = d.masked(d.low()), d.chance.choice(bounds), d.softmax()

    def attend(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
        return softmax(bound(mask(q @ k.mT * d.scale, keep))) @ v

    return attend, [(*d.operands(), d.keep())]


def float_argument(d: Drawn) -> Member:
    """A Python float that changes between calls may be any number, one that masks among them."""
    ways: list[Attend] = [
        lambda s, hidden, low: s + hidden.to(s.dtype) * low,
        lambda s, hidden, low: s + low * hidden.to(s.dtype),
        lambda s, hidden, low: s.masked_fill(hidden, low),
        lambda s, hidden, low: torch.where(hidden, low, s),
        lambda s, hidden, low: s + torch.where(hidden, low, 0.0).to(s.dtype),
        lambda s, hidden, low: s - hidden.to(s.dtype) * -low,
    ]
    way = d.chance.choice(ways)
    d.dynamic = False

    def attend(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor, low: float) -> Tensor:
        return way(q @ k.mT * d.scale, hidden, low).softmax(-1) @ v

    hidden = ~d.keep()
    numbers = [d.chance.choice([-1e4, -5.0, 1.0]), d.chance.choice([-2e4, -7.5, 0.5]), d.low()]
    return attend, [(*d.operands(), hidden, low) for low in numbers]


def float_positions(d: Drawn) -> Member:
    """Positions in floating point do not keep the laws of real numbers."""
    factor, one = d.chance.choice([0.1, 0.3, 1 / 3, 1e-3, 7.7]), d.chance.choice([1.0, 0.5, 3.0])
    kind = d.chance.choice([torch.float32, torch.float32, torch.float16, torch.bfloat16, torch.float64])
    rules: list[Callable[[Tensor, Tensor], Tensor]] = [
        lambda i, j: (i * factor + one) - i * factor >= one + 0 * j,
        lambda i, j: (i * factor) / factor >= i + 0 * j,
        lambda i, j: j * factor <= i * factor + one - one,
        lambda i, j: (j * factor / factor) <= i,
        lambda i, j: (i / factor).floor() * factor <= i + 0 * j,
        lambda i, j: (i - j) * factor >= i * factor - j * factor,
        lambda i, j: (i + 1e8) - 1e8 >= j,
        lambda i, j: (i * factor).floor() >= (j * factor).floor(),
    ]
    rule, low = d.chance.choice(rules), d.low()
    d.length, d.dynamic = d.chance.choice([12, 40]), False

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        i = torch.arange(q.shape[-2]).to(kind)[:, None]
        j = torch.arange(k.shape[-2]).to(kind)
        return (q @ k.mT * d.scale).masked_fill(~rule(i, j), low).softmax(-1) @ v

    return attend, [d.operands()]


def mask_by_product(d: Drawn) -> Member:
    """The result of a product is as large as what goes in."""
    ways: list[Callable[[Tensor, int], Tensor]] = [
        lambda low, keys: torch.einsum("bi,bj->bij", low, torch.ones_like(low)),
        lambda low, keys: F.linear(low[..., None], torch.ones(keys, 1, dtype=low.dtype)),
        lambda low, keys: low[..., None] @ torch.ones(1, keys, dtype=low.dtype),
        lambda low, keys: torch.bmm(low[..., None], torch.ones(low.shape[0], 1, keys, dtype=low.dtype)),
        lambda low, keys: F.conv1d(low[:, None], torch.ones(keys, 1, 1, dtype=low.dtype)).mT,
        lambda low, keys: torch.stack([torch.outer(each, torch.ones_like(each)) for each in low]),
        lambda low, keys: F.embedding(low.abs().gt(1).long(), torch.stack([0 * low[0], low[1]])),
    ]
    way, number = (
        d.chance.choice(ways),
        d.chance.choice([-1e4, -3e4] if d.dtype == torch.float16 else [-1e4, -1e9, -1e30]),
    )
    d.dynamic = False

    def attend(q: Tensor, k: Tensor, v: Tensor, low: Tensor) -> Tensor:
        return (q @ k.mT * d.scale + way(low, k.shape[-2])[:, None]).softmax(-1) @ v

    low = torch.zeros(2, d.length)
    low[0, 3:] = number
    low[1] = number
    return attend, [(*d.operands(), low)]


def zeroed_weights(d: Drawn) -> Member:
    """Rows without a key that are set to zero behind softmax: the gradients that go with each spelling."""
    mask, softmax, zeroed = d.masked(d.low()), d.softmax(), d.zeroed()
    d.gradients = True

    def attend(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
        return zeroed(softmax(mask(q @ k.mT * d.scale, keep)), keep) @ v

    return attend, [(*d.operands(), d.keep())]


def zeroed_by_two_masks(d: Drawn) -> Member:
    """Two masks, one after the other, and the weights of what each of them hides become zero (speechbrain)."""

    def fill(w: Tensor, keep: Tensor) -> Tensor:
        return w.masked_fill(~keep, 0.0)

    def choice(w: Tensor, keep: Tensor) -> Tensor:
        return torch.where(keep, w, torch.zeros((), dtype=w.dtype))

    def product(w: Tensor, keep: Tensor) -> Tensor:
        return w * keep

    zeroed = d.chance.choices([fill, choice, product], [4, 2, 1], k=2)
    first, second = d.masked(d.low()), d.masked(d.low())
    softmax, swapped = d.softmax(), d.chance.random() < 0.5

    def attend(q: Tensor, k: Tensor, v: Tensor, keep: Tensor, keys: Tensor) -> Tensor:
        w = softmax(second(first(q @ k.mT * d.scale, keep), keys))
        for way, mask in zip(zeroed, (keys, keep) if swapped else (keep, keys), strict=True):
            w = way(w, mask)
        return w @ v

    keys = torch.ones(d.batch, 1, 1, d.length, dtype=torch.bool)
    keys[0, ..., d.chance.randrange(d.length) :] = False
    return attend, [(*d.operands(), d.keep(), keys)]


def masked_by_a_factor(d: Drawn) -> Member:
    """A mask that is multiplied, before softmax or to its exponentials, lets NaN and infinities through."""
    number = -1e4 if d.dtype == torch.float16 else d.chance.choice([-1e4, -1e9])

    def of_scores(s: Tensor, keep: Tensor) -> Tensor:
        return (s * keep + number * (1 - keep.to(s.dtype))).softmax(-1)

    def of_scores_by_hand(s: Tensor, keep: Tensor) -> Tensor:
        e = (s * keep - -number * (1 - keep.to(s.dtype))).exp()
        return torch.nan_to_num(e / e.sum(-1, keepdim=True))

    def of_exponentials(s: Tensor, keep: Tensor) -> Tensor:
        e = s.exp() * keep
        return torch.nan_to_num(e / e.sum(-1, keepdim=True))

    def of_exponentials_with_a_floor(s: Tensor, keep: Tensor) -> Tensor:
        e = (s - s.amax(-1, keepdim=True)).exp() * keep.to(s.dtype)
        return e / (e.sum(-1, keepdim=True) + 1e-6)

    def of_weights(s: Tensor, keep: Tensor) -> Tensor:
        w = s.softmax(-1) * keep
        return w / w.sum(-1, keepdim=True).clamp(min=1e-6)

    def twice(s: Tensor, keep: Tensor) -> Tensor:
        also = keep.flip(-1).to(s.dtype)
        return torch.nan_to_num((s.masked_fill(~keep, -math.inf) * also + (1 - also) * number).softmax(-1))

    way = d.chance.choice(
        [of_scores, of_scores_by_hand, of_exponentials, of_exponentials_with_a_floor, of_weights, twice]
    )

    def attend(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
        return way(q @ k.mT * d.scale, keep) @ v

    return attend, [(*d.operands(), d.keep())]


def floor_between(d: Drawn) -> Member:
    """Exponentials over their sum, without a maximum, and something that hides the row without a key."""
    mask = d.masked(d.low())
    hides: list[Callable[[Tensor], Tensor]] = [
        lambda s: torch.max(s, torch.tensor(torch.finfo(s.dtype).min, dtype=s.dtype)),
        lambda s: s.clamp(min=-1e4),
        lambda s: torch.nan_to_num(s, neginf=torch.finfo(s.dtype).min),
        lambda s: s,
    ]
    divided: list[Callable[[Tensor], Tensor]] = [
        lambda e: e / e.sum(-1, keepdim=True),
        lambda e: e / (e.sum(-1, keepdim=True) + 1e-6),
        lambda e: e / e.sum(-1, keepdim=True).clamp(min=1e-6),
        lambda e: torch.nan_to_num(e / e.sum(-1, keepdim=True)),
        lambda e: F.normalize(e, p=1.0, dim=-1, eps=1e-6),
    ]
    hide, divide = d.chance.choice(hides), d.chance.choice(divided)

    def attend(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
        return divide(hide(mask(q @ k.mT * d.scale, keep)).exp()) @ v

    return attend, [(*d.operands(), d.keep())]


def not_a_number(d: Drawn) -> Member:
    """What is NaN or infinite in the source is so behind it, however few keys there are."""
    keys = d.chance.choice([2, 3, 4, 7, 8, 15, 16, 17, 31, 64])
    softmax = d.softmax()
    d.gradients = False

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return softmax(q @ k.mT * d.scale) @ v

    operands = d.operands(keys)
    # No product with an infinite key is minus infinity, which would leave a row finite (docs/exactness.md).
    operands[0][..., 0], operands[0][..., 1] = 1.0, -1.0
    place = d.chance.choice([0, 0, 1, 2])
    operands[place][:, :, d.chance.randrange(operands[place].shape[-2])] = d.chance.choice([math.nan, math.inf])
    return attend, [operands]


def sink(d: Drawn) -> Member:
    """One more addend below the exponentials, which a row without a key has a gradient of, or NaN."""
    mask = d.masked(-math.inf)
    zeroed = d.zeroed() if d.chance.random() < 0.5 else lambda w, keep: w

    def over_maximum(s: Tensor) -> Tensor:
        highest = s.amax(-1, keepdim=True)
        e = (s - highest).exp()
        return e / (e.sum(-1, keepdim=True) + (-highest).exp())

    def over_clamped_maximum(s: Tensor) -> Tensor:
        highest = s.amax(-1, keepdim=True).clamp(min=0.0)
        e = (s - highest).exp()
        return e / (e.sum(-1, keepdim=True) + (-highest).exp())

    def over_one(s: Tensor) -> Tensor:
        return s.exp() / (1 + s.exp().sum(-1, keepdim=True))

    def joined(s: Tensor) -> Tensor:
        return torch.cat([s, torch.zeros_like(s[..., :1])], -1).softmax(-1)[..., :-1]

    def padded(s: Tensor) -> Tensor:
        return F.pad(s, (1, 0)).softmax(-1)[..., 1:]

    way = d.chance.choice([over_maximum, over_clamped_maximum, over_one, joined, padded])

    def attend(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
        return zeroed(way(mask(q @ k.mT * d.scale, keep)), keep) @ v

    return attend, [(*d.operands(), d.keep())]


def chosen_by_index(d: Drawn) -> Member:
    """Constant indices, counted from either end, into dimensions that may have one element."""
    frames = d.chance.choice([1, 2, 3])
    chosen = [d.chance.randrange(-frames, frames) for _ in range(d.batch)]
    ways: list[Callable[[Tensor], Tensor]] = [
        lambda t: t[chosen],
        lambda t: t[torch.tensor(chosen)],
        lambda t: torch.stack([t[index] for index in chosen]),
        lambda t: torch.cat([t[index : index + 1] if index != -1 else t[-1:] for index in chosen]),
        lambda t: t.index_select(0, torch.tensor([index % frames for index in chosen])),
    ]
    way = d.chance.choice(ways)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ way(k).mT * d.scale).softmax(-1) @ way(v)

    query, key, value = d.operands()
    shape = (frames, *key.shape[1:])
    return attend, [(query, d.tensor(*shape) + 0 * key[:1], d.tensor(*shape) + 0 * value[:1])]


KINDS: list[Callable[[Drawn], Member]] = [
    bounded,
    float_argument,
    float_positions,
    mask_by_product,
    zeroed_weights,
    zeroed_by_two_masks,
    masked_by_a_factor,
    floor_between,
    not_a_number,
    sink,
    chosen_by_index,
]


@pytest.mark.every
@pytest.mark.parametrize("member", range(MEMBERS))
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_members(kind: Callable[[Drawn], Member], member: int) -> None:
    chance = random.Random(f"{seed()} {kind.__name__} {member}")
    d = Drawn(chance)
    attend, calls = kind(d)
    given = [prepared(call, d.dtype, d.gradients) for call in calls]
    owns = [run(attend, each, d.gradients) for each in given]
    exact = [truth(attend, call, d.dtype, d.gradients, "cpu") for call in calls]
    function = rewritten(attend, "aot_eager" if d.gradients else "eager", dynamic=d.dynamic or None)
    with collect_reports() as reports:
        news = [run(function, each, d.gradients) for each in given]
    assert not [report.reason for report in reports if "rewriting failed" in report.reason]
    for new, own, reference in zip(news, owns, exact, strict=True):
        difference = wrong(d.dtype, new, own, reference)
        assert not difference, f"FUZZ_SEED={seed()}, {d.dtype}, gradients {d.gradients}: {difference}"


@pytest.mark.every
@pytest.mark.parametrize("member", range(10))
def test_packed_heads_through_flex(member: int) -> None:
    """``attention_forward`` with heads that lie in the features, which Inductor cannot lower on a CPU."""
    chance = random.Random(f"{seed()} packed {member}")
    heads = chance.choice([(4, 4), (4, 2), (2, 1), (6, 3)])
    length, head_dim, causal = chance.choice([5, 6, 12]), chance.choice([8, 16]), chance.random() < 0.5
    query, key, value = (torch.randn(2, length, n * head_dim) for n in (heads[0], heads[1], heads[1]))
    q, k, v = (each.view(2, length, -1, head_dim).transpose(1, 2) for each in (query, key, value))
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
    packed = "b s (n d)"
    output = attention_forward(
        query,
        key,
        value,
        packed,
        packed,
        packed,
        dims={"d": head_dim},
        is_causal=causal,
        use_flex=chance.random() < 0.7,
    )
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)
