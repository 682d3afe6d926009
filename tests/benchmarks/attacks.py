"""Attacks against torchattacks, foolbox and ART on the same images: success, distance and number of passes.

The parameters of the network are not frozen: foolbox and ART differentiate with respect to all of them,
torchattacks and Phosphene with respect to the images alone.

*Its passes alone* are the passes of Phosphene's attack in full batches of contiguous float32 through the
network: the cost of an attack without overhead and without an optimized copy of the network.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import art.attacks.evasion
import foolbox
import numpy as np
import torch
import torchattacks
import torchvision
from art.estimators.classification import PyTorchClassifier
from tests.benchmarks import black_box
from torch import Tensor, nn

from phosphene import Model, TensorDataset, load_model, methods
from phosphene.data import SceneDataset
from phosphene.testing.observation import Passes, count_passes

Work = Callable[[], Any]
#: Name of the row, Phosphene's work, the work of other libraries by name, and their subject.
Row = tuple[str, Work, dict[str, Work], "Subject"]
EPS = 8 / 255


@dataclass
class Subject:
    """A network, images and the predicted classes as labels."""

    name: str
    model: Model
    images: Tensor
    norm: str = "l2"

    def __post_init__(self) -> None:
        self.model.module.eval().requires_grad_(True)
        self.model.structure  # noqa: B018  - recorded once, with a pass of its own
        with torch.no_grad():
            self.labels = torch.cat([self.model(batch).argmax(1) for batch in self.images.split(64)])

    def module(self) -> nn.Module:
        """The same network as a module that normalizes pixels, for other libraries."""
        return NormalizedNetwork(self.model).eval()

    def foolbox(self) -> foolbox.PyTorchModel:
        return foolbox.PyTorchModel(self.module(), bounds=(0, 1))

    def art(self) -> PyTorchClassifier:
        shape, count = tuple(self.images.shape[1:]), self.model.class_count
        return PyTorchClassifier(self.module(), nn.CrossEntropyLoss(), shape, count, clip_values=(0, 1))

    def fooled(self, adversarial: Tensor) -> Tensor:
        """Whether the predicted class differs from the label (N,)."""
        with torch.no_grad():
            return torch.cat([self.model(batch).argmax(1) for batch in adversarial.split(64)]) != self.labels

    def summary(self, work: Work) -> str:
        """Fooling rate, median distance and number of images passed forward and backward."""
        passes, result = self.run_and_count(work)
        counts = f"{passes.forward} forward + {passes.backward} backward"
        if result is None:
            return counts
        if isinstance(result, float):
            return f"median {self.norm} {result:.4f}, {counts}"
        success = self.fooled(result)
        distances = (result - self.images).flatten(1).double().norm(float(self.norm.removeprefix("l")), dim=1)
        median = distances.masked_fill(~success, torch.inf).median()
        return f"{success.double().mean():.0%}, median {self.norm} {median:.4f}, {counts}"

    def run_and_count(self, work: Work) -> tuple[Passes, Any]:
        """The passes during ``work``, and its result: adversarial images, or their distance."""
        with count_passes(self.model.module) as passes:
            result = work()
        result = getattr(result, "adversarial", result)
        return passes, torch.from_numpy(result) if isinstance(result, np.ndarray) else result

    def passes_alone(self, work: Work) -> Work:
        """As many passes as ``work`` runs, and nothing else."""
        passes, _ = self.run_and_count(work)
        module, batch = self.module(), len(self.images)
        forward, backward = (-(-rows // batch) for rows in (passes.forward, passes.backward))

        def run_passes() -> None:
            for n in range(forward):
                gradients = backward * (n + 1) // forward - backward * n // forward
                pixels = self.images.clone().requires_grad_(gradients > 0)
                logits = module(pixels)
                for left in range(gradients, 0, -1):
                    torch.autograd.grad(logits.sum(), pixels, retain_graph=left > 1)

        return run_passes

    def row(self, name: str, ours: Work, **peers: Work) -> Row:
        works = {peer.replace("_", ", "): work for peer, work in peers.items()}
        works |= {"its passes alone": self.passes_alone(ours)}
        return f"{name}, {self.name}, {len(self.images)}", ours, works, self


class NormalizedNetwork(nn.Module):
    """A Phosphene model as a module that normalizes pixels."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.module, self._model = model.module, model

    def forward(self, images: Tensor) -> Tensor:
        return self.module(self._model.normalize(images))  # type: ignore[no-any-return]


def shapes(count: int = 8, norm: str = "l2") -> Subject:
    """A trained network, for attacks that stop at success."""
    scenes = SceneDataset(count).read(range(count))
    return Subject("shapes-vgg", load_model("builtin:shapes-vgg"), scenes, norm)


def resnet(side: int, count: int) -> Subject:
    """A network with batch norms and random weights."""
    torch.manual_seed(0)
    module = torchvision.models.resnet18(weights=None)
    model = load_model(module, mean=[0.45] * 3, std=[0.225] * 3, input_size=(3, side, side))
    return Subject(f"resnet18 at {side}", model, torch.rand(count, 3, side, side), "linf")


def pgd() -> Iterator[Row]:
    return map(_pgd, (shapes(norm="linf"), resnet(112, 4)))


