"""Lipschitz-margin training: layers of norm exactly 1, and no attack inside the certified radius."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from phosphene import Model, ModelError, ProgressEvent, TensorDataset, load_model, methods, run
from phosphene.builtin.scenes import CLASSES
from phosphene_plugins.defenses._spectral_layers import LayerKind, Orthogonal, UnitNormLayers
from phosphene_plugins.defenses.lipschitz import lipschitz_bound, spectral_norm

fit = methods["lipschitz_fit"]
certify = methods["defenses.lipschitz"]
EPS = 0.2


def small(seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        body = nn.Conv2d(1, 6, 3, stride=2), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(54, 16)
        return nn.Sequential(*body, nn.ReLU(), nn.Linear(16, 2)).eval()


class Branched(nn.Module):
    """A sum, groups, dilation, a layer that runs twice, one that never runs, and a weight of the module's."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.reused = nn.Conv2d(1, 4, (1, 3)), nn.Conv2d(4, 4, 3, padding=2, dilation=2, groups=2)
        self.unused, self.head = nn.Linear(3, 3), nn.Linear(4, 2, bias=False)
        self.constant_weight = nn.Parameter(torch.eye(4) * 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x))
        x = self.reused(x) + x
        return self.head(F.linear(self.reused(x).mean((2, 3)), self.constant_weight))


def build_model(network: nn.Module, **options: Any) -> Model:
    return load_model(network, input_size=(1, 8, 8), mean=[0.6], std=[0.2], **options)


@pytest.fixture(scope="module")
def dataset() -> TensorDataset:
    """Two classes: brighter above, or below."""
    labels = torch.arange(120) % 2
    images = 0.5 + 0.1 * torch.randn(120, 1, 8, 8, generator=torch.Generator().manual_seed(3))
    images[labels == 0, :, :4] += 0.25
    images[labels == 1, :, 4:] += 0.25
    return TensorDataset(images.clamp(0, 1), [str(label) for label in labels.tolist()])


def test_the_oracle() -> None:
    fit.spec.oracle()


@pytest.mark.parametrize("layers", get_args(LayerKind))
def test_training_certifies_and_no_attack_succeeds_inside(dataset: TensorDataset, layers: LayerKind) -> None:
    result = fit(build_model(small()), dataset, layers=layers, eps=EPS, steps=40, batch=30, lr=0.01, seed=0)
    proven, clean, robust = (result.curves[name] for name in ("proven", "clean", "under PGD-10"))
    assert proven[0] == 0 and proven[-1] > 0.6
    assert bool((proven <= robust).all()) and bool((robust <= clean).all())
    trained, images = result.model(), dataset.images[:24]
    assert [type(part) for part in result.network] == [type(part) for part in small()]
    assert lipschitz_bound(trained, images) == pytest.approx(1 / 0.2, rel=1e-5)
    certified_radius = certify(trained, images).radius
    assert (certified_radius > EPS).double().mean() > 0.6
    labels = trained(images).argmax(1)
    for radius in (EPS, float(certified_radius.median())):
        attack = methods["pgd"](trained, images, labels, eps=radius, norm="l2", steps=20, seed=0)
        assert not (attack.success & (certified_radius >= radius)).any()
    nearest = methods["hop_skip_jump"](trained, images[:6], labels[:6], steps=5, max_queries=400, seed=0)
    assert nearest.success.any()
    assert (nearest.distance("l2") >= certified_radius[:6])[nearest.success].all()


def test_every_norm_is_one_after_calibration() -> None:
    for layers in get_args(LayerKind):
        model = build_model(Branched(), dtype=torch.float64).copy()
        images = torch.rand(2, 1, 8, 8, dtype=torch.float64)
        norms = UnitNormLayers(model, images, layers)
        network: Any = model.module
        assert norms.layers == [network.first, network.reused, network.head]
        assert not any(p is network.constant_weight or p is network.unused.weight for p in norms.parameters())
        with torch.no_grad():
            for parameter in norms.parameters():
                parameter.mul_(3).add_(torch.rand_like(parameter))
        norms.calibrate()
        assert spectral_norm(network.first.weight, (8, 8)) == pytest.approx(1)
        reused = spectral_norm(network.reused.weight, (8, 6), dilation=(2, 2), groups=2)
        assert reused == pytest.approx(1)
        assert float(torch.linalg.matrix_norm(network.head.weight.detach(), 2)) == pytest.approx(1)
        # a sum, an unchanged weight, a mean over 48 positions
        assert (
            lipschitz_bound(model, images)
            == pytest.approx(norms.bound)
            == pytest.approx(2 * 3 / 0.2 / 48**0.5)
        )
        logits = model(images)
        norms.release()
        assert type(network.first) is nn.Conv2d and not any("parametriz" in n for n in network.state_dict())
        torch.testing.assert_close(model(images), logits)


