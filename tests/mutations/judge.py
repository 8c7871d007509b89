"""Draws a program, runs it as it is and rewritten, and says what became of it."""

from __future__ import annotations

import operator
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeGuard

import torch
from torch import Tensor, fx
from torch.nn import functional

from attnrewrite.backend import collect_reports
from attnrewrite.numerics.judge import HALF
from tests.mutations.program import copied, names, program
from tests.mutations.steps import PRODUCTS, Step, Values, applied, drawn, prepared_calls
from tests.support.against_eager import Results, Tolerance, prepared, run, wrong
from tests.support.helpers import outputs, rewritten
from tests.support.reference import Reference, wide
from tests.support.reordered import TF32, Rounded
from tests.support.scores import digits_of_scores, largest_score

__all__ = ["Mutant", "Outcome", "draw", "judge", "shrunk"]

Verdict = Literal["same", "wrong", "crashed", "ill-conditioned", "does not run"]

_LENGTHS = ((12, 12), (12, 12), (7, 7), (1, 1), (2, 2))
_TRIES = 12


@dataclass(frozen=True)
class Mutant:
    """The specimen ``name``, changed by ``steps``."""

    name: str
    steps: tuple[Step, ...]
    dtype: torch.dtype
    lengths: tuple[int, ...]
    dynamic: bool
    gradients: bool

    def __str__(self) -> str:
        what = f"{self.name} {str(self.dtype)[6:]} lengths {self.lengths}"
        return "; ".join([what + " dynamic" * self.dynamic + " gradients" * self.gradients, *map(str, self.steps)])

    @property
    def rounded_to(self) -> torch.dtype:
        """The lowest dtype that the program rounds to: what is rounded there is judged as half precision is."""
        rounds = any("bfloat16" in str(detail) for step in self.steps for detail in step.detail)
        return torch.bfloat16 if rounds else self.dtype

    def built(self) -> tuple[fx.GraphModule, list[list[Any]]] | None:
        """The graph and the arguments of its calls; None if a step does not fit, or eager cannot run it."""
        source = program(self.name, self.lengths, self.dynamic, self.dtype)
        if source is None:
            return None
        graph = copied(source.graph)
        calls = prepared_calls(self.steps, graph, source.calls)
        for step in self.steps:
            values = _values(graph, calls[0])
            if values is None or not applied(step, graph, values):
                return None
        values = _values(graph, calls[0])
        if values is None or _reads_what_was_never_written(graph, calls[0]) or _is_beyond_range(graph, values):
            return None
        return graph, calls


@dataclass(frozen=True)
class Outcome:
    mutant: Mutant
    verdict: Verdict
    detail: str = ""
    sites: int = 0

    def __str__(self) -> str:
        return f"{self.verdict}: {self.detail}\n  {self.mutant}"

    def script(self) -> str:
        """A program that runs the graph as it is and rewritten; its arguments lie beside it, in a file."""
        built = self.mutant.built()
        assert built is not None
        code = built[0].code.strip().replace("def forward(self, ", "def attend(")
        return _SCRIPT.format(code=code, mutant=self.mutant, self=self)


_SCRIPT = """# {self.verdict}: {mutant}
import pathlib

import torch
from torch import device, inf, nan

from tests.support.helpers import rewritten, rows

{code}

calls = torch.load(pathlib.Path(__file__).with_suffix(".pt"))
new = rewritten(attend, "aot_eager", dynamic={mutant.dynamic} or None)
for call in calls:
    print("eager    ", attend(*call))
    print("rewritten", new(*call))
    for row in rows(attend, *call, dynamic={mutant.dynamic} or None):
        print(row.status, row.kernel, row.reason)
"""


def draw(seed: int) -> Mutant:
    """A program that eager runs, made of one to five steps."""
    chance = random.Random(seed)
    while True:
        dtype = chance.choice([torch.float32] * 5 + [torch.float64, torch.bfloat16, torch.float16])
        dynamic = chance.random() < 0.1
        lengths = (12, 9) if dynamic else chance.choice(_LENGTHS)
        mutant = Mutant(chance.choice(names()), (), dtype, lengths, dynamic, chance.random() < 0.4)
        built = mutant.built()
        if built is None:
            continue
        wanted = chance.choice([1, 1, 2, 2, 3, 4, 5])
        for _ in range(_TRIES):
            values = _values(*_first(built))
            assert values is not None
            step = drawn(chance, built[0], values)
            changed = Mutant(mutant.name, (*mutant.steps, step), dtype, lengths, dynamic, mutant.gradients)
            again = changed.built()
            if again is not None:
                mutant, built = changed, again
            if len(mutant.steps) == wanted:
                break
        if mutant.steps:
            return mutant


