"""The table of the page on defenses about distillation: success rates of attacks on model and student."""

import torch

from phosphene import TensorDataset, load_model, methods, run
from phosphene.builtin.scenes import CLASSES, draw_scenes

EPS, TEST_IMAGES, TRAINING_IMAGES = 4 / 255, 16, 300
RECIPE = {"temperature": 20, "steps": 100, "batch": 16, "lr": 1e-3}
ATTACKS = {
    "fgsm": {"eps": EPS},
    "pgd": {"eps": EPS, "step_size": EPS / 6, "steps": 20, "seed": 0},
    "apgd": {"eps": EPS, "loss": "dlr", "steps": 20, "seed": 0},
    "carlini_wagner": {"steps": 40, "search_steps": 3},
}


def main() -> None:
    """Train a student, and attack the model and the student."""
    training = draw_scenes(TRAINING_IMAGES)
    test = draw_scenes(TEST_IMAGES, split="test", start=50_000)
    dataset = TensorDataset(training.images, [CLASSES[label] for label in training.labels.tolist()])
    model = load_model("builtin:shapes-vgg")
    model.module.to(memory_format=torch.channels_last)
    student = run("defensive_distillation", model=model, dataset=dataset, **RECIPE, seed=0).model()
    for name, classifier in (("the model", model), ("the student", student)):
        correct = classifier(test.images).argmax(1) == test.labels
        cells = [f"{correct.float().mean():.0%}"]
        for attack, params in ATTACKS.items():
            result = methods[attack](classifier, test.images[correct], test.labels[correct], **params)
            cells.append(f"{result.success.float().mean():.0%}")
            if attack == "carlini_wagner":
                cells.append(f"{result.distance('l2')[result.success].median():.2f}")
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
