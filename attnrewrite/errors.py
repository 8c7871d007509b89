"""The errors a user may see. Each message is one line that says what to do; a list may follow it."""

from __future__ import annotations

from attnrewrite.torch_private import ShortenTraceback

__all__ = [
    "AttentionCheckError",
    "AttentionInputError",
    "AttnRewriteError",
    "CacheError",
    "CacheMemoryError",
    "KernelError",
    "OptionError",
]


class AttnRewriteError(Exception):
    """Base of the errors that attnrewrite raises for its callers' mistakes."""


class AttentionInputError(AttnRewriteError, ValueError):
    """Arguments of ``attention_forward`` that do not fit together."""


class AttentionCheckError(AttnRewriteError):
    """With ``checks``: operands of a rewritten attention that are not what it was compiled for."""


class CacheError(AttnRewriteError, RuntimeError):
    """Cross-step caching cannot go on: a callback's answer, or tensors that do not fit the settings."""


class CacheMemoryError(CacheError):
    """What cross-step caching would store is more than its ``memory_limit``."""


class _RaisedInBackend(AttnRewriteError, ShortenTraceback):
    """Raised while Dynamo compiles, and meant for the user.

    It derives from Dynamo's ``ShortenTraceback`` so that Dynamo hands it on as it is, without the frames of the
    compiler and without wrapping it into ``BackendCompilerFailed``
    (https://github.com/pytorch/pytorch/blob/v2.13.0/torch/_dynamo/output_graph.py, ``_call_user_compiler``).
    """

    def __init__(self, message: str, details: str = "") -> None:
        """Args:
        message: one line.
        details: further lines, such as a list of what there is.
        """
        ShortenTraceback.__init__(self, message, first_useful_frame=None)
        self.message = message
        self._details = details

    def __str__(self) -> str:
        """The message alone: Dynamo adds a hint at its own stack trace to an exception's arguments."""
        return f"{self.message}\n{self._details}" if self._details else self.message


class OptionError(_RaisedInBackend, ValueError):
    """An option, an environment variable or a backend's name that is not valid."""


class KernelError(_RaisedInBackend):
    """A kernel was asked for with ``strict``, and cannot serve a site."""
