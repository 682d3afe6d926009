"""Sanity check: maps that ignore the weights stay, others change, and the model is not modified."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from scipy.stats import spearmanr
from torch import nn

from phosphene import (
    ModelError,
    ProgressEvent,
    SceneDataset,
    TensorDataset,
    checkpoints,
    load_model,
    method,
    methods,
    run,
)
from phosphene.results import Attribution
from phosphene.roles import Images, Model, Target
from phosphene_plugins.scores import _evaluate_maps
from phosphene_plugins.scores._map_similarity import rank_correlation, structural_similarity
from phosphene_plugins.scores._weight_randomization import layers_with_weights, randomize_weights

sanity_check = methods["scores.sanity_check"]


@method(family="attribution")
def edges(model: Model, images: Images, target: Target = None) -> Attribution:
    """Squared image gradient, which ignores the model."""
    gray = images.mean(1)
    steep = torch.stack(torch.gradient(gray, dim=(1, 2))).square().sum(0)
    return Attribution(images=images, maps=steep, targets=target.names(model, len(images)))


def test_oracle() -> None:
    sanity_check.spec.oracle()


def test_a_map_that_ignores_the_weights_stays_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_evaluate_maps, "methods", {"edges": edges})
    result = sanity_check(load_model("builtin:shapes-vgg"), SceneDataset(3), method="edges", stages=3, seed=0)
    torch.testing.assert_close(result.rank, torch.ones(3, 3))
    torch.testing.assert_close(result.ssim, torch.ones(3, 3))


@pytest.mark.parametrize("name", ["grad_cam", "saliency", "integrated_gradients"])
def test_maps_that_read_the_weights_change(name: str) -> None:
    params = {"steps": 8} if name == "integrated_gradients" else {}
    model = load_model("builtin:shapes-vgg")
    result = sanity_check(model, SceneDataset(8), method=name, params=params, stages=2, seed=0)
    assert result.rank[-1].mean() < 0.5
    assert result.ssim[-1].mean() < 0.6


def test_layers_are_randomized_from_the_logits_down_in_a_copy() -> None:
    model = load_model("builtin:shapes-vgg")
    before = model.digest
    names = layers_with_weights(model)
    assert names[0] == "classifier" and names[-1] == "features.0" and len(names) == 9
    result = sanity_check(model, SceneDataset(2), stages=4, seed=0)
    assert result.stages[-1] == "features.0" and len(result.stages) == 4
    assert model.digest == before
    other = model.copy()
    randomize_weights(other, ["classifier"], torch.Generator().manual_seed(0))
    assert model.digest == before != other.digest
    changed = [
        n for n, w in other.module.named_parameters() if not torch.equal(w, model.module.get_parameter(n))
    ]
    assert changed == ["classifier.weight", "classifier.bias"]


def test_a_resumed_run_draws_the_same_random_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "INTERVAL", 0.0)
    params = {"dataset": "builtin:scenes/6", "batch_size": 2, "stages": 3, "seed": 5}
    uninterrupted = run("sanity_check", **params)

    events: list[ProgressEvent] = []

    def cut(event: ProgressEvent) -> None:
        events.append(event)
        if len(events) == 8:  # in the third of four stages of three batches
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run("sanity_check", out=tmp_path / "result", progress=cut, **params)
    resumed = run("sanity_check", out=tmp_path / "result", **params)
    for name in ("rank", "ssim", "maps"):
        assert torch.equal(getattr(resumed, name), getattr(uninterrupted, name)), name


def test_rank_correlation_equals_scipys_with_ties() -> None:
    draw = torch.Generator().manual_seed(0)
    one, other = (torch.randint(0, 5, (4, 6, 7), generator=draw).double() for _ in range(2))
    expected = [spearmanr(a.flatten(), b.flatten()).statistic for a, b in zip(one, other, strict=True)]
    torch.testing.assert_close(rank_correlation(one, other), torch.tensor(expected, dtype=torch.float64))
    flat = torch.ones(1, 6, 7)
    assert rank_correlation(flat, 2 * flat).tolist() == [1.0]
    assert rank_correlation(flat, one[:1].float()).tolist() == [0.0]


def test_ssim_is_one_for_equal_maps_and_negative_for_opposite_ones() -> None:
    maps = torch.rand(3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(structural_similarity(maps, maps), torch.ones(3, dtype=torch.float64))
    assert (structural_similarity(maps, 1 - maps) < 0).all()


def test_a_network_without_weights_is_refused() -> None:
    model = load_model(nn.Sequential(nn.AvgPool2d(4), nn.Flatten()), input_size=(1, 8, 8))
    with pytest.raises(ModelError, match="no layer with weights"):
        sanity_check(model, TensorDataset(torch.rand(1, 1, 8, 8), ["0"]), method="saliency", seed=0)
