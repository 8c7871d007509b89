"""The command line, on real modules in a directory of their own."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

from attnrewrite.cli import main
from attnrewrite.doctor import PACKAGES_NOTE, Diagnosis, KernelCheck, diagnose
from attnrewrite.kernels import registered_kernels

ZOO = """
import torch
from torch import nn

CALLS = []


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.project = nn.Linear(16, 48)
        self.drop = nn.Dropout(0.0)

    def forward(self, x, scale=0.25):
        CALLS.append((self.training, torch.is_grad_enabled()))
        q, k, v = self.project(x).chunk(3, -1)
        return self.drop(torch.softmax(q @ k.transpose(-2, -1) * scale, -1)) @ v


class Unscaled(Attention):
    def forward(self, x):
        q, k, v = self.project(x).chunk(3, -1)
        return torch.softmax(q @ k.transpose(-2, -1), -1) @ v


class NoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self):
        return self.weight.sin()


x = torch.randn(2, 8, 16)


def tuple_args(): return Attention(), (x,)
def tuple_kwargs(): return Attention(), (x,), {"scale": 0.5}
def mapping(): return {"model": Attention(), "kwargs": {"x": x}}
def only_model(): return Attention()
def no_inputs(): return NoInputs()
def unscaled(): return Unscaled(), (x,)
def plain_function(): return torch.sin, (x,)
def args_not_a_tuple(): return Attention(), x
def kwargs_not_a_dict(): return Attention(), (x,), [1]
def four(): return Attention(), (x,), {}, 1
def not_a_model(): return 3, (x,)
def wrong_key(): return {"model": Attention(), "inputs": (x,)}
def no_model(): return {"args": (x,)}
def takes_arguments(size): return Attention(), (x,)
def fails(): raise KeyError("layer_7\\nand more")
def wrong_shape(): return Attention(), (torch.randn(2, 3),)
not_callable = 7


class Zoo:
    @staticmethod
    def nested(): return Attention(), (x,)
"""


@pytest.fixture
def zoo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current directory, with modules in it that only the command line's own search finds."""
    (tmp_path / "zoo_of_models.py").write_text(ZOO)
    (tmp_path / "zoo_needs_more.py").write_text("import no_such_package_anywhere\n")
    (tmp_path / "zoo_syntax.py").write_text("def broken(:\n")
    (tmp_path / "zoo_raises.py").write_text("1 / 0\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    torch._dynamo.reset()
    yield tmp_path
    for name in [name for name in sys.modules if name.startswith("zoo_")]:
        del sys.modules[name]


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, list(arguments))


def explain(factory: str, *options: str) -> Result:
    return run("explain", f"zoo_of_models:{factory}", *options)


def assert_one_line_error(result: Result, *expected: str) -> None:
    assert result.exit_code == 2, result.output
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("Error: ")
    for text in expected:
        assert text in lines[0]
    assert not result.stdout


@pytest.mark.parametrize("factory", ["tuple_args", "tuple_kwargs", "mapping", "Zoo.nested"])
def test_explain_shows_the_rewritten_attention(zoo: Path, factory: str) -> None:
    result = explain(factory)
    assert result.exit_code == 0, result.output
    assert "1 of 1 attention sites rewritten" in result.stdout
    assert "zoo_of_models.py" in result.stdout


def test_explain_json(zoo: Path) -> None:
    result = explain("tuple_args", "--json")
    assert result.exit_code == 0, result.output
    (graph,) = json.loads(result.stdout)["graphs"]
    (site,) = graph["sites"]
    assert site["status"] == "rewritten" and site["query_shape"][-2:] == ["8", "16"]


def test_explain_html(zoo: Path) -> None:
    result = explain("tuple_args", "--html", "page.html")
    assert result.exit_code == 0, result.output
    page = (zoo / "page.html").read_text(encoding="utf-8")
    assert "scaled_dot_product_attention" in page and "1 of 1 attention sites rewritten" in page
    assert "Wrote page.html" in result.stderr
    unwritable = explain("tuple_args", "--html", "missing/page.html")
    assert unwritable.exit_code == 2
    assert "missing/page.html: No such file or directory" in unwritable.stderr


