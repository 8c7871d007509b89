"""The rows as text: one line each for the terminal, and the page docs/coverage.md."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

from tests.coverage.measure import GRADIENT_LIMIT, VALUE_LIMIT

__all__ = ["escaped", "line", "markdown", "number", "reasons", "table", "total"]

Row = dict[str, Any]
_Lines = dict[str, Callable[[list[Row]], str]]


def reasons(row: Row) -> list[str]:
    """Why attentions of the model are not rewritten, each reason once, with its number."""
    found = Counter(site["reason"] for site in row.get("kept", ()))
    texts = [f"{count} x {reason}" for reason, count in found.items()]
    texts += [f"graph not captured: {reason}" for reason in dict.fromkeys(row.get("not_captured", ()))]
    texts += list(dict.fromkeys(row.get("defects", ())))
    missing = row["sites"] - row.get("rewritten", 0) - len(row.get("kept", ()))
    if missing > 0 and "rewrite" not in row["failures"] and "rewritten" in row:
        breaks = "".join(f"; graph break: {text}" for text in row["graph_breaks"])
        texts.append(f"{missing} x not found{breaks}")
    texts += [f"with gradients: {text}" for text in _only_with_gradients(row)]
    for step, reason in row["failures"].items():
        said, _, _ = " ".join(reason.split()).partition(" While executing")
        texts.append(f"{step} failed: {said}")
    texts += [f"{step}: {' '.join(reason.split())}" for step, reason in row.get("does_not_run", {}).items()]
    texts += [f"wrong {what}: {text}" for what, text in row.get("wrong", {}).items()]
    return texts


def _only_with_gradients(row: Row) -> list[str]:
    """What is rewritten in inference and not when gradients are taken."""
    other = row.get("with_gradients")
    if not other or other["rewritten"] >= row.get("rewritten", 0):
        return []
    found = Counter(site["reason"] for site in other["kept"])
    return [f"{count} x {reason}" for reason, count in found.items()] or list(dict.fromkeys(other["not_captured"]))


def line(row: Row) -> str:
    parts = [f"{row['name']:28}", f"{row.get('rewritten', '-')}/{row['sites']}"]
    parts.append(f"inductor {row.get('inductor', '-')}")
    parts.append(f"error {_error(row, 'error')}")
    parts.append(f"gradients {_error(row, 'gradient_error')}")
    return "  ".join(parts) + "".join(f"\n    {text[:600]}" for text in reasons(row))


def total(results: Row) -> str:
    """One line: the sites of the models that run, how many of them are rewritten, and which models are wrong."""
    rows = results["rows"]
    ran = [row for row in rows if "rewritten" in row]
    trained = [row for row in rows if "with_gradients" in row]
    wrong = [row["name"] for row in rows if row.get("wrong")]
    unable = [row["name"] for row in rows if "rewrite" in row.get("does_not_run", {})]
    absent = sum("build" in row["failures"] for row in rows)
    with_gradients = sum(row["with_gradients"]["rewritten"] for row in trained)
    return (
        f"{_dtype(results)}: {_sum(ran, 'rewritten')} of {_sum(ran, 'sites')} sites of {len(ran)} models rewritten, "
        f"with gradients {with_gradients} of {_sum(trained, 'sites')}; wrong: {_names(wrong)}; eager does not run: "
        f"{_names(unable)}; {len(rows) - len(ran) - len(unable) - absent} failed, {absent} not installed"
    )


def _names(names: list[str]) -> str:
    return f"{len(names)} ({', '.join(names)})" if names else "0"


def _dtype(results: Row) -> str:
    """Files from before there was a choice have float32."""
    return str(results.get("dtype", "float32"))


def markdown(results: Row) -> str:
    rows = results["rows"]
    versions = results["versions"]
    packages = ", ".join(
        f"{name} {versions[name]}" for name in sorted({row["package"] for row in rows} & set(versions))
    )
    dtype = _dtype(results)
    single = dtype == "float32"
    of_packages = results.get("group", "packages") == "packages"
    name = "coverage" + ("" if of_packages else "_repositories") + ("" if single else f"_{dtype}")
    options = ("" if of_packages else "--group repositories ") + ("" if single else f"--dtype {dtype} ")
    title = "Coverage" + ("" if of_packages else " of repositories") + ("" if single else f" in {dtype}")
    parts = [
        f"# {title}",
        f"{_PACKAGES if of_packages else _REPOSITORIES} The tables are written by",
        f"```\npython -m tests.coverage {options}--json docs/benchmarks/{name}_cpu.json --write docs/{name}.md\n```",
        f"with torch {versions['torch']} on {results['device']}; the raw data, with the source line of every site "
        f"that was left, are in [benchmarks/{name}_cpu.json](benchmarks/{name}_cpu.json)."
        + (" `tests/coverage/requirements.txt` installs the packages." if of_packages else ""),
        *(_tables_of_packages(rows, single=single) if of_packages else _tables_of_repositories(rows, single=single)),
        "## What was not rewritten",
        _left(rows),
        "## Versions",
        f"Python {results['python']}, torch {versions['torch']}{f', {packages}' * bool(packages)}.",
    ]
    return "\n\n".join(parts) + "\n"


_PACKAGES = (
    "Real model classes in small configurations with random weights, with the attention code that they have when no "
    "fused kernel is asked for: what is rewritten in inference, and whether it is right."
)
_REPOSITORIES = (
    "Attention of code that is no package, in small modules written anew after the repository that is named, with its "
    "operators in its order: what is rewritten in inference, and whether it is right."
)


def _tables_of_packages(rows: list[Row], *, single: bool) -> list[str]:
    own = [row for row in rows if row["package"] == "transformers"]
    others = [row for row in rows if row["package"] != "transformers"]
    return [
        _totals({"transformers": own, "other packages": others, "all": rows}, {}, single=single),
        _legend(single=single),
        "## transformers",
        _models(own, with_package=False),
        "## Other packages",
        _models(others, with_package=True),
    ]


def _tables_of_repositories(rows: list[Row], *, single: bool) -> list[str]:
    others: _Lines = {
        "attentions that no rewrite can serve": lambda rows: str(_sum(rows, "rightly_kept")),
        "rewritten of the others": _share_of_others,
    }
    return [
        _totals({"repositories": rows}, others, single=single),
        f"{_KEPT}\n{_legend(single=single)}",
        "## Modules",
        _models(rows, with_package=True),
    ]


_KEPT = """\
- **attentions that no rewrite can serve**: their weights are stored, returned or read elsewhere, their scores are no
  products of queries and keys, or Dynamo ends the graph between the products; `tests/coverage/repositories` has the
  list."""


def _legend(*, single: bool) -> str:
    return _LEGEND.format(errors=_SINGLE if single else _HALF)


_LEGEND = """\
- **sites**: the attentions that the model has, counted by hand from its configuration.
- **rewritten**: how many of them are rewritten in inference, without gradients. What is kept where gradients are taken
  is listed under [What was not rewritten](#what-was-not-rewritten), after "with gradients".
{errors}
- **Inductor**: how many attentions Inductor's own pass fuses in the same model in inference
  (`counters["inductor"]["fuse_attention"]`)."""

_SINGLE = """\
- **error**: the largest difference of any output from eager, relative to the largest number of that output, in float32
  with the inner backend `aot_eager`.
- **gradients**: the largest error of the gradient of any parameter, relative to the largest number of that gradient
  plus a hundredth of the largest in the model."""

_HALF = """\
- **error**: the largest difference of any output from the reference (the same weights and inputs in float64), relative
  to the largest number of that output, with the inner backend `aot_eager`; in parentheses eager's own.
- **gradients**: the same for the gradient of any parameter, relative to the largest number of that gradient plus a
  hundredth of the largest in the model.
- A model is **wrong** where a row of an output or a gradient lies further from the reference than eager's own, beyond
  what two roundings differ by (`attnrewrite/numerics/judge.py`)."""


def _totals(groups: dict[str, list[Row]], more: _Lines, *, single: bool) -> str:
    """``more``: further lines, behind that of what is rewritten."""

    def share(rows: list[Row], key: str) -> str:
        sites = sum(row["sites"] for row in rows)
        count = _sum(rows, key)
        return f"{count} ({count / sites:.0%})" if sites else "-"

    def wrong(rows: list[Row], key: str, limit: float) -> str:
        return str(sum(key in row and row[key] > limit for row in rows))

    limits: _Lines = {
        f"models with an error above {VALUE_LIMIT:g}": lambda rows: wrong(rows, "error", VALUE_LIMIT),
        f"models with gradients off by more than {GRADIENT_LIMIT:g}": lambda rows: wrong(
            rows, "gradient_error", GRADIENT_LIMIT
        ),
    }
    judged: _Lines = {
        "models with wrong results": lambda rows: str(sum("values" in row["wrong"] for row in rows)),
        "models with wrong gradients": lambda rows: str(sum("gradients" in row["wrong"] for row in rows)),
        "models that eager does not run": lambda rows: str(sum("does_not_run" in row for row in rows)),
    }
    lines: _Lines = {
        "models": lambda rows: str(len(rows)),
        "sites": lambda rows: str(sum(row["sites"] for row in rows)),
        "rewritten": lambda rows: share(rows, "rewritten"),
        **more,
        "fused by Inductor's own pass": lambda rows: share(rows, "inductor"),
        "models rewritten in full": lambda rows: str(sum(row.get("rewritten") == row["sites"] for row in rows)),
        **(limits if single else judged),
        "models with a step that failed": lambda rows: str(sum(bool(row["failures"]) for row in rows)),
    }
    cells = [[title, *(count(rows) for rows in groups.values())] for title, count in lines.items()]
    return table(["", *groups], cells)


def _share_of_others(rows: list[Row]) -> str:
    """The share of what can be rewritten at all; what is rewritten of the rest is not counted."""
    others = _sum(rows, "sites") - _sum(rows, "rightly_kept")
    found = sum(min(row.get("rewritten") or 0, row["sites"] - row.get("rightly_kept", 0)) for row in rows)
    return f"{found} ({found / others:.1%})" if others else "-"


def _sum(rows: list[Row], key: str) -> int:
    return sum(row.get(key) or 0 for row in rows)


def _models(rows: list[Row], *, with_package: bool) -> str:
    cells = []
    for row in rows:
        package = [row["package"]] if with_package else []
        counts = [str(row[key]) if key in row else "-" for key in ("sites", "rewritten", "inductor")]
        errors = [_error(row, "error"), _error(row, "gradient_error")]
        cells.append([row["name"], *package, row["form"], *counts[:2], *errors, counts[2]])
    header = ["model", *(["package"] if with_package else []), "attention", "sites", "rewritten", "error", "gradients"]
    return table([*header, "Inductor"], cells)


def _error(row: Row, key: str) -> str:
    """With eager's own where that is not nought."""
    own = row.get(f"{key}_of_eager")
    return number(row.get(key)) + (f" ({number(own)})" if own is not None else "")


def _left(rows: list[Row]) -> str:
    lines = [
        f"- **{row['name']}**: {'; '.join(escaped(text) for text in reasons(row))}" for row in rows if reasons(row)
    ]
    return "\n".join(lines) if lines else "Nothing."


def table(header: list[str], cells: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *cells]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def escaped(text: str) -> str:
    """As text in Markdown: code in reasons has underscores and stars."""
    for character in "\\`*_<|":
        text = text.replace(character, "\\" + character)
    return text


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1e}"
