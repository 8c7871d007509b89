"""Constants of a graph (``torch.tensor([1, 2])`` in the source), named by the numbers that they hold."""

from __future__ import annotations

import hashlib

import torch
from torch import fx

__all__ = ["content_of", "name_by_content"]


def content_of(value: torch.Tensor) -> str | None:
    """A hash of dtype, sizes and numbers; None where the numbers cannot be read."""
    if type(value) not in (torch.Tensor, torch.nn.Parameter) or value.layout != torch.strided:
        return None
    numbers = (
        value.detach().resolve_conj().resolve_neg().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    )
    return hashlib.sha256(f"{value.dtype}{list(value.shape)}".encode() + numbers).hexdigest()


def name_by_content(gm: fx.GraphModule) -> None:
    """Renames the constants of a graph so that its code tells them apart.

    AOTAutograd's cache knows a graph by its code and takes no notice of the numbers of its attributes: graphs that
    differ in a constant alone would be given the same compiled code, in the next process, too.
    https://github.com/pytorch/pytorch/blob/v2.13.0/torch/_functorch/_aot_autograd/autograd_cache.py
    """
    for node in gm.graph.find_nodes(op="get_attr"):
        name = str(node.target)
        value = vars(gm).get(name)
        content = content_of(value) if isinstance(value, torch.Tensor) else None
        if content is not None and not name.endswith(content[:_DIGITS]):
            node.target = f"{name}_{content[:_DIGITS]}"
            gm.__dict__[node.target] = value
    for name in [name for name, value in vars(gm).items() if isinstance(value, torch.Tensor)]:
        if not gm.graph.find_nodes(op="get_attr", target=name):
            del gm.__dict__[name]


_DIGITS = 32
