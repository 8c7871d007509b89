"""What capture leaves of PyTorch's functions: the vocabulary that the rules have to read.

Every method of ``torch.Tensor`` and every function of the namespaces below is called with each of the argument recipes
that it takes, and all calls are captured in a few graphs. ``python -m tests.capture.vocabulary`` prints what arrives,
for the torch that is installed.
"""

from __future__ import annotations

import functools
import inspect
import operator
import re
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from attnrewrite.capture.support import CaptureError
from attnrewrite.capture.trace import capture

__all__ = ["Vocabulary", "as_text", "part_of_text", "read_vocabulary"]


@functools.cache
def _inputs() -> dict[str, Tensor]:
    """One tensor for each letter of the recipes."""

    def numbers(*shape: int, start: float = 0.1) -> Tensor:
        return torch.linspace(start, 0.9, torch.Size(shape).numel()).view(shape)

    positions = torch.arange(24).view(2, 3, 4)
    # Alike, for a product with x, complex; matrices; vectors.
    inputs = {
        "x": numbers(2, 3, 4),
        "y": numbers(2, 3, 4, start=0.2),
        "w": numbers(2, 4, 3),
        "z": numbers(2, 3, 4) + 1j,
    }
    inputs |= {"m": numbers(3, 4), "n": numbers(4, 3), "s": torch.eye(3) + 0.1, "d": numbers(5, 4), "g": numbers(3, 1)}
    inputs |= {"u": numbers(4), "v": numbers(4, start=0.2), "r": numbers(3), "l": numbers(5), "t": torch.tensor(0.5)}
    # Indices and masks.
    inputs |= {"i": positions % 2, "b": positions % 3 == 0, "p": torch.tensor([0, 2]), "o": torch.ones(6, 6).tril() > 0}
    # Parts and kernels; heads, images and videos.
    inputs |= {"a": numbers(2, 2, 4), "h": numbers(2, 1, 3, 4), "k": numbers(3, 4, 2), "f": numbers(3, 4, 2, 2)}
    return inputs | {"e": numbers(1, 4, 6, 4), "q": numbers(1, 2, 3, 4, 4), "j": numbers(3, 2, 2, 2, 2)}


