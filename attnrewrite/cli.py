"""The command line: ``attnrewrite doctor``, ``explain``, ``calibrate`` and ``bench``.

The commands import torch, not this module, so ``attnrewrite --help`` answers at once. A mistake of the caller prints
one line to standard error and exits with code 2.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NoReturn

import click

__all__ = ["main"]

_FILE: Any = click.Path(dir_okay=False, path_type=Path)
_RETURNS = "return model, (model, args), (model, args, kwargs), or a dict with the keys model, args, kwargs"
_RETURNS_A_RUN = (
    "return (model, run, current_timestep_callback), or a dict with the keys model, run, current_timestep_callback"
)


class _BadInput(click.ClickException):
    """A mistake of the caller: prints one line and exits with code 2."""

    exit_code = 2

    def show(self, file: IO[Any] | None = None) -> None:
        click.echo(f"Error: {' '.join(self.format_message().split())}", file=file, err=file is None)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="attnrewrite", prog_name="attnrewrite")
def main() -> None:
    """Finds attention in a model's graph and rewrites it into fused kernels."""


@main.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def doctor(as_json: bool) -> None:
    """Show what can run on this machine, and why the rest cannot."""
    from attnrewrite.doctor import diagnose, print_diagnosis

    diagnosis = diagnose()
    if as_json:
        click.echo(diagnosis.to_json())
    elif sys.stdout.isatty():
        print_diagnosis(diagnosis)
    else:  # as in `explain`
        click.echo(diagnosis.to_text(), nl=False)


