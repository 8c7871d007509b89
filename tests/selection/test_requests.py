"""Which kernels are offered: the levels of authority, the context manager on compiled models, and what it costs."""

from __future__ import annotations

import asyncio
import contextvars
import logging
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import attnrewrite
from attnrewrite.backend import collect_reports
from attnrewrite.kernels import Availability, Kernel, Verdict
from attnrewrite.report.rows import GraphReport
from tests.support.helpers import relative_error, rewritten, rows

VARIABLES = ("ATTNREWRITE_KERNELS", "DIFFUSERS_ATTN_BACKEND", "DIFFSYNTH_ATTENTION_IMPLEMENTATION")


@pytest.fixture(autouse=True)
def nothing_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.project(x) @ x.mT * 0.25
        return x + scores.softmax(-1) @ x


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Block(), Block()

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.second(self.first(x))
        return result


def inputs(length: int = 8) -> Tensor:
    return torch.randn(2, 3, length, 16, generator=torch.Generator().manual_seed(length))


@pytest.fixture
def reports() -> Iterator[list[GraphReport]]:
    with collect_reports() as collected, torch.no_grad():
        yield collected


def kernels(reports: list[GraphReport]) -> list[str | None]:
    return [site.kernel for report in reports for site in report.sites]


def compiled(model: Any = None, inner: Any = "eager", dynamic: bool | None = None, **options: Any) -> Any:
    options = {"inner_backend": inner, **options}
    return torch.compile(model or Model(), backend="attnrewrite", dynamic=dynamic, options=options)


# The levels.


