"""Score-CAM: class activation map weighted by the scores of masked images, without gradients."""

from typing import Any

import torch
from torch import nn

from phosphene import (
    Method,
    Reference,
    batch_size,
    hookimpl,
    load_model,
    method,
    progress_bar,
    scores,
    unit_centers,
)
from phosphene.images import enlarge_maps, min_max
from phosphene.results import Attribution
from phosphene.roles import Images, Model, Target
from phosphene.spec import Cost, InvariantTo, Nonnegative, size

from ._cam import CamLayer, rectified_result, weighted_sum
from ._oracle_networks import NORMALIZATION
from ._relations import FLIPS


def linear_network_sums_its_score_through_the_masks() -> None:
    """On a linear network the score of a masked image is the image's score, summed through the mask."""
    torch.manual_seed(0)
    conv, head = nn.Conv2d(3, 5, 1, bias=False), nn.Linear(5, 2)
    network = nn.Sequential(conv, nn.AdaptiveAvgPool2d(1), nn.Flatten(), head).double()
    model, images = load_model(network, **NORMALIZATION), torch.rand(2, 3, 6, 7, dtype=torch.float64)
    maps = conv(model.normalize(images))
    for index in (0, 1):
        contributions = torch.einsum("k,nkhw->nhw", head.weight[index], maps)
        masked_scores = torch.einsum("nkhw,nhw->nk", min_max(maps), contributions) / 42
        expected = weighted_sum(masked_scores.softmax(1), maps)
        result = score_cam(model, images, index, layer="0")
        torch.testing.assert_close(result.maps, expected.relu())
        torch.testing.assert_close(result.signed_maps[0], expected)
    # Behind strides of 2 the masks are enlarged linearly between centers; the unmasked image fixes the class.
    conv, head = nn.Conv2d(3, 4, 1, 2), nn.Linear(4, 3)
    network = nn.Sequential(conv, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), head).double()
    model, images = load_model(network, **NORMALIZATION), torch.rand(3, 3, 4, 6, dtype=torch.float64)
    normalized = model.normalize(images)
    maps, classes = conv(normalized).relu(), network(normalized).argmax(1)
    columns = torch.tensor([[2, 0, 0], [1, 1, 0], [0, 2, 0], [0, 1, 1], [0, 0, 2], [0, 0, 2]]).double() / 2
    rows = torch.tensor([[2, 0], [1, 1], [0, 2], [0, 2]]).double() / 2
    masks = min_max(rows @ maps @ columns.T)
    masked = (masks[:, :, None] * normalized[:, None]).flatten(0, 1)
    masked_scores = network(masked).unflatten(0, (3, 4))[torch.arange(3), :, classes]
    result = score_cam(model, images)
    torch.testing.assert_close(result.signed_maps[0], weighted_sum(masked_scores.softmax(1), maps))
    assert result.centers == ((0, 2), (0, 2, 4))
    assert result.targets == tuple(f"class {index}" for index in classes.tolist())


@method(
    family="attribution",
    title="Score-CAM",
    references=[
        Reference(
            key="wang2020",
            title="Score-CAM: Score-Weighted Visual Explanations for Convolutional Neural Networks",
            authors="Wang, Wang, Du, Yang, Zhang, Ding, Mardziel, Hu",
            year=2020,
            url="https://arxiv.org/abs/1910.01279",
        )
    ],
    invariants=[Nonnegative()],
    cost=Cost(forward=size.images * (1 + size.channels)),
    oracle=linear_network_sums_its_score_through_the_masks,
    relations=[*FLIPS, InvariantTo("logit_shift"), InvariantTo("batch_order")],
)
def score_cam(model: Model, images: Images, target: Target = None, *, layer: CamLayer = None) -> Attribution:
    """Score-CAM: class activation map weighted by the scores of masked images, without gradients.

    M = ReLU( sum_k alpha_k A^k ),  alpha = softmax_k S(H^k * X),  H^k = minmax(enlarged A^k)

    X is the normalized image that the network receives: a masked pixel becomes the model's mean color, or
    black where it has none. The paper subtracts the score of an empty image, which is the same for all
    feature maps and does not change the softmax. A predicted target is the class predicted for the unmasked
    image. One forward pass per channel. Masks are enlarged linearly between the pixels at which the layer's
    units are centered, then scaled, so that a mask passes what its channel detected; pytorch-grad-cam aligns
    the corners of map and image instead.

    Returns:
        ``maps`` (N, h, w), raw, at the layer's own size.

    Raises:
        ModelError for a layer without spatial positions.

    Example::
        from phosphene import run

        result = run("score_cam", images="builtin:scenes/1")
        result.maps.shape  # (1, 8, 8)

    Source:
        Wang et al. 2020, definition 3 and algorithm 1.
    """
    layer = layer or model.last_map
    with model.tap(layer) as tap:
        scores(model, images, target)  # a predicted target becomes the class of the unmasked image
        maps = model.maps(tap[layer], images, layer)
    count, channels = maps.shape[:2]
    centers = unit_centers(model, layer, images.shape[2:])
    mean = model.mean.to(images)[:, None, None]
    pairs = [(n, k) for n in range(count) for k in range(channels)]
    size, masked_scores = batch_size(model), []
    for start in progress_bar(range(0, len(pairs), size), "masking"):
        rows, masked_by = map(list, zip(*pairs[start : start + size], strict=True))
        masks = min_max(enlarge_maps(maps[rows, masked_by], images.shape[2:], centers))[:, None]
        # The pixels whose normalization is H * (x - m) / s are m + H (x - m).
        masked = mean + masks * (images[rows] - mean)
        masked_scores.append(scores(model, masked, target.select(rows)))
    alpha = torch.cat(masked_scores).view(count, channels).softmax(1)
    return rectified_result(model, layer, images, target, weighted_sum(alpha, maps))


@hookimpl
def phosphene_methods() -> list[Method[Any, Any]]:
    return [score_cam]
