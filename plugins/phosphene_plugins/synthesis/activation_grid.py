"""Activation grid, Olah et al. 2018: what each position of a layer responds to in an image, drawn."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from phosphene import Direction, InputError, Reference, hookimpl, load_model, method
from phosphene.results import Panel, Result
from phosphene.roles import Images, LayerName, Model, Seed
from phosphene.spec import Cost, InvariantTo, PixelRange, param, size

from ..embeddings._features import position_features
from ._activation_maximization import CARTER, RESTARTS
from ._ascent_closed_forms import directions_have_their_closed_forms
from ._direction_tiles import TileParams, TileSide, draw_directions, tile_size

#: Largest number of rows and of columns of the grid by default.
MOST_CELLS = 8


@dataclass(frozen=True, eq=False, kw_only=True)
class ActivationGrid(Result):
    """A tile for every cell of a grid over each image.

    ``images`` (N, C, H, W); ``tiles`` (N, h, w, C, p, q) in [0, 1], the image drawn for each cell;
    ``vectors`` (N, h, w, K), the layer's activations there, and ``scores`` (N, h, w), that of each tile.
    """

    shapes: ClassVar[Mapping[str, str]] = {
        "images": "N C H W",
        "tiles": "N h w C p q",
        "vectors": "N h w K",
        "scores": "N h w",
    }
    groups_per_row: ClassVar[int] = 2

    images: Tensor
    tiles: Tensor
    vectors: Tensor
    scores: Tensor
    layer: str

    def direction(self, image: int, row: int, column: int) -> Direction:
        """The activations of a cell as the target of other methods."""
        count, rows, columns = self.vectors.shape[:3]
        if not (0 <= image < count and 0 <= row < rows and 0 <= column < columns):
            raise InputError(
                f"there are {count} images with {rows}x{columns} cells, so there is no cell "
                f"({row}, {column}) of image {image}"
            )
        return Direction(self.layer, self.vectors[image, row, column])

    def mosaics(self, *, by_norm: bool = True) -> Tensor:
        """The tiles side by side, (N, C, h p, w q).

        ``by_norm``: their opacity is the square root of the vector's norm over the largest of the image.
        """
        tiles = self.tiles
        if by_norm:
            norms = self.vectors.norm(dim=3)
            shares = norms / norms.amax((1, 2), keepdim=True).clamp(min=1e-30)
            opacity = shares.sqrt()[..., None, None, None].to(tiles)
            tiles = opacity * tiles + (1 - opacity)
        count, rows, columns, channels, height, width = tiles.shape
        return tiles.permute(0, 3, 1, 4, 2, 5).reshape(count, channels, rows * height, columns * width)

    def panels(self) -> list[list[Panel]]:
        return [
            [Panel(image), Panel(mosaic, self.layer, is_output=True)]
            for image, mosaic in zip(self.images, self.mosaics(), strict=True)
        ]

    def lines(self) -> list[str]:
        rows, columns = self.tiles.shape[1:3]
        return [f"{self.layer}: {rows}x{columns} tiles of each of {len(self.images)} images"]


def linear_layer_has_its_closed_form() -> None:
    """For a 1x1 convolution A, every step of a tile is along A'v; the cells are means of the activations."""
    conv = nn.Conv2d(3, 4, 1, bias=False).double()
    weight = torch.tensor([[1.0, 0.5, 0.2], [-0.3, 1.0, 0.1], [0.2, -0.6, 0.9], [0.4, 0.3, -0.8]]).double()
    with torch.no_grad():
        conv.weight.copy_(weight[..., None, None])
    mean, std = [0.4, 0.5, 0.6], [0.5, 0.6, 0.8]
    model = load_model(
        nn.Sequential(conv, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2).double()),
        mean=mean, std=std, input_size=(3, 6, 8),
    )  # fmt: skip
    images = torch.rand(2, 3, 6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    images[0, :, :2, :4] = model.mean.double()[:, None, None]  # a cell without activations
    plain: Any = {"layer": "0", "cells": 3, "tile": 8, "jitter": 0, "rotate": 0, "rescale": 1, "seed": 0}
    plain |= {"parametrization": "pixels", "optimizer": "sgd"}
    result = activation_grid(model, images, **plain | {"power": 0.0, "steps": 20, "lr": 1e3})
    normal = (images - model.mean.double()[:, None, None]) / model.std.double()[:, None, None]
    maps = torch.einsum("kc,nchw->nkhw", weight, normal)
    torch.testing.assert_close(result.vectors, F.adaptive_avg_pool2d(maps, 3).permute(0, 2, 3, 1))
    torch.testing.assert_close(
        result.vectors[1, 2, 0], maps[1, :, 4:6, 0:3].mean((1, 2)), msg="cells are boxes of positions"
    )
    assert result.tiles.shape == (2, 3, 3, 3, 8, 8) and result.layer == "0"
    # A linear score is maximal where each pixel is at the end of its range, by the sign of A'v.
    color = model.mean.double()
    units = F.normalize(result.vectors, dim=3)
    slope = torch.einsum("nhwk,kc->nhwc", units, weight) / model.std.double()
    best = torch.maximum(slope * (1 - model.mean.double()), -slope * model.mean.double()).sum(3)
    torch.testing.assert_close(result.scores, best)
    active = result.vectors.norm(dim=3, keepdim=True) > 0
    ends = torch.where(active, (slope > 0).double(), color)
    assert active.sum() == 17
    torch.testing.assert_close(result.tiles, ends[..., None, None].expand_as(result.tiles))
    target = result.direction(1, 2, 0)
    assert target.name == "0" and torch.equal(target.vector, result.vectors[1, 2, 0])
    norms = result.vectors.norm(dim=3)
    opacity = (norms / norms.flatten(1).amax(1)[:, None, None]).sqrt()[..., None, None, None]
    for mosaics, tiles in (
        (result.mosaics(by_norm=False), result.tiles),
        (result.mosaics(), opacity * result.tiles + 1 - opacity),
    ):
        rows = [torch.cat([*tiles[:, row].unbind(1)], 3) for row in range(3)]
        torch.testing.assert_close(mosaics, torch.cat(rows, 2))
    directions_have_their_closed_forms()
    empty = activation_grid(model, images[:1], **plain | {"cells": 2, "power": 2.0, "steps": 1})
    assert empty.tiles.shape == (1, 2, 2, 3, 8, 8)
    few = {**plain, "steps": 1, "cells": 2}
    assert activation_grid(model, images[:1], **few | {"layer": None}).layer == "0"
    assert activation_grid(model, images[:1], **few | {"layer": "1"}).layer == "1"


@method(
    family="synthesis",
    references=[
        Reference(
            key="olah2018",
            title="The Building Blocks of Interpretability",
            authors="Olah, Satyanarayan, Johnson, Carter, Schubert, Ye, Mordvintsev",
            year=2018,
            url="https://distill.pub/2018/building-blocks",
        ),
        CARTER,
    ],
    invariants=[PixelRange(field="tiles")],
    needs=["gradients"],
    cost=Cost(
        forward=size.images * (1 + param.cells * param.cells * (param.steps + RESTARTS)),
        backward=size.images * param.cells * param.cells * (param.steps + RESTARTS),
    ),
    oracle=linear_layer_has_its_closed_form,
    relations=[
        InvariantTo("logit_shift", tolerance=1e-6),
        InvariantTo("batch_order"),
    ],
    quick={"cells": 2, "tile": 16, "steps": 4, "jitter": 1},
    demo={
        "model": "builtin:parts-resnet",
        "images": "builtin:part-scenes/2",
        "layer": "layer2",
        "cells": 6,
        "steps": 40,
    },
)
def activation_grid(
    model: Model,
    images: Images,
    *,
    layer: Annotated[
        LayerName | None,
        Field(description="layer of the activations; default: the last one with feature maps"),
    ] = None,
    cells: Annotated[
        int,
        Field(ge=1, le=64, description="most rows and columns of the grid; a smaller map has its own"),
    ] = MOST_CELLS,
    tile: TileSide = None,
    params: TileParams = TileParams(),
    seed: Seed = None,
) -> ActivationGrid:
    """Activation grid: for each position of a layer, an image of what it responds to in an image.

    x_p = argmax_x 1/Q sum_q <a_q(x), v_p> / ||v_p|| max(cos(a_q(x), v_p), 0.1)^power

    with v_p the activations of the layer at cell p of the image, averaged over its positions, and a_q(x)
    those at position q of the tile x. A combination of channels is drawn, not the channels one by one. In the
    figure tiles are paler where ||v_p|| is small.

    Returns:
        ``tiles`` (N, h, w, C, p, q) in [0, 1], mean color where no channel is active; ``vectors``
        (N, h, w, K): v; ``scores`` (N, h, w) at the last step. ``result.mosaics()`` are the tiles of each
        image side by side, ``result.direction(image, row, column)`` a target for any method.

    Raises:
        ModelError: the layer's output is no map.
        DivergenceError: a tile has no gradient at the start.

    Example::
        from phosphene import run

        result = run("activation_grid", images="builtin:scenes/1", cells=2, tile=32, steps=3, seed=0)
        result.tiles.shape  # (1, 2, 2, 3, 32, 32)

    Source:
        Olah et al. 2018, "What does the network see?"; the objective with the cosine: Carter et al. 2019.
    """
    layer = layer or model.last_map
    with torch.no_grad():
        maps = position_features(model, images, layer)
    # adaptive pooling: each cell is the mean of the positions that it covers
    grid = min(cells, maps.shape[2]), min(cells, maps.shape[3])
    vectors = F.adaptive_avg_pool2d(maps, grid).permute(0, 2, 3, 1).contiguous()
    tiles, scores = draw_directions(model, layer, vectors.flatten(0, 2), tile_size(model, tile), params, seed)
    return ActivationGrid(
        images=images,
        tiles=tiles.unflatten(0, vectors.shape[:3]),
        vectors=vectors.to(model.dtype),
        scores=scores.view(vectors.shape[:3]).to(model.dtype),
        layer=layer,
    )


@hookimpl
def phosphene_methods():
    return [activation_grid]
