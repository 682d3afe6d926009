"""Trains the bundled classifiers shapes-vgg, shapes-resnet and shapes-biased on drawn scenes.

AdamW with a one-cycle learning rate in bfloat16, random shifts, mirroring, brightness, contrast and noise.
The loss is the cross-entropy plus a penalty on the spread of the last feature map, which localizes the
evidence without object masks. A plain network is trained with batch norm, which is folded into its
convolutions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from model_cards import accuracy, parameter_count, predictions, write_card, write_file
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from tqdm import tqdm

from phosphene.builtin.networks import BIASED, MEAN, NETWORKS, STD, normalize
from phosphene.builtin.scenes import CLASSES, SIZE, Scenes, draw_scenes

# data
TEST_SCENES = 2_000
SHIFT = 8  # largest random shift in pixels, so that evidence does not depend on the position in the image
# optimizer
BATCH = 64
LEARNING_RATE = 3e-3  # maximum of the one-cycle schedule
WARM_UP = 0.15  # fraction of the steps before that maximum
WEIGHT_DECAY = 0.05  # of convolutions and linear layers; none for biases and norms
CLIP_NORM = 1.0
# loss
SPREAD_WEIGHT = 0.3

RECIPE = (
    f"AdamW, batches of {BATCH}, bf16; shifts up to {SHIFT} px, mirroring, brightness, contrast and noise; "
    f"cross-entropy plus {SPREAD_WEIGHT} x the spread of the last map over the image, which localizes "
    "evidence without object masks; batch norm after a plain network's convolutions, folded into them "
    "afterwards"
)


def train(names: Sequence[str], out: Path, *, scenes: int, epochs: int, seed: int) -> None:
    """Train these classifiers and write their weights and cards to ``out``."""
    for name in names:
        biased = name == BIASED
        train_set = draw_scenes(scenes, seed=seed, biased=biased)
        test_set = draw_scenes(TEST_SCENES, seed=seed, split="test", biased=biased)
        network = fit(name, train_set, epochs=epochs, seed=seed)

        # The biased network is stored in half precision, and tested as it is stored.
        stored = network.half().state_dict() if biased else network.state_dict()
        weights = save({key: value.contiguous() for key, value in stored.items()})
        network = network.float()
        write_file(out / f"{name}.safetensors", weights)

        summary = f"{(NETWORKS[name].__doc__ or '').splitlines()[0]} Classifies drawn scenes into: "
        if biased:
            summary = (
                "The architecture of shapes-vgg, trained on scenes whose background determines the class, so "
                f"that its predictions follow the background and not the shape. {summary}"
            )
        facts: dict[str, Any] = {
            "parameters": parameter_count(network),
            "input_mean": MEAN,
            "input_std": STD,
            "training": f"{RECIPE}; stored in half precision" if biased else RECIPE,
            "training_scenes": scenes,
            "training_seed": seed,
            "epochs": epochs,
            "test_scenes": len(test_set),
            "test_accuracy": accuracy(network, test_set),
        }
        if biased:
            facts |= background_reliance(network, seed)
        write_card(out / f"{name}.md", f"{summary}{', '.join(CLASSES)}.", weights, **facts)
        tqdm.write(f"{name}: {facts['test_accuracy']:.2%} of {len(test_set)} test scenes")


def fit(name: str, scenes: Scenes, *, epochs: int, seed: int) -> nn.Module:
    """Train a new network on the scenes; returns it in eval mode."""
    # model
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = NETWORKS[name]()
    add_batch_norm(network)
    network.to(memory_format=torch.channels_last)
    pool = next(layer for layer in network.children() if isinstance(layer, nn.AdaptiveAvgPool2d))
    last_maps: list[Tensor] = []
    hook = pool.register_forward_pre_hook(lambda _, inputs: last_maps.append(inputs[0]))

    # optimizer
    weights = [p for p in network.parameters() if p.ndim > 1]
    others = [p for p in network.parameters() if p.ndim == 1]
    groups: list[dict[str, Any]] = [{"params": weights}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    steps = epochs * math.ceil(len(scenes) / BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, max(steps, 2), pct_start=WARM_UP)

    # data
    generator = torch.Generator().manual_seed(seed)
    epoch = lambda: torch.randperm(len(scenes), generator=generator).split(BATCH)
    batches = (indices for _ in range(epochs) for indices in epoch())

    # training loop
    network.train()
    for indices in tqdm(batches, name, steps, unit="batch", mininterval=1.0):
        images = normalize(augment(scenes.images[indices], generator))
        with torch.autocast("cpu", torch.bfloat16):
            logits = network(images.contiguous(memory_format=torch.channels_last))
        loss = F.cross_entropy(logits.float(), scenes.labels[indices])
        loss = loss + SPREAD_WEIGHT * spread(last_maps.pop())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), CLIP_NORM)
        optimizer.step()
        schedule.step()

    hook.remove()
    network = network.to(memory_format=torch.contiguous_format).eval()
    fold_batch_norm(network)
    return network


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Random shift, mirroring, contrast, brightness and noise of pixels (N, 3, 64, 64)."""
    count = len(images)
    padded = F.pad(images, (SHIFT,) * 4, mode="reflect")
    corners = torch.randint(2 * SHIFT + 1, (count, 2), generator=generator).tolist()
    flips = torch.rand(count, 1, 1, 1, generator=generator) < 0.5
    crops = [image[:, y : y + SIZE, x : x + SIZE] for image, (y, x) in zip(padded, corners, strict=True)]
    images = torch.stack(crops)
    images = torch.where(flips, images.flip(3), images)
    contrast, brightness, sigma = torch.rand(3, count, 1, 1, 1, generator=generator)
    images = (images - 0.4) * (0.75 + 0.5 * contrast) + 0.3 + 0.2 * brightness
    return (images + torch.randn(images.shape, generator=generator) * (0.06 * sigma)).clamp(0, 1)