def _first(built: tuple[fx.GraphModule, list[list[Any]]]) -> tuple[fx.GraphModule, list[Any]]:
    return built[0], built[1][0]


def judge(mutant: Mutant, device: str = "cpu", inner: str | None = None) -> Outcome:
    """Values of the calls and their gradients against eager, by what the same graph gives in float64.

    Args:
        mutant: what is judged.
        device: where its tensors lie.
        inner: the backend that the rewritten graph is given to (default: none, with gradients ``aot_eager`` unless a
            ``log_softmax`` is in it).
    """
    torch._dynamo.reset()
    built = mutant.built()
    if built is None:
        return Outcome(mutant, "does not run", "what it reads of empty memory is another number in each run")
    graph, calls = built
    if device != "cpu" and _has_half_mask_misread(graph, calls):
        return Outcome(mutant, "does not run", "PyTorch's own call misreads the mask")
    if device != "cpu":
        _move(graph, device)
    attend = _called(graph)
    given = [_copies(call, mutant, device) for call in calls]
    try:
        owns = [run(attend, call(), mutant.gradients) for call in given]
        truths = [_truth(attend, call(), mutant.gradients) for call in given]
    except Exception as error:  # noqa: BLE001 - A cast or a write that eager refuses: the program is none.
        return Outcome(mutant, "does not run", f"{type(error).__name__}: {str(error)[:200]}")
    # Tracing gives log_softmax's gradient strides that it does not have: beside a reshape plain aot_eager fails too.
    traced = mutant.gradients and not _has_log_softmax(graph)
    inner = inner or ("aot_eager" if traced else "eager")
    function = rewritten(attend, inner, dynamic=mutant.dynamic or None)
    with collect_reports() as reports:
        try:
            news = [run(function, call(), mutant.gradients) for call in given]
        except Exception as error:  # noqa: BLE001 - Whatever it is, it is the finding, unless PyTorch has it too.
            if _fails_without_us(attend, given, inner, mutant):
                return Outcome(mutant, "does not run", f"torch.compile: {type(error).__name__}: {str(error)[:200]}")
            return Outcome(mutant, "crashed", f"{type(error).__name__}: {str(error)[:300]}")
    failures = [report.reason for report in reports if "rewriting failed" in report.reason]
    if failures:
        return Outcome(mutant, "crashed", failures[0])
    sites = sum(len(report.rewritten) for report in reports)
    for new, own, truth, call in zip(news, owns, truths, given, strict=True):
        difference = wrong(mutant.rounded_to, new, own, truth, Tolerance.on(device))
        if difference and sites == 0 and _as_wrong_without_us(attend, given, inner, mutant):
            return Outcome(mutant, "does not run", f"torch.compile: {difference}")
        if difference:
            if _rounding_does_as_much(attend, call, mutant, new, own, truth, device):
                return Outcome(mutant, "ill-conditioned", difference, sites)
            return Outcome(mutant, "wrong", difference, sites)
    return Outcome(mutant, "same", "", sites)


def _copies(call: Sequence[Any], mutant: Mutant, device: str) -> Callable[[], list[Any]]:
    """The arguments of a call, new for each run, since a program may write to them."""

    def copies() -> list[Any]:
        own = [
            value.clone() if isinstance(value, Tensor) and not value.is_floating_point() else value for value in call
        ]
        made = prepared(own, mutant.dtype, mutant.gradients, device)
        return [
            value.clone() if isinstance(value, Tensor) and not value.requires_grad and value.is_contiguous() else value
            for value in made
        ]

    return copies


def _called(graph: fx.GraphModule) -> Callable[..., Any]:
    """A function that Dynamo traces; it would run a graph module of its own making as it is."""
    namespace = dict(graph.forward.__globals__)
    exec(compile(graph.code, "<mutant>", "exec"), namespace)
    forward = namespace["forward"]

    def attend(*args: Any) -> Any:
        return forward(None, *args)

    return attend


