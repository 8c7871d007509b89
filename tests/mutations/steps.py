"""The steps by which a graph is changed. Each names what it changes, so that leaving steps out shrinks a program."""

from __future__ import annotations

import math
import operator
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

__all__ = ["PRODUCTS", "Step", "applied", "drawn", "prepared_calls"]

Values = Mapping[str, Any]
"""By the name of a node, what it gives in one call."""


@dataclass(frozen=True)
class Step:
    """``kind`` of change of the node ``at``; ``detail`` says the rest: an operation, a number, another node."""

    kind: str
    at: str
    detail: tuple[Any, ...] = ()

    def __str__(self) -> str:
        return f"{self.kind} {self.at} {' '.join(map(str, self.detail))}"


Unary = Callable[[Tensor], Any]

LOWEST = torch.finfo(torch.float32).min
_SMALL = (0.0, 1.0, -1.0, 0.5, 2.0, 0.125, 3.0, -5.0)
_NUMBERS = (0.0, 1.0, -1.0, 0.5, 2.0, 0.125, 3.0, -5.0, 30.0, 1e-3, -1e9, -math.inf, LOWEST, -1e38)

_FLOATING: dict[str, Unary] = {
    "double it": lambda x: x * 2.0,
    "halve it": lambda x: x / 2,
    "negate": operator.neg,
    "add 1": lambda x: x + 1,
    "take from 1": lambda x: 1.0 - x,
    "times 0": lambda x: x * 0.0,
    "floor": lambda x: x.clamp(min=-1.0),
    "deep floor": lambda x: x.clamp(min=-1e4),
    "ceiling": lambda x: x.clamp(max=1.0),
    "tanh": torch.tanh,
    "relu": F.relu,
    "sigmoid": torch.sigmoid,
    "absolute": torch.abs,
    "exponential": torch.exp,
    "no NaN": torch.nan_to_num,
    "no NaN but the rest": lambda x: torch.where(x.isnan(), 0.0, x),
    "no infinity": lambda x: x.masked_fill(x == -math.inf, -1e9),
    "infinity for low": lambda x: x.masked_fill(x < -1.0, -math.inf),
    "zero for low": lambda x: torch.where(x < 0.01, torch.zeros_like(x), x),
    "to float32": lambda x: x.float(),
    "to float64": lambda x: x.double(),
    "to bfloat16 and back": lambda x: x.bfloat16().to(x.dtype),
    "softmax": lambda x: x.softmax(-1),
    "log of softmax": lambda x: x.log_softmax(-1),
    "softmax of the first axis": lambda x: x.softmax(0),
    "less its maximum": lambda x: x - x.amax(-1, keepdim=True),
    "less the maximum of all": lambda x: x - x.max(),
    "less its mean": lambda x: x - x.mean(-1, keepdim=True),
    "over its sum": lambda x: x / x.sum(-1, keepdim=True),
    "over its sum and 1e-6": lambda x: x / (x.sum(-1, keepdim=True) + 1e-6),
    "unit length": lambda x: F.normalize(x, dim=-1),
    "no dropout": lambda x: F.dropout(x, 0.0),
    "detached": lambda x: x.detach(),
    "copied": lambda x: x.clone(),
    "contiguous": lambda x: x.contiguous(),
    "laid out the other way": lambda x: x.mT.contiguous().mT,
    "reversed": lambda x: x.flip(-1),
    "rolled": lambda x: x.roll(1, -2),
    "cumulated": lambda x: x.cumsum(-1),
    "first alone": lambda x: x[..., :1],
    "all but the first": lambda x: x[..., 1:, :],
    "every other": lambda x: x[..., ::2],
    "repeated": lambda x: torch.cat([x, x], -1),
    "doubled rows": lambda x: x.repeat_interleave(2, -2),
    "one more axis": lambda x: x[None],
    "summed": lambda x: x.sum(-1, keepdim=True),
    "averaged rows": lambda x: x.mean(-2, keepdim=True),
    "scaled by its place": lambda x: x * (torch.arange(x.shape[-1], device=x.device) + 1),
    "distance added": lambda x: x - (torch.arange(x.shape[-1], device=x.device) - 2).abs() * 0.5,
    "last masked": lambda x: x.masked_fill(torch.arange(x.shape[-1], device=x.device) == x.shape[-1] - 1, -math.inf),
    "upper masked": lambda x: x.masked_fill(torch.ones_like(x, dtype=torch.bool).triu(1), -math.inf),
    "triangle added": lambda x: x + torch.full_like(x, -math.inf).triu(1),
    "row masked": lambda x: x.masked_fill(torch.arange(x.shape[-2], device=x.device)[:, None] == 1, -math.inf),
    "row lowered": lambda x: x + torch.where(torch.arange(x.shape[-2], device=x.device)[:, None] == 1, -1e9, 0.0),
    "row zeroed": lambda x: x * (torch.arange(x.shape[-2], device=x.device)[:, None] != 1),
    "lower triangle alone": torch.tril,
}
_OF_LOWEST: dict[str, Callable[[float, Tensor], Any]] = {
    "lowest floor": lambda lowest, x: torch.clamp(x, min=lowest),
    "lower masked": lambda lowest, x: x.masked_fill(torch.ones_like(x, dtype=torch.bool).tril(-1), lowest),
    "lowest triangle added": lambda lowest, x: x + torch.full_like(x, lowest).triu(1),
}
_BOOLEAN: dict[str, Unary] = {
    "not": torch.logical_not,
    "as numbers": lambda x: x.float(),
    "as integers": lambda x: x.long(),
    "all": torch.ones_like,
    "none": torch.zeros_like,
    "reversed": lambda x: x.flip(-1),
    "shifted": lambda x: x.roll(1, -1),
    "lower": lambda x: x.tril(),
    "upper": lambda x: x.triu(1),
    "both": lambda x: x & x.flip(-1),
    "either": lambda x: x | x.roll(1, -1),
    "any": lambda x: x.any(-1, keepdim=True),
    "every": lambda x: x.all(-1, keepdim=True),
    "lowest number": lambda x: torch.where(x, 0.0, LOWEST),
    "infinity": lambda x: torch.zeros(x.shape, device=x.device).masked_fill(x, -math.inf),
}
_INTEGER: dict[str, Unary] = {
    "next": lambda x: x + 1,
    "last": lambda x: x - 1,
    "negate": operator.neg,
    "twice": lambda x: x * 2,
    "half": lambda x: x // 2,
    "a third": lambda x: x % 3,
    "bounded": lambda x: x.clamp(0, 4),
    "as numbers": lambda x: x.float(),
    "narrow": lambda x: x.to(torch.int8),
    "unsigned": lambda x: x.to(torch.uint8),
    "reversed": lambda x: x.flip(-1),
    "differences": lambda x: x.diff(dim=-1, prepend=x[..., :1]),
    "cumulated": lambda x: x.cumsum(-1),
}
_SIBLINGS: tuple[tuple[Any, ...], ...] = (
    (operator.add, operator.sub, operator.mul, operator.truediv, torch.maximum, torch.minimum),
    (operator.lt, operator.le, operator.gt, operator.ge, operator.eq, operator.ne),
    (operator.and_, operator.or_, operator.xor),
    ("softmax", "log_softmax"),
    ("amax", "amin", "sum", "mean", "logsumexp"),
    ("tril", "triu"),
    ("masked_fill", "masked_fill_"),
    (torch.tril, torch.triu),
    (torch.ones, torch.zeros),
    (torch.ones_like, torch.zeros_like),
    (torch.exp, torch.exp2, torch.expm1, torch.sigmoid),
    ("exp", "exp2", "expm1", "sigmoid", "tanh"),
    (operator.iadd, operator.isub, operator.imul),
)
_IN_PLACE = {operator.add: "add_", operator.sub: "sub_", operator.mul: "mul_", operator.truediv: "div_"}
_FACTORS = (operator.mul, operator.truediv, operator.imul, "mul", "div", torch.mul, torch.div)
_OF_INPUTS: dict[str, tuple[Any, ...]] = {
    "layout": ("transposed", "spread", "expanded"),
    "dtype": (torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.bool),
    "values": ("three times as large", "all the same", "zero in half", "twice the same", "all", "none", "row of none"),
}
_MASKS = frozenset(
    {
        *("infinity for low", "last masked", "upper masked", "lower masked", "triangle added", "lowest triangle added"),
        *("row masked", "row lowered", "exponential", "no infinity", "lowest floor", "log of softmax"),
    }
)
"""What makes numbers that are infinite, or as good as that: of scores, and not of what is multiplied."""

