"""The second opinion and the relations of families: each refuses a wrong method and passes a right one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import pytest
import torch
import torch.nn.functional as F
from defects import Maker, Makers, assert_defect_is_refused, outcome
from outside_shared import paper
from pydantic import Field
from torch import Tensor
from wrong_methods import attribution

from phosphene import TensorDataset, input_gradient, layer_gradients, method, methods, scores
from phosphene.attacks import build_result, predict_logits, project
from phosphene.images import enlarge_maps
from phosphene.results import (
    AdversarialExamples,
    Attribution,
    Embedding,
    Neighbors,
    Panel,
    Result,
    Synthesis,
)
from phosphene.roles import Dataset, Images, Labels, LayerName, Model, Seed, Target
from phosphene.testing import check_method
from phosphene.testing.techniques import first_party_twins

SELVARAJU = paper("s", "Grad-CAM", "Selvaraju", 2017, "http://arxiv.org/pdf/1610.02391v4.pdf")
SUNDARARAJAN = paper("s", "Axiomatic Attribution for Deep Networks", "-", 2017, "https://example.org")
DONG = paper("d", "Boosting", "Dong", 2018, "https://doi.org/10.48550/arXiv.1710.06081")
KURAKIN = paper("k", "Adversarial examples in the physical world", "-", 2017, "https://example.org")
CHEFER = paper("c", "Generic Attention-model Explainability", "-", 2021, "https://arxiv.org/abs/2103.15679")
ABNAR = paper("a", "Quantifying Attention Flow in Transformers", "-", 2020, "https://example.org")
PEARSON = paper("p", "On lines and planes of closest fit to systems of points in space", "-", 1901, "-")

MAKERS = Makers(needs=["gradients"])
caught_by = MAKERS.caught_by


# --- the second opinion ------------------------------------------------------------------------------------


def _rectified_cam(maps: Tensor, gradients: Tensor, wrong: bool) -> Tensor:
    weighted = gradients.mean((2, 3), keepdim=True) * maps
    return weighted.relu().sum(1) if wrong else weighted.sum(1).relu()


@caught_by("second_opinion", references=SELVARAJU)
def named_layer(wrong: bool) -> Callable[..., Any]:
    def gradcam(
        model: Model, images: Images, target: Target = None, *, target_layer: LayerName | None = None
    ) -> Attribution:
        """Maps of a layer, weighted by their mean gradients."""
        ((maps, gradients),) = layer_gradients(model, images, target, target_layer or model.last_map)
        return attribution(model, images, _rectified_cam(maps, gradients, wrong), target)

    return gradcam


@caught_by("second_opinion", references=SELVARAJU)
def enlarged_and_scaled(wrong: bool) -> Callable[..., Any]:
    def pixel_map(model: Model, images: Images, target: Target = None) -> Attribution:
        """Grad-CAM at the image's size, from 0 to 1."""
        ((maps, gradients),) = layer_gradients(model, images, target, model.last_map)
        large = enlarge_maps(_rectified_cam(maps, gradients, wrong), images.shape[2:])
        return attribution(model, images, large / large.amax((1, 2), keepdim=True).clamp(min=1e-12), target)

    return pixel_map


@caught_by("second_opinion", references=SELVARAJU)
def of_the_last_convolution(wrong: bool) -> Callable[..., Any]:
    def grad_cam(model: Model, images: Images, target: Target = None) -> Attribution:
        """Grad-CAM: class activation map of the first layer, whose name the method chooses."""
        ((maps, gradients),) = layer_gradients(model, images, target, next(iter(model.structure.stages)))
        return attribution(model, images, _rectified_cam(maps, gradients, wrong), target)

    return grad_cam


@caught_by("second_opinion", references=SUNDARARAJAN)
def trapezoid_rule(wrong: bool) -> Callable[..., Any]:
    def path(
        model: Model,
        images: Images,
        target: Target = None,
        *,
        n_steps: Annotated[int, Field(ge=2, le=512, description="intervals")] = 8,
        reference: Annotated[float, Field(ge=0, le=1, description="value of the start")] = 0.5,
    ) -> Attribution:
        """Integrated gradients by the trapezoid rule, summed over the colors."""
        target = target.resolve(model, images)
        total = torch.zeros_like(images)
        for step in range(n_steps + 1):
            at = reference + step / n_steps * (images - reference)
            weight = 0.5 if step in (0, n_steps) else 1.0
            total += weight / n_steps * input_gradient(model, at, target)
        return attribution(model, images, ((images - (0 if wrong else reference)) * total).sum(1), target)

    return path


