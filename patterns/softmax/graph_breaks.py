"""Attention whose parts lie in two graphs, since Dynamo could not trace what stands between them."""

from __future__ import annotations

from torch import fx

from attnrewrite.analysis.scores import sources_of_scores
from attnrewrite.ir.bounds import AROUND_SOFTMAX
from attnrewrite.ir.nodes import is_tensor, tensor
from attnrewrite.ir.ops import is_elementwise, is_view
from attnrewrite.ir.source import break_before, source_location

__all__ = ["cut_before", "cut_behind"]

_ADVICE = "(torch._dynamo.explain names what cannot be traced)"


def cut_before(scores: fx.Node) -> str:
    """Why the scores have no product of query and key if they come from before a graph break; else empty.

    Whether one makes them there is not known here: gates of experts are reported as well.

    Args:
        scores: the argument of a softmax whose result goes into a matrix product.
    """
    pending, seen = [scores], {scores}
    while pending and AROUND_SOFTMAX.allows(len(seen)):
        node = pending.pop()
        if node.op == "placeholder" and tensor(node).dim() >= 2:
            place = break_before(scores.graph)
            return (
                f"the scores come from before the graph break at {place}, so that a product of query and key lies in "
                f"another graph {_ADVICE}"
                if place
                else ""
            )
        for source in sources_of_scores(node) if node.op == "call_function" else ():
            if is_tensor(source) and source not in seen:
                seen.add(source)
                pending.append(source)
    return ""


def cut_behind(weights: fx.Node, ends_at: str) -> str:
    """Why the weights meet no value if they leave the graph at a graph break; else empty.

    Args:
        weights: the result of a softmax of scores.
        ends_at: the break that ends the graph; empty if none does.
    """
    pending, seen, leaves = [weights], {weights}, False
    while ends_at and pending and AROUND_SOFTMAX.allows(len(seen)):
        for user in pending.pop().users:
            leaves = leaves or user.op == "output"
            if user not in seen and (is_view(user) or is_elementwise(user)):
                seen.add(user)
                pending.append(user)
    if not leaves:
        return ""
    where = source_location(weights)
    return (
        f"the attention weights{f' of {where}' if where else ''} leave the graph at a graph break ({ends_at}), so the "
        f"product with the value lies in another graph {_ADVICE}"
    )
