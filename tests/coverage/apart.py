"""Measurements in processes of their own, so that one that hangs or crashes takes none of the others with it."""

from __future__ import annotations

import multiprocessing
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

__all__ = ["apart"]

Row = dict[str, Any]


def apart(work: Callable[[], Row], timeout: float) -> Row:
    """What ``work`` returns; a row with nothing but a failure if it does not come back."""
    # A fork finds PyTorch loaded and warm, which is most of the time that a small model takes.
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_send, args=(sender, work))
    child.start()
    sender.close()
    try:
        if not receiver.poll(timeout):
            return {"failures": {"process": f"took more than {timeout} s"}}
        row: Row = receiver.recv()
        return row
    except EOFError:
        child.join()
        return {"failures": {"process": f"exit status {child.exitcode}"}}
    finally:
        child.kill()
        child.join()


def _send(sender: Connection, work: Callable[[], Row]) -> None:
    warnings.simplefilter("ignore")
    sender.send(work())
