"""Attention reuse on small models: what is kept, when it is taken, and that nothing else changes."""

from __future__ import annotations

import copy
import gc
import runpy
import threading
import weakref
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import attnrewrite
from attnrewrite import CacheError, CacheMemoryError, FasterCacheConfig, OptionError, PyramidAttentionBroadcastConfig
from attnrewrite.backend import collect_reports
from attnrewrite.caching import enabling
from attnrewrite.errors import CacheTypeError
from attnrewrite.options.cache_config import validated
from attnrewrite.report.rows import SiteReport
from tests.support.caching_reference import Call, evaluate, settings_of, simulate
from tests.support.caching_video import ALL, Attention, Clock, broadcast, compiled, inputs, spatial, steps, truth, video
from tests.support.helpers import recording, relative_error

pytestmark = pytest.mark.drawn

linear = torch.ops.aten.linear.default


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    with torch.no_grad():
        yield


# What is kept ---------------------------------------------------------------------------------------------------------


def rows(model: Any, clock: Clock, config: Any) -> list[SiteReport]:
    with collect_reports() as graphs, attnrewrite.attention_cache(model, config):
        steps(model, clock, [500])
    return [row for graph in graphs for row in graph.sites]


def test_kinds_are_told_in_the_report() -> None:
    clock = Clock()
    found = rows(compiled(video()), clock, broadcast(clock, cross_attention_block_skip_range=3))
    kept = {row.location.module: row.cached for row in found if row.location is not None}
    assert kept["spatial"].startswith("spatial (")
    assert kept["temporal"].startswith("no: temporal_attention_block_skip_range is not set; it is temporal (")
    assert kept["cross"].startswith("cross (the key comes from text")


def test_what_feeds_a_reused_attention_alone_is_gone() -> None:
    clock = Clock()
    inner, graphs = recording()
    model = compiled(video(), inner)
    with attnrewrite.attention_cache(model, broadcast(clock, **ALL)):
        steps(model, clock, [500, 400])
    counts = [len(graph.graph.find_nodes(op="call_function", target=linear)) for graph in graphs]
    # All twelve projections, and none: the output projection is kept with the attention.
    assert counts == [12, 0]


@pytest.mark.parametrize("dynamic", [False, True])
def test_each_set_of_kinds_has_a_graph_and_all_are_compiled_at_once(dynamic: bool) -> None:
    clock = Clock()
    inner, graphs = recording()
    model = compiled(video(), inner, dynamic=dynamic)
    config = broadcast(clock, temporal_attention_block_skip_range=4, cross_attention_block_skip_range=4)
    with attnrewrite.attention_cache(model, config):
        found = steps(model, clock, [900, 400])
        assert len(graphs) == 3  # Nothing, everything, and what is computed once in four calls.
        for number, timestep in enumerate([300, 200, 150], start=2):
            clock.now = timestep
            found.append(model(**inputs(number)))
    assert len(graphs) == 3
    expected = truth(range(5))
    for place, numbers in ((1, (0, 0, 2, 2, 4)), (2, (0, 0, 0, 0, 4)), (3, (0, 0, 0, 0, 4))):
        for result, number in zip(found, numbers, strict=True):
            assert relative_error(result[place], expected[number][place]) <= 1e-5
    assert all(relative_error(result[0], each[0]) == 0 for result, each in zip(found, expected, strict=True))


class Joint(nn.Module):
    """Two sequences in one attention, divided behind the output projection, as in CogVideoX."""

    def __init__(self, drop_text: bool) -> None:
        super().__init__()
        self.attention = Attention()
        self.drop_text = drop_text

    def forward(self, x: Tensor, text: Tensor) -> Any:
        x = x.flatten(1, 2)
        both = self.attention(torch.cat([text, x], dim=1))
        words, positions = both.split([text.shape[1], x.shape[1]], dim=1)
        return positions + x if self.drop_text else (positions + x, words + text)


