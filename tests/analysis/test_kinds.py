"""Spatial, temporal or cross attention: told from the graph of real models, and of others written otherwise."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from attnrewrite.analysis.kinds import SiteKind, begins_with_batch, kinds_of
from attnrewrite.capture.trace import capture
from attnrewrite.ir.graph_view import GraphView
from attnrewrite.ir.linear_site import LinearAttention
from attnrewrite.ir.site import AttentionSite
from attnrewrite.passes.pipeline import find_sites
from tests.processors.models import MODELS
from tests.support.zoo import noise, padded

pytestmark = pytest.mark.drawn


def told(function: Callable[..., Any], *args: Any, dynamic: bool = False, **kwargs: Any) -> list[SiteKind]:
    """The kinds of all attentions, in the order of the graph."""
    found: list[SiteKind] = []

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        ir = capture(gm, example_inputs).gm
        sites = [site for site in find_sites(GraphView(ir)) if isinstance(site, (AttentionSite, LinearAttention))]
        before = [(node, node.args) for node in ir.graph.nodes]
        found.extend(kinds_of(ir, sites))
        assert [(node, node.args) for node in ir.graph.nodes] == before
        return gm.forward

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(function, backend=backend, dynamic=dynamic)(*args, **kwargs)
    return found


def kinds(function: Callable[..., Any], *args: Any, **settings: Any) -> str:
    """The same as their first letters: "s", "t", "c"."""
    return "".join(each.kind[0] for each in told(function, *args, **settings))


# Models of diffusers.


def diffusers_model(name: str, **settings: Any) -> Any:
    import diffusers

    torch.manual_seed(0)
    return getattr(diffusers, name)(**settings).eval()


_TEXT = noise(2, 7, 24, seed=1)


def latte(layers: int = 2) -> tuple[Any, dict[str, Any]]:
    model = diffusers_model(
        "LatteTransformer3DModel",
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
        num_layers=layers,
        cross_attention_dim=16,
        sample_size=8,
        patch_size=2,
        norm_type="ada_norm_single",
        caption_channels=24,
        video_length=3,
        num_embeds_ada_norm=10,
    )
    inputs = {"hidden_states": noise(2, 4, 3, 8, 8, seed=0), "encoder_hidden_states": _TEXT}
    return model, {**inputs, "timestep": torch.tensor([3, 7]), "return_dict": False}


_UNET: dict[str, Any] = {
    "block_out_channels": (16,),
    "layers_per_block": 1,
    "cross_attention_dim": 24,
    "sample_size": 8,
    "norm_num_groups": 8,
}


def motion() -> tuple[Any, dict[str, Any]]:
    model = diffusers_model(
        "UNetMotionModel",
        **_UNET,
        num_attention_heads=2,
        motion_num_attention_heads=2,
        motion_max_seq_length=8,
        down_block_types=("CrossAttnDownBlockMotion",),
        up_block_types=("CrossAttnUpBlockMotion",),
    )
    inputs = {"sample": noise(2, 4, 3, 8, 8, seed=0), "encoder_hidden_states": noise(6, 7, 24, seed=1)}
    return model, {**inputs, "timestep": torch.tensor(7), "return_dict": False}


def svd() -> tuple[Any, dict[str, Any]]:
    model = diffusers_model(
        "UNetSpatioTemporalConditionModel",
        block_out_channels=(32,),
        layers_per_block=1,
        cross_attention_dim=24,
        sample_size=8,
        num_attention_heads=(2,),
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=24,
        num_frames=3,
        down_block_types=("CrossAttnDownBlockSpatioTemporal",),
        up_block_types=("CrossAttnUpBlockSpatioTemporal",),
    )
    # One token of the image: a key without positions.
    inputs = {"sample": noise(2, 3, 8, 8, 8, seed=0), "encoder_hidden_states": noise(2, 1, 24, seed=1)}
    return model, {**inputs, "timestep": torch.tensor(7.0), "added_time_ids": torch.ones(2, 3), "return_dict": False}


def ltx() -> tuple[Any, dict[str, Any]]:
    model = diffusers_model(
        "LTXVideoTransformer3DModel",
        in_channels=8,
        out_channels=8,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        num_layers=2,
        caption_channels=24,
    )
    inputs = {"hidden_states": noise(2, 12, 8, seed=0), "encoder_hidden_states": _TEXT}
    sizes = {"num_frames": 3, "height": 2, "width": 2}
    given = {"timestep": torch.tensor([3, 7]), "encoder_attention_mask": padded(2, 7), "return_dict": False}
    return model, {**inputs, **sizes, **given}


def hunyuan_video() -> tuple[Any, dict[str, Any]]:
    model = diffusers_model(
        "HunyuanVideoTransformer3DModel",
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        text_embed_dim=24,
        pooled_projection_dim=20,
        rope_axes_dim=(2, 2, 4),
    )
    inputs = {"hidden_states": noise(2, 4, 3, 8, 8, seed=0), "encoder_hidden_states": _TEXT}
    pooled = {"pooled_projections": noise(2, 20, seed=2), "guidance": torch.tensor([6.0, 6.0])}
    given = {"timestep": torch.tensor([3, 7]), "encoder_attention_mask": padded(2, 7), "return_dict": False}
    return model, {**inputs, **pooled, **given}


VIDEO: tuple[tuple[Callable[[], tuple[Any, dict[str, Any]]], dict[str, int]], ...] = (
    # Two blocks: self and cross attention over space, and a self attention over time.
    (latte, {"spatial": 2, "cross": 2, "temporal": 2}),
    # Down 1, middle 1, up 2 transformers; a motion module of two self attentions beside each.
    (motion, {"spatial": 4, "cross": 4, "temporal": 8}),
    # The same, and one more over time at the input: each has two self attentions.
    # A block over space and one over time in each of the four; both have a cross attention to the image.
    (svd, {"spatial": 4, "cross": 8, "temporal": 4}),
    # Space and time in one attention, and the text.
    (ltx, {"spatial": 2, "cross": 2}),
    # The text alone, then both: one double and one single block.
    (hunyuan_video, {"spatial": 3}),
)
IMAGE: dict[str, dict[str, int]] = {
    # Down 1, middle 1, up 2 transformers; two keys for each cross attention, the text and the image.
    # Text and image in one attention.
    "sd3": {"spatial": 2},
    "flux": {"spatial": 3},
    "cogvideox": {"spatial": 2},
    # Two blocks of a self attention and cross attentions to text and image.
    "wan-image": {"spatial": 2, "cross": 4},
    # Linear self attention.
    "sana": {"spatial": 2, "cross": 2},
    "allegro": {"spatial": 2, "cross": 2},
}


@pytest.mark.parametrize(("case", "expected"), VIDEO, ids=[case.__name__ for case, _ in VIDEO])
def test_video_models(case: Callable[[], tuple[Any, dict[str, Any]]], expected: dict[str, int]) -> None:
    model, inputs = case()
    found = told(model, **inputs)
    assert Counter(each.kind for each in found) == expected
    # By the graph, whatever the modules are called.
    assert all("2-d convolution" in each.reason for each in found if each.kind == "temporal")


@pytest.mark.parametrize("name", IMAGE)
def test_models_of_the_processors(name: str) -> None:
    found = told(MODELS[name].build().eval(), **MODELS[name].inputs(0))
    assert Counter(each.kind for each in found) == IMAGE[name]


def test_latte_under_symbolic_sizes() -> None:
    model, inputs = latte(layers=1)
    space, cross, time = told(model, **inputs, dynamic=True)
    assert (space.kind, cross.kind, time.kind) == ("spatial", "cross", "temporal")
    assert "2-d convolution" in space.reason
    assert "2-d convolution" in time.reason


# Others, from scratch.


class Attend(nn.Module):
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        y = x if y is None else y
        q, k, v = self.a(x), self.b(y), self.c(y)
        q, k, v = (part.unflatten(-1, (2, -1)).transpose(-3, -2) for part in (q, k, v))
        weights = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1)
        result: Tensor = self.d((weights @ v).transpose(-3, -2).flatten(-2))
        return result


class Factorised(nn.Module):
    """(batch, frames, space, channels), attended along one dimension after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Attend(), Attend()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.first(x)
        result: Tensor = x + self.second(x.transpose(1, 2)).transpose(1, 2)
        return result


