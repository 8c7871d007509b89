"""Stand-ins for packages that a model's package imports and the model does not use.

torchvision, for one, needs the build that belongs to the PyTorch that is installed; packages import it for the
preparation of images, which is not measured here.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

__all__ = ["stand_in_for"]


class _Names(type):
    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        value = _Names(name, (_Anything,), {"__module__": __name__})
        setattr(cls, name, value)  # Members of an enumeration are told apart.
        return value


class _Anything(metaclass=_Names):
    """Can be subclassed, and called as a decorator."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        if cls.__module__ == __name__ and len(args) == 1 and callable(args[0]):
            return args[0]
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return args[0] if args else self


class _Module(ModuleType):
    __path__: list[str] = []  # noqa: RUF012 - Any submodule can be imported.

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        value: Any = getattr(_Anything, name)
        return value


class _Finder(MetaPathFinder, Loader):
    def __init__(self, package: str) -> None:
        self._package = package

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname.partition(".")[0] == self._package:
            return ModuleSpec(fullname, self, is_package=True)
        return None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _Module(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


def stand_in_for(*packages: str) -> None:
    """Makes the imports of these packages work in this process, where they are not installed."""
    for package in packages:
        if importlib.util.find_spec(package) is None:
            sys.meta_path.append(_Finder(package))
