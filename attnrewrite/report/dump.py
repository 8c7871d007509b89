"""``ATTNREWRITE_DEBUG``: dumps graphs as Python: after each step for reading, and before and after as scripts that run.

Each compiled graph has a folder. Numbered files show its code after each step that changed it. The scripts for before
and after need only torch. A script contains the graph's code as ``nn.Module`` classes and loads the inputs of compile
time from ``inputs.pt`` next to it. If something cannot be written (a function of ``__main__``, a tensor subclass of
another package), a comment at the top of the script and a warning say so; the compilation continues.
"""

from __future__ import annotations

import hashlib
import logging
import operator
import pickle
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import fx

from attnrewrite.options.environment import debug_tensor_limit
from attnrewrite.report.dump_script import AmbientState, Script
from attnrewrite.report.dump_tensors import DumpTensors
from attnrewrite.report.graph_code import graph_source, one_line
from attnrewrite.report.html import report_to_html
from attnrewrite.report.report import RewriteReport
from attnrewrite.report.rows import GraphReport
from attnrewrite.report.text import report_to_text
from attnrewrite.torch_private import disable_current_modes

__all__ = ["GraphDump"]

log = logging.getLogger("attnrewrite.dump")


class GraphDump:
    """The folder of one graph's dump: the graph after each step, both forms as scripts that run, and the report."""

    def __init__(self, folder: Path, tensor_limit: int) -> None:
        """
        Args:
            folder: a new, empty folder.
            tensor_limit: the largest number of bytes of floating-point inputs to store.
        """
        self.folder = folder
        self._tensor_limit = tensor_limit
        self._count = 0
        self._written: list[object] = []

    @staticmethod
    def begin(directory: Path, name: str) -> GraphDump | None:
        """Makes the folder of a graph; returns None, with a warning, if it cannot be made.

        Args:
            directory: the parent of the folder. An existing folder is left alone: the next one is called ``<name>_2``.
            name: the graph's name, which names the folder.

        Raises:
            OptionError: ``ATTNREWRITE_DEBUG_MB`` is not a number.
        """
        limit = debug_tensor_limit()
        try:
            return GraphDump(_fresh_folder(directory, _safe_name(name)), limit)
        except OSError as error:
            log.warning("no dump of graph %s: %s", name, error)
            return None

    def add(self, step: str, gm: fx.GraphModule) -> None:
        """Writes the graph's code to the next numbered file, unless it is unchanged since the last one."""
        graph = [part for node in gm.graph.nodes for part in (node, node.target, node.args, node.kwargs)]
        # A changed node has new argument objects; comparing by value might add a guard.
        if len(graph) == len(self._written) and all(map(operator.is_, graph, self._written)):
            return
        self._written = graph
        name = f"{self._count:02}_{_safe_name(step)}.py"
        self._count += 1
        with disable_current_modes():
            _write(self.folder / name, f"# {self.folder.name}: {step}\n\n{graph_source(gm)}")

    def finish(
        self, graph: GraphReport, before: fx.GraphModule, after: fx.GraphModule, example_inputs: Sequence[Any]
    ) -> None:
        """Writes both forms of the graph as scripts that run, with their inputs and the report.

        A file that cannot be written is left out, and a warning says why.

        Args:
            graph: the graph's report.
            before: the captured graph.
            after: the rewritten graph; it takes the same inputs.
            example_inputs: the inputs of the graph: tensors, fake tensors, symbolic or plain numbers.
        """
        folder = self.folder
        state = AmbientState.current()
        # The dump may be written during a compilation, under its fake tensor and proxy modes.
        with disable_current_modes(), torch.no_grad():
            tensors = DumpTensors(self._tensor_limit)
            inputs = [tensors.add(("inputs", index), value) for index, value in enumerate(example_inputs)]
            scripts = {
                side: Script(graph, side, module, tensors, inputs, state, folder.name)
                for side, module in (("before", before), ("after", after))
            }
            tensors.settle()
            try:
                torch.save(tensors.stored(), folder / "inputs.pt")
            except (OSError, RuntimeError, pickle.PicklingError) as error:
                for script in scripts.values():
                    script.problems.append(f"the inputs could not be stored: {one_line(error)}")
        for side, script in scripts.items():
            _write(folder / f"{folder.name}_{side}.py", script.source())
            for problem in script.problems:
                log.warning("the dumped graph %s_%s.py does not run by itself: %s", folder.name, side, problem)
        report = RewriteReport(model=graph.name, graphs=[graph], versions={"torch": torch.__version__})
        _write(folder / "report.json", report.to_json())
        _write(folder / "report.txt", report_to_text(report))
        _write(folder / "report.html", report_to_html(report))


# -- files ------------------------------------------------------------------------------------------------------------


def _safe_name(name: str) -> str:
    """``name`` in a form that every file system accepts, short enough for the suffixes."""
    safe = re.sub(r"[^A-Za-z0-9_.-]+", "_", name).strip("._-")
    if len(safe) > 80:
        safe = f"{safe[:70]}_{hashlib.sha256(name.encode()).hexdigest()[:8]}"
    # Windows keeps these for devices, with or without an ending.
    if re.fullmatch(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", safe, re.IGNORECASE):
        safe = f"graph_{safe}"
    return safe or "graph"


def _fresh_folder(directory: Path, name: str) -> Path:
    """A new folder. Several processes may dump to one directory: ``mkdir`` decides which one gets a name."""
    directory.mkdir(parents=True, exist_ok=True)
    number = 1
    while True:
        folder = directory / (name if number == 1 else f"{name}_{number}")
        try:
            folder.mkdir()
        except FileExistsError:
            number += 1
        else:
            return folder


def _write(path: Path, text: str) -> None:
    try:
        # A path or a name may contain surrogates for bytes that are not UTF-8; the file is written nevertheless.
        path.write_text(text, encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        log.warning("%s could not be written: %s", path, error)
