"""Image parametrization by a small network of the pixels' coordinates (CPPN)."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor

from ..errors import InputError
from ..images.noise import seeded_generator
from ..precision import at_least_float32
from .parametrizations import Parametrization, color_mix

#: Channels and number of the hidden layers.
_WIDTH, _DEPTH = 24, 8

#: Weights per unit of the parameter: learning rates that suit pixels and spectra then suit the weights, too.
_SCALE = 0.04

#: Standard deviation of atan(z), and mean and standard deviation of atan(z)^2, for a standard normal z.
_ATAN_DEVIATION, _SQUARE_MEAN, _SQUARE_DEVIATION = 0.671, 0.450, 0.396


class CppnImage(Parametrization):
    """Weights of a small network from the coordinates of a pixel to its color (CPPN).

    image(y, x) = sigmoid(M W_8 g(W_7 g(... g(W_0 (x, y)))))

    g(z) = (atan(z) / 0.671, (atan(z)^2 - 0.450) / 0.396)

    with the color matrix M of ``FourierImage``, biases in every layer, 24 channels in each of 8 hidden
    layers, which the composite activation g doubles and normalizes, and the coordinates of the pixels'
    centers, up to sqrt(3) along the longer side. The image is a smooth function of the position, so it can be
    computed at any size: ``render``. The parameter (N, P) is 25 times the weights.

    Args:
        weights: weights (N, P), copied, as ``initial_weights`` returns them.
        size: height and width of ``image``.
        channels: number of channels C.
        opacity: the last channel is no color but an opacity, which M does not mix with the others.

    Raises:
        InputError: weights that are not P floats for each image.

    Source:
        Mordvintsev, Pezzotti, Schubert, Olah, "Differentiable Image Parameterizations", Distill 2018.
    """

    def __init__(
        self, weights: Tensor, size: tuple[int, int], channels: int, *, opacity: bool = False
    ) -> None:
        self.shapes, self.size, self.dtype = _layer_shapes(channels), size, weights.dtype
        count = sum(inputs * outputs + outputs for inputs, outputs in self.shapes)
        if weights.ndim != 2 or weights.shape[1] != count or not weights.is_floating_point():
            raise InputError(
                f"an image of {channels} channels needs floats (N, {count}) as weights, not "
                f"{tuple(weights.shape)} {weights.dtype}"
            )
        self.mix = color_mix(channels, opacity=opacity)
        self.parameter = (at_least_float32(weights.detach()) / _SCALE).requires_grad_()

    def image(self) -> Tensor:
        return self.render(*self.size)

    def render(self, height: int, width: int) -> Tensor:
        """Images (N, C, height, width) of the current weights."""
        features = _coordinates(height, width).to(self.parameter)[None]
        start = 0
        for number, (inputs, outputs) in enumerate(self.shapes):
            layer = _SCALE * self.parameter[:, start : start + (inputs + 1) * outputs]
            layer = layer.unflatten(1, (inputs + 1, outputs))
            features = _activation(features) if number else features
            features = features @ layer[:, :-1] + layer[:, -1:]
            start += (inputs + 1) * outputs
        colors = features @ self.mix.to(features).mT
        return colors.mT.unflatten(2, (height, width)).sigmoid().to(self.dtype)

    @staticmethod
    def initial_weights(
        color: Tensor, *, deviation: float, opacity: bool = False, seed: int | None
    ) -> Tensor:
        """Random weights (P,) of an image about a color (C,), in double precision.

        Hidden layers have the variance 1 / inputs and no bias. The last one has ``color`` as its bias, within
        [0.01, 0.99], before the sigmoid and M, and weights for an image of about this standard deviation.
        """
        generator = seeded_generator(seed)
        *hidden, (inputs, outputs) = _layer_shapes(len(color))
        parts = []
        for fan_in, fan_out in hidden:
            normal = torch.randn(fan_in, fan_out, generator=generator, dtype=torch.float64)
            parts += [(normal / math.sqrt(fan_in)).flatten(), torch.zeros(fan_out, dtype=torch.float64)]
        normal = torch.randn(inputs, outputs, generator=generator, dtype=torch.float64)
        color = color.detach().double().cpu().clamp(0.01, 0.99)
        unmix = torch.linalg.inv(color_mix(len(color), opacity=opacity))
        last = normal * deviation / math.sqrt(inputs) / (color * (1 - color)) @ unmix.mT
        return torch.cat([*parts, last.flatten(), unmix @ color.logit()])


def _layer_shapes(channels: int) -> list[tuple[int, int]]:
    """Inputs and outputs of every layer; the activation doubles the channels."""
    widths = [1, *[_WIDTH] * _DEPTH, channels]
    return [(2 * inputs, outputs) for inputs, outputs in pairwise(widths)]


def _activation(z: Tensor) -> Tensor:
    """g of ``CppnImage``: (..., K) -> (..., 2 K)."""
    angle = z.atan()
    return torch.cat([angle / _ATAN_DEVIATION, (angle.square() - _SQUARE_MEAN) / _SQUARE_DEVIATION], -1)


def _coordinates(height: int, width: int) -> Tensor:
    """(x, y) of all pixels' centers (H W, 2), in double precision; sqrt(3) is the end of the longer side."""
    unit = math.sqrt(3) / max(height, width)
    y, x = (unit * (2 * torch.arange(side, dtype=torch.float64) + 1 - side) for side in (height, width))
    return torch.stack([x.expand(height, -1), y[:, None].expand(-1, width)], 2).flatten(0, 1)
