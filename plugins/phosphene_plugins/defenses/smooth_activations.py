"""Smooth activations: a network without the kinks of its ReLUs, for adversarial training to go on from."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from phosphene import Model as AnyModel
from phosphene import ModelError, Reference, batch_size, hookimpl, method, rewrite_backward
from phosphene.roles import Dataset, Model, Seed
from phosphene.spec import Cost, PixelRange, ceil, minimum, param, size
from phosphene.training import TrainedModel, classes_of, split, train, trainable

from ._training_evaluation import Batch, FallingRate, HeldOut, LabelsFrom, Trial

Activation = Literal["softplus", "silu", "gelu", "elu"]
#: The curves at sharpness 1; sharper, every one of them nears max(x, 0).
CURVES: dict[Activation, Callable[[Tensor], Tensor]] = {
    "softplus": F.softplus,
    "silu": F.silu,
    "gelu": F.gelu,
    "elu": F.elu,
}


class SmoothActivation(nn.Module):
    """s(b x) / b for a curve s and a sharpness b."""

    def __init__(self, activation: Activation, sharpness: float) -> None:
        super().__init__()
        self.activation, self.sharpness = activation, sharpness

    def extra_repr(self) -> str:
        return f"{self.activation}, sharpness={self.sharpness:g}"

    def forward(self, x: Tensor) -> Tensor:
        return CURVES[self.activation](self.sharpness * x) / self.sharpness


def smoothed(network: nn.Module, activation: Activation, sharpness: float) -> nn.Module:
    """The network with every ``nn.ReLU`` in it replaced, in place."""
    if isinstance(network, nn.ReLU):
        return SmoothActivation(activation, sharpness)
    for name, part in network.named_children():
        setattr(network, name, smoothed(part, activation, sharpness))
    return network


def kinks(model: AnyModel, picture: Tensor) -> int:
    """How many ReLUs and ReLU6s run in a pass, however they are written."""
    with (
        torch.enable_grad(),
        suppress(ModelError),
        rewrite_backward(lambda gradient, gate: gradient) as found,
    ):
        model(picture.detach().requires_grad_())
    return found.caught


def near_the_relu_when_sharp_and_smooth_when_not() -> None:
    """Each curve differs from ReLU by at most c / b, and its slope at zero is s'(0)."""
    x = torch.linspace(-5, 5, 2001, dtype=torch.float64)
    apart = {"softplus": 0.6932, "silu": 0.2785, "gelu": 0.17, "elu": 1.0}
    slope = {"softplus": 0.5, "silu": 0.5, "gelu": 0.5, "elu": 1.0}
    for name in CURVES:
        for sharpness in (1.0, 8.0):
            zero = torch.zeros(1, dtype=torch.float64, requires_grad=True)
            curve = SmoothActivation(name, sharpness)
            worst = float((curve(x) - x.relu()).abs().max())
            assert 0.9 * apart[name] <= worst * sharpness <= apart[name], (name, worst)
            (gradient,) = torch.autograd.grad(curve(zero).sum(), zero)
            assert abs(float(gradient) - slope[name]) < 1e-9, name


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
    needs=["gradients", "dataset", "training", "relu"],
    cost=Cost(
        forward=2 * param.steps * param.batch + 108 * minimum(64, ceil(param.held_out * size.dataset)) + 82,
        backward=param.steps * param.batch + 90 * minimum(64, ceil(param.held_out * size.dataset)) + 62,
    ),
    batch_independent=False,
    tags=["training"],
    oracle=near_the_relu_when_sharp_and_smooth_when_not,
    network=smoothed,
    quick={"steps": 2, "batch": 2, "held_out": 0.2},
    demo={"dataset": "builtin:scenes/64", "steps": 24, "batch": 16, "eps": 2 / 255},
)
def smooth_activations(
    model: Model,
    dataset: Dataset,
    *,
    activation: Annotated[Activation, Field(description="what stands in the place of every ReLU")] = "silu",
    sharpness: Annotated[float, Field(gt=0, le=1000, description="b: the larger, the nearer to ReLU")] = 1.0,
    steps: Annotated[int, Field(ge=1, le=1_000_000, description="steps of Adam")] = 200,
    batch: Batch = 32,
    lr: FallingRate = 3e-4,
    labels: LabelsFrom = "truth",
    eps: Annotated[float, Field(gt=0, le=1, description="radius of the PGD (linf) that it is watched by")] = 8
    / 255,
    held_out: HeldOut = 0.1,
    seed: Seed = None,
) -> TrainedModel:
    """Replace every ReLU of a copy by a smooth curve, and train until the network has got used to it.

    relu(x) -> s(b x) / b,   s = log(1 + e^x), x sigmoid(x), x Phi(x) or x for x > 0, else e^x - 1

    The network was made for ReLUs, so it goes on learning, on plain pictures, by Adam on the cross-entropy.
    **That alone defends against nothing**: a kink has no useful curvature, and what Xie et al. show is that
    adversarial training finds better examples and steps without it, at no price in accuracy. So go on with
    ``adversarial_training(result.model(), ...)``; elu and softplus keep bounds of intervals possible, too.

    ``note`` says how many were replaced. ReLUs that are no modules, written in the network's forward as
    functions, cannot be, nor can ReLU6: where one is left, or none is found, it is a ModelError. ``curves``
    are watched on pictures held out, as they are and under PGD-10 within ``eps``. DivergenceError if the loss
    is no longer finite, InputError where no classes are known. Source: Xie et al. 2020, section 4.
    """
    wanted = classes_of(model, dataset, labels)
    trained = trainable(model)
    count, held = split(dataset, held_out)
    replaced = sum(isinstance(part, nn.ReLU) for part in trained.module.modules())
    trained.module = smoothed(trained.module, activation, sharpness)
    left = kinks(trained, dataset.read([0]).to(model.device, model.dtype))
    if left or not replaced:
        has = f"{left} ReLUs that are no nn.ReLU modules" if left else "no nn.ReLU"
        raise ModelError(f"{model.name} has {has}, so they cannot be replaced; write them as nn.ReLU()")
    trial = Trial(model, trained, dataset, held, wanted, eps=eps)

    def loss(images: Tensor, places: Sequence[int], share: float) -> Tensor:
        trained.module.train()
        value = F.cross_entropy(trained(images), wanted(places), reduction="none")
        trained.module.eval()
        return value

    course = train(
        trained.module, dataset, loss, torch.optim.Adam(trained.module.parameters(), lr), steps=steps,
        batch=batch, seed=seed or 0, count=count, at_once=batch_size(model),
        schedule=lambda share: 1 - share, watch=trial,
    )  # fmt: skip
    changes = {"activation": activation, "sharpness": sharpness}
    note = f"{replaced} ReLUs are {activation} now"
    name = "defenses.smooth_activations"
    return TrainedModel.of(name, trained, model, course, changes, note=note, **trial.shown())


@hookimpl
def phosphene_methods():
    return [smooth_activations]
