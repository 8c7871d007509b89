"""``explain``: reports what attnrewrite does to a model, without keeping the compiled result."""

from __future__ import annotations

import contextlib
import dataclasses
import platform
from collections.abc import Callable, Iterator, Mapping
from importlib import metadata
from typing import Any

import torch
from torch.export import ExportedProgram

from attnrewrite.api.exported import rewritten_and_report
from attnrewrite.backend import attnrewrite, collect_reports
from attnrewrite.caching.session import Session
from attnrewrite.errors import CacheError, ExportError
from attnrewrite.options.cache_config import validated
from attnrewrite.options.compile_options import tracing_settings
from attnrewrite.report.report import RewriteReport
from attnrewrite.selection.decorated_parts import inner_backend_is_given
from attnrewrite.torch_private import dynamo_config, graph_breaks, original_module

__all__ = ["explain"]


def explain(
    model: Callable[..., Any],
    *args: Any,
    options: Mapping[str, Any] | None = None,
    dynamic: bool | None = None,
    **kwargs: Any,
) -> RewriteReport:
    """Runs ``model(*args, **kwargs)`` once through the backend, and reports on every graph of it.

    The model runs in the grad mode and the training mode of the caller, and its parameters' gradients are not changed.
    Later calls of ``torch.compile`` find nothing compiled.

    Args:
        model: an ``nn.Module`` or a function; or a program of ``torch.export``, without inputs and with the options of
            :func:`attnrewrite.rewrite`.
        args, kwargs: the model's inputs.
        options: as for ``torch.compile(model, backend="attnrewrite", options=...)``. The inner backend is "eager" by
            default, since only the rewriting is of interest. With ``cache``, a module runs as in the first call under
            :func:`attnrewrite.enable_cache`, without gradients; nothing is reused.
        dynamic: as for ``torch.compile``; default None.
    """
    if isinstance(model, ExportedProgram):
        if args or kwargs or dynamic is not None:
            raise ExportError("an exported program is read, not run: explain takes the program and options alone")
        return rewritten_and_report(model, options)[1]
    chosen = {"inner_backend": "eager", **(options or {})}
    reuse: contextlib.AbstractContextManager[object] = contextlib.nullcontext()
    if isinstance(model, torch.nn.Module) and chosen.get("cache") is not None:
        reuse = _planned(model, chosen.pop("cache"))

    def backend(gm: torch.fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        token = inner_backend_is_given.set("inner_backend" in (options or {}))
        try:
            return attnrewrite(gm, example_inputs, options=chosen)
        finally:
            inner_backend_is_given.reset(token)

    breaks_before = graph_breaks()
    # A new backend adds an entry to Dynamo's cache for the model's code. The limit on entries is meant for
    # recompilations.
    limits = {"recompile_limit": 2**31, "accumulated_recompile_limit": 2**31}
    settings = {**limits, **tracing_settings(options)}
    with collect_reports() as graphs, dynamo_config.patch(settings), reuse:
        torch.compile(model, backend=backend, dynamic=dynamic)(*args, **kwargs)
    breaks = graph_breaks() - breaks_before
    return RewriteReport(
        model=getattr(model, "__qualname__", type(model).__qualname__),
        graphs=graphs,
        graph_breaks=[" ".join(reason.split()) for reason in breaks],
        versions={
            "attnrewrite": metadata.version("attnrewrite"),
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    )


@contextlib.contextmanager
def _planned(model: torch.nn.Module, config: object) -> Iterator[None]:
    """Graphs that are compiled within are compiled for the first call of a run with a cache."""
    root = original_module(model)
    if root.training:
        raise CacheError(
            f"{type(root).__name__} is in training mode, and attention is reused at inference only: call model.eval()"
        )
    session = Session(dataclasses.replace(validated(config), memory_limit=None), root)
    with torch.no_grad(), session.planned():
        yield
