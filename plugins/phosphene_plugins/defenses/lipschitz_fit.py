"""Lipschitz-margin training: layers of spectral norm 1, so that the logit margin certifies an l2 radius."""

import math
from collections.abc import Sequence
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from phosphene import Model as AnyModel
from phosphene import Reference, TensorDataset, batch_size, hookimpl, max_batch, method, to_float64
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

from ._spectral_cases import layers_of_unit_norm, orthogonal_weights
from ._spectral_layers import LayerKind, UnitNormLayers
from ._training_evaluation import HeldOutEvaluation, TrainingOptions, training_cost
from ._training_reference import (
    SHORT_TRAINING,
    assert_last_checkpoint_is_the_result,
    sample_training,
    train_plainly,
)
from .lipschitz import lipschitz_bound

#: Safety factor of the bound in a proof: the layers' norms are 1 only up to rounding.
_ROUNDING = 1 + 1e-4
#: Forward passes for Lipschitz bounds: of the network before training, of unit-norm layers, after training.
_BOUND_PASSES = 3


def loss_on_a_linear_model_is_that_of_the_exact_distance() -> None:
    """A linear model's loss is log(1 + exp(-(m - sqrt(2) L eps) / (L eps))), L = |W|_2 / min std."""
    model, eps = linear_model(bias=[0.1, -0.1], std=[0.5]), 0.2
    linear: Any = model.module[1]  # type: ignore[index]
    weight = linear.weight.detach().clone()
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(3, 1, 2, 2, generator=generator, dtype=torch.float64)
    margin = images.flatten(1) @ (weight[1] - weight[0]) / 0.5 - 0.2
    logit_change = float(torch.linalg.matrix_norm(weight, 2)) / 0.5 * eps
    options: dict[str, Any] = {"steps": 1, "batch": 2, "lr": 0.01, "held_out": 0.34, "seed": 0}
    result = lipschitz_fit(model, TensorDataset(images, ["1", "1", "0"]), eps=eps, **options)
    expected = F.softplus(-(margin[:2] - math.sqrt(2) * logit_change) / logit_change).mean()
    torch.testing.assert_close(result.losses[0], expected)


def training_equals_a_plain_loop() -> None:
    """Two layers over |W v|, v by power iteration before each pass, with the exact norm before each step."""
    model, dataset = sample_training(nn.ReLU())
    first, last = model.module[1], model.module[3]  # type: ignore[index]
    initial = [layer.weight.detach() for layer in (first, last)]
    norms = [float(torch.linalg.matrix_norm(weight, 2)) for weight in initial]
    vectors: list[Tensor] = []
    for weight in initial:
        v = torch.randn(1, weight.shape[1], 1, 1, generator=torch.Generator().manual_seed(0))
        vectors.append((v / v.norm()).flatten().double())
        for _ in range(10):
            vectors[-1] = F.normalize(weight.mT @ (weight @ vectors[-1]), dim=0)
    bias_scales, corrections, steps = (1 / norms[0], 1 / norms[0] / norms[1]), [0.0, 0.0], [-1.0]

    def forward(trained: AnyModel, images: Tensor, weights: list[Tensor]) -> Tensor:
        one, two = trained.module[1], trained.module[3]  # type: ignore[index]
        hidden = trained.normalize(images).flatten(1) @ weights[0].mT + bias_scales[0] * one.bias
        return hidden.relu() @ weights[1].mT + bias_scales[1] * two.bias

    def loss(trained: AnyModel, images: Tensor, labels: Tensor, progress: float) -> Tensor:
        weights = []
        for n, layer in enumerate((trained.module[1], trained.module[3])):  # type: ignore[index]
            weight = layer.weight.detach()
            if progress != steps[-1]:  # the norms are computed exactly before every step
                corrections[n] = torch.linalg.matrix_norm(weight, 2) / (weight @ vectors[n]).norm()
            vectors[n] = F.normalize(weight.mT @ (weight @ vectors[n]), dim=0)
            weights.append(layer.weight / (corrections[n] * (layer.weight @ vectors[n]).norm()))
        steps.append(progress)
        logits, change = forward(trained, images, weights), 0.2 / 0.5
        worst = logits + math.sqrt(2) * change * (1 - F.one_hot(labels, 3))
        return F.cross_entropy(worst / change, labels, reduction="none")

    labels = model(dataset.images).argmax(1)
    trained, losses = train_plainly(model, dataset, loss, torch.optim.Adam, labels=labels)
    with max_batch(2):
        result = lipschitz_fit(model, dataset, eps=0.2, **SHORT_TRAINING | {"labels": "predicted"})
    torch.testing.assert_close(result.losses, losses)
    assert_last_checkpoint_is_the_result(result)
    layers = trained.module[1], trained.module[3]  # type: ignore[index]
    exact = [layer.weight / torch.linalg.matrix_norm(layer.weight, 2) for layer in layers]
    logits = forward(trained, dataset.images, exact)
    torch.testing.assert_close(result.model()(dataset.images), logits)
    assert not any("parametrizations" in name for name in result.network.state_dict())
    assert result.note == f"L = {2 * norms[0] * norms[1]:.3g} -> 2, proven within 0.2 (l2)"
    # Proven are margins of at least sqrt(2) L eps and a little more, for rounding.
    static: dict[str, Any] = SHORT_TRAINING | {"lr": 1e-12, "labels": "predicted"}
    margins = model(dataset.images[5:]).sort(1, descending=True).values.diff(dim=1)[:, 0].neg()
    radii = margins / (norms[0] * norms[1]) / math.sqrt(2) / 2
    for factor, expected in ((1 - 2e-4, 0.5), (1 - 5e-5, 0.0)):
        result = lipschitz_fit(model, dataset, eps=factor * float(radii.detach().amax()), **static)
        assert result.curves["proven"].tolist() == [expected] * 4, (result.curves, radii)


