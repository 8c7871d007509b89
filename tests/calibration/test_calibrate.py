"""``calibrate``: differences and proposals that can be computed by hand, the command line, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import attnrewrite
from attnrewrite import CacheError, CacheMemoryError, Calibration, OptionError, PyramidAttentionBroadcastConfig
from attnrewrite.analysis.kinds import Kind
from attnrewrite.caching.method import method_of
from attnrewrite.calibration.calibration import print_calibration
from attnrewrite.calibration.proposals import CallDifferences, SiteRun, least_threshold, mean_runs, proposed
from attnrewrite.cli import main
from attnrewrite.options.cache_config import validated

TIMESTEPS = (900, 800, 700, 600, 500, 400, 300, 200, 100)
EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


class Attention(nn.Module):
    """Attention whose value is one half of the features, twice: where that is a constant, so is the result."""

    def __init__(self, half: int) -> None:
        super().__init__()
        self.query, self.key = nn.Linear(8, 8), nn.Linear(8, 8)
        self.value, self.out = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
        with torch.no_grad():
            self.value.weight.zero_()
            self.value.weight[:, 4 * half : 4 * half + 4] = torch.eye(4).repeat(2, 1)
            self.out.weight.copy_(torch.eye(8))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        context = x if context is None else context
        weights = (self.query(x) @ self.key(context).transpose(-1, -2) * 0.3).softmax(-1)
        result: Tensor = self.out(weights @ self.value(context))
        return result


class Video(nn.Module):
    """``x``: [batch, frames, positions, 8], the first half for the spatial attention, the other for the temporal one.

    ``text``: [batch, words, 8].
    """

    def __init__(self) -> None:
        super().__init__()
        self.spatial, self.temporal, self.cross = Attention(0), Attention(1), Attention(0)

    def forward(self, x: Tensor, text: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.spatial(x), self.temporal(x.transpose(1, 2)), self.cross(x.flatten(1, 2), text)


class Clock:
    now: float | None = None

    def __call__(self) -> float | None:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    torch._dynamo.reset()
    with torch.no_grad():
        yield


def compiled(model: nn.Module | None = None) -> nn.Module:
    torch.manual_seed(0)
    model = (Video() if model is None else model).eval()
    model.compile(backend="attnrewrite", options={"inner_backend": "eager"})
    return model


def inputs(spatial: float, temporal: float, cross: float = 3.0, positions: int = 5, **kind: Any) -> tuple[Tensor, ...]:
    x = torch.cat([torch.full((4,), spatial), torch.full((4,), temporal)]).expand(1, 3, positions, 8)
    return x.to(**kind).contiguous(), torch.full((1, 6, 8), cross, **kind)


def at(timestep: float) -> tuple[Tensor, ...]:
    """The spatial value falls with the timestep, the temporal one jumps at 500, the text stays."""
    return inputs(timestep, 1.0 if timestep > 500 else 2.0)


def loop(
    model: nn.Module,
    clock: Clock,
    timesteps: Sequence[float] = TIMESTEPS,
    inputs_at: Callable[[float], tuple[Tensor, ...]] = at,
) -> list[Any]:
    results = []
    for timestep in timesteps:
        clock.now = timestep
        results.append(model(*inputs_at(timestep)))
    clock.now = None
    return results


def of(calibration: Calibration, kind: Kind, **wanted: Any) -> SiteRun:
    (record,) = [
        each
        for each in calibration.records
        if each.kind == kind and all(getattr(each, name) == value for name, value in wanted.items())
    ]
    return record


def assert_differences(record: SiteRun, values: Sequence[float], lags: int = 4) -> None:
    """Those of numbers that an attention's result consists of, call by call."""
    assert [step.iteration for step in record.steps] == list(range(len(values)))
    for step, value in zip(record.steps, values, strict=True):
        before = [values[step.iteration - lag] for lag in range(1, lags + 1) if lag <= step.iteration]
        expected = [abs(value - each) / abs(value) for each in before]
        assert list(step.differences[: len(expected)]) == pytest.approx(expected, abs=1e-5)
        assert step.differences[len(expected) :] == (None,) * (lags - len(expected))


