"""The settings of cross-step caching, with the names, meanings and defaults of diffusers' two configurations.

https://huggingface.co/docs/diffusers/main/en/api/cache. There are two differences: unless identifiers are given, the
graph determines which attentions are spatial, temporal or cross; and attnrewrite adds fields of its own.
"""

from __future__ import annotations

import dataclasses
import inspect
import logging
import math
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from attnrewrite.errors import OptionError
from attnrewrite.options.cache_callbacks import timestep_of

__all__ = ["TENSOR_FORMATS", "FasterCacheConfig", "PyramidAttentionBroadcastConfig", "validated"]

log = logging.getLogger("attnrewrite")

_INPUTS_WITH_BOTH_HALVES = (
    "hidden_states",
    "encoder_hidden_states",
    "timestep",
    "attention_mask",
    "encoder_attention_mask",
)


@dataclass
class PyramidAttentionBroadcastConfig:
    """Pyramid Attention Broadcast: reuses an attention's output in the next steps (arXiv 2408.12588).

    Attributes:
        spatial_attention_block_skip_range, temporal_attention_block_skip_range, cross_attention_block_skip_range:
            attention of that kind is computed once in that many calls, and its output reused in the others; None:
            computed in every call. Default None; if all three are None, spatial attention uses 2, with a warning.
        spatial_attention_timestep_skip_range: the timesteps, both ends excluded, between which outputs are reused, in
            the scheduler's units; ``temporal_attention_timestep_skip_range`` and
            ``cross_attention_timestep_skip_range`` are those of the other kinds. Default ``(100, 800)``.
        spatial_attention_block_identifiers, temporal_attention_block_identifiers, cross_attention_block_identifiers:
            regular expressions, searched in the module path of an attention, that name the attentions of that kind.
            Default None: the graph determines the kind. Identifiers choose among self-attentions or among
            cross-attentions; which of the two an attention is, only the graph determines.
        current_timestep_callback: returns the timestep of the current call. It must be set, for example to
            ``lambda: pipe.current_timestep``.
        memory_limit: the largest number of bytes of stored values, over all streams of calls. Default None: no limit.
        offload: whether stored values are kept in host memory between calls. Default False.
    """

    spatial_attention_block_skip_range: int | None = None
    temporal_attention_block_skip_range: int | None = None
    cross_attention_block_skip_range: int | None = None

    spatial_attention_timestep_skip_range: tuple[float, float] = (100, 800)
    temporal_attention_timestep_skip_range: tuple[float, float] = (100, 800)
    cross_attention_timestep_skip_range: tuple[float, float] = (100, 800)

    spatial_attention_block_identifiers: Sequence[str] | None = None
    temporal_attention_block_identifiers: Sequence[str] | None = None
    cross_attention_block_identifiers: Sequence[str] | None = None

    current_timestep_callback: Callable[[], Any] | None = None

    memory_limit: int | None = None
    offload: bool = False


