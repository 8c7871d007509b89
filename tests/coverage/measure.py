"""What becomes of one model, as a row of plain data."""

from __future__ import annotations

import contextlib
import math
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._dynamo.utils import counters
from torch._inductor.compile_fx import compile_fx

from attnrewrite.backend import collect_reports
from attnrewrite.numerics.judge import HALF
from attnrewrite.report.rows import GraphReport
from tests.coverage import entries_packages, entries_transformers, repositories
from tests.coverage.case import Case
from tests.coverage.precision import DoesNotRun, Measured, judged, measured_in
from tests.support.helpers import outputs, rewritten

__all__ = [
    "CASES",
    "GRADIENT_LIMIT",
    "ROOT",
    "VALUE_LIMIT",
    "compare_gradients",
    "counts",
    "fused_by_inductor",
    "measure",
    "outputs_of",
    "parameter_gradients",
    "parameter_gradients_of",
    "randomize",
    "relative_error",
    "warm_up",
]

CASES: dict[str, Case] = {
    case.name: case for case in (*entries_transformers.CASES, *entries_packages.CASES, *repositories.CASES)
}

ROOT = Path(__file__).parents[2]

VALUE_LIMIT = 1e-5
GRADIENT_LIMIT = 1e-4
BESIDE = 2**-2
"""A gradient this small beside the others of the model is a difference of larger numbers, and has their rounding."""

Row = dict[str, Any]


def measure(
    case: Case,
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    gradients: bool = True,
    inductor: bool = True,
) -> Row:
    """The row of one model; a step that fails is named under ``failures`` and the next ones are still taken.

    ``wrong`` has what the judge says of the values and the gradients, and ``does_not_run`` what eager raises in half
    precision.
    """
    row: Row = {
        "name": case.name,
        "package": case.package,
        "form": case.form,
        "sites": case.sites,
        "rightly_kept": case.kept,
        "why_kept": case.why_kept,
        "dtype": str(dtype).removeprefix("torch."),
        "failures": {},
        "wrong": {},
    }
    try:
        row["version"] = metadata.version(case.package) if case.group == "packages" else ""
    except metadata.PackageNotFoundError:
        row["failures"]["build"] = f"{case.package} is not installed"
        return row
    steps: list[tuple[str, Callable[[Measured, Row], None]]] = [("rewrite", _values)]
    if inductor:
        steps.append(("inductor", _inductor))
    if gradients:
        steps.append(("gradients", _gradients))
    for name, step in steps:
        torch._dynamo.reset()
        start = time.perf_counter()
        try:
            with _tensors_made_on(device, measured_in(dtype, built(case).to(device), case.inputs())) as measured:
                step(measured, row)
        except DoesNotRun as error:
            row["does_not_run"] = {**row.get("does_not_run", {}), name: str(error)}
            if name == "rewrite":
                return row
        except Exception as error:  # noqa: BLE001 - Any failure of a model is a result.
            row["failures"][name] = _relative(f"{type(error).__name__}: {str(error).strip()[:2000]}")
        row.setdefault("seconds", {})[name] = round(time.perf_counter() - start, 1)
    return row


@contextlib.contextmanager
def _tensors_made_on(device: str, measured: Measured) -> Iterator[Measured]:
    """Modules that say nothing of a device make their masks and positions on the default one."""
    torch.set_default_device(None if device == "cpu" else device)
    try:
        yield measured
    finally:
        torch.set_default_device(None)


def built(case: Case) -> nn.Module:
    model = case.build().eval()
    randomize(model)
    _calibrate(model, case.inputs())
    return model


def randomize(model: nn.Module) -> None:
    """Weights with which attention is far from uniform and every branch counts.

    Initial weights of small models make scores near zero, so that a lost scale or bias would not show, and some start
    layers at zero.
    """
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if not parameter.requires_grad or not parameter.is_floating_point():
            continue
        noise = torch.randn(parameter.shape, generator=generator)
        with torch.no_grad():
            if parameter.dim() >= 2:
                parameter.copy_(noise * max(1, parameter[0].numel()) ** -0.5)
            else:
                parameter.add_(0.1 * noise)


