"""The decorator changes how a module runs and nothing else about it."""

from __future__ import annotations

import copy
import gc
import logging
import pickle
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint

import attnrewrite
from attnrewrite import AttnRewriteError, KernelError, OptionError, accelerate_attention, attention_backend, explain
from attnrewrite.backend import collect_reports
from tests.support.helpers import relative_error

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


# Within a model that is compiled as a whole.


def attend(x: Tensor) -> Tensor:
    return (x @ x.mT / 4).softmax(-1) @ x


@accelerate_attention(kernels="_native_math")
def by_math(x: Tensor) -> Tensor:
    return attend(x)


@accelerate_attention(kernels="flex")
def by_flex_but_for_a_part(x: Tensor) -> Tensor:
    return by_math(x) + attend(x)


class Attend(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return attend(x)


@accelerate_attention(kernels="_native_math")
class AttendByMath(Attend):
    pass


class SubclassOfIt(AttendByMath):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + attend(x)


class WithMethod(nn.Module):
    @accelerate_attention(kernels="_native_math")
    def attend(self, x: Tensor) -> Tensor:
        return attend(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.attend(x) + attend(x)


class WithCallOfItsOwn(Attend):
    """As transformers' layers that may be checkpointed."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return super().__call__(*args, **kwargs)


class BreaksByMath(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        x = attend(x)
        torch._dynamo.graph_break()
        return attend(x)


def modules_by_math(cls: type[nn.Module]) -> list[nn.Module]:
    """A decorated instance, and one of a decorated class."""
    decorate = accelerate_attention(kernels="_native_math", options={"inner_backend": "aot_eager"})
    return [decorate(cls()), decorate(type("Decorated", (cls,), {}))()]


def with_hook(model: nn.Module) -> nn.Module:
    model.register_forward_hook(lambda module, args, output: output + 1)
    return model


def compiled_whole(
    function: Callable[[Tensor], Tensor], x: Tensor = X, **arguments: Any
) -> tuple[Tensor, list[str | None], list[str]]:
    """Its result, the kernels of its sites and what else the reports say."""
    torch._dynamo.reset()
    arguments = {"options": {"inner_backend": "aot_eager"}, **arguments}
    with collect_reports() as reports:
        result = torch.compile(function, backend="attnrewrite", **arguments)(x)
    kernels = [site.kernel for report in reports for site in report.sites]
    return result, kernels, [note for report in reports for note in report.notes]


MATH, NATIVE, FLEX = "_native_math", "native", "flex"
INLINED: dict[str, tuple[Callable[[], Callable[[Tensor], Tensor]], list[str]]] = {
    "function, twice": (lambda: lambda x: by_math(x) + attend(x) + by_math(2 * x), [MATH, NATIVE, MATH]),
    "function, itself": (lambda: by_math, [MATH]),
    "nested": (lambda: lambda x: by_flex_but_for_a_part(x) + attend(x), [MATH, FLEX, NATIVE]),
    "method": (WithMethod, [MATH, NATIVE]),
    "class": (lambda: nn.Sequential(Attend(), AttendByMath(), Attend()), [NATIVE, MATH, NATIVE]),
    "class, itself": (AttendByMath, [MATH]),
    "subclass": (lambda: nn.Sequential(SubclassOfIt(), Attend()), [MATH, MATH, NATIVE]),
    "instance": (lambda: nn.Sequential(Attend(), modules_by_math(Attend)[0], Attend()), [NATIVE, MATH, NATIVE]),
    "copy of an instance": (lambda: nn.Sequential(copy.deepcopy(modules_by_math(Attend)[0])), [NATIVE]),
    "hooks": (lambda: nn.Sequential(*map(with_hook, modules_by_math(Attend)), Attend()), [MATH, MATH, NATIVE]),
    "__call__ of its own": (
        lambda: nn.Sequential(*modules_by_math(WithCallOfItsOwn), WithCallOfItsOwn()),
        [MATH, MATH, NATIVE],
    ),
    "instance in a function": (
        lambda: accelerate_attention(kernels="flex")(nn.Sequential(Attend(), *modules_by_math(Attend))),
        [FLEX, MATH, MATH],
    ),
    "checkpoint": (lambda: lambda x: attend(checkpoint(by_math, x, use_reentrant=False)), [MATH, NATIVE]),
    "checkpoint within": (
        lambda: accelerate_attention(kernels="flex")(lambda x: by_math(checkpoint(attend, x, use_reentrant=False))),
        [FLEX, MATH],
    ),
    "graph break": (
        # It is compiled alone then, once for both.
        lambda: nn.Sequential(Attend(), *modules_by_math(BreaksByMath)),
        [NATIVE, MATH, MATH],
    ),
}


@pytest.mark.parametrize("name", INLINED)
def test_what_is_decorated_keeps_its_kernels_within_a_model(name: str) -> None:
    make, expected = INLINED[name]
    model = make()
    trains = FLEX not in expected  # On the CPU it has no backward pass.
    x = X.clone().requires_grad_(trains)
    result, kernels, notes = compiled_whole(model, x, fullgraph=name != "graph break")
    assert kernels == expected
    assert [note for note in notes if "accelerate_attention" in note] == []
    found = torch.autograd.grad(result.square().sum(), x)[0] if trains else None
    torch._dynamo.reset()
    with torch.compiler.set_stance("force_eager"):
        reference = model(x)
        assert relative_error(result, reference) <= 1e-5
        if found is not None:
            (wanted,) = torch.autograd.grad(reference.square().sum(), x)
            assert relative_error(found, wanted) <= 1e-4


def test_within_a_model_of_dynamic_shapes() -> None:
    torch._dynamo.reset()
    with collect_reports() as reports:
        options: dict[str, Any] = {"inner_backend": "aot_eager"}
        function = torch.compile(
            lambda x: by_math(x) + attend(x), backend="attnrewrite", dynamic=True, fullgraph=True, options=options
        )
        for length in (8, 13):
            x = torch.randn(2, length, 16)
            assert relative_error(function(x), 2 * attend(x)) <= 1e-5
    assert [site.kernel for report in reports for site in report.sites] == [MATH, NATIVE]


def test_the_context_and_rules_of_the_model_are_weaker_than_the_decorator() -> None:
    options = {"inner_backend": "aot_eager", "kernel_rules": {"*": "native"}}
    with torch.no_grad(), attention_backend("flex"):
        assert compiled_whole(lambda x: by_math(x) + attend(x), options=options)[1] == [MATH, NATIVE]
        assert compiled_whole(lambda x: by_math(x) + attend(x))[1] == [MATH, FLEX]


def test_switching_a_compiled_model_leaves_the_decorated_part() -> None:
    options: dict[str, Any] = {"inner_backend": "aot_eager"}
    function = torch.compile(lambda x: by_math(x) + attend(x), backend="attnrewrite", options=options)
    with collect_reports() as reports, torch.no_grad():
        function(X)
        with attention_backend("flex"):
            assert relative_error(function(X), 2 * attend(X)) <= 1e-5
    assert [[site.kernel for site in report.sites] for report in reports] == [[MATH, NATIVE], [MATH, FLEX]]


def test_options_of_single_sites_hold_within_a_model() -> None:
    @accelerate_attention(kernels="flex", options={"strict": True})
    def strict(x: Tensor) -> Tensor:
        return attend(x)

    @accelerate_attention(options={"assume_attended_rows": True, "kernels": "_native_math"})
    def assured(x: Tensor) -> Tensor:
        return (x @ x.mT / 4 + x.new_zeros(8, 8)).softmax(-1) @ x

    # No kernel is asked for in the model itself, so nothing is an error there.
    assert compiled_whole(lambda x: assured(x) + attend(x))[1] == [MATH, NATIVE]
    with attention_backend("flex"), torch.no_grad():
        assert compiled_whole(lambda x: assured(x) + attend(x))[1] == [FLEX, FLEX]
    with pytest.raises(KernelError, match="flex was requested by"):
        compiled_whole(lambda x: strict(x.double()))


def test_options_of_the_whole_graph_are_said_once(caplog: pytest.LogCaptureFixture) -> None:
    options = {"inner_backend": "aot_eager", "verify": True, "max_autotune": True, "strict": True}

    @accelerate_attention(dynamic=True, options=options)
    def attends(x: Tensor) -> Tensor:
        return attend(x)

    with caplog.at_level(logging.WARNING, "attnrewrite"):
        for _ in range(2):
            notes = compiled_whole(attends)[2]
            said = "dynamic, options['verify'], options['max_autotune'] have no effect here"
            assert [note for note in notes if said in note and "attends" in note], notes
    assert len([record for record in caplog.records if "no effect here" in record.message]) == 1
    # What the model is compiled with holds.
    notes = compiled_whole(attends, options={"inner_backend": "aot_eager", "verify": True})[2]
    assert not any("verify" in note for note in notes if "no effect here" in note)


def test_what_is_decorated_is_explained_with_its_kernels() -> None:
    model = modules_by_math(Attend)[1]
    report = explain(model, X)
    assert [site.kernel for site in report.sites] == [MATH] and report.graphs[0].notes == []
    report = explain(model, X, options={"inner_backend": "eager"})
    assert "options['inner_backend'] has no effect here" in report.graphs[0].notes[0]


def test_slices_that_are_asked_for_by_different_kernels_are_not_merged() -> None:
    def sliced(first: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def function(x: Tensor) -> Tensor:
            result = torch.zeros_like(x)
            result[:1] = first(x[:1])
            result[1:] = by_math(x[1:])
            return result

        return function

    with torch.no_grad():
        assert compiled_whole(sliced(by_math))[1] == [MATH]
        assert compiled_whole(sliced(attend))[1] == [NATIVE, MATH]


def test_another_backend_compiles_the_decorated_part_as_it_is() -> None:
    with collect_reports() as reports:
        result = torch.compile(lambda x: by_math(x) + attend(x), backend="aot_eager")(X)
    assert relative_error(result, 2 * attend(X)) <= 1e-5 and reports == []


def test_kernels_beside_a_mode() -> None:
    with pytest.raises(OptionError, match="or mode"):
        accelerate_attention(kernels="native", mode="max-autotune")


def test_options_are_freed_with_the_class_that_is_decorated() -> None:
    def inner(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        return gm.forward

    decorated = accelerate_attention(options={"inner_backend": inner})(type("Own", (Plain,), {}))
    freed = weakref.ref(inner)
    del inner
    gc.collect()
    assert freed() is not None
    del decorated
    gc.collect()
    assert freed() is None


def test_a_part_is_forgotten_with_the_function_that_is_decorated() -> None:
    """torch.compile keeps the options for ever; the part is attnrewrite's own."""
    decorated: Any = accelerate_attention(kernels=MATH)(lambda x: attend(x))
    freed = weakref.ref(decorated._decorated_part)
    gc.collect()
    assert freed() is not None
    del decorated
    gc.collect()
    assert freed() is None


@pytest.mark.parametrize("kind", ["function", "class"])
def test_threads_that_call_while_another_compiles(kind: str) -> None:
    """What is decorated is compiled in every call: that another thread compiles is no reason to run it as it is."""
    uncompiled: list[str] = []

    def body(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if not torch.compiler.is_dynamo_compiling():
            uncompiled.append("called")
        return (q @ k.mT).softmax(-1) @ v

    class Attention(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return body(q, k, v)

    options = {"inner_backend": "eager"}
    decorated: Any = accelerate_attention(options=options)(body if kind == "function" else Attention)
    call = decorated if kind == "function" else decorated()
    call(*(torch.randn(1, 2, 8, 8) for _ in range(3)))  # The backend is looked up by one thread.

    def work(first: int) -> None:
        for n in range(4):
            call(*(torch.randn(1, 2, 3 + (first + n) % 3, 8) for _ in range(3)))

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(work, range(3)))
    assert not uncompiled
    assert not torch.fx.traceback.current_meta


def test_a_class_is_decorated_after_an_instance_was_compiled() -> None:
    own: Any = type("Own", (Plain,), {})
    before = own()
    before.compile(backend="aot_eager")
    expected = before(X)
    accelerate_attention(options={"inner_backend": recorder})(own)
    assert relative_error(before(X), expected) == 0
    assert COMPILED == []
    assert own()(X).shape == expected.shape
    assert COMPILED == [True]


@pytest.mark.parametrize("again", [False, True], ids=["forgotten", "another part"])
def test_an_exported_part_that_is_not_of_this_process(again: bool, caplog: pytest.LogCaptureFixture) -> None:
    """Its options are not known, and those of no other part are taken for them."""

    class Model(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = decorated(x)
            return result

    decorated: Any = accelerate_attention(options={"assume_attended_rows": True})(lambda x: attend(x))
    program = torch.export.export(Model(), (X,), strict=True)
    del decorated
    gc.collect()
    if again:
        decorated = accelerate_attention(options={"assume_attended_rows": True})(lambda x: attend(x))
    result = attnrewrite.rewrite(program).module()(X)
    assert relative_error(result, attend(X)) <= 1e-5
    assert "its options are not known here" in caplog.text
