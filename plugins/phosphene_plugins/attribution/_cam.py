"""Functions shared by the CAM methods: weighted sum of feature maps and the result."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from phosphene import Model, Reference, unit_centers
from phosphene.results import Attribution
from phosphene.roles import LayerName
from phosphene.targets import Objective

CamLayer = Annotated[
    LayerName | None,
    Field(
        description="layer whose feature maps are weighted; default: the last layer with spatial positions"
    ),
]

SELVARAJU_2017 = Reference(
    key="selvaraju2017",
    title="Grad-CAM: Visual Explanations from Deep Networks via Gradient-based Localization",
    authors="Selvaraju, Cogswell, Das, Vedantam, Parikh, Batra",
    year=2017,
    url="https://arxiv.org/abs/1610.02391",
)


def weighted_sum(weights: Tensor, maps: Tensor) -> Tensor:
    """sum_k w_k A^k: (N, K), (N, K, h, w) -> (N, h, w)."""
    return torch.einsum("nk,nkhw->nhw", weights, maps)


def rectified_result(
    model: Model, layer: str, images: Tensor, target: Objective, signed: Tensor
) -> Attribution:
    """The result of a method whose map is ReLU(``signed``), with ``signed`` (N, h, w) as ``signed_maps``."""
    result = signed_result(model, layer, images, target, signed)
    return replace(result, maps=signed.relu(), signed_maps=(signed,))


def signed_result(model: Model, layer: str, images: Tensor, target: Objective, maps: Tensor) -> Attribution:
    """The result of a method whose maps (N, h, w) of a layer are signed: its equation has no ReLU."""
    names, centers = target.names(model, len(images)), unit_centers(model, layer, images.shape[2:])
    return Attribution(images=images, maps=maps, targets=names, centers=centers)
