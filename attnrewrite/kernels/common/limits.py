"""What a kernel cannot do, as data: each limit with its source, and the sentence that refuses a site.

What a vendor does not state is refused, and not tried.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch.fx.experimental.symbolic_shapes import statically_known_true

from attnrewrite.ir.axes import Axis, size_of
from attnrewrite.ir.nodes import Size, dtype_name, same
from attnrewrite.ir.site import Band, Bias, CanonicalAttention, Reach
from attnrewrite.kernels.common.keep_mask import MaskKind, mask_kind, why_rows_are_not_restored
from attnrewrite.kernels.common.verdict import Refusal

__all__ = ["Asked", "Capability", "HeadSizes", "LimitRule", "Limits", "capability_of", "platform_of"]

Capability = tuple[int, int]
"""A CUDA compute capability, (major, minor)."""

HALF = (torch.bfloat16, torch.float16)

_ATTENDED = "(if none occurs, say so: options={'assume_attended_rows': True})"


def platform_of(device: torch.device) -> str:
    """The device's type, with AMD's GPUs told apart: PyTorch calls them "cuda", too."""
    return "rocm" if device.type == "cuda" and torch.version.hip else device.type


def capability_of(device: torch.device) -> Capability | None:
    """The compute capability of an NVIDIA GPU; None for any other device, or where there is none to ask."""
    if platform_of(device) != "cuda" or not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_capability(device)


@dataclass(frozen=True)
class HeadSizes:
    """The head sizes that a kernel takes: multiples from ``smallest`` to ``largest``, or ``only`` those listed."""

    multiple_of: int = 1
    largest: int | None = None
    smallest: int = 1
    only: tuple[int, ...] = ()

    def refusal(self, size: Size, what: str = "head size") -> Refusal:
        if not isinstance(size, int):
            return f"the {what} is symbolic, and must be a number"
        if self.only:
            fits = size in self.only
        else:
            above = self.largest is not None and size > self.largest
            fits = size >= self.smallest and not above and size % self.multiple_of == 0
        return None if fits else f"takes a {what} of {self}, not {size}"

    def __str__(self) -> str:
        if self.only:
            return ", ".join(map(str, self.only))
        words = []
        if self.multiple_of > 1:
            words.append(f"a multiple of {self.multiple_of}")
        elif self.smallest > 1:
            words.append(f"at least {self.smallest}")
        if self.largest is not None:
            words.append(f"up to {self.largest}")
        return " ".join(words) or "any"


@dataclass(frozen=True)
class LimitRule:
    """A limit that no field can say.

    Attributes:
        words: the limit, for the table.
        refusal: the sentence for a site that it forbids, else None. None in its place: PyTorch's own check refuses.
        source: where the vendor states it.
    """

    words: str
    refusal: Callable[[CanonicalAttention, Asked, Capability | None], Refusal] | None
    source: str


@dataclass(frozen=True)
class Asked:
    """What a site asks of a kernel beside its tensors.

    Attributes:
        left, right: how many positions before and after its own a query attends, both included; -1 for no bound.
        from_last: the last query stands beside the last key; else the first beside the first.
        mask: which kind of tensor says what the two bounds do not.
        restores_rows: rows without a key can come, and get what the source gives them: see ``keep_mask.py``.
    """

    left: int = -1
    right: int = -1
    from_last: bool = False
    mask: MaskKind = "none"
    restores_rows: bool = False

    @property
    def is_causal(self) -> bool:
        return (self.left, self.right) == (-1, 0)

    @property
    def is_bounded(self) -> bool:
        return (self.left, self.right) != (-1, -1)


_KINDS: tuple[MaskKind, ...] = ("none", "key padding", "boolean", "additive")


@dataclass(frozen=True)
class Limits:
    """The limits of one version of a kernel.

    Attributes:
        devices: "cuda" (NVIDIA), "rocm", "npu", "xla".
        dtypes: of query, key and value. No source is computed in a lower one than its own.
        heads: the head sizes of query and key.
        heads_by_major: other ones on GPUs of a major compute capability.
        value_heads: the head sizes of the value; None if it must be the query's.
        min_capability, max_capability: of NVIDIA GPUs, both included.
        capabilities: if not empty, only these.
        masks: the most general mask beside causality and window: "none", "key padding" (keys of a batch entry, the
            same for all its queries), "boolean", "additive". The later ones include those before.
        mask_gradient: what is added can have a gradient.
        alignments: where causal masks and windows count from: "first" (the first query stands beside the first key),
            "last" (the last beside the last), "square" (only where both are the same). Empty: no causal mask.
        window: a bound on either side, other than causal.
        softcap: ``softcap * tanh(scores / softcap)``.
        dropout: of the attention weights.
        softcap_with_dropout: both in one call.
        any_scale: any scale; else only one over the root of the head size.
        grouped: key and value may have fewer heads than the query.
        key_multiple: the number of keys must be known to be a multiple of this.
        backward: the package has a backward pass.
        deterministic: its backward pass can be made deterministic.
        cuda_graphs: can be captured into one.
        symbolic: sizes other than the head's may be symbols.
        minimum_version: of the package; empty for any.
        rules: what no field above can say.
        sources: for each field, the line or the page that states it.
    """

    devices: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]
    heads: HeadSizes
    heads_by_major: Mapping[int, HeadSizes] = field(default_factory=dict)
    value_heads: HeadSizes | None = None
    min_capability: Capability | None = None
    max_capability: Capability | None = None
    capabilities: tuple[Capability, ...] = ()
    masks: MaskKind = "none"
    mask_gradient: bool = False
    alignments: tuple[str, ...] = ()
    window: bool = False
    softcap: bool = False
    dropout: bool = False
    softcap_with_dropout: bool = False
    any_scale: bool = True
    grouped: bool = False
    key_multiple: int = 1
    backward: bool = False
    deterministic: bool = False
    cuda_graphs: bool = True
    symbolic: bool = True
    minimum_version: str = ""
    rules: tuple[LimitRule, ...] = ()
    sources: Mapping[str, str] = field(default_factory=dict)

    def device_refusal(self, site: CanonicalAttention) -> Refusal:
        """Whether the site is on another kind of device; needs no package and asks no driver."""
        platform = platform_of(site.device)
        return None if platform in self.devices else f"runs on {', '.join(self.devices)}, not on {platform}"

    def refusal(self, site: CanonicalAttention, capability: Capability | None) -> Refusal:
        """The first limit that the site is beyond, as a sentence; None if there is none.

        Args:
            capability: of the GPU that the site is on; None if it is none of NVIDIA's, or not known.
        """
        return (
            self.device_refusal(site)
            or self._capability_refusal(site, capability)
            or self._operand_refusal(site, capability)
            or self._scores_refusal(site)
            or self._training_refusal(site)
            or self._rule_refusal(site, capability)
        )

    def machine_refusal(self, site: CanonicalAttention, capability: Capability | None) -> Refusal:
        """The first limit of hardware, dtype or head size that the site is beyond, whatever its scores are."""
        return (
            self.device_refusal(site)
            or self._capability_refusal(site, capability)
            or self._dtype_refusal(site)
            or self._head_refusal(site, capability)
        )

    def rule_refusal(self, site: CanonicalAttention, asked: Asked, capability: Capability | None) -> Refusal:
        refusals = (rule.refusal(site, asked, capability) for rule in self.rules if rule.refusal)
        return next((refusal for refusal in refusals if refusal), None)

    def asked(self, site: CanonicalAttention) -> Asked | str:
        """What the kernel is asked for in place of the site's mask, or why it cannot be."""
        scores = site.scores
        if site.is_causal and scores.terms:
            return "the call has a mask and is_causal, and only PyTorch's own kernels know what both together mean"
        reach = self._reach(scores.band, site) if scores.band is not None else None
        if isinstance(reach, Asked):
            return reach
        if scores.is_causal and reach is None:
            return "a causal mask whose position is symbolic"
        if not scores.terms:
            return reach or Asked()
        mask = self._mask(site)
        # That it is a band says more than that it is a mask.
        return reach if reach is not None and isinstance(mask, str) else mask

    def _mask(self, site: CanonicalAttention) -> Asked | str:
        scores = site.scores
        kind = mask_kind(site)
        if _KINDS.index(kind) > _KINDS.index(self.masks):
            takes = {
                "none": "no mask",
                "key padding": "no mask but key padding",
                "boolean": "no mask but a boolean one",
            }
            return f"takes {takes[self.masks]}, and this site has {_mask_in_words(kind)} ({_structure(site)})"
        if kind == "additive":
            for term in scores.terms:
                if isinstance(term, Bias) and term.dtype.itemsize > site.compute_dtype.itemsize:
                    wide, narrow = dtype_name(term.dtype), dtype_name(site.compute_dtype)
                    return f"a bias is added in {wide}, and would be rounded to {narrow}"
            if site.differentiable and not self.mask_gradient:
                return "gives no gradient for an additive mask"
        if not scores.masked_rows.may_occur:
            return Asked(mask=kind)
        refusal = why_rows_are_not_restored(site, kind)
        return Asked(mask=kind, restores_rows=True) if refusal is None else f"{refusal} {_ATTENDED}"

    def _reach(self, band: Band, site: CanonicalAttention) -> Asked | str:
        square = band.from_first is not None and band.from_first == band.from_last
        counted: list[tuple[Reach | None, bool]] = []
        if "square" in self.alignments and square:
            counted.append((band.from_first, False))
        if "first" in self.alignments:
            counted.append((band.from_first, False))
        if "last" in self.alignments:
            counted.append((band.from_last, True))
        for reach, from_last in counted:
            if reach is None:
                continue
            left, right = reach
            # -1 is no bound in every vendor's call, so that a reach that ends before the query cannot be said.
            if any(bound is not None and bound < 0 for bound in reach):
                continue
            if from_last and right is not None and _dropped(right, site):
                continue
            if self.window or reach in ((None, 0), (None, None)):
                return Asked(-1 if left is None else left, -1 if right is None else right, from_last)
        if not self.alignments:
            return "takes no causal mask and no window"
        causal = (None, 0) in (band.from_first, band.from_last)
        if not self.window and not causal:
            return "takes no window other than causal"
        if self.alignments == ("square",):
            return "takes a causal mask only where there are as many keys as queries, which is not known here"
        where = {"first": "the first query and key", "last": "the last query and key", "square": "both ends"}
        counts = " or ".join(where[name] for name in self.alignments)
        return f"counts causal masks and windows from {counts}, and this mask is not known to begin there"

    def _capability_refusal(self, site: CanonicalAttention, capability: Capability | None) -> Refusal:
        if not (self.min_capability or self.max_capability or self.capabilities) or platform_of(site.device) != "cuda":
            return None
        wanted = self.capability_in_words()
        if capability is None:
            return f"needs a GPU of compute capability {wanted}, and that of this device is unknown"
        own = ".".join(map(str, capability))
        low = self.min_capability is not None and capability < self.min_capability
        high = self.max_capability is not None and capability > self.max_capability
        listed = not self.capabilities or capability in self.capabilities
        return f"needs a GPU of compute capability {wanted}, not {own}" if low or high or not listed else None

    def capability_in_words(self) -> str:
        """ "8.0 to 9.0", "9.0 or later", a list; empty if any will do."""
        low, high = (".".join(map(str, bound)) if bound else "" for bound in (self.min_capability, self.max_capability))
        if self.capabilities:
            return ", ".join(".".join(map(str, one)) for one in self.capabilities)
        if low == high:
            return low
        return f"{low} to {high}" if low and high else f"{low} or later" if low else f"up to {high}"

    def _dtype_refusal(self, site: CanonicalAttention) -> Refusal:
        if site.compute_dtype in self.dtypes:
            return None
        return f"takes {', '.join(map(dtype_name, self.dtypes))}, not {dtype_name(site.compute_dtype)}"

    def _head_refusal(self, site: CanonicalAttention, capability: Capability | None) -> Refusal:
        heads = self.heads_by_major.get(capability[0], self.heads) if capability else self.heads
        size, value_size = size_of(site.feature_axes), size_of(site.value_axes)
        refusal = heads.refusal(size)
        if refusal:
            return refusal
        if self.value_heads is not None:
            return self.value_heads.refusal(value_size, "value head size")
        if not same(size, value_size):
            return f"takes values of the query's head size, {size}, not {value_size}"
        return None

    def _operand_refusal(self, site: CanonicalAttention, capability: Capability | None) -> Refusal:
        refusal = self._dtype_refusal(site) or self._head_refusal(site, capability)
        if refusal:
            return refusal
        if any(same(axis.size, 0) for axis in _axes(site)):
            return "an operand is empty"
        if not self.symbolic and not all(isinstance(axis.size, int) for axis in _axes(site)):
            return "takes no symbolic sizes (compile with dynamic=False)"
        keys = size_of(site.key_axes)
        if self.key_multiple > 1 and not same(keys % self.key_multiple, 0):
            return (
                f"is right only where the number of keys is known to be a multiple of {self.key_multiple}, not {keys}"
            )
        if site.group_axes and not self.grouped:
            return "needs as many key heads as query heads"
        return None

    def _scores_refusal(self, site: CanonicalAttention) -> Refusal:
        scores = site.scores
        if scores.inexpressible and scores.softcap is None:
            return scores.inexpressible
        if scores.softcap is not None and not self.softcap:
            return f"has no soft cap: {scores.inexpressible}"
        if scores.scale is not None and scores.scale <= 0:
            return f"takes a positive scale, not {scores.scale:g}"
        if any(isinstance(scale.factor, (int, float)) and scale.factor == 0 for scale in scores.query_factors):
            return "takes a positive scale, not 0"
        if not self.any_scale:
            width = size_of(site.feature_axes)
            assert isinstance(width, int)
            if scores.scale is not None and not math.isclose(scores.scale, width**-0.5, rel_tol=1e-6):
                return f"scales by one over the root of the head size, and this site by {scores.scale:g}"
        if site.sink is not None:
            return "takes no sink"
        if site.dropout and not self.dropout:
            return "has no dropout of the attention weights"
        if site.dropout and scores.softcap is not None and not self.softcap_with_dropout:
            return "has no dropout beside a soft cap"
        asked = self.asked(site)
        if isinstance(asked, str):
            return asked
        # A row can lose its keys to a mask only; what else could come of it is not known here.
        if scores.masked_rows.may_occur and not asked.restores_rows:
            return f"a row may have no key, and what this kernel gives it is not known {_ATTENDED}"
        return None

    def _training_refusal(self, site: CanonicalAttention) -> Refusal:
        if not site.differentiable:
            return None
        if not self.backward:
            return "has no backward pass (run it under torch.no_grad())"
        if not self.deterministic and torch.are_deterministic_algorithms_enabled():
            return "has no deterministic backward pass, and torch.use_deterministic_algorithms asks for one"
        return None

    def _rule_refusal(self, site: CanonicalAttention, capability: Capability | None) -> Refusal:
        asked = self.asked(site)
        assert isinstance(asked, Asked)
        return self.rule_refusal(site, asked, capability)


def _dropped(right: int, site: CanonicalAttention) -> bool:
    """Whether kernels that count from the last key may take a bound for none: they do where it is the keys or more.

    With more queries than keys the first queries stand before the first key, and the bound still holds for them.
    https://github.com/Dao-AILab/flash-attention/blob/v2.8.3/csrc/flash_attn/flash_api.cpp: window_size_right = -1
    """
    queries, keys = size_of(site.query_axes), size_of(site.key_axes)
    return not (statically_known_true(right < keys) or statically_known_true(queries <= keys))


def _axes(site: CanonicalAttention) -> tuple[Axis, ...]:
    return tuple(dict.fromkeys((*site.query.axes, *site.key.axes, *site.value.axes)))


def _mask_in_words(kind: MaskKind) -> str:
    words = {"boolean": "one over query and key positions", "additive": "numbers that are added to the scores"}
    return words.get(kind, "a key padding mask")


def _structure(site: CanonicalAttention) -> str:
    return " + ".join(site.scores.structure) or "bias"
