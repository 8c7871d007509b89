"""The options of ``torch.compile`` that attnrewrite reads, checked."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from attnrewrite.errors import OptionError
from attnrewrite.options.cache_config import FasterCacheConfig, PyramidAttentionBroadcastConfig, validated
from attnrewrite.options.context_parallel import ContextParallel, context_parallel_option
from attnrewrite.options.environment import diffusers_checks, request_of_environment, switched
from attnrewrite.options.request import kernel_names
from attnrewrite.torch_private import inductor_config

__all__ = ["DATA_DEPENDENT_SIZES", "OWN_OPTIONS", "Policy", "tracing_settings"]


DATA_DEPENDENT_SIZES = "capture_dynamic_output_shape_ops"
"""The name of the option, and of the setting of ``torch._dynamo.config``."""


@dataclass(frozen=True)
class Policy:
    """The user's options, checked.

    Attributes:
        inner_backend: the compiler of the rewritten graph: a registered torch.compile backend's name, or a callable
            ``(gm, example_inputs) -> callable``. Default ``"inductor"``.
        assume_attended_rows: whether the user asserts that every query attends at least one key. It lifts refusals that
            exist only because of fully masked rows (see docs/exactness.md). Default False.
        verify: whether the first call of each compiled graph compares every rewritten site with the source
            (:mod:`attnrewrite.numerics.verify`). Default ``ATTNREWRITE_VERIFY``, which is False where it is unset.
        tolerance: the largest error, relative to the largest number of a site's result, with which a kernel of lower
            precision is admitted (:mod:`attnrewrite.numerics.tolerance`). Default None: only by name.
        checks: whether device, dtype and shapes of the operands are checked before each call of a kernel
            (:mod:`attnrewrite.passes.insert_checks`). Default ``ATTNREWRITE_CHECKS``, or where it is unset
            ``DIFFUSERS_ATTN_CHECKS``, or False.
        kernels: the kernels to use, in order of preference; empty for the automatic choice.
        kernel_rules: kernels for single sites: pairs of a glob, over the module's path or over "file:line", and names.
            The first match applies. The option is a dictionary.
        strict: whether a site that no requested kernel can serve is an error. Default False: the next willing kernel
            serves it, with a warning.
        autotune: whether the automatic choice times the willing kernels on each site's own shapes. Default
            ``ATTNREWRITE_AUTOTUNE``, which is False where it is unset.
        fuse_projections: whether projections of one input that feed an attention are fused into one. Default
            ``ATTNREWRITE_FUSE_PROJECTIONS``; None, if that is unset: only projections whose weights are constants that
            Inductor freezes.
        cache: a validated config for reuse of attention across diffusion steps, in each graph separately. Default None.
            For the calls of a whole model, see :func:`attnrewrite.enable_cache`.
        capture_dynamic_output_shape_ops: whether Dynamo traces operators such as ``nonzero``, whose output's size
            depends on the data and which otherwise break the graph. ``explain`` and ``accelerate_attention`` turn it on
            while Dynamo traces; ``torch.compile`` has already traced the graph when it reads options. Default False.
        unread_weights: globs, over the module's path or over "file:line", of attentions whose weights the model stores
            or returns although nobody reads them. Default none.
        context_parallel: which inputs are shards of a sequence, over which processes (:mod:`attnrewrite.parallel`).
            Default None.
        warm_start: whether rewritten graphs are stored for other processes, and theirs are used
            (:mod:`attnrewrite.warm_start`). Default ``ATTNREWRITE_WARM_START``, which is False where it is unset.
        mode: ``torch.compile``'s mode, for Inductor only.
        inner_options: the options that are passed to the inner compiler.
    """

    inner_backend: str | Callable[..., Any] = "inductor"
    assume_attended_rows: bool = False
    verify: bool = False
    tolerance: float | None = None
    checks: bool = False
    kernels: tuple[str, ...] = ()
    kernel_rules: tuple[tuple[str, tuple[str, ...]], ...] = ()
    strict: bool = False
    autotune: bool = False
    fuse_projections: bool | None = None
    cache: PyramidAttentionBroadcastConfig | FasterCacheConfig | None = None
    capture_dynamic_output_shape_ops: bool = False
    unread_weights: tuple[str, ...] = ()
    context_parallel: ContextParallel | None = None
    warm_start: bool = False
    mode: str | None = None
    inner_options: Mapping[str, Any] = field(default_factory=dict)

    @staticmethod
    def from_options(options: Mapping[str, Any] | None, mode: str | None) -> Policy:
        """The policy for ``torch.compile(..., backend="attnrewrite", options=options, mode=mode)``.

        Options that are not attnrewrite's are passed to the inner compiler, which checks them.

        Raises:
            OptionError: an option of attnrewrite, or its environment variable, has a wrong value.
        """
        own: dict[str, Any] = {}
        inner: dict[str, Any] = {}
        for key, value in (options or {}).items():
            (own if key in OWN_OPTIONS else inner)[key] = value
        defaults = {"verify": False, "checks": diffusers_checks(), "autotune": False, "warm_start": False}
        for key, otherwise in defaults.items():
            given = switched(f"ATTNREWRITE_{key.upper()}")
            own.setdefault(key, otherwise if given is None else given)
        if own.get("fuse_projections") is None:
            own["fuse_projections"] = switched("ATTNREWRITE_FUSE_PROJECTIONS")
        for key in (
            "assume_attended_rows",
            "verify",
            "checks",
            "strict",
            "autotune",
            "warm_start",
            DATA_DEPENDENT_SIZES,
        ):
            if not isinstance(own.get(key, False), bool):
                raise OptionError(f"options[{key!r}] takes True or False; got {own[key]!r}")
        if not isinstance(own["fuse_projections"], (bool, type(None))):
            raise OptionError(f"options['fuse_projections'] takes True, False or None; got {own['fuse_projections']!r}")
        if "tolerance" in own:
            own["tolerance"] = _tolerance(own["tolerance"])
        if own.get("cache") is not None:
            own["cache"] = _cache(own["cache"])
        if "kernels" in own:
            own["kernels"] = kernel_names(own["kernels"], "options['kernels']")
        if "kernel_rules" in own:
            own["kernel_rules"] = _rules(own["kernel_rules"])
        if "unread_weights" in own:
            own["unread_weights"] = _globs(own["unread_weights"])
        if "context_parallel" in own:
            own["context_parallel"] = context_parallel_option(own["context_parallel"])
            if own["context_parallel"] is not None:
                _refuse_beside_context_parallel(own)
        request_of_environment()  # Raises for mistakes now, instead of in the middle of a graph.
        return Policy(mode=None if mode == "default" else mode, inner_options=inner, **own)

    @property
    def cuda_graphs(self) -> bool:
        """Whether Inductor uses CUDA graphs, in which a call costs the host almost nothing."""
        if self.inner_backend != "inductor":
            return False
        if self.mode in ("reduce-overhead", "max-autotune"):
            return True
        return bool(self.inner_options.get("triton.cudagraphs", inductor_config().triton.cudagraphs))

    @property
    def freezes(self) -> bool:
        """Whether Inductor freezes constants when gradients are off: it computes once what depends only on them."""
        if self.inner_backend != "inductor":
            return False
        return bool(self.inner_options.get("freezing", inductor_config().freezing))


OWN_OPTIONS = tuple(f.name for f in dataclasses.fields(Policy) if f.name not in ("mode", "inner_options"))
"""The keys of ``options`` that attnrewrite reads."""


def _refuse_beside_context_parallel(own: Mapping[str, Any]) -> None:
    """What would run the source, which computes of each rank's part by itself, or leave a rank out of an exchange."""
    for key in ("verify", "tolerance", "cache"):
        if own.get(key):
            raise OptionError(f"options[{key!r}] and options['context_parallel'] cannot be combined: leave one out")


