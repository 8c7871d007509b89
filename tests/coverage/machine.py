"""The machine and the versions that results were measured with."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

__all__ = ["describe"]


def describe(root: Path, module: str, packages: Iterable[str]) -> dict[str, Any]:
    """``module`` is what was run with ``python -m``; ``packages`` are those that were measured."""
    packages = {"attnrewrite", "torch", "transformers", "diffusers", *packages}
    return {
        "command": shlex.join(["python", "-m", module, *sys.argv[1:]]),
        "commit": _git(root, "rev-parse", "HEAD"),
        "uncommitted_changes": bool(_git(root, "status", "--porcelain", "--untracked-files=no")),
        "device": f"{_processor()}, {os.cpu_count()} logical cores",
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {name: version for name in sorted(packages) if (version := _version(name))},
    }


def _git(root: Path, *arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=False).stdout.strip()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [text.split(":", 1)[1].strip() for text in lines if text.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
