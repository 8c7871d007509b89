"""``flex``, ``flex_flash``: PyTorch's FlexAttention, which applies any function to each score.

It takes what no mask and no scale can express: tanh soft-capping, clamped scores, factors over query and key positions.
The operator is inserted as it stands in a traced graph. Boolean masks, and bands around the diagonal, become its block
mask, so that blocks without a key are skipped. For anything else the source's own arithmetic becomes its ``score_mod``.

Source: https://github.com/pytorch/pytorch/blob/v2.13.0/torch/_higher_order_ops/flex_attention.py
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from attnrewrite.analysis.values import ABSORBING, constant_value
from attnrewrite.ir.axes import Dim, Operand
from attnrewrite.ir.builder import Builder
from attnrewrite.ir.model_state import may_have_gradient
from attnrewrite.ir.nodes import is_tensor, same, tensor
from attnrewrite.ir.site import Bias, CanonicalAttention, Elementwise, Fill, Floor, Lift, Narrow, Raise, Scale, Shift
from attnrewrite.kernels.common.base import Kernel
from attnrewrite.kernels.common.keep_mask import KeepMask
from attnrewrite.kernels.common.layout import KernelLayout, lay_out, padded, padded_to
from attnrewrite.kernels.common.library_kernel import RUN_ON
from attnrewrite.kernels.common.limits import Asked, Capability, Limits, capability_of
from attnrewrite.kernels.common.mask import Mask
from attnrewrite.kernels.common.memory import realized, stored
from attnrewrite.kernels.common.verdict import Availability, Verdict
from attnrewrite.kernels.flash import FLASH_4_PACKAGE
from attnrewrite.kernels.flex_blocks import (
    Blocks,
    blocks_of_band,
    blocks_of_isolated,
    blocks_of_mask,
    entry_at,
    placeholders_first,
    whole_block,
)
from attnrewrite.kernels.torch_limits import FLEX, FLEX_BLOCKS, FLEX_DECODING_BELOW, FLEX_FLASH, FLEX_SMALLEST_HEAD
from attnrewrite.kernels.torch_sdpa import TESTED_ON
from attnrewrite.torch_private import block_mask_of_everything, cpu_flex_supported, disable_current_modes, dynamo_config

__all__ = ["Flex", "FlexFlash"]

aten = torch.ops.aten


class Flex(Kernel):
    """FlexAttention.

    Rows whose keys are all masked give the mean of the values, since scores are kept above the range that fused kernels
    lose. If the source gives NaN, it is restored as for PyTorch's own kernels.
    """

    name = "flex"
    automatic = True
    needs = "PyTorch and Inductor"
    kernel_options: ClassVar[dict[str, Any]] = {}
    limits: Limits = FLEX
    run_on = TESTED_ON

    def availability(self) -> Availability:
        if torch.cuda.is_available():
            return Availability(True, f"part of torch {torch.__version__}")
        if not cpu_flex_supported():
            return Availability(False, "Inductor's FlexAttention needs AVX2 or better on this CPU")
        return Availability(True, f"part of torch {torch.__version__}; without a backward pass on the CPU")

    def supports(self, site: CanonicalAttention) -> Verdict:
        if any(same(axis.size, 0) for axis in site.key_axes):
            return Verdict.no("there is no key to attend to")
        if site.compute_dtype not in FLEX.dtypes:
            return Verdict.no(f"takes float32, bfloat16 and float16, not {site.compute_dtype}".replace("torch.", ""))
        if site.device.type == "cpu":
            if site.differentiable:
                return Verdict.no("FlexAttention has no backward pass on the CPU (run it under torch.no_grad())")
            if not cpu_flex_supported():
                return Verdict.no("Inductor's FlexAttention needs AVX2 or better on this CPU")
        elif site.device.type != "cuda":
            return Verdict.no(f"was never tested on {site.device.type}")
        else:
            widths = [axis.size for axis in (*site.feature_axes, *site.value_axes)]
            if any(not isinstance(width, int) for width in widths):
                return Verdict.no("takes head sizes that are numbers, and no symbols")
            if site.differentiable and any(map(may_have_gradient, _read_as_numbers(site))):
                return Verdict.no("a single learned number is read by the score_mod, which gives it no gradient")
            if (
                site.differentiable
                and not site.for_inductor
                and any(may_have_gradient(read.node) for read in _read_by_position(site))
            ):
                # ``_maybe_new_buffer`` of sdpa_dense_backward asks the tensor, and what is computed requires none:
                # https://github.com/pytorch/pytorch/blob/v2.13.0/torch/_higher_order_ops/flex_attention.py
                return Verdict.no(
                    "without Inductor FlexAttention's backward pass loses the gradients of a bias or factor (use "
                    "options={'inner_backend': 'inductor'})"
                )
        if site.dropout:
            return Verdict.no("FlexAttention has no dropout")
        if site.device.type == "cuda" and not all(map(_indexed_in_32_bits, _read_by_position(site))):
            return Verdict.no("a mask or a bias has 2**31 entries or more, and the kernel indexes them by 32 bits")
        return Verdict.yes() if _by_blocks(site) is not None else self._supports_steps(site)

    def skips_masked(self, site: CanonicalAttention) -> bool:
        return _by_blocks(site) is not None

    def _supports_steps(self, site: CanonicalAttention) -> Verdict:
        """Whether the source's steps can be its function of the scores."""
        scores = site.scores
        if site.is_causal or (site.fused and scores.masked_rows.may_occur):
            return Verdict.no(
                "a scaled_dot_product_attention call with a mask or is_causal has rules of its own, which no score_mod "
                "follows"
            )
        if site.rounds_rows and scores.masked_rows.may_occur:
            return Verdict.no("what the source gives a row without a key depends on rounding here")
        if any(isinstance(mod, Fill) and math.isfinite(mod.value) and abs(mod.value) > _LARGEST for mod in site.mods):
            return Verdict.no("a number is filled in that float32 does not hold")
        if any(isinstance(term, Raise) for term in scores.terms):
            return Verdict.no("the maximum of the row is subtracted between masks, and a score_mod sees one score")
        if any(isinstance(mod, Scale) and _is_symbolic(mod.factor) for mod in site.mods):
            return Verdict.no("a factor of the scores is a symbolic number, which a score_mod does not take")
        if site.sink is not None and not all(isinstance(axis.size, int) for axis in site.key_axes):
            return Verdict.no("a sink beside a function of the scores needs a number of keys that is not symbolic")
        if site.differentiable and scores.masked_rows.may_occur and not _by_lifted_mask(site):
            return Verdict.no(
                "a row may have no key, and the gradient of such a row is not known here (if none occurs, say so: "
                "options={'assume_attended_rows': True})"
            )
        return Verdict.yes()

    def emit(self, site: CanonicalAttention, builder: Builder) -> fx.Node:
        asked = _by_blocks(site)
        if asked is not None:
            return self._emit_blocks(site, builder, asked)
        if site.differentiable and site.scores.masked_rows.may_occur:
            return self._emit_lifted_mask(site, builder)
        return self._emit_steps(site, builder)

    def _emit_blocks(self, site: CanonicalAttention, builder: Builder, asked: Asked) -> fx.Node:
        """The mask as a block mask, the scale as a number."""
        scores = site.scores
        assert scores.scale is not None
        layout = KernelLayout.of(site)
        query, key, value = layout.operands(builder, site, finish=_contiguous)
        mask = None
        isolated = scores.isolated
        if isolated is not None and isinstance(isolated[0], int) and isinstance(isolated[1], int):
            blocks = blocks_of_isolated(builder, site, isolated[0], isolated[1])
        elif asked.mask != "none":
            mask = KeepMask(builder, site, layout.score_dims)
            assert mask.node is not None
            query = mask.query_of_kernel(query)
            blocks = blocks_of_mask(builder, site, mask.node)
        elif asked.is_bounded:
            blocks = blocks_of_band(builder, site, asked)
        else:
            blocks = whole_block(builder, site.device)
        call = _FlexCall((query, key, value), _softcap(scores.softcap), blocks, scores.scale)
        output = self._in_graph(builder, site, call)
        if mask is not None and asked.restores_rows:
            output = mask.with_source_rows(output, value, layout)
        return layout.as_result(builder, site, output)

    def _emit_lifted_mask(self, site: CanonicalAttention, builder: Builder) -> fx.Node:
        """The mask as one tensor that is added, whose rows without a key the backward pass does not lose."""
        scores = site.scores
        assert scores.scale is not None
        layout = KernelLayout.of(site)
        query, key, value = layout.operands(builder, site, finish=_contiguous)
        mask = Mask(builder, site, layout.score_dims, in_float32=True)
        score_mod, buffers = _added_mask(builder, mask, scores.softcap)
        call = _FlexCall((query, key, value), score_mod, whole_block(builder, site.device), scores.scale, buffers)
        output = self._in_graph(builder, site, call)
        output = mask.with_nan_gradients(output, query, key)
        return layout.as_result(builder, site, mask.with_source_rows(output, value, layout))

    def _emit_steps(self, site: CanonicalAttention, builder: Builder) -> fx.Node:
        """The source's steps, one by one, as the function of the scores."""
        scores = site.scores
        layout = KernelLayout.of(site)
        query, key, value = layout.operands(builder, site, score_factors=False, finish=_contiguous)
        if site.sink is not None:
            # One more key, whose score is the sink's and whose value adds nothing.
            key, value = padded(builder, key, -2, 0.0), padded(builder, value, -2, 0.0)
        score_mod, buffers = _score_mod(builder, site, layout.score_dims)
        if site.device.type == "cpu" and site.for_inductor:
            # Inductor's C++ template fails where it meets operands that the graph computes.
            _no_block_mask()  # Not to be made within the call: that may come from where vmap does not work.
            operator_ = torch.ops.attnrewrite.flex_attention.default
            output = _output_like(query, value)
            node = builder.insert(operator_, (query, key, value, buffers, score_mod.code), {}, output)
        else:
            blocks = whole_block(builder, site.device)
            call = _FlexCall((query, key, value), score_mod, blocks, 1.0, tuple(buffers))
            node = self._in_graph(builder, site, call)
        if not scores.masked_rows.is_mean_of_value:
            # In float32, since float16 holds no finite number that masks.
            mask = Mask(builder, site, layout.score_dims, in_float32=True)
            node = mask.with_source_rows(node, value, layout)
        return layout.as_result(builder, site, node)

    def _in_graph(self, builder: Builder, site: CanonicalAttention, call: _FlexCall) -> fx.Node:
        """The higher-order operator, as it stands in a graph that was traced with ``flex_attention`` in it."""
        options: dict[str, Any] = {
            "PRESCALE_QK": False,
            "ROWS_GUARANTEED_SAFE": False,
            "BLOCKS_ARE_CONTIGUOUS": False,
            "WRITE_DQ": True,
            "OUTPUT_LOGSUMEXP": site.differentiable and site.device.type != "cpu",
            "OUTPUT_MAX": False,
            **_blocks_that_fit(site),
            **_stages_that_fit(site, call),
            **self.kernel_options,
        }
        query, key, value = call.operands
        features = tensor(value).shape[-1]
        if site.device.type == "cuda":
            query, key, value = (_wide_enough(builder, operand) for operand in call.operands)
        masks, buffers = call.blocks.buffers, call.buffers
        if site.device.type != "cpu" and "BACKEND" not in self.kernel_options and _may_be_short(query):
            if site.for_inductor and not site.differentiable:
                query = realized(builder, query, own=True)
            else:
                options["FORCE_USE_FLEX_ATTENTION"] = True
        if site.device.type != "cpu" and site.for_inductor:
            masks = tuple(realized(builder, buffer, own=site.differentiable) for buffer in masks)
            buffers = tuple(realized(builder, buffer, own=site.differentiable) for buffer in buffers)
        output = _output_like(query, value)
        rows = output.new_empty(output.shape[:-1], dtype=torch.float32)
        module = builder.submodule("score_mod", call.score_mod)
        blocks = call.blocks.as_argument(builder)
        result = builder.insert(
            torch.ops.higher_order.flex_attention,
            (query, key, value, module, blocks, call.scale, options, buffers, masks),
            {},
            (output, rows, rows),
        )
        attended = builder.insert(operator.getitem, (result, 0), {}, output)
        if same(tensor(value).shape[-1], features):
            return attended
        return builder.call(aten.slice.Tensor, attended, -1, 0, features)


