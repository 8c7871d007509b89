"""The ``torch.compile`` backend: one graph in, one compiled callable out, and a report on the way."""

from __future__ import annotations

import contextlib
import copy
import itertools
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import Any

import torch
from torch import fx

from attnrewrite.analysis.scores import leads_to_product
from attnrewrite.caching.call import current_call
from attnrewrite.caching.compiled import Kept, kept_attention
from attnrewrite.caching.identity import Identity, identity_of
from attnrewrite.caching.session import Session
from attnrewrite.capture.known_buffers import Constants
from attnrewrite.capture.legalize import legalised
from attnrewrite.capture.support import CaptureError
from attnrewrite.capture.trace import capture
from attnrewrite.errors import KernelError, OptionError
from attnrewrite.inner import CompiledFn, InnerCompiler
from attnrewrite.numerics.tolerance import Admission, admitted
from attnrewrite.numerics.verify import Original, verified
from attnrewrite.options.compile_options import DATA_DEPENDENT_SIZES, Policy
from attnrewrite.options.environment import debug_directory
from attnrewrite.passes.pipeline import as_asked, rewrite
from attnrewrite.passes.result import Rewritten
from attnrewrite.patterns import PatternError
from attnrewrite.report.dump import dump_graph
from attnrewrite.report.graph_code import graph_source
from attnrewrite.report.report import RewriteReport
from attnrewrite.report.rows import GraphReport
from attnrewrite.selection.decorated_parts import say_what_is_lost
from attnrewrite.selection.requests import unmatched_rules
from attnrewrite.torch_private import CompileContext, dynamo_config, trace_structured
from attnrewrite.variants import Variants

__all__ = ["attnrewrite", "collect_reports"]

log = logging.getLogger("attnrewrite")

aten = torch.ops.aten

_collector: ContextVar[list[GraphReport] | None] = ContextVar("attnrewrite_collector", default=None)
_unnamed = itertools.count()


@contextlib.contextmanager
def collect_reports() -> Iterator[list[GraphReport]]:
    """Gathers the report of every graph that is compiled inside, source code included."""
    reports: list[GraphReport] = []
    token = _collector.set(reports)
    try:
        yield reports
    finally:
        _collector.reset(token)


