"""Cross-step caching of real models against diffusers' own hooks: how far apart, and what was compiled when.

``python -m tests.caching.comparison --json FILE`` has them for all models and methods; the tests assert on the same.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, fx, nn
from torch._dynamo.backends.registry import lookup_backend

import attnrewrite
from tests.coverage.machine import describe
from tests.support.caching_models import MODELS, AttentionCounter, Clock, Model, Streams, denoise, diffusers
from tests.support.helpers import relative_error

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


SEPARATE = ("cogvideox", "wan", "unet")
"""Models whose guidance is tested in two calls, too."""


@dataclass
class Comparison:
    """One run of 30 steps.

    Attributes:
        error: of the worst step's prediction against diffusers' eager hooks, relative to its largest number.
        effect: of the caches on the prediction of the step that they change most.
        changed: the steps that they change by more than 1e-4.
        graphs, compilations: Dynamo's graphs and what the inner compiler was given, and after which step the last one.
        attentions: that were computed, of which ``preparing`` by the call that has the conditional half compiled.
        attentions_expected: that diffusers' eager run computes. ``attentions_uncached``: of a run without caches.
    """

    model: str
    method: str
    guidance: str
    inner: str
    error: float
    effect: float
    changed: int
    graphs: int
    compilations: int
    last_at_step: int
    attentions: int
    preparing: int
    attentions_expected: int
    attentions_uncached: int


def compare(
    name: str,
    method: str,
    inner_name: str = "eager",
    *,
    streams: str | None = None,
    settings: dict[str, Any] | None = None,
) -> Comparison:
    """One model under one method.

    Args:
        method: "pab" or "faster".
        streams: for guidance in two calls, by what the two are told apart: "cache_stream" or "cache_context";
            diffusers' hooks take a copy of the model for each then, or they would mix them. Default None: one call.
        settings: of FasterCache, beside those of the model.
    """
    model, clock = MODELS[name], Clock()
    network = model.build()
    separate = streams is not None
    theirs = ours = pab_config(model, clock)
    if method == "faster":
        theirs, ours = faster_configs(model, clock, **(settings or {}))
    reference: Any = with_hooks(network, theirs)
    if separate:
        reference = {"cond": reference, "uncond": with_hooks(network, theirs)}
    with AttentionCounter() as eager:
        expected = denoise(model, reference, clock, separate=separate)
    inner = Inner(inner_name)
    compiled = compiled_copy(network, inner)
    attnrewrite.enable_cache(compiled, ours)
    history = History(inner)
    named: Streams = compiled.cache_context if streams == "cache_context" else attnrewrite.cache_stream
    predictions = denoise(model, compiled, clock, separate=separate, streams=named, after_step=history)
    attentions = inner.attentions
    with AttentionCounter() as plain:
        uncached = denoise(model, network, clock, separate=separate)
    effects = list(map(relative_error, predictions, uncached))
    counts = list(zip(history.graphs, history.compilations, strict=True))
    halves = method == "faster" and not separate and not ours.is_guidance_distilled
    return Comparison(
        model=name,
        method=method,
        guidance="two calls" if separate else "one call",
        inner=inner_name,
        error=worst(predictions, expected),
        effect=max(effects),
        changed=sum(effect > LIMIT for effect in effects),
        graphs=history.graphs[-1],
        compilations=history.compilations[-1],
        last_at_step=counts.index(counts[-1]) + 1,
        attentions=attentions,
        preparing=inner.sites if halves else 0,
        attentions_expected=eager.count,
        attentions_uncached=plain.count,
    )


def comparisons(inner: str) -> list[Comparison]:
    """All models under both methods, and guidance in two calls where the tests have it."""
    found = []
    for name in MODELS:
        for method, streams in (("pab", None), ("faster", None), ("pab", "cache_stream")):
            if streams is None or name in SEPARATE:
                torch._dynamo.reset()
                torch.manual_seed(0)
                found.append(compare(name, method, inner, streams=streams, settings=OPEN))
                click.echo(f"{name} {method} {streams or ''}: {found[-1].error:.1e}", err=True)
    return found


@click.command()
@click.option("--inner", default="inductor", help="The inner compiler (default: inductor).")
@click.option("--json", "path", type=click.Path(dir_okay=False, path_type=Path), help="Write the raw data here.")
def main(inner: str, path: Path | None) -> None:
    """Compare the caches with diffusers' hooks, on five models."""
    with torch.no_grad():
        rows = [dataclasses.asdict(row) for row in comparisons(inner)]
    table = Table(*rows[0])
    for row in rows:
        table.add_row(*(f"{value:.1e}" if isinstance(value, float) else str(value) for value in row.values()))
    (Console() if sys.stdout.isatty() else Console(width=200)).print(table)
    if path is not None:
        about = describe(Path(__file__).parents[2], "tests.caching.comparison", ())
        path.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