def test_explain_dynamic_shows_symbolic_sizes(zoo: Path) -> None:
    result = explain("unscaled", "--dynamic", "--json")
    assert result.exit_code == 0, result.output
    (site,) = json.loads(result.stdout)["graphs"][0]["sites"]
    assert any(size.startswith("s") for size in site["query_shape"])


def test_explain_evaluates_without_gradients_unless_told_to_train(zoo: Path) -> None:
    assert explain("tuple_args").exit_code == 0
    assert explain("tuple_args", "--train").exit_code == 0
    calls = sys.modules["zoo_of_models"].CALLS
    assert (False, False) in calls and (True, True) in calls


def test_explain_a_model_without_inputs_and_a_function(zoo: Path) -> None:
    for factory in ("no_inputs", "plain_function"):
        result = explain(factory)
        assert result.exit_code == 0, result.output
        assert "0 of 0 attention sites" in result.stdout


def test_explain_passes_the_inner_backend_on(zoo: Path) -> None:
    result = explain("tuple_args", "--inner-backend", "aot_eager", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["graphs"][0]["inner_backend"] == "aot_eager"
    assert_one_line_error(explain("tuple_args", "--inner-backend", "no_such"), "no_such", "inductor")


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("zoo_of_models", ["package.module:factory"]),
        (":factory", ["package.module:factory"]),
        ("no_such_module_here:f", ["No module named 'no_such_module_here'", "looked in"]),
        ("zoo_needs_more:f", ["zoo_needs_more", "No module named 'no_such_package_anywhere'"]),
        ("zoo_syntax:f", ["zoo_syntax", "SyntaxError"]),
        ("zoo_raises:f", ["zoo_raises", "ZeroDivisionError: division by zero", "--traceback"]),
        ("zoo_of_models:tuple_arg", ["no attribute 'tuple_arg'", "did you mean tuple_args"]),
        ("zoo_of_models:only_Model", ["did you mean only_model"]),
        ("zoo_of_models:not_callable", ["int", "takes no arguments"]),
        ("zoo_of_models:takes_arguments", ["without arguments", "(size)"]),
        ("zoo_of_models:only_model", ["(x, scale=0.25)", "return (model, args)"]),
        ("zoo_of_models:args_not_a_tuple", ["Tensor", "(input_ids,)"]),
        ("zoo_of_models:kwargs_not_a_dict", ["list", "dict"]),
        ("zoo_of_models:four", ["a tuple of 4", "(model, args, kwargs)"]),
        ("zoo_of_models:not_a_model", ["int as the model"]),
        ("zoo_of_models:wrong_key", ["'inputs'", "keys model, args, kwargs"]),
        ("zoo_of_models:no_model", ["no key 'model'"]),
        ("zoo_of_models:fails", ["zoo_of_models:fails() raised KeyError", "layer_7", "--traceback"]),
        ("zoo_of_models:wrong_shape", ["the model raised", "--traceback"]),
    ],
)
def test_a_mistake_is_one_line(zoo: Path, target: str, expected: list[str]) -> None:
    assert_one_line_error(run("explain", target), *expected)


def test_traceback_shows_it_all(zoo: Path) -> None:
    result = explain("fails", "--traceback")
    assert isinstance(result.exception, KeyError)