def test_power_iteration_converges_to_the_norm(dataset: TensorDataset) -> None:
    model = build_model(small(), dtype=torch.float64).copy()
    norms = UnitNormLayers(model, dataset.images[:1].double(), "spectral")
    spectral = model.module[0].parametrizations.weight[0]  # type: ignore[union-attr, index]
    spectral.correction.fill_(1.0)
    norms.power_iteration(100)
    assert spectral_norm(model.module[0].weight, (8, 8)) == pytest.approx(1, rel=1e-4)  # type: ignore[arg-type]


def test_chain_of_layers_starts_with_unchanged_predictions(dataset: TensorDataset) -> None:
    model, images = build_model(small(4), dtype=torch.float64), dataset.images[:8].double()
    copied = model.copy()
    norms = UnitNormLayers(copied, images, "spectral")
    torch.testing.assert_close(copied(images) / norms.bound, model(images) / norms.initial_bound)


@pytest.mark.parametrize("shape", [(6, 4, 3, 3), (40, 4, 3, 3), (6, 2, 1, 1), (3, 7)])
def test_orthogonal_weights_are_orthogonal(shape: tuple[int, ...]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    matrix = Orthogonal(1)(weight).flatten(1)
    square = matrix @ matrix.T if len(matrix) < matrix.shape[1] else matrix.T @ matrix
    torch.testing.assert_close(square, torch.eye(len(square), dtype=torch.float64))
    assert float((matrix * weight.flatten(1)).sum()) > 0  # the same signs


def test_interrupted_training_resumes_and_returns_a_plain_network(tmp_path: Path) -> None:
    def build_network() -> nn.Sequential:
        pooled = nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten()
        return nn.Sequential(*pooled, nn.Linear(128, 10))

    like: dict[str, Any] = {"input_size": (3, 64, 64), "classes": CLASSES}
    options: dict[str, Any] = {"model": load_model(build_network(), **like), "dataset": "builtin:scenes/8"}
    options |= {"layers": "orthogonal", "steps": 6, "batch": 2, "held_out": 0.2, "seed": 1}
    complete = run("lipschitz_fit", **options, out=tmp_path / "complete")

    def stop(event: ProgressEvent) -> None:
        if event.done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run("lipschitz_fit", **options, out=tmp_path / "cut", progress=stop)
    events: list[ProgressEvent] = []
    resumed = run("lipschitz_fit", **options, out=tmp_path / "cut", progress=events.append)
    assert [event.total for event in events] == [2, 2]
    assert torch.equal(complete.losses, resumed.losses) and complete.note == resumed.note
    for one, other in zip(complete.network.parameters(), resumed.network.parameters(), strict=True):
        assert torch.equal(one, other)
    loaded = load_model(build_network(), weights=tmp_path / "cut", **like)
    assert lipschitz_bound(loaded, torch.rand(1, 3, 64, 64)) == pytest.approx(
        lipschitz_bound(complete.model(), complete.previews)
    )


def test_networks_without_a_bound_are_refused_by_name(dataset: TensorDataset) -> None:
    with pytest.raises(ModelError, match="gelu"):
        fit(build_model(nn.Sequential(nn.Flatten(), nn.Linear(64, 2), nn.GELU())), dataset, steps=1)
    network = small()
    nn.init.zeros_(network[6].weight)  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="weights of 6 in .* are all zero"):
        fit(build_model(network), dataset, steps=1)

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Conv2d(1, 1, 3), nn.Linear(1, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.body(self.body(x)).mean((2, 3)))

    with pytest.raises(ModelError, match="body in .* runs on maps of two sizes"):
        fit(build_model(Twice()), dataset, steps=1)