class FlexFlash(Flex):
    """FlexAttention with FlashAttention 4 as its back end, which is made for PyTorch's functions of the scores.

    Source: https://github.com/pytorch/pytorch/blob/v2.13.0/torch/_inductor/kernel/flex/flex_flash_attention.py
    """

    name = "flex_flash"
    automatic = False
    limits = FLEX_FLASH
    run_on = RUN_ON
    needs = "pip install flash-attn-4, and an NVIDIA GPU of compute capability 9.0 or later"
    vendor = FLASH_4_PACKAGE
    kernel_options: ClassVar[dict[str, Any]] = {"BACKEND": "FLASH"}

    def availability(self) -> Availability:
        return self.vendor.availability()

    def supports(self, site: CanonicalAttention) -> Verdict:
        elsewhere = self.limits.device_refusal(site)
        if elsewhere:
            return Verdict.no(elsewhere)
        available = self.availability()
        if not available.available:
            return Verdict.no(f"not available: {available.detail}")
        if not site.for_inductor:
            return Verdict.no("needs Inductor (use options={'inner_backend': 'inductor'})")
        return self.verdict(site, capability_of(site.device))

    def verdict(self, site: CanonicalAttention, capability: Capability | None) -> Verdict:
        """What it would say of the site on a GPU of this compute capability, were the package installed."""
        refusal = self.limits.refusal(site, capability)
        if refusal:
            return Verdict.no(refusal)
        return super().supports(site)


