"""Cross-step caching in eager mode, on a small model, against diffusers' own hooks; the prediction of guidance."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attnrewrite.caching.guidance import GuidanceDelta, halved_inputs
from attnrewrite.caching.method import method_of
from attnrewrite.caching.runs import DenoisingRun
from attnrewrite.errors import CacheError
from attnrewrite.options.cache_callbacks import timestep_of, weight_of
from attnrewrite.options.cache_config import FasterCacheConfig, PyramidAttentionBroadcastConfig, validated
from tests.support.helpers import relative_error

diffusers: Any = pytest.importorskip("diffusers")

STEPS = [float(timestep) for timestep in range(980, 0, -70)]
Attend = Callable[..., Tensor]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        attention = diffusers.models.attention_processor.Attention
        self.attn1 = attention(8, heads=2, dim_head=4)
        self.attn2 = attention(8, cross_attention_dim=6, heads=2, dim_head=4)


class Denoiser(nn.Module):
    """Attention within one frame, of frames, and to a context; the output has the shape of the input."""

    attend: Attend | None = None

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block()])
        self.temporal_transformer_blocks = nn.ModuleList([Block()])

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, timestep: Tensor) -> Tensor:
        batch, frames, channels, height, width = hidden_states.shape
        context = encoder_hidden_states.repeat_interleave(frames, 0)
        x = hidden_states.permute(0, 1, 3, 4, 2).reshape(batch * frames, height * width, channels)
        x = x * (1 + timestep.repeat_interleave(frames)[:, None, None] / 1000)
        x = x + self.called("blocks.0.attn1", x)
        x = x + self.called("blocks.0.attn2", x, context)
        x = x.reshape(batch, frames, height * width, channels).transpose(1, 2).flatten(0, 1)
        x = x + self.called("temporal_transformer_blocks.0.attn1", x)
        return x.reshape(batch, height, width, frames, channels).permute(0, 3, 4, 1, 2)

    def called(self, path: str, *inputs: Tensor) -> Tensor:
        result: Tensor
        if self.attend is not None:
            return self.attend(path, self.get_submodule(path), *inputs)
        result = self.get_submodule(path)(*inputs)
        return result


KINDS: dict[str, Any] = {
    "blocks.0.attn1": "spatial",
    "blocks.0.attn2": "cross",
    "temporal_transformer_blocks.0.attn1": "temporal",
}


class Cached:
    """The rules of a method, applied to the model as it runs."""

    def __init__(self, model: Denoiser, config: object) -> None:
        self.model = copy.deepcopy(model)
        self.config = validated(config)
        self.method = method_of(self.config)
        self.run = DenoisingRun()
        self.history: dict[str, list[Tensor]] = {}
        self.delta = GuidanceDelta(getattr(self.config, "tensor_format", "BFCHW"))
        self.computed: list[int] = []

    def __call__(self, **inputs: Tensor) -> Tensor:
        config, method = self.config, self.method
        assert config.current_timestep_callback is not None
        timestep = timestep_of(config.current_timestep_callback)
        iteration = self.run.advance(timestep, tuple(value.shape for value in inputs.values()))
        if iteration == 0:
            self.history.clear()
            self.delta.reset()
        halved = method.skips_unconditional(iteration, timestep, separate=False)
        reused = method.reused(iteration, timestep, halved, separate=False)
        self.computed.append(0)
        distilled = isinstance(config, PyramidAttentionBroadcastConfig) or config.is_guidance_distilled

        def attend(path: str, module: nn.Module, *inputs: Tensor) -> Tensor:
            kind = method.kind_of(path, KINDS[path])
            history = self.history.setdefault(path, [])
            if kind in reused:
                weight = 0.0
                if isinstance(config, FasterCacheConfig) and config.attention_weight_callback is not None:
                    weight = weight_of(config.attention_weight_callback, module, "attention_weight_callback")
                value = method.next_value(history, weight)
            else:
                self.computed[-1] += 1
                value = module(*inputs)
            if kind not in reused or method.keeps_reused:
                kept = value if distilled or halved else value.chunk(2)[1]
                self.history[path] = [*history, kept][-method.history_length :]
            return value

        self.model.attend = attend
        if not isinstance(config, FasterCacheConfig) or distilled:
            result: Tensor = self.model(**inputs)
            return result
        if not halved:
            output: Tensor = self.model(**inputs)
            self.delta.learn(output)
            return output
        _, kwargs = halved_inputs((), inputs, config.unconditional_conditional_input_kwargs_identifiers or ())
        low, high = config.low_frequency_weight_callback, config.high_frequency_weight_callback
        assert low is not None
        assert high is not None
        return self.delta.complete(
            self.model(**kwargs),
            weight_of(low, self.model, "low_frequency_weight_callback"),
            weight_of(high, self.model, "high_frequency_weight_callback"),
        )


class Loop:
    """A denoising loop that feeds a model's output back to it."""

    timestep = 0.0

    def current_timestep(self) -> float:
        return self.timestep

    @torch.no_grad()
    def outputs(self, model: Callable[..., Tensor], halves: bool) -> list[Tensor]:
        generator = torch.Generator().manual_seed(1)
        latents = torch.randn(1, 3, 8, 6, 7, generator=generator)
        context = torch.randn(2 if halves else 1, 5, 6, generator=generator)
        outputs = []
        for self.timestep in STEPS:
            inputs = torch.cat([latents] * 2) if halves else latents
            timestep = torch.full((len(inputs),), self.timestep)
            output = model(hidden_states=inputs, encoder_hidden_states=context, timestep=timestep)
            outputs.append(output)
            guided = output
            if halves:
                unconditional, conditional = output.chunk(2)
                guided = unconditional + 3 * (conditional - unconditional)
            latents = latents * 0.95 - guided * 0.05
        return outputs


