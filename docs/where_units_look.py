"""Figures and numbers of the page on the positions of maps, computed when the book is built."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from method_pages import cached_demo
from torch import Tensor, nn

from phosphene import Model, load_model, methods
from phosphene.builtin.scenes import Scenes, draw_scenes
from phosphene.data import localization
from phosphene.files import write_file
from phosphene.images import overlay
from phosphene.results import Attribution, Panel
from phosphene_plugins.pages._single_file_page import picture

#: Side of the image of the dots, and their positions.
SIDE, DOTS = 224, ((64, 64), (96, 128), (160, 32))
NETWORKS = ("shapes-resnet", "shapes-vgg")
METHODS = ("cam", "grad_cam", "layer_cam", "eigen_cam")


def write_placements(folder: Path, sources: str, tell: Callable[[str], None]) -> None:
    """Write both figures and the table; recomputed only when the sources have changed."""
    stem = folder / "where-units-look"
    if cached_demo(stem, sources):
        return
    tell("comparing positions of maps")
    folder.mkdir(parents=True, exist_ok=True)
    scenes = draw_scenes(100, seed=5, split="test")
    models = [load_model(f"builtin:{name}") for name in NETWORKS]
    write_file(folder / "where-units-look-numbers.md", numbers(models, scenes))
    write_file(folder / "where-units-look-dots.html", picture(dots(strided_network()), "Grad-CAM of a dot"))
    few = draw_scenes(4, seed=3, split="test")
    write_file(folder / "where-units-look.html", picture(rows(models[0], few), "Grad-CAM on scenes"))
    write_file(folder / "where-units-look.json", json.dumps({"sources": sources}))


def strided_network() -> Model:
    """Five convolutions with stride 2 and padding 1: unit i of the last map is centered at pixel 32 i."""
    layers: list[nn.Module] = []
    for channels in (3, 4, 4, 4, 4):
        layer = nn.Conv2d(channels, 4, 3, stride=2, padding=1, bias=False)
        nn.init.constant_(layer.weight, 0.05)
        with torch.no_grad():
            layer.weight[:, :, 1, 1] = 1
        layers += [layer, nn.ReLU()]
    head = nn.Linear(4, 2)
    nn.init.constant_(head.weight, 1)
    network = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), head)
    return load_model(network, input_size=(3, SIDE, SIDE))


def both(result: Attribution) -> tuple[Tensor, Tensor]:
    """The heat with cells that share the image equally, and with cells at the centers of their units."""
    return replace(result, centers=None).heat(), result.heat()


def dots(model: Model) -> list[list[Panel]]:
    """A row for each dot: the image, and Grad-CAM with both placements."""
    images = torch.zeros(len(DOTS), 3, SIDE, SIDE)
    for image, (y, x) in zip(images, DOTS, strict=True):
        image[:, y - 2 : y + 3, x - 2 : x + 3] = 1
    heats = both(methods["grad_cam"](model, images, 0))
    table = []
    for n, (y, x) in enumerate(DOTS):
        row = [Panel(images[n], f"dot at {y}, {x}")]
        for heat, title in zip(heats, ("shares", "centers"), strict=True):
            peak = divmod(int(heat[n].argmax()), SIDE)
            drawn = overlay(images[n], heat[n])
            drawn[:, y - 2 : y + 3, x - 2 : x + 3] = 1  # the dot, above the colors
            row.append(Panel(drawn, f"{title}: largest at {peak[0]}, {peak[1]}"))
        table.append(row)
    return table


def rows(model: Model, scenes: Scenes) -> list[list[Panel]]:
    """A row for each scene: the image, and Grad-CAM of its class with both placements."""
    heats = both(methods["grad_cam"](model, scenes.images, scenes.labels.tolist()))
    return [
        [Panel(image), Panel(overlay(image, shares), "shares"), Panel(overlay(image, centers), "centers")]
        for image, shares, centers in zip(scenes.images, *heats, strict=True)
    ]


def numbers(models: list[Model], scenes: Scenes) -> str:
    """Pointing scores of both placements, and how far the heat lies from the object's center."""
    lines = [
        "| network | method | hits: shares | centers | offset (y, x): shares | centers |",
        "| --- " * 6 + "|",
    ]
    for model in models:
        for name in METHODS:
            target = {} if name == "eigen_cam" else {"target": scenes.labels.tolist()}
            heats = both(methods[name](model, scenes.images, **target))
            scores = [f"{localization(heat, scenes.masks, radius=0).inside:.2f}" for heat in heats]
            offsets = [
                "{:+.1f}, {:+.1f}".format(*(middle(heat) - middle(scenes.masks.float())).mean(0).tolist())
                for heat in heats
            ]
            cells = [model.name, methods[name].spec.title, *scores, *offsets]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def middle(heat: Tensor) -> Tensor:
    """The center of mass of the upper half of the values of maps (N, H, W): (N, 2)."""
    mass = (heat - 0.5 * heat.amax((1, 2), keepdim=True)).clamp(min=0)
    y, x = (torch.arange(side, dtype=mass.dtype) for side in mass.shape[1:])
    total = mass.sum((1, 2))
    return torch.stack([(mass.sum(2) * y).sum(1) / total, (mass.sum(1) * x).sum(1) / total], 1)
