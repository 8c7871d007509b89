"""The table of kernels, docs/kernels.md, made from what the kernels say of themselves."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from attnrewrite.ir.nodes import dtype_name
from attnrewrite.kernels import Kernel
from attnrewrite.kernels.common.limits import Limits
from attnrewrite.kernels.common.packages import Package
from attnrewrite.selection.cost_table import families_with

__all__ = ["kernel_table"]

_HEADER = """# Kernels

Made by `tests/support/kernel_table.py`; a test compares it with the kernels. A kernel that is asked for
something beyond its limits refuses, and says which limit; nothing is dropped. Names are those of diffusers' attention
dispatcher, where it has one. A kernel of your own: [own_kernel.md](own_kernel.md).

- *masks*: the most general mask beside causality and windows. *key padding*: keys of a batch entry that no query
  attends; *boolean*: any; *additive*: numbers, *learned* if they can have a gradient. Each includes those before it.
  Rows that may lose every key get what the source gives them, or the site is refused.
- *causal*, *window*: what can be asked for without a mask, and where it counts from: *first* (query 0 stands beside
  key 0), *last* (the last query beside the last key), *square* (only where the two are the same). A kernel that takes
  boolean masks takes any other as one.
- *chosen*: *automatic*; *automatic on* the devices where it was measured (`sm_90` is NVIDIA's Hopper), if the package
  is installed; or *by name* only: `options={'kernels': ...}`. Those that compute in fewer bits than their operands have
  serve within `options={'tolerance': ...}`, too, unless they are fetched over a network.
- *state*: the hardware that it was run on, or the version of the vendor's published signature that its call was held
  against, without the vendor's code having been run.
"""

_COLUMNS = (
    "kernel",
    "package",
    "dtypes",
    "head sizes",
    "GPU",
    "masks",
    "causal",
    "window",
    "soft cap",
    "dropout",
    "GQA",
    "backward",
    "CUDA graphs",
    "chosen",
    "state",
)

_FIELDS = {
    "devices": "devices",
    "dtypes": "dtypes",
    "heads": "head sizes",
    "heads_by_major": "head sizes by compute capability",
    "value_heads": "value head size",
    "min_capability": "oldest GPU",
    "max_capability": "newest GPU",
    "capabilities": "GPUs",
    "masks": "masks",
    "mask_gradient": "learned masks",
    "alignments": "causal",
    "window": "window",
    "softcap": "soft cap",
    "dropout": "dropout",
    "softcap_with_dropout": "dropout beside a soft cap",
    "any_scale": "scale",
    "grouped": "GQA",
    "key_multiple": "number of keys",
    "backward": "backward",
    "deterministic": "deterministic backward",
    "cuda_graphs": "CUDA graphs",
    "symbolic": "symbolic sizes",
    "minimum_version": "oldest version",
}
"""The fields of ``Limits`` in words."""

_LINK = re.compile(r"(https?://[^\s#]+(?:#(?!L\d)[^\s:]+)?)(?<!:)[:,]?\s*(.*)")
"""A source that begins with a file or a page, and what stands there: a line, a function, words."""


def kernel_table(kernels: Iterable[Kernel]) -> str:
    """docs/kernels.md for ``kernels``."""
    kernels = list(kernels)
    rows = [_row(kernel) for kernel in kernels]
    lines = [_HEADER, _line(_COLUMNS), _line(["---"] * len(_COLUMNS)), *map(_line, rows)]
    lines += ["", "## How to get them, further limits, and where each limit comes from"]
    for place, kernel in enumerate(kernels):
        lines += _details(kernel, kernels[:place])
    return "\n".join(lines) + "\n"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _row(kernel: Kernel) -> list[str]:
    known = [""] * 11 if kernel.limits is None else _cells(kernel.limits)
    return [f"[`{kernel.name}`](#{kernel.name})", _package(kernel), *known, _chosen(kernel), _state(kernel)]


def _cells(limits: Limits) -> list[str]:
    heads = str(limits.heads)
    if limits.heads.only and len(limits.heads.only) > 4:
        heads = f"{limits.heads.only[0]} to {limits.heads.only[-1]}, see below"
    return [
        ", ".join(dtype_name(dtype) for dtype in limits.dtypes),
        heads,
        limits.capability_in_words() or "any",
        limits.masks + (", learned" if limits.mask_gradient else ""),
        ", ".join(limits.alignments) or "no",
        _yes(limits.window),
        _yes(limits.softcap),
        _yes(limits.dropout),
        _yes(limits.grouped),
        ("deterministic, if asked" if limits.deterministic else "yes") if limits.backward else "no",
        _yes(limits.cuda_graphs),
    ]


def _details(kernel: Kernel, before: Sequence[Kernel]) -> list[str]:
    lines = ["", f"### {kernel.name}", ""]
    for words, text in (("To get it", kernel.needs), ("Code", kernel.source)):
        lines += [f"- {words}: {text}"] if text else []
    if kernel.lower_precision:
        lines.append("- Computes in fewer bits than its operands have.")
    limits, older = kernel.limits, kernel.older
    if limits is None:
        return lines
    lines += _further(limits)
    if older is not None:
        lines.append(f"- Before version 2 ({older.minimum_version} is the oldest taken): {_differences(older, limits)}")
        lines += _grouped(_of_fields(_changed(older.sources, limits.sources)))
    like, shared = _like(limits, before)
    sources = _of_fields(_changed(limits.sources, shared))
    sources += [(rule.words, rule.source) for rule in limits.rules]
    if like is None:
        lines.append("- Sources:")
    elif sources:
        lines.append(f"- Sources: those of [`{like.name}`](#{like.name}), but for")
    else:
        lines.append(f"- Sources: those of [`{like.name}`](#{like.name})")
    return lines + _grouped(sources)


def _like(limits: Limits, before: Sequence[Kernel]) -> tuple[Kernel | None, Mapping[str, str]]:
    """The earlier kernel that shares most of these sources, and its own; None if none shares half of them."""

    def sources_of(kernel: Kernel) -> Mapping[str, str]:
        return {} if kernel.limits is None else kernel.limits.sources

    def shared(kernel: Kernel) -> int:
        # One with a source for what this kernel says nothing of would be quoted for it.
        if not set(sources_of(kernel)) <= set(limits.sources):
            return 0
        return sum(limits.sources[field] == text for field, text in sources_of(kernel).items())

    best = max(before, key=shared, default=None)
    if best is None or 2 * shared(best) < len(limits.sources):
        return None, {}
    return best, sources_of(best)


def _changed(sources: Mapping[str, str], others: Mapping[str, str]) -> dict[str, str]:
    return {field: text for field, text in sources.items() if others.get(field) != text}


def _of_fields(sources: Mapping[str, str]) -> list[tuple[str, str]]:
    return [(_FIELDS[field], text) for field, text in sources.items()]


def _grouped(sources: Sequence[tuple[str, str]]) -> list[str]:
    """A line for each file or page, and what it says of which limit; then what no page says."""
    pages: dict[str, dict[str, list[str]]] = {}
    unsourced: dict[str, list[str]] = {}
    for words, text in sources:
        link = _LINK.fullmatch(text)
        if link is None:
            unsourced.setdefault(text, []).append(words)
        else:
            pages.setdefault(link[1], {}).setdefault(link[2], []).append(words)
    lines = [
        f"  - {page}: {'; '.join(', '.join(words) + _in_brackets(place) for place, words in rest.items())}"
        for page, rest in pages.items()
    ]
    return lines + [f"  - {', '.join(words)}: {text}" for text, words in unsourced.items()]


def _in_brackets(place: str) -> str:
    return f" {place}" if place.startswith("(") else f" ({place})" if place else ""


def _further(limits: Limits) -> list[str]:
    lines = [f"- Devices: {', '.join(limits.devices)}"]
    if limits.minimum_version:
        lines.append(f"- Oldest version: {limits.minimum_version}")
    if limits.heads.only and len(limits.heads.only) > 4:
        lines.append(f"- Head sizes: {limits.heads}")
    majors: dict[str, list[str]] = {}
    for major, heads in limits.heads_by_major.items():
        majors.setdefault(str(heads), []).append(str(major))
    lines += [f"- Head sizes on compute capability {' and '.join(own)}: {heads}" for heads, own in majors.items()]
    lines.append(f"- Value head size: {limits.value_heads or 'as the query'}")
    if limits.key_multiple > 1:
        lines.append(f"- Keys: a number that is known to be a multiple of {limits.key_multiple}")
    if not limits.any_scale:
        lines.append("- Scale: one over the root of the head size only")
    if not limits.symbolic:
        lines.append("- No symbolic sizes")
    return lines + [f"- {rule.words[0].upper()}{rule.words[1:]}" for rule in limits.rules]


def _differences(older: Limits, newer: Limits) -> str:
    names = dict(zip(_COLUMNS[2:13], zip(_cells(older), _cells(newer), strict=True), strict=True))
    words = [f"{name} {old}" for name, (old, new) in names.items() if old != new]
    if older.key_multiple > 1:
        words.append(f"a number of keys that is known to be a multiple of {older.key_multiple}")
    return "; ".join(words)


def _package(kernel: Kernel) -> str:
    if kernel.vendor is None:
        return "torch"
    return kernel.vendor.distribution if isinstance(kernel.vendor, Package) else kernel.vendor.module


def _chosen(kernel: Kernel) -> str:
    if kernel.automatic:
        return "automatic"
    families = [] if kernel.lower_precision else families_with(kernel.name)
    return f"automatic on {', '.join(families)}" if families else "by name"


def _state(kernel: Kernel) -> str:
    if kernel.run_on:
        return f"*run on real hardware* ({kernel.run_on})"
    return f"*call proved against the published signature* ({kernel.proved})" if kernel.proved else ""


def _yes(value: bool) -> str:
    return "yes" if value else "no"