def _truth(attend: Callable[..., Any], inputs: list[Any], gradients: bool) -> Results:
    with Reference():
        results = run(attend, Reference.given(inputs), gradients)
    return {what: [wide(value) for value in values] for what, values in results.items()}


def _rounding_does_as_much(
    attend: Callable[..., Any],
    call: Callable[[], list[Any]],
    mutant: Mutant,
    new: Results,
    own: Results,
    truth: Results,
    device: str,
) -> bool:
    """Whether eager with inputs and steps that are rounded otherwise is wrong too, or errs so much that ours is right.

    On a GPU it is so as well with products that are computed as its kernels compute them. The gradients of a fused
    kernel have the rounding of the largest score.
    """
    dtype, tolerance = mutant.rounded_to, Tolerance.on(device)
    if dtype not in HALF and (mutant.gradients or device != "cpu"):
        digits = digits_of_scores(largest_score(lambda: run(attend, call(), False)), dtype, device, roundings=4)
        value = tolerance.value if device == "cpu" else max(tolerance.value, digits)
        tolerance = replace(tolerance, value=value, gradient=max(tolerance.gradient, digits))
    moved = run(attend, _moved(call(), mutant), mutant.gradients)
    with Rounded(seed=7):
        rounded = run(attend, _moved(call(), mutant), mutant.gradients)
    if any(wrong(dtype, each, own, truth) for each in (moved, rounded)):
        return True
    others = [own, moved, rounded]
    if device != "cpu":
        with Rounded(seed=7, products=TF32):
            others.append(run(attend, call(), mutant.gradients))
    return not all(wrong(dtype, new, each, truth, tolerance) for each in others)


def _moved(inputs: Sequence[Any], mutant: Mutant) -> list[Any]:
    """Copies of the inputs, floating-point numbers moved by about two roundings."""
    generator = torch.Generator().manual_seed(7)
    eps = torch.finfo(mutant.dtype).eps
    moved: list[Any] = []
    for value in inputs:
        if isinstance(value, Tensor) and (value.requires_grad or (value.is_floating_point() and not mutant.gradients)):
            noise = torch.randn(value.shape, generator=generator).to(value)
            moved.append((value.detach() * (1 + 2 * eps * noise)).requires_grad_(value.requires_grad))
        else:
            moved.append(value.clone() if isinstance(value, Tensor) else value)
    return moved


def _has_log_softmax(graph: fx.GraphModule) -> bool:
    return any(node.target in ("log_softmax", functional.log_softmax, torch.log_softmax) for node in graph.graph.nodes)


def _fails_without_us(
    attend: Callable[..., Any], given: Sequence[Callable[[], list[Any]]], inner: str, mutant: Mutant
) -> bool:
    torch._dynamo.reset()
    backend = "aot_eager" if inner == "eager" else inner
    function = torch.compile(attend, backend=backend, dynamic=mutant.dynamic or None)
    try:
        for call in given:
            run(function, call(), mutant.gradients)
    except Exception:  # noqa: BLE001 - That it fails is what is asked.
        return True
    return False


def _as_wrong_without_us(
    attend: Callable[..., Any], given: Sequence[Callable[[], list[Any]]], inner: str, mutant: Mutant
) -> bool:
    torch._dynamo.reset()
    function = torch.compile(attend, backend=inner, dynamic=mutant.dynamic or None)
    owns = [run(attend, call(), mutant.gradients) for call in given]
    news = [run(function, call(), mutant.gradients) for call in given]
    return any(wrong(mutant.dtype, new, own, own) for new, own in zip(news, owns, strict=True))


