"""The table of the page on attacks: which checks find out which way of hiding a gradient."""

import torch
from torch import Tensor

from phosphene import Model, load_model, methods
from phosphene.builtin.scenes import draw_scenes
from phosphene.optimize import straight_through

MODEL, PICTURES, EPS, STEPS, QUERIES = "builtin:shapes-resnet", 12, 4 / 255, 10, 120


def elsewhere(images: Tensor) -> Tensor:
    """The picture as it is, with the gradient of its mirror image."""
    return straight_through(images, lambda pictures: pictures, lambda pictures: pictures.flip(3))


def louder(model: Model, factor: float) -> Model:
    """The same answers, more sure of themselves."""
    made = model.copy()
    with torch.no_grad():
        made.module.fc.weight.mul_(factor), made.module.fc.bias.mul_(factor)
    return made


def main() -> None:
    """Print a row for every model."""
    plain, scenes = load_model(MODEL), draw_scenes(PICTURES, seed=3, split="test")
    models = {
        "as it is": plain,
        "pixels rounded to 8 levels": plain.defended(lambda x: (7 * x).round() / 7, "rounded"),
        "logits times 1000": louder(plain, 1000),
        "logits times 30": louder(plain, 30),
        "noise of 0.05 on its pixels": plain.defended(lambda x: x + 0.05 * torch.randn_like(x), "noise"),
        "the gradient of the mirror image": plain.defended(elsewhere, "elsewhere"),
        "`bit_depth(bits=3)`": load_model(f"defended:bit_depth(bits=3)|{MODEL}"),
        "`jpeg(quality=75)`": load_model(f"defended:jpeg(quality=75)|{MODEL}"),
    }
    check = methods["gradient_masking_checks"]
    for name, model in models.items():
        found = check(model, scenes.images, scenes.labels, eps=EPS, steps=STEPS, max_queries=QUERIES, seed=1)
        signs = ", ".join(c.name for c in found.checks if c.verdict == "suspicious") or "nothing"
        print(f"| {name} | {float(found.success_by_steps[-1]):.0%} | {signs} |", flush=True)


if __name__ == "__main__":
    main()
