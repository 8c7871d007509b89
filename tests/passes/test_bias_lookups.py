"""Learned biases that are looked up in a table: their gradient is PyTorch's own, whatever compiles the graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from attnrewrite.ir.site import Bias
from attnrewrite.passes.bias_lookups import LOOKUP, sort_gradients_of_lookups
from tests.support.captured import Reading
from tests.support.helpers import gradients, recording, relative_error, rewritten

LENGTH = 9


def positions(device: str = "cpu") -> Tensor:
    """Rows of the table, as T5's: by how far the key is away."""
    place = torch.arange(LENGTH, device=device)
    return (place[None] - place[:, None]).clamp(-3, 3) + 3


def looked_up(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
    bias = F.embedding(positions(q.device.type), table).permute(2, 0, 1)[None].to(q.dtype)
    return (q @ k.mT * 0.3 + bias).softmax(-1) @ v


def without_padding(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
    """Row 0 gets no gradient."""
    bias = F.embedding(positions(), table, padding_idx=0).permute(2, 0, 1)
    return (q @ k.mT * 0.3 + bias).softmax(-1) @ v


def of_the_tokens(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
    """What is looked up is the value."""
    value = F.embedding(positions()[0], table)
    return (q @ k.mT * 0.3 + table.sum()).softmax(-1) @ (v[..., :3] + value)


def inputs(dtype: torch.dtype = torch.float64, device: str = "cpu") -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 3, LENGTH, 8), (2, 3, LENGTH, 8), (2, 3, LENGTH, 8), (7, 3))
    return [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]


def changed(function: Callable[..., Tensor]) -> tuple[fx.GraphModule, list[Any]]:
    """The graph after the pass, and the targets of its lookups."""
    reading = Reading(function)
    trained = [part.requires_grad_() for part in inputs()]
    reading(*trained)
    (site,) = reading.sites
    gm = next(iter(reading.values)).graph.owning_module
    assert gm is not None
    replaced: dict[fx.Node, fx.Node] = {}
    sort_gradients_of_lookups(gm, [mod.operand.node for mod in site.mods if isinstance(mod, Bias)], replaced)
    gm.graph.lint()
    gm.recompile()
    lookups = [node.target for node in gm.graph.nodes if "embedding" in str(node.target) or node.target is LOOKUP]
    assert len(replaced) == lookups.count(LOOKUP)
    return gm, lookups


def test_the_lookup_behind_a_bias_is_replaced_and_computes_the_same() -> None:
    gm, lookups = changed(looked_up)
    assert lookups == [LOOKUP]

    # Dynamo's inputs come in the order of their first use.
    names = [node.target for node in gm.graph.find_nodes(op="placeholder")]
    order = [["l_q_", "l_k_", "l_v_", "l_table_"].index(name.lower()) for name in names]

    def run(*parts: Tensor) -> Any:
        return gm(*(parts[place] for place in order))[0]

    for new, own in zip(gradients(run, inputs()), gradients(looked_up, inputs()), strict=True):
        assert relative_error(new, own) <= 1e-12


@pytest.mark.parametrize("function", [without_padding, of_the_tokens], ids=lambda function: function.__name__)
def test_others_are_left_alone(function: Callable[..., Tensor]) -> None:
    _, lookups = changed(function)
    assert lookups == [torch.ops.aten.embedding.default]


def test_the_operator() -> None:
    """Its schema, its fake and its gradient, by PyTorch's own checks."""
    table = torch.randn(7, 3, dtype=torch.float64, requires_grad=True)
    torch.library.opcheck(LOOKUP, (table, positions()))
    assert torch.autograd.gradcheck(lambda rows: LOOKUP(rows, positions()), (table,))


@pytest.mark.parametrize("inner", ["eager", "aot_eager", "inductor"])
def test_a_graph_for_the_cpu_keeps_its_lookup(inner: str) -> None:
    """There Inductor adds up in order, without waiting."""
    compiled, given = recording()
    leaves = [part.requires_grad_() for part in inputs()]
    torch._dynamo.reset()
    rewritten(looked_up, compiled)(*leaves)
    assert not any(node.target is LOOKUP for node in given[0].graph.nodes)
    torch._dynamo.reset()
    for new, own in zip(gradients(rewritten(looked_up, inner), leaves), gradients(looked_up, leaves), strict=True):
        assert relative_error(new, own) <= 1e-10


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_t5_on_a_gpu(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    from attnrewrite.bench.model_cases import MODELS
    from attnrewrite.passes import pipeline

    served: list[int] = []

    def counted(gm: fx.GraphModule, biases: Any, replaced: dict[fx.Node, fx.Node]) -> None:
        sort_gradients_of_lookups(gm, biases, replaced)
        served.append(len(replaced) and sum(node.target is LOOKUP for node in gm.graph.nodes))

    monkeypatch.setattr(pipeline, "sort_gradients_of_lookups", counted)
    model, _, kwargs = MODELS["small"]["t5"].build()
    model.to("cuda", dtype).train()
    kwargs = {name: value.cuda() for name, value in kwargs.items()}
    table = next(part for name, part in model.named_parameters() if "relative_attention_bias" in name)

    def gradient(call: nn.Module | Callable[..., Any]) -> Tensor:
        model.zero_grad(set_to_none=True)
        output = call(**kwargs)[0].float()
        # Not its squares: their mean is fixed behind the model's norm.
        (output * torch.linspace(-1, 1, output.numel(), device="cuda").view_as(output)).sum().backward()
        assert table.grad is not None
        return table.grad.double()

    own = gradient(model)
    new = gradient(rewritten(model, "inductor"))
    assert served == [1]
    assert relative_error(new, own) <= (1e-4 if dtype is torch.float32 else 5e-2)
