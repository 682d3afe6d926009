"""What a method costs beside its peers: CPU and wall time in one process, A B C A B C, smallest of several.

``make bench`` prints them all; ``python -m tests.benchmarks saliency pgd`` times some rows only.
Ratios below 1 mean that Phosphene is cheaper. "the limit" is the simplest loop of the passes that cannot be
avoided, through frozen parameters in contiguous float32. Weights are random.
"""

import sys
import time
import warnings
from collections.abc import Iterator

import art.attacks.evasion
import foolbox
import numpy as np
import torch
import torchattacks
from art.estimators.classification import PyTorchClassifier
from tests.benchmarks import embeddings, seeing
from tests.benchmarks.seeing import Normalized, Work, network
from torch import Tensor, nn

from phosphene import TensorDataset, load_model, methods
from phosphene.datasets import SceneDataset

ROUNDS = 5
#: Seconds, of the processor and by the clock, after which a row is not timed again.
ENOUGH = 100


def pgd() -> Iterator[tuple[str, Work, dict[str, Work]]]:
    module, model = network("resnet18")
    images, labels = torch.rand(4, 3, 112, 112), torch.arange(4)
    peer = torchattacks.PGD(
        Normalized(module).eval(), eps=8 / 255, alpha=2 / 255, steps=10, random_start=False
    )
    yield (
        "pgd, 10 steps, resnet18 at 112, 4",
        lambda: methods["pgd"](model, images, labels, steps=10, random_start=False),
        {"torchattacks": lambda: peer(images, labels)},
    )


def shapes() -> tuple[nn.Module, object, Tensor, Tensor]:
    """A trained network, for attacks that end where they succeed, with pictures and its own labels."""
    model = load_model("builtin:shapes-vgg")
    model.module.eval().requires_grad_(False)
    images = SceneDataset(8).read(range(8))
    return Through(model), model, images, model(images).argmax(1)


class Through(nn.Module):
    """A Phosphene model as a module that takes pixels, for the peers."""

    def __init__(self, model: object) -> None:
        super().__init__()
        self.module, self._model = model.module, model  # type: ignore[attr-defined]

    def forward(self, images: Tensor) -> Tensor:
        return self.module(self._model.normalize(images))  # type: ignore[attr-defined]


def art_classifier(module: nn.Module, classes: int) -> PyTorchClassifier:
    return PyTorchClassifier(module, nn.CrossEntropyLoss(), (3, 64, 64), classes, clip_values=(0, 1))


def fgsm() -> Iterator[tuple[str, Work, dict[str, Work]]]:
    module, model, images, labels = shapes()
    there = foolbox.PyTorchModel(module.eval(), bounds=(0, 1))
    by_art = art.attacks.evasion.FastGradientMethod(art_classifier(module, 10), eps=8 / 255)
    ta = torchattacks.FGSM(module, eps=8 / 255)
    fb = foolbox.attacks.FGSM()

    def judged() -> Tensor:
        """With what Phosphene's result tells beside the pictures: what the model says of them."""
        adversarial = ta(images, labels)
        with torch.no_grad():
            return module(adversarial).argmax(1) != labels

    yield (
        "fgsm, shapes-vgg, 8",
        lambda: methods["fgsm"](model, images, labels),
        {
            "torchattacks": lambda: ta(images, labels),
            "torchattacks, judged": judged,
            "foolbox": lambda: fb(there, images, labels, epsilons=8 / 255),
            "ART": lambda: by_art.generate(images.numpy(), labels.numpy()),
        },
    )


def deepfool() -> Iterator[tuple[str, Work, dict[str, Work]]]:
    module, model, images, labels = shapes()
    there = foolbox.PyTorchModel(module.eval(), bounds=(0, 1))
    by_art = art.attacks.evasion.DeepFool(
        art_classifier(module, 10), epsilon=0.02, nb_grads=10, verbose=False
    )
    ta, fb = torchattacks.DeepFool(module), foolbox.attacks.L2DeepFoolAttack()
    yield (
        "deepfool, shapes-vgg, 8",
        lambda: methods["deepfool"](model, images, labels),
        {
            "torchattacks": lambda: ta(images, labels),
            "foolbox": lambda: fb(there, images, labels, epsilons=None),
            "ART": lambda: by_art.generate(images.numpy()),
        },
    )


def carlini_wagner() -> Iterator[tuple[str, Work, dict[str, Work]]]:
    module, model, images, labels = shapes()
    there = foolbox.PyTorchModel(module.eval(), bounds=(0, 1))
    ta, fb = torchattacks.CW(module, steps=180), foolbox.attacks.L2CarliniWagnerAttack(6, 30)
    by_art = art.attacks.evasion.CarliniL2Method(
        art_classifier(module, 10), binary_search_steps=6, max_iter=30, batch_size=8, verbose=False
    )
    yield (
        "carlini_wagner, 6 x 30 steps, shapes-vgg, 8",
        lambda: methods["carlini_wagner"](model, images, labels, steps=30, search_steps=6),
        {
            "torchattacks": lambda: ta(images, labels),
            "foolbox": lambda: fb(there, images, labels, epsilons=None),
            "ART": lambda: by_art.generate(images.numpy(), labels.numpy()),
        },
    )


def universal() -> Iterator[tuple[str, Work, dict[str, Work]]]:
    module, model, images, _ = shapes()
    peer = art.attacks.evasion.UniversalPerturbation(
        art_classifier(module, 10), attacker="deepfool", attacker_params={"max_iter": 10, "verbose": False},
        delta=0.01, max_iter=1, eps=10 / 255, norm=np.inf, verbose=False,
    )  # fmt: skip
    yield (
        "universal by deepfool, once over 8 pictures, shapes-vgg",
        lambda: methods["universal"](model, TensorDataset(images), epochs=1, aim=0.99, held_out=0),
        {"ART": lambda: peer.generate(images.numpy())},
    )


def seconds(work: Work) -> tuple[float, float]:
    """Of the processor, over all its cores, and by the clock."""
    cpu, clock = time.process_time(), time.perf_counter()
    work()
    return time.process_time() - cpu, time.perf_counter() - clock


def main() -> None:
    warnings.filterwarnings("ignore", module="captum")
    suites = {
        f.__name__: f
        for f in (
            *(seeing.saliency, seeing.gradients, seeing.cams, seeing.occlusion),
            *(pgd, fgsm, deepfool, carlini_wagner, universal),
            *(embeddings.nearest_neighbors, embeddings.pca),
        )
    }
    chosen = sys.argv[1:] or list(suites)
    print(
        f"{torch.get_num_threads()} threads, torch {torch.__version__}; ratios are phosphene to the other's"
    )
    print(f"{'':<58}{'':<28}{'CPU s':>9}{'ratio':>7}{'wall s':>10}{'ratio':>7}")
    for name in chosen:
        for title, ours, peers in suites[name]():
            works = {"phosphene": ours, **peers}
            for work in works.values():
                work()
            rounds: list[list[tuple[float, float]]] = []
            while len(rounds) < ROUNDS and np.sum(rounds) < ENOUGH:
                rounds.append([seconds(work) for work in works.values()])
            best = np.min(rounds, axis=0)
            for who, (cpu, clock) in zip(works, best, strict=True):
                shares = ("", "") if who == "phosphene" else [f"{t:.2f}" for t in best[0] / (cpu, clock)]
                title = title if who == "phosphene" else ""
                print(
                    f"{title:<58}{who:<28}{cpu:>9.3f}{shares[0]:>7}{clock:>10.3f}{shares[1]:>7}", flush=True
                )


if __name__ == "__main__":
    main()
