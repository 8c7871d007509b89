"""Every private name of PyTorch that this package uses, each with the reason: the list to check for a new torch.

All of them exist in torch 2.11, the oldest supported version, up to 2.14, unless noted otherwise. Links are to 2.13.
``torch.fx.experimental`` is documented, and operators such as ``aten._softmax`` are not Python names, so neither is
here.

Modules that ``torch._dynamo`` does not load itself are imported in the functions that need them.
"""

from __future__ import annotations

import contextlib
import re
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any, NoReturn

import torch
import torch._dynamo
import torch._dynamo.backends.registry
import torch._guards
import torch._higher_order_ops.wrap
import torch._logging._internal
import torch._ops
import torch._subclasses.fake_tensor
import torch.nn.modules.transformer
import torch.utils._python_dispatch
import torch.utils._pytree
import torch.utils._sympy.functions
import torch.utils._sympy.interp
import torch.utils._sympy.reference
from torch import fx, nn

# -- nodes, operators and modules --------------------------------------------------------------------------------------


def is_erased(node: fx.Node) -> bool:
    """Whether the node was removed from its graph; nothing public tells:
    https://github.com/pytorch/pytorch/blob/v2.13.0/torch/fx/graph.py#L1619
    """
    return node._erased


def codegen_of(graph: fx.Graph) -> Any:
    """The code generator that ``graph.set_codegen`` set last, which cannot be read publicly."""
    return graph._codegen


OpOverload = torch._ops.OpOverload
"""The class of ``aten.add.Tensor`` and the like."""

OpOverloadPacket = torch._ops.OpOverloadPacket
"""The class of ``torch.ops.aten.add`` and the like, which choose an overload."""

HigherOrderOperator = torch._ops.HigherOrderOperator
"""The class of ``torch.ops.higher_order.flex_attention`` and the like."""


def schema_of(target: Any) -> Any:
    """The ``FunctionSchema`` of an operator; None for other targets of nodes."""
    return getattr(target, "_schema", None)


def operator_name(target: Any) -> str:
    """An operator's name without its namespace and overload, such as ``add``; else a function's name, or ``str``."""
    return getattr(target, "_opname", None) or getattr(target, "__name__", None) or str(target)


def is_composite(target: torch._ops.OpOverload) -> bool:
    """Whether an operator may be computed by other operators, so that its schema does not tell everything."""
    return target._can_decompose()


def custom_op_function(function: Any) -> Any:
    """The Python function behind a ``torch.library.custom_op``; anything else as it is."""
    return getattr(function, "_init_fn", function)


def defined_in_python(name: str) -> bool:
    """Whether an operator, such as ``aten::add``, was defined by a ``torch.library.Library``:
    https://github.com/pytorch/pytorch/blob/v2.13.0/torch/library.py#L60
    """
    return name in torch.library._defs


def replaced_operators() -> list[str]:
    """Implementations that were given to PyTorch's operators, as "aten/add.Tensor/CPU", without the kinds that PyTorch
    itself writes in Python.
    """
    own = ("Meta", "CUDA", "MPS", "FuncTorchBatched")
    given = (each for each in torch.library._impls if each.startswith("aten/"))
    return sorted(each for each in given if each.rpartition("/")[2] not in own)


def function_spaces() -> dict[str, Mapping[str, Any]]:
    """The functions and methods of PyTorch that graphs call, or that those call, by where they stand."""
    variables = torch._C._VariableFunctions
    return {
        "Tensor": {**vars(torch._C.TensorBase), **vars(torch.Tensor)},
        "torch": vars(torch),
        "torch.nn.functional": vars(torch.nn.functional),
        "torch._C._nn": vars(torch._C._nn),
        "torch._C._VariableFunctions": {name: getattr(variables, name) for name in dir(variables)},
    }


def custom_op_functions() -> dict[str, Callable[..., Any]]:
    """The Python functions behind all ``torch.library.custom_op``, by operator name, for the scripts of dumps."""
    from torch._library.custom_ops import OPDEFS

    return {name: custom_op_function(definition) for name, definition in OPDEFS.items()}


