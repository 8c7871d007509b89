"""The rules of cross-step caching: against a plain reference, the kinds of a site, and where runs begin."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from attnrewrite.analysis.kinds import Kind
from attnrewrite.caching.guidance import GuidanceDelta
from attnrewrite.caching.method import CacheMethod, method_of
from attnrewrite.caching.runs import DenoisingRun
from attnrewrite.errors import AttnRewriteError, CacheError
from attnrewrite.options.cache_callbacks import timestep_of, weight_of
from attnrewrite.options.cache_config import FasterCacheConfig, PyramidAttentionBroadcastConfig, validated
from tests.support.caching_reference import Call, Outcome, evaluate, settings_of, simulate

SITES: dict[str, Kind] = {"a": "spatial", "b": "temporal", "c": "cross"}
Config = PyramidAttentionBroadcastConfig | FasterCacheConfig


def now() -> int:
    return 500


def broadcast(**settings: Any) -> CacheMethod:
    return method_of(validated(PyramidAttentionBroadcastConfig(current_timestep_callback=now, **settings)))


def faster_cache(**settings: Any) -> CacheMethod:
    settings = {"attention_weight_callback": lambda module: 0.5, "current_timestep_callback": now, **settings}
    return method_of(validated(FasterCacheConfig(**settings)))


# Against the reference ------------------------------------------------------------------------------------------------


class Stream:
    """What a caller of the rules keeps for one stream of calls."""

    def __init__(self) -> None:
        self.run = DenoisingRun()
        self.history: dict[str, list[Tensor]] = {}
        self.delta = GuidanceDelta("BCHW")


def by_the_rules(
    method: CacheMethod, sites: Mapping[str, Kind], calls: Sequence[Call], separate: bool, outputs: Tensor
) -> list[tuple[Outcome, dict[str, Tensor], Tensor | None]]:
    """What each call gives: the outcome, what each attention gives, and the predicted half of the output.

    Args:
        outputs: of the model, one for each call, ``[2, C, H, W]``. What attentions compute has an entry for each label.
    """
    streams: dict[str, Stream] = {}
    labels = torch.eye(len(calls), dtype=torch.float64)
    cached = {site: method.kind_of(site, kind) for site, kind in sites.items()}
    results = []
    for number, call in enumerate(calls):
        if call.reset:
            for each in streams.values():
                each.run.reset()
        stream = streams.setdefault(call.stream, Stream())
        iteration = stream.run.advance(call.timestep, call.signature)
        if iteration == 0:
            stream.history.clear()
            stream.delta.reset()
        outcome = Outcome(first=iteration == 0)
        halved = method.skips_unconditional(iteration, call.timestep, separate)
        kinds = method.reused(iteration, call.timestep, halved, separate)
        assert not kinds or kinds in method.reachable(halved, separate)
        values = {}
        for site, kind in cached.items():
            if kind is None:
                continue
            history = stream.history.setdefault(site, [])
            if kind in kinds:
                outcome.reused.add(site)
                values[site] = method.next_value(history, float(call.weight))
            else:
                values[site] = labels[number]
            if kind not in kinds or method.keeps_reused:
                stream.history[site] = [*history, values[site]][-method.history_length :]
        predicted = None
        if halved:
            predicted = stream.delta.predict(outputs[number, 1:], float(call.low), float(call.high))
        else:
            stream.delta.learn(outputs[number])
        results.append((outcome, values, predicted))
    return results


def split(image: Tensor) -> tuple[Tensor, Tensor]:
    """The low and the high frequencies of an image, by the whole spectrum."""
    height, width = image.shape[-2:]
    radius = min(height, width) // 5
    spectrum = torch.fft.fftshift(torch.fft.fft2(image), dim=(-2, -1))
    low = torch.tensor(
        [
            [(row - height // 2) ** 2 + (column - width // 2) ** 2 <= radius**2 for column in range(width)]
            for row in range(height)
        ]
    )
    parts = [
        torch.fft.ifft2(torch.fft.ifftshift(spectrum * kept, dim=(-2, -1))).real for kept in (low, low.logical_not())
    ]
    return parts[0], parts[1]


def assert_as_the_reference(config: Config, calls: Sequence[Call], separate: bool) -> None:
    config = validated(config)
    outputs = torch.randn(len(calls), 2, 1, 6, 11)
    expected = simulate(settings_of(config, separate), SITES, calls)
    labels = list(torch.eye(len(calls), dtype=torch.float64))
    found = by_the_rules(method_of(config), SITES, calls, separate, outputs)
    for (outcome, values, predicted), reference, output in zip(found, expected, outputs, strict=True):
        assert outcome.first == reference.first
        assert outcome.reused == reference.reused
        assert values.keys() == reference.values.keys()
        for site, value in values.items():
            assert torch.equal(value, evaluate(reference.values[site], labels))
        assert (predicted is None) == (reference.guidance is None)
        if predicted is not None and reference.guidance is not None:
            unconditional, conditional = outputs[reference.guidance.learned].double()
            low, high = split(unconditional - conditional)
            whole = output[1] + float(reference.guidance.low) * low + float(reference.guidance.high) * high
            assert torch.allclose(predicted[0].double(), whole, atol=1e-5)


ranges = st.none() | st.integers(1, 5)
windows = st.tuples(st.integers(-1, 20), st.integers(-1, 20)).map(lambda ends: (min(ends), max(ends)))
# Quarters, and so few calls that float64 holds every share exactly.
weights = st.sampled_from([Fraction(quarters, 4) for quarters in range(5)])


@st.composite
def series(draw: st.DrawFn) -> list[Call]:
    """Calls of one or two streams, whose timesteps fall, rise, stay or jump."""
    timestep = float(draw(st.integers(0, 20)))
    step = draw(st.sampled_from([-1.0, 1.0, -2.5]))
    streams = draw(st.sampled_from([("",), ("cond", "uncond")]))
    calls: list[Call] = []
    length = draw(st.integers(1, 18))
    while len(calls) < length:
        for stream in draw(st.permutations(streams)):
            rare = draw(st.integers(0, 15))
            calls.append(
                Call(
                    timestep,
                    stream,
                    signature=draw(st.sampled_from(["small", "large"])) if rare == 0 else "small",
                    reset=rare == 1,
                    weight=draw(weights),
                    low=draw(weights),
                    high=draw(weights),
                )
            )
        change = draw(st.integers(0, 9))
        timestep = float(draw(st.integers(0, 20))) if change == 0 else timestep + step * (change > 2)
    return calls


broadcasts = st.builds(
    PyramidAttentionBroadcastConfig,
    spatial_attention_block_skip_range=st.integers(1, 4),
    temporal_attention_block_skip_range=ranges,
    cross_attention_block_skip_range=ranges,
    spatial_attention_timestep_skip_range=windows,
    temporal_attention_timestep_skip_range=windows,
    cross_attention_timestep_skip_range=windows,
    current_timestep_callback=st.just(now),
)
faster_caches = st.builds(
    FasterCacheConfig,
    spatial_attention_block_skip_range=st.integers(1, 4),
    temporal_attention_block_skip_range=ranges,
    spatial_attention_timestep_skip_range=windows,
    temporal_attention_timestep_skip_range=windows,
    unconditional_batch_skip_range=st.integers(1, 5),
    unconditional_batch_timestep_skip_range=windows,
    attention_weight_callback=st.just(lambda module: 0.5),
    is_guidance_distilled=st.booleans(),
    follow_diffusers=st.booleans(),
    current_timestep_callback=st.just(now),
)


@settings(max_examples=600, deadline=None)
@given(broadcasts, series(), st.booleans())
def test_pyramid_attention_broadcast_is_the_reference(config: Config, calls: list[Call], separate: bool) -> None:
    assert_as_the_reference(config, calls, separate)


@settings(max_examples=1000, deadline=None)
@given(faster_caches, series(), st.booleans())
def test_faster_cache_is_the_reference(config: Config, calls: list[Call], separate: bool) -> None:
    assert_as_the_reference(config, calls, separate)


@settings(max_examples=300, deadline=None)
@given(broadcasts | faster_caches, st.booleans(), st.booleans())
def test_reachable_is_what_every_call_could_reuse(config: Config, halved: bool, separate: bool) -> None:
    method = method_of(validated(config))
    timesteps = [timestep / 2 for timestep in range(-4, 44)]
    walked = {method.reused(iteration, timestep, halved, separate) for iteration in range(61) for timestep in timesteps}
    assert method.reachable(halved, separate) == walked - {frozenset()}


def test_reachable_sees_the_timestep_at_which_one_range_ends_and_another_begins() -> None:
    method = broadcast(
        spatial_attention_block_skip_range=2,
        temporal_attention_block_skip_range=2,
        cross_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(0, 10),
        temporal_attention_timestep_skip_range=(0, 5),
        cross_attention_timestep_skip_range=(5, 10),
    )
    assert method.reused(1, 5, False, False) == {"spatial"}
    assert method.reachable(False, False) == {
        frozenset({"spatial"}),
        frozenset({"spatial", "temporal"}),
        frozenset({"spatial", "cross"}),
    }


def test_reachable_does_not_walk_the_iterations() -> None:
    method = broadcast(
        spatial_attention_block_skip_range=9973,
        temporal_attention_block_skip_range=9967,
        cross_attention_block_skip_range=2 * 9973,
    )
    kinds: list[Kind] = ["spatial", "temporal", "cross"]
    every = {frozenset(some) for count in (1, 2, 3) for some in itertools.combinations(kinds, count)}
    # Where the cross-attentions are due, the spatial ones are.
    assert method.reachable(False, False) == every - {frozenset({"spatial"}), frozenset({"spatial", "temporal"})}


# The kind of a site ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "kind", "expected"),
    [
        ("blocks.0.attn1", "spatial", "spatial"),
        ("blocks.0.attn1", "temporal", "temporal"),
        ("blocks.0.attn2", "cross", "cross"),
    ],
)
def test_without_identifiers_the_graph_says_the_kind(path: str, kind: Kind, expected: Kind) -> None:
    every = {f"{each}_attention_block_skip_range": 2 for each in ("spatial", "temporal", "cross")}
    assert broadcast(**every).kind_of(path, kind) == expected
    assert broadcast(**{f"{kind}_attention_block_skip_range": 2}).kinds == {kind}
    others = {name: value for name, value in every.items() if not name.startswith(kind)}
    assert broadcast(**others).kind_of(path, kind) is None


def test_identifiers_come_before_the_graph() -> None:
    method = broadcast(
        spatial_attention_block_skip_range=2,
        temporal_attention_block_skip_range=4,
        cross_attention_block_skip_range=6,
        spatial_attention_block_identifiers=["^space", "both"],
        temporal_attention_block_identifiers=["^time", "both"],
        cross_attention_block_identifiers=[r"\.context$"],
    )
    assert method.kind_of("space.0", "temporal") == "spatial"
    assert method.kind_of("time.0", "spatial") == "temporal"
    assert method.kind_of("both.0", "temporal") == "spatial"
    assert method.kind_of("neither.0", "spatial") is None
    assert method.kind_of("neither.0", "temporal") is None
    assert method.kind_of("space.context", "cross") == "cross"
    assert method.kind_of("space.0", "cross") is None


def test_identifiers_of_one_kind_leave_the_other_to_the_graph() -> None:
    method = broadcast(
        spatial_attention_block_skip_range=2,
        temporal_attention_block_skip_range=4,
        temporal_attention_block_identifiers=["^time"],
    )
    assert method.kind_of("time.0", "spatial") == "temporal"
    assert method.kind_of("space.0", "spatial") == "spatial"
    assert method.kind_of("space.0", "temporal") is None


def test_a_site_named_as_a_kind_that_is_not_cached_is_not_cached() -> None:
    names = {"spatial_attention_block_identifiers": ["blocks"]}
    method = broadcast(temporal_attention_block_skip_range=2, **names)
    assert method.kind_of("blocks.0", "temporal") is None
    # Named as both, the one that is cached holds, as in diffusers.
    both = broadcast(
        temporal_attention_block_skip_range=2, temporal_attention_block_identifiers=["temporal_blocks"], **names
    )
    assert both.kind_of("temporal_blocks.0", "spatial") == "temporal"


def test_faster_cache_has_no_cross_attention() -> None:
    method = faster_cache(temporal_attention_block_skip_range=3)
    assert method.kinds == {"spatial", "temporal"}
    assert method.kind_of("blocks.0.attn2", "cross") is None


# What is stored -------------------------------------------------------------------------------------------------------


def test_what_the_methods_keep() -> None:
    assert (broadcast().history_length, broadcast().keeps_reused) == (1, False)
    assert (faster_cache().history_length, faster_cache().keeps_reused) == (2, False)
    assert faster_cache(follow_diffusers=True).keeps_reused


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_stands_in_has_the_dtype_of_what_is_stored(dtype: torch.dtype) -> None:
    history = [torch.full((3,), 1.0, dtype=dtype), torch.full((3,), 2.0, dtype=dtype)]
    assert broadcast().next_value(history, 0.5) is history[-1]
    extrapolated = faster_cache().next_value(history, 0.5)
    assert extrapolated.dtype == dtype
    assert extrapolated.tolist() == [2.5] * 3
    assert faster_cache().next_value(history[:1], 0.5) is history[0]


def test_one_half_cannot_stand_in_for_both() -> None:
    method = faster_cache()
    assert method.reused(1, 500, halved=False, separate=False) == frozenset()
    assert method.reused(1, 500, halved=True, separate=False) == {"spatial"}
    assert method.reused(1, 500, halved=False, separate=True) == {"spatial"}
    assert faster_cache(is_guidance_distilled=True).reused(1, 500, halved=False, separate=False) == {"spatial"}
    assert not method.skips_unconditional(1, 500, separate=True)
    assert not broadcast().skips_unconditional(1, 500, separate=False)


# Runs -----------------------------------------------------------------------------------------------------------------


def iterations(run: DenoisingRun, timesteps: Sequence[float], signature: str = "") -> list[int]:
    return [run.advance(timestep, signature) for timestep in timesteps]


@pytest.mark.parametrize(
    ("timesteps", "expected"),
    [
        ([999, 500, 1], [0, 1, 2]),
        ([1, 500, 999], [0, 1, 2]),
        ([999, 500, 1, 999, 500], [0, 1, 2, 0, 1]),
        ([1, 500, 999, 1, 500], [0, 1, 2, 0, 1]),
        ([999, 999, 500, 500, 999], [0, 1, 2, 3, 0]),
        ([5, 5, 7, 7, 6, 5, 5.5], [0, 1, 2, 3, 0, 1, 0]),
        ([0.9, 0.9, 0.9], [0, 1, 2]),
    ],
)
def test_a_run_begins_where_the_timestep_turns_back(timesteps: list[float], expected: list[int]) -> None:
    assert iterations(DenoisingRun(), timesteps) == expected


def test_a_run_begins_where_inputs_change_and_by_hand() -> None:
    run = DenoisingRun()
    assert iterations(run, [9, 8]) == [0, 1]
    assert iterations(run, [7, 6], "larger") == [0, 1]
    run.reset()
    # The direction is forgotten, too.
    assert iterations(run, [7, 8, 9], "larger") == [0, 1, 2]


def test_repeated_timesteps_are_told() -> None:
    run = DenoisingRun()
    repeated = []
    for timestep in (9, 9, 8, 8, 8, 7, 9, 9):
        run.advance(timestep, "")
        repeated.append(run.repeats)
    assert repeated == [False, True, False, True, True, False, False, True]
    run.advance(9, "another")
    assert not run.repeats
    run.reset()
    run.advance(9, "another")
    assert not run.repeats


# Callbacks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("answer", [3, 3.0, torch.tensor(3), torch.tensor([3.0], dtype=torch.bfloat16)])
def test_a_timestep_is_a_number_or_a_tensor_of_one_element(answer: Any) -> None:
    timestep = timestep_of(lambda: answer)
    assert (timestep, type(timestep)) == (3.0, float)


@pytest.mark.parametrize(
    ("answer", "pieces"),
    [
        (None, ["returned None", "while the pipeline runs", "before each call"]),
        ("500", ["one number", "'500'"]),
        (True, ["one number", "True"]),
        (float("nan"), ["one number", "nan"]),
        (torch.tensor([500, 400]), ["tensor of one element", "shape (2,)"]),
        (torch.tensor([]), ["tensor of one element", "shape (0,)"]),
        (torch.tensor(1j), ["one number", "1.j"]),
    ],
    ids=lambda value: None,
)
def test_what_is_no_timestep_is_refused(answer: Any, pieces: list[str]) -> None:
    with pytest.raises(CacheError) as error:
        timestep_of(lambda: answer)
    assert isinstance(error.value, AttnRewriteError)
    assert isinstance(error.value, RuntimeError)
    assert [piece for piece in ["current_timestep_callback", *pieces] if piece not in str(error.value)] == []


def test_what_is_no_weight_is_refused() -> None:
    module = nn.Linear(2, 2)
    assert weight_of(lambda module: module.in_features, module, "attention_weight_callback") == 2.0
    with pytest.raises(CacheError, match="attention_weight_callback must return one number"):
        weight_of(lambda module: None, module, "attention_weight_callback")
