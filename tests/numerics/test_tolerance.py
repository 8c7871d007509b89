"""``options["tolerance"]``, proved on kernels that really round query and key to a few bits."""

from __future__ import annotations

import logging
import math
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import attnrewrite
from attnrewrite.backend import collect_reports
from attnrewrite.ir.axes import size_of
from attnrewrite.ir.builder import Builder
from attnrewrite.ir.site import CanonicalAttention
from attnrewrite.kernels import Availability, Verdict
from attnrewrite.kernels.common.layout import KernelLayout
from attnrewrite.report.rows import GraphReport, SiteReport
from tests.support.helpers import gradients, relative_error, rewritten

pytestmark = pytest.mark.drawn

VARIABLES = ("ATTNREWRITE_KERNELS", "DIFFUSERS_ATTN_BACKEND", "DIFFSYNTH_ATTENTION_IMPLEMENTATION")


def rounded(operand: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """Each row as whole numbers of a byte each, and what they are to be multiplied by."""
    step = operand.float().abs().amax(-1, keepdim=True).clamp_min(1e-12) / levels
    return (operand / step).round().to(torch.int8), step


@torch.library.custom_op("attnrewrite_test::rounded_attention", mutates_args=())
def rounded_attention(query: Tensor, key: Tensor, value: Tensor, scale: float, causal: bool, levels: int) -> Tensor:
    """SageAttention's idea: the mean of the keys subtracted, products of whole numbers, a block of queries at once."""
    key, key_step = rounded(key - key.mean(-2, keepdim=True), levels)
    blocks = []
    for first in range(0, query.shape[-2], 256):
        block, step = rounded(query[..., first : first + 256, :], levels)
        # Sums of products of bytes are exact in float32 up to rows of a thousand.
        scores = (block.float() @ key.float().mT) * step * key_step.mT * scale
        if causal:
            scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1 + first), -math.inf)
        blocks.append(scores.softmax(-1).to(value.dtype) @ value)
    return torch.cat(blocks, -2)


@rounded_attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, scale: float, causal: bool, levels: int) -> Tensor:
    return query.new_empty((*query.shape[:-1], value.shape[-1]))


class Rounding:
    """A kernel of one's own that takes attention without a mask, or with a causal one."""

    automatic = False
    lower_precision = True
    needs = "nothing"

    def __init__(self, name: str, levels: int) -> None:
        self.name, self._levels = name, levels

    def availability(self) -> Availability:
        return Availability(True, "always")

    def supports(self, site: CanonicalAttention) -> Verdict:
        scores = site.scores
        if scores.inexpressible or scores.terms or scores.query_factors or scores.key_factors or scores.value_mods:
            return Verdict.no("takes no mask but a causal one")
        if site.sink is not None or site.group_axes or site.dropout:
            return Verdict.no("takes no sink, no groups and no dropout")
        if site.differentiable:
            return Verdict.no("has no backward pass")
        return Verdict.yes()

    def emit(self, site: CanonicalAttention, builder: Builder) -> fx.Node:
        scores = site.scores
        layout = KernelLayout.of(site)
        query, key, value = layout.operands(builder, site)
        scale = float(size_of(layout.query_dims[-1])) ** -0.5 if scores.scale is None else scores.scale
        causal = scores.is_causal or site.is_causal
        target = torch.ops.attnrewrite_test.rounded_attention.default
        output = builder.call(target, query, key, value, scale, causal, self._levels)
        return layout.as_result(builder, site, output)


@contextmanager
def registered(*kernels: Any) -> Iterator[None]:
    """The first is asked first."""
    for kernel in reversed(kernels):
        attnrewrite.register_kernel(kernel)
    try:
        yield
    finally:
        for kernel in kernels:
            attnrewrite.unregister_kernel(kernel.name)


@pytest.fixture
def int8() -> Iterator[None]:
    with registered(Rounding("int8", 127)):
        yield


@pytest.fixture(autouse=True)
def nothing_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*VARIABLES, "ATTNREWRITE_VERIFY"):
        monkeypatch.delenv(name, raising=False)


