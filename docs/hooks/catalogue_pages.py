"""The catalogue of patterns: pages that are made of the specimens in patterns/ whenever the site is built.

``catalogue.md`` holds a text, and a marker where the patterns go: what the first lines of their files say, with the
mathematics, and their families. Each family gets a page with its specimens: the source, a picture of the mask, and the
graph that it becomes, which is its golden in tests/whole/golden: a test compares it with what is compiled.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from mask_picture import picture, weights_of
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page
from torch import Tensor

from attnrewrite.patterns import Pattern, Specimen, catalogue, lookalikes, must_not_match

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "whole" / "golden"
PATTERNS, LOOKALIKES = "<!-- the patterns -->", "<!-- the lookalikes -->"
LOOKALIKES_URI = "catalogue/lookalikes.md"
PICTURES = 5
"""How many different masks stand beside a family."""


@dataclass(frozen=True, eq=False)
class Family:
    """The specimens of one pattern that stand in one file."""

    pattern: Pattern
    module: ModuleType
    specimens: Sequence[Specimen]

    @property
    def uri(self) -> str:
        return f"catalogue/{self.pattern.name}_{Path(str(self.module.__file__)).stem}.md"

    @property
    def title(self) -> str:
        own = self.module is inspect.getmodule(type(self.pattern))
        return f"Specimens of `{self.pattern.name}`" if own else parts_of(self.module)[0]


@cache
def families() -> tuple[Family, ...]:
    """In the order in which patterns look at a graph."""
    found = []
    for pattern in catalogue():
        by_module: dict[ModuleType, list[Specimen]] = {}
        for specimen in pattern.specimens:
            module = inspect.getmodule(specimen.function)
            assert module is not None, f"{specimen.name} is a function of no module"
            by_module.setdefault(module, []).append(specimen)
        found += [Family(pattern, module, specimens) for module, specimens in by_module.items()]
    return tuple(found)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    pages = {family.uri: family_page(family) for family in families()} | {LOOKALIKES_URI: lookalikes_page()}
    for uri, text in pages.items():
        files.append(File.generated(config, uri, content=text, inclusion=InclusionLevel.NOT_IN_NAV))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    if page.file.src_uri != "catalogue.md":
        return markdown
    for marker in (PATTERNS, LOOKALIKES):
        if marker not in markdown:
            raise ValueError(f"docs/catalogue.md has no {marker}, where the hook writes what it has made")
    link = f"[{parts_of(lookalikes)[0]}]({LOOKALIKES_URI}): {len(must_not_match())} of them."
    return markdown.replace(PATTERNS, patterns_section()).replace(LOOKALIKES, link)


def patterns_section() -> str:
    sections = []
    for pattern in catalogue():
        own = [family for family in families() if family.pattern is pattern]
        title, text = parts_of(inspect.getmodule(type(pattern)))
        rows = ["| specimens | | masks |", "| --- | --- | --- |"]
        for family in own:
            rows.append(f"| [{family.title}]({family.uri}) | {len(family.specimens)} | {_some_pictures(family)} |")
        sections.append("\n\n".join((f"## `{pattern.name}`", f"{title}.", text, "\n".join(rows))))
    return "\n\n".join(sections)


def family_page(family: Family) -> str:
    title, text = parts_of(family.module)
    what = (
        f"Reports call these `{family.pattern.name}`; back to [the catalogue](../catalogue.md). What a specimen "
        "becomes is a graph of PyTorch's operators, here that for float32 on a CPU in inference."
    )
    return "\n\n".join((f"# {title}", text, what, *(_entry(each, family) for each in family.specimens)))


def lookalikes_page() -> str:
    title, text = parts_of(lookalikes)
    what = "Nothing of these is rewritten. Where the report says why, this is a piece of it."
    entries = []
    for specimen in must_not_match():
        why = f"> {specimen.reason}" if specimen.reason else "Not reported: it is no attention."
        entries += [f"### {_title(specimen)}", specimen.notes, why, f"```python\n{source_of(specimen.function)}\n```"]
    return "\n\n".join(
        (f"# {title}", text, f"{what} Back to [the catalogue](../catalogue.md).", *filter(None, entries))
    )


def _entry(specimen: Specimen, family: Family) -> str:
    notes = [specimen.notes] if specimen.notes else []
    if specimen.sites > 1:
        notes.append(f"{specimen.sites} attentions.")
    if specimen.status == "recognized":
        notes.append("It is in its best form already, and stays as it is.")
    golden = (GOLDEN / f"{specimen.name}.txt").read_text(encoding="utf-8")
    about = (
        f'<div class="specimen" markdown>\n<div markdown>\n{" ".join(notes)}\n</div>\n{drawn(specimen, family)}\n</div>'
    )
    after = textwrap.indent(f"```text\n{golden.strip()}\n```", "    ")
    return (
        f"### {_title(specimen)}\n\n{about}\n\n```python\n{source_of(specimen.function)}\n```\n\n"
        f'??? note "The graph that it becomes"\n\n{after}'
    )


def _title(specimen: Specimen) -> str:
    return specimen.name.replace("_", " ").capitalize()


def drawn(specimen: Specimen, family: Family) -> str:
    """The picture of its mask; none where no softmax over keys is called."""
    weights = mask_of(specimen, family)
    return "" if weights is None else picture(weights, f"the mask of {_title(specimen).lower()}")


@cache
def mask_of(specimen: Specimen, family: Family) -> Tensor | None:
    return None if family.pattern.name == "linear" else weights_of(specimen)


def _some_pictures(family: Family) -> str:
    """Different ones, of scores that are masked or biased."""
    found: dict[str, str] = {}
    for specimen in family.specimens:
        weights = mask_of(specimen, family)
        if weights is not None and weights.nan_to_num().min() < 1:
            found.setdefault(picture(weights, ""), drawn(specimen, family))
    return " ".join(list(found.values())[:PICTURES])


def parts_of(module: ModuleType | None) -> tuple[str, str]:
    """The first sentence of a module's docstring, less its full stop, and the rest as Markdown."""
    title, _, text = (inspect.getdoc(module) or "").partition("\n\n")
    return " ".join(title.split()).removesuffix("."), text.replace("``", "`")


def source_of(function: Callable[..., Any]) -> str:
    """The source without decorators and docstring, which the page says in its own way."""
    source = textwrap.dedent(inspect.getsource(function))
    (definition,) = ast.parse(source).body
    assert isinstance(definition, ast.FunctionDef)
    lines = source.splitlines()
    first, *_ = body = definition.body
    drop = range(0)
    if ast.get_docstring(definition) and len(body) > 1:
        drop = range(first.lineno - 1, first.end_lineno or first.lineno)
    return "\n".join(
        line for number, line in enumerate(lines) if number >= definition.lineno - 1 and number not in drop
    )
