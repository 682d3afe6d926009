"""Defensive distillation: a student trained on a teacher's softened probabilities, whose gradients vanish."""

from collections.abc import Sequence
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from phosphene import Reference, TensorDataset, batch_size, hookimpl, load_model, method
from phosphene.roles import Dataset, Model, Seed
from phosphene.spec import InvariantTo, PixelRange
from phosphene.training import (
    Loss,
    TrainedModel,
    TrainingHistory,
    label_reader,
    linear_decay,
    train,
    train_test_split,
    trainable_copy,
)

from ._training_evaluation import EvaluationRadius, HeldOutEvaluation, TrainingOptions, training_cost
from ._training_reference import SHORT_TRAINING, assert_trained_plainly, sample_training, train_plainly


def student_logits_scale_with_the_temperature() -> None:
    """Where the optimal answer to an image is (0.9, 0.1), the student's logits are T log 9 apart."""
    linear = nn.Linear(1, 2).double()
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    model = load_model(nn.Sequential(nn.Flatten(), linear), input_size=(1, 1, 1))
    images = torch.full((11, 1, 1, 1), 0.5, dtype=torch.float64)
    dataset = TensorDataset(images, ["0"] * 9 + ["1"] + ["0"])
    options: dict[str, Any] = {"steps": 90, "batch": 10, "lr": 0.5, "held_out": 0.09, "seed": 0}
    result = defensive_distillation(model, dataset, temperature=5.0, **options)
    logits = result.model()(images[:1])[0]
    torch.testing.assert_close(logits[0] - logits[1], 5 * torch.tensor(9.0).double().log(), rtol=0.02, atol=0)


def student_and_teacher_equal_plain_loops() -> None:
    """A teacher on the predicted classes, then a student on the teacher's probabilities, at temperature 3."""
    model, dataset = sample_training(nn.BatchNorm1d(3), nn.Tanh())

    def teacher_loss(trained: Model, images: Tensor, labels: Tensor, progress: float) -> Tensor:
        trained.module.train()
        return F.cross_entropy(trained(images) / 3, labels, reduction="none")

    def student_loss(trained: Model, images: Tensor, labels: Tensor, progress: float) -> Tensor:
        trained.module.train()
        return -((teacher(images) / 3).softmax(1).detach() * (trained(images) / 3).log_softmax(1)).sum(1)

    labels = model(dataset.images).argmax(1)
    teacher, _ = train_plainly(model, dataset, teacher_loss, torch.optim.Adam, labels=labels)
    options: dict[str, Any] = {"temperature": 3, "labels": "predicted", **SHORT_TRAINING}
    assert_trained_plainly(
        lambda: defensive_distillation(model, dataset, **options), model, dataset, student_loss,
        torch.optim.Adam, labels=labels,
    )  # fmt: skip


def distills_at_the_temperature() -> None:
    """The optimum in closed form, and plain loops of teacher and student."""
    student_logits_scale_with_the_temperature()
    student_and_teacher_equal_plain_loops()


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
    relations=[InvariantTo("logit_shift", fields=("losses",))],
    needs=["gradients", "dataset", "training"],
    # Teacher: labels and logits; student: the teacher's logits and its own.
    cost=training_cost(4, 2),
    batch_independent=False,
    tags=["training"],
    oracle=distills_at_the_temperature,
    quick={"steps": 2, "batch": 2, "held_out": 0.2},
    demo={"dataset": "builtin:scenes/64", "steps": 30, "batch": 16, "eps": 2 / 255},
)
def defensive_distillation(
    model: Model,
    dataset: Dataset,
    *,
    temperature: Annotated[
        float, Field(ge=1, le=1000, description="softmax temperature T of the teacher and in training")
    ] = 20,
    eps: EvaluationRadius = 8 / 255,
    training: TrainingOptions = TrainingOptions(steps=500, batch=64, lr=1e-3),
    seed: Seed = None,
) -> TrainedModel:
    """Defensive distillation: a student trained on a teacher's softened probabilities.

    teacher:  min_F E CE(softmax(F(x) / T), y)
    student:  min_G E CE(softmax(G(x) / T), softmax(F(x) / T))

    Both start from the model's weights and are trained by Adam for ``steps`` each. The student is used at
    temperature 1, where its logits are T times as large: the softmax saturates, the gradient of the
    cross-entropy underflows, and attacks on it fail. **This is not robustness**: attacks on the logits
    (``carlini_wagner``, ``apgd`` with loss="dlr") succeed as before. The method is here as an example of
    gradient masking.

    Returns:
        ``model()`` is the student. ``losses`` (steps,) and ``curves`` are the student's: the accuracy on
        held-out images, clean and under PGD-10 within ``eps``. ``previews`` are held-out images: clean,
        attacked before and attacked after the training.

    Raises:
        DivergenceError: the loss or a weight is not finite.
        InputError: the data set has no labels.

    Example::
        from phosphene import run

        result = run("defensive_distillation", dataset="builtin:scenes/8", steps=2, batch=2)
        result.losses.shape  # (2,)

    Source: Papernot et al. 2016, section IV; broken by Carlini & Wagner 2017.
    """
    read_labels = label_reader(model, dataset, training.labels)
    count, test_indices = train_test_split(dataset, training.held_out)
    teacher, student = trainable_copy(model), trainable_copy(model)
    networks = nn.ModuleList([teacher.module, student.module])

    def train_stage(stage: int, loss: Loss, evaluation: HeldOutEvaluation | None) -> TrainingHistory:
        networks[stage].requires_grad_(True)
        optimizer = torch.optim.Adam(networks[stage].parameters(), training.lr)
        return train(
            networks, dataset, loss, optimizer, steps=training.steps, batch=training.batch, seed=seed or 0,
            count=count, max_batch=batch_size(model), schedule=linear_decay, evaluate=evaluation, stage=stage,
            checkpoints=stage * training.checkpoints, weights=student.module.state_dict,
        )  # fmt: skip

    def teacher_loss(images: Tensor, indices: Sequence[int], progress: float) -> Tensor:
        teacher.module.train()
        return F.cross_entropy(teacher(images) / temperature, read_labels(indices), reduction="none")

    def student_loss(images: Tensor, indices: Sequence[int], progress: float) -> Tensor:
        with torch.no_grad():
            soft_labels = (teacher(images) / temperature).softmax(1)
        student.module.train()
        logits = student(images) / temperature
        student.module.eval()
        return -(soft_labels * logits.log_softmax(1)).sum(1)

    train_stage(0, teacher_loss, None)
    evaluation = HeldOutEvaluation(model, student, dataset, test_indices, read_labels, eps=eps)
    history = train_stage(1, student_loss, evaluation)
    name = "defenses.defensive_distillation"
    return TrainedModel.from_training(name, student, model, history, **evaluation.previews())


@hookimpl
def phosphene_methods():
    return [defensive_distillation]
