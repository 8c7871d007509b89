"""Context parallelism for a captured graph: from the option to the graph of the rank's part."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import fx

from attnrewrite.errors import ContextParallelError
from attnrewrite.ir.model_state import is_model_state
from attnrewrite.ir.nodes import tensor
from attnrewrite.ir.source import ENDS_AT, break_before, parameter_path, source_name
from attnrewrite.options.compile_options import Policy
from attnrewrite.options.context_parallel import ContextParallel
from attnrewrite.parallel.conditions import Conditions
from attnrewrite.parallel.lengths import Lengths, expression
from attnrewrite.parallel.partition import Partition
from attnrewrite.parallel.placement import Shard
from attnrewrite.parallel.sites import plan_sites
from attnrewrite.torch_private import pytorch_context_parallel

__all__ = ["parallelize"]


def parallelize(gm: fx.GraphModule, policy: Policy, option: ContextParallel) -> tuple[Conditions, list[str]]:
    """Makes of a captured graph, in place, that of the rank's part of the whole sequence.

    Args:
        gm: the IR, traced with this rank's shards.

    Returns:
        What has to hold of the lengths at each call, and notes for the report.

    Raises:
        ContextParallelError: the graph's meaning for the whole sequence is not known.
    """
    if pytorch_context_parallel():
        raise ContextParallelError(
            "context_parallel: PyTorch's own context_parallel is active as well, which exchanges keys a second time: "
            "use only one of them"
        )
    _refuse_breaks(gm)
    _refuse_parts(gm)
    shards = _sharded_inputs(gm, option)
    lengths = _lengths(gm, shards, option)
    _refuse_other_uses(gm, shards, lengths)
    conditions = Conditions(gm, lengths, shards, option)
    plan = plan_sites(gm, policy, option, lengths)
    Partition(gm, lengths, shards, plan, option).run()
    return conditions, plan.notes


def _refuse_breaks(gm: fx.GraphModule) -> None:
    ends, begins = gm.meta.get(ENDS_AT), break_before(gm.graph)
    if ends or begins:
        place = ends or begins
        raise ContextParallelError(
            f"context_parallel: the model is compiled in several graphs (graph break: {place}), and which tensors "
            "between them are sharded is not known: compile it with fullgraph=True, or compile the blocks by themselves"
        )


def _refuse_parts(gm: fx.GraphModule) -> None:
    for node in gm.graph.nodes:
        if node.op == "call_module" or isinstance(node.meta.get("val"), fx.GraphModule):
            raise ContextParallelError(
                "context_parallel: the graph has a region, branch or loop of its own, which is not read: call the "
                "region directly"
            )


def _path(source: str) -> str:
    """``x``, ``x.0``, ``kwargs.mask``: an argument of forward, or what is in it."""
    path = re.sub(r"^[LG]\[['\"]([^'\"]+)['\"]\]", r"\1", source)
    return re.sub(r"\[['\"]?([^'\"\]]+)['\"]?\]", r".\1", path)


def _names(node: fx.Node) -> list[str]:
    """The names under which an input may be listed."""
    path = _path(source_name(node))
    pieces = path.split(".")
    names = [".".join(pieces[: end + 1]) for end in range(len(pieces))]
    names += [name.split(".", 1)[1] for name in names if name.startswith(("kwargs.", "args."))]
    return [parameter_path(node)] if parameter_path(node) else names


def _sharded_inputs(gm: fx.GraphModule, option: ContextParallel) -> dict[fx.Node, Shard]:
    listed = dict(option.buffers)
    shards, found, others = {}, set(), []
    for node in gm.graph.find_nodes(op="placeholder"):
        if not isinstance(node.meta["val"], torch.Tensor):
            continue
        names = [name for name in _names(node) if name in listed]
        found.update(names)
        if not names:
            if not is_model_state(node) and tensor(node).dim() > 0:
                others.append(_path(source_name(node)) or node.name)
            continue
        dim = listed[names[-1]]
        if dim is not None:
            shards[node] = _shard(node, dim, names[-1])
    if others:
        raise ContextParallelError(
            f"context_parallel: whether {', '.join(others)} is sharded is not said: add it to buffers, with its "
            "sequence dimension in buffer_seq_dims, or None if it is whole on all ranks"
        )
    if not shards:
        raise ContextParallelError(
            f"context_parallel: no tensor of this graph is among the sharded buffers ({', '.join(listed)}): list the "
            "arguments of what is compiled, or compile the whole model with fullgraph=True"
        )
    return shards


def _shard(node: fx.Node, dim: int, name: str) -> Shard:
    value = tensor(node)
    if not -value.dim() <= dim < value.dim():
        raise ContextParallelError(
            f"context_parallel: {name} has {value.dim()} dimensions, and buffer_seq_dims says {dim}"
        )
    dim %= value.dim()
    size = value.shape[dim]
    if isinstance(size, int):
        raise ContextParallelError(
            f"context_parallel: the length of {name} is fixed at {size}, so that numbers which the model computes from "
            f"it cannot be told from others: call torch._dynamo.mark_dynamic({name}, {dim}) before the first call, or "
            "compile with dynamic=True"
        )
    return Shard(dim, expression(size))


def _lengths(gm: fx.GraphModule, shards: dict[fx.Node, Shard], option: ContextParallel) -> Lengths:
    known: dict[Any, Any] = {}
    for node in gm.graph.find_nodes(op="placeholder"):
        value = node.meta["val"]
        for size in value.shape if isinstance(value, torch.Tensor) else [value]:
            if isinstance(size, (torch.SymInt, torch.SymFloat)) and expression(size).is_Symbol:
                known.setdefault(expression(size), size)
    symbols = {symbol for shard in shards.values() for symbol in shard.length.free_symbols}
    return Lengths({symbol: known[symbol] for symbol in symbols}, known, option.ranks, option.rank)


def _refuse_other_uses(gm: fx.GraphModule, shards: dict[fx.Node, Shard], lengths: Lengths) -> None:
    """Refuses inputs that have the length of a shard elsewhere: by chance, or since they are shards as well."""
    sizes = {f"{source_name(node)}.size()[{shard.dim}]" for node, shard in shards.items()}
    for node in gm.graph.find_nodes(op="placeholder"):
        value, path = node.meta["val"], _path(source_name(node)) or node.name
        if isinstance(value, torch.Tensor):
            own = shards[node].dim if node in shards else None
            for dim, size in enumerate(value.shape):
                if dim != own and lengths.depends(size):
                    raise ContextParallelError(
                        f"context_parallel: dimension {dim} of {path} has the length of a sharded sequence, "
                        f"{size}: add it to buffers if it is sharded there; if the two are equal by chance, mark only "
                        "the sharded dimensions dynamic (torch._dynamo.mark_dynamic), or make the first call with "
                        "other sizes"
                    )
        elif lengths.depends(value) and source_name(node) not in sizes:
            raise ContextParallelError(
                f"context_parallel: the argument {path} is the length of a rank's shard, and the model would take it "
                "for that of the whole: read the length off a tensor"
            )