class Block(nn.Module):
    """Self-attention. ``outlier``: one feature of the keys is that large, which the queries hardly look at."""

    def __init__(self, outlier: float) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(64, 64, bias=False) for _ in range(3))
        with torch.no_grad():
            for layer in (self.query, self.key, self.value):
                layer.weight.copy_(torch.randn(64, 64) / 8)
            self.key.weight[::16] *= outlier
            self.query.weight[::16] /= outlier

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (4, 16)).transpose(1, 2) for layer in (self.query, self.key, self.value))
        result: Tensor = (q @ k.mT / 4).softmax(-1) @ v
        return result.transpose(1, 2).flatten(-2)


class Model(nn.Module):
    def __init__(self, outlier: float = 300.0) -> None:
        super().__init__()
        self.first, self.second = Block(1.0), Block(outlier)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.second(self.first(x) * 4)
        return result


def sequence(length: int = 32, batch: int = 2) -> Tensor:
    return torch.randn(batch, length, 64, generator=torch.Generator().manual_seed(length))


def run(model: Any, *inputs: Any, **settings: Any) -> tuple[Any, GraphReport]:
    """The result of the first call, without gradients, and the report of the only graph."""
    with collect_reports() as graphs, torch.no_grad():
        result = rewritten(model, **settings)(*inputs)
    (graph,) = graphs
    return result, graph


def kernels(*graphs: GraphReport) -> list[str | None]:
    return [site.kernel for graph in graphs for site in graph.sites]


def answer(row: SiteReport, kernel: str) -> str:
    (reason,) = [verdict.reason for verdict in row.verdicts if verdict.kernel == kernel]
    return reason


def notes(graph: GraphReport) -> list[str]:
    return [note for note in graph.notes if note.startswith("tolerance ")]


# What is let in.


@pytest.mark.parametrize("inner", ["eager", "aot_eager", "inductor"])
@pytest.mark.usefixtures("int8")
def test_each_site_for_itself(inner: str) -> None:
    """One layer of the model has outliers, which rounding to a byte does not survive."""
    model, x = Model().eval(), sequence()
    result, graph = run(model, x, inner=inner, tolerance=5e-2)
    assert kernels(graph) == ["int8", "native"]
    first, second = graph.sites
    assert answer(first, "int8").startswith("error ") and "within the tolerance 5e-02" in answer(first, "int8")
    assert "more than the tolerance 5e-02" in answer(second, "int8")
    assert first.requested == "int8 by options['tolerance']" and second.requested == ""
    assert (first.tolerance, second.tolerance) == (5e-2, 0.0)
    assert notes(graph) == ["tolerance 5e-02: 1 of 2 attention sites served in lower precision"]
    with torch.no_grad():
        assert 1e-4 < relative_error(result, model(x)) < 0.2


@pytest.mark.usefixtures("int8")
def test_the_error_is_that_of_the_site() -> None:
    """And not that of the sites before it."""
    model, x = Model(outlier=1.0).eval(), sequence()
    _, graph = run(model, x, tolerance=5e-2)
    with torch.no_grad():
        second = model.first(x) * 4
        for block, inputs, row in ((model.first, x, graph.sites[0]), (model.second, second, graph.sites[1])):
            q, k, v = (
                layer(inputs).unflatten(-1, (4, 16)).transpose(1, 2) for layer in (block.query, block.key, block.value)
            )
            exact = (q @ k.mT / 4).softmax(-1) @ v
            error = relative_error(rounded_attention(q, k, v, 0.25, False, 127), exact)
            assert f"error {error:.1e}," in answer(row, "int8")
    assert kernels(graph) == ["int8", "int8"]


@pytest.mark.usefixtures("int8")
def test_a_small_tolerance_lets_nothing_in() -> None:
    model, x = Model().eval(), sequence()
    result, graph = run(model, x, tolerance=1e-4)
    assert kernels(graph) == ["native", "native"]
    assert notes(graph) == ["tolerance 1e-04: 0 of 2 attention sites served in lower precision"]
    with torch.no_grad():
        assert relative_error(result, model(x)) < 1e-5


@pytest.mark.usefixtures("int8")
def test_without_it_they_serve_by_name_only() -> None:
    assert kernels(run(Model(), sequence())[1]) == ["native", "native"]
    assert kernels(run(Model(), sequence(), tolerance=None)[1]) == ["native", "native"]
    assert kernels(run(Model(), sequence(), kernels="int8")[1]) == ["int8", "int8"]


