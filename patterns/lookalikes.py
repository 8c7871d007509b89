"""What looks like attention and is none, or is one that must stay as it is: the corpus of near misses.

Each has the reason that the report must give for it, or none where nothing is reported: a softmax that no matrix
product leads to, or that leads to none, is no near miss. The corpus grows with every false match.
"""

from __future__ import annotations

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from attnrewrite.patterns.sample_inputs import Specimens, keep, learned, normal

__all__ = ["LOOKALIKES"]

_lookalikes = LOOKALIKES = Specimens()
_lookalike = partial(_lookalikes.add, sites=0)
_Q = normal(2, 4, "L", 8)
_K = _V = normal(2, 4, "S", 8)

_OTHER_AXIS = "does not contract the axis that softmax runs over"
_SHARED_AXIS = "an axis that query and key share"
_READ_TWICE = "read more than once"
_BETWEEN = "between softmax and"
_VALUE = "the value"
_OTHER_MASK = "not known to be the mask applied before softmax"


# Softmax over another axis than the one that is summed over.


@_lookalike(_Q, _Q, _Q, reason=_OTHER_AXIS)
def softmax_over_queries(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.transpose(-2, -1) / 8**0.5).softmax(-2) @ v


@_lookalike(_Q, _K, _V, reason=_SHARED_AXIS)
def softmax_over_heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.transpose(-2, -1) / 8**0.5).softmax(1) @ v


