"""Linear attention: without softmax it is a product of three matrices, which can be multiplied in either order.

    result = phi(query) @ (phi(key)^T @ value) / (phi(query) @ sum_j phi(key)_j + eps)        linear in the length
           = (phi(query) @ phi(key)^T) @ value / (sum_j (phi(query) @ phi(key)^T)_ij + eps)   quadratic in it

The feature map ``phi`` acts on each key and query by itself (ReLU, elu + 1, exp, softmax over the features), or over
the positions of the keys (softmax). The normalizer may be absent, a sum of its own, or one more column of ones in the
value, by which the other columns are divided. Which order costs less goes by the sizes; they differ in rounding alone.

The rule: one operand of a product is, behind views and scalings, another product. The axes that the two products sum
over meet in one operand, the key; the other operands have rows of their own. So far it is any chain of three matrices,
such as a low-rank weight. It is attention if all three are computed from the inputs, and if either the key and one of
the others went through a feature map, or the result is normalized by the sum over the keys.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, fx

from attnrewrite.analysis.features import Features, features_of
from attnrewrite.analysis.scores import FLOATING, leads_to_product, sources_of_scores
from attnrewrite.analysis.values import constant_value, why_not_finite
from attnrewrite.ir.axes import Axis, Layout, Operand, axes_of, broadcast, fresh_layout, resolve
from attnrewrite.ir.bounds import BEHIND_DIVISOR, BETWEEN_PRODUCTS, Ended, searching
from attnrewrite.ir.finding import Finding, NearMiss
from attnrewrite.ir.graph_view import GraphView, reader_in_words
from attnrewrite.ir.linear_site import LinearAttention, Order
from attnrewrite.ir.model_state import is_learned
from attnrewrite.ir.nodes import dtype_name, is_tensor, marks_of, same_shape, scalar, tensor
from attnrewrite.ir.ops import (
    ADD_OPS,
    CLAMP_OPS,
    DIV_OPS,
    MASKED_FILL_OPS,
    MUL_OPS,
    PIECE_OPS,
    SUB_OPS,
    TRIANGLE_OPS,
    WHERE_OPS,
    is_cast,
)
from attnrewrite.ir.products import Product, factors_of, is_product, product_from_result
from attnrewrite.ir.reason import FINE, Reason
from attnrewrite.ir.site import Scale
from attnrewrite.ir.views import is_layout_op, pull
from attnrewrite.patterns.base import Specimen
from attnrewrite.patterns.perturbed import LINEAR_SPECIMENS
from attnrewrite.patterns.sample_inputs import Specimens, keep, normal
from attnrewrite.torch_private import operator_name

__all__ = ["PATTERN"]

aten = torch.ops.aten


class LinearAttentionPattern:
    name = "linear"
    precedence = 40

    @property
    def specimens(self) -> tuple[Specimen, ...]:
        return (*_spelling, *LINEAR_SPECIMENS)

    def find(self, view: GraphView) -> Iterator[Finding]:
        reader = _LinearReader(self.name, view)
        for node in view.graph.nodes:
            if node.op == "call_function" and is_product(node):
                yield from reader.read(node)


@dataclass(frozen=True)
class _Between:
    """What lies between the product of two and the product of all three, beginning at the latter.

    ``mask``: why the order is part of what is computed: a mask or decay over pairs, dropout or a running sum.
    """

    first: Product
    nodes: tuple[fx.Node, ...]
    layouts: tuple[Layout, ...]
    scales: tuple[tuple[int, Scale], ...]
    mask: Reason
    casts: bool


class _LinearReader:
    """Reads linear attention off one graph."""

    def __init__(self, pattern: str, view: GraphView) -> None:
        self._pattern = pattern
        self._view = view
        self._computed = _Computed(view)

    def read(self, second: fx.Node) -> Iterator[Finding]:
        """The finding whose last product is ``second``; nothing if it is not a product of three."""
        product = product_from_result(second, fresh_layout(tensor(second).shape))
        if product is None or product.addend is not None or not product.contracted:
            return
        for operand, outer in ((product.lhs, product.rhs), (product.rhs, product.lhs)):
            with searching() as ended:
                between = _WayBack(operand, product.contracted, self._view).between()
                site = None if between is None else self._product_of_three(product, outer, between)
                finding = None if between is None or site is None else self._attention(site, between, ended)
            if finding is None and ended:
                # Whether it is attention is not known, so no node is claimed for it.
                finding = NearMiss(self._pattern, second, Reason(f"{_NOT_KNOWN}: {ended}"))
            if finding is not None:
                yield finding
                return

    def _product_of_three(self, second: Product, outer: Operand, between: _Between) -> LinearAttention | None:
        """The three operands and their axes, as if the order were linear; None if the axes are not attention's."""
        first = between.first
        then_summed = axes_of((second.contracted,))
        first_summed = axes_of((first.contracted,))
        sides = [(first.lhs, first.rhs), (first.rhs, first.lhs)]
        middle, inner = next(
            ((a, b) for a, b in sides if set(then_summed) <= set(a.axes) and not set(then_summed) & set(b.axes)),
            (None, None),
        )
        if middle is None or inner is None:
            return None
        if not between.mask and (not first_summed or set(first_summed) & set(outer.axes)):
            return None
        outer, middle, inner = (
            self._view.origin(part, at).resolved()
            for part, at in ((outer, second.node), (middle, first.node), (inner, first.node))
        )
        site = LinearAttention(
            self._pattern,
            second.node,
            second.node,
            resolve(second.layout),
            "linear",
            outer,
            middle,
            inner,
            first_summed,
            then_summed,
            scales=(
                *(scale for _, scale in sorted(between.scales, key=lambda each: each[0])),
                *([Scale(second.factor)] if second.factor != 1 else []),
                *([Scale(second.scale)] if second.scale is not None else []),
            ),
            dtype=tensor(second.node).dtype,
            interior=self._view.ordered([*first.nodes, *between.nodes, *second.nodes]),
        )
        if not (
            set(then_summed) <= {*outer.axes} & {*middle.axes} and set(first_summed) <= {*middle.axes} & {*inner.axes}
        ):
            return None  # One that is the same all along what is summed over.
        # A running sum has the positions of queries and keys in one.
        if not site.inner_axes or not (site.outer_axes or between.mask) or site.dtype not in FLOATING:
            return None
        return site

    def _attention(self, site: LinearAttention, between: _Between, ended: Ended) -> Finding | None:
        """The product of three as attention; None if neither feature maps nor a normalizer show that it is one."""
        if not all(self._computed.holds(part.node) for part in site.operands):
            return None
        outer, middle, inner = (features_of(part.node, self._is_attention) for part in site.operands)
        sums = _sums(site, between)
        normalizer, divided = _normalizer(site, sums)
        if sums and not _is_map_of_both(middle, inner):
            return None  # The sum of a product that may have any sign is no normalizer.
        order = divided or _order(outer, middle, inner)
        if order is None:
            return None
        own = (outer if order == "linear" else inner, middle)
        site = replace(
            site,
            sums=tuple(sums.values()),
            normalizer=normalizer,
            order=order,
            features=tuple(
                f"{map_.name} of {role}" for map_, role in zip(own, ("query", "key"), strict=True) if map_.name
            ),
            nonnegative=all(map_.nonnegative for map_ in own),
        )
        if between.mask:
            return NearMiss(self._pattern, site.result, between.mask, site.interior)
        return replace(site, fixed=_fixed(site, between, sums, self._view, ended))

    def _is_attention(self, softmax: fx.Node) -> bool:
        """Whether a softmax is one of scores, each of which is a product of two computed tensors."""
        pending, seen = [softmax.args[0]], set()
        while pending:
            node: Any = pending.pop()
            if not is_tensor(node) or node.op != "call_function" or node in seen:
                continue
            seen.add(node)
            if is_product(node):
                product = product_from_result(node, fresh_layout(tensor(node).shape))
                if product is None or all(self._computed.holds(part.node) for part in (product.lhs, product.rhs)):
                    return True
            else:
                pending.extend(sources_of_scores(node))
        return False


