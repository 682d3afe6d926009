"""Display conventions: how other libraries scale the class activation maps that they show."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from ..errors import UnknownName
from ..images.color import enlarge_maps, min_max

Convention = Literal["minmax", "pytorch-grad-cam", "torchcam", "captum", "pair-saliency"]


def check_convention(name: Convention) -> None:
    """Raise UnknownName, with the nearest valid name, for a convention that does not exist."""
    if name not in get_args(Convention):
        raise UnknownName("convention", name, get_args(Convention))


def scale_maps(maps: Tensor, convention: Convention) -> Tensor:
    """Scale each of the maps (N, h, w) as the library does, at the maps' own size."""
    match convention:
        case "minmax":
            return min_max(maps)
        case "torchcam":
            return _stretch(maps, 1e-8)
        case "pytorch-grad-cam":
            return _stretch(maps.relu())
        case "pair-saliency":
            rectified = maps.relu()
            highest = rectified.amax((1, 2), keepdim=True)
            return rectified / torch.where(highest > 0, highest, 1)
    return maps


def finish_maps(maps: Tensor, size: torch.Size, convention: Convention) -> Tensor:
    """What the library does after scaling: pytorch-grad-cam enlarges, in equal cells, and scales again."""
    return _stretch(enlarge_maps(maps, size)) if convention == "pytorch-grad-cam" else maps


def _stretch(maps: Tensor, epsilon: float = 1e-7) -> Tensor:
    """Min-max scaling with a small number added to the divisor instead of a case for constant maps."""
    maps = maps - maps.amin((1, 2), keepdim=True)
    return maps / (maps.amax((1, 2), keepdim=True) + epsilon)
