"""Layers that lengthen nothing: weights that are trained freely and used divided by their norm."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from torch.nn.utils.parametrize import register_parametrization, remove_parametrizations

from phosphene import Model, ModelError

from ._bound_propagation import batch_norm_scale
from .lipschitz import bound_of, spectral_norm

Layers = Literal["spectral", "orthogonal"]


#: Rounds of power iteration at the beginning, from a random map on; each step of a training adds one.
_ROUNDS = 10


class Spectral(nn.Module):
    """W / |W|_2 of a convolution on maps of ``size``, or of a linear layer (on maps of one place).

    |W|_2 is what ``lipschitz`` counts, the norm on a torus. In a training it is estimated by power iteration,
    and the gradient goes through the estimate |W v| (Miyato et al. 2018, section 2.1); ``settle`` finds it
    exactly, and what the estimate lacked then is added from there on.
    """

    direction: Tensor
    lacking: Tensor

    def __init__(self, part: nn.Conv2d | nn.Linear, size: tuple[int, int]) -> None:
        super().__init__()
        weight, self.size = _kernel(part.weight), size
        self.how: dict[str, Any] = {"dilation": (1, 1), "groups": 1}
        if isinstance(part, nn.Conv2d):
            self.how = {"dilation": part.dilation, "groups": part.groups}
        inputs = weight.shape[1] * self.how["groups"]
        high, wide = (d * (n - 1) for d, n in zip(self.how["dilation"], weight.shape[2:], strict=True))
        self.around = (0, wide, 0, high)
        start = torch.randn(1, inputs, size[0] + high, size[1] + wide, generator=Generator().manual_seed(0))
        self.register_buffer("direction", (start / start.norm()).to(weight))
        self.register_buffer("lacking", weight.new_ones(()))

    def _estimate(self, weight: Tensor, v: Tensor) -> Tensor:
        return F.conv2d(F.pad(v, self.around, mode="circular"), _kernel(weight), **self.how).norm()

    def iterate(self, weight: Tensor) -> None:
        """v <- W' W v, of length 1."""
        with torch.enable_grad():
            v = self.direction.clone().requires_grad_()
            (turned,) = torch.autograd.grad(self._estimate(weight.detach(), v).square(), v)
        if turned.any():
            self.direction.copy_(turned / turned.norm())

    def settle(self, weight: Tensor) -> float:
        """The exact norm."""
        exact = spectral_norm(_kernel(weight), self.size, **self.how)
        self.lacking.fill_(exact / (float(self._estimate(weight.detach(), self.direction)) or 1.0))
        return exact

    def forward(self, weight: Tensor) -> Tensor:
        return weight / (self.lacking * self._estimate(weight, self.direction))


def _kernel(weight: Tensor) -> Tensor:
    return weight if weight.dim() == 4 else weight[..., None, None]


class Orthogonal(nn.Module):
    """The Q of the weight as a matrix (O, I h w) of each group: orthonormal rows, or columns if fewer."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.groups = groups

    def forward(self, weight: Tensor) -> Tensor:
        matrix = weight.flatten(1).unflatten(0, (self.groups, -1))
        wide = matrix.shape[1] < matrix.shape[2]
        q, r = torch.linalg.qr(matrix.mT if wide else matrix)
        q = q * (1 - 2 * (r.diagonal(dim1=1, dim2=2) < 0).to(q))[:, None]
        return (q.mT if wide else q).reshape(weight.shape)


class Diagonal(nn.Module):
    """The weight of a batch norm, divided by the largest factor that it multiplies a channel by."""

    factors: Tensor

    def __init__(self, part: nn.BatchNorm2d) -> None:
        super().__init__()
        self.register_buffer("factors", batch_norm_scale(part.running_var, None, part.eps))  # type: ignore[arg-type]

    def iterate(self, weight: Tensor) -> None:
        """Nothing is estimated."""

    def settle(self, weight: Tensor) -> float:
        """The exact norm."""
        return float((weight.detach() * self.factors).abs().max())

    def forward(self, weight: Tensor) -> Tensor:
        return weight / (weight * self.factors).abs().max()


class Scaled(nn.Module):
    """The bias times a number, which the activations it is added to were multiplied by."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, bias: Tensor) -> Tensor:
        return self.scale * bias


class UnitNorms:
    """A network's layers with weights, in the order they run in, held to the norm 1 until ``release``.

    ``before`` is the bound (``lipschitz``) of the network as it was, ``bound`` that with all norms 1: what
    the pixels' normalisation, pooling and branches leave. Biases are scaled with the weights, so that a
    plain chain of layers and ReLUs still says what it said, and learned in their old units. ModelError for
    what has no bound, and for a layer that is all zero or has no single norm.
    """

    def __init__(self, model: Model, images: Tensor, layers: Layers) -> None:
        names = {part: name for name, part in model.module.named_modules()}
        sizes: dict[Any, tuple[int, int]] = {}

        def ran(part: nn.Module, args: tuple[Any, ...]) -> None:
            height, width = args[0].shape[-2:] if isinstance(part, nn.Conv2d) else (1, 1)
            if sizes.setdefault(part, (height, width)) != (height, width):
                raise ModelError(f"{names[part]} in {model.name} runs on maps of two sizes: it has two norms")

        with ExitStack() as hooks:
            for part in model.module.modules():
                if isinstance(part, (nn.Conv2d, nn.Linear, nn.BatchNorm2d)) and part.weight is not None:
                    hooks.callback(part.register_forward_pre_hook(ran).remove)
            self.before = bound_of(model, images)
        self.parts, scale = list(sizes), 1.0
        for part, size in sizes.items():
            is_norm = isinstance(part, nn.BatchNorm2d)
            made = Diagonal(part) if is_norm else Spectral(part, size)
            if not (norm := made.settle(part.weight)):
                where = f"{names[part]} in {model.name}"
                raise ModelError(f"the weights of {where} are all zero, which no norm can divide")
            if is_norm:
                part.running_mean.mul_(scale)
            scale /= norm
            if part.bias is not None:
                register_parametrization(part, "bias", Scaled(scale))
            if layers == "orthogonal" and not is_norm:
                register_parametrization(part, "weight", Orthogonal(getattr(part, "groups", 1)))
            register_parametrization(part, "weight", made)
        self.iterate(_ROUNDS)
        self.settle()
        self.bound = bound_of(model, images)

    def parameters(self) -> list[nn.Parameter]:
        """Weights and biases; what else a network may have is left alone, for the bound counts on it."""
        return list(dict.fromkeys(p for part in self.parts for p in part.parameters()))

    def _each(self) -> list[tuple[Any, Tensor]]:
        found = []
        for part in self.parts:
            *before, last = part.parametrizations.weight
            weight = part.parametrizations.weight.original.detach()
            for change in before:
                weight = change(weight)
            found.append((last, weight))
        return found

    def iterate(self, rounds: int = 1) -> None:
        """Let the estimates follow the weights."""
        for layer, weight in self._each():
            for _ in range(rounds):
                layer.iterate(weight)

    def settle(self) -> None:
        """Make all norms 1 exactly (to rounding): from here to the next step the bound is proven."""
        for layer, weight in self._each():
            layer.settle(weight)

    def release(self) -> None:
        """Leave the weights as they were used last, and the network a plain one."""
        for part in self.parts:
            for name in list(part.parametrizations):
                remove_parametrizations(part, name, leave_parametrized=True)
