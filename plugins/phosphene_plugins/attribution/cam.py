"""CAM: class activation map weighted by the linear classifier's own weights."""

from typing import Any

import torch
from torch import Tensor, nn

from phosphene import Class, InputError, Method, Reference, hookimpl, load_model, method, scores
from phosphene.results import Attribution
from phosphene.roles import Images, Model, Target
from phosphene.spec import Cost, size
from phosphene.targets import Predicted

from ._cam import signed_result, weighted_sum
from ._oracle_networks import NORMALIZATION, pooled_network
from ._relations import EQUIVARIANT, PROPORTIONAL_TO_THE_SCORE


def mean_of_the_map_and_bias_give_the_logit() -> None:
    """M_c = sum_k w_k^c f_k, and S_c = mean of M_c + bias_c, for every class."""
    model, head, images = pooled_network()
    logits, features = model(images), model.features(images, "1")
    functions = load_model(_FunctionalRelu(model.module), input_size=(3, 8, 10), **NORMALIZATION)
    predicted = logits.argmax(1)
    for target, indices in (*((k, torch.full_like(predicted, k)) for k in range(3)), (None, predicted)):
        for network in (model, functions):
            result = cam(network, images, target)
            expected = torch.einsum("nk,nkhw->nhw", head.weight[indices], features)
            torch.testing.assert_close(result.maps, expected)
            means = result.maps.mean((1, 2)) + head.bias[indices]
            torch.testing.assert_close(means, logits.gather(1, indices[:, None])[:, 0])
            assert result.targets == tuple(f"class {index}" for index in indices.tolist())


class _FunctionalRelu(nn.Module):
    """The same network with a ReLU that is no module: its last feature maps are those before it."""

    def __init__(self, layers: Any) -> None:
        super().__init__()
        self.convolution, self.head = layers[0], layers[-1]

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.head(self.convolution(x).relu().mean((2, 3)))
        return result


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
    needs=["gap_head"],
    cost=Cost(forward=size.images),
    oracle=mean_of_the_map_and_bias_give_the_logit,
    relations=[*EQUIVARIANT, *PROPORTIONAL_TO_THE_SCORE],
)
def cam(model: Model, images: Images, target: Target = None) -> Attribution:
    """CAM: class activation map weighted by the linear classifier's own weights.

    M_c(x, y) = sum_k w_k^c f_k(x, y),  and so  S_c = mean_xy M_c(x, y) + b_c

    f_k are the last feature maps, w^c are the weights of class c. The network has to end in global average
    pooling and one linear layer (``grad_cam`` works on any).

    Returns:
        ``maps`` (N, h, w), raw and signed, at the last feature map's size: negative values are evidence
        against the class.

    Raises:
        ModelError for a network with another head, InputError for a target that is not a class.

    Example::
        from phosphene import run

        result = run("cam", images="builtin:scenes/2")
        result.maps.shape  # (2, 8, 8)

    Source:
        Zhou et al. 2016, equation 2.
    """
    if not isinstance(target, (Class, Predicted)):
        raise InputError(f"cam explains a class, not {target}; use grad_cam, which takes any target")
    head = model.head
    with model.tap(head.layer) as tap:
        scores(model, images, target)
        maps = model.maps(tap[head.layer], images, head.layer)
    if head.relu:
        maps = maps.relu()
    # Applied to class indices instead of logits, ``score`` returns the class of each image.
    indices = torch.arange(len(head.weight), device=maps.device)
    classes = target.score(indices.expand(len(images), -1))
    weights = head.weight.to(maps)[classes]
    return signed_result(model, head.layer, images, target, weighted_sum(weights, maps))


@hookimpl
def phosphene_methods() -> list[Method[Any, Any]]:
    return [cam]