def _values(graph: fx.GraphModule, call: Sequence[Any]) -> Values | None:
    """What each node gives in a call; None if eager cannot run it, or gives nothing but NaN."""
    found: dict[str, Any] = {}

    class Recorded(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            if "scaled_dot_product" in str(n.target):
                _require_valid_call([found.get(arg.name) if isinstance(arg, fx.Node) else arg for arg in n.args])
            found[n.name] = super().run_node(n)
            return found[n.name]

    copies = [value.clone() if isinstance(value, Tensor) else value for value in call]
    try:
        with torch.no_grad():
            results = outputs(Recorded(graph).run(*copies))
    except Exception:  # noqa: BLE001 - Sizes, dtypes or arguments that do not fit: a step to be left out.
        return None
    if not any(bool(result.isfinite().any()) for result in results if result.numel()):
        return None
    return found


def _reads_what_was_never_written(graph: fx.GraphModule, call: Sequence[Any]) -> bool:
    """Whether results depend on what ``torch.empty`` happens to hold."""
    if not any(node.target is torch.empty for node in graph.graph.nodes):
        return False

    class Filled(fx.Interpreter):
        def __init__(self, seed: int) -> None:
            super().__init__(graph)
            self.generator = torch.Generator().manual_seed(seed)

        def run_node(self, n: fx.Node) -> Any:
            result = super().run_node(n)
            # Random, since a softmax does not show by how much all its numbers are larger.
            filled = torch.rand(result.shape, generator=self.generator) if n.target is torch.empty else None
            return result if filled is None else result.copy_(filled)

    with torch.no_grad():
        first, second = (
            outputs(Filled(seed).run(*(value.clone() if isinstance(value, Tensor) else value for value in call)))
            for seed in (1, 2)
        )
    return not all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(first, second, strict=True))


_KEY_AND_MASK = ((1, "key"), (3, "attn_mask"))
_FILLS = ("masked_fill", "masked_fill_", torch.masked_fill, "where", torch.where)
_QUOTIENTS = (operator.truediv, operator.itruediv, "div", "div_", torch.div)
_FACTORS = (operator.mul, operator.imul, "mul", "mul_", torch.mul)


def _is_beyond_range(graph: fx.GraphModule, values: Values) -> bool:
    """Whether the program does what docs/exactness.md names as not the same, since it leaves the range of its dtype."""
    return (
        _has_factor_beyond_range(graph, values)
        or _has_operand_beyond_range(graph, values)
        or _has_exponential_beyond_range(graph, values)
        or _masks_what_is_no_number(graph, values)
        or _divides_by_zero(graph, values)
    )


def _divides_by_zero(graph: fx.GraphModule, values: Values) -> bool:
    """Whether a number that is not zero is divided by zero: sums of infinities are NaN in some orders."""
    for node in graph.graph.nodes:
        if node.target not in _QUOTIENTS:
            continue
        above, below = (values.get(arg.name) if isinstance(arg, fx.Node) else None for arg in node.args[:2])
        if _floats(above) and _floats(below) and bool(((below == 0) & (above != 0) & ~above.isnan()).any()):
            return True
    return False


def _masks_what_is_no_number(graph: fx.GraphModule, values: Values) -> bool:
    """Whether a mask is put over NaN, which a fused kernel adds the mask to; not what looks for NaN to replace it."""
    for node in graph.graph.nodes:
        if node.target not in _FILLS or any("isnan" in str(arg.target) for arg in node.all_input_nodes):
            continue
        result = values.get(node.name)
        filled = [values.get(arg.name) for arg in node.all_input_nodes]
        if _floats(result) and any(bool((each.isnan() & ~result.isnan()).any()) for each in filled if _floats(each)):
            return True
    return False


def _floats(value: Any) -> TypeGuard[Tensor]:
    return isinstance(value, Tensor) and value.is_floating_point()


def _has_operand_beyond_range(graph: fx.GraphModule, values: Values) -> bool:
    """Whether sums of what is multiplied overflow in one order or another, or a mask raises scores beyond range."""
    tensors = [value for value in values.values() if isinstance(value, Tensor) and value.is_floating_point()]
    if any(bool(((value > 1e38) & value.isfinite()).any()) for value in tensors):
        return True
    operands = (values.get(operand.name) for node in graph.graph.nodes for operand in _operands(node))
    return any(
        bool((value.abs() > torch.finfo(value.dtype).max / 64).any())
        for value in operands
        if isinstance(value, Tensor) and value.is_floating_point()
    )


def _operands(node: fx.Node) -> list[fx.Node]:
    """What is multiplied and summed: no mask or bias that is added."""
    name = getattr(node.target, "__name__", "")
    inner = name == "scaled_dot_product_attention"
    if not inner and name != "linalg_vecdot" and node.target not in PRODUCTS:
        return []
    operands = [arg for arg in node.args if isinstance(arg, fx.Node)]
    if inner:
        return operands[:3]
    return operands[:2] if node.target is torch.nn.functional.linear else operands[node.target is torch.baddbmm :]


