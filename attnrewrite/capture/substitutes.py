"""What Dynamo traces in place of functions of PyTorch that read the numbers of a tensor, where nothing depends on them.

``nn.TransformerEncoder(...)(x, mask=mask)``, and so ``nn.TransformerDecoder`` and ``nn.Transformer``, asks whether its
mask is causal, to hand the kernel a flag in its place. Dynamo breaks the graph at the answer, and does not compile what
follows, since that is PyTorch's own code: no attention of such a model is compiled at all. Without the flag the mask
itself is applied, which gives the same.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from attnrewrite.torch_private import detect_is_causal_mask

__all__ = ["substitute_questions_about_masks"]

log = logging.getLogger("attnrewrite")


def substitute_questions_about_masks() -> None:
    """Lets Dynamo trace the answer that a mask is not known to be causal, for all backends of this process.

    Source: https://github.com/pytorch/pytorch/blob/v2.13.0/torch/nn/modules/transformer.py _detect_is_causal_mask
    """
    try:
        torch.compiler.substitute_in_graph(detect_is_causal_mask)(_is_said_to_be_causal)
    except ValueError as reason:
        log.debug("another substitute of %s stands: %s", detect_is_causal_mask.__name__, reason)


def _is_said_to_be_causal(mask: Tensor | None, is_causal: bool | None = None, size: int | None = None) -> bool:
    return is_causal is True
