"""A pattern of one's own: the attention of a library that hides it behind an operator is read and rewritten.

``acme::attention`` stands for a third-party operator that no compiler can look into. The pattern below says what it
means; attnrewrite does the rest. The example runs on the CPU and prints the report and the error against eager.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn

import attnrewrite
from attnrewrite.patterns import (
    AttentionSite,
    Finding,
    GraphView,
    NearMiss,
    NotAttention,
    Specimen,
    attention_site,
    call_arguments,
)

# The library. Its tensors are (batch, length, heads, features), and neighboring query heads may share a key head.


@torch.library.custom_op("acme::attention", mutates_args=())
def acme_attention(query: Tensor, key: Tensor, value: Tensor, temperature: float, causal: bool = False) -> Tensor:
    """softmax(query @ key^T / temperature) @ value, one query head after another."""
    return _in_plain_torch(query, key, value, temperature, causal)


@acme_attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, temperature: float, causal: bool = False) -> Tensor:
    return query.new_empty((*query.shape[:-1], value.shape[-1]))


def _in_plain_torch(query: Tensor, key: Tensor, value: Tensor, temperature: float, causal: bool) -> Tensor:
    group = query.shape[2] // key.shape[2]
    heads = []
    for head in range(query.shape[2]):
        scores = query[:, :, head] @ key[:, :, head // group].mT / temperature
        if causal:
            later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
            scores = scores.masked_fill(later, float("-inf"))
        heads.append(scores.softmax(-1) @ value[:, :, head // group])
    return torch.stack(heads, dim=2)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.settings = inputs[3:]


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    with torch.enable_grad():
        inputs = [tensor.detach().requires_grad_() for tensor in ctx.saved_tensors]
        output = _in_plain_torch(*inputs, *ctx.settings)
    return (*torch.autograd.grad(output, inputs, gradient), None, None)


acme_attention.register_autograd(_backward, setup_context=_save)


# The pattern.


def _inputs(seed: int, length: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(2, length, heads, 16, generator=generator) for heads in (4, 2, 2))
    return q, k, v


@attnrewrite.register_pattern
class AcmeAttention:
    """result = softmax(query @ key^T / temperature) @ value"""

    name = "acme"
    precedence = 30

    specimens = (  # What must be found, and what must be left alone with a reason.
        Specimen("acme_grouped", lambda q, k, v: acme_attention(q, k, v, 2.0), _inputs),
        Specimen("acme_causal", lambda q, k, v: acme_attention(q, k, v, 2.0, True), _inputs),
        Specimen("acme_cold", lambda q, k, v: acme_attention(q, k, v, 0.0), _inputs, 0, reason="a temperature of 0"),
    )

    def find(self, view: GraphView) -> Iterator[Finding]:
        for call in view.graph.find_nodes(op="call_function", target=torch.ops.acme.attention.default):
            try:
                yield self._read(call, view)
            except NotAttention as reason:
                yield NearMiss(self.name, call, str(reason), (call,))

    def _read(self, call: fx.Node, view: GraphView) -> AttentionSite:
        arguments = call_arguments(call)
        if arguments["temperature"] == 0:
            raise NotAttention("a temperature of 0 makes every weight NaN")
        return attention_site(
            view,
            pattern=self.name,
            anchor=call,
            query=arguments["query"],
            key=arguments["key"],
            value=arguments["value"],
            scale=1 / arguments["temperature"],
            is_causal=arguments["causal"],
            length_dim=-3,
            grouped=True,
        )


# A model that uses the library.


class Layer(nn.Module):
    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.query, self.pair, self.out = nn.Linear(width, width), nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        query = self.query(x).unflatten(-1, (4, 16))
        key, value = self.pair(x).unflatten(-1, (2, 2, 16)).unbind(2)
        result: Tensor = self.out(acme_attention(query, key, value, 4.0, True).flatten(2))
        return result


def main() -> None:
    torch.manual_seed(0)
    model, x = Layer().eval(), torch.randn(2, 128, 64)
    with torch.inference_mode():
        # "verify" compares each attention that was rewritten with the operator itself, on these inputs.
        report = attnrewrite.explain(model, x, options={"verify": True})
        report.graphs[0].seconds.clear()
        print(report)
        compiled = torch.compile(model, backend="attnrewrite", options={"inner_backend": "aot_eager"})
        expected, result = model(x), compiled(x)
    error = (result - expected).abs().max() / expected.abs().max()
    print(f"largest difference from eager, relative to its largest number: {error:.1e}")


if __name__ == "__main__":
    main()
