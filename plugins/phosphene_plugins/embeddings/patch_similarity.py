"""Patch similarity: cosine between the features at one position and those of all positions and images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from phosphene import (
    InputError,
    Reference,
    hookimpl,
    load_model,
    max_batch,
    method,
    unit_centers,
)
from phosphene.images import Centers, enlarge_maps, overlay, to_display
from phosphene.results import Panel, Result
from phosphene.roles import Images, LayerName, Model
from phosphene.spec import Cost, InvariantTo, ScalesWith, size

from ..activations._dense_maps import dense_map_network
from ._features import position_features


@dataclass(frozen=True, eq=False, kw_only=True)
class PatchSimilarity(Result):
    """Cosine similarities to one patch.

    ``images`` (N, C, H, W); ``maps`` (N, h, w), the cosines; ``query``: the image number and the patch's y
    and x on the layer's map; ``best`` (N, 2): y and x of the most similar patch of every image, in pixels;
    ``pixel``: the center of the queried patch in its image, y and x.
    """

    shapes: ClassVar[Mapping[str, str]] = {"images": "N C H W", "maps": "N h w", "best": "N axes"}
    groups_per_row: ClassVar[int] = 4

    images: Tensor
    maps: Tensor
    best: Tensor
    query: tuple[int, int, int]
    pixel: tuple[float, float]
    layer: str
    centers: Centers | None = None

    def panels(self) -> list[list[Panel]]:
        maps = enlarge_maps(self.maps.float(), self.images.shape[2:], self.centers)
        # One scale for all images: a patch of another image that is less similar stays darker.
        low, high = float(self.maps.min()), float(self.maps.max())
        groups = []
        for n, (image, cosines) in enumerate(zip(self.images, maps, strict=True)):
            heat = ((cosines - low) / max(high - low, 1e-12)).clamp(0, 1)
            drawn = overlay(to_display(image), heat)
            if n == self.query[0]:
                drawn = _mark(drawn, self.pixel)
            title = "query" if n == self.query[0] else f"up to {float(self.maps[n].max()):.2f}"
            groups.append([Panel(image), Panel(drawn, title, is_output=True)])
        return groups

    def lines(self) -> list[str]:
        image, y, x = self.query
        best = ", ".join(f"{value:.3f}" for value in self.maps.flatten(1).amax(1).tolist())
        return [f"{self.layer}, patch {y}, {x} of image {image}: largest cosine per image {best}"]


def _mark(image: Tensor, pixel: tuple[float, float]) -> Tensor:
    """The image (3, H, W) with a white square, framed in black, around a pixel."""
    image, side = image.clone(), max(1, max(image.shape[1:]) // 64)
    y, x = (round(value) for value in pixel)
    for size_of_square, value in ((2 * side, 0.0), (side, 1.0)):
        top, left = max(0, y - size_of_square), max(0, x - size_of_square)
        image[:, top : y + size_of_square + 1, left : x + size_of_square + 1] = value
    return image


def _oracle() -> None:
    """The cosines of colors: equal ones have 1, orthogonal ones 0, and so across images."""
    same, last = nn.Conv2d(3, 3, 1, bias=False), nn.Conv2d(3, 3, 1)
    network = nn.Sequential(same, last, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2)).double()
    with torch.no_grad():
        same.weight.copy_(torch.eye(3)[..., None, None])
    model = load_model(network, mean=[0.0] * 3, std=[1.0] * 3, input_size=(3, 2, 3))
    images = torch.zeros(2, 3, 2, 3, dtype=torch.float64)
    images[0, 0], images[0, 1, 0, 2] = 0.5, 0.5  # red, and yellow in the upper right corner
    images[1, 2], images[1, :2, 1, 0] = 1.0, 0.25  # blue, and pale blue in the lower left corner
    root = 0.5**0.5
    with max_batch(1):
        result = patch_similarity(model, images, position=(0, 2), layer="0")
    torch.testing.assert_close(result.maps[0], torch.tensor([[root, root, 1], [root, root, root]]).double())
    pale = 0.5 / (2 * 1.125) ** 0.5
    torch.testing.assert_close(result.maps[1], torch.tensor([[0, 0, 0], [pale, 0, 0]]).double())
    assert (
        result.query == (0, 0, 2) and result.pixel == (0.0, 2.0) and result.best.tolist() == [[0, 2], [1, 0]]
    )
    assert result.centers == ((0, 1), (0, 1, 2))
    # Of the last map by default, and of the patch at the center of the first image.
    result = patch_similarity(model, images)
    assert result.layer == "1" and result.query == (0, 1, 1)
    outputs = model.features(images, "1").detach()
    cosines = F.cosine_similarity(outputs, outputs[:1, :, 1:2, 1:2])
    torch.testing.assert_close(result.maps, cosines)
    # Of units without centers, which share the image; rectangles, and the center of an odd side.
    network, _ = dense_map_network()
    model = load_model(network, mean=[0.4, 0.5], std=[0.2, 0.3], input_size=(2, 6, 8))
    inputs = torch.rand(2, 2, 6, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    shared = patch_similarity(model, inputs, layer="2", image=1, position=(5, 3))
    assert shared.query == (1, 2, 1) and shared.pixel == (4.5, 2.5) and shared.centers is None
    outputs = model.features(inputs, "2").detach()
    torch.testing.assert_close(shared.maps, F.cosine_similarity(outputs, outputs[1:, :, 2:3, 1:2]))
    rows = [divmod(int(n), 4) for n in shared.maps.flatten(1).argmax(1)]
    assert shared.best.tolist() == [[2 * y + 0.5, 2 * x + 0.5] for y, x in rows]
    # Of another image, by a pixel of an enlarged one: its patches are 2 x 4 pixels.
    pooled = nn.Sequential(
        nn.AvgPool2d((2, 4)), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2)
    ).double()
    model = load_model(pooled, mean=[0.0] * 3, std=[1.0] * 3, input_size=(3, 4, 12))
    larger = images.repeat_interleave(2, 2).repeat_interleave(4, 3)
    result = patch_similarity(model, larger, image=1, position=(3, 0), layer="0")
    assert result.query == (1, 1, 0) and result.pixel == (2.5, 1.5) and result.best.tolist()[1] == [2.5, 1.5]
    torch.testing.assert_close(result.maps[1, 1], torch.tensor([1, 1 / 1.125**0.5, 1 / 1.125**0.5]).double())


@method(
    family="embeddings",
    references=[
        Reference(
            key="amir2021",
            title="Deep ViT Features as Dense Visual Descriptors",
            authors="Amir, Gandelsman, Bagon, Dekel",
            year=2021,
            url="https://arxiv.org/abs/2112.05814",
        )
    ],
    relations=[
        InvariantTo("normalization"),
        ScalesWith("logits", power=0),
    ],
    cost=Cost(forward=size.images),
    batch_independent=False,
    oracle=_oracle,
)
def patch_similarity(
    model: Model,
    images: Images,
    *,
    position: Annotated[
        tuple[int, int] | None, Field(description="pixel (y, x) of the query; default: the image's center")
    ] = None,
    image: Annotated[int, Field(ge=0, description="number of the image that has the query")] = 0,
    layer: Annotated[
        LayerName | None, Field(description="layer of the features; default: the last map")
    ] = None,
) -> PatchSimilarity:
    """Patch similarity: cosine of the features at one position with those at all positions of all images.

    s_p = phi_q . phi_p / (|phi_q| |phi_p|)

    with phi_p the layer's features at position p, and q the position whose center is nearest to the queried
    pixel. The largest value in another image is the patch that corresponds to the query. All maps of a
    figure have one scale.

    Returns:
        ``maps`` (N, h, w): s, in [-1, 1]; 0 for features of zeros. ``best`` (N, 2): the pixel (y, x) of the
        most similar position of each image; ``query``: image number and position on the map.

    Raises:
        InputError: an image or a pixel that does not exist.
        ModelError: the layer's output is no map.

    Example::
        from phosphene import run

        result = run("patch_similarity", images="builtin:scenes/4", position=(30, 30))
        result.maps.shape  # (4, 8, 8)

    Source:
        Amir et al. 2021, section 3.
    """
    layer = layer if layer is not None else model.last_map
    count, _, height, width = images.shape
    if image >= count:
        raise InputError(f"there are {count} images, so there is no number {image}")
    pixel = position if position is not None else (height // 2, width // 2)
    if not (0 <= pixel[0] < height and 0 <= pixel[1] < width):
        raise InputError(f"the images are {height}x{width}, so there is no pixel {pixel[0]}, {pixel[1]}")
    maps = position_features(model, images, layer)
    centers = unit_centers(model, layer, images.shape[2:])
    positions = centers or tuple(
        tuple((n + 0.5) * side / cells - 0.5 for n in range(cells))
        for side, cells in zip((height, width), maps.shape[2:], strict=True)
    )
    y, x = (_nearest(axis, value) for axis, value in zip(positions, pixel, strict=True))
    # equivalent mutants: axis 1 is the default
    features = F.normalize(maps, dim=1)
    # equivalent mutants: only rounding leaves [-1, 1]
    cosines = torch.einsum("nchw,c->nhw", features, features[image, :, y, x]).clamp(-1, 1)
    best = cosines.flatten(1).argmax(1).tolist()  # equivalent mutants: tensors of one number are numbers
    columns = maps.shape[3]
    return PatchSimilarity(
        images=images,
        maps=cosines.to(model.dtype),
        best=torch.tensor([[positions[0][n // columns], positions[1][n % columns]] for n in best]).to(images),
        query=(image, y, x),
        pixel=(positions[0][y], positions[1][x]),
        layer=layer,
        centers=centers,
    )


def _nearest(axis: tuple[float, ...], value: int) -> int:
    """The index of the coordinate nearest to a value."""
    return min(range(len(axis)), key=lambda n: abs(axis[n] - value))


@hookimpl
def phosphene_methods():
    return [patch_similarity]
