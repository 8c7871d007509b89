"""The rows as text: a line or two each for the terminal, and the page docs/processors.md."""

from __future__ import annotations

from collections import Counter
from typing import Any

from tests.coverage.measure import GRADIENT_LIMIT, VALUE_LIMIT
from tests.coverage.table import escaped, number, table
from tests.processors.case import STRUCTURES
from tests.processors.state import State

__all__ = ["line", "markdown", "reasons", "verdict"]

Row = dict[str, Any]

VERDICTS = ("in full", "partly", "not found", "cannot run")


def verdict(row: Row) -> str:
    """Of a processor or a model: what became of it where it runs as it is meant to."""
    if row.get("needs") or row.get("instead") or any("cannot_run" in use for use in _uses(row)):
        return "cannot run"
    return _found(_uses(row))


def _found(uses: list[Row]) -> str:
    if all(_is_full(use) for use in uses):
        return "in full"
    return "partly" if any(_settled(use) for use in uses) else "not found"


def _is_full(use: Row) -> bool:
    counts = {use["sites"], use.get("found"), _settled(use)}
    # What cannot be compiled without attnrewrite is not left over by it.
    failures = set(use["failures"]) - {"error_before", "inductor"}
    return len(counts) == 1 and not use.get("left") and not failures


def _settled(use: Row) -> int:
    """Sites that are in their best form, by rewriting or from the start."""
    return int(use.get("rewritten", 0)) + int(use.get("recognized", 0))


def _uses(row: Row) -> list[Row]:
    """A model is used in one way."""
    uses: list[Row] = row.get("uses", [row])
    return uses


def reasons(row: Row) -> list[str]:
    """What is not as it should be, each thing once with the uses that it was met in."""
    met: dict[str, list[str]] = {}
    for use in _uses(row):
        for text in _of_use(use):
            met.setdefault(text, []).append(use["name"])
    processor = "uses" in row
    texts = [f"{' / '.join(names)}: {text}" if processor else text for text, names in met.items()]
    return texts + [f"{step} failed: {text}" for step, text in row["failures"].items() if processor]


def _of_use(use: Row) -> list[str]:
    if "cannot_run" in use:
        return [f"raises {use['cannot_run']}"]
    texts = [f"{count} x {reason}" for reason, count in Counter(site["reason"] for site in use.get("kept", ())).items()]
    texts += [f"graph not captured: {reason}" for reason in dict.fromkeys(use.get("not_captured", ()))]
    texts += list(dict.fromkeys(use.get("defects", ())))
    if "found" in use and use["found"] < use["sites"]:
        breaks = "".join(f"; graph break: {text}" for text in use["graph_breaks"])
        texts.append(f"{use['sites'] - use['found']} of {use['sites']} not found{breaks}")
    if use.get("found", 0) > use["sites"]:
        texts.append(f"{use['sites']} found as {use['found']}")
    texts += [f"`{name}` {now} times and not {most}" for name, (now, most) in (use.get("left") or {}).items()]
    texts += [f"with gradients: {text}" for text in _only_with_gradients(use)]
    if use.get("gradient_error", 0) > GRADIENT_LIMIT:
        texts.append(f"gradients are off by {use['gradient_error']:.1e}")
    too = " (without attnrewrite as well)" if use.get("aot_eager_fails_too") else ""
    return texts + [f"{step} failed{too}: {' '.join(text.split())[:420]}" for step, text in use["failures"].items()]


def _only_with_gradients(use: Row) -> list[str]:
    other = use.get("with_gradients")
    if not other or _settled(other) >= _settled(use):
        return []
    found = Counter(site["reason"] for site in other["kept"])
    return [f"{count} x {reason}" for reason, count in found.items()] or list(dict.fromkeys(other["not_captured"]))


def _worst(row: Row, key: str) -> float | None:
    values = [use[key] for use in _uses(row) if key in use]
    return max(values) if values else None


def _sum(row: Row, key: str) -> str:
    values = [use[key] for use in _uses(row) if key in use and "cannot_run" not in use]
    return str(sum(values)) if values else "-"


def _kernels(row: Row) -> str:
    return ", ".join(sorted({kernel for use in _uses(row) for kernel in use.get("kernels", ())})) or "-"


_COUNTS = ("sites", "found", "rewritten", "recognized")


def line(row: Row) -> str:
    counts = "/".join(_sum(row, key) for key in _COUNTS)
    text = f"{row['name']:40}{counts:14}{verdict(row):12}error {number(_worst(row, 'error'))}"
    text += f"  gradients {number(_worst(row, 'gradient_error'))}"
    return text + "".join(f"\n    {reason[:600]}" for reason in reasons(row))


def markdown(results: Row) -> str:
    rows, models = results["rows"], results["models"]
    versions = results["versions"]
    parts = [
        "# Attention processors of diffusers",
        "The processor classes of diffusers, in the modules that call them, small and with random weights: what is "
        "found, what is rewritten, and whether it is right. Then whole models that use them. The tables are written by",
        "```\npython -m tests.processors --json docs/benchmarks/processors_cpu.json --write docs/processors.md\n```",
        f"with diffusers {versions['diffusers']} and torch {versions['torch']} on {results['device']}; the raw data, "
        "with every use of every class and the graph of every site that was left, are in "
        "[benchmarks/processors_cpu.json](benchmarks/processors_cpu.json).",
        _totals({"processors": rows, "models": models}),
        _LEGEND,
        "## Processors",
        _processors(rows),
        "## Models",
        _models(models),
        "## What remains",
        _left([row for row in (*rows, *models) if verdict(row) != "cannot run"]),
        "## What cannot run",
        _cannot(rows),
        "## Where a class is",
        _places(rows),
    ]
    return "\n\n".join(parts) + "\n"


