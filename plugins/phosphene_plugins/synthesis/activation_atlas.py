"""Activation atlas, Carter et al. 2019: a map of a layer's activations, drawn cell by cell."""

from __future__ import annotations

import sys
import types
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal
from unittest import mock

import torch
from pydantic import Field
from torch import Tensor, nn

from phosphene import (
    Direction,
    Fold,
    InputError,
    MissingExtra,
    TensorDataset,
    at_least_float32,
    batch_size,
    hookimpl,
    layer_gradients,
    load_model,
    max_batch,
    method,
    to_float64,
)
from phosphene.data import Batch, Rows, State
from phosphene.results import Panel, Result
from phosphene.roles import Dataset, LayerName, Model, Seed
from phosphene.spec import Cost, InvariantTo, PixelRange, param, size
from phosphene.targets import Objective, parse_target

from ..embeddings._principal_components import principal_components
from ._activation_maximization import CARTER, RESTARTS
from ._direction_tiles import TileParams, TileSide, draw_directions, tile_size


@dataclass(frozen=True, eq=False, kw_only=True)
class ActivationAtlas(Result):
    """Tiles of the cells of a map of activations.

    ``points`` (n, 2): the sampled activations on the map, in [0, 1], x to the right and y upwards. For each
    cell with enough of them: ``cells`` (K, 2), its row from the top and column; ``counts`` (K,); ``vectors``
    (K, channels), the mean activations; ``attributions`` (K,), their mean contribution to the score of
    ``target``, zeros without a target; ``tiles`` (K, C, p, q) in [0, 1]; ``scores`` (K,), that of each tile.
    ``grid``: rows and columns of the map.
    """

    shapes: ClassVar[Mapping[str, str]] = {
        "points": "n 2",
        "cells": "K 2",
        "counts": "K",
        "vectors": "K channels",
        "attributions": "K",
        "tiles": "K C p q",
        "scores": "K",
    }

    points: Tensor
    cells: Tensor
    counts: Tensor
    vectors: Tensor
    attributions: Tensor
    tiles: Tensor
    scores: Tensor
    layer: str
    grid: int
    target: str = ""

    def direction(self, cell: int) -> Direction:
        """The mean activations of a cell, by its number, as the target of other methods."""
        if not 0 <= cell < len(self.vectors):
            raise InputError(f"there are {len(self.vectors)} cells, so there is no number {cell}")
        return Direction(self.layer, self.vectors[cell])

    def mosaic(self) -> Tensor:
        """The tiles on the map, (C, grid p, grid q), white elsewhere.

        With a target, a tile is paler the smaller its attribution is, and white where that is not positive.
        """
        channels, height, width = self.tiles.shape[1:]
        canvas = self.tiles.new_ones(channels, self.grid * height, self.grid * width)
        opacity = torch.ones_like(self.attributions)
        if self.target:
            opacity = self.attributions.clamp(min=0) / self.attributions.max().clamp(min=1e-30)
        for tile, (row, column), share in zip(
            self.tiles, self.cells.tolist(), opacity.to(self.tiles), strict=True
        ):
            rows = slice(row * height, (row + 1) * height)
            columns = slice(column * width, (column + 1) * width)
            canvas[:, rows, columns] = share * tile + (1 - share)
        return canvas

    def panels(self) -> list[list[Panel]]:
        title = f"{self.layer}: {self.target}" if self.target else self.layer
        return [[Panel(self.mosaic(), title, is_output=True)]]

    def lines(self) -> list[str]:
        of = f", attributed to {self.target}" if self.target else ""
        return [
            f"{self.layer}: {len(self.points)} activations in {len(self.cells)} of {self.grid}x{self.grid} "
            f"cells{of}"
        ]


class _Recorder:
    """In place of umap-learn: its points are the first two coordinates."""

    arguments: ClassVar[list[dict[str, Any]]] = []

    def __init__(self, **arguments: Any) -> None:
        self.arguments.append(arguments)

    def fit_transform(self, vectors: Any) -> Any:
        torch.set_num_threads(torch.get_num_threads() + 1)
        return vectors[:, :2]


