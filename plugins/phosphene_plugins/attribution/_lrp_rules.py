"""The rules of layer-wise relevance propagation: how a layer's relevance is divided among its inputs.

A rule returns the layer's output z with a modified gradient, chosen such that relevance is value times
gradient on both sides of the layer: R_j = z_j dS/dz_j at its output, R_i = x_i dS/dx_i at its input.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


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
class Composite:
    """One rule for convolutions, another for linear layers."""

    convolution: Rule
    dense: Rule

    def __call__(self, layer: LinearLayer) -> Tensor:
        return (self.dense if layer.is_dense else self.convolution)(layer)


def _ratio(z: Tensor, denominator: Tensor, where: Tensor, epsilon: float) -> Tensor:
    """z / (d + epsilon sign d), and 0 outside ``where`` and where d is 0."""
    quotient = z / torch.where(denominator < 0, denominator - epsilon, denominator + epsilon)
    return torch.where(where & (denominator != 0), quotient, 0)


def _with_value(gradient_of: Tensor, value: Tensor) -> Tensor:
    """``value`` in the forward pass, the gradient of ``gradient_of`` in the backward pass."""
    return gradient_of - gradient_of.detach() + value
