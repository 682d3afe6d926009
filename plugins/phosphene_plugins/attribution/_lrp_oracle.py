"""Two small networks whose relevance follows from explicit contributions, for the oracle of LRP."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from phosphene import Model, load_model

from ._oracle_networks import NORMALIZATION

SIZE = (3, 3, 4)


class ByModules(nn.Module):
    """Two positions of a convolution with batch norm and ReLU6, a linear layer with ReLU, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution, self.norm = nn.Conv2d(3, 4, (3, 2), stride=2), nn.BatchNorm2d(4, eps=0.5)
        for values in (self.norm.running_var, self.norm.weight, self.norm.bias, self.norm.running_mean):
            nn.init.uniform_(values, 0.5, 1.5)  # type: ignore[arg-type]
        self.relu6, self.dropout, self.relu = nn.ReLU6(), nn.Dropout(), nn.ReLU()
        self.hidden, self.head = nn.Linear(8, 5), nn.Linear(5, 2)
        nn.init.uniform_(self.convolution.weight, -2, 2)
        nn.init.uniform_(self.head.weight[1], -1, 0.2)  # a negative score

    def forward(self, x: Tensor) -> Tensor:
        x = self.dropout(self.relu6(self.norm(self.convolution(x))))
        result: Tensor = self.head(self.relu(self.hidden(x.flatten(1))))
        return result

    def first_layer(self, x: Tensor) -> Tensor:
        """The convolution with the batch norm folded in."""
        result: Tensor = self.norm(self.convolution(x)).flatten(1)
        return result


class ByFunctions(ByModules):
    """The same by function calls and in-place calls, without the optional arguments, with factors between."""

    def __init__(self) -> None:
        super().__init__()
        self.head.bias = None  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv2d(input=x, weight=self.convolution.weight, stride=2)
        x = torch.batch_norm(x, None, None, *self.statistics(), False, 0.1, 1e-5, False)
        x = F.relu(x.mul(0.5)) * 2
        x.clamp_(0, 6)
        x = F.dropout(x, 0.5, False).flatten(1) / 1
        x = F.linear(x[:, None], self.hidden.weight, self.hidden.bias)[:, 0]
        F.hardtanh(x, 0, 100, inplace=True)  # a ReLU
        return F.linear(x, self.head.weight)

    def first_layer(self, x: Tensor) -> Tensor:
        x = F.conv2d(x, self.convolution.weight, stride=2)
        return F.batch_norm(x, *self.statistics()).flatten(1)

    def statistics(self) -> tuple[Tensor, Tensor]:
        """The running mean and variance."""
        mean, variance = self.norm.running_mean, self.norm.running_var
        assert mean is not None and variance is not None
        return mean, variance


def model_of(network: nn.Module) -> Model:
    """A model of one of the networks, in double precision."""
    return load_model(network.double().eval(), input_size=SIZE, **NORMALIZATION)


@dataclass
class Contributions:
    """The contributions c = x w of a layer's inputs to its outputs, the bias last: (N, J, I + 1)."""

    values: Tensor

    @classmethod
    def of(cls, x: Tensor, weight: Tensor, bias: Tensor) -> Contributions:
        """Those of an input (N, I), a weight (J, I) and a bias (J,)."""
        return cls(torch.cat([x[:, None] * weight, bias[:, None].expand(len(x), -1, 1)], 2))

    def relevance(self, relevance: Tensor, gamma: float, epsilon: float) -> Tensor:
        """The relevance (N, I) of the inputs, from that of the outputs (N, J)."""
        z = self.values.sum(2, keepdim=True)
        favored = self.values * (1 + gamma * (self.values * z > 0))
        z = favored.sum(2, keepdim=True)
        return (favored / (z + epsilon * z.sign()) * relevance[..., None]).sum(1)[:, :-1]


def explicit_relevance(
    network: ByModules, x: Tensor, index: int, gammas: Sequence[float], epsilon: float
) -> Tensor:
    """The relevance (N, C, H, W) of normalized pixels x for a class, with one gamma for each layer."""
    with torch.no_grad():
        zero = torch.zeros_like(x[:1])
        units = torch.eye(zero.numel()).to(x).view(-1, *SIZE)
        offset = network.first_layer(zero)[0]
        matrix = (network.first_layer(units) - offset).T
        first = network.first_layer(x).clamp(0, 6)
        second: Any = network.hidden(first).relu()
        relevance = network.head(second) * F.one_hot(torch.tensor(index), 2)
        layers = (
            (x.flatten(1), matrix, offset),
            *(
                (values, layer.weight, torch.zeros(2).to(x) if layer.bias is None else layer.bias)
                for values, layer in ((first, network.hidden), (second, network.head))
            ),
        )
        for layer, gamma in reversed(list(zip(layers, gammas, strict=True))):
            relevance = Contributions.of(*layer).relevance(relevance, gamma, epsilon)
        return relevance.view_as(x)