PRODUCTS = (operator.matmul, torch.matmul, torch.bmm, torch.baddbmm, torch.einsum, "matmul", "bmm", F.linear)
_ENDS = ("softmax", "log_softmax", F.softmax, F.log_softmax, torch.softmax, "exp", torch.exp)


def _may_be_operand(node: fx.Node) -> bool:
    """Whether the node leads to a product with no softmax between."""
    pending, seen = list(node.users), set()
    while pending:
        reader = pending.pop()
        summed = reader.target in ("sum", torch.sum) and any(each.target in _FACTORS for each in reader.all_input_nodes)
        if (
            summed
            or reader.target in PRODUCTS
            or getattr(reader.target, "__name__", "") == "scaled_dot_product_attention"
        ):
            return True
        if reader not in seen and reader.target not in _ENDS:
            seen.add(reader)
            pending += reader.users
    return False


def drawn(chance: random.Random, graph: fx.GraphModule, values: Values) -> Step:
    """A step that may fit the graph; whether it does is seen when it is applied and the graph runs."""
    tensors = [node for node in graph.graph.nodes if isinstance(values.get(node.name), Tensor)]
    calls = [node for node in tensors if node.op.startswith("call")]
    kind = chance.choice(
        ["insert"] * 8
        + ["number"] * 4
        + ["delete", "swap", "sibling", "mask", "rewire"] * 3
        + ["in place", "also returned", "layout", "dtype", "values", "values", "twice"]
    )
    if kind in ("layout", "dtype", "values"):
        at = chance.choice([node for node in tensors if node.op == "placeholder"])
        return Step(kind, at.name, (chance.choice(_OF_INPUTS[kind]),))
    places = [(node, place) for node in calls for place in _numbers(node)]
    if kind == "number" and places:
        at, place = chance.choice(places)
        old = at.args[place]
        factor = at.target in _FACTORS or _may_be_operand(at)
        new: Any = chance.choice((-2, -1, 0, 1, 2, 3) if isinstance(old, int) else _SMALL if factor else _NUMBERS)
        return Step(kind, at.name, (place, new))
    if kind in ("insert", "number"):
        at = chance.choice(tensors)
        names = list(_table(values[at.name]))
        if _may_be_operand(at):
            names = [name for name in names if name not in _MASKS]
        return Step("insert", at.name, (chance.choice(names),))
    at = chance.choice(calls or tensors)
    if kind in ("mask", "rewire"):
        others = [node for node in tensors if (values[node.name].dtype is torch.bool) or kind == "rewire"]
        other = chance.choice(others).name if others else ""
        fills = (0.0, 1.0, 50.0) if _may_be_operand(at) else (-math.inf, LOWEST, -1e9, 0.0, 1.0, 50.0)
        return Step(kind, at.name, (other, chance.choice(fills)))
    if kind in ("sibling", "twice"):
        return Step(kind, at.name, (chance.randrange(8),))
    return Step(kind, at.name)