enter_autocast = torch.amp.autocast_mode._enter_autocast
exit_autocast = torch.amp.autocast_mode._exit_autocast
"""The calls of ``torch.autocast`` in a graph: https://github.com/pytorch/pytorch/blob/v2.13.0/torch/amp/autocast_mode.py#L391"""

switch_sdpa_backends = torch.nn.attention._sdpa_kernel
"""The call of ``torch.nn.attention.sdpa_kernel`` in a graph, at both ends of a region:
https://github.com/pytorch/pytorch/blob/v2.13.0/torch/nn/attention/__init__.py#L82
"""

set_grad_enabled = torch._C._set_grad_enabled
"""The call of ``torch.no_grad`` and ``torch.enable_grad`` in a graph."""

transformer_encoder_layer = torch._transformer_encoder_layer_fwd
"""The fast path of ``nn.TransformerEncoderLayer``, one call that holds a whole layer:
https://github.com/pytorch/pytorch/blob/v2.13.0/torch/nn/modules/transformer.py#L917
"""

VMAP_ENTERS, VMAP_LEAVES, VMAP_LOADS = "_vmap_increment_nesting", "_vmap_decrement_nesting", "lazy_load_decompositions"
"""Names of the calls that ``torch.vmap`` leaves in a graph; their module depends on how it was traced:
https://github.com/pytorch/pytorch/blob/v2.13.0/torch/_functorch/predispatch.py#L79
"""

FORWARD_MODE_CALLS = ("_enter_dual_level", "_exit_dual_level", "_make_dual")
"""Names of the calls that forward-mode differentiation leaves in a graph."""


def forward_mode_level() -> int:
    """How deep calls of ``torch.autograd.forward_ad.dual_level`` are nested now; -1 outside of them:
    https://github.com/pytorch/pytorch/blob/v2.13.0/torch/autograd/forward_ad.py#L40
    """
    return torch.autograd.forward_ad._current_level


CHECKPOINT_CONTEXT = "_checkpoint_context_fn"
"""The key in the ``meta`` of a checkpoint's body with the function that selects what is recomputed, if there is one:
https://github.com/pytorch/pytorch/blob/v2.13.0/torch/_higher_order_ops/wrap.py#L459
"""

checkpoint_ids = torch._higher_order_ops.wrap.uid
"""The counter of checkpointed regions, which the partitioner tells apart by number; inlined ones need one too:
https://github.com/pytorch/pytorch/blob/v2.13.0/torch/_higher_order_ops/wrap.py#L458
"""


def call_of(module: nn.Module) -> Callable[..., Any]:
    """A module's uncompiled call, with its hooks."""
    return module._call_impl


wrapped_call = nn.Module._wrapped_call_impl
"""``nn.Module.__call__``, as it is when no tracer has replaced it."""

COMPILED_CALL = "_compiled_call_impl"
"""The attribute with the compiled call of a module, which ``nn.Module.compile`` sets:
https://github.com/pytorch/pytorch/blob/v2.13.0/torch/nn/modules/module.py#L1775
"""

# -- tracing -----------------------------------------------------------------------------------------------------------


def python_dispatcher() -> AbstractContextManager[None]:
    """Lets composite operators be decomposed by Python, which keeps sizes symbolic:
    https://github.com/pytorch/pytorch/blob/v2.13.0/torch/_dispatch/python.py#L23
    """
    from torch._dispatch.python import enable_python_dispatcher

    return enable_python_dispatcher()


def aot_export_module(*args: Any, **kwargs: Any) -> Any:
    """Makes the IR of ``torch.export``, which itself takes modules, but not Dynamo's graphs with fake inputs:
    https://github.com/pytorch/pytorch/blob/v2.13.0/torch/_functorch/aot_autograd.py#L1538
    """
    from torch._functorch.aot_autograd import aot_export_module

    return aot_export_module(*args, **kwargs)


CompileContext = torch._guards.CompileContext
"""The frame that is being compiled, for the name of its graph."""

