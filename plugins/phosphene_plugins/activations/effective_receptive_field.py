"""Effective receptive field: how much a unit depends on each pixel, Luo et al. 2016."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from phosphene import (
    Fold,
    InputError,
    ModelError,
    Reference,
    TensorDataset,
    batch_size,
    hookimpl,
    load_model,
    max_batch,
    method,
    receptive_fields,
    to_float64,
    unit_centers,
)
from phosphene.data import Batch, State
from phosphene.roles import Dataset, LayerName, Model
from phosphene.spec import Cost, InvariantTo, Nonnegative, ScalesWith, size

from ._dense_maps import dense_map_network
from ._receptive_field_result import ReceptiveField


def _oracle() -> None:
    """In a linear network of two convolutions the field is that of their kernels' convolution."""
    first, second = nn.Conv2d(2, 3, 3, padding=1, stride=2), nn.Conv2d(3, 4, (3, 5), padding=(1, 2))
    network = nn.Sequential(first, second, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)).double()
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in (first, second):
            layer.weight.normal_(generator=draw)
    std = torch.tensor([0.2, 0.5], dtype=torch.float64)
    model = load_model(network, mean=[0.4, 0.5], std=std.tolist(), input_size=(2, 17, 21))
    images = torch.rand(3, 2, 17, 21, generator=draw, dtype=torch.float64)
    with max_batch(2):
        result = effective_receptive_field(model, TensorDataset(images), layer="1")
    # The derivative of the sum of the central unit's channels: the kernels, transposed, of an impulse.
    impulse = torch.zeros(1, 4, 9, 11, dtype=torch.float64)
    impulse[:, :, 4, 5] = 1
    weights = first.weight.detach(), second.weight.detach()
    inner = F.conv_transpose2d(impulse, weights[1], padding=(1, 2))
    expected = F.conv_transpose2d(inner, weights[0], stride=2, padding=1)[0] / std[:, None, None]
    torch.testing.assert_close(result.field, expected.abs().sum(0))
    assert result.position == (4, 5) and result.center == (8.0, 10.0) and result.count == 3
    assert result.box == (5, 5, 12, 16) and result.shares == (0.5, 0.95)
    rows, columns = torch.meshgrid(torch.arange(17) - 8, torch.arange(21) - 10, indexing="ij")
    distances = (rows.square() + columns.square()).double().sqrt()
    for share, radius in zip(result.shares, result.radii.tolist(), strict=True):
        assert float(result.field[distances <= radius].sum()) >= share * float(result.field.sum())
        assert float(result.field[distances < radius].sum()) < share * float(result.field.sum())
    single = effective_receptive_field(model, TensorDataset(images.float()))
    assert single.layer == "1" and torch.equal(single.image, images[0].float().double())
    torch.testing.assert_close(single.field, result.field)
    corner = effective_receptive_field(model, TensorDataset(images), layer="0", position=(0, 1), shares=[1.0])
    expected = torch.zeros(17, 21, dtype=torch.float64)
    kernel = (weights[0].sum(0) / std[:, None, None]).abs().sum(0)
    expected[:2, 1:4] = kernel[1:]
    torch.testing.assert_close(corner.field, expected)
    assert corner.box == (0, 1, 2, 4) and corner.center == (0.0, 2.0)
    torch.testing.assert_close(corner.radii, torch.tensor([2**0.5], dtype=torch.float64))
    # Units that all depend on the entire image have no center of their own: they share its area.
    network, weight = dense_map_network()
    model = load_model(network, mean=[0.4, 0.5], std=std.tolist(), input_size=(2, 6, 8))
    data = TensorDataset(images[:, :, :6, :8])
    shared = effective_receptive_field(model, data, layer="2", position=(2, 1))
    assert shared.center == (4.5, 2.5) and shared.box == (0, 0, 6, 8)
    slopes = weight[:, 2, 1].sum(0) / std[:, None, None]
    torch.testing.assert_close(shared.field, slopes.abs().sum(0))


