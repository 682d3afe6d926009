"""IBP training: a network trained on its own interval bounds, so that they certify its predictions."""

import math
from collections.abc import Sequence
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from phosphene import Reference, TensorDataset, batch_size, hookimpl, method
from phosphene.roles import Dataset, Model, Seed
from phosphene.spec import InvariantTo, PixelRange
from phosphene.testing import linear_model
from phosphene.training import (
    TrainedModel,
    label_reader,
    linear_decay,
    train,
    train_test_split,
    trainable_copy,
)

from ._training_evaluation import HeldOutEvaluation, TrainingOptions, training_cost
from ._training_reference import SHORT_TRAINING, assert_trained_plainly, sample_training
from .interval_bounds import worst_case_margins


def loss_on_a_linear_model_is_that_of_the_exact_margin() -> None:
    """With kappa 0 a linear model's loss is log(1 + exp(-(m - eps |w|_1))), w = w_own - w_other."""
    model = linear_model(bias=[0.1, -0.1])
    linear: Any = model.module[1]  # type: ignore[index]
    generator = torch.Generator().manual_seed(0)
    images = 0.3 + 0.4 * torch.rand(3, 1, 2, 2, generator=generator, dtype=torch.float64)
    weight = linear.weight.detach().clone().requires_grad_()
    difference = weight[1] - weight[0]
    bias = (linear.bias[1] - linear.bias[0]).detach()
    margin = (
        model.normalize(images).flatten(1) @ difference + bias - 0.1 * (difference / model.std).abs().sum()
    )
    options: dict[str, Any] = {"steps": 1, "batch": 1, "lr": 0.01, "held_out": 0.34, "seed": 0}
    dataset = TensorDataset(images, ["1", "1", "0"])
    result = interval_bounds_fit(model, dataset, eps=0.1, kappa=0.0, warm_up=0.0, **options)
    # The order of the two images is that of the seed.
    expected = F.softplus(-margin[torch.randperm(2, generator=torch.Generator().manual_seed(0))[0]])
    torch.testing.assert_close(result.losses[0], expected.detach())
    (gradient,) = torch.autograd.grad(expected, weight)
    # The first step of Adam is the learning rate times the gradient's sign.
    trained = [p.detach() for p in result.network.parameters()]
    torch.testing.assert_close(trained[0], (weight - 0.01 * gradient.sign()).detach(), rtol=0, atol=1e-6)
    # Margins of 0 prove nothing.
    result = interval_bounds_fit(linear_model(torch.zeros(2, 1, 2, 2)), dataset, eps=0.1, **options)
    assert result.curves["clean"][0] == 1 and result.curves["proven"][0] == 0
    # The training is in single precision, which rounds this box away.
    sensitive = linear_model(2.0**30 * torch.eye(2, 4).view(2, 1, 2, 2), mean=[0.0], std=[1.0])
    dataset = TensorDataset(torch.full((3, 1, 2, 2), 0.5), ["1", "1", "0"])
    result = interval_bounds_fit(sensitive, dataset, eps=1e-9, kappa=0.0, warm_up=0.0, **options)
    torch.testing.assert_close(result.losses, torch.tensor([math.log(2)]))


def training_equals_a_plain_loop() -> None:
    """A plain loop on the predicted classes with the bounds of a hidden layer written out."""
    model, dataset = sample_training(nn.Tanh())

    def margins(trained: Model, images: Tensor, labels: Tensor, eps: float) -> Tensor:
        layers: Any = trained.module
        first, last = layers[1], layers[3]
        lower, upper = (((images + end).clamp(0, 1) - 0.4).flatten(1) / 0.5 for end in (-eps, eps))
        center, radius = first((lower + upper) / 2), (upper - lower) / 2 @ first.weight.abs().mT
        lower, upper = (center - radius).tanh(), (center + radius).tanh()
        rows = last.weight[labels][:, None] - last.weight
        middle, half = (lower + upper)[:, None] / 2, (upper - lower)[:, None] / 2
        return (rows * middle - rows.abs() * half).sum(2) + last.bias[labels][:, None] - last.bias

    def loss(trained: Model, images: Tensor, labels: Tensor, progress: float) -> Tensor:
        scale = min(1.0, progress / 0.5)
        k = 1 - scale * (1 - 0.3)
        clean = F.cross_entropy(trained(images), labels, reduction="none")
        worst = -margins(trained, images, labels, scale * 5 / 255)
        return k * clean + (1 - k) * F.cross_entropy(worst, labels, reduction="none")

    labels = model(dataset.images).argmax(1)
    options: dict[str, Any] = {
        "eps": 5 / 255,
        "kappa": 0.3,
        "warm_up": 0.5,
        "labels": "predicted",
        **SHORT_TRAINING,
    }
    result, trained = assert_trained_plainly(
        lambda: interval_bounds_fit(model, dataset, **options), model, dataset, loss,
        torch.optim.Adam, labels=labels,
    )  # fmt: skip
    final = margins(trained, dataset.images[5:], labels[5:], 5 / 255)
    proven = final.scatter(1, labels[5:, None], torch.inf).amin(1) > 0
    torch.testing.assert_close(result.curves["proven"][-1], proven.double().mean())
    assert result.note == "proven within 5/255"
    radii = (2.000001 / 255, 2.5 / 255, 2.125 / 255)
    assert [*map(_format_radius, radii)] == ["2/255", "2.5/255", "0.00833"]