def test_the_first_within_it_takes_the_site() -> None:
    with registered(Rounding("int4", 7), Rounding("int7", 63), Rounding("int8", 127)):
        _, graph = run(Model(outlier=1.0).eval(), sequence(), tolerance=5e-2)
    assert kernels(graph) == ["int7", "int7"]
    for row in graph.sites:
        tried = [(verdict.kernel, verdict.willing) for verdict in row.verdicts]
        assert tried == [("int4", False), ("int7", True)]
        assert "more than the tolerance 5e-02" in answer(row, "int4")


def test_a_kernel_that_fails_is_passed_over() -> None:
    class Failing(Rounding):
        def emit(self, site: CanonicalAttention, builder: Builder) -> fx.Node:
            output = super().emit(site, builder)
            return builder.call(torch.ops.attnrewrite_test.cannot_run.default, output)

    with registered(Failing("failing", 127), Rounding("int8", 127)):
        _, graph = run(Model(outlier=1.0), sequence(), tolerance=5e-2)
    assert kernels(graph) == ["int8", "int8"]
    assert answer(graph.sites[0], "failing") == "raises RuntimeError: out of order"


@torch.library.custom_op("attnrewrite_test::cannot_run", mutates_args=())
def cannot_run(x: Tensor) -> Tensor:
    raise RuntimeError("out of order")


@cannot_run.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def test_what_a_kernel_compiles_for_itself() -> None:
    """A trial happens while a graph is compiled; kernels may compile, too."""

    class Compiling(Rounding):
        def emit(self, site: CanonicalAttention, builder: Builder) -> fx.Node:
            output = super().emit(site, builder)
            return builder.call(torch.ops.attnrewrite_test.compiled_inside.default, output)

    with registered(Compiling("compiling", 127)):
        result, graph = run(Model(outlier=1.0), sequence(), tolerance=5e-2)
    assert kernels(graph) == ["compiling", "compiling"]
    assert result.isfinite().all()


@torch.compile(backend="aot_eager")
def _doubled_and_halved(x: Tensor) -> Tensor:
    return (x * 2) / 2


@torch.library.custom_op("attnrewrite_test::compiled_inside", mutates_args=())
def compiled_inside(x: Tensor) -> Tensor:
    result: Tensor = _doubled_and_halved(x)
    return result


@compiled_inside.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


@pytest.mark.usefixtures("int8")
def test_a_refusal_is_told_where_the_kernel_was_tried_elsewhere() -> None:
    def function(x: Tensor, bias: Tensor) -> Tensor:
        x = (x @ x.mT).softmax(-1) @ x
        return (x @ x.mT + bias).softmax(-1) @ x

    _, graph = run(function, torch.randn(2, 8, 16), torch.randn(8, 8), tolerance=0.1)
    assert kernels(graph) == ["int8", "native"]
    assert answer(graph.sites[1], "int8") == "takes no mask but a causal one"


@pytest.mark.usefixtures("int8")
def test_a_graph_in_which_no_kernel_is_willing() -> None:
    def function(x: Tensor, bias: Tensor) -> Tensor:
        return (x @ x.mT + bias).softmax(-1) @ x

    _, graph = run(function, torch.randn(2, 8, 16), torch.randn(8, 8), tolerance=0.1)
    assert kernels(graph) == ["native"]
    (note,) = notes(graph)
    assert note.startswith(
        "tolerance 1e-01: no kernel of lower precision takes any attention site: int8: takes no mask"
    )
    # What needs a network is not even asked.
    assert "sage" in note and "hub" not in note
    assert [verdict.kernel for verdict in graph.sites[0].verdicts] == ["native"]


@pytest.mark.usefixtures("int8")
def test_a_number_of_keys_that_depends_on_the_data() -> None:
    """What the choice does not ask a kernel, the tolerance does not ask it either."""

    def function(q: Tensor, x: Tensor, keep: Tensor) -> Tensor:
        keys = torch.cat([q, x[:, torch.nonzero(keep).flatten()]], dim=1)
        return (q @ keys.mT).softmax(-1) @ keys

    q, x = torch.randn(2, 8, 16), torch.randn(2, 8, 16)
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        _, graph = run(function, q, x, torch.arange(8) < 5, tolerance=0.1)
    assert kernels(graph) == ["native"]
    (note,) = notes(graph)
    assert "int8" in note.partition(": does not take a number of queries or keys that depends on the data")[0]