@_lookalike(normal(2, 1, "L", 8), normal(2, 1, "S", 8), normal(2, 1, "S", 8), reason=_OTHER_AXIS)
def softmax_over_the_only_head(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """All weights are 1, and the values are added up."""
    return (q @ k.transpose(-2, -1) / 8**0.5).softmax(1) @ v


@_lookalike(_Q, normal(2, 4, 1, 8), normal(2, 4, "L", 8), reason=_OTHER_AXIS)
def one_key_and_a_sum_over_queries(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.transpose(-2, -1) / 8**0.5).softmax(-1).transpose(-2, -1) @ v


@_lookalike(_Q, _K, _V, reason=_SHARED_AXIS)
def softmax_over_batch(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.transpose(-2, -1) / 8**0.5).softmax(0) @ v


@_lookalike(_Q, _K, _V, reason="not over the keys")
def softmax_over_all_pairs(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.transpose(-2, -1) / 8**0.5
    return scores.flatten(-2).softmax(-1).view(scores.shape) @ v


@_lookalike(_Q, _Q, _Q, reason=_OTHER_AXIS)
def product_with_transposed_weights(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.transpose(-2, -1) / 8**0.5).softmax(-1).transpose(-2, -1) @ v


@_lookalike(_Q, _K, _V, reason=_OTHER_AXIS)
def product_sums_over_batch_too(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = (q @ k.transpose(-2, -1) / 8**0.5).softmax(-1)
    return torch.einsum("bhls,bhsd->hld", weights, v)


@_lookalike(normal(2, 5, 16), normal(2, "L", 16), normal(2, "L", 16), reason=_BETWEEN)
def slot_attention(slots: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Slots compete for inputs: softmax over the queries, then a mean over the keys."""
    attn = F.softmax(k @ slots.transpose(1, 2) * 16**-0.5, dim=-1) + 1e-8
    attn = attn / attn.sum(dim=1, keepdim=True)
    return attn.transpose(1, 2) @ v


# Softmax of something else than scores.


@_lookalike(_Q, _K, _V, reason=_OTHER_AXIS)
def softmax_of_context(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return q @ (k.transpose(-2, -1) @ v).softmax(-1)


@_lookalike(normal(2, "L", 16), learned(16, 5), normal(2, 5, "L", 16), reason=_VALUE)
def mixture_of_experts(x: Tensor, router: Tensor, experts: Tensor) -> Tensor:
    """Every token has values of its own: its experts' outputs."""
    gates = (x @ router).softmax(-1)
    return torch.einsum("bte,betd->btd", gates, experts)


@_lookalike(normal(2, "L", 16), learned(16, 5), normal(5, 16, 16), reason=_VALUE)
def expert_matrices(x: Tensor, router: Tensor, experts: Tensor) -> Tensor:
    """The gates weigh matrices, which are then applied to the token that asked."""
    gates = (x @ router).softmax(-1)
    return torch.einsum("bte,bted->btd", gates, torch.einsum("btc,ecd->bted", x, experts))


@_lookalike(normal(12, 16), learned(16, 5), normal(5, 16), dynamic=False, reason=_BETWEEN)
def top_k_router(x: Tensor, router: Tensor, experts: Tensor) -> Tensor:
    weights, chosen = torch.topk((x @ router).softmax(-1), 2, dim=-1)
    return (weights / weights.sum(-1, keepdim=True))[..., None].mul(experts[chosen]).sum(-2)


@_lookalike(normal(2, "L", 16), learned(16, 1), reason="pooling")
def pooling(x: Tensor, weight: Tensor) -> Tensor:
    return (x * (x @ weight).softmax(dim=1)).sum(dim=1)


_TABLE = torch.nn.Parameter(torch.arange(48 * 16.0).sin().view(48, 16) / 5)


@_lookalike(normal(2, "L", 16), normal(24, 16))
def gates_by_linear(x: Tensor, values: Tensor) -> tuple[Tensor, ...]:
    """A layer that chooses among learned rows, of whatever part of a table: a projection, and no scores."""
    first, stacked = _TABLE[:24], _TABLE.view(2, 24, 16)
    weights = (
        *(
            first,
            _TABLE.chunk(2)[0],
            torch.split(_TABLE, [24, 24])[1],
            _TABLE.narrow(0, 3, 24),
            _TABLE.tensor_split(2)[1],
        ),
        *(
            stacked[1],
            stacked.unbind()[0],
            stacked.select(0, 1),
            first.double().float(),
            torch.cat([first[12:], first[:12]]),
        ),
    )
    return tuple(F.linear(x, weight).softmax(-1) @ values for weight in weights)


@_lookalike(normal(2, "L", 16), normal(24, 16), reason="gate")
def gates_by_products(x: Tensor, values: Tensor) -> tuple[Tensor, ...]:
    """The same, by the other products."""
    gate = _TABLE[:24]
    scores = (
        *(x @ gate.mT, x @ _TABLE.chunk(2)[0].T, torch.matmul(x, torch.split(_TABLE, 24)[1].t()), x @ gate.mT[None]),
        *(torch.einsum("bld,nd->bln", x, gate), torch.einsum("nd,bld->bln", gate, x), torch.inner(x, gate)),
        *(
            torch.tensordot(x, gate, ([2], [1])),
            (x[:, :, None] * gate).sum(-1),
            torch.linalg.vecdot(x[:, :, None], gate),
        ),
        *(torch.bmm(x, gate.mT.expand(2, -1, -1)), (gate @ x.mT).mT, x @ torch.cat([gate[12:], gate[:12]]).mT * 0.25),
    )
    return tuple(each.softmax(-1) @ values for each in scores)


@_lookalike(normal("L", 16), normal(10, 16))
def cosine_classifier(x: Tensor, prototypes: Tensor) -> Tensor:
    scores = F.normalize(x, dim=-1) @ F.normalize(prototypes, dim=-1).T
    return (scores / 0.07).softmax(-1)


@_lookalike(normal(2, "L", 16), learned(16, 16), learned(16, 3))
def gate_of_heads(x: Tensor, up: Tensor, gate: Tensor) -> Tensor:
    return (x @ up)[..., None] * (x @ gate).softmax(-1)[..., None, :]


@_lookalike(_Q, _K, _V, keep(2, 1, "L", "S"), reason="erf (")
def a_function_behind_masks(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """The reason names the function, and not the masks, biases and scales that follow."""
    scores = torch.erf(q @ k.mT) * 4
    scores = torch.where(mask, (scores + mask.cumsum(-1) / 8).transpose(-1, -2).mT, -math.inf)
    return (scores - 1).softmax(-1) @ v


@_lookalike(_Q, _K, _V, reason="cumsum (")
def weights_that_are_measured_too(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The reason names what keeps the weights from the product, and not what else reads them."""
    weights = (q @ k.mT * 8**-0.5).softmax(-1)
    return weights.square().mean(), weights.cumsum(-1) @ v


# Something stands between softmax and the value.


@_lookalike(_Q, _K, _V, learned(4, 4), reason=_OTHER_AXIS)
def talking_heads_after_softmax(q: Tensor, k: Tensor, v: Tensor, mix: Tensor) -> Tensor:
    weights = (q @ k.transpose(-2, -1) / 8**0.5).softmax(-1)
    return torch.einsum("bhls,hg->bgls", weights, mix) @ v


@_lookalike(_Q, _K, _V, reason=_BETWEEN)
def double_softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.transpose(-2, -1) / 8**0.5).softmax(-1).softmax(-1) @ v


@_lookalike(_Q, _K, _V, normal(2, 4, "L", "S"), reason=_OTHER_MASK)
def gated_weights(q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
    return ((q @ k.transpose(-2, -1) / 8**0.5).softmax(-1) * gate.sigmoid()) @ v


@_lookalike(_Q, _K, _V, keep(2, 1, "L", "S"), reason=_OTHER_MASK)
def masked_after_softmax(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return ((q @ k.transpose(-2, -1) / 8**0.5).softmax(-1) * mask) @ v


@_lookalike(_Q, _K, _V, keep(2, 1, "L", "S"), reason=_OTHER_MASK)
def filled_after_softmax(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return (q @ k.transpose(-2, -1) / 8**0.5).softmax(-1).masked_fill(~mask, 0.0) @ v


@_lookalike(_Q, _K, _V, reason=_BETWEEN)
def sharpened_weights(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.transpose(-2, -1) / 8**0.5).softmax(-1).pow(2) @ v


@_lookalike(_Q, _K, _V, normal(2, 4, "L", 1), reason=_BETWEEN)
def number_added_to_weights(q: Tensor, k: Tensor, v: Tensor, number: Tensor) -> Tensor:
    """The same for all keys of a query, so that it is no matrix that can be multiplied with the values."""
    return ((q @ k.transpose(-2, -1) / 8**0.5).softmax(-1) + number) @ v


@_lookalike(_Q, _K, _V, gradients=False, reason=_READ_TWICE)
def straight_through(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    soft = (q @ k.transpose(-2, -1) / 8**0.5).softmax(-1)
    hard = F.one_hot(soft.argmax(-1), soft.shape[-1]).to(soft.dtype)
    return (hard - soft.detach() + soft) @ v


@_lookalike(_Q, _K, _V, reason=_BETWEEN)
def weights_cut_short(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Keys that take weight and give no value."""
    return (q @ k.transpose(-2, -1) / 8**0.5).softmax(-1)[..., 1:] @ v[..., 1:, :]


# Something else reads the weights or the scores.


@_lookalike(_Q, _K, _V, reason=_READ_TWICE)
def weights_returned(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    weights = (q @ k.transpose(-2, -1) / 8**0.5).softmax(-1)
    return weights @ v, weights


@_lookalike(_Q, _K, _V, reason=_BETWEEN)
def batch_norm_of_the_batch(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """In training batch norm takes the mean and deviation of all scores that there are."""
    return F.batch_norm(q @ k.transpose(-2, -1), None, None, training=True).softmax(-1) @ v


@_lookalike(_Q, _K, _V, reason=_BETWEEN)
def scores_summed_over_heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.transpose(-2, -1)).sum(1, keepdim=True).softmax(-1) @ v


@_lookalike(_Q, _K, _V, reason=_READ_TWICE)
def scores_returned(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """RealFormer: the next layer adds them to its own."""
    scores = q @ k.transpose(-2, -1) / 8**0.5
    return scores.softmax(-1) @ v, scores


@_lookalike(_Q, _K, _V, reason=_READ_TWICE)
def entropy_of_weights(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    weights = (q @ k.transpose(-2, -1) / 8**0.5).softmax(-1)
    return weights @ v, -(weights * weights.clamp_min(1e-9).log()).sum(-1).mean()


@_lookalike(_Q, _K, _V, normal("L", "S", 8), reason=_READ_TWICE)
def relative_values(q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> Tensor:
    """Shaw et al.: the weights also weigh vectors of relative positions."""
    weights = (q @ k.transpose(-2, -1) / 8**0.5).softmax(-1)
    return weights @ v + torch.einsum("bhls,lsd->bhld", weights, positions)


@_lookalike(_Q, _K, _V, learned("L", "S"), learned("L", "S"), reason="something else reads as well")
def two_biases_and_the_scores_returned(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor, other: Tensor
) -> tuple[Tensor, Tensor]:
    scores = q @ k.transpose(-2, -1) / 8**0.5
    return torch.cat([scores + bias, scores + other]).softmax(-1) @ torch.cat([v, v]), scores


@_lookalike(_Q, _K, _V, reason=_READ_TWICE, dynamic=False)
def keys_chosen_by_score(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.transpose(-2, -1) / 8**0.5
    threshold = scores.topk(3, dim=-1).values[..., -1:]
    return scores.masked_fill(scores < threshold, float("-inf")).softmax(-1) @ v


# Something is done to the scores that no fused kernel here does.


@_lookalike(_Q, _K, _V, reason="themselves")
def squared_scores(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.transpose(-2, -1) / 8**0.5
    return (scores * scores).softmax(-1) @ v


@_lookalike(_Q, _K, _V, learned(4, 4), reason=_VALUE)
def talking_heads_before_softmax(q: Tensor, k: Tensor, v: Tensor, mix: Tensor) -> Tensor:
    scores = torch.einsum("bhls,hg->bgls", q @ k.transpose(-2, -1) / 8**0.5, mix)
    return scores.softmax(-1) @ v


@_lookalike(_Q, _K, _V, keep(2, 1, "L", "S"), keep(2, 1, "L", "S"), reason=_OTHER_MASK)
def zeroed_by_another_mask(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, other: Tensor) -> Tensor:
    weights = (q @ k.transpose(-2, -1) / 8**0.5).masked_fill(~mask, float("-inf")).softmax(-1)
    return weights.masked_fill(~other, 0.0) @ v


@_lookalike(_Q, _K, _V, reason=_READ_TWICE)
def maximum_over_queries(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """What is subtracted differs from key to key, and softmax does not cancel it."""
    scores = q @ k.transpose(-2, -1) / 8**0.5
    return (scores - scores.amax(-2, keepdim=True)).softmax(-1) @ v


@_lookalike(_Q, _K, _V, reason=_VALUE)
def sink_with_a_value(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The added column is multiplied with a value of its own."""
    weights = F.pad(q @ k.transpose(-2, -1) / 8**0.5, (0, 1)).softmax(-1)
    return weights @ F.pad(v, (0, 0, 0, 1), value=1.0)


@_lookalike(_Q, _K, _V, reason=_BETWEEN)
def some_of_the_weights(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = (q @ k.transpose(-2, -1) / 8**0.5).softmax(-1)
    return weights[..., 2:] @ v[..., 2:, :]


@_lookalike(_Q, _K, _V, reason=_BETWEEN)
def renormalized_weights(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = (q @ k.transpose(-2, -1) / 8**0.5).softmax(-1) + 0.01
    return (weights / weights.sum(-1, keepdim=True)) @ v


@_lookalike(_Q, _K, _V)
def infinite_sink(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Which takes all of each row."""
    scores = q @ k.transpose(-2, -1) / 8**0.5
    highest = scores.amax(-1, keepdim=True)
    weights = (scores - highest).exp()
    return weights / (weights.sum(-1, keepdim=True) + (float("inf") - highest).exp()) @ v


@_lookalike(_Q, _K, _V)
def divided_by_another_sum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Exponentials, divided by their sum over the queries."""
    weights = (q @ k.transpose(-2, -1) / 8**0.5).exp()
    return weights / weights.sum(-2, keepdim=True).mean() @ v


@_lookalike(_Q, _K, _V)
def exponentials_of_two_things(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.transpose(-2, -1) / 8**0.5
    return scores.exp() / (2 * scores).exp().sum(-1, keepdim=True) @ v


# No softmax, or another one.


@_lookalike(_Q, _K, _V)
def sigmoid_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.sigmoid(q @ k.transpose(-2, -1) / 8**0.5 - math.log(17)) @ v


@_lookalike(_Q, _K, _V)
def squared_relu_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.relu(q @ k.transpose(-2, -1) / 8**0.5).square() @ v


@_lookalike(_Q, _K, _V)
def log_weights(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.log_softmax(q @ k.transpose(-2, -1) / 8**0.5, dim=-1) @ v


@_lookalike(_Q, _K, _V)
def smallest_scores_win(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmin is a softmax, of scores with their sign turned: attention, but none that anybody is known to mean."""
    return F.softmin(torch.cdist(q, k), dim=-1) @ v


# Linear attention that must be multiplied as it is.


@_lookalike(_Q, _Q, _Q, reason="single pairs")
def causal_linear_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = ((F.elu(q) + 1) @ (F.elu(k) + 1).mT).tril()
    return weights @ v / weights.sum(-1, keepdim=True)


@_lookalike(_Q, _Q, _Q, normal("L", "L"), reason="single pairs")
def retention(q: Tensor, k: Tensor, v: Tensor, decay: Tensor) -> Tensor:
    return (F.silu(q) @ F.silu(k).mT * decay) @ v


@_lookalike(_Q, _Q, _Q, reason="running sum")
def running_sums(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Causal linear attention in the linear order: fast-transformers' and performer-pytorch's without CUDA."""
    context = torch.einsum("bhnd,bhne->bhnde", k.exp(), v).cumsum(dim=2)
    total = torch.einsum("bhnd,bhnd->bhn", q.softmax(-1), k.exp().cumsum(dim=2))
    normalized = torch.einsum("bhnde,bhnd->bhne", context, q.softmax(-1)) / total[..., None]
    context = (F.relu(k)[..., :, None] * v[..., None, :]).cumsum(dim=2)
    return normalized, (F.relu(q)[..., None, :] @ context).squeeze(-2)


@_lookalike(_Q, _K, _V, reason="read elsewhere")
def weights_of_linear_attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    weights = F.relu(q) @ F.relu(k).mT
    return weights @ v, weights


@_lookalike(normal(2, "L", 32), normal(2, "L", 32), normal(2, "L", 32), reason="read elsewhere", dynamic=False)
def state_of_linear_attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The other order is cheaper, and the product of key and value is wanted all the same."""
    state = F.relu(k).mT @ v
    return F.relu(q) @ state, state


@_lookalike(_Q, _K, _V, reason="may be negative")
def features_that_cancel(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = F.silu(q) @ F.silu(k).mT
    return weights @ v / weights.sum(-1, keepdim=True)


# Products of three that are no attention.


@_lookalike(normal(2, "L", 16), normal(2, "S", 16), learned(16, 4), learned(4, 16))
def low_rank_weights(x: Tensor, y: Tensor, down: Tensor, up: Tensor) -> tuple[Tensor, ...]:
    """LoRA, a weight in two factors, and a form of low rank."""
    return F.relu(x) @ down @ up, F.relu(x) @ (down @ up), F.relu(x) @ down @ (up @ y.mT)


@_lookalike(normal(2, "L", 16), learned(16, 32), learned(32, 16))
def feed_forward_and_gates(x: Tensor, up: Tensor, down: Tensor) -> tuple[Tensor, ...]:
    """An MLP, a gated one, and squeeze-and-excite."""
    excited = x * (F.relu(x.mean(1, keepdim=True) @ up) @ down).sigmoid()
    return F.relu(x @ up) @ down, (F.silu(x @ up) * (x @ up)) @ down, excited


@_lookalike(normal(2, 8, 12), normal(2, 8, 12))
def products_alone(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    """Muon's Newton-Schulz iteration, and powers."""
    square = x @ x.mT
    return 3.4 * x + (-4.8 * square + 2 * square @ square) @ x, square @ square @ square, x @ (y.mT @ y)


@_lookalike(_Q, _Q, _Q, normal("L", "L"))
def attention_free_transformer(q: Tensor, k: Tensor, v: Tensor, position: Tensor) -> Tensor:
    weights = position.exp()
    return q.sigmoid() * (weights @ (k.exp() * v)) / (weights @ k.exp())


@_lookalike(normal(2, "L", "L"), normal(2, "L", 16), learned(16, 5))
def convolution_and_pooling_of_a_graph(adjacency: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """A layer of a GCN, and DiffPool with gates."""
    features = adjacency @ F.relu(x) @ weight
    assignment = features.sigmoid()
    return features, assignment.mT @ adjacency @ assignment


# Weights that are taken apart, added up, or set to zero, but not as attention can be.


@_lookalike(_Q, _K, _V, reason="not known to cover all keys exactly once")
def parts_with_a_gap(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = (q @ k.mT / 8**0.5).softmax(-1)
    return weights[..., :3] @ v[:, :, :3] + weights[..., 4:] @ v[:, :, 4:]


@_lookalike(_Q, _K, _V, normal(2, 4, 1, "S"), reason="not known to be all equal slices")
def difference_with_a_factor_of_each_key(q: Tensor, k: Tensor, v: Tensor, factors: Tensor) -> Tensor:
    first, second = torch.stack([q @ k.mT, q @ k.mT * 0.5]).softmax(-1).unbind(0)
    return (first - factors * second) @ v


@_lookalike(_Q, _K, _V, reason=_BETWEEN)
def positive_part_of_a_difference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ((q @ k.mT).softmax(-1) - (q @ k.mT * 0.5).softmax(-1)).relu() @ v


@_lookalike(_Q, _K, _V, keep(2, 1, "L", "S"), reason=_READ_TWICE)
def infinite_rows_of_either_sign_are_zero(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """A row that overflows is NaN in softmax, and zero here."""
    scores = (q @ k.mT).masked_fill(~mask, -math.inf)
    return scores.softmax(-1).masked_fill(scores.isinf().all(-1, keepdim=True), 0.0) @ v
