"""Figures and numbers of the page that compares the CAM family, computed when the book is built."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from method_pages import cached_demo

from phosphene import Model, load_model, methods
from phosphene.builtin.scenes import Scenes, draw_scenes
from phosphene.files import write_file
from phosphene.results import Panel
from phosphene_plugins.pages._single_file_page import picture

#: In the order of the page.
FAMILY = ["cam", "grad_cam", "grad_cam_plus_plus", "hires_cam", "layer_cam", "xgrad_cam", "score_cam"]
FAMILY += ["ablation_cam", "eigen_cam", "guided_grad_cam"]
#: Each bundled network with the layer one stage below its last map.
LOWER = {"shapes-vgg": "features.11", "shapes-resnet": "layer2.0.relu"}


def write_comparison(folder: Path, sources: str, tell: Callable[[str], None]) -> None:
    """Write both figures and the table of numbers; recomputed only when the sources have changed."""
    stem = folder / "comparing-cams"
    if cached_demo(stem, sources):
        return
    tell("drawing the CAM family")
    folder.mkdir(parents=True, exist_ok=True)
    scenes = draw_scenes(3, seed=3, split="test")
    models = [load_model(f"builtin:{name}") for name in LOWER]
    write_file(folder / "comparing-cams-numbers.md", numbers(models, draw_scenes(8, seed=5, split="test")))
    last = [row for model in models for row in rows(model, scenes, FAMILY, None)]
    write_file(folder / "comparing-cams.html", picture(last, "maps at the last layer with positions"))
    below = [n for n in FAMILY if n != "cam"]
    lower = [
        row for m, layer in zip(models, LOWER.values(), strict=True) for row in rows(m, scenes, below, layer)
    ]
    write_file(folder / "comparing-cams-lower.html", picture(lower, "maps one stage lower"))
    write_file(folder / "comparing-cams.json", json.dumps({"sources": sources}))


def rows(model: Model, scenes: Scenes, names: list[str], layer: str | None) -> list[list[Panel]]:
    """A row for each scene: the image and each method's map of the scene's own class."""
    columns: list[list[Panel]] = [[Panel(image, model.name.partition(":")[2]) for image in scenes.images]]
    for name in names:
        target = {} if name == "eigen_cam" else {"target": scenes.labels.tolist()}
        params = {} if layer is None else {"layer": layer}
        result = methods[name](model, scenes.images, **target, **params)
        columns.append([Panel(overlay.image, methods[name].spec.title) for _, overlay in result.panels()])
    return [list(row) for row in zip(*columns, strict=True)]


def numbers(models: list[Model], scenes: Scenes) -> str:
    """A table of the relative errors of the identities: largest difference over largest value."""
    lines = [
        "| network | n Grad-CAM - CAM | n HiResCAM - CAM | sum of HiResCAM + bias - logit |",
        "| --- " * 4 + "|",
    ]
    for model in models:
        model.module.double()
        images, labels = scenes.images.double(), scenes.labels
        cam = methods["cam"](model, images, labels).maps
        grad, hires = (
            methods[n](model, images, labels).as_convention("captum").maps for n in ("grad_cam", "hires_cam")
        )
        positions = cam[0].numel()
        with torch.no_grad():
            logits = model(images).gather(1, labels[:, None])[:, 0]
        totals = hires.sum((1, 2)) + model.head.bias[labels]
        errors = [
            float((a - b).abs().max() / b.abs().max())
            for a, b in ((positions * grad, cam), (positions * hires, cam), (totals, logits))
        ]
        lines.append(f"| {model.name} | " + " | ".join(f"{value:.0e}" for value in errors) + " |")
        model.module.float()
    return "\n".join(lines) + "\n"
