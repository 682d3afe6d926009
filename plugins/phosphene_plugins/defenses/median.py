"""Median filtering (feature squeezing) as a defense against adversarial perturbations."""

from typing import Annotated

import scipy.ndimage
import torch
from pydantic import Field
from torch import Tensor

from phosphene import hookimpl, method
from phosphene.roles import Images, Model
from phosphene.spec import Cost, PixelRange, SameShape, size
from phosphene.testing import linear_model

from ._input_transform_result import FLIPS, INDEPENDENT, DefendedImages, Transform, compare_predictions
from .bit_depth import FEATURE_SQUEEZING


def median_filter(size: int) -> Transform:
    """The median of the ``size`` x ``size`` window of each pixel; the gradient goes to the median's pixel."""

    def transform(images: Tensor) -> Tensor:
        rows, columns = (_window_indices(side, size, images.device) for side in images.shape[2:])
        # (N, C, H, W, size, size): the window of each pixel, mirrored at the borders.
        windows = images[..., rows[:, None, :, None], columns[None, :, None, :]]
        return windows.flatten(-2).kthvalue(size * size // 2 + 1).values

    return transform


def _window_indices(side: int, size: int, device: torch.device) -> Tensor:
    """(side, size) the indices in the window of each index; mirrored at the border, which is repeated."""
    offsets = torch.arange(size, device=device) - size // 2
    indices = (torch.arange(side, device=device)[:, None] + offsets) % (2 * side)
    return torch.minimum(indices, 2 * side - 1 - indices)


def removes_a_speck_and_preserves_an_edge() -> None:
    """A white pixel on black is removed, an edge is unchanged; noise is as after SciPy's filter."""
    speck, edge = torch.zeros(2, 1, 1, 7, 7).unbind()
    speck[..., 3, 3], edge[..., 4:] = 1, 1
    assert not median_filter(3)(speck).any()
    assert torch.equal(median_filter(3)(edge), edge)
    noise = torch.rand(1, 2, 5, 6, generator=torch.Generator().manual_seed(0))
    model = linear_model(torch.linspace(-1, 1, 2 * noise.numel()).view(2, 2, 5, 6))
    for side in (1, 3, 4, 15):  # windows of 15 exceed the mirrored image
        result = median(model, noise, size=side)
        filtered = scipy.ndimage.median_filter(noise.numpy(), (1, 1, side, side), mode="reflect")
        torch.testing.assert_close(result.transformed, torch.from_numpy(filtered), rtol=0, atol=0)
    torch.testing.assert_close(result.confidence_after, model(result.transformed).softmax(1).amax(1))


@method(
    family="defenses",
    title="Median smoothing",
    references=[FEATURE_SQUEEZING],
    invariants=[PixelRange(field="transformed"), SameShape(field="transformed")],
    relations=[*FLIPS, *INDEPENDENT],
    cost=Cost(forward=2 * size.images),
    tags=["input-transform"],
    oracle=removes_a_speck_and_preserves_an_edge,
    defense=median_filter,
)
def median(
    model: Model,
    images: Images,
    *,
    size: Annotated[int, Field(ge=1, le=15, description="side of the window, pixels")] = 3,
) -> DefendedImages:
    """Median smoothing (feature squeezing): median filter of each channel, as an input transform.

    x'_p = median {x_q : q in the size x size window about p},   dx'_p/dx_q = [q is the median's pixel]

    Borders are mirrored, and an even window takes the upper median, as in
    ``scipy.ndimage.median_filter(mode="reflect")``. The gradient is the filter's own, so attacks on
    ``median.defend(model)`` need no substitute for it.

    Returns:
        ``transformed`` (N, C, H, W) in [0, 1]; ``before``, ``after`` (N,) the predicted classes.

    Raises:
        InputError: ``images`` do not fit the model.

    Example::
        from phosphene import run

        result = run("median", images="builtin:scenes/2", size=3)
        result.transformed.shape  # (2, 3, 64, 64)

    Source: Xu et al. 2018, section 3.2.
    """
    return compare_predictions(model, images, median_filter(size))


@hookimpl
def phosphene_methods():
    return [median]
