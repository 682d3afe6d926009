"""Principal components of patch features as colors: PCA of a layer's positions over several images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from phosphene import (
    InputError,
    Reference,
    hookimpl,
    load_model,
    max_batch,
    method,
    to_float64,
    unit_centers,
)
from phosphene.images import Centers, enlarge_maps
from phosphene.results import Panel, Result
from phosphene.roles import Images, LayerName, Model
from phosphene.spec import Cost, Equivariant, InvariantTo, ScalesWith, UnitRange, size

from ._features import position_features
from ._principal_components import principal_components


@dataclass(frozen=True, eq=False, kw_only=True)
class PatchComponents(Result):
    """Coordinates of patches on principal components that all images share.

    ``images`` (N, C, H, W); ``components`` (N, K, h, w), the coordinates; ``colors`` (N, 3, h, w), the first
    three as red, green and blue in [0, 1], black outside the foreground; ``foreground`` (N, h, w) bool;
    ``variance`` (K,): the share of the variance of the (foreground) patches; ``centers``: the pixels at which
    rows and columns are centered, None where the cells share the image.
    """

    shapes: ClassVar[Mapping[str, str]] = {
        "images": "N C H W",
        "components": "N K h w",
        "colors": "N 3 h w",
        "foreground": "N h w",
        "variance": "K",
    }
    groups_per_row: ClassVar[int] = 4

    images: Tensor
    components: Tensor
    colors: Tensor
    foreground: Tensor
    variance: Tensor
    layer: str
    centers: Centers | None = None

    def enlarged(self) -> Tensor:
        """The colors at the size of the images, (N, 3, H, W): linear between the centers of the patches."""
        return enlarge_maps(self.colors.flatten(0, 1), self.images.shape[2:], self.centers).unflatten(
            0, (-1, 3)
        )

    def panels(self) -> list[list[Panel]]:
        colors = self.enlarged().float().clamp(0, 1)
        return [
            [Panel(image), Panel(drawn, is_output=True)]
            for image, drawn in zip(self.images, colors, strict=True)
        ]

    def lines(self) -> list[str]:
        shares = ", ".join(f"{value:.1%}" for value in self.variance.tolist())
        area = float(self.foreground.double().mean())
        return [f"{self.layer}: variance of the components {shares}; foreground {area:.0%} of the patches"]


def _oracle() -> None:
    """Features with variances 9, 4 and 1 along known axes have these axes as components, in that order."""
    channels = nn.Conv2d(3, 4, 1, bias=False)
    last = nn.Conv2d(4, 5, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 2)
    network = nn.Sequential(channels, *last).double()
    with torch.no_grad():  # blue is weighted most, then red; the last channel is constant
        channels.weight.copy_(
            torch.tensor([[0, 0, 3.0], [-2.0, 0, 0], [0, 1.0, 0], [0, 0, 0]])[..., None, None]
        )
    model = load_model(network, mean=[0.5] * 3, std=[1.0] * 3, input_size=(3, 2, 4))
    signs = torch.tensor([[1, 1, 1, 1, -1, -1, -1, -1], [1, 1, -1, -1, 1, 1, -1, -1], [1, -1] * 4]).double()
    images = (0.5 + 0.5 * signs[[1, 2, 0]]).view(3, 2, 4)
    images = torch.stack([images, images.flip(2)])
    with max_batch(1):
        result = patch_pca(model, images, layer="0", components=4)
    torch.testing.assert_close(result.variance, torch.tensor([9, 4, 1, 0]).double() / 14)
    # Signs: the largest weight of every component is positive, so red, weighted by -2, is reversed.
    blue, red, green = (images[0, channel] - 0.5 for channel in (2, 0, 1))
    torch.testing.assert_close(result.components[0, :3], torch.stack([3 * blue, -2 * red, green]))
    assert float(result.components[:, 3].abs().max()) < 1e-6
    torch.testing.assert_close(result.colors[0], (result.components[0, :3].sign() + 1) / 2)
    torch.testing.assert_close(result.components[1], result.components[0].flip(2))
    assert result.foreground.all() and result.layer == "0"
    assert result.centers == ((0, 1), (0, 1, 2, 3)) and result.components.dtype == torch.float64
    # The foreground are the patches of positive first component: blue. Its components are red, then green.
    result = patch_pca(model, images, layer="0", foreground="positive")
    assert torch.equal(result.foreground[0], blue > 0)
    torch.testing.assert_close(result.variance, torch.tensor([4, 1, 0]).double() / 5)
    inside = result.foreground[0]
    torch.testing.assert_close(result.components[0, :2, inside], torch.stack([-2 * red, green])[:, inside])
    assert (result.colors[0, :, ~inside] == 0).all() and (result.components[0, :, ~inside] == 0).all()
    negative = patch_pca(model, images, layer="0", foreground="negative")
    assert torch.equal(negative.foreground, ~result.foreground)
    enlarged = result.enlarged()
    torch.testing.assert_close(enlarged, result.colors)
    # Three components of known range: each is scaled to [0, 1] by its own; the sign of the second is free.
    colors = torch.rand(2, 3, 2, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    result = patch_pca(model, colors, layer="0", components=3)
    points = result.components.movedim(1, -1).flatten(0, 2)
    low, high = points.min(0).values, points.max(0).values
    scaled = ((points - low) / (high - low)).view(2, 2, 4, 3).movedim(-1, 1)
    torch.testing.assert_close(result.colors, scaled)
    # Of the last map by default, in the model's precision.
    model = load_model(network.float(), mean=[0.5] * 3, std=[1.0] * 3, input_size=(3, 2, 4))
    result = patch_pca(model, images.float(), components=3)
    assert (result.layer, result.components.shape) == ("1", (2, 3, 2, 4))
    assert {result.components.dtype, result.colors.dtype, result.variance.dtype} == {torch.float32}


@method(
    family="embeddings",
    title="PCA of patch features",
    references=[
        Reference(
            key="oquab2023",
            title="DINOv2: Learning Robust Visual Features without Supervision",
            authors="Oquab, Darcet, Moutakanni, Vo, Szafraniec, Khalidov, Fernandez, Haziza, Massa, et al.",
            year=2023,
            url="https://arxiv.org/abs/2304.07193",
        ),
        Reference(
            key="amir2021",
            title="Deep ViT Features as Dense Visual Descriptors",
            authors="Amir, Gandelsman, Bagon, Dekel",
            year=2021,
            url="https://arxiv.org/abs/2112.05814",
        ),
    ],
    invariants=[UnitRange(field="colors")],
    relations=[
        *(
            Equivariant(transform, fields=("components", "colors"))
            for transform in ("hflip", "vflip", "transpose")
        ),
        InvariantTo("batch_order", fields=("components", "colors")),
        InvariantTo("normalization"),
        ScalesWith("logits", power=0),
    ],
    cost=Cost(forward=size.images),
    batch_independent=False,
    oracle=_oracle,
    demo={"layer": "features.6"},
)
def patch_pca(
    model: Model,
    images: Images,
    *,
    layer: Annotated[
        LayerName | None, Field(description="layer of the features; default: the last map")
    ] = None,
    components: Annotated[int, Field(ge=3, le=64, description="number of components")] = 3,
    foreground: Annotated[
        Literal["all", "positive", "negative"],
        Field(
            description="patches whose components are computed: all, or those of one sign of the first one"
        ),
    ] = "all",
) -> PatchComponents:
    """PCA of patch features: the first three principal components of a layer's positions as colors.

    z_p = U' (phi_p - m),  color_k = (z_k - min z_k) / (max z_k - min z_k)

    with phi_p the layer's features at position p of an image, m their mean and U the principal components
    over all positions of all images: one basis, so that a color means the same in all of them. Parts of
    objects that the model represents alike have one color. With ``foreground`` the positions are first cut
    at 0 along the first component of all of them, and components and colors are those of the positions on
    one side; which side is the object depends on the images. Components have the sign for which their entry
    of largest absolute value is positive. Tokens without a position, such as class tokens, are left out.

    Returns:
        ``components`` (N, K, h, w): z, 0 outside the foreground; ``colors`` (N, 3, h, w) in [0, 1];
        ``foreground`` (N, h, w); ``variance`` (K,), the share of each component.

    Raises:
        InputError: fewer channels or positions than components, or a foreground with too few positions.
        ModelError: the layer's output is no map.

    Example::
        from phosphene import run

        result = run("patch_pca", images="builtin:scenes/4")
        result.colors.shape  # (4, 3, 8, 8)

    Source:
        Oquab et al. 2023, section 7.5 and figure 1; Amir et al. 2021, section 3.
    """
    layer = layer if layer is not None else model.last_map
    maps = position_features(model, images, layer)
    count, channels, height, width = maps.shape
    features = to_float64(maps.movedim(1, -1).flatten(0, 2))
    inside = torch.ones(len(features), dtype=torch.bool, device=features.device)
    if foreground != "all":
        # equivalent mutants: only the first is used
        first = _components(features, 1, f"layer {layer!r}")[0][:, 0]
        inside = first > 0 if foreground == "positive" else first < 0
    points, variance = _components(features[inside], components, f"the foreground of layer {layer!r}")
    low, high = points[:, :3].amin(0), points[:, :3].amax(0)
    scaled = (points[:, :3] - low) / torch.where(high > low, high - low, 1)
    coordinates, colors = (values.new_zeros(len(features), values.shape[1]) for values in (points, scaled))
    coordinates[inside], colors[inside] = points, scaled
    grid = (count, height, width, -1)
    return PatchComponents(
        images=images,
        components=coordinates.view(grid).movedim(-1, 1).to(model.device, model.dtype).contiguous(),
        colors=colors.view(grid).movedim(-1, 1).to(model.device, model.dtype).contiguous(),
        foreground=inside.view(grid[:3]).to(maps.device),
        variance=variance.to(model.device, model.dtype),
        layer=layer,
        centers=unit_centers(model, layer, images.shape[2:]),
    )


def _components(features: Tensor, count: int, what: str) -> tuple[Tensor, Tensor]:
    """Coordinates (P, count) on the principal components, and each one's share of the variance."""
    if count > min(features.shape):
        raise InputError(
            f"{what} has {features.shape[0]} positions of {features.shape[1]} channels, "
            f"so there can be no {count} components"
        )
    return principal_components(features, count)


@hookimpl
def phosphene_methods():
    return [patch_pca]
