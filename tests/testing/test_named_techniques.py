"""Checks of what a technique's name implies: each refuses a wrong method and passes a right one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from defects import Maker, Makers, assert_defect_is_refused
from pydantic import Field
from sklearn.neighbors import LocalOutlierFactor
from torch import Tensor, nn
from wrong_methods import attribution

from phosphene import Cost, batch_size, input_gradient, layer_gradients, scores
from phosphene.attacks import build_result, project
from phosphene.results import AdversarialExamples, Attribution, FilterBank, Panel, Result, Synthesis
from phosphene.roles import Dataset, Denoiser, Images, Labels, LayerName, Model, Seed, Target, Texture
from phosphene.spec import param
from phosphene.training import TrainedModel, label_reader, linear_decay, train, trainable_copy

MAKERS = Makers()
caught_by = MAKERS.caught_by


@dataclass(frozen=True, eq=False, kw_only=True)
class NamedNumbers(Result):
    """Numbers of a data set or of images."""

    values: Tensor

    def panels(self) -> list[list[Panel]]:
        return []


def _features(model: Model, images: Tensor) -> Tensor:
    with torch.no_grad():
        return model.embed(images.to(model.device, model.dtype)).double()


def _predicted(model: Model, dataset: Any) -> tuple[Tensor, Tensor]:
    """Probabilities (M, K) and classes (M,)."""
    indices = range(len(dataset))
    with torch.no_grad():
        probabilities = model(dataset.read(indices).to(model.device, model.dtype)).double().softmax(1)
    return probabilities, torch.tensor([model.class_index(name) for name in dataset.labels(indices)])


# --- numbers of features and of predictions ------------------------------------------------------------


@caught_by("equals_the_number_of_its_name")
def outlier_factor(wrong: bool) -> Callable[..., Any]:
    def local_outlier_factor(
        model: Model,
        dataset: Dataset,
        *,
        k: Annotated[int, Field(ge=1, le=50, description="number of neighbors")] = 3,
    ) -> NamedNumbers:
        """Local outlier factor of each image of a data set."""
        vectors = _features(model, dataset.read(range(len(dataset)))).numpy()
        neighbors = min(k, len(vectors) - 1)
        values = -LocalOutlierFactor(neighbors).fit(vectors).negative_outlier_factor_
        return NamedNumbers(values=torch.as_tensor(values).square() if wrong else torch.as_tensor(values))

    return local_outlier_factor


@caught_by("equals_the_number_of_its_name")
def tied_covariance(wrong: bool) -> Callable[..., Any]:
    def class_mahalanobis(model: Model, images: Images, dataset: Dataset) -> NamedNumbers:
        """Class-conditional Mahalanobis distance, squared, with one covariance of all classes."""
        vectors = _features(model, dataset.read(range(len(dataset))))
        classes = torch.tensor([int(c) for c in dataset.labels(range(len(dataset))) or ()])
        means = torch.stack([vectors[classes == c].mean(0) for c in classes.unique()])
        own = means[torch.searchsorted(classes.unique(), classes)]
        centered = vectors - (vectors.mean(0) if wrong else own)
        inverse = torch.linalg.pinv(centered.T @ centered / len(vectors), rtol=1e-10)
        differences = _features(model, images)[:, None] - means
        values = torch.einsum("nkd,de,nke->nk", differences, inverse, differences).amin(1)
        return NamedNumbers(values=values)

    return class_mahalanobis


@caught_by("calibration_error_bounds_the_gap")
def calibration(wrong: bool) -> Callable[..., Any]:
    def expected_calibration_error(model: Model, dataset: Dataset) -> NamedNumbers:
        """Expected calibration error over ten bins of the confidence."""
        probabilities, labels = _predicted(model, dataset)
        confidence, predicted = probabilities.max(1)
        gaps = (predicted == labels).double() - confidence
        bins = (confidence * 10).long()
        sums = torch.stack([gaps[bins == b].sum().abs() / len(gaps) for b in bins.unique()])
        means = torch.stack([gaps[bins == b].mean().abs() for b in bins.unique()])
        return NamedNumbers(values=means.mean() if wrong else sums.sum())

    return expected_calibration_error


@caught_by("equals_the_score_of_its_name")
def balanced(wrong: bool) -> Callable[..., Any]:
    def balanced_accuracy(model: Model, dataset: Dataset) -> NamedNumbers:
        """Balanced accuracy: the mean over the classes of the share of their images that is right."""
        probabilities, labels = _predicted(model, dataset)
        right = (probabilities.argmax(1) == labels).double()
        classes = torch.stack([right[labels == c].mean() for c in labels.unique()])
        return NamedNumbers(values=right.mean() if wrong else classes.mean())

    return balanced_accuracy


@caught_by("shapley_values_of_neighbors_sum_to_a_share")
def neighbor_shapley(wrong: bool) -> Callable[..., Any]:
    def knn_shapley(
        model: Model,
        images: Images,
        dataset: Dataset,
        labels: Labels,
        *,
        k: Annotated[int, Field(ge=1, le=50, description="number of neighbors")] = 3,
    ) -> NamedNumbers:
        """Shapley values of the training images of a k-NN classifier (N, M)."""
        vectors = _features(model, dataset.read(range(len(dataset))))
        classes = torch.tensor([model.class_index(c) for c in dataset.labels(range(len(dataset))) or ()])
        rows = []
        for query, label in zip(_features(model, images), labels.tolist(), strict=True):
            order = (vectors - query).norm(dim=1).argsort()
            agrees = (classes[order] == label).double()
            values = torch.zeros_like(agrees)
            values[-1] = agrees[-1] * min(k, len(agrees)) / (k * len(agrees))
            for i in range(len(agrees) - 1, 0, -1):
                rank = max(i - 1, 1) if wrong else i
                values[i - 1] = values[i] + (agrees[i - 1] - agrees[i]) / k * min(k, rank) / rank
            rows.append(torch.zeros_like(values).index_copy(0, order, values))
        return NamedNumbers(values=torch.stack(rows))

    return knn_shapley


# --- maps of cells ----------------------------------------------------------------------------------------


def _halves(images: Tensor) -> list[Tensor]:
    """The masks of the left and of the right half."""
    left = torch.arange(images.shape[3]) < images.shape[3] // 2
    return [left.to(images).expand_as(images[:1, :1]), (~left).to(images).expand_as(images[:1, :1])]


@caught_by("shapley_values_sum_to_the_change_of_the_score")
def two_players(wrong: bool) -> Callable[..., Any]:
    def shapley_halves(model: Model, images: Images, target: Target = None) -> Attribution:
        """Shapley values of the two halves of the image."""
        target = target.resolve(model, images)
        left, right = _halves(images)
        both, one, other, none = (
            scores(model, images * mask, target) for mask in (left + right, left, right, 0 * left)
        )
        weights = (0.5, 1.0) if wrong else (0.5, 0.5)
        first = weights[0] * (one - none) + weights[1] * (both - other)
        second = weights[0] * (other - none) + weights[1] * (both - one)
        return attribution(model, images, torch.stack([first, second], 1)[:, None], target)

    return shapley_halves


@caught_by("indices_of_an_additive_score_sum_to_one")
def jansen(wrong: bool) -> Callable[..., Any]:
    def sobol_halves(
        model: Model,
        images: Images,
        target: Target = None,
        *,
        samples: Annotated[int, Field(ge=2, le=1024, description="number of random masks")] = 8,
        seed: Seed = None,
    ) -> Attribution:
        """Total Sobol indices of the two halves of the image, by Jansen's estimator."""
        target = target.resolve(model, images)
        draw = torch.Generator().manual_seed(seed or 0)
        base, changed = torch.rand(2, samples, 2, generator=draw).to(images)
        left, right = _halves(images)

        def values(rows: Tensor) -> Tensor:
            return torch.stack([scores(model, images * (a * left + b * right), target) for a, b in rows])

        usual = values(base)
        maps = []
        for cell in range(2):
            replaced = base.clone()
            replaced[:, cell] = changed[:, cell]
            squares = (usual - values(replaced)).square().mean(0)
            maps.append(squares / (1 if wrong else 2) / usual.var(0).clamp(min=1e-12))
        return attribution(model, images, torch.stack(maps, 1)[:, None], target)

    return sobol_halves


