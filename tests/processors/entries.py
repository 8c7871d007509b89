"""Every processor that the table names, in the order of its structures' rules."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from tests.processors.case import DATA_SIZES, Processor, Use
from tests.processors.hosts import (
    BATCH,
    CONTEXT,
    FEATURES,
    HEADS,
    LENGTH,
    TEXT,
    WIDTH,
    additive,
    attention,
    complex_rotation,
    flux,
    fused,
    image,
    low_rank,
    mochi,
    rotation,
    sana_multiscale,
    sequence,
    without_init,
)
from tests.support.zoo import noise, padded

__all__ = ["PROCESSORS"]

Inputs = Callable[[int], dict[str, Any]]


def _self(batch: int = BATCH, length: int = LENGTH, **more: Callable[[int], Any]) -> Inputs:
    """One sequence; ``more`` makes further arguments from the seed."""
    return lambda seed: {
        "hidden_states": sequence(seed, batch=batch, length=length),
        **{name: make(seed) for name, make in more.items()},
    }


def _context(seed: int) -> Any:
    return sequence(seed + 100, length=TEXT, width=CONTEXT)


def _text(seed: int) -> Any:
    return sequence(seed + 100, length=TEXT)


def _cross(**more: Any) -> Inputs:
    return _self(encoder_hidden_states=_context, **more)


def _image(batch: int = BATCH, **more: Callable[[int], Any]) -> Inputs:
    return lambda seed: {
        "hidden_states": image(seed, batch=batch),
        **{name: make(seed) for name, make in more.items()},
    }


def _mask(keys: int, batch: int = BATCH) -> Callable[[int], Any]:
    return lambda seed: additive(seed + 200, keys, batch)


def _plain(name: str, *, change: Callable[[Callable[[], nn.Module]], Callable[[], nn.Module]] | None = None) -> Any:
    """Self and cross attention, masks, an image with group norm and residual: what every plain processor takes."""

    def built(**own: Any) -> Callable[[], nn.Module]:
        build = attention(name, **own)
        return change(build) if change else build

    normed: dict[str, Any] = {
        "norm_num_groups": 8,
        "residual_connection": True,
        "rescale_output_factor": 1.5,
        "bias": True,
    }
    return (
        Use("self", 1, built(), _self()),
        Use("self, mask", 1, built(), _self(attention_mask=_mask(LENGTH))),
        Use("cross, mask", 1, built(cross_attention_dim=CONTEXT), _cross(attention_mask=_mask(TEXT))),
        Use("image, group norm", 1, built(**normed), _image()),
    )


def _one_key(name: str) -> Use:
    inputs = _self(encoder_hidden_states=lambda seed: noise(BATCH, 1, CONTEXT, seed=seed + 100))
    allowed = {"softmax": 0, "scaled_dot_product_attention": 0}
    return Use("one key", 1, attention(name, cross_attention_dim=CONTEXT), inputs, allowed)


_PLAIN = (
    Processor(
        "AttnProcessor",
        "plain",
        (
            *_plain("AttnProcessor"),
            Use("upcast", 1, attention("AttnProcessor", upcast_attention=True, upcast_softmax=True), _self()),
            _one_key("AttnProcessor"),
        ),
    ),
    Processor(
        "AttnProcessor2_0",
        "plain",
        (
            *_plain("AttnProcessor2_0"),
            Use("rms norm", 1, attention("AttnProcessor2_0", qk_norm="rms_norm"), _self()),
            _one_key("AttnProcessor2_0"),
        ),
    ),
)

ADDED: dict[str, Any] = {"added_kv_proj_dim": CONTEXT, "norm_num_groups": 8, "bias": True}


def _added(name: str, settings: dict[str, Any] | None = None, allowed: Mapping[str, int] | None = None) -> Any:
    """Text before the image's own keys, text alone; a mask is padded with zeros for the image by the processor."""
    with_norm: dict[str, Any] = {**ADDED, "cross_attention_norm": "group_norm", "cross_attention_norm_num_groups": 4}
    return tuple(
        Use(use, 1, attention(name, settings, **own), inputs, allowed or {})
        for use, own, inputs in (
            ("text and image", ADDED, _image(encoder_hidden_states=_context)),
            ("mask", ADDED, _image(encoder_hidden_states=_context, attention_mask=_mask(TEXT))),
            ("text alone", {**ADDED, "only_cross_attention": True}, _image(encoder_hidden_states=_context)),
            (
                "3-D",
                with_norm,
                lambda seed: {
                    "hidden_states": noise(BATCH, WIDTH, LENGTH, seed=seed),
                    "encoder_hidden_states": _context(seed),
                },
            ),
        )
    )


