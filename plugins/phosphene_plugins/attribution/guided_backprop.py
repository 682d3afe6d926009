"""Guided backpropagation: gradients that pass each ReLU only where input and gradient are positive."""

from typing import Any

import torch
from torch import nn

from phosphene import (
    Method,
    Reference,
    guided,
    hookimpl,
    input_gradient,
    load_model,
    method,
    rewrite_backward,
)
from phosphene.results import Attribution
from phosphene.roles import Images, Model, Target
from phosphene.spec import Cost, MapPerPixel, Nonnegative, size

from ._oracle_networks import NORMALIZATION
from ._relations import GRADIENT


def two_layers_have_a_closed_form() -> None:
    """On two layers: W1^T (max(w2, 0) where the hidden unit is active) / std."""
    torch.manual_seed(0)
    first, last = nn.Linear(18, 6), nn.Linear(6, 2)
    network = nn.Sequential(nn.Flatten(), first, nn.ReLU(), last).double()
    model = load_model(network, input_size=(3, 2, 3), **NORMALIZATION)
    images = torch.rand(2, 3, 2, 3, dtype=torch.float64)
    std = torch.tensor(NORMALIZATION["std"])[:, None, None]
    for index in (0, 1):
        passed = last.weight[index].clamp(min=0) * (first(model.normalize(images).flatten(1)) > 0)
        expected = ((passed @ first.weight).view(-1, 3, 2, 3) / std).abs().amax(1)
        result = guided_backprop(model, images, index)
        torch.testing.assert_close(result.maps, expected.expand(2, 2, 3))
        assert result.targets == (f"class {index}",) * 2


@method(
    family="attribution",
    title="Guided backprop",
    references=[
        Reference(
            key="springenberg2015",
            title="Striving for Simplicity: The All Convolutional Net",
            authors="Springenberg, Dosovitskiy, Brox, Riedmiller",
            year=2015,
            url="https://arxiv.org/abs/1412.6806",
        )
    ],
    invariants=[Nonnegative(), MapPerPixel()],
    needs=["gradients", "relu"],
    cost=Cost(forward=size.images, backward=size.images),
    oracle=two_layers_have_a_closed_form,
    relations=GRADIENT,
)
def guided_backprop(model: Model, images: Images, target: Target = None) -> Attribution:
    """Guided backpropagation: gradients that pass each ReLU only where input and gradient are positive.

    R^l_i = 1[f^l_i > 0] 1[R^(l+1)_i > 0] R^(l+1)_i  at every ReLU,  M_ij = max_c | R^0_cij |

    Sharp, but nearly the same for every class: it shows what was detected more than why a class was
    predicted. Every ReLU and ReLU6 is rewritten: module, functional, in place or reused.

    Returns:
        ``maps`` (N, H, W), raw.

    Raises:
        ModelError for a network without a ReLU, whose result would be the plain gradient.

    Example::
        from phosphene import run

        result = run("guided_backprop", images="builtin:scenes/2")
        result.maps.shape  # (2, 64, 64)

    Source:
        Springenberg et al. 2015, section 3.4.
    """
    with rewrite_backward(guided):
        gradient = input_gradient(model, images, target)
    return Attribution(
        images=images,
        maps=gradient.abs().amax(1),
        targets=target.names(model, len(images)),
        layout="map",
    )


@hookimpl
def phosphene_methods() -> list[Method[Any, Any]]:
    return [guided_backprop]
