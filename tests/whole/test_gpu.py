"""The same on an NVIDIA GPU, whose fused kernels have masks, dtypes and strides of their own to be wrong about."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from attnrewrite import KernelError, attention_backend
from attnrewrite.numerics.judge import disagreements
from attnrewrite.patterns import Specimen
from attnrewrite.patterns.registry import specimens
from tests.support.helpers import cast, gradients, relative_error, rewritten, rewritten_and_rows, rows
from tests.support.judged import disagreement_with_formula

pytestmark = pytest.mark.gpu

LENGTH = 12
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SPECIMENS = [specimen for specimen in specimens() if not specimen.only_cpu]
every_specimen = pytest.mark.parametrize("specimen", SPECIMENS, ids=[specimen.name for specimen in SPECIMENS])
differentiable = [specimen for specimen in SPECIMENS if specimen.gradients]
every_differentiable = pytest.mark.parametrize("specimen", differentiable, ids=[each.name for each in differentiable])
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])


def eager(specimen: Specimen, inputs: tuple[Any, ...]) -> Any:
    try:
        return specimen.function(*inputs)
    except RuntimeError as error:
        assert "without overflow" in str(error)
        pytest.skip("float16 cannot hold the fill, and eager says so")


@every_specimen
@every_dtype
def test_as_near_to_the_truth_as_before(specimen: Specimen, dtype: torch.dtype) -> None:
    inputs = cast(specimen.inputs(0, LENGTH), dtype, "cuda")
    truth = specimen.function(*cast(inputs, torch.float64, "cuda"))
    own = relative_error(eager(specimen, inputs), truth)
    # A few roundings of the result are allowed on top: the float32 kernels multiply in three parts of TF32.
    assert relative_error(rewritten(specimen.function)(*inputs), truth) <= 2 * own + 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize(
    "specimen", [pytest.param(specimen, id=specimen.name) for specimen in SPECIMENS if specimen.masked_rows]
)
@every_dtype
def test_rows_without_a_key(specimen: Specimen, dtype: torch.dtype) -> None:
    assert specimen.masked_rows is not None
    inputs = cast(specimen.masked_rows(specimen.inputs(0, LENGTH)), dtype, "cuda")
    expected = eager(specimen, inputs)
    new = rewritten(specimen.function)(*inputs)
    assert disagreement_with_formula(specimen.function, new, expected, inputs, dtype, roundings=16.0) == ""


@every_differentiable
def test_gradients(specimen: Specimen) -> None:
    inputs = cast(specimen.inputs(0, LENGTH), torch.float32, "cuda")
    actual = gradients(rewritten(specimen.function, "aot_eager"), inputs)
    assert relative_error(actual, gradients(specimen.function, inputs)) <= 1e-4


@pytest.mark.parametrize("name", ["packed_projection", "causal_and_padding", "grouped_queries"])
def test_through_inductor_and_cuda_graphs(name: str) -> None:
    (specimen,) = (specimen for specimen in specimens() if specimen.name == name)
    compiled: Any = torch.compile(specimen.function, backend="attnrewrite", mode="reduce-overhead")
    for seed in range(3):
        inputs = cast(specimen.inputs(seed, LENGTH), torch.float32, "cuda")
        assert relative_error(compiled(*inputs).clone(), specimen.function(*inputs)) <= 1e-5


def capped(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, keep: Tensor) -> Tensor:
    """Gemma 2's scores, with a learned bias."""
    k, v = k.repeat_interleave(2, dim=1), v.repeat_interleave(2, dim=1)
    scores = torch.tanh(q @ k.mT * 0.1 / 3.0) * 3.0 + bias
    position = torch.arange(q.shape[-2], device=q.device)
    lowest = torch.finfo(q.dtype).min
    scores = scores.masked_fill(position > position[:, None], lowest).masked_fill(~keep[:, None, None], lowest)
    return scores.softmax(-1) @ v