def _tolerance(value: Any) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise OptionError(
            "options['tolerance'] takes a number above 0, the largest error relative to the largest number of an "
            f"attention's result, such as 1e-2; got {value!r}"
        )
    return float(value)


def _cache(value: Any) -> PyramidAttentionBroadcastConfig | FasterCacheConfig:
    config = validated(value)
    if isinstance(config, FasterCacheConfig) and not config.is_guidance_distilled:
        raise OptionError(
            "options['cache'] works on each graph separately, and FasterCache has to halve the batch of the whole "
            "model: call attnrewrite.enable_cache(compiled_model, config) instead, or set is_guidance_distilled=True"
        )
    return config


def _rules(value: Any) -> tuple[tuple[str, tuple[str, ...]], ...]:
    if not isinstance(value, Mapping) or not all(isinstance(glob, str) for glob in value):
        raise OptionError(
            "options['kernel_rules'] takes a dictionary from globs over module paths or file:line to kernels, such as "
            f"{{'*.attn1': 'flex'}}; got {value!r}"
        )
    return tuple((glob, kernel_names(names, f"options['kernel_rules'][{glob!r}]")) for glob, names in value.items())


def _globs(value: Any) -> tuple[str, ...]:
    globs = (value,) if isinstance(value, str) else value
    if not isinstance(globs, (list, tuple)) or not all(isinstance(glob, str) and glob for glob in globs):
        raise OptionError(
            "options['unread_weights'] takes a glob over module paths or file:line, or a list of them, such as "
            f"'encoder.*.self_attn'; got {value!r}"
        )
    return tuple(globs)


def tracing_settings(options: Mapping[str, Any] | None) -> dict[str, Any]:
    """The settings of ``torch._dynamo.config`` during calls of a model that was compiled with these options."""
    return {DATA_DEPENDENT_SIZES: True} if (options or {}).get(DATA_DEPENDENT_SIZES) is True else {}