def _calibrate(model: nn.Module, inputs: dict[str, Any]) -> None:
    """Statistics of batch norms that fit the weights, or attention fades on the way to the output."""
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    if not norms:
        return
    for norm in norms:
        norm.train()
        norm.momentum = 1.0
    with torch.no_grad():
        model(**inputs)
    for norm in norms:
        norm.eval()


def _values(measured: Measured, row: Row) -> None:
    model, inputs = measured.model, measured.inputs
    with torch.no_grad():
        own = measured.own(outputs_of)
        truth = measured.truth(outputs_of)
        before = Counter(counters["graph_break"])
        with collect_reports() as graphs:
            new = measured.new(rewritten(model, "aot_eager"), outputs_of)
        row["graphs"] = len(graphs)
        row["graph_breaks"] = [" ".join(text.split())[:200] for text in Counter(counters["graph_break"]) - before]
        row.update(counts(graphs))
        row["eager_has_nan"] = any(bool(value.isnan().any()) for value in own)
        _note("values", row, *judged(measured, outputs_of, new, own, truth))
        if measured.dtype in HALF:
            row["error"], row["error_of_eager"] = relative_error(new, truth), relative_error(own, truth)
            return
        row["error"] = relative_error(new, own)
        if row["error"] > VALUE_LIMIT:
            torch._dynamo.reset()
            control = torch.compile(model, backend="aot_eager")
            row["error_of_aot_eager"] = relative_error(outputs(control(**inputs)), own)


def outputs_of(
    call: Callable[..., Any], parameters: dict[str, torch.Tensor], inputs: dict[str, Any]
) -> list[torch.Tensor]:
    return outputs(call(**inputs))


def _note(what: str, row: Row, wrong: str, excused: str) -> None:
    if wrong:
        row["wrong"][what] = wrong
    if excused:
        row.setdefault("as_far_off_as_eager_elsewhere", {})[what] = excused


def counts(graphs: list[GraphReport]) -> Row:
    sites = [site for graph in graphs for site in graph.sites]
    return {
        "rewritten": sum(site.status == "rewritten" for site in sites),
        "kept": [
            {"reason": _relative(site.reason), "where": _relative(str(site.location))}
            for site in sites
            if site.status == "kept"
        ],
        "not_captured": [graph.reason for graph in graphs if not graph.captured],
        "defects": [graph.reason for graph in graphs if graph.captured and graph.reason],
    }


def _relative(text: str) -> str:
    """Paths of installed files, from their package on, and of this repository's, from its root on."""
    return re.sub(r"[^\s(,]*site-packages/", "", text).replace(f"{ROOT}/", "")