TracingContext = torch._guards.TracingContext
tracing = torch._guards.tracing
"""``tracing(TracingContext(mode))`` separates a compilation within another; ``tracing(None)`` leaves compilation."""

detect_fake_mode = torch._guards.detect_fake_mode
"""The fake mode that Dynamo traces in, found by tensors or the context."""

FakeTensor = torch._subclasses.fake_tensor.FakeTensor
FakeTensorMode = torch._subclasses.fake_tensor.FakeTensorMode
"""The tensors of a graph while it is compiled, and their mode; neither has a public name."""

unset_fake_temporarily = torch._subclasses.fake_tensor.unset_fake_temporarily
"""Leaves the fake mode, to compute with known constants."""

TorchDispatchMode = torch.utils._python_dispatch.TorchDispatchMode
"""Observes each operator call, to find the operators that one function of PyTorch calls."""

disable_current_modes = torch.utils._python_dispatch._disable_current_modes
"""Leaves every dispatch mode, so that none sees what is computed inside."""


def is_transformed_or_watched() -> bool:
    """Whether ``torch.jit.trace``, a transform of ``torch.func`` or a mode of ``__torch_dispatch__`` is active:
    https://github.com/pytorch/pytorch/blob/v2.13.0/torch/utils/_python_dispatch.py#L1
    """
    if torch._C._is_tracing() or torch._C._len_torch_dispatch_stack() > 0:
        return True
    return torch._C._functorch.maybe_current_level() is not None


is_functorch_wrapped = torch._C._functorch.is_functorch_wrapped_tensor
"""Whether a tensor is one of a level of ``torch.func``, which has no memory of its own."""

is_traceable_wrapper_subclass = torch.utils._python_dispatch.is_traceable_wrapper_subclass
"""Whether a tensor wraps others (DTensor, quantized weights), and has no storage of its own."""

collective_operators = torch.ops._c10d_functional
"""Collectives that a graph may hold, by the name of their process group."""

tree_leaves = torch.utils._pytree.tree_leaves
tree_map_only = torch.utils._pytree.tree_map_only
"""Find tensors within arguments; ``torch.utils.pytree`` has neither function in 2.11."""

FloorDiv = torch.utils._sympy.functions.FloorDiv
SYMPY_QUOTIENTS = (torch.utils._sympy.functions.CleanDiv, FloorDiv)
SYMPY_EXTREMES = (torch.utils._sympy.functions.Max, torch.utils._sympy.functions.Min)
sympy_interp = torch.utils._sympy.interp.sympy_interp
PythonReferenceAnalysis = torch.utils._sympy.reference.PythonReferenceAnalysis
"""Compute a symbolic size in Python, from values or proxies of nodes."""


def shape_environment(values: Any) -> Any:
    """The ``ShapeEnv`` of symbolic sizes among fake tensors and numbers; None if there is none. Its fields
    ``var_to_range``, ``replacements``, ``guards`` and the like have no public reading.
    """
    mode = detect_fake_mode(list(values))
    if mode is not None:
        return mode.shape_env
    symbols = [value for value in values if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool))]
    return symbols[0].node.shape_env if symbols else None


def vmap_depth() -> int:
    """How many levels of ``torch.func`` transforms are open."""
    stack = torch._C._functorch.get_interpreter_stack()  # None if there is no level, contrary to its stub.
    return len(stack or ())


def leave_vmap_level() -> None:
    """Closes the innermost level; tracing that fails midway leaves its levels open."""
    torch._C._functorch.pop_dynamic_layer_stack()


detect_is_causal_mask = torch.nn.modules.transformer._detect_is_causal_mask
"""How ``nn.Transformer`` asks whether a mask is causal: by comparing its numbers, unless the caller says so.
https://github.com/pytorch/pytorch/blob/v2.13.0/torch/nn/modules/transformer.py#L1209
"""

# -- Dynamo ------------------------------------------------------------------------------------------------------------

dynamo_config = torch._dynamo.config
"""Its ``patch`` sets ``recompile_limit`` and ``capture_dynamic_output_shape_ops`` for single calls."""


_made_constants: set[str] = set()


