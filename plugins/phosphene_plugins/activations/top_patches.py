"""Top patches: the image patches of a data set that activate a channel most."""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from phosphene import (
    Fold,
    Reference,
    TensorDataset,
    batch_size,
    hookimpl,
    load_model,
    max_batch,
    method,
    receptive_fields,
    unit_centers,
)
from phosphene.data import Batch, State
from phosphene.results import Patches
from phosphene.roles import Dataset, LayerName, Model
from phosphene.spec import Agrees, Cost, size

from ._channel_numbers import require_channels
from ._relations import largest_activations, statistics_of_a_data_set

MapLayer = Annotated[LayerName | None, Field(description="layer of the channels; default: the last map")]
Channels = Annotated[
    Annotated[list[int], Field(min_length=1)] | Literal["all"] | None,
    Field(description="channel numbers, or all; default: six, evenly spaced"),
]
Count = Annotated[int, Field(ge=1, le=1000, description="patches per channel")]
PerImage = Annotated[int, Field(ge=1, description="largest number of patches from one image, per channel")]


def _oracle() -> None:
    """A blur is largest at the lit pixel, and its receptive field is the 3 x 3 square around it."""
    convolution = nn.Conv2d(1, 1, 3, padding=1, bias=False)
    with torch.no_grad():
        convolution.weight.copy_(torch.tensor([[0.0, 0.1, 0.0], [0.1, 1.0, 0.1], [0.0, 0.1, 0.0]]))
    model = load_model(nn.Sequential(convolution, nn.Flatten(), nn.Linear(64, 2)), input_size=(1, 8, 8))
    images = torch.zeros(3, 1, 8, 8)
    images[0, 0, 7, 2], images[2, 0, 3, 4] = 0.5, 1.0
    result = top_patches(model, TensorDataset(images), layer="0", k=2)
    assert result.ids == ("2", "0") and result.scores.tolist() == [1.0, 0.5]
    assert result.boxes.tolist() == [[2, 3, 5, 6], [6, 1, 8, 4]]
    assert result.positions.tolist() == [[3, 4], [7, 2]] and result.map_size == (8, 8)
    assert torch.equal(result.images[result.image_indices], images[[2, 0]]) and result.channels == (0, 0)
    # Several of one image, read one by one: the lit pixels, then the first of the neighbors of the brightest.
    with max_batch(1):
        result = top_patches(model, TensorDataset(images), layer="0", k=3, per_image=2)
    assert result.ids == ("2", "0", "2") and result.positions.tolist() == [[3, 4], [7, 2], [2, 4]]
    torch.testing.assert_close(result.scores, torch.tensor([1.0, 0.5, 0.1]))
    assert result.images.shape == (2, 1, 8, 8) and result.image_indices.tolist() == [1, 0, 1]
    _multiples_of_one_map()


def _multiples_of_one_map() -> None:
    """Channel c of twelve is c + 1 times the image, in double precision: the default is every second."""
    convolution = nn.Conv2d(1, 12, 1, bias=False, dtype=torch.float64)
    convolution.weight.data = torch.arange(1.0, 13, dtype=torch.float64).view(12, 1, 1, 1)
    network = nn.Sequential(convolution, nn.Flatten(), nn.Linear(48, 2, dtype=torch.float64))
    model = load_model(network, mean=[0.0], std=[1.0], input_size=(1, 2, 2))
    # The left positions are equal, those of the second and the third image, too.
    images = torch.tensor([[0.2, 0.1, 0.2, 0.1], [0.4, 0.3, 0.4, 0.3], [0.4, 0.3, 0.4, 0.3]]).view(3, 1, 2, 2)
    dataset, units = TensorDataset(images), [[1, 0, 0], [1, 1, 0], [2, 0, 0], [2, 1, 0], [0, 0, 0]]
    choices: list[tuple[Any, list[int]]] = [
        (None, [0, 2, 4, 6, 8, 10]),
        ("all", [*range(12)]),
        ([5, 1], [5, 1]),
    ]
    for channels, expected in choices:
        with max_batch(2):
            result = top_patches(model, dataset, channels=channels, k=5, per_image=2)
        assert result.layer == "0" and result.channels == tuple(c for c in expected for _ in range(5))
        factors = torch.tensor(expected, dtype=torch.float64)[:, None] + 1
        scores = factors * torch.tensor([0.4, 0.4, 0.4, 0.4, 0.2], dtype=torch.float64)
        torch.testing.assert_close(result.scores, scores.flatten(), rtol=1e-6, atol=0)
        numbers = [int(name) for name in result.ids]
        located = [[n, *position] for n, position in zip(numbers, result.positions.tolist(), strict=True)]
        assert located == units * len(expected) and result.images.shape == images.shape
    # The same whatever the order in which parts are merged.
    maps, parts = model.features(images.double(), "0")[:, :2], []
    for rows in ([2], [0, 1]):
        values, positions = largest_per_image(maps[rows], torch.tensor(rows), 2)
        parts.append({"scores": values, "units": positions, "map_size": [2, 2]})
    assert TopUnits(model, "0", [0, 1], 5, 2).merge(*parts)["units"].tolist() == [units, units]


