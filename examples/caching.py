"""Cross-step caching of CogVideoX-2B's transformer: Pyramid Attention Broadcast and FasterCache.

Random weights and text embeddings, classifier-free guidance in one call, no VAE. The transformer runs eagerly, under
``torch.compile`` and under attnrewrite: without a cache, under diffusers' hooks, and under attnrewrite's. On a GPU:

    python examples/caching.py --device cuda --dtype bfloat16 --json caching.json

A mode takes minutes there; ``--mode`` runs some of them, and adds them to a file that is there. A trial on a CPU:

    python examples/caching.py --layers 2 --heads 2 --frames 2 --size 8x12 --text 8
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import importlib
import json
import logging
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import torch
from compare import circumstances
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.utils.flop_counter import FlopCounterMode

import attnrewrite

diffusers: Any = importlib.import_module("diffusers")

GUIDANCE = 6.0
PAB: dict[str, Any] = {"spatial_attention_block_skip_range": 2, "spatial_attention_timestep_skip_range": (100, 850)}
FASTER: dict[str, Any] = {
    "spatial_attention_block_skip_range": 2,
    "spatial_attention_timestep_skip_range": (-1, 681),
    "unconditional_batch_skip_range": 5,
    "unconditional_batch_timestep_skip_range": (-1, 641),
    "attention_weight_callback": lambda _: 0.3,
    "tensor_format": "BFCHW",
}
METHODS = ("", "pab", "faster")
WAYS = ("eager", "compile", "attnrewrite")
MODES = tuple(f"{method}-{way}".lstrip("-") for method in METHODS for way in WAYS)
PREDICTION = "prediction"
"""Not a way to run the model, but the time of what is skipped, by itself."""


@dataclasses.dataclass(frozen=True)
class Setting:
    """What is run; ``frames``, ``height`` and ``width`` are those of the latents."""

    device: str
    dtype: str
    steps: int
    layers: int
    heads: int
    frames: int
    height: int
    width: int
    text: int
    timesteps: str
    compile_mode: str | None
    recompile_limit: int

    @property
    def on_cuda(self) -> bool:
        return torch.device(self.device).type == "cuda"

    @property
    def kind(self) -> torch.dtype:
        kind: torch.dtype = getattr(torch, self.dtype)
        return kind


@dataclasses.dataclass
class Row:
    """One mode.

    Attributes:
        first_run_s: the first full run, compilation included; None in eager execution, which runs two steps first.
        compile_s: what the first run took longer than the timed ones.
        runs_s: the timed runs; ``run_s`` is their median.
        steps_ms: each call of the transformer in the last timed run.
        step_ms: the median call by what it computes: all of it, with attention reused, the conditional half only.
        peak_mib: allocated at most at one time in the timed runs; ``weights_mib`` is the transformer's part of it.
        graphs: Dynamo's graphs; ``compilations``: graphs that went through AOTAutograd to Inductor.
        compilations_after_first_run: of these, in the timed runs.
        recompile_limit_hits: how often Dynamo gave up a function, which then runs eagerly.
        error: of the final latents against ``against``, the method's eager run: largest difference over largest
            number; ``error_l2``: norm of the difference over norm.
        failed: why there are no times.
    """

    mode: str
    first_run_s: float | None = None
    compile_s: float | None = None
    runs_s: list[float] = dataclasses.field(default_factory=list)
    run_s: float | None = None
    steps_ms: list[float] = dataclasses.field(default_factory=list)
    step_ms: dict[str, float] = dataclasses.field(default_factory=dict)
    weights_mib: float | None = None
    peak_mib: float | None = None
    graphs: int = 0
    compilations: int = 0
    compilations_after_first_run: int = 0
    recompile_limit_hits: int = 0
    against: str | None = None
    error: float | None = None
    error_l2: float | None = None
    failed: str | None = None


class TooLong(Exception):
    """The first run takes more time than it was given."""


class Clock:
    """The timestep that the denoising loop is at, as ``pipe.current_timestep`` would give it."""

    timestep: Any = None

    def __call__(self) -> Any:
        return self.timestep


class Loop:
    """Denoising from fixed noise: CogVideoX-2B's scheduler and guidance, as its pipeline does it."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.clock = Clock()
        generator = torch.Generator().manual_seed(0)
        shape = (1, setting.frames, 16, setting.height, setting.width)
        self.noise = torch.randn(shape, generator=generator).to(setting.device, setting.kind)
        self.text = torch.randn(2, setting.text, 4096, generator=generator).to(setting.device, setting.kind)
        self.scheduler = diffusers.CogVideoXDDIMScheduler(
            clip_sample=False,
            prediction_type="v_prediction",
            rescale_betas_zero_snr=True,
            timestep_spacing="trailing",
        )
        self.scheduler.set_timesteps(setting.steps, device=setting.device)
        self.numbers = [int(timestep) for timestep in self.scheduler.timesteps]

    def inputs(self, latents: Tensor, timestep: Tensor, batch: int = 2) -> dict[str, Any]:
        """The transformer's arguments; a batch of 1 is the conditional half."""
        return {
            "hidden_states": latents.expand(batch, *latents.shape[1:]).contiguous(),
            "encoder_hidden_states": self.text[2 - batch :],
            "timestep": timestep.expand(batch),
            "return_dict": False,
        }

    def run(self, call: Callable[..., Any], steps: int, deadline: float | None = None) -> tuple[Tensor, list[float]]:
        """The latents after ``steps``, and the milliseconds of each call of the transformer.

        Raises:
            TooLong: ``time.perf_counter()`` is past the deadline after a step.
        """
        latents, watch = self.noise, Stopwatch(self.setting.on_cuda)
        for step in range(steps):
            timestep = self.scheduler.timesteps[step]
            self.clock.timestep = timestep if self.setting.timesteps == "tensor" else self.numbers[step]
            with watch.lap():
                prediction = call(**self.inputs(latents, timestep))[0].float()
            unconditional, conditional = prediction.chunk(2)
            guided = unconditional + GUIDANCE * (conditional - unconditional)
            latents = self.scheduler.step(guided, timestep, latents, return_dict=False)[0].to(self.setting.kind)
            if deadline is not None and time.perf_counter() > deadline:
                raise TooLong(f"{step + 1} of {steps} steps of the first run were done when its time was over")
        return latents, watch.laps_ms()


