"""Files of the repository outside of docs/ that its pages link to, as pages of the site.

On GitHub a link such as ``../examples/own_kernel.py`` leads to the file. The site has the file as a page, and the link
leads there. A file that is linked to and has no page is a broken link, and fails a strict build.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
LINK = re.compile(r"(?<=\]\()(?![a-z]+:)([^)#\s]+)(?=[)#])")
FENCE = re.compile(r"^( *)```.*?^\1```", re.MULTILINE | re.DOTALL)
DOCUMENTS = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
ROLE = re.compile(r":(?:class|func|meth|mod|attr|data):(<code>)~?")
"""What Sphinx calls a role, in docstrings: the page shows the name alone."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for path, uri in DOCUMENTS.items():
        files.append(File.generated(config, uri, content=(ROOT / path).read_text(encoding="utf-8")))
    for path in sorted(sources_that_are_linked_to(files)):
        text = f"# {path}\n\n```python\n{(ROOT / path).read_text(encoding='utf-8')}```\n"
        files.append(File.generated(config, page_of(path), content=text, inclusion=InclusionLevel.NOT_IN_NAV))
    return files


def sources_that_are_linked_to(files: Files) -> set[str]:
    """Python files of the repository, as paths from its root."""
    paths = set()
    for file in files.documentation_pages():
        folder = "" if file.src_uri in DOCUMENTS.values() else f"docs/{posixpath.dirname(file.src_uri)}"
        for link in LINK.findall(file.content_string):
            path = posixpath.normpath(posixpath.join(folder, link))
            if path.endswith(".py") and (ROOT / path).is_file():
                paths.add(path)
    return paths


def page_of(path: str) -> str:
    """The site's page for a file of the repository, as a path in docs/; "" if it has none."""
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    if path.endswith(".py"):
        return f"source/{path.removesuffix('.py')}.md"
    return DOCUMENTS.get(path, "")


def on_page_markdown(markdown: str, page: Page, **_: object) -> str:
    uri = page.file.src_uri
    folders = dict.fromkeys(DOCUMENTS.values(), "")
    return with_links_of_the_site(markdown, folders.get(uri, f"docs/{posixpath.dirname(uri)}"), posixpath.dirname(uri))


def with_links_of_the_site(markdown: str, source: str, target: str) -> str:
    """The text with the links as they are from the page.

    Args:
        source: the folder in the repository that the links start from.
        target: the folder in docs/ that the page lies in.
    """

    def link(match: re.Match[str]) -> str:
        path = page_of(posixpath.normpath(posixpath.join(source, match[1])))
        return posixpath.relpath(path, target or ".") if path else match[1]

    return "".join(LINK.sub(link, part) if is_text else part for part, is_text in _parts(markdown))


def _parts(markdown: str) -> Iterator[tuple[str, bool]]:
    """The text, and the blocks of code in it, which are left as they are."""
    end = 0
    for fence in FENCE.finditer(markdown):
        yield markdown[end : fence.start()], True
        yield fence[0], False
        end = fence.end()
    yield markdown[end:], True


def on_page_content(html: str, **_: object) -> str:
    return ROLE.sub(r"\1", html)
