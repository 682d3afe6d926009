"""What a network's output means: the tasks, the two logits of a binary network, errors for other tasks."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from ..errors import InputError, ModelError, UnknownName

Task = Literal[
    "classification", "binary", "multilabel", "regression", "segmentation", "detection", "embedding"
]

TASKS: tuple[str, ...] = get_args(Task)

#: The tasks whose classes exclude each other; an undeclared one is a classification.
EXCLUSIVE: tuple[Task | None, ...] = (None, "classification", "binary")


#: What is said of a network without logits of exclusive classes, and what works on it instead.
_NO_CLASSES = {
    "multilabel": "each of its logits is a class that can be present or not, so none is the predicted one: "
    "name a class, as target='class:0' (of an attack on images, labels=[0])",
    "regression": "its outputs are values, no logits of classes: attributions explain one, target=0",
    "segmentation": "it has logits at each position: name a region, as 'region:3' (where class 3 is "
    "predicted), 'region:3@120,80' (the pixel at x, y) or 'region:3@all'",
    "detection": "it returns boxes: name one, as 'box:3' (the highest score of class 3) or 'box:3@120,80'",
    "embedding": "its output is an embedding: name a layer's unit or an image, as 'similar:dog.png'",
}


#: The tasks of classifiers of transformers by the ``problem_type`` in their configuration.
_PROBLEMS: dict[Any, Task] = {
    "single_label_classification": "classification",
    "multi_label_classification": "multilabel",
    "regression": "regression",
}


def check_task(task: Any) -> Task | None:
    """The task, or UnknownName with the nearest valid one."""
    if task is not None and task not in TASKS:
        if not isinstance(task, str):
            raise InputError(f"task must be one of {', '.join(TASKS)}, not {task!r:.80}")
        raise UnknownName("task", task, TASKS)
    checked: Task | None = task
    return checked


def infer_task(module: nn.Module) -> Task | None:
    """The task of a network whose library says it by its class or configuration; None for any other.

    Segmentation and detection networks of torchvision, networks of timm without a classifier, and classifiers
    and segmentation networks of transformers.
    """
    home, name = type(module).__module__, type(module).__name__
    if home.startswith("torchvision.models.segmentation."):
        return "segmentation"
    if home.startswith("torchvision.models.detection."):
        return "detection"
    if home.startswith("timm.models.") and getattr(module, "num_classes", None) == 0:
        return "embedding"
    if home.startswith("transformers.models."):
        if name.endswith("ForSemanticSegmentation"):
            return "segmentation"
        return _PROBLEMS.get(getattr(module.config, "problem_type", None))
    return None


def binary_logits(logit: Tensor, name: str) -> Tensor:
    """(N, 2): (-z/2, z/2) of one logit z, (N, 1) or (N,), whose softmax is (1 - sigmoid(z), sigmoid(z))."""
    if logit.ndim == 2 and logit.shape[1] == 1:
        logit = logit[:, 0]
    if logit.ndim != 1:
        raise ModelError(
            f"{name} returned {tuple(logit.shape)}, and task='binary' is for one logit, (N, 1) or (N,); "
            "leave the task out for two logits"
        )
    return torch.stack([-0.5 * logit, 0.5 * logit], 1)


def binary_names(names: tuple[str, ...] | None) -> tuple[str, str]:
    """The names of the negative and the positive class: of one name X they are "not X" and "X"."""
    if names is None:
        return "negative", "positive"
    if len(names) == 1:
        return f"not {names[0]}", names[0]
    if len(names) != 2:
        raise InputError(
            f"a binary network has two classes, the negative one first, or the positive one alone; "
            f"classes has {len(names)} names"
        )
    return names[0], names[1]


def no_classes(name: str, task: str | None, shape: tuple[int, ...]) -> str:
    """The message for a network without logits of exclusive classes."""
    if task is None:
        return (
            f"{name} returned an output of shape {shape}, not logits (N, K): declare a segmentation by "
            "load_model(..., task='segmentation'), or pass output= to read the logits"
        )
    return f"{name} has no logits of exclusive classes (task {task!r}): {_NO_CLASSES[task]}"


def ambiguous_output(name: str) -> str:
    """The message for one undeclared number per image."""
    return (
        f"{name} returns one number for each image, the logit of a binary classifier or the value of a "
        "regression: declare it by load_model(..., task='binary') or task='regression' (a single class that "
        "is always predicted: task='classification')"
    )
