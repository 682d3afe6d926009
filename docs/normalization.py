"""Figures and numbers of the page on normalization: three short trainings when the book is built."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from method_pages import cached_demo
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import to_tensor

from phosphene import Model, load_model, methods, run
from phosphene.builtin.scenes import draw_scenes
from phosphene.builtin.textures import load_texture
from phosphene.files import write_file
from phosphene.images import charts
from phosphene.optimize import gram_matrix
from phosphene.results import Panel, TrainedNetwork
from phosphene_plugins.pages._single_file_page import picture
from phosphene_plugins.style._style_loss import StyleLoss, StyleTargets, relative_error

STYLE = "swirls"
#: The styles that the network of each norm learns.
STYLES = {"batch": [STYLE], "instance": [STYLE], "conditional": [STYLE, "bricks", "mosaic", "waves"]}
CONTRASTS = (1.0, 0.5, 0.2)
WEIGHTS = {"content_weight": 3.0, "style_weight": 10.0}
RECIPE = {"width": 8, "blocks": 1, "batch": 4, "lr": 3e-3, "seed": 0}


def write_normalization(folder: Path, sources: str, tell: Callable[[str], None]) -> None:
    """Write both figures and the table; recomputed only when the sources have changed."""
    stem = folder / "normalization"
    if cached_demo(stem, sources):
        return
    tell("training with three norms")
    folder.mkdir(parents=True, exist_ok=True)
    model, scenes = load_model("builtin:shapes-vgg"), draw_scenes(16, split="test").images
    networks = trained(model, draw_scenes(200).images, steps=200)
    write_file(folder / "normalization-numbers.md", numbers(networks, model, scenes))
    write_file(folder / "normalization-losses.html", picture([[losses(networks)]], "loss over the steps"))
    write_file(
        folder / "normalization.html", picture(rows(networks, scenes[:2]), "the same at less contrast")
    )
    write_file(folder / "normalization.json", json.dumps({"sources": sources}))


def trained(model: Model, scenes: Tensor, steps: int) -> dict[str, TrainedNetwork]:
    """The same network trained with each norm, from the same initial weights on the same images."""
    networks = {}
    for norm, styles in STYLES.items():
        style = {"styles": [f"builtin:{name}" for name in styles], "names": styles, "norm": norm}
        parameters = {**style, **WEIGHTS, **RECIPE, "steps": steps, "progress": False}
        networks[norm] = run("fast_style_fit", model=model, dataset=scenes, **parameters)
    return networks


def paler(images: Tensor, contrast: float) -> Tensor:
    """The images with this fraction of their contrast, and the same mean."""
    mean = images.mean((1, 2, 3), keepdim=True)
    return mean + contrast * (images - mean)


def painted(network: TrainedNetwork, images: Tensor) -> Tensor:
    return methods["fast_style"](images, network, style=STYLE).stylized


@torch.no_grad()
def measured(network: TrainedNetwork, loss: StyleLoss, images: Tensor) -> tuple[float, float]:
    """The weighted style and content losses of a network's outputs for the images."""
    texture = load_texture(STYLE)[None]
    targets = StyleTargets(loss.content_features(images), loss.style_grams(texture, torch.ones(1)))
    *features, content = loss.features(painted(network, images))
    style, content = (
        loss.style_loss([gram_matrix(maps) for maps in features], targets.style_grams),
        relative_error(content, targets.content),
    )
    return WEIGHTS["style_weight"] * float(style.mean()), WEIGHTS["content_weight"] * float(content.mean())


def numbers(networks: Mapping[str, TrainedNetwork], model: Model, scenes: Tensor) -> str:
    """A table of the losses of test scenes at several contrasts."""
    loss = StyleLoss(model)
    headers = [f"{what}, {contrast:.0%}" for contrast in CONTRASTS for what in ("style", "content")]
    lines = [f"| norm | {' | '.join(headers)} |", "| --- " * (1 + len(headers)) + "|"]
    for norm, network in networks.items():
        values = [value for c in CONTRASTS for value in measured(network, loss, paler(scenes, c))]
        lines.append(f"| {norm} | " + " | ".join(f"{value:.2f}" for value in values) + " |")
    return "\n".join(lines) + "\n"


def losses(networks: Mapping[str, TrainedNetwork]) -> Panel:
    """The loss of each training over its steps, means of ten steps."""
    figure = charts.new_figure(2.8)
    axes = figure.subplots()
    for norm, network in networks.items():
        smooth = network.losses.unfold(0, 10, 1).mean(1)
        axes.plot(range(10, 10 + len(smooth)), smooth, label=f"{norm}, styles: {len(network.labels)}")
    axes.set(xlabel="step", ylabel="loss", ylim=(0, None))
    axes.legend(fontsize=8, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    stream = io.BytesIO()
    figure.savefig(stream, format="png", bbox_inches="tight")
    return Panel(to_tensor(Image.open(stream)))


def rows(networks: Mapping[str, TrainedNetwork], scenes: Tensor) -> list[list[Panel]]:
    """A row for each scene at each of two contrasts: the image and the networks' outputs."""
    panels = []
    for scene in scenes.split(1):
        for contrast in (CONTRASTS[0], CONTRASTS[-1]):
            pale = paler(scene, contrast)
            outputs = [Panel(painted(network, pale)[0], norm) for norm, network in networks.items()]
            panels.append([Panel(pale[0], f"{contrast:.0%} of its contrast"), *outputs])
    return panels
