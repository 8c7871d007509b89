"""Settings of cross-step caching: defaults, diffusers' objects, and what is refused."""

from __future__ import annotations

import copy
import dataclasses
import logging
import sys
from typing import Any

import pytest
import torch
from torch import nn

from attnrewrite.caching.method import method_of
from attnrewrite.errors import OptionError
from attnrewrite.options.cache_config import FasterCacheConfig, PyramidAttentionBroadcastConfig, validated

diffusers: Any = pytest.importorskip("diffusers")

Config = PyramidAttentionBroadcastConfig | FasterCacheConfig
CLASSES = [PyramidAttentionBroadcastConfig, FasterCacheConfig]


def now() -> int:
    return 500


@pytest.mark.parametrize("own", CLASSES)
def test_fields_and_defaults_are_those_of_diffusers(own: type[Config]) -> None:
    theirs = {field.name: field.default for field in dataclasses.fields(getattr(diffusers, own.__name__))}
    ours = {field.name: field.default for field in dataclasses.fields(own)}
    assert theirs.keys() <= ours.keys()
    identifiers = {name for name in theirs if name.endswith("_identifiers")}
    assert {name: ours[name] for name in identifiers} == dict.fromkeys(identifiers)
    assert {name: ours[name] for name in theirs if name not in identifiers} == {
        name: default for name, default in theirs.items() if name not in identifiers
    }


@pytest.mark.parametrize("own", CLASSES)
def test_the_callers_object_is_left_alone(own: type[Config]) -> None:
    config = own(current_timestep_callback=now)
    before = copy.copy(config)
    checked = validated(config)
    assert config == before
    assert checked is not config
    assert validated(checked) == checked


def test_no_skip_range_is_2_for_spatial_attention(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "attnrewrite"):
        checked = validated(PyramidAttentionBroadcastConfig(current_timestep_callback=now))
    assert isinstance(checked, PyramidAttentionBroadcastConfig)
    assert checked.spatial_attention_block_skip_range == 2
    assert "spatial_attention_block_skip_range=2 is used" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING, "attnrewrite"):
        validated(PyramidAttentionBroadcastConfig(cross_attention_block_skip_range=2, current_timestep_callback=now))
    assert caplog.text == ""


def test_weights_by_default(caplog: pytest.LogCaptureFixture) -> None:
    timestep: Any = None
    model = nn.Identity()
    config = FasterCacheConfig(current_timestep_callback=lambda: timestep, alpha_low_frequency=1.2)
    with caplog.at_level(logging.WARNING, "attnrewrite"):
        checked = validated(config)
    assert "the weight 0.5" in caplog.text
    assert isinstance(checked, FasterCacheConfig)
    attention, low, high = (
        checked.attention_weight_callback,
        checked.low_frequency_weight_callback,
        checked.high_frequency_weight_callback,
    )
    assert attention is not None
    assert low is not None
    assert high is not None
    assert attention(model) == 0.5
    found = []
    for timestep in (950, 901, torch.tensor([900]), 301, 300, 100, 99, 0):  # noqa: B007 (the callback reads it)
        found.append((low(model), high(model)))
    assert found == [
        (1.0, 1.0),
        (1.0, 1.0),
        (1.2, 1.0),
        (1.2, 1.0),
        (1.2, 1.1),
        (1.2, 1.1),
        (1.0, 1.1),
        (1.0, 1.1),
    ]


def test_callbacks_that_are_set_are_kept(caplog: pytest.LogCaptureFixture) -> None:
    def weight(module: nn.Module) -> float:
        return 0.3

    names = ["attention_weight_callback", "low_frequency_weight_callback", "high_frequency_weight_callback"]
    settings: dict[str, Any] = dict.fromkeys(names, weight)
    with caplog.at_level(logging.WARNING, "attnrewrite"):
        checked = validated(FasterCacheConfig(current_timestep_callback=now, **settings))
    assert [getattr(checked, name) for name in names] == [weight] * 3
    assert caplog.text == ""


@pytest.mark.parametrize("prefix", ["", "_"])
def test_the_inputs_with_both_halves_go_by_either_name(prefix: str) -> None:
    name = "unconditional_conditional_input_kwargs_identifiers"
    settings: dict[str, Any] = {prefix + name: ["x", "context"]}
    checked = validated(FasterCacheConfig(current_timestep_callback=now, **settings))
    assert isinstance(checked, FasterCacheConfig)
    assert checked.unconditional_conditional_input_kwargs_identifiers == ("x", "context")
    renamed = dataclasses.replace(checked, unconditional_conditional_input_kwargs_identifiers=["y"])
    assert getattr(validated(renamed), name) == ("y",)


