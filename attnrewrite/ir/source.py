"""Source locations: which line of the user's source a node or an input of the graph comes from."""

from __future__ import annotations

import dataclasses
import linecache
import re
from contextvars import ContextVar
from dataclasses import dataclass

from torch import fx

from attnrewrite.torch_private import RESUMED_FUNCTION, dynamo_source

__all__ = [
    "ENDS_AT",
    "SourceLocation",
    "break_before",
    "called_from",
    "name_source",
    "own_files",
    "parameter_path",
    "source_location",
    "source_name",
]


own_files: set[str] = set()
"""Files of attnrewrite's entry points: a node that was made there is located at the line that called them."""

_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+), in (?P<function>.*)\n\s*(?P<code>.*)')


called_from: ContextVar[SourceLocation | None] = ContextVar("attnrewrite_called_from", default=None)
"""The line that calls ``attention_forward`` eagerly, in which case the graph begins inside it; else None."""


def source_location(node: fx.Node) -> SourceLocation | None:
    """The innermost line of the user's source that made ``node``, and the module it ran in; None if unknown."""
    frames = _FRAME.findall(node.meta.get("stack_trace") or "")
    if not frames:
        return None
    outside = [frame for frame in frames if frame[0] not in own_files]
    caller = called_from.get()
    if not outside and caller is not None:
        return dataclasses.replace(caller, code=linecache.getline(caller.file, caller.line).strip())
    file, line, function, code = (outside or frames)[-1]
    stack = node.meta.get("nn_module_stack") or {}
    path = ""
    for entry in stack.values():
        path = entry[0] if isinstance(entry, tuple) else str(entry)
    return SourceLocation(file, int(line), function.strip(), code.strip(), _module_path(path))


def break_before(graph: fx.Graph) -> str:
    """Where the graph break is that the graph continues after, as "line N of FUNCTION"; empty if there is none."""
    for node in graph.nodes:
        for _, _, function, _ in _FRAME.findall(node.meta.get("stack_trace") or ""):
            resumed = RESUMED_FUNCTION.match(function.strip())
            if resumed is not None:
                return f"line {resumed['line']} of {resumed['function']}"
    return ""


ENDS_AT = "attnrewrite_ends_at"
"""The key, in a graph module's ``meta``, of the graph break that ends the graph, in words."""

SOURCE_ATTRIBUTE = "_attnrewrite_source"


def name_source(placeholder: fx.Node, name: str) -> None:
    """Sets what :func:`source_name` returns for an input of a graph that attnrewrite made from another graph."""
    setattr(placeholder, SOURCE_ATTRIBUTE, name)


def source_name(placeholder: fx.Node) -> str:
    """Where Dynamo found a graph's input, as Python source; empty if unknown."""
    named = getattr(placeholder, SOURCE_ATTRIBUTE, None)
    if isinstance(named, str):
        return named
    return dynamo_source(placeholder)


def parameter_path(placeholder: fx.Node) -> str:
    """The dotted path of an input that is a parameter or buffer, from the compiled module; empty for other inputs."""
    path = f".{_module_path(source_name(placeholder))}"
    found = re.fullmatch(r"(.*)\.(?:_parameters|_buffers)(\.[^.]+)", path)
    return "" if found is None else "".join(found.groups()).strip(".")


def _module_path(path: str) -> str:
    """The dotted path ``encoder.layer.0`` of Dynamo's ``L['self'].encoder.layer.0``.

    The forms ``L['self']._modules['encoder']`` and ``L['self'].__dict__['_modules']['encoder']`` are read as well.
    """
    path = re.sub(r"\.__dict__\[['\"]_modules['\"]\]", "._modules", path)
    path = re.sub(r"\.?_modules\[['\"]([^'\"]+)['\"]\]", r".\1", path)
    path = re.sub(r"^[LG]\[['\"][^'\"]+['\"]\]", "", path)
    path = re.sub(r"\[['\"]?([^'\"\]]+)['\"]?\]", r".\1", path)
    return path.strip(".")


@dataclass(frozen=True)
class SourceLocation:
    """A line of the user's source.

    ``module`` is the dotted path of the ``nn.Module`` that ran it, such as ``encoder.layer.0.attention``; empty for a
    function.
    """

    file: str
    line: int
    function: str
    code: str
    module: str = ""

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"
