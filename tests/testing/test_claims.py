"""Checks of what a method's text claims: the wrong method fails the check, its right counterpart passes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from wrong_methods import adversarial_examples, attribution, gradient

from phosphene import InputError, Method, batch_size, method, resumable_batches
from phosphene.attacks import project, random_point
from phosphene.images import gaussian_blur, min_max, resize
from phosphene.results import (
    AdversarialExamples,
    Attribution,
    Embedding,
    FilterBank,
    Panel,
    Result,
    Stylization,
    Synthesis,
)
from phosphene.roles import Content, Dataset, Images, Labels, LayerName, Model, Seed, Styles, Target
from phosphene.testing import check_method

#: By name of the check: a function of whether the method has the defect.
MAKERS: dict[str, Callable[[bool], Method[Any, Any]]] = {}


def caught_by(check: str) -> Callable[[Callable[[bool], Callable[..., Any]]], None]:
    """Register a function that defines a method with and without a defect."""

    def register(make: Callable[[bool], Callable[..., Any]]) -> None:
        MAKERS[check] = lambda wrong: method(family="claims", needs=["gradients"])(make(wrong))

    return register


def outcome(check: str, wrong: bool) -> Any:
    (single,) = check_method(MAKERS[check](wrong), profile="quick", only=[check]).outcomes
    return single


# --- maps --------------------------------------------------------------------------------------------


@caught_by("nonnegative_as_documented")
def _(wrong: bool) -> Callable[..., Any]:
    def rectified(model: Model, images: Images, target: Target = None) -> Attribution:
        """The rectified gradient times the image."""
        maps = (images * gradient(model, images, target)).sum(1)
        return attribution(model, images, maps if wrong else maps.relu(), target)

    return rectified


@caught_by("explains_the_logit_as_documented")
def _(wrong: bool) -> Callable[..., Any]:
    def logit_gradient(model: Model, images: Images, target: Target = None) -> Attribution:
        """The largest absolute gradient of the target's logit."""
        points = images.clone().requires_grad_()
        logits = model(points)
        values = target.score(logits.softmax(1) if wrong else logits).sum()
        (slopes,) = torch.autograd.grad(values, points)
        return attribution(model, images, slopes.abs().amax(1), target)

    return logit_gradient


@caught_by("grows_with_the_gradient")
def _(wrong: bool) -> Callable[..., Any]:
    def absolute_gradient(model: Model, images: Images, target: Target = None) -> Attribution:
        """The largest absolute gradient."""
        slopes = gradient(model, images, target)
        return attribution(model, images, (slopes.square() if wrong else slopes.abs()).amax(1), target)

    return absolute_gradient


@caught_by("conserves_relevance")
def _(wrong: bool) -> Callable[..., Any]:
    def relevance(model: Model, images: Images, target: Target = None) -> Attribution:
        """Layer-wise relevance propagation by the rule of gradient times input."""
        maps = (images * gradient(model, images, target)).sum(1)
        return attribution(model, images, 0.95 * maps if wrong else maps, target)

    return relevance


@caught_by("samples_are_averaged")
def _(wrong: bool) -> Callable[..., Any]:
    def noisy_gradient(
        model: Model,
        images: Images,
        target: Target = None,
        *,
        samples: Annotated[int, Field(ge=1, le=1000, description="noisy copies")] = 4,
        seed: Seed = None,
    ) -> Attribution:
        """The mean gradient of noisy copies."""
        target = target.resolve(model, images)
        draw, total = torch.Generator().manual_seed(seed or 0), torch.zeros_like(images)
        for _ in range(samples):
            noise = 0.1 * torch.randn((1, *images.shape[1:]), generator=draw)
            total += gradient(model, images + noise.to(images), target)
        return attribution(model, images, (total if wrong else total / samples).abs().amax(1), target)

    return noisy_gradient


