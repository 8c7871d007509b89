"""Cross-step caching of real models against diffusers' own hooks: every step's prediction, and when it compiles."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
from torch import Tensor

import attnrewrite
from tests.caching.comparison import (
    LIMIT,
    OPEN,
    PAB,
    Comparison,
    History,
    Inner,
    compare,
    compiled_copy,
    faster_configs,
    pab_config,
    reset_hooks,
    with_hooks,
    worst,
)
from tests.support.caching_models import MODELS, Clock, Model, denoise, diffusers
from tests.support.helpers import relative_error

pytestmark = pytest.mark.drawn


def assert_reused(predictions: Sequence[Tensor], uncached: Sequence[Tensor]) -> None:
    """The caches change what is predicted, at most steps by more than what is compared allows."""
    changed = [relative_error(*pair) > LIMIT for pair in zip(predictions, uncached, strict=True)]
    assert sum(changed) > len(changed) // 2, changed


def check(found: Comparison) -> None:
    """What every comparison must show."""
    assert found.error <= LIMIT
    assert found.changed > 15
    assert max(found.graphs, found.compilations) <= 3
    assert found.last_at_step <= 3
    assert found.attentions == found.attentions_expected + found.preparing < found.attentions_uncached


@pytest.mark.parametrize("name", list(MODELS))
def test_pyramid_attention_broadcast(name: str) -> None:
    check(compare(name, "pab"))


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
    check(compare(name, "faster", "inductor" if name == "flux" else "eager", settings=OPEN))


def test_faster_cache_compiles_before_its_windows_open() -> None:
    check(compare("cogvideox", "faster"))


@pytest.mark.parametrize(
    ("name", "streams"), [("cogvideox", "cache_stream"), ("unet", "cache_stream"), ("wan", "cache_context")]
)
def test_separate_guidance_calls(name: str, streams: str) -> None:
    check(compare(name, "pab", streams=streams))


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
