"""The IR's vocabulary: reading nodes, comparing symbolic sizes without a guard, and building new nodes."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import linecache
import math
import operator
import re
from collections.abc import Iterable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.utils._sympy.interp import sympy_interp
from torch.utils._sympy.reference import PythonReferenceAnalysis

from attnrewrite.report import SourceLocation

__all__ = [
    "CAST_OPS",
    "VIEW_OPS",
    "Builder",
    "Size",
    "StoredPattern",
    "Triangle",
    "Written",
    "called_from",
    "copy_attributes",
    "evaluated",
    "is_cast",
    "is_view",
    "name_source",
    "parameter_path",
    "regions",
    "same",
    "same_shape",
    "source_location",
    "source_name",
    "tensor",
]

aten = torch.ops.aten

Size = int | torch.SymInt
"""A size: a number, or a symbol of the graph's shape environment."""

VIEW_OPS = frozenset(
    {
        aten.view.default,
        aten.reshape.default,
        aten._unsafe_view.default,
        aten.view_as.default,
        aten.reshape_as.default,
        aten.flatten.using_ints,
        aten.unflatten.int,
        aten.transpose.int,
        aten.t.default,
        aten.mT.default,
        aten.mH.default,
        aten.numpy_T.default,
        aten.permute.default,
        aten.swapaxes.default,
        aten.swapdims.default,
        aten.movedim.int,
        aten.movedim.intlist,
        aten.unsqueeze.default,
        aten.squeeze.default,
        aten.squeeze.dim,
        aten.squeeze.dims,
        aten.expand.default,
        aten.expand_as.default,
        aten.select.int,
        aten.slice.Tensor,
        aten.narrow.default,
        aten.alias.default,
        aten.diagonal.default,
        aten.detach.default,
    }
)
"""Operators whose result shares memory with their first argument, or may."""

CAST_OPS = frozenset(
    {
        aten.to.dtype,
        aten.to.device,
        aten.to.other,
        aten.to.dtype_layout,
        aten._to_copy.default,
        aten.type_as.default,
    }
)


def is_view(node: fx.Node) -> bool:
    return node.target in VIEW_OPS


def copy_attributes(source: Any, target: Any) -> None:
    """What Dynamo attaches for the inner compiler: ``_dynamo_source`` on placeholders tells which inputs are static."""
    for name, value in vars(source).items():
        if name.startswith(("_dynamo", "_param_name", "_backend", _SOURCE)) or name == "compile_subgraph_reason":
            setattr(target, name, value)


def tensor(node: Any) -> torch.Tensor:
    """The fake tensor that stands for ``node``'s value."""
    value = node.meta["val"]
    assert isinstance(value, torch.Tensor), f"{node} is {type(value).__name__}, not a tensor"
    return value


def is_tensor(node: Any) -> bool:
    return isinstance(node, fx.Node) and isinstance(node.meta.get("val"), torch.Tensor)


def is_cast(node: fx.Node) -> bool:
    """A change of dtype and of nothing else."""
    return node.target in CAST_OPS and is_tensor(node.args[0]) and tensor(node).device == tensor(node.args[0]).device


def same(a: Size, b: Size) -> bool:
    """Whether two sizes are known to be equal, whatever the inputs. Adds no guard."""
    return statically_known_true(a == b)


def same_shape(a: Sequence[Size], b: Sequence[Size]) -> bool:
    return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))


def product(sizes: Sequence[Size]) -> Size:
    result: Size = 1
    for size in sizes:
        result = result * size
    return result


def regions(graph: fx.Graph) -> dict[fx.Node, tuple[int, int]]:
    """For each node the grad-mode region and the autocast region it is in, each as a running number.

    Pre-dispatch graphs carry these switches as nodes. A rewrite may not move work from one region into another.
    """
    grad = 0
    autocast = [0]
    opened = 0
    result = {}
    for node in graph.nodes:
        if node.target is torch._C._set_grad_enabled:
            grad = 1 if node.args[0] else 2
        elif node.target is torch.amp.autocast_mode._enter_autocast:
            opened += 1
            autocast.append(opened)
        elif node.target is torch.amp.autocast_mode._exit_autocast:
            autocast.pop()
        result[node] = (grad, autocast[-1])
    return result