def trace_again_with_constants(floats: Iterable[torch.SymFloat]) -> NoReturn:
    """Leaves the backend, and has Dynamo trace the function again with these floats as constants under guards, as
    AOTAutograd does with floats that it cannot make tensors of:
    https://github.com/pytorch/pytorch/blob/v2.13.0/torch/fx/passes/_tensorify_python_scalars.py#L445
    """
    _made_constants.update(str(each.node.expr) for each in floats)
    torch._dynamo.symbolic_convert.TensorifyState.force_specializations.update(_made_constants)
    raise torch._dynamo.exc.TensorifyScalarRestartAnalysis


def leave_constants() -> None:
    """Ends what :func:`trace_again_with_constants` began; Dynamo would make them constants in all later functions."""
    torch._dynamo.symbolic_convert.TensorifyState.force_specializations.difference_update(_made_constants)
    _made_constants.clear()


ShortenTraceback = torch._dynamo.exc.ShortenTraceback
"""Base class of errors that Dynamo raises unchanged, not wrapped into ``BackendCompilerFailed``:
https://github.com/pytorch/pytorch/blob/v2.13.0/torch/_dynamo/output_graph.py#L3123
"""

TRACING_ERRORS = (torch._dynamo.exc.Unsupported, torch._dynamo.exc.InternalTorchDynamoError)
"""What Dynamo raises where it cannot trace; errors of a backend are others."""

FailOnRecompileLimitHit = torch._dynamo.exc.FailOnRecompileLimitHit
"""Raised when a function was compiled too often, with ``fullgraph=True``."""

OptimizedModule = torch._dynamo.OptimizedModule
"""The class of modules that ``torch.compile`` returns."""


def original_module(module: nn.Module) -> nn.Module:
    """The module inside of ``torch.compile(module)``; any other module itself."""
    if isinstance(module, OptimizedModule):
        original: nn.Module = module._orig_mod
        return original
    return module


def is_compiled(module: nn.Module) -> bool:
    """Whether the module is compiled as a whole: by ``torch.compile``, or in place."""
    return isinstance(module, OptimizedModule) or module._compiled_call_impl is not None


def call_attribute(module: nn.Module) -> str:
    """The name of the attribute with the compiled call.

    It is ``forward`` for an ``OptimizedModule``, and :data:`COMPILED_CALL` for a module that is compiled in place. The
    latter is None if only parts of a module are compiled.
    """
    return "forward" if isinstance(module, OptimizedModule) else COMPILED_CALL


TORCHDYNAMO_PREFIX = "_torchdynamo"
"""The prefix of attributes of a compiled function, by which Dynamo skips wrappers around the original function."""

PLACEHOLDER_PREFIXES = ("_dynamo", "_param_name", "_backend")
"""Prefixes of the attributes that Dynamo sets on nodes and graphs for the inner compiler (``_dynamo_source``)."""

STATIC_INPUT = "_dynamo_static_input_type"
"""The key in a placeholder's ``meta["tensor_dict"]`` of inputs that keep their address, such as parameters and buffers:
https://github.com/pytorch/pytorch/blob/v2.13.0/torch/_dynamo/variables/builder.py#L2411
"""


def dynamo_source(placeholder: fx.Node) -> str:
    """The Python expression by which Dynamo found an input of the graph; empty if unknown."""
    source = getattr(placeholder, "_dynamo_source", None)
    if source is None:
        return ""
    # A property since torch 2.12, a method before.
    return source.name if isinstance(source.name, str) else str(source.name())


def leave_without_source(placeholder: fx.Node) -> None:
    """Marks an input that was added after Dynamo as one without source, which Inductor and AOTAutograd ask for."""
    placeholder._dynamo_source = None


list_backends = torch._dynamo.backends.registry.list_backends
lookup_backend = torch._dynamo.backends.registry.lookup_backend
"""Look up ``options["inner_backend"]`` by name; ``torch.compiler`` only lists the names."""

skip_code = torch._dynamo.eval_frame.skip_code
"""Excludes a code object from compilation, without the extra frame of ``torch.compiler.disable``."""

