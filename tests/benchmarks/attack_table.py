"""What attacks find, beside foolbox, torchattacks and ART at equal steps, iterations and queries.

python -m tests.benchmarks.attack_table pgd --networks resnet20,resnet4b --images 50

Tables: pgd, carlini_wagner, hop_skip_jump, boundary, universal. Networks: the CIFAR-10 ones of
``PHOSPHENE_ASSETS`` (resnet20, 32 and 56; resnet2b and resnet4b, trained against changes of 2/255) and
the bundled ones. The pictures are the first that the network has right, after as many as ``--skip`` says.
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
#: How many draws of random starts a mean is of.
STARTS = 5
#: What one network's rows of a table are: a name and cells, the columns' names first.
Rows = Iterator[tuple[str, ...]]


def subject(name: str, count: int, skip: int, norm: str = "l2") -> Subject:
    """A network and ``count`` pictures that it has right, after the first ``skip`` of them."""
    if name.startswith("shapes"):
        scenes = SceneDataset(2 * (count + skip))
        model, everything = load_model(f"builtin:{name}"), range(len(scenes))
        images, labels = (
            scenes.read(everything),
            torch.tensor(list(map(model.class_index, scenes.labels(everything)))),
        )
    else:
        model, (images, labels) = load_cifar(ASSETS, name), cifar_images(ASSETS)
    everyone = Subject(name, model, images, norm)
    images = images[everyone.labels == labels][skip : skip + count]
    assert len(images) == count, f"{name} has only {len(images) + skip} of the pictures right"
    return Subject(name, model, images, norm)


def pgd(on: Subject) -> Rows:
    """The share of the pictures that is still right after 50 steps; and after as many from random points.

    Which those are is luck: told is the mean over ``STARTS`` draws, and how far a draw is from it as a rule.
    """
    yield "ball", "phosphene", "foolbox", "torchattacks", "random: phosphene", "foolbox", "torchattacks"
    for norm, eps in (("linf", 2 / 255), ("linf", 8 / 255), ("l2", 0.25), ("l2", 0.5)):
        kept = [_kept(on, norm, eps, seed=None)], [_kept(on, norm, eps, seed) for seed in range(STARTS)]
        from_themselves, from_random = map(np.array, kept)
        cells = [f"{share:.2f}" for share in from_themselves[0]]
        spread = zip(from_random.mean(0), from_random.std(0, ddof=1), strict=True)
        yield f"{norm} {eps:.3g}", *cells, *(f"{mean:.3f} ± {deviation:.3f}" for mean, deviation in spread)


def _kept(on: Subject, norm: str, eps: float, seed: int | None) -> list[float]:
    """The share that each PGD leaves right, from the pictures themselves or from random points."""
    of_foolbox = {"linf": foolbox.attacks.LinfPGD, "l2": foolbox.attacks.L2PGD}[norm]
    of_torchattacks = {"linf": torchattacks.PGD, "l2": torchattacks.PGDL2}[norm]
    told = {"steps": 50, "random_start": seed is not None}
    ours = {"norm": norm, "eps": eps, "step_size": eps / 8, "seed": seed, **told}
    fb = of_foolbox(abs_stepsize=eps / 8, **told)
    ta = of_torchattacks(on.module(), eps=eps, alpha=eps / 8, **told)
    torch.manual_seed(seed or 0)
    found = (
        methods["pgd"](on.model, on.images, on.labels, **ours).adversarial,
        fb(on.foolbox(), on.images, on.labels, epsilons=eps)[1],
        ta(on.images, on.labels),
    )
    return [1 - float(on.fooled(adversarial).double().mean()) for adversarial in found]


def carlini_wagner(on: Subject, steps: int = 100, search_steps: int = 6) -> Rows:
    """How many fool the network, how far off the median one is, and for how many passes."""
    yield "iterations", "phosphene", "foolbox", "torchattacks"
    ta = torchattacks.CW(on.module(), steps=search_steps * steps)  # it takes no search for c, which is 1
    fb = foolbox.attacks.L2CarliniWagnerAttack(search_steps, steps)
    works: tuple[Work, ...] = (
        lambda: methods["carlini_wagner"](
            on.model, on.images, on.labels, search_steps=search_steps, steps=steps
        ),
        lambda: fb(on.foolbox(), on.images, on.labels, epsilons=None)[1],
        lambda: ta(on.images, on.labels),
    )
    yield f"{search_steps} x {steps}", *map(on.account, works)


def hop_skip_jump(on: Subject, attack: str = "hop_skip_jump") -> Rows:
    """The median distance within so many queries; the peers are given one picture at a time."""
    yield "queries", "phosphene", "foolbox", "ART"
    peers = [
        black_box.nearest(peer, attack, on.model, on.images, BUDGETS)
        for peer in (black_box.foolbox, black_box.art)
    ]
    for n, most in enumerate(BUDGETS):
        found = methods[attack](on.model, on.images, on.labels, max_queries=most, seed=0)
        assert found.success.all() and found.queries.max() <= most
        cells = (found.distance("l2"), *(near[:, n] for near in peers))
        yield str(most), *(f"{float(cell.median()):.3f}" for cell in cells)


def boundary(on: Subject) -> Rows:
    return hop_skip_jump(on, "boundary")


def universal(on: Subject, eps: float = 10 / 255) -> Rows:
    """What one perturbation, made from half of the pictures, fools of those, and of the other half."""
    yield "made by", "fools of those it was made from", "held out"
    learned = len(on.images) - len(on.images) // 2
    found = methods["universal"](on.model, TensorDataset(on.images), eps=eps, held_out=0.5)
    by_art = art.attacks.evasion.UniversalPerturbation(
        on.art(), attacker="deepfool", attacker_params={"max_iter": 10, "verbose": False},
        delta=0.2, max_iter=5, eps=eps, norm=np.inf, verbose=False,
    )  # fmt: skip
    by_art.generate(on.images[:learned].numpy())
    noise = torch.randn(on.images[:1].shape, generator=torch.Generator().manual_seed(0)).sign() * eps
    made = {
        "phosphene": found.perturbation[None],
        "ART": torch.from_numpy(by_art.noise),
        "random signs": noise,
    }
    for name, v in made.items():
        fooled = on.fooled((on.images + v).clamp(0, 1)).double()
        yield name, *(f"{float(part.mean()):.0%}" for part in (fooled[:learned], fooled[learned:]))


def main() -> None:
    tables = {f.__name__: f for f in (pgd, carlini_wagner, hop_skip_jump, boundary, universal)}
    parser = argparse.ArgumentParser()
    parser.add_argument("table", choices=tables)
    parser.add_argument("--networks", default="resnet20,resnet4b")
    parser.add_argument("--images", type=int, default=20)
    parser.add_argument("--skip", type=int, default=0)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    torch.manual_seed(0), np.random.seed(0)
    norm = "linf" if asked.table == "universal" else "l2"
    for n, name in enumerate(asked.networks.split(",")):
        rows = tables[asked.table](subject(name, asked.images, asked.skip, norm))
        head = ("network", *next(rows))
        if n == 0:
            print("", *head, "", sep=" | ")
            print("", *["---"] * len(head), "", sep=" | ")
        for row in rows:
            print("", name, *row, "", sep=" | ", flush=True)


if __name__ == "__main__":
    main()
