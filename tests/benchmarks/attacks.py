"""Attacks beside torchattacks, foolbox and ART: on the same pictures, what each finds in how many passes.

The network is as torchvision gives it, its parameters not frozen: foolbox and ART differentiate to all of
them, torchattacks and Phosphene to the pictures alone.

*Its passes alone* are as many passes as Phosphene's attack takes, in whole batches of contiguous float32
through the frozen network, and nothing else: what an attack that wastes nothing costs without a tuned twin.
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
#: A row's name, our work, the peers' by their names, and the subject of all of them.
Row = tuple[str, Work, dict[str, Work], "Subject"]
EPS = 8 / 255


@dataclass
class Subject:
    """A network with pictures that it does not take for anything else yet."""

    name: str
    model: Model
    images: Tensor
    norm: str = "l2"

    def __post_init__(self) -> None:
        self.model.module.eval().requires_grad_(True)
        self.model.structure  # noqa: B018  - recorded once, with a pass of its own
        with torch.no_grad():
            self.labels = torch.cat([self.model(some).argmax(1) for some in self.images.split(64)])

    def module(self) -> nn.Module:
        """The same network as a module that takes pixels, for a peer."""
        return Through(self.model).eval()

    def foolbox(self) -> foolbox.PyTorchModel:
        return foolbox.PyTorchModel(self.module(), bounds=(0, 1))

    def art(self) -> PyTorchClassifier:
        shape, count = tuple(self.images.shape[1:]), self.model.class_count
        return PyTorchClassifier(self.module(), nn.CrossEntropyLoss(), shape, count, clip_values=(0, 1))

    def fooled(self, adversarial: Tensor) -> Tensor:
        """(N,) whether the network takes these pictures for something else."""
        with torch.no_grad():
            return torch.cat([self.model(some).argmax(1) for some in adversarial.split(64)]) != self.labels

    def account(self, work: Work) -> str:
        """How many fool the network, how far off the median one is, and how many pictures went through it."""
        seen, found = self.counted(work)
        told = f"{seen.forward} forward + {seen.backward} back"
        if found is None:
            return told
        if isinstance(found, float):
            return f"median {self.norm} {found:.4f}, {told}"
        won = self.fooled(found)
        far = (found - self.images).flatten(1).double().norm(float(self.norm.removeprefix("l")), dim=1)
        median = far.masked_fill(~won, torch.inf).median()
        return f"{won.double().mean():.0%}, median {self.norm} {median:.4f}, {told}"

    def counted(self, work: Work) -> tuple[Passes, Any]:
        """What went through the network meanwhile, and what came out: pictures, or how far they are off."""
        with count_passes(self.model.module) as seen:
            found = work()
        found = getattr(found, "adversarial", found)
        return seen, torch.from_numpy(found) if isinstance(found, np.ndarray) else found

    def passes_alone(self, work: Work) -> Work:
        """As many passes as ``work`` takes, and nothing else."""
        seen, _ = self.counted(work)
        module, batch = self.module(), len(self.images)
        forward, back = (-(-rows // batch) for rows in (seen.forward, seen.backward))

        def passes() -> None:
            for n in range(forward):
                returns = back * (n + 1) // forward - back * n // forward
                place = self.images.clone().requires_grad_(returns > 0)
                logits = module(place)
                for left in range(returns, 0, -1):
                    torch.autograd.grad(logits.sum(), place, retain_graph=left > 1)

        return passes

    def row(self, name: str, ours: Work, **peers: Work) -> Row:
        named = {peer.replace("_", ", "): work for peer, work in peers.items()}
        named |= {"its passes alone": self.passes_alone(ours)}
        return f"{name}, {self.name}, {len(self.images)}", ours, named, self


class Through(nn.Module):
    """A Phosphene model as a module that takes pixels."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.module, self._model = model.module, model

    def forward(self, images: Tensor) -> Tensor:
        return self.module(self._model.normalize(images))  # type: ignore[no-any-return]


def shapes(count: int = 8, norm: str = "l2") -> Subject:
    """A trained network, for attacks that end where they succeed."""
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


def _pgd(on: Subject) -> Row:
    images, labels, there = on.images, on.labels, on.foolbox()
    ta = torchattacks.PGD(on.module(), eps=EPS, alpha=EPS / 4, steps=10, random_start=False)
    fb = foolbox.attacks.LinfPGD(abs_stepsize=EPS / 4, steps=10, random_start=False)
    by_art = art.attacks.evasion.ProjectedGradientDescentPyTorch(
        on.art(), eps=EPS, eps_step=EPS / 4, max_iter=10, verbose=False
    )
    return on.row(
        "pgd, 10 steps",
        lambda: methods["pgd"](on.model, images, labels, steps=10, random_start=False),
        torchattacks=lambda: ta(images, labels),
        torchattacks_judged=lambda: judged(on, ta(images, labels)),
        foolbox=lambda: fb(there, images, labels, epsilons=EPS)[1],
        ART=lambda: by_art.generate(images.numpy(), labels.numpy()),
    )


