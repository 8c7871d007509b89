"""Another option, kernel, torch or model never meets a graph that is not its own, nor does a damaged file serve."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import attnrewrite
from attnrewrite.backend import collect_reports
from attnrewrite.warm_start import directory
from attnrewrite.warm_start.codec import NotStorable, decoded_graph
from tests.warm_start.conftest import Store
from tests.warm_start.test_stored_graphs import attention, heads


def scaled(scale: float) -> Callable[..., Tensor]:
    def function(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return torch.softmax(query @ key.transpose(-2, -1) * scale, -1) @ value

    return function


def test_another_number_in_the_model(store: Store) -> None:
    inputs = heads()
    store.compiled(scaled(0.5), *inputs)
    found = store.compiled(scaled(0.25), *inputs)
    assert found.was_stored == [False]
    torch.testing.assert_close(found.result, scaled(0.25)(*inputs))
    assert store.compiled(scaled(0.5), *inputs).was_stored == [True]


EDITED = """
import torch
def attention(query, key, value):
    scores = query @ key.transpose(-2, -1){edit}
    return torch.softmax(scores, -1) @ value
"""


@pytest.mark.parametrize("edit", [" * 2", "\n    scores = scores.tril()", "\n"])
def test_an_edited_model(store: Store, tmp_path: Path, edit: str) -> None:
    """The last edit moves lines alone, which the report names."""

    def loaded(edit: str) -> Callable[..., Any]:
        file = tmp_path / "edited.py"
        file.write_text(EDITED.format(edit=edit))
        names: dict[str, Any] = {}
        exec(compile(file.read_text(), str(file), "exec"), names)
        function: Callable[..., Any] = names["attention"]
        return function

    inputs = heads()
    store.compiled(loaded(""), *inputs)
    assert store.compiled(loaded(""), *inputs).was_stored == [True]
    found = store.compiled(loaded(edit), *inputs)
    assert found.was_stored == [False]
    torch.testing.assert_close(found.result, loaded(edit)(*inputs))


@pytest.mark.parametrize(
    "inputs",
    [
        heads(7),
        [tensor.double() for tensor in heads()],
        [*heads()[:2], heads()[2].transpose(1, 2).contiguous().transpose(1, 2)],
    ],
    ids=["length", "dtype", "strides"],
)
def test_other_inputs(store: Store, inputs: list[Tensor]) -> None:
    store.compiled(attention, *heads())
    found = store.compiled(attention, *inputs)
    assert found.was_stored == [False]
    torch.testing.assert_close(found.result, attention(*inputs))


def test_an_input_that_has_a_gradient_or_is_a_parameter(store: Store) -> None:
    query, key, value = heads()
    store.compiled(attention, query, key, value)
    assert store.compiled(attention, query.requires_grad_(), key, value).was_stored == [False]
    assert store.compiled(attention, nn.Parameter(query), key, value).was_stored == [False]
    with torch.no_grad():
        assert store.compiled(attention, query, key, value).was_stored == [False]


def test_two_inputs_that_share_memory(store: Store) -> None:
    both = torch.randn(2, 2, 4, 6, 8)
    store.compiled(attention, both[0].clone(), both[1].clone(), heads()[2])
    assert store.compiled(attention, both[0], both[1], heads()[2]).was_stored == [False]


@pytest.mark.parametrize(
    "options",
    [
        {"assume_attended_rows": True},
        {"checks": True},
        {"fuse_projections": True},
        {"kernels": "_native_math"},
        {"kernel_rules": {"*": "_native_math"}},
    ],
    ids=lambda options: next(iter(options)),
)
def test_another_option(store: Store, options: dict[str, Any]) -> None:
    store.compiled(attention, *heads())
    found = store.compiled(attention, *heads(), **options)
    assert found.was_stored == [False]
    assert (found.kernels == ["_native_math"]) == bool({"kernels", "kernel_rules"} & options.keys())
    assert store.compiled(attention, *heads(), **options).was_stored == [True]


def test_another_kernel(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    assert store.compiled(attention, *heads()).kernels == ["native"]
    with attnrewrite.attention_backend("_native_math"):
        assert store.compiled(attention, *heads()).kernels == ["_native_math"]
    monkeypatch.setenv("ATTNREWRITE_KERNELS", "_native_math")
    found = store.compiled(attention, *heads())
    assert found.was_stored == [False] and found.kernels == ["_native_math"]


def test_a_stored_graph_is_compiled_again_for_other_kernels(store: Store) -> None:
    inputs = heads()
    store.compiled(attention, *inputs)
    torch.compiler.reset()
    compiled = torch.compile(attention, backend="attnrewrite", options={"inner_backend": "eager"})
    compiled(*inputs)
    with attnrewrite.attention_backend("_native_math"), collect_reports(code=False) as reports:
        torch.testing.assert_close(compiled(*inputs), attention(*inputs))
    assert [site.kernel for report in reports for site in report.sites] == ["_native_math"]


def test_other_settings_of_torch(store: Store) -> None:
    store.compiled(attention, *heads())
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        assert store.compiled(attention, *heads()).was_stored == [False]
    with torch.autocast("cpu"):
        assert store.compiled(attention, *heads()).was_stored == [False]
    torch.use_deterministic_algorithms(True)
    try:
        assert store.compiled(attention, *heads()).was_stored == [False]
    finally:
        torch.use_deterministic_algorithms(False)
    assert store.compiled(attention, *heads()).was_stored == [True]


def test_another_torch_and_another_attnrewrite(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    store.compiled(attention, *heads())
    with monkeypatch.context() as changed:
        changed.setattr(torch.version, "git_version", "another")
        assert store.compiled(attention, *heads()).was_stored == [False]
    with monkeypatch.context() as changed:
        changed.setattr("attnrewrite.warm_start.key._own_source", lambda: "another")
        assert store.compiled(attention, *heads()).was_stored == [False]
    assert store.compiled(attention, *heads()).was_stored == [True]


# -- files -------------------------------------------------------------------------------------------------------------


def _truncated(text: str) -> str:
    return text[: len(text) // 2]


def _tampered(text: str) -> str:
    """The scale, or whatever number comes first, is another."""
    changed = text.replace('"float": "0x1', '"float": "0x2', 1)
    assert changed != text
    return changed


@pytest.mark.parametrize(
    "damage",
    [_truncated, _tampered, lambda text: "", lambda text: "\x00" * 99],
    ids=["truncated", "tampered", "empty", "zeros"],
)
def test_a_damaged_file(store: Store, damage: Callable[[str], str], caplog: pytest.LogCaptureFixture) -> None:
    inputs = heads()
    store.compiled(attention, *inputs)
    (file,) = store.files
    whole = file.read_text()
    file.write_text(damage(whole))
    with caplog.at_level(logging.WARNING, "attnrewrite"):
        found = store.compiled(attention, *inputs)
    assert found.was_stored == [False] and "is damaged" in caplog.text
    torch.testing.assert_close(found.result, attention(*inputs))
    # It is written again.
    assert file.read_text() == whole and store.compiled(attention, *inputs).was_stored == [True]


def test_a_file_under_another_name(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    inputs = heads()
    store.compiled(scaled(0.5), *inputs)
    (other,) = store.files
    store.compiled(scaled(0.25), *inputs)
    (own,) = set(store.files) - {other}
    own.write_text(other.read_text())
    found = store.compiled(scaled(0.25), *inputs)
    assert found.was_stored == [False] and "is damaged" in caplog.text
    torch.testing.assert_close(found.result, scaled(0.25)(*inputs))


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
def test_a_directory_that_others_can_write_to(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    store.compiled(attention, *heads())
    store.directory.chmod(0o777)
    directory._say_once.cache_clear()
    found = store.compiled(scaled(0.25), *heads())
    assert found.was_stored == [False] and len(store.files) == 1
    assert store.compiled(attention, *heads()).was_stored == [False]
    assert "others can write to" in caplog.text


@pytest.mark.parametrize(
    "name",
    [
        "function:os:system",
        "function:torch:load",
        "function:torch.hub:load",
        "operator:mine::run.default",
        "higher_order:wrap",
        "os.system",
    ],
)
def test_a_file_names_nothing_but_what_compiled_graphs_call(name: str) -> None:
    data = {
        "class": "G",
        "texts": [],
        "attributes": {},
        "nodes": [["call_function", "x", name, {"tuple": []}, {"dict": []}, {}]],
    }
    with pytest.raises(NotStorable, match="is not called by compiled graphs"):
        decoded_graph(data)


def test_the_files_hold_data_alone(store: Store) -> None:
    store.compiled(attention, *heads())
    (file,) = store.files
    digest, _, content = file.read_text().partition("\n")
    assert len(digest) == 40 and json.loads(content)["graph"]["nodes"]
    assert store.directory.stat().st_mode & 0o077 == 0


def test_the_oldest_files_are_removed(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(directory, "_MOST_FILES", 2)
    for number in range(4):
        store.compiled(scaled(0.5 + number), *heads())
        os.utime(store.files[-1])
    assert len(store.files) == 2
    assert store.compiled(scaled(3.5), *heads()).was_stored == [True]


# -- processes ---------------------------------------------------------------------------------------------------------

PROCESS = """
import json, sys, torch
from attnrewrite.backend import collect_reports
from torch._dynamo.utils import counters

