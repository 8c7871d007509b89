r"""Calls of libraries' own attention operators, and of PyTorch's back ends by name, that are in the graph already.

    result = softmax(scale * query @ key^T + bias) @ value

Operators are looked up by name and read by schema, so no package is imported. Each has its own order of dimensions
and its own alignment of causal masks. A call with an argument that is not read here stays as it is. Libraries differ in
what they give rows without a key, so every row must be proved to keep one.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from attnrewrite.ir.axes import Layout
from attnrewrite.ir.finding import Finding, NearMiss
from attnrewrite.ir.graph_view import GraphView, reader_in_words
from attnrewrite.ir.nodes import Size, is_tensor, same, tensor
from attnrewrite.ir.site import AttentionSite, Fill, NotAttention, ScoreMod
from attnrewrite.patterns.base import Specimen
from attnrewrite.patterns.sample_inputs import Specimens, normal
from attnrewrite.patterns.site_builder import (
    CallAxes,
    Dims,
    Sizes,
    added_mask,
    call_arguments,
    call_axes,
    mask_operand,
    site_of_call,
)
from attnrewrite.torch_private import schema_of

__all__ = ["PATTERN"]

aten = torch.ops.aten


@dataclass(frozen=True)
class _CallMeaning:
    """What a call computes.

    Attributes:
        query, key, value: nodes.
        order: the dimensions of each: B(atch), S (position), H(ead), D (feature); "(HD)" is one dimension of both.
        scale: None for one over the root of the head size.
        heads: the number of heads; None if a dimension says it.
        bias: added to the scores; None for none.
        masked: a boolean tensor, true where a key is masked.
        causal: keys up to the query's own position. ``from_last``: counted from the last query and the last key.
        dropout: the probability of dropping a weight.
    """

    query: fx.Node
    key: fx.Node
    value: fx.Node
    order: tuple[str, ...]
    scale: float | None
    heads: int | None = None
    bias: fx.Node | None = None
    masked: fx.Node | None = None
    causal: bool = False
    from_last: bool = False
    dropout: float = 0.0


_BSHD = ("B", "S", "H", "D")
_BHSD = ("B", "H", "S", "D")
_Arguments = Mapping[str, Any]


def _require(arguments: _Arguments, **wanted: tuple[Any, ...]) -> None:
    """Raises:
    NotAttention: an argument is none of the values under which the call is read.
    """
    for name, values in wanted.items():
        given = arguments.get(name)
        if isinstance(given, fx.Node) or not any(given is value or given == value for value in values):
            raise NotAttention(f"the argument {name} of the call has a value that is not supported")


def _flash(arguments: _Arguments, query: str, key: str, value: str, **more: Any) -> _CallMeaning:
    """FlashAttention's own interface counts a causal mask from the last key."""
    return _CallMeaning(
        arguments[query], arguments[key], arguments[value], _BSHD, causal=more.pop("causal"), from_last=True, **more
    )


def _flash_attn(arguments: _Arguments) -> _CallMeaning:
    """https://github.com/Dao-AILab/flash-attention/blob/v2.8.3/flash_attn/flash_attn_interface.py"""
    _require(arguments, window_size_left=(-1,), window_size_right=(-1, 0), softcap=(0.0,), alibi_slopes=(None,))
    causal = bool(arguments["causal"])
    if arguments["window_size_right"] == 0 and not causal:
        raise NotAttention("the argument window_size_right of the call has a value that is not supported")
    _require(arguments, return_softmax=(False,))
    return _flash(
        arguments,
        "q",
        "k",
        "v",
        causal=causal,
        scale=arguments["softmax_scale"],
        dropout=arguments["dropout_p"],
    )


def _xformers_flash(arguments: _Arguments) -> _CallMeaning:
    """https://github.com/facebookresearch/xformers/blob/v0.0.35/xformers/ops/fmha/flash.py"""
    _require(arguments, cu_seqlens_q=(None,), cu_seqlens_k=(None,), seqused_k=(None,), block_tables=(None,))
    causal = bool(arguments["is_causal"])
    _require(arguments, window_left=(-1,), window_right=(-1, 0) if causal else (-1,), return_softmax=(False,))
    return _flash(
        arguments,
        "query",
        "key",
        "value",
        causal=causal,
        scale=arguments["softmax_scale"],
        dropout=arguments["p"],
    )


