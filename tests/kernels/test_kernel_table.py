"""docs/kernels.md is what the kernels say of themselves."""

from __future__ import annotations

import os
from pathlib import Path

from attnrewrite.kernels import registered_kernels
from attnrewrite.kernels.registry import LIBRARY_KERNELS
from tests.support.kernel_table import kernel_table

_FILE = Path(__file__).parents[2] / "docs" / "kernels.md"


def test_the_table_is_up_to_date() -> None:
    """``EXPECTTEST_ACCEPT=1 pytest tests/kernels/test_kernel_table.py`` writes it."""
    names = {kernel.name for kernel in LIBRARY_KERNELS}
    table = kernel_table([*(one for one in registered_kernels() if one.name not in names), *LIBRARY_KERNELS])
    if os.environ.get("EXPECTTEST_ACCEPT") == "1":
        _FILE.write_text(table)
    assert _FILE.read_text() == table


def test_every_kernel_has_its_row_and_its_state() -> None:
    table = kernel_table(LIBRARY_KERNELS)
    for kernel in LIBRARY_KERNELS:
        (row,) = (line for line in table.splitlines() if line.startswith(f"| [`{kernel.name}`]"))
        assert "*run on real hardware*" in row or "*call proved against the published signature*" in row
        assert f"### {kernel.name}\n" in table