compile_lock = torch._dynamo.convert_frame.compile_lock
"""The lock that keeps Dynamo from compiling in other threads:
https://github.com/pytorch/pytorch/blob/v2.13.0/torch/_dynamo/convert_frame.py#L275
"""

mark_static = torch._dynamo.mark_static
"""Marks a dimension of a tensor as static, whatever ``dynamic`` is."""


def graph_breaks() -> Counter[str]:
    """The number of graph breaks so far, by reason."""
    return Counter(torch._dynamo.utils.counters["graph_break"])


def break_after(gm: torch.fx.GraphModule) -> Any:
    """Why Dynamo ended the graph, with ``reason`` and ``user_stack``; None if it ended with the function.

    https://github.com/pytorch/pytorch/blob/v2.13.0/torch/_dynamo/output_graph.py GraphCompileReason
    """
    reason = getattr(gm, "compile_subgraph_reason", None)
    return reason if getattr(reason, "graph_break", False) else None


RESUMED_FUNCTION = re.compile(r"torch_dynamo_resume_in_(?P<function>.+)_at_(?P<line>\d+)$")
"""The name of the code behind a graph break:
https://github.com/pytorch/pytorch/blob/v2.13.0/torch/_dynamo/resume_execution.py TORCH_DYNAMO_RESUME_IN_PREFIX
"""


trace_structured = torch._logging._internal.trace_structured
"""Adds the report to the trace that ``TORCH_TRACE`` writes and tlparse reads."""

# -- Inductor ----------------------------------------------------------------------------------------------------------

ATTENTION_PATTERNS = "pass_pattern_0"
"""The name, for ``disabled_passes``, of the pass with Inductor's attention patterns:
https://github.com/pytorch/pytorch/blob/v2.13.0/torch/_inductor/fx_passes/joint_graph.py#L701
"""


def inductor_config() -> Any:
    """``torch._inductor.config``: the settings for all graphs, and the names of valid settings."""
    import torch._inductor.config

    return torch._inductor.config


def config_hashes() -> str:
    """The settings of Dynamo, AOTAutograd and Inductor that change what is compiled; of the last two a digest:
    https://github.com/pytorch/pytorch/blob/v2.13.0/torch/utils/_config_module.py#L747

    Dynamo's own digest has addresses of functions in it.
    """
    of_dynamo = {
        name: value
        for name, value in dynamo_config.get_config_copy().items()
        if isinstance(value, (bool, int, float, str, type(None)))
    }
    digests = [configuration.get_hash().hex() for configuration in (torch._functorch.config, inductor_config())]
    return f"{sorted(of_dynamo.items())} {digests}"


def inductor_backend(mode: str | None, options: dict[str, Any]) -> Any:
    """The backend that ``torch.compile(backend="inductor")`` makes from its mode and options.

    Raises:
        RuntimeError: the mode or an option is not valid.
    """
    return torch._TorchCompileInductorWrapper(mode, options, None)  # type: ignore[no-untyped-call]


def group_by_name(name: str) -> Any:
    """The process group of that name, as operators of ``torch.distributed`` find it:
    https://github.com/pytorch/pytorch/blob/v2.13.0/torch/distributed/_functional_collectives.py#L1
    """
    from torch._C._distributed_c10d import _resolve_process_group

    return _resolve_process_group(name)  # type: ignore[arg-type]


def assert_on_device(condition: torch.Tensor, message: str) -> None:
    """An assertion for which the CPU does not wait."""
    torch._assert_async(condition, message)


def pytorch_context_parallel() -> bool:
    """Whether PyTorch's own ``context_parallel`` is active: its ring attention is what DTensors dispatch to,
    https://github.com/pytorch/pytorch/blob/v2.13.0/torch/distributed/tensor/experimental/_context_parallel/_attention.py#L1001
    """
    if "torch.distributed.tensor.experimental._context_parallel._attention" not in sys.modules:
        return False
    from torch.distributed.tensor import DTensor

    return torch.ops.aten._scaled_dot_product_flash_attention.default in DTensor._op_dispatcher._custom_op_handlers


