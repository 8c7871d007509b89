"""The option ``autotune``: times kernels on a site's own shapes and device while the graph is compiled.

Results are stored on disk, in one file for each device, version and shape (``ATTNREWRITE_CACHE_DIR``).
"""

from __future__ import annotations

import dataclasses
import gc
import hashlib
import importlib.metadata
import json
import logging
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from torch import fx

from attnrewrite.ir.site import CanonicalAttention
from attnrewrite.ir.source import source_location
from attnrewrite.kernels import Kernel
from attnrewrite.options.compile_options import Policy
from attnrewrite.options.environment import cache_directory
from attnrewrite.selection.cost_table import Workload
from attnrewrite.selection.timing import Standalone, Times, compiled_alone, cut_out, smallest_run, time_together

__all__ = ["tuned"]

log = logging.getLogger("attnrewrite")


def tuned(gm: fx.GraphModule, site: CanonicalAttention, kernels: Sequence[Kernel], policy: Policy) -> dict[str, float]:
    """Milliseconds of each kernel at the site, in training including the backward pass; kernels that fail are left out.

    Operands are random, and masks that are inputs of the graph keep every key.
    """
    file = _file(site, policy)
    known = _read(file)
    missing = [kernel for kernel in kernels if _key(kernel) not in known]
    if missing:
        # All kernels again: only times that were taken in turns are comparable.
        known |= {_key(kernel): time for kernel, time in _measured(gm, site, kernels, policy)}
        _write(file, site, known)
    return {kernel.name: time for kernel in kernels if (time := known.get(_key(kernel))) is not None}


def _measured(
    gm: fx.GraphModule, site: CanonicalAttention, kernels: Sequence[Kernel], policy: Policy
) -> list[tuple[Kernel, float | None]]:
    where = source_location(site.anchor) or site.anchor.name
    runs: dict[str, Any] = {}
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task(f"attnrewrite: autotuning {where}")
        for kernel in kernels:
            progress.update(task, description=f"attnrewrite: compiling {kernel.name} for {where}")
            log.info("autotuning %s: compiling %s", where, kernel.name)
            try:
                runs[kernel.name] = _run_of(cut_out(gm, site, kernel), site, policy)
                runs[kernel.name]()
            except Exception as error:  # noqa: BLE001 - Any package may fail in its own way.
                runs.pop(kernel.name, None)
                log.warning("autotuning %s: %s failed and is left out: %s", where, kernel.name, error)
        progress.update(task, description=f"attnrewrite: timing {', '.join(runs)} for {where}")
        smallest = smallest_run(site.device, site.differentiable, policy)
        smallest()
        times = time_together(runs, site.device, smallest, cuda_graphs=policy.cuda_graphs)
    runs.clear()
    gc.collect()
    return [(kernel, _milliseconds(times.get(kernel.name), policy)) for kernel in kernels]


def _milliseconds(times: Times | None, policy: Policy) -> float | None:
    if times is None:
        return None
    return times.graph_ms if policy.cuda_graphs and times.graph_ms is not None else times.call_ms


def _run_of(alone: Standalone, site: CanonicalAttention, policy: Policy) -> Any:
    inputs = alone.random_inputs(site.differentiable)
    with torch.set_grad_enabled(site.differentiable):
        call = compiled_alone(alone, inputs, policy)
    operands = [value for value in inputs if value.requires_grad]

    def run() -> Any:
        with torch.set_grad_enabled(site.differentiable):
            output = call(*inputs)
            return torch.autograd.grad(output, operands, torch.ones_like(output)) if operands else output

    return run


# The results, on disk.


def _key(kernel: Kernel) -> str:
    return f"{kernel.name}: {kernel.availability().detail}"


def _file(site: CanonicalAttention, policy: Policy) -> Path:
    device = torch.cuda.get_device_name(site.device) if site.device.type == "cuda" else site.device.type
    what = {
        "device": device,
        "torch": torch.__version__,
        "attnrewrite": importlib.metadata.version("attnrewrite"),
        "inner_backend": str(policy.inner_backend),
        "cuda_graphs": policy.cuda_graphs,
        "threads": torch.get_num_threads() if site.device.type == "cpu" else None,
        "attended": policy.assume_attended_rows,
        "site": _described(site),
        **dataclasses.asdict(Workload.of(site)),
    }
    digest = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()
    return cache_directory() / "autotune" / f"{digest[:32]}.json"


def _described(site: CanonicalAttention) -> str:
    strides = [tuple(map(str, part.node.meta["val"].stride())) for part in (site.query, site.key, site.value)]
    return f"{site.scores.structure} {site.scores.masked_rows.value} {site.scores.band} {strides}"


def _read(file: Path) -> dict[str, float | None]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError:
        log.warning("%s is damaged; the kernels are timed again", file)
        return {}
    return dict(found["milliseconds"])


def _write(file: Path, site: CanonicalAttention, milliseconds: dict[str, float | None]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    content = {"workload": dataclasses.asdict(Workload.of(site)), "milliseconds": milliseconds}
    with tempfile.NamedTemporaryFile("w", dir=file.parent, suffix=".tmp", delete=False, encoding="utf-8") as part:
        json.dump(content, part, indent=2)
    os.replace(part.name, file)  # Another process sees the old file or the new one, whole.