def compared(config: Any, theirs: Any, apply: Callable[..., None], loop: Loop, halves: bool) -> tuple[float, Cached]:
    """The largest error of all steps against diffusers' hooks, and how the rules went."""
    torch.manual_seed(2)
    model = Denoiser().eval()
    hooked = copy.deepcopy(model)
    apply(hooked, theirs)
    cached = Cached(model, config)
    found, expected = loop.outputs(cached, halves), loop.outputs(hooked, halves)
    return max(relative_error(*pair) for pair in zip(found, expected, strict=True)), cached


IDENTIFIERS = {
    "spatial_attention_block_identifiers": ("^blocks",),
    "temporal_attention_block_identifiers": ("^temporal_transformer_blocks",),
}


@pytest.mark.parametrize("ranges", [(2, 3, 5), (None, None, 4), (3, None, None), (1, 7, 2)])
@pytest.mark.parametrize("halves", [False, True])
def test_pyramid_attention_broadcast_is_that_of_diffusers(ranges: tuple[int | None, ...], halves: bool) -> None:
    loop = Loop()
    theirs = diffusers.PyramidAttentionBroadcastConfig(
        *ranges,
        temporal_attention_timestep_skip_range=(50, 700),
        current_timestep_callback=loop.current_timestep,
        **IDENTIFIERS,
    )
    error, cached = compared(theirs, theirs, diffusers.apply_pyramid_attention_broadcast, loop, halves)
    assert error < 1e-6
    assert sum(cached.computed) < 3 * len(STEPS)


def faster_cache(loop: Loop, **settings: Any) -> dict[str, Any]:
    return {
        "temporal_attention_block_skip_range": 3,
        "unconditional_batch_skip_range": 4,
        "unconditional_batch_timestep_skip_range": (-1, 800),
        "tensor_format": "BFCHW",
        "attention_weight_callback": lambda module: 1.5 - loop.timestep / 700,
        "current_timestep_callback": loop.current_timestep,
        **{name: tuple(f"{each}.*attn" for each in names) for name, names in IDENTIFIERS.items()},
        **settings,
    }


