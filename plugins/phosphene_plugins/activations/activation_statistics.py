"""Activation statistics: which channels never fire, always do, serve one class, or the background."""

from collections.abc import Sequence
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from phosphene import (
    Method,
    Reference,
    TensorDataset,
    batch_size,
    hookimpl,
    load_model,
    method,
    progress_bar,
    save_progress,
    saved_progress,
)
from phosphene.roles import Dataset, LayerName, Model
from phosphene.spec import Cost, UnitRange, size

from ._channel_responses import responses
from ._channel_results import ChannelStatistics


def colours_have_their_statistics() -> None:
    """Channels that see red, nothing, everything and the rest of the picture are found to be just that."""
    convolution = nn.Conv2d(3, 4, 1)
    assert convolution.bias is not None
    with torch.no_grad():
        convolution.weight.copy_(
            torch.tensor([[1.0, 0, 0], [0, 0, 0], [0, 0, 0], [-1, 0, 0]])[..., None, None]
        )
        convolution.bias.copy_(torch.tensor([0.0, -1.0, 2.0, 0.5]))
    layers = nn.Sequential(convolution, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    images, masks = torch.zeros(3, 3, 4, 4), torch.zeros(3, 4, 4, dtype=torch.bool)
    masks[:, :2, :2] = True
    images[:2, 0, :2, :2] = 1.0  # red on the object of the first two, which alone are of class "red"
    data = TensorDataset(images, ["red", "red", "none"], masks)
    found = activation_statistics(load_model(layers, mean=[0.0] * 3, std=[1.0] * 3), data, layer="1")
    assert found.dead == (1,) and found.always_on == (2,)
    torch.testing.assert_close(found.active, torch.tensor([8 / 48, 0, 1, 40 / 48]))
    torch.testing.assert_close(found.images_active, torch.tensor([2 / 3, 0, 1, 1]))
    assert found.selectivity is not None and found.reliance is not None and found.preferred is not None
    torch.testing.assert_close(found.selectivity, torch.tensor([1.0, 0, 0, 1 / 7]))
    assert [found.classes[i] for i in found.preferred.tolist()] == ["red", "none", "none", "none"]
    torch.testing.assert_close(found.reliance, torch.tensor([0, 0, 0.75, 0.9]))


@method(
    family="activations",
    references=[
        Reference(
            key="morcos2018",
            title="On the importance of single directions for generalization",
            authors="Morcos, Barrett, Rabinowitz, Botvinick",
            year=2018,
            url="https://arxiv.org/abs/1803.06959",
        ),
        Reference(
            key="hu2016",
            title="Network Trimming: A Data-Driven Neuron Pruning Approach",
            authors="Hu, Peng, Tai, Tang",
            year=2016,
            url="https://arxiv.org/abs/1607.03250",
        ),
    ],
    invariants=[UnitRange(field="active"), UnitRange(field="images_active"), UnitRange(field="image_active")],
    needs=["dataset"],
    cost=Cost(forward=size.dataset),
    oracle=colours_have_their_statistics,
    demo={"layer": "features.18"},
)
def activation_statistics(
    model: Model,
    dataset: Dataset,
    *,
    layer: Annotated[LayerName | None, Field(description="whose answers; the last map unless told")] = None,
) -> ChannelStatistics:
    """Say of a layer's channels how often they fire, for which class, and how much of it on the background.

    active_c = share of A_c[h, w](x) > 0,  selectivity_c = (mu_max - mu_rest) / (mu_max + mu_rest),
    reliance_c = sum A+_c (1 - m) / sum A+_c

    ``active`` (C,) is over all places of all pictures, ``images_active`` (C,) the share of pictures where
    a channel fires anywhere, ``image_active`` (N,) a picture's own share. ``dead`` channels never fire,
    ``always_on`` ones everywhere: both say the same of every picture, so they can be pruned, or their
    activation can. mu are class means of A+ = max(A, 0) over pictures and places, mu_max the largest and
    mu_rest the mean of the others; None where the data set knows no classes, or one alone. m is the part
    of a place's cell that the object covers: the map's grid cuts the picture into h x w equal rectangles,
    and where their borders lie within pixels, these count in parts. ``reliance`` is over the pictures
    whose object is known, None where there are none or the layer has one place; ``background`` is what
    an even map would have. Both are 0 for a channel that does not fire. Any layer will do: maps, tokens,
    vectors; "fires" speaks of the answers behind an activation, so name one. Only sums are kept, and
    a run that was cut off goes on. ModelError for a layer whose output is neither maps nor vectors.

    Source: selectivity by Morcos et al. 2018, section 2.4; dead channels by Hu et al. 2016, section 3.
    """
    layer = layer if layer is not None else model.last_map
    state = saved_progress()
    done, classes, pictures = (
        state.pop(n, v) for n, v in (("done", 0), ("classes", []), ("image_active", None))
    )
    sums: dict[str, Tensor] = state
    size = batch_size(model)
    left = -(-(len(dataset) - done) // size)
    for batch in progress_bar(dataset.batches(size, done), "activation statistics", left):
        images = batch.images.to(model.device, model.dtype)
        maps = responses(model, images, layer)
        positive, fires = maps.clamp(min=0), maps > 0
        means = positive.mean((2, 3), dtype=torch.float64).cpu()
        labels = dataset.labels(batch.indices)
        if labels is not None:
            classes += [name for name in dict.fromkeys(labels) if name not in classes]
        _add(sums, places=torch.tensor([maps[:, 0].numel()]), fires=fires.sum((0, 2, 3)))
        _add(sums, images_active=fires.any(3).any(2).sum(0), sum=maps.sum((0, 2, 3), dtype=torch.float64))
        _add(sums, squares=maps.double().square().sum((0, 2, 3)))
        if labels is not None:
            rows = torch.tensor([classes.index(name) for name in labels])
            ones = torch.ones(len(labels), dtype=torch.float64)
            _add(sums, class_sums=torch.zeros(len(classes), maps.shape[1]).double().index_add(0, rows, means))
            _add(sums, class_sizes=torch.zeros(len(classes)).double().index_add(0, rows, ones))
        known, masks = _masks(dataset, batch.indices)
        if known and maps[0, 0].numel() > 1:
            covered = coverage(masks.double(), (maps.shape[2], maps.shape[3])).to(maps.device)
            inside = torch.einsum("nchw,nhw->c", positive[known].double(), covered)
            _add(sums, inside=inside, known=positive[known].sum((0, 2, 3), dtype=torch.float64))
            _add(sums, cells=torch.tensor([covered.numel()]), covered=covered.sum()[None])
        shares = fires.flatten(1).double().mean(1).cpu()
        pictures = shares if pictures is None else torch.cat([pictures, shares])
        done += len(images)
        save_progress(done=done, classes=classes, image_active=pictures, **sums)
    return _statistics(model, layer, dataset, sums, classes, pictures)


def _add(sums: dict[str, Tensor], **found: Tensor) -> None:
    """Add to what was summed so far; of classes there may be more now."""
    for name, value in found.items():
        value = value.detach().cpu()
        if (before := sums.get(name)) is not None:
            more = value.new_zeros(value.shape)
            more[: len(before)] = before
            value = value + more
        sums[name] = value


def _statistics(
    model: Model, layer: str, dataset: Dataset, sums: dict[str, Tensor], classes: list[str], pictures: Tensor
) -> ChannelStatistics:
    def ready(value: Tensor) -> Tensor:
        return value.to(model.device, model.dtype)

    mean = sums["sum"] / sums["places"]
    selectivity, preferred, reliance, background = None, None, None, None
    if len(classes) > 1:
        order = sorted(range(len(classes)), key=classes.__getitem__)
        means = (sums["class_sums"] / sums["class_sizes"][:, None])[order]
        most, preferred = means.max(0)
        rest = (means.sum(0) - most).clamp(min=0) / (len(classes) - 1)
        selectivity = ready(_ratio(most - rest, most + rest))
        preferred = preferred.to(model.device)
    if "known" in sums:
        reliance = ready(_ratio(sums["known"] - sums["inside"], sums["known"]).clamp(0, 1))
        background = ready(1 - sums["covered"] / sums["cells"])[0]
    return ChannelStatistics(
        layer=layer,
        active=ready(sums["fires"] / sums["places"]),
        images_active=ready(sums["images_active"] / len(dataset)),
        mean=ready(mean),
        std=ready((sums["squares"] / sums["places"] - mean.square()).clamp(min=0).sqrt()),
        dead=tuple((sums["fires"] == 0).nonzero().flatten().tolist()),
        always_on=tuple((sums["fires"] == sums["places"]).nonzero().flatten().tolist()),
        image_active=ready(pictures),
        ids=tuple(dataset.id(i) for i in range(len(dataset))),
        selectivity=selectivity,
        preferred=preferred,
        classes=tuple(sorted(classes)) if len(classes) > 1 else (),
        reliance=reliance,
        background=background,
    )


def _ratio(part: Tensor, whole: Tensor) -> Tensor:
    return torch.where(whole > 0, part / torch.where(whole > 0, whole, 1), 0)


def _masks(dataset: Dataset, indices: Sequence[int]) -> tuple[list[int], Tensor]:
    """Which of these pictures' objects are known, by their rows, and the masks."""
    if (all_of_them := dataset.masks(indices)) is not None:
        return list(range(len(indices))), all_of_them
    each = {row: dataset.masks([index]) for row, index in enumerate(indices)}
    found = {row: mask for row, mask in each.items() if mask is not None}
    return list(found), torch.cat(list(found.values())) if found else torch.empty(0)


def coverage(masks: Tensor, grid: tuple[int, int]) -> Tensor:
    """What part of every cell a mask covers, exactly: (n, H, W) -> (n, h, w) on a grid of equal cells."""
    rows, columns = (
        _overlap(side, cells).to(masks) for side, cells in zip(masks.shape[1:], grid, strict=True)
    )
    return rows @ masks @ columns.T


def _overlap(side: int, cells: int) -> Tensor:
    """Row i: how much of cell i, one of ``cells`` over ``side`` pixels, is in each of the pixels."""
    pixel, cell = torch.arange(side).double() * cells, torch.arange(cells).double()[:, None] * side
    shared = torch.minimum(pixel + cells, cell + side) - torch.maximum(pixel, cell)
    return shared.clamp(min=0) / side


@hookimpl
def phosphene_methods() -> list[Method[Any, Any]]:
    return [activation_statistics]
