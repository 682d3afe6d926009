"""First-order optimizers, per image: SGD, normalised SGD and Adam."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .parametrizations import Parametrization


class Evaluation(NamedTuple):
    """The problem at one setting of the parameters; the loss is what goes down."""

    scores: Tensor
    loss: Tensor
    pixel_gradient: Tensor  # of the objective alone
    gradient: Tensor  # of the loss, by the parameter


class FirstOrder:
    """One of torch's own optimisers, which treat every number, and so every image, by itself."""

    def __init__(
        self, image: Parametrization, lr: float, evaluate: Callable[[], Evaluation], kind: str
    ) -> None:
        self.image, self.kind = image, kind
        self.optimizer = (torch.optim.Adam if kind == "adam" else torch.optim.SGD)([image.parameter], lr)

    def __call__(self, point: Evaluation) -> None:
        gradient = point.gradient
        if self.kind == "normalized-sgd":
            mean_square = gradient.square().mean(tuple(range(1, gradient.ndim)), keepdim=True)
            gradient = gradient / mean_square.sqrt().clamp_min(1e-30)
        self.image.parameter.grad = gradient
        self.optimizer.step()
        self.image.project()

    def memory(self) -> dict[str, Tensor]:
        """What the next step depends on, beside the parameter."""
        return {n: v for n, v in self.optimizer.state[self.image.parameter].items() if v is not None}

    def recall(self, memory: dict[str, Tensor]) -> None:
        self.optimizer.state[self.image.parameter] = memory