@pytest.mark.parametrize(("drop_text", "kept"), [(False, (2, 19, 8)), (True, (2, 15, 8))])
@pytest.mark.parametrize("dynamic", [False, True])
def test_parts_of_an_attention_are_kept_as_one_and_unread_parts_are_not(
    drop_text: bool, kept: tuple[int, ...], dynamic: bool
) -> None:
    torch.manual_seed(0)
    model, clock = Joint(drop_text).eval(), Clock()
    inner, graphs = recording()
    fast = compiled(model, inner, dynamic=dynamic)
    with attnrewrite.attention_cache(fast, broadcast(clock)):
        clock.now = 500
        first = fast(**inputs(0))
        clock.now = 400
        found = fast(**inputs(1))
    reuse = graphs[1]
    (taken,) = [node for node in reuse.graph.find_nodes(op="placeholder") if "attention_value" in node.name]
    assert len(taken.meta["val"].shape) == 3
    if not dynamic:
        assert tuple(taken.meta["val"].shape) == kept
    assert relative_error(first, model(**inputs(0))) <= 1e-5
    pairs = [(inputs(0)["x"], inputs(1)["x"]), (inputs(0)["text"], inputs(1)["text"])]
    plain = model(**inputs(0))
    plain = (plain,) if drop_text else plain
    for result, before, (old, new) in zip((found,) if drop_text else found, plain, pairs, strict=False):
        old, new = (each.flatten(1, 2) if each.dim() == 4 else each for each in (old, new))
        assert relative_error(result, before - old + new) <= 1e-5


class Alone(nn.Module):
    """An attention that is the model's output itself."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention()

    def forward(self, x: Tensor, text: Tensor) -> Any:
        return self.attention(x).transpose(1, 2)


@pytest.mark.parametrize("inner", ["eager", "aot_eager", "inductor"])
def test_what_the_caller_does_to_a_result_does_not_reach_what_is_kept(inner: str) -> None:
    torch.manual_seed(0)
    model, clock = Alone().eval(), Clock()
    expected = model(**inputs(0)).clone()
    fast = compiled(model, inner)
    with attnrewrite.attention_cache(fast, broadcast(clock, every=4)):
        for number in range(4):
            clock.now = 500 - number
            result = fast(**inputs(number))
            assert relative_error(result, expected) <= 1e-5
            result.zero_()


class Scaled(nn.Module):
    """What is done to the attention behind its projection depends on more than parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention()

    def forward(self, x: Tensor, scale: Tensor, factor: int) -> Any:
        return self.attention(x) * scale * factor


def test_what_changes_from_step_to_step_is_not_kept() -> None:
    torch.manual_seed(0)
    model, clock = Scaled().eval(), Clock()
    fast = compiled(model, dynamic=True)
    x = inputs(0)["x"]
    with attnrewrite.attention_cache(fast, broadcast(clock, every=8)):
        for number, factor in enumerate((2, 3, 5)):
            clock.now = 500 - number
            scale = torch.tensor(1.0 + number)
            assert relative_error(fast(x, scale, factor), model(x, scale, factor)) <= 1e-5


# When it is taken -----------------------------------------------------------------------------------------------------

kinds = ("spatial", "temporal", "cross")
ranges = st.none() | st.integers(1, 4)
windows = st.sampled_from([(-1, 12), (2, 9)])
timesteps = st.lists(st.integers(0, 10), min_size=1, max_size=7) | st.integers(1, 7).map(
    lambda count: list(range(10, 10 - count, -1))
)


@st.composite
def configs(draw: st.DrawFn) -> Any:
    chosen: dict[str, Any] = {f"{kind}_attention_block_skip_range": draw(ranges) for kind in kinds}
    if not any(chosen.values()):
        chosen["spatial_attention_block_skip_range"] = 2
    chosen |= {f"{kind}_attention_timestep_skip_range": draw(windows) for kind in kinds}
    if draw(st.booleans()):
        return PyramidAttentionBroadcastConfig(**chosen)
    chosen = {key: value for key, value in chosen.items() if not key.startswith("cross")}
    if not any(value for key, value in chosen.items() if key.endswith("block_skip_range")):
        chosen["spatial_attention_block_skip_range"] = 2
    return FasterCacheConfig(
        **chosen,
        unconditional_batch_skip_range=draw(st.integers(1, 4)),
        unconditional_batch_timestep_skip_range=draw(windows),
        attention_weight_callback=lambda module: 0.25,
        low_frequency_weight_callback=lambda module: 1.0,
        high_frequency_weight_callback=lambda module: 1.0,
        tensor_format="BCHW",
        unconditional_conditional_input_kwargs_identifiers=("x", "text"),
        follow_diffusers=draw(st.booleans()),
    )


