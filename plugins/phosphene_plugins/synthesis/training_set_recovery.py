"""Training-set recovery: inversions of a network's classes, compared with the images it was trained on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from phosphene import (
    Class,
    Fold,
    InputError,
    Reference,
    TensorDataset,
    batch_size,
    hookimpl,
    load_model,
    max_batch,
    method,
    to_float64,
)
from phosphene.data import Batch, Rows, State
from phosphene.images import noise_images, resize
from phosphene.roles import Dataset, Frames, Model, Seed, Target
from phosphene.spec import Cost, InvariantTo, PixelRange, param, size

from ._batch_norm_prior import YIN, BatchNormPrior
from ._recovered_images_result import RecoveredImages
from .deep_inversion import InversionOptions, invert_classes

#: Training images whose similarity is nearer to 1 than this are copies of one image.
COPY = 1e-6


def template_classifier_recovers_its_templates() -> None:
    """A linear classifier whose weights are its training images: similarities after two gradient steps."""
    draw = torch.Generator().manual_seed(0)
    images = torch.rand(6, 3, 4, 4, generator=draw, dtype=torch.float64)
    images[4] = 0.7 * images[1] + 0.3 * images[4]
    mean = images.mean(0)
    linear = nn.Linear(48, 3, bias=False).double()
    linear.weight.data = (images[:3] - mean).flatten(1)
    mean_color = [0.4, 0.5, 0.6]
    model = load_model(
        nn.Sequential(nn.Flatten(), linear), input_size=(3, 4, 4), mean=mean_color, std=[0.2, 0.3, 0.4]
    )
    plain: Any = {"parametrization": "pixels", "optimizer": "sgd", "jitter": 0, "steps": 2, "lr": 0.03}
    plain |= {"total_variation": 0, "start_noise": 0.01}
    result = training_set_recovery(model, Class((1, 2)), TensorDataset(images), **plain, seed=4)
    colors, scale = torch.tensor([mean_color, [0.2, 0.3, 0.4]], dtype=torch.float64)[:, :, None, None]
    start = torch.cat([noise_images((1, 3, 4, 4), seed=n, mean=colors.flatten(), sd=0.01) for n in (4, 5)])
    expected = start
    for _ in range(2):
        probabilities = (((expected - colors) / scale).flatten(1) @ linear.weight.T).softmax(1)
        residual = torch.eye(3, dtype=torch.float64)[1:] - probabilities
        expected = expected + 0.03 * (residual @ linear.weight).view(2, 3, 4, 4) / scale
    torch.testing.assert_close(result.images, expected.clamp(0, 1).detach())

    def similarity(a: Tensor, b: Tensor) -> Tensor:
        x, y = (a - mean).flatten(), (b - mean).flatten()
        return (x * y).sum() / (x.square().sum() * y.square().sum()).sqrt()

    for n, image in enumerate(result.images):
        values = torch.stack([similarity(image, other) for other in images])
        nearest = int(values.argmax())
        assert (int(result.indices[n]), result.ids[n]) == (nearest, str(nearest))
        torch.testing.assert_close(result.recovered[n], values[nearest])
        others = [similarity(images[nearest], images[i]) for i in range(6) if i != nearest]
        torch.testing.assert_close(result.baseline[n], torch.stack(others).max())
    torch.testing.assert_close(result.neighbors, images[result.indices])
    # A copy of each image changes nothing; images of another size are resized.
    with max_batch(11):  # one image is left over
        twice = training_set_recovery(
            model, Class((1, 2)), TensorDataset(images.repeat(2, 1, 1, 1)), **plain, seed=4, frames=1
        )
    torch.testing.assert_close(twice.recovered, result.recovered)
    torch.testing.assert_close(twice.baseline, result.baseline)
    assert twice.frames is not None and len(twice.frames) == 1
    larger = TensorDataset(images.repeat_interleave(2, 2).repeat_interleave(2, 3))
    assert training_set_recovery(model, 1, larger, **plain, seed=4).neighbors.shape == (1, 3, 4, 4)


@method(
    family="synthesis",
    title="Training-set recovery",
    references=[
        Reference(
            key="fredrikson2015",
            title="Model Inversion Attacks that Exploit Confidence Information and Basic Countermeasures",
            authors="Fredrikson, Jha, Ristenpart",
            year=2015,
            url="https://doi.org/10.1145/2810103.2813677",
        ),
        YIN,
    ],
    invariants=[PixelRange()],
    needs=["gradients", "dataset"],
    cost=Cost(forward=size.images * (param.steps + 2), backward=size.images * param.steps),
    batch_independent=False,
    oracle=template_classifier_recovers_its_templates,
    relations=[
        InvariantTo("dataset_order", fields=("recovered", "baseline", "neighbors")),
        InvariantTo("logit_shift", fields=("images",), tolerance=1e-6),
    ],
    quick={"steps": 3},
    demo={
        "model": "builtin:parts-resnet",
        "dataset": "builtin:part-scenes/200",
        "target": ["boat", "fish", "bird", "butterfly", "cat"],
        "statistics": 0.01,
        "steps": 100,
    },
)
def training_set_recovery(
    model: Model,
    target: Target,
    dataset: Dataset,
    *,
    options: InversionOptions = InversionOptions(statistics=0.0),
    frames: Frames = 0,
    seed: Seed = None,
) -> RecoveredImages:
    """Training-set recovery: inversions of classes beside the most similar images of the training set.

    x* = argmin_x CE(f(x), y) + statistics R(x) + total_variation TV(x) + l2 ||x - m||^2

    s(x, t) = <x - a, t - a> / (||x - a|| ||t - a||),  recovered = max_t s(x*, t),
    baseline = max_(t' != t) s(t', t)

    with a the mean image of the ``dataset`` and t the image that attains ``recovered``: a score of 1 is the
    training image up to its contrast, 0 is unrelated. R is the distance from the feature statistics in the
    network's batch norms, see ``deep_inversion``. A network that has memorized a training image returns one
    with a score above the baseline, the similarity of the next training image (copies of t do not count). A
    score below it shows what images of the class have in common, and nothing of a single one; it does not
    prove that no better attack recovers more.

    Returns:
        ``images`` (N, C, H, W) in [0, 1], an inversion of each class of the target; ``neighbors``
        (N, C, H, W), ``indices`` and ``ids``: the most similar training images; ``recovered`` and
        ``baseline`` (N,) in [-1, 1]; ``scores`` (steps, N), the objective at every step.

    Raises:
        ModelError: ``statistics`` of a network without batch norm.
        InputError: a target that is no class; fewer than two training images.

    Example::
        from phosphene import run

        result = run("training_set_recovery", dataset="builtin:scenes/16", target=["star", "ring"], steps=3)
        result.recovered, result.baseline  # (2,), (2,)

    Source:
        Fredrikson et al. 2015, section 5 (the attack); Yin et al. 2020, equation 4 (R) (lecture 21.9).
    """
    if not isinstance(target, Class):
        raise InputError(f'classes are inverted here, and {target} is none: for example target="star"')
    if len(dataset) < 2:
        raise InputError("the score of one training image is compared with another: two images are needed")
    labels = torch.tensor(target.index).reshape(-1)
    prior = BatchNormPrior(model) if options.statistics else None
    inversion, _ = invert_classes(model, labels, options, prior, frames=frames, seed=seed)
    batch = batch_size(model)
    # equivalent mutants: images have four axes
    mean = _MeanImage(inversion.images.shape[-2:]).run(dataset, batch)
    similarities = _Similarities(inversion.images, mean).run(dataset, batch)
    recovered, indices = similarities.max(0)
    neighbors = _resized(dataset.read(indices.tolist()), mean.shape[-2:]).to(inversion.images)
    others = _Similarities(neighbors, mean).run(dataset, batch)
    # equivalent mutants: what has a similarity of 1 is left out below
    others[indices, torch.arange(len(indices))] = -1  # the training image itself
    # equivalent mutants: no similarity is below -1
    others[others > 1 - COPY] = -1  # and its copies, of which a data set may have some
    return RecoveredImages(
        **inversion._asdict(),
        targets=tuple(map(model.class_name, labels.tolist())),
        neighbors=neighbors,
        indices=indices.to(model.device),
        ids=tuple(map(dataset.id, indices.tolist())),
        recovered=recovered.to(inversion.images),
        baseline=others.amax(0).to(inversion.images),
    )


def _resized(images: Tensor, sides: Sequence[int]) -> Tensor:
    """Images of a tensor may have another size than the model's input."""
    height, width = sides
    # equivalent mutants: images have four axes
    return images if images.shape[-2:] == (height, width) else resize(images, (height, width))


