"""A kernel of one's own: attention that never holds more than a few rows of scores, in plain PyTorch.

attnrewrite finds the attention and says what it means; the kernel below says which sites it takes and writes its call
into the graph. The example runs on the CPU and prints the report and the error against eager.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

import attnrewrite
from attnrewrite.ir.builder import Builder
from attnrewrite.ir.nodes import same
from attnrewrite.ir.site import CanonicalAttention
from attnrewrite.kernels import Availability, Kernel, KernelLayout, Mask, Verdict

# The function: an operator, so that it is one node in a graph, whatever it does inside.

ROWS = 64
"""The rows of scores that are in memory at once."""


@torch.library.custom_op("example::chunked_attention", mutates_args=())
def chunked_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, causal: bool
) -> Tensor:
    """softmax(scale * query @ key^T + mask) @ value.

    Args:
        query, key, value: (batch, heads, length, features).
        mask: (batch or 1, heads or 1, queries or 1, keys); true to keep a key, or numbers to add.
    """
    parts = [_weights(query, key, mask, scale, causal, rows) @ _wide(value) for rows in _chunks(query)]
    return torch.cat(parts, dim=-2).to(query.dtype)


@torch.library.custom_op("example::chunked_attention_backward", mutates_args=())
def chunked_attention_backward(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, causal: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of query, key, value and mask; the last is empty where no numbers are added."""
    of_query = torch.zeros_like(_wide(query))
    of_key, of_value = torch.zeros_like(_wide(key)), torch.zeros_like(_wide(value))
    added = _added(mask)
    of_mask = of_query.new_empty((0,)) if added is None else torch.zeros_like(_wide(added))
    for rows in _chunks(query):
        weights, above = _weights(query, key, mask, scale, causal, rows), _wide(gradient[..., rows, :])
        of_value += weights.mT @ above
        of_weights = above @ _wide(value).mT
        of_scores = weights * (of_weights - (of_weights * weights).sum(-1, keepdim=True))
        of_query[..., rows, :] = of_scores @ _wide(key) * scale
        of_key += of_scores.mT @ _wide(query[..., rows, :]) * scale
        if added is not None:
            mine = of_mask[..., rows, :] if of_mask.shape[-2] > 1 else of_mask
            mine += of_scores.sum_to_size(mine.shape)
    of_mask = of_mask.to(query.dtype if added is None else added.dtype)
    return of_query.to(query.dtype), of_key.to(key.dtype), of_value.to(value.dtype), of_mask


def _chunks(query: Tensor) -> list[slice]:
    return [slice(first, first + ROWS) for first in range(0, query.shape[-2], ROWS)]


def _wide(operand: Tensor) -> Tensor:
    """Sums are taken in float32 at least."""
    return operand.to(torch.promote_types(operand.dtype, torch.float32))


def _added(mask: Tensor | None) -> Tensor | None:
    """The mask if it is numbers, which have a gradient."""
    return None if mask is None or mask.dtype is torch.bool else mask


def _weights(query: Tensor, key: Tensor, mask: Tensor | None, scale: float, causal: bool, rows: slice) -> Tensor:
    scores = _wide(query[..., rows, :]) @ _wide(key).mT * scale
    if mask is not None:
        mine = mask[..., rows, :] if mask.shape[-2] > 1 else mask
        scores = scores.masked_fill(~mine, float("-inf")) if mask.dtype is torch.bool else scores + mine
    if causal:
        own = torch.arange(rows.start, rows.start + scores.shape[-2], device=scores.device)
        later = torch.arange(scores.shape[-1], device=scores.device) > own[:, None]
        scores = scores.masked_fill(later, float("-inf"))
    return scores.softmax(-1)


# What a compiler needs to know of it: shapes, and its derivative.


@chunked_attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, causal: bool) -> Tensor:
    return query.new_empty((*query.shape[:-1], value.shape[-1]))


@chunked_attention_backward.register_fake
def _(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, causal: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    added = _added(mask)
    of_mask = query.new_empty((0,)) if added is None else torch.empty_like(added)
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), of_mask


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.numbers = inputs[4:]


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    *operands, of_mask = chunked_attention_backward(gradient, *ctx.saved_tensors, *ctx.numbers)
    return (*operands, None if _added(ctx.saved_tensors[3]) is None else of_mask, None, None)


chunked_attention.register_autograd(_backward, setup_context=_save)


# The kernel: when the function may stand for an attention, and its call.


class Chunked(Kernel):
    """What it cannot honor it refuses, with a sentence that tells a user what to do about it."""

    name = "chunked"
    needs = "PyTorch"

    def availability(self) -> Availability:
        return Availability(True, f"runs wherever torch {torch.__version__} does")

    def supports(self, site: CanonicalAttention) -> Verdict:
        scores = site.scores
        if scores.inexpressible:
            return Verdict.no(scores.inexpressible)
        if not site.compute_dtype.is_floating_point:
            return Verdict.no(f"takes floating-point operands, not {site.compute_dtype}")
        if any(same(axis.size, 0) for axis in site.key_axes):
            return Verdict.no("there is no key to attend to")
        if scores.scale is None:
            return Verdict.no("the scale is symbolic (compile with a head size that is not dynamic)")
        if site.dropout:
            return Verdict.no("has no dropout (call model.eval(), or ask for another kernel)")
        if site.sink is not None:
            return Verdict.no("takes no sink")
        if KernelLayout.of(site).grouped:
            return Verdict.no("needs as many key heads as query heads")
        if site.is_causal and scores.terms:
            return Verdict.no("the call has a mask and is_causal, and only PyTorch's own kernels know what both mean")
        if scores.masked_rows.may_occur:
            return Verdict.no(
                "a row may lose all its keys, and the softmax here knows no such row (if none occurs, set "
                "options={'assume_attended_rows': True})"
            )
        return Verdict.yes()

    def emit(self, site: CanonicalAttention, builder: Builder) -> fx.Node:
        scores = site.scores
        layout = KernelLayout.of(site)
        query, key, value = layout.operands(builder, site)
        mask = Mask(builder, site, layout.score_dims)
        assert mask.opened_rows is None, "rows without a key were refused"
        target = torch.ops.example.chunked_attention.default
        output = builder.call(target, query, key, value, mask.node, scores.scale, scores.is_causal)
        return layout.as_result(builder, site, output)


attnrewrite.register_kernel(Chunked())


# A model that knows nothing of it.


class Layer(nn.Module):
    def __init__(self, width: int = 96, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        scores = q @ k.mT / q.shape[-1] ** 0.5
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=x.device).triu(1)
        weights = scores.masked_fill(later, float("-inf")).softmax(-1)
        result: Tensor = self.out((weights @ v).transpose(1, 2).flatten(2))
        return result


def main() -> None:
    torch.manual_seed(0)
    model, x = Layer().eval(), torch.randn(2, 200, 96)
    with torch.inference_mode():
        # "verify" compares each attention that was rewritten with the source, on these inputs.
        report = attnrewrite.explain(model, x, options={"kernels": "chunked", "strict": True, "verify": True})
        report.graphs[0].seconds.clear()
        print(report)
        options: Any = {"kernels": "chunked", "strict": True, "inner_backend": "aot_eager"}
        compiled = torch.compile(model, backend="attnrewrite", options=options)
        expected, result = model(x), compiled(x)
    error = (result - expected).abs().max() / expected.abs().max()
    print(f"largest difference from eager, relative to its largest number: {error:.1e}")


if __name__ == "__main__":
    main()