@st.composite
def series(draw: st.DrawFn) -> tuple[list[Call], bool]:
    separate = draw(st.booleans())
    calls = []
    for timestep in draw(timesteps):
        stream = draw(st.sampled_from(["cond", "uncond"])) if separate else draw(st.sampled_from(["", "other"]))
        reset = draw(st.integers(0, 9)) == 0
        positions = draw(st.sampled_from([5, 5, 5, 6]))
        calls.append(Call(timestep, stream, positions, reset, Fraction(1, 4)))
    return calls, separate


machine = None


def the_machine() -> tuple[Any, nn.Module, dict[int, list[Any]]]:
    """A compiled model that all series share, and what it gives without a cache, by positions and call."""
    global machine
    if machine is None:
        model = video()
        fast = compiled(model)
        plain = {positions: [model(**inputs(n, positions=positions)) for n in range(7)] for positions in (5, 6)}
        machine = fast, model, plain
    return machine


@settings(max_examples=8, deadline=None)
@given(config=configs(), drawn=series())
def test_series_of_calls_give_what_the_reference_gives(config: Any, drawn: tuple[list[Call], bool]) -> None:
    calls, separate = drawn
    clock = Clock()
    config.current_timestep_callback = clock
    sites = {"spatial": "spatial", "temporal": "temporal", "cross": "cross"}
    expected = simulate(settings_of(validated(config), separate), sites, calls)
    fast, _, plain = the_machine()
    with torch.no_grad(), torch._dynamo.config.patch(recompile_limit=1000), attnrewrite.attention_cache(fast, config):
        for number, (call, outcome) in enumerate(zip(calls, expected, strict=True)):
            if call.reset:
                attnrewrite.reset_cache(fast)
            clock.now = call.timestep
            positions: Any = call.signature
            with attnrewrite.cache_stream(call.stream):
                found = fast(**inputs(number, positions=positions))
            for place, site in enumerate(sites, start=1):
                whole = [plain[positions][n][place] for n in range(len(calls))]
                value = evaluate(outcome.values[site], whole) if site in outcome.values else whole[number]
                if len(found[place]) < len(value):
                    assert outcome.guidance is not None
                if site in outcome.reused or outcome.guidance is not None:
                    value = value[-len(found[place]) :]
                assert relative_error(found[place], value) <= 1e-5, (number, site, outcome)
            if outcome.guidance is None:
                assert relative_error(found[0], plain[positions][number][0]) <= 1e-6
            else:
                images = plain[positions]
                learned = images[outcome.guidance.learned][0]
                both = images[number][0]
                # Weights of one: the difference as it was learned.
                predicted = both[1:] + learned[:1] - learned[1:]
                assert relative_error(found[0], torch.cat([predicted, both[1:]])) <= 1e-5


def test_a_series_is_counted_through_graphs_of_several_sizes() -> None:
    """Another shape is another run, and the first one's again another."""
    clock = Clock()
    model = compiled(video())
    with attnrewrite.attention_cache(model, broadcast(clock, every=3)):
        found = steps(model, clock, [900, 500, 400], positions=5)
        found += steps(model, clock, [900, 500], positions=7)
        found += steps(model, clock, [300], positions=5)
    expected = [*truth([0, 0, 0]), *truth([0, 0], positions=7), *truth([0])]
    assert relative_error(spatial(found), spatial(expected)) <= 1e-5


# Streams and threads --------------------------------------------------------------------------------------------------


def test_streams_nest_and_do_not_mix() -> None:
    clock = Clock()
    model = compiled(video())
    found = {}
    with attnrewrite.attention_cache(model, broadcast(clock, every=2)):
        for step, timestep in enumerate([500, 400]):
            clock.now = timestep
            for number, names in enumerate((("a", "cond"), ("a", "uncond"), ("cond",))):
                with attnrewrite.cache_stream(names[0]):
                    if len(names) > 1:
                        with attnrewrite.cache_stream(names[1]):
                            found[step, number] = model(**inputs(3 * step + number))
                    else:
                        found[step, number] = model(**inputs(3 * step + number))
    for number, expected in enumerate(truth(range(3))):
        assert relative_error(found[1, number][1], expected[1]) <= 1e-5


