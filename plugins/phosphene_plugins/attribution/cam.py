"""Class activation mapping: the evidence for a class at each place of the last map."""

from typing import Any

import torch

from phosphene import Class, InputError, Method, Reference, hookimpl, method, scores
from phosphene.results import Attribution
from phosphene.roles import Images, Model, Target
from phosphene.spec import Cost, size
from phosphene.targets import Predicted

from ._cam import SCALED, Normalize, by_convention, pooled_network, weighted


def mean_evidence_and_bias_give_the_logit() -> None:
    """S_c = mean of M_c + bias_c, for every class."""
    model, head, images = pooled_network()
    logits = model(images)
    for index in range(3):
        explained = cam(model, images, index).maps.mean((1, 2)) + head.bias[index]
        torch.testing.assert_close(explained, logits[:, index])


@method(
    family="attribution",
    title="CAM",
    references=[
        Reference(
            key="zhou2016",
            title="Learning Deep Features for Discriminative Localization",
            authors="Zhou, Khosla, Lapedriza, Oliva, Torralba",
            year=2016,
            url="https://arxiv.org/abs/1512.04150",
        )
    ],
    invariants=[SCALED],
    needs=["gap_head"],
    cost=Cost(forward=size.images),
    oracle=mean_evidence_and_bias_give_the_logit,
)
def cam(model: Model, images: Images, target: Target = None, *, normalize: Normalize = None) -> Attribution:
    """Show where the last map holds evidence for a class: its channels weighted as the classifier does.

    M_c(x, y) = sum_k w_k^c f_k(x, y),  and so  S_c = mean_xy M_c(x, y) + b_c

    ``images`` (N, C, H, W) in [0, 1] -> ``maps`` (N, h, w) at the last map's own size, raw and
    signed unless ``normalize`` says otherwise: negative where a place speaks against the class. Needs
    a network that ends in global average pooling and one linear layer; ModelError otherwise
    (``grad_cam`` has no such need).
    Raises InputError for a target that is not a class.

    Source: Zhou et al. 2016, equation 2.
    """
    if not isinstance(target, (Class, Predicted)):
        raise InputError(f"cam explains a class, not {target}; use grad_cam, which takes any target")
    head = model.head
    with model.tap(head.layer) as tap:
        scores(model, images, target)
        features = model.maps(tap[head.layer], images)
    if head.relu:
        features = features.relu()
    # The target's own choice among the classes' numbers is each image's class.
    numbers = torch.arange(len(head.weight), device=features.device)
    chosen = target.score(numbers.expand(len(images), -1))
    weight = head.weight.to(features)[chosen]
    maps = by_convention(weighted(weight, features), images, normalize, signed=True)
    return Attribution(images=images, maps=maps, targets=target.names(model, len(images)))


@hookimpl
def phosphene_methods() -> list[Method[Any, Any]]:
    return [cam]
