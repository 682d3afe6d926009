"""What the CAM family shares: how its maps are shown, and the network whose answers are known."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from phosphene import Model, load_model
from phosphene.images import min_max
from phosphene.roles import LayerName
from phosphene.spec import Nonnegative, UnitRange, param

CamLayer = Annotated[
    LayerName | None, Field(description="whose maps are weighted; the last with places when absent")
]


Normalize = Annotated[
    Literal["minmax", "captum", "torchcam", "pgc", "pair"] | None,
    Field(
        description="minmax: each map to [0, 1]; captum: no ReLU; torchcam, pgc (pytorch-grad-cam), "
        "pair (PAIR's saliency): scaled as they do"
    ),
]


SCALED = UnitRange(when=param.normalize.one_of("minmax", "torchcam", "pgc", "pair"))


#: The promises of a method whose equation ends in a ReLU.
PROMISES = [Nonnegative(when=~param.normalize.one_of("captum")), SCALED]


def weighted(weights: Tensor, maps: Tensor) -> Tensor:
    """sum_k w_k A^k: (N, K), (N, K, h, w) -> (N, h, w)."""
    return torch.einsum("nk,nkhw->nhw", weights, maps)


def by_convention(maps: Tensor, images: Tensor, normalize: str | None, *, signed: bool = False) -> Tensor:
    """Maps (N, h, w), before any ReLU, as a library by its convention, or the method itself, shows them.

    signed: whether the method's own equation has no ReLU. "pgc" enlarges them to the picture.
    """
    maps = scaled(maps, normalize, signed=signed)
    return stretched(enlarged(maps, images)) if normalize == "pgc" else maps


def scaled(maps: Tensor, normalize: str | None, *, signed: bool = False) -> Tensor:
    """The same at their own size: what "pgc" does before it enlarges them."""
    if normalize == "captum":
        return maps
    if not signed or normalize in ("pgc", "pair"):
        maps = maps.relu()
    match normalize:
        case "minmax":
            return min_max(maps)
        case "torchcam":
            return stretched(maps, 1e-8)
        case "pgc":
            return stretched(maps)
        case "pair":
            highest = maps.amax((1, 2), keepdim=True)
            return maps / torch.where(highest > 0, highest, 1)
    return maps


def enlarged(maps: Tensor, images: Tensor) -> Tensor:
    """Maps (N, h, w) at the pictures' size, bilinearly."""
    return F.interpolate(maps[:, None], images.shape[2:], mode="bilinear")[:, 0]


def stretched(maps: Tensor, tiny: float = 1e-7) -> Tensor:
    """Min-max as the peers spell it, with a small number in the divisor."""
    maps = maps - maps.amin((1, 2), keepdim=True)
    return maps / (maps.amax((1, 2), keepdim=True) + tiny)


def pooled_network() -> tuple[Model, nn.Linear, Tensor]:
    """A small network with a GAP + linear head, whose maps are layer "1"; its head; pictures for it."""
    torch.manual_seed(0)
    maps, head = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 3)
    network = nn.Sequential(maps, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), head).double()
    model = load_model(network, input_size=(3, 8, 10))
    return model, head, torch.rand(3, 3, 8, 10, dtype=torch.float64)
