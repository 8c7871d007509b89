"""A graph as a Python program that runs by itself."""

from __future__ import annotations

import ast
import builtins
import keyword
import re
import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from attnrewrite.report.dump_tensors import DumpEntry, DumpTensors
from attnrewrite.report.graph_code import attribute_of, commented, one_line, python_code
from attnrewrite.report.rows import GraphReport
from attnrewrite.report.text import short_path
from attnrewrite.torch_private import custom_op_functions

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


# -- scripts ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AmbientState:
    """What a graph's result depends on beside its inputs: the modes that were on around the compiled call."""

    grad: bool
    autocast: tuple[tuple[str, torch.dtype], ...]
    default_dtype: torch.dtype

    @staticmethod
    def current() -> AmbientState:
        devices = ["cpu"]
        accelerator = torch.accelerator.current_accelerator()
        if accelerator is not None:
            devices.append(accelerator.type)
        autocast = tuple((d, torch.get_autocast_dtype(d)) for d in devices if torch.is_autocast_enabled(d))
        return AmbientState(torch.is_grad_enabled(), autocast, torch.get_default_dtype())


class Script:
    """One dumped script; ``problems`` are the reasons why it will not run by itself."""

    def __init__(
        self,
        graph: GraphReport,
        side: str,
        gm: fx.GraphModule,
        tensors: DumpTensors,
        inputs: list[DumpEntry],
        state: AmbientState,
        stem: str,
    ) -> None:
        self.graph, self.side, self.stem = graph, side, stem
        self.tensors, self.inputs, self.state = tensors, inputs, state
        self.constants: list[DumpEntry] = []
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
            init.append(_assignment(target, self._attribute(name, f"{prefix}{target}", attribute_of(gm, target))))
        lines = [f"class {name}(torch.nn.Module):"]
        if init:
            lines += ["    def __init__(self, constants):", "        super().__init__()"]
            lines += [f"        {line}" for line in init] + [""]
        else:
            lines += ["    def __init__(self, constants):", "        super().__init__()", ""]
        try:
            code = python_code(gm)
        except _CANNOT_GENERATE as error:
            self.problems.append(f"fx cannot write the code of {prefix or 'the graph'}: {one_line(error)}")
            body = "def forward(self, *inputs):\n    raise NotImplementedError\n"
        else:
            self._import_globals(code.globals)
            body = commented(gm, code.src)
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

    def _loader(self, function: str, entries: list[DumpEntry]) -> str:
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
            if attribute_of(torch, ".".join(path[1:])) is None:
                self.problems.append(f"{'.'.join(path)} does not exist")
        return imports

    def _operator_imports(self, path: list[str]) -> list[str]:
        if len(path) < 4:
            return []
        namespace, name = path[2], path[3]
        if namespace == "higher_order":
            if name in _TRITON_WRAPPERS:
                self.problems.append("it calls a Triton kernel, which only the compiling process knows")
            module = type(attribute_of(torch.ops.higher_order, name)).__module__
            return [f"import {module}"] if module.startswith("torch.") and module != "torch._ops" else []
        if namespace in _TORCH_OP_NAMESPACES:
            return []
        # An operator of another package is there once the package that registered it has been imported.
        for qualname, definition in custom_op_functions().items():
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
            self.problems.append(f"the code is no valid Python: {error.msg}: {one_line(error.text or '')}")
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
        return "\n".join(f"# {one_line(line)}".rstrip() for line in lines) + "\n\n"


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