def test_differences_and_proposals_are_those_computed_by_hand(clock: Clock) -> None:
    model = compiled()
    before = loop(model, clock)
    during: list[Any] = []
    calibration = attnrewrite.calibrate(model, lambda: during.extend(loop(model, clock)), clock, threshold=0.26)
    torch.testing.assert_close(during, before, rtol=0, atol=0)
    assert calibration.model == "Video" and calibration.kinds == ("spatial", "temporal", "cross")
    assert [(each.site, each.stream, each.run) for each in calibration.records] == [
        ("spatial", "", 0),
        ("temporal", "", 0),
        ("cross", "", 0),
    ]
    assert [step.timestep for step in calibration.records[0].steps] == list(TIMESTEPS)
    assert_differences(of(calibration, "spatial"), TIMESTEPS)
    assert_differences(of(calibration, "temporal"), [1, 1, 1, 1, 2, 2, 2, 2, 2])
    assert_differences(of(calibration, "cross"), [3] * 9)

    spatial, temporal, cross = (calibration.proposals[kind] for kind in calibration.kinds)
    assert spatial is not None and temporal is not None and cross is not None
    # From the call before 1/8, 1/7, 1/6, 1/5, 1/4, 1/3, ...; from two before 2/7, ...: every second call, down to 400.
    assert (spatial.skip_range, spatial.timestep_skip_range) == (2, (350, 850))
    assert (spatial.reused, spatial.calls) == (3, 9)
    assert spatial.mean_difference == pytest.approx((1 / 8 + 1 / 6 + 1 / 4) / 3, abs=1e-5)
    assert spatial.largest_difference == pytest.approx(1 / 4, abs=1e-5)
    # The fourth call is computed where it jumps; then up to the call before the eighth, which is computed again.
    assert (temporal.skip_range, temporal.timestep_skip_range, temporal.reused) == (4, (150, 850), 6)
    assert temporal.largest_difference == pytest.approx(0, abs=1e-5)
    # Everything but the first call and the fifth.
    assert (cross.skip_range, cross.timestep_skip_range, cross.reused) == (5, (-1, 850), 7)


def test_the_proposed_config_reuses_what_it_says(clock: Clock) -> None:
    model = compiled()
    exact = loop(model, clock)
    calibration = attnrewrite.calibrate(model, lambda: loop(model, clock), clock, threshold=0.26)
    # Another text at each call shows which of them are computed.
    numbered = lambda timestep: (at(timestep)[0], torch.full((1, 6, 8), float(timestep)))  # noqa: E731
    with attnrewrite.attention_cache(model, calibration.config(clock)):
        results = loop(model, clock, inputs_at=numbered)
    shown = [[round(part.mean().item()) for part in call] for call in results]
    assert [call[0] for call in shown] == [900, 900, 700, 700, 500, 500, 300, 200, 100]
    assert [call[1] for call in shown] == [1, 1, 1, 1, 2, 2, 2, 2, 2]
    assert [call[2] for call in shown] == [900] * 5 + [400] * 4
    # Without the cache all is computed again.
    torch.testing.assert_close(loop(model, clock), exact, rtol=0, atol=0)


def test_the_code_is_the_config(clock: Clock) -> None:
    model = compiled()
    calibration = attnrewrite.calibrate(
        model, lambda: loop(model, clock), clock, threshold=0.4, temporal_attention_block_identifiers=["^temporal$"]
    )
    made = eval(calibration.to_python("clock"), {"attnrewrite": attnrewrite, "clock": clock})
    assert made == calibration.config(clock)
    assert made.temporal_attention_block_identifiers == ("^temporal$",)
    assert made.cross_attention_block_skip_range == 5
    stricter = dataclasses.replace(calibration, threshold=0.05)
    assert stricter.proposals["spatial"] is None
    assert stricter.config(clock).spatial_attention_block_skip_range is None


