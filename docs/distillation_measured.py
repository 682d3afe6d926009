"""The table of the page on defences about distillation: which attacks it stops, and which it does not."""

import torch

from phosphene import TensorDataset, load_model, methods, run
from phosphene.builtin.scenes import CLASSES, draw_scenes

EPS, PICTURES, SCENES = 4 / 255, 16, 300
RECIPE = {"temperature": 20, "steps": 100, "batch": 16, "lr": 1e-3}
ATTACKS = {
    "fgsm": {"eps": EPS},
    "pgd": {"eps": EPS, "step_size": EPS / 6, "steps": 20, "seed": 0},
    "apgd": {"eps": EPS, "loss": "dlr", "steps": 20, "seed": 0},
    "carlini_wagner": {"steps": 40, "search_steps": 3},
}


def main() -> None:
    """Train a student, and attack the model and the student."""
    learned, seen = draw_scenes(SCENES), draw_scenes(PICTURES, split="test", start=50_000)
    dataset = TensorDataset(learned.images, [CLASSES[label] for label in learned.labels.tolist()])
    model = load_model("builtin:shapes-vgg")
    model.module.to(memory_format=torch.channels_last)
    student = run("defensive_distillation", model=model, dataset=dataset, **RECIPE, seed=0).model()
    for name, victim in (("the model", model), ("the student", student)):
        right = victim(seen.images).argmax(1) == seen.labels
        cells = [f"{right.float().mean():.0%}"]
        for attack, params in ATTACKS.items():
            found = methods[attack](victim, seen.images[right], seen.labels[right], **params)
            cells.append(f"{found.success.float().mean():.0%}")
            if attack == "carlini_wagner":
                cells.append(f"{found.distance('l2')[found.success].median():.2f}")
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
