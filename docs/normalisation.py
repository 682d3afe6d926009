"""The pictures and numbers of the page on normalisation: three short trainings when the book is built."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from method_pages import kept
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import to_tensor

from phosphene import Model, load_model, methods, run
from phosphene.builtin.scenes import draw_scenes
from phosphene.builtin.textures import load_texture
from phosphene.images import charts
from phosphene.optimize import gram_matrix
from phosphene.results import Panel, TrainedNetwork
from phosphene_plugins.pages._single_file_page import picture, write_whole
from phosphene_plugins.style._style_loss import Aim, Perception, relative

STYLE = "swirls"
#: Each norm with the styles that its network learns.
STYLES = {"batch": [STYLE], "instance": [STYLE], "conditional": [STYLE, "bricks", "mosaic", "waves"]}
CONTRASTS = (1.0, 0.5, 0.2)
WEIGHTS = {"content_weight": 3.0, "style_weight": 10.0}
RECIPE = {"width": 8, "blocks": 1, "batch": 4, "lr": 3e-3, "seed": 0}


def write_normalisation(folder: Path, sources: str, tell: Callable[[str], None]) -> None:
    """Write both pictures and the table; again only where the sources have changed."""
    stem = folder / "normalisation"
    if kept(stem, sources):
        return
    tell("training with three norms")
    folder.mkdir(parents=True, exist_ok=True)
    model, scenes = load_model("builtin:shapes-vgg"), draw_scenes(16, split="test").images
    networks = trained(model, draw_scenes(200).images, steps=200)
    write_whole(folder / "normalisation-numbers.md", numbers(networks, model, scenes))
    write_whole(folder / "normalisation-losses.html", picture([[losses(networks)]], "loss over the steps"))
    write_whole(
        folder / "normalisation.html", picture(rows(networks, scenes[:2]), "the same at less contrast")
    )
    write_whole(folder / "normalisation.json", json.dumps({"sources": sources}))


def trained(model: Model, scenes: Tensor, steps: int) -> dict[str, TrainedNetwork]:
    """The same network with each norm, from the same beginning on the same pictures."""
    networks = {}
    for norm, styles in STYLES.items():
        given = {"styles": [f"builtin:{name}" for name in styles], "names": styles, "norm": norm}
        how = {**given, **WEIGHTS, **RECIPE, "steps": steps, "progress": False}
        networks[norm] = run("fast_style_fit", model=model, dataset=scenes, **how)
    return networks


def paler(images: Tensor, contrast: float) -> Tensor:
    """The images with so much of their contrast, and the same mean."""
    mean = images.mean((1, 2, 3), keepdim=True)
    return mean + contrast * (images - mean)


def painted(made: TrainedNetwork, images: Tensor) -> Tensor:
    return methods["fast_style"](images, made, style=STYLE).stylized


@torch.no_grad()
def measured(made: TrainedNetwork, look: Perception, images: Tensor) -> tuple[float, float]:
    """The weighted losses of style and content of what a network paints of the images."""
    aim = Aim(look.content(images), look.style(load_texture(STYLE)[None], torch.ones(1)))
    *seen, content = look.maps(painted(made, images))
    style, content = (
        look.style_loss([gram_matrix(maps) for maps in seen], aim),
        relative(content, aim.content),
    )
    return WEIGHTS["style_weight"] * float(style.mean()), WEIGHTS["content_weight"] * float(content.mean())


def numbers(networks: Mapping[str, TrainedNetwork], model: Model, scenes: Tensor) -> str:
    """The losses of unseen scenes at several contrasts, as a table."""
    look = Perception(model)
    heads = [f"{what}, {contrast:.0%}" for contrast in CONTRASTS for what in ("style", "content")]
    lines = [f"| norm | {' | '.join(heads)} |", "| --- " * (1 + len(heads)) + "|"]
    for norm, made in networks.items():
        found = [value for c in CONTRASTS for value in measured(made, look, paler(scenes, c))]
        lines.append(f"| {norm} | " + " | ".join(f"{value:.2f}" for value in found) + " |")
    return "\n".join(lines) + "\n"


def losses(networks: Mapping[str, TrainedNetwork]) -> Panel:
    """The course of each training, means of ten steps."""
    figure = charts.new_figure(2.8)
    axes = figure.subplots()
    for norm, made in networks.items():
        smooth = made.losses.unfold(0, 10, 1).mean(1)
        axes.plot(range(10, 10 + len(smooth)), smooth, label=f"{norm}, styles: {len(made.labels)}")
    axes.set(xlabel="step", ylabel="loss", ylim=(0, None))
    axes.legend(fontsize=8, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    stream = io.BytesIO()
    figure.savefig(stream, format="png", bbox_inches="tight")
    return Panel(to_tensor(Image.open(stream)))


def rows(networks: Mapping[str, TrainedNetwork], scenes: Tensor) -> list[list[Panel]]:
    """Each scene at two contrasts, and what the networks make of it."""
    shown = []
    for scene in scenes.split(1):
        for contrast in (CONTRASTS[0], CONTRASTS[-1]):
            pale = paler(scene, contrast)
            made = [Panel(painted(m, pale)[0], norm) for norm, m in networks.items()]
            shown.append([Panel(pale[0], f"{contrast:.0%} of its contrast"), *made])
    return shown
