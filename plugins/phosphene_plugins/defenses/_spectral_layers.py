"""Layers of unit spectral norm: weights that are trained freely and used divided by their norm."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from torch.nn.utils.parametrize import register_parametrization, remove_parametrizations

from phosphene import Model, ModelError

from ._bound_propagation import batch_norm_scale
from .lipschitz import lipschitz_bound, spectral_norm

LayerKind = Literal["spectral", "orthogonal"]

#: Power iterations from a random vector, before the training; every step of a training adds one.
_INITIAL_ITERATIONS = 10


class SpectralNormalization(nn.Module):
    """W / |W|_2 of a convolution on feature maps of ``size``, or of a linear layer (as a 1x1 convolution).

    |W|_2 is the bound that ``lipschitz`` uses, the norm on a torus. During training it is estimated by
    power iteration, and the gradient passes through the estimate |W v| (Miyato et al. 2018, section 2.1).
    ``calibrate`` computes it exactly and multiplies the estimate by the missing factor from then on.
    """

    singular_vector: Tensor
    correction: Tensor

    def __init__(self, layer: nn.Conv2d | nn.Linear, size: tuple[int, int]) -> None:
        super().__init__()
        weight, self.size = _as_kernel(layer.weight), size
        self.conv_options: dict[str, Any] = {"dilation": (1, 1), "groups": 1}
        if isinstance(layer, nn.Conv2d):
            self.conv_options = {"dilation": layer.dilation, "groups": layer.groups}
        dilation, groups = self.conv_options["dilation"], self.conv_options["groups"]
        bottom, right = (d * (n - 1) for d, n in zip(dilation, weight.shape[2:], strict=True))
        self.padding = (0, right, 0, bottom)
        shape = 1, weight.shape[1] * groups, size[0] + bottom, size[1] + right
        vector = torch.randn(shape, generator=Generator().manual_seed(0))
        self.register_buffer("singular_vector", (vector / vector.norm()).to(weight))
        self.register_buffer("correction", weight.new_ones(()))

    def _estimate(self, weight: Tensor, v: Tensor) -> Tensor:
        """|W v|."""
        padded = F.pad(v, self.padding, mode="circular")
        return F.conv2d(padded, _as_kernel(weight), **self.conv_options).norm()

    def power_iteration(self, weight: Tensor) -> None:
        """v <- W' W v / |W' W v|."""
        with torch.enable_grad():
            v = self.singular_vector.clone().requires_grad_()
            (product,) = torch.autograd.grad(self._estimate(weight.detach(), v).square(), v)
        if product.any():
            self.singular_vector.copy_(product / product.norm())

    def calibrate(self, weight: Tensor) -> float:
        """Set the correction so that the norm is exact, and return that norm."""
        exact = spectral_norm(_as_kernel(weight), self.size, **self.conv_options)
        # equivalent mutants: a number has no gradient
        estimate = float(self._estimate(weight.detach(), self.singular_vector)) or 1.0
        self.correction.fill_(exact / estimate)
        return exact

    def forward(self, weight: Tensor) -> Tensor:
        return weight / (self.correction * self._estimate(weight, self.singular_vector))


def _as_kernel(weight: Tensor) -> Tensor:
    """(O, I, h, w); the weight of a linear layer as a 1x1 kernel."""
    return weight if weight.dim() == 4 else weight[..., None, None]


class Orthogonal(nn.Module):
    """The Q factor of each group's weight as a matrix (O, I h w): orthonormal rows, or columns if fewer."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.groups = groups

    def forward(self, weight: Tensor) -> Tensor:
        matrix = weight.flatten(1).unflatten(0, (self.groups, -1))
        is_wide = matrix.shape[1] < matrix.shape[2]
        q, r = torch.linalg.qr(matrix.mT if is_wide else matrix)
        # A positive diagonal of R makes the factorization unique, so Q keeps the signs of the weight.
        q = q * (1 - 2 * (r.diagonal(dim1=1, dim2=2) < 0).to(q))[:, None]
        return (q.mT if is_wide else q).reshape(weight.shape)


class BatchNormNormalization(nn.Module):
    """The weight of a batch norm divided by its spectral norm, the largest factor of a channel."""

    scale: Tensor

    def __init__(self, layer: nn.BatchNorm2d) -> None:
        super().__init__()
        self.register_buffer("scale", batch_norm_scale(layer.running_var, None, layer.eps))  # type: ignore[arg-type]

    def power_iteration(self, weight: Tensor) -> None:
        """Nothing: the norm is computed exactly in every pass."""

    def calibrate(self, weight: Tensor) -> float:
        """The norm."""
        # equivalent mutants: a number has no gradient
        return float((weight.detach() * self.scale).abs().max())

    def forward(self, weight: Tensor) -> Tensor:
        return weight / (weight * self.scale).abs().max()


