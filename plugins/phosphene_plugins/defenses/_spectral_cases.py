"""Layers of unit spectral norm in closed form, for the oracle of ``lipschitz_fit``."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor, nn

from phosphene import Model, load_model

from ._spectral_layers import LayerKind, Orthogonal, UnitNormLayers
from .lipschitz import spectral_norm

#: The convolution of the network: its feature map and its options.
_MAP: tuple[int, int] = (5, 7)
_DILATION: tuple[int, int] = (1, 2)


def _network() -> Model:
    """A chain of a dilated convolution in two groups, a batch norm, a ReLU and a linear layer."""
    layers = nn.Sequential(
        nn.Conv2d(2, 4, (3, 2), groups=2, dilation=_DILATION),
        nn.BatchNorm2d(4, eps=0.1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(60, 3),
    )
    generator = torch.Generator().manual_seed(0)
    for tensor in layers.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(torch.randn(tensor.shape, generator=generator))
    cast(Tensor, layers[1].running_var).copy_(torch.tensor([0.3, 2.0, 0.9, 1.4]))
    return load_model(layers.double().eval(), input_size=(2, *_MAP), mean=[0.4, 0.5], std=[0.5, 0.5])


def _norms(model: Model) -> list[float]:
    """The spectral norms of the convolution, the batch norm and the linear layer."""
    layers: Any = model.module
    scale = layers[1].weight.detach() / (layers[1].running_var + 0.1).sqrt()
    return [
        spectral_norm(layers[0].weight, _MAP, dilation=_DILATION, groups=2),
        float(scale.abs().max()),
        float(torch.linalg.matrix_norm(layers[4].weight.detach(), 2)),
    ]


def layers_of_unit_norm() -> None:
    """The logits are divided by the norms, which are 1 and stay 1 for other weights once calibrated."""
    original = _network()
    images = torch.rand(3, 2, *_MAP, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    product = math.prod(_norms(original))
    kinds: tuple[LayerKind, ...] = ("spectral", "orthogonal")
    for kind in kinds:
        model = original.copy()
        layers = UnitNormLayers(model, images, kind)
        assert math.isclose(layers.initial_bound, 2 * product) and math.isclose(layers.bound, 2.0)
        assert len(layers.parameters()) == 6
        if kind == "spectral":
            torch.testing.assert_close(model(images), original(images) / product)
        # The estimates converge, also after a change of the weights; calibrated they are exact.
        layers.power_iteration(300)
        layers.calibrate()
        with torch.no_grad():
            for parameter in layers.parameters():
                parameter.add_(0.1 * torch.cos(torch.arange(parameter.numel())).view(parameter.shape))
        layers.power_iteration(300)
        torch.testing.assert_close(torch.tensor(_norms(model)), torch.ones(3), rtol=1e-3, atol=0)
        layers.calibrate()
        torch.testing.assert_close(torch.tensor(_norms(model)), torch.ones(3))
        trained = model(images).detach()
        layers.release()
        if kind == "orthogonal":
            modules: Any = model.module
            for weight in (*modules[0].weight.flatten(1).chunk(2), modules[4].weight):
                product_of_rows = (weight @ weight.mT).detach()
                expected = torch.eye(len(weight)) * float(product_of_rows[0, 0])
                torch.testing.assert_close(product_of_rows, expected.double())
        assert not any("parametrizations" in name for name in model.module.state_dict())
        torch.testing.assert_close(model(images).detach(), trained)


def orthogonal_weights() -> None:
    """Orthonormal rows or columns, which a triangular matrix with a positive diagonal maps to the weight."""
    generator = torch.Generator().manual_seed(0)
    for shape, groups in (((6, 2, 1, 2), 2), ((4, 3, 2, 1), 2), ((3, 5), 1)):
        weight = torch.randn(shape, generator=generator, dtype=torch.float64)
        factor = Orthogonal(groups)(weight)
        assert factor.shape == weight.shape
        for w, q in zip(weight.flatten(1).chunk(groups), factor.flatten(1).chunk(groups), strict=True):
            w, q = (w.mT, q.mT) if w.shape[0] < w.shape[1] else (w, q)
            torch.testing.assert_close(q.mT @ q, torch.eye(q.shape[1], dtype=torch.float64))
            triangular = q.mT @ w
            torch.testing.assert_close(triangular, triangular.triu())
            assert (triangular.diagonal() > 0).all()
