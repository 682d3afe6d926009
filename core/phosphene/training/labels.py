"""Labels, train-test split and a trainable copy of a model: what the training of a classifier starts from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from ..data.datasets import Batch, Dataset
from ..errors import InputError, ModelError, UnknownName
from ..models import Model
from ..models.batch_size import batch_size

#: The most images that a training is evaluated on: evaluation runs an attack, and is repeated.
MAX_HELD_OUT = 64


def single_precision(model: Model) -> Model:
    """The model, or a copy in float32 of one in half precision.

    Training in float16 diverges: Adam's squares of gradients underflow.
    """
    if model.dtype.itemsize > 2:
        return model
    copied = model.copy()
    copied.module.float()
    return copied


def trainable_copy(model: Model) -> Model:
    """A copy of a model whose weights all require gradients, in eval mode, at least in single precision.

    Raises ModelError for a model without floating-point weights.
    """
    if not any(p.is_floating_point() for p in model.module.parameters()):
        raise ModelError(f"{model.name} has no weights that could be trained")
    copied = single_precision(model)
    copied = model.copy() if copied is model else copied
    copied.module.requires_grad_(True)
    return copied


def label_reader(
    model: Model, dataset: Dataset, source: Literal["truth", "predicted"] = "truth"
) -> Callable[[Sequence[int]], Tensor]:
    """A function from indices into a data set to class indices (n,).

    ``source`` "truth" reads the data set's own labels, "predicted" uses the classes that the model predicts.
    Raises InputError where the data set has no labels, UnknownName for a label that is no class of the model.
    """
    if source == "predicted":

        def predicted_labels(indices: Sequence[int]) -> Tensor:
            with torch.no_grad():
                images = dataset.read(indices).to(model.device, model.dtype)
                return torch.cat([model(part).argmax(1) for part in images.split(batch_size(model))])

        return predicted_labels
    first = dataset.labels([0])
    if first is None:
        raise InputError(
            'the data set has no labels, or not one per image: use labels="predicted", sort its images into '
            "one folder per class, or pass a manifest with a column label or TensorDataset(images, classes)"
        )
    # Labels are cached: a data set that draws its images draws them again to label them.
    cache = {0: label_index(model, first[0])}

    def true_labels(indices: Sequence[int]) -> Tensor:
        missing = [index for index in dict.fromkeys(indices) if index not in cache]
        if missing:
            labels = dataset.labels(missing) or ()
            cache.update(
                (index, label_index(model, name)) for index, name in zip(missing, labels, strict=True)
            )
        return torch.tensor([cache[index] for index in indices], device=model.device)

    return true_labels


def label_index(model: Model, label: str) -> int:
    """The index of a data set's label among the model's classes.

    Raises UnknownName for a label that is no class of the model.
    """
    try:
        return model.class_index(label)
    except UnknownName as error:
        kind, name, classes, owner, _ = error.args
        advice = (
            f"{name!r} is a label of the data set: choose a data set of the network's classes, a network "
            "of the data set's, or name the labels as the network does"
        )
        raise UnknownName(kind, name, classes, owner, advice) from None


def require_classes(dataset: Dataset) -> None:
    """Raise InputError for a data set without classes."""
    if dataset.labels([0]) is None:
        raise InputError(
            "the data set has no classes: sort its images into one folder per class, or pass "
            "TensorDataset(images, classes)"
        )


def class_indices(model: Model, batch: Batch) -> Tensor:
    """The indices (n,) of the classes of a batch. Raises InputError for an image without one."""
    if (names := batch.labels) is None:
        raise InputError("some images of the data set have no class")
    return torch.tensor([label_index(model, name) for name in names], device=model.device)


def train_test_split(dataset: Dataset, held_out: float, max_test: int = MAX_HELD_OUT) -> tuple[int, range]:
    """How many of the first images to train on, and the indices of at most ``max_test`` images to test on.

    The last share ``held_out`` of the data set is not trained on. Where that share is less than half an
    image, all images are trained on, and the first ones are tested on as well.
    """
    count = max(1, len(dataset) - round(held_out * len(dataset)))
    start = count if count < len(dataset) else 0
    return count, range(start, min(start + max_test, len(dataset)))
