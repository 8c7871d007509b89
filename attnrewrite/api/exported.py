"""``rewrite``: attention in programs of ``torch.export``, whose graph is the IR that the passes read."""

from __future__ import annotations

import copy
import dataclasses
import platform
from collections.abc import Iterator, Mapping
from importlib import metadata
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram
from torch.export.graph_signature import ExportGraphSignature, InputKind, OutputSpec, TensorArgument
from torch.fx.passes.infra.pass_base import PassResult

from attnrewrite.capture.normalize import normalize
from attnrewrite.errors import ExportError, OptionError
from attnrewrite.ir.ops import writes
from attnrewrite.ir.site import CanonicalAttention
from attnrewrite.ir.stored import StoredPattern
from attnrewrite.kernels import registered_kernels
from attnrewrite.options.compile_options import Policy
from attnrewrite.options.request import Request
from attnrewrite.passes.pipeline import rewrite as rewrite_graph
from attnrewrite.passes.steps import Steps
from attnrewrite.report.graph_code import graph_source
from attnrewrite.report.report import RewriteReport
from attnrewrite.report.rows import GraphReport

__all__ = ["RewritePass", "rewrite", "rewritten_and_report"]

_OPTIONS = ("assume_attended_rows", "kernels", "kernel_rules", "strict")
"""Of those of ``torch.compile``; the others are about compiling, or about calls."""

_BY_DEFAULT = "attnrewrite.rewrite"
"""Who asks for kernels of PyTorch's."""

_PYTORCHS_OWN = frozenset({"aten", "prim", "prims"})
"""Namespaces of operators that a process with PyTorch alone can load."""


def rewrite(program: ExportedProgram, *, options: Mapping[str, Any] | None = None) -> ExportedProgram:
    """A copy of an exported program in which every attention that a kernel of PyTorch's serves is rewritten into it.

    The copy is functional, as that of ``program.run_decompositions({})``, and shares the parameters of ``program``. It
    can be saved and loaded where attnrewrite is not installed, run, and compiled ahead of time by
    ``torch._inductor.aoti_compile_and_package``. Constants, and buffers that are not part of the state dict, are taken
    to keep their values. Under ``torch.no_grad()`` the program is rewritten for inference; otherwise its gradients are
    kept right as well, and attentions are left alone for which that takes operators of attnrewrite's own.

    Args:
        program: of ``torch.export.export``, before or after ``run_decompositions``; it is not changed.
        options: ``assume_attended_rows``, ``kernels``, ``kernel_rules`` and ``strict``, as for ``torch.compile``. By
            default PyTorch's own kernels are asked alone.

    Raises:
        OptionError: another option, or a wrong value.
        ExportError: gradients are on, and the program has a region of ``torch.no_grad()``.
        ExportError: a kernel was asked for whose operators only a process with another package can load.
    """
    return rewritten_and_report(program, options)[0]


def rewritten_and_report(
    program: ExportedProgram, options: Mapping[str, Any] | None = None
) -> tuple[ExportedProgram, RewriteReport]:
    """:func:`rewrite`, and what it did and why it left the rest alone."""
    policy = _policy(options)
    functional = _functional(program)
    rewriting = _Rewriting(functional.graph_module, policy)
    rewritten = rewriting.of_program(functional)
    versions = {"attnrewrite": metadata.version("attnrewrite"), "torch": torch.__version__}
    return rewritten, RewriteReport(
        model="an exported program",
        graphs=[rewriting.report],
        graph_breaks=[],
        versions={**versions, "python": platform.python_version()},
    )


def _functional(program: ExportedProgram) -> ExportedProgram:
    """The program without updates in place, which the passes do not read, and otherwise with the operators it has.

    Raises:
        ExportError: PyTorch cannot write it so.
    """
    if torch.is_grad_enabled() and any(
        node.target is torch.ops.higher_order.wrap_with_set_grad_enabled for node in program.graph.nodes
    ):
        raise ExportError(
            "the program has a region of torch.no_grad(), which PyTorch leaves out of what it makes functional; "
            "rewrite it under torch.no_grad(), for inference"
        )
    try:
        functional: ExportedProgram = program.run_decompositions({})
    except Exception as error:
        words = str(error).strip().splitlines() or [type(error).__name__]
        raise ExportError(
            f"program.run_decompositions({{}}), which makes a program functional, fails: {words[0]}"
        ) from error
    return functional


