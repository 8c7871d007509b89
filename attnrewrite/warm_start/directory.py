"""The files of stored graphs, in a directory that only its owner writes to."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import stat
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

from attnrewrite.options.environment import cache_directory
from attnrewrite.warm_start.codec import NotStorable

__all__ = ["load", "store"]

log = logging.getLogger("attnrewrite")

_MOST_FILES = 1024
"""The files that were read or written longest ago are removed beyond this."""

_LARGEST_FILE = 2**26
"""In bytes."""

_OWN_NAME = re.compile(r"[0-9a-f]{40}\.json|graph_.*\.part")
"""Of the files that are written here: others that lie beside them stay."""


def load(key: str) -> dict[str, Any] | None:
    """What is stored under the key; None if there is nothing, or nothing that can be relied on."""
    try:
        file = _directory() / f"{key}.json"
        status = file.lstat()
        if not stat.S_ISREG(status.st_mode) or status.st_size > _LARGEST_FILE or not _is_own(status):
            raise NotStorable(f"{file} is none that was written here")
        text = file.read_text()
        with contextlib.suppress(OSError):  # Only the order in which files are removed.
            os.utime(file)
    except FileNotFoundError:
        return None
    except (OSError, NotStorable, UnicodeDecodeError) as error:
        _say_once(f"stored graphs are not read: {error}")
        return None
    digest, _, content = text.partition("\n")
    try:
        found = json.loads(content) if digest == _digest(key, content) else None
    except (RecursionError, ValueError):
        found = None
    if not isinstance(found, dict):
        log.warning("%s is damaged; the graph is rewritten again", file)
        return None
    return found


def store(key: str, data: dict[str, Any]) -> None:
    """Stores data under the key, in place of what is there."""
    content = json.dumps(data)
    if len(content) > _LARGEST_FILE // 2:  # A character may take more than a byte.
        _say_once("a rewritten graph is not stored: it is too large")
        return
    try:
        directory = _directory()
        # Another process never sees half a file.
        with tempfile.NamedTemporaryFile("w", dir=directory, prefix="graph_", suffix=".part", delete=False) as part:
            written = Path(part.name)
        try:
            written.write_text(f"{_digest(key, content)}\n{content}")
            os.replace(written, directory / f"{key}.json")  # Closed, as Windows wants it.
        except OSError:
            written.unlink(missing_ok=True)
            raise
        _remove_oldest(directory)
    except (OSError, NotStorable) as error:
        _say_once(f"rewritten graphs are not stored: {error}")


def _directory() -> Path:
    """``graphs`` in :func:`cache_directory`.

    Raises:
        NotStorable: others could write to it.
        OSError: it cannot be made.
    """
    directory = cache_directory() / "graphs"
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = directory.stat()
    if not _is_own(status):
        raise NotStorable(f"{directory} belongs to another user (set ATTNREWRITE_CACHE_DIR)")
    if os.name == "posix" and status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise NotStorable(f"others can write to {directory} (chmod go-w, or set ATTNREWRITE_CACHE_DIR)")
    return directory


def _is_own(status: os.stat_result) -> bool:
    return not hasattr(os, "getuid") or status.st_uid == os.getuid()


def _digest(key: str, content: str) -> str:
    """With the key, so that a file under another name is not taken for its own."""
    return hashlib.blake2b(f"{key}\n{content}".encode(), digest_size=20).hexdigest()


def _remove_oldest(directory: Path) -> None:
    times: dict[Path, float] = {}
    for file in filter(lambda file: _OWN_NAME.fullmatch(file.name), directory.iterdir()):
        with contextlib.suppress(FileNotFoundError):  # Another process has removed it.
            times[file] = file.stat().st_mtime
    for file in sorted(times, key=times.__getitem__)[: max(0, len(times) - _MOST_FILES)]:
        file.unlink(missing_ok=True)


@cache
def _say_once(message: str) -> None:
    log.warning("%s", message)