_SLICED = (
    Processor(
        "SlicedAttnProcessor",
        "sliced",
        (
            *(
                Use(
                    f"slices of {size}",
                    1,
                    attention("SlicedAttnProcessor", {"slice_size": size}),
                    _self(),
                    {"slice_scatter": 0, "scaled_dot_product_attention": 1},
                )
                # Of 8 rows: one by one, in halves, a last slice that is shorter, all at once.
                for size in (1, 4, 3, 8)
            ),
            Use(
                "cross, mask",
                1,
                attention("SlicedAttnProcessor", {"slice_size": 4}, cross_attention_dim=CONTEXT),
                _cross(attention_mask=_mask(TEXT)),
                {"slice_scatter": 0, "scaled_dot_product_attention": 1},
            ),
        ),
        {"slice_size": 4},
    ),
    Processor(
        "SlicedAttnAddedKVProcessor",
        "sliced",
        _added(
            "SlicedAttnAddedKVProcessor", {"slice_size": 4}, {"slice_scatter": 0, "scaled_dot_product_attention": 1}
        ),
        {"slice_size": 4},
    ),
)


def _frames(name: str) -> Any:
    allowed = {"index": 0}
    return (
        Use("3 frames of 2", 1, attention(name), _self(batch=6), allowed),
        Use("8 frames of 1", 1, attention(name, {"batch_size": 1}), _self(batch=8), allowed),
        Use("mask", 1, attention(name), _self(batch=6, attention_mask=_mask(LENGTH, 6)), allowed),
        Use("cross", 1, attention(name, cross_attention_dim=CONTEXT), _cross()),
    )


_CROSS_FRAME = tuple(
    Processor(name, "cross-frame", _frames(name)) for name in ("CrossFrameAttnProcessor", "CrossFrameAttnProcessor2_0")
)


