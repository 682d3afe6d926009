"""Fooling rates of one change of all images of a data set: the evaluation of ``universal`` and ``patch``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from phosphene import batch_size
from phosphene.roles import Dataset, Model

#: Images (N, C, H, W) of a data set and their indices in it -> the images changed.
Change = Callable[[Tensor, Sequence[int]], Tensor]
#: The number of images in a result.
_EXAMPLES = 6


def training_count(dataset: Dataset, held_out: float) -> int:
    """The number of training images, the first of the data set, when this fraction is held out."""
    return max(1, len(dataset) - round(held_out * len(dataset)))


def predict_classes(
    model: Model, dataset: Dataset, change: Change | None = None, count: int | None = None
) -> Tensor:
    """The predicted classes of the first ``count`` images, changed by ``change``, (count,)."""
    count = len(dataset) if count is None else count
    predictions = []
    with torch.no_grad():
        for batch in dataset.batches(batch_size(model)):
            if batch.indices[0] >= count:
                break
            images = batch.images.to(model.device, model.dtype)
            logits = model(images if change is None else change(images, batch.indices))
            predictions.append(logits.argmax(1))
    return torch.cat(predictions)[:count]


def evaluate_change(
    model: Model, dataset: Dataset, count: int, predictions: Tensor, change: Change, target: int | None
) -> dict[str, Any]:
    """The fields of a result: on what fraction ``change`` fools the model, and examples.

    ``predictions``: the predicted classes of all images without it, of which the first ``count`` are training
    images. ``target``: the class that counts as success; any other class than before where None.
    """
    after = predict_classes(model, dataset, change)
    indices = range(count, len(dataset))[:_EXAMPLES] or range(count)[:_EXAMPLES]
    images = dataset.read(indices).to(model.device, model.dtype)
    # Images of the target class cannot be fooled into it and do not count.
    eligible = torch.ones_like(predictions, dtype=torch.bool) if target is None else predictions.ne(target)
    success = (after.ne(predictions) if target is None else after.eq(target)) & eligible

    def rate(part: slice) -> float:
        return float(success[part].sum()) / max(1, int(eligible[part].sum()))

    return {
        "fooling_rate": rate(slice(count)),
        "held_out_rate": rate(slice(count, None)) if count < len(dataset) else None,
        "images": images,
        "adversarial": change(images, indices),
        "names_before": tuple(model.class_name(int(predictions[i])) for i in indices),
        "names_after": tuple(model.class_name(int(after[i])) for i in indices),
    }
