"""The kernels that a site is offered, in their order.

Kernels that the user requested come first. A request has one of eight levels; from the strongest: an argument of the
call (``compatibility_mode`` of :func:`attnrewrite.attention_forward`), ``kernels=`` of the decorator (a rule for all
sites of a part of the model), ``options["kernel_rules"]``, the context manager :func:`attention_backend`,
``options["kernels"]``, ``ATTNREWRITE_KERNELS``, then the variables that diffusers and DiffSynth-Studio read. Without
them, a call under ``torch.nn.attention.sdpa_kernel(...)`` in the source asks for the back ends that are left to it.
"""

from __future__ import annotations

import contextlib
import fnmatch
from collections.abc import Iterable, Iterator, Sequence
from contextvars import ContextVar

from torch import fx

from attnrewrite.capture.sdpa_regions import SDPA_BACKENDS
from attnrewrite.ir.nodes import is_tensor, tensor
from attnrewrite.ir.source import SourceLocation
from attnrewrite.kernels import Kernel, kernel_named, registered_kernels
from attnrewrite.options.compile_options import Policy
from attnrewrite.options.environment import request_of_environment
from attnrewrite.options.request import Request, kernel_names
from attnrewrite.selection.cost_table import CostTable

__all__ = [
    "COMPATIBILITY",
    "KERNEL_OF_CALL",
    "attention_backend",
    "named",
    "request_for",
    "request_in_force",
    "standing",
    "unmatched_rules",
]

_in_force: ContextVar[Request | None] = ContextVar("attnrewrite_kernels", default=None)


KERNEL_OF_CALL = "attnrewrite_kernel"
"""The annotation (``torch.fx.traceback.annotate``) by which a call in the source names its kernel."""

COMPATIBILITY = "compatibility_mode"
"""Its one value: PyTorch's own ``scaled_dot_product_attention``."""

_COMPATIBLE = Request(("native",), f"{COMPATIBILITY}=True", otherwise_kept=True)


@contextlib.contextmanager
def attention_backend(*names: str | Sequence[str], strict: bool = False) -> Iterator[None]:
    """Requests kernels, in this order, for every compiled model that is called inside.

    It applies to the thread (or asyncio task) that enters it, can be nested, and works on models that are already
    compiled: a graph is compiled once for each set of kernels that it is called under.

    Args:
        names: names of kernels, or one list of them; the first willing one serves. ``"auto"`` is the automatic choice.
        strict: whether a site that none of them can serve is an error. By default the next willing kernel serves it,
            and a warning says why.

    Raises:
        OptionError: a name is unknown.
        KernelError: on the first call of a model, with ``strict``.

    Example::

        with attnrewrite.attention_backend("_native_flash"):
            compiled(x)
    """
    token = _in_force.set(Request(kernel_names(names, "attention_backend"), "attention_backend", strict))
    try:
        yield
    finally:
        _in_force.reset(token)


def request_in_force() -> Request | None:
    """The request of the context manager that is in force; None outside of one."""
    return _in_force.get()


def request_for(policy: Policy, location: SourceLocation | None, call: fx.Node) -> Request | None:
    """The request at a site, of the strongest level that has one; None if there is none.

    Args:
        call: the node of the site, which may be annotated by :func:`attnrewrite.attention_forward`.
    """
    if call.meta.get("custom", {}).get(KERNEL_OF_CALL) == COMPATIBILITY:
        return _COMPATIBLE
    for pattern, names in policy.kernel_rules:
        if matches(pattern, location):
            return Request(names, f"the rule for {pattern!r}", policy.strict)
    if _in_force.get() is not None:
        return _in_force.get()
    if policy.kernels:
        return Request(policy.kernels, "options['kernels']", policy.strict)
    environment = request_of_environment()
    if environment is None:
        return _request_of_region(call, policy.strict)
    return Request(environment.names, environment.origin, environment.strict or policy.strict)


_KERNELS_OF_BACKENDS = {
    "cuda": {
        "FLASH_ATTENTION": "_native_flash",
        "EFFICIENT_ATTENTION": "_native_efficient",
        "CUDNN_ATTENTION": "_native_cudnn",
        "MATH": "_native_math",
    },
    "cpu": {"FLASH_ATTENTION": "native", "MATH": "_native_math"},
}
"""By the type of device and the name of an ``SDPBackend``, the kernel that is it."""


def _request_of_region(call: fx.Node, strict: bool) -> Request | None:
    names = call.meta.get("custom", {}).get(SDPA_BACKENDS)
    if names is None or not is_tensor(call):
        return None
    known = _KERNELS_OF_BACKENDS.get(tensor(call).device.type, {})
    kernels = tuple(known[name] for name in names.split(",") if name in known)
    return Request(kernels, "torch.nn.attention.sdpa_kernel", strict) if kernels else None


def unmatched_rules(policy: Policy, locations: Iterable[SourceLocation | None]) -> tuple[str, ...]:
    """The globs of ``options["kernel_rules"]`` that match no site at these locations."""
    places = list(locations)
    return tuple(glob for glob, _ in policy.kernel_rules if not any(matches(glob, place) for place in places))


def matches(pattern: str, location: SourceLocation | None) -> bool:
    """Whether a glob of an option matches the module's path ("*.attn1") or the line ("attention.py:120")."""
    if location is None:
        return pattern == "*"
    line = f"{location.file}:{location.line}"
    return any(
        fnmatch.fnmatchcase(text, glob) for text in (location.module, line) for glob in (pattern, f"*/{pattern}")
    )


def named(request: Request | None) -> tuple[list[Kernel], list[Kernel]]:
    """The kernels requested by name: those before the automatic choice, and those after it."""
    names = request.names if request else ()
    place = names.index("auto") if "auto" in names else len(names)
    before, after = names[:place], names[place + 1 :]
    return [kernel_named(name) for name in before], [kernel_named(name) for name in after if name != "auto"]


def standing(table: CostTable | None) -> list[Kernel]:
    """The kernels of the automatic choice, in their standing order.

    The automatic kernels come first, then the exact kernels that ``table`` has times for.
    """
    kernels = registered_kernels()
    measured = [] if table is None else [kernel for kernel in kernels if kernel.name in table.rows]
    exact = [kernel for kernel in measured if not kernel.lower_precision]
    return list(dict.fromkeys([*(kernel for kernel in kernels if kernel.automatic), *exact]))