def _torch_flash(arguments: _Arguments) -> _CallMeaning:
    """https://github.com/pytorch/pytorch/blob/v2.13.0/aten/src/ATen/native/native_functions.yaml"""
    nothing = ("cum_seq_q", "cum_seq_k", "seqused_k", "alibi_slopes", "block_table")
    _require(arguments, **dict.fromkeys(nothing, (None,)), return_debug_mask=(False,))
    causal = bool(arguments["is_causal"])
    _require(arguments, window_size_left=(None, -1), window_size_right=(None, -1, 0) if causal else (None, -1))
    return _flash(
        arguments,
        "query",
        "key",
        "value",
        causal=causal,
        scale=arguments["scale"],
        dropout=arguments["dropout_p"],
    )


_NO_MASK, _FROM_FIRST, _FROM_LAST = 0, 1, 2
"""``custom_mask_type`` of the efficient kernel."""


def _torch_efficient(arguments: _Arguments) -> _CallMeaning:
    """https://github.com/pytorch/pytorch/blob/v2.13.0/aten/src/ATen/native/transformers/cuda/attention.cu"""
    nothing = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k", "seqlen_k", "window_size")
    _require(arguments, **dict.fromkeys(nothing, (None,)))
    _require(arguments, custom_mask_type=(_NO_MASK, _FROM_FIRST, _FROM_LAST))
    kind = arguments["custom_mask_type"]
    return _CallMeaning(
        arguments["query"],
        arguments["key"],
        arguments["value"],
        _BSHD,
        arguments["scale"],
        bias=arguments["bias"],
        causal=kind != _NO_MASK,
        from_last=kind == _FROM_LAST,
        dropout=arguments["dropout_p"],
    )


def _torch_sdpa(arguments: _Arguments) -> _CallMeaning:
    """What ``scaled_dot_product_attention`` selects from, called by name."""
    _require(arguments, return_debug_mask=(None, False), dropout_mask=(None,))
    return _CallMeaning(
        arguments["query"],
        arguments["key"],
        arguments["value"],
        _BHSD,
        arguments["scale"],
        bias=arguments.get("attn_bias", arguments.get("attn_mask")),
        causal=bool(arguments["is_causal"]),
        # Some count from the first key, others from the last: read where that is the same.
        from_last=True,
        dropout=arguments["dropout_p"],
    )


def _xformers(arguments: _Arguments) -> _CallMeaning:
    """https://github.com/facebookresearch/xformers/blob/v0.0.35/xformers/ops/fmha/__init__.py"""
    query = arguments["q"]
    orders = {3: ("B", "S", "D"), 4: _BSHD}
    if tensor(query).dim() not in orders:
        raise NotAttention("query, key and value have neither three nor four dimensions")
    order = orders[tensor(query).dim()]
    dropout = arguments["p"] or 0.0
    return _CallMeaning(
        query, arguments["k"], arguments["v"], order, arguments["scale"], bias=arguments["b"], dropout=dropout
    )


_NPU_ORDERS = {"BSND": _BSHD, "BNSD": _BHSD, "BSH": ("B", "S", "(HD)"), "SBH": ("S", "B", "(HD)")}
_NPU_WHOLE_MASK = (0, 1)
"""Values of ``sparse_mode`` under which the mask is given whole; from 0 bounds are counted, too."""