class _Computed:
    """Which tensors of a graph depend on an input that is no parameter."""

    def __init__(self, view: GraphView) -> None:
        self._view = view
        self._known: dict[fx.Node, bool] = {}

    def holds(self, node: fx.Node) -> bool:
        if not self._known:
            for each in self._view.graph.nodes:
                self._known[each] = self._of(each)
        return self._known[node]

    def _of(self, node: fx.Node) -> bool:
        if isinstance(node.meta.get("val"), (int, float, torch.SymInt, torch.SymFloat, torch.SymBool)):
            return False  # A size says nothing of what is in a tensor.
        if node.op == "placeholder":
            return not is_learned(node)
        return any(self._known[source] for source in node.all_input_nodes)


# Between the products.


class _WayBack:
    """The way from ``operand`` of a product, which sums over ``summed``, back to another product."""

    def __init__(self, operand: Operand, summed: tuple[Axis, ...], view: GraphView) -> None:
        self._operand = operand
        self._summed = summed
        self._memo = view.leads_to_product
        self._passed: list[Operand] = []
        self._scales: list[tuple[int, Scale]] = []
        self._mask = FINE
        self._casts = False

    def between(self) -> _Between | None:
        """What lies on the way; None if it leads to no product."""
        place: Operand | None = self._operand
        while True:
            if place is None or place.node.op != "call_function" or not is_tensor(place.node):
                return None
            outer_product = _outer_product(place.node, place.layout) if self._mask else None
            if outer_product is not None or is_product(place.node):
                first = outer_product or product_from_result(place.node, place.layout)
                return None if first is None or first.addend is not None else self._ending_at(first, place.node)
            if len(self._passed) == BETWEEN_PRODUCTS.most:
                if leads_to_product(place.node, self._memo):
                    BETWEEN_PRODUCTS.reached()
                return None
            self._passed.append(place)
            place = self._before(place.node, place.layout)
            if place is not None and (not is_tensor(place.node) or tensor(place.node).dim() != len(place.layout)):
                return None

    def _ending_at(self, first: Product, node: fx.Node) -> _Between:
        if first.factor != 1:
            self._scale(-1, Scale(first.factor))
        if first.scale is not None:
            self._apply(-1, Scale(first.scale), node)
        count = len(self._passed)
        return _Between(
            first,
            nodes=tuple(place.node for place in self._passed),
            layouts=tuple(place.layout for place in self._passed),
            scales=tuple((count - 1 - at if at >= 0 else -1, scale) for at, scale in self._scales),
            mask=self._mask,
            casts=self._casts,
        )

    def _before(self, node: fx.Node, layout: Layout) -> Operand | None:
        """What the node is computed from, on the way to a product; None if that cannot be read."""
        args: Any = node.args
        target: Any = node.target
        if is_layout_op(node):
            pulled = pull(node, layout)
            return None if pulled is None else Operand(args[0], pulled)
        if is_cast(node):
            self._note_cast(node, args[0])
        elif target in MUL_OPS or target in DIV_OPS:
            return self._before_factor(node, layout)
        elif target in WHERE_OPS and is_tensor(args[1]):
            self._note_mask(_masks(node))
            return Operand(args[1], layout)
        elif target in MASKED_FILL_OPS or target in TRIANGLE_OPS:
            self._note_mask(_masks(node))
        elif target is aten.cumsum.default:
            self._note_mask("a running sum over the keys (causal linear attention) stands between the products")
        elif target is aten.dropout.default:
            if args[1] and args[2]:
                self._note_mask("dropout stands between the products, so that they cannot be exchanged")
        else:
            return None
        return Operand(args[0], layout)

    def _before_factor(self, node: fx.Node, layout: Layout) -> Operand | None:
        source, other = _chain_of(node, self._memo)
        if source is None:
            return None
        at, divides = len(self._passed) - 1, node.target in DIV_OPS
        if not is_tensor(other):
            self._scale(at, Scale(other, divides))
        else:
            own = broadcast(layout, tensor(node).shape, tensor(other).shape)
            if own is None:
                return None
            self._apply(at, Scale(Operand(other, own), divides), node)
        self._note_cast(node, source)
        return Operand(source, layout)

    def _apply(self, at: int, scale: Scale, node: fx.Node) -> None:
        """Notes a factor that is a tensor: over what the last product sums over, it is a mask of pairs."""
        # Views on the way may have divided the axes.
        if isinstance(scale.factor, Operand) and set(scale.factor.axes) & set(axes_of((self._summed,))):
            self._note_mask(_masks(node))
            return
        why = why_not_finite(scale.factor.node, scale.divide) if isinstance(scale.factor, Operand) else ""
        if why:
            self._note_mask(f"what stands between the products is {why}")
        self._scale(at, scale)

    def _scale(self, at: int, scale: Scale) -> None:
        self._scales.append((at, scale))

    def _note_mask(self, why: str) -> None:
        self._mask = self._mask or Reason(why)

    def _note_cast(self, node: fx.Node, source: fx.Node) -> None:
        self._casts = self._casts or tensor(node).dtype is not tensor(source).dtype


