"""Blocks of Python in the documentation: what is to be done with each, and running those of a page.

A comment in the line above a block, which is not shown, says how it is tested:

- none: the block runs by itself, in a folder that is the page's;
- ``<!-- block: runs after`` and lines of Python until ``-->``: these run first;
- ``<!-- block: saved as NAME -->``: it is written to that file of the page's folder, and runs;
- ``<!-- block: part of PATH -->``: its lines stand in that file of the repository, one after the other;
- ``<!-- block: not run, REASON -->``: it is compiled only.

A fence of ``text`` right behind a block holds what it prints; ``...`` stands for anything.
"""

from __future__ import annotations

import contextlib
import doctest
import io
import os
import re
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Block", "blocks_of", "check_part", "run"]

_BLOCK = re.compile(
    r"(?:^ *<!-- block: (?P<mark>(?:(?!-->).)*?)-->\n)?"
    r"^(?P<indent> *)```python\n(?P<code>.*?)^(?P=indent)```\n"
    r"(?:\s*^(?P=indent)```text\n(?P<output>.*?)^(?P=indent)```)?",
    re.MULTILINE | re.DOTALL,
)
_AFTER = "runs after"
_ELLIPSIS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


@dataclass(frozen=True)
class Block:
    """A block of Python.

    Attributes:
        line: of its first line in the page.
        mark: what the comment above it says; empty without one.
        before: code that runs first.
        output: what it prints; None where the page does not say.
    """

    line: int
    code: str
    mark: str = ""
    before: str = ""
    output: str | None = None

    @property
    def argument(self) -> str:
        """What stands behind "part of", "saved as" or "not run,"."""
        return re.sub(r"^(part of|saved as|not run,) ", "", self.mark)

    @property
    def runs(self) -> bool:
        return self.mark == _AFTER or self.mark.startswith("saved as ") or not self.mark


def blocks_of(text: str) -> list[Block]:
    """Every block of Python of a page.

    Raises:
        ValueError: a mark is none of those that there are.
    """
    blocks = []
    for match in _BLOCK.finditer(text):
        mark, before = (match["mark"] or "").strip(), ""
        if mark.startswith(_AFTER):
            mark, before = _AFTER, textwrap.dedent(mark.removeprefix(_AFTER)).strip()
        line = text.count("\n", 0, match.start("code")) + 1
        if mark and not re.fullmatch(rf"{_AFTER}|(part of|saved as) \S+|not run, .+", mark, re.DOTALL):
            raise ValueError(f"line {line}: unknown mark {mark!r}")
        output = None if match["output"] is None else textwrap.dedent(match["output"])
        blocks.append(Block(line, textwrap.dedent(match["code"]), mark, before, output))
    return blocks


def check_part(block: Block, root: Path) -> None:
    """Raises an AssertionError unless the block's lines stand in the file that its mark names."""
    here, there = _statements(block.code), _statements((root / block.argument).read_text(encoding="utf-8"))
    starts = [index for index, line in enumerate(there) if line == here[0]]
    assert any(there[start : start + len(here)] == here for start in starts), f"not in {block.argument}:\n{block.code}"


def _statements(code: str) -> list[str]:
    """The lines less indentation, comments behind them and empty lines."""
    lines = (re.sub(r"\s+# .*", "", line).strip() for line in code.splitlines())
    return [line for line in lines if line]


def run(block: Block, page: Path, folder: Path) -> None:
    """Runs the block in the folder, which is the first on the path, and compares what it prints."""
    if block.mark.startswith("saved as "):
        (folder / block.argument).write_text(block.code, encoding="utf-8")
    # The lines of a traceback are those of the page.
    code = compile("\n" * (block.line - 1) + block.code, str(page), "exec", dont_inherit=True)
    namespace = {"__name__": f"block_{block.line}"}
    printed = io.StringIO()
    with _working_in(folder), contextlib.redirect_stdout(printed):
        exec(compile(block.before, f"{page}, before line {block.line}", "exec", dont_inherit=True), namespace)
        exec(code, namespace)
    if block.output is not None:
        agree = doctest.OutputChecker().check_output(block.output, printed.getvalue(), _ELLIPSIS)
        assert agree, f"line {block.line} prints\n{printed.getvalue()}"


@contextlib.contextmanager
def _working_in(folder: Path) -> Iterator[None]:
    """As a script in the folder would; the modules that are imported from it are forgotten."""
    here, before = Path.cwd(), set(sys.modules)
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        os.chdir(here)
        sys.path.remove(str(folder))
        for name in set(sys.modules) - before:
            if str(getattr(sys.modules[name], "__file__", "")).startswith(str(folder)):
                del sys.modules[name]
