"""The command: measures every model in a process of its own and writes the results."""

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
from tests.coverage.measure import CASES, measure, warm_up
from tests.coverage.table import line, markdown

ROOT = Path(__file__).parents[2]


@click.command()
@click.option("--only", multiple=True, metavar="NAME", type=click.Choice(sorted(CASES)), help="This model; repeatable.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Where the raw results go.")
@click.option("--write", type=click.Path(path_type=Path), help="Where the Markdown page goes.")
@click.option(
    "--from-json", type=click.Path(path_type=Path, exists=True), help="Measure nothing, read the raw results."
)
@click.option("--gradients/--no-gradients", default=True, show_default=True)
@click.option("--timeout", default=400, show_default=True, help="Seconds for one model.")
def main(
    only: tuple[str, ...],
    json_file: Path | None,
    write: Path | None,
    from_json: Path | None,
    gradients: bool,
    timeout: int,
) -> None:
    """Measures models with attention: rewritten, errors, and what Inductor's own pass fuses.

    With --only and a --json file that exists, the rows of the named models are replaced in it.
    """
    results = json.loads(from_json.read_text()) if from_json else empty()
    if not from_json:
        old = json.loads(json_file.read_text())["rows"] if only and json_file and json_file.exists() else []
        console = Console(soft_wrap=True, highlight=False)
        start = time.perf_counter()
        torch.set_num_threads(1)  # A fork waits forever for threads of OpenMP that only its parent has.
        warm_up()
        for name in only or CASES:
            row = {**measured(name, gradients, timeout), "commit": results["commit"]}
            console.print(line(row), markup=False)
            results["rows"] = merged(old, [*results["rows"], row])
            results["seconds"] = round(time.perf_counter() - start)
            if json_file:
                json_file.write_text(json.dumps(results, indent=1) + "\n")
    if write:
        write.write_text(markdown(results))


def empty() -> dict[str, Any]:
    packages = {case.package for case in CASES.values()}
    return {**describe(ROOT, "tests.coverage", packages), "seconds": 0, "rows": []}


def measured(name: str, gradients: bool, timeout: int) -> dict[str, Any]:
    case = CASES[name]
    lost = {"name": name, "package": case.package, "form": case.form, "sites": case.sites}
    return {**lost, **apart(lambda: measure(case, gradients=gradients), timeout)}


def merged(old: list[dict[str, Any]], new: list[dict[str, Any]]) -> list[dict[str, Any]]:
    rows = {row["name"]: row for row in (*old, *new)}  # The later one of two.
    return [rows[name] for name in CASES if name in rows]


if __name__ == "__main__":
    main()
