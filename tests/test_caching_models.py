"""Cross-step caching of real models against diffusers' own hooks: every step's prediction, and when it compiles."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch._dynamo.backends.registry import lookup_backend

import attnrewrite
from tests.caching_models import MODELS, AttentionCounter, Clock, Model, denoise, diffusers
from tests.helpers import relative_error

LIMIT = 1e-4
"""Relative to the largest number of a step's prediction."""

PAB: dict[str, dict[str, Any]] = {
    "cogvideox": {"spatial_attention_block_skip_range": 2},
    "latte": {"spatial_attention_block_skip_range": 2, "temporal_attention_block_skip_range": 4},
    "wan": {"spatial_attention_block_skip_range": 2, "cross_attention_block_skip_range": 4},
    "flux": {"spatial_attention_block_skip_range": 3, "spatial_attention_timestep_skip_range": (100, 950)},
    "unet": {"spatial_attention_block_skip_range": 2, "cross_attention_block_skip_range": 4},
}
EVERY_TIMESTEP = (-1, 1000)
OPEN = {
    "spatial_attention_timestep_skip_range": EVERY_TIMESTEP,
    "unconditional_batch_timestep_skip_range": EVERY_TIMESTEP,
}
"""FasterCache from the second step on; both ends are outside."""
FASTER: dict[str, dict[str, Any]] = {
    "cogvideox": {"attention_weight_callback": lambda _: 0.3},
    "latte": {"temporal_attention_block_skip_range": 2, "attention_weight_callback": lambda _: 0.5},
    "wan": {"attention_weight_callback": lambda _: 0.5},
    "flux": {"attention_weight_callback": lambda _: 0.5},
    "unet": {"attention_weight_callback": lambda _: 0.5},
}
INDUCTOR = {("pab", "cogvideox"), ("faster", "flux")}
"""What goes through Inductor, which takes up to half a minute a graph here; the others run as they are."""


class Inner:
    """An inner compiler that counts what it compiles, and the attentions that are computed in calls of its graphs."""

    def __init__(self, name: str) -> None:
        self.compilations = 0
        self.attentions = self.sites = 0
        self._compile: Any = lookup_backend(name)

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        self.compilations += 1
        attention = torch.ops.aten.scaled_dot_product_attention.default
        attentions = sum(node.target is attention for node in gm.graph.nodes)
        self.sites = max(self.sites, attentions)
        compiled = self._compile(gm, example_inputs)

        def call(*args: Any) -> Any:
            self.attentions += attentions
            return compiled(*args)

        return call


def graphs() -> int:
    """Graphs that Dynamo has made since it was reset."""
    count: int = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    return count


class History:
    """How much was compiled when each step was done."""

    def __init__(self, inner: Inner) -> None:
        self.inner = inner
        self.graphs: list[int] = []
        self.compilations: list[int] = []
        self._before = graphs()

    def __call__(self, step: int) -> None:
        self.graphs.append(graphs() - self._before)
        self.compilations.append(self.inner.compilations)

    def check(self) -> None:
        """At most three of each in all, none of them after the third step."""
        for counted in (self.graphs, self.compilations):
            assert counted[-1] <= 3, counted
            assert counted[2] == counted[-1], counted


def with_hooks(model: nn.Module, config: Any) -> nn.Module:
    """A copy under diffusers' hooks."""
    hooked = copy.deepcopy(model)
    if isinstance(config, diffusers.PyramidAttentionBroadcastConfig):
        diffusers.apply_pyramid_attention_broadcast(hooked, config)
        return hooked
    diffusers.apply_faster_cache(hooked, config)
    _hook_attentions_that_diffusers_leaves_out(hooked, config)
    return hooked


def _hook_attentions_that_diffusers_leaves_out(model: nn.Module, config: Any) -> None:
    """Those that the configuration's identifiers match, but not diffusers' fixed list.

    ``apply_faster_cache`` looks at modules only whose name *begins* with ``blocks``, ``transformer_blocks`` and the
    like, whatever identifiers it is given: none of a UNet's.
    """
    faster_cache = diffusers.hooks.faster_cache
    for name, module in model.named_modules():
        hooks = getattr(module, "_diffusers_hook", None)
        if isinstance(module, faster_cache._ATTENTION_CLASSES) and hooks is None:
            faster_cache._apply_faster_cache_on_attention_class(name, module, config)


def reset_hooks(model: nn.Module) -> None:
    diffusers.hooks.HookRegistry.check_if_exists_or_initialize(model).reset_stateful_hooks()


def compiled_copy(model: nn.Module, inner: Inner, **settings: Any) -> Any:
    return torch.compile(
        copy.deepcopy(model), backend="attnrewrite", fullgraph=True, options={"inner_backend": inner}, **settings
    )