class Patches(nn.Module):
    """A video's patches by reshapes and a linear layer; ``channels_at``: which dimension holds the channels."""

    def __init__(self, channels_at: int) -> None:
        super().__init__()
        self.channels_at = channels_at
        self.embed, self.blocks = nn.Linear(12, 16), Factorised()

    def forward(self, video: Tensor) -> Tensor:
        video = video.movedim(self.channels_at, 2)
        b, f, c, h, w = video.shape
        x = video.reshape(b, f, c, h // 2, 2, w // 2, 2).permute(0, 1, 3, 5, 4, 6, 2).reshape(b, f, h * w // 4, 4 * c)
        result: Tensor = self.blocks(self.embed(x))
        return result


class Tubelets(nn.Module):
    """A video's patches by a three-dimensional convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.blocks = nn.Conv3d(3, 16, 2, stride=2), Factorised()

    def forward(self, video: Tensor) -> Tensor:
        result: Tensor = self.blocks(self.embed(video).flatten(3).permute(0, 2, 3, 1))
        return result


@pytest.mark.parametrize(("channels_at", "dynamic"), [(1, False), (1, True), (2, False), (4, False)])
def test_patches_by_a_projection(channels_at: int, dynamic: bool) -> None:
    video = noise(2, 4, 3, 6, 8, seed=0).movedim(2, channels_at)
    assert kinds(Patches(channels_at), video, dynamic=dynamic) == "st"


def test_patches_by_a_convolution() -> None:
    (space, time) = told(Tubelets(), noise(2, 3, 4, 6, 8, seed=0))
    assert (space.kind, time.kind) == ("spatial", "temporal")
    assert "3-d convolution" in space.reason
    assert "3-d convolution" in time.reason


def test_frames_and_space_at_once_are_spatial() -> None:
    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.attend = nn.Conv3d(3, 16, 2, stride=2), Attend()

        def forward(self, video: Tensor) -> Any:
            return self.attend(self.embed(video).flatten(2).transpose(1, 2))

    assert kinds(Whole(), noise(2, 3, 4, 6, 8, seed=0)) == "s"


def test_blocks_alone_are_told_by_their_order() -> None:
    space, time = told(Factorised(), noise(2, 3, 5, 16, seed=0))
    assert (space.kind, time.kind) == ("spatial", "temporal")
    assert "come before" in time.reason


def test_a_block_alone_is_told_by_its_name() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.temporal_attn, self.time_embed, self.attn = Attend(), Attend(), Attend()

        def forward(self, x: Tensor) -> Any:
            return self.attn(self.time_embed(self.temporal_attn(x)))

    temporal, *others = told(Block(), noise(2, 5, 16, seed=0))
    assert temporal.kind == "temporal"
    assert "temporal_attn" in temporal.reason
    assert [each.kind for each in others] == ["spatial", "spatial"]
    assert "nothing in the graph" in others[0].reason


class CrossBlock(nn.Module):
    """A transformer block compiled alone; the text is updated as well and depends on the image then."""

    def __init__(self) -> None:
        super().__init__()
        self.own, self.cross, self.back, self.again = (Attend() for _ in range(4))

    def forward(self, hidden: Tensor, text: Tensor, modulation: Tensor) -> Any:
        hidden = hidden * modulation + self.own(hidden * modulation)
        hidden = hidden + self.cross(hidden, text)
        text = text + self.back(text, hidden)
        return hidden + self.again(hidden, text)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("length", [4, 6], ids=["shorter", "of the same length"])
def test_cross_attention_of_a_block_alone(length: int, dynamic: bool) -> None:
    inputs = noise(2, 6, 16, seed=0), noise(2, length, 16, seed=1), noise(2, 1, 16, seed=2)
    found = told(CrossBlock(), *inputs, dynamic=dynamic)
    assert [each.kind for each in found] == ["spatial", "cross", "cross", "cross"]
    assert found[1].reason == "the key comes from text, the query from hidden"


def test_keys_of_both_are_no_cross_attention() -> None:
    class Joint(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.joint, self.cross = Attend(), Attend()

        def forward(self, hidden: Tensor, text: Tensor) -> Any:
            both = torch.cat([text, hidden], 1)
            both = both + self.joint(both)
            text, hidden = both.split([4, 6], 1)
            hidden = hidden + self.joint(hidden, torch.cat([hidden, text], 1))
            return self.cross(hidden, text)

    assert kinds(Joint(), noise(2, 6, 16, seed=0), noise(2, 4, 16, seed=1)) == "ssc"


def test_learned_queries() -> None:
    class Perceiver(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.latents = nn.Parameter(torch.randn(3, 16))
            self.read, self.think, self.again = Attend(), Attend(), Attend()

        def forward(self, x: Tensor) -> Any:
            latents = self.latents.expand(x.shape[0], -1, -1)
            latents = latents + self.read(latents, x)
            latents = latents + self.think(latents)
            return self.again(latents, x)

    read, think, again = told(Perceiver(), noise(2, 6, 16, seed=0))
    assert (read.kind, think.kind, again.kind) == ("cross", "spatial", "cross")
    assert read.reason == "the key comes from x, the query from a parameter"


def test_a_vector_that_scales_the_query_alone_is_no_other_data() -> None:
    def scaled(x: Tensor, temperature: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x * temperature, x, x)

    assert kinds(scaled, noise(2, 2, 6, 8, seed=0), torch.rand(8)) == "s"


def test_queries_and_keys_that_are_inputs_themselves() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v)

    q, k = noise(2, 2, 6, 8, seed=0), noise(2, 2, 4, 8, seed=1)
    assert kinds(attend, q, q + 1, q + 2) == "s"
    assert kinds(attend, q, k, k + 1) == "c"


def test_a_single_query_and_a_single_key() -> None:
    def pooled(x: Tensor, text: Tensor) -> Tensor:
        mean = x.mean(-2, keepdim=True)
        own = F.scaled_dot_product_attention(mean, x, x)
        return own + F.scaled_dot_product_attention(x, text, text)

    assert kinds(pooled, noise(2, 2, 6, 8, seed=0), noise(2, 2, 1, 8, seed=1)) == "sc"


def test_attention_over_channels() -> None:
    class Channels(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v = (nn.Linear(16, 16) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (part(x).transpose(1, 2) for part in (self.q, self.k, self.v))
            return F.scaled_dot_product_attention(q, k, v)

    assert kinds(Channels(), noise(2, 6, 16, seed=0)) == "s"


def test_slices_that_were_merged() -> None:
    class Sliced(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v = (nn.Linear(16, 16) for _ in range(3))

        def forward(self, x: Tensor, text: Tensor) -> Tensor:
            q, k, v = self.q(x), self.k(text), self.v(text)
            result = torch.zeros_like(q)
            for row in range(4):
                result[row : row + 1] = F.scaled_dot_product_attention(*(each[row : row + 1] for each in (q, k, v)))
            return result

    assert kinds(Sliced(), noise(4, 6, 16, seed=0), noise(4, 3, 16, seed=1)) == "c"


def test_no_sites() -> None:
    gm = fx.symbolic_trace(nn.ReLU())
    assert kinds_of(gm, []) == []


@pytest.mark.parametrize(
    "arrange, keeps",
    [
        (lambda x: x * 2, True),
        (lambda x: x.flatten(0, 1), True),
        (lambda x: x.transpose(0, 1).transpose(0, 1), True),
        (lambda x: torch.cat([x, x], 1), True),
        (lambda x: x[:, 1:].flip(1), True),
        (lambda x: x[:], True),
        (lambda x: torch.cat([x, x]), False),
        (lambda x: x.flip(0), False),
        (lambda x: x.roll(1, 0), False),
        (lambda x: x.roll(1), False),
        (lambda x: torch.cat([*x.chunk(2)[::-1]]), False),
        (lambda x: torch.cat([x[::2], x[1::2]]), False),
        (lambda x: x[torch.tensor([1, 0, 3, 2])], False),
        (lambda x: x.sort(0).values, False),
        (lambda x: x.repeat(2, 1, 1), False),
        (lambda x: torch.cat([x, -x]).chunk(2)[0] + x, False),
    ],
)
def test_what_begins_with_the_batch(arrange: Callable[[Tensor], Tensor], keeps: bool) -> None:
    """Of such a tensor one half is that of one half of the batch."""
    found: list[bool] = []

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        ir = capture(gm, example_inputs).gm
        (result,) = ir.graph.output_node().all_input_nodes
        found.append(result in begins_with_batch(ir))
        return gm.forward

    torch._dynamo.reset()
    torch.compile(lambda x: arrange(x).exp(), backend=backend)(torch.randn(4, 6, 8))
    assert found == [keeps]
