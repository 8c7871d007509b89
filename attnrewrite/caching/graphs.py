"""The attention values of a graph, and the graphs that return them or take them as inputs.

An *attention value* is computed from the results of attentions and from parameters alone, such as the result of the
output projection. The last such nodes are taken, so that as little as possible is left to compute where values are
reused. Values are functions of the attentions' results, so reusing them equals reusing the results. Where results are
extrapolated, values are affine functions of them, so extrapolating values equals extrapolating the results.
"""

from __future__ import annotations

import operator
from collections import Counter, deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols, statically_known_true

from attnrewrite.analysis.kinds import Kind, SiteKind
from attnrewrite.caching.identity import content_of, is_copy, is_size, written
from attnrewrite.ir.builder import Builder
from attnrewrite.ir.model_state import is_module_tensor
from attnrewrite.ir.nodes import copy_attributes, is_tensor, product, same, tensor
from attnrewrite.ir.ops import (
    ADD_OPS,
    CAST_OPS,
    CAT_OPS,
    CONVOLUTION_OPS,
    COPY_OPS,
    DIV_OPS,
    MUL_OPS,
    SPLIT_OPS,
    SUB_OPS,
    is_elementwise,
    is_function,
    is_view,
    may_share_memory,
    shares_memory,
    writes,
)
from attnrewrite.ir.source import parameter_path
from attnrewrite.kernels.common.layout import in_memory_order_of
from attnrewrite.torch_private import (
    HigherOrderOperator,
    OpOverload,
    leave_without_source,
    schema_of,
    tree_leaves,
)

__all__ = [
    "AttentionValue",
    "CachedAttention",
    "find_values",
    "nearest",
    "parameters_of",
    "with_values",
]

aten = torch.ops.aten


@dataclass(frozen=True)
class CachedAttention:
    """An attention of a rewritten graph whose values are stored.

    Attributes:
        name: of its site, which is the same whatever kernels are chosen.
        result: the node that holds its result.
        kind: as which it is stored.
        path: of its module in the graph; empty for a function.
        detected: the kind that the graph shows.
    """

    name: str
    result: fx.Node
    kind: Kind
    path: str
    detected: SiteKind


@dataclass(frozen=True)
class AttentionValue:
    """A value that is stored, contiguous in memory.

    Attributes:
        node: that computes it.
        kind: of the attentions that it depends on; they are all of one kind.
        path, detected: of the first of them.
        attentions: the names of the attentions that it is computed from.
        number: its place among the values of the same attentions.
        constants: the positions of all parameters and buffers that it is computed from, in addition to attentions.
        formula: the computation. It shows where a scalar differs from that of an earlier step.
        parameter: the position among the graph's inputs of the parameter that is nearest to it, which tells apart
            modules that share the graph; None if there is none.
        parameter_path: where the graph has that parameter; empty if there is none.
    """

    node: fx.Node
    kind: Kind
    path: str
    detected: SiteKind
    attentions: tuple[str, ...]
    number: int
    parameter: int | None
    parameter_path: str
    constants: tuple[int, ...]
    formula: str

    @property
    def device(self) -> torch.device:
        return tensor(self.node).device

    @property
    def dtype(self) -> torch.dtype:
        return tensor(self.node).dtype


