"""Attacks against foolbox, torchattacks and ART at equal numbers of steps, iterations and queries.

python -m tests.benchmarks.attack_table pgd --networks resnet20,resnet4b --images 50

Tables: pgd, carlini_wagner, hop_skip_jump, boundary, universal. Networks: the CIFAR-10 networks of
``PHOSPHENE_ASSETS`` (resnet20, 32 and 56; resnet2b and resnet4b, adversarially trained at eps 2/255) and
the bundled networks. Images: the first ``--images`` that are classified correctly, after ``--skip`` of them.
"""

from __future__ import annotations

import argparse
import logging
import warnings
from collections.abc import Iterator

import art.attacks.evasion
import foolbox
import numpy as np
import torch
import torchattacks
from tests.benchmarks import black_box
from tests.benchmarks.attacks import Subject, Work
from tests.cifar_networks import cifar_images, load_cifar
from tests.conftest import ASSETS

from phosphene import TensorDataset, load_model, methods
from phosphene.data import SceneDataset

BUDGETS = (1000, 5000)
#: Number of random starts per mean.
STARTS = 5
#: Rows of a table for one network, the names of the columns first.
Rows = Iterator[tuple[str, ...]]


def load_subject(name: str, count: int, skip: int, norm: str = "l2") -> Subject:
    """A network and ``count`` images that it classifies correctly, after the first ``skip`` of them."""
    if name.startswith("shapes"):
        scenes = SceneDataset(2 * (count + skip))
        model, indices = load_model(f"builtin:{name}"), range(len(scenes))
        images, labels = (
            scenes.read(indices),
            torch.tensor(list(map(model.class_index, scenes.labels(indices)))),
        )
    else:
        model, (images, labels) = load_cifar(ASSETS, name), cifar_images(ASSETS)
    candidates = Subject(name, model, images, norm)
    images = images[candidates.labels == labels][skip : skip + count]
    assert len(images) == count, f"{name} classifies only {len(images) + skip} images correctly"
    return Subject(name, model, images, norm)


def pgd(subject: Subject) -> Rows:
    """Robust accuracy after 50 steps from the images, and from random points.

    For random starts: mean and standard deviation over ``STARTS`` seeds.
    """
    yield "ball", "phosphene", "foolbox", "torchattacks", "random: phosphene", "foolbox", "torchattacks"
    for norm, eps in (("linf", 2 / 255), ("linf", 8 / 255), ("l2", 0.25), ("l2", 0.5)):
        accuracies = (
            [_robust_accuracies(subject, norm, eps, seed=None)],
            [_robust_accuracies(subject, norm, eps, seed) for seed in range(STARTS)],
        )
        from_images, from_random = map(np.array, accuracies)
        cells = [f"{share:.2f}" for share in from_images[0]]
        spread = zip(from_random.mean(0), from_random.std(0, ddof=1), strict=True)
        yield f"{norm} {eps:.3g}", *cells, *(f"{mean:.3f} ± {deviation:.3f}" for mean, deviation in spread)


def _robust_accuracies(subject: Subject, norm: str, eps: float, seed: int | None) -> list[float]:
    """Robust accuracy under the PGD of each library, from the images (no seed) or from random points."""
    foolbox_class = {"linf": foolbox.attacks.LinfPGD, "l2": foolbox.attacks.L2PGD}[norm]
    torchattacks_class = {"linf": torchattacks.PGD, "l2": torchattacks.PGDL2}[norm]
    options = {"steps": 50, "random_start": seed is not None}
    ours = {"norm": norm, "eps": eps, "step_size": eps / 8, "seed": seed, **options}
    fb = foolbox_class(abs_stepsize=eps / 8, **options)
    ta = torchattacks_class(subject.module(), eps=eps, alpha=eps / 8, **options)
    torch.manual_seed(seed or 0)
    adversarial_images = (
        methods["pgd"](subject.model, subject.images, subject.labels, **ours).adversarial,
        fb(subject.foolbox(), subject.images, subject.labels, epsilons=eps)[1],
        ta(subject.images, subject.labels),
    )
    return [1 - float(subject.fooled(adversarial).double().mean()) for adversarial in adversarial_images]