@pytest.mark.parametrize("distilled", [False, True])
def test_faster_cache_is_that_of_diffusers_where_it_is_followed(distilled: bool) -> None:
    loop = Loop()
    settings = faster_cache(loop, is_guidance_distilled=distilled)
    theirs = diffusers.FasterCacheConfig(**settings)
    ours = FasterCacheConfig(**settings, follow_diffusers=True)
    error, cached = compared(ours, theirs, diffusers.apply_faster_cache, loop, halves=not distilled)
    assert error < 1e-5
    assert min(cached.computed) == 1  # The cross-attention is always computed.


def test_faster_cache_as_published_keeps_computed_outputs_only() -> None:
    loop = Loop()
    # With every second call computed, both differ: the call before the last is an extrapolated one, or is not.
    settings = faster_cache(loop, is_guidance_distilled=True, temporal_attention_block_skip_range=2)
    ours = FasterCacheConfig(**settings)
    theirs = diffusers.FasterCacheConfig(**settings)
    error, _ = compared(ours, theirs, diffusers.apply_faster_cache, loop, halves=False)
    assert error > 1e-3


# The prediction of guidance -------------------------------------------------------------------------------------------

SHAPES = {"BCFHW": (4, 3, 2, 10, 13), "BFCHW": (4, 2, 3, 12, 7), "BCHW": (4, 3, 4, 16)}