def test_the_installed_command_finds_local_modules(zoo: Path) -> None:
    """Through a real process whose path does not begin with the current directory, as that of a console script."""
    code = "import sys; sys.path.remove(''); from attnrewrite.cli import main; main()"
    command = [sys.executable, "-c", code]
    done = subprocess.run([*command, "explain", "zoo_of_models:no_such"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "no attribute 'no_such'" in done.stderr and "Traceback" not in done.stderr


def test_help_and_version_do_not_wait_for_torch() -> None:
    code = "import sys; from attnrewrite.cli import main; main(['--help'], standalone_mode=False)"
    code += "; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert "doctor" in done.stdout and "explain" in done.stdout
    assert done.stdout.splitlines()[-1] == "False"
    assert run("--version").output.startswith("attnrewrite, version ")


def test_doctor_names_what_runs_here() -> None:
    result = run("doctor")
    assert result.exit_code == 0, result.output
    for expected in (
        torch.__version__,
        "cpu",
        "flash-attn",
        "sageattention",
        "kernels of these packages by name",
        "math on cpu",
    ):
        assert expected in result.stdout


def test_doctor_keeps_to_a_page_where_there_is_no_terminal() -> None:
    lines = run("doctor").stdout.splitlines()
    assert max(map(len, lines)) <= 120
    assert len(lines) < 60, "a line for each package that is missing, not one for each kernel"


def lines_of(*kernels: KernelCheck) -> list[str]:
    """The lines on kernels of other packages."""
    text = Diagnosis((), (), (), kernels, (), ()).to_text()
    lines = [" ".join(line.split()) for line in text.partition("Kernels of other packages\n")[2].splitlines()]
    return [line for line in lines if line.startswith(("yes ", "no "))]


def test_kernels_that_wait_for_one_package_share_a_line() -> None:
    missing = "the package flash-attn is not installed"
    assert lines_of(
        KernelCheck("native", True, "part of torch"),
        KernelCheck("flash", False, f"{missing} (pip install flash-attn)", "flash-attn", "pip install flash-attn"),
        KernelCheck("sage", True, "sageattention 1.0.6", "sageattention", "pip install sageattention"),
        KernelCheck("flash_varlen", False, f"{missing} (built)", "flash-attn", "built"),
        KernelCheck(
            "aiter", False, "amd-aiter is installed but cannot be used: old", "amd-aiter", "pip install amd-aiter"
        ),
    ) == [
        "yes sage sageattention 1.0.6",
        "no flash-attn not installed: flash, flash_varlen (pip install flash-attn; or built)",
        "no amd-aiter installed but cannot be used: old: aiter (pip install amd-aiter)",
    ]


def test_doctor_names_every_kernel() -> None:
    text = run("doctor").stdout
    assert all(kernel.name in text for kernel in registered_kernels())
    listed = json.loads(run("doctor", "--json").stdout)["kernels"]
    assert [check["name"] for check in listed] == [kernel.name for kernel in registered_kernels()]


def test_doctor_json_is_the_diagnosis() -> None:
    data = json.loads(run("doctor", "--json").stdout)
    assert data == json.loads(diagnose().to_json())
    assert data["packages_note"] == PACKAGES_NOTE
    assert [check["ok"] for check in data["sdpa_backends"] if check["name"] == "math on cpu"] == [True]
    assert all(check["detail"] for section in ("system", "devices", "kernels", "packages") for check in data[section])


def test_a_broken_package_is_reported_in_the_loaders_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sageattention.py").write_text("import ctypes\nctypes.CDLL('libsage_is_not_here.so')\n")
    info = tmp_path / "sageattention-1.0.6.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: sageattention\nVersion: 1.0.6\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    (check,) = [check for check in diagnose().packages if check.name == "sageattention"]
    assert not check.ok
    assert "1.0.6 is installed but does not load" in check.detail and "libsage_is_not_here.so" in check.detail


@pytest.mark.gpu
def test_doctor_says_what_is_known_to_be_wrong() -> None:
    checks = diagnose().known_wrong
    assert {"native", "_native_cudnn"} <= {check.name for check in checks}
    assert all(check.ok and "https://" in check.detail for check in checks)


def test_diagnosis_text_is_plain() -> None:
    text = str(diagnose())
    assert "\x1b" not in text and "Inner compiler" in text
