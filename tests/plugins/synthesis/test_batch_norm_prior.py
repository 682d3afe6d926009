"""The batch-norm prior: its equation, every kind of batch norm, and networks without one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from phosphene import Model, ModelError, load_model
from phosphene_plugins.synthesis._batch_norm_prior import BatchNormPrior


def network(norm: type[nn.Module] = nn.BatchNorm2d) -> Model:
    torch.manual_seed(0)
    layers = nn.Sequential(
        nn.Conv2d(3, 4, 3), norm(4), nn.ReLU(inplace=True), nn.Conv2d(4, 5, 2), norm(5),
        nn.Flatten(), nn.Linear(80, 6), nn.BatchNorm1d(6),
    )  # fmt: skip
    for layer in layers:
        if getattr(layer, "running_mean", None) is not None:
            layer.running_mean.normal_()
            layer.running_var.uniform_(0.5, 2)
    return load_model(layers.eval(), input_size=(3, 7, 7), mean=[0.4, 0.5, 0.6], std=[0.2, 0.3, 0.4])


def by_hand(model: Model, images: Tensor, together: bool) -> Tensor:
    x, total = model.normalize(images), torch.zeros(len(images))
    for layer in model.module.children():
        if hasattr(layer, "running_mean"):
            values = x.transpose(0, 1) if together else x
            values = values.flatten(1) if together else x.reshape(*x.shape[:2], -1)
            mean, variance = values.mean(-1), values.var(-1, unbiased=False)
            for actual, stored in ((mean, layer.running_mean), (variance, layer.running_var)):
                total = total + (actual - stored).square().sum(-1).sqrt() / (len(x) if together else 1)
        x = layer(x)
    return total


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("norm", [nn.BatchNorm2d, FrozenBatchNorm2d, nn.SyncBatchNorm])
def test_equals_its_equation(norm: type[nn.Module], together: bool) -> None:
    model, images = network(norm), torch.rand(3, 3, 7, 7, requires_grad=True)
    prior = BatchNormPrior(model)
    assert list(prior.layers) == ["1", "4", "7"]
    expected = by_hand(model, images, together)
    torch.testing.assert_close(prior(images, together=together), expected)
    with prior.record() as tap:
        logits = model(images)
    torch.testing.assert_close(prior.distances(tap, together=together), expected)
    torch.testing.assert_close(logits, model(images))
    gradients = [
        torch.autograd.grad(r.sum(), images, retain_graph=True)[0]
        for r in (expected, prior(images, together=together))
    ]
    torch.testing.assert_close(*gradients)


def test_stored_statistics_have_distance_zero_and_no_gradient() -> None:
    model = load_model(nn.Sequential(nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, 2)), input_size=(3, 2, 2))
    images = torch.rand(5, 3, 2, 2, requires_grad=True)
    norm = model.module[0]
    norm.running_mean.copy_(images.detach().mean((0, 2, 3)))
    norm.running_var.copy_(images.detach().var((0, 2, 3), unbiased=False))
    distance = BatchNormPrior(model)(images, together=True)
    assert distance.max() < 1e-6
    assert torch.autograd.grad(distance.sum(), images)[0].isfinite().all()


def test_network_without_statistics_is_refused() -> None:
    without = nn.BatchNorm2d(3, track_running_stats=False)
    for norm in (nn.Identity(), without, nn.InstanceNorm2d(3, track_running_stats=True)):
        model = load_model(nn.Sequential(norm, nn.Flatten(), nn.Linear(12, 2)).eval(), input_size=(3, 2, 2))
        with pytest.raises(ModelError, match="no batch norm with running statistics"):
            BatchNormPrior(model)
