"""Keys and values that are repeated are not copied, and what is no repetition stays what it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnrewrite.analysis.indices import _counted
from attnrewrite.backend import collect_reports
from tests.support.helpers import cast, gradients, relative_error, rewritten

FRAMES, HEADS, LENGTH = 3, 2, 5
_generator = torch.Generator().manual_seed(0)
X = torch.randn(2 * FRAMES, LENGTH, 16, generator=_generator)
W = 0.2 * torch.randn(48, 16, generator=_generator)


def heads(x: Tensor) -> Tensor:
    return x.view(*x.shape[:2], HEADS, 8).transpose(1, 2)


def videos(x: Tensor) -> Tensor:
    return x.reshape(2, FRAMES, *x.shape[1:])


def attend(x: Tensor, w: Tensor, repeat: Callable[[Tensor], Tensor], **settings: Any) -> Tensor:
    """Attention of frames to what ``repeat`` makes of the keys and values of (video, frame, position, features)."""
    q, k, v = F.linear(x, w).chunk(3, dim=-1)
    k, v = (repeat(videos(t)).flatten(0, 1) for t in (k, v))
    return F.scaled_dot_product_attention(heads(q), heads(k), heads(v), **settings).transpose(1, 2).flatten(2)


def code_of(function: Callable[..., Any], *inputs: Any, **settings: Any) -> tuple[Any, str, list[str]]:
    """What the rewritten function gives, its code, and what the rows say of shared keys."""
    torch._dynamo.reset()
    with collect_reports() as graphs:
        result = rewritten(function, "aot_eager", **settings)(*inputs)
    rows = [row for graph in graphs for row in graph.sites]
    assert [row.reason for row in rows if row.status != "rewritten"] == []
    return result, "\n".join(graph.after_code for graph in graphs), [row.grouping for row in rows]


FOLDED = "3 batches share a key and are folded into the query positions"
COPIES = ("aten.index", "aten.gather", "aten.take_along_dim", "aten.repeat", "aten.expand")

REPETITIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "list": lambda t: t[:, [0] * FRAMES],
    "last": lambda t: t[:, [-1] * FRAMES],
    "tensor": lambda t: t[:, torch.tensor([1, 1, 1])],
    "zeros": lambda t: t[:, torch.zeros(FRAMES, dtype=torch.int32)],
    "computed": lambda t: t[:, torch.arange(FRAMES) // FRAMES + 1],
    "two-dimensional": lambda t: t[:, torch.tensor([[2], [2], [2]])].squeeze(2),
    "index_select": lambda t: t.index_select(1, torch.full((FRAMES,), 2)),
    "gather": lambda t: t.gather(1, torch.ones(t.shape, dtype=torch.int64)),
    "take_along_dim": lambda t: t.take_along_dim(torch.zeros(1, FRAMES, 1, 1, dtype=torch.int64), dim=1),
    "expand": lambda t: t[:, :1].expand(-1, FRAMES, -1, -1),
    "repeat": lambda t: t[:, 1:2].repeat(1, FRAMES, 1, 1),
    "repeat_interleave": lambda t: videos(t[:, 0].repeat_interleave(FRAMES, 0)),
    "stack": lambda t: t[:, :1].tile(1, FRAMES, 1, 1),
}


@pytest.mark.parametrize("name", REPETITIONS)
def test_is_not_copied(name: str) -> None:
    def function(x: Tensor, w: Tensor) -> Tensor:
        return attend(x, w, REPETITIONS[name])

    result, code, said = code_of(function, X, W)
    assert said == [FOLDED]
    assert [copy for copy in COPIES if copy in code] == []
    assert relative_error(result, function(X, W)) <= 1e-5


OTHERS: dict[str, Callable[[Tensor], Tensor]] = {
    "the frame before": lambda t: t[:, [0, 0, 1]],
    "backwards": lambda t: t[:, [2, 1, 0]],
    "one of two twice": lambda t: t[:, [0, 1, 1]],
    "another in each video": lambda t: t[torch.tensor([[0], [1]]), torch.tensor([[0] * 3, [1] * 3])],
    "rows of a gather": lambda t: t.gather(1, (torch.arange(8) % 2).repeat(2).expand(2, FRAMES, LENGTH, 16)),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_differs_from_frame_to_frame_is_indexed_as_before(name: str) -> None:
    def function(x: Tensor, w: Tensor) -> Tensor:
        return attend(x, w, OTHERS[name])

    result, code, said = code_of(function, X, W)
    assert said == [""]
    assert code.count("aten.index") + code.count("aten.gather") == 2
    assert relative_error(result, function(X, W)) <= 1e-5


def test_an_index_of_data_says_nothing() -> None:
    def function(x: Tensor, w: Tensor, index: Tensor) -> Tensor:
        return attend(x, w, lambda t: t[:, index])

    for index in ([0, 0, 0], [0, 2, 1]):
        inputs = (X, W, torch.tensor(index))
        result, _, said = code_of(function, *inputs)
        assert said == [""]
        assert relative_error(result, function(*inputs)) <= 1e-5


@pytest.mark.parametrize(
    ("entries", "found"),
    [
        ([4, 4], (4, 1, 1, 2, 1)),
        ([-1, -1], (4, 1, 1, 2, 1)),
        ([0, 0, 1, 1], (0, 1, 2, 2, 1)),
        ([1, 3, 1, 3], (1, 2, 2, 1, 2)),
        ([-2, -2, -1, -1, 3, 3, 4, 4], (3, 1, 2, 2, 2)),
        ([0, 1, 2], None),
        ([0, 0, 1], None),
        ([0, 1, 1, 0], None),
        ([2, 0, 2, 0], None),
        ([0, 0, 5, 5], None),
        ([5, 5], None),
        ([-6, -6], None),
        ([-6, -1], None),
    ],
)
def test_counted(entries: list[int], found: Any) -> None:
    """(start, step, count, inner, outer), of five entries."""
    assert _counted(entries, 5) == found


def test_gradients_and_bfloat16() -> None:
    def function(x: Tensor, w: Tensor) -> Tensor:
        return attend(x, w, REPETITIONS["list"])

    torch._dynamo.reset()
    assert relative_error(gradients(rewritten(function, "aot_eager"), [X, W]), gradients(function, [X, W])) <= 1e-4
    half = cast((X, W), torch.bfloat16)
    truth, own = function(*cast((X, W), torch.float64)), function(*half)
    assert relative_error(code_of(function, *half)[0], truth) <= 2 * relative_error(own, truth) + 2**-8


def test_projections_of_one_frame() -> None:
    """What is projected for all frames and read of one is projected for that one."""

    def function(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        q = heads(x)
        k, v = (heads(videos(F.linear(x, w))[:, [1] * FRAMES].flatten(0, 1)) for w in (a, b))
        return F.scaled_dot_product_attention(q, k, v)

    inputs = (X, W[:16], W[16:32])
    result, code, said = code_of(function, *inputs)
    assert said == [FOLDED]
    assert "[2, 5, 16]" in code and "[6, 5, 16]" not in code
    assert relative_error(result, function(*inputs)) <= 1e-5
    torch._dynamo.reset()
    assert relative_error(gradients(rewritten(function, "aot_eager"), inputs), gradients(function, inputs)) <= 1e-4


def test_a_projection_that_is_read_elsewhere_stays_whole() -> None:
    def function(x: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
        k = F.linear(x, a)
        shared = heads(videos(k)[:, [0] * FRAMES].flatten(0, 1))
        return F.scaled_dot_product_attention(heads(x), shared, shared), k

    result, code, said = code_of(function, X, W[:16])
    assert said == [FOLDED] and code.count("aten.linear") == 1
    assert relative_error(result, function(X, W[:16])) <= 1e-5


def test_dropout_of_the_copies_stays() -> None:
    """Every copy loses other entries."""

    def function(x: Tensor, w: Tensor) -> Tensor:
        return attend(x, w, lambda t: F.dropout(t[:, [0] * FRAMES], 0.5))

    _, code, said = code_of(function, X, W)
    assert said == [""] and code.count("aten.index") == 2


def test_dropout_of_the_weights_is_folded_with_them() -> None:
    def function(x: Tensor, w: Tensor) -> Tensor:
        return attend(x, w, REPETITIONS["list"], dropout_p=0.25)

    _, code, said = code_of(function, X, W)
    assert said == [FOLDED] and "None, 0.25, False" in code


def test_a_parameter_of_each_copy_stays() -> None:
    def function(x: Tensor, w: Tensor, own: Tensor) -> Tensor:
        return attend(x, w, lambda t: t[:, [0] * FRAMES] + own)

    inputs = (X, W, torch.randn(FRAMES, 1, 1))
    result, code, said = code_of(function, *inputs)
    assert said == [""] and code.count("aten.index") == 2
    assert relative_error(result, function(*inputs)) <= 1e-5


def test_a_bias_of_each_copy_stays() -> None:
    """``linear`` takes a bias of several rows."""

    def function(x: Tensor, w: Tensor, own: Tensor) -> Tensor:
        return attend(x, w, lambda t: F.linear(t[:, [0] * FRAMES], torch.eye(16), own))

    inputs = (X, W, torch.randn(FRAMES, 1, 16))
    result, code, said = code_of(function, *inputs)
    assert said == [""] and code.count("aten.index") == 2
    assert relative_error(result, function(*inputs)) <= 1e-5


def test_what_is_read_elsewhere_is_not_computed_twice() -> None:
    def function(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = F.linear(x, w).chunk(3, dim=-1)
        k, v = (t[:1].expand(2 * FRAMES, -1, -1).tanh() for t in (k, v))
        return F.scaled_dot_product_attention(heads(q), heads(k), heads(v)), k

    result, code, said = code_of(function, X, W)
    assert said == [""] and code.count("aten.tanh") == 2
    assert relative_error(result, function(X, W)) <= 1e-5


def test_no_gradient_where_the_source_has_none() -> None:
    def function(x: Tensor, w: Tensor) -> Tensor:
        q, k, v = (heads(t) for t in F.linear(x, w).chunk(3, dim=-1))
        with torch.no_grad():
            k = videos(k)[:, [0] * FRAMES].flatten(0, 1)
        v = videos(v)[:, [0] * FRAMES].flatten(0, 1)
        return F.scaled_dot_product_attention(q, k, v)

    torch._dynamo.reset()
    assert relative_error(gradients(rewritten(function, "aot_eager"), [X, W]), gradients(function, [X, W])) <= 1e-4


def test_autocast() -> None:
    def function(x: Tensor, text: Tensor, a: Tensor, b: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            text = text.repeat_interleave(FRAMES, dim=0)
            k, v = heads(F.linear(text, a)), heads(F.linear(text, b))
            return F.scaled_dot_product_attention(heads(x).bfloat16(), k, v)

    inputs = (X, X[:2], W[:16], W[16:32])
    result, _, said = code_of(function, *inputs)
    assert said == [FOLDED]
    assert result.dtype is torch.bfloat16
    assert relative_error(result, function(*inputs)) <= 2**-7


class Frames(nn.Module):
    """The index is a buffer."""

    index: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("index", torch.zeros(FRAMES, dtype=torch.int64))

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        return attend(x, w, lambda t: t[:, self.index])


def test_a_buffer_that_is_written_to() -> None:
    torch._dynamo.reset()
    module = Frames()
    with collect_reports() as graphs:
        compiled = rewritten(module, "aot_eager")
        for entry in ([0, 0, 0], [0, 2, 1]):
            module.index.copy_(torch.tensor(entry))
            assert relative_error(compiled(X, W), module(X, W)) <= 1e-5
    assert graphs[0].sites[0].grouping == FOLDED


@pytest.mark.parametrize("frame", [0, -1, 5])
def test_symbolic_sizes(frame: int) -> None:
    """An entry that some size would not have is read by the source's index, which says so."""

    def function(q: Tensor, k: Tensor) -> Tensor:
        k = k[[frame] * 4]
        return F.scaled_dot_product_attention(q, k, k)

    torch._dynamo.reset()
    with collect_reports() as graphs:
        compiled = rewritten(function, "aot_eager", dynamic=True)
        for count in (7, 9):
            q, k = torch.randn(4, HEADS, LENGTH, 8), torch.randn(count, HEADS, LENGTH, 8)
            assert relative_error(compiled(q, k), function(q, k)) <= 1e-5
    (graph,) = graphs
    assert ("aten.index" in graph.after_code) == (frame == 5)
