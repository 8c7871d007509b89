"""What a rewriting depends on, written down in full: the key that a rewritten graph is stored under.

    the graph       Dynamo's, legalized: its calls, the lines and modules they come from, what is noted at them
    its inputs      shapes, strides, dtypes, devices, who shares memory, names, symbols with what is known of them
    the request     the options, and the kernels that are asked for
    the process     PyTorch's settings and switches, environment variables, versions of all packages that have kernels,
                    the device, and the source of this package

What a buffer holds is not in it: what each held that was looked at is stored with the graph, and compared.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import fx

from attnrewrite.capture.support import has_storage, storage_of
from attnrewrite.ir.nodes import known_number
from attnrewrite.ir.source import called_from, source_name
from attnrewrite.kernels.registry import LIBRARY_KERNELS, added_kernels
from attnrewrite.options.compile_options import Policy
from attnrewrite.patterns.registry import registered
from attnrewrite.selection.requests import request_in_force
from attnrewrite.torch_private import (
    CHECKPOINT_CONTEXT,
    FakeTensor,
    break_after,
    config_hashes,
    forward_mode_level,
    pytorch_context_parallel,
    shape_environment,
)
from attnrewrite.warm_start.codec import NotStorable, encoded, trusted_name
from attnrewrite.warm_start.replaced import replaced

__all__ = ["key_of", "known_of_sizes"]


def key_of(gm: fx.GraphModule, example_inputs: Sequence[Any], policy: Policy) -> str:
    """The key of a graph, as hexadecimal digits.

    Args:
        gm: Dynamo's graph, legalized and not captured yet.

    Raises:
        NotStorable: the rewriting depends on what is not written down.
    """
    broken = break_after(gm)
    facts = {
        "graph": _graph(gm),
        "break": "" if broken is None else [str(broken.reason), str(broken.user_stack[-1:])],
        "inputs": _inputs(gm, example_inputs),
        "sizes": known_of_sizes(example_inputs),
        "policy": _policy(policy),
        "request": str(request_in_force()),
        "settings": _settings(),
        "environment": _environment(),
        "versions": _versions(),
        "devices": _devices(example_inputs),
    }
    return hashlib.blake2b(json.dumps(facts, sort_keys=True).encode(), digest_size=20).hexdigest()


# -- the graph ---------------------------------------------------------------------------------------------------------

_READ = ("stack_trace", "custom")
_LEFT = frozenset(
    # Follows from the inputs and the calls, or is read nowhere.
    {"example_value", "grapharg", "source_fn_stack", "creation_timestamp", "seq_nr", "from_node"}
)


def _graph(gm: fx.GraphModule) -> dict[str, Any]:
    if gm.meta.get(CHECKPOINT_CONTEXT) is not None:
        raise NotStorable("a checkpoint with a function of its own that says what to keep")
    places = {node: place for place, node in enumerate(gm.graph.nodes)}
    parts = {}
    for node in gm.graph.find_nodes(op="get_attr"):
        part = getattr(gm, str(node.target), None)
        if not isinstance(part, fx.GraphModule):
            raise NotStorable("a tensor in the graph that is no input")
        parts[str(node.target)] = _graph(part)
    return {"class": type(gm).__name__, "nodes": [_node(node, places) for node in places], "parts": parts}


def _node(node: fx.Node, places: dict[fx.Node, int]) -> list[Any]:
    if node.op == "call_module":
        raise NotStorable("a call of a module")
    unknown = node.meta.keys() - _LEFT - {*_READ, "nn_module_stack", "tensor_dict"}
    if unknown:
        raise NotStorable(f"a note {sorted(unknown)[0]!r} at a node")
    target = node.target if isinstance(node.target, str) else trusted_name(node.target)
    # By addresses, which no other process has.
    stack = (node.meta.get("nn_module_stack") or {}).values()
    modules = [[*map(str, entry)] if isinstance(entry, tuple) else str(entry) for entry in stack]
    arguments = [encoded(value, places.__getitem__) for value in (node.args, node.kwargs)]
    notes = [encoded(node.meta.get(key), places.__getitem__) for key in _READ]
    if "attnrewrite_part" in (node.meta.get("custom") or {}):
        raise NotStorable("a part with options of its own (accelerate_attention)")
    return [node.op, node.name, target, *arguments, *notes, modules]


# -- inputs and sizes --------------------------------------------------------------------------------------------------


def _inputs(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> list[Any]:
    storages: dict[Any, int] = {}
    found = []
    for node, given in zip(gm.graph.find_nodes(op="placeholder"), example_inputs, strict=True):
        value = node.meta.get("example_value", given)
        marks = sorted(map(str, node.meta.get("tensor_dict", {})))
        found.append([node.name, source_name(node), marks, _value(value, storages), _value(given, {})])
    return found


def _value(value: Any, storages: dict[Any, int]) -> Any:
    if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return ["symbol", str(value), str(known_number(value))]
    if not isinstance(value, torch.Tensor):
        return ["number", encoded(value, _no_place)]
    plain = type(value) in (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer, FakeTensor)
    if not plain or not has_storage(value) or value.layout is not torch.strided:
        raise NotStorable(f"an input of type {type(value).__name__}")
    sizes = [[*map(str, part), *(str(known_number(size)) for size in part)] for part in (value.shape, value.stride())]
    return [
        type(value).__name__,  # A buffer under a fake mode holds nothing that is read.
        "parameter" if isinstance(value, torch.nn.Parameter) else "tensor",
        *sizes,
        str(value.storage_offset()),
        *map(str, (value.dtype, value.device, value.requires_grad, value.is_leaf)),
        *map(str, (value.is_conj(), value.is_neg(), value.is_inference())),
        storages.setdefault(storage_of(value), len(storages)),
    ]


def _no_place(node: fx.Node) -> int:
    raise NotStorable("a node among the inputs")


def known_of_sizes(example_inputs: Sequence[Any]) -> list[str]:
    """What is known of symbolic sizes, in words that are equal in another process.

    Rewriting that adds to it has put a guard into the user's code, which a stored graph would not.

    Raises:
        NotStorable: a size is made of data.
    """
    environment = shape_environment(example_inputs)
    if environment is None:
        return []
    if (
        environment.unbacked_renamings
        or environment.deferred_runtime_asserts
        or environment.pending_fresh_unbacked_symbols
    ):
        raise NotStorable("sizes that depend on the data")
    return [
        *(f"{symbol} in [{known.lower}, {known.upper}]" for symbol, known in environment.var_to_range.items()),
        *(f"{symbol} is {other}" for symbol, other in environment.replacements.items()),
        *(str(guard.expr) for guard in environment.guards),
        *map(str, environment.divisible),
    ]


# -- the request and the process ---------------------------------------------------------------------------------------


def _policy(policy: Policy) -> dict[str, Any]:
    if policy.inner_backend not in ("inductor", "aot_eager", "eager"):
        # It might read what the rewriting notes at nodes.
        raise NotStorable("another inner compiler than PyTorch's")
    for name in ("cache", "context_parallel", "verify", "tolerance", "autotune", "unread_weights"):
        if getattr(policy, name):
            raise NotStorable(f"the option {name!r}")
    given = {field.name: getattr(policy, field.name) for field in dataclasses.fields(policy)}
    return {
        name: encoded(dict(value) if name == "inner_options" else value, _no_place) for name, value in given.items()
    }


def _settings() -> list[str]:
    """What is switched in PyTorch: the rewriting asks some of it, tracing the rest."""
    if forward_mode_level() >= 0:
        raise NotStorable("forward-mode differentiation")
    if pytorch_context_parallel():
        raise NotStorable("PyTorch's own context_parallel, beside which some graphs are refused")
    cuda, cudnn, mkldnn = torch.backends.cuda, torch.backends.cudnn, torch.backends.mkldnn
    autocasts = [(torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)) for device in ("cpu", "cuda")]
    sdpa = (cuda.flash_sdp_enabled, cuda.math_sdp_enabled, cuda.mem_efficient_sdp_enabled, cuda.cudnn_sdp_enabled)
    switches = (
        *(torch.is_grad_enabled(), torch.is_inference_mode_enabled(), autocasts),
        *(torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()),
        *(torch.get_default_dtype(), torch.get_default_device()),
        torch.utils.deterministic.fill_uninitialized_memory,  # type: ignore[attr-defined]
        # The older names (allow_tf32) raise where the newer ones have set what those cannot say.
        *(part.fp32_precision for part in (torch.backends, cuda.matmul, cudnn.conv, mkldnn.matmul)),  # type: ignore[attr-defined]
        *(cuda.matmul.allow_fp16_reduced_precision_reduction, cuda.matmul.allow_bf16_reduced_precision_reduction),
        *(is_on() for is_on in (*sdpa, cuda.fp16_bf16_reduction_math_sdp_allowed)),  # type: ignore[no-untyped-call]
        *(cudnn.enabled, mkldnn.enabled),
    )
    return [*map(str, switches), config_hashes(), str(called_from.get())]


_READ_VARIABLES = (
    *("ATTNREWRITE_", "DIFFUSERS_ATTN_", "DIFFSYNTH_", "XFORMERS_", "FLASH_"),
    *("TORCH", "PYTORCH", "CUDA", "CUBLAS"),
)
_NOT_READ = ("_DIR", "_LOGS", "_TRACE", "_PATH")


def _environment() -> dict[str, str]:
    return {
        name: value
        for name, value in os.environ.items()
        if name.startswith(_READ_VARIABLES) and not name.endswith(_NOT_READ)
    }


def _versions() -> list[str]:
    """Of everything whose code decides about the rewriting.

    Raises:
        NotStorable: the user has added a kernel or a pattern, or replaced an operator or a function of PyTorch, or this
            package is another on disk than in the process.
    """
    added = [*(kernel.name for kernel in added_kernels()), *(pattern.name for pattern in registered())]
    if added:
        raise NotStorable(f"{added[0]}, which is not attnrewrite's")
    if others := replaced():
        raise NotStorable(f"{others[0]}, which has been replaced")
    packages = sorted({kernel.vendor.package.distribution for kernel in LIBRARY_KERNELS})
    cudnn = torch.backends.cudnn.version()  # type: ignore[no-untyped-call]
    torch_versions = (torch.__version__, torch.version.git_version, torch.version.cuda, torch.version.hip, cudnn)
    return [*map(str, torch_versions), platform.python_version(), _own_source(), *map(_version_of, packages)]


@functools.cache
def _version_of(distribution: str) -> str:
    try:
        return f"{distribution} {importlib.metadata.version(distribution)}"
    except importlib.metadata.PackageNotFoundError:
        return ""


_IMPORTED = time.time()


@functools.cache
def _own_source() -> str:
    """A digest of this package's files: a change in any of them is another version.

    Raises:
        NotStorable: a file has changed since the package was imported.
    """
    root = Path(__file__).parents[1]
    digest = hashlib.blake2b(digest_size=20)
    # Patterns may be a link, which rglob does not follow.
    files = [*root.rglob("*.py"), *root.rglob("*.json"), *(root / "patterns").glob("**/*.py")]
    for file in sorted(set(files)):
        content, status = file.read_bytes(), file.stat()
        if max(status.st_ctime, status.st_mtime) > _IMPORTED:
            raise NotStorable(f"{file.name}, which has changed since it was imported")
        digest.update(str(file.relative_to(root)).encode())
        digest.update(content)
    return digest.hexdigest()


def _devices(example_inputs: Sequence[Any]) -> list[str]:
    """Of the inputs, and the GPUs, on which the graph may make tensors."""
    found = {value.device for value in example_inputs if isinstance(value, torch.Tensor)}
    found.update(torch.device("cuda", number) for number in range(torch.cuda.device_count()))
    is_set_up: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    current = torch.cuda.current_device() if is_set_up else 0
    return [*sorted(map(_device, found)), f"cuda:{current} is current"]


def _device(device: torch.device) -> str:
    if device.type == "cuda":
        # Not the whole: it names the one board.
        known = torch.cuda.get_device_properties(device)
        return f"{device} {known.name} {known.major}.{known.minor} {known.total_memory} {known.multi_processor_count}"
    if device.type == "cpu":
        return f"{device} {platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    raise NotStorable(f"a device of type {device.type}")