@dataclass(frozen=True)
class _FlexCall:
    """What the operator is called with.

    Attributes:
        operands: query, key and value, (batch, heads, length, features); key and value may have fewer heads.
        score_mod: ``score_mod(score, batch, head, query, key, *buffers)``.
        blocks: the block mask.
        scale: of the products, before ``score_mod``.
        buffers: what ``score_mod`` reads.
    """

    operands: tuple[fx.Node, fx.Node, fx.Node]
    score_mod: fx.GraphModule
    blocks: Blocks
    scale: float
    buffers: tuple[fx.Node, ...] = ()


def _contiguous(builder: Builder, node: fx.Node) -> fx.Node:
    static = all(isinstance(size, int) for size in (*tensor(node).shape, *tensor(node).stride()))
    if static and tensor(node).is_contiguous():
        return node
    return builder.call(aten.clone.default, node, memory_format=torch.contiguous_format)


def _by_blocks(site: CanonicalAttention) -> Asked | None:
    """What a block mask is asked for in place of the site's terms; None where the source's steps must be repeated."""
    scores = site.scores
    if site.device.type == "cpu" and site.for_inductor:
        return None  # That goes another way, see `emit`.
    if site.sink is not None or scores.scale is None or (scores.inexpressible and scores.softcap is None):
        return None
    asked = FLEX_BLOCKS.asked(site)
    if not isinstance(asked, Asked) or (scores.masked_rows.may_occur and not asked.restores_rows):
        return None
    return asked


