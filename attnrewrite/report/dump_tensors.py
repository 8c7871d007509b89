"""The tensors of a dump: which ones are stored, and how they share memory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from attnrewrite.ir.nodes import dtype_name, known_number
from attnrewrite.torch_private import FakeTensor, is_traceable_wrapper_subclass

# -- tensors ----------------------------------------------------------------------------------------------------------


@dataclass
class DumpEntry:
    """One value that the scripts need: its expression in them, and the tensor to store, if any."""

    key: tuple[str, int | str]
    value: Any
    expression: str = ""
    comment: str = ""
    problem: str = ""
    drawn: bool = False
    stored: torch.Tensor | None = None


@dataclass
class DumpTensors:
    """The inputs and constants of both scripts. ``settle`` decides which of them are stored."""

    limit: int
    entries: list[DumpEntry] = field(default_factory=list)
    over_limit: bool = False

    def add(self, key: tuple[str, int | str], value: Any) -> DumpEntry:
        entry = DumpEntry(key, value)
        self.entries.append(entry)
        return entry

    def settle(self) -> None:
        """Fills the entries' expressions, and their stored tensors."""
        tensors = [entry for entry in self.entries if isinstance(entry.value, torch.Tensor)]
        for entry in self.entries:
            if not isinstance(entry.value, torch.Tensor):
                self._settle_plain(entry)
        groups: dict[object, list[DumpEntry]] = {}
        for entry in tensors:
            if self._is_real(entry):
                # Tensors of one storage are kept together, so that what was aliased stays aliased.
                groups.setdefault(_storage_key(entry.value), []).append(entry)
            elif not entry.problem:
                self._draw([entry])
        floating = [group for group in groups.values() if any(_is_floating(entry.value) for entry in group)]
        self.over_limit = sum(_extent_bytes(group) for group in floating) > self.limit
        for group in groups.values():
            if self.over_limit and all(_is_floating(entry.value) for entry in group):
                self._draw(group)
            else:
                self._store(group)

    def stored(self) -> dict[str, dict[int | str, torch.Tensor]]:
        """The content of ``inputs.pt``."""
        result: dict[str, dict[int | str, torch.Tensor]] = {"inputs": {}, "before": {}, "after": {}}
        for entry in self.entries:
            if entry.stored is not None:
                result[entry.key[0]][entry.key[1]] = entry.stored
        return result

    def _settle_plain(self, entry: DumpEntry) -> None:
        value = entry.value
        if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            hint = known_number(value)
            entry.comment = f"the symbolic value {value} of the compiled call"
            value = hint
            if hint is None:
                entry.problem = f"the value of {entry.value} is known only at run time"
        if isinstance(value, (bool, int, str, bytes)) or value is None:
            entry.expression = repr(value)
        elif isinstance(value, (float, complex)):
            # repr(inf) is not valid Python; float("inf") is.
            finite = math.isfinite(value) if isinstance(value, float) else True
            entry.expression = repr(value) if finite else f'float("{value}")'
        elif isinstance(value, (torch.dtype, torch.layout, torch.memory_format)):
            entry.expression = str(value)
        elif isinstance(value, torch.device):
            entry.expression = f"place({str(value)!r})"
        else:
            entry.problem = f"an object of type {type(value).__qualname__} cannot be written into a script"
        if entry.problem:
            entry.expression = f"missing({entry.problem!r})"

    def _is_real(self, entry: DumpEntry) -> bool:
        """Whether the tensor has data that can be stored; records a problem if it can be neither stored nor drawn."""
        value = entry.value
        if isinstance(value, FakeTensor):
            sizes = [*map(known_number, value.shape), *map(known_number, value.stride())]
            if None in sizes:
                entry.problem = f"the size {tuple(value.shape)} of a tensor is known only at run time"
        elif is_traceable_wrapper_subclass(value) or value.layout is not torch.strided or value.is_quantized:
            kind = type(value).__qualname__ if type(value) is not torch.Tensor else str(value.layout)
            entry.problem = f"a tensor of the kind {kind} cannot be stored for a script that needs only torch"
        elif value.device.type != "meta":
            return True
        if entry.problem:
            entry.expression = f"missing({entry.problem!r})"
        return False

    def _store(self, group: list[DumpEntry]) -> None:
        compact = _compact([entry.value for entry in group])
        for entry, tensor in zip(group, compact, strict=True):
            entry.stored = tensor
            entry.expression = f"stored[{entry.key[1]!r}]"
            entry.comment = f"{dtype_name(tensor.dtype)} {tuple(tensor.shape)}"
            self._finish(entry)

    def _draw(self, group: list[DumpEntry]) -> None:
        values = [entry.value for entry in group]
        shared = len(group) > 1 and len({value.dtype for value in values}) == 1
        first, end = min(map(_offset, values)), max(map(_end, values))
        for entry in group:
            value = entry.value
            shape, stride = tuple(map(known_number, value.shape)), tuple(map(known_number, value.stride()))
            arguments = [str(shape), str(stride), str(value.dtype), repr(str(value.device))]
            if shared:
                arguments.append(f"storage={group[0].key!r}, size={end - first}, offset={_offset(value) - first}")
            entry.drawn = True
            entry.expression = f"draw({', '.join(arguments)})"
            entry.comment = "not stored: random numbers" if _is_floating(value) else "not stored: zeros (ones if bool)"
            self._finish(entry)

    @staticmethod
    def _finish(entry: DumpEntry) -> None:
        if entry.value.requires_grad:
            entry.expression += ".requires_grad_()"


