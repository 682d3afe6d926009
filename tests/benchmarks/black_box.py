"""How near black-box attacks come with how many queries, beside foolbox and ART.

python -m tests.benchmarks.black_box [--attack hop_skip_jump] [--network resnet20] [--images 20]

A peer is given one image at a time, and what counts for it is the nearest picture that it had the model
look at within the budget, of all those that were adversarial - not only what it returns.
"""

from __future__ import annotations

import argparse
import logging
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from tests.cifar_networks import CLASSES, cifar_images, load_cifar
from tests.conftest import ASSETS
from torch import Tensor, nn

from phosphene import Model, run

BUDGETS = (1000, 5000)


class _Spent(Exception):
    """The budget is used up."""


class Watched(nn.Module):
    """A model that writes down how near the adversarial pictures are that it is shown."""

    def __init__(self, model: Model, image: Tensor, label: int) -> None:
        super().__init__()
        self.model, self.image, self.label = model, image, label
        self.near: list[float] = []

    def forward(self, pictures: Tensor) -> Tensor:
        with torch.no_grad():
            logits = self.model(pictures)
        far = (pictures - self.image).flatten(1).double().norm(dim=1)
        self.near += far.masked_fill(logits.argmax(1) == self.label, torch.inf).tolist()
        if len(self.near) > BUDGETS[-1]:
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

    classifier = BlackBoxClassifier(answers, (3, 32, 32), len(CLASSES), clip_values=(0.0, 1.0))
    made = HopSkipJump(classifier, verbose=False)
    if attack == "boundary":
        made = BoundaryAttack(classifier, targeted=False, verbose=False)
    image, label = watched.image[None].numpy(), np.eye(len(CLASSES))[[watched.label]]
    for _ in range(50):  # it goes on from where it was in rounds of max_iter
        adversarial = made.generate(image, label)
        if attack == "boundary" or not np.isfinite(adversarial).all():
            return


def peer(attack: Callable[[Watched, str], None], name: str, model: Model, images: Tensor) -> list[float]:
    """The median distance of a peer's nearest pictures within each budget."""
    labels = model(images).argmax(1).tolist()
    near = []
    for image, label in zip(images, labels, strict=True):
        watched = Watched(model, image, label)
        with suppress(_Spent, ValueError), torch.no_grad():  # foolbox raises where it finds no start
            attack(watched, name)
        near.append([min(watched.near[:budget]) for budget in BUDGETS])
    return torch.tensor(near).median(0).values.tolist()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--attack", default="hop_skip_jump")
    parser.add_argument("--network", default="resnet20")
    parser.add_argument("--images", type=int, default=20)
    parser.add_argument("--peers", default="foolbox,art")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    torch.manual_seed(0), np.random.seed(0)
    model = load_cifar(ASSETS, asked.network)
    images, labels = cifar_images(ASSETS)
    with torch.no_grad(), model.guard():
        images = images[model(images).argmax(1) == labels][: asked.images]
        clock = time.process_time()
        found = [
            run(asked.attack, model=model, images=images, max_queries=most, seed=0, progress=False)
            for most in BUDGETS
        ]
        print(f"{asked.attack} on {asked.network}, {len(images)} images: median L2 at {BUDGETS} queries")
        print(f"phosphene  {[round(float(f.distance('l2').median()), 4) for f in found]}", end="  ")
        print(
            f"{time.process_time() - clock:.0f} s, queries {[int(f.queries.max()) for f in found]}", end="  "
        )
        print(f"success {[float(f.success.float().mean()) for f in found]}", flush=True)
        for name, attack in (("foolbox", foolbox), ("art", art)):
            if name in asked.peers:
                clock = time.process_time()
                near = peer(attack, asked.attack, model, images)
                print(
                    f"{name:<9}  {[round(v, 4) for v in near]}  {time.process_time() - clock:.0f} s",
                    flush=True,
                )


if __name__ == "__main__":
    main()
