"""Data-free distillation: plain loop, a student that agrees with its teacher, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from phosphene import InputError, ModelError, TensorDataset, load_model, methods

distill = methods["synthesis.data_free_distillation"]


def test_oracle() -> None:
    distill.spec.oracle()


def test_student_without_data_agrees_with_its_teacher() -> None:
    """A teacher that compares the means of two channels, on whose images only its batch norm is known."""
    norm, head = nn.BatchNorm2d(2), nn.Linear(2, 2)
    network = nn.Sequential(norm, nn.AdaptiveAvgPool2d(1), nn.Flatten(), head).eval()
    norm.running_var.fill_(0.02)
    head.weight.data, head.bias.data = torch.tensor([[4.0, -4.0], [-4.0, 4.0]]), torch.zeros(2)
    teacher = load_model(network, input_size=(2, 6, 6), mean=[0.5, 0.5])
    student = load_model(nn.Sequential(nn.Flatten(), nn.Linear(72, 2)), input_size=(2, 6, 6), mean=[0.5, 0.5])
    levels = torch.rand(60, 2, 1, 1, generator=torch.Generator().manual_seed(0))
    dataset = TensorDataset(levels.expand(-1, -1, 6, 6).contiguous())
    options = {"images": 20, "inversion_steps": 20, "shift": 2, "steps": 60, "batch": 10, "lr": 0.02}
    result = distill(teacher, dataset, student, seed=0, **options)
    agreement = result.curves["agreement with the teacher"]
    assert agreement[-1] > 0.9 and result.losses[-1] < 0.2 * result.losses[0]


def test_unsuitable_teachers_and_students_are_refused() -> None:
    dataset = TensorDataset(torch.rand(2, 3, 64, 64))
    teacher = load_model("builtin:shapes-resnet")
    with pytest.raises(ModelError, match="no batch norm"):
        distill(load_model("builtin:shapes-vgg"), dataset, steps=1)
    other = load_model(nn.Sequential(nn.Flatten(), nn.Linear(12288, 3)), input_size=(3, 64, 64))
    with pytest.raises(ModelError, match="needs the teacher's 10 classes"):
        distill(teacher, dataset, other, steps=1)
    with pytest.raises(InputError, match="not both"):
        distill(teacher, dataset, teacher, new_layers=["fc"], steps=1)
