"""The command: measures every model in a process of its own and writes the results."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console

from tests.coverage.apart import apart
from tests.coverage.machine import describe
from tests.coverage.measure import CASES, ROOT, measure, warm_up
from tests.coverage.precision import DTYPES
from tests.coverage.table import line, markdown, total


@click.command()
@click.option(
    "--group",
    type=click.Choice(["packages", "repositories"]),
    default="packages",
    show_default=True,
    help="Models of packages, or attention as repositories that are no packages write it.",
)
@click.option("--only", multiple=True, metavar="NAME", type=click.Choice(sorted(CASES)), help="This model; repeatable.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Where the raw results go.")
@click.option("--write", type=click.Path(path_type=Path), help="Where the Markdown page goes.")
@click.option(
    "--from-json", type=click.Path(path_type=Path, exists=True), help="Measure nothing, read the raw results."
)
@click.option("--dtype", type=click.Choice(list(DTYPES)), default="float32", show_default=True)
@click.option("--device", default="cpu", show_default=True, help="Where the models run, such as cuda.")
@click.option("--gradients/--no-gradients", default=True, show_default=True)
@click.option("--inductor/--no-inductor", default=True, show_default=True, help="What Inductor's own pass fuses.")
@click.option("--timeout", default=400, show_default=True, help="Seconds for one model, on a CPU.")
def main(
    group: str,
    only: tuple[str, ...],
    json_file: Path | None,
    write: Path | None,
    from_json: Path | None,
    dtype: str,
    device: str,
    gradients: bool,
    inductor: bool,
    timeout: int,
) -> None:
    """Measures models with attention: rewritten, errors, and what Inductor's own pass fuses.

    With --only and a --json file that exists, the rows of the named models are replaced in it. A file holds one dtype.
    The last line says how many sites are rewritten and how many models are wrong.
    """
    for other in {CASES[name].group for name in only} - {group}:
        raise click.UsageError(f"--only names models of another group: add --group {other}")
    results = json.loads(from_json.read_text()) if from_json else empty(dtype, group, device)
    if not from_json:
        old = json.loads(json_file.read_text())["rows"] if only and json_file and json_file.exists() else []
        console = Console(soft_wrap=True, highlight=False)
        start = time.perf_counter()
        torch.set_num_threads(1)  # A fork waits forever for threads of OpenMP that only its parent has.
        warm_up()
        for name in only or [name for name, case in CASES.items() if case.group == group]:
            how: dict[str, Any] = {
                "dtype": DTYPES[dtype],
                "device": device,
                "gradients": gradients,
                "inductor": inductor,
            }
            work = partial(measure, CASES[name], **how)
            # CUDA does not run in a fork of a process that has it, as the one that has warmed up.
            row = measured(name, dtype, work, timeout) if device == "cpu" else work()
            row["commit"] = results["commit"]
            console.print(line(row), markup=False)
            results["rows"] = merged(old, [*results["rows"], row])
            results["seconds"] = round(time.perf_counter() - start)
            if json_file:
                json_file.write_text(json.dumps(results, indent=1) + "\n")
    if write:
        write.write_text(markdown(results))
    click.echo(total(results))


def empty(dtype: str, group: str, device: str = "cpu") -> dict[str, Any]:
    packages = {case.package for case in CASES.values()}
    about = describe(ROOT, "tests.coverage", packages)
    if device != "cpu":
        about["device"] = f"{torch.cuda.get_device_name(device)}; {about['device']}"
    return {**about, "dtype": dtype, "group": group, "seconds": 0, "rows": []}


def measured(name: str, dtype: str, work: Callable[[], dict[str, Any]], timeout: int) -> dict[str, Any]:
    case = CASES[name]
    lost = {"name": name, "package": case.package, "form": case.form, "sites": case.sites, "dtype": dtype}
    return {**lost, **apart(work, timeout)}


def merged(old: list[dict[str, Any]], new: list[dict[str, Any]]) -> list[dict[str, Any]]:
    rows = {row["name"]: row for row in (*old, *new)}  # The later one of two.
    return [rows[name] for name in CASES if name in rows]


if __name__ == "__main__":
    main()