@main.command()
@click.argument("factory", metavar="MODULE:FACTORY")
@click.option("--html", type=click.Path(dir_okay=False, path_type=Path), help="Also write an HTML page to this file.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
@click.option("--dynamic", is_flag=True, help="Compile with symbolic shapes, as torch.compile(dynamic=True) does.")
@click.option(
    "--data-sizes",
    is_flag=True,
    help="Trace operators whose output size depends on the data (capture_dynamic_output_shape_ops).",
)
@click.option("--train", is_flag=True, help="Explain the model in training mode, with gradients.")
@click.option("--inner-backend", metavar="NAME", help="What runs the rewritten graph (default: eager).")
@click.option("--traceback", is_flag=True, help="Show the whole traceback when the model's own code fails.")
def explain(
    factory: str,
    html: Path | None,
    as_json: bool,
    dynamic: bool,
    data_sizes: bool,
    train: bool,
    inner_backend: str | None,
    traceback: bool,
) -> None:
    """Show which attentions of a model are rewritten into fused kernels, and why the others are not.

    MODULE:FACTORY names a function without arguments, such as "my_project.models:tiny_bert". It returns the model, or
    (model, args), or (model, args, kwargs), or a dict with the keys model, args and kwargs; the model is called with
    these arguments. MODULE may lie in the current directory.
    """
    model, args, kwargs = _model_and_inputs(_made_by(factory, traceback), factory)

    import torch

    from attnrewrite import explain as explain_model
    from attnrewrite.errors import AttnRewriteError
    from attnrewrite.report.text import print_report

    if isinstance(model, torch.nn.Module):
        model.train(train)
    options: dict[str, Any] = {"inner_backend": inner_backend} if inner_backend else {}
    if data_sizes:
        options["capture_dynamic_output_shape_ops"] = True
    with _users_code("the model", traceback), torch.set_grad_enabled(train):
        try:
            report = explain_model(model, *args, options=options, dynamic=dynamic or None, **kwargs)
        except AttnRewriteError as error:
            raise _BadInput(_in_a_line(error)) from error
    if as_json:
        click.echo(report.to_json())
    elif sys.stdout.isatty():
        print_report(report)
    else:  # a file or a pipe has no fixed width
        click.echo(report.to_text())
    if html is not None:
        try:
            report.save_html(html)
        except OSError as error:
            raise _BadInput(f"the HTML page could not be written to {html}: {error.strerror or error}") from error
        click.echo(f"Wrote {html}", err=True)


@main.command()
@click.argument("factory", metavar="MODULE:FACTORY")
@click.option("--threshold", metavar="X", type=float, help="The relative difference to tolerate (default 0.1).")
@click.option(
    "--lags",
    metavar="N",
    type=click.IntRange(min=1),
    default=4,
    help="Compare each call with up to N earlier calls, and propose skip ranges up to N + 1 (default 4).",
)
@click.option("--plot", type=_FILE, help="Draw the differences into this file (.png, .svg, .pdf); needs matplotlib.")
@click.option("--json", "path", type=_FILE, help="Write the differences and the proposals here.")
@click.option("--offload", is_flag=True, help="Keep earlier values in host memory.")
@click.option(
    "--inner-backend",
    metavar="NAME",
    help="What runs the rewritten graphs (default: eager, since each runs only a few times; inductor for long runs).",
)
@click.option("--traceback", is_flag=True, help="Show the whole traceback when the model's own code fails.")
def calibrate(
    factory: str,
    threshold: float | None,
    lags: int,
    plot: Path | None,
    path: Path | None,
    offload: bool,
    inner_backend: str | None,
    traceback: bool,
) -> None:
    """Show how much each attention of a diffusion model changes from step to step, and propose what to reuse.

    MODULE:FACTORY names a function without arguments. It returns (model, run, current_timestep_callback), or a dict
    with these keys: the model; a function without arguments that runs it on real inputs, such as a call of its
    pipeline; and a function that returns the timestep of the current call. The model is put in evaluation mode and run
    without gradients, and compiled in place if nothing in it is compiled. MODULE may lie in the current directory.
    """
    for file in (plot, path):
        _check_writable(file)
    _check_plot(plot)
    model, run, callback = _model_and_run(_made_by(factory, traceback), factory)

    import torch

    from attnrewrite import calibrate as calibrate_model
    from attnrewrite.calibration.calibration import DEFAULT_THRESHOLD, print_calibration
    from attnrewrite.errors import AttnRewriteError

    _compile_in_place(model, factory, inner_backend)
    with _users_code("run()", traceback), torch.no_grad():
        try:
            found = calibrate_model(
                model,
                run,
                callback,
                threshold=DEFAULT_THRESHOLD if threshold is None else threshold,
                lags=lags,
                offload=offload,
            )
        except AttnRewriteError as error:
            raise _BadInput(_in_a_line(error)) from error
    if sys.stdout.isatty():
        print_calibration(found)
    else:  # as in `explain`
        click.echo(found.to_text(), nl=False)
    if any(found.proposals.values()):
        click.echo(f"\nThe proposed configuration:\n\n{found.to_python()}")
    _write(path, lambda file: file.write_text(found.to_json() + "\n", encoding="utf-8"))
    _write(plot, found.save_plot)


def _compile_in_place(model: Any, factory: str, inner_backend: str | None) -> None:
    """Puts the factory's model into evaluation mode, and compiles it if nothing in it is compiled."""
    import torch

    from attnrewrite.call_layers import compiled_modules

    if not isinstance(model, torch.nn.Module):
        _bad_return(factory, f"an object of type {type(model).__name__} as the model", _RETURNS_A_RUN)
    model.eval()
    if not any(True for _ in compiled_modules(model)):
        model.compile(backend="attnrewrite", options={"inner_backend": inner_backend or "eager"})
    elif inner_backend is not None:
        raise _BadInput(
            f"--inner-backend {inner_backend}: the model that {factory} returned is already compiled; omit the option"
        )


@main.command()
@click.argument("program", metavar="IN.pt2", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("-o", "--output", metavar="OUT.pt2", required=True, type=_FILE, help="Write the rewritten program here.")
@click.option("--training", is_flag=True, help="Keep gradients right as well; by default it is for inference.")
@click.option(
    "--assume-attended-rows", is_flag=True, help="Every query attends at least one key (see docs/exactness.md)."
)
@click.option(
    "--import",
    "modules",
    metavar="MODULE",
    multiple=True,
    help="A module that registers classes of the program's inputs or results, such as transformers.modeling_outputs.",
)
def rewrite(program: Path, output: Path, training: bool, assume_attended_rows: bool, modules: tuple[str, ...]) -> None:
    """Rewrite the attentions of a saved program of torch.export into PyTorch's fused kernels.

    The new program runs, and compiles ahead of time, where attnrewrite is not installed.
    """
    _check_writable(output)

    import torch

    from attnrewrite.api.exported import rewritten_and_report
    from attnrewrite.errors import AttnRewriteError

    for name in modules:
        with _users_code(f"import {name}", traceback=False):
            importlib.import_module(name)
    with _users_code(f"torch.export.load({str(program)!r})", traceback=False):
        loaded = torch.export.load(program)
    options = {"assume_attended_rows": True} if assume_attended_rows else None
    with torch.set_grad_enabled(training):
        try:
            rewritten, report = rewritten_and_report(loaded, options)
        except AttnRewriteError as error:
            raise _BadInput(_in_a_line(error)) from error
    click.echo(report.to_text())
    _write(output, lambda path: torch.export.save(rewritten, path))


@main.group()
def bench() -> None:
    """Measure attnrewrite itself, and the kernels of this machine."""


@bench.command("pass")
@click.option(
    "--repeats", type=click.IntRange(min=1), default=5, help="Number of measurements of each graph (default 5)."
)
@click.option(
    "--blocks",
    metavar="N",
    type=click.IntRange(min=1),
    multiple=True,
    default=(10, 100),
    help="A model of N blocks, each of 100 nodes with one attention; may be repeated (default 10 and 100).",
)
@click.option("--dynamic", is_flag=True, help="Measure graphs with symbolic shapes.")
@click.option("--json", "path", type=click.Path(dir_okay=False, path_type=Path), help="Write the raw data here.")
def bench_pass(repeats: int, blocks: tuple[int, ...], dynamic: bool, path: Path | None) -> None:
    """Measure how long finding, choosing and splicing take, on graphs of 1,000 and of 10,000 nodes.

    Capturing, which is PyTorch's tracing and takes most of the time, is measured separately.
    """
    from attnrewrite.bench.pass_times import print_pass_benchmark, run_pass_benchmark

    _check_writable(path)
    result = run_pass_benchmark(blocks, repeats, dynamic)
    print_pass_benchmark(result)
    _write(path, result.save)


@bench.command("exported")
@click.option(
    "--model",
    "models",
    type=click.Choice(["bert", "llama", "vit"]),
    multiple=True,
    help="Which models to measure; may be repeated (default: all).",
)
@click.option(
    "--size", type=click.Choice(["small", "base"]), default="base", help="One layer, or four wider ones (default base)."
)
@click.option("--repeats", type=click.IntRange(min=1), default=10, help="Number of calls of each package (default 10).")
@click.option("--json", "path", type=_FILE, help="Write the raw data here.")
def bench_exported(models: tuple[str, ...], size: str, repeats: int, path: Path | None) -> None:
    """Compare exported programs with rewritten ones, both compiled ahead of time, on the CPU.

    They run in a process that does not import attnrewrite. It takes a minute or two for each model.
    """
    from attnrewrite.bench.exported import print_exported_benchmark, run_exported_benchmark
    from attnrewrite.errors import AttnRewriteError

    _check_writable(path)
    try:
        result = run_exported_benchmark(models, repeats, size)
    except AttnRewriteError as error:
        raise _BadInput(_in_a_line(error)) from error
    print_exported_benchmark(result)
    _write(path, result.save)


@bench.command("start")
@click.option(
    "--model",
    "models",
    metavar="NAME",
    multiple=True,
    help="bert, llama or unet, on a GPU gpt2, t5, clip or gemma2 as well; may be repeated (default: all).",
)
@click.option(
    "--size", type=click.Choice(["small", "base"]), default="base", help="One layer, or whole models (default base)."
)
@click.option("--device", metavar="DEVICE", default="", help="Default: the GPU if there is one, else the CPU.")
@click.option("--repeats", type=click.IntRange(min=1), default=5, help="Number of starts of each kind (default 5).")
@click.option("--json", "path", type=_FILE, help="Write the raw data here.")
def bench_start(models: tuple[str, ...], size: str, device: str, repeats: int, path: Path | None) -> None:
    """Compare the first call of compiled models, cold and warm, with plain torch.compile.

    Each start is a process of its own; a cold one takes up to a minute.
    """
    from attnrewrite.bench.start import print_start_benchmark, run_start_benchmark
    from attnrewrite.errors import AttnRewriteError

    _check_writable(path)
    place = _usable_device(device)
    try:
        result = run_start_benchmark(models, repeats, size, place)
    except (AttnRewriteError, RuntimeError) as error:
        raise _BadInput(_in_a_line(error)) from error
    print_start_benchmark(result)
    _write(path, result.save)


@bench.command("sites")
@click.option(
    "--grid",
    "grids",
    type=click.Choice(["small", "main", "other", "training"]),
    multiple=True,
    help="Which attentions to measure; may be repeated (default: main on a GPU, small on a CPU).",
)
@click.option(
    "--kernels",
    metavar="NAME[,NAME...]",
    help="Which kernels to measure (default: every exact kernel that can run here).",
)
@click.option("--device", metavar="DEVICE", default="", help="Default: the GPU if there is one, else the CPU.")
@click.option(
    "--seconds", type=click.FloatRange(min=0.01), default=0.5, help="Seconds to time each site for (default 0.5)."
)
@click.option(
    "--workers", type=click.IntRange(min=1), default=1, help="Number of processes that compile in parallel (default 1)."
)
@click.option("--json", "path", type=_FILE, help="Write the raw data here.")
@click.option("--table", type=_FILE, help="Write the times here, as a table for the automatic choice.")
@click.option("--plot", type=_FILE, help="Draw the times into this file (.png, .svg, .pdf); needs matplotlib.")
def bench_sites(
    grids: tuple[str, ...],
    kernels: str | None,
    device: str,
    seconds: float,
    workers: int,
    path: Path | None,
    table: Path | None,
    plot: Path | None,
) -> None:
    """Time every kernel on a grid of attentions, and compare the automatic choice with the fastest.

    The table shows the median milliseconds of a call; the fastest kernel is bold, the automatic choice has a star. The
    raw data also have spread, peak memory, times within CUDA graphs and errors against float64.
    """
    for file in (path, table, plot):
        _check_writable(file)
    _check_plot(plot)

    from attnrewrite.bench.cases import GRIDS
    from attnrewrite.bench.sites import plot_sites, print_sites_benchmark, run_sites_benchmark
    from attnrewrite.errors import AttnRewriteError
    from attnrewrite.options.request import kernel_names

    place = _usable_device(device)
    cases = [case for grid in grids or (("small",) if place == "cpu" else ("main",)) for case in GRIDS[grid]]
    try:
        names = kernel_names(kernels, "--kernels") if kernels else ()
        result = run_sites_benchmark(cases, names, place, seconds, workers)
    except AttnRewriteError as error:
        raise _BadInput(_in_a_line(error)) from error
    print_sites_benchmark(result)
    _write(path, result.save)
    _write(table, result.save_table)
    _write(plot, lambda file: plot_sites(result, file))


@bench.command("models")
@click.option(
    "--model",
    "models",
    metavar="NAME",
    multiple=True,
    help="gpt2, bert, t5, clip, llama, gemma2, unet, or package.module:factory, as explain takes it; may be repeated "
    "(default: the seven).",
)
@click.option(
    "--size",
    type=click.Choice(["small", "base"]),
    help="Of the seven: base has the published models' widths (default: base on a GPU, small on a CPU).",
)
@click.option("--training", is_flag=True, help="Measure a forward and a backward pass.")
@click.option("--device", metavar="DEVICE", default="", help="Default: the GPU if there is one, else the CPU.")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "float16", "bfloat16"]),
    help="Default: float32 on a CPU; on a GPU bfloat16, and float16 for the UNet.",
)
@click.option("--mode", help="Of torch.compile, such as reduce-overhead.")
@click.option("--repeats", type=click.IntRange(min=1), default=10, help="Number of measurements of each (default 10).")
@click.option("--warm/--no-warm", default=True, help="Measure the first call with filled caches, too (default).")
@click.option("--json", "path", type=_FILE, help="Write the raw data here.")
@click.option("--plot", type=_FILE, help="Draw the times into this file (.png, .svg, .pdf); needs matplotlib.")
def bench_models(
    models: tuple[str, ...],
    size: str | None,
    training: bool,
    device: str,
    dtype: str | None,
    mode: str | None,
    repeats: int,
    warm: bool,
    path: Path | None,
    plot: Path | None,
) -> None:
    """Compare whole models under eager, torch.compile, torch.compile of their own sdpa path, and attnrewrite.

    The seven models are classes of transformers and diffusers with random weights, their attention written out.
    """
    for file in (path, plot):
        _check_writable(file)
    _check_plot(plot)

    import torch

    from attnrewrite.bench.models import Settings, plot_models, print_models_benchmark, run_models_benchmark
    from attnrewrite.errors import AttnRewriteError

    place = _usable_device(device)
    half = getattr(torch, dtype) if dtype else None
    settings = Settings(torch.device(place), half, training, mode, warm, repeats)
    try:
        cases = _model_cases(models, size or ("small" if place == "cpu" else "base"))
        result = run_models_benchmark(cases, settings)
    except AttnRewriteError as error:
        raise _BadInput(_in_a_line(error)) from error
    print_models_benchmark(result)
    _write(path, result.save)
    _write(plot, lambda file: plot_models(result, file))