def fgsm() -> Iterator[Row]:
    return map(_fgsm, (shapes(norm="linf"), resnet(224, 4)))


def _fgsm(on: Subject) -> Row:
    images, labels, there = on.images, on.labels, on.foolbox()
    ta, fb = torchattacks.FGSM(on.module(), eps=EPS), foolbox.attacks.FGSM(random_start=False)
    by_art = art.attacks.evasion.FastGradientMethod(on.art(), eps=EPS)
    return on.row(
        "fgsm",
        lambda: methods["fgsm"](on.model, images, labels),
        torchattacks=lambda: ta(images, labels),
        torchattacks_judged=lambda: judged(on, ta(images, labels)),
        foolbox=lambda: fb(there, images, labels, epsilons=EPS)[1],
        ART=lambda: by_art.generate(images.numpy(), labels.numpy()),
        ART_judged=lambda: judged(on, torch.from_numpy(by_art.generate(images.numpy(), labels.numpy()))),
    )


def judged(on: Subject, adversarial: Tensor) -> Tensor:
    """With what foolbox's results and ours tell beside the pictures: what the model says of them.

    Of one step's three passes that is one.
    """
    with torch.no_grad():
        on.module()(adversarial)
    return adversarial


def deepfool() -> Iterator[Row]:
    on = shapes()
    ta, fb = torchattacks.DeepFool(on.module()), foolbox.attacks.L2DeepFoolAttack()
    by_art = art.attacks.evasion.DeepFool(on.art(), epsilon=0.02, nb_grads=10, verbose=False)
    there, images, labels = on.foolbox(), on.images, on.labels
    yield on.row(
        "deepfool",
        lambda: methods["deepfool"](on.model, images, labels),
        torchattacks=lambda: ta(images, labels),
        foolbox=lambda: fb(there, images, labels, epsilons=None)[1],
        ART=lambda: by_art.generate(images.numpy()),
    )


def carlini_wagner() -> Iterator[Row]:
    on = shapes()
    ta, fb = torchattacks.CW(on.module(), steps=180), foolbox.attacks.L2CarliniWagnerAttack(6, 30)
    by_art = art.attacks.evasion.CarliniL2Method(
        on.art(), binary_search_steps=6, max_iter=30, batch_size=8, verbose=False
    )
    there, images, labels = on.foolbox(), on.images, on.labels
    yield on.row(
        "carlini_wagner, 6 x 30 steps",
        lambda: methods["carlini_wagner"](on.model, images, labels, steps=30, search_steps=6),
        torchattacks=lambda: ta(images, labels),
        foolbox=lambda: fb(there, images, labels, epsilons=None)[1],
        ART=lambda: by_art.generate(images.numpy(), labels.numpy()),
    )


def hop_skip_jump(queries: int = 500) -> Iterator[Row]:
    """The peers are given one picture at a time, and what counts is the nearest they showed the model."""
    on = shapes(4)

    def singly(peer: Callable[[black_box.Watched, str], None]) -> Work:
        told = "hop_skip_jump", on.model, on.images, (queries,)
        return lambda: float(black_box.nearest(peer, *told).median())

    yield on.row(
        f"hop_skip_jump, {queries} queries",
        lambda: methods["hop_skip_jump"](on.model, on.images, on.labels, max_queries=queries, seed=0),
        foolbox=singly(black_box.foolbox),
        ART=singly(black_box.art),
    )


def universal() -> Iterator[Row]:
    on = shapes(norm="linf")
    peer = art.attacks.evasion.UniversalPerturbation(
        on.art(), attacker="deepfool", attacker_params={"max_iter": 10, "verbose": False},
        delta=0.01, max_iter=1, eps=10 / 255, norm=np.inf, verbose=False,
    )  # fmt: skip

    def ours() -> Tensor:
        found = methods["universal"](
            on.model, TensorDataset(on.images), epochs=1, target_rate=0.99, held_out=0
        )
        return (on.images + found.perturbation).clamp(0, 1)

    yield on.row(
        "universal by deepfool, once over all",
        ours,
        ART=lambda: peer.generate(on.images.numpy()),
    )
