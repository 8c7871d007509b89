"""Another option, kernel, torch or model never meets a graph that is not its own, nor does a damaged file serve."""

from __future__ import annotations

import functools
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
import torch.nn.functional as F
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
        changed.setattr(torch.backends.cudnn, "version", lambda: 92900)
        assert store.compiled(attention, *heads()).was_stored == [False]
    with monkeypatch.context() as changed:
        changed.setattr("attnrewrite.warm_start.key._own_source", lambda: "another")
        assert store.compiled(attention, *heads()).was_stored == [False]
    assert store.compiled(attention, *heads()).was_stored == [True]


# -- other code of the same name ---------------------------------------------------------------------------------------


def _attends(split: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    def function(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return attention(split(query), split(key), split(value))

    return function


@pytest.mark.parametrize("namespace", ["warm_start_test", "aten"])
@pytest.mark.parametrize("called", ["packet", "overload"])
def test_an_operator_of_the_user_with_another_implementation(store: Store, namespace: str, called: str) -> None:
    """It decomposes in capture, so that nothing of it is left in the rewritten graph."""

    def apart(x: Tensor, heads: int) -> Tensor:
        return x.view(1, 6, heads, -1).transpose(1, 2)

    def interleaved(x: Tensor, heads: int) -> Tensor:
        return x.view(1, 6, -1, heads).permute(0, 3, 1, 2)

    for split in (apart, interleaved):
        library = torch.library.Library(namespace, "FRAGMENT")  # type: ignore[no-untyped-call]
        try:
            name = f"split_{called}"
            library.define(f"{name}(Tensor(a) x, int heads) -> Tensor(a)")  # type: ignore[no-untyped-call]
            library.impl(name, split, "CompositeImplicitAutograd")  # type: ignore[no-untyped-call]
            packet = getattr(getattr(torch.ops, namespace), name)
            operator = packet if called == "packet" else packet.default
            function = _attends(lambda x, operator=operator: operator(x, 2))  # type: ignore[misc]
            inputs = [torch.randn(1, 6, 16) for _ in range(3)]
            found = store.compiled(function, *inputs)
            assert found.kernels == ["native"]
            torch.testing.assert_close(found.result, function(*inputs))
        finally:
            library._destroy()  # type: ignore[no-untyped-call]
    assert store.files == []


@pytest.mark.parametrize("of", [F.softmax, torch.softmax], ids=["python", "builtin, which has no signature"])
def test_a_function_that_has_the_name_of_one_of_torch(store: Store, of: Callable[..., Tensor]) -> None:
    for factor in (4.0, 0.1):

        @torch.compiler.allow_in_graph  # type: ignore[untyped-decorator]
        @functools.wraps(of)
        def softmax(x: Tensor, dim: int, factor: float = factor) -> Tensor:
            return torch.softmax(x * factor, dim)

        def function(query: Tensor, key: Tensor, value: Tensor, softmax: Any = softmax) -> Tensor:
            weights: Tensor = softmax(query @ key.transpose(-2, -1), -1)
            return weights @ value

        inputs = heads()
        found = store.compiled(function, *inputs)
        assert found.kernels == ["native"]
        torch.testing.assert_close(found.result, function(*inputs))
    assert store.files == []


def test_an_operator_of_torch_that_is_replaced(store: Store) -> None:
    library = torch.library.Library("aten", "IMPL")  # type: ignore[no-untyped-call]
    try:
        library.impl("celu", lambda x, alpha=1.0: x.clone(), "CPU")  # type: ignore[no-untyped-call]
        store.compiled(attention, *heads())
        assert store.files == []
    finally:
        library._destroy()  # type: ignore[no-untyped-call]


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
        "operator:mine.run.default",
        "higher_order:wrap",
        "os.system",
    ],
)
def test_a_file_names_nothing_but_what_rewritten_graphs_call(name: str) -> None:
    data = {
        "class": "G",
        "texts": [],
        "attributes": {},
        "nodes": [["call_function", "x", name, {"tuple": []}, {"dict": []}, {}]],
    }
    with pytest.raises(NotStorable, match="is not called by rewritten graphs"):
        decoded_graph(data)


COMMAND = "__import__('os').system('touch {}')"


def _with_default(data: dict[str, Any], command: str) -> None:
    node = next(node for node in data["nodes"] if node[0] == "placeholder")
    node[2] += f"={command}"


def _with_method(data: dict[str, Any], command: str) -> None:
    data["nodes"].insert(-1, ["call_method", "more", "numpy", {"tuple": [{"node": 0}]}, {"dict": []}, {}])


def _with_class(data: dict[str, Any], command: str) -> None:
    data["class"] = f"X({command})"


def _with_name(data: dict[str, Any], command: str) -> None:
    data["nodes"][0][1] = f"x = {command}"


def _with_keyword(data: dict[str, Any], command: str) -> None:
    node = next(node for node in data["nodes"] if node[0] == "call_function")
    node[4]["dict"].append([f"x={command}, y", 1])


def _with_operator(data: dict[str, Any], command: str) -> None:
    call = ["call_function", "more", "function:_operator:methodcaller", {"tuple": ["numpy"]}, {"dict": []}, {}]
    data["nodes"].insert(-1, call)


def _with_attribute(data: dict[str, Any], command: str) -> None:
    data["nodes"].insert(-1, ["get_attr", "more", "__class__", {"tuple": []}, {"dict": []}, {}])


def _with_another_kind(data: dict[str, Any], command: str) -> None:
    data["nodes"][-1][3] = {"tuple": [{"hub": "load"}]}


def _without_a_part(data: dict[str, Any], command: str) -> None:
    del data["attributes"]


def _in_another_shape(data: dict[str, Any], command: str) -> None:
    data["nodes"][0] = "placeholder"


@pytest.mark.parametrize(
    "change",
    [
        *(_with_default, _with_method, _with_class, _with_name, _with_keyword, _with_operator, _with_attribute),
        *(_with_another_kind, _without_a_part, _in_another_shape),
    ],
    ids=lambda change: change.__name__,
)
def test_a_file_with_a_digest_made_anew_runs_no_code(
    store: Store, tmp_path: Path, change: Callable[[dict[str, Any], str], None]
) -> None:
    inputs = heads()
    store.compiled(attention, *inputs)
    (file,) = store.files
    data = json.loads(file.read_text().partition("\n")[2])
    change(data["graph"], COMMAND.format(tmp_path / "ran"))
    content = json.dumps(data)
    file.write_text(f"{directory._digest(file.stem, content)}\n{content}")
    found = store.compiled(attention, *inputs)
    assert found.was_stored == [False] and not (tmp_path / "ran").exists()
    torch.testing.assert_close(found.result, attention(*inputs))


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