@caught_by("rectifies_the_sum_as_documented", needs=["gradients"])
def against_the_target(wrong: bool) -> Callable[..., Any]:
    def counterfactual_cam(
        model: Model, images: Images, target: Target = None, *, layer: LayerName | None = None
    ) -> Attribution:
        """Counterfactual Grad-CAM: the regions that speak against the target.

        M = ReLU( sum_k alpha_k A^k ),  alpha_k = mean_ij -dS / dA^k_ij

        Channels that speak for the target are subtracted before the ReLU.
        """
        ((maps, gradients),) = layer_gradients(model, images, target, layer or model.last_map)
        weights = -gradients.mean((2, 3), keepdim=True)
        return attribution(
            model, images, ((weights.relu() if wrong else weights) * maps).sum(1).relu(), target
        )

    return counterfactual_cam


@caught_by("path_sums_differ_as_the_scores", needs=["gradients", "dataset"])
def mean_before_the_product(wrong: bool) -> Callable[..., Any]:
    def expected_gradients(
        model: Model,
        images: Images,
        dataset: Dataset,
        target: Target = None,
        *,
        samples: Annotated[int, Field(ge=1, le=1000, description="pairs of an image and a position")] = 4,
        seed: Seed = None,
    ) -> Attribution:
        """Expected gradients: integrated gradients averaged over the images of a data set."""
        target = target.resolve(model, images)
        draw = torch.Generator().manual_seed(seed or 0)
        gradients, steps, products = (torch.zeros_like(images) for _ in range(3))
        for _ in range(samples):
            row = int(torch.randint(len(dataset), (1,), generator=draw))
            step = images - dataset.read([row]).to(images)
            position = float(torch.rand(1, generator=draw))
            gradient = input_gradient(model, images - (1 - position) * step, target)
            gradients, steps = gradients + gradient / samples, steps + step / samples
            products = products + gradient * step / samples
        return attribution(model, images, (gradients * steps if wrong else products).sum(1), target)

    return expected_gradients