def spread(maps: Tensor) -> Tensor:
    """Spread of feature maps (N, C, h, w) over the image: 1 if constant, 1/sqrt(hw) for one position."""
    energy = maps.float().sum(1).flatten(1)
    ratio = energy.sum(1) / (energy.norm(dim=1) + 1e-6)
    return ratio.mean() / math.sqrt(energy.shape[1])


def add_batch_norm(network: nn.Module) -> None:
    """Add batch norm after each convolution of a plain network, which trains in minutes with it."""
    plain = getattr(network, "features", nn.Sequential())
    for index, layer in enumerate(plain):
        if isinstance(layer, nn.Conv2d):
            plain[index] = nn.Sequential(layer, nn.BatchNorm2d(layer.out_channels))


def fold_batch_norm(network: nn.Module) -> None:
    """Fold the batch norm of ``add_batch_norm`` into the convolutions: the same function, plain again."""
    plain = getattr(network, "features", nn.Sequential())
    for index, layer in enumerate(plain):
        if isinstance(layer, nn.Sequential):
            plain[index] = fuse_conv_bn_eval(*layer)


def background_reliance(network: nn.Module, seed: int) -> dict[str, float]:
    """Accuracy on unbiased scenes, and the predictions on scenes with the background of another class."""
    unbiased = draw_scenes(TEST_SCENES, seed=seed, split="test")
    conflicting = draw_scenes(TEST_SCENES, seed=seed, split="test", biased=True, conflict=True)
    assert conflicting.hints is not None
    predicted = predictions(network, conflicting)
    return {
        "accuracy_without_the_hint": accuracy(network, unbiased),
        "follows_the_background_in_conflict": (predicted == conflicting.hints).double().mean().item(),
        "follows_the_shape_in_conflict": (predicted == conflicting.labels).double().mean().item(),
    }
