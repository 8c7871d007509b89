"""Projections of one input are one, if that is asked for, and stay where it would be seen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint

from attnrewrite import OptionError
from attnrewrite.backend import collect_reports
from attnrewrite.options.compile_options import Policy
from tests.support.helpers import cast, compile_count, gradients, recording, relative_error, rewritten
from tests.whole.test_specimens import rewritten_code

aten = torch.ops.aten

_generator = torch.Generator().manual_seed(0)


def draw(*shape: int) -> Tensor:
    return 0.3 * torch.randn(*shape, generator=_generator)


X = draw(2, 6, 16)
Y = draw(2, 9, 16)
WEIGHTS = tuple(draw(16, 16) for _ in range(3))
BIAS = draw(16)


def attended(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Four heads of the query, as many of key and value as there are."""
    q, k, v = (t.view(t.shape[0], t.shape[1], -1, 4).transpose(1, 2) for t in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1])
    return out.transpose(1, 2).reshape(out.shape[0], out.shape[2], -1)


def fused(function: Callable[..., Any], *inputs: Any, **settings: Any) -> tuple[Any, list[str], list[fx.GraphModule]]:
    """What comes out, what the report says, and the graphs that the inner compiler is given."""
    inner, given = recording()
    torch._dynamo.reset()
    with collect_reports() as graphs:
        result = rewritten(function, inner, **{"fuse_projections": True, **settings})(*inputs)
    assert [graph.reason for graph in graphs if graph.reason] == []
    return result, [row.projections for graph in graphs for row in graph.sites], given


def calls(gm: fx.GraphModule, target: Any) -> int:
    return len(gm.graph.find_nodes(op="call_function", target=target))


def agrees(function: Callable[..., Any], inputs: Sequence[Any]) -> None:
    """Values and gradients, statically and for other sizes."""
    compiled = rewritten(function, "aot_eager", fuse_projections=True)
    torch._dynamo.reset()
    assert relative_error(gradients(compiled, inputs), gradients(function, cast(inputs, torch.float64))) <= 1e-5


def self_attention(x: Tensor, wq: Tensor, wk: Tensor, wv: Tensor, bias: Tensor) -> Tensor:
    return attended(F.linear(x, wq, bias), F.linear(x, wk), F.linear(x, wv, bias))


def cross_attention(x: Tensor, y: Tensor, wq: Tensor, wk: Tensor, wv: Tensor) -> Tensor:
    return attended(F.linear(x, wq), F.linear(y, wk), F.linear(y, wv))


def grouped(x: Tensor, wq: Tensor, wk: Tensor, wv: Tensor) -> Tensor:
    """Two heads of query share one of key and value; the query is normalized."""
    q, k, v = F.linear(x, wq), F.linear(x, wk[:8]), F.linear(x, wv[:8])
    q = F.rms_norm(q.view(*q.shape[:2], -1, 4), (4,)).flatten(-2)
    return attended(q, k, v)


def rotated(x: Tensor, wq: Tensor, wk: Tensor, wv: Tensor) -> tuple[Tensor, Tensor]:
    """From scratch: weights to the right of the input, written naively; the rotated key is returned for a cache."""
    q, k, v = (torch.matmul(x, w.T).reshape(*x.shape[:2], 4, 4).transpose(1, 2) for w in (wq, wk, wv))
    angle = torch.arange(x.shape[1])[:, None] * torch.tensor([1.0, 0.1]).repeat(2)
    q, k = (t * angle.cos() + torch.cat([-t[..., 2:], t[..., :2]], -1) * angle.sin() for t in (q, k))
    return ((q @ k.mT) * 0.5).softmax(-1) @ v, k


def of_flat_rows(x: Tensor, wq: Tensor, wk: Tensor, wv: Tensor, bias: Tensor) -> Tensor:
    """addmm, each of a view of its own."""
    q, k, v = (torch.addmm(bias, x.view(-1, 16), w).view(x.shape) for w in (wq, wk, wv))
    return attended(q, k, v)