@pytest.mark.parametrize("inner", ["eager", "aot_eager", "inductor"])
@pytest.mark.parametrize("width", [16, 48, 128])
def test_functions_of_the_scores(inner: str, width: int) -> None:
    """FlexAttention, forwards and backwards, with rows that have no key."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 4, 130, width), (2, 2, 130, width), (2, 2, 130, width), (4, 130, 130)]
    inputs = [torch.randn(shape, generator=generator).cuda() for shape in shapes]
    keep = torch.arange(130) >= torch.tensor([0, 7])[:, None]
    inputs.append(keep.cuda())
    with torch.no_grad():
        (row,) = rows(capped, *inputs)
        assert (row.status, row.kernel) == ("rewritten", "flex")
        compiled = rewritten(capped, inner)
        # Triton multiplies float32 in TF32 unless told otherwise.
        assert relative_error(compiled(*inputs), capped(*inputs)) <= 5e-3
    if inner == "eager":
        return
    torch._dynamo.reset()
    actual = gradients(rewritten(capped, inner), inputs)
    assert relative_error(actual, gradients(capped, inputs)) <= 1e-2


@pytest.mark.parametrize("kernel", ["_native_flash", "_native_efficient", "_native_cudnn"])
@every_specimen
def test_single_back_ends(specimen: Specimen, kernel: str) -> None:
    """Each back end of PyTorch's, where its own check lets it: values, rows without a key, gradients."""
    inputs = cast(specimen.inputs(0, LENGTH), torch.float16, "cuda")
    asked: Any = {"kernels": kernel, "strict": True}
    try:
        with torch.no_grad():
            served = {row.kernel for row in rows(specimen.function, *inputs, **asked)}
    except KernelError:
        pytest.skip("the kernel is not willing")
    if served == {None}:
        pytest.skip("the attention has no canonical form, and no kernel is asked")
    assert served == {kernel}
    for case in (inputs, cast(specimen.masked_rows(inputs), torch.float16, "cuda") if specimen.masked_rows else inputs):
        expected = eager(specimen, case)
        with torch.no_grad():
            new = rewritten(specimen.function, kernels=kernel)(*case)
            wrong = disagreement_with_formula(specimen.function, new, expected, case, torch.float16, roundings=16.0)
            assert wrong == ""


@every_differentiable
@pytest.mark.parametrize("kernel", ["native", "_native_cudnn", "_native_flash", "_native_efficient", "_native_math"])
def test_gradients_in_half_precision(specimen: Specimen, kernel: str) -> None:
    """In the order of the catalogue, in one process: a back end may confuse calls of several layouts."""
    inputs = cast(specimen.inputs(0, LENGTH), torch.float16, "cuda")
    eager(specimen, inputs)
    truth, own, expected = (
        torch.cat([gradient.double().flatten() for gradient in gradients(function, given)])
        for function, given in (
            (specimen.function, cast(inputs, torch.float64, "cuda")),
            (rewritten(specimen.function, "aot_eager", kernels=kernel), inputs),
            (specimen.function, inputs),
        )
    )
    assert relative_error(own, truth) <= 3 * relative_error(expected, truth) + 8e-3


def test_gradients_in_two_layouts() -> None:
    """cuDNN's plans do not tell gradients of the output apart that are laid out differently."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ((q @ k.mT) * 0.1).softmax(-1) @ v

    def heads_last(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, k, v).transpose(1, 2).contiguous()

    generator = torch.Generator().manual_seed(0)
    for function in (attend, heads_last, attend, heads_last):
        inputs = [torch.randn((2, 3, 64, 64), generator=generator).cuda().half() for _ in range(3)]
        actual = gradients(rewritten(function, "inductor"), inputs)
        assert relative_error(actual, gradients(function, inputs)) <= 1e-2


@pytest.mark.parametrize("kernel", ["_native_flash", "_native_efficient", "_native_cudnn"])
@pytest.mark.parametrize("width", [40, 64, 77, 128])
def test_single_back_ends_through_inductor(kernel: str, width: int) -> None:
    """Sizes that PyTorch's selector pads, forwards and backwards, with CUDA graphs."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ((q @ k.mT) * 0.1).softmax(-1) @ v

    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 3, 100, width), (2, 3, 77, width), (2, 3, 77, width)]
    inputs = [torch.randn(shape, generator=generator).cuda().half() for shape in shapes]
    with torch.no_grad():
        (row,) = rows(attend, *inputs, kernels=kernel)
        assert row.kernel == kernel
        truth = attend(*(value.double() for value in inputs))
        compiled: Any = torch.compile(attend, backend="attnrewrite", mode="reduce-overhead")
        with attention_backend(kernel):
            for _ in range(3):
                assert relative_error(compiled(*inputs).double(), truth) <= 2e-3
    if kernel == "_native_cudnn" and torch.cuda.get_device_capability() < (9, 0):
        return
    torch._dynamo.reset()
    actual = gradients(rewritten(attend, "inductor", kernels=kernel, strict=True), inputs)
    assert relative_error(actual, gradients(attend, inputs)) <= 1e-2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("inner", ["eager", "aot_eager", "inductor"])