def attnrewrite(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> CompiledFn:
    """What ``torch.compile(model, backend="attnrewrite", mode=mode, options=options)`` calls for each graph.

    Args:
        gm: Dynamo's graph.
        example_inputs: its inputs.
        mode: Inductor's mode; default None.
        options: ``inner_backend`` (default ``"inductor"``), ``assume_attended_rows`` (default False), ``verify``
            and ``checks`` (default False), ``tolerance`` (default None), ``kernels`` and the like, and whatever the
            inner backend takes; see docs/options.md.

    Raises:
        OptionError: an option is unknown or has a wrong value.
        KernelError: with ``strict``, a site that no kernel that was asked for can serve.
    """
    policy = Policy.from_options(options, mode)
    if policy.capture_dynamic_output_shape_ops and not dynamo_config.capture_dynamic_output_shape_ops:
        raise OptionError(
            f"options[{DATA_DEPENDENT_SIZES!r}] comes too late for torch.compile, which has traced the graph: set "
            f"torch._dynamo.config.{DATA_DEPENDENT_SIZES} = True, or use accelerate_attention"
        )
    gm = legalised(gm)
    call = current_call()
    if policy.cache is None or (call is not None and call.is_of_graph):
        return _with_variants(gm, example_inputs, policy)
    if call is not None:
        raise OptionError(
            "the model was compiled with options['cache'], and attnrewrite.enable_cache was called on it: leave one out"
        )
    session = Session(policy.cache)
    with session.planned():
        return session.around_graph(_with_variants(gm, example_inputs, policy), gm)


def _with_variants(gm: fx.GraphModule, example_inputs: Sequence[Any], policy: Policy) -> CompiledFn:
    compiled, varies = _compiled(gm, example_inputs, policy)
    if not varies:
        return compiled
    return Variants(gm, example_inputs, lambda gm, inputs: _compiled(gm, inputs, policy)[0]).add(compiled)


def _compiled(gm: fx.GraphModule, example_inputs: Sequence[Any], policy: Policy) -> tuple[CompiledFn, bool]:
    """The compiled graph under the request and the plan in force, and whether it depends on them."""
    call = current_call()
    inner = InnerCompiler(policy)
    report = GraphReport(_graph_name(), inner_backend=inner.name, node_count=len(gm.graph.nodes))
    report.notes += say_what_is_lost(gm, policy)
    wanted = _collector.get() is not None or debug_directory() is not None
    before = after = result = gm
    rewritten = Rewritten()
    identity: Identity | None = None
    original: Original | None = None
    admission: Admission | None = None
    constants = Constants(gm, example_inputs)
    try:
        captured = capture(gm, example_inputs)
    except CaptureError as reason:
        report.captured, report.reason = False, str(reason)
        keep_attention = False
    else:
        report.seconds["capture"] = captured.seconds
        constants.attach(captured.gm)
        identity = None if call is None else identity_of(captured.gm)
        if wanted:
            before = fx.GraphModule(captured.gm, copy.deepcopy(captured.gm.graph))
        original = Original(captured.gm) if policy.verify else None
        try:
            if policy.tolerance is not None:
                start = time.perf_counter()
                admission = admitted(captured.gm, policy, example_inputs, policy.tolerance)
                report.seconds["tolerance"] = time.perf_counter() - start
            asking = as_asked if admission is None else admission.asking
            rewritten = rewrite(
                captured.gm,
                policy,
                asking,
                with_kinds=call is not None,
                with_batch=call is not None and call.plan.halves,
            )
        except KernelError:
            raise
        except Exception as error:  # A defect of ours must not break the user's model; it is reported.
            advice = "" if isinstance(error, PatternError) else ", please report this"
            log.warning("%s: rewriting failed%s", report.name, advice, exc_info=True)
            report.reason = f"rewriting failed, so the graph is as it was: {type(error).__name__}: {error}"
            keep_attention = True
        else:
            report.sites = rewritten.sites
            report.unmatched_rules = unmatched_rules(policy, [site.location for site in report.sites])
            report.seconds.update(rewritten.seconds)
            if admission is not None:
                admission.tell(report.sites)
                report.notes += admission.notes
            keep_attention = _holds_softmax_of_product(captured.gm)
            # Where nothing was rewritten the inner compiler gets what it would get without us.
            result = captured.gm if rewritten.changed else gm
            after = captured.gm
    if keep_attention and inner.name == "inductor":
        report.notes.append("Inductor's own attention patterns are kept from this graph")
    if rewritten.round_like_eager and inner.name == "inductor":
        report.notes.append("Inductor rounds half-precision results as eager does (emulate_precision_casts)")
    kept: Kept | None = None
    if call is not None:
        found = {id(row) for row, _, _ in rewritten.results}
        missed = [row for row in rewritten.sites if id(row) not in found]
        call.found((), [f"{row.location} is not taken for attention ({row.reason})" for row in missed])
    if call is not None and rewritten.results:
        try:
            assert identity is not None
            kept = kept_attention(captured.gm, example_inputs, rewritten, identity, call)
        except Exception as error:  # As above: the model runs without reuse.
            log.warning("%s: attention cannot be kept, please report this", report.name, exc_info=True)
            report.notes.append(f"attention is not kept: {type(error).__name__}: {error}")
    if kept is not None and original is not None:
        report.notes.append("graphs that keep attention values are not verified")
    if wanted:
        report.before_code, report.after_code = graph_source(before), graph_source(after)
    _publish(report)
    directory = debug_directory()
    if directory is not None:
        dump_graph(report, before, after, example_inputs, directory)
    start = time.perf_counter()
    round_like_eager = rewritten.round_like_eager
    unchanged: CompiledFn | None = None
    if kept is not None:
        compiled: CompiledFn = kept.compiled(
            lambda gm, more: inner.compile(
                gm, [*example_inputs, *more], keep_attention=keep_attention, round_like_eager=round_like_eager
            ),
            copies=policy.cuda_graphs,
        )
        report.seconds["inner"] = time.perf_counter() - start
        return (constants.guarded(compiled, gm.forward, report.name) if rewritten.changed else compiled), True
    if original is not None and rewritten.changed:
        # Now and not when it is needed: guards that compiling adds belong to this compilation of Dynamo's. If it is
        # needed, its attention is left as it is on purpose.
        unchanged = inner.compile(gm, example_inputs, keep_attention=True, round_like_eager=round_like_eager)
    compiled = inner.compile(result, example_inputs, keep_attention=keep_attention, round_like_eager=round_like_eager)
    report.seconds["inner"] = time.perf_counter() - start
    if original is not None and unchanged is not None:
        compiled = verified(original, captured.gm, report, unchanged, compiled)
    if rewritten.changed:
        compiled = constants.guarded(compiled, gm.forward, report.name)
    return compiled, rewritten.offered or bool(rewritten.results)


def _graph_name() -> str:
    """Dynamo's own number for the graph ("graph_0_1": frame 0, its second compilation), where there is one."""
    compile_id = CompileContext.current_compile_id()
    if compile_id is None:
        return f"graph_x{next(_unnamed)}"
    return "graph_" + str(compile_id).replace("/", "_")


def _holds_softmax_of_product(gm: fx.GraphModule) -> bool:
    memo: dict[fx.Node, bool] = {}
    return any(
        node.target in (aten.softmax.int, aten._softmax.default, aten._safe_softmax.default, aten.exp.default)
        and leads_to_product(node.args[0], memo)
        for module in gm.modules()
        if isinstance(module, fx.GraphModule)
        for node in module.graph.nodes
    )


def _publish(report: GraphReport) -> None:
    """The collector, the log (``TORCH_LOGS=+attnrewrite``) and the structured trace (``TORCH_TRACE``)."""
    collector = _collector.get()
    if collector is not None:
        collector.append(report)
    if not report.captured:
        log.warning("%s: not captured, passed on to %s as it is: %s", report.name, report.inner_backend, report.reason)
    else:
        log.info("%s: %d of %d attention sites rewritten", report.name, len(report.rewritten), len(report.sites))
    for site in report.sites:
        log.debug("%s %s at %s: %s %s", site.name, site.pattern, site.location, site.status, site.kernel or site.reason)
        if site.cached:
            log.debug("%s is reused across steps: %s", site.name, site.cached)
    trace_structured(
        "artifact",
        metadata_fn=lambda: {"name": "attnrewrite_report", "encoding": "json"},
        payload_fn=lambda: RewriteReport(model=report.name, graphs=[report]).to_json(),
    )
