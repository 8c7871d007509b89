"""stub"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from torch import fx

Kind = Literal["spatial", "temporal", "cross"]


def kinds_of(gm: fx.GraphModule, sites: Sequence[Any]) -> list[tuple[Kind, str]]:
    deps: dict[fx.Node, frozenset[fx.Node]] = {}
    for n in gm.graph.nodes:
        if n.op == "placeholder":
            deps[n] = frozenset() if "_dynamo_static_input_type" in n.meta.get("tensor_dict", {}) else frozenset([n])
        else:
            deps[n] = frozenset().union(*(deps.get(i, frozenset()) for i in n.all_input_nodes))
    out = []
    from attnrewrite.ir import source_location

    for s in sites:
        q, k = deps.get(s.query.node, frozenset()), deps.get(s.key.node, frozenset())
        loc = source_location(s.anchor)
        kind = "cross" if not q <= k else ("temporal" if loc and "temporal" in loc.module else "spatial")
        out.append((kind, "stub"))
    return out
