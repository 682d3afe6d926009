"""Defensive distillation: a student of soft answers, whose gradients vanish, and which is no safer for it."""

from collections.abc import Sequence
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from phosphene import Reference, TensorDataset, batch_size, hookimpl, load_model, method
from phosphene.roles import Dataset, Model, Seed
from phosphene.spec import Cost, PixelRange, ceil, minimum, param, size
from phosphene.training import Loss, TrainedModel, TrainingHistory, classes_of, split, train, trainable

from ._training_evaluation import Batch, FallingRate, HeldOut, LabelsFrom, Trial


def learns_logits_that_are_a_temperature_larger() -> None:
    """Where the best answer to a picture is (0.9, 0.1), the student's logits are T log 9 apart."""
    linear = nn.Linear(1, 2).double()
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    model = load_model(nn.Sequential(nn.Flatten(), linear), input_size=(1, 1, 1))
    images = torch.full((11, 1, 1, 1), 0.5, dtype=torch.float64)
    dataset = TensorDataset(images, ["0"] * 9 + ["1"] + ["0"])
    found = defensive_distillation(
        model, dataset, temperature=5.0, steps=90, batch=10, lr=0.5, held_out=0.09, seed=0
    )
    logits = found.model()(images[:1])[0]
    torch.testing.assert_close(logits[0] - logits[1], 5 * torch.tensor(9.0).double().log(), rtol=0.02, atol=0)


@method(
    family="defenses",
    references=[
        Reference(
            key="papernot2016",
            title="Distillation as a Defense to Adversarial Perturbations against Deep Neural Networks",
            authors="Papernot, McDaniel, Wu, Jha, Swami",
            year=2016,
            url="https://arxiv.org/abs/1511.04508",
        ),
        Reference(
            key="carlini2017",
            title="Towards Evaluating the Robustness of Neural Networks",
            authors="Carlini, Wagner",
            year=2017,
            url="https://arxiv.org/abs/1608.04644",
        ),
    ],
    invariants=[PixelRange(field="previews")],
    needs=["gradients", "dataset", "training"],
    cost=Cost(
        forward=4 * param.steps * param.batch + 108 * minimum(64, ceil(param.held_out * size.dataset)) + 80,
        backward=2 * param.steps * param.batch + 90 * minimum(64, ceil(param.held_out * size.dataset)) + 60,
    ),
    batch_independent=False,
    tags=["training"],
    oracle=learns_logits_that_are_a_temperature_larger,
    quick={"steps": 2, "batch": 2, "held_out": 0.2},
    demo={"dataset": "builtin:scenes/64", "steps": 30, "batch": 16, "eps": 2 / 255},
)
def defensive_distillation(
    model: Model,
    dataset: Dataset,
    *,
    temperature: Annotated[float, Field(ge=1, le=1000, description="T, of the teacher and in training")] = 20,
    steps: Annotated[int, Field(ge=1, le=1_000_000, description="steps of Adam, of each of the two")] = 500,
    batch: Batch = 64,
    lr: FallingRate = 1e-3,
    labels: LabelsFrom = "truth",
    eps: Annotated[float, Field(gt=0, le=1, description="radius of the PGD (linf) that it is watched by")] = 8
    / 255,
    held_out: HeldOut = 0.1,
    seed: Seed = None,
) -> TrainedModel:
    """Teach a copy of the model the soft answers of another, both at a high temperature; use it at 1.

    teacher:  min_F E CE(softmax(F(x) / T), y)
    student:  min_G E CE(softmax(G(x) / T), softmax(F(x) / T))

    Both begin as the model is, and are trained by Adam at a rate that falls to zero. A student that answers
    softly at T has logits T times as large at 1, where it is used: its softmax is then 0 or 1 to the last
    bit, its cross-entropy has no gradient, and attacks that climb it find nothing. **It does not withstand
    anything**: attacks on the logits (``carlini_wagner``, ``apgd`` with "dlr") succeed as before, which the
    book's page on defences shows. It is here to be broken.

    ``losses`` (steps,) and ``curves`` are the student's, watched on pictures held out and under PGD-10
    within ``eps``. Raises DivergenceError if the loss is no longer finite, InputError where no classes are
    known. Source: Papernot et al. 2016, section IV; broken by Carlini & Wagner 2017.
    """
    wanted = classes_of(model, dataset, labels)
    count, held = split(dataset, held_out)
    teacher, student = trainable(model), trainable(model)
    both = nn.ModuleList([teacher.module, student.module])

    def train_one(stage: int, loss: Loss, watch: Trial | None) -> TrainingHistory:
        both[stage].requires_grad_(True)
        optimizer = torch.optim.Adam(both[stage].parameters(), lr)
        return train(
            both, dataset, loss, optimizer, steps=steps, batch=batch, seed=seed or 0, count=count,
            at_once=batch_size(model), schedule=lambda share: 1 - share, watch=watch, stage=stage,
        )  # fmt: skip

    def by_labels(images: Tensor, places: Sequence[int], share: float) -> Tensor:
        both[0].train()
        return F.cross_entropy(teacher(images) / temperature, wanted(places), reduction="none")

    def by_the_teacher(images: Tensor, places: Sequence[int], share: float) -> Tensor:
        with torch.no_grad():
            soft = (teacher(images) / temperature).softmax(1)
        both[1].train()
        logits = student(images) / temperature
        both[1].eval()
        return -(soft * logits.log_softmax(1)).sum(1)

    train_one(0, by_labels, None)
    trial = Trial(model, student, dataset, held, wanted, eps=eps)
    course = train_one(1, by_the_teacher, trial)
    name = "defenses.defensive_distillation"
    return TrainedModel.of(name, student, model, course, **trial.shown())


@hookimpl
def phosphene_methods():
    return [defensive_distillation]
