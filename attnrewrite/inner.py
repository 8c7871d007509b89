"""The inner compiler, which compiles the rewritten graph."""

from __future__ import annotations

import contextlib
import difflib
import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from torch import fx

from attnrewrite.errors import OptionError
from attnrewrite.options.compile_options import OWN_OPTIONS, Policy
from attnrewrite.torch_private import (
    ATTENTION_PATTERNS,
    inductor_backend,
    inductor_config,
    list_backends,
    lookup_backend,
)

__all__ = ["CompiledFn", "InnerCompiler"]

CompiledFn = Callable[..., Any]

_OWN_NAME = "attnrewrite"


class InnerCompiler:
    """The compiler that a policy names, checked before any work is done."""

    def __init__(self, policy: Policy) -> None:
        """Raises:
        OptionError: the backend does not exist, or does not take the options.
        """
        self._policy = policy
        backend = policy.inner_backend
        self.name = backend if isinstance(backend, str) else getattr(backend, "__name__", type(backend).__name__)
        self._compile: Callable[[fx.GraphModule, Sequence[Any], bool], CompiledFn] = self._compile_with_function
        if backend == "inductor":
            self._compile = self._inductor
            self._inductor_wrapper({})  # Checks the options.
            return
        if policy.mode is not None:
            raise OptionError(
                f"mode={policy.mode!r} applies only to Inductor; omit it or use options={{'inner_backend': 'inductor'}}"
            )
        if isinstance(backend, str):
            self._function = self._registered(backend)
        elif callable(backend):
            self._function = backend
        else:
            raise OptionError(
                "options['inner_backend'] takes a backend's name or a callable (gm, example_inputs) -> callable; "
                f"got {backend!r}"
            )
        self._keywords = self._accepted_options()

    def compile(self, gm: fx.GraphModule, example_inputs: Sequence[Any], *, keep_attention: bool) -> CompiledFn:
        """The compiled ``gm``.

        Args:
            keep_attention: whether the graph has attention that was kept on purpose. Inductor's own attention patterns
                are then turned off: some of them ignore the axis of softmax, or the value of a masked row.
        """
        return self._compile(gm, example_inputs, keep_attention)

    def _compile_with_function(self, gm: fx.GraphModule, example_inputs: Sequence[Any], *_: bool) -> CompiledFn:
        compiled: CompiledFn = self._function(gm, example_inputs, **self._keywords)
        return compiled

    def _inductor(self, gm: fx.GraphModule, example_inputs: Sequence[Any], keep_attention: bool) -> CompiledFn:
        own: dict[str, Any] = {}
        if keep_attention:
            given = self._policy.inner_options.get("disabled_passes", inductor_config().disabled_passes)
            own["disabled_passes"] = ",".join(filter(None, (given, ATTENTION_PATTERNS)))
        with _without_values_of_inputs(gm):
            compiled: CompiledFn = self._inductor_wrapper(own)(gm, example_inputs)
        return compiled

    def _inductor_wrapper(self, own: dict[str, Any]) -> Any:
        options = {**own, **self._policy.inner_options}
        if "disabled_passes" in own:
            options["disabled_passes"] = own["disabled_passes"]
        known = inductor_config().get_config_copy()
        unknown = [key for key in options if key.replace("-", "_") not in known]
        if unknown:
            raise _unknown_options(
                unknown, OWN_OPTIONS, "Inductor takes", sorted(key for key in known if key[0].islower())
            )
        try:
            return inductor_backend(self._policy.mode, options)
        except RuntimeError as error:
            raise OptionError(" ".join(str(error).split())) from None

    @staticmethod
    def _registered(name: str) -> CompiledFn:
        known = [backend for backend in list_backends(exclude_tags=()) if backend != _OWN_NAME]
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            raise OptionError(
                f"unknown inner backend {name!r}{hint}; give a callable (gm, example_inputs) -> callable, or one of: "
                + ", ".join(known)
            )
        function: CompiledFn = lookup_backend(name)
        return function

    def _accepted_options(self) -> dict[str, Any]:
        options = dict(self._policy.inner_options)
        if not options:
            return {}
        parameters: Iterable[str] = ()
        if isinstance(self._policy.inner_backend, str):
            parameters = inspect.signature(self._function).parameters
        if "options" in parameters:
            return {"options": options}
        raise _unknown_options(list(options), OWN_OPTIONS, f"the inner backend {self.name!r} takes none", [])


def _unknown_options(unknown: list[str], own: Iterable[str], what: str, known: list[str]) -> OptionError:
    near = difflib.get_close_matches(unknown[0], [*own, *known], n=1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    names = ", ".join(repr(key) for key in unknown)
    tail = f"{what}: {', '.join(known)}" if known else what
    return OptionError(f"unknown option {names}{hint}; attnrewrite takes: {', '.join(own)}; {tail}")


@contextlib.contextmanager
def _without_values_of_inputs(gm: fx.GraphModule) -> Iterator[None]:
    """The graph as Dynamo makes it: Inductor's C++ wrapper takes one whose inputs have values for an exported program,
    in which sizes are no inputs (``_extract_inputs_from_exported_gm`` in
    https://github.com/pytorch/pytorch/blob/v2.13.0/torch/_inductor/compile_fx.py).
    """
    values = {node: node.meta.pop("val") for node in gm.graph.find_nodes(op="placeholder") if "val" in node.meta}
    try:
        yield
    finally:
        for node, value in values.items():
            node.meta["val"] = value