_LEGEND = """\
- **in diffusers**: a class; an alias, where making one gives another class; a factory, which would make another class
  and cannot here; a stub without `__call__`. The others than plain classes of `diffusers.models.attention_processor`
  are under [Where a class is](#where-a-class-is).
- **uses**: the ways in which the class is called: self and cross attention, masks, images, group norm, several scales.
- **sites**: the attentions that these uses have by their mathematics, counted by hand: the slices of one attention are
  one. **found**, **rewritten** and **recognized** (in the best form already) are the rows of the report; more found
  than there are means that one was found in pieces.
- **in full**: all sites are found as they are and rewritten, or in the best form already, and nothing is left in the
  graph that the best form of the structure does without. **partly**: the rest is under [What remains](#what-remains).
- **error**: the largest difference of any output from eager over all uses and three sets of random inputs, relative to
  the largest number of that output, in float32 with the inner backend `aot_eager`. A call of
  `scaled_dot_product_attention` that stays one has none.
- **gradients**: the largest error of the gradient of any parameter, relative to the largest number of that gradient
  plus a hundredth of the largest in the module."""


def _totals(groups: dict[str, list[Row]]) -> str:
    def wrong(rows: list[Row], key: str, limit: float) -> str:
        return str(sum((_worst(row, key) or 0) > limit for row in rows))

    cells = [["all", *(str(len(rows)) for rows in groups.values())]]
    cells += [
        [word, *(str(sum(verdict(row) == word for row in rows)) for rows in groups.values())] for word in VERDICTS
    ]
    cells.append(
        [f"with an error above {VALUE_LIMIT:g}", *(wrong(rows, "error", VALUE_LIMIT) for rows in groups.values())]
    )
    gradients = (wrong(rows, "gradient_error", GRADIENT_LIMIT) for rows in groups.values())
    cells.append([f"with gradients off by more than {GRADIENT_LIMIT:g}", *gradients])
    return table(["", *groups], cells)


def _processors(rows: list[Row]) -> str:
    cells = []
    for structure in STRUCTURES:
        for row in rows:
            if row["structure"] != structure:
                continue
            what = verdict(row)
            if what == "cannot run" and _sum(row, "sites") != "-":
                what += (
                    f"; {_found([use for use in row['uses'] if 'cannot_run' not in use])} [instead](#what-cannot-run)"
                )
            counts = [str(len(row["uses"])), *(_sum(row, key) for key in _COUNTS)]
            errors = [number(_worst(row, key)) for key in ("error", "gradient_error")]
            cells.append([row["name"], str(_state(row)), structure, what, *counts, _kernels(row), *errors])
    header = ["name", "in diffusers", "structure", "rewritten", "uses", *_COUNTS, "kernels"]
    legend = "\n".join(f"- **{name}**: {meaning}." for name, meaning in STRUCTURES.items())
    return table([*header, "error", "gradients"], cells) + "\n\nThe structures:\n\n" + legend


def _state(row: Row) -> State:
    return State(**{**row["state"], "modules": tuple(row["state"]["modules"])})


def _models(rows: list[Row]) -> str:
    cells = []
    for row in rows:
        counts = [_sum(row, key) for key in _COUNTS]
        errors = [number(row.get(key)) for key in ("error", "gradient_error", "error_before")]
        cells.append([row["name"], escaped(row["form"]), verdict(row), *counts, *errors, str(row.get("inductor", "-"))])
    header = ["model", "under", "rewritten", *_COUNTS, "error", "gradients", "error before"]
    after = (
        "**error before** is that of `aot_eager` alone, **Inductor** what Inductor's own pass fuses in the same model."
    )
    return table([*header, "Inductor"], cells) + "\n\n" + after


def _left(rows: list[Row]) -> str:
    lines = [
        f"- **{row['name']}**: {'; '.join(escaped(text) for text in reasons(row))}" for row in rows if reasons(row)
    ]
    return "\n".join(lines) if lines else "Nothing."


def _cannot(rows: list[Row]) -> str:
    lines = []
    for row in rows:
        if verdict(row) != "cannot run":
            continue
        state = _state(row)
        texts = [row["needs"]] if row["needs"] else []
        texts += ["it has no `__call__`, so that nothing can be run"] if state.kind == "stub" else []
        texts += [f"making one raises {escaped(state.raises)}"] if state.raises else []
        raised = dict.fromkeys(use["cannot_run"] for use in row["uses"] if "cannot_run" in use)
        texts += [f"calling it raises {escaped(text)}" for text in raised if text != state.raises]
        texts += [f"measured instead: {row['instead']}"] if row["instead"] else []
        texts += [f"proved instead: {row['proved']}"] if row["proved"] else []
        lines.append(f"- **{row['name']}**: {'; '.join(texts)}.")
    return "\n".join(lines) if lines else "Nothing."


def _places(rows: list[Row]) -> str:
    lines = []
    for row in rows:
        state = _state(row)
        if state.kind == "class" and not state.moved:
            continue
        text = f"makes a `{state.makes}`" if state.makes else " and ".join(f"`{module}`" for module in state.modules)
        lines.append(f"- **{row['name']}**: {state}; {text}" if text else f"- **{row['name']}**: {state}")
    return "\n".join(lines)
