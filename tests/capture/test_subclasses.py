"""Tensors made of others among the inputs of a graph: what touches them stays as it is, the rest is read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.checkpoint import checkpoint

from attnrewrite import PyramidAttentionBroadcastConfig, accelerate_attention, attention_cache
from attnrewrite.backend import collect_reports
from attnrewrite.report.rows import GraphReport
from tests.support.helpers import counted, relative_error, rewritten
from tests.support.small_models import bert, llama

X = torch.randn(2, 10, 16, generator=torch.Generator().manual_seed(0))
WEIGHT = torch.randn(16, 16, generator=torch.Generator().manual_seed(1)) / 4


def twice(value: Tensor) -> Any:
    """A tensor that is computed with twice."""
    return TwoTensor(value.clone(), value.clone())  # type: ignore[no-untyped-call]


def attend(x: Tensor, key: Tensor | None = None) -> Tensor:
    key = x if key is None else key
    return (x @ key.mT / 4).softmax(-1) @ key


def both(function: Callable[..., Any], *inputs: Any, inner: str = "aot_eager", **settings: Any) -> list[GraphReport]:
    """The reports of a function whose results are those of eager."""
    torch._dynamo.reset()
    compiled = rewritten(function, inner, **settings)
    with collect_reports() as graphs:
        found, expected = compiled(*inputs), function(*inputs)
    for new, own in zip(*(each if isinstance(each, tuple) else (each,) for each in (found, expected)), strict=True):
        assert type(new) is type(own)
        if isinstance(own, TwoTensor):
            assert relative_error([new.a, new.b], [own.a, own.b]) <= 1e-5
        else:
            assert relative_error(new, own) <= 1e-5
    return graphs


def statuses(graphs: list[GraphReport]) -> list[str]:
    assert [graph.reason for graph in graphs if not graph.captured] == []
    return [site.status for graph in graphs for site in graph.sites]


def plain(value: Any) -> Tensor:
    result: Tensor = value.a
    return result


def of_a_weight(x: Tensor, weight: Any) -> Tensor:
    return attend(plain(F.linear(x, weight)))


def result_of_one(x: Tensor, weight: Any) -> tuple[Tensor, Any]:
    return attend(x), F.linear(x, weight)


def one_given_and_returned(x: Tensor, weight: Any) -> tuple[Tensor, Any]:
    return attend(x), weight


def between_two(x: Tensor, weight: Any) -> Any:
    attended = attend(plain(F.linear(x, weight)))
    return F.linear(attended + x, weight) * 2


def of_two_results(x: Tensor, weight: Any) -> Tensor:
    query, key = F.linear(x, weight).chunk(2, -1)
    return attend(plain(query), plain(key))


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("function", [of_a_weight, result_of_one, one_given_and_returned, between_two, of_two_results])
def test_what_lies_between_is_rewritten(function: Callable[..., Any], dynamic: bool, inner: str) -> None:
    with torch.no_grad():
        graphs = both(function, X, twice(WEIGHT), inner=inner, dynamic=dynamic or None)
    assert statuses(graphs) == ["rewritten"]
    if function is one_given_and_returned:  # It is no input of the graph.
        return
    (note,) = graphs[0].notes
    assert note.startswith("what is computed from tensors that are made of others is left as it is: L['weight'] (torch")


def test_gradients_pass_through() -> None:
    weight = twice(WEIGHT).requires_grad_()

    def gradients(function: Callable[..., Any]) -> list[Tensor]:
        x = X.clone().requires_grad_()
        found = torch.autograd.grad(function(x, weight).sum(), [x, weight])
        return [plain(each) if isinstance(each, TwoTensor) else each for each in found]

    torch._dynamo.reset()
    assert relative_error(gradients(rewritten(between_two, "aot_eager")), gradients(between_two)) <= 1e-4


def test_within_a_checkpoint() -> None:
    def function(x: Tensor, weight: Any) -> Any:
        return checkpoint(of_a_weight, x, weight, use_reentrant=False)

    with torch.no_grad():
        assert statuses(both(function, X, twice(WEIGHT))) == ["rewritten"]


def updates_what_it_gives(x: Tensor, weight: Any) -> Tensor:
    inner = plain(weight.t())
    inner.mul_(2)
    return attend(x) + inner.sum() + plain(F.linear(x, weight))


def updates_it(x: Tensor, weight: Any) -> Tensor:
    weight.mul_(2)
    return attend(plain(F.linear(x, weight)))


def leaves_no_grad(x: Tensor, weight: Any) -> Tensor:
    with torch.no_grad():
        projected = F.linear(x, weight)
    return attend(plain(projected)) + x


def leaves_autocast(x: Tensor, weight: Any) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        projected = F.linear(x, weight)
    return attend(plain(projected))


def is_returned_from_autocast(x: Tensor, weight: Any) -> tuple[Tensor, Any]:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        projected = F.linear(x, weight)
    return attend(x), projected


def leaves_autocast_in_a_checkpoint(x: Tensor, weight: Any) -> Any:
    return checkpoint(leaves_autocast, x, weight, use_reentrant=False)


def is_read_after_an_update(x: Tensor, weight: Any) -> Tensor:
    projected = F.linear(x, weight)
    x.add_(1)
    return attend(plain(projected))


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (updates_what_it_gives, "in place"),
        (updates_it, "in place"),
        (is_read_after_an_update, "in place"),
        (leaves_no_grad, "switches autocast or gradients"),
        (leaves_autocast, "switches autocast or gradients"),
        (is_returned_from_autocast, "switches autocast or gradients"),
        (leaves_autocast_in_a_checkpoint, "switches autocast or gradients"),
    ],
)
def test_what_has_an_order_is_left_alone(function: Callable[..., Any], words: str) -> None:
    torch._dynamo.reset()
    given = [(X.clone(), twice(WEIGHT)) for _ in range(2)]
    with collect_reports() as graphs:
        found, expected = rewritten(function, "aot_eager")(*given[0]), function(*given[1])
    found, expected = (each[0] if isinstance(each, tuple) else each for each in (found, expected))
    assert relative_error(found, expected) <= 1e-2
    assert torch.equal(given[0][0], given[1][0])
    assert [(graph.captured, words in graph.reason) for graph in graphs] == [(False, True)]


def within_no_grad(x: Tensor, weight: Any) -> Tensor:
    with torch.no_grad():
        projected = plain(F.linear(x, weight))
    return attend(projected) + x


def within_autocast(x: Tensor, weight: Any) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        projected = plain(F.linear(x, weight)).float()
    return attend(projected)


def beside_autocast(x: Tensor, weight: Any) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        gate = (x @ x.mT).float().sum(-1, keepdim=True)
    return attend(plain(F.linear(x, weight)) + gate)


@pytest.mark.parametrize("function", [within_no_grad, within_autocast, beside_autocast])
def test_what_lies_on_one_side_of_a_switch(function: Callable[..., Any]) -> None:
    x = X.clone().requires_grad_()
    assert statuses(both(function, x, twice(WEIGHT))) == ["rewritten"]


def test_a_view_of_its_parts_is_one() -> None:
    def function(x: Tensor, weight: Any) -> tuple[Tensor, Tensor]:
        return attend(x), plain(weight)

    weight = twice(WEIGHT)
    with torch.no_grad():
        _, view = rewritten(function, "aot_eager")(X, weight)
        view.zero_()
    assert not weight.a.any()


# DTensors, on one process.


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[DeviceMesh]:
    dist.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def plain_of(value: Any) -> Tensor:
    result: Tensor = value.to_local()
    return result


class Distributed(nn.Module):
    """Each query is projected by a DTensor; row 3 has no key, and keeps the mean of the values."""

    def __init__(self, mesh: DeviceMesh) -> None:
        super().__init__()
        self.mesh = mesh
        self.weight = nn.Parameter(distribute_tensor(WEIGHT.clone(), mesh, [Replicate()]))

    def projected(self, x: Tensor) -> Tensor:
        distributed: Any = DTensor.from_local(x, self.mesh, [Replicate()])
        return plain_of(F.linear(distributed, self.weight))

    def forward(self, x: Tensor) -> Tensor:
        x = self.projected(x)
        bias = torch.zeros(10, 10)
        bias[3] = torch.finfo(torch.float32).min
        return self.projected((x @ x.mT / 4 + bias).softmax(-1) @ x)


@pytest.mark.parametrize("dynamic", [False, True])
def test_gradients_through_dtensors_alone(mesh: DeviceMesh, dynamic: bool) -> None:
    model = Distributed(mesh)

    def results(function: Callable[..., Any]) -> list[Tensor]:
        model.zero_grad()
        output = function(X)
        output.square().sum().backward()
        assert isinstance(model.weight.grad, DTensor)
        return [output, model.weight.grad.full_tensor()]

    compiled = rewritten(model, "aot_eager", dynamic=dynamic or None)
    with collect_reports() as graphs:
        found = results(compiled)
    assert statuses(graphs) == ["rewritten"]
    assert relative_error(found, results(model)) <= 1e-5


def test_a_dtensor_that_is_trained(mesh: DeviceMesh) -> None:
    weights = []
    for is_compiled in (True, False):
        model = Distributed(mesh)
        function = rewritten(model, "aot_eager") if is_compiled else model
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        for _ in range(3):
            optimizer.zero_grad()
            torch.autograd.backward([function(X).square().mean()])
            optimizer.step()
        assert isinstance(model.weight, DTensor)
        weights.append(model.weight.full_tensor())
    assert relative_error(weights[0], weights[1]) <= 1e-5
    assert relative_error(weights[0], WEIGHT) > 1e-3


def test_verified_and_accelerated(mesh: DeviceMesh) -> None:
    model = Distributed(mesh)
    with collect_reports() as graphs:
        rewritten(model, "aot_eager", verify=True)(X)
    assert [note for graph in graphs for note in graph.notes if note.startswith("verified: 1 site agrees")]
    accelerated = accelerate_attention(options={"inner_backend": "aot_eager"})(Distributed(mesh))
    assert relative_error(accelerated(X), model(X)) <= 1e-5


def test_attention_is_reused(mesh: DeviceMesh) -> None:
    model = Distributed(mesh).eval()
    compiled = rewritten(model, "aot_eager")
    steps = iter([800, 780])
    config = PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(0, 1000),
        current_timestep_callback=lambda: next(steps),
    )
    with torch.no_grad(), attention_cache(compiled, config):
        first, second = compiled(X), compiled(X + 1)
        assert relative_error(first, model(X)) <= 1e-5
        # The attention's output is that of the call before.
        assert relative_error(second, first) <= 1e-5


# Quantized weights.


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(64, 192), nn.Linear(64, 64)
        self.up, self.down, self.relu = nn.Linear(64, 128), nn.Linear(128, 64), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.view(2, 16, 4, 16).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        attended: Tensor = (q @ k.mT / 4).softmax(-1) @ v
        x = self.out(attended.transpose(1, 2).flatten(2)) + x
        x += self.down(self.relu(self.up(x)))
        return x


def quantized(model: nn.Module, config: str) -> nn.Module:
    quantization = pytest.importorskip("torchao.quantization", reason="needs torchao")
    quantization.quantize_(model, getattr(quantization, config)())
    return model


CONFIGS = ["Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig"]


def allowed(model: Callable[..., Tensor], expected: Tensor, nearly: Tensor) -> float:
    """How far a result may be from eager's: as far as eager's own is for an input that is another by a rounding.

    Activations are rounded to 256 steps, and the largest of a row lies between two of them, so that it is rounded up or
    down by what its last bit is (``choose_qparams_affine`` of torchao: the scale is the maximum over 127.5).
    """
    return max(1e-5, 4 * relative_error(model(nearly), expected))


@pytest.mark.parametrize("inner", ["eager", "aot_eager", "inductor"])
@pytest.mark.parametrize("config", CONFIGS)
def test_quantized_weights(config: str, inner: str) -> None:
    model = quantized(nn.Sequential(Block(), Block()).eval(), config)
    x = torch.randn(2, 16, 64)
    with torch.no_grad(), collect_reports() as graphs:
        found, expected = rewritten(model, inner)(x), model(x)
        assert relative_error(found, expected) <= allowed(model, expected, x * (1 + 1e-6))
    assert statuses(graphs) == ["rewritten", "rewritten"]


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("build", [llama, bert])
def test_quantized_models(build: Callable[[str], nn.Module], config: str) -> None:
    model = quantized(build("eager"), config)
    fused = quantized(build("sdpa"), config)
    fused.load_state_dict(model.state_dict(), assign=True)
    tokens, padding = torch.randint(64, (2, 16)), torch.ones(2, 16, dtype=torch.long)
    padding[0, :5] = 0

    def run(model: Any) -> Tensor:
        hidden: Tensor = model(inputs_embeds=embedded, attention_mask=padding).last_hidden_state
        return hidden[padding.bool()]

    with torch.no_grad():
        embedded = model.get_input_embeddings()(tokens)  # type: ignore[operator]
        plain_graphs, _ = counted(lambda: run(torch.compile(model, backend="eager")))
        with collect_reports() as graphs:
            own_graphs, found = counted(lambda: run(rewritten(model, "aot_eager")))
        error, error_of_fused = relative_error(found, run(model)), relative_error(found, run(fused))
    assert statuses(graphs) == ["rewritten", "rewritten"]
    assert own_graphs == plain_graphs
    # With activations that are rounded, what the same kernel gives is all that can be compared so closely.
    assert min(error, error_of_fused) <= 1e-5
    if config == CONFIGS[0]:
        assert error <= 1e-5