def test_gpt_neo_fills_in_the_lowest_number_of_float32(inner: str, dtype: torch.dtype) -> None:
    """Its scores are float32; the query's dtype, in which the score_mod is traced, does not hold that number."""
    import transformers

    torch.manual_seed(0)
    layers = [[["global", "local"], 1]]
    config = transformers.GPTNeoConfig(
        vocab_size=64, hidden_size=64, num_layers=2, num_heads=2, attention_types=layers, window_size=4
    )
    build: Any = transformers.GPTNeoModel
    model = build._from_config(config, attn_implementation="eager").to("cuda", dtype).eval()

    def hidden_states(tokens: Tensor, mask: Tensor) -> Tensor:
        result: Tensor = model(input_ids=tokens, attention_mask=mask).last_hidden_state
        return result

    mask = torch.ones(2, 12, device="cuda")
    mask[:, 7:] = 0
    inputs = (torch.arange(24, device="cuda").view(2, 12), mask)
    with torch.no_grad():
        expected = hidden_states(*inputs)
        _, new, found = rewritten_and_rows(hidden_states, *inputs, inner=inner)
    assert [row.status for row in found] == ["rewritten"] * 2, [row.reason for row in found]
    assert relative_error(new[:, :7], expected[:, :7]) <= 8 * torch.finfo(dtype).eps


def _require_flex_like_eager(attend: Any, inputs: list[Tensor], way: str) -> None:
    """Values, or gradients in training, through Inductor."""
    wide = cast(inputs, torch.float64, "cuda")
    new, first, found = rewritten_and_rows(attend, *inputs, inner="inductor")
    assert [row.kernel for row in found] == ["flex"]
    actual, expected, exact = [first], [attend(*inputs)], [attend(*wide)]
    if way == "training":
        actual, expected, exact = gradients(new, inputs), gradients(attend, inputs), gradients(attend, wide)
    assert not disagreements(actual, expected, exact, torch.bfloat16)


@pytest.mark.parametrize("way", ["inference", "dynamic", "training"])
@pytest.mark.parametrize("length", [1, 12, 72, 130])
@pytest.mark.parametrize("order", [(0, 2, 1, 3), (1, 2, 0, 3), (2, 1, 0, 3)], ids=str)
def test_flex_with_a_query_of_any_memory_order(order: tuple[int, ...], length: int, way: str) -> None:
    """Inductor's kernel for short queries assumes an order that a query computed in the graph need not have."""

    def capped(*projected: Tensor) -> Tensor:
        query, key, value = (each.permute(order) * 1.5 for each in projected)
        scores = 4 * torch.tanh(query @ key.mT / 4)
        return scores.softmax(-1) @ value

    def operand(tokens: int) -> Tensor:
        sizes = [0, 0, 0, 32]
        for place, size in zip(order, (2, 4, tokens), strict=False):
            sizes[place] = size
        return torch.randn(sizes, device="cuda", dtype=torch.bfloat16)

    inputs = [operand(length), operand(140), operand(140)]
    if way == "dynamic" and length > 1:
        torch._dynamo.mark_dynamic(inputs[0], order[2])
    _require_flex_like_eager(capped, inputs, way)