def _by_lifted_mask(site: CanonicalAttention) -> bool:
    """Whether the site is a mask that is added to scores, or to capped scores, and can be lifted."""
    scores = site.scores
    expressible = not scores.inexpressible or scores.softcap is not None
    if not expressible or scores.lift <= Lift.OPENED or scores.scale is None:
        return False
    # The terms are added up to one tensor, which may be larger than each of them.
    axes = {axis for term in scores.terms if isinstance(term, Bias) for axis in term.operand.resolved().axes}
    return bool(math.prod(axis.size for axis in (axes | set(site.key_axes))) < 2**31)


def _read_by_position(site: CanonicalAttention) -> list[Operand]:
    """What the functions of the scores may read."""
    operands: list[Operand] = [site.sink] if isinstance(site.sink, Operand) else []
    for mod in site.mods:
        if isinstance(mod, Fill):
            operands.append(mod.condition)
        elif isinstance(mod, Bias):
            operands += [mod.operand, *(scale.factor for scale in mod.scales if isinstance(scale.factor, Operand))]
        elif isinstance(mod, Scale) and isinstance(mod.factor, Operand):
            operands.append(mod.factor)
    return operands


def _read_as_numbers(site: CanonicalAttention) -> list[fx.Node]:
    """Tensors of one entry that the function of the scores reads, where it is the source's steps."""
    if _by_blocks(site) is not None or _by_lifted_mask(site):
        return []
    factors: list[Any] = [mod.factor for mod in site.mods if isinstance(mod, Scale)]
    factors += [scale.factor for mod in site.mods if isinstance(mod, Bias) for scale in mod.scales]
    nodes = [*factors, *(operand.node for operand in _read_by_position(site))]
    return [
        node
        for node in nodes
        if isinstance(node, fx.Node)
        and is_tensor(node)
        and tensor(node).dtype.is_floating_point
        and all(same(size, 1) for size in tensor(node).shape)
    ]