def _model_cases(names: Sequence[str], size: str) -> list[Any]:
    """The models of these names; all of them if there are none."""
    from attnrewrite.bench.model_cases import MODELS, ModelCase

    known = MODELS[size]
    cases = []
    for name in names or known:
        if name not in known and ":" not in name:
            raise _BadInput(f"--model {name}: write one of {', '.join(known)}, or package.module:factory")
        cases.append(known.get(name) or ModelCase(name, functools.partial(_module_and_inputs, name)))
    return cases


def _module_and_inputs(factory: str) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    from torch import nn

    model, args, kwargs = _model_and_inputs(_made_by(factory, traceback=False), factory)
    if not isinstance(model, nn.Module):
        raise _BadInput(f"{factory} returned a {type(model).__name__}; return a torch.nn.Module and its inputs")
    return model, args, kwargs


def _usable_device(device: str) -> str:
    """The device that is asked for; by default the GPU if there is one, else the CPU."""
    import torch

    place = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if place.startswith("cuda") and not torch.cuda.is_available():
        raise _BadInput(f"--device {place}: PyTorch finds no GPU here; omit the option, or run attnrewrite doctor")
    try:
        torch.zeros(1, device=place).item()
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise _BadInput(
            f"--device {place}: PyTorch cannot use it ({reason}); pass cpu, cuda or cuda:N, or omit the option"
        ) from error
    return place