class Stopwatch:
    """Laps by CUDA events, which nothing waits for until they are read, or by the clock."""

    def __init__(self, on_cuda: bool) -> None:
        self._on_cuda = on_cuda
        self._marks: list[tuple[Any, Any]] = []

    def _mark(self) -> Any:
        if not self._on_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    @contextlib.contextmanager
    def lap(self) -> Iterator[None]:
        start = self._mark()
        yield
        self._marks.append((start, self._mark()))

    def laps_ms(self) -> list[float]:
        if not self._on_cuda:
            return [round(1e3 * (end - start), 3) for start, end in self._marks]
        torch.cuda.synchronize()
        return [round(start.elapsed_time(end), 3) for start, end in self._marks]


def transformer(setting: Setting, device: str | None = None) -> nn.Module:
    """THUDM/CogVideoX-2b's transformer/config.json, but for sizes that the setting changes; random weights."""
    torch.manual_seed(0)
    with torch.device(device or setting.device):
        model: nn.Module = diffusers.CogVideoXTransformer3DModel(
            num_attention_heads=setting.heads,
            attention_head_dim=64,
            in_channels=16,
            out_channels=16,
            flip_sin_to_cos=True,
            freq_shift=0,
            time_embed_dim=512,
            text_embed_dim=4096,
            num_layers=setting.layers,
            dropout=0.0,
            attention_bias=True,
            sample_width=setting.width,
            sample_height=setting.height,
            sample_frames=(setting.frames - 1) * 4 + 1,
            patch_size=2,
            temporal_compression_ratio=4,
            max_text_seq_length=setting.text,
            activation_fn="gelu-approximate",
            timestep_activation_fn="silu",
            norm_elementwise_affine=True,
            norm_eps=1e-5,
            spatial_interpolation_scale=1.875,
            temporal_interpolation_scale=1.0,
            use_rotary_positional_embeddings=False,
        )
    return model.to(setting.kind).eval()


