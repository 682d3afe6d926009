"""Maximally activating patches: the pieces of a data set that a channel answers most."""

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from phosphene import (
    Reference,
    TensorDataset,
    batch_size,
    hookimpl,
    load_model,
    method,
    progress_bar,
    receptive_fields,
    save_progress,
    saved_progress,
)
from phosphene.errors import InputError
from phosphene.results import Patches
from phosphene.roles import Dataset, LayerName, Model
from phosphene.spec import Cost, size

Channels = Annotated[
    Annotated[list[int], Field(min_length=1)] | Literal["all"] | None,
    Field(description="which channels, or all; six, evenly spread, unless told"),
]
Count = Annotated[int, Field(ge=1, le=1000, description="patches per channel")]
PerImage = Annotated[int, Field(ge=1, description="most patches from one picture")]


def _oracle() -> None:
    """A blur answers most where the lit pixel is, and its field is the three by three around it."""
    convolution = nn.Conv2d(1, 1, 3, padding=1, bias=False)
    with torch.no_grad():
        convolution.weight.copy_(torch.tensor([[0.0, 0.1, 0.0], [0.1, 1.0, 0.1], [0.0, 0.1, 0.0]]))
    model = load_model(nn.Sequential(convolution, nn.Flatten(), nn.Linear(64, 2)), input_size=(1, 8, 8))
    images = torch.zeros(3, 1, 8, 8)
    images[0, 0, 7, 2], images[2, 0, 3, 4] = 0.5, 1.0
    found = top_patches(model, TensorDataset(images), layer="0", k=2)
    assert found.ids == ("2", "0") and found.scores.tolist() == [1.0, 0.5]
    assert found.boxes.tolist() == [[2, 3, 5, 6], [6, 1, 8, 4]]


@method(
    family="activations",
    references=[
        Reference(
            key="springenberg2015",
            title="Striving for Simplicity: The All Convolutional Net",
            authors="Springenberg, Dosovitskiy, Brox, Riedmiller",
            year=2015,
            url="https://arxiv.org/abs/1412.6806",
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
    quick={"k": 2},
    demo={"layer": "features.11", "k": 9},
)
def top_patches(
    model: Model,
    dataset: Dataset,
    *,
    layer: Annotated[LayerName | None, Field(description="whose answers; the last map unless told")] = None,
    channels: Channels = None,
    k: Count = 9,
    per_image: PerImage = 1,
) -> Patches:
    """Show the pieces of a data set's pictures that a layer's channels answer most.

    Over all images x and places (h, w): the k largest A_c[h, w](x), at most ``per_image`` of a
    picture; each one's patch is what its unit can see, its receptive field, exact and clipped at
    the picture's border. Ties go to the earlier picture, then to the upper, then the left place.
    ``layer``: the last map unless told. ``channels``: their numbers, or "all" in one pass over the
    data; six, evenly spread, unless told. Only the best so far are kept, and a picture that several
    channels answer is held once, so a data set of any size will do; a run that was cut off goes on.
    Where an answer is limited, as a ReLU6's is, the strongest are all equal: name the layer below it.
    InputError for a channel that is not there, ModelError for a layer without places.
    """
    return strongest(model, dataset, layer, channels, k, per_image)


@torch.no_grad()
def strongest(
    model: Model,
    dataset: Dataset,
    layer: str | None,
    channels: list[int] | Literal["all"] | None,
    k: int,
    per_image: int,
) -> Patches:
    """One pass over the data set: what ``top_patches`` and ``guided_patches`` share."""
    layer = layer if layer is not None else model.last_map
    count = model.map_shape(layer)[0]
    if channels is None:
        channels = sorted({i * count // 6 for i in range(6)})
    chosen = list(range(count)) if channels == "all" else list(channels)
    for channel in chosen:
        if not 0 <= channel < count:
            raise InputError(f"layer {layer!r} has {count} channels, so there is no number {channel}")
    size = batch_size(model)
    done, grid, scores, where = 0, (0, 0), torch.empty(len(chosen), 0), torch.empty(len(chosen), 0, 3).long()
    if state := saved_progress():
        done, grid, scores, where = (state[name] for name in ("done", "grid", "scores", "where"))
    left = -(-(len(dataset) - done) // size)
    for batch in progress_bar(dataset.batches(size, done), "top patches", left):
        images = batch.images.to(model.device, model.dtype)
        maps = model.maps(model.features(images, layer), images)
        new_scores, new_where = _peaks(
            maps if channels == "all" else maps[:, chosen], torch.tensor(batch.indices), per_image
        )
        scores, order = _sorted(torch.cat([scores.to(new_scores), new_scores], 1), k)
        where = torch.cat([where, new_where], 1).gather(1, order[..., None].expand(-1, -1, 3))
        grid = (maps.shape[2], maps.shape[3])
        save_progress(done=batch.indices[-1] + 1, grid=list(grid), scores=scores, where=where)
    rows = where.flatten(0, 1).tolist()
    found = sorted({i for i, _, _ in rows})
    parts = [dataset.read(found[start : start + size]) for start in range(0, len(found), size)]
    pictures = torch.cat([part.to(model.device, model.dtype) for part in parts])
    boxes = receptive_fields(model, layer, (*pictures.shape[2:],), [(y, x) for _, y, x in rows])
    held = {i: row for row, i in enumerate(found)}
    return Patches(
        layer=layer,
        channels=tuple(c for c in chosen for _ in range(where.shape[1])),
        scores=scores.flatten().to(model.device),
        images=pictures,
        sources=torch.tensor([held[i] for i, _, _ in rows]).to(model.device),
        places=where.flatten(0, 1)[:, 1:].to(model.device),
        grid=(grid[0], grid[1]),
        boxes=boxes.to(model.device),
        ids=tuple(dataset.id(i) for i, _, _ in rows),
    )


def _sorted(values: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """The largest along the last axis and their places; equal ones in the order they came in."""
    if most == 1:  # the first of equal ones, too
        value, place = values.max(dim=-1, keepdim=True)
        return value, place
    values, order = values.sort(dim=-1, descending=True, stable=True)
    return values[..., :most], order[..., :most]


def _peaks(maps: Tensor, indices: Tensor, per_image: int) -> tuple[Tensor, Tensor]:
    """The strongest places of (n, K, h, w) maps: (K, n * per_image) values and (image, y, x) of each."""
    values, places = _sorted(maps.flatten(2), per_image)
    values, places = (t.transpose(0, 1).cpu() for t in (values, places))
    rows = indices[None, :, None].expand_as(places)
    where = torch.stack([rows, places // maps.shape[3], places % maps.shape[3]], 3)
    return values.flatten(1), where.flatten(1, 2)


@hookimpl
def phosphene_methods():
    return [top_patches]
