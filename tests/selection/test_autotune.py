"""autotune: kernels are timed where the graph is compiled, and what was found is kept on disk."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx

import attnrewrite
from attnrewrite.ir.builder import Builder
from attnrewrite.ir.site import CanonicalAttention
from attnrewrite.kernels import Availability, Verdict, kernel_named
from attnrewrite.options.compile_options import Policy
from tests.support.helpers import gradients, relative_error, rewritten, rows

pytestmark = pytest.mark.drawn


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("ATTNREWRITE_CACHE_DIR", str(tmp_path))
    return tmp_path / "autotune"


def attend(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    scores = (q @ k.mT * 0.2).masked_fill(~keep[:, None, None], -torch.inf)
    return scores.softmax(-1) @ v


def operands(length: int = 24) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    keep = torch.arange(length) < torch.tensor([length, length - 5])[:, None]
    return [*(torch.randn(2, 2, length, 16, generator=generator) for _ in range(3)), keep]


def tuned_rows(*inputs: Any, **options: Any) -> Any:
    (row,) = rows(attend, *inputs, autotune=True, **options)
    return row


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*"))


@pytest.mark.parametrize("inner", ["inductor", "eager"])
def test_the_fastest_of_those_that_were_timed_serves(inner: str, own_cache: Path) -> None:
    inputs = operands()
    with torch.no_grad():
        row = tuned_rows(*inputs, inner=inner)
        assert relative_error(rewritten(attend, inner, autotune=True)(*inputs), attend(*inputs)) <= 1e-5
    (file,) = files(own_cache)
    found = json.loads(file.read_text())
    times = {key.partition(":")[0]: time for key, time in found["milliseconds"].items()}
    # What keeps the scores in memory is not timed.
    assert set(times) == {verdict.kernel for verdict in row.verdicts if verdict.willing} - {"_native_math"}
    assert set(times) == {"native", "flex"}
    assert all(time > 0 for time in times.values())
    assert row.kernel == min(times, key=times.__getitem__)
    said = next(verdict.reason for verdict in row.verdicts if verdict.kernel == row.kernel)
    assert said == f"about {times[row.kernel]:.3g} ms, measured here"
    assert found["workload"]["mask"] == "key padding" and found["workload"]["keys"] == 24


class Twin:
    """PyTorch's own attention under a name of its own."""

    name = "twin"
    automatic = True
    needs = "nothing"

    def availability(self) -> Availability:
        return Availability(True, "always")

    def supports(self, site: CanonicalAttention) -> Verdict:
        return kernel_named("native").supports(site)

    def emit(self, site: CanonicalAttention, builder: Builder) -> fx.Node:
        return kernel_named("native").emit(site, builder)


def test_training_is_timed_with_its_backward_pass(own_cache: Path) -> None:
    inputs = operands()
    attnrewrite.register_kernel(Twin())
    try:
        tuned = rewritten(attend, "inductor", autotune=True)
        assert relative_error(gradients(tuned, inputs), gradients(attend, inputs)) <= 1e-4
    finally:
        attnrewrite.unregister_kernel("twin")
    (file,) = files(own_cache)
    found = json.loads(file.read_text())
    assert found["workload"]["backward"] is True and set(found["milliseconds"]) >= {"twin: always"}


def test_what_is_on_disk_is_not_timed_again(own_cache: Path) -> None:
    with torch.no_grad():
        tuned_rows(*operands())
        (file,) = files(own_cache)
        found = json.loads(file.read_text())
        # Numbers that no measurement gives.
        found["milliseconds"] = {key: 1e-6 if key.startswith("flex") else 1e6 for key in found["milliseconds"]}
        file.write_text(json.dumps(found))
        torch._dynamo.reset()
        assert tuned_rows(*operands()).kernel == "flex"
        torch._dynamo.reset()
        tuned_rows(*operands(32))
    assert len(files(own_cache)) == 2 and not list(own_cache.glob("*.tmp"))