def _identity(name: str, parts: int) -> Any:
    # One product each for query, key, value and output.
    allowed = {"linear": 4}
    batch = 2 * parts
    normed: dict[str, Any] = {"norm_num_groups": 8, "residual_connection": True, "rescale_output_factor": 1.5}
    masked = _self(batch, attention_mask=_mask(LENGTH, batch // parts * (parts - 1)))
    return (
        Use("self", 1, attention(name), _self(batch), allowed),
        Use("mask", 1, attention(name), masked, allowed),
        Use("image, group norm", 1, attention(name, **normed), _image(batch), allowed),
    )


def _rotated_identity(name: str, parts: int) -> Any:
    build = attention(name, qk_norm="layer_norm")
    return (Use("rotated", 1, build, _self(2 * parts, image_rotary_emb=lambda _: rotation()), {"linear": 4}),)


def _linear_identity(name: str, parts: int) -> Any:
    return (Use("self", 1, attention(name), _self(2 * parts), {"linear": 4}),)


JOINT: dict[str, Any] = {"added_kv_proj_dim": WIDTH, "context_pre_only": False, "bias": True}


def _joint_identity(name: str, parts: int) -> Any:
    def inputs(seed: int) -> dict[str, Any]:
        batch = 2 * parts
        return {
            "hidden_states": sequence(seed, batch=batch),
            "encoder_hidden_states": sequence(seed + 100, batch=batch, length=TEXT),
        }

    # Two attentions, of which the second needs neither zeros for its mask nor the mask.
    return (Use("joint", 2, attention(name, **JOINT), inputs, {"zeros": 0}),)


_PERTURBED = tuple(
    Processor(name, "perturbed", uses(name, parts))
    for name, parts, uses in (
        ("PAGIdentitySelfAttnProcessor2_0", 2, _identity),
        ("PAGCFGIdentitySelfAttnProcessor2_0", 3, _identity),
        ("PAGHunyuanAttnProcessor2_0", 2, _rotated_identity),
        ("PAGCFGHunyuanAttnProcessor2_0", 3, _rotated_identity),
        ("PAGIdentitySanaLinearAttnProcessor2_0", 2, _linear_identity),
        ("PAGCFGSanaLinearAttnProcessor2_0", 3, _linear_identity),
        ("PAGJointAttnProcessor2_0", 2, _joint_identity),
        ("PAGCFGJointAttnProcessor2_0", 3, _joint_identity),
    )
)


def _custom(name: str) -> Any:
    settings: dict[str, Any] = {"hidden_size": WIDTH, "cross_attention_dim": CONTEXT}
    own: dict[str, Any] = {"hidden_size": WIDTH, "train_q_out": False}
    masked = _self(encoder_hidden_states=lambda seed: sequence(seed + 100, width=CONTEXT), attention_mask=_mask(LENGTH))
    return (
        Use("cross", 1, attention(name, settings, cross_attention_dim=CONTEXT), _cross()),
        Use("cross, mask", 1, attention(name, settings, cross_attention_dim=CONTEXT), masked),
        Use("self", 1, attention(name, own), _self()),
    )


def _joint(name: str, *, change: Callable[[Any], Any] = lambda build: build) -> Any:
    return (
        Use("joint", 1, change(attention(name, **JOINT)), _self(encoder_hidden_states=_text)),
        Use("rms norm", 1, change(attention(name, qk_norm="rms_norm", **JOINT)), _self(encoder_hidden_states=_text)),
        Use(
            "last block",
            1,
            change(attention(name, **{**JOINT, "context_pre_only": True})),
            _self(encoder_hidden_states=_text),
        ),
    )


def _aura(name: str, *, change: Callable[[Any], Any] = lambda build: build) -> Any:
    own: dict[str, Any] = {"qk_norm": "fp32_layer_norm", "out_dim": WIDTH, "out_bias": False}
    both: dict[str, Any] = {"added_kv_proj_dim": WIDTH, "added_proj_bias": False, "context_pre_only": False}
    return (
        Use("joint", 1, change(attention(name, **own, **both)), _self(encoder_hidden_states=_text)),
        Use("single", 1, change(attention(name, **own)), _self()),
    )


def _cog(name: str, *, change: Callable[[Any], Any] = lambda build: build) -> Any:
    build = change(attention(name, qk_norm="layer_norm", bias=True))
    return (
        Use("joint", 1, build, _self(encoder_hidden_states=_text)),
        Use("rotated", 1, build, _self(encoder_hidden_states=_text, image_rotary_emb=lambda _: rotation())),
    )


def _flux_joint(seed: int) -> dict[str, Any]:
    return {
        "hidden_states": sequence(seed),
        "encoder_hidden_states": _context(seed),
        "image_rotary_emb": rotation(TEXT + LENGTH),
    }


FLUX_SINGLE = _self(image_rotary_emb=lambda _: rotation())

_JOINT = (
    Processor("AttnAddedKVProcessor", "joint", _added("AttnAddedKVProcessor")),
    Processor("AttnAddedKVProcessor2_0", "joint", _added("AttnAddedKVProcessor2_0")),
    Processor("CustomDiffusionAttnProcessor", "joint", _custom("CustomDiffusionAttnProcessor"), {"hidden_size": WIDTH}),
    # It does not bring a mask into the call's four dimensions, so that none fits a batch of two.
    Processor(
        "CustomDiffusionAttnProcessor2_0",
        "joint",
        tuple(use for use in _custom("CustomDiffusionAttnProcessor2_0") if "mask" not in use.name),
        {"hidden_size": WIDTH},
    ),
    Processor("JointAttnProcessor2_0", "joint", _joint("JointAttnProcessor2_0")),
    Processor("FusedJointAttnProcessor2_0", "joint", _joint("FusedJointAttnProcessor2_0", change=fused)),
    Processor("AuraFlowAttnProcessor2_0", "joint", _aura("AuraFlowAttnProcessor2_0")),
    Processor("FusedAuraFlowAttnProcessor2_0", "joint", _aura("FusedAuraFlowAttnProcessor2_0", change=fused)),
    Processor("CogVideoXAttnProcessor2_0", "joint", _cog("CogVideoXAttnProcessor2_0")),
    Processor("FusedCogVideoXAttnProcessor2_0", "joint", _cog("FusedCogVideoXAttnProcessor2_0", change=fused)),
    Processor("FluxAttnProcessor2_0", "joint", (Use("joint", 1, flux("FluxAttnProcessor2_0"), _flux_joint),)),
    Processor(
        "FusedFluxAttnProcessor2_0",
        "joint",
        (
            Use("joint", 1, fused(flux("FusedFluxAttnProcessor2_0")), _flux_joint),
            Use("single", 1, fused(flux("FusedFluxAttnProcessor2_0", joint=False)), FLUX_SINGLE),
        ),
    ),
    Processor(
        "FluxSingleAttnProcessor2_0",
        "joint",
        (Use("single", 1, flux("FluxSingleAttnProcessor2_0", joint=False), FLUX_SINGLE),),
    ),
    Processor(
        "FusedAttnProcessor2_0",
        "joint",
        _plain("FusedAttnProcessor2_0", change=fused),
    ),
)


def _ip_states(seed: int) -> Any:
    """Text, and the features of one image of 4 tokens and two of 5."""
    return (
        _context(seed),
        [noise(BATCH, 1, 4, CONTEXT, seed=seed + 300), noise(BATCH, 2, 5, CONTEXT, seed=seed + 301)],
    )


def _regions(seed: int) -> list[Any]:
    """A mask for each image of each adapter, of the image's shape."""
    return [(noise(1, images, 6, 8, seed=seed + 400 + images) > 0).float() for images in (1, 2)]


def _adapted(name: str) -> Any:
    settings: dict[str, Any] = {"hidden_size": WIDTH, "cross_attention_dim": CONTEXT, "num_tokens": (4, 5)}
    own: dict[str, Any] = {"cross_attention_dim": CONTEXT}
    one = _self(encoder_hidden_states=lambda seed: (_ip_states(seed)[0], _ip_states(seed)[1][:1]))
    both = _self(encoder_hidden_states=_ip_states)
    regional = _self(encoder_hidden_states=_ip_states, ip_adapter_masks=_regions)
    masked = _self(encoder_hidden_states=_ip_states, attention_mask=_mask(TEXT))
    return (
        Use("one adapter", 2, attention(name, {**settings, "num_tokens": (4,), "scale": 0.6}, **own), one),
        Use("two adapters", 3, attention(name, {**settings, "scale": [0.6, 0.3]}, **own), both),
        Use("one switched off", 2, attention(name, {**settings, "scale": [0.6, 0.0]}, **own), both),
        Use("text mask", 3, attention(name, {**settings, "scale": [0.6, 0.3]}, **own), masked),
        # One attention for each image: 1 and 2 of them.
        Use("regions", 4, attention(name, {**settings, "scale": [[0.6], [0.3, 0.9]]}, **own), regional),
    )


_SD3_IP: dict[str, Any] = {
    "hidden_size": WIDTH,
    "ip_hidden_states_dim": CONTEXT,
    "head_dim": FEATURES,
    "timesteps_emb_dim": 16,
}

_IP_ADAPTER = (
    Processor(
        "IPAdapterAttnProcessor",
        "ip-adapter",
        _adapted("IPAdapterAttnProcessor"),
        {"hidden_size": WIDTH, "cross_attention_dim": CONTEXT},
    ),
    Processor(
        "IPAdapterAttnProcessor2_0",
        "ip-adapter",
        _adapted("IPAdapterAttnProcessor2_0"),
        {"hidden_size": WIDTH, "cross_attention_dim": CONTEXT},
    ),
    Processor(
        "SD3IPAdapterJointAttnProcessor2_0",
        "ip-adapter",
        (
            Use(
                "joint",
                2,
                attention("SD3IPAdapterJointAttnProcessor2_0", _SD3_IP, **JOINT),
                _self(
                    encoder_hidden_states=_text,
                    ip_hidden_states=lambda seed: noise(BATCH, 5, CONTEXT, seed=seed + 300),
                    temb=lambda seed: noise(BATCH, 16, seed=seed + 301),
                ),
            ),
        ),
        _SD3_IP,
    ),
    Processor(
        "FluxIPAdapterJointAttnProcessor2_0",
        "ip-adapter",
        (
            Use(
                "two adapters",
                3,
                flux(
                    "FluxIPAdapterJointAttnProcessor2_0",
                    {"hidden_size": WIDTH, "cross_attention_dim": CONTEXT, "num_tokens": (4, 5), "scale": [0.6, 0.3]},
                ),
                lambda seed: {
                    **_flux_joint(seed),
                    "ip_hidden_states": [noise(BATCH, size, CONTEXT, seed=seed + 300 + size) for size in (4, 5)],
                },
            ),
        ),
        {"hidden_size": WIDTH, "cross_attention_dim": CONTEXT},
    ),
)


def _allegro(seed: int) -> Any:
    """Tables of cosine and sine for time, height and width, and the position of every token in each."""
    tables = [rotation(4, 4, interleaved=False) for _ in range(3)]
    generator = torch.Generator().manual_seed(seed)
    return tables, [torch.randint(4, (BATCH, LENGTH), generator=generator) for _ in range(3)]


def _hunyuan(name: str, *, change: Callable[[Any], Any] = lambda build: build) -> Any:
    def built(**own: Any) -> Any:
        return change(attention(name, qk_norm="layer_norm", bias=True, **own))

    rotated: dict[str, Any] = {"image_rotary_emb": lambda _: rotation()}
    return (
        Use("self", 1, built(), _self(**rotated)),
        Use("self, mask", 1, built(), _self(attention_mask=_mask(LENGTH), **rotated)),
        Use("cross", 1, built(cross_attention_dim=CONTEXT), _cross(**rotated)),
    )


def _lumina(**more: Any) -> Inputs:
    def inputs(seed: int) -> dict[str, Any]:
        hidden = sequence(seed)
        rotated: dict[str, Any] = {"query_rotary_emb": complex_rotation(), "key_rotary_emb": complex_rotation()}
        return {
            "hidden_states": hidden,
            "encoder_hidden_states": hidden,
            "attention_mask": padded(BATCH, LENGTH),
            **rotated,
            **more,
        }

    return inputs


def _lumina_cross(seed: int) -> dict[str, Any]:
    return {
        "hidden_states": sequence(seed),
        "encoder_hidden_states": _context(seed),
        "attention_mask": padded(BATCH, TEXT),
        "query_rotary_emb": complex_rotation(),
    }


GROUPED: dict[str, Any] = {"kv_heads": 2, "qk_norm": "layer_norm_across_heads"}


def _stable_audio(key_heads: int, **more: Any) -> Callable[[], nn.Module]:
    return attention("StableAudioAttnProcessor2_0", kv_heads=key_heads, **more)


# Half of the features are rotated.
PARTLY: dict[str, Any] = {"rotary_emb": lambda _: rotation(LENGTH, FEATURES // 2, interleaved=False)}


def _prompts(tokens: tuple[int, int]) -> Inputs:
    """For each of the batch: how many of the text's tokens it has."""

    def inputs(seed: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(seed)
        angles = torch.rand(LENGTH, HEADS, FEATURES // 2, generator=generator)
        return {
            "hidden_states": sequence(seed),
            "encoder_hidden_states": _context(seed),
            "attention_mask": torch.arange(TEXT) < torch.tensor(tokens)[:, None],
            "image_rotary_emb": (angles.cos(), angles.sin()),
        }

    return inputs


_CAUSAL: dict[str, Any] = {"qk_norm": "l2", "is_causal": True, "residual_connection": True}

_ROTATED = (
    Processor(
        "AllegroAttnProcessor2_0",
        "rotated",
        (
            Use(
                "self",
                1,
                attention("AllegroAttnProcessor2_0", dim_head=12, bias=True),
                _self(image_rotary_emb=_allegro),
            ),
            Use(
                "cross, mask",
                1,
                attention("AllegroAttnProcessor2_0", dim_head=12, cross_attention_dim=CONTEXT),
                _cross(attention_mask=_mask(TEXT)),
            ),
        ),
    ),
    Processor("HunyuanAttnProcessor2_0", "rotated", _hunyuan("HunyuanAttnProcessor2_0")),
    Processor("FusedHunyuanAttnProcessor2_0", "rotated", _hunyuan("FusedHunyuanAttnProcessor2_0", change=fused)),
    Processor(
        "LuminaAttnProcessor2_0",
        "rotated",
        (
            Use("self, grouped", 1, attention("LuminaAttnProcessor2_0", **GROUPED), _lumina(), {"repeat": 0}),
            Use(
                "proportional",
                1,
                attention("LuminaAttnProcessor2_0", **GROUPED),
                _lumina(base_sequence_length=6),
                {"repeat": 0},
            ),
            Use(
                "cross, grouped",
                1,
                attention("LuminaAttnProcessor2_0", cross_attention_dim=CONTEXT, **GROUPED),
                _lumina_cross,
                {"repeat": 0},
            ),
        ),
    ),
    Processor(
        "StableAudioAttnProcessor2_0",
        "rotated",
        (
            Use("self", 1, attention("StableAudioAttnProcessor2_0"), _self(**PARTLY)),
            Use("grouped", 1, _stable_audio(2), _self(**PARTLY), {"repeat_interleave": 0}),
            Use("one key head", 1, _stable_audio(1), _self(**PARTLY), {"repeat_interleave": 0}),
            # The one that is left is that of the mask, which has one head.
            Use(
                "cross, grouped, mask",
                1,
                _stable_audio(2, cross_attention_dim=CONTEXT),
                _cross(attention_mask=_mask(TEXT), **PARTLY),
                {"repeat_interleave": 1},
            ),
        ),
    ),
    Processor(
        "MochiAttnProcessor2_0",
        "rotated",
        (
            # A loop over the batch, since every prompt has its own length.
            Use("ragged text", 2, mochi("MochiAttnProcessor2_0"), _prompts((7, 4)), dynamo=DATA_SIZES),
            Use(
                "whole text",
                2,
                mochi("MochiAttnProcessor2_0", context_pre_only=True),
                _prompts((7, 7)),
                dynamo=DATA_SIZES,
            ),
        ),
    ),
    Processor(
        "MochiVaeAttnProcessor2_0",
        "rotated",
        (
            Use("causal", 1, attention("MochiVaeAttnProcessor2_0", **_CAUSAL), _self()),
            Use("single frame", 0, attention("MochiVaeAttnProcessor2_0", **_CAUSAL), _self(length=1)),
        ),
    ),
)


def _lora(name: str, original: str, sites: tuple[Use, ...]) -> Processor:
    return Processor(
        name,
        "adapted",
        sites,
        instead=f"`{original}` with peft's LoRA layers around its projections",
    )


def _low_rank_plain(original: str) -> Any:
    return (
        Use("self", 1, low_rank(attention(original)), _self()),
        Use(
            "cross, mask",
            1,
            low_rank(attention(original, cross_attention_dim=CONTEXT)),
            _cross(attention_mask=_mask(TEXT)),
        ),
    )


_LORA = (
    _lora("LoRAAttnProcessor", "AttnProcessor", _low_rank_plain("AttnProcessor")),
    _lora("LoRAAttnProcessor2_0", "AttnProcessor2_0", _low_rank_plain("AttnProcessor2_0")),
    _lora(
        "LoRAAttnAddedKVProcessor",
        "AttnAddedKVProcessor",
        (
            Use(
                "text and image",
                1,
                low_rank(attention("AttnAddedKVProcessor", **ADDED)),
                _image(encoder_hidden_states=_context),
            ),
        ),
    ),
    _lora("LoRAXFormersAttnProcessor", "AttnProcessor", _low_rank_plain("AttnProcessor")),
)

_LINEAR = (
    Processor(
        "SanaLinearAttnProcessor2_0",
        "linear",
        (
            Use("long", 1, attention("SanaLinearAttnProcessor2_0"), _self()),
            # Fewer tokens than features in a head: the other order of the products is the cheaper one.
            Use("short", 1, attention("SanaLinearAttnProcessor2_0"), _self(length=3)),
            Use(
                "rms norm",
                1,
                attention("SanaLinearAttnProcessor2_0", qk_norm="rms_norm_across_heads", kv_heads=HEADS),
                _self(),
            ),
        ),
    ),
    Processor(
        "SanaMultiscaleAttnProcessor2_0",
        "linear",
        (
            Use("linear", 1, sana_multiscale("SanaMultiscaleAttnProcessor2_0", norm_type="rms_norm"), _image()),
            Use(
                "quadratic",
                1,
                sana_multiscale("SanaMultiscaleAttnProcessor2_0", residual_connection=True),
                lambda seed: {"hidden_states": image(seed, 2, 3)},
            ),
        ),
    ),
)

_TESTS = "[tests/patterns/test_library_calls.py](../tests/patterns/test_library_calls.py)"
_XFORMERS: Mapping[str, Any] = {
    "needs": "xformers: the processor calls `xformers.ops.memory_efficient_attention`",
    "proved": "the operators that this call comes down to in a graph, `xformer::memory_efficient_attention_forward` "
    "and `xformers_flash::flash_fwd`, are read by their schemas in xformers 0.0.35, and rewritten to the right values "
    f"(`test_xformers` and `test_xformers_flash` of {_TESTS})",
}
_NPU = (
    "the operator `npu::npu_fusion_attention` is read by its schema in torch-npu 2.13.0, in each of its layouts, and "
    f"rewritten to the right values (`test_npu` of {_TESTS})"
)
_XLA = (
    "the operator that this call comes down to in a graph, `xla::fa_custom_forward`, is read by its schema in "
    f"torch-xla 2.9.0, and rewritten to the right values (`test_xla` of {_TESTS})"
)

_DEVICE = (
    Processor("XFormersAttnProcessor", "device", _plain("XFormersAttnProcessor"), **_XFORMERS),
    Processor("XFormersAttnAddedKVProcessor", "device", _added("XFormersAttnAddedKVProcessor"), **_XFORMERS),
    Processor("XFormersJointAttnProcessor", "device", _joint("XFormersJointAttnProcessor"), **_XFORMERS),
    Processor(
        "CustomDiffusionXFormersAttnProcessor",
        "device",
        _custom("CustomDiffusionXFormersAttnProcessor"),
        {"hidden_size": WIDTH},
        **_XFORMERS,
    ),
    Processor(
        "IPAdapterXFormersAttnProcessor",
        "device",
        _adapted("IPAdapterXFormersAttnProcessor"),
        {"hidden_size": WIDTH, "cross_attention_dim": CONTEXT},
        **_XFORMERS,
    ),
    Processor(
        "AttnProcessorNPU",
        "device",
        (Use("float32, self, mask", 1, without_init("AttnProcessorNPU"), _self(attention_mask=_mask(LENGTH))),),
        needs="torch_npu: in half precision the processor calls `torch_npu.npu_fusion_attention`",
        instead="its `__call__` in float32, where it is `scaled_dot_product_attention`, made without `__init__`",
        proved=_NPU,
    ),
    Processor(
        "XLAFlashAttnProcessor2_0",
        "device",
        (
            Use(
                "12 tokens, self, mask",
                1,
                without_init("XLAFlashAttnProcessor2_0"),
                _self(attention_mask=_mask(LENGTH)),
            ),
        ),
        needs="torch_xla: from 4096 tokens on the processor calls `flash_attention` of torch_xla",
        instead="its `__call__` below 4096 tokens, where it is `scaled_dot_product_attention`, made without `__init__`",
        proved=_XLA,
    ),
    Processor(
        "XLAFluxFlashAttnProcessor2_0",
        "device",
        (Use("joint", 1, flux("XLAFluxFlashAttnProcessor2_0"), _flux_joint),),
        needs="torch_xla: it makes a `FluxAttnProcessor` with the attention backend `_native_xla`",
        proved=_XLA,
    ),
    *(
        Processor(
            name,
            "device",
            (Use("joint", 1, (fused if name.startswith("Fused") else lambda build: build)(flux(name)), _flux_joint),),
            needs=f"torch_npu: it makes a `FluxAttnProcessor` with the attention backend `{backend}`",
            proved=_NPU,
        )
        for name, backend in (
            ("FluxAttnProcessor2_0_NPU", "_native_npu"),
            ("FusedFluxAttnProcessor2_0_NPU", "_fused_npu"),
        )
    ),
)

PROCESSORS: Mapping[str, Processor] = {
    processor.name: processor
    for processor in (
        *_PLAIN,
        *_SLICED,
        *_CROSS_FRAME,
        *_PERTURBED,
        *_JOINT,
        *_IP_ADAPTER,
        *_ROTATED,
        *_LORA,
        *_LINEAR,
        *_DEVICE,
    )
}
