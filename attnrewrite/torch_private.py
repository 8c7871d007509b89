"""Every private name of PyTorch that this package uses, each with the reason: what to look at for a new torch.

All of them stand in torch 2.11, the oldest that is supported, up to 2.14, unless their lines say otherwise. Links are
to 2.13. ``torch.fx.experimental`` is documented, and operators such as ``aten._softmax`` are no names: neither is here.

What ``torch._dynamo`` does not load by itself is imported by the function that needs it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch._dynamo
import torch._dynamo.backends.registry
import torch._guards
import torch._higher_order_ops.wrap
import torch._logging._internal
import torch._ops
import torch._subclasses.fake_tensor
import torch.utils._python_dispatch
import torch.utils._pytree
import torch.utils._sympy.interp
import torch.utils._sympy.reference
from torch import fx, nn

# -- nodes, operators and modules --------------------------------------------------------------------------------------


def is_erased(node: fx.Node) -> bool:
    """Whether the node was removed from its graph. A node that is held elsewhere says so nowhere else:
    https://github.com/pytorch/pytorch/blob/v2.13.0/torch/fx/graph.py#L1619
    """
    return node._erased


def codegen_of(graph: fx.Graph) -> Any:
    """What ``graph.set_codegen`` last set; there is no public way to read it."""
    return graph._codegen


OpOverload = torch._ops.OpOverload
"""The class of ``aten.add.Tensor`` and the like."""

HigherOrderOperator = torch._ops.HigherOrderOperator
"""The class of ``torch.ops.higher_order.flex_attention`` and the like."""


def schema_of(target: Any) -> Any:
    """The ``FunctionSchema`` of an operator; None for other targets of nodes."""
    return getattr(target, "_schema", None)


def operator_name(target: Any) -> str:
    """An operator's name without its namespace and overload, such as ``add``; other targets in their own words."""
    return getattr(target, "_opname", None) or str(target)


def is_composite(target: torch._ops.OpOverload) -> bool:
    """Whether an operator may be computed as others, so that its schema does not say all that it does."""
    return target._can_decompose()


def custom_op_function(function: Any) -> Any:
    """The Python function behind a ``torch.library.custom_op``; anything else as it is."""
    return getattr(function, "_init_fn", function)


def custom_op_functions() -> dict[str, Callable[..., Any]]:
    """The Python functions behind all of ``torch.library.custom_op``, by the operator's name: scripts hold them."""
    from torch._library.custom_ops import OPDEFS

    return {name: custom_op_function(definition) for name, definition in OPDEFS.items()}


enter_autocast = torch.amp.autocast_mode._enter_autocast
exit_autocast = torch.amp.autocast_mode._exit_autocast
"""``torch.autocast`` in a graph is a call of each: https://github.com/pytorch/pytorch/blob/v2.13.0/torch/amp/autocast_mode.py#L391"""

set_grad_enabled = torch._C._set_grad_enabled
"""``torch.no_grad`` and ``torch.enable_grad`` in a graph are calls of it."""

transformer_encoder_layer = torch._transformer_encoder_layer_fwd
"""The fast path of ``nn.TransformerEncoderLayer``, one call that holds a whole layer:
https://github.com/pytorch/pytorch/blob/v2.13.0/torch/nn/modules/transformer.py#L917
"""

VMAP_ENTERS, VMAP_LEAVES, VMAP_LOADS = "_vmap_increment_nesting", "_vmap_decrement_nesting", "lazy_load_decompositions"
"""Names of the calls that stand for ``torch.vmap`` in a graph; of which module depends on how it was traced:
https://github.com/pytorch/pytorch/blob/v2.13.0/torch/_functorch/predispatch.py#L79
"""

FORWARD_MODE_CALLS = ("_enter_dual_level", "_exit_dual_level", "_make_dual")
"""Names of the calls that stand for forward-mode differentiation in a graph."""

CHECKPOINT_CONTEXT = "_checkpoint_context_fn"
"""In the ``meta`` of a checkpoint's body: it is checkpointed selectively, by a function that is kept there.
https://github.com/pytorch/pytorch/blob/v2.13.0/torch/_higher_order_ops/wrap.py#L459
"""

checkpoint_ids = torch._higher_order_ops.wrap.uid
"""The numbers by which the partitioner tells checkpointed regions apart; those that are inlined take theirs from here:
https://github.com/pytorch/pytorch/blob/v2.13.0/torch/_higher_order_ops/wrap.py#L458
"""


def call_of(module: nn.Module) -> Callable[..., Any]:
    """A module's call with its hooks, and without what it is compiled into."""
    return module._call_impl


