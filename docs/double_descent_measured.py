"""The sweep of the page on double descent: errors of networks of many widths after many numbers of epochs.

Usage: python docs/double_descent_measured.py

Writes docs/double_descent.json after each training and continues there if it is interrupted. The complete
sweep takes about ten minutes on one core.
"""

import json
from itertools import product
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from phosphene import Model, load_model, methods
from phosphene.builtin.scenes import CLASSES, Scenes, draw_scenes
from phosphene.files import write_file
from phosphene.images import resize

FILE = Path(__file__).with_suffix("").with_name("double_descent.json")
#: Hidden units of the network, and epochs after which it is measured.
WIDTHS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 24, 32, 48, 64, 128, 256)
EPOCHS = (10, 20, 50, 100, 200, 500, 1000, 2000)
SEEDS = (0, 1, 2, 3)
SIDE, TRAINING, TEST, LABEL_NOISE = 8, 400, 1000, 0.4
BATCH, LEARNING_RATE = 100, 1e-3
#: Robust error: PGD within this radius (linf), on the first test images.
EPS, ATTACKED = 1 / 255, 300


def main() -> None:
    """Train every width from every seed that is not in the file yet."""
    records = json.loads(FILE.read_text()) if FILE.is_file() else []
    done = {(record["width"], record["seed"]) for record in records}
    test = draw_scenes(TEST, split="test", biased=True)
    for seed, width in product(SEEDS, WIDTHS):
        if (width, seed) not in done:
            records.append(measure(width, seed, test))
            write_file(FILE, json.dumps(records, indent=1) + "\n")
            last = {name: values[-1] for name, values in records[-1].items() if isinstance(values, list)}
            print(f"width {width}, seed {seed}: {last}", flush=True)


def measure(width: int, seed: int, test: Scenes) -> dict[str, object]:
    """Training, test and robust error of one network after each of ``EPOCHS``."""
    scenes = draw_scenes(TRAINING, biased=True)  # the same images and labels for every width and seed
    images, test_images = (resize(s.images, (SIDE, SIDE)).clamp(0, 1) for s in (scenes, test))
    random = torch.Generator().manual_seed(0)
    labels = scenes.labels.clone()
    changed = torch.rand(TRAINING, generator=random) < LABEL_NOISE
    labels[changed] = torch.randint(len(CLASSES), (int(changed.sum()),), generator=random)

    torch.manual_seed(seed)
    random.manual_seed(seed)
    network = nn.Sequential(
        nn.Flatten(), nn.Linear(3 * SIDE**2, width), nn.ReLU(), nn.Linear(width, len(CLASSES))
    )
    mean, std = images.mean((0, 2, 3)), images.std((0, 2, 3))
    shape = (3, SIDE, SIDE)
    model = load_model(network, input_size=shape, mean=mean.tolist(), std=std.tolist(), classes=CLASSES)
    inputs = model.normalize(images)
    optimizer = torch.optim.Adam(network.parameters(), LEARNING_RATE)
    curves: dict[str, list[float]] = {"training": [], "test": [], "robust": []}
    for epoch in range(1, EPOCHS[-1] + 1):
        for rows in torch.randperm(TRAINING, generator=random).split(BATCH):
            optimizer.zero_grad()
            F.cross_entropy(network(inputs[rows]), labels[rows]).backward()
            optimizer.step()
        if epoch in EPOCHS:
            curves["training"].append(error(model, images, labels))
            curves["test"].append(error(model, test_images, test.labels))
            attacked = test_images[:ATTACKED], test.labels[:ATTACKED]
            options = {"eps": EPS, "step_size": EPS / 4, "steps": 10, "seed": 0}
            examples = methods["pgd"](model, *attacked, **options).adversarial
            curves["robust"].append(error(model, examples, attacked[1]))
    parameters = sum(weight.numel() for weight in network.parameters())
    return {"width": width, "seed": seed, "parameters": parameters, **curves}


@torch.no_grad()
def error(model: Model, images: Tensor, labels: Tensor) -> float:
    """The share of images that are not assigned their label."""
    return round(float((model(images).argmax(1) != labels).double().mean()), 4)


if __name__ == "__main__":
    main()