_ATTENTION_FORWARD = str(Path(__file__).with_name("functional.py"))
_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+), in (?P<function>.*)\n\s*(?P<code>.*)')


called_from: ContextVar[SourceLocation | None] = ContextVar("attnrewrite_called_from", default=None)
"""The line that calls ``attention_forward`` eagerly: the graph that is compiled for it begins inside."""


def source_location(node: fx.Node) -> SourceLocation | None:
    """The innermost line of the user's source that made ``node``, and the module it ran in."""
    frames = _FRAME.findall(node.meta.get("stack_trace") or "")
    if not frames:
        return None
    # A call of attention_forward stands where the user wrote it.
    outside = [frame for frame in frames if frame[0] != _ATTENTION_FORWARD]
    caller = called_from.get()
    if not outside and caller is not None:
        return dataclasses.replace(caller, code=linecache.getline(caller.file, caller.line).strip())
    file, line, function, code = (outside or frames)[-1]
    stack = node.meta.get("nn_module_stack") or {}
    path = ""
    for entry in stack.values():
        path = entry[0] if isinstance(entry, tuple) else str(entry)
    return SourceLocation(file, int(line), function.strip(), code.strip(), _module_path(path))


_SOURCE = "_attnrewrite_source"


def name_source(placeholder: fx.Node, name: str) -> None:
    """Says where a graph's input comes from: :func:`source_name` of the graph that was compiled once more."""
    setattr(placeholder, _SOURCE, name)


def source_name(placeholder: fx.Node) -> str:
    """Where Dynamo found a graph's input, as Python source; empty if unknown."""
    named = getattr(placeholder, _SOURCE, None)
    if isinstance(named, str):
        return named
    source = getattr(placeholder, "_dynamo_source", None)
    if source is None:
        return ""
    # A property since torch 2.12, a method before.
    return source.name if isinstance(source.name, str) else str(source.name())


def parameter_path(placeholder: fx.Node) -> str:
    """The dotted path of a module's parameter or buffer, from the module that the graph is of; empty for others."""
    path = f".{_module_path(source_name(placeholder))}"
    found = re.fullmatch(r"(.*)\.(?:_parameters|_buffers)(\.[^.]+)", path)
    return "" if found is None else "".join(found.groups()).strip(".")


def _module_path(path: str) -> str:
    """The dotted path, for Dynamo's ``L['self'].encoder.layer.0``, ``L['self']._modules['encoder']`` or
    ``L['self'].__dict__['_modules']['encoder']``.
    """
    path = re.sub(r"\.__dict__\[['\"]_modules['\"]\]", "._modules", path)
    path = re.sub(r"\.?_modules\[['\"]([^'\"]+)['\"]\]", r".\1", path)
    path = re.sub(r"^[LG]\[['\"][^'\"]+['\"]\]", "", path)
    path = re.sub(r"\[['\"]?([^'\"\]]+)['\"]?\]", r".\1", path)
    return path.strip(".")


Written = dict[Any, fx.Node]
"""Calls that were written, by what they call with which arguments."""


_SHARED_BESIDE_ATEN = ("attnrewrite::stored",)


def _key_of(target: Any, args: Any, kwargs: Any) -> Any:
    """What tells calls apart; None for a call that may give something else the next time, or that is a kernel's own.

    Attentions stay one call each: the report, and what is compared, go by the nodes of each.
    """
    if target is not operator.getitem:
        schema = getattr(target, "_schema", None)
        if schema is None or schema.is_mutable or torch.Tag.nondeterministic_seeded in target.tags:
            return None
        if not schema.name.startswith("aten::") and schema.name not in _SHARED_BESIDE_ATEN:
            return None
    return target, _frozen(args), _frozen(kwargs)


