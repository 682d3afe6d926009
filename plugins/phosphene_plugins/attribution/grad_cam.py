"""Grad-CAM: a layer's maps weighted by how much the score would gain from each."""

from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from phosphene import Method, ModelError, Reference, hookimpl, load_model, method, scores
from phosphene.images import min_max
from phosphene.results import Attribution
from phosphene.spec import Cost, Nonnegative, UnitRange
from phosphene.types import Images, LayerName, Model, Target


def average_pooling_gives_cam() -> None:
    """Before a GAP + linear head alpha_k = w_k / (h w), so the map is relu(CAM) / (h w)."""
    torch.manual_seed(0)
    maps, classifier = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 3)
    network = nn.Sequential(maps, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), classifier).double()
    model, images = load_model(network), torch.rand(3, 3, 8, 10, dtype=torch.float64)
    for index in range(3):
        cam = torch.einsum("k,nkhw->nhw", classifier.weight[index], model.features(images, "1"))
        torch.testing.assert_close(grad_cam(model, images, index, layer="1").maps, cam.relu() / 80)


@method(
    family="attribution",
    title="Grad-CAM",
    references=[
        Reference(
            key="selvaraju2017",
            title="Grad-CAM: Visual Explanations from Deep Networks via Gradient-based Localization",
            authors="Selvaraju, Cogswell, Das, Vedantam, Parikh, Batra",
            year=2017,
            url="https://arxiv.org/abs/1610.02391",
        )
    ],
    invariants=[Nonnegative(), UnitRange(when="normalize")],
    needs=["gradients"],
    cost=Cost(forward="images", backward="images"),
    oracle=average_pooling_gives_cam,
)
def grad_cam(
    model: Model,
    images: Images,
    target: Target = None,
    *,
    layer: Annotated[
        LayerName | None, Field(description="whose maps are weighted; the last with places when absent")
    ] = None,
    normalize: Annotated[
        Literal["minmax", "pgc"] | None,
        Field(description="scale each map to [0, 1]; pgc: as pytorch-grad-cam does, at the picture's size"),
    ] = None,
) -> Attribution:
    """Show where a layer's maps speak for the target: each weighted by its mean gradient.

    M = ReLU( sum_k alpha_k A^k ),  alpha_k = mean_ij dS / dA^k_ij

    ``images`` (N, C, H, W) in [0, 1] -> ``maps`` (N, h, w) at the layer's own size, raw unless
    ``normalize`` says otherwise: "minmax" scales each map to [0, 1]; "pgc" does so, enlarges it
    bilinearly to (N, H, W) and scales it again, as pytorch-grad-cam does. Works on any layer with
    places, convolutional, channels-last or tokens, and differentiates nothing below it. Raises
    ModelError for a layer without places and for one that the target does not depend on.

    Source: Selvaraju et al. 2017, equations 1 and 2.
    """
    layer = layer or model.last_map
    with model.tap(layer, leaf=True) as tap:
        score = scores(model, images, target)
    if not score.requires_grad:
        raise ModelError(f"{target} does not depend on layer {layer!r}: choose a layer below it")
    activations = model.maps(tap[layer], images)
    (gradient,) = torch.autograd.grad(score.sum(), tap[layer], allow_unused=True)
    if gradient is None:
        raise ModelError(f"{target} does not depend on the last output of layer {layer!r}: choose another")
    gradients = model.maps(gradient, images)
    if gradient.any() and not gradients.any():
        raise ModelError(
            f"only the class token of layer {layer!r} matters to {target}, and it has no place: "
            "choose an earlier layer"
        )
    alpha = gradients.mean((2, 3))
    maps = torch.einsum("nk,nkhw->nhw", alpha, activations).relu().detach()
    if normalize == "minmax":
        maps = min_max(maps)
    elif normalize == "pgc":
        maps = F.interpolate(_pgc_scaled(maps)[:, None], images.shape[2:], mode="bilinear")
        maps = _pgc_scaled(maps[:, 0])
    return Attribution(images=images, maps=maps, targets=target.names(model, len(images)))


def _pgc_scaled(maps: Tensor) -> Tensor:
    """pytorch-grad-cam's min-max: the same as ours but for its 1e-7."""
    maps = maps - maps.amin((1, 2), keepdim=True)
    return maps / (1e-7 + maps.amax((1, 2), keepdim=True))


@hookimpl
def phosphene_methods() -> list[Method[Any, Any]]:
    return [grad_cam]