def test_identifiers_make_a_spatial_attention_temporal(clock: Clock) -> None:
    model = compiled()
    calibration = attnrewrite.calibrate(
        model, lambda: loop(model, clock), clock, temporal_attention_block_identifiers=["spatial", "temporal"]
    )
    assert [(each.site, each.kind) for each in calibration.records[:2]] == [
        ("spatial", "temporal"),
        ("temporal", "temporal"),
    ]
    # The mean of both, at the call where one of them jumps.
    (run,) = mean_runs(calibration.records, "temporal")
    assert run[4].differences[0] == pytest.approx((1 / 5 + 1 / 2) / 2, abs=1e-5)


def test_streams_are_compared_each_with_itself(clock: Clock) -> None:
    model = compiled()

    def run() -> None:
        for timestep in TIMESTEPS:
            clock.now = timestep
            with attnrewrite.cache_stream("cond"):
                model(*inputs(timestep, 1.0))
            with attnrewrite.cache_stream("guidance"), attnrewrite.cache_stream("uncond"):
                model(*inputs(2000 - timestep, 1.0))

    calibration = attnrewrite.calibrate(model, run, clock, threshold=0.26)
    assert_differences(of(calibration, "spatial", stream="cond"), TIMESTEPS)
    assert_differences(of(calibration, "spatial", stream="guidance/uncond"), [2000 - each for each in TIMESTEPS])
    spatial = calibration.proposals["spatial"]
    # The unconditional values would bear more, but one setting is for both.
    assert spatial is not None and (spatial.skip_range, spatial.timestep_skip_range) == (2, (350, 850))
    assert (spatial.reused, spatial.calls) == (6, 18)
    assert "guidance/uncond" in calibration.to_text()


def test_runs_are_apart_and_may_have_other_shapes(clock: Clock) -> None:
    model = compiled()

    def run() -> None:
        loop(model, clock)
        loop(model, clock, inputs_at=lambda timestep: inputs(timestep, 1.0, positions=7))
        loop(model, clock, TIMESTEPS[::-1])

    calibration = attnrewrite.calibrate(model, run, clock)
    for number in range(2):
        assert_differences(of(calibration, "spatial", run=number), TIMESTEPS)
    assert_differences(of(calibration, "spatial", run=2), TIMESTEPS[::-1])
    assert [step.timestep for step in of(calibration, "cross", run=2).steps] == list(TIMESTEPS[::-1])
    cross = calibration.proposals["cross"]
    # The last run rises: its first call is the last one of the others.
    assert cross is not None and (cross.reused, cross.calls) == (21, 27)
    assert cross.timestep_skip_range == (-1, 901)


def test_how_far_back_is_a_setting_and_offloading_changes_nothing(clock: Clock) -> None:
    model = compiled()
    wide = attnrewrite.calibrate(model, lambda: loop(model, clock), clock, lags=7, offload=True)
    assert_differences(of(wide, "spatial"), TIMESTEPS, lags=7)
    assert wide.proposals["cross"] is not None and wide.proposals["cross"].skip_range == 8
    narrow = attnrewrite.calibrate(model, lambda: loop(model, clock), clock, lags=1)
    assert_differences(of(narrow, "spatial"), TIMESTEPS, lags=1)
    assert narrow.lags == 1 and narrow.proposals["cross"] is not None and narrow.proposals["cross"].skip_range == 2


def test_half_precision_is_compared_in_single(clock: Clock) -> None:
    model = compiled(Video().bfloat16())
    run = lambda: loop(  # noqa: E731
        model, clock, inputs_at=lambda timestep: inputs(timestep / 100, 1.0, dtype=torch.bfloat16)
    )
    calibration = attnrewrite.calibrate(model, run, clock)
    steps = of(calibration, "spatial").steps
    assert [step.differences[0] for step in steps[1:]] == pytest.approx([1 / n for n in range(8, 0, -1)], rel=0.01)


