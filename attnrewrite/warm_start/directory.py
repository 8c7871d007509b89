"""The files of stored graphs, in a directory that only its owner writes to."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
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


def load(key: str) -> dict[str, Any] | None:
    """What is stored under the key; None if there is nothing, or nothing that can be relied on."""
    try:
        file = _directory() / f"{key}.json"
        text = file.read_text()
        with contextlib.suppress(PermissionError):  # Only the order in which files are removed.
            os.utime(file)
    except FileNotFoundError:
        return None
    except (OSError, NotStorable, UnicodeDecodeError) as error:
        _say_once(f"stored graphs are not read: {error}")
        return None
    digest, _, content = text.partition("\n")
    if digest != _digest(key, content):
        log.warning("%s is damaged; the graph is rewritten again", file)
        return None
    found: dict[str, Any] = json.loads(content)
    return found


def store(key: str, data: dict[str, Any]) -> None:
    """Stores data under the key, in place of what is there."""
    content = json.dumps(data)
    try:
        directory = _directory()
        # Another process never sees half a file.
        with tempfile.NamedTemporaryFile("w", dir=directory, suffix=".part", delete=False) as part:
            part.write(f"{_digest(key, content)}\n{content}")
        os.replace(part.name, directory / f"{key}.json")
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
    if hasattr(os, "getuid") and status.st_uid != os.getuid():
        raise NotStorable(f"{directory} belongs to another user (set ATTNREWRITE_CACHE_DIR)")
    if os.name == "posix" and status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise NotStorable(f"others can write to {directory} (chmod go-w, or set ATTNREWRITE_CACHE_DIR)")
    return directory


def _digest(key: str, content: str) -> str:
    """With the key, so that a file under another name is not taken for its own."""
    return hashlib.blake2b(f"{key}\n{content}".encode(), digest_size=20).hexdigest()


def _remove_oldest(directory: Path) -> None:
    times: dict[Path, float] = {}
    for file in (*directory.glob("*.json"), *directory.glob("*.part")):
        with contextlib.suppress(FileNotFoundError):  # Another process has removed it.
            times[file] = file.stat().st_mtime
    for file in sorted(times, key=times.__getitem__)[: max(0, len(times) - _MOST_FILES)]:
        file.unlink(missing_ok=True)


@cache
def _say_once(message: str) -> None:
    log.warning("%s", message)