@caught_by("explains_the_predicted_class")
def _(wrong: bool) -> Callable[..., Any]:
    def path_gradient(model: Model, images: Images, target: Target = None) -> Attribution:
        """The mean gradient along the path from a black image."""
        target = target if wrong else target.resolve(model, images)
        total = sum(gradient(model, n / 8 * images, target) for n in range(1, 9))
        return attribution(model, images, (images * total).sum(1), target)

    return path_gradient


@caught_by("covers_the_image")
def _(wrong: bool) -> Callable[..., Any]:
    def bands(model: Model, images: Images, target: Target = None) -> Attribution:
        """The change of the score with bands of eight rows in grey."""
        maps, height = torch.zeros_like(images[:, 0]), images.shape[2]
        with torch.no_grad():
            for top in range(0, height - 7 if wrong else height, 8):
                hidden = images.clone()
                hidden[:, :, top : top + 8] = 0.5
                change = target.score(model(images)) - target.score(model(hidden))
                maps[:, top : top + 8] = change[:, None, None]
        return attribution(model, images, maps, target)

    return bands


@dataclass(frozen=True, eq=False, kw_only=True)
class Values(Result):
    """A number ``values`` (N,) for each of ``images`` (N, C, H, W)."""

    per_image: ClassVar[tuple[str, ...]] = ("images", "values")

    images: Tensor
    values: Tensor

    def panels(self) -> list[list[Panel]]:
        return [[Panel(image, "value")] for image in self.images]


@caught_by("numbers_are_the_same_for_transposed_images")
def _(wrong: bool) -> Callable[..., Any]:
    def largest_share(model: Model, images: Images, target: Target = None) -> Values:
        """The share of the largest gradient."""
        maps = gradient(model, images, target).abs().sum(1)
        rows = maps.amax(1).mean(1) if wrong else maps.amax((1, 2))
        return Values(images=images, values=rows / maps.mean((1, 2)).clamp(min=1e-12))

    return largest_share


# --- layers and filters ------------------------------------------------------------------------------


@caught_by("reads_the_last_layer_as_documented")
def _(wrong: bool) -> Callable[..., Any]:
    def activation_energy(
        model: Model,
        images: Images,
        *,
        layer: Annotated[LayerName | None, Field(description="default: the last layer with maps")] = None,
    ) -> Attribution:
        """The sum of squares of a layer's activations."""
        name = layer or ("relu1" if wrong and "relu1" in model.layers else model.last_map)
        maps = model.maps(model.features(images, name), images, name).square().sum(1)
        return Attribution(images=images, maps=maps, targets=("energy",) * len(images))

    return activation_energy


def filter_bank(model: Any, index: int, axes: tuple[int, ...]) -> FilterBank:
    convolutions = [(n, part) for n, part in model.layers.items() if isinstance(part, nn.Conv2d)]
    name, convolution = convolutions[index]
    weights = convolution.weight.detach().clone()
    tiles = min_max(weights, axes).mean(1, keepdim=True).expand(-1, 3, -1, -1)
    tiles = min_max(weights, axes) if weights.shape[1] == 3 else tiles
    return FilterBank(layer=name, weights=weights, tiles=tiles, captions=("filter",) * len(tiles))


@caught_by("reads_the_first_layer_as_documented")
def _(wrong: bool) -> Callable[..., Any]:
    def first_filters(model: Model) -> FilterBank:
        """Filters of the first layer."""
        return filter_bank(model, -1 if wrong else 0, (1, 2, 3))

    return first_filters


@caught_by("filters_are_scaled_as_documented")
def _(wrong: bool) -> Callable[..., Any]:
    def scaled_filters(model: Model) -> FilterBank:
        """Filters of the first layer, each scaled by its own minimum and maximum."""
        return filter_bank(model, 0, (0, 1, 2, 3) if wrong else (1, 2, 3))

    return scaled_filters


# --- data sets -----------------------------------------------------------------------------------------


def embedding(model: Any, dataset: Any) -> Embedding:
    batches = list(dataset.batches(batch_size(model)))
    images = torch.cat([batch.images for batch in batches]).to(model.device, model.dtype)
    thumbnails = images if images.shape[1] == 3 else images.mean(1, keepdim=True).expand(-1, 3, -1, -1)
    return Embedding(
        ids=tuple(dataset.id(n) for n in range(len(dataset))),
        features=model.embed(images).detach(),
        thumbnails=(255 * thumbnails).to(torch.uint8),
        labels=dataset.labels(range(len(dataset))),
    )


