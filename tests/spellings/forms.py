"""The forms that a spelling of attention is composed of, each as the lines of Python that people write.

A :class:`Draft` grows by one form after another: layout, grouping, products, scale, what is done to the scores,
softmax, what is done to the weights. Sizes are named by letters: ``i`` query positions, ``j`` key positions, ``d`` and
``e`` the features of keys and values; the others (``b``, ``h``, ``g``, ``r``, ``x``, ``y``, and ``n`` for several in
one) are batches and heads. A tensor's dimensions are a list of letters; "1" is a dimension of size one. All that comes
out is source text, so what fails can be read and run.
"""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

__all__ = ["Draft", "Pick", "Spelling"]

T = TypeVar("T")
Letters = list[str]
Open = Callable[[Tensor, Tensor, int], Tensor]
"""Which keys are kept, of (positions of the queries, positions of the keys, how many more keys there are)."""

HALF = (torch.bfloat16, torch.float16)
_LETTERS = "abcdefghijklmnopqrstuvwxyz"


class Pick(Protocol):
    """Where the choices come from."""

    def one(self, *options: T) -> T: ...

    def chance(self, percent: int) -> bool: ...


@dataclass(frozen=True, repr=False)
class Spelling:
    """One attention as source text.

    Attributes:
        text: a module with ``attend(...)`` and ``inputs(seed, more)``, whose sequences are longer by ``more``.
        forms: what it is composed of.
        lengths: whether sequences of another length are valid inputs.
        sites: how many attentions the report should name.
        refusal: the documented reason why it may stay as it is; empty if it should be rewritten.
        stays: the twist for which it must stay as it is; empty for an attention.
    """

    text: str
    forms: tuple[str, ...]
    dtype: torch.dtype
    dynamic: bool
    gradients: bool
    lengths: bool
    sites: int
    refusal: str = ""
    stays: str = ""

    @property
    def rewritable(self) -> bool:
        return not self.refusal and not self.stays

    def script(self) -> str:
        """A program that shows what eager gives and what the rewritten attention gives."""
        return f"{self.text}\n\n{_SCRIPT.format(self=self, forms=', '.join(self.forms))}"

    def __repr__(self) -> str:
        return f"\n{textwrap.indent(self.script(), '    ')}"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        # Hypothesis would print the fields, the text as one line.
        printer.text(repr(self))


_SCRIPT = """# {forms}
if __name__ == "__main__":
    from tests.support.helpers import rewritten, rows
    from tests.support.against_eager import prepared

    gradients = {self.gradients}
    dtype = {self.dtype}

    with torch.set_grad_enabled(gradients):
        for row in rows(attend, *prepared(inputs(0), dtype, gradients), dynamic={self.dynamic} or None):
            print(row.status, row.kernel, row.reason)
        new = rewritten(attend, dynamic={self.dynamic} or None)
        for seed in (0, 1):
            print("float64  ", attend(*prepared(inputs(seed), torch.float64, gradients)))
            print("eager    ", attend(*prepared(inputs(seed), dtype, gradients)))
            print("rewritten", new(*prepared(inputs(seed), dtype, gradients)))
"""

_HEAD = """import math

import torch
import torch.nn.functional as F
from torch import nn


def attend({names}):
"""


