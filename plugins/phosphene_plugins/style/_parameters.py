"""Parameters that several style methods share."""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

from pydantic import Field, NonNegativeFloat

from phosphene.roles import LayerName
from phosphene.spec import ParameterGroup

from ._color_transfer import ColorSource

Blend: TypeAlias = Annotated[
    list[NonNegativeFloat] | None,
    Field(description="gamma_s: weight of each style, divided by their sum; default: equal weights"),
]

Color: TypeAlias = Annotated[
    ColorSource,
    Field(description="colors of the result: the style's, or the content's by luminance or by histogram"),
]

ContentLayer: TypeAlias = Annotated[
    LayerName | None, Field(description="content layer phi; default: the middle stage of the model")
]

StyleLayers: TypeAlias = Annotated[
    list[LayerName] | None, Field(description="layers of the Gram matrices G_j; default: every stage")
]

LayerWeights: TypeAlias = Annotated[
    list[NonNegativeFloat] | None,
    Field(description="w_j: weight of each style layer; default: 3^-j, layer 0 the finest"),
]

ContentWeight: TypeAlias = Annotated[
    float, Field(ge=0, le=1e12, description="alpha: weight of the content loss")
]

StyleWeight: TypeAlias = Annotated[float, Field(ge=0, le=1e12, description="beta: weight of the style loss")]

TotalVariation: TypeAlias = Annotated[
    float, Field(ge=0, le=1e6, description="weight of the total-variation loss, per pixel")
]

StyleScale: TypeAlias = Annotated[
    float, Field(gt=0, le=8, description="longer side of the styles, relative to the content's")
]

LongestSide: TypeAlias = Annotated[
    int, Field(ge=8, le=16384, description="longer side that larger images are shrunk to")
]

Scales: TypeAlias = Annotated[
    int, Field(ge=1, le=8, description="number of image sizes, coarse to fine, each twice the last")
]

StyleOptimizer: TypeAlias = Annotated[
    Literal["lbfgs", "adam"], Field(description="optimizer; lbfgs reaches lower losses")
]

StyleNames: TypeAlias = Annotated[
    list[str] | None, Field(description="names of the styles; default: style 0, style 1, ...")
]


class PerceptualLoss(ParameterGroup):
    """Layers and weights of the perceptual loss that style networks are trained on."""

    content_layer: ContentLayer = None
    style_layers: StyleLayers = None
    content_weight: Annotated[float, Field(ge=0, description="weight of the content loss")] = 3.0
    style_weight: Annotated[float, Field(ge=0, description="weight of the style loss")] = 10.0
    total_variation: Annotated[
        float, Field(ge=0, description="weight of the total-variation loss, per pixel")
    ] = 0.01


class Training(ParameterGroup):
    """Length, batch size and learning rate of a training with Adam."""

    steps: Annotated[int, Field(ge=1, le=1_000_000, description="number of training steps of Adam")] = 1000
    batch: Annotated[int, Field(ge=1, le=1024, description="number of content images per step")] = 4
    lr: Annotated[float, Field(gt=0, le=1, description="learning rate of Adam")] = 5e-3


class StyleNetworkTraining(Training):
    """The training of a style network, which can be done in mixed precision."""

    mixed_precision: Annotated[
        bool, Field(description="whether convolutions run in bfloat16, which GPUs do faster")
    ] = False
