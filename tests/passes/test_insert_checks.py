"""``ATTNREWRITE_CHECKS=1``: operands that are not what was promised, given to real compiled graphs."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint

from attnrewrite import AttentionCheckError, OptionError
from attnrewrite.backend import collect_reports
from attnrewrite.patterns import Specimen
from tests.support.helpers import gradients, relative_error, rewritten, rows, specimens_for_kernels

pytestmark = pytest.mark.drawn


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return (q @ k.mT / 4 + mask).softmax(-1) @ v


LINE = attention.__code__.co_firstlineno + 1
WHERE = f"attention at {__file__}:{LINE}: "


def operands(length: int = 8) -> dict[str, Tensor]:
    q, k, v = torch.randn(3, 2, 4, length, 16)
    return {"q": q, "k": k, "v": v, "mask": torch.zeros(2, 1, 1, length)}


class Caught:
    """An inner compiler that keeps the graph that it is given."""

    def __init__(self) -> None:
        self.graphs: list[fx.GraphModule] = []

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        self.graphs.append(gm)
        return gm.forward

    def called(self, **inputs: Any) -> Any:
        """The graph called past Dynamo's guards, each input under the name that it has in the source."""
        (gm,) = self.graphs
        names = [str(node.target) for node in gm.graph.find_nodes(op="placeholder")]
        (result,) = gm(*(inputs[name.removeprefix("L_").removesuffix("_")] for name in names))
        return result


def compiled_graph(**inputs: Tensor) -> Caught:
    inner = Caught()
    rewritten(attention, inner, checks=True)(**inputs)
    return inner


def checks_in(gm: fx.GraphModule) -> int:
    return len(gm.graph.find_nodes(op="call_function", target=torch.ops.attnrewrite.check_attention.default))


WRONG: list[tuple[Callable[[dict[str, Tensor]], dict[str, Tensor]], str]] = [
    (lambda x: {"k": x["k"].to("meta")}, "key is on meta and query is on cpu; move them to one device"),
    (
        lambda x: {name: value.to("meta") for name, value in x.items()},
        "query is on meta, but the graph was compiled for cpu; move it, or call the model through torch.compile, which "
        "recompiles",
    ),
    (
        lambda x: {"v": x["v"].bfloat16()},
        "value is bfloat16, but the graph was compiled for float32; convert it, or call the model through "
        "torch.compile, which recompiles",
    ),
    (lambda x: {"mask": x["mask"].bool()}, "mask is bool, but the graph was compiled for float32; convert it"),
    (lambda x: {"q": x["q"][0]}, "query has 3 dimensions, not 4; pass the shape that the graph was compiled for"),
    (
        lambda x: {"v": x["v"][:, :, :5]},
        "dimension 2 of value (keys) is 5, not 8; that of key is 8; pass the sizes that the graph was compiled for, or "
        "call the model through torch.compile",
    ),
    (
        lambda x: {"k": x["k"][:, :3]},
        "dimension 1 of key (batch or heads) is 3, not 4; that of query is 4; pass the sizes",
    ),
    (
        lambda x: {"k": x["k"][..., :8]},
        "dimension 3 of key (head size) is 8, not 16; that of query is 16; pass the sizes",
    ),
    (
        lambda x: {"mask": x["mask"][..., :7]},
        "dimension 3 of mask (keys) is 7, not 8; that of key is 8; pass the sizes",
    ),
    (lambda x: {"mask": x["mask"].expand(2, 3, 1, 8)}, "dimension 1 of mask (broadcast) is 3, not 1; pass the sizes"),
    (
        lambda x: {"q": x["q"].mT.contiguous().mT},
        "the last dimension of query has stride 8, but the kernel requires 1; call .contiguous()",
    ),
]


@pytest.mark.parametrize(("change", "message"), WRONG, ids=lambda value: value[:40] if isinstance(value, str) else "")
def test_what_is_wrong_is_said(change: Callable[[dict[str, Tensor]], dict[str, Tensor]], message: str) -> None:
    inputs = operands()
    inner = compiled_graph(**inputs)
    assert relative_error(inner.called(**inputs), attention(**inputs)) <= 1e-5
    with pytest.raises(AttentionCheckError) as error:
        inner.called(**{**inputs, **change(inputs)})
    assert str(error.value).startswith(WHERE + message) and "\n" not in str(error.value)


def test_sizes_that_are_symbols_must_agree() -> None:
    inputs, longer = operands(), operands(11)
    inner = Caught()
    rewritten(attention, inner, dynamic=True, checks=True)(**inputs)
    (gm,) = inner.graphs

    # The symbols are inputs of the graph; of the sizes, 8 was the length.
    symbols = {
        str(node.target): 11 if node.meta["val"].node.hint == 8 else node.meta["val"].node.hint
        for node in gm.graph.find_nodes(op="placeholder")
        if isinstance(node.meta["val"], torch.SymInt)
    }
    assert relative_error(inner.called(**symbols, **longer), attention(**longer)) <= 1e-5
    with pytest.raises(AttentionCheckError, match=r"dimension 2 of value \(keys\) is 8, not 11; that of key is 11"):
        inner.called(**symbols, **{**longer, "v": inputs["v"]})