@dataclass
class FasterCacheConfig:
    """FasterCache: extrapolates attention from its last two outputs and predicts guidance (arXiv 2410.19355).

    Attributes:
        spatial_attention_block_skip_range, temporal_attention_block_skip_range: attention of that kind is computed once
            in that many calls, and extrapolated in the others; None: computed in every call. Default 2 and None.
        spatial_attention_timestep_skip_range, temporal_attention_timestep_skip_range: the timesteps, both ends
            excluded, between which attention is extrapolated, in the scheduler's units. Default ``(-1, 681)``.
        low_frequency_weight_update_timestep_range, high_frequency_weight_update_timestep_range: the timesteps, both
            ends excluded, between which the difference of guidance is multiplied by the alphas below (equation 11).
            Default ``(99, 901)`` and ``(-1, 301)``.
        alpha_low_frequency, alpha_high_frequency: the weights of the difference of guidance. Default 1.1.
        unconditional_batch_skip_range: the unconditional half is computed once in that many calls. Default 5.
        unconditional_batch_timestep_skip_range: the timesteps, both ends excluded, between which the unconditional half
            is predicted. Default ``(-1, 641)``.
        spatial_attention_block_identifiers, temporal_attention_block_identifiers: regular expressions, searched in the
            module path of an attention, that name the self-attentions of that kind. Default None: the graph determines
            the kind.
        attention_weight_callback: maps a module to the weight of the extrapolation. Default: 0.5, with a warning.
        low_frequency_weight_callback, high_frequency_weight_callback: map the model to the weight of the difference of
            guidance. Default: the alphas, within their timesteps; 1 elsewhere.
        tensor_format: the format of the model's output, ``"BCFHW"``, ``"BFCHW"`` or ``"BCHW"``. Default ``"BCFHW"``.
        is_guidance_distilled: whether the model has no unconditional half. Default False.
        current_timestep_callback: gives the timestep of the call that is being made. It must be set, for example
            ``lambda: pipe.current_timestep``.
        unconditional_conditional_input_kwargs_identifiers: the keyword arguments of the model that hold the
            unconditional inputs and then the conditional ones, along dimension 0. Default ``("hidden_states",
            "encoder_hidden_states", "timestep", "attention_mask", "encoder_attention_mask")``.
        _unconditional_conditional_input_kwargs_identifiers: diffusers' name of the same setting. Only one may be given.
        memory_limit: bytes that stored values may take, over all streams of calls. Default None: no limit.
        offload: whether stored values are kept in the host's memory between calls. Default False.
        follow_diffusers: whether an extrapolated output counts as one of the last two, as in diffusers. Default False:
            only computed ones do, as in the published code (https://github.com/Vchitect/FasterCache).
    """

    spatial_attention_block_skip_range: int | None = 2
    temporal_attention_block_skip_range: int | None = None

    spatial_attention_timestep_skip_range: tuple[float, float] = (-1, 681)
    temporal_attention_timestep_skip_range: tuple[float, float] = (-1, 681)

    low_frequency_weight_update_timestep_range: tuple[float, float] = (99, 901)
    high_frequency_weight_update_timestep_range: tuple[float, float] = (-1, 301)

    alpha_low_frequency: float = 1.1
    alpha_high_frequency: float = 1.1

    unconditional_batch_skip_range: int = 5
    unconditional_batch_timestep_skip_range: tuple[float, float] = (-1, 641)

    spatial_attention_block_identifiers: Sequence[str] | None = None
    temporal_attention_block_identifiers: Sequence[str] | None = None

    attention_weight_callback: Callable[[nn.Module], float] | None = None
    low_frequency_weight_callback: Callable[[nn.Module], float] | None = None
    high_frequency_weight_callback: Callable[[nn.Module], float] | None = None

    tensor_format: str = "BCFHW"
    is_guidance_distilled: bool = False

    current_timestep_callback: Callable[[], Any] | None = None

    _unconditional_conditional_input_kwargs_identifiers: Sequence[str] | None = None
    unconditional_conditional_input_kwargs_identifiers: Sequence[str] | None = None

    memory_limit: int | None = None
    offload: bool = False
    follow_diffusers: bool = False


def validated(config: object) -> PyramidAttentionBroadcastConfig | FasterCacheConfig:
    """A checked copy of a configuration with computed defaults filled in.

    FasterCache's weight callbacks are set, ``unconditional_conditional_input_kwargs_identifiers`` holds the names, and
    identifiers and ranges are tuples.

    Args:
        config: one of the two above, or diffusers' ``PyramidAttentionBroadcastConfig`` or ``FasterCacheConfig``, whose
            default identifiers count as not given. It is not changed.

    Raises:
        OptionError: a setting is wrong, or ``config`` is something else.
    """
    own = _own(config)
    changes = _checked(own)
    if isinstance(own, FasterCacheConfig):
        return _filled_in(dataclasses.replace(own, **changes))
    result = dataclasses.replace(own, **changes)
    if all(getattr(result, f"{kind}_attention_block_skip_range") is None for kind in ("spatial", "temporal", "cross")):
        log.warning(
            "PyramidAttentionBroadcastConfig has no skip range: spatial_attention_block_skip_range=2 is used. Set "
            "spatial_, temporal_ or cross_attention_block_skip_range"
        )
        result.spatial_attention_block_skip_range = 2
    return result


