"""Draw the images of the README with the bundled networks: ``python docs/readme_images.py``."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import Tensor

from phosphene import Result, SceneDataset, load_model, methods, run
from phosphene.images import to_display

FOLDER = Path(__file__).parent / "_static" / "readme"
#: Inches a side of one image, and pixels an inch.
SIDE, DPI = 1.3, 110


def write_grid(name: str, rows: list[list[tuple[Tensor, str]]]) -> None:
    """Write a grid of images (C, H, W) with titles above them."""
    columns = max(map(len, rows))
    figure, axes = plt.subplots(
        len(rows), columns, figsize=(SIDE * columns, (SIDE + 0.22) * len(rows)), dpi=DPI, squeeze=False
    )
    for row, row_axes in zip(rows, axes, strict=True):
        for axis in row_axes:
            axis.set_axis_off()
        for (image, title), axis in zip(row, row_axes, strict=False):
            axis.imshow(np.asarray(to_display(image).permute(1, 2, 0)), interpolation="bilinear")
            axis.set_title(title, fontsize=8, pad=3)
    figure.tight_layout(pad=0.3)
    FOLDER.mkdir(parents=True, exist_ok=True)
    figure.savefig(FOLDER / f"{name}.png")
    plt.close(figure)


def output_images(result: Result) -> list[tuple[Tensor, str]]:
    """The images that the method made, with their titles."""
    return [(p.image, p.title) for group in result.panels() for p in group if p.is_output]


def attribution() -> None:
    """Two scenes, and the maps of five methods for the predicted class."""
    names = {"grad_cam": "Grad-CAM", "integrated_gradients": "integrated gradients", "lrp": "LRP"}
    names |= {"occlusion": "occlusion", "rise": "RISE"}
    images = run("saliency", images="builtin:scenes/4", progress=False).images[[0, 3]]
    columns = []
    for name in names:
        seed = {methods[name].seed: 0} if methods[name].seed else {}
        result = run(name, images=images, progress=False, **seed, **methods[name].spec.demonstration()[1])
        columns.append([image for image, _ in output_images(result)])
    model = load_model("builtin:shapes-vgg")
    labels = map(model.class_name, model(images).argmax(1).tolist())
    titles = list(names.values())
    rows = [
        [(image, label), *zip((column[n] for column in columns), titles, strict=True)]
        for n, (image, label) in enumerate(zip(images, labels, strict=True))
    ]
    write_grid("attribution", rows)


def synthesis() -> None:
    """The images that maximize the scores of five classes."""
    parameters = methods["class_visualization"].spec.demo
    drawn = run("class_visualization", seed=0, progress=False, **parameters)
    write_grid("synthesis", [output_images(drawn)])


def attacks() -> None:
    """Scenes, their adversarial examples, and the amplified perturbations."""
    attacked = run("pgd", images="builtin:scenes/2", eps=8 / 255, seed=0, progress=False)
    write_grid("attacks", [[(p.image, p.title) for group in attacked.panels() for p in group]])


def style() -> None:
    """One scene in the styles of the bundled fast style network."""
    image = SceneDataset(4, size=(192, 192)).read([3])
    row = [(image[0], "scene")]
    for name in ("bricks", "swirls", "mosaic", "waves"):
        result = run("fast_style", images=image, style=name, progress=False)
        row.append((output_images(result)[0][0], name))
    mixture = run("fast_style", images=image, style={"swirls": 1, "waves": 1}, progress=False)
    row.append((output_images(mixture)[0][0], "swirls and waves"))
    write_grid("style", [row])


if __name__ == "__main__":
    torch.set_num_threads(1)
    for draw in (attribution, synthesis, attacks, style):
        draw()
