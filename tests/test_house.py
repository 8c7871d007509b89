"""How the package is built, read off its source: who imports what, and what stands once.

Some rules are not met everywhere yet. What does not meet them is listed here; the lists may only become shorter.
"""

from __future__ import annotations

import ast
import functools
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import attnrewrite
import attnrewrite.patterns

ROOT = Path(attnrewrite.__file__).parents[1]
PACKAGE = ROOT / "attnrewrite"

TORCH_PRIVATE = "attnrewrite.torch_private"

PRIVATE_OF_OTHERS = {
    ("attnrewrite.api.eager_calls", "_getframe"),  # sys: the caller's line at each eager call, in no time.
    ("attnrewrite.caching.guidance", "_replace"),  # Of a named tuple; public in spite of its name.
    ("attnrewrite.integrations.transformers", "_replace"),  # The same.
    ("attnrewrite.kernels.xformers", "_build_metadata"),  # xformers: the torch that it was built for.
    ("attnrewrite.kernels.xformers", "_cpp_library_load_exception"),  # xformers: why its library was not loaded.
}
"""Private names of other packages than torch, by the module that uses them."""

OWN_TABLES = {
    "attnrewrite.analysis.empty_rows": {"_REDUCTIONS"},  # What is minus infinity in empty rows alone.
    "attnrewrite.analysis.features": {"_NORMS", "_SUMS"},  # What keeps the sign of a feature map.
    "attnrewrite.analysis.indices": {"_INDEXING", "_ROW_BY_ROW"},  # Indices, and those that may differ by row.
    "attnrewrite.analysis.scores": {"BOUNDED", "_ELEMENTWISE", "_MAXIMA", "_REDUCTIONS", "_UNARY"},  # Steps of scores.
    # How large the values of a mask may be.
    "attnrewrite.analysis.values": {"_COMPUTED", "_ORDINARY", "_POWERS", "_SQUASHING", "_TAKES_A_NUMBER"},
    "attnrewrite.analysis.weights": {"_PASSING"},  # Steps between softmax and the value.
    "attnrewrite.caching.graphs": {"_AFFINE", "_MULTILINEAR"},  # What may be extrapolated from step to step.
    "attnrewrite.caching.identity": {"_INDEXED"},  # Numbers that say which part is read.
    # The operators that its two functions see through.
    "attnrewrite.ir.views": {"_PERMUTES", "_REPEATS", "_SHAPE_ONLY"},
    "attnrewrite.parallel.partition": {"_LEARNED"},  # What makes features of data; positions and masks do without.
    "attnrewrite.passes.canonicalize": {"_BOUNDED"},  # Functions of scores without infinite results.
    "attnrewrite.passes.fuse_projections": {"_PRODUCTS", "_READS_STRIDES"},  # What is fused, and what would show it.
    "attnrewrite.passes.slice_sources": {"_CONSTANT"},  # Factories that only sizes and a number are given to.
    "attnrewrite.passes.splice": {"_STRIDE_BLIND"},  # What lays out its result whatever it reads.
    "attnrewrite.passes.unrepeat_kv": {"_FOLLOWED"},  # What it writes again without the repetition.
    "attnrewrite.patterns.linear": {"_SUMS"},  # The sum over keys that normalizes.
    "attnrewrite.patterns.softmax.rule": {"_BARRIERS"},  # Where the search for products ends.
}
"""Tables of operators that only one algorithm asks about; what an operator is in general stands in ``ir/ops.py``."""

LONG = 60
FILES_AT_THE_TOP = 14


@dataclass(frozen=True)
class Module:
    lines: tuple[str, ...]
    tree: ast.Module
    is_package: bool

    @functools.cached_property
    def nodes(self) -> list[ast.AST]:
        return list(ast.walk(self.tree))


@functools.cache
def modules() -> dict[str, Module]:
    """Every module of the package by its name; those of ``patterns`` from where they lie, link or none."""
    found = {}
    for folder, name in ((PACKAGE, "attnrewrite"), (ROOT / "patterns", "attnrewrite.patterns")):
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            if folder == PACKAGE and parts[0] == "patterns":
                continue
            source = path.read_text(encoding="utf-8")
            module = Module(tuple(source.splitlines()), ast.parse(source), path.name == "__init__.py")
            found[".".join([name, *parts]).removesuffix(".__init__")] = module
    return found