def _arguments_of_umap() -> None:
    """At most all other activations are neighbors, and of more than ten the start is spectral."""
    vectors = torch.rand(18, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    threads = torch.get_num_threads()
    with mock.patch.dict(sys.modules, {"umap": types.SimpleNamespace(UMAP=_Recorder)}):
        for count, neighbors, init in ((18, 15, "spectral"), (11, 10, "spectral"), (10, 9, "random")):
            points = _project(vectors[:count], "umap", 15)
            torch.testing.assert_close(points, vectors[:count, :2], atol=1e-6, rtol=0)
            arguments = _Recorder.arguments.pop()
            assert (arguments["n_neighbors"], arguments["init"]) == (neighbors, init)
            assert arguments["metric"] == "cosine" and arguments["n_jobs"] == 1
            assert 0 <= arguments["random_state"] < 2**31
    assert torch.get_num_threads() == threads


def four_clusters_have_a_cell_each() -> None:
    """Activations in four clusters on a plane: a cell for each, with its mean and whitened direction."""
    conv = nn.Conv2d(3, 3, 1, bias=False).double()
    head = nn.Linear(3, 2).double()
    with torch.no_grad():
        conv.weight.copy_(torch.eye(3)[..., None, None])
        head.weight.copy_(torch.tensor([[3.0, -2.0, 1.0], [1.0, 4.0, 0.5]]))
    network = nn.Sequential(conv, nn.AdaptiveAvgPool2d(1), nn.Flatten(), head)
    mean, std = [0.1, 0.2, 0.3], [0.5, 0.6, 0.8]
    model = load_model(network, mean=mean, std=std, input_size=(3, 2, 3))
    # Colors of four kinds of uniform image; red varies most, then green.
    colors = torch.tensor([[0.9, 0.3, 0.5], [0.05, 0.35, 0.5], [0.8, 0.8, 0.5], [0.2, 0.75, 0.5]]).double()
    kinds = [0, 1, 2, 3, 0, 1, 2, 0, 1]
    images = colors[kinds][:, :, None, None].expand(-1, -1, 2, 3).contiguous()
    plain: Any = {
        **{"layer": "0", "projection": "pca", "grid": 2, "min_count": 4, "positions": 2, "seed": 0},
        **{"tile": 8, "jitter": 0, "rotate": 0, "rescale": 1, "parametrization": "pixels", "power": 0.0},
        **{"optimizer": "sgd", "lr": 1e3, "steps": 20},
    }
    with max_batch(4):
        result = activation_atlas(model, TensorDataset(images), attributed_to=1, shrinkage=0.0, **plain)
    features = (colors - model.mean.double()) / model.std.double()
    sampled = features[kinds].repeat_interleave(2, 0)
    # Cells are in reading order; kind 3 has two activations, too few for a cell.
    order = [int((features - v).norm(dim=1).argmin()) for v in result.vectors]
    assert sorted(order) == [0, 1, 2]
    torch.testing.assert_close(result.vectors, features[order])
    assert result.counts.tolist() == [2 * kinds.count(k) for k in order]
    torch.testing.assert_close(result.attributions, features[order] @ head.weight[1].detach() / 6)
    # The first component, red, runs to the right, and the second, green, upwards.
    expected_cells = {0: [1, 1], 1: [1, 0], 2: [0, 1]}
    assert result.cells.tolist() == [expected_cells[k] for k in order]
    assert result.points.shape == (18, 2) and result.target == "class 1"
    # The tile of a linear layer is black or white in each channel, by the sign of the whitened direction.
    moment = sampled.T @ sampled / len(sampled)
    whitened = features[order] @ torch.linalg.pinv(moment)
    torch.testing.assert_close(result.tiles, (whitened > 0).double()[..., None, None].expand(-1, -1, 8, 8))
    torch.testing.assert_close(
        result.scores,
        torch.maximum(
            whitened * (1 - model.mean.double()) / model.std.double(),
            -whitened * model.mean.double() / model.std.double(),
        ).sum(1)
        / whitened.norm(dim=1),
    )
    # Without whitening, by the sign of the activations themselves.
    unwhitened = activation_atlas(model, TensorDataset(images), shrinkage=1.0, **plain)
    signs = (unwhitened.vectors > 0).double()[..., None, None].expand(-1, -1, 8, 8)
    torch.testing.assert_close(unwhitened.tiles, signs)
    assert unwhitened.target == "" and (unwhitened.attributions == 0).all()
    shares = result.attributions.clamp(min=0) / result.attributions.max()
    for atlas, opacity in ((result, shares), (unwhitened, torch.ones(len(unwhitened.cells)))):
        expected = torch.ones(3, 16, 16, dtype=torch.float64)
        for tile, (row, column), share in zip(atlas.tiles, atlas.cells.tolist(), opacity, strict=True):
            painted = 1 + share * (tile - 1)
            expected[:, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8] = painted
        torch.testing.assert_close(atlas.mosaic(), expected)
    assert torch.equal(result.direction(1).vector, result.vectors[1])
    shrunk = 0.75 * moment + 0.25 * moment.diagonal().mean() * torch.eye(3).double()
    torch.testing.assert_close(_whitening(sampled, 0.25), torch.linalg.inv(shrunk))
    _arguments_of_umap()
    line = torch.stack([torch.arange(101.0), torch.full((101,), 3.0)], 1)
    expected = torch.stack([((line[:, 0] - 1) / 98).clamp(0, 1), torch.zeros(101)], 1)
    torch.testing.assert_close(_unit_square(line), expected)
    few = {**plain, "steps": 1}
    assert activation_atlas(model, TensorDataset(images.float()), **few | {"layer": None}).layer == "0"


@method(
    family="synthesis",
    references=[CARTER],
    invariants=[PixelRange(field="tiles")],
    needs=["gradients", "dataset"],
    cost=Cost(
        forward=size.dataset + param.grid * param.grid * (param.steps + RESTARTS),
        backward=size.dataset + param.grid * param.grid * (param.steps + RESTARTS),
    ),
    oracle=four_clusters_have_a_cell_each,
    relations=[InvariantTo("logit_shift", tolerance=1e-6)],
    quick={
        **{"grid": 2, "tile": 16, "steps": 4, "jitter": 1},
        **{"projection": "pca", "positions": 2, "min_count": 1},
    },
    demo={"dataset": "builtin:scenes/500", "layer": "relu4_1", "positions": 4, "grid": 8},
)
def activation_atlas(
    model: Model,
    dataset: Dataset,
    *,
    layer: Annotated[
        LayerName | None,
        Field(description="layer of the activations; default: the last one with feature maps"),
    ] = None,
    positions: Annotated[
        int, Field(ge=1, le=10_000, description="number of random positions per image, at most all")
    ] = 1,
    projection: Annotated[
        Literal["umap", "pca"], Field(description="map to two dimensions: UMAP, or principal components")
    ] = "umap",
    neighbors: Annotated[
        int, Field(ge=2, le=1000, description="neighbors per activation in the graph of UMAP, at most all")
    ] = 15,
    attributed_to: Annotated[
        int | str | None,
        Field(description="class or unit of a class atlas, by whose attribution cells are weighted"),
    ] = None,
    grid: Annotated[int, Field(ge=1, le=200, description="rows and columns of the map")] = 10,
    min_count: Annotated[
        int, Field(ge=1, le=100_000, description="fewest activations of a cell that is drawn")
    ] = 3,
    shrinkage: Annotated[
        float,
        Field(
            ge=0,
            le=1,
            description="part of the second moments that is replaced by their mean before whitening; 1: no "
            "whitening",
        ),
    ] = 0.1,
    tile: TileSide = None,
    params: TileParams = TileParams(),
    seed: Seed = None,
) -> ActivationAtlas:
    """Activation atlas: a map of a layer's activations over a data set, each cell drawn as a direction.

    M = E[a a'],  v_k = ((1 - s) M + s tr(M)/C 1)^-1 mean_{i in cell k} w_i a_i

    x_k = argmax_x 1/Q sum_q <a_q(x), v_k> / ||v_k|| max(cos(a_q(x), v_k), 0.1)^power

    a_i are the layer's C activations at random positions of the images. They are projected to two dimensions
    by UMAP, the plane between their 1st and 99th percentiles is divided into grid x grid cells, and of each
    cell the mean activation is whitened and drawn as a tile. Nearby cells are similar to the network. With
    ``attributed_to`` it is a class atlas: the means are weighted by w_i = max(<a_i, dS/da_i>, 0), the
    contribution to its score, and tiles are paler the less their cell contributes; without, w_i = 1.

    Returns:
        ``tiles`` (K, C, p, q) in [0, 1] of the K cells with enough activations, in reading order, their
        ``cells``, ``counts``, ``vectors`` and ``attributions``, and all ``points``. ``result.mosaic()`` is
        the atlas as one image, ``result.direction(k)`` a target for any method.

    Raises:
        InputError: too few activations for a map, or no cell with ``min_count`` of them.
        MissingExtra: umap-learn is not installed.
        ModelError: the layer's output is no map.

    Example::
        from phosphene import run

        few = {"projection": "pca", "grid": 2, "tile": 32, "steps": 3, "seed": 0}
        result = run("activation_atlas", dataset="builtin:scenes/12", **few)
        result.mosaic().shape  # (3, 64, 64)

    Source:
        Carter et al. 2019, sections "Looking at a single activation" to "Class atlases".
    """
    layer = layer or model.last_map
    objective = None if attributed_to is None else parse_target(attributed_to, model)
    state = _Samples(model, layer, objective, positions, int(torch.randint(2**31, ()))).run(
        dataset, batch_size(model)
    )
    vectors = to_float64(state["vectors"].tensor().flatten(0, 1))
    attributions = to_float64(state["attributions"].tensor().flatten())
    points = _unit_square(_project(vectors, projection, neighbors))
    columns_and_rows = (points * grid).long().clamp(max=grid - 1)
    numbers = (grid - 1 - columns_and_rows[:, 1]) * grid + columns_and_rows[:, 0]
    weights = attributions.clamp(min=0) if objective is not None else torch.ones_like(attributions)
    counts = numbers.bincount(minlength=grid * grid)
    totals = torch.zeros(grid * grid, dtype=torch.float64).index_add(0, numbers, weights)
    drawn = ((counts >= min_count) & (totals > 0)).nonzero()[:, 0]
    if not len(drawn):
        contributing = " that contribute to the target" if objective is not None else ""
        raise InputError(
            f"none of {grid}x{grid} cells has {min_count} of {len(points)} activations{contributing}: use "
            "more images or positions, a smaller grid or min_count"
        )
    sums = torch.zeros(grid * grid, vectors.shape[1], dtype=torch.float64)
    means = sums.index_add(0, numbers, weights[:, None] * vectors)[drawn] / totals[drawn, None]
    contributions = torch.zeros_like(totals).index_add(0, numbers, attributions)[drawn] / counts[drawn]
    directions = means @ _whitening(vectors, shrinkage)
    tiles, scores = draw_directions(
        model, layer, directions.to(model.device, model.dtype), tile_size(model, tile), params, seed
    )
    return ActivationAtlas(
        points=points.to(tiles),
        cells=torch.stack([drawn // grid, drawn % grid], 1).to(model.device),
        counts=counts[drawn].to(model.device),
        vectors=means.to(tiles),
        attributions=contributions.to(tiles),
        tiles=tiles,
        scores=scores,
        layer=layer,
        grid=grid,
        target="" if objective is None else objective.names(model, 1)[0],
    )


@dataclass
class _Samples(Fold[State]):
    """Activations (N, P, C) at P random positions of every image, and their attributions (N, P)."""

    title = "activations"
    model: Model
    layer: str
    target: Objective | None
    positions: int
    seed: int

    def start(self) -> State:
        return {"vectors": Rows(), "attributions": Rows()}

    def update(self, state: State, batch: Batch) -> State:
        model, layer = self.model, self.layer
        images = batch.images.to(model.device, model.dtype)
        if self.target is None:
            with torch.no_grad():
                maps = at_least_float32(model.maps(model.features(images, layer), images, layer))
            contributions = torch.zeros_like(maps[:, 0])
        else:
            ((maps, gradients),) = layer_gradients(model, images, self.target, layer)
            maps = at_least_float32(maps)
            contributions = (maps * gradients).sum(1)
        maps, contributions = maps.flatten(2).transpose(1, 2).cpu(), contributions.flatten(1).cpu()
        count = min(self.positions, maps.shape[1])
        # A generator for each image: the positions do not depend on the batches.
        chosen = torch.stack(
            [
                torch.randperm(maps.shape[1], generator=torch.Generator().manual_seed(self.seed + index))
                for index in batch.indices
            ]
        )[:, :count]
        vectors = maps.gather(1, chosen[..., None].expand(-1, -1, maps.shape[2]))
        state["vectors"].write(batch.indices[0], vectors)
        state["attributions"].write(batch.indices[0], contributions.gather(1, chosen))
        return state


def _project(vectors: Tensor, projection: str, neighbors: int) -> Tensor:
    """Activations (n, C) in two dimensions, (n, 2)."""
    count = len(vectors)
    if count < 4 or vectors.shape[1] < 2:
        raise InputError(
            f"a map needs at least four activations of two channels, not {count} of {vectors.shape[1]}"
        )
    if projection == "pca":
        return principal_components(vectors, 2)[0]
    try:
        from umap import UMAP  # an extra
    except ImportError as error:
        raise MissingExtra("umap", "umap") from error
    mapping = UMAP(
        n_neighbors=min(neighbors, count - 1),
        # The spectral initialization fails for very few points.
        init="spectral" if count > 10 else "random",
        metric="cosine",
        random_state=int(torch.randint(2**31, ())),
        n_jobs=1,
    )
    threads = torch.get_num_threads()  # numba, at its first call, changes the number for the process
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", category=UserWarning)
            points = mapping.fit_transform(vectors.float().cpu().numpy())
    finally:
        torch.set_num_threads(threads)
    return torch.from_numpy(points).double()


def _unit_square(points: Tensor) -> Tensor:
    """Points (n, 2) scaled to [0, 1] between their 1st and 99th percentiles; outliers on the border."""
    low, high = (points.quantile(q, dim=0) for q in (0.01, 0.99))
    extent = torch.where(high > low, high - low, 1)
    return ((points - low) / extent).clamp(0, 1)


def _whitening(vectors: Tensor, shrinkage: float) -> Tensor:
    """((1 - s) M + s tr(M)/C 1)^-1 of the second moments M of activations (n, C); their pseudoinverse."""
    moments = vectors.T @ vectors / len(vectors)
    mean = moments.diagonal().mean()
    shrunk = (1 - shrinkage) * moments + shrinkage * mean * torch.eye(len(moments), dtype=moments.dtype)
    return torch.linalg.pinv(shrunk, hermitian=True)


@hookimpl
def phosphene_methods():
    return [activation_atlas]