def test_levels_of_authority(reports: list[GraphReport], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each level that is added is stronger than those before it."""

    def used(**options: Any) -> str | None:
        reports.clear()
        torch._dynamo.reset()  # What is compiled already keeps its kernels when the environment changes.
        compiled(**options)(inputs())
        (kernel,) = set(kernels(reports))
        return kernel

    assert used() == "native"
    monkeypatch.setenv("DIFFSYNTH_ATTENTION_IMPLEMENTATION", "torch")
    assert used() == "native" and "DIFFSYNTH" in reports[0].sites[0].requested
    monkeypatch.setenv("DIFFUSERS_ATTN_BACKEND", "flex")
    assert used() == "flex"
    monkeypatch.setenv("ATTNREWRITE_KERNELS", "_native_math, native")
    assert used() == "_native_math"
    assert used(kernels=["flex"]) == "flex"
    with attnrewrite.attention_backend("_native_math"):
        assert used(kernels="flex") == "_native_math"
        assert used(kernels="flex", kernel_rules={"*": "native"}) == "native"


def test_rules_for_modules_and_lines(reports: list[GraphReport]) -> None:
    compiled(kernel_rules={"*second": "_native_math"})(inputs())
    assert kernels(reports) == ["native", "_native_math"]
    line = reports[0].sites[0].location
    assert line is not None
    compiled(kernel_rules={f"test_requests.py:{line.line}": "flex"})(inputs())
    assert kernels(reports)[2:] == ["flex", "flex"]


def test_the_decorator_is_stronger_than_the_context(reports: list[GraphReport]) -> None:
    @attnrewrite.accelerate_attention(kernels="_native_math", options={"inner_backend": "eager"})
    def attend(x: Tensor) -> Tensor:
        return (x @ x.mT).softmax(-1) @ x

    with attnrewrite.attention_backend("flex"):
        attend(inputs())
    assert kernels(reports) == ["_native_math"]


def test_auto_is_the_automatic_choice(reports: list[GraphReport]) -> None:
    with attnrewrite.attention_backend("auto"):
        compiled(kernels="flex")(inputs())
    assert kernels(reports) == ["native", "native"]


# What cannot serve.


def in_float64(x: Tensor) -> Tensor:
    return (x.double() @ x.double().mT).softmax(-1) @ x.double()


def test_the_next_willing_kernel_serves_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "attnrewrite"), torch.no_grad():
        (row,) = rows(in_float64, inputs(), kernels="flex")
        rows(in_float64, inputs(), kernels="flex")
    assert row.kernel == "native"
    assert [(v.kernel, v.willing) for v in row.verdicts] == [("flex", False), ("native", True)]
    (message,) = [record.message for record in caplog.records if "was requested by" in record.message]
    assert "options['kernels']" in message and "test_requests.py" in message and "not float64" in message
    assert message.endswith("native serves it")


def test_strict_is_an_error() -> None:
    with torch.no_grad(), pytest.raises(attnrewrite.KernelError, match=r"flex was requested by .*not float64"):
        compiled(in_float64, kernels="flex", strict=True)(inputs())
    with torch.no_grad(), attnrewrite.attention_backend("flex", strict=True):
        function = compiled(in_float64)
        with pytest.raises(attnrewrite.KernelError, match="attention_backend"):
            function(inputs())
    assert relative_error(function(inputs()), in_float64(inputs())) < 1e-12


@pytest.mark.parametrize("where", ["option", "rule", "context", "model", *VARIABLES])
def test_unknown_names(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = compiled()
    with pytest.raises(attnrewrite.OptionError) as error:
        if where == "option":
            compiled(kernels="nativ")(inputs())
        elif where == "rule":
            compiled(kernel_rules={"*": ["nativ"]})(inputs())
        elif where == "context":
            with attnrewrite.attention_backend("nativ"):
                pass
        elif where == "model":
            attnrewrite.set_attention_backend(model, "nativ")
        else:
            monkeypatch.setenv(where, "nativ")
            compiled()(inputs())
    first, *others = str(error.value).splitlines()
    assert "'nativ'" in first and len(first) < 200
    if where.startswith("DIFFSYNTH"):
        assert "torch" in first and not others
        return
    assert "did you mean 'native'" in first and "attnrewrite doctor" in first
    assert where not in VARIABLES or first.startswith(where)
    # Every kernel and what it needs, in lines that can be read.
    assert max(map(len, others)) < 300 and any("native" in line and line.endswith(": PyTorch") for line in others)
    assert all(any(kernel.name in line for line in others) for kernel in _known())


def test_capitals_in_a_name() -> None:
    with pytest.raises(attnrewrite.OptionError, match=r"unknown kernel 'FLEX' .did you mean 'flex'"):
        attnrewrite.accelerate_attention(kernels="FLEX")


def test_the_variable_of_diffusers_takes_one_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFUSERS_ATTN_BACKEND", "flex,native")
    with pytest.raises(attnrewrite.OptionError, match=r"DIFFUSERS_ATTN_BACKEND takes one name.*'flex,native'"):
        compiled()(inputs())


class BreaksBetween(Model):
    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        torch._dynamo.graph_break()
        result: Tensor = self.second(x)
        return result


def test_rules_that_match_nothing_are_said_by_explain(caplog: pytest.LogCaptureFixture) -> None:
    rules = {"*frist": "flex", "*first": "native", "*second": "native", "no_such.py:3": "flex"}
    for model in (Model(), BreaksBetween()):
        with torch.no_grad(), caplog.at_level(logging.WARNING, "attnrewrite"):
            report = attnrewrite.explain(model, inputs(), options={"kernel_rules": rules})
        assert report.unmatched_rules == ["*frist", "no_such.py:3"]
        text = report.to_text(120)
        assert "'*frist' matches no attention" in text and "'first', 'second'" in text
        assert "*frist" in report.to_html() and "'*second' matches" not in text
    assert len(report.graphs) == 2 and report.graphs[0].unmatched_rules[1] == "*second"
    assert [record for record in caplog.records if "matches no" in record.message] == []
    with torch.no_grad():
        assert attnrewrite.explain(Model(), inputs()).remarks == []


@pytest.mark.parametrize("options", [{"kernels": []}, {"kernels": 3}, {"kernel_rules": ["flex"]}, {"strict": "yes"}])
def test_wrong_values(options: Any) -> None:
    with pytest.raises(attnrewrite.OptionError, match=next(iter(options))):
        compiled(**options)(inputs())


# Models that are compiled already.


def test_the_context_manager_switches_a_compiled_model_and_back(reports: list[GraphReport]) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    model = Model()
    function = compiled(model, inner=counter)
    expected = model(inputs())
    names = ("native", "_native_math", "flex")
    for _ in range(3):
        for name in names:
            with attnrewrite.attention_backend(name):
                assert relative_error(function(inputs()), expected) < 1e-5
    assert counter.frame_count == len(names)
    assert kernels(reports) == [name for name in names for _ in range(2)]
    rows = [site for report in reports for site in report.sites]
    assert {row.location.module for row in rows if row.location} == {"first", "second"}
    assert all(row.location and row.location.file.endswith("test_requests.py") for row in rows)


def test_contexts_nest_and_are_restored_after_an_error(reports: list[GraphReport]) -> None:
    function = compiled()
    with attnrewrite.attention_backend("_native_math"):
        with pytest.raises(ZeroDivisionError), attnrewrite.attention_backend("flex"):
            raise ZeroDivisionError
        function(inputs())
    function(inputs())
    assert kernels(reports) == ["_native_math"] * 2 + ["native"] * 2


def test_variants_train(reports: list[GraphReport]) -> None:
    model = Model()
    function = compiled(model, inner="aot_eager")
    with torch.enable_grad():
        expected = torch.autograd.grad(model(inputs()).square().sum(), list(model.parameters()))
        for name in ("native", "_native_math"):
            with attnrewrite.attention_backend(name):
                loss = function(inputs()).square().sum()
            found = torch.autograd.grad(loss, list(model.parameters()))
            assert max(map(relative_error, found, expected)) < 1e-4
    assert kernels(reports) == ["native"] * 2 + ["_native_math"] * 2


def test_variants_of_dynamic_shapes_compile_once(reports: list[GraphReport]) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    model = Model()
    function = compiled(model, inner=counter, dynamic=True)
    for length in (8, 13, 21):
        for name in ("native", "_native_math"):
            with attnrewrite.attention_backend(name):
                assert relative_error(function(inputs(length)), model(inputs(length))) < 1e-5
    assert counter.frame_count == 2


def run_in_threads(function: Any, expected: Tensor, names: tuple[str, ...]) -> None:
    start = threading.Barrier(len(names))
    errors: dict[str, float] = {}

    def run(name: str) -> None:
        with torch.no_grad(), attnrewrite.attention_backend(name):
            start.wait()
            errors[name] = max(float(relative_error(function(inputs()), expected)) for _ in range(5))

    # A copy of the context, in which the reports are collected.
    threads = [threading.Thread(target=contextvars.copy_context().run, args=(run, name)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors.keys() == set(names) and max(errors.values()) < 1e-5


def test_two_threads_at_once(reports: list[GraphReport]) -> None:
    """Each thread has its own kernels, what it computes is right, and nothing is compiled again."""
    counter = CompileCounterWithBackend("aot_eager")
    model = Model()
    function = compiled(model, inner=counter)
    for name in ("native", "_native_math", "flex"):
        with attnrewrite.attention_backend(name):
            function(inputs())
    run_in_threads(function, model(inputs()), ("_native_math", "flex"))
    run_in_threads(function, model(inputs()), ("_native_math", "native"))
    assert counter.frame_count == 3
    assert kernels(reports) == ["native"] * 2 + ["_native_math"] * 2 + ["flex"] * 2


@pytest.mark.skipif(
    torch.__version__ < "2.13", reason="before torch 2.13 no thread may call what another is compiling beside it"
)
def test_two_threads_compile_at_once(reports: list[GraphReport]) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    model = Model()
    function = compiled(model, inner=counter)
    function(inputs())
    for _ in range(2):
        run_in_threads(function, model(inputs()), ("_native_math", "flex"))
    assert counter.frame_count == 3
    assert sorted(map(str, kernels(reports))) == sorted(["native", "_native_math", "flex"] * 2)


@pytest.mark.skipif(
    torch.__version__ < "2.13", reason="before torch 2.13 no thread may call what another is compiling beside it"
)
def test_a_variant_made_while_another_thread_compiles_is_compiled(reports: list[GraphReport]) -> None:
    """While Dynamo compiles, it takes the code of all graph modules that are made for its own, and skips that later."""
    model = Model()
    function: Any = None
    errors: list[float] = []

    def call() -> None:
        with torch.no_grad(), attnrewrite.attention_backend("flex"):
            errors.append(float(relative_error(function(inputs()), model(inputs()))))

    other = threading.Thread(target=contextvars.copy_context().run, args=(call,))

    def inner(gm: torch.fx.GraphModule, example_inputs: Any) -> Any:
        if len(reports) == 1 and other.ident is None:
            other.start()
            other.join(timeout=1)  # It may have to wait for the end of this, so no longer.
        return gm

    function = compiled(model, inner=inner)
    with torch.no_grad():
        function(inputs())
        with attnrewrite.attention_backend("_native_math"):
            function(inputs())
    other.join()
    call()
    assert len(errors) == 2 and max(errors) < 1e-5
    assert sorted(map(str, kernels(reports))) == sorted(["native", "_native_math", "flex"] * 2)


def test_tasks_have_kernels_of_their_own(reports: list[GraphReport]) -> None:
    function = compiled()

    async def run(name: str) -> None:
        with attnrewrite.attention_backend(name):
            await asyncio.sleep(0)
            function(inputs())

    async def both() -> None:
        await asyncio.gather(run("_native_math"), run("flex"))

    asyncio.run(both())
    assert kernels(reports) == ["_native_math"] * 2 + ["flex"] * 2


@pytest.mark.parametrize("how", ["torch.compile", "module.compile", "part"])
def test_kernels_of_a_model(how: str, reports: list[GraphReport]) -> None:
    model: Any = Model()
    options: Any = {"inner_backend": "eager"}
    if how == "torch.compile":
        model = torch.compile(model, backend="attnrewrite", options=options)
    elif how == "module.compile":
        model.compile(backend="attnrewrite", options=options)
    else:
        model.second.compile(backend="attnrewrite", options=options)
    expected = model(inputs())
    attnrewrite.set_attention_backend(model, "flex")
    attnrewrite.set_attention_backend(model, "_native_math")
    assert relative_error(model(inputs()), expected) < 1e-5
    attnrewrite.reset_attention_backend(model)
    attnrewrite.reset_attention_backend(model)
    model(inputs())
    sites = 1 if how == "part" else 2
    assert kernels(reports) == ["native"] * sites + ["_native_math"] * sites


def test_kernels_of_a_model_that_is_not_compiled() -> None:
    with pytest.raises(TypeError, match="nothing in Model is compiled"):
        attnrewrite.set_attention_backend(Model(), "flex")


def test_kernels_of_a_function() -> None:
    with pytest.raises(TypeError, match="set_attention_backend takes a compiled"):
        attnrewrite.set_attention_backend(compiled(in_float64), "flex")


def test_names_in_a_list(reports: list[GraphReport]) -> None:
    with attnrewrite.attention_backend(["_native_math", "flex"]):
        compiled()(inputs())
    assert kernels(reports) == ["_native_math"] * 2


def test_the_decorator_checks_its_names() -> None:
    with pytest.raises(attnrewrite.OptionError, match=r"accelerate_attention\(kernels=...\): unknown kernel 'nope'"):
        attnrewrite.accelerate_attention(kernels="nope")


# Kernels of one's own.


class Own:
    """Takes everything that ``native`` takes, by ``native``'s own call."""

    name = "own"
    automatic = True
    needs = "nothing"

    def __init__(self) -> None:
        (self._native,) = [kernel for kernel in _known() if kernel.name == "native"]

    def availability(self) -> Availability:
        return Availability(True, "always")

    def supports(self, site: Any) -> Verdict:
        return self._native.supports(site)

    def emit(self, site: Any, builder: Any) -> Any:
        return self._native.emit(site, builder)


def _known() -> tuple[Kernel, ...]:
    from attnrewrite.kernels import registered_kernels

    return registered_kernels()


def test_a_kernel_that_lacks_a_part() -> None:
    class Half:
        name = "half"

    half: Any = Half()
    with pytest.raises(attnrewrite.OptionError, match="lacks automatic"):
        attnrewrite.register_kernel(half)


def test_a_kernel_of_ones_own_is_asked_first(reports: list[GraphReport]) -> None:
    attnrewrite.register_kernel(Own())
    try:
        compiled()(inputs())
        with pytest.raises(attnrewrite.OptionError, match="taken"):
            attnrewrite.register_kernel(Own())
    finally:
        attnrewrite.unregister_kernel("own")
    torch._dynamo.reset()
    compiled()(inputs())
    assert kernels(reports) == ["own"] * 2 + ["native"] * 2
    with pytest.raises(attnrewrite.OptionError, match="unknown kernel 'own'"):
        attnrewrite.unregister_kernel("own")
    with pytest.raises(attnrewrite.OptionError, match="one of attnrewrite's"):
        attnrewrite.unregister_kernel("native")


def test_a_graph_that_cannot_be_traced_again() -> None:
    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x * 2

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor) -> Tensor:
            return gradients[0] * 2

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        result: Tensor = Twice.apply((q @ k.mT).softmax(-1) @ v)  # type: ignore[no-untyped-call]
        return result

    compiled = rewritten(attend)
    inputs = [torch.randn(1, 2, 6, 8, requires_grad=True) for _ in range(3)]
    expected = compiled(*inputs)
    with (
        attnrewrite.attention_backend("_native_math"),
        pytest.raises(attnrewrite.KernelError, match="cannot trace the graph again"),
    ):
        compiled(*inputs)
    assert torch.equal(compiled(*inputs), expected)