RECIPES = """
x | z | m | s | u | t | i | b | e | k
x, y | i, i | b, b | x, i | z, z | x, t | x, u | i, x | x, b
x, 0.5 | i, 2 | 0.5, x | 2, i | b, True | 0.5, 2.0
x, y, alpha=2 | x, 0.5, alpha=2 | x, y, rounding_mode="floor" | x, 0.5, rounding_mode="trunc" | x, decimals=2
x, 0.1, 0.5 | x, min=0.5 | x, max=0.5 | x, min=y | x, y, y | x, y, 0.5 | x, y, y, value=2 | 1, x
b, x, y | b, x, 0.5 | b, 0.5, x | b, 1.0, 0.5 | x, b, y | x, b, 0.5 | x, b, t
x, -1 | x, dim=-1 | x, dim=(1, 2) | x, dim=(-1,) | x, (-1,), True | x, dim=-1, keepdim=True | b, -1 | b, dim=(1, 2)
x, -1, dtype=torch.float64 | x, dtype=torch.float64 | x, 2, -1 | x, 2, dim=-1 | x, 2.0, dim=-1 | x, 0.5, -1
x, 0, 1 | x, (2, 12) | x, 2, 12 | x, (1, 0, 2) | x, 1, 0, 2 | x, (0,), (1,) | x, (2, 3, 4) | x, 2, 3, 4 | u, 2, 3, 4
u, (2, 3, 4) | x, 1, (1, 3) | x, start_dim=1 | x, 1, 2, 1 | x, (0, 1) | x, (1,) | x, 1, (0, 1) | x, (1, 1), (0, 1)
x, 1, dims=(0, 1) | x, (2, 3, 4), (12, 4, 1) | x, y, (2, 3, 4), (12, 4, 1) | x, (1, 3, 1) | x, (1, 3, 4) | m, 1 | m, x
x, torch.int32 | x, torch.float64 | x, torch.bfloat16 | x, torch.device("cpu") | x, z | x, torch.device("meta")
x, memory_format=torch.contiguous_format | x, torch.device("cpu"), torch.float64 | x, torch.float64, copy=True
x, 2, 1 | x, [1, 2], 1 | x, [1, 2], dim=1 | x, (1,), 1 | x, 2 | x, 1 | x, 3, 0 | x, 2, dim=-1
[x, y] | [x, y], 1 | [x, y], -1 | [u, v] | [m, m] | m, n | [u, v], 1
x, 1, i | x, i, 1 | x, 1, p | x, 1, i, y | x, 1, i, 0.5 | x, p | x, p, 1 | x, 1, p, a | x, 1, p, a, "amax"
m, (p,), t | m, p | x, 2, p, y | x, 1, p, 0.5 | x, i, y | p, m
x, m, 0, 1 | x, m, 0 | x, 1, i, y, "amax" | x, u, -1 | p, 3 | x, (p,), t | x, g, 1, 0, 1
x, 0 | x, None | x, (..., slice(1, None)) | x, slice(0, 1) | x, (slice(None), None) | x, (slice(None), p)
x, (..., slice(None, None, 2)) | x, (0, p)
x, w | u, v | m, u | s, s | r, m, u | s, m, n | m, r, u | s, x, w | [m, n, m] | "bij,bjk->bik", x, w | x, y, 1
"bij,bkj->bik", x, y | x, y, ([2], [2]) | x, y, dim=1 | z, z, dim=1 | u, v, dim=0 | h, y | s, s, s | x, m, r
s, x, w, beta=0 | m, n, m | x, y, p=2 | s, r | m, n, n
e, f | e, 2 | e, (2, 2) | e, u | x, (4,) | e, e, e | e, e, e, is_causal=True | e, e, e, scale=0.5 | e, scale_factor=2
x, (4,), u, v | x, (4,), u | e, 2, u, v | e, 2, None | x, 0.5, False | x, 0.5, True | x, w, r | w, k, r | x, d, l | x, d
e, (6, 4) | x, 0.5, True, True | e, e, e, o | e, (4, 4), (2, 2) | x, (1, 1), "replicate" | x, (1, 1), value=0.5
x, m, None | d, m | q | q, j | q, 2 | q, (2, 2, 2)
3 | (2, 3) | (2, 3), 0.5 | 1, 5 | 1, 9, 2 | 0.5 | 2, 3 | 0.0, 1.0, 5 | 3, dtype=torch.float64 | (2, 3), (3, 1) | u, v, u
x, (2, 3) | x, (2, 3), 0.5 | x, (2, 3), (3, 1)
"""
"""Arguments, of the letters of ``_inputs``; of those that are alike (``_kind_of``) the first that is taken counts."""