def test_two_calls_at_one_timestep_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    model = compiled(video())
    with attnrewrite.attention_cache(model, broadcast(clock)), caplog.at_level("WARNING", "attnrewrite"):
        steps(model, clock, [500, 500, 400, 400])
    assert caplog.text.count("called twice at timestep 500") == 1
    assert "cache_stream('cond')" in caplog.text


def test_threads_do_not_mix() -> None:
    model = compiled(video())
    clock = Clock()
    model(**inputs(0))
    barrier = threading.Barrier(2, timeout=60)
    found: dict[int, Tensor] = {}

    def run(number: int) -> None:
        with torch.no_grad():
            for timestep in (500, 400):
                barrier.wait()
                clock.now = timestep
                barrier.wait()
                found[number] = model(**inputs(number if timestep == 500 else 5))[1]

    with attnrewrite.attention_cache(model, broadcast(clock)):
        threads = [threading.Thread(target=run, args=(number,)) for number in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for number, expected in enumerate(truth(range(2))):
        assert relative_error(found[number], expected[1]) <= 1e-5


def test_two_models_have_a_cache_each() -> None:
    clock = Clock()
    models = [compiled(video()), torch.compile(video(), backend="attnrewrite", options={"inner_backend": "eager"})]
    for model in models:
        attnrewrite.enable_cache(model, broadcast(clock))
    found = {}
    for step, timestep in enumerate([500, 400]):
        clock.now = timestep
        for number, model in enumerate(models):
            found[step, number] = model(**inputs(2 * step + number))
    for number, expected in enumerate(truth(range(2))):
        assert relative_error(found[1, number][1], expected[1]) <= 1e-5


# How a model is compiled ----------------------------------------------------------------------------------------------


def test_enabled_after_the_first_call_and_disabled_again() -> None:
    clock = Clock()
    inner, graphs = recording()
    model = compiled(video(), inner)
    plain = steps(model, clock, [500, 400])
    assert len(graphs) == 1
    for _ in range(2):
        with attnrewrite.attention_cache(model, broadcast(clock)):
            found = steps(model, clock, [500, 400])
        assert relative_error(spatial(found), spatial(truth([0, 0]))) <= 1e-5
        assert relative_error(steps(model, clock, [500, 400]), plain) == 0
    assert len(graphs) == 3


def test_kernels_change_in_the_middle_of_a_run() -> None:
    clock = Clock()
    model = compiled(video())
    with attnrewrite.attention_cache(model, broadcast(clock)):
        found = steps(model, clock, [500])
        with attnrewrite.attention_backend("_native_math"):
            clock.now = 400
            found.append(model(**inputs(1)))
    assert relative_error(spatial(found), spatial(truth([0, 0]))) <= 1e-5


@pytest.mark.parametrize("cache_first", [True, False])
def test_beside_kernels_for_the_model(cache_first: bool) -> None:
    clock = Clock()
    model = compiled(video())
    config = broadcast(clock)
    if cache_first:
        attnrewrite.enable_cache(model, config)
    attnrewrite.set_attention_backend(model, "_native_math")
    if not cache_first:
        attnrewrite.enable_cache(model, config)
    attnrewrite.reset_attention_backend(model)
    assert relative_error(spatial(steps(model, clock, [500, 400])), spatial(truth([0, 0]))) <= 1e-5
    attnrewrite.disable_cache(model)
    assert relative_error(spatial(steps(model, clock, [500, 400])), spatial(truth([0, 1]))) <= 1e-5


class Stack(nn.Module):
    """Blocks of one class, each compiled by itself, which share their graph."""

    def __init__(self) -> None:
        super().__init__()
        self.spatial_blocks = nn.ModuleList([Attention(), Attention()])
        self.temporal_blocks = nn.ModuleList([Attention()])

    def forward(self, x: Tensor) -> list[Tensor]:
        return [block(x) for block in (*self.spatial_blocks, *self.temporal_blocks)]


@pytest.mark.parametrize("identifiers", [None, ("^spatial_blocks",)])
def test_blocks_that_share_a_graph_keep_their_own_values_and_kinds(identifiers: Any) -> None:
    torch.manual_seed(0)
    torch._dynamo.reset()
    model, clock = Stack().eval(), Clock()
    expected = [model(inputs(n)["x"]) for n in range(2)]
    inner, graphs = recording()
    for block in (*model.spatial_blocks, *model.temporal_blocks):
        block.compile(backend="attnrewrite", options={"inner_backend": inner})
    config = broadcast(clock, spatial_attention_block_identifiers=identifiers)
    with attnrewrite.attention_cache(model, config):
        for number, timestep in enumerate([500, 400]):
            clock.now = timestep
            found = model(inputs(number)["x"])
    assert len(graphs) == 2
    assert relative_error(found[:2], expected[0][:2]) <= 1e-5
    assert relative_error(found[2], expected[1][2]) <= 1e-5


class Twice(nn.Module):
    """A module that is called twice in a call of the model."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention()

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.attention(x), self.attention(x + 1)])


@pytest.mark.parametrize("whole", [True, False])
def test_a_module_that_is_called_twice(whole: bool) -> None:
    torch.manual_seed(0)
    torch._dynamo.reset()
    model, clock = Twice().eval(), Clock()
    expected = model(inputs(0)["x"])
    (model if whole else model.attention).compile(backend="attnrewrite", options={"inner_backend": "eager"})
    with attnrewrite.attention_cache(model, broadcast(clock)):
        model(inputs(0)["x"])
        clock.now = 400
        assert relative_error(model(inputs(1)["x"]), expected) <= 1e-5


class Broken(nn.Module):
    """The graph breaks between two attentions, and behind the product of the first."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Attention(), Attention()

    def forward(self, x: Tensor) -> Any:
        y = self.first(x)
        torch._dynamo.graph_break()
        y *= 2
        return self.second(x) + y


def test_graph_breaks() -> None:
    torch.manual_seed(0)
    torch._dynamo.reset()
    model, clock = Broken().eval(), Clock()
    expected = model(inputs(0)["x"])
    fast: Any = torch.compile(model, backend="attnrewrite", options={"inner_backend": "eager"})
    with attnrewrite.attention_cache(fast, broadcast(clock, every=4)):
        for number in range(4):
            clock.now = 500 - number
            assert relative_error(fast(inputs(number)["x"]), expected) <= 1e-5


def test_as_an_option_of_torch_compile() -> None:
    clock = Clock()
    inner, graphs = recording()
    model = compiled(video(), inner, options={"cache": broadcast(clock)})
    with collect_reports() as reports:
        found = steps(model, clock, [500, 400, 300, 900])
    assert relative_error(spatial(found), spatial(truth([0, 0, 2, 3]))) <= 1e-5
    assert len(graphs) == 2
    assert [row.cached[:7] for row in reports[0].sites].count("spatial") == 1


def test_as_an_option_of_blocks_that_share_a_graph() -> None:
    torch.manual_seed(0)
    torch._dynamo.reset()
    model, clock = Stack().eval(), Clock()
    expected = [model(inputs(n)["x"]) for n in range(3)]
    options = {"inner_backend": "eager", "cache": broadcast(clock)}
    for block in (*model.spatial_blocks, *model.temporal_blocks):
        block.compile(backend="attnrewrite", options=options)
    for number, of in enumerate((0, 0, 2)):
        clock.now = 500 - number
        assert relative_error(model(inputs(number)["x"]), expected[of]) <= 1e-5


class Counted(nn.Module):
    """A buffer that the model updates stands behind the attention; so does a number, and a tensor that is replaced."""

    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention()
        self.register_buffer("count", torch.zeros(()))
        self.gate = torch.ones(8)

    def forward(self, x: Tensor, factor: float) -> Any:
        self.count += 1
        return self.attention(x) * self.gate * factor * self.count


@pytest.mark.parametrize("dynamic", [None, True, False])
def test_what_is_another_one_at_the_next_step_is_not_taken_for_the_same(dynamic: bool | None) -> None:
    torch.manual_seed(0)
    model, clock = Counted().eval(), Clock()
    fast = compiled(model, dynamic=dynamic)
    computed: list[Tensor] = []
    with attnrewrite.attention_cache(fast, broadcast(clock, every=8)):
        for number, factor in enumerate((2, 3, 5, 0.5, 0.25)):
            clock.now = 500 - number
            model.gate = inputs(number + 50)["text"][0, 0]
            found = fast(inputs(number)["x"], factor)
            rest = model.gate * factor * (number + 1)
            computed.append(model.attention(inputs(number)["x"]))
            # Reused, or computed where another graph cannot tell what is the same.
            assert min(relative_error(found, each * rest) for each in computed) <= 1e-5


def test_copies_of_a_model_with_a_cache_have_none() -> None:
    clock = Clock()
    torch._dynamo.reset()
    model = video()
    model.compile(backend="attnrewrite", options={"inner_backend": "eager"})
    attnrewrite.enable_cache(model, broadcast(clock))
    steps(model, clock, [500])
    other = copy.deepcopy(model)
    assert relative_error(steps(other, clock, [500, 400]), truth([0, 1])) <= 1e-5
    attnrewrite.disable_cache(other)
    clock.now = 300
    assert relative_error(model(**inputs(1))[1], truth([0])[0][1]) <= 1e-5


def test_a_pipeline_names_its_streams_and_ends_its_runs() -> None:
    """Nothing of the first video is in the second one, which begins at the timestep at which the first one began."""
    torch._dynamo.reset()
    example = runpy.run_path(str(Path(__file__).parents[2] / "examples" / "caching_pipeline.py"))
    pipeline, video = example["pipeline"], example["video"]
    pipe = pipeline()
    config = PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(-1, 1001),
        current_timestep_callback=lambda: pipe.current_timestep,
    )
    plain = video(pipe, 2)
    inner, graphs = recording()
    pipe.transformer = torch.compile(pipe.transformer, backend="attnrewrite", options={"inner_backend": inner})
    with attnrewrite.attention_cache(pipe.transformer, config):
        session = enabling.session_of(pipe.transformer._orig_mod)
        assert session is not None
        videos = [video(pipe, 2) for _ in range(2)]
        assert session.memory.nbytes == 0
        # One step, which computes everything: without a reset it would go on where the second step was.
        (single,) = (video(pipe, 1),)
    assert len(graphs) == 2
    assert torch.equal(videos[0], videos[1])
    assert relative_error(videos[0], plain) > 1e-4
    assert relative_error(single, video(pipeline(), 1)) <= 1e-5


