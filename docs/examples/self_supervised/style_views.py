"""SimCLR with and without style augmentation, on generated scenes, evaluated by k-NN and a linear probe.

python docs/examples/self_supervised/style_views.py
"""

from __future__ import annotations

from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from torch import Tensor, nn
from torchvision.transforms import v2

from phosphene import load_result
from phosphene.builtin.scenes import draw_scenes
from phosphene.results import TrainedNetwork
from phosphene_plugins.style.style_augmentation import StyleAugmentation

SIDE = 32
TEMPERATURE = 0.2
NEIGHBORS = 10


def encoder_network() -> nn.Sequential:
    """Four convolutions and average pooling: images (N, 3, SIDE, SIDE) -> representations (N, 128)."""
    layers: list[nn.Module] = []
    for inputs, outputs in ((3, 16), (16, 32), (32, 64), (64, 128)):
        stride = 1 if inputs == 3 else 2
        layers += [nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


def augmentations(stylizer: TrainedNetwork | None) -> v2.Compose:
    """SimCLR's augmentations, drawn for each image of a batch, and with a stylizer style augmentation."""
    jitter = v2.ColorJitter(0.4, 0.4, 0.4, 0.1)
    geometry_and_color = [
        v2.RandomResizedCrop(SIDE, (0.5, 1.0), antialias=True),
        v2.RandomHorizontalFlip(),
        jitter,
    ]
    per_image = v2.Compose([*geometry_and_color, v2.RandomGrayscale(0.2)])
    transforms: list[nn.Module] = [
        v2.Lambda(lambda images: torch.stack([per_image(image) for image in images]))
    ]
    if stylizer is not None:
        transforms.insert(0, StyleAugmentation(stylizer, p=0.5, strength=(0.1, 0.5)))
    return v2.Compose(transforms)


def info_nce(first: Tensor, second: Tensor) -> Tensor:
    """InfoNCE: mean -log softmax of each view's similarity to its image's other view, among all views."""
    z = F.normalize(torch.cat([first, second]), dim=1)
    similarity = z @ z.T / TEMPERATURE
    similarity.fill_diagonal_(-torch.inf)
    partner = torch.arange(len(z)).roll(len(first))
    return F.cross_entropy(similarity, partner)


def train_encoder(images: Tensor, views: v2.Compose, *, steps: int, batch: int, seed: int) -> nn.Sequential:
    """An encoder trained by InfoNCE on pairs of views, in eval mode."""
    torch.manual_seed(seed)
    encoder, head = encoder_network(), nn.Sequential(nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 64))
    optimizer = torch.optim.AdamW([*encoder.parameters(), *head.parameters()], 2e-3, weight_decay=1e-4)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        batch_images = images[torch.randint(len(images), (batch,))]
        loss = info_nce(*(head(encoder(views(batch_images))) for _ in range(2)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
    return encoder.eval()


@torch.no_grad()
def knn_accuracy(train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor) -> float:
    """Accuracy of a k-nearest-neighbor classifier by cosine similarity."""
    similarity = F.normalize(test, dim=1) @ F.normalize(train, dim=1).T
    votes = F.one_hot(train_labels[similarity.topk(min(NEIGHBORS, len(train))).indices]).sum(1)
    return (votes.argmax(1) == test_labels).double().mean().item()


def linear_probe(train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor) -> float:
    """Accuracy of a linear classifier, fitted by L-BFGS to standardized representations."""
    mean, std = train.mean(0), train.std(0) + 1e-6
    train, test = (train - mean) / std, (test - mean) / std
    linear = nn.Linear(train.shape[1], int(train_labels.max()) + 1)
    nn.init.zeros_(linear.weight)
    optimizer = torch.optim.LBFGS(linear.parameters(), max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(linear(train), train_labels) + 1e-3 * linear.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return (linear(test).argmax(1) == test_labels).double().mean().item()


def evaluate(encoder: nn.Module, count: int) -> list[float]:
    """Accuracies on ``count`` test scenes for shapes, then for backgrounds, by k-NN and by a linear probe."""
    resize = v2.Resize(SIDE, antialias=True)
    train_scenes, test_scenes = draw_scenes(count, seed=1), draw_scenes(count, split="test")
    with torch.no_grad():
        train, test = (encoder(resize(scenes.images)) for scenes in (train_scenes, test_scenes))
    shapes = (train_scenes.labels, test_scenes.labels)
    backgrounds = (train_scenes.backgrounds, test_scenes.backgrounds)
    return [
        accuracy(train, train_labels, test, test_labels)
        for train_labels, test_labels in (shapes, backgrounds)
        for accuracy in (knn_accuracy, linear_probe)
    ]


def main(
    scenes: Annotated[int, typer.Option(help="number of training images, without labels")] = 1000,
    labeled: Annotated[int, typer.Option(help="number of labeled images for the evaluation")] = 500,
    steps: Annotated[int, typer.Option(help="number of training steps")] = 120,
    batch: Annotated[int, typer.Option(help="number of images per step")] = 64,
    seeds: Annotated[int, typer.Option(help="number of runs for each row of the table")] = 3,
) -> None:
    """Print accuracies with and without style augmentation, mean and standard deviation over seeds."""
    stylizer = load_result("builtin:shapes-styles")
    assert isinstance(stylizer, TrainedNetwork)
    images = draw_scenes(scenes).images
    rows = {
        "no training": (None, 0),
        "crop, flip, color": (None, steps),
        "crop, flip, color, style": (stylizer, steps),
    }
    print("| views | shape: k-NN | linear | background: k-NN | linear |\n|" + " --- |" * 5)
    for name, (row_stylizer, row_steps) in rows.items():
        results = []
        for seed in range(seeds):
            encoder = train_encoder(
                images, augmentations(row_stylizer), steps=row_steps, batch=batch, seed=seed
            )
            results.append(evaluate(encoder, labeled))
        accuracies = torch.tensor(results, dtype=torch.float64)
        spread = accuracies.std(0) if seeds > 1 else torch.zeros(len(results[0]))
        cells = [f"{m:.1%} ± {s:.1%}" for m, s in zip(accuracies.mean(0), spread, strict=True)]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    typer.run(main)