@method(
    family="activations",
    references=[
        Reference(
            key="zeiler2014",
            title="Visualizing and Understanding Convolutional Networks",
            authors="Zeiler, Fergus",
            year=2014,
            url="https://arxiv.org/abs/1311.2901",
        ),
        Reference(
            key="girshick2014",
            title="Rich feature hierarchies for accurate object detection and semantic segmentation",
            authors="Girshick, Donahue, Darrell, Malik",
            year=2014,
            url="https://arxiv.org/abs/1311.2524",
        ),
        Reference(
            key="araujo2019",
            title="Computing Receptive Fields of Convolutional Neural Networks",
            authors="Araujo, Norris, Sim",
            year=2019,
            url="https://distill.pub/2019/computing-receptive-fields",
        ),
    ],
    needs=["dataset"],
    cost=Cost(forward=size.dataset),
    oracle=_oracle,
    relations=[
        Agrees(largest_activations, fields=("scores",), where={"k": 3}),
        Agrees(largest_activations, fields=("scores",), where={"k": 6, "per_image": 2, "channels": [5, 1]}),
        *statistics_of_a_data_set("scores"),
    ],
    quick={"k": 2},
    demo={"layer": "features.11", "k": 9},
)
def top_patches(
    model: Model,
    dataset: Dataset,
    *,
    layer: MapLayer = None,
    channels: Channels = None,
    k: Count = 9,
    per_image: PerImage = 1,
) -> Patches:
    """Maximally activating patches: the receptive fields of a channel's largest activations in a data set.

    top-k over images x and positions (h, w) of A_c[h, w](x)

    with at most ``per_image`` positions of one image. A patch is the unit's theoretical receptive field,
    clipped at the image's border. Ties go to the earlier image, then to the upper, then to the left
    position. One pass over the data set: only the k largest activations per channel are stored, and an image
    is stored once for all channels. An interrupted run resumes. Where activations are bounded, as a ReLU6's
    are, the largest are all equal: choose the layer below it.

    Returns:
        M patches, k per channel, the largest activation first: ``channels``, ``ids``, ``scores`` (M,);
        ``positions`` (M, 2), y and x on the layer's map of ``map_size``; ``boxes`` (M, 4), top, left, bottom
        and right of the patch in pixels, the last two exclusive. ``images`` (P, C, H, W) and
        ``image_indices`` (M,): the images that the patches are from.

    Raises:
        InputError: a channel that the layer does not have.
        ModelError: the layer's output is not a map.

    Example::
        from phosphene import run

        result = run("top_patches", dataset="builtin:scenes/32", layer="features.11", channels=[3], k=4)
        result.scores  # (4,), descending
        result.boxes  # (4, 4)

    Source:
        Zeiler and Fergus 2014, section 4 and figure 2; Girshick et al. 2014, section 3.1; receptive fields:
        Araujo et al. 2019.
    """
    layer = layer if layer is not None else model.last_map
    count = model.map_shape(layer)[0]
    if channels is None:
        channels = sorted({i * count // 6 for i in range(6)})
    selected = list(range(count)) if channels == "all" else list(channels)
    require_channels(selected, layer, count)
    size = batch_size(model)
    state = TopUnits(model, layer, None if channels == "all" else selected, k, per_image).run(dataset, size)
    return Patches(
        layer=layer,
        channels=tuple(channel for channel in selected for _ in range(state["units"].shape[1])),
        scores=state["scores"].flatten().to(model.device),
        map_size=tuple(state["map_size"]),
        **located_units(model, dataset, layer, state["units"].flatten(0, 1)),
    )


def located_units(model: Model, dataset: Dataset, layer: str, units: Tensor) -> dict[str, Any]:
    """The fields of ``Patches`` that locate units (M, 3), (image, y, x): images, boxes, ids, ..."""
    numbers, size = units[:, 0].tolist(), batch_size(model)
    distinct = sorted({*numbers})
    parts = [dataset.read(distinct[start : start + size]) for start in range(0, len(distinct), size)]
    images = torch.cat([part.to(model.device, model.dtype) for part in parts])
    row_of = {number: row for row, number in enumerate(distinct)}
    positions = units[:, 1:]
    boxes = receptive_fields(model, layer, (*images.shape[2:],), [(y, x) for y, x in positions.tolist()])
    return {
        "images": images,
        "image_indices": torch.tensor([row_of[number] for number in numbers]).to(model.device),
        "positions": positions.to(model.device),
        "boxes": boxes.to(model.device),
        "ids": tuple(dataset.id(number) for number in numbers),
        "centers": unit_centers(model, layer, images.shape[2:]),
    }


@dataclass
class TopUnits(Fold[State]):
    """Per channel, the largest activations ``scores`` (K, k) and the (image, y, x) of each, (K, k, 3)."""

    title = "top patches"
    model: Model
    layer: str
    channels: list[int] | None
    k: int
    per_image: int

    def update(self, state: State, batch: Batch) -> State:
        images = batch.images.to(self.model.device, self.model.dtype)
        maps = self.model.maps(self.model.features(images, self.layer), images, self.layer)
        if self.channels is not None:
            maps = maps[:, self.channels]
        scores, units = largest_per_image(maps, torch.tensor(batch.indices), self.per_image)
        return self.merge(state, {"scores": scores, "units": units, "map_size": [*maps.shape[2:]]})

    def merge(self, first: State, second: State) -> State:
        if not first:
            first = {"scores": second["scores"][:, :0], "units": second["units"][:, :0]}
        scores, units = (torch.cat([first[name], second[name]], 1) for name in ("scores", "units"))
        # Of equal values the earlier image first, then the upper, then the left position.
        for axis in (2, 1, 0):
            order = units[..., axis].sort(dim=1, stable=True).indices
            scores, units = scores.gather(1, order), units.gather(1, order[..., None].expand(-1, -1, 3))
        scores, order = _top_k(scores, self.k)
        return second | {"scores": scores, "units": units.gather(1, order[..., None].expand(-1, -1, 3))}


def _top_k(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest along the last axis and their indices; of equal values the first."""
    if k == 1:  # max, too, returns the first of equal values
        value, index = values.max(dim=-1, keepdim=True)
        return value, index
    values, order = values.sort(dim=-1, descending=True, stable=True)
    return values[..., :k], order[..., :k]


def largest_per_image(maps: Tensor, indices: Tensor, per_image: int) -> tuple[Tensor, Tensor]:
    """Largest values of (n, K, h, w) maps: (K, n * per_image), and the (image, y, x) of each, on the CPU."""
    values, positions = _top_k(maps.flatten(2), per_image)
    values, positions = (t.transpose(0, 1).cpu() for t in (values, positions))
    images = indices[None, :, None].expand_as(positions)
    units = torch.stack([images, positions // maps.shape[3], positions % maps.shape[3]], 3)
    return values.flatten(1), units.flatten(1, 2)


@hookimpl
def phosphene_methods():
    return [top_patches]