def relative_error(actual: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """The largest difference relative to the largest number of each tensor; infinite where only one is not finite."""
    worst = 0.0
    for a, e in zip(actual, expected, strict=True):
        if a.shape != e.shape:
            return math.inf
        a, e = a.double(), e.double()
        if not torch.equal(a.isfinite(), e.isfinite()):
            return math.inf
        finite = e.isfinite()
        if finite.any():
            worst = max(worst, float((a - e)[finite].abs().max() / e[finite].abs().max().clamp_min(1e-30)))
    return worst


def _inductor(measured: Measured, row: Row) -> None:
    row["inductor"] = fused_by_inductor(measured.model, measured.inputs)


def fused_by_inductor(model: Callable[..., Any], inputs: dict[str, Any]) -> int:
    """How many attentions Inductor's own pass fuses in inference; no code is generated."""

    def passed_on(gm: torch.fx.GraphModule, example_inputs: list[Any], **_: Any) -> Any:
        def boxed(values: list[Any]) -> Any:
            results = gm(*values)
            values.clear()
            return results

        boxed._boxed_call = True  # type: ignore[attr-defined]
        return boxed

    def backend(gm: torch.fx.GraphModule, example_inputs: list[Any]) -> Any:
        return compile_fx(gm, example_inputs, inner_compile=passed_on)

    before = counters["inductor"]["fuse_attention"]
    with torch.no_grad():
        torch.compile(model, backend=backend)(**inputs)
    count: int = counters["inductor"]["fuse_attention"] - before
    return count


def _gradients(measured: Measured, row: Row) -> None:
    own, truth = measured.own(parameter_gradients_of), measured.truth(parameter_gradients_of)
    if measured.dtype in HALF:
        with collect_reports() as graphs:
            new = measured.new(rewritten(measured.model, "aot_eager"), parameter_gradients_of)
        row["gradient_error"], _ = gradient_error(new, truth)
        row["gradient_error_of_eager"], _ = gradient_error(own, truth)
    else:
        new, graphs = compared_gradients(measured.model, measured.inputs, own, row)
    row["with_gradients"] = counts(graphs)
    found = judged(measured, parameter_gradients_of, new, own, truth, beside=BESIDE, whole=True, names=list(own))
    _note("gradients", row, *found)


def compare_gradients(
    model: nn.Module, inputs: dict[str, Any], expected: dict[str, torch.Tensor], row: Row
) -> list[GraphReport]:
    """As :func:`compared_gradients`, without the gradients."""
    return compared_gradients(model, inputs, expected, row)[1]


def compared_gradients(
    model: nn.Module, inputs: dict[str, Any], expected: dict[str, torch.Tensor], row: Row
) -> tuple[dict[str, torch.Tensor], list[GraphReport]]:
    """Writes the errors of the rewritten model's gradients into ``row``; where they are too large, those without it."""
    with collect_reports() as graphs:
        actual = parameter_gradients(model, rewritten(model, "aot_eager"), inputs)
    row["gradient_error"], row["wrong_gradients"] = gradient_error(actual, expected)
    if row["gradient_error"] > GRADIENT_LIMIT or row["wrong_gradients"]:
        torch._dynamo.reset()
        control = parameter_gradients(model, torch.compile(model, backend="aot_eager"), inputs)
        row["gradient_error_of_aot_eager"], row["wrong_gradients_of_aot_eager"] = gradient_error(control, expected)
    return actual, graphs


def gradient_error(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> tuple[float, list[str]]:
    """The largest error of a parameter's gradient, and the parameters beyond what tests/whole/test_models.py allows.

    A gradient that is rounding noise, as that of a bias of keys, is compared with the model's largest gradient.
    """
    largest = max(float(gradient.nan_to_num().abs().max()) for gradient in expected.values())
    worst, wrong = 0.0, []
    for name, gradient in expected.items():
        own = float(gradient.nan_to_num().abs().max())
        # NaN in both is the same: eager's own, in a module whose rows may have no key.
        alike = actual[name].isnan() & gradient.isnan()
        error = float((actual[name] - gradient).masked_fill(alike, 0.0).abs().max())
        worst = max(worst, error / (own + 1e-2 * largest)) if math.isfinite(error) else math.inf
        if not error <= 1e-4 * own + 1e-6 * largest:
            wrong.append(name)
    return worst, wrong


def parameter_gradients(model: nn.Module, call: Callable[..., Any], inputs: dict[str, Any]) -> dict[str, torch.Tensor]:
    model.zero_grad()
    return parameter_gradients_of(call, dict(model.named_parameters()), inputs)


def parameter_gradients_of(
    call: Callable[..., Any], parameters: dict[str, torch.Tensor], inputs: dict[str, Any]
) -> dict[str, torch.Tensor]:
    generator = torch.Generator("cpu").manual_seed(1)
    total = torch.zeros(())
    for output in outputs(call(**inputs)):
        if output.requires_grad and output.is_floating_point():
            weights = torch.randn(output.shape, generator=generator, device="cpu").to(output.device)
            total = total + (torch.where(output.isfinite(), output, 0) * weights).sum()
    torch.autograd.backward(total)
    # A parameter that the output does not depend on has no gradient in eager, and one of zeros when compiled.
    return {
        name: torch.zeros_like(value) if value.grad is None else value.grad.clone()
        for name, value in parameters.items()
        if value.requires_grad
    }


def warm_up() -> None:
    """Loads what every model needs: the compilers, and Inductor's attention patterns."""
    import transformers  # noqa: F401

    def attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return torch.softmax(query @ key.transpose(-2, -1) / 2, -1) @ value

    inputs = {name: torch.ones(1, 2, 4, 4) for name in ("query", "key", "value")}
    fused_by_inductor(attention, inputs)
    rewritten(attention, "aot_eager")(**inputs)
    torch._dynamo.reset()