def _indexed_in_32_bits(operand: Operand) -> bool:
    """Where sizes are symbols this is a guard: the kernel reads and writes beyond its memory otherwise (torch 2.11)."""
    return bool(math.prod(axis.size for axis in operand.resolved().axes) < 2**31)


def _blocks_that_fit(site: CanonicalAttention) -> dict[str, Any]:
    """Smaller blocks of keys for head sizes that Inductor has no measured blocks for, and that fill the shared memory.

    Its general ones did not fit at 160 features with a bias (torch 2.11, H100). ``get_flex_attn_fwd_configs`` of
    https://github.com/pytorch/pytorch/blob/v2.13.0/torch/_inductor/template_heuristics/triton.py
    """
    width = max(math.prod(int(axis.size) for axis in axes) for axes in (site.feature_axes, site.value_axes))
    padded_bytes = 2 ** math.ceil(math.log2(width)) * site.compute_dtype.itemsize
    if site.device.type != "cuda" or width in (64, 128, 256) or padded_bytes < 512:
        return {}
    return {"fwd_BLOCK_N": 32, "fwd_num_stages": 2}


def _stages_that_fit(site: CanonicalAttention, call: _FlexCall) -> dict[str, Any]:
    """Fewer blocks loaded ahead where blocks of a mask in float32 are loaded beside those of key and value.

    In Inductor's three stages they did not fit into the shared memory at 64 features (torch 2.11, H200).
    ``get_flex_attn_fwd_configs``, there.
    """
    reads = [node for node in call.score_mod.graph.nodes if node.target is operator.getitem]
    by_pair = {node.args[0].name for node in reads if {"query", "key"} <= {place.name for place in node.args[1]}}
    wide = any(
        tensor(node).dtype.itemsize > site.compute_dtype.itemsize and f"buffer{place}" in by_pair
        for place, node in enumerate(call.buffers, 1)
    )
    return {"fwd_num_stages": 2, "bwd_num_stages": 2} if wide and site.device.type == "cuda" else {}