def _chain_of(node: fx.Node, memo: dict[fx.Node, bool]) -> tuple[fx.Node | None, Any]:
    """Of a product or quotient of entries: the factor that another product leads to, and the other factor."""
    args: Any = node.args
    first, second = args[:2]
    whole = [each for each in (first, second) if is_tensor(each) and leads_to_product(each, memo)]
    if node.target in DIV_OPS:
        whole = [each for each in whole if each is first]
    # The denominator of W * (1 / W.sum()) leads to the same product; it has one entry where W has many.
    whole.sort(key=lambda each: tensor(each).dim() != tensor(node).dim() or _is_smaller(each, node))
    if not whole or _is_smaller(whole[0], node):
        return None, None
    source = whole[0]
    return source, second if source is first else first


# What normalizes, and what the feature maps say.


def _sums(site: LinearAttention, between: _Between) -> dict[fx.Node, tuple[Operand, int]]:
    """Sums of the product of two over the axes that the second product sums over."""
    chain = [(between.first.node, between.first.layout, -1)]
    count = len(between.nodes)
    chain += [(node, between.layouts[at], count - 1 - at) for at, node in enumerate(between.nodes)]
    found: dict[fx.Node, tuple[Operand, int]] = {}
    for node, layout, position in chain:
        applied = sum(at <= position for at, _ in between.scales)
        for user in node.users:
            own = _summed(user, node, resolve(layout), site.then_summed)
            if own is not None:
                found[user] = (Operand(user, own), applied)
    return found


