"""Where a third-party kernel's functions come from: an installed package, or what the package ``kernels`` fetches.

Nothing is imported before it is asked for, and nothing is fetched on the way through a graph.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch.torch_version import TorchVersion

from attnrewrite.kernels.common.verdict import Availability, Refusal
from attnrewrite.torch_private import custom_op_function

__all__ = ["HubKernel", "Package", "Vendor", "VendorCall", "is_older"]


@runtime_checkable
class Vendor(Protocol):
    """What holds a vendor's functions."""

    @property
    def module(self) -> str:
        """The module's name, or the repository's."""

    @property
    def package(self) -> Package:
        """The package that has to be installed: that of the functions, or the one that fetches them."""

    def availability(self) -> Availability: ...

    def version(self) -> str: ...

    def function(self, path: str) -> Callable[..., Any]: ...


@dataclass(frozen=True)
class VendorCall:
    """A call of a vendor's function, not made yet.

    Attributes:
        vendor: what holds the function.
        function: its dotted path in the vendor's module.
        args, kwargs: what it is called with; a call among them stands for its result.
        read: what of its result is wanted, as a tuple of tensors.
    """

    vendor: Vendor
    function: str
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    read: Callable[[Any], tuple[torch.Tensor, ...]] = lambda result: (result,)

    @property
    def target(self) -> str:
        """ "module:function"."""
        return f"{self.vendor.module}:{self.function}"

    def run(self) -> tuple[torch.Tensor, ...]:
        return self.read(self._result())

    def _result(self) -> Any:
        def settled(value: Any) -> Any:
            return value._result() if isinstance(value, VendorCall) else value

        kwargs = {name: settled(value) for name, value in self.kwargs.items()}
        return self.vendor.function(self.function)(*map(settled, self.args), **kwargs)


def is_older(version: str, than: str) -> bool:
    """Whether one release is older than another, as PEP 440 orders them: "4.0.0b36" is older than "4.0.0"."""
    return TorchVersion(version) < than


def _in_one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


@dataclass(frozen=True)
class Package:
    """An installed package.

    Attributes:
        module: what is imported.
        distribution: the name that its version is found under.
        how_to_get: a command or a page.
        minimum_version: the oldest that will do; empty for any.
        parameters: functions that must have certain parameters, where the version does not tell them apart.
        broken: a further question to the imported module: why it is of no use, or None.
        within: another distribution whose import package this one's module is in.
    """

    module: str
    distribution: str
    how_to_get: str
    minimum_version: str = ""
    parameters: tuple[tuple[str, str], ...] = ()
    broken: Callable[[Any], Refusal] | None = None
    within: str = ""

    @property
    def package(self) -> Package:
        return self

    def availability(self) -> Availability:
        return _probe(self)

    def version(self) -> str:
        """The installed version; empty if it cannot be said."""
        return _version(self)

    def function(self, path: str) -> Callable[..., Any]:
        found: Any = importlib.import_module(self.module)
        for name in path.split("."):
            found = getattr(found, name)
        return found  # type: ignore[no-any-return]


@functools.cache
def _probe(package: Package) -> Availability:
    root = package.module.partition(".")[0]
    absent = Availability(False, f"the package {package.distribution} is not installed ({package.how_to_get})")
    try:
        if importlib.util.find_spec(root) is None or (package.within and not _is_installed(package.distribution)):
            return absent
        module = importlib.import_module(package.module)
        broken = package.broken(module) if package.broken else None
    except ModuleNotFoundError as error:
        if not _is_installed(package.distribution) and f"{error.name}".partition(".")[0] == root:
            # What is there of that name is another distribution's, as flash-attn-4's `flash_attn` is.
            return absent
        return Availability(False, f"{_in_one_line(error)} ({package.how_to_get})")
    except Exception as error:  # noqa: BLE001 - A broken package may raise anything; its words are the answer.
        return Availability(False, f"{package.distribution} is installed but cannot be loaded: {_in_one_line(error)}")
    if broken:
        return Availability(False, f"{package.distribution} is installed but cannot be used: {broken}")
    version = package.version()
    if package.minimum_version:
        if not version:
            return Availability(
                False, f"{package.distribution} does not say its version; needed is {package.how_to_get}"
            )
        if is_older(version, package.minimum_version):
            wanted = package.minimum_version
            return Availability(False, f"{package.distribution} {version} is too old, {wanted} or later is needed")
    for name, parameter in package.parameters:
        function = getattr(module, name, None)
        # A torch.library operator holds the function that it was made of.
        function = custom_op_function(function)
        if function is None or parameter not in inspect.signature(function).parameters:
            what = f"{package.module}.{name} has no parameter {parameter}"
            return Availability(False, f"{package.distribution} is too old: {what} ({package.how_to_get})")
    return Availability(True, f"{package.distribution} {version}".rstrip())


def _is_installed(distribution: str) -> bool:
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


@functools.cache
def _version(package: Package) -> str:
    try:
        return importlib.metadata.version(package.distribution)
    except importlib.metadata.PackageNotFoundError:
        pass
    if not _probe_imports(package):
        return ""
    return str(getattr(importlib.import_module(package.module.partition(".")[0]), "__version__", ""))


def _probe_imports(package: Package) -> bool:
    """Whether the package's root can be imported; asked only where no metadata tells the version."""
    try:
        importlib.import_module(package.module.partition(".")[0])
    except Exception:  # noqa: BLE001 - As in `_probe`.
        return False
    return True


@dataclass(frozen=True)
class HubKernel:
    """A kernel that the package ``kernels`` fetches from the Hugging Face Hub.

    Attributes:
        module: the repository.
        revision: the major version of the kernel in it.
        minimum_version: of the package ``kernels``.
    """

    module: str
    revision: int
    minimum_version: str = "0.12"

    @property
    def package(self) -> Package:
        how = f"pip install 'kernels>={self.minimum_version}'"
        return Package("kernels", "kernels", how, self.minimum_version)

    def availability(self) -> Availability:
        """Whether the package that fetches is there. The network is not touched."""
        own = self.package.availability()
        if not own.available:
            return own
        return Availability(True, f"{own.detail}; {self.module} is fetched when it is asked for by name")

    def version(self) -> str:
        return f"v{self.revision}"

    def function(self, path: str) -> Callable[..., Any]:
        found: Any = _fetch(self)
        for name in path.split("."):
            found = getattr(found, name)
        return found  # type: ignore[no-any-return]

    def fetch(self) -> Availability:
        """Fetches the kernel, or says why that failed. Uses the network unless it was fetched before."""
        own = self.package.availability()
        if not own.available:
            return own
        try:
            _fetch(self)
        except Exception as error:  # noqa: BLE001 - No network, no build for this machine, no such repository.
            return Availability(False, f"{self.module} could not be fetched: {_in_one_line(error)}")
        return Availability(True, f"{self.module} v{self.revision}")


@functools.cache
def _fetch(kernel: HubKernel) -> Any:
    # https://huggingface.co/docs/kernels/v0.17.0/en/api/kernels#kernels.get_kernel
    return importlib.import_module("kernels").get_kernel(kernel.module, version=kernel.revision)