def find_values(
    gm: fx.GraphModule,
    attentions: Sequence[CachedAttention],
    allowed: frozenset[fx.Node] | None = None,
    affine: bool = False,
) -> list[AttentionValue]:
    """The values of the attentions, in graph order.

    An attention whose result nothing reads has none. Sizes of values never depend on data, since their bytes are
    counted before they are computed.

    Args:
        allowed: the nodes that may be values. Others are replaced by the attentions' own results, if these are allowed.
            Default None: all.
        affine: whether values are affine functions of the attentions' results. Default: any functions.
    """
    sources = _sources(gm, attentions, affine)
    frontier = _frontier(sources, attentions, allowed)
    order = {node: number for number, node in enumerate(gm.graph.nodes)}
    parameters = parameters_of(gm)
    numbers: Counter[tuple[str, ...]] = Counter()
    names = {attention.result: attention.name for attention in attentions}
    values = []
    for node in sorted(frontier, key=order.__getitem__):
        first = attentions[min(sources[node])]
        computed_from = tuple(attentions[number].name for number in sorted(sources[node]))
        formula, used = _formula(gm, node, names)
        own = nearest(node, parameters)
        constants = dict.fromkeys(parameters[each] for each in (*used, *([] if own is None else [own])))
        values.append(
            AttentionValue(
                node=node,
                kind=first.kind,
                path=first.path,
                detected=first.detected,
                attentions=computed_from,
                number=numbers[computed_from],
                parameter=None if own is None else parameters[own],
                parameter_path="" if own is None else parameter_path(own),
                constants=tuple(constants),
                formula=formula,
            )
        )
        numbers[computed_from] += 1
    return values


def _frontier(
    sources: dict[fx.Node, frozenset[int]], attentions: Sequence[CachedAttention], allowed: frozenset[fx.Node] | None
) -> dict[fx.Node, None]:
    """The nodes that are values: the last ones that depend on attentions and constants alone.

    Args:
        sources: from :func:`_sources`.
        allowed: as for :func:`find_values`.
    """
    results = {attention.result for attention in attentions}
    # Another attention's result begins a value of its own: this one ends before it.
    frontier = {node: None for node in sources if any(user not in sources or user in results for user in node.users)}
    _merge_views(frontier, sources)
    for node in [node for node in frontier if free_unbacked_symbols(tensor(node).shape)]:
        del frontier[node]
    if allowed is not None:
        for node in [node for node in frontier if node not in allowed]:
            del frontier[node]
            computed_from = [attentions[number].result for number in sources[node]]
            frontier.update(dict.fromkeys(result for result in computed_from if result in allowed))
    return frontier


def _formula(gm: fx.GraphModule, node: fx.Node, results: Mapping[fx.Node, str]) -> tuple[str, list[fx.Node]]:
    """The computation of a value from attentions' results, and the parameters in it, in the formula's order.

    Sizes are left out: one half of a batch has others. The graph's identity has them.
    """
    used: dict[fx.Node, None] = {}
    names: dict[fx.Node, str] = {}
    text = []

    def name(current: fx.Node) -> None:
        if current in names or is_size(current):
            return
        if current in results:
            names[current] = results[current]
        elif current.op == "placeholder":
            used[current] = None
            names[current] = f"p{len(used)}"
        elif current.op == "get_attr":
            names[current] = content_of(gm, current)
        else:
            for source in current.all_input_nodes:
                name(source)
            if is_copy(current):
                names[current] = names[current.all_input_nodes[0]]
                return
            text.append(written(current, names, [], numbers=True))
            names[current] = f"v{len(text)}"

    name(node)
    return ";".join(text), list(used)


def _sources(gm: fx.GraphModule, attentions: Sequence[CachedAttention], affine: bool) -> dict[fx.Node, frozenset[int]]:
    """The nodes that depend on attentions of one kind and on constants alone, each with the numbers of its attentions.

    Constants are the same at each step: parameters and buffers that the graph does not write to, and what is computed
    from them.
    """
    results = {attention.result: number for number, attention in enumerate(attentions)}
    sizes = {
        symbol
        for node in gm.graph.find_nodes(op="placeholder")
        if is_tensor(node)
        for size in map(_symbolic, tensor(node).shape)
        if size is not None
        for symbol in size.node.expr.free_symbols
    }
    constant: set[fx.Node] = set()
    sources: dict[fx.Node, frozenset[int]] = {}
    for node in gm.graph.nodes:
        if node in results:
            sources[node] = frozenset([results[node]])
        elif isinstance(node.meta.get("val"), torch.SymInt):
            # A number that is no input's size may differ at the next step.
            if node.meta["val"].node.expr.free_symbols <= sizes:
                constant.add(node)
        elif node.op == "placeholder":
            if is_module_tensor(node) and not any(_writes_to(user, node) for user in node.users):
                constant.add(node)
        elif node.op == "call_function" and _depends_on_arguments_alone(node) and not _reads_a_number(node):
            others = [source for source in node.all_input_nodes if source not in constant]
            if not others:
                constant.add(node)
            elif all(source in sources for source in others) and (not affine or _is_affine(node, others)):
                union = frozenset().union(*(sources[source] for source in others))
                # Of a node that returns a list (split), the items are read.
                readable = is_tensor(node) or all(user.target is operator.getitem for user in node.users)
                if readable and len({attentions[number].kind for number in union}) == 1:
                    sources[node] = union
    return sources


