"""Saliency map: largest absolute gradient of the score over each pixel's channels."""

from typing import Any

import torch
from torch import nn

from phosphene import Method, hookimpl, input_gradient, load_model, method
from phosphene.results import Attribution
from phosphene.roles import Images, Model, Target
from phosphene.spec import Cost, MapPerPixel, Nonnegative, size

from ._references import SIMONYAN_2014
from ._relations import GRADIENT


def equals_the_weights_of_a_linear_model() -> None:
    """On a linear model the map is the largest absolute weight over channels, per unit of pixel value."""
    weight = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    network = nn.Sequential(nn.Flatten(), nn.Linear(60, 2))
    network[1].weight.data = weight.flatten(1)
    model = load_model(network, mean=[0.4, 0.5, 0.6], std=[0.2, 0.25, 0.5])
    for index in (0, 1):
        result = saliency(model, torch.rand(2, 3, 4, 5), index)
        expected = (weight[index] / torch.tensor([0.2, 0.25, 0.5])[:, None, None]).abs().amax(0)
        torch.testing.assert_close(result.maps, expected.expand(2, 4, 5))
        assert result.targets == (f"class {index}",) * 2


@method(
    family="attribution",
    references=[SIMONYAN_2014],
    invariants=[Nonnegative(), MapPerPixel()],
    needs=["gradients"],
    cost=Cost(forward=size.images, backward=size.images),
    oracle=equals_the_weights_of_a_linear_model,
    relations=GRADIENT,
)
def saliency(model: Model, images: Images, target: Target = None) -> Attribution:
    """Saliency map: largest absolute gradient of the score over each pixel's channels.

    M_ij = max_c | dS / dI_cij |

    S is the target's scalar: a class's logit (not its probability), a unit of a layer, or any callable of
    the logits.

    Returns:
        ``maps`` (N, H, W), raw, in score per unit of pixel value.

    Raises:
        InputError or UnknownName for a target that the model does not have.

    Example::
        from phosphene import run

        result = run("saliency", images="builtin:scenes/2")
        result.maps.shape  # (2, 64, 64)

    Source:
        Simonyan et al. 2014, section 3.
    """
    return Attribution(
        images=images,
        maps=input_gradient(model, images, target).abs().amax(1),
        targets=target.names(model, len(images)),
        layout="map",
    )


@hookimpl
def phosphene_methods() -> list[Method[Any, Any]]:
    return [saliency]