def _momentum_attack(norm: Callable[[Tensor], Tensor], momentum: bool) -> Callable[..., Any]:
    def attack(
        model: Model, images: Images, labels: Labels, eps: float, steps: int, decay: float
    ) -> AdversarialExamples:
        before, x, g = predict_logits(model, images), images, torch.zeros_like(images)
        for _ in range(steps):
            point = x.detach().requires_grad_()
            loss = F.cross_entropy(model(point), labels)
            (slope,) = torch.autograd.grad(loss, point)
            g = decay * g + slope / norm(slope) if momentum else slope
            x = project(x + eps / steps * g.sign(), images, eps, "linf")
        return build_result(model, images, x, labels, before, targeted=False)

    return attack


Eps = Annotated[float, Field(gt=0, le=1, description="radius")]
Steps = Annotated[int, Field(ge=1, le=100, description="steps")]


@caught_by("second_opinion", references=DONG)
def momentum(wrong: bool) -> Callable[..., Any]:
    def norm(slope: Tensor) -> Tensor:
        return slope.flatten(1).norm(2 if wrong else 1, dim=1)[:, None, None, None].clamp(min=1e-30)

    attack = _momentum_attack(norm, True)

    def strong(
        model: Model,
        images: Images,
        labels: Labels,
        *,
        epsilon: Eps = 0.03,
        iterations: Steps = 5,
        mu: Annotated[float, Field(ge=0, le=2, description="decay of the momentum")] = 1.0,
    ) -> AdversarialExamples:
        """Momentum iterative method (MI-FGSM), sign steps of eps / iterations, L1-normalized gradients."""
        result: AdversarialExamples = attack(model, images, labels, epsilon, iterations, mu)
        return result

    return strong


@caught_by("second_opinion", references=PEARSON)
def components(wrong: bool) -> Callable[..., Any]:
    def plane(model: Model, dataset: Dataset) -> Embedding:
        """PCA: coordinates of the images on the first two principal components."""
        read = methods["embed"](model, dataset)
        centered = read.features.double() - read.features.double().mean(0)
        u, s, _ = torch.linalg.svd(centered, full_matrices=False)
        points = (u * s.sqrt() if wrong else -u * s)[:, :2].to(read.features)
        return Embedding(
            ids=read.ids, features=read.features, thumbnails=read.thumbnails, points=points, axes=("1", "2")
        )

    return plane


# --- relations of families ---------------------------------------------------------------------------------


@caught_by("path_sums_differ_as_the_scores")
def several_baselines(wrong: bool) -> Callable[..., Any]:
    def several(
        model: Model,
        images: Images,
        target: Target = None,
        *,
        steps: Annotated[int, Field(ge=1, le=256, description="points of each integral")] = 8,
    ) -> Attribution:
        """Integrated gradients, averaged over a black, a dark and a bright baseline."""
        target = target.resolve(model, images)
        starts, paths = (0.0, 0.3, 0.9), []
        for start in starts:
            points = [start + (k + 0.5) / steps * (images - start) for k in range(steps)]
            paths.append(torch.stack([input_gradient(model, at, target) for at in points]).mean(0))
        if wrong:
            maps = (images - sum(starts) / 3) * torch.stack(paths).mean(0)
        else:
            pairs = zip(starts, paths, strict=True)
            maps = torch.stack([(images - start) * path for start, path in pairs]).mean(0)
        return attribution(model, images, maps.sum(1), target)

    return several


@caught_by("sums_to_the_score_as_documented")
def full_gradient(wrong: bool) -> Callable[..., Any]:
    def full(model: Model, images: Images, target: Target = None) -> Attribution:
        """Full gradient: input times gradient and the biases' share; the maps sum to the score."""
        target = target.resolve(model, images)
        maps = (images * input_gradient(model, images, target)).sum(1)
        with torch.no_grad():
            rest = scores(model, images, target) - maps.sum((1, 2))
        share = rest[:, None, None] / maps[0].numel()
        return attribution(model, images, maps if wrong else maps + share, target)

    return full


