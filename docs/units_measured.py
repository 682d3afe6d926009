"""The pointing scores of the page on the centers of units: photographs at exact positions, MobileNetV2.

Usage: python docs/units_measured.py WEIGHTS FOLDER, with weights of torchvision's MobileNetV2 and a folder of
photographs of ImageNet's classes (n01440764_tench.JPEG).
"""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from phosphene import Model, load_model, methods
from phosphene.data import localization
from phosphene.images import resize

#: Side of the image, and of the photograph in it, in pixels.
SIDE, OBJECT = 224, 96
METHODS = ("cam", "grad_cam", "layer_cam", "hires_cam", "eigen_cam")


def pasted(model: Model, files: list[Path]) -> tuple[torch.Tensor, torch.Tensor]:
    """Each photograph, reduced, at a random position on the model's mean color; and the boxes as masks."""
    generator = torch.Generator().manual_seed(0)
    photographs = torch.stack([model.transform(file) for file in files])
    images = model.mean[:, None, None].expand_as(photographs).clone()
    masks = torch.zeros(len(files), SIDE, SIDE, dtype=torch.bool)
    for image, mask, photograph in zip(images, masks, photographs, strict=True):
        top, left = torch.randint(SIDE - OBJECT + 1, (2,), generator=generator).tolist()
        window = slice(top, top + OBJECT), slice(left, left + OBJECT)
        image[:, *window] = resize(photograph, (OBJECT, OBJECT))
        mask[window] = True
    return images, masks


def main() -> None:
    """Print hits, and the median distance (y, x) of the heat's maximum from the photograph's center."""
    weights, folder = sys.argv[1:]
    model = load_model("torchvision:mobilenet_v2", weights=weights, input_size=(3, SIDE, SIDE))
    files = sorted(Path(folder).glob("*.JPEG"))
    images, masks = pasted(model, files)
    with torch.no_grad():
        top5 = torch.cat([model(part).topk(5).indices for part in images.split(20)])
    names = [file.stem.partition("_")[2].replace("_", " ") for file in files]
    labels = [model.class_index(name) for name in names]
    right = [i for i, label in enumerate(labels) if label in top5[i].tolist()]
    images, masks, targets = images[right], masks[right], [labels[i] for i in right]
    print(f"{len(right)} of {len(files)} photographs are recognized (top 5) at {OBJECT} px")
    print("| method | shares of the image | centers of the units |\n| --- | --- | --- |")
    for name in METHODS:
        parts: list[Any] = []
        for start in range(0, len(images), 20):
            batch = slice(start, start + 20)
            target = {} if name == "eigen_cam" else {"target": targets[batch]}
            parts.append(methods[name](model, images[batch], **target))
        result = type(parts[0]).concatenate(parts)
        cells = []
        for placed in (replace(result, centers=None), result):
            score = localization(placed.heat(), masks)
            y, x = (center(placed.heat()) - center(masks.float())).median(0).values.tolist()
            cells.append(f"{score.inside:.2f} ({y:+.0f}, {x:+.0f})")
        print(f"| {methods[name].spec.title} | {cells[0]} | {cells[1]} |", flush=True)


def center(heat: torch.Tensor) -> torch.Tensor:
    """The pixels of maxima of maps (N, H, W), the mean over equal ones: (N, 2)."""
    peaks = (heat == heat.amax((1, 2), keepdim=True)).double()
    peaks = peaks / peaks.sum((1, 2), keepdim=True)
    pixels = torch.arange(SIDE, dtype=torch.float64)
    return torch.stack([(peaks.sum(2) * pixels).sum(1), (peaks.sum(1) * pixels).sum(1)], 1)


if __name__ == "__main__":
    main()
