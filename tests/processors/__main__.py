"""The command: measures every processor and model in a process of its own and writes the results."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console

from tests.coverage.apart import apart
from tests.coverage.machine import describe
from tests.coverage.measure import warm_up
from tests.processors.entries import PROCESSORS
from tests.processors.measure import measure, measure_model
from tests.processors.models import MODELS
from tests.processors.table import line, markdown

ROOT = Path(__file__).parents[2]


@click.command()
@click.option(
    "--only",
    multiple=True,
    metavar="NAME",
    type=click.Choice(sorted({*PROCESSORS, *MODELS})),
    help="This processor or model; repeatable.",
)
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Where the raw results go.")
@click.option("--write", type=click.Path(path_type=Path), help="Where the Markdown page goes.")
@click.option(
    "--from-json", type=click.Path(path_type=Path, exists=True), help="Measure nothing, read the raw results."
)
@click.option("--models/--no-models", default=True, show_default=True, help="Whole models too.")
@click.option("--gradients/--no-gradients", default=True, show_default=True)
@click.option("--timeout", default=400, show_default=True, help="Seconds for one processor or model.")
def main(
    only: tuple[str, ...],
    json_file: Path | None,
    write: Path | None,
    from_json: Path | None,
    models: bool,
    gradients: bool,
    timeout: int,
) -> None:
    """Measures the attention processors of diffusers, and models that use them.

    With --only and a --json file that exists, the rows of the named ones are replaced in it.
    """
    results = read(from_json) if from_json else empty()
    if not from_json:
        if only and json_file and json_file.exists():
            old = read(json_file)
            results = {**results, "rows": old["rows"], "models": old["models"]}
        console = Console(soft_wrap=True, highlight=False)
        start = time.perf_counter()
        torch.set_num_threads(1)  # A fork waits forever for threads of OpenMP that only its parent has.
        warm_up()
        for name in only or (*PROCESSORS, *(MODELS if models else ())):
            row = {**measured(name, gradients, timeout), "commit": results["commit"]}
            console.print(line(row), markup=False)
            kind, order = ("rows", tuple(PROCESSORS)) if name in PROCESSORS else ("models", tuple(MODELS))
            results[kind] = merged(results[kind], row, order)
            results["seconds"] = round(time.perf_counter() - start)
            if json_file:
                json_file.write_text(json.dumps(results, indent=1) + "\n")
    if write:
        write.write_text(markdown(results))


def read(file: Path) -> dict[str, Any]:
    """The raw results in a file; files of earlier versions spell the status "recognized" in the British way."""

    def current(entry: dict[str, Any]) -> dict[str, Any]:
        return {"recognized" if key == "recognised" else key: value for key, value in entry.items()}

    results: dict[str, Any] = json.loads(file.read_text(), object_hook=current)
    return results


def empty() -> dict[str, Any]:
    return {**describe(ROOT, "tests.processors", ()), "seconds": 0, "rows": [], "models": []}


def measured(name: str, gradients: bool, timeout: int) -> dict[str, Any]:
    if name in MODELS:
        model = MODELS[name]
        lost = {"name": name, "form": model.form, "sites": model.sites}
        return {**lost, **apart(lambda: measure_model(model, gradients=gradients), timeout)}
    processor = PROCESSORS[name]
    empty = {
        "name": name,
        "structure": processor.structure,
        "needs": processor.needs,
        "instead": processor.instead,
        "proved": processor.proved,
    }
    lost = {**empty, "state": {"kind": "class", "modules": []}, "uses": []}
    return {**lost, **apart(lambda: measure(processor, gradients=gradients), timeout)}


def merged(old: list[dict[str, Any]], row: dict[str, Any], order: tuple[str, ...]) -> list[dict[str, Any]]:
    rows = {**{each["name"]: each for each in old}, row["name"]: row}
    return [rows[name] for name in order if name in rows]


if __name__ == "__main__":
    main()