class Given(nn.Module):
    """A model that returns what it is given."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states


@pytest.mark.parametrize("tensor_format", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_guidance_is_predicted_as_by_diffusers(tensor_format: str, dtype: torch.dtype) -> None:
    timestep = 900
    model = Given()
    config = diffusers.FasterCacheConfig(
        tensor_format=tensor_format,
        unconditional_batch_timestep_skip_range=(-1, 1001),
        alpha_low_frequency=1.3,
        alpha_high_frequency=0.8,
        current_timestep_callback=lambda: timestep,
    )
    diffusers.apply_faster_cache(model, copy.copy(config))
    checked = validated(config)
    assert isinstance(checked, FasterCacheConfig)
    low, high = checked.low_frequency_weight_callback, checked.high_frequency_weight_callback
    assert low is not None
    assert high is not None
    delta = GuidanceDelta(tensor_format)
    assert not delta.learned
    for step, timestep in enumerate((950, 900, 500, 300, 200, 100, 50)):  # noqa: B007 (the callback reads it)
        output = torch.randn(SHAPES[tensor_format]).to(dtype)
        expected = model(hidden_states=output)
        if step % 5 == 0:
            delta.learn(output)
            assert torch.equal(expected, output)
            continue
        conditional = output.chunk(2)[1]
        found = delta.complete(conditional, low(model), high(model))
        assert found.dtype == expected.dtype == dtype
        assert torch.equal(found.chunk(2)[1], conditional)
        assert relative_error(found, expected) < (1e-2 if dtype == torch.bfloat16 else 1e-6)


def test_guidance_is_learned_from_two_calls_as_from_one() -> None:
    output, conditional = torch.randn(SHAPES["BCHW"]), torch.randn(2, 3, 4, 16)
    whole, parts = GuidanceDelta("BCHW"), GuidanceDelta("BCHW")
    whole.learn(output)
    parts.learn_from(*output.chunk(2))
    assert torch.equal(whole.predict(conditional, 1.1, 1.2), parts.predict(conditional, 1.1, 1.2))
    # What is learned anew starts at the weights 1 again.
    whole.learn(output)
    unconditional, conditional = output.chunk(2)
    assert torch.allclose(whole.predict(conditional, 1.0, 1.0), unconditional, atol=1e-6)


def test_guidance_stores_about_one_half_in_float32() -> None:
    output = torch.randn(2, 4, 13, 60, 90, dtype=torch.bfloat16)
    delta = GuidanceDelta("BCFHW")
    assert delta.nbytes == 0
    delta.learn(output)
    half = output[1:].numel() * 4
    assert half <= delta.nbytes <= 1.03 * half
    delta.to("cpu")
    assert delta.predict(output[1:], 1.0, 1.0).shape == output[1:].shape
    delta.reset()
    assert (delta.nbytes, delta.learned) == (0, False)


def test_guidance_computes_in_float32_whatever_the_default() -> None:
    output = torch.randn(2, 3, 10, 15)
    expected, found = GuidanceDelta("BCHW"), GuidanceDelta("BCHW")
    expected.learn(output)
    reference = expected.predict(output[1:], 1.1, 0.9)
    torch.set_default_dtype(torch.bfloat16)
    try:
        found.learn(output)
        assert torch.equal(found.predict(output[1:], 1.1, 0.9), reference)
    finally:
        torch.set_default_dtype(torch.float32)


def test_what_guidance_cannot_be_predicted_from_is_refused() -> None:
    delta = GuidanceDelta("BCFHW")
    with pytest.raises(CacheError, match=r"'BCFHW' means 5 dimensions.*shape \(2, 3, 4, 16\).*BCFHW, BFCHW, BCHW"):
        delta.learn(torch.randn(2, 3, 4, 16))
    with pytest.raises(CacheError, match=r"odd batch size 3 \(shape \(3, 1, 1, 4, 4\)\)"):
        delta.learn(torch.randn(3, 1, 1, 4, 4))
    with pytest.raises(CacheError, match=r"\(2, 1, 1, 4, 4\) and the conditional one \(1, 1, 1, 4, 4\)"):
        delta.learn_from(torch.randn(2, 1, 1, 4, 4), torch.randn(1, 1, 1, 4, 4))
    with pytest.raises(CacheError, match=r"floating-point outputs; the model's output is torch\.int64"):
        delta.learn(torch.ones(2, 1, 1, 4, 4, dtype=torch.int64))
    with pytest.raises(CacheError, match="both halves must be computed once"):
        delta.predict(torch.randn(1, 1, 1, 4, 4), 1.0, 1.0)
    delta.learn(torch.randn(2, 1, 1, 4, 4))
    with pytest.raises(CacheError, match=r"halves of shape \(1, 1, 1, 4, 4\).*\(1, 1, 1, 4, 6\). Reset the cache"):
        delta.predict(torch.randn(1, 1, 1, 4, 6), 1.0, 1.0)


# Inputs ---------------------------------------------------------------------------------------------------------------


def test_inputs_are_halved() -> None:
    x, mask, table, one = torch.arange(2), torch.arange(8).reshape(2, 4), torch.arange(4), torch.ones(1, 4)
    args, kwargs = halved_inputs(
        (x, 3, [mask], table, one),
        {"states": {"a": x, "b": [mask, None]}, "timestep": torch.tensor(5), "other": x, "mask": None},
        ("states", "timestep", "mask"),
    )
    assert args[0].tolist() == [1]
    assert args[1] == 3
    assert args[2][0].tolist() == [[4, 5, 6, 7]]
    # Of another size than the batch, and with one row for all.
    assert args[3] is table
    assert args[4] is one
    assert kwargs["states"]["a"].tolist() == [1]
    assert kwargs["states"]["b"][0].tolist() == [[4, 5, 6, 7]]
    assert kwargs["states"]["b"][1] is None
    # Without dimensions, a timestep is that of both halves.
    assert kwargs["timestep"].item() == 5
    assert kwargs["other"] is x
    assert kwargs["mask"] is None


def test_inputs_that_have_no_halves_are_refused() -> None:
    with pytest.raises(CacheError, match=r"argument 'x' has the odd batch size 3 \(shape \(3, 2\)\)"):
        halved_inputs((), {"x": torch.ones(3, 2)}, ("x",))
    with pytest.raises(CacheError, match="positional argument 1 has the odd batch size 1"):
        halved_inputs((None, torch.ones(1)), {}, ("x",))
    with pytest.raises(CacheError, match=r"name them in unconditional_.*\(now x; the call's keywords are y\)"):
        halved_inputs((), {"y": torch.ones(2)}, ("x",))
