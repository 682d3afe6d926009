"""Labels, train and test splits for training a classifier."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from ..data.datasets import Dataset
from ..errors import InputError, ModelError
from ..models import Model
from ..models.batch_size import batch_size


def trainable(model: Model) -> Model:
    """A copy of a model with all its weights free, in eval mode. ModelError where it has none."""
    if not any(p.is_floating_point() for p in model.module.parameters()):
        raise ModelError(f"{model.name} has no weights that could be trained")
    copied = model.copy()
    copied.module.requires_grad_(True)
    return copied


def classes_of(
    model: Model, dataset: Dataset, source: Literal["truth", "predicted"] = "truth"
) -> Callable[[Sequence[int]], Tensor]:
    """A function from places in a data set to class indices (n,): its own truth, or what the model says.

    InputError where the data set knows no classes, UnknownName where the model does not know them.
    """
    if source == "predicted":

        def predicted(places: Sequence[int]) -> Tensor:
            with torch.no_grad():
                images = dataset.read(places).to(model.device, model.dtype)
                return torch.cat([model(part).argmax(1) for part in images.split(batch_size(model))])

        return predicted
    first = dataset.labels([0])
    if first is None:
        raise InputError(
            'the data set knows no classes: say labels="predicted", sort its pictures into a folder for each '
            "class, or give TensorDataset(images, classes)"
        )
    known = {0: model.class_index(first[0])}

    def true(places: Sequence[int]) -> Tensor:
        new = [place for place in dict.fromkeys(places) if place not in known]
        if new:  # a data set that draws its pictures draws them for their labels, too
            known.update(zip(new, map(model.class_index, dataset.labels(new) or ()), strict=True))
        return torch.tensor([known[place] for place in places], device=model.device)

    return true


def split(dataset: Dataset, held_out: float, most: int = 64) -> tuple[int, range]:
    """How many of the first pictures are learned from, and the last ones, ``most`` of them, to look at.

    Where a share ``held_out`` is none at all, those to look at are learned from, too.
    """
    count = max(1, len(dataset) - round(held_out * len(dataset)))
    start = count if count < len(dataset) else 0
    return count, range(start, min(start + most, len(dataset)))
