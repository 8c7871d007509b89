"""The renderings say all that the report holds, to readers of text and of HTML."""

from __future__ import annotations

import io
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

from attnrewrite.ir.source import SourceLocation
from attnrewrite.report.graph_code import graph_source
from attnrewrite.report.html import report_to_html
from attnrewrite.report.report import RewriteReport
from attnrewrite.report.rows import GraphReport, KernelVerdict, SiteReport
from attnrewrite.report.text import print_report, report_to_text, short_path

REASON = "the attention weights are also an output of the graph: softmax_1; pass output_attentions=False " * 4
BROKEN_WORD = "x" * 300


class Naive(nn.Module):
    """Two attentions one after the other."""

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q = torch.softmax(q @ k.transpose(-2, -1), -1) @ v
        return torch.softmax(q @ k.transpose(-2, -1), -1) @ v


class HalfFused(nn.Module):
    """The same, the first one rewritten."""

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=1.0)
        return torch.softmax(q @ k.transpose(-2, -1), -1) @ v


@pytest.fixture(scope="module")
def report() -> RewriteReport:
    inputs = [torch.randn(2, 4, 8, 16) for _ in range(3)]
    before = make_fx(Naive(), pre_dispatch=True, record_stack_traces=True)(*inputs)
    after = make_fx(HalfFused(), pre_dispatch=True, record_stack_traces=True)(*inputs)
    shape = ("2", "4", "s37", "16")
    fused = SiteReport(
        "attention_0",
        "softmax attention",
        "rewritten",
        SourceLocation(__file__, 30, "forward", "q = softmax(q @ k.transpose(-2, -1), -1) @ v", "encoder.[red]layer.0"),
        kernel="torch_sdpa",
        query_shape=shape,
        key_shape=("2", "1", "s37", "16"),
        value_shape=("2", "1", "s37", "16"),
        dtype="float32",
        device="cpu",
        scale="1.0",
        mask="causal",
        score_mods=("softcap 30",),
        dropout="0.1",
        grouping="4 query heads share 1",
        proof=("every query row keeps a key",),
        nodes_before=("transpose", "matmul", "softmax", "matmul_1"),
        nodes_after=("scaled_dot_product_attention",),
    )
    kept = SiteReport(
        "attention_1",
        "softmax attention",
        "kept",
        SourceLocation("/no/where/<script>.py", 31, "forward", "", "<script>alert(1)</script>"),
        reason=REASON + BROKEN_WORD,
        verdicts=(KernelVerdict("torch_sdpa", False, "the probabilities have another reader"),),
        nodes_before=("transpose_1", "matmul_2", "softmax_1", "matmul_3"),
        nodes_after=("transpose", "matmul", "softmax", "matmul_1"),
    )
    graphs = [
        GraphReport(
            "graph_0",
            sites=[fused, kept],
            before_code=graph_source(before),
            after_code=graph_source(after),
            node_count=12,
            inner_backend="inductor",
            seconds={"capture": 0.25},
            notes=["a [bold]note[/bold]"],
        ),
        GraphReport("graph_1", captured=False, reason="cannot mutate tensors with frozen storage"),
    ]
    return RewriteReport("Naive <b>model</b>", graphs, ["model.py:3: print()"], {"torch": torch.__version__})


def squeezed(text: str) -> str:
    """Without white space and the table's lines, column by column, so that wrapped text is found."""
    columns: dict[int, str] = {}
    for line in text.splitlines():
        for index, cell in enumerate(line.split("│")):
            columns[index] = columns.get(index, "") + cell
    return re.sub(r"[\s╭╮╰╯├┤┬┴┼─]+", "", "".join(columns.values()))


@pytest.mark.parametrize("width", [None, 200, 120, 80, 50])
def test_text_holds_everything_at_every_width(report: RewriteReport, width: int | None) -> None:
    text = report_to_text(report, width)
    if width:
        assert max(map(len, text.splitlines())) <= width
    found = squeezed(text)
    for expected in (
        report.summary,
        "Naive <b>model</b>",
        "q(2,4,s37,16)",
        "k,v(2,1,s37,16)",
        "float32oncpu",
        "scale:1.0",
        "mask:causal",
        "softcap30",
        "dropout:0.1",
        "4queryheadsshare1",
        "encoder.[red]layer.0",
        "everyqueryrowkeepsakey",
        "torch_sdpa",
        "kept",
        "cannot mutate tensors with frozen storage",
        "model.py:3: print()",
        "a [bold]note[/bold]",
        torch.__version__,
    ):
        assert squeezed(expected) in found, expected


@pytest.mark.parametrize("width", [None, 120, 50])
def test_a_reason_is_wrapped_and_never_cut(width: int | None) -> None:
    kept = SiteReport("attention_1", "", "kept", reason=REASON + BROKEN_WORD)
    text = report_to_text(RewriteReport(graphs=[GraphReport("graph_0", sites=[kept])]), width)
    assert squeezed(REASON + BROKEN_WORD) in squeezed(text)
    assert "…" not in text


def test_text_has_no_colours_and_the_terminal_has(report: RewriteReport) -> None:
    assert "\x1b" not in report_to_text(report)
    out = io.StringIO()
    print_report(report, Console(file=out, force_terminal=True, color_system="standard", width=120))
    assert "\x1b[" in out.getvalue()
    plain = re.sub(r"\x1b\[[0-9;]*m", "", out.getvalue())
    assert squeezed(plain) == squeezed(report_to_text(report, 120))


