"""Linear attention: no softmax, so that a product of three matrices is left, which may be multiplied in either order.

    result = phi(query) @ (phi(key)^T @ value) / (phi(query) @ sum_j phi(key)_j + eps)        linear in the length
           = (phi(query) @ phi(key)^T) @ value / (sum_j (phi(query) @ phi(key)^T)_ij + eps)   quadratic in it

The feature map ``phi`` acts on each key and query by itself (ReLU, elu + 1, exp, softmax over the features), or over
the positions of the keys (softmax). The normaliser may be absent, a sum of its own, or one more column of ones in the
value, by which the other columns are divided. Which order costs less goes by the sizes; they differ in rounding alone.

The rule: a product one operand of which is, behind views and scalings, another product. The axes that the two sum over
meet in one operand, the key, and the others have rows of their own. That alone is any chain of three matrices, such as
a low-rank weight: it is attention where all three are computed from the inputs, and where either the key and one of the
others went through a feature map, or the result is normalised by the sum over keys.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, fx

from attnrewrite.analysis.features import PIECES, Features, features_of
from attnrewrite.analysis.scores import FLOATING, leads_to_product, sources_of_scores
from attnrewrite.ir.axes import Axis, Layout, Operand, axes_of, broadcast, fresh_layout, resolve
from attnrewrite.ir.bounds import BEHIND_DIVISOR, BETWEEN_PRODUCTS, Ended, searching
from attnrewrite.ir.finding import Finding, NearMiss
from attnrewrite.ir.graph_view import GraphView, reader_in_words
from attnrewrite.ir.linear_site import LinearAttention, Order
from attnrewrite.ir.nodes import dtype_name, is_tensor, same_shape, scalar, tensor
from attnrewrite.ir.ops import is_cast
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

_MUL = frozenset({aten.mul.Tensor, aten.mul.Scalar})
_DIV = frozenset({aten.div.Tensor, aten.div.Scalar})
_ADD = frozenset({aten.add.Tensor, aten.add.Scalar, aten.sub.Tensor, aten.sub.Scalar})
_CLAMP = frozenset({aten.clamp.default, aten.clamp_min.default, aten.clamp_max.default})
_FILL = frozenset({aten.masked_fill.Scalar, aten.masked_fill.Tensor})
_WHERE = frozenset({aten.where.self, aten.where.ScalarOther})
_TRIANGLE = frozenset({aten.tril.default, aten.triu.default})


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


@dataclass
class _Between:
    """What stands between the product of two and the product of all three, the latter's side first.

    ``mask``: why the order is part of what is computed: a mask or decay over pairs, dropout or a running sum.
    """

    first: Product
    nodes: list[fx.Node] = field(default_factory=list)
    layouts: list[Layout] = field(default_factory=list)
    scales: list[tuple[int, Scale]] = field(default_factory=list)
    mask: str = ""
    casts: bool = False


class _LinearReader:
    """Reads linear attention off one graph."""

    def __init__(self, pattern: str, view: GraphView) -> None:
        self._pattern = pattern
        self._view = view
        self._computed: dict[fx.Node, bool] | None = None

    def read(self, second: fx.Node) -> Iterator[Finding]:
        """What the product ``second`` is the last of; nothing where it is no product of three."""
        product = product_from_result(second, fresh_layout(tensor(second).shape))
        if product is None or product.addend is not None or not product.contracted:
            return
        for operand, outer in ((product.lhs, product.rhs), (product.rhs, product.lhs)):
            with searching() as ended:
                between = self._between(operand, axes_of((product.contracted,)))
                finding = None if between is None else self._read(product, outer, between, ended)
            if finding is None and ended:
                # Whether it is attention is not known, so no node is claimed for it.
                finding = NearMiss(self._pattern, second, f"{_NOT_KNOWN}: {ended}")
            if finding is not None:
                yield finding
                return

    def _read(self, second: Product, outer: Operand, between: _Between, ended: Ended) -> Finding | None:
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
        if not all(self._is_computed(part.node) for part in (outer, middle, inner)):
            return None
        maps = {part: features_of(part.node, self._is_attention) for part in (outer, middle, inner)}
        sums = self._sums(site, between)
        site.sums = tuple(sums.values())
        site.scales = (
            *(scale for _, scale in sorted(between.scales, key=lambda each: each[0])),
            *([Scale(second.factor)] if second.factor != 1 else []),
            *([Scale(second.scale)] if second.scale is not None else []),
        )
        site.normaliser, divided = self._normaliser(site, sums)
        if sums and not _is_map_of_both(maps[middle], maps[inner]):
            return None  # The sum of a product that may have any sign is no normaliser.
        order = divided or self._order(maps[outer], maps[middle], maps[inner])
        if order is None:
            return None
        site.order = order
        own = (maps[outer if order == "linear" else inner], maps[middle])
        site.features = tuple(
            f"{map_.name} of {role}" for map_, role in zip(own, ("query", "key"), strict=True) if map_.name
        )
        site.nonnegative = all(map_.nonnegative for map_ in own)
        if between.mask:
            return NearMiss(self._pattern, second.node, between.mask, site.interior)
        site.fixed = self._fixed(site, between, sums, ended)
        return site

    # Between the products.

    def _between(self, operand: Operand, summed: tuple[Axis, ...]) -> _Between | None:
        """What leads from a product to ``operand``, of which another product sums over ``summed``."""
        node, layout = operand.node, operand.layout
        found: list[tuple[fx.Node, Layout]] = []
        scales: list[tuple[int, Scale]] = []
        mask = ""
        casts = False
        while True:
            if node.op != "call_function" or not is_tensor(node):
                return None
            outer_product = _outer_product(node, layout) if mask else None
            if outer_product is not None or is_product(node):
                first = outer_product or product_from_result(node, layout)
                if first is None or first.addend is not None:
                    return None
                result = _Between(first, mask=mask, casts=casts)
                result.nodes, result.layouts = [each for each, _ in found], [each for _, each in found]
                if first.factor != 1:
                    scales.append((-1, Scale(first.factor)))
                if first.scale is not None:
                    if set(first.scale.axes) & set(axes_of((summed,))):
                        result.mask = result.mask or _masks(node)
                    else:
                        scales.append((-1, Scale(first.scale)))
                count = len(found)
                result.scales = [(count - 1 - at if at >= 0 else -1, scale) for at, scale in scales]
                return result
            args: Any = node.args
            target: Any = node.target
            source: Any = args[0] if args else None
            before = layout
            at = len(found)
            if at == BETWEEN_PRODUCTS.most:
                if leads_to_product(node, self._view.leads_to_product):
                    BETWEEN_PRODUCTS.reached()
                return None
            found.append((node, layout))
            if is_layout_op(node):
                pulled = pull(node, layout)
                if pulled is None:
                    return None
                before = pulled
            elif is_cast(node):
                casts = casts or tensor(node).dtype is not tensor(source).dtype
            elif target in _MUL or target in _DIV:
                chained, other = self._chain_of(node)
                if chained is None:
                    return None
                source = chained
                if not is_tensor(other):
                    scales.append((at, Scale(other, target in _DIV)))
                else:
                    own = broadcast(layout, tensor(node).shape, tensor(other).shape)
                    if own is None:
                        return None
                    factor = Operand(other, own)
                    if set(factor.axes) & set(axes_of((summed,))):
                        mask = mask or _masks(node)
                    else:
                        scales.append((at, Scale(factor, target in _DIV)))
                casts = casts or tensor(node).dtype is not tensor(source).dtype
            elif target in _FILL or target in _TRIANGLE:
                mask = mask or _masks(node)
            elif target in _WHERE:
                source = args[1]
                mask = mask or _masks(node)
            elif target is aten.cumsum.default:
                mask = mask or "a running sum over the keys (causal linear attention) stands between the products"
            elif target is aten.dropout.default:
                if args[1] and args[2]:
                    mask = mask or "dropout stands between the products, so that they cannot be exchanged"
            else:
                return None
            if not is_tensor(source) or tensor(source).dim() != len(before):
                return None
            node, layout = source, before

    def _chain_of(self, node: fx.Node) -> tuple[fx.Node | None, Any]:
        """Of a product or quotient of entries: the factor that another product leads to, and the other factor."""
        args: Any = node.args
        first, second = args[:2]
        memo = self._view.leads_to_product
        whole = [each for each in (first, second) if is_tensor(each) and leads_to_product(each, memo)]
        if node.target in _DIV:
            whole = [each for each in whole if each is first]
        # The denominator of W * (1 / W.sum()) leads to the same product; it has one entry where W has many.
        whole.sort(key=lambda each: tensor(each).dim() != tensor(node).dim() or _is_smaller(each, node))
        if not whole or _is_smaller(whole[0], node):
            return None, None
        source = whole[0]
        return source, second if source is first else first

    # What normalises.

    def _sums(self, site: LinearAttention, between: _Between) -> dict[fx.Node, tuple[Operand, int]]:
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

    def _normaliser(self, site: LinearAttention, sums: dict[fx.Node, tuple[Operand, int]]) -> tuple[str, Order | None]:
        """How the result is normalised by the sum over keys, in words, and which order that says that it is in."""
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

    def _order(self, outer: Features, middle: Features, inner: Features) -> Order | None:
        """How the source multiplies, by the feature maps; None where they do not say that this is attention."""
        named: dict[Order, Features] = {"linear": outer, "quadratic": inner}
        if not middle.name:
            return None
        mapped: list[Order] = [order for order, features in named.items() if features.name]
        # The value may have gone through a function, too, as a rule through another one.
        alike = [order for order in mapped if named[order].name == middle.name]
        return next(iter((*alike, *mapped)), None)

    # Why the order may not be changed.

    def _fixed(
        self, site: LinearAttention, between: _Between, sums: dict[fx.Node, tuple[Operand, int]], ended: Ended
    ) -> Reason:
        first, last = between.first.node, site.result
        dtypes = {tensor(node).dtype for node in (first, *between.nodes, last)}
        if dtypes - {torch.float32, torch.float64}:
            narrow = min(dtype_name(dtype) for dtype in dtypes - {torch.float32, torch.float64})
            return f"products in {narrow} round, and may overflow, where the other order does not"
        if between.casts or len(dtypes) > 1:
            return Reason("the dtype changes between the products")
        for node, readers in self._view.other_readers(site.interior).items():
            left = [reader for reader in readers if reader not in sums]
            if left:
                what = "product of key and value" if site.order == "linear" else "product of query and key"
                return Reason(f"the {what} ({node.name}) is read elsewhere, too ({reader_in_words(left[0])})")
        stored = {*site.middle.axes, *site.inner.axes}
        if not {*axes_of(site.result_layout)} <= {*stored, *site.outer.axes} or any(
            not {*total.axes} <= stored for total, _ in sums.values()
        ):
            return Reason("all operands are repeated along an axis of the result")
        if any(not self._view.same_region(node, last) for node in (*site.interior, *sums)):
            return Reason("grad mode or autocast is switched between the products")
        if self._view.in_autocast(last):
            return Reason("autocast would round the products")
        tags = {
            tuple(str(node.meta.get(tag)) for tag in ("recompute", "ac_graph_id", "custom"))
            for node in (*site.interior, *sums)
        }
        if len(tags) > 1:
            return Reason("the products are not checkpointed together")
        divided = bool(site.normaliser or _divisors(last)) or any(
            scale.divide and isinstance(scale.factor, Operand) for scale in site.scales
        )
        if divided and not site.nonnegative:
            return Reason(
                ended.added_to(
                    "features may be negative, so that a normaliser may cancel and rounding would decide the result"
                )
            )
        return FINE

    # What the operands are.

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
                if product is None or all(self._is_computed(part.node) for part in (product.lhs, product.rhs)):
                    return True
            else:
                pending.extend(sources_of_scores(node))
        return False

    def _is_computed(self, node: fx.Node) -> bool:
        """Whether a tensor depends on an input that is no parameter."""
        if self._computed is None:
            self._computed = {}
            for each in self._view.graph.nodes:
                if isinstance(each.meta.get("val"), (int, float, torch.SymInt, torch.SymFloat, torch.SymBool)):
                    self._computed[each] = False  # A size says nothing of what is in a tensor.
                elif each.op == "placeholder":
                    self._computed[each] = not isinstance(each.meta.get("example_value"), torch.nn.Parameter)
                else:
                    self._computed[each] = any(self._computed[source] for source in each.all_input_nodes)
        return self._computed[node]


_NOT_KNOWN = "whether this product of three is linear attention is not known"


def _is_map_of_both(key: Features, query: Features) -> bool:
    return (key.nonnegative and query.nonnegative) or bool(key.name and query.name)


def _masks(node: fx.Node) -> str:
    name = operator_name(node.target)
    return f"{name} changes single pairs of query and key, which only the product of all pairs can be"


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
            if is_layout_op(user) or is_cast(user) or user.target in PIECES or user.target is operator.getitem:
                pending.append(user)
            elif user.target in _DIV and args[0] is node and is_tensor(args[1]):
                found.append(args[1])
            elif user.target in _MUL:
                factors = [arg for arg in args[:2] if is_tensor(arg) and arg is not node]
                found += [arg for arg in factors if any(part.target in _INVERSE for part in _behind_divisor(arg))]
    return found


_INVERSE = frozenset({aten.reciprocal.default})


def _behind_divisor(node: fx.Node) -> list[fx.Node]:
    """``node``, and what it is after views, pieces, an epsilon, a lower bound or an inverse."""
    found = [node]
    while node.op == "call_function":
        args: Any = node.args
        steps = is_layout_op(node) or is_cast(node) or node.target in PIECES or node.target is operator.getitem
        steps = steps or node.target in _INVERSE or node.target in _CLAMP
        steps = steps or (node.target in (*_ADD, *_MUL) and scalar(args[1]))
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
        return any(_is_ones(_behind_views(part)) for part in args[0])
    return False


def _is_ones(node: fx.Node) -> bool:
    args: Any = node.args
    if node.target in (aten.ones.default, aten.ones_like.default, aten.new_ones.default):
        return True
    return node.target in (aten.full.default, aten.full_like.default, aten.new_full.default) and 1 in args[1:]


_SUMS = frozenset({aten.sum.dim_IntList, aten.mean.dim})


def _is_sum_of(node: fx.Node, key: fx.Node) -> bool:
    summed = _behind_views(node)
    return summed.target in _SUMS and _behind_views(summed.all_input_nodes[0]) is key


# What people write.

_spelling = Specimens()
_recognised = partial(_spelling.add, status="recognised")
_Q = normal(2, 4, "L", 8)
_K = _V = normal(2, 4, "S", 8)


@_spelling.add(normal(2, "L", 64), normal(2, "S", 64), normal(2, "S", 64))
def fewer_positions_than_features(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """diffusers' SanaLinearAttnProcessor2_0 at a size where the matrix of all pairs is the smaller one."""
    q, k, v = (rearrange(t, "b n (h d) -> b h d n", h=2) for t in (q, k, v))
    product = F.pad(v, (0, 0, 0, 1), value=1.0) @ F.relu(k).transpose(2, 3) @ F.relu(q)
    product = product[:, :, :-1] / (product[:, :, -1:] + 1e-15)
    return product.flatten(1, 2).transpose(1, 2)


