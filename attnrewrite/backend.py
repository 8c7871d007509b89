"""The ``torch.compile`` backend: compiles one graph to a callable, and reports what was rewritten."""

from __future__ import annotations

import contextlib
import copy
import itertools
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from attnrewrite.analysis.scores import leads_to_product
from attnrewrite.caching.call import current_call
from attnrewrite.caching.compiled import Kept, kept_attention
from attnrewrite.caching.identity import Identity, identity_of
from attnrewrite.caching.session import Session
from attnrewrite.capture.known_buffers import KnownBuffers
from attnrewrite.capture.legalize import legalized
from attnrewrite.capture.settled_floats import settle_floats
from attnrewrite.capture.substitutes import substitute_questions_about_masks
from attnrewrite.capture.support import CaptureError, computes_gradients, holds_higher_order
from attnrewrite.capture.trace import capture
from attnrewrite.errors import ContextParallelError, KernelError, OptionError
from attnrewrite.inner import CompiledFn, InnerCompiler
from attnrewrite.numerics.tolerance import Admission, admitted
from attnrewrite.numerics.verify import Original, verified
from attnrewrite.options.compile_options import DATA_DEPENDENT_SIZES, Policy
from attnrewrite.options.environment import debug_directory, raises_defects
from attnrewrite.parallel.conditions import Conditions
from attnrewrite.parallel.parallelize import parallelize
from attnrewrite.passes.pipeline import rewrite
from attnrewrite.passes.result import Rewritten
from attnrewrite.passes.rewriting import as_requested
from attnrewrite.passes.steps import Steps
from attnrewrite.passes.unread_weights import UnreadResults, UnreadWeights, with_standing
from attnrewrite.patterns import PatternError
from attnrewrite.report.dump import GraphDump
from attnrewrite.report.graph_code import graph_source
from attnrewrite.report.report import RewriteReport
from attnrewrite.report.rows import GraphReport
from attnrewrite.selection.decorated_parts import options_without_effect
from attnrewrite.selection.requests import unmatched_rules
from attnrewrite.torch_private import (
    CompileContext,
    compiles_to_be_saved,
    dynamo_config,
    leave_constants,
    pytorch_context_parallel,
    trace_structured,
)
from attnrewrite.variants import Variants
from attnrewrite.warm_start.entry import Entry, Place

__all__ = ["attnrewrite", "collect_reports"]

log = logging.getLogger("attnrewrite")

substitute_questions_about_masks()

aten = torch.ops.aten

_collector: ContextVar[tuple[list[GraphReport], bool] | None] = ContextVar("attnrewrite_collector", default=None)
"""Where reports go, and whether they have the source code of graphs."""

_unnamed = itertools.count()


@contextlib.contextmanager
def collect_reports(*, code: bool = True) -> Iterator[list[GraphReport]]:
    """Collects the report of every graph that is compiled inside.

    Args:
        code: whether reports have the source code of graphs; stored graphs (``warm_start``) then do not serve.
    """
    reports: list[GraphReport] = []
    token = _collector.set((reports, code))
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
    """Compiles a graph for ``torch.compile(model, backend="attnrewrite", mode=mode, options=options)``.

    Args:
        gm: Dynamo's graph.
        example_inputs: its inputs.
        mode: Inductor's mode; default None.
        options: ``inner_backend`` (default ``"inductor"``), ``assume_attended_rows`` (default False), ``verify``
            and ``checks`` (default False), ``tolerance`` (default None), ``kernels`` and the like, and whatever the
            inner backend takes; see docs/options.md.

    Raises:
        OptionError: an option is unknown or has a wrong value.
        KernelError: with ``strict``, no requested kernel can serve a site.
    """
    policy = Policy.from_options(options, mode)
    if policy.capture_dynamic_output_shape_ops and not dynamo_config.capture_dynamic_output_shape_ops:
        raise OptionError(
            f"options[{DATA_DEPENDENT_SIZES!r}] has no effect through torch.compile, which has already traced the "
            f"graph: set torch._dynamo.config.{DATA_DEPENDENT_SIZES} = True, or use accelerate_attention"
        )
    settle_floats(gm)
    try:
        # Legalized here, since the inner compiler gets this graph if it cannot be captured or has no attention.
        return _with_cache(legalized(gm), example_inputs, policy)
    finally:
        leave_constants()