def _own(config: object) -> PyramidAttentionBroadcastConfig | FasterCacheConfig:
    if isinstance(config, (PyramidAttentionBroadcastConfig, FasterCacheConfig)):
        return config
    # An object of diffusers' class can exist only if the module is loaded.
    hooks = sys.modules.get("diffusers.hooks")
    for own in (PyramidAttentionBroadcastConfig, FasterCacheConfig):
        theirs = getattr(hooks, own.__name__, None)
        if isinstance(theirs, type) and isinstance(config, theirs):
            return _converted(config, theirs, own)
    raise OptionError(
        "a cache takes attnrewrite's or diffusers' PyramidAttentionBroadcastConfig(...) or FasterCacheConfig(...); got "
        f"{_shown(config)} (First-Block Cache, MagCache and TaylorSeer are not supported)"
    )


def _shown(config: object) -> str:
    if isinstance(config, type):
        return f"the class {config.__module__}.{config.__qualname__}, not an object of it"
    kind = type(config)
    return repr(config) if kind.__module__ == "builtins" else f"an object of {kind.__module__}.{kind.__qualname__}"


def _converted(
    config: Any, theirs: Any, own: type[PyramidAttentionBroadcastConfig] | type[FasterCacheConfig]
) -> PyramidAttentionBroadcastConfig | FasterCacheConfig:
    """diffusers' settings in attnrewrite's class."""
    known = {field.name for field in dataclasses.fields(own)}
    taken: dict[str, Any] = {}
    for field in dataclasses.fields(theirs):
        value = getattr(config, field.name)
        if field.name.endswith("_block_identifiers") and _same_names(value, field.default):
            value = None  # The library's default identifiers do not describe this model.
        if field.name in known:
            taken[field.name] = value
        elif value is not field.default and value != field.default:
            raise OptionError(
                f"{theirs.__module__}.{theirs.__qualname__} has a setting {field.name!r} that attnrewrite does not "
                f"know; leave it at its default, {field.default!r}"
            )
    return own(**taken)


def _same_names(value: object, default: object) -> bool:
    return isinstance(value, (list, tuple)) and isinstance(default, (list, tuple)) and tuple(value) == tuple(default)


def _checked(config: PyramidAttentionBroadcastConfig | FasterCacheConfig) -> dict[str, Any]:
    """The checked settings; the name of a setting determines its check.

    Raises:
        OptionError: one of them is wrong.
    """
    name = type(config).__name__
    settings: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        setting = f"{name}.{field.name}"
        if field.name == "current_timestep_callback":
            if not callable(value):
                raise OptionError(
                    f"{setting} must be a function that returns the current timestep, such as "
                    f"lambda: pipe.current_timestep; got {value!r}"
                )
            if not _takes_no_arguments(value):
                raise OptionError(
                    f"{setting} is called without arguments, but {value!r} requires some: pass a function such as "
                    "lambda: pipe.current_timestep"
                )
        elif field.name.endswith("_callback"):
            if value is not None and not callable(value):
                raise OptionError(f"{setting} must be a function from a module to a number, or None; got {value!r}")
        elif field.name.endswith("_timestep_range") or field.name.endswith("_timestep_skip_range"):
            settings[field.name] = _timesteps(value, setting)
        elif field.name.endswith("_skip_range"):
            _check_skip_range(value, setting, optional=field.name != "unconditional_batch_skip_range")
        elif field.name.endswith("_block_identifiers"):
            settings[field.name] = _expressions(value, setting)
        elif field.name.endswith("_kwargs_identifiers"):
            settings[field.name] = _names(value, setting)
        elif field.name.startswith("alpha_"):
            if not _is_number(value) or not math.isfinite(value):
                raise OptionError(f"{setting} must be a finite number; got {value!r}")
        elif field.name == "tensor_format":
            if not isinstance(value, str) or value not in TENSOR_FORMATS:
                raise OptionError(f"{setting} must be one of {', '.join(TENSOR_FORMATS)}; got {value!r}")
        elif field.name == "memory_limit":
            if value is not None and not _is_count(value):
                raise OptionError(
                    f"{setting} must be a number of bytes, a whole number above 0, or None; got {value!r}"
                )
        elif field.name in ("offload", "follow_diffusers", "is_guidance_distilled") and not isinstance(value, bool):
            raise OptionError(f"{setting} must be True or False; got {value!r}")
    return settings


def _takes_no_arguments(function: Callable[..., Any]) -> bool:
    try:
        inspect.signature(function).bind()
    except TypeError:
        return False
    except ValueError:  # A built-in function that does not say what it takes.
        return True
    return True