def applied(step: Step, graph: fx.GraphModule, values: Values) -> bool:
    """Changes the graph; False if the step does not fit it. What follows the graph's new nodes is for eager to say."""
    nodes = {node.name: node for node in graph.graph.nodes}
    at = nodes.get(step.at)
    if step.kind in ("layout", "dtype", "values"):
        return True
    if at is None or not isinstance(values.get(step.at), Tensor):
        return False
    done = _KINDS[step.kind](step, at, nodes, values)
    if done:
        graph.graph.eliminate_dead_code()
        graph.graph.lint()
        graph.recompile()
    return done


def prepared_calls(steps: Sequence[Step], graph: fx.GraphModule, calls: Sequence[tuple[Any, ...]]) -> list[list[Any]]:
    """The arguments of the calls, changed by the steps that concern inputs."""
    placeholders = [node.name for node in graph.graph.nodes if node.op == "placeholder"]
    changed = [list(call) for call in calls]
    for step in steps:
        if step.kind in ("layout", "dtype", "values"):
            place = placeholders.index(step.at)
            for call in changed:
                call[place] = _INPUTS[step.kind](call[place], step.detail[0])
    return changed


def _table(value: Tensor) -> dict[str, Unary]:
    if value.dtype is torch.bool:
        return _BOOLEAN
    if not value.is_floating_point():
        return _INTEGER
    lowest = torch.finfo(value.dtype).min
    return _FLOATING | {name: partial(operation, lowest) for name, operation in _OF_LOWEST.items()}


