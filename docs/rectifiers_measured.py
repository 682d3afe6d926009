"""The comparison of ReLU, leaky ReLU and ELU: the same network trained with each, sparsity and information.

Usage: python docs/rectifiers_measured.py

Writes docs/rectifiers.json after each training and continues there if it is interrupted. The complete
comparison takes about five minutes on one core.
"""

import json
from collections.abc import Callable
from itertools import product
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from phosphene.builtin.networks import MEAN, STD
from phosphene.builtin.scenes import draw_scenes
from phosphene.files import write_file
from phosphene.images import resize

FILE = Path(__file__).with_suffix("").with_name("rectifiers.json")
RECTIFIERS: dict[str, Callable[[], nn.Module]] = {
    "ReLU": nn.ReLU,
    "leaky ReLU (0.1)": lambda: nn.LeakyReLU(0.1),
    "ELU": nn.ELU,
}
SEEDS = (0, 1, 2)
WIDTHS = (16, 32, 64)
TRAINING, TEST, EPOCHS, BATCH, LEARNING_RATE = 4000, 1000, 12, 50, 3e-3
#: The linear decoder: it predicts the image at this side, and is fitted with this penalty.
DECODED_SIDE, RIDGE = 8, 1.0
#: An activation counts as zero below this share of its channel's largest absolute value.
NEAR_ZERO = 0.01


def main() -> None:
    """Train with every activation from every seed that is not in the file yet."""
    records = json.loads(FILE.read_text()) if FILE.is_file() else []
    done = {(record["activation"], record["seed"]) for record in records}
    training, test = draw_scenes(TRAINING), draw_scenes(TEST, split="test")
    mean, std = torch.tensor([MEAN, STD])[:, :, None, None]
    data = [((s.images - mean) / std, s.labels) for s in (training, test)]
    for seed, name in product(SEEDS, RECTIFIERS):
        if (name, seed) in done:
            continue
        network = train(RECTIFIERS[name], *data[0], seed)
        records.append({"activation": name, "seed": seed, **measure(network, *data[1])})
        write_file(FILE, json.dumps(records, indent=1) + "\n")
        print(records[-1], flush=True)


def train(rectifier: Callable[[], nn.Module], images: Tensor, labels: Tensor, seed: int) -> nn.Sequential:
    """The network after training; initial weights and order of the images depend on the seed only."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for inputs, outputs in zip((3, *WIDTHS), WIDTHS, strict=False):
        convolution = nn.Conv2d(inputs, outputs, 3, stride=2, padding=1)
        layers.append(nn.Sequential(convolution, nn.BatchNorm2d(outputs), rectifier()))
    network = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * WIDTHS[-1], 10))
    optimizer = torch.optim.Adam(network.parameters(), LEARNING_RATE)
    steps = EPOCHS * TRAINING // BATCH
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, steps)
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(images)).split(BATCH):
            optimizer.zero_grad()
            F.cross_entropy(network(images[rows]), labels[rows]).backward()
            optimizer.step()
            schedule.step()
    return network.eval()


@torch.no_grad()
def measure(network: nn.Sequential, images: Tensor, labels: Tensor) -> dict[str, object]:
    """Accuracy, and of each layer the sparsity and the share of the image that a linear decoder recovers."""
    targets = resize(images, (DECODED_SIDE, DECODED_SIDE)).flatten(1).double()
    sparsity, recovered, x = [], [], images
    for layer in network[: len(WIDTHS)]:
        x = layer(x)
        largest = x.abs().amax((0, 2, 3), keepdim=True)
        sparsity.append(round(float((x.abs() <= NEAR_ZERO * largest).double().mean()), 4))
        recovered.append(round(decoded_share(x, targets), 4))
    accuracy = float((network(images).argmax(1) == labels).double().mean())
    return {"accuracy": round(accuracy, 4), "sparsity": sparsity, "recovered": recovered}


def decoded_share(maps: Tensor, targets: Tensor) -> float:
    """Share of the variance of small images that ridge regression recovers, on the half not fitted to.

    From the features averaged over an 8 x 8 grid (N, 64 C) to the images' pixels (N, 192).
    """
    features = F.adaptive_avg_pool2d(maps, DECODED_SIDE).flatten(1).double()
    features = (features - features.mean(0)) / features.std()
    half = len(features) // 2
    center = targets[:half].mean(0)
    kernel = features @ features.T
    fitted = torch.linalg.solve(
        kernel[:half, :half] + RIDGE * torch.eye(half).double(), targets[:half] - center
    )
    residual = targets[half:] - center - kernel[half:, :half] @ fitted
    return 1 - float(residual.square().sum() / (targets[half:] - targets[half:].mean(0)).square().sum())


if __name__ == "__main__":
    main()