def _filled_in(config: FasterCacheConfig) -> FasterCacheConfig:
    """Fills in ``config``, in place, the weight callbacks and the names of inputs; returns it.

    Raises:
        OptionError: the names are given twice, or the configuration would reuse nothing.
    """
    public = config.unconditional_conditional_input_kwargs_identifiers
    private = config._unconditional_conditional_input_kwargs_identifiers
    if public is not None and private is not None:
        raise OptionError(
            "FasterCacheConfig has both unconditional_conditional_input_kwargs_identifiers and "
            "_unconditional_conditional_input_kwargs_identifiers; give one of them"
        )
    names = public if public is not None else private if private is not None else _INPUTS_WITH_BOTH_HALVES
    config.unconditional_conditional_input_kwargs_identifiers = names
    config._unconditional_conditional_input_kwargs_identifiers = None
    ranges = (config.spatial_attention_block_skip_range, config.temporal_attention_block_skip_range)
    if config.is_guidance_distilled and ranges == (None, None):
        raise OptionError(
            "FasterCacheConfig with is_guidance_distilled=True and no skip range has nothing to do; set "
            "spatial_ or temporal_attention_block_skip_range"
        )
    if config.attention_weight_callback is None:
        log.warning(
            "FasterCacheConfig.attention_weight_callback is not set: attention is extrapolated with the weight 0.5 at "
            "every timestep"
        )
        config.attention_weight_callback = _half
    callback = config.current_timestep_callback
    assert callback is not None
    if config.low_frequency_weight_callback is None:
        config.low_frequency_weight_callback = _within(
            config.low_frequency_weight_update_timestep_range, config.alpha_low_frequency, callback
        )
    if config.high_frequency_weight_callback is None:
        config.high_frequency_weight_callback = _within(
            config.high_frequency_weight_update_timestep_range, config.alpha_high_frequency, callback
        )
    return config


def _half(module: nn.Module) -> float:
    return 0.5


def _within(
    timesteps: tuple[float, float], alpha: float, current_timestep: Callable[[], Any]
) -> Callable[[nn.Module], float]:
    """The weight of equation 11: ``alpha`` between the timesteps, 1 elsewhere."""

    def weight(module: nn.Module) -> float:
        return alpha if timesteps[0] < timestep_of(current_timestep) < timesteps[1] else 1.0

    return weight


def _check_skip_range(value: object, setting: str, optional: bool) -> None:
    if value is None and optional:
        return
    if not _is_count(value):
        raise OptionError(
            f"{setting} must be a whole number of at least 1 (attention is computed once in that many calls)"
            f"{', or None (computed in every call)' if optional else ''}; got {value!r}"
        )


def _timesteps(value: object, setting: str) -> tuple[float, float]:
    if isinstance(value, (list, tuple)) and len(value) == 2 and all(_is_number(end) for end in value):
        first, last = value
        if first <= last:
            return first, last
    advice = "; to turn off reuse for this kind of attention, set its block_skip_range to None" if value is None else ""
    raise OptionError(
        f"{setting} must be two timesteps, the lower one first, such as (100, 800); got {value!r}{advice}"
    )


def _expressions(value: object, setting: str) -> tuple[str, ...] | None:
    if value is None:
        return None
    names = _strings(value)
    if not names:
        raise OptionError(
            f"{setting} must be a list of regular expressions for module paths, such as ['blocks.*attn1'], or None "
            f"(determined from the graph); got {value!r}"
        )
    for name in names:
        try:
            re.compile(name)
        except re.error as error:
            raise OptionError(f"{setting}: {name!r} is not a regular expression ({error}); correct it") from error
    return names


def _names(value: object, setting: str) -> tuple[str, ...] | None:
    if value is None:
        return None
    names = _strings(value)
    if not names:
        raise OptionError(
            f"{setting} must be a list of the model's keyword arguments, such as ['hidden_states', 'timestep'], or "
            f"None; got {value!r}"
        )
    return names


def _strings(value: object) -> tuple[str, ...]:
    """The nonempty strings of a list, as a tuple; empty if ``value`` is anything else."""
    if not isinstance(value, (list, tuple)) or not all(isinstance(name, str) and name for name in value):
        return ()
    return tuple(value)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


TENSOR_FORMATS = {"BCFHW": 5, "BFCHW": 5, "BCHW": 4}
"""The formats of a model's output, with their number of dimensions; height and width come last in each."""