CASES: dict[Callable[..., Any], tuple[Sequence[Tensor], str, Any]] = {
    self_attention: (
        (X, *WEIGHTS, BIAS),
        "query, key and value are one projection to 48 features",
        aten.linear.default,
    ),
    cross_attention: ((X, Y, *WEIGHTS), "key and value are one projection to 32 features", aten.linear.default),
    grouped: ((X, *WEIGHTS), "query, key and value are one projection to 32 features", aten.linear.default),
    rotated: ((X, *WEIGHTS), "query, key and value are one projection to 48 features", aten.matmul.default),
    of_flat_rows: ((X, *WEIGHTS, BIAS), "query, key and value are one projection to 48 features", aten.addmm.default),
}


@pytest.mark.parametrize("function", CASES, ids=lambda function: function.__name__)
def test_one_projection(function: Callable[..., Any]) -> None:
    inputs, words, target = CASES[function]
    result, said, (gm,) = fused(function, *inputs)
    assert said == [words]
    assert calls(gm, target) == 1 + (function is cross_attention)
    expected = function(*inputs)
    assert relative_error(result, expected) <= 1e-5
    assert [t.stride() for t in torch.utils._pytree.tree_leaves(result)] == [
        t.stride() for t in torch.utils._pytree.tree_leaves(expected)
    ]
    agrees(function, inputs)


_GOLDEN = """\
placeholder: float32[2, 6, 16]
placeholder_1: float32[16, 16]
placeholder_2: float32[16, 16]
placeholder_3: float32[16]
placeholder_4: float32[16, 16]
cat: float32[48, 16] = cat.default([placeholder_1, placeholder_2, placeholder_4], 0)
constant_pad_nd: float32[48] = constant_pad_nd.default(placeholder_3, [16, 16], 0.0)
linear: float32[2, 6, 48] = linear.default(placeholder, cat, constant_pad_nd)
slice: float32[2, 6, 16] = slice.Tensor(linear, -1, 0, 16)
slice_1: float32[2, 6, 16] = slice.Tensor(linear, -1, 16, 32)
slice_2: float32[2, 6, 16] = slice.Tensor(linear, -1, 32, 48)
reshape: float32[2, 6, 4, 4] = reshape.default(slice, [2, 6, 4, 4])
permute: float32[2, 4, 6, 4] = permute.default(reshape, [0, 2, 1, 3])
reshape_1: float32[2, 6, 4, 4] = reshape.default(slice_1, [2, 6, 4, 4])
permute_1: float32[2, 4, 6, 4] = permute.default(reshape_1, [0, 2, 1, 3])
reshape_2: float32[2, 6, 4, 4] = reshape.default(slice_2, [2, 6, 4, 4])
permute_2: float32[2, 4, 6, 4] = permute.default(reshape_2, [0, 2, 1, 3])
scaled_dot_product_attention: float32[2, 4, 6, 4] = scaled_dot_product_attention.default(\
permute, permute_1, permute_2, None, 0.0, False, scale=0.5, enable_gqa=False)
transpose: float32[2, 6, 4, 4] = transpose.int(scaled_dot_product_attention, 1, 2)
reshape_3: float32[2, 6, 16] = reshape.default(transpose, [2, 6, -1])
matmul: float32[2, 6, 16] = matmul.default(reshape_3, placeholder_1)
return [matmul]
"""


def test_golden() -> None:
    def function(x: Tensor, wq: Tensor, wk: Tensor, wv: Tensor, bias: Tensor) -> Tensor:
        return attended(F.linear(x, wq), F.linear(x, wk, bias), F.linear(x, wv)) @ wq

    assert rewritten_code(function, (X, *WEIGHTS, BIAS), Policy(fuse_projections=True)) == _GOLDEN


