"""A process in which a function or method of PyTorch is another neither stores graphs nor is served any."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

from attnrewrite.warm_start import key
from attnrewrite.warm_start.replaced import OF_TORCH, is_written_in, replaced
from tests.warm_start.conftest import Store
from tests.warm_start.test_stored_graphs import attention, heads


def test_nothing_is_replaced_by_the_libraries() -> None:
    for loaded in (diffusers.UNet2DConditionModel, transformers.LlamaModel):  # When they are asked for.
        assert isinstance(loaded, type) and replaced() == []


def _sharper(*args: Any, **options: Any) -> Tensor:
    return F.relu(args[0])


@pytest.mark.parametrize(
    ("owner", "name", "other"),
    [
        (torch.Tensor, "softmax", lambda self, dim: self),
        (torch.Tensor, "softmax", torch.Tensor.log_softmax),
        (torch.Tensor, "__matmul__", lambda self, other: self),
        (torch, "layer_norm", functools.partial(torch.layer_norm, eps=1.0)),
        (F, "softmax", _sharper),
        (F, "softmax", torch.enable_grad()(functools.wraps(F.softmax)(_sharper))),
        (torch._C._nn, "linear", _sharper),
    ],
    ids=["method", "another_method", "operator", "partial", "function", "decorated", "builtin"],
)
def test_what_is_replaced(
    store: Store, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, other: Callable[..., Any]
) -> None:
    store.compiled(attention, *heads())
    (file,) = store.files
    before = file.stat().st_mtime_ns
    monkeypatch.setattr(owner, name, other)
    assert [each.rpartition(".")[2] for each in replaced()] == [name]
    found = store.compiled(attention, *heads())
    assert found.was_stored == [False] and "which has been replaced" in " ".join(found.reports[0].notes)
    assert store.files == [file] and file.stat().st_mtime_ns == before


def test_code_that_a_decorator_of_torch_holds() -> None:
    assert is_written_in(F.softmax, OF_TORCH) and is_written_in(torch.optim.SGD.step, OF_TORCH)
    assert not is_written_in(torch.no_grad()(_sharper), OF_TORCH)


def test_a_package_that_has_changed_since_it_was_imported(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    newest = max(os.stat(file).st_mtime for file in Path(key.__file__).parents[1].rglob("*.py"))
    key._own_source.cache_clear()
    with monkeypatch.context() as context:
        context.setattr(key, "_IMPORTED", newest - 1.0)
        found = store.compiled(attention, *heads())
        assert "has changed since it was imported" in " ".join(found.reports[0].notes) and store.files == []
    store.compiled(attention, *heads())
    assert len(store.files) == 1