def attention(query, key, value):
    return torch.softmax(query @ key.transpose(-2, -1) / 3, -1) @ value

torch.manual_seed(0)
inputs = torch.randn(3, 2, 4, 6, 8).unbind()
with torch.no_grad(), collect_reports(code=False) as reports:
    result = torch.compile(attention, backend="attnrewrite", options=json.loads(sys.argv[1]))(*inputs)
    error = float((result - attention(*inputs)).abs().max())
print(json.dumps({
    "stored": any("warm_start" in note for note in reports[0].notes),
    "kernel": reports[0].sites[0].kernel,
    "inductor": counters["inductor"]["fxgraph_cache_hit"],
    "error": error,
}))
"""


def test_processes_with_inductor(tmp_path: Path) -> None:
    script = tmp_path / "process.py"
    script.write_text(PROCESS)
    environment = {
        **os.environ,
        "ATTNREWRITE_WARM_START": "1",
        "ATTNREWRITE_CACHE_DIR": str(tmp_path / "own"),
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor"),
    }

    def run(**options: Any) -> dict[str, Any]:
        command = [sys.executable, str(script), json.dumps(options)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        assert found.pop("error") < 1e-6
        return found

    assert run() == {"stored": False, "kernel": "native", "inductor": 0}
    assert run() == {"stored": True, "kernel": "native", "inductor": 1}
    assert run(kernels="_native_math") == {"stored": False, "kernel": "_native_math", "inductor": 0}
    assert run() == {"stored": True, "kernel": "native", "inductor": 1}
