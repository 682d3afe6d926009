"""Figures and numbers of the page about one image and one transformer, computed when the book is built."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from method_pages import cached_demo
from torch import Tensor

from phosphene import Model, load_model, max_batch, methods
from phosphene.builtin.scenes import Scenes, draw_scenes
from phosphene.data import localization
from phosphene.files import write_file
from phosphene.results import Panel
from phosphene_plugins.pages._single_file_page import panel_rows, picture

#: Maps of the true class: the title of each with its method and parameters.
MAPS: dict[str, tuple[str, dict[str, Any]]] = {
    "attention rollout": ("attention_rollout", {}),
    "gradient attention": ("gradient_attention", {}),
    "LeGrad": ("legrad", {}),
    "LRP, epsilon": ("lrp", {}),
    "LRP, epsilon_gamma_box": ("lrp", {"rule": "epsilon_gamma_box"}),
    "AttnLRP, epsilon_gamma_box": ("lrp", {"rule": "epsilon_gamma_box", "attention": "attn_lrp"}),
    "saliency": ("saliency", {}),
    "gradient x input": ("gradient_x_input", {}),
    "SmoothGrad": ("smooth_grad", {"seed": 0}),
    "integrated gradients": ("integrated_gradients", {}),
    "guided backprop": ("guided_backprop", {}),
    "Grad-CAM": ("grad_cam", {}),
    "Grad-CAM++": ("grad_cam_plus_plus", {}),
    "HiResCAM": ("hires_cam", {}),
    "LayerCAM": ("layer_cam", {}),
    "Eigen-CAM": ("eigen_cam", {}),
    "Score-CAM": ("score_cam", {}),
    "occlusion": ("occlusion", {}),
    "RISE": ("rise", {"seed": 0}),
}
#: Not among the numbers: many passes for each image.
SLOW = {"SmoothGrad", "integrated gradients", "Score-CAM", "occlusion", "RISE"}
#: Panels in a row of the maps.
PANELS = 5
#: Results that are no map of the class, on the same image.
OTHERS: dict[str, dict[str, Any]] = {
    "attention_maps": {"layers": ["blocks.0.attn", "blocks.3.attn"]},
    "head_ablation": {},
    "logit_lens": {},
    "patch_pca": {},
    "patch_similarity": {"position": (34, 30)},
    "concept_relevance": {"layer": "stem.14", "k": 4},
}


def write_transformer(folder: Path, sources: str, tell: Callable[[str], None]) -> None:
    """Write the figures and the table of numbers; recomputed only when the sources have changed."""
    stem = folder / "one-transformer"
    if cached_demo(stem, sources):
        return
    tell("drawing one image by every method for transformers")
    folder.mkdir(parents=True, exist_ok=True)
    model = load_model("builtin:shapes-vit")
    scene = draw_scenes(4, seed=3, split="test")
    image, label = scene.images[3:4], int(scene.labels[3])
    write_file(folder / "one-transformer-numbers.md", numbers(model, draw_scenes(200, seed=5, split="test")))
    write_file(folder / "one-transformer-maps.html", picture(maps(model, image, label), "maps of one image"))
    for name, params in OTHERS.items():
        roles = {part.name for part in methods[name].spec.inputs}
        target = {"target": label} if "target" in roles else {}
        result = methods[name](model, images=image, **target, **params)
        html = picture(panel_rows(result), f"{name} of one image")
        write_file(folder / f"one-transformer-{name}.html", html)
    write_file(folder / "one-transformer.json", json.dumps({"sources": sources}))


def compute(model: Model, title: str, images: Tensor, labels: list[int]) -> Any:
    """The result of one of the maps."""
    name, params = MAPS[title]
    target = {} if name in ("eigen_cam", "attention_rollout") else {"target": labels}
    return methods[name](model, images=images, **target, **params)


def maps(model: Model, image: Tensor, label: int) -> list[list[Panel]]:
    """The image and each method's map, in rows of equal length."""
    panels = [Panel(image[0], model.class_name(label))]
    for title in MAPS:
        drawn = compute(model, title, image, [label]).panels()[0][1]
        panels.append(Panel(drawn.image, title, is_output=True))
    return [panels[start : start + PANELS] for start in range(0, len(panels), PANELS)]


def numbers(model: Model, scenes: Scenes) -> str:
    """Where the maps of scenes are largest: in the object, or close to it; a random pixel beside them."""
    lines = ["| map | maximum in the object | within 4 px of it |", "| --- | ---: | ---: |"]
    labels = scenes.labels.tolist()
    for title in (title for title in MAPS if title not in SLOW):
        with max_batch(50):
            hits = localization(compute(model, title, scenes.images, labels).heat(), scenes.masks)
        lines.append(f"| {title} | {hits.inside:.2f} | {hits.near:.2f} |")
    lines.append(f"| a random pixel | {hits.chance_inside:.2f} | {hits.chance_near:.2f} |")
    return "\n".join(lines) + "\n"
