"""Deconvolutional network: gradients that pass each ReLU where the gradient is positive."""

from typing import Any

import torch
from torch import nn

from phosphene import Method, hookimpl, input_gradient, load_model, method, rewrite_backward
from phosphene.hooks import deconvnet as deconvnet_rule
from phosphene.results import Attribution
from phosphene.roles import Images, Model, Target
from phosphene.spec import Cost, MapPerPixel, Nonnegative, size

from ._oracle_networks import NORMALIZATION
from ._references import ZEILER_2014
from ._relations import GRADIENT


def two_layers_have_a_closed_form() -> None:
    """On two layers: W1^T max(w2, 0) / std, for every image."""
    torch.manual_seed(0)
    first, last = nn.Linear(18, 6), nn.Linear(6, 2)
    network = nn.Sequential(nn.Flatten(), first, nn.ReLU(), last).double()
    model = load_model(network, input_size=(3, 2, 3), **NORMALIZATION)
    images = torch.rand(2, 3, 2, 3, dtype=torch.float64)
    std = torch.tensor(NORMALIZATION["std"])[:, None, None]
    for index in (0, 1):
        passed = last.weight[index].clamp(min=0).expand(2, -1)
        expected = ((passed @ first.weight).view(-1, 3, 2, 3) / std).abs().amax(1)
        result = deconvnet(model, images, index)
        torch.testing.assert_close(result.maps, expected.expand(2, 2, 3))
        assert result.targets == (f"class {index}",) * 2


@method(
    family="attribution",
    title="Deconvnet",
    references=[ZEILER_2014],
    invariants=[Nonnegative(), MapPerPixel()],
    needs=["gradients", "relu"],
    cost=Cost(forward=size.images, backward=size.images),
    oracle=two_layers_have_a_closed_form,
    relations=GRADIENT,
)
def deconvnet(model: Model, images: Images, target: Target = None) -> Attribution:
    """Deconvolutional network (deconvnet): gradients that pass each ReLU where the gradient is positive.

    R^l_i = 1[R^(l+1)_i > 0] R^(l+1)_i  at every ReLU,  M_ij = max_c | R^0_cij |

    The map depends on the image only through the positions of max-pooling's maxima: without max-pooling
    it is the same for every image. Every ReLU and ReLU6 is rewritten: module, functional, in place or reused.

    The paper starts from single units. Where a class is the mean over all positions of a last map, every
    position inside starts with the same gradient, which a ReLU may pass only at the border, or nowhere: the
    map is then 0 except at the border, beside the object. Use the target ``layer[channel,row,column]``.

    Returns:
        ``maps`` (N, H, W), raw.

    Raises:
        ModelError for a network without a ReLU, whose result would be the plain gradient.

    Example::
        from phosphene import run

        result = run("deconvnet", images="builtin:scenes/2")
        result.maps.shape  # (2, 64, 64)

    Source:
        Zeiler & Fergus 2014, section 2.1.
    """
    with rewrite_backward(deconvnet_rule):
        gradient = input_gradient(model, images, target)
    return Attribution(
        images=images,
        maps=gradient.abs().amax(1),
        targets=target.names(model, len(images)),
        layout="map",
    )


@hookimpl
def phosphene_methods() -> list[Method[Any, Any]]:
    return [deconvnet]
