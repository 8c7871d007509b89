"""What every test starts from."""

from __future__ import annotations

import gc
import logging
import os
from collections.abc import Iterator

import pytest
import torch

from tests.support import drawn


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--every", action="store_true", help="run large families of tests in full; so does -k, -m or a path"
    )


def pytest_configure(config: pytest.Config) -> None:
    # Workers are given the paths that the run was not, so the run tells them.
    if not hasattr(config, "workerinput"):
        some = config.args_source is not pytest.Config.ArgsSource.TESTPATHS
        some = some or any(map(config.getoption, ("every", "keyword", "markexpr")))
        os.environ["TESTS_DRAWN"] = str(int(not some))
    drawn.seed()
    # A defect of the rewriting fails the test, and graphs are checked after each step.
    os.environ["ATTNREWRITE_RAISE"] = "1"
    # What is tested is not what an earlier run has stored.
    os.environ["ATTNREWRITE_WARM_START"] = "0"
    # One thread a worker: the tests share their cores with each other.
    torch.set_num_threads(1)
    # Records of each compilation, which pytest would keep for a test that fails.
    logging.getLogger("torch.__trace").propagate = False
    # A collection walks through all that torch and the tests hold. Dynamo asks for one after each compilation; with
    # Python's own thresholds they take a seventh of the suite's time.
    torch._dynamo.config.run_gc_after_compile = False
    gc.set_threshold(50_000, 20, 100)


def pytest_collection_finish() -> None:
    gc.collect()
    gc.freeze()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if os.environ["TESTS_DRAWN"] == "1":
        terminalreporter.write_line("A part of each large family of tests was drawn; --every runs them all.")
    terminalreporter.write_line(f"FUZZ_SEED={drawn.seed()} draws the same again.")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if os.environ["TESTS_DRAWN"] == "1":
        items[:], left = drawn.draw(items)
        config.hook.pytest_deselected(items=left)
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="no NVIDIA GPU"))


@pytest.fixture(autouse=True)
def _fresh_start() -> Iterator[None]:
    """No compiled code of an earlier test, and the same random numbers whichever tests ran before."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()