def _normalizer(site: LinearAttention, sums: dict[fx.Node, tuple[Operand, int]]) -> tuple[str, Order | None]:
    """How the result is normalized by the sum over the keys, in words, and which order of the products this shows."""
    if sums:
        return "the sum of the weights", "quadratic"
    product = product_from_result(site.result, fresh_layout(tensor(site.result).shape))
    scale = [] if product is None or product.scale is None else [product.scale.node]
    key, query = _behind_views(site.middle.node), _behind_views(site.outer.node)
    for part in (part for node in (*_divisors(site.result), *scale) for part in _behind_divisor(node)):
        if part is site.result and _has_ones(_behind_views(site.inner.node)):
            return "a column of ones in the value", "linear"
        factors = factors_of(part)
        if any(_is_sum_of(factor, key) for factor in factors):
            return "a sum of the keys", "linear" if query in map(_behind_views, factors) else "quadratic"
    return "", None


def _order(outer: Features, middle: Features, inner: Features) -> Order | None:
    """The order of the products that the feature maps show; None if they do not show that this is attention."""
    named: dict[Order, Features] = {"linear": outer, "quadratic": inner}
    if not middle.name:
        return None
    mapped: list[Order] = [order for order, features in named.items() if features.name]
    # The value may have gone through a function, too, as a rule through another one.
    alike = [order for order in mapped if named[order].name == middle.name]
    return next(iter((*alike, *mapped)), None)