@caught_by("covers_the_image")
def last_window(wrong: bool) -> Callable[..., Any]:
    def mean_occlusion(
        model: Model,
        images: Images,
        target: Target = None,
        *,
        window: Annotated[int, Field(ge=1, le=64, description="side of the window, in pixels")] = 8,
        stride: Annotated[int, Field(ge=1, le=64, description="distance of two windows, in pixels")] = 8,
    ) -> Attribution:
        """Drop of the score by a gray window. A pixel in no window has 0."""
        target = target.resolve(model, images)
        clean, maps = scores(model, images, target), torch.zeros_like(images[:, 0])
        ends = [max(side - window, 0) + (0 if wrong else 1) for side in images.shape[2:]]
        for y in range(0, ends[0], stride):
            for x in range(0, ends[1], stride):
                occluded = images.clone()
                occluded[:, :, y : y + window, x : x + window] = 0.5
                drop = clean - scores(model, occluded, target)
                maps[:, y : y + window, x : x + window] += drop[:, None, None]
        return attribution(model, images, maps, target)

    return mean_occlusion


# --- random numbers ---------------------------------------------------------------------------------------


@caught_by("random_numbers_are_drawn_anew", needs=["gradients"])
def seeded_in_the_loop(wrong: bool) -> Callable[..., Any]:
    def noisy_gradient(
        model: Model,
        images: Images,
        target: Target = None,
        *,
        samples: Annotated[int, Field(ge=1, le=100, description="number of noisy copies")] = 3,
        seed: Seed = None,
    ) -> Attribution:
        """Mean gradient of noisy copies."""
        draw = torch.Generator()
        maps = torch.zeros_like(images[:, 0])
        for sample in range(samples):
            if wrong or sample == 0:
                draw.manual_seed(seed or 0)
            noise = 0.1 * torch.randn(images[:1].shape, generator=draw).to(images)
            maps = maps + input_gradient(model, images + noise, target).abs().sum(1) / samples
        return attribution(model, images, maps, target)

    return noisy_gradient