@caught_by("principal_components")
def _(wrong: bool) -> Callable[..., Any]:
    def components(model: Model, dataset: Dataset) -> Embedding:
        """Two principal components of the features."""
        result = embedding(model, dataset)
        features = result.features if wrong else result.features - result.features.mean(0)
        axes = torch.linalg.svd(features.double(), full_matrices=False)[2][:2]
        return replace(result, points=(features.double() @ axes.T).to(features), axes=("first", "second"))

    return components


@caught_by("coordinates_differ")
def _(wrong: bool) -> Callable[..., Any]:
    def neighbor_distance(
        model: Model,
        dataset: Dataset,
        *,
        k: Annotated[int, Field(ge=1, le=3, description="number of the neighbor")] = 2,
    ) -> Embedding:
        """Distance to the k-th nearest other image."""
        result = embedding(model, dataset)
        distances = torch.cdist(result.features, result.features).sort(1).values
        return replace(result, points=distances[:, k - wrong : k - wrong + 1], axes=("distance",))

    return neighbor_distance


@caught_by("grows_with_the_features")
def _(wrong: bool) -> Callable[..., Any]:
    def distance_to_the_mean(model: Model, dataset: Dataset) -> Embedding:
        """The Euclidean distance of each image to the mean."""
        result = embedding(model, dataset)
        squares = (result.features - result.features.mean(0)).square().sum(1, keepdim=True)
        return replace(result, points=squares if wrong else squares.sqrt(), axes=("distance",))

    return distance_to_the_mean


@caught_by("labels_are_not_read")
def _(wrong: bool) -> Callable[..., Any]:
    def unsupervised(model: Model, dataset: Dataset) -> Embedding:
        """Unsupervised coordinates: the first features."""
        result = embedding(model, dataset)
        points = result.features[:, :2].clone()
        if wrong and result.labels:
            points += torch.tensor([[float(label == result.labels[0])] for label in result.labels])
        return replace(result, points=points, axes=("first", "second"))

    return unsupervised


@dataclass(frozen=True, eq=False, kw_only=True)
class MeanImage(Result):
    """The mean ``mean`` (C, H, W) of a data set's images."""

    mean: Tensor

    def panels(self) -> list[list[Panel]]:
        return [[Panel(self.mean, "mean")]]


@caught_by("resumes")
def _(wrong: bool) -> Callable[..., Any]:
    def mean_image(model: Model, dataset: Dataset) -> MeanImage:
        """The mean of the images."""
        state: dict[str, Any] = {"total": torch.zeros(3, 24, 24)}
        for batch in resumable_batches(dataset, batch_size(model), state, "images"):
            if wrong:
                state["total"] += batch.images.sum(0)
            else:
                state["total"] = state["total"] + batch.images.sum(0)
        return MeanImage(mean=state["total"] / len(dataset))

    return mean_image


# --- images --------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False, kw_only=True)
class Changed(Result):
    """Images (N, C, H, W) before and after a change, and the classes (N,) predicted for ``images``."""

    per_image: ClassVar[tuple[str, ...]] = ("images", "changed", "before")

    images: Tensor
    changed: Tensor
    before: Tensor

    def panels(self) -> list[list[Panel]]:
        return [[Panel(image, "changed")] for image in self.changed]


def changed_images(model: Any, images: Tensor, changed: Tensor, predicted: Tensor | None = None) -> Changed:
    with torch.no_grad():
        before = model(images if predicted is None else predicted).argmax(1)
    return Changed(images=images, changed=changed, before=before)


@caught_by("images_are_not_shifted")
def _(wrong: bool) -> Callable[..., Any]:
    def darkened(model: Model, images: Images) -> Changed:
        """Images of half the brightness."""
        return changed_images(model, images, (images / 2).roll((4, 3) if wrong else (0, 0), (2, 3)))

    return darkened