wrapped_call = nn.Module._wrapped_call_impl
"""``nn.Module.__call__`` as it is while no tracer has put its own in its place."""

COMPILED_CALL = "_compiled_call_impl"
"""Where ``nn.Module.compile`` keeps the compiled call, and ``nn.Module.__call__`` looks for it:
https://github.com/pytorch/pytorch/blob/v2.13.0/torch/nn/modules/module.py#L1775
"""

# -- tracing -----------------------------------------------------------------------------------------------------------


def aot_export_module(*args: Any, **kwargs: Any) -> Any:
    """Makes the IR of ``torch.export``; ``torch.export`` itself takes modules, and no graph of Dynamo's with its fake
    inputs: https://github.com/pytorch/pytorch/blob/v2.13.0/torch/_functorch/aot_autograd.py#L1538
    """
    from torch._functorch.aot_autograd import aot_export_module

    return aot_export_module(*args, **kwargs)


CompileContext = torch._guards.CompileContext
"""Says which frame is being compiled, for the name of its graph."""

TracingContext = torch._guards.TracingContext
tracing = torch._guards.tracing
"""``tracing(TracingContext(mode))`` is a compilation of its own within another; ``tracing(None)`` is none."""

detect_fake_mode = torch._guards.detect_fake_mode
"""The fake mode that Dynamo traces in."""

FakeTensor = torch._subclasses.fake_tensor.FakeTensor
FakeTensorMode = torch._subclasses.fake_tensor.FakeTensorMode
"""What stands for the tensors of a graph while it is compiled. Public names exist for neither."""

unset_fake_temporarily = torch._subclasses.fake_tensor.unset_fake_temporarily
"""Leaves the fake mode: known constants are computed for real."""

TorchDispatchMode = torch.utils._python_dispatch.TorchDispatchMode
"""Sees each operator that is called, for the operators that one kernel of PyTorch comes down to."""

disable_current_modes = torch.utils._python_dispatch._disable_current_modes
"""Leaves every dispatch mode, the fake one too: what is computed within is nobody else's business."""

is_traceable_wrapper_subclass = torch.utils._python_dispatch.is_traceable_wrapper_subclass
"""Whether a tensor is made of others (DTensor, quantized weights), and has no storage of its own to read."""

tree_leaves = torch.utils._pytree.tree_leaves
tree_map_only = torch.utils._pytree.tree_map_only
"""Tensors within arguments; ``torch.utils.pytree`` has neither of them in 2.11."""

sympy_interp = torch.utils._sympy.interp.sympy_interp
PythonReferenceAnalysis = torch.utils._sympy.reference.PythonReferenceAnalysis
"""A symbolic size as a computation in Python, of values or of nodes."""


def vmap_depth() -> int:
    """How many levels of ``torch.func`` transforms are open."""
    stack = torch._C._functorch.get_interpreter_stack()  # None where there is no level, whatever its stub says.
    return len(stack or ())


def leave_vmap_level() -> None:
    """Closes the innermost level: tracing that fails midway leaves its levels open."""
    torch._C._functorch.pop_dynamic_layer_stack()


# -- Dynamo ------------------------------------------------------------------------------------------------------------

dynamo_config = torch._dynamo.config
"""``recompile_limit`` and ``capture_dynamic_output_shape_ops`` are set for single calls by its ``patch``."""

ShortenTraceback = torch._dynamo.exc.ShortenTraceback
"""Errors of this class reach the user as they were raised, not wrapped into ``BackendCompilerFailed``:
https://github.com/pytorch/pytorch/blob/v2.13.0/torch/_dynamo/output_graph.py#L3123
"""

FailOnRecompileLimitHit = torch._dynamo.exc.FailOnRecompileLimitHit
"""Raised with ``fullgraph=True`` by a function that was compiled too often."""

OptimizedModule = torch._dynamo.OptimizedModule
"""What ``torch.compile`` makes of a module."""


def original_module(module: nn.Module) -> nn.Module:
    """The module that ``torch.compile(module)`` was made of; any other as it is."""
    if isinstance(module, OptimizedModule):
        original: nn.Module = module._orig_mod
        return original
    return module


def is_compiled(module: nn.Module) -> bool:
    """Whether the module is compiled as a whole: by ``torch.compile``, or in place."""
    return isinstance(module, OptimizedModule) or module._compiled_call_impl is not None


def call_attribute(module: nn.Module) -> str:
    """The attribute with the compiled call. An ``OptimizedModule`` calls its ``forward``; a module that is compiled in
    place has its call under :data:`COMPILED_CALL`, and None stands there where only parts of it are compiled.
    """
    return "forward" if isinstance(module, OptimizedModule) else COMPILED_CALL


