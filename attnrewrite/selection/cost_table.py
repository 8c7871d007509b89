"""Cost tables: measured times of kernels on one kind of device, and estimates for sites that were not measured.

``attnrewrite bench sites --table`` writes a table on a device: ``cost_tables/<family>.json``. The estimate for a site
is the time of the nearest row, scaled by the ratio of the work; a kernel that was not measured on similar sites has
none.
"""

from __future__ import annotations

import functools
import json
import math
from dataclasses import dataclass
from importlib import resources
from typing import Any

import torch

from attnrewrite.ir.axes import size_of
from attnrewrite.ir.nodes import dtype_name, hint
from attnrewrite.ir.site import CanonicalAttention
from attnrewrite.kernels.common.keep_mask import mask_kind
from attnrewrite.kernels.common.layout import KernelLayout
from attnrewrite.kernels.common.limits import platform_of

__all__ = ["CostTable", "Workload", "cost_table", "device_family", "families_with", "packaged_table"]

_FARTHEST = 12.0
"""The largest distance of a row that is used for a site; a factor of two in one size is a distance of one."""


@dataclass(frozen=True)
class Workload:
    """What a kernel's time depends on. Symbolic sizes have the values of the first call.

    Attributes:
        mask: "none", "causal", "window", "key padding", "boolean" or "additive".
        key_heads: the number of key heads; fewer than ``heads`` with GQA.
        backward: whether the time includes the backward pass.
    """

    dtype: str
    mask: str
    backward: bool
    batch: int
    heads: int
    key_heads: int
    queries: int
    keys: int
    head_dim: int
    value_head_dim: int
    softcap: bool = False

    @staticmethod
    def of(site: CanonicalAttention) -> Workload:
        layout = KernelLayout.of(site)
        batch, heads, queries, head_dim = (hint(size_of(dim)) for dim in layout.query_dims)
        key_heads, keys, value_head_dim = (hint(size_of(dim)) for dim in layout.value_dims[1:])
        return Workload(
            dtype_name(site.compute_dtype),
            _mask(site),
            site.differentiable,
            batch,
            heads,
            key_heads,
            queries,
            keys,
            head_dim,
            value_head_dim,
            bool(site.scores.inexpressible),
        )

    @property
    def work(self) -> float:
        """The number of multiplications of both products."""
        return float(self.batch * self.heads * self.queries * self.keys * (self.head_dim + self.value_head_dim))

    def distance(self, other: Workload) -> float:
        """The distance in factors of two; infinite between workloads of different kinds."""
        kinds = ("mask", "backward", "softcap")
        if any(getattr(self, kind) != getattr(other, kind) for kind in kinds):
            return math.inf
        if torch.float32 in (own := {getattr(torch, self.dtype), getattr(torch, other.dtype)}) and len(own) > 1:
            return math.inf
        sizes = [
            (self.batch * self.heads, other.batch * other.heads, 1.0),
            (self.queries, other.queries, 1.0),
            (self.keys, other.keys, 1.0),
            # Kernels are specialized for head sizes, and read the keys of GQA differently.
            (self.head_dim, other.head_dim, 2.0),
            (self.heads // self.key_heads, other.heads // other.key_heads, 0.5),
        ]
        steps = sum(weight * abs(math.log2(max(a, 1) / max(b, 1))) for a, b, weight in sizes)
        return steps + (0.5 if self.dtype != other.dtype else 0.0)


def _mask(site: CanonicalAttention) -> str:
    scores = site.scores
    if site.is_causal or scores.is_causal:
        return "causal"
    if scores.band is not None:
        from_ends = (scores.band.from_first, scores.band.from_last)
        return "causal" if (None, 0) in from_ends else "window"
    return mask_kind(site)


@dataclass(frozen=True)
class _Measurement:
    workload: Workload
    call: float
    graph: float | None

    @property
    def host(self) -> float:
        """The time that the device waits while the host starts the call."""
        return max(0.0, self.call - self.graph) if self.graph is not None else 0.0


@dataclass(frozen=True)
class CostTable:
    """Measured times, in milliseconds, by kernel.

    Attributes:
        device: the device that was measured.
        rows: the measurements of each kernel.
    """

    device: str
    rows: dict[str, list[_Measurement]]

    @staticmethod
    def from_json(text: str) -> CostTable:
        """The table that ``attnrewrite bench sites --table`` wrote."""
        data = json.loads(text)
        rows: dict[str, list[_Measurement]] = {}
        for site in data["sites"]:
            workload = Workload(**site["workload"])
            for kernel, times in site["kernels"].items():
                if "call_ms" in times:
                    graph = times.get("graph_ms")
                    rows.setdefault(kernel, []).append(_Measurement(workload, times["call_ms"], graph))
        return CostTable(data["device"], rows)

    def milliseconds(self, kernel: str, workload: Workload, cuda_graphs: bool) -> float | None:
        """The estimated time of the kernel; None if it was not measured on similar workloads.

        Args:
            cuda_graphs: whether calls are replayed from CUDA graphs, so that they cost the host nothing.
        """
        rows = self.rows.get(kernel, ())
        near = min(rows, key=lambda row: row.workload.distance(workload), default=None)
        if near is None or near.workload.distance(workload) > _FARTHEST:
            return None
        if near.workload == workload:
            return near.graph if cuda_graphs and near.graph is not None else near.call
        ratio = workload.work / near.workload.work
        if near.graph is None:
            return near.call * ratio
        # A part of the time, such as making a block mask, does not grow with the work: at most the shortest time.
        alike = [row for row in rows if row.workload.distance(workload) < math.inf]
        fixed = min(row.graph for row in alike if row.graph is not None)
        device = fixed + (near.graph - fixed) * ratio if near.graph > fixed else fixed * max(ratio, 1.0)
        if cuda_graphs:
            return device
        # The host's time does not grow with the work; other load of the host can only add to it.
        return device + min(row.host for row in alike if row.graph is not None)


def device_family(device: torch.device) -> str:
    """The name of the devices that share a table: "sm_90" for NVIDIA's of compute capability 9.0, "cpu", ..."""
    platform = platform_of(device)
    if platform != "cuda" or not torch.cuda.is_available():
        return platform
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device))


def cost_table(device: torch.device) -> CostTable | None:
    """The table for devices of this kind; None if none was measured."""
    return packaged_table(device_family(device))


def families_with(kernel: str) -> list[str]:
    """The device families on which the kernel was measured."""
    folder: Any = resources.files("attnrewrite.selection") / "cost_tables"
    families = sorted(file.name.removesuffix(".json") for file in folder.iterdir() if file.name.endswith(".json"))
    return [family for family in families if (table := packaged_table(family)) is not None and kernel in table.rows]


@functools.cache
def packaged_table(family: str) -> CostTable | None:
    """The table of a device family that is part of the package; None if there is none."""
    file: Any = resources.files("attnrewrite.selection") / "cost_tables" / f"{family}.json"
    return CostTable.from_json(file.read_text(encoding="utf-8")) if file.is_file() else None
