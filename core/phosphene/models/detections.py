"""The objects in a detector's output: reading, overlap, gradients."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ..errors import ModelError, type_name


class Detection(NamedTuple):
    """The objects in one image: ``boxes`` (M, 4) as x0, y0, x1, y1 in pixels, ``labels`` and ``scores`` (M,).

    ``scores`` are in [0, 1], after the detector's own non-maximum suppression.
    """

    boxes: Tensor
    labels: Tensor
    scores: Tensor


def read_detections(output: Any, size: tuple[int, int], name: str) -> list[Detection]:
    """The detections in the output of a torchvision detector, one mapping for each image.

    Raises ModelError for another output: ``output=`` has to convert it. ``size`` (H, W) is the images'.
    """
    keys = ("boxes", "labels", "scores")
    if not isinstance(output, (list, tuple)) or not all(
        isinstance(item, Mapping) and all(isinstance(item.get(key), Tensor) for key in keys)
        for item in output
    ):
        raise ModelError(
            f"{name} returned {type_name(output)}, and a detector returns a list with a mapping of "
            f"'boxes' (x0, y0, x1, y1 in pixels of the {size[0]}x{size[1]} image), 'labels' and 'scores' for "
            "each image; convert it: load_model(..., output=lambda result: [...])"
        )
    return [Detection(*(item[key] for key in keys)) for item in output]


def detection_table(
    model: Any, images: Mapping[str, Tensor], batch: int, lowest_score: float = 0.05
) -> dict[str, list[Any]]:
    """The objects that a detector finds in images (N, C, H, W), a table with a row for each, best first.

    ``model`` is a ``Model`` for detection; ``images`` by their version, such as "original". Columns:
    ``image``, ``version``, ``class``, ``score`` and the box, ``x0``, ``y0``, ``x1``, ``y1`` in pixels.
    Objects below ``lowest_score`` are left out.
    """
    columns = ("image", "version", "class", "score", "x0", "y0", "x1", "y1")
    rows = []
    for version, pixels in images.items():
        with torch.no_grad():
            detections = [detection for some in pixels.split(batch) for detection in model.detections(some)]
        for number, (boxes, labels, scores) in enumerate(detections):
            for row in scores.argsort(descending=True).tolist():
                if scores[row] >= lowest_score:
                    box = [round(side, 2) for side in boxes[row].tolist()]
                    score = round(float(scores[row]), 4)
                    rows.append((number, version, model.class_name(int(labels[row])), score, *box))
    rows.sort(key=lambda row: row[0])
    return {name: [row[column] for row in rows] for column, name in enumerate(columns)}


def box_iou(boxes: Tensor, box: Tensor) -> Tensor:
    """(M,) intersection over union of boxes (M, 4) and one box (4,)."""
    corner, opposite = boxes[:, :2].maximum(box[:2]), boxes[:, 2:].minimum(box[2:])
    intersection = (opposite - corner).clamp(min=0).prod(1)
    areas = (boxes[:, 2:] - boxes[:, :2]).clamp(min=0).prod(1)
    area = (box[2:] - box[:2]).clamp(min=0).prod()
    return intersection / (areas + area - intersection).clamp(min=1e-12)


def differentiable_values(output: Any) -> Tensor:
    """All values of a network's output that gradients flow from, (M,)."""
    leaves = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.requires_grad]
    return torch.cat([leaf.flatten() for leaf in leaves]) if leaves else torch.zeros(0)