def _with_cache(gm: fx.GraphModule, example_inputs: Sequence[Any], policy: Policy) -> CompiledFn:
    call = current_call()
    if policy.cache is None or (call is not None and call.is_of_graph):
        return _with_variants(gm, example_inputs, policy)
    if call is not None:
        raise OptionError(
            "the model was compiled with options['cache'], and attnrewrite.enable_cache was called on it: use only one "
            "of them"
        )
    session = Session(policy.cache)
    with session.planned():
        return session.around_graph(_with_variants(gm, example_inputs, policy), gm)


def _with_variants(gm: fx.GraphModule, example_inputs: Sequence[Any], policy: Policy) -> CompiledFn:
    if policy.context_parallel is not None and (compiles_to_be_saved() or current_call() is not None):
        raise ContextParallelError(
            "context_parallel: neither a graph that is saved to a file nor a call that reuses attention (enable_cache) "
            "can be shared among ranks: leave that, or the option, out"
        )
    if compiles_to_be_saved():
        # Without what is checked and chosen at each call, which would be around it.
        return _Compilation(gm, example_inputs, policy, knows_buffers=False).run()[0]
    compiled, varies = _Compilation(gm, example_inputs, policy).run()
    if not varies:
        return compiled
    variants = Variants(gm, example_inputs, lambda gm, inputs: _Compilation(gm, inputs, policy).run()[0])
    return variants.add(compiled)


@dataclass(frozen=True)
class _Source:
    """A captured graph, and what later steps need of it from before the rewriting, which is in place.

    Attributes:
        before: a copy for the report and the dump; the graph itself if neither is requested.
        original: a copy to verify against; None unless ``verify`` is on.
        identity: identifies the graph across compilations; None outside a call that reuses attention.
    """

    gm: fx.GraphModule
    before: fx.GraphModule
    original: Original | None
    identity: Identity | None


@dataclass(frozen=True)
class _Outcome:
    """The outcome of the passes over a graph.

    Attributes:
        gm: the graph for the inner compiler.
        after: the graph for the report and the dump.
        keep_attention: whether the graph has attention that was kept on purpose.
        rewritten: the result of the passes; empty if the graph could not be captured or the passes failed.
        unread: what stands for results that were left out, by their places.
    """

    gm: fx.GraphModule
    after: fx.GraphModule
    keep_attention: bool
    rewritten: Rewritten = field(default_factory=Rewritten)
    unread: dict[int, UnreadWeights] = field(default_factory=dict)