def _numbers(node: fx.Node) -> list[int]:
    return [
        place for place, value in enumerate(node.args) if isinstance(value, (int, float)) and type(value) is not bool
    ]


def _insert(step: Step, at: fx.Node, nodes: Mapping[str, fx.Node], values: Values) -> bool:
    operation = _table(values[step.at]).get(step.detail[0])
    if operation is None:
        return False
    _put_after(at, operation)
    return True


def _put_after(at: fx.Node, operation: Unary) -> None:
    """Writes the operation into the graph, for all readers of ``at``."""
    traced = fx.symbolic_trace(_module(operation))
    last = at
    while last.op == "placeholder" and last.next.op == "placeholder":
        last = last.next
    readers = list(at.users)
    with at.graph.inserting_after(last):
        copies: dict[fx.Node, fx.Node] = {}
        for node in traced.graph.nodes:
            if node.op == "placeholder":
                copies[node] = at
            elif node.op == "output":
                result = copies[node.args[0]]
            else:
                copies[node] = at.graph.node_copy(node, copies.__getitem__)
                at.graph._insert = copies[node].append
    for reader in readers:
        reader.replace_input_with(at, result)


def _module(operation: Unary) -> torch.nn.Module:
    class Operation(torch.nn.Module):
        def forward(self, x: Tensor) -> Any:
            return operation(x)

    return Operation()


def _first_tensor(node: fx.Node, values: Values) -> fx.Node | None:
    return next(
        (arg for arg in node.args if isinstance(arg, fx.Node) and isinstance(values.get(arg.name), Tensor)), None
    )


def _delete(step: Step, at: fx.Node, nodes: Mapping[str, fx.Node], values: Values) -> bool:
    first = _first_tensor(at, values)
    if first is None:
        return False
    at.replace_all_uses_with(first)
    return True


def _swap(step: Step, at: fx.Node, nodes: Mapping[str, fx.Node], values: Values) -> bool:
    """``g(f(x))`` in place of ``f(g(x))``."""
    first = _first_tensor(at, values)
    before = first and _first_tensor(first, values)
    if first is None or before is None or len(first.users) > 1:
        return False
    if any(arg is not before and isinstance(arg, fx.Node) and arg in at.all_input_nodes for arg in first.args):
        return False
    readers = list(at.users)
    at.replace_input_with(first, before)
    for reader in readers:
        reader.replace_input_with(at, first)
    first.replace_input_with(before, at)
    at.append(first)
    return True


def _sibling(step: Step, at: fx.Node, nodes: Mapping[str, fx.Node], values: Values) -> bool:
    for family in _SIBLINGS:
        if at.target in family:
            others = [target for target in family if target != at.target]
            at.target = others[step.detail[0] % len(others)]
            return True
    return False


