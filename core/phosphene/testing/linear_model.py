"""``linear_model``: a classifier with closed-form adversarial examples and attributions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..models import Model

#: Different for each channel, so that the order of channels and the normalization itself show in a result;
#: exact in float32, so that the weights of pixels are.
_MEAN, _STD = (0.375, 0.5, 0.625), (0.25, 0.5, 0.75)


def linear_model(
    weight: Tensor | None = None,
    *,
    bias: Sequence[float] | Tensor | None = None,
    mean: Sequence[float] = _MEAN,
    std: Sequence[float] = _STD,
) -> Model:
    """A model with logits w x + b of an image x with pixels in [0, 1], however it normalizes them.

    weight: w (K, C, H, W), for K classes; default: two classes of a 2x2 image with one channel, in double
    precision. bias: b (K,); default: zeros. mean, std: the model's normalization; the first C numbers are
    used. The linear layer is ``model.module[1]``; its weight is w std and its bias b + w mean, so the
    closed form of a result in pixels is that of w and b::

        linear_model()(torch.ones(1, 1, 2, 2))  # [[0.2, 0.4]]
    """
    if weight is None:
        weight = torch.tensor([[0.4, -0.3, 0.2, -0.1], [-0.2, 0.1, 0.3, 0.2]], dtype=torch.float64)
        weight = weight.view(2, 1, 2, 2)
    classes, channels, height, width = weight.shape
    means, stds = (torch.tensor(values, dtype=weight.dtype)[:channels, None, None] for values in (mean, std))
    linear = nn.Linear(channels * height * width, classes, dtype=weight.dtype)
    linear.weight.data = (weight.detach() * stds).flatten(1)
    linear.bias.data = (weight.detach() * means).flatten(1).sum(1)
    if bias is not None:
        linear.bias.data += torch.as_tensor(bias, dtype=weight.dtype)
    size = (channels, height, width)
    return Model(
        nn.Sequential(nn.Flatten(), linear).eval(),
        input_size=size,
        mean=list(mean[:channels]),
        std=list(std[:channels]),
        task="classification",  # of a single class, too
    )