def _softcap(height: float | None) -> fx.GraphModule:
    """``score_mod`` of a soft cap, or of nothing."""
    graph = fx.Graph()
    score = graph.placeholder("score")
    for name in _POSITIONS:
        graph.placeholder(name)
    graph.output(_capped(graph, score, height))
    return fx.GraphModule(torch.nn.Module(), graph)


_POSITIONS = ("batch", "head", "query", "key")


def _capped(graph: fx.Graph, score: fx.Node, height: float | None) -> fx.Node:
    if height is None:
        return score
    score = graph.call_function(aten.tanh.default, (graph.call_function(aten.div.Tensor, (score, height)),))
    return graph.call_function(aten.mul.Tensor, (score, height))


def _added_mask(builder: Builder, mask: Mask, softcap: float | None) -> tuple[fx.GraphModule, tuple[fx.Node, ...]]:
    """``score_mod`` of a soft cap and a lifted mask, and its buffers."""
    graph = fx.Graph()
    score = graph.placeholder("score")
    positions = [graph.placeholder(name) for name in _POSITIONS]
    buffers: list[fx.Node] = []

    def read(node: fx.Node) -> fx.Node:
        own = [place for place, size in enumerate(tensor(node).shape) if not same(size, 1)]
        node = builder.call(aten.reshape.default, node, [tensor(node).shape[place] for place in own])
        buffers.append(node)
        buffer = graph.placeholder(f"buffer{len(buffers)}")
        return entry_at(buffer, positions, own)

    assert mask.node is not None
    added = read(mask.node)
    score = _capped(graph, score, softcap)
    if mask.absorbed_rows is not None:
        # Nothing is left of a score there, but its gradient passes the addition.
        nothing = graph.call_function(aten.sub.Tensor, (score, graph.call_function(aten.detach.default, (score,))))
        score = graph.call_function(aten.where.self, (read(mask.absorbed_rows), nothing, score))
    graph.output(graph.call_function(aten.add.Tensor, (score, added)))
    placeholders_first(graph)
    return fx.GraphModule(torch.nn.Module(), graph), tuple(buffers)


def _output_like(query: fx.Node, value: fx.Node) -> torch.Tensor:
    return tensor(query).new_empty((*tensor(query).shape[:-1], tensor(value).shape[-1]))


_LARGEST = torch.finfo(torch.float32).max

_CPU_WIDTH, _CPU_KEYS = 24, 16
"""With fewer features, Inductor's product of queries and keys reads and writes 16 keys where fewer are left.

See ``kernels.known_wrong``."""


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
    dtype = query.dtype
    if dtype.itemsize < 4:
        # Inductor's kernel is wrong there, see ``known_wrong``.
        query, key, value = query.float(), key.float(), value.float()
    missing = _CPU_WIDTH - query.shape[-1]
    if missing > 0 and key.shape[-2] % _CPU_KEYS:
        query, key = (torch.nn.functional.pad(part, (0, missing)) for part in (query, key))
    # A dispatch mode may watch the operators of the code around this call; it must not see what is compiled here.
    unlimited = {"recompile_limit": 2**31, "accumulated_recompile_limit": 2**31}
    with disable_current_modes(), dynamo_config.patch(unlimited):
        return _compiled(score_mod)(query, key, value, *buffers).to(dtype).contiguous()


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


def _may_be_short(query: fx.Node) -> bool:
    """Whether Inductor may take its kernel for short queries, which reads a query in another memory order than it has.

    It asks for the query's strides before the query's layout is decided on (``realize_input`` and ``get_stride`` in
    ``create_flex_decoding_kernel``), and ``as_strided`` then decides on the order of what the query is computed from,
    such as that of a projection whose heads are split off.
    https://github.com/pytorch/pytorch/blob/v2.13.0/torch/_inductor/kernel/flex/flex_decoding.py
    """
    length = tensor(query).shape[-2]
    return not isinstance(length, int) or length < FLEX_DECODING_BELOW


