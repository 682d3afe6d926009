"""Smooth activations: every ReLU replaced by a smooth function, as a start for adversarial training."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from phosphene import Model as AnyModel
from phosphene import (
    ModelError,
    Reference,
    TensorDataset,
    batch_size,
    hookimpl,
    load_model,
    method,
    rewrite_backward,
)
from phosphene.roles import Dataset, Model, Seed
from phosphene.spec import InvariantTo, PixelRange
from phosphene.training import (
    TrainedModel,
    label_reader,
    linear_decay,
    train,
    train_test_split,
    trainable_copy,
)

from ._training_evaluation import EvaluationRadius, HeldOutEvaluation, TrainingOptions, training_cost
from ._training_reference import SHORT_TRAINING, assert_trained_plainly, sample_training

Activation = Literal["softplus", "silu", "gelu", "elu"]
#: The activations at sharpness 1. With sharpness b, s(b x) / b approaches max(x, 0) as b grows.
ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "softplus": F.softplus,
    "silu": F.silu,
    "gelu": F.gelu,
    "elu": F.elu,
}


class SmoothActivation(nn.Module):
    """s(b x) / b of an activation s and a sharpness b."""

    def __init__(self, activation: Activation, sharpness: float) -> None:
        super().__init__()
        self.activation, self.sharpness = activation, sharpness

    def extra_repr(self) -> str:
        return f"{self.activation}, sharpness={self.sharpness:g}"

    def forward(self, x: Tensor) -> Tensor:
        return ACTIVATIONS[self.activation](self.sharpness * x) / self.sharpness


def replace_relus(network: nn.Module, activation: Activation, sharpness: float) -> nn.Module:
    """The network with every ``nn.ReLU`` in it replaced, in place."""
    if isinstance(network, nn.ReLU):
        return SmoothActivation(activation, sharpness)
    for name, part in network.named_children():
        setattr(network, name, replace_relus(part, activation, sharpness))
    return network


def count_relus(model: AnyModel, image: Tensor) -> int:
    """The number of ReLUs and ReLU6s that run in a pass, modules and functions."""
    with (
        torch.enable_grad(),
        suppress(ModelError),
        rewrite_backward(lambda gradient, gate: gradient) as rewritten,
    ):
        model(image.requires_grad_())
    return rewritten.count


def activations_approach_relu_with_the_sharpness() -> None:
    """Each activation differs from ReLU by at most c / b, and its slope at zero is s'(0)."""
    x = torch.linspace(-5, 5, 2001, dtype=torch.float64)
    distances = {"softplus": 0.6932, "silu": 0.2785, "gelu": 0.17, "elu": 1.0}
    slopes = {"softplus": 0.5, "silu": 0.5, "gelu": 0.5, "elu": 1.0}
    for name in ACTIVATIONS:
        for sharpness in (1.0, 8.0):
            zero = torch.zeros(1, dtype=torch.float64, requires_grad=True)
            smooth = SmoothActivation(name, sharpness)
            largest = float((smooth(x) - x.relu()).abs().max())
            assert 0.9 * distances[name] <= largest * sharpness <= distances[name], (name, largest)
            (gradient,) = torch.autograd.grad(smooth(zero).sum(), zero)
            assert abs(float(gradient) - slopes[name]) < 1e-9, name
    torch.manual_seed(0)
    first, last = nn.Linear(12, 4).double(), nn.Linear(4, 2).double()
    network = nn.Sequential(nn.Flatten(), nn.Sequential(first, nn.ReLU()), last)
    model = load_model(network, input_size=(3, 2, 2), mean=[0.375, 0.5, 0.625], std=[0.25, 0.5, 0.75])
    images = torch.rand(4, 3, 2, 2)
    # So small a learning rate leaves the weights as they are.
    options: dict[str, Any] = {"steps": 1, "batch": 2, "held_out": 0.25, "lr": 1e-12, "seed": 0}
    dataset = TensorDataset(images, ["0", "1", "1", "0"])
    result = smooth_activations(model, dataset, activation="softplus", sharpness=3.0, **options)
    images = images.double()
    x = model.normalize(images).flatten(1)
    torch.testing.assert_close(result.network(model.normalize(images)), last(F.softplus(3 * first(x)) / 3))
    assert result.note == "1 ReLUs are softplus now"
    sample, dataset = sample_training(nn.BatchNorm1d(3), nn.ReLU())
    smoothed: Any = sample.copy()
    replace_relus(smoothed.module, "elu", 2.0)

    def loss(trained: AnyModel, images: Tensor, labels: Tensor, progress: float) -> Tensor:
        trained.module.train()
        return F.cross_entropy(trained(images), labels, reduction="none")

    options = {"activation": "elu", "sharpness": 2.0, "labels": "predicted", **SHORT_TRAINING}
    assert_trained_plainly(
        lambda: smooth_activations(sample, dataset, **options), smoothed, dataset, loss, torch.optim.Adam,
        labels=sample(dataset.images).argmax(1),
    )  # fmt: skip
    other = smooth_activations(sample, dataset, **options | {"seed": 1}).losses
    assert not torch.equal(smooth_activations(sample, dataset, **options | {"seed": 0}).losses, other)
    of_pixels = nn.Sequential(nn.ReLU6(), nn.Flatten(), nn.Linear(4, 3))
    for refused, reason in (
        (sample_training(nn.Tanh())[0], "no nn.ReLU"),
        (sample_training(nn.ReLU6())[0], "1 ReLUs that are no nn.ReLU modules"),
        (load_model(of_pixels, input_size=(1, 2, 2)), "1 ReLUs that are no nn.ReLU modules"),
    ):
        message = "accepted"
        try:
            smooth_activations(refused, dataset)
        except ModelError as error:
            message = str(error)
        assert f"has {reason}" in message, message