def _has_exponential_beyond_range(graph: fx.GraphModule, values: Values) -> bool:
    """Whether an exponential without a maximum overflows."""
    nodes = [node for node in graph.graph.nodes if node.target in ("exp", "exp_", torch.exp)]
    pairs = [(values.get(node.args[0].name), values.get(node.name)) for node in nodes]
    return any(
        bool((result.isinf() & exponent.isfinite()).any())
        for exponent, result in pairs
        if isinstance(exponent, Tensor) and isinstance(result, Tensor)
    )


def _has_factor_beyond_range(graph: fx.GraphModule, values: Values) -> bool:
    """Whether a factor of scores or weights holds infinities, or a divisor zeros or infinities (docs/exactness.md)."""
    computed: set[fx.Node] = set()
    for node in graph.graph.nodes:
        inner = node.target in PRODUCTS or getattr(node.target, "__name__", "") == "scaled_dot_product_attention"
        if inner or not computed.isdisjoint(node.all_input_nodes):
            computed.add(node)
        if node.target in _QUOTIENTS and node.args[0] is node.args[1]:
            return True  # Its gradient is a difference of two equal numbers, of any size.
        if node not in computed or node.target not in (*_QUOTIENTS, *_FACTORS):
            continue
        for factor in node.args[1:] if node.target in _QUOTIENTS else node.args:
            value = values.get(factor.name) if isinstance(factor, fx.Node) and factor not in computed else None
            if isinstance(value, Tensor) and (
                bool(value.isinf().any()) or (node.target in _QUOTIENTS and bool((value == 0).any()))
            ):
                return True
    return False


def _has_half_mask_misread(graph: fx.GraphModule, calls: Sequence[Sequence[Any]]) -> bool:
    """Whether a call in half precision has a mask that PyTorch 2.11 misreads on CUDA.

    At one of one column it ends with a CUDA error, and cuDNN reads one of float32 as if it were of half precision:
    https://github.com/pytorch/pytorch/pull/191612
    """
    masks = [
        [call.args[index] if len(call.args) > index else call.kwargs.get(name) for index, name in _KEY_AND_MASK]
        for call in graph.graph.nodes
        if getattr(call.target, "__name__", "") == "scaled_dot_product_attention"
    ]
    for values in (_values(graph, call) for call in calls) if masks else ():
        for pair in masks:
            key, mask = (None if each is None or values is None else values.get(each.name) for each in pair)
            if not _floats(key) or key.dtype not in HALF or not isinstance(mask, Tensor):
                continue
            if mask.shape[-1:] == (1,) or (mask.is_floating_point() and mask.dtype != key.dtype):
                return True
    return False


def _require_valid_call(args: Sequence[Any]) -> None:
    """PyTorch's kernel for the CPU divides by a number of queries of zero, and reads and writes behind its operands
    where their sizes do not fit.

    Raises:
        RuntimeError: the call is not valid.
    """
    query, key, value = args[:3]
    fits = query.shape[-1] == key.shape[-1] and key.shape[-2] == value.shape[-2]
    fits = fits and query.dim() == key.dim() == value.dim() and key.shape[:-2] == value.shape[:-2]
    if not fits or not all(operand.numel() for operand in (query, key, value)):
        raise RuntimeError("a call of scaled_dot_product_attention that is not valid")


_MAKERS = (torch.arange, torch.empty, torch.full, torch.ones, torch.zeros)


def _move(graph: fx.GraphModule, device: str) -> None:
    for node in graph.graph.nodes:
        if node.target in _MAKERS or node.kwargs.get("device") is not None:
            node.kwargs = {**node.kwargs, "device": device}
    graph.recompile()


def shrunk(outcome: Outcome, device: str = "cpu", inner: str | None = None) -> Outcome:
    """The same failure with as few steps, and as plain a call, as still show it."""
    best = outcome
    smaller = True
    while smaller:
        smaller = False
        for index in range(len(best.mutant.steps)):
            mutant = best.mutant
            steps = (*mutant.steps[:index], *mutant.steps[index + 1 :])
            again = Mutant(mutant.name, steps, mutant.dtype, mutant.lengths, mutant.dynamic, mutant.gradients)
            if again.built() is None:
                continue
            other = judge(again, device, inner)
            if other.verdict == outcome.verdict:
                best, smaller = other, True
                break
    return best