@caught_by("rectifies_the_sum_as_documented")
def rectified_sum(wrong: bool) -> Callable[..., Any]:
    def evidence(model: Model, images: Images, target: Target = None) -> Attribution:
        """Evidence of the last maps, M = ReLU( sum_k a_k A^k ) with the mean gradients a_k."""
        ((maps, gradients),) = layer_gradients(model, images, target, model.last_map)
        return attribution(model, images, _rectified_cam(maps, gradients, wrong), target)

    return evidence


@caught_by("nearest_neighbor_is_the_twin")
def similar(wrong: bool) -> Callable[..., Any]:
    def alike(
        model: Model,
        images: Images,
        dataset: Dataset,
        *,
        k: Annotated[int, Field(ge=1, le=5, description="number of images")] = 2,
    ) -> Neighbors:
        """The most similar images of a data set, by the cosine of their features."""
        table = F.normalize(methods["embed"](model, dataset).features, dim=1)
        queries = TensorDataset(images.cpu())
        similarity = F.normalize(methods["embed"](model, queries).features, dim=1) @ table.T
        values, indices = similarity.sort(dim=1, descending=not wrong)
        ids = tuple(tuple(dataset.id(i) for i in row) for row in indices[:, :k].tolist())
        return Neighbors(images=images, ids=ids, indices=indices[:, :k], distances=1 - values[:, :k])

    return alike


@dataclass(frozen=True, eq=False, kw_only=True)
class Spreads(Result):
    """The variance of each feature."""

    variance: Tensor

    def panels(self) -> list[list[Panel]]:
        return [[Panel(self.variance[None, None].expand(3, 4, -1))]]


@caught_by("variances_are_divided_as_documented")
def feature_variance(wrong: bool) -> Callable[..., Any]:
    def unbiased(model: Model, dataset: Dataset) -> Spreads:
        """Variance of each feature over a data set: sum_i (phi_i - mean)^2 / (N - 1)."""
        features = methods["embed"](model, dataset).features
        return Spreads(variance=features.var(0, correction=0 if wrong else 1))

    return unbiased


@caught_by("variances_are_divided_as_documented")
def feature_variance_of_all(wrong: bool) -> Callable[..., Any]:
    def population(model: Model, dataset: Dataset) -> Spreads:
        """Population variance of each feature over a data set."""
        features = methods["embed"](model, dataset).features
        return Spreads(variance=features.var(0, correction=1 if wrong else 0))

    return population


@caught_by("sample_variances_are_unbiased_as_documented")
def gradient_variance(wrong: bool) -> Callable[..., Any]:
    def vargrad(
        model: Model,
        images: Images,
        target: Target = None,
        *,
        samples: Annotated[int, Field(ge=2, le=1000, description="noisy copies")] = 4,
        seed: Seed = None,
    ) -> Attribution:
        """Variance of the gradients of noisy copies, M = sum_k (g_k - mean g)^2 / (n - 1)."""
        target = target.resolve(model, images)
        draw, slopes = torch.Generator().manual_seed(seed or 0), []
        for _ in range(samples):
            noise = 0.1 * torch.randn(images.shape, generator=draw).to(images)
            slopes.append(input_gradient(model, images + noise, target))
        variance = torch.stack(slopes).var(0, correction=0 if wrong else 1)
        return attribution(model, images, variance.sum(1), target)

    return vargrad


@dataclass(frozen=True, eq=False, kw_only=True)
class Plane(Result):
    """Coordinates and shares of the variance."""

    points: Tensor
    explained: Tensor

    def panels(self) -> list[list[Panel]]:
        return [[Panel(self.points.T[None].expand(3, -1, -1))]]


@caught_by("explained_variances_are_those_of_the_coordinates")
def explained_variance(wrong: bool) -> Callable[..., Any]:
    def shares(model: Model, dataset: Dataset) -> Plane:
        """Axes of largest spread, with the explained variance of each as a share of the whole."""
        features = methods["embed"](model, dataset).features.double()
        u, s, _ = torch.linalg.svd(features - features.mean(0), full_matrices=False)
        power = s if wrong else s.square()
        return Plane(points=(u * s)[:, :3], explained=(power / power.sum())[:3])

    return shares