def _in_a_line(error: Exception) -> str:
    """The message of an error, without the list that may follow it."""
    return str(getattr(error, "message", error))


def _check_writable(path: Path | None) -> None:
    """Raises an error before the work if the file's directory does not exist."""
    if path is not None and not path.parent.is_dir():
        raise _BadInput(f"the data could not be written to {path}: {path.parent} is not a directory")


def _check_plot(path: Path | None) -> None:
    if path is not None and importlib.util.find_spec("matplotlib") is None:
        raise _BadInput("--plot needs matplotlib: pip install 'attnrewrite[plot]'")


def _write(path: Path | None, save: Callable[[Path], object]) -> None:
    if path is None:
        return
    try:
        save(path)
    except (OSError, ValueError) as error:  # matplotlib raises ValueError for a format that it does not know.
        words = getattr(error, "strerror", None) or error
        raise _BadInput(f"the data could not be written to {path}: {words}") from error
    click.echo(f"Wrote {path}", err=True)


def _made_by(factory: str, traceback: bool) -> Any:
    """The result of the function that "package.module:factory" names."""
    # As with `python -m`, so that modules in the current directory are found.
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    function = _load(factory, traceback)
    with _users_code(f"{factory}()", traceback):
        return function()


def _load(target: str, traceback: bool) -> Callable[[], Any]:
    """The callable that "package.module:factory" names."""
    module_name, colon, path = target.partition(":")
    if not module_name or not colon or not path:
        raise _BadInput(f"{target!r} does not name a factory; write package.module:factory")
    with _users_code(f"import {module_name}", traceback):
        try:
            found: Any = importlib.import_module(module_name)
        except ImportError as error:
            if traceback:
                raise
            hint = ""
            if isinstance(error, ModuleNotFoundError) and error.name and module_name.startswith(error.name):
                hint = f" (looked in {Path.cwd()} and on the Python path)"
            raise _BadInput(f"{module_name} could not be imported: {error}{hint}") from error
    where = module_name
    for name in path.split("."):
        if not hasattr(found, name):
            raise _BadInput(f"{where} has no attribute {name!r}{_near_matches(name, found)}")
        found, where = getattr(found, name), f"{where}.{name}"
    if not callable(found):
        kind = type(found).__name__
        raise _BadInput(f"{target} is of type {kind}, not a function; name a function that takes no arguments")
    if not _accepts(found):
        raise _BadInput(f"{target} must be callable without arguments; it takes {_signature(found)}")
    return found  # type: ignore[no-any-return]


