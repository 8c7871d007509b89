"""Files that hold what this package does not write, with a digest of their own: logged, and written anew."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from attnrewrite.warm_start import directory
from attnrewrite.warm_start.codec import NotStorable, decoded_graph
from tests.warm_start.conftest import Store
from tests.warm_start.test_stored_graphs import attention, heads


def write(file: Path, content: str) -> None:
    file.write_text(f"{directory._digest(file.stem, content)}\n{content}")


def check_written_anew(store: Store, caplog: pytest.LogCaptureFixture, words: str) -> None:
    inputs = heads()
    with caplog.at_level(logging.WARNING, "attnrewrite"):
        found = store.compiled(attention, *inputs)
    assert found.was_stored == [False] and words in caplog.text
    torch.testing.assert_close(found.result, attention(*inputs))
    assert store.compiled(attention, *inputs).was_stored == [True]


@pytest.mark.parametrize(
    "content",
    ["no JSON", "", "[]", "5", "[" * 100_000, "1" * 5000, '{"graph": '],
    ids=["words", "empty", "list", "number", "deep", "long", "half"],
)
def test_content_that_is_no_object(store: Store, caplog: pytest.LogCaptureFixture, content: str) -> None:
    store.compiled(attention, *heads())
    write(store.files[0], content)
    check_written_anew(store, caplog, "is damaged")


def _float_beyond_all(data: dict[str, Any]) -> None:
    data["graph"]["nodes"][-2][3]["tuple"].append({"float": "0x1p99999"})


def _arguments_in_a_list(data: dict[str, Any]) -> None:
    data["graph"]["nodes"][-2][3] = {"list": []}


def _notes_of_a_number(data: dict[str, Any]) -> None:
    data["report"]["notes"] = 5


def _a_note_that_is_no_text(data: dict[str, Any]) -> None:
    data["report"]["notes"] = [5]


def _a_verdict_that_is_no_truth(data: dict[str, Any]) -> None:
    data["report"]["sites"][0]["verdicts"][0]["willing"] = "yes"


def _a_status_of_its_own(data: dict[str, Any]) -> None:
    data["report"]["sites"][0]["status"] = "won"


def _varies_by_a_number(data: dict[str, Any]) -> None:
    data["varies"] = 1


def _buffers_of_text(data: dict[str, Any]) -> None:
    data["buffers"] = {"0": "no"}


def _without_an_output(data: dict[str, Any]) -> None:
    data["graph"]["nodes"].pop()


def _without_nodes(data: dict[str, Any]) -> None:
    data["graph"]["nodes"] = []


def _without_an_input(data: dict[str, Any]) -> None:
    nodes = data["graph"]["nodes"]
    data["graph"]["nodes"] = [
        nodes[0],
        ["output", "output", "output", {"tuple": [{"tuple": [{"node": 0}]}]}, {"dict": []}, {}],
    ]


def _with_one_output_more(data: dict[str, Any]) -> None:
    results = data["graph"]["nodes"][-1][3]["tuple"][0]
    (kind,) = results
    results[kind].append({"node": 0})


def _a_node_from_the_end(data: dict[str, Any]) -> None:
    data["graph"]["nodes"][-1][3] = {"tuple": [{"tuple": [{"node": -1}]}]}


@pytest.mark.parametrize(
    "change",
    [
        *(_float_beyond_all, _arguments_in_a_list, _notes_of_a_number, _a_note_that_is_no_text),
        *(_a_verdict_that_is_no_truth, _a_status_of_its_own, _varies_by_a_number, _buffers_of_text),
        *(_without_an_output, _without_nodes, _without_an_input, _with_one_output_more, _a_node_from_the_end),
    ],
    ids=lambda change: change.__name__,
)
def test_content_in_another_form(
    store: Store, caplog: pytest.LogCaptureFixture, change: Callable[[dict[str, Any]], None]
) -> None:
    store.compiled(attention, *heads())
    (file,) = store.files
    data = json.loads(file.read_text().partition("\n")[2])
    change(data)
    write(file, json.dumps(data))
    check_written_anew(store, caplog, "a stored graph is not used, and written anew")


@pytest.mark.parametrize(
    "name",
    ["from_file.default", "fill_.Scalar", "set_.source_Tensor", "resize_.default", "set_data.default", "add_.Tensor"],
)
def test_operators_that_read_files_or_write_to_tensors(name: str) -> None:
    node = ["call_function", "x", f"operator:aten.{name}", {"tuple": []}, {"dict": []}, {}]
    with pytest.raises(NotStorable, match="is not called by rewritten graphs"):
        decoded_graph({"class": "G", "texts": [], "attributes": {}, "nodes": [node]})


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="named pipes of POSIX")
def test_a_pipe_in_place_of_a_file(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    """It would be read for ever."""
    store.compiled(attention, *heads())
    (file,) = store.files
    file.unlink()
    os.mkfifo(file)
    directory._say_once.cache_clear()
    check_written_anew(store, caplog, "is none that was written here")


def test_a_file_that_is_too_large(
    store: Store, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.compiled(attention, *heads())
    monkeypatch.setattr(directory, "_LARGEST_FILE", 100)
    directory._say_once.cache_clear()
    with caplog.at_level(logging.WARNING, "attnrewrite"):
        assert store.compiled(attention, *heads()).was_stored == [False]
    assert "is none that was written here" in caplog.text and "it is too large" in caplog.text


def test_a_store_that_fails_leaves_nothing(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    store.compiled(attention, *heads())
    (file,) = store.files
    file.unlink()
    file.mkdir()
    directory._say_once.cache_clear()
    with caplog.at_level(logging.WARNING, "attnrewrite"):
        assert store.compiled(attention, *heads()).was_stored == [False]
    assert [*store.directory.iterdir()] == [file] and "rewritten graphs are not stored" in caplog.text


def test_files_of_others_are_not_removed(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    store.compiled(attention, *heads())
    others = [store.directory / name for name in ("mine.json", "notes.part", f"{'0' * 39}.json")]
    for other in others:
        other.write_text("mine")
        os.utime(other, (0, 0))
    monkeypatch.setattr(directory, "_MOST_FILES", 0)
    directory._remove_oldest(store.directory)
    assert sorted(store.directory.iterdir()) == sorted(others)
