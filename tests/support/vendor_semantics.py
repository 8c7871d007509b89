"""What the vendors document of the functions that are called, written out in float64.

It stands in for a vendor where the lines of attnrewrite around the call are tested: layouts, packing, masks, rows
without a key. It shows nothing of what a vendor's kernel computes.
"""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from attnrewrite.kernels.common.packages import VendorCall
from tests.support.published_signatures import PUBLISHED

__all__ = ["bound", "documented"]


def bound(name: str, call: VendorCall) -> list[dict[str, Any]]:
    """The arguments of ``call`` by the names of each signature that the vendor of kernel ``name`` published.

    Raises:
        TypeError: the call does not fit a signature.
    """
    function = call.function.rpartition(".")[2]
    results = []
    for published in PUBLISHED[name].signatures:
        signature = inspect.signature(getattr(published, function))
        arguments = signature.bind(*call.args, **call.kwargs)
        arguments.apply_defaults()
        results.append(arguments.arguments)
    return results


def documented(name: str, call: VendorCall) -> Any:
    """What the function returns, by its documentation."""
    arguments = bound(name, call)[0]
    return _DOCUMENTED[call.function.rpartition(".")[2]](arguments)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    left: int = -1,
    right: int = -1,
    from_last: bool = True,
    bias: Tensor | None = None,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Output and logarithms of sums; operands are (batch, heads, length, features)."""
    dtype = q.dtype
    q, k, v = (part.double() for part in (q, k, v))
    groups = q.shape[1] // k.shape[1]
    k, v = (part.repeat_interleave(groups, dim=1) for part in (k, v))
    scores = q @ k.mT * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    shift = k.shape[2] - q.shape[2] if from_last else 0
    position = torch.arange(q.shape[2])[:, None] + shift
    keys = torch.arange(k.shape[2])
    if from_last and right >= k.shape[2]:
        # FlashAttention takes such a bound for none:
        # https://github.com/Dao-AILab/flash-attention/blob/v2.8.3/csrc/flash_attn/flash_api.cpp
        right = -1
    if from_last and left >= k.shape[2]:
        left = -1
    if left >= 0:
        scores = scores.masked_fill(keys < position - left, -math.inf)
    if right >= 0:
        scores = scores.masked_fill(keys > position + right, -math.inf)
    if bias is not None:
        scores = scores + bias
    return (scores.softmax(-1) @ v).to(dtype), scores.logsumexp(-1).float()


def _dense(q: Tensor, k: Tensor, v: Tensor, *numbers: Any, **more: Any) -> tuple[Tensor, Tensor]:
    """The same with operands (batch, length, heads, features)."""
    output, logsumexp = _attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), *numbers, **more)
    return output.transpose(1, 2).contiguous(), logsumexp


def _sequences(
    q: Tensor, k: Tensor, v: Tensor, starts_q: Tensor, starts_k: Tensor, *numbers: Any, **more: Any
) -> tuple[Tensor, Tensor]:
    """The same with operands (total, heads, features)."""
    outputs, sums = [], []
    for (a, b), (c, d) in zip(_pairs(starts_q), _pairs(starts_k), strict=True):
        output, logsumexp = _dense(q[None, a:b], k[None, c:d], v[None, c:d], *numbers, **more)
        outputs.append(output[0])
        sums.append(logsumexp[0])
    return torch.cat(outputs), torch.cat(sums, dim=-1)


def _pairs(starts: Tensor) -> list[tuple[int, int]]:
    numbers = starts.tolist()
    return list(itertools.pairwise(numbers))


def _gradients(run: Callable[..., tuple[Tensor, Tensor]], gradient: Tensor, *operands: Tensor) -> list[Tensor]:
    def found() -> Any:
        leaves = [operand.detach().double().requires_grad_() for operand in operands]
        return torch.autograd.grad(run(*leaves)[0], leaves, gradient.double())

    # An operator's body is run below autograd; another thread knows nothing of that.
    with ThreadPoolExecutor(1) as thread:
        return [part.to(own.dtype) for part, own in zip(thread.submit(found).result(), operands, strict=True)]


def _window(left: int, right: int, causal: bool) -> tuple[int, int]:
    return left, 0 if causal else right


def _flash_forward(a: dict[str, Any]) -> Any:
    run = _flash_run(a)
    output, logsumexp = run(a["q"], a["k"], a["v"])
    return output, logsumexp, None, torch.zeros(2, dtype=torch.int64)


def _flash_run(a: dict[str, Any]) -> Callable[..., tuple[Tensor, Tensor]]:
    assert not a.get("dropout_p") and a.get("alibi_slopes") is None
    causal = a.get("causal", a.get("is_causal", False))
    numbers = (a["softmax_scale"], *_window(a["window_size_left"], a["window_size_right"], causal))
    starts = (a.get("cu_seqlens_q"), a.get("cu_seqlens_k"))

    def run(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        if starts[0] is None or starts[1] is None:
            return _dense(q, k, v, *numbers, softcap=a["softcap"])
        return _sequences(q, k, v, starts[0], starts[1], *numbers, softcap=a["softcap"])

    return run


def _flash_backward(a: dict[str, Any]) -> Any:
    found = _gradients(_flash_run(a), a["dout"], a["q"], a["k"], a["v"])
    for name, part in zip(("dq", "dk", "dv"), found, strict=True):
        a[name].copy_(part)
    if a.get("cu_seqlens_k") is not None:
        # Nothing is written beyond the last sequence.
        for name in ("dk", "dv"):
            a[name][int(a["cu_seqlens_k"][-1]) :] = math.nan


def _flash_3_forward(a: dict[str, Any]) -> Any:
    output, logsumexp = _flash_run(a)(a["q"], a["k"], a["v"])
    return output, logsumexp, torch.tensor([]), torch.tensor([])


def _flash_forward_either(a: dict[str, Any]) -> Any:
    return _flash_forward(a) if "dropout_p" in a else _flash_3_forward(a)


def _flash_func(a: dict[str, Any]) -> Any:
    left, right = (-1 if bound_ is None else bound_ for bound_ in a["window_size"])
    left, right = _window(left, right, a["causal"])
    softcap = a.get("softcap", 0.0)
    output, logsumexp = _dense(a["q"], a["k"], a["v"], a["softmax_scale"], left, right, softcap=softcap)
    return (output, logsumexp) if a["return_lse"] else output


def _flash_4_backward(a: dict[str, Any]) -> Any:
    left, right = (-1 if a[name] is None else a[name] for name in ("window_size_left", "window_size_right"))
    left, right = _window(left, right, a["causal"])

    def run(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return _dense(q, k, v, a["softmax_scale"], left, right, softcap=a["softcap"])

    return tuple(_gradients(run, a["dout"], a["q"], a["k"], a["v"]))


def _varlen_run(a: dict[str, Any]) -> Callable[..., tuple[Tensor, Tensor]]:
    left, right = _window(a["window_size_left"], a["window_size_right"], a["is_causal"])
    return lambda q, k, v: _sequences(q, k, v, a["cum_seq_q"], a["cum_seq_k"], a["scale"], left, right)


def _varlen_forward(a: dict[str, Any]) -> Any:
    output, logsumexp = _varlen_run(a)(a["query"], a["key"], a["value"])
    return output, logsumexp, torch.zeros(2, dtype=torch.uint64), torch.tensor([]), torch.tensor([])


def _varlen_backward(a: dict[str, Any]) -> Any:
    dq, dk, dv = _gradients(_varlen_run(a), a["grad_out"], a["query"], a["key"], a["value"])
    for part in (dk, dv):
        part[int(a["cum_seq_k"][-1]) :] = math.nan
    return dq, dk, dv


def _sage(a: dict[str, Any]) -> Any:
    assert a["tensor_layout"] == "NHD"
    assert not a["is_causal"] or a["q"].shape[1] == a["k"].shape[1]
    output, _ = _dense(a["q"], a["k"], a["v"], a["sm_scale"], -1, 0 if a["is_causal"] else -1)
    return output


def _sage_varlen(a: dict[str, Any]) -> Any:
    right = 0 if a["is_causal"] else -1
    output, _ = _sequences(a["q"], a["k"], a["v"], a["cu_seqlens_q"], a["cu_seqlens_k"], a["sm_scale"], -1, right)
    return output


def _sage_3(a: dict[str, Any]) -> Any:
    output, _ = _attend(a["q"], a["k"], a["v"], a["q"].shape[-1] ** -0.5, -1, 0 if a["is_causal"] else -1)
    a["k"] -= a["k"].mean(dim=-2, keepdim=True)
    return output


def _xformers_run(a: dict[str, Any]) -> Callable[..., tuple[Tensor, Tensor]]:
    bias, right, from_last = a["attn_bias"], -1, False
    if isinstance(bias, VendorCall):
        right, from_last, bias = 0, bias.function.endswith("FromBottomRightMask"), None
    if bias is not None:
        assert bias.shape == (a["query"].shape[0], a["query"].shape[2], a["query"].shape[1], a["key"].shape[1])
        assert bias.stride(-1) == 1 and all(stride % 8 == 0 for stride in bias.stride()[:-1])
    return lambda q, k, v: _dense(q, k, v, a["scale"], -1, right, from_last, bias)


def _xformers_forward(a: dict[str, Any]) -> Any:
    output, logsumexp = _xformers_run(a)(a["query"], a["key"], a["value"])
    rows = -(-logsumexp.shape[-1] // 32) * 32
    return output, torch.nn.functional.pad(logsumexp, (0, rows - logsumexp.shape[-1]))


def _xformers_backward(a: dict[str, Any]) -> Any:
    return tuple(_gradients(_xformers_run(a), a["grad"], a["query"], a["key"], a["value"]))


def _npu_run(a: dict[str, Any], scale: float) -> Callable[..., tuple[Tensor, Tensor]]:
    assert a["input_layout"] == "BSND" and a["sparse_mode"] in (0, 2, 3)
    if a["sparse_mode"]:
        assert torch.equal(a["atten_mask"], torch.ones(2048, 2048, dtype=torch.bool).triu(1))
        return lambda q, k, v: _dense(q, k, v, scale, -1, 0, a["sparse_mode"] == 3)
    mask = a["atten_mask"]
    bias = None if mask is None else torch.zeros(mask.shape, dtype=torch.float64).masked_fill(mask, -math.inf)
    return lambda q, k, v: _dense(q, k, v, scale, bias=bias)


def _npu_forward(a: dict[str, Any]) -> Any:
    assert a["keep_prob"] == 1 and a["head_num"] == a["query"].shape[2]
    output, logsumexp = _npu_run(a, a["scale"])(a["query"], a["key"], a["value"])
    rows = logsumexp[..., None].expand(*logsumexp.shape, 8)
    return output, rows, rows.exp(), torch.tensor([]), 1, 2, 3


def _npu_backward(a: dict[str, Any]) -> Any:
    assert (a["seed"], a["offset"], a["numels"]) == (1, 2, 3)
    found = _gradients(_npu_run(a, a["scale_value"]), a["dy"], a["query"], a["key"], a["value"])
    return (*found, torch.tensor([]))


def _npu_infer(a: dict[str, Any]) -> Any:
    assert a["num_heads"] == a["query"].shape[2] and a["num_key_value_heads"] == a["key"].shape[2]
    return _npu_run(a, a["scale"])(a["query"], a["key"], a["value"])


def _xla(a: dict[str, Any]) -> Any:
    output, _ = _attend(a["q"], a["k"], a["v"], a["sm_scale"], -1, 0 if a["causal"] else -1, False)
    return output


_DOCUMENTED: dict[str, Callable[[dict[str, Any]], Any]] = {
    "_flash_attn_forward": _flash_forward_either,
    "_flash_attn_varlen_forward": _flash_forward,
    "_flash_attn_backward": _flash_backward,
    "_flash_attn_varlen_backward": _flash_backward,
    "flash_attn_func": _flash_func,
    "_flash_attn_bwd": _flash_4_backward,
    "_flash_attention_forward": _varlen_forward,
    "_flash_attention_backward": _varlen_backward,
    "sageattn": _sage,
    "sageattn_varlen": _sage_varlen,
    "sageattn_qk_int8_pv_fp16_triton": _sage,
    "sageattn_qk_int8_pv_fp16_cuda": _sage,
    "sageattn_qk_int8_pv_fp8_cuda": _sage,
    "sageattn_qk_int8_pv_fp8_cuda_sm90": _sage,
    "sageattn3_blackwell": _sage_3,
    "memory_efficient_attention_forward_requires_grad": _xformers_forward,
    "memory_efficient_attention_backward": _xformers_backward,
    "npu_fusion_attention": _npu_forward,
    "npu_fusion_attention_grad": _npu_backward,
    "npu_fused_infer_attention_score": _npu_infer,
    "flash_attention": _xla,
}