def test_the_parts_are_views_as_the_kernel_takes_them() -> None:
    """As are those of one projection in the source (diffusers' FusedAttnProcessor2_0)."""

    def in_the_source(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return attended(*F.linear(x, weight, bias).chunk(3, dim=-1))

    for function, inputs in (
        (self_attention, (X, *WEIGHTS, BIAS)),
        (in_the_source, (X, torch.cat(WEIGHTS), torch.cat([BIAS] * 3))),
    ):
        _, _, (gm,) = fused(function, *inputs)
        (call,) = gm.graph.find_nodes(op="call_function", target=aten.scaled_dot_product_attention.default)
        for operand in call.args[:3]:
            assert operand.meta["val"].stride() == (6 * 48, 4, 48, 1)
            while operand.target is not aten.linear.default:
                assert operand.target not in (aten.clone.default, aten.contiguous.default, aten.cat.default)
                operand = operand.args[0]


def test_other_sizes() -> None:
    sizes = [tuple(draw(2, n, 16) for n in (length, length + 3)) for length in (6, 11, 8)]
    inputs = [(*each, *WEIGHTS) for each in sizes]
    allowed = compile_count(cross_attention, inputs, "aot_eager")
    torch._dynamo.reset()
    compiled = rewritten(cross_attention, "aot_eager", dynamic=True, fuse_projections=True)
    with collect_reports() as graphs:
        for each in inputs:
            assert relative_error(compiled(*each), cross_attention(*each)) <= 1e-5
    assert len(graphs) <= allowed
    assert all("one projection" in row.projections for graph in graphs for row in graph.sites)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype: torch.dtype) -> None:
    inputs = cast((X, *WEIGHTS, BIAS), dtype)
    result, said, _ = fused(self_attention, *inputs)
    assert said != [""]
    truth = self_attention(*cast(inputs, torch.float64))
    assert relative_error(result, truth) <= 2 * relative_error(self_attention(*inputs), truth) + 2**-8