class RewritePass:
    """:func:`rewrite` as a pass over a graph of ATen operators: ``(GraphModule) -> PassResult``.

    It fits lists of passes such as ExecuTorch's ``transform_passes``, Torch-TensorRT's lowering passes, and
    ``torch.fx.passes``. Of the graph's inputs nothing is known.

    Attributes:
        report: of the last graph; None before the first.
    """

    def __init__(self, options: Mapping[str, Any] | None = None) -> None:
        """Args:
        options: as for :func:`rewrite`.
        """
        self.report: GraphReport | None = None
        self._policy = _policy(options)

    def __call__(self, graph_module: fx.GraphModule) -> PassResult:
        """Rewrites a copy.

        Raises:
            ExportError: as :func:`rewrite`; or a node lacks its fake value, ``node.meta["val"]``, or updates in place.
        """
        updates = [node for node in _calls(graph_module) if writes(node)]
        if updates:
            raise ExportError(
                f"{updates[0].name} updates a tensor in place, and such graphs are not read: pass that of "
                "program.run_decompositions({})"
            )
        rewriting = _Rewriting(graph_module, self._policy)
        changed = rewriting.run()
        self.report = rewriting.report
        return PassResult(rewriting.gm if changed else graph_module, changed)


class _Rewriting:
    """The passes over a copy of one graph."""

    def __init__(self, gm: fx.GraphModule, policy: Policy) -> None:
        self._policy = policy
        self._source = gm
        self._operators = {node.target for node in _calls(gm)}
        self._known: dict[str, dict[str, Any]] = {}
        self.gm = gm
        self.report = GraphReport("exported", inner_backend="none", node_count=len(gm.graph.nodes))
        for node in gm.graph.nodes:
            if node.op in ("placeholder", "call_function") and node.users and "val" not in node.meta:
                raise ExportError(
                    f"the node {node.name} has no fake value in node.meta['val']: pass the graph of an exported "
                    "program, or one that torch.fx.passes.fake_tensor_prop.FakeTensorProp has run over"
                )

    def know_inputs_of(self, program: ExportedProgram) -> None:
        """Notes which inputs are parameters, and what constants hold."""
        signature = program.graph_signature
        changed = {spec.target for spec in signature.output_specs if spec.target is not None}
        inputs = self._source.graph.find_nodes(op="placeholder")
        for node, spec in zip(inputs, signature.input_specs, strict=True):
            if spec.kind is InputKind.PARAMETER:
                self._known[node.name] = {"example_value": program.state_dict[spec.target]}
            elif spec.target in program.constants and spec.target not in changed:
                value = program.constants[spec.target]
                if isinstance(value, torch.Tensor):
                    self._known[node.name] = {"stored": StoredPattern(value)}

    def run(self) -> bool:
        """Rewrites a copy of the graph; whether it changed.

        Raises:
            ExportError: see :func:`rewrite`.
        """
        report, steps = self.report, Steps("an exported program")
        report.before_code = graph_source(self._source)
        changed, foreign = self._attempt(frozenset(), steps)
        if foreign:
            # Once more without them: the reason is known only when their calls are written.
            changed, rest = self._attempt(frozenset(foreign), steps)
            assert not rest
            for site in report.sites:
                if site.name in foreign:
                    site.reason = f"it takes {foreign[site.name]}, which a process with PyTorch alone cannot load"
                    if torch.is_grad_enabled():
                        site.reason += (
                            ", for its gradients (rewrite under torch.no_grad() if the program is not trained)"
                        )
        report.seconds = steps.seconds
        report.after_code = graph_source(self.gm)
        return changed

    def _attempt(self, kept: frozenset[str], steps: Steps) -> tuple[bool, dict[str, str]]:
        """One run of the passes, which leaves the sites of these names alone.

        Returns:
            Whether the graph changed; and by the names of sites, the operators in their place that PyTorch lacks.
        """

        def of_pytorch(name: str, site: CanonicalAttention, request: Request | None) -> Request:
            """By default kernels are asked that emit PyTorch's own operators."""
            if name in kept:
                return Request((), _BY_DEFAULT, otherwise_kept=True)
            if request is not None:
                return request
            names = tuple(kernel.name for kernel in registered_kernels() if kernel.automatic and kernel.emits_aten)
            return Request(names, _BY_DEFAULT, otherwise_kept=True)

        self.gm = copy.deepcopy(self._source)
        for node in self.gm.graph.find_nodes(op="placeholder"):
            node.meta |= self._known.get(node.name, {})
        with steps.step("normalize", self.gm):
            for part in _graphs(self.gm):
                _drop_checks(part.graph)
                normalize(part, gradients=torch.is_grad_enabled())
        rewritten = rewrite_graph(self.gm, self._policy, of_pytorch, steps=steps)
        self.report.sites = rewritten.sites
        for node in self.gm.graph.find_nodes(op="placeholder"):
            for name in self._known.get(node.name, {}):
                del node.meta[name]
        self.gm.graph.eliminate_dead_code()
        ours = dict(self.gm.named_modules())
        for path, source in self._source.named_modules():
            own = ours.get(path)
            if isinstance(own, fx.GraphModule) and isinstance(source, fx.GraphModule):
                _restore_values(own, source)
        for part in _graphs(self.gm):
            part.recompile()
        return rewritten.changed, self._foreign()

    def _foreign(self) -> dict[str, str]:
        """By the names of sites, an operator in their place that a process with PyTorch alone cannot load.

        Raises:
            ExportError: a kernel that was asked for by name calls one.
        """
        found = {}
        sites = {name: site for site in self.report.sites for name in site.nodes_after}
        for path, part in self.gm.named_modules():
            for node in part.graph.nodes if isinstance(part, fx.GraphModule) else ():
                namespace = getattr(node.target, "namespace", None)  # Of operators; Python's functions have none.
                if namespace is None or namespace in _PYTORCHS_OWN or node.target in self._operators:
                    continue
                site = sites[f"{path}.{node.name}" if path else node.name]
                if not site.requested.endswith(_BY_DEFAULT):
                    raise ExportError(
                        f"{site.kernel} was asked for, and calls {node.target}, which a process with PyTorch alone "
                        "cannot load: leave out options['kernels'], or name kernels of PyTorch's"
                    )
                found[site.name] = str(node.target)
        return found

    def of_program(self, program: ExportedProgram) -> ExportedProgram:
        """The program with the rewritten graph."""
        self.know_inputs_of(program)
        self.run()
        return ExportedProgram(
            root=self.gm,
            graph=self.gm.graph,
            graph_signature=self._signature(program.graph_signature),
            state_dict=program.state_dict,
            range_constraints=dict(program.range_constraints),
            module_call_graph=copy.deepcopy(program.module_call_graph),
            example_inputs=program.example_inputs,
            constants=program.constants,
            verifiers=list(program.verifiers),
        )

    def _signature(self, old: ExportGraphSignature) -> ExportGraphSignature:
        """The signature with the names of the results as they now are; the inputs keep theirs."""
        (results,) = self.gm.graph.output_node().args
        assert isinstance(results, (list, tuple))
        outputs = []
        for node, spec in zip(results, old.output_specs, strict=True):
            arg = TensorArgument(node.name) if isinstance(spec.arg, TensorArgument) else spec.arg
            outputs.append(OutputSpec(spec.kind, arg, spec.target))
        return ExportGraphSignature(input_specs=list(old.input_specs), output_specs=outputs)