def _npu(arguments: _Arguments) -> _CallMeaning:
    """torch_npu's documentation of ``npu_fusion_attention``; its schema in torch-npu 2.13.0."""
    nothing = ("pse", "padding_mask", "prefix", "actual_seq_qlen", "actual_seq_kvlen", "sink", "dropout_mask")
    _require(arguments, **dict.fromkeys(nothing, (None,)), softmax_layout=(None, ""))
    _require(arguments, input_layout=tuple(_NPU_ORDERS), sparse_mode=_NPU_WHOLE_MASK)
    order = _NPU_ORDERS[arguments["input_layout"]]
    masked = arguments["atten_mask"]
    if masked is not None:
        if tensor(masked).dtype not in (torch.bool, torch.uint8):
            raise NotAttention("atten_mask is not boolean")
        longest = max(
            size if isinstance(size, int) else math.inf
            for part in (arguments["query"], arguments["key"])
            for size in [tensor(part).shape[order.index("S")]]
        )
        if arguments["sparse_mode"] == 0 and min(arguments["pre_tockens"], arguments["next_tockens"]) < longest:
            raise NotAttention("pre_tockens or next_tockens may be less than the number of positions")
    return _CallMeaning(
        arguments["query"],
        arguments["key"],
        arguments["value"],
        order,
        arguments["scale"],
        heads=arguments["head_num"],
        masked=masked,
        dropout=1.0 - arguments["keep_prob"],
    )


def _xla(arguments: _Arguments) -> _CallMeaning:
    """torch-xla 2.9.0, torch_xla/experimental/custom_kernel.py"""
    _require(arguments, q_segment_ids=(None,), kv_segment_ids=(None,), partition_spec=("None",))
    return _CallMeaning(
        arguments["q"],
        arguments["k"],
        arguments["v"],
        _BHSD,
        arguments["sm_scale"],
        bias=arguments["ab"],
        causal=bool(arguments["causal"]),
    )


_READERS: dict[str, Callable[[_Arguments], _CallMeaning]] = {
    "aten::_scaled_dot_product_flash_attention": _torch_sdpa,
    "aten::_scaled_dot_product_efficient_attention": _torch_sdpa,
    "aten::_scaled_dot_product_cudnn_attention": _torch_sdpa,
    "aten::_scaled_dot_product_fused_attention_overrideable": _torch_sdpa,
    "aten::_scaled_dot_product_flash_attention_for_cpu": _torch_sdpa,
    "aten::_scaled_dot_product_attention_math": _torch_sdpa,
    "aten::_flash_attention_forward": _torch_flash,
    "aten::_efficient_attention_forward": _torch_efficient,
    "flash_attn::_flash_attn_forward": _flash_attn,
    "xformers_flash::flash_fwd": _xformers_flash,
    "xformer::memory_efficient_attention_forward": _xformers,
    "npu::npu_fusion_attention": _npu,
    "xla::fa_custom_forward": _xla,
}


class LibraryCall:
    name = "library"
    precedence = 11

    @property
    def specimens(self) -> tuple[Specimen, ...]:
        return tuple(SPECIMENS)

    def find(self, view: GraphView) -> Iterator[Finding]:
        for node in view.graph.nodes:
            schema: Any = schema_of(node.target) if node.op == "call_function" else None
            reader = None if schema is None else _READERS.get(schema.name)
            if reader is None:
                continue
            try:
                if schema.overload_name:
                    raise NotAttention(f"the overload {schema.overload_name} is not supported")
                yield self._read(node, reader(call_arguments(node)), view)
            except NotAttention as reason:
                yield NearMiss(self.name, node, str(reason), (node,), reason.node)

    def _read(self, node: fx.Node, call: _CallMeaning, view: GraphView) -> AttentionSite:
        result = _result(node)
        if view.differentiable(node) and not schema_of(node.target).name.startswith("aten::"):
            raise NotAttention("the backward pass of the library is not known here (run it under torch.no_grad())")
        if not isinstance(call.dropout, (int, float)) or not isinstance(call.scale, (int, float, type(None))):
            raise NotAttention("the scale or the dropout is not a constant number")
        if call.causal and (call.bias is not None or call.masked is not None):
            raise NotAttention("the call has both a mask and a causal mask")
        query, key, value = _sizes(call)
        if call.causal and call.from_last and not same(query.length, key.length):
            raise NotAttention("a causal mask that is counted from the last key needs as many queries as keys here")
        axes = call_axes(query, key, value, query.heads, grouped="H" in call.order or "(HD)" in call.order)
        site = site_of_call(
            view,
            pattern=self.name,
            anchor=node,
            result=result,
            operands=(call.query, call.key, call.value),
            axes=axes,
            layout=lambda dims: _ordered(dims, call.order),
            scale=call.scale,
            masks=_masks(call, axes),
            is_causal=call.causal,
            dropout=float(call.dropout),
            dtype=tensor(result).dtype,
            interior=(node, result) if result is not node else (node,),
        )
        return replace(site, foreign=True)