class Pipe:
    """What holds a model, and what the model's callback holds."""

    def __init__(self) -> None:
        self.now = 500.0
        self.model: Any = None


@pytest.mark.parametrize("whole", [True, False])
def test_a_model_is_freed_with_its_cache(whole: bool) -> None:
    def used() -> Any:
        pipe, module = Pipe(), video()
        if whole:
            pipe.model = compiled(module)
        else:
            module.compile(backend="attnrewrite", options={"inner_backend": "eager"})
            pipe.model = module
        attnrewrite.enable_cache(pipe.model, broadcast(lambda: pipe.now))
        pipe.model(**inputs(0))
        session = enabling.session_of(module)
        assert session is not None
        return weakref.ref(session)

    torch._dynamo.reset()
    session = used()
    torch._dynamo.reset()
    gc.collect()
    assert session() is None


# Memory ---------------------------------------------------------------------------------------------------------------

VALUE = 2 * 3 * 5 * 8 * 4
"""The bytes of the spatial attention's value."""


def test_the_memory_limit_is_heard_before_anything_is_stored() -> None:
    clock = Clock()
    model = compiled(video())
    message = r"1 attention value of Video would take 960 bytes.*memory_limit is 959 bytes"
    tight = attnrewrite.attention_cache(model, broadcast(clock, memory_limit=VALUE - 1))
    with tight, pytest.raises(CacheMemoryError, match=message):
        steps(model, clock, [500])
    with attnrewrite.attention_cache(model, broadcast(clock, memory_limit=2 * VALUE)):
        steps(model, clock, [500, 400])
        with attnrewrite.cache_stream("other"):
            steps(model, clock, [500, 400])
        with attnrewrite.cache_stream("third"), pytest.raises(CacheMemoryError, match="are stored already"):
            steps(model, clock, [500])
        attnrewrite.reset_cache(model)
        with attnrewrite.cache_stream("third"):
            steps(model, clock, [500])


