"""``linear_model``: a classifier with closed-form adversarial examples and attributions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from ..models import Model


def linear_model(*, bias: Sequence[float] | None = None, std: Sequence[float] | None = None) -> Model:
    """A model with logits W x + b of a 2x2 image with one channel, for two classes, in double precision.

    bias: b, two numbers. std: the model's normalisation, one number. Returns a ``Model`` with ``input_size``
    (1, 2, 2), whose linear layer is ``model.module[1]``, its weight W (2, 4)::

        linear_model()(torch.ones(1, 1, 2, 2))  # [[0.2, 0.4]]
    """
    linear = nn.Linear(4, 2, bias=bias is not None, dtype=torch.float64)
    linear.weight.data = torch.tensor([[0.4, -0.3, 0.2, -0.1], [-0.2, 0.1, 0.3, 0.2]], dtype=torch.float64)
    if bias is not None:
        linear.bias.data = torch.tensor(bias, dtype=torch.float64)
    return Model(nn.Sequential(nn.Flatten(), linear).eval(), input_size=(1, 2, 2), std=std)