def _result(node: fx.Node) -> fx.Node:
    """The attention among what a call returns; nothing else of it may be read."""
    if is_tensor(node):
        return node
    results = [user for user in node.users if user.target is operator.getitem and user.args[1] == 0]
    others = [reader for user in node.users if user not in results for reader in (user.users or [])]
    if others:
        names = ", ".join(sorted({reader_in_words(reader) for reader in others}))
        raise NotAttention(f"a further result of the call, such as logsumexp, is used ({names})")
    if len(results) != 1:
        raise NotAttention("the result of the call is not used, or used in several ways")
    return results[0]


def _sizes(call: _CallMeaning) -> list[Sizes]:
    """The sizes of query, key and value; the heads are (batch, heads), or (batch,) where the call has no heads."""
    shapes = [tensor(part).shape for part in (call.query, call.key, call.value)]
    if any(len(shape) != len(call.order) for shape in shapes):
        raise NotAttention(f"query, key and value do not have {len(call.order)} dimensions each")
    query, key, value = sizes = [_sizes_of(shape, call) for shape in shapes]
    if not all(same(each.heads[0], query.heads[0]) for each in sizes):
        raise NotAttention("query, key and value are not known to have one batch size")
    if not same(key.length, value.length):
        raise NotAttention("key and value are not known to have one length")
    if not same(key.heads[-1], value.heads[-1]):
        raise NotAttention("key and value are not known to have one number of heads")
    return sizes


def _sizes_of(shape: Sequence[Size], call: _CallMeaning) -> Sizes:
    named = dict(zip(call.order, shape, strict=True))
    if "(HD)" not in named:
        heads = (named["B"], named["H"]) if "H" in named else (named["B"],)
        return Sizes(heads, named["S"], named["D"])
    # Query and key have one head size.
    count, width = call.heads, tensor(call.query).shape[-1]
    if not isinstance(count, int) or not same(width % count, 0) or not same(named["(HD)"], width):
        raise NotAttention("the number of heads of key and value is not known")
    return Sizes((named["B"], count), named["S"], width // count)


def _ordered(dims: Dims, order: Sequence[str]) -> Layout:
    named = dict(zip("BH", dims.heads, strict=False)) | {"S": dims.length, "D": dims.features}
    named["(HD)"] = (*named.get("H", ()), *named["D"])
    return tuple(named[name] for name in order)


def _masks(call: _CallMeaning, axes: CallAxes) -> list[ScoreMod]:
    mods: list[ScoreMod] = []
    for node in (call.bias, call.masked):
        if node is None:
            continue
        if not is_tensor(node):
            raise NotAttention("the mask is not a tensor of the graph")
        operand = mask_operand(node, axes)
        if node is call.masked:
            mods.append(Fill(operand, -math.inf, tensor(call.query).dtype))
        elif operand.dtype is torch.bool:
            raise NotAttention("the mask is boolean, and this call adds it to the scores")
        else:
            mods.append(added_mask(operand))
    return mods


PATTERN = LibraryCall()


# Specimens: operators that PyTorch has everywhere. The others are in tests/patterns/test_library_calls.py.

_calls = SPECIMENS = Specimens()
_Q = normal(2, 4, "L", 8)
_K = _V = normal(2, 4, "S", 8)


@_calls.add(_Q, _K, _V, only_cpu=True)
def flash_attention_of_the_cpu(q: Tensor, k: Tensor, v: Tensor) -> Any:
    """A graph that was exported for one device, and read again."""
    output, _ = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, False)
    return output


@_calls.add(normal(2, "L", 4, 8), normal(2, "L", 4, 8), normal(2, "L", 4, 8), only_cpu=True)
def causal_flash_attention_of_the_cpu(q: Tensor, k: Tensor, v: Tensor) -> Any:
    q, k, v = (part.transpose(1, 2) for part in (q, k, v))
    return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True, scale=0.25)[0].transpose(1, 2)
