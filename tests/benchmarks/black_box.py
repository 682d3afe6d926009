"""Black-box attacks of foolbox and ART with a limited number of queries.

Each image is attacked alone. The result is the distance of the nearest adversarial image among all queries
within the budget, not only of the returned image.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from phosphene import Model


class _BudgetSpent(Exception):
    """The query budget is spent."""


class QueryRecorder(nn.Module):
    """A model that records the distance of each adversarial query, at most ``max_queries``."""

    def __init__(self, model: Model, image: Tensor, label: int, max_queries: int) -> None:
        super().__init__()
        self.model, self.image, self.label, self.max_queries = model, image, label, max_queries
        self.distances: list[float] = []

    def forward(self, queries: Tensor) -> Tensor:
        queries = queries[: self.max_queries - len(self.distances)]
        if not len(queries):
            raise _BudgetSpent
        with torch.no_grad():
            logits = self.model(queries)
        norms = (queries - self.image).flatten(1).double().norm(dim=1)
        self.distances += norms.masked_fill(logits.argmax(1) == self.label, torch.inf).tolist()
        if len(self.distances) == self.max_queries:
            raise _BudgetSpent
        return logits


def foolbox(recorder: QueryRecorder, attack: str) -> None:
    """foolbox's attack with its own settings, on one image."""
    import foolbox as fb

    attacker = {"hop_skip_jump": fb.attacks.HopSkipJumpAttack, "boundary": fb.attacks.BoundaryAttack}[
        attack
    ]()
    model = fb.PyTorchModel(recorder.eval(), bounds=(0, 1), device="cpu")
    attacker.run(model, recorder.image[None], fb.criteria.Misclassification(torch.tensor([recorder.label])))


def art(recorder: QueryRecorder, attack: str) -> None:
    """ART's attack with its own settings, on one image."""
    from art.attacks.evasion import BoundaryAttack, HopSkipJump
    from art.estimators.classification import BlackBoxClassifier

    def predict(queries: Any) -> Any:
        return recorder(torch.from_numpy(np.asarray(queries, dtype=np.float32))).numpy()

    count = recorder.model.class_count
    classifier = BlackBoxClassifier(predict, tuple(recorder.image.shape), count, clip_values=(0.0, 1.0))
    attacker = HopSkipJump(classifier, verbose=False)
    if attack == "boundary":
        attacker = BoundaryAttack(classifier, targeted=False, verbose=False)
    image, label = recorder.image[None].numpy(), np.eye(count)[[recorder.label]]
    for _ in range(50):  # each call continues for max_iter iterations
        adversarial = attacker.generate(image, label)
        if attack == "boundary" or not np.isfinite(adversarial).all():
            return


def nearest_distances(
    peer: Callable[[QueryRecorder, str], None],
    attack: str,
    model: Model,
    images: Tensor,
    budgets: tuple[int, ...],
) -> Tensor:
    """Distance of the nearest adversarial query of each image within each budget (N, budgets)."""
    labels = model(images).argmax(1).tolist()
    distances = []
    for image, label in zip(images, labels, strict=True):
        recorder = QueryRecorder(model, image, label, max(budgets))
        with suppress(_BudgetSpent, ValueError), torch.no_grad():  # foolbox raises if it has no start
            peer(recorder, attack)
        distances.append([min(recorder.distances[:budget]) for budget in budgets])
    return torch.tensor(distances)
