"""How long the options of a decorated part are remembered."""

from __future__ import annotations

import gc
import operator

from torch import fx

from attnrewrite.selection.decorated_parts import DecoratedPart, parts_in
from attnrewrite.variants import Variants


def test_a_part_lives_as_long_as_the_variants_of_its_graph() -> None:
    gm = fx.symbolic_trace(lambda x: x + 1)
    part = DecoratedPart("block", {"options": None, "mode": None, "dynamic": None})
    (addition,) = gm.graph.find_nodes(op="call_function", target=operator.add)
    addition.meta["custom"] = part.annotation
    variants = Variants(gm, [], lambda gm, inputs: gm.forward)
    del part
    gc.collect()
    assert [part.name for part in parts_in(gm)] == ["block"]
    del variants
    gc.collect()
    assert not list(parts_in(gm))