def _frozen(value: Any) -> Any:
    if isinstance(value, fx.Node):
        return value
    if isinstance(value, (list, tuple)):
        return tuple(map(_frozen, value))
    if isinstance(value, dict):
        return tuple((key, _frozen(value[key])) for key in sorted(value))
    # A number's type is part of what it says (1, 1.0 and True are equal), and so is the sign of a zero.
    return type(value), repr(value)


class Builder:
    """Writes nodes at one place of a graph, with their fake values, and symbolic sizes as the nodes that carry them.

    Nodes are evaluated under the graph's fake mode. Sizes are never turned into constants: an expression of symbols is
    written out over nodes that carry the symbols.
    """

    def __init__(self, gm: fx.GraphModule, before: fx.Node, like: fx.Node, written: Written | None = None) -> None:
        """
        Args:
            before: new nodes go in front of it.
            like: whose source location and tags they inherit.
            written: what was written in front of ``before`` already, of which equal calls are taken and not repeated.
        """
        self.graph = gm.graph
        self._gm = gm
        self.created: list[fx.Node] = []
        self._before = before
        self._meta = {
            key: value
            for key, value in like.meta.items()
            if key in ("stack_trace", "nn_module_stack", "recompute", "ac_graph_id", "custom", "seq_nr")
        }
        self._fake_mode = _fake_mode_of(gm.graph)
        self._written: Written = {} if written is None else written

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """A new call of an operator; sizes among the arguments may be SymInts."""
        args, kwargs = fx.node.map_aggregate((args, kwargs), self._as_argument)
        found = self._found(_key_of(target, args, kwargs))
        if found is not None:
            return found
        fakes = fx.node.map_arg((args, kwargs), lambda node: node.meta["val"])
        with _evaluating(self._fake_mode):
            value = target(*fakes[0], **fakes[1])
        return self.insert(target, args, kwargs, value)

    def insert(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], value: Any) -> fx.Node:
        """A new call whose fake value the caller knows already."""
        args, kwargs = fx.node.map_aggregate((args, kwargs), self._as_argument)
        key = _key_of(target, args, kwargs)
        found = self._found(key)
        if found is not None:
            return found
        with self.graph.inserting_before(self._before):
            node = self.graph.call_function(target, args, kwargs)
        node.meta = {**self._meta, "val": value}
        self.created.append(node)
        if key is not None:
            self._written[key] = node
        return node

    def _found(self, key: Any) -> fx.Node | None:
        """An equal call that was written before."""
        node = None if key is None else self._written.get(key)
        return node if node is not None and not node._erased and node < self._before else None

    def submodule(self, name: str, module: fx.GraphModule) -> fx.Node:
        """A node that stands for a graph of its own, which a higher-order operator takes."""
        number = sum(key.startswith(name) for key, _ in self._gm.named_children())
        self._gm.add_submodule(f"{name}_{number}", module)
        with self.graph.inserting_before(self._before):
            node = self.graph.get_attr(f"{name}_{number}")
        node.meta = {**self._meta, "val": module}
        self.created.append(node)
        return node

    def _as_argument(self, value: Any) -> Any:
        if isinstance(value, torch.SymInt):
            return self._size(value)
        return value

    def _size(self, size: torch.SymInt) -> Any:
        expression = size.node.expr
        if expression.is_number:
            return int(expression)
        values = {}
        for symbol in expression.free_symbols:
            source = _source_of(symbol, self.graph)
            if isinstance(source, tuple):
                node, dim = source
                source = self.insert(aten.sym_size.int, (node, dim), {}, tensor(node).shape[dim])
            values[symbol] = fx.Proxy(source, _Tracer(self))
        result = sympy_interp(PythonReferenceAnalysis, values, expression)
        if not isinstance(result, fx.Proxy):
            return result
        result.node.meta.setdefault("val", size)
        return result.node