# Why the order may not be changed.


def _fixed(
    site: LinearAttention, between: _Between, sums: dict[fx.Node, tuple[Operand, int]], view: GraphView, ended: Ended
) -> Reason:
    first, last = between.first.node, site.result
    dtypes = {tensor(node).dtype for node in (first, *between.nodes, last)}
    if dtypes - {torch.float32, torch.float64}:
        narrow = min(dtype_name(dtype) for dtype in dtypes - {torch.float32, torch.float64})
        return Reason(f"products in {narrow} round, and may overflow, where the other order does not")
    if between.casts or len(dtypes) > 1:
        return Reason("the dtype changes between the products")
    for node, readers in view.other_readers(site.interior).items():
        left = [reader for reader in readers if reader not in sums]
        if left:
            what = "product of key and value" if site.order == "linear" else "product of query and key"
            return Reason(f"the {what} ({node.name}) is read elsewhere, too ({reader_in_words(left[0])})")
    stored = {*site.middle.axes, *site.inner.axes}
    if not {*axes_of(site.result_layout)} <= {*stored, *site.outer.axes} or any(
        not {*total.axes} <= stored for total, _ in sums.values()
    ):
        return Reason("the result repeats all operands along an axis")
    if any(not view.same_region(node, last) for node in (*site.interior, *sums)):
        return Reason("grad mode or autocast is switched between the products")
    if view.in_autocast(last):
        return Reason("autocast would round the products")
    if len({marks_of(node) for node in (*site.interior, *sums)}) > 1:
        return Reason("the products are not checkpointed together")
    divided = bool(site.normalizer or _divisors(last)) or any(
        scale.divide and isinstance(scale.factor, Operand) for scale in site.scales
    )
    if divided and not site.nonnegative:
        reason = "features may be negative, so that their sum may cancel and rounding would decide the result"
        return Reason(ended.added_to(reason))
    return FINE


_NOT_KNOWN = "whether this product of three is linear attention is not known"


def _is_map_of_both(key: Features, query: Features) -> bool:
    return (key.nonnegative and query.nonnegative) or bool(key.name and query.name)


def _masks(node: fx.Node) -> str:
    name = operator_name(node.target)
    return f"{name} changes single pairs of query and key, so the product of all pairs is needed"


def _is_smaller(part: fx.Node, whole: fx.Node) -> bool:
    return not same_shape(tensor(part).shape, tensor(whole).shape)


def _outer_product(node: fx.Node, layout: Layout) -> Product | None:
    """``key[..., None] * value[..., None, :]``, which sums over nothing."""
    args: Any = node.args
    if node.target is not aten.mul.Tensor or not all(is_tensor(arg) and _is_smaller(arg, node) for arg in args[:2]):
        return None
    lhs, rhs = (broadcast(layout, tensor(node).shape, tensor(arg).shape) for arg in args[:2])
    if lhs is None or rhs is None:
        return None
    return Product(node, Operand(args[0], lhs), Operand(args[1], rhs), layout, (), nodes=(node,))


def _summed(user: fx.Node, node: fx.Node, layout: Layout, axes: tuple[Axis, ...]) -> Layout | None:
    """The dimensions of ``user``, if it sums ``node`` over just these axes."""
    args: Any = user.args
    if user.target is not aten.sum.dim_IntList or args[0] is not node or user.kwargs.get("dtype") is not None:
        return None
    dims = args[1] if len(args) > 1 else None
    if not isinstance(dims, (list, tuple)):
        return None
    summed = {int(dim) % len(layout) for dim in dims}
    if {axis for dim in summed for axis in layout[dim]} != set(axes):
        return None
    keep = bool(args[2]) if len(args) > 2 else bool(user.kwargs.get("keepdim"))
    own = [(() if at in summed else dim) for at, dim in enumerate(layout) if keep or at not in summed]
    return tuple(own)


