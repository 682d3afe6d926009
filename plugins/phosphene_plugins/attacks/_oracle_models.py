"""Linear models on which attacks have closed forms: shared by the oracles of this family."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from phosphene import Model, load_model
from phosphene.attacks import Norm
from phosphene.optimize import TransformName, compose
from phosphene.results import AdversarialExamples
from phosphene.testing import linear_model

NORMS: tuple[Norm, ...] = ("linf", "l2", "l1")


@dataclass(frozen=True)
class LinearCase:
    """A linear model, images (N, C, H, W), labels (N,), and how attacks move on it.

    ``ascent`` (N, C, H, W): of two classes the direction of the gradient of every loss that grows with
    success, w_other - w_label (targeted: w_target - w_other); zero for an image that is adversarial already.
    """

    model: Model
    images: Tensor
    labels: Tensor
    ascent: Tensor

    def pixel_weight(self) -> Tensor:
        """The gradients of the logits (K, C, H, W) with respect to pixels, of a linear model."""
        x = self.images[:1].detach().requires_grad_()
        rows = [torch.autograd.grad(logit, x, retain_graph=True)[0][0] for logit in self.model(x)[0]]
        return torch.stack(rows)

    def moved(self, length: float, norm: Norm) -> Tensor:
        """clip(x + length d) with d the steepest direction of unit ``norm``."""
        return (self.images + length * unit_step(self.ascent, norm)).clamp(0, 1)


def two_classes(*, targeted: bool = False, margin: float | None = None) -> LinearCase:
    """Two classes and three images: inside the pixel range, at its bounds, and adversarial from the outset.

    ``margin``: the distance z_label - z_other of the logits of the first image; default: as it happens.
    """
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(2, 3, 2, 3, generator=generator, dtype=torch.float64)
    images = 0.5 + 0.1 * torch.randn(3, 3, 2, 3, generator=generator, dtype=torch.float64)
    images[1] = (5 * (images[1] - 0.5) + 0.5).clamp(0, 1)
    predicted = linear_model(weight)(images).argmax(1)
    gap = (weight[1] - weight[0]).mul(images[0]).sum()
    bias = 0 if margin is None else -margin * gap.sign() - gap
    model = linear_model(weight, bias=[0.0, float(bias)])
    predicted = model(images).argmax(1).detach()
    labels = torch.where(torch.tensor([targeted, targeted, not targeted]), 1 - predicted, predicted)
    ascent = (weight[1 - predicted] - weight[predicted]).index_fill(0, torch.tensor([2]), 0)
    return LinearCase(model, images, labels, ascent)


def five_classes(count: int = 1, size: tuple[int, int] = (5, 6)) -> LinearCase:
    """Five classes and images inside the pixel range, labeled as predicted: the loss is curved."""
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(5, 3, *size, generator=generator, dtype=torch.float64)
    images = 0.5 + 0.05 * torch.randn(count, 3, *size, generator=generator, dtype=torch.float64)
    model = linear_model(weight, bias=-weight.flatten(1).sum(1) / 2)
    return LinearCase(model, images, model(images).argmax(1).detach(), torch.zeros_like(images))


def rectified(count: int) -> LinearCase:
    """Five classes of a layer of ReLUs, piecewise linear; on the last image, which is black, all are dead."""
    generator = torch.Generator().manual_seed(4)
    first = torch.randn(12, 3, 2, 3, generator=generator, dtype=torch.float64)
    hidden = linear_model(
        first, bias=(0.1 - first.clamp(max=0.3).flatten(1).sum(1).relu() / 2 - 0.2).tolist()
    )
    last = nn.Linear(12, 5).double()
    last.weight.data = torch.randn(5, 12, generator=generator, dtype=torch.float64)
    last.bias.data = 0.1 * torch.randn(5, generator=generator, dtype=torch.float64)
    module = nn.Sequential(hidden.module, nn.ReLU(), last)
    model = load_model(
        module, input_size=(3, 2, 3), mean=hidden.mean.flatten().tolist(), std=hidden.std.flatten().tolist()
    )
    images = torch.rand(count, 3, 2, 3, generator=generator, dtype=torch.float64)
    images[-1] = 0
    return LinearCase(model, images, model(images).argmax(1).detach(), torch.zeros_like(images))


def assert_predictions(
    result: AdversarialExamples, case: LinearCase, labels: Tensor | None = None, *, targeted: bool = False
) -> None:
    """Assert that the fields of predictions are those of the images and of the adversarial examples."""
    pairs = (
        (case.images, result.before, result.confidence_before),
        (result.adversarial, result.after, result.confidence_after),
    )
    for points, classes, confidence in pairs:
        largest, predicted = case.model(points).detach().softmax(1).max(1)
        assert torch.equal(predicted, classes)
        torch.testing.assert_close(confidence, largest)
    labels = case.labels if labels is None else labels
    assert torch.equal(result.labels, labels) and result.targeted == targeted
    assert torch.equal(result.success, result.after.eq(labels) == targeted)


class UndefinedGradient(nn.Module):
    """Two logits of 18 pixels, whose gradient by the first pixel is NaN; or of rounded ones, without any."""

    def __init__(self, *, rounds: bool = False) -> None:
        super().__init__()
        self.rounds, self.linear = rounds, nn.Linear(18, 2)
        nn.init.eye_(self.linear.weight[:, 4:])

    def forward(self, x: Tensor) -> Tensor:
        x = x.round().detach() if self.rounds else x
        logits: Tensor = self.linear(x.flatten(1))
        return logits + (0 * x[:, 0, 0, :1]).sqrt()


def constant_model() -> Model:
    """Two classes whose logits do not depend on the image (3, 2, 3), of which the first one wins."""
    return linear_model(torch.zeros(2, 3, 2, 3, dtype=torch.float64), bias=[1.0, 0.0])


def assert_zero_gradients(attack: Callable[..., AdversarialExamples], **parameters: Any) -> None:
    """Assert that images without a gradient are reported, except those that are adversarial already."""
    case, constant = two_classes(), constant_model()
    for model, labels, zero in (
        (constant, torch.zeros_like(case.labels), True),
        (constant, torch.ones_like(case.labels), False),
        (case.model, case.labels, False),
    ):
        result = attack(model, case.images, labels, **parameters)
        assert result.zero_gradient is not None and result.zero_gradient.tolist() == 3 * [zero]


def unit_step(ascent: Tensor, norm: Norm) -> Tensor:
    """The steepest direction (N, C, H, W) of unit ``norm``; in "l1" of fewer than 150 components."""
    if norm == "linf":
        return ascent.sign()
    steps = []
    for row in ascent:
        if norm == "l2":
            steps.append(row / max(float(row.norm()), 1e-30))
        else:
            largest = F.one_hot(row.abs().argmax(), row.numel()).view_as(row)
            steps.append(row.sign() * largest)
    return torch.stack(steps)


def mean_gradient(
    case: LinearCase, x: Tensor, samples: int, augmentations: Sequence[TransformName], generator: Generator
) -> Tensor:
    """The gradient of the cross-entropy at x, averaged over random views of x."""
    leaf, augment = x.detach().requires_grad_(), compose(augmentations)
    total = sum(
        F.cross_entropy(case.model(augment(leaf, generator)), case.labels, reduction="sum")
        for _ in range(samples)
    )
    assert isinstance(total, Tensor)
    return torch.autograd.grad(total, leaf)[0] / samples
