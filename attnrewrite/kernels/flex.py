"""``flex``: PyTorch's FlexAttention, which applies any function to each score.

It takes what no mask and no scale can say: tanh soft-capping, clamped scores, factors over query and key positions. The
operator is inserted as it stands in a traced graph, with the source's own arithmetic as its ``score_mod``.

Source: https://github.com/pytorch/pytorch/blob/v2.13.0/torch/_higher_order_ops/flex_attention.py
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch.utils._python_dispatch import _disable_current_modes

from attnrewrite.analysis.values import ABSORBING, constant_value
from attnrewrite.analysis.views import Dim, Operand
from attnrewrite.ir import Builder, is_tensor, same, tensor
from attnrewrite.kernels.base import Availability, Verdict
from attnrewrite.kernels.layout import Plan, lay_out, modified, padded
from attnrewrite.kernels.masking import Mask
from attnrewrite.site import AttentionSite, Bias, Elementwise, Fill, Floor, Narrow, Scale, Shift

__all__ = ["Flex"]

aten = torch.ops.aten

_SMALLEST_HEAD = 16
"""Triton multiplies matrices of 16 columns and more."""


class Flex:
    """FlexAttention.

    Rows whose keys are all masked: scores are kept above the range that fused kernels lose, so that such a row gives
    the mean of the values; where the source gives NaN, that is restored as for PyTorch's own kernels.
    """

    name = "flex"
    automatic = True
    needs = "PyTorch and Inductor"

    def availability(self) -> Availability:
        if torch.cuda.is_available():
            return Availability(True, f"part of torch {torch.__version__}")
        if not _cpu_supported():
            return Availability(False, "Inductor's FlexAttention needs AVX2 or better on this CPU")
        return Availability(True, f"part of torch {torch.__version__}; without a backward pass on the CPU")

    def supports(self, site: AttentionSite) -> Verdict:
        scores = site.scores
        assert scores is not None
        if any(same(axis.size, 0) for axis in site.key_axes):
            return Verdict.no("there is no key to attend to")
        if site.compute_dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return Verdict.no(f"takes float32, bfloat16 and float16, not {site.compute_dtype}".replace("torch.", ""))
        if site.device.type == "cpu":
            if site.differentiable:
                return Verdict.no("FlexAttention has no backward pass on the CPU (run it under torch.no_grad())")
            if not _cpu_supported():
                return Verdict.no("Inductor's FlexAttention needs AVX2 or better on this CPU")
        elif site.device.type != "cuda":
            return Verdict.no(f"not tested on {site.device.type}")
        else:
            widths = [axis.size for axis in (*site.feature_axes, *site.value_axes)]
            if any(not isinstance(width, int) for width in widths) or _narrow(site):
                return Verdict.no(f"takes head sizes from {_SMALLEST_HEAD} on")
        if site.is_causal or (site.fused and scores.masked_rows != "none"):
            return Verdict.no("an existing fused call with a mask or is_causal has rules that are not written out here")
        if site.rounds_rows and scores.masked_rows != "none":
            return Verdict.no("what a row without a key gives is a matter of rounding here")
        if any(isinstance(mod, Scale) and _is_symbolic(mod.factor) for mod in site.mods):
            return Verdict.no("a factor of the scores is a symbolic number, which a score_mod does not take")
        if site.dropout:
            return Verdict.no("FlexAttention has no dropout")
        if site.sink is not None and not all(isinstance(axis.size, int) for axis in site.key_axes):
            return Verdict.no("a sink beside a function of the scores needs a number of keys that is known")
        floored = any(isinstance(mod, Floor) for mod in site.mods) and scores.masked_rows != "none"
        if site.differentiable and (floored or scores.masked_rows not in ("none", "mean of value")):
            return Verdict.no(
                "a row may have no key, and the gradient of such a row is not known here (if none occurs, say so: "
                "options={'assume_attended_rows': True})"
            )
        return Verdict.yes()

    def emit(self, site: AttentionSite, builder: Builder) -> fx.Node:
        scores = site.scores
        assert scores is not None
        plan = Plan.of(site)
        query, key, value = (
            self._operand(builder, site, operand, dims)
            for operand, dims in (
                (site.query, plan.query_dims),
                (site.key, plan.key_dims),
                (site.value, plan.value_dims),
            )
        )
        for mod in scores.value_mods:
            value = modified(builder, value, mod, plan.value_dims)
        if site.sink is not None:
            # One more key, whose score is the sink's and whose value adds nothing.
            key, value = padded(builder, key, -2, 0.0), padded(builder, value, -2, 0.0)
        score_mod, buffers = _score_mod(builder, site, plan.score_dims)
        batch, heads, length, _ = tensor(query).shape
        output = tensor(query).new_empty((batch, heads, length, tensor(value).shape[-1]))
        if site.device.type == "cpu" and site.for_inductor:
            # Inductor's C++ template fails where it meets operands that the graph computes.
            _no_block_mask()  # Not to be made within the call: that may come from where vmap does not work.
            operator_ = torch.ops.attnrewrite.flex_attention.default
            node = builder.insert(operator_, (query, key, value, buffers, score_mod.code), {}, output)
        else:
            node = _in_graph(builder, site, (query, key, value), output, score_mod, buffers)
        if scores.masked_rows not in ("none", "mean of value"):
            node = Mask(builder, site, plan.score_dims).with_source_rows(node, value, plan)
        return plan.as_result(builder, site, node)

    def _operand(self, builder: Builder, site: AttentionSite, operand: Operand, dims: tuple[Dim, ...]) -> fx.Node:
        node = lay_out(builder, operand.node, operand.layout, dims, expand=True)
        if tensor(node).dtype is not site.compute_dtype:
            node = builder.call(aten.to.dtype, node, site.compute_dtype)
        static = all(isinstance(size, int) for size in (*tensor(node).shape, *tensor(node).stride()))
        if static and tensor(node).is_contiguous():
            return node
        return builder.call(aten.clone.default, node, memory_format=torch.contiguous_format)


def _in_graph(
    builder: Builder,
    site: AttentionSite,
    operands: tuple[fx.Node, fx.Node, fx.Node],
    output: torch.Tensor,
    score_mod: fx.GraphModule,
    buffers: list[fx.Node],
) -> fx.Node:
    """The higher-order operator, as it stands in a graph that was traced with ``flex_attention`` in it."""
    options = {
        "PRESCALE_QK": False,
        "ROWS_GUARANTEED_SAFE": False,
        "BLOCKS_ARE_CONTIGUOUS": False,
        "WRITE_DQ": True,
        "OUTPUT_LOGSUMEXP": site.differentiable and site.device.type != "cpu",
        "OUTPUT_MAX": False,
    }
    rows = output.new_empty(output.shape[:-1], dtype=torch.float32)
    module = builder.submodule("score_mod", score_mod)
    no_mask = _empty_block_mask(builder, site)
    result = builder.insert(
        torch.ops.higher_order.flex_attention,
        (*operands, module, no_mask, 1.0, options, tuple(buffers), ()),
        {},
        (output, rows, rows),
    )
    return builder.insert(operator.getitem, (result, 0), {}, output)


@torch.library.custom_op("attnrewrite::flex_attention", mutates_args=(), device_types="cpu")
def _flex_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, buffers: list[torch.Tensor], score_mod: str
) -> torch.Tensor:
    """FlexAttention on the CPU, compiled by itself.

    Args:
        query, key, value: (batch, heads, length, features), contiguous; key and value may have fewer heads.
        buffers: what ``score_mod`` reads.
        score_mod: the source of ``forward(self, score, batch, head, query, key, *buffers)``. It is source and no
            function so that a graph with this call in it can be stored and run elsewhere.
    """
    # Compiled code may watch its operators by a dispatch mode; what is compiled in here is none of its business.
    unlimited = {"recompile_limit": 2**31, "accumulated_recompile_limit": 2**31}
    with _disable_current_modes(), torch._dynamo.config.patch(unlimited):
        return _compiled(score_mod)(query, key, value, *buffers).contiguous()


@_flex_attention.register_fake
def _(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, buffers: list[torch.Tensor], score_mod: str
) -> torch.Tensor:
    return query.new_empty((*query.shape[:-1], value.shape[-1]))


@functools.cache
def _compiled(source: str) -> Callable[..., torch.Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    everything = _no_block_mask()
    names: dict[str, Any] = {"torch": torch, "inf": math.inf, "nan": math.nan, "device": torch.device}
    exec(source, names)
    forward = names["forward"]

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *buffers: torch.Tensor) -> torch.Tensor:
        def score_mod(score: Any, batch: Any, head: Any, row: Any, column: Any) -> Any:
            return forward(None, score, batch, head, row, column, *buffers)

        with torch.no_grad():
            return flex_attention(query, key, value, score_mod, everything, scale=1.0, enable_gqa=True)

    compiled: Callable[..., torch.Tensor] = torch.compile(attend, fullgraph=True, dynamic=True)
    return compiled


def _is_symbolic(factor: Any) -> bool:
    return not isinstance(factor, (int, float, Operand)) and not (isinstance(factor, fx.Node) and is_tensor(factor))


def _narrow(site: AttentionSite) -> bool:
    sizes = [math.prod(int(axis.size) for axis in axes) for axes in (site.feature_axes, site.value_axes)]
    return any(size < _SMALLEST_HEAD for size in sizes)


def _cpu_supported() -> bool:
    """Inductor's own condition for its C++ template."""
    try:
        from torch._inductor.kernel.flex.flex_cpu import check_cpu_supported
    except ImportError:
        return False
    return bool(check_cpu_supported())  # type: ignore[no-untyped-call]