def _near_matches(name: str, owner: object) -> str:
    names = [candidate for candidate in dir(owner) if not candidate.startswith("_")]
    # The comparison ignores case, the most frequent mistake.
    lowered = {candidate.lower(): candidate for candidate in names}
    near = [lowered[match] for match in difflib.get_close_matches(name.lower(), lowered)]
    return f"; did you mean {' or '.join(near)}?" if near else ""


def _signature(function: Callable[..., Any]) -> str:
    try:
        return str(inspect.signature(function))
    except (ValueError, TypeError):
        return "(...)"


def _accepts(function: Callable[..., Any], *args: Any, **kwargs: Any) -> bool:
    """Whether the function can be called with these arguments, as far as its signature says."""
    try:
        signature = inspect.signature(function)
    except (ValueError, TypeError):  # a builtin without a signature
        return True
    try:
        signature.bind(*args, **kwargs)
    except TypeError:
        return False
    return True


def _model_and_inputs(made: Any, factory: str) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]:
    """The model and its arguments, from what the factory returned."""
    model, args, kwargs = made, (), {}
    if isinstance(made, Mapping):
        unknown = sorted(str(key) for key in made if key not in ("model", "args", "kwargs"))
        if "model" not in made or unknown:
            wrong = f"the unknown key {unknown[0]!r}" if unknown else "no key 'model'"
            _bad_return(factory, f"a dict with {wrong}")
        model, args, kwargs = made["model"], made.get("args", ()), made.get("kwargs", {})
    elif isinstance(made, tuple):
        if not 1 <= len(made) <= 3:
            _bad_return(factory, f"a tuple of {len(made)}")
        model, args, kwargs = (*made, (), {})[:3] if len(made) == 1 else (*made, {})[:3]
    if not callable(model):
        _bad_return(factory, f"an object of type {type(model).__name__} as the model")
    if not isinstance(args, (tuple, list)):
        _bad_return(factory, f"args of type {type(args).__name__}; args is a tuple such as (input_ids,)")
    if not isinstance(kwargs, Mapping) or not all(isinstance(key, str) for key in kwargs):
        _bad_return(factory, f"kwargs of type {type(kwargs).__name__}; kwargs is a dict from names to inputs")
    forward = getattr(model, "forward", model)
    if not args and not kwargs and not _accepts(forward):
        raise _BadInput(
            f"{factory} returned a model without inputs, but the model takes {_signature(forward)}; "
            "return (model, args) or (model, args, kwargs)"
        )
    return model, tuple(args), dict(kwargs)