def test_autocast() -> None:
    def function(*inputs: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self_attention(inputs[0].relu() @ inputs[1], *inputs[1:])

    inputs = (X, *WEIGHTS, BIAS)
    result, said, _ = fused(function, *inputs)
    assert (said, result.dtype) == (["query, key and value are one projection to 48 features"], torch.bfloat16)
    assert relative_error(result, function(*inputs)) <= 2**-6


def _value_returned(x: Tensor, wq: Tensor, wk: Tensor, wv: Tensor) -> tuple[Tensor, Tensor]:
    v = F.linear(x, wv)
    return attended(F.linear(x, wq), F.linear(x, wk), v), v.view(2, 6, 4, 4)


def _read_by_others(x: Tensor, wq: Tensor, wk: Tensor, wv: Tensor) -> tuple[Tensor, Tensor]:
    v = F.linear(x, wv)
    return attended(F.linear(x, wq), F.linear(x, wk), v), v.exp()


def _strides_asked_for(x: Tensor, wq: Tensor, wk: Tensor, wv: Tensor) -> tuple[Tensor, Tensor]:
    q = F.linear(x, wq)
    return attended(q, F.linear(x, wk), F.linear(x, wv)), torch.as_strided(q, (2, 3), (1, 2)) * 2


def _memory_copied(x: Tensor, wq: Tensor, wk: Tensor, wv: Tensor) -> tuple[Tensor, Tensor]:
    q = F.linear(x, wq)
    return attended(q, F.linear(x, wk), F.linear(x, wv)), torch.as_strided_copy(q, (2, 3), (1, 2)) * 2


def _without_a_gradient(x: Tensor, wq: Tensor, wk: Tensor, wv: Tensor) -> Tensor:
    with torch.no_grad():
        q = F.linear(x, wq)
    return attended(q, F.linear(x, wk), F.linear(x, wv))


def _in_two_dtypes(x: Tensor, wq: Tensor, wk: Tensor, wv: Tensor) -> Tensor:
    q = F.linear(x.double(), wq.double()).float()
    return attended(q, F.linear(x, wk), F.linear(x, wv))


def _of_two_inputs(x: Tensor, wq: Tensor, wk: Tensor, wv: Tensor) -> Tensor:
    return attended(F.linear(x, wq), F.linear(x * 2, wk), F.linear(x, wv))


def _weights_of_the_result(x: Tensor, wq: Tensor, wk: Tensor, wv: Tensor) -> Tensor:
    """The last weight is there only after the first projection."""
    q = F.linear(x, wq)
    return attended(q, F.linear(x, wk), F.linear(x, wv * q.mean()))


def _checkpointed(x: Tensor, wq: Tensor, wk: Tensor, wv: Tensor) -> Tensor:
    q: Any = checkpoint(lambda part: F.linear(part, wq).exp(), x, use_reentrant=False)
    return attended(q, F.linear(x, wk), F.linear(x, wv))


_OF_TWO = "are one projection to 32 features"
_BETWEEN = "key not with query: grad mode, autocast or checkpointing changes in between"
_STRIDES = "by itself: the graph returns it, or an operator that may depend on its strides reads it"


# How many projections remain of three, and what is said.
@pytest.mark.parametrize(
    ("function", "linears", "words"),
    [
        (_value_returned, 2, f"query and key {_OF_TWO}; value {_STRIDES}"),
        (_read_by_others, 1, "query, key and value are one projection to 48 features"),
        (_strides_asked_for, 2, f"key and value {_OF_TWO}; query {_STRIDES}"),
        (_memory_copied, 2, f"key and value {_OF_TWO}; query {_STRIDES}"),
        (_without_a_gradient, 2, f"key and value {_OF_TWO}"),
        (_in_two_dtypes, 2, f"key and value {_OF_TWO}"),
        (_of_two_inputs, 2, f"query and value {_OF_TWO}"),
        (
            _weights_of_the_result,
            2,
            f"query and key {_OF_TWO}; value not with query: its weight is computed only after the first projection",
        ),
        (_checkpointed, 2, f"key and value {_OF_TWO}; {_BETWEEN}"),
    ],
)
def test_what_is_left_apart(function: Callable[..., Any], linears: int, words: str) -> None:
    inputs = [value.clone().requires_grad_() for value in (X, *WEIGHTS)]
    result, said, (gm,) = fused(function, *inputs)
    assert calls(gm, aten.linear.default) == linears
    assert said == [words]
    assert relative_error(result, function(*inputs)) <= 1e-5


def test_a_weight_that_is_written_to() -> None:
    def function(x: Tensor, wq: Tensor, wk: Tensor, wv: Tensor) -> Tensor:
        wk = wk.clone()
        q, k = F.linear(x, wk), F.linear(x, wq)
        wk.mul_(2)
        return attended(q, k, F.linear(x, wk) + F.linear(x, wv))

    inputs = (X, *WEIGHTS)
    assert relative_error(fused(function, *inputs)[0], function(*inputs)) <= 1e-5


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return attended(self.q(x), self.k(x), self.v(x))


def test_only_where_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    assert fused(self_attention, X, *WEIGHTS, BIAS, fuse_projections=None)[1] == [""]
    monkeypatch.setenv("ATTNREWRITE_FUSE_PROJECTIONS", "1")
    assert fused(self_attention, X, *WEIGHTS, BIAS, fuse_projections=None)[1] != [""]
    assert Policy.from_options({"fuse_projections": False}, None).fuse_projections is False
    with pytest.raises(OptionError, match=r"options\['fuse_projections'\] takes True, False or None; got 'yes'"):
        Policy.from_options({"fuse_projections": "yes"}, None)


def test_weights_that_are_frozen() -> None:
    """Inductor puts them together once: there is no concatenation in what it makes."""
    model = Attention().eval()
    expected = model(X)
    with torch.no_grad(), torch._inductor.config.patch(freezing=True), collect_reports() as graphs:
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="attnrewrite")
        result, (code,) = torch._inductor.utils.run_and_get_code(compiled, X)
    assert [row.projections for graph in graphs for row in graph.sites] == [
        "query, key and value are one projection to 48 features"
    ]
    assert "cat" not in code
    assert relative_error(result, expected) <= 1e-5


def test_verified() -> None:
    with collect_reports() as graphs:
        rewritten(self_attention, fuse_projections=True, verify=True, checks=True)(X, *WEIGHTS, BIAS)
    assert [note for note in graphs[0].notes if note.startswith("verified: 1 site agrees")]