def _behind_views(node: fx.Node) -> fx.Node:
    while node.op == "call_function" and (is_layout_op(node) or is_cast(node)):
        node = node.all_input_nodes[0]
    return node


def _divisors(result: fx.Node) -> list[fx.Node]:
    """What the result, or a part of it, is divided by."""
    found: list[fx.Node] = []
    pending = [result]
    while pending:
        node = pending.pop()
        for user in node.users:
            args: Any = user.args
            if is_layout_op(user) or is_cast(user) or user.target in PIECE_OPS or user.target is operator.getitem:
                pending.append(user)
            elif user.target in DIV_OPS and args[0] is node and is_tensor(args[1]):
                found.append(args[1])
            elif user.target in MUL_OPS:
                factors = [arg for arg in args[:2] if is_tensor(arg) and arg is not node]
                found += [
                    arg
                    for arg in factors
                    if any(part.target is aten.reciprocal.default for part in _behind_divisor(arg))
                ]
    return found


def _behind_divisor(node: fx.Node) -> list[fx.Node]:
    """``node``, and what it is after views, pieces, an epsilon, a lower bound or an inverse."""
    found = [node]
    while node.op == "call_function":
        args: Any = node.args
        steps = is_layout_op(node) or is_cast(node) or node.target in PIECE_OPS or node.target is operator.getitem
        steps = steps or node.target is aten.reciprocal.default or node.target in CLAMP_OPS
        steps = steps or (node.target in (*ADD_OPS, *SUB_OPS, *MUL_OPS) and scalar(args[1]))
        if not steps or not isinstance(args[0], fx.Node) or not BEHIND_DIVISOR.allows(len(found)):
            break
        node = args[0]
        found.append(node)
    return found


def _has_ones(value: fx.Node) -> bool:
    """Whether ones were added to the features of the value."""
    args: Any = value.args
    if value.target is aten.pad.default:
        mode = args[2] if len(args) > 2 else "constant"
        return mode == "constant" and len(args) > 3 and args[3] == 1
    if value.target is aten.constant_pad_nd.default:
        return len(args) > 2 and args[2] == 1
    if value.target is aten.cat.default:
        return any(constant_value(part) == 1 for part in args[0])
    return False


_SUMS = frozenset({aten.sum.dim_IntList, aten.mean.dim})


def _is_sum_of(node: fx.Node, key: fx.Node) -> bool:
    summed = _behind_views(node)
    return summed.target in _SUMS and _behind_views(summed.all_input_nodes[0]) is key


# What people write.

_spelling = Specimens()
_recognized = partial(_spelling.add, status="recognized")
_Q = normal(2, 4, "L", 8)
_K = _V = normal(2, 4, "S", 8)


