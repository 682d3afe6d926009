"""Black-box attacks of foolbox and ART, held to a number of queries.

They are given one image at a time, and what counts for them is the nearest picture that they had the model
look at within the budget, of all those that were adversarial - not only what they return.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from phosphene import Model


class _Spent(Exception):
    """The budget is used up."""


class Watched(nn.Module):
    """A model that writes down how near the adversarial pictures are that it is shown, ``most`` of them."""

    def __init__(self, model: Model, image: Tensor, label: int, most: int) -> None:
        super().__init__()
        self.model, self.image, self.label, self.most = model, image, label, most
        self.near: list[float] = []

    def forward(self, pictures: Tensor) -> Tensor:
        pictures = pictures[: self.most - len(self.near)]
        if not len(pictures):
            raise _Spent
        with torch.no_grad():
            logits = self.model(pictures)
        far = (pictures - self.image).flatten(1).double().norm(dim=1)
        self.near += far.masked_fill(logits.argmax(1) == self.label, torch.inf).tolist()
        if len(self.near) == self.most:
            raise _Spent
        return logits


def foolbox(watched: Watched, attack: str) -> None:
    """foolbox's attack with its own settings, on one image."""
    import foolbox as fb

    made = {"hop_skip_jump": fb.attacks.HopSkipJumpAttack, "boundary": fb.attacks.BoundaryAttack}[attack]()
    model = fb.PyTorchModel(watched.eval(), bounds=(0, 1), device="cpu")
    made.run(model, watched.image[None], fb.criteria.Misclassification(torch.tensor([watched.label])))


def art(watched: Watched, attack: str) -> None:
    """ART's attack with its own settings, on one image."""
    from art.attacks.evasion import BoundaryAttack, HopSkipJump
    from art.estimators.classification import BlackBoxClassifier

    def answers(pictures: Any) -> Any:
        return watched(torch.from_numpy(np.asarray(pictures, dtype=np.float32))).numpy()

    count = watched.model.class_count
    classifier = BlackBoxClassifier(answers, tuple(watched.image.shape), count, clip_values=(0.0, 1.0))
    made = HopSkipJump(classifier, verbose=False)
    if attack == "boundary":
        made = BoundaryAttack(classifier, targeted=False, verbose=False)
    image, label = watched.image[None].numpy(), np.eye(count)[[watched.label]]
    for _ in range(50):  # it goes on from where it was in rounds of max_iter
        adversarial = made.generate(image, label)
        if attack == "boundary" or not np.isfinite(adversarial).all():
            return


def nearest(
    peer: Callable[[Watched, str], None], attack: str, model: Model, images: Tensor, budgets: tuple[int, ...]
) -> Tensor:
    """How far off a peer's nearest picture of each image is within each budget, (N, budgets)."""
    labels = model(images).argmax(1).tolist()
    near = []
    for image, label in zip(images, labels, strict=True):
        watched = Watched(model, image, label, max(budgets))
        with suppress(_Spent, ValueError), torch.no_grad():  # foolbox raises where it finds no start
            peer(watched, attack)
        near.append([min(watched.near[:budget]) for budget in budgets])
    return torch.tensor(near)
