"""Attacks beside torchattacks, from the same start, in double precision."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from phosphene import Model, load_model, methods

torchattacks = pytest.importorskip("torchattacks", reason="torchattacks is not installed")
pgd = methods["attacks.pgd"]


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
    """Some pixels black or white, so that the order of clipping and projecting shows."""
    drawn = torch.rand(8, 3, 10, 10, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return (drawn * 1.4 - 0.2).clamp(0, 1)


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
    # Theirs may lie outside the ball by a rounding, ours never does.
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