@pytest.mark.usefixtures("int8")
def test_a_graph_without_attention() -> None:
    _, graph = run(lambda x: x.sin(), torch.randn(3), tolerance=1e-2)
    assert graph.notes == []


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.usefixtures("int8")
def test_dtypes(dtype: torch.dtype) -> None:
    _, graph = run(Model().to(dtype), sequence().to(dtype), tolerance=5e-2)
    assert kernels(graph) == ["int8", "native"], graph.sites


@pytest.mark.usefixtures("int8")
def test_calls_that_are_fused_already_and_autocast() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)

    q, k, v = torch.randn(3, 2, 4, 8, 16)
    result, graph = run(function, q, k, v, tolerance=5e-2)
    assert kernels(graph) == ["int8"]
    assert relative_error(result, function(q, k, v)) < 5e-2
    with torch.autocast("cpu", torch.bfloat16):
        _, graph = run(Model(), sequence(), tolerance=5e-2)
    assert kernels(graph) == ["int8", "native"]
    assert not torch.is_autocast_enabled("cpu")


@pytest.mark.usefixtures("int8")
def test_nothing_of_the_call_is_changed() -> None:
    """Inputs are updated once, and random numbers are drawn as without the option."""

    class Updating(nn.Module):
        calls: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls.add_(1)
            x.mul_(2)
            y = nn.functional.dropout(x, 0.5)
            return (y @ y.mT / 64).softmax(-1) @ y

    results = []
    for options in ({}, {"tolerance": 1e-9}):
        torch._dynamo.reset()
        torch.manual_seed(3)
        model, x = Updating(), sequence()
        result, graph = run(model, x, **options)
        results.append((result, x, model.calls, torch.rand(1)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert "more than the tolerance 1e-09" in answer(graph.sites[0], "int8")


# What is not compared.


@pytest.mark.usefixtures("int8")
def test_training() -> None:
    inputs = torch.randn(3, 2, 4, 8, 16).unbind()

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.mT / 4).softmax(-1) @ v

    with collect_reports() as graphs:
        mine = gradients(rewritten(function, tolerance=0.5), inputs)
    assert max(map(relative_error, mine, gradients(function, inputs))) < 1e-5
    (graph,) = graphs
    assert kernels(graph) == ["native"]
    (note,) = notes(graph)
    assert note.startswith("tolerance 5e-01: not applied at site0: a backward pass may follow")


@pytest.mark.usefixtures("int8")
def test_the_same_model_without_gradients_is_another_graph() -> None:
    model, x = Model(outlier=1.0), sequence()
    compiled = rewritten(model, tolerance=5e-2)
    with collect_reports() as graphs:
        compiled(x)
        with torch.no_grad():
            compiled(x)
    assert kernels(*graphs) == ["native", "native", "int8", "int8"]


@pytest.mark.usefixtures("int8")
def test_weights_dropped_at_random() -> None:
    def function(x: Tensor) -> Tensor:
        return nn.functional.dropout((x @ x.mT).softmax(-1), 0.25) @ x

    _, graph = run(function, torch.randn(2, 8, 16), tolerance=0.5)
    assert kernels(graph) == ["native"]
    assert notes(graph) == ["tolerance 5e-01: not applied at site0: dropout is random, so results cannot be compared"]


@pytest.mark.usefixtures("int8")
def test_inputs_that_are_not_at_hand() -> None:
    """A graph that is compiled under fake tensors has none."""
    with collect_reports() as graphs, torch.no_grad(), FakeTensorMode():
        x = torch.empty(2, 8, 16)
        rewritten(lambda x: (x @ x.mT).softmax(-1) @ x, tolerance=0.5)(x)
    (graph,) = graphs
    assert kernels(graph) == ["native"]
    assert notes(graph) == [
        "tolerance 5e-01: not applied, since the inputs of the call are not available while it is compiled"
    ]


@contextmanager
def memory(more: int) -> Iterator[None]:
    """No more than so many bytes beyond what the process has."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + more, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.parametrize("tolerance", [5e-2, 1e-5])
@pytest.mark.usefixtures("int8")
def test_a_source_that_does_not_fit_into_memory(tolerance: float) -> None:
    """The scores take 1 GiB: what is rounded is compared with the exact kernel's result."""

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.mT / 4).softmax(-1) @ v

    q, k, v = torch.randn(4096, 16), torch.randn(65536, 16), torch.randn(65536, 16)
    with memory(700 * 2**20):
        with pytest.raises(RuntimeError, match="can't allocate memory"):
            function(q, k, v)
        _, graph = run(function, q, k, v, tolerance=tolerance)
    assert kernels(graph) == ["int8" if tolerance > 1e-2 else "native"]
    assert "error " in answer(graph.sites[0], "int8")
    first, _ = notes(graph)
    assert "the source graph did not run (RuntimeError: " in first and "can't allocate memory" in first
    assert first.endswith("so results are compared with those of native")


