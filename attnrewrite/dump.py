"""Graphs as Python: the source that a report shows, and the scripts of ``ATTNREWRITE_DEBUG`` that run by themselves.

A dumped script needs nothing but torch. It holds the graph's code as ``nn.Module`` classes and loads the inputs that
were there at compile time from ``inputs.pt`` next to it. What cannot be written down (a function of ``__main__``, a
tensor subclass of some package) is said in a comment at the top of the script and in a warning; it never stops the
compilation that asked for the dump.
"""

from __future__ import annotations

import ast
import builtins
import hashlib
import keyword
import logging
import math
import pickle
import re
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.graph import CodeGen
from torch.utils._python_dispatch import _disable_current_modes, is_traceable_wrapper_subclass

from attnrewrite.policy import debug_tensor_limit
from attnrewrite.render import ASSIGNMENT, report_to_html, report_to_text, short_path
from attnrewrite.report import GraphReport, RewriteReport

__all__ = ["dump_graph", "graph_source"]

log = logging.getLogger("attnrewrite.dump")

_FRAME = re.compile(r'^\s*File "(?P<file>.+)", line (?P<line>\d+), in (?P<function>.+)$')
_CANNOT_GENERATE = (RuntimeError, AttributeError, AssertionError, NotImplementedError, TypeError)
"""What fx raises when a node has no spelling in Python: a lambda, a partial, an unknown kind of node."""

# The names that fx gives its built-in globals, and what a script says for each. `device` is replaced by a function of
# the script's own, which falls back to the CPU.
_FX_BUILTINS = {
    "inf": "from math import inf",
    "nan": "from math import nan",
    "NoneType": "NoneType = type(None)",
    "torch": "",
    "device": "",
    "fx_pytree": "import torch.fx._pytree as fx_pytree",
    "pytree": "import torch.utils._pytree as pytree",
}
_TORCH_OP_NAMESPACES = ("aten", "prim", "prims", "higher_order", "quantized", "c10d", "_c10d_functional", "profiler")
_TRITON_WRAPPERS = ("triton_kernel_wrapper_mutation", "triton_kernel_wrapper_functional")


def graph_source(gm: fx.GraphModule) -> str:
    """Python source of the module's ``forward``, each run of lines under the place in the user's code it comes from.

    The ``forward`` of nested graphs (the branches of ``torch.cond``, a checkpointed block) follows under its name.
    """
    parts = [_commented(gm, _python_code(gm).src)]
    for name, child in _graph_children(gm):
        parts.append(f"# self.{name}\n{graph_source(child)}")
    return "\n\n".join(parts)


def dump_graph(
    graph: GraphReport, before: fx.GraphModule, after: fx.GraphModule, example_inputs: Sequence[Any], directory: Path
) -> Path:
    """Writes both forms of a graph as scripts that run, with their inputs and the report.

    Args:
        graph: the graph's report; its name gives the folder and the files their names.
        before: the graph as it was captured.
        after: the graph as it was rewritten; it takes the same inputs.
        example_inputs: what the graph is called with: tensors, fake tensors, symbolic or plain numbers.
        directory: where the graph's folder goes. A folder that is there already is left alone: the next one is
            called ``<name>_2``.

    Returns:
        The graph's folder. A file that could not be written is missing from it, and a warning says why.

    Raises:
        OptionError: ``ATTNREWRITE_DEBUG_MB`` is not a number.
    """
    limit = debug_tensor_limit()
    try:
        folder = _fresh_folder(directory, _safe_name(graph.name))
    except OSError as error:
        log.warning("no dump of graph %s: %s", graph.name, error)
        return directory / _safe_name(graph.name)
    state = _AmbientState.current()
    # The dump may be asked for in the middle of a compilation, under its fake tensor and proxy modes.
    with _disable_current_modes(), torch.no_grad():
        tensors = _Tensors(limit)
        inputs = [tensors.add(("inputs", index), value) for index, value in enumerate(example_inputs)]
        scripts = {
            side: _Script(graph, side, module, tensors, inputs, state, folder.name)
            for side, module in (("before", before), ("after", after))
        }
        tensors.settle()
        try:
            torch.save(tensors.stored(), folder / "inputs.pt")
        except (OSError, RuntimeError, pickle.PicklingError) as error:
            for script in scripts.values():
                script.problems.append(f"the inputs could not be stored: {_one_line(error)}")
    for side, script in scripts.items():
        _write(folder / f"{folder.name}_{side}.py", script.source())
        for problem in script.problems:
            log.warning("the dumped graph %s_%s.py does not run by itself: %s", folder.name, side, problem)
    report = RewriteReport(model=graph.name, graphs=[graph], versions={"torch": torch.__version__})
    _write(folder / "report.json", report.to_json())
    _write(folder / "report.txt", report_to_text(report))
    _write(folder / "report.html", report_to_html(report))
    return folder