def trains_on_the_exact_distance() -> None:
    """The loss of a linear model in closed form, a plain loop with two layers, and layers of norm 1."""
    loss_on_a_linear_model_is_that_of_the_exact_distance()
    training_equals_a_plain_loop()
    layers_of_unit_norm()
    orthogonal_weights()


@method(
    family="defenses",
    title="Lipschitz-margin training",
    references=[
        Reference(
            key="tsuzuku2018",
            title="Lipschitz-Margin Training: Scalable Certification of Perturbation Invariance",
            authors="Tsuzuku, Sato, Sugiyama",
            year=2018,
            url="https://arxiv.org/abs/1802.04034",
        ),
        Reference(
            key="miyato2018",
            title="Spectral Normalization for Generative Adversarial Networks",
            authors="Miyato, Kataoka, Koyama, Yoshida",
            year=2018,
            url="https://arxiv.org/abs/1802.05957",
        ),
    ],
    invariants=[PixelRange(field="previews")],
    relations=[InvariantTo("logit_shift", fields=("losses",))],
    needs=["gradients", "dataset", "training"],
    # Each step: labels and logits; each evaluation: the logits' margins.
    cost=training_cost(2, 1, certificate_passes=1, setup_passes=_BOUND_PASSES),
    batch_independent=False,
    tags=["training", "certificate"],
    oracle=trains_on_the_exact_distance,
    quick={"steps": 2, "batch": 2, "held_out": 0.2},
    demo={"dataset": "builtin:scenes/64", "eps": 1e-5, "lr": 1e-4, "steps": 24, "batch": 16, "held_out": 0.2},
)
def lipschitz_fit(
    model: Model,
    dataset: Dataset,
    *,
    layers: Annotated[
        LayerKind, Field(description="spectral: weights over their norm; orthogonal: orthogonal weights")
    ] = "spectral",
    eps: Annotated[float, Field(gt=0, le=100, description="l2 radius of the ball to certify")] = 36 / 255,
    training: TrainingOptions = TrainingOptions(steps=2000, batch=64, lr=1e-3),
    seed: Seed = None,
) -> TrainedModel:
    """Lipschitz-margin training: a copy of the model with unit-norm layers, certified in an l2 ball.

    min_theta E  CE(z^ / (L e), y),   z^_y = z_y,  z^_k = z_k + sqrt(2) L e  for k != y,   W -> W / |W|_2

    with L the bound of ``lipschitz`` and z^ the worst-case logits within e = ``eps``. Convolutions, linear
    layers and batch norms are divided by their spectral norms, so L is a constant (1 / min std, times the
    factors of pooling and branches) and a larger margin cannot come from larger weights. Dividing the
    logits by L e prevents vanishing gradients at any depth. With ``layers`` "orthogonal" each weight, as a
    matrix (O, I h w), is orthogonalized first: all its singular values are 1, not the largest alone. Adam
    starts from the model's weights; the network stays in eval mode, so batch-norm statistics do not change.
    With "spectral" a plain chain of layers starts with unchanged predictions; a network with branches does
    not. The result is a plain network of the same architecture.

    Returns:
        ``model()`` is the trained model. ``losses`` (steps,); ``curves`` has shares of the held-out images:
        "clean" and "under PGD-10" (l2) accuracy, and "proven": correct for every image in the ball. ``note``
        names L before and after. ``previews`` are held-out images: clean, attacked before and attacked after
        the training.

    Raises:
        DivergenceError: the loss or a weight is not finite.
        InputError: the data set has no labels.
        ModelError: an operation without a rule or a layer whose weights are all zero, by name.

    Example::
        import torch
        from phosphene import TensorDataset, load_model, run

        network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 2))
        model = load_model(network, input_size=(3, 2, 2))
        dataset = TensorDataset(torch.rand(8, 3, 2, 2), ["0", "1"] * 4)
        result = run("lipschitz_fit", model=model, dataset=dataset, steps=2, batch=2)
        result.curves["proven"].shape  # (3,)

    Source: Tsuzuku et al. 2018, sections 3 and 4; gradients of the norms Miyato et al. 2018.
    """
    read_labels = label_reader(model, dataset, training.labels)
    trained = trainable_copy(model)
    count, test_indices = train_test_split(dataset, training.held_out)
    evaluation = HeldOutEvaluation(model, trained, dataset, test_indices, read_labels, eps=eps, norm="l2")
    unit_layers = UnitNormLayers(trained, evaluation.images, layers)
    logit_change = unit_layers.bound * eps  # L e, the largest l2 change of the logits in the ball

    def loss(images: Tensor, indices: Sequence[int], progress: float) -> Tensor:
        unit_layers.power_iteration()
        labels, logits = read_labels(indices), trained(images)
        worst_logits = logits + math.sqrt(2) * logit_change * (1 - F.one_hot(labels, logits.shape[1]))
        return F.cross_entropy(worst_logits / logit_change, labels, reduction="none")

    def evaluate() -> dict[str, float]:
        unit_layers.calibrate()
        with torch.no_grad():
            batches = evaluation.images.split(evaluation.max_batch)
            logits = to_float64(torch.cat([trained(batch) for batch in batches]))
        own = F.one_hot(evaluation.labels.to(logits.device), logits.shape[1]).bool()
        margin = logits[own] - logits.masked_fill(own, -torch.inf).amax(1)
        proven = margin > math.sqrt(2) * logit_change * _ROUNDING
        return evaluation() | {"proven": float(proven.double().mean())}

    optimizer = torch.optim.Adam(unit_layers.parameters(), training.lr)
    history = train(
        trained.module, dataset, loss, optimizer, steps=training.steps, batch=training.batch, seed=seed or 0,
        count=count, max_batch=batch_size(model), schedule=linear_decay, evaluate=evaluate,
        checkpoints=training.checkpoints, weights=lambda: unit_layers.weights(trained.module),
    )  # fmt: skip
    unit_layers.release()
    final_bound = lipschitz_bound(trained, evaluation.images)
    note = f"L = {unit_layers.initial_bound:.3g} -> {final_bound:.3g}, proven within {eps:.3g} (l2)"
    name = "defenses.lipschitz_fit"
    return TrainedModel.from_training(name, trained, model, history, note=note, **evaluation.previews())


@hookimpl
def phosphene_methods():
    return [lipschitz_fit]