# Who is stronger.


@pytest.mark.parametrize("where", ["option", "rule", "context", "environment"])
@pytest.mark.usefixtures("int8")
def test_names_are_stronger(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, options = Model(outlier=1.0), dict[str, Any](tolerance=0.5)
    context = attnrewrite.attention_backend("_native_math" if where == "context" else "auto")
    if where == "option":
        options["kernels"] = "_native_math"
    elif where == "rule":
        options["kernel_rules"] = {"*second": "_native_math"}
    elif where == "environment":
        monkeypatch.setenv("ATTNREWRITE_KERNELS", "_native_math")
    if where in ("rule", "context"):
        with context:
            _, graph = run(model, sequence(), **options)
    else:
        _, graph = run(model, sequence(), **options)
    assert kernels(graph) == ["int8" if where == "rule" else "_native_math", "_native_math"]
    assert graph.sites[1].tolerance == 0 and [v.kernel for v in graph.sites[1].verdicts] == ["_native_math"]


@pytest.mark.usefixtures("int8")
def test_a_kernel_that_was_asked_for_by_name_needs_no_tolerance() -> None:
    _, graph = run(Model(), sequence(), tolerance=1e-9, kernels="int8")
    assert kernels(graph) == ["int8", "int8"]
    assert [row.tolerance for row in graph.sites] == [0, 0]
    _, graph = run(Model(), sequence(), tolerance=1e-9, kernels=["int8", "auto"])
    assert kernels(graph) == ["int8", "int8"]


@pytest.mark.usefixtures("int8")
def test_auto_among_the_names() -> None:
    """The tolerance is part of the automatic choice, behind the names in front of it."""
    _, graph = run(Model(outlier=1.0), sequence(), tolerance=0.5, kernels=["flash", "auto"])
    assert kernels(graph) == ["int8", "int8"]
    assert graph.sites[0].requested == "flash, int8, auto by options['kernels'] and options['tolerance']"
    _, graph = run(Model(outlier=1.0), sequence(), tolerance=0.5, kernels=["_native_math", "auto"], strict=True)
    assert kernels(graph) == ["_native_math", "_native_math"]


@pytest.mark.usefixtures("int8")
def test_switching_kernels() -> None:
    model, x = Model().eval(), sequence()
    with torch.no_grad(), collect_reports() as graphs:
        expected = model(x)
        compiled = rewritten(model, tolerance=5e-2)
        for _ in range(2):
            with attnrewrite.attention_backend("_native_math"):
                assert relative_error(compiled(x), expected) < 1e-5
            assert relative_error(compiled(x), expected) > 1e-5
    assert kernels(*graphs) == ["_native_math", "_native_math", "int8", "native"]


# Together with other things.


@pytest.mark.usefixtures("int8")
def test_verification_leaves_what_was_let_in(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "attnrewrite"):
        _, graph = run(Model(), sequence(), tolerance=5e-2, verify=True)
    assert kernels(graph) == ["int8", "native"] and len(graph.rewritten) == 2
    assert any("all 2 sites agree with the source" in note for note in graph.notes), graph.notes
    assert not [message for message in caplog.messages if "differs" in message]


@pytest.mark.usefixtures("int8")
def test_verification_throws_out_what_was_not() -> None:
    """So that the test above shows what it says."""
    _, graph = run(Model(), sequence(), kernels="int8", verify=True)
    assert not graph.rewritten


@pytest.mark.usefixtures("int8")
def test_dynamic_shapes_keep_the_decision_of_the_first_call() -> None:
    model = Model().eval()
    compiled = rewritten(model, dynamic=True, tolerance=5e-2)
    with torch.no_grad(), collect_reports() as graphs:
        for length in (32, 48, 20):
            result = compiled(sequence(length))
            assert relative_error(result, model(sequence(length))) < 0.3
    assert kernels(*graphs) == ["int8", "native"]


@pytest.mark.usefixtures("int8")
def test_static_shapes_are_graphs_of_their_own() -> None:
    compiled = rewritten(Model(outlier=1.0), dynamic=False, tolerance=5e-2)
    with torch.no_grad(), collect_reports() as graphs:
        for length in (32, 48, 32):
            compiled(sequence(length))
    assert kernels(*graphs) == ["int8"] * 4
    errors = [answer(row, "int8") for graph in graphs for row in graph.sites]
    assert len(set(errors)) > 2


@pytest.mark.usefixtures("int8")
def test_explain() -> None:
    model = Model().eval()
    with torch.no_grad():
        report = attnrewrite.explain(model, sequence(), options={"tolerance": 5e-2})
    text = " ".join(str(report).split())
    assert "int8: error " in text and "not int8: error " in text
    assert "1 of 2 attention sites served in lower precision" in text
    assert '"tolerance": 0.05' in report.to_json()


# Wrong values.


@pytest.mark.parametrize("value", [0, -1e-2, "x", True, math.nan, math.inf, [1e-2]])
def test_wrong_values_are_one_sentence(value: Any) -> None:
    with pytest.raises(attnrewrite.OptionError) as error:
        rewritten(Model(), tolerance=value)(sequence())
    assert str(error.value) == (
        "options['tolerance'] takes a number above 0, the largest error relative to the largest number of an "
        f"attention's result, such as 1e-2; got {value!r}"
    )


def test_a_kernel_of_lower_precision_is_not_chosen_unasked() -> None:
    kernel = Rounding("int8", 127)
    kernel.automatic = True
    with pytest.raises(attnrewrite.OptionError, match="set automatic to False"):
        attnrewrite.register_kernel(kernel)


# A real one.


class Cross(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(q, k, v)


@pytest.mark.gpu
@pytest.mark.parametrize("cudagraphs", [False, True])
def test_sage(cudagraphs: bool) -> None:
    """SageAttention 1.0.6: within 5e-2 at 512 keys and not within 1e-5; at 77 keys it refuses."""
    from attnrewrite.kernels import kernel_named

    available = kernel_named("sage").availability()
    if not available.available:
        pytest.skip(f"sage: {available.detail}")
    model = Cross()
    settings: dict[str, Any] = {"inner": "inductor", "triton.cudagraphs": cudagraphs}
    q, k, v = torch.randn(3, 2, 8, 512, 64, device="cuda", dtype=torch.float16)
    expected = model(q, k, v)
    with torch.no_grad(), collect_reports() as graphs:
        compiled = rewritten(model, tolerance=5e-2, **settings)
        for _ in range(4):
            assert 1e-5 < relative_error(compiled(q, k, v), expected) < 5e-2
        torch._dynamo.reset()
        assert relative_error(rewritten(model, tolerance=1e-5, **settings)(q, k, v), expected) < 1e-2
        torch._dynamo.reset()
        short = (q, k[:, :, :77], v[:, :, :77])
        assert relative_error(rewritten(model, tolerance=5e-2, **settings)(*short), model(*short)) < 1e-2
    within, beyond, refused = graphs
    assert kernels(within)[0] in ("sage", "sage_varlen") and "within the tolerance" in answer(within.sites[0], "sage")
    assert kernels(beyond)[0] not in ("sage", "sage_varlen")
    assert "more than the tolerance 1e-05" in answer(beyond.sites[0], "sage")
    assert kernels(refused)[0] not in ("sage", "sage_varlen")
    assert "no kernel of lower precision takes any attention site" in notes(refused)[0] and "sage" in notes(refused)[0]
