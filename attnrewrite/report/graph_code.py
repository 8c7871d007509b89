"""A graph as Python source."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator
from typing import Any

from torch import fx
from torch.fx.graph import CodeGen

from attnrewrite.report.text import ASSIGNMENT, short_path
from attnrewrite.torch_private import codegen_of

__all__ = ["graph_source"]

_FRAME = re.compile(r'^\s*File "(?P<file>.+)", line (?P<line>\d+), in (?P<function>.+)$')


def graph_source(gm: fx.GraphModule) -> str:
    """Python source of the module's ``forward``, with comments that name the place in the user's code.

    The ``forward`` of nested graphs (the branches of ``torch.cond``, a checkpointed block) follows under its name.
    """
    parts = [commented(gm, python_code(gm).src)]
    for name, child in _graph_children(gm):
        parts.append(f"# self.{name}\n{graph_source(child)}")
    return "\n\n".join(parts)


def one_line(value: object) -> str:
    return " ".join(str(value).split())


# -- code -------------------------------------------------------------------------------------------------------------


def python_code(gm: fx.GraphModule) -> Any:
    """The code that fx generates for the graph, in its plainest form; the graph is unchanged on return.

    Inputs and outputs are flat: a script does not need the pytree signature of an exported module. Inputs have their
    node's name from the start, without the lines ``l_x_ = L_x_`` of Dynamo's graphs. Annotations are removed: they may
    name what cannot be imported.
    """
    codegen = codegen_of(gm.graph)
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


def commented(gm: fx.GraphModule, source: str) -> str:
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
            return one_line(f"{place}: {code}" if code else place)
    return ""


def _graph_children(gm: fx.GraphModule) -> Iterator[tuple[str, fx.GraphModule]]:
    """The nested graphs that the graph's own nodes name, each once, in the order of their use."""
    seen = set()
    for node in gm.graph.nodes:
        if node.op in ("get_attr", "call_module") and node.target not in seen:
            seen.add(node.target)
            child = attribute_of(gm, str(node.target))
            if isinstance(child, fx.GraphModule):
                yield str(node.target), child


def attribute_of(root: object, path: str) -> Any:
    for part in path.split("."):
        root = getattr(root, part, None)
    return root
