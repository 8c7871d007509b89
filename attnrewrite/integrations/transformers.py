"""``attn_implementation="attnrewrite"`` for models of transformers.

:func:`register` gives transformers two functions under that name: :func:`attention`, which a model calls for each of
its attentions, and :func:`attention_mask`, which it makes their masks with. A model that is compiled finds plain
mathematics there, which the backend reads like any other attention; in a model that is not, each attention runs
compiled by itself.

A mask of None means in transformers' eager path that all keys are seen, and in its sdpa path what ``is_causal`` of the
module says. Models that do not support the latter have an ``is_causal`` that nothing reads, and change masks as
numbers. So they are given eager's masks, and None means there what it means in eager.

Source: https://github.com/huggingface/transformers/blob/v5.0.0/src/transformers/integrations/sdpa_attention.py for what
the arguments mean, and the ``eager_attention_forward`` of each model for what is computed.
"""

from __future__ import annotations

import functools
from collections.abc import Hashable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnrewrite.api.eager_calls import run_compiled, within_graph
from attnrewrite.errors import AttentionInputError, IntegrationError
from attnrewrite.ir.source import own_files
from attnrewrite.torch_private import FailOnRecompileLimitHit

try:
    from transformers import MODEL_MAPPING, AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask, sdpa_mask
except ImportError as error:
    raise IntegrationError(
        f"attnrewrite.integrations.transformers needs transformers 4.53 or later ({error}); "
        "pip install 'transformers>=4.53'"
    ) from error

__all__ = ["attention", "attention_mask", "register"]

own_files.add(__file__)

NAME = "attnrewrite"


def register() -> None:
    """Makes ``attn_implementation="attnrewrite"`` known to transformers, in this process.

    After it, ``from_pretrained(..., attn_implementation="attnrewrite")`` and
    ``model.set_attn_implementation("attnrewrite")`` work for every model whose attentions go through transformers'
    ``AttentionInterface``. A second call changes nothing.
    """
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, attention_mask)


def attention_mask(*, allow_is_causal_skip: bool = True, **arguments: Any) -> Tensor | None:
    """The mask of transformers' ``sdpa_mask``: (batch, 1, queries, keys), true where a key counts; None for all keys.

    For a model that does not support transformers' sdpa path it is that of ``eager_mask``, which is added to the
    scores.

    Windows, chunks, padding and packed sequences are in the mask. It is None where it would say no more than
    :func:`attention` knows: that the keys are the queries' own positions and each sees those before it (unless the
    module says that it is not causal), or that there is one query, which sees all. With a static cache of more places
    than queries there is a mask: None would not say which places are filled.

    Args:
        allow_is_causal_skip: whether a causal mask may be None. Default True.
        arguments: those of ``sdpa_mask``, and ``config``.
    """
    if not _supports_sdpa(type(arguments.get("config"))):
        added: Tensor | None = eager_mask(allow_is_causal_skip=allow_is_causal_skip, **arguments)
        return added
    # Before transformers 5 the queries are given by their positions.
    positions = arguments.get("cache_position")
    queries = arguments["q_length"] if positions is None else positions.shape[0]
    told = queries == 1 or queries == arguments["kv_length"]
    mask: Tensor | None = sdpa_mask(allow_is_causal_skip=allow_is_causal_skip and told, **arguments)
    return mask


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    sinks: Tensor | None = None,
    output_attentions: bool | None = None,
    **others: Any,
) -> tuple[Tensor, Tensor | None]:
    """One attention, as a model of transformers calls it.

    The scores are ``scaling * query @ key^T``, soft-capped, plus ``position_bias``, masked, in float32 or higher. A row
    in which a boolean mask leaves no key gives zero, as in ``scaled_dot_product_attention``.

    Args:
        module: the model's attention; its ``training`` and ``is_causal`` count.
        query: (batch, heads, queries, head_dim).
        key, value: (batch, key heads, keys, head_dim) and the same with the value's head_dim. heads is a multiple of
            key heads: each of these serves neighboring heads of the query (GQA).
        attention_mask: boolean (true where a key counts) or floating (added to the scores); it is broadcast to (batch,
            heads, queries, keys). None: see ``is_causal``.
        scaling: of the scores. Default None, which is ``head_dim ** -0.5``.
        dropout: probability of dropout of the weights where ``module.training``. Default 0.0.
        softcap: c in ``c * tanh(scores / c)``. Default None.
        s_aux: sinks, one for each head: a score that takes its part of the softmax and has no value. Default None.
        position_bias: added to the scores, in a shape that is broadcast to theirs. Default None.
        sliding_window: the window of the layer. transformers has it in the mask, where it is not None; without a mask
            there must be no more keys than it reaches. Default None.
        is_causal: whether, without a mask, a query sees only the keys up to its own position; a single query sees
            all. Default None: ``module.is_causal``, or True without it. It counts for models that support transformers'
            sdpa path (by ``module.config``), or where the module has no ``config``.
        sinks: as ``s_aux``, in a shape that is broadcast to (batch, heads, queries, 1). Default None.
        output_attentions: whether the weights are returned. Default None, which is False.
        others: arguments of the model that say nothing about its attention.

    Returns:
        The attention (batch, queries, heads, head_dim of the value), and the weights (batch, heads, queries, keys), or
        None where they are not asked for.

    Raises:
        AttentionInputError: an argument is not known, or the arguments do not fit together.
    """
    _check_others(others, attention_mask)
    queries, keys = query.shape[-2], key.shape[-2]
    config = getattr(module, "config", None)
    if config is not None and not _supports_sdpa(type(config)):
        is_causal = False  # Also where such a model hands it on: its masks say it.
    elif is_causal is None:
        is_causal = config is not None and getattr(module, "is_causal", True)
    # A branch for each: the comparison of two symbolic sizes is a symbol, and not the answer.
    causal = bool(is_causal) and attention_mask is None
    if causal and queries == 1:
        causal = False
    _check_positions(attention_mask, causal, queries, keys, sliding_window)
    if attention_mask is not None:
        _check_added("attention_mask", attention_mask, query)
        if attention_mask.shape[-1] > keys:
            attention_mask = attention_mask[..., :keys]  # Before transformers 5, that of a static cache.
    if position_bias is not None:
        _check_added("position_bias", position_bias, query)
    _check_number("scaling", scaling)
    _check_number("softcap", softcap)
    settings = _Settings(scaling, dropout if module.training else 0.0, softcap, causal, bool(output_attentions))
    operands = (query, key, value, attention_mask, position_bias, _columns(s_aux, sinks))
    if within_graph():
        return _attend(settings, *operands)
    operands = (query, key, value, _narrowed(attention_mask), _narrowed(position_bias), operands[-1])
    settings = settings._replace(layout=_layout(*operands))
    try:
        result: tuple[Tensor, Tensor | None] = run_compiled(_attend, settings, *operands)
    except FailOnRecompileLimitHit:
        raise AttentionInputError(
            "an attention was compiled too often for one kind of call; raise torch._dynamo.config.recompile_limit, or "
            "compile the model"
        ) from None
    return result


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
@functools.cache
def _supports_sdpa(config: type) -> bool:
    """Whether the model of a configuration supports transformers' sdpa path; False for one that is not known."""
    try:
        models = MODEL_MAPPING[config]
    except KeyError:
        return False
    listed: tuple[Any, ...] = models if isinstance(models, tuple) else (models,)
    return all(model._supports_sdpa for model in listed)