@method(
    family="defenses",
    references=[
        Reference(
            key="xie2020",
            title="Smooth Adversarial Training",
            authors="Xie, Tan, Gong, Yuille, Le",
            year=2020,
            url="https://arxiv.org/abs/2006.14536",
        )
    ],
    invariants=[PixelRange(field="previews")],
    relations=[InvariantTo("logit_shift", fields=("losses",))],
    needs=["gradients", "dataset", "training", "relu"],
    # Each step: labels and logits; before the first one, a pass that counts the ReLUs left.
    cost=training_cost(2, 1, setup_passes=1),
    batch_independent=False,
    tags=["training"],
    oracle=activations_approach_relu_with_the_sharpness,
    network=replace_relus,
    quick={"steps": 2, "batch": 2, "held_out": 0.2},
    demo={"dataset": "builtin:scenes/64", "steps": 24, "batch": 16, "eps": 2 / 255},
)
def smooth_activations(
    model: Model,
    dataset: Dataset,
    *,
    activation: Annotated[Activation, Field(description="activation that replaces every ReLU")] = "silu",
    sharpness: Annotated[
        float, Field(gt=0, le=1000, description="sharpness b of the activation; ReLU is the limit of large b")
    ] = 1.0,
    eps: EvaluationRadius = 8 / 255,
    training: TrainingOptions = TrainingOptions(steps=200, batch=32, lr=3e-4),
    seed: Seed = None,
) -> TrainedModel:
    """Smooth activations: a copy of the model with every ReLU replaced by a smooth function and fine-tuned.

    relu(x) -> s(b x) / b,   s = log(1 + e^x), x sigmoid(x), x Phi(x) or x for x > 0, else e^x - 1

    The weights were trained for ReLUs, so they are fine-tuned on clean images by Adam on the cross-entropy.
    **This alone is no defense**: a kink has no useful curvature, and Xie et al. show that adversarial
    training without kinks finds better examples and steps at no cost in accuracy. Continue with
    ``adversarial_training(result.model(), ...)``. With elu and softplus, interval bounds remain available.

    Returns:
        ``model()`` is the fine-tuned model. ``losses`` (steps,); ``curves`` has the accuracy on held-out
        images, "clean" and "under PGD-10" within ``eps``. ``note`` is the number of replaced ReLUs.
        ``previews`` are held-out images: clean, attacked before and attacked after the training.

    Raises:
        ModelError: the network has no ``nn.ReLU``, or ReLUs called as functions or ReLU6s, which cannot be
            replaced.
        DivergenceError: the loss or a weight is not finite.
        InputError: the data set has no labels.

    Example::
        from phosphene import run

        result = run("smooth_activations", dataset="builtin:scenes/8", steps=2, batch=2)
        result.note  # "8 ReLUs are silu now"

    Source: Xie et al. 2020, section 4.
    """
    read_labels = label_reader(model, dataset, training.labels)
    trained = trainable_copy(model)
    count, test_indices = train_test_split(dataset, training.held_out)
    replaced = sum(isinstance(part, nn.ReLU) for part in trained.module.modules())
    trained.module = replace_relus(trained.module, activation, sharpness)
    remaining = count_relus(trained, dataset.read([0]).to(model.device, model.dtype))
    if remaining or not replaced:
        relus = f"{remaining} ReLUs that are no nn.ReLU modules" if remaining else "no nn.ReLU"
        raise ModelError(f"{model.name} has {relus}, so they cannot be replaced; write them as nn.ReLU()")
    evaluation = HeldOutEvaluation(model, trained, dataset, test_indices, read_labels, eps=eps)

    def loss(images: Tensor, indices: Sequence[int], progress: float) -> Tensor:
        trained.module.train()
        value = F.cross_entropy(trained(images), read_labels(indices), reduction="none")
        trained.module.eval()
        return value

    optimizer = torch.optim.Adam(trained.module.parameters(), training.lr)
    history = train(
        trained.module, dataset, loss, optimizer, steps=training.steps, batch=training.batch, seed=seed or 0,
        count=count, max_batch=batch_size(model), schedule=linear_decay, evaluate=evaluation,
        checkpoints=training.checkpoints,
    )  # fmt: skip
    changes = {"activation": activation, "sharpness": sharpness}
    note = f"{replaced} ReLUs are {activation} now"
    name = "defenses.smooth_activations"
    return TrainedModel.from_training(
        name, trained, model, history, changes, note=note, **evaluation.previews()
    )


@hookimpl
def phosphene_methods():
    return [smooth_activations]