def _mask(step: Step, at: fx.Node, nodes: Mapping[str, fx.Node], values: Values) -> bool:
    mask = nodes.get(step.detail[0])
    order = {name: place for place, name in enumerate(nodes)}
    if mask is None or order[mask.name] > order[at.name] or not values[at.name].is_floating_point():
        return False
    readers = list(at.users)
    last = at
    while last.op == "placeholder" and last.next.op == "placeholder":
        last = last.next
    with at.graph.inserting_after(last):
        masked = at.graph.call_method("masked_fill", (at, mask, step.detail[1]))
    for reader in readers:
        reader.replace_input_with(at, masked)
    return True


def _rewire(step: Step, at: fx.Node, nodes: Mapping[str, fx.Node], values: Values) -> bool:
    """An operand gives way to another tensor of the graph."""
    other = nodes.get(step.detail[0])
    order = {name: place for place, name in enumerate(nodes)}
    if other is None or order[other.name] >= order[at.name]:
        return False
    operands = [arg for arg in at.args if isinstance(arg, fx.Node) and isinstance(values.get(arg.name), Tensor)]
    if not operands or operands[-1] is other:
        return False
    at.replace_input_with(operands[-1], other)
    return True


def _number(step: Step, at: fx.Node, nodes: Mapping[str, fx.Node], values: Values) -> bool:
    place, new = step.detail
    if place not in _numbers(at):
        return False
    at.update_arg(place, new)
    return True


def _in_place(step: Step, at: fx.Node, nodes: Mapping[str, fx.Node], values: Values) -> bool:
    name = _IN_PLACE.get(at.target) if callable(at.target) else None
    if name is None or not isinstance(at.args[0], fx.Node):
        return False
    at.op, at.target = "call_method", name
    return True


def _also_returned(step: Step, at: fx.Node, nodes: Mapping[str, fx.Node], values: Values) -> bool:
    output = at.graph.output_node()
    results: Any = output.args[0]
    if at in results:
        return False
    output.args = ((*results, at),)
    return True


def _twice(step: Step, at: fx.Node, nodes: Mapping[str, fx.Node], values: Values) -> bool:
    """One of the readers gets a node of its own."""
    readers = list(at.users)
    if len(readers) < 2 or at.op == "placeholder":
        return False
    with at.graph.inserting_after(at):
        copy = at.graph.node_copy(at, lambda node: node)
    readers[step.detail[0] % len(readers)].replace_input_with(at, copy)
    return True


_KINDS: dict[str, Callable[[Step, fx.Node, Mapping[str, fx.Node], Values], bool]] = {
    "insert": _insert,
    "delete": _delete,
    "swap": _swap,
    "sibling": _sibling,
    "mask": _mask,
    "rewire": _rewire,
    "number": _number,
    "in place": _in_place,
    "also returned": _also_returned,
    "twice": _twice,
}


def _laid_out(value: Tensor, how: str) -> Tensor:
    if value.dim() < 2:
        return value
    if how == "transposed":
        return value.transpose(0, -1).contiguous().transpose(0, -1)
    if how == "spread":
        spread = value.new_zeros((*value.shape, 2))
        spread[..., 0] = value
        return spread[..., 0]
    return value[:1].expand_as(value)


def _with_values(value: Tensor, how: str) -> Tensor:
    value = value.clone()
    if how == "three times as large":
        return value * 3 if value.is_floating_point() else value
    if how == "all the same":
        return value[..., :1].expand_as(value).clone() if value.dim() else value
    if how == "zero in half" and value.dim():
        value[..., ::2] = 0
    elif how == "twice the same" and value.dim() > 1:
        value[..., 1:, :] = value[..., :1, :]
    elif value.dtype is torch.bool:
        if how == "row of none" and value.dim() > 1:
            value[..., -1, :] = False
        elif how in ("all", "none"):
            value.fill_(how == "all")
    return value


_INPUTS: dict[str, Callable[[Any, Any], Any]] = {
    "layout": _laid_out,
    "dtype": lambda value, dtype: value.to(dtype),
    "values": _with_values,
}