def _model_and_run(made: Any, factory: str) -> tuple[Any, Callable[[], Any], Callable[[], Any]]:
    """The model, the function that runs it, and the timestep callback, from what the factory returned."""
    names = ("model", "run", "current_timestep_callback")
    if isinstance(made, Mapping):
        wrong = [f"no key {name!r}" for name in names if name not in made]
        wrong += [f"the unknown key {str(key)!r}" for key in made if key not in names]
        if wrong:
            _bad_return(factory, f"a dict with {wrong[0]}", _RETURNS_A_RUN)
        parts = tuple(made[name] for name in names)
    elif isinstance(made, tuple) and len(made) == len(names):
        parts = made
    else:
        _bad_return(
            factory,
            f"a tuple of {len(made)}" if isinstance(made, tuple) else f"an object of type {type(made).__name__}",
            _RETURNS_A_RUN,
        )
    for name, part in zip(names[1:], parts[1:], strict=True):
        if not callable(part):
            _bad_return(factory, f"an object of type {type(part).__name__} as {name}", _RETURNS_A_RUN)
        if not _accepts(part):
            raise _BadInput(f"{name} of {factory} must be callable without arguments; it takes {_signature(part)}")
    return parts[0], parts[1], parts[2]


def _bad_return(factory: str, what: str, returns: str = _RETURNS) -> NoReturn:
    raise _BadInput(f"{factory} returned {what}; {returns}")


@contextlib.contextmanager
def _users_code(what: str, traceback: bool) -> Iterator[None]:
    """Reports an exception of the user's code in one line; with --traceback the exception passes unchanged."""
    try:
        yield
    except click.ClickException:
        raise
    except Exception as error:
        if traceback:
            raise
        # Dynamo appends advice on debugging; the first line says what happened.
        first = next(iter(str(error).strip().splitlines()), "")
        message = f"{type(error).__name__}: {first}" if first else type(error).__name__
        raise _BadInput(f"{what} raised {message} (run with --traceback for the full traceback)") from error
