"""The modules of diffusers that call a processor, small, and what they are called with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tests.processors.state import made, processor_class
from tests.support.zoo import noise

__all__ = [
    "BATCH",
    "CONTEXT",
    "FEATURES",
    "HEADS",
    "LENGTH",
    "TEXT",
    "WIDTH",
    "additive",
    "attention",
    "complex_rotation",
    "flux",
    "fused",
    "host",
    "image",
    "low_rank",
    "mochi",
    "rotation",
    "sana_multiscale",
    "sequence",
    "without_init",
]

# No two of these sizes are equal, so that none is taken for another.
BATCH, HEADS, FEATURES, LENGTH, TEXT, CONTEXT = 2, 4, 8, 12, 7, 24
WIDTH = HEADS * FEATURES


def host(kind: str, **settings: Any) -> Any:
    """A module of ``attention_processor`` by its name."""
    from diffusers.models import attention_processor

    return getattr(attention_processor, kind)(**settings)


def attention(name: str, settings: dict[str, Any] | None = None, **own: Any) -> Callable[[], nn.Module]:
    """An ``Attention`` under processor ``name``, which is made with ``settings``."""

    def build() -> nn.Module:
        sizes = {"query_dim": WIDTH, "heads": HEADS, "dim_head": FEATURES}
        module: nn.Module = host("Attention", **{**sizes, **own}, processor=made(name, **(settings or {})))
        return module

    return build


def fused(build: Callable[[], Any]) -> Callable[[], nn.Module]:
    """The same with its projections fused. Their weights are copied: they are made random after."""

    def build_fused() -> nn.Module:
        module = build()
        module.fuse_projections()
        result: nn.Module = module
        return result

    return build_fused


def low_rank(build: Callable[[], nn.Module], rank: int = 3) -> Callable[[], nn.Module]:
    """The same with peft's adapters of low rank added to every projection."""

    def build_adapted() -> nn.Module:
        from peft import LoraConfig, inject_adapter_in_model

        module = build()
        paths = [path for path, child in module.named_modules() if type(child) is nn.Linear]
        # As made the second matrix is zero, and the adapters do nothing.
        config = LoraConfig(r=rank, lora_alpha=2, target_modules=paths, init_lora_weights=False)
        adapted: nn.Module = inject_adapter_in_model(config, module)
        return adapted

    return build_adapted


def without_init(name: str) -> Callable[[], nn.Module]:
    """An ``Attention`` under a processor whose ``__init__`` asks for a library that its ``__call__`` may do without."""

    def build() -> nn.Module:
        kind = processor_class(name)
        processor = kind.__new__(kind)
        processor.partition_spec = None
        module: Any = attention("AttnProcessor2_0")()
        module.set_processor(processor)
        result: nn.Module = module
        return result

    return build


def mochi(name: str, **own: Any) -> Callable[[], nn.Module]:
    sizes = {"query_dim": WIDTH, "added_kv_proj_dim": CONTEXT, "heads": HEADS, "dim_head": FEATURES}
    return lambda: host("MochiAttention", **{**sizes, **own}, processor=made(name))


def sana_multiscale(name: str, **own: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        module = host("SanaMultiscaleLinearAttention", in_channels=WIDTH, out_channels=WIDTH, **own)
        module.processor = made(name)
        result: nn.Module = module
        return result

    return build


def flux(
    name: str, settings: dict[str, Any] | None = None, *, joint: bool = True, **own: Any
) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        from diffusers.models.transformers.transformer_flux import FluxAttention

        more: dict[str, Any] = (
            {"added_kv_proj_dim": CONTEXT, "context_pre_only": False} if joint else {"pre_only": True}
        )
        processor = made(name, **(settings or {}))
        sizes: dict[str, Any] = {"query_dim": WIDTH, "heads": HEADS, "dim_head": FEATURES, "bias": True}
        module: nn.Module = FluxAttention(**sizes, **more, **own, processor=processor)
        return module

    return build


def sequence(seed: int, *, batch: int = BATCH, length: int = LENGTH, width: int = WIDTH) -> Tensor:
    return noise(batch, length, width, seed=seed)


def image(seed: int, height: int = 3, width: int = 4, channels: int = WIDTH, batch: int = BATCH) -> Tensor:
    return noise(batch, channels, height, width, seed=seed)


def additive(seed: int, keys: int, batch: int = BATCH) -> Tensor:
    """A mask as diffusers' models make it: 0 or -10000, of shape (batch, 1, keys); every row keeps a key."""
    kept = noise(batch, 1, keys, seed=seed) > -0.5
    kept[..., 0] = True
    return torch.where(kept, 0.0, -10000.0)


def rotation(length: int = LENGTH, features: int = FEATURES, *, interleaved: bool = True) -> tuple[Tensor, Tensor]:
    from diffusers.models.embeddings import get_1d_rotary_pos_embed

    cos, sin = get_1d_rotary_pos_embed(features, length, use_real=True, repeat_interleave_real=interleaved)
    return cos, sin


def complex_rotation(length: int = LENGTH) -> Tensor:
    from diffusers.models.embeddings import get_1d_rotary_pos_embed

    result: Tensor = get_1d_rotary_pos_embed(FEATURES, length)
    return result[None]
