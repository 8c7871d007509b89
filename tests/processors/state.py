"""What a name is in the installed diffusers, read off the package and never assumed."""

from __future__ import annotations

import importlib
import re
import warnings
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

__all__ = ["State", "definitions", "made", "processor_class", "state"]

_HOME = "diffusers.models.attention_processor"


@cache
def _modules_by_class() -> dict[str, tuple[str, ...]]:
    """For each class whose name says that it is a processor of attention: the modules that define it."""
    import diffusers

    root = Path(diffusers.__file__).parent
    found: dict[str, list[str]] = {}
    for file in sorted(root.rglob("*.py")):
        module = ".".join(("diffusers", *file.relative_to(root).with_suffix("").parts))
        for name in re.findall(r"^class (\w*Attn\w*Processor\w*)\b", file.read_text(encoding="utf-8"), re.MULTILINE):
            found.setdefault(name, []).append(module)
    return {name: tuple(modules) for name, modules in found.items()}


def definitions(name: str) -> tuple[str, ...]:
    """The modules that define ``name``, the common one first; empty where it was removed."""
    modules = _modules_by_class().get(name, ())
    return tuple(sorted(modules, key=lambda module: (module != _HOME, len(module))))


def processor_class(name: str) -> Any:
    return getattr(importlib.import_module(definitions(name)[0]), name)


def made(name: str, *args: Any, **settings: Any) -> Any:
    """An instance, without the warnings of deprecation that making some of them brings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return processor_class(name)(*args, **settings)


@dataclass(frozen=True)
class State:
    """``kind``: "class", "alias" (making one gives another class), "factory" (it makes one of another class, and
    cannot here), "stub" (without ``__call__``) or "removed". ``raises``: what making one raises here.
    """

    kind: str
    modules: tuple[str, ...] = ()
    makes: str = ""
    raises: str = ""
    deprecated: bool = False

    @property
    def moved(self) -> bool:
        """Whether it is defined elsewhere than most are."""
        return bool(self.modules) and self.modules[0] != _HOME

    def __str__(self) -> str:
        text = f"alias of {self.makes.rpartition('.')[2]}" if self.kind == "alias" else self.kind
        return text + ", moved" * self.moved + ", deprecated" * self.deprecated


def state(name: str, **settings: Any) -> State:
    """What ``name`` is; ``settings`` are what it takes to make one."""
    modules = definitions(name)
    if not modules:
        return State("removed")
    kind = processor_class(name)
    # A pipeline that is kept for now alone says so by its place.
    deprecated = any(".deprecated." in module for module in modules)
    if "__call__" not in dir(kind) and "__new__" not in vars(kind):
        return State("stub", modules, deprecated=deprecated)
    makes = raises = ""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            instance = kind(**settings)
        except Exception as error:  # noqa: BLE001 - Whatever it raises is the answer.
            raises = f"{type(error).__name__}: {' '.join(str(error).split())}"
        else:
            if type(instance) is not kind:
                makes = f"{type(instance).__module__}.{type(instance).__qualname__}"
    deprecated = deprecated or any("deprecated" in str(warning.message) for warning in caught)
    word = "alias" if makes else "factory" if "__new__" in vars(kind) else "class"
    return State(word, modules, makes, raises, deprecated)
