"""One step of Adam as arithmetic on tensors, for a step size per image and moments that can be saved."""

from __future__ import annotations

import torch
from torch import Tensor

BETA1, BETA2 = 0.9, 0.999


def adam_step(
    gradient: Tensor, mean: Tensor, square: Tensor, step: int, step_size: float | Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Adam's update for the gradient of step ``step`` (from 0), and the new moments.

    m <- 0.9 m + 0.1 g,  s <- 0.999 s + 0.001 g^2

    update = step_size m / (1 - 0.9^t) / sqrt(s / (1 - 0.999^t))

    with t = step + 1. The caller subtracts the update (descent) or adds it (ascent). ``step_size`` is a
    number or one for each image, (N, 1, 1, 1). Returns (update, mean, square).
    """
    mean, square = BETA1 * mean + 0.1 * gradient, BETA2 * square + 0.001 * gradient.square()
    # Not Adam's usual 1e-8: gradients of a saturated model may be smaller than that.
    tiny = torch.finfo(gradient.dtype).tiny ** 0.5
    spread = (square / (1 - BETA2 ** (step + 1))).sqrt() + tiny
    return step_size * (mean / (1 - BETA1 ** (step + 1))) / spread, mean, square
