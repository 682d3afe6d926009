"""LRP: conservation, folded batch norms, refused operations."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from phosphene import ModelError, load_model, methods

lrp = methods["attribution.lrp"]


class Residual(nn.Module):
    """No biases; a residual sum, in-place ReLU6, both kinds of pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3, padding=1, bias=False)
        self.second = nn.Conv2d(6, 6, 3, padding=1, bias=False)
        self.head = nn.Linear(6, 3, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu6(20 * self.first(images), inplace=True), 2)
        x = F.relu(x + self.second(x))
        return self.head(F.dropout(x.mean((2, 3)), 0.5, self.training))


def test_oracle() -> None:
    lrp.spec.oracle()


@pytest.mark.parametrize("rule", ["epsilon", "gamma", "composite"])
def test_without_biases_the_map_sums_to_the_logit(rule: str) -> None:
    torch.manual_seed(0)
    model = load_model(
        Residual().double().eval(), mean=[0.4, 0.5, 0.6], std=[0.2] * 3, input_size=(3, 12, 10)
    )
    images = torch.rand(2, 3, 12, 10, dtype=torch.float64)
    sums = lrp(model, images, [0, 2], rule=rule, epsilon=0).maps.sum((1, 2))
    torch.testing.assert_close(sums, model(images).detach()[[0, 1], [0, 2]])


@pytest.mark.parametrize("rule", ["epsilon", "gamma"])
def test_a_batch_norm_after_a_convolution_equals_a_folded_one(rule: str) -> None:
    torch.manual_seed(0)
    conv, norm, head = nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.Linear(5, 2)
    norm.running_mean.normal_(), norm.running_var.uniform_(0.5, 2), norm.weight.data.normal_()
    tail = (nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), head)
    two = nn.Sequential(conv, norm, *tail).double().eval()
    one = nn.Sequential(torch.nn.utils.fuse_conv_bn_eval(conv, norm), *tail).double().eval()
    images = torch.rand(1, 3, 9, 9, dtype=torch.float64)
    maps = [lrp(load_model(net), images, 1, rule=rule, gamma=0.5).maps for net in (two, one)]
    torch.testing.assert_close(*maps)


@pytest.mark.parametrize(
    ("layer", "name"),
    [
        (nn.GELU(), "gelu"),
        (nn.SiLU(), "silu"),
        (nn.Softmax(1), "softmax"),
        (nn.GroupNorm(2, 4), "group_norm"),
    ],
)
def test_an_operation_without_a_rule_is_refused_by_name(layer: nn.Module, name: str) -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), layer, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    with pytest.raises(ModelError, match=f"no rule for '{name}'"):
        lrp(load_model(network), torch.rand(1, 3, 8, 8), 0)
