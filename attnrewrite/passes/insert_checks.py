"""``ATTNREWRITE_CHECKS=1``: checks the operands of a kernel before each call.

Dynamo's guards check the inputs of a graph when the model is called through ``torch.compile``; nothing checks them
later. If a compiled graph is called in another way, or if an operator's result differs from its fake implementation, a
kernel gets operands that it was not chosen for. The operator ``torch.ops.attnrewrite.check_attention`` before the
kernel compares device, dtype, sizes and the stride of the last dimension. It reads no data and waits for no device.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, fx

from attnrewrite.errors import AttentionCheckError
from attnrewrite.ir.axes import Axis, Operand, size_of
from attnrewrite.ir.builder import Builder
from attnrewrite.ir.nodes import dtype_name, same, tensor
from attnrewrite.ir.site import AttentionSite, Bias, Scale
from attnrewrite.ir.source import SourceLocation
from attnrewrite.torch_private import FakeTensor

__all__ = ["insert_check"]


@dataclass(frozen=True)
class _Expected:
    """The properties that an operand must have.

    Attributes:
        name: the operand's name in messages.
        device, dtype: as PyTorch prints them.
        dims: for each dimension, the indices into the operator's ``sizes`` of the numbers whose product is its size;
            None if that is not known.
        dense: whether the last dimension has stride 1.
    """

    name: str
    device: str
    dtype: str
    dims: tuple[tuple[int, ...] | None, ...]
    dense: bool


def insert_check(
    gm: fx.GraphModule, site: AttentionSite, created: Sequence[fx.Node], location: SourceLocation | None
) -> fx.Node | None:
    """Inserts the check of a site before its kernel.

    Args:
        created: the kernel's nodes. Operands that they do not read are not checked: a mask that became ``is_causal``
            would have to be computed only for the check.
        location: the site's location, for the message.

    Returns:
        The new node; None if the kernel reads none of the site's operands.
    """
    read = {node for own in created for node in own.all_input_nodes}
    operands = [(name, operand) for name, operand in _operands(site) if operand.node in read]
    if not operands:
        return None
    builder = Builder(gm, before=created[0], like=site.anchor)
    axes: dict[Axis, int] = {}
    expected = [_expected(name, operand, axes) for name, operand in operands]
    spec = {
        "where": _in_words(location),
        "axes": [_role(axis, site) for axis in axes],
        "operands": [asdict(entry) for entry in expected],
    }
    sizes = [axis.size for axis in axes]
    target = torch.ops.attnrewrite.check_attention.default
    return builder.insert(target, ([operand.node for _, operand in operands], sizes, json.dumps(spec)), {}, None)


def _operands(site: AttentionSite) -> Iterable[tuple[str, Operand]]:
    """The named operands of the site, each node once."""
    named = [("query", site.query), ("key", site.key), ("value", site.value)]
    for mod in (*site.mods, *site.weight_mods):
        if isinstance(mod, Bias):
            named.append(("mask", mod.operand))
        elif isinstance(mod, Scale):
            if isinstance(mod.factor, Operand):
                named.append(("scale", mod.factor))
        elif hasattr(mod, "condition"):
            named.append(("mask", mod.condition))
    if isinstance(site.sink, Operand):
        named.append(("sink", site.sink))
    found: set[fx.Node] = set()
    for name, operand in named:
        operand = operand.resolved()
        if operand.node not in found:
            found.add(operand.node)
            yield name, operand


def _expected(name: str, operand: Operand, axes: dict[Axis, int]) -> _Expected:
    value = tensor(operand.node)
    dims: list[tuple[int, ...] | None] = [None] * value.dim()
    if len(operand.layout) == value.dim():
        for place, dim in enumerate(operand.layout):
            if same(size_of(dim), value.shape[place]):
                dims[place] = tuple(axes.setdefault(axis, len(axes)) for axis in dim)
    dense = value.dim() > 0 and same(value.stride(-1), 1)
    return _Expected(name, str(value.device), dtype_name(value.dtype), tuple(dims), dense)


def _role(axis: Axis, site: AttentionSite) -> str:
    if axis in site.query_axes:
        return "queries"
    if axis in site.key_axes:
        return "keys"
    if axis in site.feature_axes:
        return "head size"
    return "head size of the value" if axis in site.value_axes else "batch or heads"


def _in_words(location: SourceLocation | None) -> str:
    if location is None:
        return "attention"
    return f"attention at {location}" + (f" ({location.module})" if location.module else "")


# The operator.


@dataclass(frozen=True)
class _Spec:
    where: str
    axes: tuple[str, ...]
    operands: tuple[_Expected, ...]


@functools.cache
def _parsed(spec: str) -> _Spec:
    data = json.loads(spec)
    return _Spec(data["where"], tuple(data["axes"]), tuple(_Expected(**operand) for operand in data["operands"]))


def _check(operands: Sequence[Tensor], sizes: Sequence[int], spec: str) -> None:
    """Raises:
    AttentionCheckError: an operand differs from what the graph was compiled for.
    """
    parsed = _parsed(spec)
    for value, expected in zip(operands, parsed.operands, strict=True):
        mismatch = _mismatch(value, expected, parsed, operands, sizes)
        if mismatch:
            raise AttentionCheckError(f"{parsed.where}: {mismatch}")


def _mismatch(
    value: Tensor, expected: _Expected, spec: _Spec, operands: Sequence[Tensor], sizes: Sequence[int]
) -> str | None:
    """What is wrong with an operand first, and what to do about it; None if nothing is wrong."""
    name = expected.name
    if str(value.device) != expected.device:
        first, other = spec.operands[0].name, str(operands[0].device)
        if name != first and other != str(value.device):
            return f"{name} is on {value.device} and {first} is on {other}; move them to one device"
        return (
            f"{name} is on {value.device}, but the graph was compiled for {expected.device}; move it, or call the "
            "model through torch.compile, which recompiles"
        )
    if dtype_name(value.dtype) != expected.dtype:
        return (
            f"{name} is {dtype_name(value.dtype)}, but the graph was compiled for {expected.dtype}; convert it, or "
            "call the model through torch.compile, which recompiles"
        )
    if value.dim() != len(expected.dims):
        return (
            f"{name} has {value.dim()} dimensions, not {len(expected.dims)}; pass the shape that the graph was "
            "compiled for"
        )
    for place, axes in enumerate(expected.dims):
        if axes is not None and value.shape[place] != math.prod(sizes[axis] for axis in axes):
            return _size_mismatch(value, place, axes, expected, spec, operands, sizes)
    if expected.dense and value.numel() > 0 and value.shape[-1] > 1 and value.stride(-1) != 1:
        return (
            f"the last dimension of {name} has stride {value.stride(-1)}, but the kernel requires 1; call .contiguous()"
        )
    return None


def _size_mismatch(
    value: Tensor,
    place: int,
    axes: tuple[int, ...],
    expected: _Expected,
    spec: _Spec,
    operands: Sequence[Tensor],
    sizes: Sequence[int],
) -> str:
    expected_size = math.prod(sizes[axis] for axis in axes)
    role = " and ".join(dict.fromkeys(spec.axes[axis] for axis in axes)) or "broadcast"
    text = f"dimension {place} of {expected.name} ({role}) is {value.shape[place]}, not {expected_size}"
    for other, its in zip(operands, spec.operands, strict=True):
        if axes and its.name != expected.name and axes in its.dims:
            size = other.shape[its.dims.index(axes)]
            text = f"{text}; that of {its.name} is {size}"
            break
    return f"{text}; pass the sizes that the graph was compiled for, or call the model through torch.compile"


def _check_unless_fake(operands: Sequence[Tensor], sizes: Sequence[int], spec: str) -> None:
    """Checks real tensors, and nothing while a graph is traced. Tensors on "meta" are dispatched here as well."""
    if not any(isinstance(value, FakeTensor) for value in operands):
        _check(operands, sizes, spec)


# Recorded in a CUDA graph, the check would run once and never again.
_operator = torch.library.custom_op(
    "attnrewrite::check_attention",
    _check,
    mutates_args=(),
    schema="(Tensor[] operands, SymInt[] sizes, str spec) -> ()",
    tags=[torch.Tag.cudagraph_unsafe],
)
_operator.register_fake(_check_unless_fake)
# It has no output: without this it would be removed as dead code, by FX and by Inductor.
torch.fx.node.has_side_effect(torch.ops.attnrewrite.check_attention.default)
