"""Score-CAM: maps weighted by the score of the picture seen through each of them."""

from typing import Any

import torch
from torch import nn

from phosphene import Method, Reference, batch_size, hookimpl, load_model, method, progress_bar, scores
from phosphene.images import min_max
from phosphene.results import Attribution
from phosphene.roles import Images, Model, Target
from phosphene.spec import Cost, size

from ._cam import PROMISES, CamLayer, Normalize, by_convention, enlarged, weighted


def linear_network_scores_masks_by_hand() -> None:
    """On a linear network the score of a masked picture is the picture's, summed through the mask."""
    torch.manual_seed(0)
    conv, head = nn.Conv2d(3, 5, 1, bias=False), nn.Linear(5, 2)
    network = nn.Sequential(conv, nn.AdaptiveAvgPool2d(1), nn.Flatten(), head).double()
    model, images = load_model(network), torch.rand(2, 3, 6, 7, dtype=torch.float64)
    maps = conv(images)
    for index in (0, 1):
        evidence = torch.einsum("k,nkhw->nhw", head.weight[index], maps)
        seen = torch.einsum("nkhw,nhw->nk", min_max(maps), evidence) / 42
        expected = weighted(seen.softmax(1), maps).relu()
        torch.testing.assert_close(score_cam(model, images, index, layer="0").maps, expected)


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
    invariants=PROMISES,
    cost=Cost(forward=size.images * (1 + size.channels)),
    oracle=linear_network_scores_masks_by_hand,
)
def score_cam(
    model: Model,
    images: Images,
    target: Target = None,
    *,
    layer: CamLayer = None,
    normalize: Normalize = None,
) -> Attribution:
    """Show where a layer's maps speak for the target: each weighted by the score of what it lets through.

    M = ReLU( sum_k alpha_k A^k ),  alpha = softmax_k S(H^k * X),  H^k = minmax(enlarged A^k)

    ``images`` (N, C, H, W) in [0, 1] -> ``maps`` (N, h, w) at the layer's own size, raw unless
    ``normalize`` says otherwise. X is the picture as the network takes it, normalised: what is masked
    becomes the mean colour of its training, or black where it has none. The score of an empty picture,
    which the paper takes off, is the same for all maps, and softmax does not see it. The target is
    decided on the whole picture. No gradients, but a pass for every channel. Raises ModelError for a
    layer without places.

    Source: Wang et al. 2020, definition 3 and algorithm 1. Masks are enlarged bilinearly between pixel
    centres and then scaled; pytorch-grad-cam enlarges from corner to corner.
    """
    layer = layer or model.last_map
    with model.tap(layer) as tap:
        scores(model, images, target)  # decides which class is meant
        maps = model.maps(tap[layer], images)
    count, channels = maps.shape[:2]
    empty = model.mean.to(images)[:, None, None]
    places = [(n, k) for n in range(count) for k in range(channels)]
    size, found = batch_size(model), []
    for start in progress_bar(range(0, len(places), size), "masking"):
        numbers, kinds = map(list, zip(*places[start : start + size], strict=True))
        masks = min_max(enlarged(maps[numbers, kinds], images))[:, None]
        # Of pixels what (H * normalised X) would be: (x - m) / s * H is that of m + H (x - m).
        masked = empty + masks * (images[numbers] - empty)
        found.append(scores(model, masked, target.select(numbers)))
    alpha = torch.cat(found).view(count, channels).softmax(1)
    shown = by_convention(weighted(alpha, maps), images, normalize)
    return Attribution(images=images, maps=shown, targets=target.names(model, count))


@hookimpl
def phosphene_methods() -> list[Method[Any, Any]]:
    return [score_cam]