def _reads_a_number(node: fx.Node) -> bool:
    """Whether the node computes with a number made of sizes: it is known by its name, and its value may change."""
    if not (is_elementwise(node) or node.target in (aten.full.default, aten.scalar_tensor.default)):
        return False
    given = node.args[1:] if node.target is aten.full.default else node.args
    return any(
        isinstance(arg, fx.Node) and isinstance(arg.meta.get("val"), (torch.SymInt, torch.SymFloat)) for arg in given
    )


_AFFINE = (
    *(*ADD_OPS, *SUB_OPS, *CAT_OPS, *SPLIT_OPS, *CAST_OPS, *COPY_OPS, operator.getitem),
    *(aten.rsub.Scalar, aten.neg.default, aten.sum.dim_IntList, aten.mean.dim, aten.flip.default, aten.roll.default),
    *(aten.index_select.default, aten.dropout.default, aten.repeat.default),
)
_MULTILINEAR = (
    *(*MUL_OPS, *CONVOLUTION_OPS, aten.convolution.default, aten.mm.default, aten.bmm.default, aten.matmul.default),
    *(aten.linear.default, aten.einsum.default),
)
"""Products of their tensors, plus a constant bias: linear in each tensor."""


def _is_affine(node: fx.Node, varying: Sequence[fx.Node]) -> bool:
    """Whether the node is an affine function of those of its arguments that vary."""
    dtypes = [tensor(each).dtype for each in (node, *varying) if is_tensor(each)]
    # Numbers of 8 bits are codes: rounding to them is a large error, and nothing is computed with them.
    if not all((dtype.is_floating_point or dtype.is_complex) and dtype.itemsize > 1 for dtype in dtypes):
        return False
    if node.target in (aten.addmm.default, aten.baddbmm.default):
        return node.args[1] not in varying or node.args[2] not in varying
    if node.target in _AFFINE or is_view(node):
        return True
    if node.target in _MULTILINEAR:
        return len(varying) == 1 and _occurrences(node, varying[0]) == 1
    return node.target in DIV_OPS and node.args[1] not in varying and node.kwargs == {}


def _occurrences(node: fx.Node, argument: fx.Node) -> int:
    return sum(each is argument for each in tree_leaves((node.args, node.kwargs)))


def _writes_to(node: fx.Node, argument: fx.Node) -> bool:
    return writes(node) and node.args[:1] == (argument,)


def _symbolic(size: Any) -> torch.SymInt | None:
    return size if isinstance(size, torch.SymInt) else None


def _depends_on_arguments_alone(node: fx.Node) -> bool:
    """Whether the node is a function as others are, computes with sizes in Python, or is dropout that drops nothing."""
    target: Any = node.target
    if not isinstance(target, OpOverload):
        return getattr(target, "__module__", "") in ("_operator", "math", "torch")
    if target in (aten.dropout.default, aten.native_dropout.default):
        return bool(node.args[2] is False or node.args[1] == 0)
    # Others need not say that they draw random numbers.
    return target.namespace in ("aten", "prims") and is_function(target)


