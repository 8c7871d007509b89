"""Processes that form a group on gloo and are handed one function after the other, since starting takes longest."""

from __future__ import annotations

import datetime
import multiprocessing
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import attnrewrite.backend  # noqa: F401  # Once for all processes, and not by each with its first compilation.

__all__ = ["Ranks"]

LONGEST = datetime.timedelta(seconds=60)
"""How long processes wait for each other before it is an error."""

_MODULES = ["tests.support.ranks"]
"""What the processes import, all together, before they are forked."""


class Ranks:
    """Some processes of one group; used as a context."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *details: object) -> None:
        self._end()

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """What ``function(*args)`` gives in each of the processes.

        Raises:
            RuntimeError: it failed in one; with its traceback.
        """
        if not self._processes:
            self._start()
        for pipe in self._pipes:
            pipe.send((function, args))
        answers = []
        for pipe in self._pipes:
            fits = pipe.poll(LONGEST.total_seconds() * 3)
            answers.append(pipe.recv() if fits else (False, "no answer in time"))
        failures = [f"rank {rank}: {said}" for rank, (done, said) in enumerate(answers) if not done]
        if failures:
            self._end()  # Others may wait in an exchange for ever.
            raise RuntimeError("\n".join(failures))
        return [value for _, value in answers]

    def _start(self) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(_MODULES)
        store = Path(tempfile.mkdtemp()) / "store"
        for rank in range(self.count):
            own, others = context.Pipe()
            process = context.Process(target=_serve, args=(rank, self.count, str(store), others), daemon=True)
            process.start()
            self._processes.append(process)
            self._pipes.append(own)

    def _end(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()
        self._processes, self._pipes = [], []


def _serve(rank: int, count: int, store: str, pipe: Connection) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=count, timeout=LONGEST)
    while True:
        try:
            function, args = pipe.recv()
        except EOFError:
            return
        torch.compiler.reset()
        try:
            pipe.send((True, function(*args)))
        except Exception:  # noqa: BLE001  # Whatever it is, it is told to the process that asked.
            pipe.send((False, traceback.format_exc()[-6000:]))
