"""Checks a user's kernel once, when it is registered: a misspelled attribute would have no effect otherwise."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterator
from types import NoneType
from typing import TYPE_CHECKING, Any, Protocol, get_args, get_type_hints

from attnrewrite.errors import OptionError
from attnrewrite.kernels.common.base import Kernel
from attnrewrite.kernels.common.verdict import Availability, Verdict

if TYPE_CHECKING:
    from torch import fx

    from attnrewrite.ir.builder import Builder
    from attnrewrite.ir.site import CanonicalAttention

__all__ = ["KernelLike", "checked"]


class KernelLike(Protocol):
    """The least that an object needs to be registered without inheriting from :class:`Kernel`."""

    name: str
    automatic: bool
    needs: str

    def availability(self) -> Availability: ...

    def supports(self, site: CanonicalAttention) -> Verdict: ...

    def emit(self, site: CanonicalAttention, builder: Builder) -> fx.Node: ...


_FIELDS: dict[str, Any] = get_type_hints(Kernel)
_METHODS = tuple(name for name, value in vars(Kernel).items() if inspect.isfunction(value) and name[0] != "_")
_OPTIONAL = tuple(name for name in (*_FIELDS, *_METHODS) if name not in Kernel.__abstractmethods__)
_REQUIRED = tuple(name for name in _FIELDS if not hasattr(Kernel, name))
_REQUIRED_OF_OTHERS = ("name", "automatic", "needs", "availability", "supports", "emit")

_ALIKE = 0.85
"""How like (``difflib``) an attribute is to one of the contract to be taken for a misspelling of it."""


def checked(kernel: object) -> Kernel:
    """``kernel`` if it keeps the contract; an object of another class than :class:`Kernel` is wrapped in one.

    Raises:
        OptionError: an attribute is missing, misspelled or of a wrong type, or a method takes other arguments. An
            attribute of the user's own that looks like one of the contract counts as misspelled unless it begins with
            an underscore.
    """
    if isinstance(kernel, type):
        raise OptionError(f"register_kernel takes a kernel, not a class: register_kernel({kernel.__name__}(...))")
    for name in _own_names(kernel):
        for near in difflib.get_close_matches(name.lower(), (*_FIELDS, *_METHODS), 1, _ALIKE):
            raise OptionError(
                f"register_kernel: {_class_of(kernel)} has {name!r}, which no kernel has: did you mean {near!r}? "
                f"(if not, call it {'_' + name!r})"
            )
    required = _REQUIRED if isinstance(kernel, Kernel) else _REQUIRED_OF_OTHERS
    missing = [name for name in required if not hasattr(kernel, name)]
    if missing:
        raise OptionError(
            f"register_kernel takes an object with {', '.join(_REQUIRED_OF_OTHERS)}; {kernel!r} lacks {missing[0]} "
            "(attnrewrite.kernels.Kernel, to inherit from, has defaults for what is optional)"
        )
    for name in _FIELDS:
        _check_type(kernel, name)
    for name in _METHODS:
        _check_signature(kernel, name)
    found = kernel if isinstance(kernel, Kernel) else _AdaptedKernel(kernel)
    if found.automatic and found.lower_precision:
        raise OptionError(
            f"the kernel {found.name!r} has both automatic and lower_precision; set automatic to False, and let "
            "options['tolerance'] or its name choose it"
        )
    return found


def _own_names(kernel: object) -> Iterator[str]:
    """The public names of the object that no class of attnrewrite's has."""
    known = {*_FIELDS, *_METHODS}
    for base in type(kernel).__mro__:
        if base.__module__.partition(".")[0] == "attnrewrite":
            known.update(vars(base))
    return (name for name in dir(kernel) if name[0] != "_" and name not in known)


def _check_type(kernel: object, name: str) -> None:
    if not hasattr(kernel, name):
        return
    value, wanted = getattr(kernel, name), _FIELDS[name]
    if not isinstance(value, wanted):
        types = " or ".join("None" if each is NoneType else each.__name__ for each in get_args(wanted) or (wanted,))
        raise OptionError(f"register_kernel: {name!r} of {_class_of(kernel)} must be {types}; got {value!r}")


def _check_signature(kernel: object, name: str) -> None:
    if not hasattr(kernel, name):
        return
    method = getattr(kernel, name)
    arguments = list(inspect.signature(getattr(Kernel, name)).parameters)[1:]
    called = f"{name}({', '.join(arguments)})"
    if not callable(method):
        raise OptionError(f"register_kernel: {name!r} of {_class_of(kernel)} must be a method {called}; got {method!r}")
    try:
        signature = inspect.signature(method)
    except ValueError:
        return  # Compiled code need not say what it takes.
    try:
        signature.bind(*arguments)
    except TypeError as error:
        raise OptionError(
            f"register_kernel: {name!r} of {_class_of(kernel)} is called as {called}, and takes {signature}: {error}"
        ) from None


def _class_of(kernel: object) -> str:
    return type(kernel).__qualname__


class _AdaptedKernel(Kernel):
    """A user's object that has the parts of a kernel without inheriting from :class:`Kernel`; they are read once."""

    def __init__(self, own: Any) -> None:
        self._own = own
        for name in _OPTIONAL:
            if hasattr(own, name):
                setattr(self, name, getattr(own, name))

    def availability(self) -> Availability:
        found: Availability = self._own.availability()
        return found

    def supports(self, site: CanonicalAttention) -> Verdict:
        verdict: Verdict = self._own.supports(site)
        return verdict

    def emit(self, site: CanonicalAttention, builder: Builder) -> fx.Node:
        node: fx.Node = self._own.emit(site, builder)
        return node
