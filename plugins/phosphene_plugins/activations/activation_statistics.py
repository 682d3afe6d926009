"""Activation statistics: activation frequency, class selectivity and background reliance of channels."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from phosphene import (
    Fold,
    Method,
    Reference,
    TensorDataset,
    batch_size,
    hookimpl,
    load_model,
    max_batch,
    method,
    to_float64,
)
from phosphene.data import Batch, Rows, State
from phosphene.roles import Dataset, LayerName, Model
from phosphene.spec import Agrees, Cost, UnitRange, size

from ._channel_statistics_result import ChannelStatistics
from ._relations import (
    active_fraction,
    background_reliance,
    selectivity,
    standard_deviation,
    statistics_of_a_data_set,
)


class _PartlyMasked(TensorDataset):
    """A data set of which only the first image has masks of its objects."""

    def masks(self, indices: Sequence[int]) -> Tensor | None:
        return None if any(indices) else super().masks(indices)


def _oracle() -> None:
    """Four channels (red, never active, always active, not red) have the statistics computed by hand."""
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
    images[:2, 0, :2, :2] = 1.0  # the object is red in both images of class "red" and in no other
    data = TensorDataset(images, ["red", "red", "none"], masks)
    model = load_model(layers, mean=[0.0] * 3, std=[1.0] * 3)
    with max_batch(2):
        result = activation_statistics(model, data, layer="1")
    assert (str(result.dead), str(result.always_on)) == ("(1,)", "(2,)")
    torch.testing.assert_close(result.active_fraction, torch.tensor([8 / 48, 0, 1, 40 / 48]))
    torch.testing.assert_close(result.active_image_fraction, torch.tensor([2 / 3, 0, 1, 1]))
    assert result.selectivity is not None and result.preferred_class is not None
    torch.testing.assert_close(result.selectivity, torch.tensor([1.0, 0, 0, 1 / 7]))
    names = [result.classes[i] for i in result.preferred_class.tolist()]
    assert names == ["red", "none", "none", "none"]
    assert result.background_reliance is not None
    torch.testing.assert_close(result.background_reliance, torch.tensor([0, 0, 0.75, 0.9]))
    assert result.background_area is not None and abs(float(result.background_area) - 0.75) < 1e-6
    torch.testing.assert_close(result.mean, torch.tensor([1 / 6, 0, 2, 5 / 12]))
    torch.testing.assert_close(result.std, torch.tensor([5**0.5 / 6, 0, 0, 5**0.5 / 12]))
    torch.testing.assert_close(result.image_active_fraction, torch.full((3,), 0.5))
    assert result.ids == ("0", "1", "2") and result.classes == ("none", "red")
    partly = activation_statistics(model, _PartlyMasked(images, objects=masks), layer="1").background_reliance
    torch.testing.assert_close(partly, torch.tensor([0, 0, 0.75, 1]))
    # The inputs of the classifier have one position, and one class has no selectivity.
    vectors = activation_statistics(model, TensorDataset(images[1:], ["red", "red"], masks[1:]), layer="3")
    torch.testing.assert_close(vectors.mean, torch.tensor([1 / 8, 0, 2, 7 / 16]))
    assert vectors.background_reliance is vectors.selectivity is vectors.preferred_class is None
    # Three classes at the default layer; channel 3 is 3/8, 3/8 and 1/2 on average.
    three = activation_statistics(model, TensorDataset(images, ["a", "b", "c"]))
    assert three.layer == "1" and three.selectivity is not None
    torch.testing.assert_close(three.selectivity, torch.tensor([1 / 3, 0, 0, 1 / 7]))
    # Two positions are enough for the background. Of 3 x 3 pixels, the middle one is in four cells.
    ones = nn.Conv2d(3, 1, (4, 3))
    assert ones.bias is not None
    ones.weight.data.zero_(), ones.bias.data.fill_(1.0)
    halves = load_model(nn.Sequential(ones, nn.Flatten(), nn.Linear(2, 2)), input_size=(3, 4, 4))
    of_halves = activation_statistics(halves, data, layer="0")
    torch.testing.assert_close(of_halves.background_reliance, torch.tensor([0.75]))
    middle = torch.zeros(1, 3, 3)
    middle[0, 1, 1] = 1
    torch.testing.assert_close(mask_coverage(middle, (2, 2)), torch.full((1, 2, 2), 1 / 9))


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
    invariants=[
        UnitRange(field="active_fraction"),
        UnitRange(field="active_image_fraction"),
        UnitRange(field="image_active_fraction"),
    ],
    needs=["dataset"],
    cost=Cost(forward=size.dataset),
    oracle=_oracle,
    relations=[
        Agrees(active_fraction, fields=("active_fraction",)),
        Agrees(standard_deviation, fields=("std",)),
        Agrees(selectivity, fields=("selectivity",)),
        Agrees(background_reliance, fields=("background_reliance",), networks=("flat",)),
        *statistics_of_a_data_set("active_image_fraction", "mean", "std", "image_active_fraction"),
    ],
    demo={"layer": "features.18"},
)
def activation_statistics(
    model: Model,
    dataset: Dataset,
    *,
    layer: Annotated[LayerName | None, Field(description="layer to analyze; default: the last map")] = None,
) -> ChannelStatistics:
    """Activation statistics of channels: frequency, dead channels, class selectivity, background reliance.

    active_c = fraction of A_c[h, w](x) > 0

    selectivity_c = (mu_max - mu_rest) / (mu_max + mu_rest)

    reliance_c = sum A+_c (1 - m) / sum A+_c

    A_c is the activation of channel c, A+ = max(A, 0). mu are the class means of A+ over images and
    positions, mu_max the largest and mu_rest the mean of the others. m is the fraction of a position's cell
    that the object covers: the map's grid divides the image into h x w equal rectangles, and a pixel on a
    border counts in parts. Selectivity and reliance are 0 for a channel that is never active.

    ``layer`` may output maps, tokens (class tokens are dropped) or vectors; "active" is meaningful behind an
    activation function. A dead channel is never active and an always-on one is active everywhere, so the
    channel, or its activation function, can be pruned. Only sums are stored, and an interrupted run resumes.

    Returns:
        ``active_fraction`` (C,): fraction of all positions at which a channel is active.
        ``active_image_fraction`` (C,): fraction of images with an active position.
        ``image_active_fraction`` (N,): fraction of the layer's units that are active in an image.
        ``mean`` and ``std`` (C,): of the activations over images and positions.
        ``dead`` and ``always_on``: channel numbers.
        ``selectivity`` and ``preferred_class`` (C,): None without classes, or with a single one.
        ``background_reliance`` (C,) over the images with masks, and ``background_area``, a scalar, its value
        for a constant map; both None without masks, or for a layer with a single position.

    Raises:
        ModelError: the layer's output is neither maps, tokens nor vectors.

    Example::
        from phosphene import run

        result = run("activation_statistics", dataset="builtin:scenes/32", layer="features.18")
        result.active_fraction.shape  # (128,)
        result.most_selective(3)  # channel, class, selectivity

    Source:
        Morcos et al. 2018, section 2.4 (selectivity); Hu et al. 2016, section 3 (dead channels).
    """
    layer = layer if layer is not None else model.last_map
    return _Statistics(model, dataset, layer).run(dataset, batch_size(model))


@dataclass
class _Statistics(Fold[ChannelStatistics]):
    """Sums over the images and positions; ``class_sums`` and ``class_sizes`` by the sorted ``classes``."""

    title = "activation statistics"
    model: Model
    dataset: Dataset
    layer: str

    def start(self) -> State:
        return {"image_active": Rows(), "classes": []}

    def update(self, state: State, batch: Batch) -> State:
        model = self.model
        images = batch.images.to(model.device, model.dtype)
        features = model.features(images, self.layer)
        # (n, C, h, w); a vector is a map with one position.
        maps = features[:, :, None, None] if features.ndim == 2 else model.maps(features, images, self.layer)
        active, positive = maps > 0, maps.clamp(min=0)
        sums: State = {
            "positions": torch.tensor([maps[:, 0].numel()]),
            "active": active.sum((0, 2, 3)),
            "active_images": active.any(3).any(2).sum(0),
            "sum": to_float64(maps).sum((0, 2, 3)),
            "squares": to_float64(maps).square().sum((0, 2, 3)),
        }
        classes: list[str] = []
        if (labels := batch.labels) is not None:
            classes = sorted({*labels})
            rows = torch.tensor([classes.index(name) for name in labels])
            means = to_float64(positive).mean((2, 3)).cpu()
            sums["class_sums"] = means.new_zeros(len(classes), maps.shape[1]).index_add(0, rows, means)
            sums["class_sizes"] = torch.bincount(rows).double()
        rows_with_masks, masks = _object_masks(batch)
        if rows_with_masks and maps.shape[2:].numel() > 1:
            covered = mask_coverage(masks.double(), (maps.shape[2], maps.shape[3]))
            masked = to_float64(positive[rows_with_masks])
            sums["on_object"] = torch.einsum("nchw,nhw->c", masked, covered.to(masked.device))
            sums["masked_sum"] = masked.sum((0, 2, 3))
            sums |= {"cells": torch.tensor([covered.numel()]), "covered": covered.sum()[None]}
        fractions = Rows()
        fractions.write(batch.indices[0], to_float64(active.flatten(1)).mean(1))
        sums = {name: value.detach().cpu() for name, value in sums.items()}
        return self.merge(state, sums | {"image_active": fractions, "classes": classes})

    def merge(self, first: State, second: State) -> State:
        sums = first | second
        sums["image_active"] = first["image_active"].merge(second["image_active"])
        sums["classes"] = sorted({*first["classes"], *second["classes"]})
        for name in first.keys() & second.keys() - {"image_active", "classes"}:
            values = [first[name], second[name]]
            if name in ("class_sums", "class_sizes"):
                values = [_align(s[name], s["classes"], sums["classes"]) for s in (first, second)]
            sums[name] = values[0] + values[1]
        return sums

    def finish(self, state: State) -> ChannelStatistics:
        return _statistics(self.model, self.layer, self.dataset, state)


def _align(values: Tensor, classes: list[str], all_classes: list[str]) -> Tensor:
    """Rows of classes among those of all classes; zeros for the others."""
    rows = torch.tensor([all_classes.index(name) for name in classes])
    return values.new_zeros(len(all_classes), *values.shape[1:]).index_copy(0, rows, values)


def _statistics(model: Model, layer: str, dataset: Dataset, sums: State) -> ChannelStatistics:
    def convert(value: Tensor) -> Tensor:
        return value.to(model.device, model.dtype)

    mean = sums["sum"] / sums["positions"]
    classes = sums["classes"] if len(sums["classes"]) > 1 else []
    selectivity, preferred_class, reliance, area = None, None, None, None
    if classes:
        means = sums["class_sums"] / sums["class_sizes"][:, None]
        largest, preferred_class = means.max(0)
        rest = (means.sum(0) - largest).clamp(min=0) / (len(classes) - 1)
        selectivity = convert(_ratio(largest - rest, largest + rest))
        preferred_class = preferred_class.to(model.device)
    if "masked_sum" in sums:
        on_background = sums["masked_sum"] - sums["on_object"]
        # equivalent mutants: only rounding errors are outside [0, 1]
        reliance = convert(_ratio(on_background, sums["masked_sum"]).clamp(0, 1))
        area = convert(1 - sums["covered"] / sums["cells"])[0]
    return ChannelStatistics(
        layer=layer,
        active_fraction=convert(sums["active"] / sums["positions"]),
        active_image_fraction=convert(sums["active_images"] / len(dataset)),
        mean=convert(mean),
        std=convert((sums["squares"] / sums["positions"] - mean.square()).clamp(min=0).sqrt()),
        dead=tuple((sums["active"] == 0).nonzero().flatten().tolist()),
        always_on=tuple((sums["active"] == sums["positions"]).nonzero().flatten().tolist()),
        image_active_fraction=convert(sums["image_active"].tensor()),
        ids=tuple(dataset.id(i) for i in range(len(dataset))),
        selectivity=selectivity,
        preferred_class=preferred_class,
        classes=tuple(classes),
        background_reliance=reliance,
        background_area=area,
    )


def _ratio(part: Tensor, total: Tensor) -> Tensor:
    """part / total, and 0 where the total is 0."""
    return torch.where(total > 0, part / total, 0)


def _object_masks(batch: Batch) -> tuple[list[int], Tensor]:
    """The rows of a batch whose objects have masks, and these masks."""
    if (masks := batch.masks) is not None:
        return list(range(len(batch.indices))), masks
    single = {row: batch.dataset.masks([index]) for row, index in enumerate(batch.indices)}
    available = {row: mask for row, mask in single.items() if mask is not None}
    return list(available), torch.cat(list(available.values())) if available else torch.empty(0)


def mask_coverage(masks: Tensor, grid: tuple[int, int]) -> Tensor:
    """Fraction of every cell that a mask covers, exactly: (n, H, W) -> (n, h, w) on a grid of equal cells."""
    rows, columns = (_overlap(masks.shape[axis + 1], grid[axis]).to(masks) for axis in (0, 1))
    return rows @ masks @ columns.T


def _overlap(side: int, cells: int) -> Tensor:
    """(cells, side): how much of each of ``cells`` equal cells over ``side`` pixels each pixel covers."""
    pixel, cell = torch.arange(side).double() * cells, torch.arange(cells).double()[:, None] * side
    shared = torch.minimum(pixel + cells, cell + side) - torch.maximum(pixel, cell)
    return shared.clamp(min=0) / side


@hookimpl
def phosphene_methods() -> list[Method[Any, Any]]:
    return [activation_statistics]
