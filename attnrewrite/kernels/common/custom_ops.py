"""The operators ``torch.ops.attnrewrite.<kernel>`` that stand for a vendor's call in a graph.

    <kernel>(query, key, value, mask, scale, dropout, left, right, from_last, softcap) -> output
    <kernel>(...) -> (output, logsumexp, state), and <kernel>_backward, where the package has a backward pass

Tensors are in the kernel's order of dimensions; the numbers are
:class:`attnrewrite.kernels.common.library_kernel.CallParameters`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnrewrite.kernels.common.library_kernel import CallParameters, LibraryKernel, Saved

__all__ = ["define_operators"]

_OPERANDS = "Tensor query, Tensor key, Tensor value, Tensor? mask"
_NUMBERS = "float scale, float dropout, int left, int right, bool from_last, float softcap"


def define_operators(kernel: LibraryKernel) -> None:
    """Defines the kernel's operators, once in a process."""
    name = f"attnrewrite::{kernel.name}"
    backward = kernel.limits.backward
    tags = []
    if kernel.limits.dropout:
        tags.append(torch.Tag.nondeterministic_seeded)
    if not kernel.limits.cuda_graphs:
        tags.append(torch.Tag.cudagraph_unsafe)

    def forward(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *numbers: Any) -> Any:
        with torch.no_grad():
            query, key, value = (_aligned(part) for part in (query, key, value))
            results = kernel.forward_call(query, key, value, mask, CallParameters(*numbers)).run()
        # The layout that the fake promises; nothing is copied where the vendor's is that one already.
        results = tuple(result.contiguous() for result in results)
        return results if backward else results[0]

    def fake_forward(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *numbers: Any) -> Any:
        output = query.new_empty((*query.shape[:-1], value.shape[-1]))
        return (output, *kernel.saved_like(query, key, value)) if backward else output

    results = "(Tensor output, Tensor logsumexp, Tensor state)" if backward else "Tensor"
    definition = torch.library.custom_op(
        name, forward, mutates_args=(), schema=f"({_OPERANDS}, {_NUMBERS}) -> {results}", tags=tags
    )
    definition.register_fake(fake_forward)
    if backward:
        _define_backward(kernel, name, tags)
        definition.register_autograd(_backward_of(kernel), setup_context=_save)


def _define_backward(kernel: LibraryKernel, name: str, tags: list[torch.Tag]) -> None:
    def backward(
        gradient: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        output: Tensor,
        logsumexp: Tensor,
        state: Tensor,
        *numbers: Any,
    ) -> Any:
        saved = Saved(output, logsumexp, state)
        with torch.no_grad():
            query, key, value = (_aligned(part) for part in (query, key, value))
            call = kernel.backward_call(gradient.contiguous(), query, key, value, mask, saved, CallParameters(*numbers))
            return tuple(result.contiguous() for result in call.run())

    def fake_backward(gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, *others: Any) -> tuple[Tensor, ...]:
        return tuple(part.new_empty(part.shape) for part in (query, key, value))

    saved = "Tensor output, Tensor logsumexp, Tensor state"
    schema = f"(Tensor gradient, {_OPERANDS}, {saved}, {_NUMBERS}) -> (Tensor, Tensor, Tensor)"
    # The backward pass draws no random numbers: the dropout's state is among its arguments.
    tags = [tag for tag in tags if tag is not torch.Tag.nondeterministic_seeded]
    definition = torch.library.custom_op(f"{name}_backward", backward, mutates_args=(), schema=schema, tags=tags)
    definition.register_fake(fake_backward)


def _aligned(operand: Tensor) -> Tensor:
    """The operand, copied if its rows do not begin at multiples of 16 bytes, which kernels for CUDA load at once.

    Some check it, some take it for granted: a view that begins in the middle of a row would be read wrongly.
    """
    if not operand.is_cuda:
        return operand
    size = operand.element_size()
    strides = zip(operand.shape[:-1], operand.stride()[:-1], strict=True)
    fits = operand.data_ptr() % 16 == 0 and all(stride * size % 16 == 0 for length, stride in strides if length > 1)
    return operand if fits else operand.clone(memory_format=torch.contiguous_format)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    query, key, value, mask, *numbers = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(query, key, value, mask, *output)
    ctx.numbers = numbers


def _backward_of(kernel: LibraryKernel) -> Any:
    target = getattr(torch.ops.attnrewrite, f"{kernel.name}_backward").default

    def backward(ctx: Any, gradient: Tensor, *of_saved: Any) -> tuple[Tensor | None, ...]:
        gradients = target(gradient, *ctx.saved_tensors, *ctx.numbers)
        return (*gradients, *(None,) * (1 + len(ctx.numbers)))

    return backward
