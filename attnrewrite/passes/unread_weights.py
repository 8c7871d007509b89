"""Attention weights that the model stores or returns, and that nobody reads, as the user says.

    self.attention = weights          # options={"unread_weights": "*"}
    return weights @ value

Such a result of the graph is left out before attention is looked for. Where the attention was rewritten its place is
taken by an object whose use is an error; where it was kept, by the weights again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import fx

from attnrewrite.analysis.weights import every_softmax
from attnrewrite.errors import UnreadWeightsError
from attnrewrite.ir.nodes import is_tensor
from attnrewrite.ir.ops import COPY_OPS, DIV_OPS, MASKED_FILL_OPS, MUL_OPS, is_cast
from attnrewrite.ir.source import SourceLocation, source_location
from attnrewrite.ir.views import is_layout_op
from attnrewrite.passes.saved_nodes import SavedNode
from attnrewrite.selection.requests import matches
from attnrewrite.torch_private import is_erased, tree_leaves

__all__ = ["UnreadResults", "UnreadWeights", "with_standing"]

aten = torch.ops.aten


class UnreadWeights:
    """Stands for attention weights that were not computed: any use of it is an :class:`UnreadWeightsError`."""

    def __init__(self, where: str) -> None:
        self._where = where

    def __repr__(self) -> str:
        return f"<attention weights of {self._where}, not computed>"

    def _used(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise UnreadWeightsError(
            f"the attention weights of {self._where} were not computed, since options['unread_weights'] says that "
            "nobody reads them (leave this module out of it)"
        )

    def __reduce__(self) -> tuple[type[UnreadWeights], tuple[str]]:
        """Models that hold it can be copied and saved."""
        return UnreadWeights, (self._where,)

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):
            raise AttributeError(name)
        self._used()

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> NoReturn:
        (own, *_) = [value for value in tree_leaves((args, kwargs)) if isinstance(value, cls)]
        own._used()

    __bool__ = __len__ = __iter__ = __getitem__ = __float__ = __int__ = __array__ = _used
    # Equality by identity would say False in silence.
    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = _used
    __hash__ = object.__hash__
    __neg__ = __abs__ = __pow__ = __contains__ = _used
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __matmul__ = __rmatmul__ = _used


@dataclass(frozen=True)
class _LeftOut:
    """A result that was left out.

    Attributes:
        place: its place among the results of the graph.
        result: the node that it was.
        softmax: the node of the weights that it was made of.
        removed: the nodes that only it needed, in graph order.
        masks: what else these are made of, in graph order, since nothing may be left of it when they are put back.
    """

    place: int
    result: fx.Node
    softmax: fx.Node
    removed: tuple[SavedNode, ...]
    masks: tuple[SavedNode, ...]


class UnreadResults:
    """The results of a graph that were left out."""

    def __init__(self, gm: fx.GraphModule, globs: Sequence[str]) -> None:
        """Leaves out, in place, the results that are attention weights of the modules or lines that a glob matches."""
        self._gm = gm
        self._left_out: list[_LeftOut] = []
        self._written: dict[fx.Node, fx.Node] = {}
        softmaxes = {softmax.node for softmax in every_softmax(gm.graph)} if globs else set()
        results: Any = gm.graph.output_node().args[0] if softmaxes else ()
        for place, result in enumerate(results if isinstance(results, (tuple, list)) else ()):
            softmax = _softmax_behind(result, softmaxes)
            if softmax is not None and any(matches(glob, source_location(softmax)) for glob in globs):
                self._leave_out(place, result, softmax)

    def _leave_out(self, place: int, result: fx.Node, softmax: fx.Node) -> None:
        output = self._gm.graph.output_node()
        _set_result(output, place, None)
        removed: list[SavedNode] = []
        node = result
        while node is not softmax and not node.users:
            removed.append(SavedNode.of(node))
            self._gm.graph.erase_node(node)
            node = removed[-1].args[0]
        removed.reverse()
        self._left_out.append(_LeftOut(place, result, softmax, tuple(removed), _behind(removed, softmax)))
        if not softmax.users:
            # Nothing else reads them, so they are the result of something that is no attention.
            self._put_back(self._left_out.pop())

    def settle(self) -> dict[int, UnreadWeights]:
        """Puts back what could not be done without; returns what stands for the others, by place."""
        standing = {}
        # What several results share was removed with the last of them.
        for each in reversed(self._left_out):
            if is_erased(each.softmax):
                location = source_location(each.softmax)
                standing[each.place] = UnreadWeights("the model" if location is None else _in_words(location))
            else:
                self._put_back(each)
        return dict(sorted(standing.items()))

    def _put_back(self, each: _LeftOut) -> None:
        graph = self._gm.graph
        lost = [mask for mask in each.masks if is_erased(mask.node) and mask.node not in self._written]
        for removed in (*lost, *each.removed):
            before = _place_of(removed, [self._current(node) for node in removed.reads])
            self._written[removed.node] = removed.write(graph, before, self._current)
        _set_result(graph.output_node(), each.place, self._current(each.result))
        self._gm.recompile()

    def _current(self, node: fx.Node) -> fx.Node:
        return self._written.get(node, node)


def _behind(removed: Sequence[SavedNode], softmax: fx.Node) -> tuple[SavedNode, ...]:
    """The calls that the removed nodes are computed from, but for the weights, in graph order."""
    own = {each.node for each in removed}
    pending = [read for each in removed for read in each.reads]
    found: set[fx.Node] = set()
    while pending:
        node = pending.pop()
        if node.op == "call_function" and node is not softmax and node not in found and node not in own:
            found.add(node)
            pending += node.all_input_nodes
    return tuple(SavedNode.of(node) for node in sorted(found))


def _place_of(removed: SavedNode, reads: Sequence[fx.Node]) -> fx.Node:
    """The node in front of which a removed one stood, in its region; at least behind what it reads."""
    node = removed.node
    while is_erased(node):
        node = node.prev  # What is erased keeps its place.
    latest = max([node, *(read for read in reads if read.op == "call_function")])
    return latest.next


def with_standing(compiled: Callable[..., Any], standing: dict[int, UnreadWeights]) -> Callable[..., Any]:
    """The compiled graph, which gives what stands for weights in their places."""
    if not standing:
        return compiled

    def call(*inputs: Any) -> Any:
        results = list(compiled(*inputs))
        for place, weights in standing.items():
            results[place] = weights
        return tuple(results)

    return call


def _set_result(output: fx.Node, place: int, result: fx.Node | None) -> None:
    results: Any = list(output.args[0])  # type: ignore[arg-type]
    results[place] = result
    output.args = (tuple(results), *output.args[1:])


def _softmax_behind(node: Any, softmaxes: set[fx.Node]) -> fx.Node | None:
    while is_tensor(node) and node.op == "call_function":
        if node in softmaxes:
            return node  # type: ignore[no-any-return]
        if not (is_layout_op(node) or is_cast(node) or _keeps_weights(node)):
            return None
        node = node.args[0]
    return None


def _keeps_weights(node: fx.Node) -> bool:
    """Whether the node is what models do to weights that they keep: dropout, a mask, the mean over heads."""
    averages = node.target in (aten.mean.dim, aten.sum.dim_IntList)
    # What a tensor multiplies may be a result of its own, such as a pooled value.
    scales = (node.target in MUL_OPS or node.target in DIV_OPS) and not is_tensor(node.args[1])
    kept = node.target in COPY_OPS or node.target in MASKED_FILL_OPS or node.target is aten.dropout.default
    return averages or scales or kept


def _in_words(location: SourceLocation) -> str:
    return f"{location.module or location.function} ({location.file}:{location.line})"