@caught_by("transformed_images_flip")
def _(wrong: bool) -> Callable[..., Any]:
    def rescaled(model: Model, images: Images) -> Changed:
        """Images that are reduced to half their size and enlarged again."""
        height, width = images.shape[2:]
        small = images[:, :, ::2, ::2] if wrong else resize(images, (-(-height // 2), -(-width // 2)))
        return changed_images(model, images, resize(small, (height, width)))

    return rescaled


@caught_by("brightness_is_unchanged")
def _(wrong: bool) -> Callable[..., Any]:
    def quantized(model: Model, images: Images) -> Changed:
        """Quantization to four levels."""
        return changed_images(model, images, (3 * images).floor() / 3 if wrong else (3 * images).round() / 3)

    return quantized


@caught_by("smooths_both_axes")
def _(wrong: bool) -> Callable[..., Any]:
    def mean_filter(model: Model, images: Images) -> Changed:
        """Mean filter of 3x3 pixels."""
        padded = F.pad(images, (1, 1, 0, 0) if wrong else (1, 1, 1, 1), mode="replicate")
        return changed_images(model, images, F.avg_pool2d(padded, (1, 3) if wrong else 3, stride=1))

    return mean_filter


@caught_by("predictions_before_are_of_the_images")
def _(wrong: bool) -> Callable[..., Any]:
    def blurred(model: Model, images: Images) -> Changed:
        """Blurred images."""
        changed = gaussian_blur(images, 3.0)
        return changed_images(model, images, changed, changed if wrong else None)

    return blurred


@caught_by("returns_the_pixels_that_were_passed")
def _(wrong: bool) -> Callable[..., Any]:
    def ascent(model: Model, target: Target) -> Synthesis:
        """One step that increases the score."""
        noise = 0.5 + 0.05 * torch.randn((1, *model.input_size), generator=torch.Generator().manual_seed(0))
        images = (noise + gradient(model, noise, target).sign() / 100).clamp(0, 1)
        with torch.no_grad():
            values = target.score(model(images))[None]
        if wrong:
            images = model.normalize(images).clamp(0, 1)
        return Synthesis(images=images, scores=values, targets=target.names(model, 1))

    return ascent


@caught_by("scores_are_of_their_step")
def _(wrong: bool) -> Callable[..., Any]:
    def repeated_ascent(
        model: Model,
        target: Target,
        *,
        steps: Annotated[int, Field(ge=2, le=100, description="number of steps")] = 4,
    ) -> Synthesis:
        """Steps that increase the score."""
        start = 0.1 * torch.randn((1, *model.input_size), generator=torch.Generator().manual_seed(0))
        images, history = 0.5 + start, []
        for _ in range(steps):
            with torch.no_grad():
                history.append(target.score(model(images)))
            images = (images + gradient(model, images, target).sign() / 50).clamp(0, 1)
        scores = torch.stack([history[0], *history[:-1]] if wrong else history)
        return Synthesis(images=images, scores=scores, targets=target.names(model, 1))

    return repeated_ascent


@caught_by("positions_are_those_of_the_content")
def _(wrong: bool) -> Callable[..., Any]:
    def mixed(images: Content, styles: Styles) -> Stylization:
        """The content with the mean color of the style."""
        style = resize(styles[:1], (images.shape[2], images.shape[3]))
        added = style if wrong else style.mean((2, 3), keepdim=True)
        return Stylization(images=images, stylized=(images + added) / 2, style="mean", sources=styles)

    return mixed


# --- attacks -------------------------------------------------------------------------------------------


@caught_by("smallest_perturbation")
def _(wrong: bool) -> Callable[..., Any]:
    def minimal_step(model: Model, images: Images, labels: Labels) -> AdversarialExamples:
        """The smallest step over a linear boundary."""
        with torch.no_grad():
            logits = model(images)
        points = []
        for n in range(len(images)):
            point = images[n : n + 1].clone().requires_grad_()
            values = model(point)[0]
            slopes = [torch.autograd.grad(value, point, retain_graph=True)[0] for value in values]
            steps = []
            for k in range(logits.shape[1]):
                if k != labels[n]:
                    normal = slopes[k] - slopes[int(labels[n])]
                    gap = (logits[n, labels[n]] - logits[n, k]).clamp(min=0)
                    steps.append(1.02 * gap * normal / normal.square().sum().clamp(min=1e-12))
            steps.sort(key=lambda step: float(step.norm()))
            points.append(images[n : n + 1] + steps[-1 if wrong else 0])
        return adversarial_examples(model, images, torch.cat(points).clamp(0, 1).detach(), labels)

    return minimal_step


@caught_by("universal_as_documented")
def _(wrong: bool) -> Callable[..., Any]:
    def universal(model: Model, images: Images, labels: Labels) -> AdversarialExamples:
        """Universal perturbation: one for all images."""
        points = images.clone().requires_grad_()
        (slopes,) = torch.autograd.grad(F.cross_entropy(model(points), labels), points)
        step = 0.02 * (slopes if wrong else slopes.sum(0, keepdim=True)).sign()
        return adversarial_examples(model, images, (images + step).clamp(0, 1), labels)

    return universal


@caught_by("best_restart_is_returned")
def _(wrong: bool) -> Callable[..., Any]:
    def restarted(
        model: Model,
        images: Images,
        labels: Labels,
        *,
        eps: Annotated[float, Field(gt=0, le=1, description="radius")] = 8 / 255,
        restarts: Annotated[int, Field(ge=1, le=9, description="random starts")] = 1,
        seed: Seed = None,
    ) -> AdversarialExamples:
        """The best of several random points."""
        draw, best, highest = torch.Generator().manual_seed(seed or 0), images, torch.full((), -torch.inf)
        for _ in range(restarts):
            points = project(random_point(images, eps, "linf", draw), images, eps, "linf")
            with torch.no_grad():
                losses = F.cross_entropy(model(points), labels, reduction="none")
            better = torch.ones_like(losses, dtype=torch.bool) if wrong else losses > highest
            best = torch.where(better[:, None, None, None], points, best)
            highest = torch.where(better, losses, highest)
        return adversarial_examples(model, images, best, labels)

    return restarted


# --- data sets -------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False, kw_only=True)
class Listed(Result):
    """The images ``indices`` of a data set, with their ``distances``."""

    indices: Tensor
    distances: Tensor

    def panels(self) -> list[list[Panel]]:
        return []


@caught_by("leaves_the_image_out_as_documented")
def _(wrong: bool) -> Callable[..., Any]:
    def nearest(model: Model, images: Images, dataset: Dataset) -> Listed:
        """The nearest of the other images of the data set."""
        features = embedding(model, dataset).features
        distances = torch.cdist(model.embed(images).detach(), features)
        if not wrong:
            distances[distances < 1e-3] = torch.inf
        values, indices = distances.sort(1)
        return Listed(indices=indices[:, :2], distances=values[:, :2])

    return nearest


@caught_by("lists_as_many_images_with_ties")
def _(wrong: bool) -> Callable[..., Any]:
    def largest(model: Model, dataset: Dataset) -> Listed:
        """The three images of the largest features."""
        values, indices = embedding(model, dataset).features.norm(dim=1).sort(descending=True)
        count = max(1, int((values > values[3]).sum())) if wrong else 3
        return Listed(indices=indices[:count], distances=values[:count])

    return largest


@dataclass(frozen=True, eq=False, kw_only=True)
class Table(Result):
    """Numbers of ``classes`` or of channels, of which some may be empty."""

    classes: tuple[str, ...] = ()
    means: Tensor
    std: Tensor
    counts: Tensor

    def panels(self) -> list[list[Panel]]:
        return []


NO_NUMBERS = torch.zeros(0)


@caught_by("means_of_classes_are_separate")
def _(wrong: bool) -> Callable[..., Any]:
    def class_means(model: Model, dataset: Dataset) -> Table:
        """The mean features of each class."""
        features, labels = embedding(model, dataset).features, dataset.labels(range(len(dataset)))
        if labels is None:
            raise InputError("the data set has no classes")
        classes = tuple(sorted({*labels}))
        rows = [features[[label == name for label in labels]] for name in classes]
        means = [row.sum(0) / (len(features) if wrong else len(row)) for row in rows]
        return Table(classes=classes, means=torch.stack(means), std=NO_NUMBERS, counts=NO_NUMBERS)

    return class_means


@caught_by("deviations_are_those_of_the_maps")
def _(wrong: bool) -> Callable[..., Any]:
    def deviation(
        model: Model,
        dataset: Dataset,
        *,
        layer: Annotated[LayerName | None, Field(description="default: the last layer with maps")] = None,
    ) -> Table:
        """The standard deviation of each channel over all images and positions."""
        name = layer or model.last_map
        batches = dataset.batches(batch_size(model))
        images = torch.cat([batch.images for batch in batches]).to(model.device, model.dtype)
        maps = model.maps(model.features(images, name), images, name).detach()
        squares = (maps - maps.mean((0, 2, 3), keepdim=True)).square().sum((0, 2, 3))
        count = len(maps) if wrong else maps[:, 0].numel()
        return Table(means=NO_NUMBERS, std=(squares / count).sqrt(), counts=NO_NUMBERS)

    return deviation


@caught_by("rows_are_true_classes_as_documented")
def _(wrong: bool) -> Callable[..., Any]:
    def predictions_by_class(model: Model, dataset: Dataset) -> Table:
        """Numbers of predictions: a row for each true class, a column for each predicted one."""
        counts = torch.zeros(model.class_count, model.class_count)
        for batch in dataset.batches(batch_size(model)):
            predicted = model(batch.images.to(model.device, model.dtype)).argmax(1)
            if batch.labels is None:
                raise InputError("the data set has no classes")
            for label, column in zip(batch.labels, predicted.tolist(), strict=True):
                counts[model.class_index(label), column] += 1
        names = tuple(map(model.class_name, range(model.class_count)))
        return Table(classes=names, counts=counts.T if wrong else counts, means=NO_NUMBERS, std=NO_NUMBERS)

    return predictions_by_class


@caught_by("means_of_a_constant_score_are_constant")
def _(wrong: bool) -> Callable[..., Any]:
    def masked_score(model: Model, images: Images, target: Target = None) -> Attribution:
        """The mean score of the images in which a pixel is visible."""
        draw = torch.Generator().manual_seed(0)
        masks = (torch.rand(12, 1, *images.shape[2:], generator=draw) < 0.5).to(images)
        with torch.no_grad():
            values = torch.stack([target.score(model(images * mask)) for mask in masks])
        sums = torch.einsum("kn,khw->nhw", values, masks[:, 0])
        maps = sums / (12 if wrong else masks[:, 0].sum(0).clamp(min=1))
        return attribution(model, images, maps, target)

    return masked_score


# --- parameters ------------------------------------------------------------------------------------------


@caught_by("parameters_matter")
def _(wrong: bool) -> Callable[..., Any]:
    def smoothed(
        model: Model,
        images: Images,
        target: Target = None,
        *,
        smooth: Annotated[float, Field(ge=0, le=9, description="sigma of the blur in pixels")] = 2.0,
    ) -> Attribution:
        """The blurred gradient."""
        sigma = (2.0 if smooth else 0.0) if wrong else smooth
        maps = gaussian_blur(gradient(model, images, target), sigma).abs().amax(1)
        return attribution(model, images, maps, target)

    return smoothed


@pytest.mark.parametrize("check", MAKERS)
def test_wrong_method_fails_the_check(check: str) -> None:
    failed = outcome(check, wrong=True)
    assert failed.verdict == "failed", str(failed)


@pytest.mark.parametrize("check", MAKERS)
def test_right_counterpart_passes_the_check(check: str) -> None:
    passed = outcome(check, wrong=False)
    assert passed.verdict == "passed", str(passed)