@pytest.mark.parametrize("kind", [PyramidAttentionBroadcastConfig, FasterCacheConfig])
def test_offloaded_values_give_the_same(kind: Any) -> None:
    clock = Clock()
    model = compiled(video())
    own = {} if kind is PyramidAttentionBroadcastConfig else {"is_guidance_distilled": True}
    results = []
    for offload in (False, True):
        config = kind(spatial_attention_block_skip_range=2, offload=offload, current_timestep_callback=clock, **own)
        with attnrewrite.attention_cache(model, config):
            results.append(steps(model, clock, [600, 500, 400, 300]))
    assert relative_error(results[0], results[1]) == 0


# Bad input ------------------------------------------------------------------------------------------------------------


def test_a_timestep_that_is_not_known() -> None:
    clock = Clock()
    model = compiled(video())
    with attnrewrite.attention_cache(model, broadcast(clock)), pytest.raises(CacheError, match="returned None"):
        steps(model, clock, [None])  # type: ignore[list-item]


def test_a_config_that_matches_nothing() -> None:
    clock = Clock()
    model = compiled(video())
    config = broadcast(clock, spatial_attention_block_identifiers=["nowhere"])
    message = (
        "matches no attention of Video: spatial is spatial, and none of spatial_attention_block_identifiers matches;"
    )
    with attnrewrite.attention_cache(model, config), pytest.raises(CacheError, match=message):
        steps(model, clock, [500])
    torch._dynamo.reset()
    other: Any = torch.compile(video(), backend="eager")
    with (
        attnrewrite.attention_cache(other, broadcast(clock)),
        pytest.raises(
            CacheError, match="no graph of Video with attention was compiled by attnrewrite: compile the model"
        ),
    ):
        steps(other, clock, [500])