@functools.cache
def _no_block_mask() -> Any:
    """One block that holds everything."""
    from torch.nn.attention.flex_attention import _create_empty_block_mask

    probe = torch.empty(1, 1, 1, 1)
    return _create_empty_block_mask(probe, probe)


def _empty_block_mask(builder: Builder, site: AttentionSite) -> tuple[Any, ...]:
    """What ``flex_attention`` passes on where no block mask is given: one block that holds everything.

    Its fields differ from one version of PyTorch to the next, so that PyTorch's own function makes it.
    """
    *fields, _ = _no_block_mask().as_tuple()
    everything = fx.Graph()
    for name in ("batch", "head", "query", "key"):
        everything.placeholder(name)
    always: Any = {"dtype": torch.bool, "device": site.device}
    everything.output(everything.call_function(aten.full.default, ([], True), always))
    mask_mod = builder.submodule("mask_mod", fx.GraphModule(torch.nn.Module(), everything))
    return (*(_stored(builder, field, site.device) for field in fields), mask_mod)


def _stored(builder: Builder, field: Any, device: torch.device) -> Any:
    if not isinstance(field, torch.Tensor):
        return field
    number = int(field.flatten()[0])
    kind = {"dtype": field.dtype, "device": device}
    return builder.call(aten.full.default, [*field.shape], number, **kind)


