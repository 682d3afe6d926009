"""Attacks compared with torchattacks and foolbox, from the same start, in double precision."""

from __future__ import annotations

import foolbox
import pytest
import torch
import torchattacks
from torch import Tensor, nn

from phosphene import Model, load_model, methods
from phosphene.data import SceneDataset
from phosphene.testing.observation import count_passes

pgd, bim, fgsm = (methods[f"attacks.{name}"] for name in ("pgd", "bim", "fgsm"))
deepfool, carlini_wagner = methods["attacks.deepfool"], methods["attacks.carlini_wagner"]
apgd, fab = methods["attacks.apgd"], methods["attacks.fab"]


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 3 * 3, 5),
    )  # fmt: skip
    return load_model(module.eval(), input_size=(3, 10, 10), dtype=torch.float64)


@pytest.fixture
def images() -> Tensor:
    """Some pixels black or white, so that the order of clipping and projection matters."""
    random = torch.rand(8, 3, 10, 10, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return (random * 1.4 - 0.2).clamp(0, 1)


def both(
    peer: object, model: Model, images: Tensor, targeted: bool, **params: object
) -> tuple[Tensor, Tensor]:
    before = model(images).argmax(1)
    labels = (before + 1) % 5 if targeted else before
    if targeted:
        peer.set_mode_targeted_by_label(quiet=True)  # type: ignore[attr-defined]
    ours = pgd(model, images, labels, targeted=targeted, random_start=False, **params)
    return ours.adversarial, peer(images, labels)  # type: ignore[operator]


@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize(
    ("eps", "step_size", "steps"), [(8 / 255, 2 / 255, 10), (0.3, 0.05, 20), (0.01, 0.5, 1)]
)
def test_pgd_in_linf_agrees_with_torchattacks(
    model: Model, images: Tensor, targeted: bool, eps: float, step_size: float, steps: int
) -> None:
    peer = torchattacks.PGD(model.module, eps=eps, alpha=step_size, steps=steps, random_start=False)
    ours, theirs = both(peer, model, images, targeted, eps=eps, step_size=step_size, steps=steps)
    assert not torch.equal(theirs, images)
    # Theirs may lie outside the ball by one rounding, ours never does.
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-15)


@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize(("eps", "step_size", "steps"), [(0.5, 0.125, 10), (3.0, 0.5, 20), (0.1, 1.0, 1)])
def test_pgd_in_l2_agrees_with_torchattacks(
    model: Model, images: Tensor, targeted: bool, eps: float, step_size: float, steps: int
) -> None:
    peer = torchattacks.PGDL2(
        model.module, eps=eps, alpha=step_size, steps=steps, random_start=False, eps_for_division=0.0
    )
    ours, theirs = both(peer, model, images, targeted, norm="l2", eps=eps, step_size=step_size, steps=steps)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.5 / 255), ("l2", 0.1)])
def test_pgd_fools_at_least_as_many_scenes_as_torchattacks_and_foolbox(norm: str, eps: float) -> None:
    model = load_model("builtin:shapes-vgg", dtype=torch.float64)
    model.module.requires_grad_(False)
    images = SceneDataset(16, size=(24, 24)).read(range(16)).double()
    labels, peers = model(images).argmax(1), Normalized(model)
    params = {"steps": 5, "random_start": False}
    of_torchattacks = {"linf": torchattacks.PGD, "l2": torchattacks.PGDL2}[norm]
    of_foolbox = {"linf": foolbox.attacks.LinfPGD, "l2": foolbox.attacks.L2PGD}[norm]
    ours = pgd(model, images, labels, norm=norm, eps=eps, step_size=eps / 4, **params)
    ta = of_torchattacks(peers, eps=eps, alpha=eps / 4, **params)(images, labels)
    bounded = foolbox.PyTorchModel(peers, bounds=(0, 1))
    _, fb, _ = of_foolbox(abs_stepsize=eps / 4, **params)(bounded, images, labels, epsilons=eps)
    robust = int((~ours.success).sum())
    assert 0 < robust < 16  # so that both more and fewer are possible
    assert all(robust <= int(model(theirs).argmax(1).eq(labels).sum()) for theirs in (ta, fb))


