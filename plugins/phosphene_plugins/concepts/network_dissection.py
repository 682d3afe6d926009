"""Network dissection: overlap of thresholded channels with masks of concepts, Bau et al. 2017."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, cast

import torch
from pydantic import Field
from torch import Tensor, nn

from phosphene import (
    Fold,
    InputError,
    Reference,
    TensorDataset,
    batch_size,
    hookimpl,
    load_model,
    max_batch,
    method,
    unit_centers,
)
from phosphene.data import Batch, State
from phosphene.images import Centers, charts, enlarge_maps, to_display
from phosphene.results import Panel, Result
from phosphene.roles import Dataset, LayerName, Model
from phosphene.spec import Cost, InvariantTo, ScalesWith, UnitRange, size

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Channels in the figure, those of largest overlap.
MAX_CHANNELS = 6


@dataclass(frozen=True, eq=False, kw_only=True)
class Dissection(Result):
    """Overlap of every channel of a layer with every concept.

    ``iou`` (C, K): intersection over union of the pixels at which channel c is above its threshold and the
    pixels of concept k, over the images; ``thresholds`` (C,); ``concepts``: K names. ``examples``: for the
    channels of largest overlap, ``example_channels``, the image (3, H, W) on which each is largest, and
    ``example_maps`` (M, H, W), the channel on it, enlarged.
    """

    shapes: ClassVar[Mapping[str, str]] = {
        "iou": "C K",
        "thresholds": "C",
        "concepts": "K",
        "examples": "M 3 H W",
        "example_maps": "M H W",
        "example_channels": "M",
    }
    groups_per_row: ClassVar[int] = 3

    layer: str
    concepts: tuple[str, ...]
    iou: Tensor
    thresholds: Tensor
    examples: Tensor
    example_maps: Tensor
    example_channels: tuple[int, ...]
    count: int

    def detectors(self, least: float = 0.04) -> dict[int, str]:
        """Channels whose largest overlap is at least ``least``, and the concept of each."""
        values, concepts = self.iou.max(1)
        chosen = (values >= least).nonzero()[:, 0].tolist()
        return {channel: self.concepts[int(concepts[channel])] for channel in chosen}

    def lines(self) -> list[str]:
        names = self.detectors()
        concepts = len(set(names.values()))
        head = (
            f"{self.layer}: {len(names)} of {len(self.iou)} channels detect one of {concepts} concepts, "
            f"{self.count} images"
        )
        rows = [self._title(channel) for channel in self.example_channels]
        return [head, *rows]

    def _title(self, channel: int) -> str:
        value, concept = self.iou[channel].max(0)
        return f"channel {channel}: {self.concepts[int(concept)]}, IoU {float(value):.2f}"

    def panels(self) -> list[list[Panel]]:
        return [
            [Panel(image), Panel(self._outlined(image, heat, channel), self._title(channel), is_output=True)]
            for image, heat, channel in zip(
                self.examples, self.example_maps, self.example_channels, strict=True
            )
        ]

    def _outlined(self, image: Tensor, heat: Tensor, channel: int) -> Tensor:
        """The image, dark where the channel is below its threshold."""
        above = (heat > self.thresholds[channel]).to(image)
        return to_display(image) * (0.25 + 0.75 * above)

    def draw(self) -> Figure:
        """The overlap of channels with concepts, and how many channels detect each concept."""
        figure = charts.new_figure(4.6)
        left, right = cast(Any, figure.subplots(1, 2, width_ratios=(1.4, 1)))
        order = self.iou.max(1).values.sort(descending=True).indices[:40].tolist()
        image = left.imshow(self.iou[order].float().cpu().numpy(), cmap="magma", aspect="auto", vmin=0)
        figure.colorbar(image, ax=left, shrink=0.7, label="IoU")
        names = [charts.plain_label(name) for name in self.concepts]
        left.set_xticks(range(len(names)), names, fontsize=7, rotation=90)
        left.set_yticks(range(len(order)), [str(channel) for channel in order], fontsize=5)
        left.set_ylabel("channel, of largest IoU first", fontsize=8)
        detected = list(self.detectors().values())
        right.barh(range(len(names)), [detected.count(name) for name in self.concepts], color="tab:blue")
        right.set_yticks(range(len(names)), names, fontsize=7)
        right.invert_yaxis()
        right.set_xlabel("channels with IoU of at least 0.04", fontsize=8)
        right.spines[["top", "right"]].set_visible(False)
        return figure


def _oracle() -> None:
    """A channel that is the red of the image overlaps with red objects as two squares do."""
    same = nn.Conv2d(3, 3, 1, bias=False)
    network = nn.Sequential(same, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2)).double()
    with torch.no_grad():
        same.weight.copy_(torch.eye(3)[..., None, None])
    model = load_model(network, mean=[0.0] * 3, std=[1.0] * 3, input_size=(3, 6, 8))
    images, masks = torch.zeros(3, 3, 6, 8, dtype=torch.float64), torch.zeros(3, 6, 8, dtype=torch.bool)
    images[0, 0, 1:4, 1:5], masks[0, 1:4, 3:7] = 1.0, True  # 12 red pixels, 6 of them in the mask of 12
    images[1, 1, 2:4, 2:4], masks[1, 2:4, 2:4] = 0.5, True  # green and the mask are the same
    images[:, 2] = torch.linspace(0.1, 0.9, 48).view(6, 8).double()
    data = TensorDataset(images, ["apple", "leaf", "apple"], masks)
    with max_batch(2):
        result = network_dissection(model, data, layer="0", quantile=12 / 144)
    assert result.concepts == ("apple", "leaf") and result.count == 3
    # The 12 largest of 144 pixels: all red ones; all green ones and eight zeros, which are not above 0.
    assert result.thresholds[:2].tolist() == [0.0, 0.0]
    torch.testing.assert_close(result.iou[0], torch.tensor([6 / 18, 0 / 16]).double())
    torch.testing.assert_close(result.iou[1], torch.tensor([0.0, 1.0]).double())
    # Blue is the same in all images: the four largest pixels of each, the last ones, outside all masks.
    assert float(result.thresholds[2]) == float(images[0, 2].flatten()[-5])
    assert result.iou[2].tolist() == [0.0, 0.0]
    assert result.detectors() == {0: "apple", 1: "leaf"} and result.example_channels[:2] == (1, 0)
    assert torch.equal(result.examples[0], images[1]) and torch.equal(result.example_maps[1], images[0, 0])
    assert torch.equal(result.examples[2], images[0])  # the first of equal ones
    single = load_model(network.float(), mean=[0.0] * 3, std=[1.0] * 3, input_size=(3, 6, 8))
    assert network_dissection(single, data).layer == "0"
    result = network_dissection(single, data, layer="1", quantile=0.5)
    assert result.layer == "1" and result.iou.dtype == result.thresholds.dtype == torch.float32
    # Of one position, the mean: green is above its threshold in the second image alone, everywhere.
    torch.testing.assert_close(result.iou[1], torch.tensor([0, 4 / 48]))
    _maps_are_enlarged_between_centers()


@torch.no_grad()
def _maps_are_enlarged_between_centers() -> None:
    """Units of stride 2 are centered at even pixels; between two of them the map is their mean."""
    draw = torch.Generator().manual_seed(0)
    images = torch.rand(5, 3, 6, 8, generator=draw, dtype=torch.float64)
    masks, labels = torch.rand(5, 6, 8, generator=draw) < 0.4, ["b", "a", "b", "b", "a"]
    layer = nn.Conv2d(3, 7, 1, 2).double()
    network = nn.Sequential(layer, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(7, 2)).double()
    model = load_model(network, mean=[0.0] * 3, std=[1.0] * 3, input_size=(3, 6, 8))
    with max_batch(2):
        result = network_dissection(model, TensorDataset(images, labels, masks), quantile=0.2)
    maps = layer(images)
    between = torch.tensor([[1, 0, 0, 0], [0.5, 0.5, 0, 0], [0, 1, 0, 0], [0, 0.5, 0.5, 0], [0, 0, 1, 0]])
    rows = torch.cat([between[:, :3], between[4:, :3]]).double()
    columns = torch.cat([between, torch.tensor([[0, 0, 0.5, 0.5], *[[0, 0, 0, 1]] * 2])]).double()
    enlarged = rows @ maps @ columns.T
    thresholds = maps.transpose(0, 1).flatten(1).sort(dim=1, descending=True).values[:, 12]  # of 60
    torch.testing.assert_close(result.thresholds, thresholds)
    active = enlarged > thresholds[:, None, None]
    for number, name in enumerate("ab"):
        own = torch.tensor([label == name for label in labels])
        both = (active[own] & masks[own, None]).sum((0, 2, 3))
        union = active.sum((0, 2, 3)) + masks[own].sum() - both
        torch.testing.assert_close(result.iou[:, number], both.double() / union)
    assert len(result.example_channels) == MAX_CHANNELS == 6 and type(result.example_channels[0]) is int
    for n, channel in enumerate(result.example_channels):
        image = int(maps[:, channel].amax((1, 2)).argmax())
        torch.testing.assert_close(result.example_maps[n], enlarged[image, channel])


@method(
    family="concepts",
    references=[
        Reference(
            key="bau2017",
            title="Network Dissection: Quantifying Interpretability of Deep Visual Representations",
            authors="Bau, Zhou, Khosla, Oliva, Torralba",
            year=2017,
            url="https://arxiv.org/abs/1704.05796",
        )
    ],
    invariants=[UnitRange(field="iou")],
    relations=[
        InvariantTo("dataset_order", fields=("iou", "thresholds")),
        InvariantTo("normalization", fields=("iou",)),
        ScalesWith("logits", power=0, fields=("iou", "thresholds")),
    ],
    needs=["dataset"],
    cost=Cost(forward=size.dataset * 2 + MAX_CHANNELS),
    oracle=_oracle,
    quick={"quantile": 0.1},
    demo={"dataset": "builtin:scenes/300", "quantile": 0.05},
)
def network_dissection(
    model: Model,
    dataset: Dataset,
    *,
    layer: Annotated[LayerName | None, Field(description="layer to dissect; default: the last map")] = None,
    quantile: Annotated[
        float, Field(gt=0, lt=1, description="share of all positions at which a channel counts as active")
    ] = 0.005,
) -> Dissection:
    """Network dissection: intersection over union of a channel's largest activations and concepts' masks.

    IoU_ck = sum_x |M_c(x) & L_k(x)| / sum_x |M_c(x) | L_k(x)|

    M_c(x) = A_c(x) > T_c,  P(A_c > T_c) = quantile

    with A_c the channel's map enlarged to the image, where its units are centered, T_c its threshold over all
    positions of all images, and L_k(x) the pixels of concept k in image x: the mask of an image's object, if
    it is of class k, else none. The positions of ties at the threshold are not active.

    Returns:
        ``iou`` (C, K) for the C channels and the K classes of the data set; ``thresholds`` (C,);
        ``detectors()``: channels of an overlap of at least 0.04 and the concept of each.

    Raises:
        InputError: a data set without classes, or an image without a mask.
        ModelError: the layer's output is no map.

    Example::
        from phosphene import run

        result = run("network_dissection", dataset="builtin:scenes/32", quantile=0.05)
        result.iou.shape  # (128, 10)
        result.detectors()

    Source:
        Bau et al. 2017, section 3.
    """
    layer = layer if layer is not None else model.last_map
    labels = dataset.labels(range(len(dataset)))
    if labels is None:
        raise InputError("the data set has no classes: a concept is the class of an image's object")
    concepts = sorted({str(label) for label in labels})
    channels, height, width = model.map_shape(layer)
    most = max(1, int(quantile * len(dataset) * height * width)) + 1
    largest = _Largest(model, layer, most).run(dataset, batch_size(model))
    thresholds = largest["values"].amin(1)
    first = dataset.read([0])
    centers = unit_centers(model, layer, first.shape[2:])
    counts = _Overlap(model, layer, thresholds, concepts, centers).run(dataset, batch_size(model))
    union = counts["active"][:, None] + counts["pixels"] - counts["both"]
    # equivalent mutants: where the union is empty the quotient is not used
    iou = torch.where(union > 0, counts["both"].double() / union.clamp(min=1), 0)
    chosen = iou.amax(1).sort(descending=True, stable=True).indices[:MAX_CHANNELS].tolist()
    examples = torch.cat([dataset.read([int(largest["image"][c])]) for c in chosen])
    images = examples.to(model.device, model.dtype)
    parts = images.split(batch_size(model))
    all_maps = torch.cat([model.maps(model.features(part, layer), part, layer) for part in parts])
    maps = all_maps[torch.arange(len(chosen)), chosen]
    return Dissection(
        layer=layer,
        concepts=tuple(concepts),
        iou=iou.to(model.device, model.dtype),
        thresholds=thresholds.to(model.device, model.dtype),
        examples=images,
        example_maps=enlarge_maps(maps, images.shape[2:], centers),
        example_channels=tuple(chosen),
        count=len(dataset),
    )


@dataclass
class _Largest(Fold[State]):
    """The largest activations of every channel, (C, most), and the image of the largest one."""

    title = "thresholds"
    model: Model
    layer: str
    most: int

    def update(self, state: State, batch: Batch) -> State:
        images = batch.images.to(self.model.device, self.model.dtype)
        maps = self.model.maps(self.model.features(images, self.layer), images, self.layer)
        values = maps.transpose(0, 1).flatten(1)
        # max returns the first of equal values: the image of the lowest index.
        row = maps.amax((2, 3)).max(0).indices
        part = {
            # equivalent mutants: axis 1 is the last
            "values": values.topk(min(self.most, values.shape[1]), dim=1).values.cpu(),
            "image": torch.tensor(batch.indices)[row.cpu()],
        }
        return self.merge(state, part)

    def merge(self, first: State, second: State) -> State:
        if not first:
            return second
        values = torch.cat([first["values"], second["values"]], 1)
        peaks, images = (s["values"].amax(1) for s in (first, second)), (first["image"], second["image"])
        one, other = peaks
        is_first = (one > other) | (one == other) & (images[0] < images[1])
        # equivalent mutants: axis 1 is the last
        top = values.topk(min(self.most, values.shape[1]), dim=1).values
        return {"values": top, "image": torch.where(is_first, *images)}


@dataclass
class _Overlap(Fold[State]):
    """Counts of pixels: active ones (C,), those of concepts (K,), and both (C, K)."""

    title = "overlap"
    model: Model
    layer: str
    thresholds: Tensor
    concepts: list[str]
    centers: Centers | None

    def start(self) -> State:
        channels, concepts = len(self.thresholds), len(self.concepts)
        return {
            "active": torch.zeros(channels, dtype=torch.int64),
            "pixels": torch.zeros(concepts, dtype=torch.int64),
            "both": torch.zeros(channels, concepts, dtype=torch.int64),
        }

    def update(self, state: State, batch: Batch) -> State:
        if (masks := batch.masks) is None:
            raise InputError(
                f"image {batch.dataset.id(batch.indices[0])} or one of the next "
                f"{len(batch.indices) - 1} has no mask of its object, which dissection needs"
            )
        images = batch.images.to(self.model.device, self.model.dtype)
        maps = self.model.maps(self.model.features(images, self.layer), images, self.layer)
        counts = self.start()
        for image_maps, mask, label in zip(maps, masks, batch.labels or (), strict=True):
            concept = self.concepts.index(label)
            enlarged = enlarge_maps(image_maps, images.shape[2:], self.centers)
            active = enlarged > self.thresholds.to(enlarged)[:, None, None]
            counts["active"] += active.sum((1, 2)).cpu()
            counts["pixels"][concept] += int(mask.sum())
            counts["both"][:, concept] += (active & mask.to(active.device)).sum((1, 2)).cpu()
        return self.merge(state, counts)


@hookimpl
def phosphene_methods():
    return [network_dissection]
