"""What a graph does besides computing survives the way into the IR and out again."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from attnrewrite.backend import attnrewrite, collect_reports
from attnrewrite.capture.trace import capture
from attnrewrite.ir.nodes import regions
from attnrewrite.report.rows import GraphReport
from tests.support.helpers import gradients, relative_error, rewritten, rewritten_and_rows, rows

SDPA = torch.ops.aten.scaled_dot_product_attention.default


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT / 4).softmax(-1) @ v


def heads(length: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(2, 4, length, 16), torch.randn(2, 4, length, 16), torch.randn(2, 4, length, 16)


class Recorder:
    """An inner compiler that keeps the graphs and runs them as they are."""

    def __init__(self) -> None:
        self.graphs: list[fx.GraphModule] = []

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        self.graphs.append(gm)
        return gm.forward

    def nodes(self, target: Any) -> list[fx.Node]:
        return [node for gm in self.graphs for node in gm.graph.find_nodes(op="call_function", target=target)]


def run(
    function: Callable[..., Any], *inputs: Any, inner: Any = "aot_eager", sites: int = 1
) -> tuple[Any, list[GraphReport]]:
    """The result of the rewritten function, once it is sure that every graph was captured and ``sites`` rewritten."""
    with collect_reports() as graphs:
        result = rewritten(function, inner)(*inputs)
    assert [graph.reason for graph in graphs if not graph.captured] == []
    assert sum(len(graph.rewritten) for graph in graphs) == sites, [
        site.reason for graph in graphs for site in graph.kept
    ]
    return result, graphs


def shares_memory(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


# Updates.


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_batch_norm_in_training(inner: str) -> None:
    """Its statistics are updated, and its gradient is not disturbed by that."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(16)

        def forward(self, x: Tensor) -> Tensor:
            x = self.norm(x.flatten(0, 1)).view(x.shape)
            return attention(x, x, x)

    model = Model()
    plain = copy.deepcopy(model)
    compiled = rewritten(model, inner)
    for _ in range(2):
        x = torch.randn(2, 8, 16) + 3
        result, expected = compiled(x), plain(x)
        assert relative_error(result, expected) <= 1e-5
        for output in (result, expected):
            output.square().sum().backward()
    for (name, actual), expected in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert relative_error(actual.grad, expected.grad) <= 1e-4, name
    assert int(model.norm.num_batches_tracked) == 2  # type: ignore[arg-type]
    for (name, buffer), wanted in zip(model.named_buffers(), plain.named_buffers(), strict=True):
        assert relative_error(buffer, wanted[1]) <= 1e-6, name


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_key_value_cache(inner: str) -> None:
    """The cache is a buffer and an argument; both are written in place, and what is returned is the cache itself."""

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("keys", torch.zeros(2, 4, 8, 16))

        def forward(self, q: Tensor, k: Tensor, v: Tensor, values: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
            self.keys.index_copy_(2, at, k)  # type: ignore[operator]
            values.index_copy_(2, at, v)
            position = torch.arange(8)
            scores = (q @ self.keys.mT / 4).masked_fill(position > at[:, None], float("-inf"))  # type: ignore[operator]
            return scores.softmax(-1) @ values, values

    model = Layer()
    plain = copy.deepcopy(model)
    values = torch.zeros(2, 4, 8, 16)
    expected_values = values.clone()
    compiled = rewritten(model, inner)
    for step in range(3):
        q, k, v = heads(1)
        at = torch.tensor([step])
        result, returned = compiled(q, k, v, values, at)
        expected, _ = plain(q, k, v, expected_values, at)
        assert relative_error(result, expected) <= 1e-5
        assert shares_memory(returned, values)
        assert torch.equal(values, expected_values) and torch.equal(model.keys, plain.keys)  # type: ignore[arg-type]
    assert values[:, :, 2].abs().min() > 0 and values[:, :, 3:].abs().max() == 0


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_outputs_that_are_views(inner: str) -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        k.mul_(2)
        return attention(q, k, v), q.transpose(1, 2), k[:, 0], v

    q, k, v = heads()
    doubled = k * 2
    (result, view_of_q, view_of_k, same_v), _ = run(function, q, k, v, inner=inner)
    assert torch.equal(k, doubled)
    assert relative_error(result, attention(q, k, v)) <= 1e-5
    assert shares_memory(view_of_q, q) and view_of_q.stride() == q.transpose(1, 2).stride()
    assert shares_memory(view_of_k, k) and torch.equal(view_of_k, k[:, 0])
    assert shares_memory(same_v, v)


def test_view_of_an_updated_input_of_an_output() -> None:
    """What is written through a returned view shows in the input."""

    def function(x: Tensor) -> tuple[Tensor, Tensor]:
        x.add_(1)
        return attention(x, x, x), x.view(-1)

    x = torch.zeros(2, 8, 16)
    (_, view), _ = run(function, x)
    view[0] = 7.0
    assert x[0, 0, 0] == 7.0


def test_outputs_that_are_no_tensors() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> dict[str, Any]:
        return {"result": attention(q, k, v), "nothing": None, "length": q.shape[-2], "same": (q, q)}

    q, k, v = heads()
    result, _ = run(function, q, k, v)
    assert relative_error(result["result"], attention(q, k, v)) <= 1e-5
    assert result["nothing"] is None and result["length"] == 8 and result["same"][0] is result["same"][1]


def test_one_tensor_for_all_inputs() -> None:
    x = torch.randn(2, 8, 16)
    result, _ = run(attention, x, x, x)
    assert relative_error(result, attention(x, x, x)) <= 1e-5


# Modes.


def test_autocast_region() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return attention(q, k, v)

    inputs = heads()
    result, _ = run(function, *inputs)
    expected = function(*inputs)
    assert result.dtype is expected.dtype is torch.bfloat16
    assert relative_error(result, attention(*inputs)) <= 2 * relative_error(expected, attention(*inputs)) + 2**-8


def test_ambient_autocast() -> None:
    layer = nn.Linear(16, 48)

    def function(x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = layer(x).chunk(3, -1)
        result: Tensor = (q @ k.mT / 4).masked_fill(mask, float("-inf")).softmax(-1) @ v
        return result

    x, mask = torch.randn(2, 8, 16), torch.ones(8, 8).triu(1) == 1
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result, _ = run(function, x, mask)
        expected = function(x, mask)
    assert result.dtype is expected.dtype is torch.bfloat16
    exact = function(x, mask)
    assert relative_error(result, exact) <= 2 * relative_error(expected, exact) + 2**-8


def test_autocast_switched_off_inside() -> None:
    """An island of float32 in an autocast region stays one: the result is as exact as float32."""

    def function(x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            x = F.relu(x)
            with torch.autocast("cpu", enabled=False):
                return attention(x, x, x)

    x = torch.randn(2, 8, 16)
    result, _ = run(function, x)
    assert result.dtype is torch.float32
    assert relative_error(result, function(x)) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_in_an_island_of_float32(dtype: torch.dtype) -> None:
    """The scores keep their float32, and the product with the value is as exact as in eager."""

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            with torch.autocast("cpu", enabled=False):
                scores = q.float() @ k.float().mT
            return scores.softmax(-1) @ v

    q, k, v = (3 * torch.randn(2, 8, 16, dtype=dtype) for _ in range(3))
    result, _ = run(function, q, k, v)
    expected = function(q, k, v)
    assert result.dtype is expected.dtype is torch.bfloat16
    exact = (q.double() @ k.double().mT).softmax(-1) @ v.double()
    assert relative_error(result, exact) <= relative_error(expected, exact) + 2**-8


def test_scores_under_autocast_alone() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            scores = q @ k.mT / 4
        return scores.float().softmax(-1) @ v

    inputs = tuple(torch.randn(2, 8, 16) for _ in range(3))
    result, _ = run(function, *inputs)
    expected = function(*inputs)
    assert result.dtype is expected.dtype is torch.float32
    exact = (inputs[0] @ inputs[1].mT / 4).softmax(-1) @ inputs[2]
    assert relative_error(result, exact) <= relative_error(expected, exact) + 1e-6


def test_autocast_of_another_device() -> None:
    """A switch of autocast for a device that no tensor is on changes nothing, nor does one to what is so already."""

    def function(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        with torch.autocast("cuda", enabled=False):
            first = x + 1
        with torch.autocast("cpu", enabled=False):
            second = first * 2
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return first, second, second @ second

    captured: list[fx.GraphModule] = []

    def backend(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        captured.append(capture(gm, inputs).gm)
        return gm.forward

    torch.compile(function, backend=backend)(torch.randn(2, 2))
    of = {node.name: autocast for node, (_, autocast) in regions(captured[0].graph).items()}
    assert of["add"] == of["mul"] == ()
    assert of["matmul"] == (("cpu", torch.bfloat16),)


def test_no_grad_around_attention() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with torch.no_grad():
            weights = attention(q, k, v)
        return weights * q + attention(q, k, v)

    inputs = heads()
    actual = gradients(rewritten(function, "aot_eager"), inputs)
    assert relative_error(actual, gradients(function, inputs)) <= 1e-4
    run(function, *inputs, sites=2)


def test_no_grad_between_scores_and_product() -> None:
    """The weights are constants of the backward pass, so no fused call may compute them together with the product."""

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with torch.no_grad():
            weights = (q @ k.mT / 4).softmax(-1)
        return weights @ v + q + k

    inputs = heads()
    actual = gradients(rewritten(function, "aot_eager"), inputs)
    assert relative_error(actual, gradients(function, inputs)) <= 1e-4
    _, (graph,) = run(function, *inputs, sites=0)
    assert ["grad mode" in site.reason for site in graph.kept] == [True]


def test_detached_value() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k.detach(), v) + k

    inputs = heads()
    actual = gradients(rewritten(function, "aot_eager"), inputs)
    assert relative_error(actual, gradients(function, inputs)) <= 1e-4
    assert torch.equal(actual[1], gradients(lambda q, k, v: q * 0 + k + v * 0, inputs)[1])


def test_inference_mode() -> None:
    inputs = heads()
    with torch.inference_mode():
        result, _ = run(attention, *inputs)
    assert relative_error(result, attention(*inputs)) <= 1e-5
    assert result.is_inference()


# Random numbers.


def test_random_operators_draw_what_they_drew() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.dropout(attention(q, k, v), 0.5) + torch.rand_like(q) + torch.randn(16)

    inputs = heads()
    torch.manual_seed(5)
    expected = function(*inputs)
    torch.manual_seed(5)
    result, _ = run(function, *inputs, inner="eager")
    assert relative_error(result, expected) <= 1e-5


# Higher-order operators.


def test_checkpoint() -> None:
    projection = torch.randn(16, 16)

    def block(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q @ projection, k, v).sin()

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return checkpoint(block, q, k, v, use_reentrant=False) * 2  # type: ignore[no-any-return]

    inputs = heads()
    actual = gradients(rewritten(function, "aot_eager"), inputs)
    assert relative_error(actual, gradients(function, inputs)) <= 1e-4

    torch._dynamo.reset()
    recorder = Recorder()
    gradients(rewritten(function, recorder), inputs)
    (sdpa,) = recorder.nodes(SDPA)
    (sin,) = recorder.nodes(torch.ops.aten.sin.default)
    assert sdpa.meta["recompute"] is sin.meta["recompute"] is CheckpointPolicy.PREFER_RECOMPUTE
    assert sdpa.meta["ac_graph_id"] == sin.meta["ac_graph_id"]
    assert "recompute" not in recorder.nodes(torch.ops.aten.mul.Tensor)[0].meta


def test_checkpoint_saves_memory_as_before() -> None:
    """The forward pass keeps the inputs for the backward pass, and nothing that is computed in the region."""

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return checkpoint(lambda q, k, v: attention(q, k, v).sin(), q, k, v, use_reentrant=False)  # type: ignore[no-any-return]

    q, k, v = (t.requires_grad_() for t in heads())
    kept: list[Tensor] = []

    def keep(t: Tensor) -> Tensor:
        kept.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        rewritten(function, "aot_eager")(q, k, v)
    # Besides numbers there is the state of the random number generator, since a fused call may draw from it.
    kept = [t for t in kept if t.is_floating_point()]
    assert kept and {t.data_ptr() for t in kept} <= {t.data_ptr() for t in (q, k, v)}


def test_selective_checkpoint() -> None:
    contexts = functools.partial(create_selective_checkpoint_contexts, [torch.ops.aten.mm.default])

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        x = attention(q, k, v)
        return checkpoint(torch.sin, x, use_reentrant=False, context_fn=contexts) + x  # type: ignore[no-any-return]

    inputs = heads()
    actual = gradients(rewritten(function, "aot_eager"), inputs)
    assert relative_error(actual, gradients(function, inputs)) <= 1e-4
    run(function, *inputs)


class TwiceTheGradient(torch.autograd.Function):
    """A backward that is not the derivative of its forward, so that a lost one shows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 2 * gradient


def test_autograd_function_keeps_its_backward() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return TwiceTheGradient.apply(attention(q, k, v)) + 0.0  # type: ignore[no-untyped-call]

    inputs = heads()
    actual = gradients(rewritten(function, "aot_eager"), inputs)
    honest = gradients(attention, inputs)
    assert relative_error(actual, [2 * gradient for gradient in honest]) <= 1e-4
    run(function, *inputs)


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_cond(inner: str) -> None:
    def function(q: Tensor, k: Tensor, v: Tensor, flag: Tensor) -> Tensor:
        x = attention(q, k, v)
        return torch.cond(flag, lambda x, k: x.sin() + k, lambda x, k: x - k, (x, k))  # type: ignore[no-any-return]

    inputs = heads()
    compiled = rewritten(function, inner)
    with collect_reports() as reports:
        for flag in (True, False):
            expected = function(*inputs, torch.tensor(flag))
            assert relative_error(compiled(*inputs, torch.tensor(flag)), expected) <= 1e-5
    assert [len(report.rewritten) for report in reports if report.captured] == [1]


def test_attention_inside_a_branch_is_left_whole() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.transpose(-1, -2) / 4).softmax(1) @ v

    def function(q: Tensor, k: Tensor, v: Tensor, flag: Tensor) -> Tensor:
        return torch.cond(flag, attend, lambda q, k, v: q + k + v, (q, k, v))  # type: ignore[no-any-return]

    inputs = heads()
    compiled = rewritten(function, "inductor")
    for flag in (True, False):
        expected = function(*inputs, torch.tensor(flag))
        assert relative_error(compiled(*inputs, torch.tensor(flag)), expected) <= 1e-5


# Graphs that are passed on.


def test_graph_that_cannot_be_captured() -> None:
    def function(x: Tensor) -> Tensor:
        y = torch.zeros(2, 8, 16)
        y.set_(x)  # type: ignore[call-overload]
        return attention(y, y, y)

    recorder = Recorder()
    given: list[fx.GraphModule] = []

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        given.append(gm)
        return attnrewrite(gm, example_inputs, options={"inner_backend": recorder})

    x = torch.randn(2, 8, 16)
    with collect_reports() as reports:
        result = torch.compile(function, backend=backend)(x)
    assert relative_error(result, function(x)) == 0
    (report,) = reports
    assert not report.captured and "set_" in report.reason and "\n" not in report.reason
    assert report.sites == []
    assert recorder.graphs == given


def test_graph_without_attention_is_passed_on_as_it_is() -> None:
    recorder = Recorder()
    given: list[tuple[fx.GraphModule, str]] = []

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        given.append((gm, gm.code))
        return attnrewrite(gm, example_inputs, options={"inner_backend": recorder})

    model = nn.Sequential(nn.Linear(16, 16), nn.GELU(), nn.BatchNorm1d(16))
    plain = copy.deepcopy(model)
    x = torch.randn(8, 16)
    with collect_reports() as reports:
        result = torch.compile(model, backend=backend)(x)
    assert relative_error(result, plain(x)) == 0
    assert [(report.captured, report.sites) for report in reports] == [(True, [])]
    ((gm, code),) = given
    assert recorder.graphs == [gm] and gm.code == code
    for actual, expected in zip(model.buffers(), plain.buffers(), strict=True):
        assert torch.equal(actual, expected)


def test_graph_break_makes_two_graphs() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        x = attention(q, k, v)
        torch._dynamo.graph_break()
        return attention(x, k, v)

    inputs = heads()
    result, graphs = run(function, *inputs, sites=2)
    assert [len(graph.rewritten) for graph in graphs] == [1, 1]
    assert relative_error(result, function(*inputs)) <= 1e-5


# Source locations.


def test_source_locations() -> None:
    _, (graph,) = run(attention, *heads())
    (site,) = graph.sites
    lines, first = inspect.getsourcelines(attention)
    location = site.location
    assert location is not None
    assert (location.file, location.line, location.function) == (__file__, first + 1, "attention")
    assert location.code == lines[1].strip()


class Block(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return attention(x, x, x) + x


def test_module_path_of_a_site() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.Sequential(Block(), Block()))
    _, (graph,) = run(model, torch.randn(2, 8, 16), sites=2)
    assert [site.location.module for site in graph.sites if site.location] == ["1.0", "1.1"]


class Lenient(nn.Module):
    """diffusers' models look up attributes in their own way, and Dynamo names their modules by ``__dict__``."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block()])

    def __getattr__(self, name: str) -> Any:
        return super().__getattr__(name)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.blocks[0](x)
        return result


def test_module_path_within_a_module_that_looks_up_attributes() -> None:
    _, (graph,) = run(Lenient(), torch.randn(2, 8, 16), sites=1)
    assert [site.location.module for site in graph.sites if site.location] == ["blocks.0"]


def test_source_location_inside_a_checkpoint() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return checkpoint(attention, q, k, v, use_reentrant=False)  # type: ignore[no-any-return]

    _, (graph,) = run(function, *heads())
    (site,) = graph.sites
    assert site.location is not None
    assert site.location.line == inspect.getsourcelines(attention)[1] + 1


def _updated(q: Tensor, k: Tensor) -> Tensor:
    scores = torch.einsum("nlhd,nshd->nlsh", q, k)
    scores.masked_fill_(scores > 1, -1.0)
    return scores


def _updated_through_a_view(q: Tensor, k: Tensor) -> Tensor:
    scores = torch.einsum("nlhd,nshd->nlsh", [q, k])
    scores.transpose(1, 2)[:, 0].mul_(2)
    scores[..., 1] = 3
    return scores


def _a_view_of_its_operand(q: Tensor, k: Tensor) -> Tensor:
    """The update is one of the caller's tensor."""
    torch.einsum("nlhd->hdnl", q).mul_(2)
    return q + 1


@pytest.mark.parametrize("function", [_updated, _updated_through_a_view, _a_view_of_its_operand])
def test_an_einsum_that_is_updated_in_place(function: Callable[..., Tensor]) -> None:
    """Without attention, too: plain AOTAutograd refuses some of these."""
    given = [torch.randn(2, 12, 4, 8), torch.randn(2, 9, 4, 8)]
    own = [tensor.clone() for tensor in given]
    expected = function(*own)
    updated = [tensor.clone() for tensor in given]
    assert relative_error(rewritten(function)(*updated), expected) <= 1e-6
    assert all(map(torch.equal, own, updated))
    if function is not _a_view_of_its_operand:
        torch._dynamo.reset()
        assert relative_error(gradients(rewritten(function), given), gradients(function, given)) <= 1e-6


def test_a_slice_assignment_in_training() -> None:
    """DeepSeek's rotary embedding: functionalized, it is a copy, which has no derivative of its own."""

    def attention(x: torch.Tensor, rotated: torch.Tensor) -> torch.Tensor:
        query = x.new_zeros(2, 3, 6, 8)
        query[..., :4] = x[..., :4]
        query[..., 4:] = rotated.double()
        return (query @ query.mT * 0.3).softmax(-1) @ x

    inputs = torch.randn(2, 3, 6, 8), torch.randn(1, 1, 6, 4)
    assert [row.status for row in rows(attention, *inputs)] == ["rewritten"]
    actual = gradients(rewritten(attention, "aot_eager"), inputs)
    assert relative_error(actual, gradients(attention, inputs)) <= 1e-4


def test_a_tensor_subclass_is_named() -> None:
    nested = torch.nested.nested_tensor([torch.randn(n, 16) for n in (3, 6, 4)], layout=torch.jagged)

    def attended(x: Tensor) -> Tensor:
        q = x.view(3, -1, 2, 8).transpose(1, 2)
        return F.scaled_dot_product_attention(q, q, q).transpose(1, 2)

    with collect_reports() as graphs:
        result = rewritten(attended, "aot_eager")(nested)
    assert relative_error(result.values(), attended(nested).values()) <= 1e-5
    assert all(graph.captured for graph in graphs)
    notes = [note for graph in graphs for note in graph.notes]
    assert any("left as it is: L['x'] (torch.nested." in note for note in notes)


# torch.vmap and torch.func within a graph that an operator is given.


def _made_by_vmap(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    at = torch.arange(q.shape[-2])
    keep = torch.vmap(torch.vmap(lambda i, j: i >= j, (None, 0)), (0, None))(at, at)
    return (q @ k.mT).masked_fill(~keep, float("-inf")).softmax(-1) @ v


def _in_checkpoint(q: Tensor, k: Tensor, v: Tensor) -> Any:
    return checkpoint(_made_by_vmap, q, k, v, use_reentrant=False)


def _per_sample(q: Tensor, k: Tensor, v: Tensor) -> Any:
    return checkpoint(
        lambda q, k, v: torch.vmap(lambda q, k, v: (q @ k.mT).softmax(-1) @ v)(q, k, v), q, k, v, use_reentrant=False
    )


@pytest.mark.parametrize("function", [_in_checkpoint, _per_sample])
def test_vmap_within_a_part(function: Callable[..., Any]) -> None:
    inputs = [torch.randn(2, 4, 6, 8) for _ in range(3)]
    _, result, found = rewritten_and_rows(function, *inputs)
    assert relative_error(result, function(*inputs)) <= 1e-5
    assert {row.status for row in found} == {"rewritten"}


def test_a_gradient_within_a_part_is_refused_before_it_is_traced() -> None:
    """Tracing would leave functorch's levels as they are, which breaks whatever follows in the process."""

    def step(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        energy = torch.func.grad(lambda q: ((q @ k.mT).softmax(-1) @ v).square().sum())
        return checkpoint(lambda q: q - 0.1 * energy(q), q, use_reentrant=False)  # type: ignore[no-any-return]

    inputs = [torch.randn(2, 4, 6, 8) for _ in range(3)]
    with torch.no_grad(), collect_reports() as graphs:
        assert relative_error(rewritten(step)(*inputs), step(*inputs)) <= 1e-5
    assert [graph.captured for graph in graphs] == [False]
    assert "torch.func transform" in graphs[0].reason
