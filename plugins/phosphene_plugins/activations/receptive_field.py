"""Theoretical receptive fields and strides of the layers of a network, Araujo et al. 2019."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import nn

from phosphene import Reference, hookimpl, load_model, method, receptive_fields, unit_centers
from phosphene.roles import LayerName, Model
from phosphene.spec import Cost, InvariantTo, ScalesWith

from ._dense_maps import dense_map_network
from ._receptive_field_result import ReceptiveFields


def _oracle() -> None:
    """Of two convolutions and a pooling the fields are 3, 5 and 9 pixels, the strides 1, 2 and 6."""
    layers = [nn.Conv2d(1, 2, 3, padding=1), nn.Conv2d(2, 2, 3, stride=2, padding=1), nn.MaxPool2d(3, 3)]
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 2)]
    model = load_model(nn.Sequential(*layers), input_size=(1, 36, 48))
    result = receptive_field(model, layers=["0", "1", "2"])
    # r = r + (k - 1) * stride so far: 3, 3 + 2 * 1 and 5 + 2 * 2.
    heights, widths = (result.boxes[:, n + 2] - result.boxes[:, n] for n in (0, 1))
    assert heights.tolist() == widths.tolist() == [3, 5, 9]
    assert result.strides.tolist() == [[1, 1], [2, 2], [6, 6]]
    assert result.sizes.tolist() == [[36, 48], [18, 24], [6, 8]] and result.size == (36, 48)
    # Unit (9, 12) of the second layer is centered at pixel (18, 24), unit (3, 4) of the third at (20, 26).
    assert result.boxes[1].tolist() == [16, 22, 21, 27] and result.boxes[2].tolist() == [16, 22, 25, 31]
    one_row = receptive_field(model, layers=["3"])
    assert one_row.strides.tolist() == [[36, 48]] and one_row.boxes.tolist() == [[0, 0, 36, 48]]
    assert receptive_field(model).layers[-1] == "2"
    # Units without centers share the image; the stride is that in the middle.
    network, _ = dense_map_network()
    shared = receptive_field(load_model(network, input_size=(2, 6, 8)), layers=["2"])
    assert shared.strides.tolist() == [[2, 2]] and shared.boxes.tolist() == [[0, 0, 6, 8]]
    assert shared.strides.dtype == torch.float64
    assert _stride((0.0, 1.0, 4.0, 9.0, 16.0, 25.0), 7.0) == 5 and _stride((2.0, 5.0), 7.0) == 3
    assert _stride((3.0,), 7.0) == 7
    larger = receptive_field(load_model(nn.Sequential(*layers)), layers=["2"], size=60)
    assert larger.size == (60, 60) and larger.sizes.tolist() == [[10, 10]]


@method(
    family="activations",
    references=[
        Reference(
            key="araujo2019",
            title="Computing Receptive Fields of Convolutional Neural Networks",
            authors="Araujo, Norris, Sim",
            year=2019,
            url="https://distill.pub/2019/computing-receptive-fields",
        )
    ],
    relations=[
        InvariantTo("normalization", fields=("boxes", "sizes")),
        ScalesWith("logits", power=0, fields=("boxes", "sizes")),
    ],
    cost=Cost(),
    oracle=_oracle,
    exempt={"weights_matter": "it describes the connections, for any weights"},
)
def receptive_field(
    model: Model,
    *,
    layers: Annotated[
        list[LayerName] | None, Field(min_length=1, description="layers; default: the model's stages")
    ] = None,
    size: Annotated[
        int | None, Field(ge=1, le=2048, description="side of the image; default: the model's input size")
    ] = None,
) -> ReceptiveFields:
    """Theoretical receptive fields: the pixels that the central unit of each layer can depend on.

    r_l = r_(l-1) + (k_l - 1) s_(l-1),  s_l = s_(l-1) * stride_l

    for a chain of layers of kernel size k; here computed for any network by the derivative of a copy with
    positive weights. After attention, squeeze-and-excitation or global pooling it is the entire image;
    ``effective_receptive_field`` measures how much of it matters.

    Returns:
        ``boxes`` (L, 4): top, left, bottom, right in pixels, the last two exclusive, clipped to the image.
        ``strides`` (L, 2): pixels between neighboring units, y and x; the image's side for one unit.
        ``sizes`` (L, 2) of the layers' maps.

    Raises:
        ModelError: a layer without a map, or a network that cannot be copied.

    Example::
        from phosphene import run

        result = run("receptive_field")
        print("\\n".join(result.lines()))

    Source:
        Araujo, Norris, Sim 2019.
    """
    names = layers or list(model.stages)
    channels, height, width = model.input_size
    if size is not None:
        height = width = size
    sized = model.at_size((channels, height, width))
    boxes, strides, sizes = [], [], []
    for name in names:
        rows, columns = sized.map_shape(name)[1:]
        boxes.append(receptive_fields(sized, name, (height, width), [(rows // 2, columns // 2)])[0])
        sizes.append((rows, columns))
        centers = unit_centers(sized, name, (height, width))
        # Where the centers cannot be computed, and for a single row, the units share the image.
        equal = [height / rows, width / columns]
        axes = zip(centers, equal, strict=True) if centers else ()
        strides.append([_stride(*axis) for axis in axes] or equal)
    return ReceptiveFields(
        layers=tuple(names),
        boxes=torch.stack(boxes).to(model.device),
        strides=torch.tensor(strides, device=model.device, dtype=model.dtype),
        sizes=torch.tensor(sizes, device=model.device),
        size=(height, width),
    )


def _stride(centers: tuple[float, ...], single: float) -> float:
    """The distance between the units in the middle of an axis; ``single`` where there is one."""
    middle = len(centers) // 2
    return centers[middle] - centers[middle - 1] if len(centers) > 1 else single


@hookimpl
def phosphene_methods():
    return [receptive_field]
