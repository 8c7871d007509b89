"""Errors that users may see. Each message is one line that says what to do; a list may follow it."""

from __future__ import annotations

from attnrewrite.torch_private import ShortenTraceback

__all__ = [
    "AcceleratedTypeError",
    "AttentionCheckError",
    "AttentionInputError",
    "AttnRewriteError",
    "BackendTypeError",
    "CacheError",
    "CacheMemoryError",
    "CacheTypeError",
    "ContextParallelError",
    "IntegrationError",
    "KernelError",
    "OptionError",
    "PatternError",
    "UnreadWeightsError",
]


class AttnRewriteError(Exception):
    """Base class of all errors that attnrewrite raises for wrong use."""


class AcceleratedTypeError(AttnRewriteError, TypeError):
    """``accelerate_attention`` was applied to something that cannot be compiled."""


class BackendTypeError(AttnRewriteError, TypeError):
    """``set_attention_backend`` was called on a model that is not compiled."""


class AttentionInputError(AttnRewriteError, ValueError):
    """The arguments of one attention do not fit together, or one of them is not known."""


class AttentionCheckError(AttnRewriteError):
    """With ``checks``: the operands of a rewritten attention are not as they were when it was compiled."""


class CacheError(AttnRewriteError, RuntimeError):
    """Attention cannot be reused across steps: a callback's result or the model's tensors do not fit the settings."""


class CacheMemoryError(CacheError):
    """The attention outputs stored for reuse across steps would take more memory than ``memory_limit``."""


class CacheTypeError(AttnRewriteError, TypeError):
    """Caching was enabled on something that is not a compiled module."""


class UnreadWeightsError(AttnRewriteError, AttributeError):
    """Attention weights are used of which ``options["unread_weights"]`` says that nobody reads them."""


class ExportError(AttnRewriteError, ValueError):
    """An exported program cannot be rewritten, or not so that PyTorch alone can load the result."""


class IntegrationError(AttnRewriteError, ImportError):
    """The library of an integration is not installed, or is too old."""


class PatternError(AttnRewriteError, ValueError):
    """A registered pattern, or a site that it returned, is not valid."""


class _RaisedInBackend(AttnRewriteError, ShortenTraceback):
    """An error for the user that is raised while Dynamo compiles.

    It derives from Dynamo's ``ShortenTraceback`` so that Dynamo raises it unchanged, without the frames of the compiler
    and not wrapped into ``BackendCompilerFailed``
    (https://github.com/pytorch/pytorch/blob/v2.13.0/torch/_dynamo/output_graph.py, ``_call_user_compiler``).
    """

    def __init__(self, message: str, details: str = "") -> None:
        """Args:
        message: one line.
        details: further lines, such as the list of valid names.
        """
        ShortenTraceback.__init__(self, message, first_useful_frame=None)
        self.message = message
        self._details = details

    def __str__(self) -> str:
        """The message and details, without the hint about its stack trace that Dynamo adds to the arguments."""
        return f"{self.message}\n{self._details}" if self._details else self.message


class OptionError(_RaisedInBackend, ValueError):
    """An option, an environment variable or the name of a backend is not valid."""


class ContextParallelError(_RaisedInBackend, ValueError):
    """With ``context_parallel``: what the graph computes of the whole sequence is not known, or not supported."""


class KernelError(_RaisedInBackend):
    """A kernel that was requested with ``strict`` cannot serve a site."""
