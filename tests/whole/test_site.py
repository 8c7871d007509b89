"""The documentation site builds without a warning, and has what it is made of; its hooks."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest
import torch

import attnrewrite
from attnrewrite.patterns import Specimen, must_not_match, specimens

if importlib.util.find_spec("mkdocs") is None:
    pytest.skip('mkdocs is not installed (pip install -c constraints.txt -e ".[docs]")', allow_module_level=True)

from mkdocs.commands.build import build
from mkdocs.config import load_config

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The pages of the site by their names; a warning, as of a link that leads nowhere, is an error."""
    folder = tmp_path_factory.mktemp("site")
    build(load_config(str(ROOT / "mkdocs.yml"), strict=True, site_dir=str(folder)))
    return {str(path.relative_to(folder)): path.read_text(encoding="utf-8") for path in folder.rglob("*.html")}


@pytest.fixture(autouse=True)
def _hooks_can_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "docs" / "hooks"))


def test_every_page_is_there(site: dict[str, str]) -> None:
    pages = {str(path.relative_to(ROOT / "docs").with_suffix(".html")) for path in (ROOT / "docs").rglob("*.md")}
    pages = {page.replace("README.html", "index.html") for page in pages}
    assert pages | {"contributing.html", "changelog.html", "source/examples/own_kernel.html"} <= set(site)


def test_the_catalogue_has_every_specimen(site: dict[str, str]) -> None:
    pages = {name: text for name, text in site.items() if name.startswith("catalogue/")}
    lookalikes = pages.pop("catalogue/lookalikes.html")
    assert sum(text.count("<h3 ") for text in pages.values()) == len(specimens())
    assert sum(text.count("The graph that it becomes") for text in pages.values()) == len(specimens())
    assert lookalikes.count("<h3 ") == len(must_not_match())
    assert all(f'href="{name}"' in site["catalogue.html"] for name in (*pages, "catalogue/lookalikes.html"))


def test_every_public_name_is_in_the_reference(site: dict[str, str]) -> None:
    headings = set(re.findall(r'<h3 id="attnrewrite\.(\w+)"', site["api.html"]))
    assert headings == set(attnrewrite.__all__)


def test_pages_fetch_nothing_from_elsewhere(site: dict[str, str]) -> None:
    fetched = re.compile(r'(?:<script[^>]*\bsrc|<img[^>]*\bsrc|<link[^>]*\bhref)="(https?://[^"]*)"')
    assert {name: fetched.findall(text) for name, text in site.items() if fetched.search(text)} == {}


def test_links_out_of_docs_lead_to_pages_of_the_site() -> None:
    from repository_files import with_links_of_the_site

    text = "[a](../examples/bert.py) [b](../CONTRIBUTING.md#recipes) [c](limits.md) [d](https://x.org/a.py)\n```\n[e](../x.py)\n```\n"
    assert with_links_of_the_site(text, "docs", "") == (
        "[a](source/examples/bert.md) [b](contributing.md#recipes) [c](limits.md) [d](https://x.org/a.py)\n"
        "```\n[e](../x.py)\n```\n"
    )
    assert with_links_of_the_site("[a](docs/caching.md)", "", "") == "[a](caching.md)"
    assert with_links_of_the_site("[a](../../examples/bert.py)", "docs/recipes", "recipes") == (
        "[a](../source/examples/bert.md)"
    )


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return (q @ k.mT + mask).softmax(-1) @ v


def test_a_picture_shows_mask_and_bias() -> None:
    from mask_picture import picture, weights_of

    half = torch.tensor(0.5).log()
    mask = torch.tensor([[0.0, -torch.inf, -torch.inf], [half, 0.0, -torch.inf]])
    inputs = (torch.randn(1, 2, 4), torch.randn(1, 3, 4), torch.randn(1, 3, 4), mask)
    weights = weights_of(Specimen("attend", attend, lambda seed, length: inputs))
    assert weights is not None
    torch.testing.assert_close(weights, torch.tensor([[1.0, 0, 0], [0.5, 1, 0]]))
    assert picture(weights, "a mask") == (
        '<svg class="mask" role="img" aria-label="a mask" viewBox="0 0 3 2" width="15" height="10">'
        '<path opacity="0.5" d="M0 1h1v1h-1z"/><path opacity="1" d="M0 0h1v1h-1zM1 1h1v1h-1z"/></svg>'
    )


def test_the_picture_of_a_call_is_that_of_its_mask() -> None:
    from mask_picture import weights_of

    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)

    weights = weights_of(Specimen("call", call, lambda seed, length: tuple(torch.randn(3, 1, 2, 5, 4))))
    assert weights is not None
    torch.testing.assert_close(weights, torch.ones(5, 5).tril())