def is_private(name: str) -> bool:
    return name.startswith("_") and not (name.startswith("__") and name.endswith("__"))


def imported(module: Module) -> Iterator[tuple[str, str]]:
    """Each import, wherever it stands: the module that it is from and the name in it, empty for ``import x``."""
    for node in module.nodes:
        match node:
            case ast.Import(names=names):
                yield from ((alias.name, "") for alias in names)
            case ast.ImportFrom(module=source, names=names, level=level):
                yield from (("." * level + (source or ""), alias.name) for alias in names)


def dotted(node: ast.expr) -> str:
    """``a.b.c`` as text; empty where it begins with something else than a name."""
    match node:
        case ast.Name(id=name):
            return name
        case ast.Attribute(value=value, attr=name):
            return f"{dotted(value)}.{name}" if dotted(value) else ""
    return ""


def private_names_of_torch(module: Module) -> Iterator[str]:
    """Imports, and attributes of modules; in ``torch.ops.aten._softmax`` the underscore is of an operator."""
    paths = [f"{source}.{name}".strip(".") for source, name in imported(module)]
    paths += [dotted(node) for node in module.nodes if isinstance(node, ast.Attribute)]
    for path in paths:
        first, *others = path.split(".")
        if first == "torch" and others[:1] != ["ops"] and any(map(is_private, others)):
            yield path


def private_attributes_of_others(module: Module) -> Iterator[str]:
    """Private attributes that nothing in the module defines, by a dot or by ``getattr`` and the like.

    Those of ``self`` are the class's own, or its base's.
    """
    own = set()
    for node in module.nodes:
        match node:
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                own.add(name)
            case ast.Attribute(attr=name, ctx=ast.Store()) | ast.AnnAssign(target=ast.Name(id=name)):
                own.add(name)
    for node in module.nodes:
        match node:
            case ast.Attribute(value=value, attr=name):
                operator = dotted(value).startswith(("aten", "torch.ops."))
                if is_private(name) and name not in own and not operator and dotted(value) != "self":
                    yield name
            case ast.Call(
                func=ast.Name(id="getattr" | "hasattr" | "setattr" | "delattr"),
                args=[_, ast.Constant(value=str(name)), *_],
            ):
                if is_private(name) and name not in own:
                    yield name


def test_private_names_of_torch_stand_in_one_file() -> None:
    found = {name: set(private_names_of_torch(module)) for name, module in modules().items()}
    assert {"torch._guards.tracing", "torch._library.custom_ops.OPDEFS"} <= found.pop(TORCH_PRIVATE)
    assert {name: private for name, private in found.items() if private} == {}


def test_private_attributes_of_others_stand_in_one_file() -> None:
    found = {(name, private) for name, module in modules().items() for private in private_attributes_of_others(module)}
    assert (TORCH_PRIVATE, "_erased") in found
    assert {(name, private) for name, private in found if name != TORCH_PRIVATE} == PRIVATE_OF_OTHERS


def test_private_names_stay_in_their_module() -> None:
    imports = {(name, *each) for name, module in modules().items() for each in imported(module)}
    ours = {each for each in imports if each[1].startswith((".", "attnrewrite"))}
    assert len(ours) > len(modules())
    assert {each for each in ours if is_private(each[2])} == set()
    assert {each for each in ours if each[1].startswith(".")} == set(), "imports are absolute"


def test_no_kernel_is_read_by_name() -> None:
    found = {
        name
        for name, module in modules().items()
        for node in module.nodes
        if isinstance(node, ast.Call) and re.match(r"(get|has)attr\((\w+\.)*kernel, '", ast.unparse(node))
    }
    assert not found


def tables_of_operators(module: Module) -> Iterator[str]:
    """Sets and sequences of two or more operators at the top of a module; a dict says what is done with each."""
    for node in module.tree.body:
        if isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value is not None:
            keys = {id(key) for each in ast.walk(node.value) if isinstance(each, ast.Dict) for key in each.keys}
            names = [
                dotted(each)
                for each in ast.walk(node.value)
                if isinstance(each, ast.Attribute) and id(each) not in keys
            ]
            operators = [name for name in names if re.fullmatch(r"(torch\.ops\.)?aten\.\w+\.\w+", name)]
            if len(operators) > 1:
                yield ast.unparse(node.targets[0] if isinstance(node, ast.Assign) else node.target)