def _merge_views(frontier: dict[fx.Node, None], sources: dict[fx.Node, frozenset[int]]) -> None:
    """Replaces views by the tensor that they are views of, where they cover all of it or are spread in memory."""
    changed = True
    while changed:
        changed = False
        views: dict[fx.Node, list[fx.Node]] = {}
        for node in frontier:
            base = _base(node)
            if base is not None and base in sources and is_tensor(base) and _is_dense(tensor(base)):
                views.setdefault(base, []).append(node)
        for base, parts in views.items():
            if any(_is_spread(part) for part in parts):
                # A stored copy would have other strides, and code behind it would be compiled anew for these.
                for part in parts:
                    del frontier[part]
                frontier[base] = None
                changed = True
                break
            whole = product(tensor(base).shape)
            total = sum(product(tensor(part).shape) for part in parts)
            if base in frontier or statically_known_true(total >= whole):
                for part in parts:
                    del frontier[part]
                frontier[base] = None
                changed = True
                break


def _base(node: fx.Node) -> fx.Node | None:
    """The tensor that the node is a view of (or a copy of, as ``reshape`` may be); None for a cast."""
    if node.target is operator.getitem and isinstance(node.args[0], fx.Node):
        node = node.args[0]
        if node.target not in SPLIT_OPS:
            return None
    elif node.target in CAST_OPS or not shares_memory(node):
        return None
    base = node.args[0]
    return base if isinstance(base, fx.Node) else None


def _is_spread(node: fx.Node) -> bool:
    """Whether the node's memory has gaps or overlaps, and may be visible to the model's caller."""
    value = tensor(node)
    left = [(size, stride) for size, stride in zip(value.shape, value.stride(), strict=True) if not same(size, 1)]
    expected: Any = 1
    while left:
        following = next((each for each in left if same(each[1], expected)), None)
        if following is None:
            return _reaches_output(node)
        left.remove(following)
        expected = expected * following[0]
    return False


def _is_dense(value: torch.Tensor) -> bool:
    """Whether the tensor is known, without a guard, to be contiguous."""
    expected: Any = 1
    for size, stride in zip(reversed(value.shape), reversed(value.stride()), strict=True):
        if not same(size, 1) and not same(stride, expected):
            return False
        expected = expected * size
    return True


def parameters_of(gm: fx.GraphModule) -> dict[fx.Node, int]:
    """The parameters and buffers among a graph's inputs, with their positions."""
    placeholders = gm.graph.find_nodes(op="placeholder")
    return {node: number for number, node in enumerate(placeholders) if is_module_tensor(node)}


def nearest(node: fx.Node, parameters: Collection[fx.Node]) -> fx.Node | None:
    """The parameter that is the fewest steps away among those that the node is computed from; None if there is none."""
    seen = {node}
    queue = deque([node])
    while queue:
        current = queue.popleft()
        if current in parameters:
            return current
        new = [source for source in current.all_input_nodes if source not in seen]
        seen.update(new)
        queue.extend(new)
    return None


def with_values(
    gm: fx.GraphModule, values: Sequence[AttentionValue], reused: frozenset[Kind], halves: bool = False
) -> fx.GraphModule:
    """The graph, with values of the kinds in ``reused`` as further inputs, and the others as further outputs.

    Both are in the order of ``values``. Nodes that served reused values alone are removed.

    Args:
        halves: whether the caller copies the second half of each further output's dimension 0. Without it, further
            outputs are contiguous and share no memory with the others.
    """
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    placeholders = gm.graph.find_nodes(op="placeholder")
    for node in placeholders:
        env[node] = _copied(graph, node, env)
    taken = {value.node: number for number, value in enumerate(values) if value.kind in reused}
    inputs: dict[fx.Node, fx.Node] = {}
    for node, number in taken.items():
        inputs[node] = graph.placeholder(f"attention_value_{number}")
        inputs[node].meta = {"val": _contiguous(tensor(node))}
        leave_without_source(inputs[node])
    for node in gm.graph.nodes:
        if node.op == "output" or node in env:
            continue
        env[node] = inputs[node] if node in inputs else _copied(graph, node, env)
    (results,) = gm.graph.output_node().args
    assert isinstance(results, (tuple, list))
    outputs = [fx.node.map_arg(result, env.__getitem__) for result in results]
    given = [value for value in values if value.kind not in reused]
    graph.output((*outputs, *(env[value.node] for value in given)))
    graph.output_node().meta = dict(gm.graph.output_node().meta)
    result = fx.GraphModule(_attributes(gm), graph, gm.__class__.__name__)
    kept = {name for name, _ in gm.named_buffers(recurse=False, remove_duplicate=False)}
    for name, constant in list(result.named_buffers(recurse=False, remove_duplicate=False)):
        if name not in kept:  # A tensor that the graph makes itself is no buffer (see capture/convention.py).
            delattr(result, name)
            result.__dict__[name] = constant
    copy_attributes(gm, result)
    result.meta = gm.meta
    for node, taken_node in inputs.items():
        _restore(result, tensor(node), taken_node)
    if not halves:
        _keep_apart(result, [env[value.node] for value in given], len(outputs))
    for node in reversed(list(result.graph.nodes)):
        if not node.users and _is_removable(node):
            result.graph.erase_node(node)
    result.graph.lint()
    result.recompile()
    return result