class ScaledBias(nn.Module):
    """A bias times a constant, by which the activations it is added to were multiplied."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, bias: Tensor) -> Tensor:
        return self.scale * bias


class UnitNormLayers:
    """Parametrizes a network's layers with weights so that each has spectral norm 1, until ``release``.

    ``layers`` are the parametrized ones in the order of the forward pass. ``initial_bound`` is the
    Lipschitz bound (``lipschitz``) of the network before, ``bound`` the one with all norms 1: the factor of
    the pixels' normalization, pooling and branches. Biases are scaled with the weights, so that a chain of
    layers and ReLUs still predicts the same classes, and are trained in their old units.

    Raises ModelError for an operation without a bound, a layer whose weights are all zero, and a layer that
    runs on feature maps of two sizes, which has two norms.
    """

    def __init__(self, model: Model, images: Tensor, kind: LayerKind) -> None:
        names = {module: name for name, module in model.module.named_modules()}
        sizes: dict[Any, tuple[int, int]] = {}

        def record_size(layer: nn.Module, args: tuple[Any, ...]) -> None:
            height, width = args[0].shape[-2:] if isinstance(layer, nn.Conv2d) else (1, 1)
            if sizes.setdefault(layer, (height, width)) != (height, width):
                raise ModelError(
                    f"{names[layer]} in {model.name} runs on maps of two sizes: it has two norms"
                )

        with ExitStack() as hooks:
            for module in model.module.modules():
                if isinstance(module, (nn.Conv2d, nn.Linear, nn.BatchNorm2d)) and module.weight is not None:
                    hooks.callback(module.register_forward_pre_hook(record_size).remove)
            self.initial_bound = lipschitz_bound(model, images)
        self.layers, scale = list(sizes), 1.0
        for layer, size in sizes.items():
            is_batch_norm = isinstance(layer, nn.BatchNorm2d)
            normalization = (
                BatchNormNormalization(layer) if is_batch_norm else SpectralNormalization(layer, size)
            )
            norm = normalization.calibrate(layer.weight)
            if not norm:
                raise ModelError(
                    f"the weights of {names[layer]} in {model.name} are all zero and cannot be normalized"
                )
            if is_batch_norm:
                layer.running_mean.mul_(scale)
            scale /= norm
            if layer.bias is not None:
                register_parametrization(layer, "bias", ScaledBias(scale))
            if kind == "orthogonal" and not is_batch_norm:
                register_parametrization(layer, "weight", Orthogonal(getattr(layer, "groups", 1)))
            register_parametrization(layer, "weight", normalization)
        self.power_iteration(_INITIAL_ITERATIONS)
        self.calibrate()
        self.bound = lipschitz_bound(model, images)

    def parameters(self) -> list[nn.Parameter]:
        """The layers' weights and biases; ``bound`` assumes that all other parameters are constant."""
        return list(dict.fromkeys(p for layer in self.layers for p in layer.parameters()))

    def _normalizations(self) -> list[tuple[Any, Tensor]]:
        """Each layer's normalization and the weight that it is applied to."""
        pairs = []
        for layer in self.layers:
            *earlier, normalization = layer.parametrizations.weight
            weight = layer.parametrizations.weight.original.detach()
            for parametrization in earlier:
                weight = parametrization(weight)
            pairs.append((normalization, weight))
        return pairs

    def power_iteration(self, iterations: int = 1) -> None:
        """Update the estimates of the norms to the current weights."""
        for normalization, weight in self._normalizations():
            for _ in range(iterations):
                normalization.power_iteration(weight)

    def calibrate(self) -> None:
        """Make all norms 1 exactly (to rounding), so that ``bound`` is proven until the next step."""
        for normalization, weight in self._normalizations():
            normalization.calibrate(weight)

    def release(self) -> None:
        """Replace the parametrizations by the weights that they compute: a plain network remains."""
        for layer in self.layers:
            for name in list(layer.parametrizations):
                remove_parametrizations(layer, name)

    def weights(self, network: nn.Module) -> dict[str, Tensor]:
        """The state dict that the network of these layers would have after ``release``."""
        state = {
            n: tensor for n, tensor in network.state_dict().items() if ".parametrizations." not in f".{n}"
        }
        for name, layer in network.named_modules():
            if layer in self.layers:
                prefix = f"{name}." if name else ""
                state |= {f"{prefix}{n}": getattr(layer, n).detach() for n in layer.parametrizations}
        return state