def test_what_an_operator_is_stands_once() -> None:
    found = {name: set(tables_of_operators(module)) for name, module in modules().items()}
    assert {"VIEW_OPS", "CAST_OPS", "SPLIT_OPS"} <= found.pop("attnrewrite.ir.ops")
    general = {name for name in found if name.startswith("attnrewrite.capture.")} | {"attnrewrite.ir.model_state"}
    assert {name: tables for name, tables in found.items() if tables and name not in general} == OWN_TABLES


def test_a_class_has_its_name_for_itself() -> None:
    homes = defaultdict(set)
    for name, module in modules().items():
        for node in module.nodes:
            if isinstance(node, ast.ClassDef):
                homes[node.name].add(name)
    assert not {each: where for each, where in homes.items() if len(where) > 1}


def test_a_long_function_says_why() -> None:
    """In the line above it (or above its decorators), which begins ``# Long:``. Docstrings do not count."""
    found = set()
    for name, module in modules().items():
        for node in module.nodes:
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
                reason = module.lines[first - 2].strip().startswith("# Long:")
                if length(node) - (length(node.body[0]) if ast.get_docstring(node) else 0) > LONG and not reason:
                    found.add(f"{name}.{node.name}")
    assert not found


def length(node: ast.stmt) -> int:
    assert node.end_lineno is not None
    return node.end_lineno - node.lineno + 1


def test_the_top_is_taken_in_at_a_glance() -> None:
    files = sorted(path.name for path in PACKAGE.iterdir() if path.is_file() and path.name != "patterns")
    assert len(files) <= FILES_AT_THE_TOP, files


def test_public_names_agree() -> None:
    tree = modules()["attnrewrite"].tree
    (typed,) = (node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    homes = {
        alias.name: str(node.module).removeprefix("attnrewrite.")
        for node in typed.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert {name: home for home, names in attnrewrite._NAMES.items() for name in names} == homes
    assert sorted(attnrewrite.__all__) == sorted(homes)
    assert all(f"`{name}`" in str(attnrewrite.__doc__) for name in homes if name.islower())


def test_patterns_are_the_folder_at_the_top() -> None:
    link = PACKAGE / "patterns"
    assert link.resolve() == ROOT / "patterns" if link.is_dir() else link.read_text() == "../patterns"
    assert Path(str(attnrewrite.patterns.__file__)).resolve() == ROOT / "patterns" / "__init__.py"


def test_every_room_is_installed() -> None:
    settings = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    listed = re.search(r"^packages = (\[.*?^\])", settings, re.MULTILINE | re.DOTALL)
    assert listed is not None
    assert ast.literal_eval(listed[1]) == sorted(name for name, module in modules().items() if module.is_package)


def test_imports_make_no_circle() -> None:
    """Imports within functions and for type checkers count; ``import-linter`` looks at the rooms."""
    graph = {}
    for name, module in modules().items():
        # ``from attnrewrite.ir import ops`` is of that module, and not of the package.
        sources = {path if (path := f"{source}.{each}") in modules() else source for source, each in imported(module)}
        graph[name] = (sources & modules().keys()) - {name}
    graph["attnrewrite"] = set()  # Its names are loaded when they are used.
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b", "d"}, "d": set()}) == {frozenset("bc")}
    assert not circles(graph)


def circles(graph: Mapping[str, set[str]]) -> set[frozenset[str]]:
    """Modules that import each other, directly or not: each module's are those that it reaches and that reach it."""
    reached = {name: reachable(graph, name) for name in graph}
    groups = {name: {other for other in reached[name] if name in reached[other]} for name in graph}
    return {frozenset(group) for group in groups.values() if group}


def reachable(graph: Mapping[str, set[str]], start: str) -> set[str]:
    found: set[str] = set()
    ahead = [start]
    while ahead:
        new = graph[ahead.pop()] - found
        found |= new
        ahead += new
    return found
