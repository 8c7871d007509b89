"""The documentation names files that exist, and its code runs; docstrings and comments name what exists, too."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import attnrewrite
from tests.support.doc_blocks import blocks_of, check_part, run

ROOT = Path(__file__).parents[2]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])
WITH_INDUCTOR = {"getting_started.md"}
"""Pages whose models Inductor compiles, as it does for a reader; on others they run as they were rewritten."""

ARCHITECTURE = ROOT / "docs" / "architecture.md"
BEGINNINGS = {ARCHITECTURE: (ROOT / "attnrewrite", ROOT / "attnrewrite" / "passes")}
"""Where else than at the root a page's paths begin."""

FOLDERS = ("attnrewrite", "patterns", "tests", "docs", "examples")
OF_OTHERS = "transformers/"

PATH = re.compile(r"(?<![\w./:<-])(?:\w+/)*[\w.]+\.(?:py|md|json|txt|toml)\b")
LINK = re.compile(r"\[[^\]]*\]\(([^)#:]+)(?:#[^)]*)?\)")


def missing(page: Path, text: str) -> set[str]:
    """The files of this repository that the text names and that are not there.

    Elsewhere than in ``architecture.md`` a path is one of this repository if it begins with one of its folders;
    others are files of the user.
    """
    paths = set(PATH.findall(LINK.sub("", text)))
    if page in BEGINNINGS:
        paths = {path for path in paths if not path.startswith(OF_OTHERS)}
    else:
        paths = {path for path in paths if path.split("/")[0] in FOLDERS}
    bases = (ROOT, *BEGINNINGS.get(page, ()))
    files = {path for path in paths if not any((base / path).exists() for base in bases)}
    return files | {target for target in LINK.findall(text) if not (page.parent / target).exists()}


def test_a_missing_file_is_seen() -> None:
    text = "`patterns/base.py`, `patterns/gone.py`, `first.py`, [a](patterns.md#what-find-sees), [b](gone.md#here)"
    assert missing(ROOT / "docs" / "options.md", text) == {"patterns/gone.py", "gone.md"}
    assert missing(ARCHITECTURE, "`find.py`, `ir/site.py`, `lost.py`, `ir/lost.py`") == {"lost.py", "ir/lost.py"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_file_that_is_named_exists(page: Path) -> None:
    assert missing(page, page.read_text(encoding="utf-8")) == set()


SOURCES = sorted(
    path
    for folder in ("attnrewrite", "patterns", "tests", "examples")
    for path in (ROOT / folder).rglob("*.py")
    if path != Path(__file__) and path.relative_to(ROOT).parts[:2] != ("attnrewrite", "patterns")
)


def missing_in_source(text: str) -> set[str]:
    modules = {name for name in re.findall(r":mod:`~?(attnrewrite[\w.]*)`", text) if not is_module(name)}
    paths = {path for path in PATH.findall(text) if path.split("/")[0] in FOLDERS}
    return modules | {path for path in paths if not (ROOT / path).exists()}


def is_module(name: str) -> bool:
    path = Path(*name.split("."))
    if path.parts[:2] == ("attnrewrite", "patterns"):
        path = path.relative_to("attnrewrite")
    return (ROOT / path).is_dir() or (ROOT / path).with_suffix(".py").exists()


def test_what_sources_name_exists() -> None:
    text = ":mod:`attnrewrite.ir.axes`, :mod:`attnrewrite.patterns.softmax`, :mod:`attnrewrite.axes`, tests/gone.py"
    assert missing_in_source(text) == {"attnrewrite.axes", "tests/gone.py"}
    found = {path: missing_in_source(path.read_text(encoding="utf-8")) for path in SOURCES}
    assert {str(path.relative_to(ROOT)): names for path, names in found.items() if names} == {}


def test_what_a_block_is_marked_as() -> None:
    text = """
<!-- block: runs after
a = 1
-->
```python
print(a)
```

```text
1
```

- in a list
  <!-- block: not run, it needs a GPU -->
  ```python
  b
  ```
"""
    first, second = blocks_of(text)
    assert (first.line, first.before, first.code, first.output) == (6, "a = 1", "print(a)\n", "1\n")
    assert (second.code, second.runs, second.argument, second.output) == ("b\n", False, "it needs a GPU", None)
    with pytest.raises(ValueError, match="unknown mark 'skipped'"):
        blocks_of("<!-- block: skipped -->\n```python\nb\n```\n")


def test_what_a_block_prints_is_compared(tmp_path: Path) -> None:
    (block,) = blocks_of("```python\nprint([1.5, 2])\n```\n\n```text\n[1..., 2]\n```\n")
    run(block, ROOT / "README.md", tmp_path)
    (block,) = blocks_of("```python\nprint(3)\n```\n\n```text\n2\n```\n")
    with pytest.raises(AssertionError, match="line 2 prints\n3"):
        run(block, ROOT / "README.md", tmp_path)


def test_part_of_a_file() -> None:
    (block,) = blocks_of("<!-- block: part of examples/bert.py -->\n```python\nno such line\n```\n")
    with pytest.raises(AssertionError, match=r"not in examples/bert\.py"):
        check_part(block, ROOT)


def compiled_quickly(compile_: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """``torch.compile`` with another default of ``inner_backend``."""
    if kwargs.get("backend") == "attnrewrite":
        kwargs["options"] = {"inner_backend": "eager"} | (kwargs.get("options") or {})
    return compile_(*args, **kwargs)


@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if blocks_of(page.read_text(encoding="utf-8"))],
    ids=lambda page: str(page.relative_to(ROOT)),
)
def test_every_block_of_python_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if page.name not in WITH_INDUCTOR:
        monkeypatch.setattr(torch, "compile", partial(compiled_quickly, torch.compile))
    for block in blocks_of(page.read_text(encoding="utf-8")):
        if block.runs:
            run(block, page, tmp_path)
        elif block.mark.startswith("part of"):
            check_part(block, ROOT)
        else:
            compile(block.code, str(page), "exec")


def test_the_graph_before_and_after(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the README and the front page show as the compiled graph is in it, line by line."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    import vit_einsum

    model, inputs = vit_einsum.EXAMPLE.build("small")
    with torch.no_grad():
        (graph,) = attnrewrite.explain(model.eval(), **inputs).graphs
    lines = {line.partition(";")[0].strip() for line in graph.after_code.splitlines()}
    for page in (ROOT / "README.md", ROOT / "docs" / "index.md"):
        (shown,) = (
            block for block in blocks_of(page.read_text(encoding="utf-8")) if "what explain shows" in block.mark
        )
        statements = {ast.unparse(statement) for statement in ast.parse(shown.code).body}
        assert statements <= {ast.unparse(ast.parse(line)) for line in lines if line.startswith(("permute", "scaled"))}