class Twice(nn.Module):
    """A module's attention, called twice, and one with a name of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.other = Attention(0), Attention(1)

    def forward(self, x: Tensor, text: Tensor) -> tuple[Tensor, ...]:
        return self.shared(x), self.shared(2 * x.square()), self.other(x)


def test_each_attention_of_a_module_that_is_called_twice(clock: Clock) -> None:
    model = compiled(Twice())
    calibration = attnrewrite.calibrate(model, lambda: loop(model, clock), clock)
    assert [each.site for each in calibration.records] == ["shared", "shared #2", "other"]
    assert_differences(of(calibration, "spatial", site="shared #2"), [each**2 for each in TIMESTEPS])


def test_zeros_and_nan_are_never_proposed_and_json_bears_them(clock: Clock) -> None:
    model = compiled()
    values = dict(zip(map(float, TIMESTEPS), (1.0, 0.0, 0.0, 1.0, math.nan, 1.0, 1.0, 1.0, 1.0), strict=True))
    run = lambda: loop(model, clock, inputs_at=lambda timestep: inputs(values[timestep], 1.0))  # noqa: E731
    calibration = attnrewrite.calibrate(model, run, clock)
    differences = [step.differences[0] for step in of(calibration, "spatial").steps]
    assert differences[:4] == [None, math.inf, 0.0, 1.0]
    assert differences[4] is not None and math.isnan(differences[4])
    spatial = calibration.proposals["spatial"]
    # At 300, 200 and 100, of the call at 400 that is computed.
    assert spatial is not None and (spatial.reused, spatial.timestep_skip_range) == (3, (-1, 350))
    data = json.loads(calibration.to_json())
    (record,) = [each for each in data["records"] if each["kind"] == "spatial"]
    assert [step["differences"][0] for step in record["steps"]] == [None, None, 0.0, 1.0, None, None, 0.0, 0.0, 0.0]
    assert data["proposals"]["spatial"]["timestep_skip_range"] == [-1, 350]


# Proposals against the method itself ----------------------------------------------------------------------------------


def best_by_trying(runs: Sequence[Sequence[CallDifferences]], threshold: float) -> int:
    """In how many calls the best of all skip ranges and windows reuses, by the rules of the method that runs."""
    timesteps = sorted({step.timestep for run in runs for step in run})
    best = 0
    for every in range(2, len(runs[0][0].differences) + 2):
        for low in timesteps:
            for high in timesteps:
                found = reused_by_the_method(runs, every, (low - 0.5, high + 0.5), threshold) if low <= high else None
                best = max(best, found or 0)
    return best


def reused_by_the_method(
    runs: Sequence[Sequence[CallDifferences]], every: int, window: tuple[float, float], threshold: float
) -> int | None:
    config = PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=every,
        spatial_attention_timestep_skip_range=window,
        current_timestep_callback=lambda: 0,
    )
    method = method_of(validated(config))
    count = 0
    for run in runs:
        computed = 0
        for step in run:
            if not method.reused(step.iteration, step.timestep, False, False):
                computed = step.iteration
                continue
            difference = step.differences[step.iteration - computed - 1]
            if difference is None or difference > threshold:
                return None
            count += 1
    return count


@st.composite
def recorded(draw: st.DrawFn) -> list[tuple[CallDifferences, ...]]:
    lags = draw(st.integers(1, 3))
    runs = []
    for _ in range(draw(st.integers(1, 2))):
        timesteps = sorted(draw(st.lists(st.integers(0, 12), min_size=2, max_size=8)), reverse=draw(st.booleans()))
        steps = []
        for iteration, timestep in enumerate(timesteps):
            known = [draw(st.sampled_from([0.0, 0.1, 0.2, 0.3])) for _ in range(min(iteration, lags))]
            steps.append(CallDifferences(iteration, float(timestep), (*known, *[None] * (lags - len(known)))))
        runs.append(tuple(steps))
    return runs


@settings(max_examples=100, deadline=None)
@given(recorded())
def test_the_proposal_reuses_as_much_as_any_that_may_be_and_as_the_method_does(
    runs: list[tuple[CallDifferences, ...]],
) -> None:
    window = proposed(runs, 0.15)
    best = best_by_trying(runs, 0.15)
    least = least_threshold(runs)
    assert (least is not None and least <= 0.15) == (window is not None)
    if least is not None:
        assert proposed(runs, least) is not None
        assert proposed(runs, least * 0.999 - 1e-9) is None
    if window is None:
        assert best == 0
        return
    assert window.reused == best
    assert reused_by_the_method(runs, window.skip_range, window.timestep_skip_range, 0.15) == best
    assert window.mean_difference <= window.largest_difference * (1 + 1e-12) and window.largest_difference <= 0.15


# What is refused ------------------------------------------------------------------------------------------------------


def test_where_nothing_can_be_reused_it_is_said(clock: Clock) -> None:
    model = compiled()
    falling = lambda: loop(model, clock, range(9, 0, -1), lambda t: inputs(2**-t, 3**-t, 4**-t))  # noqa: E731
    calibration = attnrewrite.calibrate(model, falling, clock)
    assert set(calibration.proposals.values()) == {None}
    words = (
        "no attention of Video stays within a relative difference of 0.1 of what it would reuse (thresholds from which "
        "something is: spatial 0.5, temporal 0.667, cross 0.75): nothing can be reused"
    )
    for refused in (lambda: calibration.config(clock), calibration.to_python):
        with pytest.raises(CacheError) as error:
            refused()
        assert str(error.value).startswith(words)
    assert words in calibration.to_text()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"threshold": 0}, "threshold must be a number above 0"),
        ({"threshold": math.nan}, "threshold must be a number above 0"),
        ({"threshold": "0.1"}, "threshold must be a number above 0"),
        ({"lags": 0}, "lags must be a whole number of at least 1"),
        ({"lags": 1.5}, "lags must be a whole number of at least 1"),
        ({"run": None}, "run must be a function without arguments"),
        ({"current_timestep_callback": None}, "must be a function that returns the current timestep"),
        ({"cross_attention_block_identifiers": ["("]}, "is not a regular expression"),
        ({"memory_limit": -1}, "memory_limit must be a number of bytes"),
    ],
)
def test_wrong_arguments(clock: Clock, arguments: dict[str, Any], words: str) -> None:
    model = compiled()
    given_ = {"run": lambda: loop(model, clock), "current_timestep_callback": clock, **arguments}
    with pytest.raises(OptionError, match=words.replace("(", r"\(")):
        attnrewrite.calibrate(model, **given_)
    with pytest.raises(OptionError):
        Calibration("Video", (), threshold=-1)


def test_models_and_runs_that_cannot_be_calibrated(clock: Clock) -> None:
    plain = Video().eval()
    with pytest.raises(TypeError, match="calibrate takes a compiled module, and nothing in Video is compiled"):
        attnrewrite.calibrate(plain, lambda: loop(plain, clock), clock)
    model = compiled()
    with pytest.raises(CacheError, match=r"run\(\) did not call Video"):
        attnrewrite.calibrate(model, lambda: None, clock)
    with pytest.raises(CacheError, match="no two calls of Video that belong to one denoising run"):
        attnrewrite.calibrate(model, lambda: loop(model, clock, [500]), clock)
    with pytest.raises(CacheError, match="current_timestep_callback returned None"):
        attnrewrite.calibrate(model, lambda: model(*at(500)), clock)
    with pytest.raises(CacheMemoryError, match="memory_limit is"):
        attnrewrite.calibrate(model, lambda: loop(model, clock), clock, memory_limit=1000)
    with pytest.raises(CacheError, match="training mode"):
        attnrewrite.calibrate(model.train(), lambda: loop(model, clock), clock)
    model.eval()
    other = Video().eval()
    other.compile(backend="eager")
    with pytest.raises(CacheError, match="no graph of Video with attention was compiled"):
        attnrewrite.calibrate(other, lambda: loop(other, clock), clock)
    config = PyramidAttentionBroadcastConfig(spatial_attention_block_skip_range=2, current_timestep_callback=clock)
    # Whatever failed, the model has no cache afterwards.
    with (
        attnrewrite.attention_cache(model, config),
        pytest.raises(CacheError, match="Video has a cache already: call disable_cache"),
    ):
        attnrewrite.calibrate(model, lambda: loop(model, clock), clock)


# What is shown --------------------------------------------------------------------------------------------------------


def example_of(lags: int = 2) -> Calibration:
    records = []
    for site, kind in (("blocks.0.attn1", "spatial"), ("blocks[1].attn1", "spatial"), ("blocks.0.attn2", "cross")):
        for stream in ("cond", "uncond"):
            steps = tuple(
                CallDifferences(i, 900.0 - 100 * i, tuple(0.04 * k if k <= i else None for k in range(1, lags + 1)))
                for i in range(9)
            )
            records.append(SiteRun(site, kind, stream, 0, steps))  # type: ignore[arg-type]
    return Calibration("Video", tuple(records))


def test_the_tables() -> None:
    calibration = example_of()
    text = calibration.to_text()
    assert text.startswith("Video: 3 attentions in 18 calls; relative differences from earlier calls, threshold 0.1\n")
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert "spatial 0.040 0.080 1 of 3 calls -1 to 850 12 of 18 calls 0.080" in lines
    # No markup is read into a name.
    assert "blocks[1].attn1 spatial uncond 0.040 0.080 0.040 at 800" in lines
    assert str(calibration) == text
    print_calibration(calibration)


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_the_plot(tmp_path: Path, suffix: str) -> None:
    path = example_of().save_plot(tmp_path / f"plot.{suffix}")
    assert path.stat().st_size > 10_000
    if suffix == "svg":
        text = path.read_text()
        assert "spatial: computed in 1 of 3 calls between -1 and 850" in text
        assert "blocks[1].attn1 in uncond" in text


FACTORIES = """
import torch
import attnrewrite
from tests.calibration.test_calibrate import Clock, Video, at, inputs, loop

