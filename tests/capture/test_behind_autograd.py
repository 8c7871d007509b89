"""What changes numbers, or stops gradients, behind autograd's back keeps its meaning, or the graph is left alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_mode
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from attnrewrite.backend import collect_reports
from tests.support.helpers import relative_error, rewritten, rows

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT * 0.3).softmax(-1) @ v


def _operands() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 2, 6, 8, generator=generator).requires_grad_() for _ in range(3)]


def data_that_is_read(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return _attend(q, k.data, v)


def data_of_the_result(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return _attend(q, k, v).data + q


def straight_through(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return _attend(q, k + (k.round() - k).data, v)


def clamped_without_gradients(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scaled = q * 2
    with torch.no_grad():
        scaled.clamp_(-1, 1)
    return _attend(scaled, k, v)


def updated_through_data(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    result = _attend(q, k, v)
    result.data.mul_(2)
    return result


def saved_weights_updated_through_data(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax and the product have saved the weights, and their version is not counted."""
    weights = (q @ k.mT).softmax(-1)
    weights.data.mul_(2)
    return weights @ v


def updated_through_a_view(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scaled = k * 2
    scaled.detach()[:, :, 0] = 0
    return _attend(q, scaled, v)


def inference_mode(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with torch.inference_mode():
        weights = (q @ k.mT).softmax(-1)
    return weights.clone() @ v


def buffers_and_results_that_are_updated(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    bias, keys, scaled = torch.zeros(6), torch.zeros_like(k), q * 2
    with torch.no_grad():
        bias.add_(1)
    scaled.mul_(3)
    keys.copy_(k)
    return (scaled @ keys.mT + bias).softmax(-1) @ v


def written_through_data(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    keys = torch.zeros_like(k)
    keys.data[:, :, 1:] = k[:, :, 1:]
    return _attend(q, keys, v)


def copied_into_what_is_detached(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The detached tensor has the gradient of what is written to it."""
    keys = (k * 2).clone().detach()
    keys[:, :, 1:] = k[:, :, 1:]
    return _attend(q, keys, v)


def no_grad_in_a_mapped_function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    def one(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with torch.no_grad():
            k = k * 0.5
        return _attend(q, k, v)

    result: Tensor = torch.vmap(one)(q, k, v)
    return result


def einsum_that_is_differentiated(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    gradient: Tensor = torch.func.grad(lambda x: torch.einsum("bhld,bhmd->bhlm", x, k).sum())(q)
    return gradient @ k.mT @ v


READ: tuple[Attend, ...] = (
    data_that_is_read,
    data_of_the_result,
    straight_through,
    buffers_and_results_that_are_updated,
)
LEFT: tuple[Attend, ...] = (
    clamped_without_gradients,
    updated_through_data,
    saved_weights_updated_through_data,
    updated_through_a_view,
    inference_mode,
    written_through_data,
    copied_into_what_is_detached,
)
OTHERS: tuple[Attend, ...] = (no_grad_in_a_mapped_function, einsum_that_is_differentiated)
"""For other reasons."""


def _without_gradients(update: Callable[[Tensor], object]) -> Attend:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scaled = q * 2
        with torch.no_grad():
            update(scaled)
        return _attend(scaled, k, v)

    return attend


@torch.library.custom_op("attnrewrite_tests::halve", mutates_args={"x"})
def halve(x: Tensor) -> None:
    x.mul_(0.5)


def floor_divided(x: Tensor) -> None:
    x //= 1


def remainder(x: Tensor) -> None:
    x %= 1


def checkpointed(x: Tensor) -> object:
    return checkpoint(lambda part: part.mul_(2), x, use_reentrant=False)


UPDATES: dict[str, Callable[[Tensor], object]] = {
    "relu": lambda x: F.relu(x, inplace=True),
    "relu by position": lambda x: F.relu(x, True),
    "leaky relu": lambda x: F.leaky_relu(x, 0.1, inplace=True),
    "hardtanh": lambda x: F.hardtanh(x, inplace=True),
    "dropout": lambda x: F.dropout(x, 1.0, True, inplace=True),
    "a view": lambda x: F.relu(x[:, 0], inplace=True),
    "a view of one dimension": lambda x: F.relu(x.view(-1), inplace=True),
    "out": lambda x: torch.clamp(x, -1, 1, out=x),
    "a list": lambda x: torch._foreach_mul_([x], 0.5),
    "floor division": floor_divided,
    "remainder": remainder,
    "by keyword": lambda x: torch.clamp_(input=x, min=-1, max=1),
    "a custom operator": halve,
    "a checkpoint": checkpointed,
    "detached": lambda x: F.relu(x.detach(), inplace=True),
    "data": lambda x: F.relu(x.data, inplace=True),
}


@pytest.mark.parametrize("update", UPDATES.values(), ids=list(UPDATES))
def test_updates_of_every_spelling(update: Callable[[Tensor], object]) -> None:
    test_gradients(_without_gradients(update), "aot_eager")
    test_what_is_left_alone_says_why(_without_gradients(update))


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
@pytest.mark.parametrize("function", [*READ, *LEFT, *OTHERS], ids=lambda function: function.__name__)
def test_gradients(function: Attend, inner: str) -> None:
    found = []
    for call in (function, rewritten(function, inner)):
        operands = _operands()
        found.append(torch.autograd.grad(call(*operands).sum(), operands, allow_unused=True))
    for new, own in zip(*found, strict=True):
        assert (new is None) == (own is None)
        assert own is None or relative_error(new, own) <= 1e-4


@pytest.mark.parametrize("function", READ, ids=lambda function: function.__name__)
def test_what_is_read_is_rewritten(function: Attend) -> None:
    assert [row.status for row in rows(function, *_operands())] == ["rewritten"]


@pytest.mark.parametrize("function", LEFT, ids=lambda function: function.__name__)
def test_what_is_left_alone_says_why(function: Attend) -> None:
    with collect_reports() as graphs:
        rewritten(function)(*_operands())
    (graph,) = graphs
    assert any(
        words in graph.reason for words in ("inference_mode", "loses the gradient", "numbers that have a gradient")
    )


class _Rounded(torch.autograd.Function):
    """A straight-through estimator."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return (x * 4).round() / 4

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


def rounded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with torch.enable_grad():
        return _attend(_Rounded.apply(q), k, v)  # type: ignore[no-untyped-call]


def clamped_outside(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with torch.enable_grad():
        result = _attend(q, k, v)
    return result.clamp_(-1, 1)


def normalized(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mean, variance = torch.zeros(2), torch.ones(2)
    with torch.enable_grad():
        return _attend(F.batch_norm(q, mean, variance, training=True), k, v)


def inference_mode_switched_off(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with torch.inference_mode(False):
        return _attend(q, k, v)


@pytest.mark.parametrize("function", [rounded, clamped_outside, normalized, inference_mode_switched_off])
def test_gradients_of_a_region_within_no_grad(function: Attend) -> None:
    """As in a sampler that is guided by a gradient."""
    found = []
    for call in (function, rewritten(function)):
        operands = _operands()
        with torch.no_grad():
            result = call(*operands)
        found.append(torch.autograd.grad(result.square().sum(), operands))
    assert relative_error(*found) <= 1e-4


class _Memory(torch.nn.Module):
    """Keys and values that the module collects, of which the source makes a copy since it goes on to update them."""

    bank: Tensor

    def __init__(self, within: bool) -> None:
        super().__init__()
        self.within = within
        self.query = torch.nn.Linear(8, 8)
        self.register_buffer("bank", torch.randn(2, 2, 6, 8, generator=torch.Generator().manual_seed(0)))

    def forward(self, x: Tensor) -> Tensor:
        bank = self.bank.clone().detach()
        result = _attend(self.query(x), bank, bank)
        if self.within:
            self.collect(x)
        return result

    @torch.no_grad()
    def collect(self, x: Tensor) -> None:
        self.bank[:, :, :4] = x[:, :, :4]


@pytest.mark.parametrize("within", [False, True])
@pytest.mark.parametrize("inner", ["eager", "aot_eager", "inductor"])
def test_a_copy_that_the_source_asks_for(inner: str, within: bool) -> None:
    """Inductor removes it before ``scaled_dot_product_attention``, which saves the bank then (torch 2.13)."""
    found = []
    for compiled in (False, True):
        torch._dynamo.reset()
        torch.manual_seed(0)
        memory: Any = _Memory(within)
        x = _operands()[0].detach()
        with collect_reports() as graphs:
            result = (rewritten(memory, inner) if compiled else memory)(x)
        assert not compiled or [site.status for graph in graphs for site in graph.sites] == ["rewritten"]
        if not within:
            memory.collect(x)
        result.square().sum().backward()
        found.append([memory.query.weight.grad, memory.bank])
    assert relative_error(*found) <= 1e-4


def test_an_update_without_gradients_is_read_in_inference() -> None:
    with torch.no_grad():
        assert [row.status for row in rows(clamped_without_gradients, *_operands())] == ["rewritten"]


def test_forward_mode_around_the_function() -> None:
    tangents = []
    for call in (_attend, rewritten(_attend, "aot_eager")):
        q, k, v = (value.detach() for value in _operands())
        with forward_mode.dual_level():
            result = call(forward_mode.make_dual(q, torch.ones_like(q)), k, v)  # type: ignore[no-untyped-call]
            tangents.append(forward_mode.unpack_dual(result).tangent)  # type: ignore[no-untyped-call]
    assert relative_error(*tangents) <= 1e-5


@pytest.mark.parametrize("inner_dtype", [None, torch.float16], ids=["disabled", "float16"])
def test_autocast_in_a_mapped_function(inner_dtype: torch.dtype | None) -> None:
    def one(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with torch.autocast("cpu", inner_dtype, enabled=inner_dtype is not None):
            return _attend(q, k, v)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            result: Tensor = torch.vmap(one)(q, k, v)
        return result

    operands = [value.detach() for value in _operands()]
    actual, expected = rewritten(attend)(*operands), attend(*operands)
    assert actual.dtype is expected.dtype and relative_error(actual, expected) <= 1e-3


def bernoulli_over_weights(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    kept = (q @ k.mT).softmax(-1).clone().bernoulli_(0.5)
    return _attend(q, k, v) + kept @ v


def bernoulli_of_a_tensor(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return _attend(q, k, v) * (q * 2).bernoulli_(torch.full_like(q, 0.5))


def normal_over_the_result(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    result = _attend(q, k, v)
    return result + 0.1 * result.clone().normal_()


@pytest.mark.parametrize("attend", [bernoulli_over_weights, bernoulli_of_a_tensor, normal_over_the_result])
@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_noise_in_the_place_of_what_has_a_gradient(attend: Attend, inner: str) -> None:
    """Functional operators of such noise have no derivative."""
    found = []
    with collect_reports() as graphs:
        for function in (attend, rewritten(attend, inner)):
            torch.manual_seed(1)
            inputs = _operands()
            result = function(*inputs)
            found.append([result, *torch.autograd.grad(result.sum(), inputs)])
    assert "rewritten" in [row.status for graph in graphs for row in graph.sites]
    assert relative_error(found[1], found[0]) <= 1e-5


@pytest.mark.parametrize("inplace", [False, True])
def test_leaks_drawn_in_place(inplace: bool) -> None:
    """Their functional operator computes the gradient from memory that nobody wrote."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.rrelu(_attend(q, k, v), training=True, inplace=inplace)

    found = []
    with collect_reports() as graphs:
        for function in (attend, rewritten(attend)):
            torch.manual_seed(1)
            inputs = _operands()
            found.append(torch.autograd.grad(function(*inputs).sum(), inputs))
    assert [graph.captured for graph in graphs] == [not inplace]
    assert not inplace or "call F.rrelu" in graphs[0].reason
    assert relative_error(found[1], found[0]) <= 1e-5


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
def test_statistics_of_instances_are_written(affine: bool, training: bool) -> None:
    """Their operator writes them, and its schema does not say so."""

    class Normalized(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = torch.nn.InstanceNorm2d(2, affine=affine, track_running_stats=True)

        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return _attend(self.norm(q), k, v)

    found = []
    with collect_reports() as graphs:
        for compiled in (False, True):
            model = Normalized()
            function = rewritten(model) if compiled else model
            inputs = _operands()
            with torch.set_grad_enabled(training):
                results = [function(*inputs), function(inputs[0] + 1, *inputs[1:])]
            if training:
                results += torch.autograd.grad((results[0] * results[1]).sum(), inputs)
            model.eval()
            found.append([*results, function(*inputs), *model.buffers()])
    assert {row.status for graph in graphs for row in graph.sites} == {"rewritten"}
    assert relative_error(found[1], found[0]) <= 1e-5
