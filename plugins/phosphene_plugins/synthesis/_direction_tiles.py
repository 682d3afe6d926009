"""Small images ("tiles") that maximize directions of a layer: dot product times a power of the cosine."""

from __future__ import annotations

from functools import partial
from typing import Annotated, TypeAlias

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from phosphene import Model, ModelError, at_least_float32, batch_size
from phosphene.optimize import FourierImage, PixelImage, optimize_image
from phosphene.spec import ParameterGroup

from ._activation_maximization import (
    RESTARTS,
    CosinePower,
    ImageParametrization,
    Jitter,
    LearningRate,
    Rescale,
    Rotate,
    Steps,
    UpdateRule,
    coarse_noise,
    random_transform,
    start_images,
    without_gradient,
)

#: Side of a tile in pixels by default, where the model's input is not smaller.
TILE_SIDE = 64

#: Standard deviation of the noise in a tile's initial image.
START_NOISE = 0.02

TileSide: TypeAlias = Annotated[
    int | None,
    Field(
        ge=8,
        le=1024,
        description="side of a tile in pixels; default: 64, or the input size of a smaller model and of one "
        "that takes no other",
    ),
]


class TileParams(ParameterGroup):
    """Parameters of the optimization of every tile."""

    power: CosinePower = 2.0
    jitter: Jitter = 4
    rotate: Rotate = 5.0
    rescale: Rescale = 1.1
    parametrization: ImageParametrization = "fourier"
    optimizer: UpdateRule = "adam"
    steps: Steps = 100
    lr: LearningRate = 0.05


def tile_size(model: Model, side: int | None) -> tuple[int, int]:
    """Height and width of the tiles for the parameter ``tile``."""
    if side is not None:
        return side, side
    channels, height, width = model.input_size
    small = min(TILE_SIDE, height), min(TILE_SIDE, width)
    try:
        model.structure_at((channels, *small))
    except ModelError:  # a position embedding, or a classifier of all positions
        return height, width
    return small


def draw_directions(
    model: Model, layer: str, directions: Tensor, size: tuple[int, int], params: TileParams, seed: int | None
) -> tuple[Tensor, Tensor]:
    """Tiles (K, C, *size) that maximize ``directions`` (K, channels) of a layer, and their scores (K,).

    S = 1/P sum_p <a_p, v> / ||v|| max(cos(a_p, v), 0.1)^power,  a_p the activations at position p

    A tile at whose start S has no gradient starts at other noise, of more contrast. A tile of the direction 0
    is the model's mean color, with score 0.
    """
    shape = (len(directions), model.input_size[0], *size)
    tiles = start_images(model, shape, "pixels", 0.0, seed)
    scores = directions.new_zeros(len(directions))
    # equivalent mutants: a row for each entry that is not 0, with the same tile
    nonzero = directions.norm(dim=1).nonzero()[:, 0]
    start = start_images(model, shape, params.parametrization, START_NOISE, seed)[:1]
    for rows in nonzero.split(batch_size(model)):
        units = F.normalize(at_least_float32(directions[rows]), dim=1)
        score = partial(direction_score, model=model, layer=layer, units=units, power=params.power)
        starts = start.repeat(len(rows), 1, 1, 1)
        for attempt in range(1, RESTARTS + 1):  # noise of more contrast where all ReLUs are closed
            closed = without_gradient(score, starts)
            if not len(closed):
                break
            starts[closed] = coarse_noise(starts[closed], (seed or 0) + attempt)
        optimization = optimize_image(
            score,
            (PixelImage if params.parametrization == "pixels" else FourierImage)(starts),
            steps=params.steps,
            lr=params.lr,
            optimizer=params.optimizer,
            transform=random_transform(params.jitter, params.rotate, params.rescale),
            seed=seed,
        )
        tiles[rows], scores[rows] = optimization.images, optimization.scores[-1].to(scores)
    return tiles, scores


def direction_score(images: Tensor, *, model: Model, layer: str, units: Tensor, power: float) -> Tensor:
    """S of ``draw_directions`` for one unit vector (N, channels) per image: (N,)."""
    maps = at_least_float32(model.maps(model.features(images, layer), images, layer))
    dot = torch.einsum("nchw,nc->nhw", maps, units)
    # Where nothing is active the cosine is 0; its square root would have an infinite gradient.
    cosine = dot / maps.square().sum(1).clamp(min=1e-30).sqrt()
    return (dot * cosine.clamp(min=0.1) ** power).mean((1, 2))