def test_training() -> None:
    clock = Clock()
    model = compiled(video())
    with attnrewrite.attention_cache(model, broadcast(clock)):
        with torch.enable_grad(), pytest.raises(CacheError, match=r"torch\.no_grad"):
            steps(model, clock, [500])
        model.train()
        with pytest.raises(CacheError, match=r"model\.eval\(\)"):
            steps(model, clock, [500])
    with torch.enable_grad():
        assert steps(model, clock, [500])[0][1].requires_grad


def test_what_cannot_have_a_cache() -> None:
    clock = Clock()
    with pytest.raises(CacheTypeError, match=r"nothing in Video is compiled"):
        attnrewrite.enable_cache(video(), broadcast(clock))
    with pytest.raises(CacheTypeError, match="takes a compiled"):
        attnrewrite.enable_cache(lambda x: x, broadcast(clock))  # type: ignore[arg-type]
    model = compiled(video())
    again = pytest.raises(CacheError, match="has a cache already")
    with attnrewrite.attention_cache(model, broadcast(clock)), again:
        attnrewrite.enable_cache(model, broadcast(clock))
    attnrewrite.disable_cache(model)
    with pytest.raises(OptionError, match="enable_cache"):
        steps(compiled(video(), options={"cache": FasterCacheConfig(current_timestep_callback=clock)}), clock, [500])
    twice = compiled(video(), options={"cache": broadcast(clock)})
    with attnrewrite.attention_cache(twice, broadcast(clock)), pytest.raises(OptionError, match="use only one of them"):
        steps(twice, clock, [500])


def test_an_error_in_a_call_ends_the_run() -> None:
    clock = Clock()
    model = compiled(video())
    with attnrewrite.attention_cache(model, broadcast(clock, every=4)):
        found = steps(model, clock, [500])
        clock.now = 400
        with pytest.raises(TypeError):
            model(**inputs(1), unknown=1)
        found += [model(**inputs(1)), model(**inputs(2))]
    assert relative_error(spatial(found), spatial(truth([0, 1, 1]))) <= 1e-5


@pytest.mark.parametrize("wrong", ["no timestep", "gradients", "training"])
def test_an_error_before_a_call_ends_the_run(wrong: str) -> None:
    clock = Clock()
    model = compiled(video())
    with attnrewrite.attention_cache(model, broadcast(clock, every=4)):
        found = steps(model, clock, [500])
        clock.now = None if wrong == "no timestep" else 400
        model.train(wrong == "training")
        with pytest.raises(CacheError), torch.set_grad_enabled(wrong == "gradients"):
            model(**inputs(1))
        model.eval()
        clock.now = 300
        found += [model(**inputs(1)), model(**inputs(2))]
    assert relative_error(spatial(found), spatial(truth([0, 1, 1]))) <= 1e-5
