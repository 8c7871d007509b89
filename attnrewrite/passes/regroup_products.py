"""Sums of products with parts of the weights, or with sums of weights, as products with the weights themselves.

Keys in several parts (:mod:`attnrewrite.passes.split_keys`), sums of attention weights
(:mod:`attnrewrite.passes.weight_sums`), weights that are divided by a sum that is known
(:mod:`attnrewrite.passes.renormalization`) or is not (:mod:`attnrewrite.passes.divided_weights`), and plain steps in
another form (:mod:`attnrewrite.passes.plain_steps`) get the form in which patterns read attention, before these look at
the graph.
Where no kernel takes an attention in the end, the source's form is put back.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import fx

from attnrewrite.ir.builder import Builder
from attnrewrite.ir.graph_view import GraphView
from attnrewrite.ir.nodes import is_tensor, same_shape, tensor
from attnrewrite.ir.ops import ADD_OPS
from attnrewrite.ir.products import contraction_of
from attnrewrite.ir.reason import Reason
from attnrewrite.passes.divided_weights import divided_after_product, may_be_divided
from attnrewrite.passes.plain_steps import may_be_plain, plain_step
from attnrewrite.passes.regrouping import Found, NotRegrouped, Weights, require_one_region
from attnrewrite.passes.renormalization import may_be_renormalized, renormalized
from attnrewrite.passes.saved_nodes import SavedNode
from attnrewrite.passes.splice import latest, remove_unused, replace_node
from attnrewrite.passes.split_keys import joined_scores, joined_values
from attnrewrite.passes.weight_sums import sum_of_attentions
from attnrewrite.patterns import Finding, NearMiss
from attnrewrite.report.rows import SiteReport
from attnrewrite.torch_private import is_erased

__all__ = ["Regrouped", "regroup_products"]

aten = torch.ops.aten


@dataclass(frozen=True)
class _Change:
    """One sum in its new form.

    Attributes:
        old, new: the node of the sum, and the one that took its place.
        products: the products in the new form.
        removed: the nodes of the source's form, in graph order.
    """

    old: fx.Node
    new: fx.Node
    products: tuple[fx.Node, ...]
    removed: tuple[SavedNode, ...]


@dataclass
class Regrouped:
    """What was changed, and why sums were left as they are, by the softmaxes that take part."""

    changes: list[_Change] = field(default_factory=list)
    reasons: dict[fx.Node, Reason] = field(default_factory=dict)

    def with_reasons(self, findings: Sequence[Finding]) -> list[Finding]:
        """The findings, where a near miss says why its sum was left as it is."""
        return [
            replace(each, reason=str(self.reasons[each.anchor]))
            if isinstance(each, NearMiss) and each.anchor in self.reasons
            else each
            for each in findings
        ]

    def name_source(self, row: SiteReport, result: fx.Node) -> None:
        """Gives the row of a site the nodes of its source; none if no node of the source has the site's result."""
        for change in self.changes:
            if result in change.products:
                names = tuple(saved.node.name for saved in change.removed)
                row.nodes_before = (*row.nodes_before, *names) if result is change.new else ()

    def undo(self, graph: fx.Graph, replaced: dict[fx.Node, fx.Node]) -> None:
        """Puts back the source's form of sums of which no kernel computes a product."""
        for change in reversed(self.changes):
            at = latest(change.new, replaced)
            if is_erased(at) or any(map(is_erased, change.products)):
                continue
            written: dict[fx.Node, fx.Node] = {}
            for saved in change.removed:
                current = ChainMap(written, {node: latest(node, replaced) for node in saved.reads})
                written[saved.node] = saved.write(graph, at, current.__getitem__)
            at.replace_all_uses_with(written[change.old])
            replaced.update(written)
            replaced[at] = written[change.old]
            remove_unused(graph, (at,))


def regroup_products(view: GraphView, replaced: dict[fx.Node, fx.Node]) -> Regrouped:
    """Brings sums into the new form, in place; ``replaced`` is told what took the place of a node."""
    result = Regrouped()
    weights = Weights(view.graph)
    if weights.nodes:
        divisions = [node for node in view.graph.nodes if may_be_renormalized(node)]
        _regroup(divisions, renormalized, weights, view, replaced, result)
        quotients = [node for node in view.graph.nodes if may_be_divided(node)]
        _regroup(quotients, divided_after_product, weights, view, replaced, result)
        # Backwards, past the nodes of new forms as well: these may have new forms themselves.
        others = (node for node in reversed(view.graph.nodes) if not is_erased(node) and _may_have_new_form(node))
        _regroup(others, partial(_new_form, view), weights, view, replaced, result)
    return result


def _regroup(
    nodes: Iterable[fx.Node],
    new_form: Callable[[fx.Node, Builder, Weights, set[fx.Node]], Found | None],
    weights: Weights,
    view: GraphView,
    replaced: dict[fx.Node, fx.Node],
    result: Regrouped,
) -> None:
    """Brings nodes into their new form, if they have one, in place."""
    for node in nodes:
        if is_erased(node):
            continue
        builder = Builder(view.gm, before=node, like=node)
        softmaxes: set[fx.Node] = set()
        try:
            found = new_form(node, builder, weights, softmaxes)
            if found is not None:
                _require_alike(node, found, builder, view)
        except NotRegrouped as reason:
            for softmax in softmaxes:
                result.reasons.setdefault(softmax, Reason(str(reason)))
            for each in reversed(builder.created):
                view.graph.erase_node(each)
        else:
            if found is not None:
                result.changes.append(_replaced(node, found, builder, view, replaced))


def _may_have_new_form(node: fx.Node) -> bool:
    """Whether the node is of the kinds that are looked at: a sum, a concatenation, a product, a plain step."""
    if node.op != "call_function" or not is_tensor(node):
        return False
    added = node.target in ADD_OPS or node.target is aten.cat.default
    return added or contraction_of(node) is not None or may_be_plain(node)


def _new_form(
    view: GraphView, node: fx.Node, builder: Builder, weights: Weights, softmaxes: set[fx.Node]
) -> Found | None:
    return (
        joined_values(node, builder, view, weights, softmaxes)
        or joined_scores(node, builder, view, weights, softmaxes)
        or sum_of_attentions(node, builder, weights, softmaxes)
        or plain_step(node, builder, weights, softmaxes)
    )


def _require_alike(node: fx.Node, found: Found, builder: Builder, view: GraphView) -> None:
    """
    Raises:
        NotRegrouped: the new form is computed in other modes than the source's, or is another tensor.
    """
    require_one_region(node, builder, view)
    alike = tensor(found.new).dtype is tensor(node).dtype
    if not alike or not same_shape(tensor(found.new).shape, tensor(node).shape):
        raise NotRegrouped("the sum of products would have another shape or dtype than the source's")


def _replaced(
    node: fx.Node, found: Found, builder: Builder, view: GraphView, replaced: dict[fx.Node, fx.Node]
) -> _Change:
    saved: list[SavedNode] = []
    for each in view.graph.nodes:
        saved.append(SavedNode.of(each))
        if each is node:
            break
    replace_node(view.graph, node, found.new, builder, replaced)
    removed = tuple(each for each in saved if is_erased(each.node))
    return _Change(node, replaced[node], found.products, removed)