TORCHDYNAMO_PREFIX = "_torchdynamo"
"""Of the attributes that Dynamo gives to a compiled function, by which it passes by what is wrapped around that."""

PLACEHOLDER_PREFIXES = ("_dynamo", "_param_name", "_backend")
"""Of what Dynamo attaches to nodes and graphs for the inner compiler, such as ``_dynamo_source``, and which inputs are
static."""

STATIC_INPUT = "_dynamo_static_input_type"
"""In a placeholder's ``meta["tensor_dict"]``: it is a parameter or buffer, which keeps its address:
https://github.com/pytorch/pytorch/blob/v2.13.0/torch/_dynamo/variables/builder.py#L2411
"""


def dynamo_source(placeholder: fx.Node) -> str:
    """Where Dynamo found a graph's input, as Python source; empty if unknown."""
    source = getattr(placeholder, "_dynamo_source", None)
    if source is None:
        return ""
    # A property since torch 2.12, a method before.
    return source.name if isinstance(source.name, str) else str(source.name())


def leave_without_source(placeholder: fx.Node) -> None:
    """Marks an input that a graph was given after Dynamo: Inductor and AOTAutograd ask each for its source."""
    placeholder._dynamo_source = None


list_backends = torch._dynamo.backends.registry.list_backends
lookup_backend = torch._dynamo.backends.registry.lookup_backend
"""``options["inner_backend"]`` by name; ``torch.compiler.list_backends`` lists, but gives none."""

skip_code = torch._dynamo.eval_frame.skip_code
"""Frames of a code object are run as they are; ``torch.compiler.disable`` would put a frame of its own around them."""

compile_lock = torch._dynamo.convert_frame.compile_lock
"""While one thread holds it, Dynamo compiles no code of graph modules in another:
https://github.com/pytorch/pytorch/blob/v2.13.0/torch/_dynamo/convert_frame.py#L275
"""

mark_static = torch._dynamo.mark_static
"""Holds a dimension of a tensor to its size, whatever ``dynamic`` says."""


def graph_breaks() -> Counter[str]:
    """How often a graph broke so far, by the reasons."""
    return Counter(torch._dynamo.utils.counters["graph_break"])


trace_structured = torch._logging._internal.trace_structured
"""Puts the report into the trace that ``TORCH_TRACE`` writes and tlparse reads."""

# -- Inductor ----------------------------------------------------------------------------------------------------------

ATTENTION_PATTERNS = "pass_pattern_0"
"""The pass that holds Inductor's attention patterns, by its name for ``disabled_passes``:
https://github.com/pytorch/pytorch/blob/v2.13.0/torch/_inductor/fx_passes/joint_graph.py#L701
"""


def inductor_config() -> Any:
    """``torch._inductor.config``: what is set for all graphs, and the names of what can be."""
    import torch._inductor.config

    return torch._inductor.config


def inductor_backend(mode: str | None, options: dict[str, Any]) -> Any:
    """The backend that ``torch.compile(backend="inductor")`` makes of its mode and options.

    Raises:
        RuntimeError: one of them is not valid.
    """
    return torch._TorchCompileInductorWrapper(mode, options, None)  # type: ignore[no-untyped-call]


def backward_compiled_at_once() -> AbstractContextManager[Any]:
    """AOTAutograd compiles backward graphs within, and not at their first call."""
    import torch._functorch.config

    context: AbstractContextManager[Any] = torch._functorch.config.patch(force_non_lazy_backward_lowering=True)
    return context


def cpu_flex_supported() -> bool:
    """Inductor's own condition for its C++ template of FlexAttention."""
    try:
        from torch._inductor.kernel.flex.flex_cpu import check_cpu_supported
    except ImportError:
        return False
    return bool(check_cpu_supported())  # type: ignore[no-untyped-call]


def block_mask_of_everything(query: torch.Tensor, key: torch.Tensor) -> Any:
    """The block mask that FlexAttention takes for none: one block."""
    from torch.nn.attention.flex_attention import _create_empty_block_mask

    return _create_empty_block_mask(query, key)


def cpp_compiler() -> str:
    """The C++ compiler that Inductor finds.

    Raises:
        RuntimeError: there is none.
    """
    from torch._inductor.cpp_builder import get_cpp_compiler

    return get_cpp_compiler()


def has_triton() -> bool:
    """Whether Inductor finds a Triton that supports the device."""
    from torch.utils._triton import has_triton

    return has_triton()


def has_triton_package() -> bool:
    """Whether Triton is installed, whatever it supports."""
    from torch.utils._triton import has_triton_package

    return has_triton_package()
