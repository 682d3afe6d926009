"""Right methods that checks once refused for what the kit passed to them: each check passes or skips them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import pytest
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor
from wrong_methods import attribution

from phosphene import Cost, Method, input_gradient, layer_gradients, method, scores
from phosphene.results import Attribution, Panel, Result, Synthesis
from phosphene.roles import Dataset, Denoiser, Images, Labels, LayerName, Model, Target
from phosphene.spec import size
from phosphene.testing import Case, check_method

#: A check, and a right method that it once refused.
RIGHT: list[tuple[str, Method[Any, Any]]] = []


def right(*checks: str, **spec: Any) -> Callable[[Callable[..., Any]], None]:
    """Add a right method to the list, for these checks."""

    def register(function: Callable[..., Any]) -> None:
        registered = method(**{"family": "claims", **spec})(function)
        RIGHT.extend((check, registered) for check in checks)

    return register


@dataclass(frozen=True, eq=False, kw_only=True)
class Numbers(Result):
    """Numbers of data sets or of images."""

    values: Tensor

    def panels(self) -> list[list[Panel]]:
        return []


def _vectors(model: Model, dataset: Any, layer: str | None = None) -> Tensor:
    images = dataset.read(range(len(dataset))).to(model.device, model.dtype)
    with torch.no_grad():
        values = model.features(images, layer) if layer else model.embed(images)
    return values.flatten(2).mean(2) if values.ndim > 2 else values


@right("images_matter", "weights_matter", "reads_the_named_layer", needs=["dataset"])
def difference_of_means(
    model: Model, concept: Dataset, random: Dataset, *, layer: LayerName | None = None
) -> Numbers:
    """The mean features of one data set minus those of another one."""
    layer = layer or model.last_map
    return Numbers(values=_vectors(model, concept, layer).mean(0) - _vectors(model, random, layer).mean(0))


@right("images_matter", "weights_matter", needs=["dataset"])
def leverage(model: Model, images: Images, dataset: Dataset) -> Numbers:
    """Distance from the nearest class mean, in units of the covariance about the class means."""
    vectors, names = _vectors(model, dataset).double(), list(dataset.labels(range(len(dataset))) or ())
    rows = [[n for n, name in enumerate(names) if name == c] for c in sorted(set(names))]
    means = torch.stack([vectors[row].mean(0) for row in rows])
    centered = torch.cat([vectors[row] - vectors[row].mean(0) for row in rows])
    inverse = torch.linalg.pinv(centered.T @ centered / len(vectors), rtol=1e-8, hermitian=True)
    with torch.no_grad():
        differences = model.embed(images).double()[:, None] - means
    values = torch.einsum("nkd,de,nke->nk", differences, inverse, differences).amin(1)
    return Numbers(values=values.clamp(min=0).to(images))


@right("explains_the_target", cost=Cost(forward=size.images * 5))
def quadrants(model: Model, images: Images, target: Target = None) -> Attribution:
    """The drop of the score without each quadrant of the image."""
    target = target.resolve(model, images)
    height, width = (side // 2 for side in images.shape[2:])
    clean, drops = scores(model, images, target), []
    for rows in (slice(0, height), slice(height, None)):
        for columns in (slice(0, width), slice(width, None)):
            occluded = images.clone()
            occluded[:, :, rows, columns] = 0.5
            drops.append(clean - scores(model, occluded, target))
    return attribution(model, images, torch.stack(drops, 1).view(-1, 2, 2), target)


@right("lies_where_the_units_are_centered", "localizes", needs=["gradients"])
def change_by_inversion(
    model: Model,
    images: Images,
    labels: Labels,
    *,
    cell: Annotated[int, Field(ge=1, le=64, description="side of a cell, in pixels")] = 16,
) -> Attribution:
    """The linear change of the loss when a cell of the image is inverted."""
    points = images.detach().clone().requires_grad_()
    (gradient,) = torch.autograd.grad(F.cross_entropy(model(points), labels, reduction="sum"), points)
    change = (gradient * (1 - 2 * images)).sum(1)
    padded = F.pad(change, (0, -change.shape[2] % cell, 0, -change.shape[1] % cell))
    maps = padded.unfold(1, cell, cell).unfold(2, cell, cell).sum((3, 4))
    return Attribution(images=images, maps=maps, targets=tuple(map(model.class_name, labels.tolist())))


@right("localizes", needs=["gradients"])
def evidence_against(model: Model, images: Images, target: Target = None) -> Attribution:
    """The positive part of the map of evidence against the target."""
    ((maps, gradients),) = layer_gradients(model, images, target, model.last_map)
    return attribution(model, images, (-gradients.mean((2, 3), keepdim=True) * maps).sum(1).relu(), target)


@right("cost_is_near_the_work", cost=Cost(forward=size.images * 257))
def cells_of_a_tuple(
    model: Model,
    images: Images,
    target: Target = None,
    *,
    grid: Annotated[
        tuple[Annotated[int, Field(ge=1, le=16)], Annotated[int, Field(ge=1, le=16)]],
        Field(description="rows and columns"),
    ] = (2, 2),
) -> Attribution:
    """The drop of the score without each cell; of the items of a tuple an expression knows no product."""
    target = target.resolve(model, images)
    maps = torch.zeros(len(images), *grid).to(images)
    clean = scores(model, images, target)
    for i in range(grid[0]):
        for j in range(grid[1]):
            rows, columns = (
                slice(k * side // count, (k + 1) * side // count)
                for k, side, count in zip((i, j), images.shape[2:], grid, strict=True)
            )
            occluded = images.clone()
            occluded[:, :, rows, columns] = 0.5
            maps[:, i, j] = clean - scores(model, occluded, target)
    return attribution(model, images, maps, target)


@right("batch_equals_single", "streams_equal_the_call", needs=[])
def one_pass_of_a_denoiser(images: Images, denoiser: Denoiser) -> Synthesis:
    """Images after one pass of a diffusion model, all in one batch, in single precision."""
    x = denoiser.encode(images)
    clean = denoiser.decode(x - 0.1 * denoiser.eps(x, denoiser.time_steps // 2)).clamp(0, 1)
    empty = clean.new_zeros(0, len(clean))
    return Synthesis(images=clean, scores=empty, targets=("clean",) * len(clean), sources=images)


@pytest.mark.parametrize(("check", "tested"), RIGHT, ids=[f"{c}-{m.spec.short_name}" for c, m in RIGHT])
def test_right_method_is_not_refused(check: str, tested: Method[Any, Any]) -> None:
    (outcome,) = check_method(tested, profile="quick", only=[check]).outcomes
    assert outcome.verdict != "failed", str(outcome)


def test_two_data_sets_have_different_images_and_equal_lengths() -> None:
    tested = next(m for c, m in RIGHT if c == "reads_the_named_layer")
    case = Case()
    inputs = case.inputs(tested, case.model())
    first, second = inputs["concept"], inputs["random"]
    assert len(first) == len(second) and not torch.equal(first.images, second.images)


def test_inverted_map_of_a_target_still_fails() -> None:
    def inverted(model: Model, images: Images, target: Target = None) -> Attribution:
        """Evidence against the target: minus input times gradient."""
        return attribution(model, images, -(images * input_gradient(model, images, target)).sum(1), target)

    tested = method(family="claims", needs=["gradients"])(inverted)
    (outcome,) = check_method(tested, profile="quick", only=["localizes"]).outcomes
    assert outcome.verdict == "failed", str(outcome)
