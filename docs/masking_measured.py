"""The table of the page on attacks: which checks detect which kind of gradient masking."""

import torch
from torch import Tensor

from phosphene import Model, load_model, methods
from phosphene.builtin.scenes import draw_scenes
from phosphene.optimize import straight_through

MODEL, IMAGES, EPS, STEPS, QUERIES = "builtin:shapes-resnet", 12, 4 / 255, 10, 120


def mirrored_gradient(images: Tensor) -> Tensor:
    """The identity, with the gradient of the mirror image."""
    return straight_through(images, lambda x: x, lambda x: x.flip(3))


def scale_logits(model: Model, factor: float) -> Model:
    """The same predictions with larger logits."""
    scaled = model.copy()
    with torch.no_grad():
        scaled.module.fc.weight.mul_(factor), scaled.module.fc.bias.mul_(factor)
    return scaled


def main() -> None:
    """Print a row for every model."""
    plain, scenes = load_model(MODEL), draw_scenes(IMAGES, seed=3, split="test")
    models = {
        "as it is": plain,
        "pixels rounded to 8 levels": plain.defended(lambda x: (7 * x).round() / 7, "rounded"),
        "logits times 1000": scale_logits(plain, 1000),
        "logits times 30": scale_logits(plain, 30),
        "noise of 0.05 on its pixels": plain.defended(lambda x: x + 0.05 * torch.randn_like(x), "noise"),
        "the gradient of the mirror image": plain.defended(mirrored_gradient, "mirrored gradient"),
        "`bit_depth(bits=3)`": load_model(f"defended:bit_depth(bits=3)|{MODEL}"),
        "`jpeg(quality=75)`": load_model(f"defended:jpeg(quality=75)|{MODEL}"),
    }
    check = methods["gradient_masking_checks"]
    for name, model in models.items():
        params = {"eps": EPS, "steps": STEPS, "max_queries": QUERIES, "seed": 1}
        result = check(model, scenes.images, scenes.labels, **params)
        suspicious = ", ".join(c.name for c in result.checks if c.verdict == "suspicious") or "nothing"
        print(f"| {name} | {float(result.success_by_steps[-1]):.0%} | {suspicious} |", flush=True)


if __name__ == "__main__":
    main()