class _Settings(NamedTuple):
    scaling: float | None
    dropout: float
    softcap: float | None
    causal: bool
    weights: bool
    layout: Hashable = None
    """In an eager call, what Dynamo would compile anew for, which so has a function of its own."""


# Arguments.


_NO_MATTER = {
    "cache_position",
    "deterministic",  # Of FlashAttention's backward pass.
    "labels",
    "logits_to_keep",
    "max_length_k",  # Of FlashAttention, beside cu_seq_lens_k.
    "max_length_q",
    "num_items_in_batch",
    "output_hidden_states",
    "output_router_logits",
    "position_ids",  # transformers makes the mask of packed sequences of them.
    "return_dict",
    "token_type_ids",
    "use_cache",
}
"""What models hand on to their attentions, which says nothing about these."""

_PACKED = ("cu_seq_lens_q", "cu_seq_lens_k", "seq_idx")
"""Where packed sequences begin. transformers says it in the mask, too, if it is given ``position_ids``."""


def _check_others(others: dict[str, Any], mask: Tensor | None) -> None:
    for name, given in others.items():
        if given is None or name in _NO_MATTER:
            continue
        if name not in _PACKED:
            raise AttentionInputError(
                f'{name} is given to an attention, and attn_implementation="{NAME}" does not know what it means there; '
                'take "sdpa" or "eager" for this model, or leave the argument out'
            )
        if mask is None:
            raise AttentionInputError(
                f"{name} is given without a mask that keeps the packed sequences apart; give position_ids, which "
                "start anew in each of them, and transformers makes it"
            )


def _check_positions(mask: Tensor | None, causal: bool, queries: int, keys: int, window: int | None) -> None:
    """Without a mask it must be clear which keys a query sees.

    ``sdpa_attention_forward`` takes more keys than queries for a static cache that is empty. It is not where a model
    has left out queries behind the mask, as Gemma 4 does.
    """
    if mask is not None:
        return
    if causal and queries != keys:
        raise AttentionInputError(
            f"attention_mask is None for {int(queries)} queries and {int(keys)} keys of a causal attention, which does "
            "not say which keys a query sees; give a mask"
        )
    if window is not None and keys > window:
        raise AttentionInputError(
            f"attention_mask is None, sliding_window {window} and there are {int(keys)} keys, where transformers has "
            "the window in the mask; make one with create_sliding_window_causal_mask"
        )