class Draft:
    """A spelling in the making.

    Attributes:
        q, k, v: the letters of the operands as they stand.
        frame: the letters of the scores, then of the weights.
        out: the letters of the result.
        terms: what was done to the scores so far, as (kind, value).
        masks: boolean masks that were applied, as (what is kept, what is dropped).
        opens: of each of them, which keys it keeps; None where that is up to the inputs.
        sunk: every row has one more key, that no mask reaches.
        underflows: exponentials are taken of the scores themselves.
        multiplied: the weights were multiplied by numbers that may be infinite or NaN.
    """

    def __init__(self, pick: Pick, dtype: torch.dtype, gradients: bool, dynamic: bool) -> None:
        self.pick = pick
        self.dtype, self.gradients, self.dynamic = dtype, gradients, dynamic
        self.half = dtype in HALF
        self.sizes: dict[str, int] = {}
        self.forms: list[str] = []
        self.names: list[str] = []
        self.draws: list[str] = []
        self.body: list[str] = []
        self.depth = 1
        self.marker = 0
        self.lengths = dynamic
        self.sites = 1
        self.refusals: list[str] = []
        self.stays = ""
        self.terms: list[tuple[str, str]] = []
        self.masks: list[tuple[str, str]] = []
        self.opens: list[Open | None] = []
        self.sunk = False
        self.underflows = False
        self.multiplied = False
        self.q: Letters = []
        self.k: Letters = []
        self.v: Letters = []
        self.frame: Letters = []
        self.out: Letters = []
        self.query, self.key, self.value = "q", "k", "v"
        self.in_chunk = False
        self.in_loop = False
        self.refold: Letters | None = None
        self.empty = False
        self.alpha = ""
        self.late = ""
        self.undo: list[Callable[[], None]] = []
        self.returns = "o"
        self.positions: set[str] = set()

    # The text.

    def line(self, text: str) -> None:
        self.body.append("    " * self.depth + text)

    def form(self, name: str) -> None:
        self.forms.append(name)

    def refuse(self, reason: str) -> None:
        self.refusals.append(reason)

    def size(self, letter: str) -> str:
        """A size in the text of ``attend``."""
        if letter == "i":
            return "(hi - lo)" if self.in_chunk else "L"
        return {"j": "S", "b": "b", "n": "n"}.get(letter) or str(self.sizes.get(letter, 1))

    def shape(self, letters: Sequence[str]) -> str:
        return ", ".join("1" if letter == "1" else self.size(letter) for letter in letters)

    def given(self, name: str, letters: Sequence[str], how: str, std: float = 1.0) -> str:
        """One more input; ``how`` is normal, parameter, keep, padding, keep_int, keep_float or additive."""
        self.names.append(name)
        sizes = [self._drawn(token) for token in letters]
        shape = f"({', '.join(sizes)}{',' * (len(sizes) == 1)})"
        if how in ("normal", "parameter"):
            value = f"{std:g} * torch.randn({shape}, generator=g)"
            self.draws.append(f"{name} = nn.Parameter({value})" if how == "parameter" else f"{name} = {value}")
            return name
        self.draws.append(f"{name} = torch.rand({shape}, generator=g) < 0.7")
        if "j" in letters:
            self.draws.append(f"{name}[{', '.join('0' if token == 'j' else ':' for token in letters)}] = True")
            if self.empty:
                self.draws.append(f"{name}[{', '.join(':' if token == 'j' else '-1' for token in letters)}] = False")
        convert = {
            "keep": "",
            "padding": f"~{name}",
            "keep_int": f"{name}.long()",
            "keep_float": f"{name}.float()",
            "additive": f"torch.zeros({shape}).masked_fill(~{name}, -math.inf)",
        }[how]
        if convert:
            self.draws.append(f"{name} = {convert}")
        return name

    def _drawn(self, token: str) -> str:
        if token == "1":
            return "1"
        if token in ("i", "j"):
            return f"{self.sizes[token]} + more" if self.lengths else str(self.sizes[token])
        return str(math.prod(int(part) if part.isdigit() else self.sizes[part] for part in token.split("*")))

    def fresh(self, stem: str) -> str:
        return f"{stem}{sum(name.startswith(stem) for name in self.names)}"

    def text(self) -> str:
        body = list(self.body)
        used = "\n".join(body)
        known = {
            "b": ("q", self._letters_at_start[0], "b"),
            "n": ("q", self._letters_at_start[0], "n"),
            "L": ("q", self._letters_at_start[0], "i"),
            "S": ("k", self._letters_at_start[1], "j"),
        }
        lines = [
            f"    {name} = {tensor}.shape[{letters.index(letter)}]"
            for name, (tensor, letters, letter) in known.items()
            if letter in letters and re.search(rf"(?<![\w.]){name}\b(?! =)", used)
        ]
        body[self.marker : self.marker] = lines
        head = _HEAD.format(names=", ".join(self.names))
        draws = "\n".join(f"    {line}" for line in self.draws)
        return (
            f"{head}" + "\n".join(body) + "\n\n\ndef inputs(seed, more=0):\n"
            f"    g = torch.Generator().manual_seed(seed)\n{draws}\n    return {', '.join(self.names)},\n"
        )

    _letters_at_start: tuple[Letters, Letters] = ([], [])

    def mark(self) -> None:
        """Sizes are read off the operands here, where the text after this needs them."""
        self.marker = len(self.body)
        self._letters_at_start = (list(self.q), list(self.k))

    def spelling(self) -> Spelling:
        self._refusals_of_terms()
        return Spelling(
            text=self.text(),
            forms=tuple(self.forms),
            dtype=self.dtype,
            dynamic=self.dynamic,
            gradients=self.gradients,
            lengths=self.lengths,
            sites=self.sites,
            refusal="; ".join(dict.fromkeys(self.refusals)),
            stays=self.stays,
        )

    def _refusals_of_terms(self) -> None:
        """The documented reasons for which an attention may stay as it is; what they say is in docs/exactness.md."""
        terms = self._terms_as_they_stand()
        fills = [value for kind, value in terms if kind == "fill"]
        biases = [value for kind, value in terms if kind == "bias"]
        masking = [value for value in biases if value != "learned"]
        empty = self._rows_may_be_empty()
        needs_function = bool({"cap", "clamp"} & {kind for kind, _ in terms} or "low" in fills)
        for position, (kind, value) in enumerate(terms):
            rest = [other for other, _ in terms[position:]]
            if kind == "fill" and value.startswith("-1e9") and empty:
                beside = len(fills) + sum(value != "any" for value in masking) > 1
                needs_function |= beside or "bias" in rest
            if (kind == "fill" or (kind == "bias" and value != "learned")) and {"cap", "clamp"} & set(rest):
                self.refuse("a mask that is capped")
            if kind == "max" and {"cap", "clamp"} & set(rest):
                self.refuse("the maximum is subtracted before the scores are capped")
            added = any(other == "bias" and name != "learned" for other, name in terms[:position])
            if kind == "floor" and added and self.gradients and empty:
                self.refuse("a floor under a mask that is added, in training")
        if needs_function and (self.gradients or self.dtype is torch.float64):
            self.refuse("a function of the scores: FlexAttention on the CPU has no backward pass and no float64")
        finite = any(value != "-inf" for value in (*fills, *masking))
        if "softmax: logsumexp" in self.forms and empty and finite and (self.gradients or needs_function):
            self.refuse("the logarithm of the sum is rounded away in rows that finite numbers mask")
        if self.gradients and empty and self._entangled(terms):
            self.refuse("a fill beside another mask, in training")
        if self.gradients and empty and biases and "nan_to_num" in self.forms:
            self.refuse("NaN is replaced where a mask was added, in training")
        if "weights zeroed" in self.forms and empty and len(fills) + len(masking) > 1:
            # A row that all of them mask together keeps the weights that this one does not mask.
            self.refuse("the weights are zeroed by one of several masks")

    def _terms_as_they_stand(self) -> list[tuple[str, str]]:
        """The terms with what the fills have become at the end: scaled, raised by a floor, or as good as infinite."""
        terms: list[tuple[str, str]] = []
        for kind, value in self.terms:
            if kind == "floor":
                terms = [(k, "min" if k == "fill" and v == "-inf" else v) for k, v in terms]
            elif kind == "scale":
                overflows = value in ("s / 0.7", "s * 1.5")
                scaled = {"min": "-inf" if overflows else "min, scaled", "-1e9": "-1e9, scaled"}
                terms = [(k, scaled.get(v, v) if k == "fill" else v) for k, v in terms]
            terms.append((kind, value))
        if self.underflows:
            terms = [(k, "-inf" if k == "fill" and v != "low" else v) for k, v in terms]
        return terms

    @staticmethod
    def _entangled(terms: Sequence[tuple[str, str]]) -> bool:
        """Whether a row may lose its keys to a fill, that lets no gradient through, together with another term."""
        fills = [position for position, (kind, _) in enumerate(terms) if kind == "fill"]
        biases = [position for position, (kind, _) in enumerate(terms) if kind == "bias"]
        if not fills:
            return False
        several = len({terms[fill] for fill in fills}) > 1 or any(terms[bias][1] != "learned" for bias in biases)
        infinite = terms[fills[0]][1] == "-inf"
        return several or any(fills[0] < bias and (bias < fills[-1] or infinite) for bias in biases)

    def _rows_may_be_empty(self) -> bool:
        """Whether a row may have no key, for all that the text says: what is learned may be infinite, too."""
        if self.sunk or not self.terms:
            return False
        if {value for kind, value in self.terms if kind == "bias"} & {"learned", "any"}:
            return True
        sizes = [(self.sizes["i"], self.sizes["j"])]
        if self.dynamic and not {"packed", "projected"} & set(self.forms):
            sizes.append((9, 2))
        for queries, keys in sizes:
            kept = torch.ones(queries, keys, dtype=torch.bool)
            for is_open in self.opens:
                if is_open is None:
                    return True
                kept &= is_open(torch.arange(queries)[:, None], torch.arange(keys), keys - queries)
            if not bool(kept.any(-1).all()):
                return True
        return False

    # Operands: layout and grouping.

    def standard(self, letters: Letters) -> bool:
        return letters[-1:] == ["d"] and letters[-2:-1] in (["i"], ["j"])

    def transposed(self, name: str, rank: int) -> str:
        ways = [f"{name}.mT", f"{name}.transpose(-2, -1)", f"{name}.transpose(-1, -2)"]
        if re.fullmatch(r"\w+", name):
            ways.append(f"{name}.transpose({rank - 2}, {rank - 1})")
            ways.append(f"{name}.permute({', '.join(map(str, [*range(rank - 2), rank - 1, rank - 2]))})")
        return self.pick.one(*ways)

    def operands(self, std: float) -> None:
        """The inputs q, k and v, brought into (batch..., length, features) or left as they are for einsum."""
        batch = self.pick.one(*[["b", "h"]] * 8, ["n"], ["n"], ["b"], ["h"], [], ["b", "x", "h"], ["b", "x", "y", "h"])
        if self.dynamic:  # Symbolic sizes of six dimensions take seconds.
            batch = batch[:2]
        if batch == ["b", "h"]:
            self._heads(std)
        elif self.pick.chance(15) and batch:
            self._broadcast_operands(batch, std)
        else:
            self.form(f"{len(batch) + 2}-D operands")
            self._plain(batch, batch, std)
        if len(self.q) >= 4 and self.same_batch() and self.standard(self.q) and self.pick.chance(20):
            self._fold()

    def same_batch(self) -> bool:
        return self.q[:-2] == self.k[:-2] == self.v[:-2]

    def _plain(self, batch: Letters, of_keys: Letters, std: float) -> None:
        self.q, self.k, self.v = [*batch, "i", "d"], [*of_keys, "j", "d"], [*of_keys, "j", "e"]
        self.given("q", self.q, "normal", std)
        if self.pick.chance(12):
            self.form("keys laid out for the product")
            self.k = [*of_keys, "d", "j"]
        self.given("k", self.k, "normal")
        self.given("v", self.v, "normal")
        self.mark()

    def _broadcast_operands(self, batch: Letters, std: float) -> None:
        one = self.pick.one(*range(len(batch)))
        of_keys = [letter if position != one else "1" for position, letter in enumerate(batch)]
        if self.pick.chance(50):
            of_keys = batch[one + 1 :]
        self.form("broadcast keys")
        self._plain(batch, of_keys, std)

    def _fold(self) -> None:
        self.form("batch folded with heads")
        was = list(self.q[:-2])
        self.sizes["n"] = math.prod(self.sizes[letter] for letter in was)
        whole = self.shape(was)
        way = self.pick.one("flatten", "reshape", "view")
        for name, letters in (("q", self.q), ("k", self.k), ("v", self.v)):
            if way == "flatten":
                self.line(f"{name} = {name}.flatten(0, {len(was) - 1})")
            elif way == "reshape":
                self.line(f"{name} = {name}.reshape(-1, {self.shape(letters[-2:])})")
            else:
                self.line(f"{name} = {name}.contiguous().view(-1, {self.shape(letters[-2:])})")
            letters[:-2] = ["n"]

        self.line("n = q.shape[0]")

        def unfold() -> None:
            if self.out[:1] != ["n"]:
                return
            rest = self.out[1:]
            if self.pick.chance(50):
                self.line(f"o = o.view({whole}, {self.shape(rest)})")
            else:
                self.line(f"o = o.unflatten(0, ({whole}))")
            self.out = [*was, *rest]

        self.undo.append(unfold)

    def _heads(self, std: float) -> None:
        grouping = self.pick.one(
            *["none"] * 9, "repeat_interleave", "expand", "tile", "groups", "groups", "multi", "einsum"
        )
        kv = "h"
        if grouping not in ("none", "multi"):
            self.sizes["g"], self.sizes["r"] = self.pick.one((1, 2), (2, 2), (2, 3), (3, 2))
            self.sizes["h"] = self.sizes["g"] * self.sizes["r"]
            kv = "g"
        layout = self.pick.one("BHLD", "BHLD", "BHLD", "BLHD", "LBHD", "merged", "packed", "projected")
        if grouping != "none" and layout in ("packed", "projected"):
            layout = "BLHD"
        self.form(layout)
        if grouping != "none":
            self.form({"multi": "multi-query"}.get(grouping, f"grouped by {grouping}"))
        if layout in ("packed", "projected"):
            self._packed(layout, std)
        elif grouping == "multi":
            self._multi_query(layout, std)
            return
        else:
            self._laid_out(layout, kv, std)
        if self.q[-2:] != ["i", "d"]:
            if kv == "g":
                self._regroup_for_einsum()
            return
        if kv == "g":
            self._group(grouping)

    def _laid_out(self, layout: str, kv: str, std: float) -> None:
        """Separate q, k and v with their heads somewhere."""
        orders = {
            "BHLD": ("b", "H", "l", "f"),
            "BLHD": ("b", "l", "H", "f"),
            "LBHD": ("l", "b", "H", "f"),
            "merged": ("b", "l", "H*f"),
        }[layout]
        cache = self.pick.chance(10) and not self.dynamic
        steps: list[str] = []
        heads_last = layout in ("BLHD", "LBHD") and self.pick.chance(40)
        for name, heads, length, features in (("q", "h", "i", "d"), ("k", kv, "j", "d"), ("v", kv, "j", "e")):
            swap = {"H": heads, "l": length, "f": features, "b": "b"}
            letters = ["*".join(swap[part] for part in token.split("*")) for token in orders]
            self.given(name, letters, "normal", std if name == "q" else 1.0)
            standard = ["b", heads, length, features]
            if layout == "BHLD" and name == "k" and not cache and kv == "h" and self.pick.chance(10):
                self.form("keys laid out for the product")
                self.draws[-1] += ".mT"
                standard = ["b", heads, "d", "j"]
            elif layout == "BLHD" and not heads_last:
                steps.append(f"{name} = {name}.{self.pick.one('transpose(1, 2)', 'permute(0, 2, 1, 3)')}")
            elif layout == "LBHD" and not heads_last:
                steps.append(f"{name} = {name}.permute(1, 2, 0, 3)")
            elif layout == "merged":
                h, f = self.sizes[heads], self.sizes[features]
                ways = (
                    f"view({name}.shape[0], -1, {h}, {f})",
                    f"unflatten(-1, ({h}, {f}))",
                    f"unflatten(2, (-1, {f}))",
                )
                steps.append(f"{name} = {name}.{self.pick.one(*ways)}.transpose(1, 2)")
            setattr(self, name, letters if heads_last else standard)
        for step in steps:
            self.line(step)
        if cache:
            self._cache(kv)
        self.mark()

    def _cache(self, kv: str) -> None:
        """Keys and values of earlier steps, put before the new ones."""
        self.form("cache")
        self.lengths = False
        for name, letters in (("k", self.k), ("v", self.v)):
            past = ["3" if letter == "j" else letter for letter in letters]
            self.given(f"past_{name}", past, "normal")
            where = letters.index("j")
            where = self.pick.one(where, where - len(letters))
            self.line(f"{name} = torch.cat([past_{name}, {name}], dim={where})")
        self.sizes["j"] += 3

    def _packed(self, layout: str, std: float) -> None:
        h, d = self.sizes["h"], self.sizes["d"]
        self.sizes["i"] = max(2, self.sizes["i"])
        self.sizes["j"], self.sizes["e"] = self.sizes["i"], d
        if layout == "packed":
            self.given("qkv", ["b", "i", "3*h*d"], "normal")
        else:
            self.given("x", ["b", "i", "h*d"], "normal")
            self.given("weight", ["3*h*d", "h*d"], "parameter", (h * d) ** -0.5)
            if self.pick.chance(50):
                self.given("bias", ["3*h*d"], "parameter", 0.2)
                self.line("qkv = F.linear(x, weight, bias)")
            else:
                self.line(self.pick.one("qkv = F.linear(x, weight)", "qkv = x @ weight.T"))
        if self.pick.chance(50):
            split = self.pick.one("qkv.chunk(3, dim=-1)", f"qkv.split({h * d}, dim=-1)")
            self.line(f"q, k, v = {split}")
            for name in "qkv":
                self.line(f"{name} = {name}.view({name}.shape[0], -1, {h}, {d}).transpose(1, 2)")
        else:
            self.line(f"qkv = qkv.reshape(qkv.shape[0], -1, 3, {h}, {d}).permute(2, 0, 3, 1, 4)")
            self.line(self.pick.one("q, k, v = qkv.unbind(0)", "q, k, v = qkv[0], qkv[1], qkv[2]", "q, k, v = qkv"))
        self.q, self.k, self.v = ["b", "h", "i", "d"], ["b", "h", "j", "d"], ["b", "h", "j", "d"]
        self.v[-1] = "e"
        self.mark()
        if std != 1.0:
            self.line(f"q = q * {std:g}")

    def _multi_query(self, layout: str, std: float) -> None:
        way = self.pick.one("einsum", "index", "ones")
        self.q = ["b", "h", "i", "d"]
        if layout == "BLHD":
            self.given("q", ["b", "i", "h", "d"], "normal", std)
            self.line("q = q.transpose(1, 2)")
        else:
            self.given("q", self.q, "normal", std)
        middle = ["1"] if way == "ones" else []
        for name, feature in (("k", "d"), ("v", "e")):
            letters = ["b", *middle, "j", feature]
            self.given(name, letters, "normal")
            if way == "index":
                self.line(f"{name} = {name}{self.pick.one('[:, None]', '.unsqueeze(1)')}")
                letters = ["b", "1", "j", feature]
            setattr(self, name, letters)
        self.mark()

    def _regroup_for_einsum(self) -> None:
        at = self.q.index("h")
        g, r = self.sizes["g"], self.sizes["r"]
        self.line(f"q = q.unflatten({at}, ({g}, {r}))")
        self.q[at : at + 1] = ["g", "r"]
        self.undo.append(self._merge_groups)

    def _merge_groups(self) -> None:
        if "g" not in self.out:
            return
        at = self.out.index("g")
        if self.out[at + 1 : at + 2] == ["r"]:
            self.line(f"o = o.flatten({at}, {at + 1})")
            self.out[at : at + 2] = ["h"]

    def _group(self, way: str) -> None:
        g, r = self.sizes["g"], self.sizes["r"]
        if way in ("groups", "einsum"):
            self.line(self.pick.one(f"q = q.unflatten(1, ({g}, {r}))", f"q = q.reshape(b, {g}, {r}, L, q.shape[-1])"))
            self.q = ["b", "g", "r", "i", "d"]
            if way == "groups":
                for name, letters in (("k", self.k), ("v", self.v)):
                    self.line(f"{name} = {name}{self.pick.one('[:, :, None]', '.unsqueeze(2)')}")
                    letters.insert(2, "1")
            self.undo.append(self._merge_groups)
            return
        for name, letters in (("k", self.k), ("v", self.v)):
            if way == "repeat_interleave":
                self.line(f"{name} = {name}.repeat_interleave({r}, dim=1)")
            elif way == "tile":
                self.line(f"{name} = {name}.repeat(1, {r}, 1, 1)")
            else:
                rest = self.shape(letters[-2:])
                self.line(f"{name} = {name}[:, :, None].expand(b, {g}, {r}, {rest}).reshape(b, {g * r}, {rest})")
            letters[1] = "h"

    # Loops around what follows.

    def chunks(self) -> None:
        self.form("chunked queries")
        self.line("outs = []")
        self.line("for lo, hi in ((0, L // 2), (L // 2, L)):")
        self.depth += 1
        self.query = "qi"
        self.in_chunk = True
        self.line("qi = q[..., lo:hi, :]")
        self.sites = 2

        def end() -> None:
            self.line("outs.append(o)")
            self.depth -= 1
            self.in_chunk = False
            self.line(f"o = torch.cat(outs, dim={self.out.index('i')})")

        self.undo.insert(0, end)

    def loop_over_heads(self) -> None:
        self.form("loop over heads")
        self.line("outs = []")
        self.line(f"for z in range({self.sizes['h']}):")
        self.depth += 1
        self.query, self.key, self.value = "qz", "kz", "vz"
        self.in_loop = True
        at = self.q.index("h")
        index = f"[{', '.join([':'] * at + ['z'])}]"
        self.line(f"qz, kz, vz = q{index}, k{index}, v{index}")
        self.sites = self.sizes["h"]
        for letters in (self.q, self.k, self.v):
            letters.remove("h")

        def end() -> None:
            self.line("outs.append(o)")
            self.depth -= 1
            self.line(f"o = torch.stack(outs, dim={at})")
            self.out.insert(at, "h")

        self.undo.insert(0, end)

    # Scale and products.

    def root(self) -> str:
        d = self.sizes["d"]
        return self.pick.one(
            f"math.sqrt({d})", f"{d} ** 0.5", f"{math.sqrt(d):.4g}", f"math.sqrt({self.key}.size({self.k.index('d')}))"
        )

    def factor(self) -> str:
        d = self.sizes["d"]
        at = self.q.index("d")
        return self.pick.one(
            f"{d} ** -0.5", f"(1.0 / math.sqrt({d}))", f"{self.query}.shape[{at}] ** -0.5", f"{d**-0.5:.4g}"
        )

    def scale_operand(self, name: str, place: str) -> str:
        if place == "both":
            return f"({name} * {self.sizes['d']} ** -0.25)"
        return self.pick.one(f"({name} * {self.factor()})", f"({name} / {self.root()})")

    def products(self, place: str) -> None:
        """The scores ``s``."""
        q = self.scale_operand(self.query, place) if place in ("query", "both") else self.query
        k = self.scale_operand(self.key, place) if place in ("key", "both") else self.key
        ways = self._product_ways()
        way = self.pick.one(*ways)
        self.form(f"product: {way}")
        batch = self.q[:-2]
        self.frame = [*batch, "i", "j"]
        rank = len(self.k)
        ready = self.k[-2:] == ["d", "j"]
        kt = k if ready else self.transposed(k, rank)
        kn = self.transposed(k, rank) if ready else k
        if way == "@":
            text = f"{q} @ {kt}"
        elif way == "matmul":
            text = self.pick.one(f"torch.matmul({q}, {kt})", f"{q}.matmul({kt})")
        elif way == "keys first":
            text = f"{kn} @ {self.transposed(q, len(self.q))}"
            self.frame = [*batch, "j", "i"]
        elif way == "einsum":
            text = self._einsum_scores(q, k)
        elif way == "einsum ...":
            text = f'torch.einsum("...{"id"},...{"".join(self.k[-2:])}->...ij", {q}, {k})'
        elif way == "bmm":
            text = f"torch.bmm({q}, {kt})"
        elif way == "mm":
            text = f"torch.mm({q}, {kt})"
        elif way == "linear":
            text = f"F.linear({q}, {kn})"
        elif way == "baddbmm empty":
            sizes = self.shape(self.frame)
            if place == "alpha":
                self.alpha = f", alpha={self.factor()}"
            text = f"torch.baddbmm(torch.empty({sizes}, dtype=q.dtype), {q}, {kt}, beta=0{self.alpha})"
        elif way == "baddbmm bias":
            name = self._learned_or_given(
                self.pick.one(["n", "i", "j"], ["i", "j"], ["j"], ["n", "1", "j"]), self.pick.chance(60)
            )
            beta = self.pick.one("", ", beta=1")
            if place == "alpha":
                self.alpha = f", alpha={self.factor()}"
            text = f"torch.baddbmm({name}, {q}, {kt}{beta}{self.alpha})"
        elif way == "single sum":
            text = self.pick.one(f"({q} * {kn}).sum(-1)", f"({q} * {kn}).sum(dim=-1)", f"torch.sum({kn} * {q}, -1)")
            self.frame = [*batch, "j"]
        else:
            assert way == "multiply and sum"
            text = f"({q}.unsqueeze(-2) * {kn}.unsqueeze(-3)).sum(-1)"
        self.line(f"s = {text}")

    def _product_ways(self) -> list[str]:
        if self.q[-2:] != ["i", "d"]:
            return ["einsum"]
        if "g" in self.k and "1" not in self.k and "r" in self.q:
            return ["einsum"]
        multi = self.q[:-2] == ["b", "h"] and self.k[:-2] == ["b"]
        if multi:
            return ["einsum"]
        ways = ["@", "@", "matmul", "matmul", "keys first", "einsum ..."]
        if "1" not in self.k:
            ways += ["einsum"] * 2
        if len(self.q) == 3 and self.q[0] == self.k[0] and len(self.k) == 3:
            ways += ["bmm"] * 3 + ["baddbmm empty"]
            if self.q[0] == "n" and not self.in_chunk:
                ways += ["baddbmm bias"] * 2
        if len(self.q) == 2 and len(self.k) == 2:
            ways += ["mm"]
        if len(self.k) == 2:
            ways += ["linear"] * 3
        if self.sizes["i"] == 1 and not self.lengths and len(self.q) == len(self.k) and not self.in_chunk:
            ways += ["single sum"] * 8
        if len(self.q) == len(self.k) and self.pick.chance(10):
            ways.append("multiply and sum")
        return ways

    def _einsum_scores(self, q: str, k: str) -> str:
        batch = [letter for letter in self.q if letter not in ("i", "d")]
        if self.pick.chance(15):
            batch = batch[::-1]
        tail = ["j", "i"] if self.pick.chance(12) else ["i", "j"]
        self.frame = [*batch, *tail]
        if self.pick.chance(5) and batch:
            self.frame = [batch[0], tail[0], *batch[1:], tail[1]]
        return self.einsum((self.q, self.k), self.frame, (q, k))

    def einsum(self, letters: Sequence[Letters], result: Letters, names: Sequence[str]) -> str:
        shift = self.pick.one(0, 0, 3, 11)
        own = list(dict.fromkeys(letter for each in (*letters, result) for letter in each))
        code = dict(zip(own, own, strict=True)) if not shift else {x: _LETTERS[shift + n] for n, x in enumerate(own)}
        gap = self.pick.one("", "", " ")
        left = f",{gap}".join(gap.join(code[letter] for letter in each) for each in letters)
        arrow = f"{gap}->{gap}"
        return f'torch.einsum("{left}{arrow}{gap.join(code[letter] for letter in result)}", {", ".join(names)})'

    def scale_scores(self, place: str) -> None:
        if place == "multiply":
            c = self.factor()
            self.line(
                self.pick.one(f"s = s * {c}", f"s = {c} * s", f"s *= {c}", f"s = s.mul({c})", f"s = torch.mul(s, {c})")
            )
        elif place == "divide":
            c = self.root()
            self.line(self.pick.one(f"s = s / {c}", f"s = s.div({c})", f"s /= {c}", f"s = torch.div(s, {c})"))
        elif place == "0-d tensor":
            c = self.factor()
            self.line(
                self.pick.one(
                    f"s = s * torch.tensor({c})",
                    f"s = s / torch.full([], {self.root()}, dtype=s.dtype)",
                    f"s = s / torch.sqrt(torch.tensor({self.sizes['d']}.0))",
                )
            )
        elif place in ("learned", "learned per head"):
            batch = [x for x in self.frame if x not in ("i", "j")] if place == "learned per head" else []
            axes = {self.pick.one(*batch)} if batch else set()
            how = self.pick.one("parameter", "normal")
            name = self.shaped(self.fresh("t"), axes, how, 0.3) if axes else self.given(self.fresh("t"), [], how, 0.3)
            self.line(self.pick.one(f"s = s * {name}.exp()", f"s = s * {name}", f"s = s / (1 + {name} ** 2)"))

    # What is done to the scores.

    def shaped(self, name: str, axes: set[str], how: str, std: float = 1.0) -> str:
        """An input over some axes of the scores, as an expression that broadcasts to them."""
        frame = self.frame
        if self.pick.chance(60):
            tokens = [letter if letter in axes else "1" for letter in frame]
            if self.pick.chance(50):
                while len(tokens) > 1 and tokens[0] == "1":
                    tokens.pop(0)
            self.given(name, tokens, how, std)
            text = name
        else:
            index = [":" if letter in axes else "None" for letter in frame]
            while index and index[0] == "None":
                index.pop(0)
            self.given(name, [letter for letter in frame if letter in axes], how, std)
            text = f"{name}[{', '.join(index)}]" if "None" in index else name
        return self.in_rows(text, "i" in axes)

    def in_rows(self, text: str, of_queries: bool) -> str:
        """What belongs to the queries of this turn of the loop."""
        if not (self.in_chunk and of_queries):
            return text
        after = len(self.frame) - 1 - self.frame.index("i")
        return f"{text}[..., lo:hi{', :' * after}]"

    def batch(self) -> Letters:
        return [letter for letter in self.frame if letter not in ("i", "j")]

    def some_axes(self) -> set[str]:
        axes = {"j"}
        if "i" in self.frame and self.pick.chance(60):
            axes.add("i")
        for letter in self.batch():
            if self.pick.chance(55 if letter in ("b", "n") else 25):
                axes.add(letter)
        return axes

    def _learned_or_given(self, letters: Sequence[str], learned: bool) -> str:
        name = self.given(self.fresh("x"), letters, "parameter" if learned else "normal", 0.7)
        self.terms.append(("bias", "learned" if learned else "any"))
        return name

    def add(self, text: str) -> None:
        """``text`` added to the scores."""
        ways = [f"s = s + {text}", f"s = {text} + s", f"s = torch.add(s, {text})", f"s = s.add({text})"]
        if not self.half:
            ways += [f"s += {text}", f"s.add_({text})"]
        self.line(self.pick.one(*ways))

    def bias(self) -> None:
        self.form("bias")
        axes = self.some_axes()
        learned = self.pick.chance(65)
        name = self.shaped(self.fresh("x"), axes, "parameter" if learned else "normal", 0.7)
        self.terms.append(("bias", "learned" if learned else "any"))
        if self.pick.chance(10):
            self.line(f"s = s - {name}")
        else:
            self.add(name)

    def additive_mask(self) -> None:
        self.form("additive mask, given")
        name = self.shaped(self.fresh("m"), self.some_axes(), "additive")
        self.terms.append(("bias", "any"))
        self.add(name)

    def rows_and_columns(self) -> bool:
        """Whether positions can be compared: queries and keys are the last two dimensions."""
        return sorted(self.frame[-2:]) == ["i", "j"]

    def position(self, letter: str) -> str:
        """Positions of queries or keys, shaped to broadcast against the other's."""
        name = {"i": "rows", "j": "cols"}[letter]
        if name not in self.positions:
            self.positions.add(name)
            count = "lo, hi" if letter == "i" and self.in_chunk else {"i": "L", "j": "S"}[letter]
            self.line(f"{name} = torch.arange({count})")
        if self.frame[-2] == letter:
            return f"{name}[:, None]"
        return self.pick.one(name, f"{name}[None, :]")

    def alibi(self) -> None:
        rows, cols = self.position("i"), self.position("j")
        heads = [letter for letter in self.batch() if letter in ("h", "g", "n")]
        learned = self.pick.chance(60)
        axes = {heads[-1]} if heads else set()
        if axes:
            name = self.shaped(self.fresh("x"), axes, "parameter" if learned else "normal", 0.3)
        else:
            name = self.given(self.fresh("x"), [], "parameter" if learned else "normal", 0.3)
        self.form("alibi")
        self.terms.append(("bias", "learned" if learned else "any"))
        distance = self.pick.one(f"({cols} - {rows})", f"-({rows} - {cols}).abs()", f"({rows} - {cols}).abs().neg()")
        self.add(f"{distance} * {name}" if self.pick.chance(50) else f"{name} * {distance}")

    def relative_bias(self) -> None:
        self.form("relative bias")
        rows, cols = self.position("i"), self.position("j")
        self.sizes["t"] = 41
        learned = self.pick.chance(75)
        how = "parameter" if learned else "normal"
        heads = self.batch()[-1:] if self.frame[-3:-2] in (["h"], ["n"], ["r"]) else []
        self.terms.append(("bias", "learned" if learned else "any"))
        name = self.given(self.fresh("x"), ["t", *heads], how, 0.5)
        index = f"({cols} - {rows} + 20)"
        if self.pick.chance(30):
            index = f"({cols} - {rows}).clamp(-4, 4) + 4"
        look = self.pick.one(f"{name}[{index}]", f"F.embedding({index}, {name})" if heads else f"{name}[{index}]")
        self.add(f"{look}.permute(2, 0, 1)" if heads else look)

    def mask(self) -> None:
        """A boolean mask in one of many makings, applied in one of many ways."""
        text, kept, whole = self._mask_source()
        name = f"{'keep' if kept else 'drop'}{len(self.masks)}"
        self.line(f"{name} = {text}")
        keep, drop = (name, f"~{name}") if kept else (f"~{name}", name)
        self.masks.append((keep, drop))
        self._apply(keep, drop, whole)

    def _mask_source(self) -> tuple[str, bool, bool]:
        """(text, whether it is true for what is kept, whether it has the full shape of the scores)."""
        ways = ["given"] * 3 + ["integers"] * 3
        if "b" in self.frame:
            ways.append("lengths")
        if "n" in self.frame and "i" in self.frame and self.sizes["n"] == self.sizes["b"] * self.sizes["h"]:
            ways.append("folded padding")
        if self.rows_and_columns():
            ways += ["causal"] * 4 + ["window"]
        way = self.pick.one(*ways)
        self.form(f"mask: {way}")
        self.opens.append(None)
        if way == "given":
            whole = self.pick.chance(25)
            axes = set(self.frame) if whole else self.some_axes()
            kept = self.pick.chance(60)
            return self.shaped(self.fresh("m"), axes, "keep" if kept else "padding"), kept, whole
        if way == "integers":
            text = self.shaped(self.fresh("m"), self.some_axes(), self.pick.one("keep_int", "keep_float"))
            return *self.pick.one(
                (f"{text} == 0", False), (f"{text} != 0", True), (f"{text}.bool()", True), (f"{text} > 0", True),
                (f"{text}.to(torch.bool)", True), (f"{text} < 0.5", False),
            ), False  # fmt: skip
        if way == "lengths":
            name = self.fresh("m")
            self.names.append(name)
            low = 0 if self.empty else 1
            self.draws.append(
                f"{name} = torch.randint({low}, {self.sizes['j']} + 1, ({self.sizes['b']},), generator=g)"
            )
            after = "".join(", None" for letter in self.frame[self.frame.index("b") + 1 :])
            index = [":" if letter == "j" else "None" for letter in self.frame[self.frame.index("j") :]]
            self.line(f"keys = torch.arange(S)[{', '.join(index)}]" if len(index) > 1 else "keys = torch.arange(S)")
            return *self.pick.one((f"keys < {name}[:{after}]", True), (f"keys >= {name}[:{after}]", False)), False
        if way == "folded padding":
            name = self.given(self.fresh("m"), ["b", "j"], self.pick.one("keep", "keep_int"))
            h = self.sizes["h"]
            tail = "[:, :, None]" if self.frame[-1] == "i" else "[:, None]"
            text = self.pick.one(
                f"{name}.repeat_interleave({h}, 0){tail}",
                f"{name}[:, None, :].expand(-1, {h}, -1).reshape(-1, S){tail}",
            )
            return f"({text}) != 0" if self.pick.chance(50) else f"({text}).bool()", True, False
        rows, cols = self.position("i"), self.position("j")
        if way == "window":
            width = self.pick.one(1, 2, 3)
            text, kept, reach = self.pick.one(
                (f"({rows} - {cols}).abs() <= {width}", True, (width, width)),
                (f"({cols} > {rows} - {width}) & ({cols} <= {rows})", True, (width - 1, 0)),
                (f"({rows} - {cols} > {width}) | ({cols} > {rows})", False, (width, 0)),
            )
            self.opens[-1] = lambda i, j, more: (i - j <= reach[0]) & (j - i <= reach[1])
            return text, kept, False
        turned = ".mT" if self.frame[-1] == "i" else ""
        part = "[lo:hi]" if self.in_chunk else ""
        offset = self.pick.one("0", "0", "0", "S - L")
        later = "1" if offset == "0" else "S - L + 1"
        moved = "" if offset == "0" else " + S - L"
        self.opens[-1] = lambda i, j, more: j <= i + (0 if offset == "0" else more)
        return *self.pick.one(
            (f"torch.ones(L, S, dtype=torch.bool).tril({offset}){part}{turned}", True),
            (f"(torch.tril(torch.ones(L, S), diagonal={offset}) == 0){part}{turned}", False),
            (f"torch.triu(torch.ones(L, S), diagonal={later}).bool(){part}{turned}", False),
            (f"(torch.ones(L, S).triu({later}) == 1){part}{turned}", False),
            (f"{cols} > {rows}{moved}", False),
            (f"{rows}{moved} >= {cols}", True),
            (f"{cols} <= {rows}{moved}", True),
        ), False  # fmt: skip

    def _lowest(self, dtype: str = "s.dtype") -> tuple[str, str]:
        """(text, kind) of a number that masks."""
        ways = [('float("-inf")', "-inf")] * 4 + [(f"torch.finfo({dtype}).min", "min")] * 4
        ways += [("-math.inf", "-inf"), (f"-torch.finfo({dtype}).max", "min")]
        if not self.half:
            ways += [("-1e9", "-1e9")] * 2
        return self.pick.one(*ways)

    def _apply(self, keep: str, drop: str, whole: bool) -> None:
        ways = ["masked_fill"] * 4 + ["where"] * 3 + ["added"] * 3
        if whole:
            ways += ["index"] * 8
        if not self.half:
            ways += ["in place", "in place", "arithmetic"]
        way = self.pick.one(*ways)
        self.form(f"applied: {way}")
        low, kind = self._lowest()
        if way == "arithmetic":
            self.line(f"m = ({keep}).to(s.dtype)")
            if any(kind in ("any", "-inf") for _, kind in self.terms):
                self.refuse("scores that may be -inf are multiplied by zeros")
            low = self.pick.one("1e9", "1e9", "1e9", "1e4")
            self.terms.append(("fill", "-1e9" if low == "1e9" else "low"))
            self.line(self.pick.one(f"s = s * m + (1 - m) * -{low}", f"s = s * m - {low} * (1 - m)"))
            return
        if way == "added":
            self._add_mask(keep, drop)
            return
        if self.pick.chance(4):
            low, kind = self.pick.one("-1e4", "-5.0", "0.0"), "low"
        self.terms.append(("fill", kind))
        if way == "masked_fill":
            self.line(f"s = s.masked_fill({drop}, {low})")
        elif way == "in place":
            self.line(
                f"s.masked_fill_({drop}, {low})" if self.pick.chance(70) else f"s = s.masked_fill_({drop}, {low})"
            )
        elif way == "where":
            value = self.pick.one(low, low, f"torch.tensor({low}, dtype=s.dtype)", f"torch.full_like(s, {low})")
            self.line(self.pick.one(f"s = torch.where({keep}, s, {value})", f"s = torch.where({drop}, {value}, s)"))
        else:
            self.line(f"s[{drop}] = {low}")

    def _add_mask(self, keep: str, drop: str) -> None:
        low, kind = self._lowest()
        if kind == "-inf":
            text = self.pick.one(
                f"torch.where({keep}, 0.0, {low}).to(s.dtype)",
                f"torch.zeros(({keep}).shape, dtype=s.dtype).masked_fill({drop}, {low})",
                f"torch.zeros_like({keep}, dtype=s.dtype).masked_fill_({drop}, {low})",
            )
        else:
            if not self.half and self.pick.chance(10):
                low, kind = "-1e4", "-1e4"
            text = self.pick.one(
                f"(1.0 - ({keep}).to(s.dtype)) * {low}",
                f"({drop}).to(s.dtype) * {low}",
                f"torch.where({keep}, torch.zeros((), dtype=s.dtype), {low})",
            )
        self.terms.append(("bias", kind))
        if self.pick.chance(50):
            self.line(f"mask = {text}")
            text = "mask"
        self.add(text)

    def softcap(self) -> None:
        self.form("softcap")
        self.terms.append(("cap", ""))
        c = self.pick.one("5.0", "2.0", "30.0")
        self.line(
            self.pick.one(
                f"s = {c} * torch.tanh(s / {c})",
                f"s = torch.tanh(s / {c}) * {c}",
                f"s = (s * (1 / {c})).tanh() * {c}",
            )
        )

    def temperature(self) -> None:
        self.form("temperature")
        scaled = self.pick.one("s / 0.7", "s * 1.5", "0.8 * s", "s.div(2)")
        self.terms.append(("scale", scaled))
        self.line(f"s = {scaled}")

    def clamp(self) -> None:
        if self.pick.chance(50):
            self.form("clamp")
            self.terms.append(("clamp", ""))
            self.line(
                self.pick.one(
                    "s = s.clamp(-2.0, 2.0)",
                    "s = torch.clamp(s, min=-1.5)",
                    "s = s.clamp_max(1.0)",
                    "s = s.clamp(max=3)",
                )
            )
        else:
            self.form("floor")
            self.terms.append(("floor", ""))
            low = "torch.finfo(s.dtype).min"
            self.line(self.pick.one(f"s = torch.max(s, torch.tensor({low}, dtype=s.dtype))", f"s = s.clamp(min={low})"))

    def subtract_max(self) -> None:
        self.form("max subtracted")
        self.terms.append(("max", ""))
        dim = self.key_dim()
        top = self.pick.one(
            f"s.amax({dim}, keepdim=True)",
            f"s.max(dim={dim}, keepdim=True).values",
            f"torch.max(s, {dim}, keepdim=True)[0]",
        )
        self.line(f"s = s - {top}{'.detach()' * self.pick.chance(50)}")

    def refolded(self) -> None:
        """The batch split into batch and heads, or both merged, until the weights meet the value."""
        if self.in_loop or self.in_chunk:
            return
        if self.frame == ["n", "i", "j"] and self.sizes["n"] == self.sizes["b"] * self.sizes["h"]:
            self.form("scores split over heads")
            self.refold = list(self.frame)
            h = self.sizes["h"]
            self.line(self.pick.one(f"s = s.view(-1, {h}, L, S)", f"s = s.reshape(n // {h}, {h}, L, S)"))
            self.frame = ["b", "h", "i", "j"]
            self.line("b = s.shape[0]")
        elif self.frame == ["b", "h", "i", "j"] and len(self.q) == 4:
            self.form("scores merged over heads")
            self.refold = list(self.frame)
            self.line(self.pick.one("s = s.flatten(0, 1)", "s = s.reshape(-1, L, S)"))
            self.sizes["n"] = self.sizes["b"] * self.sizes["h"]
            self.frame = ["n", "i", "j"]
            self.line("n = s.shape[0]")

    # Softmax.

    def key_dim(self) -> int:
        at = self.frame.index("j")
        return self.pick.one(at - len(self.frame), at - len(self.frame), at)

    def softmax(self, way: str, argument: str = "s") -> None:
        """The weights ``w``."""
        dim = self.key_dim()
        self.form(f"softmax: {way}")
        s = argument if argument == "s" else f"({argument})"
        if way == "plain":
            text = self.pick.one(
                f"F.softmax({argument}, dim={dim})", f"{s}.softmax({dim})", f"torch.softmax({argument}, {dim})",
                f"nn.functional.softmax({argument}, dim={dim})",
            )  # fmt: skip
        elif way == "module":
            text = f"nn.Softmax(dim={dim})({argument})"
        elif way == "dtype":
            text = f"F.softmax({argument}, dim={dim}, dtype=torch.float32)" + self._back()
        elif way == "upcast":
            text = f"{s}.float().softmax({dim})" + self._back()
        elif way == "log":
            text = self.pick.one(f"F.log_softmax({argument}, dim={dim}).exp()", f"{s}.log_softmax({dim}).exp()")
        elif way == "logsumexp":
            self.settle(argument)
            text = f"torch.exp(s - torch.logsumexp(s, dim={dim}, keepdim=True))"
        elif way in ("exp", "exp of max", "exp late"):
            self.settle(argument)
            if way == "exp of max" or (way == "exp late" and self.pick.chance(70)):
                top = self.pick.one(f"s.amax({dim}, keepdim=True)", f"s.max({dim}, keepdim=True)[0]")
                self.line(f"p = torch.exp(s - {top}{'.detach()' * self.pick.chance(40)})")
            else:
                self.underflows = True
                self.line(self.pick.one("p = torch.exp(s)", "p = s.exp()"))
            total = self.pick.one(f"p.sum({dim}, keepdim=True)", f"torch.sum(p, dim={dim}, keepdim=True)")
            if way == "exp late":
                self.line(f"total = {total}")
                self.late, text = "total", "p"
            else:
                text = f"p / {total}"
        elif way == "sink":
            text = self._sink(argument)
        else:
            text = self._plus_one(way, argument, dim)
        self.line(f"w = {text}")

    def settle(self, argument: str) -> None:
        if argument != "s":
            self.line(f"s = {argument}")

    def _back(self) -> str:
        return self.pick.one(f".to({self.value}.dtype)", f".type_as({self.value})", f".to({self.query}.dtype)")

    def _sink(self, argument: str) -> str:
        """A score more in each row, that no value goes with. The keys come last here."""
        batch = self.batch()
        if self.pick.chance(30):
            at_end = self.pick.chance(60)
            self.sunk = True
            self.line(f"s = F.pad({argument}, {'(0, 1)' if at_end else '(1, 0)'})")
        else:
            at_end = self.pick.chance(70)
            heads = [letter for letter in batch if letter in ("h", "g", "n", "b")][-1:]
            how = self.pick.one("parameter", "normal")
            self.sunk = how == "parameter"
            name = self.given(self.fresh("x"), heads, how, 0.5)
            ones = ", ".join(self.size(letter) if letter in heads else "1" for letter in self.frame)
            whole = [*self.frame[:-1], "1"]
            self.line(f"sinks = {name}.reshape({ones}).expand({self.shape(whole)})")
            parts = f"[{argument}, sinks]" if at_end else f"[sinks, {argument}]"
            self.line(f"s = torch.cat({parts}, dim=-1)")
        if self.pick.chance(25):
            self.line("s = s - s.max(dim=-1, keepdim=True).values")
        return f"{self.pick.one('s.softmax(-1)', 'F.softmax(s, dim=-1)')}{'[..., :-1]' if at_end else '[..., 1:]'}"

    def _plus_one(self, way: str, argument: str, dim: int) -> str:
        self.settle(argument)
        self.sunk = True
        if way == "plus one":
            self.line("p = torch.exp(s)")
            return self.pick.one(f"p / (1 + p.sum({dim}, keepdim=True))", f"p / (p.sum({dim}, keepdim=True) + 1.0)")
        assert way == "plus one, stable"
        self.line(f"top = s.amax({dim}, keepdim=True).clamp(min=0){'.detach()' * self.pick.chance(50)}")
        self.line("p = torch.exp(s - top)")
        return f"p / (torch.exp(-top) + p.sum({dim}, keepdim=True))"

    # What is done to the weights.

    def zeroed(self) -> None:
        keep, drop = self.masks[-1]
        self.form("weights zeroed")
        self.line(
            self.pick.one(
                f"w = w.masked_fill({drop}, 0.0)",
                f"w = torch.where({keep}, w, 0.0)",
                f"w = w * ({keep})",
                f"w = w * ({keep}).to(w.dtype)",
            )
        )

    def head_mask(self) -> None:
        self.form("head mask")
        axes = {self.pick.one(*self.batch())}
        name = self.shaped(self.fresh("x"), axes, self.pick.one("parameter", "normal"))
        self.multiplied = True
        self.line(self.pick.one(f"w = w * {name}", f"w = {name} * w"))

    def query_mask(self) -> None:
        self.form("query mask")
        axes = {"i", *(letter for letter in self.batch() if letter in ("b", "n"))}
        how = self.pick.one("keep", "keep_float")
        self.multiplied |= how == "keep_float"
        name = self.shaped(self.fresh("r"), axes, how)
        self.line(f"w = w * {name}")

    def dropout(self) -> None:
        self.form("dropout of nothing")
        self.line(
            self.pick.one(
                "w = F.dropout(w, p=0.1, training=False)", "w = F.dropout(w, 0.0)", "w = nn.Dropout(0.1).eval()(w)"
            )
        )

    def cast(self) -> None:
        self.form("cast")
        self.line(self.pick.one(f"w = w.to({self.value}.dtype)", f"w = w.type_as({self.value})"))

    def nan_to_num(self) -> None:
        self.form("nan_to_num")
        if self.multiplied:
            self.refuse("NaN is replaced that a factor of the weights may have made")
        self.line(
            self.pick.one("w = torch.nan_to_num(w)", "w = w.nan_to_num(0.0)", "w = torch.where(w.isnan(), 0.0, w)")
        )

    # The product with the value, and what becomes of it.

    def weigh(self) -> None:
        if self.refold is not None:
            # What a twist or a permuted bias leaves behind may lie in another order.
            reordered = self.stays or "relative bias" in self.forms
            way = "reshape" if reordered else self.pick.one("view", "reshape")
            self.line(f"w = w.{way}({self.shape(self.refold)})")
            self.frame = list(self.refold)
        v, rank = self.value, len(self.v)
        batch = self.batch()
        lines_up = self.lines_up()
        named = "1" not in self.v
        single = "i" not in self.frame
        if single:
            self._weigh_single(lines_up, named)
        elif not lines_up or (named and not self.late and self.pick.chance(15)):
            self._weigh_by_einsum(named)
        elif self.frame[-2:] == ["i", "j"]:
            self.out = [*batch, "i", "e"]
            ways = [f"w @ {v}", f"torch.matmul(w, {v})", f"w.matmul({v})"]
            if len(self.frame) == 3 and self.v[0] == batch[0] and rank == 3:
                ways += [f"torch.bmm(w, {v})"] * 3
            if len(self.frame) == 2:
                ways += [f"torch.mm(w, {v})"]
            if rank == 2:
                ways += [f"F.linear(w, {v}.mT)"]
            if self.pick.chance(8):
                ways = [f"({self.transposed(v, rank)} @ {self.transposed('w', len(self.frame))}).mT"]
            elif rank == len(self.frame) and self.pick.chance(4):
                ways = [f"(w.unsqueeze(-1) * {v}.unsqueeze(-3)).sum(-2)"]
            self.line(f"o = {self.pick.one(*ways)}")
        else:
            assert self.frame[-2:] == ["j", "i"]
            self.out = [*batch, "i", "e"]
            ways = [f"{self.transposed('w', len(self.frame))} @ {v}", f"({self.transposed(v, rank)} @ w).mT"]
            self.line(f"o = {self.pick.one(*ways)}")
        if self.late:
            total = self.late if self.frame[-1:] == ["j"] else f"{self.late}.mT"
            self.line(f"o = o / {total}")

    def lines_up(self) -> bool:
        """Whether matmul can multiply weights and value as they stand; einsum tells their dimensions by name."""
        batch = self.batch()
        pairs = zip(reversed(self.v[:-2]), reversed(batch), strict=False)
        in_order = "i" not in self.frame or sorted(self.frame[-2:]) == ["i", "j"]
        tidy = in_order and self.q[:-2] == batch and self.q[-2:] == ["i", "d"]
        return tidy and self.v[-2:] == ["j", "e"] and all(a in (b, "1") for a, b in pairs)

    def _weigh_single(self, lines_up: bool, named: bool) -> None:
        v = self.value
        self.out = [*self.batch(), "e"]
        ways = [f"(w.unsqueeze(-1) * {v}).sum(-2)", f"(w[..., None] * {v}).sum(dim=-2)"]
        ways += [f"(w.unsqueeze(-2) @ {v}).squeeze(-2)"]
        if named:
            ways.append(self.einsum((self.frame, self.v), self.out, ("w", v)))
        self.line(f"o = {self.pick.one(*ways)}")

    def _weigh_by_einsum(self, named: bool) -> None:
        batch = self.batch()
        if not named:
            for at in [at for at, letter in enumerate(self.v) if letter == "1"][::-1]:
                self.line(f"{self.value} = {self.value}.squeeze({at})")
            self.v = [letter for letter in self.v if letter != "1"]
        self.out = [*batch, "i", "e"]
        if len(batch) > 1 and self.pick.chance(50):
            self.out = [batch[0], "i", *batch[1:], "e"]
        self.line(f"o = {self.einsum((self.frame, self.v), self.out, ('w', self.value))}")

    def finish(self) -> None:
        for step in self.undo:
            step()
        if self.out == ["b", "h", "i", "e"] and self.pick.chance(40):
            self.form("heads merged")
            self.line(self.pick.one("o = o.transpose(1, 2).flatten(2)", "o = o.transpose(1, 2).reshape(b, L, -1)"))
        elif self.out == ["b", "i", "h", "e"] and self.pick.chance(40):
            self.form("heads merged")
            self.line("o = o.reshape(b, L, -1)")
        self.line(f"return {self.returns}")

    # What is no attention any more.

    def twist(self, way: str) -> None:
        self.form(f"twist: {way}")
        self.stays = way
        if way == "talking heads":
            at = self.frame.index("h")
            other = ["z" if letter == "h" else letter for letter in self.frame]
            self.sizes["z"] = self.sizes["h"]
            name = self.given(self.fresh("x"), ["h", "z"], "parameter")
            if at == 1:
                self.line(f"w = {self.einsum((self.frame, ['h', 'z']), other, ('w', name))}")
            else:
                self.line(f"w = (w.movedim({at}, -1) @ {name}).movedim(-1, {at})")
        elif way == "weights returned":
            self.returns = "o, w"
        elif way == "weights squared":
            self.line("w = w ** 2")
        else:
            assert way == "another softmax"
            self.line(f"w = w.softmax({self.key_dim()})")