def test_an_empty_report_renders() -> None:
    for report in (RewriteReport(), RewriteReport(graphs=[GraphReport("graph_0")])):
        assert report.summary in report_to_text(report)
        assert report.summary in report_to_html(report)
    assert "no attention found" in report_to_text(RewriteReport(graphs=[GraphReport("graph_0")]))


def test_short_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert short_path(str(tmp_path / "pkg" / "model.py")) == "pkg/model.py"
    assert short_path("/usr/lib/python3/site-packages/pkg/model.py") == "pkg/model.py"
    assert short_path("/elsewhere/model.py") == "/elsewhere/model.py"


class Page(HTMLParser):
    """A page's ids, links, tags, and its text by line of code."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.links: list[str] = []
        self.tags: list[str] = []
        self.resources: list[str] = []
        self.lines: list[tuple[str, str]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attributes}
        self.tags.append(tag)
        if "id" in values:
            self.ids.append(values["id"])
        if tag == "a" and "href" in values:
            self.links.append(values["href"])
        self.resources += [values[name] for name in ("src", "href", "srcset", "data", "action") if name in values]
        if "line" in values.get("class", "").split():
            self.lines.append((values.get("class", "") + values.get("style", ""), ""))

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.lines:
            style, text = self.lines[-1]
            self.lines[-1] = (style, text + data)


def test_html_needs_nothing_from_outside(report: RewriteReport) -> None:
    html = report_to_html(report)
    page = Page(html)
    assert page.resources and all(resource.startswith("#") for resource in page.resources)
    assert not {"link", "img", "iframe", "object", "embed"} & set(page.tags)
    assert "@import" not in html and "url(" not in html


def test_html_escapes_what_comes_from_the_model(report: RewriteReport) -> None:
    html = report_to_html(report)
    page = Page(html)
    assert page.tags.count("script") == 1  # the page's own
    assert "<script>alert(1)" not in html and "<b>model" not in html
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html
    assert "Naive <b>model</b>" in page.text


def test_html_code_is_escaped() -> None:
    code = "def forward(self, x):\n    # <script>alert(2)</script>\n    y = x < '</pre><b>'\n    return y"
    html = report_to_html(RewriteReport(graphs=[GraphReport("g", before_code=code, after_code=code)]))
    assert "<script>alert(2)" not in html and "</pre><b>" not in html
    assert "# <script>alert(2)</script>" in Page(html).text


def test_html_links_rows_and_code_both_ways(report: RewriteReport) -> None:
    page = Page(report_to_html(report))
    assert len(page.ids) == len(set(page.ids))
    for anchor in ("g0-s0", "g0-s1", "g0-s0-before", "g0-s0-after", "g0-s1-before", "g0-s1-after"):
        assert anchor in page.ids
        assert f"#{anchor}" in page.links
    assert {link.removeprefix("#") for link in page.links} <= set(page.ids)


def test_html_highlights_a_sites_lines_in_one_colour_on_both_sides(report: RewriteReport) -> None:
    page = Page(report_to_html(report))
    hues: dict[str, set[str]] = {"rewritten": set(), "kept": set()}
    marked: dict[str, list[str]] = {"rewritten": [], "kept": []}
    for style, text in page.lines:
        if "line site" not in style:
            continue
        status = "kept" if "kept" in style else "rewritten"
        assigned = re.match(r"\d+\s*(\w+) = ", text)
        assert assigned, text
        marked[status].append(assigned[1])
        hues[status].add(style.split("--hue:")[1].strip())
    assert marked["rewritten"] == ["transpose", "matmul", "softmax", "matmul_1", "scaled_dot_product_attention"]
    kept_before = ["transpose_1", "matmul_2", "softmax_1", "matmul_3"]
    assert marked["kept"] == [*kept_before, "transpose", "matmul", "softmax", "matmul_1"]
    assert len(hues["rewritten"]) == len(hues["kept"]) == 1
    assert hues["rewritten"] != hues["kept"]


def test_html_marks_the_outer_graph_only() -> None:
    inner = "# self.body\ndef forward(self, x):\n    cos = 1\n"
    code = f"def forward(self, x):\n    sin = torch.sin(x)\n    return sin\n\n\n{inner}"
    site = SiteReport("attention_0", "", "kept", reason="no", nodes_before=("sin", "cos"))
    page = Page(report_to_html(RewriteReport(graphs=[GraphReport("g", sites=[site], before_code=code)])))
    assert [text for style, text in page.lines if "line site" in style and "cos" in text] == []
    assert any("sin" in text for style, text in page.lines if "line site" in style)


def test_in_place_operators_are_found_by_their_second_name() -> None:
    code = "def forward(self, x):\n    x += 1;  iadd = x\n    mul = iadd * 2;  iadd = None\n    return mul\n"
    site = SiteReport("attention_0", "", "kept", reason="no", nodes_before=("iadd",))
    page = Page(report_to_html(RewriteReport(graphs=[GraphReport("g", sites=[site], before_code=code)])))
    assert [text for style, text in page.lines if "line site" in style] == ["2    x += 1;  iadd = x"]


def test_the_report_renders_itself(report: RewriteReport, tmp_path: Path) -> None:
    assert str(report) == report_to_text(report)
    path: Any = report.save_html(tmp_path / "report.html")
    assert path.read_text(encoding="utf-8") == report_to_html(report)
