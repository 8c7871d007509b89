"""Models of transformers with ``attn_implementation="attnrewrite"``, against their eager ones."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import GenerationConfig

from attnrewrite.backend import collect_reports
from attnrewrite.errors import AttentionInputError
from attnrewrite.integrations import transformers as integration
from tests.coverage.case import Case
from tests.coverage.entries_transformers import CASES
from tests.support.helpers import outputs, relative_error
from tests.support.zoo import TOKENS, ids, padded, transformer

BY_NAME = {case.name: case for case in CASES}
TYPES = [
    "albert",
    "beit",
    "bert",
    "clip",
    "cohere",
    "deepseek-v2",
    "detr",
    "diffllama",
    "esm",
    "gemma2",
    "gemma3",
    "gpt-neox",
    "gpt-oss",
    "gpt2",
    "layoutlmv3",
    "llama",
    "llava",
    "mistral",
    "modernbert",
    "musicgen-decoder",
    "opt",
    "owlvit",
    "phi3",
    "qwen3",
    "swin",
    "t5",
    "udop",
    "vit",
    "wav2vec2",
    "whisper",
]
every_type = pytest.mark.parametrize("case", [BY_NAME[name] for name in TYPES], ids=TYPES)
CAUSAL = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",  # A window of keys.
    "gemma2": "Gemma2ForCausalLM",  # Soft caps.
    "gpt-oss": "GptOssForCausalLM",  # Sinks.
}


@pytest.fixture(autouse=True)
def _registered() -> Iterator[None]:
    integration.register()
    yield


def switched(model: nn.Module) -> nn.Module:
    own: Any = model
    own.set_attn_implementation("attnrewrite")
    return model


def with_a_key(results: list[Tensor], inputs: dict[str, Any]) -> list[Tensor]:
    """The results at tokens that are no padding: a row without a key gives zeros, and in eager some mean."""
    mask = inputs.get("attention_mask")
    if mask is None or mask.dim() != 2:
        return results
    return [result[mask.bool()] if result.shape[:2] == mask.shape else result for result in results]


def compared(case: Case, call: Any, model: nn.Module) -> None:
    inputs = case.inputs()
    expected, actual = (with_a_key(outputs(each(**inputs)), inputs) for each in (model, call))
    assert len(expected) == len(actual)
    for theirs, ours in zip(expected, actual, strict=True):
        if theirs.is_floating_point():
            assert relative_error(ours, theirs) <= 1e-5


@every_type
def test_models_that_are_not_compiled(case: Case) -> None:
    """Each attention runs compiled by itself."""
    model, new = case.build(), switched(case.build())
    with torch.no_grad(), collect_reports() as reports:
        compared(case, new, model)
    assert reports and all(report.rewritten and not report.kept for report in reports)


@every_type
def test_models_that_are_compiled(case: Case) -> None:
    """All attentions are in the graph, as plain mathematics that is rewritten."""
    model = case.build()
    compiled = torch.compile(switched(case.build()), backend="attnrewrite", options={"inner_backend": "eager"})
    with torch.no_grad(), collect_reports() as reports:
        compared(case, compiled, model)
    assert sum(len(report.rewritten) for report in reports) == case.sites


@pytest.mark.parametrize("name", ["bert", "gemma2", "gpt-oss", "llama", "t5"])
@pytest.mark.parametrize("compiled", [False, True], ids=["uncompiled", "compiled"])
def test_gradients(name: str, compiled: bool) -> None:
    case = BY_NAME[name]
    model, new = case.build(), switched(case.build())
    inputs = case.inputs()
    inputs["attention_mask"] = torch.ones_like(inputs["attention_mask"])
    for each in (model, new):
        call = torch.compile(each, backend="attnrewrite", options={"inner_backend": "aot_eager"})
        result = outputs((call if compiled and each is new else each)(**inputs))[0]
        weights = torch.randn(result.shape, generator=torch.Generator().manual_seed(0))
        torch.autograd.backward(result, weights)
    pairs = [
        tuple(torch.zeros_like(each) if each.grad is None else each.grad for each in both)
        for both in zip(new.parameters(), model.parameters(), strict=True)
    ]
    largest = max(float(theirs.abs().max()) for _, theirs in pairs)
    for ours, theirs in pairs:
        # A bias of keys has no gradient but rounding.
        assert float((ours - theirs).abs().max()) <= 1e-4 * max(float(theirs.abs().max()), 1e-2 * largest)


_SEQ2SEQ = {
    "vocab_size": 64,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 64,
    "dropout": 0.0,
    "use_cache": False,
    **TOKENS,
}
_EXPERTS = {"num_experts": 4, "encoder_sparse_step": 2, "decoder_sparse_step": 2}
_ENCODER = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
WITHOUT_SDPA: dict[str, dict[str, Any]] = {
    "BigBirdPegasus": _SEQ2SEQ,
    "PegasusX": _SEQ2SEQ,
    "NllbMoe": {**_SEQ2SEQ, **_EXPERTS},
    "Splinter": {**_ENCODER, "intermediate_size": 48},
}


@pytest.mark.parametrize("name", WITHOUT_SDPA)
@pytest.mark.parametrize("compiled", [False, True], ids=["uncompiled", "compiled"])
def test_models_that_do_not_support_sdpa(name: str, compiled: bool) -> None:
    """Their ``is_causal``, which nothing else reads, is that of no mask that they leave out."""
    model = transformer(f"{name}Model", f"{name}Config", **WITHOUT_SDPA[name])
    inputs = {"input_ids": ids(2, 7, 0), **({} if name == "Splinter" else {"decoder_input_ids": ids(2, 5, 1)})}
    own, new = model(), switched(model())
    call = torch.compile(new, backend="attnrewrite", options={"inner_backend": "eager"}) if compiled else new
    with torch.no_grad():
        assert relative_error(call(**inputs)[0], own(**inputs)[0]) <= 1e-5


@pytest.mark.parametrize("cache", ["static", "dynamic"])
@pytest.mark.parametrize("name", CAUSAL)
def test_generated_tokens(name: str, cache: str) -> None:
    """Prompts that are padded on the left, with a static cache, which transformers compiles where asked."""
    import transformers

    case = BY_NAME[name]
    config: Any = case.build()
    settings = {**config.config.to_dict(), "use_cache": True}
    tokens = []
    for implementation in ("eager", "attnrewrite"):
        torch.manual_seed(0)
        configuration = type(config.config)(**settings)
        model = getattr(transformers, CAUSAL[name])._from_config(configuration, attn_implementation=implementation)
        asked = GenerationConfig(  # type: ignore[no-untyped-call]
            max_new_tokens=6,
            do_sample=False,
            cache_implementation="static" if cache == "static" else None,
            pad_token_id=0,
            eos_token_id=None,
            disable_compile=True,
        )
        prompt = {"input_ids": ids(2, 7, 0), "attention_mask": padded(2, 7, left=True)}
        tokens.append(model.eval().generate(**prompt, generation_config=asked))
    assert tokens[0].shape == (2, 13) and torch.equal(*tokens)


def operands() -> tuple[nn.Module, Tensor, Tensor, Tensor]:
    module = nn.Module()
    query, key, value = torch.randn(3, 2, 4, 6, 8).unbind()
    return module.eval(), query, key[:, :2], value[:, :2]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"attention_mask": torch.ones(2, 1, 6, 6).long()}, "attention_mask is torch.int64; give a boolean one"),
        ({"position_bias": torch.ones(6, 6) > 0}, "position_bias is torch.bool; give a floating one"),
        ({"softcap": "30"}, "softcap takes a number or None, not str"),
        ({"sliding_window": 4}, "sliding_window 4 and there are 6 keys"),
        ({"cu_seq_lens_q": torch.tensor([0, 3, 6])}, "give position_ids, which start anew"),
        ({"fancy": 1.0}, "does not know what it means there"),
        ({"s_aux": torch.ones(4), "sinks": torch.ones(1, 4, 1, 1)}, "give one of them"),
    ],
    ids=lambda given: next(iter(given)) if isinstance(given, dict) else None,
)
def test_what_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(AttentionInputError, match=message):
        integration.attention(*operands(), **{"attention_mask": None, **given})


def test_a_causal_attention_of_more_keys_than_queries_needs_a_mask() -> None:
    module, query, key, value = operands()
    with pytest.raises(AttentionInputError, match="does not say which keys a query sees"):
        integration.attention(module, query[:, :, :4], key, value, None, is_causal=True)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_weights_and_everything_else_at_once(dtype: torch.dtype) -> None:
    """Soft cap, bias, mask, sinks and weights, as a formula."""
    module, query, key, value = operands()
    keep = torch.rand(2, 1, 6, 6) > 0.3
    mask = keep if dtype is torch.bool else torch.where(keep, 0.0, -torch.inf)
    bias, sinks = torch.randn(1, 4, 6, 6), torch.randn(4)
    result, weights = integration.attention(
        module, query, key, value, mask, 0.3, 0.0, 20.0, sinks, bias, output_attentions=True
    )
    scores = torch.tanh(query @ key.repeat_interleave(2, 1).mT * 0.3 / 20) * 20 + bias
    scores = torch.cat([scores.masked_fill(~keep, -torch.inf), sinks.view(1, 4, 1, 1).expand(2, 4, 6, 1)], -1)
    expected = scores.softmax(-1)[..., :-1]
    assert weights is not None
    torch.testing.assert_close(weights, expected)
    torch.testing.assert_close(result, (expected @ value.repeat_interleave(2, 1)).transpose(1, 2))


def per_example(model: Any, inputs: dict[str, Any]) -> Tensor:
    rows = torch.randn(3, 1, 6, 32, generator=torch.Generator().manual_seed(0))
    result: Tensor = torch.vmap(lambda x: model(inputs_embeds=x).last_hidden_state)(rows)
    return result


def functional_gradient(model: Any, inputs: dict[str, Any]) -> Tensor:
    def loss(embeddings: Tensor) -> Tensor:
        result: Tensor = model(inputs_embeds=embeddings).last_hidden_state
        return result.pow(3).sum()

    result: Tensor = torch.func.grad(loss)(torch.ones(1, 6, 32).cumsum(1).sin())
    return result


def counted_operations(model: Any, inputs: dict[str, Any]) -> Tensor:
    with FlopCounterMode(display=False) as counter:
        model(**inputs)
    assert counter.get_total_flops() > 0
    return torch.tensor(0.0)


def fake(model: Any, inputs: dict[str, Any]) -> Tensor:
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        result = model(**{name: mode.from_tensor(value) for name, value in inputs.items()}).last_hidden_state
    return torch.tensor(result.shape)


@pytest.mark.every
@pytest.mark.parametrize("run", [per_example, functional_gradient, counted_operations, fake])
def test_transforms_and_modes(run: Any) -> None:
    """They ask for the operations themselves, and nothing is compiled under them."""
    case = BY_NAME["llama"]
    with torch.no_grad() if run is not functional_gradient else contextlib.nullcontext():
        expected, actual = (run(model, case.inputs()) for model in (case.build(), switched(case.build())))
    assert relative_error(actual, expected) <= 1e-5
