"""Options, held-out evaluation under PGD, and cost of the methods that train a network."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal, TypeAlias

import torch
from pydantic import Field
from torch import Generator, Tensor

from phosphene import Dataset, Model, batch_size
from phosphene.attacks import project, random_point, steepest
from phosphene.spec import Cost, Expression, ParameterGroup, ceil, maximum, minimum, param, size
from phosphene.training import EVALUATIONS, MAX_HELD_OUT

from ..attacks._gradients import loss_gradient
from ..attacks._losses import Loss, cross_entropy

#: Steps of the PGD that a training is evaluated with; each step is a quarter of the radius long.
PGD_STEPS = 10
#: The name of the accuracy under that attack, among a result's curves.
UNDER_PGD = f"under PGD-{PGD_STEPS}"
#: Held-out images in the previews, each clean and attacked before and after the training.
_PREVIEW_IMAGES = 3


class TrainingOptions(ParameterGroup):
    """The parameters of every training; a method may change the defaults."""

    steps: Annotated[int, Field(ge=1, le=1_000_000, description="number of optimizer steps")] = 1000
    batch: Annotated[int, Field(ge=1, le=4096, description="images per step")] = 64
    lr: Annotated[
        float, Field(gt=0, le=1, description="initial learning rate, which falls linearly to zero")
    ] = 1e-3
    labels: Annotated[
        Literal["truth", "predicted"],
        Field(description="classes to learn: the data set's labels, or those the model predicts"),
    ] = "truth"
    held_out: Annotated[
        float,
        Field(
            gt=0,
            lt=1,
            description=f"share of the images to evaluate on, the last ones, at most {MAX_HELD_OUT}",
        ),
    ] = 0.1
    checkpoints: Annotated[
        int,
        Field(ge=0, le=1000, description="number of times that the weights are stored, at equal intervals"),
    ] = 0


#: The radius of trainings that have no ball of their own.
EvaluationRadius: TypeAlias = Annotated[
    float, Field(gt=0, le=1, description="radius of the linf PGD that the training is evaluated with")
]


def training_cost(
    forward: Expression | int,
    backward: Expression | int,
    *,
    certificate_passes: int = 0,
    setup_passes: int = 0,
) -> Cost:
    """The cost of a training with ``TrainingOptions`` that ``HeldOutEvaluation`` evaluates.

    Args:
        forward, backward: passes of each image of a batch, labels="predicted" included.
        certificate_passes: forward passes of each held-out image in one evaluation, beside clean and PGD.
        setup_passes: single forward passes before and after the training.
    """
    images = param.steps * param.batch
    share = param.held_out * size.dataset
    # Of less than half an image all images are evaluated, see ``train_test_split``.
    everything = (1 - minimum(1, ceil(maximum(0, share - 0.5)))) * size.dataset
    held_out = minimum(MAX_HELD_OUT, ceil(share) + everything)
    evaluations = minimum(EVALUATIONS, param.steps) + 1  # one before the first step
    # Forward passes of a held-out image: the attack, the predictions on it clean and attacked, its label.
    per_evaluation = PGD_STEPS + 2 + certificate_passes
    label = 1
    # The preview images are attacked through two models, and each example is classified.
    previews = 2 * _PREVIEW_IMAGES
    return Cost(
        forward=forward * images
        + (evaluations * per_evaluation + label) * held_out
        + (previews * (PGD_STEPS + 1) + setup_passes),
        backward=backward * images + evaluations * PGD_STEPS * held_out + previews * PGD_STEPS,
    )


def pgd_points(
    model: Model,
    images: Tensor,
    targets: Tensor,
    loss: Loss = cross_entropy,
    *,
    start: Tensor,
    eps: float,
    norm: Literal["linf", "l2"],
    step_size: float,
    steps: int,
) -> Tensor:
    """The last points (N, C, H, W) of projected gradient ascent on ``loss(logits, targets)``.

    x <- P(x + step_size d),  from ``start``, within ``eps`` of ``images``

    Unlike the attack ``pgd`` it also moves images that are misclassified already, as a training must.
    """
    points = start
    for _ in range(steps):
        _, gradient, _ = loss_gradient(model, points, targets, loss)
        points = project(points + step_size * steepest(gradient, norm), images, eps, norm)
    return points


class HeldOutEvaluation:
    """Accuracy of a network in training on held-out images, clean and under PGD on its current weights.

    Args:
        original, trained: the model before the training, and its copy that is trained.
        indices: the held-out images' positions in ``dataset``.
        read_labels: from indices to class indices (n,).
        eps, norm: the ball of the attack.
    """

    def __init__(
        self,
        original: Model,
        trained: Model,
        dataset: Dataset,
        indices: Sequence[int],
        read_labels: Callable[[Sequence[int]], Tensor],
        *,
        eps: float,
        norm: Literal["linf", "l2"] = "linf",
    ) -> None:
        self.original, self.trained, self.eps, self.norm = original, trained, eps, norm
        self.images = dataset.read(indices).to(original.device, original.dtype)
        self.labels = read_labels(indices)
        self.max_batch = batch_size(original)

    def __call__(self) -> dict[str, float]:
        """Clean accuracy and accuracy under PGD of the network as it is."""
        images = {"clean": self.images, UNDER_PGD: self.attack(self.trained)}
        return {
            name: float(self.predict(self.trained, batch).eq(self.labels).cpu().double().mean())
            for name, batch in images.items()
        }

    def attack(self, model: Model, count: int | None = None) -> Tensor:
        """Adversarial examples of the first ``count`` images; every call starts from the same offset."""
        images, labels = self.images[:count], self.labels[:count]
        start = random_point(images, self.eps, self.norm, Generator().manual_seed(0))
        ball: dict[str, Any] = {"eps": self.eps, "norm": self.norm, "step_size": self.eps / 4}
        batches = zip(*(t.split(self.max_batch) for t in (images, labels, start)), strict=True)
        return torch.cat([pgd_points(model, x, y, start=x0, steps=PGD_STEPS, **ball) for x, y, x0 in batches])

    def predict(self, model: Model, images: Tensor) -> Tensor:
        """The predicted classes (n,)."""
        with torch.no_grad():
            return torch.cat([model(batch).argmax(1) for batch in images.split(self.max_batch)])

    def previews(self) -> dict[str, Any]:
        """``previews`` and ``labels`` of a result: some images, clean and attacked before and after."""
        clean, labels = self.images[:_PREVIEW_IMAGES], self.labels[:_PREVIEW_IMAGES]
        panels, titles = [clean], [[self.original.class_name(label) for label in labels.tolist()]]
        for when, model in (("before", self.original), ("after", self.trained)):
            examples = self.attack(model, _PREVIEW_IMAGES)
            panels.append(examples)
            names = map(model.class_name, self.predict(model, examples).tolist())
            titles.append([f"{when}: {name}" for name in names])
        by_image = tuple(title for triple in zip(*titles, strict=True) for title in triple)
        return {"previews": torch.stack(panels, 1).flatten(0, 1), "labels": by_image}