class _Tracer(fx.proxy.GraphAppendingTracer):
    """Lets arithmetic on proxies write nodes through a builder, with the values of the result."""

    def __init__(self, builder: Builder) -> None:
        super().__init__(builder.graph)
        self._builder = builder

    def create_node(self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **more: Any) -> fx.Node:
        fakes = fx.node.map_arg((args, kwargs), lambda node: node.meta["val"])
        return self._builder.insert(target, args, kwargs, target(*fakes[0], **fakes[1]))


def _source_of(symbol: Any, graph: fx.Graph) -> fx.Node | tuple[fx.Node, int]:
    """The first node that carries the symbol: a size of its own, or a dimension of a tensor.

    Symbols enter with a graph's inputs, or where an operator makes a size of its data: the first node comes before
    everything that mentions the symbol, and is found early.
    """
    nodes: Iterable[fx.Node] = graph.nodes
    for node in nodes:
        value = node.meta.get("val")
        if isinstance(value, torch.SymInt) and value.node.expr == symbol:
            return node
        if isinstance(value, torch.Tensor):
            for dim, size in enumerate(value.shape):
                if isinstance(size, torch.SymInt) and size.node.expr == symbol:
                    return node, dim
    raise AssertionError(f"no node carries {symbol}")


def _fake_mode_of(graph: fx.Graph) -> FakeTensorMode | None:
    for node in graph.nodes:
        mode = getattr(node.meta.get("val"), "fake_mode", None)
        if mode is not None:
            return mode  # type: ignore[no-any-return]
    return None


@contextlib.contextmanager
def _evaluating(fake_mode: FakeTensorMode | None) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        if fake_mode is not None:
            stack.enter_context(fake_mode)
        stack.enter_context(torch.no_grad())
        yield


def evaluated(node: fx.Node) -> Any:
    """The fake value of a call, worked out anew of those of its arguments."""
    target: Any = node.target
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda argument: argument.meta["val"])
    with _evaluating(_fake_mode_of(node.graph)):
        return target(*args, **kwargs)


@dataclass
class Triangle:
    """``inside`` where column <= row + ``diagonal``, over the last two dimensions; ``outside`` elsewhere."""

    inside: float
    outside: float
    diagonal: int


@dataclass
class StoredPattern:
    """A stored tensor, read for one of a few patterns; ``was_read`` tells whether anything rests on it."""

    tensor: torch.Tensor
    was_read: bool = False

    @functools.cached_property
    def pattern(self) -> float | range | Triangle | None:
        """One number, the numbers of a range, a triangle, or None; a positive answer counts as read."""
        found = _pattern_of(self.tensor.detach().cpu())
        self.was_read = self.was_read or found is not None
        return found

    def holds_only_up_to(self, size: float) -> bool:
        """Whether no entry is larger than ``size``, whatever its sign; a positive answer counts as read."""
        if self._largest <= size:
            self.was_read = True
            return True
        return False

    @functools.cached_property
    def _largest(self) -> float:
        return float(self.tensor.detach().abs().amax().nan_to_num(math.inf))


def _pattern_of(values: torch.Tensor) -> float | range | Triangle | None:
    first = values.flatten()[0]
    if bool((values == first).all()):
        return float(first)
    if values.dim() == 1 and not values.dtype.is_floating_point and values.dtype is not torch.bool:
        counted = torch.equal(values, torch.arange(len(values), dtype=values.dtype) + first)
        return range(int(first), int(first) + len(values)) if counted else None
    if values.dim() < 2 or values[(0,) * (values.dim() - 2)].numel() != values.numel():
        return None
    matrix = values[(0,) * (values.dim() - 2)]
    outside, inside = matrix[0, -1], matrix[-1, 0]
    diagonal = int((matrix[0] != outside).sum()) - 1
    triangle = torch.ones(matrix.shape, dtype=torch.bool).tril(diagonal)
    if not torch.equal(torch.where(triangle, inside, outside), matrix):
        return None
    return Triangle(float(inside), float(outside), diagonal)


def scalar(value: Any) -> bool:
    """A Python number, or a symbolic one."""
    return isinstance(value, (int, float, torch.SymInt, torch.SymFloat)) and not isinstance(value, bool)
