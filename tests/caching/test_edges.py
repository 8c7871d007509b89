"""Attention reuse where something changes between two calls, and beside compilation of others; what is said then."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from diffusers import PyramidAttentionBroadcastConfig as DiffusersConfig
from diffusers.models.cache_utils import CacheMixin
from torch import Tensor, nn

import attnrewrite
from attnrewrite import CacheError, FasterCacheConfig
from attnrewrite.backend import collect_reports
from attnrewrite.caching import enabling
from attnrewrite.errors import CacheTypeError
from tests.support.caching_video import Attention, Clock, broadcast, compiled, inputs, steps, tokens, video
from tests.support.helpers import recording, relative_error

pytestmark = pytest.mark.drawn


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture
def clock() -> Clock:
    return Clock()


def seeded(model: Callable[[], nn.Module]) -> Any:
    torch.manual_seed(0)
    return model().eval()


# What changes from one call to the next ------------------------------------------------------------------------------


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention()

    def forward(self, x: Tensor, keep: int = 6) -> Tensor:
        x = x[:, :keep]
        result: Tensor = self.attention(x) + x
        return result


@pytest.mark.parametrize("inner", ["eager", "inductor"])
def test_a_value_of_another_dtype_is_not_taken(clock: Clock, inner: str) -> None:
    model = seeded(Residual)
    fast = compiled(model, inner)
    with attnrewrite.attention_cache(fast, broadcast(clock, every=8)):
        fast(tokens(0))
        clock.now -= 1
        with torch.autocast("cpu", torch.bfloat16):
            found = fast(tokens(1))
        clock.now -= 1
        with torch.autocast("cpu", torch.bfloat16):
            again = fast(tokens(2))
    fresh = model.attention(tokens(1))
    assert relative_error(found, fresh + tokens(1)) <= 2e-2
    assert relative_error(again, fresh + tokens(2)) <= 2e-2


@pytest.mark.parametrize("dynamic", [None, True])
def test_a_value_of_another_shape_is_not_taken(clock: Clock, dynamic: bool | None) -> None:
    """The tensors that the model is called with have one shape."""
    model = seeded(Residual)
    fast = compiled(model, dynamic=dynamic)
    with attnrewrite.attention_cache(fast, broadcast(clock, every=8)):
        for number, (keep, computed) in enumerate([(6, 0), (5, 1), (5, 1), (4, 3)]):
            clock.now -= 1
            expected = model.attention(tokens(computed)[:, :keep]) + tokens(number)[:, :keep]
            assert relative_error(fast(tokens(number), keep), expected) <= 1e-5


class Chain(nn.Module):
    """The cross-attention's query comes of the spatial attention alone."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Attention(), Attention()

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        result: Tensor = self.second(self.first(x), text) + x
        return result


