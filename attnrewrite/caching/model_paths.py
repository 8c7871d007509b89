"""The modules of one model by their paths: which one a graph is of, and what the config says about its attention."""

from __future__ import annotations

import functools
import itertools
import logging
import weakref
from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor, nn

from attnrewrite.analysis.kinds import Kind, SiteKind, is_named_temporal
from attnrewrite.caching.method import CacheMethod
from attnrewrite.options.cache_callbacks import weight_of
from attnrewrite.options.cache_config import FasterCacheConfig, PyramidAttentionBroadcastConfig

__all__ = ["ModelPaths"]

log = logging.getLogger("attnrewrite")


class _Place(NamedTuple):
    """Where a module is, as one of its parameters shows it.

    Attributes:
        path: of the module in the model.
        parameter: it may be replaced, and another one may then have its ``id``.
        name: of the parameter in the model; empty if the model does not have it.
    """

    path: str
    parameter: weakref.ref[Tensor]
    name: str

    def is_of(self, parameter: Tensor, model: nn.Module) -> bool:
        """Whether it is still the place of this parameter: the same tensor, and under the same name."""
        if self.parameter() is not parameter:
            return False
        try:
            found: object = functools.reduce(getattr, self.name.split("."), model) if self.name else parameter
        except AttributeError:
            return False
        return found is parameter


class ModelPaths:
    """The modules of a model, which is referred to weakly; of a graph that is used alone, nothing.

    Attributes:
        name: of the model's class, for messages.
        is_graph: whether the calls are those of a single graph, and not of a model.
    """

    def __init__(
        self,
        model: nn.Module | None,
        config: PyramidAttentionBroadcastConfig | FasterCacheConfig,
        method: CacheMethod,
    ) -> None:
        """Args:
        model: None for a single graph.
        config: validated.
        method: the config's.
        """
        self.name = "the graph" if model is None else type(model).__qualname__
        self.is_graph = model is None
        self._model = None if model is None else weakref.ref(model)
        self._config = config
        self._method = method
        self._paths: dict[tuple[str, str, int], _Place] = {}
        self._kinds: dict[tuple[str, Kind], Kind | None] = {}
        self._ambiguous: set[str] = set()

    @property
    def clock(self) -> Callable[[], object]:
        """The timestep callback."""
        assert self._config.current_timestep_callback is not None  # The config is validated.
        return self._config.current_timestep_callback

    def module(self, path: str = "") -> nn.Module:
        """The module at a path; the model itself where it has none there (the path is that of a part's own module)."""
        model = None if self._model is None else self._model()
        if model is None:
            return nn.Module()
        try:
            return model.get_submodule(path)
        except AttributeError:
            return model

    def path_of(self, path: str, parameter: Tensor | None, parameter_path: str) -> str:
        """The path in the model of a module that is at ``path`` in its own graph.

        Args:
            parameter: one that the graph is called with.
            parameter_path: where the graph has that parameter.
        """
        if parameter is None or self.is_graph:
            return path
        model = self.module()
        key = path, parameter_path, id(parameter)
        place = self._paths.get(key)
        if place is None or not place.is_of(parameter, model):
            named = itertools.chain(
                model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)
            )
            # The whole model's graph has the parameter under one of its names; a part's graph under the end of one.
            names = [name for name, each in named if each is parameter and f".{name}".endswith(f".{parameter_path}")]
            name = min(names, key=len, default="")
            own = f"{name.removesuffix(parameter_path)}{path}".strip(".")
            place = _Place(own, weakref.ref(parameter), name)
            living = {key: place for key, place in self._paths.items() if place.parameter() is not None}
            self._paths = {**living, key: place}
        return place.path

    def kind_at(self, path: str, detected: SiteKind) -> Kind | None:
        """As which kind the attention of the module at ``path`` is stored; None if it is not.

        It is for a graph that modules at several paths share, and was compiled for another one of them.

        Args:
            detected: the kind that the graph shows.
        """
        key = path, detected.kind
        if key not in self._kinds:
            kind = detected.kind
            if kind == "spatial" and not detected.is_proved and is_named_temporal(path):
                kind = "temporal"
            self._kinds[key] = self._method.kind_of(path, kind)
        return self._kinds[key]

    def is_ambiguous(self, fingerprint: str, called_before: bool) -> bool:
        """Whether several layers may call a graph without parameters, so that nothing tells which one does.

        Only one layer does where the whole model has no parameters and no two modules with the same forward, and the
        graph is called once in the model's call. Once they may, they may always. It is warned of, but for a graph that
        is used alone.

        Args:
            called_before: whether the graph was called before in this call of the model; for a graph that is used
                alone, in this step.
        """
        if fingerprint not in self._ambiguous and (called_before or self._has_several_layers):
            self._ambiguous.add(fingerprint)
            if self.is_graph:
                return True
            log.warning(
                "%s: a graph that computes attention has no parameters, so it cannot be told which attention is which, "
                "and none of them is reused. A graph break between the projections and the attention causes that",
                self.name,
            )
        return fingerprint in self._ambiguous

    @property
    def _has_several_layers(self) -> bool:
        """Whether layers may share a graph that has no parameters."""
        module = self.module()
        forwards = [type(each).forward for each in module.modules()]
        return any(True for _ in module.parameters()) or len(set(forwards)) < len(forwards)

    def attention_weight(self, path: str) -> float:
        """FasterCache's weight for the attention at a path; 0 for a method that has none."""
        config = self._config
        if not isinstance(config, FasterCacheConfig):
            return 0.0
        assert config.attention_weight_callback is not None  # The config is validated.
        return weight_of(config.attention_weight_callback, self.module(path), "attention_weight_callback")

    def guidance_weights(self) -> tuple[float, float]:
        """FasterCache's weights for low and high frequencies at this call."""
        config = self._config
        assert isinstance(config, FasterCacheConfig)
        low, high = config.low_frequency_weight_callback, config.high_frequency_weight_callback
        assert low is not None and high is not None  # The config is validated.
        model = self.module()
        return (
            weight_of(low, model, "low_frequency_weight_callback"),
            weight_of(high, model, "high_frequency_weight_callback"),
        )