# diffusers' objects ---------------------------------------------------------------------------------------------------


def test_diffusers_objects_are_accepted() -> None:
    theirs = diffusers.PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=3,
        cross_attention_timestep_skip_range=(0, 900),
        current_timestep_callback=now,
    )
    before = copy.copy(theirs)
    checked = validated(theirs)
    assert theirs == before
    assert checked == PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=3,
        cross_attention_timestep_skip_range=(0, 900),
        current_timestep_callback=now,
    )
    # The library's own identifiers, of which "blocks" is one, do not make this a spatial attention.
    assert method_of(checked).kind_of("blocks.0.attn1", "temporal") is None


def test_diffusers_identifiers_hold_where_they_were_chosen() -> None:
    checked = validated(
        diffusers.PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=3,
            spatial_attention_block_identifiers=["blocks.0"],
            current_timestep_callback=now,
        )
    )
    assert isinstance(checked, PyramidAttentionBroadcastConfig)
    assert checked.spatial_attention_block_identifiers == ("blocks.0",)
    assert checked.temporal_attention_block_identifiers is None


def test_diffusers_faster_cache_is_accepted() -> None:
    theirs = diffusers.FasterCacheConfig(
        tensor_format="BCHW",
        attention_weight_callback=lambda module: 0.3,
        current_timestep_callback=now,
        _unconditional_conditional_input_kwargs_identifiers=["x"],
    )
    before = copy.copy(theirs)
    checked = validated(theirs)
    assert theirs == before
    assert isinstance(checked, FasterCacheConfig)
    assert checked.tensor_format == "BCHW"
    assert checked.unconditional_conditional_input_kwargs_identifiers == ("x",)
    assert checked.spatial_attention_block_identifiers is None
    assert not checked.follow_diffusers
    assert checked.low_frequency_weight_callback is not None


def test_subclasses_of_diffusers_objects_are_accepted() -> None:
    class Mine(diffusers.PyramidAttentionBroadcastConfig):  # type: ignore[misc]
        pass

    assert isinstance(validated(Mine(2, current_timestep_callback=now)), PyramidAttentionBroadcastConfig)