@caught_by("probabilities_are_those_of_the_change", needs=["gradients"])
def inverted_chance(wrong: bool) -> Callable[..., Any]:
    def dropped_gradient(
        model: Model,
        images: Images,
        target: Target = None,
        *,
        probability: Annotated[float, Field(ge=0, le=1, description="probability that noise is added")] = 0.5,
        seed: Seed = None,
    ) -> Attribution:
        """Gradient of an image to which noise is added with some probability."""
        draw = torch.Generator().manual_seed(seed or 0)
        chance, noise = torch.rand(1, generator=draw), torch.randn(images[:1].shape, generator=draw)
        added = bool(chance > probability) if wrong else bool(chance < probability)
        moved = images + (0.2 * noise.to(images) if added else 0)
        return attribution(model, images, input_gradient(model, moved, target).sum(1), target)

    return dropped_gradient


@dataclass(frozen=True, eq=False, kw_only=True)
class MovedImages(Result):
    """Images whose pixels were moved."""

    shapes: ClassVar[dict[str, str]] = {"images": "N C H W", "transformed": "N C H W"}
    images: Tensor
    transformed: Tensor

    def panels(self) -> list[list[Panel]]:
        return []


@caught_by("random_moves_are_centered")
def open_upper_end(wrong: bool) -> Callable[..., Any]:
    def deflected(
        images: Images,
        *,
        window: Annotated[int, Field(ge=1, le=9, description="largest distance of the neighbor")] = 3,
        seed: Seed = None,
    ) -> MovedImages:
        """Each pixel is replaced by a random neighbor."""
        draw = torch.Generator().manual_seed(seed or 0)
        height, width = images.shape[2:]
        high = window if wrong else window + 1
        down, right = torch.randint(-window, high, (2, height, width), generator=draw)
        rows = (torch.arange(height)[:, None] + down).clamp(0, height - 1)
        columns = (torch.arange(width) + right).clamp(0, width - 1)
        return MovedImages(images=images, transformed=images[:, :, rows, columns])

    return deflected


# --- attacks, certificates ---------------------------------------------------------------------------------

Eps = Annotated[float, Field(gt=0, le=1, description="radius, pixels in [0, 1]")]


@caught_by("without_its_addition_it_is_the_iterative_method", needs=["gradients"])
def sum_of_the_neighbors(wrong: bool) -> Callable[..., Any]:
    def vmi_fgsm(
        model: Model,
        images: Images,
        labels: Labels,
        *,
        eps: Eps = 0.03,
        step_size: Eps = 0.01,
        steps: Annotated[int, Field(ge=1, le=100, description="number of steps")] = 3,
        samples: Annotated[int, Field(ge=1, le=100, description="number of neighbors")] = 3,
        neighborhood: Annotated[float, Field(gt=0, le=9, description="radius in units of eps")] = 1.5,
        seed: Seed = None,
    ) -> AdversarialExamples:
        """VMI-FGSM: momentum iterative FGSM with the variance of the gradient."""
        draw = torch.Generator().manual_seed(seed or 0)

        def slope(x: Tensor) -> Tensor:
            x = x.detach().clone().requires_grad_()
            (gradient,) = torch.autograd.grad(F.cross_entropy(model(x), labels, reduction="sum"), x)
            return gradient

        with torch.no_grad():
            before = model(images)
        x, momentum, variance = images, 0 * images, 0 * images
        for _ in range(steps):
            gradient = slope(x)
            tuned = gradient + variance
            momentum = momentum + tuned / tuned.abs().mean((1, 2, 3), keepdim=True).clamp(min=1e-12)
            near = 0 * images
            for _ in range(samples):
                shift = 2 * torch.rand(images[:1].shape, generator=draw).to(images) - 1
                near = near + slope((x + neighborhood * eps * shift).clamp(0, 1))
            variance = (near if wrong else near / samples) - gradient
            x = project(x + step_size * momentum.sign(), images, eps, "linf").clamp(0, 1)
        return build_result(model, images, x, labels, before, targeted=False)

    return vmi_fgsm


