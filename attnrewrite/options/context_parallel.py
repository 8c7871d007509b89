"""The option ``context_parallel``, checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from attnrewrite.errors import OptionError

__all__ = ["KERNELS", "ContextParallel", "context_parallel_option"]

KERNELS = ("auto", "gather", "ring", "ulysses")
"""The ways to exchange what attention needs of other ranks."""

_KEYS = ("mesh", "buffers", "buffer_seq_dims", "kernel", "load_balance")


@dataclass(frozen=True)
class ContextParallel:
    """Which inputs of the graph are shards of a sequence, and over which processes.

    Attributes:
        group: the name of the process group, by which operators find it.
        ranks: how many processes it has.
        rank: the number of this process in it.
        buffers: for each input, by its name in ``forward``, the dimension that is sharded; None for one that is the
            same, and whole, on all ranks. ``"x"`` stands for all tensors in ``x``, ``"x.0"`` or ``"x.mask"`` for one.
        kernel: "gather", "ring", "ulysses", or "auto".
        load_balance: the shards are those of PyTorch's head-tail load balancer: of 2 * ranks equal parts of the
            sequence, rank r has part r and part 2 * ranks - 1 - r.
    """

    group: str
    ranks: int
    rank: int
    buffers: tuple[tuple[str, int | None], ...]
    kernel: str = "auto"
    load_balance: bool = False


def context_parallel_option(value: Any) -> ContextParallel | None:
    """The checked option.

    Raises:
        OptionError: the value is not what the option takes.
    """
    if value is None or isinstance(value, ContextParallel):
        return value
    if not isinstance(value, Mapping):
        raise OptionError(
            "options['context_parallel'] takes a dictionary like {'mesh': mesh, 'buffers': ['input_ids'], "
            f"'buffer_seq_dims': [1]}}, with the names of forward's arguments; got {value!r}"
        )
    unknown = [key for key in value if key not in _KEYS]
    if unknown:
        raise OptionError(f"options['context_parallel'] has no {unknown[0]!r}; it takes {', '.join(_KEYS)}")
    missing = [key for key in _KEYS[:3] if key not in value]
    if missing:
        raise OptionError(f"options['context_parallel'] needs {missing[0]!r}; it takes {', '.join(_KEYS)}")
    group = _group(value["mesh"])
    kernel = value.get("kernel", "auto")
    if kernel not in KERNELS:
        raise OptionError(f"options['context_parallel']['kernel'] takes one of {', '.join(KERNELS)}; got {kernel!r}")
    balance = value.get("load_balance", False)
    if not isinstance(balance, bool):
        raise OptionError(f"options['context_parallel']['load_balance'] takes True or False; got {balance!r}")
    return ContextParallel(
        group.group_name,
        dist.get_world_size(group),
        dist.get_rank(group),
        _buffers(value["buffers"], value["buffer_seq_dims"]),
        kernel,
        balance,
    )


def _group(mesh: Any) -> dist.ProcessGroup:
    if not dist.is_available() or not dist.is_initialized():
        raise OptionError(
            "options['context_parallel'] needs process groups: call torch.distributed.init_process_group first"
        )
    if isinstance(mesh, dist.ProcessGroup):
        return mesh
    if not isinstance(mesh, DeviceMesh):
        raise OptionError(f"options['context_parallel']['mesh'] takes a DeviceMesh; got {mesh!r}")
    if mesh.ndim != 1:
        raise OptionError(
            f"options['context_parallel']['mesh'] takes a mesh of one dimension, and this one has {mesh.ndim}: give "
            "the dimension over which the sequence is sharded, such as mesh['cp']"
        )
    group = mesh.get_group()
    assert isinstance(group, dist.ProcessGroup)
    return group


def _buffers(names: Any, dims: Any) -> tuple[tuple[str, int | None], ...]:
    if not isinstance(names, Sequence) or isinstance(names, str) or not all(isinstance(name, str) for name in names):
        raise OptionError(
            "options['context_parallel']['buffers'] takes a list of the names of forward's arguments (or paths of "
            f"the model's buffers), such as ['input_ids', 'attention_mask']; got {names!r}"
        )
    fits = isinstance(dims, Sequence) and all(dim is None or type(dim) is int for dim in dims)
    if not fits or len(dims) != len(names):
        raise OptionError(
            "options['context_parallel']['buffer_seq_dims'] takes one dimension for each of the buffers, or None for "
            f"one that is whole on all ranks; got {dims!r}"
        )
    if all(dim is None for dim in dims):
        raise OptionError(
            "options['context_parallel']['buffer_seq_dims'] shards no buffer: give the sharded dimension of at least "
            "one, or leave the option out"
        )
    return tuple(zip(names, dims, strict=True))
