"""Median filtering before the model: single pixels that stand out are gone, edges stay."""

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from phosphene import hookimpl, method
from phosphene.roles import Images, Model
from phosphene.spec import Cost, PixelRange, SameShape, size

from ._input_transform_result import Change, DefendedImages, compared
from .bit_depth import FEATURE_SQUEEZING


def filtered(size: int) -> Change:
    """The median of ``size`` x ``size`` pixels about each; the gradient goes to the pixel that it is."""

    def change(images: Tensor) -> Tensor:
        rows, columns = (_around(side, size, images.device) for side in images.shape[-2:])
        # (N, C, H, W, size, size): for every pixel its window, mirrored at the borders.
        windows = images[..., rows[:, None, :, None], columns[None, :, None, :]]
        return windows.flatten(-2).kthvalue(size * size // 2 + 1).values

    return change


def _around(side: int, size: int, device: torch.device) -> Tensor:
    """(side, size) the places in each place's window; beyond an edge is the mirror image, edge included."""
    offsets = torch.arange(size, device=device) - size // 2
    places = (torch.arange(side, device=device)[:, None] + offsets) % (2 * side)
    return torch.minimum(places, 2 * side - 1 - places)


def removes_a_speck_and_keeps_an_edge() -> None:
    """A white speck on black is gone, half a white plane is as it was, and so is any picture at size 1."""
    speck, plane = torch.zeros(2, 1, 1, 7, 7).unbind()
    speck[..., 3, 3], plane[..., 4:] = 1, 1
    assert not filtered(3)(speck).any()
    assert torch.equal(filtered(3)(plane), plane)
    noise = torch.rand(1, 2, 5, 6, generator=torch.Generator().manual_seed(0))
    assert torch.equal(filtered(1)(noise), noise)


@method(
    family="defenses",
    title="Median smoothing",
    references=[FEATURE_SQUEEZING],
    invariants=[PixelRange(field="transformed"), SameShape(field="transformed")],
    cost=Cost(forward=2 * size.images),
    tags=["input-transform"],
    oracle=removes_a_speck_and_keeps_an_edge,
    defense=filtered,
)
def median(
    model: Model,
    images: Images,
    *,
    size: Annotated[int, Field(ge=1, le=15, description="side of the window, pixels")] = 3,
) -> DefendedImages:
    """Show the model the median of a window about every pixel, each channel for itself.

    x'_p = median {x_q : q in the size x size window about p},   dx'_p/dx_q = [q is the median's pixel]

    Beyond the borders is the picture's mirror image; of an even number of pixels the upper middle one is
    taken, all as ``scipy.ndimage.median_filter(mode="reflect")`` has it. The gradient is the filter's own, so
    that attacks on ``median.defend(model)`` need no substitute for it. ``images`` (N, C, H, W) in [0, 1].

    Source: Xu et al. 2018, section 3.2.
    """
    return compared(model, images, filtered(size))


@hookimpl
def phosphene_methods():
    return [median]
