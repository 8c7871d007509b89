"""The documentation names files that exist, and docstrings and comments name files and modules that do."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])

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