def _wide_enough(builder: Builder, operand: fx.Node) -> fx.Node:
    """The operand with features of zeros up to the fewest that the kernel takes: products and results stay the same."""
    narrow = tensor(operand).shape[-1] < FLEX_SMALLEST_HEAD
    return padded_to(builder, operand, -1, FLEX_SMALLEST_HEAD) if narrow else operand


@functools.cache
def _no_block_mask() -> Any:
    """One block that holds everything."""
    probe = torch.empty(1, 1, 1, 1)
    return block_mask_of_everything(probe, probe)


# The function of the scores.


def _score_mod(
    builder: Builder, site: CanonicalAttention, dims: tuple[Dim, ...]
) -> tuple[fx.GraphModule, list[fx.Node]]:
    """``score_mod(score, batch, head, query, key, *buffers)``, and the buffers: the source's steps, one by one."""
    graph = fx.Graph()
    score = graph.placeholder("score")
    positions = [graph.placeholder(name) for name in ("batch", "head", "query", "key")]
    buffers: list[fx.Node] = []

    def read(operand: Operand) -> fx.Node:
        """The operand's entry for this score."""
        node = _in_float32(builder, lay_out(builder, operand.node, operand.layout, dims))
        if site.sink is not None and not same(tensor(node).shape[-1], 1):
            if tensor(node).dtype is torch.bool:
                node = builder.call(aten.to.dtype, node, torch.float32)
            node = padded(builder, node, -1, 0.0)
        own = [place for place, size in enumerate(tensor(node).shape) if not same(size, 1)]
        node = builder.call(aten.reshape.default, node, [tensor(node).shape[place] for place in own])
        if own and own[-1] == 3 and not any(same(tensor(node).stride()[-1], stride) for stride in (0, 1)):
            # Keys side by side: each score reads its entry. Layers that add the same permuted bias (T5's) share it.
            (node,) = stored(builder, [node])
        buffers.append(node)
        buffer = graph.placeholder(f"buffer{len(buffers)}")
        return entry_at(buffer, positions, own)

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
    if site.in_half:
        # Scores are float32 in the kernel. Who traces the function takes them for the query's dtype, which does not
        # hold every number (``trace_flex_attention`` in
        # https://github.com/pytorch/pytorch/blob/v2.13.0/torch/_higher_order_ops/flex_attention.py).
        score = graph.call_function(aten.to.dtype, (score, torch.float32))
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
    scores = site.scores
    if scores.masked_rows.may_occur or scores.inexpressible:
        # The kernel multiplies by log2(e). What float32 would not hold then comes nearer, each number below the next.
        nearer = graph.call_function(aten.mul.Tensor, (score, 0.5))
        nearer = graph.call_function(aten.add.Tensor, (nearer, ABSORBING / 2))
        low = graph.call_function(aten.lt.Scalar, (score, ABSORBING))
        score = graph.call_function(aten.where.self, (low, nearer, score))
    graph.output(score)
    placeholders_first(graph)
    return fx.GraphModule(torch.nn.Module(), graph), buffers


def _in_float32(builder: Builder, node: fx.Node) -> fx.Node:
    """A score would be float64 beside a number of float64, of which Inductor's C++ template makes wrong numbers."""
    return builder.call(aten.to.dtype, node, torch.float32) if tensor(node).dtype is torch.float64 else node


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
    if mod.node.target is aten.maximum.default:
        low = next(value for value in map(constant_value, arguments) if value is not None)
        return call(aten.clamp.default, (score, low))
    target: Any = mod.node.target
    return call(target, (score, *arguments[1:]), mod.node.kwargs)