def ring_attention(
    group: Any,
    step: Callable[..., Any],
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    causal: bool,
    *,
    balanced: bool,
    scale: float,
) -> tuple[Any, ...]:
    """The loop over shards of keys and values of PyTorch's ring attention, called without its dispatcher:
    https://github.com/pytorch/pytorch/blob/v2.13.0/torch/distributed/tensor/experimental/_context_parallel/_attention.py#L317

    Args:
        step: ``(query, key, value, *, is_causal, scale) -> (output, logsumexp)`` between two shards.
        balanced: shards are those of the head-tail load balancer.
    """
    from torch.distributed.tensor.experimental._context_parallel import _attention

    with _ring_settings(balanced, query.dtype):
        return _attention._templated_ring_attention(group, 2, step, query, key, value, causal, scale=scale)


def ring_attention_backward(
    group: Any,
    step: Callable[..., Any],
    gradient: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    output: torch.Tensor,
    logsumexp: torch.Tensor,
    causal: bool,
    *,
    balanced: bool,
    scale: float,
) -> tuple[Any, ...]:
    """The gradients of :func:`ring_attention`; ``step`` gives those between two shards."""
    from torch.distributed.tensor.experimental._context_parallel import _attention

    operands = (query, key, value, output, logsumexp)
    with _ring_settings(balanced, query.dtype):
        return _attention._templated_ring_attention_backward(
            group, 2, step, gradient, "grad_out", *operands, causal, scale=scale
        )


_ring_lock = threading.Lock()


@contextlib.contextmanager
def _ring_settings(balanced: bool, dtype: torch.dtype) -> Iterator[None]:
    """PyTorch's ring attention reads its settings from a global, which is set for the call and put back."""
    from torch.distributed.tensor.experimental._context_parallel import _attention

    settings = _attention._cp_options
    with _ring_lock:
        before = dict(vars(settings))
        settings.enable_load_balance = balanced
        # In double precision, float32 would lose digits.
        settings.convert_to_f32 = dtype.itemsize < 4
        settings.rotate_method = _attention._RotateMethod.ALL_TO_ALL
        try:
            yield
        finally:
            vars(settings).update(before)


def lower_to_memory(op: torch._ops.OpOverload) -> None:
    """Has Inductor take ``op(x, own)`` for ``x`` itself, once it is computed into memory and its layout is decided.

    Args:
        op: an operator whose result are the numbers of its first argument; with ``own`` in memory of their own.
    """
    from torch._inductor import ir
    from torch._inductor.lowering import register_lowering

    def lowered(x: Any, own: bool) -> Any:
        found: Any = ir.ExternKernel.copy_input(x) if own else ir.ExternKernel.realize_input(x)
        found.freeze_layout()
        return found if isinstance(found, ir.TensorBox) else ir.TensorBox(found)

    register_lowering(op, type_promotion_kind=None)(lowered)


def compiles_to_be_saved() -> bool:
    """Whether ``aot_compile`` is at work: what a backend returns is then saved, and must be Inductor's own.

    https://github.com/pytorch/pytorch/blob/v2.13.0/torch/_dynamo/aot_compile.py, ``aot_compile_fullgraph``
    """
    import torch._functorch.config as config

    return bool(config.bundled_autograd_cache and config.force_non_lazy_backward_lowering)


def backward_compiled_at_once() -> AbstractContextManager[Any]:
    """A context in which AOTAutograd compiles backward graphs at once, not at their first call."""
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
    """FlexAttention's block mask of a single block, which it treats as no mask."""
    from torch.nn.attention.flex_attention import _create_empty_block_mask

    return _create_empty_block_mask(query, key)


def aoti_compile_and_package(program: torch.export.ExportedProgram, path: str) -> None:
    """``torch._inductor.aoti_compile_and_package``: the documented entry, whose module is private by its name.

    https://docs.pytorch.org/docs/stable/torch.compiler_aot_inductor.html
    """
    from torch._inductor import aoti_compile_and_package as compile_and_package

    compile_and_package(program, package_path=path)


def cpp_compiler() -> str:
    """The C++ compiler that Inductor uses.

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