def carlini_wagner(subject: Subject, steps: int = 100, search_steps: int = 6) -> Rows:
    """Fooling rate, median distance and number of passes."""
    yield "iterations", "phosphene", "foolbox", "torchattacks"
    ta = torchattacks.CW(subject.module(), steps=search_steps * steps)  # without a search for c, which is 1
    fb = foolbox.attacks.L2CarliniWagnerAttack(search_steps, steps)
    attacks: tuple[Work, ...] = (
        lambda: methods["carlini_wagner"](
            subject.model, subject.images, subject.labels, search_steps=search_steps, steps=steps
        ),
        lambda: fb(subject.foolbox(), subject.images, subject.labels, epsilons=None)[1],
        lambda: ta(subject.images, subject.labels),
    )
    yield f"{search_steps} x {steps}", *map(subject.summary, attacks)


def hop_skip_jump(subject: Subject, attack: str = "hop_skip_jump") -> Rows:
    """Median distance within each budget of queries; the other libraries attack one image at a time."""
    yield "queries", "phosphene", "foolbox", "ART"
    peers = [
        black_box.nearest_distances(peer, attack, subject.model, subject.images, BUDGETS)
        for peer in (black_box.foolbox, black_box.art)
    ]
    for n, max_queries in enumerate(BUDGETS):
        result = methods[attack](
            subject.model, subject.images, subject.labels, max_queries=max_queries, seed=0
        )
        assert result.success.all() and result.queries.max() <= max_queries
        cells = (result.distance("l2"), *(distances[:, n] for distances in peers))
        yield str(max_queries), *(f"{float(cell.median()):.3f}" for cell in cells)


def boundary(subject: Subject) -> Rows:
    return hop_skip_jump(subject, "boundary")


def universal(subject: Subject, eps: float = 10 / 255) -> Rows:
    """Fooling rate of one perturbation on its training images (one half) and on the other half."""
    yield "library", "fooling rate, training images", "held out"
    fitted = len(subject.images) - len(subject.images) // 2
    result = methods["universal"](subject.model, TensorDataset(subject.images), eps=eps, held_out=0.5)
    art_attack = art.attacks.evasion.UniversalPerturbation(
        subject.art(), attacker="deepfool", attacker_params={"max_iter": 10, "verbose": False},
        delta=0.2, max_iter=5, eps=eps, norm=np.inf, verbose=False,
    )  # fmt: skip
    art_attack.generate(subject.images[:fitted].numpy())
    noise = torch.randn(subject.images[:1].shape, generator=torch.Generator().manual_seed(0)).sign() * eps
    perturbations = {
        "phosphene": result.perturbation[None],
        "ART": torch.from_numpy(art_attack.noise),
        "random signs": noise,
    }
    for name, v in perturbations.items():
        fooled = subject.fooled((subject.images + v).clamp(0, 1)).double()
        yield name, *(f"{float(part.mean()):.0%}" for part in (fooled[:fitted], fooled[fitted:]))


def main() -> None:
    tables = {f.__name__: f for f in (pgd, carlini_wagner, hop_skip_jump, boundary, universal)}
    parser = argparse.ArgumentParser()
    parser.add_argument("table", choices=tables)
    parser.add_argument("--networks", default="resnet20,resnet4b")
    parser.add_argument("--images", type=int, default=20)
    parser.add_argument("--skip", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    torch.manual_seed(0), np.random.seed(0)
    norm = "linf" if arguments.table == "universal" else "l2"
    for n, name in enumerate(arguments.networks.split(",")):
        rows = tables[arguments.table](load_subject(name, arguments.images, arguments.skip, norm))
        head = ("network", *next(rows))
        if n == 0:
            print("", *head, "", sep=" | ")
            print("", *["---"] * len(head), "", sep=" | ")
        for row in rows:
            print("", name, *row, "", sep=" | ", flush=True)


if __name__ == "__main__":
    main()
