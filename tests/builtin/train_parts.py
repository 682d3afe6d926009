"""Trains the bundled classifier parts-resnet on drawn scenes of objects made of parts.

Free adversarial training (Shafahi et al. 2019): AdamW with a one-cycle learning rate in bfloat16, two updates
on each batch, the first of whose backward passes also moves the images by the sign of their gradient; random
shifts, mirroring, exchange of color channels, brightness, contrast and noise. Robust training gives gradients
and synthesized images that follow the objects; noise and weight decay smooth the 7x7 filters. The loss is the
cross-entropy plus the penalty of ``train_classifiers`` on the spread of the last feature map.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from model_cards import accuracy, parameter_count, write_card, write_file
from safetensors.torch import save
from torch import Tensor, nn
from tqdm import tqdm
from train_classifiers import CLIP_NORM, SPREAD_WEIGHT, spread

from phosphene.builtin.networks import MEAN, STD, normalize
from phosphene.builtin.part_scenes import PART_CLASSES, draw_part_scenes
from phosphene.builtin.parts_resnet import PARTS_RESNET, PartsResNet

# data
SCENES = 6_000
TEST_SCENES = 1_000
SHIFT = 12  # largest random shift in pixels
SIGMA = 0.1  # largest standard deviation of the noise
# adversarial examples
EPS = 8 / 255
RAMP = 1 / 3  # fraction of the batches in which the budget rises from 0 to EPS
REPLAYS = 2  # updates on each batch: on images with noise, then on images moved by that update's gradient
# optimizer
EPOCHS = 8
BATCH = 64
LEARNING_RATE = 3e-3  # maximum of the one-cycle schedule
WARM_UP = 0.15
WEIGHT_DECAY = 0.1  # of convolutions and linear layers; none for biases and norms
# The first layer starts small and learns slowly, so that its filters are smooth and not grained by noise.
FIRST_LAYER_START = 0.1  # times the usual standard deviation
FIRST_LAYER_RATE = 1e-3
FIRST_LAYER_DECAY = 1.0

RECIPE = (
    f"free adversarial training, eps {EPS * 255:g}/255, {REPLAYS} updates of a batch; AdamW, batches of "
    f"{BATCH}, bf16; shifts up to {SHIFT} px, mirroring, exchanged color channels, brightness, contrast and "
    f"noise; cross-entropy plus {SPREAD_WEIGHT} x the spread of the last map; stored in half precision"
)


def train(out: Path, *, seed: int, scenes: int = SCENES, epochs: int = EPOCHS) -> None:
    """Train parts-resnet and write its weights and card to ``out``."""
    drawn = draw_part_scenes(scenes, seed=seed)
    network = fit((drawn.images * 255).round().byte(), drawn.labels, epochs=epochs, seed=seed)
    save_network(network, out, seed=seed, scenes=scenes, epochs=epochs)


def save_network(network: nn.Module, out: Path, *, seed: int, scenes: int, epochs: int) -> None:
    """Write the weights in half precision and the card, with the accuracy of the network as it is stored."""
    weights = save({key: value.contiguous() for key, value in network.half().state_dict().items()})
    network = network.float()
    test_set = draw_part_scenes(TEST_SCENES, seed=seed, split="test")
    write_file(out / f"{PARTS_RESNET}.safetensors", weights)
    summary = (PartsResNet.__doc__ or "").splitlines()[0]
    facts: dict[str, Any] = {
        "parameters": parameter_count(network),
        "input_mean": MEAN,
        "input_std": STD,
        "training": RECIPE,
        "training_scenes": scenes,
        "training_seed": seed,
        "epochs": epochs,
        "test_scenes": TEST_SCENES,
        "test_accuracy": accuracy(network, test_set),
    }
    summary += f" Classifies drawn scenes of objects made of parts into: {', '.join(PART_CLASSES)}."
    write_card(out / f"{PARTS_RESNET}.md", summary, weights, **facts)
    tqdm.write(f"{PARTS_RESNET}: {facts['test_accuracy']:.2%} of {TEST_SCENES} test scenes")


def fit(
    images: Tensor, labels: Tensor, *, epochs: int, seed: int,
    after_epoch: Callable[[nn.Module, int], None] = lambda network, epoch: None,
) -> nn.Module:  # fmt: skip
    """Train a new network on images (N, 3, H, W) uint8 and labels (N,); returns it in eval mode."""
    # model
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = PartsResNet()
    network.conv1.weight.data *= FIRST_LAYER_START
    network.to(memory_format=torch.channels_last)
    last_maps: list[Tensor] = []
    hook = network.avgpool.register_forward_pre_hook(lambda _, inputs: last_maps.append(inputs[0]))

    # optimizer
    first = network.conv1.weight
    groups: list[dict[str, Any]] = [
        {"params": [first], "weight_decay": FIRST_LAYER_DECAY},
        {"params": [p for p in network.parameters() if p.ndim > 1 and p is not first]},
        {"params": [p for p in network.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    per_epoch = math.ceil(len(images) / BATCH)
    batches = epochs * per_epoch
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, [FIRST_LAYER_RATE, LEARNING_RATE, LEARNING_RATE], batches * REPLAYS, pct_start=WARM_UP
    )

    # data
    generator = torch.Generator().manual_seed(seed)

    def loss_of(pixels: Tensor, classes: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            logits = network(normalize(pixels).contiguous(memory_format=torch.channels_last))
        return F.cross_entropy(logits.float(), classes) + SPREAD_WEIGHT * spread(last_maps.pop())

    # training loop
    network.train()
    progress = tqdm(total=batches, desc=PARTS_RESNET, unit="batch", mininterval=5.0)
    for epoch in range(epochs):
        for number, indices in enumerate(torch.randperm(len(images), generator=generator).split(BATCH)):
            pixels, classes = augment(images[indices].float() / 255, generator), labels[indices]
            eps = EPS * min(1.0, (epoch * per_epoch + number) / (RAMP * batches))
            change = (torch.rand(pixels.shape, generator=generator) * 2 - 1) * eps
            for _ in range(REPLAYS):
                moved = (pixels + change).clamp(0, 1).requires_grad_()
                loss = loss_of(moved, classes)
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(network.parameters(), CLIP_NORM)
                optimizer.step()
                schedule.step()
                assert moved.grad is not None
                change = (change + eps * moved.grad.sign()).clamp(-eps, eps)
            progress.update()
            progress.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
        after_epoch(network, epoch)
    progress.close()
    hook.remove()
    return network.to(memory_format=torch.contiguous_format).eval()


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Random shift, mirroring, channel order, contrast, brightness and noise of pixels (N, 3, H, W)."""
    count, size = len(images), images.shape[-1]
    padded = F.pad(images, (SHIFT,) * 4, mode="reflect")
    corners = torch.randint(2 * SHIFT + 1, (count, 2), generator=generator).tolist()
    orders = torch.rand(count, 3, generator=generator).argsort(dim=1)
    crops = [
        image[order, y : y + size, x : x + size]
        for image, order, (y, x) in zip(padded, orders, corners, strict=True)
    ]
    images = torch.stack(crops)
    flips = torch.rand(count, 1, 1, 1, generator=generator) < 0.5
    images = torch.where(flips, images.flip(3), images)
    contrast, brightness, sigma = torch.rand(3, count, 1, 1, 1, generator=generator)
    images = (images - 0.45) * (0.7 + 0.6 * contrast) + 0.35 + 0.2 * brightness
    return (images + torch.randn(images.shape, generator=generator) * (SIGMA * sigma)).clamp(0, 1)
