"""``linear_model``: a linear classifier whose adversarial examples and attributions are known in closed form."""

from __future__ import annotations

import torch
from torch import nn

from ..models import Model


def linear_model() -> Model:
    """A model with logits W x of a 2x2 image with one channel, for two classes, in double precision.

    Returns a ``Model`` with ``input_size`` (1, 2, 2). Its weights are ``model.module[1].weight``, (2, 4).

    >>> linear_model()(torch.ones(1, 1, 2, 2)).tolist()
    [[0.2, 0.4]]
    """
    linear = nn.Linear(4, 2, bias=False, dtype=torch.float64)
    linear.weight.data = torch.tensor([[0.4, -0.3, 0.2, -0.1], [-0.2, 0.1, 0.3, 0.2]], dtype=torch.float64)
    return Model(nn.Sequential(nn.Flatten(), linear).eval(), input_size=(1, 2, 2))
