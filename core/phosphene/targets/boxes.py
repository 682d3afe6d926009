"""``Box``: the score of an object that a detector finds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import InputError, ModelError
from ..models.detections import Detection, box_iou
from .objectives import AbsentObjective, Objective

if TYPE_CHECKING:
    from ..models import Model


@dataclass(eq=False)
class Box(Objective):
    """The score of one object of a detector, in [0, 1].

    The object is fixed at the first evaluation: of class ``index`` (None: any), containing ``point`` (x, y)
    where that is set, the one of the highest score. In later passes it is the best box of the same class
    that overlaps it by an IoU of ``min_iou`` or more; without one the score is 0.

    An attack succeeds where that score is below ``threshold``; default: half the score in the image itself.
    """

    index: int | None = None
    point: tuple[int, int] | None = None
    min_iou: float = 0.5
    threshold: float | None = None
    name: str = ""
    _references: list[tuple[int, Tensor, float]] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        for what, value in (("min_iou", self.min_iou), ("threshold", self.threshold)):
            if value is not None and not 0 < value < 1:
                raise InputError(f"{what} must be between 0 and 1, not {value}")

    def score(self, values: Tensor) -> Tensor:
        raise ModelError("a box is scored by a detector's boxes, not by logits")

    def evaluate(self, model: Model, images: Tensor) -> Tensor:
        if not len(images):
            return images.flatten(1).sum(1)
        detections = model.detections(images)
        if self._references is None:
            chosen = [self._choose(model, number, detection) for number, detection in enumerate(detections)]
            self._references = chosen
        if len(self._references) != len(images):
            raise InputError(f"the boxes are of {len(self._references)} images, not {len(images)}")
        scores = []
        for (label, box, _), detection, image in zip(self._references, detections, images, strict=True):
            matching = (detection.labels == label) & (box_iou(detection.boxes.detach(), box) >= self.min_iou)
            # Without a box the score is the constant 0, on the graph with a gradient of zero.
            scores.append(detection.scores[matching].max() if matching.any() else 0.0 * image.sum())
        return torch.stack(scores)

    def margin(self, model: Model, images: Tensor) -> Tensor:
        score = self.evaluate(model, images).clamp(1e-6, 1 - 1e-6)
        assert self._references is not None
        thresholds = [self.threshold or max(first / 2, 1e-6) for _, _, first in self._references]
        return score.logit() - torch.tensor(thresholds, dtype=torch.float64).logit().to(score)

    def select(self, rows: Sequence[int]) -> Box:
        references = None if self._references is None else [self._references[row] for row in rows]
        return Box(self.index, self.point, self.min_iou, self.threshold, self.name, references)

    def resolve(self, model: Model, images: Tensor) -> Box:
        if self._references is None:
            with torch.no_grad():
                self.evaluate(model, images)
        return self

    @property
    def is_identified(self) -> bool:
        return self.min_iou == 0.5 and self.threshold is None

    def unresolved(self) -> Box:
        return replace(self, _references=None)

    def names(self, model: Model, count: int) -> tuple[str, ...]:
        if self._references is None or len(self._references) != count:
            return super().names(model, count)
        return tuple(f"box:{model.class_name(label)}" for label, *_ in self._references)

    def _choose(self, model: Model, number: int, detection: Detection) -> tuple[int, Tensor, float]:
        """Label, box (4,) and score of the object in image ``number``; InputError without one."""
        boxes, labels, scores = (part.detach() for part in detection)
        matching = torch.ones_like(labels, dtype=torch.bool)
        if self.index is not None:
            matching &= labels == self.index
        if self.point is not None:
            x, y = self.point
            matching &= (boxes[:, 0] <= x) & (x < boxes[:, 2]) & (boxes[:, 1] <= y) & (y < boxes[:, 3])
        if not matching.any():
            best = scores.argsort(descending=True)[:5].tolist()
            listed = ", ".join(f"{model.class_name(int(labels[i]))} {float(scores[i]):.2f}" for i in best)
            at = "" if self.point is None else f" at {self.point[0]},{self.point[1]}"
            what = "object" if self.index is None else model.class_name(self.index)
            raise AbsentObjective(
                f"{model.name} detects no {what}{at} in image {number}; it detects {listed or 'nothing'}"
            )
        chosen = int(scores.masked_fill(~matching, -1).argmax())
        return int(labels[chosen]), boxes[chosen], float(scores[chosen])

    def __str__(self) -> str:
        at = "" if self.point is None else f"@{self.point[0]},{self.point[1]}"
        what = "*" if self.index is None else self.name or str(self.index)
        return f"box:{what}{at}"