# -- files ------------------------------------------------------------------------------------------------------------


def _safe_name(name: str) -> str:
    """``name`` as every file system takes it, and short enough for all that is put behind it."""
    safe = re.sub(r"[^A-Za-z0-9_.-]+", "_", name).strip("._-")
    if len(safe) > 80:
        safe = f"{safe[:70]}_{hashlib.sha256(name.encode()).hexdigest()[:8]}"
    # Windows keeps these for devices, with or without an ending.
    if re.fullmatch(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", safe, re.IGNORECASE):
        safe = f"graph_{safe}"
    return safe or "graph"


def _fresh_folder(directory: Path, name: str) -> Path:
    """A new folder; ``mkdir`` decides who gets a name, so that several processes may dump to one place."""
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
        # A path or a name may hold bytes that are no UTF-8 (surrogates); they must not cost the file.
        path.write_text(text, encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        log.warning("%s could not be written: %s", path, error)


def _one_line(value: object) -> str:
    return " ".join(str(value).split())


# -- code -------------------------------------------------------------------------------------------------------------


def _python_code(gm: fx.GraphModule) -> Any:
    """fx's own code for the graph, in the plainest spelling; the graph is as it was afterwards.

    Inputs and outputs are flat: an exported module's signature is a pytree, which a script has no need for. Inputs
    have their node's name from the start: Dynamo's graphs begin with a hundred lines ``l_x_ = L_x_``. There are no
    annotations: they may name what cannot be imported, and say little, since every input is a tensor or a number.
    """
    codegen = gm.graph._codegen
    saved = {node: (node.target, node.type) for node in gm.graph.nodes}
    gm.graph.set_codegen(CodeGen())
    try:
        for node in saved:
            node.type = None
            if node.op == "placeholder" and not str(node.target).startswith("*"):
                node.target = node.name
        return gm.graph.python_code("self")
    finally:
        gm.graph.set_codegen(codegen)
        for node, (target, annotation) in saved.items():
            node.target, node.type = target, annotation


def _commented(gm: fx.GraphModule, source: str) -> str:
    """The source with a comment line wherever the place in the user's code changes."""
    nodes = {node.name: node for node in gm.graph.nodes}
    signature, *body = source.strip("\n").split("\n")
    if len(signature) > 110:
        names = signature.removeprefix("def forward(").removesuffix("):")
        wrapped = textwrap.wrap(names, 100, break_long_words=False, break_on_hyphens=False)
        signature = "\n        ".join(["def forward(", *wrapped]) + "\n):"
    lines = [signature]
    previous = ""
    for line in body:
        assigned = ASSIGNMENT.match(line)
        node = nodes.get(assigned["name"]) if assigned else None
        place = _place(node.meta.get("stack_trace")) if node is not None and node.op != "placeholder" else ""
        if place and place != previous:
            lines.append(f"    # {place}")
            previous = place
        lines.append(line.rstrip())
    return "\n".join(lines).rstrip() + "\n"


def _place(stack_trace: str | None) -> str:
    """The innermost frame of a stack trace as "file:line in function: code"."""
    lines = (stack_trace or "").splitlines()
    for index in range(len(lines) - 1, -1, -1):
        frame = _FRAME.match(lines[index])
        if frame:
            code = lines[index + 1].strip() if index + 1 < len(lines) else ""
            place = f"{short_path(frame['file'])}:{frame['line']} in {frame['function']}"
            return _one_line(f"{place}: {code}" if code else place)
    return ""


def _graph_children(gm: fx.GraphModule) -> Iterator[tuple[str, fx.GraphModule]]:
    """The nested graphs that the graph's own nodes name, each once, in the order of their use."""
    seen = set()
    for node in gm.graph.nodes:
        if node.op in ("get_attr", "call_module") and node.target not in seen:
            seen.add(node.target)
            child = _attribute(gm, str(node.target))
            if isinstance(child, fx.GraphModule):
                yield str(node.target), child


def _attribute(root: object, path: str) -> Any:
    for part in path.split("."):
        root = getattr(root, part, None)
    return root


# -- tensors ----------------------------------------------------------------------------------------------------------


@dataclass
class _Entry:
    """One value that the scripts need: how it is written in them, and the tensor to store, if any."""

    key: tuple[str, int | str]
    value: Any
    expression: str = ""
    comment: str = ""
    problem: str = ""
    drawn: bool = False
    stored: torch.Tensor | None = None


@dataclass
class _Tensors:
    """The inputs and constants of both scripts. ``settle`` decides for all of them together what is stored."""

    limit: int
    entries: list[_Entry] = field(default_factory=list)
    over_limit: bool = False

    def add(self, key: tuple[str, int | str], value: Any) -> _Entry:
        entry = _Entry(key, value)
        self.entries.append(entry)
        return entry

    def settle(self) -> None:
        """Fills the entries' expressions, and their stored tensors."""
        tensors = [entry for entry in self.entries if isinstance(entry.value, torch.Tensor)]
        for entry in self.entries:
            if not isinstance(entry.value, torch.Tensor):
                self._settle_plain(entry)
        groups: dict[object, list[_Entry]] = {}
        for entry in tensors:
            if self._is_real(entry):
                # Tensors of one storage are kept together, so that what was aliased stays aliased.
                groups.setdefault(_storage_key(entry.value), []).append(entry)
            elif not entry.problem:
                self._draw([entry])
        floating = [group for group in groups.values() if any(_is_floating(entry.value) for entry in group)]
        self.over_limit = sum(_extent_bytes(group) for group in floating) > self.limit
        for group in groups.values():
            if self.over_limit and all(_is_floating(entry.value) for entry in group):
                self._draw(group)
            else:
                self._store(group)

    def stored(self) -> dict[str, dict[int | str, torch.Tensor]]:
        """What goes into ``inputs.pt``."""
        result: dict[str, dict[int | str, torch.Tensor]] = {"inputs": {}, "before": {}, "after": {}}
        for entry in self.entries:
            if entry.stored is not None:
                result[entry.key[0]][entry.key[1]] = entry.stored
        return result

    def _settle_plain(self, entry: _Entry) -> None:
        value = entry.value
        if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            hint = _hint(value)
            entry.comment = f"the symbolic value {value} of the compiled call"
            value = hint
            if hint is None:
                entry.problem = f"the value of {entry.value} is known only at run time"
        if isinstance(value, (bool, int, str, bytes)) or value is None:
            entry.expression = repr(value)
        elif isinstance(value, (float, complex)):
            # repr(inf) is no Python; float("inf") is.
            finite = math.isfinite(value) if isinstance(value, float) else True
            entry.expression = repr(value) if finite else f'float("{value}")'
        elif isinstance(value, (torch.dtype, torch.layout, torch.memory_format)):
            entry.expression = str(value)
        elif isinstance(value, torch.device):
            entry.expression = f"place({str(value)!r})"
        else:
            entry.problem = f"an object of type {type(value).__qualname__} cannot be written into a script"
        if entry.problem:
            entry.expression = f"missing({entry.problem!r})"

    def _is_real(self, entry: _Entry) -> bool:
        """Whether the tensor holds data of its own that can be stored; notes the problem where nothing can be done."""
        value = entry.value
        if isinstance(value, FakeTensor):
            sizes = [*map(_hint, value.shape), *map(_hint, value.stride())]
            if None in sizes:
                entry.problem = f"the size {tuple(value.shape)} of a tensor is known only at run time"
        elif is_traceable_wrapper_subclass(value) or value.layout is not torch.strided or value.is_quantized:
            kind = type(value).__qualname__ if type(value) is not torch.Tensor else str(value.layout)
            entry.problem = f"a tensor of the kind {kind} cannot be stored for a script that needs only torch"
        elif value.device.type != "meta":
            return True
        if entry.problem:
            entry.expression = f"missing({entry.problem!r})"
        return False

    def _store(self, group: list[_Entry]) -> None:
        compact = _compact([entry.value for entry in group])
        for entry, tensor in zip(group, compact, strict=True):
            entry.stored = tensor
            entry.expression = f"stored[{entry.key[1]!r}]"
            entry.comment = f"{_dtype_name(tensor)} {tuple(tensor.shape)}"
            self._finish(entry)

    def _draw(self, group: list[_Entry]) -> None:
        values = [entry.value for entry in group]
        shared = len(group) > 1 and len({value.dtype for value in values}) == 1
        first, end = min(map(_offset, values)), max(map(_end, values))
        for entry in group:
            value = entry.value
            shape, stride = tuple(map(_hint, value.shape)), tuple(map(_hint, value.stride()))
            arguments = [str(shape), str(stride), str(value.dtype), repr(str(value.device))]
            if shared:
                arguments.append(f"storage={group[0].key!r}, size={end - first}, offset={_offset(value) - first}")
            entry.drawn = True
            entry.expression = f"draw({', '.join(arguments)})"
            entry.comment = "not stored: random numbers" if _is_floating(value) else "not stored: zeros (ones if bool)"
            self._finish(entry)

    @staticmethod
    def _finish(entry: _Entry) -> None:
        if entry.value.requires_grad:
            entry.expression += ".requires_grad_()"


def _is_floating(tensor: torch.Tensor) -> bool:
    return tensor.dtype.is_floating_point or tensor.dtype.is_complex


def _dtype_name(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _hint(value: Any) -> Any:
    """A number as it is; for a symbolic one what it was in the compiled call, None if not known. Adds no guard."""
    return value.node.hint if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)) else value


def _storage_key(tensor: torch.Tensor) -> object:
    storage = tensor.untyped_storage()
    # An empty storage has no address to compare.
    return (str(tensor.device), storage.data_ptr()) if storage.nbytes() else id(tensor)


def _offset(tensor: torch.Tensor) -> int:
    return int(_hint(tensor.storage_offset()) or 0)


def _end(tensor: torch.Tensor) -> int:
    """One past the last element of the storage that the tensor reaches."""
    shape, strides = [_hint(n) for n in tensor.shape], [_hint(n) for n in tensor.stride()]
    if 0 in shape:
        return _offset(tensor)
    return int(_offset(tensor) + 1 + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True)))


