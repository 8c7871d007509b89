"""The decorator changes how a module runs and nothing else about it."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from attnrewrite import AttnRewriteError, accelerate_attention
from tests.helpers import relative_error

COMPILED: list[bool] = []
"""For each graph that was compiled: whether it holds a fused call."""


def recorder(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
    target = torch.ops.aten.scaled_dot_product_attention.default
    COMPILED.append(bool(gm.graph.find_nodes(op="call_function", target=target)))
    return gm.forward


@pytest.fixture(autouse=True)
def _no_graphs_yet() -> Iterator[None]:
    COMPILED.clear()
    yield


class Plain(nn.Module):
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.project = nn.Linear(width, 3 * width)
        self.register_buffer("scale", torch.tensor(width**-0.5))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.project(x).chunk(3, -1)
        result: Tensor = (q @ k.mT * self.scale).softmax(-1) @ v
        return result


@accelerate_attention(options={"inner_backend": recorder})
class Decorated(Plain):
    """A docstring."""


class Subclass(Decorated):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


@accelerate_attention
class Bare(Plain):
    pass


@accelerate_attention(options={"inner_backend": recorder})
def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """What it does."""
    return (q @ k.mT / 4).softmax(-1) @ v


def reference(model: nn.Module, x: Tensor, cls: type[nn.Module] = Plain) -> Tensor:
    plain = cls()
    plain.load_state_dict(model.state_dict())
    result: Tensor = plain.forward(x)
    return result


X = torch.randn(2, 8, 16, generator=torch.Generator().manual_seed(0))


def test_class() -> None:
    model = Decorated()
    assert relative_error(model(X), reference(model, X)) <= 1e-5
    assert COMPILED == [True]
    assert (Decorated.__name__, Decorated.__doc__, Decorated.__module__) == ("Decorated", "A docstring.", __name__)
    assert isinstance(model, Decorated) and isinstance(model, Plain) and issubclass(Decorated, nn.Module)


def test_class_without_arguments_goes_through_inductor() -> None:
    model = Bare()
    assert relative_error(model(X), reference(model, X)) <= 1e-5
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1


def test_base_class_stays_as_it_was() -> None:
    model = Plain()
    assert relative_error(model(X), model.forward(X)) == 0
    assert COMPILED == []


def test_two_instances_have_their_own_weights() -> None:
    one, two = Decorated(), Decorated()
    assert relative_error(one(X), reference(one, X)) <= 1e-5
    assert relative_error(two(X), reference(two, X)) <= 1e-5
    assert relative_error(one(X), two(X)) > 1e-2


def test_subclass() -> None:
    model = Subclass()
    assert relative_error(model(X), reference(model, X) + 1) <= 1e-5
    assert COMPILED == [True]


@pytest.mark.parametrize("ran", [False, True], ids=["fresh", "after a call"])
@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"]
)
def test_copies(duplicate: Callable[[nn.Module], nn.Module], ran: bool) -> None:
    model = Decorated()
    if ran:
        model(X)
        COMPILED.clear()
        torch._dynamo.reset()
    other = duplicate(model)
    assert type(other) is Decorated
    with torch.no_grad():
        other.project.bias.add_(1.0)
    expected = reference(other, X)
    assert relative_error(other(X), expected) <= 1e-5
    assert COMPILED == [True], "the copy is compiled as well"
    assert relative_error(model(X), expected) > 1e-2, "and shares nothing with the original"


def test_state_dict_is_that_of_the_plain_module() -> None:
    model = Decorated()
    before = list(model.state_dict())
    model(X)
    assert list(model.state_dict()) == before == list(Plain().state_dict())
    model.load_state_dict({name: torch.zeros_like(value) for name, value in model.state_dict().items()})
    assert relative_error(model(X), torch.zeros(2, 8, 16)) == 0


def test_module_inside_a_model_and_hooks() -> None:
    model = nn.Sequential(nn.Linear(16, 16), Decorated())
    seen: list[torch.Size] = []
    model[1].register_forward_hook(lambda module, args, output: seen.append(output.shape))
    expected = reference(model[1], model[0](X))
    assert relative_error(model(X), expected) <= 1e-5
    assert COMPILED == [True] and seen == [X.shape]


def test_training() -> None:
    model, plain = Decorated(), Plain()
    plain.load_state_dict(model.state_dict())
    for module in (model, plain):
        module(X).square().sum().backward()
    for (name, actual), (_, expected) in zip(model.named_parameters(), plain.named_parameters(), strict=True):
        assert relative_error(actual.grad, expected.grad) <= 1e-4, name


def test_instance() -> None:
    model, sibling = Plain(), Plain()
    result = accelerate_attention(options={"inner_backend": recorder})(model)
    assert result is model and type(model) is Plain
    assert relative_error(model(X), model.forward(X)) <= 1e-5
    assert COMPILED == [True]
    sibling(X)
    assert COMPILED == [True], "another instance stays as it was"
    assert relative_error(copy.deepcopy(model)(X), model.forward(X)) == 0
    assert pickle.loads(pickle.dumps(model)).state_dict().keys() == model.state_dict().keys()


def test_instance_without_arguments() -> None:
    model = accelerate_attention(Plain())
    assert relative_error(model(X), model.forward(X)) <= 1e-5


def test_function() -> None:
    q, k, v = torch.randn(3, 2, 4, 8, 16)
    assert relative_error(attention(q, k, v), (q @ k.mT / 4).softmax(-1) @ v) <= 1e-5
    assert COMPILED == [True]
    assert (attention.__name__, attention.__doc__) == ("attention", "What it does.")


def test_function_without_arguments() -> None:
    function: Any = accelerate_attention(lambda q: (q @ q.mT / 4).softmax(-1) @ q)
    assert relative_error(function(X), (X @ X.mT / 4).softmax(-1) @ X) <= 1e-5


@pytest.mark.parametrize("target", [3, "model", dict, [Plain]], ids=repr)
def test_anything_else_is_an_error_of_one_line(target: Any) -> None:
    for decorate in (accelerate_attention, accelerate_attention(fullgraph=True)):
        with pytest.raises(TypeError, match=r"takes an nn\.Module class, an nn\.Module or a function") as error:
            decorate(target)
        assert isinstance(error.value, AttnRewriteError)
        assert "\n" not in str(error.value)
