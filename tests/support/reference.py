"""The reference: the formula that the source computes in its own dtype, evaluated in float64.

It is not what the source would compute if it were given float64. ``torch.finfo(scores.dtype).min`` is -65504 where the
scores are float16, and what is decided by the dtype is decided as in the call that is judged. So the source runs on
tensors that say that they have its dtype, and carry a float64 tensor beside it through every operator, with the
gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes, return_and_correct_aliasing
from torch.utils._pytree import tree_map

__all__ = ["Reference", "wide"]


class _Twofold(Tensor):
    """Looks like ``own``; ``wide`` is the same in float64, or equal to it if it is no floating number."""

    own: Tensor
    wide: Tensor

    @staticmethod
    def __new__(cls, own: Tensor, wide: Tensor) -> _Twofold:
        result: _Twofold = Tensor._make_wrapper_subclass(
            cls, own.shape, own.stride(), own.storage_offset(), dtype=own.dtype, device=own.device
        )
        result.own, result.wide = own, wide
        return result

    def __repr__(self) -> str:  # type: ignore[override]
        """Models write tensors into the messages of errors that they do not raise."""
        with _disable_current_modes():
            return repr(self.own)

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: OpOverload, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return _both(func, args, kwargs or {})


class Reference(TorchDispatchMode):
    """Runs everything within twice; :meth:`given` makes an input of it, and :func:`wide` reads a result."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(
        self, func: OpOverload, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return _both(func, args, kwargs or {})

    @staticmethod
    def given(value: Any, rounded: torch.Generator | None = None) -> Any:
        """Tensors of a tree as inputs, gradients asked for where the original asks for them.

        Args:
            value: the tree.
            rounded: draws errors of up to half a unit in the last place, which are added to each number in float64.
                Masks have none: numbers beyond 1000, and tensors of ones and zeros.
        """

        def twofold(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            own = value.detach().clone()
            exact = _widened(own)
            if rounded is not None and own.is_floating_point() and not _masks(own):
                error = torch.rand(own.shape, generator=rounded, dtype=torch.float64).to(own.device) - 0.5
                exact += error * torch.finfo(own.dtype).eps * exact
            return _Twofold(own, exact).requires_grad_(value.requires_grad)

        with _disable_current_modes():
            return tree_map(twofold, value)


def wide(value: Tensor) -> Tensor:
    """A result in float64, detached."""
    with _disable_current_modes():
        value = value.detach()
        return value.wide if isinstance(value, _Twofold) else _widened(value)


def _both(func: OpOverload, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    own_args, own_kwargs = tree_map(_own, (tuple(args), kwargs))
    own = func(*own_args, **own_kwargs)
    if torch.Tag.nondeterministic_seeded in func.tags:
        wide = tree_map(_widened, own)  # Another draw in float64 would say nothing.
    else:
        wide_args, wide_kwargs = tree_map(_wide, (tuple(args), kwargs))
        if func is torch.ops.aten._grouped_mm.default:  # There is none in float64.
            wide_args, wide_kwargs = tree_map(_single, (wide_args, wide_kwargs))
        if func is torch.ops.aten._softmax.default:  # On a GPU it may widen float16 alone.
            wide_args = (*wide_args[:2], False)
        if func is torch.ops.aten.view.default and not _can_be_viewed(*wide_args):
            func_of_wide = torch.ops.aten.reshape.default  # In float64 another kernel may have laid it out otherwise.
        else:
            func_of_wide = func
        wide = tree_map(_double, func_of_wide(*wide_args, **wide_kwargs))
    return return_and_correct_aliasing(func, args, kwargs, _paired(own, wide))  # type: ignore[no-untyped-call]


def _masks(value: Tensor) -> bool:
    return bool((value.abs() > 1e3).any()) or bool(((value == 0) | (value == 1)).all())


def _can_be_viewed(value: Tensor, size: Sequence[int]) -> bool:
    try:
        value.view(size)
    except RuntimeError:
        return False
    return True


def _paired(own: Any, wide: Any) -> Any:
    if isinstance(own, Tensor):
        return _Twofold(own, wide)
    if isinstance(own, (list, tuple)):
        return type(own)(_paired(o, w) for o, w in zip(own, wide, strict=True))
    return own


def _own(value: Any) -> Any:
    return value.own if isinstance(value, _Twofold) else value


def _wide(value: Any) -> Any:
    if isinstance(value, torch.dtype):
        return torch.float64 if value.is_floating_point else value
    return value.wide if isinstance(value, _Twofold) else _widened(value)


def _single(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value


def _double(value: Any) -> Any:
    """What integers give is float32 in float64 as well."""
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def _widened(value: Any) -> Any:
    """A copy, since what is written to it in place is written to the original, too."""
    if not isinstance(value, Tensor):
        return value
    return value.to(torch.float64, copy=True) if value.is_floating_point() else value.clone()