def prepared(mode: str, model: nn.Module, clock: Clock, compile_mode: str | None) -> Callable[..., Any]:
    """The model as the mode calls it."""
    method, _, way = mode.rpartition("-")
    backend = "attnrewrite" if way == "attnrewrite" else "inductor"
    if way == "attnrewrite":
        compiled: Any = torch.compile(model, backend=backend, fullgraph=True, mode=compile_mode)
        if method == "pab":
            pab = diffusers.PyramidAttentionBroadcastConfig(**PAB, current_timestep_callback=clock)
            attnrewrite.enable_cache(compiled, pab)
        elif method == "faster":
            # What is compared with diffusers computes what diffusers does.
            faster = attnrewrite.FasterCacheConfig(**FASTER, follow_diffusers=True, current_timestep_callback=clock)
            attnrewrite.enable_cache(compiled, faster)
        call: Callable[..., Any] = compiled
        return call
    if method == "pab":
        pab = diffusers.PyramidAttentionBroadcastConfig(**PAB, current_timestep_callback=clock)
        diffusers.apply_pyramid_attention_broadcast(model, pab)
    elif method == "faster":
        diffusers.apply_faster_cache(model, diffusers.FasterCacheConfig(**FASTER, current_timestep_callback=clock))
    if way == "compile":
        # Not fullgraph: diffusers' hooks cannot be compiled so.
        return torch.compile(model, mode=compile_mode)
    return model


def start_anew(mode: str, model: nn.Module) -> None:
    """diffusers' pipelines reset their hooks between runs; attnrewrite sees a run begin by itself."""
    if not mode.endswith("attnrewrite"):
        diffusers.hooks.HookRegistry.check_if_exists_or_initialize(model).reset_stateful_hooks()


def plan(method: str, timesteps: list[int]) -> list[str]:
    """What each step of a run computes, by the rules of the methods: all, reuse, half, or half and reuse."""

    def inside(name: str, settings: dict[str, Any], timestep: int) -> bool:
        low, high = settings[name]
        return bool(low < timestep < high)

    steps = []
    for iteration, timestep in enumerate(timesteps):
        half = reuse = False
        if method == "pab":
            reuse = inside("spatial_attention_timestep_skip_range", PAB, timestep)
            reuse = reuse and iteration % PAB["spatial_attention_block_skip_range"] != 0
        elif method == "faster" and iteration > 0:
            half = inside("unconditional_batch_timestep_skip_range", FASTER, timestep)
            half = half and iteration % FASTER["unconditional_batch_skip_range"] != 0
            reuse = half and inside("spatial_attention_timestep_skip_range", FASTER, timestep)
            reuse = reuse and iteration % FASTER["spatial_attention_block_skip_range"] != 0
        steps.append(" and ".join(["half"] * half + ["reuse"] * reuse) or "all")
    return steps


def compiled_so_far() -> tuple[int, int]:
    return counters["stats"]["unique_graphs"], counters["aot_autograd"]["total"]


class LimitHits(logging.Handler):
    """Counts Dynamo's warnings that a function was compiled too often and runs eagerly from now on."""

    _logger = logging.getLogger("torch._dynamo.convert_frame")

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.count = 0

    def emit(self, record: logging.LogRecord) -> None:
        self.count += "recompile_limit" in record.getMessage()

    def __enter__(self) -> LimitHits:
        self._logger.addHandler(self)
        return self

    def __exit__(self, *_: object) -> None:
        self._logger.removeHandler(self)


