"""``optimize_image``: gradient ascent or descent on an image's parametrization."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from ..checkpoints import CheckpointSlot
from ..errors import DivergenceError, InputError, UnknownName
from ..graceful_stop import stoppable
from ..images.noise import seeded_generator
from ..progress import progress_bar
from .first_order import Evaluation, FirstOrder
from .lbfgs import Lbfgs
from .parametrizations import Parametrization

PerImage = Callable[[Tensor], Tensor]  # images (N, C, H, W) -> numbers (N,)


Transform = Callable[[Tensor, Generator], Tensor]


AfterStep = Callable[[Tensor, Tensor, int], Tensor]


Optimizer = Literal["adam", "sgd", "normalized-sgd", "lbfgs"]


#: Pictures of this side are convolved faster with their channels last.
CHANNELS_LAST_SIDE = 96


#: After so many steps in which nothing at all has changed, nothing will.
FLAT_STEPS = 10


class Optimization(NamedTuple):
    """What came of it: images (N, C, H, W), and the objective (steps, N) as each step found it.

    ``frames`` (F, N, C, H, W), bytes, are the images on the way, where they were asked for.
    """

    images: Tensor
    scores: Tensor
    frames: Tensor | None = None


def optimize_image(
    objective: PerImage,
    image: Parametrization,
    *,
    steps: int,
    lr: float,
    optimizer: Optimizer = "adam",
    maximize: bool = True,
    regularizer: PerImage | None = None,
    transform: Transform | None = None,
    after_step: AfterStep | None = None,
    frames: int = 0,
    seed: int | None = None,
) -> Optimization:
    """Change an image, step by step, until an objective is large (or small): I <- I + lr grad.

    objective: images (N, C, H, W) -> scores (N,), each of its own image only; it is maximised, less the
    regularizer's penalties (N,) and the parametrisation's own, or, if not ``maximize``, minimised together
    with them.
    optimizer: "sgd" is the plain step above, "normalized-sgd" divides each image's gradient by its root
    mean square, "adam" is Adam, and "lbfgs" a quasi-Newton step whose length, lr at first (natural: 1),
    is quartered until the loss falls; it takes no transform.
    transform: (images, generator) -> what the objective sees of them, drawn anew every step.
    after_step: (images, pixel gradient of the objective, step) -> images, edits between steps.
    frames: how many images to keep on the way, evenly spread over the steps; the last is the result.

    A batch gives what its images give alone, and the same seed the same image. Inside ``run``, Ctrl-C ends
    it after the step it is at, and with ``out`` what is done is kept, to go on from.

    Raises DivergenceError if the objective or its gradient is no longer finite, if an image cannot start
    because its gradient is zero at every pixel, or if ten steps have not changed its objective at all;
    InputError if steps, lr or what the objective returns make no sense.
    Source: Simonyan et al. 2014, lecture 21.6.
    """
    if steps < 1 or not (lr > 0 and math.isfinite(lr)):
        raise InputError(f"Needs steps >= 1 and lr > 0, got {steps} and {lr}.")
    if optimizer not in get_args(Optimizer):
        raise UnknownName("optimizer", optimizer, get_args(Optimizer))
    if optimizer == "lbfgs" and transform is not None:
        raise InputError("L-BFGS needs the same objective at every step: no transform, or adam.")
    generator = seeded_generator(seed)

    def evaluate() -> Evaluation:
        with torch.enable_grad():
            images = image.image()
            seen = images if transform is None else transform(images, generator)
            if min(seen.shape[2:]) >= CHANNELS_LAST_SIDE:
                seen = seen.contiguous(memory_format=torch.channels_last)
            scores, pixel_gradient = _per_image(objective, seen, images, "objective")
            loss, total = (-scores, -pixel_gradient) if maximize else (scores, pixel_gradient)
            if regularizer is not None:
                penalty, its_gradient = _per_image(regularizer, images, images, "regularizer")
                loss, total = loss + penalty, total + its_gradient
            (gradient,) = torch.autograd.grad(images, image.parameter, total)
            if (cost := image.penalty()) is not None:
                loss = loss + cost.detach()
                gradient = gradient + torch.autograd.grad(cost.sum(), image.parameter)[0]
        return Evaluation(scores, loss, pixel_gradient, gradient)

    update = (Lbfgs if optimizer == "lbfgs" else FirstOrder)(image, lr, evaluate, optimizer)
    slot = CheckpointSlot()
    scores: list[Tensor] = []
    film: list[Tensor] = []
    if state := slot.state:
        generator.set_state(state.pop("generator"))
        # Adam counts its steps on the CPU
        state = {n: t if n == "step" else t.to(image.parameter.device) for n, t in state.items()}
        scores, film = list(state.pop("scores")), list(state.pop("frames", ()))
        with torch.no_grad():
            image.parameter.copy_(state.pop("parameter"))
        update.recall(state)

    def take() -> None:
        film.append((image.image().detach() * 255).round().byte())

    def keep() -> None:
        done = {"parameter": image.parameter.detach(), "scores": torch.stack(scores)} | update.memory()
        done |= {"frames": torch.stack(film)} if film else {}
        kept = {name: value.clone() for name, value in done.items()}
        slot.save(generator=generator.get_state(), **kept)

    point: Evaluation | None = None
    asleep = torch.tensor(not scores, device=image.parameter.device).repeat(len(image.parameter))
    doing, named = ("Ascending", "objective") if maximize else ("Descending", "loss")
    standing = lambda: f"{named} {float(scores[-1].mean()):.4g}"
    with stoppable() as stop:
        early = stop.requested  # by then, what it starts from is not what it would be
        for step in progress_bar(range(len(scores), steps), doing, note=standing):
            point = point or evaluate()
            _check(point, step, lr)
            scores.append(point.scores)
            if step < FLAT_STEPS:
                asleep = asleep & _zero_gradient(point, maximize)
                # a random change may hide a unit from its start, but not every time
                if transform is None or step == min(FLAT_STEPS, steps) - 1:
                    _check_start(asleep)
            gradient = point.pixel_gradient
            point = update(point)
            if after_step is not None:
                image.assign(after_step(image.image().detach(), gradient, step))
                point = None
            if step == FLAT_STEPS - 1:
                _check_flat(torch.stack(scores), maximize)
            if len(film) < len(scores) * min(frames, steps) // steps:
                take()
            if not early and (stop.requested or slot.due() or len(scores) == steps):
                keep()
            if stop.requested and len(scores) < steps:
                if frames:
                    take()
                stop.stopped_at = stop.stopped_at or f"after {len(scores)} of {steps} steps"
                break
    return Optimization(
        image.image().detach().clone(), torch.stack(scores), torch.stack(film) if film else None
    )


def pad_rows(parts: Sequence[Tensor]) -> list[Tensor]:
    """Rows (steps, ...) as many as the longest has: where Ctrl-C ended some, the last stands for the rest."""
    steps = torch.arange(max(map(len, parts)))
    return [part[steps.clamp(max=len(part) - 1)] for part in parts]


def concatenate_stages(stages: Sequence[Optimization]) -> Optimization:
    """Ascents that each began where the one before ended, as one; frames get the last one's size."""
    last, films = stages[-1].images, [stage.frames for stage in stages if stage.frames is not None]
    sized = [F.interpolate(f.flatten(0, 1).float(), last.shape[-2:]).byte() for f in films]
    frames = torch.cat(sized).unflatten(0, (-1, len(last))) if sized else None
    return Optimization(last, torch.cat([stage.scores for stage in stages]), frames)


