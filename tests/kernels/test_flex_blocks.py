"""FlexAttention's block masks, as the graph computes them, against PyTorch's own ``create_block_mask``."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from attnrewrite.kernels import kernel_named
from attnrewrite.kernels.flex_blocks import BLOCK, Blocks
from attnrewrite.selection.timing import cut_out
from tests.support.helpers import relative_error, rewritten, rows
from tests.support.library_sites import site_where_it_is

TABLES = ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices")


def attend(q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None, left: int | None, right: int | None) -> Tensor:
    scores = q @ k.mT * 0.2
    rows, columns = torch.arange(q.shape[-2])[:, None], torch.arange(k.shape[-2])
    if right is not None:
        scores = scores.masked_fill(columns > rows + right, -torch.inf)
    if left is not None:
        scores = scores.masked_fill(columns < rows - left, -torch.inf)
    if keep is not None:
        scores = scores.masked_fill(~keep, -torch.inf)
    return scores.softmax(-1) @ v


def operands(queries: int, keys: int, batch: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(queries)
    return [torch.randn(batch, 3, length, 16, generator=generator) for length in (queries, keys, keys)]


def tables_of(function: Any, *inputs: Any) -> dict[str, Tensor]:
    """The tables of the one site's block mask, evaluated."""
    found: list[Blocks] = []
    original = Blocks.as_argument

    def recorded(self: Blocks, builder: Any) -> Any:
        found.append(self)
        return original(self, builder)

    with torch.no_grad():
        site = site_where_it_is(function, *inputs, inner="aot_eager", assume_attended_rows=True)
        gm = fx.GraphModule(torch.nn.Module(), site.result.graph)
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(Blocks, "as_argument", recorded)
            alone = cut_out(gm, site, kernel_named("flex"))
        (call,) = alone.module.graph.find_nodes(op="call_function", target=torch.ops.higher_order.flex_attention)
        nodes = [argument for argument in call.args[4] if isinstance(argument, fx.Node) and argument.op != "get_attr"]
        alone.module.graph.output_node().args = (tuple(nodes),)
        alone.module.graph.eliminate_dead_code()
        alone.module.recompile()
        # Dynamo orders a graph's inputs by their first use, and names them after the function's parameters.
        named = dict(zip(("q", "k", "v", "keep"), inputs, strict=False))
        known: dict[fx.Node, Any] = {
            node: next(value for name, value in named.items() if node.name.lower().startswith(f"l_{name}_"))
            for node in gm.graph.find_nodes(op="placeholder")
        }

        def value(node: fx.Node) -> Any:
            if node not in known:
                args, kwargs = fx.node.map_arg((node.args, node.kwargs), value)
                known[node] = node.target(*args, **kwargs)  # type: ignore[operator]
            return known[node]

        placeholders = alone.module.graph.find_nodes(op="placeholder")
        given_values = [value(node) for node in alone.inputs if node.name in {p.name for p in placeholders}]
        return dict(zip(TABLES, alone.module(*given_values), strict=True))


def assert_same(found: dict[str, Tensor], expected: BlockMask) -> None:
    """As many blocks of each kind in each row, and the same ones."""
    for count, order in (TABLES[:2], TABLES[2:]):
        theirs, their_order = getattr(expected, count), getattr(expected, order)
        ours, our_order = found[count].expand(theirs.shape), found[order].expand(their_order.shape)
        assert torch.equal(ours, theirs)
        for place in torch.cartesian_prod(*map(torch.arange, theirs.shape)).tolist():
            some = int(theirs[tuple(place)])
            assert set(our_order[tuple(place)][:some].tolist()) == set(their_order[tuple(place)][:some].tolist())


def kept(left: int | None, right: int | None) -> Any:
    def mask_mod(batch: Any, head: Any, query: Any, key: Any) -> Any:
        result = key >= 0
        if right is not None:
            result = result & (key <= query + right)
        if left is not None:
            result = result & (key >= query - left)
        return result

    return mask_mod


@pytest.mark.parametrize(
    ("queries", "keys", "left", "right"),
    [
        (300, 300, None, 0),
        (300, 500, None, 0),
        (256, 256, 100, 0),
        (1000, 1000, 127, 0),
        (300, 300, 40, 40),
        (129, 640, 200, 300),
    ],
)
def test_bands(queries: int, keys: int, left: int | None, right: int | None) -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, k, v, None, left, right)

    found = tables_of(function, *operands(queries, keys))
    assert_same(found, create_block_mask(kept(left, right), 1, 1, queries, keys, device="cpu"))


@pytest.mark.parametrize("shape", [(2, 1, 1, 300), (2, 3, 200, 300), (1, 1, 200, 300), (2, 1, 200, 300)], ids=str)
def test_masks(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    blocks = torch.rand(*shape[:2], -(-shape[2] // 50), 6, generator=generator) < 0.5
    keep = blocks.repeat_interleave(50, 2).repeat_interleave(50, 3)[:, :, : shape[2]]
    keep[..., 0] = True

    def function(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
        return attend(q, k, v, keep, None, None)

    def mask_mod(batch: Any, head: Any, query: Any, key: Any) -> Any:
        return keep.expand(2, 3, 200, 300)[batch, head, query, key]

    found = tables_of(function, *operands(200, 300), keep)
    assert_same(found, create_block_mask(mask_mod, 2, 3, 200, 300, device="cpu"))


@given(
    queries=st.integers(1, 400),
    keys=st.integers(1, 400),
    left=st.none() | st.integers(0, 400),
    right=st.none() | st.integers(0, 400),
)
@settings(max_examples=15, deadline=None)
def test_any_band_is_exact(queries: int, keys: int, left: int | None, right: int | None) -> None:
    """Through the operator as PyTorch evaluates it without a compiler: ``mask_mod`` alone decides there."""
    torch._dynamo.reset()
    function = functools.partial(attend, keep=None, left=left, right=right)
    inputs = operands(queries, keys)
    with torch.no_grad():
        actual = rewritten(function, "aot_eager", kernels="flex")(*inputs)
    assert relative_error(actual, function(*inputs)) <= 1e-5


@pytest.mark.parametrize("dynamic", [False, True])
def test_rows_that_lose_every_key(dynamic: bool) -> None:
    def function(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
        return attend(q, k, v, keep, None, None)

    keep = torch.rand(2, 1, 150, 150, generator=torch.Generator().manual_seed(0)) < 0.5
    keep[1, :, 3:9] = False
    inputs = (*operands(150, 150), keep)
    with torch.no_grad():
        (row,) = rows(function, *inputs, inner="aot_eager", kernels="flex", dynamic=dynamic)
        assert row.kernel == "flex"
        actual = rewritten(function, "aot_eager", kernels="flex", dynamic=dynamic)(*inputs)
        assert relative_error(actual, function(*inputs)) <= 1e-5


def test_blocks_of_128() -> None:
    assert create_block_mask(kept(None, 0), 1, 1, 256, 256, device="cpu").BLOCK_SIZE[0] == BLOCK
