"""The fastest willing kernel: what a table of times says, and what it may not decide."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
import torch
from torch import Tensor

from attnrewrite.kernels import kernel_named, register_kernel
from attnrewrite.kernels.registry import unregister_kernel
from attnrewrite.kernels.torch_sdpa import TorchSDPA
from attnrewrite.selection import choose
from attnrewrite.selection.cost_table import (
    CostTable,
    Workload,
    cost_table,
    device_family,
    families_with,
    packaged_table,
)
from attnrewrite.selection.requests import standing
from tests.support.helpers import relative_error, rewritten, rows
from tests.support.library_sites import site_where_it_is

PLAIN = Workload("float32", "none", False, 2, 4, 4, 64, 64, 32, 32)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ((q @ k.mT) * 0.1).softmax(-1) @ v


def operands(length: int = 64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 4, length, 32, generator=generator) for _ in range(3)]


def table(**milliseconds: Any) -> CostTable:
    """A table of one row a kernel: the time of a call, or that and the time within a CUDA graph."""
    kernels = {
        name: dict(zip(("call_ms", "graph_ms"), times if isinstance(times, tuple) else (times,), strict=False))
        for name, times in milliseconds.items()
    }
    sites = [{"workload": dataclasses.asdict(PLAIN), "kernels": kernels}]
    return CostTable.from_json(json.dumps({"device": "a CPU", "sites": sites}))


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Any:
    def use(own: CostTable) -> None:
        monkeypatch.setattr(choose, "cost_table", lambda device: own)

    return use


# What a table says.


def test_a_site_is_read_as_a_workload() -> None:
    def grouped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (part.repeat_interleave(2, dim=1) for part in (k, v))
        scores = (q @ k.mT).masked_fill(torch.ones(6, 6, dtype=torch.bool).triu(1), -torch.inf)
        return scores.softmax(-1) @ v

    shapes = ((3, 4, 6, 8), (3, 2, 6, 8), (3, 2, 6, 16))
    with torch.no_grad():
        site = site_where_it_is(grouped, *(torch.randn(shape) for shape in shapes))
    assert Workload.of(site) == Workload("float32", "causal", False, 3, 4, 2, 6, 6, 8, 16)


@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_a_row_of_the_same_sizes_is_taken_as_it_is(cuda_graphs: bool) -> None:
    assert table(native=(0.5, 0.2)).milliseconds("native", PLAIN, cuda_graphs) == (0.2 if cuda_graphs else 0.5)


def test_time_grows_with_the_work_behind_what_a_call_costs_the_host() -> None:
    own = table(native=(0.5, 0.2))
    less, twice, often = (dataclasses.replace(PLAIN, batch=batch) for batch in (1, 4, 16))
    assert own.milliseconds("native", less, cuda_graphs=True) == pytest.approx(0.2)
    assert own.milliseconds("native", twice, cuda_graphs=True) == pytest.approx(0.4)
    assert own.milliseconds("native", twice, cuda_graphs=False) == pytest.approx(0.4 + 0.3)
    assert own.milliseconds("native", often, cuda_graphs=False) == pytest.approx(1.6 + 0.3)


def test_the_host_needs_what_it_needed_when_nothing_disturbed_it() -> None:
    small, big = PLAIN, dataclasses.replace(PLAIN, queries=256, keys=256)
    sites = [
        {"workload": dataclasses.asdict(one), "kernels": {"native": {"call_ms": call, "graph_ms": 1.0}}}
        for one, call in ((small, 1.2), (big, 1.9))
    ]
    own = CostTable.from_json(json.dumps({"device": "", "sites": sites}))
    bigger = dataclasses.replace(big, queries=257)
    assert own.milliseconds("native", bigger, cuda_graphs=False) == pytest.approx(257 / 256 + 0.2)


def test_the_part_that_does_not_grow_is_that_of_the_smallest_row() -> None:
    small, big = PLAIN, dataclasses.replace(PLAIN, queries=256, keys=256)
    sites = [
        {"workload": dataclasses.asdict(one), "kernels": {"native": {"call_ms": time, "graph_ms": time}}}
        for one, time in ((small, 1.0), (big, 9.0))
    ]
    own = CostTable.from_json(json.dumps({"device": "", "sites": sites}))
    bigger = dataclasses.replace(PLAIN, queries=512, keys=256)
    assert own.milliseconds("native", bigger, cuda_graphs=True) == pytest.approx(1.0 + 8.0 * 2)


@pytest.mark.parametrize(
    "changed",
    [{"mask": "causal"}, {"backward": True}, {"softcap": True}, {"dtype": "bfloat16"}, {"batch": 2**20}],
    ids=str,
)
def test_a_row_of_another_kind_says_nothing(changed: dict[str, Any]) -> None:
    own = table(native=1.0)
    assert own.milliseconds("native", dataclasses.replace(PLAIN, **changed), cuda_graphs=False) is None
    assert own.milliseconds("flex", PLAIN, cuda_graphs=False) is None


def test_the_two_half_precisions_stand_for_each_other() -> None:
    half = dataclasses.replace(PLAIN, dtype="bfloat16")
    sites = [{"workload": dataclasses.asdict(half), "kernels": {"native": {"call_ms": 1.0}}}]
    own = CostTable.from_json(json.dumps({"device": "", "sites": sites}))
    other = dataclasses.replace(PLAIN, dtype="float16")
    assert own.milliseconds("native", other, cuda_graphs=False) == pytest.approx(1.0)


def test_the_tables_that_come_along() -> None:
    assert cost_table(torch.device("cpu")) is None and device_family(torch.device("cpu")) == "cpu"
    assert families_with("flash_4") == families_with("native") == ["sm_90"] and families_with("sage") == []


def test_every_row_of_them_is_of_a_kernel_that_is_exact() -> None:
    own = packaged_table("sm_90")
    assert own is not None
    for name, measured_rows in own.rows.items():
        assert not kernel_named(name).lower_precision
        assert all(row.call > 0 for row in measured_rows)
    # What needs no request: PyTorch's own in their order, then what was measured.
    names = [kernel.name for kernel in standing(own)]
    assert (
        names[:3] == ["single_key", "isolated_block", "native"]
        and {"flash_4", "varlen"} <= set(names)
        and "sage" not in names
    )
    assert "flash_4" not in [kernel.name for kernel in standing(None)]


# What is chosen.


@pytest.mark.parametrize(("native", "chosen"), [(1.04, "native"), (1.06, "flex")])
def test_of_kernels_that_are_about_as_fast_the_first_serves(measured: Any, native: float, chosen: str) -> None:
    measured(table(native=native, flex=1.0))
    with torch.no_grad():
        (row,) = rows(attend, *operands(), inner="inductor")
    assert row.kernel == chosen


def test_the_fastest_willing_kernel_serves(measured: Any) -> None:
    measured(table(native=2.0, _native_math=0.5, flex=1.0))
    with torch.no_grad():
        (row,) = rows(attend, *operands(), inner="inductor")
        assert row.kernel == "flex"
        assert relative_error(rewritten(attend, "inductor")(*operands()), attend(*operands())) <= 1e-5
    said = {verdict.kernel: verdict.reason for verdict in row.verdicts if verdict.willing and verdict.reason}
    # What keeps the scores in memory is no faster way to do without them.
    assert said == {"native": "about 2 ms, measured on a CPU", "flex": "about 1 ms, measured on a CPU"}


def test_a_kernel_that_is_not_willing_is_passed_over(measured: Any) -> None:
    measured(table(native=2.0, flex=1.0))
    # With gradients: FlexAttention has no backward pass on the CPU, and no row is of training.
    (row,) = rows(attend, *(part.requires_grad_() for part in operands()), inner="inductor")
    assert row.kernel == "native"


def test_an_unmeasured_first_kernel_stays_first(measured: Any) -> None:
    measured(table(flex=0.5))
    with torch.no_grad():
        (row,) = rows(attend, *operands(), inner="inductor")
    assert row.kernel == "native"


def test_times_are_of_inductors_code(measured: Any) -> None:
    """Without Inductor FlexAttention is no kernel: the standing order holds."""
    measured(table(native=2.0, flex=1.0))
    with torch.no_grad():
        (row,) = rows(attend, *operands(), inner="aot_eager")
    assert row.kernel == "native"


def test_cuda_graphs_are_asked_for_their_own_times(measured: Any) -> None:
    measured(table(native=(2.0, 0.3), flex=(1.0, 0.4)))
    with torch.no_grad():
        (row,) = rows(attend, *operands(), inner="inductor", **{"triton.cudagraphs": True})
    assert row.kernel == "native"


class _Named(TorchSDPA):
    name = "named"


def test_in_training_the_devices_time_counts(measured: Any, request: pytest.FixtureRequest) -> None:
    """The host is ahead of the device."""
    register_kernel(_Named())
    request.addfinalizer(lambda: unregister_kernel("named"))
    for backward, chosen in ((False, "named"), (True, "native")):
        workload = dataclasses.replace(PLAIN, backward=backward)
        times = {
            "named": {"call_ms": 0.3, "graph_ms": 0.2},
            "native": {"call_ms": 0.5, "graph_ms": 0.1},
        }
        sites = [{"workload": dataclasses.asdict(workload), "kernels": times}]
        measured(CostTable.from_json(json.dumps({"device": "a CPU", "sites": sites})))
        inputs = [part.requires_grad_(backward) for part in operands()]
        with torch.set_grad_enabled(backward):
            (row,) = rows(attend, *inputs, inner="inductor")
        torch._dynamo.reset()
        assert row.kernel == chosen


def test_names_are_stronger_than_times(measured: Any) -> None:
    measured(table(native=2.0, _native_math=1.5, flex=1.0))
    with torch.no_grad():
        (row,) = rows(attend, *operands(), inner="inductor", kernels=["_native_math"])
        assert row.kernel == "_native_math" and row.verdicts[0].reason == ""
        (row,) = rows(attend, *operands(), inner="inductor", kernels=["sage", "auto"])
        assert row.kernel == "flex" and row.verdicts[0].kernel == "sage"