@_recognised(normal(2, 96, 3, "L"), dynamic=False)
def heads_of_a_feature_map(qkv: Tensor) -> Tensor:
    """EfficientViT's LiteMLA."""
    b, _, height, width = qkv.shape
    q, k, v = qkv.reshape(b, -1, 3 * 8, height * width).transpose(-1, -2).chunk(3, dim=-1)
    q, k = F.relu(q), F.relu(k)
    out = q @ (k.transpose(-1, -2) @ F.pad(v, (0, 1), mode="constant", value=1.0))
    out = out[..., :-1] / (out[..., -1:] + 1e-5)
    return out.transpose(-1, -2).reshape(b, -1, height, width)


@_recognised(normal(2, "L", 4, 8), normal(2, "S", 4, 8), normal(2, "S", 4, 8), keep(2, "S", dtype=torch.float32))
def elu_and_padding(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """fast-transformers; Katharopoulos et al., 2020."""
    q, k = F.elu(q) + 1, (F.elu(k) + 1) * mask[:, :, None, None]
    context = torch.einsum("nshd,nshm->nhmd", k, v)
    z = 1 / (torch.einsum("nlhd,nhd->nlh", q, k.sum(dim=1)) + 1e-6)
    return torch.einsum("nlhd,nhmd,nlh->nlhm", q, context, z).contiguous()


@_recognised(_Q, _K, _V)
def exponential_features(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """performer-pytorch, less the random projection."""
    q = 8**-0.5 * ((q - q.amax(dim=-1, keepdim=True)).exp() + 1e-4)
    k = 8**-0.5 * ((k - k.amax(dim=(-1, -2), keepdim=True)).exp() + 1e-4)
    inverse = 1.0 / torch.einsum("...nd,...d->...n", q, k.sum(dim=-2))
    context = torch.einsum("...nd,...ne->...de", k, v)
    return torch.einsum("...de,...nd,...n->...ne", context, q, inverse)


@_recognised(_Q, _K, _V)
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
