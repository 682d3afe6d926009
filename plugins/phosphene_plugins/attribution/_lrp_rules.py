"""The rules of layer-wise relevance propagation: how a layer's relevance is divided among its inputs.

A rule returns the layer's output z with a modified gradient, chosen such that relevance is value times
gradient on both sides of the layer: R_j = z_j dS/dz_j at its output, R_i = x_i dS/dx_i at its input. The
rules of layers that read the pixels (``InputRule``) also give relevance to a pixel of value 0: it is dS/du of
their second input u, which is 0.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from phosphene import ModelError


@dataclass(frozen=True)
class LinearLayer:
    """A convolution or a linear layer as it was called: z = function(x, weight, bias)."""

    function: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    x: Tensor
    weight: Tensor
    bias: Tensor | None

    @property
    def is_dense(self) -> bool:
        """Whether it is a linear layer, not a convolution."""
        return self.weight.ndim == 2

    def along_channels(self, values: Tensor, output: Tensor) -> Tensor:
        """One value per channel, shaped so that it can be added to the output."""
        return values.view(-1, *[1] * (0 if self.is_dense else output.ndim - 2))


class Rule(Protocol):
    """A rule of relevance propagation."""

    def __call__(self, layer: LinearLayer) -> Tensor:
        """The layer's output, on the graph with the rule's gradient."""
        ...


@dataclass(frozen=True)
class Epsilon:
    """Epsilon rule: R_i = sum_j x_i w_ij / (z_j + epsilon sign z_j) R_j, with z_j = sum_i x_i w_ij + b_j."""

    epsilon: float

    def __call__(self, layer: LinearLayer) -> Tensor:
        # The sum without the bias: relevance flows through it to x, and its value plus the bias is z.
        sums = layer.function(layer.x, layer.weight, None)
        z = sums.detach()
        z = z if layer.bias is None else z + layer.along_channels(layer.bias, z)
        return _with_value(sums * _ratio(z, z, z != 0, self.epsilon), z)


@dataclass(frozen=True)
class Gamma:
    """Gamma rule, which favors contributions x_i w_ij with the sign of z_j.

    R_i = sum_j x_i w'_ij / (z'_j + epsilon sign z'_j) R_j,  z'_j = sum_i x_i w'_ij + b'_j

    w' = w + gamma max(w, 0) where x_i and z_j have the same sign, w + gamma min(w, 0) where they differ: this
    enlarges x_i w_ij where it has the sign of z_j. b' is as w' for x_i = 1.
    """

    gamma: float
    epsilon: float

    def __call__(self, layer: LinearLayer) -> Tensor:
        x, weight = layer.x, layer.weight
        z = layer.function(x.detach(), weight, layer.bias)
        w_plus, w_minus = (weight + self.gamma * part for part in (weight.clamp(min=0), weight.clamp(max=0)))
        # equivalent mutants: an x of 0 contributes nothing to either
        x_plus, x_minus = torch.where(x >= 0, x, 0), torch.where(x < 0, x, 0)
        positive = layer.function(x_plus, w_plus, None) + layer.function(x_minus, w_minus, None)
        negative = layer.function(x_plus, w_minus, None) + layer.function(x_minus, w_plus, None)
        positive_bias: Tensor | int = 0
        negative_bias: Tensor | int = 0
        if (bias := layer.bias) is not None:
            positive_bias = layer.along_channels(bias + self.gamma * bias.clamp(min=0), z)
            negative_bias = layer.along_channels(bias + self.gamma * bias.clamp(max=0), z)
        sums = positive * _ratio(z, positive.detach() + positive_bias, z > 0, self.epsilon)
        sums = sums + negative * _ratio(z, negative.detach() + negative_bias, z < 0, self.epsilon)
        return _with_value(sums, z)


@dataclass(frozen=True)
class ZPlus:
    """z+ rule: positive contributions, R_i = sum_j (x_i w_ij)+ / (sum_i (x_i w_ij)+ + b_j+) R_j."""

    epsilon: float

    def __call__(self, layer: LinearLayer) -> Tensor:
        z = layer.function(layer.x.detach(), layer.weight, layer.bias)
        sums, bias = _signed_sums(layer, z, 1)
        return _with_value(sums * _ratio(z, sums.detach() + bias, z != 0, self.epsilon), z)


@dataclass(frozen=True)
class AlphaBeta:
    """Alpha-beta rule: positive contributions weighted by alpha, negative ones by beta = alpha - 1.

    R_i = sum_j ( alpha (x_i w_ij)+ / (sum_i (x_i w_ij)+ + b_j+) - beta (x_i w_ij)- / (sum_i (x_i w_ij)- +
    b_j-) ) R_j. Where an output has no negative contribution, only alpha times its relevance is passed on,
    and the reverse.
    """

    alpha: float
    epsilon: float

    def __call__(self, layer: LinearLayer) -> Tensor:
        z = layer.function(layer.x.detach(), layer.weight, layer.bias)
        weighted: Tensor | int = 0
        for sign, factor in ((1, self.alpha), (-1, 1 - self.alpha)):
            sums, bias = _signed_sums(layer, z, sign)
            weighted = weighted + factor * sums * _ratio(z, sums.detach() + bias, z != 0, self.epsilon)
        assert isinstance(weighted, Tensor)
        return _with_value(weighted, z)


class InputRule(Protocol):
    """A rule of layers that read the pixels."""

    def divide(self, layer: LinearLayer, u: Tensor) -> Tensor:
        """The layer's output, with a gradient by u that is the relevance of its input; u is 0, shaped as it.

        The layer's input itself has no gradient.
        """
        ...


@dataclass(frozen=True)
class Box:
    """zB rule of pixels between ``low`` and ``high``, (C,) in the network's units.

    R_i = sum_j c_ij / sum_i c_ij R_j,  c_ij = x_i w_ij - low_i max(w_ij, 0) - high_i min(w_ij, 0) >= 0, with
    the bias b_j - max(b_j, 0) - min(b_j, 0) = 0.
    """

    low: Tensor
    high: Tensor
    epsilon: float

    def divide(self, layer: LinearLayer, u: Tensor) -> Tensor:
        x, weight = layer.x.detach(), layer.weight
        z = layer.function(x, weight, layer.bias)
        self._check(x)
        # 1 + u: the gradient by u is a contribution itself, not a contribution divided by its input.
        low, high = (bound.to(x)[:, *[None] * (x.ndim - 2)] for bound in (self.low, self.high))
        sums = layer.function(x * (1 + u), weight, None)
        sums = sums - layer.function(low * (1 + u), weight.clamp(min=0), None)
        sums = sums - layer.function(high * (1 + u), weight.clamp(max=0), None)
        return _with_value(sums * _ratio(z, sums.detach(), z != 0, self.epsilon), z)

    def _check(self, x: Tensor) -> None:
        """Raises ModelError for inputs outside of the bounds, of a network that normalizes pixels itself."""
        low, high = (bound.to(x)[:, *[None] * (x.ndim - 2)] for bound in (self.low, self.high))
        margin = 1e-3 * (high - low)
        if x.shape[1] != len(low) or (x < low - margin).any() or (x > high + margin).any():
            raise ModelError(
                "the box rule is for a first layer that reads pixels as the model normalizes them, and these "
                "are changed before; use flat or w_square"
            )


@dataclass(frozen=True)
class Flat:
    """Flat rule: the relevance of an output in equal parts to all its inputs."""

    epsilon: float

    def divide(self, layer: LinearLayer, u: Tensor) -> Tensor:
        return _by_weights(layer, u, torch.ones_like(layer.weight), None, self.epsilon)


@dataclass(frozen=True)
class WSquare:
    """w^2 rule: R_i = sum_j w_ij^2 / (sum_i w_ij^2 + b_j^2) R_j, whatever the pixels are."""

    epsilon: float

    def divide(self, layer: LinearLayer, u: Tensor) -> Tensor:
        bias = None if layer.bias is None else layer.bias.square()
        return _by_weights(layer, u, layer.weight.square(), bias, self.epsilon)


def _by_weights(layer: LinearLayer, u: Tensor, weight: Tensor, bias: Tensor | None, epsilon: float) -> Tensor:
    """Relevance divided in proportion to ``weight`` and ``bias``, which are not negative."""
    z = layer.function(layer.x.detach(), layer.weight, layer.bias)
    sums = layer.function(1 + u, weight, None)
    denominator = sums.detach() if bias is None else sums.detach() + layer.along_channels(bias, z)
    return _with_value(sums * _ratio(z, denominator, z != 0, epsilon), z)


def _signed_sums(layer: LinearLayer, z: Tensor, sign: int) -> tuple[Tensor, Tensor | int]:
    """The sums over a layer's contributions x_i w_ij of a sign, and its biases of that sign."""
    x, weight = layer.x, layer.weight
    positive, negative = weight.clamp(min=0), weight.clamp(max=0)
    x_plus, x_minus = torch.where(x >= 0, x, 0), torch.where(x < 0, x, 0)
    same, other = (positive, negative) if sign > 0 else (negative, positive)
    sums = layer.function(x_plus, same, None) + layer.function(x_minus, other, None)
    if layer.bias is None:
        return sums, 0
    bias = layer.bias.clamp(min=0) if sign > 0 else layer.bias.clamp(max=0)
    return sums, layer.along_channels(bias, z)


def _ratio(z: Tensor, denominator: Tensor, where: Tensor, epsilon: float) -> Tensor:
    """z / (d + epsilon sign d), and 0 outside ``where`` and where d is 0."""
    quotient = z / torch.where(denominator < 0, denominator - epsilon, denominator + epsilon)
    return torch.where(where & (denominator != 0), quotient, 0)


def _with_value(gradient_of: Tensor, value: Tensor) -> Tensor:
    """``value`` in the forward pass, the gradient of ``gradient_of`` in the backward pass."""
    return gradient_of - gradient_of.detach() + value
