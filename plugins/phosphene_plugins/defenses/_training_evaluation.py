"""The worst pictures in a ball, and how a network does on them while it learns: what trainings share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal, TypeAlias

import torch
from pydantic import Field
from torch import Generator, Tensor

from phosphene import Dataset, Model, batch_size

from ..attacks._gradients import Loss, climb, cross_entropy
from ..attacks._lp_balls import project, random_point, steepest

#: Parameters of a training.
Batch: TypeAlias = Annotated[int, Field(ge=1, le=4096, description="pictures a step")]


FallingRate: TypeAlias = Annotated[float, Field(gt=0, le=1, description="learning rate, which falls to zero")]


LabelsFrom: TypeAlias = Annotated[
    Literal["truth", "predicted"], Field(description="the data set's classes, or what the model says")
]


HeldOut: TypeAlias = Annotated[
    float, Field(gt=0, lt=1, description="share of the pictures to watch it by, at most 64")
]


#: So many steps of PGD, each a quarter of the radius, show how a network does.
STEPS = 10


UNDER_PGD = f"under PGD-{STEPS}"


#: How many held-out pictures are shown, each as it is and attacked before and after.
_SHOWN = 3


def worst(
    model: Model,
    images: Tensor,
    against: Tensor,
    loss: Loss = cross_entropy,
    *,
    start: Tensor,
    eps: float,
    norm: Literal["linf", "l2"],
    step_size: float,
    steps: int,
) -> Tensor:
    """Pictures (N, C, H, W) within eps on which the loss is high: the last points of projected ascent.

    Unlike an attack it works on what the model has wrong already, too.
    """
    for _ in range(steps):
        _, gradient, _ = climb(model, start, against, loss)
        start = project(start + step_size * steepest(gradient, norm), images, eps, norm)
    return start


class Trial:
    """Held-out pictures that a training is watched by, as they are and under PGD on the network as it is."""

    def __init__(
        self,
        model: Model,
        trained: Model,
        dataset: Dataset,
        held: Sequence[int],
        wanted: Callable[[Sequence[int]], Tensor],
        *,
        eps: float,
        norm: Literal["linf", "l2"] = "linf",
    ) -> None:
        self.model, self.trained, self.eps, self.norm = model, trained, eps, norm
        self.images, self.labels = dataset.read(held).to(model.device, model.dtype), wanted(held)
        self.at_once = batch_size(model)

    def attacked(self, victim: Model, count: int | None = None) -> Tensor:
        """The first pictures, attacked; all start with the same offset, every time the same."""
        images, labels = self.images[:count], self.labels[:count]
        start = random_point(images, self.eps, self.norm, Generator().manual_seed(0))
        ball: dict[str, Any] = {"eps": self.eps, "norm": self.norm, "step_size": self.eps / 4}
        parts = zip(*(t.split(self.at_once) for t in (images, labels, start)), strict=True)
        return torch.cat([worst(victim, i, y, start=s, steps=STEPS, **ball) for i, y, s in parts])

    def said(self, victim: Model, images: Tensor) -> Tensor:
        """The classes that a model takes pictures for, (n,)."""
        with torch.no_grad():
            return torch.cat([victim(part).argmax(1) for part in images.split(self.at_once)])

    def __call__(self) -> dict[str, float]:
        """The accuracy of the network as it is, on the pictures as they are and attacked."""
        seen = {"clean": self.images, UNDER_PGD: self.attacked(self.trained)}
        return {
            name: float(self.said(self.trained, images).eq(self.labels).double().mean())
            for name, images in seen.items()
        }

    def shown(self) -> dict[str, Any]:
        """Fields of a result: some pictures, each as it is, attacked before and attacked after."""
        few = self.images[:_SHOWN]
        panels, titles = [few], [[self.model.class_name(c) for c in self.labels[:_SHOWN].tolist()]]
        for when, victim in (("before", self.model), ("after", self.trained)):
            found = self.attacked(victim, _SHOWN)
            panels.append(found)
            names = map(victim.class_name, self.said(victim, found).tolist())
            titles.append([f"{when}: {name}" for name in names])
        labels = tuple(title for triple in zip(*titles, strict=True) for title in triple)
        return {"previews": torch.stack(panels, 1).flatten(0, 1), "labels": labels}
