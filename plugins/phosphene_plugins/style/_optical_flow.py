"""Optical flow by OpenCV, warping along it, and the pixels where it is consistent."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from phosphene import InputError, MissingExtra
from phosphene.images import to_pil

FlowMethod: TypeAlias = Annotated[
    Literal["dis", "farneback"],
    Field(description="optical flow: dense inverse search, or Farneback's polynomial expansion"),
]

#: Smallest side of frames in which dense inverse search finds a patch.
_DIS_SIDE = 12


def check_flow(method: str, frames: Tensor) -> None:
    """Refuse frames that are too small for the method, and a missing OpenCV, before any work."""
    try:
        import cv2  # noqa: F401
    except ModuleNotFoundError as error:
        raise MissingExtra("optical flow", "video") from error
    if method == "dis" and min(frames.shape[2:]) < _DIS_SIDE:
        height, width = frames.shape[2:]
        raise InputError(
            f'flow="dis" needs frames of {_DIS_SIDE} pixels a side or more, not {height}x{width}; '
            'flow="farneback" takes smaller ones'
        )


def optical_flow(first: Tensor, second: Tensor, method: str) -> Tensor:
    """Motion (2, H, W) as (x, y) in pixels between images (3, H, W): second(p + flow(p)) = first(p).

    Float32, on the device of the images; of 8-bit gray values.
    """
    import cv2

    before, after = (np.asarray(to_pil(image).convert("L")) for image in (first, second))
    flow: Any = None
    if method == "dis":
        search = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
        search.setFinestScale(0)  # full resolution
        flow = search.calc(before, after, None)
    else:
        flow = cv2.calcOpticalFlowFarneback(before, after, flow, 0.5, 3, 15, 3, 5, 1.2, 0)
    return torch.from_numpy(np.ascontiguousarray(flow)).permute(2, 0, 1).contiguous().to(first.device)


def warp(images: Tensor, flow: Tensor) -> Tensor:
    """Bilinear samples of images (N, C, H, W) at p + flow(p), flow (2, H, W): (N, C, H, W)."""
    height, width = flow.shape[1:]
    x, y = _targets(flow)
    grid = torch.stack([(2 * x + 1) / width - 1, (2 * y + 1) / height - 1], 2).to(images)
    grid = grid.expand(len(images), -1, -1, -1)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)


def consistent_pixels(backward: Tensor, forward: Tensor) -> Tensor:
    """Pixels (H, W), bool, of the later frame whose flow (2, H, W) to the earlier one can be relied on.

    Not those whose flow ends outside of the frame, those that the forward flow does not lead back to
    (disoccluded), |w(p + u(p)) + u(p)|^2 > 0.01 (|w(p + u(p))|^2 + |u(p)|^2) + 0.5, nor motion boundaries,
    |grad u_x|^2 + |grad u_y|^2 > 0.01 |u|^2 + 0.002, with the backward flow u and the forward flow w.

    Source: Ruder, Dosovitskiy, Brox 2016, section 4, equations 4 and 5.
    """
    height, width = backward.shape[1:]
    x, y = _targets(backward)
    inside = (x > -0.5) & (x < width - 0.5) & (y > -0.5) & (y < height - 0.5)
    returned = warp(forward[None], backward)[0]
    energy = lambda field: field.square().sum(0)
    disoccluded = energy(returned + backward) > 0.01 * (energy(returned) + energy(backward)) + 0.5
    across = F.pad(backward.diff(dim=2), (0, 1))
    down = F.pad(backward.diff(dim=1), (0, 0, 0, 1))
    boundary = energy(across) + energy(down) > 0.01 * energy(backward) + 0.002
    return inside & ~disoccluded & ~boundary


def _targets(flow: Tensor) -> tuple[Tensor, Tensor]:
    """x and y (H, W) of p + flow(p) in pixels, the upper left pixel's center at (0, 0)."""
    height, width = flow.shape[1:]
    x = torch.arange(width, device=flow.device, dtype=flow.dtype) + flow[0]
    y = torch.arange(height, device=flow.device, dtype=flow.dtype)[:, None] + flow[1]
    return x, y


def warp_error(image: Tensor, warped: Tensor, consistent: Tensor) -> float:
    """Root mean square difference of images (3, H, W) over the consistent pixels (H, W); 0 without any."""
    squares = (image - warped).square().mean(0)[consistent]
    return float(squares.mean().sqrt()) if len(squares) else 0.0
