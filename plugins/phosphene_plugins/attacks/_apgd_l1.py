"""APGD in l1: sparse steps whose sparsity adapts to that of the best perturbation so far."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Generator, Tensor

from phosphene import Model, progress_bar
from phosphene.attacks import is_adversarial, is_zero, per_image, project
from phosphene.optimize import TransformName

from ._gradients import loss_gradient
from ._losses import Loss

#: Radii before the last, in units of eps, each with its fraction of the steps.
_LARGER_BALLS = ((3, 0.3), (2, 0.3))

#: The fraction of the components that the first steps move; at a checkpoint the sparsity is divided by
#: ``_SPARSITY_DECAY`` and the step size by ``_STEP_DECAY``, down to ``_MIN_STEP`` of the radius.
_FIRST_FRACTION, _SPARSITY_DECAY, _STEP_DECAY, _MIN_STEP = 0.2, 1.5, 1.5, 0.1

#: Checkpoints are this fraction of the steps apart. Where the number of perturbed components has fallen below
#: ``_SPARSER`` of that at the last checkpoint, the image restarts from its best point with full steps.
_CHECK_EVERY, _SPARSER = 0.04, 0.95


def apgd_l1(
    model: Model,
    start: Tensor,
    images: Tensor,
    labels: Tensor,
    loss_labels: Tensor,
    loss: Loss,
    *,
    eps: float,
    steps: int,
    targeted: bool,
    eot_samples: int,
    augmentations: Sequence[TransformName],
    generator: Generator,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One run: each image's first adversarial point or its best one, the loss there, and success (N,).

    And whether the first gradient was zero, (N,).

    x <- P(x + eta s),  s = sign(g) / k at the k largest |g|, else 0

    in the ball of 3 eps, then from the best point there in the ball of 2 eps, then in that of eps, where
    alone a success counts. At every checkpoint k becomes 2/3 of the number of components that the best point
    changes; eta is divided by 1.5, or is reset to the radius and the image to its best point where the number
    has fallen.

    Source: Croce & Hein 2021, algorithm 1 and section 4.
    """
    points, losses = start.clone(), start.new_full((len(start),), -torch.inf)
    success = torch.zeros_like(labels, dtype=torch.bool)
    zero: Tensor | None = None
    # A success by chance does not count, so a stochastic gradient never ends a run.
    stops = eot_samples == 1 and not augmentations
    at = _State.at_start(start, images, labels, loss_labels)
    schedule = [(radius, count, n) for radius, count in _stages(eps, steps) for n in range(count)]
    for radius, count, n in progress_bar(schedule, "APGD-l1", steps + 1):
        if n == 0:
            at.enter_ball(radius)
        value, at.gradient, logits = loss_gradient(
            model, at.x, at.loss_labels, loss, eot_samples=eot_samples, augmentations=augmentations,
            generator=generator,
        )  # fmt: skip
        zero = is_zero(at.gradient) if zero is None else zero
        at.keep_best(value)
        if radius == eps:
            won = is_adversarial(logits, at.labels, targeted) & stops
            better = won | (at.best_loss > losses[at.indices])
            points[at.indices[better]] = torch.where(per_image(won), at.x, at.best)[better]
            losses[at.indices[better]] = torch.where(won, value, at.best_loss)[better]
            success[at.indices[won]] = True
            if won.any():
                at = at.select(~won)
                if not len(at.indices):
                    break
        if n > 0 and n % max(1, int(_CHECK_EVERY * count)) == 0:
            at.adapt(radius)
        step = per_image(at.eta) * _sparse_sign(at.gradient, at.sparsity)
        at.x = project(at.x + step, at.images, radius, "l1")
    return points, losses, success, success.new_zeros(len(success)) if zero is None else zero


@dataclass
class _State:
    """The images that are still attacked: every field has a row for each."""

    #: Positions in the batch.
    indices: Tensor
    images: Tensor
    labels: Tensor
    #: The classes in the loss: ``labels``, or target classes.
    loss_labels: Tensor
    x: Tensor
    gradient: Tensor
    best: Tensor
    best_loss: Tensor
    best_gradient: Tensor
    #: The number of perturbed components at the last checkpoint.
    perturbed: Tensor
    #: Step size, and the number of components that a step moves.
    eta: Tensor
    sparsity: Tensor

    @classmethod
    def at_start(cls, start: Tensor, images: Tensor, labels: Tensor, loss_labels: Tensor) -> _State:
        """The state before the first ball is entered."""
        numbers = start.new_zeros(len(start))
        return cls(
            indices=torch.arange(len(start), device=start.device), images=images, labels=labels,
            loss_labels=loss_labels, x=start, gradient=torch.zeros_like(start), best=start,
            best_loss=numbers, best_gradient=torch.zeros_like(start), perturbed=numbers, eta=numbers,
            sparsity=torch.full_like(numbers, _FIRST_FRACTION * start[0].numel()),
        )  # fmt: skip

    def enter_ball(self, radius: float) -> None:
        """Go on from the best point, projected onto the ball, with full steps."""
        self.x = self.best = project(self.best, self.images, radius, "l1")
        self.best_loss = torch.full_like(self.eta, -torch.inf)
        self.best_gradient = torch.zeros_like(self.x)
        self.perturbed, self.eta = torch.full_like(self.eta, torch.inf), torch.full_like(self.eta, radius)

    def keep_best(self, value: Tensor) -> None:
        """Store the points whose loss is the highest so far."""
        higher = value > self.best_loss
        self.best_loss = torch.where(higher, value, self.best_loss)
        self.best = torch.where(per_image(higher), self.x, self.best)
        self.best_gradient = torch.where(per_image(higher), self.gradient, self.best_gradient)

    def adapt(self, radius: float) -> None:
        """A checkpoint: set sparsity and step size."""
        perturbed = (self.best != self.images).flatten(1).sum(1).to(self.best_loss)
        sparser = perturbed < _SPARSER * self.perturbed
        shorter = (self.eta / _STEP_DECAY).clamp(min=_MIN_STEP * radius)
        self.eta = torch.where(sparser, radius, shorter)
        self.x = torch.where(per_image(sparser), self.best, self.x)
        self.gradient = torch.where(per_image(sparser), self.best_gradient, self.gradient)
        self.sparsity, self.perturbed = perturbed / _SPARSITY_DECAY, perturbed

    def select(self, selected: Tensor) -> _State:
        """The state of these images alone."""
        return _State(*(getattr(self, f.name)[selected] for f in fields(self)))


def _stages(eps: float, steps: int) -> list[tuple[float, int]]:
    """Radius and number of gradients of each ball."""
    counts = [int(fraction * steps) for _, fraction in _LARGER_BALLS]
    radii = [eps * times for times, _ in _LARGER_BALLS]
    return [*zip(radii, counts, strict=True), (eps, steps + 1 - sum(counts))]


def _sparse_sign(gradient: Tensor, sparsity: Tensor) -> Tensor:
    """The sign of the ``sparsity`` (n,) largest components, of unit l1 norm; zero elsewhere."""
    sizes = gradient.abs().flatten(1)
    rank = sparsity.long().clamp(1, sizes.shape[1]) - 1
    threshold = sizes.sort(dim=1, descending=True).values.gather(1, rank[:, None])
    sign = gradient.sign() * (sizes >= threshold).view_as(gradient)
    return sign / sign.abs().sum((1, 2, 3), keepdim=True).clamp(min=1)
