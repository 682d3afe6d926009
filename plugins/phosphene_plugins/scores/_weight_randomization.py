"""Weight randomization: random weights from the top layer down, and the metric of a random network's maps."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from phosphene import Model

from ._evaluate_maps import Metric, ScoringContext
from ._map_similarity import rank_correlation


def layers_with_weights(model: Model) -> list[str]:
    """The executed layers with parameters (not only in their children), from the top down."""
    names = [
        name
        for name, module in model.module.named_modules()
        if name and any(True for _ in _own_parameters(module))
    ]
    order = {name: position for position, name in enumerate(model.structure.layers)}
    return sorted((name for name in names if name in order), key=lambda name: order[name], reverse=True)


def _own_parameters(module: nn.Module) -> Iterator[nn.Parameter]:
    return module.parameters(recurse=False)


@torch.no_grad()
def randomize_weights(model: Model, layers: list[str], generator: torch.Generator) -> None:
    """Draw these layers' weights from normal distributions with each tensor's own mean and deviation."""
    for name in layers:
        for weight in _own_parameters(model.layers[name]):
            noise = torch.randn(weight.shape, generator=generator).to(weight)
            weight.copy_(weight.mean() + noise * weight.std(correction=0))


def split_stages(layers: list[str], stages: int) -> list[list[str]]:
    """The layers, from the top down, in at most ``stages`` parts of about the same number."""
    count = min(stages, len(layers))
    ends = [round(len(layers) * k / count) for k in range(count + 1)]
    return [layers[start:end] for start, end in zip(ends, ends[1:], strict=False)]


class _RandomizedMaps:
    """Rank correlation (n, 1) with the maps of a copy of the model whose weights are drawn with a seed."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._copies: dict[int, Model] = {}

    def __call__(self, context: ScoringContext) -> Tensor | None:
        if context.recompute_maps is None:
            return None
        model = context.model
        if id(model) not in self._copies:
            self._copies[id(model)] = copy = model.copy()
            randomize_weights(copy, layers_with_weights(copy), torch.Generator().manual_seed(self._seed))
        maps = context.recompute_maps(self._copies[id(model)])
        return rank_correlation(maps, context.maps)[:, None]

    def __getstate__(self) -> dict[str, Any]:
        """Without the copies: in another process, the same weights are drawn again."""
        return {"_seed": self._seed, "_copies": {}}


def weight_randomization(seed: int) -> Metric:
    """Rank correlation of a fully randomized network's maps with the trained network's."""
    return Metric(("sanity",), (False,), _RandomizedMaps(seed), recomputations=1)
