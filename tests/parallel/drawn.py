"""Draws models and the way their sequence is sharded, and compares what ranks compute with what one process does.

``python -m tests.parallel.drawn --cases 500 --ranks 2 --seed 0``. A case is compiled in each of the processes; its
values and the gradients of its parameters, summed over ranks, are those of the whole sequence, or it is refused.
"""

from __future__ import annotations

import json
import random
import re
import sys
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from attnrewrite.errors import ContextParallelError
from tests.support import fuzzing
from tests.support.helpers import rewritten
from tests.support.ranks import Ranks
from tests.support.sequence_models import Case, Model, drawn_case, inputs_of, shard

__all__ = ["compared", "differing", "main"]

VALUES, GRADIENTS = 1e-5, 1e-4
"""Largest errors, relative to the largest number; sums come in another order, in float32."""


def compared(case: Case, inner: str) -> tuple[str, str]:
    """In one of the processes: "same", "wrong" or "refused", and what about it."""
    try:
        found = differing(case, inner)
    except ContextParallelError as reason:
        return "refused", str(reason)
    return ("wrong", found) if found else ("same", "")


def differing(case: Case, inner: str) -> str:
    """In one of the processes: what is wrong with its values and gradients, in words; empty if nothing is."""
    ranks, rank = dist.get_world_size(), dist.get_rank()
    torch.manual_seed(case.seed)
    model = Model(case)
    option: dict[str, Any] = {"mesh": init_device_mesh("cpu", (ranks,)), "kernel": case.kernel}
    option["load_balance"] = case.balanced
    compiled = None
    found = []
    for length in case.lengths:
        whole = inputs_of(case, length * ranks)
        sharded = {name: 1 for name in whole if name != "memory" or case.memory == "sharded"}
        if "memory" in whole and case.memory == "sharded":
            whole["memory"] = torch.randn(case.batch, (length + 4) * ranks, 8)
        if compiled is None:
            option |= {"buffers": list(whole), "buffer_seq_dims": [sharded.get(name) for name in whole]}
            compiled = rewritten(model, inner, fullgraph=True, context_parallel=option)
        own = {
            name: shard(part, ranks, rank, case.balanced) if name in sharded else part for name, part in whole.items()
        }
        for part in own.values():
            torch._dynamo.mark_dynamic(part, 1)
        # All ranks go the same way, or some would wait for the others.
        found.append(_differing(case, model, compiled, whole, own))
    return "; ".join(filter(None, found))


def _differing(case: Case, model: Model, compiled: Any, whole: dict[str, Any], own: dict[str, Any]) -> str:
    ranks, rank = dist.get_world_size(), dist.get_rank()
    with torch.set_grad_enabled(case.gradients):
        expected, result = model(**whole), compiled(**own)
    wanted = shard(expected, ranks, rank, case.balanced)
    # All ranks go the same way, or some would wait for the others.
    errors = [((result - wanted).abs().max() / expected.abs().max()).detach()]
    names = ["values"]
    if case.gradients:
        upstream = torch.randn_like(expected)
        named = dict(model.named_parameters())
        gradients = torch.autograd.grad(expected, list(named.values()), upstream, allow_unused=True)
        part = shard(upstream, ranks, rank, case.balanced)
        summed = torch.autograd.grad(result, list(named.values()), part, allow_unused=True)
        for name, one, other in zip(named, gradients, summed, strict=True):
            if one is None:
                assert other is None or not other.any(), name
                continue
            total = torch.zeros_like(one) if other is None else other.contiguous()
            dist.all_reduce(total)
            names.append(name)
            # Gradients that are zero but for rounding, such as of a bias of keys, are held to those of others.
            largest = max(one.abs().max(), 1e-2 * max(each.abs().max() for each in gradients if each is not None))
            errors.append((total - one).abs().max() / largest)
    found = torch.stack(errors)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    bounds = [VALUES] + [GRADIENTS] * (len(names) - 1)
    bad = [f"{name} {error:.1e}" for name, error, bound in zip(names, found, bounds, strict=True) if not error <= bound]
    return ", ".join(bad)


def main(argv: Sequence[str]) -> int:
    """Draws, compares, and prints what differs; 1 if something is wrong."""
    parser = fuzzing.parser("tests.parallel.drawn", __doc__)
    parser.add_argument("--ranks", type=int, default=2, help="the number of processes (default: 2)")
    options = parser.parse_args(argv)
    seed = fuzzing.seed_of(options)
    rng, start = random.Random(seed), time.monotonic()
    counts: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    failures = []
    with Ranks(options.ranks) as ranks:
        for number in range(options.cases):
            if time.monotonic() > start + options.seconds:
                break
            if number % 25 == 0:
                print(f"{number} cases, {time.monotonic() - start:.0f} s: {dict(counts)}", flush=True)
            case = drawn_case(rng, options.ranks)
            try:
                verdict, about = _worst(ranks.run(compared, case, options.inner or "eager"))
            except RuntimeError as error:
                verdict, about = "crashed", str(error)
            counts[verdict] += 1
            if verdict == "refused":
                reasons[re.sub(r"/\S*/", "", about)[:160]] += 1
            elif verdict != "same":
                failures.append(f"{number} {verdict}: {case}\n{about}")
                print(failures[-1], flush=True)
    figures: dict[str, Any] = {"fuzzer": "parallel", "seed": seed, "ranks": options.ranks, "cases": counts.total()}
    figures |= {verdict: counts[verdict] for verdict in ("same", "refused", *fuzzing.BAD)}
    figures |= {"seconds": round(time.monotonic() - start), "torch": torch.__version__, "refusals": dict(reasons)}
    for name, value in figures.items():
        print(f"{name}: {value}")
    if options.json:
        options.json.write_text(json.dumps({**figures, "failures": failures}, indent=1))
    return int(any(counts[verdict] for verdict in fuzzing.BAD))


def _worst(verdicts: Sequence[tuple[str, str]]) -> tuple[str, str]:
    """One of all ranks' verdicts; that some refuse and others do not is a crash, since those wait for ever."""
    if len({verdict == "refused" for verdict, _ in verdicts}) > 1:
        return "crashed", str(verdicts)
    return max(verdicts, key=lambda each: each[0] != "same")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