@caught_by("radii_of_equal_votes_have_the_closed_form")
def one_sided_bound(wrong: bool) -> Callable[..., Any]:
    def certified(
        model: Model,
        images: Images,
        *,
        sigma: Annotated[float, Field(gt=0, le=9, description="standard deviation of the noise")] = 0.25,
        samples: Annotated[int, Field(ge=1, le=1000, description="number of noisy copies")] = 20,
        alpha: Annotated[float, Field(gt=0, lt=0.5, description="probability of an error")] = 0.01,
        seed: Seed = None,
    ) -> CertifiedRadii:
        """Randomized smoothing: certified radius by the one-sided Clopper-Pearson bound."""
        from scipy.stats import beta, norm

        draw = torch.Generator().manual_seed(seed or 0)
        noise = sigma * torch.randn((samples, *images.shape[1:]), generator=draw).to(images)
        radii = []
        for image in images:
            with torch.no_grad():
                classes = torch.cat(
                    [model(part) for part in (image + noise).split(batch_size(model))]
                ).argmax(1)
            count = int(classes.bincount().max())
            low = beta.ppf(alpha / 2 if wrong else alpha, count, samples - count + 1)
            radii.append(max(0.0, sigma * float(norm.ppf(low))))
        return CertifiedRadii(images=images, radii=torch.tensor(radii))

    return certified


@dataclass(frozen=True, eq=False, kw_only=True)
class CertifiedRadii(Result):
    """A certified radius of each image."""

    images: Tensor
    radii: Tensor

    def panels(self) -> list[list[Panel]]:
        return []


# --- filters, channels, noise levels ---------------------------------------------------------------------


@caught_by("captions_have_the_numbers_of_their_filters")
def sorted_filters(wrong: bool) -> Callable[..., Any]:
    def ranked_filters(model: Model) -> FilterBank:
        """Filters of the first convolution, those of the largest norm first."""
        layer = next(n for n, part in model.layers.items() if isinstance(part, nn.Conv2d))
        weights = model.layers[layer].weight.detach().clone()  # type: ignore[operator, union-attr]
        order = weights.flatten(1).norm(dim=1).argsort(descending=True)
        drawn = weights[order].mean(1, keepdim=True).expand(-1, 3, -1, -1)
        low, high = drawn.amin((1, 2, 3), keepdim=True), drawn.amax((1, 2, 3), keepdim=True)
        numbers = range(len(order)) if wrong else order.tolist()
        return FilterBank(
            layer=layer,
            weights=weights[order],
            tiles=(drawn - low) / (high - low).clamp(min=1e-9),
            captions=tuple(f"filter {n}" for n in numbers),
        )

    return ranked_filters


@caught_by("gray_images_stay_gray_as_documented")
def phases_of_each_channel(wrong: bool) -> Callable[..., Any]:
    def random_phase(texture: Texture, *, seed: Seed = None) -> Synthesis:
        """Texture of the sample's spectrum. One field of phases is added to those of all color channels."""
        draw = torch.Generator().manual_seed(seed or 0)
        noise = torch.randn(1, 3 if wrong else 1, *texture.shape[2:], generator=draw).to(texture)
        turned = torch.fft.fft2(texture) * torch.exp(1j * torch.fft.fft2(noise).angle())
        images = torch.fft.ifft2(turned).real.clamp(0, 1)
        empty = images.new_zeros(0, len(images))
        return Synthesis(images=images, scores=empty, targets=("phases",) * len(images), sources=texture)

    return random_phase


@caught_by("noise_has_the_level_of_its_time_step")
def level_squared(wrong: bool) -> Callable[..., Any]:
    def denoised(images: Images, denoiser: Denoiser, *, seed: Seed = None) -> Synthesis:
        """Images to which the noise of a time step is added, and from which it is removed in one step."""
        t = denoiser.time_steps // 3
        signal, level = denoiser.levels(t)
        noise = torch.randn(images[:1].shape, generator=torch.Generator().manual_seed(seed or 0)).to(images)
        x = signal * denoiser.encode(images) + (level**2 if wrong else level) * noise
        clean = denoiser.decode((x - level * denoiser.eps(x, t)) / signal).clamp(0, 1)
        empty = clean.new_zeros(0, len(clean))
        return Synthesis(images=clean, scores=empty, targets=("clean",) * len(clean), sources=images)

    return denoised


# --- trainings -------------------------------------------------------------------------------------------