def test_a_setting_that_only_diffusers_knows_is_refused_unless_it_is_at_its_default(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    @dataclasses.dataclass
    class Newer(diffusers.PyramidAttentionBroadcastConfig):  # type: ignore[misc]
        mlp_skip_range: int | None = None

    monkeypatch.setattr(sys.modules["diffusers.hooks"], "PyramidAttentionBroadcastConfig", Newer)
    assert isinstance(validated(Newer(2, current_timestep_callback=now)), PyramidAttentionBroadcastConfig)
    with pytest.raises(OptionError, match="'mlp_skip_range' that attnrewrite does not know; leave it at its default"):
        validated(Newer(2, current_timestep_callback=now, mlp_skip_range=3))


# What is refused ------------------------------------------------------------------------------------------------------

BOTH_NAMES = {
    "unconditional_conditional_input_kwargs_identifiers": ["x"],
    "_unconditional_conditional_input_kwargs_identifiers": ["x"],
}


@pytest.mark.parametrize(
    ("settings", "pieces"),
    [
        ({"current_timestep_callback": None}, ["current_timestep_callback", "lambda: pipe.current_timestep", "None"]),
        ({"current_timestep_callback": 500}, ["current_timestep_callback", "must be a function", "500"]),
        ({"current_timestep_callback": lambda timestep: timestep}, ["current_timestep_callback", "without arguments"]),
        ({"spatial_attention_block_skip_range": 0}, ["spatial_attention_block_skip_range", "at least 1", "got 0"]),
        ({"spatial_attention_block_skip_range": True}, ["whole number", "None (computed in every call)", "got True"]),
        ({"temporal_attention_block_skip_range": 2.0}, ["temporal_attention_block_skip_range", "got 2.0"]),
        ({"spatial_attention_timestep_skip_range": (800, 100)}, ["the lower one first", "(800, 100)"]),
        ({"spatial_attention_timestep_skip_range": (100,)}, ["two timesteps", "(100,)"]),
        ({"spatial_attention_timestep_skip_range": (100, "800")}, ["two timesteps", "'800'"]),
        ({"spatial_attention_timestep_skip_range": (100, float("nan"))}, ["two timesteps", "nan"]),
        ({"temporal_attention_timestep_skip_range": None}, ["set its block_skip_range to None", "got None"]),
        ({"spatial_attention_block_identifiers": []}, ["list of regular expressions", "None (determined", "got []"]),
        ({"spatial_attention_block_identifiers": "blocks"}, ["list of regular expressions", "got 'blocks'"]),
        ({"spatial_attention_block_identifiers": ["blocks", ""]}, ["list of regular expressions", "''"]),
        ({"spatial_attention_block_identifiers": ["blocks("]}, ["'blocks(' is not a regular expression", "position 6"]),
        ({"memory_limit": 0}, ["memory_limit", "number of bytes", "got 0"]),
        ({"memory_limit": "2GB"}, ["memory_limit", "number of bytes", "'2GB'"]),
        ({"memory_limit": True}, ["memory_limit", "number of bytes", "True"]),
        ({"offload": 1}, ["offload", "True or False", "got 1"]),
    ],
    ids=lambda value: None,
)
@pytest.mark.parametrize("own", CLASSES)
def test_wrong_settings_say_what_to_do(own: type[Config], settings: dict[str, Any], pieces: list[str]) -> None:
    refused(own(**{"current_timestep_callback": now, **settings}), [own.__name__, *pieces])


@pytest.mark.parametrize(
    ("settings", "pieces"),
    [
        ({"unconditional_batch_skip_range": None}, ["unconditional_batch_skip_range", "at least 1", "got None"]),
        ({"unconditional_batch_timestep_skip_range": (5, 1)}, ["unconditional_batch_timestep_skip_range", "(5, 1)"]),
        ({"low_frequency_weight_update_timestep_range": 5}, ["low_frequency_weight_update_timestep_range", "got 5"]),
        ({"tensor_format": "BSC"}, ["tensor_format", "BCFHW, BFCHW, BCHW", "'BSC'"]),
        ({"tensor_format": ["BCHW"]}, ["tensor_format", "['BCHW']"]),
        ({"attention_weight_callback": 0.3}, ["attention_weight_callback", "function from a module", "0.3"]),
        ({"low_frequency_weight_callback": 1.1}, ["low_frequency_weight_callback", "function from a module", "1.1"]),
        ({"alpha_low_frequency": "1.1"}, ["alpha_low_frequency", "finite number", "'1.1'"]),
        ({"alpha_high_frequency": float("inf")}, ["alpha_high_frequency", "finite number", "inf"]),
        ({"is_guidance_distilled": None}, ["is_guidance_distilled", "True or False", "None"]),
        ({"follow_diffusers": 1}, ["follow_diffusers", "True or False", "got 1"]),
        ({"unconditional_conditional_input_kwargs_identifiers": "x"}, ["keyword arguments", "got 'x'"]),
        ({"_unconditional_conditional_input_kwargs_identifiers": []}, ["keyword arguments", "got []"]),
        (BOTH_NAMES, ["both unconditional_conditional", "give one of them"]),
        (
            {"is_guidance_distilled": True, "spatial_attention_block_skip_range": None},
            ["nothing to do", "set spatial_ or temporal_attention_block_skip_range"],
        ),
    ],
    ids=lambda value: None,
)
def test_wrong_settings_of_faster_cache_say_what_to_do(settings: dict[str, Any], pieces: list[str]) -> None:
    refused(FasterCacheConfig(**{"current_timestep_callback": now, **settings}), pieces)


def test_wrong_settings_in_diffusers_objects_say_what_to_do() -> None:
    config = diffusers.PyramidAttentionBroadcastConfig(2, current_timestep_callback=None)
    refused(config, ["current_timestep_callback", "lambda: pipe.current_timestep"])


def test_anything_else_is_refused() -> None:
    accepted = ["PyramidAttentionBroadcastConfig(...)", "FasterCacheConfig(...)", "attnrewrite's or diffusers'"]
    refused("pab", [*accepted, "'pab'"])
    refused(None, [*accepted, "None"])
    refused(
        PyramidAttentionBroadcastConfig,
        [*accepted, "the class attnrewrite.options.cache_config.Pyramid", "not an object"],
    )
    refused(diffusers.FirstBlockCacheConfig(), [*accepted, "FirstBlockCacheConfig", "First-Block Cache, MagCache"])
    refused(diffusers.TaylorSeerCacheConfig(), [*accepted, "TaylorSeerCacheConfig", "TaylorSeer are not supported"])


def refused(config: object, pieces: list[str]) -> None:
    with pytest.raises(OptionError) as error:
        validated(config)
    message = str(error.value)
    assert "\n" not in message
    assert [piece for piece in pieces if piece not in message] == [], message