LEFT_OUT = {
    "changes the tensor itself, or how it is stored": (
        "align_as align_to apply_ as_strided_ as_subclass backward data detach_ fill_diagonal_ fork grad "
        "map2_ map_ module_load names new pin_memory record_stream refine_names reinforce rename rename_ "
        "requires_grad_ resize resize_ resize_as resize_as_ retain_grad set_ share_memory_ squeeze_ swapaxes_ "
        "swapdims_ t_ transpose_ unflatten_ unsqueeze_"
    ),
    "random": (
        "alpha_dropout bernoulli binomial cauchy exponential feature_alpha_dropout fractional_max_pool2d "
        "fractional_max_pool3d geometric gumbel_softmax log_normal multinomial normal poisson rand rand_like "
        "randint randint_like randn randn_like random randperm rrelu uniform"
    ),
    "decompositions of matrices": (
        "cholesky cholesky_ex cholesky_inverse cholesky_solve cond det eig eigh eigvals eigvalsh geqrf "
        "householder_product inv inv_ex inverse ldl_factor ldl_factor_ex ldl_solve lobpcg logdet lstsq lu "
        "lu_factor lu_factor_ex lu_solve lu_unpack matrix_rank nuclear_norm orgqr ormqr pca_lowrank pinv "
        "pinverse qr slogdet solve solve_ex solve_triangular svd svd_lowrank svdvals symeig tensorinv "
        "tensorsolve triangular_solve"
    ),
    "not between tensors of numbers side by side: sparse, quantized, of another device or library": (
        "ccol_indices choose_qparams_optimized coalesce col_indices crow_indices cuda dequantize dsmm "
        "fake_quantize_per_channel_affine fake_quantize_per_tensor_affine from_file from_numpy frombuffer "
        "fused_moving_avg_obs_fake_quant hsmm hspmm indices int_repr ipu is_coalesced mtia numpy "
        "q_per_channel_axis q_per_channel_scales q_per_channel_zero_points q_scale q_zero_point qscheme "
        "row_indices saddmm slice_inverse smm sparse_mask sparse_resize_ sparse_resize_and_clear_ spmm "
        "sspaddmm to_dense to_mkldnn to_padded_tensor to_sparse to_sparse_bsc to_sparse_bsr to_sparse_coo "
        "to_sparse_csc to_sparse_csr values xpu"
    ),
    "no operators": (
        "Optional assert_int_or_pair boolean_dispatch call contains countOf delitem handle_torch_function "
        "has_torch_function has_torch_function_unary has_torch_function_variadic index indexOf length_hint "
        "truth"
    ),
    "recurrent cells": "gru gru_cell lstm lstm_cell rnn_relu rnn_relu_cell rnn_tanh rnn_tanh_cell",
}
"""By their reasons, and with their in-place forms."""
_LEFT_OUT = re.compile(
    "|".join(
        [
            r"_.*|.*_copy|(cudnn|miopen|mkldnn|fbgemm|quantize[d]?|sym|batch_norm|native|sparse|is|vulkan)_.*",
            *(f"{name}_?" for names in LEFT_OUT.values() for name in names.split()),
        ]
    )
)


