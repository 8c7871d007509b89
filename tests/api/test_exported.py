"""Exported programs: rewritten, saved, loaded where attnrewrite is not imported, and compiled ahead of time."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from click.testing import CliRunner
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, export

import attnrewrite
from attnrewrite import ExportError, OptionError, RewritePass, explain, rewrite
from attnrewrite.backend import collect_reports
from attnrewrite.bench.model_cases import MODELS
from attnrewrite.cli import main
from attnrewrite.patterns import Specimen
from attnrewrite.patterns.registry import specimens
from tests.support.helpers import relative_error

pytestmark = pytest.mark.drawn


class Calls(nn.Module):
    """A function as a module, which is what can be exported."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Any) -> Any:
        return self.function(*inputs)


class Hidden(nn.Module):
    """A model's hidden states alone: a process without the model's library cannot load its class of results."""

    def __init__(self, model: nn.Module, names: tuple[str, ...]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *inputs: Tensor) -> Tensor:
        hidden: Tensor = self.model(**dict(zip(self.names, inputs, strict=True)))[0]
        return hidden


def vit() -> tuple[nn.Module, dict[str, Tensor]]:
    config = transformers.ViTConfig(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=128,
        image_size=32,
        patch_size=8,
    )
    config._attn_implementation = "eager"
    return transformers.ViTModel(config), {"pixel_values": torch.randn(2, 3, 32, 32)}