def _per_image(function: PerImage, seen: Tensor, images: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """What a function of what is seen gives, (N,), and its gradient by the images."""
    values = function(seen)
    if values.shape != images.shape[:1]:
        raise InputError(f"The {name} must give one number per image, not {tuple(values.shape)}.")
    if values.requires_grad:
        (gradient,) = torch.autograd.grad(values.sum(), images, allow_unused=True)
        if gradient is not None:
            return values.detach(), gradient
    raise InputError(f"The {name} does not depend on the images through anything differentiable.")


def _check(point: Evaluation, step: int, lr: float) -> None:
    finite = (point.loss + point.scores).isfinite() & point.gradient.flatten(1).isfinite().all(1)
    if not finite.all():
        raise DivergenceError(
            f"Step {step}: the objective or its gradient is no longer finite for images "
            f"{(~finite).nonzero().flatten().tolist()}; lower lr (now {lr:g}) or the regularizer's weight."
        )


def _zero_gradient(point: Evaluation, maximize: bool) -> Tensor:
    """Which images (N,) the objective has no slope for; a loss of zero has arrived, not died."""
    dead = (point.pixel_gradient == 0).flatten(1).all(1)
    return dead if maximize else dead & (point.scores != 0)


def _check_start(dead: Tensor) -> None:
    if dead.any():
        raise DivergenceError(
            f"Images {dead.nonzero().flatten().tolist()} cannot start: the objective's gradient is "
            "zero at every pixel (a dead ReLU, or nothing left to gain); try another seed, a start "
            "from noise or another initial image."
        )


def _check_flat(scores: Tensor, maximize: bool) -> None:
    flat = (scores == scores[0]).all(0)
    if not maximize:
        flat &= scores[0] != 0
    if flat.any():
        raise DivergenceError(
            f"The objective of images {flat.nonzero().flatten().tolist()} is flat: {len(scores)} steps have "
            "not changed it at all (saturated, or nothing left to gain); try a larger lr or another start."
        )