@dataclass(frozen=True)
class Call:
    """``function`` is a method's name, or a function; an attribute of a tensor is ``getattr``."""

    spelling: str
    function: Any
    recipe: str

    def given(self, inputs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return eval(_compiled(self.recipe), {"_arguments": _arguments, "torch": torch, **inputs})  # type: ignore[no-any-return]

    def __call__(self, inputs: dict[str, Any]) -> Any:
        args, kwargs = self.given(inputs)
        if self.in_place and isinstance(args[0], Tensor):
            args = (args[0].clone(), *args[1:])
        if isinstance(self.function, str):
            return getattr(args[0], self.function)(*args[1:], **kwargs)
        return self.function(*args, **kwargs)

    def written(self, graph: fx.Graph, inputs: dict[str, Any]) -> fx.Node:
        args, kwargs = self.given(inputs)
        if self.in_place:
            args = (graph.call_function(torch.clone, (args[0],)), *args[1:])
        if isinstance(self.function, str):
            return graph.call_method(self.function, args, kwargs)
        return graph.call_function(self.function, args, kwargs)

    @property
    def in_place(self) -> bool:
        namespace, _, name = self.spelling.partition(".")
        return name in _AUGMENTED if namespace == "operator" else name.endswith("_")


_AUGMENTED = frozenset(name for name in dir(operator) if name[0] == "i" and f"__{name}__" in vars(operator)) - {
    *("index", "inv", "invert")
}


@functools.cache
def _compiled(recipe: str) -> Any:
    return compile(f"_arguments({recipe})", "recipe", "eval")


def _arguments(*args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return args, kwargs


def _spellings() -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Each with what it may mean: the method and the function of one operator take the same arguments."""
    composed = set(torch.functional.__all__)
    shared = set()
    for name in dir(torch.Tensor):
        if _LEFT_OUT.fullmatch(name):
            continue
        own = inspect.getattr_static(torch.Tensor, name)
        function = getattr(torch, name, None)
        if inspect.ismethoddescriptor(own) and inspect.isbuiltin(function) and not name.endswith("_"):
            shared.add(name)
            yield name, (name, function)
        elif callable(getattr(torch.Tensor, name)):
            yield f"Tensor.{name}", (name,)
        elif inspect.isdatadescriptor(own):
            yield f"Tensor.{name}", (_Attribute(name),)
    namespaces = {"torch": torch, "linalg": torch.linalg, "special": torch.special, "F": F, "operator": operator}
    for prefix, namespace in namespaces.items():
        for name in dir(namespace):
            function = getattr(namespace, name)
            if _LEFT_OUT.fullmatch(name) or not callable(function) or isinstance(function, type):
                continue
            if namespace is torch and (name in shared or not (name in composed or _is_operator(name))):
                continue  # A setting, a context, a part of the compiler.
            if namespace is not operator and name.endswith("_"):
                continue  # The method is read.
            yield f"{prefix}.{name}", (function,)


def _is_operator(name: str) -> bool:
    """Whether ATen has an operator of that name, on tensors or making one."""
    packet = getattr(torch.ops.aten, name, None)
    schemas = [getattr(packet, overload)._schema for overload in packet.overloads()] if packet is not None else []
    return any("Tensor" in str(each.type) for schema in schemas for each in (*schema.arguments, *schema.returns))


class _Attribute(str):
    """The name of an attribute."""


@dataclass
class Vocabulary:
    """
    Attributes:
        targets: what capture leaves of each spelling, in all its recipes together.
        untaken: spellings that take none of the recipes, or give no tensor.
        refused: spellings that cannot be captured, and why.
    """

    targets: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    untaken: list[str] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)


def name_of(spelling: str) -> str:
    """What an operator's spellings have in common."""
    return spelling.rpartition(".")[2].removesuffix("_")


def part_of_text(text: str, drawn: Callable[[str], bool]) -> str:
    """What :func:`as_text` gives of the names that are drawn."""
    lines: list[str] = []
    section = 0
    for line in text.splitlines():
        section += line.startswith("#")
        if section > 3 or not line or line.startswith("#"):
            lines.append(line)
        elif section > 1:
            lines += [line] if drawn(name_of(line)) else []
        else:
            targets, _, spellings = line.partition(": ")
            kept = [spelling for spelling in spellings.split() if drawn(name_of(spelling))]
            lines += [f"{targets}: {' '.join(kept)}"] if kept else []
    return "\n".join(lines) + "\n"


def _calls(drawn: Callable[[str], bool]) -> Iterator[tuple[str, list[Call]]]:
    recipes = [recipe.strip() for line in RECIPES.split("\n") for recipe in line.split(" | ") if recipe.strip()]
    known: dict[str, list[str]] = {}
    for spelling, functions in _spellings():
        if not drawn(name_of(spelling)):
            continue
        taken: dict[Any, Call] = {}
        # In place, what the method takes without the underscore.
        tried = known.get(spelling.removeprefix("Tensor.").removesuffix("_"), recipes)
        for function in functions:
            if isinstance(function, _Attribute):
                calls = [Call(spelling, getattr, f'{name}, "{function}"') for name in ("x", "m", "z")]
            else:
                calls = [Call(spelling, function, recipe) for recipe in tried]
            for call in calls:
                kind = _kind_of(call.recipe)
                if kind not in taken and _gives_tensors(call):
                    taken[kind] = call
        known[spelling] = [call.recipe for call in taken.values()]
        yield spelling, list(taken.values())


@functools.cache
def _kind_of(recipe: str) -> Any:
    """What tells overloads apart: recipes of one kind are tried until one is taken."""
    args, kwargs = Call("", "", recipe).given(_inputs())
    return tuple(map(_kind, args)), tuple((name, _kind(value)) for name, value in kwargs.items())


def _kind(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.dtype is torch.bool, value.is_complex(), value.dim() > 1
    return tuple(map(_kind, value)) if isinstance(value, (tuple, list)) else type(value)


def _gives_tensors(call: Call) -> bool:
    """Whether the call is possible and gives tensors, without writing to its arguments (``inplace=True``)."""
    try:
        result = call(_inputs())
    except Exception:  # noqa: BLE001  Any function, with whatever arguments: there is no telling what it raises.
        result = None
    if any(each._version for each in _inputs().values()):
        _inputs.cache_clear()
        return False
    return any(isinstance(each, Tensor) for each in (result if isinstance(result, (tuple, list)) else [result]))


def read_vocabulary(drawn: Callable[[str], bool] = lambda name: True) -> Vocabulary:
    """The vocabulary.

    Args:
        drawn: whether the spellings of a name are read, such as those of "add": ``torch.add``, ``Tensor.add_``.
    """
    vocabulary = Vocabulary()
    calls: list[Call] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for spelling, taken in _calls(drawn):
            if not taken:
                vocabulary.untaken.append(spelling)
            calls += taken
        # Small graphs cost little more together than large ones, and one call that is refused costs few others.
        for start in range(0, len(calls), 64):
            _read(calls[start : start + 64], vocabulary)
    for spelling in vocabulary.targets:
        vocabulary.refused.pop(spelling, None)
    return vocabulary


def _read(calls: Sequence[Call], vocabulary: Vocabulary) -> None:
    """Captures all calls in one graph; in halves, where one cannot be captured."""
    try:
        _read_graph(calls, vocabulary)
    except CaptureError as error:
        if len(calls) == 1:
            vocabulary.refused[calls[0].spelling] = str(error)
            return
        for part in (calls[: len(calls) // 2], calls[len(calls) // 2 :]):
            _read(part, vocabulary)


def _read_graph(calls: Sequence[Call], vocabulary: Vocabulary) -> None:
    """Each call has inputs of its own: one that returns its argument would pass for what made it."""
    graph = fx.Graph()
    made: list[tuple[Call, dict[str, fx.Node]]] = []
    values: list[Tensor] = []
    for number, call in enumerate(calls):
        names = [name for name in _compiled(call.recipe).co_names if name in _inputs()]
        made.append((call, {name: graph.placeholder(f"{name}_{number}") for name in names}))
        values += [_inputs()[name].clone() for name in names]
    outputs: list[fx.Node] = []
    owners: list[Call] = []
    for call, inputs in made:
        node = call.written(graph, inputs)
        result = call(_inputs())
        if isinstance(result, Tensor):
            results = [node]
        else:
            places = [place for place, each in enumerate(result) if isinstance(each, Tensor)]
            results = [graph.call_function(operator.getitem, (node, place)) for place in places]
        outputs += results
        owners += [call] * len(results)
    graph.output(tuple(outputs))
    ir = capture(fx.GraphModule(torch.nn.Module(), graph), values).gm
    (arrived,) = ir.graph.output_node().args
    assert isinstance(arrived, tuple)
    for call, result in zip(owners, arrived, strict=True):
        vocabulary.targets[call.spelling] |= _targets_behind(result, call.in_place)


def _targets_behind(result: Any, in_place: bool) -> set[str]:
    targets: set[str] = set()
    pending, seen = [result], {result}
    for node in pending:
        if node.op == "call_function" and not (in_place and node.target is torch.ops.aten.clone.default):
            targets.add(str(node.target).removeprefix("aten."))
        for source in node.all_input_nodes:
            if source not in seen:
                seen.add(source)
                pending.append(source)
    return targets - {"<built-in function getitem>"}


def as_text(vocabulary: Vocabulary) -> str:
    """The vocabulary as the golden file has it: for each set of operators the spellings that become them."""
    lines = ["# What capture leaves, and of which spellings: all of a spelling's recipes together."]
    spelled: dict[str, list[str]] = defaultdict(list)
    for spelling, targets in vocabulary.targets.items():
        spelled[" ".join(sorted(targets)) or "nothing"].append(spelling)
    lines += [f"{targets}: {' '.join(sorted(spellings))}" for targets, spellings in sorted(spelled.items())]
    lines += ["", "# Cannot be captured: their result depends on data, or they refuse to be traced."]
    lines += sorted(vocabulary.refused)
    lines += ["", "# Take none of the recipes, or give no tensor."]
    lines += sorted(vocabulary.untaken)
    for reason, names in LEFT_OUT.items():
        lines += ["", f"# Left out, {reason}.", " ".join(sorted(names.split()))]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(as_text(read_vocabulary()), end="")