# The function of the scores.


def _score_mod(builder: Builder, site: AttentionSite, dims: tuple[Dim, ...]) -> tuple[fx.GraphModule, list[fx.Node]]:
    """``score_mod(score, batch, head, query, key, *buffers)``, and the buffers: the source's steps, one by one."""
    graph = fx.Graph()
    score = graph.placeholder("score")
    positions = [graph.placeholder(name) for name in ("batch", "head", "query", "key")]
    buffers: list[fx.Node] = []

    def read(operand: Operand) -> fx.Node:
        """The operand's entry for this score."""
        node = lay_out(builder, operand.node, operand.layout, dims)
        if site.sink is not None and not same(tensor(node).shape[-1], 1):
            if tensor(node).dtype is torch.bool:
                node = builder.call(aten.to.dtype, node, torch.float32)
            node = padded(builder, node, -1, 0.0)
        own = [place for place, size in enumerate(tensor(node).shape) if not same(size, 1)]
        node = builder.call(aten.reshape.default, node, [tensor(node).shape[place] for place in own])
        buffers.append(node)
        buffer = graph.placeholder(f"buffer{len(buffers)}")
        return graph.call_function(aten.index.Tensor, (buffer, [positions[place] for place in own])) if own else buffer

    # Placeholders come first in a graph: the buffers are read before anything is computed.
    entries: list[Any] = []
    for mod in site.mods:
        if isinstance(mod, Scale):
            entries.append(_scale_operand(builder, mod.factor, read))
        elif isinstance(mod, Bias):
            entries.append((read(mod.operand), [_scale_operand(builder, scale.factor, read) for scale in mod.scales]))
        else:
            entries.append(read(mod.condition) if isinstance(mod, Fill) else None)
    if site.sink is not None:
        entries.append(read(site.sink) if isinstance(site.sink, Operand) else site.sink)
    for mod, entry in zip(site.mods, entries, strict=False):
        score = _applied(graph, score, mod, entry)
    if site.sink is not None:
        keys = math.prod(int(axis.size) for axis in site.key_axes)
        last = graph.call_function(aten.eq.Scalar, (positions[3], keys))
        sink = entries[-1]
        if isinstance(sink, fx.Node):
            score = graph.call_function(aten.where.self, (last, sink, score))
        else:
            score = graph.call_function(aten.where.ScalarSelf, (last, sink, score))
    infinite = graph.call_function(aten.eq.Scalar, (score, -math.inf))
    bounded = graph.call_function(aten.clamp.default, (score, ABSORBING))
    graph.output(graph.call_function(aten.where.self, (infinite, score, bounded)))
    _placeholders_first(graph)
    return fx.GraphModule(torch.nn.Module(), graph), buffers


