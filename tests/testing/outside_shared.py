"""What the methods of the author who had not read the conformance kit share: sources, types, results."""

from typing import Annotated, Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from phosphene import (
    Reference,
    unit_centers,
)
from phosphene.results import (
    Attribution,
)
from phosphene.roles import LayerName, Model
from phosphene.spec import (
    Equivariant,
    InvariantTo,
    PixelRange,
    SameShape,
    ScalesWith,
)


def paper(key: str, title: str, authors: str, year: int, url: str) -> list[Reference]:
    """The only reference of a method."""
    return [Reference(key=key, title=title, authors=authors, year=year, url=url)]


SIMONYAN = paper(
    "simonyan2014", "Deep Inside Convolutional Networks: Visualising Image Classification Models and Saliency Maps",
    "Simonyan, Vedaldi, Zisserman", 2014, "https://arxiv.org/abs/1312.6034",
)  # fmt: skip
SHRIKUMAR = paper(
    "shrikumar2016", "Not Just a Black Box: Learning Important Features Through Propagating Activation Differences",
    "Shrikumar, Greenside, Shcherbina, Kundaje", 2016, "https://arxiv.org/abs/1605.01713",
)  # fmt: skip
ZEILER = paper(
    "zeiler2014", "Visualizing and Understanding Convolutional Networks", "Zeiler, Fergus", 2014,
    "https://arxiv.org/abs/1311.2901",
)  # fmt: skip
FLIPS = [Equivariant("hflip"), Equivariant("vflip"), Equivariant("transpose")]
PROPORTIONAL = [ScalesWith("logits", power=1), InvariantTo("logit_shift")]
OneLayer = Annotated[
    LayerName | None, Field(description="layer of the maps; default: the last layer with spatial positions")
]


def attribution(model: Model, images: Tensor, target: Any, maps: Tensor, **fields: Any) -> Attribution:
    """A result with the names of its targets."""
    return Attribution(images=images, maps=maps, targets=target.names(model, len(images)), **fields)


def layer_attribution(model: Model, images: Tensor, target: Any, layer: str, maps: Tensor) -> Attribution:
    """A result whose maps (N, h, w) are those of a layer, at the centers of its units."""
    return attribution(model, images, target, maps, centers=unit_centers(model, layer, images.shape[2:]))


GOODFELLOW = paper(
    "goodfellow2015", "Explaining and Harnessing Adversarial Examples", "Goodfellow, Shlens, Szegedy", 2015,
    "https://arxiv.org/abs/1412.6572",
)  # fmt: skip
MADRY = paper(
    "madry2018", "Towards Deep Learning Models Resistant to Adversarial Attacks",
    "Madry, Makelov, Schmidt, Tsipras, Vladu", 2018, "https://arxiv.org/abs/1706.06083",
)  # fmt: skip
Eps = Annotated[float, Field(gt=0, le=1, description="radius of the ball, for pixels in [0, 1]")]
StepSize = Annotated[float, Field(gt=0, le=1, description="length of one step, for pixels in [0, 1]")]
IN_RANGE = [PixelRange(field="adversarial"), SameShape(field="adversarial")]


def loss_gradient(model: Model, points: Tensor, labels: Tensor) -> Tensor:
    """Gradient of the cross-entropy of the labels by the pixels."""
    points = points.detach().clone().requires_grad_()
    loss = F.cross_entropy(model(points), labels, reduction="sum")
    return torch.autograd.grad(loss, points)[0]


FeatureLayer = Annotated[
    LayerName | None, Field(description="layer of the features; default: the input of the classifier")
]