def test_a_damaged_file_is_made_anew(own_cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    with torch.no_grad():
        tuned_rows(*operands())
        (file,) = files(own_cache)
        file.write_text("{")
        torch._dynamo.reset()
        with caplog.at_level(logging.WARNING, "attnrewrite"):
            tuned_rows(*operands())
    assert "is damaged; the kernels are timed again" in caplog.text
    assert json.loads(file.read_text())["milliseconds"]


class Failing:
    """A kernel whose operator raises when it is called."""

    name = "failing"
    automatic = True
    needs = "nothing"

    def availability(self) -> Availability:
        return Availability(True, "always")

    def supports(self, site: CanonicalAttention) -> Verdict:
        return Verdict.yes()

    def emit(self, site: CanonicalAttention, builder: Builder) -> fx.Node:
        output = kernel_named("native").emit(site, builder)
        return builder.call(torch.ops.attnrewrite_test.failing.default, output)


@torch.library.custom_op("attnrewrite_test::failing", mutates_args=())
def failing(x: Tensor) -> Tensor:
    raise ValueError("this one always fails")


@failing.register_fake
def _(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def test_a_kernel_that_fails_is_left_out_and_said(own_cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    attnrewrite.register_kernel(Failing())
    try:
        with torch.no_grad(), caplog.at_level(logging.WARNING, "attnrewrite"):
            row = tuned_rows(*operands())
    finally:
        attnrewrite.unregister_kernel("failing")
    assert row.kernel != "failing"
    assert "failing failed and is left out: this one always fails" in caplog.text
    said = {verdict.kernel: verdict.reason for verdict in row.verdicts}
    assert said["failing"] == "failed while it was timed"


def test_symbolic_sizes_are_those_of_the_call(own_cache: Path) -> None:
    with torch.no_grad():
        compiled = rewritten(attend, dynamic=True, autotune=True)
        for length in (24, 31):
            assert relative_error(compiled(*operands(length)), attend(*operands(length))) <= 1e-5
    (file,) = files(own_cache)
    assert json.loads(file.read_text())["workload"]["keys"] == 24


def test_the_environment_asks_for_it(monkeypatch: pytest.MonkeyPatch, own_cache: Path) -> None:
    monkeypatch.setenv("ATTNREWRITE_AUTOTUNE", "1")
    with torch.no_grad():
        rows(attend, *operands())
        assert len(files(own_cache)) == 1
        torch._dynamo.reset()
        rows(attend, *operands(32), autotune=False)
    assert len(files(own_cache)) == 1
    monkeypatch.setenv("ATTNREWRITE_AUTOTUNE", "yes")
    with pytest.raises(attnrewrite.OptionError, match="ATTNREWRITE_AUTOTUNE takes 1 or 0; got 'yes'"):
        Policy.from_options(None, None)


def test_a_kernel_by_name_is_not_timed(own_cache: Path) -> None:
    with torch.no_grad():
        assert tuned_rows(*operands(), kernels=["_native_math"]).kernel == "_native_math"
    assert not own_cache.exists()


def test_a_kernel_that_fails_halfway_leaves_nothing_in_the_graph(own_cache: Path) -> None:
    class Broken(Failing):
        name = "broken"

        def emit(self, site: CanonicalAttention, builder: Builder) -> fx.Node:
            builder.call(torch.ops.aten.neg.default, site.query.node)
            raise ValueError("no more")

    found: list[fx.GraphModule] = []

    def inner(gm: fx.GraphModule, example_inputs: Any) -> Any:
        found.append(gm)
        return gm.forward

    attnrewrite.register_kernel(Broken())
    try:
        with torch.no_grad():
            rewritten(attend, inner, autotune=True)(*operands())
    finally:
        attnrewrite.unregister_kernel("broken")
    (gm,) = found
    assert not gm.graph.find_nodes(op="call_function", target=torch.ops.aten.neg.default)
