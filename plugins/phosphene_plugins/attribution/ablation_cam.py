"""Ablation-CAM: class activation map weighted by each channel's ablation drop, without gradients."""

from typing import Any

import torch
from torch import Tensor, nn

from phosphene import Method, Reference, batch_size, hookimpl, load_model, method, progress_bar, scores
from phosphene.results import Attribution
from phosphene.roles import Images, Model, Target
from phosphene.spec import Cost, Equivariant, InvariantTo, Nonnegative, ScalesWith, ZeroWhen, size

from ._cam import CamLayer, rectified_result, weighted_sum
from ._oracle_networks import pooled_network
from ._relations import FLIPS


def drop_is_the_channels_contribution_before_a_pooled_head() -> None:
    """Before global average pooling and a linear layer the score drops by w_k mean A^k without channel k."""
    model, head, images = pooled_network()
    maps, logits = model.features(images, "1"), model(images)
    for index in range(3):
        drops = head.weight[index] * maps.mean((2, 3)) / logits[:, index, None].abs()
        expected = weighted_sum(drops, maps).relu()
        torch.testing.assert_close(ablation_cam(model, images, index, layer="1").maps, expected)
    # Maps z and 2 z of z = (-1/4, -1/2), with mean m = -3/8: S = 2 m - 2 m = 0, M = 2 m z.
    conv, head = nn.Conv2d(1, 2, 1, bias=False), nn.Linear(2, 1, bias=False)
    conv.weight.data, head.weight.data = (
        torch.tensor([1.0, 2.0]).view(2, 1, 1, 1),
        torch.tensor([[-2.0, 1.0]]),
    )
    network = nn.Sequential(conv, nn.AdaptiveAvgPool2d(1), nn.Flatten(), head)
    model = load_model(network, input_size=(1, 1, 2), mean=[0.5], std=[1.0], task="regression")
    maps = ablation_cam(model, torch.tensor([[[[0.25, 0.0]]]]), 0, layer="0").maps
    torch.testing.assert_close(maps, torch.tensor([[[0.1875, 0.375]]]))


@method(
    family="attribution",
    title="Ablation-CAM",
    references=[
        Reference(
            key="desai2020",
            title="Ablation-CAM: Visual Explanations for Deep Convolutional Network via "
            "Gradient-free Localization",
            authors="Desai, Ramaswamy",
            year=2020,
            url="https://doi.org/10.1109/WACV45572.2020.9093360",
        )
    ],
    invariants=[Nonnegative()],
    cost=Cost(forward=size.images * (1 + size.channels)),
    oracle=drop_is_the_channels_contribution_before_a_pooled_head,
    relations=[
        *FLIPS,
        Equivariant("shift"),
        ScalesWith("logits", power=0),
        InvariantTo("batch_order"),
        ZeroWhen("constant"),
    ],
)
def ablation_cam(
    model: Model, images: Images, target: Target = None, *, layer: CamLayer = None
) -> Attribution:
    """Ablation-CAM: class activation map weighted by each channel's ablation drop, without gradients.

    M = ReLU( sum_k w_k A^k ),  w_k = (S - S_k) / |S|

    S_k is the score with channel k set to zero at every position of the layer; class tokens stay. The paper
    divides by S; dividing by |S| preserves the sign of a contribution to a negative score, and for a score of
    zero the drop is not divided. A predicted target is the class predicted without ablation. One forward pass
    per channel.

    Returns:
        ``maps`` (N, h, w), raw, at the layer's own size.

    Raises:
        ModelError for a layer without spatial positions.

    Example::
        from phosphene import run

        result = run("ablation_cam", images="builtin:scenes/1")
        result.maps.shape  # (1, 8, 8)

    Source:
        Desai & Ramaswamy 2020, equations 3 and 4.
    """
    layer = layer or model.last_map
    with model.tap(layer) as tap:
        clean = scores(model, images, target)
        maps = model.maps(tap[layer], images, layer)
    count, channels = maps.shape[:2]
    pairs = [(n, k) for n in range(count) for k in range(channels)]
    size, ablated = batch_size(model), []
    for start in progress_bar(range(0, len(pairs), size), "ablating"):
        rows, removed = map(list, zip(*pairs[start : start + size], strict=True))
        batch = images[rows]

        def ablate(output: Tensor, batch: Tensor = batch, removed: list[int] = removed) -> Tensor:
            model.maps(output, batch, layer)[range(len(removed)), removed] = 0  # a view of the output
            return output

        with model.tap(layer, replace=ablate):
            ablated.append(scores(model, batch, target.select(rows)))
    drops = clean[:, None] - torch.cat(ablated).view(count, channels)
    magnitude = clean.abs()[:, None]
    weights = drops / torch.where(magnitude > 0, magnitude, 1)
    return rectified_result(model, layer, images, target, weighted_sum(weights, maps))


@hookimpl
def phosphene_methods() -> list[Method[Any, Any]]:
    return [ablation_cam]
