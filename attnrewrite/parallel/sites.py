"""How each attention gets what it needs of other ranks: its keys gathered, sent round a ring, or heads for positions.

Whatever is proved of an attention in the graph that was traced holds at every length of its shards, and so of the whole
sequence: a mask that is causal there is causal over all ranks' positions.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import sympy
from torch import fx

from attnrewrite.errors import ContextParallelError
from attnrewrite.ir.axes import Axis, Operand, axes_of
from attnrewrite.ir.site import AttentionSite, NotAttention
from attnrewrite.ir.source import source_location
from attnrewrite.options.compile_options import Policy
from attnrewrite.options.context_parallel import ContextParallel
from attnrewrite.parallel.lengths import Lengths, expression
from attnrewrite.parallel.placement import Shard
from attnrewrite.parallel.ring import Ring
from attnrewrite.passes.canonicalize import canonicalized
from attnrewrite.passes.find import find
from attnrewrite.passes.rewriting import current_site
from attnrewrite.passes.splice import WrittenByRegion, splice
from attnrewrite.passes.unrepeat_kv import unrepeat_kv
from attnrewrite.patterns import GraphView

__all__ = ["Plan", "plan_sites"]


@dataclass
class Plan:
    """What was decided for the attentions of a graph.

    Attributes:
        by_heads: results of attentions that are computed for some of the heads, each with where they are in it.
        operands: queries, keys and values of these.
        inside: what lies between.
        notes: each attention's kernel and why, for the report.
    """

    by_heads: dict[fx.Node, Shard] = field(default_factory=dict)
    operands: set[fx.Node] = field(default_factory=set)
    inside: set[fx.Node] = field(default_factory=set)
    notes: list[str] = field(default_factory=list)


def plan_sites(gm: fx.GraphModule, policy: Policy, option: ContextParallel, lengths: Lengths) -> Plan:
    """Decides for each attention over the sequence; ring attentions are spliced into the graph.

    Raises:
        ContextParallelError: the kernel that the option names cannot serve an attention.
    """
    plan = Plan()
    replaced: dict[fx.Node, fx.Node] = {}
    view = GraphView(gm)
    for found in unrepeat_kv(find(view), view):
        if not isinstance(found, AttentionSite):
            continue
        site = current_site(found, replaced, policy)
        if not _is_over_sequence(site.key_axes, lengths):
            continue
        where = source_location(site.anchor)
        refusal = "the keys are gathered"
        if option.kernel in ("auto", "ring"):
            refusal = _ring(gm, site, policy, option, lengths, replaced)
        elif option.kernel == "ulysses":
            refusal = _by_heads(site, option, lengths, plan)
        if refusal and option.kernel in ("ring", "ulysses"):
            raise ContextParallelError(
                f"context_parallel: {option.kernel} cannot serve the attention at {where}: {refusal} (use "
                "kernel='auto' or 'gather')"
            )
        kernel = "gather" if refusal else "ring" if option.kernel == "auto" else option.kernel
        plan.notes.append(f"context_parallel: {kernel} at {where}" + (f" ({refusal})" if refusal else ""))
    return plan


def _is_over_sequence(axes: tuple[Axis, ...], lengths: Lengths) -> bool:
    return any(lengths.depends(axis.size) for axis in axes_of((axes,)))


def _ring(
    gm: fx.GraphModule,
    site: AttentionSite,
    policy: Policy,
    option: ContextParallel,
    lengths: Lengths,
    replaced: dict[fx.Node, fx.Node],
) -> str:
    """Splices a ring attention; why not, if it cannot serve."""
    if len(site.query_axes) != 1 or len(site.key_axes) != 1 or not _is_over_sequence(site.query_axes, lengths):
        return "queries or keys are not positions of a sharded sequence alone"
    kernel = Ring(option)
    try:
        attention = canonicalized(site, policy)
    except NotAttention as reason:
        return str(reason)
    verdict = kernel.supports(attention)
    if not verdict.willing:
        return verdict.reason
    splice(gm, attention, kernel, replaced, WrittenByRegion(gm.graph))
    return ""


def _by_heads(site: AttentionSite, option: ContextParallel, lengths: Lengths, plan: Plan) -> str:
    """Plans an attention for some of the heads; why not, if it cannot be."""
    if not _is_over_sequence(site.query_axes, lengths):
        return "its queries are not positions of a sharded sequence"
    operands = [Operand(site.result, site.result_layout), site.query, site.key, site.value]
    nodes = [operand.resolved() for operand in operands]
    for axis in reversed(site.shared_axes):
        size = axis.size
        if not isinstance(size, int) or size % option.ranks:
            continue
        shards = [shard for operand in nodes if (shard := _shard_of(axis, operand, option.ranks)) is not None]
        if len(shards) < len(nodes):
            continue
        sources = [operand.node for operand in nodes[1:]]
        plan.by_heads[site.result] = shards[0]
        plan.operands.update(sources)
        plan.inside |= _between(sources, site.result)
        return ""
    sizes = ", ".join(str(axis.size) for axis in site.shared_axes) or "none"
    return f"no number of heads of key and value ({sizes}) is a multiple of the {option.ranks} ranks"


def _shard_of(axis: Axis, operand: Operand, ranks: int) -> Shard | None:
    for dim, axes in enumerate(operand.layout):
        if axes and axes[0] is axis:
            inner = sympy.prod([expression(each.size) for each in axes[1:]])
            return Shard(dim, expression(axis.size) / ranks, inner=inner, of_heads=True)
    return None


def _between(sources: list[fx.Node], result: fx.Node) -> set[fx.Node]:
    """What lies on the ways from the sources to the result, without them."""
    reached: set[fx.Node] = set()
    pending = list(sources)
    while pending:
        for user in pending.pop().users:
            if user not in reached and user is not result:
                reached.add(user)
                pending.append(user)
    needed: set[fx.Node] = set()
    pending = [result]
    while pending:
        for node in pending.pop().all_input_nodes:
            if node in reached and node not in needed and node not in sources:
                needed.add(node)
                pending.append(node)
    return needed
