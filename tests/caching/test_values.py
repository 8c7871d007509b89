"""Attention reuse: of which function of an attention a value is stored, whose memory it is, and what it goes with."""

from __future__ import annotations

import gc
import io
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import attnrewrite
from attnrewrite import CacheError, CacheMemoryError, FasterCacheConfig
from tests.support.caching_video import Attention, Clock, broadcast, compiled, inputs, tokens, video
from tests.support.helpers import recording, relative_error

pytestmark = pytest.mark.drawn


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture
def clock() -> Clock:
    return Clock()


def faster(clock: Clock, **changes: Any) -> FasterCacheConfig:
    """Of guidance-distilled models: attention is extrapolated, and nothing else."""
    chosen: dict[str, Any] = {"spatial_attention_block_skip_range": 2, "is_guidance_distilled": True, **changes}
    return FasterCacheConfig(**chosen, attention_weight_callback=lambda _: 0.5, current_timestep_callback=clock)


class Tail(nn.Module):
    """An attention, what is done to its result, and the input beside it."""

    def __init__(self, behind: Callable[[Any], Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attention = Attention()
        self.behind = behind
        self.eval()

    def forward(self, x: Tensor) -> Any:
        value = self.attention(x)
        return value, self.behind(value) + x[..., :1]


# Extrapolated values --------------------------------------------------------------------------------------------------


torch.manual_seed(1)
MATRIX, VECTOR = torch.randn(8, 8), torch.randn(8)
FUNCTIONS: dict[str, Callable[[Any], Any]] = {
    "linear": lambda y: nn.functional.linear(y, MATRIX, VECTOR),
    "product": lambda y: y @ MATRIX,
    "add": lambda y: y + VECTOR + 1,
    "from": lambda y: 1 - y,
    "multiply": lambda y: y * VECTOR * 0.5,
    "divide": lambda y: y / (VECTOR.abs() + 1),
    "parts": lambda y: torch.cat(y.chunk(2, -1)[::-1], -1),
    "halves": lambda y: torch.stack([y, y.flip(1)]).mean(0),
    "einsum": lambda y: torch.einsum("bld,de->ble", y, MATRIX),
    "double": lambda y: y.double().float(),
    "norm": lambda y: nn.functional.layer_norm(y, (8,)),
    "gelu": nn.functional.gelu,
    "square": lambda y: y * y,
    "gated": lambda y: y * y.flip(1).sigmoid(),
    # Not y @ y.mT @ y: behind a square, that is a linear attention, which is reused as such.
    "gram": lambda y: y + (y.transpose(1, 2) @ y).mean(1, keepdim=True),
    "quotient": lambda y: VECTOR / (2 + y * y),
    "own part": lambda y: y[:, :1] * y,
    "greatest": lambda y: y.max(1, keepdim=True)[0] + y,
    "bias": lambda y: torch.addmm(y[0], y[0], MATRIX)[None] + y,
    "rounded": lambda y: y.round(),
    "truncated": lambda y: y.int().float(),
    "of 8 bits": lambda y: y.to(torch.float8_e4m3fn).float(),
}


@settings(max_examples=30, deadline=None)
@given(names=st.lists(st.sampled_from(sorted(FUNCTIONS)), min_size=1, max_size=3))
def test_what_is_extrapolated_is_the_attention(names: list[str]) -> None:
    """Whatever is done to its result: FasterCache's rule is one for an attention's output."""

    def behind(y: Any) -> Any:
        for name in names:
            y = FUNCTIONS[name](y)
        return y

    model, clock = Tail(behind), Clock()
    fast = compiled(model)
    with torch.no_grad(), attnrewrite.attention_cache(fast, faster(clock)):
        for number in range(4):
            clock.now -= 1
            value, found = fast(tokens(number))
    expected = torch.lerp(model.attention(tokens(0)), model.attention(tokens(2)), 1.5)
    assert relative_error(value, expected) <= 1e-5
    assert relative_error(found, behind(expected) + tokens(3)[..., :1]) <= 1e-4, names


def test_values_of_other_weights_are_not_extrapolated(clock: Clock) -> None:
    model = Tail(lambda y: y)
    fast = compiled(model)
    with attnrewrite.attention_cache(fast, faster(clock)):
        for number in range(6):
            clock.now -= 1
            if number == 4:
                model.attention.out.weight.mul_(3)
            value, _ = fast(tokens(number))
    assert relative_error(value, model.attention(tokens(4))) <= 1e-5


# Whose memory it is ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
@pytest.mark.parametrize(
    "behind",
    [
        lambda y: torch.einsum("abc->abc", y),
        lambda y: y.view(torch.int32).view(torch.float32),
        lambda y: torch.view_as_real(torch.view_as_complex(y.unflatten(-1, (4, 2)))).flatten(-2),
        lambda y: y.as_strided((2, 6, 8), (48, 8, 1)),
        lambda y: torch.unsafe_chunk(y, 1)[0],
        lambda y: y.to(torch.float32),
    ],
    ids=["einsum", "bits", "complex", "strides", "chunk", "cast"],
)
def test_what_the_caller_writes_to_a_result_is_not_stored(
    clock: Clock, behind: Callable[[Any], Any], inner: str
) -> None:
    model = Tail(behind)
    fast = compiled(model, inner)
    with attnrewrite.attention_cache(fast, broadcast(clock, every=4)):
        fast(tokens(0))[0].fill_(77)
        clock.now -= 1
        _, found = fast(tokens(1))
    assert relative_error(found, behind(model.attention(tokens(0))) + tokens(1)[..., :1]) <= 1e-5


class Half(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention()

    def forward(self, x: Tensor) -> Any:
        y = self.attention(x)
        return torch.unsafe_chunk(y, 2, -1)[0], y + x


@pytest.mark.parametrize("config", [broadcast, faster])
def test_parts_that_do_not_say_whose_they_are(clock: Clock, config: Callable[[Clock], Any]) -> None:
    torch.manual_seed(0)
    model = Half().eval()
    fast = compiled(model)
    with attnrewrite.attention_cache(fast, config(clock)):
        for number in range(2):
            clock.now -= 1
            part, whole = fast(tokens(number))
            part.fill_(77)
    assert relative_error(whole, model.attention(tokens(0)) + tokens(1)) <= 1e-5


@pytest.mark.parametrize(
    "behind",
    [
        lambda y: y[:, None].expand(-1, 3, -1, -1),
        lambda y: y.unfold(1, 3, 1),
        lambda y: y.as_strided((2, 3), (48, 8)),
        lambda y: torch.unsafe_chunk(y, 2, -1)[0],
    ],
    ids=["expand", "unfold", "as_strided", "unsafe_chunk"],
)
def test_a_reused_view_has_the_strides_of_a_computed_one(clock: Clock, behind: Callable[[Any], Any]) -> None:
    model = Tail(lambda y: y)
    model.forward = lambda x: behind(model.attention(x))  # type: ignore[method-assign]
    fast = compiled(model)
    with attnrewrite.attention_cache(fast, broadcast(clock)):
        computed = fast(tokens(0))
        clock.now -= 1
        assert fast(tokens(1)).stride() == computed.stride() == model(tokens(1)).stride()


class Part(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.after = Attention(), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        y = self.attention(x)[..., -1]
        torch._dynamo.graph_break()
        result: Tensor = self.after(y) + x.mean(-1)
        return result


def test_a_reused_part_has_the_strides_of_a_computed_one(clock: Clock) -> None:
    torch.manual_seed(0)
    model = Part().eval()
    inner, graphs = recording()
    torch._dynamo.reset()
    fast: Any = torch.compile(model, backend="attnrewrite", options={"inner_backend": inner})
    counts = []
    with attnrewrite.attention_cache(fast, broadcast(clock)):
        for number in range(4):
            clock.now -= 1
            found = fast(tokens(number))
            counts.append(len(graphs))
    assert counts == counts[:1] * 4
    expected = model.after(model.attention(tokens(2))[..., -1]) + tokens(3).mean(-1)
    assert relative_error(found, expected) <= 1e-5


def test_what_is_stored_goes_with_the_model_under_options(clock: Clock) -> None:
    def stored() -> int:
        gc.collect()
        return sum(type(each) is Tensor and each.shape == (3, 77, 8) for each in gc.get_objects())

    before = stored()
    for _ in range(2):
        model = Tail(lambda y: y)
        options: Any = {"inner_backend": "eager", "cache": broadcast(clock)}
        fast = torch.compile(model, backend="attnrewrite", options=options)
        for number in range(2):
            clock.now -= 1
            fast(tokens(number, 3, 77, 8))
        assert stored() > before
        del model, fast
        assert stored() == before


# What it goes with ----------------------------------------------------------------------------------------------------


class Picked(nn.Module):
    """A number says which part of its input an attention is of."""

    def __init__(self, pick: Callable[[Any, int], Any]) -> None:
        super().__init__()
        self.attention = Attention()
        self.pick = pick

    def forward(self, x: Tensor, k: int) -> Tensor:
        result: Tensor = self.attention(self.pick(x, k)).mean(1, keepdim=True) + x
        return result


@pytest.mark.parametrize("dynamic", [None, True, False])
@pytest.mark.parametrize(
    "pick",
    [
        lambda x, k: x[:, [k, k + 1, k + 2]],
        lambda x, k: x[:, k:][:, :6],
        lambda x, k: x.roll(k, 1) * torch.linspace(0, 1, 12).view(1, 12, 1),
        lambda x, k: x.unflatten(1, (12, 1)).select(1, k).expand(-1, 2, -1) + x[:, :2],
        lambda x, k: x[:, torch.arange(6) + k],
        lambda x, k: x.index_select(1, torch.full((3,), k)),
        lambda x, k: x[:, torch.arange(0, 11, k)][:, :3],
        lambda x, k: x[:, torch.linspace(0, k, 3).long()],
        lambda x, k: x[:, (torch.arange(3) * (k / 2)).long()],
        lambda x, k: x[:, ::k][:, :2],
        lambda x, k: nn.functional.pad(x, (0, 0, k, 0))[:, :6],
        lambda x, k: x.as_strided((2, 4, 8), (96, 8, 1), 8 * k),
        lambda x, k: x.as_strided((2, 3, 8), (96, 8 * k - 8, 1)),
        lambda x, k: x.kthvalue(k, 1, keepdim=True)[0],
        lambda x, k: x.tril(k - 6),
    ],
    ids=[
        *("list", "slice", "roll", "select", "computed", "full", "every", "linspace", "scaled", "step", "pad"),
        *("offset", "stride", "kthvalue", "diagonal"),
    ],
)
def test_a_value_of_another_part_is_not_taken(clock: Clock, pick: Callable[[Any, int], Any], dynamic: Any) -> None:
    torch.manual_seed(0)
    model = Picked(pick).eval()
    fast = compiled(model, dynamic=dynamic)
    with attnrewrite.attention_cache(fast, broadcast(clock, every=8)):
        for number, k in enumerate([2, 3, 4, 5]):
            clock.now -= 1
            x = tokens(number, 2, 12, 8)
            assert relative_error(fast(x, k), model(x, k)) <= 1e-5, k
        for number in (6, 7):
            clock.now -= 1
            x = tokens(number, 2, 12, 8)
            expected = model(tokens(3, 2, 12, 8), 5) - tokens(3, 2, 12, 8) + x
            assert relative_error(fast(x, 5), expected) <= 1e-5


class PickedByFloat(nn.Module):
    """A float, or a number in a tensor, says which part of its input an attention is of."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention()

    def forward(self, x: Tensor, where: Any, more: int = 0) -> Tensor:
        if isinstance(where, float):
            start = int(x.shape[1] * where)
        else:
            start = (where + more if more else where).item()
            torch._check(start >= 0)  # type: ignore[no-untyped-call]
            torch._check(start <= 8)  # type: ignore[no-untyped-call]
        result: Tensor = self.attention(x[:, start : start + 4]).mean(1, keepdim=True) + x
        return result


@pytest.mark.parametrize(
    ("given", "dynamic"),
    [(lambda k: k / 12 + 0.01, None), (lambda k: k / 12 + 0.01, True), (torch.tensor, None)],
    ids=["float", "dynamic_float", "item"],
)
def test_a_value_of_a_part_that_a_float_picks_is_not_taken(clock: Clock, given: Any, dynamic: bool | None) -> None:
    torch.manual_seed(0)
    model = PickedByFloat().eval()
    fast = compiled(model, dynamic=dynamic)
    with (
        torch._dynamo.config.patch(capture_scalar_outputs=True),
        attnrewrite.attention_cache(fast, broadcast(clock, every=8)),
    ):
        for number, k in enumerate([2, 3, 4, 5]):
            clock.now -= 1
            x = tokens(number, 2, 12, 8)
            assert relative_error(fast(x, given(k)), model(x, given(k))) <= 1e-5, k
        clock.now -= 1
        expected = model(tokens(3, 2, 12, 8), given(5)) - tokens(3, 2, 12, 8) + tokens(4, 2, 12, 8)
        assert relative_error(fast(tokens(4, 2, 12, 8), given(5)), expected) <= 1e-5


def test_a_part_that_a_computed_number_picks_is_not_kept(clock: Clock) -> None:
    fast = compiled(PickedByFloat().eval())
    with (
        torch._dynamo.config.patch(capture_scalar_outputs=True),
        attnrewrite.attention_cache(fast, broadcast(clock)),
        pytest.raises(CacheError, match="depends on a number that is computed from data"),
    ):
        fast(tokens(0, 2, 12, 8), torch.tensor(2), 1)


class Timed(nn.Module):
    """The timestep comes as a number."""

    def __init__(self, tensor_of: Callable[[int, int], Any]) -> None:
        super().__init__()
        self.attention, self.embedding = Attention(), nn.Linear(1, 8)
        self.table = nn.Parameter(torch.randn(1000, 8))
        self.tensor_of = tensor_of

    def forward(self, x: Tensor, timestep: int) -> Tensor:
        steps = self.tensor_of(len(x), timestep)
        x = x + self.embedding(steps.float()[:, None, None] / 1000) + self.table[steps][:, None]
        result: Tensor = self.attention(x) + x
        return result


@pytest.mark.parametrize(
    "tensor_of",
    [
        lambda batch, timestep: torch.full((batch,), timestep),
        lambda batch, timestep: torch.ones(batch, dtype=torch.long) * timestep,
        lambda batch, timestep: torch.zeros(batch, dtype=torch.long) + timestep,
    ],
    ids=["full", "ones", "zeros"],
)
def test_a_timestep_is_no_part(clock: Clock, tensor_of: Callable[[int, int], Any]) -> None:
    torch.manual_seed(0)
    model = Timed(tensor_of).eval()
    fast = compiled(model, dynamic=True)
    reused = []
    with attnrewrite.attention_cache(fast, broadcast(clock)):
        for number in range(4):
            clock.now -= 7
            x = tokens(number)
            reused.append(relative_error(fast(x, clock.now), model(x, clock.now)) > 1e-3)
    assert reused == [False, True, False, True]


class Repeated(nn.Module):
    """The batch's size is an argument of what is added to the tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention()
        self.positions = nn.Parameter(torch.randn(1, 6, 8))

    def forward(self, hidden_states: Tensor) -> Any:
        x = hidden_states.flatten(2).transpose(1, 2)
        x = x + self.positions.repeat(len(x), 1, 1)
        y = self.attention(x)
        return (y + x).transpose(1, 2).unflatten(2, hidden_states.shape[2:]), y


def test_a_batch_that_is_an_argument_is_halved(clock: Clock) -> None:
    torch.manual_seed(0)
    model = Repeated().eval()
    fast = compiled(model)
    config = faster(
        clock,
        is_guidance_distilled=False,
        spatial_attention_timestep_skip_range=(-1, 1000),
        unconditional_batch_timestep_skip_range=(-1, 1000),
        unconditional_batch_skip_range=5,
        tensor_format="BCHW",
    )

    def given(number: int) -> Tensor:
        return tokens(number, 2, 8, 2, 3)

    with attnrewrite.attention_cache(fast, config):
        for number in range(8):
            clock.now -= 1
            _, value = fast(given(number))
    # Both halves are computed in calls 0 and 5, attention in every second one: the last two were 5 and 6.
    expected = torch.lerp(model(given(5))[1][1:], model(given(6))[1][1:], 1.5)
    assert relative_error(value[-1:], expected) <= 1e-5


class Experts(nn.Module):
    """One of two layers, by a number; a graph break parts its projection from the attention."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(8, 8) for _ in range(2)])

    def forward(self, x: Tensor, which: int) -> Tensor:
        y = self._projected(x, which)
        heads = y.unflatten(-1, (2, 4)).transpose(1, 2)
        return nn.functional.scaled_dot_product_attention(heads, heads, heads).transpose(1, 2).flatten(2) + x

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _projected(self, x: Tensor, which: int) -> Tensor:
        result: Tensor = self.layers[which](x)
        return result


def test_which_layer_calls_a_graph_without_parameters_is_not_guessed(clock: Clock) -> None:
    torch._dynamo.reset()
    fast: Any = torch.compile(Experts().eval(), backend="attnrewrite", options={"inner_backend": "eager"})
    attnrewrite.enable_cache(fast, broadcast(clock))
    with pytest.raises(CacheError, match="a graph without parameters, of which it cannot be told which layer calls it"):
        fast(tokens(0), 0)


class _HeldWeights(nn.Module):
    """A block that holds its weights as plain tensors."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.weights = [tokens(seed + number, 8, 8) * 0.3 for number in range(3)]

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (x @ weight for weight in self.weights)
        return torch.softmax(q @ k.mT * 0.3, -1) @ v


class _Chosen(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([_HeldWeights(1), _HeldWeights(11)])

    def forward(self, x: Tensor, which: int) -> Tensor:
        result: Tensor = x + self.blocks[which](x)
        return result


def test_blocks_without_parameters_are_not_taken_for_each_other(clock: Clock) -> None:
    torch._dynamo.reset()
    model = _Chosen().eval()
    for block in model.blocks:
        block.compile(backend="attnrewrite", options={"inner_backend": "eager"})
    attnrewrite.enable_cache(model, broadcast(clock))
    with pytest.raises(CacheError, match="a graph without parameters, of which it cannot be told which layer calls it"):
        model(tokens(0), 0)


class _Memory(nn.Module):
    """Attends keys that the model holds, as they are."""

    memory: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(8, 8)

    def remember(self, length: int) -> None:
        self.memory = tokens(length, 2, 2, length, 4)

    def forward(self, x: Tensor) -> Tensor:
        query = self.query(x).unflatten(-1, (2, 4)).transpose(1, 2)
        return x + (torch.softmax(query @ self.memory.mT * 0.5, -1) @ self.memory).transpose(1, 2).flatten(-2)


@pytest.mark.parametrize("dynamic", [None, True])
def test_the_length_of_a_memory_that_no_argument_shows(clock: Clock, dynamic: bool | None) -> None:
    torch.manual_seed(0)
    model = _Memory().eval()
    model.remember(3)
    fast = compiled(model, "eager", dynamic=dynamic)
    with attnrewrite.attention_cache(fast, broadcast(clock, None, cross_attention_block_skip_range=8)):
        for number, length in enumerate((3, 4, 5)):
            clock.now -= 10
            model.remember(length)
            assert relative_error(fast(tokens(number)), model(tokens(number))) <= 1e-5


@pytest.mark.parametrize("grid", [lambda: torch.linspace(-1.0, 1.0, 8), lambda: torch.arange(0.0, 8.0)])
def test_numbers_that_are_no_sizes(clock: Clock, grid: Callable[[], Tensor]) -> None:
    torch.manual_seed(0)
    model = Picked(lambda x, _: x + grid()).eval()
    fast = compiled(model)
    with attnrewrite.attention_cache(fast, broadcast(clock)):
        assert relative_error(fast(tokens(0), 0), model(tokens(0), 0)) <= 1e-5


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.some, self.all = Attention(), Attention()

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        result: Tensor = self.some(x[0][mask][None]).sum() + self.all(x)
        return result


def test_an_attention_of_a_size_that_depends_on_data_is_computed(clock: Clock) -> None:
    torch.manual_seed(0)
    model = Masked().eval()
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        fast = compiled(model)
        with attnrewrite.attention_cache(fast, broadcast(clock)):
            for number, count in enumerate((3, 4)):
                clock.now -= number
                mask = torch.arange(6) < count
                found = fast(tokens(number), mask)
                expected = model.some(tokens(number)[0][mask][None]).sum() + model.all(tokens(0))
                assert relative_error(found, expected) <= 1e-5


# Errors, messages, copies ---------------------------------------------------------------------------------------------


def test_an_error_in_a_graph_that_is_compiled_at_a_call_reaches_the_caller(clock: Clock) -> None:
    """The graph module of a variant goes through an error's traceback, which is not to be compiled."""
    fast = compiled(video())
    with attnrewrite.attention_cache(fast, broadcast(clock)):
        fast(**inputs(0))
    limited = faster(clock, is_guidance_distilled=False, memory_limit=100, tensor_format="BCHW")
    names = ("x", "text")
    limited.unconditional_conditional_input_kwargs_identifiers = names
    for _ in range(2):
        with attnrewrite.attention_cache(fast, limited), pytest.raises(CacheMemoryError, match="is 100 bytes"):
            fast(**inputs(0))


def test_a_model_with_a_cache_is_saved_and_loaded(clock: Clock) -> None:
    model = video()
    attnrewrite.enable_cache(compiled(model), broadcast(clock))
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    loaded._reset_stateful_cache()  # What pipelines call; it has nothing to do here.
    for found, expected in zip(loaded(**inputs(0)), model(**inputs(0)), strict=True):
        assert torch.equal(found, expected)
    fast = compiled(loaded)
    with attnrewrite.attention_cache(fast, broadcast(clock)):
        clock.now -= 1
        fast(**inputs(0))


def test_explain_says_what_faster_cache_keeps(clock: Clock) -> None:
    config = faster(clock, is_guidance_distilled=False, temporal_attention_block_skip_range=None)
    arguments: dict[str, Any] = {**inputs(0)}
    with torch.enable_grad():
        report = attnrewrite.explain(video(), options={"cache": config}, **arguments)
    cached = {site.location.module: site.cached for graph in report.graphs for site in graph.sites if site.location}
    assert cached["spatial"].startswith("spatial (")
    assert cached["temporal"].startswith("no: temporal_attention_block_skip_range is not set; it is temporal (")
    assert cached["cross"].startswith("no: cross_attention_block_skip_range is not set; it is cross (")
    with pytest.raises(CacheError, match="Video is in training mode"):
        attnrewrite.explain(video().train(), options={"cache": config}, **arguments)


def test_identifiers_that_match_nothing(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    fast = compiled(video())
    wrong = broadcast(clock, spatial_attention_block_identifiers=("nothing",))
    message = "spatial is spatial, and none of spatial_attention_block_identifiers matches"
    with attnrewrite.attention_cache(fast, wrong), pytest.raises(CacheError, match=message):
        fast(**inputs(0))
    partly = broadcast(clock, spatial_attention_block_identifiers=("spatial", "nothing"))
    with attnrewrite.attention_cache(fast, partly):
        fast(**inputs(0))
    assert "block identifiers that match no attention: 'nothing'; attentions that are kept: spatial" in caplog.text