@pytest.mark.parametrize("way", ["inference", "dynamic", "training"])
@pytest.mark.parametrize("computed", ["product", "pointwise"])
@pytest.mark.parametrize("part", ["batch", "heads", "tokens", "last token", "features", "expanded"])
def test_flex_with_a_query_that_is_part_of_a_tensor(part: str, computed: str, way: str) -> None:
    """Inductor's ``as_strided`` forgets that the part is one."""
    taken: dict[str, Any] = {
        "batch": lambda whole: whole[1:3],
        "heads": lambda whole: whole.unflatten(1, (2, 4))[:, 1],
        "tokens": lambda whole: whole.unflatten(-2, (3, -1)).select(-3, 1),
        "last token": lambda whole: whole[:, :, -1:],
        "features": lambda whole: whole.chunk(3, -1)[2],
        "expanded": lambda whole: whole[:, :, :1].expand(-1, -1, 5, -1),
    }
    sizes = {"batch": (4, 4, 12, 32), "heads": (2, 8, 12, 32), "tokens": (2, 4, 36, 32), "features": (2, 4, 12, 96)}

    def capped(whole: Tensor, weight: Tensor, key: Tensor, value: Tensor) -> Tensor:
        query = taken[part](whole @ weight if computed == "product" else whole * weight[0] - 0.25)
        scores = 4 * torch.tanh(query @ key.mT / 4)
        return scores.softmax(-1) @ value

    shape = sizes.get(part, (2, 4, 12, 32))
    operands = [shape, (shape[-1], shape[-1]), (2, 4, 140, 32), (2, 4, 140, 32)]
    inputs = [torch.randn(each, device="cuda", dtype=torch.bfloat16) * 0.5 for each in operands]
    if way == "dynamic":
        torch._dynamo.mark_dynamic(inputs[2], 2)
        torch._dynamo.mark_dynamic(inputs[3], 2)
        if part != "tokens":
            torch._dynamo.mark_dynamic(inputs[0], 2)
    _require_flex_like_eager(capped, inputs, way)


@pytest.mark.parametrize("way", ["inference", "dynamic", "training"])
@pytest.mark.parametrize("length", [1, 12, 130])
@pytest.mark.parametrize("computed", ["norm", "positions", "one number", "part", "expanded", "product"])
def test_flex_with_a_bias_that_the_graph_computes(computed: str, length: int, way: str) -> None:
    """Inductor cannot read what it has not yet laid out, such as what is computed from a reduction."""
    biases: dict[str, Any] = {
        "norm": lambda bias, row: bias.log_softmax(-1),
        "positions": lambda bias, row: (row > 0).cumsum(-1)[:, None, None] * bias[:1, :, :1, :1],
        "one number": lambda bias, row: bias.softmax(-1)[:1, :1, :1, :1],
        "part": lambda bias, row: torch.cat([bias, bias]).log_softmax(-1)[1:3],
        "expanded": lambda bias, row: bias.logsumexp(-1, keepdim=True).expand(-1, -1, -1, 140) * row[:, None, None],
        "product": lambda bias, row: (bias @ bias.mT @ bias)[..., :140],
    }

    def capped(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, row: Tensor) -> Tensor:
        scores = 4 * torch.tanh((query @ key.mT + biases[computed](bias, row)) / 4)
        return scores.softmax(-1) @ value

    shapes = [(2, 4, length, 32), (2, 4, 140, 32), (2, 4, 140, 32), (2, 4, length, 140), (2, 140)]
    inputs = [torch.randn(shape, device="cuda", dtype=torch.bfloat16) * 0.5 for shape in shapes]
    wide = cast(inputs, torch.float64, "cuda")
    if way == "dynamic" and length > 1:
        torch._dynamo.mark_dynamic(inputs[0], 2)
        torch._dynamo.mark_dynamic(inputs[3], 2)
    new, first, found = rewritten_and_rows(capped, *inputs, inner="inductor")
    assert [row.kernel for row in found] == ["flex"]
    actual, expected, exact = [first], [capped(*inputs)], [capped(*wide)]
    if way == "training":

        def of_row(function: Any, given: list[Tensor]) -> list[Tensor]:
            return gradients(lambda *most: function(*most, given[4]), given[:4])

        actual, expected, exact = of_row(new, inputs), of_row(capped, inputs), of_row(capped, wide)
    assert not disagreements(actual, expected, exact, torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("inner", ["eager", "aot_eager", "inductor"])
@pytest.mark.parametrize("expanded", [(1, 4, 32, 16), (2, 1, 32, 16), (2, 4, 1, 16)])
def test_gradients_of_an_expanded_query(expanded: tuple[int, ...], inner: str, dtype: torch.dtype) -> None:
    """cuDNN's backward pass wants the features of the output side by side."""

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return (query.expand(2, 4, 32, 16) @ key.mT * 0.25).softmax(-1) @ value

    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(shape, generator=generator) for shape in (expanded, (2, 4, 48, 16), (2, 4, 48, 16))]
    reference = gradients(attention, [each.double().cuda() for each in inputs])
    inputs = [each.to("cuda", dtype) for each in inputs]
    own, new = gradients(attention, inputs), gradients(rewritten(attention, inner), inputs)
    for n, o, truth in zip(new, own, reference, strict=True):
        assert relative_error(n, truth) <= 4 * relative_error(o, truth) + 16 * torch.finfo(dtype).eps