@method(
    family="activations",
    references=[
        Reference(
            key="luo2016",
            title="Understanding the Effective Receptive Field in Deep Convolutional Neural Networks",
            authors="Luo, Li, Urtasun, Zemel",
            year=2016,
            url="https://arxiv.org/abs/1701.04128",
        )
    ],
    invariants=[Nonnegative(field="field")],
    relations=[
        InvariantTo("dataset_order", fields=("field", "radii")),
        InvariantTo("normalization", fields=("field", "radii")),
        ScalesWith("logits", power=0, fields=("field", "radii")),
    ],
    needs=["gradients", "dataset"],
    cost=Cost(forward=size.dataset + 1, backward=size.dataset),
    oracle=_oracle,
    demo={"dataset": "builtin:scenes/64"},
)
def effective_receptive_field(
    model: Model,
    dataset: Dataset,
    *,
    layer: Annotated[LayerName | None, Field(description="layer of the unit; default: the last map")] = None,
    position: Annotated[
        tuple[int, int] | None, Field(description="unit (y, x) on the layer's map; default: the central one")
    ] = None,
    shares: Annotated[
        list[Annotated[float, Field(gt=0, le=1)]],
        Field(min_length=1, max_length=10, description="shares of the field's sum whose radii are returned"),
    ] = [0.5, 0.95],  # noqa: B006
) -> ReceptiveField:
    """Effective receptive field: mean absolute derivative of a unit with respect to each pixel.

    E(y, x) = mean over images I of sum_k | d sum_c A_c(p) / d I_k(y, x) |

    with A_c(p) channel c of the layer at position p and k the color channels. It is concentrated within the
    theoretical receptive field (``box``), often in a small part of it, and is what an overlay of the unit's
    activation can claim to show. In a transformer it extends over the entire image from the first block on,
    and its concentration is learned.

    Returns:
        ``field`` (H, W): E. ``radii`` (S,): smallest radius around the unit's ``center`` that holds each
        share of E's sum. ``box``: the theoretical receptive field. ``position``, ``layer``.

    Raises:
        InputError: a position that the layer's map does not have.
        ModelError: the layer's output is no map, or does not depend on the pixels of any image.

    Example::
        from phosphene import run

        result = run("effective_receptive_field", dataset="builtin:scenes/8", layer="features.11")
        result.field.shape  # (64, 64)
        result.radii  # of 50 % and 95 % of the field

    Source:
        Luo et al. 2016, section 2; sum over channels and absolute values as for images of real networks:
        Ding et al. 2022 (RepLKNet), section 5.
    """
    layer = layer if layer is not None else model.last_map
    first = dataset.read([0])[0]
    shape = (int(first.shape[1]), int(first.shape[2]))
    height, width = model.for_images(first[None].to(model.device, model.dtype)).map_shape(layer)[1:]
    unit = position if position is not None else (height // 2, width // 2)
    if not (0 <= unit[0] < height and 0 <= unit[1] < width):
        raise InputError(f"layer {layer!r} has a map of {height}x{width}, so there is no position {unit}")
    (box,) = receptive_fields(model, layer, shape, [unit]).tolist()
    field = _Derivatives(model, layer, unit).run(dataset, batch_size(model)) / len(dataset)
    total = float(field.sum())
    if not total > 0:
        raise ModelError(f"the derivative of layer {layer!r} at {unit} is 0 for all pixels of all images")
    centers = unit_centers(model, layer, shape)
    if centers is None:
        center = ((unit[0] + 0.5) * shape[0] / height - 0.5, (unit[1] + 0.5) * shape[1] / width - 0.5)
    else:
        center = (centers[0][unit[0]], centers[1][unit[1]])
    return ReceptiveField(
        field=field.to(model.device, model.dtype),
        box=tuple(box),
        center=center,
        radii=_radii(field, center, shares).to(model.device, model.dtype),
        shares=tuple(shares),
        layer=layer,
        position=unit,
        image=first.to(model.device, model.dtype),
        count=len(dataset),
    )


@dataclass
class _Derivatives(Fold[Tensor]):
    """The sum over images of absolute derivatives, (H, W) in double precision."""

    title = "effective receptive field"
    model: Model
    layer: str
    position: tuple[int, int]

    def update(self, state: State, batch: Batch) -> State:
        images = batch.images.to(self.model.device, self.model.dtype).requires_grad_()
        with torch.enable_grad():
            maps = self.model.maps(self.model.features(images, self.layer), images, self.layer)
            unit = maps[:, :, self.position[0], self.position[1]].sum()
            (gradient,) = torch.autograd.grad(unit, images, materialize_grads=True)
        sums = to_float64(gradient.abs().nan_to_num()).sum((0, 1)).cpu()
        return self.merge(state, {"sum": sums})

    def finish(self, state: State) -> Tensor:
        field: Tensor = state["sum"]
        return field


def _radii(field: Tensor, center: tuple[float, float], shares: list[float]) -> Tensor:
    """The smallest distances from the center within which the field sums to each share of its total."""
    y, x = (torch.arange(side, dtype=field.dtype) - c for side, c in zip(field.shape, center, strict=True))
    # equivalent mutants: on the CPU every sort of torch is stable
    distances, order = (y[:, None].square() + x.square()).sqrt().flatten().sort(stable=True)
    sums = field.flatten()[order].cumsum(0)
    # Rounding of the sums must not move the radius of 100 % beyond the field.
    parts = torch.tensor(shares, dtype=field.dtype) * sums[-1] * (1 - 1e-12)
    return distances[torch.searchsorted(sums, parts).clamp(max=len(sums) - 1)]


@hookimpl
def phosphene_methods():
    return [effective_receptive_field]