def _pgd(subject: Subject) -> Row:
    images, labels, foolbox_model = subject.images, subject.labels, subject.foolbox()
    ta = torchattacks.PGD(subject.module(), eps=EPS, alpha=EPS / 4, steps=10, random_start=False)
    fb = foolbox.attacks.LinfPGD(abs_stepsize=EPS / 4, steps=10, random_start=False)
    art_attack = art.attacks.evasion.ProjectedGradientDescentPyTorch(
        subject.art(), eps=EPS, eps_step=EPS / 4, max_iter=10, verbose=False
    )
    return subject.row(
        "pgd, 10 steps",
        lambda: methods["pgd"](subject.model, images, labels, steps=10, random_start=False),
        torchattacks=lambda: ta(images, labels),
        torchattacks_evaluated=lambda: with_predictions(subject, ta(images, labels)),
        foolbox=lambda: fb(foolbox_model, images, labels, epsilons=EPS)[1],
        ART=lambda: art_attack.generate(images.numpy(), labels.numpy()),
    )


def fgsm() -> Iterator[Row]:
    return map(_fgsm, (shapes(norm="linf"), resnet(224, 4)))


def _fgsm(subject: Subject) -> Row:
    images, labels, foolbox_model = subject.images, subject.labels, subject.foolbox()
    ta, fb = torchattacks.FGSM(subject.module(), eps=EPS), foolbox.attacks.FGSM(random_start=False)
    art_attack = art.attacks.evasion.FastGradientMethod(subject.art(), eps=EPS)
    return subject.row(
        "fgsm",
        lambda: methods["fgsm"](subject.model, images, labels),
        torchattacks=lambda: ta(images, labels),
        torchattacks_evaluated=lambda: with_predictions(subject, ta(images, labels)),
        foolbox=lambda: fb(foolbox_model, images, labels, epsilons=EPS)[1],
        ART=lambda: art_attack.generate(images.numpy(), labels.numpy()),
        ART_evaluated=lambda: with_predictions(
            subject, torch.from_numpy(art_attack.generate(images.numpy(), labels.numpy()))
        ),
    )


def with_predictions(subject: Subject, adversarial: Tensor) -> Tensor:
    """Adds the forward pass that evaluates the adversarial images, as foolbox and Phosphene do.

    This is one of the three passes of a single step.
    """
    with torch.no_grad():
        subject.module()(adversarial)
    return adversarial


def deepfool() -> Iterator[Row]:
    subject = shapes()
    ta, fb = torchattacks.DeepFool(subject.module()), foolbox.attacks.L2DeepFoolAttack()
    art_attack = art.attacks.evasion.DeepFool(subject.art(), epsilon=0.02, nb_grads=10, verbose=False)
    foolbox_model, images, labels = subject.foolbox(), subject.images, subject.labels
    yield subject.row(
        "deepfool",
        lambda: methods["deepfool"](subject.model, images, labels),
        torchattacks=lambda: ta(images, labels),
        foolbox=lambda: fb(foolbox_model, images, labels, epsilons=None)[1],
        ART=lambda: art_attack.generate(images.numpy()),
    )


def carlini_wagner() -> Iterator[Row]:
    subject = shapes()
    ta, fb = torchattacks.CW(subject.module(), steps=180), foolbox.attacks.L2CarliniWagnerAttack(6, 30)
    art_attack = art.attacks.evasion.CarliniL2Method(
        subject.art(), binary_search_steps=6, max_iter=30, batch_size=8, verbose=False
    )
    foolbox_model, images, labels = subject.foolbox(), subject.images, subject.labels
    yield subject.row(
        "carlini_wagner, 6 x 30 steps",
        lambda: methods["carlini_wagner"](subject.model, images, labels, steps=30, search_steps=6),
        torchattacks=lambda: ta(images, labels),
        foolbox=lambda: fb(foolbox_model, images, labels, epsilons=None)[1],
        ART=lambda: art_attack.generate(images.numpy(), labels.numpy()),
    )


def hop_skip_jump(queries: int = 500) -> Iterator[Row]:
    """The other libraries attack one image at a time; their result is the nearest adversarial query."""
    subject = shapes(4)

    def one_by_one(peer: Callable[[black_box.QueryRecorder, str], None]) -> Work:
        arguments = "hop_skip_jump", subject.model, subject.images, (queries,)
        return lambda: float(black_box.nearest_distances(peer, *arguments).median())

    yield subject.row(
        f"hop_skip_jump, {queries} queries",
        lambda: methods["hop_skip_jump"](
            subject.model, subject.images, subject.labels, max_queries=queries, seed=0
        ),
        foolbox=one_by_one(black_box.foolbox),
        ART=one_by_one(black_box.art),
    )


def universal() -> Iterator[Row]:
    subject = shapes(norm="linf")
    peer = art.attacks.evasion.UniversalPerturbation(
        subject.art(), attacker="deepfool", attacker_params={"max_iter": 10, "verbose": False},
        delta=0.01, max_iter=1, eps=10 / 255, norm=np.inf, verbose=False,
    )  # fmt: skip

    def ours() -> Tensor:
        result = methods["universal"](
            subject.model, TensorDataset(subject.images), epochs=1, target_rate=0.99, held_out=0
        )
        return (subject.images + result.perturbation).clamp(0, 1)

    yield subject.row(
        "universal by deepfool, once over all",
        ours,
        ART=lambda: peer.generate(subject.images.numpy()),
    )
