"""Asking a kernel: what it is not even asked, and whether it is fetched."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, fx

from attnrewrite.ir.builder import Builder
from attnrewrite.ir.site import CanonicalAttention
from attnrewrite.kernels import Availability, Kernel, Verdict
from attnrewrite.report.rows import KernelVerdict
from attnrewrite.selection.ask import ask, refusals
from tests.support.library_sites import site_where_it_is


class Willing(Kernel):
    """Takes every site that it is asked about, and has to be fetched."""

    name = "willing"
    needs = "a network"

    def availability(self) -> Availability:
        return Availability(True, "not fetched")

    def prepare(self) -> Availability:
        return Availability(False, "no network")

    def supports(self, site: CanonicalAttention) -> Verdict:
        return Verdict.yes()

    def emit(self, site: CanonicalAttention, builder: Builder) -> fx.Node:
        raise NotImplementedError


class Skipping(Willing):
    def skips_masked(self, site: CanonicalAttention) -> bool:
        return True


class Unwilling(Willing):
    def supports(self, site: CanonicalAttention) -> Verdict:
        return Verdict.no("takes nothing")

    def prepare(self) -> Availability:
        raise AssertionError("what is not willing is not fetched")


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).softmax(-1) @ v


def site(**changes: Any) -> CanonicalAttention:
    return dataclasses.replace(site_where_it_is(attention, *(torch.randn(2, 3, 8, 4) for _ in range(3))), **changes)


def test_what_is_asked_for_by_name_is_fetched() -> None:
    assert ask(site(), Willing()) == KernelVerdict("willing", True, "")
    assert ask(site(), Willing(), by_name=True) == KernelVerdict("willing", False, "not available: no network")
    assert ask(site(), Unwilling(), by_name=True) == KernelVerdict("willing", False, "takes nothing")


def test_windows_are_for_kernels_that_skip_what_is_masked() -> None:
    windowed = site(windowed=True)
    assert ask(windowed, Skipping()).willing
    assert ask(windowed, Willing()).reason == (
        "would compute all scores, while the source computes only those within windows of keys"
    )


def test_each_reason_is_said_once() -> None:
    answers = [("a", "no mask"), ("b", "no GPU"), ("c", "no mask"), ("a", "no mask")]
    assert refusals(KernelVerdict(kernel, False, reason) for kernel, reason in answers) == "a, c: no mask; b: no GPU"