def measure(mode: str, loop: Loop, repeats: int, budget: float, latents: dict[str, Tensor]) -> Row:
    """One mode; the final latents go into ``latents``."""
    setting, row = loop.setting, Row(mode)
    model = transformer(setting)
    if setting.on_cuda:
        row.weights_mib = torch.cuda.memory_allocated() / 2**20
    before = compiled_so_far()
    with LimitHits() as hits:
        try:
            call = prepared(mode, model, loop.clock, setting.compile_mode)
            start = time.perf_counter()
            if mode.endswith("eager"):
                loop.run(call, 2)
            else:
                loop.run(call, setting.steps, start + budget)
                row.first_run_s = round(time.perf_counter() - start, 3)
                click.echo(f"  first run: {row.first_run_s:.1f} s", err=True)
            first = compiled_so_far()
            if setting.on_cuda:
                gc.collect()
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            for _ in range(repeats):
                start_anew(mode, model)
                start = time.perf_counter()
                latents[mode], row.steps_ms = loop.run(call, setting.steps)
                row.runs_s.append(round(time.perf_counter() - start, 3))
                click.echo(f"  run: {row.runs_s[-1]:.2f} s", err=True)
            row.compilations_after_first_run = compiled_so_far()[1] - first[1]
        except (TooLong, RuntimeError, attnrewrite.AttnRewriteError) as error:
            row.failed = f"{type(error).__name__}: {error}"[:2000]
    row.graphs, row.compilations = (now - then for now, then in zip(compiled_so_far(), before, strict=True))
    row.recompile_limit_hits = hits.count
    if row.failed is None:
        summarize(row, loop, latents)
    return row


def summarize(row: Row, loop: Loop, latents: dict[str, Tensor]) -> None:
    """What follows from the times and the latents."""
    row.run_s = statistics.median(row.runs_s)
    if row.first_run_s is not None:
        row.compile_s = round(row.first_run_s - row.run_s, 3)
    if loop.setting.on_cuda:
        row.peak_mib = torch.cuda.max_memory_allocated() / 2**20
    method = row.mode.rpartition("-")[0]
    kinds = plan(method, loop.numbers)
    for kind in sorted(set(kinds)):
        times = [ms for ms, own in zip(row.steps_ms, kinds, strict=True) if own == kind]
        row.step_ms[kind] = round(statistics.median(times), 3)
    eager = f"{method}-eager".lstrip("-")
    if eager in latents and eager != row.mode:
        truth = latents[eager].double()
        difference = latents[row.mode].double() - truth
        row.against = eager
        row.error = (difference.abs().max() / truth.abs().max()).item()
        row.error_l2 = (difference.norm() / truth.norm()).item()