clock = Clock()
video = Video()


def run(): return loop(video, clock)
def mapping(): return {"model": video, "run": run, "current_timestep_callback": clock}
def compiled():
    other = Video()
    other.compile(backend="attnrewrite", options={"inner_backend": "eager"})
    return other, lambda: loop(other, clock), clock
def nothing(): return video, lambda: loop(video, clock, range(9, 0, -1), lambda t: inputs(2**-t, 3**-t, 4**-t)), clock
def no_run(): return video, clock
def no_key(): return {"model": video, "run": run}
def other_key(): return {"model": video, "run": run, "current_timestep_callback": clock, "steps": 3}
def only_a_model(): return video
def not_a_model(): return 3, run, clock
def not_a_run(): return video, 3, clock
def run_with_arguments(): return video, loop, clock
def no_call(): return video, lambda: None, clock
def fails(): return video, lambda: [][1], clock
"""


@pytest.fixture
def factories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    (tmp_path / "calibrate_factories.py").write_text(FACTORIES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    sys.modules.pop("calibrate_factories", None)


def run_command(factory: str, *options: str) -> Result:
    return CliRunner().invoke(main, ["calibrate", f"calibrate_factories:{factory}", *options])


def test_the_command(factories: Path) -> None:
    result = run_command("mapping", "--threshold", "0.26", "--json", "a.json", "--plot", "a.svg")
    assert result.exit_code == 0, result.output
    assert "Video: 3 attentions in 9 calls" in result.stdout and "threshold 0.26" in result.stdout
    assert "    spatial_attention_timestep_skip_range=(350, 850),\n" in result.stdout
    assert result.stdout.rstrip().endswith("    current_timestep_callback=lambda: pipe.current_timestep,\n)")
    assert "Wrote a.json" in result.stderr and "Wrote a.svg" in result.stderr
    assert json.loads((factories / "a.json").read_text())["proposals"]["cross"]["skip_range"] == 5
    assert "threshold" in (factories / "a.svg").read_text()
    again = run_command("compiled", "--lags", "2", "--offload")
    assert again.exit_code == 0, again.output
    assert "cross_attention_block_skip_range=3" in again.stdout and "spatial_attention" not in again.stdout
    nothing = run_command("nothing")
    assert nothing.exit_code == 0, nothing.output
    assert "nothing can be reused" in " ".join(nothing.stdout.split())
    assert "PyramidAttentionBroadcastConfig" not in nothing.stdout


@pytest.mark.parametrize(
    ("factory", "options", "words"),
    [
        ("no_run", [], "returned a tuple of 2; return (model, run, current_timestep_callback), or a dict"),
        ("no_key", [], "returned a dict with no key 'current_timestep_callback'"),
        ("other_key", [], "returned a dict with the unknown key 'steps'"),
        ("only_a_model", [], "returned an object of type Video; return (model, run"),
        ("not_a_model", [], "returned an object of type int as the model"),
        ("not_a_run", [], "returned an object of type int as run"),
        ("run_with_arguments", [], "run of calibrate_factories:run_with_arguments must be callable without arguments"),
        ("no_call", [], "run() did not call Video"),
        ("fails", [], "run() raised IndexError: list index out of range (run with --traceback for the full traceback)"),
        ("mapping", ["--threshold", "-1"], "threshold must be a number above 0"),
        ("mapping", ["--inner-backend", "inducto"], "did you mean 'inductor'"),
        ("compiled", ["--inner-backend", "eager"], "is already compiled; omit the option"),
        ("mapping", ["--json", "missing/a.json"], "missing is not a directory"),
        ("mapping", ["--plot", "missing/a.png"], "missing is not a directory"),
    ],
)
def test_mistakes_are_told_in_one_line(factories: Path, factory: str, options: list[str], words: str) -> None:
    result = run_command(factory, *options)
    assert result.exit_code == 2, result.output
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("Error: ") and words in line
    assert not result.stdout


def test_the_example(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(EXAMPLES)
    monkeypatch.setattr(sys, "path", [str(EXAMPLES), *sys.path])
    monkeypatch.delitem(sys.modules, "calibrate", raising=False)
    result = CliRunner().invoke(main, ["calibrate", "calibrate:latte", "--lags", "2"])
    assert result.exit_code == 0, result.output
    assert "LatteTransformer3DModel: 3 attentions in 60 calls" in result.stdout
    for kind in ("spatial", "temporal", "cross"):
        assert f"{kind}_attention_block_skip_range=" in result.stdout


def test_passes_that_share_a_stream_are_noted(clock: Clock) -> None:
    model = compiled()
    apart = attnrewrite.calibrate(model, lambda: loop(model, clock), clock)
    twice = [timestep for timestep in TIMESTEPS for _ in range(2)]
    mixed = attnrewrite.calibrate(model, lambda: loop(model, clock, twice), clock)
    assert apart.notes == () and mixed.to_dict()["notes"] == list(mixed.notes)
    note = "If they are the conditional and the unconditional pass, the proposals are wrong"
    assert note in " ".join(mixed.to_text().split()) and mixed.to_python().startswith("# One stream has two calls")
    assert note not in " ".join(apart.to_text().split())
