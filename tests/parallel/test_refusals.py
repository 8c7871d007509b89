"""What ranks cannot compute of a sequence that they share is an error that names the line, and never another number."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from attnrewrite.errors import AttnRewriteError
from tests.support.helpers import rewritten
from tests.support.ranks import Ranks


def attention(x: Tensor) -> Tensor:
    places = torch.arange(x.shape[1])
    scores = (x @ x.mT).masked_fill(places > places[:, None], float("-inf"))
    return scores.softmax(-1) @ x


def shifted_labels(x: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(attention(x)[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def loss_over_the_sequence(x: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(attention(x).flatten(0, 1), labels.flatten())


def mean_of_the_sequence(x: Tensor) -> Tensor:
    return attention(x).mean(1)


def loss_of_all(x: Tensor) -> Tensor:
    return attention(x).square().sum()


def last_position(x: Tensor) -> Tensor:
    return attention(x)[:, -1]


def convolution(x: Tensor) -> Tensor:
    return attention(F.conv1d(x.mT, torch.ones(8, 8, 3), padding=1).mT)


def sum_along(x: Tensor) -> Tensor:
    return attention(x.cumsum(1))


def order_of_the_sequence(x: Tensor) -> Tensor:
    return attention(x).sort(1).values


def flipped(x: Tensor) -> Tensor:
    return attention(x.flip(1))


def padded(x: Tensor) -> Tensor:
    return attention(F.pad(x, (0, 0, 1, 0)))


def normalized_along(x: Tensor) -> Tensor:
    return attention(F.normalize(x, dim=1))


def statistics_of_the_batch(x: Tensor) -> Tensor:
    return attention(F.batch_norm(x.mT, None, None, training=True).mT)


def dropped_features(x: Tensor) -> Tensor:
    return attention(F.dropout1d(x.mT, 0.5).mT)


def dropped_paths(x: Tensor) -> Tensor:
    return x + attention(x) * (torch.rand(x.shape[0], 1, 1) < 0.5)


def drawn_for_rows_and_columns(x: Tensor) -> Tensor:
    noise = torch.rand(x.shape[0], x.shape[1])
    return (x @ x.mT + noise[:, None] + noise[:, :, None]).softmax(-1) @ x


def with_a_token(x: Tensor) -> Tensor:
    return attention(torch.cat([torch.ones(x.shape[0], 1, 8), x], 1))[:, 1:]


def growing_cache(x: Tensor, past: Tensor) -> Tensor:
    keys = torch.cat([past, x], 1)
    return (x @ keys.mT).softmax(-1) @ keys


def returned_weights(x: Tensor) -> tuple[Tensor, Tensor]:
    weights = (x @ x.mT).softmax(-1)
    return weights @ x, weights


def taken_apart(x: Tensor) -> Tensor:
    return attention(x.reshape(x.shape[0] * 2, -1, 8)).reshape(x.shape)


def broken(x: Tensor) -> Tensor:
    y = attention(x)
    torch._dynamo.graph_break()
    return attention(y)


def by_length(x: Tensor) -> Tensor:
    return attention(x) if x.shape[1] < 12 else x


def up_to(x: Tensor) -> Tensor:
    return attention(x[:, :12])


def with_other(x: Tensor, other: Tensor) -> Tensor:
    return attention(x) + other


def returned_length(x: Tensor) -> tuple[Tensor, int]:
    return attention(x), x.shape[1]


def random_mask(x: Tensor) -> Tensor:
    bias = torch.rand(x.shape[1], x.shape[1])
    return (x @ x.mT + bias).softmax(-1) @ x


def upsampled(x: Tensor) -> Tensor:
    return attention(nn.functional.interpolate(x.mT, scale_factor=2.0).mT)


def sizes_by_length(x: Tensor) -> Tensor:
    return attention(x.reshape(x.shape[0], 2, x.shape[1] // 2, 8)[:, 0])


def refusal(function: Any, numbers: dict[str, Any]) -> str:
    """What a rank is told at the calls; empty without an error.

    Args:
        numbers: ``lengths`` of calls (each rank's, or one), ``batch``, the names that are ``listed``, ``dynamic``,
            ``range``, and entries of the ``option`` and of ``settings``.
    """
    ranks, rank = dist.get_world_size(), dist.get_rank()
    torch.manual_seed(0)
    mesh = init_device_mesh("cpu", (ranks,))
    names = function.__code__.co_varnames[: function.__code__.co_argcount]
    listed, batch = numbers.pop("listed", names), numbers.pop("batch", 2)
    option = {"mesh": mesh, "buffers": list(listed), "buffer_seq_dims": [1] * len(listed), **numbers.pop("option", {})}
    fullgraph = function is not broken
    compiled = rewritten(function, fullgraph=fullgraph, context_parallel=option, **numbers.pop("settings", {}))
    try:
        for length in numbers.pop("lengths", [6]):
            own = length[rank] if isinstance(length, tuple) else length
            inputs = [
                torch.randint(0, 8, (batch, own))
                if name == "labels"
                else torch.randn(batch, own, 8, requires_grad=True)
                for name in names
            ]
            for part in inputs if numbers.get("dynamic", True) else []:
                torch._dynamo.mark_dynamic(part, 1, **numbers.get("range", {}))
            compiled(*inputs)
    except AttnRewriteError as error:
        return str(error)
    return ""


REFUSALS: list[tuple[Any, dict[str, Any], str]] = [
    (shifted_labels, {}, r"test_refusals.py:\d+ .*takes a part of the sequence.*shift labels"),
    (
        loss_over_the_sequence,
        {},
        r"cross_entropy_loss at .*test_refusals.py:\d+ .*takes the sequence|needs the result of .* as a whole",
    ),
    (mean_of_the_sequence, {}, r"mean at .*test_refusals.py:\d+ .*is taken over the sequence"),
    (loss_of_all, {}, "sum at .*is taken over the sequence"),
    (last_position, {}, r"select at .*test_refusals.py:\d+ .*goes along the sequence"),
    (convolution, {}, "conv1d at .*needs the result of .* as a whole"),
    (sum_along, {}, "cumsum at .*goes along the sequence"),
    (order_of_the_sequence, {}, "sort at .*goes along the sequence"),
    (flipped, {}, "flip at .*goes along the sequence"),
    (padded, {}, "pad at .*needs the result of .* as a whole"),
    (normalized_along, {}, "linalg_vector_norm at .*is taken over the sequence"),
    (statistics_of_the_batch, {}, "batch_norm.* at .*needs the result of .* as a whole"),
    (dropped_features, {}, "draws random numbers, of which all ranks would need the same"),
    (dropped_paths, {}, "rand at .*draws random numbers, of which all ranks would need the same"),
    (drawn_for_rows_and_columns, {}, "rand at .*draws random numbers, of which all ranks would need the same"),
    (with_a_token, {}, "cat at .*goes along the sequence"),
    (growing_cache, {}, "cat at .*goes along the sequence"),
    (returned_weights, {}, "softmax at .*is returned in shape"),
    (taken_apart, {}, "takes the sequence apart"),
    (broken, {}, "graph break.*fullgraph=True"),
    (by_length, {}, r"the model goes by a length at .*test_refusals.py:\d+.*does not hold of the whole"),
    (
        by_length,
        {"lengths": [4, 6]},
        r"the model goes by a length at .*test_refusals.py:\d+.*does not hold of the whole",
    ),
    (up_to, {"lengths": [8], "range": {"min": 2, "max": 10}}, "at most 10"),
    (up_to, {"lengths": [8]}, "does not hold of the whole sequence"),
    (with_other, {"listed": ["x"]}, "whether other is sharded is not said"),
    (returned_length, {}, "is returned, and depends on the length"),
    (random_mask, {}, "draws random numbers"),
    (upsampled, {}, "upsample_nearest1d.*needs the result of .* as a whole"),
    (sizes_by_length, {}, "takes the sequence apart"),
    (attention, {"dynamic": False}, "the length of x is fixed at 6"),
    (attention, {"lengths": [(6, 8)]}, "shards of different lengths, 6, 8"),
    (attention, {"lengths": [4, (4, 6)]}, "shards of different lengths, 4, 6"),
    (attention, {"lengths": [(8, 6), 6]}, "shards of different lengths, 8, 6"),
    (attention, {"lengths": [6, 5], "option": {"load_balance": True}}, "shards of a balanced load have two halves"),
    (
        attention,
        {"option": {"kernel": "ulysses"}, "batch": 3},
        "ulysses cannot serve the attention at .*no number of heads",
    ),
    (random_mask, {"option": {"kernel": "ring"}}, "ring cannot serve the attention at "),
    (attention, {"listed": ["y"]}, "whether x is sharded is not said"),
    (attention, {"option": {"buffer_seq_dims": [7]}}, "x has 3 dimensions, and buffer_seq_dims says 7"),
    (attention, {"settings": {"verify": True}}, "'verify'.*cannot be combined"),
    (attention, {"settings": {"tolerance": 0.1}}, "'tolerance'.*cannot be combined"),
]


@pytest.mark.parametrize(("function", "numbers", "words"), REFUSALS)
def test_refused(function: Any, numbers: dict[str, Any], words: str, two: Ranks) -> None:
    for told in two.run(refusal, function, numbers):
        assert re.search(words, told.replace("\n", " ")), told


def naive_under_pytorch() -> str:
    """What a rank is told where PyTorch's own context_parallel is active; before and after it is, nothing is said."""
    from torch.distributed.tensor.experimental import context_parallel

    ranks = dist.get_world_size()
    torch.manual_seed(0)
    x = torch.randn(1, 2, 8 * ranks, 16)
    expected = F.scaled_dot_product_attention(x, x, x)

    def naive(x: Tensor) -> Tensor:
        return (x @ x.mT * 0.25).softmax(-1) @ x

    compiled = rewritten(naive)
    told = ""
    with torch.no_grad():
        assert float((compiled(x) - expected).abs().max()) < 1e-5
        torch.compiler.reset()
        own = x.clone()
        try:
            with context_parallel(init_device_mesh("cpu", (ranks,)), buffers=[own], buffer_seq_dims=[2]):
                compiled(own)
        except AttnRewriteError as error:
            told = str(error)
        torch.compiler.reset()
        assert float((compiled(x) - expected).abs().max()) < 1e-5
    return told


def test_naive_attention_under_pytorchs_context_parallel(two: Ranks) -> None:
    for told in two.run(naive_under_pytorch):
        assert re.search(r"the attention at .*test_refusals.py:\d+ would see the keys of its own rank alone", told), (
            told
        )