def inner_for(method: str, name: str) -> Inner:
    return Inner("inductor" if (method, name) in INDUCTOR else "eager")


def pab_config(model: Model, clock: Clock) -> Any:
    return diffusers.PyramidAttentionBroadcastConfig(**PAB[model.name], **model.pab, current_timestep_callback=clock)


def faster_configs(model: Model, clock: Clock, **settings: Any) -> tuple[Any, Any]:
    """diffusers' configuration and ours with the same values."""
    values = {**FASTER[model.name], **settings, **model.faster, "current_timestep_callback": clock}
    return diffusers.FasterCacheConfig(**values), attnrewrite.FasterCacheConfig(**values, follow_diffusers=True)


def worst(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    assert len(actual) == len(expected)
    return max(map(relative_error, actual, expected))


def assert_reused(predictions: Sequence[Tensor], uncached: Sequence[Tensor]) -> None:
    """The caches change what is predicted, at most steps by more than what is compared allows."""
    changed = [relative_error(*pair) > LIMIT for pair in zip(predictions, uncached, strict=True)]
    assert sum(changed) > len(changed) // 2, changed


@pytest.mark.parametrize("name", list(MODELS))
def test_pyramid_attention_broadcast(name: str) -> None:
    model, clock = MODELS[name], Clock()
    network = model.build()
    config = pab_config(model, clock)
    with AttentionCounter() as eager:
        expected = denoise(model, with_hooks(network, config), clock)
    inner = inner_for("pab", name)
    compiled = compiled_copy(network, inner)
    attnrewrite.enable_cache(compiled, config)
    history = History(inner)
    predictions = denoise(model, compiled, clock, after_step=history)
    assert worst(predictions, expected) <= LIMIT
    assert_reused(predictions, denoise(model, network, clock))
    assert inner.attentions == eager.count
    history.check()


def test_kinds_are_told_without_identifiers() -> None:
    """diffusers' defaults take Latte's temporal attentions as spatial ones; here the graph says what they are."""
    model, clock = MODELS["latte"], Clock()
    network = model.build()
    settings = {**PAB["latte"], "current_timestep_callback": clock}
    expected = denoise(model, with_hooks(network, pab_config(model, clock)), clock)
    misled = denoise(model, with_hooks(network, diffusers.PyramidAttentionBroadcastConfig(**settings)), clock)
    assert worst(misled, expected) > LIMIT
    compiled = compiled_copy(network, Inner("eager"))
    attnrewrite.enable_cache(compiled, attnrewrite.PyramidAttentionBroadcastConfig(**settings))
    assert worst(denoise(model, compiled, clock), expected) <= LIMIT


@pytest.mark.parametrize("name", list(MODELS))
def test_faster_cache(name: str) -> None:
    model, clock = MODELS[name], Clock()
    network = model.build()
    theirs, ours = faster_configs(model, clock, **OPEN)
    with AttentionCounter() as eager:
        expected = denoise(model, with_hooks(network, theirs), clock)
    inner = inner_for("faster", name)
    compiled = compiled_copy(network, inner)
    attnrewrite.enable_cache(compiled, ours)
    history = History(inner)
    predictions = denoise(model, compiled, clock, after_step=history)
    assert worst(predictions, expected) <= LIMIT
    assert_reused(predictions, denoise(model, network, clock))
    # The graphs of the conditional half are compiled by a call that comes before the first one.
    extra = 0 if ours.is_guidance_distilled else inner.sites
    assert inner.attentions == eager.count + extra
    history.check()


def test_faster_cache_compiles_before_its_windows_open() -> None:
    """With the default windows nothing is reused before timestep 681, the twelfth step; compilation is done by then."""
    model, clock = MODELS["cogvideox"], Clock()
    network = model.build()
    theirs, ours = faster_configs(model, clock)
    expected = denoise(model, with_hooks(network, theirs), clock)
    inner = Inner("eager")
    compiled = compiled_copy(network, inner)
    attnrewrite.enable_cache(compiled, ours)
    history = History(inner)
    predictions = denoise(model, compiled, clock, after_step=history)
    assert worst(predictions, expected) <= LIMIT
    assert_reused(predictions, denoise(model, network, clock))
    history.check()


@pytest.mark.parametrize(
    ("name", "streams"), [("cogvideox", "cache_stream"), ("unet", "cache_stream"), ("wan", "cache_context")]
)
def test_separate_guidance_calls(name: str, streams: str) -> None:
    """One call for each branch; diffusers' hooks take a copy of the model for each, or they would mix them."""
    model, clock = MODELS[name], Clock()
    network = model.build()
    config = pab_config(model, clock)
    hooked = {branch: with_hooks(network, config) for branch in ("cond", "uncond")}
    expected = denoise(model, hooked, clock, separate=True)
    inner = Inner("eager")
    compiled = compiled_copy(network, inner)
    attnrewrite.enable_cache(compiled, config)
    history = History(inner)
    stream = attnrewrite.cache_stream if streams == "cache_stream" else compiled.cache_context
    predictions = denoise(model, compiled, clock, separate=True, streams=stream, after_step=history)
    assert worst(predictions, expected) <= LIMIT
    assert_reused(predictions, denoise(model, network, clock))
    history.check()


def test_one_hooked_model_mixes_separate_guidance_calls() -> None:
    """Why the test above needs a copy for each branch: both calls of a step count, and share what is stored."""
    model, clock = MODELS["cogvideox"], Clock()
    network = model.build()
    config = pab_config(model, clock)
    hooked = {branch: with_hooks(network, config) for branch in ("cond", "uncond")}
    apart = denoise(model, hooked, clock, separate=True)
    mixed = denoise(model, with_hooks(network, config), clock, separate=True)
    assert worst(mixed, apart) > 10 * LIMIT


def resolutions(model: Model, call: Any, clock: Clock, before: Callable[[], None], **settings: Any) -> Iterator[Any]:
    """Three runs: at one resolution, at another, and at the first again."""
    for run, resolution in enumerate((0, 1, 0)):
        before()
        yield denoise(model, call, clock, resolution=resolution, seed=run, **settings)


@pytest.mark.parametrize(("method", "name"), [("pab", "cogvideox"), ("faster", "wan")])
def test_resolution_changes_between_runs(method: str, name: str) -> None:
    model, clock = MODELS[name], Clock()
    network = model.build()
    theirs = ours = pab_config(model, clock)
    if method == "faster":
        theirs, ours = faster_configs(model, clock, **OPEN)
    hooked = with_hooks(network, theirs)
    expected = list(resolutions(model, hooked, clock, lambda: reset_hooks(hooked)))
    inner = Inner("eager")
    compiled = compiled_copy(network, inner)
    attnrewrite.enable_cache(compiled, ours)
    history = History(inner)
    runs = list(resolutions(model, compiled, clock, lambda: None, after_step=history))
    for actual, wanted in zip(runs, expected, strict=True):
        assert worst(actual, wanted) <= LIMIT
    # Each resolution is compiled at its first steps, and what was compiled for the first still stands.
    for counted in (history.graphs, history.compilations):
        assert counted[32] == counted[-1], counted
        assert counted[-1] <= 6, counted


def test_reset_by_hand_within_a_run() -> None:
    model, clock = MODELS["wan"], Clock()
    network = model.build()
    config = pab_config(model, clock)
    hooked = with_hooks(network, config)
    expected = denoise(model, hooked, clock, after_step=lambda step: reset_hooks(hooked) if step == 14 else None)
    compiled = compiled_copy(network, Inner("eager"))
    attnrewrite.enable_cache(compiled, config)
    predictions = denoise(
        model, compiled, clock, after_step=lambda step: attnrewrite.reset_cache(compiled) if step == 14 else None
    )
    assert worst(predictions, expected) <= LIMIT
    reset_hooks(hooked)
    assert worst(denoise(model, hooked, clock), expected) > LIMIT


def test_without_the_cache_the_model_is_as_before() -> None:
    model, clock = MODELS["cogvideox"], Clock()
    network = model.build()
    config = pab_config(model, clock)
    uncached = denoise(model, network, clock)
    compiled = compiled_copy(network, Inner("eager"))
    with attnrewrite.attention_cache(compiled, config):
        assert_reused(denoise(model, compiled, clock), uncached)
    assert worst(denoise(model, compiled, clock), uncached) <= LIMIT
    attnrewrite.enable_cache(compiled, config)
    attnrewrite.disable_cache(compiled)
    assert worst(denoise(model, compiled, clock), uncached) <= LIMIT


def test_one_set_of_graphs_for_all_resolutions() -> None:
    """Symbolic sizes: another resolution compiles nothing, as it does without a cache."""
    model, clock = MODELS["wan"], Clock()
    network = model.build()
    config = pab_config(model, clock)
    hooked = with_hooks(network, config)
    expected = list(resolutions(model, hooked, clock, lambda: reset_hooks(hooked)))
    inner = Inner("eager")
    compiled = compiled_copy(network, inner, dynamic=True)
    attnrewrite.enable_cache(compiled, config)
    history = History(inner)
    runs = list(resolutions(model, compiled, clock, lambda: None, after_step=history))
    assert max(worst(*pair) for pair in zip(runs, expected, strict=True)) <= LIMIT
    history.check()