class Lying(nn.Module):
    """Its custom operator gives another dtype than its fake implementation says."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(16, 16)])

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k = torch.ops.attnrewrite_tests.lie(k)
        result: Tensor = (self.layers[0](q) @ k.mT / 4).softmax(-1) @ v
        return result


torch.library.define("attnrewrite_tests::lie", "(Tensor x) -> Tensor")
torch.library.impl("attnrewrite_tests::lie", "CompositeExplicitAutograd", lambda x: x.double())
torch.library.register_fake("attnrewrite_tests::lie", lambda x: torch.empty_like(x))


@pytest.mark.parametrize("inner", ["eager", "aot_eager", "inductor"])
def test_an_operator_that_does_not_keep_its_word(inner: str) -> None:
    q, k, v = torch.randn(3, 2, 8, 16)
    model = nn.ModuleDict({"block": Lying()})
    compiled = rewritten(lambda: model["block"](q, k, v), inner, checks=True)
    with torch.no_grad(), pytest.raises(AttentionCheckError) as error:
        compiled()
    assert "test_insert_checks.py:" in str(error.value) and "(block)" in str(error.value)
    assert "key is float64, but the graph was compiled for float32" in str(error.value)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(32, 96)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (4, 8)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        result: Tensor = (q @ k.mT / 8**0.5).softmax(-1) @ v
        return result


def test_a_module_that_is_moved_is_compiled_anew() -> None:
    """Dynamo's guards see parameters that are moved or converted; the check has nothing to say."""
    model = Block()
    compiled = rewritten(model, checks=True)
    assert relative_error(compiled(x := torch.randn(2, 6, 32)), model(x)) <= 1e-5
    model.double()
    assert relative_error(compiled(x.double()), model(x.double())) <= 1e-5


# What it costs and what it leaves as it is.


def test_nothing_is_there_when_it_is_off() -> None:
    inner = Caught()
    rewritten(attention, inner)(**operands())
    assert checks_in(inner.graphs[0]) == 0


@pytest.mark.parametrize(("inner", "dynamic"), [("aot_eager", None), ("aot_eager", True), ("inductor", None)])
def test_training(inner: str, dynamic: bool | None) -> None:
    inputs = list(operands().values())
    compiled = rewritten(attention, inner, dynamic=dynamic, checks=True)
    assert relative_error(compiled(*inputs), attention(*inputs)) <= 1e-5
    assert relative_error(gradients(compiled, inputs), gradients(attention, inputs)) <= 1e-4


def test_a_mask_that_is_not_needed_is_not_computed_for_the_check() -> None:
    def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        hidden = torch.ones(8, 8, dtype=torch.bool).triu(1)
        return (q @ k.mT / 4).masked_fill(hidden, -torch.inf).softmax(-1) @ v

    inner = Caught()
    rewritten(causal, inner, checks=True)(*torch.randn(3, 2, 4, 8, 16))
    (gm,) = inner.graphs
    assert checks_in(gm) == 1
    assert not gm.graph.find_nodes(op="call_function", target=torch.ops.aten.triu.default)


# Symbolic sizes take long to compile; tests/whole/test_specimens.py compiles them for all.
SOME = [specimen for specimen in specimens_for_kernels() if specimen.dynamic][::8]


@pytest.mark.parametrize("specimen", specimens_for_kernels(), ids=lambda specimen: specimen.name)
def test_nothing_is_wrong_with_a_specimen(specimen: Specimen) -> None:
    inputs = specimen.inputs(0, 12)
    assert relative_error(rewritten(specimen.function, checks=True)(*inputs), specimen.function(*inputs)) <= 1e-5


@pytest.mark.parametrize("specimen", SOME, ids=lambda specimen: specimen.name)
def test_nothing_is_wrong_at_another_length(specimen: Specimen) -> None:
    function = rewritten(specimen.function, dynamic=True, checks=True)
    for length in (12, 9):
        inputs = specimen.inputs(0, length)
        assert relative_error(function(*inputs), specimen.function(*inputs)) <= 1e-5


def test_beside_verification_and_in_a_dump(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTNREWRITE_DEBUG", str(tmp_path))
    inputs = operands()
    with collect_reports() as graphs:
        rewritten(attention, dynamic=True, verify=True, checks=True)(**inputs)
    assert [note for note in graphs[0].notes if note.startswith("verified: 1 site agrees")]
    (script,) = tmp_path.glob("*/*_after.py")
    ran = subprocess.run([sys.executable, str(script), "--compare"], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert "check_attention" in script.read_text() and "largest difference" in ran.stdout


@pytest.mark.parametrize("inner", ["aot_eager", "inductor"])
def test_recomputed_by_a_checkpoint(inner: str) -> None:
    def loss(*inputs: Tensor) -> Tensor:
        result: Tensor = checkpoint(attention, *inputs, use_reentrant=False)
        return result

    inputs = list(operands().values())
    assert relative_error(gradients(rewritten(loss, inner, checks=True), inputs), gradients(loss, inputs)) <= 1e-4


@pytest.mark.parametrize(("value", "expected"), [("1", 1), ("0", 0), ("", 0)])
def test_the_environment(value: str, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTNREWRITE_CHECKS", value)
    inner = Caught()
    rewritten(attention, inner)(**operands())
    assert checks_in(inner.graphs[0]) == expected
    off = Caught()
    rewritten(attention, off, checks=False)(**operands())
    assert checks_in(off.graphs[0]) == 0


@pytest.mark.parametrize(
    ("value", "options", "message"),
    [
        ("yes", {}, "ATTNREWRITE_CHECKS takes 1 or 0; got 'yes'"),
        ("0", {"checks": 1}, "options['checks'] takes True or False; got 1"),
    ],
)
def test_what_the_option_takes(
    value: str, options: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ATTNREWRITE_CHECKS", value)
    with pytest.raises(OptionError) as error:
        rows(attention, *operands().values(), **options)
    assert str(error.value) == message
