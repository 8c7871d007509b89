"""FasterCache's prediction of the unconditional half of a model's output from the conditional one.

Equations 9 to 11 of https://arxiv.org/abs/2410.19355. A call that computes both halves learns their difference, low and
high spatial frequencies apart. In a call that skips the unconditional half, it is predicted as the conditional one plus
both differences, each multiplied by its weight. As in the published code (https://github.com/Vchitect/FasterCache), the
weights of successive skipped calls are multiplied with each other.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Collection, Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor

from attnrewrite.errors import CacheError
from attnrewrite.options.cache_config import TENSOR_FORMATS
from attnrewrite.torch_private import tree_leaves, tree_map_only

__all__ = ["GuidanceDelta", "check_halved", "copied", "first_output", "halved_inputs"]

log = logging.getLogger("attnrewrite")


class GuidanceDelta:
    """The difference between the unconditional and the conditional half of a model's output.

    It is computed in float32, as published. The Fourier transform is linear and the disc of low frequencies symmetric,
    so half of the difference's transform is enough: it takes as many bytes as one half of the output in float32.
    """

    def __init__(self, tensor_format: str) -> None:
        """Args:
        tensor_format: of the output, ``"BCFHW"``, ``"BFCHW"`` or ``"BCHW"``.
        """
        self._format = tensor_format
        self._delta: Tensor | None = None
        self._shape: tuple[int, ...] = ()
        self._low = self._high = 1.0

    @property
    def learned(self) -> bool:
        """Whether there is a difference to predict from."""
        return self._delta is not None

    @property
    def nbytes(self) -> int:
        """Bytes that are stored."""
        return 0 if self._delta is None else self._delta.nbytes

    def reset(self) -> None:
        """Forgets what was learned."""
        self._delta, self._shape = None, ()
        self._low = self._high = 1.0

    def to(self, device: torch.device | str) -> None:
        """Moves the difference to a device. Predictions copy it to where it is needed."""
        if self._delta is not None:
            self._delta = self._delta.to(device)

    def learn(self, output: Tensor) -> None:
        """Learns from a full output, whose dimension 0 has the unconditional half first.

        Raises:
            CacheError: the output does not have the tensor format, or its batch size is odd.
        """
        self._check(output)
        if output.shape[0] % 2:
            _odd(output, "the model's output")
        unconditional, conditional = output.chunk(2)
        self.learn_from(unconditional, conditional)

    @torch.no_grad()
    def learn_from(self, unconditional: Tensor, conditional: Tensor) -> None:
        """Learns from two outputs of separate calls.

        Raises:
            CacheError: they do not have the tensor format, or differ in shape.
        """
        self._check(unconditional)
        if unconditional.shape != conditional.shape:
            raise CacheError(
                f"the unconditional output has the shape {tuple(unconditional.shape)} and the conditional one "
                f"{tuple(conditional.shape)}; FasterCache needs the same shape for both"
            )
        self._delta = torch.fft.rfft2(unconditional.float() - conditional.float())
        self._shape = tuple(conditional.shape)
        self._low = self._high = 1.0

    @torch.no_grad()
    def predict(self, conditional: Tensor, low_weight: float, high_weight: float) -> Tensor:
        """The unconditional output that belongs to a conditional one, in its shape and dtype.

        Args:
            low_weight, high_weight: factors for the low and the high frequencies of the difference, which hold from
                this call on until :meth:`learn`.

        Raises:
            CacheError: nothing was learned yet, or the shape differs from the learned one.
        """
        self._check(conditional)
        if self._delta is None:
            raise CacheError(
                "FasterCache has no difference of guidance yet: both halves must be computed once before one is skipped"
            )
        if tuple(conditional.shape) != self._shape:
            raise CacheError(
                f"FasterCache learned the difference of guidance from halves of shape {self._shape}; this conditional "
                f"output has the shape {tuple(conditional.shape)}. Reset the cache when shapes change"
            )
        self._low *= low_weight
        self._high *= high_weight
        height, width = conditional.shape[-2:]
        delta = self._delta.to(conditional.device)
        low = _low_frequencies(height, width, conditional.device)
        weights = torch.full_like(low, self._high, dtype=torch.float32).masked_fill_(low, self._low)
        difference = torch.fft.irfft2(delta * weights, s=(height, width))
        unconditional: Tensor = conditional.float() + difference
        return unconditional.to(conditional.dtype)

    def complete(self, conditional: Tensor, low_weight: float, high_weight: float) -> Tensor:
        """The full output: the unconditional half from :meth:`predict`, then the conditional one, unchanged."""
        return torch.cat([self.predict(conditional, low_weight, high_weight), conditional])

    def _check(self, output: Tensor) -> None:
        dims = TENSOR_FORMATS[self._format]
        if output.dim() != dims:
            raise CacheError(
                f"tensor_format {self._format!r} means {dims} dimensions, and the model's output has the shape "
                f"{tuple(output.shape)}; set tensor_format to what the output is ({', '.join(TENSOR_FORMATS)}). For "
                "outputs without height and width use is_guidance_distilled=True, which keeps to attention"
            )
        if not output.is_floating_point():
            raise CacheError(f"FasterCache predicts real floating-point outputs; the model's output is {output.dtype}")


def _low_frequencies(height: int, width: int, device: torch.device) -> Tensor:
    """True within the published radius, for the half spectrum ``[height, width // 2 + 1]`` of a real image."""
    radius = min(height, width) // 5
    vertical = torch.fft.fftfreq(height, 1 / height, device=device).round()
    horizontal = torch.arange(width // 2 + 1, device=device)
    low: Tensor = vertical[:, None] ** 2 + horizontal**2 <= radius**2
    return low


def halved_inputs(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], names: Collection[str]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A model's arguments for the conditional half alone, which is the second half of dimension 0.

    The tensor with the most dimensions has the batch size. Some arguments serve both halves and are left as they are:
    other objects than tensors, tensors without dimensions, and tensors of size 1 where the batch is larger.

    Args:
        args: tensors of the batch size are halved, also those within lists, tuples and dictionaries.
        kwargs: those in ``names`` are halved, whatever their size.
        names: of the keyword arguments that hold both halves.

    Raises:
        CacheError: dimension 0 is odd, or there is nothing to halve.
    """
    candidates = {f"positional argument {index}": arg for index, arg in enumerate(args)}
    candidates |= {f"argument {key!r}": arg for key, arg in kwargs.items() if key in names}
    tensors = [
        (leaf, name)
        for name, arg in candidates.items()
        for leaf in tree_leaves(arg)
        if isinstance(leaf, Tensor) and leaf.dim()
    ]
    if not tensors:
        raise CacheError(
            "none of the model's arguments is known to hold an unconditional and a conditional half; name them in "
            f"unconditional_conditional_input_kwargs_identifiers (now {', '.join(names) or 'empty'}; "
            f"the call's keywords are {', '.join(kwargs) or 'none'})"
        )
    # A tensor of size 1, which serves both halves, is the last choice.
    largest, name = max(tensors, key=lambda each: (each[0].shape[0] > 1, each[0].dim()))
    batch = largest.shape[0]
    if batch % 2:
        _odd(largest, name)
    halved_args = tuple(_halved(arg, f"positional argument {index}", batch, False) for index, arg in enumerate(args))
    halved_kwargs = {
        key: _halved(arg, f"argument {key!r}", batch, True) if key in names else arg for key, arg in kwargs.items()
    }
    return halved_args, halved_kwargs


def _halved(value: Any, name: str, batch: int, named: bool) -> Any:
    def second_half(tensor: Tensor) -> Tensor:
        if not tensor.dim() or tensor.shape[0] == 1 or (not named and tensor.shape[0] != batch):
            return tensor
        if tensor.shape[0] % 2:
            _odd(tensor, name)
        return tensor[tensor.shape[0] // 2 :]

    return tree_map_only(Tensor, second_half, value)


def _odd(tensor: Tensor, name: str) -> NoReturn:
    raise CacheError(
        f"FasterCache skips the unconditional half of a batch, and {name} has the odd batch size {tensor.shape[0]} "
        f"(shape {tuple(tensor.shape)}); call the model with both halves concatenated, or each half within "
        "attnrewrite.cache_stream('cond') and cache_stream('uncond'), or set is_guidance_distilled=True for a model "
        "without an unconditional half"
    )


def first_output(result: Any) -> tuple[Tensor, Callable[[Tensor], Any]]:
    """The first tensor of a denoiser's result, and a function that puts another tensor in its place.

    Raises:
        CacheError: the result is not a tensor, a tuple that begins with one, or a dataclass with one as ``.sample``.
    """
    if isinstance(result, Tensor):
        return result, lambda output: output
    if isinstance(result, tuple) and result and isinstance(result[0], Tensor):
        if hasattr(result, "_replace"):
            return result[0], lambda output: type(result)(output, *result[1:])
        return result[0], lambda output: (output, *result[1:])
    sample = getattr(result, "sample", None)
    if isinstance(sample, Tensor) and dataclasses.is_dataclass(result) and not isinstance(result, type):
        return sample, lambda output: dataclasses.replace(result, sample=output)
    raise CacheError(
        f"FasterCache takes a tensor, a tuple that begins with one, or a dataclass with one as .sample; the model "
        f"returned {type(result).__name__}. Set is_guidance_distilled=True to keep to attention"
    )


def copied(result: Any) -> Any:
    """A model's result with all tensors copied."""
    if dataclasses.is_dataclass(result) and not isinstance(result, type):
        fields = {field.name: getattr(result, field.name) for field in dataclasses.fields(result)}
        return dataclasses.replace(result, **copied(fields))
    return tree_map_only(Tensor, Tensor.clone, result)


def _relative_difference(found: Tensor, expected: Tensor) -> float:
    """The relative difference of two tensors in the 2-norm. Elements that are NaN in both count as equal."""
    found, expected = found.double().nan_to_num(), expected.double().nan_to_num()
    return float((found - expected).norm() / expected.norm().clamp_min(torch.finfo(torch.float64).tiny))


def _outputs_of(result: Any) -> list[Tensor]:
    """All tensors of a model's result."""
    if dataclasses.is_dataclass(result):
        result = [getattr(result, field.name) for field in dataclasses.fields(result)]
    return [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]


def check_halved(whole: Any, halved: Any, name: str) -> None:
    """Checks that a model's result for the conditional half alone is half of the result for both halves.

    It warns where the first output differs in value, and where there are other outputs.

    Args:
        whole: the result for both halves.
        halved: the result for the conditional half.
        name: the model's, for messages.

    Raises:
        CacheError: the first output does not have half the batch size.
    """
    output, _ = first_output(whole)
    expected = (output.shape[0] // 2, *output.shape[1:])
    given = tuple(first_output(halved)[0].shape)
    if given != expected:
        raise CacheError(
            f"called with the conditional half alone, {name} gives the shape {given} and not {expected}: an argument "
            "that holds both halves was not halved. Name all that do in "
            "unconditional_conditional_input_kwargs_identifiers, or set is_guidance_distilled=True to keep to attention"
        )
    conditional = output[output.shape[0] // 2 :]
    difference = _relative_difference(first_output(halved)[0], conditional)
    # Rounding depends on the batch size.
    if not difference <= (0.1 if torch.finfo(output.dtype).bits < 32 else 0.01):
        log.warning(
            "%s gives another result for the conditional half alone than it has in both halves (relative difference "
            "%.2g): FasterCache is wrong for a model whose rows depend on each other, or where arguments that hold "
            "both halves were not halved, or others were (see unconditional_conditional_input_kwargs_identifiers)",
            name,
            difference,
        )
    shapes = [expected if leaf is output else tuple(leaf.shape) for leaf in _outputs_of(whole)]
    if [tuple(leaf.shape) for leaf in _outputs_of(halved)] != shapes:
        log.warning(
            "%s gives more than one tensor. FasterCache predicts the first one's unconditional half: in calls that "
            "skip it the others are of the conditional half alone",
            name,
        )
