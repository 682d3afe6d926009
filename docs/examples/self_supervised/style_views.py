"""Does style augmentation help a network that learns without labels? SimCLR with and without, in minutes.

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
NEIGHBOURS = 10


def network() -> nn.Sequential:
    """Four convolutions and a mean: pictures (N, 3, SIDE, SIDE) -> representations (N, 128)."""
    layers: list[nn.Module] = []
    for inputs, outputs in ((3, 16), (16, 32), (32, 64), (64, 128)):
        stride = 1 if inputs == 3 else 2
        layers += [nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


def augmentations(stylizer: TrainedNetwork | None) -> v2.Compose:
    """The usual views, drawn for each picture of a batch; with a stylizer some of them in other styles."""
    jitter = v2.ColorJitter(0.4, 0.4, 0.4, 0.1)
    plain = [v2.RandomResizedCrop(SIDE, (0.5, 1.0), antialias=True), v2.RandomHorizontalFlip(), jitter]
    each = v2.Compose([*plain, v2.RandomGrayscale(0.2)])
    batch: list[nn.Module] = [v2.Lambda(lambda images: torch.stack([each(image) for image in images]))]
    if stylizer is not None:
        batch.insert(0, StyleAugmentation(stylizer, p=0.5, strength=(0.1, 0.5)))
    return v2.Compose(batch)


def info_nce(first: Tensor, second: Tensor) -> Tensor:
    """-log softmax of each view's similarity to the other view of its picture, among all views: a number."""
    z = F.normalize(torch.cat([first, second]), dim=1)
    similar = z @ z.T / TEMPERATURE
    similar.fill_diagonal_(-torch.inf)
    partner = torch.arange(len(z)).roll(len(first))
    return F.cross_entropy(similar, partner)


def learn(images: Tensor, views: v2.Compose, *, steps: int, batch: int, seed: int) -> nn.Sequential:
    """A network that tells pictures apart whatever their views, in eval mode."""
    torch.manual_seed(seed)
    encoder, head = network(), nn.Sequential(nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 64))
    optimizer = torch.optim.AdamW([*encoder.parameters(), *head.parameters()], 2e-3, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        some = images[torch.randint(len(images), (batch,))]
        loss = info_nce(*(head(encoder(views(some))) for _ in range(2)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return encoder.eval()


@torch.no_grad()
def nearest(known: Tensor, labels: Tensor, asked: Tensor, truth: Tensor) -> float:
    """Share of the asked whose nearest known neighbours, by cosine, vote for the right class."""
    similar = F.normalize(asked, dim=1) @ F.normalize(known, dim=1).T
    votes = F.one_hot(labels[similar.topk(min(NEIGHBOURS, len(known))).indices]).sum(1)
    return (votes.argmax(1) == truth).double().mean().item()


def linear_probe(known: Tensor, labels: Tensor, asked: Tensor, truth: Tensor) -> float:
    """Share of the asked that a linear classifier on the known gets right."""
    mean, std = known.mean(0), known.std(0) + 1e-6
    known, asked = (known - mean) / std, (asked - mean) / std
    linear = nn.Linear(known.shape[1], int(labels.max()) + 1)
    nn.init.zeros_(linear.weight)
    optimizer = torch.optim.LBFGS(linear.parameters(), max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(linear(known), labels) + 1e-3 * linear.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return (linear(asked).argmax(1) == truth).double().mean().item()


def judged(encoder: nn.Module, count: int) -> list[float]:
    """Accuracies on so many unseen scenes, of their shapes and of their grounds, either way."""
    small, known, test = (
        v2.Resize(SIDE, antialias=True),
        draw_scenes(count, seed=1),
        draw_scenes(count, split="test"),
    )
    with torch.no_grad():
        seen, asked = (encoder(small(scenes.images)) for scenes in (known, test))
    shapes, grounds = (known.labels, test.labels), (known.backgrounds, test.backgrounds)
    return [
        judge(seen, own, asked, truth)
        for own, truth in (shapes, grounds)
        for judge in (nearest, linear_probe)
    ]


def main(
    scenes: Annotated[int, typer.Option(help="pictures to learn from, without labels")] = 1000,
    labelled: Annotated[int, typer.Option(help="pictures with labels, to judge by")] = 500,
    steps: Annotated[int, typer.Option(help="of learning")] = 120,
    batch: Annotated[int, typer.Option(help="pictures a step, two views of each")] = 64,
    seeds: Annotated[int, typer.Option(help="runs of each kind")] = 3,
) -> None:
    """Print a table: accuracies with and without style augmentation, mean and spread over the seeds."""
    stylizer = load_result("builtin:shapes-styles")
    assert isinstance(stylizer, TrainedNetwork)
    images = draw_scenes(scenes).images
    kinds = {"no learning": (None, 0), "crop, flip, colours": (None, steps), "and style": (stylizer, steps)}
    print("| views | shape: neighbours | linear | ground: neighbours | linear |\n|" + " --- |" * 5)
    for name, (given, length) in kinds.items():
        found = []
        for seed in range(seeds):
            encoder = learn(images, augmentations(given), steps=length, batch=batch, seed=seed)
            found.append(judged(encoder, labelled))
        accuracies = torch.tensor(found, dtype=torch.float64)
        spread = accuracies.std(0) if seeds > 1 else torch.zeros(len(found[0]))
        cells = [f"{m:.1%} ± {s:.1%}" for m, s in zip(accuracies.mean(0), spread, strict=True)]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    typer.run(main)
