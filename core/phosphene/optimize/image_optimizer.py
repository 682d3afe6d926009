"""``optimize_image``: gradient ascent or descent on an image's parametrization."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from ..checkpoints import CheckpointSlot
from ..errors import InputError, UnknownName
from ..graceful_stop import stoppable
from ..images.noise import seeded_generator
from ..precision import at_least_float32
from ..progress import progress_bar
from .augmentations import Transform
from .evaluation import (
    FLAT_STEPS,
    Evaluation,
    Evaluator,
    PerImage,
    check_finite,
    check_flat,
    check_start,
    zero_gradient,
)
from .first_order import FirstOrder
from .lbfgs import Lbfgs
from .parametrizations import Parametrization

#: Images, pixel gradient of the objective, step -> edited images.
AfterStep = Callable[[Tensor, Tensor, int], Tensor]


Optimizer = Literal["adam", "sgd", "normalized-sgd", "lbfgs"]


class Optimization(NamedTuple):
    """Optimized images (N, C, H, W) and the objective at the start of every step, (steps, N).

    ``frames`` (F, N, C, H, W), uint8, are the images during the optimization, and ``alpha`` (N, H, W) in
    [0, 1] is their opacity, if any were asked for.
    """

    images: Tensor
    scores: Tensor
    frames: Tensor | None = None
    alpha: Tensor | None = None


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
    deconvnet_steps: int = 0,
    opacity: bool = False,
    frames: int = 0,
    seed: int | None = None,
) -> Optimization:
    """Optimize images for an objective by gradient steps: I <- I + lr grad.

    Each image of a batch is optimized as if it were alone, and the same seed returns the same images.
    Inside ``run``, Ctrl-C ends the loop after the current step, and with ``out`` the state is saved, to be
    resumed.

    Args:
        objective: images (N, C, H, W) -> scores (N,), each of its own image only.
        image: parametrization to optimize, modified in place.
        optimizer: "sgd" is the step above, "normalized-sgd" divides each image's gradient by its root mean
            square, "adam" is Adam, and "lbfgs" a quasi-Newton step whose length, at first ``lr`` (usually
            1), is quartered until the loss falls. L-BFGS takes no transform.
        maximize: maximize the objective minus the penalties of the regularizer and the parametrization; if
            false, minimize the objective plus the penalties.
        regularizer: images -> penalties (N,).
        transform: (images, generator) -> augmented images for the objective, drawn anew at every step.
        after_step: (images, pixel gradient of the objective, step) -> images, an edit between steps.
        deconvnet_steps: number of first steps at which positive gradients (of the negated objective where
            it is minimized) alone pass ReLUs, closed ones as well (deconvolutional network, Zeiler & Fergus
            2014): they add what speaks for the objective, where plain gradients from an even gray may only
            remove what speaks against it. Where none is positive, the plain gradient is used.
        opacity: also return ``alpha``, the sum over the steps of the absolute gradient of the objective at
            each pixel, mean over the channels, divided by its 80th percentile in the image and clipped to 1:
            near 0 where the objective does not depend on the image (MACO, Fel et al. 2023).
        frames: number of images to record, evenly spread over the steps; the last one is the result.
        seed: seed of the transform's generator.

    Raises:
        DivergenceError: the objective or its gradient is no longer finite, an image's gradient is zero at
            every pixel from the start, or its objective has not changed in ten steps.
        InputError: invalid steps, lr or optimizer, or an objective that is not one differentiable number
            per image.

    Source:
        Simonyan et al. 2014 (lecture 21.6); L-BFGS: Nocedal and Wright, chapter 7.
    """
    _check_arguments(steps, lr, optimizer, transform)
    generator = seeded_generator(seed)
    evaluate = Evaluator(image, objective, maximize, regularizer, transform, generator)
    stepper = Lbfgs(evaluate, lr) if optimizer == "lbfgs" else FirstOrder(evaluate, lr, optimizer)
    record = _Record(image, steps, frames, opacity)
    checkpoint = CheckpointSlot()
    if checkpoint.state:
        _resume(checkpoint, record, stepper, generator)
    resumed = bool(record.scores)
    no_gradient_yet = torch.full((len(image.parameter),), not resumed, device=image.parameter.device)
    evaluation: Evaluation | None = None
    action, label = ("Ascending", "objective") if maximize else ("Descending", "loss")
    note = lambda: f"{label} {float(record.scores[-1].mean()):.4g}"
    with stoppable() as stop:
        # After an earlier stop this loop starts from an unfinished result: a resumed run must not use it.
        start_is_final = not stop.requested
        for step in progress_bar(range(len(record.scores), steps), action, note=note):
            evaluate.through_closed_relus = step < deconvnet_steps
            evaluation = evaluation or evaluate()
            check_finite(evaluation, step, lr)
            record.scores.append(evaluation.scores)
            record.add_gradient(evaluation.pixel_gradient)
            if step < FLAT_STEPS:
                no_gradient_yet = no_gradient_yet & zero_gradient(evaluation, maximize)
                # A random transform may hide a unit from some steps, but not from all of them.
                if transform is None or step == min(FLAT_STEPS, steps) - 1:
                    check_start(no_gradient_yet)
            pixel_gradient = evaluation.pixel_gradient
            evaluation = stepper.step(evaluation)
            if after_step is not None:
                image.assign(after_step(image.image().detach(), pixel_gradient, step))
                evaluation = None
            if step == FLAT_STEPS - 1:
                check_flat(torch.stack(record.scores), maximize)
            record.add_frame_if_due()
            done = len(record.scores) == steps
            if start_is_final and (stop.requested or checkpoint.due() or done):
                _save(checkpoint, record, stepper, generator)
            if stop.requested and not done:
                if frames:
                    record.add_frame()
                stop.stopped_at = stop.stopped_at or f"after {len(record.scores)} of {steps} steps"
                break
    return record.optimization()


def _check_arguments(steps: int, lr: float, optimizer: str, transform: Transform | None) -> None:
    if steps < 1 or not (lr > 0 and math.isfinite(lr)):
        raise InputError(f"steps must be at least 1 and lr greater than 0, not {steps} and {lr}")
    if optimizer not in get_args(Optimizer):
        raise UnknownName("optimizer", optimizer, get_args(Optimizer))
    if optimizer == "lbfgs" and transform is not None:
        raise InputError("L-BFGS needs the same objective at every step: remove the transform, or use adam")


@dataclass
class _Record:
    """Scores (N,) of every step and frames (N, C, H, W), uint8, of an optimization."""

    image: Parametrization
    steps: int
    frame_count: int
    opacity: bool
    scores: list[Tensor] = field(default_factory=list)
    frames: list[Tensor] = field(default_factory=list)
    #: Sum over the steps of the mean absolute gradient at each pixel, (N, H, W).
    gradient_sum: Tensor | None = None

    def add_gradient(self, gradient: Tensor) -> None:
        if self.opacity:
            added = at_least_float32(gradient).abs().mean(1)
            self.gradient_sum = added if self.gradient_sum is None else self.gradient_sum + added

    def add_frame(self) -> None:
        self.frames.append((self.image.image().detach() * 255).round().byte())

    def add_frame_if_due(self) -> None:
        """Record the image if fewer frames than an even spacing demands exist."""
        if len(self.frames) < len(self.scores) * min(self.frame_count, self.steps) // self.steps:
            self.add_frame()

    def optimization(self) -> Optimization:
        images = self.image.image().detach().clone()
        frames = torch.stack(self.frames) if self.frames else None
        alpha = None if self.gradient_sum is None else _opacity(self.gradient_sum.cpu()).to(images)
        return Optimization(images, torch.stack(self.scores), frames, alpha)


def _opacity(gradient_sum: Tensor) -> Tensor:
    """(N, H, W) divided by the 80th percentile of each image and clipped to 1; where that is 0, all of it."""
    flat = gradient_sum.flatten(1)
    threshold = torch.quantile(flat, 0.8, dim=1)[:, None]
    # equivalent mutants: a sum without any gradient has been refused
    scaled = torch.where(threshold > 0, flat / threshold, (flat > 0).to(flat))
    return scaled.clamp(max=1).view_as(gradient_sum)


def _save(
    checkpoint: CheckpointSlot, record: _Record, stepper: FirstOrder | Lbfgs, generator: Generator
) -> None:
    """Save everything that the next step depends on."""
    state = {"parameter": record.image.parameter.detach(), "scores": torch.stack(record.scores)}
    state |= stepper.state_dict()
    if record.frames:
        state["frames"] = torch.stack(record.frames)
    if record.gradient_sum is not None:
        state["gradient_sum"] = record.gradient_sum
    # Cloned, because the file may be written after further steps have changed these tensors in place.
    copies = {name: value.clone() for name, value in state.items()}
    checkpoint.save({"generator": generator.get_state(), **copies})


def _resume(
    checkpoint: CheckpointSlot, record: _Record, stepper: FirstOrder | Lbfgs, generator: Generator
) -> None:
    """Restore what ``_save`` has saved."""
    state = dict(checkpoint.state)
    generator.set_state(state.pop("generator"))
    device = record.image.parameter.device
    # Adam's step count stays on the CPU.
    state = {name: value if name == "step" else value.to(device) for name, value in state.items()}
    record.scores, record.frames = list(state.pop("scores")), list(state.pop("frames", ()))
    record.gradient_sum = state.pop("gradient_sum", None)
    with torch.no_grad():
        record.image.parameter.copy_(state.pop("parameter"))
    stepper.load_state_dict(state)


def pad_rows(parts: Sequence[Tensor]) -> list[Tensor]:
    """Tensors (steps, ...), padded by their last row to the longest: Ctrl-C may end some of them early."""
    steps = torch.arange(max(map(len, parts)))
    return [part[steps.clamp(max=len(part) - 1)] for part in parts]


def concatenate_stages(stages: Sequence[Optimization]) -> Optimization:
    """Successive optimizations, each started at the result of the one before, as a single one.

    Scores and frames are concatenated along the steps; frames are resized to the last stage's size.
    """
    images = stages[-1].images
    frames = [stage.frames for stage in stages if stage.frames is not None]
    resized = [F.interpolate(f.flatten(0, 1).float(), images.shape[-2:]).byte() for f in frames]
    all_frames = torch.cat(resized).unflatten(0, (-1, len(images))) if resized else None
    return Optimization(images, torch.cat([stage.scores for stage in stages]), all_frames)