def _check_added(name: str, added: Tensor, query: Tensor) -> None:
    if not isinstance(added, Tensor):
        raise AttentionInputError(f"{name} takes a tensor or None, not {type(added).__name__}")
    if not added.dtype.is_floating_point and (added.dtype is not torch.bool or name == "position_bias"):
        other = "" if name == "position_bias" else "a boolean one (true where a key counts) or "
        raise AttentionInputError(f"{name} is {added.dtype}; give {other}a floating one, which is added to the scores")
    if added.device != query.device:
        raise AttentionInputError(f"{name} is on {added.device} and query on {query.device}; move them to one device")


def _check_number(name: str, given: Any) -> None:
    if given is not None and not isinstance(given, (int, float, torch.SymInt, torch.SymFloat)):
        raise AttentionInputError(f"{name} takes a number or None, not {type(given).__name__}")


def _columns(s_aux: Tensor | None, sinks: Tensor | None) -> Tensor | None:
    """The sinks in a shape that is broadcast to (batch, heads, queries, 1)."""
    if s_aux is not None and sinks is not None:
        raise AttentionInputError("s_aux and sinks are both given, and mean the same; give one of them")
    return sinks if s_aux is None else s_aux.reshape(1, -1, 1, 1)


def _narrowed(tensor: Tensor | None) -> Tensor | None:
    """With size one along each dimension that it is expanded along; in a graph the backend proves that."""
    if tensor is None:
        return None
    for place, (size, stride) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
        if size > 1 and stride == 0:
            tensor = tensor.narrow(place, 0, 1)
    return tensor


def _layout(query: Tensor, key: Tensor, value: Tensor, *added: Tensor | None) -> Hashable:
    """The sizes that make another graph: heads and features, what is one or equal, and the order in memory."""
    own = [(x.shape[1], x.shape[3], x.shape[0] == 1, x.shape[2] == 1, *_order(x)) for x in (query, key, value)]
    ones = [None if x is None else tuple(size == 1 for size in x.shape) for x in added]
    return (query.shape[2] == key.shape[2], *own, *ones)


def _order(operand: Tensor) -> list[int]:
    return sorted(range(operand.dim()), key=operand.stride, reverse=True)


# The mathematics.


def _attend(
    settings: _Settings,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    sinks: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    added = mask is not None and mask.dtype not in (torch.bool, query.dtype, torch.float32)
    if settings.weights or settings.softcap is not None or bias is not None or sinks is not None or added:
        output, weights = _written_out(settings, query, key, value, mask, bias, sinks)
    else:
        output, weights = _by_sdpa(settings, query, key, value, mask), None
    return output.transpose(1, 2).contiguous(), weights if settings.weights else None


def _by_sdpa(settings: _Settings, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    # A branch: the comparison of two symbolic sizes is a symbol, which the call does not accept.
    grouped = True if query.shape[1] != key.shape[1] else False  # noqa: SIM210
    return F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        dropout_p=settings.dropout,
        is_causal=settings.causal,
        scale=settings.scaling,
        enable_gqa=grouped,
    )


def _written_out(
    settings: _Settings,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    sinks: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Attention and weights, in the order of the models' own ``eager_attention_forward``."""
    key, value = _repeated(key, query.shape[1]), _repeated(value, query.shape[1])
    precise = torch.promote_types(query.dtype, torch.float32)
    scaling = query.shape[-1] ** -0.5 if settings.scaling is None else settings.scaling
    scores = (query @ key.transpose(-2, -1)).to(precise) * scaling
    if settings.softcap is not None:
        scores = torch.tanh(scores / settings.softcap) * settings.softcap
    if bias is not None:
        scores = scores + bias
    if settings.causal:
        positions = torch.arange(scores.shape[-1], device=scores.device)
        mask = positions <= positions[:, None]
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype is torch.bool else scores + mask
    if sinks is None:
        # As in scaled_dot_product_attention, a row of minus infinities gives zeros.
        weights = torch.ops.aten._safe_softmax.default(scores, -1)
    else:
        column = sinks.to(precise).expand(*scores.shape[:-1], 1)
        weights = torch.cat([scores, column], -1).softmax(-1)[..., :-1]
    weights = F.dropout(weights.to(value.dtype), settings.dropout)
    return weights @ value, weights


def _repeated(operand: Tensor, heads: int) -> Tensor:
    groups = heads // operand.shape[1]
    return operand if groups == 1 else operand.repeat_interleave(groups, 1)