@caught_by("larger_stabilizers_absorb_more")
def stabilized(wrong: bool) -> Callable[..., Any]:
    def relevance(
        model: Model,
        images: Images,
        target: Target = None,
        *,
        epsilon: Annotated[float, Field(ge=0, le=1, description="stabilizer that absorbs relevance")] = 1e-6,
    ) -> Attribution:
        """Relevance of the input, R = x dS/dx S / (S + epsilon sign(S))."""
        target = target.resolve(model, images)
        maps = (images * input_gradient(model, images, target)).sum(1)
        with torch.no_grad():
            score = scores(model, images, target)
        factor = score / (score + (-1 if wrong else 1) * epsilon * score.sign())
        return attribution(model, images, factor[:, None, None] * maps, target)

    return relevance


@caught_by("larger_confidence_leads_by_more")
def confident(wrong: bool) -> Callable[..., Any]:
    def margin_descent(
        model: Model,
        images: Images,
        labels: Labels,
        *,
        kappa: Annotated[float, Field(ge=0, le=50, description="lead of another class")] = 0.0,
        steps: Steps = 60,
    ) -> AdversarialExamples:
        """Descent of ||d||^2 + 5 max(z_y - max_j z_j, -kappa)."""
        before, x = predict_logits(model, images), images
        for _ in range(steps):
            point = x.detach().requires_grad_()
            logits = model(point)
            own = F.one_hot(labels, logits.shape[1]).bool()
            lead = logits.masked_fill(~own, 0).sum(1) - logits.masked_fill(own, -1e9).amax(1)
            loss = (point - images).square().sum() + 5 * lead.clamp(min=kappa if wrong else -kappa).sum()
            x = (x - 0.01 * torch.autograd.grad(loss, point)[0]).clamp(0, 1)
        return build_result(model, images, x, labels, before, targeted=False)

    return margin_descent


@dataclass(frozen=True, eq=False, kw_only=True)
class Entropies(Result):
    """A number for each image."""

    images: Tensor
    entropy: Tensor

    def panels(self) -> list[list[Panel]]:
        return [[Panel(image)] for image in self.images]


@caught_by("entropies_have_the_documented_unit")
def entropy_in_bits(wrong: bool) -> Callable[..., Any]:
    def uncertainty(model: Model, images: Images) -> Entropies:
        """Entropy of the predicted probabilities, in bits."""
        with torch.no_grad():
            entropy = torch.special.entr(model(images).softmax(1)).sum(1)
        return Entropies(images=images, entropy=entropy / (1 if wrong else torch.tensor(2.0).log()))

    return uncertainty


@caught_by("large_batches_equal_their_parts")
def four_at_a_time(wrong: bool) -> Callable[..., Any]:
    def chunked(model: Model, images: Images, target: Target = None) -> Attribution:
        """Squared gradient, four images at a time."""
        target, maps = target.resolve(model, images), []
        for start in range(0, len(images), 4):
            part = images[start : start + 4]
            rows = range(len(part)) if wrong else range(start, start + len(part))
            maps.append(input_gradient(model, part, target.select(list(rows))).square().sum(1))
        return attribution(model, images, torch.cat(maps), target)

    return chunked


@caught_by("half_precision")
def shares(wrong: bool) -> Callable[..., Any]:
    def gradient_shares(model: Model, images: Images, target: Target = None) -> Attribution:
        """Absolute gradients, divided by their sum."""
        strength = input_gradient(model, images, target).abs().sum(1)
        total = strength.sum((1, 2), keepdim=True)
        least = 1e-8 if wrong else torch.finfo(strength.dtype).tiny
        return attribution(model, images, strength / (total + least), target)

    return gradient_shares