@pytest.mark.parametrize("inner", ["aot_eager", "inductor"])
@pytest.mark.parametrize("keys", [2, 5, 13])
@pytest.mark.parametrize("mask", ["filled", "computed"])
def test_a_mask_of_few_keys_in_training(mask: str, keys: int, inner: str) -> None:
    """Its rows are padded for the kernel, and have to be so in the backward pass as well."""

    def attend(query: Tensor, key: Tensor, value: Tensor, given: Tensor) -> Tensor:
        low = torch.finfo(query.dtype).min
        masks: dict[str, Any] = {
            "filled": lambda scores: scores.masked_fill(given < 0, low),
            "computed": lambda scores: scores + (given < 0).to(scores.dtype) * low,
        }
        scores: Tensor = masks[mask](query @ key.mT * 0.25)
        return scores.softmax(-1) @ value

    generator = torch.Generator().manual_seed(0)
    *inputs, given = (
        torch.randn(shape, generator=generator).cuda()
        for shape in [(2, 3, 6, 16), (2, 3, keys, 16), (2, 3, keys, 16), (3, 6, keys)]
    )
    given[:, 0] = -1.0

    def of_mask(function: Any) -> list[Tensor]:
        return gradients(lambda *operands: function(*operands, given), inputs)

    (row,) = rows(attend, *(each.clone().requires_grad_() for each in inputs), given, kernels="_native_efficient")
    assert row.kernel == "_native_efficient"
    new = rewritten(attend, inner, kernels="_native_efficient", strict=True)
    assert relative_error(of_mask(new), of_mask(attend)) <= 5e-4


@pytest.mark.parametrize("inner", ["aot_eager", "inductor"])
@pytest.mark.parametrize("kernel", ["_native_cudnn", "_native_flash", "_native_efficient"])
@pytest.mark.parametrize("single", ["value", "every operand"])
@pytest.mark.parametrize("key_heads", [2, 4])
def test_values_of_one_feature(single: str, key_heads: int, kernel: str, inner: str) -> None:
    """Cut from more, the stride of the feature is that of the positions, which kernels refuse."""

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        query, key, value = (each.view(2, 17, -1, 16).transpose(1, 2) for each in (query, key, value))
        if single == "every operand":
            query, key = query[..., :1], key[..., :1]
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, dim=1), value[..., :1].repeat_interleave(groups, dim=1)
        result: Tensor = (query @ key.mT * 0.25).softmax(-1) @ value
        return result

    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 17, heads * 16) for heads in (4, key_heads, key_heads)]
    inputs = [torch.randn(shape, generator=generator).half().cuda() for shape in shapes]
    try:
        (row,) = rows(attend, *(each.clone().requires_grad_() for each in inputs), kernels=kernel, strict=True)
    except KernelError as error:
        # FlashAttention takes one head size for all, and the memory-efficient kernel no groups of heads.
        assert "takes values of the query's head size" in str(error) or "needs as many key heads" in str(error)
        pytest.skip("the kernel is not willing")
    assert row.kernel == kernel
    new = rewritten(attend, inner, kernels=kernel, strict=True)
    truth, own, expected = (
        torch.cat([gradient.double().flatten() for gradient in gradients(function, given)])
        for function, given in ((attend, [each.double() for each in inputs]), (new, inputs), (attend, inputs))
    )
    assert relative_error(own, truth) <= 2 * relative_error(expected, truth) + 8 * torch.finfo(torch.float16).eps


