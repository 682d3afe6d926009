"""Training-set recovery: closed form, a network that has memorized its images, one that has not."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from phosphene import InputError, ModelError, TensorDataset, load_model, methods
from phosphene.builtin.scenes import draw_scenes

recover = methods["synthesis.training_set_recovery"]
OPTIONS = {"parametrization": "pixels", "jitter": 0, "total_variation": 0.02, "start_noise": 0.001}


def test_oracle() -> None:
    recover.spec.oracle()


def test_memorised_images_are_recovered_and_copies_do_not_count() -> None:
    scenes = draw_scenes(60)
    first = torch.stack([scenes.images[scenes.labels == c][0] for c in range(10)])
    mean, std = first.mean((0, 2, 3)), first.std((0, 2, 3))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 64**2, 64), nn.Tanh(), nn.Linear(64, 10))
    optimizer = torch.optim.SGD(network.parameters(), 1e-3, weight_decay=1e-3)
    inputs = (first - mean[:, None, None]) / std[:, None, None]
    for _ in range(400):
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(inputs), torch.arange(10)).backward()
        optimizer.step()
    model = load_model(network, input_size=(3, 64, 64), mean=mean.tolist(), std=std.tolist())
    # The training images, others, and a copy of each training image.
    dataset = TensorDataset(torch.cat([first, draw_scenes(30, start=100).images, first]))
    result = recover(model, target=(3, 5, 7), dataset=dataset, steps=60, seed=0, **OPTIONS)
    assert torch.equal(result.neighbors, first[[3, 5, 7]])
    assert (result.recovered > result.baseline).all() and result.baseline.max() < 0.9
    first_panel, second_panel = result.panels()[0]
    assert first_panel.title == f"{result.targets[0]}, from the network"
    assert second_panel.title.startswith("nearest training image (3), recovered: similarity ")
    general = load_model("builtin:shapes-vgg")
    result = recover(general, target=(3, 5, 7), dataset=dataset, steps=30, seed=0, **OPTIONS)
    assert (result.recovered < result.baseline).all()
    assert ", not recovered: similarity" in result.panels()[0][1].title


def test_what_cannot_be_compared_is_refused() -> None:
    model, images = load_model("builtin:shapes-vgg"), torch.rand(3, 3, 64, 64)
    with pytest.raises(InputError, match="two images are needed"):
        recover(model, target=0, dataset=TensorDataset(images[:1]), steps=1)
    with pytest.raises(InputError, match="is none: for example"):
        recover(model, target="features.1[0]", dataset=TensorDataset(images), steps=1)
    with pytest.raises(ModelError, match="no batch norm"):
        recover(model, target=0, dataset=TensorDataset(images), steps=1, statistics=0.1)