@_spelling.add(normal(2, "L", 64), normal(2, "S", 64), normal(2, "S", 64))
def fewer_positions_than_features(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """diffusers' SanaLinearAttnProcessor2_0 at a size where the matrix of all pairs is the smaller one."""
    q, k, v = (rearrange(t, "b n (h d) -> b h d n", h=2) for t in (q, k, v))
    product = F.pad(v, (0, 0, 0, 1), value=1.0) @ F.relu(k).transpose(2, 3) @ F.relu(q)
    product = product[:, :, :-1] / (product[:, :, -1:] + 1e-15)
    return product.flatten(1, 2).transpose(1, 2)


@_recognized(normal(2, 96, 3, "L"), dynamic=False)
def heads_of_a_feature_map(qkv: Tensor) -> Tensor:
    """EfficientViT's LiteMLA."""
    b, _, height, width = qkv.shape
    q, k, v = qkv.reshape(b, -1, 3 * 8, height * width).transpose(-1, -2).chunk(3, dim=-1)
    q, k = F.relu(q), F.relu(k)
    out = q @ (k.transpose(-1, -2) @ F.pad(v, (0, 1), mode="constant", value=1.0))
    out = out[..., :-1] / (out[..., -1:] + 1e-5)
    return out.transpose(-1, -2).reshape(b, -1, height, width)


@_recognized(normal(2, "L", 4, 8), normal(2, "S", 4, 8), normal(2, "S", 4, 8), keep(2, "S", dtype=torch.float32))
def elu_and_padding(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """fast-transformers; Katharopoulos et al., 2020."""
    q, k = F.elu(q) + 1, (F.elu(k) + 1) * mask[:, :, None, None]
    context = torch.einsum("nshd,nshm->nhmd", k, v)
    z = 1 / (torch.einsum("nlhd,nhd->nlh", q, k.sum(dim=1)) + 1e-6)
    return torch.einsum("nlhd,nhmd,nlh->nlhm", q, context, z).contiguous()


@_recognized(_Q, _K, _V)
def exponential_features(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """performer-pytorch, less the random projection."""
    q = 8**-0.5 * ((q - q.amax(dim=-1, keepdim=True)).exp() + 1e-4)
    k = 8**-0.5 * ((k - k.amax(dim=(-1, -2), keepdim=True)).exp() + 1e-4)
    inverse = 1.0 / torch.einsum("...nd,...d->...n", q, k.sum(dim=-2))
    context = torch.einsum("...nd,...ne->...de", k, v)
    return torch.einsum("...de,...nd,...n->...ne", context, q, inverse)


@_recognized(_Q, _K, _V)
def softmax_of_features(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Efficient attention; lucidrains' linear-attention-transformer."""
    context = k.softmax(dim=-2).transpose(-2, -1) @ v
    return (q.softmax(dim=-1) * 8**-0.5) @ context


@_spelling.add(_Q, _K, _V)
def divided_afterwards(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = torch.einsum("bhld,bhsd->bhls", q.square(), k.square()) / 8
    return torch.einsum("bhls,bhsd->blhd", weights, v) / weights.sum(-1).clamp(min=1e-6).transpose(1, 2)[..., None]


@_spelling.add(normal(2, 4, 24, "L"))
def columns_of_weights(qkv: Tensor) -> Tensor:
    """diffusers' SanaMultiscaleAttnProcessor2_0, for images that are as small as a head is wide."""
    q, k, v = qkv.chunk(3, dim=2)
    scores = F.relu(k).transpose(-1, -2) @ F.relu(q)
    scores = scores / (torch.sum(scores, dim=2, keepdim=True) + 1e-15)
    return v @ scores


@_spelling.add(_Q, normal(2, "S", 8), normal(2, "S", 8), keep(2, "S"))
def one_key_head_for_all(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Nothing is divided: the positions are counted."""
    k = F.silu(k).masked_fill(~mask[..., None], 0.0)
    weights = torch.einsum("bhld,bsd->bhls", F.silu(q), k) / k.shape[1]
    return torch.einsum("bhls,bse->bhle", weights, v)


@_spelling.add(normal(2, "L", 16), normal(2, "S", 16), normal(2, "S", 24), sites=2)
def a_loop_over_heads(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    """Written from scratch: other names, einops, and heads one by one."""
    heads = []
    split = (rearrange(t, "b n (g c) -> g b n c", g=2) for t in (x, y, z))
    for a, b, c in zip(*split, strict=True):
        a, b = a.exp(), b.exp()
        pairs = torch.bmm(b, rearrange(a, "b n c -> b c n"))
        pairs = pairs * pairs.sum(dim=1, keepdim=True).reciprocal()
        heads.append(torch.bmm(rearrange(pairs, "b s n -> b n s"), c))
    return torch.cat(heads, dim=-1)


PATTERN = LinearAttentionPattern()