def _copied(graph: fx.Graph, node: fx.Node, env: dict[fx.Node, fx.Node]) -> fx.Node:
    copied = graph.node_copy(node, env.__getitem__)
    copy_attributes(node, copied)
    return copied


def _attributes(gm: fx.GraphModule) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for node in gm.graph.find_nodes(op="get_attr"):
        value: Any = gm
        for name in str(node.target).split("."):
            value = getattr(value, name)
        found[str(node.target)] = value
    return found


def _contiguous(value: torch.Tensor) -> torch.Tensor:
    mode = getattr(value, "fake_mode", None)
    if mode is None or _is_dense(value):
        return value
    with mode:
        return torch.empty(value.shape, dtype=value.dtype, device=value.device)


def _restore(gm: fx.GraphModule, original: torch.Tensor, taken: fx.Node) -> None:
    """Gives a reused value the strides of the computed one, and memory of its own where the model's caller gets it."""
    users = list(taken.users)
    before = next(node for node in gm.graph.nodes if node.op != "placeholder")
    builder = Builder(gm, before=before, like=taken)
    if not _is_dense(original):
        restored = in_memory_order_of(original, taken, builder)
    elif _reaches_output(taken):
        restored = builder.call(aten.clone.default, taken)
    else:
        return
    for user in users:
        user.replace_input_with(taken, restored)


def _keep_apart(gm: fx.GraphModule, given: Sequence[fx.Node], count: int) -> None:
    """Makes the stored values contiguous, and copies those that share memory with what the caller may write to."""
    output = gm.graph.output_node()
    (results,) = output.args
    assert isinstance(results, tuple)
    kept = []
    for node in given:
        if not _is_dense(tensor(node)) or _reaches_output(node, count) or _is_of_another(node):
            # Right behind the node, so that the rest of its memory is free again soon.
            builder = Builder(gm, before=node.next, like=node)
            node = builder.call(aten.clone.default, node, memory_format=torch.contiguous_format)
        kept.append(node)
    output.args = ((*results[:count], *kept),)


def _reaches_output(node: fx.Node, count: int | None = None) -> bool:
    """Whether one of the first ``count`` outputs may share the node's memory."""
    for user in node.users:
        if user.op == "output":
            (results,) = user.args
            assert isinstance(results, tuple)
            if node in results[:count]:
                return True
        elif may_share_memory(user) and _reaches_output(user, count):
            return True
    return False


def _is_of_another(node: fx.Node) -> bool:
    """Whether the node may share memory with what it is computed from."""
    source = node.args[0] if node.target is operator.getitem else node
    assert isinstance(source, fx.Node)
    return may_share_memory(source)


def _is_removable(node: fx.Node) -> bool:
    """Whether the node has no effect but its result: assertions have one, Python's functions of sizes have none."""
    if node.op == "get_attr":
        return True
    if node.op != "call_function":
        return False
    target: Any = node.target
    if isinstance(target, OpOverload):
        name = schema_of(target).name
        return not schema_of(target).is_mutable and "assert" not in name and "constrain" not in name
    if isinstance(target, HigherOrderOperator):
        return bool(target is torch.ops.higher_order.flex_attention)
    return getattr(target, "__module__", "") in ("_operator", "math", "torch")
