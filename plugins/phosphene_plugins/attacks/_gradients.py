"""Climbing a loss inside a ball: what gradient attacks with a fixed radius share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, TypeAlias

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Generator, Tensor

from phosphene import Model, ModelError, progress_bar
from phosphene.optimize import TransformName, compose
from phosphene.results import AdversarialExamples

from ._lp_balls import Norm, project, steepest

#: ``loss(logits (N, K), labels (N,)) -> (N,)``, which a successful attack has made large.
Loss = Callable[[Tensor, Tensor], Tensor]


#: Parameters that gradient attacks share: how many random draws a gradient is the mean of, and of what.
Eot: TypeAlias = Annotated[
    int, Field(ge=1, le=1000, description="random draws that a gradient is the mean of")
]


Under: TypeAlias = Annotated[
    tuple[TransformName, ...], Field(max_length=8, description="random changes the example must survive")
]


TargetClasses: TypeAlias = Annotated[
    int, Field(ge=0, le=1000, description="towards each of so many likeliest other classes, one by one")
]


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """-log p of the labels."""
    return F.cross_entropy(logits, labels, reduction="none")


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    """max_{k != y} z_k - z_y: positive where another class wins. With one class alone it is -z_y."""
    own = logits.gather(1, labels[:, None])[:, 0]
    if logits.shape[1] == 1:
        return -own
    others = logits.scatter(1, labels[:, None], -torch.inf)
    return others.amax(1) - own


def difference_of_logits_ratio(logits: Tensor, labels: Tensor) -> Tensor:
    """DLR: (max_{k != y} z_k - z_y) / (z_1st - z_3rd), the same at any scale (Croce & Hein 2020)."""
    return _over_spread(margin(logits, labels), logits, 2, 2)


def targeted_difference_of_logits_ratio(logits: Tensor, labels: Tensor) -> Tensor:
    """(z_t - max_{k != t} z_k) / (z_1st - (z_3rd + z_4th) / 2), t the class wanted."""
    return _over_spread(-margin(logits, labels), logits, 2, 3)


def _over_spread(margins: Tensor, logits: Tensor, *ranks: int) -> Tensor:
    """Margins over how far the first logit is above these; between two classes there is but the margin."""
    if logits.shape[1] < 3:
        return margins
    ordered = logits.sort(dim=1, descending=True).values
    lower = ordered[:, [min(rank, logits.shape[1] - 1) for rank in ranks]].mean(1)
    return margins / (ordered[:, 0] - lower + 1e-12)


def climb(
    model: Model,
    points: Tensor,
    labels: Tensor,
    loss: Loss,
    *,
    eot: int = 1,
    under: Sequence[TransformName] = (),
    generator: Generator | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss at ``points`` (N, C, H, W): its values (N,), its gradient (N, C, H, W), the logits (N, K).

    Each the mean over ``eot`` passes, of a model that is random itself or of pictures that ``under``
    changes at random: the expectation over transformations of Athalye et al. 2018.
    """
    change = compose(under)
    generator = generator or torch.Generator().manual_seed(0)
    total: list[Tensor] = []
    for _ in range(eot):
        place = points.detach().requires_grad_()
        logits = logits_on_graph(model, change(place, generator))
        values = loss(logits, labels)
        (gradient,) = torch.autograd.grad(values.sum(), place)
        # What is no number leads nowhere: one such pixel would take the whole picture's with it.
        found = [values.detach(), gradient.nan_to_num(0.0), logits.detach()]
        total = [a + b for a, b in zip(total, found, strict=True)] if total else found
    values, gradient, logits = (part / eot if eot > 1 else part for part in total)
    return values, gradient, logits


def bare_gradient(model: Model, images: Tensor, labels: Tensor, loss: Loss) -> tuple[Tensor, Tensor]:
    """The loss's gradient at the images (N, C, H, W) as it is, numbers or not, and the logits (N, K)."""
    place = images.detach().requires_grad_()
    logits = logits_on_graph(model, place)
    (gradient,) = torch.autograd.grad(loss(logits, labels).sum(), place)
    return gradient, logits.detach()


def logits_on_graph(model: Model, points: Tensor) -> Tensor:
    """The logits (N, K); ModelError where no gradient leads from them to the pictures."""
    logits = model(points)
    if not logits.requires_grad:
        raise ModelError(
            f"no gradient flows through {model.name} to the picture; square and hop_skip_jump need none"
        )
    return logits


def projected_ascent(
    model: Model,
    images: Tensor,
    labels: Tensor,
    *,
    eps: float,
    step_size: float,
    steps: int,
    norm: Norm,
    targeted: bool,
    start: Tensor | None = None,
    before: Tensor | None = None,
    momentum: float = 0.0,
    eot: int = 1,
    under: Sequence[TransformName] = (),
    generator: Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Climb the cross-entropy of ``labels`` from ``start``, projecting back after every step; or descend.

    x <- clip(P(x + step_size * d)), with d the steepest way in ``norm`` of the gradient, or with ``momentum``
    mu of g <- mu g + gradient / mean|gradient| (Dong et al. 2018). Begins at the images unless told where.
    Returns the last points (N, C, H, W), where nothing was to do the images, and the images' logits
    ``before``, which the first step tells if they are not known.
    """
    towards = -1.0 if targeted else 1.0
    points, pictures, wanted = images if start is None else start, images, labels
    if before is None and (start is not None or eot > 1 or under):
        with torch.no_grad():
            before = model(images)
    rows = None if before is None else unreached(before, labels, targeted)
    if rows is not None:
        points, pictures, wanted = points[rows], pictures[rows], wanted[rows]
    kept = torch.zeros_like(points)
    for _ in progress_bar(range(steps), "climbing the loss"):
        if not len(points):
            break
        _, gradient, logits = climb(
            model, points, wanted, cross_entropy, eot=eot, under=under, generator=generator
        )
        if rows is None:
            before, rows = logits, unreached(logits, labels, targeted)
            points, pictures, wanted, gradient, kept = (
                part[rows] for part in (points, pictures, wanted, gradient, kept)
            )
        if momentum:
            scale = gradient.abs().mean((1, 2, 3), keepdim=True)
            gradient = kept = momentum * kept + gradient / scale.clamp(min=torch.finfo(gradient.dtype).tiny)
        points = project(points + step_size * towards * steepest(gradient, norm), pictures, eps, norm)
    assert before is not None and rows is not None
    return images.index_copy(0, rows, points), before


def judged(
    model: Model, images: Tensor, adversarial: Tensor, labels: Tensor, before: Tensor, *, targeted: bool
) -> AdversarialExamples:
    """An attack's result; an image that needed none, by its logits ``before``, comes back as it is."""
    rows = unreached(before, labels, targeted)
    adversarial, after = images.index_copy(0, rows, adversarial[rows]), before
    if len(rows):
        with torch.no_grad():
            after = before.index_copy(0, rows, model(adversarial[rows]))
    return AdversarialExamples.from_logits(
        model, images, adversarial, labels, before, after, targeted=targeted
    )


def unreached(logits: Tensor, labels: Tensor, targeted: bool) -> Tensor:
    """Which images the attacker still has to work on, their numbers (n,)."""
    return (~reached(logits, labels, targeted)).nonzero()[:, 0]


def reached(logits: Tensor, labels: Tensor, targeted: bool) -> Tensor:
    """Where the model says what the attacker wants, (N,) bool: ``labels``, or anything but them."""
    said = logits.argmax(1)
    return said.eq(labels) if targeted else said.ne(labels)