class _Compilation:
    """The compilation of one graph, under the request and the plan of reuse in force."""

    def __init__(
        self, gm: fx.GraphModule, example_inputs: Sequence[Any], policy: Policy, *, knows_buffers: bool = True
    ) -> None:
        """Args:
        knows_buffers: what buffers hold may be read, and is checked at each call.
        """
        self._gm = gm
        self._inputs = example_inputs
        self._policy = policy
        self._call = current_call()
        self._inner = InnerCompiler(policy)
        self._conditions: Conditions | None = None
        # Where the sequence is sharded there is no other graph to go back to, so what buffers hold is not read.
        reads_buffers = knows_buffers and policy.context_parallel is None
        self._known_buffers = KnownBuffers(gm, example_inputs if reads_buffers else [None] * len(example_inputs))
        self._report = GraphReport(_graph_name(), inner_backend=self._inner.name, node_count=len(gm.graph.nodes))
        self._report.notes += options_without_effect(gm, policy)
        if not knows_buffers:
            self._report.notes.append(
                "compiled to be saved: what buffers hold is not read, and kernels asked for later have no effect"
            )
        directory = debug_directory()
        self._dump = None if directory is None else GraphDump.begin(directory, self._report.name)
        self._steps = Steps(self._report.name, self._dump)
        self._report.seconds = self._steps.seconds
        # Reports with code and dumps show the steps, so that these are gone through.
        is_stored = policy.warm_start and reads_buffers and self._call is None and not self._is_shown
        self._place = Place(gm, example_inputs, policy) if is_stored else None

    @property
    def _is_shown(self) -> bool:
        """Whether the graphs are written out."""
        collector = _collector.get()
        return self._dump is not None or (collector is not None and collector[1])

    def run(self) -> tuple[CompiledFn, bool]:
        """The compiled graph, and whether it depends on the request and the plan of reuse."""
        stored = self._looked_up()
        if stored is not None:
            return self._from_stored(stored)
        try:
            source = self._captured()
        except CaptureError as reason:
            return self._passed_on(reason), False
        self._known_buffers.attach(source.gm)
        outcome = self._rewritten(source)
        self._store(outcome)
        self._note_inner_settings(outcome)
        kept = self._kept_for_reuse(source, outcome)
        self._publish_and_dump(source.before, outcome.after)
        if kept is not None:
            compiled = self._compiled_with_reuse(kept, outcome)
        elif source.original is not None and outcome.rewritten.changed:
            compiled = self._compiled_with_verification(source, source.original, outcome)
        else:
            compiled = self._compiled(outcome)
        if outcome.rewritten.changed:
            compiled = self._known_buffers.guarded(compiled, self._original, self._report.name)
        return compiled, outcome.rewritten.offered or bool(outcome.rewritten.results)

    # What an earlier process stored, in place of the steps; and what is stored for later ones.

    def _looked_up(self) -> Entry | None:
        if self._place is None:
            return None
        with self._steps.step("look up"):
            stored = self._place.entry()
            holds = stored is not None and self._known_buffers.hold(stored.buffers)
        if stored is not None and not holds:
            self._report.notes.append("a graph that was stored does not serve: a buffer held something else")
        return stored if holds else None

    def _from_stored(self, stored: Entry) -> tuple[CompiledFn, bool]:
        report = self._report
        for name in ("captured", "reason", "sites", "notes", "unmatched_rules"):
            setattr(report, name, getattr(stored.report, name))
        rewritten = Rewritten(
            report.sites,
            offered=stored.varies,
            projections_changed=stored.projections_changed,
            regions_changed=stored.regions_changed,
        )
        gm = self._gm if stored.gm is None else stored.gm
        outcome = _Outcome(gm, gm, stored.keep_attention, rewritten)
        self._note_inner_settings(outcome)
        report.notes.append("the rewritten graph was stored by an earlier compilation (option warm_start)")
        self._publish_and_dump(self._gm, gm)
        compiled = self._compiled(outcome)
        if rewritten.changed:
            compiled = self._known_buffers.guarded(compiled, self._original, report.name)
        return compiled, stored.varies

    def _store(self, outcome: _Outcome | None) -> None:
        """Stores what became of the graph; without an outcome, that it cannot be captured."""
        report = self._report
        if self._place is None or (outcome is not None and report.reason):
            return  # Not after a defect, of which each process is to hear.
        with self._steps.step("store"):
            rewritten = Rewritten() if outcome is None else outcome.rewritten
            self._place.store(
                Entry(
                    gm=None if outcome is None or outcome.gm is self._gm else outcome.gm,
                    keep_attention=outcome is not None and outcome.keep_attention,
                    varies=rewritten.offered or bool(rewritten.results),
                    projections_changed=rewritten.projections_changed,
                    regions_changed=rewritten.regions_changed,
                    report=report,
                    buffers=self._known_buffers.seen(),
                )
            )
        if self._place.why_none:
            report.notes.append(f"the rewritten graph is not stored for other processes: {self._place.why_none}")

    # The steps, in their order.

    def _captured(self) -> _Source:
        """Raises:
        CaptureError: the graph cannot be captured.
        """
        with self._steps.step("capture"):
            captured = capture(self._gm, self._inputs)
        gm = captured.gm
        self._report.notes += filter(None, [captured.note])
        if self._policy.context_parallel is not None:
            with self._steps.step("parallelize", gm):
                self._conditions, notes = parallelize(gm, self._policy, self._policy.context_parallel)
            self._report.notes += notes
        if self._dump is not None:
            self._dump.add("captured", gm)
        return _Source(
            gm,
            before=fx.GraphModule(gm, copy.deepcopy(gm.graph)) if self._is_shown else gm,
            original=Original(gm) if self._policy.verify else None,
            identity=None if self._call is None else identity_of(gm),
        )

    def _passed_on(self, reason: CaptureError) -> CompiledFn:
        """The unchanged graph, compiled by the inner compiler.

        Raises:
            ContextParallelError: the graph would compute of each rank's part by itself.
        """
        if self._policy.context_parallel is not None:
            raise ContextParallelError(f"context_parallel: the graph cannot be read: {reason}")
        self._report.captured, self._report.reason = False, str(reason)
        if reason.__cause__ is None:
            # An error of tracing may be this process's alone: its memory, or the depth of its stack.
            self._store(None)
        self._publish_and_dump(self._gm, self._gm)
        return self._compiled(_Outcome(self._gm, self._gm, keep_attention=False))

    def _rewritten(self, source: _Source) -> _Outcome:
        report = self._report
        # In a call that reuses attention, graphs keep their results.
        unread = UnreadResults(source.gm, self._policy.unread_weights if self._call is None else ())
        if self._policy.unread_weights and self._call is not None:
            report.notes.append("unread_weights has no effect in a call that reuses attention")
        try:
            admission = self._admitted(source)
            rewritten = rewrite(
                source.gm,
                self._policy,
                as_requested if admission is None else admission.adjust_request,
                steps=self._steps,
                with_kinds=self._call is not None,
                with_batch=self._call is not None and self._call.plan.halves,
            )
        except KernelError:
            raise
        except Exception as error:  # A defect of attnrewrite must not break the user's model; it is reported.
            if raises_defects():
                raise
            advice = "" if isinstance(error, PatternError) else ", please report this"
            log.warning("%s: rewriting failed%s", report.name, advice, exc_info=True)
            report.reason = f"rewriting failed, so the graph is unchanged: {type(error).__name__}: {error}"
            if self._policy.context_parallel is not None:
                raise  # The unchanged graph computes of each rank's part by itself.
            return _Outcome(self._gm, self._gm, keep_attention=True)
        self._refuse_local_keys(rewritten)
        report.sites = rewritten.sites
        report.unmatched_rules = unmatched_rules(self._policy, [site.location for site in report.sites])
        if rewritten.regions_inlined and rewritten.changed:
            report.notes.append(
                "regions of nested_compile_region are compiled once for each call, since Inductor may give wrong "
                "gradients for them"
            )
        if admission is not None:
            admission.add_verdicts(report.sites)
            report.notes += admission.notes
        # If nothing was rewritten, the inner compiler gets the graph that it would get without attnrewrite.
        standing = unread.settle()
        report.notes += [f"{weights!r}, as the option unread_weights says" for weights in standing.values()]
        gm = source.gm if rewritten.changed or self._conditions is not None else self._gm
        return _Outcome(gm, source.gm, _holds_softmax_of_product(source.gm), rewritten, standing)

    def _refuse_local_keys(self, rewritten: Rewritten) -> None:
        """Raises:
        ContextParallelError: PyTorch's own ``context_parallel`` is active, which exchanges the keys of calls of
            ``scaled_dot_product_attention`` alone, and the graph has other attention.
        """
        if rewritten.sites and self._policy.context_parallel is None and pytorch_context_parallel():
            raise ContextParallelError(
                f"context_parallel: PyTorch's own context_parallel is active, which only sees calls of "
                f"scaled_dot_product_attention: the attention at {rewritten.sites[0].location} would see the keys of "
                "its own rank alone. Leave PyTorch's, and give options={'context_parallel': ...} "
                "(docs/context_parallel.md), or call scaled_dot_product_attention; a model whose sequence is not "
                "sharded has to be compiled outside of it"
            )

    def _admitted(self, source: _Source) -> Admission | None:
        """The kernels that the option ``tolerance`` admits; None without it."""
        if self._policy.tolerance is None:
            return None
        with self._steps.step("tolerance"):
            return admitted(source.gm, self._policy, self._inputs, self._policy.tolerance)

    def _kept_for_reuse(self, source: _Source, outcome: _Outcome) -> Kept | None:
        """The graphs that store and reuse attention values; None outside a call that reuses attention."""
        call, rewritten = self._call, outcome.rewritten
        if call is None or source.identity is None:
            return None
        found = {id(row) for row, _, _ in rewritten.results}
        missed = [row for row in rewritten.sites if id(row) not in found]
        call.found((), [f"{row.location} is not treated as attention ({row.reason})" for row in missed])
        if not rewritten.results:
            return None
        if computes_gradients(self._gm):
            words = "is not reused, since gradients are computed from it"
            call.found((), [f"{row.location} {words}" for row, _, _ in rewritten.results])
            return None
        try:
            kept = kept_attention(source.gm, self._inputs, rewritten, source.identity, call)
        except Exception as error:  # A defect, as above: the model runs without reuse.
            if raises_defects():
                raise
            log.warning(
                "%s: attention cannot be stored for reuse, please report this", self._report.name, exc_info=True
            )
            self._report.notes.append(f"attention is not stored for reuse: {type(error).__name__}: {error}")
            return None
        if source.original is not None:
            self._report.notes.append("graphs that store attention values for reuse are not verified")
        return kept

    def _note_inner_settings(self, outcome: _Outcome) -> None:
        if self._inner.name != "inductor":
            return
        if outcome.keep_attention:
            self._report.notes.append("Inductor's own attention patterns are turned off for this graph")

    def _publish_and_dump(self, before: fx.GraphModule, after: fx.GraphModule) -> None:
        """Completes the report, publishes it, and dumps the graph."""
        if self._is_shown:
            self._report.before_code, self._report.after_code = graph_source(before), graph_source(after)
        _publish(self._report)
        if self._dump is not None:
            self._dump.finish(self._report, before, after, self._inputs)

    # The inner compiler.

    def _original(self) -> CompiledFn:
        """The graph as it was written; uncompiled, unless operators in it rely on AOTAutograd.

        A checkpoint draws the random numbers of the forward pass again only there.
        """
        if not holds_higher_order(self._gm):
            return self._gm.forward
        # Compiled now, as below.
        return self._inner.compile(self._gm, self._inputs, keep_attention=True)

    def _compiled(self, outcome: _Outcome) -> CompiledFn:
        with self._steps.step("inner"):
            compiled = self._inner.compile(outcome.gm, self._inputs, keep_attention=outcome.keep_attention)
        if self._conditions is not None:
            compiled = self._conditions.around(compiled)
        return with_standing(compiled, outcome.unread)

    def _compiled_with_verification(self, source: _Source, original: Original, outcome: _Outcome) -> CompiledFn:
        with self._steps.step("inner"):
            # Compiled now, not when it is needed, since guards that are added belong to this compilation by Dynamo. If
            # it is used, its attention is kept on purpose.
            unchanged = self._inner.compile(self._gm, self._inputs, keep_attention=True)
        return verified(original, source.gm, self._report, unchanged, self._compiled(outcome))

    def _compiled_with_reuse(self, kept: Kept, outcome: _Outcome) -> CompiledFn:
        def compile_graph(gm: fx.GraphModule, added: Sequence[torch.Tensor]) -> CompiledFn:
            return self._inner.compile(gm, [*self._inputs, *added], keep_attention=outcome.keep_attention)

        with self._steps.step("inner"):
            return kept.compiled(compile_graph, copies=self._policy.cuda_graphs)


def _graph_name() -> str:
    """The graph's name by Dynamo's number ("graph_0_1": frame 0, its second compilation), or by a counter."""
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
    """Sends the report to the collector, the log (``TORCH_LOGS=+attnrewrite``) and the trace (``TORCH_TRACE``)."""
    collector = _collector.get()
    if collector is not None:
        collector[0].append(report)
    if not report.captured:
        log.warning("%s: not captured, passed unchanged to %s: %s", report.name, report.inner_backend, report.reason)
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
