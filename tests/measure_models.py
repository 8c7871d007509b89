"""The table of the real models: ``python -m tests.measure_models --json FILE``.

For each model of the zoo: attentions, rewritten ones, the largest error against eager through the default inner
compiler, the largest error of a parameter's gradient in training mode, and the compilations at three lengths under
``dynamic=True``, next to those that ``aot_eager`` needs by itself.
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.table import Table

from attnrewrite import explain
from tests.helpers import relative_error, rewritten
from tests.test_models import parameter_gradients
from tests.zoo import ZOO, Entry

COLUMNS = ("model", "sites", "rewritten", "error", "gradient error", "compilations", "of aot_eager")


def measure(entry: Entry) -> dict[str, Any]:
    model = entry.build()
    report = explain(model, **entry.inputs(entry.lengths[0], 0))
    with torch.no_grad():
        torch._dynamo.reset()
        error = relative_error(entry.run(torch.compile(model, backend="attnrewrite")), entry.run(model))
        compilations = [_compilations(entry, model, backend) for backend in ("attnrewrite", "aot_eager")]
    torch._dynamo.reset()
    model.train()
    expected = parameter_gradients(entry, model, model)
    actual = parameter_gradients(entry, model, rewritten(model, "aot_eager"))
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    # A key's bias has no gradient but rounding noise, in eager as well.
    gradient_error = max(
        relative_error(actual[name], gradient)
        for name, gradient in expected.items()
        if float(gradient.abs().max()) > 1e-5 * largest
    )
    values = (entry.name, entry.sites, len(report.rewritten), error, gradient_error, *compilations)
    return dict(zip(COLUMNS, values, strict=True))


def _compilations(entry: Entry, model: torch.nn.Module, backend: str) -> int:
    torch._dynamo.reset()
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    options: dict[str, Any] | None = {"inner_backend": "aot_eager"} if backend == "attnrewrite" else None
    compiled = torch.compile(model, backend=backend, dynamic=True, options=options)
    for length in entry.lengths:
        entry.run(compiled, length)
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"] - before)


@click.command()
@click.option("--json", "path", type=click.Path(dir_okay=False, path_type=Path), help="Write the raw data here.")
def main(path: Path | None) -> None:
    table = Table(*COLUMNS)
    rows = []
    for entry in ZOO:
        rows.append(measure(entry))
        table.add_row(*(f"{value:.1e}" if isinstance(value, float) else str(value) for value in rows[-1].values()))
    Console().print(table)
    if path is not None:
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
        record = {
            "command": "python -m tests.measure_models " + " ".join(sys.argv[1:]),
            "commit": commit.stdout.strip(),
            "device": f"{platform.machine()}, {torch.get_num_threads()} threads",
            "versions": {"torch": torch.__version__, "python": platform.python_version()},
            "rows": rows,
        }
        path.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