def _is_floating(tensor: torch.Tensor) -> bool:
    return tensor.dtype.is_floating_point or tensor.dtype.is_complex


def _storage_key(tensor: torch.Tensor) -> object:
    storage = tensor.untyped_storage()
    # An empty storage has no address to compare.
    return (str(tensor.device), storage.data_ptr()) if storage.nbytes() else id(tensor)


def _offset(tensor: torch.Tensor) -> int:
    return int(known_number(tensor.storage_offset()) or 0)


def _end(tensor: torch.Tensor) -> int:
    """One past the last element of the storage that the tensor reaches."""
    shape, strides = [known_number(n) for n in tensor.shape], [known_number(n) for n in tensor.stride()]
    if 0 in shape:
        return _offset(tensor)
    return int(_offset(tensor) + 1 + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True)))


def _extent_bytes(group: Sequence[DumpEntry]) -> int:
    """The number of bytes from the first to the last that the tensors use of their common storage."""
    tensors = [entry.value for entry in group]
    start = min(_offset(tensor) * tensor.element_size() for tensor in tensors)
    end = max(_end(tensor) * tensor.element_size() for tensor in tensors)
    return int(end - start)


def _compact(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The tensors of one storage, on a copy of the part that they use if that is smaller; strides and aliases stay."""
    plain = [tensor.detach().as_subclass(torch.Tensor) for tensor in tensors]
    if any(tensor.is_conj() or tensor.is_neg() for tensor in plain):
        # A pending conjugation is a flag on the tensor, not in the storage; it is carried out.
        return [tensor.resolve_conj().resolve_neg().clone() for tensor in plain]
    storage = plain[0].untyped_storage()
    # Sixteen bytes: no element is larger, so every offset stays a whole number of elements.
    start = min(_offset(tensor) * tensor.element_size() for tensor in plain) // 16 * 16
    end = max(_end(tensor) * tensor.element_size() for tensor in plain)
    if start == 0 and end == storage.nbytes():
        return plain
    piece = torch.empty(0, dtype=torch.uint8, device=plain[0].device).set_(storage, start, (max(0, end - start),), (1,))
    copy = piece.clone().untyped_storage()
    return [
        torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(
            copy, _offset(tensor) - start // tensor.element_size(), tensor.size(), tensor.stride()
        )
        for tensor in plain
    ]