@dataclass
class _MeanImage(Fold[Tensor]):
    """The mean (C, H, W) of all images at the size ``sides``, in double precision on the CPU."""

    title = "mean image"
    sides: Sequence[int]

    def start(self) -> State:
        # equivalent mutants: the sum with images in double precision is in double precision
        return {"sum": torch.zeros((), dtype=torch.float64), "count": 0}

    def update(self, state: State, batch: Batch) -> State:
        total = _resized(batch.images.cpu().double(), self.sides).sum(0)
        return {"sum": state["sum"] + total, "count": state["count"] + len(batch.images)}

    def finish(self, state: State) -> Tensor:
        mean: Tensor = state["sum"] / state["count"]
        return mean


@dataclass
class _Similarities(Fold[Tensor]):
    """Cosines (M, N) of the deviations of all images and of ``images`` (N, C, H, W) from the mean image."""

    title = "similarities"
    images: Tensor
    mean: Tensor

    def start(self) -> State:
        return {"cosines": Rows()}

    def update(self, state: State, batch: Batch) -> State:
        images = _resized(batch.images, self.mean.shape[-2:])
        first, second = map(self._deviations, (images, self.images))
        state["cosines"].write(batch.indices[0], first @ second.T)
        return state

    def _deviations(self, images: Tensor) -> Tensor:
        """Unit vectors (n, CHW) of images minus the mean image; zero for the mean image itself."""
        vectors = (to_float64(images).cpu() - self.mean).flatten(1)
        return vectors / vectors.norm(dim=1, keepdim=True).clamp(min=1e-12)

    def finish(self, state: State) -> Tensor:
        cosines: Tensor = state["cosines"].tensor()
        return cosines


@hookimpl
def phosphene_methods():
    return [training_set_recovery]