def trains_on_its_bounds() -> None:
    """The exact margin of a linear model, and a plain loop with a hidden layer."""
    loss_on_a_linear_model_is_that_of_the_exact_margin()
    training_equals_a_plain_loop()


@method(
    family="defenses",
    title="Training with interval bounds",
    references=[
        Reference(
            key="gowal2018",
            title="On the Effectiveness of Interval Bound Propagation for Training Verifiably Robust Models",
            authors="Gowal, Dvijotham, Stanforth, Bunel, Qin, Uesato, Arandjelovic, Mann, Kohli",
            year=2018,
            url="https://arxiv.org/abs/1810.12715",
        )
    ],
    invariants=[PixelRange(field="previews")],
    relations=[InvariantTo("logit_shift", fields=("losses",))],
    needs=["gradients", "dataset", "training"],
    # Each step: labels, logits and bounds; each evaluation: bounds.
    cost=training_cost(3, 2, certificate_passes=1),
    batch_independent=False,
    tags=["training", "certificate"],
    oracle=trains_on_its_bounds,
    quick={"steps": 4, "batch": 2, "held_out": 0.2},
    demo={
        "model": "builtin:shapes-certified",
        "dataset": "builtin:scenes/200",
        "eps": 2 / 255,
        "lr": 1e-3,
        "steps": 100,
        "batch": 20,
        "held_out": 0.2,
    },
)
def interval_bounds_fit(
    model: Model,
    dataset: Dataset,
    *,
    eps: Annotated[float, Field(gt=0, le=1, description="linf radius of the box to certify")] = 2 / 255,
    kappa: Annotated[
        float, Field(ge=0, le=1, description="final weight of the clean loss, which starts at 1")
    ] = 0.5,
    warm_up: Annotated[
        float, Field(ge=0, le=1, description="share of the training in which eps grows and kappa falls")
    ] = 0.5,
    training: TrainingOptions = TrainingOptions(steps=2000, batch=64, lr=5e-4),
    seed: Seed = None,
) -> TrainedModel:
    """IBP training: a copy of the model whose interval bounds certify its predictions in an linf ball.

    min_theta E  k CE(z, y) + (1 - k) CE(z^, y),   z^_y = 0,  z^_k = -min_{|d| <= e} (z_y - z_k)  for k != y

    with z^ the worst-case logits by ``interval_bounds``, the last linear layer folded in. During
    ``warm_up`` e grows linearly from 0 to ``eps`` and k falls from 1 to ``kappa``: the bounds of a network
    that was not trained for them are too wide to learn from. Adam starts from the model's weights; the
    network stays in eval mode, so batch-norm statistics do not change. Suited to small, shallow networks: the
    loss of accuracy grows with depth.

    Returns:
        ``model()`` is the trained model. ``losses`` (steps,); ``curves`` has shares of the held-out images:
        "clean" and "under PGD-10" accuracy, and "proven": correct for every image in the box. ``previews``
        are held-out images: clean, attacked before and attacked after the training.

    Raises:
        DivergenceError: the loss or a weight is not finite.
        InputError: the data set has no labels.
        ModelError: an operation without a rule, by name.

    Example::
        from phosphene import run

        result = run("interval_bounds_fit", dataset="builtin:scenes/8", steps=2, batch=2)
        result.curves["proven"].shape  # (3,)

    Source: Gowal et al. 2018, sections 3 and 4.
    """
    read_labels = label_reader(model, dataset, training.labels)
    trained = trainable_copy(model)
    count, test_indices = train_test_split(dataset, training.held_out)
    evaluation = HeldOutEvaluation(model, trained, dataset, test_indices, read_labels, eps=eps)

    def loss(images: Tensor, indices: Sequence[int], progress: float) -> Tensor:
        labels, scale = read_labels(indices), min(1.0, progress / warm_up) if warm_up else 1.0
        clean_loss = F.cross_entropy(trained(images), labels, reduction="none")
        margins = worst_case_margins(trained, images, labels, scale * eps, images.dtype)
        worst_logits = (-margins).scatter(1, labels[:, None], 0.0)
        k = 1 - scale * (1 - kappa)
        return k * clean_loss + (1 - k) * F.cross_entropy(worst_logits, labels, reduction="none")

    def evaluate() -> dict[str, float]:
        with torch.no_grad():
            batches = zip(
                evaluation.images.split(evaluation.max_batch),
                evaluation.labels.split(evaluation.max_batch),
                strict=True,
            )
            proven = torch.cat([(worst_case_margins(trained, x, y, eps) > 0).all(1) for x, y in batches])
        return evaluation() | {"proven": float(proven.cpu().double().mean())}

    optimizer = torch.optim.Adam(trained.module.parameters(), training.lr)
    history = train(
        trained.module, dataset, loss, optimizer, steps=training.steps, batch=training.batch, seed=seed or 0,
        count=count, max_batch=batch_size(model), schedule=linear_decay, evaluate=evaluate,
        checkpoints=training.checkpoints,
    )  # fmt: skip
    name, note = "defenses.interval_bounds_fit", f"proven within {_format_radius(eps)}"
    return TrainedModel.from_training(name, trained, model, history, note=note, **evaluation.previews())


def _format_radius(eps: float) -> str:
    """ "2/255" where the radius is a number of gray levels, else the number."""
    levels = 255 * eps
    return f"{levels:.3g}/255" if math.isclose(levels, round(levels, 2), rel_tol=1e-6) else f"{eps:.3g}"


@hookimpl
def phosphene_methods():
    return [interval_bounds_fit]
