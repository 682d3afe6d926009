"""A short drawn video with its optical flow: a shape of a scene moves over a texture that moves itself."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..torch_state import cpu_by_default
from .scenes import SIZE, draw_scenes
from .textures import load_texture

#: Pixels per frame (x, y) that the background moves.
BACKGROUND_MOTION = (-1, 0)

#: Pixels per frame (x, y) that the shape moves.
SHAPE_MOTION = (2, 1)


@dataclass(frozen=True)
class Clip:
    """T frames with their optical flow.

    ``frames`` (T, 3, 64, 64) float32 in [0, 1]; ``masks`` (T, 64, 64) bool, the pixels of the shape;
    ``flows`` (T - 1, 2, 64, 64), the motion (x, y) in pixels from each frame to the next.
    """

    frames: Tensor
    masks: Tensor
    flows: Tensor


@cpu_by_default()
def draw_clip(count: int = 6, *, texture: str = "bricks", scene: int = 0) -> Clip:
    """Draw ``count`` frames, 2 to 16: the shape of a bundled scene moves by (2, 1) pixels per frame.

    The texture behind it moves by (-1, 0). The shape begins at the upper left and is hidden nowhere, so the
    only pixels without a counterpart in the next frame are those that it covers and those at the borders.
    """
    if not 2 <= count <= 16:
        raise ValueError(f"a clip has 2 to 16 frames, not {count}")
    background = load_texture(texture)
    drawn = draw_scenes(1, start=scene)
    mask, shape = drawn.masks[0], drawn.images[0]
    rows, columns = mask.any(1).nonzero()[:, 0], mask.any(0).nonzero()[:, 0]
    top, left = int(rows[0]), int(columns[0])
    box = (slice(top, int(rows[-1]) + 1), slice(left, int(columns[-1]) + 1))
    mask, shape = mask[box], shape[:, *box]
    height, width = mask.shape
    frames, masks = [], []
    for n in range(count):
        y, x = 4 + SHAPE_MOTION[1] * n, 4 + SHAPE_MOTION[0] * n
        start = 20 - BACKGROUND_MOTION[0] * n
        frame = background[:, 30 : 30 + SIZE, start : start + SIZE].clone()
        placed = torch.zeros(SIZE, SIZE, dtype=torch.bool)
        rows_left, columns_left = min(height, SIZE - y), min(width, SIZE - x)
        placed[y : y + rows_left, x : x + columns_left] = mask[:rows_left, :columns_left]
        frame[:, placed] = shape[:, :rows_left, :columns_left][:, mask[:rows_left, :columns_left]]
        frames.append(frame)
        masks.append(placed)
    still, moving = (
        torch.tensor(m, dtype=torch.float32)[:, None, None] for m in (BACKGROUND_MOTION, SHAPE_MOTION)
    )
    flows = torch.stack([torch.where(mask, moving, still) for mask in masks[:-1]])
    return Clip(torch.stack(frames), torch.stack(masks), flows)