def model_of(name: str) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """A model and its inputs, of batch 2."""
    if name == "vit":
        model, kwargs = vit()
    else:
        model, _, kwargs = MODELS["small"][name].build()
        kwargs = {each: value.repeat(2 // len(value), 1) for each, value in kwargs.items()}
    return Hidden(model, tuple(kwargs)).eval(), tuple(kwargs.values())


def exported(name: str, model: nn.Module, inputs: tuple[Tensor, ...]) -> ExportedProgram:
    """With dynamic batch, and length where there is one."""
    batch, length = Dim("batch", max=16), Dim("length", min=2, max=64)
    dims = {0: batch} if name == "vit" else {0: batch, 1: length}
    return export(model, inputs, dynamic_shapes={"inputs": tuple(dims for _ in inputs)}, strict=False)


def shorter(name: str, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Other sizes, where they are dynamic: half the batch, and a part of the length."""
    return tuple(value[:1] if name == "vit" else value[:1, :23].contiguous() for value in inputs)


def targets(program: ExportedProgram) -> list[str]:
    return [str(node.target) for node in program.graph.nodes if node.op == "call_function"]


@pytest.mark.parametrize("gradients", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("name", ["bert", "llama", "vit", "t5", "gpt2"])
def test_models_are_rewritten_and_the_source_is_not_changed(name: str, gradients: bool) -> None:
    model, example = model_of(name)
    with torch.set_grad_enabled(gradients):
        program = exported(name, model, example)
        before = targets(program)
        new = rewrite(program)
        report = explain(program)
        assert targets(program) == before and "aten.softmax.int" in before
        if name == "bert" and gradients:
            # Rows without a key have gradients that take an operator of attnrewrite's own.
            assert "torch.no_grad()" in report.graphs[0].sites[0].reason
            assert "aten.softmax.int" in targets(new)
        else:
            assert len(report.rewritten) == len(report.sites) > 0
            assert "aten.softmax.int" not in targets(new)
            assert targets(new).count("aten.scaled_dot_product_attention.default") == len(report.sites)
        for inputs in (example, shorter(name, example)):
            assert relative_error(new.module()(*inputs), model(*inputs)) <= 1e-5


def test_gradients_of_an_exported_program() -> None:
    model, inputs = model_of("llama")
    program = exported("llama", model, inputs)
    found = []
    for module in (program.run_decompositions({}).module(), rewrite(program).module()):
        parameters = [each for _, each in sorted(module.named_parameters())]
        output = module(*inputs)
        loss = (output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum()
        found.append(torch.autograd.grad(loss, parameters, allow_unused=True))
    assert len(found[0]) == len(found[1]) > 5
    for own, new in zip(*found, strict=True):
        assert (own is None) == (new is None)
        if own is not None:
            assert relative_error(new, own) <= 1e-4


LOAD = """
import sys, torch
program, inputs = sys.argv[1:3]
inputs = torch.load(inputs)
with torch.no_grad():
    result = torch.export.load(program).module()(*inputs)
assert "attnrewrite" not in sys.modules
torch.save(result, sys.argv[3])
"""


@pytest.mark.parametrize("name", ["bert", "llama", "vit"])
def test_a_process_that_does_not_import_attnrewrite_runs_it(name: str, tmp_path: Path) -> None:
    """Of packages that are compiled ahead of time it is ``attnrewrite bench exported`` that makes sure."""
    model, example = model_of(name)
    paths = [str(tmp_path / each) for each in ("program.pt2", "inputs.pt", "result.pt")]
    with torch.no_grad():
        new = rewrite(exported(name, model, example))
        torch.export.save(new, paths[0])
        inputs = shorter(name, example)
        torch.save(inputs, paths[1])
        subprocess.run([sys.executable, "-c", LOAD, *paths], check=True, cwd=tmp_path)
        assert relative_error(torch.load(paths[2]), model(*inputs)) <= 1e-5


EXPORTED = [specimen for specimen in specimens() if specimen.name not in ("image_isolated_from_itself",)]
"""Its update in place of an ``as_strided`` view is one that PyTorch does not make functional."""


@pytest.mark.parametrize("specimen", EXPORTED[::4], ids=lambda specimen: specimen.name)
def test_specimens(specimen: Specimen) -> None:
    with torch.no_grad():
        program = export(Calls(specimen.function), tuple(specimen.inputs(0, 12)), strict=False)
        new = rewrite(program)
        inputs = specimen.inputs(1, 12)
        assert relative_error(new.module()(*inputs), specimen.function(*inputs)) <= 1e-5
        assert not any("attnrewrite" in target for target in targets(new))


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT * 0.3).softmax(-1) @ v


def program_of(function: Callable[..., Any], *more: Tensor) -> ExportedProgram:
    inputs = (*torch.randn(3, 2, 4, 8, 16), *more)
    return export(Calls(function), inputs, strict=False)


def test_updates_in_place_are_read_in_their_order() -> None:
    def masked(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        mask = mask.clone()
        scores = q @ k.mT * 0.3
        scores.masked_fill_(mask, -1e9)
        mask.zero_()
        return scores.softmax(-1) @ v + mask.sum()

    mask = torch.rand(8, 8) > 0.5
    with torch.no_grad():
        program = program_of(masked, mask)
        assert len(explain(program).rewritten) == 1
        inputs = (*torch.randn(3, 2, 4, 8, 16), torch.rand(8, 8) > 0.5)
        assert relative_error(rewrite(program).module()(*inputs), masked(*inputs)) <= 1e-5


class Buffered(nn.Module):
    """One mask is a constant of the program, the other part of its state."""

    def __init__(self, persistent: bool) -> None:
        super().__init__()
        self.register_buffer("mask", torch.ones(8, 8, dtype=torch.bool).tril(), persistent=persistent)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.mT * 0.3).masked_fill(~self.mask, float("-inf")).softmax(-1) @ v  # type: ignore[operator]


@pytest.mark.parametrize(("persistent", "mask"), [(False, "causal"), (True, "dense")])
def test_only_what_stays_the_same_is_read(persistent: bool, mask: str) -> None:
    module, inputs = Buffered(persistent), tuple(torch.randn(3, 2, 4, 8, 16))
    with torch.no_grad():
        program = export(module, inputs, strict=False)
        (site,) = explain(program).graphs[0].sites
        assert (site.status, site.mask) == ("rewritten", mask)
        new = rewrite(program).module()
        assert relative_error(new(*inputs), module(*inputs)) <= 1e-5
        if persistent:
            state = {"mask": torch.ones(8, 8, dtype=torch.bool)}
            new.load_state_dict(state)
            module.load_state_dict(state)
            assert relative_error(new(*inputs), module(*inputs)) <= 1e-5


def test_a_pass_over_a_graph() -> None:
    with torch.no_grad():
        gm = program_of(attend).run_decompositions({}).graph_module
        rewriting = RewritePass()
        result = rewriting(gm)
    assert result.modified and result.graph_module is not gm
    assert rewriting.report is not None and len(rewriting.report.rewritten) == 1
    inputs = tuple(torch.randn(3, 2, 4, 8, 16))
    assert relative_error(result.graph_module(*inputs), gm(*inputs)) <= 1e-5
    again = rewriting(result.graph_module)
    assert again.graph_module(*inputs)[0].equal(result.graph_module(*inputs)[0])


def test_a_pass_leaves_a_graph_without_attention_as_it_is() -> None:
    gm = program_of(lambda q, k, v: q + k * v).run_decompositions({}).graph_module
    result = RewritePass()(gm)
    assert not result.modified and result.graph_module is gm


def test_graphs_that_a_pass_does_not_read() -> None:
    with pytest.raises(ExportError, match="updates a tensor in place"):
        RewritePass()(program_of(lambda q, k, v: (q.clone().mul_(2) @ k.mT).softmax(-1) @ v).graph_module)
    with pytest.raises(ExportError, match="has no fake value"):
        RewritePass()(torch.fx.symbolic_trace(lambda x: torch.relu(x) + 1))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"inner_backend": "inductor"}, "has no meaning for an exported program"),
        ({"assume_attended_rows": 3}, "takes True or False"),
        ({"kernels": "nativ"}, "nativ"),
    ],
)
def test_wrong_options(options: dict[str, Any], words: str) -> None:
    with pytest.raises(OptionError, match=words):
        rewrite(program_of(attend), options=options)


def test_a_kernel_of_a_package_is_an_error() -> None:
    """FlexAttention calls a function of the scores, which a saved program does not hold."""

    def capped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (4 * torch.tanh(q @ k.mT / 4)).softmax(-1) @ v

    with torch.no_grad():
        program = program_of(capped)
        with pytest.raises(ExportError, match="flex was asked for, and calls flex_attention"):
            rewrite(program, options={"kernels": "flex"})
        assert "aten.softmax.int" in targets(rewrite(program))
        assert "score_mod" in explain(program).graphs[0].sites[0].reason


def test_explain_takes_no_inputs_with_a_program() -> None:
    with pytest.raises(ExportError, match="read, not run"):
        explain(program_of(attend), torch.randn(2))


def test_the_command(tmp_path: Path) -> None:
    old, new = tmp_path / "old.pt2", tmp_path / "new.pt2"
    torch.export.save(program_of(attend), old)
    result = CliRunner().invoke(main, ["rewrite", str(old), "-o", str(new)])
    assert result.exit_code == 0, result.output
    assert "1 of 1" in result.output and f"Wrote {new}" in result.output
    inputs = tuple(torch.randn(3, 2, 4, 8, 16))
    assert relative_error(torch.export.load(new).module()(*inputs), attend(*inputs)) <= 1e-5
    (tmp_path / "no.pt2").write_text("nothing")
    result = CliRunner().invoke(main, ["rewrite", str(tmp_path / "no.pt2"), "-o", str(new)])
    assert result.exit_code == 2 and "torch.export.load" in result.output


def test_calls_that_stand_in_the_source_stay() -> None:
    program = program_of(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True))
    assert targets(rewrite(program)).count("aten.scaled_dot_product_attention.default") == 1
    assert attnrewrite.rewrite is rewrite


def test_aot_compile_gives_a_function_that_is_saved_and_loaded(tmp_path: Path) -> None:
    """What a call would check or choose is left out: ``attention_backend`` has no effect, and buffers are not read."""
    inputs = tuple(torch.randn(3, 2, 4, 8, 16))
    compiled: Any = torch.compile(attend, backend="attnrewrite", fullgraph=True)
    with torch._dynamo.config.patch(enable_aot_compile=True), collect_reports() as graphs:
        saved = compiled.aot_compile((inputs, {}))
    assert [site.status for graph in graphs for site in graph.sites] == ["rewritten"]
    path = str(tmp_path / "attend")
    saved.save_compiled_function(path)
    with open(path, "rb") as file:
        loaded = torch.compiler.load_compiled_function(file)
    assert relative_error(loaded(*inputs), attend(*inputs)) <= 1e-5


def test_branches_get_kernels_of_pytorch_as_well() -> None:
    """What only FlexAttention computes stays, in a branch as outside of it."""

    def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.bmm(torch.bmm(q, k.transpose(-1, -2) * 0.3).softmax(-1), v).sin()

    def capped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.bmm((4 * torch.tanh(torch.bmm(q, k.transpose(-1, -2)) / 4)).softmax(-1), v).sin()

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        result: Tensor = torch.cond(q.sum() > 0, plain, capped, (q, k, v))
        return result

    with torch.no_grad():
        # Not views of one tensor, which torch.cond does not take.
        program = export(Calls(function), tuple(torch.randn(4, 8, 16) for _ in range(3)), strict=False)
        found = {site.name: site.status for site in explain(program).graphs[0].sites}
        assert found == {"true_graph_0.site0": "rewritten", "false_graph_0.site0": "kept"}
        new = rewrite(program).module()
        for shift in (1.0, -1.0):
            q, k, v = (torch.randn(4, 8, 16) for _ in range(3))
            assert relative_error(new(q + shift, k, v), function(q + shift, k, v)) <= 1e-5
        with pytest.raises(ExportError, match="flex was asked for"):
            rewrite(program, options={"kernels": "flex"})


def test_a_region_without_gradients_is_for_inference() -> None:
    """PyTorch's functional program has gradients there."""

    class Teacher(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with torch.no_grad():
                teacher = (q @ k.mT).softmax(-1) @ v
            return (q @ k.mT).softmax(-1) @ v + teacher

    inputs = tuple(torch.randn(1, 2, 6, 8) for _ in range(3))
    program = torch.export.export(Teacher(), inputs)
    with pytest.raises(ExportError, match=r"region of torch\.no_grad"):
        attnrewrite.rewrite(program)
    with torch.no_grad():
        new = attnrewrite.rewrite(program)
        assert relative_error(new.module()(*inputs), Teacher()(*inputs)) <= 1e-5
