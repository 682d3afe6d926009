"""Auto-PGD in l1: few pixels move at a time, and how few follows from how few it took so far."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Generator, Tensor

from phosphene import Model, progress_bar
from phosphene.optimize import TransformName

from ._gradients import Loss, climb, reached
from ._lp_balls import project

#: First in larger balls, for these shares of the steps.
_BALLS = ((3, 0.3), (2, 0.3))


#: The share of the numbers that move at first, and by what the sparsity and the step shrink afterwards.
_MOVING, _SPARSER, _SHORTER = 0.2, 1.5, 1.5


#: A checkpoint after this share of the steps; from where fewer than that share of the numbers has changed
#: since the last one, the climb goes on with whole steps, the least of which is a tenth.
_EVERY, _FEWER, _LEAST = 0.04, 0.95, 0.1


def sparse_ascent(
    model: Model,
    start: Tensor,
    images: Tensor,
    labels: Tensor,
    aims: Tensor,
    objective: Loss,
    *,
    eps: float,
    steps: int,
    targeted: bool,
    eot: int,
    under: Sequence[TransformName],
    generator: Generator,
) -> tuple[Tensor, Tensor, Tensor]:
    """One climb: each image's best or first successful point, its loss, and whether it succeeded.

    x <- P(x + eta s),  s = sign(g) / k at the k largest |g|, else 0

    in the ball of 3 eps, from the best point there in that of 2 eps, and so in that of eps, where alone
    a success counts. At every checkpoint k becomes 2/3 of how many numbers the best point has changed; eta is
    divided by 1.5, or is again the ball's radius and the image at its best point where these were fewer.

    Source: Croce & Hein 2021, algorithm 1 and section 4.
    """
    points, heights = start.clone(), start.new_full((len(start),), -torch.inf)
    done = torch.zeros_like(labels, dtype=torch.bool)
    rows = torch.arange(len(start), device=start.device)
    counts = [int(share * steps) for _, share in _BALLS]
    stages = [*zip([eps * times for times, _ in _BALLS], counts, strict=True), (eps, steps + 1 - sum(counts))]
    best = start
    moving = torch.full_like(heights, _MOVING * start[0].numel())
    turns = ((radius, count, n) for radius, count in stages for n in range(count))
    for radius, count, n in progress_bar(turns, "climbing the loss", steps + 1):
        if n == 0:
            x = best = project(best, images, radius, "l1")
            value = torch.full_like(heights, -torch.inf)
            uphill, changed = torch.zeros_like(x), torch.full_like(heights, torch.inf)
            eta = torch.full_like(heights, radius)
        here, gradient, logits = climb(model, x, aims, objective, eot=eot, under=under, generator=generator)
        higher = here > value
        value = torch.where(higher, here, value)
        best, uphill = (torch.where(_wide(higher), a, b) for a, b in ((x, best), (gradient, uphill)))
        if radius == eps:
            won = reached(logits, labels, targeted) & (eot == 1 and not under)  # a success by chance is none
            better = won | (value > heights[rows])
            points[rows[better]] = torch.where(_wide(won), x, best)[better]
            heights[rows[better]], done[rows[won]] = torch.where(won, here, value)[better], True
            if won.any():
                rest = (rows, images, labels, aims, x, gradient, best, value, uphill, changed, eta, moving)
                rows, images, labels, aims, x, gradient, best, value, uphill, changed, eta, moving = (
                    part[~won] for part in rest
                )
                if not len(rows):
                    break
        if n % max(1, int(_EVERY * count)) == 0 and n:
            now = (best != images).flatten(1).sum(1).to(value)
            fewer = now < _FEWER * changed
            eta = torch.where(fewer, radius, (eta / _SHORTER).clamp(min=_LEAST * radius))
            x, gradient = (torch.where(_wide(fewer), a, b) for a, b in ((best, x), (uphill, gradient)))
            moving, changed = now / _SPARSER, now
        x = project(x + _wide(eta) * _sparse(gradient, moving), images, radius, "l1")
    return points, heights, done


def _sparse(gradient: Tensor, moving: Tensor) -> Tensor:
    """The sign of the so many largest numbers, (n,) of them, at unit l1 length."""
    sizes = gradient.abs().flatten(1)
    place = moving.long().clamp(1, sizes.shape[1]) - 1
    least = sizes.sort(dim=1, descending=True).values.gather(1, place[:, None])
    chosen = gradient.sign() * (sizes >= least).view_as(gradient)
    return chosen / chosen.abs().sum((1, 2, 3), keepdim=True).clamp(min=1)


def _wide(numbers: Tensor) -> Tensor:
    """One number for each picture, (N, 1, 1, 1)."""
    return numbers[:, None, None, None]