class Normalized(nn.Module):
    """A model's network with its normalization as one module, for the other libraries."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.network, self.normalize = model.module, model.normalize
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        return self.network(self.normalize(images))


@pytest.mark.parametrize("eps", [2 / 255, 0.1])
@pytest.mark.parametrize("targeted", [False, True])
def test_fgsm_agrees_with_torchattacks_and_foolbox(
    model: Model, images: Tensor, eps: float, targeted: bool
) -> None:
    predictions = model(images).argmax(1)
    labels = (predictions + 1) % 5 if targeted else predictions
    ours = fgsm(model, images, labels, eps=eps, targeted=targeted).adversarial
    peer = torchattacks.FGSM(model.module, eps=eps)
    if targeted:
        peer.set_mode_targeted_by_label(quiet=True)
    torch.testing.assert_close(ours, peer(images, labels), rtol=0, atol=1e-15)
    if not targeted:  # foolbox's FGSM has no targeted mode
        _, theirs, _ = foolbox.attacks.FGSM(random_start=False)(
            foolbox_model(model), images, labels, epsilons=eps
        )
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-15)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("targeted", [False, True])
def test_bim_and_pgd_agree_with_foolbox(model: Model, images: Tensor, norm: str, targeted: bool) -> None:
    predictions = model(images).argmax(1)
    labels = (predictions + 1) % 5 if targeted else predictions
    criterion = foolbox.criteria.TargetedMisclassification(labels) if targeted else labels
    eps, step = {"linf": (8 / 255, 2 / 255), "l2": (1.0, 0.2)}[norm]
    params = {"abs_stepsize": step, "steps": 10, "random_start": False}
    kinds = {"linf": "Linf", "l2": "L2"}
    for ours, theirs in ((bim, "BasicIterativeAttack"), (pgd, "PGD")):
        peer = getattr(foolbox.attacks, f"{kinds[norm]}{theirs}")(**params)
        _, expected, _ = peer(foolbox_model(model), images, criterion, epsilons=eps)
        start = {"random_start": False} if ours is pgd else {}
        result = ours(
            model, images, labels, eps=eps, step_size=step, steps=10, norm=norm, targeted=targeted, **start
        )
        torch.testing.assert_close(
            result.adversarial, expected, rtol=0, atol=1e-12 if norm == "l2" else 1e-15
        )


def test_bim_agrees_with_torchattacks(model: Model, images: Tensor) -> None:
    labels = model(images).argmax(1)
    theirs = torchattacks.BIM(model.module, eps=8 / 255, alpha=2 / 255, steps=10)(images, labels)
    ours = bim(model, images, labels, eps=8 / 255, step_size=2 / 255, steps=10).adversarial
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-15)


def test_momentum_agrees_with_torchattacks(model: Model, images: Tensor) -> None:
    labels = model(images).argmax(1)
    theirs = torchattacks.MIFGSM(model.module, eps=8 / 255, alpha=2 / 255, steps=10, decay=0.9)(
        images, labels
    )
    ours = bim(model, images, labels, eps=8 / 255, step_size=2 / 255, steps=10, momentum=0.9).adversarial
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-15)


def test_deepfool_agrees_with_torchattacks(model: Model, images: Tensor) -> None:
    """torchattacks adds each step to the clipped image; here the sum of all steps is clipped."""
    gray = 0.4 + 0.2 * images  # nothing is clipped
    labels = model(gray).argmax(1)
    theirs = torchattacks.DeepFool(model.module, steps=50, overshoot=0.02)(gray, labels)
    ours = deepfool(model, gray, labels)
    assert ours.success.all()
    distances = (theirs - gray).flatten(1).norm(dim=1)
    torch.testing.assert_close(ours.distance("l2").median(), distances.median(), rtol=0.03, atol=0)


def test_carlini_wagner_distance_is_at_most_that_of_foolbox_in_no_more_passes(
    model: Model, images: Tensor
) -> None:
    labels = model(images).argmax(1)
    peer = foolbox.attacks.L2CarliniWagnerAttack(binary_search_steps=6, steps=100)
    with count_passes(model.module) as their_passes:
        _, theirs, won = peer(foolbox_model(model), images, labels, epsilons=None)
    with count_passes(model.module) as our_passes:
        ours = carlini_wagner(model, images, labels, steps=100, search_steps=6)
    assert our_passes.forward + our_passes.backward <= their_passes.forward + their_passes.backward
    assert ours.success.all() and won.all()
    assert ours.distance("l2").median() <= (theirs - images).flatten(1).norm(dim=1).median()


@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.01), ("l2", 0.15)])
def test_apgd_succeeds_at_least_as_often_as_torchattacks(
    model: Model, images: Tensor, norm: str, eps: float
) -> None:
    labels = model(images).argmax(1)
    theirs = torchattacks.APGD(model.module, norm=norm.capitalize(), eps=eps, steps=20, seed=0, loss="ce")(
        images, labels
    )
    ours = apgd(model, images, labels, norm=norm, eps=eps, steps=20, seed=0)
    assert ours.success.sum() >= (model(theirs).argmax(1) != labels).sum()


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("target_classes", [0, 4])
def test_fab_distance_is_at_most_that_of_torchattacks(
    model: Model, images: Tensor, norm: str, target_classes: int
) -> None:
    """torchattacks works in single precision; of several target classes its last success is returned."""
    model.module.float()
    images = images.float()
    labels = model(images).argmax(1)
    peer = torchattacks.FAB(
        model.module,
        norm=norm.capitalize(),
        eps=100.0,
        steps=20,
        multi_targeted=target_classes > 0,
        n_classes=5,
    )
    distances = (peer(images, labels) - images).flatten(1).norm(float(norm.removeprefix("l")), dim=1)
    ours = fab(model, images, labels, norm=norm, steps=20, target_classes=target_classes)
    assert ours.success.all()
    assert (ours.distance(norm) <= distances * 1.002).all()
    assert ours.distance(norm).median() <= distances.median() * 1.0001


@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.008), ("l2", 0.12)])
def test_apgd_towards_each_class_succeeds_at_least_as_often_as_torchattacks(
    model: Model, images: Tensor, norm: str, eps: float
) -> None:
    labels = model(images).argmax(1)
    peer = torchattacks.APGDT(model.module, norm=norm.capitalize(), eps=eps, steps=20, seed=0, n_classes=5)
    theirs = model(peer(images, labels)).argmax(1) != labels
    ours = apgd(model, images, labels, norm=norm, eps=eps, steps=20, seed=0, loss="dlr", target_classes=4)
    assert 0 < theirs.sum() < len(images)
    assert ours.success[theirs].all()


def foolbox_model(model: Model) -> object:
    """The network wrapped for foolbox."""
    return foolbox.PyTorchModel(model.module.eval(), bounds=(0, 1))
