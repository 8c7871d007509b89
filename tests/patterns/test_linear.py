"""Linear attention: which order is chosen, where the source's stays, and what is none."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from attnrewrite.backend import collect_reports
from attnrewrite.report.report import RewriteReport
from tests.support.helpers import gradients, relative_error, rewritten, rows


def quadratic(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = (F.elu(q) + 1) @ (F.elu(k) + 1).mT
    return (weights / (weights.sum(dim=-1, keepdim=True) + 1e-6)) @ v


def linear(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.relu(q) @ (F.relu(k).mT @ v)


def operands(length: int = 24, features: int = 8, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return list(torch.randn(3, 2, 4, length, features, generator=generator).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_stays(dtype: torch.dtype) -> None:
    """What is stored between the products would be rounded, or overflow, elsewhere than in the source."""
    inputs = operands(dtype=dtype)
    (row,) = rows(quadratic, *inputs)
    assert row.status == "kept" and str(dtype).removeprefix("torch.") in row.reason
    assert torch.equal(rewritten(quadratic)(*inputs), quadratic(*inputs))


def test_half_precision_that_is_widened() -> None:
    def widened(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return quadratic(q.float(), k.float(), v.float()).to(q.dtype)

    inputs = operands(dtype=torch.float16)
    (row,) = rows(widened, *inputs)
    assert (row.status, row.kernel, row.dtype) == ("rewritten", "linear order", "float32")
    assert relative_error(rewritten(widened)(*inputs), widened(*inputs)) <= 2**-10


def test_under_autocast() -> None:
    inputs = operands()
    with torch.autocast("cpu", torch.bfloat16):
        (row,) = rows(quadratic, *inputs)
    assert row.status == "kept" and "bfloat16" in row.reason


def test_the_row() -> None:
    with collect_reports() as graphs:
        rewritten(lambda *inputs: (quadratic(*inputs), linear(*inputs)))(*operands())
    first, second = graphs[0].sites
    assert (first.status, first.order, first.kernel) == ("rewritten", "linear, was quadratic", "linear order")
    assert (second.status, second.order) == ("recognized", "linear")
    assert second.reason == "the linear order is cheaper"
    assert first.query_shape == first.key_shape == first.value_shape == ("2", "4", "24", "8")
    # Two products, a multiplication and an addition each, for 2 x 4 heads.
    assert first.operations == {
        "linear": str(2 * 8 * (24 * 8 * 8 + 24 * 8 * 8)),
        "quadratic": str(2 * 8 * (24 * 24 * 8 + 24 * 24 * 8)),
    }
    assert first.score_mods == ("elu + 1 of query", "elu + 1 of key", "divided by the sum of the weights")
    report = RewriteReport(graphs=graphs)
    assert report.summary == "1 of 2 attention sites rewritten in 1 graph; 1 in the best form already"
    text = report.to_text()
    assert "1 of 2 attention sites rewritten, 1 in the best form already" in text and "recognized" in text
    assert "order: linear, was quadratic" in text and "linear order: 49152 operations" in text


def test_symbolic_sizes() -> None:
    """Left open by symbolic sizes: the linear order stays, and is taken where the first call says so."""
    (row,) = rows(linear, *operands(length=4), dynamic=True)
    assert row.status == "recognized" and "symbolic sizes" in row.reason
    (row,) = rows(quadratic, *operands(length=4), dynamic=True)
    assert row.status == "recognized" and "for the sizes of the first call" in row.reason


def test_a_symbolic_batch_decides_nothing() -> None:
    inputs = operands(length=4)
    for value in inputs:
        torch._dynamo.mark_dynamic(value, 0)
    (row,) = rows(linear, *inputs)
    assert (row.status, row.order) == ("rewritten", "quadratic, was linear")


@pytest.mark.parametrize("epsilon", [0.0, 1e-15])
def test_rows_of_zeros(epsilon: float) -> None:
    """A query without a positive feature: 0 / 0, or 0 / epsilon."""

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = F.relu(q) @ F.relu(k).mT
        return weights @ v / (weights.sum(dim=-1, keepdim=True) + epsilon)

    q, k, v = operands()
    q[:, :, 3] = -1
    assert [row.status for row in rows(attention, q, k, v)] == ["rewritten"]
    assert relative_error(rewritten(attention)(q, k, v), attention(q, k, v)) <= 1e-6


def test_factors() -> None:
    """Numbers and tensors at either product, some of one head, are applied to the result, and to the sum."""

    def three_operands(q: Tensor, k: Tensor, v: Tensor, scale: Tensor) -> Tensor:
        weights = torch.einsum("bhld,bhsd,h->bhls", q.exp(), k.exp(), scale) / 3
        weights = weights * scale[:, None, None]
        return torch.einsum("bhls,bhse,bhl->bhle", weights, v, (2 * weights.sum(-1)).rsqrt())

    def alpha(q: Tensor, k: Tensor, v: Tensor, scale: Tensor) -> Tensor:
        q, k, v = (t.flatten(0, 1) for t in (q, k, v))
        weights = torch.baddbmm(torch.empty(1), q.exp(), k.exp().mT, beta=0, alpha=0.5)
        weights = weights / weights.sum(-1, keepdim=True)
        return torch.baddbmm(torch.empty(1), weights, v, beta=0, alpha=3) * scale[0]

    inputs = [*operands(), torch.rand(4) + 0.5]
    for function in (three_operands, alpha):
        assert [(row.kernel, row.reason) for row in rows(function, *inputs)] == [("linear order", "")]
        assert relative_error(rewritten(function)(*inputs), function(*inputs)) <= 1e-5
        torch._dynamo.reset()
        actual = gradients(rewritten(function, "aot_eager"), inputs)
        assert relative_error(actual, gradients(function, inputs)) <= 1e-4


def test_repeated_operands() -> None:
    """Repeated along heads: the query and the key, and all three."""

    def repeated(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k = (t[:, :1].expand(-1, 4, -1, -1) for t in (q, k))
        weights = F.relu(q) @ F.relu(k).mT
        return (weights / (weights.sum(-1, keepdim=True) + 1e-6)) @ v

    def all_repeated(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t[:, :1].exp().expand(-1, 4, -1, -1) for t in (q, k, v))
        return (q @ k.mT) @ v

    for function, status in ((repeated, "rewritten"), (all_repeated, "kept")):
        assert [row.status for row in rows(function, *operands())] == [status]
        assert relative_error(rewritten(function)(*operands()), function(*operands())) <= 1e-5


def test_dropout() -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor, training: bool) -> Tensor:
        return F.dropout(F.relu(q) @ F.relu(k).mT, 0.1, training) @ v

    (row,) = rows(attention, *operands(), True)
    assert row.status == "kept" and "dropout" in row.reason
    assert [row.status for row in rows(attention, *operands(), False)] == ["rewritten"]


def test_grad_mode_between_the_products() -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with torch.no_grad():
            weights = F.relu(q) @ F.relu(k).mT
        return weights @ v

    (row,) = rows(attention, *(value.requires_grad_() for value in operands()))
    assert row.status == "kept" and "grad mode" in row.reason


def test_recomputed_by_a_checkpoint() -> None:
    def loss(*inputs: Tensor) -> Tensor:
        result: Tensor = checkpoint(quadratic, *inputs, use_reentrant=False)
        return result

    assert [row.status for row in rows(loss, *operands(), inner="aot_eager")] == ["rewritten"]
    actual = gradients(rewritten(loss, "aot_eager"), operands())
    assert relative_error(actual, gradients(loss, operands())) <= 1e-5


def test_verified() -> None:
    with collect_reports() as graphs:
        rewritten(quadratic, verify=True)(*operands())
    assert [note for note in graphs[0].notes if note.startswith("verified: 1 site agrees")]


def test_softmax_attention_twice_is_no_linear_attention() -> None:
    """Agent attention: both maps are softmax of scores, and each has its kernel."""

    def attention(q: Tensor, k: Tensor, v: Tensor, agents: Tensor) -> Tensor:
        return (q @ agents.mT).softmax(-1) @ ((agents @ k.mT).softmax(-1) @ v)

    found = rows(attention, *operands(), torch.randn(2, 4, 5, 8))
    assert [(row.pattern, row.status) for row in found] == [("softmax", "rewritten")] * 2


class Projected(nn.Module):
    """Projections as products with parameters, as they are where weights are kept transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 16, 16) / 4)
        self.down, self.up = nn.Parameter(torch.rand(16, 4)), nn.Parameter(torch.randn(4, 16))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (x @ weight for weight in self.weight)
        return linear(q, k, v)


class Adapted(Projected):
    """Parameters through a function are no keys."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x) @ F.softplus(self.down) @ self.up


def test_parameters() -> None:
    x = torch.randn(2, 40, 16)
    (row,) = rows(Projected(), x)
    assert (row.pattern, row.status) == ("linear", "recognized")
    assert rows(Adapted(), x) == []


@pytest.mark.parametrize(("beta", "status"), [(2.0, "rewritten"), (-1.0, "kept")])
def test_a_softplus_that_is_negative(beta: float, status: str) -> None:
    """Weights of both signs may cancel in their sum, so the source's order stays."""

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys = torch.cat([F.softplus(k[..., :4]), F.softplus(k[..., 4:], beta=beta)], -1)
        weights = F.softplus(q) @ keys.mT
        return weights @ v / weights.sum(-1, keepdim=True)

    (row,) = rows(attention, *operands())
    assert row.status == status
    assert ("features may be negative" in row.reason) == (status == "kept")