class Skipped(nn.Module):
    """What a reused attention of one block spares: its norms, projections and attention."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.norm1, self.attn1 = block.norm1, block.attn1

    def forward(self, hidden: Tensor, text: Tensor, embedding: Tensor) -> Any:
        hidden, text, _, _ = self.norm1(hidden, text, embedding)
        return self.attn1(hidden_states=hidden, encoder_hidden_states=text)


def predicted(loop: Loop, repeats: int = 10) -> dict[str, Any]:
    """The time of a call without a cache and of what a reuse spares in it, for the whole batch and its half.

    Each is compiled by attnrewrite and timed by itself, the spared part as one block's times the number of blocks; and
    the same in floating point operations, which are counted and not run.
    """
    setting = loop.setting
    result: dict[str, Any] = {}
    model: Any = transformer(setting)
    whole = torch.compile(model, backend="attnrewrite", dynamic=False)
    part = torch.compile(Skipped(model.transformer_blocks[0]), backend="attnrewrite", dynamic=False)
    for name, batch in (("whole", 2), ("half", 1)):
        inputs = loop.inputs(loop.noise, loop.scheduler.timesteps[0], batch)
        arguments = [value.normal_() for value in skipped_inputs(setting, batch, setting.device)]
        step = median_ms(whole, [], inputs, repeats, setting.on_cuda)
        spared = median_ms(part, arguments, {}, repeats, setting.on_cuda)
        operations = flops(setting, batch)
        result[name] = {"step_ms": step, "skipped_ms": setting.layers * spared, **operations}
        click.echo(f"  {name}: {step:.2f} ms, of which {setting.layers * spared:.2f} ms can be skipped", err=True)
    return result


def skipped_inputs(setting: Setting, batch: int, device: str) -> list[Tensor]:
    """Of :class:`Skipped`: states of the video and the text, and the embedded timestep."""
    tokens = setting.frames * (setting.height // 2) * (setting.width // 2)
    width = setting.heads * 64
    sizes = ((batch, tokens, width), (batch, setting.text, width), (batch, 512))
    return [torch.empty(size, device=device, dtype=setting.kind) for size in sizes]


def flops(setting: Setting, batch: int) -> dict[str, float]:
    """Of a call, and of what a reuse skips in it."""
    model: Any = transformer(setting, "meta")
    inputs = {
        "hidden_states": torch.empty(batch, setting.frames, 16, setting.height, setting.width, dtype=setting.kind),
        "encoder_hidden_states": torch.empty(batch, setting.text, 4096, dtype=setting.kind),
        "timestep": torch.empty(batch),
    }
    with FlopCounterMode(display=False) as all_of_it:
        model(**{name: value.to("meta") for name, value in inputs.items()})
    with FlopCounterMode(display=False) as skipped:
        Skipped(model.transformer_blocks[0])(*skipped_inputs(setting, batch, "meta"))
    return {"flops": all_of_it.get_total_flops(), "skipped_flops": setting.layers * skipped.get_total_flops()}


def median_ms(call: Callable[..., Any], args: list[Any], kwargs: dict[str, Any], repeats: int, on_cuda: bool) -> float:
    watch = Stopwatch(on_cuda)
    for _ in range(2):
        call(*args, **kwargs)
    for _ in range(repeats):
        with watch.lap():
            call(*args, **kwargs)
    return statistics.median(watch.laps_ms())


def savings(rows: dict[str, Any], parts: dict[str, Any], timesteps: list[int]) -> dict[str, Any]:
    """What caching saves of a run, measured against attnrewrite without a cache, beside what the parts predict."""
    result: dict[str, Any] = {}
    uncached = rows.get("attnrewrite", {}).get("run_s")
    for method in ("pab", "faster"):
        steps = plan(method, timesteps)
        milliseconds = operations = 0.0
        for step in steps:
            of = parts["half" if "half" in step else "whole"]
            milliseconds += parts["whole"]["step_ms"] - of["step_ms"] + ("reuse" in step) * of["skipped_ms"]
            operations += parts["whole"]["flops"] - of["flops"] + ("reuse" in step) * of["skipped_flops"]
        found: dict[str, Any] = {
            "steps": {kind: steps.count(kind) for kind in sorted(set(steps))},
            "predicted_s": milliseconds / 1e3,
            "predicted_fraction_of_flops": operations / (len(steps) * parts["whole"]["flops"]),
        }
        cached = rows.get(f"{method}-attnrewrite", {}).get("run_s")
        if uncached is not None and cached is not None:
            found["measured_s"] = uncached - cached
            found["measured_fraction_of_time"] = (uncached - cached) / uncached
            found["measured_over_predicted"] = (uncached - cached) / found["predicted_s"]
        result[method] = found
    return result


def size_of(_: object, __: object, text: str) -> tuple[int, int]:
    height, _, width = text.partition("x")
    if not (height.isdecimal() and width.isdecimal() and int(height) % 2 == 0 and int(width) % 2 == 0):
        raise click.BadParameter(
            f"takes two even numbers, height and width of the latents, such as 60x90; got {text!r}"
        )
    return int(height), int(width)


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option("--mode", "modes", type=click.Choice([*MODES, PREDICTION]), multiple=True, help="Default: all of them.")
@click.option("--device", default="cpu", help="Such as cuda.")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), default="float32")
@click.option("--steps", type=click.IntRange(min=3), default=30)
@click.option("--layers", type=click.IntRange(min=1), default=30)
@click.option("--heads", type=click.IntRange(min=1), default=30, help="Of 64 channels each.")
@click.option("--frames", type=click.IntRange(min=1), default=13, help="Frames of the latents.")
@click.option(
    "--size", callback=size_of, default="60x90", help="Height and width of the latents: an eighth of the video's."
)
@click.option("--text", type=click.IntRange(min=1), default=226, help="Tokens of text.")
@click.option("--repeats", type=click.IntRange(min=1), default=2, help="Timed runs.")
@click.option("--timesteps", type=click.Choice(["number", "tensor"]), default="number", help="What the callback gives.")
@click.option("--compile-mode", default=None, help="Inductor's mode wherever the model is compiled.")
@click.option("--recompile-limit", type=click.IntRange(min=1), default=8, help="Dynamo's; 8 is its default.")
@click.option("--budget", type=click.FloatRange(min=0), default=400.0, help="Seconds for a first run that compiles.")
@click.option("--json", "path", type=click.Path(dir_okay=False, path_type=Path), help="Write the raw data here.")
@click.option(
    "--latents",
    "folder",
    type=click.Path(file_okay=False, path_type=Path),
    help="Keep final latents here, so that modes which are run later can be compared with those of the eager ones.",
)
def main(
    modes: tuple[str, ...],
    device: str,
    dtype: str,
    steps: int,
    layers: int,
    heads: int,
    frames: int,
    size: tuple[int, int],
    text: int,
    repeats: int,
    timesteps: str,
    compile_mode: str | None,
    recompile_limit: int,
    budget: float,
    path: Path | None,
    folder: Path | None,
) -> None:
    """Time, memory, graphs and errors of a denoising run, without a cache and with two."""
    setting = Setting(
        device, dtype, steps, layers, heads, frames, *size, text, timesteps, compile_mode, recompile_limit
    )
    diffusers.utils.logging.set_verbosity_error()
    torch._dynamo.config.recompile_limit = recompile_limit
    record = earlier(path, setting)
    latents = {file.stem: torch.load(file, map_location=device) for file in folder.glob("*.pt")} if folder else {}
    loop = Loop(setting)
    with torch.inference_mode():
        for mode in modes or (*MODES, PREDICTION):
            click.echo(mode, err=True)
            if mode == PREDICTION:
                record["parts"] = predicted(loop)
            else:
                row = measure(mode, loop, repeats, budget, latents)
                record["rows"][mode] = {**dataclasses.asdict(row), "commit": circumstances(device)["commit"]}
                show(row)
                if folder is not None and mode in latents:
                    folder.mkdir(parents=True, exist_ok=True)
                    torch.save(latents[mode], folder / f"{mode}.pt")
            if "parts" in record:
                record["savings"] = savings(record["rows"], record["parts"], loop.numbers)
            if path is not None:
                written = {**circumstances(device), **record}
                path.write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")
            torch.compiler.reset()
            gc.collect()
            if setting.on_cuda:
                torch.cuda.empty_cache()
    for method, found in record.get("savings", {}).items():
        click.echo(f"{method:8} {json.dumps(found)}")


def earlier(path: Path | None, setting: Setting) -> dict[str, Any]:
    """What a file holds of the same setting, or an empty record."""
    own = dataclasses.asdict(setting)
    if path is None or not path.exists():
        return {"setting": own, "rows": {}}
    found = json.loads(path.read_text(encoding="utf-8"))
    if found.get("setting") != own:
        raise click.UsageError(f"{path} holds another setting: {found.get('setting')}; give another file")
    return {key: found[key] for key in ("setting", "rows", "parts", "savings") if key in found}


def show(row: Row) -> None:
    if row.failed is not None:
        click.echo(
            f"{row.mode:20} {row.graphs} graphs, {row.compilations} compiled; failed: {row.failed.splitlines()[0]}"
        )
        return
    memory = "" if row.peak_mib is None else f"{row.peak_mib:9.0f} MiB"
    error = "" if row.error is None else f"   error {row.error:.1e}"
    first = "" if row.compile_s is None else f"   compiled {row.compilations} graphs in {row.compile_s:.1f} s"
    kinds = ", ".join(f"{kind} {ms:.1f} ms" for kind, ms in row.step_ms.items())
    click.echo(f"{row.mode:20}{row.run_s:9.2f} s{memory}{error}{first}   ({kinds})")


if __name__ == "__main__":
    main()