@caught_by("masks_are_shifted_as_documented")
def shifted_masks(wrong: bool) -> Callable[..., Any]:
    def mean_masks(model: Model, images: Images, target: Target = None, *, seed: Seed = None) -> Attribution:
        """Mean of eight masks of random cells, shifted by up to a cell, times the masked image's score."""
        target, draw = target.resolve(model, images), torch.Generator().manual_seed(seed or 0)
        maps, (height, width), cells = torch.zeros_like(images[:, 0]), images.shape[2:], 4
        step = -(-max(height, width) // cells)
        for _ in range(8):
            grid = (torch.rand(1, 1, cells + 1, cells + 1, generator=draw) < 0.5).float()
            mask = F.interpolate(grid, scale_factor=step, mode="bilinear")[0, 0]
            top, left = (0, 0) if wrong else torch.randint(0, step, (2,), generator=draw).tolist()
            mask = mask[top : top + height, left : left + width].to(images)
            with torch.no_grad():
                maps = maps + scores(model, images * mask, target)[:, None, None] * mask / 8
        return attribution(model, images, maps, target)

    return mean_masks


# --- tests -------------------------------------------------------------------------------------------------


@caught_by("second_opinion", references=SELVARAJU)
def neutral_power(wrong: bool) -> Callable[..., Any]:
    def sharp(
        model: Model,
        images: Images,
        target: Target = None,
        *,
        sharpness: Annotated[float, Field(gt=0, le=9, description="exponent of the map")] = 2.0,
    ) -> Attribution:
        """Grad-CAM to a power, of which 1 is neutral."""
        ((maps, gradients),) = layer_gradients(model, images, target, model.last_map)
        return attribution(model, images, _rectified_cam(maps, gradients, wrong) ** sharpness, target)

    return sharp


@caught_by("second_opinion", references=CHEFER)
def words_of_the_name_in_another_order(wrong: bool) -> Callable[..., Any]:
    def relevance_rollout(model: Model, images: Images, target: Target = None) -> Attribution:
        """Relevance rollout: attention that is weighted by its gradient, through all layers."""
        result = methods["attention.gradient_attention"](model, images, target)
        maps = result.maps.square() if wrong else 2 * result.maps
        return attribution(model, images, maps, target)

    return relevance_rollout


@caught_by("second_opinion", references=ABNAR)
def another_parameter_on_each_side(wrong: bool) -> Callable[..., Any]:
    def attention_rollout(
        model: Model,
        images: Images,
        *,
        residual: Annotated[float, Field(ge=0, lt=1, description="weight of the residual connection")] = 0.5,
    ) -> Attribution:
        """Product of the attention of all layers."""
        attention = [layer.detach().mean(1) for layer in model.attention(images).values()]
        product = torch.eye(attention[0].shape[-1]).to(attention[0])
        for layer in attention:
            mixed = (1 - residual) * layer + residual * torch.eye(layer.shape[-1]).to(layer)
            product = product @ mixed if wrong else mixed @ product
        layout = next(iter(model.attention_layers.values())).layout
        count = layout.grid[0] * layout.grid[1]
        maps = product[:, 0, layout.before : layout.before + count].unflatten(1, layout.grid)
        return Attribution(images=images, maps=maps, targets=("first token",) * len(images))

    return attention_rollout


@pytest.mark.parametrize(("check", "make"), MAKERS, ids=MAKERS.ids)
def test_wrong_method_is_refused_and_right_one_passes(check: str, make: Maker) -> None:
    assert_defect_is_refused(check, make)


def test_difference_names_both_methods_its_size_and_how_it_is_declared() -> None:
    text = str(outcome("second_opinion", momentum(True)))
    for part in ("claims.strong and attacks.bim", "% of the pixels", "mu=0.9", "exempt={'second_opinion'"):
        assert part in text, text


def test_declared_difference_is_not_compared() -> None:
    declared = method(
        family="claims",
        needs=["gradients"],
        references=SELVARAJU,
        exempt={"second_opinion": "each channel is rectified, to show all of them"},
    )(named_layer(True).function)
    assert outcome("second_opinion", declared).verdict == "skipped"


def test_variant_is_not_the_technique() -> None:
    def twin(title: str, summary: str, references: Any = SELVARAJU) -> str | None:
        def some_map(model: Model, images: Images, target: Target = None) -> Attribution:
            raise NotImplementedError

        some_map.__doc__ = summary
        declared = method(family="claims", title=title, references=references)(some_map)
        twins = first_party_twins(declared)
        return twins[0].method.spec.name if len(twins) == 1 else None

    assert twin("Grad CAM", "A map.") == twin("Some map", "Grad-CAM of a layer.") == "attribution.grad_cam"
    assert twin("Some map", "A map (Grad-CAM).") == "attribution.grad_cam"
    assert twin("Guided Grad-CAM", "Both maps.") == "attribution.guided_grad_cam"
    assert twin("Grad-CAM", "A map.", PEARSON) is None  # another source
    for title, summary in (
        ("Smooth Grad-CAM", "Grad-CAM of noisy copies."),
        ("Grad-CAM without ReLU", "A map with negative values."),
        ("Some map", "Grad-CAM with the gradients of several layers."),
        ("Grad-CAM", "A signed map."),
        ("Grad-CAM++", "A map."),
        ("Some map", "A map of gradients."),
    ):
        assert twin(title, summary) is None, title


def test_parameter_of_one_side_is_not_guessed() -> None:
    def sharp(
        model: Model,
        images: Images,
        target: Target = None,
        *,
        sharpness: Annotated[float, Field(ge=1.5, le=9, description="exponent of the map")] = 2.0,
    ) -> Attribution:
        """Grad-CAM to a power."""
        ((maps, gradients),) = layer_gradients(model, images, target, model.last_map)
        return attribution(model, images, _rectified_cam(maps, gradients, False) ** sharpness, target)

    single = outcome(
        "second_opinion", method(family="claims", needs=["gradients"], references=SELVARAJU)(sharp)
    )
    assert single.verdict == "skipped" and "sharpness" in single.reason


def test_steps_of_the_documented_length_are_compared() -> None:
    def bim_of_one(
        model: Model, images: Images, labels: Labels, *, eps: Eps = 0.03, steps: Steps = 4
    ) -> AdversarialExamples:
        """BIM: sign steps of eps / steps from the image."""
        result: AdversarialExamples = _momentum_attack(torch.abs, False)(model, images, labels, eps, steps, 0)
        return result

    declared = method(family="claims", needs=["gradients"], references=KURAKIN, title="BIM")(bim_of_one)
    single = outcome("second_opinion", declared)
    assert single.verdict == "passed", str(single)


def test_grid_of_a_parameter_is_neither_transposed_nor_a_layer() -> None:
    def cells(model: Model, images: Images, target: Target = None) -> Attribution:
        """Drop of the score for each cell of a grid of two rows and three columns, black."""
        target, rows = target.resolve(model, images), []
        height, width = images.shape[2:]
        with torch.no_grad():
            before = scores(model, images, target)
            for cell in range(6):
                top, left = cell // 3 * height // 2, cell % 3 * width // 3
                changed = images.clone()
                changed[:, :, top : top + height // 2, left : left + width // 3] = 0
                rows.append(before - scores(model, changed, target))
        return attribution(model, images, torch.stack(rows, 1).view(-1, 2, 3), target)

    checks = ["equivariant", "lies_where_the_units_are_centered"]
    report = check_method(method(family="claims")(cells), profile="quick", only=checks)
    assert report.ok, str(report)


def test_figure_of_a_method_of_one_class_is_drawn_after_enough_steps() -> None:
    def ascent(
        model: Model,
        target: Target,
        *,
        steps: Annotated[int, Field(ge=1, le=1000, description="steps of ascent")] = 60,
        lr: Annotated[float, Field(gt=0, le=10, description="length of a step")] = 0.1,
    ) -> Synthesis:
        """Gradient ascent of one class from an even gray."""
        images, values = torch.full((1, *model.input_size), 0.5).to(model.device, model.dtype), []
        for _ in range(steps):
            point = images.detach().requires_grad_()
            value = scores(model, point, target)
            values.append(value.detach())
            images = (images + lr * torch.autograd.grad(value.sum(), point)[0]).clamp(0, 1)
        return Synthesis(images=images, scores=torch.stack(values), targets=target.names(model, 1))

    declared = method(family="claims", needs=["gradients"], quick={"steps": 2})
    assert outcome("figure_not_blank", declared(ascent)).verdict == "passed"