def _extent_bytes(group: Sequence[_Entry]) -> int:
    """How many bytes of their common storage the tensors reach, from the first to the last."""
    tensors = [entry.value for entry in group]
    start = min(_offset(tensor) * tensor.element_size() for tensor in tensors)
    end = max(_end(tensor) * tensor.element_size() for tensor in tensors)
    return int(end - start)


def _compact(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The tensors of one storage, on a copy of the part they reach if that is smaller; strides and aliases stay."""
    plain = [tensor.detach().as_subclass(torch.Tensor) for tensor in tensors]
    if any(tensor.is_conj() or tensor.is_neg() for tensor in plain):
        # A pending conjugation is a flag on the tensor, not in the storage; it is carried out.
        return [tensor.resolve_conj().resolve_neg().clone() for tensor in plain]
    storage = plain[0].untyped_storage()
    # Sixteen bytes: no element is larger, so every offset stays a whole number of elements.
    start = min(_offset(tensor) * tensor.element_size() for tensor in plain) // 16 * 16
    end = max(_end(tensor) * tensor.element_size() for tensor in plain)
    if start == 0 and end == storage.nbytes():
        return plain
    piece = torch.empty(0, dtype=torch.uint8, device=plain[0].device).set_(storage, start, (max(0, end - start),), (1,))
    copy = piece.clone().untyped_storage()
    return [
        torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(
            copy, _offset(tensor) - start // tensor.element_size(), tensor.size(), tensor.stride()
        )
        for tensor in plain
    ]


# -- scripts ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _AmbientState:
    """What a graph's result depends on beside its inputs: the modes that were on around the compiled call."""

    grad: bool
    autocast: tuple[tuple[str, torch.dtype], ...]
    default_dtype: torch.dtype

    @staticmethod
    def current() -> _AmbientState:
        devices = ["cpu"]
        accelerator = torch.accelerator.current_accelerator()
        if accelerator is not None:
            devices.append(accelerator.type)
        autocast = tuple((d, torch.get_autocast_dtype(d)) for d in devices if torch.is_autocast_enabled(d))
        return _AmbientState(torch.is_grad_enabled(), autocast, torch.get_default_dtype())


class _Script:
    """One dumped script; ``problems`` are the reasons why it will not run by itself."""

    def __init__(
        self,
        graph: GraphReport,
        side: str,
        gm: fx.GraphModule,
        tensors: _Tensors,
        inputs: list[_Entry],
        state: _AmbientState,
        stem: str,
    ) -> None:
        self.graph, self.side, self.stem = graph, side, stem
        self.tensors, self.inputs, self.state = tensors, inputs, state
        self.constants: list[_Entry] = []
        self.imports: dict[str, str] = {}
        self.problems: list[str] = []
        self.names = [node.name for node in gm.graph.nodes if node.op == "placeholder"]
        if len(self.names) != len(inputs):
            self.problems.append(f"the graph takes {len(self.names)} inputs, but {len(inputs)} were given")
        self.classes: list[str] = []
        self._add_class("Graph", "", gm)

    def _add_class(self, name: str, prefix: str, gm: fx.GraphModule) -> None:
        """Adds the class for a graph, after those of the graphs nested in it."""
        init: list[str] = []
        containers: set[str] = set()
        for target in dict.fromkeys(str(n.target) for n in gm.graph.nodes if n.op in ("get_attr", "call_module")):
            *parents, _ = target.split(".")
            for depth in range(1, len(parents) + 1):
                container = ".".join(parents[:depth])
                if container not in containers:
                    containers.add(container)
                    init.append(_assignment(container, "torch.nn.Module()"))
            init.append(_assignment(target, self._attribute(name, f"{prefix}{target}", _attribute(gm, target))))
        lines = [f"class {name}(torch.nn.Module):"]
        if init:
            lines += ["    def __init__(self, constants):", "        super().__init__()"]
            lines += [f"        {line}" for line in init] + [""]
        else:
            lines += ["    def __init__(self, constants):", "        super().__init__()", ""]
        try:
            code = _python_code(gm)
        except _CANNOT_GENERATE as error:
            self.problems.append(f"fx cannot write the code of {prefix or 'the graph'}: {_one_line(error)}")
            body = "def forward(self, *inputs):\n    raise NotImplementedError\n"
        else:
            self._import_globals(code.globals)
            body = _commented(gm, code.src)
        lines += [f"    {line}" if line else "" for line in body.rstrip().split("\n")]
        self.classes.append("\n".join(lines))

    def _attribute(self, owner: str, path: str, value: Any) -> str:
        """The expression for what a ``get_attr`` or ``call_module`` node refers to."""
        if isinstance(value, fx.GraphModule):
            name = f"{owner}_{re.sub(r'[^A-Za-z0-9_]', '_', path.rsplit('.', 1)[-1])}"
            self._add_class(name, f"{path}.", value)
            return f"graph_module({name}(constants))"
        if isinstance(value, torch.Tensor):
            self.constants.append(self.tensors.add((self.side, path), value))
            return f"constants[{path!r}]"
        if isinstance(value, (bool, int, str)) or value is None:
            return repr(value)
        problem = f"self.{path} is an object of type {type(value).__qualname__}, which a script cannot hold"
        self.problems.append(problem)
        return f"missing({problem!r})"

    def _import_globals(self, names: dict[str, Any]) -> None:
        for name, value in names.items():
            if name in _FX_BUILTINS:
                continue
            module, qualname = getattr(value, "__module__", None), getattr(value, "__qualname__", None)
            statement = f"from {module} import {qualname} as {name}"
            if self.imports.setdefault(name, statement) != statement:
                self.problems.append(f"two different functions are called {name}")
            elif module in (None, "__main__", "builtins") or "." in str(qualname):
                self.problems.append(f"{module}.{qualname} cannot be imported from another script")
            elif getattr(sys.modules.get(str(module)), str(qualname), None) is not value:
                self.problems.append(f"{qualname} is not found in {module}")

    def source(self) -> str:
        """The whole script."""
        classes = "\n\n\n".join(self.classes)
        self.problems += [entry.problem for entry in (*self.inputs, *self.constants) if entry.problem]
        imports = [text for name, text in _FX_BUILTINS.items() if text and re.search(rf"\b{name}\b", classes)]
        imports += [*self.imports.values(), *self._torch_imports(classes)]
        loaders = [self._loader("load_inputs", self.inputs), self._loader("load_constants", self.constants)]
        runner = _RUNNER.replace("@CONTEXT@", self._context())
        parts = [
            "import argparse\nimport importlib.util\nimport inspect\nimport sys\nfrom pathlib import Path\n\n"
            + "\n".join(["import torch", *dict.fromkeys(imports)]),
            self._settings() + "\n\n\n" + classes,
            *loaders,
            runner + _HELPERS,
            _MAIN_AFTER if self.side == "after" else _MAIN_BEFORE,
        ]
        code = "\n\n\n".join(part.strip("\n") for part in parts) + "\n"
        self._check(code)
        return self._header() + code

    def _settings(self) -> str:
        devices = sorted({str(e.value.device) for e in self.tensors.entries if isinstance(e.value, torch.Tensor)})
        return f"HERE = Path(__file__).resolve().parent\nSEED = 0\nDEVICES = {devices!r}  # of the stored tensors"

    def _context(self) -> str:
        contexts = [f"torch.set_grad_enabled({self.state.grad})"]
        contexts += [f'torch.autocast("{device}", dtype={dtype})' for device, dtype in self.state.autocast]
        return ", ".join(contexts)

    def _loader(self, function: str, entries: list[_Entry]) -> str:
        inputs = function == "load_inputs"
        what = (
            "The graph's inputs as they were at compile time, loaded afresh: a graph may write to them."
            if inputs
            else "The tensors that the graph holds itself."
        )
        lines = [f"def {function}():", f'    """{what}"""']
        if any(entry.stored is not None for entry in entries):
            lines.append(f'    stored = load_file()["{"inputs" if inputs else self.side}"]')
        if any(entry.drawn for entry in entries):
            lines.append("    draw = Draw()")
        if not entries:
            return "\n".join([*lines, f"    return {'[]' if inputs else '{}'}"])
        lines.append("    return [" if inputs else "    return {")
        for index, entry in enumerate(entries):
            name = self.names[index] if inputs and index < len(self.names) else ""
            comment = ", ".join(part for part in (name, entry.comment) if part)
            key = "" if inputs else f"{entry.key[1]!r}: "
            lines.append(f"        {key}{entry.expression}," + (f"  # {comment}" if comment else ""))
        return "\n".join([*lines, "    ]" if inputs else "    }"])

    def _torch_imports(self, code: str) -> list[str]:
        """Imports for the parts of torch that the code names; notes operators of other packages."""
        imports: list[str] = []
        for path in sorted(_dotted_names(code, "torch")):
            if path[:2] in (["torch", "ops"], ["torch", "classes"]):
                imports += self._operator_imports(path)
                continue
            modules = [".".join(path[:n]) for n in range(2, len(path) + 1) if ".".join(path[:n]) in sys.modules]
            imports += [f"import {module}" for module in modules[-1:] if module != "torch.nn"]
            if _attribute(torch, ".".join(path[1:])) is None:
                self.problems.append(f"{'.'.join(path)} does not exist")
        return imports

    def _operator_imports(self, path: list[str]) -> list[str]:
        if len(path) < 4:
            return []
        namespace, name = path[2], path[3]
        if namespace == "higher_order":
            if name in _TRITON_WRAPPERS:
                self.problems.append("it calls a Triton kernel, which only the compiling process knows")
            module = type(_attribute(torch.ops.higher_order, name)).__module__
            return [f"import {module}"] if module.startswith("torch.") and module != "torch._ops" else []
        if namespace in _TORCH_OP_NAMESPACES:
            return []
        # An operator of another package is there once the package that registered it has been imported.
        for qualname, definition in _custom_op_definitions().items():
            if qualname == f"{namespace}::{name}" and definition.__module__ != "__main__":
                return [f"import {definition.__module__}  # registers {qualname}"]
        if namespace in sys.modules:
            return [f"import {namespace}  # registers torch.ops.{namespace}"]
        self.problems.append(f"import what registers the operator {namespace}::{name} at the top of this script")
        return []

    def _check(self, code: str) -> None:
        """Notes what would fail before anything is computed: bad syntax, and names that nothing defines."""
        try:
            tree = ast.parse(code)
        except SyntaxError as error:
            self.problems.append(f"the code is no valid Python: {error.msg}: {_one_line(error.text or '')}")
            return
        names = [node for node in ast.walk(tree) if isinstance(node, ast.Name)]
        defined = {node.id for node in names if isinstance(node.ctx, ast.Store)} | set(vars(builtins)) | {"__file__"}
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                defined.add(node.name)
            elif isinstance(node, ast.arg):
                defined.add(node.arg)
            elif isinstance(node, ast.ExceptHandler) and node.name:
                defined.add(node.name)
            elif isinstance(node, ast.alias):
                defined.add((node.asname or node.name).split(".")[0])
        for name in sorted({node.id for node in names} - defined):
            self.problems.append(f"the code refers to {name}, which nothing in it defines")

    def _header(self) -> str:
        script = f"{self.stem}_{self.side}.py"
        lines = [f"{self.graph.name}: the graph {self.side} attnrewrite's rewriting. Runs by itself: python {script}"]
        if self.side == "after":
            lines.append(f"python {script} --compare runs {self.stem}_before.py too and prints the differences.")
        lines.append(f"Written with torch {torch.__version__}, Python {sys.version.split()[0]}.")
        if not self.graph.captured:
            lines.append(f"The graph was passed on as it is: {self.graph.reason}")
        for site in self.graph.sites:
            became = site.kernel if site.status == "rewritten" else f"{site.status}: {site.reason}"
            where = f" ({short_path(site.location.file)}:{site.location.line})" if site.location else ""
            lines.append(f"{site.name}{where} -> {became}")
        if self.tensors.over_limit:
            lines.append(
                f"The floating-point inputs are larger than ATTNREWRITE_DEBUG_MB ({self.tensors.limit / 2**20:g} MiB)"
                " together, so they are not stored:"
            )
        if self.tensors.over_limit or any(entry.drawn for entry in self.inputs):
            lines.append("inputs marked 'not stored' are drawn with a fixed seed: the results are not the model's.")
        problems = list(dict.fromkeys(self.problems))
        if problems:
            lines += ["", "THIS SCRIPT DOES NOT RUN AS IT IS:", *(f"- {problem}" for problem in problems)]
        self.problems = problems
        return "\n".join(f"# {_one_line(line)}".rstrip() for line in lines) + "\n\n"


def _assignment(target: str, value: str) -> str:
    """``self.<target> = <value>``, also where a part of the target is no identifier ("layers.0")."""
    *parents, last = target.split(".")
    owner = "self"
    for part in parents:
        owner = f"{owner}.{part}" if _is_identifier(part) else f"getattr({owner}, {part!r})"
    return f"{owner}.{last} = {value}" if _is_identifier(last) else f"setattr({owner}, {last!r}, {value})"


def _is_identifier(name: str) -> bool:
    return name.isidentifier() and not keyword.iskeyword(name)


def _dotted_names(code: str, root: str) -> list[list[str]]:
    """Every dotted name that starts at ``root``, such as ["torch", "ops", "aten", "mm", "default"]."""
    try:
        tree = ast.parse(code)
    except SyntaxError:
        return []  # the check of the whole script says so
    found: dict[tuple[str, ...], None] = {}
    inner: set[ast.AST] = set()
    for node in ast.walk(tree):  # from the outside in, so the longest name comes first
        if isinstance(node, ast.Attribute) and node not in inner:
            parts: list[str] = []
            value: ast.AST = node
            while isinstance(value, ast.Attribute):
                inner.add(value)
                parts.append(value.attr)
                value = value.value
            if isinstance(value, ast.Name) and value.id == root:
                found[(root, *reversed(parts))] = None
    return [list(path) for path in found]


def _custom_op_definitions() -> dict[str, Callable[..., Any]]:
    """The functions behind ``torch.library.custom_op``, by the operator's name."""
    from torch._library.custom_ops import OPDEFS

    return {name: definition._init_fn for name, definition in OPDEFS.items()}


# The rest of a script is the same for every graph.

_RUNNER = '''
def run():
    """Runs the graph once, on inputs loaded afresh. Gives its outputs, and the inputs that it wrote to, by name."""
    graph = Graph(load_constants())
    inputs = load_inputs()
    versions = [value._version if isinstance(value, torch.Tensor) else None for value in inputs]
    torch.manual_seed(SEED)
    with @CONTEXT@:
        outputs = graph(*inputs)
    results = {f"output {index}": value for index, value in enumerate(flatten(outputs))}
    for index, (value, version) in enumerate(zip(inputs, versions)):
        if version is not None and value._version != version:
            results[f"input {index}, written to"] = value
    return results
'''

_HELPERS = '''

def flatten(value):
    """The leaves of nested tuples, lists and dicts."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (tuple, list)):
        return [leaf for item in value for leaf in flatten(item)]
    return [value]


def describe(value):
    """One line about a result. The mean and the largest magnitude leave out NaN."""
    if not isinstance(value, torch.Tensor):
        return f"{type(value).__name__} {value!r}"
    text = f"{value.dtype} {tuple(value.shape)}"
    numbers = value.detach().to(torch.complex128 if value.is_complex() else torch.float64)
    nans = int(numbers.isnan().sum())
    numbers = numbers[~numbers.isnan()]
    if numbers.numel():
        text += f"  mean {numbers.mean().item():.6g}  abs max {numbers.abs().max().item():.6g}"
    return f"{text}  NaN {nans}"


def load_file():
    """inputs.pt, on the devices it was stored from, or on the CPU."""
    devices = {device: str(place(device)) for device in DEVICES}
    return torch.load(HERE / "inputs.pt", map_location=devices, weights_only=True)


def place(device):
    """The device, or the CPU, with a message, where this machine has no such device."""
    device = torch.device(device)
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if device.type in ("cpu", "meta"):
        return device
    if accelerator is not None and accelerator.type == device.type:
        if (device.index or 0) < torch.accelerator.device_count():
            return device
    if str(device) not in MISSING_DEVICES:
        MISSING_DEVICES.add(str(device))
        print(f"{device} is not on this machine; the CPU takes its place", file=sys.stderr)
    return torch.device("cpu")


MISSING_DEVICES = set()


def device(*arguments, **keywords):
    """torch.device as the graph's code calls it."""
    return place(torch.device(*arguments, **keywords))


class Draw:
    """Draws tensors in place of those that were not stored, the same ones every time."""

    def __init__(self):
        self.generator = torch.Generator().manual_seed(SEED)
        self.storages = {}

    def __call__(self, shape, stride, dtype, device, storage=None, size=None, offset=0):
        if size is None:
            size = 1 + sum((n - 1) * step for n, step in zip(shape, stride)) if 0 not in shape else 0
        if storage is None or storage not in self.storages:
            self.storages[storage] = self.numbers(size, shape, dtype).to(place(device))
        return self.storages[storage].as_strided(shape, stride, offset)

    def numbers(self, size, shape, dtype):
        if not (dtype.is_floating_point or dtype.is_complex):
            return torch.ones(size, dtype=dtype) if dtype == torch.bool else torch.zeros(size, dtype=dtype)
        wide = torch.complex64 if dtype.is_complex else torch.float32
        if len(shape) < 2:
            # Often a norm's weight or a variance: keep it positive and near one.
            return (0.5 + torch.rand(size, generator=self.generator, dtype=wide)).to(dtype)
        return (torch.randn(size, generator=self.generator, dtype=wide) / max(1, shape[-1]) ** 0.5).to(dtype)


def graph_module(module):
    """The module as an fx.GraphModule of one call: some higher-order operators take nothing else."""
    graph = torch.fx.Graph()
    inputs = [graph.placeholder(name) for name in inspect.signature(module.forward).parameters]
    graph.output(graph.call_module("body", tuple(inputs)))
    return torch.fx.GraphModule(torch.nn.ModuleDict({"body": module}), graph)


def missing(reason):
    raise NotImplementedError(reason)


def print_results(results):
    for name, value in results.items():
        print(f"{name}: {describe(value)}")
'''

_MAIN_BEFORE = """
def main(arguments=None):
    argparse.ArgumentParser(description="Runs the dumped graph and prints its outputs.").parse_args(arguments)
    print_results(run())
    return 0


if __name__ == "__main__":
    sys.exit(main())
"""

_MAIN_AFTER = '''
def difference(before, after):
    """The largest absolute difference, and that over the largest magnitude before."""
    if not isinstance(before, torch.Tensor) or not isinstance(after, torch.Tensor):
        return "equal" if before is after or before == after else f"was {describe(before)}"
    if before.shape != after.shape or before.dtype != after.dtype:
        return f"was {describe(before)}"
    wide = torch.complex128 if before.is_complex() else torch.float64
    old, new = before.detach().to(wide), after.detach().to(wide)
    nans = int((old.isnan() != new.isnan()).sum())
    same = (old == new) | (old.isnan() & new.isnan())  # equal infinities too
    gap = torch.where(same, 0.0, (new - old).abs()).nan_to_num(nan=0.0, posinf=float("inf"))
    largest = gap.max().item() if gap.numel() else 0.0
    scale = old.abs().nan_to_num(nan=0.0, posinf=0.0).max().item() if old.numel() else 0.0
    text = f"largest difference: absolute {largest:.3g}, relative {largest / scale if scale else largest:.3g}"
    return f"{text}; NaN on one side only: {nans}" if nans else text


def compare():
    """Runs the graph before the rewriting as well, and prints how far the results lie apart."""
    path = HERE / Path(__file__).name.replace("_after.py", "_before.py")
    if not path.exists():
        print(f"--compare needs {path.name} next to this script", file=sys.stderr)
        return 2
    sys.dont_write_bytecode = True  # the dump's folder holds what was dumped, and nothing else
    spec = importlib.util.spec_from_file_location("graph_before", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    before, after = module.run(), run()
    for name, value in after.items():
        print(f"{name}: {describe(value)}")
        print(f"    {difference(before[name], value) if name in before else 'not there before'}")
    for name in before.keys() - after.keys():
        print(f"{name}: only before")
    return 0


def main(arguments=None):
    parser = argparse.ArgumentParser(description="Runs the dumped graph and prints its outputs.")
    parser.add_argument("--compare", action="store_true", help="run the graph before the rewriting too, and compare")
    if parser.parse_args(arguments).compare:
        return compare()
    print_results(run())
    return 0


if __name__ == "__main__":
    sys.exit(main())
'''