def _restore_values(part: fx.GraphModule, source: fx.GraphModule) -> None:
    """Gives the results of a region the fake values of the source's, which rewriting a region forgets."""
    for node, old in zip(
        part.graph.output_node().all_input_nodes, source.graph.output_node().all_input_nodes, strict=True
    ):
        if "val" in old.meta:
            node.meta.setdefault("val", old.meta["val"])


def _drop_checks(graph: fx.Graph) -> None:
    """Drops checks of dtype and device of what the graph computes, which follow from those of its inputs."""
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten._assert_tensor_metadata.default):
        checked, *sizes_and_strides = node.args[:3]
        if checked.op == "call_function" and all(each is None for each in sizes_and_strides):
            graph.erase_node(node)


def _policy(options: Mapping[str, Any] | None) -> Policy:
    others = [name for name in options or {} if name not in _OPTIONS]
    if others:
        raise OptionError(
            f"options[{others[0]!r}] has no meaning for an exported program; it takes {', '.join(_OPTIONS)}"
        )
    policy = Policy.from_options(options, None)
    return dataclasses.replace(
        policy,
        inner_backend="eager",
        verify=False,
        checks=False,
        autotune=False,
        tolerance=None,
        fuse_projections=False,
    )


def _graphs(gm: fx.GraphModule) -> Iterator[fx.GraphModule]:
    return (part for part in gm.modules() if isinstance(part, fx.GraphModule))


def _calls(gm: fx.GraphModule) -> Iterator[fx.Node]:
    return (node for part in _graphs(gm) for node in part.graph.nodes if node.op == "call_function")