def _scale_operand(builder: Builder, factor: Any, read: Any) -> Any:
    if isinstance(factor, Operand):
        return read(factor)
    if isinstance(factor, fx.Node) and isinstance(factor.meta.get("val"), torch.Tensor):
        return read(Operand(factor, ()))
    return factor


def _applied(graph: fx.Graph, score: fx.Node, mod: Any, entry: Any) -> fx.Node:
    call = graph.call_function
    if isinstance(mod, Scale):
        return call(aten.div.Tensor if mod.divide else aten.mul.Tensor, (score, entry))
    if isinstance(mod, Bias):
        bias, scales = entry
        for scale, amount in zip(mod.scales, scales, strict=True):
            bias = call(aten.div.Tensor if scale.divide else aten.mul.Tensor, (bias, amount))
        if mod.factor != 1:
            bias = call(aten.mul.Tensor, (bias, mod.factor))
        return call(aten.add.Tensor, (score, bias))
    if isinstance(mod, Fill):
        condition = call(aten.ne.Scalar, (entry, 0))
        if mod.invert:
            return call(aten.where.ScalarOther, (condition, score, mod.value))
        return call(aten.where.ScalarSelf, (condition, mod.value, score))
    if isinstance(mod, Floor):
        return call(aten.clamp.default, (score, mod.value))
    if isinstance(mod, (Narrow, Shift)):
        return score
    assert isinstance(mod, Elementwise)
    arguments: Any = mod.node.args
    if mod.node.target in (aten.maximum.default, aten.max.other):
        low = next(value for value in map(constant_value, arguments) if value is not None)
        return call(aten.clamp.default, (score, low))
    target: Any = mod.node.target
    return call(target, (score, *arguments[1:]), mod.node.kwargs)


def _placeholders_first(graph: fx.Graph) -> None:
    first = next(node for node in graph.nodes if node.op != "placeholder")
    for node in [node for node in graph.nodes if node.op == "placeholder"]:
        first.prepend(node)