@pytest.mark.parametrize("way", ["bias", "mask"])
@pytest.mark.parametrize("length", [12, 140])
def test_flex_with_an_input_that_is_updated_behind_it(length: int, way: str) -> None:
    """The backward pass reads it as it was before."""

    def attend(query: Tensor, key: Tensor, value: Tensor, table: Tensor) -> Tensor:
        scores = 4 * torch.tanh(query @ key.mT / 4)
        keys = torch.arange(key.shape[2], device=key.device)
        masked = (table < 0.3) & (keys[: query.shape[2], None] != keys)
        scores = scores + table if way == "bias" else scores.masked_fill(masked, -torch.inf)
        result = scores.softmax(-1) @ value
        table.copy_(table.flip(-1))
        return result

    shapes = [(2, 4, length, 32), (2, 4, 140, 32), (2, 4, 140, 32)]
    inputs = [torch.randn(shape, device="cuda", dtype=torch.bfloat16) for shape in shapes]
    table = torch.rand(2, 4, length, 140, device="cuda", dtype=torch.bfloat16)

    def on_a_copy(function: Any, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
        own = table.to(dtype, copy=True)
        return gradients(lambda *operands: function(*operands, own), [each.to(dtype) for each in inputs])

    (row,) = rows(attend, *(each.clone().requires_grad_() for each in inputs), table.clone(), inner="inductor")
    assert row.kernel == "flex"
    new = on_a_copy(rewritten(attend, "inductor"))
    assert not disagreements(new, on_a_copy(attend), on_a_copy(attend, torch.float64), torch.bfloat16)


@pytest.mark.parametrize("inner", ["eager", "inductor"])
@pytest.mark.parametrize("low", [-torch.inf, -1e9, torch.finfo(torch.float32).min])
@pytest.mark.parametrize("factor", [0.5, 2.5])
def test_training_with_rows_that_their_maximum_raises(factor: float, low: float, inner: str) -> None:
    """The scores of such a row are lost, and have their gradients all the same."""

    def attend(query: Tensor, key: Tensor, value: Tensor, first: Tensor, second: Tensor) -> Tensor:
        scores = query @ key.mT * 0.3 + first
        return ((scores - scores.amax(-1, keepdim=True)) * factor + second).softmax(-1) @ value

    generator = torch.Generator().manual_seed(0)
    sizes = [(2, 4, 6, 8), (2, 2, 9, 8), (2, 2, 9, 8)]
    inputs = [torch.randn(size, generator=generator).cuda() for size in sizes]
    masks = [torch.zeros(2, 1, 6, 9, device="cuda") for _ in range(2)]
    masks[0][:, :, 1], masks[1][:, :, 2] = low, low
    masks[0][:, :, 3, :4], masks[1][:, :, 3, 4:] = low, low

    def of_masks(function: Any) -> list[Tensor]:
        def grouped(query: Tensor, key: Tensor, value: Tensor) -> Any:
            return function(query, key.repeat_interleave(2, 1), value.repeat_interleave(2, 1), *masks)

        return gradients(grouped, inputs)

    assert relative_error(of_masks(rewritten(attend, inner, strict=True)), of_masks(attend)) <= 5e-4
