"""Trains the bundled vision transformer shapes-vit on drawn scenes.

The stem is that of shapes-vgg, and its weights do not change: its maps of all scenes are computed once. AdamW
with a warm-up, a constant and a linearly falling learning rate. The loss is the mean cross-entropy of two
predictions of one head: of the class token and of the mean of the patch tokens. The second is dropped
afterwards: without it the class token learns nothing in the first hundreds of steps.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from model_cards import accuracy, parameter_count, write_card, write_file
from safetensors.torch import save
from torch import nn
from tqdm import tqdm

from phosphene.builtin.networks import MEAN, STD, load_network, normalize
from phosphene.builtin.scenes import CLASSES, Scenes, draw_scenes
from phosphene.builtin.vision_transformer import VIT, ShapesViT

# data
TEST_SCENES = 2_000
#: The network whose first stages are the stem.
STEM = "shapes-vgg"
# optimizer
STEPS = 1_200
BATCH = 64
LEARNING_RATE = 2e-3
WARM_UP, DECAY = 0.1, 0.5  # fractions of the steps in which the learning rate rises, and falls
WEIGHT_DECAY = 0.05  # of matrices; none for biases and norms
CLIP_NORM = 1.0
SMOOTHING = 0.05  # of the labels

RECIPE = (
    f"AdamW, {STEPS} batches of {BATCH}; the stem is that of {STEM}, without further training; mean "
    f"cross-entropy of the class token and of the mean patch token, labels smoothed by {SMOOTHING}"
)


def train(out: Path, *, scenes: int = 10_000, steps: int = STEPS, seed: int) -> None:
    """Train the network and write its weights and card to ``out``."""
    train_set = draw_scenes(scenes, seed=seed)
    test_set = draw_scenes(TEST_SCENES, seed=seed, split="test")
    network = fit(train_set, steps=steps, seed=seed)
    # Stored in half precision, and tested as it is stored.
    weights = save({key: value.contiguous() for key, value in network.half().state_dict().items()})
    network = network.float()
    write_file(out / f"{VIT}.safetensors", weights)
    summary = (ShapesViT.__doc__ or "").splitlines()[0]
    facts: dict[str, Any] = {
        "parameters": parameter_count(network),
        "input_mean": MEAN,
        "input_std": STD,
        "training": f"{RECIPE}; stored in half precision",
        "training_scenes": scenes,
        "training_seed": seed,
        "test_scenes": len(test_set),
        "test_accuracy": accuracy(network, test_set),
    }
    write_card(
        out / f"{VIT}.md", f"{summary} Classifies drawn scenes into: {', '.join(CLASSES)}.", weights, **facts
    )
    tqdm.write(f"{VIT}: {facts['test_accuracy']:.2%} of {len(test_set)} test scenes")


def fit(scenes: Scenes, *, steps: int, seed: int) -> ShapesViT:
    """Train a new network on the scenes; returns it in eval mode."""
    # model
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = ShapesViT()
        vgg = load_network(STEM).features
    assert isinstance(vgg, nn.Sequential)
    network.stem.load_state_dict(vgg[: len(network.stem)].state_dict())
    network.stem.requires_grad_(False)
    with torch.no_grad():
        maps = torch.cat([network.stem(normalize(batch)).half() for batch in scenes.images.split(BATCH)])

    # optimizer
    trained = [p for p in network.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in trained if p.ndim > 1]},
        {"params": [p for p in trained if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    rate = lambda step: min(1.0, (step + 1) / (WARM_UP * steps), (steps - step) / (DECAY * steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)

    # training loop
    generator = torch.Generator().manual_seed(seed)
    network.train()
    for _ in tqdm(range(steps), VIT, unit="batch", mininterval=1.0):
        indices = torch.randint(len(scenes), (BATCH,), generator=generator)
        tokens = network.tokens(maps[indices].float())
        logits = network.head(torch.stack([tokens[:, 0], tokens[:, 1:].mean(1)])).flatten(0, 1)
        loss = F.cross_entropy(logits, scenes.labels[indices].repeat(2), label_smoothing=SMOOTHING)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained, CLIP_NORM)
        optimizer.step()
        schedule.step()
    return network.requires_grad_(True).eval()