def test_an_attention_that_another_kind_reads_is_kept_by_itself(clock: Clock) -> None:
    model = seeded(Chain)
    fast = compiled(model)
    text = [tokens(50 + number, 2, 4, 8) for number in range(5)]
    with attnrewrite.attention_cache(fast, broadcast(clock, every=4, cross_attention_block_skip_range=2)):
        for number in range(5):
            clock.now -= 1
            spatial, cross = number // 4 * 4, number // 2 * 2
            query = model.first(tokens(spatial if number == cross else cross // 4 * 4))
            expected = model.second(query, text[cross]) + tokens(number)
            assert relative_error(fast(tokens(number), text[number]), expected) <= 1e-5


class Chosen(nn.Module):
    """Attentions without parameters, a part of a result, or a layer that is left out: as a flag says."""

    def forward(self, x: Tensor, y: Tensor, which: str) -> Any:
        def attention(each: Any) -> Any:
            heads = each.unflatten(-1, (2, 4)).transpose(1, 2)
            return nn.functional.scaled_dot_product_attention(heads, heads, heads).transpose(1, 2).flatten(2)

        if which == "both":
            return x + attention(y) + 3 * attention(x)
        if which == "second":
            return x + 3 * attention(x)
        first, second = attention(x).chunk(2, dim=1)
        part = {"upper": first, "lower": second, "greatest": attention(x).max(1, keepdim=True)[0]}
        return x + part.get(which, attention(x).min(1, keepdim=True)[0]).mean(1, keepdim=True)


@pytest.mark.parametrize("pair", [("both", "second"), ("upper", "lower"), ("greatest", "least")])
@pytest.mark.parametrize("inner", ["eager", "inductor"])
def test_a_value_of_another_computation_is_not_taken(clock: Clock, pair: tuple[str, str], inner: str) -> None:
    model = seeded(Chosen)
    fast = compiled(model, inner)
    with attnrewrite.attention_cache(fast, broadcast(clock, every=8)):
        for number, (which, computed) in enumerate([(pair[0], 0), (pair[1], 1), (pair[1], 1), (pair[0], 0)]):
            clock.now -= 1
            x, y = tokens(number), tokens(30 + number)
            value = model(tokens(computed), tokens(30 + computed), which) - tokens(computed)
            assert relative_error(fast(x, y, which), value + x) <= 1e-5, (number, which)


class Switched(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.other = Attention(), Attention()

    def forward(self, x: Tensor, text: Tensor, layers: int = 2, cross: bool = False) -> Tensor:
        x = x + self.attention(x, text if cross else None)
        return x + self.other(x) if layers == 2 else x


def test_one_module_is_self_attention_and_then_cross_attention(clock: Clock) -> None:
    model = seeded(Switched)
    fast = compiled(model)
    text = tokens(9, 2, 6, 8)
    with attnrewrite.attention_cache(fast, broadcast(clock, every=8, cross_attention_block_skip_range=8)):
        for number, (cross, computed) in enumerate([(False, 0), (True, 1), (True, 1), (False, 0)]):
            clock.now -= 1
            expected = tokens(number) + model.attention(tokens(computed), text if cross else None)
            assert relative_error(fast(tokens(number), text, 1, cross), expected) <= 1e-5, number


def test_a_value_that_was_not_computed_when_it_was_due_is_not_taken(clock: Clock) -> None:
    """A layer that is left out of all calls that compute attention."""
    fast = compiled(seeded(Switched))
    with attnrewrite.attention_cache(fast, broadcast(clock, every=2)):
        found = []
        for number in range(4):
            clock.now -= 1
            found.append(fast(tokens(number), tokens(9), 1 if number == 2 else 2))
    model = seeded(Switched)
    first = tokens(3) + model.attention(tokens(3))
    assert relative_error(found[3], first + model.other(first)) <= 1e-5


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_a_static_input_is_no_parameter(clock: Clock, mode: Any) -> None:
    """As for CUDA graphs; it is written to from step to step."""
    model = seeded(Residual)
    fast = compiled(model)
    x = tokens(0)
    torch._dynamo.mark_static_address(x)
    with attnrewrite.attention_cache(fast, broadcast(clock, every=8)), mode():
        fast(x)
        x.copy_(tokens(1))
        clock.now -= 1
        assert relative_error(fast(x), model.attention(tokens(0)) + tokens(1)) <= 1e-5


def test_values_of_graphs_that_are_not_called_any_more_are_freed(clock: Clock) -> None:
    """A number of the code that is another one at each step, so that each has a graph of its own."""
    fast = compiled(seeded(Numbered), dynamic=False)
    with attnrewrite.attention_cache(fast, broadcast(clock, every=2)):
        session = enabling.session_of(fast._orig_mod)
        assert session is not None
        taken = []
        for number in range(6):
            clock.now -= 1
            fast(tokens(number), number + 2)
            taken.append(session.memory.nbytes)
    # Of the calls that are due, and of those that are not and find nothing that fits.
    assert taken == [taken[0] * times for times in (1, 2, 3, 4, 3, 4)]


class Numbered(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention()

    def forward(self, x: Tensor, number: int) -> Any:
        return self.attention(x) * number + x


# Paths ----------------------------------------------------------------------------------------------------------------


class Core(nn.Module):
    """Attention without parameters."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(query, key, value)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.projections = nn.Linear(8, 24)
        self.core = Core()

    def forward(self, x: Tensor) -> Tensor:
        heads = (each.unflatten(-1, (2, 4)).transpose(1, 2) for each in self.projections(x).chunk(3, -1))
        result: Tensor = x + self.core(*heads).transpose(1, 2).flatten(2)
        return result


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Attention(), Attention()
        self.second.query.weight = self.first.query.weight
        self.second.out = self.first.out

    def forward(self, x: Tensor) -> Tensor:
        return x + self.first(x) + self.second(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize("whole", [True, False])
def test_identifiers_find_a_module_without_parameters(clock: Clock, whole: bool) -> None:
    """Blocks that are compiled alone know it by the end of its path."""
    model = seeded(Blocks)
    fast = compiled(model) if whole else model
    if not whole:
        torch._dynamo.reset()
        for block in model.blocks:
            block.compile(backend="attnrewrite", options={"inner_backend": "eager"})
    first, second = (block.forward for block in model.blocks)
    config = broadcast(clock, every=2, spatial_attention_block_identifiers=[r"^blocks\.1\.core$"])
    with attnrewrite.attention_cache(fast, config):
        fast(tokens(0))
        clock.now -= 1
        found = fast(tokens(1))
    before, now = first(tokens(0)), first(tokens(1))
    assert relative_error(found, now + second(before) - before) <= 1e-5


@pytest.mark.parametrize("name", ["first", "second"])
def test_identifiers_tell_modules_apart_that_share_parameters(clock: Clock, name: str) -> None:
    fast = compiled(seeded(Tied))
    config = broadcast(clock, spatial_attention_block_identifiers=[name])
    with collect_reports() as graphs, attnrewrite.attention_cache(fast, config):
        fast(tokens(0))
    kept = {row.location.module: row.cached for row in graphs[0].sites if row.location is not None}
    assert [module for module in kept if kept[module].startswith("spatial")] == [name]


NEVER: dict[str, Any] = {"spatial_attention_block_skip_range": None}


class Named(nn.Module):
    """Blocks of one class, the first of which is spatial by its path and the second temporal."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Residual()])
        self.temporal_blocks = nn.ModuleList([Residual()])

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.blocks[0](x), self.temporal_blocks[0](x)


def test_a_graph_that_was_compiled_for_another_kind_is_reused_too(clock: Clock) -> None:
    model = seeded(Named)
    torch._dynamo.reset()
    for part in (*model.blocks, *model.temporal_blocks):
        part.compile(backend="attnrewrite", options={"inner_backend": "eager"})
    spatial, temporal = model.blocks[0].attention.forward, model.temporal_blocks[0].attention.forward
    config = broadcast(clock, **{**NEVER, "temporal_attention_block_skip_range": 2})
    with attnrewrite.attention_cache(model, config):
        for number, computed in enumerate([0, 0, 2, 2]):
            clock.now -= 1
            found = model(tokens(number))
            assert relative_error(found[0], spatial(tokens(number)) + tokens(number)) <= 1e-5
            assert relative_error(found[1], temporal(tokens(computed)) + tokens(number)) <= 1e-5


def test_a_path_goes_with_the_parameters_of_now(clock: Clock) -> None:
    """Tensors that replace others often have the place of these in memory, and modules may change places."""
    torch.manual_seed(0)
    model: Any = nn.ModuleList(Residual() for _ in range(4)).eval()
    model.forward = lambda x: [block(x) for block in model]
    torch._dynamo.reset()
    for block in model:
        block.compile(backend="attnrewrite", options={"inner_backend": "eager"})
    config = broadcast(clock, spatial_attention_block_identifiers=[r"^[01]\."])
    with attnrewrite.attention_cache(model, config):
        for number in range(10):
            attnrewrite.reset_cache(model)
            found = [model(tokens(seed)) for clock.now, seed in ((500, 1), (499, 2))][1]
            for place, block in enumerate(model):
                expected = block.attention(tokens(1 if place < 2 else 2)) + tokens(2)
                assert relative_error(found[place], expected) <= 1e-5, (number, place)
            if number < 8:
                state = {name: torch.randn_like(value) / 3 for name, value in model.state_dict().items()}
                model.load_state_dict(state, assign=True)
            else:
                model[0], model[3] = model[3], model[0]


@pytest.mark.parametrize("tied", [True, False])
def test_modules_that_share_a_graph_under_options_do_not_mix(clock: Clock, tied: bool) -> None:
    """Some parameters tell modules apart, although the first one is shared; without any, nothing does."""
    blocks: list[Any] = [seeded(Residual), seeded(Residual)] if tied else [Core(), Core()]
    if tied:
        blocks[1].attention.query.weight = blocks[0].attention.query.weight
        torch.nn.init.normal_(blocks[1].attention.value.weight)
    torch._dynamo.reset()
    options: Any = {"inner_backend": "eager", "cache": broadcast(clock, every=2)}
    fast: list[Any] = [torch.compile(block, backend="attnrewrite", options=options) for block in blocks]
    for number, computed in enumerate([0, 0, 2, 2]):
        clock.now -= 1
        for place, block in enumerate(blocks):
            x, old = tokens(number + 10 * place, 2, 2, 6, 8), tokens(computed + 10 * place, 2, 2, 6, 8)
            if tied:
                expected = block.attention(old[0]) + x[0]
                assert relative_error(fast[place](x[0]), expected) <= 1e-5, (number, place)
            else:
                assert relative_error(fast[place](x, x, x), block(x, x, x)) <= 1e-5, (number, place)


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float = 0.5, fails: Any = None) -> Tensor:
    if fails is not None:
        fails()
    return (q @ k.transpose(-1, -2) * scale).softmax(-1) @ v


def under_options(function: Any, clock: Clock, inner: Any = "eager") -> Any:
    torch._dynamo.reset()
    options: Any = {"inner_backend": inner, "cache": broadcast(clock, every=8)}
    return torch.compile(function, backend="attnrewrite", options=options)


@pytest.mark.parametrize("has_parameters", [False, True])
@pytest.mark.parametrize("fails", ["between", "within"])
@pytest.mark.parametrize("skips", [False, True])
def test_a_step_that_is_begun_again_takes_nothing(
    clock: Clock, has_parameters: bool, fails: str, skips: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Two calls in a step, of which the second one fails in the first step and in the second one."""
    module = seeded(Attention)
    broken: list[bool] = []

    def inner(gm: Any, example_inputs: Any) -> Any:
        def call(*args: Any) -> Any:
            if broken and broken.pop():
                raise torch.OutOfMemoryError("within a graph")
            return gm(*args)

        return call

    function = module if has_parameters else lambda x: attend(x, x, x)
    expected = module.forward if has_parameters else function
    fast = under_options(function, clock, inner)
    for number in range(5):
        clock.now -= 1
        first, second = tokens(number), tokens(number + 10)
        if number < 2:
            fast(first)
            if fails == "within":
                broken[:] = [True]
                with pytest.raises(torch.OutOfMemoryError):
                    fast(second)
            if skips:
                continue
        # In a step whose second call alone is made, it is not taken for the first.
        for x in (first, second):
            # The first call may be given its own value of the step that was begun before.
            allowed = [expected(tokens(each)) for each in ((number, 0, 1) if x is first and skips else ())]
            found = fast(x)
            assert min(relative_error(found, each) for each in [expected(x), *allowed]) <= 1e-5, number
    assert [record.message for record in caplog.records if "more than once at timestep" in record.message]


def test_calls_of_a_function_are_counted_through_its_graphs(clock: Clock) -> None:
    """The second layer's scale has a graph compiled that serves the first layer, too."""
    fast = under_options(attend, clock)
    for number in range(4):
        clock.now -= 1
        for scale in (0.5, 0.25, 0.125):
            x = tokens(number + int(scale * 800))
            assert relative_error(fast(x, x, x, scale), attend(x, x, x, scale)) <= 1e-5, (number, scale)


def test_calls_in_streams_of_their_own_are_told_apart(clock: Clock) -> None:
    fast = under_options(attend, clock)
    for number in range(3):
        clock.now -= 1
        for layer in (0, 1):
            with attnrewrite.cache_stream(f"layer {layer}"):
                x, old = tokens(number + 10 * layer), tokens(10 * layer)
                assert relative_error(fast(x, x, x), attend(old, old, old)) <= 1e-5, (number, layer)


@pytest.mark.parametrize("has_parameters", [False, True])
def test_two_calls_in_a_step_end_reuse_for_the_run(clock: Clock, has_parameters: bool) -> None:
    """Without parameters, for good."""
    module = seeded(Attention)
    function = module if has_parameters else lambda x: attend(x, x, x)
    expected = module.forward if has_parameters else function
    fast = under_options(function, clock)
    last = 5 if has_parameters else 6
    for number, (now, of) in enumerate([(9, 0), (8, 0), (8, 2), (7, 3), (6, 4), (9, 5), (8, last)]):
        clock.now = 300 + now
        assert relative_error(fast(tokens(number)), expected(tokens(of))) <= 1e-5, number


# FasterCache's halves -------------------------------------------------------------------------------------------------


class Image(nn.Module):
    """``hidden_states``: ``[batch, 8, 4, 4]``; ``pooled``: ``[batch or 1, 8]``."""

    def __init__(self, wrap: Callable[[Tensor], Any] = lambda image: image) -> None:
        super().__init__()
        self.attention = Attention()
        self.wrap = wrap

    def forward(self, hidden_states: Tensor, timestep: Tensor | None = None, pooled: Tensor | None = None) -> Any:
        x = hidden_states.flatten(2).transpose(1, 2)
        x = x if pooled is None else x + pooled[:, None]
        x = x if timestep is None else x + timestep[:, None, None]
        return self.wrap((self.attention(x) + x).transpose(1, 2).unflatten(2, (4, 4)))


class Pair(NamedTuple):
    image: Tensor
    other: int


@dataclasses.dataclass(frozen=True)
class Frozen:
    sample: Tensor
    other: int


@dataclasses.dataclass
class Output:
    sample: Tensor


def faster(clock: Clock, **settings: Any) -> FasterCacheConfig:
    return FasterCacheConfig(
        current_timestep_callback=clock,
        tensor_format="BCHW",
        attention_weight_callback=lambda module: 0.5,
        unconditional_batch_timestep_skip_range=(-1, 1000),
        **settings,
    )


def images(seed: int, batch: int = 4) -> Tensor:
    return tokens(seed, batch, 8, 4, 4)


@pytest.mark.parametrize(
    ("wrap", "unwrap"),
    [
        (lambda image: (image, 1), lambda result: result[0]),
        (lambda image: Pair(image, 1), lambda result: result.image),
        (lambda image: Frozen(image, 1), lambda result: result.sample),
        (Output, lambda result: result.sample),
    ],
    ids=["tuple", "named tuple", "frozen", "dataclass"],
)
def test_the_prediction_takes_the_place_of_the_first_output(clock: Clock, wrap: Any, unwrap: Any) -> None:
    model = seeded(lambda: Image(wrap))
    fast = compiled(model)
    with attnrewrite.attention_cache(fast, faster(clock)):
        whole = fast(hidden_states=images(0))
        clock.now -= 1
        found = fast(hidden_states=images(1))
    assert type(found) is type(whole)
    assert unwrap(found).shape == (4, 8, 4, 4)
    assert relative_error(unwrap(whole), unwrap(model(images(0)))) <= 1e-6
    # With one value the extrapolation is that value.
    rest = unwrap(model(images(0))) - images(0)
    assert relative_error(unwrap(found)[2:], rest[2:] + images(1)[2:]) <= 1e-5


def test_outputs_that_are_not_predicted_are_warned_of(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    fast = compiled(seeded(lambda: Image(lambda image: (image, image * 2))))
    with attnrewrite.attention_cache(fast, faster(clock)):
        fast(hidden_states=images(0))
    assert "Image gives more than one tensor" in caplog.text


def test_one_row_for_the_whole_batch_is_not_halved(clock: Clock) -> None:
    model = seeded(Image)
    fast = compiled(model)
    with attnrewrite.attention_cache(fast, faster(clock)):
        fast(images(0), tokens(9, 1), tokens(7, 1, 8))
        clock.now -= 1
        found = fast(images(1), tokens(9, 1), tokens(7, 1, 8))
    bare = model(images(0), tokens(9, 1), tokens(7, 1, 8)) - images(0)
    assert relative_error(found[2:], bare[2:] + images(1)[2:]) <= 1e-5


def layouts(seed: int) -> dict[str, Tensor]:
    """As pipelines have them: one timestep for all, a part of a larger tensor."""
    return {
        "hidden_states": images(seed),
        "timestep": torch.tensor(0.5).expand(4),
        "pooled": tokens(seed, 4, 16)[:, 4:12],
    }


@pytest.mark.parametrize("made_within", [True, False])
def test_nothing_is_compiled_after_the_first_step(clock: Clock, made_within: bool) -> None:
    inner, graphs = recording()
    names = list(layouts(0))
    fast = compiled(seeded(Image), inner)
    with attnrewrite.attention_cache(fast, faster(clock, unconditional_conditional_input_kwargs_identifiers=names)):
        before = [layouts(number) for number in range(12)]
        with torch.inference_mode():
            for number in range(12):
                clock.now -= 1
                fast(**(layouts(number) if made_within else before[number]))
                # Both halves, and one half that computes or reuses.
                assert len(graphs) == 3


@pytest.mark.parametrize(
    ("batch", "message"),
    [(4, r"cannot be called with the conditional half alone.*not halved: pooled"), (2, "an argument that holds both")],
)
def test_an_argument_that_should_be_halved_is_missed_at_the_first_call(clock: Clock, batch: int, message: str) -> None:
    """With one conditional row, what was not halved makes two of it, and no operator notices."""
    fast = compiled(seeded(Image))
    for _ in range(2):
        with attnrewrite.attention_cache(fast, faster(clock)), pytest.raises(CacheError, match=message):
            fast(hidden_states=images(0, batch), pooled=tokens(7, batch, 8))


def test_rows_that_depend_on_each_other_are_warned_of(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    """A bias for two heads, taken for a batch of two: no shape tells."""
    fast = compiled(seeded(Biased))
    with attnrewrite.attention_cache(fast, faster(clock)):
        fast(images(0, 2), tokens(5, 2, 16, 16))
    assert "gives another result for the conditional half alone" in caplog.text
    caplog.clear()
    fast = compiled(seeded(Biased))
    with attnrewrite.attention_cache(fast, faster(clock)):
        fast(images(0), tokens(5, 2, 16, 16))
    assert "another result" not in caplog.text


class Biased(nn.Module):
    def forward(self, hidden_states: Any, bias: Tensor) -> Any:
        heads: Any = hidden_states.flatten(2).transpose(1, 2).unflatten(2, (2, 4)).transpose(1, 2)
        result: Any = nn.functional.scaled_dot_product_attention(heads, heads, heads, attn_mask=2 * bias)
        return result.transpose(1, 2).flatten(2).transpose(1, 2).unflatten(2, (4, 4))


@pytest.mark.parametrize("names", [("cond", "uncond"), ("pred_cond", "pred_uncond")])
def test_passes_of_one_half_are_not_taken_for_both(clock: Clock, names: tuple[str, str]) -> None:
    model = seeded(Image)
    fast = compiled(model)
    with attnrewrite.attention_cache(fast, faster(clock, spatial_attention_timestep_skip_range=(-1, 0))):
        for number in range(3):
            clock.now -= 1
            for place, name in enumerate(names):
                with attnrewrite.cache_stream(name):
                    x = images(number + 10 * place)
                    assert relative_error(fast(hidden_states=x), model(x)) <= 1e-5


# Beside compilation of others -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["eager", "attnrewrite"])
def test_a_compiled_caller_does_not_trace_through_what_decides(clock: Clock, backend: str) -> None:
    model = seeded(Residual)
    fast = compiled(model)
    caller = torch.compile(lambda x: fast(x) * 2, backend=backend)
    with attnrewrite.attention_cache(fast, broadcast(clock)):
        for number, computed in enumerate([0, 0, 2, 2]):
            clock.now -= 1
            expected = (model.attention(tokens(computed)) + tokens(number)) * 2
            assert relative_error(caller(tokens(number)), expected) <= 1e-5


def test_a_compiled_caller_in_one_graph_is_an_error(clock: Clock) -> None:
    fast = compiled(seeded(Residual))
    caller = torch.compile(lambda x: fast(x) * 2, backend="eager", fullgraph=True)
    decided = "decide at each call"
    with (
        attnrewrite.attention_cache(fast, broadcast(clock)),
        pytest.raises(torch._dynamo.exc.Unsupported, match=decided),
    ):
        caller(tokens(0))


def test_a_part_that_a_caller_compiled_into_its_graph_is_said_to_have_gone_unused(
    clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    model = seeded(Residual)
    torch._dynamo.reset()
    model.compile(backend="attnrewrite", options={"inner_backend": "eager"})
    caller = torch.compile(lambda x: model(x) * 2, backend="eager")
    with attnrewrite.attention_cache(model, broadcast(clock)):
        caller(tokens(0))
    assert "was never used" in caplog.text


class WithCache(Residual, CacheMixin):
    pass


def test_beside_a_cache_of_diffusers(clock: Clock) -> None:
    model = seeded(WithCache)
    theirs = DiffusersConfig(2, current_timestep_callback=clock)  # type: ignore[no-untyped-call]
    fast = compiled(model)
    with attnrewrite.attention_cache(fast, broadcast(clock)):
        fast(tokens(0))
        model.enable_cache(theirs)
        with pytest.raises(CacheError, match=r"diffusers' own cache enabled beside this one: call WithCache\.disable"):
            fast(tokens(1))
        model.disable_cache()
        assert fast(tokens(1)).shape == (2, 6, 8)


# What is said ---------------------------------------------------------------------------------------------------------


def test_a_run_in_which_nothing_is_reused_is_told(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    """Timesteps that are sigmas, and ranges that are not."""
    fast = compiled(video())
    with attnrewrite.attention_cache(fast, broadcast(clock)):
        steps(fast, clock, [0.9, 0.6, 0.3])
        assert "nothing was reused" not in caplog.text
        steps(fast, clock, [0.9])
    expected = (
        "nothing was reused in a run of 3 calls, at timesteps from 0.9 to 0.3; the config reuses spatial attention in "
        "1 of 2 calls between 100 and 800"
    )
    assert expected in caplog.text


def test_passes_of_changing_shapes_in_one_stream_are_told(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    fast = compiled(video(), dynamic=True)
    with attnrewrite.attention_cache(fast, broadcast(clock)):
        for number in range(6):
            clock.now -= 1
            fast(**inputs(number, positions=5 + number % 2))
    assert "change at each call, which begins a run" in caplog.text


def test_a_row_tells_what_is_not_kept_for_its_batch(clock: Clock) -> None:
    """The second attention's rows are positions first, so that half of them is not half of the batch."""
    fast = compiled(seeded(Turned))
    config = faster(clock, temporal_attention_block_skip_range=2)
    with collect_reports() as graphs, attnrewrite.attention_cache(fast, config):
        fast(hidden_states=images(0))
    kept = {row.location.module: row.cached for row in graphs[0].sites if row.location is not None}
    assert kept["first"].startswith("spatial (")
    assert kept["second"].startswith("no: its dimension 0 is not known to begin with the batch")


class Turned(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Attention(), Attention()

    def forward(self, hidden_states: Tensor) -> Any:
        x: Any = hidden_states.flatten(2).transpose(1, 2)
        x = x + self.first(x)
        x = x + self.second(x.transpose(0, 1).contiguous()).transpose(0, 1)
        return x.transpose(1, 2).unflatten(2, (4, 4))


def test_compiled_in_place_once_more(clock: Clock) -> None:
    """That drops the cache from the module's call; it can be enabled again."""
    model = seeded(Residual)
    torch._dynamo.reset()
    for _ in range(2):
        model.compile(backend="attnrewrite", options={"inner_backend": "eager"})
        attnrewrite.enable_cache(model, broadcast(clock))
    clock.now -= 1
    first = model(tokens(0)) - tokens(0)
    clock.now -= 1
    assert relative_error(model(tokens(1)), first + tokens(1)) <= 1e-5


def test_runs_with_reuse_are_not_told_of(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    fast = compiled(video())
    with attnrewrite.attention_cache(fast, broadcast(clock)):
        steps(fast, clock, [900, 500, 300])
    assert "nothing was reused" not in caplog.text


def test_the_log_tells_the_kinds(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, "attnrewrite"):
        fast = compiled(video())
        with attnrewrite.attention_cache(fast, broadcast(clock)):
            steps(fast, clock, [500])
    assert "reused across steps: spatial (" in caplog.text


class Weights(nn.Module):
    """Attention whose weights are returned, which must exist."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights = (x @ x.transpose(-1, -2)).softmax(-1)
        return weights @ x, weights


def test_attention_that_is_left_as_it_is_is_named(clock: Clock) -> None:
    fast = compiled(Weights().eval())
    message = "matches no attention of Weights.*the attention weights are read more than once"
    with attnrewrite.attention_cache(fast, broadcast(clock)), pytest.raises(CacheError, match=message):
        fast(tokens(0))


class Pipeline:
    components = ()


def test_a_pipeline_is_no_model(clock: Clock) -> None:
    message = "not an object of Pipeline: give the pipeline.s denoiser, such as pipe.transformer"
    with pytest.raises(CacheTypeError, match=message):
        attnrewrite.enable_cache(Pipeline(), broadcast(clock))  # type: ignore[arg-type]


@pytest.mark.parametrize("timestep", [np.float32(500), np.array(500), np.array([500.0]), torch.tensor([500])])
def test_timesteps_of_other_libraries(timestep: Any) -> None:
    fast = compiled(video())
    with attnrewrite.attention_cache(fast, broadcast(lambda: timestep)):
        first = fast(**inputs(0))
        assert relative_error(fast(**inputs(1))[1], first[1]) == 0


class PostNorm(nn.Module):
    """What follows the attention is no affine function of it."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.norm = Attention(), nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = x + self.norm(self.attention(x))
        return result


def test_another_method_has_graphs_of_its_own(clock: Clock) -> None:
    """FasterCache extrapolates affine functions of attention alone, and broadcast stores any."""
    settings = broadcast(clock, every=2)
    faster = FasterCacheConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(-1, 2000),
        is_guidance_distilled=True,
        attention_weight_callback=lambda module: 0.5,
        current_timestep_callback=lambda: clock.now,
    )

    def run(fast: Any) -> list[Tensor]:
        clock.now = Clock().now
        found = []
        for number in range(8):
            clock.now -= 100
            found.append(fast(tokens(number)))
        return found

    model = seeded(PostNorm)
    fresh = compiled(model)
    with attnrewrite.attention_cache(fresh, faster):
        expected = run(fresh)
    torch._dynamo.reset()
    fast = compiled(model)
    with attnrewrite.attention_cache(fast, settings):
        run(fast)
    with attnrewrite.attention_cache(fast, faster):
        assert relative_error(run(fast), expected) <= 1e-5


class DividedBySize(nn.Module):
    """A number behind the attention is the size of what the model's arguments do not show."""

    def __init__(self, power: float) -> None:
        super().__init__()
        self.attention, self.power = Attention(), power

    def forward(self, x: Tensor, memory: Any) -> Tensor:
        result: Tensor = x + self.attention(x) / memory.tensor.shape[1] ** self.power + memory.tensor.mean()
        return result


class Memory:
    def __init__(self, size: int) -> None:
        self.tensor = torch.zeros(1, size, 4)


@pytest.mark.parametrize("power", [1, 0.5])
def test_a_number_made_of_a_size_is_not_that_of_the_step_before(clock: Clock, power: float) -> None:
    model = seeded(lambda: DividedBySize(power))
    fast = compiled(model, dynamic=True)
    with attnrewrite.attention_cache(fast, broadcast(clock, every=2)):
        for size in (3, 3, 3, 6, 6, 6, 12):
            clock.now -= 1
            assert relative_error(fast(tokens(0), Memory(size)), model(tokens(0), Memory(size))) <= 1e-5


class Views(nn.Module):
    """Rows are (batch views); the attention's are (views batch)."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention()

    def forward(self, x: Tensor) -> Tensor:
        swapped = x.view(-1, 3, *x.shape[1:]).transpose(0, 1).flatten(0, 1)
        attended = swapped + self.attention(swapped)
        rows: Tensor = attended.view(3, -1, *x.shape[1:]).transpose(0, 1).flatten(0, 1)
        return rows


def test_half_of_rows_that_begin_with_a_part_of_the_batch_is_not_kept(clock: Clock) -> None:
    fast = compiled(seeded(Views))
    config = faster(clock, spatial_attention_block_skip_range=2, unconditional_batch_skip_range=3)
    with (
        attnrewrite.attention_cache(fast, config),
        pytest.raises(CacheError, match="of no attention is it known that its dimension 0 begins with the batch"),
    ):
        fast(tokens(0, 6, 2, 6, 8))


class Guided(nn.Module):
    """Follows the gradient of an energy."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention().requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            moved = x.detach().requires_grad_(True)
            (gradient,) = torch.autograd.grad(self.attention(moved).square().sum(), moved)
        return x - gradient


def test_attention_whose_gradient_is_computed_is_not_reused(clock: Clock) -> None:
    torch._dynamo.reset()
    fast: Any = torch.compile(seeded(Guided), backend="attnrewrite", options={"inner_backend": "eager"})
    with (
        attnrewrite.attention_cache(fast, broadcast(clock)),
        pytest.raises(CacheError, match="is not reused, since gradients are computed from it"),
    ):
        fast(tokens(0))


@torch.library.custom_op("attnrewrite_tests::noisy", mutates_args=())
def noisy(x: Tensor) -> Tensor:
    return x + torch.randn_like(x)


noisy.register_fake(torch.empty_like)


class Noisy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention()

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = x + noisy(self.attention(x))
        return result


def test_what_an_operator_of_the_users_makes_of_attention_is_computed_anew(clock: Clock) -> None:
    """It does not say that it draws random numbers."""
    model = seeded(Noisy)
    fast = compiled(model)
    x = tokens(0)
    with attnrewrite.attention_cache(fast, broadcast(clock, 8)):
        for number in range(3):
            clock.now -= 10
            torch.manual_seed(number)
            found = fast(x)
            torch.manual_seed(number)
            assert relative_error(found, model(x)) <= 1e-5


class Picked(nn.Module):
    part = 0

    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention()

    def forward(self, x: Tensor, table: Tensor) -> Tensor:
        rows = nn.functional.embedding(torch.arange(1) + self.part, table.flatten(1))
        attended: Tensor = self.attention(rows.view(2, 6, 8))
        return x + attended


def test_a_number_that_chooses_rows_of_a_table_is_seen(clock: Clock) -> None:
    model = seeded(Picked)
    fast = compiled(model)
    with attnrewrite.attention_cache(fast, broadcast(clock, 8)):
        for model.part in range(3):
            clock.now -= 10
            given = tokens(model.part), tokens(9, 4, 2, 6, 8)
            assert relative_error(fast(*given), model(*given)) <= 1e-5


class Branching(nn.Module):
    part = 0

    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention()

    def forward(self, x: Tensor, parts: Tensor) -> Tensor:
        part = self.part
        chosen = torch.cond(parts.sum() > 0, lambda p: p[part] * 1.0, lambda p: p[part] * 2.0, (parts,))
        attended: Tensor = self.attention(chosen)
        return x + attended


def test_a_number_that_chooses_a_part_within_a_branch_is_seen(clock: Clock) -> None:
    torch._dynamo.reset()
    model = seeded(Branching)
    fast: Any = torch.compile(model, backend="attnrewrite", options={"inner_backend": "eager"})
    with attnrewrite.attention_cache(fast, broadcast(clock, 8)):
        for model.part in range(2):
            clock.now -= 10
            given = tokens(model.part), tokens(9, 4, 2, 6, 8)
            assert relative_error(fast(*given), model(*given)) <= 1e-5
