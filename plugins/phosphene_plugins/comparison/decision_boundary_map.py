"""Decision boundaries of a linear classifier on the plane of the features' principal components."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, cast

import torch
from pydantic import Field
from torch import Tensor, nn

from phosphene import (
    InputError,
    ModelError,
    Reference,
    TensorDataset,
    hookimpl,
    load_model,
    method,
    to_float64,
)
from phosphene.images import charts, enlarge
from phosphene.results import Panel, Result
from phosphene.roles import Dataset, Model
from phosphene.spec import Cost, InvariantTo, UnitRange, size

from ..embeddings._features import embed_dataset, require_images
from ..embeddings._principal_components import center, principal_axes

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, eq=False, kw_only=True)
class DecisionRegions(Result):
    """The class of every point of a plane in feature space, and the images of a data set on it.

    ``regions`` (G, G): the class number at each point of a grid, row 0 at the smallest y; ``probabilities``
    (G, G): its probability; ``extent``: the smallest and largest x, then y. ``points`` (N, 2): the images,
    ``predictions`` (N,) the classes that the model predicts for them, ``plane_predictions`` (N,) those of
    their projections onto the plane. ``labels``: class names of the images, or None. ``variance`` (2,): the
    share of the variance along each axis; ``names``: class names by number, of those that occur.
    """

    shapes: ClassVar[Mapping[str, str]] = {
        "regions": "G G",
        "probabilities": "G G",
        "points": "N axes",
        "predictions": "N",
        "plane_predictions": "N",
        "labels": "N",
        "ids": "N",
    }

    regions: Tensor
    probabilities: Tensor
    extent: tuple[float, float, float, float]
    points: Tensor
    predictions: Tensor
    plane_predictions: Tensor
    agreement: Tensor
    variance: Tensor
    ids: tuple[str, ...]
    names: Mapping[str, str]
    labels: tuple[str, ...] | None = None

    def lines(self) -> list[str]:
        variance = float(self.variance.sum())
        share = float(self.agreement)
        return [
            f"{len(self.ids)} images: the plane has {variance:.1%} of the features' variance; "
            f"the region of {share:.1%} of the images is their predicted class"
        ]

    def _colors(self) -> dict[int, tuple[float, float, float]]:
        """A color per class that occurs, the most frequent ones first."""
        numbers = [int(n) for n in torch.cat([self.regions.flatten(), self.predictions]).unique()]
        names = [self.names[str(n)] for n in numbers for _ in range(int((self.predictions == n).sum()) + 1)]
        _, legend = charts.label_colors(names, len(names))
        return {n: legend.get(self.names[str(n)], charts.GRAY) for n in numbers}

    def _background(self) -> Tensor:
        """The regions as an image (3, G, G), paler where the class is less probable."""
        colors = self._colors()
        image = torch.ones(3, *self.regions.shape)
        strength = 0.15 + 0.45 * self.probabilities.float().cpu()
        for number, color in colors.items():
            mask = (self.regions == number).cpu()
            for channel in range(3):
                image[channel][mask] = 1 - strength[mask] * (1 - color[channel])
        return image

    def panels(self) -> list[list[Panel]]:
        return [[Panel(enlarge(self._background().flip(1), 2), self.lines()[0], is_output=True)]]

    def draw(self) -> Figure:
        """The regions, and the images as points; a black ring where the plane is wrong for them."""
        figure = charts.new_figure(5.4)
        figure.set_size_inches(7.2, 5.4)
        axes = cast(Any, figure.subplots())
        background = self._background().permute(1, 2, 0).numpy()
        axes.imshow(background, extent=self.extent, origin="lower", aspect="auto", interpolation="nearest")
        colors = self._colors()
        fills = [colors[int(n)] for n in self.predictions]
        wrong = (self.predictions != self.plane_predictions).cpu()
        x, y = self.points.double().cpu().T.numpy()
        edges = ["black" if ring else "white" for ring in wrong.tolist()]
        axes.scatter(x, y, s=16, c=fills, edgecolors=edges, linewidths=0.6)
        marks = [
            axes.scatter([], [], s=24, color=color, label=charts.plain_label(self.names[str(n)]))
            for n, color in sorted(colors.items(), key=lambda item: self.names[str(item[0])])
            if bool((self.predictions == n).any())
        ]
        axes.legend(handles=marks, fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1.01, 0.5))
        titles = [
            f"component {n}, {share:.1%} of the variance"
            for n, share in enumerate(self.variance.tolist(), start=1)
        ]
        axes.set_xlabel(titles[0], fontsize=8)
        axes.set_ylabel(titles[1], fontsize=8)
        axes.tick_params(labelsize=7, colors="0.4")
        axes.set_title(self.lines()[0].replace("; ", ";\n"), fontsize=8, loc="left", color="0.3")
        return figure


def _oracle() -> None:
    """Of pixels that vary along two axes, the regions are those of the linear classifier on these."""
    classifier = nn.Linear(4, 3)
    network = nn.Sequential(nn.Flatten(), classifier).double()
    weight = torch.tensor([[4.0, 0, 0, 0], [0, 6.0, 0, 0], [0, 0, 5.0, 60.0]], dtype=torch.float64)
    with torch.no_grad():
        classifier.weight.copy_(weight)
        classifier.bias.copy_(torch.tensor([0.1, -0.3, 0.0]))
    model = load_model(network, mean=[0.0], std=[1.0], input_size=(1, 2, 2), classes=["a", "b", "c"])
    x = torch.tensor([0.1, 0.9, 0.5, 0.5, 0.3], dtype=torch.float64)
    y = torch.tensor([0.5, 0.5, 0.25, 0.75, 0.5], dtype=torch.float64)
    images = torch.stack([x, y, torch.full_like(x, 0.2), torch.zeros_like(x)], 1).view(5, 1, 2, 2)
    result = decision_boundary_map(model, TensorDataset(images, list("abcab")), grid=21, margin=0.5)
    points = images.flatten(1) - images.flatten(1).mean(0)
    torch.testing.assert_close(result.points, points[:, :2])
    torch.testing.assert_close(result.variance, points.square().sum(0)[:2] / points.square().sum())
    left, right, bottom, top = result.extent
    assert abs(left - (-0.36 - 0.4)) < 1e-9 and abs(top - (0.25 + 0.25)) < 1e-9
    assert abs(right - (0.44 + 0.4)) < 1e-9 and abs(bottom - (-0.25 - 0.25)) < 1e-9
    # Centers of the cells of the grid.
    columns = left + (torch.arange(21).double() + 0.5) * (right - left) / 21
    rows = bottom + (torch.arange(21).double() + 0.5) * (top - bottom) / 21
    plane = images.flatten(1).mean(0).expand(21, 21, 4).clone()
    plane[..., 0] += columns
    plane[..., 1] += rows[:, None]
    logits = plane @ weight.T + classifier.bias.detach()
    assert torch.equal(result.regions, logits.argmax(2)) and len(result.regions.unique()) == 3
    torch.testing.assert_close(result.probabilities, logits.softmax(2).amax(2))
    assert torch.equal(result.predictions, result.plane_predictions) and result.agreement == 1
    assert result.names["1"] == "b" and result.labels == tuple("abcab") and result.ids[4] == "4"
    # One logit v: class 1 has the probability 1 / (1 + exp(-v)).
    single = nn.Linear(4, 1, bias=False)
    with torch.no_grad():
        single.weight.copy_(torch.tensor([[3.0, -2, 0, 0]]))
    one = nn.Sequential(nn.Flatten(), single).double()
    binary = load_model(one, mean=[0.0], std=[1.0], input_size=(1, 2, 2), task="binary")
    result = decision_boundary_map(binary, TensorDataset(images), grid=21, margin=0.5)
    value = (plane @ single.weight.detach().T)[..., 0]
    assert torch.equal(result.regions, (value > 0).long()) and len(result.regions.unique()) == 2
    torch.testing.assert_close(result.probabilities, 1 / (1 + (-value.abs()).exp()))
    # A third axis decides for one image: the plane does not show it.
    images[4, 0, 1, 1] = 0.06
    result = decision_boundary_map(model, TensorDataset(images), grid=5)
    assert 0 < result.agreement < 1
    assert result.predictions[4] == 2 and float(result.agreement) == float(
        (result.predictions == result.plane_predictions).double().mean()
    )


@method(
    family="comparison",
    references=[
        Reference(
            key="rodrigues2019",
            title="Constructing and Visualizing High-Quality Classifier Decision Boundary Maps",
            authors="Rodrigues, Espadoto, Hirata, Telea",
            year=2019,
            url="https://doi.org/10.3390/info10090280",
        )
    ],
    invariants=[UnitRange(field="probabilities"), UnitRange(field="agreement")],
    relations=[
        InvariantTo("normalization", fields=("agreement", "variance")),
        InvariantTo("logit_shift", fields=("agreement", "variance", "points")),
    ],
    needs=["dataset"],
    cost=Cost(forward=size.dataset + 1),
    oracle=_oracle,
    quick={"grid": 8},
    demo={"dataset": "builtin:scenes/300"},
)
def decision_boundary_map(
    model: Model,
    dataset: Dataset,
    *,
    grid: Annotated[int, Field(ge=2, le=1000, description="cells of the map, per axis")] = 200,
    margin: Annotated[
        float, Field(ge=0, le=10, description="space around the images, in their extent along an axis")
    ] = 0.1,
) -> DecisionRegions:
    """Decision boundary map: the regions of the classes on the plane of two principal components.

    c(x, y) = argmax_c (W (m + x u_1 + y u_2) + b)_c

    with m the mean of the features of a data set's images, u_1 and u_2 the first principal components, and W
    and b the model's linear classifier, whose inputs the features are. The regions are exact on this plane.
    An image lies off it, and may have another class than its projection: ``agreement`` is the share of
    images for which both are the same, and where it is low the map says little about the images.

    Returns:
        ``regions`` and ``probabilities`` (G, G) on the ``extent``; ``points`` (N, 2), the projected images;
        ``predictions`` and ``plane_predictions`` (N,), the classes of images and of their projections;
        ``agreement`` and ``variance`` (2,), the share of the variance along each axis.

    Raises:
        InputError: fewer than three images, or features that vary along fewer than two axes.
        ModelError: the model has no linear classifier, or computes its logits from more than that.

    Example::
        from phosphene import run

        result = run("decision_boundary_map", dataset="builtin:scenes/32", grid=50)
        result.regions.shape  # (50, 50)
        result.agreement

    Source:
        Rodrigues et al. 2019, section 3, with the inverse of a linear projection, which is exact.
    """
    require_images(dataset, None, 3, "a plane")
    embedding = embed_dataset(model, dataset, None)
    features = embedding.features
    mean, centered = features.mean(0), center(features)
    components, variance = principal_axes(to_float64(centered), 2)
    if len(variance) < 2 or not float(variance[1]) > 1e-12 * float(variance[0]):
        raise InputError("the features of the images vary along fewer than two axes: they span no plane")
    axes = components.T.to(features)
    points = centered @ axes.T
    low, high = points.amin(0), points.amax(0)
    space = margin * (high - low)
    low, high = low - space, high + space
    steps = (torch.arange(grid, device=points.device, dtype=points.dtype) + 0.5) / grid
    x, y = (low[n] + steps * (high[n] - low[n]) for n in (0, 1))
    cells = torch.stack(torch.meshgrid(y, x, indexing="ij"), -1).flip(-1).view(-1, 2)
    logits = _linear_classifier(model, features, dataset)
    probabilities = torch.cat([logits(mean + part @ axes).softmax(1) for part in cells.split(4096)])
    largest_probability, regions = probabilities.max(1)
    predictions = logits(features).argmax(1)
    plane_predictions = logits(mean + points @ axes).argmax(1)
    occurring = torch.cat([regions, predictions, plane_predictions]).unique().tolist()
    return DecisionRegions(
        regions=regions.view(grid, grid),
        probabilities=largest_probability.view(grid, grid).to(model.dtype),
        extent=(float(low[0]), float(high[0]), float(low[1]), float(high[1])),
        points=points.to(model.dtype),
        predictions=predictions,
        plane_predictions=plane_predictions,
        agreement=to_float64(predictions == plane_predictions).mean().to(model.device, model.dtype),
        variance=variance.to(model.device, model.dtype),
        ids=embedding.ids,
        names={str(n): model.class_name(n) for n in occurring},
        labels=embedding.labels,
    )


def _linear_classifier(model: Model, features: Tensor, dataset: Dataset) -> Callable[[Tensor], Tensor]:
    """The model's linear classifier as a function of its inputs (n, D).

    Raises ModelError where the model's logits are not those of its linear classifier alone.
    """
    name = model.structure.classifier
    if name is None:
        raise ModelError(f"{model.name} has no linear classifier: there are no regions to draw")
    layer = model.layers[name]
    weight = cast(Tensor, layer.weight).detach().flatten(1).to(features.dtype)
    bias = cast("Tensor | None", layer.bias)
    offset = weight.new_zeros(len(weight)) if bias is None else bias.detach().to(features.dtype)

    def logits(inputs: Tensor) -> Tensor:
        values = inputs @ weight.T + offset
        return torch.cat([-values, values], 1) / 2 if model.task == "binary" else values

    actual = model(dataset.read([0]).to(model.device, model.dtype)).to(features.dtype)
    tolerance = 100 * torch.finfo(model.dtype).eps
    if actual.shape != (1, len(weight) + (model.task == "binary")) or not torch.allclose(
        logits(features[:1]), actual, rtol=tolerance, atol=tolerance * float(1 + actual.abs().max())
    ):
        raise ModelError(
            f"the logits of {model.name} are not the output of its last linear layer, "
            f"{name}: there are no regions in the space of its inputs"
        )
    return logits


@hookimpl
def phosphene_methods():
    return [decision_boundary_map]
