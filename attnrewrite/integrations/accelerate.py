"""accelerate with ``backend="attnrewrite"``, which its own plugin has no name for.

Source: ``TorchDynamoPlugin`` of
https://github.com/huggingface/accelerate/blob/v1.15.0/src/accelerate/utils/dataclasses.py, whose ``backend`` is one of
a fixed enumeration, and ``to_kwargs`` what ``Accelerator.prepare`` gives to ``torch.compile``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from attnrewrite.errors import IntegrationError, OptionError

try:
    from accelerate.utils import TorchDynamoPlugin
except ImportError as error:
    raise IntegrationError(
        f"attnrewrite.integrations.accelerate needs accelerate 1.2 or later ({error}); pip install 'accelerate>=1.2'"
    ) from error

__all__ = ["AttnRewritePlugin"]


@dataclass
class AttnRewritePlugin(TorchDynamoPlugin):  # type: ignore[misc]
    """``Accelerator(dynamo_plugin=AttnRewritePlugin())``: models are compiled with attnrewrite when they are prepared.

    Args:
        backend: None or ``"attnrewrite"``. Default None.
        mode, fullgraph, dynamic, disable: as of ``torch.compile``.
        options: those of attnrewrite. Default None.
        use_regional_compilation: whether repeated blocks are compiled once, and one by one. Default False.

    Raises:
        OptionError: another backend is asked for.
    """

    def __post_init__(self) -> None:
        asked: object = self.backend  # type: ignore[has-type]
        if asked not in (None, "attnrewrite"):
            raise OptionError(
                f'AttnRewritePlugin compiles with backend="attnrewrite", not {str(asked)!r}; '
                "take accelerate's TorchDynamoPlugin for another backend"
            )
        # Any of accelerate's names that is not "no", so that it compiles.
        self.backend = "inductor"
        super().__post_init__()

    def to_dict(self) -> dict[str, Any]:
        """The fields, with the backend's name."""
        return {**super().to_dict(), "backend": "attnrewrite"}

    def to_kwargs(self) -> dict[str, Any]:
        """The arguments of ``torch.compile`` that are not its defaults, and the backend."""
        return {**super().to_kwargs(), "backend": "attnrewrite"}
