"""Models on several processes: what one of them finds.

    python -m tests.support.parallel_models FOLDER RANK WORLD DEVICE CASE...

The processes meet in a file of FOLDER, and each writes what it found there, as JSON.
"""

from __future__ import annotations

import copy
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from attnrewrite.backend import collect_reports
from tests.support.helpers import counted, relative_error, rewritten
from tests.support.small_models import bert, llama

__all__ = ["MODELS", "WAYS"]

Models = tuple[nn.Module, Callable[[nn.Module], list[nn.Module]], dict[str, Any]]
"""A model, what its layers are, and the plan of tensor parallelism of a layer."""


def _llama() -> Models:
    columns = {f"self_attn.{name}_proj": ColwiseParallel() for name in "qkv"}
    columns |= {f"mlp.{name}_proj": ColwiseParallel() for name in ("gate", "up")}
    rows = {"self_attn.o_proj": RowwiseParallel(), "mlp.down_proj": RowwiseParallel()}
    return llama(heads=16, initializer_range=0.1).train(), lambda model: list(model.layers), {**columns, **rows}


def _bert() -> Models:
    columns = {f"attention.self.{name}": ColwiseParallel() for name in ("query", "key", "value")}
    columns |= {"intermediate.dense": ColwiseParallel()}
    rows = {"attention.output.dense": RowwiseParallel(), "output.dense": RowwiseParallel()}
    return bert(heads=16, initializer_range=0.1).train(), lambda model: list(model.encoder.layer), {**columns, **rows}


MODELS = {"llama": _llama, "bert": _bert}


def _tensor_parallel(models: Models, mesh: DeviceMesh) -> nn.Module:
    model, layers, plan = models
    for layer in layers(model):
        parallelize_module(layer, mesh, plan)
    return model


def _sharded(models: Models, mesh: DeviceMesh) -> nn.Module:
    model, layers, _ = models
    for layer in layers(model):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def _both(models: Models, mesh: DeviceMesh) -> nn.Module:
    _tensor_parallel(models, mesh["tensor"])
    return _sharded(models, mesh["data"])


def _copied(models: Models, mesh: DeviceMesh) -> nn.Module:
    # Buckets so small that Dynamo cuts the graph within each layer.
    vars(dist)["_DEFAULT_FIRST_BUCKET_BYTES"] = 2**14
    return DistributedDataParallel(models[0], process_group=mesh.get_group(), bucket_cap_mb=2**14 / 2**20)


WAYS: dict[str, tuple[Callable[[Models, DeviceMesh], nn.Module], tuple[str, ...]]] = {
    "tensor": (_tensor_parallel, ("tensor",)),
    "fsdp": (_sharded, ("data",)),
    "ddp": (_copied, ("data",)),
    "tensor_fsdp": (_both, ("data", "tensor")),
}
"""How a model is made parallel, and the dimensions of the mesh."""


def _mesh(device: str, names: tuple[str, ...]) -> DeviceMesh:
    world = dist.get_world_size()
    shape = (world,) if len(names) == 1 else (max(world // 2, 1), min(world, 2))
    return init_device_mesh(device, shape, mesh_dim_names=names)


def _hidden(model: nn.Module, tokens: Tensor, padding: Tensor) -> Tensor:
    result: Tensor = model(input_ids=tokens, attention_mask=padding)[0]
    return result


def _found(case: str, device: str) -> dict[str, Any]:
    """How far a parallel model, compiled, is from the same model in one process, and what was rewritten.

    Each process of a dimension of the mesh that shares out the data gets a sequence of its own, of which the gradients
    are the mean.
    """
    name, way, mode = case.split("-")
    parallel, names = WAYS[way]
    torch.manual_seed(0)
    models = MODELS[name]()
    models[0].to(device)
    single = copy.deepcopy(models[0])
    mesh = _mesh(device, names)
    shards = mesh["data"].size() if "data" in names else 1
    own = mesh["data"].get_local_rank() if "data" in names else 0
    tokens = torch.randint(64, (2 * shards, 16)).to(device)
    padding = torch.ones_like(tokens)
    padding[::2, :3] = 0
    parts = list(zip(tokens.chunk(shards), padding.chunk(shards), strict=True))
    model = parallel(models, mesh)

    def run(compiled: Any) -> tuple[Tensor, list[Tensor]]:
        model.zero_grad()
        if mode == "inference":
            with torch.no_grad():
                return _hidden(compiled, *parts[own]), []
        found = _hidden(compiled, *parts[own])
        torch.autograd.backward([found.square().mean()])
        return found, _gradients(model)

    plain_graphs, _ = counted(lambda: run(torch.compile(model, backend="eager")))
    with collect_reports() as graphs:
        own_graphs, (output, gradients) = counted(lambda: run(rewritten(model, "aot_eager")))
    expected = [_hidden(single, *part) for part in parts]
    torch.autograd.backward([torch.stack([part.square().mean() for part in expected]).mean()])
    return {
        "plain_graphs": plain_graphs,
        "graphs": own_graphs,
        "error": relative_error(output, expected[own]),
        "gradients": _error_of_gradients(gradients, _gradients(single)) if gradients else 0.0,
        "sites": [[site.status, site.reason] for graph in graphs for site in graph.sites],
        "left": [graph.reason for graph in graphs if not graph.captured],
    }


def _gradients(model: nn.Module) -> list[Tensor]:
    found = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    return [gradient.full_tensor() if isinstance(gradient, DTensor) else gradient for gradient in found]


def _error_of_gradients(found: list[Tensor], expected: list[Tensor]) -> float:
    """The largest error, relative to each gradient; that of a key's bias is zero but for rounding."""
    largest = max(gradient.abs().max() for gradient in expected)
    pairs = list(zip(found, expected, strict=True))
    some = [pair for pair in pairs if pair[1].abs().max() > 1e-5 * largest]
    rest = [(a - b).abs().max() / largest for a, b in pairs if b.abs().max() <= 1e-5 * largest]
    return max([relative_error(*zip(*some, strict=True)), *map(float, rest)])


def main(folder: str, rank: str, world: str, device: str, *cases: str) -> None:
    os.environ.update(RANK=rank, WORLD_SIZE=world, LOCAL_RANK=rank, ATTNREWRITE_RAISE="1", HF_HUB_OFFLINE="1")
    torch.set_num_threads(1)
    if device == "cuda":
        torch.cuda.set_device(int(rank))
    meeting = Path(folder) / "meeting"
    dist.init_process_group(
        "nccl" if device == "cuda" else "gloo", f"file://{meeting}", rank=int(rank), world_size=int(world)
    )
    found = {case: _found(case, device) for case in cases}
    (Path(folder) / f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