def _trained(model: Model, dataset: Any, loss: Any, steps: int, batch: int, seed: int | None) -> TrainedModel:
    trained = trainable_copy(model)
    optimizer = torch.optim.SGD(trained.module.parameters(), 1e-4)
    history = train(
        trained.module,
        dataset,
        lambda images, indices, progress: loss(trained, images, indices),
        optimizer,
        steps=steps,
        batch=batch,
        seed=seed or 0,
        max_batch=batch_size(model),
        schedule=linear_decay,
    )
    previews = dataset.read(range(1)).to(model.device, model.dtype)
    return TrainedModel.from_training(
        "claims.trained", trained, model, history, labels=("image",), previews=previews
    )


Count = Annotated[int, Field(ge=1, le=100)]
TRAINING: dict[str, Any] = {
    "needs": ["gradients", "dataset", "training"],
    "tags": ["training"],
    "batch_independent": False,
    "cost": Cost(forward=param.steps * param.batch * 1, backward=param.steps * param.batch),
}


@caught_by("smoothed_labels_have_the_usual_loss", **TRAINING)
def other_classes_only(wrong: bool) -> Callable[..., Any]:
    def smooth_labels(
        model: Model,
        dataset: Dataset,
        *,
        epsilon: Annotated[float, Field(ge=0, lt=1, description="share of the uniform distribution")] = 0.1,
        steps: Count = 2,
        batch: Count = 2,
        seed: Seed = None,
    ) -> TrainedModel:
        """Label smoothing: a model that is fine-tuned on labels mixed with the uniform distribution."""
        read = label_reader(model, dataset)

        def loss(trained: Model, images: Tensor, indices: Any) -> Tensor:
            logits, labels = trained(images), read(indices)
            share = epsilon * logits.shape[1] / (logits.shape[1] - 1) if wrong else epsilon
            return F.cross_entropy(logits, labels, label_smoothing=share, reduction="none")

        return _trained(model, dataset, loss, steps, batch, seed)

    return smooth_labels


@caught_by("smoothed_labels_have_the_usual_loss", **TRAINING)
def other_classes_only_by_amount(wrong: bool) -> Callable[..., Any]:
    """The share has a name of its own, and a parameter before it contains "eps"."""

    def smooth_labels(
        model: Model,
        dataset: Dataset,
        *,
        steps: Count = 2,
        batch: Count = 2,
        amount: Annotated[float, Field(ge=0, le=1, description="share of the uniform distribution")] = 0.1,
        seed: Seed = None,
    ) -> TrainedModel:
        """Label smoothing: a model that is fine-tuned on labels mixed with the uniform distribution."""
        read = label_reader(model, dataset)

        def loss(trained: Model, images: Tensor, indices: Any) -> Tensor:
            logits, labels = trained(images), read(indices)
            share = amount * logits.shape[1] / (logits.shape[1] - 1) if wrong else amount
            return F.cross_entropy(logits, labels, label_smoothing=min(share, 1), reduction="none")

        return _trained(model, dataset, loss, steps, batch, seed)

    return smooth_labels


@caught_by("labels_are_mixed_as_the_images", **TRAINING)
def swapped_shares(wrong: bool) -> Callable[..., Any]:
    def mixup(
        model: Model,
        dataset: Dataset,
        *,
        alpha: Annotated[float, Field(gt=0, le=9, description="both parameters of Beta")] = 0.2,
        steps: Count = 2,
        batch: Count = 2,
        seed: Seed = None,
    ) -> TrainedModel:
        """Mixup: a model that is fine-tuned on mixtures of two images and of their labels."""
        read = label_reader(model, dataset)

        def loss(trained: Model, images: Tensor, indices: Any) -> Tensor:
            labels, share = read(indices), float(torch.distributions.Beta(alpha, alpha).sample())
            others = torch.arange(len(images)).roll(1)
            logits = trained(share * images + (1 - share) * images[others])
            own, other = (F.cross_entropy(logits, y, reduction="none") for y in (labels, labels[others]))
            weight = 1 - share if wrong else share
            return weight * own + (1 - weight) * other

        return _trained(model, dataset, loss, steps, batch, seed)

    return mixup


@pytest.mark.parametrize(("check", "make"), MAKERS, ids=MAKERS.ids)
def test_wrong_method_is_refused_and_right_one_passes(check: str, make: Maker) -> None:
    assert_defect_is_refused(check, make)
