"""Fooling rates of one change of all images of a data set: the evaluation of ``universal`` and ``patch``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from phosphene import Fold, InputError, batch_size
from phosphene.data import Batch, Rows, State
from phosphene.roles import Dataset, Model
from phosphene.targets import Objective

from ._objectives import classifier_of, predict_each

#: Images (N, C, H, W) of a data set and their indices in it -> the images changed. It is sent to other
#: processes: an instance of a class at the top of a module, not a closure.
Change = Callable[[Tensor, Sequence[int]], Tensor]
#: The number of images in a result.
_EXAMPLES = 6


def training_count(dataset: Dataset, held_out: float) -> int:
    """The number of training images, the first of the data set, when this fraction is held out."""
    return max(1, len(dataset) - round(held_out * len(dataset)))


def predict_classes(
    model: Model,
    dataset: Dataset,
    change: Change | None = None,
    count: int | None = None,
    objective: Objective | None = None,
    saved: bool = True,
) -> Tensor:
    """The predicted classes of the first ``count`` images, changed by ``change``, (count,).

    With an ``objective`` 1 where it holds, else 0. ``saved=False`` inside a loop that is resumed.
    """
    fold = _Predictions(model, change, objective, saved)
    return fold.run(dataset, batch_size(model), count).to(model.device)


@dataclass
class _Predictions(Fold[Tensor]):
    """The predicted classes (n,) of images changed by ``change``, or whether an objective holds in them."""

    title = "predictions"
    model: Model
    change: Change | None
    objective: Objective | None
    saved: bool

    def start(self) -> State:
        return {"classes": Rows()}

    @torch.no_grad()
    def update(self, state: State, batch: Batch) -> State:
        images = batch.images.to(self.model.device, self.model.dtype)
        classifier = classifier_of(self.model, self.objective, images)
        changed = images if self.change is None else self.change(images, batch.indices)
        state["classes"].write(batch.indices[0], predict_each(classifier, changed))
        return state

    def finish(self, state: State) -> Tensor:
        return state["classes"].tensor()


def eligible_rows(predictions: Tensor, objective: Objective, model: Model) -> Tensor:
    """Indices of the images in which the objective holds; InputError where there are none."""
    rows = predictions.nonzero()[:, 0]
    if not len(rows):
        raise InputError(
            f"{objective} holds in none of the {len(predictions)} training images for {model.name}: there is "
            "nothing to change"
        )
    return rows


def evaluate_change(
    model: Model,
    dataset: Dataset,
    count: int,
    predictions: Tensor,
    change: Change,
    target: int | None,
    objective: Objective | None = None,
) -> dict[str, Any]:
    """The fields of a result: on what fraction ``change`` fools the model, and examples.

    ``predictions``: the predicted classes of all images without it, of which the first ``count`` are training
    images. ``target``: the class that counts as success; any other class than before where None. With an
    ``objective`` success is that it does not hold any more, among the images in which it did.
    """
    after = predict_classes(model, dataset, change, None, objective)
    target = target if objective is None else 0
    indices = range(count, len(dataset))[:_EXAMPLES] or range(count)[:_EXAMPLES]
    images = dataset.read(indices).to(model.device, model.dtype)
    # Images of the target class cannot be fooled into it and do not count.
    # equivalent mutants: ones of any type select all
    eligible = torch.ones_like(predictions, dtype=torch.bool) if target is None else predictions.ne(target)
    success = (after.ne(predictions) if target is None else after.eq(target)) & eligible

    examples = classifier_of(model, objective, images)

    def name(row: int, index: int, of: Tensor) -> str:
        return examples.for_rows([row]).class_name(int(of[index]))

    def rate(part: slice) -> float:
        return float(success[part].sum()) / max(1, int(eligible[part].sum()))

    has_held_out = bool(eligible[count:].any())

    return {
        "fooling_rate": rate(slice(count)),
        "held_out_rate": rate(slice(count, None)) if has_held_out else None,
        "images": images,
        "adversarial": change(images, indices),
        "names_before": tuple(name(row, index, predictions) for row, index in enumerate(indices)),
        "names_after": tuple(name(row, index, after) for row, index in enumerate(indices)),
    }
